"""python -m paper.verify: passes where all is well, and names what is not."""
import json
import sys

import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

import data
import layout
import weights
from model import VLM
from paper import equalities, verify
from tests import tiny

GRIDS = [[32 * a, 32 * b] for a in range(1, 7) for b in range(1, 7)]
MODELS = {
    "untied": dict(layers=6, heads=4, kv_heads=2, tied=False, vocab=301),
    "tied, padded": dict(layers=4, heads=6, kv_heads=2, tied=True, vocab=384),
    "few grids": dict(layers=3, heads=4, kv_heads=4, tied=False, vocab=301, grids=[[32, 64], [64, 32], [64, 64]])}


def save_reference(directory, layers, heads, kv_heads, tied, vocab, grids=GRIDS):
    """A random model with tiles of 4 x 4 patches, saved by transformers itself; logits of scale 10."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
                                image_size=32, patch_size=8, vision_use_head=False)
    text = Qwen2Config(hidden_size=16 * heads, num_hidden_layers=layers, num_attention_heads=heads,
                       num_key_value_heads=kv_heads, intermediate_size=128, vocab_size=vocab, tie_word_embeddings=tied)
    model = tiny.shake(LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=300, tie_word_embeddings=tied,
        image_grid_pinpoints=grids)))
    with torch.no_grad():
        if tied:  # or each token would only repeat itself
            model.model.language_model.layers[-1].mlp.down_proj.weight.mul_(8)
            model.model.language_model.norm.weight.mul_(torch.randn(16 * heads).sign())
        else:
            model.lm_head.weight.mul_(10)
    model.save_pretrained(directory)
    tiny.tokenizer().save(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    found = {name: tmp_path_factory.mktemp("llava") for name in MODELS}
    for name, directory in found.items():
        save_reference(directory, **MODELS[name])
    return found


COMPILE = VLM.compile, torch.compile


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short answers, and nothing is compiled unless a test says so."""
    monkeypatch.setattr(verify, "TOKENS", 5)
    monkeypatch.setattr(equalities, "TOKENS", 5)
    monkeypatch.setattr(equalities, "backend", lambda device: "aot_eager")
    monkeypatch.setattr(VLM, "compile", lambda self, **how: None)
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)


@pytest.fixture
def dense_only(monkeypatch):
    monkeypatch.setattr(verify, "equalities", lambda *_: None)


def check(directory, tmp_path, *flags, dtype="float32"):
    """(exit status, {check: line of the JSON})."""
    out, status = tmp_path / "verify.json", 0
    try:
        verify.main(["--model", str(directory), "--device", "cpu", "--dtype", dtype, "--out", str(out), *flags])
    except SystemExit as e:
        status = e.code
    result = json.loads(out.read_text())
    lines = {line["check"]: line for line in result["lines"]}
    assert len(lines) == len(result["lines"]) and result["ok"] == (status == 0)
    assert sum(result["count"].values()) == len(lines)
    return status, lines


