"""paper.analyse: its numbers are those of slow, independent references; its command writes what it says."""
import json
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from cli import run
from config import Plan, plan_name
from evaluation import accuracy
from flops import prompt_flops
from paper import analyse, inside, masked
from router import summarise
from tests import tiny

VIABLE = ((1,), (1, 4), (1, 4, 7))


def visor(**changes):
    """A random VISOR with a router, and the overview."""
    m = tiny.model(**{"layers": 9, "visor": False, **changes}).add_cross_attention(viable=VIABLE)
    return tiny.shake(m.add_router(0.02))


# --- what happens inside ----------------------------------------------------------------------------------------------

@torch.no_grad()
def slow(m, prompt, n, sa):
    """(shares (L, 3), the visual rows as they enter each layer), over one sequence with a mask, weight by weight."""
    lm, c = m.language_model, m.config
    t, v = m.embed(data.collate([prompt]))
    position = torch.tensor(prompt.t_pos + prompt.v_pos)
    order = position.argsort()
    position, x = position[order], torch.cat([t[0], v[0]])[order]
    is_image = (order >= len(prompt.ids))
    end = prompt.v_pos[-1]                                    # everything behind the image is query or answer
    answer = position[-n:].tolist()
    query = [p for p in position.tolist() if end < p < answer[0]]
    assert query and len(answer) == n
    causal = position[None] <= position[:, None]
    shares, states = [], []
    for l, block in enumerate(lm.layers):
        states.append(x[is_image])
        z = x
        if l not in sa and l in c.ca:
            before = position[None] < position[:, None]
            image = torch.where(is_image, 0, -1)
            z = x + masked.cross_attention(lm.cross[str(l)], x, image, before & is_image, c)
        visible = causal if l in sa else causal & ~is_image
        q, k, _ = block.self_attn.qkv_proj(block.input_layernorm(z)).split(
            [h * c.head_dim for h in (c.heads, c.kv_heads, c.kv_heads)], dim=1)
        rotary = position[:, None].expand(-1, 3)
        q, k = masked.rotated(q, rotary, c), masked.rotated(k, rotary, c)
        weight = torch.zeros(len(x), len(x), dtype=x.dtype)
        for row in [*query, *answer]:
            for h in range(c.heads):
                g = h * c.kv_heads // c.heads
                score = k[:, g * c.head_dim:(g + 1) * c.head_dim] @ q[row, h * c.head_dim:(h + 1) * c.head_dim]
                e = (score / c.head_dim ** 0.5).exp() * visible[row]
                weight[row] += e / e.sum() / c.heads
        shares.append([weight[query][:, is_image].sum(1).mean(), weight[answer][:, is_image].sum(1).mean(),
                       weight[answer][:, query].sum(1).mean()])
        out = masked.qwen2_layer(block, z, rotary, visible, c)
        x = out if l in sa else torch.where(is_image[:, None], x, out)
    return torch.tensor(shares), states


@pytest.mark.parametrize("sa", [(), (1, 4), tuple(range(6))], ids=str)
def test_attention_shares_are_those_of_an_explicit_softmax(sa):
    m = tiny.model(visor=sa != tuple(range(6))).double()
    image = data.process_image(tiny.image(50, 40), m.config)
    pairs = ("what?", "ab"), ("a longer question", "x"), ("how many are in here", "seven")
    prompts, n = zip(*(inside.answered(q, a, image, m) for q, a in pairs))
    assert n == (2, 1, 5)
    found = inside.attention_shares(m, prompts, n, sa)
    assert found.shape == (3, 6, 3) and found.dtype == torch.float64
    for own, prompt, k in zip(found, prompts, n):
        want, states = slow(m, prompt, k, sa)
        assert (own - want).abs().max() < 1e-6
        assert (own[:, 0] > 0).tolist() == [l in sa for l in range(6)]
        last = m.config.vision_readers(sa)[1]
        streams = inside.vision_states(m, prompt, sa)
        assert len(streams) == last + 1
        for stream, state in zip(streams, states):
            assert (stream - state).abs().max() < 1e-6


def test_the_tokens_that_predict_an_answer():
    """"ab" is predicted by the last token of the question's turn, and by a."""
    m = tiny.model()
    prompt, n = inside.answered("what?", "ab", data.process_image(tiny.image(9, 9), m.config), m)
    text = m.tokenizer.decode(prompt.ids, skip_special_tokens=False)
    assert text.endswith("what?<|im_end|>\n<|im_start|>assistant\na") and n == 2
    assert len(prompt.ids) == len(prompt.t_pos)


