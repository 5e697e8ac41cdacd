"""What --reduce says: a method of visual token reduction, its settings, and how many tokens it keeps.

    pack:2  pack:2:widen  downsample:4  downsample:4:picture  m3:8  visionzip:104+24  visionzip:104+24:mean
    vispruner:96+32  hired:0.2  pyramiddrop:easy  pyramiddrop:hard  pyramiddrop:4,10,16:.5,.25,.125
    sparsevlm  sparsevlm:13.5  sparsevlm:13.5:drop

A method's name alone has the settings of the paper (appendix L, table 1). Without torch: data.py and flops.py count
before anything is encoded. The methods themselves are in reduction.py, and in pruning.py what drops tokens between
layers of the language model.
"""
import math
import re
import sys
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

FORMS = {  # what may stand behind a method's name
    "pack": "pack:RATIO or pack:RATIO:widen, about RATIO times fewer tokens, 1 or more",
    "downsample": "downsample:RATIO, about RATIO times fewer tokens, or downsample:RATIO:picture, of pixels, 1 or more",
    "m3": "m3:RATIO, about RATIO times fewer tokens, 1 or more",
    "visionzip": "visionzip:DOMINANT+CONTEXTUAL, whole numbers of a tile's patches, and :mean to average what merges",
    "vispruner": "vispruner:IMPORTANT+DIVERSE, whole numbers of a tile's patches",
    "hired": "hired:SHARE, of an image's tokens, above 0 and at most 1",
    "pyramiddrop": "pyramiddrop:easy, pyramiddrop:hard, or pyramiddrop:LAYERS:SHARES as 4,10,16:.5,.25,.125, layers "
                   "ascending from 1, as many shares of the first count, falling",
    "sparsevlm": "sparsevlm:SCALE or sparsevlm:SCALE:drop, SCALE tokens for each unit of rank"}
GRID = {"pack": 2.0, "downsample": 4.0, "m3": 8.0}        # a smaller grid of tokens: about so many times fewer
M3_SCALES = 1, 4, 8, 16                                   # that m3 learns
PICKED = {"visionzip": (104, 24), "vispruner": (96, 32)}  # some of a tile's patches, of 729 (appendix L)
INSIDE = "pyramiddrop", "sparsevlm"                       # between layers of the language model
OPTIONS = {"pack": "widen", "downsample": "picture", "visionzip": "mean", "sparsevlm": "drop"}
TRAINED = {"m3": "train.py --stage 0 --reduce m3"}        # what a checkpoint must have learned, and how
# PyramidDrop: {layers: {benchmarks: (layers before which tokens go, share of an image's tokens that is left)}}. What
# the paper prints for 28 layers overlaps; read as in reduction order
PYRAMID = {24: {"easy": ((1, 6, 12), (0.3, 0.2, 0.1)), "hard": ((4, 10, 16), (0.5, 0.25, 0.125))},
           28: {"easy": ((1, 2, 6, 10), (0.5, 0.3, 0.2, 0.1)), "hard": ((2, 8, 12, 18), (0.75, 0.5, 0.25, 0.125))}}
SPARSE_LAYERS = 2, 6, 15, 19   # SparseVLM's, of 32: behind them tokens go
SPARSE_SHARE = 0.008           # of an image's tokens, for each unit of rank; see `Reduction.sparse_scale`


