"""The router: routed answers, shared work, pseudo-labels and their file, viable configurations, what it costs."""
import json
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import data
import decoding
import evaluation
import flops
import report
import router
import train
from cli import run
from config import Config, Plan, preset
from conversation import Conversation
from data import ANSWER, IMAGE, Prompt, chatml, collate, encode, join, place_images, process_image, split_shared
from evaluation import all_results
from model import VLM
from tests import tiny
from tests.test_flops import counted
from tests.test_toy_training import fresh
from toy import world

VIABLE = ((1,), (1, 4), (1, 7), (1, 4, 7), (1, 4, 7, 10))


def model(seed=0, **changes):
    """A random VISOR of 12 layers whose router, random as well, chooses differently for different questions."""
    m = tiny.model(seed, **{"layers": 12, "visor": False, **changes}).add_cross_attention(viable=VIABLE)
    m.add_router(threshold=0.02)
    nn.init.normal_(m.lm_head.weight)
    for p in m.router.parameters():
        nn.init.normal_(p, std=1.0 if p.ndim < 2 else 3 * p.shape[1] ** -0.5)
    return m.requires_grad_(False)


def prompts_of(m, n, seed=0, turns=1):
    rng, found = random.Random(seed), []
    for i in range(n):
        images = [process_image(tiny.image(rng.randint(8, 60), rng.randint(8, 60), i), m.config, True)] * (i % 4 != 3)
        texts = ["".join(rng.choices("abc defg hij", k=rng.randint(4, 25))) for _ in range(2 * turns - 1)]
        found.append(encode(chatml([place_images(texts[0], len(images)), *texts[1:]]), m.tokenizer, images))
    return found


SPREAD = 8  # standard deviation of the scores that `divide` leaves


def tree_of(m, prompts):
    """A CacheTree with these prompts as its only segment."""
    return m.prefill(prompts, "auto", 8)


def scores_of(m, prompts):
    """The policy's scores of a batch of prompts, (B, K, viable)."""
    with torch.no_grad():
        return m.route_scores(tree_of(m, prompts), [p.answer_starts for p in prompts])


def divide(m, prompts):
    """Shifts the router's scores so that prompts like these get different routes; of most it is sure, of some not."""
    scores = torch.cat([scores_of(m, [p])[0] for p in prompts])
    m.router.layers.down.bias.sub_(scores.mean(0))
    m.router.layers.down.weight.mul_(SPREAD / scores.std(0)[:, None])
    m.router.layers.down.bias.mul_(SPREAD / scores.std(0))


def routes_of(m, prompts):
    """What the router chooses, each prompt alone."""
    with torch.no_grad():
        return [m.route(tree_of(m, [p]), [p.answer_starts])[0] for p in prompts]


def ran(routes):
    """The configurations of Plans."""
    return [plan.sa for plan in routes]


def over_all(configurations):
    """Plans over all pixels."""
    return [Plan(sa) for sa in configurations]


def diff(a, b):
    return (a - b).abs().max().item()


# --- the policy in the model ----------------------------------------------------------------------------------------

def test_answer_starts_are_where_answers_begin():
    m = model()
    image = process_image(tiny.image(20, 20), m.config)
    p = encode(chatml([f"{IMAGE}\nhé?", "a", "b", "é中", "c"]), m.tokenizer, [image])
    assert len(p.answer_starts) == 3
    for start, text in zip(p.answer_starts, ("a", "é", None)):
        before = [i for i, pos in zip(p.ids, p.t_pos) if pos < start]
        assert m.tokenizer.decode(before, skip_special_tokens=False).endswith(ANSWER)
        assert start == p.end if text is None else m.tokenizer.decode(p.ids[p.t_pos.index(start):]).startswith(text)
    assert encode("no question", m.tokenizer).answer_starts == []


def test_a_router_changes_no_other_output_by_a_bit():
    m = model()
    prompts = prompts_of(m, 4)
    routed = [m(collate(prompts), sa) for sa in VIABLE], m.generate(prompts, (1, 4), max_tokens=5)
    m.remove_router()
    plain = [m(collate(prompts), sa) for sa in VIABLE], m.generate(prompts, (1, 4), max_tokens=5)
    assert all(torch.equal(a, b) for a, b in zip(routed[0], plain[0])) and routed[1] == plain[1]


