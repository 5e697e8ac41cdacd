"""The architecture's numbers, and how each family's config.json says them.

Imports no torch (1.5 s), nor do data.py and flops.py: so flops.py and every --help answer at once. That is why the
families' config.json files are read here and not in weights.py.
"""
import json
import math
import re
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path

from cli import read_json

PAD = 1 << 30  # positions from here on belong to padding; every real token stands before it
PINPOINTS = tuple((w, h) for w in range(1, 7) for h in range(1, 7))  # LLaVA-OneVision's 36 tile grids, in tiles
VISION_TOWERS = {  # original LLaVA files name their tower instead of describing it
    "google/siglip-so400m-patch14-384": dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                                             num_attention_heads=16, image_size=384, patch_size=14)}
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
    "rope_theta": (1.0, 1e12), "rms_eps": (1e-12, 1.0), "vision_eps": (1e-12, 1.0), "pack": (1.0, 1e6),
    "route_threshold": (0.0, 1.0),
    **dict.fromkeys(("tied", "multi_image_newline", "pack_widen", "router"), [False, True]),
    "unpad": ["original", "hf"], "transparency": ["drop", "white"], "world": ["", "toy"],
    "stage": ["random", "pretrained", "0", "1", "2", "3"],
}
LONGEST = 1024               # entries that a list of settings may have
GRID = range(1, 65)          # tiles along a side of a grid
TOKENS = range(1 << 24)      # token ids


@dataclass
class Config:
    """LLaVA-OneVision 0.5B, unless said otherwise. Sizes in features; layer indices are 0-based everywhere."""
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
    # vision tower: SigLIP, used up to the layer before its last
    vision_hidden: int = 1152
    vision_layers: int = 26
    vision_heads: int = 16
    vision_ffn: int = 4304
    vision_eps: float = 1e-6
    tile: int = 384                 # pixels per side of one tile
    patch: int = 14                 # pixels per side of one patch; 384 // 14 = 27, the last 6 pixels are never seen
    # images: anyres
    pinpoints: tuple = PINPOINTS    # allowed grids (columns, rows), in tiles
    max_tiles: int | None = 9       # above about this many tiles' worth of tokens the grid is shrunk; None: never
    unpad: str = "original"         # "original" truncates the unpadded side; "hf" rounds it to 7 digits before
    transparency: str = "drop"      # "drop": colours as in the file; "white": laid on white, as Hugging Face does
    multi_image_newline: bool = True  # 730 tokens for each of several images (training, Hugging Face); else 729
    # token packing (VISOR-TR, paper 4.4 and appendix I)
    pack: float = 1.0               # each tile has about this many times fewer tokens
    pack_widen: bool = False        # the connector reads four sub-tokens side by side; else their mean
    # VISOR
    ca: tuple = ()                  # layers that have a cross-attention (paper 4.2.1)
    sa: tuple = ()                  # layers that may run as self-attention over both streams (paper 4.2.2)
    viable: tuple = ()              # configurations (subsets of sa) that the model is trained for (paper 4.2.3)
    router: bool = False            # it has a policy that chooses among them (paper 4.3)
    route_threshold: float = 1.0    # the router takes the costliest configuration at least as likely; 1: the likeliest
    stop_ids: tuple = ()            # tokens that end an answer, beside <|im_end|>
    # history
    stage: str = "random"           # what made the weights: random, pretrained, 0, 1, 2, 3
    step: int = 0
    world: str = ""                 # "toy": it has seen toy/'s quilts and nothing else

    @property
    def patches(self):
        """Patches along one side of a tile, as the vision tower sees it."""
        return self.tile // self.patch

    @property
    def side(self):
        """Tokens along one side of a tile, as the language model sees it: fewer than patches where they are packed."""
        return max(1, int(self.patches / math.sqrt(self.pack) + 0.5))

    def vision_readers(self, sa):
        """Of a configuration: (the layers whose cross-attention runs, the last layer of all that reads vision, or -1).
        In a layer of sa its cross-attention is not run (Eq. 3)."""
        cross = [l for l in self.ca if l not in sa]
        return cross, max([*sa, *cross], default=-1)

    @property
    def route_layer(self):
        """The first layer in which viable configurations differ: the router decides before it (4.3). None without."""
        return min(branch_layers(self.viable), default=None)

    def unpacked(self):
        """The same without token packing: what savings are measured against."""
        return replace(self, pack=1.0, pack_widen=False)

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
        self._check_layers()
        if self.router and self.route_layer is None:
            raise ValueError("router true: it needs at least two viable configurations to choose from")

    def _check_layers(self):
        own = range(self.layers)
        self.ca, self.sa = (numbers(f"{x}: layer", getattr(self, x), own, ascending=True) for x in ("ca", "sa"))
        self.viable = tuple(numbers("viable: layer", v, own, ascending=True) for v in entries("viable", self.viable))
        for v in self.viable:
            if not set(v) <= set(self.sa):
                raise ValueError(f"viable configuration {v} has layers that are not among the candidates sa {self.sa}")
        if len(set(self.viable)) < len(self.viable):
            raise ValueError("viable: a configuration is named twice")

    def to_json(self):
        return json.dumps({"model_type": "visor", **asdict(self)}, indent=1)

    def add_visor(self, ca=None, sa=None, viable=None):
        """Sets ca, sa and viable, with defaults for what is None: a third of the layers each, stride 3 (paper 4.2.3,
        5.1). Returns the Config. Raises ValueError.

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
        self._check_layers()
        return self

    def configuration(self, text, flag="--sa"):
        """The self-attention layers that `text` asks for: "dense", "none" or "1,4,7". Returns an ascending tuple.
        flag: where it was given, for the error."""
        if text in ("dense", "none"):
            return tuple(range(self.layers)) if text == "dense" else ()
        if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})*", text):
            raise ValueError(f"{flag} {short(text)}: give dense, none, or layer numbers such as 1,4,7")
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


PRESETS = {
    "llava-ov-0.5b": {},
    "llava-ov-1.5b": dict(hidden=1536, layers=28, heads=12, kv_heads=2, head_dim=128, ffn=8960),  # the paper's own
    "llava-ov-7b": dict(hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, ffn=18944, tied=False)}


def preset(model):
    """The Config of a published size, with VISOR's default layers."""
    return Config(**PRESETS[model]).add_visor()


