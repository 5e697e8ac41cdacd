"""Which self-attention layers run: what each configuration can do and what it costs, and what the policy learns from.

    python router.py --search --model DIR    which sub-networks are viable (paper 4.2.3, appendix A)
    python router.py --label FILE            every configuration on a training subset, question by question (4.3)
    python router.py --report                what the router did (appendices B, C, D)

`evaluate` asks the same questions in several configurations and gives a result for each question; viable
configurations, pseudo-labels and reports are made from these results. layers.Policy is the network, VLM.route calls it,
train.py --stage 3 trains it on RouterBatches. An evaluation set is a list of (PIL image or path of one, [(task,
question, answer), ...]).
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
from tqdm import tqdm

import data
import pictures
import report
from cli import Parser, append_rows, atomic, checkpoint_path, free_threads, not_finite, placement, run
from flops import llm_flops, sa_name
from layout import upload
from llava.samples import Samples, eval_questions, reference_prompt
from model import VLM
from toy import world

# --- evaluation -----------------------------------------------------------------------------------------------------

def image_batches(eval_set, config, done=(), progress=False, batch_size=128, tokens=1 << 14, waiting=1 << 29):
    """Lists of (number, data.ProcessedImage, questions) of the set's images, of those with equally many visual tokens
    and questions, so that no visual tokens are padded.

    Each image is decoded once and waits until its list has batch_size images or would pass `tokens` visual tokens with
    another; where more than `waiting` bytes wait, the largest list goes. An image that cannot be read is named on
    stderr and passed over. done: numbers of images to leave out. Raises ValueError where none can be read.
    """
    groups, unread = {}, 0  # (visual tokens, questions): those that wait
    for i, (image, questions) in enumerate(tqdm(eval_set, "evaluation", disable=not progress, leave=False, ncols=80)):
        if i in done:
            continue
        try:
            x = data.process_image(opened(image), config)
        except data.SampleError as e:
            tqdm.write(f"{e}; passed over", file=sys.stderr)
            unread += 1
            continue
        kind = x.tiling.tokens, len(questions)
        groups.setdefault(kind, []).append((i, x, questions))
        size = {k: sum(x.pixels.nbytes for _, x, _ in group) for k, group in groups.items()}
        if len(groups[kind]) >= min(batch_size, tokens // x.tiling.tokens):
            yield groups.pop(kind)
        elif sum(size.values()) > waiting:
            yield groups.pop(max(size, key=size.get))
    yield from groups.values()
    if unread == len(eval_set):
        raise ValueError("none of the images can be read: nothing to evaluate")


def opened(image):
    """The PIL image of an evaluation set, which has paths where it comes from a file."""
    return pictures.load_image(image) if isinstance(image, Path) else image


@torch.no_grad()
def evaluate(model, eval_set, configurations, done=(), progress=True):
    """Yields a list of results for each batch of images: one dict for each question.

    {"image": number in the set, "task", "question", "answer", "correct": [1 or 0 for each configuration],
     "prefix_match": [answer tokens before the first wrong one], "loss": [summed over the answer's tokens], "route":
     index of what the router chooses, where the model has one and the configurations are its own}

    An answer is correct if greedy decoding gives exactly it: if each of its tokens, and <|im_end|> after them, is the
    likeliest given those before. One teacher-forced forward tells that, and the loss with it. Each image is decoded and
    encoded once; what configurations have in common is computed once for all of them, as they walk one CacheTree. done,
    progress: as in image_batches.
    """
    prefix, _ = data.split_shared(data.chatml([data.place_images("?", 1)]))  # system text and image
    for batch in image_batches(eval_set, model.config, done, progress):
        prompts = [data.encode(prefix, model.tokenizer, [x]) for _, x, _ in batch]
        tree = model.prefill(prompts, list(configurations), 64)
        results = []                                                         # of this batch
        for asked in zip(*(questions for *_, questions in batch)):           # the k-th question of every image
            scores = score_answers(model, [(q, a) for _, q, a in asked], tree)
            results += [{"image": i, "task": task, "question": q, "answer": a, **score}
                        for (i, *_), (task, q, a), score in zip(batch, asked, scores)]
        yield sorted(results, key=lambda r: r["image"])


def score_answers(model, pairs, tree):
    """What `evaluate` says about one (question, answer) for each sample of a tree, in the tree's configurations."""
    prompts, labels = [], []                                                 # what follows the images
    for question, answer in pairs:
        text = data.split_shared(data.chatml([data.place_images(question, 1)]))[1]  # behind the image
        prompt, label = data.labelled([(text, False), (answer + "<|im_end|>", True)], model.tokenizer, start=tree.end)
        prompts.append(prompt)
        labels.append(label)
    batch, labels = data.collate(prompts), data.pad(labels, -1)              # (B, Nt) where an answer stands, else -1
    is_target = data.target_mask(labels, batch.t_pos)                        # (B, Nt - 1)
    sample, token = is_target.nonzero()                                      # on the host
    on = upload(model.device, index=sample * labels.shape[1] + token, targets=labels[sample, token + 1])
    segments = len(tree.segments)
    model.extend(tree, batch)                                                # the layers that all configurations share
    routes = []
    if model.router is not None and tuple(tree.configurations) == model.config.viable:
        routes = model.route(tree, batch.answer_starts)                      # before the answer: it is not seen
    found = []                                                               # (2, targets) of each configuration
    for sa in tree.configurations:                                           # each goes on where they branch
        h = tree.run(sa)[0].flatten(0, 1).index_select(0, on.index)          # (targets, d)
        logits = model.head(model.language_model.norm(h))                    # (targets, vocab) stay on the device
        loss = F.cross_entropy(logits.float(), on.targets, reduction="none")
        found.append(torch.stack([logits.argmax(-1) == on.targets, loss]))
    hit, loss = np.ones((len(found), *is_target.shape)), np.zeros((len(found), *is_target.shape))
    hit[:, sample, token], loss[:, sample, token] = torch.stack(found, 1).cpu().numpy()  # the only thing read back
    for sa, own in zip(tree.configurations, loss):
        if not np.isfinite(own).all():
            raise not_finite(f"the loss of configuration {sa_name(model.config, sa)}", logits.dtype)
    matches = (hit.cumprod(2) * is_target).sum(2).astype(int)                # targets before the first wrong one
    scores = [{"correct": [int(n == length) for n in own],                   # the whole answer, and where it ends
               "prefix_match": own.tolist(), "loss": [round(x, 5) for x in losses.tolist()]}
              for own, length, losses in zip(matches.T, is_target.sum(1), loss.sum(2).T)]
    for score, sa in zip(scores, routes):
        score["route"] = model.config.viable.index(sa)
    tree.truncate(segments)                                                  # ready for the next question
    return scores


def all_results(model, eval_set, configurations, progress=True):
    """The results of a whole evaluation, in the order of its images."""
    results = [r for batch in evaluate(model, eval_set, configurations, progress=progress) for r in batch]
    return sorted(results, key=lambda r: r["image"])


def accuracy(results, i):
    """{task: share of correct answers in configuration number i}."""
    tasks = {}  # task: [1 or 0 for each question]
    for r in results:
        tasks.setdefault(r["task"], []).append(r["correct"][i])
    return {task: float(np.mean(correct)) for task, correct in tasks.items()}


def largest(configurations):
    """The number of the configuration with the most layers, the "full model" of 4.3."""
    return max(range(len(configurations)), key=lambda i: len(configurations[i]))


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
    full = accuracy(results, largest(configurations))  # what there is to hold
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
    """Results in all viable configurations, also in a JSON Lines file whose first line says of what. What the file has
    already is not done again. Raises ValueError if the file is about something else."""
    path = Path(path)
    head = json.dumps({"viable": model.config.viable, **fingerprint(model, eval_set)})
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
    for results in evaluate(model, eval_set, model.config.viable, {row["image"] for row in found}):
        rows = [{**r, "left": len(results) - i} for i, r in enumerate(results, 1)]  # rows of its batch that follow
        append_rows(path, rows)  # a kill costs one batch
        found += rows
    return sorted(found, key=lambda r: r["image"])


def read_result(line, model, eval_set):
    """What `evaluate` has said about a question of this set, from its line in a file; None where that is damaged."""
    try:
        r = json.loads(line)
        whole = all(len(r[k]) == len(model.config.viable) and np.isfinite(r[k]).all()
                    for k in ("correct", "prefix_match", "loss"))
        whole = whole and type(r["left"]) is int and (r["task"], r["question"], r["answer"]) in eval_set[r["image"]][1]
        return r if whole else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None


def fingerprint(model, eval_set):
    """Checksums of a model, its router left out, and of an evaluation set, its images as they stand in their files."""
    settings = {**vars(model.config), "router": False, "route_threshold": 0, "stage": "", "step": 0}  # no history
    of_model, of_set = zlib.crc32(json.dumps(settings).encode()), 0
    for label, p in model.named_parameters():
        if not label.startswith("router."):
            of_model = zlib.crc32(p.detach().float().cpu().numpy().tobytes(), of_model)
    for image, questions in eval_set:
        content = image.read_bytes() if isinstance(image, Path) else image.tobytes()
        of_set = zlib.crc32(content + json.dumps(questions).encode(), of_set)
    return {"model": of_model, "eval_set": of_set}


def cheapest(configurations, numbers, loss):
    """Of these configurations (by number), the one with the fewest layers, then the lowest loss."""
    return min(numbers, key=lambda i: (len(configurations[i]), loss[i]))


def labels_by_task(configurations, results, keep=0.99):
    """{task: number of the configuration}: fewest layers of those that keep `keep` of the full accuracy (4.3)."""
    correct, loss = {}, {}  # task: a row for each question, a column for each configuration
    for r in results:
        correct.setdefault(r["task"], []).append(r["correct"])
        loss.setdefault(r["task"], []).append(r["loss"])
    full, labels = largest(configurations), {}
    for task in correct:
        acc = np.mean(correct[task], axis=0)           # (configurations,)
        good = [i for i in range(len(configurations)) if acc[i] >= keep * acc[full]]
        labels[task] = cheapest(configurations, good, np.sum(loss[task], axis=0))  # "the lowest aggregate loss"
    return labels


def oracle(configurations, result):
    """The configuration, by number, with the most correct tokens before the first wrong one, then the fewest layers,
    then the lowest loss (appendix D)."""
    best = max(result["prefix_match"])                 # tokens that agree with the ground truth
    return cheapest(configurations, [i for i, m in enumerate(result["prefix_match"]) if m == best], result["loss"])


def pseudo_labels(configurations, results, per="task", leave_out=()):
    """[(image, question, number of the configuration to choose)]. per: "task" (4.3) or "sample" (appendix D).
    leave_out: tasks that the router is not to learn from (appendix G). Raises ValueError."""
    tasks = {r["task"] for r in results}               # of a mixture its files
    if not set(leave_out) < tasks:
        raise ValueError(f"--leave-out {' '.join(sorted(leave_out))}: leave out some, not all, of "
                         f"{', '.join(sorted(tasks))}")
    by_task = labels_by_task(configurations, results)  # one label for a whole subset, as the paper
    return [(r["image"], r["question"], by_task[r["task"]] if per == "task" else oracle(configurations, r))
            for r in results if r["task"] not in leave_out]


# --- what the policy learns from (paper 4.3) ------------------------------------------------------------------------

class RouterBatches:
    """Batches of questions and the configurations they are to be sent to; deterministic: batch i depends only on
    (seed, i)."""

    def __init__(self, model, eval_set, targets, seed, batch_size=256, label_smoothing=0.0):
        """targets: of pseudo_labels, about this evaluation set."""
        self.model, self.eval_set, self.targets = model, eval_set, targets  # its router is the one that learns
        self.seed, self.batch_size, self.label_smoothing = seed, batch_size, label_smoothing
        self.tokens = None  # of a step: training files count them

    def __getitem__(self, i):
        """(data.Batch, targets (B,))."""
        drawn = np.random.default_rng((self.seed, i)).integers(len(self.targets), size=self.batch_size)  # (B,)
        prompts = []
        for image, question, _ in (self.targets[k] for k in drawn):
            processed = data.process_image(opened(self.eval_set[image][0]), self.model.config)
            text = data.chatml([data.place_images(question, 1)])
            prompts.append(data.encode(text, self.model.tokenizer, [processed]))
        return data.collate(prompts), torch.tensor([self.targets[k][2] for k in drawn])

    def batches(self, first):
        """Batch after batch, from number `first` on."""
        return map(self.__getitem__, count((3 << 40) + first))  # no stage draws what another one has drawn

    def plan(self, step):
        """None: a router is trained in no configuration."""

    def losses(self, item, plan, step):
        """Yields the cross-entropy of the policy. All else is frozen: only what the routing token runs through has
        gradients."""
        batch, targets = item
        with torch.no_grad():  # the prompt, up to the route layer
            tree = self.model.new_tree("auto", len(batch.ids), batch.ids.shape[1], batch.v_pos.shape[1])
            self.model.extend(tree, batch)
        scores = self.model.route_scores(tree, batch.answer_starts)[:, 0]  # (B, viable), of the one question
        yield F.cross_entropy(scores, targets.to(scores.device), label_smoothing=self.label_smoothing)


def conservative_threshold(label_smoothing, n):
    """config.route_threshold of a router that learns with label smoothing to choose among n configurations: twice what
    the smoothing alone gives to each that is wrong, so that it is not taken for doubt. Without smoothing the likeliest.
    """
    return 2 * label_smoothing / n if label_smoothing else 1.0


# --- reports --------------------------------------------------------------------------------------------------------

def summarise(config, results, groups, text, image_size, dense=None):
    """report.Report with a row for dense, every viable configuration, the router and the oracle.

    results: of `evaluate` in config.viable, or in dense alone; dense: results of the dense model, if any; groups,
    text, image_size: as in report.Report.
    """
    table = report.Report(config, groups, text, image_size)
    # Each row says in which configuration, by number, it answers result r
    everything = tuple(range(config.layers))
    if dense or not config.viable:
        table.add("dense", everything, dense or results, [everything], lambda r: 0)
    for i, sa in enumerate(config.viable):
        table.add(sa_name(config, sa), sa, results, config.viable, lambda r, i=i: i)
    if config.viable:
        table.labels = labels_by_task(config.viable, results)
        if "route" in results[0]:
            table.add("router", None, results, config.viable, lambda r: r["route"], table.router_flops())
            table.add("oracle", None, results, config.viable, lambda r: oracle(config.viable, r))
    return table


# --- command line ---------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(description="What each configuration can do, what it costs, and what the router makes of it.")
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
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: as many as there are idle "
                   "cores)")
    p.add_argument("--compile", action="store_true", help="torch.compile what repeats (see VLM.compile)")
    args = p.parse_args(argv)
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
    c = model.config
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
        for task, i in labels_by_task(c.viable, results, args.keep).items():
            print(f"{task:<14} {sa_name(c, c.viable[i])}")
    elif model.router is None:
        raise ValueError(f"{directory} has no router: python train.py --stage 3 --model {directory} trains one")
    else:
        results = all_results(model, eval_set, c.viable)
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
    results = all_results(model, eval_set, tried)
    own = [accuracy(results, i) for i in range(len(tried))]
    tasks = [t for names in world.STRATA.values() for t in names] if args.data == "toy" else list(own[0])
    share = np.array([[x[t] / own[-1][t] if own[-1][t] else 0.0 for t in tasks] for x in own])  # (tried, tasks)
    found = viable(c, tried, results, args.keep)
    names = [sa_name(c, sa) + "*" * (sa in found) for sa in tried]
    print(report.columns([["layers", *names], *([t, *(f"{x:.2f}" for x in row)] for t, row in zip(tasks, share.T))]))
    if len(found) < 2:  # the model can do too little: every sub-network falls with the largest
        raise ValueError(f"{directory}: {len(found)} viable configurations, nothing to choose from; train it longer")
    c.viable = found  # stage 2 will draw from these
    with atomic(directory / "config.json") as beside:
        beside.write_text(c.to_json())
    print(f"{directory}/config.json: {len(found)} viable configurations, marked *", file=sys.stderr)
    if args.out:
        report.draw_heat_map(args.out, share, names, tasks,
                             f"accuracy relative to {sa_name(c, tried[-1])}; * viable")


if __name__ == "__main__":
    run(main)
