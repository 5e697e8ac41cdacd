"""What the experiments on the miniature have in common: their flags, how a trial is known again, what results stay."""
import json
import sys
import zlib

import torch

from cli import choose_dtype, placement
from paper.systems import about


def add_flags(p, out, runs=()):
    """The flags of an experiment whose trials are kept in `out`; runs: the names of what can be trained alone."""
    p.add_argument("--out", default=out, metavar="DIR", help=f"where the trials go (default: {out})")
    if runs:
        p.add_argument("--only", action="append", metavar="NAME", help=f"one alone, or several: {'; '.join(runs)}")
        p.add_argument("--report", action="store_true", help="train nothing, show what is there")
    p.add_argument("--seed", action="append", type=int, help="may be given several times (default: 0, 1, 2)")
    p.add_argument("--questions", type=int, default=1000, metavar="N", help="questions a task (default: 1000)")
    p.add_argument("--threads", type=int, default=1, help="processor threads (default: 1; better run two processes)")
    p.add_placement("float32")


def parse(p, argv, runs=()):
    """The namespace, checked: with device and dtype as torch has them, seeds, and `exam`, which names how an evaluation
    is made."""
    args = p.parse_args(argv)
    args.seeds = args.seed or [0, 1, 2]
    if args.questions < 1 or not 1 <= args.threads <= 1024 or min(args.seeds) < 0:
        p.error("--questions must be at least 1, --threads from 1 to 1,024, --seed at least 0")
    for name in args.only or () if runs else ():
        if name not in runs:
            p.error(f"--only {name!r}: give one of {'; '.join(runs)}")
    args.device = placement(args.device)
    args.dtype, _ = choose_dtype(args.dtype, args.device, 0)
    args.exam = f"{args.questions}{'' if args.dtype == torch.float32 else f'-{args.dtype}'}"
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    return args


def stamp(directory):
    """Eight digits that change with the weights in a checkpoint's directory."""
    return f"{zlib.crc32((directory / 'model.safetensors').read_bytes()):08x}"


def save(name, path, args, **results):
    """Writes results of paper.NAME with their conditions, unless those that are there are of more questions, seeds or
    rows. Returns whether it did."""
    results = {**about(name, ()), "seeds": args.seeds, "questions": args.questions, "dtype": str(args.dtype)[6:],
               **results}
    had = json.loads(path.read_text()) if path.is_file() else {}
    if getattr(args, "report", False):  # nothing was measured again
        results |= {key: had[key] for key in ("date", "machine", "torch") if key in had}
    lists = [name for name, value in results.items() if isinstance(value, list)]
    less = args.questions < had.get("questions", 0) or any(len(results[x]) < len(had.get(x, ())) for x in lists)
    if less:
        print(f"{path} is of more questions, seeds or rows, and stays as it is; remove it to write it anew",
              file=sys.stderr)
    else:
        path.write_text(json.dumps(results, indent=1) + "\n")
    return not less
