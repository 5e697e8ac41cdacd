"""Which self-attention layers run: what each configuration can do and what it costs, and a policy that chooses.

    python router.py --search --model DIR    which sub-networks are viable (paper 4.2.3, appendix A)
    python router.py --label FILE            every configuration on a training subset, question by question (4.3)
    python router.py --report                what the router did (appendices B, C, D)

`examine` asks the same questions in several configurations; viable ones, pseudo-labels and reports come from its
records, one for each question. layers.Policy is the network, VLM.route asks it, train.py --stage 3 trains it on
`Lessons`. An exam is a list of (image, [(task, question, answer), ...]).
"""
import json
import sys
import zlib
from collections import Counter
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from config import Parser, run
from flops import connector_flops, llm_flops, name, router_flops, tower_flops

SMOOTHING = 0.06  # of the labels; without it a router has no doubt, not even about questions of kinds it never saw

# --- examinations ---------------------------------------------------------------------------------------------------

def batches(exam, config, batch_size=128, tokens=1 << 14):
    """The exam's pictures by number, in lists of those with equally many visual tokens and questions. A list has up to
    batch_size pictures, and no more than `tokens` visual tokens unless it is one picture."""
    groups = {}
    for i, (image, asked) in enumerate(exam):
        groups.setdefault((data.tiling(*image.size, config).tokens, len(asked)), []).append(i)
    sizes = {key: max(1, min(batch_size, tokens // key[0])) for key in groups}
    return [g[i:i + sizes[key]] for key, g in groups.items() for i in range(0, len(g), sizes[key])]


@torch.no_grad()
def examine(model, exam, configurations, only=None, progress=True):
    """Yields a list of records for each batch of pictures: one dict for each question.

    {"picture": number in the exam, "task", "question", "answer", "right": [1 or 0 for each configuration],
     "matches": [answer tokens before the first wrong one], "loss": [summed over the answer's tokens], "route": index
     of what the router chooses, where the model has one and the configurations are its own}

    An answer is right if greedy decoding gives exactly it: if every one of its tokens, and <|im_end|> after them, is
    the likeliest given those before. One teacher-forced forward tells that, and the loss with it. Pictures are seen
    once and asked many questions; and what configurations have in common, up to the first layer in which they differ,
    is computed once for all of them. only: of `batches`, those to examine (default: all).
    """
    shared, _ = data.split_shared(data.chatml([data.place_images("?", 1)]))
    todo = batches(exam, model.config) if only is None else only
    for numbers in tqdm(todo, desc="examination", disable=not progress, leave=False, ncols=80):
        pictures = [data.picture(exam[i][0], model.config) for i in numbers]
        seen = data.collate([data.encode(shared, model.tokenizer, [picture]) for picture in pictures])
        cache = model.new_cache(len(numbers), list(configurations), 64, seen.v_pos.shape[1])
        model.remember(seen, cache)
        records = []
        for asked in zip(*(exam[i][1] for i in numbers)):
            scored = score(model, [(q, a) for _, q, a in asked], cache)
            records += [{"picture": i, "task": task, "question": q, "answer": a, **result}
                        for i, (task, q, a), result in zip(numbers, asked, scored)]
        yield sorted(records, key=lambda r: r["picture"])


def score(model, pairs, cache):
    """What `examine` notes about a (question, answer) for each sample of a cache, in the cache's configurations."""
    prompts, labels = [], []
    for question, answer in pairs:
        asked = data.split_shared(data.chatml([data.place_images(question, 1)]))[1]
        prompt, learned = data.labelled([(asked, False), (answer + "<|im_end|>", True)], model.tokenizer,
                                        start=cache.end)
        prompts.append(prompt)
        labels.append(learned)
    batch, labels = data.collate(prompts), torch.from_numpy(data.pad(labels, -1))[:, 1:]
    part, due = model.read(batch, None, cache), labels >= 0
    results = [{"right": [], "matches": [], "loss": []} for _ in pairs]
    if model.router is not None and tuple(cache.configurations) == model.config.viable:
        for result, own in zip(results, model.route(part, batch.asks)):
            result["route"] = model.config.viable.index(own)
    for sa in cache.configurations:
        h = model.language_model.finish(part, sa)[:, :-1]
        logits, wanted = model.head(h[due.to(h.device)]).float().cpu(), labels[due]
        good, loss = torch.ones(due.shape), torch.zeros(due.shape)
        good[due] = (logits.argmax(-1) == wanted).float()
        loss[due] = F.cross_entropy(logits, wanted, reduction="none")
        run_of_hits = (good.cumprod(1) * due).sum(1)
        rows = zip(results, run_of_hits.tolist(), due.sum(1).tolist(), loss.sum(1).tolist())
        for result, hits, length, x in rows:
            result["right"].append(int(hits == length))
            result["matches"].append(int(hits))
            result["loss"].append(round(x, 5))
    return results


def all_records(model, exam, configurations, progress=True):
    """The records of a whole examination."""
    return [r for batch in examine(model, exam, configurations, progress=progress) for r in batch]


def accuracy(records, i):
    """{task: share of right answers in configuration number i}."""
    tasks = {}
    for r in records:
        tasks.setdefault(r["task"], []).append(r["right"][i])
    return {task: float(np.mean(right)) for task, right in tasks.items()}


# --- viable configurations (paper 4.2.3, appendix A) ----------------------------------------------------------------

def subnetworks(sa):
    """Configurations to try, by number of layers: all subsets of up to four candidates; of more, four families."""
    n = len(sa)
    if n <= 4:
        found = {tuple(l for i, l in enumerate(sa) if bits >> i & 1) for bits in range(1 << n)}
    else:
        found = {()}
        for k in range(1, n + 1):
            found.add(sa[:k])                                                      # early exit
            found.add(sa[n - k:])                                                  # the last ones, without the first
            found.add(sa[:1] + sa[n - k + 1:])                                     # the first, and the last ones
            found.add(tuple(sa[round(i * (n - 1) / max(k - 1, 1))] for i in range(k)))  # spread evenly
        found |= {(sa[0], l) for l in sa[1:]}                                      # the first, and any other
    return sorted(found, key=lambda x: (len(x), x))


def viable(config, configurations, records, keep=0.99, text=40, vision=1000):
    """The configurations worth training for, cheapest first.

    A configuration holds a task if it keeps `keep` of the full one's accuracy there; where that is 0 there is nothing
    to hold. It is viable if it holds at least one task, and no other one that costs less, or as much with a better
    mean, holds all that it holds.
    """
    full = accuracy(records, max(range(len(configurations)), key=lambda i: len(configurations[i])))
    rows = []
    for i, sa in enumerate(configurations):
        own = accuracy(records, i)
        held = {task for task in own if own[task] >= keep * full[task] > 0}
        rows.append((llm_flops(config, sa, text, vision), -float(np.mean(list(own.values()))), sa, held))
    rows.sort(key=lambda row: row[:3])
    return tuple(sa for i, (*_, sa, held) in enumerate(rows)
                 if held and not any(held <= other for *_, other in rows[:i]))


# --- pseudo-labels (paper 4.3, appendix D) --------------------------------------------------------------------------

def log_records(path, model, exam):
    """The records of an examination in all viable configurations, in a JSON Lines file that starts with a line about
    the exam. What the file has already is not done again. Raises ValueError if it is about something else."""
    path, todo = Path(path), batches(exam, model.config)
    sizes = [sum(len(exam[i][1]) for i in numbers) for numbers in todo]
    settings = {**vars(model.config), "router": False, "stage": "", "step": 0}
    about = {"model": zlib.crc32(json.dumps(settings).encode()), "exam": 0, "questions": sizes}
    for label, p in model.named_parameters():
        if not label.startswith("router."):
            about["model"] = zlib.crc32(p.detach().float().cpu().numpy().tobytes(), about["model"])
    for image, asked in exam:
        about["exam"] = zlib.crc32(image.tobytes() + json.dumps(asked).encode(), about["exam"])
    head = json.dumps({"viable": model.config.viable, **about})
    lines = path.read_text().split("\n") if path.is_file() else [""]
    cut = lines.pop()  # the last line, as far as it was written
    if lines and lines[0] != head or not lines and not head.startswith(cut):
        raise ValueError(f"{path} is about another model or exam; remove it, or name another file")
    kept, done = 1, 0  # whole batches only: the last one may have been cut short
    while done < len(todo) and kept + sizes[done] <= len(lines):
        kept, done = kept + sizes[done], done + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *lines[1:kept], ""]))
    with open(path, "a") as file:
        for records in examine(model, exam, model.config.viable, only=todo[done:]):
            file.write("".join(json.dumps(r) + "\n" for r in records))
            file.flush()
    return [json.loads(line) for line in path.read_text().split("\n")[1:-1]]


