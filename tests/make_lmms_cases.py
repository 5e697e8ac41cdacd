"""Makes tests/lmms_cases.json: 200 answers a task, and what lmms-eval itself says of them. Not part of the tests' run.

    python3 -m venv /tmp/lmms
    /tmp/lmms/bin/pip install --no-deps lmms-eval==0.7.3
    /tmp/lmms/bin/pip install numpy pandas pyyaml pillow requests loguru openpyxl datasets sacrebleu "filelock<4"
    /tmp/lmms/bin/python tests/make_lmms_cases.py
    (the same with lmms-eval==0.7.1, for the rules "classic"; or with its unpacked wheel on PYTHONPATH)

The answers come from one seed. What an installed version says is written under its number; what other versions said
stays, as long as the answers are the same. No torch is needed: of lmms-eval only the files that score are imported.
"""
import importlib
import json
import random
import sys
import tempfile
import types
from importlib import metadata
from pathlib import Path

PATH = Path(__file__).parent / "lmms_cases.json"
VERSION = metadata.version("lmms-eval")
CASES = 200  # of each task


# --- questions and answers ------------------------------------------------------------------------------------------

WORDS = ["dog", "the red car", "Two men", "São Paulo", "naïve café", "Straße 7", "İstanbul", "it's", "don't know",
         "T-shirt", "e.g. 3.5 km", "12/03/1998", "$1,250.00", "Ａ１ ｂar", "no one", "北京", "x² + Y", "a cat", "ten",
         "O'Brien & Co."]
OPTIONS = ["a red bus", "Blue", "three dogs", "on the left", "Banana", "none of them", "B flat", "12.5 m",
           "the answer is A", "Café", "U.S.A.", "dog", "A", "(C)"]
UNICODE = ["ß", "Ｙｅｓ", "Ａ", "（Ｂ）", "\u00a0B\u00a0", "İ", "e\u0301", "🙂", "\u200b", "答案是C", "정답은 D", "答えはA",
           "K\u212a", "٣"]
YES_NO = ["Yes", "No", "yes", "no", "Yes.", "No.", " yes\n", "NO", "y", "n", "Y.", "N", "yeah", "nope", "Not sure",
          "know", "I say no", "is no", "Yes, it is", "no, yes", "eyes", "", ".", "yes .", ".n.o", "a", "unknown", "Ｙｅｓ",
          "да", "yes🙂", "yes\u200b"]
CHOSEN = [form.strip() for form in """{x}|{x}|{x}.|({x})|{x})|{x}:|{x},|({x}).|:{x}|{x}. {t}|({x}) {t}|{x}: {t}|
    {x}) {t}|{x} {t}|{t}|{t}.|
    the answer is {x}|The answer is ({x}).|Option {x}|option {x}|I choose {x}|{x} or {y}|{x}.{t}|
    Both {x} and {y} are right|not {y}, but ({x})|A dog is in {x}|The best option is {x}, not {y}|**{x}**|"{x}".|'{x}'!|
    Answer: {x}|answers - {x}|My answer is unclear: {y}. The answer is {x}|{x}{y}|{x}?|I think it is {x}|{t} ({x})|({x}|
    {x}_|USA|Blue|An apple|Because of {y}: {x}.|{y}) no, {x}) yes|The picture shows {t}|cannot tell|{x};;|{x}!.
    """.split("|")]
NUMBERS = ["12", "0", "3.5", "-40", "25%", "1,234", "2010", "0.07", "1e3", "Yes", "nan", "100", "50 %", "٣"]


def near(rng, text):
    """The text with one to three characters changed, dropped or added."""
    chars = list(text)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(chars) + 1)
        chars[i:i + rng.randint(0, 1)] = rng.choice(["", "e", "7", " ", "-", "ü"])
    return "".join(chars)