# --- config.json of each family -------------------------------------------------------------------------------------

MEND = "get the checkpoint's files again"
# Our names: theirs, and what a file that leaves it out means (the defaults of transformers)
QWEN2 = {"hidden": ("hidden_size", 4096), "layers": ("num_hidden_layers", 32), "heads": ("num_attention_heads", 32),
         "kv_heads": ("num_key_value_heads", 32), "ffn": ("intermediate_size", 22016), "vocab": ("vocab_size", 151936),
         "rms_eps": ("rms_norm_eps", 1e-6), "tied": ("tie_word_embeddings", False)}
SIGLIP = {"vision_hidden": ("hidden_size", 768), "vision_ffn": ("intermediate_size", 3072),
          "vision_layers": ("num_hidden_layers", 12), "vision_heads": ("num_attention_heads", 12),
          "vision_eps": ("layer_norm_eps", 1e-6), "tile": ("image_size", 224), "patch": ("patch_size", 16)}


def read_config(directory):
    """The Config of a checkpoint directory (LLaVA-OneVision by llava-hf or lmms-lab, or our own). Raises ValueError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {directory} is no checkpoint directory")
    raw = read_json(path, mend=MEND)
    try:
        if raw.get("model_type") == "visor":
            known = {f.name for f in fields(Config)}
            if unknown := sorted(set(raw) - known - {"model_type"}):
                raise ValueError(f"settings {short(', '.join(unknown))} are unknown to this version")
            config = Config(**{k: v for k, v in raw.items() if k in known})
        elif raw.get("model_type") == "llava_onevision":
            config = _llava_hf(raw)
        elif "mm_vision_tower" in raw:
            config = _llava_original(raw)
        else:
            raise ValueError(f"model_type {short(raw.get('model_type'))} is no LLaVA-OneVision or VISOR checkpoint; "
                             "give one, or a SigLIP and a Qwen2 directory as SIGLIP+QWEN2")
        text = _part(raw, "text_config", needed=False)
        config.stop_ids = tuple(sorted({*config.stop_ids, *_stop_ids(raw, "eos_token_id"),
                                        *_stop_ids(text, "text_config.eos_token_id")}))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return _with_generation_config(config, directory)


def join_configs(vision_directory, llm_directory):
    """The Config of a SigLIP and a Qwen2 directory put together, with SigLIP's last layer left out as LLaVA does."""
    parts = {}
    for directory, kinds, read in ((vision_directory, ("siglip", "siglip_vision_model"), _siglip_directory),
                                   (llm_directory, ("qwen2",), _qwen2)):
        path = Path(directory) / "config.json"
        raw = read_json(path, mend=MEND)
        try:
            if raw.get("model_type") not in kinds:
                raise ValueError(f"model_type {short(raw.get('model_type'))}, but {kinds[0]} is needed")
            parts |= read(raw)
            stop_ids = _stop_ids(raw, "eos_token_id")
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
    try:
        config = Config(**parts, stop_ids=stop_ids, stage="pretrained")
    except ValueError as e:
        raise ValueError(f"config.json of {vision_directory} and {llm_directory}: {e}") from None
    return _with_generation_config(config, llm_directory)


