"""Every family of checkpoint gives the same model; broken ones give one line."""
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import config as settings
import families
from data import collate, encode, process_image
from model import VLM
from tests import tiny
from weights import as_in_files

TEXT = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 264, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3,
          "intermediate_size": 96, "image_size": 32, "patch_size": 8}
PINPOINTS = [[w * 32, h * 32] for w in range(1, 7) for h in range(1, 7)]
TOWER = {**VISION, "num_hidden_layers": 3}
HF = {"model_type": "llava_onevision", "text_config": TEXT, "vision_config": VISION, "image_grid_pinpoints": PINPOINTS,
      "vision_aspect_ratio": "anyres_max_9", "tie_word_embeddings": False}
ORIGINAL = {**TEXT, "model_type": "llava", "mm_vision_tower": "tiny-siglip", "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": PINPOINTS, "mm_vision_select_layer": -2}

FAMILIES = {  # our prefix -> theirs, and config.json
    "llava-hf": ([("language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"),
                  ("vision_tower.", "vision_tower.vision_model.")], HF),
    "transformers 5": ([("language_model.", "model.language_model."), ("vision_tower.", "model.vision_tower."),
                        ("multi_modal_projector.", "model.multi_modal_projector."),
                        ("image_newline", "model.image_newline")], HF),
    "transformers 4.52": ([("language_model.", "model.language_model."),
                           ("vision_tower.", "model.vision_tower.vision_model."),
                           ("multi_modal_projector.", "model.multi_modal_projector."),
                           ("image_newline", "model.image_newline")], HF),
    "lmms-lab": ([("language_model.", "model."), ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
                  ("multi_modal_projector.linear_1", "model.mm_projector.0"), ("image_newline", "model.image_newline"),
                  ("multi_modal_projector.linear_2", "model.mm_projector.2")], ORIGINAL)}


@pytest.fixture(autouse=True)
def small_tower(monkeypatch):
    monkeypatch.setitem(families.VISION_TOWERS, "tiny-siglip", TOWER)


def rename(tensors, table):
    def theirs(name):
        for ours, prefix in table:
            if name.startswith(ours):
                return prefix + name[len(ours):]
        return name
    return {theirs(k): v for k, v in tensors.items()}


def write(directory, tensors, config, shards=1):
    """A checkpoint directory with one file, or several and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tiny.tokenizer().save(str(directory / "tokenizer.json"))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    index = {}
    for i in range(shards):
        part = {k: tensors[k] for k in sorted(tensors)[i::shards]}
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / name)
        index.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return directory


def tensors_of(model, extra_layer=False, padding=0):
    """Its weights as a file has them: with the unused post-layernorm; on demand a further tower layer, more rows."""
    out = as_in_files({k: v.detach().clone() for k, v in model.named_parameters()}, model.config)
    out["vision_tower.post_layernorm.weight"] = torch.ones(48)
    out["vision_tower.post_layernorm.bias"] = torch.zeros(48)
    if extra_layer:
        out.update({k.replace("layers.1.", "layers.2."): v * 2 for k, v in out.items()
                    if k.startswith("vision_tower.encoder.layers.1.")})
    for name in ("language_model.embed_tokens.weight", "lm_head.weight"):
        if padding and name in out:
            out[name] = torch.cat([out[name], torch.randn(padding, 64)])
    return out


def answers_alike(a, b, tolerance=0.0):
    prompt = encode("see <image>, what?", a.tokenizer, [process_image(tiny.image(50, 70), a.config)])
    dense = a.config.configuration("dense")
    with torch.inference_mode():
        return (a.head(a(collate([prompt]), dense)) - b.head(b(collate([prompt]), dense))).abs().max() <= tolerance


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family, tied, shards):
    model = tiny.model(visor=False, tied=tied)
    table, config = FAMILIES[family]
    tensors = rename(tensors_of(model, extra_layer=family == "lmms-lab", padding=5), table)
    loaded = VLM.from_pretrained(write(tmp_path / "c", tensors, config, shards))
    assert loaded.config.tied is tied and loaded.config.vocab == 259  # the padded rows are cut
    assert loaded.config.unpad == ("original" if family == "lmms-lab" else "hf")
    assert answers_alike(model, loaded)


@pytest.mark.parametrize("feature_layer, in_config, in_file", [(-1, 2, 2), (-2, 3, 3), (-1, 2, 3)])
def test_tower_with_the_layer_that_is_not_used(tmp_path, feature_layer, in_config, in_file):
    model = tiny.model(visor=False)
    table, config = FAMILIES["llava-hf"]
    config = {**config, "vision_feature_layer": feature_layer,
              "vision_config": {**VISION, "num_hidden_layers": in_config}}
    tensors = rename(tensors_of(model, extra_layer=in_file == 3), table)
    assert answers_alike(model, VLM.from_pretrained(write(tmp_path / "c", tensors, config)))


@pytest.mark.parametrize("in_file", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(tmp_path, in_file, asked):
    model = tiny.model(visor=False)
    table, config = FAMILIES["llava-hf"]
    write(tmp_path / "c", {k: v.to(in_file) for k, v in rename(tensors_of(model), table).items()}, config)
    loaded = dict(VLM.from_pretrained(tmp_path / "c", dtype=asked).named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(loaded[name], p.to(in_file).to(asked)), name


def joined(tmp_path, model):
    """A model's tower and language model as a SigLIP and a Qwen2 directory; the name of both."""
    tensors = tensors_of(model, extra_layer=True)
    tower = {"vision_model" + k.removeprefix("vision_tower"): v for k, v in tensors.items() if k.startswith("vision")}
    tower |= {"text_model.head.weight": torch.zeros(3), "logit_scale": torch.zeros(1), "logit_bias": torch.zeros(1),
              "vision_model.head.probe": torch.zeros(1, 1, 48)}
    write(tmp_path / "siglip", tower, {"model_type": "siglip", "vision_config": TOWER})
    llm = {k.replace("language_model.", "model."): v for k, v in tensors.items() if k.startswith("language_model.")}
    write(tmp_path / "qwen2", llm, {**TEXT, "tie_word_embeddings": True})
    return f"{tmp_path}/siglip+{tmp_path}/qwen2"


