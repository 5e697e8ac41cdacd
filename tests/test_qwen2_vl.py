"""Qwen2-VL equals transformers' own: the vision tower alone, and the whole model (random weights, float32)."""
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from encoders.qwen2_vl import VisionTower, rope_table_2d
from tests import tiny

# --- the tower ------------------------------------------------------------------------------------------------------

TOWERS = {
    "1 layer, 1 head of 8": dict(depth=1, embed_dim=8, num_heads=1, mlp_ratio=4),
    "2 layers, 3 heads of 16": dict(depth=2, embed_dim=48, num_heads=3, mlp_ratio=4),
    "4 layers, 2 heads of 20": dict(depth=4, embed_dim=40, num_heads=2, mlp_ratio=3),  # 20 / 4 is odd
}
HEIGHTS_WIDTHS = [(28, 28), (28, 140), (84, 28), (56, 112), (196, 140)]


@pytest.fixture(scope="module", params=TOWERS, ids=list(TOWERS))
def towers(request):
    """(theirs, ours) with the same random weights."""
    torch.manual_seed(0)
    theirs = tiny.shake(Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(
        hidden_size=24, **TOWERS[request.param]))).eval()
    c = theirs.config
    ours = VisionTower(SimpleNamespace(
        vision_hidden=c.embed_dim, vision_layers=c.depth, vision_heads=c.num_heads,
        vision_ffn=c.embed_dim * c.mlp_ratio, vision_eps=1e-6, patch=14))
    weights = {k.replace("merger.ln_q", "merger_norm"): v for k, v in theirs.state_dict().items() if "mlp." not in k
               or k.startswith("blocks")}
    ours.load_state_dict(weights)  # all other keys are the same
    return theirs, ours.eval()


def patchify(x):
    """Pixels (3, height, width) -> (N, 3 * 2 * 14 * 14): two equal frames, patches of 2 x 2 squares together."""
    rows = []
    for top in range(0, x.shape[1], 28):
        for left in range(0, x.shape[2], 28):
            for dy, dx in ((0, 0), (0, 14), (14, 0), (14, 14)):
                patch = x[:, top + dy:top + dy + 14, left + dx:left + dx + 14]
                rows.append(np.stack([patch, patch], axis=1).ravel())
    return np.stack(rows)


