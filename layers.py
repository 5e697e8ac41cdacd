"""The parts: attention, rotary positions, Qwen2's block, VISOR's cross-attention, the policy.

A reader of the paper finds here what one layer does (CrossAttn of Eq. 2, TL_l of Eq. 1 to 3, the policy of 4.3);
model.py says which layers run, layout.py where their tokens stand. Qwen2's modules have Hugging Face's names, but for
products of one input, which are one matrix here: qkv_proj and gate_up_proj. All attention goes through
F.scaled_dot_product_attention.

Letters: B batch, N tokens (Nt text, Nv vision, Nq queries, Nk keys), d features, H query heads, Hkv key/value heads,
D features of a head.
"""
import torch
import torch.nn.functional as F
from torch import nn

from layout import compute_dtype, gather_rows


def attention(q, k, v, mask=None, causal=False):
    """Softmax attention with grouped key/value heads: H / Hkv query heads share one of them.

    q (B, Nq, H, D), k and v (B, Nk, Hkv, D), mask (B, 1, Nq, Nk) is added to the scores. Returns (B, Nq, H * D).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, D)
    mask = None if mask is None else mask.to(q.dtype)                  # no copy but under FSDP's mixed precision
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


# --- Qwen2 ----------------------------------------------------------------------------------------------------------

def is_matrix_vector(x, w):
    """Whether x (..., in) is one row that torch.mv takes faster than F.linear: on an Intel with AMX, 2 threads, over
    4,864 x 896 in 0.38 ms instead of 0.75; without AMX there is no difference."""
    return (x.numel() == x.shape[-1] and x.dtype == w.dtype == torch.bfloat16 and x.device.type == "cpu"
            and not torch.is_grad_enabled())


def linear(x, w, bias=None):
    """x (..., in) @ w.T + bias -> (..., out)."""
    if is_matrix_vector(x, w):
        y = torch.mv(w, x.flatten()).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, w, bias)


class Linear(nn.Linear):
    """A product in which no token meets another. `add` goes on top, in one operation where dtypes allow it."""

    def forward(self, x, add=None):
        """x (..., in) -> (..., out); add (..., out)."""
        w = self.weight
        if add is None:
            return linear(x, w, self.bias)
        if self.bias is None and add.dtype == compute_dtype(x) == x.dtype == w.dtype and not is_matrix_vector(x, w):
            return torch.addmm(add.flatten(0, -2), x.flatten(0, -2), w.T).view(add.shape)
        return add + linear(x, w, self.bias)  # under autocast `add` keeps its dtype


class RMSNorm(nn.Module):
    """x / sqrt(mean(x ** 2) + eps) * weight, over the last axis, in float32 inside."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.size, self.eps = nn.Parameter(torch.ones(size)), size, eps
        self.eps_tensor = torch.tensor(eps, device="cpu")

    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
            return F.rms_norm(x, (self.size,), self.weight, self.eps)  # one kernel on CUDA; on a CPU six, and copies
        if x.dtype == torch.float32 or x.numel() <= 512 * self.size:
            return self.scaled(x)
        # Their float32 stays in the processor's cache: at 3,699 x 896 in bfloat16 half the time
        return torch.cat([self.scaled(part) for part in x.flatten(0, -2).split(512)]).view(x.shape)

    def scaled(self, x):
        """By the length of each token's features, which is one pass over them; F.rms_norm makes squares first."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # (..., 1)
        mean = torch.addcmul(self.eps_tensor, length, length, value=1 / self.size)
        return (x * mean.rsqrt()).mul_(self.weight).to(x.dtype)


def rotate(x, n, rope):
    """x (..., heads, D) with its first n heads at their rotary positions, rotate-half convention: features i and
    i + D / 2 form a pair. rope: of layout.rope_table, whose sines have the sign in them."""
    cos, sin = (r.to(x.dtype) for r in rope)  # a copy under FSDP's mixed precision alone
    head, tail = x[..., :n, :], x[..., n:, :]
    in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    turned = torch.addcmul(head * cos, head.roll(x.shape[-1] // 2, -1), sin, out=head if in_place else None)
    return x if in_place else torch.cat([turned, tail], dim=-2)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads and rotary positions, in three steps: `project`, `attend`, and
    o_proj. The first and the last take each token alone."""

    def __init__(self, c):
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = c.head_dim, c.heads, c.kv_heads
        # Qwen2 has biases here, and none in o_proj. Fewer keys and values than queries: the cache is smaller
        self.qkv_proj = Linear(c.hidden, (c.heads + 2 * c.kv_heads) * c.head_dim)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.observer = None  # called with (q, k, mask) each time: see explain.observed

    def project(self, x, *rope):
        """x (..., d), rope: (cos, sin) of its positions -> q (..., H, D), kv (..., 2 * Hkv, D): keys, then values."""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))              # (..., H + 2 Hkv, D)
        return rotate(qkv, self.heads + self.kv_heads, rope).split((self.heads, 2 * self.kv_heads), dim=-2)

    def project_apart(self, x, context, rope_q, rope_k):
        """The same where x (B, Nq, d) gives the queries alone, and context (B, Nk, d) the keys and values."""
        rows, shape = [h * self.head_dim for h in (self.heads, 2 * self.kv_heads)], (-1, self.head_dim)
        (wq, wkv), (bq, bkv) = self.qkv_proj.weight.split(rows), self.qkv_proj.bias.split(rows)
        q, kv = F.linear(x, wq, bq).unflatten(-1, shape), F.linear(context, wkv, bkv).unflatten(-1, shape)
        return rotate(q, self.heads, rope_q), rotate(kv, self.kv_heads, rope_k)

    def weights(self, x, rows, rope):
        """What some tokens of one sequence attend to, mean over heads, in float32: x (N, d), rows (n,), rope: (cos,
        sin) of all N -> (n, N)."""
        sizes = [h * self.head_dim for h in (self.heads, self.kv_heads, self.kv_heads)]
        (wq, wk, _), (bq, bk, _) = self.qkv_proj.weight.split(sizes), self.qkv_proj.bias.split(sizes)
        q, k = (F.linear(a, w, b).unflatten(-1, (-1, self.head_dim)) for a, w, b in ((x[rows], wq, bq), (x, wk, bk)))
        q, k = rotate(q, self.heads, [r[rows] for r in rope]), rotate(k, self.kv_heads, rope)   # (n | N, heads, D)
        q = q.unflatten(1, (self.kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)               # (Hkv, group * n, D)
        scores = (q @ k.permute(1, 2, 0)).float() * self.head_dim ** -0.5                       # (Hkv, group * n, N)
        later = torch.arange(len(x), device=x.device) > rows[:, None]                           # (n, N)
        scores = scores.unflatten(1, (-1, len(rows))).masked_fill(later, float("-inf"))
        return scores.softmax(-1).mean((0, 1))

    def attend(self, q, kv, at, cache=None):
        """q, kv of the new tokens, at: AttentionInputs, cache: KV of what came before. Returns (B, Nq, H * D)."""
        if cache is not None:
            kv = cache.update(kv, at.cache_index, at.kv_len)        # with all that came before
        k, v = kv.chunk(2, dim=2)                                   # (B, Nk, Hkv, D) each
        if self.observer:
            self.observer(q, k, at.mask)
        return attention(q, k, v, at.mask, causal=at.mask is None and q.shape[1] > 1)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.gate_up_proj = Linear(c.hidden, 2 * c.ffn, bias=False)
        self.down_proj = Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x, add=None):
        """x (..., d), inside (..., ffn); add (..., d) goes on top."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up, add)


class Block(nn.Module):
    """The paper's transformer layer TL_l (Eq. 1): self-attention, then the MLP, each with its residual."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.rms_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.rms_eps)
        self.mlp = MLP(c)

    def forward(self, x, at, cache=None, context=None):
        """x (B, Nq, d) is updated; context (B, Nk, d): the tokens it attends to, where they are more than x itself."""
        if context is None:
            q, kv = self.before_attention(x, *at.rope_q)
        else:                                   # V of a layer that does not update it
            q, kv = self.self_attn.project_apart(self.input_layernorm(x), self.input_layernorm(context),
                                                 at.rope_q, at.rope_k)
        return self.after_attention(x, self.self_attn.attend(q, kv, at, cache))

    # In these two no token meets another, and there is neither cache nor mask; they are what VLM.compile compiles

    def before_attention(self, x, *rope):
        return self.self_attn.project(self.input_layernorm(x), *rope)           # pre-norm

    def after_attention(self, x, y):
        x = self.self_attn.o_proj(y, x)
        return self.mlp(self.post_attention_layernorm(x), x)


