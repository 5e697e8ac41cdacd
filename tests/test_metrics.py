"""Metrics and tasks of the paper's benchmarks: against what lmms-eval itself says, and against cases by hand."""
import json
from pathlib import Path

import pytest

from paper import metrics, tasks
from paper.tasks import RULES, TASKS, aggregate, group_means, prompt, score

CASES = json.loads((Path(__file__).parent / "lmms_cases.json").read_text())  # made by make_lmms_cases.py
ASKED = CASES.pop("asked")
VERSIONS = {"0.7.2+": "0.7.3", "classic": "0.7.1"}  # rules: the version of lmms-eval that was asked

by_rules = pytest.mark.parametrize("rules", RULES)
by_task = pytest.mark.parametrize("name", CASES)


def scored(name, rules):
    """The rows of a task's 200 answers, each with its answer and our score."""
    rows = [{**CASES[name]["rows"][i], "answer": answer} for i, answer in CASES[name]["cases"]]
    return [{**row, "score": score(name, row["answer"], row, rules)} for row in rows]


# --- against lmms-eval ----------------------------------------------------------------------------------------------

@by_rules
@by_task
def test_each_answer_scores_as_in_lmms_eval(name, rules):
    rows, said = scored(name, rules), CASES[name]["said"][VERSIONS[rules]]["scores"]
    assert len(rows) == len(said) == 200 and len(set(said)) > 1
    assert [(row["answer"], row["score"]) for row in rows] == [
        (row["answer"], pytest.approx(x, abs=1e-6)) for row, x in zip(rows, said)]


@by_rules
@by_task
def test_numbers_of_all_answers_are_those_of_lmms_eval(name, rules):
    said = CASES[name]["said"][VERSIONS[rules]]["totals"]
    found = aggregate(name, scored(name, rules))
    assert {key: found[key] for key in said} == pytest.approx(said, abs=1e-6)
    own = {"mme", "mmstar", "pope", "ocrbench", "muirbench", "blink"}  # tasks with an aggregation of their own
    assert bool(said) == (name in own or (name, rules) == ("mmbench", "0.7.2+"))  # its classic one asks GPT


@by_task
def test_prompts_are_those_of_lmms_eval(name):
    """A question with a hint and without; spaces, capitals and "Please answer yes or no." in it."""
    said = CASES[name]["said"]["0.7.3"]["prompts"]
    assert [prompt(name, {**ASKED, "hint": hint}) for hint in (ASKED["hint"], "")] == said


@by_task
def test_rules_differ_where_two_metrics_are_named(name):
    differ = [a["score"] != b["score"] for a, b in zip(scored(name, "classic"), scored(name, "0.7.2+"))]
    assert any(differ) == bool(TASKS[name].classic)


# --- by hand --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)])
def test_edit_distance(a, b, distance):
    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == distance


@pytest.mark.parametrize("answer, references, expected", [
    ("abcd", ["abcd"], 1), ("ABCD ", ["abcd"], 1), ("abcx", ["abcd"], 0.75), ("abxy", ["abcd"], 0.5),
    ("axyz", ["abcd"], 0), ("", ["abcd"], 0), ("abcx", ["zzzz", "abcd"], 0.75), ("", [""], 1),
    ("ab", ["aß"], 2 / 3)])  # "aß" has three capitals
