"""Training on files: kills and resumes, several processes, samples with errors, and that the loss is the plain one."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import router
import train
from cli import run
from config import Plan
from llava.batches import ConversationBatches
from llava.samples import Samples
from model import VLM
from parallel import Distributed, LossModule
from tests import tiny, worlds
from tests.test_loading import joined

ROOT = Path(__file__).parent.parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with data.json, a dense model and a VISOR."""
    directory = tmp_path_factory.mktemp("files")
    worlds.write(directory)
    tiny.model(visor=False).save_pretrained(directory / "dense")
    tiny.model().save_pretrained(directory / "visor")
    return directory


def arguments(files, out, *more, stage=2, model="visor"):
    return [str(x) for x in ("--stage", stage, "--model", files / model, "--data", files / "data.json", "--out", out,
                             "--batch-size", 8, "--micro-batch-size", 3, "--lr", 0.001, "--workers", 0, *more)]


def call(*words, main=train.main):
    try:
        run(lambda: main([str(w) for w in words]))
    except SystemExit as e:
        return e.code
    return 0


def log(out):
    return [x for x in map(json.loads, open(out / "log.jsonl")) if "loss" in x]


def weights(directory):
    return dict(VLM.from_pretrained(directory).named_parameters())


def batches_of(files, out, **settings):
    """(ConversationBatches of data.json, model)."""
    model = VLM.from_pretrained(files / "visor").remove_router()
    samples = Samples(files / "data.json", None, model.tokenizer, model.config)
    settings = {**train.DEFAULTS, "batch_size": 12, "seed": 0, "steps": 1000, **settings}
    return ConversationBatches(model, 2, samples, settings, out, Distributed("cpu")), model


def test_the_loss_and_its_gradient_are_the_plain_ones(files, tmp_path):
    """Micro-batches of 3, sorted and padded, against one sample at a time and the mean over all targets."""
    for sa in ((), (1,), (1, 4)):
        batches, model = batches_of(files, tmp_path, micro_batch_size=3)
        items = next(batches.batches(5))
        assert len(items) == 12 and any(not x.prompt.images for _, x in items)
        assert any(len(x.prompt.images) > 1 for _, x in items)
        value = 0.0
        for loss in batches.losses(items, Plan(sa), 0):
            loss.backward()
            value += loss.item()
        ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        losses = []
        for _, x in items:
            logits = model.head(model(data.collate([x.prompt]), sa))[0]
            for i in range(1, len(x.labels)):
                if x.labels[i] >= 0:
                    losses.append(-logits[i - 1].log_softmax(-1)[x.labels[i]])
        plain = torch.stack(losses).mean()
        plain.backward()
        assert value == pytest.approx(plain.item(), rel=1e-5)
        assert batches.tokens == sum(x.prompt.end for _, x in items)
        for n, p in model.named_parameters():
            if p.grad is not None:
                assert torch.allclose(ours[n], p.grad, atol=1e-4 * p.grad.abs().max() + 1e-7), n


def test_chunks_of_the_loss_change_nothing():
    model, rng = tiny.model(), np.random.default_rng(0)
    h, labels = torch.randn(2, 30, 64, requires_grad=True), rng.integers(-1, 259, (2, 30))
    t_pos = np.tile(np.arange(30), (2, 1))
    t_pos[1, 11:] += 40  # an image stands before token 11, which is thus no target
    mask = labels[:, 1:] >= 0
    mask[1, 10] = False
    assert np.array_equal(data.target_mask(labels, t_pos), mask)
    plain = F.cross_entropy(model.head(h[:, :-1][torch.from_numpy(mask)]), torch.from_numpy(labels[:, 1:][mask]),
                            reduction="sum")
    wanted = torch.autograd.grad(plain, [h, model.lm_head.weight])
    for chunk in (1, 7, 1000):
        loss = model.answer_loss(h, labels, t_pos, chunk)
        assert torch.allclose(loss, plain, rtol=1e-5)
        for a, b in zip(torch.autograd.grad(loss, [h, model.lm_head.weight]), wanted):
            assert torch.allclose(a, b, atol=1e-4 * b.abs().max())