def _with_generation_config(config, directory):
    """The Config with the stop tokens that generation_config.json adds."""
    path = Path(directory) / "generation_config.json"
    if path.is_file():
        try:
            more = _stop_ids(read_json(path, mend=MEND), "eos_token_id")
        except ValueError as e:
            raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from None
        config.stop_ids = tuple(sorted({*config.stop_ids, *more}))
    return config


def _stop_ids(raw, said):
    """The tokens that a file says end an answer: none, one, or a list."""
    found = raw.get("eos_token_id")
    return numbers(said, found if isinstance(found, list) else [] if found is None else [found], TOKENS)


def _part(raw, name, needed=True):
    """An object inside a config.json."""
    part = raw.get(name)
    if part is None and not needed:
        return {}
    if not isinstance(part, dict):
        raise ValueError(f"{name} is missing" if part is None else f"{name} {short(part)}: must be an object")
    return part


def _given(raw, name):
    """What an object inside a config.json says, without what it leaves open."""
    return {k: v for k, v in _part(raw, name, needed=False).items() if v is not None}


def _expect(raw, name, value, where=""):
    """Refuses a setting that we do not do; a file may leave it out."""
    if raw.get(name) not in (value, None):
        raise ValueError(f"{where}{name} {short(raw[name])} is not supported, only {json.dumps(value)}")


def _take(raw, names, where):
    """Settings by our names, checked."""
    return {ours: checked(ours, default if raw.get(theirs) is None else raw[theirs], where + theirs)
            for ours, (theirs, default) in names.items()}


def _refuse_quantised(*raws):
    for raw in raws:
        if name := next((k for k in ("quantization_config", "compression_config") if raw.get(k)), None):
            raise ValueError(f"{name}: quantised weights are not supported; get the checkpoint that they were made of")


def _qwen2(raw, where=""):
    """Our names for Qwen2's."""
    _refuse_quantised(raw)
    _expect(raw, "hidden_act", "silu", where)
    _expect(raw, "use_sliding_window", False, where)
    rope = {"rope_theta": 1e4 if raw.get("rope_theta") is None else raw["rope_theta"],
            **_given(raw, "rope_scaling"), **_given(raw, "rope_parameters")}
    for name, value in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0)):
        _expect(rope, name, value, where + "rope_parameters.")
    if any(x != "full_attention" for x in entries(where + "layer_types", raw.get("layer_types") or ())):
        raise ValueError(f"{where}layer_types: only full_attention is supported")
    found = _take(raw, QWEN2, where)
    head_dim = found["hidden"] // found["heads"] if raw.get("head_dim") is None else raw["head_dim"]
    return {**found, "head_dim": checked("head_dim", head_dim, where + "head_dim"),
            "rope_theta": checked("rope_theta", rope["rope_theta"], where + "rope_theta")}


