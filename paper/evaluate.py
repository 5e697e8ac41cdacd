"""What a model gets right on benchmarks, and what it costs: the paper's Tables 1 and 5 for one's own weights.

    python -m paper.evaluate --model DIR --data docvqa.jsonl --images DIR --task docvqa --out out/all
    python -m paper.evaluate --model DIR --data llava.json --sa 1,4 --out out/1-4
    python -m paper.evaluate --compare out/all out/1-4      question by question

FILE has rows with "image" (a path, or a list of them), "question", "answers" (all that are right) and what judges them:
"task", one of paper/tasks.py, whose prompt and metric are known, or "metric", one of METRICS, and perhaps a
"post_prompt" behind the question. A file with neither may have its task's name. Samples in LLaVA's format are asked
their first turn, for an exact match.

The loop is that of sample.py --batch: answers are written as they come, in OUT/TASK.jsonl, and a run that was stopped
goes on there. It needs no router. What is judged are the answers in those files, so other --rules cost nothing. A row
that cannot be asked counts as wrong; but the categories and groups that a benchmark's number is made of, all rows must
have.
"""
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

import data
import sample
from cli import Parser, atomic, counted, read_rows, run
from llava.index import JsonIndex
from llava.samples import conversation, image_names
from paper import metrics
from paper.tasks import RULES, TASKS, Task, as_it_is

METRICS = {"exact_match": metrics.exact_match, "relaxed_accuracy": metrics.relaxed_accuracy, "anls": metrics.anls,
           "vqa_accuracy": metrics.vqa_accuracy, "yes_no": metrics.yes_or_no,
           "mc_letter": partial(metrics.letter, letters="ABCDE")}
LONGEST = 64   # tokens of an answer, where no task says it
DRAWS = 1000   # of the questions, for an interval
TEXT, TEXTS = "a text", "a list of texts"
KINDS = {"question": TEXT, "answers": TEXTS, "task": TEXT, "metric": TEXT, "post_prompt": TEXT, "hint": TEXT,
         "options": TEXTS, "category": TEXT, "group": "a text or a whole number"}  # of what is read of a row


# --- questions ------------------------------------------------------------------------------------------------------

def is_a(kind, value):
    """Whether a value is of one of KINDS. A list has at least one text."""
    if kind == TEXTS:
        return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)
    return isinstance(value, str if kind == TEXT else str | int)


def task_of(row):
    """The Task that asks and judges a row: by its metric, else by its task's name."""
    if "metric" not in row and row["task"] in TASKS:
        return TASKS[row["task"]]
    return Task("", "", as_it_is, row.get("post_prompt", ""), LONGEST, METRICS.get(row.get("metric")))


def task_of_all(rows):
    """The Task that makes the number of rows under one name: that of the first that is whole."""
    return task_of(next((row for row in rows if "question" in row), rows[0]))


def read_questions(args):
    """{task: [(row, question)]} of a file, with up to --limit rows of each task: a row as it is written with its
    answer, and (text, paths) or the SampleError that it has. Raises ValueError."""
    file, found = Path(args.data), {}
    if not file.is_file():
        raise ValueError(f"--data {args.data}: no such file")
    index, folder = JsonIndex(file), Path(args.images or file.parent)
    for i in range(len(index)):
        row = {"task": args.task or file.stem}
        try:
            raw = index[i]
            row = remains(raw, args.task, file.stem)
            row = normal(raw, args.task, file.stem)
            task, names = task_of(row), image_names(row)
            question = task.form(row) + task.post, [str(folder / name) for name in names]
            for rules in RULES:
                task.judge("", row, rules)  # whether the row has all that its metric needs
        except data.SampleError as e:
            question = data.SampleError(e.kind, f"row {i + 1}: {e}")
        except KeyError as e:
            question = data.SampleError("wrong key", f"row {i + 1}: {row['task']} needs {e.args[0]}; add it")
        rows = found.setdefault(row["task"], [])
        if args.limit is None or len(rows) < args.limit:
            rows.append((row, question))
    if all(isinstance(question, ValueError) for rows in found.values() for _, question in rows):
        first = next((question for rows in found.values() for _, question in rows), "it is empty")
        raise ValueError(f"{args.data}: no row can be asked; {first}")
    for name, rows in found.items():
        check_number(args.data, name, rows)
    return found


