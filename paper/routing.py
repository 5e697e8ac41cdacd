"""What the router gains on the miniature, and what it does with tasks that it has never seen (paper 4.3, appendix G).

    python -m paper.routing

Three routers with different seeds, each with labels, training and an evaluation of its own, on the shipped weights;
and three that do not learn from three of the tasks. Writes paper/results/routing.json and prints the README's tables.
"""
import json
import shutil
import statistics
from pathlib import Path

import torch

import router
import train
from cli import NANO, Parser, run
from evaluation import all_results
from model import VLM
from paper.trials import add_flags, parse, save, stamp
from router import conservative_threshold
from toy import world
from toy.training import RECIPES

RESULTS = Path(__file__).parent / "results" / "routing.json"
LEFT_OUT = ("colour", "value", "updated row")  # as GQA, DocVQA and one more in the paper


def experiment(seed, left_out, args):
    """The rows of a report about a router trained with this seed, kept in rows.json for these weights."""
    out = Path(args.out) / f"{stamp(NANO)}-seed-{seed}-{args.exam}{'-left-out' if left_out else ''}"
    if (out / "rows.json").is_file():
        return json.loads((out / "rows.json").read_text())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    answered = Path(args.out) / f"{stamp(NANO)}-seed-{seed}-labels.jsonl"  # the same, whatever is left out
    if answered.is_file():
        shutil.copy(answered, out / "labels.jsonl")
    model = VLM.from_pretrained(NANO, device=args.device).remove_router()
    torch.manual_seed(seed)
    model.add_router(conservative_threshold(RECIPES[3]["label_smoothing"], len(model.config.viable)))
    settings = {**RECIPES[3], "seed": seed, "turns": 10, "save_every": 10**9, "leave_out": left_out}
    model = train.train(model, 3, out, settings).to(args.dtype)  # it learns in float32
    shutil.copy(out / "labels.jsonl", answered)
    results = all_results(model, world.eval_set(seed, args.questions), model.config.plans)
    rows = router.summarise(model.config, results, world.STRATA, *world.REFERENCE_PROMPT).rows
    rows = [row for row in rows if row["sa"] is None or row["sa"] == list(model.config.sa)]
    (out / "rows.json").write_text(json.dumps(rows))
    return rows


def cell(values, digits=3):
    """Mean and spread (largest minus smallest)."""
    return f"{statistics.mean(values):.{digits}f} ({max(values) - min(values):.{digits}f})"


def tables(results):
    """Markdown: the router against the full configuration and the oracle; and what it did with each task.

    results: {"all tasks" or "three left out": [rows of each seed]}.
    """
    full = max(range(len(results["all tasks"][0])), key=lambda i: len(results["all tasks"][0][i]["sa"] or ()))
    groups = list(results["all tasks"][0][0]["by_group"])  # easy and hard, or the strata
    head = [*groups, *(f"layers, {group}" for group in groups), "LLM saving", "mean of the tasks'", "with the encoder"]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for label, rows in results.items():
        picks = [("always " + rows[0][full]["name"], full)] if label == "all tasks" else []
        names = [row["name"] for row in rows[0]]
        picks += [("router" + (", three tasks left out" if label != "all tasks" else ""), names.index("router"))]
        picks += [("oracle", names.index("oracle"))] if label == "all tasks" else []
        for title, i in picks:
            row = [seed[i] for seed in rows]
            cells = [cell([r[g] for r in row]) for g in groups]
            cells += [cell([r["by_group"][g]["layers"] for r in row], 2) for g in groups]
            cells += [cell([r[key] for r in row], 2) for key in ("saving", "mean_saving", "end_to_end")]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    names = list(results["all tasks"][0][0]["tasks"])
    lines += ["", "| task | full | router | layers | LLM saving | chosen, % | left out |", "|---" * 7 + "|"]
    for task in [t for t in world.TASKS if t in names]:
        rows = [next(r for r in seed if r["name"] == "router") for seed in results["all tasks"]]
        other = [next(r for r in seed if r["name"] == "router") for seed in results["three left out"]]
        shares = {}
        for r in rows:
            for name, share in r["by_task"][task]["shares"].items():
                shares[name] = shares.get(name, 0) + 100 * share / len(rows)
        chosen = ", ".join(f"{name}: {share:.0f}" for name, share in sorted(shares.items(), key=lambda x: -x[1])
                           if share >= 0.5)
        without = f"{statistics.mean(r['tasks'][task] for r in other):.3f}" if task in LEFT_OUT else ""
        lines.append(f"| {task} | {statistics.mean(seed[full]['tasks'][task] for seed in results['all tasks']):.3f} | "
                     f"{statistics.mean(r['tasks'][task] for r in rows):.3f} | "
                     f"{statistics.mean(r['by_task'][task]['layers'] for r in rows):.2f} | "
                     f"{statistics.mean(r['by_task'][task]['saving'] for r in rows):.2f}x | {chosen} | {without} |")
    return "\n".join(lines)


def main(argv=None):
    p = Parser(doc=__doc__,
               description="Routers on the miniature, three seeds, with all tasks and with three left out.")
    add_flags(p, "out/routing")
    args = parse(p, argv)
    results = {label: [experiment(seed, left_out, args) for seed in args.seeds]
               for label, left_out in (("all tasks", ()), ("three left out", LEFT_OUT))}
    save("routing", RESULTS, args, left_out=LEFT_OUT, results=results)
    print(tables(results))


if __name__ == "__main__":
    run(main)