def test_attention_and_cka_by_task():
    """Means over a task's questions, whatever else was asked about their images."""
    m = tiny.model(visor=False)
    eval_set = [(tiny.image(50, 40, 0), [("a", "one?", "x"), ("b", "two, or more?", "yz")]),
                (tiny.image(20, 90, 1), [("b", "three?", "x")])]
    want, streams = {}, {}
    for image, asked in eval_set:
        x = data.process_image(image, m.config)
        for task, q, a in asked:
            prompt, n = inside.answered(q, a, x, m)
            want.setdefault(task, []).append(inside.attention_shares(m, [prompt], [n], range(6))[0])
            streams.setdefault(task, []).append(inside.linear_cka(inside.vision_states(m, prompt, range(6))))
    for found, own in ((inside.attention(m, eval_set), want), (inside.cka(m, eval_set), streams)):
        assert set(found) == {"a", "b"}
        for task, x in found.items():
            assert (x - sum(own[task]) / len(own[task])).abs().max() < 1e-5


@pytest.mark.parametrize("n, d", [(30, 5), (5, 30), (12, 12), (2, 3)])
def test_cka_from_its_definition(n, d):
    """Gram matrices, centred by H on both sides; HSIC is their inner product."""
    x = torch.randn(4, n, d, dtype=torch.float64) + torch.randn(4, 1, d, dtype=torch.float64)
    x[1] = 3 * x[0] + 1  # alike but for scale and shift
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    grams = [h @ (a @ a.T) @ h for a in x]
    found = inside.linear_cka(x)
    for i, k in enumerate(grams):
        for j, l in enumerate(grams):
            assert abs(found[i, j] - (k * l).sum() / (k.norm() * l.norm())) < 1e-12
    assert abs(found[0, 1] - 1) < 1e-12


def test_cka_of_many_tokens_needs_no_matrix_of_them():
    x = torch.randn(2, 200_000, 3)  # 160 GB, in float32
    assert inside.linear_cka(x).shape == (2, 2)


# --- without vision in some layers ------------------------------------------------------------------------------------

def test_dropped_layers_are_missing_in_sa(monkeypatch):
    """Each subset's accuracy is that of the configuration without it, in whatever order they were computed."""
    m = tiny.model(visor=False, layers=8)
    subsets = inside.layer_subsets(8, 40, seed=3)
    assert len(set(subsets)) == 40 and subsets == inside.layer_subsets(8, 40, seed=3)
    assert {len(x) for x in subsets} == {1, 2, 3, 4} and all(list(x) == sorted(set(x)) for x in subsets)

    def right(sa, task):
        return hash((sa, task)) % 2
    asked = []

    def results(model, eval_set, plans):
        assert model is m and eval_set == "questions" and len(plans) <= inside.AT_ONCE
        asked.extend(plans)
        return [{"task": task, "correct": [right(plan.sa, task) for plan in plans]} for task in "ab"]
    monkeypatch.setattr(inside, "all_results", results)
    found = inside.drop(m, "questions", subsets)
    assert found == [{task: right(tuple(l for l in range(8) if l not in x), task) for task in "ab"}
                     for x in ((), *subsets)]
    assert len(asked) == len(set(asked)) == 41 and {x.pixels for x in asked} == {"all"}
    with pytest.raises(ValueError, match="--subsets 65"):
        inside.layer_subsets(8, 65, seed=0)


def test_correlation_from_its_definition():
    x = np.random.default_rng().random((20, 5))
    x[:, 3] = 0.25  # never changes
    found = inside.correlation(x)
    for i, j in combinations(range(5), 2):
        if 3 in (i, j):
            assert found[i, j] == found[j, i] == 0
            continue
        a, b = x[:, i] - x[:, i].mean(), x[:, j] - x[:, j].mean()
        assert abs(found[i, j] - sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5) < 1e-12
    assert np.diag(found).tolist() == [1] * 5


def slow_clusters(similarity):
    """Average linkage by plain loops: which of two groups each task is in."""
    group = list(range(len(similarity)))
    while len(set(group)) > 2:
        best = None
        for a in sorted(set(group)):
            for b in sorted(set(group)):
                if a < b:
                    between = [similarity[i][j] for i, x in enumerate(group) for j, y in enumerate(group)
                               if x == a and y == b]
                    mean = sum(between) / len(between)
                    if best is None or mean > best[0]:
                        best = mean, a, b
        group = [best[1] if x == best[2] else x for x in group]
    return {tuple(i for i, x in enumerate(group) if x == own) for own in group}


