"""The parts: attention, rotary positions, Qwen2's block, VISOR's cross-attention, the policy, KV cache, token layout.

A reader of the paper finds here what one layer does (CrossAttn of Eq. 2, TL_l of Eq. 1 to 3, the policy of 4.3);
model.py says which layers run. Qwen2's modules have Hugging Face's names, so that its weights keep theirs. All
attention goes through F.scaled_dot_product_attention.

Letters: B batch, N tokens (Nt text, Nv vision, Nq queries, Nk keys), d features, H query heads, Hkv key/value heads,
D features of a head.
"""
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import PAD


def attention(q, k, v, mask=None, causal=False):
    """Softmax attention with grouped key/value heads: H / Hkv query heads share one of them.

    q (B, Nq, H, D), k and v (B, Nk, Hkv, D), mask (B, 1, Nq, Nk), True where a query attends. Returns (B, Nq, H * D).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, D)
    shape, group = q.shape, q.shape[1] // k.shape[1]
    if causal:                                                         # training and prefill: no mask in memory
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    elif mask is None or shape[2] == 1 or group == 1:
        # Fold a group's query heads into the sequence axis, so that K and V are read once a group (decoding: 2x)
        q = q.reshape(shape[0], k.shape[1], -1, shape[3])              # (B, Hkv, group * Nq, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)    # the mask of one query holds for its group
    else:
        # Mask and grouped heads in one call have no fast kernel on CUDA. One call a group: K, V and mask stay uncopied
        groups = zip(q.split(group, 1), k.split(1, 1), v.split(1, 1))
        y = torch.cat([F.scaled_dot_product_attention(a, b.expand(-1, group, -1, -1), c.expand(-1, group, -1, -1),
                                                      attn_mask=mask) for a, b, c in groups], dim=1)
    return y.reshape(shape).transpose(1, 2).flatten(2)                 # (B, Nq, H * D)


def gather_rows(x, index):
    """x (B, N, d), index (B, M) counts the rows of all samples, 0 to B * N - 1. Returns (B, M, d).

    index_select copies whole rows; on a CPU that is 9 times faster than gather.
    """
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


# --- Qwen2 ----------------------------------------------------------------------------------------------------------

def rope_table(pos, head_dim, theta):
    """cos and sin for rotary positions (B, N): (B, N, 1, head_dim) each, in float32 whatever the model's dtype."""
    freq = theta ** -(torch.arange(0, head_dim, 2, device=pos.device).float() / head_dim)  # (D / 2,)
    angle = pos[..., None, None].float() * freq             # (B, N, 1, D / 2)
    angle = torch.cat([angle, angle], dim=-1)               # for both features of a pair
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary positions, rotate-half convention: features i and i + D / 2 form a pair. x (B, N, H, D)."""
    cos, sin = (r.to(x.dtype) for r in rope)
    a, b = x.chunk(2, dim=-1)                               # (B, N, H, D / 2) each
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)     # Qwen2 has biases here, and none in o_proj
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)  # fewer heads: the cache is smaller
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.observer = None  # called with (q, k, mask) of every forward: see VLM.observe_attention

    def forward(self, x, context, at, kv=None):
        """x (B, Nq, d) gives the queries, context (B, Nk, d) the new keys and values. at: AttentionInputs."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))        # (B, Nq, H, D)
        k = self.k_proj(context).unflatten(-1, (-1, self.head_dim))  # (B, Nk, Hkv, D)
        v = self.v_proj(context).unflatten(-1, (-1, self.head_dim))
        q, k = rotate(q, at.rope_q), rotate(k, at.rope_k)
        if kv is not None:
            k, v = kv.update(k, v, at.cache_index, at.kv_len)        # with all that came before
        if self.observer:
            self.observer(q, k, at.mask)
        y = attention(q, k, v, at.mask, causal=at.mask is None and q.shape[1] > 1)
        return self.o_proj(y)                                        # (B, Nq, d)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.ffn, bias=False)
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (..., d), inside (..., ffn)