class Reduction(NamedTuple):
    """A method and its settings; what a method does not use is as it stands here."""
    method: str = ""      # "": every visual token goes on
    ratio: float = 1.0    # of a grid: about so many times fewer tokens
    counts: tuple = ()    # of a tile's patches: (by attention, merged or diverse); (): the paper's shares
    share: float = 0.2    # hired: of an image's tokens, what is kept
    drop: object = "hard"  # pyramiddrop: (layers, shares), or the name of one of PYRAMID
    scale: float = 0.0    # sparsevlm: tokens for each unit of rank; 0: SPARSE_SHARE of the image's
    # pack: "widen", the connector reads four sub-tokens; downsample: "picture", it is made smaller and not the grid;
    # visionzip: "mean", merged tokens are averaged and not added; sparsevlm: "drop", nothing is recycled; m3: "drawn",
    # every training step draws one of M3_SCALES
    option: str = ""

    @property
    def picks(self):
        """Whether some of the patches go on, so that there is no grid any more."""
        return self.method in PICKED or self.method == "hired"

    @property
    def inside(self):
        """Whether tokens go between layers of the language model."""
        return self.method in INSIDE

    def side(self, patches):
        """Tokens along one side of a tile of patches x patches; where patches are picked, of the grid they come from.

        The paper's "interpolate by 1 / sqrt(2)" of packing is read as the side of the result, 27 -> 19, the only
        reading that halves the tokens; the sides of M3 and Downsample are rounded likewise: 27, 14, 10, 7."""
        if self.method not in GRID or self.option == "picture":
            return patches
        return max(1, int(patches / math.sqrt(self.ratio) + 0.5))

    def grid(self, cells):
        """`side` of (rows, columns)."""
        return tuple(self.side(n) for n in cells)

    def picture(self, width, height):
        """The size in pixels that a picture is given before all else."""
        if self.option != "picture":
            return width, height
        return tuple(max(1, int(x / math.sqrt(self.ratio))) for x in (width, height))

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
            return max(1, min(int(n * tiles * self.share), n * tiles if seen is None else seen))
        return tiles * (sum(self.of_tile(patches)) if self.method in PICKED else self.side(patches) ** 2)

    def drops(self, layers):
        """Of a language model with so many layers: those before which visual tokens go, ascending."""
        if self.method == "sparsevlm":
            return tuple(1 + int(l * layers / 32 + 0.5) for l in SPARSE_LAYERS)
        return self.pyramid(layers)[0] if self.inside else ()

    def pyramid(self, layers):
        """PyramidDrop's (layers, shares of an image's tokens). For other depths than the paper's, its 24 scaled."""
        if not isinstance(self.drop, str):
            return self.drop
        if layers in PYRAMID:
            return PYRAMID[layers][self.drop]
        at, shares = PYRAMID[24][self.drop]
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
        if self.picks and c.encoder != "siglip":
            raise ValueError(f"{name}: patches are scored by SigLIP's attention, and this encoder is {c.encoder}; give "
                             "pack, downsample or m3")
        if self.option == "picture" and c.aspect == "pad":
            raise ValueError(f"{name}: a picture that was made smaller would be padded and enlarged again; give "
                             f"downsample:{self.ratio:g}")
        if self.inside and c.mrope:
            raise ValueError(f"{name}: what is left would not stand in rows and columns, as M-RoPE counts them; give "
                             "pack, downsample or m3")
        if self.method in PICKED and sum(self.of_tile(c.patches)) > n:
            raise ValueError(f"{name}: keeps {sum(self.of_tile(c.patches))} of a tile's {n} patches; give fewer")
        at = self.drops(c.layers)
        if self.inside and (at[-1] >= c.layers or any(x >= y for x, y in zip(at, at[1:]))):
            raise ValueError(f"{name}: tokens would go before layers {', '.join(map(str, at))}, but this model has "
                             f"layers 0 to {c.layers - 1}; name others, pyramiddrop:{c.layers // 2}:.5")


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
    if method not in FORMS:
        raise ValueError(f"{text[:60]}: no such method; give one of {', '.join(FORMS)}")
    if not settings:
        return Reduction(method, GRID.get(method, 1.0), option="drawn" if method == "m3" else "")
    try:
        return with_settings(method, settings)
    except (ValueError, TypeError):  # too many or too few
        raise ValueError(f"{text[:60]}: give {FORMS[method]}") from None


def with_settings(method, texts):
    """The Reduction of a method's name and one or two texts behind it. Raises ValueError."""
    if method == "pyramiddrop":
        return Reduction(method, drop=texts[0] if texts in (["easy"], ["hard"]) else pyramid_of(*texts))
    settings, option = texts if len(texts) == 2 else (*texts, "")
    if len(texts) == 2 and option != OPTIONS.get(method):
        raise ValueError
    if option and not settings:  # sparsevlm::drop
        return parse(method)._replace(option=option)
    if method in GRID:
        return Reduction(method, number(settings, 1, 1e6), option=option)
    if method in PICKED:
        counts = tuple(int(number(x, 0, 1e6, "[0-9]+")) for x in settings.split("+"))
        if len(counts) != 2 or not sum(counts):
            raise ValueError
        return Reduction(method, counts=counts, option=option)
    if method == "hired":
        return Reduction(method, share=number(settings, 1e-6, 1))
    return Reduction(method, scale=number(settings, 1e-6, 1e6), option=option)


