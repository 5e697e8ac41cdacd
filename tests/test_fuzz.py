"""Fuzzing: whatever stands in a file or on a command line, the answer is a result, or one line that names the mend.

    pytest tests/test_fuzz.py                                              a few seconds a kind
    pytest tests/test_fuzz.py::test_inputs --fuzz 20000                    the long run
    pytest tests/test_fuzz.py::test_inputs --fuzz-only state.json:17       one input again

An input depends on nothing but its kind and number; the first numbers are the inputs unchanged, which must be welcome.
A fault is whatever is not a result and not one line that names a file, a flag or a field (fuzzing.py). How inputs are
changed is in mutations.py.
"""
import atexit
import contextlib
import io
import json
import os
import shutil
import signal
import tempfile
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

import cli
import data
import families
import flops
import llava.__main__
import router
import sample
import toy.__main__
import train
from llava.index import JsonIndex
from llava.samples import Samples, eval_questions
from model import VLM
from pictures import load_image
from tests import tiny, worlds
from tests.fuzzing import ROOT, Kind, check_line, distinct, faults, quiet, short
from tests.mutations import (change_bytes, change_json, change_lines, change_picture, change_safetensors, change_text,
                             change_words)
from tests.test_loading import write
from weights import as_in_files

# --- the inputs as they should be -----------------------------------------------------------------------------------

SMALL = dict(hidden=16, layers=3, heads=2, kv_heads=1, head_dim=8, ffn=16, vision_hidden=16, vision_layers=1,
             vision_heads=2, vision_ffn=16, tile=16, patch=8, pinpoints=((1, 1), (1, 2), (2, 1)))
TEXT = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8,
        "num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 259, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": False, "use_sliding_window": False}
VISION = {"model_type": "siglip_vision_model", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 16, "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-6}
TOWER = {**VISION, "num_hidden_layers": 2}
GRIDS = [[16, 16], [16, 32], [32, 16]]
HF = {"model_type": "llava_onevision", "text_config": TEXT, "vision_config": VISION, "image_grid_pinpoints": GRIDS,
      "vision_aspect_ratio": "anyres_max_9", "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
      "projector_hidden_act": "gelu", "tie_word_embeddings": False}
ORIGINAL = {**TEXT, "model_type": "llava", "mm_vision_tower": "tiny-siglip", "mm_projector_type": "mlp2x_gelu",
            "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": GRIDS}
MIXTURE = {"datasets": [{"json_path": "data.json", "sampling_strategy": "first:2"},
                        {"json_path": "{a,b}.jsonl", "sampling_strategy": "random:50%"}, {"json_path": "data.json"}]}
GENERATION = {"eos_token_id": [258, 256], "bos_token_id": 256, "pad_token_id": 256, "do_sample": True,
              "temperature": 0.1, "top_p": 0.001, "top_k": 1, "repetition_penalty": 1.1, "transformers_version": "4.40"}
TRAINING = ["--stage", "1", "--data", "data.json", "--out", "out", "--steps", "2", "--save-every", "1", "--batch-size",
            "2", "--workers", "0", "--device", "cpu", "--lr", "0.001"]


def tensors(model, *renamed):
    """A model's weights by other names: (our prefix, theirs)."""
    def theirs(name):
        return next((new + name[len(old):] for old, new in renamed if name.startswith(old)), name)
    own = as_in_files({name: p.detach().clone() for name, p in model.named_parameters()}, model.config)
    return {theirs(name): x for name, x in own.items()}


@lru_cache(maxsize=1)
def here():
    """A directory with a checkpoint of each family, training files and a run that was stopped; made once."""
    d = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, d, ignore_errors=True)
    worlds.write(d, n=6)
    lines = [json.dumps(x) + "\n" for x in json.loads((d / "data.json").read_text())]
    for name in "ab":
        (d / f"{name}.jsonl").write_text("".join(lines[:3]))
    visor, dense = tiny.model(**SMALL), tiny.model(visor=False, **SMALL)
    visor.save_pretrained(d / "visor")
    (d / "visor" / "generation_config.json").write_text(json.dumps(GENERATION))
    hf = tensors(dense, ("language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"),
                 ("vision_tower.", "vision_tower.vision_model."))
    write(d / "hf", hf, HF)
    write(d / "shards", hf, HF, shards=2)
    mm = "multi_modal_projector.linear_"
    write(d / "original", tensors(dense, ("language_model.", "model."), (mm + "1", "model.mm_projector.0"),
                                  (mm + "2", "model.mm_projector.2"), ("image_newline", "model.image_newline"),
                                  ("vision_tower.", "model.vision_tower.vision_tower.vision_model.")), ORIGINAL)
    tower = {k: v for k, v in tensors(dense, ("vision_tower.", "vision_model.")).items() if k.startswith("vision")}
    write(d / "siglip", tower, {"model_type": "siglip", "vision_config": TOWER})
    write(d / "qwen2", {k: v for k, v in tensors(dense, ("language_model.", "model.")).items()
                        if k.startswith(("model.", "lm_head"))}, TEXT)
    with quiet(), contextlib.chdir(d):
        train.main([*TRAINING, "--model", "visor"])
        shutil.rmtree("out/stage1-000002")  # the run was stopped after step 1
        (d / "out" / "bad.jsonl").write_text('{"stage": 1, "step": 1, "number": 1, "sample": "data.json, sample 1", '
                                             '"kind": "turns", "message": "turns are not ..."}\n')
        make_labels()
    return d


