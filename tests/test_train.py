"""The training loop: optimisers, frozen parts, resume, and what the command line does."""
import json
import sys

import pytest
import torch

import data
import train
from cli import run
from model import VLM
from paper import ablate
from tests.test_toy_training import fresh
from toy import world
from toy.training import ToyBatches


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense miniature that has learned nothing, as a checkpoint."""
    directory = tmp_path_factory.mktemp("train") / "dense"
    fresh(0).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def nano_dense(dense, monkeypatch):
    monkeypatch.setattr(train, "DENSE", dense)


def call(*words):
    """train.py with these words, small and in this process; its exit status."""
    small = [] if "--help" in words else ["--batch-size", 3, "--turns", 2, "--questions", 2]
    try:
        run(lambda: train.main([str(w) for w in [*words, *small]]))
    except SystemExit as e:
        return e.code
    return 0


def weights(directory):
    return dict(VLM.from_pretrained(directory).named_parameters())


def losses(out):
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


def test_optimisers_partition_what_trains():
    model = fresh(0).add_cross_attention()
    for stage in (1, 2):
        train.set_trainable(model, stage)
        for miniature in (False, True):
            names = [n for _, group, _ in train.optimizers(model, 0.01, miniature).values() for n in group]
            assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_miniatures_adamw_has_a_tenth_of_the_rate_in_every_stage(stage):
    """In stage 3 too, which has no matrices for Muon."""
    model = fresh(0).add_cross_attention(world.CA, world.SA, world.VIABLE).add_router()
    train.set_trainable(model, stage)
    opts = train.optimizers(model, 0.25, miniature=True)
    assert list(opts) == (["muon", "adamw"] if stage < 3 else ["adamw"])
    for kind, (opt, _, lr) in opts.items():
        group, = opt.param_groups
        assert lr == group["lr"] == (0.25 if kind == "muon" else pytest.approx(0.025))
        assert kind == "muon" or (group["betas"] == (0.9, 0.98) and group["weight_decay"] == 0)


def test_the_learning_rate_warms_up_stays_and_falls():
    factors = [train.lr_factor(i, 100, 10, 0.5) for i in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[10:50] == [1.0] * 40
    assert all(a > b for a, b in zip(factors[50:], factors[51:])) and factors[-1] == pytest.approx(0.0396)


def test_the_learning_rate_begins_anew_at_two_thirds():
    """Each part is as a run of its own; the last one ends with the stage."""
    factors = [train.lr_factor(i, 100, 10, 0.5, restart=60) for i in range(100)]
    parts = [(0, 60, 1), (60, 30, 2 / 3), (90, 10, 4 / 9)]
    assert factors == pytest.approx([rate * train.lr_factor(i, n, 10, 0.5) for _, n, rate in parts for i in range(n)])
    assert factors[:60] == [train.lr_factor(i, 60, 10, 0.5) for i in range(60)]
    assert [train.lr_factor(i, 100, 10, 0.5, restart=200) for i in range(100)] == [  # never
        train.lr_factor(i, 100, 10, 0.5) for i in range(100)]


def test_answer_loss_is_the_sum_over_targets():
    model = fresh(0)
    batch, labels, _ = ToyBatches(model, 0, 3, 4)[0]
    h = model(batch, (1, 4))
    losses = []
    for b in range(3):
        for i in range(1, labels.shape[1]):
            if labels[b, i] >= 0:
                losses.append(-model.head(h[b, i - 1]).log_softmax(-1)[labels[b, i]])
    assert torch.allclose(model.answer_loss(h, labels, batch.t_pos, chunk=7), torch.stack(losses).sum(), rtol=1e-5)
    assert int(data.target_mask(labels, batch.t_pos).sum()) == len(losses)


def test_stage_1_moves_the_cross_attentions_alone(dense, tmp_path):
    assert call("--stage", 1, "--model", dense, "--steps", 3, "--out", tmp_path) == 0
    before, after = weights(dense), weights(train.newest(tmp_path, [1]))
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    assert moved == {n for n in after if ".cross." in n}
    assert all(after[n].abs().max() > 0 for n in after if ".cross." in n and n.endswith("o_proj.weight"))


def test_stage_2_moves_everything(dense, tmp_path):
    assert call("--stage", 2, "--skip-stage-1", "--model", dense, "--steps", 12, "--out", tmp_path) == 0
    before, after = weights(dense), weights(train.newest(tmp_path, [2]))
    assert all(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(stage, dense, tmp_path, monkeypatch, capsys):
    words = ["--stage", stage, "--steps", 10, "--seed", 3] + (["--model", dense, "--skip-stage-1"] if stage else [])
    assert call(*words, "--out", tmp_path / "whole") == 0

    real, count = VLM.answer_loss, []

    def interrupted(*args):  # Ctrl-C in the middle of a step
        count.append(1)
        if len(count) == 6:
            train.signal.raise_signal(train.signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(VLM, "answer_loss", interrupted)
    assert call(*words, "--out", tmp_path / "parts") == 130
    assert "--resume" in capsys.readouterr().err
    assert call(*words, "--out", tmp_path / "parts", "--resume") == 0
    a, b = (weights(train.newest(tmp_path / part, [stage])) for part in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_all_stages_in_turn_and_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.RECIPES, 3, {**train.RECIPES[3], "questions": 2})
    assert call("--steps", 2, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(task in out for task in world.TASKS)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [(row["sa"], row["pixels"]) for row in table["rows"]] == [
        (list(range(12)), "all"), *((list(sa), "overview") for sa in world.OVERVIEW),
        *((list(sa), "all") for sa in world.VIABLE), (None, None), (None, None)]
    assert (tmp_path / "table.png").stat().st_size > 10000
    assert VLM.from_pretrained(train.newest(tmp_path, [3])).config.stage == "3"
    assert call("--out", tmp_path) == 2 and "--resume" in capsys.readouterr().err
    assert call("--out", tmp_path, "--resume") == 0  # nothing is left to do but the table


def test_without_matplotlib_the_table_is_there_and_nothing_fails(dense, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call("--stage", 1, "--model", dense, "--steps", 1, "--out", tmp_path) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "table.json").exists() and not (tmp_path / "table.png").exists()


def test_ablations_run_once_and_make_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "RESULTS", tmp_path / "ablate.json")
    monkeypatch.setattr(ablate, "STEPS", 1)
    monkeypatch.setitem(train.RECIPES, 1, {**train.RECIPES[1], "steps": 1})
    words = ["--out", str(tmp_path), "--seed", "0", "--questions", "2", "--only", "4 alone", "--only", "universal"]
    ablate.main(words)
    ablate.main([*words, "--report"])
    runs = json.loads((tmp_path / "ablate.json").read_text())["runs"]
    assert [(r["run"], len(r["rows"])) for r in runs] == [("4 alone", 1), ("universal", len(world.VIABLE))]
    assert "| 4 alone | 3.71x |" in capsys.readouterr().out


def test_older_checkpoints_go_and_unfinished_ones_do_not_count(dense, tmp_path):
    (tmp_path / "stage1-000003.76.writing").mkdir()
    assert call("--stage", 1, "--model", dense, "--steps", 5, "--save-every", 1, "--out", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob("stage*")) == ["stage1-000004", "stage1-000005"]
    (tmp_path / "stage1-000009.77.writing").mkdir()
    assert train.newest(tmp_path, [0, 1]).name == "stage1-000005"
    assert train.newest(tmp_path, [2]) is None


@pytest.mark.parametrize("words, message", [
    (["--steps", 0], "--steps"), (["--lr", 0], "--lr"), (["--stage", 7], "--stage"),
    (["--model", "nowhere/x"], "nowhere"), (["--viable", "99"], "99"), (["--data", "nothing.json"], "nothing.json")])
def test_bad_input_is_one_line(words, message, dense, tmp_path, capsys):
    extra = [] if "--model" in words else ["--model", dense]
    assert call("--stage", 1, "--out", tmp_path, "--steps", 1, *extra, *words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]
