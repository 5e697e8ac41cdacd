"""What the paper shows of models from the inside, and of VISOR's configurations: Figures 2 to 4 and 6 to 10.

    python -m paper.analyse                                the miniature: nano/dense and nano
    python -m paper.analyse --what attention cka --model DIR --data FILE.json --images DIR

  attention        share of attention between query, answer and image, by layer      Figure 2    of a dense model
  cka              similarity of the vision stream between layers                    Figure 3
  drop             accuracy with vision dropped in random subsets of layers          Figure 4
  configurations   accuracy by configuration and task, and what each costs           Figures 6, 8    of VISOR
  routes           what the router chose, by task                                    Figure 7
  oracle           the cheapest configuration that is right, question by question    Figure 9
  cost             operations against the number of visual tokens                    Figure 10

Each writes NAME.json and, where matplotlib is installed, NAME.png, and prints its numbers. Without --what: all that the
model allows. Attention and cka can also be had of VISOR, in its largest configuration.
"""
import json
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from cli import NANO, Parser, atomic, checkpoint_path, free_threads, placement, run
from evaluation import accuracy, all_results
from config import plan_name, sa_name
from flops import prompt_flops
from llava.samples import Samples, eval_questions, reference_prompt
from model import VLM
from paper import inside
from paper.systems import about
from report import columns, heat_map, pyplot
from router import largest, oracle, summarise
from toy import world

RESULTS = Path(__file__).parent / "results"
SHIPPED = {"nano/dense": NANO / "dense", "nano": NANO}
COLOURS = "tab:blue", "tab:red", "tab:gray"      # of attention's curves
EASY, HARD = "tab:green", "tab:red"
# Questions a task or file; where each takes a forward of its own, or one for each subset of layers, fewer do
LIMITS = {"attention": 50, "cka": 50, "drop": 50, "configurations": 250, "routes": 250, "oracle": 250, "cost": 1}


class Subject:
    """A model, and what it is asked: loaded once, evaluated once, for all that is analysed about it."""

    def __init__(self, name, args, device):
        self.name, self.args = name, args
        path = checkpoint_path(args.model) if args.model else SHIPPED[name]
        self.model = VLM.from_pretrained(path, args.dtype, device)
        self.config, self.samples, self.sets = self.model.config, None, {}
        if args.data != "toy":
            self.samples = Samples(args.data, args.images, self.model.tokenizer, self.config, seed=args.seed)
        elif self.config.world != "toy":
            raise ValueError(f"{name} does not know the miniature's world: give questions for it with --data FILE")

    def eval_set(self, what):
        """The evaluation set of an analysis."""
        n = self.args.limit or LIMITS[what]
        if n not in self.sets:
            self.sets[n] = (eval_questions(self.samples, n, self.args.seed) if self.samples else
                            world.eval_set(self.args.seed, n))
        return self.sets[n]

    def reference(self, eval_set, results):
        """(groups of tasks, text tokens, size of the image) of a usual prompt, as report.Report asks for them."""
        return (reference_prompt(self.samples, eval_set, results) if self.samples else
                (world.STRATA, *world.REFERENCE_PROMPT))

    def groups(self, tasks):
        """{stratum: its tasks}; of a file each subset is a group of its own."""
        return {task: [task] for task in tasks} if self.samples else world.STRATA

    @cached_property
    def report(self):
        """(report.Report, results) of one evaluation of all plans: configurations, routes and oracle are made of it."""
        eval_set = self.eval_set("configurations")
        results = all_results(self.model, eval_set, self.config.plans)
        return summarise(self.config, results, *self.reference(eval_set, results)), results

    def unfit(self, what):
        """Why this model has no such figure; "" where it has."""
        c, dense = self.config, not (self.config.sa or self.config.ca)
        if what in ("attention", "cka", "drop") and c.reduction.inside:
            return f"{c.reduce} drops visual tokens between its layers"
        if what == "drop" and not dense:
            return "it is VISOR, which also looks at vision by cross-attention; give the dense model it was made from"
        if what in ("configurations", "routes", "oracle") and not c.plans:
            return "it has no viable configurations; train stages 1 and 2 first"
        if what == "routes" and self.model.router is None:
            return "it has no router; train stage 3 first"
        return ""


# --- the analyses: each makes (what the JSON holds, a table of it) of a Subject ---------------------------------------

