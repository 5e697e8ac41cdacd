"""The router: routed answers, shared work, pseudo-labels and their file, viable configurations, what it costs."""
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

import data
import flops
import learn
import router
import toy
import train
from config import Config, preset, run
from data import ANSWER, IMAGE, Prompt, chatml, collate, encode, picture, place_images, split_shared
from model import VLM
from tests import tiny
from tests.test_flops import counted

VIABLE = ((1,), (1, 4), (1, 7), (1, 4, 7), (1, 4, 7, 10))


def model(seed=0, **changes):
    """A random VISOR of 12 layers whose router, random as well, has an opinion of its own about every question."""
    m = tiny.model(seed, **{"layers": 12, "visor": False, **changes}).add_cross_attention(viable=VIABLE).add_router()
    nn.init.normal_(m.lm_head.weight)
    for p in m.router.parameters():
        nn.init.normal_(p, std=1.0 if p.ndim < 2 else 3 * p.shape[1] ** -0.5)
    return m.requires_grad_(False)


def prompts_of(m, n, seed=0, turns=1):
    rng, found = random.Random(seed), []
    for i in range(n):
        images = [picture(tiny.image(rng.randint(8, 60), rng.randint(8, 60), i), m.config, True)] * (i % 4 != 3)
        said = ["".join(rng.choices("abc defg hij", k=rng.randint(4, 25))) for _ in range(2 * turns - 1)]
        found.append(encode(chatml([place_images(said[0], len(images)), *said[1:]]), m.tokenizer, images))
    return found


SPREAD = 8  # standard deviation of the scores that `divide` leaves


def divide(m, prompts):
    """Shifts the router's scores so that these prompts go different ways; most have little doubt, some have."""
    with torch.no_grad():
        scores = torch.cat([m.policy(m.read(collate([p]), "auto"), [p.asks])[0] for p in prompts])
    m.router.down.bias.sub_(scores.mean(0))
    m.router.down.weight.mul_(SPREAD / scores.std(0)[:, None])
    m.router.down.bias.mul_(SPREAD / scores.std(0))


def routes_of(m, prompts):
    """What the policy chooses, each prompt alone."""
    with torch.no_grad():
        return [m.route(m.read(collate([p]), "auto"), [p.asks])[0] for p in prompts]


def diff(a, b):
    return (a - b).abs().max().item()


# --- the policy in the model ----------------------------------------------------------------------------------------

def test_asks_are_where_answers_begin():
    m = model()
    p = encode(chatml([f"{IMAGE}\nhé?", "a", "b", "é中", "c"]), m.tokenizer, [picture(tiny.image(20, 20), m.config)])
    assert len(p.asks) == 3
    for ask, text in zip(p.asks, ("a", "é", None)):
        upto = [i for i, pos in zip(p.ids, p.t_pos) if pos < ask]
        assert m.tokenizer.decode(upto, skip_special_tokens=False).endswith(ANSWER)
        assert ask == p.end if text is None else m.tokenizer.decode(p.ids[p.t_pos.index(ask):]).startswith(text)
    assert encode("no question", m.tokenizer).asks == []


def test_a_router_changes_no_other_output_by_a_bit():
    m = model()
    prompts = prompts_of(m, 4)
    routed = [m(collate(prompts), sa) for sa in VIABLE], m.generate(prompts, (1, 4), max_tokens=5)
    m.remove_router()
    plain = [m(collate(prompts), sa) for sa in VIABLE], m.generate(prompts, (1, 4), max_tokens=5)
    assert all(torch.equal(a, b) for a, b in zip(routed[0], plain[0])) and routed[1] == plain[1]


def test_routed_answers_are_those_of_the_same_configuration_by_hand():
    """In a batch and alone, with and without pictures; at least three routes occur."""
    m = model(1)
    prompts = prompts_of(m, 12)
    divide(m, prompts)
    routes = []
    answers = m.generate(prompts, "auto", max_tokens=8, routes=routes)
    assert len(set(routes)) >= 3 and routes == routes_of(m, prompts)
    assert answers == m.generate(prompts, routes, max_tokens=8)
    assert answers == [m.generate([p], sa, max_tokens=8)[0] for p, sa in zip(prompts, routes)]
    h, by_hand = m(collate(prompts), "auto"), m(collate(prompts), routes)
    for row, same, p, sa in zip(h, by_hand, prompts, routes):
        alone = m(collate([p]), sa)[0]
        assert diff(row[:len(p.ids)], alone) < 1e-4 and diff(same[:len(p.ids)], alone) < 1e-4