def cheapest(configurations, numbers, loss):
    """Of these configurations (by number), the one with the fewest layers, then the lowest loss."""
    return min(numbers, key=lambda i: (len(configurations[i]), loss[i]))


def labels_by_task(configurations, records, keep=0.99):
    """{task: number of the configuration}: fewest layers of those that keep `keep` of the full accuracy (4.3)."""
    right, loss = {}, {}
    for r in records:
        right.setdefault(r["task"], []).append(r["right"])
        loss.setdefault(r["task"], []).append(r["loss"])
    full = max(range(len(configurations)), key=lambda i: len(configurations[i]))
    labels = {}
    for task in right:
        acc = np.mean(right[task], axis=0)
        good = [i for i in range(len(configurations)) if acc[i] >= keep * acc[full]]
        labels[task] = cheapest(configurations, good, np.sum(loss[task], axis=0))
    return labels


def oracle(configurations, record):
    """The configuration, by number, with the most right tokens before the first wrong one, then the fewest layers, then
    the lowest loss (appendix D)."""
    best = max(record["matches"])
    return cheapest(configurations, [i for i, m in enumerate(record["matches"]) if m == best], record["loss"])


def pseudo_labels(configurations, records, per="task", leave_out=()):
    """[(picture, question, number of the configuration to choose)]. per: "task" (4.3) or "sample" (appendix D).
    leave_out: tasks that the router is not to learn from (appendix G)."""
    tasks = {r["task"] for r in records}
    if not set(leave_out) < tasks:
        raise ValueError(f"--leave-out {' '.join(sorted(leave_out))}: leave out some, not all, of "
                         f"{', '.join(sorted(tasks))}")
    by_task = labels_by_task(configurations, records)
    return [(r["picture"], r["question"], by_task[r["task"]] if per == "task" else oracle(configurations, r))
            for r in records if r["task"] not in leave_out]


