"""The checkpoints of a training run: a model as any other, with the optimisers' states and state.json for resuming.

out/ holds stageN-STEP directories, each renamed into place when it is whole, log.jsonl and bad.jsonl.
"""
import json
import shutil

from safetensors.torch import load_file, save_file

from cli import atomic, remove_unfinished
from parallel import full_tensor


def save(out, model, opts, state, keep=2, rank=0):
    """out/stageN-STEP: a checkpoint as any other, with the optimisers' states and state.json; renamed into place.
    All ranks call it, rank 0 writes. Returns its path."""
    model.config.stage, model.config.step = str(state["stage"]), state["step"]
    target = out / f"stage{state['stage']}-{state['step']:06d}"
    gathered = [{}, {}]  # parameters, optimisers' states: every rank gathers them, rank 0 alone keeps them
    named = [(0, n, p.detach()) for n, p in model.named_parameters()]
    named += [(1, f"{kind}.{name}.{key}", x) for kind, (opt, names, _) in opts.items()
              for name, p in zip(names, opt.param_groups[0]["params"]) for key, x in opt.state[p].items()]
    for which, label, x in named:
        x = full_tensor(x)
        if not rank:
            gathered[which][label] = x.cpu()
    tensors, moments = gathered
    if rank or target.exists():
        return target
    remove_unfinished(out)  # of a run that was killed here
    with atomic(target) as beside:
        model.save_pretrained(beside, tensors)
        save_file(moments, beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for old in sorted(out.glob(f"stage{state['stage']}-??????"))[:-keep]:
        shutil.rmtree(old)
    return target


def restore(checkpoint, opts):
    """Puts the optimisers' tensors back, each rank its part."""
    from torch.distributed.tensor import distribute_tensor
    for label, x in load_file(checkpoint / "optimizer.safetensors").items():
        kind, _, rest = label.partition(".")
        parameter, _, key = rest.rpartition(".")
        opt, names, _ = opts[kind]
        p = opt.param_groups[0]["params"][names.index(parameter)]
        if x.ndim:  # a step counter stays where it is
            x = x.to(p.device)
            x = distribute_tensor(x, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else x
        opt.state[p][key] = x


def newest(out, stages):
    """The newest checkpoint directory of the latest of these stages that has one; None without."""
    found = [p for stage in sorted(stages) for p in sorted(out.glob(f"stage{stage}-??????"))]
    return found[-1] if found else None


def drop_rows_after(file, stage, step):
    """Drops what a run wrote into a .jsonl file after the checkpoint from which it goes on."""
    if not file.exists():
        return
    kept = []
    for line in open(file):
        if line.endswith("\n"):  # else the run was killed within it
            row = json.loads(line)
            if row.get("stage", stage) != stage or row["step"] <= step:
                kept.append(line)
    with atomic(file) as beside:
        beside.write_text("".join(kept))
