"""What only the miniature's training has: Muon, batches, drawing of configurations, and stage 0's losses."""
import itertools

import numpy as np
import pytest
import torch

import data
import train
from config import Config, Plan
from model import VLM
from toy import training, world
from toy.muon import Muon, orthogonalise
from toy.training import ToyBatches


def fresh(seed=0):
    """A dense miniature that has learned nothing."""
    torch.manual_seed(seed)
    return training.init_weights(VLM(world.config()))


@pytest.fixture(scope="module")
def dense():
    return fresh().requires_grad_(False)


def newton_schulz(g):
    """With plain matrices, in float64."""
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
    opt = Muon(ours, lr=0.01)
    for _ in range(3):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            momentum[i] = 0.95 * momentum[i] + p.grad
            update = newton_schulz(p.grad + 0.95 * momentum[i])
            wanted[i] -= 0.01 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * update
        opt.step()
    for p, w in zip(ours, wanted):
        assert torch.allclose(p, w.float(), atol=2e-4)
        s = torch.linalg.svdvals(orthogonalise(p.grad[None])[0])  # all directions move by about the same
        assert (s > 0.5).float().mean() > 0.9 and s.max() < 1.3


def test_muon_moves_each_matrix_of_a_joint_one_on_its_own():
    torch.manual_seed(2)
    whole = torch.nn.Parameter(torch.randn(128, 64))
    apart = [torch.nn.Parameter(x.clone()) for x in whole.detach().split([64, 32, 32])]
    opts = Muon([whole], lr=0.01, rows=[[64, 32, 32]]), Muon(apart, lr=0.01)
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        for p, g in zip(apart, whole.grad.split([64, 32, 32])):
            p.grad = g
        for opt in opts:
            opt.step()
    assert torch.allclose(whole, torch.cat(apart), atol=1e-6)
    opts = train.optimizers(fresh(), 0.01, miniature=True)
    muon, names, _ = opts["muon"]
    rows = dict(zip(names, muon.rows))
    assert rows["language_model.layers.3.self_attn.qkv_proj.weight"] == [64, 32, 32]
    assert rows["language_model.layers.3.mlp.gate_up_proj.weight"] == [176, 176]
    assert rows["language_model.layers.3.mlp.down_proj.weight"] == [64]


def test_muon_trains_the_matrices_of_what_trains():
    model = fresh().add_cross_attention(world.CA, world.SA, world.VIABLE).add_router()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    names = training.matrices_of(model)
    assert all(len(shapes[n]) == 2 for n in names) and len(names) == 2 * 6 + 2 + 12 * 4 + 4 * 3
    assert not [n for n in names if "embed" in n or "router" in n or "norm" in n]
    model.requires_grad_(False)
    model.language_model.cross.requires_grad_(True)
    assert training.matrices_of(model) == [n for n in names if ".cross." in n]


def test_configurations_are_drawn_from_the_viable_ones_and_the_ends_more_often():
    c = Config(**{**vars(world.config()), "ca": world.CA, "sa": world.SA, "viable": world.VIABLE})
    drawn = [training.sample_plan(c, 0, step, 2000).sa for step in range(8000)]
    assert set(drawn[:2000]) == {(), (4, 7, 10)} and drawn[:2000].count(()) / 2000 == pytest.approx(1 / 4, abs=0.03)
    late = drawn[2000:]
    for sa in world.VIABLE:
        assert late.count(sa) / 6000 == pytest.approx({(): 2, (4, 7, 10): 3}.get(sa, 1) / 9, abs=0.02)
    c.viable = ((4, 7),)
    assert {training.sample_plan(c, 0, step, 5) for step in range(9)} == {Plan((4, 7))}


def test_a_tenth_of_the_steps_are_over_the_overview():
    c = Config(**{**vars(world.config()), "ca": world.CA, "sa": world.SA, "viable": world.VIABLE, "overview": [()]})
    drawn = [training.sample_plan(c, 0, step, 2000) for step in range(8000)]
    over = [plan for plan in drawn if plan.pixels == "overview"]
    assert set(over) == {Plan((), "overview")} and len(over) / 8000 == pytest.approx(0.1, abs=0.01)
    c.overview = ()  # all else is as without it
    assert all(a == b for a, b in zip(drawn, [training.sample_plan(c, 0, step, 2000) for step in range(8000)])
               if a.pixels == "all")


def test_steps_over_the_overview_ask_what_it_shows():
    model = fresh().add_cross_attention(world.CA, world.SA, world.VIABLE, world.OVERVIEW)
    batches = ToyBatches(model, 0, 4, stage=2)
    names, shades = {i: w for w, i in model.tokenizer.get_vocab().items()}, {*world.SHADES, *"01234", "yes", "no"}
    over = [step for step in range(99) if batches.plan(step).pixels == "overview"]
    assert over[1] > 1
    for step in (0, 1, *over[:2]):
        batch, labels, quilts = batches[step]
        pixels = batches.plan(step).pixels
        tiles, tokens = (1, 10) if pixels == "overview" else (5, 51)
        assert {len(x.pixels) for row in batch.images for x in row} == {tiles} and batch.v_pos.shape[1] == tokens
        learned = {names[i] for i in labels[labels >= 0].tolist()} - {"<|im_end|>"}
        assert (learned <= shades) == (pixels == "overview")
        loss, = batches.losses(batches[step], batches.plan(step), step)
        assert loss.isfinite()