def test_routed_answers_are_those_of_the_same_configuration_by_hand():
    """In a batch and alone, with and without images; at least three routes occur."""
    m = model(1)
    prompts = prompts_of(m, 12)
    divide(m, prompts)
    routes = []
    answers = m.generate(prompts, "auto", max_tokens=8, routes=routes)
    routes = ran(routes)
    assert len(set(routes)) >= 3 and routes == routes_of(m, prompts)
    assert answers == m.generate(prompts, routes, max_tokens=8)
    assert answers == [m.generate([p], sa, max_tokens=8)[0] for p, sa in zip(prompts, routes)]
    batch = collate(prompts)
    routed = m.route(tree_of(m, prompts), batch.answer_starts)
    assert routed == routes
    for row, p, sa in zip(m(batch, routed), prompts, routes):
        assert diff(row[:len(p.ids)], m(collate([p]), sa)[0]) < 1e-4


def test_each_question_is_answered_by_its_own_route():
    """After `prefill`, in any order; the image runs once through each layer of each route that was taken."""
    m = model(2)
    rng = random.Random(0)
    image = process_image(tiny.image(200, 150), m.config)
    texts = [chatml([f"{IMAGE}\n" + "".join(rng.choices("abc defg hij", k=rng.randint(4, 25)))]) for _ in range(12)]
    whole = [encode(t, m.tokenizer, [image]) for t in texts]
    prefix = encode(split_shared(texts[0])[0], m.tokenizer, [image])
    own = [encode(split_shared(t)[1], m.tokenizer, start=prefix.end) for t in texts]
    divide(m, whole)
    routes, wanted = [], routes_of(m, whole)
    assert len(set(wanted)) >= 3
    rows, vision = dict.fromkeys(range(12), 0), len(prefix.v_pos)
    for l, block in enumerate(m.language_model.layers):
        def count(name, *args, l=l, real=None):
            rows[l] += args[name == "project_apart"].shape[1] >= vision
            return real(*args)
        for name in ("project", "project_apart"):
            setattr(block.self_attn, name, partial(count, name, real=getattr(block.self_attn, name)))
    tree = Conversation(m, prefix, "auto")
    assert [l for l in rows if rows[l]] == [1]
    for i in [*range(12), 3, 0, 7]:
        answer = tree.answer(own[i], max_tokens=6, routes=routes)
        assert answer == m.generate([whole[i]], wanted[i], max_tokens=6)[0]
        assert routes == [Plan(wanted[i])]
    prefixes = {(l, *(x for x in sa if x < l)) for sa in wanted for l in sa}
    by_hand = [sum(l in sa for sa in [*wanted, wanted[3], wanted[0], wanted[7]]) for l in range(12)]
    assert [rows[l] - by_hand[l] for l in range(12)] == [sum(p[0] == l for p in prefixes) for l in range(12)]


def test_a_conversation_may_change_its_route():
    m = model(3)
    rng, image = random.Random(1), process_image(tiny.image(50, 40), m.config)
    first = chatml([f"{IMAGE}\nx"])
    whole = encode(split_shared(first)[0], m.tokenizer, [image])
    divide(m, prompts_of(m, 12, turns=2))
    tree, taken = Conversation(m, whole, "auto"), []
    for _ in range(6):
        text = "\n" + "".join(rng.choices("abc defg hij", k=rng.randint(4, 25))) + f"<|im_end|>\n{ANSWER}"
        turn = encode(text, m.tokenizer, start=whole.end)
        whole = join(whole, turn)
        routes = []
        answer = tree.answer(turn, keep=True, max_tokens=4, routes=routes)
        assert answer == m.generate([whole], routes[0].sa, max_tokens=4)[0]
        taken += routes
        closed = answer + m.tokenizer.encode("<|im_end|>\n").ids
        whole = join(whole, Prompt(closed, [whole.end + i for i in range(len(closed))], [], [], []))
        assert tree.end == whole.end
    assert len(set(taken)) >= 2


