"""The architecture's numbers: what they may be, VISOR's default layers, the published sizes.

Imports no torch (1.5 s), nor do families.py, data.py and flops.py: so flops.py and every --help answer at once.
"""
import json
import re
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import NamedTuple

import methods

PAD = 1 << 30  # positions from here on belong to padding; every real token stands before it
PINPOINTS = tuple((w, h) for w in range(1, 7) for h in range(1, 7))  # LLaVA-OneVision's 36 tile grids, in tiles
PAPER_SA = (1, 4, 7, 10, 13, 16, 19, 22)
PAPER_VIABLE = (  # appendix A, for 24 layers; 13 is a candidate that none of them uses
    (1, 4), (1, 7), (1, 4, 7), (1, 4, 16), (1, 7, 16), (1, 10, 16), (1, 4, 7, 16), (1, 4, 7, 22), (1, 4, 10, 16),
    (1, 4, 7, 10, 16), (1, 4, 7, 16, 22), (1, 4, 7, 10, 16, 22), (1, 4, 7, 10, 16, 19, 22))

# What each setting may be: whole numbers from a range, numbers from low to high, or one of a list
LIMITS = {
    **dict.fromkeys(("hidden", "ffn", "vision_hidden", "vision_ffn"), range(1, (1 << 18) + 1)),
    **dict.fromkeys(("layers", "vision_layers"), range(1, 513)),
    **dict.fromkeys(("heads", "kv_heads", "vision_heads"), range(1, 1025)),
    **dict.fromkeys(("tile", "patch"), range(1, 4097)),
    "head_dim": range(2, 1025, 2),  # rotary positions turn pairs of features
    "vocab": range(1, (1 << 24) + 1), "max_tiles": range(1, 4097), "step": range(1 << 40),
    "rope_theta": (1.0, 1e12), "rms_eps": (1e-12, 1.0), "vision_eps": (1e-12, 1.0),
    **dict.fromkeys(("route_threshold", "pixel_threshold"), (0.0, 1.0)),
    **dict.fromkeys(("tied", "multi_image_newline", "router"), [False, True]),
    **dict.fromkeys(("min_pixels", "max_pixels"), range(1, 1 << 40)),
    "unpad": ["original", "hf"], "transparency": ["drop", "white"], "world": ["", "toy"],
    "encoder": ["siglip", "fastvithd", "qwen2_vl"], "aspect": ["anyres", "pad", "dynamic"],
    "stage": ["random", "pretrained", "0", "1", "2", "3"],
}
LONGEST = 1024               # entries that a list of settings may have
GRID = range(1, 65)          # tiles along a side of a grid
TOKENS = range(1 << 24)      # token ids


PIXELS = "overview", "all"   # what is seen of an image: its base tile alone, or every tile


class Plan(NamedTuple):
    """How a question is answered: the self-attention layers that run, and what is seen of the image."""
    sa: tuple
    pixels: str = "all"


