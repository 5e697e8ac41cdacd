"""The miniature that ships in nano/: it answers, and shows the paper's effects, on held-out questions."""
import json

import numpy as np
import pytest
from PIL import Image

import data
import router
import sample
import toy
from config import run
from model import VLM
from train import DENSE, GROUPS, USUAL

ROOT = DENSE.parent.parent
FULL, ALL = max(toy.VIABLE, key=len), tuple(range(12))


@pytest.fixture(scope="module")
def nano():
    return VLM.from_pretrained(ROOT / "nano")


@pytest.fixture(scope="module")
def report(nano):
    """Rows by configuration of an exam of 100 questions a task, with a seed that no figure in the README uses."""
    exam = toy.exam(77, 100)
    dense = router.all_records(VLM.from_pretrained(DENSE), exam, [ALL], progress=False)
    records = router.all_records(nano, exam, nano.config.viable, progress=False)
    return router.Report(nano.config, records, GROUPS, *USUAL, dense)


def test_the_staircase(report):
    rows = {tuple(row["sa"]): row for row in report.rows if row["sa"] is not None}
    dense, none, full = rows[ALL], rows[()], rows[FULL]
    assert dense["easy"] > 0.95 and dense["hard"] > 0.8
    assert none["easy"] > 0.99 * dense["easy"] and none["hard"] < 0.6 * dense["hard"]
    assert full["hard"] > 0.95 * dense["hard"] and full["hard"] > 2 * none["hard"]
    best = [max(row["hard"] for sa, row in rows.items() if len(sa) == n) for n in range(4)]
    assert best == sorted(best)
    assert all(row["saving"] > 1.5 for sa, row in rows.items() if sa != ALL)


def test_the_router_spends_little_on_easy_questions_and_much_on_hard_ones(report):
    rows = {row["name"]: row for row in report.rows}
    routed, full = rows["router"], rows[router.name(report.config, FULL)]
    for group in GROUPS:
        assert routed[group] > 0.985 * full[group]
    assert routed["saving"] > 1.4 * full["saving"]
    assert routed["by_group"]["easy"]["layers"] < 0.3 and routed["by_group"]["hard"]["layers"] > 1.5
    cheap = {task: x["shares"].get("none", 0) for task, x in routed["by_task"].items()}
    for easy in toy.EASY:  # "what is at green:a1", "what is the value of k"
        assert cheap[easy] > 0.9
    for hard in toy.HARD:  # "how many changed in green:a", "how many odd in yellow": the same last words
        assert cheap[hard] < 0.1


def test_sample_answers(capsys):
    for kind, question, answer in (("scene", "What colour is the box?", "yellow"),
                                   ("copy", "what is at green:c1?", "t"), ("table", "What is the value of k?", "0")):
        sample.main(["--image", str(ROOT / "assets" / f"{kind}.png"), "--q", question])
        out, err = capsys.readouterr()
        assert out.strip() == answer and "miniature" not in err and "routed to --sa none" in err


def test_another_world_is_announced_in_one_line(tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    sample.main(["--image", str(tmp_path / "x.png"), "--q", "where is the tree"])
    assert sum("knows only the quilts" in line for line in capsys.readouterr().err.splitlines()) == 1
    sample.main(["--image", str(ROOT / "assets" / "scene.png"), "--q", "where is the dog"])
    said, = [line for line in capsys.readouterr().err.splitlines() if "knows only the quilts" in line]
    assert said.endswith("no word for dog")


def test_examine_says_right_exactly_where_the_answer_is(nano):
    """Teacher-forced examination against asking as sample.py does."""
    exam = toy.exam(78, 8)
    for sa in ((), FULL):
        records, said = router.all_records(nano, exam, [sa], progress=False), {}
        for image, asked in exam:
            begin = data.encode(data.split_shared(data.chatml(["<image>\nx"]))[0], nano.tokenizer,
                                [data.picture(image, nano.config)])
            cache = nano.see(begin, sa)
            for task, question, answer in asked:
                own = data.split_shared(data.chatml([f"<image>\n{question}"]))[1]
                ids = nano.ask(cache, data.encode(own, nano.tokenizer, start=begin.end), max_tokens=4)
                said.setdefault(task, []).append(nano.tokenizer.decode(ids) == answer)
        right = sum(sum(x) for x in said.values())
        assert 0 < right < sum(map(len, said.values())) or sa == FULL
        assert {t: np.mean(x) for t, x in said.items()} == router.accuracy(records, 0)


def test_toy_command_line(tmp_path, capsys):
    toy.main(["--show", str(tmp_path / "sheet.png"), "--n", "1"])
    assert Image.open(tmp_path / "sheet.png").width > 1000
    toy.main(["--write", str(tmp_path / "data"), "--n", "6"])
    samples = json.loads((tmp_path / "data" / "quilts.json").read_text())
    assert len(samples) == 6
    for s in samples:
        assert Image.open(tmp_path / "data" / s["image"]).size == (72, 72)
        assert [turn["from"] for turn in s["conversations"]] == ["human", "gpt"] * (len(s["conversations"]) // 2)
        assert s["conversations"][0]["value"].startswith("<image>\n")
        assert "<image>" not in "".join(turn["value"] for turn in s["conversations"][1:])
    capsys.readouterr()
    for words in ([], ["--show", "x.jpg"], ["--write", "d", "--n", "0"]):
        with pytest.raises(SystemExit) as stop:
            run(lambda words=words: toy.main(words))
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