def test_the_policy_attends_to_what_stands_before_it_and_nothing_else():
    """Scores of each question of a conversation: those of the conversation cut off there, whoever else is in the batch;
    of the choices for its questions the costliest runs."""
    m = model(4)
    prompts = prompts_of(m, 6, turns=3) + prompts_of(m, 3, seed=1)
    divide(m, prompts)
    scores = scores_of(m, prompts)
    assert scores.shape == (9, 3, len(VIABLE))
    for p, row in zip(prompts, scores):
        for k in range(3):
            start = p.answer_starts[min(k, len(p.answer_starts) - 1)]
            cut = Prompt([i for i, pos in zip(p.ids, p.t_pos) if pos < start], [x for x in p.t_pos if x < start],
                         p.v_pos, p.v_img, p.images, [start])
            alone = scores_of(m, [cut])[0, 0]
            assert diff(row[k] / SPREAD, alone / SPREAD) < 1e-4
    cost = {sa: flops.llm_flops(m.config, sa, 40, 1000) for sa in VIABLE}
    for threshold in (0.02, 1.0):  # 1: of each question the likeliest
        m.config.route_threshold = threshold
        routes = m.route(tree_of(m, prompts), [p.answer_starts for p in prompts])
        mixed = 0
        for sa, row in zip(routes, scores.softmax(-1).tolist()):
            own = [max((cost[own], x, own) for own, x in zip(VIABLE, p) if x >= min(threshold, max(p))) for p in row]
            assert (cost[sa], sa) == max(own)[::2]  # of equal cost the likelier
            mixed += len({max(zip(p, VIABLE))[1] for p in row}) > 1
        assert mixed >= 3


def test_the_choice_is_conservative(monkeypatch):
    """VIABLE's last is the costliest: chosen at probability 3 %, not at 0.5 %; what is barred has no probability."""
    m, tree = model(5), SimpleNamespace(configurations=VIABLE)
    for rare, allowed, wanted in ((0.03, None, -1), (0.005, None, 0), (0.03, VIABLE[:2], 0), (0.03, VIABLE[1:], -1)):
        p = torch.tensor([1 - rare, *[0.0] * (len(VIABLE) - 2), rare])
        monkeypatch.setattr(m, "route_scores", lambda *_, p=p: p.log()[None, None])
        assert m.route(tree, [[0]], allowed) == [tuple(VIABLE[wanted])]
    m.config.route_threshold = 1  # the likeliest
    monkeypatch.setattr(m, "route_scores", lambda *_: torch.tensor([0.5, 0.1, 0.1, 0.0, 0.3]).log()[None, None])
    assert m.route(tree, [[0]]) == [(1,)]
    m.config.route_threshold = 0.02
    p = torch.tensor([0.5, 0.03, 0.47, 0.0, 0.0])  # 1,4 and 1,7 cost the same
    for own, wanted in ((p, (1, 7)), (p[[0, 2, 1, 3, 4]], (1, 4))):
        monkeypatch.setattr(m, "route_scores", lambda *_, own=own: own.log()[None, None])
        assert m.route(tree, [[0]]) == [wanted]


def test_allowed_caps_the_route():
    m = model(5)
    prompts, routes = prompts_of(m, 10), []
    divide(m, prompts)
    m.generate(prompts, "auto", max_tokens=1, allowed=[(1,), (1, 7)], routes=routes)
    routes = ran(routes)
    assert set(routes) <= {(1,), (1, 7)}
    free = routes_of(m, prompts)
    assert set(free) - set(routes) and all(a == b for a, b in zip(free, routes) if a in ((1,), (1, 7)))


def test_where_there_is_nothing_to_route():
    with pytest.raises(ValueError, match="fewer than two"):
        tiny.model(layers=12, visor=False).add_cross_attention(viable=[(1, 4)]).add_router()
    with pytest.raises(ValueError, match="no layer before"):
        tiny.model(layers=12, visor=False).add_cross_attention(ca=(5,), viable=[(), (1,)]).add_router()
    with pytest.raises(ValueError, match="no router"):
        tiny.model().generate(prompts_of(model(), 1), "auto")
    m = model()
    with pytest.raises(ValueError, match="no assistant line"):
        m.generate([encode("hello", m.tokenizer)], "auto")
    with pytest.raises(ValueError, match="2 configurations for 3 prompts"):
        m.generate(prompts_of(m, 3), [(1,), (1, 4)])


