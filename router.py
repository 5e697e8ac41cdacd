"""What a question needs: which plans are viable, which one is right for a question, what the policy learns from.

    python router.py --search --model DIR    which sub-networks are viable (paper 4.2.3, appendix A)
    python router.py --label FILE            every configuration on a training subset, question by question (4.3)
    python router.py --report                what the router did (appendices B, C, D)

All of it is made from results of evaluation.evaluate. layers.Policy is the network, VLM.overview_will_do and VLM.route
call it, train.py --stage 3 trains it on RouterBatches.
"""
import json
import sys
import zlib
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import report
import weights
from cli import Parser, append_rows, atomic, checkpoint_path, free_threads, placement, run
from config import Plan, plan_name, sa_name
from evaluation import accuracy, all_results, evaluate, opened
from flops import llm_flops
from llava.samples import Samples, eval_questions, reference_prompt
from methods import add_flags, given, warn_untrained
from model import VLM
from toy import world

NOT_INSIDE = "it is for the dense configuration, and a router chooses among others"


def largest(plans):
    """The number of the plan with the most layers over all pixels, the "full model" of 4.3."""
    return max(range(len(plans)), key=lambda i: (plans[i].pixels == "all", len(plans[i].sa)))


# --- viable configurations (paper 4.2.3, appendix A) ----------------------------------------------------------------

def subnetworks(sa):
    """Configurations to try, by number of layers: all subsets of up to four candidates; of more, four families."""
    n = len(sa)
    if n <= 4:                                                                     # 16 at most: try them all
        found = {tuple(l for i, l in enumerate(sa) if bits >> i & 1) for bits in range(1 << n)}  # 2^n (appendix A)
    else:                                                                          # 2^8 would be too many
        found = {()}
        for k in range(1, n + 1):                                                  # with k layers:
            found.add(sa[:k])                                                      # early exit
            found.add(sa[n - k:])                                                  # the last ones, without the first
            found.add(sa[:1] + sa[n - k + 1:])                                     # the first, and the last ones
            found.add(tuple(sa[round(i * (n - 1) / max(k - 1, 1))] for i in range(k)))  # spread evenly
        found |= {(sa[0], l) for l in sa[1:]}                                      # the first, and any other
    return sorted(found, key=lambda x: (len(x), x))                                # the largest last


def viable(config, configurations, results, keep=0.99, text=40, vision=1000):
    """The configurations worth training for, cheapest first.

    A configuration holds a task if it keeps `keep` of the full one's accuracy there; where that is 0 there is nothing
    to hold. It is viable if it holds at least one task, and no other one that costs less, or as much with a better
    mean, holds all that it holds.
    """
    full = accuracy(results, largest([Plan(sa) for sa in configurations]))  # what there is to hold
    candidates = []  # (cost, -mean accuracy, configuration, the tasks that it holds)
    for i, sa in enumerate(configurations):
        own = accuracy(results, i)
        held = {task for task in own if own[task] >= keep * full[task] > 0}
        candidates.append((llm_flops(config, sa, text, vision), -float(np.mean(list(own.values()))), sa, held))
    candidates.sort(key=lambda x: x[:3])  # by cost, then by accuracy
    found, cheaper = [], []               # `cheaper`: what each configuration so far holds
    for *_, sa, held in candidates:
        if held and not any(held <= other for other in cheaper):  # it brings a task that none before it holds
            found.append(sa)
        cheaper.append(held)
    return tuple(found)


# --- pseudo-labels (paper 4.3, appendix D) --------------------------------------------------------------------------

def log_results(path, model, eval_set):
    """Results of all of a model's plans, also in a JSON Lines file whose first line says of what. What the file has
    already is not done again. Raises ValueError if the file is about something else."""
    path = Path(path)
    head = json.dumps({"plans": model.config.plans, **fingerprint(model, eval_set)})
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else [""]  # "" stands for the head to come
    unfinished = lines.pop()  # the last line, as far as it was written
    other = lines[0] != head if lines else not head.startswith(unfinished)
    if other:
        raise ValueError(f"{path} is about another model or evaluation set; remove it, or name another file")
    found, batch = [], []     # whole batches only: the last one may have been cut short, or any be damaged
    for line in lines[1:]:
        row = read_result(line, model, eval_set)
        if row is None or batch and row["left"] != batch[-1]["left"] - 1:
            break
        batch.append(row)
        if row["left"] == 0:
            found += batch
            batch = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as beside:
        beside.write_text("\n".join([head, *lines[1:1 + len(found)], ""]))
    for results in evaluate(model, eval_set, model.config.plans, {row["image"] for row in found}):
        rows = [{**r, "left": len(results) - i} for i, r in enumerate(results, 1)]  # rows of its batch that follow
        append_rows(path, rows)  # a kill costs one batch
        found += rows
    return sorted(found, key=lambda r: r["image"])