def about(rng, right, wrong):
    """An answer to a question whose right answer is a text."""
    form = rng.choice(["{}", "{}", "{}.", " {}\n", "\t{} ", "the {}", "{}!", "It is {}.", "{} / {}", "({})",
                       "{}\n\n{}"])
    kind = rng.choice(["right", "near", "wrong", "case", "spaces", "odd", "empty"])
    text = {"right": right, "near": near(rng, right), "wrong": wrong, "case": right.swapcase(),
            "spaces": right.replace(" ", "  "), "odd": right + rng.choice(UNICODE),
            "empty": rng.choice(["", " ", "\n"])}[kind]
    return text if kind == "empty" else form.format(text, wrong)


def chosen(rng, right, options):
    """An answer to a question with options, whose right one has the letter `right`."""
    letters = "ABCDEFG"[:len(options)]
    x = right if rng.random() < 0.6 else rng.choice(letters)
    y, text = rng.choice(letters), options[letters.index(x)]
    form = rng.choice(CHOSEN) if rng.random() < 0.7 else rng.choice(CHOSEN[:3])
    answer = rng.choice(["{}", "{}", "{}", " {}", "{}\n", "{}\nbecause"]).format(form.format(x=x, y=y, t=text))
    roll = rng.random()
    if roll < 0.08:
        return rng.choice(["", " ", "...", ".,;", *UNICODE])
    return answer.lower() if roll < 0.2 else answer


def choices(rng, n):
    """(n options, the letter of the right one)."""
    return rng.sample(OPTIONS, n), "ABCDEFG"[rng.randrange(n)]


