"""Fewer visual tokens: token packing (VISOR-TR, paper 4.4 and appendix I).

A reduction is a pure function of a tile's features, between the vision encoder and the connector; how many tokens it
keeps is known before anything is encoded (Config.side).
"""
import torch.nn.functional as F


def reduce(x, config):
    """Features of tiles (tiles, n * n, c) -> what the connector takes: the same, or packed (tiles, side * side, c), or
    with pack_widen (tiles, side * side, 4 * c)."""
    if config.pack == 1 and not config.pack_widen:
        return x
    x = pack(x, config.side)
    return x.flatten(2) if config.pack_widen else x.mean(2)


def pack(x, side):
    """Token packing: a tile's n x n patches become side x side tokens of four sub-tokens each.

    x (tiles, n * n, c) -> (tiles, side * side, 4, c), sub-tokens row by row. The grid is interpolated to the even side
    2 * side, then space-to-depth puts each 2 x 2 square into one token. The paper's "interpolate by 1 / sqrt(2)" for a
    ratio of 2 is read as the side of the result, 27 -> 19, the only reading that halves the tokens.
    """
    n = round(x.shape[1] ** 0.5)
    grid = F.interpolate(x.transpose(1, 2).unflatten(2, (n, n)), size=2 * side, mode="bilinear")
    grid = grid.unflatten(3, (side, 2)).unflatten(2, (side, 2))           # (tiles, c, side, dy, side, dx)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
