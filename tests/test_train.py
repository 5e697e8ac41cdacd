"""The training loop: optimisers, frozen parts, resume, and what the command line does."""
import json
import sys

import numpy as np
import pytest
import torch

import learn
import quilts
import toy
import train
from config import run
from model import VLM
from paper import ablate


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense miniature that has learned nothing, as a checkpoint."""
    directory = tmp_path_factory.mktemp("train") / "dense"
    train.fresh(0).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def nano_dense(dense, monkeypatch):
    monkeypatch.setattr(train, "DENSE", dense)


def call(*words):
    """train.py with these words, small and in this process; its exit status."""
    small = [] if "--help" in words else ["--batch-size", 3, "--turns", 2, "--exam", 2]
    try:
        run(lambda: train.main([str(w) for w in [*words, *small]]))
    except SystemExit as e:
        return e.code
    return 0


def weights(directory):
    return dict(VLM.from_pretrained(directory).named_parameters())


def losses(out):
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


def orthogonalised(g):
    """Newton-Schulz with plain matrices, in float64."""
    x = (g if g.shape[0] <= g.shape[1] else g.T).double()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


def test_muon_is_momentum_orthogonalised():
    torch.manual_seed(1)
    shapes = [(64, 64), (32, 64), (64, 32), (64, 64)]
    ours = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    wanted, momentum = [p.detach().double().clone() for p in ours], [torch.zeros(s).double() for s in shapes]
    opt = learn.Muon(ours, lr=0.01)
    for _ in range(3):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.95 * momentum[i] + p.grad
            update = orthogonalised(p.grad + 0.95 * momentum[i])
            wanted[i] -= 0.01 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        opt.step()
    for p, w in zip(ours, wanted):
        assert torch.allclose(p, w.float(), atol=2e-4)
        s = torch.linalg.svdvals(orthogonalised(p.grad))  # all directions move by about the same
        assert (s > 0.5).float().mean() > 0.9 and s.max() < 1.3


def test_optimisers_partition_what_trains():
    model = train.fresh(0).add_cross_attention()
    for stage in (1, 2):
        for p in model.parameters():
            p.requires_grad_(stage == 2)
        model.language_model.cross.requires_grad_(True)
        names = [n for _, group, _ in learn.optimizers(model, 0.01).values() for n in group]
        assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_rate_warms_up_stays_and_falls():
    rates = [learn.rate(i, 100, 10, 0.5) for i in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[10:50] == [1.0] * 40
    assert all(a > b for a, b in zip(rates[50:], rates[51:])) and rates[-1] == pytest.approx(0.0396)


def test_answer_loss_is_the_sum_over_labelled_tokens():
    model = train.fresh(0)
    batch, labels, _ = quilts.Quilts(model, 0, 3, 4)[0]
    h = model(batch, (1, 4))
    losses = []
    for b in range(3):
        for i in range(1, labels.shape[1]):
            if labels[b, i] >= 0:
                losses.append(-model.head(h[b, i - 1]).log_softmax(-1)[labels[b, i]])
    t_pos = torch.from_numpy(batch.t_pos)
    assert torch.allclose(learn.answer_loss(model, h, labels, t_pos, chunk=7), torch.stack(losses).sum(), rtol=1e-5)
    assert int(learn.due(labels, t_pos).sum()) == len(losses)


def test_word_loss_is_a_sigmoid_for_each_word():
    model = train.fresh(0)
    source = quilts.Quilts(model, 0, 2)
    _, _, pictures = source[1]
    truth = source.truth(pictures, 0).maximum(source.truth(pictures, 2))
    v = torch.randn(2, 36, 64)
    plain, true = 0.0, 0
    names = model.tokenizer.get_vocab()
    for b, quilt in enumerate(pictures):
        for cell, words in enumerate(zip(toy.words(quilt, 0), toy.words(quilt, 2))):
            words = words[0] + words[1]
            z = model.head(model.language_model.norm(v[b, cell])) - 4
            for word, i in names.items():
                p = z[i].sigmoid()
                plain -= (p if word in words else 1 - p).clamp_min(1e-30).log()
                true += word in words
    assert torch.allclose(quilts.word_loss(model, v, truth), plain / true, rtol=1e-3)


def test_batches_follow_from_seed_and_number_alone():
    model = train.fresh(0)
    a, b = quilts.Quilts(model, 0, 3)[7], quilts.Quilts(model, 0, 3)[7]
    assert np.array_equal(a[0].ids, b[0].ids) and torch.equal(a[1], b[1])
    assert not np.array_equal(a[0].ids, quilts.Quilts(model, 1, 3)[7][0].ids)
    assert (a[1] >= 0).any(1).all()


def test_configurations_are_drawn_from_the_viable_ones_and_the_ends_more_often():
    drawn = [train.draw(toy.VIABLE, 0, step, 2000) for step in range(8000)]
    assert set(drawn[:2000]) == {(), (4, 7, 10)} and drawn[:2000].count(()) / 2000 == pytest.approx(1 / 4, abs=0.03)
    late = drawn[2000:]
    for sa in toy.VIABLE:
        assert late.count(sa) / 6000 == pytest.approx({(): 2, (4, 7, 10): 3}.get(sa, 1) / 9, abs=0.02)
    assert {train.draw([(4, 7)], 0, step, 5) for step in range(9)} == {(4, 7)}


def test_stage_1_moves_the_cross_attentions_alone(dense, tmp_path):
    assert call("--stage", 1, "--model", dense, "--steps", 3, "--out", tmp_path) == 0
    before, after = weights(dense), weights(train.newest(tmp_path, [1]))
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    assert moved == {n for n in after if ".cross." in n}
    assert all(after[n].abs().max() > 0 for n in after if ".cross." in n and n.endswith("o_proj.weight"))


def test_stage_2_moves_everything(dense, tmp_path):
    assert call("--stage", 2, "--model", dense, "--steps", 12, "--out", tmp_path) == 0
    before, after = weights(dense), weights(train.newest(tmp_path, [2]))
    assert all(not torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(stage, dense, tmp_path, monkeypatch, capsys):
    words = ["--stage", stage, "--steps", 20, "--seed", 3] + (["--model", dense] if stage else [])
    assert call(*words, "--out", tmp_path / "whole") == 0

    real, count = quilts.answer_loss, []

    def interrupted(*args):  # Ctrl-C in the middle of a step
        count.append(1)
        if len(count) == 6:
            train.signal.raise_signal(train.signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(quilts, "answer_loss", interrupted)
    assert call(*words, "--out", tmp_path / "parts") == 130
    assert "--resume" in capsys.readouterr().err
    assert call(*words, "--out", tmp_path / "parts", "--resume") == 0
    a, b = (weights(train.newest(tmp_path / part, [stage])) for part in ("whole", "parts"))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_all_stages_in_turn_and_the_table(tmp_path, capsys):
    assert call("--steps", 2, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(task in out for task in toy.TASKS)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["sa"] for row in table["rows"]] == [list(range(12)), *map(list, toy.VIABLE), None, None]
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
    words = ["--out", str(tmp_path), "--seed", "0", "--exam", "2", "--only", "4 alone", "--only", "universal"]
    ablate.main(words)
    ablate.main([*words, "--report"])
    runs = json.loads((tmp_path / "ablate.json").read_text())["runs"]
    assert [(r["run"], len(r["rows"])) for r in runs] == [("4 alone", 1), ("universal", len(toy.VIABLE))]
    assert "| 4 alone | 3.71x |" in capsys.readouterr().out


def test_older_checkpoints_go_and_unfinished_ones_do_not_count(dense, tmp_path):
    assert call("--stage", 1, "--model", dense, "--steps", 5, "--save-every", 1, "--out", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.glob("stage*")) == ["stage1-000004", "stage1-000005"]
    (tmp_path / "stage1-000009.writing").mkdir()
    assert train.newest(tmp_path, [0, 1]).name == "stage1-000005"
    assert train.newest(tmp_path, [2]) is None


@pytest.mark.parametrize("words, say", [
    (["--steps", 0], "--steps"), (["--lr", 0], "--lr"), (["--stage", 7], "--stage"),
    (["--model", "nowhere/x"], "nowhere"), (["--viable", "99"], "99"), (["--data", "nothing.json"], "nothing.json")])
def test_bad_input_is_one_line(words, say, dense, tmp_path, capsys):
    extra = [] if "--model" in words else ["--model", dense]
    assert call("--stage", 1, "--out", tmp_path, "--steps", 1, *extra, *words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and say in err[-1]