@dataclass
class Config:
    """A model of any family; by default LLaVA-OneVision 0.5B. Sizes in features; layer indices count from 0 everywhere.
    """
    # language model: Qwen2
    hidden: int = 896
    layers: int = 24
    heads: int = 14
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 4864
    vocab: int = 151646
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    tied: bool = True               # the output head is the embedding matrix
    mrope: tuple = ()               # M-RoPE: frequencies that turn by time, row and column; (): all by one position
    # vision tower, a file of encoders/: SigLIP, used up to the layer before its last
    encoder: str = "siglip"
    vision_hidden: int = 1152       # of FastViTHD what comes out; the stages before have less
    vision_layers: int = 26
    vision_heads: int = 16
    vision_ffn: int = 4304
    vision_eps: float = 1e-6
    tile: int = 384                 # pixels per side of one tile
    patch: int = 14                 # pixels per side of one patch; 384 // 14 = 27, the last 6 pixels are never seen
    # images: "anyres", a base tile and a grid of tiles; "pad", one tile, padded to a square; "dynamic", as they are
    aspect: str = "anyres"
    min_pixels: int = 3136          # dynamic: smaller pictures are enlarged, larger ones shrunk
    max_pixels: int = 12845056
    pinpoints: tuple = PINPOINTS    # allowed grids (columns, rows), in tiles
    max_tiles: int | None = 9       # above about this many tiles' worth of tokens the grid is shrunk; None: never
    unpad: str = "original"         # "original" truncates the unpadded side; "hf" rounds it to 7 digits before
    transparency: str = "drop"      # "drop": colours as in the file; "white": laid on white, as Hugging Face does
    multi_image_newline: bool = True  # 730 tokens for each of several images (training, Hugging Face); else 729
    reduce: str = ""                # fewer visual tokens: a method of methods.py (paper 4.4, appendices I, L); "": all
    # VISOR
    ca: tuple = ()                  # layers that have a cross-attention (paper 4.2.1)
    sa: tuple = ()                  # layers that may run as self-attention over both streams (paper 4.2.2)
    viable: tuple = ()              # configurations (subsets of sa) that the model is trained for (paper 4.2.3)
    overview: tuple = ()            # those that it is trained for over an image's base tile alone
    router: bool = False            # it has a policy that chooses among them (paper 4.3)
    route_threshold: float = 1.0    # the router takes the costliest configuration at least as likely; 1: the likeliest
    pixel_threshold: float = 0.7    # it is content with the overview from this probability on
    stop_ids: tuple = ()            # tokens that end an answer, beside <|im_end|>
    # history
    stage: str = "random"           # what made the weights: random, pretrained, 0, 1, 2, 3
    step: int = 0
    world: str = ""                 # "toy": it has seen toy/'s quilts and nothing else

    @property
    def cell(self):
        """Pixels along one side of what the vision tower makes one visual token of: Qwen2-VL joins 2 x 2 patches."""
        return self.patch * (2 if self.encoder == "qwen2_vl" else 1)

    @property
    def features(self):
        """Features of a visual token, as they leave the vision tower."""
        return self.vision_hidden * (self.cell // self.patch) ** 2

    @property
    def patches(self):
        """Tokens along one side of a tile, as they leave the vision tower."""
        return self.tile // self.cell

    @property
    def connector_hidden(self):
        """Features between the two layers of the connector."""
        return self.features if self.encoder == "qwen2_vl" else self.hidden

    @property
    def has_newlines(self):
        """Whether rows of a grid of tiles end by a learned vector."""
        return self.aspect == "anyres"

    @property
    def side(self):
        """Tokens along one side of a tile's grid: fewer than patches where a reduction makes the grid smaller."""
        return self.reduction.side(self.patches)

    @property
    def reduction(self):
        """The methods.Reduction that `reduce` names."""
        return methods.parse(self.reduce)

    def vision_readers(self, sa):
        """Of a configuration: (the layers whose cross-attention runs, the last layer of all that reads vision, or -1).
        In a layer of sa its cross-attention is not run (Eq. 3)."""
        cross = [l for l in self.ca if l not in sa]
        return cross, max([*sa, *cross], default=-1)

    @property
    def plans(self):
        """All that the model is trained for, the overview first."""
        return tuple(Plan(sa, pixels) for pixels in PIXELS for sa in self.configurations(pixels))

    def configurations(self, pixels):
        """Those that the model is trained for, with these pixels."""
        return self.viable if pixels == "all" else self.overview

    def allowed_pixels(self, pixels, sa, allowed=None):
        """The pixels that may be chosen with `sa`, a configuration or "auto": "auto" is "all" where none of `allowed`,
        the configurations that may be chosen (None: all), is trained for the overview. Raises ValueError where nothing
        chooses them."""
        if pixels == "overview" and self.aspect != "anyres":
            raise ValueError('pixels "overview": this model sees an image without tiles, so there is no base tile')
        if pixels == "auto" and not (sa == "auto" and self.router and self.overview):
            raise ValueError('pixels "auto" go with sa "auto", of a model whose router has learned to choose them')
        none = allowed is not None and not set(map(tuple, allowed)) & set(self.overview)
        return "all" if pixels == "auto" and none else pixels

    def check_reduction(self, sa):
        """Raises ValueError where a reduction inside the language model does not go with `sa`: a configuration, a list
        of them, or "auto"."""
        every = tuple(range(self.layers))
        if self.reduction.inside and (sa == "auto" or any(tuple(sorted(x)) != every for x in (
                sa if isinstance(sa, list) else [sa]))):
            raise ValueError(f"--reduce {self.reduce}: tokens go between layers of the dense configuration; give --sa "
                             "dense")

    @property
    def route_layer(self):
        """The first layer in which viable configurations differ: the router decides before it (4.3). None without."""
        return min(branch_layers(self.viable), default=None)

    @property
    def pixel_layer(self):
        """The layer before which the router decides on the pixels: behind the first in which text looks at vision,
        whatever the configuration. None where it has no overview to decide on."""
        common = set(self.sa).intersection(*self.viable, *self.overview)
        return 1 + min([*self.ca, *common]) if self.overview else None

    def unreduced(self):
        """The same with every visual token: what savings are measured against."""
        return replace(self, reduce="")

    def __post_init__(self):
        """Checks every setting, wherever it comes from. JSON has lists; ours are tuples, so that configurations can be
        compared and used as keys. Raises ValueError that names the setting."""
        for name in LIMITS:
            if name != "max_tiles" or self.max_tiles is not None:
                setattr(self, name, checked(name, getattr(self, name)))
        for whole, part in (("heads", "kv_heads"), ("vision_hidden", "vision_heads"), ("tile", "patch")):
            a, b = getattr(self, whole), getattr(self, part)
            if a < b or (whole != "tile" and a % b):
                raise ValueError(f"{whole} {a} does not go with {part} {b}")
        self.pinpoints = tuple(numbers("pinpoints", p, GRID) for p in entries("pinpoints", self.pinpoints))
        if not self.pinpoints or not all(len(p) == 2 and p[0] * p[1] <= 128 for p in self.pinpoints):
            raise ValueError("pinpoints: a list of (columns, rows) is needed, each of at most 128 tiles")
        self.stop_ids = numbers("stop_ids", self.stop_ids, TOKENS)
        self._check_encoder()
        self._check_layers()
        if not isinstance(self.reduce, str):
            raise ValueError(f"reduce {short(self.reduce)}: must be the name of a method")
        try:
            self.reduction.check(self)
        except ValueError as e:
            raise ValueError(f"reduce {e}") from None
        if self.router and self.route_layer is None:
            raise ValueError("router true: it needs at least two viable configurations to choose from")

    def _check_encoder(self):
        if (self.encoder == "qwen2_vl") != (self.aspect == "dynamic"):
            raise ValueError(f"aspect {self.aspect} does not go with encoder {self.encoder}")
        if self.encoder == "fastvithd" and (self.tile % 64 or self.patch != 64 or self.vision_hidden % 128):
            raise ValueError(f"tile {self.tile}, patch {self.patch}, vision_hidden {self.vision_hidden}: FastViTHD "
                             "needs a multiple of 64, 64, a multiple of 128")
        if self.encoder == "qwen2_vl" and self.vision_hidden // self.vision_heads % 4:
            raise ValueError(f"vision_heads {self.vision_heads}: rows and columns turn a quarter of a head's features "
                             f"each, and {self.vision_hidden // self.vision_heads} have no quarter")
        self.mrope = numbers("mrope", self.mrope, range(1, 1025))
        if not self.patches:
            raise ValueError(f"tile {self.tile} does not go with patch {self.patch}, of which a token has several")
        if self.mrope and self.encoder != "qwen2_vl":
            raise ValueError(f"mrope {short(self.mrope)}: encoder {self.encoder} has no rows and columns to turn by")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels}: must not be above max_pixels {self.max_pixels}")
        if self.mrope and (len(self.mrope) != 3 or 2 * sum(self.mrope) != self.head_dim):
            raise ValueError(f"mrope {self.mrope}: must be three numbers, {self.head_dim // 2} in all")

    def _check_layers(self):
        own = range(self.layers)
        self.ca, self.sa = (numbers(f"{x}: layer", getattr(self, x), own, ascending=True) for x in ("ca", "sa"))
        for name in ("viable", "overview"):
            found = [numbers(f"{name}: layer", x, own, ascending=True) for x in entries(name, getattr(self, name))]
            setattr(self, name, tuple(found))
            for x in found:
                if not set(x) <= set(self.sa):
                    raise ValueError(f"{name} configuration {x} has layers that are not among the candidates sa "
                                     f"{self.sa}")
            if len(set(found)) < len(found):
                raise ValueError(f"{name}: a configuration is named twice")
        if self.overview and self.aspect != "anyres":
            raise ValueError(f"overview {short(self.overview)}: an image without tiles has none")
        if not set(self.overview) <= set(self.viable):
            raise ValueError(f"overview {short(self.overview)}: a configuration must be viable over all pixels, too")

    def to_json(self):
        """config.json: viable is a list of plans."""
        settings = {"model_type": "visor", **asdict(self), "viable": [plan._asdict() for plan in self.plans]}
        del settings["overview"]
        return json.dumps(settings, indent=1)

    def add_visor(self, ca=None, sa=None, viable=None, overview=None):
        """Sets ca, sa, viable and overview, with defaults for what is None: a third of the layers each, stride 3 (paper
        4.2.3, 5.1); over the overview the smallest configuration. Returns the Config. Raises ValueError.

        Each cross-attention stands one layer after a candidate, so that it reads what that one refined. The viable
        configurations are those that the paper found among 8 candidates (appendix A), carried over to the candidates
        at the same share of the depth. All of them keep the first candidate: so the router, which decides before the
        first layer that may be skipped, has looked at vision.
        """
        n = self.layers // 3
        self.sa = tuple(range(1, self.layers, 3))[:n] if sa is None else tuple(sorted(sa))
        self.ca = tuple(range(2, self.layers, 3))[:n] if ca is None else tuple(sorted(ca))
        if viable is None:
            at = {l: self.sa[round(i * (len(self.sa) - 1) / 7)] for i, l in enumerate(PAPER_SA) if self.sa}
            viable = dict.fromkeys(tuple(dict.fromkeys(at[l] for l in v)) for v in PAPER_VIABLE if self.sa)
        self.viable = tuple(tuple(sorted(v)) for v in viable)
        has_overview = len(self.viable) > 1 and self.aspect == "anyres"
        smallest = sorted(self.viable, key=len)[:1] if has_overview else ()
        self.overview = tuple(tuple(sorted(v)) for v in (smallest if overview is None else overview))
        self._check_layers()
        return self

    def bound_pixels(self, args):
        """Follows --min-pixels and --max-pixels of a command's namespace. Raises ValueError."""
        given = {name: n for name in ("min_pixels", "max_pixels") if (n := getattr(args, name)) is not None}
        for name, n in given.items():
            flag = "--" + name.replace("_", "-")
            if self.aspect != "dynamic":
                raise ValueError(f"{flag} {n}: this model sees tiles of {self.tile} pixels; leave it out")
            setattr(self, name, checked(name, n, flag))
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"--min-pixels {self.min_pixels}: must not be above --max-pixels {self.max_pixels}")

    def configuration(self, text, flag="--sa"):
        """The self-attention layers that `text` asks for: "dense", "none" or "1,4,7". Returns an ascending tuple.
        flag: where it was given, for the error."""
        if text in ("dense", "none"):
            return tuple(range(self.layers)) if text == "dense" else ()
        if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", text):
            auto = "auto, " * (flag == "/sa")  # who gives --sa auto does not come here
            raise ValueError(f"{flag} {text[:60]}: give {auto}dense, none, or layer numbers such as 1,4,7")
        sa = tuple(sorted({int(x) for x in text.split(",")}))
        if sa[-1] >= self.layers:
            raise ValueError(f"{flag} {text}: there is no layer {sa[-1]}; this model has layers 0 to {self.layers - 1}")
        return sa


