"""The checkpoints of a training run: a model as any other, with the optimisers' states and state.json for resuming.

out/ holds stageN-STEP directories, each renamed into place when it is whole, log.jsonl and bad.jsonl, and `lock`, which
the run that writes there holds.
"""
import fcntl
import json
import os
import re
import shutil
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cli import atomic, read_json, read_rows, remove_unfinished, writing
from config import checked, entries
from parallel import full_tensor
from weights import write_tensors

COUNT = range(1, 1 << 40)
# What a run's settings may be, on the command line and in state.json; as config.LIMITS
SETTINGS = {
    "stage": range(4), "step": COUNT, "steps": COUNT, "batch_size": range(1, 1 << 20),
    "micro_batch_size": range(1, 1 << 20), "lr": (1e-30, 1e30), "warmup": range(1 << 40), "decay_start": (0.0, 0.9999),
    "seed": range(1 << 63), "threads": range(1, 1025), "samples": COUNT, "max_tokens": COUNT, "workers": range(1025),
    "max_bad": (0.0, 1.0), "save_every": COUNT, "sample_every": range(1 << 40), "keep": COUNT,
    "label_rule": ["assistant", "llava"], "dtype": ["float32", "bfloat16"], "labels": ["task", "sample"],
    **dict.fromkeys(("compile", "fsdp", "checkpointing", "overfit", "joined"), [False, True]),
    # the miniature's
    "turns": range(1, 1001), "questions": range(1, 1 << 20), "auxiliary_weight": (0.0, 1e6),
    "draw_from": range(1 << 40), "restart": range(1 << 40), "largest_first": (0.0, 1.0), "label_smoothing": (0.0, 1.0),
}
STATES = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum"}}  # of a parameter, by kind of optimiser
MAY_BE_NONE = ("decay_start", "samples", "max_tokens")


def save(out, model, opts, state, keep=2, rank=0):
    """out/stageN-STEP: a checkpoint as any other, with the optimisers' states and state.json; renamed into place.
    All ranks call it, rank 0 writes. Returns its path. Raises ValueError where it cannot be written."""
    model.config.stage, model.config.step = str(state["stage"]), state["step"]
    target = out / f"stage{state['stage']}-{state['step']:06d}"
    if hasattr(model, "reshard"):  # under FSDP generating leaves copies in the dtype of the products
        model.reshard()
    gathered = [{}, {}]  # parameters, optimisers' states: every rank gathers them, rank 0 alone keeps them
    named = [(0, n, p.detach()) for n, p in model.named_parameters()]
    named += [(1, f"{kind}.{name}.{key}", x) for kind, (opt, names, _) in opts.items()
              for name, p in zip(names, opt.param_groups[0]["params"]) for key, x in opt.state[p].items()]
    for which, label, x in named:
        x = full_tensor(x)
        if not rank:
            gathered[which][label] = x.cpu()
    tensors, moments = gathered
    if rank or is_checkpoint(target):
        return target
    remove_unfinished(out)  # of a run that was killed here
    if os.path.lexists(target):  # something else of that name
        with writing(target):
            target.rename(target.with_name(f"{target.name}.{os.getpid()}.stray"))
    with atomic(target) as beside:
        model.save_pretrained(beside, tensors)
        write_tensors(moments, beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for old in checkpoints(out, [state["stage"]])[:-keep]:
        shutil.rmtree(old)
    return target


def restore(checkpoint, opts):
    """Puts the optimisers' tensors back, each rank its part. Raises ValueError."""
    from torch.distributed.tensor import distribute_tensor
    file = checkpoint / "optimizer.safetensors"
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as e:
        raise damaged(file, e) from None
    if not found or any(not x.isfinite().all() for x in found.values()):
        raise damaged(file, "numbers that are missing, or not finite")
    for label, x in found.items():
        kind, _, rest = label.partition(".")
        parameter, _, key = rest.rpartition(".")
        opt, names, _ = opts.get(kind, (None, (), None))
        p = opt.param_groups[0]["params"][names.index(parameter)] if parameter in names else None
        shape = () if key == "step" else getattr(p, "shape", None)
        if p is None or key not in STATES[kind] or x.shape != shape or x.dtype != torch.float32:
            raise damaged(file, f"it has {label}, which this run's optimisers have not; or another version wrote it")
        x = x.to(p.device)  # the step's counter too: fused kernels read it there
        if x.ndim and hasattr(p, "device_mesh"):
            x = distribute_tensor(x, p.device_mesh, p.placements)
        opt.state[p][key] = x
    for kind, (opt, names, _) in opts.items():
        for name, p in zip(names, opt.param_groups[0]["params"]):  # one that had no gradient yet has no state
            if p in opt.state and opt.state[p].keys() != STATES[kind]:
                raise damaged(file, f"{kind}.{name} lacks a part of its state")


def damaged(file, why):
    """The error for a file of a checkpoint that cannot be gone on from."""
    return ValueError(f"{file}: damaged ({' '.join(str(why).split())}); remove {file.parent} to go on from the "
                      "checkpoint before it, or name another --out")


def read_state(checkpoint):
    """The settings of a run at a checkpoint. Raises ValueError."""
    file = checkpoint / "state.json"
    state = read_json(file, mend=f"remove {checkpoint} to go on from the checkpoint before it")
    try:
        for name, value in state.items():
            if name == "leave_out":
                entries(name, value)
            elif name not in SETTINGS:
                raise ValueError(f"setting {name} is unknown to this version")
            elif value is not None or name not in MAY_BE_NONE:
                checked(name, value, limits=SETTINGS)
        if f"stage{state.get('stage')}-{state.get('step', 0):06d}" != checkpoint.name:
            raise ValueError("stage and step are not those of the directory's name")
        if state["step"] > state.get("steps", 0):
            raise ValueError("step is more than steps")
        return state
    except ValueError as e:
        raise damaged(file, e) from None


def is_checkpoint(path):
    """Whether a path is what `save` has written, and not something of a like name."""
    return re.fullmatch(r"stage[0-3]-\d{6,}", path.name) is not None and (path / "state.json").is_file()


def checkpoints(out, stages):
    """The checkpoint directories of some stages, the newest of the latest stage last."""
    found = [p for p in out.glob("stage?-*") if is_checkpoint(p) and int(p.name[5]) in stages]
    return sorted(found, key=lambda p: (p.name[5], int(p.name[7:])))


def newest(out, stages):
    """The newest checkpoint directory of the latest of these stages that has one; None without."""
    return (checkpoints(out, stages) or [None])[-1]


def drop_rows_after(file, stage, step, **types):
    """Drops what a run wrote into a .jsonl file after the checkpoint from which it goes on, and what is damaged."""
    if file.is_file():
        kept = [line for line, row in read_rows(file, stage=int, step=int, **types)
                if row["stage"] != stage or row["step"] <= step]
        with atomic(file) as beside:
            beside.write_text("".join(kept))


@contextmanager
def locked(out):
    """Holds out/lock while a run writes there; the system frees it when the process ends, however that comes about.
    Raises ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a directory")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a process's own: what it forks does not hold it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(f"--out {out} is being written to by process {file.read(20).strip()}: wait for it, or "
                             "name another --out") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
