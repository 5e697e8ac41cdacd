"""Visual tokens that go between layers of the language model: PyramidDrop and SparseVLM.

Both look at what text attends to, and let fewer visual tokens of each image into the layers behind. So a prompt runs in
stages, each with positions of its own, as if the image had never been larger, and each layer's cache keeps as many
tokens as the layer saw. This is for the dense configuration alone: VISOR's vision stream has no place where tokens may
leave. What goes depends on the question, so nothing is kept from one to the next but the encoder's work.
"""
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

import data
from cli import timer
from flops import Stages
from layout import KV, LayerCache, Past, round_up
from reduction import best, raters, recycle, sparsevlm


class PrunedCache:
    """Prompts that have run in stages. For decoding it is what a cache_tree.CacheTree is."""

    def __init__(self, model, prompts, steps, timings=None, known=None):
        """prompts: a list of data.Prompt, for a model whose reduction drops tokens inside. steps: tokens of text to
        reserve. known: as in VLM.pieces."""
        self.model, self.prompts, self.steps = model, prompts, steps
        self.stages = []      # (first layer, the one behind the last, Past)
        self.counts = []      # of each stage: of each prompt its images' visual tokens
        self.kept = []        # likewise which of the first stage's they are, (tokens,); -1: others were merged into it
        self.cache = []
        with timer(timings, "prefill", model.device):
            t, v = model.embed(data.collate(prompts), timings, known)
            self.t = self.run_stages(prompts, t, v, timings)

    def ran(self, b):
        """The flops.Stages of prompt b."""
        raters = self.model.config.reduction.method == "sparsevlm"
        return Stages([counts[b] for counts in self.counts], *[len(self.rows[b]), self.asked[b]] * raters)

    def run(self, sa):
        """The text stream behind all layers, (B, Nt, d), and the caches of all layers."""
        return self.t, self.cache

    def run_stages(self, prompts, t, v, timings):
        """Runs all layers, and drops between them. Returns t."""
        model, c, r = self.model, self.model.config, self.model.config.reduction
        lm, every = model.language_model, tuple(range(c.layers))
        choosing = partial(timer, timings, "select", model.device)
        self.kept.append([torch.arange(len(p.v_pos), device=v.device) for p in prompts])
        with choosing():
            self.rows, self.asked = zip(*(self.text_rows(p, t[b], v[b]) for b, p in enumerate(prompts)))
        for k, (start, stop) in enumerate(pairwise([0, *r.drops(c.layers), c.layers])):
            batch = data.collate(prompts)
            layout, vision = model.layout(batch), batch.v_pos.shape[1]
            self.stages.append((start, stop, Past.empty(len(prompts)).extend(batch.t_pos, batch.v_pos)))
            self.counts.append([image_tokens(p) for p in prompts])
            self.cache += [LayerCache(KV(round_up(batch.ids.shape[1] + self.steps) + vision), KV(0))
                           for _ in range(start, stop)]
            looks = stop - 1 if r.method == "sparsevlm" else stop  # its attention decides: of the layer behind which
            t, v = lm.run(t, v, layout, every, start, looks, self.cache)  # tokens go, or before which
            if stop == c.layers:
                return lm.run(t, v, layout, every, looks, stop, self.cache)[0]
            with choosing():
                x = lm.layers[looks].input_layernorm(layout.interleave(v, t))             # (B, N, d)
                weights = [self.weights(looks, x[b], p, self.rows[b], [r[b] for r in layout.joint.rope_q])
                           for b, p in enumerate(prompts)]
            t, v = lm.run(t, v, layout, every, looks, stop, self.cache)
            with choosing():
                prompts, v = self.drop(prompts, v, weights, k)

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
        """What goes on behind the k-th drop: (prompts, v). weights: of each prompt (rows, visual tokens)."""
        r, layers = self.model.config.reduction, self.model.config.layers
        left, rows, numbers = [], [], []
        for b, prompt in enumerate(prompts):
            parts, own_numbers, firsts, tokens = [], [], self.counts[0][b], image_tokens(prompt)
            images = (v[b, :len(prompt.v_pos)].split(tokens), self.kept[-1][b].split(tokens),
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
            numbers.append(torch.cat([self.kept[-1][b][:0], *own_numbers]))
        self.kept.append(numbers)
        most = max(map(len, rows))
        return left, torch.stack([F.pad(row, (0, 0, 0, most - len(row))) for row in rows])


def image_tokens(prompt):
    """Visual tokens of each image of a prompt."""
    return [prompt.v_img.count(i) for i in range(len(prompt.images))]
