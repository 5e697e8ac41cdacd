"""What README.md and paper/README.md say is still true."""
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest

import flops
import llava.__main__
import router
import sample
import toy.__main__
import train
from config import preset
from data import tiling
from flops import llm_flops
from paper import bench, page
from toy import world

ROOT = Path(__file__).parent.parent
TEXT, EVIDENCE = (path.read_text() for path in page.PAGES)


def test_places_in_the_table_exist_and_none_is_left_out():
    named = set(re.findall(r"^\| (\w+(?:\.py|/)) \|", TEXT, re.M))
    assert named == {p.name for p in ROOT.glob("*.py")} | {f"{p.parent.name}/" for p in ROOT.glob("*/__init__.py")} | {
        "nano/"}


def test_the_map_of_the_paper_leads_to_the_lines_it_names():
    links = re.findall(r"\[([\w/.]+)(?:, (\w+\.)?(\w+))?\]\(([\w/.]+)#L(\d+)\)", TEXT)
    assert len(links) >= 11
    for file, _, symbol, target, line in links:
        assert target == file
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {symbol or ''}\w*\b", found), (file, symbol, found)
        assert not symbol or re.match(rf"\s*(def|class) {symbol}\b", found), (file, symbol, found)


def test_commands_parse_and_their_files_exist(monkeypatch):
    for stream in (sys.stdin, sys.stdout):  # without --q a conversation begins
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    for line in re.findall(r"python sample\.py ([^#`\n]*)", TEXT):
        words = re.findall(r'"[^"]*"|\S+', line)
        sample.parse([w.strip('"') for w in words])
    parsers = {"train.py": train, "router.py": router, "flops.py": flops, "-m toy": toy.__main__}
    lines = re.findall(r"^python [^#\n]+", TEXT + EVIDENCE, re.M)
    lines += [" ".join(x.split()) for x in re.findall(r"`(python [^`]+)`", TEXT + EVIDENCE)]  # over the end of a line
    found = re.findall(r"^python (train\.py|router\.py|flops\.py|-m toy) ?(.*)", "\n".join(lines), re.M)
    assert {program for program, _ in found} == set(parsers)
    for program, flags in found:
        if program == "-m toy" and not flags.strip():
            continue  # its name alone
        parsers[program].parse(flags.replace("DIR", "somewhere").replace("out.png", "x.png").split())
    assert re.search(r"python -m llava --(check|show) mix\.yaml", TEXT) and llava.__main__.main
    for path in re.findall(r"(?<=[\s(])((?:assets|nano|tests|paper)/[\w./-]*\w)", TEXT):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?<=[\s(])(results/[\w./-]*\w)", EVIDENCE):
        assert (ROOT / "paper" / path).exists(), path


def test_the_first_command_prints_what_it_says(capsys):
    first = re.search(r"# install, and ask about an image: prints (\w+)\n.* && python sample\.py (.*)", TEXT)
    wanted, words = first.groups()
    sample.main([w.strip('"') for w in re.findall(r'"[^"]*"|\S+', words)])
    assert capsys.readouterr().out == wanted + "\n"


def test_the_conversation_is_one_that_was_had(capsys, monkeypatch):
    """Answers and routes as printed, but for the seconds."""
    shown = re.search(r"```\n\$ python sample\.py (.*)\n((?:.*\n)+?)```", TEXT)
    said = [line[2:] for line in shown[2].splitlines() if line.startswith("> ")]
    lines = iter(said)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError()))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    sample.main(shown[1].split())
    out, err = capsys.readouterr()
    found, notes = out.splitlines(), [line for line in err.splitlines() if line.startswith("--sa ")]
    want = shown[2].splitlines()
    assert len(said) == len(notes) and want[1::3] == found[:len(said)]
    assert [re.sub(r", [0-9.]+ s$", "", line) for line in want[2::3]] == [
        re.sub(r", [0-9.]+ s$", "", line) for line in notes]


def test_examples_of_the_help_are_commands(capsys):
    for program in (flops, router, sample, train, toy.__main__):
        with pytest.raises(SystemExit):
            program.parse(["--help"])
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 80
        examples = [line for line in shown.partition("\nexamples:\n")[2].splitlines() if not line.startswith("   ")]
        assert examples and all(line.startswith(("  python ", "  torchrun ")) for line in examples)


def test_readme_is_short():
    assert len(TEXT.splitlines()) < 250 and len(TEXT.split()) < 2000


def test_what_it_buys_is_what_is_counted():
    """To the first token, encoder included, 5 tiles, two self-attention layers."""
    for size, shown in (("0.5b", "1.8 times"), ("1.5b", "3.3 at"), ("7b", "6.8 at")):
        c = preset(f"llava-ov-{size}")
        tilings = flops.images(flops.parse(["--tiles", "5"]), c)
        dense, two = flops.compare(flops.count(c, [range(c.layers), (1, 4)], 40, tilings, 16, 1),
                                   flops.count(c, [range(c.layers)], 40, tilings, 16, 1)[0])
        assert f"{two['saving_first_token']:.1f}" == shown[:3] and shown in " ".join(TEXT.split())


def results(name):
    return json.loads((page.RESULTS / f"{name}.json").read_text())


