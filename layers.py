"""The parts: SigLIP block, token packing, Qwen2 block, VISOR's cross-attention, the cache of keys and values.

SigLIP and Qwen2 follow Hugging Face's module names, so that most weights keep their names. New is CrossAttention
(paper 4.2.1). All attention goes through F.scaled_dot_product_attention.

Letters: B batch, N tokens (Nt text, Nv vision, Nq queries, Nk keys), d features, H heads, D features of a head.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from config import PAD


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
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


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
        x = x + self.self_attn(h, h if context is None else self.input_layernorm(context), at, kv, trace)
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


# --- cache ----------------------------------------------------------------------------------------------------------

class KV:
    """Keys and values of one layer, pre-allocated: k and v are (B, room, Hkv, D)."""

    def __init__(self, batch, room, c, like):
        self.k, self.v = (like.new_zeros(batch, room, c.kv_heads, c.head_dim) for _ in "kv")

    def write(self, k, v, slots, top):
        """Puts new k, v (B, N, Hkv, D) into slots (B, N), returns the first `top` slots. Grows if it must."""
        if top > self.k.shape[1]:
            more = top + 256 - self.k.shape[1]
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.k, self.v))
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[rows, slots], self.v[rows, slots] = k, v
        return self.k[:, :top], self.v[:, :top]


class Cache:
    """What a batch of prompts, all in one configuration, leaves behind for the next tokens.

    A self-attention layer keeps text and vision, any other layer keeps text only; a cross-attention keeps the keys
    and values of the vision, computed once per picture. So memory falls with the number of self-attention layers.
    Slots follow the order of the tokens; a pad is overwritten by the first token that comes after it.
    """

    def __init__(self, sa, cross, batch, text_room, vision_room, c, like):
        """sa: the configuration; cross: the layers whose cross-attention runs in it. Room is in tokens per sample."""
        self.sa = sa
        self.layers = [KV(batch, text_room + vision_room * (l in sa), c, like) for l in range(c.layers)]
        self.cross = {l: KV(batch, vision_room, c, like) for l in cross}
        self.v_pos = torch.full((batch, vision_room), PAD, device=like.device)
        self.n_text, self.n_vision = [0] * batch, [0] * batch  # tokens of each sample so far

    def see(self, v_pos, slots, top):
        """Notes the positions of new visual tokens; returns those of all so far, (B, top)."""
        if top > self.v_pos.shape[1]:
            self.v_pos = F.pad(self.v_pos, (0, top - self.v_pos.shape[1]), value=PAD)
        self.v_pos.scatter_(1, slots, v_pos)
        return self.v_pos[:, :top]

    def advance(self, t_pos, v_pos):
        self.n_text = [a + b for a, b in zip(self.n_text, (t_pos < PAD).sum(1).tolist())]
        self.n_vision = [a + b for a, b in zip(self.n_vision, (v_pos < PAD).sum(1).tolist())]

    @property
    def end(self):
        """The position that follows the first sample's last token."""
        return self.n_text[0] + self.n_vision[0]

    def mark(self):
        return list(self.n_text), list(self.n_vision)

    def rewind(self, mark):
        """Forgets what came after the mark; its slots will be written again."""
        self.n_text, self.n_vision = list(mark[0]), list(mark[1])
        slots = torch.arange(self.v_pos.shape[1], device=self.v_pos.device)
        forgotten = slots >= torch.tensor(self.n_vision, device=slots.device)[:, None]
        self.v_pos = self.v_pos.masked_fill(forgotten, PAD)

    @property
    def nbytes(self):
        return sum(x.nbytes for kv in (*self.layers, *self.cross.values()) for x in (kv.k, kv.v))
