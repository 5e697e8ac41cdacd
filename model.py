"""VISOR on LLaVA-OneVision: SigLIP tower -> connector -> a Qwen2 that keeps text and vision in two streams.

The heart is LanguageModel.run: which layers see vision, and how (paper 4.1 to 4.2.2). Around it: pictures to visual
tokens, the route (4.3), generation. There are no image placeholder tokens inside the language model.
"""
import time
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import weights
from config import forks
from data import Prompt, collate
from flops import llm_flops
from layers import Block, Cache, CrossAttention, Part, Policy, SiglipBlock, before, pack


class VisionTower(nn.Module):
    """SigLIP up to its last layer but one, without the final norm. Tiles do not see each other."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, c.vision_hidden, c.patch, c.patch),
            "position_embedding": nn.Embedding(c.patches ** 2, c.vision_hidden)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(SiglipBlock(c) for _ in range(c.vision_layers))})

    def forward(self, x):
        """x (tiles, 3, tile, tile) in [-1, 1] -> (tiles, patches * patches, vision_hidden)."""
        x = self.embeddings["patch_embedding"](x).flatten(2).transpose(1, 2)
        x = x + self.embeddings["position_embedding"].weight
        for block in self.encoder["layers"]:
            x = block(x)
        return x


class Connector(nn.Module):
    """From the tower's features to the language model's, token by token, after packing them (VISOR-TR)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.linear_1 = nn.Linear(c.vision_hidden * (4 if c.pack_widen else 1), c.hidden)
        self.linear_2 = nn.Linear(c.hidden, c.hidden)

    def forward(self, x):
        """(tiles, patches * patches, vision_hidden) -> (tiles, side * side, d)."""
        if self.config.pack > 1 or self.config.pack_widen:
            x = pack(x, self.config.side)
            x = x.flatten(2) if self.config.pack_widen else x.mean(2)
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact GELU here, the tanh one inside SigLIP

    @torch.no_grad()
    def widen(self):
        """Gives every sub-token its own weights, at first a quarter of the old ones: the output is that of the mean."""
        self.linear_1.weight = nn.Parameter(self.linear_1.weight.repeat(1, 4) / 4)
        self.linear_1.in_features *= 4


