"""Visual tokens that go between layers of the language model: PyramidDrop and SparseVLM.

Both look at what text attends to, and let fewer visual tokens of each image into the layers behind. So a prompt runs in
several runs of layers, each with positions of its own, as if the image had never been larger, and each layer's cache
keeps as many tokens as the layer saw. This is for the dense configuration alone: VISOR's vision stream has no place
where tokens may leave. What goes depends on the question, so nothing is kept from one to the next but the encoder's
work.
"""
from functools import partial, reduce
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

import data
from cli import timer
from flops import LayerTokens
from layout import KV, LayerCache, Past, gather_rows, round_up
from reduction import best, raters, recycle, sparsevlm


class PrunedCache:
    """What cache_tree.CacheTree is, where visual tokens go by what is asked: all that came in runs anew with each
    question."""

    def __init__(self, model, configurations, capacity):
        """model: a VLM whose reduction drops tokens inside. configurations: the dense one. capacity: tokens of text to
        reserve for what follows."""
        self.model, self.configurations, self.capacity = model, configurations, capacity
        self.segments = []    # (prompts, of each prompt the arrange.Pieces of its images)
        self.truncate(0)

    def truncate(self, n):
        """Takes all segments after the first n back."""
        del self.segments[n:]
        self.runs = []        # (first layer, the one behind the last, Past)
        self.counts = []      # of each run: of each prompt its images' visual tokens
        self.numbers = []     # likewise which of the first run's they are, (tokens,); -1: others were merged into it
        self.cache = []

    def extend(self, prompts, timings=None, known=None):
        """Adds a segment, a data.Prompt for each sample: its images are encoded. known, timings: as in VLM.pieces."""
        with timer(timings, "encoder", self.model.device):
            pieces = iter(self.model.pieces([x for p in prompts for x in p.images], known, timings))
        self.truncate(len(self.segments))
        self.segments.append((prompts, [[next(pieces) for _ in p.images] for p in prompts]))
        self.timings = timings

    def run(self, sa):
        """Runs all layers, if that has not been done. Returns t (B, Nt, d) of the newest segment after the last layer,
        and the cache of every layer."""
        if not self.runs:
            segments, pieces = zip(*self.segments)
            prompts = [reduce(data.join, own) for own in zip(*segments)]
            known = [x for own in zip(*pieces) for images in own for x in images]
            self.t = self.run_layers(prompts, *self.model.embed(data.collate(prompts), self.timings, known))
        *before, newest = [np.array([len(p.ids) for p in prompts]) for prompts, _ in self.segments]
        first = sum(before, np.zeros_like(newest))                          # (B,) where the newest one starts
        at = np.minimum(first[:, None] + np.arange(newest.max()), self.t.shape[1] - 1)
        at = torch.from_numpy(at + np.arange(len(at))[:, None] * self.t.shape[1])
        return gather_rows(self.t, at.to(self.t.device)), self.cache

    def ran(self, b):
        """The flops.LayerTokens of prompt b."""
        counts = [counts[b] for counts in self.counts]
        if self.model.config.reduction.method == "pyramiddrop":
            return LayerTokens(counts)
        return LayerTokens(counts, len(self.rows[b]), self.asked[b])

    def kept(self, b):
        """Of each run, which of prompt b's visual tokens are in its layers, (tokens,); -1: others were merged into it.
        """
        return [numbers[b].cpu().numpy() for numbers in self.numbers]

    @property
    def end(self):
        """The position that follows the first sample's last token."""
        return self.segments[-1][0][0].end

    def run_layers(self, prompts, t, v):
        """Runs all layers, and drops between them: t (B, Nt, d), v (B, Nv, d) as they enter layer 0. Returns t."""
        model, c, r = self.model, self.model.config, self.model.config.reduction
        lm, every = model.language_model, tuple(range(c.layers))
        choosing = partial(timer, self.timings, "select", model.device)
        numbers = [torch.arange(len(p.v_pos), device=v.device) for p in prompts]
        with choosing():
            self.rows, self.asked = zip(*(self.text_rows(p, t[b], v[b]) for b, p in enumerate(prompts)))
        for k, (start, stop) in enumerate(pairwise([0, *r.drops(c.layers), c.layers])):
            batch = data.collate(prompts)
            layout, vision = model.layout(batch), batch.v_pos.shape[1]
            self.runs.append((start, stop, Past.empty(len(prompts)).extend(*batch.positions)))
            self.counts.append([image_tokens(p) for p in prompts])
            self.numbers.append(numbers)
            self.cache += [LayerCache(KV(round_up(batch.ids.shape[1] + self.capacity) + vision), KV(0))
                           for _ in range(start, stop)]
            looks = stop - 1 if r.method == "sparsevlm" else stop  # its attention decides: of the layer behind which
            t, v = lm.run(t, v, layout, every, start, looks, self.cache)  # tokens go, or before which
            last = stop == c.layers or not vision                  # of text alone nothing goes
            if not last:
                with choosing():
                    x = lm.layers[looks].input_layernorm(layout.interleave(v, t))             # (B, N, d)
                    weights = [self.weights(looks, x[b], p, self.rows[b], [r[b] for r in layout.joint.rope_q])
                               for b, p in enumerate(prompts)]
            t, v = lm.run(t, v, layout, every, looks, stop, self.cache)
            if not last:
                with choosing():
                    prompts, v, numbers = self.drop(prompts, v, weights, k)
        return t

    def text_rows(self, prompt, t, v):
        """(the text tokens that decide, by their places in t (Nt, d), how many they were chosen from): the one from
        which the answer's first follows; SparseVLM's raters, of all between the images and the answer. v (Nv, d)."""
        start = prompt.answer_starts[-1] if prompt.answer_starts else prompt.end
        end = sum(p < start for p in prompt.t_pos)
        first = sum(p < prompt.v_pos[-1] for p in prompt.t_pos) if prompt.images else end
        if self.model.config.reduction.method == "pyramiddrop" or first == end:
            return torch.tensor([end - 1], device=t.device), 0
        found = raters(v[:len(prompt.v_pos)], t[first:end])
        return first + (found | ~found.any()).nonzero()[:, 0], end - first

    def weights(self, l, x, prompt, rows, rope):
        """Of layer l's attention from text tokens to visual ones, mean over heads: (rows, visual tokens). x (N, d): all
        tokens in order of position, as they enter its projections."""
        t_pos = torch.tensor(prompt.t_pos, device=x.device)[rows]
        n = len(prompt.t_pos) + len(prompt.v_pos)                          # padding stands behind
        found = self.model.language_model.layers[l].self_attn.weights(x[:n], t_pos, [r[:n] for r in rope])
        return found[:, prompt.v_pos]

    def drop(self, prompts, v, weights, k):
        """What goes on behind the k-th drop: (prompts, v, numbers). weights: of each prompt (rows, visual tokens)."""
        r, layers = self.model.config.reduction, self.model.config.layers
        left, rows, numbers = [], [], []
        for b, prompt in enumerate(prompts):
            parts, own_numbers, firsts, tokens = [], [], self.counts[0][b], image_tokens(prompt)
            images = (v[b, :len(prompt.v_pos)].split(tokens), self.numbers[-1][b].split(tokens),
                      weights[b].split(tokens, dim=1))
            for first, own, number, w in zip(firsts, *images):
                merged = own[:0]
                if r.method == "pyramiddrop":
                    kept = best(w.mean(0), r.pyramid_count(k, first, layers))
                else:
                    kept = sparsevlm(w, r.sparse_scale(first))
                    goes = torch.ones(len(own), dtype=torch.bool, device=v.device).index_fill(0, kept, False)
                    if len(kept) < len(own) and r.option != "drop":
                        merged = recycle(own[goes], w.mean(0)[goes])
                parts.append(torch.cat([own[kept], merged]))
                own_numbers.append(F.pad(number[kept], (0, len(merged)), value=-1))
            left.append(data.with_tokens(prompt, list(map(len, parts))))
            rows.append(torch.cat([v[b, :0], *parts]))
            numbers.append(torch.cat([self.numbers[-1][b][:0], *own_numbers]))
        most = max(map(len, rows))
        return left, torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in rows]), numbers


def image_tokens(prompt):
    """Visual tokens of each image of a prompt."""
    return [prompt.v_img.count(i) for i in range(len(prompt.images))]