def check_number(file, name, rows):
    """Raises ValueError where the number of a task cannot be made of its rows, before anything is asked."""
    wrong = [{"answers": [""], **row, "answer": "", "score": 0.0} for row, _ in rows]
    try:
        task_of_all(wrong).aggregate(wrong)
    except KeyError as e:
        key = e.args[0]
        faults = [str(question) for row, question in rows if key not in row and isinstance(question, ValueError)]
        raise ValueError(f"{file}: {name} needs the {key} of every row; {(faults or ['add it'])[0]}") from None
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def remains(row, task, name):
    """What is written of a row that cannot be asked: where it counts. The rest may be anything."""
    kept = {key: row[key] for key in ("category", "group") if is_a(KINDS[key], row.get(key))}
    own = row.get("task")
    return {"task": task or (own if is_name(own) else name), **kept}


def is_name(task):
    """Whether answers can be in a file of that name."""
    return is_a(TEXT, task) and task.isprintable() and Path(task).name == task != ""


def normal(row, task, name):
    """A row of the file as it is written with its answer: task, question and answers are there, and metric only where
    no known task stands above it. task: of the command line; name: the file's. Raises SampleError."""
    if "conversations" in row:
        _, turns, names = conversation(row)
        if len(turns) < 2:
            raise data.SampleError("turns", "there is no answer to the first question")
        judge = {} if task else {"metric": "exact_match"}
        return {"task": task or name, **judge, "id": row.get("id"), "image": names[:turns[0].count(data.IMAGE)],
                "question": turns[0], "answers": [turns[1]]}
    kept = {key: value for key, value in row.items() if key not in sample.RESULT and value not in (None, [])}
    answers = row.get("answers", row.get("answer"))
    kept["answers"] = [answers] if isinstance(answers, str) else answers
    kept["task"] = task or kept.get("task", name)
    for key, kind in KINDS.items():
        if (key in kept or key == "question") and not is_a(kind, kept.get(key)):
            raise data.SampleError("wrong key", f"{key} is not {kind}; give one")
    if not is_name(kept["task"]):
        raise data.SampleError("wrong key", f"task {kept['task'][:60]!r} is no name for a file; give one")
    known = kept["task"] in TASKS
    if known and (task or "task" in row or "metric" not in kept):
        kept.pop("metric", None)
    elif kept.get("metric") not in METRICS:
        raise data.SampleError("wrong key", f"give a metric, one of {', '.join(METRICS)}, or a task, one of "
                               f"{', '.join(TASKS)}")
    return kept


def answer_all(found, args, more):
    """Asks what is not in OUT yet. Returns {task: prompts a second of this run, None where nothing was left}."""
    rates, model = {}, None
    for name, rows in found.items():
        out = Path(args.out) / f"{name}.jsonl"
        longest = args.max_tokens or task_of_all([row for row, _ in rows]).max_new
        asked = sample.parse(["--batch", args.data, "--out", str(out), "--batch-size", str(args.batch),
                              "--max-tokens", str(longest), *more])
        model = model or sample.load_model(asked)
        with sample.alone_in(out):
            had, began = out.read_bytes().count(b"\n"), time.perf_counter()
            try:
                sample.answer_rows_of(asked, rows, model)
            except SystemExit as e:  # 1: some could not be answered, which count as wrong
                if e.code != 1:
                    raise
            new = len(rows) - had
            rates[name] = new / (time.perf_counter() - began) if new > 0 else None
    return rates


# --- results --------------------------------------------------------------------------------------------------------

def judged(file, rules):
    """The rows of an answers file, with their "score". What could not be answered is wrong."""
    rows = [row for _, row in read_rows(file, task=str, run=str)]  # a line that is being written is not counted yet
    for row in rows:
        row["answer"], row["answers"] = row.get("answer", ""), row.get("answers", [""])
        row["score"] = 0.0 if "error" in row else task_of(row).judge(row["answer"], row, rules)
    return rows


