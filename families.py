"""What the small files of a checkpoint say in each family: LLaVA-OneVision by llava-hf and by lmms-lab, FastVLM by
Apple and by transformers, Qwen2-VL, SigLIP, Qwen2, our own.

Imports no torch, as flops.py reads them.
"""
import json
import math
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

from tokenizers import Tokenizer

from cli import read_json
from config import FASTVITHD, PINPOINTS, PIXELS, TOKENS, Config, checked, entries, numbers, short
from data import COLOURS, IMAGE

VISION_TOWERS = {  # original LLaVA files name their tower instead of describing it
    "google/siglip-so400m-patch14-384": dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                                             num_attention_heads=16, image_size=384, patch_size=14)}
MEND = "get the checkpoint's files again"
# Our names: theirs, and what a file that leaves it out means (the defaults of transformers)
QWEN2 = {"hidden": ("hidden_size", 4096), "layers": ("num_hidden_layers", 32), "heads": ("num_attention_heads", 32),
         "kv_heads": ("num_key_value_heads", 32), "ffn": ("intermediate_size", 22016), "vocab": ("vocab_size", 151936),
         "rms_eps": ("rms_norm_eps", 1e-6), "tied": ("tie_word_embeddings", False)}
SIGLIP = {"vision_hidden": ("hidden_size", 768), "vision_ffn": ("intermediate_size", 3072),
          "vision_layers": ("num_hidden_layers", 12), "vision_heads": ("num_attention_heads", 12),
          "vision_eps": ("layer_norm_eps", 1e-6), "tile": ("image_size", 224), "patch": ("patch_size", 16)}
QWEN2_VL = {"vision_hidden": ("embed_dim", 1280), "vision_layers": ("depth", 32), "vision_heads": ("num_heads", 16),
            "patch": ("patch_size", 14)}
# What data.py does with pixels, beside the encoder's colours; and what generation does not do, with the value that
# asks for nothing
PREPROCESSING = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}
JOINED = {"merge_size": 2, "temporal_patch_size": 2}  # Qwen2-VL
NOT_FOLLOWED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
                "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [], "sequence_bias": {}}


def read_config(directory):
    """The Config of a checkpoint directory of any family, or of our own. Raises ValueError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {directory} is no checkpoint directory")
    raw = read_json(path, mend=MEND)
    try:
        if raw.get("model_type") == "visor":
            known = {f.name for f in fields(Config)} - {"overview"}
            if unknown := sorted(set(raw) - known - {"model_type"}):
                raise ValueError(f"settings {short(', '.join(unknown))} are unknown to this version")
            config = Config(**{**{k: v for k, v in raw.items() if k in known}, **_plans(raw.get("viable", ()))})
        elif isinstance(kind := raw.get("model_type"), str) and kind in FAMILIES:
            config = FAMILIES[kind](raw)
        elif "mm_vision_tower" in raw:
            config = _llava_original(raw)
        else:
            raise ValueError(f"model_type {short(raw.get('model_type'))} is no LLaVA-OneVision, FastVLM, Qwen2-VL or "
                             "VISOR checkpoint; give one, or a SigLIP and a Qwen2 directory as SIGLIP+QWEN2")
        text = _part(raw, "text_config", needed=False)
        config.stop_ids = tuple(sorted({*config.stop_ids, *_stop_ids(raw, "eos_token_id"),
                                        *_stop_ids(text, "text_config.eos_token_id")}))
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return _with_other_files(config, directory, needed=raw.get("model_type") == "qwen2_vl")


def _plans(value):
    """Config's settings for a list of plans, {"sa": layers, "pixels": "all" or "overview"}."""
    found = {pixels: [] for pixels in PIXELS}
    for plan in entries("viable", value):
        if not isinstance(plan, dict) or set(plan) != {"sa", "pixels"} or plan["pixels"] not in PIXELS:
            raise ValueError(f'viable {short(plan)}: must be a plan such as {{"sa": [1, 4], "pixels": "all"}}')
        found[plan["pixels"]].append(plan["sa"])
    return {"viable": found["all"], "overview": found["overview"]}


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
    return _with_other_files(config, llm_directory)