def test_a_batch_that_goes_on_from_one_tree_may_be_routed():
    """Samples of different lengths, each in a configuration of its own, chosen or given."""
    m = model(8)
    images = [[process_image(tiny.image(*size), m.config)] for size in ((20, 50), (60, 30), (9, 9))]
    prefixes = [encode(f"{'ab' * i}{IMAGE}", m.tokenizer, x) for i, x in enumerate(images)]
    own = [encode(f"c{'de' * i}\n{ANSWER}", m.tokenizer, start=p.end) for i, p in enumerate(prefixes)]
    whole = [join(a, b) for a, b in zip(prefixes, own)]
    divide(m, whole)
    wanted = routes_of(m, whole)
    for sa, routes in (("auto", wanted), ([(1,), (1, 4, 7, 10), (1, 7)],) * 2):
        tree = m.prefill(prefixes, "auto")
        tree.extend(own)
        assert decoding.generate(m, tree, own, sa, 5) == (m.generate(whole, routes, max_tokens=5), routes)


def test_the_router_is_saved_and_loaded(tmp_path):
    m = model(6)
    m.save_pretrained(tmp_path / "c")
    again, prompts = VLM.from_pretrained(tmp_path / "c"), prompts_of(m, 5)
    assert again.config.router and routes_of(again, prompts) == routes_of(m, prompts)
    assert again.config.route_threshold == 0.02
    json_file = tmp_path / "c" / "config.json"
    json_file.write_text(json.dumps({**json.loads(json_file.read_text()), "viable": [{"sa": [1], "pixels": "all"}]}))
    with pytest.raises(ValueError, match="needs at least two"):
        VLM.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("image", [True, False])
def test_router_flops_are_those_that_torch_counts(image):
    m = model(7)
    p = prompts_of(m, 4)[0 if image else 3]
    assert bool(p.v_pos) == image
    tree = tree_of(m, [p])
    flop = flops.router_flops(m.config, len(p.ids), len(p.v_pos))
    assert flop == pytest.approx(counted(m.route_scores, tree, [p.answer_starts]), rel=0.005)


def test_the_router_costs_under_a_thousandth_at_the_true_size():
    c = preset("llava-ov-0.5b")
    for tiles in (5, 10):
        vision = 729 * tiles
        assert flops.router_flops(c, 40, vision) < 0.001 * flops.llm_flops(c, c.viable[0], 40, vision)
    assert flops.router_flops(c, 40, 729) < 0.001 * flops.llm_flops(c, range(24), 40, 729)


# --- evaluation and labels -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    """An untrained miniature with a router, and an evaluation set whose answers have one to three words."""
    m = fresh(0).add_cross_attention(world.CA, world.SA, world.VIABLE, ()).eval()
    torch.manual_seed(0)
    m.add_router().requires_grad_(False)
    eval_set = [(image, [*questions[:2], ("long", "describe the quilt", "red blue k"[:4 + 5 * (i % 2)])])
                for i, (image, questions) in enumerate(world.eval_set(0, 4))]
    return m, eval_set


def test_evaluate_equals_one_question_at_a_time(small):
    """Correct or not, prefix match, loss and route, against the whole prompt in one forward without a cache."""
    m, eval_set = small
    results = all_results(m, eval_set, m.config.plans, progress=False)
    assert [(r["image"], r["task"]) for r in sorted(results, key=lambda r: r["image"])] == [
        (i, task) for i, (_, questions) in enumerate(eval_set) for task, *_ in questions]
    for r in results:
        images = [process_image(eval_set[r["image"]][0], m.config)]
        text = chatml([place_images(r["question"], 1)])
        question = encode(text, m.tokenizer, images)
        prompt = encode(text + r["answer"] + "<|im_end|>", m.tokenizer, images)
        assert m.config.viable[r["route"]] == routes_of(m, [question])[0]
        for i, sa in enumerate(m.config.viable):
            logits = m.head(m(collate([prompt]), sa)[0])[len(question.ids) - 1:-1].log_softmax(-1)
            ids = torch.tensor(prompt.ids[len(question.ids):])
            hits = (logits.argmax(-1) == ids).tolist()
            assert r["correct"][i] == all(hits) and r["prefix_match"][i] == (hits + [False]).index(False)
            assert r["loss"][i] == pytest.approx(float(-logits[range(len(ids)), ids].sum()), abs=1e-3)


