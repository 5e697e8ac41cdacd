"""paper.evaluate: rows of every kind, asked as sample.py --batch asks them, judged, tabled and compared."""
import json
import multiprocessing
import random
import shutil
import signal
import time
from statistics import fmean

import numpy as np
import pytest

import sample
from cli import NANO
from model import VLM
from paper import evaluate
from paper.tasks import TASKS, prompt
from tests import tiny
from tests.test_batch import SIZES, alone, loaded, model, rows_of  # noqa: F401 two are fixtures
from toy import world


def call(capsys, *words):
    """(exit status, stdout, stderr) of the command with these words, in this process."""
    try:
        sample.run(lambda: evaluate.main([str(w) for w in words]))
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def write(path, rows):
    """Dicts, or lines as they are, one a line. Returns the path."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images; q.jsonl with rows of several tasks and metrics, about none, one or two images."""
    d = tmp_path_factory.mktemp("evaluate")
    for k, size in enumerate(SIZES):
        tiny.image(*size, k).save(d / f"{k}.png")
    rows = [{"id": i, "image": f"{i % 4}.png", "question": f"what{'?' * i}", "answers": ["x", "y"], "metric": "anls",
             "post_prompt": "\nAnswer.", "task": "words"} for i in range(5)]
    rows += [{"image": f"{i // 2}.png", "question": f"is it {i}? Please answer yes or no.", "answer": "yes",
              "category": "count", "group": i // 2, "task": "mme"} for i in range(6)]
    rows += [{"image": ["0.png", "1.png"], "question": "<image> or <image>?", "options": ["a", "b"], "answers": ["A"],
              "category": "order", "task": "muirbench"},
             {"question": "without", "answers": ["x"], "metric": "exact_match", "task": "words"}]
    write(d / "q.jsonl", rows)
    return d


@pytest.fixture
def ask(folder, loaded, capsys, tmp_path):
    """ask(*words): (exit status, table, stderr, {task: what its file has}) of a run into tmp_path / "out"."""
    def ask(*words, rows=folder / "q.jsonl", batch=3, images=folder):
        found = call(capsys, "--data", rows, "--images", images, "--out", tmp_path / "out", "--batch", batch,
                     "--max-tokens", 3, *words)
        return *found, {x.stem: x.read_bytes() for x in (tmp_path / "out").glob("*.jsonl")}
    return ask


# --- what is asked --------------------------------------------------------------------------------------------------

def test_each_row_is_asked_as_sample_asks_it_alone(ask, folder, model, tmp_path):
    status, out, err, files = ask(batch=4)
    assert status == 0 and files.keys() == {"words", "mme", "muirbench"} and out.startswith("rules: classic\n")
    given, names = rows_of(folder / "q.jsonl"), ("words", "mme", "muirbench")
    found = [row for name in names for row in rows_of(tmp_path / f"out/{name}.jsonl")]
    assert [row["question"] for row in found] == [
        row["question"] for row in sorted(given, key=lambda row: names.index(row["task"]))]
    for row in found:
        known = row["task"] in TASKS
        text = prompt(row["task"], row) if known else row["question"] + row.get("post_prompt", "")
        names = row.get("image", [])
        paths = [folder / name for name in ([names] if isinstance(names, str) else names)]
        assert (row["tokens"], tuple(row["sa"])) == alone(model, (text, paths), max_tokens=3)
        assert "--max-tokens 3 --dtype float32" in row["run"] and known == ("metric" not in row)
    assert len({tuple(row["sa"]) for row in found}) == 3  # routes are mixed
    assert found[5]["answers"] == ["x"] and found[6]["answers"] == ["yes"] and "image" not in found[5]


def test_batches_of_any_size_answer_the_same(ask, tmp_path):
    one = ask(batch=1)[3]
    shutil.rmtree(tmp_path / "out")
    assert ask(batch=8)[3] == one


def test_samples_in_the_format_of_llava(ask, model, folder, tmp_path):
    turns = [{"from": "human", "value": "which?\n<image>"}, {"from": "gpt", "value": "red"},
             {"from": "human", "value": "and?"}, {"from": "gpt", "value": "blue"}]
    later = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"},
             {"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "blue"}]
    rows = [{"id": 7, "image": "0.png", "conversations": turns}, {"image": "1.png", "conversations": later}]
    data = tmp_path / "docvqa.json"  # a task's name makes no task of it
    data.write_text(json.dumps(rows))
    status, _, _, files = ask(rows=data)
    first, second = rows_of(tmp_path / "out/docvqa.jsonl")
    assert status == 0 and (first["question"], first["answers"], first["id"]) == ("<image>\nwhich?", ["red"], 7)
    assert first["metric"] == "exact_match" and first["tokens"] == alone(
        model, ("which?", [folder / "0.png"]), max_tokens=3)[0]
    assert second["image"] == [] and second["tokens"] == alone(model, ("hi", []), max_tokens=3)[0]
    shutil.rmtree(tmp_path / "out")
    ask("--task", "docvqa", rows=data)  # of the command line it does
    assert "metric" not in rows_of(tmp_path / "out/docvqa.jsonl")[0]


def test_a_file_named_like_a_task_is_judged_by_its_rows_metric_if_they_have_one(ask, tmp_path):
    own = {"question": "<image>?", "image": "0.png", "answers": ["A"]}
    for row, words, judged in ((own | {"metric": "mc_letter"}, [], "mc_letter"), (own, [], None),
                               (own | {"metric": "mc_letter", "task": "chartqa"}, [], None),
                               (own | {"metric": "mc_letter"}, ["--task", "gqa"], None)):
        status, _, err, files = ask(*words, rows=write(tmp_path / "gqa.jsonl", [row]))
        assert status == 2 if row.get("task") == "chartqa" else status == 0, err  # whose number needs categories
        for content in files.values():
            assert json.loads(content).get("metric") == judged
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert evaluate.task_of({"task": "gqa", "metric": "mc_letter"}).max_new == 64 != TASKS["gqa"].max_new


def test_the_longest_answer_is_the_tasks(folder, loaded, capsys, tmp_path, monkeypatch):
    longest = []
    monkeypatch.setattr(sample, "answer_rows_of", lambda args, rows, _: longest.append(args.max_tokens) or exit(3))
    for name in ("words", "mme"):
        rows = [row for row in rows_of(folder / "q.jsonl") if row["task"] == name]
        status, *_ = call(capsys, "--data", write(tmp_path / "q.jsonl", rows), "--out", tmp_path / "out")
        assert status == 3
    assert longest == [evaluate.LONGEST, TASKS["mme"].max_new]


def test_a_limit_is_of_each_task(ask):
    assert {name: x.count(b"\n") for name, x in ask("--limit", 2)[3].items()} == {"words": 2, "mme": 2, "muirbench": 1}


# --- rows that cannot be asked --------------------------------------------------------------------------------------

GOOD = {"image": "0.png", "question": "hi", "answers": ["a"], "metric": "exact_match"}
BAD = [(GOOD | change, message) for change, message in (
    ({"image": "no.png"}, "no.png: no such image"), ({"answers": None}, "row 2: answers is not a list of texts"),
    ({"answers": ["a", 5]}, "row 3: answers is not"), ({"answers": []}, "row 4: answers is not"),
    ({"question": 5}, "row 5: question is not a text"), ({"question": " "}, "the question is empty"),
    ({"question": None}, "row 7: question is not a text"), ({"metric": "bleu"}, "row 8: give a metric, one of"),
    ({"metric": None}, "row 9: give a metric, one of"), ({"metric": [1]}, "row 10: metric is not a text"),
    ({"post_prompt": 5}, "row 11: post_prompt is not a text"), ({"task": "../x"}, "row 12: task '../x' is no name"),
    ({"task": 5}, "row 13: task is not a text"), ({"image": 5}, "row 14: image is neither a path"),
    ({"group": [1]}, "row 15: group is not a text or a whole number"), ({"options": "ab"}, "row 16: options is not"),
    ({"question": "<image> <image>?"}, "2 <image> but 1 image"), ({"task": ""}, "row 18: task '' is no name"))]
BAD += [("[1]", "row 19: a list instead of a JSON object"), ('{"question": "hi"', "row 20: not valid JSON"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "row 21: turns are not question, answer")]


def test_bad_rows_count_as_wrong_and_are_told(ask, tmp_path):
    right = json.loads(ask(rows=write(tmp_path / "q.jsonl", [GOOD]))[3]["q"])["answer"]
    rows = write(tmp_path / "q.jsonl", [row for row, _ in BAD] + [GOOD | {"answers": [right]}])
    shutil.rmtree(tmp_path / "out")
    status, out, err, files = ask(rows=rows)
    found = rows_of(tmp_path / "out/q.jsonl")
    assert status == 0 and list(files) == ["q"] and len(found) == len(BAD) + 1 and "Traceback" not in err
    assert f"{len(BAD)} of {len(BAD) + 1} rows could not be answered" in err
    for row, (_, message) in zip(found, BAD):
        assert message in row["error"] and "tokens" not in row and set(row["error"]).isdisjoint("\n")
    [row] = json.loads((tmp_path / "out/table.json").read_text())["tasks"]
    assert (row["n"], row["errors"], row["score"]) == (len(found), len(BAD), pytest.approx(100 / len(found)))
    assert row["layers"] == len(found[-1]["sa"]) and ask(rows=rows)[3] == files


def test_rows_of_a_known_task_that_lack_what_it_needs(ask, tmp_path):
    row = {"image": ["0.png"], "question": "hi", "answers": ["A"], "task": "mmiu", "category": "c"}
    whole = row | {"hint": "h", "options": ["a", "b"]}
    data = write(tmp_path / "q.jsonl", [row, row | {"hint": "h"}, whole, {**whole, "answers": 5}])
    assert ask(rows=data)[0] == 0
    errors = [row.get("error", "") for row in rows_of(tmp_path / "out/mmiu.jsonl")]
    assert [x[:26] for x in errors] == ["row 1: mmiu needs hint; ad", "row 2: mmiu needs options;", "",
                                        "row 4: answers is not a li"]


@pytest.mark.parametrize("name, rows, message", [
    ("mmstar", [{"category": "c"}, {}], "mmstar needs the category of every row; add it"),
    ("mmstar", [{"category": "c"}, {"category": 5}],
     "mmstar needs the category of every row; row 2: category is not a text; give one"),
    ("mme", [{"category": "count", "group": 1}] * 3, "MME, count: 1 has 3 of its 2 questions; take whole images"),
    ("mmbench", [{"group": 1, "options": ["a"]}, {"options": ["a"]}], "mmbench needs the group of every row; add it")])
def test_what_a_number_is_made_of_is_asked_for_before_the_model(ask, tmp_path, monkeypatch, name, rows, message):
    monkeypatch.setattr(sample, "load_model", lambda args: pytest.fail("loaded"))
    row = {"question": "hi", "answers": ["A"], "task": name}
    data = write(tmp_path / "q.jsonl", [row | x for x in rows])
    status, out, err, files = ask(rows=data)
    assert (status, out, err, files) == (2, "", f"error: {data}: {message}\n", {})


def test_no_row_at_all(ask, tmp_path):
    data, fault = write(tmp_path / "q.jsonl", BAD[1][:1]), "row 1: answers is not a list of texts; give one"
    assert ask(rows=data)[:3] == (2, "", f"error: {data}: no row can be asked; {fault}\n")
    data.write_text("[]")
    assert ask(rows=data)[:3] == (2, "", f"error: {data}: no row can be asked; it is empty\n")


WORDS = [  # words, how the line begins
    ([], "give --data FILE, or --compare DIR DIR"),
    (["--data", "q.jsonl", "--compare", "a", "b"], "give --data FILE, or --compare DIR DIR"),
    (["--data", "no.jsonl"], "--data no.jsonl: no such file"),
    (["--data", "q.jsonl", "--task", "words"], "--task words: give one of realworldqa"),
    (["--data", "q.jsonl", "--limit", "0"], "--limit 0: give a number at least 1"),
    (["--data", "q.jsonl", "--batch", "-1"], "--batch -1: give a number at least 1"),
    (["--data", "q.jsonl", "--rules", "new"], "argument --rules: invalid choice"),
    (["--data", "q.jsonl", "--sa", "1,99"], "--sa 1,99"),
    (["--data", "q.jsonl", "--reduce", "no"], "--reduce no"),
    (["--data", "q.jsonl", "--flag"], "unrecognized arguments: --flag"),
    (["--data", "q.jsonl", "--q", "hi"], "--q does not go with --batch"),
    (["--data", "q.jsonl", "--model", "no/such"], "no/such"),
    (["--data", "q.jsonl", "--out", "q.jsonl"], "q.jsonl: file exists"),
    (["--compare", "out", "no"], "--compare out no: they have no task in common"),
    (["--compare", "no", "out"], "no: holds no answers; make them with --data FILE --out no"),
    (["--compare", "out", "out", "--sa", "1"], "--compare reads what is there; leave --sa out"),
    (["--compare", "empty", "empty"], "--compare: log.jsonl has no question in common")]


@pytest.mark.parametrize("words, message", WORDS)
def test_bad_words_give_one_line(folder, model, capsys, tmp_path, monkeypatch, words, message):
    load = sample.load_model
    monkeypatch.setattr(sample, "load_model", lambda args: load(args) if "/" in args.model else model)
    monkeypatch.chdir(tmp_path)
    shutil.copy(folder / "q.jsonl", ".")
    for name in ("out", "empty"):
        (tmp_path / name).mkdir()
    write(tmp_path / "out/mme.jsonl", [])
    write(tmp_path / "empty/log.jsonl", [{"step": 1}, "[1]", "damaged", {"task": "gqa"}])
    status, out, err = call(capsys, *words)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith(f"error: {message}"), err
    assert "Traceback" not in err


# --- runs that are stopped ------------------------------------------------------------------------------------------

def test_a_run_that_was_cut_at_any_byte_goes_on(ask, loaded, tmp_path):
    whole = ask()[3]
    table = json.loads((tmp_path / "out/table.json").read_text())
    ends = [i + 1 for i, c in enumerate(whole["words"]) if c == ord("\n")]
    for cut in (0, 50, ends[1], ends[2] + 40):
        for file in (tmp_path / "out").glob("*"):
            file.unlink()
        (tmp_path / "out/words.jsonl").write_bytes(whole["words"][:cut])
        status, _, err, files = ask()
        assert (status, files) == (0, whole), cut
    del loaded[:]
    assert ask()[3] == whole and not loaded
    again = json.loads((tmp_path / "out/table.json").read_text())
    assert all(row.pop("prompts_per_second") is None for row in again["tasks"])
    assert all(row.pop("prompts_per_second") > 0 for row in table["tasks"]) and table == again


def test_a_run_that_was_killed_goes_on(ask, folder, tmp_path):
    """A process of its own, killed once it has written: nothing is lost, and the end is that of a run that was not."""
    rows = [row | {"id": i, "question": f"{row['question']} {i}"} for i in range(5)
            for row in rows_of(folder / "q.jsonl") if row["task"] == "words"]
    data, begun = write(tmp_path / "words.jsonl", rows), tmp_path / "out/words.jsonl"
    whole = ask(rows=data, batch=1)[3]
    begun.unlink()
    process = multiprocessing.get_context("fork").Process(target=ask, kwargs=dict(rows=data, batch=1))
    process.start()
    while process.is_alive() and not (begun.is_file() and begun.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    process.kill()
    process.join()
    n = begun.read_bytes().count(b"\n")
    assert process.exitcode == -signal.SIGKILL and 3 <= n < len(rows)
    assert whole["words"].startswith(begun.read_bytes())
    status, _, err, files = ask(rows=data, batch=1)
    assert status == 0 and f"has {n} of {len(rows)} rows already" in err and files == whole


# --- judgement ------------------------------------------------------------------------------------------------------

def test_other_rules_judge_without_asking(ask, loaded, folder, tmp_path):
    """The answers are overwritten with ones on which the rules differ."""
    rows = [{"question": f"is it {i}?\nA. red\nB. blue", "answers": ["B"], "category": "c", "task": "mmstar"}
            for i in range(3)]
    ask(rows=(data := write(tmp_path / "q.jsonl", rows)))
    file = tmp_path / "out/mmstar.jsonl"
    for row, answer in zip(found := rows_of(file), ("Blue, so A", "I think (B)", "so (B)")):
        row["answer"] = answer
    write(file, found)
    del loaded[:]
    for rules, right in (("classic", 1), ("0.7.2+", 2)):  # of three
        assert ask("--rules", rules, rows=data)[1].startswith(f"rules: {rules}\n") and not loaded
        [row] = json.loads((tmp_path / "out/table.json").read_text())["tasks"]
        assert row["score"] == pytest.approx(right * 100 / 3)


def resampled(rows, number, draws=1000):
    """Plain loops: a 95 % interval of number(groups of rows), by drawing groups with another generator."""
    groups, rng = {}, random.Random(1)
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", f"alone {i}"), []).append(row)
    found = sorted(number(rng.choices(list(groups.values()), k=len(groups))) for _ in range(draws))
    return found[draws * 25 // 1000], found[draws * 975 // 1000 - 1]


def answered(n, seed, task, good=2, **keys):
    """n rows of an answers file, some wrong (one to `good`), some that could not be answered; keys: functions of a
    row's number."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        row = {"task": task, "id": i, "question": f"is it {i}?", "answers": ["yes"],
               **{key: value(i) for key, value in keys.items()}, "run": "x"}
        if rng.random() < 0.1:
            rows.append(row | {"error": "no such image"})
        else:
            sa = rng.choice(([], [4], [4, 7]))
            rows.append(row | {"answer": rng.choice(["yes"] * good + ["no"]), "sa": sa, "pixels": rng.choice(
                ("all", "overview")), "flops": {"llm": 10 * (1 + len(sa)), "llm_dense": 60, "first_token_saving": 6 / (
                    1 + len(sa))}})
    return rows


def percent(groups):
    return 100 * fmean(row.get("answer") == "yes" for group in groups for row in group)


def mme(groups):
    """Points of one category, over 20: percent of questions and of images with both right."""
    both = sum(all(row.get("answer") == "yes" for row in group) for group in groups)
    return (percent(groups) + 100 * both / len(groups)) / 20


KINDS = {"words": dict(metric=lambda i: "exact_match"), "pope": {},
         "grouped": dict(metric=lambda i: "exact_match", group=lambda i: i // 5),
         "mme": dict(category=lambda i: "count", group=lambda i: f"image {i // 2}")}


@pytest.mark.parametrize("name", KINDS)
def test_a_number_with_its_interval(name, tmp_path):
    """Against plain loops. The intervals differ by what is drawn, so by some hundredths of their width."""
    number = mme if name == "mme" else percent
    file = write(tmp_path / f"{name}.jsonl", answered(80, 3, name, **KINDS[name]))
    rows = evaluate.judged(file, "classic")
    found = evaluate.measured(name, rows, 2.0)
    pairs = [rows[i:i + 2] for i in range(0, len(rows), 2)]
    assert found["score"] == pytest.approx(number(pairs)) and found["n"] == 80
    low, high = resampled(rows, number)
    assert evaluate.interval(range(1001)) == (25, 975)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.15 * (high - low))
    if name == "grouped":  # questions of a group, which are alike, tell less than as many others
        alike = [row | {"score": float(i // 5 % 2)} for i, row in enumerate(rows)]
        apart = [{key: value for key, value in row.items() if key != "group"} for row in alike]
        width = [x["high"] - x["low"] for x in (evaluate.measured(name, x, None) for x in (alike, apart))]
        assert 1.8 < width[0] / width[1] < 2.7  # by the root of 5


def test_what_it_costs(tmp_path):
    rows = evaluate.judged(write(tmp_path / "words.jsonl", answered(60, 5, "words", **KINDS["words"])), "classic")
    found, ran, names = evaluate.measured("words", rows, None), [row for row in rows if "error" not in row], {}
    spent = dense = first = layers = 0
    for row in ran:
        spent, dense = spent + row["flops"]["llm"], dense + row["flops"]["llm_dense"]
        first, layers = first + 1 / row["flops"]["first_token_saving"], layers + len(row["sa"])
        name = ("ov:" if row["pixels"] == "overview" else "") + ",".join(str(x) for x in row["sa"])
        names[name or "none"] = names.get(name or "none", 0) + 1
    assert found["errors"] == 60 - len(ran) > 0 and found["saving"] == pytest.approx(dense / spent)
    assert found["saving_first_token"] == pytest.approx(len(ran) / first)
    assert found["layers"] == pytest.approx(layers / len(ran)) and 0 < found["layers"] < 2
    assert found["chosen"] == pytest.approx({name: n / len(ran) for name, n in names.items()}) and len(names) == 6


def test_the_table_has_tasks_and_groups_and_fits_a_terminal():
    def row(task, group, score, **more):
        return {"task": task, "group": group, "n": 10000, "score": score, "low": 99.95, "high": 100.0, "layers": 2.5,
                "saving": 3.0, "saving_first_token": 12.0, "prompts_per_second": 1.25, **more}
    rows = [row("gqa", "easy", 60.0), row("pope", "easy", 80.0, layers=None, saving=None, saving_first_token=None),
            row("muirbench", "several", 20.0), row("blink", "several", 40.0), row("mmiu", "several", 60.0),
            row("a_task_with_a_long_name", "", 10.0)]
    costs = {"layers": 2.5, "saving": 3.0, "saving_first_token": 12.0}
    assert evaluate.groups(rows) == [{"task": "easy (2 of 8)", "n": 20000, "score": 70.0, **costs},
                                     {"task": "several (3 of 3)", "n": 30000, "score": 40.0, **costs}]
    lines = evaluate.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) + 2 and max(map(len, lines)) <= 80
    assert lines[2].split() == "gqa 10000 60.00 100.0 to 100.0 2.50 3.00x 12.00x 1.25".split()
    assert lines[3].split() == "pope 10000 80.00 100.0 to 100.0 - - - 1.25".split()
    assert lines[-1].split() == "several (3 of 3) 30000 40.00 2.50 3.00x 12.00x -".split()
    assert lines[7].startswith("a_task_with_a_lo")


# --- two runs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", KINDS)
def test_two_runs_question_by_question(name, capsys, tmp_path):
    """In another order, and with questions that only one has. Against plain loops."""
    a, b = answered(80, 3, name, **KINDS[name]), answered(90, 4, name, 9, **KINDS[name])
    for run, rows in (("a", a), ("b", random.Random(0).sample(b, 90))):
        (tmp_path / run).mkdir()
        write(tmp_path / run / f"{name}.jsonl", rows)
    write(tmp_path / "a/other.jsonl", answered(4, 4, "other"))
    status, out, err = call(capsys, "--compare", tmp_path / "a", tmp_path / "b")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "rules: classic" and max(map(len, lines)) <= 80 and len(lines) == 5
    assert err == f"{name}.jsonl: 10 questions only in one of them\n"

    number, size = (mme, 2) if name == "mme" else (percent, 5)
    second = {row["id"]: row for row in b}
    pairs = [(row, second[row["id"]]) for row in a]
    of = lambda side, groups: number([[pair[side] for pair in group] for group in groups])  # of one run
    first, other = (of(side, [pairs[i:i + size] for i in range(0, 80, size)]) for side in (0, 1))
    right = [[row.get("answer") == "yes" for row in pair] for pair in pairs]
    words = lines[-1].split()
    assert words[:5] == [name, "80", f"{first:.2f}", f"{other:.2f}", f"{other - first:+.2f}"]
    assert words[-2:] == [str(sum(x > y for x, y in right)), str(sum(y > x for x, y in right))]
    grouped = [{"pair": pair} | ({"group": pair[0]["group"]} if "group" in pair[0] else {}) for pair in pairs]
    low, high = resampled(grouped, lambda groups: (of(1, x := [[row["pair"] for row in g] for g in groups]) - of(0, x)))
    assert [float(words[5]), float(words[7])] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_a_run_beside_itself_and_one_that_is_not_done(capsys, tmp_path):
    """Questions that stand twice stay two; a line that is being written is not there yet; rules are kept to."""
    rows = answered(20, 3, "words", **KINDS["words"])
    rows = [{key: value for key, value in row.items() if key != "id"} | {"question": f"{i // 2}"}
            for i, row in enumerate(rows)]
    for run, more in (("a", []), ("b", ['{"task": "words", "ru'])):
        (tmp_path / run).mkdir()
        write(tmp_path / run / "words.jsonl", rows[:20 - 2 * len(more)] + more)
    words = call(capsys, "--compare", tmp_path / "a", tmp_path / "a")[1].splitlines()[-1].split()
    assert words[1] == "20" and words[4:] == ["+0.00", "+0.00", "to", "+0.00", "0", "0"]
    status, out, err = call(capsys, "--compare", tmp_path / "a", tmp_path / "b", "--rules", "0.7.2+")
    assert status == 0 and out.startswith("rules: 0.7.2+\n") and out.splitlines()[-1].split()[1] == "18"
    assert err == "words.jsonl: 2 questions only in one of them\n"


# --- the miniature --------------------------------------------------------------------------------------------------

def test_the_miniature_about_quilts(capsys, tmp_path):
    """From the command to the table: answers, routes and savings of sample.py --batch on the same questions."""
    rows = []
    for i, kind in enumerate(("scene", "copy", "table")):
        image, _, asked = world.conversation(np.random.default_rng((78, i)), 5, kind)
        image.save(tmp_path / f"{i}.png")
        rows += [{"image": f"{i}.png", "question": question, "answers": [answer], "metric": "exact_match",
                  "task": "quilts"} for _, question, answer in asked]
    data = write(tmp_path / "quilts.jsonl", rows)
    status, out, _ = call(capsys, "--data", data, "--out", tmp_path / "out", "--model", NANO)
    found = rows_of(tmp_path / "out/quilts.jsonl")
    [row] = json.loads((tmp_path / "out/table.json").read_text())["tasks"]
    right = sum(x["answer"] == x["answers"][0] for x in found)
    assert status == 0 and row["n"] == 15 and row["score"] == pytest.approx(100 * right / 15) and right > 12
    nano = VLM.from_pretrained(NANO)
    for x in found[::4]:
        question = x["question"], [tmp_path / x["image"]]
        assert (x["tokens"], tuple(x["sa"])) == alone(nano, question, max_tokens=64, pixels="auto")
    assert len(row["chosen"]) > 1 and sum(row["chosen"].values()) == pytest.approx(1) and row["saving"] > 1
