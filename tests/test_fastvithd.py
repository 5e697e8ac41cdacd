"""FastViTHD equals timm's, at full size and with weights by a formula; its parts equal plain loops."""
import copy
import math
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from encoders import fastvithd
from encoders.fastvithd import DEPTHS, VisionTower
from tests import fastvithd_weights as formula
from tests import tiny

SMALL = SimpleNamespace(vision_hidden=128)  # widths 4, 8, 16, 32, 64; one head, then two

# Names in files -> our names: the first prefix that fits is replaced; None: left out on purpose
PREFIXES = (
    # Hugging Face
    ("model.vision_tower.timm_model.", "vision_tower."),
    # Apple
    ("model.vision_tower.vision_tower.model.patch_embed.", "vision_tower.stem."),
    ("model.vision_tower.vision_tower.model.network.0.", "vision_tower.stages.0.blocks."),
    ("model.vision_tower.vision_tower.model.network.1.", "vision_tower.stages.1.downsample."),
    ("model.vision_tower.vision_tower.model.network.2.", "vision_tower.stages.1.blocks."),
    ("model.vision_tower.vision_tower.model.network.3.", "vision_tower.stages.2.downsample."),
    ("model.vision_tower.vision_tower.model.network.4.", "vision_tower.stages.2.blocks."),
    ("model.vision_tower.vision_tower.model.network.5.", "vision_tower.stages.3.downsample."),
    ("model.vision_tower.vision_tower.model.network.6.", "vision_tower.stages.3.pos_emb."),
    ("model.vision_tower.vision_tower.model.network.7.", "vision_tower.stages.3.blocks."),
    ("model.vision_tower.vision_tower.model.network.8.", "vision_tower.stages.4.downsample."),
    ("model.vision_tower.vision_tower.model.network.9.", "vision_tower.stages.4.pos_emb."),
    ("model.vision_tower.vision_tower.model.network.10.", "vision_tower.stages.4.blocks."),
    ("model.vision_tower.vision_tower.model.conv_exp.", "vision_tower.final_conv."),
    ("model.vision_tower.vision_tower.model.head.", None),  # CLIP's
)
# Then, inside of names: all of Apple's
INFIXES = (
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.(layer_scale(_[12])?)$", r".\1.gamma"),
)
UNUSED = re.compile(r"vision_tower\..*\.num_batches_tracked$")


def our_name(key):
    for prefix, ours in PREFIXES:
        if key.startswith(prefix):
            key = ours and ours + key[len(prefix):]
            break
    if key is None or UNUSED.match(key):
        return None
    for pattern, ours in INFIXES:
        key = re.sub(pattern, ours, key)
    return key