def test_the_shared_pass_gives_the_plain_ones_labels_for_less_work(small):
    m, _ = small
    eval_set, rows = world.eval_set(1, 6), [0]
    hooks = [block.mlp.register_forward_pre_hook(lambda _, args: rows.__setitem__(0, rows[0] + args[0][..., 0].numel()))
             for block in m.language_model.layers]
    m.remove_router()
    shared = all_results(m, eval_set, over_all(world.VIABLE), progress=False)
    work, rows[0] = rows[0], 0
    plain = [all_results(m, eval_set, [Plan(sa)], progress=False) for sa in world.VIABLE]
    for hook in hooks:
        hook.remove()
    torch.manual_seed(0)
    m.add_router()
    assert work < 0.55 * rows[0], (work, rows[0])
    for result, alone in zip(shared, zip(*plain)):
        for key in ("correct", "prefix_match"):
            assert result[key] == [x[key][0] for x in alone]
        assert np.allclose(result["loss"], [x["loss"][0] for x in alone], atol=1e-3)
    merged = [{**alone[0], **{key: [x[key][0] for x in alone] for key in ("correct", "prefix_match", "loss")}}
              for alone in zip(*plain)]
    plans = over_all(world.VIABLE)
    for per in ("task", "sample"):
        assert router.pseudo_labels(plans, shared, per) == router.pseudo_labels(plans, merged, per)


def test_killed_and_resumed_labelling_gives_the_same_file(small, tmp_path, monkeypatch):
    m, eval_set = small
    monkeypatch.setattr(evaluation, "image_batches", partial(evaluation.image_batches, batch_size=2))
    results = router.log_results(tmp_path / "a.jsonl", m, eval_set)
    whole = (tmp_path / "a.jsonl").read_bytes()
    assert len(results) == sum(len(questions) for _, questions in eval_set)
    assert router.log_results(tmp_path / "a.jsonl", m, eval_set) == results
    for cut in np.random.default_rng(0).integers(len(whole), size=6):
        (tmp_path / "b.jsonl").write_bytes(whole[:cut])
        assert router.log_results(tmp_path / "b.jsonl", m, eval_set) == results
        assert (tmp_path / "b.jsonl").read_bytes() == whole
    monkeypatch.undo()
    (tmp_path / "mine.txt").write_text("precious")
    for path, other in ((tmp_path / "mine.txt", eval_set), (tmp_path / "a.jsonl", world.eval_set(1, 4))):
        with pytest.raises(ValueError, match="another model or evaluation set"):
            router.log_results(path, m, other)
    for other in (m, fresh(3).add_cross_attention(world.CA, world.SA, world.VIABLE)):
        with pytest.raises(ValueError, match="another model or evaluation set"):
            router.log_results(tmp_path / "a.jsonl", other, eval_set[:5] if other is m else eval_set)


CONFIGURATIONS = [(), (4,), (7,), (4, 7), (4, 7, 10)]
PLANS = [Plan(sa) for sa in CONFIGURATIONS]


def result(task, correct, loss=None, prefix_match=None, **more):
    return {"image": 0, "task": task, "question": "q", "correct": correct, "prefix_match": prefix_match or correct,
            "loss": loss or [1.0] * len(correct), **more}