def test_each_stage_trains_its_configurations(dense):
    assert {ToyBatches(dense, 0, 3, stage=0).plan(step) for step in range(9)} == {Plan(tuple(range(12)))}
    model = fresh().add_cross_attention(world.CA, world.SA, world.VIABLE)
    batches = ToyBatches(model, 5, 3, largest_first=0.25, steps=40, stage=2)
    assert [batches.plan(step) for step in range(40)] == [
        training.sample_plan(model.config, 5, step, 10) for step in range(40)]
    with pytest.raises(ValueError, match="stage 0"):
        ToyBatches(model, 0, 3, auxiliary_weight=1.0)


def test_recipes_are_consistent():
    for recipe in training.RECIPES.values():
        assert recipe["batch_size"] and recipe["warmup"] < recipe["steps"] and 0 < recipe["decay_start"] < 1
    assert training.RECIPES[0]["draw_from"] < training.RECIPES[0]["restart"] < training.RECIPES[0]["steps"]


def test_weights_follow_from_the_seed_and_every_part_has_a_gradient():
    a, b, other = fresh(0), fresh(0), fresh(1)
    for (name, p), q, r in zip(a.named_parameters(), b.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        assert p.ndim < 2 or not torch.equal(p, r), name
    loss, = (batches := ToyBatches(a, 0, 2, 2, stage=0)).losses(batches[0], batches.plan(0), 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in a.parameters())


def test_batches_follow_from_seed_and_number_alone(dense):
    a, b = (ToyBatches(dense, 0, 3, stage=0)[7] for _ in range(2))
    assert np.array_equal(a[0].ids, b[0].ids) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0].ids, ToyBatches(dense, 1, 3, stage=0)[7][0].ids)
    assert (a[1] >= 0).any(1).all()
    batch, labels, quilts = a
    assert labels.shape == batch.ids.shape and len(quilts) == 3
    assert ((labels == -1) | (labels == batch.ids)).all()
    targets = [data.target_mask(labels[i:i + 1], batch.t_pos[i:i + 1]).sum() for i in range(3)]
    assert targets == [20, 30, 20]  # 10 answers, each closed by a token; 30 of a caption


def test_a_stage_goes_on_where_it_was_and_repeats_no_other(dense):
    visor = fresh().add_cross_attention(world.CA, world.SA, world.VIABLE)
    first, again = (list(itertools.islice(ToyBatches(visor, 0, 2, 1, stage=1).batches(n), 3)) for n in (0, 2))
    assert np.array_equal(first[2][0].ids, again[0][0].ids)
    images = {x[0].images[0][0].pixels.tobytes() for stage in (0, 1, 2)
              for x in itertools.islice(ToyBatches(visor, 0, 2, 1, stage=stage).batches(0), 3)}
    assert len(images) == 9


# --- the loss ---------------------------------------------------------------------------------------------------------

def test_without_auxiliary_loss_it_is_the_mean_over_the_targets(dense):
    batches = ToyBatches(dense, 0, 3, 4, stage=0)
    batch, labels, _ = item = batches[0]
    for sa in (tuple(range(12)), (1, 4), ()):
        h = dense(batch, sa)
        wanted = [-dense.head(h[b, i - 1]).log_softmax(-1)[labels[b, i]]
                  for b, i in zip(*np.nonzero(labels >= 0))]
        loss, = batches.losses(item, Plan(sa), 0)
        assert torch.allclose(loss, torch.stack(wanted).mean(), rtol=1e-5)


def test_auxiliary_loss_is_a_sigmoid_for_each_word(dense):
    batches = ToyBatches(dense, 0, 2, stage=0)
    _, _, quilts = batches[1]
    truth = torch.from_numpy(np.maximum(batches.word_targets(quilts, 0), batches.word_targets(quilts, 2)))
    v = torch.randn(2, 40, 64)
    plain, true = 0.0, 0
    names = dense.tokenizer.get_vocab()
    for b, quilt in enumerate(quilts):
        for place, words in enumerate(zip(world.words(quilt, 0), world.words(quilt, 2))):
            words = words[0] + words[1]
            p = (dense.head(dense.language_model.norm(v[b, place])) - 4).sigmoid().double()
            said = torch.tensor([word in words for word in names])
            p = p[list(names.values())]
            plain -= torch.where(said, p, 1 - p).clamp_min(1e-30).log().sum()
            true += int(said.sum())
    assert torch.allclose(training.auxiliary_loss(dense, v, truth).double(), plain / true, rtol=1e-3)