def stored(*names):
    return lambda: [(here() / name).read_bytes() for name in names]


@lru_cache
def pictures():
    """One of each format and of most modes."""
    exif, files = Image.Exif(), []
    exif[0x0112], exif[0x010F] = 6, "camera"
    image = tiny.image(23, 17)
    for kind, mode, how in (("PNG", "RGB", {"exif": exif, "dpi": (72, 72)}), ("PNG", "P", {}), ("PNG", "LA", {}),
                            ("PNG", "I;16", {}), ("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}),
                            ("JPEG", "L", {"progressive": True}), ("GIF", "P", {}), ("WEBP", "RGBA", {"exif": exif}),
                            ("BMP", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("TIFF", "F", {}),
                            ("PPM", "RGB", {})):
        file = io.BytesIO()
        grey = image.convert("L") if mode in ("I;16", "F") else image
        grey.convert(mode).save(file, kind, **how)
        files.append(file.getvalue())
    return files


@lru_cache
def sample_lines():
    said = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "Red."}, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    openai = [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "The first"}]
    return [json.dumps(x).encode() for x in ({"id": "1", "image": "0.png", "conversations": said},
                                             {"image": ["1.png", "2.png"], "conversations": openai},
                                             {"id": 3, "conversations": [{"from": "human", "value": "Hi"}, said[2]]})]


@lru_cache
def tokenizers():
    with_image = tiny.tokenizer()
    with_image.add_special_tokens(["<image>", "<video>"])
    files = [(ROOT / name).read_bytes() for name in ("nano/tokenizer.json", "tests/qwen2_cut.json")]
    return [tiny.tokenizer().to_str().encode(), with_image.to_str().encode(), *files]


def mixtures():
    return [json.dumps(MIXTURE).encode()]


def yaml_mixtures():
    return [*mixtures(), b"""datasets:
- json_path: data.json  # the first quarter
  sampling_strategy: "first:25%"
- {json_path: 'a.jsonl', sampling_strategy: end:1}
- json_path: "{a,b}.jsonl"
"""]


@lru_cache
def index_rows():
    """data.json.index.npy of a file whose time of change is known."""
    with contextlib.chdir(here()):
        os.utime("data.json", (1, 1))
        JsonIndex("data.json")
        return [Path("data.json.index.npy").read_bytes()]


# --- what is done with them; each kind runs in a copy of here() -----------------------------------------------------

tokenizer = lru_cache(tiny.tokenizer)


def read_picture(x):
    Path("picture").write_bytes(x)
    image = load_image("picture")
    for single in (True, False):
        data.process_image(image, tiny.config(), single)


