"""VISOR on LLaVA-OneVision: SigLIP tower -> connector -> a Qwen2 that keeps text and vision in two streams.

The heart is LanguageModel.forward: which layers see vision, and how (paper 4.1 to 4.2.2). Around it: pictures to
visual tokens, weights in and out, generation. There are no image placeholder tokens inside the language model.
"""
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from config import join_configs, read_config
from data import Prompt, collate, load_tokenizer, vocabulary_size
from layers import Block, Cache, CrossAttention, SiglipBlock, causal_span, cross_span, pack, pick
from weights import find, open_weights, scan


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

    def readers(self, sa):
        """(the cross-attentions that run, the last layer that reads v). In a layer of sa its cross-attention rests."""
        cross = [l for l in self.config.ca if l not in sa]
        return cross, max([*sa, *cross], default=-1)

    def forward(self, t, v, t_pos, v_pos, sa, cache=None, trace=None, states=None):
        """Eq. 3: every layer is a self-attention, a cross-attention or a text-only layer.

        t (B, Nt, d) text and v (B, Nv, d) vision: the new tokens, with their positions t_pos (B, Nt), v_pos (B, Nv).
        sa: the self-attention layers of this call, the configuration. cache: what earlier tokens left; it grows.
        Returns the normalised text stream (B, Nt, d). With all layers in sa this is Eq. 1, LLaVA-OneVision itself.
        trace: a dict that receives, per layer that looks at vision, where the last text token looked.
        states: a dict that receives V^(l) of each layer l that refines it.
        """
        cross, last = self.readers(sa)
        at = lay_out(t_pos, v_pos, sa, cross, cache, self.config, t.dtype)
        for l, block in enumerate(self.layers):
            kv = cache.layers[l] if cache else None
            look = trace.setdefault(l, []) if trace is not None and (l in sa or l in cross) else None
            if l in sa and l < last:                                              # Eq. 3, case 1
                v, t = at.part(block(at.join(v, t), at.both, kv, trace=look))
                if states is not None:
                    states[l] = v
            elif l in sa:                                                         # case 1, and nobody reads V^(l):
                t = block(t, at.read, kv, context=at.join(v, t), trace=look)      # only the text asks
            else:
                if l in cross and at.cross:                                       # Eq. 2 and 3, case 2: Z
                    t = t + self.cross[str(l)](t, v, at.cross, cache.cross[l] if cache else None, look)
                t = block(t, at.text, kv)                                         # case 2 on Z; case 3, text only
        if cache:
            cache.advance(t_pos, v_pos)
        return self.norm(t)


class Layout(NamedTuple):
    """Where everything stands in this forward, for each kind of layer; worked out once, before the first layer."""
    order: torch.Tensor   # (B, Nv + Nt) the interleaved sequence as indices into [v; t]
    place: torch.Tensor   # its inverse: where each token of [v; t] stands in the interleaved sequence
    nv: int
    text: NamedTuple      # Span of a layer on t alone
    both: NamedTuple      # Span of a layer on the interleaved streams
    read: NamedTuple      # the same with queries from t only
    cross: NamedTuple     # CrossSpan; None when there is no vision at all

    def join(self, v, t):
        """The two streams as one sequence in order of position: (B, Nv + Nt, d)."""
        return pick(torch.cat([v, t], dim=1), self.order) if self.nv else t

    def part(self, x):
        """The inverse of join: v, t."""
        return pick(x, self.place).split([self.nv, x.shape[1] - self.nv], dim=1) if self.nv else (x[:, :0], x)