def _siglip(raw, feature_layer, where=""):
    """Our names for SigLIP's. feature_layer -1: the output of the last layer; -2: of the one before."""
    if type(feature_layer) is not int or not -512 <= feature_layer < 0:
        raise ValueError(f"vision_feature_layer {short(feature_layer)} is not supported, only one negative number")
    _refuse_quantised(raw)
    _expect(raw, "hidden_act", "gelu_pytorch_tanh", where)
    _expect(raw, "num_channels", 3, where)
    found = _take(raw, SIGLIP, where)
    kept = found["vision_layers"] + 1 + feature_layer
    return {**found, "vision_layers": checked("vision_layers", kept, "layers up to vision_feature_layer")}


def _siglip_directory(raw):
    """Of a SigLIP with a text tower or without."""
    where = "vision_config." if "vision_config" in raw else ""
    return _siglip(_part(raw, "vision_config") if where else raw, feature_layer=-2, where=where)


def _anyres(name, aspect, pinpoints, tile):
    """max_tiles from "anyres_max_9" or "anyres"; grids in tiles from sizes in pixels, (width, height)."""
    match = re.fullmatch(r"anyres(?:_max_(\d{1,4}))?", aspect) if isinstance(aspect, str) else None
    if not match:
        raise ValueError(f"{name} {short(aspect)} is not supported, only anyres or anyres_max_N")
    sizes = [numbers("image_grid_pinpoints", p, range(1, 1 << 18)) for p in entries("image_grid_pinpoints", pinpoints)]
    if bad := [p for p in sizes if len(p) != 2 or p[0] % tile or p[1] % tile]:
        raise ValueError(f"image_grid_pinpoints {bad[0]}: must be multiples of the tile's {tile} pixels, two each")
    return dict(max_tiles=checked("max_tiles", int(match[1]), name) if match[1] else None,
                pinpoints=[(w // tile, h // tile) for w, h in sizes])


def _llava_hf(raw):
    text, vision = _part(raw, "text_config"), _part(raw, "vision_config")
    _refuse_quantised(raw)
    _expect(text, "model_type", "qwen2", "text_config.")
    _expect(vision, "model_type", "siglip_vision_model", "vision_config.")
    for name, value in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "full"),
                        ("multimodal_projector_bias", True), ("use_image_newline_parameter", True)):
        _expect(raw, name, value)
    layer = raw.get("vision_feature_layer")
    sizes = {**_qwen2(text, "text_config."), **_siglip(vision, -1 if layer is None else layer, "vision_config.")}
    ties = [c["tie_word_embeddings"] for c in (raw, text) if c.get("tie_word_embeddings") is not None]
    # Hub files of the 0.5B say both; the loader looks for a head as well
    sizes["tied"] = bool(ties) and all(checked("tied", x, "tie_word_embeddings") for x in ties)
    aspect, grids, tile = raw.get("vision_aspect_ratio"), raw.get("image_grid_pinpoints"), sizes["tile"]
    if grids is None:
        grids = [(a * tile, b * tile) for a, b in PINPOINTS]
    found = _anyres("vision_aspect_ratio", "anyres_max_9" if aspect is None else aspect, grids, tile)
    found["pinpoints"] = [p[::-1] for p in found["pinpoints"]]  # Hugging Face has (height, width)
    return Config(**sizes, **found, unpad="hf", transparency="white", stage="pretrained")


def _llava_original(raw):
    tower = raw["mm_vision_tower"]
    if not isinstance(tower, str) or tower not in VISION_TOWERS:
        raise ValueError(f"mm_vision_tower {short(tower)} is unknown, only {', '.join(VISION_TOWERS)}")
    for name, value in (("mm_projector_type", "mlp2x_gelu"), ("mm_resampler_type", None),
                        ("mm_use_im_start_end", False), ("mm_vision_select_layer", -2),
                        ("mm_vision_select_feature", "patch"), ("mm_hidden_size", VISION_TOWERS[tower]["hidden_size"])):
        _expect(raw, name, value)
    for name, absent in (("mm_patch_merge_type", "flat"), ("image_aspect_ratio", "square")):  # as the original code
        raw = {**raw, name: raw.get(name) or absent}
    _expect(raw, "mm_patch_merge_type", "spatial_unpad")
    vision = _siglip(VISION_TOWERS[tower], feature_layer=-2)
    return Config(**_qwen2(raw), **vision, stage="pretrained", **_anyres(
        "image_aspect_ratio", raw["image_aspect_ratio"], raw.get("image_grid_pinpoints"), vision["tile"]))