def read_samples(name, x):
    """All that reads a training file: every sample under both rules, as --show prints it, as router.py asks it."""
    Path(name).write_bytes(x)
    for rule in ("assistant", "llava"):
        samples = Samples(name, None, tokenizer(), tiny.config(**SMALL), rule, max_tokens=500)
        for i in range(min(len(samples), 20)):
            if isinstance(samples[i], data.SampleError):
                check_line(f"{samples.where(i)}: {samples[i]}", ("sample",))
            else:
                print(llava.__main__.show(samples, i, colours=False))
    try:
        eval_questions(samples, 2)
    except ValueError as e:  # without a single image there is nothing to ask
        check_line(str(e), (".json: no question", ".jsonl: no question"))


def read_index(x):
    Path("data.json.index.npy").write_bytes(x)
    os.utime("data.json", (1, 1))
    samples = Samples("data.json", None, tokenizer(), tiny.config(**SMALL))
    for i in range(min(len(samples), 20)):
        if isinstance(samples[i], data.SampleError):
            check_line(f"{samples.where(i)}: {samples[i]}", ("sample",))


def use(name):
    """Loads a checkpoint, and asks it something."""
    families.VISION_TOWERS["tiny-siglip"] = TOWER  # in the forked process alone
    model = VLM.from_pretrained(name)
    c = model.config
    image = data.process_image(tiny.image(30, 20), c)
    prompt = data.encode(data.chatml(["<image>\nWhat?"]), model.tokenizer, [image])
    model.generate([prompt], max(c.viable, key=len, default=c.configuration("dense")), max_tokens=2)


def use_with(file, name, x):
    """`use`, with a file of the checkpoint replaced."""
    Path(file).write_bytes(x)
    use(name)


def count_with(x):
    Path("visor/config.json").write_bytes(x)
    command(flops.main, ["--model", "visor"])


def read_tokenizer(x):
    Path("tokenizer.json").write_bytes(x)
    read = families.load_tokenizer(".")
    families.vocabulary_size(read)
    read.decode(data.encode(data.chatml(["How many é?", "2", "\n<|im_end|>"]), read).ids)


class FewSteps(tqdm):
    """A training's bar that ends after two steps, however many a damaged file asks for."""

    def __iter__(self):
        return islice(super().__iter__(), 2)


def resume(file, x):
    """A run goes on with a damaged file."""
    fresh_run()
    Path("out", file).write_bytes(x)
    train.main([*TRAINING, "--resume"])


def resume_beside(strays):
    """A run goes on where its directory holds more than it has written: (name, file, directory or link)."""
    fresh_run()
    for name, kind in strays:
        path = Path("out", name)
        with contextlib.suppress(FileExistsError):
            path.mkdir() if kind == "directory" else path.symlink_to("nowhere") if kind == "link" else path.touch()
    train.main([*TRAINING, "--resume"])


def fresh_run():
    shutil.rmtree("out")
    shutil.copytree(here() / "out", "out")
    train.tqdm = FewSteps  # in the forked process alone


STRAYS = ["stage1-000000", "stage1-000003", "stage1-xxxxxx", "stage1-      ", "stage1-0000é2", "stage1-00000²",
          "x.png", "stage1-000001.9.writing", "stage2-000001", "stage0-000009", "stage1-999999", "stage1", "x.writing",
          "stage1-000002", "labels.jsonl", "table.json", "stage1--00001", "stage1-0x0001"]


def add_strays(rng, _):
    return [(rng.choice(STRAYS), rng.choice(("file", "directory", "link"))) for _ in range(rng.choice((1, 1, 2, 4)))]


def make_labels(x=None):
    """The router's labels: made, or gone on with from a file."""
    if x is not None:
        Path("labels.jsonl").write_bytes(x)
    model = VLM.from_pretrained("visor")
    questions = eval_questions(Samples("data.json", None, model.tokenizer, model.config), 2)
    router.pseudo_labels(model.config.plans, router.log_results("labels.jsonl", model, questions), "task", ())


def command(main, words):
    """A command as its script runs it, without what takes long."""
    llava.__main__.check, flops.plot = (lambda *_: ("", 0)), (lambda *_: None)  # in the forked process alone
    cli.run(lambda: main(list(words)))


# --- the kinds ------------------------------------------------------------------------------------------------------

MIXED = ("mix.", "json_path", "sampling_strategy", "no such training file", "file name too long")