def sent(pixels):
    """Pixels (P, 3, height, width) as transformers' tower takes them."""
    grid = [[1, x.shape[1] // 14, x.shape[2] // 14] for x in pixels]
    return torch.from_numpy(np.concatenate([patchify(x) for x in pixels.numpy()])), torch.tensor(grid)


def before_connector(theirs, pixels):
    """What their merger's MLP is given, (P, tokens, 4 * embed_dim)."""
    found = []
    hook = theirs.merger.mlp.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    patches, grid = sent(pixels)
    theirs(patches.to(theirs.dtype), grid)
    hook.remove()
    return found[0].unflatten(0, (len(pixels), -1))


def noise(pictures, height, width):
    """Pixels of scale 1."""
    return torch.randn(pictures, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@torch.no_grad()
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("size", HEIGHTS_WIDTHS, ids=lambda s: f"{s[0]}x{s[1]}")
def test_tower_is_that_of_transformers(towers, size, pictures):
    theirs, ours = towers
    x = noise(pictures, *size)
    wanted, found = before_connector(theirs, x), ours(x)
    assert found.shape == (pictures, size[0] * size[1] // 28 ** 2, 4 * theirs.config.embed_dim) == wanted.shape
    assert 0.8 < wanted.std() < 1.5  # or the tolerance would mean nothing
    assert (found - wanted).abs().max() < 1e-5


def test_rotary_angles():
    """Every cosine and sine, in float64: head size 80 at 1260 x 2016 pixels, and small ones."""
    for rows, columns, size in ((2, 2, 4), (2, 6, 8), (8, 4, 20), (90, 144, 80)):
        half, wanted = size // 2, []
        for top in range(0, rows, 2):
            for left in range(0, columns, 2):
                for y, x in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
                    wanted.append([place * 10000.0 ** (-2 * i / half) for place in (y, x) for i in range(half // 2)])
        wanted = np.array(wanted)
        cos, sin = (t[:, 0].double().numpy() for t in rope_table_2d(rows, columns, size))
        assert cos.shape == sin.shape == (rows * columns, size)
        assert np.abs(cos - np.cos(np.concatenate([wanted, wanted], 1))).max() < 2e-5
        assert np.abs(sin - np.sin(np.concatenate([-wanted, wanted], 1))).max() < 2e-5
    assert rope_table_2d(2, 2, 8)[0].dtype == torch.float32


@torch.no_grad()
def test_looks_are_the_queries_and_keys_of_each_picture(towers, monkeypatch):
    theirs, ours = towers
    seen, x = [], noise(2, 56, 84)

    def spy(module, q, k, v, **how):
        seen.append((q[0].transpose(0, 1), k[0].transpose(0, 1)))  # (N, H, D) each
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2), None
    AttentionInterface.register("spy", spy)
    monkeypatch.setattr(theirs.config, "_attn_implementation", "spy")
    theirs(*sent(x))
    looks = dict.fromkeys({0, theirs.config.depth - 1})
    plain = ours(x)
    assert torch.equal(ours(x, looks), plain)
    for layer, (q, k) in looks.items():
        for picture in range(2):
            wanted_q, wanted_k = seen[2 * layer + picture]  # theirs attend picture by picture
            assert (q[picture] - wanted_q).abs().max() < 1e-5 and (k[picture] - wanted_k).abs().max() < 1e-5


def test_tower_learns_as_theirs_does(towers):
    """Gradients of all weights, the two frames of the kernel among them; the output is that without gradients."""
    theirs, ours = towers
    x = noise(2, 56, 84)
    with torch.no_grad():
        plain = ours(x)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
    for net, y in ((ours, ours(x)), (theirs, before_connector(theirs, x))):
        net.zero_grad()
        (y * weight).sum().backward()
        assert torch.allclose(y, plain, atol=1e-5)
    for name, p in theirs.named_parameters():
        if not name.startswith("merger.mlp"):
            mine = ours.get_parameter(name.replace("merger.ln_q", "merger_norm")).grad
            assert (mine - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name
    for net in towers:
        net.zero_grad()


@torch.no_grad()
def test_tower_in_bfloat16(towers):
    ours, x = towers[1], noise(2, 84, 56)
    exact = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(x).float()
    theirs, ours = (copy.deepcopy(net).bfloat16() for net in towers)
    wanted, found = before_connector(theirs, x), ours(x.bfloat16())
    assert wanted.dtype == found.dtype == torch.bfloat16
    rounding = (wanted - exact).norm()
    assert 0 < rounding < 0.05 * exact.norm()
    assert (found - exact).norm() < 1.3 * rounding and (mixed - exact).norm() < 1.3 * rounding


@torch.no_grad()
def test_rotary_positions_are_not_rounded_to_bfloat16(towers):
    ours, made, looks = copy.deepcopy(towers[1]).bfloat16(), [], {0: None}
    ours.blocks[0].attn.qkv.register_forward_hook(lambda module, inputs, y: made.append(y.clone()))
    ours(noise(1, 56, 84).bfloat16(), looks)
    cos, sin = (t.double() for t in rope_table_2d(4, 6, ours.head_dim))
    for x, found in zip(made[0].double().chunk(3, -1), looks[0]):
        x = x.unflatten(-1, (-1, ours.head_dim))
        exact = x * cos + x.roll(ours.head_dim // 2, -1) * sin
        assert ((found.double() - exact).abs() <= 2.0 ** -8 * exact.abs() + 1e-6).all()  # rounded once, at the end
