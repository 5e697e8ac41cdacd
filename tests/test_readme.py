"""What README.md and paper/README.md say is still true."""
import json
import re
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
from paper import ablate, bench, miniature, numbers, routing
from toy import world

ROOT = Path(__file__).parent.parent
TEXT, EVIDENCE = ((ROOT / name).read_text() for name in ("README.md", "paper/README.md"))
RESULTS = ROOT / "paper" / "results"


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
    found = re.findall(r"(?:`|^)python (train\.py|router\.py|flops\.py|-m toy) ?([^`#\n]*)", TEXT + EVIDENCE, re.M)
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
    for size, shown in (("0.5b", "1.8\ntimes"), ("1.5b", "3.3 at"), ("7b", "6.8 at")):
        c = preset(f"llava-ov-{size}")
        tilings = flops.images(flops.parse(["--tiles", "5"]), c)
        dense, two = flops.compare(flops.count(c, [range(c.layers), (1, 4)], 40, tilings, 16, 1),
                                   flops.count(c, [range(c.layers)], 40, tilings, 16, 1)[0])
        assert f"{two['saving_first_token']:.1f}" == shown[:3] and shown in TEXT


def test_the_bench_table_is_what_was_measured_of_the_operations_that_are_counted():
    result = json.loads((RESULTS / "bench-cpu-float32.json").read_text())
    rows = [r for r in result["rows"] if (r["tiles"], r["batch"]) == (5, 1)]
    assert bench.table({**result, "rows": rows}) in EVIDENCE
    for words in (result["machine"], f"torch {result['torch']}", f"transformers {result['transformers']}"):
        assert words in EVIDENCE.replace("\n", " ")
    c = preset("llava-ov-0.5b")
    vision = tiling(768, 768, c).tokens
    assert f"{vision:,} visual tokens" in TEXT and {r["system"] for r in rows} == set(bench.SYSTEMS)
    for r in rows:
        if r["system"] in ("dense", "7", "4", "2", "none"):
            sa = range(24) if r["system"] == "dense" else bench.SYSTEMS[r["system"]][0]
            assert r["llm_flop"] == llm_flops(c, sa, 40, vision)
    for label, system in (("ours, dense", "dense"), ("2 self-attention layers", "2"), ("none", "none")):
        over = next(r for r in rows if r["system"] == system)["over_transformers"]
        assert f"| {label} | {over['prefill']:.1f}x | {over['first']:.2f}x |" in TEXT


def test_tables_are_what_the_programs_print(capsys):
    assert numbers.table() in EVIDENCE
    shown = re.search(r"```\n(llava-ov-0.5b\n.*?)```", EVIDENCE, re.S)[1]
    flops.main(re.search(r"python flops\.py (--sa .*?)`", EVIDENCE)[1].split())
    assert capsys.readouterr().out == shown


def test_the_miniatures_figures_are_those_that_were_measured():
    rows = json.loads((RESULTS / "miniature.json").read_text())["rows"]
    assert miniature.table(rows)[0] in EVIDENCE
    for name, task in world.TASKS.items():
        level = "coarse" if task.level < 0 else "detail" if task.level == 0 else f"relations, {task.level}"
        line = rf"^\| {name} \| {task.template.split('{')[0]}.*\| {re.escape(task.benchmark)} \| {level}\b"
        assert re.search(line, EVIDENCE, re.M), name


def test_the_routers_figures_are_those_that_were_measured():
    results = json.loads((RESULTS / "routing.json").read_text())
    assert results["questions"] == 1000 and len(results["seeds"]) == 3
    assert routing.tables(results["results"]) in EVIDENCE


def test_the_ablations_figures_are_those_that_were_measured():
    results = json.loads((RESULTS / "ablate.json").read_text())
    assert ablate.tables(results["runs"], results["dense"]) in EVIDENCE


def test_the_verification_is_the_one_that_was_run():
    result = json.loads((RESULTS / "verify.json").read_text())
    shown = re.search(r"```\n(random, float32\n.*?)```", EVIDENCE, re.S)[1]
    assert result["ok"] and f"torch {result['torch']}, transformers {result['transformers']}" in shown
    for line in result["lines"]:
        numbers = "" if line["measured"] is None else f"{line['measured']:.1e} of {line['bound']:.1e}"
        assert f"PASS  {line['check']:<30} {numbers:<19}  {line['note']}\n" in shown, line