def drawn(rows, seed=0):
    """Yields DRAWS lists of numbers of rows: as many as there are, with replacement; those of one group, as an image's
    two questions in MME, together (the bootstrap)."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", (i,)), []).append(i)
    groups, rng = list(groups.values()), np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield [(i, k) for k, g in enumerate(rng.integers(len(groups), size=len(groups))) for i in groups[g]]


def score_of(task, rows, numbers):
    """The benchmark's number of some rows, [(number, the group it counts in)]."""
    return task.aggregate([{**rows[i], "group": group} for i, group in numbers])["score"]


def interval(values):
    """The middle 95 % of values."""
    return tuple(np.percentile(values, (2.5, 97.5)).tolist())


def measured(name, rows, rate):
    """What a task's table row says."""
    task, keys = task_of_all(rows), ("answer", "answers", "category", "group", "score")
    slim = [{key: row[key] for key in keys if key in row} for row in rows]
    low, high = interval([score_of(task, slim, numbers) for numbers in drawn(slim)])
    ran = [row for row in rows if "error" not in row]
    spent, dense = (sum(row["flops"][key] for row in ran) for key in ("llm", "llm_dense"))
    to_first = [1 / row["flops"]["first_token_saving"] for row in ran]  # each question counts alike
    chosen = Counter(("ov:" * (row["pixels"] == "overview") + ",".join(map(str, row["sa"]))) or "none" for row in ran)
    return {"task": name, "group": task.group, "n": len(rows), "errors": len(rows) - len(ran),
            **task.aggregate(rows), "low": low, "high": high,
            "layers": fmean(len(row["sa"]) for row in ran) if ran else None,
            "chosen": {name: n / len(ran) for name, n in chosen.most_common()},
            "saving": dense / spent if ran else None, "saving_first_token": 1 / fmean(to_first) if ran else None,
            "prompts_per_second": rate}


def groups(rows):
    """Of the paper's groups, of which there are tasks: the means of their numbers."""
    found = []
    for group in ("easy", "hard", "several"):
        own, all_of_it = [x for x in rows if x["group"] == group], [x for x in TASKS.values() if x.group == group]
        if own:
            means = {key: fmean(x[key] for x in own if x[key] is not None) for key in (
                "score", "layers", "saving", "saving_first_token") if any(x[key] is not None for x in own)}
            found.append({"task": f"{group} ({len(own)} of {len(all_of_it)})", "n": sum(x["n"] for x in own), **means})
    return found


def table(rows):
    """For people, 80 columns wide."""
    lines = [f"{'':16}{'':>6}{'':>8}{'':17}{'layers':>7}{'  saving of operations':>18}",
             f"{'task':16}{'n':>6}{'score':>8}  {'95 %':15}{'chosen':>7}{'LLM':>8}{'1st token':>11}{'/ s':>7}"]
    for row in [*rows, *groups(rows)]:
        between = f"{row['low']:.1f} to {row['high']:.1f}" if "low" in row else ""
        figures = [f"{row[key]:.2f}{unit}" if row.get(key) is not None else "-" for key, unit in (
            ("layers", ""), ("saving", "x"), ("saving_first_token", "x"), ("prompts_per_second", ""))]
        lines.append(f"{row['task'][:16]:16}{row['n']:>6}{row['score']:>8.2f}  {between:15}"
                     "{:>7}{:>8}{:>11}{:>7}".format(*figures))
    return "\n".join(lines)