def read_result(line, model, eval_set):
    """What `evaluate` has said about a question of this set, from its line in a file; None where that is damaged."""
    try:
        r = json.loads(line)
        whole = all(len(r[k]) == len(model.config.plans) and np.isfinite(r[k]).all()
                    for k in ("correct", "prefix_match", "loss"))
        whole = whole and type(r["left"]) is int and (r["task"], r["question"], r["answer"]) in eval_set[r["image"]][1]
        return r if whole else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def fingerprint(model, eval_set):
    """Checksums of a model, its router left out, and of an evaluation set, its images as they stand in their files."""
    settings = {**vars(model.config), "router": False, "route_threshold": 0, "stage": "", "step": 0}  # no history
    of_model, of_set = zlib.crc32(json.dumps(settings).encode()), 0
    for label, p in weights.stored(model).items():
        if not label.startswith("router."):
            of_model = zlib.crc32(p.detach().float().cpu().numpy().tobytes(), of_model)
    for image, questions in eval_set:
        content = image.read_bytes() if isinstance(image, Path) else image.tobytes()
        of_set = zlib.crc32(content + json.dumps(questions).encode(), of_set)
    return {"model": of_model, "eval_set": of_set}


def cheapest(plans, numbers, loss):
    """Of these plans (by number), the one that is cheapest to the first token: over the overview if it may be, with the
    fewest layers; then the lowest loss."""
    return min(numbers, key=lambda i: (plans[i].pixels == "all", len(plans[i].sa), loss[i]))


def labels_by_task(plans, results, keep=0.99, among=None):
    """{task: number of the plan}: the cheapest of those that keep `keep` of the full accuracy (4.3). among: the numbers
    of those to choose from (default: all)."""
    correct, loss = {}, {}  # task: a row for each question, a column for each plan
    for r in results:
        correct.setdefault(r["task"], []).append(r["correct"])
        loss.setdefault(r["task"], []).append(r["loss"])
    full, labels = largest(plans), {}
    for task in correct:
        acc = np.mean(correct[task], axis=0)           # (plans,)
        good = [i for i in among or range(len(plans)) if acc[i] >= keep * acc[full]]
        labels[task] = cheapest(plans, good, np.sum(loss[task], axis=0))  # "the lowest aggregate loss"
    return labels


def oracle(plans, result, among=None):
    """The plan, by number, with the most correct tokens before the first wrong one, then the cheapest, then the lowest
    loss (appendix D). among: as in labels_by_task."""
    among = among or range(len(plans))
    best = max(result["prefix_match"][i] for i in among)  # tokens that agree with the ground truth
    return cheapest(plans, [i for i in among if result["prefix_match"][i] == best], result["loss"])


def pseudo_labels(plans, results, per="task", leave_out=()):
    """[(image, question, whether the overview will do, the configuration over all pixels)]: what the router is to say.
    per: "task" (4.3) or "sample" (appendix D). leave_out: tasks that the router is not to learn from (appendix G).
    Raises ValueError."""
    tasks = {r["task"] for r in results}               # of a mixture its files
    if not set(leave_out) < tasks:
        raise ValueError(f"--leave-out {' '.join(sorted(leave_out))}: leave out some, not all, of "
                         f"{', '.join(sorted(tasks))}")
    whole = [i for i, plan in enumerate(plans) if plan.pixels == "all"]
    best, over_all = (labels_by_task(plans, results, among=own) for own in (None, whole))  # one for a whole subset

    def label(r, among, by_task):
        return plans[by_task[r["task"]] if per == "task" else oracle(plans, r, among)]
    return [(r["image"], r["question"], label(r, None, best).pixels == "overview", label(r, whole, over_all).sa)
            for r in results if r["task"] not in leave_out]


# --- what the policy learns from (paper 4.3) ------------------------------------------------------------------------

