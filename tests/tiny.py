"""Small models and images for the tests."""
import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from config import Config
from model import VLM


BACKBONES = {  # other encoders than SigLIP: changes of the config
    "fastvlm": dict(encoder="fastvithd", vision_hidden=128, vision_layers=44, vision_heads=1, vision_ffn=256, tile=192,
                    patch=64, aspect="pad", multi_image_newline=False),
    "fastvithd, anyres": dict(encoder="fastvithd", vision_hidden=128, vision_layers=44, vision_heads=1, vision_ffn=256,
                              tile=128, patch=64, pinpoints=((1, 2), (2, 1), (2, 2))),
    "qwen2-vl": dict(encoder="qwen2_vl", aspect="dynamic", multi_image_newline=False, vision_hidden=32, vision_heads=2,
                     vision_ffn=64, patch=14, mrope=(2, 3, 3), min_pixels=2 * 28 ** 2, max_pixels=14 * 28 ** 2,
                     vocab=261)}
MARKS = "<|vision_start|>", "<|vision_end|>"  # of Qwen2-VL


def tokenizer(more=()):
    """Bytes as tokens, and Qwen2's three special ones: 259 in all; then more special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
                                                                       *more)])
    return t


def config(**changes):
    """A model of 0.5 M parameters whose tiles are 4 x 4 patches."""
    return Config(**{**dict(hidden=64, layers=6, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=259, rope_theta=1e4,
                            tied=False, vision_hidden=48, vision_layers=2, vision_heads=3, vision_ffn=96, tile=32,
                            patch=8), **changes})


def model(seed=0, visor=True, **changes):
    """A model with weights large enough that every part matters to the logits, cross-attention included."""
    torch.manual_seed(seed)
    m = VLM(config(**changes))
    m.tokenizer = tokenizer(MARKS if m.config.encoder == "qwen2_vl" else ())
    if visor:
        m.add_cross_attention()
    return shake(m).eval()


@torch.no_grad()
def shake(m, scale=1.0):
    """Random weights at the scale of trained ones: products keep their size, no bias is zero, no norm is one."""
    for name, p in m.named_parameters():
        if p.ndim < 2:
            p.add_(torch.randn_like(p) * 0.2 * scale)
        elif "embed" in name and "patch" not in name:
            p.normal_(0, scale)
        else:
            p.normal_(0, scale * (p[0].numel()) ** -0.5)
        if name.endswith("gamma"):   # of a branch: 44 of them add up
            p.mul_(0.2)
    for name, statistic in m.named_buffers():
        if "running" in name:        # of FastViTHD's norms
            statistic.add_(torch.rand_like(statistic))
    return m


def image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
