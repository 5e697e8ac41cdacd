"""The page about what the model did: the weights it draws are the attention's, and they land where they belong."""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import explain
import sample
from conversation import Conversation
from data import Prompt, chatml, collate, encode, join, process_image, seen, split_shared, with_tokens
from layers import rotate
from layout import rope_table
from methods import FORMS, GRID, parse
from reduction import raters, recycle, sparsevlm
from tests import tiny

DENSE = tuple(range(6))
TEXTS = {"text before the image": "a long beginning ...<image> what?", "two images": "x<image> and <image> then?",
         "two images side by side": "<image><image>y"}
PICTURES = {"wide": [(200, 60)], "tall": [(40, 150)], "one tile's": [(33, 32)], "two": [(30, 60), (60, 40)]}


def prompt_of(m, text):
    n = text.count("<image>")
    return encode(text, m.tokenizer, [process_image(tiny.image(40 + 20 * i, 50, i), m.config, n == 1)
                                      for i in range(n)])


def follow(prompt, answer):
    """The prompt with an answer's token ids behind it, and the indices of the tokens that predict them."""
    whole = join(prompt, Prompt(answer, [prompt.end + i for i in range(len(answer))], [], [], []))
    return whole, [len(prompt.ids) - 1 + i for i in range(max(len(answer), 1))]


def slow_self_attention(m, l, t, v, t_pos, v_pos, rows):
    """The weights of visual tokens in layer l, which t (Nt, d) and v (Nv, d) enter, from rows of t: (rows, Nv)."""
    c, lm = m.config, m.language_model
    x, pos = torch.cat([v, t]), torch.cat([v_pos, t_pos])  # vision first, whatever the order of the tokens is
    attn, h = lm.layers[l].self_attn, lm.layers[l].input_layernorm(x)
    qkv = attn.qkv_proj(h).view(1, len(x), c.heads + 2 * c.kv_heads, c.head_dim)
    q, k, _ = rotate(qkv, c.heads + c.kv_heads, rope_table(pos[None], c))[0].split(
        [c.heads, c.kv_heads, c.kv_heads], dim=1)
    return slow_softmax(c, q[len(v):], k, t_pos, pos, rows, len(v))