def test_adamw_has_no_weight_decay(files):
    """And the whole learning rate: what has no gradient stays as it is (paper 5.1)."""
    model = VLM.from_pretrained(files / "visor")
    opts = train.optimizers(model, 0.01)
    (opt, names, lr), = opts.values()
    group, = opt.param_groups
    assert list(opts) == ["adamw"] and type(opt) is torch.optim.AdamW and sorted(names) == sorted(
        n for n, _ in model.named_parameters())
    assert lr == group["lr"] == 0.01 and group["weight_decay"] == 0 and group["betas"] == (0.9, 0.999)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_stage_1_moves_the_cross_attentions_alone(files, tmp_path):
    assert call(*arguments(files, tmp_path, "--steps", 3, stage=1, model="dense")) == 0
    before, after = weights(files / "dense"), weights(train.newest(tmp_path, [1]))
    assert {n for n in after if n not in before or not torch.equal(before[n], after[n])} == {
        n for n in after if ".cross." in n}


def test_stage_0_of_a_joined_model_trains_its_connector(files, tmp_path):
    name = joined(tmp_path, tiny.model(visor=False, tied=True))
    assert call("--stage", 0, "--model", name, "--data", files / "data.json", "--out", tmp_path, "--steps", 3,
                "--save-every", 1, "--keep", 3, "--batch-size", 4, "--workers", 0) == 0
    shutil.rmtree(tmp_path / "stage0-000003")
    assert call("--stage", 0, "--model", name, "--data", files / "data.json", "--out", tmp_path, "--resume") == 0
    first, last = (weights(tmp_path / f"stage0-{step:06}") for step in (1, 3))  # the connector starts at random
    moved = {n for n in last if not torch.equal(first[n], last[n])}
    assert moved == {"image_newline", *(n for n in last if n.startswith("multi_modal_projector."))}
    joined_weights = weights(name)
    assert all(torch.equal(joined_weights[n], last[n]) for n in joined_weights if n not in moved)


def test_flags_that_change_no_result(files, tmp_path):
    """Workers, activation checkpointing and smaller micro-batches; compiled blocks are in test_compile."""
    runs = {"plain": [], "workers": ["--workers", 2], "checkpointing": ["--checkpointing"],
            "micro-batches": ["--micro-batch-size", 1]}
    for name, flags in runs.items():
        assert call(*arguments(files, tmp_path / name, "--steps", 4, *flags)) == 0
    plain = [x["loss"] for x in log(tmp_path / "plain")]
    assert len(set(plain)) == 4
    for name in runs:
        same = [x["loss"] for x in log(tmp_path / name)]
        assert same == (pytest.approx(plain, abs=1e-4) if name == "micro-batches" else plain)


def test_overfitting_one_batch(files, tmp_path, capsys):
    assert call(*arguments(files, tmp_path, "--steps", 60, "--overfit", "--batch-size", 3, "--lr", 0.003,
                           "--viable", "1,4", "--sample-every", 60)) == 0
    assert log(tmp_path)[-1]["loss"] < 0.05
    shown = json.loads(open(tmp_path / "log.jsonl").readlines()[-1])
    assert shown["answer"] == shown["wanted"] and shown["question"] in capsys.readouterr().err


