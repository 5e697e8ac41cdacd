"""The files of a checkpoint: where they are, what each family calls the tensors in them, reading and writing them.

Understood are LLaVA-OneVision as llava-hf and lmms-lab publish it, a SigLIP and a Qwen2 directory, and what
VLM.save_pretrained writes. Safetensors only, one file or shards with an index; nothing is ever unpickled.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cli import atomic
from config import join_configs, read_config
from data import load_tokenizer, vocabulary_size

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


def load(kind, name, dtype, device):
    """A model of class `kind`; see VLM.from_pretrained."""
    parts = [name] if Path(name).is_dir() else str(name).split("+")
    if len(parts) > 2:
        raise ValueError(f"{name}: give one checkpoint, or two as SIGLIP+QWEN2")
    directories = [find(part) for part in parts]
    config = read_config(directories[0]) if len(parts) == 1 else join_configs(*directories)
    tokenizer = load_tokenizer(directories[-1])
    if (tokens := vocabulary_size(tokenizer)) > config.vocab:
        raise ValueError(f"{directories[-1]}/tokenizer.json has {tokens} tokens, the model only {config.vocab}; "
                         "get both from the same place")
    config.vocab = tokens  # rows beyond are padding
    files, unexpected = scan(directories, config)
    config.tied = config.tied or "lm_head.weight" not in files
    if config.tied:
        files.pop("lm_head.weight", None)
    with torch.device("meta"):
        model = kind(config)
    fresh = check(model, files, unexpected, directories, len(parts) == 2)
    for target, (file, key) in files.items():
        shape = model.get_parameter(target).shape
        with open_weights(file) as f:  # opened anew for each tensor, so that memory holds one of them at a time
            tensor = f.get_slice(key)[:shape[0]] if shape else f.get_tensor(key)
        owner, _, leaf = target.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, dtype)))
    for module in fresh:
        model.init_module(module, dtype, device)
    model.tokenizer = tokenizer
    n = sum(p.numel() for p in model.parameters())
    notes = [f"{name}: {n / 1e6:,.1f} M parameters", f"{str(dtype)[6:]} on {device}"]
    notes += ["head tied to the embedding"] * config.tied + [f"new: {', '.join(fresh)}"] * bool(fresh)
    notes += ["RANDOM weights: answers mean nothing"] * (config.stage == "random")
    print(", ".join(notes), file=sys.stderr)
    return model.eval()


def check(model, files, unexpected, directories, joined):
    """Compares names and shapes before anything is read; returns the modules that may and will start fresh."""
    where, wanted = " + ".join(map(str, directories)), dict(model.named_parameters())
    missing, unexpected = sorted(set(wanted) - set(files)), sorted([*unexpected, *(set(files) - set(wanted))])
    may_be_new = r"language_model\.cross\.\d+|router" + (r"|multi_modal_projector|image_newline" if joined else "")
    fresh = {m[0] for name in missing if (m := re.match(may_be_new, name))}
    fresh = sorted(part for part in fresh if not any(name.startswith(part + ".") for name in files))  # whole parts
    missing = [name for name in missing if not ((m := re.match(may_be_new, name)) and m[0] in fresh)]
    if missing or unexpected:
        raise ValueError(f"{where}: the tensors are not those that config.json describes;"
                         + (f" missing: {some(missing)}" if missing else "")
                         + (f" unexpected: {some(unexpected)}" if unexpected else "") + "; get config.json and "
                         "weights from the same place")
    for name, (file, key) in files.items():
        with open_weights(file) as f:
            shape, want = tuple(f.get_slice(key).get_shape()), tuple(wanted[name].shape)
        rows = name in ("language_model.embed_tokens.weight", "lm_head.weight")
        if shape != want and not (rows and shape[1:] == want[1:] and shape[0] > want[0]):
            raise ValueError(f"{file}: {key} has shape {shape}, config.json asks for {want}; get both from the "
                             "same place")
    return fresh


def write(model, directory, tensors):
    """See VLM.save_pretrained."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with atomic(directory) as beside:
        beside.mkdir()
        (beside / "config.json").write_text(model.config.to_json())
        tensors = tensors or {k: v.detach() for k, v in model.named_parameters()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, beside / "model.safetensors",
                  metadata={"format": "pt"})
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors makes it private
        if model.tokenizer is not None:
            model.tokenizer.save(str(beside / "tokenizer.json"))
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)  # or older shards would win at loading


def some(names, n=6):
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
