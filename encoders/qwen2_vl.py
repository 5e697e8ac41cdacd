"""Qwen2-VL's vision encoder (Wang et al. 2024): a ViT over one whole picture of any size, not over tiles.

Every patch of a picture attends to every other; where it stands, rotary positions of its row and its column say, so
that there is no table of positions to outgrow. Four neighbouring patches leave as one token. Hugging Face's module
names, but for the LayerNorm of the merger, whose MLP is the connector in model.py.

Inside, patches are in block order: those of a 2 x 2 square follow each other row by row, and the squares too.

Letters: P pictures of one size, N patches of each; H heads, D features of a head, c features.
"""
import torch
import torch.nn.functional as F
from torch import nn

from layers import attention, rotate

MERGE = 2       # patches along a side of a token's square
THETA = 10_000  # of the rotary positions


def to_patches(x, patch):
    """Pixels (P, 3, height, width) -> (P, N, 3 * patch * patch), in block order."""
    x = x.unflatten(3, (-1, MERGE, patch)).unflatten(2, (-1, MERGE, patch))  # (P, 3, Y, dy, patch, X, dx, patch)
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(5).flatten(1, 4)        # from (P, Y, X, dy, dx, 3, patch, patch)


def rope_table_2d(rows, columns, size, device=None):
    """cos and sin of a picture of rows x columns patches, for heads of `size` features: (N, 1, size) each, float32.

    The first half of the frequencies turns by the row, the second by the column. Signs as in layout.rope_table."""
    freq = 1 / THETA ** (torch.arange(0, size // 2, 2, device=device).float() / (size // 2))  # (size / 4,)
    y, x = (torch.arange(n, device=device).float() for n in (rows, columns))
    place = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)                  # (rows, columns, 2)
    place = place.unflatten(1, (-1, MERGE)).unflatten(0, (-1, MERGE))             # (Y, dy, X, dx, 2)
    place = place.transpose(1, 2).flatten(0, 3)                                   # (N, 2), in block order
    angle = (place[..., None] * freq).flatten(1)[:, None]                         # (N, 1, size / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class VisionAttention(nn.Module):
    """No mask. One product for queries, keys and values."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vision_heads
        self.qkv = nn.Linear(c.vision_hidden, 3 * c.vision_hidden)
        self.proj = nn.Linear(c.vision_hidden, c.vision_hidden)

    def forward(self, x, *rope):
        """x (P, N, c), rope: (cos, sin) of the patches -> the same, and its queries and keys (P, N, H, D), turned."""
        qk, v = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).split((2 * self.heads, self.heads), -2)
        qk = rotate(qk.float(), 2 * self.heads, rope).to(v.dtype)  # in float32, in bfloat16 too: (P, N, 2 * H, D)
        q, k = qk.chunk(2, -2)
        return self.proj(attention(q, k, v)), q, k


class VisionMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.vision_hidden, c.vision_ffn)
        self.fc2 = nn.Linear(c.vision_ffn, c.vision_hidden)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # the quick GELU


class VisionBlock(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.vision_hidden, c.vision_eps)
        self.attn = VisionAttention(c)
        self.norm2 = nn.LayerNorm(c.vision_hidden, c.vision_eps)
        self.mlp = VisionMLP(c)

    def forward(self, x, *rope):
        """As VisionAttention.forward."""
        y, q, k = self.attn(self.norm1(x), *rope)
        x = x + y
        return x + self.mlp(self.norm2(x)), q, k


class VisionTower(nn.Module):
    """Pictures of one size -> a feature for each 2 x 2 patches."""

    def __init__(self, c):
        super().__init__()
        self.patch, self.head_dim = c.patch, c.vision_hidden // c.vision_heads
        kernel = 2, c.patch, c.patch  # a film's frames are taken in twos
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c.vision_hidden, kernel, kernel, bias=False)})
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_layers))
        self.merger_norm = nn.LayerNorm(c.vision_hidden, c.vision_eps)

    def forward(self, x, looks=()):
        """x (P, 3, height, width), sides multiples of 28 -> (P, height / 28 * width / 28, 4 * vision_hidden), the
        tokens row by row. looks: as in siglip.VisionTower.forward, in block order."""
        size = [side // self.patch for side in x.shape[2:]]           # rows, columns of patches
        rope = rope_table_2d(*size, self.head_dim, x.device)          # once a forward, for all layers
        kernel = self.patch_embed["proj"].weight.sum(2).flatten(1)    # a picture is a film of two equal frames
        x = F.linear(to_patches(x, self.patch), kernel)               # (P, N, vision_hidden)
        for l, block in enumerate(self.blocks):
            x, *qk = block(x, *rope)
            if l in looks:
                looks[l] = qk
        x = self.merger_norm(x)
        return x.unflatten(1, (-1, MERGE * MERGE)).flatten(2)         # the four of a square follow each other
