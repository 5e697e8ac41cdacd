"""The picture of what the model did: the weights it draws are the attention's, and they land where they belong."""
import numpy as np
import pytest
import torch
from PIL import Image

import explain
from data import chatml, collate, encode, picture
from layers import rotate, rope_table
from tests import tiny


@pytest.mark.parametrize("prefix", [0, 20])
def test_trace_is_the_last_tokens_attention(prefix):
    """Layer 0 of dense, worked out by hand for every head; the same when part of the prompt is already cached."""
    m = tiny.model()
    prompt = encode("a long beginning ...<image> what?", m.tokenizer, [picture(tiny.image(40, 50), m.config)])
    trace, dense = {}, tuple(range(6))
    with torch.no_grad():
        m(collate([prompt]), dense, trace=trace)
        t, v, t_pos, v_pos = m.embed(collate([prompt]))
        pos = torch.cat([v_pos, t_pos], 1)[0]
        x = torch.cat([v, t], 1)[0][pos.argsort()]
        block = m.language_model.layers[0]
        h = block.input_layernorm(x)
        rope = rope_table(pos.sort().values[None], 16, 1e4)
        q = rotate(block.self_attn.q_proj(h).view(1, -1, 4, 16), rope)[0, -1]        # (heads, 16)
        k = rotate(block.self_attn.k_proj(h).view(1, -1, 2, 16), rope)[0]            # (tokens, 2, 16)
        want = torch.stack([(k[:, i // 2] @ q[i] / 4).softmax(0) for i in range(4)]).mean(0)
    assert (trace[0][0][0] - want).abs().max() < 1e-5
    if prefix:  # the question alone, after what was seen
        first = encode("a long beginning ...<image>", m.tokenizer, prompt.pictures)
        rest, again = encode(" what?", m.tokenizer, start=first.end), {}
        m.ask(m.see(first, dense), rest, max_tokens=1, trace=again)
        assert all((again[l][0] - trace[l][0]).abs().max() < 1e-5 for l in dense)


def test_weights_sum_to_one_and_cross_attention_sees_only_vision():
    m = tiny.model()
    prompt = encode("x<image>y", m.tokenizer, [picture(tiny.image(40, 50), m.config)])
    trace = {}
    m.generate([prompt], (1, 4), max_tokens=4, trace=trace)
    assert sorted(trace) == [1, 2, 4, 5] and all(len(steps) in (1, 2, 3, 4) for steps in trace.values())
    for l, steps in trace.items():
        for w in steps:
            assert abs(w.sum() - 1) < 1e-5
            assert (w.shape[1] == len(prompt.v_pos)) == (l in (2, 5))


@pytest.mark.parametrize("where, corner", [(0, (0, 0)), (3, (1, 0)), (12, (0, 1)), (15, (1, 1))])
def test_heat_lands_where_the_token_is(where, corner):
    """All attention on one token of the base tile: the brightest quarter of the picture is the token's."""
    c = tiny.config()
    image = Image.new("RGB", (64, 64), (90, 90, 90))
    p = picture(image, c)
    w = torch.zeros(1, 200)
    w[0, 10 + where] = 0.7
    (maps,), share = explain.heat([w], True, list(range(10, 10 + p.tiling.tokens)), [p], c)
    assert share == pytest.approx(0.7)
    drawn = np.asarray(explain.montage([image], [maps], 64).convert("L"), dtype=float)
    quarters = drawn[:64, :64].reshape(2, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]
    grid = torch.zeros(1, p.tiling.tokens)  # the same in the grid, 8 x 8 tokens and a newline a row
    grid[0, 16 + (1 + 5 * (where > 3)) * 9 + 1 + 5 * (where % 4 > 1)] = 1.0
    (maps,), _ = explain.heat([grid], False, [0] * p.tiling.tokens, [p], c)
    drawn = np.asarray(explain.montage([image], [maps], 64).convert("L"), dtype=float)
    quarters = drawn[:64, :64].reshape(2, 32, 2, 32).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == corner[::-1]
    last = torch.zeros(1, p.tiling.tokens)
    last[0, 16 + 8] = 1.0  # the newline of the grid's first row
    assert all(part.sum() == 0 for part in explain.heat([last], False, p.tiling.tokens * [0], [p], c)[0][0])


@pytest.mark.parametrize("sizes", [[(90, 40)], [(40, 400)], [(30, 60), (60, 30)]], ids=str)
@pytest.mark.parametrize("sa", [(), (1,), tuple(range(6))], ids=str)
def test_draws_a_page(tmp_path, sizes, sa):
    m = tiny.model()
    images = [tiny.image(*size) for size in sizes]
    pictures = [picture(image, m.config, len(images) == 1) for image in images]
    prompt = encode(chatml(["<image>" * len(images) + "what?"]), m.tokenizer, pictures)
    trace = {}
    tokens, = m.generate([prompt], sa, max_tokens=3, trace=trace)
    report = {"question": "What? " * 40, "answer": "word " * 100, "tokens": tokens, "sa": list(sa), "text_tokens": 9,
              "vision_tokens": 9, "flops": {"llm": 1e9, "llm_dense": 2e9, "encoder": 3e9, "saving": 2.0}}
    explain.draw(tmp_path / "e.png", images, pictures, prompt.v_pos, m.config, report, trace)
    page = Image.open(tmp_path / "e.png")
    assert page.width == 1600 and len(page.getcolors(1 << 24)) > 100
