"""The parts: SigLIP block, token packing, Qwen2 block, VISOR's cross-attention, the cache of keys and values.

SigLIP and Qwen2 follow Hugging Face's module names, so that most weights keep their names. New is CrossAttention
(paper 4.2.1). All attention goes through F.scaled_dot_product_attention.

Letters: B batch, N tokens (Nt text, Nv vision, Nq queries, Nk keys), d features, H heads, D features of a head.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import PAD, forks


def attend(q, k, v, mask=None, causal=False, trace=None):
    """Softmax attention with grouped key/value heads.

    q (B, Nq, H, D), k and v (B, Nk, Hkv, D), mask (B, 1, Nq, Nk) True where a query may look. Returns (B, Nq, H * D).
    trace: a list that receives the last query's attention weights, averaged over the heads: (B, Nk).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if trace is not None:
        last = q[:, :, -1:].unflatten(1, (k.shape[1], -1)).flatten(2, 3)                  # (B, Hkv, H / Hkv, D)
        score = last @ k.transpose(2, 3) * q.shape[-1] ** -0.5                            # (B, Hkv, H / Hkv, Nk)
        if mask is not None:
            score = score.masked_fill(~mask[:, :, -1:], float("-inf"))
        trace.append(score.softmax(-1).mean((1, 2)))
    shape = q.shape
    if shape[2] == 1:  # decoding: the heads of a group ask together, so that their keys are read once; 2x on a CPU
        q = q.reshape(len(k), k.shape[1], -1, shape[3])
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.reshape(shape).transpose(1, 2).flatten(2)


def pick(x, index):
    """x (B, N, d), index (B, M) -> (B, M, d): sample b's rows index[b]. index_select copies whole rows: on a CPU 9x
    faster than gather."""
    flat = index + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, index.shape)


# --- SigLIP ---------------------------------------------------------------------------------------------------------

