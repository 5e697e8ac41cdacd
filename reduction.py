"""Fewer visual tokens: token packing (VISOR-TR, paper 4.4, appendix I), and the methods that VISOR is compared and
combined with (5, appendix L).

Each is a pure function of what the vision encoder made of an image's tiles to the tokens that go on. methods.py has
their settings, and counts what they keep before anything is encoded. pruning.py drops tokens between layers of the
language model with the last functions of this file.

The originals read CLIP's class token. SigLIP has none: a patch's score is the attention that it receives from all
patches of its tile, its own included, in the last layer that is kept, as VisionZip proposes. Of equal scores the lower
patch wins; the originals leave that open.

Letters: P tiles, N patches of a tile, n x n of them; H heads, D features of a head, c features; K tokens that are kept.
"""
import numpy as np
import torch
import torch.nn.functional as F

import methods


# --- what a method looks at -----------------------------------------------------------------------------------------

@torch.no_grad()  # of what it decides nothing learns
def received(q, k):
    """The attention that each patch receives, mean over heads and over the patches that give it: q, k (P, N, H, D) ->
    (P, N), in float32. One head at a time, as the weights of all are 34 MB a tile."""
    total = 0
    for a, b in zip(q.unbind(2), k.unbind(2)):                            # (P, N, D) each
        total = total + (a @ b.transpose(1, 2) * a.shape[-1] ** -0.5).float().softmax(-1).mean(1)
    return total / q.shape[2]


def observed_layers(c):
    """The layers of the vision tower whose attention a model's reduction reads."""
    last = c.vision_layers - 1
    return {"hired": (0, last), "visionzip": (last,), "vispruner": (last,)}.get(c.reduction.method, ())


def best(score, n):
    """score (..., N) -> the numbers of the n largest, ascending (..., n)."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :n].sort(-1).values


def take(x, rows):
    """x (P, N, c), rows (P, K) -> (P, K, c)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


# --- before the language model: each tile becomes a smaller grid -----------------------------------------------------

def pack(x, patches, cells):
    """Token packing (paper, appendix I): a tile's patches, (rows, columns) of them, become cells, (h, w), tokens of
    four sub-tokens each.

    x (P, rows * columns, c) -> (P, h * w, 4, c), sub-tokens row by row. The grid is interpolated to the even sides
    2 * h and 2 * w, then space-to-depth puts each 2 x 2 square into one token.
    """
    h, w = cells
    grid = F.interpolate(x.transpose(1, 2).unflatten(2, patches), size=(2 * h, 2 * w), mode="bilinear")
    grid = grid.unflatten(3, (w, 2)).unflatten(2, (h, 2))                 # (P, c, h, dy, w, dx)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def pool(x, patches, cells):
    """M3 (Matryoshka Multimodal Models) and Downsample: the mean of what each token of the smaller grid covers.

    x (P, rows * columns, c) -> (P, h * w, c), after the connector; patches, cells: as in `pack`. Each scale comes from
    the finest, as 27 has no smaller sides that nest; the official kernels make the same grid of M3's scales 4 and 8.
    """
    return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, patches), cells).flatten(2).transpose(1, 2)


# --- before the language model: some patches of each tile ------------------------------------------------------------