# --- the policy (paper 4.3) -----------------------------------------------------------------------------------------

class Lessons:
    """Batches of questions and the configurations they are to be sent to; batch i is the same whenever asked for."""

    def __init__(self, model, exam, targets, seed, batch_size=256):
        """targets: of pseudo_labels, about this exam."""
        self.model, self.exam, self.targets, self.seed, self.batch_size = model, exam, targets, seed, batch_size

    def __getitem__(self, i):
        """(data.Batch, targets (B,))."""
        chosen = np.random.default_rng((self.seed, i)).integers(len(self.targets), size=self.batch_size)
        rows = [self.targets[k] for k in chosen]
        prompts = [data.encode(data.chatml([data.place_images(question, 1)]), self.model.tokenizer,
                               [data.picture(self.exam[picture][0], self.model.config)])
                   for picture, question, _ in rows]
        return data.collate(prompts), torch.tensor([target for *_, target in rows])

    def batches(self, first):
        """Batch after batch, from number `first` on."""
        return map(self.__getitem__, count(first))

    def losses(self, item, sa, step):
        """Cross-entropy of the policy. All else is frozen: only the routing token's way has gradients."""
        batch, targets = item
        with torch.no_grad():
            part = self.model.read(batch, "auto")
            self.model.language_model.run(part, self.model.config.viable[0], stop=self.model.config.fork)
        scores = self.model.policy(part, batch.asks)[:, 0]
        yield F.cross_entropy(scores, targets.to(scores.device), label_smoothing=SMOOTHING)


# --- reports --------------------------------------------------------------------------------------------------------