def test_clusters_of_plain_loops():
    rng = np.random.default_rng()
    for _ in range(20):
        x = rng.random((7, 7))
        x = (x + x.T) / 2
        assert set(map(tuple, inside.two_clusters(x))) == slow_clusters(x)
    hidden = rng.permutation(9) < 4                       # two kinds of task, which is which nobody says
    x = np.where(hidden[:, None] == hidden, 0.8, 0.1) + rng.uniform(-0.05, 0.05, (9, 9))
    kept = np.where(hidden, 0.9, 0.4)
    easy, hard = inside.easy_and_hard(x, kept)
    assert easy == np.flatnonzero(hidden).tolist() and hard == np.flatnonzero(~hidden).tolist()
    assert inside.easy_and_hard(np.ones((1, 1)), np.ones(1)) == ([0], [])


# --- configurations, routes, oracle, cost -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def made_up():
    """A stand-in for a Subject, with made-up results of all plans."""
    c, rng = visor().config, np.random.default_rng()
    n, groups = len(c.plans), {"easy": ["a", "b"], "hard": ["c"]}
    results = []
    for i in range(60):
        length = int(rng.integers(1, 4))
        matches = rng.integers(0, length + 1, n).tolist()
        results.append({"image": i, "task": "abc"[i % 3], "question": "q", "answer": "a", "prefix_match": matches,
                        "correct": [int(x == length) for x in matches], "loss": rng.random(n).tolist(),
                        "route": int(rng.integers(n))})
    table = summarise(c, results, groups, 20, (60, 60))
    return SimpleNamespace(config=c, report=(table, results), groups=groups)


def test_oracle_of_plain_loops(made_up):
    plans, results = made_up.config.plans, made_up.report[1]
    assert [x.pixels for x in plans] == ["overview", "all", "all", "all"]
    record, text = analyse.oracle_choices(made_up)
    for task in "abc":
        chosen, right = Counter(), []
        for r in (r for r in results if r["task"] == task):
            best = None
            for i, plan in enumerate(plans):
                key = -r["prefix_match"][i], plan.pixels == "all", len(plan.sa), r["loss"][i]
                if best is None or key < best[0]:
                    best = key, i
            chosen[plan_name(made_up.config, plans[best[1]])] += 1
            right.append(any(r["correct"]))
        own = record["by_task"][task]
        assert own["accuracy"] == sum(right) / 20 and own["questions"] == 20
        assert own["shares"] == {name: k / 20 for name, k in chosen.items()}
        assert own["largest"] == accuracy(results, 3)[task]
        assert own["layers"] == sum(k * (name.count(",") + 1) for name, k in chosen.items()) / 20
    assert record["largest"] == "1,4,7" and "ov:1" in text


def test_routes_and_configurations_of_plain_loops(made_up):
    plans, results = made_up.config.plans, made_up.report[1]
    chosen, _ = analyse.routes(made_up)
    configurations, _ = analyse.configurations(made_up)
    assert [Plan(tuple(row["sa"]), row["pixels"]) for row in configurations["rows"]] == list(plans)
    for task in "abc":
        own = [r for r in results if r["task"] == task]
        count = Counter(plan_name(made_up.config, plans[r["route"]]) for r in own)
        assert chosen["by_task"][task]["shares"] == pytest.approx({name: k / 20 for name, k in count.items()})
        assert chosen["accuracy"][task] == sum(r["correct"][r["route"]] for r in own) / 20
        for i, row in enumerate(configurations["rows"]):
            assert row["tasks"][task] == sum(r["correct"][i] for r in own) / 20


def test_cost_is_that_of_flops():
    c = tiny.config(max_tiles=4)
    subject = SimpleNamespace(config=c, eval_set=lambda what: [("image", [("t", "q", "a")])],
                              reference=lambda *_: ({}, 17, (9, 9)))
    record, _ = analyse.cost(subject)
    assert record["visual_tokens"][0] == 16 and record["visual_tokens"][-1] == 5 * 16 and not c.ca
    for sa in ((), tuple(range(6)), (1, 4)):
        name = "none" if not sa else "dense" if len(sa) == 6 else "1,4"
        want = [prompt_flops(tiny.config().add_visor(), sa, 17, n) for n in record["visual_tokens"]]
        assert record["flops"][name] == want