def number(text, low, high, form=r"[0-9]*\.?[0-9]+"):
    """The number that a text says. Raises ValueError."""
    if not re.fullmatch(form, text) or not low <= float(text) <= high:
        raise ValueError
    return float(text)


def pyramid_of(layers, shares):
    """PyramidDrop's (layers, shares). Raises ValueError."""
    at = tuple(int(number(x, 1, 1e4, "[0-9]+")) for x in layers.split(","))
    left = tuple(number(x, 1e-6, 1) for x in shares.split(","))
    ascending, falling = all(x < y for x, y in zip(at, at[1:])), all(x >= y for x, y in zip(left, left[1:]))
    if len(at) != len(left) or not ascending or not falling:
        raise ValueError
    return at, left


def text_of(r):
    """What --reduce calls a Reduction."""
    def plain(x):  # no exponent, no digit too few
        return np.format_float_positional(x, trim="-")
    if r.option == "drawn":
        return r.method
    if r.method in GRID:
        settings = plain(r.ratio)
    elif r.method in PICKED:
        settings = "+".join(map(str, r.counts))
    elif r.method == "hired":
        settings = plain(r.share)
    elif r.method == "pyramiddrop":
        settings = r.drop if isinstance(r.drop, str) else ":".join(",".join(map(plain, part)) for part in r.drop)
    else:
        settings = plain(r.scale) if r.scale else ""
    return ":".join([r.method, *[settings] * bool(settings or r.option), *[r.option] * bool(r.option)])


def for_step(config, seed, step):
    """The Config of a training step: of M3 that has no scale, with one of M3_SCALES, drawn. (The official code runs all
    scales in each step and averages their losses.)"""
    if config.reduction.option != "drawn":
        return config
    scale = M3_SCALES[np.random.default_rng((seed, step, len(M3_SCALES))).integers(len(M3_SCALES))]
    return replace(config, reduce=f"m3:{scale}")


def add_flags(parser, what="the visual tokens of each image become fewer"):
    """--reduce and --pack of a command, and what `add_pixels` adds."""
    parser.add_argument("--reduce", metavar="METHOD", help=f"{what}: {', '.join(FORMS)}; with settings visionzip:"
                        "104+24, m3:4 (m3 alone: 8 times fewer), hired:0.2, ...; pyramiddrop and sparsevlm need the "
                        "dense configuration; none: all tokens (default: as the checkpoint says)")
    parser.add_argument("--pack", metavar="R", help="the same as --reduce pack:R, about R times fewer tokens a tile")
    add_pixels(parser)


def add_pixels(parser):
    """--min-pixels and --max-pixels, for Config.bound_pixels."""
    for name, what in (("min", "fewer is enlarged"), ("max", "more is shrunk")):
        parser.add_argument(f"--{name}-pixels", type=int, metavar="N", help=f"Qwen2-VL: a picture of {what} (default: "
                            "as the checkpoint says)")


def given(parser, args, not_inside=None):
    """Makes one --reduce of both flags and checks it; None where neither is given. not_inside: why it may not be one
    that drops tokens inside the language model. Ends with an error otherwise."""
    if args.reduce is not None and args.pack is not None:
        parser.error("--pack R means --reduce pack:R; give one of the two")
    if args.pack is not None:
        try:
            args.reduce = text_of(Reduction("pack", number(args.pack, 1, 1e6)))
        except ValueError:
            parser.error(f"--pack {args.pack[:60]}: give a number 1 or more")
    elif args.reduce is not None:
        try:
            args.reduce = "" if args.reduce == "none" else text_of(parse(args.reduce))
        except ValueError as e:
            parser.error(f"--reduce {e}")
        if not_inside and parse(args.reduce).inside:
            parser.error(f"--reduce {args.reduce}: {not_inside}")


def warn_untrained(asked, learned, model):
    """One line where a checkpoint, `model`, has learned another reduction than the one `asked` for, or not the one that
    must be learned. asked, learned: as --reduce names them."""
    method, known = parse(asked).method, parse(learned).method
    if method in TRAINED and known != method:
        print(f"--reduce {asked}: this checkpoint has not learned it; python {TRAINED[method]} --model {model} teaches "
              "it", file=sys.stderr)
    elif learned and method != known:
        print(f"--reduce {asked or 'none'}: this checkpoint has learned --reduce {learned}", file=sys.stderr)