class RouterBatches:
    """Batches of questions, whether the overview will do for them, and the configurations they are to be sent to over
    all pixels; deterministic: batch i depends only on (seed, i)."""

    def __init__(self, model, eval_set, targets, seed, batch_size=256, label_smoothing=0.0):
        """targets: of pseudo_labels, about this evaluation set."""
        self.model, self.eval_set, self.targets = model, eval_set, targets  # its router is the one that learns
        self.seed, self.batch_size, self.label_smoothing = seed, batch_size, label_smoothing
        self.tokens = None  # of a step: training files count them

    def __getitem__(self, i):
        """(prompts over all pixels, whether the overview will do (B,), numbers of viable configurations (B,))."""
        drawn = np.random.default_rng((self.seed, i)).integers(len(self.targets), size=self.batch_size)  # (B,)
        prompts, c = [], self.model.config
        for image, question, *_ in (self.targets[k] for k in drawn):
            processed = data.process_image(opened(self.eval_set[image][0]), c)
            text = data.chatml([data.place_images(question, 1, c)])
            prompts.append(data.encode(text, self.model.tokenizer, [processed]))
        enough, sa = zip(*(self.targets[k][2:] for k in drawn))
        return prompts, torch.tensor(enough), torch.tensor([c.viable.index(own) for own in sa])

    def batches(self, first):
        """Batch after batch, from number `first` on."""
        return map(self.__getitem__, count((3 << 40) + first))  # no stage draws what another one has drawn

    def plan(self, step):
        """None: a router is trained in no configuration."""

    def losses(self, item, plan, step):
        """Yields the cross-entropies of the policy, for the configuration and, where it has them to decide on, for the
        pixels. All else is frozen: only what the routing token runs through has gradients."""
        prompts, enough, configurations = item
        c, policy = self.model.config, self.model.router
        scores = self.scores(policy.layers, prompts, "all", c.route_layer)                            # (B, viable)
        yield F.cross_entropy(scores, configurations.to(scores.device), label_smoothing=self.label_smoothing)
        small = [data.overview(p, c) for p in prompts]
        rows = [i for i, p in enumerate(small) if p]
        if policy.pixels is not None and rows:
            scores = self.scores(policy.pixels, [small[i] for i in rows], "overview", c.pixel_layer)[:, 0]
            wanted = enough[rows].to(scores) * (1 - self.label_smoothing) + self.label_smoothing / 2  # (rows,)
            yield F.binary_cross_entropy_with_logits(scores, wanted)

    def scores(self, reader, prompts, pixels, stop):
        """What a part of the policy says before layer `stop` of prompts of one question each, (B, choices)."""
        with torch.no_grad():  # the prompt, up to there
            tree = self.model.prefill(prompts, "auto", 0, pixels=pixels)
            tree.shared(stop)
        return self.model.scores(reader, tree, [p.answer_starts for p in prompts], stop)[:, 0]


def conservative_threshold(label_smoothing, n):
    """config.route_threshold of a router that learns with label smoothing to choose among n configurations: twice what
    the smoothing alone gives to each that is wrong, so that it is not taken for doubt. Without smoothing the likeliest.
    """
    return 2 * label_smoothing / n if label_smoothing else 1.0


# --- reports --------------------------------------------------------------------------------------------------------

def summarise(config, results, groups, text, image_size, dense=None):
    """report.Report with a row for dense, every plan, the router and the oracle.

    results: of `evaluate` with config.plans, or of dense alone; dense: results of the dense model, if any; groups,
    text, image_size: as in report.Report.
    """
    table, plans = report.Report(config, groups, text, image_size), config.plans
    # Each row says with which plan, by number, it answers result r
    everything = Plan(tuple(range(config.layers)))
    if dense or not plans:
        table.add("dense", everything, dense or results, [everything], lambda r: 0)
    for i, plan in enumerate(plans):
        table.add(plan_name(config, plan), plan, results, plans, lambda r, i=i: i)
    if plans:
        table.labels = labels_by_task(plans, results)
        if "route" in results[0]:
            table.add("router", None, results, plans, lambda r: r["route"], table.router_flops)
            table.add("oracle", None, results, plans, lambda r: oracle(plans, r))
    return table


# --- command line ---------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(doc=__doc__,
               description="What each configuration can do, what it costs, and what the router makes of it.")
    p.add_argument("--search", action="store_true", help="evaluate sub-networks of a model trained with all its "
                   "candidates, draw a heat map, and write the viable ones into the model's config.json")
    p.add_argument("--label", metavar="FILE", help="all viable configurations on training questions, a line for each "
                   "to FILE, where it goes on if stopped; prints the pseudo-labels")
    p.add_argument("--report", action="store_true", help="accuracy, savings and choices of the router, by task")
    p.add_argument("--model", default="nano", metavar="DIR", help="(default: nano, the one beside this script)")
    p.add_argument("--data", default="toy", metavar="FILE", help="toy (default), a training file, or a mixture of them")
    p.add_argument("--images", metavar="DIR", help="where the images' paths start (default: where each file is)")
    p.add_argument("--questions", type=int, default=250, metavar="N", help="a task or file (default: 250)")
    p.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    p.add_argument("--keep", type=float, default=0.99, metavar="F", help="share of accuracy to hold (default: 0.99)")
    p.add_argument("--out", metavar="FILE.png", help="where --search and --report draw (default: nowhere)")
    p.add_placement()
    add_flags(p)
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: as many as there are idle "
                   "cores)")
    p.add_argument("--compile", action="store_true", help="torch.compile what repeats (see VLM.compile)")
    args = p.parse_args(argv)
    given(p, args, NOT_INSIDE)
    if args.reduce is not None and args.search:
        p.error(f"--reduce {args.reduce or 'none'}: --search is about a model as it is; leave it out")
    if args.search + bool(args.label) + args.report != 1:
        p.error("give one of --search, --label FILE and --report")
    if args.questions < 1 or args.seed < 0 or not 1 <= (args.threads or 1) <= 1024 or not 0 < args.keep <= 1:
        p.error("--questions must be at least 1, --threads from 1 to 1,024, --seed at least 0, --keep above 0 and at "
                "most 1")
    if args.out and (not args.out.endswith(".png") or not Path(args.out).parent.is_dir()):
        p.error(f"--out {args.out}: give a .png file in a directory that exists")
    return args