class SiglipAttention(nn.Module):
    """Every patch of a tile sees every other; no mask, no positions."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vision_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(c.vision_hidden, c.vision_hidden))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v))


class SiglipMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.vision_hidden, c.vision_ffn)
        self.fc2 = nn.Linear(c.vision_ffn, c.vision_hidden)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.vision_hidden, c.vision_eps)
        self.self_attn = SiglipAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.vision_hidden, c.vision_eps)
        self.mlp = SiglipMLP(c)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def pack(x, side):
    """Token packing (paper 4.4, appendix I): a tile's n x n patches become side x side tokens of four sub-tokens each.

    x (tiles, n * n, c) -> (tiles, side * side, 4, c), sub-tokens row by row. The grid is interpolated to the even side
    2 * side, then space-to-depth puts each 2 x 2 square into one token. The paper's "interpolate by 1 / sqrt(2)" for a
    ratio of 2 is read as the side of the result, 27 -> 19, the only reading that halves the tokens.
    """
    n = round(x.shape[1] ** 0.5)
    grid = F.interpolate(x.transpose(1, 2).unflatten(2, (n, n)), size=2 * side, mode="bilinear")
    grid = grid.unflatten(3, (side, 2)).unflatten(2, (side, 2))           # (tiles, c, side, dy, side, dx)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


# --- Qwen2 ----------------------------------------------------------------------------------------------------------

class Span(NamedTuple):
    """Where the tokens of one kind of layer stand. Worked out once per forward, shared by all layers of the kind."""
    slots: torch.Tensor         # (B, N) cache slot of each new key
    top: int                    # the keys to look at are slots 0 ... top - 1
    mask: torch.Tensor | None   # (B, 1, Nq, top) True where a query may look; None: causal, queries are the last keys
    rope: tuple | None = None     # (cos, sin) of the queries, (B, Nq, 1, D) each
    rope_kv: tuple | None = None  # (cos, sin) of the new keys


def causal_span(past, pos, c, ask=None):
    """The Span of new tokens at positions pos (B, N), where sample b already has past[b] tokens of this kind of layer.

    Everything new is a key; ask (B, Nq) names the tokens that are also queries (default: all). A token may look at
    its own slot and those before it.
    """
    steps = torch.arange(pos.shape[1], device=pos.device)
    slots = torch.tensor(past, device=pos.device)[:, None] + steps
    top = max(past) + pos.shape[1]
    rope = rope_table(pos, c.head_dim, c.rope_theta)
    if ask is None:
        from_start = not any(past) or (pos.shape[1] == 1 and len(set(past)) == 1)
        mask = None if from_start else torch.arange(top, device=pos.device) <= slots[..., None]
        return Span(slots, top, mask if mask is None else mask[:, None], rope, rope)
    mask = torch.arange(top, device=pos.device) <= slots.gather(1, ask)[..., None]
    return Span(slots, top, mask[:, None], rope_table(pos.gather(1, ask), c.head_dim, c.rope_theta), rope)


def rope_table(pos, head_dim, theta):
    """cos and sin for positions (B, N): (B, N, 1, head_dim) each, in float32 whatever the model's dtype."""
    freq = theta ** -(torch.arange(0, head_dim, 2, device=pos.device).float() / head_dim)
    angle = pos[..., None, None].float() * freq
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary positions, rotate-half convention: features i and i + D/2 form a pair. x (B, N, H, D)."""
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    def forward(self, x, context, at, kv=None, trace=None):
        """x (B, Nq, d) asks, context (B, Nk, d) answers; usually they are the same. kv: the layer's KV cache."""
        q, k, v = (f(y).unflatten(-1, (-1, self.head_dim))
                   for f, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context)))
        q, k = rotate(q, at.rope), rotate(k, at.rope_kv)
        if kv is not None:
            k, v = kv.write(k, v, at.slots, at.top)
        return self.o_proj(attend(q, k, v, at.mask, causal=at.mask is None and q.shape[1] > 1, trace=trace))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """The paper's transformer layer TL_l. `context`: the tokens that x may look at, when they are more than x."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.mlp = MLP(c)

    def forward(self, x, at, kv=None, context=None, trace=None):
        h = self.input_layernorm(x)
        return self.feed(x + self.self_attn(h, h if context is None else self.input_layernorm(context), at, kv, trace))

    def feed(self, x):
        """The second half, in which no token sees another."""
        return x + self.mlp(self.post_attention_layernorm(x))


# --- VISOR ----------------------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """CrossAttn(T, V) of Eq. 2 without its residual: text asks, vision answers and does not change (paper 4.2.1).

    No rotary positions: where a visual token stands is told by a depthwise convolution along the sequence, kernel 7
    and padding 3 (conditional position encoding), which starts at zero and is added to v. It never crosses a
    text token into the next picture, or text between two pictures could see the later one. o_proj starts at zero too,
    so a new layer changes nothing.
    """

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_norm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.kv_norm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.position = nn.Conv1d(c.hidden, c.hidden, 7, padding=3, groups=c.hidden)
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)

    @torch.no_grad()
    def start_from(self, block):
        """q, k, v and both norms start as copies of the layer's own self-attention (a miniature learns faster so)."""
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(self, name).load_state_dict(getattr(block.self_attn, name).state_dict())
        for norm in (self.q_norm, self.kv_norm):
            norm.load_state_dict(block.input_layernorm.state_dict())
        for weight in (self.position.weight, self.position.bias, self.o_proj.weight):
            weight.zero_()

    def forward(self, t, v, at, kv=None, trace=None):
        """t (B, Nt, d), v (B, Nv, d) the new visual tokens (Nv = 0 once they are cached) -> (B, Nt, d)."""
        q = self.q_proj(self.q_norm(t)).unflatten(-1, (-1, self.head_dim))
        v = self.kv_norm(v + self.convolve(v, at))
        k, v = (f(v).unflatten(-1, (-1, self.head_dim)) for f in (self.k_proj, self.v_proj))
        if kv is not None:
            k, v = kv.write(k, v, at.slots, at.top)
        y = attend(q, k, v, at.mask, trace=trace)
        return self.o_proj(y * at.sighted)  # zero where a text token has no picture before it

    def convolve(self, v, at):
        """The depthwise convolution, picture by picture: three zeros are put where text stands between two."""
        if not v.shape[1]:
            return v
        x = v
        if at.gaps:  # several pictures, or padding
            x = v.new_zeros(v.shape[0], v.shape[1] + 3 * at.gaps, v.shape[2])
            rows = torch.arange(len(v), device=v.device)[:, None]
            x[rows, at.spread] = v
        # As a picture one pixel high, channels last: 40x faster than conv1d on a CPU
        y = F.conv2d(x.transpose(1, 2)[:, :, None], self.position.weight[:, :, None], self.position.bias,
                     padding=(0, 3), groups=v.shape[2])[:, :, 0].transpose(1, 2)
        return pick(y, at.spread) if at.gaps else y


class CrossSpan(NamedTuple):
    """What Span is to self-attention: which visual tokens a text token may look at, all those placed before it."""
    slots: torch.Tensor    # (B, Nv) cache slot of each new visual token
    top: int
    mask: torch.Tensor     # (B, 1, Nt, top)
    sighted: torch.Tensor  # (B, Nt, 1) 1 where a text token has any picture before it, else 0
    spread: torch.Tensor   # (B, Nv) place of each visual token with three zeros between pictures
    gaps: int              # the most borders between pictures in one sample