def attention(subject):
    """Figure 2."""
    found = {task: rounded(x) for task, x in inside.attention(subject.model, subject.eval_set("attention")).items()}
    groups, c = subject.groups(found), subject.config
    record = {"configuration": list(inside.whole(c)), "cross_attention": list(c.ca), "layers": c.layers,
              "interactions": inside.INTERACTIONS, "groups": groups, "by_task": found}
    lines = [["layer", *range(c.layers)]]
    for group, tasks in groups.items():
        mean = np.mean([found[task] for task in tasks], axis=0)  # (L, 3)
        lines += [[f"{group}, {short}", *map("{:.2f}".format, x)] for short, x in zip(("q-i", "a-i", "a-q"), mean.T)]
    notes = "\nq-i: query to image, a-i: answer to image, a-q: answer to query"
    return record, columns([[str(x) for x in line] for line in lines], first=22) + notes


def cka(subject):
    """Figure 3."""
    found = {task: rounded(x) for task, x in inside.cka(subject.model, subject.eval_set("cka")).items()}
    groups = subject.groups(found)
    record = {"configuration": list(inside.whole(subject.config)), "groups": groups, "by_task": found}
    lines = [["images of", "least", "first, last"]]
    for group, tasks in groups.items():
        mean = np.mean([found[task] for task in tasks], axis=0)  # (S, S)
        lines.append([group, f"{mean.min():.3f}", f"{mean[0, -1]:.3f}"])
    return record, columns(lines, first=22)


def drop(subject):
    """Figure 4."""
    layers, n = subject.config.layers, subject.args.subsets
    subsets = inside.layer_subsets(layers, n, subject.args.seed)
    full, *rest = inside.drop(subject.model, subject.eval_set("drop"), subsets)
    tasks = [task for names in subject.groups(full).values() for task in names]
    right = np.array([[row[task] for task in tasks] for row in rest])                # (subsets, tasks)
    whole = np.array([full[task] for task in tasks])
    kept = np.divide(right.mean(0), whole, out=np.zeros_like(whole), where=whole > 0)  # (tasks,)
    similarity = inside.correlation(right)
    easy, hard = inside.easy_and_hard(similarity, kept)
    record = {"tasks": tasks, "accuracy": dict(zip(tasks, rounded(whole))), "easy": [tasks[i] for i in easy],
              "hard": [tasks[i] for i in hard], "correlation": rounded(similarity),
              "subsets": [{"dropped": own, "accuracy": rounded(row)} for own, row in zip(subsets, right)]}
    lines = [["", "whole", "mean", "median", "kept", ""]]
    for i in [*easy, *hard]:
        lines.append([tasks[i], f"{whole[i]:.3f}", f"{right[:, i].mean():.3f}", f"{np.median(right[:, i]):.3f}",
                      f"{kept[i]:.2f}", "easy" if i in easy else "hard"])
    return record, columns(lines)


def configurations(subject):
    """Figures 6 and 8."""
    table, _ = subject.report
    keys = ("name", "sa", "pixels", "layers", "saving", "end_to_end", *table.groups, "tasks", "questions")
    rows = [{key: row[key] for key in keys} for row in table.rows if row["sa"] is not None]
    return {"groups": table.groups, "rows": rows}, table.text()


def routes(subject):
    """Figure 7."""
    table, _ = subject.report
    row = next(r for r in table.rows if r["name"] == "router")
    labels = {task: plan_name(subject.config, subject.config.plans[i]) for task, i in table.labels.items()}
    return {"groups": table.groups, "pseudo_labels": labels, "accuracy": row["tasks"],
            "by_task": row["by_task"]}, table.routes()


def oracle_choices(subject):
    """Figure 9: of each question the configuration with the most right tokens, then the fewest layers (appendix D)."""
    (table, results), plans = subject.report, subject.config.plans
    chosen = {}  # task: [(number of the plan, whether it is right)]
    for r in results:
        i = oracle(plans, r)
        chosen.setdefault(r["task"], []).append((i, r["correct"][i]))
    by_task, names = {}, [plan_name(subject.config, plan) for plan in plans]
    for task, own in chosen.items():
        share = Counter(names[i] for i, _ in own)
        by_task[task] = {"questions": len(own), "accuracy": float(np.mean([right for _, right in own])),
                         "largest": accuracy(results, largest(plans))[task],
                         "layers": float(np.mean([len(plans[i].sa) for i, _ in own])),
                         "shares": {name: share[name] / len(own) for name in names if share[name]}}
    lines = [["chosen, %", "right", "largest", "layers", *names]]
    for task in (task for names_ in table.groups.values() for task in names_):
        x = by_task[task]
        lines.append([task, f"{x['accuracy']:.3f}", f"{x['largest']:.3f}", f"{x['layers']:.2f}",
                      *(f"{100 * x['shares'][n]:.0f}" if n in x["shares"] else "." for n in names)])
    return {"groups": table.groups, "largest": names[largest(plans)], "by_task": by_task}, columns(lines)


