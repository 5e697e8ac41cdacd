"""What the shipped miniature can do in each configuration: three evaluations of 1,000 held-out questions a task.

    python -m paper.miniature

And what the overview alone is worth to the dense model: coarse questions over the base tile. Writes
paper/results/miniature.json and assets/miniature.png, and prints the table of paper/README.md.
"""
import json
import statistics
from pathlib import Path

import train
from cli import NANO, Parser, placement, run
from config import Plan
from evaluation import accuracy, all_results
from model import VLM
from router import summarise
from toy import world

ROOT = Path(__file__).parent.parent


def table(rows):
    """(markdown with the means, the largest difference between seeds) of the rows of reports, one for a seed."""
    rows = [[row for row in seed if row["sa"] is not None] for seed in rows]  # routers: paper.routing
    head = [row["name"] for row in rows[0]]
    lines = ["| layers | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|",
             "| saving | " + " | ".join(f"{row['saving']:.2f}x" for row in rows[0]) + " |"]
    parts = []
    for stratum, tasks in world.STRATA.items():
        for task in tasks:
            label = f"{task} ({world.TASKS[task].level})" if world.TASKS[task].level > 0 else task
            parts.append((label, lambda row, task=task: row["tasks"][task]))
        parts.append((f"**{stratum}**", lambda row, stratum=stratum: row[stratum]))
    for label, value in parts:
        cells = [statistics.mean(value(seed[i]) for seed in rows) for i in range(len(head))]
        lines.append(f"| {label} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    spread = max(max(seeds) - min(seeds) for _, value in parts for i in range(len(head))
                 for seeds in [[value(seed[i]) for seed in rows]])
    return "\n".join(lines), spread


def main(argv=None):
    p = Parser(description="Evaluate the shipped miniature.")
    p.add_argument("--questions", type=int, default=1000, metavar="N", help="questions a task and seed (default: 1000)")
    p.add_argument("--seed", action="append", type=int, help="may be given several times (default: 0, 1, 2)")
    p.add_placement("float32")
    args = p.parse_args(argv)
    device = placement(args.device)
    dense, visor = (VLM.from_pretrained(name, args.dtype, device) for name in (train.DENSE, NANO))
    c, rows, everything, alone = visor.config, [], ([], []), []
    kept = "name", "sa", "saving", *world.STRATA, "tasks"

    def summary(results):
        return summarise(c, results[0], world.STRATA, *world.REFERENCE_PROMPT, results[1])
    for seed in args.seed or (0, 1, 2):
        eval_set = world.eval_set(seed, args.questions)
        results = (all_results(visor, eval_set, c.plans),
                   all_results(dense, eval_set, [Plan(tuple(range(c.layers)))]))
        rows.append([{key: row[key] for key in kept} for row in summary(results).rows])
        coarse = [(image, [x for x in asked if x[0] in world.STRATA["coarse"]]) for image, asked in eval_set]
        alone.append(accuracy(all_results(dense, coarse, [Plan(tuple(range(c.layers)), "overview")]), 0))
        for so_far, more in zip(everything, results):
            so_far += more
    text, spread = table(rows)
    summary(everything).draw(ROOT / "assets" / "miniature.png")
    (ROOT / "paper" / "results" / "miniature.json").write_text(json.dumps(
        {"command": "python -m paper.miniature", "dtype": str(visor.image_newline.dtype),
         "seeds": args.seed or [0, 1, 2], "rows": rows, "dense_over_the_overview": alone}, indent=1) + "\n")
    print(f"{text}\n\nLargest difference of any number between two of the seeds: {spread:.3f}.\n\nDense, over the base "
          "tile alone: " + ", ".join(f"{task} {statistics.mean(x[task] for x in alone):.3f}" for task in alone[0]))


if __name__ == "__main__":
    run(main)
