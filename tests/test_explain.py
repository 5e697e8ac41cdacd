"""The page about what the model did: the weights it draws are the attention's, and they land where they belong."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import explain
from conversation import Conversation
from data import Prompt, chatml, collate, encode, join, process_image, split_shared
from layers import rotate
from layout import rope_table
from tests import tiny

DENSE = tuple(range(6))
TEXTS = {"text before the image": "a long beginning ...<image> what?", "two images": "x<image> and <image> then?",
         "two images side by side": "<image><image>y"}


def prompt_of(m, text):
    n = text.count("<image>")
    return encode(text, m.tokenizer, [process_image(tiny.image(40 + 20 * i, 50, i), m.config, n == 1)
                                      for i in range(n)])


def follow(prompt, answer):
    """The prompt with an answer's token ids behind it, and the indices of the tokens that predict them."""
    whole = join(prompt, Prompt(answer, [prompt.end + i for i in range(len(answer))], [], [], []))
    return whole, [len(prompt.ids) - 1 + i for i in range(max(len(answer), 1))]


@torch.no_grad()
def slow_attention(m, prompt, answer, sa):
    """{layer: weights (visual tokens,)}, worked out head by head and token by token from what enters each layer."""
    c, lm = m.config, m.language_model
    whole, rows = follow(prompt, answer)
    batch, found = collate([whole]), {}
    t0, v0 = m.embed(batch)
    t_pos, v_pos = torch.tensor(whole.t_pos), torch.tensor(whole.v_pos)
    for l in range(c.layers):
        if l not in sa and str(l) not in lm.cross:
            continue
        t, v = (x[0] for x in lm.run(t0, v0, m.layout(batch), sa, stop=l))
        if l in sa:
            x, pos = torch.cat([v, t]), torch.cat([v_pos, t_pos])  # vision first, whatever the order of the tokens is
            attn, h = lm.layers[l].self_attn, lm.layers[l].input_layernorm(x)
            qkv = attn.qkv_proj(h).view(1, len(x), c.heads + 2 * c.kv_heads, c.head_dim)
            q, k, _ = rotate(qkv, c.heads + c.kv_heads, rope_table(pos[None], c))[0].split(
                [c.heads, c.kv_heads, c.kv_heads], dim=1)
            q = q[len(v):]
        else:
            attn, image = lm.cross[str(l)], torch.tensor(whole.v_img)
            own = [v[image == i].T[None] for i in range(len(whole.images))]
            placed = [F.conv1d(x, attn.cpe.weight, attn.cpe.bias, padding=3, groups=c.hidden)[0].T for x in own]
            q = attn.q_proj(attn.q_norm(t)).view(-1, c.heads, c.head_dim)
            kv = attn.kv_proj(attn.kv_norm(v + torch.cat(placed))).view(-1, 2 * c.kv_heads, c.head_dim)
            k, pos = kv[:, :c.kv_heads], v_pos
        weights = []
        for row in rows:
            for head in range(c.heads):
                scores = k[:, head * c.kv_heads // c.heads] @ q[row, head] / c.head_dim ** 0.5
                w = scores.masked_fill(pos > t_pos[row], float("-inf")).softmax(0)
                assert abs(w.sum() - 1) < 1e-5
                weights.append(w[:len(v)])
        found[l] = torch.stack(weights).mean(0).numpy()
    return found


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("sa", [(), (1, 4), (0, 5), DENSE], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_weights_are_those_of_an_explicit_softmax(text, sa, n):
    """Every layer that reads vision: self-attention of both streams, the last one of which only text gives queries
    (layer 5 of (0, 5) and of dense), and cross-attention (layers 2 and 5). Of an empty answer: the token that would
    have predicted the first one."""
    m = tiny.model()
    prompt, answer = prompt_of(m, TEXTS[text]), [40, 250, 7, 99][:n]
    found = explain.attention_to_images(m, prompt, answer, sa)
    want = slow_attention(m, prompt, answer, sa)
    assert set(found) == set(want) == {*sa, 2, 5}
    for l, weights in found.items():
        assert weights.shape == (len(prompt.v_pos),) and weights.dtype == np.float32
        assert np.abs(weights - want[l]).max() < 1e-5, l


def test_weights_of_a_prompt_in_two_pieces():
    """As sample.py has it: what questions share, then the question; the answer is the model's own."""
    m = tiny.model()
    text = chatml(["a long beginning ...<image> what?"])
    whole, (shared, own) = prompt_of(m, text), split_shared(text)
    first = encode(shared, m.tokenizer, whole.images)
    rest = encode(own, m.tokenizer, start=first.end)
    for sa in ((1, 4), DENSE):
        answer = Conversation(m, first, sa).answer(rest, max_tokens=3)
        assert answer == m.generate([whole], sa, max_tokens=3)[0]
        found, want = (explain.attention_to_images(m, p, answer, sa) for p in (join(first, rest), whole))
        assert found.keys() == want.keys() and all(np.array_equal(found[l], want[l]) for l in found)


def test_cross_attention_sums_to_one_and_self_attention_to_less():
    """A cross-attention sees only vision; of a self-attention text has its share. The answer is the model's own."""
    m = tiny.model()
    prompt = prompt_of(m, "x<image>y")
    answer, = m.generate([prompt], (1, 4), max_tokens=4)
    found = explain.attention_to_images(m, prompt, answer, (1, 4))
    assert sorted(found) == [1, 2, 4, 5]
    for l, weights in found.items():
        assert len(weights) == len(prompt.v_pos)
        assert abs(weights.sum() - 1) < 1e-5 if l in (2, 5) else 0 < weights.sum() < 1


@torch.no_grad()
def test_observing_leaves_nothing_behind_and_changes_nothing():
    m = tiny.model()
    prompt = prompt_of(m, "a <image> b <image>?")
    batch, modules = collate([prompt, prompt_of(m, "x<image>y")]), dict(m.named_modules())
    state = {name: dict(module.__dict__) for name, module in modules.items()}

    def outputs(sa):
        answers = m.generate([prompt], sa, max_tokens=3)
        return answers, m(batch, sa)

    def untouched():
        now = dict(m.named_modules())
        return now.keys() == modules.keys() and all(
            now[name] is modules[name] and now[name].__dict__.keys() == state[name].keys()
            and all(now[name].__dict__[key] is x for key, x in state[name].items()) for name in modules)
    assert untouched()
    for sa in ((), (1, 4), DENSE):
        answers, plain = outputs(sa)
        seen = []
        with explain.observed(m, lambda l, kind, q, k, mask: seen.append((l, kind))):
            assert not untouched()
            observed = outputs(sa)
        assert observed[0] == answers and torch.equal(observed[1], plain) and untouched()
        assert seen[-len(per_forward(m, sa)):] == per_forward(m, sa)  # of the last forward
        explain.attention_to_images(m, prompt, answers[0], sa)
        again = outputs(sa)
        assert again[0] == answers and torch.equal(again[1], plain) and untouched()
    with pytest.raises(ZeroDivisionError), explain.observed(m, lambda *_: 1 / 0):
        m(batch, (1, 4))
    assert untouched()


def per_forward(m, sa):
    """What an observer is called for, layer by layer: a cross-attention comes before its layer's self-attention."""
    calls = []
    for l in range(m.config.layers):
        calls += [(l, "cross")] * (l in m.config.ca and l not in sa) + [(l, "self")]
    return calls


@pytest.mark.parametrize("where, corner", [(0, (0, 0)), (3, (1, 0)), (12, (0, 1)), (15, (1, 1))])
def test_heat_lands_where_the_token_is(where, corner):
    """All attention on one token of the base tile: the brightest quarter of the image is the token's."""
    c = tiny.config()
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    p = process_image(image, c)
    w = np.zeros(p.tiling.tokens)
    w[where] = 0.7
    maps, = explain.heat(w, [p], c)
    assert sum(part.sum() for part in maps) == pytest.approx(0.7)
    drawn = np.asarray(explain.montage([image], [maps], 64)[0].convert("L"), dtype=float)
    quarters = drawn[:64, :64].reshape(2, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]
    grid = np.zeros(p.tiling.tokens)  # the same in the grid, 8 x 8 tokens and a newline a row
    grid[16 + (1 + 5 * (where > 3)) * 9 + 1 + 5 * (where % 4 > 1)] = 1.0
    maps, = explain.heat(grid, [p], c)
    drawn = np.asarray(explain.montage([image], [maps], 64)[0].convert("L"), dtype=float)
    quarters = drawn[:64, :64].reshape(2, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]
    last = np.zeros(p.tiling.tokens)
    last[16 + 8] = 1.0  # the newline of the grid's first row
    assert all(part.sum() == 0 for part in explain.heat(last, [p], c)[0])


def test_the_scale_is_that_of_the_brightest_colour():
    """All attention in a quarter of the image: there it is four times the mean; the sum does not matter."""
    c, image = tiny.config(), Image.new("RGB", (64, 64))
    p = process_image(image, c, single_image=False)
    w = np.zeros((4, 4))
    w[:2, :2] = 1
    for factor in (1, 1e-3, 1e-12):
        maps, = explain.heat(np.append(w.ravel() * factor, 0), [p], c)
        page, peak = explain.montage([image], [maps], 64)
        assert peak == pytest.approx(4, rel=0.2)
        drawn = np.asarray(page.convert("L"), dtype=float)
        assert drawn[8:24, 8:24].min() > drawn[40:, 40:].max() + 50
    page, peak = explain.montage([image], [[w * 0]], 64)
    assert peak == 0 and len(page.getcolors()) == 1


@pytest.mark.parametrize("share, words", [(0, "<0.1%"), (1e-9, "<0.1%"), (0.003, "0.3%"), (0.0996, "10.0%"),
                                          (0.1, "10%"), (0.5, "50%"), (1, "100%")])
def test_no_share_reads_as_nothing(share, words):
    assert explain.percent(share) == words


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("text", ["what?", "café", "где звезда", "在哪里", "أين", "naïve 😀 ½", "\x07 \u200b",
                                  "\udcff"], ids=ascii)
def test_no_box_stands_for_a_character(text, installed, monkeypatch):
    """With the fonts of this machine and with Pillow's own alone."""
    if not installed:
        monkeypatch.setattr(explain, "fonts", lambda size: [explain.ImageFont.load_default(size)])
    font, shown = explain.legible(text, 20)
    missing = bytes(font.getmask("\U0010ffff"))
    assert shown and all(bytes(font.getmask(c)) != missing for c in shown)
    if text.isascii() and text.isprintable():
        assert shown == text
    if not installed and text == "café":
        assert shown == "cafe"
    for row in explain.wrap(text * 200, 26, 500):
        assert font.getlength(row) * 26 / 20 < 600


@pytest.mark.parametrize("sizes", [[(90, 40)], [(40, 400)], [(30, 60), (60, 30)]], ids=str)
@pytest.mark.parametrize("sa", [(), (1,), DENSE], ids=str)
def test_draws_a_page(tmp_path, sizes, sa):
    m = tiny.model()
    images = [tiny.image(*size) for size in sizes]
    processed = [process_image(image, m.config, len(images) == 1) for image in images]
    prompt = encode(chatml(["<image>" * len(images) + "what?"]), m.tokenizer, processed)
    tokens, = m.generate([prompt], sa, max_tokens=3)
    attention = explain.attention_to_images(m, prompt, tokens, sa)
    report = {"question": "What? " * 40, "answer": "word " * 100, "tokens": tokens, "sa": list(sa), "text_tokens": 9,
              "vision_tokens": 9, "flops": {"llm": 1e9, "llm_dense": 2e9, "encoder": 3e9, "saving": 2.0}}
    explain.draw(tmp_path / "e.png", images, processed, m.config, report, attention)
    page = Image.open(tmp_path / "e.png")
    assert page.width == 1600 and len(page.getcolors(1 << 24)) > 100