class Report:
    """Accuracy and saving of every configuration, of the router and of the oracle, by task and by group of tasks.

    Savings are operations of the dense model, without packing, over the mean of those that ran: "saving" of the
    language model's prefill, router included, "end_to_end" with the encoder too. "mean_saving" is the mean of the
    tasks' own savings, larger wherever they differ.
    """

    def __init__(self, config, records, groups, text, picture, dense=None):
        """records: of `examine` in config.viable, or in dense alone; groups: {"easy": [tasks], "hard": [tasks]};
        text: tokens of a usual prompt; picture: (width, height) of a usual one; dense: its records, if any."""
        self.config, self.groups = config, groups
        everything = tuple(range(config.layers))
        tiles, plain = (data.tiling(*picture, c) for c in (config, config.unpacked()))
        self.encoder, self.dense_encoder = (tower_flops(c, t.tiles) + connector_flops(c, t.tiles)
                                            for c, t in ((config, tiles), (config.unpacked(), plain)))
        self.dense = llm_flops(config, everything, text, plain.tokens)
        self.cost = {sa: llm_flops(config, sa, text, tiles.tokens) for sa in config.viable}
        self.labels = labels_by_task(config.viable, records) if config.viable else {}
        self.rows = []
        if dense or not config.viable:
            self.cost[everything] = self.dense
            self._add("dense", everything, dense or records, [everything], lambda r: 0)
        for i, sa in enumerate(config.viable):
            self._add(name(config, sa), sa, records, config.viable, lambda r, i=i: i)
        if config.viable and "route" in records[0]:
            extra = router_flops(config, text, tiles.tokens)
            self._add("router", None, records, config.viable, lambda r: r["route"], extra)
            self._add("oracle", None, records, config.viable, lambda r: oracle(config.viable, r))

    def _add(self, label, sa, records, configurations, choice, extra=0):
        """A row: what happens if record r is answered in configuration number choice(r)."""
        tasks = {}
        for r in records:
            tasks.setdefault(r["task"], []).append((choice(r), r["right"][choice(r)]))
        row = {"name": label, "sa": None if sa is None else list(sa), "tasks": {t: float(np.mean([ok for _, ok in x]))
                                                               for t, x in tasks.items()}}

        def account(names):
            """Of some tasks, each with the same weight: mean layers, savings, and shares of the configurations."""
            shares = Counter()
            for t in names:
                for i, _ in tasks[t]:
                    shares[configurations[i]] += 1 / len(tasks[t]) / len(names)
            cost = extra + sum(self.cost[own] * share for own, share in shares.items())
            return {"layers": sum(len(own) * share for own, share in shares.items()), "saving": self.dense / cost,
                    "end_to_end": (self.dense + self.dense_encoder) /
                    (cost + (self.dense_encoder if label == "dense" else self.encoder)),
                    "shares": {name(self.config, own): share for own, share in sorted(shares.items())}}
        row["by_task"] = {t: account([t]) for t in tasks}
        row["by_group"] = {g: account(names) for g, names in self.groups.items()}
        row["mean_saving"] = float(np.mean([x["saving"] for x in row["by_task"].values()]))
        row |= {g: float(np.mean([row["tasks"][t] for t in names])) for g, names in self.groups.items()}
        self.rows.append({**row, **account(list(tasks)), "questions": {t: len(x) for t, x in tasks.items()}})

    def text(self):
        """The table for the terminal: a line for each task, a column for each row."""
        lines = [["layers", *(row["name"].replace("dense", "all") for row in self.rows)],
                 ["saving", *(f"{row['saving']:.2f}x" for row in self.rows)]]
        for group, tasks in self.groups.items():
            lines += [[]] + [[task, *(f"{row['tasks'][task]:.3f}" for row in self.rows)] for task in tasks]
            lines.append([group.upper() + " mean", *(f"{row[group]:.3f}" for row in self.rows)])
        return columns(lines)

    def routes(self):
        """What the router did with each task: layers, savings, configurations in %, * that of its pseudo-label."""
        row = next(r for r in self.rows if r["name"] == "router")
        own = [name(self.config, sa) for sa in self.config.viable]
        lines = [["routed to, %", "layers", "LLM", "in all", *own]]
        for group, tasks in self.groups.items():
            for label, x in [*((t, row["by_task"][t]) for t in tasks), (group.upper(), row["by_group"][group])]:
                shares = [f"{100 * x['shares'][n]:.0f}" if n in x["shares"] else "." for n in own]
                if label in self.labels:
                    shares[self.labels[label]] += "*"
                lines.append([label, f"{x['layers']:.2f}", f"{x['saving']:.2f}x", f"{x['end_to_end']:.2f}x", *shares])
        return columns(lines) + "\n* the pseudo-label of these questions"

    def save(self, path):
        Path(path).write_text(json.dumps({"groups": self.groups, "rows": self.rows}, indent=1) + "\n")

    def draw(self, path):
        """Two panels: accuracy against saving, a point for each configuration and group; accuracy by task; and where
        there is a router a third, what it chose. ImportError without matplotlib, which only drawing needs."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        routed = [r for r in self.rows if r["sa"] is None]
        fixed = [r for r in self.rows if r["sa"] is not None]
        figure, axes = plt.subplots(1, 3 if routed else 2, figsize=(19 if routed else 13, 5), constrained_layout=True,
                                    width_ratios=(1, 1.35, 1)[:3 if routed else 2])
        left, right = axes[:2]
        for group, colour in zip(self.groups, ("tab:blue", "tab:red")):
            x, y = [r["saving"] for r in fixed], [r[group] for r in fixed]
            left.plot(x, y, "o", color=colour, label=group)
            left.plot(*frontier(x, y), color=colour, alpha=0.4)
            for r, marker in zip(routed, "*P"):
                left.plot(r["by_group"][group]["saving"], r[group], marker, color=colour, markersize=14,
                          markeredgecolor="black", label=f"{group}, {r['name']}")
        for r in fixed:
            left.annotate(r["name"], (r["saving"], r[list(self.groups)[-1]]), xytext=(6, -4), fontsize=8,
                          textcoords="offset points")
        left.set(xlabel="times fewer operations in the language model than dense", ylabel="accuracy", ylim=(0, 1.05),
                 title="what each configuration costs and can do")
        left.set_xlim(left=0.5, right=1.15 * max(r["saving"] for r in self.rows))
        left.legend(loc="lower left", fontsize=8)
        tasks = [task for names in self.groups.values() for task in names]
        values = np.array([[r["tasks"][t] for t in tasks] for r in self.rows])
        heat(right, values, [r["name"] for r in self.rows], tasks)
        right.axvline(len(next(iter(self.groups.values()))) - 0.5, color="white", linewidth=3)
        right.set_title("accuracy by self-attention layers (rows) and task: " + " | ".join(self.groups))
        if routed:
            start = np.zeros(len(tasks))
            for k, sa in enumerate(self.config.viable):
                label = name(self.config, sa)
                share = np.array([routed[0]["by_task"][t]["shares"].get(label, 0) for t in tasks])
                axes[2].barh(range(len(tasks)), share, left=start, label=label,
                             color=plt.cm.viridis(k / max(1, len(self.config.viable) - 1)))
                start += share
            axes[2].set_yticks(range(len(tasks)), tasks)
            axes[2].invert_yaxis()
            axes[2].set(xlim=(0, 1), xlabel="share of questions", title="what the router chose")
            axes[2].legend(fontsize=8, loc="lower center", ncols=len(self.config.viable), bbox_to_anchor=(0.5, -0.25))
        figure.savefig(path, dpi=90)
        plt.close(figure)


def columns(lines, first=14, width=80):
    """Lines of cells as text: the first left, the others right-aligned; what does not fit goes into a block below."""
    cell = max(6, *(len(x) + 1 for line in lines for x in line[1:]))
    n = (width - first) // cell
    blocks = range(1, max(map(len, lines)), n)
    return "\n\n".join("\n".join("".join([f"{line[0]:<{first}}", *(f"{x:>{cell}}" for x in line[i:i + n])])
                                  if line else "" for line in lines) for i in blocks)


def heat(axes, values, rows, columns):
    """A heat map of values (rows, columns) from 0 to 1, with the numbers in it."""
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, j in np.ndindex(*values.shape):
        axes.text(j, i, f"{values[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=9,
                  color="black" if values[i, j] > 0.6 else "white")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)


def frontier(x, y):
    """The points that none with at least as much x beats in y, as two lists in the order of x."""
    best = sorted((a, b) for a, b in zip(x, y) if not any(c >= a and d > b for c, d in zip(x, y)))
    return [a for a, _ in best], [b for _, b in best]


def report(model, exam, groups, text, picture, out=None):
    """Prints what the configurations can do and what the router does in an exam. As in Report; out: a .png to draw."""
    found = Report(model.config, all_records(model, exam, model.config.viable), groups, text, picture)
    print(found.text() + "\n\n" + found.routes())
    if out:
        found.draw(out)


# --- command line ---------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(description="What each configuration can do, what it costs, and what the router makes of it.")
    p.add_argument("--search", action="store_true", help="examine sub-networks of a model trained with all its "
                   "candidates, draw a heat map, and write the viable ones into the model's config.json")
    p.add_argument("--label", metavar="FILE", help="all viable configurations on training questions, a line for each "
                   "to FILE, where it goes on if stopped; prints the pseudo-labels")
    p.add_argument("--report", action="store_true", help="accuracy, savings and choices of the router, by task")
    p.add_argument("--model", metavar="DIR", help="(default: nano, the one beside this script)")
    p.add_argument("--data", default="toy", metavar="FILE", help="toy (default), a training file, or a mixture of them")
    p.add_argument("--images", metavar="DIR", help="where the pictures' paths start (default: where each file is)")
    p.add_argument("--exam", type=int, default=250, metavar="N", help="questions a task or file (default: 250)")
    p.add_argument("--seed", type=int, default=0, help="of the questions (default: 0)")
    p.add_argument("--keep", type=float, default=0.99, metavar="F", help="share of accuracy to hold (default: 0.99)")
    p.add_argument("--out", metavar="FILE.png", help="where --search and --report draw (default: nowhere)")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    args = p.parse_args(argv)
    if args.search + bool(args.label) + args.report != 1:
        p.error("give one of --search, --label FILE and --report")
    if args.exam < 1 or args.seed < 0 or (args.threads or 1) < 1 or not 0 < args.keep <= 1:
        p.error("--exam and --threads must be at least 1, --seed at least 0, --keep above 0 and at most 1")
    if args.out and (not args.out.endswith(".png") or not Path(args.out).parent.is_dir()):
        p.error(f"--out {args.out}: give a .png file in a directory that exists")
    return args


def main(argv=None):
    args = parse(argv)
    import toy
    from model import VLM
    from train import DENSE, GROUPS, USUAL
    if args.out and not find_spec("matplotlib"):
        raise ValueError("--out needs matplotlib: pip install matplotlib")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    directory = Path(args.model or DENSE.parent)
    model = VLM.from_pretrained(directory)
    c = model.config
    if not c.sa:
        raise ValueError(f"{directory} is a dense model: train stages 1 and 2 first")
    if args.data != "toy":
        from mixture import Exam, Samples
        exam = Exam(Samples(args.data, args.images, model.tokenizer, c, seed=args.seed), args.exam, args.seed)
        usual = exam.usual()
    elif c.world != "toy":
        raise ValueError(f"{directory} does not know toy.py's world: give questions for it with --data FILE")
    else:
        exam, usual = toy.exam(args.seed, args.exam, *[] if args.report else [toy.TRAIN]), (GROUPS, *USUAL)
    if args.search:
        search(model, directory, exam, usual[0], args)
    elif args.label:
        records = log_records(args.label, model, exam)
        for task, i in labels_by_task(c.viable, records, args.keep).items():
            print(f"{task:<14} {name(c, c.viable[i])}")
    elif model.router is None:
        raise ValueError(f"{directory} has no router: python train.py --stage 3 --model {directory} trains one")
    else:
        report(model, exam, *usual, args.out)


def search(model, directory, exam, groups, args):
    """Which sub-networks hold what the largest configuration can do; the viable ones go into config.json."""
    c = model.config
    if c.router:
        raise ValueError(f"{directory} has a router, which knows its viable configurations only; search before stage 3")
    tried, tasks = subnetworks(c.sa), [t for names in groups.values() for t in names]
    records = all_records(model, exam, tried)
    own, names = [accuracy(records, i) for i in range(len(tried))], [name(c, sa) for sa in tried]
    share = np.array([[x[t] / own[-1][t] if own[-1][t] else 0.0 for t in tasks] for x in own])
    found = viable(c, tried, records, args.keep)
    stars = [label + "*" * (sa in found) for sa, label in zip(tried, names)]
    print(columns([["layers", *stars], *([t, *(f"{x:.2f}" for x in row)] for t, row in zip(tasks, share.T))]))
    if len(found) < 2:
        raise ValueError(f"{directory}: {len(found)} viable configurations, nothing to choose from; train it longer")
    c.viable = found
    beside = directory / "config.json.writing"
    beside.write_text(c.to_json())
    beside.replace(directory / "config.json")
    print(f"{directory}/config.json: {len(found)} viable configurations, marked *", file=sys.stderr)
    if args.out:
        from matplotlib import pyplot as plt
        figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(tried)), constrained_layout=True)
        heat(axes, share, stars, tasks)
        axes.set_title(f"accuracy relative to {names[-1]}; * viable")
        figure.savefig(args.out, dpi=90)


if __name__ == "__main__":
    run(main)