class LanguageModel(nn.Module):
    """Qwen2 over two streams, t for text and v for vision, with three kinds of layer."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.cross = nn.ModuleDict({str(l): CrossAttention(c) for l in c.ca})
        self.norm = nn.RMSNorm(c.hidden, c.rms_eps)

    def forward(self, t, v, t_pos, v_pos, sa, cache=None, trace=None, states=None, rest=()):
        """The normalised text stream (B, Nt, d) after all layers. Arguments: as in Part and in `run`."""
        part = Part(t, v, t_pos, v_pos, [sa], cache, self.config)
        t = self.finish(part, sa, trace, states, rest)
        if cache:
            cache.advance(t_pos, v_pos)
        return t

    def finish(self, part, sa, trace=None, states=None, rest=()):
        """Takes a part through all layers in configuration sa, and before it those parts that the cache has from
        other configurations. Returns its normalised text stream (B, Nt, d)."""
        for earlier in part.cache.parts if part.cache else ():
            self.run(earlier, sa)
        return self.norm(self.run(part, sa, None, trace, states, rest)[0])

    def run(self, part, sa, stop=None, trace=None, states=None, rest=()):
        """Eq. 3: every layer is a self-attention, a cross-attention or a text-only layer.

        sa: the self-attention layers of this call, the configuration. With all layers in it this is Eq. 1,
        LLaVA-OneVision itself. stop: the first layer that does not run (default: none).
        Starts from the last layer up to which the part has come already in a configuration that agrees with sa so far.
        Returns t (B, Nt, d) and v (B, Nv, d) as they enter layer `stop`.
        trace: a dict that receives, per layer that looks at vision, where the last text token looked.
        states: a dict that receives V^(l) of each layer l that refines it.
        rest: layers of sa that leave v as it is, though the text looks at it (stochastic depth, in pretraining).
        """
        stop = len(self.layers) if stop is None else stop
        cross, _ = self.config.readers(sa)
        at, cache = part.at, part.cache
        start, t, v = part.reached(sa, stop)
        for l in range(start, stop):
            if l in part.forks:
                part.streams[l, before(sa, l)] = t, v
            block, kv = self.layers[l], cache.layer(l, sa) if cache else None
            look = trace.setdefault(l, []) if trace is not None and (l in sa or l in cross) else None
            if l in sa and l not in rest and part.refines(sa, l):                 # Eq. 3, case 1
                v, t = at.part(block(at.join(v, t), at.both, kv, trace=look))
                if states is not None:
                    states[l] = v
            elif l in sa:                                                         # case 1 without V^(l), which
                t = block(t, at.read, kv, context=at.join(v, t), trace=look)      # nobody reads: only the text asks
            else:
                if l in cross and at.cross:                                       # Eq. 2 and 3, case 2: Z
                    seen = cache.cross(l, sa) if cache else None
                    t = t + self.cross[str(l)](t, v, at.cross, seen, look)
                t = block(t, at.text, kv)                                         # case 2 on Z; case 3, text only
        part.streams[stop, before(sa, stop)] = t, v
        return t, v


class VLM(nn.Module):
    """The whole model. Prompts come from data.encode; `sa` is a configuration, or a list with one for each prompt."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Connector(config)
        self.image_newline = nn.Parameter(torch.randn(config.hidden) * config.hidden ** -0.5)
        self.language_model = LanguageModel(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden, config.vocab, bias=False)
        self.router = Policy(config) if config.router else None
        self.tokenizer = None

    def blocks(self):
        """The modules that repeat: what is sharded, or run twice to save memory, one by one."""
        return [*self.vision_tower.encoder["layers"], *self.language_model.layers, *self.language_model.cross.values()]

    def compile(self, **how):
        """torch.compile for SigLIP's blocks and the second half of Qwen2's: no mask, no cache, so that a graph serves
        all layers, configurations and picture sizes. Whole blocks took 40 graphs for 20 pictures, this takes 6."""
        for block in self.vision_tower.encoder["layers"]:
            block.compile(dynamic=True, **how)
        for block in self.language_model.layers:
            block.feed = torch.compile(block.feed, dynamic=True, **how)

    # --- pictures to visual tokens ---

    def encode(self, pictures):
        """A list of data.Picture -> one (tokens, d) tensor each. The tiles of all go through the tower together."""
        like = self.image_newline
        tiles = torch.cat([torch.from_numpy(p.pixels) for p in pictures]).to(like.device, like.dtype)
        # 16 at a time bound the memory; in training it holds them all anyway, and ranks must call as often as others
        parts = tiles.split(len(tiles) if torch.is_grad_enabled() else 16)
        features = torch.cat([self.multi_modal_projector(self.vision_tower(x)) for x in parts])
        features = features.split([p.tiling.tiles for p in pictures])
        return [self.arrange(f, p.tiling) for f, p in zip(features, pictures)]

    def arrange(self, tiles, tiling):
        """(tiles, side * side, d) -> (tokens, d): base tile, then the grid unpadded, each row ended by a newline."""
        side, d = self.config.side, self.config.hidden
        base, newline = tiles[0], self.image_newline[None]
        if tiling.canvas is None:
            return torch.cat([base, newline[:tiling.newlines]])
        (rows, columns), (cut_r, cut_c) = tiling.grid, tiling.cut
        grid = tiles[1:].view(rows, columns, side, side, d).transpose(1, 2).reshape(rows * side, columns * side, d)
        grid = grid[cut_r:rows * side - cut_r, cut_c:columns * side - cut_c]
        if tiling.shrunk:
            grid = F.interpolate(grid.permute(2, 0, 1)[None], tiling.size, mode="bilinear")[0].permute(1, 2, 0)
        grid = torch.cat([grid, newline.expand(tiling.newlines, 1, d)], dim=1)
        return torch.cat([base, grid.flatten(0, 1)])

    def embed(self, batch, clock=None):
        """data.Batch -> t (B, Nt, d), v (B, Nv, d), t_pos, v_pos. Padding is zero in v."""
        device = self.image_newline.device
        ids, t_pos, v_pos = (torch.from_numpy(x).to(device) for x in batch[:3])
        t = self.language_model.embed_tokens(ids)
        v = t.new_zeros(*v_pos.shape, self.config.hidden)
        pictures = [p for row in batch.pictures for p in row]
        if pictures:
            with timed(clock, "encoder", device, out_of="prefill"):
                features = iter(self.encode(pictures))
            rows = [torch.cat([v[0, :0], *(next(features) for _ in row)]) for row in batch.pictures]
            v = torch.stack([F.pad(row, (0, 0, 0, v.shape[1] - len(row))) for row in rows])
        return t, v, t_pos, v_pos

    # --- forward ---

    def forward(self, batch, sa, cache=None, trace=None, clock=None, states=None):
        """Hidden states (B, Nt, d) of the text tokens of a data.Batch; `head` makes logits of those that matter.

        sa: a configuration; or a list with one for each prompt; or "auto", and the router chooses.
        """
        if isinstance(sa, (list, str)):
            if cache is not None or trace is not None:
                raise ValueError("configurations of their own for each prompt go without cache or trace; see generate")
            parts = self.split(self.read(batch, sa, clock=clock), sa, batch.asks, clock)
            with timed(clock, "prefill", self.image_newline.device):
                h = [(rows, self.language_model.finish(part, own)) for rows, own, part in parts]
                return torch.cat([x for _, x in h])[torch.cat([rows for rows, _ in h]).argsort()]
        with timed(clock, "prefill", self.image_newline.device):
            return self.language_model(*self.embed(batch, clock), sa, cache, trace, states)

    def head(self, h):
        """Hidden states (..., d) -> logits (..., vocab)."""
        return F.linear(h, self.language_model.embed_tokens.weight) if self.lm_head is None else self.lm_head(h)

    # --- a configuration for each prompt (paper 4.3) ---

    def options(self, sa):
        """The configurations that may run when `sa` is asked for: a configuration, a list of them, or "auto"."""
        if sa == "auto":
            if self.router is None:
                raise ValueError('this model has no router: train one with train.py --stage 3, or name a configuration '
                                 'instead of "auto"')
            return self.config.viable
        return list(dict.fromkeys(tuple(sorted(x)) for x in (sa if isinstance(sa, list) else [sa])))

    def new_cache(self, batch, sa, text_room, vision_room):
        """Room for `text_room` text and `vision_room` visual tokens in each sample. sa: as in `options`."""
        like = self.image_newline
        return Cache(self.options(sa), batch, text_room, vision_room, self.config, like.dtype, like.device)

    def read(self, batch, sa, cache=None, clock=None):
        """A data.Batch as a Part before the first layer. sa: as in `options`; a cache knows its own configurations."""
        with timed(clock, "prefill", self.image_newline.device):
            t, v, t_pos, v_pos = self.embed(batch, clock)
            if sa == "auto" and cache is None:  # the routing token needs keys and values of what stands before it
                cache = self.new_cache(len(t), sa, t.shape[1] + 1, v.shape[1])
            return Part(t, v, t_pos, v_pos, cache.configurations if cache else self.options(sa), cache, self.config)

    def split(self, part, sa, asks, clock=None, allowed=None, trace=None):
        """[(samples, configuration, Part of these samples)], as far as all of them go together.

        sa: a list with a configuration for each sample, or "auto". asks: of the data.Batch.
        """
        with timed(clock, "prefill", part.t_pos.device):
            if sa == "auto":
                sa = self.route(part, asks, allowed, trace)
            if len(sa) != len(asks):
                raise ValueError(f"{len(sa)} configurations for {len(asks)} prompts: give one each")
            groups = by_configuration(sa)
            fork = min(forks([own for own, _ in groups]), default=None)
            rows = [torch.tensor(r, device=part.t_pos.device) for _, r in groups]
            if fork is None:
                return [(rows[0], groups[0][0], part)]
            if part.cache and part.cache.parts:
                raise ValueError("a cache that is to be read in several configurations takes one prompt at a time")
            t, v = self.language_model.run(part, groups[0][0], stop=fork, trace=trace)
            reached = fork, before(groups[0][0], fork)
            caches = [part.cache and part.cache.rows(r, fork) for r in rows]
            return [(r, own, Part(t[r], v[r], part.t_pos[r], part.v_pos[r], [own], cache, self.config, reached))
                    for (own, _), r, cache in zip(groups, rows, caches)]

    def route(self, part, asks, allowed=None, trace=None):
        """The viable configuration that the router chooses for each sample of a part.

        In doubt it takes more: of those whose probability is at least config.doubt, the costliest. So it is with
        several questions in a prompt (`ask` judges the newest). allowed: those to choose among (default: all).
        """
        c, scores = self.config, self.policy(part, asks, trace)
        barred = torch.tensor([allowed is not None and own not in allowed for own in c.viable], device=scores.device)
        p = scores.float().masked_fill(barred, float("-inf")).softmax(-1).amax(1)  # over the questions of a prompt
        cost = [llm_flops(c, own, 1, 1000) for own in c.viable]
        rank = torch.tensor([sorted(set(cost)).index(x) for x in cost], device=p.device)  # equal ones: the likelier
        enough = p >= p.amax(-1, keepdim=True).clamp(max=c.doubt)
        return [c.viable[i] for i in torch.where(enough, rank + p / 2, -1).argmax(-1).tolist()]

    def policy(self, part, asks, trace=None):
        """Scores of the viable configurations, (B, K, viable), for up to K questions in each prompt.

        Takes the part to the first layer that may be skipped. The routing token follows on a copy of the cache: it
        sees what stands before, nobody sees it. asks: the positions of each sample's answers, the last fills up to K.
        """
        lm, c = self.language_model, self.config
        lm.run(part, c.viable[0], stop=c.fork, trace=trace)
        if not all(asks):
            raise ValueError("nothing is asked: the prompt has no <|im_start|>assistant line to answer on")
        scores = []
        for k in range(max(map(len, asks))):
            pos = torch.tensor([row[min(k, len(row) - 1)] for row in asks], device=part.t_pos.device)[:, None]
            cache = part.cache.rows(torch.arange(len(asks)), c.fork)
            cache.rewind(([a + b for a, b in zip(cache.n_text, (part.t_pos < pos).sum(1).tolist())],
                          [a + b for a, b in zip(cache.n_vision, (part.v_pos < pos).sum(1).tolist())], 0))
            token = self.router.token.expand(len(asks), 1, -1)
            token = Part(token, token[:, :0], pos, pos[:, :0], [c.viable[0]], cache, c)
            scores.append(self.router(lm.run(token, c.viable[0], stop=c.fork)[0]))
        return torch.stack(scores, dim=1)

    # --- generation ---

    @torch.no_grad()
    def generate(self, prompts, sa, max_tokens=64, temperature=0.0, top_p=1.0, seed=0, cache=None, on_token=None,
                 trace=None, clock=None, allowed=None, routes=None):
        """Answers to a list of data.Prompt: a list of token id lists, without the closing <|im_end|>.

        sa: a configuration, a list with one for each prompt, or "auto"; allowed: those that the router may choose.
        temperature 0 is greedy; otherwise tokens are drawn from the smallest set with probability top_p, repeatable
        by `seed`. cache: the prompts go on from what it holds. on_token(i, id) is called for each token as it comes.
        clock: a dict that gains seconds of "encoder", "prefill", "decode". routes: a list, each prompt's configuration.
        """
        batch, device = collate(prompts), self.image_newline.device
        if not isinstance(sa, (list, str)):
            sa = [tuple(sa)] * len(prompts)
        room = batch.ids.shape[1] + min(max_tokens, 1024)  # longer answers make the cache grow
        cache = cache or self.new_cache(len(prompts), sa, room, batch.v_pos.shape[1])
        answers, told = [None] * len(prompts), [None] * len(prompts) if routes is None else routes
        told[:] = [None] * len(prompts)
        for rows, own, part in self.split(self.read(batch, sa, cache, clock), sa, batch.asks, clock, allowed, trace):
            group = rows.tolist()
            with timed(clock, "prefill", device):
                h = self.language_model.finish(part, own, trace)
                logits = self.head(h[torch.arange(len(h)), [len(prompts[i].ids) - 1 for i in group]])
                part.cache.keep(part)
            pos = torch.tensor([[prompts[i].end] for i in group], device=device)
            say = on_token and (lambda i, token, group=group: on_token(group[i], token))
            with timed(clock, "decode", device):
                draw = partial(choose, temperature=temperature, top_p=top_p,
                               random=torch.Generator(device).manual_seed(seed))
                for i, answer in zip(group, self._decode(logits, pos, own, part.cache, max_tokens, draw, say, trace)):
                    answers[i], told[i] = answer, own
        return answers

    def _decode(self, logits, pos, sa, cache, max_tokens, draw, on_token, trace):
        """The answers that begin by logits (B, vocab), token by token from the positions pos (B, 1) on."""
        answers, running = [[] for _ in logits], set(range(len(logits)))
        while True:
            tokens = draw(logits)
            for i, token in [(i, token) for i, token in enumerate(tokens.tolist()) if i in running]:
                if token != self.stop_id:
                    answers[i].append(token)
                    if on_token:
                        on_token(i, token)
                if token == self.stop_id or len(answers[i]) == max_tokens:
                    running.discard(i)
            if not running:
                return answers
            t = self.language_model.embed_tokens(tokens[:, None])
            logits = self.head(self.language_model(t, t[:, :0], pos, pos[:, :0], sa, cache, trace)[:, -1])
            pos = pos + 1

    # --- encode once, ask many ---

    @torch.no_grad()
    def see(self, prompt, sa, room=512, clock=None):
        """Runs what several questions share, the system text and the pictures, once: a Cache for `ask`.

        Attention is causal, so none of it depends on the question. With "auto" only the layers before the first that
        may be skipped run now; each of the others runs when a question is first sent there.
        room: text tokens to reserve for questions and answers; a longer conversation makes the cache grow.
        """
        cache = self.new_cache(1, sa, len(prompt.ids) + room, len(prompt.v_pos))
        self.remember(collate([prompt]), cache, clock)
        return cache

    def remember(self, batch, cache, clock=None):
        """Adds a data.Batch to a cache, as far as all of the cache's configurations go together."""
        part = self.read(batch, None, cache, clock)
        with timed(clock, "prefill", part.t_pos.device):
            self.language_model.run(part, cache.configurations[0], stop=min(part.forks, default=None))
            cache.keep(part)

    @torch.no_grad()
    def ask(self, cache, prompt, keep=False, **how):
        """The answer (token ids) to a prompt that goes on from the cache: data.encode(..., start=cache.end).

        keep: question and answer stay in the cache, so that the next turn can refer to them; otherwise the cache is
        as it was, for the next question. how: as in generate.
        """
        mark = n_text, n_vision, parts = cache.mark()
        sa = "auto" if len(cache.configurations) > 1 else cache.configurations[0]
        answer, = self.generate([prompt], sa, cache=cache, **how)
        if not keep:
            cache.rewind(mark)
            return answer
        cache.rewind(([n_text[0] + len(prompt.ids)], [n_vision[0] + len(prompt.v_pos)], parts + 1))
        rest = answer + self.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
        self.remember(collate([Prompt(rest, [cache.end + i for i in range(len(rest))], [], [])]), cache)
        return answer

    @property
    def stop_id(self):
        return self.tokenizer.token_to_id("<|im_end|>")

    # --- VISOR from a dense model ---

    def add_packing(self, ratio, widen=False):
        """From now on each tile has about `ratio` times fewer tokens (VISOR-TR). The weights stay as they are; with
        `widen` the connector tells the four sub-tokens of a token apart, and equals their mean until it is trained."""
        if not ratio >= 1:
            raise ValueError(f"packing ratio {ratio}: give a number of at least 1")
        self.config.pack = float(ratio)
        if widen and not self.config.pack_widen:
            self.config.pack_widen = True
            self.multi_modal_projector.widen()
        return self

    def add_cross_attention(self, ca=None, sa=None, viable=None):
        """Turns a loaded dense model into VISOR: cross-attention in the layers ca, candidates sa (paper 4.2.1, 4.2.2).

        The defaults are the config's: a third of the layers each. Nothing changes until the new layers are trained.
        """
        c = self.config
        if c.ca:
            raise ValueError(f"this model has cross-attention already, in layers {c.ca}: start from a dense one")
        c.ca, c.sa, c.viable = c.visor_layers(ca, sa, viable)
        for l in c.ca:
            self.start(f"language_model.cross.{l}", self.image_newline.dtype, self.image_newline.device)
        return self

    def add_router(self):
        """A fresh policy over the viable configurations (paper 4.3); nothing else changes. Raises ValueError."""
        c = self.config
        if c.fork is None:
            raise ValueError("a router chooses among viable configurations, and this model has fewer than two: train "
                             "stages 1 and 2 first")
        if not any(l < c.fork for l in (*c.ca, *c.viable[0])):
            raise ValueError(f"a router decides before layer {c.fork}, the first that may be skipped, and no layer "
                             "before that one looks at vision; choose other ca or sa")
        c.router, like = True, self.image_newline
        self.router = Policy(c).to(like.device, like.dtype)
        with torch.no_grad():
            self.router.token *= self.language_model.embed_tokens.weight.std()
        return self

    def remove_router(self):
        """Without a policy, as before add_router."""
        self.config.router, self.router = False, None
        return self

    # --- weights in and out ---

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu"):
        """Loads a checkpoint directory, a hub id, or "SIGLIP+QWEN2": two directories or ids and a fresh connector.

        Raises ValueError with one line that names the file and the mend. Says on stderr what it loaded.
        """
        return weights.load(cls, name, dtype, device)

    def save_pretrained(self, directory, tensors=None):
        """Writes config.json, model.safetensors and tokenizer.json, beside first and then renamed. tensors: all
        parameters by name, where the model itself has only a share of each."""
        weights.write(self, directory, tensors)

    def put(self, name, tensor):
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    def start(self, module, dtype, device):
        """A part that the files do not have, at its starting values."""
        if module == "image_newline":
            self.put(module, torch.randn(self.config.hidden).mul(self.config.hidden ** -0.5).to(device, dtype))
        elif module == "multi_modal_projector":
            self.multi_modal_projector = Connector(self.config).to(device, dtype)
        elif module == "router":
            self.add_router()
        else:
            l = module.rpartition(".")[2]
            cross = CrossAttention(self.config).to(device, dtype)
            cross.start_from(self.language_model.layers[int(l)])
            self.language_model.cross[l] = cross


def by_configuration(sa):
    """[(configuration, [samples that run it])] of a list with one configuration for each sample."""
    sa = [tuple(sorted(x)) for x in sa]
    return [(c, [i for i, x in enumerate(sa) if x == c]) for c in dict.fromkeys(sa)]


def choose(logits, temperature, top_p, random):
    """The next token of each row of logits (B, vocab): the likeliest, or drawn from the nucleus. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.amax(-1, keepdim=True)  # so that nothing overflows, however low the temperature
    p, order = (logits / max(temperature, 1e-30)).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keeps the tokens before which less than top_p has gathered
    return order.gather(-1, torch.multinomial(p, 1, generator=random))[:, 0]


@contextmanager
def timed(clock, name, device, out_of=None):
    """Adds a code block's seconds to clock[name], and takes them from clock[out_of]; without a clock nothing."""
    if clock is None:
        return (yield)
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    spent = time.perf_counter() - start
    clock[name] = clock.get(name, 0.0) + spent
    if out_of:
        clock[out_of] = clock.get(out_of, 0.0) - spent