def apple_shapes(d=96):
    """{name: shape} of the tower in Apple's files, written down from Apple's modules."""
    found = {}

    def conv(name, *shape):
        found.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

    def ffn(name, d):
        found[f"{name}.conv.conv.weight"] = d, 1, 7, 7
        found.update({f"{name}.conv.bn.{x}": (d,) for x in ("weight", "bias", "running_mean", "running_var")})
        found[f"{name}.conv.bn.num_batches_tracked"] = ()
        conv(f"{name}.fc1", 4 * d, d, 1, 1)
        conv(f"{name}.fc2", d, 4 * d, 1, 1)

    conv("patch_embed.0.reparam_conv", d, 3, 3, 3)
    conv("patch_embed.1.reparam_conv", d, 1, 3, 3)
    conv("patch_embed.2.reparam_conv", d, d, 1, 1)
    for index, depth in {0: 2, 2: 12, 4: 24, 7: 4, 10: 2}.items():
        for name in (f"network.{index}.{j}" for j in range(depth)):
            ffn(f"{name}.convffn", d)
            if index < 7:
                conv(f"{name}.token_mixer.reparam_conv", d, 1, 3, 3)
                found[f"{name}.layer_scale"] = d, 1, 1
            else:
                found.update({f"{name}.norm.weight": (d,), f"{name}.norm.bias": (d,)})
                found[f"{name}.token_mixer.qkv.weight"] = 3 * d, d
                conv(f"{name}.token_mixer.proj", d, d)
                found.update({f"{name}.layer_scale_{k}": (d, 1, 1) for k in (1, 2)})
        if index < 10:
            conv(f"network.{index + 1}.proj.0.lkb_reparam", 2 * d, 1, 7, 7)
            conv(f"network.{index + 1}.proj.1.reparam_conv", 2 * d, 2 * d, 1, 1)
            d *= 2
            if index > 3:
                conv(f"network.{index + 2}.reparam_conv", d, 1, 7, 7)
    conv("conv_exp.reparam_conv", 2 * d, 1, 3, 3)
    conv("conv_exp.se.reduce", d // 8, 2 * d, 1, 1)
    conv("conv_exp.se.expand", 2 * d, d // 8, 1, 1)
    found["head.proj"] = 2 * d, 768
    return {"model.vision_tower.vision_tower.model." + name: shape for name, shape in found.items()}


def tower_flops_reference(vision_hidden, size):
    """The tower over one picture of size x size pixels: one multiplication and one addition are two operations.
    Convolutions, linear layers and attention; at an edge a kernel counts whole."""
    d, n = vision_hidden // 32, (size // 4) ** 2
    total = 4 * n * 27 * d + n * (9 * d + d * d)                    # the stem: 3 x 3 of three colours, 3 x 3, 1 x 1
    for stage, depth in enumerate(DEPTHS):
        if stage:
            d, n = 2 * d, n // 4
            total += n * (49 * d + d * d)                           # 7 x 7, 1 x 1
        block = 49 * d + 8 * d * d                                  # of a token: 7 x 7 and an MLP
        if stage < 3:
            block += 9 * d                                          # 3 x 3
        else:
            total += n * 49 * d                                     # positions: 7 x 7
            block += 4 * d * d + 2 * n * d                          # attention
        total += depth * n * block
    return 2 * (total + n * 9 * 2 * d + 2 * 2 * d * (2 * d // 16))  # 3 x 3, and weights of the features


def empty(c):
    with torch.device("meta"):
        return VisionTower(c)


def with_weights(c, shapes):
    """A tower with the formula's tensors of these names, which must be all that it has."""
    tower = empty(c)
    tower.load_state_dict({name: torch.from_numpy(formula.weight(name, shape)) for name, shape in shapes.items()},
                          assign=True)
    return tower.eval()


# --- the published size ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    return np.load(formula.GOLDEN)


@pytest.fixture(scope="module")
def tower():
    """With every tensor of Apple's files."""
    names = {our_name(key): shape for key, shape in apple_shapes().items()}
    return with_weights(formula.PUBLISHED, {name.removeprefix("vision_tower."): shape
                                            for name, shape in names.items() if name})


def test_both_layouts_have_all_our_tensors(tower, golden):
    """628 tensors, of which the 44 counts of batches are left out, and in Apple's files one that is CLIP's."""
    theirs = {name: shape for name, shape in formula.whole_model_shapes(golden).items() if "vision_tower" in name}
    apple = apple_shapes()
    assert (len(theirs), len(apple)) == (628, 629)
    ours = {"vision_tower." + name: tuple(x.shape) for name, x in tower.state_dict().items()}
    for names in (theirs, apple):
        kept = [(our_name(name), shape) for name, shape in names.items() if our_name(name)]
        assert len(kept) == 584 and dict(kept) == ours
        assert sum(name.endswith("num_batches_tracked") for name in names) == 44
    assert sum(p.numel() for p in tower.parameters()) == 122_714_208
    assert len(formula.whole_model_shapes(golden)) == 671


@pytest.mark.parametrize("size", formula.SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@torch.inference_mode()
def test_equals_the_original(tower, golden, size):
    """Row by row, also where the picture is no square."""
    name = "{}x{}".format(*size)
    y = tower(torch.from_numpy(formula.pixels(formula.picture(*size))))
    assert y.shape == (1, size[0] * size[1] // 4096, 3072)
    assert abs(y.std() - float(golden[f"{name} scale"])) < 1e-4 and 0.5 < y.std() < 2
    assert np.abs(y[0, :, formula.FEATURES].numpy() - golden[name]).max() < 1e-4


def test_the_whole_models_input_is_the_one_whose_logits_are_kept(golden):
    image, pixels, ids = formula.whole_model_input(tiny.tokenizer())
    as_bytes = (pixels[0].transpose(1, 2, 0) * 255).round().astype(np.uint8).tobytes()
    assert image.size == (300, 200) and zlib.crc32(as_bytes) == golden["pixels_crc"]
    assert ids == golden["ids"].tolist() and ids.count(formula.IMAGE_ID) == len(golden["visual"]) == 16
    assert golden["logits"].shape == (len(ids) - 16, formula.TOKENS) and golden["answer"].max() < formula.TOKENS


# --- the parts, against loops over what each output is made of --------------------------------------------------------

def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def loaded(module, seed):
    """A module with random float64 numbers, and these by name. Variances are positive."""
    numbers = {name: random([seed, i], *x.shape) for i, (name, x) in enumerate(module.state_dict().items())}
    numbers = {name: x ** 2 + 0.1 if "running_var" in name else x for name, x in numbers.items()}
    module.double().load_state_dict({name: torch.from_numpy(x) for name, x in numbers.items()})
    return module, numbers


def run(module, x):
    with torch.no_grad():
        return module(torch.from_numpy(x)[None])[0].numpy()


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2 ** 0.5)) / 2


def conv(x, weight, bias, stride=1):
    """x (d_in, H, W) -> (d_out, H / stride, W / stride), zeros around it."""
    d, reads, k, _ = weight.shape
    each = d * reads // len(x)                      # outputs of one group of features
    y = np.zeros((d, -(-x.shape[1] // stride), -(-x.shape[2] // stride)))
    for o, row, column in np.ndindex(y.shape):
        y[o, row, column] = bias[o]
        for f, i, j in np.ndindex(reads, k, k):
            r, c = row * stride + i - k // 2, column * stride + j - k // 2
            if 0 <= r < x.shape[1] and 0 <= c < x.shape[2]:
                y[o, row, column] += weight[o, f, i, j] * x[o // each * reads + f, r, c]
    return y


def mlp(x, w, name="mlp."):
    y = conv(x, w[name + "conv.conv.weight"], np.zeros(len(x)))
    mean, var, gain, bias = (w[f"{name}conv.bn.{part}"][:, None, None]
                             for part in ("running_mean", "running_var", "weight", "bias"))
    y = (y - mean) / (var + 1e-5) ** 0.5 * gain + bias
    y = gelu(np.einsum("of,fhw->ohw", w[name + "fc1.weight"][:, :, 0, 0], y) + w[name + "fc1.bias"][:, None, None])
    return np.einsum("of,fhw->ohw", w[name + "fc2.weight"][:, :, 0, 0], y) + w[name + "fc2.bias"][:, None, None]


def test_repmixer_block():
    module, w = loaded(fastvithd.RepMixerBlock(4), 1)
    x = random(1, 4, 5, 3)
    y = conv(x, w["token_mixer.reparam_conv.weight"], w["token_mixer.reparam_conv.bias"])
    np.testing.assert_allclose(run(module, x), y + w["layer_scale.gamma"] * mlp(y, w), rtol=1e-10, atol=1e-10)


def test_attention_block():
    """Two heads of 32 features; tokens row by row."""
    module, w = loaded(fastvithd.AttentionBlock(64), 2)
    x = random(2, 64, 2, 3)
    tokens = [x[:, r, c] for r in range(2) for c in range(3)]
    normed = [(t - t.mean()) / (t.var() + 1e-5) ** 0.5 * w["norm.weight"] + w["norm.bias"] for t in tokens]
    q, k, v = np.split(np.stack([w["token_mixer.qkv.weight"] @ t for t in normed]), 3, axis=1)  # (6, 64) each
    y = np.zeros((6, 64))
    for head in (slice(0, 32), slice(32, 64)):
        for i in range(6):
            scores = np.array([q[i, head] @ k[j, head] for j in range(6)]) / 32 ** 0.5
            weights = np.exp(scores - scores.max())
            y[i, head] = weights / weights.sum() @ v[:, head]
    y = y @ w["token_mixer.proj.weight"].T + w["token_mixer.proj.bias"]
    z = x + w["layer_scale_1.gamma"] * y.T.reshape(64, 2, 3)
    np.testing.assert_allclose(run(module, x), z + w["layer_scale_2.gamma"] * mlp(z, w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("height, width", [(6, 4), (5, 7)])
def test_downsample(height, width):
    module, w = loaded(fastvithd.Downsample(3), 3)
    x = random(3, 3, height, width)
    y = gelu(conv(x, w["proj.0.reparam_conv.weight"], w["proj.0.reparam_conv.bias"], stride=2))
    y = gelu(conv(y, w["proj.1.reparam_conv.weight"], w["proj.1.reparam_conv.bias"]))
    np.testing.assert_allclose(run(module, x), y, rtol=1e-10, atol=1e-10)


def test_final_conv_and_its_weights_of_features():
    module, w = loaded(fastvithd.FinalConv(16), 4)
    x = random(4, 16, 3, 2)
    y = conv(x, w["reparam_conv.weight"], w["reparam_conv.bias"])                               # (32, 3, 2)
    mean = np.array([feature.sum() / feature.size for feature in y])
    hidden = np.maximum(w["se.fc1.weight"][:, :, 0, 0] @ mean + w["se.fc1.bias"], 0)
    assert hidden.shape == (2,) and hidden.max() > 0
    gate = 1 / (1 + np.exp(-(w["se.fc2.weight"][:, :, 0, 0] @ hidden + w["se.fc2.bias"])))
    np.testing.assert_allclose(run(module, x), gelu(y * gate[:, None, None]), rtol=1e-10, atol=1e-10)


# --- a small tower --------------------------------------------------------------------------------------------------

@pytest.fixture
def small():
    return with_weights(SMALL, {name: tuple(x.shape) for name, x in empty(SMALL).state_dict().items()})


def batch(*sizes, seed=0):
    return torch.rand(*sizes, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_shapes(small):
    for height, width in ((64, 64), (128, 64), (64, 192), (256, 256)):
        assert small(batch(2, 3, height, width)).shape == (2, height * width // 4096, 128)
    assert small(batch(1, 3, 128, 128), looks={}).isfinite().all()


@torch.inference_mode()
def test_pictures_do_not_see_each_other(small):
    """Not in training either: the statistics of the norms are fixed, and stay as they are."""
    x, before = batch(2, 3, 64, 128), copy.deepcopy(small.state_dict())
    alone = torch.cat([small(part) for part in x.split(1)])
    for mode in (False, True):
        torch.testing.assert_close(small.train(mode)(x), alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert sum(name.endswith(("running_mean", "running_var")) for name in before) == 88


@torch.inference_mode()
def test_any_order_in_memory(small):
    x = batch(2, 3, 128, 192)
    y = small(x)
    for same in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3),
                 batch(2, 3, 128, 192).repeat_interleave(2, 3)[..., ::2]):
        torch.testing.assert_close(small(same), y, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_dtypes(small):
    x = batch(2, 3, 128, 128)
    y = small(x)
    exact = copy.deepcopy(small).double()(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(small).bfloat16()
    rough = half(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough - y).norm() < 0.05 * y.norm()
    for module in half.modules():  # as under FSDP's mixed precision, which casts parameters alone
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.float())
    assert torch.equal(half(x.bfloat16()), rough)


def test_gradients(small):
    """Every parameter has one, the statistics have none, and the picture's is the slope."""
    small.double().train()
    x, direction = batch(1, 3, 64, 64).double().requires_grad_(), batch(1, 3, 64, 64, seed=1).double() - 0.5
    small(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in small.parameters())
    assert sum(p.numel() for p in small.buffers()) == 2 * sum(d * n for d, n in zip((4, 8, 16, 32, 64), DEPTHS))
    with torch.no_grad():
        up, down = (small(x + step * direction).square().sum() for step in (1e-4, -1e-4))
    torch.testing.assert_close((x.grad * direction).sum(), (up - down) / 2e-4, rtol=1e-6, atol=0)


@torch.inference_mode()
def test_blocks_are_those_that_run(small):
    ran = []
    for block in small.blocks:
        block.register_forward_hook(lambda block, *_: ran.append(block))
    small(batch(1, 3, 64, 64))
    assert len(ran) == 44 and all(a is b for a, b in zip(ran, small.blocks))
    assert [isinstance(block, fastvithd.AttentionBlock) for block in ran] == [False] * 38 + [True] * 6


@pytest.mark.parametrize("vision_hidden, sizes", [(3072, [1024]), (128, [64, 192])])
def test_operations(vision_hidden, sizes):
    """As torch counts them without a device; on a CPU it leaves attention's kernel out."""
    tower = empty(SimpleNamespace(vision_hidden=vision_hidden))
    for size in sizes:
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            tower(torch.empty(1, 3, size, size, device="meta"))
        assert counted.get_total_flops() == tower_flops_reference(vision_hidden, size)