def test_anls(answer, references, expected):
    assert metrics.anls(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize("answer, reference, expected", [
    ("95", "100", 1), ("94.9", "100", 0), ("105", "100", 1), ("105.1", "100", 0), ("5%", "0.05", 1), ("5", "5%", 0),
    ("0", "0", 1), ("0.0", "0", 0), ("1,000", "1000", 0), ("yes", "Yes", 1), ("Yes.", "Yes", 0), ("-95", "-100", 1),
    ("4.76%", "0.05", 1)])
def test_relaxed_accuracy(answer, reference, expected):
    assert metrics.relaxed_accuracy(answer, [reference]) == expected


@pytest.mark.parametrize("said, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_counts_annotators(said, expected):
    """With one that says so: of the ten ways to leave one out, nine have it, each worth a third."""
    assert metrics.vqa_accuracy("a dog", ["dog"] * said + ["cat"] * (10 - said)) == pytest.approx(expected)


@pytest.mark.parametrize("text, expected", [
    ("The two dogs!", "2 dogs"), ("dont", "don't"), ("10,000", "10000"), ("x-y", "x y"), ("x -y", "x y"),
    ("x-y -z", "xy z"), ("x?y", "xy"), ("x\ny\tz", "x y z"), ("x;y", "x y"),
    ("1.5", "1.5"), ("e.g.", "eg"), ("couldn'tve", "couldn't've"), ("somebody'd", "somebodyd"),
    ("it's", "it 's"), ("none", "0")])
def test_vqa_words(text, expected):
    assert metrics.vqa_words(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("I say A or B", "B"), ("B, not A: C", "B"), ("It is (A) or (C) here", "C"),
    ("The answer is C (not D) ok", "D"), ("say A. or B) it", "A"), ("red", ""), ("", ""), ("...", ""), ("E", ""),
    ("(B) or A,", "A"), ("(B) or A. ", "A"), ("(A) or B ,", "B"), ("USA it", "A"), ("my choice is xBx", "B"),
    ("선택: 정답은 D입니다", "D")])
def test_find_letter(text, expected):
    assert metrics.find_letter(text, "ABCD") == expected


QUESTION = "Which?\nA. red \nB. dark red\nC. it's"


@pytest.mark.parametrize("answer, right, classic, new", [
    ("red", "A", 1, 0), ("dark red", "B", 1, 0), ("it's", "C", 0, 0), ("B.", "B", 1, 1), ("(B)", "B", 1, 1),
    ("B. dark red", "B", 1, 1), ("two", "2", 1, 0), ("2.", "2", 1, 1), ("7:30", "7:30", 1, 1), ("730", "7:30", 1, 0),
    ("B", " B", 0, 1)])
def test_realworldqa(answer, right, classic, new):
    """"it's" loses its apostrophe as an answer, not as an option; classic takes the reference with its space."""
    row = {"question": QUESTION, "answers": [right]}
    assert [score("realworldqa", answer, row, rules) for rules in RULES] == [classic, new]


@pytest.mark.parametrize("answer, classic, new", [
    ("B", 1, 1), ("(b", 1, 0), ("option B", 1, 1), ("The answer is B", 1, 1), ("Blue", 1, 1), ("I take B", 0, 1),
    ("b", 1, 0)])
def test_mmstar(answer, classic, new):
    assert [score("mmstar", answer, {"answers": ["B"]}, rules) for rules in RULES] == [classic, new]


@pytest.mark.parametrize("answer, classic, new", [
    ("B", 1, 1), ("The answer is B", 0, 1), ("I think (B)", 0, 1), ("Because", 1, 1), ("(A) no, (B) yes", 0, 1),
    ("B     \n(A)", 1, 1)])
def test_blink(answer, classic, new):
    row = {"answers": ["B"], "options": ["x", "y"]}
    assert [score("blink", answer, row, rules) for rules in RULES] == [classic, new]


FORMULA = {"answers": ["X + 1"], "category": metrics.FORMULAS}
OTHER = {"answers": ["Cafe 1"], "category": "Doc-oriented VQA"}


@pytest.mark.parametrize("answer, row, classic, new", [
    ("it is X+1.", FORMULA, 0, 1), ("it is x+1.", FORMULA, 0, 0), ("the cafe\n1 there", OTHER, 1, 1),
    ("Ｃａｆｅ　１", OTHER, 0, 1), ("！～", {"answers": ["!~"], "category": ""}, 0, 1), ("cafe1", OTHER, 0, 0)])
def test_ocrbench(answer, row, classic, new):
    assert [score("ocrbench", answer, row, rules) for rules in RULES] == [classic, new]


@pytest.mark.parametrize("answer, letter, classic, new", [
    ("B", "B", 1, 1), ("B. it is", "B", 1, 1), ("(B)", "B", 1, 1), ("a dog", "A", 1, 1), ("A cat", "A", 1, 1),
    ("A cat sits there", "B", 1, 1), ("A dog or a cat", "A", 0, 1), ("A, B", "B", 1, 1), ("A B", "A", 0, 1),
    ("**B**", "B", 0, 1), ("fish", "A", 0, 0)])
def test_mmbench_without_gpt(answer, letter, classic, new):
    """Two letters in one form mean none; A with three more words is an article, and the options' texts decide."""
    row = {"answers": [letter], "options": ["a dog", "cat"]}
    assert [score("mmbench", answer, row, rules) for rules in RULES] == [classic, new]


@pytest.mark.parametrize("answer, expected", [
    ("B", 1), ("(b).", 1), ("B: the second", 1), ("The answer is B", 1), ("C", 0), ("", 0), ("(D)", 0), ("A", 0)])
@by_rules
def test_mmiu(answer, expected, rules):
    assert score("mmiu", answer, {"answers": ["B"], "options": ["first", "second", "third"]}, rules) == expected


def test_mmiu_prompt():
    row = {"question": "Which?", "hint": "Select from: \nA: one\nB: two"}
    assert prompt("mmiu", row) == ("Which?\nSelect from: \nA: one\nB: two\n"
                                   "Answer with the option's letter from the given choices directly.")


# --- the benchmark's number -----------------------------------------------------------------------------------------

def rows_of(*fields):
    return [dict(zip(("score", "category", "group"), row)) for row in fields]


def test_mme_counts_questions_and_images():
    """Count: 3 of 4 questions and 1 of 2 images, so 75 + 50; scene and code_reasoning: 100 + 100, 50 + 0."""
    rows = rows_of((1, "count", "a"), (1, "count", "a"), (1, "count", "b"), (0, "count", "b"), (1, "scene", "a"),
                   (1, "code_reasoning", "c"), (0, "code_reasoning", "c"), (1, "scene", "a"))
    assert aggregate("mme", rows) == {"score": 325 / 20, "perception": 325, "cognition": 50}
    with pytest.raises(ValueError, match="MME, scene: a has 1 of its 2 questions"):
        aggregate("mme", rows[:-1])


def test_macro_mean_and_mean_weigh_differently():
    rows = rows_of((1, "x"), (1, "x"), (1, "x"), (0, "y"))
    for name in ("mmstar", "blink", "mmiu"):
        assert aggregate(name, rows) == {"score": 50, "x": 100, "y": 0}
    for name in ("chartqa", "ocrbench", "muirbench"):
        assert aggregate(name, rows) == {"score": 75, "x": 100, "y": 0}


def test_mmbench_wants_every_order():
    assert aggregate("mmbench", rows_of((1, "", 1), (1, "", 1), (1, "", 2), (0, "", 2), (1, "", 2))) == {"score": 50}


def test_pope():
    """Hits 2, false alarms 1, a miss that says no, and one that says neither, which is missing from the recall."""
    pairs = [("Yes", "yes"), ("Yes", "Yes "), ("No", "yes"), ("Yes", "no"), ("Yes", "yes."), ("No", "no")]
    rows = [{"answers": [right], "answer": said, "score": score("pope", said, {"answers": [right]})}
            for right, said in pairs]
    assert aggregate("pope", rows) == pytest.approx({
        "score": 50, "precision": 200 / 3, "recall": 200 / 3, "f1": 200 / 3})
    assert aggregate("pope", rows[:1]) == {"score": 100, "precision": 100, "recall": 100, "f1": 100}
    assert aggregate("pope", rows[-1:]) == {"score": 100, "precision": 0, "recall": 0, "f1": 0}


def test_averages_of_table_1():
    """LLaVA-OneVision's row of the paper."""
    row = dict(zip("realworldqa scienceqa gqa mme mmstar pope textvqa ai2d chartqa ocrbench infovqa docvqa".split(), (
        54.0, 67.2, 58.3, 60.6, 40.6, 88.4, 66.0, 56.7, 60.9, 58.8, 40.0, 68.7)))
    means = group_means({**row, "blink": 1.0})
    assert {group: round(x, 1) for group, x in means.items()} == {"easy": 61.5, "hard": 57.1}
    del row["gqa"]
    assert group_means(row).keys() == {"hard"}


def test_table_of_tasks():
    groups = [task.group for task in TASKS.values()]
    assert {group: groups.count(group) for group in groups} == {"easy": 8, "hard": 4, "": 1, "several": 3}
    assert set(CASES) == set(TASKS) - {"mmiu"}
    used = {metric for task in TASKS.values() for metric in (task.metric, task.classic)}
    assert set(metrics.NEEDS) <= used
    assert TASKS["docvqa"] == tasks.Task("docvqa_val", "hard", tasks.as_it_is, tasks.WORD, 32, metrics.anls)


def test_what_is_refused():
    with pytest.raises(ValueError, match="no rules '0.6'; take one of classic, 0.7.2"):
        score("gqa", "x", {"answers": ["x"]}, "0.6")
    with pytest.raises(ValueError, match="gqa: there are no rows"):
        aggregate("gqa", [])