def test_ask_takes_each_question_its_own_way():
    """Asked after `see`, in any order; what was read for one route is read once, and by that route alone."""
    m = model(2)
    rng = random.Random(0)
    image = picture(tiny.image(200, 150), m.config)
    texts = [chatml([f"{IMAGE}\n" + "".join(rng.choices("abc defg hij", k=rng.randint(4, 25)))]) for _ in range(12)]
    whole = [encode(t, m.tokenizer, [image]) for t in texts]
    begin = encode(split_shared(texts[0])[0], m.tokenizer, [image])
    rest = [encode(split_shared(t)[1], m.tokenizer, start=begin.end) for t in texts]
    divide(m, whole)
    routes, wanted = [], routes_of(m, whole)
    assert len(set(wanted)) >= 3
    rows, vision = dict.fromkeys(range(12), 0), len(begin.v_pos)
    for l, block in enumerate(m.language_model.layers):
        block.self_attn.k_proj.register_forward_pre_hook(
            lambda _, args, l=l: rows.update({l: rows[l] + (args[0].shape[1] >= vision)}))
    cache = m.see(begin, "auto")
    assert [l for l in rows if rows[l]] == [1]
    for i in [*range(12), 3, 0, 7]:
        assert m.ask(cache, rest[i], max_tokens=6, routes=routes) == m.generate([whole[i]], wanted[i], max_tokens=6)[0]
        assert routes == [wanted[i]]
    prefixes = {(l, *(x for x in sa if x < l)) for sa in wanted for l in sa}
    by_hand = [sum(l in sa for sa in [*wanted, wanted[3], wanted[0], wanted[7]]) for l in range(12)]
    assert [rows[l] - by_hand[l] for l in range(12)] == [sum(p[0] == l for p in prefixes) for l in range(12)]


def test_a_conversation_may_change_its_route():
    m = model(3)
    rng, image = random.Random(1), picture(tiny.image(50, 40), m.config)
    first = chatml([f"{IMAGE}\nx"])
    whole = encode(split_shared(first)[0], m.tokenizer, [image])
    divide(m, prompts_of(m, 12, turns=2))
    cache, taken = m.see(whole, "auto"), []
    for _ in range(6):
        text = "\n" + "".join(rng.choices("abc defg hij", k=rng.randint(4, 25))) + f"<|im_end|>\n{ANSWER}"
        turn = encode(text, m.tokenizer, start=whole.end)
        whole = Prompt(*(list(a) + list(b) for a, b in zip(whole, turn)))
        routes = []
        answer = m.ask(cache, turn, keep=True, max_tokens=4, routes=routes)
        assert answer == m.generate([whole], routes[0], max_tokens=4)[0]
        taken += routes
        rest = answer + m.tokenizer.encode("<|im_end|>\n").ids
        whole = Prompt(*(list(a) + list(b) for a, b in zip(whole, (rest, [whole.end + i for i in range(len(rest))],
                                                                   [], [], []))))
        assert cache.end == whole.end
    assert len(set(taken)) >= 2