def test_tables_are_those_that_were_measured_and_counted():
    """Where this fails after a measurement: python -m paper.page."""
    marks = re.findall(r"<!-- (\w.*?) -->", TEXT + EVIDENCE)
    assert sorted(marks) == sorted([*page.MEASURED, *page.COUNTED])
    assert page.filled(TEXT) == TEXT and page.filled(EVIDENCE) == EVIDENCE


def test_a_number_measured_again_changes_one_file(tmp_path, monkeypatch, capsys):
    shutil.copytree(page.RESULTS, tmp_path / "results")
    pages = [shutil.copy(path, tmp_path / f"{i}.md") for i, path in enumerate(page.PAGES)]
    for name, value in (("RESULTS", tmp_path / "results"), ("PAGES", [Path(x) for x in pages]), ("ROOT", tmp_path)):
        monkeypatch.setattr(page, name, value)
    page.main([])
    assert capsys.readouterr().out == "0.md: is as it was\n1.md: is as it was\n"
    again = results("bench-cpu-float32")
    row = next(r for r in again["rows"] if (r["tiles"], r["batch"], r["system"]) == (5, 1, "2"))
    row["over_transformers"]["prefill"] = 123.4
    (page.RESULTS / "bench-cpu-float32.json").write_text(json.dumps(again))
    page.main([])
    assert capsys.readouterr().out == "0.md: set anew\n1.md: set anew\n"
    for before, now in zip((TEXT, EVIDENCE), map(Path, pages)):
        changed = [(a, b) for a, b in zip(before.splitlines(), now.read_text().splitlines()) if a != b]
        assert len(changed) == 1 and "123.4" in changed[0][1] and len(before.splitlines()) == len(
            now.read_text().splitlines())


@pytest.mark.parametrize("text, said", [("<!-- claim -->\n<!-- /claim -->", "claim --> stands for no table"),
                                        ("<!-- claims -->\n", "end the table with <!-- /claims -->"),
                                        ("<!-- claims --> <!-- flops -->", "end the table with <!-- /claims -->"),
                                        ("<!-- /claims --> <!-- claims -->", "<!-- /claims -->: end")])
def test_marks_that_stand_for_nothing(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        page.filled(text)


def test_what_was_measured_bears_out_what_is_concluded():
    """The conclusions of both pages, as far as they are about numbers that may be measured again."""
    rows = [{row["name"]: row for row in seed} for seed in results("miniature")["rows"]]

    def of(plan, stratum):
        return statistics.mean(row[plan][stratum] for row in rows)
    plans = [name for name in rows[0] if name not in ("dense", "router", "oracle")]
    assert len(rows) == 3 and results("miniature")["questions"] == 1000
    assert all(of(plan, "coarse") > 0.999 for plan in plans)  # the overview will do, which does for nothing else
    assert all(of(plan, "detail") > 0.995 for plan in plans if plan != "ov:none") and of("ov:none", "detail") < 0.2
    steps = [of(plan, "relations") for plan in ("none", "4", "4,7", "4,7,10")]
    assert steps == sorted(steps) and steps[3] > 0.96 * of("dense", "relations") > 2 * steps[0]
    assert of("router", "relations") > 0.99 * steps[3]
    compared = results("compare")["rows"]
    best = max((r["relations"] for r in compared if r["sa"] == "dense" and r["reduce"]))
    visor = next(r for r in compared if (r["label"], r["sa"]) == ("VISOR", "4,7"))
    pyramid = next(r for r in compared if r["label"] == "PyramidDrop, easy")
    assert best < 0.35 and visor["relations"] > 0.9 and visor["saving"] > pyramid["saving"]
    runs = results("ablate")["runs"]

    def trained(name):
        return statistics.mean(run["rows"][-1]["relations"] for run in runs if run["run"] == name)
    for names in ("none alone", "4 alone", "4,7 alone", "4,7,10 alone"), (
            "universal, half", "universal", "universal, twice"):
        assert [trained(name) for name in names] == sorted(map(trained, names))
    routed = results("routing")
    assert routed["questions"] == 1000 and len(routed["seeds"]) == 3
    for seed in routed["results"]["all tasks"]:
        full, router = (next(r for r in seed if r["name"] == name) for name in ("4,7,10", "router"))
        assert all(router[stratum] > 0.99 * full[stratum] for stratum in world.STRATA)
        assert router["saving"] > 1.4 * full["saving"] and router["end_to_end"] > 1.3 * full["end_to_end"]
    assert results("verify")["ok"]


def test_what_the_bench_ran_are_the_operations_that_are_counted():
    rows = [r for r in results("bench-cpu-float32")["rows"] if (r["tiles"], r["batch"]) == (5, 1)]
    c = preset("llava-ov-0.5b")
    vision = tiling(768, 768, c).tokens
    assert f"{vision:,} visual tokens" in TEXT and {r["system"] for r in rows} == set(bench.SYSTEMS)
    for r in rows:
        if r["system"] in ("dense", "7", "4", "2", "none"):
            sa = range(24) if r["system"] == "dense" else bench.SYSTEMS[r["system"]][0]
            assert r["llm_flop"] == llm_flops(c, sa, 40, vision)


def test_the_table_of_tasks_is_the_worlds():
    for name, task in world.TASKS.items():
        level = "coarse" if task.level < 0 else "detail" if task.level == 0 else f"relations, {task.level}"
        line = rf"^\| {name} \| {task.template.split('{')[0]}.*\| {re.escape(task.benchmark)} \| {level}\b"
        assert re.search(line, EVIDENCE, re.M), name
