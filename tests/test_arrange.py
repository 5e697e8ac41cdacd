"""The order and the number of visual tokens of an image, whatever reduces them: against plain loops.

Features whose numbers say which tile and patch they are of are put in order, and read back.
"""
import random

import pytest
import torch
import torch.nn.functional as F

import data
from arrange import Pieces, arrange, places
from config import Config
from encoders import normalise
from reduction import hired, received, vispruner, visionzip
from tests import tiny
from tests.test_pruning import BEFORE, DENSE, INSIDE, PICTURES, prompt
from tests.test_reduction import slow_pool

PICKED = ["visionzip:4+3", "visionzip:0+5", "visionzip:6+0", "visionzip:1+15", "vispruner:5+2", "vispruner:16+0"]
HIRED = ["hired:.2", "hired:.01", "hired:.7", "hired:1"]
GRIDS = ["downsample:4", "downsample:1", "m3:2", "m3:3"]


def sizes(seed, n):
    """Widths and heights: long and square, small and large, many with padding at two sides."""
    rng = random.Random(seed)
    for _ in range(n):
        long = rng.randint(8, 230)
        short = max(1, int(long * rng.uniform(0.15, 1)))
        yield rng.choice([(long, short), (short, long)])


def tilings(c, seed, n):
    """As an only image, and as one of several, or an overview."""
    for w, h in sizes(seed, n):
        yield data.tiling(w, h, c)
    yield data.tiling(50, 30, c, single_image=False)
    image = data.process_image(tiny.image(70, 110), c)
    yield data.overview(data.encode(data.chatml(["<image>\nx"]), tiny.tokenizer(), [image]), c).images[0].tiling


