"""What --reduce says: a method of visual token reduction, its settings, and how many tokens it keeps.

    pack:2  pack:2:widen  downsample:4  m3:8  visionzip:104+24  vispruner:96+32  hired:0.2
    pyramiddrop:easy  pyramiddrop:hard  pyramiddrop:4,10,16:.5,.25,.125  sparsevlm  sparsevlm:13.5  sparsevlm:13.5:drop

A method's name alone has the settings of the paper (appendix L, table 1). Without torch: data.py and flops.py count
before anything is encoded. The methods themselves are in reduction.py, and in pruning.py what drops tokens between
layers of the language model.
"""
import math
import re
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

GRID = {"pack": 2.0, "downsample": 4.0, "m3": 8.0}      # a smaller grid of tokens: about so many times fewer
M3_SCALES = 1, 4, 8, 16                                 # that m3 learns
PICKED = {"visionzip": (104, 24), "vispruner": (96, 32)}  # some of a tile's patches, of 729 (appendix L)
INSIDE = "pyramiddrop", "sparsevlm"                     # between layers of the language model
METHODS = *GRID, *PICKED, "hired", *INSIDE
TRAINED = {"m3": "train.py --stage 0 --reduce m3"}      # what a checkpoint must have learned, and how
# PyramidDrop: {layers: {benchmarks: (layers before which tokens go, share of an image's tokens that is left)}}. What
# the paper prints for 28 layers overlaps; read as in reduction order
PYRAMID = {24: {"easy": ((1, 6, 12), (0.3, 0.2, 0.1)), "hard": ((4, 10, 16), (0.5, 0.25, 0.125))},
           28: {"easy": ((1, 2, 6, 10), (0.5, 0.3, 0.2, 0.1)), "hard": ((2, 8, 12, 18), (0.75, 0.5, 0.25, 0.125))}}
SPARSE_LAYERS = 2, 6, 15, 19   # SparseVLM's, of 32: behind them tokens go
SPARSE_SHARE = 0.008           # of an image's tokens, for each unit of rank; see `Reduction.sparse_scale`
NUMBER = r"[0-9]*\.?[0-9]+"