def test_siglip_and_qwen2_directories(tmp_path, capsys):
    """Only the connector and the newline are new, and that is said."""
    model = tiny.model(visor=False, tied=True)
    loaded = VLM.from_pretrained(joined(tmp_path, model))
    assert "new: image_newline, multi_modal_projector" in capsys.readouterr().err
    theirs, ours = dict(loaded.named_parameters()), dict(model.named_parameters())
    same = {k for k in ours if torch.equal(ours[k], theirs[k])}
    assert {k.split(".")[0] for k in set(ours) - same} == {"multi_modal_projector", "image_newline"}
    loaded.save_pretrained(tmp_path / "joined")
    assert answers_alike(loaded, VLM.from_pretrained(tmp_path / "joined"))


def test_saving_over_shards(tmp_path):
    """The old shards and their index do not come back."""
    table, config = FAMILIES["llava-hf"]
    write(tmp_path / "c", rename(tensors_of(tiny.model(visor=False)), table), config, shards=2)
    new = tiny.model(seed=1)
    new.save_pretrained(tmp_path / "c")
    assert answers_alike(new, VLM.from_pretrained(tmp_path / "c"))


def test_products_that_are_one_matrix_here_are_several_in_files(tmp_path):
    """A file has Hugging Face's names, and one of them that is missing is named as such."""
    model = tiny.model()
    model.save_pretrained(tmp_path / "c")
    saved = load_file(tmp_path / "c/model.safetensors")
    assert not any(x in name for name in saved for x in ("qkv_proj", "kv_proj", "gate_up_proj"))
    layer, theirs = model.language_model.layers[1], "language_model.layers.1."
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        assert torch.equal(saved[f"{theirs}self_attn.{part}_proj.weight"], layer.self_attn.qkv_proj.weight[rows])
        assert torch.equal(saved[f"{theirs}self_attn.{part}_proj.bias"], layer.self_attn.qkv_proj.bias[rows])
    assert torch.equal(saved[theirs + "mlp.up_proj.weight"], layer.mlp.gate_up_proj.weight[96:])
    assert torch.equal(saved["language_model.cross.2.v_proj.bias"], model.language_model.cross["2"].kv_proj.bias[32:])
    del saved[theirs + "self_attn.v_proj.bias"]
    save_file(saved, tmp_path / "c/model.safetensors")
    with pytest.raises(ValueError, match=r"missing: language_model\.layers\.1\.self_attn\.v_proj\.bias;"):
        VLM.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("visor", [False, True])