def test_the_policy_sees_what_stands_before_it_and_nothing_else():
    """Scores of each question of a conversation: those of the conversation cut off there, whoever else is in the batch;
    the costliest of the choices counts."""
    m = model(4)
    prompts = prompts_of(m, 6, turns=3) + prompts_of(m, 3, seed=1)
    divide(m, prompts)
    part = m.read(collate(prompts), "auto")
    scores = m.policy(part, [p.asks for p in prompts])
    assert scores.shape == (9, 3, len(VIABLE))
    for p, row in zip(prompts, scores):
        for k in range(3):
            ask = p.asks[min(k, len(p.asks) - 1)]
            cut = Prompt([i for i, pos in zip(p.ids, p.t_pos) if pos < ask], [x for x in p.t_pos if x < ask],
                         p.v_pos, p.pictures, [ask])
            alone = m.policy(m.read(collate([cut]), "auto"), [cut.asks])[0, 0]
            assert diff(row[k] / SPREAD, alone / SPREAD) < 1e-4
    routes = m.route(m.read(collate(prompts), "auto"), [p.asks for p in prompts])
    cost = {sa: flops.llm_flops(m.config, sa, 40, 1000) for sa in VIABLE}
    mixed = 0
    for sa, row in zip(routes, scores.softmax(-1).tolist()):
        best = max((cost[own], x) for p in row for own, x in zip(VIABLE, p) if x >= 0.02)  # of equal cost the likelier
        assert (cost[sa], max(p[VIABLE.index(sa)] for p in row)) == best
        mixed += len({max(zip(p, VIABLE))[1] for p in row}) > 1
    assert mixed >= 3


def test_in_doubt_the_route_is_the_costlier_one(monkeypatch):
    """VIABLE's last is the costliest: chosen at probability 3 %, not at 0.5 %; what is barred has no probability."""
    m = model(5)
    for rare, allowed, wanted in ((0.03, None, -1), (0.005, None, 0), (0.03, VIABLE[:2], 0), (0.03, VIABLE[1:], -1)):
        p = torch.tensor([1 - rare, *[0.0] * (len(VIABLE) - 2), rare])
        monkeypatch.setattr(m, "policy", lambda *_, p=p: p.log()[None, None])
        assert m.route(None, [[0]], allowed) == [tuple(VIABLE[wanted])]
    m.config.doubt = 1  # the likeliest
    monkeypatch.setattr(m, "policy", lambda *_: torch.tensor([0.5, 0.1, 0.1, 0.0, 0.3]).log()[None, None])
    assert m.route(None, [[0]]) == [(1,)]
    m.config.doubt = 0.02
    p = torch.tensor([0.5, 0.03, 0.47, 0.0, 0.0])  # 1,4 and 1,7 cost the same
    for own, wanted in ((p, (1, 7)), (p[[0, 2, 1, 3, 4]], (1, 4))):
        monkeypatch.setattr(m, "policy", lambda *_, own=own: own.log()[None, None])
        assert m.route(None, [[0]]) == [wanted]


def test_allowed_caps_the_route():
    m = model(5)
    prompts, routes = prompts_of(m, 10), []
    divide(m, prompts)
    m.generate(prompts, "auto", max_tokens=1, allowed=[(1,), (1, 7)], routes=routes)
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
    with pytest.raises(ValueError, match="nothing is asked"):
        m.generate([encode("hello", m.tokenizer)], "auto")
    cache = m.new_cache(2, "auto", 9, 9)
    m.remember(collate([encode("ab", m.tokenizer)] * 2), cache)
    with pytest.raises(ValueError, match="one prompt at a time"):
        m.generate(prompts_of(m, 2), [(1,), (1, 4)], cache=cache)


def test_the_router_is_saved_and_loaded(tmp_path):
    m = model(6)
    m.save_pretrained(tmp_path / "c")
    again, prompts = VLM.from_pretrained(tmp_path / "c"), prompts_of(m, 5)
    assert again.config.router and routes_of(again, prompts) == routes_of(m, prompts)
    json_file = tmp_path / "c" / "config.json"
    json_file.write_text(json.dumps({**json.loads(json_file.read_text()), "viable": [[1]]}))
    with pytest.raises(ValueError, match="router needs at least two"):
        VLM.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("image", [True, False])
def test_router_flops_are_those_that_torch_counts(image):
    m = model(7)
    p = prompts_of(m, 4)[0 if image else 3]
    assert bool(p.v_pos) == image
    part = m.read(collate([p]), "auto")
    m.language_model.run(part, VIABLE[0], stop=m.config.fork)
    says = flops.router_flops(m.config, len(p.ids), len(p.v_pos))
    assert says == pytest.approx(counted(m.policy, part, [p.asks]), rel=0.005)