def lay_out(t_pos, v_pos, sa, cross, cache, c, dtype):
    batch, nv = v_pos.shape
    n_text, n_vision = (cache.n_text, cache.n_vision) if cache else ([0] * batch,) * 2
    pos = torch.cat([v_pos, t_pos], dim=1)
    order = pos.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    both = read = seen = None
    if sa:
        past = [a + b for a, b in zip(n_text, n_vision)]
        both = causal_span(past, pos.gather(1, order), c)
        read = causal_span(past, pos.gather(1, order), c, ask=place[:, nv:]) if nv else both
    if top := max(n_vision) + nv:
        slots = torch.tensor(n_vision, device=v_pos.device)[:, None] + torch.arange(nv, device=v_pos.device)
        all_pos = cache.see(v_pos, slots, top) if cache else v_pos
        seen = cross_span(t_pos, v_pos, slots, all_pos, dtype) if cross else None
    return Layout(order, place, nv, causal_span(n_text, t_pos, c), both, read, seen)


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
        self.tokenizer = None

    # --- pictures to visual tokens ---

    def encode(self, pictures):
        """A list of data.Picture -> one (tokens, d) tensor each. The tiles of all go through the tower together."""
        like = self.image_newline
        tiles = torch.cat([torch.from_numpy(p.pixels) for p in pictures]).to(like.device, like.dtype)
        features = [self.multi_modal_projector(self.vision_tower(x)) for x in tiles.split(16)]  # bounds the memory
        features = torch.cat(features).split([p.tiling.tiles for p in pictures])
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
            with timed(clock, "encoder", device):
                features = iter(self.encode(pictures))
            rows = [torch.cat([v[0, :0], *(next(features) for _ in row)]) for row in batch.pictures]
            v = torch.stack([F.pad(row, (0, 0, 0, v.shape[1] - len(row))) for row in rows])
        return t, v, t_pos, v_pos

    # --- forward ---

    def forward(self, batch, sa, cache=None, trace=None, clock=None, states=None):
        """Hidden states (B, Nt, d) of the text tokens of a data.Batch; `head` makes logits of those that matter."""
        t, v, t_pos, v_pos = self.embed(batch, clock)
        with timed(clock, "prefill", t.device):
            if not isinstance(sa, list):
                return self.language_model(t, v, t_pos, v_pos, sa, cache, trace, states)
            if len(sa) != len(t) or cache is not None or trace is not None:
                raise ValueError(f"{len(sa)} configurations for {len(t)} prompts: give one each, and no cache or trace")
            h = torch.empty_like(t)
            for configuration, rows in by_configuration(sa):  # each layer runs for the samples that need it
                rows = torch.tensor(rows, device=t.device)
                part = self.language_model(t[rows], v[rows], t_pos[rows], v_pos[rows], configuration)
                h = h.index_copy(0, rows, part)
            return h

    def head(self, h):
        """Hidden states (..., d) -> logits (..., vocab)."""
        return F.linear(h, self.language_model.embed_tokens.weight) if self.lm_head is None else self.lm_head(h)

    def new_cache(self, batch, sa, text_room, vision_room):
        """Room for `text_room` text and `vision_room` visual tokens in each sample, in configuration sa."""
        cross = self.language_model.readers(sa)[0]
        return Cache(sa, cross, batch, text_room, vision_room, self.config, self.image_newline)

    # --- generation ---

    @torch.no_grad()
    def generate(self, prompts, sa, max_tokens=64, temperature=0.0, top_p=1.0, seed=0, cache=None, on_token=None,
                 trace=None, clock=None):
        """Answers to a list of data.Prompt: a list of token id lists, without the closing <|im_end|>.

        temperature 0 is greedy; otherwise tokens are drawn from the smallest set with probability top_p, repeatable
        by `seed`. cache: the prompts go on from what it holds. on_token(i, id) is called for each token as it comes.
        clock: a dict to which the seconds of "encoder", "prefill" and "decode" are added.
        """
        if isinstance(sa, list):
            if len(sa) != len(prompts) or cache is not None:
                raise ValueError(f"{len(sa)} configurations for {len(prompts)} prompts: give one each, and no cache")
            return self._generate_mixed(prompts, sa, on_token, max_tokens=max_tokens, temperature=temperature,
                                        top_p=top_p, seed=seed, trace=trace, clock=clock)
        batch, device = collate(prompts), self.image_newline.device
        room = batch.ids.shape[1] + min(max_tokens, 1024)  # longer answers make the cache grow
        cache = cache or self.new_cache(len(prompts), sa, room, batch.v_pos.shape[1])
        h = self(batch, sa, cache, trace, clock)
        with timed(clock, "decode", device):
            random = torch.Generator(device).manual_seed(seed)
            h = h[torch.arange(len(h)), [len(p.ids) - 1 for p in prompts]]  # the head is needed for one token of each
            pos = torch.tensor([[p.end] for p in prompts], device=device)
            answers, running = [[] for _ in prompts], set(range(len(prompts)))
            while True:
                tokens = choose(self.head(h), temperature, top_p, random)
                for i in sorted(running):
                    token = int(tokens[i])
                    if token != self.stop_id:
                        answers[i].append(token)
                        if on_token:
                            on_token(i, token)
                    if token == self.stop_id or len(answers[i]) == max_tokens:
                        running.discard(i)
                if not running:
                    return answers
                t = self.language_model.embed_tokens(tokens[:, None])
                h = self.language_model(t, t[:, :0], pos, pos[:, :0], sa, cache, trace)[:, -1]
                pos = pos + 1

    def _generate_mixed(self, prompts, sa, on_token, **how):
        """generate for prompts with different configurations: a batch for each configuration."""
        answers = [None] * len(prompts)
        for configuration, rows in by_configuration(sa):
            told = on_token and (lambda i, token, rows=rows: on_token(rows[i], token))
            for i, answer in zip(rows, self.generate([prompts[i] for i in rows], configuration, on_token=told, **how)):
                answers[i] = answer
        return answers

    # --- encode once, ask many ---

    @torch.no_grad()
    def see(self, prompt, sa, room=512, clock=None):
        """Runs what several questions share, the system text and the pictures, once: a Cache for `ask`.

        Attention is causal, so none of it depends on the question. room: text tokens to reserve for questions and
        answers; a longer conversation makes the cache grow.
        """
        cache = self.new_cache(1, sa, len(prompt.ids) + room, len(prompt.v_pos))
        self(collate([prompt]), sa, cache, clock=clock)
        return cache

    @torch.no_grad()
    def ask(self, cache, prompt, keep=False, **how):
        """The answer (token ids) to a prompt that goes on from the cache: data.encode(..., start=cache.end).

        keep: question and answer stay in the cache, so that the next turn can refer to them; otherwise the cache is
        as it was, for the next question. how: as in generate.
        """
        mark = cache.mark()
        answer, = self.generate([prompt], cache.sa, cache=cache, **how)
        if not keep:
            cache.rewind(mark)
            return answer
        fed = cache.n_text[0] - mark[0][0] - len(prompt.ids)  # the last token may not have run through the model yet
        rest = answer[fed:] + self.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
        start = cache.end
        self(collate([Prompt(rest, list(range(start, start + len(rest))), [], [])]), cache.sa, cache)
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
        like = self.image_newline
        for l in c.ca:
            cross = CrossAttention(c).to(like.device, like.dtype)
            cross.start_from(self.language_model.layers[l])
            self.language_model.cross[str(l)] = cross
        return self

    # --- weights in and out ---

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu"):
        """Loads a checkpoint directory, a hub id, or "SIGLIP+QWEN2": two directories or ids and a fresh connector.

        Raises ValueError with one line that names the file and the mend. Says on stderr what it loaded.
        """
        parts = [name] if Path(name).is_dir() else str(name).split("+")
        if len(parts) > 2:
            raise ValueError(f"{name}: give one checkpoint, or two as SIGLIP+QWEN2")
        directories = [find(part) for part in parts]
        config = read_config(directories[0]) if len(parts) == 1 else join_configs(*directories)
        tokenizer = load_tokenizer(directories[-1])
        if (tokens := vocabulary_size(tokenizer)) > config.vocab:
            raise ValueError(f"{directories[-1]}/tokenizer.json has {tokens} tokens, the model only {config.vocab}; "
                             "get both from the same place")
        config.vocab = tokens  # rows beyond are padding
        files, unexpected = scan(directories, config)
        config.tied = config.tied or "lm_head.weight" not in files
        if config.tied:
            files.pop("lm_head.weight", None)
        with torch.device("meta"):
            model = cls(config)
        fresh = model._check(files, unexpected, directories, len(parts) == 2)
        for target, (file, key) in files.items():
            shape = model.get_parameter(target).shape
            with open_weights(file) as f:  # opened anew for each tensor, so that memory holds one of them at a time
                tensor = f.get_slice(key)[:shape[0]] if shape else f.get_tensor(key)
            model._put(target, tensor.to(device, dtype))
        for module in fresh:
            model._start(module, dtype, device)
        model.tokenizer = tokenizer
        n = sum(p.numel() for p in model.parameters())
        notes = [f"{name}: {n / 1e6:,.1f} M parameters", f"{str(dtype)[6:]} on {device}"]
        notes += ["head tied to the embedding"] * config.tied + [f"new: {', '.join(fresh)}"] * bool(fresh)
        notes += ["RANDOM weights: answers mean nothing"] * (config.stage == "random")
        print(", ".join(notes), file=sys.stderr)
        return model.eval()

    def _check(self, files, unexpected, directories, joined):
        """Compares names and shapes before anything is read; returns the modules that may and will start fresh."""
        where, wanted = " + ".join(map(str, directories)), dict(self.named_parameters())
        missing, unexpected = sorted(set(wanted) - set(files)), sorted([*unexpected, *(set(files) - set(wanted))])
        may_be_new = r"language_model\.cross\.\d+" + (r"|multi_modal_projector|image_newline" if joined else "")
        fresh = {m[0] for name in missing if (m := re.match(may_be_new, name))}
        fresh = sorted(part for part in fresh if not any(name.startswith(part + ".") for name in files))  # whole parts
        missing = [name for name in missing if not ((m := re.match(may_be_new, name)) and m[0] in fresh)]
        if missing or unexpected:
            raise ValueError(f"{where}: the tensors are not those that config.json describes;"
                             + (f" missing: {some(missing)}" if missing else "")
                             + (f" unexpected: {some(unexpected)}" if unexpected else "") + "; get config.json and "
                             "weights from the same place")
        for name, (file, key) in files.items():
            with open_weights(file) as f:
                shape, want = tuple(f.get_slice(key).get_shape()), tuple(wanted[name].shape)
            rows = name in ("language_model.embed_tokens.weight", "lm_head.weight")
            if shape != want and not (rows and shape[1:] == want[1:] and shape[0] > want[0]):
                raise ValueError(f"{file}: {key} has shape {shape}, config.json asks for {want}; get both from the "
                                 "same place")
        return fresh

    def _put(self, name, tensor):
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    def _start(self, module, dtype, device):
        """A part that the files do not have, at its starting values."""
        if module == "image_newline":
            self._put(module, torch.randn(self.config.hidden).mul(self.config.hidden ** -0.5).to(device, dtype))
        elif module == "multi_modal_projector":
            self.multi_modal_projector = Connector(self.config).to(device, dtype)
        else:
            l = module.rpartition(".")[2]
            cross = CrossAttention(self.config).to(device, dtype)
            cross.start_from(self.language_model.layers[int(l)])
            self.language_model.cross[l] = cross

    def save_pretrained(self, directory):
        """Writes config.json, model.safetensors and tokenizer.json, beside first and then renamed."""
        directory = Path(directory)
        beside = directory.with_name(directory.name + ".writing")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        (beside / "config.json").write_text(self.config.to_json())
        save_file({k: v.detach().contiguous() for k, v in self.named_parameters()}, beside / "model.safetensors",
                  metadata={"format": "pt"})
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors makes it private
        if self.tokenizer is not None:
            self.tokenizer.save(str(beside / "tokenizer.json"))
        directory.mkdir(parents=True, exist_ok=True)
        for file in beside.iterdir():
            os.replace(file, directory / file.name)
        (directory / "model.safetensors.index.json").unlink(missing_ok=True)  # or older shards would win at loading
        beside.rmdir()


def some(names, n=6):
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def by_configuration(sa):
    """[(configuration, [samples that run it])] of a list with one configuration for each sample."""
    sa = [tuple(sorted(x)) for x in sa]
    return [(c, [i for i, x in enumerate(sa) if x == c]) for c in dict.fromkeys(sa)]


def choose(logits, temperature, top_p, random):
    """The next token of each row of logits (B, vocab): the likeliest, or drawn from the nucleus. Returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() - logits.amax(-1, keepdim=True)  # so that no temperature is too low
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keeps the tokens before which less than top_p has gathered
    return order.gather(-1, torch.multinomial(p, 1, generator=random))[:, 0]


class timed:
    """Adds the seconds of a block of code to clock[name]; does nothing without a clock."""

    def __init__(self, clock, name, device):
        self.clock, self.name, self.cuda = clock, name, torch.device(device).type == "cuda"

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self):
        self.start = self.now() if self.clock is not None else 0

    def __exit__(self, *_):
        if self.clock is not None:
            self.clock[self.name] = self.clock.get(self.name, 0.0) + self.now() - self.start