def test_what_is_saved_is_loaded(tmp_path, visor):
    model = tiny.model(visor=visor, tied=False, unpad="hf", max_tiles=None)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("not ours")
    model.save_pretrained(tmp_path / "c")
    model.save_pretrained(tmp_path / "c")  # over itself
    loaded = VLM.from_pretrained(tmp_path / "c")
    assert loaded.config == model.config and answers_alike(model, loaded)
    names = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert names == ["config.json", "model.safetensors", "notes.txt", "tokenizer.json"]


def test_memory_while_loading(tmp_path):
    """Peak memory stays below 1.2 times the weights, also when the file has another dtype (as Linux's /proc tells)."""
    big = VLM(tiny.config(hidden=1024, ffn=4096, layers=6, heads=16, head_dim=64)).to(torch.bfloat16)
    big.tokenizer = tiny.tokenizer()
    big.save_pretrained(tmp_path / "c")
    tiny.model().save_pretrained(tmp_path / "small")  # loaded first, so that only the weights count
    weights = sum(p.numel() for p in big.parameters()) * 4
    code = ("import model; peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) * 1024\n"
            f"model.VLM.from_pretrained({str(tmp_path / 'small')!r}); before = peak()\n"
            f"m = model.VLM.from_pretrained({str(tmp_path / 'c')!r}); print(peak() - before)")
    used = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.9 * weights < used < 1.2 * weights, used / weights


# --- the hub --------------------------------------------------------------------------------------------------------

class Hub(BaseHTTPRequestHandler):
    """Serves one repository as the hub does, and notes what was fetched."""
    files, fetched = {}, []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        name = path.split("/resolve/", 1)[-1].partition("/")[2]
        if path.startswith("/api/models/some/repo"):
            if "/tree/" in path:
                body = json.dumps([{"type": "file", "path": f, "size": len(b), "oid": "0"}
                                   for f, b in self.files.items()])
            else:
                body = json.dumps({"_id": "0", "id": "some/repo", "sha": "a" * 40,
                                   "siblings": [{"rfilename": f} for f in self.files]})
            body = body.encode()
        elif "/resolve/" in path and name in self.files:
            body = self.files[name]
            if self.command == "GET":
                self.fetched.append(name)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{abs(hash(name)):040x}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def load_from_hub(home, endpoint, name="some/repo", **env):
    code = f"import model; m = model.VLM.from_pretrained({name!r}); print(sum(p.sum() for p in m.parameters()).item())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={
        **os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", **env})


def test_hub_downloads_only_what_is_needed_and_works_offline(tmp_path):
    model = tiny.model(visor=False)
    write(tmp_path / "repo", rename(tensors_of(model), FAMILIES["llava-hf"][0]), HF, shards=2)
    Hub.files = {p.name: p.read_bytes() for p in (tmp_path / "repo").iterdir()}
    Hub.files |= dict.fromkeys(("README.md", "training_args.bin", "other.safetensors", "tokenizer_config.json"), b"x")
    Hub.fetched.clear()
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    online = load_from_hub(tmp_path / "home", endpoint)
    server.shutdown()
    server.server_close()
    expected = sum(p.sum() for p in model.parameters()).item()
    assert online.returncode == 0 and float(online.stdout) == pytest.approx(expected, rel=1e-5), online.stderr
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(Hub.fetched) == ["config.json", *shards, "model.safetensors.index.json", "tokenizer.json"]
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):  # told that it is offline, and finding out
        offline = load_from_hub(tmp_path / "home", endpoint, **env)
        assert offline.returncode == 0 and offline.stdout == online.stdout, offline.stderr
    unknown = load_from_hub(tmp_path / "home", endpoint, name="some/other", HF_HUB_OFFLINE="1")
    assert "ValueError: some/other: neither a directory here nor to be had from the hub" in unknown.stderr


# --- broken checkpoints: each error names the file or the tensor ----------------------------------------------------

@pytest.fixture
def good(tmp_path):
    model = tiny.model(visor=False)
    table, config = FAMILIES["llava-hf"]
    return write(tmp_path / "c", rename(tensors_of(model), table), config, shards=2)


