"""What README.md and paper/README.md say is still true."""
import json
import re
from pathlib import Path

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


def test_commands_parse_and_their_files_exist():
    for line in re.findall(r"python sample\.py (.*)", TEXT):
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
        assert re.search(line, TEXT, re.M), name


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