def test_the_router_costs_under_a_thousandth_at_the_true_size():
    c = preset("llava-ov-0.5b")
    for tiles in (5, 10):
        vision = 729 * tiles
        assert flops.router_flops(c, 40, vision) < 0.001 * flops.llm_flops(c, c.viable[0], 40, vision)
    assert flops.router_flops(c, 40, 729) < 0.001 * flops.llm_flops(c, range(24), 40, 729)


# --- examinations and labels ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    """An untrained miniature with a router, and an exam whose answers have one to three words."""
    m = train.fresh(0).add_cross_attention(toy.CA, toy.SA, toy.VIABLE).eval()
    torch.manual_seed(0)
    m.add_router().requires_grad_(False)
    exam = [(image, [*asked[:2], ("long", "describe the quilt", "red blue k"[:4 + 5 * (i % 2)])])
            for i, (image, asked) in enumerate(toy.exam(0, 4))]
    return m, exam


def test_examine_equals_one_question_at_a_time(small):
    """Right or wrong, matches, loss and route, against the whole prompt in one forward without a cache."""
    m, exam = small
    records = router.all_records(m, exam, m.config.viable, progress=False)
    assert [(r["picture"], r["task"]) for r in sorted(records, key=lambda r: r["picture"])] == [
        (i, task) for i, (_, asked) in enumerate(exam) for task, *_ in asked]
    for r in records:
        pictures = [picture(exam[r["picture"]][0], m.config)]
        text = chatml([place_images(r["question"], 1)])
        asked = encode(text, m.tokenizer, pictures)
        prompt = encode(text + r["answer"] + "<|im_end|>", m.tokenizer, pictures)
        assert m.config.viable[r["route"]] == routes_of(m, [asked])[0]
        for i, sa in enumerate(m.config.viable):
            logits = m.head(m(collate([prompt]), sa)[0])[len(asked.ids) - 1:-1].log_softmax(-1)
            ids = torch.tensor(prompt.ids[len(asked.ids):])
            hits = (logits.argmax(-1) == ids).tolist()
            assert r["right"][i] == all(hits) and r["matches"][i] == (hits + [False]).index(False)
            assert r["loss"][i] == pytest.approx(float(-logits[range(len(ids)), ids].sum()), abs=1e-3)


def test_the_shared_pass_gives_the_plain_ones_labels_for_less_work(small):
    m, _ = small
    exam, rows = toy.exam(1, 6), [0]
    hooks = [block.mlp.register_forward_pre_hook(lambda _, args: rows.__setitem__(0, rows[0] + args[0][..., 0].numel()))
             for block in m.language_model.layers]
    m.remove_router()
    shared = router.all_records(m, exam, toy.VIABLE, progress=False)
    work, rows[0] = rows[0], 0
    plain = [router.all_records(m, exam, [sa], progress=False) for sa in toy.VIABLE]
    for hook in hooks:
        hook.remove()
    torch.manual_seed(0)
    m.add_router()
    assert work < 0.55 * rows[0], (work, rows[0])
    for record, parts in zip(shared, zip(*plain)):
        for key in ("right", "matches"):
            assert record[key] == [p[key][0] for p in parts]
        assert np.allclose(record["loss"], [p["loss"][0] for p in parts], atol=1e-3)
    merged = [{**parts[0], **{key: [p[key][0] for p in parts] for key in ("right", "matches", "loss")}}
              for parts in zip(*plain)]
    for per in ("task", "sample"):
        assert router.pseudo_labels(toy.VIABLE, shared, per) == router.pseudo_labels(toy.VIABLE, merged, per)