# --- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints "visor", "dense" and "pruned"; mix.yaml, whose files "easy" and "hard" have 3 questions each."""
    folder = tmp_path_factory.mktemp("analyse")
    visor().save_pretrained(folder / "visor")
    tiny.model(visor=False).save_pretrained(folder / "dense")
    tiny.model(visor=False, reduce="pyramiddrop:2:.5").save_pretrained(folder / "pruned")
    for k, name in enumerate(("easy", "hard")):
        rows = []
        for i in range(3):
            tiny.image(30 + 20 * i, 40 + 10 * k, i).save(folder / f"{name}{i}.png")
            rows.append({"image": f"{name}{i}.png", "conversations": [
                {"from": "human", "value": f"<image>\nquestion {i}?"}, {"from": "gpt", "value": "ab"[:1 + i % 2]}]})
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "mix.yaml").write_text("datasets:\n" + "".join(
        f"  - json_path: {folder}/{name}.json\n    sampling_strategy: all\n" for name in ("easy", "hard")))
    return folder


@pytest.mark.parametrize("name, made, left_out", [
    ("dense", ["attention", "cka", "drop", "cost"], ["configurations", "routes", "oracle"]),
    ("visor", ["attention", "cka", "configurations", "routes", "oracle", "cost"], ["drop"])])
def test_command(files, tmp_path, capsys, name, made, left_out):
    pytest.importorskip("matplotlib")
    args = ["--model", str(files / name), "--data", str(files / "mix.yaml"), "--limit", "2", "--subsets", "4",
            "--threads", "1", "--out", str(tmp_path / "new" / "folder")]
    analyse.main(args)
    out, err = capsys.readouterr()
    written = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert written == {f"{what}.{kind}" for what in made for kind in ("json", "png")}
    for what in made:
        record = json.loads((tmp_path / "new" / "folder" / f"{what}.json").read_text())
        assert record["command"].startswith("python -m paper.analyse --model ") and record["model"] == args[1]
        assert record["dtype"] == "float32" and record["limit"] == 2 and record["data"] == args[3]
        width, height = Image.open(tmp_path / "new" / "folder" / f"{what}.png").size
        assert width > 600 and height > 300
        assert f"{what}, {args[1]}\n\n" in out
        if what in ("attention", "cka", "routes", "oracle"):
            assert set(record["by_task"]) == {"easy", "hard"}
    for what in left_out:
        assert f"no {what}: {args[1]}: it " in err


def test_without_matplotlib(files, tmp_path, capsys, monkeypatch):
    def missing():
        raise ImportError
    monkeypatch.setattr(analyse, "pyplot", missing)
    analyse.main(["--what", "cost", "--model", str(files / "dense"), "--data", str(files / "easy.json"), "--threads",
                  "1", "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert (tmp_path / "cost.json").is_file() and not (tmp_path / "cost.png").exists()
    assert f"no {tmp_path}/cost.png: drawing needs matplotlib" in err.splitlines()[-1]


@pytest.mark.parametrize("args, said", [
    ("--what colours", "invalid choice"),
    ("--limit 0", "ask at least one"),
    ("--subsets 1", "--subsets at least 2"),
    ("--threads 0", "--threads must be"),
    ("--images DIR", "give --data FILE too"),
    ("--model DIR/visor", "does not know the miniature's world"),
    ("--model DIR/visor --data DIR/easy.json --what drop", "give the dense model"),
    ("--model DIR/dense --data DIR/easy.json --what oracle", "no viable configurations"),
    ("--model DIR/dense --data DIR/easy.json --what drop --subsets 17", "--subsets 17: of 6 layers at most 16"),
    ("--model DIR/pruned --data DIR/easy.json --what attention", "drops visual tokens between its layers"),
    ("--model DIR/dense --data DIR/missing.json", "missing.json"),
    ("--model DIR/missing --data DIR/easy.json", "missing"),
    ("--what cost --out DIR/easy.json", "easy.json"),
    ("--device abacus", "--device abacus"),
])
def test_bad_input(files, tmp_path, capsys, args, said):
    args = ["--out", str(tmp_path), "--threads", "1", *args.replace("DIR", str(files)).split()]
    with pytest.raises(SystemExit) as end:
        run(lambda: analyse.main(args))
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and not out and len(errors) == 1 and said in errors[0]
    assert not list(tmp_path.iterdir())