def test_labels_by_task_take_the_fewest_layers_that_hold_then_the_lowest_loss():
    rows = [result("a", [0, 1, 1, 1, 1], [9, 2, 3, 0, 0]), result("a", [1, 1, 1, 1, 1], [9, 3, 1, 0, 0])]
    rows += [result("b", [0, 0, 0, 1, 1])] * 99 + [result("b", [1, 0, 1, 0, 1])]
    rows += [result("c", [0, 0, 0, 1, 1])] * 98 + [result("c", [1, 0, 1, 0, 1])] * 2
    assert router.labels_by_task(PLANS, rows) == {"a": 2, "b": 3, "c": 4}
    assert router.labels_by_task(PLANS, rows, keep=0.98)["c"] == 3
    assert {x[2:] for x in router.pseudo_labels(PLANS, rows, leave_out=["a", "b"])} == {(False, (4, 7, 10))}
    with pytest.raises(ValueError, match="leave out some, not all"):
        router.pseudo_labels(PLANS, rows, leave_out=["a", "b", "c"])


def test_oracle_takes_the_longest_prefix_match_then_fewest_layers():
    assert router.oracle(PLANS, result("a", [0, 0, 0, 0, 0], prefix_match=[1, 2, 2, 3, 3])) == 3
    assert router.oracle(PLANS, result("a", [0, 0, 0, 0, 0], prefix_match=[0, 0, 0, 0, 0])) == 0
    assert router.oracle(PLANS, result("a", [0, 1, 1, 1, 1], loss=[0, 2, 1, 0, 0])) == 2


def test_viable_configurations_hold_something_that_no_cheaper_one_holds():
    c = Config(layers=12, ca=(2, 5, 8, 11), sa=(4, 7, 10))
    rows = [result("easy", [1, 1, 1, 1, 1]), result("hard", [0, 0, 1, 1, 1]), result("hardest", [0, 0, 0, 0, 1])]
    assert router.viable(c, CONFIGURATIONS, rows) == ((), (7,), (4, 7, 10))
    rows = [result("easy", [0, 1, 1, 1, 1]), result("other", [0, 1, 0, 1, 1]), result("never", [0, 0, 0, 0, 0])]
    assert router.viable(c, CONFIGURATIONS, rows) == ((4,),)


def test_subnetworks_are_all_subsets_or_the_families():
    assert len(router.subnetworks((4, 7, 10))) == 8 and router.subnetworks((4, 7, 10))[-1] == (4, 7, 10)
    many = router.subnetworks((1, 4, 7, 10, 13, 16, 19, 22))
    assert {(), (1,), (1, 4), (1, 4, 7), (22,), (19, 22), (1, 22), (1, 19, 22), (1, 10), (1, 13, 22)} & set(many) >= {
        (), (1,), (1, 4), (1, 4, 7), (22,), (19, 22), (1, 22), (1, 19, 22), (1, 10)}
    assert many[-1] == (1, 4, 7, 10, 13, 16, 19, 22) and 20 < len(many) < 60 and many == sorted(many, key=len)


def test_report_adds_up():
    """Accuracy, layers, savings and shares of router and oracle, from results made by hand."""
    c = Config(**{**vars(world.config()), "ca": world.CA, "sa": world.SA, "viable": tuple(CONFIGURATIONS),
                  "router": True})
    results = [result("a", [0, 1, 1, 1, 1], route=1), result("a", [1, 1, 1, 1, 1], route=0),
               result("b", [0, 0, 0, 0, 1], route=4), result("b", [0, 0, 0, 1, 0], route=4)]
    table = router.summarise(c, results, {"detail": ["a"], "relations": ["b"]}, 9, (72, 72))
    rows = {row["name"]: row for row in table.rows}
    assert [rows[n]["detail"] for n in ("none", "4", "router", "oracle")] == [0.5, 1, 1, 1]
    assert [rows[n]["relations"] for n in ("none", "4,7,10", "router", "oracle")] == [0, 0.5, 0.5, 1]
    assert rows["router"]["by_task"]["a"]["shares"] == {"none": 0.5, "4": 0.5}
    assert rows["router"]["layers"] == pytest.approx((0.5 + 3) / 2)
    cost = [flops.llm_flops(c, sa, 9, 51) + flops.router_flops(c, 9, 51) for sa in ((), (4,), (4, 7, 10), (4, 7, 10))]
    dense = flops.llm_flops(c, range(12), 9, 51)
    encoder = flops.tower_flops(c, 5) + flops.connector_flops(c, 5)
    assert rows["router"]["saving"] == pytest.approx(4 * dense / sum(cost))
    assert rows["router"]["end_to_end"] == pytest.approx(4 * (dense + encoder) / (sum(cost) + 4 * encoder))
    assert rows["oracle"]["by_task"]["b"]["shares"] == {"4,7": 0.5, "4,7,10": 0.5}
    assert all(len(line) <= 80 for line in (table.text() + "\n" + table.routes()).splitlines())
    chosen = {line[:14].strip(): line.split()[4:] for line in table.routes().splitlines()}
    assert chosen["a"] == ["50", "50*", ".", ".", "."] and chosen["b"] == [".", ".", ".", ".*", "100"]