def test_killed_and_resumed_labelling_gives_the_same_file(small, tmp_path, monkeypatch):
    m, exam = small
    monkeypatch.setattr(router, "batches", lambda exam, config: [[0, 3], [1, 2, 5], [4, 7], [6, 8, 9, 10, 11]])
    records = router.log_records(tmp_path / "a.jsonl", m, exam)
    whole = (tmp_path / "a.jsonl").read_bytes()
    assert len(records) == sum(len(asked) for _, asked in exam)
    assert router.log_records(tmp_path / "a.jsonl", m, exam) == records
    for cut in np.random.default_rng(0).integers(len(whole), size=6):
        (tmp_path / "b.jsonl").write_bytes(whole[:cut])
        assert router.log_records(tmp_path / "b.jsonl", m, exam) == records
        assert (tmp_path / "b.jsonl").read_bytes() == whole
    monkeypatch.undo()
    (tmp_path / "mine.txt").write_text("precious")
    for path, other in ((tmp_path / "mine.txt", exam), (tmp_path / "a.jsonl", toy.exam(1, 4))):
        with pytest.raises(ValueError, match="another model or exam"):
            router.log_records(path, m, other)
    for other in (m, train.fresh(3).add_cross_attention(toy.CA, toy.SA, toy.VIABLE)):
        with pytest.raises(ValueError, match="another model or exam"):
            router.log_records(tmp_path / "a.jsonl", other, exam[:5] if other is m else exam)


CONFIGURATIONS = [(), (4,), (7,), (4, 7), (4, 7, 10)]


def record(task, right, loss=None, matches=None, **more):
    return {"picture": 0, "task": task, "question": "q", "right": right, "matches": matches or right,
            "loss": loss or [1.0] * len(right), **more}


def test_labels_by_task_take_the_fewest_layers_that_hold_then_the_lowest_loss():
    rows = [record("a", [0, 1, 1, 1, 1], [9, 2, 3, 0, 0]), record("a", [1, 1, 1, 1, 1], [9, 3, 1, 0, 0])]
    rows += [record("b", [0, 0, 0, 1, 1])] * 99 + [record("b", [1, 0, 1, 0, 1])]
    rows += [record("c", [0, 0, 0, 1, 1])] * 98 + [record("c", [1, 0, 1, 0, 1])] * 2
    assert router.labels_by_task(CONFIGURATIONS, rows) == {"a": 2, "b": 3, "c": 4}
    assert router.labels_by_task(CONFIGURATIONS, rows, keep=0.98)["c"] == 3
    assert {x[2] for x in router.pseudo_labels(CONFIGURATIONS, rows, leave_out=["a", "b"])} == {4}
    with pytest.raises(ValueError, match="leave out some, not all"):
        router.pseudo_labels(CONFIGURATIONS, rows, leave_out=["a", "b", "c"])


def test_oracle_takes_most_matches_then_fewest_layers():
    assert router.oracle(CONFIGURATIONS, record("a", [0, 0, 0, 0, 0], matches=[1, 2, 2, 3, 3])) == 3
    assert router.oracle(CONFIGURATIONS, record("a", [0, 0, 0, 0, 0], matches=[0, 0, 0, 0, 0])) == 0
    assert router.oracle(CONFIGURATIONS, record("a", [0, 1, 1, 1, 1], loss=[0, 2, 1, 0, 0])) == 2


def test_viable_configurations_hold_something_that_no_cheaper_one_holds():
    c = Config(layers=12, ca=(2, 5, 8, 11), sa=(4, 7, 10))
    rows = [record("easy", [1, 1, 1, 1, 1]), record("hard", [0, 0, 1, 1, 1]), record("hardest", [0, 0, 0, 0, 1])]
    assert router.viable(c, CONFIGURATIONS, rows) == ((), (7,), (4, 7, 10))
    rows = [record("easy", [0, 1, 1, 1, 1]), record("other", [0, 1, 0, 1, 1]), record("never", [0, 0, 0, 0, 0])]
    assert router.viable(c, CONFIGURATIONS, rows) == ((4,),)


def test_subnetworks_are_all_subsets_or_the_families():
    assert len(router.subnetworks((4, 7, 10))) == 8 and router.subnetworks((4, 7, 10))[-1] == (4, 7, 10)
    many = router.subnetworks((1, 4, 7, 10, 13, 16, 19, 22))
    assert {(), (1,), (1, 4), (1, 4, 7), (22,), (19, 22), (1, 22), (1, 19, 22), (1, 10), (1, 13, 22)} & set(many) >= {
        (), (1,), (1, 4), (1, 4, 7), (22,), (19, 22), (1, 22), (1, 19, 22), (1, 10)}
    assert many[-1] == (1, 4, 7, 10, 13, 16, 19, 22) and 20 < len(many) < 60 and many == sorted(many, key=len)