def cross_span(t_pos, v_pos, slots, all_pos, dtype):
    """t_pos (B, Nt) and v_pos (B, Nv) of the new tokens, all_pos (B, Nk) of every visual token so far."""
    mask = all_pos[:, None] < t_pos[:, :, None]   # (B, Nt, Nk); padding has the largest positions
    sighted = mask.any(-1, keepdim=True)
    border = (v_pos.diff(dim=1) != 1).long()  # text stands between two pictures, and padding is far away
    picture = F.pad(border, (1, 0)).cumsum(1) if v_pos.shape[1] else v_pos
    spread = torch.arange(v_pos.shape[1], device=v_pos.device) + 3 * picture
    return CrossSpan(slots, all_pos.shape[1], (mask | ~sighted)[:, None], sighted.to(dtype), spread,
                     int(picture.max()) if v_pos.shape[1] else 0)


class Policy(nn.Module):
    """Which configuration a question needs (paper 4.3): a routing token to put after it, and the MLP that reads the
    token once it has passed the layers that all viable configurations share."""

    def __init__(self, c):
        super().__init__()
        self.token = nn.Parameter(torch.randn(c.hidden))
        self.norm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.up = nn.Linear(c.hidden, c.hidden)
        self.down = nn.Linear(c.hidden, len(c.viable))

    def forward(self, z):
        """z (B, 1, d), the routing token before layer `fork` -> scores of the viable configurations (B, viable)."""
        return self.down(F.gelu(self.up(self.norm(z[:, 0]))))


# --- where tokens stand --------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """Where new tokens stand, for each kind of layer; worked out once, before the first of them."""
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


def lay_out(t_pos, v_pos, configurations, cache, c, dtype):
    """The Layout of new tokens at t_pos (B, Nt) and v_pos (B, Nv) for any of these configurations."""
    batch, nv = v_pos.shape
    n_text, n_vision = (cache.n_text, cache.n_vision) if cache else ([0] * batch,) * 2
    pos = torch.cat([v_pos, t_pos], dim=1)
    order = pos.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    both = read = seen = None
    if any(configurations):
        past = [a + b for a, b in zip(n_text, n_vision)]
        both = causal_span(past, pos.gather(1, order), c)
        read = causal_span(past, pos.gather(1, order), c, ask=place[:, nv:]) if nv else both
    if top := max(n_vision) + nv:
        slots = torch.tensor(n_vision, device=v_pos.device)[:, None] + torch.arange(nv, device=v_pos.device)
        all_pos = cache.see(v_pos, slots, top) if cache else v_pos
        if any(c.readers(sa)[0] for sa in configurations):
            seen = cross_span(t_pos, v_pos, slots, all_pos, dtype)
    return Layout(order, place, nv, causal_span(n_text, t_pos, c), both, read, seen)


class Part:
    """New tokens of a batch on their way through the layers, in one configuration or in several.

    What comes before the first layer in which two configurations differ is the same work for both, and done once: the
    streams are kept where configurations part, and where a run stopped.
    """

    def __init__(self, t, v, t_pos, v_pos, configurations, cache, config, reached=(0, ())):
        """t (B, Nt, d) text and v (B, Nv, d) vision, with their positions t_pos (B, Nt), v_pos (B, Nv).

        configurations: those in which it may run. cache: what earlier tokens left; `run` adds to it.
        reached: (the layer that t and v are about to enter, the self-attention layers behind them).
        """
        self.t_pos, self.v_pos, self.cache = t_pos, v_pos, cache
        self.at = lay_out(t_pos, v_pos, configurations, cache, config, t.dtype)
        self.forks = forks(configurations)
        self.lasts = [(sa, config.readers(sa)[1]) for sa in configurations]  # the last layer that reads v in each
        self.streams = {reached: (t, v)}

    def refines(self, sa, l):
        """Whether layer l of sa is to update v: whether a later layer reads it, in sa or in what may branch off yet."""
        return any(l < last for own, last in self.lasts if before(own, l + 1) == before(sa, l + 1))

    def reached(self, sa, stop):
        """(layer, t, v): how far it has come, up to layer `stop`, in a configuration that agrees with sa so far."""
        layer = max(l for l, behind in self.streams if l <= stop and behind == before(sa, l))
        return layer, *self.streams[layer, before(sa, layer)]


def before(sa, l):
    return tuple(x for x in sa if x < l)


