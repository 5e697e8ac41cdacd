"""The files of a checkpoint: where they are, and what each family calls the tensors in them.

Understood are LLaVA-OneVision as llava-hf and lmms-lab publish it, a SigLIP and a Qwen2 directory, and what
VLM.save_pretrained writes. Safetensors only, one file or shards with an index; nothing is ever unpickled.
"""
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

# Names in files -> our names: the first prefix that fits is replaced; None: left out on purpose. What fits none keeps
# its name, as our own checkpoints do.
NAMES = (
    # llava-hf on the hub, and what transformers writes
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
    # lmms-lab
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    # transformers' module names since 4.52
    ("model.language_model.", "language_model."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    # a Qwen2 and a SigLIP directory
    ("model.embed_tokens.", "language_model.embed_tokens."),
    ("model.layers.", "language_model.layers."),
    ("model.norm.", "language_model.norm."),
    ("vision_model.", "vision_tower."),
    ("text_model.", None),
    ("logit_scale", None),
    ("logit_bias", None),
)
UNUSED = re.compile(r"vision_tower\.(post_layernorm|head)\.|vision_tower\.embeddings\.position_ids|.*rotary_emb\.")


def our_name(key, config):
    """Our name of a tensor in a file, or None if we leave it out."""
    for prefix, ours in NAMES:
        if key.startswith(prefix):
            key = ours and ours + key[len(prefix):]
            break
    if key is None or UNUSED.match(key):
        return None
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", key)
    return None if layer and int(layer[1]) >= config.vision_layers else key  # SigLIP's last layer is not used


def find(name):
    """The directory of a checkpoint. Of a hub id, what is needed is downloaded, or taken from the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise ValueError(f"{name}: no such directory; give a checkpoint directory or a hub id such as "
                         "llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    from huggingface_hub import snapshot_download  # half a second to import, and only hub ids need it
    try:
        small = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
        directory = snapshot_download(name, allow_patterns=small)
        return Path(snapshot_download(name, allow_patterns=[f.name for f in weight_files(directory)]))
    except Exception as e:  # the hub's own errors, the network's, and those of a proxy between
        raise ValueError(f"{name}: neither a directory here nor to be had from the hub "
                         f"({str(e).strip().splitlines()[0]})") from None


def weight_files(directory):
    """The safetensors files of a checkpoint: those that its index names, else the single one."""
    index = Path(directory) / "model.safetensors.index.json"
    if not index.is_file():
        return [Path(directory) / "model.safetensors"]
    try:
        return [Path(directory) / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is broken; download it again") from None


def scan(directories, config):
    """What the weight files hold, by our names: ({name: (file, key)}, names that came twice)."""
    files, twice = {}, []
    for file in (f for d in directories for f in weight_files(d)):
        with open_weights(file) as f:
            for key in f.keys():
                name = our_name(key, config)
                if name in files:
                    twice.append(key)
                elif name:
                    files[name] = file, key
    return files, twice


def open_weights(file):
    """safe_open that reads instead of mapping the file (a map would count as memory), with errors in one line."""
    if not Path(file).is_file():
        raise ValueError(f"{file} is missing; download it again")
    try:
        return safe_open(file, "pt", backend="pread")
    except SafetensorError as e:
        raise ValueError(f"{file}: truncated, or not a safetensors file ({e}); download it again") from None