def test_stage_3_on_a_mixture(files, tmp_path, capsys):
    """Labels for each file of it; the evaluation set are the first questions about single images."""
    (tmp_path / "mix.yaml").write_text("datasets:\n" + "".join(
        f"  - json_path: {files / 'data.json'}\n    sampling_strategy: {s}\n" for s in ("first:12", "end:9")))
    flags = ["--stage", 3, "--model", files / "routed", "--data", tmp_path / "mix.yaml", "--steps", 3]
    flags += ["--batch-size", 4]
    model = tiny.model(visor=False).add_cross_attention((1, 2, 5), (0, 3), [(0,), (0, 3)])
    model.save_pretrained(files / "routed")
    assert call(*flags, "--out", tmp_path / "out") == 0
    lines = [json.loads(x) for x in open(tmp_path / "out" / "labels.jsonl").readlines()[1:]]
    rows = json.loads((files / "data.json").read_text())
    single = [x for x in rows[:12] + rows[15:]
              if "image" in x and (isinstance(x["image"], str) or len(x["image"]) == 1)]
    assert sorted((x["question"], x["answer"]) for x in lines) == sorted(
        (x["conversations"][0]["value"].removeprefix("<image>\n"), x["conversations"][1]["value"]) for x in single)
    before, after = weights(files / "routed"), weights(train.newest(tmp_path / "out", [3]))
    assert {n for n in after if n not in before or not torch.equal(before[n], after[n])} == {
        n for n in after if n.startswith("router.")}
    out = capsys.readouterr().out
    routed = train.newest(tmp_path / "out", [3])
    # As in the paper: plain cross-entropy, and the likeliest configuration
    assert json.loads((routed / "state.json").read_text())["label_smoothing"] == 0
    assert VLM.from_pretrained(routed).config.route_threshold == 1
    assert "routed to, %" in out and "\ndata " in out and out.splitlines()[-1] == str(routed)
    words = "--report", "--model", routed
    assert call(*words, "--data", files / "data.json", "--questions", 3, main=router.main) == 0
    assert "\ndata " in capsys.readouterr().out
    assert call(*words, main=router.main) == 2 and "--data FILE" in capsys.readouterr().err
    assert call(*flags, "--out", tmp_path / "b", "--leave-out", "nothing") == 2
    assert "leave out some" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_arithmetic(files, tmp_path, capsys, stage):
    """As on CUDA by default; answers are shown in between."""
    tiny.model(visor=False).add_cross_attention((1, 2, 5), (0, 3), [(0,), (0, 3)]).save_pretrained(files / "visor")
    more = ["--sample-every", 2] if stage < 3 else []
    assert call("--stage", stage, "--model", files / "visor", "--data", files / "data.json", "--out", tmp_path / "out",
                "--steps", 4, "--batch-size", 4, "--dtype", "bfloat16", *more) == 0
    now = weights(train.newest(tmp_path / "out", [stage]))
    assert all(x.dtype == torch.float32 for x in now.values())