# --- cache ----------------------------------------------------------------------------------------------------------

class KV:
    """Keys and values of one layer, pre-allocated: k and v are (B, room, Hkv, D)."""

    def __init__(self, k, v):
        self.k, self.v = k, v

    def write(self, k, v, slots, top):
        """Puts new k, v (B, N, Hkv, D) into slots (B, N), returns the first `top` slots. Grows if it must."""
        if top > self.k.shape[1]:
            more = top + 256 - self.k.shape[1]
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.k, self.v))
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[rows, slots], self.v[rows, slots] = k.to(self.k.dtype), v.to(self.v.dtype)  # under autocast
        return self.k[:, :top], self.v[:, :top]


class Cache:
    """What a batch of prompts leaves behind for the next tokens, in one configuration or in several.

    A self-attention layer keeps text and vision, any other layer keeps text only; a cross-attention keeps the keys
    and values of the vision, computed once per picture. So memory falls with the number of self-attention layers.
    What layer l keeps depends on the self-attention layers up to l alone: configurations share it until they differ.
    Slots follow the order of the tokens; a pad is overwritten by the first token that comes after it.
    """

    def __init__(self, configurations, batch, text_room, vision_room, c, dtype, device):
        """configurations: those in which it may be used. Room is in tokens per sample."""
        self.configurations, self.room, self.dtype, self.config = configurations, (text_room, vision_room), dtype, c
        self.kv = {}     # (kind, layer, the self-attention layers up to it) -> KV
        self.parts = []  # tokens that other configurations may still have to read
        self.v_pos = torch.full((batch, vision_room), PAD, device=device)
        self.n_text, self.n_vision = [0] * batch, [0] * batch  # tokens of each sample so far

    def layer(self, l, sa):
        """The KV of layer l in configuration sa."""
        return self._get("self", l, sa, self.room[0] + self.room[1] * (l in sa))

    def cross(self, l, sa):
        """The KV of the cross-attention in layer l in configuration sa."""
        return self._get("cross", l, sa, self.room[1])

    def _get(self, kind, l, sa, room):
        key = kind, l, tuple(sorted(x for x in sa if x <= l))
        if key not in self.kv:
            shape = len(self.n_text), room, self.config.kv_heads, self.config.head_dim
            self.kv[key] = KV(*(torch.zeros(shape, dtype=self.dtype, device=self.v_pos.device) for _ in "kv"))
        return self.kv[key]

    def rows(self, index, below):
        """A cache of its own for some of the samples, with a copy of what they have so far in the layers < below."""
        new = Cache(self.configurations, 0, *self.room, self.config, self.dtype, self.v_pos.device)
        new.kv = {key: KV(kv.k[index], kv.v[index]) for key, kv in self.kv.items() if key[1] < below}
        new.v_pos = self.v_pos[index]
        new.n_text, new.n_vision = ([n[i] for i in index.tolist()] for n in (self.n_text, self.n_vision))
        return new

    def see(self, v_pos, slots, top):
        """Notes the positions of new visual tokens; returns those of all so far, (B, top)."""
        if top > self.v_pos.shape[1]:
            self.v_pos = F.pad(self.v_pos, (0, top - self.v_pos.shape[1]), value=PAD)
        self.v_pos.scatter_(1, slots, v_pos)
        return self.v_pos[:, :top]

    def keep(self, part):
        """What a Part has brought stays; other configurations may read it later."""
        self.advance(part.t_pos, part.v_pos)
        if len(self.configurations) > 1:
            self.parts.append(part)

    def advance(self, t_pos, v_pos):
        self.n_text = [a + b for a, b in zip(self.n_text, (t_pos < PAD).sum(1).tolist())]
        self.n_vision = [a + b for a, b in zip(self.n_vision, (v_pos < PAD).sum(1).tolist())]

    @property
    def end(self):
        """The position that follows the first sample's last token."""
        return self.n_text[0] + self.n_vision[0]

    def mark(self):
        return list(self.n_text), list(self.n_vision), len(self.parts)

    def rewind(self, mark):
        """Forgets what came after the mark; its slots will be written again."""
        self.n_text, self.n_vision, self.parts = list(mark[0]), list(mark[1]), self.parts[:mark[2]]
        slots = torch.arange(self.v_pos.shape[1], device=self.v_pos.device)
        forgotten = slots >= torch.tensor(self.n_vision, device=slots.device)[:, None]
        self.v_pos = self.v_pos.masked_fill(forgotten, PAD)

    @property
    def nbytes(self):
        return sum(x.nbytes for kv in self.kv.values() for x in (kv.k, kv.v))