def _with_other_files(config, directory, needed=False):
    """The Config with what generation_config.json and preprocessor_config.json say; needed: the latter must be there.
    Raises ValueError."""
    for name in ("generation_config.json", "preprocessor_config.json"):
        path = Path(directory) / name
        if not path.is_file():
            if name.startswith("pre") and needed:
                raise ValueError(f"{path} is missing, which says how large pictures may be; get it from the "
                                 "checkpoint's page")
            continue
        raw = read_json(path, mend=MEND)
        try:
            if name.startswith("pre"):
                config = _preprocessed(config, raw)
                continue
            config.stop_ids = tuple(sorted({*config.stop_ids, *_stop_ids(raw, "eos_token_id")}))
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None
        if other := [key for key, neutral in NOT_FOLLOWED.items() if raw.get(key) not in (neutral, None)]:
            print(f"{path}: {', '.join(other)} not followed", file=sys.stderr)
    return config


def _preprocessed(config, raw):
    """The Config with what a preprocessor_config.json says."""
    mean, std, _ = COLOURS[config.encoder]
    for key, value in {**PREPROCESSING, "image_mean": mean, "image_std": std}.items():
        _expect(raw, key, value)
    if config.aspect != "dynamic":
        for key in ("size", "crop_size"):
            if any(n != config.tile for n in _given(raw, key).values()):
                raise ValueError(f"{key} {short(raw[key])}: must be the tile's {config.tile} pixels")
        return config
    for key, value in {**JOINED, "patch_size": config.patch}.items():
        _expect(raw, key, value)
    sizes, found = _given(raw, "size"), {}
    for name, other in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = sizes.get(other) if raw.get(name) is None else raw[name]
        if value is None:
            raise ValueError(f"{name} is missing, which says how large pictures may be")
        found[name] = checked(name, value)
    return replace(config, **found)


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


def _qwen2(raw, where="", rope_types=("default",)):
    """Our names for Qwen2's. rope_types: kinds of rotary positions that the caller knows."""
    _refuse_quantised(raw)
    _expect(raw, "hidden_act", "silu", where)
    _expect(raw, "use_sliding_window", False, where)
    rope = {"rope_theta": 1e4 if raw.get("rope_theta") is None else raw["rope_theta"],
            **_given(raw, "rope_scaling"), **_given(raw, "rope_parameters")}
    _expect(rope, "partial_rotary_factor", 1.0, where + "rope_parameters.")
    for name in ("rope_type", "type"):
        if rope.get(name, "default") not in rope_types:
            raise ValueError(f"{where}rope_parameters.{name} {short(rope[name])} is not supported, only "
                             f"{' or '.join(rope_types)}")
    if any(x != "full_attention" for x in entries(where + "layer_types", raw.get("layer_types") or ())):
        raise ValueError(f"{where}layer_types: only full_attention is supported")
    found = _take(raw, QWEN2, where)
    if "mrope" in rope_types:
        found["mrope"] = numbers(where + "rope_parameters.mrope_section", rope.get("mrope_section"), range(1, 513))
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


def _fastvlm_hf(raw):
    text, vision = _part(raw, "text_config"), _part(raw, "vision_config")
    _refuse_quantised(raw)
    _expect(text, "model_type", "qwen2", "text_config.")
    for name, value in (("model_type", "timm_wrapper"), ("architecture", "fastvit_mci3"), ("hidden_size", 3072)):
        _expect(vision, name, value, "vision_config.")
    for name, value in (("projector_hidden_act", "gelu"), ("vision_feature_select_strategy", "full"),
                        ("vision_feature_layer", -1), ("multimodal_projector_bias", True)):
        _expect(raw, name, value)
    tokens = 576 if raw.get("image_seq_length") is None else raw["image_seq_length"]
    if type(tokens) is not int or not 0 < tokens <= 4096 or math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"image_seq_length {short(tokens)}: must be a square, the tokens of a picture")
    return Config(**_qwen2(text, "text_config."), **FASTVITHD, tile=64 * math.isqrt(tokens), aspect="pad",
                  multi_image_newline=False, transparency="white", stage="pretrained")