def failed(lines):
    return {name for name, line in lines.items() if line["status"] == "FAIL"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_random_checkpoints_pass(name, dtype, checkpoints, tmp_path, monkeypatch, capsys):
    if (name, dtype) == ("untied", "float32"):  # once with compiled blocks
        torch.compiler.reset()
        monkeypatch.setattr(VLM, "compile", COMPILE[0])
        monkeypatch.setattr(torch, "compile", COMPILE[1])
    everything = (name, dtype) == ("few grids", "float32")  # once all twelve pictures
    status, lines = check(checkpoints[name], tmp_path, *[] if everything else ["--quick"], dtype=dtype)
    assert status == 0 and {line["status"] for line in lines.values()} == {"PASS"}
    assert {"pixels", "visual tokens", "logits", "greedy tokens", "two streams, none", "two streams, 1",
            "two streams, dense", "ask many", "mixed batch", "cached decoding", "cached decoding, tokens",
            "decode graph", "decode graph, tokens", "compiled, aot_eager", "compiled decoding",
            "compiled decoding, tokens"} <= set(lines)
    assert lines["pixels"]["measured"] == 0 < lines["logits"]["measured"] <= lines["logits"]["bound"]
    *out, last = capsys.readouterr().out.splitlines()
    assert max(map(len, out[1:])) <= 80 and last.startswith(f"{len(lines)} passed, 0 failed, 0 skipped")


@pytest.mark.parametrize("weight, dtype", [
    ("vision_tower.encoder.layers.1.mlp.fc2.bias", "float32"), ("image_newline", "bfloat16"),
    ("language_model.layers.2.self_attn.qkv_proj.weight", "float32")])
def test_a_weight_that_was_changed_is_seen(weight, dtype, checkpoints, tmp_path, monkeypatch, dense_only):
    real = weights.load

    def load(*args):
        model = real(*args)
        model.get_parameter(weight).data[3] += 1.0
        return model
    monkeypatch.setattr(weights, "load", load)
    status, lines = check(checkpoints["untied"], tmp_path, "--quick", dtype=dtype)
    assert status == 1 and failed(lines) - {"greedy tokens"} == {"logits"}
    assert lines["logits"]["measured"] > lines["logits"]["bound"]


def test_a_mask_that_is_off_by_one_is_seen(checkpoints, tmp_path, monkeypatch):
    """That of cross-attention: the text token after an image does not see its last visual token. A later question
    needs no mask, and so differs; dense has no cross-attention."""
    real = layout.vision_mask
    monkeypatch.setattr(layout, "vision_mask", lambda pos, *more: real(pos - 1, *more))
    status, lines = check(checkpoints["untied"], tmp_path, "--quick")
    assert status == 1 and failed(lines) == {"two streams, none", "two streams, 1", "two streams, 1,4", "ask many"}


def test_a_causal_mask_that_is_off_by_one_is_seen(checkpoints, tmp_path, monkeypatch):
    """The mask of later tokens, and of text alone in the last layer that reads vision: it may not see ahead."""
    real = layout.causal_mask
    monkeypatch.setattr(layout, "causal_mask", lambda slot, *more: real(slot + 1, *more))
    status, lines = check(checkpoints["untied"], tmp_path, "--quick")
    assert status == 1 and {"logits", "two streams, dense", "ask many"} <= failed(lines)
    assert not {"pixels", "visual tokens", "two streams, none"} & failed(lines)


def test_other_pixels_and_other_tilings_are_seen(checkpoints, tmp_path, monkeypatch, dense_only):
    real = data.pixels
    with monkeypatch.context() as patch:
        patch.setattr(data, "pixels", lambda image, *how: real(image.point(lambda byte: byte ^ 1), *how))
        status, lines = check(checkpoints["untied"], tmp_path, "--quick")
        assert status == 1 and failed(lines) - {"greedy tokens"} == {"pixels", "logits"}
        assert 0.007 < lines["pixels"]["measured"] < 0.05  # a step of 2 / 255, and what resizing makes of it
    monkeypatch.setattr(verify, "read_config", lambda path, real=verify.read_config: real(checkpoints["few grids"]))
    status, lines = check(checkpoints["untied"], tmp_path, "--quick")
    assert status == 1 and {"pixels", "visual tokens"} <= failed(lines)  # equal counts may hide other grids
    assert lines["visual tokens"]["note"].startswith("small: [") and lines["pixels"]["measured"] == "inf"


def test_what_transformers_cannot_load_is_skipped_and_said(tmp_path, capsys):
    tiny.model(layers=3).save_pretrained(tmp_path / "ours")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "red.png")
    status, lines = check(tmp_path / "ours", tmp_path, "--images", str(tmp_path / "red.png"))
    assert status == 0 and lines["transformers"]["status"] == "SKIP" and "'visor'" in lines["transformers"]["note"]
    assert "logits" not in lines and "two streams, none" in lines
    assert "0 failed, 1 skipped" in capsys.readouterr().out


def test_bad_input_is_one_line(checkpoints, tmp_path, monkeypatch):
    def message(*flags):
        with pytest.raises((ValueError, SystemExit)) as error:
            verify.main(["--device", "cpu", "--dtype", "float32", *flags])
        return str(error.value)
    model = ["--model", str(checkpoints["untied"])]
    assert message() == message(*model, "--out", str(tmp_path / "no" / "x.json")) == "2"
    assert "no such image" in message(*model, "--images", "none.png")
    assert "no such directory" in message("--model", str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers>=5'" in message(*model)