def compared(a, b, rules):
    """For people: two runs side by side, over the questions that both have. a, b: their directories."""
    lines = [f"{'':16}{'':>6}{'A':>8}{'B':>8}{'B - A':>8}  {'95 %':16}{'right only in':>16}",
             f"{'task':16}{'n':>6}{'':>8}{'':>8}{'':>8}  {'':16}{'A':>8}{'B':>8}"]
    names = [file.name for file in answer_files(a) if (Path(b) / file.name).is_file()]
    if not names:
        raise ValueError(f"--compare {a} {b}: they have no task in common")
    for name in names:
        ours, theirs = (by_question(judged(Path(x) / name, rules)) for x in (a, b))
        common = [key for key in ours if key in theirs]
        if not common:
            raise ValueError(f"--compare: {name} has no question in common; compare answers to the same file")
        if left := len(ours) + len(theirs) - 2 * len(common):
            print(f"{name}: {counted(left, 'question')} only in one of them", file=sys.stderr)
        rows = [[x[key] for key in common] for x in (ours, theirs)]
        task = task_of_all(rows[0])
        first, second = (task.aggregate(x)["score"] for x in rows)
        low, high = interval([score_of(task, rows[1], numbers) - score_of(task, rows[0], numbers)
                              for numbers in drawn(rows[0])])
        only = [sum(x["score"] > y["score"] for x, y in zip(*pair)) for pair in (rows, rows[::-1])]
        lines.append(f"{name[:-6][:16]:16}{len(common):>6}{first:>8.2f}{second:>8.2f}{second - first:>+8.2f}  "
                     f"{f'{low:+.2f} to {high:+.2f}':16}{only[0]:>8}{only[1]:>8}")
    return "\n".join(lines)


def by_question(rows):
    """{what a question is known by, and how many such stand before it: its row}."""
    found, before = {}, Counter()
    for row in rows:
        key = json.dumps([row.get(key) for key in ("id", "image", "question", "answers", "category", "group")])
        found[key, before[key]] = row
        before[key] += 1
    return found


def answer_files(out):
    """The files of answers in a directory. Raises ValueError."""
    files = sorted(Path(out).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{out}: holds no answers; make them with --data FILE --out {out}")
    return files


# --- the command ----------------------------------------------------------------------------------------------------

def parse(argv=None):
    """(what this command is asked, what is left for sample.py)."""
    p = Parser(doc=__doc__, description="What a model gets right on benchmarks, and what it costs.", allow_abbrev=False,
               epilog="All else goes to sample.py: --model, --sa, --pixels, --budget, --reduce, --max-pixels, --dtype, "
               "--device, --threads, --compile.")
    p.add_argument("--data", metavar="FILE", help=".jsonl or .json: rows with image, question, answers and task or "
                   "metric; or LLaVA's samples")
    p.add_argument("--images", metavar="DIR", help="where the images' paths start (default: FILE's directory)")
    p.add_argument("--task", metavar="NAME", help=f"of all rows: {', '.join(TASKS)} (default: what they say)")
    p.add_argument("--rules", choices=RULES, default="classic", help="of lmms-eval, before 0.7.2 or from then on "
                   "(default: classic)")
    p.add_argument("--limit", type=int, metavar="N", help="rows of each task (default: all)")
    p.add_argument("--batch", type=int, default=16, metavar="N", help="questions at once (default: 16)")
    p.add_argument("--max-tokens", type=int, metavar="N", help=f"longest answer (default: the task's, else {LONGEST})")
    p.add_argument("--out", default="out/evaluate", metavar="DIR", help="answers, table.json (default: out/evaluate)")
    p.add_argument("--compare", nargs=2, metavar="DIR", help="instead: two runs, question by question")
    args, more = p.parse_known_args(argv)
    if bool(args.data) == bool(args.compare):
        p.error("give --data FILE, or --compare DIR DIR")
    if args.task and args.task not in TASKS:
        p.error(f"--task {args.task[:60]}: give one of {', '.join(TASKS)}")
    for name in ("limit", "batch", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number at least 1")
    if args.compare and more:
        p.error(f"--compare reads what is there; leave {more[0][:60]} out")
    return args, more


def main(argv=None):
    args, more = parse(argv)
    if args.compare:
        return print(f"rules: {args.rules}\n\n{compared(*args.compare, args.rules)}")
    found = read_questions(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rates = answer_all(found, args, more)
    rows = [measured(name, judged(Path(args.out) / f"{name}.jsonl", args.rules), rates[name]) for name in found]
    print(f"rules: {args.rules}\n\n{table(rows)}")
    with atomic(Path(args.out) / "table.json") as file:
        file.write_text(json.dumps({"command": " ".join(["python -m paper.evaluate", *(argv or sys.argv[1:])]),
                                    "rules": args.rules, "tasks": rows, "groups": groups(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