def test_columns_that_do_not_fit_go_below():
    cells = [["layers", *map(str, range(14))], [], ["task", *(f"{i / 14:.3f}" for i in range(14))]]
    text = report.columns(cells)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert [w for line in text.splitlines() if line.startswith("layers") for w in line.split()[1:]] == cells[0][1:]


def test_reduced_dense_is_not_what_savings_are_measured_by():
    c = Config(**{**vars(world.config()), "ca": world.CA, "sa": world.SA, "viable": ((), (4,)), "reduce": "pack:4"})
    results = [result("a", [1, 1])]
    rows = router.summarise(c, results, {"all": ["a"]}, 9, (72, 72), [result("a", [1])]).rows
    assert rows[0]["name"] == "dense" and rows[0]["saving"] == rows[0]["end_to_end"] == 1
    packed = data.tiling(72, 72, c).tokens
    assert rows[1]["saving"] == flops.llm_flops(c.unreduced(), range(12), 9, 51) / flops.llm_flops(c, (), 9, packed)


# --- training and the command line ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def visor(tmp_path_factory):
    """An untrained VISOR miniature, as a checkpoint."""
    directory = tmp_path_factory.mktemp("router") / "visor"
    fresh(1).add_cross_attention(world.CA, world.SA, world.VIABLE).save_pretrained(directory)
    return directory


def call(main, *words):
    try:
        run(lambda: main([str(w) for w in words]))
    except SystemExit as e:
        return e.code
    return 0


SMALL = ["--batch-size", 6, "--steps", 3, "--questions", 2, "--save-every", 2]