def change(directory, edit):
    """Edits the tensors of the first shard in place."""
    file = min(directory.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def set_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


NORM = "language_model.model.norm.weight"
BROKEN = {
    "no weights": (lambda d: [f.unlink() for f in d.glob("model*")], "model.safetensors is missing"),
    "shard missing": (lambda d: max(d.glob("*.safetensors")).unlink(), "model-00002-of-00002.safetensors is missing"),
    "truncated": (lambda d: os.truncate(min(d.glob("*.safetensors")), 3000), "00001-of-00002.safetensors: truncated"),
    "not safetensors": (lambda d: min(d.glob("*.safetensors")).write_text("hello"), "00001-of-00002.safetensors: tr"),
    "empty file": (lambda d: os.truncate(min(d.glob("*.safetensors")), 0), "00001-of-00002.safetensors: truncated"),
    "index broken": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
    "tensor missing": (lambda d: change(d, lambda t: t.pop(next(k for k in t if ".mlp." in k))), "missing: "),
    "tensor unexpected": (lambda d: change(d, lambda t: t.update(extra=torch.ones(2))), "unexpected: extra"),
    "tensor twice": (lambda d: change(d, lambda t: t.update({"model.image_newline": torch.ones(64),
                                                             "image_newline": torch.ones(64)})), "unexpected: "),
    "wrong shape": (lambda d: change(d, lambda t: [t.update({k: v[:1]}) for k, v in list(t.items())[:1]]), "has shape"),
    "other size": (lambda d: set_config(d, text_config={**TEXT, "hidden_size": 32, "head_dim": 16}), "has shape"),
    "index no object": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "index.json: not a JSON obj"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "config without a part": (lambda d: set_config(d, text_config=None), "config.json: "),
    "no heads": (lambda d: set_config(d, text_config={**TEXT, "num_attention_heads": 0}), "config.json: "),
    "heads as text": (lambda d: set_config(d, text_config={**TEXT, "num_attention_heads": "4"}), "config.json: "),
    "no patches": (lambda d: set_config(d, vision_config={**VISION, "patch_size": 0}), "vision_config.patch_size 0"),
    "odd heads": (lambda d: set_config(d, vision_config={**VISION, "num_attention_heads": 5}), "does not go with"),
    "no grids": (lambda d: set_config(d, image_grid_pinpoints=[[1, 1]]), "grid_pinpoints (1, 1)"),
    "larger tokenizer": (lambda d: set_config(d, text_config={**TEXT, "vocab_size": 200}), "has token ids up to 258"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "config not json": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "unknown family": (lambda d: set_config(d, model_type="bert"), "config.json: model_type 'bert'"),
    "unknown language model": (lambda d: set_config(d, text_config={**TEXT, "model_type": "llama"}), "'llama'"),
    "unknown activation": (lambda d: set_config(d, text_config={**TEXT, "hidden_act": "gelu"}), "hidden_act 'gelu'"),
    "unknown aspect": (lambda d: set_config(d, vision_aspect_ratio="pad"), "vision_aspect_ratio 'pad'"),
    "config incomplete": (lambda d: (d / "config.json").write_text('{"model_type": "llava_onevision"}'), "is missing"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json: not a tokenizer"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints(good, what):
    damage, message = BROKEN[what]
    damage(good)
    with pytest.raises(ValueError) as error:
        VLM.from_pretrained(good)
    text = str(error.value)
    assert message in text and str(good) in text and "\n" not in text


def reload(family, tmp_path, config_changes=None, tensors=None, **files):
    """A model loaded from a checkpoint of a family, with settings or files changed."""
    table, config = FAMILIES[family]
    text = {**TEXT, **(config_changes or {}).pop("text_config", {})} if family != "lmms-lab" else {}
    config = {**config, **({"text_config": text} if text else {}), **(config_changes or {})}
    d = write(tmp_path / "c", rename(tensors or tensors_of(tiny.model(visor=False)), table), config)
    for name, content in files.items():
        (d / f"{name}.json").write_text(json.dumps(content))
    return VLM.from_pretrained(d)


@pytest.mark.parametrize("setting", [
    {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
    {"truncation": {"direction": "Left", "max_length": 1, "strategy": "OnlyFirst", "stride": 0}},
    {"padding": {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"}},
    {"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 32, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "!"}}])
def test_prompts_are_neither_cut_nor_filled(setting, tmp_path):
    spec = {**json.loads(tiny.tokenizer().to_str()), **setting}
    model = reload("llava-hf", tmp_path, tokenizer=spec)
    for text in ("short", "a question that is longer than all of these settings allow for"):
        assert len(encode(text, model.tokenizer).ids) == len(text)
    model.save_pretrained(tmp_path / "ours")  # nor after us
    assert len(encode("a" * 99, VLM.from_pretrained(tmp_path / "ours").tokenizer).ids) == 99


@pytest.mark.parametrize("where", ["generation_config", "config", "text_config", "own"])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", ["llava-hf", "lmms-lab"])
def test_stop_tokens_of_every_file_are_heeded(where, several, family, tmp_path):
    if where == "text_config" and family == "lmms-lab":
        where = "config"  # it has no part of that name
    free = reload(family, tmp_path)
    prompt = encode("what?", free.tokenizer)
    monkey, = free.generate([prompt], free.config.configuration("dense"), max_tokens=12)
    stop = monkey[3]
    eos = {"eos_token_id": [258, stop] if several else stop}
    changes = {"config": eos, "text_config": {"text_config": eos}}.get(where, {})
    files = {"generation_config": eos} if where == "generation_config" else {}
    model = reload(family, tmp_path, dict(changes), **files)
    if where == "own":
        model.config.stop_ids = (stop,)
        model.save_pretrained(tmp_path / "ours")
        model = VLM.from_pretrained(tmp_path / "ours")
    answer, = model.generate([prompt], free.config.configuration("dense"), max_tokens=12)
    assert answer == monkey[:monkey.index(stop)]


@pytest.mark.parametrize("eos", ["2", 2.0, -1, True, [[2]], {"a": 1}, [2, None]])
def test_stop_tokens_that_are_none_are_named(eos, tmp_path):
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id"):
        reload("llava-hf", tmp_path, generation_config={"eos_token_id": eos})


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("family", ["llava-hf", "transformers 5", "lmms-lab"])
def test_a_head_that_differs_is_used_whatever_the_config_says(family, padding, tmp_path):
    """And one that does not is not kept twice."""
    tied = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}}
    tied = tied if family != "lmms-lab" else {"tie_word_embeddings": True}
    other, same = tiny.model(visor=False), tiny.model(visor=False)
    with torch.no_grad():
        same.lm_head.weight.copy_(same.language_model.embed_tokens.weight)
    model = reload(family, tmp_path, dict(tied), tensors_of(other, padding=padding))
    assert not model.config.tied and answers_alike(model, other)
    tensors = tensors_of(same)
    tensors = {k: torch.cat([v, torch.randn(padding, 64)]) if k.endswith(("embed_tokens.weight", "lm_head.weight"))
               else v for k, v in tensors.items()}
    model = reload(family, tmp_path, dict(tied), tensors)
    assert model.config.tied and model.lm_head is None and answers_alike(model, same)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_only_floating_point_weights_are_loaded(dtype, tmp_path):
    tensors = tensors_of(tiny.model(visor=False))
    name = "language_model.layers.3.mlp.up_proj.weight"
    with pytest.raises(ValueError, match="up_proj.weight is .*: quantised"):
        reload("llava-hf", tmp_path, tensors={**tensors, name: tensors[name].to(dtype)})


@pytest.mark.parametrize("family, changes, message", [
    ("llava-hf", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ("llava-hf", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantization_config"),
    ("lmms-lab", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("lmms-lab", {"mm_resampler_type": "perceiver"}, "mm_resampler_type 'perceiver'"),
    ("lmms-lab", {"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
    ("lmms-lab", {"mm_vision_select_layer": -1}, "mm_vision_select_layer -1"),
    ("lmms-lab", {"mm_patch_merge_type": None}, "mm_patch_merge_type 'flat'"),
    ("lmms-lab", {"image_aspect_ratio": None}, "image_aspect_ratio 'square'"),
    ("lmms-lab", {"image_grid_pinpoints": [[33, 32]]}, "multiples of the tile's 32 pixels"),
    ("lmms-lab", {"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints '(1x1)"),
    ("llava-hf", {"image_grid_pinpoints": [[32, 32], [40, 32]]}, "multiples of the tile's 32 pixels"),
    ("llava-hf", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy 'default'"),
    ("llava-hf", {"vision_feature_layer": [-1, -2]}, "vision_feature_layer"),
    ("llava-hf", {"text_config": {"rope_scaling": {"type": "yarn", "factor": 4}}}, "rope_parameters.type 'yarn'"),
    ("llava-hf", {"text_config": {"rope_parameters": {"rope_type": "linear"}}}, "rope_parameters.rope_type 'linear'"),
    ("llava-hf", {"text_config": {"rope_theta": math.nan}}, "text_config.rope_theta nan"),
    ("llava-hf", {"text_config": {"rms_norm_eps": -1e-6}}, "text_config.rms_norm_eps -1e-06"),
    ("llava-hf", {"text_config": {"num_hidden_layers": 10**6}}, "text_config.num_hidden_layers 1000000"),
    ("llava-hf", {"text_config": {"tie_word_embeddings": "no"}}, "tie_word_embeddings 'no'"),
    ("llava-hf", {"text_config": {"hidden_size": True}}, "text_config.hidden_size True")])
def test_settings_are_done_or_refused_by_name(family, changes, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{re.escape(message)}"):
        reload(family, tmp_path, changes)


@pytest.mark.parametrize("rope, theta", [
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, 1e6),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, 5e5), ({"rope_parameters": None}, 1e4),
    ({"rope_scaling": {"type": "default"}, "rope_theta": 3e4}, 3e4), ({"rope_theta": None}, 1e4)])
def test_where_theta_stands(rope, theta, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**HF, "text_config": {**TEXT, **rope}}))
    assert families.read_config(tmp_path).rope_theta == theta


@pytest.mark.parametrize("field, value", [
    ("rope_theta", "1"), ("rope_theta", math.inf), ("rms_eps", 0), ("vision_eps", math.nan), ("max_tiles", 2.5),
    ("tied", 1), ("tied", "true"), ("route_threshold", "0.02"), ("route_threshold", 1.5), ("ca", [0.5]), ("ca", 3),
    ("sa", [4, 4]), ("sa", [4, 1]), ("sa", [[1]]), ("viable", [1]), ("viable", [[1], [1]]), ("viable", "ab"),
    ("pinpoints", [[2.5, 2]]), ("pinpoints", [[2]]), ("pinpoints", []), ("pinpoints", [[64, 64]]),
    ("layers", 1_000_000), ("layers", True), ("hidden", 64.0), ("head_dim", 15), ("vocab", 10**12),
    ("reduce", "pack:0.5"),
    ("reduce", 2), ("unpad", "HF"), ("stage", 2), ("world", None), ("step", -1), ("stop_ids", [-1])])
def test_every_setting_of_ours_has_its_limits(field, value, tmp_path):
    tiny.model().save_pretrained(tmp_path / "c")
    set_config(tmp_path / "c", **{field: value})
    with pytest.raises(ValueError, match=f"config.json: .*{field}"):
        families.read_config(tmp_path / "c")


def test_no_setting_is_without_a_limit():
    of_lists = {"reduce", "pinpoints", "ca", "sa", "viable", "overview", "stop_ids", "mrope"}
    assert {f.name for f in dataclasses.fields(settings.Config)} == set(settings.LIMITS) | of_lists


@pytest.mark.parametrize("key, value", [("image_mean", [0.48, 0.46, 0.41]), ("image_std", [1, 1, 1]),
                                        ("do_normalize", False), ("do_rescale", "no")])
def test_pixels_are_prepared_as_the_checkpoint_says_or_not_at_all(key, value, tmp_path):
    fine = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5] * 3, "do_normalize": True, "size": {"height": 32}}
    (tmp_path / "a").mkdir()
    reload("llava-hf", tmp_path / "a", preprocessor_config=fine)
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {key} "):
        reload("llava-hf", tmp_path, preprocessor_config={**fine, key: value})


@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.1}, {"suppress_tokens": [5]}, {"min_new_tokens": 3}])
def test_what_generation_does_not_follow_is_named(setting, tmp_path, capsys):
    reload("llava-hf", tmp_path, generation_config={"repetition_penalty": 1.0, "eos_token_id": 2, **setting})
    assert f"generation_config.json: {next(iter(setting))} not followed" in capsys.readouterr().err


def test_the_single_file_comes_before_the_shards(good):
    """As in transformers; a training tool may have left older shards and their index beside it."""
    new = tiny.model(seed=1, visor=False)
    save_file(rename(tensors_of(new), FAMILIES["llava-hf"][0]), good / "model.safetensors")
    assert answers_alike(VLM.from_pretrained(good), new)


@pytest.mark.parametrize("files, message", [
    (["pytorch_model.bin"], "pytorch_model.bin, not as safetensors: convert"), (["consolidated.pth"], "convert"),
    (["model-q4.gguf"], "convert"), (["adapter_model.safetensors"], "adapter"), (["adapter_model.bin"], "adapter"),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "index.json is missing"),
    ([], "model.safetensors is missing")])
def test_other_kinds_of_weights_are_told_apart(files, message, good):
    for old in good.glob("model*"):
        old.unlink()
    for name in files:
        (good / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        VLM.from_pretrained(good)


def test_a_pointer_of_git_lfs_is_said_to_be_one(good):
    min(good.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        VLM.from_pretrained(good)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "", 5, None, "a/b.safetensors"])
def test_an_index_names_files_beside_it(name, good):
    (good / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="index.json: weight_map"):
        VLM.from_pretrained(good)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", "utf-16"])
def test_a_byte_order_mark_is_no_mistake(mark, good):
    text = (good / "config.json").read_text()
    (good / "config.json").write_bytes(text.encode(mark) if isinstance(mark, str) else mark + text.encode())
    VLM.from_pretrained(good)


def test_a_damaged_cross_attention_is_not_replaced(tmp_path):
    """A whole one may be new, part of one is an error."""
    tiny.model().save_pretrained(tmp_path / "c")
    change(tmp_path / "c", lambda t: t.pop("language_model.cross.2.o_proj.weight"))
    with pytest.raises(ValueError, match="missing: language_model.cross.2.o_proj.weight"):
        VLM.from_pretrained(tmp_path / "c")


def test_cross_attention_is_added_once_and_where_there_are_layers():
    with pytest.raises(ValueError, match="has cross-attention already"):
        tiny.model().add_cross_attention()
    for words in (dict(ca=[6]), dict(sa=[-1]), dict(sa=[1], viable=[(2,)])):
        with pytest.raises(ValueError, match="layer"):
            tiny.model(visor=False).add_cross_attention(**words)


def test_new_cross_attention_starts_from_its_layers_self_attention():
    m = tiny.model(visor=False).add_cross_attention()
    for l, cross in m.language_model.cross.items():
        block = m.language_model.layers[int(l)]
        for x, y, z in zip(*(p.parameters() for p in (cross.q_proj, cross.kv_proj, block.self_attn.qkv_proj))):
            assert torch.equal(torch.cat([x, y]), z)
        assert torch.equal(cross.q_norm.weight, block.input_layernorm.weight)
        assert torch.equal(cross.kv_norm.weight, block.input_layernorm.weight)
        assert not cross.o_proj.weight.any() and not cross.cpe.weight.any() and not cross.cpe.bias.any()


def test_default_layers_are_the_papers():
    """A third of 24 layers each; appendix A's list of 13 configurations."""
    c = settings.preset("llava-ov-0.5b")
    assert c.sa == (1, 4, 7, 10, 13, 16, 19, 22) and c.ca == (2, 5, 8, 11, 14, 17, 20, 23)
    text = ("[1,4], [1,7], [1,4,7], [1,4,16], [1,7,16], [1,10,16], [1,4,7,16], [1,4,7,22], [1,4,10,16], [1,4,7,10,16], "
            "[1,4,7,16,22], [1,4,7,10,16,22], [1,4,7,10,16,19,22]")
    assert c.viable == tuple(tuple(x) for x in json.loads(f"[{text}]"))
    assert tiny.model(layers=9).config.viable == ((1,), (1, 4), (1, 4, 7))


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        VLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="or two as"):
        VLM.from_pretrained("a+b+c")


def test_no_import_of_transformers():
    """The reference implementation stays in the tests, and flops.py needs no torch."""
    root = Path(__file__).parent.parent
    files = [file for pattern in ("*.py", "encoders/*.py", "toy/*.py", "llava/*.py") for file in root.glob(pattern)]
    for file in files:
        assert "import transformers" not in file.read_text() and "from transformers" not in file.read_text()
    for ours, theirs in (("sample, model", "transformers"), ("data, flops", "torch")):
        subprocess.run([sys.executable, "-c", f"import sys, {ours}; assert {theirs!r} not in sys.modules"], check=True)
