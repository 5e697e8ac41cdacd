"""Where tokens stand: the KV cache, and for each kind of layer cache positions, masks and rotary positions.

All of it is worked out on the host in numpy, once a forward, and uploaded in one copy; a generation's steps advance it
on the device (DecodeLayout).

Letters: B batch, N tokens (Nt text, Nv vision, Nq queries, Nk keys), d features, Hkv key/value heads, D features of a
head.
"""
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from config import PAD


def gather_rows(x, index):
    """x (B, N, d), index (B, M) counts the rows of all samples, 0 to B * N - 1. Returns (B, M, d).

    index_select copies whole rows; on a CPU that is 9 times faster than gather.
    """
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def rope_table(pos, c, dtype=torch.float32):
    """cos and sin for rotary positions (B, N), of M-RoPE (B, N, 3): (B, N, 1, D) each, worked out in float32.

    The sines of a head's first half are negative: x * cos + roll(x, D / 2) * sin turns features i and i + D / 2."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=pos.device).float() / c.head_dim)  # (D / 2,)
    if pos.ndim == 3:                                       # which of the three turns a frequency
        pos = torch.cat([pos[..., i:i + 1].expand(-1, -1, n) for i, n in enumerate(c.mrope)], dim=-1)
        angle = pos[..., None, :].float() * freq
    else:
        angle = pos[..., None, None].float() * freq         # (B, N, 1, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


# --- KV cache -------------------------------------------------------------------------------------------------------

class KV:
    """Keys and values of one attention, in a buffer of fixed capacity (B, capacity, 2 * Hkv, D) made at first use."""

    def __init__(self, capacity):
        self.capacity, self.kv = capacity, None

    def update(self, kv, cache_index, length):
        """Stores new kv (B, N, 2 * Hkv, D) at cache_index: rows (B, 1), places (B, N). Returns the first `length`."""
        if self.kv is None:  # in the dtype that the products have, under autocast too
            self.kv = kv.new_zeros(len(kv), max(self.capacity, length), *kv.shape[2:])
        self.reserve(length)         # a conversation longer than was foreseen
        self.kv[cache_index] = kv    # padding too: the next token of that sample overwrites it
        return self.kv[:, :length]

    def reserve(self, length):
        """Makes room for `length` tokens, if there is a buffer already and it has less."""
        if self.kv is not None and length > self.kv.shape[1]:
            self.kv = F.pad(self.kv, (0, 0, 0, 0, 0, round_up(length) - self.kv.shape[1]))

    def select(self, rows):
        """A copy for some of the samples."""
        new = KV(self.capacity)
        new.kv = None if self.kv is None else self.kv[rows]
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
    behind: np.ndarray  # (B,) how far rotary positions are behind the number of tokens: with M-RoPE, by its images

    @classmethod
    def empty(cls, batch):
        zeros = np.zeros(batch, np.int64)
        return cls(zeros, zeros, np.zeros((batch, 0), np.int64), zeros)

    def extend(self, t_pos, v_pos, v_img, v_rope):
        """After new tokens, as in data.Batch, padded on the right."""
        vision = self.vision + (v_pos < PAD).sum(1)  # (B,) padding does not count
        return Past(self.text + (t_pos < PAD).sum(1), vision, self.all_v_pos(v_pos)[:, :vision.max(initial=0)],
                    self.behind + left_behind(v_img, v_rope).sum(1))

    def all_v_pos(self, v_pos):
        """(B, n) positions of the visual tokens by cache position, old ones and new."""
        out = np.full((len(v_pos), self.vision.max(initial=0) + v_pos.shape[1]), PAD)
        out[:, :self.v_pos.shape[1]] = self.v_pos    # what is new goes behind, sample by sample
        np.put_along_axis(out, self.vision[:, None] + np.arange(v_pos.shape[1]), v_pos, axis=1)
        return out


# --- rotary positions -----------------------------------------------------------------------------------------------

def left_behind(v_img, v_rope):
    """(B, Nv): by how much the rotary positions of what follows a visual token are behind the number of tokens. With
    M-RoPE an image of h x w tokens takes max(h, w) positions: of what its last one has taken, the largest counts."""
    if not v_rope.shape[2]:
        return 0 * v_img
    is_last = np.diff(v_img, axis=1, append=-1) != 0      # the last of an image; padding has -1
    return np.where(is_last, -v_rope.max(axis=2), 0)


def rotary_ids(t_pos, v_pos, v_img, v_rope, past):
    """Rotary positions of text (B, Nt) and visual tokens (B, Nv); with M-RoPE (B, N, 3): time, row, column. They are
    those of the whole prompt, whichever stream a layer runs on."""
    behind = past.behind[:, None]
    if v_rope.shape[2]:
        pos = np.concatenate([v_pos, t_pos], axis=1)
        order = pos.argsort(axis=1, kind="stable")
        left = np.pad(left_behind(v_img, v_rope), ((0, 0), (0, t_pos.shape[1])))
        left = np.take_along_axis(left, order, axis=1)
        before = np.take_along_axis(left.cumsum(1) - left, order.argsort(axis=1), axis=1) + behind  # (B, Nv + Nt)
        v_ids, t_ids = np.split((pos - before)[..., None], [v_pos.shape[1]], axis=1)
        return t_ids.repeat(3, axis=2), v_ids + v_rope
    return t_pos - behind, v_pos - behind


# --- token layout ---------------------------------------------------------------------------------------------------

class AttentionInputs(NamedTuple):
    """Cache positions, mask and rotary table of one kind of self-attention; shared by all layers of that kind."""
    cache_index: tuple          # (rows (B, 1), positions (B, N)): where each new key is stored
    kv_len: int                 # keys 0 to kv_len - 1 are attended to
    mask: torch.Tensor | None   # (B, 1, Nq, kv_len) 0 where a query attends, else -inf; None: causal, or everything
    rope_q: tuple               # (cos, sin) of the queries, (B, Nq, 1, D) each
    rope_k: tuple               # of the new keys


class CrossAttentionInputs(NamedTuple):
    """The same for cross-attention: a text token attends to the visual tokens placed before it."""
    cache_index: tuple | None          # where the keys of new visual tokens are stored; None: there are none
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


def make_layout(t_pos, v_pos, v_img, v_rope, past, c, device, dtype=torch.float32):
    """The TokenLayout of new tokens at t_pos (B, Nt) and v_pos (B, Nv), after what the cache holds (Past).

    All arrays are numpy: order, cache positions and image borders are worked out on the host and uploaded in one copy;
    nothing is read back from the device. v_img, v_rope: as in data.Batch. dtype: of queries, keys and values, so that
    no layer has to cast.
    """
    batch, nt, nv = *t_pos.shape, v_pos.shape[1]
    pos = np.concatenate([v_pos, t_pos], axis=1)        # (B, Nv + Nt)
    order = pos.argsort(axis=1, kind="stable")          # [v; t] in order of position; padding is last
    inverse = order.argsort(axis=1)
    # Rotary positions are a table apart from the order above; (B, Nv + Nt), or with M-RoPE (B, Nv + Nt, 3)
    rotary = np.concatenate(rotary_ids(t_pos, v_pos, v_img, v_rope, past)[::-1], axis=1)
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
                text_rotary=rotary[:, nv:], joint_rotary=rotary[rows, order])

    # Rotary tables and masks are made on the device, once a forward; all layers of a kind share them
    text_rope = rope_table(on.text_rotary, c, dtype)
    joint_rope = rope_table(on.joint_rotary, c, dtype) if nv else text_rope
    text_len, joint_len = int(past.text.max()) + nt, int((past.text + past.vision).max()) + nv + nt
    text_mask = joint_mask = None  # the first tokens: is_causal says it all
    if past.text.any() or past.vision.any():
        text_mask = causal_mask(on.text_slot, text_len, dtype)
        joint_mask = causal_mask(on.joint_slot, joint_len, dtype)
    text = AttentionInputs((on.rows, on.text_slot), text_len, text_mask, text_rope, text_rope)
    joint = AttentionInputs((on.rows, on.joint_slot), joint_len, joint_mask, joint_rope, joint_rope)
    queries = joint
    if nv:  # text alone gives queries where V^(l) is not needed: the mask says where each stands among the keys
        queries = joint._replace(mask=causal_mask(on.query_slot, joint_len, dtype), rope_q=text_rope)
    cross = None
    if all_v_pos.shape[1]:  # images now, or earlier
        mask, has_image = (None, None) if all_visible else vision_mask(on.t_pos, on.all_v_pos, dtype)
        cross = CrossAttentionInputs((on.rows, on.vision_slot), all_v_pos.shape[1], mask, has_image,
                                     on.padded_index if gaps else None, gaps)
    return TokenLayout(nv, on.interleave_index, on.inverse_index, text, joint, queries, cross)


def causal_mask(slot, length, dtype):
    """slot (B, Nq), cache positions of queries -> (B, 1, Nq, length): a token attends to its own and those before."""
    return additive(torch.arange(length, device=slot.device) <= slot[:, None, :, None], dtype)


def vision_mask(pos, all_v_pos, dtype):
    """pos (B, Nq) of text tokens, all_v_pos (B, Nk) of visual tokens -> mask (B, 1, Nq, Nk), has_image (B, Nq, 1).

    A text token attends to the visual tokens before it; where there is none the mask allows all, as a row without any
    key has no softmax, and has_image says that the result does not count."""
    before = all_v_pos[:, None] < pos[..., None]          # (B, Nq, Nk); padding has the largest positions
    has_image = before.any(-1, keepdim=True)
    return additive((before | ~has_image)[:, None], dtype), has_image


def additive(allowed, dtype):
    """A mask to add to scores; one of booleans, attention would turn into this anew in each layer. Its rows begin at
    multiples of 64 numbers, as CUDA's kernels ask."""
    n = allowed.shape[-1]
    mask = torch.zeros(*allowed.shape[:-1], round_up(n, 64), dtype=dtype, device=allowed.device)[..., :n]
    return mask.masked_fill_(~allowed, float("-inf"))


