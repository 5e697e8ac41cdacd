"""Token reduction: each method against plain loops, one tile at a time, written from its description.

The loops work on lists. Where ties matter, the inputs are small integers, so that sums, norms and distances are exact
and a tie is a tie: the lower index wins.
"""
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from reduction import best, hired, pool, raters, received, recycle, sparsevlm, vispruner, visionzip

near = pytest.approx


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grades(seed, *shape, levels=4):
    """Scores with many ties: whole numbers from 0 to levels - 1."""
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).double()


def axes(seed, *shape):
    """Signed unit vectors (..., c), each along one axis: many are equal, and all cosines are -1, 0 or 1."""
    which = grades(seed, *shape[:-1], levels=shape[-1]).long()
    sign = 2 * grades(seed + 1, *shape[:-1], levels=2) - 1
    return F.one_hot(which, shape[-1]) * sign[..., None]


def descending(scores):
    """Indices from the largest score to the smallest. Python's sort is stable: the lower index wins a tie."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def dot(a, b):
    return sum(s * t for s, t in zip(a, b))


def mean(vectors):
    return [sum(column) / len(vectors) for column in zip(*vectors)]


def slow_received(q, k):
    """One tile, q and k (N, H, D) as lists."""
    n, heads, d = len(q), len(q[0]), len(q[0][0])
    out = [0.0] * n
    for h in range(heads):
        for i in range(n):
            row = [math.exp(dot(q[i][h], k[j][h]) / math.sqrt(d)) for j in range(n)]
            for j in range(n):
                out[j] += row[j] / sum(row) / n / heads
    return out


@pytest.mark.parametrize("tiles, n, heads, d", [(1, 9, 1, 4), (3, 16, 2, 8), (2, 23, 3, 5), (2, 1, 2, 72)])
def test_received_against_loops(tiles, n, heads, d):
    q, k = normal(1, tiles, n, heads, d).float(), normal(2, tiles, n, heads, d).float()
    got = received(q, k)
    assert got.shape == (tiles, n) and got.dtype == torch.float32
    for i in range(tiles):
        assert got[i].tolist() == near(slow_received(q[i].tolist(), k[i].tolist()), abs=1e-6)


def test_received_sums_to_one_in_every_tile():
    for scale in (0, 1, 100):
        q, k = scale * normal(3, 3, 49, 2, 8).float(), normal(4, 3, 49, 2, 8).float()
        assert received(q, k).sum(1).tolist() == near([1, 1, 1], abs=1e-5)


def test_received_by_hand():
    """Two patches, D = 4. Head 0: rows (1/2, 1/2) and (1/4, 3/4), as exp(2 ln 3 / sqrt 4) = 3. Head 1 is uniform."""
    q, k = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
    q[0, 1, 0, 2], k[0, 1, 0, 2] = 1, 2 * math.log(3)
    assert received(q[:, :, :1], k[:, :, :1])[0].tolist() == near([3 / 8, 5 / 8])
    assert received(q, k)[0].tolist() == near([7 / 16, 9 / 16])


def test_received_counts_the_diagonal():
    """The third patch looks at itself only, the others evenly at all three."""
    q, k = torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    q[0, 2], k[0, 2] = 50, 1
    assert received(q, k)[0].tolist() == near([2 / 9, 2 / 9, 5 / 9])


def test_received_takes_the_softmax_in_float32():
    q, k = normal(5, 2, 200, 2, 8).bfloat16(), normal(6, 2, 200, 2, 8).bfloat16()
    got = received(q, k)
    assert got.dtype == torch.float32 and got.sum(1).tolist() == near([1, 1], abs=1e-5)
    assert got[1].tolist() == near(received(q.float(), k.float())[1].tolist(), rel=0.02)


@pytest.mark.parametrize("size", [1, 9, 23, 729])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_best_against_sorting(size, levels):
    score = grades(7, 2, 3, size, levels=levels)
    for n in {0, 1, size // 2, size - 1, size}:
        got = best(score, n)
        assert got.dtype == torch.int64 and torch.equal(got[1, 1], best(score[1, 1], n))
        assert got.tolist() == [[sorted(descending(row)[:n]) for row in rows] for rows in score.tolist()]


def slow_pool(x, side):
    """One tile (n * n, c) as lists: cell i covers the rows from floor(i n / side) to ceil((i + 1) n / side)."""
    n = math.isqrt(len(x))
    spans = [range(i * n // side, -(-(i + 1) * n // side)) for i in range(side)]
    return [mean([x[r * n + c] for r in rows for c in columns]) for rows in spans for columns in spans]


@pytest.mark.parametrize("n, side", [(27, 14), (27, 10), (27, 9), (27, 7), (5, 3), (4, 3), (4, 1), (3, 3), (1, 1)])
def test_pool_against_loops(n, side):
    x = normal(8, 2, n * n, 3)
    want = torch.tensor([slow_pool(tile, side) for tile in x.tolist()])
    got = pool(x, (n, n), (side, side))
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5


def test_pool_of_whole_cells_is_avg_pool2d():
    x = normal(9, 2, 729, 5)
    want = F.avg_pool2d(x.view(2, 27, 27, 5).permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1).reshape(2, 81, 5)
    assert (pool(x, (27, 27), (9, 9)) - want).abs().max() < 1e-6
    assert (pool(x, (27, 27), (27, 27)) - x).abs().max() < 1e-6


@pytest.mark.parametrize("side", [27, 14, 10, 9, 7])
def test_pool_of_constants_and_ramps(side):
    """A ramp along the rows or the columns takes the value in the middle of each cell."""
    y, x = torch.arange(27.).repeat_interleave(27), torch.arange(27.).repeat(27)
    got = pool(torch.stack([torch.full_like(y, 7), y, x], 1)[None], (27, 27), (side, side))[0].view(side, side, 3)
    middle = torch.tensor([(i * 27 // side + -(-(i + 1) * 27 // side) - 1) / 2 for i in range(side)])
    assert (got[..., 0] - 7).abs().max() < 1e-5
    assert (got[..., 1] - middle[:, None]).abs().max() < 1e-4 and (got[..., 2] - middle).abs().max() < 1e-4


def slow_visionzip(x, score, keys, dominant, contextual, average):
    """One tile as lists: the tokens, and the patch numbers of the dominant ones and of the targets."""
    kept = sorted(descending(score)[:dominant])
    rest = [i for i in range(len(x)) if i not in kept]
    targets = rest[::max(1, len(rest) // contextual)][:contextual]
    unit = [[a / max(math.sqrt(dot(k, k)), 1e-12) for a in k] for k in keys]
    members = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: dot(unit[i], unit[t]))].append(x[i])  # max takes the first of equals
    tokens = [x[i] for i in kept]
    for t in targets:
        extra = mean(members[t]) if members[t] else [0.0] * len(x[t])
        tokens.append(mean([x[t], *members[t]]) if average else [a + b for a, b in zip(x[t], extra)])
    return tokens, kept + targets


def check_visionzip(x, score, keys, dominant, contextual, average=False):
    tokens, kept = visionzip(x, score, keys, dominant, contextual, average)
    assert tokens.shape == (len(x), dominant + contextual, x.shape[2]) and tokens.dtype == x.dtype
    assert kept.shape == tokens.shape[:2] and kept.dtype == torch.int64
    for i in range(len(x)):
        want, chosen = slow_visionzip(x[i].tolist(), score[i].tolist(), keys[i].tolist(), dominant, contextual, average)
        assert kept[i].tolist() == chosen
        assert torch.equal(tokens[i, :dominant], x[i, chosen[:dominant]])
        assert (tokens[i] - torch.tensor(want, dtype=x.dtype)).abs().max() < 1e-5


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("tiles, n, d, dominant, contextual", [
    (1, 23, 7, 7, 4), (3, 23, 7, 5, 4), (2, 29, 5, 10, 6), (2, 9, 3, 2, 3), (3, 16, 4, 1, 1), (1, 16, 4, 6, 9),
    (2, 9, 3, 5, 4), (2, 729, 6, 104, 24)])  # of 9 patches, 5 and 4: each target stays as it is
def test_visionzip_against_loops(tiles, n, d, dominant, contextual, average):
    inputs = normal(10, tiles, n, 5), normal(11, tiles, n), normal(12, tiles, n, d)
    check_visionzip(*inputs, dominant, contextual, average)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n, dominant, contextual", [(23, 7, 4), (29, 3, 5), (16, 4, 5), (9, 1, 2)])
def test_visionzip_with_ties(seed, n, dominant, contextual):
    """Few distinct scores, keys along the axes, some of them zero."""
    keys = axes(seed, 2, n, 3) * (grades(seed + 9, 2, n, 1) > 0)
    check_visionzip(normal(seed, 2, n, 2), grades(seed, 2, n), keys, dominant, contextual)


def test_visionzip_by_hand():
    """1 and 6 are dominant; of the rest 0, 2, 3, 4, 5 each second is a target, two in all: 0 and 3.

    2 and 5 point as 3 does, 4 as 0 does, whatever their lengths."""
    x = torch.tensor([1., 10., 100., 1000., 10000., 100000., 5.]).double().view(1, 7, 1)
    score = torch.tensor([[0., 3., 0., 0., 1., 1., 2.]]).double()
    keys = torch.tensor([[[9., 1.], [0., 0.], [1., 5.], [0., 2.], [1., 0.], [1., 9.], [0., 0.]]]).double()
    tokens, kept = visionzip(x, score, keys, 2, 2)
    assert kept.tolist() == [[1, 6, 0, 3]]
    assert tokens.flatten().tolist() == near([10, 5, 1 + 10000, 1000 + (100 + 100000) / 2])
    tokens, _ = visionzip(x, score, keys, 2, 2, average=True)
    assert tokens.flatten().tolist() == near([10, 5, (1 + 10000) / 2, (1000 + 100 + 100000) / 3])


def slow_vispruner(x, score, important, diverse):
    """One tile as lists. The rest stays in the order in which the rounds leave it."""
    order = descending(score)
    chosen, rest = order[:important], order[important:]
    unit = [[a / math.sqrt(dot(f, f)) for a in f] for f in x]
    cosine = [[dot(f, g) for g in unit] for f in unit]
    while len(rest) > diverse:
        drop = min(8, len(rest) - diverse)
        a, b = rest[0::2], rest[1::2]
        likeness = [max([cosine[i][j] for j in b], default=0) for i in a]
        rest = [a[i] for i in descending(likeness)[drop:]] + b
    return sorted(chosen + rest)


def check_vispruner(x, score, important, diverse):
    kept = vispruner(x, score, important, diverse)
    assert kept.shape == (len(x), important + diverse) and kept.dtype == torch.int64
    for i in range(len(x)):
        assert kept[i].tolist() == slow_vispruner(x[i].tolist(), score[i].tolist(), important, diverse)


@pytest.mark.parametrize("tiles, n, important, diverse", [
    (1, 29, 7, 3), (3, 29, 6, 4), (2, 23, 5, 8), (2, 16, 1, 2), (2, 9, 2, 3), (2, 64, 10, 10), (3, 65, 10, 11),
    (1, 729, 96, 32)])
def test_vispruner_against_loops(tiles, n, important, diverse):
    check_vispruner(normal(20, tiles, n, 6), normal(21, tiles, n), important, diverse)


@pytest.mark.parametrize("n, important, diverse", [
    (29, 10, 0), (28, 0, 10), (29, 0, 7), (16, 5, 0), (9, 0, 1), (9, 0, 0), (9, 8, 0), (9, 9, 0), (9, 0, 9), (9, 4, 5)])
def test_vispruner_with_one_kind_only_or_nothing_to_drop(n, important, diverse):
    check_vispruner(normal(22, 2, n, 6), normal(23, 2, n), important, diverse)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n, important, diverse", [(29, 7, 3), (40, 6, 9), (23, 5, 6), (16, 0, 4)])
def test_vispruner_with_ties(seed, n, important, diverse):
    check_vispruner(axes(seed, 2, n, 5), grades(seed, 2, n), important, diverse)


def test_vispruner_by_hand():
    """Patch 5 is important. The rest in order of score are 4, 3, 2, 1, 0: a is 4, 2, 0 and b is 3, 1.

    2 is most like one of b (it points as 1 does), then comes 4, then 0: they go in this order."""
    x = torch.tensor([[0., 0., 1.], [0., 9., 0.], [0., 2., 0.], [7., 0., 0.], [1., 1., 1.], [1., 0., 0.]]).double()
    score = torch.tensor([[1., 2., 3., 4., 5., 6.]]).double()
    assert vispruner(x[None], score, 1, 4).tolist() == [[0, 1, 3, 4, 5]]
    assert vispruner(x[None], score, 1, 3).tolist() == [[0, 1, 3, 5]]
    assert vispruner(x[None], score, 1, 2).tolist() == [[1, 3, 5]]


def slow_hired(first, last, grid, seen, budget):
    """Lists, with exact fractions for the tiles' claims."""
    n, side = len(first), math.isqrt(len(first))
    rows, columns = grid
    room = [sum(tile) for tile in seen]
    grid_part = min(budget - min(budget // 2, n), sum(room[1:]))
    given = [min(budget - grid_part, n)] + [0] * (len(last) - 1)
    if len(last) > 1:
        votes = [0] * len(last)
        for i in descending(first)[:n // 2]:
            row = math.floor(Fraction(2 * (i // side) + 1, 2) * rows / side)
            column = math.floor(Fraction(2 * (i % side) + 1, 2) * columns / side)
            votes[1 + row * columns + column] += 1
        quota = [Fraction(v * grid_part, sum(votes)) for v in votes]
        given[1:] = [min(math.floor(q), r) for q, r in zip(quota[1:], room[1:])]
        while sum(given[1:]) < grid_part:
            open_tiles = [i for i in range(1, len(last)) if given[i] < room[i]]
            given[max(open_tiles, key=lambda i: quota[i] - given[i])] += 1
    keep = []
    for scores, sees, count in zip(last, seen, given):
        chosen = [i for i in descending(scores) if sees[i]][:count]
        keep.append([i in chosen for i in range(n)])
    return keep


def check_hired(first, last, grid, seen, budget):
    keep = hired(first, last, grid, seen, budget)
    assert keep.shape == last.shape and keep.dtype == torch.bool
    assert keep.sum() == min(budget, seen.sum()) and not (keep & ~seen).any()
    assert keep.tolist() == slow_hired(first.tolist(), last.tolist(), grid, seen.tolist(), budget)


def padded(tiles, n, part):
    """Which patches see the picture: of tile 0 all, of the others about this part."""
    seen = grades(0, tiles, n, levels=100) < 100 * part
    seen[0] = True
    return seen


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 1), (2, 3), (1, 1), (6, 6)])
@pytest.mark.parametrize("n", [16, 25, 81])
@pytest.mark.parametrize("part", [1, 0.5, 0.1, 0])
def test_hired_against_loops(grid, n, part):
    tiles = 1 + grid[0] * grid[1]
    first, last, seen = normal(30, n).exp(), normal(31, tiles, n).exp(), padded(tiles, n, part)
    for budget in {0, 1, 2, n, n + 1, 2 * n, int(tiles * n * 0.2), int(tiles * n * 0.7), tiles * n, tiles * n + 5}:
        check_hired(first, last, grid, seen, budget)
        check_hired(grades(32, n), grades(33, tiles, n), grid, seen, budget)


def test_hired_at_full_size():
    check_hired(normal(34, 729), normal(35, 7, 729).exp(), (2, 3), padded(7, 729, 0.8), int(7 * 729 * 0.2))


def test_hired_without_a_grid():
    """A single tile has the whole budget."""
    for budget in (0, 1, 5, 9, 12):
        check_hired(grades(38, 9), grades(39, 1, 9), (0, 0), torch.ones(1, 9, dtype=torch.bool), budget)


HALF = [3, 3, 2, 2,  # the 2s and 3s are the best 8 patches:
        3, 3, 2, 0,  # 4 upper left, 3 upper right,
        2, 1, 1, 1,  # 1 lower left
        0, 0, 0, 0]


@pytest.mark.parametrize("budget, counts", [
    (16, [8, 4, 3, 1, 0]),
    (10, [5, 2, 2, 1, 0]),  # shares 2.5, 1.875, 0.625, 0: two are left over, for the second tile and the third
    (11, [5, 3, 2, 1, 0]),  # shares 3, 2.25, 0.75, 0
    (1, [0, 1, 0, 0, 0]),
    (24, [12, 6, 5, 1, 0]),  # shares 6, 4.5, 1.5, 0: one is left over, and the lower number wins the tie
    (40, [16, 12, 9, 3, 0])])  # the base tile has no more
def test_hired_by_hand(budget, counts):
    """2 x 2 tiles of 4 x 4 patches, where the later patches score higher."""
    last = torch.arange(16.).repeat(5, 1)
    keep = hired(torch.tensor(HALF).float(), last, (2, 2), torch.ones(5, 16, dtype=torch.bool), budget)
    assert keep.sum(1).tolist() == counts
    for row, count in zip(keep, counts):
        assert row.nonzero().flatten().tolist() == list(range(16 - count, 16))


def test_hired_by_hand_with_padding():
    """The upper right tile sees nothing, though it has 3 of the 8 votes; the lower ones see 1 patch and 2."""
    first, last, seen = torch.tensor(HALF).float(), torch.arange(16.).repeat(5, 1), torch.ones(5, 16, dtype=torch.bool)
    seen[2:] = False
    seen[3, 5], seen[4, 1], seen[4, 2] = True, True, True
    # 10 for the grid: shares 5, 3.75, 1.25, 0, of which 5, 0, 1, 0 can be had. Tiles 1 and 4 have room for more;
    # their claims are 0 and 0 (1 goes first), -1 and 0, -1 and -1, -2 and -1.
    keep = hired(first, last, (2, 2), seen, 20)
    assert keep.sum(1).tolist() == [10, 7, 0, 1, 2] and keep[3, 5] and keep[4, 1] and keep[4, 2]
    assert hired(first, last, (2, 2), seen, 40).sum(1).tolist() == [16, 16, 0, 1, 2]  # all that is seen
    seen[1, 3:] = False  # now the grid can use only 6 of its 10: the base tile has the rest
    assert hired(first, last, (2, 2), seen, 20).sum(1).tolist() == [14, 3, 0, 1, 2]


def slow_raters(v, t):
    g = [0.0] * len(t)
    for a in v:
        logits = [dot(a, b) for b in t]
        row = [math.exp(z - max(logits)) for z in logits]
        g = [s + p / sum(row) / len(v) for s, p in zip(g, row)]
    return [s > sum(g) / len(g) for s in g]


@pytest.mark.parametrize("n, m, d, scale", [(23, 9, 6, 1), (1, 5, 4, 1), (16, 40, 6, 0.2), (29, 9, 7, 30)])
def test_raters_against_loops(n, m, d, scale):
    v, t = normal(40, n, d) * scale, normal(41, m, d)
    got = raters(v, t)
    assert got.dtype == torch.bool and got.tolist() == slow_raters(v.tolist(), t.tolist())


def test_raters_by_hand():
    """The rows are (1/8, 6/8, 1/8) and (3/6, 2/6, 1/6): means .3125, .5417, .1458, against 1/3. Not above: no rater."""
    v = torch.eye(2)
    t = torch.tensor([[1., 3.], [6., 2.], [1., 1.]]).log()
    assert raters(v, t).tolist() == [False, True, False]
    assert raters(v, torch.zeros(4, 2)).tolist() == [False] * 4  # a quarter each


def slow_recycle(x, score):
    n, d = len(x), len(x[0])
    taken = sorted(descending(score)[:min(int(0.3 * n) + 1, n)])
    x, m = [x[i] for i in taken], len(taken)
    clusters = m // 10 + 1
    distance = [[math.dist(a, b) / math.sqrt(d) for b in x] for a in x]
    density = [math.exp(-sum(s * s for s in sorted(row)[:clusters]) / clusters) for row in distance]
    delta = []
    for i in range(m):
        denser = [distance[i][j] for j in range(m) if (density[j], -j) > (density[i], -i)]
        delta.append(min(denser) if denser else max(distance[i]))
    centres = sorted(descending([a * b for a, b in zip(density, delta)])[:clusters])
    members = {c: [x[c]] for c in centres}
    for i in range(m):
        if i not in centres:
            members[min(centres, key=lambda c: distance[i][c])].append(x[i])  # min takes the first of equals
    return [mean(members[c]) for c in centres]


def check_recycle(x, score):
    want = torch.tensor(slow_recycle(x.tolist(), score.tolist()), dtype=x.dtype)
    got = recycle(x, score)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 16, 23, 29, 30, 31, 40, 64, 65, 100, 200, 333])
def test_recycle_against_loops(n):
    for seed in range(4):
        check_recycle(normal(seed, n, 5), normal(50 + seed, n))


@pytest.mark.parametrize("n", [2, 16, 23, 29, 40, 64, 100, 150])
@pytest.mark.parametrize("levels", [1, 2, 5, 30])
def test_recycle_with_ties(n, levels):
    """Tokens on a line of whole numbers: equal tokens, densities and distances, all exact."""
    for seed in range(4):
        x = grades(seed, n, 1, levels=levels) / 4
        check_recycle(x.expand(n, 4), grades(60 + seed, n))


def test_recycle_by_hand():
    """40 tokens, of which the 13 with a score above 0 are taken: two clusters, seven tokens at 1 and six at 9."""
    x, score = torch.full((40, 1), -50.), torch.zeros(40)
    x[1:26:2], score[1:26:2] = 9, 1
    x[3:16:2] = 1
    assert recycle(x, score).tolist() == [[9.], [1.]]  # the first of the nines comes before the first of the ones
    assert recycle(x[:1], score[:1]).tolist() == [[-50.]]


@pytest.mark.parametrize("rows, rank, n", [(4, 4, 23), (4, 2, 23), (8, 3, 29), (1, 1, 9), (16, 9, 9), (2, 1, 1)])
@pytest.mark.parametrize("scale", [0.125, 0.75, 1, 2.5, 4.25, 100])
def test_sparsevlm_against_sorting(rows, rank, n, scale):
    """Small whole numbers, so that many means are equal; the identity inside both factors settles the rank."""
    for seed in range(3):
        down = torch.cat([torch.eye(rank), grades(seed, rows - rank, rank, levels=3)])
        weights = down @ torch.cat([torch.eye(rank), grades(seed + 9, rank, n - rank, levels=3)], 1).double()
        count = n if n in (1, rank) else max(1, min(int(rank * scale), n - 1))
        kept = sparsevlm(weights.float(), scale)
        assert kept.dtype == torch.int64 and kept.tolist() == sorted(descending(mean(weights.tolist()))[:count])


def test_sparsevlm_by_hand():
    weights = torch.tensor([[1., 0., 4., 2., 0., 2.], [1., 6., 0., 2., 0., 2.]])  # rank 2, means 1, 3, 2, 2, 0, 2
    assert sparsevlm(weights, 1).tolist() == [1, 2]
    assert sparsevlm(weights, 1.5).tolist() == [1, 2, 3]
    assert sparsevlm(weights, 0.4).tolist() == [1]  # at least one
    assert sparsevlm(weights, 50).tolist() == [0, 1, 2, 3, 5]  # and not all
    assert sparsevlm(weights[:, 1:3], 0.5).tolist() == [0, 1]  # as many as the rank: all
    assert sparsevlm(weights[:, :1] * 0, 5).tolist() == [0] and sparsevlm(weights * 0, 5).tolist() == [0]
