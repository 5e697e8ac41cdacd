"""Training with fewer visual tokens: M3's drawn scales, VisionZip's connector, resuming, and what is refused."""
import json
from itertools import islice

import pytest
import torch

import data
import methods
import router
import sample
import train
from config import Config, Plan
from llava.batches import ConversationBatches
from llava.samples import Samples
from model import VLM
from parallel import Distributed
from tests import tiny
from tests.test_llava_training import arguments, call, files, log, weights  # noqa: F401 a fixture
from toy import training, world
from toy.training import ToyBatches


def test_every_scale_is_drawn_about_equally_often_and_depends_on_seed_and_step():
    c = Config(reduce="m3")
    drawn = [methods.for_step(c, 3, step).reduce for step in range(4000)]
    assert {x: drawn.count(x) for x in drawn}.keys() == {"m3:1", "m3:4", "m3:8", "m3:16"}
    assert all(900 < drawn.count(x) < 1100 for x in set(drawn))
    assert drawn == [methods.for_step(c, 3, step).reduce for step in range(4000)]
    assert drawn != [methods.for_step(c, 4, step).reduce for step in range(4000)]
    for text in ("", "m3:4", "visionzip", "pack:2"):  # all that is not drawn stays as it is
        assert methods.for_step(Config(reduce=text), 3, 7).reduce == text


def test_a_step_of_the_miniature_has_one_scale():
    torch.manual_seed(0)
    m = training.init_weights(VLM(world.config())).add_reduction("m3")
    batches, seen = ToyBatches(m, 5, 2, turns=2, stage=0), set()
    for step in range(12):
        side = methods.for_step(m.config, 5, step).side
        batch, labels, quilts = batches[step]
        assert {x.tiling.cells for row in batch.images for x in row} == {(side, side)}
        assert batch.v_pos.shape[1] == side * side + 2 * side * (2 * side + 1)  # base, and a grid of 2 x 2 tiles
        loss, = batches.losses((batch, labels, quilts), batches.plan(step), step)
        assert loss.isfinite() and loss.requires_grad
        seen.add(side)
    assert seen == {3, 2, 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_step_of_a_file_has_one_scale(files, tmp_path, workers):
    m = VLM.from_pretrained(files / "dense").add_reduction("m3")
    settings = {**train.DEFAULTS, "workers": workers, "batch_size": 6, "micro_batch_size": 3, "seed": 2, "steps": 9}
    samples = Samples(files / "data.json", None, m.tokenizer, m.config)
    batches, seen = ConversationBatches(m, 0, samples, settings, tmp_path, Distributed("cpu")), set()
    for step, items in enumerate(islice(batches.batches(3), 6), 3):
        c = methods.for_step(m.config, 2, step)
        images = [x for _, s in items for x in s.prompt.images]
        assert {x.tiling.cells for x in images} == {(c.side,) * 2}
        for _, s in items:
            assert [s.prompt.v_img.count(i) for i in range(len(s.prompt.images))] == [
                x.tiling.tokens for x in s.prompt.images]
        loss = sum(x.detach() for x in batches.losses(items, batches.plan(step), step))
        assert loss.isfinite()
        seen.add(c.side)
    assert len(seen) > 1


@pytest.mark.parametrize("reduce, moved", [("visionzip", "multi_modal_projector."), ("m3", ""), ("vispruner", "")])
def test_what_stage_0_trains(reduce, moved, files, tmp_path):
    """VisionZip's connector alone; of the others everything that text and images pass through."""
    assert call(*arguments(files, tmp_path, "--steps", 2, "--reduce", reduce, stage=0, model="dense")) == 0
    before, after = weights(files / "dense"), weights(tmp_path / "stage0-000002")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith(moved or name) for name in changed)
    assert moved or any("vision_tower" in name for name in changed) and any("language_model" in n for n in changed)
    assert json.loads((tmp_path / "stage0-000002" / "config.json").read_text())["reduce"] == reduce