def _qwen2_vl(raw):
    """Of the hub, where the language model's settings stand by themselves, and of transformers, under text_config."""
    vision, where = _part(raw, "vision_config"), "text_config." if "text_config" in raw else ""
    text = _part(raw, "text_config") if where else raw
    _refuse_quantised(raw, vision)
    for name, value in (("hidden_act", "quick_gelu"), ("in_channels", 3), ("in_chans", 3), ("spatial_patch_size", 14),
                        ("spatial_merge_size", 2), ("temporal_patch_size", 2)):
        _expect(vision, name, value, "vision_config.")
    found = {**_qwen2(text, where, ("default", "mrope")), **_take(vision, QWEN2_VL, "vision_config.")}
    _expect(vision, "hidden_size", found["hidden"], "vision_config.")
    ratio = 4 if vision.get("mlp_ratio") is None else vision["mlp_ratio"]
    if type(ratio) not in (int, float) or not 0 < ratio <= 64:
        raise ValueError(f"vision_config.mlp_ratio {short(ratio)}: must be a number from 0 to 64")
    ties = [checked("tied", c["tie_word_embeddings"], "tie_word_embeddings") for c in (raw, text)
            if c.get("tie_word_embeddings") is not None]
    return Config(**{**found, "tied": bool(ties) and all(ties)}, vision_ffn=int(found["vision_hidden"] * ratio),
                  encoder="qwen2_vl", aspect="dynamic", multi_image_newline=False, transparency="white",
                  stage="pretrained")


def _llava_original(raw):
    """LLaVA-OneVision by lmms-lab, and Apple's FastVLM, whose tower is named by its pixels."""
    tower = raw["mm_vision_tower"]
    if isinstance(tower, str) and (fast := re.fullmatch(r"mobileclip_l_([1-9]\d{1,3})", tower)):
        return _fastvlm_original(raw, int(fast[1]))
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


def _fastvlm_original(raw, tile):
    for name, value in (("mm_projector_type", "mlp2x_gelu"), ("mm_use_im_start_end", False), ("mm_hidden_size", 3072)):
        _expect(raw, name, value)
    aspect = raw.get("image_aspect_ratio")
    if aspect == "pad":
        _expect(raw, "mm_patch_merge_type", "flat")
        images = dict(aspect="pad", multi_image_newline=False)
    else:
        if raw.get("mm_patch_merge_type") != "spatial_unpad":
            raise ValueError(f"image_aspect_ratio {short(aspect)} with mm_patch_merge_type "
                             f"{short(raw.get('mm_patch_merge_type'))} is not supported, only pad with flat, and "
                             "anyres with spatial_unpad")
        images = _anyres("image_aspect_ratio", aspect, raw.get("image_grid_pinpoints"), tile)
    return Config(**_qwen2(raw), **FASTVITHD, tile=tile, **images, stage="pretrained")


FAMILIES = {"llava_onevision": _llava_hf, "fast_vlm": _fastvlm_hf, "qwen2_vl": _qwen2_vl}


# --- tokenizer.json -------------------------------------------------------------------------------------------------

def load_tokenizer(directory):
    """The Qwen2 tokenizer of a checkpoint directory. Raises ValueError."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it from the checkpoint's page, for "
                         "LLaVA-OneVision or from Qwen/Qwen2-0.5B-Instruct")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode("\0")  # fails without a token for what is unknown
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file ({' '.join(str(e).split())}); get the checkpoint's files "
                         "again") from None
    tokenizer.no_truncation()  # what a file says of batches for training would cut prompts, or fill them
    tokenizer.no_padding()
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: has no token {token}; use the tokenizer of a Qwen2 chat model")
    if tokenizer.token_to_id(IMAGE) is not None:  # llava-hf's; here such words are placeholders or plain text
        spec = json.loads(tokenizer.to_str())
        if not isinstance(spec["model"]["vocab"], dict):
            raise ValueError(f"{path}: {spec['model']['type']}, but Qwen2's tokenizer is BPE; use its own")
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in (IMAGE, "<video>")]
        spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in (IMAGE, "<video>")}
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


def vocabulary_size(tokenizer):
    """Rows that the embedding needs; files pad it to more (151936, 152000), with rows that were never trained."""
    return max(tokenizer.get_vocab().values()) + 1
