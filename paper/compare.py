"""VISOR and the reductions of visual tokens, on the miniature: the paper's Tables 1, 2 and 7, and Figure 1.

    python -m paper.compare                  what is not in out/compare yet of three seeds, then all tables
    python -m paper.compare --only M3 --seed 1   this one alone; two processes can share the work
    python -m paper.compare --report         the tables of what is there, paper/results/compare.json and compare.png

Methods that need no training run on nano/dense, those that learn start from it. Accuracy is of held-out questions,
1,000 a task and seed; savings are counted on prompts as they ran: of the language model's prefill, and of all up to the
first token. A quilt has 51 visual tokens, and a cell is one patch: what suits pictures of thousands is shown as it is.
"""
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import data
import train
from cli import NANO, Parser, run
from config import Plan, sa_name
from evaluation import accuracy, all_results
from flops import by_layer, connector_flops, prompt_flops, tower_flops
from model import VLM
from paper.routing import cell
from paper.trials import add_flags, parse, save, stamp
from report import pyplot
from toy import world
from toy.training import RECIPES

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "paper" / "results" / "compare.json", ROOT / "paper" / "results" / "compare.png"
DENSE = Plan(tuple(range(12)))
STEPS = 1200  # of every training, as `python train.py` takes for stage 2
PROMPTS = 60  # whose operations are counted
TRAINED = {  # label: (stages, reduction that is learned)
    "M3": ((0,), "m3"), "VisionZip, trained": ((0,), "visionzip"), "VisPruner, trained": ((0,), "vispruner"),
    "VISOR-TR": ((1, 2), "pack:2")}


class Row(NamedTuple):
    """One system of a table."""
    label: str
    model: str       # "dense", "visor", or one of TRAINED
    reduce: str = ""
    plans: tuple = (DENSE,)


VISOR = tuple(Plan(sa) for sa in world.VIABLE)
TABLE_1 = (  # the paper's settings, as shares of a tile's patches where it has 9 and not 729
    Row("dense", "dense"), Row("Downsample, 3 x 3 to 2 x 2", "dense", "downsample"),
    Row("VisionZip", "dense", "visionzip"), Row("VisionZip, trained", "VisionZip, trained", "visionzip"),
    Row("VisPruner", "dense", "vispruner"), Row("HiRED", "dense", "hired"), Row("M3, 3 x 3 to 2 x 2", "M3", "m3:4"),
    Row("M3, 3 x 3 to 1", "M3", "m3:8"), Row("PyramidDrop, easy", "dense", "pyramiddrop:easy"),
    Row("PyramidDrop, hard", "dense", "pyramiddrop:hard"), Row("SparseVLM", "dense", "sparsevlm"),
    Row("VISOR", "visor", "", VISOR), Row("VISOR-TR", "VISOR-TR", "pack:2", VISOR))
SOME = VISOR[0], VISOR[3], VISOR[-1]  # none; 4,7; 4,7,10
TABLE_2 = tuple(Row(f"VISOR, {name}", "visor", reduce, SOME) for name, reduce in (
    ("all tokens", ""), ("packing, 3 x 3 to 2 x 2", "pack:2"), ("packing, 3 x 3 to 1", "pack:8"),
    ("VisionZip 2x", "visionzip:3+1"), ("VisionZip 4x", "visionzip:1+1"), ("VisionZip 8x", "visionzip:1+0"),
    ("VisPruner 2x", "vispruner:3+1"), ("VisPruner 4x", "vispruner:1+1"), ("VisPruner 8x", "vispruner:1+0")))
TABLE_7 = (TABLE_1[6], Row("VisPruner, trained", "VisPruner, trained", "vispruner"), TABLE_1[-1])


def trained(label, seed, args):
    """The VLM of one of TRAINED, trained unless it is there."""
    stages, reduce = TRAINED[label]
    out = Path(args.out) / f"{stamp(train.DENSE)}-{label.replace(', ', '-')}-{STEPS}-{seed}"
    last = out / f"stage{stages[-1]}-{STEPS:06d}"
    if not last.is_dir():
        model = VLM.from_pretrained(train.DENSE, device=args.device).add_reduction(reduce)
        if stages[-1]:
            model.add_cross_attention(world.CA, world.SA, world.VIABLE, ())
        for stage in stages:
            steps = {"steps": RECIPES[1]["steps"] if stage == 1 else STEPS}
            settings = {**RECIPES[stage or 2], **steps, "largest_first": 0.0 if not stage else RECIPES[2][
                "largest_first"], "seed": seed, "turns": 10, "save_every": 10**9}
            model = train.train(model, stage, out, settings)
    return VLM.from_pretrained(last, args.dtype, args.device)