# --- VISOR ----------------------------------------------------------------------------------------------------------

class CrossAttention(nn.Module):
    """T + CrossAttn(T, V) of Eq. 2: text queries attend to vision keys and values (paper 4.2.1).

    The vision stream is not updated. There are no rotary positions; where a visual token stands is encoded by the
    conditional position encoding `cpe`, a depthwise convolution along the sequence (kernel 7, padding 3) added to v.
    """

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_norm = RMSNorm(c.hidden, c.rms_eps)   # of t; the paper names no norms, nor heads: as in the LLM
        self.kv_norm = RMSNorm(c.hidden, c.rms_eps)  # of v + cpe(v)
        self.cpe = nn.Conv1d(c.hidden, c.hidden, 7, padding=3, groups=c.hidden)
        self.q_proj = Linear(c.hidden, c.heads * c.head_dim)
        self.kv_proj = Linear(c.hidden, 2 * c.kv_heads * c.head_dim)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.observer = None  # as in Attention

    @torch.no_grad()
    def start_from(self, block):
        """q, k, v and both norms start as copies of the layer's own self-attention; what is left starts at zero, so
        that a new cross-attention changes nothing."""
        theirs, wide = block.self_attn.qkv_proj, self.q_proj.out_features
        for own, rows in ((self.q_proj, slice(wide)), (self.kv_proj, slice(wide, None))):
            own.weight.copy_(theirs.weight[rows])
            own.bias.copy_(theirs.bias[rows])
        for norm in (self.q_norm, self.kv_norm):
            norm.load_state_dict(block.input_layernorm.state_dict())
        for weight in (self.cpe.weight, self.cpe.bias, self.o_proj.weight):
            weight.zero_()

    def forward(self, t, v, at, cache=None):
        """t (B, Nt, d) attends to vision and is updated (Eq. 2); v (B, Nv, d): the new visual tokens; at:
        CrossAttentionInputs."""
        q = self.queries(t)                                                   # (B, Nt, H, D)
        if v.shape[1]:
            kv = self.keys_values(v, self.positional_encoding(v, at))         # (B, Nv, 2 Hkv, D)
            if cache is not None:
                kv = cache.update(kv, at.cache_index, at.kv_len)
        else:                                     # a later question: the images' keys and values are in the cache
            kv = cache.kv[:, :at.kv_len]
        k, v = kv.chunk(2, dim=2)                 # (B, Nk, Hkv, D) each
        if self.observer:
            self.observer(q, k, at.mask)
        y = attention(q, k, v, at.mask)           # (B, Nt, H * D); a text token before every image gets zero
        return self.o_proj(y if at.has_image is None else y * at.has_image.to(y.dtype), t)

    def queries(self, t):
        """t (..., d) -> (..., H, D)."""
        return self.q_proj(self.q_norm(t)).unflatten(-1, (-1, self.head_dim))

    def keys_values(self, v, positions):
        """v (..., d) and its positional encoding -> (..., 2 * Hkv, D)."""
        return self.kv_proj(self.kv_norm(v + positions)).unflatten(-1, (-1, self.head_dim))

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
        widened = 4 if c.reduction.option == "widen" else 1  # sub-tokens
        self.linear_1 = nn.Linear(c.features * widened, c.connector_hidden)
        self.linear_2 = nn.Linear(c.connector_hidden, c.hidden)

    def forward(self, x):  # (..., features) -> (..., d)
        return self.linear_2(F.gelu(self.linear_1(x)))  # the exact GELU here, the tanh one inside SigLIP


class Scores(nn.Module):
    """A routing token, one learned embedding that is put after the question, and the MLP that reads it once it has
    passed some layers: a score for each choice."""

    def __init__(self, c, choices):
        super().__init__()
        self.token = nn.Parameter(torch.randn(c.hidden))   # scaled by VLM.add_router
        self.norm = RMSNorm(c.hidden, c.rms_eps)
        self.up = nn.Linear(c.hidden, c.hidden)
        self.down = nn.Linear(c.hidden, choices)

    def forward(self, z):
        """z (..., d), routing tokens as they enter a layer -> scores (..., choices)."""
        return self.down(F.gelu(self.up(self.norm(z))))


class Policy(nn.Module):
    """What a question needs (paper 4.3). `layers`, behind the layers that all viable configurations share, scores them;
    `pixels`, where the model is trained for the overview, says behind the first look at it whether that will do."""

    def __init__(self, c):
        super().__init__()
        self.layers = Scores(c, len(c.viable))
        self.pixels = Scores(c, 1) if c.overview else None