def checked(name, value, said=None, limits=LIMITS):
    """A setting's value, if its limit allows it; a number with a fraction may come as a whole one. Raises ValueError
    that names the setting. said: its name where it comes from."""
    limit = limits[name]
    if isinstance(limit, range):
        fits, wanted = type(value) is int and value in limit, f"a whole number from {limit[0]} to {limit[-1]:,}"
        wanted += ", even" if limit.step == 2 else ""
    elif isinstance(limit, tuple):  # not a number is in no interval
        fits = type(value) in (int, float) and limit[0] <= value <= limit[1]
        value, wanted = float(value) if fits else value, f"a number from {limit[0]:g} to {limit[1]:g}"
    else:
        fits = any(type(value) is type(x) and value == x for x in limit)
        wanted = " or ".join(map(json.dumps, limit))
    if not fits:
        raise ValueError(f"{said or name} {short(value)}: must be {wanted}")
    return value


def entries(name, value):
    """A setting that is a list, as a tuple. Raises ValueError."""
    if not isinstance(value, (list, tuple)) or len(value) > LONGEST:
        raise ValueError(f"{name} {short(value)}: must be a list of at most {LONGEST:,}")
    return tuple(value)


def numbers(name, value, limit, ascending=False):
    """A setting that is a list of whole numbers, as a tuple. Raises ValueError."""
    found = entries(name, value)
    if bad := [x for x in found if type(x) is not int or x not in limit]:
        raise ValueError(f"{name} {short(bad[0])}: must be a whole number from {limit[0]} to {limit[-1]:,}")
    if ascending and any(a >= b for a, b in zip(found, found[1:])):
        raise ValueError(f"{name} {short(value)}: layers are to be named once each, in ascending order")
    return found