class Block(nn.Module):
    """The paper's transformer layer TL_l (Eq. 1): self-attention, then the MLP, each with its residual."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.mlp = MLP(c)

    def forward(self, x, at, kv=None, context=None):
        """x (B, Nq, d) is updated; context (B, Nk, d): the tokens it attends to, where they are more than x itself."""
        h = self.input_layernorm(x)                                     # pre-norm
        keys = h if context is None else self.input_layernorm(context)  # V of a layer that does not update it
        return self.mlp_residual(x + self.self_attn(h, keys, at, kv))

    def mlp_residual(self, x):
        """The second half, in which no token attends to another; compiled on its own (VLM.compile)."""
        return x + self.mlp(self.post_attention_layernorm(x))


# --- VISOR ----------------------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """CrossAttn(T, V) of Eq. 2 without its residual: text queries attend to vision keys and values (paper 4.2.1).

    The vision stream is not updated. There are no rotary positions; where a visual token stands is encoded by the
    conditional position encoding `cpe`, a depthwise convolution along the sequence (kernel 7, padding 3) added to v.
    """

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_norm = nn.RMSNorm(c.hidden, c.rms_eps)   # of t; the paper names no norms, nor heads: as in the LLM
        self.kv_norm = nn.RMSNorm(c.hidden, c.rms_eps)  # of v + cpe(v)
        self.cpe = nn.Conv1d(c.hidden, c.hidden, 7, padding=3, groups=c.hidden)
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.observer = None  # as in Attention

    @torch.no_grad()
    def start_from(self, block):
        """q, k, v and both norms start as copies of the layer's own self-attention; what is left starts at zero, so
        that a new cross-attention changes nothing."""
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(self, name).load_state_dict(getattr(block.self_attn, name).state_dict())
        for norm in (self.q_norm, self.kv_norm):
            norm.load_state_dict(block.input_layernorm.state_dict())
        for weight in (self.cpe.weight, self.cpe.bias, self.o_proj.weight):
            weight.zero_()

    def forward(self, t, v, at, kv=None):
        """t (B, Nt, d), v (B, Nv, d) the new visual tokens, at: CrossAttentionInputs. Returns (B, Nt, d)."""
        q = self.q_proj(self.q_norm(t)).unflatten(-1, (-1, self.head_dim))    # (B, Nt, H, D)
        if v.shape[1]:
            v = self.kv_norm(v + self.positional_encoding(v, at))
            k = self.k_proj(v).unflatten(-1, (-1, self.head_dim))             # (B, Nv, Hkv, D)
            v = self.v_proj(v).unflatten(-1, (-1, self.head_dim))
            if kv is not None:
                k, v = kv.update(k, v, at.cache_index, at.kv_len)
        else:                                     # a later question: the images' keys and values are in the cache
            k, v = kv.k[:, :at.kv_len], kv.v[:, :at.kv_len]
        if self.observer:
            self.observer(q, k, at.mask)
        y = attention(q, k, v, at.mask)           # (B, Nt, H * D); a text token before every image gets zero
        return self.o_proj(y if at.has_image is None else y * at.has_image.to(y.dtype))

    def positional_encoding(self, v, at):
        """The depthwise convolution of v (B, Nv, d), applied per image: a window over two images would leak features
        of the second into keys of the first, which are visible to earlier text."""
        x = v
        if at.padded_index is not None:  # three zeros between images, and before padding
            x = v.new_zeros(v.shape[0], v.shape[1] + 3 * at.image_gaps, v.shape[2])
            x.view(-1, v.shape[2]).index_copy_(0, at.padded_index.flatten(), v.flatten(0, 1))
        # As an image one pixel high, channels last: on a CPU 40 times faster than conv1d
        y = F.conv2d(x.transpose(1, 2)[:, :, None], self.cpe.weight[:, :, None], self.cpe.bias,
                     padding=(0, 3), groups=v.shape[2])[:, :, 0].transpose(1, 2)
        return y if at.padded_index is None else gather_rows(y, at.padded_index)


class Connector(nn.Module):
    """From the encoder's features to the language model's, token by token: a 2-layer MLP (5.1)."""

    def __init__(self, c):
        super().__init__()
        self.linear_1 = nn.Linear(c.vision_hidden * (4 if c.pack_widen else 1), c.hidden)  # widened: 4 sub-tokens
        self.linear_2 = nn.Linear(c.hidden, c.hidden)

    def forward(self, x):  # (..., vision_hidden) -> (..., d)
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact GELU here, the tanh one inside SigLIP


class Policy(nn.Module):
    """Which configuration a question needs (paper 4.3): the routing token, one learned embedding that is put after the
    question, and the MLP that reads it once it has passed the layers all viable configurations share."""

    def __init__(self, c):
        super().__init__()
        self.token = nn.Parameter(torch.randn(c.hidden))   # scaled by VLM.add_router
        self.norm = nn.RMSNorm(c.hidden, c.rms_eps)
        self.up = nn.Linear(c.hidden, c.hidden)
        self.down = nn.Linear(c.hidden, len(c.viable))     # one score for each viable configuration

    def forward(self, z):
        """z (..., d), routing tokens as they enter the route layer -> scores (..., viable)."""
        return self.down(F.gelu(self.up(self.norm(z))))


# --- KV cache -------------------------------------------------------------------------------------------------------

class KV:
    """Keys and values of one attention, in buffers of fixed capacity (B, capacity, Hkv, D) made at the first update."""

    def __init__(self, capacity):
        self.capacity, self.k, self.v = capacity, None, None

    def update(self, k, v, cache_index, length):
        """Stores new k, v (B, N, Hkv, D) at cache_index: rows (B, 1), positions (B, N). Returns the first `length`."""
        if self.k is None:  # in the dtype that the products have, under autocast too
            shape = len(k), max(self.capacity, length), *k.shape[2:]
            self.k, self.v = k.new_zeros(shape), v.new_zeros(shape)
        if length > self.k.shape[1]:  # a conversation longer than was foreseen
            more = round_up(length) - self.k.shape[1]
            self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.k, self.v))
        self.k[cache_index], self.v[cache_index] = k, v  # padding too: the next token of that sample overwrites it
        return self.k[:, :length], self.v[:, :length]

    def select(self, rows):
        """A copy for some of the samples."""
        new = KV(self.capacity)
        if self.k is not None:  # something is cached already
            new.k, new.v = self.k[rows], self.v[rows]
        return new


class LayerCache(NamedTuple):
    """What one layer keeps: its own keys and values, and of a cross-attention those of the images."""
    self_attn: KV
    cross: KV


def round_up(n, multiple=256):
    """Capacities for text are multiples of 256, so that few shapes occur."""
    return -(-n // multiple) * multiple


class Past(NamedTuple):
    """How much of each sample the cache holds, on the host. A value: extending it makes a new one, and forgetting the
    last tokens means to go on from an older one, as their places will be written again."""
    text: np.ndarray    # (B,) text tokens
    vision: np.ndarray  # (B,) visual tokens
    v_pos: np.ndarray   # (B, largest vision) their positions; PAD where a sample has fewer

    @classmethod
    def empty(cls, batch):
        return cls(np.zeros(batch, np.int64), np.zeros(batch, np.int64), np.zeros((batch, 0), np.int64))

    def extend(self, t_pos, v_pos):
        """After new tokens at t_pos (B, Nt), v_pos (B, Nv), padded on the right."""
        vision = self.vision + (v_pos < PAD).sum(1)  # (B,) padding does not count
        return Past(self.text + (t_pos < PAD).sum(1), vision, self.all_v_pos(v_pos)[:, :vision.max(initial=0)])

    def all_v_pos(self, v_pos):
        """(B, n) positions of the visual tokens by cache position, old ones and new."""
        out = np.full((len(v_pos), self.vision.max(initial=0) + v_pos.shape[1]), PAD)
        out[:, :self.v_pos.shape[1]] = self.v_pos    # what is new goes behind, sample by sample
        np.put_along_axis(out, self.vision[:, None] + np.arange(v_pos.shape[1]), v_pos, axis=1)
        return out


# --- token layout ---------------------------------------------------------------------------------------------------

class AttentionInputs(NamedTuple):
    """Cache positions, mask and rotary table of one kind of self-attention; shared by all layers of that kind."""
    cache_index: tuple          # (rows (B, 1), positions (B, N)): where each new key is stored
    kv_len: int                 # keys 0 to kv_len - 1 are attended to
    mask: torch.Tensor | None   # (B, 1, Nq, kv_len) True where a query attends; None: causal, or everything
    rope_q: tuple               # (cos, sin) of the queries, (B, Nq, 1, D) each
    rope_k: tuple               # of the new keys


class CrossAttentionInputs(NamedTuple):
    """The same for cross-attention: a text token attends to the visual tokens placed before it."""
    cache_index: tuple | None          # where the keys of new visual tokens are stored
    kv_len: int
    mask: torch.Tensor | None          # None: all new text follows every image
    has_image: torch.Tensor | None     # (B, Nt, 1) False where no image stands before a text token; None: all have one
    padded_index: torch.Tensor | None  # (B, Nv) row of each visual token with zeros between images; None: one image
    image_gaps: int                    # the most borders between images in one sample


class TokenLayout(NamedTuple):
    """Where new tokens stand, for each kind of layer (Eq. 3). Made on the host once a forward, see make_layout."""
    nv: int                                # new visual tokens
    interleave_index: torch.Tensor | None  # (B, Nv + Nt) rows of [v; t] in order of position, for gather_rows
    inverse_index: torch.Tensor | None     # its inverse
    text: AttentionInputs                  # a layer on t alone
    joint: AttentionInputs                 # a self-attention layer on both streams
    joint_text_queries: AttentionInputs    # the same, with queries from t only
    cross: CrossAttentionInputs | None     # None: there is no vision at all

    def interleave(self, v, t):
        """The two streams as one sequence in order of position: (B, Nv + Nt, d)."""
        return gather_rows(torch.cat([v, t], dim=1), self.interleave_index) if self.nv else t

    def deinterleave(self, x):
        """The inverse of interleave: v, t."""
        if not self.nv:
            return x[:, :0], x
        return gather_rows(x, self.inverse_index).split([self.nv, x.shape[1] - self.nv], dim=1)


def make_layout(t_pos, v_pos, v_img, past, c, device):
    """The TokenLayout of new tokens at t_pos (B, Nt) and v_pos (B, Nv), after what the cache holds (Past).

    All arrays are numpy: order, cache positions and image borders are worked out on the host and uploaded in one copy;
    nothing is read back from the device. v_img (B, Nv): which image a visual token belongs to.
    """
    batch, nt, nv = *t_pos.shape, v_pos.shape[1]
    pos = np.concatenate([v_pos, t_pos], axis=1)        # (B, Nv + Nt)
    order = pos.argsort(axis=1, kind="stable")          # [v; t] in order of position; padding is last
    inverse = order.argsort(axis=1)
    rotary = pos                                        # ids of rotary positions: a table apart from the order above
    rows = np.arange(batch)[:, None]                    # (B, 1)
    text_slot = past.text[:, None] + np.arange(nt)      # cache positions of the new tokens, by kind of layer
    joint_slot = (past.text + past.vision)[:, None] + np.arange(nv + nt)
    all_v_pos = past.all_v_pos(v_pos)                   # (B, Nk) of the cached images too
    all_visible = bool((all_v_pos.max(axis=1, initial=-1)[:, None] < t_pos).all())  # to all new text: no mask needed
    border = np.diff(v_img, axis=1) != 0                # (B, Nv - 1) a new image, or padding, begins after this token
    gaps = int(border.sum(axis=1).max(initial=0))       # none: one image, the convolution runs over v itself
    image = np.pad(border.cumsum(axis=1), ((0, 0), (min(nv, 1), 0)))  # (B, Nv) 0, 1, ... and last the padding

    on = upload(device, rows=rows, text_slot=text_slot, joint_slot=joint_slot,
                interleave_index=order + rows * (nv + nt), inverse_index=inverse + rows * (nv + nt),
                query_slot=np.take_along_axis(joint_slot, inverse[:, nv:], axis=1),  # of the text in the joint sequence
                vision_slot=past.vision[:, None] + np.arange(nv), t_pos=t_pos, all_v_pos=all_v_pos,
                padded_index=np.arange(nv) + 3 * image + rows * (nv + 3 * gaps),     # with three zeros between images
                text_rotary=rotary[:, nv:], joint_rotary=np.take_along_axis(rotary, order, axis=1))

    # Rotary tables and masks are made on the device, once a forward; all layers of a kind share them
    text_rope = rope_table(on.text_rotary, c.head_dim, c.rope_theta)
    joint_rope = rope_table(on.joint_rotary, c.head_dim, c.rope_theta) if nv else text_rope
    text_len, joint_len = int(past.text.max()) + nt, int((past.text + past.vision).max()) + nv + nt
    text_mask = joint_mask = None  # the first tokens: is_causal says it all
    if past.text.any() or past.vision.any():
        text_mask, joint_mask = causal_mask(on.text_slot, text_len), causal_mask(on.joint_slot, joint_len)
    text = AttentionInputs((on.rows, on.text_slot), text_len, text_mask, text_rope, text_rope)
    joint = AttentionInputs((on.rows, on.joint_slot), joint_len, joint_mask, joint_rope, joint_rope)
    queries = joint
    if nv:  # text alone gives queries where V^(l) is not needed: the mask says where each stands among the keys
        queries = joint._replace(mask=causal_mask(on.query_slot, joint_len), rope_q=text_rope)
    cross = None
    if all_v_pos.shape[1]:  # images now, or earlier
        mask, has_image = (None, None) if all_visible else vision_mask(on.t_pos, on.all_v_pos)
        cross = CrossAttentionInputs((on.rows, on.vision_slot), all_v_pos.shape[1], mask, has_image,
                                     on.padded_index if gaps else None, gaps)
    return TokenLayout(nv, on.interleave_index, on.inverse_index, text, joint, queries, cross)


def causal_mask(slot, length):
    """slot (B, Nq), cache positions of queries -> (B, 1, Nq, length): a token attends to its own and those before."""
    return torch.arange(length, device=slot.device) <= slot[:, None, :, None]


def vision_mask(pos, all_v_pos):
    """pos (B, Nq) of text tokens, all_v_pos (B, Nk) of visual tokens -> mask (B, 1, Nq, Nk), has_image (B, Nq, 1).

    A text token attends to the visual tokens before it; where there is none the mask allows all, as a row without any
    key has no softmax, and has_image says that the result does not count."""
    before = all_v_pos[:, None] < pos[..., None]          # (B, Nq, Nk); padding has the largest positions
    has_image = before.any(-1, keepdim=True)
    return (before | ~has_image)[:, None], has_image


def upload(device, **arrays):
    """numpy arrays of whole numbers -> a namespace of int64 tensors on the device, in one copy without a wait."""
    flat = torch.from_numpy(np.concatenate([x.ravel() for x in arrays.values()]).astype(np.int64, copy=False))
    if device.type == "cuda":
        flat = flat.pin_memory()
    views = flat.to(device, non_blocking=True).split([x.size for x in arrays.values()])
    return SimpleNamespace(**{name: view.view(x.shape) for (name, x), view in zip(arrays.items(), views)})


class DecodeLayout:
    """TokenLayouts of one new text token a sample, step after step: made once a generation, advanced on the device.

    Keys are attended to over a fixed length with a mask, so that every step has the same shapes.
    """

    def __init__(self, past, pos, steps, c, device):
        """past: Past on the host; pos (B,) position of the first new token; steps: how many may follow."""
        self.c, self.steps = c, steps
        self.text_len = round_up(int(past.text.max()) + steps)
        self.joint_len = self.text_len + int(past.vision.max())  # no more than VLM.new_tree reserves
        on = upload(device, rows=np.arange(len(pos))[:, None], text_slot=past.text[:, None], pos=pos[:, None],
                    joint_slot=(past.text + past.vision)[:, None], v_pos=past.v_pos)
        self.rows, self.text_slot, self.joint_slot, self.pos, self.cross = (on.rows, on.text_slot, on.joint_slot,
                                                                            on.pos, None)
        if past.vision.any():  # every image stands before the new token: a mask only for unequally many visual tokens
            mask, has_image = vision_mask(on.pos, on.v_pos) if past.vision.min() < past.vision.max() else (None, None)
            self.cross = CrossAttentionInputs(None, on.v_pos.shape[1], mask, has_image, None, 0)

    def step(self):
        """The TokenLayout of the next token."""
        rope = rope_table(self.pos, self.c.head_dim, self.c.rope_theta)
        text = AttentionInputs((self.rows, self.text_slot), self.text_len,
                               causal_mask(self.text_slot, self.text_len), rope, rope)
        joint = AttentionInputs((self.rows, self.joint_slot), self.joint_len,
                                causal_mask(self.joint_slot, self.joint_len), rope, rope)
        # New tensors, as the layout keeps the old ones
        self.text_slot, self.joint_slot, self.pos = self.text_slot + 1, self.joint_slot + 1, self.pos + 1
        self.steps -= 1
        return TokenLayout(0, None, None, text, joint, joint, self.cross)


def make_routing_layout(t_pos, v_pos, past, starts, c, device):
    """The TokenLayout of routing tokens: the k-th of sample b attends to itself and all before position starts[b, k].

    t_pos (B, Nt), v_pos (B, Nv): the newest tokens, which the cache holds besides `past`; starts (B, K). The routing
    tokens' own keys are stored behind all others, where the next tokens overwrite them: no other token attends to them.
    """
    text_before = past.text[:, None] + (t_pos[:, None] < starts[..., None]).sum(-1)                    # (B, K)
    joint_before = text_before + past.vision[:, None] + (v_pos[:, None] < starts[..., None]).sum(-1)
    text_end = int(past.text.max()) + t_pos.shape[1]
    joint_end = int((past.text + past.vision).max()) + t_pos.shape[1] + v_pos.shape[1]
    on = upload(device, rows=np.arange(len(starts))[:, None], text_before=text_before, joint_before=joint_before,
                pos=starts, all_v_pos=past.all_v_pos(v_pos), k=np.arange(starts.shape[1])[None])
    rope = rope_table(on.pos, c.head_dim, c.rope_theta)

    def inputs(before, end):
        slots = torch.arange(end + starts.shape[1], device=device)       # all cache positions
        mask = (slots < before[..., None]) | (slots == end + on.k[..., None])  # (B, K, end + K)
        return AttentionInputs((on.rows, end + on.k), len(slots), mask[:, None], rope, rope)
    joint, cross = inputs(on.joint_before, joint_end), None
    if on.all_v_pos.shape[1]:
        cross = CrossAttentionInputs(None, on.all_v_pos.shape[1], *vision_mask(on.pos, on.all_v_pos), None, 0)
    return TokenLayout(0, None, None, inputs(on.text_before, text_end), joint, joint, cross)