def cost(subject):
    """Figure 10: the language model's prefill, from one tile's tokens to those of the largest image; no encoder. An
    image without tiles is cut as finely; where one is a tile, to as many images."""
    c = subject.config.unreduced()
    c = c if c.ca or c.sa else c.add_visor()              # of a dense model: what it would cost as VISOR
    eval_set = subject.eval_set("cost")
    _, text, _ = subject.reference(eval_set, [{"image": 0, "task": eval_set[0][1][0][0]}])
    one, most = c.patches ** 2, 1 + (c.max_tiles or max(w * h for w, h in c.pinpoints))
    if c.aspect == "dynamic":
        one = max(1, c.max_pixels // c.cell ** 2 // most)
    lengths = [one * k // 4 for k in range(4, 4 * most + 1)]
    every = tuple(range(c.layers))
    flops = {sa_name(c, sa): [prompt_flops(c, sa, text, n) for n in lengths]
             for sa in dict.fromkeys([every, *sorted([(), *c.viable], key=lambda sa: (-len(sa), sa))])}
    shown = [0, len(lengths) // 2, -1]
    lines = [["GFLOP, tokens", *(f"{lengths[i]:,}" for i in shown), "saving"]]
    lines += [[name, *(f"{x[i] / 1e9:,.3g}" for i in shown), f"{flops['dense'][-1] / x[-1]:.1f}x"]
              for name, x in flops.items()]
    return {"text_tokens": text, "visual_tokens": lengths, "flops": flops}, columns(lines, first=24)


def rounded(x):
    """Arrays and tensors as nested lists, to what a figure shows."""
    return np.round(np.asarray(x, dtype=float), 4).tolist()


# --- the drawings: of what the JSON holds ----------------------------------------------------------------------------

def small_multiples(plt, n, width, height):
    """(figure, n axes), at most four in a row."""
    across = min(n, 4)
    figure, axes = plt.subplots(-(-n // across), across, figsize=(width * across, height * -(-n // across)),
                                sharex=True, sharey=True, squeeze=False, constrained_layout=True)
    for unused in axes.flat[n:]:
        unused.axis("off")
    return figure, axes.flat[:n]


def draw_attention(plt, record):
    """A panel for each stratum: the mean of its tasks, each of them faintly behind it."""
    figure, panels = small_multiples(plt, len(record["groups"]), 4.8, 4)
    layers = range(record["layers"])
    for axes, (group, tasks) in zip(panels, record["groups"].items()):
        shares = np.array([record["by_task"][task] for task in tasks])               # (tasks, L, 3)
        for k, (label, colour) in enumerate(zip(record["interactions"], COLOURS)):
            if len(tasks) > 1:
                axes.plot(layers, shares[..., k].T, color=colour, lw=0.8, alpha=0.3)
            axes.plot(layers, shares[..., k].mean(0), "o-", color=colour, ms=4, lw=2, label=label)
        for l in record["cross_attention"]:
            axes.axvspan(l - 0.5, l + 0.5, color="tab:blue", alpha=0.12, lw=0,
                         label="cross-attention, not counted" if l == record["cross_attention"][0] else None)
        axes.set(title=group, xlim=(-0.6, len(layers) - 0.4), ylim=(-0.03, 1.03), xlabel="layer")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of attention")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_cka(plt, record):
    """A heat map for each stratum, all on one scale."""
    figure, panels = small_multiples(plt, len(record["groups"]), 4.2, 4)
    means = [np.mean([record["by_task"][task] for task in tasks], axis=0) for tasks in record["groups"].values()]
    lowest = np.floor(10 * min(x.min() for x in means)) / 10
    for axes, group, mean in zip(panels, record["groups"], means):
        image = axes.imshow(mean, vmin=lowest, vmax=1, cmap="viridis", origin="lower", aspect="auto")
        axes.set(title=f"images of {group}", xlabel="layer")
        axes.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(plt.MaxNLocator(integer=True))
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="linear CKA of the vision that\nenters two layers")
    return figure


def draw_drop(plt, record):
    """Boxes of accuracy by task, and the correlation between tasks, both with the easy cluster first."""
    order = [*record["easy"], *record["hard"]]
    at = [record["tasks"].index(task) for task in order]
    n, colours = len(order), [EASY] * len(record["easy"]) + [HARD] * len(record["hard"])
    accuracy = np.array([row["accuracy"] for row in record["subsets"]])[:, at]       # (subsets, tasks)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 1.8 + max(3, 0.3 * n)), constrained_layout=True)
    boxes = left.boxplot(accuracy, orientation="horizontal", widths=0.65, patch_artist=True,
                         medianprops={"color": "black", "linewidth": 2}, flierprops={"marker": ".", "markersize": 4})
    for box, colour in zip(boxes["boxes"], colours):
        box.set(facecolor=colour, alpha=0.5)
    left.plot([record["accuracy"][task] for task in order], range(1, n + 1), "D", ms=7, color="tab:blue",
              label="vision in all layers (black: median)", zorder=3)
    left.set(xlim=(-0.03, 1.03), xlabel=f"accuracy over {len(accuracy)} subsets of layers without vision",
             title="green: easy cluster, red: hard cluster")
    left.set_yticks(range(1, n + 1), order)
    left.invert_yaxis()
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    image = right.imshow(np.array(record["correlation"])[np.ix_(at, at)], vmin=-1, vmax=1, cmap="RdBu_r")
    right.set_xticks(range(n), order, rotation=45, ha="right")
    right.set_yticks(range(n), order)
    for labels in (left.get_yticklabels(), right.get_yticklabels(), right.get_xticklabels()):
        for label, colour in zip(labels, colours):
            label.set_color(colour)
    right.set_title("tasks that fall and stay together")
    figure.colorbar(image, ax=right, label="correlation of accuracy", shrink=0.9)
    return figure


def draw_configurations(plt, record):
    """A heat map (Figure 6), and accuracy by group against the number of layers (Figure 8)."""
    rows, groups = record["rows"], record["groups"]
    tasks = [task for names in groups.values() for task in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 2.4 + max(3, 0.4 * len(rows))), constrained_layout=True,
                                         width_ratios=(1.5, 1))
    heat_map(left, np.array([[row["tasks"][t] for t in tasks] for row in rows]), [r["name"] for r in rows], tasks)
    for number in left.texts:
        number.set_fontsize(11)
    figure.colorbar(left.images[0], ax=left, label="accuracy", shrink=0.9, pad=0.01)
    for x in np.cumsum([len(names) for names in groups.values()])[:-1]:
        left.axvline(x - 0.5, color="white", linewidth=3)
    left.set(title=" | ".join(groups), ylabel="self-attention layers; ov: overview")
    for k, (group, colour) in enumerate(zip(groups, (EASY, "tab:blue", HARD))):  # equal ones stay visible
        right.plot(range(len(rows)), [row[group] for row in rows], "o-", color=colour, label=group, ms=12 - 3 * k)
    between, turned = ("\n", 0) if len(rows) < 9 else ("   ", 90)
    right.set_xticks(range(len(rows)), [f"{row['name']}{between}{row['saving']:.1f}x" for row in rows], rotation=turned)
    right.set(ylim=(0, 1.05), ylabel="accuracy", title="mean of the tasks",
              xlabel="self-attention layers, times fewer operations")
    right.grid(alpha=0.3)
    right.legend(loc="lower right")
    return figure


def bars(plt, axes, record, title):
    """The share of each task's questions that went to each configuration, from the fewest layers to the most."""
    tasks = [task for names in record["groups"].values() for task in names]
    shares = [record["by_task"][task]["shares"] for task in tasks]
    names, start = record["plans"], np.zeros(len(tasks))
    for k, name in enumerate(names):
        own = np.array([x.get(name, 0) for x in shares])
        axes.barh(range(len(tasks)), own, left=start, label=name, color=plt.cm.viridis(k / max(1, len(names) - 1)))
        start += own
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of questions", title=title)
    axes.legend(title="self-attention\nlayers", loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return tasks


def draw_routes(plt, record):
    """One panel."""
    figure, axes = plt.subplots(figsize=(9, 1.8 + max(3, 0.27 * len(record["by_task"]))), constrained_layout=True)
    bars(plt, axes, record, "what the router chose")
    return figure


def draw_oracle(plt, record):
    """What the oracle chose, and how often any configuration is right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 1.8 + max(3, 0.27 * len(record["by_task"]))), sharey=True,
                                         constrained_layout=True, width_ratios=(1.3, 1))
    tasks = bars(plt, left, record, "the cheapest configuration with the most right tokens")
    for key, label, look in (("largest", f"always {record['largest']}", {"color": "lightgray", "ms": 13}),
                             ("accuracy", "the oracle", {"color": "tab:blue", "ms": 6})):
        right.plot([record["by_task"][task][key] for task in tasks], range(len(tasks)), "o", label=label, **look)
    right.set(xlim=(-0.03, 1.05), xlabel="accuracy", title="how often it is right")
    right.grid(alpha=0.3)
    right.legend(loc="lower left")
    return figure


def draw_cost(plt, record):
    """Configurations that cost the same share a curve."""
    figure, axes = plt.subplots(figsize=(10, 5), constrained_layout=True)
    curves = {}
    for name, flops in record["flops"].items():
        curves.setdefault(tuple(flops), []).append(name)
    for i, (flops, names) in enumerate(curves.items()):
        axes.plot(record["visual_tokens"], np.array(flops) / 1e9, lw=2 if i else 3, label="\n".join(names),
                  color=plt.cm.viridis(0.95 - 0.95 * i / len(curves)) if i else "black")
    axes.set(xlabel="visual tokens", ylabel="GFLOP of the language model, prefill", yscale="log",
             title=f"Operations by configuration, {record['text_tokens']} text tokens, without the encoder")
    axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(plt.NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(title="self-attention\nlayers", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


# --- command line ----------------------------------------------------------------------------------------------------

ANALYSES = {  # name: (analysis, drawing)
    "attention": (attention, draw_attention), "cka": (cka, draw_cka), "drop": (drop, draw_drop),
    "configurations": (configurations, draw_configurations), "routes": (routes, draw_routes),
    "oracle": (oracle_choices, draw_oracle), "cost": (cost, draw_cost)}


def parse(argv=None):
    p = Parser(doc=__doc__,
               description="Attention, similarity of vision, layers without vision; configurations, routes, oracle, "
               "cost (paper: Figures 2 to 4 and 6 to 10).")
    p.add_argument("--what", nargs="+", choices=ANALYSES, metavar="NAME", help=f"{', '.join(ANALYSES)} (default: all "
                   "that the model allows)")
    p.add_argument("--model", metavar="DIR", help="(default: nano/dense for attention, cka and drop, else nano)")
    p.add_argument("--data", default="toy", metavar="FILE", help="toy (default), a training file, or a mixture of them")
    p.add_argument("--images", metavar="DIR", help="where the images' paths start (default: where each file is)")
    p.add_argument("--limit", type=int, metavar="N", help="questions a task or file (default: 50 for attention, cka, "
                   "drop, else 250)")
    p.add_argument("--subsets", type=int, default=48, metavar="N", help="subsets of layers for drop (default: 48)")
    p.add_argument("--seed", type=int, default=0, help="of the questions and the subsets (default: 0)")
    p.add_argument("--out", default=RESULTS, metavar="DIR", help="where the files go (default: paper/results)")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: as many as there are idle "
                   "cores)")
    p.add_placement("float32")
    args = p.parse_args(argv)
    if args.threads not in (None, *range(1, 1025)) or args.seed < 0 or args.subsets < 2:
        p.error("--threads must be from 1 to 1,024, --seed at least 0, --subsets at least 2")
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit {args.limit}: ask at least one question")
    if args.images and args.data == "toy":
        p.error("--images: the miniature's world draws its own; give --data FILE too")
    return args


def main(argv=None):
    args = parse(argv)
    device = placement(args.device)
    torch.set_num_threads(args.threads or free_threads())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    subjects = {}
    for what in args.what or ANALYSES:
        name = args.model or ("nano/dense" if what in ("attention", "cka", "drop") else "nano")
        subject = subjects.get(name) or subjects.setdefault(name, Subject(name, args, device))
        if reason := subject.unfit(what):
            if args.what:
                raise ValueError(f"--what {what}: {name}: {reason}")
            print(f"no {what}: {name}: {reason}", file=sys.stderr)
            continue
        analyse, draw = ANALYSES[what]
        record, table = analyse(subject)
        record = {**about("analyse", argv), "model": name, "data": args.data, "limit": args.limit or LIMITS[what],
                  "seed": args.seed, "dtype": str(subject.model.dtype)[6:], "device": str(subject.model.device),
                  "plans": [plan_name(subject.config, plan) for plan in subject.config.plans], **record}
        print(f"{what}, {name}\n\n{table}\n", flush=True)
        with atomic(out / f"{what}.json") as beside:
            beside.write_text(json.dumps(record, allow_nan=False) + "\n")
        save_picture(out / f"{what}.png", draw, record)


def save_picture(path, draw, record):
    """The PNG, where matplotlib is installed."""
    try:
        plt = pyplot()
    except ImportError:
        print(f"no {path}: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    with plt.rc_context({"font.size": 12}):  # legible at half the size
        figure = draw(plt, record)
        with atomic(path) as beside:
            figure.savefig(beside, dpi=100, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run(main)
