"""What the shipped miniature can do in each configuration: three evaluations of 1,000 held-out questions a task.

    python -m paper.miniature

And what the overview alone is worth to the dense model: coarse questions over the base tile; and how soon the first
token comes, by stratum. Writes miniature.json and first-token.json in paper/results, their pictures in assets, and
prints the tables of paper/README.md.
"""
import json
import statistics
import time
from pathlib import Path

import numpy as np

import data
import train
from cli import NANO, Parser, placement, run
from config import Plan, sa_name
from evaluation import accuracy, all_results
from model import VLM
from paper.systems import about, machine
from report import pyplot
from router import summarise
from toy import world

ROOT = Path(__file__).parent.parent
PROMPTS, ROUNDS = 96, 9  # of the clock
LOOKS = {"dense": ("black", "s", 9), "VISOR, a configuration named": ("tab:blue", "o", 7),
         "router of layers": ("tab:blue", "*", 17), "router of pixels and layers": ("tab:green", "*", 17)}


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


def routed_table(rows):
    """Markdown: what the shipped router does with each stratum and with all tasks, means over the seeds' reports."""
    routers = [next(row for row in seed if row["name"] == "router") for seed in rows]
    fulls = [max((row for row in seed if row["name"] not in ("dense", "router", "oracle")),
                 key=lambda row: len(row["sa"])) for seed in rows]
    mean = statistics.mean
    lines = ["| | full | router | layers | to the overview | LLM saving | with the encoder |", "|---" * 7 + "|"]
    for group in (*world.STRATA, "mean of the tasks"):
        tasks = world.STRATA.get(group, tuple(world.TASKS))
        own = [row["by_group"].get(group, row) for row in routers]
        overview = mean(sum(share for name, share in x["shares"].items() if name.startswith("ov:")) for x in own)
        cells = [f"{mean(row['tasks'][t] for row in found for t in tasks):.3f}" for found in (fulls, routers)]
        lines.append(f"| {group} | {' | '.join(cells)} | {mean(x['layers'] for x in own):.2f} | {overview:.0%} | "
                     f"{mean(x['saving'] for x in own):.2f}x | {mean(x['end_to_end'] for x in own):.2f}x |")
    return "\n".join(lines)


def first_token(dense, visor, eval_set):
    """{stratum: {system: (ms a prompt to the first token, accuracy)}} of PROMPTS at once; systems take turns."""
    c = visor.config
    systems = {"dense": (dense, tuple(range(c.layers)), "all"),
               **{f"VISOR, {sa_name(c, sa)}": (visor, sa, "all") for sa in c.viable},
               "router of layers": (visor, "auto", "all"), "router of pixels and layers": (visor, "auto", "auto")}
    found = {}
    for stratum, tasks in world.STRATA.items():
        asked = [(image, q, a) for image, questions in eval_set for task, q, a in questions if task in tasks]
        asked = [asked[i] for i in np.random.default_rng(0).permutation(len(asked))[:PROMPTS]]
        prompts = [data.encode(data.chatml([data.place_images(q, 1)]), visor.tokenizer, [data.process_image(image, c)])
                   for image, q, _ in asked]
        times, right = {name: [] for name in systems}, {}
        for i in range(ROUNDS + 1):  # the first is to warm up
            for name, (model, sa, pixels) in systems.items():
                start = time.perf_counter()
                model.generate(prompts, sa, pixels, max_tokens=1)
                times[name] += [1000 * (time.perf_counter() - start) / len(asked)] * (i > 0)
        for name, (model, sa, pixels) in systems.items():
            answers = map(model.tokenizer.decode, model.generate(prompts, sa, pixels, max_tokens=4))
            right[name] = statistics.mean(x.strip() == a for x, (*_, a) in zip(answers, asked))
        found[stratum] = {name: (statistics.median(times[name]), right[name]) for name in systems}
    return found


def first_token_table(found):
    """Markdown: ms, how much sooner than dense, accuracy, of each stratum."""
    lines = ["| | " + " | ".join(f"{stratum}: ms | sooner | accuracy" for stratum in found) + " |",
             "|---" * (1 + 3 * len(found)) + "|"]
    for name in next(iter(found.values())):
        cells = [f"{own[name][0]:.2f} | {own['dense'][0] / own[name][0]:.2f}x | {own[name][1]:.3f}"
                 for own in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_first_token(path, found):
    """A panel for each stratum: accuracy against the time to the first token."""
    figure, panels = pyplot().subplots(1, len(found), figsize=(13, 4), sharey=True, constrained_layout=True)
    for panel, (stratum, own) in zip(panels, found.items()):
        for name, (ms, right) in own.items():
            label = "VISOR, a configuration named" if "VISOR" in name else name
            colour, marker, size = LOOKS[label]
            panel.plot(ms, right, marker, color=colour, markersize=size, markeredgecolor="white", label=label)
            if "VISOR" in name and panel is panels[-1]:  # elsewhere they lie on one another
                first = ms == min(t for other, (t, x) in own.items() if "VISOR" in other and abs(x - right) < 0.1)
                panel.annotate(name.removeprefix("VISOR, "), (ms, right), xytext=(-6 if first else 6, 0), fontsize=8,
                               textcoords="offset points", ha="right" if first else "left", va="center")
        panel.set(title=f"{stratum} questions", xlabel="ms to the first token", ylim=(0, 1.05),
                  xlim=(0, 1.1 * max(ms for ms, _ in own.values())))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    by_label = {label: handle for handle, label in zip(*panels[0].get_legend_handles_labels())}
    panels[0].legend(by_label.values(), by_label.keys(), fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = Parser(doc=__doc__, description="Evaluate the shipped miniature.")
    p.add_argument("--questions", type=int, default=1000, metavar="N", help="questions a task and seed (default: 1000)")
    p.add_argument("--seed", action="append", type=int, help="may be given several times (default: 0, 1, 2)")
    p.add_placement("float32")
    args = p.parse_args(argv)
    device = placement(args.device)
    dense, visor = (VLM.from_pretrained(name, args.dtype, device) for name in (train.DENSE, NANO))
    c, rows, everything, alone = visor.config, [], ([], []), []
    kept = "name", "sa", "saving", "end_to_end", "layers", "shares", *world.STRATA, "tasks", "by_group"

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
    soon = first_token(dense, visor, world.eval_set(3, 60))
    draw_first_token(ROOT / "assets" / "first_token.png", soon)
    (ROOT / "paper" / "results" / "miniature.json").write_text(json.dumps(
        {**about("miniature", argv), "dtype": str(visor.dtype)[6:], "seeds": args.seed or [0, 1, 2],
         "questions": args.questions, "rows": rows, "dense_over_the_overview": alone}, indent=1) + "\n")
    (ROOT / "paper" / "results" / "first-token.json").write_text(json.dumps(
        {**about("miniature", argv), "dtype": str(visor.dtype)[6:], "at_once": PROMPTS, "rounds": ROUNDS,
         "rows": soon}, indent=1) + "\n")
    print(f"{text}\n\nLargest difference of any number between two of the seeds: {spread:.3f}.\n\nDense, over the base "
          "tile alone: " + ", ".join(f"{task} {statistics.mean(x[task] for x in alone):.3f}" for task in alone[0]))
    print(f"\nThe router:\n\n{routed_table(rows)}\n\n{machine()}, {PROMPTS} prompts at once:\n\n"
          + first_token_table(soon))


if __name__ == "__main__":
    run(main)