def test_report_adds_up():
    """Accuracy, layers, savings and shares of router and oracle, from records made by hand."""
    c = Config(**{**vars(toy.config()), "ca": toy.CA, "sa": toy.SA, "viable": tuple(CONFIGURATIONS), "router": True})
    records = [record("a", [0, 1, 1, 1, 1], route=1), record("a", [1, 1, 1, 1, 1], route=0),
               record("b", [0, 0, 0, 0, 1], route=4), record("b", [0, 0, 0, 1, 0], route=4)]
    table = router.Report(c, records, {"easy": ["a"], "hard": ["b"]}, 9, (72, 72))
    rows = {row["name"]: row for row in table.rows}
    assert [rows[n]["easy"] for n in ("none", "4", "router", "oracle")] == [0.5, 1, 1, 1]
    assert [rows[n]["hard"] for n in ("none", "4,7,10", "router", "oracle")] == [0, 0.5, 0.5, 1]
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
    text = router.columns(cells)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert [w for line in text.splitlines() if line.startswith("layers") for w in line.split()[1:]] == cells[0][1:]


def test_packed_dense_is_not_what_savings_are_measured_by():
    c = Config(**{**vars(toy.config()), "ca": toy.CA, "sa": toy.SA, "viable": ((), (4,)), "pack": 4.0})
    records = [record("a", [1, 1])]
    rows = router.Report(c, records, {"all": ["a"]}, 9, (72, 72), [record("a", [1])]).rows
    assert rows[0]["name"] == "dense" and rows[0]["saving"] == rows[0]["end_to_end"] == 1
    packed = data.tiling(72, 72, c).tokens
    assert rows[1]["saving"] == flops.llm_flops(c.unpacked(), range(12), 9, 51) / flops.llm_flops(c, (), 9, packed)


# --- training and the command line ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def visor(tmp_path_factory):
    """An untrained VISOR miniature, as a checkpoint."""
    directory = tmp_path_factory.mktemp("router") / "visor"
    train.fresh(1).add_cross_attention(toy.CA, toy.SA, toy.VIABLE).save_pretrained(directory)
    return directory


def call(main, *words):
    try:
        run(lambda: main([str(w) for w in words]))
    except SystemExit as e:
        return e.code
    return 0


SMALL = ["--batch-size", 6, "--steps", 3, "--exam", 2, "--save-every", 2]


