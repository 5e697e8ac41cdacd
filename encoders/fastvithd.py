"""FastViTHD, the vision encoder of FastVLM (Vasu et al. 2024): convolutions at high resolution, attention at low.

A picture goes in whole. The stem halves its sides twice, and four of the five stages once, so a token stands for 64 x
64 pixels: 256 of them for 1024 x 1024, where patches of 14 would be 5,329. The convolutions are in merged inference
form: where training had several branches, batch norms and a skip, there is the one convolution that they add up to
(reparam_conv). timm's module names, which Hugging Face's files of FastVLM have, too.

Letters: P pictures, d features, H and W sides of the map of features, N = H * W tokens.
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from layers import attention

DEPTHS = 2, 12, 24, 4, 2  # blocks of each stage
ATTENTION_FROM = 3        # the first stage whose blocks attend; those before it only convolve
HEAD_DIM = 32


def convolution(d_in, d_out, kernel, stride=1, groups=1, bias=True):
    """(P, d_in, H, W) -> (P, d_out, H / stride, W / stride). groups=d_in: each feature is convolved alone."""
    return nn.Conv2d(d_in, d_out, kernel, stride, kernel // 2, groups=groups, bias=bias)


class Merged(nn.Module):
    """The convolution that branches of training were merged into, and GELU."""

    def __init__(self, d_in, d_out, kernel, stride=1, groups=1, gelu=True):
        super().__init__()
        self.reparam_conv, self.gelu = convolution(d_in, d_out, kernel, stride, groups), gelu

    def forward(self, x):
        x = self.reparam_conv(x)
        return F.gelu(x) if self.gelu else x


class FixedBatchNorm(nn.Module):
    """Batch norm by the statistics in the file, in training too: pictures of a batch do not see each other."""

    def __init__(self, d):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.register_buffer("running_mean", torch.zeros(d))
        self.register_buffer("running_var", torch.ones(d))

    def forward(self, x):
        mean, var = (s.to(self.weight.dtype) for s in (self.running_mean, self.running_var))  # FSDP casts no buffers
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=1e-5)


class ConvMLP(nn.Module):
    """An MLP for each token, which first looks around it: 7 x 7."""

    def __init__(self, d):
        super().__init__()
        self.conv = nn.Sequential(OrderedDict(conv=convolution(d, d, 7, groups=d, bias=False), bn=FixedBatchNorm(d)))
        self.fc1, self.fc2 = convolution(d, 4 * d, 1), convolution(4 * d, d, 1)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(self.conv(x))))


class LayerScale(nn.Module):
    """How much of a branch is added, feature by feature. Starts near nothing."""

    def __init__(self, d):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((d, 1, 1), 1e-5))

    def forward(self, x):
        return x * self.gamma


class RepMixerBlock(nn.Module):
    """Tokens meet in a 3 x 3 convolution, whose kernel has the residual in it."""

    def __init__(self, d):
        super().__init__()
        self.token_mixer = Merged(d, d, 3, groups=d, gelu=False)
        self.mlp = ConvMLP(d)
        self.layer_scale = LayerScale(d)

    def forward(self, x):  # (P, d, H, W), as everywhere below
        x = self.token_mixer(x)
        return x + self.layer_scale(self.mlp(x))


class SelfAttention(nn.Module):
    """Every token of a picture attends to every other; no mask, no positions."""

    def __init__(self, d):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.proj = nn.Linear(d, d)

    def forward(self, x):  # (P, N, d)
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)  # (P, N, heads, 32) each
        return self.proj(attention(q, k, v))


class AttentionBlock(nn.Module):
    """Tokens meet in self-attention."""

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=1e-5)
        self.token_mixer = SelfAttention(d)
        self.layer_scale_1 = LayerScale(d)
        self.mlp = ConvMLP(d)
        self.layer_scale_2 = LayerScale(d)

    def forward(self, x):
        y = self.token_mixer(self.norm(x.flatten(2).transpose(1, 2)))    # (P, N, d)
        x = x + self.layer_scale_1(y.transpose(1, 2).reshape(x.shape))   # (P, d, H, W)
        return x + self.layer_scale_2(self.mlp(x))


class Downsample(nn.Module):
    """Half the sides, twice the features."""

    def __init__(self, d):
        super().__init__()
        self.proj = nn.Sequential(Merged(d, 2 * d, 7, stride=2, groups=d), Merged(2 * d, 2 * d, 1))

    def forward(self, x):
        return self.proj(x)


class Stage(nn.Module):
    def __init__(self, index, d):
        super().__init__()
        attends = index >= ATTENTION_FROM
        self.downsample = Downsample(d // 2) if index else nn.Identity()  # the first keeps the size that the stem made
        self.pos_emb = Merged(d, d, 7, groups=d, gelu=False) if attends else nn.Identity()  # with its skip in it
        self.blocks = nn.Sequential(*((AttentionBlock if attends else RepMixerBlock)(d) for _ in range(DEPTHS[index])))

    def forward(self, x):
        return self.blocks(self.pos_emb(self.downsample(x)))


class SqueezeExcite(nn.Module):
    """Every feature times a weight in (0, 1) that the mean of all tokens decides."""

    def __init__(self, d):
        super().__init__()
        self.fc1, self.fc2 = convolution(d, d // 16, 1), convolution(d // 16, d, 1)

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)                              # (P, d, 1, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(mean))))


class FinalConv(nn.Module):
    """Twice the features."""

    def __init__(self, d):
        super().__init__()
        self.reparam_conv = convolution(d, 2 * d, 3, groups=d)
        self.se = SqueezeExcite(2 * d)

    def forward(self, x):
        return F.gelu(self.se(self.reparam_conv(x)))


class VisionTower(nn.Module):
    """Pictures -> features of their tokens."""

    def __init__(self, c):
        """c.vision_hidden: features that come out, a multiple of 128; all other widths follow."""
        super().__init__()
        d = c.vision_hidden // 32                                        # 96 as published
        self.stem = nn.Sequential(Merged(3, d, 3, stride=2), Merged(d, d, 3, stride=2, groups=d), Merged(d, d, 1))
        self.stages = nn.ModuleList(Stage(s, d * 2 ** s) for s in range(len(DEPTHS)))
        self.final_conv = FinalConv(c.vision_hidden // 2)

    blocks = property(lambda self: [block for stage in self.stages for block in stage.blocks])  # those that repeat

    def forward(self, x, looks=()):
        """x (P, 3, S, S) in [0, 1], S a multiple of 64 -> (P, (S / 64) ** 2, vision_hidden), row by row. looks: as
        SigLIP's, for reductions that pick patches; there are none here."""
        x = self.stem(x)                                                 # (P, d, S / 4, S / 4)
        for stage in self.stages:
            x = stage(x)                                                 # in the end (P, 16 d, S / 64, S / 64)
        return self.final_conv(x).flatten(2).transpose(1, 2)
