"""Runs that are stopped, damaged, doubled or fed nothing: no work is lost, and each says in one line what is wrong."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import cli
import router
import train
import weights as weights_of_files
from evaluation import all_results
from model import VLM
from tests import tiny
from tests.test_llava_training import ONE_THREAD, ROOT, arguments, call, files, log, weights  # noqa: F401 a fixture


def last_error(capsys):
    """The last line on stderr, which is the only one that begins with error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    return lines[-1]


def edit(file, change):
    """Changes a JSON object in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# --- numbers that are not finite ---

@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(where, broken, files, tmp_path, monkeypatch, capsys):
    """Step 4 of 8 goes wrong: what was saved after step 3 stays, and is finite; no row says NaN."""
    real, count = VLM.answer_loss, []

    def wrong(self, h, *rest):
        count.append(1)
        if len(count) != 4:
            return real(self, h, *rest)
        loss = real(self, h, *rest)
        if where == "loss":
            return loss * broken
        h.register_hook(lambda g: g * broken)
        return loss
    monkeypatch.setattr(VLM, "answer_loss", wrong)
    more = ("--steps", 8, "--save-every", 1, "--keep", 9, "--batch-size", 3)
    assert call(*arguments(files, tmp_path, *more)) == 2
    error = last_error(capsys)
    assert "step 4" in error and "stage2-000003" in error and "--lr" in error
    assert [p.name for p in checkpoints.checkpoints(tmp_path, [2])] == [f"stage2-00000{i}" for i in (1, 2, 3)]
    assert all(x.isfinite().all() for x in weights(checkpoints.newest(tmp_path, [2])).values())
    assert len(log(tmp_path)) == 3 and "NaN" not in (tmp_path / "log.jsonl").read_text()


def broken_model(number, layer="layers.0.mlp.down_proj.weight"):
    model = tiny.model()
    model.add_router(0.5)
    with torch.no_grad():
        dict(model.named_parameters())[layer if "router" in layer else f"language_model.{layer}"][0] = number
    return model


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("layer", ["layers.0.mlp.down_proj.weight", "layers.5.mlp.down_proj.weight", "norm.weight"])
def test_generation_refuses_logits_that_are_not_finite(number, temperature, layer):
    from data import encode
    model = broken_model(number, layer)
    prompt = encode("what?", model.tokenizer)
    with pytest.raises(ValueError, match="not finite.*weights are broken"):
        model.generate([prompt], (1,), max_tokens=3, temperature=temperature)


def test_float16_gets_advice_of_its_own():
    assert "--dtype bfloat16" in str(cli.not_finite("x", torch.float16))
    assert "--dtype" not in str(cli.not_finite("x", torch.float32))


def test_a_router_that_is_not_finite_chooses_nothing():
    from data import chatml, encode
    model = broken_model(math.nan, "router.layers.token")
    with pytest.raises(ValueError, match="router's output is not finite"):
        model.generate([encode(chatml(["what?"]), model.tokenizer)], "auto", max_tokens=3)


def test_evaluation_refuses_losses_that_are_not_finite():
    model = broken_model(math.nan)
    eval_set = [(tiny.image(40, 40), [("task", "what?", "x")])]
    with pytest.raises(ValueError, match="loss of configuration 1 is not finite"):
        all_results(model.remove_router(), eval_set, model.config.plans)


@pytest.mark.parametrize("device, has_it, parameters, chosen", [
    ("cuda", True, 1e6, torch.bfloat16), ("cuda:1", True, 1e9, torch.bfloat16), ("cuda", False, 1e9, torch.float32),
    ("cpu", True, 1e9, torch.bfloat16), ("cpu", True, 7e5, torch.float32), ("cpu", False, 1e9, torch.float32)])
def test_auto_is_bfloat16_where_it_is_fast_and_never_float16(device, has_it, parameters, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_it)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_it)
    assert cli.choose_dtype("auto", device, parameters)[0] == chosen
    for asked in ("float16", torch.float16):
        assert cli.choose_dtype(asked, device, parameters)[0] == torch.float16


# --- runs that learn nothing ---

def samples(tmp_path, n, **changes):
    """A training file of n samples about one image, changed."""
    tiny.image(40, 40).save(tmp_path / "p.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "x"}]
    rows = [{"id": str(i), "image": "p.png", "conversations": turns, **changes} for i in range(n)]
    (tmp_path / "d.json").write_text(json.dumps([{k: v for k, v in r.items() if v is not None} for r in rows]))
    return "--data", tmp_path / "d.json"


TEXT = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "x"}]


@pytest.mark.parametrize("steps", [2, 30])
@pytest.mark.parametrize("changes, flags, stage, message", [
    ({}, ("--max-tokens", 5), 2, "too long"), ({"image": "no.png"}, (), 2, "no.png"),
    ({"image": None, "conversations": TEXT}, (), 1, "no sample has an image"),
    ({"conversations": []}, ("--max-bad", 1), 2, "bad.jsonl")])
def test_a_run_that_learns_nothing_stops_and_leaves_no_checkpoint(steps, changes, flags, stage, message, files,
                                                                  tmp_path, capsys):
    data = samples(tmp_path, 1000, **changes)
    model = "dense" if stage == 1 else "visor"
    assert call(*arguments(files, tmp_path / "o", *data, "--steps", steps, *flags, "--lr", 1, stage=stage,
                           model=model)) == 2
    assert message in last_error(capsys) and not checkpoints.newest(tmp_path / "o", [1, 2])


def test_text_alone_is_learned_in_stage_2(files, tmp_path):
    data = samples(tmp_path, 20, image=None, conversations=TEXT)
    assert call(*arguments(files, tmp_path / "o", *data, "--steps", 2)) == 0


# --- stages in their order ---

def test_stage_2_of_a_dense_model_is_refused_or_meant(files, tmp_path, capsys):
    assert call(*arguments(files, tmp_path, "--steps", 1, model="dense")) == 2
    error = last_error(capsys)
    assert "--stage 1 --model" in error and "--skip-stage-1" in error
    assert call(*arguments(files, tmp_path, "--steps", 1, "--skip-stage-1", model="dense")) == 0


def test_stage_3_comes_after_stage_2(files, tmp_path, capsys):
    for model, missing in (("dense", 1), (tmp_path / "stage1-000001", 2)):
        assert call(*arguments(files, tmp_path / "o", model=model, stage=3)[:-6]) == 2
        assert f"stage {missing}" in last_error(capsys)
        if missing == 1:
            assert call(*arguments(files, tmp_path, "--steps", 1, model="dense", stage=1)) == 0


def test_the_miniatures_stage_2_begins_with_its_stage_1(tmp_path, capsys, monkeypatch):
    """And only where there is none; --resume goes on within the first, too."""
    monkeypatch.setitem(train.RECIPES, 1, {**train.RECIPES[1], "steps": 4})
    monkeypatch.setattr(train, "print_report", lambda *_: None)
    words = ["--stage", 2, "--steps", 2, "--lr", 0.001, "--save-every", 1, "--out", tmp_path]
    assert call(*words) == 0
    assert "stage 1 first" in capsys.readouterr().err
    assert [p.name for p in checkpoints.checkpoints(tmp_path, [1, 2])][-3:] == ["stage1-000004", "stage2-000001",
                                                                              "stage2-000002"]
    assert json.loads((tmp_path / "stage1-000004/state.json").read_text())["lr"] == train.RECIPES[1]["lr"]
    for stage in ("stage2", "stage1-000004"):
        [shutil.rmtree(p) for p in tmp_path.glob(f"{stage}*")]
    assert call(*words, "--resume") == 0 and checkpoints.newest(tmp_path, [2]).name == "stage2-000002"
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize("layers", [6, 9, 12, 24, 28, 36])
def test_default_configurations_can_be_routed(layers):
    c = tiny.config(layers=layers).add_visor()
    assert len(c.viable) > 1 and any(l < c.route_layer for l in (*c.ca, *c.viable[0]))
    assert all(c.sa[0] in v for v in c.viable)
    if layers in (6, 28):
        model = VLM(tiny.config(layers=layers))
        model.add_cross_attention().add_router()


@pytest.mark.parametrize("smoothing", [0.02, 0.06, 0.3])
@pytest.mark.parametrize("n", [2, 3, 6, 13])
def test_the_threshold_is_above_what_smoothing_gives_to_wrong_ones(smoothing, n):
    wrong, right = smoothing / n, 1 - smoothing + smoothing / n
    assert wrong < router.conservative_threshold(smoothing, n) <= right
    assert router.conservative_threshold(0.0, n) == 1
    assert router.conservative_threshold(0.06, 6) == pytest.approx(0.02)


def test_a_copy_of_a_checkpoint_is_a_model_as_any_other(files, stopped, tmp_path, capsys):
    """Under another name it begins a stage; under its own, the line says that its stage is not at its end."""
    shutil.copytree(stopped / "stage2-000002", tmp_path / "mine")
    for model, unfinished in ((tmp_path / "mine", False), (stopped / "stage2-000002", True)):
        assert call(*arguments(files, tmp_path / model.name, "--steps", 1, model=model)) == 0
        assert ("has only 2 of its 4 steps" in capsys.readouterr().err) == unfinished


# --- resuming ---

@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory):
    """A run after 2 of its 4 steps."""
    out = tmp_path_factory.mktemp("stopped")
    assert call(*arguments(files, out, "--steps", 4, "--save-every", 2, "--keep", 9)) == 0
    shutil.rmtree(out / "stage2-000004")
    return out


@pytest.fixture
def half(files, stopped, tmp_path):
    """(a copy of it, its command line)."""
    out = shutil.copytree(stopped, tmp_path / "o")
    return out, arguments(files, out, "--steps", 4, "--save-every", 2, "--keep", 9)


@pytest.mark.parametrize("flag, value", [("--lr", 0.5), ("--batch-size", 16), ("--steps", 8), ("--seed", 7),
                                         ("--label-rule", "llava"), ("--max-tokens", 5), ("--viable", "1")])
def test_flags_that_a_resumed_run_does_not_follow_are_named(flag, value, half, capsys):
    out, words = half
    assert call(*words, "--resume", flag, value) == 0
    assert f"does not follow {flag}" in capsys.readouterr().err
    state = json.loads((out / "stage2-000004/state.json").read_text())
    assert state.get(flag[2:].replace("-", "_")) != value and len(log(out)) == 4


def test_flags_that_it_follows_or_has_are_not_named(half, capsys):
    out, words = half
    assert call(*words, "--resume", "--save-every", 1, "--workers", 0, "--threads", 1, "--keep", 5) == 0
    assert "does not follow" not in capsys.readouterr().err and (out / "stage2-000003").is_dir()


def test_there_must_be_something_to_resume(files, half, tmp_path, capsys):
    out, words = half
    assert call(*arguments(files, tmp_path / "typo", "--resume")) == 2
    assert "typo holds no run of this stage" in last_error(capsys) and not (tmp_path / "typo").exists()
    shutil.rmtree(out / "stage2-000002")  # killed before its first checkpoint
    assert call(*words, "--resume") == 0 and len(log(out)) == 4


DAMAGE = {
    "zeros": ("log.jsonl", b"\0" * 40 + b"\n"), "a blank line": ("log.jsonl", b"\n"),
    "a note": ("log.jsonl", b'{"note": 1}\n'), "no object": ("log.jsonl", b"[]\n"), "latin": ("log.jsonl", b"\xe9\n"),
    "deep": ("log.jsonl", b"[" * 99999 + b"\n"), "bad": ("bad.jsonl", b"oops\n"), "bad note": ("bad.jsonl", b"{}\n"),
    "cut off": ("log.jsonl", b'{"stage": 2, "step"')}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_log_does_not_block_resuming(what, half):
    out, words = half
    file, rubbish = DAMAGE[what]
    with open(out / file, "ab") as f:
        f.write(rubbish)
    assert call(*words, "--resume") == 0
    assert [row["step"] for row in log(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize("name, content", [
    ("state.json", b""), ("state.json", b"[]"), ("state.json", b"{}"), ("state.json", b"[" * 99999),
    ("optimizer.safetensors", b""), ("optimizer.safetensors", b"\xff" * 99), ("config.json", b"{"),
    ("model.safetensors", b"x"), ("tokenizer.json", b"{}")])
def test_a_damaged_checkpoint_names_its_file(name, content, half, capsys):
    out, words = half
    (out / "stage2-000002" / name).write_bytes(content)
    assert call(*words, "--resume") == 2
    assert f"stage2-000002/{name}" in last_error(capsys)


@pytest.mark.parametrize("field, value", [
    ("steps", "4"), ("steps", 0.5), ("lr", None), ("lr", math.inf), ("seed", -1), ("seed", True), ("warmup", [1]),
    ("dtype", "int8"), ("keep", 10**60), ("unheard_of", 1), ("label_rule", {}), ("threads", 0)])
def test_a_damaged_setting_is_named(field, value, half, capsys):
    out, words = half
    edit(out / "stage2-000002/state.json", lambda s: s.update({field: value}))
    assert call(*words, "--resume") == 2
    assert f"state.json: damaged ({'setting ' * (field == 'unheard_of')}{field}" in last_error(capsys)


@pytest.mark.parametrize("damage", ["truncated", "renamed", "reshaped", "nan"])
def test_a_damaged_optimiser_is_named(damage, half, capsys):
    out, words = half
    file = out / "stage2-000002/optimizer.safetensors"
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        found = load_file(file)
        name = next(n for n, x in found.items() if x.ndim == 2)
        x = found.pop(name)
        save_file({**found, **{"renamed": {"x" + name: x}, "reshaped": {name: x[1:].clone()},
                               "nan": {name: x * math.nan}}[damage]}, file)
    assert call(*words, "--resume") == 2
    assert "optimizer.safetensors: damaged" in last_error(capsys)


@pytest.mark.parametrize("name", ["stage2-000009", "stage2-00000x", "stage2-backup", "stage2-000002.77.writing"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_named_like_a_checkpoint_is_none(name, kind, half):
    out, words = half
    (out / name).mkdir() if kind == "directory" else (out / name).write_text("")
    assert checkpoints.newest(out, [2]).name == "stage2-000002"
    assert call(*words, "--resume") == 0


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("stage2-999999", "stage2-1000000", "stage1-2000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert checkpoints.newest(tmp_path, [1, 2]).name == "stage2-1000000"


def test_two_runs_in_one_directory(files, tmp_path, capsys):
    """The second is refused while the first writes, and the first notices nothing."""
    holder = subprocess.Popen([sys.executable, "-c", "import sys; from pathlib import Path; from checkpoints import "
                               f"locked\nwith locked(Path({str(tmp_path / 'o')!r})): print(flush=True); input()"],
                              cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert call(*arguments(files, tmp_path / "o", "--steps", 1)) == 2
    assert f"written to by process {holder.pid}" in last_error(capsys)
    holder.kill()  # however it ends
    holder.wait()
    assert call(*arguments(files, tmp_path / "o", "--steps", 1)) == 0


def test_sigterm_saves_and_its_readers_end_with_it(files, tmp_path):
    """SIGTERM: status 143, and the run goes on to the same bits. SIGKILL: no reading worker is left behind."""
    words = [sys.executable, "train.py", *arguments(files, tmp_path / "o", "--steps", 30, "--save-every", 1000,
                                                    "--threads", 1), "--workers", "2"]

    def started(*more):
        run = subprocess.Popen(words + [*more], cwd=ROOT, env=ONE_THREAD, stderr=subprocess.DEVNULL)
        n = len((tmp_path / "o/log.jsonl").read_text().splitlines()) if (tmp_path / "o/log.jsonl").exists() else 0
        while len(log(tmp_path / "o") if (tmp_path / "o/log.jsonl").exists() else []) < n + 3:
            assert run.poll() is None
            time.sleep(0.02)
        return run
    run = started()
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143 and checkpoints.newest(tmp_path / "o", [2])
    run = started("--resume")
    children = (ROOT / f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    run.wait()
    time.sleep(0.3)
    assert children and not [c for c in children if os.path.exists(f"/proc/{c}")
                             and "Z" not in open(f"/proc/{c}/stat").read().split()[2]]
    assert call(*words[2:], "--resume") == 0
    assert call(*arguments(files, tmp_path / "whole", "--steps", 30)) == 0
    a, b = (weights(checkpoints.newest(tmp_path / part, [2])) for part in ("o", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_full_disk_is_one_line_and_nothing_is_lost(half, tmp_path, monkeypatch, capsys):
    """In the optimisers' file, in the model's, and in the log."""
    out, words = half
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    for target, name in ((checkpoints, "write_tensors"), (weights_of_files, "save_file"), (out, "log.jsonl")):
        with monkeypatch.context() as m:
            if target is out:
                (out / name).rename(tmp_path / name)
                (out / name).symlink_to("/dev/full")
            else:
                m.setattr(target, name, full)
            assert call(*words, "--resume") == 2
        if target is out:
            (tmp_path / name).replace(out / name)
        assert "no space left on device" in last_error(capsys) and not list(out.glob("*.writing"))
        after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "lock"}
        assert {p: c for p, c in after.items() if p.name != "log.jsonl"} == {p: c for p, c in before.items()
                                                                          if p.name != "log.jsonl"}
    assert call(*words, "--resume") == 0 and [row["step"] for row in log(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize("also", [[], ["--data", "other.json"]], ids=["without", "with another"])
def test_resuming_with_other_data_is_no_damage(also, half, tmp_path, monkeypatch, capsys):
    """A forgotten --data, or another file: the line names it, and does not advise to remove anything."""
    out, words = half
    (tmp_path / "other.json").write_text(json.dumps([{"conversations": TEXT}]))
    monkeypatch.chdir(tmp_path)
    for flag in ("--data", "--micro-batch-size"):
        i = words.index(flag)
        words = words[:i] + words[i + 2:]
    assert call(*words, *also, "--resume") == 2
    assert "--data" in (error := last_error(capsys)) and "remove" not in error


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_stands_where_a_checkpoint_goes_is_moved_aside(kind, half):
    out, words = half
    stray = out / "stage2-000004"
    {"file": lambda: stray.write_text("mine"), "directory": lambda: (stray / "model.safetensors").mkdir(parents=True),
     "link": lambda: stray.symlink_to("nowhere")}[kind]()
    assert call(*words, "--resume") == 0 and checkpoints.newest(out, [2]) == stray
    assert [name for name in os.listdir(out) if name.startswith("stage2-000004.") and name.endswith(".stray")]


@pytest.mark.parametrize("change", ["empty", "one missing", "scalar", "half precision"])
def test_an_incomplete_optimiser_is_named(change, half, capsys):
    out, words = half
    file = out / "stage2-000002/optimizer.safetensors"
    found = load_file(file)
    name = next(n for n, x in found.items() if n.endswith(".exp_avg"))
    x = found.pop(name)
    found = {} if change == "empty" else found
    if change in ("scalar", "half precision"):
        found[name] = torch.tensor(1.0) if change == "scalar" else x.half()
    save_file(found, file)
    assert call(*words, "--resume") == 2
    assert "optimizer.safetensors: damaged" in last_error(capsys)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_each_signal_saves_unless_it_is_ignored(number, half, monkeypatch):
    real, out, words = VLM.answer_loss, *half
    monkeypatch.setattr(VLM, "answer_loss", lambda *args: signal.raise_signal(number) or real(*args))
    before = signal.signal(number, signal.SIG_DFL)  # what started the tests may have it ignored
    try:
        assert call(*words, "--resume", "--steps", 4) == 128 + number and checkpoints.newest(out, [2]).name[-1] == "3"
        signal.signal(number, signal.SIG_IGN)       # as nohup does
        assert call(*words, "--resume") == 0
    finally:
        signal.signal(number, before)


def test_nobody_at_stderr_ends_no_training(files, tmp_path):
    words = [sys.executable, "train.py", *arguments(files, tmp_path / "o", "--steps", 12, "--threads", 1)]
    run = subprocess.Popen(words, cwd=ROOT, env=ONE_THREAD, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    run.stderr.read(40)
    run.stderr.close()
    assert run.wait(90) == 0 and (tmp_path / "o/stage2-000012").is_dir()


@pytest.mark.parametrize("rubbish", ["", "oops", "[]", "{}", "null", '{"image": 0}'])
@pytest.mark.parametrize("line", [1, 3])
def test_damaged_labels_are_made_anew(rubbish, line, tmp_path):
    """From the first batch that is damaged on; a head that is another one is refused."""
    model = tiny.model()
    eval_set = [(tiny.image(40, 40, i), [("task", f"what {i}?", "x")]) for i in range(6)]
    whole = router.log_results(tmp_path / "l.jsonl", model, eval_set)
    lines = (tmp_path / "l.jsonl").read_text().split("\n")
    lines[line] = rubbish
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    assert router.log_results(tmp_path / "l.jsonl", model, eval_set) == whole
    (tmp_path / "l.jsonl").write_text("\n".join(["{}", *lines[1:]]))
    with pytest.raises(ValueError, match="another model or evaluation set"):
        router.log_results(tmp_path / "l.jsonl", model, eval_set)


# --- threads ---

@pytest.mark.parametrize("cores, busy, threads", [(2, 0, 2), (2, 1, 1), (2, 2, 1), (8, 3, 5), (8, 8, 1)])
def test_as_many_threads_as_idle_cores(cores, busy, threads, monkeypatch):
    ticks = iter([[0] * 10, [100 * busy, 0, 0, 100 * (cores - busy), 0, 0, 0, 0, 0, 0]])
    monkeypatch.setattr(cli, "cpu_times", lambda: next(ticks))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(cli.time, "sleep", lambda _: None)
    assert cli.free_threads() == threads


def test_a_run_keeps_its_number_of_threads(half, monkeypatch):
    out, words = half
    edit(out / "stage2-000002/state.json", lambda s: s.update(threads=2))
    monkeypatch.setattr(train, "free_threads", lambda: 1)
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    assert call(*words, "--resume") == 0 and used[-1] == 2
