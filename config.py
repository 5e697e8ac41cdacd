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

PAD = 1 << 30  # positions from here on belong to padding; every real token stands before it
PINPOINTS = tuple((w, h) for w in range(1, 7) for h in range(1, 7))  # LLaVA-OneVision's 36 tile grids, in tiles
VISION_TOWERS = {  # original LLaVA files name their tower instead of describing it
    "google/siglip-so400m-patch14-384": dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                                             num_attention_heads=16, image_size=384, patch_size=14)}
PAPER_SA = (1, 4, 7, 10, 13, 16, 19, 22)
PAPER_VIABLE = (  # appendix A, for 24 layers; 13 is a candidate that none of them uses
    (1, 4), (1, 7), (1, 4, 7), (1, 4, 16), (1, 7, 16), (1, 10, 16), (1, 4, 7, 16), (1, 4, 7, 22), (1, 4, 10, 16),
    (1, 4, 7, 10, 16), (1, 4, 7, 16, 22), (1, 4, 7, 10, 16, 22), (1, 4, 7, 10, 16, 19, 22))


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
        """JSON has lists; ours are tuples, so that configurations can be compared and used as keys."""
        for name in ("pinpoints", "viable"):
            setattr(self, name, tuple(tuple(x) for x in getattr(self, name)))
        self.ca, self.sa = tuple(self.ca), tuple(self.sa)
        for f in fields(self):
            x = getattr(self, f.name)
            if f.type is int and f.name != "step" and not (isinstance(x, int) and x >= 1):
                raise ValueError(f"{f.name} {x!r}: a positive whole number is needed")
        for whole, part in (("heads", "kv_heads"), ("vision_hidden", "vision_heads"), ("tile", "patch")):
            a, b = getattr(self, whole), getattr(self, part)
            if a < b or (whole != "tile" and a % b):
                raise ValueError(f"{whole} {a} does not go with {part} {b}")
        if self.unpad not in ("original", "hf") or not self.pack >= 1:
            raise ValueError(f"unpad {self.unpad!r} must be original or hf, pack {self.pack!r} at least 1")
        if self.transparency not in ("drop", "white"):
            raise ValueError(f"transparency {self.transparency!r} must be drop or white")
        if not self.pinpoints or not all(len(p) == 2 and min(p) >= 1 for p in self.pinpoints):
            raise ValueError("pinpoints: a list of at least one (columns, rows) is needed")
        self._check_layers(self.ca, self.sa, self.viable)
        if self.router and self.route_layer is None:
            raise ValueError("a router needs at least two viable configurations to choose from")

    def _check_layers(self, ca, sa, viable):
        for l in (*ca, *sa):
            if not 0 <= l < self.layers:
                raise ValueError(f"there is no layer {l}; this model has layers 0 to {self.layers - 1}")
        for v in viable:
            if not set(v) <= set(sa):
                raise ValueError(f"viable configuration {v} has layers that are not among the candidates {sa}")

    def to_json(self):
        return json.dumps({"model_type": "visor", **asdict(self)}, indent=1)

    def visor_layers(self, ca=None, sa=None, viable=None):
        """(ca, sa, viable) with defaults for what is None: a third of the layers each, stride 3 (paper 4.2.3, 5.1).

        Each cross-attention stands one layer after a candidate, so that it reads what that one refined. For 24 layers
        the viable configurations are the paper's (appendix A); otherwise every prefix of sa, from none to all.
        """
        n = self.layers // 3
        sa = tuple(range(1, self.layers, 3))[:n] if sa is None else tuple(sorted(sa))
        ca = tuple(range(2, self.layers, 3))[:n] if ca is None else tuple(sorted(ca))
        if viable is None:
            viable = PAPER_VIABLE if self.layers == 24 and sa == PAPER_SA else [sa[:i] for i in range(len(sa) + 1)]
        viable = tuple(tuple(sorted(v)) for v in viable)
        self._check_layers(ca, sa, viable)
        return ca, sa, viable

    def configuration(self, text):
        """The self-attention layers that `text` asks for: "dense", "none" or "1,4,7". Returns an ascending tuple."""
        if text in ("dense", "none"):
            return tuple(range(self.layers)) if text == "dense" else ()
        if not re.fullmatch(r"\d+(,\d+)*", text):
            raise ValueError(f"--sa {text}: give dense, none, or layer numbers such as 1,4,7")
        sa = tuple(sorted({int(x) for x in text.split(",")}))
        if sa[-1] >= self.layers:
            raise ValueError(f"--sa {text}: there is no layer {sa[-1]}; this model has layers 0 to {self.layers - 1}")
        return sa


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
    c = Config(**PRESETS[model])
    c.ca, c.sa, c.viable = c.visor_layers()
    return c


def read_config(directory):
    """The Config of a checkpoint directory (LLaVA-OneVision by llava-hf or lmms-lab, or our own). Raises ValueError."""
    raw = _read_json(directory)
    try:
        if raw.get("model_type") == "visor":
            known = {f.name for f in fields(Config)}
            if unknown := sorted(set(raw) - known - {"model_type"}):
                raise ValueError(f"settings {', '.join(unknown)} are unknown to this version")
            return Config(**{k: v for k, v in raw.items() if k in known})
        if raw.get("model_type") == "llava_onevision":
            return _llava_hf(raw)
        if "mm_vision_tower" in raw:
            return _llava_original(raw)
        raise ValueError(f"model_type {raw.get('model_type')!r} is no LLaVA-OneVision or VISOR checkpoint; "
                         "give one, or a SigLIP and a Qwen2 directory as SIGLIP+QWEN2")
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
        what = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else e
        raise ValueError(f"{Path(directory) / 'config.json'}: {what}") from None


