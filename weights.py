"""The files of a checkpoint: where they are, what each family calls the tensors in them, reading and writing them.

Understood are LLaVA-OneVision as llava-hf and lmms-lab publish it, a SigLIP and a Qwen2 directory, and what
VLM.save_pretrained writes. Safetensors only, one file or shards with an index; nothing is ever unpickled.
"""
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cli import atomic, choose_dtype, read_json
from config import short
from families import join_configs, load_tokenizer, read_config, vocabulary_size

# Names in files -> our names: the first prefix that fits is replaced; None: left out on purpose. What fits none keeps
# its name, as our own checkpoints do.
NAMES = (
    # llava-hf on the hub, and what transformers writes
    ("language_model.model.", "language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "vision_tower."),
    # FastVLM, by transformers and by Apple, who numbers the parts of stages through
    ("model.vision_tower.timm_model.", "vision_tower."),
    *((f"model.vision_tower.vision_tower.model.{theirs}.", f"vision_tower.{ours}.") for theirs, ours in (
        ("patch_embed", "stem"), ("network.0", "stages.0.blocks"), ("network.1", "stages.1.downsample"),
        ("network.2", "stages.1.blocks"), ("network.3", "stages.2.downsample"), ("network.4", "stages.2.blocks"),
        ("network.5", "stages.3.downsample"), ("network.6", "stages.3.pos_emb"), ("network.7", "stages.3.blocks"),
        ("network.8", "stages.4.downsample"), ("network.9", "stages.4.pos_emb"), ("network.10", "stages.4.blocks"),
        ("conv_exp", "final_conv"))),
    ("model.vision_tower.vision_tower.model.head.", None),  # CLIP's
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
    # Qwen2-VL on the hub, and transformers' module names
    *((f"{visual}{theirs}", ours) for visual in ("visual.", "model.visual.") for theirs, ours in (
        ("merger.ln_q.", "vision_tower.merger_norm."), ("merger.mlp.0.", "multi_modal_projector.linear_1."),
        ("merger.mlp.2.", "multi_modal_projector.linear_2."), ("", "vision_tower."))),
    ("text_model.", None),
    ("logit_scale", None),
    ("logit_bias", None),
)
INSIDE = (  # then, inside of names: Apple's, as patterns
    (r"\.lkb_reparam\.", ".reparam_conv."), (r"\.convffn\.", ".mlp."), (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."), (r"\.(layer_scale(_[12])?)$", r".\1.gamma"))
EMBEDDING = "language_model.embed_tokens.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
MEND = "get the checkpoint's files again"
UNUSED = re.compile(r"vision_tower\.(post_layernorm|head)\.|vision_tower\.embeddings\.position_ids|.*rotary_emb\."
                    r"|.*\.num_batches_tracked")


def joint_products(c):
    """Products of one input that are one matrix here: {our name: {name in files: rows}}."""
    wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return {"qkv_proj": {"q_proj": wide, "k_proj": narrow, "v_proj": narrow},
            "kv_proj": {"k_proj": narrow, "v_proj": narrow}, "gate_up_proj": {"gate_proj": c.ffn, "up_proj": c.ffn}}


def parts(name, c):
    """{name in files: rows} of one of our parameters; rows None: all of them."""
    head, _, leaf = name.rpartition(".")
    head, _, module = head.rpartition(".")
    found = joint_products(c).get(module)
    return {f"{head}.{part}.{leaf}": rows for part, rows in found.items()} if found else {name: None}


def as_in_files(tensors, c):
    """{our name: tensor} -> {name in files: its rows}."""
    found = {}
    for name, tensor in tensors.items():
        rows = parts(name, c)
        found |= dict(zip(rows, tensor.split([n or len(tensor) for n in rows.values()])))
    return found


def our_name(key, config):
    """Our name of a tensor in a file, or None if we leave it out."""
    for prefix, ours in NAMES:
        if key.startswith(prefix):
            key = ours and ours + key[len(prefix):]
            break
    if key is None or UNUSED.match(key):
        return None
    for pattern, ours in INSIDE:
        key = re.sub(pattern, ours, key)
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
        small = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json",
                 "model.safetensors.index.json"]
        directory = snapshot_download(name, allow_patterns=small)
        return Path(snapshot_download(name, allow_patterns=[f.name for f in weight_files(directory)]))
    except Exception as e:  # the hub's own errors, the network's, and those of a proxy between
        raise ValueError(f"{name}: neither a directory here nor to be had from the hub "
                         f"({str(e).strip().splitlines()[0]})") from None


def weight_files(directory):
    """The safetensors files of a checkpoint: the single one, else those that its index names. Raises ValueError."""
    directory = Path(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = read_json(index, mend=MEND).get("weight_map")
        names = set(names.values()) if isinstance(names, dict) and all(map(is_name, names.values())) else ()
        if not names:
            raise ValueError(f"{index}: weight_map is no object of tensors and file names; {MEND}")
        return [directory / name for name in sorted(names)]
    other = sorted(f.name for f in directory.glob("*") if f.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors"))
    if not other:  # of a hub id, what there is to download
        return [single]
    if any(name.startswith("adapter_") for name in other):
        raise ValueError(f"{directory} holds an adapter ({other[0]}): merge it into its model (peft's "
                         "merge_and_unload), save that, and give its directory")
    if any(name.endswith(".safetensors") for name in other):
        raise ValueError(f"{index} is missing, which says what {short(', '.join(other))} hold: get it from where they "
                         "came from")
    raise ValueError(f"{directory} has its weights as {other[0]}, not as safetensors: convert it, for instance by "
                     "loading it in transformers and save_pretrained")


def is_name(x):
    """Whether x is the name of a file beside, not a path to elsewhere."""
    return isinstance(x, str) and re.fullmatch(r"[\w.-]+", x) is not None and x.strip(".") != ""


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


@contextmanager
def open_weights(file):
    """safe_open that reads instead of mapping the file (a map would count as memory), with errors in one line."""
    if not Path(file).is_file():
        raise ValueError(f"{file} is missing; {MEND}")
    try:
        with safe_open(file, "pt", backend="pread") as f:
            yield f
    except SafetensorError as e:
        with open(file, "rb") as f:
            is_pointer = f.read(7) == b"version"
        raise ValueError(f"{file}: a pointer of Git LFS instead of the file; run git lfs pull" if is_pointer else
                         f"{file}: truncated, or not a safetensors file ({short(str(e))}); {MEND}") from None


def same_head(files, rows):
    """Whether the output head in the files is the embedding matrix, in its first `rows` rows."""
    with open_weights(files["lm_head.weight"][0]) as f, open_weights(files[EMBEDDING][0]) as g:
        head, embedding = f.get_slice(files["lm_head.weight"][1]), g.get_slice(files[EMBEDDING][1])
        if not (len(head.get_shape()) == len(embedding.get_shape()) == 2
                and min(head.get_shape()[0], embedding.get_shape()[0]) >= rows):
            return False
        parts = (slice(i, min(i + 8192, rows)) for i in range(0, rows, 8192))  # so that memory holds little of them
        return head.get_shape()[1:] == embedding.get_shape()[1:] and all(
            torch.equal(head[part], embedding[part]) for part in parts)


def load(kind, name, dtype, device):
    """A model of class `kind`; see VLM.from_pretrained."""
    sources = [name] if Path(name).is_dir() else str(name).split("+")
    if len(sources) > 2:
        raise ValueError(f"{name}: give one checkpoint, or two as SIGLIP+QWEN2")
    directories = [find(source) for source in sources]
    config = read_config(directories[0]) if len(sources) == 1 else join_configs(*directories)
    tokenizer = load_tokenizer(directories[-1])
    if (tokens := vocabulary_size(tokenizer)) > config.vocab:
        raise ValueError(f"{directories[-1]}/tokenizer.json has token ids up to {tokens - 1}, the model only "
                         f"{config.vocab} rows; get both from the same place")
    config.vocab = tokens  # rows beyond are padding
    if config.encoder == "qwen2_vl" and None in map(tokenizer.token_to_id, ("<|vision_start|>", "<|vision_end|>")):
        raise ValueError(f"{directories[-1]}/tokenizer.json has no <|vision_start|> and <|vision_end|>; use that of a "
                         "Qwen2-VL")
    files, unexpected = scan(directories, config)
    if "lm_head.weight" not in files:
        config.tied = True
    elif config.tied and EMBEDDING in files:  # as transformers: a head in the file that differs is meant
        config.tied = same_head(files, tokens)
        if config.tied:
            del files["lm_head.weight"]
    with torch.device("meta"):
        model = kind(config)
    fresh = check(model, files, unexpected, directories, len(sources) == 2)
    n = sum(p.numel() for p in model.parameters())
    dtype, why = choose_dtype(dtype, device, n)
    for target, p in stored(model).items():
        pieces = parts(target, config)
        found = [read(*files[name], rows or p.shape[0]) for name, rows in pieces.items() if name in files]
        if found:  # else its module is new
            owner, _, leaf = target.rpartition(".")
            tensor = (found[0] if len(found) == 1 else torch.cat(found)).to(device, dtype)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor) if isinstance(p, nn.Parameter) else tensor)
    for module in fresh:
        model.init_module(module, dtype, device)
    model.tokenizer = tokenizer
    notes = [f"{name}: {n / 1e6:,.1f} M parameters", f"{str(dtype)[6:]} on {device}{why and f' ({why})'}"]
    notes += ["head tied to the embedding"] * config.tied + [f"new: {', '.join(fresh)}"] * bool(fresh)
    notes += ["RANDOM weights: answers mean nothing"] * (config.stage == "random")
    print(", ".join(notes), file=sys.stderr)
    return model.eval()


def stored(model):
    """{name: tensor} of what a checkpoint holds: the parameters, and the statistics of FastViTHD's norms."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def read(file, key, rows):
    """The first rows of a tensor in a file, opened anew for each, so that memory holds one of them at a time."""
    with open_weights(file) as f:
        return f.get_slice(key)[:rows]


def check(model, files, unexpected, directories, joined):
    """Compares names and shapes before anything is read; returns the modules that may and will start fresh."""
    where, wanted = " + ".join(map(str, directories)), {}  # wanted: {name in files: shape}
    for target, p in stored(model).items():
        wanted |= {name: (rows or p.shape[0], *p.shape[1:]) for name, rows in parts(target, model.config).items()}
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
            shape, want = tuple(f.get_slice(key).get_shape()), wanted[name]
            if (kind := f.get_slice(key).get_dtype()) not in FLOATS:
                raise ValueError(f"{file}: {key} is {kind}: quantised weights are not supported, only "
                                 f"{', '.join(FLOATS)}; get the checkpoint that they were made of")
        rows = name in (EMBEDDING, "lm_head.weight")
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
        tensors = {k: v.detach() for k, v in {**stored(model), **(tensors or {})}.items()}
        write_tensors(as_in_files(tensors, model.config), beside / "model.safetensors")
        shutil.copymode(beside / "config.json", beside / "model.safetensors")  # safetensors makes it private
        if model.tokenizer is not None:
            (beside / "tokenizer.json").write_text(model.tokenizer.to_str(pretty=True))


def write_tensors(tensors, path):
    """A safetensors file. Raises OSError."""
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as e:
        raise OSError(str(e)) from None


def some(names, n=6):
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
