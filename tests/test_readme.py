"""What README.md says is still true."""
import json
import re
from pathlib import Path

import flops
import router
import sample
import toy
import train
from config import preset
from data import tiling
from flops import llm_flops
from paper import ablate, bench, miniature, numbers, routing

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_files_in_the_table_exist_and_none_is_left_out():
    named = set(re.findall(r"^\| (\w+\.py) \|", TEXT, re.M))
    assert named == {p.name for p in ROOT.glob("*.py")}


def test_commands_parse_and_their_files_exist():
    for line in re.findall(r"python sample\.py (.*)", TEXT):
        words = re.findall(r'"[^"]*"|\S+', line)
        sample.parse([w.strip('"') for w in words])
    for program, flags in re.findall(r"(?:`|^)python (train|toy|router)\.py ?([^`#\n]*)", TEXT, re.M):
        flags = flags.replace("DIR", "somewhere").replace("out.png", "x.png")
        {"train": train, "toy": toy, "router": router}[program].parse(flags.split())
    for path in re.findall(r"(?<=\s)((?:assets|nano|tests)/[\w./]*)", TEXT):
        assert (ROOT / path).exists(), path


def test_the_bench_table_is_what_was_measured_of_the_operations_that_are_counted():
    result = json.loads((ROOT / "paper" / "results" / "bench-cpu.json").read_text())
    rows = [r for r in result["rows"] if (r["tiles"], r["batch"]) == (5, 1)]
    assert bench.table({**result, "rows": rows}) in TEXT
    for words in (result["machine"], f"torch {result['torch']}", f"transformers {result['transformers']}"):
        assert words in TEXT.replace("\n", " ")
    c = preset("llava-ov-0.5b")
    vision = tiling(768, 768, c).tokens
    assert f"{vision:,} visual tokens" in TEXT and {r["system"] for r in rows} == set(bench.SYSTEMS)
    for r in rows:
        if r["system"] in ("dense", "7", "4", "2", "none"):
            sa = range(24) if r["system"] == "dense" else bench.SYSTEMS[r["system"]][0]
            assert r["llm_flop"] == llm_flops(c, sa, 40, vision)


def test_tables_are_what_the_programs_print(capsys):
    assert numbers.table() in TEXT
    shown = re.search(r"```\n(llava-ov-0.5b\n.*?)```", TEXT, re.S)[1]
    flops.main(re.search(r"python flops\.py (--sa .*?)`", TEXT)[1].split())
    assert capsys.readouterr().out == shown


def test_the_miniatures_figures_are_those_that_were_measured():
    rows = json.loads((ROOT / "paper" / "results" / "miniature.json").read_text())["rows"]
    assert miniature.table(rows)[0] in TEXT
    for name, task in toy.TASKS.items():
        assert re.search(rf"^\| {name} \| {task.ask.split('{')[0]}.*\| {task.like} \| {task.level}", TEXT, re.M), name


def test_the_routers_figures_are_those_that_were_measured():
    results = json.loads((ROOT / "paper" / "results" / "routing.json").read_text())
    assert results["questions"] == 1000 and len(results["seeds"]) == 3
    assert routing.tables(results["results"]) in TEXT


def test_the_ablations_figures_are_those_that_were_measured():
    results = json.loads((ROOT / "paper" / "results" / "ablate.json").read_text())
    assert ablate.tables(results["runs"], results["dense"]) in TEXT
