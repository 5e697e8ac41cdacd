"""VISOR on any family: encoder -> connector -> a Qwen2 over two streams with three kinds of layer.

The heart is LanguageModel.run: which layers read vision, and how (paper 4.1 to 4.2.2). VLM is the whole model: images
to visual tokens, the route (4.3), generation, encode once and ask many. There are no image placeholder tokens inside
the language model.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import methods
import weights
from arrange import Pieces, arrange, by_size
from cache_tree import CacheTree
from cli import not_finite, timer
from config import Plan, group_by_configuration
from data import target_mask
from decoding import NOT_FINITE, generate
from encoders import normalise, send, vision_tower
from flops import llm_flops
from layers import Block, Connector, CrossAttention, Policy, RMSNorm, linear
from layout import LayerCache, Past, compute_dtype, make_layout, make_routing_layout, round_up, upload
from pruning import PrunedCache
from reduction import observed_layers, reduce_tiles


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
        self.vision_tower = vision_tower(config)
        self.multi_modal_projector = Connector(config)
        self.image_newline = None               # ends rows of the grid, where there is one
        if config.has_newlines:
            self.image_newline = nn.Parameter(torch.randn(config.hidden) * config.hidden ** -0.5)
        self.language_model = LanguageModel(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)
        self.router = Policy(config) if config.router else None  # added in stage 3
        self.tokenizer = None                                    # comes with a checkpoint

    device = property(lambda self: self.language_model.norm.weight.device)
    dtype = property(lambda self: self.language_model.norm.weight.dtype)

    def blocks(self):
        """The modules that repeat: what is sharded, or run twice to save memory, one by one."""
        return [*self.vision_tower.blocks, *self.language_model.layers, *self.language_model.cross.values()]

    def compile(self, **how):
        """torch.compile for all that takes tokens one by one, norms, projections, rotary positions and MLPs, and for
        the encoder's blocks. Attention over caches and masks of any length is a kernel of its own already: so few
        graphs serve all layers, configurations, picture sizes and the decoding."""
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
        for block in self.vision_tower.blocks:
            block.compile(dynamic=True, **how)
        for block in self.language_model.layers:
            block.before_attention, block.after_attention = map(by_token, (block.before_attention,
                                                                           block.after_attention))
        for cross in self.language_model.cross.values():
            cross.queries, cross.keys_values = by_token(cross.queries), by_token(cross.keys_values)

    # --- images to visual tokens ---

    def encode(self, images, known=None, timings=None):
        """A list of data.ProcessedImage -> one (tokens, d) tensor each. known, timings: as in `pieces`."""
        pieces = self.pieces(images, known, timings)
        with timer(timings if self.config.reduction.picks else None, "select", self.device):
            return [arrange(p, x.tiling, self.image_newline, self.config) for p, x in zip(pieces, images)]

    def pieces(self, images, known=None, timings=None):
        """What each image's tiles become before they are put in order: arrange.Pieces. All tiles of one size go through
        the encoder together. known: of each image those of its first tiles, or None. timings: a dict that gains seconds
        of "select", what a reduction takes of the encoder's."""
        known = known or [None] * len(images)
        firsts = [0 if k is None else len(k.features) for k in known]
        new = [x.pixels[first:] for x, first in zip(images, firsts)]                  # (tiles, 3, height, width) uint8
        out = list(known)
        for rows in by_size(new):
            tiles = send(torch.cat([torch.from_numpy(new[i]) for i in rows]), self.device)
            # 16 tiles' worth bounds the memory; in training all, as every rank must call the encoder equally often
            at_once = max(1, 16 * 729 * self.config.patch ** 2 // tiles[0, 0].numel())
            at_once = len(tiles) if torch.is_grad_enabled() else min(16, at_once)
            parts = [self.piece(normalise(x, self.dtype, self.config), timings) for x in tiles.split(at_once)]
            found = [x.split([len(new[i]) for i in rows]) for x in map(torch.cat, zip(*parts))]
            for i, own in zip(rows, zip(*found)):
                out[i] = Pieces(*own) if known[i] is None else Pieces(*map(torch.cat, zip(known[i], own)))
        return out

    def piece(self, x, timings):
        """Normalised pixels of tiles (P, 3, height, width) -> arrange.Pieces."""
        c, looks = self.config, dict.fromkeys(observed_layers(self.config))
        patches = x.shape[2] // c.cell, x.shape[3] // c.cell
        x = self.vision_tower(x, looks)                                              # (P, N, features)
        with timer(timings if c.reduce else None, "select", self.device):
            features, kept, scores = reduce_tiles(x, patches, list(looks.values()), c)   # (P, K, ...)
        return Pieces(self.multi_modal_projector(features), kept, scores)

    def embed(self, batch, timings=None, known=None):
        """data.Batch -> t (B, Nt, d), v (B, Nv, d), as they enter layer 0. Padding is zero in v. known: as in `pieces`,
        of the images of all prompts."""
        t = self.language_model.embed_tokens(torch.from_numpy(batch.ids).to(self.device))  # (B, Nt, d)
        v = t.new_zeros(*batch.v_pos.shape, self.config.hidden)                            # (B, Nv, d)
        images = [x for row in batch.images for x in row]  # of all prompts, so that the encoder runs once
        if images:
            with timer(timings, "encoder", self.device, out_of="prefill"):
                features = iter(self.encode(images, known, timings))
            rows = [torch.cat([v[0, :0], *(next(features) for _ in row)]) for row in batch.images]
            v = torch.stack([F.pad(row, (0, 0, 0, v.shape[1] - len(row))) for row in rows])
        return t, v

    def layout(self, batch):
        """The TokenLayout of a data.Batch that nothing comes before."""
        return make_layout(*batch.positions, Past.empty(len(batch.ids)), self.config, self.device,
                           compute_dtype(self.language_model.norm.weight))

    # --- forward ---

    def forward(self, batch, sa):
        """Hidden states (B, Nt, d) of the text tokens of a data.Batch; `head` makes logits of those that matter.
        sa: a configuration, or a list with one for each prompt."""
        assert not self.config.reduction.inside, "tokens go on the way: pruning.PrunedCache"
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

    def configurations(self, sa, pixels="all"):
        """The configurations that may run when `sa` is asked for: a configuration, a list of them, or "auto"."""
        self.config.check_reduction(sa)
        if sa == "auto":
            if self.router is None:
                raise ValueError('this model has no router: train one with train.py --stage 3, or name a configuration '
                                 'instead of "auto"')
            if not self.config.configurations(pixels):
                raise ValueError("this model is not trained for the overview: name a configuration instead of \"auto\"")
            return self.config.configurations(pixels)
        return list(dict.fromkeys(tuple(sorted(x)) for x in (sa if isinstance(sa, list) else [sa])))

    def route(self, tree, answer_starts, allowed=None):
        """The viable configuration that the router chooses for each sample of a tree.

        Conservative: of the configurations whose probability reaches config.route_threshold, or the likeliest one's,
        the most expensive. So for each question; of several questions in a prompt the most expensive choice runs.
        answer_starts: of the data.Batch that is the tree's newest segment. allowed: those to choose among."""
        c, may = self.config, [own for own in tree.configurations if allowed is None or own in allowed]
        if not may:
            raise ValueError("none of the configurations that may be chosen is trained for these pixels")
        if len(tree.configurations) == 1:  # nothing to choose
            return may * len(answer_starts)
        scores = self.route_scores(tree, answer_starts)                                         # (B, K, viable)
        barred = torch.tensor([own not in may for own in c.viable], device=scores.device)
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
        """The policy's scores of the viable configurations, (B, K, viable), for up to K questions in each prompt."""
        return self.scores(self.router.layers, tree, answer_starts, self.config.route_layer)

    def overview_will_do(self, tree, answer_starts):
        """Whether the router is content with the overview, for each sample of a tree over it. Strict, as no number of
        layers finds what was not looked at: it is, where the probability of each of its questions reaches
        config.pixel_threshold."""
        scores = self.scores(self.router.pixels, tree, answer_starts, self.config.pixel_layer)          # (B, K, 1)
        p = scores.float().sigmoid().amin((1, 2)).tolist()                                              # (B,)
        if not all(map(math.isfinite, p)):
            raise not_finite("the router's output", scores.dtype)
        return [x >= self.config.pixel_threshold for x in p]

    def scores(self, reader, tree, answer_starts, stop):
        """What a layers.Scores says before layer `stop`, (B, K, choices), for up to K questions in each prompt.

        Takes the newest segment up to that layer, and routing tokens after it, one where each answer starts: each
        attends to what stands before it, and no other token to it. Samples with fewer questions repeat their last one.
        """
        if not all(answer_starts):
            raise ValueError("the prompt has no assistant line to answer on: end it with <|im_start|>assistant")
        shared, newest = tree.shared(stop), tree.segments[-1]
        most = max(map(len, answer_starts))                    # K
        starts = np.array([list(row) + [row[-1]] * (most - len(row)) for row in answer_starts])  # (B, K)
        layout = make_routing_layout(*newest.positions, newest.past, starts, self.config, self.device,
                                     compute_dtype(reader.token))
        token = reader.token.expand(*starts.shape, -1)                                           # (B, K, d)
        return reader(self.language_model.run(token, token[:, :0], layout, shared.sa, 0, stop, shared.cache)[0])

    # --- generation ---

    def new_tree(self, sa, prompts, text_capacity=512, pixels="all"):
        """An empty CacheTree, or PrunedCache, with room for `prompts` and text_capacity more tokens of text; it grows
        beyond. sa: as in `configurations`. Over the overview nodes end where the router decides on the pixels, and on
        the layers."""
        c, configurations = self.config, self.configurations(sa, pixels)
        if c.reduction.inside:
            return PrunedCache(self, configurations, text_capacity)
        text, vision = (max(len(x) for x in own) for own in zip(*((p.ids, p.v_pos) for p in prompts)))
        pauses = [c.pixel_layer, c.route_layer] if pixels == "overview" and self.router and c.overview else []
        return CacheTree(self, configurations, len(prompts), (round_up(text + text_capacity), vision), pauses)

    @torch.no_grad()
    def generate(self, prompts, sa, pixels="all", timings=None, routes=None, layer_tokens=None, on_token=None,
                 max_tokens=64, **how):
        """Answers to a list of data.Prompt: a list of token id lists, without the closing <|im_end|>.

        sa: a configuration, a list with one for each prompt, or "auto". pixels: "all", "overview" or "auto"; a prompt
        that has no overview gets all. timings: a dict that gains seconds of "encoder", "prefill", "decode", and
        "select", a reduction's share of them. routes: a list that receives each prompt's Plan; layer_tokens: likewise
        its flops.LayerTokens, or None. on_token(i, id) is called for each token as it comes. max_tokens, how: as in
        decoding.generate.
        """
        if isinstance(sa, list) and len(sa) != len(prompts):
            raise ValueError(f"{len(sa)} configurations for {len(prompts)} prompts: give one each")
        answers, plans, pruned = [None] * len(prompts), [None] * len(prompts), [None] * len(prompts)
        pixels = self.config.allowed_pixels(pixels, sa, how.get("allowed"))
        for rows, kind, seen, tree in self.look(prompts, sa, pixels, max_tokens, timings):
            own = [sa[i] for i in rows] if isinstance(sa, list) else sa
            emit = on_token and (lambda i, token, rows=rows: on_token(rows[i], token))
            found, ran = generate(self, tree, seen, own, max_tokens, timings=timings, on_token=emit, **how)
            for k, (i, answer, configuration) in enumerate(zip(rows, found, ran)):
                answers[i], plans[i], pruned[i] = answer, Plan(configuration, kind), tree.ran(k)
        if routes is not None:
            routes[:] = plans
        if layer_tokens is not None:
            layer_tokens[:] = pruned
        return answers

    def look(self, prompts, sa, pixels, max_tokens, timings):
        """Yields, of prompts that get the same pixels: their numbers, the pixels, the prompts with them, and the
        CacheTree whose newest segment they are. Where the overview does not do, its features are used again."""
        small = {i: data.overview(p, self.config) for i, p in enumerate(prompts) if pixels != "all"}
        small = {i: p for i, p in small.items() if p}
        left, known, steps = set(range(len(prompts))), {}, min(max_tokens, 1024)  # longer answers make the cache grow

        def tree_of(rows, kind, seen):
            own = [sa[i] for i in rows] if isinstance(sa, list) else sa
            features = [known.get(i) for i in rows for _ in prompts[i].images]
            return self.prefill(seen, own, steps, timings, kind, features)
        if small:
            rows, seen = list(small), list(small.values())
            with timer(timings, "encoder", self.device):
                known |= zip(rows, self.pieces([p.images[0] for p in seen], timings=timings))
            tree = tree_of(rows, "overview", seen)
            with timer(timings, "prefill", self.device):
                enough = pixels == "overview" or self.overview_will_do(tree, [p.answer_starts for p in seen])
            good = [k for k in range(len(rows)) if enough is True or enough[k]]
            if good:
                tree = tree if len(good) == len(rows) else tree.select(good)
                left -= {rows[k] for k in good}
                yield [rows[k] for k in good], "overview", [seen[k] for k in good], tree
        if left:
            rows, seen = sorted(left), [prompts[i] for i in sorted(left)]
            yield rows, "all", seen, tree_of(rows, "all", seen)

    def decode_step(self, tokens, runs, sa, cache):
        """One token for each sample: tokens (B,) -> logits (B, vocab) of what follows. runs: (first layer, the one
        behind the last, DecodeLayout); one, but for tokens that are dropped on the way.

        It reads nothing back, its tensors stay where they are and have one shape: as a whole it is one graph for
        torch.compile(fullgraph=True, dynamic=False), and for a CUDA graph."""
        t = self.language_model.embed_tokens(tokens[:, None])                        # (B, 1, d)
        for start, stop, layout in runs:
            t, _ = self.language_model.run(t, t[:, :0], layout.step(), sa, start, stop, cache)  # no new vision
        return self.head(self.language_model.norm(t[:, -1]))

    @property
    def stop_id(self):
        return self.tokenizer.token_to_id("<|im_end|>")

    # --- encode once, ask many ---

    @torch.no_grad()
    def prefill(self, prompts, sa, text_capacity=512, timings=None, pixels="all", known=None):
        """Runs what several questions share, the system text and the images, once: the tree that `new_tree` makes.

        prompts: a list of data.Prompt. Attention is causal, so none of it depends on the question. All layers run now
        where `sa` is one configuration; with "auto" those before the route layer, and each other layer when a question
        is first sent there. known: as in `pieces`.
        """
        tree = self.new_tree(sa, prompts, text_capacity, pixels)
        tree.extend(prompts, timings, known)
        return tree

    # --- VISOR from a dense model ---

    def add_reduction(self, text):
        """From now on images have fewer visual tokens, by what --reduce calls `text`. With pack:R:widen the connector
        tells the four sub-tokens of a token apart, and equals their mean until it is trained. Raises ValueError."""
        c, first = self.config, self.multi_modal_projector.linear_1
        was_wide, wide = c.reduction.option == "widen", methods.parse(text).option == "widen"
        if was_wide > wide:
            raise ValueError(f"--reduce {text or 'none'}: this checkpoint's connector reads four sub-tokens side by "
                             "side; give pack:RATIO:widen")
        try:
            methods.parse(text).check(c)
        except ValueError as e:
            raise ValueError(f"--reduce {e}") from None
        c.reduce = text
        if wide > was_wide:
            first.weight = nn.Parameter(first.weight.detach().repeat(1, 4) / 4)  # a quarter each: the mean's output
            first.in_features *= 4
        return self

    def add_cross_attention(self, ca=None, sa=None, viable=None, overview=None):
        """Turns a loaded dense model into VISOR: cross-attention in the layers ca, candidates sa (paper 4.2.1, 4.2.2).

        The defaults are those of Config.add_visor. Nothing changes until the new layers are trained."""
        c = self.config
        if c.ca:
            raise ValueError(f"this model has cross-attention already, in layers {c.ca}: start from a dense one")
        c.add_visor(ca, sa, viable, overview)
        for l in c.ca:  # copies of their layers' projections, with an output of zero
            self.init_module(f"language_model.cross.{l}", self.dtype, self.device)
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
        self.router = Policy(c).to(self.device, self.dtype)
        with torch.no_grad():
            for scores in self.router.children():
                scores.token *= self.language_model.embed_tokens.weight.std()  # as large as a word's embedding
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
