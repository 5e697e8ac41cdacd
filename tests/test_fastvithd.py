"""FastViTHD equals timm's, at full size and with weights by a formula; its parts equal plain loops."""
import copy
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from encoders import fastvithd
from encoders.fastvithd import DEPTHS, VisionTower
from tests import fastvithd_weights as formula

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


# --- the published size ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def golden():
    return np.load(formula.GOLDEN)


@pytest.fixture(scope="module")
def tower():
    """With every tensor of Apple's files."""
    with torch.device("meta"):
        tower = VisionTower(formula.PUBLISHED)
    names = {our_name(key): shape for key, shape in apple_shapes().items()}
    names = {name.removeprefix("vision_tower."): shape for name, shape in names.items() if name}
    tower.load_state_dict({name: torch.from_numpy(formula.weight(name, shape)) for name, shape in names.items()},
                          assign=True)
    return tower.eval()


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


def test_golden_input():
    """The picture of the whole model's logits comes out as where they were made."""
    from tests import tiny
    import zlib
    golden = np.load(formula.GOLDEN)
    image, pixels, ids = formula.whole_model_input(tiny.tokenizer())
    assert zlib.crc32((pixels[0].transpose(1, 2, 0) * 255).round().astype(np.uint8).tobytes()) == golden["pixels_crc"]
    assert ids == golden["ids"].tolist() and golden["logits"].shape == (ids.index(300) + 25, 259)