class Reduction(NamedTuple):
    """A method and its settings; what a method does not use is as it stands here."""
    method: str = ""      # "": every visual token goes on
    ratio: float = 1.0    # of a grid: about so many times fewer tokens; hired: the share that is kept
    counts: tuple = ()    # of a tile's patches: (by attention, merged or diverse); (): the paper's shares
    stages: tuple = ()    # pyramiddrop: (layers, shares), or the name of one of PYRAMID
    scale: float = 0.0    # sparsevlm: tokens for each unit of rank; 0: SPARSE_SHARE of the image's
    # pack: "widen", the connector reads four sub-tokens; sparsevlm: "drop", nothing is recycled; m3: "drawn", every
    # training step draws one of M3_SCALES
    option: str = ""

    @property
    def picks(self):
        """Whether some of the patches go on, so that there is no grid any more."""
        return self.method in PICKED or self.method == "hired"

    @property
    def inside(self):
        return self.method in INSIDE

    def side(self, patches):
        """Tokens along one side of a tile of patches x patches; where patches are picked, of the grid they come from.

        The paper's "interpolate by 1 / sqrt(2)" of packing is read as the side of the result, 27 -> 19, the only
        reading that halves the tokens; the sides of M3 and Downsample are rounded likewise: 27, 14, 10, 7."""
        return max(1, int(patches / math.sqrt(self.ratio) + 0.5)) if self.method in GRID else patches

    def of_tile(self, patches):
        """(by attention, merged or diverse): how many of a tile's patches."""
        if self.counts:
            return self.counts
        return tuple(max(1, round(x * patches ** 2 / 729)) for x in PICKED[self.method])

    def tokens(self, patches, tiles=1, seen=None):
        """Visual tokens of an image's tiles, without newlines; of a lone tile by default. seen: patches that see the
        picture, where not all do."""
        n = patches ** 2
        if self.method == "hired":
            return max(1, min(int(n * tiles * self.ratio), n * tiles if seen is None else seen))
        return tiles * (sum(self.of_tile(patches)) if self.method in PICKED else self.side(patches) ** 2)

    def drops(self, layers):
        """Of a language model with so many layers: those before which visual tokens go, ascending."""
        if self.method == "sparsevlm":
            return tuple(1 + int(l * layers / 32 + 0.5) for l in SPARSE_LAYERS)
        return self.pyramid(layers)[0]

    def pyramid(self, layers):
        """PyramidDrop's (layers, shares of an image's tokens). For other depths than the paper's, its 24 scaled."""
        if not isinstance(self.stages, str):
            return self.stages
        if layers in PYRAMID:
            return PYRAMID[layers][self.stages]
        at, shares = PYRAMID[24][self.stages]
        return tuple(max(1, int(l * layers / 24 + 0.5)) for l in at), shares

    def pyramid_count(self, k, first, layers):
        """PyramidDrop: tokens that are left of an image's `first` after the k-th drop."""
        return max(1, int(first * self.pyramid(layers)[1][k]))

    def sparse_scale(self, first):
        """SparseVLM's tokens for each unit of rank, of an image that had `first` tokens. The official scale is a
        number, 13.5 at 576 tokens. An image of LLaVA-OneVision has thousands, so the default is a share of them."""
        return self.scale or SPARSE_SHARE * first

    def check(self, c):
        """Raises ValueError where it does not go with a config.Config."""
        name, n = text_of(self), c.patches ** 2
        if self.method in PICKED and sum(self.of_tile(c.patches)) > n:
            raise ValueError(f"{name}: keeps {sum(self.of_tile(c.patches))} of a tile's {n} patches; give fewer")
        if self.inside:
            at = self.drops(c.layers)
            if at[-1] >= c.layers or any(a >= b for a, b in zip(at, at[1:])):
                raise ValueError(f"{name}: tokens would go before layers {', '.join(map(str, at))}, but this model has "
                                 f"layers 0 to {c.layers - 1}; name others in ascending order")


def sparse_count(rank, tokens, scale):
    """SparseVLM: how many of an image's `tokens` go on behind a layer: `scale` for each unit of the rank."""
    if rank >= tokens or tokens == 1:
        return tokens
    return max(1, min(int(rank * scale), tokens - 1))


def recycled_count(n):
    """SparseVLM: clusters that are made of n dropped tokens."""
    return int(min(int(0.3 * n) + 1, n) / 10) + 1 if n else 0


@lru_cache
def parse(text):
    """The Reduction that a text names. Raises ValueError, one line without the name of a flag."""
    method, *settings = text.split(":")
    if text == "":
        return Reduction()
    if method not in METHODS:
        raise ValueError(f"{text[:60]}: no such method; give one of {', '.join(METHODS)}")

    def refuse(form):
        raise ValueError(f"{text[:60]}: give {form}")

    def number(form, low, high, default):
        if not settings or not settings[0]:
            return default
        if not re.fullmatch(NUMBER, settings[0]) or not low <= float(settings[0]) <= high:
            refuse(form)
        return float(settings[0])

    option = settings[1] if len(settings) > 1 else ""
    if method == "pyramiddrop":
        return Reduction(method, stages=pyramid_stages(settings, refuse))
    if len(settings) > 2 or option not in ("", {"pack": "widen", "sparsevlm": "drop"}.get(method, "")):
        refuse({"pack": "pack:RATIO or pack:RATIO:widen", "sparsevlm": "sparsevlm:SCALE or sparsevlm:SCALE:drop"}.get(
            method, f"{method}, or {method} and its settings as in README.md"))
    if method in PICKED:
        counts = re.fullmatch(r"([0-9]{1,6})\+([0-9]{1,6})", settings[0]) if settings else None
        if settings and (not counts or not int(counts[1]) + int(counts[2])):
            refuse(f"two whole numbers of a tile's patches, {method}:{PICKED[method][0]}+{PICKED[method][1]}")
        return Reduction(method, counts=tuple(map(int, counts.groups())) if counts else ())
    if method == "hired":
        return Reduction(method, number("the share of tokens that it keeps, above 0 and at most 1, hired:0.2", 1e-6, 1,
                                        0.2))
    if method == "sparsevlm":
        scale = number("a number of tokens for each unit of rank, sparsevlm:13.5", 1e-6, 1e6, 0.0)
        return Reduction(method, scale=scale, option=option)
    if method == "m3" and not settings:
        option = "drawn"
    return Reduction(method, number(f"how many times fewer tokens, 1 or more, {method}:{GRID[method]:g}", 1, 1e6,
                                    GRID[method]), option=option)