def compute_dtype(x):
    """The dtype of the products of a tensor like x: autocast's, where it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def upload(device, **arrays):
    """numpy arrays of whole numbers -> a namespace of int64 tensors on the device, in one copy without a wait."""
    flat = torch.from_numpy(np.concatenate([x.ravel() for x in arrays.values()]).astype(np.int64, copy=False))
    if device.type == "cuda":
        flat = flat.pin_memory()
    views = flat.to(device, non_blocking=True).split([x.size for x in arrays.values()])
    return SimpleNamespace(**{name: view.view(x.shape) for (name, x), view in zip(arrays.items(), views)})


class DecodeLayout:
    """TokenLayouts of one new text token a sample, step after step: made once a generation, advanced on the device.

    A step's tensors stay where they are, and keys are attended to over a fixed length with a mask, so that every step
    is the same graph on the same memory.
    """

    def __init__(self, past, pos, steps, c, device, dtype=torch.float32):
        """past: Past on the host; pos (B,) position of the first new token; steps: how many may follow."""
        text_len = round_up(int(past.text.max()) + steps)
        self.lengths = text_len, text_len + int(past.vision.max())  # of layers on text alone, and on both streams
        on = upload(device, rows=np.arange(len(pos))[:, None], number=np.array([-1]), text_slot=past.text[:, None] - 1,
                    joint_slot=(past.text + past.vision)[:, None] - 1, v_pos=past.v_pos, pos=pos[:, None],
                    all_pos=pos - past.behind + np.arange(steps)[:, None])  # -1: each step begins by going on
        # Of all steps: (steps, 2, B, 1, 1, D); the step's own are looked up
        self.ropes = torch.stack(rope_table(on.all_pos, c, dtype), dim=1)[..., None, :]
        self.number = on.number.clone()                                                          # (1,)
        self.slots = on.text_slot.clone(), on.joint_slot.clone()                                 # (B, 1) each
        self.masks = [causal_mask(slot, n, dtype)                                                # (B, 1, 1, n) each
                      for slot, n in zip(self.slots, self.lengths)]
        self.inputs = [((on.rows, slot), mask.shape[-1], mask) for slot, mask in zip(self.slots, self.masks)]
        self.cross = None
        if past.vision.any():  # every image stands before the new token: a mask only for unequally many visual tokens
            uneven = past.vision.min() < past.vision.max()
            mask, has_image = vision_mask(on.pos, on.v_pos, dtype) if uneven else (None, None)
            self.cross = CrossAttentionInputs(None, on.v_pos.shape[1], mask, has_image, None, 0)

    def step(self):
        """Goes on to the next token; its TokenLayout."""
        self.number += 1
        for slot, mask in zip(self.slots, self.masks):
            slot += 1
            mask.scatter_(-1, slot[:, None, None], 0.0)              # seen by itself and by all that comes after it
        rope = self.ropes.index_select(0, self.number)[0].unbind(0)  # (B, 1, 1, D) each
        text, joint = (AttentionInputs(*inputs, rope, rope) for inputs in self.inputs)
        return TokenLayout(0, None, None, text, joint, joint, self.cross)


def make_routing_layout(t_pos, v_pos, v_img, v_rope, past, starts, c, device, dtype=torch.float32):
    """The TokenLayout of routing tokens: the k-th of sample b attends to itself and all before position starts[b, k].

    t_pos, v_pos, v_img, v_rope: the newest tokens, as in make_layout, which the cache holds besides `past`; starts
    (B, K). The routing tokens' own keys are stored behind all others, where the next tokens overwrite them: no other
    token attends to them.
    """
    text_before = past.text[:, None] + (t_pos[:, None] < starts[..., None]).sum(-1)                    # (B, K)
    joint_before = text_before + past.vision[:, None] + (v_pos[:, None] < starts[..., None]).sum(-1)
    text_end = int(past.text.max()) + t_pos.shape[1]
    joint_end = int((past.text + past.vision).max()) + t_pos.shape[1] + v_pos.shape[1]
    on = upload(device, rows=np.arange(len(starts))[:, None], text_before=text_before, joint_before=joint_before,
                pos=starts, all_v_pos=past.all_v_pos(v_pos), k=np.arange(starts.shape[1])[None],
                rotary=rotary_ids(starts, v_pos, v_img, v_rope, past)[0])
    rope = rope_table(on.rotary, c, dtype)

    def inputs(before, end):
        slots = torch.arange(end + starts.shape[1], device=device)       # all cache positions
        mask = (slots < before[..., None]) | (slots == end + on.k[..., None])  # (B, K, end + K)
        return AttentionInputs((on.rows, end + on.k), len(slots), additive(mask[:, None], dtype), rope, rope)
    joint, cross = inputs(on.joint_before, joint_end), None
    if on.all_v_pos.shape[1]:
        cross = CrossAttentionInputs(None, on.all_v_pos.shape[1], *vision_mask(on.pos, on.all_v_pos, dtype), None, 0)
    return TokenLayout(0, None, None, inputs(on.text_before, text_end), joint, joint, cross)
