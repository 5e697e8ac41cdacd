"""The paper's Tables 3, 4 and 10 on the miniature: how many self-attention layers; one universal model, or many; with
half the data, or twice as much (every step has quilts of its own).

    python -m paper.ablate               every run of three seeds that is not in out/ablate yet, then the tables
    python -m paper.ablate --only "none alone" --seed 1   these alone; two processes can share the work
    python -m paper.ablate --report      the tables of what is there, and paper/results/ablate.json

Each run is stage 1 and stage 2 of train.py from the same dense model, with another set of configurations, number of
steps or seed; then an evaluation of 1,000 held-out questions a task in each of its configurations.
"""
import json
import statistics
from pathlib import Path

import router
import train
from cli import Parser, run
from config import Plan
from evaluation import all_results
from model import VLM
from paper.trials import add_flags, parse, save, stamp
from toy import world
from toy.training import RECIPES

STEPS = 1200  # of stage 2, as `python train.py` does
RUNS = {  # name: (configurations, times STEPS, dense model)
    "none alone": ([()], 1, "with"), "4 alone": ([(4,)], 1, "with"), "4,7 alone": ([(4, 7)], 1, "with"),
    "4,7,10 alone": ([(4, 7, 10)], 1, "with"), "universal": (world.VIABLE, 1, "with"),
    "universal, half": (world.VIABLE, 0.5, "with"), "universal, twice": (world.VIABLE, 2, "with"),
    "universal, control": (world.VIABLE, 1, "without")}
RESULTS = Path(__file__).parent / "results" / "ablate.json"


def experiment(name, seed, args):
    """Trains and evaluates one model; its row, also written to out/ablate/WEIGHTS-NAME-SEED-EXAM/row.json."""
    configurations, times, dense = RUNS[name]
    name_in_path = name.replace(", ", "-").replace(" ", "-").replace(",", "")
    out = Path(args.out) / f"{stamp(train.DENSE)}-{name_in_path}-{seed}-{args.exam}"
    if not (out / "row.json").is_file():
        model = VLM.from_pretrained(train.DENSE if dense == "with" else args.control, device=args.device)
        model.add_cross_attention(world.CA, world.SA, configurations, ())
        for stage in (1, 2):
            recipe = RECIPES[stage]
            steps = recipe["steps"] if stage == 1 else int(STEPS * times)
            settings = {**recipe, "steps": steps, "seed": seed, "turns": 10, "save_every": 10**9}
            model = train.train(model, stage, out, settings)
        model = model.to(args.dtype)  # it has learned in float32
        results = all_results(model, world.eval_set(seed, args.questions), model.config.plans)
        rows = router.summarise(model.config, results, world.STRATA, *world.REFERENCE_PROMPT).rows
        rows = [{key: row[key] for key in ("sa", "saving", *world.STRATA, "tasks")} for row in rows]
        row = {"run": name, "seed": seed, "steps": int(STEPS * times), "rows": rows}
        (out / "row.json").write_text(json.dumps(row))
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
    levels = {"coarse": (-1,), "detail": (0,), "level 1": (1,), "level 2": (2,), "level 3": (3,),
              "relations": (1, 2, 3)}
    columns = {}
    for label, among in levels.items():
        if tasks := [t for t in dense["tasks"] if world.TASKS[t].level in among]:  # older results have no coarse ones
            columns[label] = tasks
    lines = ["| layers | saving | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    means = [statistics.mean(dense["tasks"][t] for t in tasks) for tasks in columns.values()]
    lines.append("| dense | 1.00x | " + " | ".join(f"{x:.3f}" for x in means) + " |")
    for label in [name for name in RUNS if any(row["run"] == name for row in rows)]:
        sa = RUNS[label][0][-1]  # the only one, or the largest
        saving = next(r["saving"] for row in rows for r in row["rows"] if tuple(r["sa"]) == sa)
        cells = [cell(label, sa, tasks) for tasks in columns.values()]
        lines.append(f"| {label}{', in ' + ','.join(map(str, sa)) if 'alone' not in label else ''} | {saving:.2f}x | "
                     + " | ".join(cells) + " |")
    lines += ["", "| relations in configuration | " + " | ".join(",".join(map(str, v)) or "none" for v in world.VIABLE)
              + " |", "|---" * (1 + len(world.VIABLE)) + "|"]
    alone = [cell(f"{','.join(map(str, v)) or 'none'} alone", v, columns["relations"]) for v in world.VIABLE]
    if any(x != "-" for x in alone):
        lines.append("| trained for it alone | " + " | ".join(alone) + " |")
    for name in [name for name in RUNS if name.startswith("universal")]:
        if any(row["run"] == name for row in rows):
            lines.append(f"| {name} | " + " | ".join(cell(name, v, columns["relations"]) for v in world.VIABLE) + " |")
    return "\n".join(lines)


def main(argv=None):
    p = Parser(doc=__doc__, description="Ablations on the miniature (paper, Tables 3 and 4).")
    add_flags(p, "out/ablate", RUNS)
    p.add_argument("--control", metavar="DIR", help="for the control: a dense model from `python train.py --stage 0 "
                   "--auxiliary-weight 0`")
    args = parse(p, argv, RUNS)
    for name in args.only or RUNS:
        for seed in args.seeds:
            if not args.report and (RUNS[name][2] == "with" or args.control):
                experiment(name, seed, args)
    kept = sorted(Path(args.out).glob(f"{stamp(train.DENSE)}-*-{args.exam}/row.json"))
    if not kept:
        raise ValueError(f"--report: {args.out} holds nothing about these weights; leave --report out")
    rows = [json.loads(file.read_text()) for file in kept]
    dense = VLM.from_pretrained(train.DENSE, args.dtype, args.device)
    results = all_results(dense, world.eval_set(0, args.questions), [Plan(tuple(range(dense.config.layers)))])
    row = router.summarise(dense.config, results, world.STRATA, *world.REFERENCE_PROMPT).rows[0]
    save("ablate", RESULTS, args, dense=row, runs=rows)
    print(tables(rows, row))


if __name__ == "__main__":
    run(main)
