"""What the files may import, how long they may be, and what none of them may do."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each file may import only from what stands before it. The model stands after all that does without it
ORDER = """cli methods config pictures data families flops
           toy.font toy.world toy.muon toy.training toy.__main__ toy
           llava.index llava.mixtures llava.samples llava.batches llava.__main__ llava
           report parallel
           layout layers encoders.siglip encoders.fastvithd encoders.qwen2_vl encoders reduction arrange pruning explain
           cache_tree decoding weights model
           conversation answers costs chat evaluation checkpoints router stages train sample
           paper.metrics paper.tasks paper.evaluate paper.lmms
           paper.numbers paper.systems paper.trials paper.clock paper.ablate paper.bench paper.miniature paper.routing
           paper.compare paper.inside paper.analyse paper.masked paper.equalities paper.verify
           paper.page paper""".split()
# flops.py and every --help answer at once
NO_TORCH = """methods config families pictures data flops cli answers costs chat explain toy.world llava.samples
              paper.metrics paper.tasks""".split()


def name_of(path):
    """paper/bench.py -> paper.bench, paper/__init__.py -> paper."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
         if path.parent != ROOT / "tests"}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def imports(name):
    """The project's files that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}  # from toy import world
            found |= whole & FILES.keys() or {node.module}
    tops = {x.partition(".")[0] for x in FILES}
    assert all(x in FILES for x in found if x.partition(".")[0] in tops), (name, found)
    return found & FILES.keys()


def calls(name, function):
    """Every call of a function in a file, under whatever prefix."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            f = node.func
            if (f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", None)) == function:
                yield node


def test_every_file_has_its_place():
    assert sorted(ORDER) == sorted(FILES)
    assert {path.parent.name for path in ROOT.rglob("*.py") if ".git" not in path.parts} <= {
        ROOT.name, "tests", "encoders", "toy", "llava", "paper"}  # FILES looks no deeper


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_what_stands_before(name):
    assert imports(name) <= set(ORDER[:ORDER.index(name)])


def test_no_circle():
    """By itself, whatever the order above says: files can be taken away one by one that import none of those left."""
    left = {name: imports(name) for name in FILES}
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, left
        left = {name: needs for name, needs in left.items() if name not in free}


def test_what_stands_apart():
    """The miniature's world and the training files know data and operations, not the model; nothing needs paper/."""
    low = {"cli", "methods", "config", "families", "pictures", "data", "flops"}
    for name in FILES:
        folder = name.partition(".")[0]
        if folder in ("toy", "llava"):
            assert imports(name) <= low | {x for x in FILES if x.startswith(folder + ".")}, name
        elif folder != "paper":
            assert not any(x.startswith("paper") for x in imports(name)), name
    for name in ("cli", "methods", "parallel"):
        assert not imports(name), name
    assert imports("families") == {"cli", "config", "data"}
    assert {name for name in FILES if "parallel" in imports(name)} == {"checkpoints", "train", "paper.bench"}


@pytest.mark.parametrize("name", NO_TORCH)
def test_needs_no_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ORDER)
def test_length_width_and_docstring(name):
    lines = FILES[name].read_text().splitlines()
    assert len(lines) <= 450 and max(map(len, lines), default=0) <= 120
    assert (ast.get_docstring(TREES[name]) or "").strip() and lines[0].startswith('"""')


def test_no_line_of_the_tests_is_too_wide():
    for path in sorted((ROOT / "tests").glob("*.py")):
        assert max(map(len, path.read_text().splitlines()), default=0) <= 120, path


def test_attention_never_has_mask_and_grouped_heads_in_one_call():
    """CUDA has no fast kernel for both."""
    found = 0
    for name in FILES:
        for call in calls(name, "scaled_dot_product_attention"):
            words = {word.arg for word in call.keywords}
            assert None not in words and len(call.args) <= 3, (name, call.lineno)  # or words would not tell
            assert not {"attn_mask", "enable_gqa"} <= words, (name, call.lineno)
            found += 1
    assert found