def main(argv=None):
    args = parse(argv)
    if args.out and not find_spec("matplotlib"):
        raise ValueError("--out needs matplotlib: pip install matplotlib")
    torch.set_num_threads(args.threads or free_threads())
    directory = Path(checkpoint_path(args.model))
    model = VLM.from_pretrained(directory, args.dtype, placement(args.device))
    model.config.bound_pixels(args)
    if args.reduce is not None:
        warn_untrained(args.reduce, model.config.reduce, args.model)
        model.add_reduction(args.reduce)
    c = model.config
    if c.reduction.inside:
        raise ValueError(f"{args.model}: --reduce {c.reduce}: {NOT_INSIDE}; give --reduce none")
    if args.compile:
        model.compile()
    if not c.sa:
        raise ValueError(f"{directory} is a dense model: train stages 1 and 2 first")
    if args.data != "toy":
        samples = Samples(args.data, args.images, model.tokenizer, c, seed=args.seed)
        eval_set = eval_questions(samples, args.questions, args.seed)
    elif c.world != "toy":
        raise ValueError(f"{directory} does not know the miniature's world: give questions for it with --data FILE")
    else:
        split = world.EVAL if args.report else world.TRAIN  # labels and searches never see held-out questions
        eval_set = world.eval_set(args.seed, args.questions, split)
    if args.search:  # appendix A
        search(model, directory, eval_set, args)
    elif args.label:  # 4.3
        results = log_results(args.label, model, eval_set)
        for task, i in labels_by_task(c.plans, results, args.keep).items():
            print(f"{task:<14} {plan_name(c, c.plans[i])}")
    elif model.router is None:
        raise ValueError(f"{directory} has no router: python train.py --stage 3 --model {directory} trains one")
    else:
        results = all_results(model, eval_set, c.plans)
        reference = ((world.STRATA, *world.REFERENCE_PROMPT) if args.data == "toy" else
                     reference_prompt(samples, eval_set, results))
        table = summarise(c, results, *reference)  # appendices B, C, D
        print(table.text() + "\n\n" + table.routes())
        if args.out:
            table.draw(args.out)


def search(model, directory, eval_set, args):
    """Which sub-networks hold what the largest configuration can do; the viable ones go into config.json."""
    c = model.config
    if c.router:
        raise ValueError(f"{directory} has a router, made for its viable configurations; search before stage 3")
    tried = subnetworks(c.sa)
    results = all_results(model, eval_set, [Plan(sa) for sa in tried])
    own = [accuracy(results, i) for i in range(len(tried))]
    tasks = [t for names in world.STRATA.values() for t in names] if args.data == "toy" else list(own[0])
    share = np.array([[x[t] / own[-1][t] if own[-1][t] else 0.0 for t in tasks] for x in own])  # (tried, tasks)
    found = viable(c, tried, results, args.keep)
    names = [sa_name(c, sa) + "*" * (sa in found) for sa in tried]
    print(report.columns([["layers", *names], *([t, *(f"{x:.2f}" for x in row)] for t, row in zip(tasks, share.T))]))
    if len(found) < 2:  # the model can do too little: every sub-network falls with the largest
        raise ValueError(f"{directory}: {len(found)} viable configurations, nothing to choose from; train it longer")
    c.viable, c.overview = found, tuple(sa for sa in c.overview if sa in found)  # stage 2 will draw from these
    with atomic(directory / "config.json") as beside:
        beside.write_text(c.to_json())
    print(f"{directory}/config.json: {len(found)} viable configurations, marked *", file=sys.stderr)
    if args.out:
        report.draw_heat_map(args.out, share, names, tasks,
                             f"accuracy relative to {sa_name(c, tried[-1])}; * viable")


if __name__ == "__main__":
    run(main)