def test_stage_3_moves_the_router_alone_and_resumes(visor, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.RECIPES, 3, {**train.RECIPES[3], "questions": 2})
    words = ["--stage", 3, "--model", visor, *SMALL]
    assert call(train.main, *words, "--out", tmp_path / "a") == 0
    before, after = (dict(VLM.from_pretrained(d).named_parameters()) for d in (visor, tmp_path / "a/stage3-000003"))
    assert {n for n in after if n not in before} == {n for n in after if n.startswith("router.")}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert VLM.from_pretrained(tmp_path / "a/stage3-000003").config.route_threshold == 0.02
    start = dict(VLM.from_pretrained(tmp_path / "a/stage3-000002").named_parameters())
    assert all(not torch.equal(start[n], after[n]) for n in after if n.startswith("router."))

    (tmp_path / "b").mkdir()
    lines = (tmp_path / "a/labels.jsonl").read_text()
    (tmp_path / "b/labels.jsonl").write_text(lines[:len(lines) // 2])
    real, count = router.RouterBatches.losses, []

    def killed(*args):
        count.append(1)
        if len(count) == 2:
            train.signal.raise_signal(train.signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(router.RouterBatches, "losses", killed)
    assert call(train.main, *words, "--out", tmp_path / "b") == 130
    assert call(train.main, *words, "--out", tmp_path / "b", "--resume") == 0
    again = dict(VLM.from_pretrained(tmp_path / "b/stage3-000003").named_parameters())
    assert all(torch.equal(again[n], after[n]) for n in after)
    assert (tmp_path / "b/labels.jsonl").read_text() == lines
    capsys.readouterr()
    assert call(router.main, "--report", "--model", tmp_path / "a/stage3-000003", "--questions", 2,
                "--out", tmp_path / "x.png") == 0
    out = capsys.readouterr().out
    assert "routed to" in out and all(len(line) <= 80 for line in out.splitlines())
    assert (tmp_path / "x.png").stat().st_size > 10000
    assert call(train.main, "--stage", 2, "--model", tmp_path / "a/stage3-000003", *SMALL, "--out", tmp_path / "c") == 0
    assert not VLM.from_pretrained(tmp_path / "c/stage2-000003").config.router  # what it chose among has changed


def test_stage_3_learns_labels_that_depend_on_the_words(visor):
    """The policy alone tells fifteen kinds of question apart, even in a model that knows nothing."""
    m = VLM.from_pretrained(visor)
    torch.manual_seed(0)
    m.add_router()
    m.requires_grad_(False)
    m.router.requires_grad_(True)
    eval_set = world.eval_set(0, 20, world.TRAIN)
    targets = [(i, q, False, m.config.viable[world.TASKS[task].level + 1])
               for i, (_, questions) in enumerate(eval_set) for task, q, _ in questions]
    batches = router.RouterBatches(m, eval_set, targets, 0, 64)
    opt, *_ = train.optimizers(m, 0.03, miniature=True)["adamw"]
    for step in range(150):
        next(batches.losses(batches[step], None, step)).backward()
        opt.step()
        opt.zero_grad()
    prompts, _, wanted = router.RouterBatches(m, eval_set, targets, 1, 256)[0]
    likeliest = scores_of(m, prompts)[:, 0].argmax(-1)
    assert set(wanted.tolist()) == {0, 1, 2, 3, 4} and (likeliest == wanted).float().mean() > 0.95


def test_search_writes_the_viable_ones(visor, tmp_path, monkeypatch, capsys):
    VLM.from_pretrained(visor).save_pretrained(tmp_path / "m")
    words = ["--search", "--model", tmp_path / "m", "--questions", 3, "--out", tmp_path / "h.png"]
    before = (tmp_path / "m/config.json").read_text()
    assert call(router.main, *words) == 2 and "train it longer" in capsys.readouterr().err  # it can do nothing
    assert (tmp_path / "m/config.json").read_text() == before
    monkeypatch.setattr(router, "accuracy", lambda results, i: {t: (i + 1) / 8 for t in world.TASKS} | {"exist": 1.0})
    assert call(router.main, *words) == 0
    out, err = capsys.readouterr()
    assert "config.json" in err and (tmp_path / "h.png").stat().st_size > 5000
    starred = [word[:-1] for word in out.split() if word.endswith("*")]
    assert starred == ["none", "4,7,10"] and all(len(line) <= 80 for line in out.splitlines())
    assert VLM.from_pretrained(tmp_path / "m").config.viable == ((), (4, 7, 10))


def test_label_prints_what_it_chose(visor, tmp_path, capsys):
    assert call(router.main, "--label", tmp_path / "x.jsonl", "--model", visor, "--questions", 2) == 0
    assert {line[:14].strip() for line in capsys.readouterr().out.splitlines()} == set(world.TASKS)
    first = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[1])
    assert set(first) >= {"image", "task", "question", "answer", "correct", "loss"}


@pytest.mark.parametrize("words, message", [
    ([], "--search"), (["--search", "--report"], "one of"), (["--report", "--questions", 0], "--questions"),
    (["--report", "--out", "x.jpg"], ".png"), (["--report", "--keep", 2], "--keep"), (["--report"], "no router")])
def test_bad_input_is_one_line(words, message, visor, capsys):
    assert call(router.main, *words, "--model", visor) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and message in err[-1]


def test_search_refuses_models_that_it_would_break(visor, tmp_path, capsys):
    torch.manual_seed(0)
    VLM.from_pretrained(visor).add_router().save_pretrained(tmp_path / "routed")
    assert call(router.main, "--search", "--model", tmp_path / "routed") == 2
    fresh(0).save_pretrained(tmp_path / "dense")
    assert call(router.main, "--search", "--model", tmp_path / "dense") == 2
    assert "dense model" in capsys.readouterr().err
