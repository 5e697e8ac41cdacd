"""SigLIP, the vision encoder of LLaVA-OneVision: a plain ViT over tiles of fixed size, which do not see each other.

Used up to its last layer but one, without the final norm, as LLaVA-OneVision does. Hugging Face's module names.
"""
import torch.nn.functional as F
from torch import nn

from layers import attention


class SiglipAttention(nn.Module):
    """Every patch of a tile attends to every other; no mask, no rotary positions."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.vision_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(c.vision_hidden, c.vision_hidden))

    def forward(self, x):
        """x (tiles, N, c) -> the same, and its queries and keys (tiles, N, H, D)."""
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v)), q, k


class SiglipMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.vision_hidden, c.vision_ffn)
        self.fc2 = nn.Linear(c.vision_ffn, c.vision_hidden)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipBlock(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, c):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(c.vision_hidden, c.vision_eps)
        self.self_attn = SiglipAttention(c)
        self.layer_norm2 = nn.LayerNorm(c.vision_hidden, c.vision_eps)
        self.mlp = SiglipMLP(c)

    def forward(self, x):
        """As SiglipAttention.forward."""
        y, q, k = self.self_attn(self.layer_norm1(x))
        x = x + y
        return x + self.mlp(self.layer_norm2(x)), q, k


class VisionTower(nn.Module):
    """Tiles -> features of their patches."""

    def __init__(self, c):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Conv2d(3, c.vision_hidden, c.patch, c.patch),
            "position_embedding": nn.Embedding(c.patches ** 2, c.vision_hidden)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(SiglipBlock(c) for _ in range(c.vision_layers))})

    @property
    def blocks(self):
        return list(self.encoder["layers"])

    def forward(self, x, looks=()):
        """x (tiles, 3, tile, tile) in [-1, 1] -> (tiles, patches * patches, vision_hidden). looks: a dict that gains
        the queries and keys of the layers that it names, for a reduction."""
        x = self.embeddings["patch_embedding"](x).flatten(2).transpose(1, 2)  # 384 // 14 = 27: the last pixels are cut
        x = x + self.embeddings["position_embedding"].weight
        for l, block in enumerate(self.encoder["layers"]):
            x, *qk = block(x)
            if l in looks:
                looks[l] = qk
        return x