def raster(tiling, n):
    """(tile, patch) of the grid row by row over all its tiles, without what is cropped."""
    rows, columns = tiling.grid
    return [(1 + y // n * columns + x // n, y % n * n + x % n) for y in range(tiling.crop[0], rows * n - tiling.crop[0])
            for x in range(tiling.crop[1], columns * n - tiling.crop[1])]


def slow_picked(kept, tiling, c):
    """kept: of each tile its patches, as reduction.py gives them."""
    first = c.reduction.of_tile(c.patches)[0] if c.reduction.method == "visionzip" else len(kept[0])
    out = [(0, patch) for patch in kept[0]]                               # the merged ones are its last
    out += [(tile, patch) for tile, patch in raster(tiling, c.patches) if patch in kept[tile][:first]]
    return out + [(tile, patch) for tile, own in enumerate(kept[1:], 1) for patch in own[first:]]


def slow_hired(scores, tiling, c):
    """scores (P, 2, N): what each patch receives in the first layer, and in the last."""
    n = c.patches
    grid = raster(tiling, n)
    seen = [[tile == 0 or (tile, patch) in grid for patch in range(n * n)] for tile in range(tiling.tiles)]
    seen = torch.tensor(seen)
    budget = max(1, min(int(c.reduction.share * tiling.tiles * n * n), int(seen.sum())))
    keep = hired(scores[0, 0], scores[:, 1], tiling.grid, seen, budget)
    assert keep.sum() == budget
    return [(tile, patch) for tile, patch in [(0, i) for i in range(n * n)] + grid if keep[tile, patch]]


def told_apart(tiles, kept, c):
    """Features (P, K, d) that say which tile and patch they are of."""
    x = torch.zeros(tiles, len(kept[0]), c.hidden)
    x[..., 0], x[..., 1], x[..., 2] = torch.arange(tiles)[:, None], torch.tensor(kept), 1
    return x


def check(pieces, tiling, c, wanted):
    _, tiles, patches = places(pieces, tiling, c)
    assert list(zip(tiles.tolist(), patches.tolist())) == wanted
    newline = torch.full((c.hidden,), -1.0)
    got = arrange(pieces, tiling, newline, c)
    n = len(wanted)
    assert [tuple(x) for x in got[:n, :2].int().tolist()] == wanted and (got[:n, 2] == 1).all()
    assert torch.equal(got[n:], newline.expand(tiling.newlines, -1)) and len(got) == tiling.tokens
    assert tiling.newlines == (1 if tiling.canvas is None else 0)


@pytest.mark.parametrize("reduce", PICKED)
def test_order_of_picked_patches(reduce):
    c, rng = tiny.config(reduce=reduce), random.Random(reduce)
    first, more = c.reduction.of_tile(c.patches)
    for tiling in tilings(c, 1, 25):
        kept = []
        for _ in range(tiling.tiles):
            own = rng.sample(range(16), first + more)
            kept.append(sorted(own[:first]) + sorted(own[first:]) if "zip" in reduce else sorted(own))
        pieces = Pieces(told_apart(tiling.tiles, kept, c), torch.tensor(kept), torch.zeros(tiling.tiles, 0))
        check(pieces, tiling, c, slow_picked(kept, tiling, c))


@pytest.mark.parametrize("reduce", HIRED)
def test_order_of_what_hired_keeps(reduce):
    c = tiny.config(reduce=reduce)
    for seed, tiling in enumerate(tilings(c, 2, 25)):
        scores = torch.rand(tiling.tiles, 2, 16, generator=torch.Generator().manual_seed(seed))
        kept = [list(range(16))] * tiling.tiles
        pieces = Pieces(told_apart(tiling.tiles, kept, c), torch.zeros(tiling.tiles, 0, dtype=torch.int64), scores)
        check(pieces, tiling, c, slow_hired(scores, tiling, c))


def test_order_by_hand():
    """Two tiles side by side, of 4 x 4 patches: the first row of both, the second row of both."""
    c = tiny.config(reduce="visionzip:2+1")
    tiling = data.tiling(64, 32, c)
    kept = [[3, 9, 0], [1, 4, 15], [0, 7, 2]]
    pieces = Pieces(told_apart(3, kept, c), torch.tensor(kept), torch.zeros(3, 0))
    assert tiling.grid == (1, 2) and slow_picked(kept, tiling, c) == [
        (0, 3), (0, 9), (0, 0), (1, 1), (2, 0), (1, 4), (2, 7), (1, 15), (2, 2)]
    check(pieces, tiling, c, slow_picked(kept, tiling, c))


# --- the whole way from pixels ----------------------------------------------------------------------------------------

def looked(m, x):
    """Of each tile (P, N, c): features behind the tower, and queries and keys (P, N, H, D) of each layer in turn."""
    tower, looks = m.vision_tower, []
    x = tower.embeddings["patch_embedding"](x).flatten(2).transpose(1, 2)
    x = x + tower.embeddings["position_embedding"].weight
    for block in tower.encoder["layers"]:
        h = block.layer_norm1(x)
        looks.append([f(h).view(*h.shape[:2], m.config.vision_heads, -1)
                      for f in (block.self_attn.q_proj, block.self_attn.k_proj)])
        x, *_ = block(x)
    return x, looks


def connect(m, x):
    c = m.multi_modal_projector
    return F.gelu(x @ c.linear_1.weight.T + c.linear_1.bias) @ c.linear_2.weight.T + c.linear_2.bias


@pytest.mark.parametrize("reduce", PICKED + HIRED)
@torch.no_grad()
def test_picked_tokens_of_an_image(reduce):
    """Scores are of the last layer that is kept, HiRED's also of the first; patches are picked before the connector."""
    m = tiny.model(vision_layers=3).double().add_reduction(reduce)
    c = m.config
    for i, size in enumerate(sizes(3, 4)):
        p = data.process_image(tiny.image(*size, i), c, single_image=i != 3)
        x, looks = looked(m, normalise(torch.from_numpy(p.pixels), torch.float64, m.config))
        score, pair = received(*looks[-1]), c.reduction.of_tile(4) if reduce in PICKED else ()
        if "hired" in reduce:
            wanted = [x[at] for at in slow_hired(torch.stack([received(*looks[0]), score], 1), p.tiling, c)]
        else:
            if "zip" in reduce:
                x, kept = visionzip(x, score, looks[-1][1].mean(2), *pair)
            else:
                kept = vispruner(x, score, *pair)
                x = torch.stack([tile[own] for tile, own in zip(x, kept)])
            kept = kept.tolist()
            wanted = [x[tile, kept[tile].index(patch)] for tile, patch in slow_picked(kept, p.tiling, c)]
        wanted = [connect(m, a) for a in wanted] + [m.image_newline] * p.tiling.newlines
        got, = m.encode([p])
        assert len(got) == len(wanted) == p.tiling.tokens and (got - torch.stack(wanted)).abs().max() < 1e-9


@pytest.mark.parametrize("max_tiles", [9, 2])
@pytest.mark.parametrize("reduce", GRIDS)
@torch.no_grad()
def test_pooled_tokens_of_an_image(reduce, max_tiles):
    """The connector first, then the mean of what each token covers; unpadding and newlines by the smaller grid."""
    m = tiny.model(max_tiles=max_tiles).double().add_reduction(reduce)
    side, interpolated = m.config.side, []
    for i, size in enumerate(sizes(4, 5)):
        p = data.process_image(tiny.image(*size, i), m.config, single_image=i != 4)
        t = p.tiling
        x = connect(m, m.vision_tower(normalise(torch.from_numpy(p.pixels), torch.float64, m.config)))
        tiles = torch.stack([torch.tensor(slow_pool(tile, side), dtype=torch.float64) for tile in x.tolist()])
        rows = [[tiles[1 + y // side * t.grid[1] + z // side, y % side * side + z % side]
                 for z in range(t.crop[1], t.grid[1] * side - t.crop[1])]
                for y in range(t.crop[0], t.grid[0] * side - t.crop[0])]
        if t.interpolated:
            grid = torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)[None]
            rows = F.interpolate(grid, t.size, mode="bilinear")[0].permute(1, 2, 0)
        wanted = list(tiles[0])
        for row in rows or [[]] if isinstance(rows, list) else rows:      # a lone tile has no rows, but a newline
            wanted += [*row, m.image_newline]
        got, = m.encode([p])
        assert len(got) == len(wanted) == t.tokens and (got - torch.stack(wanted)).abs().max() < 1e-9
        interpolated.append(t.interpolated)
    assert set(interpolated) == {False, True}


@pytest.mark.parametrize("sizes", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("visor", [False, True])
@torch.no_grad()
def test_without_a_reduction_nothing_is_touched(sizes, visor):
    """Bit for bit against the visual tokens as LLaVA-OneVision has them: tower, connector, rows of the grid."""
    m = tiny.model(visor=visor)
    p = prompt(m, sizes)
    tiles = torch.cat([torch.from_numpy(x.pixels) for x in p.images])
    features = [m.multi_modal_projector(m.vision_tower(normalise(part, torch.float32, m.config)))
                for part in tiles.split(16)]
    tiles, v = list(torch.cat(features)), []
    for t in (x.tiling for x in p.images):
        v += list(tiles.pop(0))
        grid, tiles = tiles[:t.tiles - 1], tiles[t.tiles - 1:]
        for row in range(t.crop[0], 4 * t.grid[0] - t.crop[0]):
            v += [grid[row // 4 * t.grid[1] + i // 4][row % 4 * 4 + i % 4]
                  for i in range(t.crop[1], 4 * t.grid[1] - t.crop[1])] + [m.image_newline]
        v += [m.image_newline] * (t.canvas is None)
    batch, t = data.collate([p]), m.language_model.embed_tokens(torch.tensor([p.ids]))
    for sa in [DENSE] + [(1, 4), ()] * visor:
        plain = m.language_model(t, torch.stack(v)[None], m.layout(batch), sa)
        assert torch.equal(m.add_reduction("")(batch, sa), plain)


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reduce", ["", *PICKED, *HIRED, *GRIDS, *BEFORE, *INSIDE, "m3:16", "pack:2:widen", "m3"])
@torch.no_grad()
def test_counts_are_known_before(reduce):
    """Whatever the size, the model makes as many tokens as the tiling says; from what was kept of a base tile, too."""
    m = tiny.model(multi_image_newline=len(reduce) % 2 == 0).add_reduction(reduce)
    c = m.config
    for i, size in enumerate(sizes(len(reduce), 6)):
        image, single = tiny.image(*size, i), i != 5
        p = data.process_image(image, c, single)
        assert p.tiling == data.tiling(*size, c, single) and len(p.pixels) == p.tiling.tiles
        whole, = m.encode([p])
        assert whole.shape == (p.tiling.tokens, c.hidden) and whole.isfinite().all()
        whole_prompt = data.encode(data.chatml(["<image>\nwhat?"]), m.tokenizer, [p])
        assert len(whole_prompt.v_pos) == p.tiling.tokens
        small = data.overview(whole_prompt, c)
        assert (small is None) == (not single)
        if small:
            tokens, = m.encode(small.images)
            assert len(tokens) == len(small.v_pos) == small.images[0].tiling.tokens == data.overview_tokens(c)
            assert torch.equal(tokens[-1], m.image_newline)
            again, = m.encode([p], m.pieces(small.images))
            assert (again - whole).abs().max() < 1e-4


@pytest.mark.parametrize("reduce, lone", [("visionzip", 128), ("vispruner", 128), ("visionzip:54+10", 64)])
def test_counts_of_picked_patches_at_full_size(reduce, lone):
    """640 x 480 has two rows of two tiles, and the base tile; patches of padding count."""
    c = Config(reduce=reduce)
    assert data.overview_tokens(c) == data.tiling(640, 480, c, single_image=False).tokens == lone + 1
    assert data.tiling(640, 480, c).tokens == 5 * lone


@pytest.mark.parametrize("reduce, side, rows", [
    ("m3:1", 27, 40), ("m3:4", 14, 22), ("m3:8", 10, 16), ("m3:16", 7, 10), ("m3", 10, 16), ("downsample", 14, 22)])
def test_counts_of_smaller_grids_at_full_size(reduce, side, rows):
    c = Config(reduce=reduce)
    assert c.side == side and data.overview_tokens(c) == side ** 2 + 1
    assert data.tiling(640, 480, c).tokens == side ** 2 + rows * (2 * side + 1)


def test_hireds_budget_is_a_share_of_all_patches():
    """1,000 x 999 in 3 x 3 tiles: a fifth of ten tiles. In a strip most patches of the grid see nothing."""
    c = Config(reduce="hired", pinpoints=((3, 3),))
    assert data.tiling(1000, 999, c).tokens == int(10 * 729 * 0.2) == 1458
    rows = 81 - 2 * data.tiling(1000, 20, c).crop[0]
    assert rows < 4 and data.tiling(1000, 20, c).tokens == min(1458, 729 + 81 * rows)
    assert data.overview_tokens(c) == int(729 * 0.2) + 1


# --- positions --------------------------------------------------------------------------------------------------------

def encoded(pieces, counts, start=0):
    """Pieces of text, between them images of so many tokens."""
    tiling = data.tiling(30, 30, tiny.config())
    images = [data.ProcessedImage(None, tiling._replace(tokens=n)) for n in counts]
    return data.encode("<image>".join(pieces), tiny.tokenizer(), images, start)


def check_with_tokens(pieces, before, after, start=0):
    old, wanted = encoded(pieces, before, start), encoded(pieces, after, start)
    got = data.with_tokens(old, after)
    assert got.images == old.images and got._replace(images=wanted.images) == wanted and got.end == wanted.end


@pytest.mark.parametrize("seed", range(60))
def test_with_tokens_is_to_encode_anew(seed):
    """Text between, before and behind images that take other numbers of positions, from any start."""
    rng = random.Random(seed)
    images, words = rng.randint(1, 4), ["a", "bc ", "<|im_end|>\n", "é", "<|im_start|>assistant\nyes"]
    pieces = ["".join(rng.choices(words, k=rng.randint(0, 4))) for _ in range(images + 1)]
    if seed % 3 == 0:
        pieces[rng.randrange(images + 1)] = ""                            # images side by side, or at an end
    check_with_tokens(pieces, rng.choices(range(1, 10), k=images), rng.choices(range(13), k=images), seed % 7)


def test_with_tokens_where_an_answer_begins_with_an_image():
    check_with_tokens(["a", "b<|im_start|>assistant\n", "c"], [5, 4], [2, 3])
