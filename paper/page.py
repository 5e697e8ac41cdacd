"""Sets the tables of README.md and paper/README.md anew, from paper/results/ and from what is counted.

    python -m paper.page

A table stands between two marks, <!-- NAME --> and <!-- /NAME -->; MEASURED and COUNTED say what each is made from. Who
measures something again runs its command and then this one; the conclusions around a table are theirs to read again.
"""
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import flops
from cli import Parser, run
from paper import ablate, bench, clock, compare, miniature, numbers, routing, verify
from paper.systems import conditions

ROOT = Path(__file__).parent.parent
PAGES, RESULTS = (ROOT / "README.md", ROOT / "paper" / "README.md"), ROOT / "paper" / "results"
MEASURED = {  # mark: (its JSON in results/, what makes markdown of that)
    "faster": ("bench-cpu-float32", bench.short_table),
    "miniature": ("miniature", lambda x: miniature.table(x["rows"])[0]),
    "routed": ("miniature", lambda x: miniature.routed_table(x["rows"])),
    "first token": ("first-token", lambda x: miniature.first_token_table(x["rows"])),
    "pixels": ("bench-pixels-cpu-float32", clock.pixels_table),
    "Table 1": ("compare", lambda x: compare.table(compare.TABLE_1, x["rows"])),
    "Table 2": ("compare", lambda x: compare.table(compare.TABLE_2, x["rows"])),
    "Table 7": ("compare", lambda x: compare.table(compare.TABLE_7, x["rows"])),
    "by task": ("compare", lambda x: compare.by_task((*compare.TABLE_1, compare.TABLE_7[1]), x["rows"])),
    "reductions": ("bench-reduce-cuda-bfloat16", clock.reductions_table),
    "ablations": ("ablate", lambda x: ablate.tables(x["runs"], x["dense"])),
    "routers": ("routing", lambda x: routing.tables(x["results"])),
    "verified": ("verify", lambda x: f"```\n{verify.page(x)}\n```"),
    "bench": ("bench-cpu-float32", bench.table),
    "bench, GPU": ("bench-cuda-bfloat16", lambda x: bench.table(some_prompts(x))),
    "operations, seconds": ("bench-measure-cpu-float32", clock.operations_table)}
COUNTED = {"flops": lambda: flops_page("--sa dense --sa 1,4,7,10,16,19,22 --sa 1,4 --sa none"),
           "claims": numbers.table, "backbones": numbers.backbones}


def some_prompts(result):
    """A result of paper.bench, of 5 tiles one prompt and the most at once alone, without kernels and training."""
    here = [r for r in result["rows"] if r["tiles"] == 5]
    ends = min(r["batch"] for r in here), max(r["batch"] for r in here)
    return {"rows": [r for r in here if r["batch"] in ends]}


def flops_page(flags):
    with redirect_stdout(io.StringIO()) as shown:
        flops.main(flags.split())
    return f"```\n$ python flops.py {flags}\n{shown.getvalue()}```"


def table(mark):
    """The markdown that stands between a mark and its end. Raises ValueError for a mark that stands for nothing."""
    if mark in COUNTED:
        return COUNTED[mark]()
    if mark not in MEASURED:
        raise ValueError(f"<!-- {mark} --> stands for no table: give one of {'; '.join([*MEASURED, *COUNTED])}")
    name, show = MEASURED[mark]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    return f"{show(result)}\n\n*`{result['command']}`: {conditions(result)}. paper/results/{name}.json*"


def filled(text):
    """A page with all its tables set anew. Raises ValueError where a mark has no end."""
    marks = re.findall("<!-- (.+?) -->", text)
    for mark, end in zip(marks[::2], marks[1::2] + [""] * (len(marks) % 2)):
        if end != f"/{mark}":
            raise ValueError(f"<!-- {mark} -->: end the table with <!-- /{mark} -->")
    return re.sub(r"<!-- (\w.*?) -->.*?<!-- /\1 -->", lambda m: f"<!-- {m[1]} -->\n\n{table(m[1])}\n\n<!-- /{m[1]} -->",
                  text, flags=re.S)


def main(argv=None):
    p = Parser(doc=__doc__, description="Set the tables of README.md and paper/README.md from what was measured.")
    p.parse_args(argv)
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        page.write_text(after)
        print(f"{page.relative_to(ROOT)}: {'set anew' if after != before else 'is as it was'}")


if __name__ == "__main__":
    run(main)