def measured(model, plan):
    """Over PROMPTS of them as they ran, one by one: savings of the language model and of all up to the first token;
    nominal, visual tokens of dense over those of the layers; ms that selecting takes."""
    c, spent, dense = model.config, [], []
    for image, asked in world.eval_set(7, PROMPTS // 12):
        for _, question, _ in asked[:4]:
            prompt = data.encode(data.chatml([data.place_images(question, 1, c)]), model.tokenizer,
                                 [data.process_image(image, c)])
            tokens, timings = [], {}
            model.generate([prompt], plan.sa, plan.pixels, timings=timings, layer_tokens=tokens, max_tokens=1)
            tiles, text, whole = prompt.images[0].tiling.tiles, len(prompt.ids), data.tiling(*image.size, c.unreduced())
            encoder, plain = ([tower_flops(x, tiles) + connector_flops(x, tiles)] for x in (c, c.unreduced()))
            spent.append((prompt_flops(c, plan.sa, text, tokens[0] or len(prompt.v_pos)), *encoder,
                          tokens_per_layer(c, tokens[0] or len(prompt.v_pos)), timings.get("select", 0.0)))
            dense.append((prompt_flops(c.unreduced(), DENSE.sa, text, whole.tokens), *plain, whole.tokens))
    llm, encoder, tokens, select = (sum(x) for x in zip(*spent))
    dense_llm, dense_encoder, dense_tokens = (sum(x) for x in zip(*dense))
    return {"saving": dense_llm / llm, "first_token": (dense_llm + dense_encoder) / (llm + encoder),
            "nominal": dense_tokens / tokens, "select_ms": 1000 * select / len(spent)}


def tokens_per_layer(c, vision):
    """Visual tokens that go into a layer, in the mean; where a reduction drops none inside, those of the prompt."""
    return sum(len(layers) * sum(counts) for layers, counts in by_layer(c, vision)) / c.layers


def experiment(row, seed, args):
    """[a dict for each plan of a row], kept in out/ for these weights; with --report [] where it is not there."""
    source = NANO if row.model == "visor" else train.DENSE
    name = f"{stamp(source)}-{row.label}-{row.reduce}-{STEPS}-{seed}-{args.exam}.json"
    file = Path(args.out) / name.replace(" ", "").replace(",", "-").replace(":", "-")
    if not file.is_file():
        if args.report:
            return []
        if row.model in TRAINED:
            model = trained(row.model, seed, args)
        else:
            model = VLM.from_pretrained(source, args.dtype, args.device)
        model.add_reduction(row.reduce)
        results = all_results(model, world.eval_set(seed, args.questions), row.plans)
        found = []
        for i, plan in enumerate(row.plans):
            tasks = accuracy(results, i)
            found.append({"label": row.label, "reduce": row.reduce, "sa": sa_name(model.config, plan.sa), "seed": seed,
                          **{name: statistics.mean(tasks[t] for t in own) for name, own in world.STRATA.items()},
                          "tasks": tasks, **measured(model, plan)})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def table(rows, found):
    """Markdown: accuracy by stratum, mean over seeds and in brackets the spread, largest minus smallest; savings."""
    lines = ["| | layers | " + " | ".join(world.STRATA) + " | LLM saving | nominal | to first token | selecting |",
             "|---" * (6 + len(world.STRATA)) + "|"]
    for row in rows:
        for sa in dict.fromkeys(x["sa"] for x in found if x["label"] == row.label):
            own = [x for x in found if x["label"] == row.label and x["sa"] == sa]
            cells = [cell([x[stratum] for x in own]) for stratum in world.STRATA]
            mean = {key: statistics.mean(x[key] for x in own)
                    for key in ("saving", "nominal", "first_token", "select_ms")}
            cells += [f"{mean[key]:.2f}x" for key in ("saving", "nominal", "first_token")]
            lines.append(f"| {row.label} | {sa} | {' | '.join(cells)} | {mean['select_ms']:.1f} ms |")
    return "\n".join(lines)


def by_task(rows, found):
    """Markdown: accuracy of each task; of several configurations the largest."""
    lines = ["| | " + " | ".join(world.TASKS) + " |", "|---" * (1 + len(world.TASKS)) + "|"]
    for row in rows:
        own = [x for x in found if x["label"] == row.label]
        own = [x for x in own if x["sa"] == own[-1]["sa"]]
        means = [statistics.mean(x["tasks"][task] for x in own) for task in world.TASKS]
        lines.append(f"| {row.label} | " + " | ".join(f"{x:.2f}" for x in means) + " |")
    return "\n".join(lines)


def draw(path, found):
    """The paper's Figure 1: accuracy against the language model's saving, a panel for each stratum. Of several
    configurations a line joins the best at each cost."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), sharey=True, constrained_layout=True)
    labels = [row.label for row in TABLE_1 if any(x["label"] == row.label for x in found)]
    for panel, stratum in zip(panels, world.STRATA):
        for k, label in enumerate(labels):
            points = {}  # of each configuration the mean over seeds
            for x in found:
                if x["label"] == label:
                    points.setdefault(x["sa"], []).append((x["saving"], x[stratum]))
            at = sorted(tuple(map(statistics.mean, zip(*seeds))) for seeds in points.values())
            best = {round(saving, 2): accuracy for saving, accuracy in at}  # of configurations that cost the same
            panel.plot(*zip(*at), "o" if len(at) > 1 else "s", color=plt.cm.tab20(k / 20), label=label, zorder=3)
            panel.plot(best.keys(), best.values(), "-", color=plt.cm.tab20(k / 20), zorder=2)
        panel.set(title=f"questions: {stratum}", xlabel="operations, times fewer than dense", ylim=(0, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = Parser(doc=__doc__,
               description="VISOR and the reductions of visual tokens, on the miniature (paper, Tables 1, 2, 7).")
    add_flags(p, "out/compare", TRAINED)
    args = parse(p, argv, TRAINED)
    if not args.report:
        for name in args.only or TRAINED:
            for seed in args.seeds:
                trained(name, seed, args)
    if args.only:
        return
    rows = dict.fromkeys((*TABLE_1, *TABLE_2, *TABLE_7))
    found = [x for row in rows for seed in args.seeds for x in experiment(row, seed, args)]
    if not found:
        raise ValueError(f"--report: {args.out} holds nothing about these weights; leave --report out")
    for title, own in (("Table 1", TABLE_1), ("Table 2", TABLE_2), ("Table 7", TABLE_7)):
        print(f"{title}\n\n{table(own, found)}\n")
    print(by_task((*TABLE_1, TABLE_7[1]), found))
    if save("compare", RESULTS, args, steps=STEPS, rows=found):
        try:
            draw(PICTURE, found)
        except ImportError:
            print(f"no {PICTURE}: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)


if __name__ == "__main__":
    run(main)