def checkpoint(file, change=change_text, name=None, count=40, also="config.json"):
    """The kind that is one file of a checkpoint. also: what else an error line may name."""
    folder = str(Path(file).parent)
    names = f"{folder}/", "config.json", also
    return Kind(stored(file), change, partial(use_with, file, name or folder), names, count)


def running(file, change=change_text, count=20):
    """The kind that is one file of a run's directory."""
    return Kind(stored(f"out/{file}"), change, partial(resume, file), (Path(file).name,), count)


def commands(main, *lines):
    return Kind(lambda: [line.split() for line in lines], change_words, partial(command, main), count=200)


KINDS = {
    "picture": Kind(pictures, change_picture, read_picture, ("picture",), 250, 2000),
    "sample": Kind(sample_lines, change_json, partial(read_samples, "x.jsonl"), ("x.jsonl",), 200),
    "data.json": Kind(stored("data.json"), change_text, partial(read_samples, "x.json"), ("x.json",), 100),
    "data.jsonl": Kind(stored("a.jsonl"), change_lines, partial(read_samples, "x.jsonl"), ("x.jsonl",), 100),
    "index.npy": Kind(index_rows, change_bytes, read_index, ("data.json",), 80),
    "mixture.json": Kind(mixtures, change_text, partial(read_samples, "mix.json"), MIXED, 100),
    "mixture.yaml": Kind(yaml_mixtures, change_lines, partial(read_samples, "mix.yaml"), MIXED, 100),
    "config.json ours": checkpoint("visor/config.json"),
    "config.json llava-hf": checkpoint("hf/config.json"),
    "config.json lmms-lab": checkpoint("original/config.json"),
    "config.json siglip": checkpoint("siglip/config.json", name="siglip+qwen2"),
    "config.json qwen2": checkpoint("qwen2/config.json", name="siglip+qwen2"),
    "config.json flops": Kind(stored("visor/config.json"), change_text, count_with, ("config.json",), 150),
    "tokenizer.json": Kind(tokenizers, change_text, read_tokenizer, ("tokenizer.json",), 120),
    "generation_config.json": checkpoint("visor/generation_config.json", count=20),
    "safetensors": checkpoint("visor/model.safetensors", change_safetensors, count=80, also="language model's output"),
    "safetensors index": checkpoint("shards/model.safetensors.index.json"),
    "state.json": running("stage1-000001/state.json", count=40),
    "optimizer.safetensors": running("stage1-000001/optimizer.safetensors", change_safetensors),
    "log.jsonl": running("log.jsonl", change_lines),
    "bad.jsonl": running("bad.jsonl", change_lines),
    "labels.jsonl": Kind(stored("labels.jsonl"), change_lines, make_labels, ("labels.jsonl",), 20),
    "strays": Kind(lambda: [[]], add_strays, resume_beside, tuple(STRAYS), 20),
    "sample.py": commands(sample.parse, "--image a.png --q What? --model nano --sa 1,4 --max-tokens 8 --seed 3 --json",
                          "--image=a.png --q What? --q Why? --budget 0.5 --pack 2 --temperature 0.5 --top-p 0.9"),
    "train.py": commands(train.parse, "--stage 2 --model nano --data a.json --out out --steps 9 --lr 1e-4 --workers 0",
                         "--stage 3 --leave-out a --labels task --save-every 2 --keep 1 --questions 9 --threads 1"),
    "flops.py": commands(flops.main, "--image 1024x768 --text 40 --answer 16 --pack 2 --sa 1,4 --sa none --json",
                         "--model visor --tiles 3 --batch 4", "--text 40 --answer 16",
                         "--image 20x30 --image 9x999 --model llava-ov-7b"),
    "router.py": commands(router.parse, "--report --model nano --questions 9 --seed 1 --keep 0.9 --threads 2",
                          "--label out.jsonl --data a.json --images . --dtype float32"),
    "python -m llava": commands(llava.__main__.main, "--check data.json --model visor --workers 1 --max-tokens 500",
                                "--show data.json --index 2 --images . --model visor --label-rule llava"),
    "python -m toy": commands(toy.__main__.parse, "--show a.png --n 2 --seed 1", "--write out --n 3 --seed 0"),
}