def visionzip(x, score, keys, dominant, contextual, average=False):
    """VisionZip: the `dominant` patches with the highest score, and `contextual` ones into which all others merge.

    x (P, N, c), score (P, N), keys (P, N, D) of the layer that scores, mean over heads. Returns tokens (P, K, c) and
    the patches where they lie (P, K): the dominant ones in order, then the contextual ones. The latter are every
    so-many-th of the patches that are left; each other patch goes to the one whose keys are most like its own, which
    gains the mean of those, as in the official code. average: it becomes the mean of all and itself, as the article has
    it.
    """
    chosen = best(score, dominant)                                                        # (P, dominant)
    left = torch.ones_like(score).scatter(1, chosen, 0.0)
    rest = best(left, x.shape[1] - dominant)                                              # (P, R) ascending
    step = max(1, rest.shape[1] // max(1, contextual))
    at = np.arange(rest.shape[1])
    is_target = (at % step == 0) & (at < step * contextual)
    targets, merged = (rest[:, torch.from_numpy(own.nonzero()[0]).to(x.device)] for own in (is_target, ~is_target))
    tokens = take(x, targets)                                                             # (P, contextual, c)
    if contextual and merged.shape[1]:
        with torch.no_grad():
            unit = F.normalize(keys, dim=-1, eps=1e-12)
            like = take(unit, merged) @ take(unit, targets).transpose(1, 2)               # (P, M, contextual)
        number = torch.arange(contextual, device=x.device)[:, None]
        joins = (like.argmax(-1)[:, None] == number).to(x.dtype)                          # (P, contextual, M)
        many = joins.sum(-1, keepdim=True)                                                # (P, contextual, 1)
        if average:
            tokens = (tokens + joins @ take(x, merged)) / (1 + many)
        else:
            tokens = tokens + joins @ take(x, merged) / many.clamp(min=1)
    return torch.cat([take(x, chosen), tokens], dim=1), torch.cat([chosen, targets], dim=1)


@torch.no_grad()
def vispruner(x, score, important, diverse, chunk=8):
    """VisPruner: the `important` patches with the highest score, and `diverse` ones that are least like one another.

    x (P, N, c) before the connector, score (P, N) -> the patches that are kept (P, K), ascending. While too many are
    left, they are split in turn into two lists; the `chunk` of the first that are most like one of the second go. The
    official code crashes where an odd number is left, as with 729 - 96; the first list is the longer one here.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    kept, left = order[:, :important], order[:, important:]                               # the best first
    unit = F.normalize(x, dim=-1, eps=1e-12)
    like = unit @ unit.transpose(1, 2)                                                    # (P, N, N)
    while (drop := min(chunk, left.shape[1] - diverse)) > 0:
        a, b = left[:, 0::2], left[:, 1::2]
        if b.shape[1]:                                                                    # else one patch is left
            pairs = take(like, a).gather(2, b[:, None].expand(-1, a.shape[1], -1))        # (P, a, b)
            a = a.gather(1, pairs.amax(2).argsort(dim=-1, descending=True, stable=True))
        left = torch.cat([a[:, drop:], b], dim=1)                                         # not in order again
    return torch.cat([kept, left], dim=1).sort(-1).values


def hired(first, last, grid, seen, budget, alpha=0.5):
    """HiRED: a budget for the whole image; tiles with more of what the first layer looks at get more of it.

    first (N,): score of the base tile's patches in layer 0; last (P, N): of all tiles in the last layer; grid (rows,
    columns) of tiles; seen (P, N) bool: the patches that see the picture. Returns what is kept, (P, N) bool,
    `budget` patches in all. Official but for three things: a patch belongs to the grid's tile that shows the same
    place, where the original cuts the base tile's row of patches into equal runs; only patches that see the picture
    are chosen, and what rounding leaves over goes to the tiles that it is due to most, so that the count is exact.
    Shares are worked out on the host, which waits for the device here.
    """
    n, most = round(first.shape[0] ** 0.5), seen.sum(1).cpu().numpy()
    rest = min(budget - min(int(budget * alpha), most[0]), most[1:].sum())                # for the grid
    given = np.array([min(budget - rest, most[0]), *[0] * (len(most) - 1)])
    if rest:
        rows, columns = grid
        at = ((np.arange(n) + 0.5) * rows // n).astype(int)[:, None] * columns + ((np.arange(n) + 0.5) * columns // n
                                                                                  ).astype(int)
        looked_at = best(first, max(1, int(n * n * (1 - alpha)))).cpu().numpy()
        weight = np.bincount(at.ravel()[looked_at], minlength=rows * columns)
        given[1:] = np.minimum(weight * rest // weight.sum(), most[1:])
        while given[1:].sum() < rest:
            claim = np.where(given[1:] < most[1:], weight * rest - given[1:] * weight.sum(), np.iinfo(np.int64).min)
            given[1 + claim.argmax()] += 1
    score = last.masked_fill(~seen.to(last.device), float("-inf"))
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return rank < torch.from_numpy(given).to(last.device)[:, None]


# --- what the vision encoder's part of the model does with them ------------------------------------------------------

def reduce_tiles(x, patches, looks, c):
    """What a reduction does to each tile by itself, before the connector: x (P, N, c) of the vision tower, patches
    (rows, columns) of them, looks: (q, k) of each of `observed_layers`. Returns features (P, K, c), or (P, K, 4 * c)
    packed and widened, and kept and scores as in arrange.Pieces."""
    r, none = c.reduction, torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    cells = r.grid(patches)
    if r.method == "pack" and (cells != patches or r.option == "widen"):  # one for one, it leaves them as they are
        x = pack(x, patches, cells)
        return x.flatten(2) if r.option == "widen" else x.mean(2), none, none
    if r.method == "visionzip":
        (q, k), = looks
        return *visionzip(x, received(q, k), k.mean(2), *r.of_tile(c.patches), r.option == "mean"), none
    if r.method == "vispruner":
        kept = vispruner(x, received(*looks[0]), *r.of_tile(c.patches))
        return take(x, kept), kept, none
    if r.method == "hired":
        return x, none, torch.stack([received(q, k) for q, k in looks], dim=1)
    return x, none, none


# --- inside the language model ---------------------------------------------------------------------------------------

def raters(v, t):
    """SparseVLM: the text tokens that are about the image. v (n, d), t (m, d): visual and text tokens as they enter the
    first layer -> (m,) bool: those that visual tokens look at more than at the mean text token."""
    share = (v @ t.T).float().softmax(-1).mean(0)
    return share > share.mean()


def sparsevlm(weights, scale):
    """SparseVLM: which of an image's tokens go on, ascending. weights (raters, n): the attention of raters to them; its
    rank says how much there is to keep, `scale` tokens for each unit of it."""
    rank = int(torch.linalg.matrix_rank(weights.float()))
    return best(weights.mean(0), methods.sparse_count(rank, weights.shape[1], scale))


def recycle(x, score):
    """SparseVLM: what becomes of dropped tokens x (n, d) with their scores (n,): the better third is clustered
    (DPC-kNN), a tenth of it remains as the means of clusters (clusters, d), in order of their centres.

    The original breaks ties of density by noise; here the lower token counts as the denser one.
    """
    x = x[best(score, min(int(0.3 * len(x)) + 1, len(x)))]
    m, clusters = len(x), int(len(x) / 10) + 1
    far = torch.cdist(x.double(), x.double()) * x.shape[1] ** -0.5                       # (m, m)
    density = (-far.sort(-1).values[:, :clusters].square().mean(-1)).exp()               # itself counts as near
    at = torch.arange(m, device=x.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (at[None] < at[:, None]))
    delta = far.masked_fill(~denser, float("inf")).amin(-1)                              # to the nearest denser one
    delta = torch.where(delta.isinf(), far.amax(-1), delta)
    centres = best(density * delta, clusters)                                            # (clusters,)
    own = far[:, centres].argmin(-1)
    own[centres] = torch.arange(clusters, device=x.device)
    joins = F.one_hot(own, clusters).to(x.dtype).T                                       # (clusters, m)
    return joins @ x / joins.sum(-1, keepdim=True)