def test_bfloat16_learns_as_float32(files, tmp_path):
    """Losses stay within 1 % of one another over 20 steps that bring them down."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        flags = arguments(files, tmp_path / dtype, "--steps", 20, "--dtype", dtype, "--skip-stage-1")
        assert call(*flags, "--batch-size", 4) == 0
        losses[dtype] = np.array([row["loss"] for row in log(tmp_path / dtype) if "loss" in row])
    assert losses["float32"][-1] < 0.7 * losses["float32"][0]
    assert (abs(losses["bfloat16"] - losses["float32"]) < 0.01 * losses["float32"]).all()


# --- kills ---

KILLER = """
import os, signal
import checkpoints, cli, train
calls = []
def deadly(real):
    def wrapper(*args, **kwargs):
        calls.append(1)
        if len(calls) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return wrapper
{where} = deadly({where})
cli.run(train.main)
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(files, tmp_path):
    """All in processes of their own with one thread: how many there are decides how sums are rounded."""
    flags = arguments(files, tmp_path / "whole", "--steps", 24, "--save-every", 5, "--seed", 2)
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, env=ONE_THREAD, check=True)
    flags[flags.index(str(tmp_path / "whole"))] = str(tmp_path / "parts")

    def killed(code, *more):
        done = subprocess.run([sys.executable, "-c", code, *flags, *more], cwd=ROOT, env=ONE_THREAD,
                              capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    killed(KILLER.format(where="checkpoints.write_tensors", at=2))       # within a save: weights are there, moments not
    assert [p.name for p in (tmp_path / "parts").glob("stage2*writing")]
    assert train.newest(tmp_path / "parts", [2]).name == "stage2-000005"
    killed(KILLER.format(where="cli.os.replace", at=7), "--resume")   # at one of the renames of a save
    assert train.newest(tmp_path / "parts", [2]).name == "stage2-000015"
    killed(KILLER.format(where="train.lr_factor", at=4), "--resume")  # between loss and update
    for _ in range(2):                                            # and just anywhere
        process = subprocess.Popen([sys.executable, "train.py", *flags, "--resume"], cwd=ROOT, env=ONE_THREAD,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        process.stderr.readline()
        time.sleep(random.uniform(0.0, 1.5))
        process.kill()
        process.wait()
    subprocess.run([sys.executable, "train.py", *flags, "--resume"], cwd=ROOT, env=ONE_THREAD, check=True)
    a, b = (log(tmp_path / x) for x in ("whole", "parts"))
    for x, y in zip(a, b, strict=True):
        assert {**x, "seconds": 0} == {**y, "seconds": 0}
    a, b = (weights(train.newest(tmp_path / x, [2])) for x in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert len(list((tmp_path / "parts").glob("stage2-*"))) == 2


def test_another_file_is_not_gone_on_with(files, tmp_path, capsys):
    flags = arguments(files, tmp_path / "out", "--steps", 4)
    assert call(*flags) == 0
    fewer = json.loads((files / "data.json").read_text())[:9]
    (tmp_path / "other.json").write_text(json.dumps(fewer))
    flags[flags.index(str(files / "data.json"))] = str(tmp_path / "other.json")
    assert call(*flags, "--resume") == 2 and "24 samples" in capsys.readouterr().err


# --- samples with errors ---

def test_samples_with_errors_are_named_and_skipped_or_stop_the_run(files, tmp_path, capsys):
    rows = json.loads((files / "data.json").read_text())
    for i in (3, 11, 17):
        rows[i]["conversations"][1]["value"] = ""
    rows[5]["conversations"][0]["value"] += "long " * 500
    for x in files.glob("*.png"):
        (tmp_path / x.name).write_bytes(x.read_bytes())
    (tmp_path / "data.json").write_text(json.dumps(rows))
    shared = arguments(files, tmp_path / "a", "--steps", 9, "--max-tokens", 1000)
    shared[shared.index(str(files / "data.json"))] = str(tmp_path / "data.json")
    assert call(*shared) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and "--max-bad" in err and "bad.jsonl" in err
    assert call(*shared, "--resume", "--max-bad", 0.2) == 0  # nothing was lost
    bad = [json.loads(line) for line in open(tmp_path / "a" / "bad.jsonl")]
    assert sorted((x["number"], x["kind"]) for x in bad) == [(3, "empty answer"), (5, "too long"), (11, "empty answer"),
                                                            (17, "empty answer")]
    assert len(log(tmp_path / "a")) == 9 and all(x["loss"] > 0 for x in log(tmp_path / "a"))
    shared[shared.index("2")] = "1"  # another stage keeps its own
    assert call(*shared, "--max-bad", 0.2) == 0
    bad = [json.loads(line) for line in open(tmp_path / "a" / "bad.jsonl")]
    assert [x["stage"] for x in bad] == [2] * 4 + [1] * 4


def test_a_stop_in_the_first_step_leaves_no_checkpoint(files, tmp_path, capsys):
    wrong = [*arguments(files, tmp_path, "--steps", 3), "--images", tmp_path / "nowhere"]
    for flags, status in ((wrong, 2), (wrong[:-2], 0)):
        assert call(*flags) == status


# --- several processes ---

@pytest.mark.parametrize("fsdp, reduce", [(False, "none"), (True, "visionzip:3+2")])
def test_two_processes_learn_as_one(fsdp, reduce, files, tmp_path):
    """The reduction reads queries and keys of the vision tower, whose weights FSDP shares out."""
    flags = arguments(files, tmp_path / "one", "--steps", 10, "--sample-every", 4, "--save-every", 5, "--reduce",
                      reduce)
    assert call(*flags) == 0
    flags[flags.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                str(random.randint(20000, 40000)), "train.py"]

    def both(*more):
        done = subprocess.run([*torchrun, *flags, *["--fsdp"] * fsdp, *more], cwd=ROOT, env=ONE_THREAD,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    both()
    shutil.rmtree(train.newest(tmp_path / "two", [2]))  # and the second half once more, from the checkpoint between
    both("--resume")
    one, two = (log(tmp_path / x) for x in ("one", "two"))
    assert len({tuple(x["sa"]) for x in one}) > 1 and [x["sa"] for x in one] == [x["sa"] for x in two]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], abs=1e-5)
    assert [x["tokens"] for x in two] == [x["tokens"] for x in one]
    a, b = (train.newest(tmp_path / x, [2]) for x in ("one", "two"))
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    x, y = weights(a), weights(b)
    assert all(torch.allclose(x[n], y[n], atol=1e-3) for n in x)


def test_fsdp_has_its_own_mixed_precision(files, tmp_path):
    """bfloat16 by FSDP's policy is about autocast's; weights on the disk are float32."""
    flags = arguments(files, tmp_path / "one", "--steps", 4, "--dtype", "bfloat16", "--sample-every", 2)
    assert call(*flags) == 0
    flags[flags.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(random.randint(20000, 40000)), "train.py", *flags, "--fsdp"], cwd=ROOT, env=ONE_THREAD,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([x["loss"] for x in log(tmp_path / x)] for x in ("one", "two"))
    assert two == pytest.approx(one, rel=0.02) and two != one
    assert all(x.dtype == torch.float32 for x in weights(train.newest(tmp_path / "two", [2])).values())


@pytest.mark.parametrize("flags", [["--fsdp", "--batch-size", 5, "--micro-batch-size", 1, "--workers", 0],
                                   ["--batch-size", 1, "--workers", 1]], ids=["unequal shares", "nothing for one"])
def test_ranks_that_have_less_to_do(flags, files, tmp_path):
    """They wait for the others instead of the others for them."""
    words = ["--stage", 2, "--model", files / "visor", "--data", files / "data.json", "--out", tmp_path, "--steps", 3]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(random.randint(20000, 40000)), "train.py", *map(str, [*words, *flags])], cwd=ROOT,
                          env=ONE_THREAD, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(log(tmp_path)) == 3 and all(x["loss"] > 0 and x["lr"]["adamw"] for x in log(tmp_path))


def test_ranks_without_images_or_samples(files, tmp_path):
    """A blank tile changes no loss, and one token stands for no samples at all."""
    batches, model = batches_of(files, tmp_path)
    text = [x for _, x in next(batches.batches(0)) if not x.prompt.images]
    for sa in ((), (1, 4)):
        batch, labels = batches.collate(text)
        assert batch.v_pos.shape[1] == data.tiling(9, 9, model.config, single_image=False).tokens
        bare = data.collate([x.prompt for x in text])
        loss_module = LossModule(model)
        assert torch.allclose(loss_module(batch, labels, sa), loss_module(bare, labels, sa), rtol=1e-5)
        loss_module(*batches.collate([]), sa).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("more, message", [
    (["--fsdp"], "torchrun"), (["--max-tokens", 0], "--max-tokens"), (["--data", "no.json"], "no.json"),
    (["--max-bad", -1], "--max-bad"), (["--device", "foo"], "--device foo"),
    (["--label-rule", "x"], "--label-rule"), (["--keep", 0], "--keep")])
def test_bad_input_is_one_line(more, message, files, tmp_path, capsys):
    assert call(*arguments(files, tmp_path), *more) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]


def test_files_need_a_model_and_a_stage(files, tmp_path, capsys):
    for flags, message in ((["--stage", 2], "--model"), ([], "--stage"), (["--stage", 3, "--overfit"], "--overfit")):
        assert call("--data", files / "data.json", "--out", tmp_path, *flags) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
