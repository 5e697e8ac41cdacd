"""FastVLM as a whole, from transformers' files and from Apple's: visual tokens, logits and answers of the golden file.

The oracle was transformers' FastVlmForConditionalGeneration over timm's tower (tests/make_fastvithd_golden.py).
"""
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data import chatml, collate, encode, place_images, process_image
from families import read_config
from model import VLM
from tests import fastvithd_weights as formula
from tests import tiny

GOLDEN = dict(np.load(formula.GOLDEN))
APPLE = {"stem": "patch_embed", "stages.0.blocks": "network.0", "stages.1.downsample": "network.1",
         "stages.1.blocks": "network.2", "stages.2.downsample": "network.3", "stages.2.blocks": "network.4",
         "stages.3.downsample": "network.5", "stages.3.pos_emb": "network.6", "stages.3.blocks": "network.7",
         "stages.4.downsample": "network.8", "stages.4.pos_emb": "network.9", "stages.4.blocks": "network.10",
         "final_conv": "conv_exp"}


def apples_name(name):
    """Apple's name of a tensor in Hugging Face's files of FastVLM."""
    if name.startswith(formula.IN_FILES):
        name = name.removeprefix(formula.IN_FILES)
        ours = next(part for part in APPLE if name.startswith(part + "."))
        name = APPLE[ours] + name.removeprefix(ours)
        name = re.sub(r"^(network\.[1358]\.proj\.0)\.reparam_conv", r"\1.lkb_reparam", name)
        for theirs, apples in ((".mlp.", ".convffn."), (".gamma", ""), (".se.fc1.", ".se.reduce."),
                               (".se.fc2.", ".se.expand.")):
            name = name.replace(theirs, apples)
        return "model.vision_tower.vision_tower.model." + name
    name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
    return name.replace("model.language_model.", "model.")


def apples_config(**changes):
    text = json.loads(str(GOLDEN["config"]))["text_config"]
    return {**{k: text[k] for k in formula.TEXT}, "rms_norm_eps": text["rms_norm_eps"],
            "rope_theta": formula.ROPE_THETA, "model_type": "llava_qwen2", "mm_hidden_size": 3072,
            "mm_vision_tower": f"mobileclip_l_{formula.SIDE}",
            "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat",
            "mm_vision_select_layer": -2, "mm_use_im_start_end": False, **changes}


def problem(directory):
    """What reading its config.json says is wrong."""
    with pytest.raises(ValueError) as e:
        read_config(directory)
    return str(e.value)


@pytest.fixture(scope="module")
def tensors():
    return {name: formula.weight(name, shape) for name, shape in formula.whole_model_shapes(GOLDEN).items()}


@pytest.mark.parametrize("layout", ["transformers", "Apple"])
def test_the_whole_model_is_that_of_the_golden_file(layout, tensors, tmp_path):
    config = str(GOLDEN["config"])
    if layout == "Apple":
        tensors = {apples_name(k): v for k, v in tensors.items()}
        tensors["model.vision_tower.vision_tower.model.head.proj"] = np.ones((3072, 768), np.float32)  # CLIP's
        config = json.dumps(apples_config())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer.json").write_text(tiny.tokenizer().to_str())
    m = VLM.from_pretrained(tmp_path)
    c = m.config
    assert (c.encoder, c.aspect, c.tile, c.patches, c.tied) == ("fastvithd", "pad", formula.SIDE, 4, False)
    image, pixels, ids = formula.whole_model_input(m.tokenizer)
    seen = process_image(image, c)
    assert np.array_equal(seen.pixels.astype(np.float32) / 255, pixels)
    prompt = encode(chatml([place_images(formula.QUESTION, 1, c)]), m.tokenizer, [seen])
    assert prompt.ids == [i for i in ids if i != formula.IMAGE_ID] and seen.tiling.tokens == 16
    assert [ids[p] for p in prompt.v_pos] == [formula.IMAGE_ID] * 16
    every = tuple(range(c.layers))
    with torch.no_grad():
        got = m.head(m(collate([prompt]), every))[0].numpy()
        visual = m.encode([seen])[0].numpy()
    assert np.abs(visual - GOLDEN["visual"]).max() < 1e-4 and np.abs(GOLDEN["visual"]).max() > 0.5
    assert got.shape == GOLDEN["logits"].shape and np.abs(GOLDEN["logits"]).max() > 5
    assert np.abs(got - GOLDEN["logits"]).max() < 1e-4
    assert m.generate([prompt], every, max_tokens=16)[0] == GOLDEN["answer"].tolist()


@pytest.mark.parametrize("changes, said", [
    ({"mm_projector_type": "linear"}, "mm_projector_type"), ({"mm_hidden_size": 1152}, "mm_hidden_size"),
    ({"image_aspect_ratio": "square"}, "image_aspect_ratio"), ({"mm_patch_merge_type": "x"}, "mm_patch_merge_type"),
    ({"mm_vision_tower": "mobileclip_l_100"}, "tile 100"), ({"mm_vision_tower": "mobileclip_s_256"}, "mm_vision_tower"),
    ({"hidden_act": "gelu"}, "hidden_act")], ids=str)
def test_settings_of_apples_that_are_not_supported(changes, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(apples_config(**changes)))
    assert said in problem(tmp_path)


@pytest.mark.parametrize("path, value", [
    (("vision_config", "architecture"), "vit_base"), (("vision_config", "model_type"), "siglip"),
    (("image_seq_length",), 250), (("image_seq_length",), "16"), (("projector_hidden_act",), "relu"),
    (("text_config", "model_type"), "llama")], ids=str)
def test_settings_of_transformers_that_are_not_supported(path, value, tmp_path):
    raw = json.loads(str(GOLDEN["config"]))
    part = raw
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert path[-1] in problem(tmp_path)


def test_tiles_of_fastvithd_are_arranged_as_siglips(tmp_path):
    pinpoints = [[512, 256], [256, 512], [512, 512]]
    (tmp_path / "config.json").write_text(json.dumps(apples_config(
        image_aspect_ratio="anyres_max_9", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=pinpoints)))
    c = read_config(tmp_path)
    seen = process_image(tiny.image(500, 250), c)
    assert c.aspect == "anyres" and seen.tiling.grid == (1, 2) and seen.tiling.tokens == 16 + 4 * 9


@pytest.mark.parametrize("change", [{"image_mean": [0.5] * 3}, {"image_std": [0.5] * 3}, {"do_rescale": False}],
                         ids=str)
def test_other_pixels_are_refused(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(apples_config()))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.0] * 3, "image_std": [1.0] * 3}))
    assert read_config(tmp_path).encoder == "fastvithd"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    assert [*change][0] in problem(tmp_path)
