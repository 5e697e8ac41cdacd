"""What the shipped miniature can do in each configuration: three examinations of 1,000 held-out questions a task.

    python -m paper.miniature

Writes paper/results/miniature.json and assets/miniature.png, and prints the README's table.
"""
import json
import statistics
from pathlib import Path

import toy
import train
from config import Parser, run
from model import VLM
from router import Report, all_records

ROOT = Path(__file__).parent.parent


def table(rows):
    """(markdown with the means, the largest difference between seeds) of the rows of reports, one for a seed."""
    rows = [[row for row in seed if row["sa"] is not None] for seed in rows]  # routers: paper.routing
    head = [row["name"] for row in rows[0]]
    lines = ["| layers | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|",
             "| saving | " + " | ".join(f"{row['saving']:.2f}x" for row in rows[0]) + " |"]
    parts = [(task, lambda row, task=task: row["tasks"][task]) for task in toy.EASY]
    parts += [("**easy mean**", lambda row: row["easy"])]
    parts += [(f"{task} ({toy.TASKS[task].level})", lambda row, task=task: row["tasks"][task]) for task in toy.HARD]
    parts += [("**hard mean**", lambda row: row["hard"])]
    for label, value in parts:
        cells = [statistics.mean(value(seed[i]) for seed in rows) for i in range(len(head))]
        lines.append(f"| {label} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    spread = max(max(seeds) - min(seeds) for _, value in parts for i in range(len(head))
                 for seeds in [[value(seed[i]) for seed in rows]])
    return "\n".join(lines), spread


def main(argv=None):
    p = Parser(description="Examine the shipped miniature.")
    p.add_argument("--exam", type=int, default=1000, metavar="N", help="questions a task and seed (default: 1000)")
    p.add_argument("--seed", action="append", type=int, help="may be given several times (default: 0, 1, 2)")
    args = p.parse_args(argv)
    dense, visor = VLM.from_pretrained(train.DENSE), VLM.from_pretrained(ROOT / "nano")
    c, rows, everything = visor.config, [], ([], [])
    for seed in args.seed or (0, 1, 2):
        exam = toy.exam(seed, args.exam)
        records = all_records(visor, exam, c.viable), all_records(dense, exam, [tuple(range(c.layers))])
        report = Report(c, records[0], train.GROUPS, *train.USUAL, records[1])
        kept = "name", "sa", "saving", *train.GROUPS, "tasks"
        rows.append([{key: row[key] for key in kept} for row in report.rows])
        for so_far, more in zip(everything, records):
            so_far += more
    text, spread = table(rows)
    Report(c, everything[0], train.GROUPS, *train.USUAL, everything[1]).draw(ROOT / "assets" / "miniature.png")
    (ROOT / "paper" / "results" / "miniature.json").write_text(json.dumps(
        {"command": "python -m paper.miniature", "seeds": args.seed or [0, 1, 2], "rows": rows}, indent=1) + "\n")
    print(f"{text}\n\nLargest difference of any number between two of the seeds: {spread:.3f}.")


if __name__ == "__main__":
    run(main)
