"""Token packing: token counts, and the packed model against explicit loops."""
import math

import pytest
import torch
import torch.nn.functional as F

from config import Config
from data import chatml, collate, encode, process_image, tiling
from encoders import normalise
from model import VLM
from reduction import pack
from tests import tiny

PER_TILE = {1: 729, 2: 361, 3: 256, 4: 196, 6: 121, 8: 100, 16: 49}


@pytest.mark.parametrize("ratio", PER_TILE)
def test_tokens_of_a_tile(ratio):
    assert Config(reduce=f"pack:{ratio}").side ** 2 == PER_TILE[ratio]
    assert tiling(500, 300, Config(reduce=f"pack:{ratio}"), single_image=False).tokens == PER_TILE[ratio] + 1


@pytest.mark.parametrize("size, tokens", [((640, 480), 1453), ((1024, 768), 2337), ((1700, 2200), 3625)])
def test_whole_images_at_ratio_2(size, tokens):
    """Unpadding, newlines and the cap of 9 tiles follow from the new side, 19."""
    assert tiling(*size, Config(reduce="pack:2")).tokens == tokens


def slow_pack(x, side):
    """One tile (n * n, c): bilinear sampling at the centres of a 2 side x 2 side grid, then the mean of 2 x 2."""
    n, fine = math.isqrt(len(x)), 2 * side

    def weights(i):
        at = min(max((i + 0.5) * n / fine - 0.5, 0), n - 1)
        low = min(int(at), n - 1)
        return [(low, 1 - (at - low)), (min(low + 1, n - 1), at - low)]
    out = torch.zeros(side * side, 4, x.shape[1], dtype=x.dtype)
    for y in range(fine):
        for z in range(fine):
            for r, a in weights(y):
                for c, b in weights(z):
                    out[y // 2 * side + z // 2, y % 2 * 2 + z % 2] += a * b * x[r * n + c]
    return out


@pytest.mark.parametrize("n, side", [(27, 19), (27, 14), (27, 7), (4, 3), (4, 1), (5, 5)])
def test_pack_against_loops(n, side):
    x = torch.randn(2, n * n, 3, dtype=torch.float64)
    for tile, packed in zip(x, pack(x, (n, n), (side, side))):
        assert (packed - slow_pack(tile, side)).abs().max() < 1e-9


def test_a_plane_stays_a_plane():
    """A feature that grows evenly along a row still does after packing (away from the border)."""
    ramp = torch.arange(27.0).repeat(27, 1).reshape(1, -1, 1)
    row = pack(ramp, (27, 27), (19, 19)).mean(2)[0, :19, 0]
    steps = row.diff()[1:-1]
    assert (steps - 27 / 19).abs().max() < 1e-4
    assert (pack(torch.ones(1, 729, 1), (27, 27), (19, 19)) - 1).abs().max() < 1e-6


def slow_tokens(m, p):
    """The visual tokens of one image, written out: pack, connector, grid, unpad, interpolate, newlines."""
    side, t = m.config.side, p.tiling
    c = m.multi_modal_projector
    tiles = [F.gelu(c.linear_1(slow_pack(x, side).mean(1))) @ c.linear_2.weight.T + c.linear_2.bias
             for x in m.vision_tower(normalise(torch.from_numpy(p.pixels), torch.float32, m.config))]
    rows = [[tiles[1 + i // side * t.grid[1] + j // side][i % side * side + j % side]
             for j in range(t.crop[1], t.grid[1] * side - t.crop[1])]
            for i in range(t.crop[0], t.grid[0] * side - t.crop[0])]
    if t.interpolated:
        grid = torch.stack([torch.stack(row) for row in rows])
        rows = F.interpolate(grid.permute(2, 0, 1)[None], t.size, mode="bilinear")[0].permute(1, 2, 0)
    out = list(tiles[0])
    for row in rows:
        out += [*row, m.image_newline]
    return torch.stack(out)


@pytest.mark.parametrize("ratio", [1.5, 2, 4, 16])
@pytest.mark.parametrize("max_tiles", [9, 2])
def test_packed_forward_equals_the_slow_one(ratio, max_tiles):
    m = tiny.model(max_tiles=max_tiles).add_reduction(f"pack:{ratio}")
    p = process_image(tiny.image(70, 110), m.config)
    prompt = encode(chatml(["<image>\nwhat?"]), m.tokenizer, [p])
    batch = collate([prompt])
    with torch.inference_mode():
        slow = slow_tokens(m, p)
        assert slow.shape == (p.tiling.tokens, 64) and (m.encode([p])[0] - slow).abs().max() < 1e-4
        t, _ = m.embed(batch)
        for sa in [(), (1,), (1, 4), tuple(range(6))]:
            want = m.language_model(t, slow[None], m.layout(batch), sa)
            assert (m.head(m(batch, sa)) - m.head(want)).abs().max() < 1e-4


def test_widened_connector_starts_as_the_mean(tmp_path):
    m = tiny.model()
    p = process_image(tiny.image(70, 110), m.add_reduction("pack:2").config)
    with torch.no_grad():
        mean = m.encode([p])[0]
        m.add_reduction("pack:2:widen")
        assert (m.encode([p])[0] - mean).abs().max() < 1e-4
        m.multi_modal_projector.linear_1.weight[:, 48:96] += 0.1  # now sub-tokens differ
        wide = m.encode([p])[0]
        assert (wide - mean).abs().max() > 0.01
    m.save_pretrained(tmp_path / "c")
    again = VLM.from_pretrained(tmp_path / "c")
    assert again.config.reduce == "pack:2:widen" and torch.equal(again.encode([p])[0], wide)


def test_packed_model_trains_and_generates():
    m = tiny.model().add_reduction("pack:2:widen")
    p = process_image(tiny.image(70, 110), m.config)
    prompts = [encode(chatml(["<image>\nwhat?"]), m.tokenizer, [p]), encode(chatml(["hi"]), m.tokenizer)]
    m(collate(prompts), [(1,), ()]).square().mean().backward()
    assert m.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert m.vision_tower.embeddings["patch_embedding"].weight.grad.abs().sum() > 0
    together = m.generate(prompts, (1, 4), max_tokens=5)
    assert together == [m.generate([p], (1, 4), max_tokens=5)[0] for p in prompts]


def test_ratio_below_one_is_refused():
    for ratio in (0.5, 0, -1, float("nan")):
        with pytest.raises(ValueError, match="1 or more"):
            tiny.model().add_reduction(f"pack:{ratio}")
