"""VISOR on LLaVA-OneVision: encoder -> connector -> a Qwen2 over two streams with three kinds of layer.

The heart is LanguageModel.run: which layers read vision, and how (paper 4.1 to 4.2.2). VLM is the whole model: images
to visual tokens, the route (4.3), generation, encode once and ask many. There are no image placeholder tokens inside
the language model.
"""
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import weights
from cache_tree import CacheTree
from cli import not_finite, timer
from config import group_by_configuration
from data import Prompt, collate, target_mask
from decoding import NOT_FINITE, decode, sample_token
from encoders import normalise, send
from encoders.siglip import VisionTower
from flops import llm_flops
from layers import Block, Connector, CrossAttention, Policy, RMSNorm, linear
from layout import LayerCache, Past, compute_dtype, make_layout, make_routing_layout, round_up, upload
from reduction import reduce


class LanguageModel(nn.Module):
    """Qwen2 over two streams, t for text and v for vision, with three kinds of layer."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))         # TL_l
        self.cross = nn.ModuleDict({str(l): CrossAttention(c) for l in c.ca})  # L_CA of the paper; sa is L_SA
        self.norm = RMSNorm(c.hidden, c.rms_eps)

    def run(self, t, v, layout, sa, start=0, stop=None, cache=None):
        """Layers start to stop - 1 (default: all) in configuration sa: Eq. 3; with every layer in sa it is Eq. 1.

        t (B, Nt, d), v (B, Nv, d): the streams as they enter layer `start`; returns them as they enter layer `stop`,
        but v as its last reader found it.
        layout: TokenLayout of the tokens. cache: a LayerCache for each layer, which is read and added to.
        """
        stop = len(self.layers) if stop is None else stop
        # Behind the last layer that reads vision V is not needed; tokens without new vision have nothing to leave out
        last = self.config.vision_readers(sa)[1] if layout.nv else stop
        for l in range(start, stop):
            block, kv = self.layers[l], cache[l] if cache else LayerCache(None, None)
            if l in sa and l < last:                                          # Eq. 3, case 1: TL_l([V; T])
                x = block(layout.interleave(v, t), layout.joint, kv.self_attn)  # (B, Nv + Nt, d)
                v, t = layout.deinterleave(x)
            elif l in sa:                                                     # case 1, of which only T^(l) is needed
                t = block(t, layout.joint_text_queries, kv.self_attn, context=layout.interleave(v, t))
            else:
                if l in self.config.ca and layout.cross is not None:          # case 2: Z, and below TL_l(Z)
                    t = self.cross[str(l)](t, v, layout.cross, kv.cross)      # Eq. 2
                t = block(t, layout.text, kv.self_attn)                       # case 3: TL_l(T)
        return t, v

    def forward(self, t, v, layout, sa):
        """The normalised text stream (B, Nt, d) after all layers. Arguments: as in `run`."""
        return self.norm(self.run(t, v, layout, sa)[0])


# --- the whole model ------------------------------------------------------------------------------------------------

class VLM(nn.Module):
    """The whole model. Prompts come from data.encode; `sa` is a configuration: its self-attention layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Connector(config)
        self.image_newline = nn.Parameter(torch.randn(config.hidden) * config.hidden ** -0.5)  # ends rows of the grid
        self.language_model = LanguageModel(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)
        self.router = Policy(config) if config.router else None  # added in stage 3
        self.tokenizer = None                                    # comes with a checkpoint

    device = property(lambda self: self.image_newline.device)

    def blocks(self):
        """The modules that repeat: what is sharded, or run twice to save memory, one by one."""
        return [*self.vision_tower.encoder["layers"], *self.language_model.layers, *self.language_model.cross.values()]

    def compile(self, **how):
        """torch.compile for all that takes tokens one by one, norms, projections, rotary positions and MLPs, and for
        SigLIP's blocks. Attention over caches and masks of any length is a kernel of its own already: so few graphs
        serve all layers, configurations, picture sizes and the decoding."""
        def by_token(f):
            """f, compiled for tokens in one row: one graph for any number of samples and tokens, one for one token."""
            compiled = torch.compile(f, dynamic=True, **how)

            def run(*inputs):
                # Not as views, as a graph is also bound to the form of what its inputs are views of
                rows = [torch.ops.aten._unsafe_view(x.contiguous(), (-1, *x.shape[2:])) for x in inputs]
                found = compiled(*rows)
                shape = inputs[0].shape[:2]
                return [y.unflatten(0, shape) for y in found] if isinstance(found, tuple) else found.unflatten(0, shape)
            return run
        for block in self.vision_tower.encoder["layers"]:
            block.compile(dynamic=True, **how)
        for block in self.language_model.layers:
            block.before_attention, block.after_attention = map(by_token, (block.before_attention,
                                                                           block.after_attention))
        for cross in self.language_model.cross.values():
            cross.queries, cross.keys_values = by_token(cross.queries), by_token(cross.keys_values)

    @contextmanager
    def observe_attention(self, observer):
        """Within, every attention of the language model also calls observer(layer, kind, q, k, mask) before it runs:
        kind "self" (q and k rotated) or "cross", q (B, Nq, H, D), k (B, Nk, Hkv, D), mask as in layers.attention."""
        lm = self.language_model
        watched = [(l, "self", block.self_attn) for l, block in enumerate(lm.layers)]
        watched += [(int(l), "cross", cross) for l, cross in lm.cross.items()]
        for l, kind, module in watched:
            module.observer = partial(observer, l, kind)  # called in Attention.attend, CrossAttention.forward
        try:
            yield
        finally:
            for *_, module in watched:
                module.observer = None

    # --- images to visual tokens ---

    def encode(self, images):
        """A list of data.ProcessedImage -> one (tokens, d) tensor each. All tiles go through the encoder together."""
        tiles = torch.cat([torch.from_numpy(x.pixels) for x in images])              # (tiles, 3, tile, tile) uint8
        tiles, dtype = send(tiles, self.device), self.image_newline.dtype
        # 16 at a time bound the memory; in training all at once, as every rank must call the encoder equally often
        pieces = (normalise(x, dtype) for x in tiles.split(len(tiles) if torch.is_grad_enabled() else 16))
        features = [reduce(self.vision_tower(x), self.config) for x in pieces]       # (pieces, side * side, features)
        features = torch.cat([self.multi_modal_projector(x) for x in features])      # (tiles, side * side, d)
        features = features.split([x.tiling.tiles for x in images])
        return [self.arrange(f, x.tiling) for f, x in zip(features, images)]

    def arrange(self, tiles, tiling):
        """(tiles, side * side, d) -> (tokens, d): base tile, then the grid unpadded, each row ended by a newline."""
        side, d = self.config.side, self.config.hidden
        base, newline = tiles[0], self.image_newline[None]             # (side * side, d), (1, d)
        if tiling.canvas is None:                                      # one of several images: a lone tile
            return torch.cat([base, newline[:tiling.newlines]])
        (rows, columns), (crop_r, crop_c) = tiling.grid, tiling.crop
        grid = tiles[1:].view(rows, columns, side, side, d).transpose(1, 2).reshape(rows * side, columns * side, d)
        grid = grid[crop_r:rows * side - crop_r, crop_c:columns * side - crop_c]  # without what sees only padding
        if tiling.interpolated:                                        # anyres_max_9: a large image costs no more
            grid = F.interpolate(grid.permute(2, 0, 1)[None], tiling.size, mode="bilinear")[0].permute(1, 2, 0)
        grid = torch.cat([grid, newline.expand(tiling.newlines, 1, d)], dim=1)  # (h, w + 1, d)
        return torch.cat([base, grid.flatten(0, 1)])

    def embed(self, batch, timings=None):
        """data.Batch -> t (B, Nt, d), v (B, Nv, d), as they enter layer 0. Padding is zero in v."""
        t = self.language_model.embed_tokens(torch.from_numpy(batch.ids).to(self.device))  # (B, Nt, d)
        v = t.new_zeros(*batch.v_pos.shape, self.config.hidden)                            # (B, Nv, d)
        images = [x for row in batch.images for x in row]  # of all prompts, so that the encoder runs once
        if images:
            with timer(timings, "encoder", self.device, out_of="prefill"):
                features = iter(self.encode(images))
            rows = [torch.cat([v[0, :0], *(next(features) for _ in row)]) for row in batch.images]
            v = torch.stack([F.pad(row, (0, 0, 0, v.shape[1] - len(row))) for row in rows])
        return t, v

    def layout(self, batch):
        """The TokenLayout of a data.Batch that nothing comes before."""
        return make_layout(*batch.positions, Past.empty(len(batch.ids)), self.config, self.device,
                           compute_dtype(self.image_newline))

    # --- forward ---

    def forward(self, batch, sa):
        """Hidden states (B, Nt, d) of the text tokens of a data.Batch; `head` makes logits of those that matter.
        sa: a configuration, or a list with one for each prompt."""
        t, v = self.embed(batch)
        if not isinstance(sa, list):         # in training: one configuration for all
            return self.language_model(t, v, self.layout(batch), sa)
        groups = group_by_configuration(sa)  # each group of samples on its own
        h = [self.language_model(t[rows], v[rows], self.layout(batch.select(rows)), own) for own, rows in groups]
        return torch.cat(h)[np.concatenate([rows for _, rows in groups]).argsort()]  # in the order of the batch

    def head(self, h):
        """Hidden states (..., d) -> logits (..., vocab)."""
        return linear(h, (self.lm_head or self.language_model.embed_tokens).weight)

    def answer_loss(self, h, labels, t_pos, chunk=1024):
        """Cross-entropy of the targets, summed. h (B, Nt, d) of `forward`; labels and t_pos (B, Nt) in numpy.

        The head runs only where a target follows, `chunk` tokens at a time, and once more in the backward pass: full
        logits of 7,300 tokens and 152,000 words would be 4.4 GB.
        """
        sample, token = target_mask(labels, t_pos).nonzero()  # on the host, so that nothing waits for the device
        on = upload(h.device, index=sample * h.shape[1] + token, targets=labels[sample, token + 1])  # (targets,) each
        h = h.flatten(0, 1).index_select(0, on.index)         # (targets, d)

        def chunk_loss(h, targets):
            return F.cross_entropy(self.head(h).float(), targets, reduction="sum")
        chunks = zip(h.split(chunk), on.targets.split(chunk))
        return sum(checkpoint(chunk_loss, *x, use_reentrant=False, preserve_rng_state=False) for x in chunks)

    # --- a configuration for each question (paper 4.3) ---

    def configurations(self, sa):
        """The configurations that may run when `sa` is asked for: a configuration, a list of them, or "auto"."""
        if sa == "auto":
            if self.router is None:
                raise ValueError('this model has no router: train one with train.py --stage 3, or name a configuration '
                                 'instead of "auto"')
            return self.config.viable
        return list(dict.fromkeys(tuple(sorted(x)) for x in (sa if isinstance(sa, list) else [sa])))

    def route(self, tree, answer_starts, allowed=None):
        """The viable configuration that the router chooses for each sample of a tree.

        Conservative: of the configurations whose probability reaches config.route_threshold, or the likeliest one's,
        the most expensive. So for each question; of several questions in a prompt the most expensive choice runs.
        answer_starts: of the data.Batch that is the tree's newest segment. allowed: those to choose among."""
        c = self.config
        scores = self.route_scores(tree, answer_starts)                                         # (B, K, viable)
        barred = torch.tensor([allowed is not None and own not in allowed for own in c.viable], device=scores.device)
        p = scores.float().masked_fill(barred, float("-inf")).softmax(-1)
        cost = [llm_flops(c, own, 1, 1000) for own in c.viable]                                 # the order counts only
        rank = torch.tensor([sorted(set(cost)).index(x) for x in cost], device=p.device)        # (viable,)
        likely = p >= p.amax(-1, keepdim=True).clamp(max=c.route_threshold)                     # (B, K, viable)
        score = (rank + p / 2).masked_fill(~likely, -1)  # cost first, then probability
        choice = score.amax(1).argmax(-1)                # (B,) the costliest of the questions' choices
        choice = choice.where(p.isfinite().all(-1).all(-1), NOT_FINITE).tolist()  # the host has to know what to run
        if NOT_FINITE in choice:
            raise not_finite("the router's output", scores.dtype)
        return [c.viable[i] for i in choice]

    def route_scores(self, tree, answer_starts):
        """The policy's scores of the viable configurations, (B, K, viable), for up to K questions in each prompt.

        Takes the newest segment up to the route layer, and routing tokens after it, one where each answer starts: each
        attends to what stands before it, and no other token to it. Samples with fewer questions repeat their last one.
        """
        if not all(answer_starts):
            raise ValueError("the prompt has no assistant line to answer on: end it with <|im_start|>assistant")
        shared, newest = tree.root, tree.segments[-1]
        if shared.stop != self.config.route_layer:
            raise ValueError('this cache was not made for the router: prefill with "auto"')
        most = max(map(len, answer_starts))                    # K
        starts = np.array([list(row) + [row[-1]] * (most - len(row)) for row in answer_starts])  # (B, K)
        layout = make_routing_layout(*newest.positions[:2], newest.past, starts, self.config, self.device,
                                     compute_dtype(self.router.token))
        token = self.router.token.expand(*starts.shape, -1)                                      # (B, K, d)
        z, _ = self.language_model.run(token, token[:, :0], layout, shared.sa, 0, shared.stop, shared.cache)
        return self.router(z)

    # --- generation ---

    def new_tree(self, sa, batch, text, vision):
        """An empty CacheTree for `text` and `vision` tokens a sample. sa: as in `configurations`."""
        return CacheTree(self.language_model, self.configurations(sa), batch, (round_up(text), vision))  # text grows

    def extend(self, tree, batch, timings=None):
        """Adds a data.Batch to a tree, and runs it through the layers that all of its configurations share."""
        with timer(timings, "prefill", self.device):
            tree.extend(*self.embed(batch, timings), batch.positions)

    @torch.no_grad()
    def generate(self, prompts, sa, max_tokens=64, temperature=0.0, top_p=1.0, seed=0, tree=None, on_token=None,
                 timings=None, allowed=None, routes=None):
        """Answers to a list of data.Prompt: a list of token id lists, without the closing <|im_end|>.

        sa: a configuration, a list with one for each prompt, or "auto"; allowed: those that the router may choose.
        temperature 0 is greedy; otherwise tokens are drawn from the smallest set with probability top_p, repeatable
        by `seed`. tree: the prompts go on from what it holds, as its newest segment. on_token(i, id) is called for
        each token as it comes. timings: a dict that gains seconds of "encoder", "prefill", "decode". routes: a list
        that receives each prompt's configuration.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}: give at least 1")
        if isinstance(sa, list) and len(sa) != len(prompts):
            raise ValueError(f"{len(sa)} configurations for {len(prompts)} prompts: give one each")
        batch, device = collate(prompts), self.device
        steps = min(max_tokens, 1024)        # longer answers make the cache grow
        tree = tree or self.new_tree(sa, len(prompts), batch.ids.shape[1] + steps, batch.v_pos.shape[1])
        self.extend(tree, batch, timings)
        with timer(timings, "prefill", device):
            sa = self.route(tree, batch.answer_starts, allowed) if sa == "auto" else sa  # one for each prompt
        chosen = sa if isinstance(sa, list) else [tuple(sa)] * len(prompts)
        if routes is not None:
            routes[:] = chosen
        answers, groups = [None] * len(prompts), group_by_configuration(chosen)  # mixed routes: each group on its own
        for own, rows in groups:
            with timer(timings, "prefill", device):
                branch = tree if len(groups) == 1 else tree.select(rows)  # nothing runs for a route not taken
                t, cache = branch.run(own)                                # (rows, Nt, d)
                last = [len(prompts[i].ids) - 1 for i in rows]            # padding stands behind
                logits = self.head(self.language_model.norm(t[torch.arange(len(rows)), last]))  # (rows, vocab)
            with timer(timings, "decode", device):
                position = np.array([prompts[i].end for i in rows])       # of the first token to come
                sampler = partial(sample_token, temperature=temperature, top_p=top_p,
                                  random=torch.Generator(device).manual_seed(seed))
                emit = on_token and (lambda i, token, rows=rows: on_token(rows[i], token))
                found = decode(self, logits, branch.past, position, own, cache, max_tokens, sampler, emit)
                for i, answer in zip(rows, found):
                    answers[i] = answer
        return answers

    def decode_step(self, tokens, layout, sa, cache):
        """One token for each sample: tokens (B,) -> logits (B, vocab) of what follows. layout: DecodeLayout.

        It reads nothing back, its tensors stay where they are and have one shape: as a whole it is one graph for
        torch.compile(fullgraph=True, dynamic=False), and for a CUDA graph."""
        t = self.language_model.embed_tokens(tokens[:, None])                        # (B, 1, d)
        t, _ = self.language_model.run(t, t[:, :0], layout.step(), sa, cache=cache)  # no new vision: (B, 0, d)
        return self.head(self.language_model.norm(t[:, -1]))

    @property
    def stop_id(self):
        return self.tokenizer.token_to_id("<|im_end|>")

    # --- encode once, ask many ---

    @torch.no_grad()
    def prefill(self, prompts, sa, text_capacity=512, timings=None):
        """Runs what several questions share, the system text and the images, once: a CacheTree for `answer`.

        prompts: a list of data.Prompt. Attention is causal, so none of it depends on the question. All layers run now
        where `sa` is one configuration; with "auto" those before the route layer, and each other layer when a question
        is first sent there. text_capacity: tokens to reserve for questions and answers; the cache grows beyond.
        """
        batch = collate(prompts)
        tree = self.new_tree(sa, len(prompts), batch.ids.shape[1] + text_capacity, batch.v_pos.shape[1])
        self.extend(tree, batch, timings)
        return tree

    @torch.no_grad()
    def answer(self, tree, prompt, keep=False, **how):
        """The answer (token ids) to a prompt that goes on from a tree of one sample: data.encode(..., start=tree.end).

        keep: question and answer stay in the tree, so that the next turn can refer to them; otherwise it is as it was,
        for the next question. how: as in generate."""
        n = len(tree.segments)  # to come back to
        sa = "auto" if len(tree.configurations) > 1 else tree.configurations[0]
        try:
            answer, = self.generate([prompt], sa, tree=tree, **how)
        except BaseException:   # Ctrl-C too
            tree.truncate(n)
            raise
        if not keep:            # its cache positions are written again by the next question
            tree.truncate(n)
            return answer
        # The answer's keys stand in the cache of its own route; as a segment, other routes can run it when they need it
        closed = answer + self.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
        turn = Prompt(closed, [tree.end + i for i in range(len(closed))], [], [], [])
        self.extend(tree, collate([turn]))
        return answer

    # --- VISOR from a dense model ---

    def add_packing(self, ratio, widen=False):
        """From now on each tile has about `ratio` times fewer tokens (VISOR-TR). With `widen` the connector tells the
        four sub-tokens of a token apart, and equals their mean until it is trained."""
        if not ratio >= 1:
            raise ValueError(f"packing ratio {ratio}: give a number of at least 1")
        self.config.pack = float(ratio)
        if widen and not self.config.pack_widen:
            self.config.pack_widen, first = True, self.multi_modal_projector.linear_1
            first.weight = nn.Parameter(first.weight.detach().repeat(1, 4) / 4)  # a quarter each: the mean's output
            first.in_features *= 4
        return self

    def add_cross_attention(self, ca=None, sa=None, viable=None, overview=()):
        """Turns a loaded dense model into VISOR: cross-attention in the layers ca, candidates sa (paper 4.2.1, 4.2.2).

        The defaults are those of Config.add_visor. Nothing changes until the new layers are trained."""
        c = self.config
        if c.ca:
            raise ValueError(f"this model has cross-attention already, in layers {c.ca}: start from a dense one")
        c.add_visor(ca, sa, viable, overview)
        for l in c.ca:  # copies of their layers' projections, with an output of zero
            self.init_module(f"language_model.cross.{l}", self.image_newline.dtype, self.device)
        return self

    def add_router(self, threshold=1.0):
        """A new policy over the viable configurations (paper 4.3); nothing else changes. threshold: `route`'s."""
        c = self.config
        if c.route_layer is None:
            raise ValueError("a router chooses among viable configurations, and this model has fewer than two: train "
                             "stages 1 and 2 first")
        if not any(l < c.route_layer for l in (*c.ca, *c.viable[0])):
            raise ValueError(f"a router decides before layer {c.route_layer}, the first that may be skipped, and no "
                             "layer before that one looks at vision; choose other ca or sa")
        c.router, c.route_threshold = True, threshold
        self.router = Policy(c).to(self.device, self.image_newline.dtype)
        with torch.no_grad():
            self.router.token *= self.language_model.embed_tokens.weight.std()  # as large as a word's embedding
        return self

    def remove_router(self):
        """Without a policy, as before add_router."""
        self.config.router, self.router = False, None
        return self

    # --- weights in and out ---

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu"):
        """Loads a checkpoint directory, a hub id, or "SIGLIP+QWEN2": two directories or ids and a new connector.

        dtype: of torch, or "auto", see cli.choose_dtype. Raises ValueError with one line that names the file and the
        mend. Notes on stderr what it loaded."""
        return weights.load(cls, name, dtype, device)

    def save_pretrained(self, directory, tensors=None):
        """Writes config.json, model.safetensors, tokenizer.json. tensors: all parameters, of a model in shares."""
        weights.write(self, directory, tensors)

    def init_module(self, module, dtype, device):
        """A module that the files do not have, at its initial values: "router", "language_model.cross.5", ..."""
        if module == "image_newline":
            self.image_newline = nn.Parameter(torch.randn(self.config.hidden, dtype=dtype, device=device)
                                              * self.config.hidden ** -0.5)
        elif module == "multi_modal_projector":
            self.multi_modal_projector = Connector(self.config).to(device, dtype)
        elif module == "router":
            self.add_router(self.config.route_threshold)
        else:
            l = module.rpartition(".")[2]
            cross = CrossAttention(self.config).to(device, dtype)
            cross.start_from(self.language_model.layers[int(l)])
            self.language_model.cross[l] = cross