def test_stage_3_moves_the_router_alone_and_resumes(visor, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.RECIPES, 3, {**train.RECIPES[3], "questions": 2})
    words = ["--stage", 3, "--model", visor, *SMALL]
    assert call(train.main, *words, "--out", tmp_path / "a") == 0
    before, after = (dict(VLM.from_pretrained(d).named_parameters()) for d in (visor, tmp_path / "a/stage3-000003"))
    assert {n for n in after if n not in before} == {n for n in after if n.startswith("router.")}
    assert all(torch.equal(before[n], after[n]) for n in before)
    start = dict(VLM.from_pretrained(tmp_path / "a/stage3-000002").named_parameters())
    assert all(not torch.equal(start[n], after[n]) for n in after if n.startswith("router."))

    (tmp_path / "b").mkdir()
    lines = (tmp_path / "a/labels.jsonl").read_text()
    (tmp_path / "b/labels.jsonl").write_text(lines[:len(lines) // 2])
    real, count = router.Lessons.losses, []

    def killed(*args):
        count.append(1)
        if len(count) == 2:
            train.signal.raise_signal(train.signal.SIGINT)
        return real(*args)
    monkeypatch.setattr(router.Lessons, "losses", killed)
    assert call(train.main, *words, "--out", tmp_path / "b") == 130
    assert call(train.main, *words, "--out", tmp_path / "b", "--resume") == 0
    again = dict(VLM.from_pretrained(tmp_path / "b/stage3-000003").named_parameters())
    assert all(torch.equal(again[n], after[n]) for n in after)
    assert (tmp_path / "b/labels.jsonl").read_text() == lines
    capsys.readouterr()
    assert call(router.main, "--report", "--model", tmp_path / "a/stage3-000003", "--exam", 2,
                "--out", tmp_path / "x.png") == 0
    out = capsys.readouterr().out
    assert "routed to" in out and all(len(line) <= 80 for line in out.splitlines())
    assert (tmp_path / "x.png").stat().st_size > 10000
    assert call(train.main, "--stage", 2, "--model", tmp_path / "a/stage3-000003", *SMALL, "--out", tmp_path / "c") == 0
    assert not VLM.from_pretrained(tmp_path / "c/stage2-000003").config.router  # what it chose among has changed


def test_stage_3_learns_labels_that_depend_on_the_words(visor):
    """The policy alone tells twelve kinds of question apart, even in a model that knows nothing."""
    m = VLM.from_pretrained(visor)
    torch.manual_seed(0)
    m.add_router()
    m.requires_grad_(False)
    m.router.requires_grad_(True)
    exam = toy.exam(0, 20, toy.TRAIN)
    targets = [(i, q, toy.TASKS[task].level) for i, (_, asked) in enumerate(exam) for task, q, _ in asked]
    lessons, (opt, *_) = router.Lessons(m, exam, targets, 0, 64), learn.optimizers(m, 0.03)["adamw"]
    for step in range(150):
        next(lessons.losses(lessons[step], None, step)).backward()
        opt.step()
        opt.zero_grad()
    batch, wanted = router.Lessons(m, exam, targets, 1, 256)[0]
    with torch.no_grad():
        chosen = m.policy(m.read(batch, "auto"), batch.asks)[:, 0].argmax(-1)  # the likeliest
    assert (chosen == wanted).float().mean() > 0.95


def test_search_writes_the_viable_ones(visor, tmp_path, monkeypatch, capsys):
    VLM.from_pretrained(visor).save_pretrained(tmp_path / "m")
    words = ["--search", "--model", tmp_path / "m", "--exam", 3, "--out", tmp_path / "h.png"]
    before = (tmp_path / "m/config.json").read_text()
    assert call(router.main, *words) == 2 and "train it longer" in capsys.readouterr().err  # it can do nothing
    assert (tmp_path / "m/config.json").read_text() == before
    monkeypatch.setattr(router, "accuracy", lambda records, i: {t: (i + 1) / 8 for t in toy.TASKS} | {"exist": 1.0})
    assert call(router.main, *words) == 0
    out, err = capsys.readouterr()
    assert "config.json" in err and (tmp_path / "h.png").stat().st_size > 5000
    starred = [word[:-1] for word in out.split() if word.endswith("*")]
    assert starred == ["none", "4,7,10"] and all(len(line) <= 80 for line in out.splitlines())
    assert VLM.from_pretrained(tmp_path / "m").config.viable == ((), (4, 7, 10))


def test_label_prints_what_it_chose(visor, tmp_path, capsys):
    assert call(router.main, "--label", tmp_path / "x.jsonl", "--model", visor, "--exam", 2) == 0
    assert {line[:14].strip() for line in capsys.readouterr().out.splitlines()} == set(toy.TASKS)
    first = json.loads((tmp_path / "x.jsonl").read_text().splitlines()[1])
    assert set(first) >= {"picture", "task", "question", "answer", "right", "loss"}


@pytest.mark.parametrize("words, say", [
    ([], "--search"), (["--search", "--report"], "one of"), (["--report", "--exam", 0], "--exam"),
    (["--report", "--out", "x.jpg"], ".png"), (["--report", "--keep", 2], "--keep"), (["--report"], "no router")])
def test_bad_input_is_one_line(words, say, visor, capsys):
    assert call(router.main, *words, "--model", visor) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and say in err[-1]


def test_search_refuses_models_that_it_would_break(visor, tmp_path, capsys):
    torch.manual_seed(0)
    VLM.from_pretrained(visor).add_router().save_pretrained(tmp_path / "routed")
    assert call(router.main, "--search", "--model", tmp_path / "routed") == 2
    train.fresh(0).save_pretrained(tmp_path / "dense")
    assert call(router.main, "--search", "--model", tmp_path / "dense") == 2
    assert "dense model" in capsys.readouterr().err
