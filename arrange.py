"""The visual tokens of an image in order: a grid with newlines, or what a reduction has picked of it.

What the encoder made of each tile comes in as Pieces, which is what is kept between questions about an image.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from reduction import hired, pool


class Pieces(NamedTuple):
    """What is kept of an image's tiles between questions; all have the tiles first."""
    features: torch.Tensor  # (P, K, d) behind the connector
    kept: torch.Tensor      # (P, K) their patches; (P, 0) where there is a grid
    scores: torch.Tensor    # (P, 2, N) of HiRED, which chooses among all tiles of an image; else (P, 0)

    def of(self, rows):
        return Pieces(*(x[rows] for x in self))


def by_size(pixels):
    """[[the numbers of arrays (tiles, 3, height, width) of one size], ...], without those that have no tiles."""
    groups = {}
    for i, x in enumerate(pixels):
        if len(x):
            groups.setdefault(x.shape[1:], []).append(i)
    return groups.values()


def arrange(pieces, tiling, newline, c):
    """Pieces -> (tokens, d): base tile, then the grid unpadded, each row ended by the vector newline (d,), or None
    of a model without. Where patches are picked, those of the base tile and then those of the grid."""
    side, d = tiling.cells[0], c.hidden
    newline = pieces.features.new_zeros(1, d) if newline is None else newline[None]  # (1, d)
    if c.reduction.picks:
        picked = pieces.features.flatten(0, 1)[places(pieces, tiling, c)[0]]
        return torch.cat([picked, newline.expand(tiling.newlines, d)])
    tiles = pieces.features
    if tiles.shape[1] != math.prod(tiling.cells):
        tiles = pool(tiles, tiling.patches, tiling.cells)
    base = tiles[0]                                                # (side * side, d)
    if tiling.canvas is None:                                      # a lone tile, or an image without tiles
        return torch.cat([base, newline[:tiling.newlines]])
    (rows, columns), (crop_r, crop_c) = tiling.grid, tiling.crop
    grid = tiles[1:].view(rows, columns, side, side, d).transpose(1, 2).reshape(rows * side, columns * side, d)
    grid = grid[crop_r:rows * side - crop_r, crop_c:columns * side - crop_c]  # without what sees only padding
    if tiling.interpolated:                                        # anyres_max_9: a large image costs no more
        grid = F.interpolate(grid.permute(2, 0, 1)[None], tiling.size, mode="bilinear")[0].permute(1, 2, 0)
    grid = torch.cat([grid, newline.expand(tiling.newlines, 1, d)], dim=1)  # (h, w + 1, d)
    return torch.cat([base, grid.flatten(0, 1)])


def places(pieces, tiling, c):
    """The order in which patches that were picked go on, and where they lie: (rows of the flattened (P * K) tokens,
    their tiles, their patches), (tokens,) each.

    The base tile first, then the grid row by row over all its tiles; VisionZip's merged tokens come last in each.
    """
    n, device, tiles = c.patches, pieces.features.device, len(pieces.features)
    kept = pieces.kept
    if c.reduction.method == "hired":
        kept = torch.arange(n * n, device=device).expand(tiles, -1)
    tile = np.arange(tiles)[:, None]
    columns = max(1, tiling.grid[1])
    y, x = np.arange(n * n) // n, np.arange(n * n) % n                                    # in a tile
    down, along = (tile - 1) // columns * n + y, (tile - 1) % columns * n + x             # in the grid
    raster = np.where(tile == 0, np.arange(n * n), n * n + down * columns * n + along)    # (P, N)
    key = torch.from_numpy(raster).to(device).gather(1, kept)                             # (P, K)
    if c.reduction.method == "visionzip":
        dominant, end = c.reduction.of_tile(n)[0], raster.max() + 1                       # behind the base, or the end
        merged = torch.from_numpy(np.where(tile > 0, end, n * n) + tile * n * n).to(device)
        key = 2 * key
        key[:, dominant:] = 2 * merged - 1
    if c.reduction.method == "hired":
        seen = torch.from_numpy(patches_seen(tiling, n))
        key = key.masked_fill(~hired(pieces.scores[0, 0], pieces.scores[:, 1], tiling.grid, seen,
                                     tiling.tokens - tiling.newlines), raster.max() + 1)
    order = key.flatten().argsort(stable=True)[:tiling.tokens - tiling.newlines]
    return order, order // key.shape[1], kept.flatten()[order]


def patches_seen(tiling, n):
    """(P, N) bool in numpy: the patches that see the picture and not its padding alone."""
    if tiling.canvas is None:
        return np.ones((1, n * n), bool)
    (rows, columns), (crop_r, crop_c) = tiling.grid, tiling.crop
    grid = np.zeros((rows * n, columns * n), bool)
    grid[crop_r:rows * n - crop_r, crop_c:columns * n - crop_c] = True
    grid = grid.reshape(rows, n, columns, n).swapaxes(1, 2).reshape(rows * columns, n * n)
    return np.concatenate([np.ones((1, n * n), bool), grid])