def slow_softmax(c, q, k, t_pos, pos, rows, n):
    """Of queries q (Nt, H, D) and keys k (Nk, Hkv, D) at positions pos: what the first n keys get, (rows, n)."""
    weights = []
    for row in rows:
        for head in range(c.heads):
            scores = k[:, head * c.kv_heads // c.heads] @ q[row, head] / c.head_dim ** 0.5
            w = scores.masked_fill(pos > t_pos[row], float("-inf")).softmax(0)
            assert abs(w.sum() - 1) < 1e-5
            weights.append(w[:n])
    return torch.stack(weights).view(len(rows), c.heads, n).mean(1)


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
            found[l] = slow_self_attention(m, l, t, v, t_pos, v_pos, rows).mean(0).numpy()
            continue
        attn, image = lm.cross[str(l)], torch.tensor(whole.v_img)
        own = [v[image == i].T[None] for i in range(len(whole.images))]
        placed = [F.conv1d(x, attn.cpe.weight, attn.cpe.bias, padding=3, groups=c.hidden)[0].T for x in own]
        q = attn.q_proj(attn.q_norm(t)).view(-1, c.heads, c.head_dim)
        kv = attn.kv_proj(attn.kv_norm(v + torch.cat(placed))).view(-1, 2 * c.kv_heads, c.head_dim)
        found[l] = slow_softmax(c, q, kv[:, :c.kv_heads], t_pos, v_pos, rows, len(v)).mean(0).numpy()
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
    found = explain.attention_to_images(m, prompt, answer, sa).weights
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
        found, want = (explain.attention_to_images(m, p, answer, sa).weights for p in (join(first, rest), whole))
        assert found.keys() == want.keys() and all(np.array_equal(found[l], want[l]) for l in found)


def test_cross_attention_sums_to_one_and_self_attention_to_less():
    """A cross-attention sees only vision; of a self-attention text has its share. The answer is the model's own."""
    m = tiny.model()
    prompt = prompt_of(m, "x<image>y")
    answer, = m.generate([prompt], (1, 4), max_tokens=4)
    found = explain.attention_to_images(m, prompt, answer, (1, 4)).weights
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


def overlaid(image, maps, boxes, width, keys=100):
    """One image with its heat, on its own scale, and how many times an even share the brightest get."""
    layers, peak = explain.times_an_even_share([image], [maps], boxes, keys)
    return explain.montage([image], layers, peak, width), peak


@pytest.mark.parametrize("where, corner", [(0, (0, 0)), (3, (1, 0)), (12, (0, 1)), (15, (1, 1))])
def test_heat_lands_where_the_token_is(where, corner):
    """All attention on one token of the base tile: the brightest quarter of the image is the token's."""
    c = tiny.config()
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    p = process_image(image, c)
    (places, _), boxes = explain.places_of(None, p.tiling, c), [explain.boxes(image, p.tiling, False)]
    w = np.zeros(p.tiling.tokens)
    w[where] = 0.7
    maps, = explain.heat(w, places, [p])
    assert sum(part.sum() for part in maps) == pytest.approx(0.7)
    drawn = np.asarray(overlaid(image, maps, boxes, 64)[0].convert("L"), dtype=float)
    quarters = drawn[:64, :64].reshape(2, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]
    grid = np.zeros(p.tiling.tokens)  # the same in the grid, 8 x 8 tokens and a newline a row
    grid[16 + (1 + 5 * (where > 3)) * 9 + 1 + 5 * (where % 4 > 1)] = 1.0
    maps, = explain.heat(grid, places, [p])
    drawn = np.asarray(overlaid(image, maps, boxes, 64)[0].convert("L"), dtype=float)
    quarters = drawn[:64, :64].reshape(2, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]
    last = np.zeros(p.tiling.tokens)
    last[16 + 8] = 1.0  # the newline of the grid's first row
    assert all(part.sum() == 0 for part in explain.heat(last, places, [p])[0])


def test_the_scale_is_that_of_the_brightest_colour():
    """A quarter of the image has all the attention of a layer that sees the image alone, or much else: in times what
    each token would get, were it even."""
    c, image = tiny.config(), Image.new("RGB", (64, 64))
    p = process_image(image, c, single_image=False)
    places, _ = explain.places_of(None, p.tiling, c)
    w = np.zeros((4, 4))
    w[:2, :2] = 1
    for keys, wanted in ((16, 4), (1600, 400), (4, 1)):
        maps, = explain.heat(np.append(w.ravel() / 4, 0), places, [p])
        page, peak = overlaid(image, maps, [explain.boxes(image, p.tiling, True)], 64, keys)
        assert peak == pytest.approx(wanted, rel=0.2)
        drawn = np.asarray(page.convert("L"), dtype=float)
        assert drawn[8:24, 8:24].min() > drawn[40:, 40:].max() + 50
    page, peak = overlaid(image, [w * 0], [[(0, 0, 4, 4)]], 64)
    assert peak == 0 and len(page.getcolors()) == 1


def test_all_layers_have_one_scale():
    """What is as many times an even share has the same colour, whatever the other layers have."""
    image = Image.new("RGB", (64, 64))
    layers = [np.full((64, 64), times) for times in (0.0, 1.0, 9.0, 30.0)]
    shown = [explain.montage([image], [layer], 30.0, 64).getpixel((30, 30)) for layer in layers]
    assert len(set(shown)) == 4 and [sum(x) for x in shown] == sorted(sum(x) for x in shown)
    assert shown[2] == explain.montage([image], [np.where(np.arange(64) < 32, 9.0, 0.1) + np.zeros((64, 64))], 30.0,
                                       64).getpixel((10, 30))


def test_a_layer_that_looks_elsewhere_is_dark():
    """However its little attention to the image lies, and whatever newlines get; with two maps of the same image."""
    image, base, grid = Image.new("RGB", (64, 64)), np.zeros((4, 4)), np.zeros((8, 8))
    base[1, 1] = 1e-5
    for maps in ([base], [base, grid]):
        _, peak = explain.times_an_even_share([image], [maps], [[(0, 0, *x.shape) for x in maps]], 90)
        assert peak < 1e-3
    even = [np.full((4, 4), 1 / 90), np.full((8, 8), 1 / 90)]
    (flat,), peak = explain.times_an_even_share([image], [even], [[(0, 0, 4, 4), (0, 0, 8, 8)]], 90)
    assert np.allclose(flat, 1, atol=1e-4) and peak == pytest.approx(1, abs=1e-4)
    m = tiny.model()
    prompt = prompt_of(m, "a long question<image>y")
    look = explain.attention_to_images(m, prompt, [40, 7, 9], (1, 4))
    vision = len(prompt.v_pos)
    assert look.keys == {1: vision + len(prompt.ids) + 3, 2: vision, 4: look.keys[1], 5: vision}


def test_the_overview_is_drawn_as_it_was_seen(tmp_path):
    """A pattern finer than the base tile's pixels is gone, as for the model."""
    m, pattern = tiny.model(), np.indices((128, 128)).sum(0) % 2 * 255
    image = Image.fromarray(pattern.astype(np.uint8)).convert("RGB")
    found = []
    for pixels in ("all", "overview"):
        prompt = seen(encode(chatml(["<image>what?"]), m.tokenizer, [process_image(image, m.config)]), pixels, m.config)
        look = explain.attention_to_images(m, prompt, [40], ())
        report = {"question": "what?", "answer": "x", "tokens": [40], "sa": [], "text_tokens": 9, "vision_tokens": 9,
                  "pixels": pixels, "flops": {"llm": 1e9, "llm_dense": 1e9, "encoder": 3e9, "saving": 1.0}}
        explain.draw(tmp_path / "e.png", [image], prompt.images, m.config, report, look)
        found.append(np.asarray(Image.open(tmp_path / "e.png").convert("L"), float)[200:380, 60:160].std())
    assert found[0] > 30 > 3 > found[1]


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


@pytest.mark.parametrize("sizes", [[(90, 40)], [(40, 400)], [(700, 1)], [(30, 60), (60, 30)]], ids=str)
@pytest.mark.parametrize("sa", [(), (1,), DENSE], ids=str)
def test_draws_a_page(tmp_path, sizes, sa):
    m = tiny.model()
    images = [tiny.image(*size) for size in sizes]
    processed = [process_image(image, m.config, len(images) == 1) for image in images]
    prompt = encode(chatml(["<image>" * len(images) + "what?"]), m.tokenizer, processed)
    tokens, = m.generate([prompt], sa, max_tokens=3)
    look = explain.attention_to_images(m, prompt, tokens, sa)
    report = {"question": "What? " * 40, "answer": "word " * 100, "tokens": tokens, "sa": list(sa), "text_tokens": 9,
              "vision_tokens": 9, "pixels": "all",
              "flops": {"llm": 1e9, "llm_dense": 2e9, "encoder": 3e9, "saving": 2.0}}
    explain.draw(tmp_path / "e.png", images, processed, m.config, report, look)
    page = Image.open(tmp_path / "e.png")
    assert page.width == 1600 and len(page.getcolors(1 << 24)) > 100


# --- fewer visual tokens --------------------------------------------------------------------------------------------

def pictures_of(c, sizes):
    images = [tiny.image(*size, i) for i, size in enumerate(sizes)]
    return images, [process_image(image, c, len(images) == 1) for image in images]


def patches_of(m, processed, full, dominant):
    """Of each image: (tile, patch) of each of its tokens, found by its features among all, full; None of a newline. A
    tile's kept patches but the first `dominant` are VisionZip's targets, which come in order."""
    found = []
    for tokens, every, piece in zip(m.encode(processed), full, m.pieces(processed)):
        targets = [(tile, patch) for tile, row in enumerate(piece.kept.tolist()) for patch in row[dominant:]]
        found.append([])
        for token in tokens:
            same = [tuple(at) for at in ((every.features - token).abs().amax(-1) < 1e-4).nonzero().tolist()]
            newline = torch.equal(token, m.image_newline)
            found[-1] += [None] if newline else same or targets[:1]  # the features of a target are sums
            if found[-1][-1] in targets:
                assert found[-1][-1] == targets.pop(0)
        assert not targets and len(found[-1]) == len(tokens)
    return found


def centre(size, tiling, tile, patch, alone):
    """Where the middle of a patch of 8 x 8 pixels is on the picture, as shares of its width and height."""
    x, y = (patch % 4 + 0.5) * 8, (patch // 4 + 0.5) * 8
    if not alone:
        m = max(size)
        return ((x * m / 32 - (m - size[0]) // 2) / size[0], (y * m / 32 - (m - size[1]) // 2) / size[1])
    if tile == 0:
        return x / 32, y / 32
    (w, h), (rw, rh), columns = tiling.canvas, tiling.resized, tiling.grid[1]
    x, y = x + 32 * ((tile - 1) % columns), y + 32 * ((tile - 1) // columns)
    return (x - (w - rw) // 2) / rw, (y - (h - rh) // 2) / rh


@pytest.mark.parametrize("sizes", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("reduce", ["visionzip:5+3", "vispruner:4+3", "hired:0.3"])
@torch.no_grad()
def test_a_picked_patch_is_shown_where_it_was(reduce, sizes):
    """Its weight, and the picture that is bright there; each patch by its features, pixel by pixel."""
    m, dominant = tiny.model(), 5 if "visionzip" in reduce else 16
    full = m.pieces(pictures_of(m.config, sizes)[1])
    m.add_reduction(reduce)
    images, processed = pictures_of(m.config, sizes)
    prompt = encode(chatml(["<image>" * len(images) + "what?"]), m.tokenizer, processed)
    look = explain.attention_to_images(m, prompt, [40, 50], (1, 4))
    assert sorted(look.weights) == [1, 2, 4, 5] and look.kept.all() and not look.added
    alone, start, patches = len(images) == 1, 0, patches_of(m, processed, full, dominant)
    where = [explain.boxes(image, p.tiling, not alone) for image, p in zip(images, processed)]
    for i, (p, own) in enumerate(zip(processed, patches)):
        assert len(own) == p.tiling.tokens and len(set(own)) == len(own) and (None in own) != alone
        for k, at in enumerate(own):
            one = np.zeros(len(prompt.v_pos))
            one[start + k] = 0.25
            maps = explain.heat(one, look.places, processed)
            lit = [(a, b, *cell) for a, row in enumerate(maps) for b, x in enumerate(row) for cell in np.argwhere(x)]
            if at is None:
                assert not lit
                continue
            (a, b, y, x), = lit
            left, top, right, bottom = where[i][b]
            assert (a, b) == (i, at[0] > 0) and maps[a][b][y, x] == 0.25
            assert ((x + 0.5 - left) / (right - left), (y + 0.5 - top) / (bottom - top)) == pytest.approx(
                centre(sizes[i], p.tiling, *at, alone))
            kept = m.pieces([p])[0].kept[at[0]].tolist()
            assert look.merged[start + k] == (at[1] in kept[dominant:])
        start += p.tiling.tokens
    assert start == len(look.places)
    for l, weights in look.weights.items():
        maps = explain.heat(weights, look.places, processed)
        newlines = sum(w for w, at in zip(weights, sum(patches, [])) if at is None)
        assert sum(x.sum() for own in maps for x in own) + newlines == pytest.approx(look.shares[l], abs=1e-5)
        assert look.shares[l] == pytest.approx(1) if l in (2, 5) else 0 < look.shares[l] < 1
    left = explain.heat(look.kept, look.places, processed)
    for image, p, own, kept, box in zip(images, processed, patches, left, where):
        white = Image.new("RGB", image.size, "white")
        none = [x * 0 for x in kept]
        shown = np.asarray(explain.tiled([white], [p], m.config, [kept], [none], [box]).convert("L"))
        tiles = range(1, p.tiling.tiles) if alone else [0]
        middles = {at: centre(image.size, p.tiling, *at, alone) for at in [(t, n) for t in tiles for n in range(16)]}
        bright = 0
        for at, (x, y) in middles.items():
            if 0 < x < 1 and 0 < y < 1:
                for dx, dy in ((0, 0), (-0.3, 0.3), (0.3, -0.3)):  # of a patch
                    px, py = ((s + d * 8 / wide) * n for s, d, wide, n in zip(
                        (x, y), (dx, dy), p.tiling.resized if alone else [32 * s / max(image.size) for s in image.size],
                        shown.shape[::-1]))
                    if 0 <= px < shown.shape[1] and 0 <= py < shown.shape[0]:
                        assert shown[int(py), int(px)] == (255 if at in own else 63), at
                        bright += at in own
        assert bright


@pytest.mark.parametrize("sizes", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("reduce", ["", "pack", "downsample:3", "m3:4"])
def test_tokens_of_a_grid_lie_in_rows(reduce, sizes):
    m = tiny.model(reduce=reduce)
    _, processed = pictures_of(m.config, sizes)
    prompt = encode("<image>" * len(sizes) + "what?", m.tokenizer, processed)
    look = explain.attention_to_images(m, prompt, [40], (1, 4))
    want, side = [], {"": 4, "pack": 3, "downsample:3": 2, "m3:4": 2}[reduce]
    for p in processed:
        assert p.tiling.cells == (side, side)
        (h, w), n = p.tiling.size, side * side
        want += list(range(n))
        for row in range(h):
            want += [n + row * w + column for column in range(w)] + [-1]
        want += [-1] * (len(sizes) > 1)
    assert look.places.tolist() == want and look.kept.all() and not look.merged.any() and not look.added
    weights = np.arange(len(want)) + 1.0
    maps = explain.heat(weights, look.places, processed)
    assert [x for own in maps for cells in own for x in cells.ravel()] == [w for w, at in zip(weights, want) if at >= 0]


@torch.no_grad()
def slow_pruned(m, prompt, answer):
    """({layer: weights (visual tokens,)}, {layer: what all tokens of its stage get}, which are in the last layer, how
    many merged ones) of a model that drops inside, one layer after another."""
    c, lm, r, every = m.config, m.language_model, m.config.reduction, tuple(range(m.config.layers))
    whole, rows = follow(prompt, answer)
    t, v = (x[0] for x in m.embed(collate([whole])))
    firsts = [whole.v_img.count(i) for i in range(len(whole.images))]
    numbers = [list(range(sum(firsts[:i]), sum(firsts[:i + 1]))) for i in range(len(firsts))]
    after = sum(p < prompt.v_pos[-1] for p in prompt.t_pos)
    asking = raters(v, t[after:len(prompt.ids)]).nonzero()[:, 0] + after
    weights, shares, drops = {}, {}, r.drops(c.layers)

    def look(l, rows):
        now = with_tokens(whole, list(map(len, numbers)))
        return now, slow_self_attention(m, l, t, v, torch.tensor(now.t_pos), torch.tensor(now.v_pos), rows)

    def drop(w, choose):
        streams = []
        for i, (own, x, w) in enumerate(zip(numbers, v.split(list(map(len, numbers))),
                                            w.split(list(map(len, numbers)), dim=1))):
            kept, merged = choose(x, w, firsts[i])
            numbers[i] = [own[k] for k in kept] + [-1] * len(merged)
            streams += [x[kept], merged]
        return torch.cat(streams)

    def pyramid(x, w, first):
        n = max(1, int(first * r.drop[1][drops.index(l)]))
        return sorted(sorted(range(len(x)), key=lambda k: -w.mean(0)[k])[:n]), x[:0]

    def sparse(x, w, first):
        kept = sparsevlm(w, r.scale).tolist()
        goes = [k for k in range(len(x)) if k not in kept]
        return kept, recycle(x[goes], w.mean(0)[goes]) if goes and not r.option else x[:0]
    for l in range(c.layers):
        if r.method == "pyramiddrop" and l in drops:
            v = drop(look(l, [len(prompt.ids) - 1])[1], pyramid)
        now, w = look(l, rows)
        weights[l], shares[l] = np.zeros(sum(firsts)), w.mean(0).sum().item()
        for k, number in enumerate(sum(numbers, [])):
            if number >= 0:
                weights[l][number] = w.mean(0)[k]
        _, w = look(l, asking)
        t, v = (x[0] for x in lm.run(t[None], v[None], m.layout(collate([now])), every, l, l + 1))
        if r.method == "sparsevlm" and l + 1 in drops:
            v = drop(w, sparse)
    last = sum(numbers, [])
    return weights, shares, [k in last for k in range(sum(firsts))], last.count(-1)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("reduce", ["pyramiddrop:1,3:.5,.2", "sparsevlm:0.5", "sparsevlm:2", "sparsevlm:0.5:drop"])
@pytest.mark.parametrize("text", ["<image> what colour is it?", "a<image> and <image> then?", None])
def test_weights_where_tokens_go_inside(text, reduce, n):
    """Each layer's, at the tokens that are left there; what goes is decided before the answer. None: as sample.py
    asks."""
    m = tiny.model(reduce=reduce)
    prompt, answer = prompt_of(m, text or chatml(["<image>\nwhat colour is it?"])), [40, 250, 7][:n]
    look = explain.attention_to_images(m, prompt, answer, DENSE)
    weights, shares, left, added = slow_pruned(m, prompt, answer)
    assert list(look.weights) == list(DENSE) == list(look.shares)
    for l in DENSE:
        assert np.abs(look.weights[l] - weights[l]).max() < 1e-5 and abs(look.shares[l] - shares[l]) < 1e-5
        assert 0 < look.shares[l] > look.weights[l].sum() - 1e-5
        assert ((look.weights[l] > 0) == (weights[l] > 0)).all()
    assert look.kept.tolist() == left and look.added == added and sum(left) < len(left)
    assert (added > 0) == (reduce in ("sparsevlm:0.5", "sparsevlm:2"))
    tree = m.prefill([prompt], DENSE, 0)
    tree.run(DENSE)
    kept = tree.kept(0)[-1].tolist()  # as the answer was made
    assert sorted(x for x in kept if x >= 0) == np.flatnonzero(look.kept).tolist() and kept.count(-1) == added


def test_note_of_what_is_kept():
    """Maps of 3 x 3: the picture lies on the upper two and a half rows, or on the two columns at the left."""
    c, box, narrow = tiny.config(), (0, 0, 3, 2.5), (0, 0, 2, 3)
    grid, base, none = np.eye(3), np.ones((2, 2)), [np.zeros((3, 3))]
    where = [[(0, 0, 2, 2), box]]

    def note(*what, c=c):
        return explain.kept_note(*what, c)
    assert note([[base, grid + 1]], [none], [[box]], 0) == ""
    words = "Kept: the bright 3 of 9 patches, 4 of 4 of the base tile"
    assert note([[base, grid]], [[base, none[0]]], where, 0) == words
    assert note([[grid]], [[grid]], [[narrow]], 0) == (
        "Kept: the bright 2 of 6 patches, 1 of the padding; others went into the 2 outlined ones")
    assert note([[grid], [grid + 1]], [none, none], [[narrow], [narrow]], 2, c=tiny.config(reduce="sparsevlm")) == (
        "Left in the last layer: the bright 8 of 12 patches, 4 of the padding; 2 merged tokens without a place")
    assert note([[grid[:, :2]]], [none], [[(0, 0, 2, 1)]], 0) == "Kept: the bright 1 of 2 patches, 1 of the padding"


def test_outline_of_a_patch():
    """In its colour, around the patch and nowhere else; the picture begins half a patch below the top of its map."""
    c = tiny.config()
    image, p = Image.new("RGB", (90, 90)), process_image(Image.new("RGB", (90, 90)), c, False)
    merged = np.zeros((4, 4))
    merged[2, 1] = 1
    shown = explain.tiled([image], [p], c, [[merged + 1]], [[merged]], [[(0, 0.5, 4, 3.5)]])
    ys, xs = np.nonzero((np.asarray(shown) == explain.KINDS["self-attention"]).all(-1))
    assert [xs.min(), ys.min(), xs.max(), ys.max()] == pytest.approx([225, 450, 450, 750], abs=1) and len(xs) < 4500


def test_a_single_patch_has_a_scale():
    """Of 729, its attention is far above the mean, and drawn."""
    image, cells = Image.new("RGB", (270, 270)), np.zeros((27, 27))
    cells[5, 20] = 1e-4
    page, peak = overlaid(image, [cells], [[(0, 0, 27, 27)]], 270, keys=729e4)
    drawn = np.asarray(page.convert("L"), dtype=float)
    assert 300 < peak < 1000 and np.unravel_index(drawn.argmax(), drawn.shape) == pytest.approx((55, 205), abs=5)


@pytest.mark.parametrize("reduce", [*FORMS, "m3:4", "visionzip:3+2", "sparsevlm:1:drop"])
def test_every_method_draws_its_page(reduce, tmp_path, capsys, monkeypatch):
    tiny.model(visor=False).save_pretrained(tmp_path / "m")
    notes, note = [], explain.kept_note
    monkeypatch.setattr(explain, "kept_note", lambda *a: notes.append(note(*a)) or notes[-1])
    for sizes in (PICTURES["wide"], PICTURES["two"]):
        paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
        for i, (path, size) in enumerate(zip(paths, sizes)):
            tiny.image(*size, i).save(path)
        sample.main([*map(str, ["--model", tmp_path / "m", "--image", *paths, "--q", "first", "--q", "what is this?",
                                "--reduce", reduce, "--explain", tmp_path / "e.png", "--max-tokens", 3, "--json"])])
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        page = Image.open(tmp_path / "e.png")
        assert page.width == 1600 and len(page.getcolors(1 << 24)) > 100
        (tmp_path / "e.png").unlink()
        kept = sum(int(n) for n in re.findall("([0-9]+) of (?:[0-9]+|the padding)", notes[-1]))
        if reduce.partition(":")[0] in GRID:
            assert notes[-1] == ""
        elif parse(reduce).picks:  # all but the newline of each of several
            assert notes[-1].startswith("Kept: the bright ")
            assert kept == row["vision_tokens"] - len(sizes) * (len(sizes) > 1)
        else:
            assert kept < row["vision_tokens"] and notes[-1].startswith(
                f"Left in the last layer: {'the bright ' if ' bright ' in notes[-1] else 'none of '}")
            assert "bright 0" not in notes[-1]