@pytest.mark.parametrize("reduce", ["m3", "visionzip:3+2"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(reduce, files, tmp_path, capsys):
    more = ("--reduce", reduce, "--save-every", 2, "--steps", 4)
    for out in ("once", "twice"):
        assert call(*arguments(files, tmp_path / out, *more, stage=0, model="dense")) == 0
    (tmp_path / "twice" / "stage0-000004").rename(tmp_path / "gone")
    capsys.readouterr()
    words = arguments(files, tmp_path / "twice", *more[2:], "--resume", "--reduce", "pack:2", stage=0, model="dense")
    assert call(*words) == 0
    assert f"does not follow --reduce pack:2 (it has {reduce})" in capsys.readouterr().err
    once, twice = (weights(tmp_path / x / "stage0-000004") for x in ("once", "twice"))
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)
    assert [x["loss"] for x in log(tmp_path / "once")] == [x["loss"] for x in log(tmp_path / "twice")]


def test_over_the_overview_a_step_of_a_file_has_the_drawn_scale(files, tmp_path, monkeypatch):
    """As many tokens as the smaller grid of the base tile has, and a newline."""
    m = VLM.from_pretrained(files / "dense").add_reduction("m3").add_cross_attention(None, None, [(), (1,)], [()])
    settings = {**train.DEFAULTS, "batch_size": 12, "seed": 2, "steps": 9}
    samples, seen, drawn = Samples(files / "data.json", None, m.tokenizer, m.config), [], set()
    batches = ConversationBatches(m, 2, samples, settings, tmp_path, Distributed("cpu"))
    monkeypatch.setattr(batches, "loss_module", lambda batch, *_: seen.append(batch) or torch.zeros(()))
    for step, items in enumerate(islice(batches.batches(0), 8)):
        list(batches.losses(items, Plan((), "overview"), step))
        side = methods.for_step(m.config, 2, step).side
        counts = {(batch.v_img[b] == 0).sum() for batch in seen for b, x in enumerate(batch.images) if len(x) == 1}
        assert counts <= {side ** 2 + 1}
        drawn |= {side} if counts else set()
        seen.clear()
    assert len(drawn) > 1


@pytest.mark.parametrize("reduce", ["none", "m3", "visionzip"])
def test_a_trained_model_goes_on_gently_at_stage_0(reduce, files, tmp_path):
    words = arguments(files, tmp_path, "--steps", 1, "--reduce", reduce, stage=0, model="dense")
    at = words.index("--lr")
    assert call(*words[:at], *words[at + 2:]) == 0
    assert json.loads((tmp_path / "stage0-000001" / "state.json").read_text())["lr"] == 1e-5


@pytest.mark.parametrize("reduce, moved", [("m3", "language_model"), ("visionzip", "multi_modal_projector")])
def test_the_miniature_learns_fewer_tokens_from_its_dense_weights(reduce, moved, tmp_path, capsys):
    """Not from nothing, and with the rate of stage 2."""
    words = ("--stage", 0, "--reduce", reduce, "--steps", 2, "--batch-size", 2, "--questions", 1, "--out", tmp_path)
    assert call(*words, main=train.main) == 0
    before, after = weights(train.DENSE), weights(tmp_path / "stage0-000002")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(moved in name for name in changed)
    assert all((before[name] - after[name]).abs().mean() < 0.1 * before[name].abs().mean() for name in changed)
    state = json.loads((tmp_path / "stage0-000002" / "state.json").read_text())
    assert (state["lr"], state["largest_first"]) == (training.RECIPES[2]["lr"], 0.0) and "restart" not in state


def test_the_stage_that_comes_first_has_the_reduction_too(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_stage", lambda stage, _, args, *__: ran.append((stage, args.reduce)) or 3 * [None])
    monkeypatch.setattr(train, "print_report", lambda *_: None)
    for given, reduce in ((("--pack", 2), "pack:2"), (("--reduce", "none"), ""), ((), None)):
        ran = []
        assert call("--stage", 2, *given, "--out", tmp_path, main=train.main) == 0
        assert ran == [(1, reduce), (2, reduce)]


def test_visor_learns_and_routes_over_fewer_tokens(files, tmp_path, capsys):
    """Stage 2 with patches that are picked, over all tiles and the overview; stage 3 on top."""
    out = tmp_path / "run"
    assert call(*arguments(files, out, "--steps", 4, "--reduce", "vispruner:2+2")) == 0
    assert call(*arguments(files, out, "--steps", 2, "--questions", 4, stage=3, model="../run/stage2-000004")) in (0, 2)
    m = VLM.from_pretrained(out / "stage2-000004")
    assert m.config.reduce == "vispruner:2+2"
    prompt = data.encode(data.chatml(["<image>\nwhat?"]), m.tokenizer,
                         [data.process_image(tiny.image(60, 90), m.config)])
    assert len(prompt.v_pos) % 4 == 0 and m.generate([prompt], (1,), max_tokens=3)


@pytest.mark.parametrize("main, words, message", [
    (train.main, ("--stage", 0, "--reduce", "pyramiddrop"), "nothing of it is learned"),
    (train.main, ("--stage", 0, "--reduce", "fastv"), "no such method"),
    (train.main, ("--stage", 0, "--reduce", "m3", "--auxiliary-weight", 1), "--auxiliary-weight is for the dense"),
    (train.main, ("--stage", 0, "--pack", 2, "--draw-from", 9), "--draw-from is for the dense"),
    (train.main, ("--stage", 0, "--reduce", "m3", "--pack", 2), "give one of the two"),
    (router.main, ("--report", "--reduce", "sparsevlm"), "for the dense configuration"),
    (router.main, ("--search", "--reduce", "pack:2"), "leave it out"),
    (sample.main, ("--q", "hi", "--reduce", "pyramiddrop:2,1:.5,.2"), "layers ascending"),
    (sample.main, ("--q", "hi", "--reduce", "pyramiddrop:1,2:.5,.6"), "falling"),
    (sample.main, ("--q", "hi", "--reduce", "visionzip:0+0"), "whole numbers of a tile's patches"),
    (sample.main, ("--q", "hi", "--reduce", "hired:0"), "above 0 and at most 1"),
    (sample.main, ("--q", "hi", "--reduce", "m3:8:widen"), "m3:RATIO"),
    (sample.main, ("--q", "hi", "--reduce", "sparsevlm:x"), "sparsevlm:SCALE")], ids=lambda x: (
        x.__module__ if callable(x) else "_".join(map(str, x)) if isinstance(x, tuple) else ""))
def test_bad_input_is_one_line(main, words, message, tmp_path, capsys):
    words = [*words, "--out", tmp_path] if main is train.main else [*words]
    status, err = call(*words, main=main), capsys.readouterr().err.strip().splitlines()
    assert status == 2 and err[-1].startswith("error: --") and message in err[-1] and len(err) == 1


def test_what_a_checkpoint_cannot_have(tmp_path, capsys):
    """Refused, or said in one line, before anything is asked."""
    tiny.model(visor=False).save_pretrained(tmp_path / "dense")
    tiny.model().save_pretrained(tmp_path / "visor")
    tiny.model(visor=False).add_reduction("pack:2:widen").save_pretrained(tmp_path / "wide")
    for model, reduce, more, status, said in (
            ("dense", "visionzip:9+9", (), 2, "keeps 18 of a tile's 16 patches"),
            ("dense", "pyramiddrop:3,6:.5,.2", (), 2, "layers 0 to 5"),
            ("visor", "pyramiddrop:easy", (), 2, "give --sa dense"),
            ("visor", "pyramiddrop:easy", ("--budget", "0.5"), 2, "give --sa dense"),
            ("visor", "sparsevlm", ("--sa", "1"), 2, "give --sa dense"),
            ("wide", "pack:4", (), 2, "pack:RATIO:widen"), ("wide", "visionzip", (), 2, "pack:RATIO:widen"),
            ("wide", "pack:4:widen", (), 0, ""),
            ("dense", "m3:4", (), 0, "has not learned it; python train.py --stage 0 --reduce m3"),
            ("visor", "sparsevlm", ("--sa", "dense"), 0, "")):
        words = ("--model", tmp_path / model, "--q", "hi", "--max-tokens", 2, "--reduce", reduce, *more)
        assert call(*words, main=sample.main) == status, (model, reduce)
        err = capsys.readouterr().err
        assert said in err and ("error: " in err) == (status == 2), (model, reduce, err)


def test_a_checkpoint_that_drops_inside_is_not_trained(files, tmp_path, capsys):
    """Nor routed; without the reduction it is."""
    m = VLM.from_pretrained(files / "dense").add_reduction("pyramiddrop:1:.5")
    m.save_pretrained(tmp_path / "dropping")
    VLM.from_pretrained(files / "visor").add_reduction("pyramiddrop:1:.5").save_pretrained(tmp_path / "visor")
    words = ["--stage", 1, "--model", tmp_path / "dropping", "--data", files / "data.json", "--steps", 1]
    for main, flags in ((train.main, [*words, "--out", tmp_path / "a"]),
                        (router.main, ["--report", "--model", tmp_path / "visor"])):
        assert call(*flags, main=main) == 2
        assert "--reduce pyramiddrop:1:.5: " in (err := capsys.readouterr().err) and "--reduce none" in err
    assert call(*words, "--out", tmp_path / "b", "--reduce", "none", main=train.main) == 0
    assert json.loads((tmp_path / "b" / "stage1-000001" / "config.json").read_text())["reduce"] == ""
