"""PyramidDrop and SparseVLM: the staged language model against one written from their description, layer by layer over
the whole sequence; and every reduction of visual tokens in batches, in decoding, in what it costs and in evaluation.

In float64, where the two may differ by rounding alone: what is dropped is decided in float32, and the same.
"""
import re
from dataclasses import replace
from itertools import groupby, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import decoding
import flops
import methods
from config import Plan
from conversation import Conversation
from evaluation import all_results
from layout import make_layout, rope_table
from model import VLM
from reduction import best, raters, recycle, sparsevlm
from tests import tiny
from tests.test_flops import counted, halves, prompt_of
from toy import world
from train import DENSE as NANO

DENSE = tuple(range(6))
PYRAMID = ["pyramiddrop:2,4:.5,.25", "pyramiddrop:1,2,5:.9,.3,.001", "pyramiddrop:3:1", "pyramiddrop:easy"]
DROPPING = ["sparsevlm:2:drop", "sparsevlm:.3:drop", "sparsevlm:6:drop", "sparsevlm::drop"]
RECYCLING = ["sparsevlm", "sparsevlm:2", "sparsevlm:6", "sparsevlm:1000"]
INSIDE = [PYRAMID[0], DROPPING[0], RECYCLING[1]]
# One for each of methods.FORMS, where a tile has 16 patches
BEFORE = ["pack:2", "downsample:4", "m3:2", "visionzip:4+3", "vispruner:5+2", "hired:.3"]
PICTURES = {"one": [(70, 110)], "tall": [(20, 200)], "small": [(30, 30)], "two": [(50, 20), (20, 90)], "three": [
    (90, 20), (64, 64), (33, 70)]}


def prompt(m, sizes, text="what is it?", seed=0, more=()):
    """Images of some sizes, the second a lone tile, text between them and behind; more: what was said since, and is
    asked now."""
    images = [data.process_image(tiny.image(*s, seed + i), m.config, i != 1) for i, s in enumerate(sizes)]
    question = " and ".join(["<image>"] * len(sizes)) + "\n" + text
    return data.encode(data.chatml([question, *more]), m.tokenizer, images)


def model(reduce, seed=0):
    return tiny.model(seed, visor=False).double().add_reduction(reduce)


# --- from the description, one prompt --------------------------------------------------------------------------------

def norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def attends(block, x, c, alive=None):
    """Of one layer, each head's weights (T, T) and values (T, D). x (T, d); alive (T,) bool: tokens that others see,
    and that count in positions (default: all)."""
    w, b, h, found = block.self_attn.qkv_proj.weight, block.self_attn.qkv_proj.bias, norm(x, block.input_layernorm), []
    at, alive = torch.arange(len(x)), torch.ones(len(x), dtype=torch.bool) if alive is None else alive
    seen = (at <= at[:, None]) & alive | (at == at[:, None])  # each by itself, so that no row is without a key
    cos, sin = (table[:, 0, c.head_dim // 2:].double() for table in rope_table(alive.cumsum(0) - 1, c))

    def part(i):                                      # of q, then k, then v, a head's features (T, D)
        return h @ w[i * c.head_dim:(i + 1) * c.head_dim].T + b[i * c.head_dim:(i + 1) * c.head_dim]

    def turned(x):                                    # features i and i + D / 2 by one angle
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    for head in range(c.heads):
        shared = c.heads + head // (c.heads // c.kv_heads)
        q, k, v = turned(part(head)), turned(part(shared)), part(shared + c.kv_heads)
        scores = (q @ k.T / c.head_dim ** 0.5).masked_fill(~seen, -torch.inf)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        found.append((e / e.sum(-1, keepdim=True), v))
    return found


def layer(block, x, heads):
    x = x + torch.cat([w @ v for w, v in heads], dim=1) @ block.self_attn.o_proj.weight.T
    gate, up = (norm(x, block.post_attention_layernorm) @ block.mlp.gate_up_proj.weight.T).chunk(2, dim=1)
    return x + (gate * gate.sigmoid() * up) @ block.mlp.down_proj.weight.T


def sequence(m, p):
    """What enters layer 0, in order of position: x (T, d), and of each token its image, or -1 for text."""
    t, v = m.embed(data.collate([p]))
    order = np.argsort(p.v_pos + p.t_pos)
    assert sorted(p.v_pos + p.t_pos) == list(range(len(order)))
    return torch.cat([v[0], t[0]])[order], np.array(p.v_img + [-1] * len(p.ids))[order]


def who_looks(m, p, x, image):
    """The places of the text tokens whose attention decides, and among how many they were looked for."""
    if m.config.reduction.method == "pyramiddrop":
        return [p.answer_starts[-1] - 1], 0
    asked = list(range(max(p.v_pos) + 1, p.answer_starts[-1]))
    is_rater = raters(x[image >= 0], x[asked]).tolist()
    return [i for i, yes in zip(asked, is_rater) if yes] or asked, len(asked)


def chosen(r, k, weights, first, layers):
    """The k-th drop: which of an image's tokens stay. weights (raters, n)."""
    if r.method == "pyramiddrop":
        return best(weights[0], max(1, int(first * r.pyramid(layers)[1][k]))).tolist()
    return sparsevlm(weights, r.sparse_scale(first)).tolist()


def slow_layers(m, p):
    """What is dropped is gone, and what is left closes up: (logits of the text tokens (Nt, vocab), LayerTokens)."""
    c, r = m.config, m.config.reduction
    x, image = sequence(m, p)
    looking, asked = who_looks(m, p, x, image)
    place = np.arange(len(x))                                      # in the prompt; -1: a merged token
    counts = [[(image == i).sum() for i in range(len(p.images))]]
    for l, block in enumerate(m.language_model.layers):
        heads = attends(block, x, c)
        decides = l if r.method == "pyramiddrop" else l + 1        # before its own attention, or behind the layer
        y = x if decides == l and l in r.drops(c.layers) else layer(block, x, heads)
        if decides in r.drops(c.layers):
            mean = sum(w for w, _ in heads) / len(heads)
            mean, order = mean[[list(place).index(i) for i in looking]], []
            for i, own in groupby(range(len(x)), key=image.tolist().__getitem__):  # text, an image, text, ...
                own = list(own)
                keep = chosen(r, len(counts) - 1, mean[:, own], counts[0][i], c.layers) if i >= 0 else range(len(own))
                order += [own[j] for j in keep]
                gone = [j for n, j in enumerate(own) if n not in keep]
                if gone and r.method == "sparsevlm" and not r.option:
                    merged = recycle(y[gone], mean[:, gone].mean(0))
                    order += range(len(y), len(y) + len(merged))   # behind what stays
                    y, image = torch.cat([y, merged]), np.append(image, [i] * len(merged))
                    place = np.append(place, [-1] * len(merged))
            y, image, place = y[order], image[order], place[order]
            counts.append([(image == i).sum() for i in range(len(p.images))])
            if decides == l:                                       # the layer runs on what is left
                y = layer(block, y, attends(block, y, c))
        x = y
    tokens = flops.LayerTokens(counts, len(looking), asked) if asked else flops.LayerTokens(counts)
    return m.head(norm(x[image < 0], m.language_model.norm)), tokens


def slow_masked(m, p):
    """Nothing leaves: what is dropped is seen by no token any more, and does not count in positions. Logits."""
    c, r = m.config, m.config.reduction
    x, image = sequence(m, p)
    rows, _ = who_looks(m, p, x, image)
    alive, heads = torch.ones(len(x), dtype=torch.bool), None
    for l, block in enumerate(m.language_model.layers):
        if l in r.drops(c.layers):
            heads = attends(block, x, c, alive) if r.method == "pyramiddrop" else heads
            mean = sum(w for w, _ in heads)[rows] / len(heads)
            for i in range(len(p.images)):
                own = [j for j in range(len(x)) if image[j] == i and alive[j]]
                keep = chosen(r, r.drops(c.layers).index(l), mean[:, own], (image == i).sum(), c.layers)
                alive[[j for n, j in enumerate(own) if n not in keep]] = False
        heads = attends(block, x, c, alive)
        x = layer(block, x, heads)
    return m.head(norm(x[image < 0], m.language_model.norm))


@torch.no_grad()
def staged(m, prompts):
    """(logits of the text tokens of each prompt (Nt, vocab), the PrunedCache)."""
    cache = m.prefill(prompts, tuple(range(m.config.layers)), 9)
    t, _ = cache.run(tuple(range(m.config.layers)))
    return [m.head(m.language_model.norm(x[:len(p.ids)])) for x, p in zip(t, prompts)], cache


def differ(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float64
    return (a - b).abs().max().item()


@pytest.mark.parametrize("pictures", PICTURES)
@pytest.mark.parametrize("reduce", PYRAMID + DROPPING + RECYCLING)
@torch.no_grad()
def test_stages_against_the_description(reduce, pictures):
    """Where nothing is merged, twice: with what is dropped gone, and with it masked."""
    seed = [*PICTURES].index(pictures)
    m = model(reduce, seed)
    p = prompt(m, PICTURES[pictures], "what is " * seed + "it?", seed, ["a cat", "why?"] * (seed % 2))
    (ours,), cache = staged(m, [p])
    wanted, tokens = slow_layers(m, p)
    assert differ(ours, wanted) < 1e-9 and cache.ran(0) == tokens and [x[0] for x in cache.counts] == tokens.counts
    if reduce not in RECYCLING:
        assert differ(ours, slow_masked(m, p)) < 1e-9
    plain = m.language_model(*m.embed(data.collate([p])), m.layout(data.collate([p])), DENSE)[0]
    assert (differ(ours, m.head(plain)) < 1e-9) == (reduce == "pyramiddrop:3:1")  # else something was dropped


@pytest.mark.parametrize("reduce, layers, drops", [
    ("sparsevlm", 24, (3, 6, 12, 15)), ("sparsevlm:2", 28, (3, 6, 14, 18)), ("sparsevlm::drop", 6, (1, 2, 4, 5)),
    ("pyramiddrop:easy", 24, (1, 6, 12)), ("pyramiddrop", 24, (4, 10, 16)), ("pyramiddrop:easy", 28, (1, 2, 6, 10)),
    ("pyramiddrop:hard", 28, (2, 8, 12, 18)), ("pyramiddrop:easy", 6, (1, 2, 3)), ("pyramiddrop:2,4:1,.5", 6, (2, 4))])
def test_layers_before_which_tokens_go(reduce, layers, drops):
    assert methods.parse(reduce).drops(layers) == drops


@torch.no_grad()
def test_without_a_token_above_the_mean_all_are_raters():
    """Where all text tokens behind the image are one, none is above their mean."""
    m = model("sparsevlm:2")
    p = prompt(m, [(50, 20)])
    behind = max(p.v_pos)
    m.language_model.embed_tokens.weight[[i for i, at in zip(p.ids, p.t_pos) if at > behind]] = 0.25
    (ours,), cache = staged(m, [p])
    wanted, tokens = slow_layers(m, p)
    assert tokens.raters == tokens.asked == p.answer_starts[-1] - behind - 1 > 9
    assert cache.ran(0) == tokens and differ(ours, wanted) < 1e-9


# --- decoding ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def seen(monkeypatch):
    """The logits (B, vocab) of each step of answers that do not end."""
    seen = []
    monkeypatch.setattr(VLM, "stop_id", -1)
    monkeypatch.setattr(decoding, "sample_token", lambda x, **_: seen.append(x.clone()) or x.argmax(-1))
    return seen


@pytest.mark.parametrize("reduce", [*INSIDE, "pyramiddrop:1,5:.3,.01"])
@torch.no_grad()
def test_decoding_is_the_forward_without_a_cache(reduce, seen):
    """Token by token: the answer so far stands behind the prompt, and the same is dropped."""
    m = model(reduce)
    prompts = [prompt(m, [(70, 110)]), prompt(m, [(50, 20), (30, 30)], "which of them?", 3)]
    answers = m.generate(prompts, DENSE, max_tokens=6, layer_tokens=(tokens := []))
    assert len(seen) == 6
    for i, (p, answer) in enumerate(zip(prompts, answers)):
        for k, token in enumerate(answer):
            so_far = p._replace(ids=p.ids + answer[:k], t_pos=p.t_pos + [p.end + j for j in range(k)])
            wanted, ran = slow_layers(m, so_far)
            assert differ(seen[k][i], wanted[-1]) < 1e-9 and wanted[-1].argmax() == token and ran == tokens[i]


# --- every method -----------------------------------------------------------------------------------------------------

assert {x.partition(":")[0] for x in BEFORE + INSIDE} == set(methods.FORMS)


def texts(m, prompts, sa):
    """Logits of the text tokens of each prompt."""
    if m.config.reduction.inside:
        return staged(m, prompts)[0]
    return [m.head(h[:len(p.ids)]) for h, p in zip(m(data.collate(prompts), sa), prompts)]


@pytest.mark.parametrize("reduce, sa", [(x, DENSE) for x in BEFORE + INSIDE] + [(x, (1, 4)) for x in BEFORE])
@torch.no_grad()
def test_a_batch_is_its_prompts(reduce, sa, seen):
    m = tiny.model(visor=sa != DENSE).double().add_reduction(reduce)
    prompts = [prompt(m, PICTURES["one"]), prompt(m, PICTURES["two"], "which?"), prompt(m, [], "hello"),
               prompt(m, PICTURES["small"], "what is in this picture?", 3)]
    alone = [texts(m, [p], sa)[0] for p in prompts]
    for a, b in zip(texts(m, prompts, sa), alone):
        assert differ(a, b) < 1e-9
    together = m.generate(prompts, sa, max_tokens=4)
    assert [[x] for x in together] == [m.generate([p], sa, max_tokens=4) for p in prompts] and len(seen) == 4 * 5
    assert differ(torch.stack(seen[:4], 1).flatten(0, 1), torch.cat(seen[4:])) < 1e-9
    assert differ(seen[0], torch.stack([x[-1] for x in alone])) < 1e-9


@pytest.mark.parametrize("reduce", BEFORE + INSIDE + ["pack:2:widen"])
@torch.no_grad()
def test_text_alone_is_what_it_was(reduce, seen):
    """Bit for bit, with the prompt and in decoding."""
    m = tiny.model(visor=False)
    p = [prompt(m, [], "hello")]
    before, answer = texts(m, p, DENSE), m.generate(p, DENSE, max_tokens=5)
    m.add_reduction(reduce)
    assert torch.equal(texts(m, p, DENSE)[0], before[0]) and m.generate(p, DENSE, max_tokens=5) == answer
    assert all(map(torch.equal, seen[:5], seen[5:])) and len(seen) == 10


# --- what it costs ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reduce", BEFORE + INSIDE + ["pack:2:widen", "visionzip:1+7", "visionzip:7+0", "hired:1"])
def test_operations_of_the_encoder(reduce):
    m = tiny.model(visor=False).add_reduction(reduce)
    for sizes in PICTURES.values():
        images = prompt_of(m, sizes).images
        tiles = sum(x.tiling.tiles for x in images)
        says = flops.tower_flops(m.config, tiles) + flops.connector_flops(m.config, tiles)
        assert says == counted(m.encode, images)


@pytest.mark.parametrize("sizes", [PICTURES["one"], PICTURES["three"], []], ids=["one", "three", "no image"])
@pytest.mark.parametrize("reduce", INSIDE + ["sparsevlm"])
def test_operations_inside(reduce, sizes):
    """A prompt, then a token of its answer behind the caches of each stage."""
    m = tiny.model(visor=False, layers=12).add_reduction(reduce)
    c, p, sa, lm = m.config, prompt_of(m, sizes), tuple(range(12)), m.language_model
    run = []
    total = counted(lambda: m.head(lm.norm(run.append(m.prefill([p], sa, 9)) or run[0].run(sa)[0])[:, -1]))
    ran = run[0].ran(0)
    for layers, counts in flops.by_layer(c, ran):
        own = len(layers) + (layers[-1] < 11 and len(sizes) > 0)  # `halves` leaves the last one out that reads vision
        total -= halves(replace(c.unreduced(), layers=own), tuple(range(own)), len(p.ids), sum(counts))
    tiles = sum(x.tiling.tiles for x in p.images)
    total -= flops.tower_flops(c, tiles) + flops.connector_flops(c, tiles)
    recycles = c.reduction.method == "sparsevlm" and not c.reduction.option
    assert flops.prompt_flops(c, sa, len(p.ids), ran) == pytest.approx(total, rel=0.001 * recycles, abs=0)

    def step():
        t = lm.embed_tokens(torch.tensor([[65]]))
        for start, stop, past in run[0].runs:
            none = np.zeros((1, 0), np.int64)
            layout = make_layout((past.text + past.vision)[:, None], none, none, np.zeros((1, 0, 0), int), past, c,
                                 m.device)
            t, _ = lm.run(t, t[:, :0], layout, sa, start, stop, run[0].run(sa)[1])
        return m.head(lm.norm(t)[:, -1])
    assert flops.token_flops(c, sa, len(p.ids), ran) == counted(step)


@pytest.mark.parametrize("reduce", PYRAMID)
@torch.no_grad()
def test_pyramiddrops_counts_are_known_before(reduce):
    m = tiny.model(visor=False).add_reduction(reduce)
    prompts = [prompt_of(m, sizes) for sizes in PICTURES.values()]
    cache = m.prefill(prompts, DENSE, 0)
    cache.run(DENSE)
    for i, p in enumerate(prompts):
        assert cache.ran(i) == flops.expected_tokens(m.config, len(p.ids), [x.tiling.tokens for x in p.images])
        assert [sum(x) for x in cache.ran(i).counts] == [int(past.vision[i]) for *_, past in cache.runs]
    assert [(a, b) for a, b, _ in cache.runs] == list(pairwise([0, *m.config.reduction.drops(6), 6]))


# --- evaluation, and several questions -------------------------------------------------------------------------------

@pytest.mark.parametrize("reduce", ["pyramiddrop:3,6:.7,.5", "sparsevlm:6:drop", "sparsevlm:8"])
@torch.no_grad()
def test_evaluate_counts_the_answers_that_are_given(reduce, monkeypatch):
    """By the miniature, which answers; its losses are those of the description. On quilts where every rank is clear: a
    singular value at the threshold is noise, and which side it falls on another rounding decides."""
    m, margins = VLM.from_pretrained(NANO).double().add_reduction(reduce), []

    def watched(weights, scale):
        values = torch.linalg.svdvals(weights.float())
        margins.append((values / values[0] / max(weights.shape) / torch.finfo(torch.float32).eps).log().abs().min())
        return sparsevlm(weights, scale)
    monkeypatch.setattr("pruning.sparsevlm", watched)
    sa, both = tuple(range(12)), ("all", "overview")
    for seed in range(5, 25):
        eval_set, _ = [(image, rows[::4]) for image, rows in world.eval_set(seed, 1)], margins.clear()
        found = {pixels: all_results(m, eval_set, [Plan(sa, pixels)], progress=False) for pixels in both}
        if min(margins, default=9) > 1:
            break
    assert min(margins, default=9) > 1
    for pixels, results in found.items():
        assert len(results) == sum(len(rows) for _, rows in eval_set)
        for r in results:
            images = [data.process_image(eval_set[r["image"]][0], m.config)]
            text = data.chatml([data.place_images(r["question"], 1)])
            p, whole = (data.seen(data.encode(x, m.tokenizer, images), pixels, m.config)
                        for x in (text, text + r["answer"] + "<|im_end|>"))
            given, = m.generate([p], sa, pixels=pixels, max_tokens=9)
            assert r["correct"] == [int(m.tokenizer.decode(given) == r["answer"])]
            logits, target = slow_layers(m, whole)[0][len(p.ids) - 1:-1], torch.tensor(whole.ids[len(p.ids):])
            assert r["loss"] == [pytest.approx(F.cross_entropy(logits, target, reduction="sum").item(), abs=1e-4)]
        assert 0 < sum(r["correct"][0] for r in results) < len(results)


@pytest.mark.parametrize("pixels", ["all", "overview"])
@pytest.mark.parametrize("reduce", INSIDE)
def test_ask_many_gives_the_whole_prompts_answer(reduce, pixels, seen):
    m = tiny.model(visor=False).add_reduction(reduce)
    image = [data.process_image(tiny.image(70, 110), m.config)]
    shared, rest = zip(*(data.split_shared(data.chatml(["<image>\n" + q])) for q in ("what is it?", "where, and why?")))
    talk = Conversation(m, data.encode(shared[0], m.tokenizer, image), DENSE, pixels)
    for question in (*rest, rest[0]):
        routes, ran, wanted = [], [], []
        asked = data.encode(question, m.tokenizer, start=talk.end)
        answer = talk.answer(asked, routes=routes, layer_tokens=ran, max_tokens=6)
        whole = data.encode(shared[0] + question, m.tokenizer, image)
        assert [answer] == m.generate([whole], DENSE, pixels, max_tokens=6, layer_tokens=wanted)
        assert routes == [Plan(DENSE, pixels)] and ran == wanted and len(answer) == 6
    with pytest.raises(ValueError, match="^--reduce " + re.escape(reduce)):
        talk.answer(asked, keep=True)


@pytest.mark.parametrize("reduce", INSIDE)
@torch.no_grad()
def test_segments_of_unequal_length_and_with_images_are_one_prompt(reduce):
    """What came in before each question differs between samples; the questions bring images of their own, and one is
    taken back and asked again."""
    m = model(reduce)
    images = [data.process_image(tiny.image(30 + 9 * i, 50, i), m.config, False) for i in range(3)]
    texts = ["x<image>", "a longer <image>"], ["and <image>?", "why?"], ["this?", "or <image> this?"]
    rows, whole = [[], []], []
    for k, own in enumerate(texts):
        for b, text in enumerate(own):
            seen = images[k:k + 1] if "<image>" in text else []
            rows[b].append(data.encode(text, m.tokenizer, seen, start=rows[b][-1].end if rows[b] else 0))
    tree = m.prefill([row[0] for row in rows], DENSE, 9)
    for k in (1, 2, 2):
        tree.truncate(k)
        tree.extend([row[k] for row in rows])
        t, _ = tree.run(DENSE)
        for b, row in enumerate(rows):
            whole = row[0]
            for p in row[1:k + 1]:
                whole = data.join(whole, p)
            (alone,), cache = staged(m, [whole])
            n = len(row[k].ids)
            ours = m.head(m.language_model.norm(t[b, :n]))
            assert differ(ours, alone[-n:]) < 1e-9 and tree.ran(b) == cache.ran(0) and tree.end == rows[0][k].end
            assert [x.tolist() for x in tree.kept(b)] == [x.tolist() for x in cache.kept(0)]


@pytest.mark.parametrize("reduce", INSIDE)
def test_a_question_may_bring_an_image(reduce, seen):
    m = tiny.model(visor=False).add_reduction(reduce)
    first, second = (data.process_image(tiny.image(30, 40, i), m.config, False) for i in range(2))
    talk = Conversation(m, data.encode("a <image>", m.tokenizer, [first]), DENSE)
    asked = data.encode(" and <image>\n" + data.ANSWER, m.tokenizer, [second], start=talk.end)
    answer = talk.answer(asked, max_tokens=4)
    whole = data.encode("a <image> and <image>\n" + data.ANSWER, m.tokenizer, [first, second])
    assert [answer] == m.generate([whole], DENSE, max_tokens=4)


@pytest.mark.parametrize("reduce", INSIDE)
def test_only_dense_has_tokens_to_drop(reduce):
    m = tiny.model().add_reduction(reduce)
    p = prompt(m, [(30, 30)])
    for sa in ((1, 4), (), "auto", [(1,)], DENSE[:-1]):
        for ask in (lambda: m.generate([p], sa), lambda: Conversation(m, p, sa), lambda: m.prefill([p], sa)):
            with pytest.raises(ValueError, match="^--reduce .*--sa dense"):
                ask()
    assert m.generate([p], [DENSE], max_tokens=2) == m.generate([p], DENSE[::-1], max_tokens=2)