def join_configs(vision_directory, llm_directory):
    """The Config of a SigLIP and a Qwen2 directory put together, with SigLIP's last layer left out as LLaVA does."""
    vision, llm = _read_json(vision_directory), _read_json(llm_directory)
    if llm.get("model_type") != "qwen2":
        raise ValueError(f"{llm_directory}/config.json: model_type {llm.get('model_type')!r}, but qwen2 is needed")
    if vision.get("model_type") not in ("siglip", "siglip_vision_model"):
        raise ValueError(f"{vision_directory}/config.json: model_type {vision.get('model_type')!r}, but siglip is "
                         "needed")
    return Config(**_qwen2(llm), **_siglip(vision.get("vision_config", vision), feature_layer=-2), stage="pretrained")


def _read_json(directory):
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {directory} is no checkpoint directory")
    try:
        raw = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; download it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return raw


def _expect(raw, name, value):
    if raw.get(name, value) not in (value, None):
        raise ValueError(f"{name} {raw[name]!r} is not supported, only {value!r}")


def _qwen2(raw):
    """Our names for Qwen2's. What a file leaves out has the default of transformers' Qwen2Config."""
    _expect(raw, "hidden_act", "silu")
    _expect(raw, "use_sliding_window", False)
    rope = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta", 1e4), **(raw.get("rope_scaling") or {})}
    _expect({"rope_type": rope.get("rope_type", rope.get("type"))}, "rope_type", "default")
    hidden, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    return dict(hidden=hidden, layers=raw.get("num_hidden_layers", 32), heads=heads,
                kv_heads=raw.get("num_key_value_heads", 32), head_dim=raw.get("head_dim") or hidden // heads,
                ffn=raw.get("intermediate_size", 22016), vocab=raw.get("vocab_size", 151936),
                rope_theta=rope["rope_theta"], rms_eps=raw.get("rms_norm_eps", 1e-6),
                tied=raw.get("tie_word_embeddings", False))


def _siglip(raw, feature_layer):
    """Our names for SigLIP's. feature_layer -1: the output of the last layer; -2: of the one before."""
    if not isinstance(feature_layer, int) or feature_layer >= 0:
        raise ValueError(f"vision_feature_layer {feature_layer!r} is not supported, only one negative number")
    _expect(raw, "hidden_act", "gelu_pytorch_tanh")
    return dict(vision_hidden=raw.get("hidden_size", 768), vision_ffn=raw.get("intermediate_size", 3072),
                vision_layers=raw.get("num_hidden_layers", 12) + 1 + feature_layer,
                vision_heads=raw.get("num_attention_heads", 12), vision_eps=raw.get("layer_norm_eps", 1e-6),
                tile=raw.get("image_size", 224), patch=raw.get("patch_size", 16))


def _anyres(aspect, pinpoints, tile):
    """max_tiles from "anyres_max_9" or "anyres"; grids in tiles from sizes in pixels."""
    match = re.fullmatch(r"anyres(?:_max_(\d+))?", aspect)
    if not match:
        raise ValueError(f"image aspect ratio {aspect!r} is not supported, only anyres or anyres_max_N")
    return dict(max_tiles=int(match[1]) if match[1] else None,
                pinpoints=tuple((w // tile, h // tile) for w, h in pinpoints))


def _llava_hf(raw):
    text, vision = raw["text_config"], raw["vision_config"]
    _expect(text, "model_type", "qwen2")
    _expect(vision, "model_type", "siglip_vision_model")
    _expect(raw, "projector_hidden_act", "gelu")
    _expect(raw, "vision_feature_select_strategy", "full")
    sizes = {**_qwen2(text), **_siglip(vision, raw.get("vision_feature_layer", -1))}
    tile = sizes["tile"]
    pinpoints = raw.get("image_grid_pinpoints") or [(w * tile, h * tile) for w, h in PINPOINTS]
    ties = [c["tie_word_embeddings"] for c in (raw, text) if "tie_word_embeddings" in c]
    sizes["tied"] = bool(ties) and all(ties)  # hub files of the 0.5B say both; the loader looks for a head as well
    grids = _anyres(raw.get("vision_aspect_ratio", "anyres_max_9"), [p[::-1] for p in pinpoints], tile)
    return Config(**sizes, **grids, unpad="hf", transparency="white", stage="pretrained")


def _llava_original(raw):
    tower = raw["mm_vision_tower"]
    if tower not in VISION_TOWERS:
        raise ValueError(f"mm_vision_tower {tower!r} is unknown, only {', '.join(VISION_TOWERS)}")
    _expect(raw, "mm_projector_type", "mlp2x_gelu")
    _expect(raw, "mm_patch_merge_type", "spatial_unpad")
    vision = _siglip(VISION_TOWERS[tower], feature_layer=-2)
    return Config(**_qwen2(raw), **vision, stage="pretrained",
                  **_anyres(raw.get("image_aspect_ratio", "anyres_max_9"), raw["image_grid_pinpoints"], vision["tile"]))