def short(value):
    """A value of a file as it may stand in an error line."""
    text = ascii(value)
    return text if len(text) < 60 else text[:57] + "..."


def branch_layers(configurations):
    """The layers in which two configurations differ that agree on all layers before."""
    return {min(set(a) ^ set(b)) for a, b in combinations(configurations, 2) if set(a) != set(b)}


def group_by_configuration(sa):
    """[(configuration, [samples that run it])] of a list with one configuration for each sample."""
    sa = [tuple(sorted(x)) for x in sa]
    return [(own, [i for i, x in enumerate(sa) if x == own]) for own in dict.fromkeys(sa)]


def sa_name(c, sa):
    """What --sa calls a configuration."""
    return "dense" if len(sa) == c.layers else ",".join(map(str, sa)) or "none"


def plan_name(c, plan):
    """A Plan's layers, with ov: before them where they run over the overview."""
    return "ov:" * (plan.pixels == "overview") + sa_name(c, plan.sa)


SIZES = {  # of Qwen2
    "0.5b": {}, "1.5b": dict(hidden=1536, layers=28, heads=12, kv_heads=2, head_dim=128, ffn=8960),
    "7b": dict(hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, ffn=18944, tied=False)}
FASTVITHD = dict(encoder="fastvithd", vision_hidden=3072, vision_layers=44, vision_heads=24, vision_ffn=6144, patch=64,
                 vision_eps=1e-5)
FASTVLM = dict(**FASTVITHD, tile=1024, aspect="pad", multi_image_newline=False, tied=False)
QWEN2_VL = dict(encoder="qwen2_vl", aspect="dynamic", multi_image_newline=False, mrope=(16, 24, 24), vision_hidden=1280,
                vision_layers=32, vision_heads=16, vision_ffn=5120)
PRESETS = {
    **{f"llava-ov-{size}": c for size, c in SIZES.items()},  # the 1.5B is the paper's own
    "llava-ov-0.5b-fastvithd": dict(**FASTVITHD, tile=384),  # likewise (appendix K)
    **{f"fastvlm-{size}": {**c, **FASTVLM} for size, c in SIZES.items()},
    "qwen2-vl-2b": SIZES["1.5b"] | QWEN2_VL, "qwen2-vl-7b": SIZES["7b"] | QWEN2_VL}


def preset(model):
    """The Config of a published size, with VISOR's default layers."""
    return Config(**PRESETS[model]).add_visor()