# --- the tests -------------------------------------------------------------------------------------------------------

def pytest_generate_tests(metafunc):
    if "numbers" not in metafunc.fixturenames:
        return
    total, only = metafunc.config.getoption("--fuzz"), metafunc.config.getoption("--fuzz-only")
    share = total / sum(kind.count for kind in KINDS.values()) if total else 1
    runs = {name: range(max(1, round(kind.count * share))) for name, kind in KINDS.items()}
    if only:
        name, _, number = only.partition(":")
        runs = {name: [int(number)] if number else runs[name]}
    metafunc.parametrize("name, numbers", runs.items(), ids=list(runs))


def test_inputs(name, numbers, tmp_path):
    kind = KINDS[name]
    found = faults(kind, numbers, shutil.copytree(here(), tmp_path, dirs_exist_ok=True))
    text = [f"{len(found)} of {len(numbers)} inputs are received badly"]
    for n, number, x, (what, where, trace) in distinct(kind, found):
        text.append(f"{n} times, first with --fuzz-only '{name}:{number}'\n{short(x)}\n{trace}\n{what}  [{where}]")
    if found:
        pytest.fail("\n\n".join(text), pytrace=False)


def test_an_input_depends_on_its_kind_and_number_alone():
    for name, kind in KINDS.items():
        made = [kind.make(number) for number in range(20, 60)]
        assert made == [kind.make(number) for number in range(20, 60)], name
        assert len({repr(x) for x in made}) > 20, name


def raises(error):
    def run(x):
        raise error
    return run


PLANTED = {  # what is run, and the fault that is to be found
    "type": (lambda x: x + 1, "TypeError"), "key": (lambda x: {}[x], "KeyError"),
    "panic": (raises(BaseException("panic")), "BaseException"),
    "bare": (raises(ValueError("file: not enough values to unpack (expected 2, got 1)")), "Fault: bare Python"),
    "unnamed": (raises(ValueError("it is broken; get it again")), "Fault: names no file"),
    "lines": (raises(ValueError("file: broken\nget it again")), "Fault: more than one line"),
    "status": (lambda x: exit(1), "SystemExit"),
    "warning": (lambda x: np.float32(1) / np.float32(0), "Fault: a warning"),
    "surrogate": (lambda x: print("\ud800"), "Fault: bare Python"),
    "hang": (lambda x: [None for i in iter(int, 1)], "Hang: more than 0.4"),
    "hang in C": (lambda x: sum(range(1 << 50)), "Hang: more than 0.4 s, not"),
    "memory": (lambda x: len(bytearray(b"x") * (300 << 20)), "Fault: memory"),
    "all memory": (lambda x: bytearray(1 << 40), "MemoryError"),
    "killed": (lambda x: os.kill(os.getpid(), signal.SIGKILL), "Fault: exit status -9"),
    "good": (raises(ValueError("file: broken; get it again")), None), "well": (len, None)}


@pytest.mark.parametrize("name", PLANTED)
def test_the_harness_finds_what_is_planted(name, tmp_path):
    """And nothing in the input after it, which is as it should be."""
    run, wanted = PLANTED[name]
    kind = Kind(lambda: ["as it should be"], lambda rng, x: "bad", lambda x: x == "bad" and run(x), ("file",))
    found = faults(kind, [1, 0], tmp_path, seconds=0.4 if "Hang" in (wanted or "") else 10)
    assert [number for number, _ in found] == [1] * bool(wanted)
    assert not wanted or found[0][1][0].startswith(wanted)


def test_memory_that_the_process_kept_hides_nothing(tmp_path):
    cli.keep_freed_memory()
    len(bytearray(b"x") * (400 << 20))  # freed at once, and kept
    test_the_harness_finds_what_is_planted("memory", tmp_path)


def test_an_input_as_it_should_be_may_not_be_refused(tmp_path):
    refuse = raises(ValueError("file: broken; get it again"))
    kind = Kind(lambda: ["as it should be"], lambda rng, x: x, refuse, ("file",))
    (number, (what, _, _)), = faults(kind, [0, 1], tmp_path)
    assert number == 0 and what.startswith("ValueError")
