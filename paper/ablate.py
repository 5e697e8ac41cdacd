"""The paper's Tables 3 and 4 on the miniature: how many self-attention layers; one universal model, or many.

    python -m paper.ablate               every run of three seeds that is not in out/ablate yet, then the tables
    python -m paper.ablate --only "none alone" --seed 1   these alone; two processes can share the work
    python -m paper.ablate --report      the tables of what is there, and paper/results/ablate.json

Each run is stage 1 and stage 2 of train.py from the same dense model, with another set of configurations, number of
steps or seed; then an examination of 1,000 held-out questions a task in each of its configurations.
"""
import json
import statistics
import sys
from pathlib import Path

import torch

import router
import toy
import train
from config import Parser, run
from model import VLM

STEPS = 1200  # of stage 2, as `python train.py` does
RUNS = {  # name: (configurations, times STEPS, dense model)
    "none alone": ([()], 1, "with"), "4 alone": ([(4,)], 1, "with"), "4,7 alone": ([(4, 7)], 1, "with"),
    "4,7,10 alone": ([(4, 7, 10)], 1, "with"), "universal": (toy.VIABLE, 1, "with"),
    "universal, twice": (toy.VIABLE, 2, "with"), "universal, control": (toy.VIABLE, 1, "without")}
RESULTS = Path(__file__).parent / "results" / "ablate.json"


def experiment(name, seed, args):
    """Trains and examines one model; its row, also written to out/ablate/NAME-SEED-EXAM/row.json."""
    configurations, times, dense = RUNS[name]
    out = Path(args.out) / f"{name.replace(', ', '-').replace(' ', '-').replace(',', '')}-{seed}-{args.exam}"
    if not (out / "row.json").is_file():
        model = VLM.from_pretrained(train.DENSE if dense == "with" else args.control)
        model.add_cross_attention(toy.CA, toy.SA, configurations)
        for stage in (1, 2):
            recipe = train.RECIPES[stage]
            steps = recipe["steps"] if stage == 1 else STEPS * times
            settings = {**recipe, "steps": steps, "seed": seed, "turns": 10, "save_every": 10**9}
            model = train.train(model, stage, out, settings)
        records = router.all_records(model, toy.exam(seed, args.exam), configurations)
        rows = router.Report(model.config, records, train.GROUPS, *train.USUAL).rows
        rows = [{key: row[key] for key in ("sa", "saving", *train.GROUPS, "tasks")} for row in rows]
        (out / "row.json").write_text(json.dumps({"run": name, "seed": seed, "steps": STEPS * times, "rows": rows}))
    return json.loads((out / "row.json").read_text())


def tables(rows, dense):
    """Two markdown tables from the rows of all runs: means over seeds, in brackets the spread, largest minus smallest.
    dense: the row of the dense model."""

    def cell(name, sa, tasks):
        """Mean over the seeds and, of several, the spread (largest minus smallest)."""
        found = [r["tasks"] for row in rows if row["run"] == name for r in row["rows"] if tuple(r["sa"]) == sa]
        means = [statistics.mean(r[t] for t in tasks) for r in found]
        spread = f" ({max(means) - min(means):.3f})" if len(means) > 1 else ""
        return f"{statistics.mean(means):.3f}{spread}" if means else "-"
    levels = [[t for t, task in toy.TASKS.items() if task.level == level] for level in range(4)]
    lines = ["| layers | saving | easy | level 1 | level 2 | level 3 | hard |", "|---|---|---|---|---|---|---|"]
    mean = {i: statistics.mean(dense["tasks"][t] for t in tasks) for i, tasks in enumerate([*levels, toy.HARD])}
    lines.append("| dense | 1.00x | " + " | ".join(f"{mean[i]:.3f}" for i in range(5)) + " |")
    for label in [name for name in RUNS if any(row["run"] == name for row in rows)]:
        sa = RUNS[label][0][-1]  # the only one, or the largest
        saving = next(r["saving"] for row in rows for r in row["rows"] if tuple(r["sa"]) == sa)
        cells = [cell(label, sa, tasks) for tasks in [*levels, toy.HARD]]
        lines.append(f"| {label}{', in ' + ','.join(map(str, sa)) if 'alone' not in label else ''} | {saving:.2f}x | "
                     + " | ".join(cells) + " |")
    lines += ["", "| hard tasks in configuration | " + " | ".join(",".join(map(str, v)) or "none" for v in toy.VIABLE)
              + " |", "|---" * (1 + len(toy.VIABLE)) + "|"]
    alone = [cell(f"{','.join(map(str, v)) or 'none'} alone", v, toy.HARD) for v in toy.VIABLE]
    if any(x != "-" for x in alone):
        lines.append("| trained for it alone | " + " | ".join(alone) + " |")
    for name in ("universal", "universal, twice", "universal, control"):
        if any(row["run"] == name for row in rows):
            lines.append(f"| {name} | " + " | ".join(cell(name, v, toy.HARD) for v in toy.VIABLE) + " |")
    return "\n".join(lines)


def main(argv=None):
    p = Parser(description="Ablations on the miniature (paper, Tables 3 and 4).")
    p.add_argument("--out", default="out/ablate", metavar="DIR", help="where the runs go (default: out/ablate)")
    p.add_argument("--only", action="append", metavar="NAME", help="a run, or several: "
                   + "; ".join(RUNS))
    p.add_argument("--seed", action="append", type=int, help="may be given several times (default: 0, 1, 2)")
    p.add_argument("--control", metavar="DIR", help="a dense model from `python train.py --stage 0 --words 0`, for the "
                   "control")
    p.add_argument("--exam", type=int, default=1000, metavar="N", help="questions a task (default: 1000)")
    p.add_argument("--threads", type=int, default=1, help="processor threads (default: 1; better run two processes)")
    p.add_argument("--report", action="store_true", help="train nothing, show what is there")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    for name in args.only or RUNS:
        if name not in RUNS:
            p.error(f"--only {name!r}: give one of {'; '.join(RUNS)}")
        for seed in args.seed or (0, 1, 2):
            if not args.report and (RUNS[name][2] == "with" or args.control):
                experiment(name, seed, args)
    rows = [json.loads(file.read_text()) for file in sorted(Path(args.out).glob(f"*-{args.exam}/row.json"))]
    dense = VLM.from_pretrained(train.DENSE)
    records = router.all_records(dense, toy.exam(0, args.exam), [tuple(range(dense.config.layers))])
    row = router.Report(dense.config, records, train.GROUPS, *train.USUAL).rows[0]
    had = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if len(rows) >= len(had.get("runs", [])) and args.exam >= had.get("questions", 0):
        RESULTS.write_text(json.dumps({"command": "python -m paper.ablate", "questions": args.exam, "dense": row,
                                       "runs": rows}, indent=1) + "\n")
    else:
        print(f"{RESULTS} has more runs, or larger ones, and stays as it is", file=sys.stderr)
    print(tables(rows, row))


if __name__ == "__main__":
    run(main)