def test_visual_states_do_not_depend_on_the_questions(dense):
    batches = ToyBatches(dense, 0, 2, 3, draw_from=0, stage=0)
    batch, _, _ = batches[0]
    t, v = dense.embed(batch)
    states = batches.vision_states(batch, t, v, {*range(12)})
    real = torch.from_numpy(batch.v_img >= 0)
    assert len(states) == 12 and states[0] is v
    layout = dense.layout(batch)
    for l in range(11):  # with the questions, layer by layer
        t, v = dense.language_model.run(t, v, layout, tuple(range(12)), l, l + 1)
        assert torch.allclose(states[l + 1][real], v[real], atol=1e-4)
    t, v = dense.embed(batch)
    few = batches.vision_states(batch, t, v, {4, 7})
    changed = [l for l in range(11) if not torch.equal(few[l], few[l + 1])]
    assert changed == [4, 7]


def test_text_reads_vision_in_visors_layers_alone(dense):
    """What stands in any other state changes nothing; what stands in theirs does."""
    batches = ToyBatches(dense, 0, 2, 3, draw_from=0, stage=0)
    batch, _, _ = batches[0]
    t, v = dense.embed(batch)
    layout, states = dense.layout(batch), batches.vision_states(batch, t, v, {*range(12)})
    wanted = batches.read(t, states, layout)
    assert wanted.shape == t.shape
    for l in range(12):
        other = [state + 1 if i == l else state for i, state in enumerate(states)]
        assert torch.equal(batches.read(t, other, layout), wanted) == (l not in world.CA)
    whole = [v] * 12  # written out
    x = t
    for l in range(12):
        x, _ = dense.language_model.run(x, v, layout, (l,) if l in world.CA else (), l, l + 1)
    assert torch.equal(batches.read(t, whole, layout), x)


def test_refining_layers_are_the_candidates_and_others_drawn(dense):
    batches, rng = ToyBatches(dense, 0, 2, draw_from=100, stage=0), np.random.default_rng(0)
    early, late, fourth = ([batches.draw_refining_layers(rng, first + 4 * i) for i in range(600)]
                           for first in (-2400 + 99, 1000, 1003))
    assert all(x >= set(world.SA) for x in early + late)
    assert np.mean([len(x) for x in early]) == pytest.approx(3 + 4.5, abs=0.3) and early.count(set(world.SA)) < 10
    assert late.count(set(world.SA)) / 600 == pytest.approx(0.5, abs=0.06)
    assert set().union(*early) == set(range(12))
    drawn = [tuple(sorted(x & set(world.SA))) for x in fourth]
    assert {x: drawn.count(x) > 60 for x in drawn} == dict.fromkeys(map(tuple, world.VIABLE), True)


def test_stage_0s_loss_is_answers_and_words_of_every_level(dense):
    """Against the sum written out: whole steps, steps of VISOR's form, and those over a drawn configuration."""
    batches = ToyBatches(dense, 3, 2, 2, auxiliary_weight=0.5, draw_from=6, stage=0)
    places, partly = world.PANEL_TOKENS + world.CELL_TOKENS, 0
    for step in (2, 3, 6, 7, 11, 15, 19):
        batch, labels, quilts = item = batches[step]
        t, v = dense.embed(batch)
        refining = batches.draw_refining_layers(np.random.default_rng((3, step)), step)
        states = batches.vision_states(batch, t, v, refining)
        if step % 2:
            answers = batches.read(t, states, dense.layout(batch))
        else:
            answers, _ = dense.language_model.run(t, v, dense.layout(batch), tuple(range(12)))
        wanted = dense.answer_loss(dense.language_model.norm(answers), labels, batch.t_pos)
        wanted = wanted / data.target_mask(labels, batch.t_pos).sum()
        truth = np.zeros((2, 40, dense.config.vocab), dtype=np.float32)
        if set(world.SA) - refining:
            partly += 1  # what was not refined cannot say what is true of it
        else:
            for level, l in enumerate((0, 5, 8, 11)):
                truth = truth + batches.word_targets(quilts, level)
                words = training.auxiliary_loss(dense, states[l][:, places], torch.from_numpy(truth.clip(max=1)))
                wanted = wanted + 0.5 * words
        loss, = batches.losses(item, batches.plan(step), step)
        assert torch.allclose(loss, wanted, rtol=1e-5)
    assert partly


def test_without_pretraining_stage_0_is_answers_alone(dense):
    """Of a model that goes on with fewer visual tokens."""
    batches = ToyBatches(dense, 3, 2, 2, auxiliary_weight=0.5, stage=0)
    for step in (0, 3):
        batch, labels, _ = item = batches[step]
        wanted = dense.answer_loss(dense(batch, tuple(range(12))), labels, batch.t_pos)
        loss, = batches.losses(item, batches.plan(step), step)
        assert torch.allclose(loss, wanted / data.target_mask(labels, batch.t_pos).sum(), rtol=1e-5)