def cases_of(task):
    """(rows, [(number of the row, answer)]) of a task, the same at every call."""
    rng = random.Random(f"{task} 1")
    rows, cases = [], []
    if task in ("mme", "pope"):
        categories = ["existence", "OCR", "color", "code_reasoning", "text_translation"]
        for i in range(CASES):
            right = rng.choice(["Yes", "No"])
            rows.append({"answers": [right], "category": categories[i // 2 % 5], "group": f"{i // 2}"})
            cases.append((i, rng.choice(YES_NO) if rng.random() < 0.6 else right))
        return rows, cases
    if task == "mmbench":
        for group in range(CASES // 4):
            options, right = choices(rng, rng.choice([2, 3, 4, 4]))
            known = rng.random()                                    # how often this question is answered rightly
            for turn in range(4):
                turned = options[turn % len(options):] + options[:turn % len(options)]
                at = "ABCD"[("ABCD".index(right) - turn) % len(options)]
                rows.append({"answers": [at], "options": turned, "group": group})
                plain = rng.choice([at, f"{at}.", f"{at}. it", turned["ABCD".index(at)]])
                cases.append((len(rows) - 1, plain if rng.random() < known else chosen(rng, at, turned)))
        return rows, cases

    kinds = {"ocrbench": ["Handwritten Mathematical Expression Recognition", "Doc-oriented VQA",
                          "Digit String Recognition"],
             "mmstar": ["geometry", "localization", "recognition"], "muirbench": ["Counting", "Ordering"],
             "blink": ["Counting", "Jigsaw", "IQ_Test"], "chartqa": ["human_test", "augmented_test"]}
    for i in range(20):
        row = {}
        if task in kinds:
            row["category"] = kinds[task][i * i % len(kinds[task])]
        if task in ("realworldqa", "scienceqa", "mmstar", "ai2d", "muirbench", "blink"):
            options, right = choices(rng, 4 if task == "mmstar" else rng.choice([2, 3, 4]))
            row.update(answers=[right], options=options)
            if task == "realworldqa":
                listed = "\n".join(f"{x}. {text}" for x, text in zip("ABCD", options))
                row["question"] = f"Where?\n{listed}\nAnswer with the letter."
                if i % 3 == 2:
                    right = rng.choice(["2", "Yes", "Downhill.", "7:30", "0", "a"])
                    row.update(answers=[right], question="How many? Answer with one word.")
            for _ in range(CASES // 20):
                words = ["two", "Zero", "ten.", right, right.lower() + ".", "downhill", "2.", "yes!", "7 30"]
                free = task == "realworldqa" and i % 3 == 2
                cases.append((i, rng.choice(words) if free else chosen(rng, right, options)))
        elif task == "chartqa":
            right = NUMBERS[i % len(NUMBERS)]
            row["answers"] = [right]
            for _ in range(CASES // 20):
                answer = about(rng, right, rng.choice(NUMBERS))
                try:
                    value = float(right.rstrip("% "))
                    if rng.random() < 0.6:
                        answer = f"{value * rng.choice([0.94, 0.95, 0.951, 1, 1.0499, 1.05, 1.06, -1, 0.01, 100]):.6g}"
                        answer += rng.choice(["", "", "%", "%%", " %", "."])
                except ValueError:
                    pass
                cases.append((i, rng.choice(["inf", "1_2", "12,0", "NaN", "YES"]) if rng.random() < 0.08 else answer))
        else:
            right = [WORDS[i]] if task == "gqa" else [WORDS[i], rng.choice(WORDS)]
            if task == "textvqa":
                right = [about(rng, WORDS[i], rng.choice(WORDS)) for _ in range(3)]
                right = [rng.choice(right + [WORDS[i]]) for _ in range(10)]
            if task == "ocrbench" and "Math" in row["category"]:
                right = [r"\frac { X } { 2 } + y", "a ^ { 2 }\n= B"][i % 2:]
            row["answers"] = right
            for _ in range(CASES // 20):
                answer = about(rng, rng.choice(right), rng.choice(WORDS))
                if task == "textvqa" and rng.random() < 0.4:
                    answer = rng.choice([
                        "dont", "couldnt've", "The  two men!", "a.b.c 1.5", "x-y", "3, 4", "10,000", "(none)",
                        "somebody'd", "it's", "t shirt", "yall'll", "What?", "no-one", "-dog", "a an the"])
                if task == "ocrbench":
                    answer = rng.choice([answer, f"It says {answer}", f"${answer.replace(' ', '')}$", answer.upper()])
                cases.append((i, answer))
        rows.append(row)
    return rows, cases


# --- what lmms-eval says --------------------------------------------------------------------------------------------

def hollow(name, **names):
    """A module in place of one that would import torch and a hundred packages."""
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(names)
    return module


import lmms_eval  # noqa: E402  (its own file is empty)

ROOT = Path(lmms_eval.__file__).parent
hollow("lmms_eval.tasks", __path__=[str(ROOT / "tasks")])
hollow("lmms_eval.filters", __path__=[str(ROOT / "filters")])
hollow("lmms_eval.tasks._task_utils.default_template_yaml", load_default_template_yaml=lambda _: {})
hollow("lmms_eval.api.filter", Filter=object)
hollow("lmms_eval.api.reasoning", strip_reasoning_tags=None)
hollow("lmms_eval.api.registry", register_metric=lambda **_: lambda f: f, register_aggregation=lambda *_: lambda f: f)
lmms_metrics = importlib.import_module("lmms_eval.api.metrics")


def utils(task, file="utils"):
    return importlib.import_module(f"lmms_eval.tasks.{task}.{file}")


def exact(answer, row):
    return lmms_metrics.exact_match_hf_evaluate(predictions=[answer], references=row["answers"], ignore_case=True,
                                                ignore_punctuation=True)["exact_match"]


def through(filters, answer, row):
    """The answer behind lmms-eval's filters of a task."""
    answers = [[answer]]
    for each in filters:
        answers = each.apply(answers, [row])
    return answers[0].strip()


def judged(task, answer, row):
    """What lmms-eval keeps of an answer: (score, what its aggregation takes)."""
    answer = answer.strip()                                         # as its llava_onevision returns it
    right = row["answers"][0]
    if task == "realworldqa":
        u = utils(task)
        if VERSION < "0.7.2":
            return exact(through([u.NumberWordsToDigitsFilter(), u.MultiChoiceRegexFilter()], answer, row), row), None
        return u.realworldqa_process_results({"answer": right}, [answer])["exact_match"], None
    if task == "scienceqa":
        doc = {"choices": row["options"], "answer": "ABCDEFG".index(right)}
        return utils(task).sqa_process_results(doc, [answer])["exact_match"], None
    if task == "gqa":
        return exact(answer, row), None
    if task == "mme":
        doc = {"answer": right, "category": row["category"], "question_id": row["group"]}
        (key, kept), = utils(task).mme_process_results(doc, [answer]).items()
        return kept["score"], (key, kept)
    if task == "mmstar":
        doc = {"answer": right, "category": "math", "l2_category": row["category"], "index": 0}
        kept = utils(task).mmstar_process_results(doc, [answer])["average"]
        return kept["score"], kept
    if task == "pope":
        kept = utils(task).pope_process_results({"answer": right, "question_id": 0}, [answer])["pope_f1_score"]
        return kept["score"], kept
    if task == "textvqa":
        doc = {"answers": list(row["answers"]), "question_id": 0}
        return utils(task).textvqa_process_results(doc, [answer])["exact_match"], None
    if task == "ai2d":
        return exact(through([utils(task).MultiChoiceRegexFilter()], answer, row), row), None
    if task == "chartqa":
        doc = {"answer": right, "type": row["category"]}
        return utils(task).chartqa_process_results(doc, [answer])["relaxed_overall"], None
    if task == "ocrbench":
        hme = "HME100k" if "Math" in row["category"] else "else"
        doc = {"answer": row["answers"], "question_type": row["category"], "dataset": hme}
        kept = utils(task).ocrbench_process_results(doc, [answer])["ocrbench_accuracy"]
        return kept["score"], kept
    if task in ("infovqa", "docvqa"):
        return lmms_metrics.anls(references=row["answers"], predictions=[answer])["anls"], None
    if task == "muirbench":
        u = utils(task)
        doc = {"answer": right, "task": row["category"], "idx": 0, "image_relation": "", "image_type": ""}
        kept = u.muir_process_results(doc, [through([u.MultiChoiceRegexFilter()], answer, row)])
        return u.muir_aggregation([kept["muirbench_score_overall"]]), kept["muirbench_score_overall"]
    if task == "blink":
        doc = {"answer": f"({right})", "choices": row["options"], "idx": 0, "sub_task": row["category"]}
        kept = utils(task).blink_process_results(doc, [answer])["blink_acc"]
        return float(kept["is_correct"]), kept


def mmbench(rows, cases):
    """(scores, totals): each row by itself, and all in lmms-eval's circular evaluation where that needs no GPT."""
    import pandas as pd
    evaluator = utils("mmbench", "en_utils").mmbench_evaluator
    docs, turns = [], {}
    for i, answer in cases:
        row = rows[i]
        turn = turns[row["group"]] = turns.get(row["group"], -1) + 1
        texts = dict(zip("ABCD", row["options"] + [None] * 4))
        docs.append({"index": row["group"] + turn * 1_000_000, "question": "?", "answer": row["answers"][0],
                     "category": "c", "L2-category": "l", "prediction": answer.strip(), **texts})
    if VERSION < "0.7.2":
        return [float(evaluator.prefetch_answer(dict(doc)) == doc["answer"]) for doc in docs], {}
    scores = [float(evaluator.eval_sub_data(pd.DataFrame([doc]), {doc["index"]: doc["answer"]}, static_only=True))
              for doc in docs]
    return scores, {"score": 100 * evaluator.eval_result(docs, eval_method="static")[0]}


def totals(task, kept):
    """lmms-eval's own numbers of all 200 answers, in the unit of ours."""
    u = utils(task)
    if task == "mme":
        parts = {key: u.mme_aggregate_results([x for k, x in kept if k == key]) for key in {k for k, _ in kept}}
        return {"perception": parts["mme_perception_score"], "cognition": parts["mme_cognition_score"]}
    if task == "mmstar":
        return {"score": 100 * u.mmstar_aggregate_results(kept)}
    if task == "pope":
        names = {"score": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}
        return {ours: 100 * getattr(u, f"pope_aggregate_{theirs}")(kept) for ours, theirs in names.items()}
    if task == "ocrbench":                                          # divides by the whole benchmark's 1,000
        args = types.SimpleNamespace(output_path=tempfile.mkdtemp())
        return {"score": 100 * u.ocrbench_aggregate_accuracy(kept, args) * 1000 / CASES}
    if task == "muirbench":
        return {"score": 100 * u.muir_aggregation(kept)}
    if task == "blink":                                             # each sub_task is a task of a group
        parts = [[x for x in kept if x["sub_task"] == name] for name in sorted({x["sub_task"] for x in kept})]
        means = [u.blink_aggregate_results(part) for part in parts]
        return {"score": 100 * lmms_metrics.aggregate_subtask_metrics(means, [len(p) for p in parts], False)}
    return {}


# --- prompts --------------------------------------------------------------------------------------------------------

ASKED = {"question": " What is  the Sign's TEXT? Please answer yes or no. ", "options": ["red", "a Dog", "3.5"],
         "hint": "Look up."}


def prompts(task):
    """lmms-eval's text for a question, with a hint and without. The wheel of 0.7.1 lacks files that say it: none."""
    if VERSION < "0.7.2":
        return []
    texts = []
    for hint in (ASKED["hint"], ""):
        doc = {"question": ASKED["question"], "prompt": ASKED["question"], "choices": ASKED["options"],
               "options": ASKED["options"], "hint": hint or ("nan" if task == "mmbench" else ""), "category": "",
               "L2-category": "", "index": 0, "source": "", "split": "", "D": "nan",
               **dict(zip("ABC", ASKED["options"]))}
        asks = {"scienceqa": "sqa_doc_to_text", "muirbench": "muir_doc_to_text"}
        u = utils(task, "en_utils") if task == "mmbench" else utils(task)
        texts.append(getattr(u, asks.get(task, f"{task}_doc_to_text"))(doc, settings(task)))
    return texts


def settings(task):
    """What the task's file tells its prompt (lmms_eval_specific_kwargs, default)."""
    import yaml
    for name in (f"{task}.yaml", f"{task}_img.yaml", "_default_template_yaml", f"_default_template_{task}_yaml",
                 f"_default_template_{task}_en_yaml"):
        path = ROOT / "tasks" / task / name
        lines = path.read_text().splitlines() if path.exists() else []
        found = yaml.safe_load("\n".join(line for line in lines if "!function" not in line)) or {}
        if "lmms_eval_specific_kwargs" in found:
            return found["lmms_eval_specific_kwargs"]["default"]


TASKS = """realworldqa scienceqa gqa mme mmstar pope textvqa ai2d chartqa ocrbench infovqa docvqa mmbench muirbench
           blink""".split()


def main():
    before = json.loads(PATH.read_text()) if PATH.exists() else {}
    made = {"asked": ASKED}
    for task in TASKS:
        rows, cases = cases_of(task)
        assert len(cases) == CASES, (task, len(cases))
        if task == "mmbench":
            scores, whole = mmbench(rows, cases)
        else:
            pairs = [judged(task, answer, rows[i]) for i, answer in cases]
            scores, whole = [float(score) for score, _ in pairs], totals(task, [kept for _, kept in pairs])
        asked = {"rows": rows, "cases": [list(case) for case in cases]}
        old = before.get(task, {})
        same = {key: old.get(key) for key in asked} == asked
        scores = [int(s) if s == int(s) else round(s, 7) for s in scores]
        said = {"scores": scores, "totals": whole, "prompts": prompts(task)}
        made[task] = {**asked, "said": {**(old["said"] if same else {}), VERSION: said}}
    lines = [f'"{name}":{json.dumps(x, ensure_ascii=False, separators=(",", ":"))}' for name, x in made.items()]
    PATH.write_text("{" + ",\n".join(lines) + "}\n")  # a task a line
    print(f"{PATH}: lmms-eval {VERSION}, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