def pyramid_stages(settings, refuse):
    """PyramidDrop's settings: the name of one of PYRAMID's, or layers and shares."""
    form = "pyramiddrop:easy, pyramiddrop:hard, or layers and shares, pyramiddrop:4,10,16:.5,.25,.125"
    if not settings or settings in (["easy"], ["hard"]):
        return settings[0] if settings else "hard"
    if len(settings) != 2 or not re.fullmatch("[0-9]{1,4}(,[0-9]{1,4})*", settings[0]) or not re.fullmatch(
            f"{NUMBER}(,{NUMBER})*", settings[1]):
        refuse(form)
    layers, shares = tuple(map(int, settings[0].split(","))), tuple(map(float, settings[1].split(",")))
    if (len(layers) != len(shares) or any(a >= b for a, b in zip((0, *layers), layers))
            or any(a < b for a, b in zip((1.0, *shares), shares)) or shares[-1] <= 0):
        refuse(f"{form}: as many shares as layers, layers ascending from 1, shares of the first count, falling")
    return layers, shares


def text_of(r):
    """What --reduce calls a Reduction."""
    if r.option == "drawn":
        return r.method
    if r.method in GRID or r.method == "hired":
        settings = f":{r.ratio:g}"
    elif r.method in PICKED:
        settings = ":{}+{}".format(*r.counts) if r.counts else ""
    elif r.method == "pyramiddrop":
        settings = f":{r.stages}" if isinstance(r.stages, str) else ":" + ":".join(
            ",".join(f"{x:g}" for x in part) for part in r.stages)
    else:
        settings = f":{r.scale:g}" if r.scale else ":" * bool(r.option)
    return r.method + settings + f":{r.option}" * bool(r.option)


def for_step(config, seed, step):
    """The Config of a training step: of M3 that has no scale, with one of M3_SCALES, drawn. (The official code runs all
    scales in each step and averages their losses.)"""
    if config.reduction.option != "drawn":
        return config
    scale = M3_SCALES[np.random.default_rng((seed, step, len(M3_SCALES))).integers(len(M3_SCALES))]
    return replace(config, reduce=f"m3:{scale}")


def add_flags(parser, what="the visual tokens of each image become fewer"):
    """--reduce and --pack of a command."""
    parser.add_argument("--reduce", metavar="METHOD", help=f"{what}: {', '.join(METHODS)}; with settings visionzip:"
                        "104+24, m3:8, hired:0.2, pyramiddrop:easy, ... (default: as the checkpoint says)")
    parser.add_argument("--pack", metavar="R", help="the same as --reduce pack:R, about R times fewer tokens a tile")


def given(parser, args):
    """Makes one --reduce of both flags and checks it; None where neither is given. Ends with an error otherwise."""
    if args.reduce is not None and args.pack is not None:
        parser.error("--pack R means --reduce pack:R; give one of the two")
    try:
        if args.pack is not None:
            args.reduce = text_of(parse(f"pack:{args.pack if re.fullmatch(NUMBER, args.pack) else 0}"))
        elif args.reduce is not None:
            args.reduce = text_of(parse(args.reduce))
    except ValueError as e:
        parser.error(f"--reduce {e}" if args.pack is None else f"--pack {args.pack[:60]}: give a number 1 or more")
