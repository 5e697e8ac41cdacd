"""The miniature's world: quilts. Images, questions and answers that follow from a seed; nothing to download.

A quilt is 72 x 72 pixels: four panels (red and green above, blue and yellow below) of 3 x 3 cells, so that a model
with 36-pixel tiles and 12-pixel patches sees a panel as a tile and a cell as a patch. A panel is plain, dark or light.
A cell is blank or has one sign (font.py), sewn in cross-stitch: each stitch is a 2 x 2 checkerboard around the cloth's
own colour. Averaged two by two, as in the base tile, the stitches vanish: the overview shows the panels' shades and
nothing else (tests/test_toy.py proves it).

Three kinds of quilt, each with its own questions (TASKS), in three strata:
- coarse: about the panels' shades; the base tile is enough;
- detail: find a cell and read it; a text token does that by itself, in one cross-attention layer or two;
- relations: between cells, in parallel over a panel. Each relation that builds on another one needs one more layer in
  which visual tokens look at visual tokens.
"""
from typing import NamedTuple

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from config import Config
from data import IMAGE, chatml
from toy.font import BLANK, DIGITS, FIRST_DIGIT, FIRST_SHAPE, LETTERS, NAMES, SHAPES, SIGNS

CELL, STITCH, SIDE = 12, 2, 6  # pixels of a cell, of a stitch; cells along a quilt
SIZE = SIDE * CELL             # pixels along a quilt
GROUND = {"red": (178, 92, 86), "green": (86, 150, 96), "blue": (88, 110, 176), "yellow": (176, 150, 78)}
SHADES = {"plain": 0, "dark": -30, "light": 30}  # added to a panel's ground
CONTRAST, MOTTLE = 64, 10      # a stitch is +- this around its ground; the cloth's own brightness varies by this
FLOOR, CEILING = 12, 243       # stitches stay between: what is clipped at 0 or 255 would not average away

COLOURS = list(GROUND)         # the panels, row by row
CELLS = [row + column for row in "abc" for column in "123"]  # of a panel, row by row
ADDRESSES = [f"{colour}:{cell}" for colour in COLOURS for cell in CELLS]
ROWS = [f"{colour}:{row}" for colour in COLOURS for row in "abc"]

TRAIN, EVAL = 0, 1  # the first number of every seed, so that training and evaluation never meet
# A new cross-attention starts from its layer's own weights, so it belongs where the dense model looks at the image.
# For shapes that is layer 0 (without it, "where" falls from 1.00 to .07): with ca 2, 5, 8, 11 it was at .20 after 400
# steps of stage 2, with 0, 5, 8, 11 at 1.00. The first candidate is 4, so that a router can look before it decides.
CA, SA = (0, 5, 8, 11), (4, 7, 10)
VIABLE = ((), (4,), (7,), (4, 7), (4, 10), (4, 7, 10))
OVERVIEW = ((),)               # over the base tile alone
REFERENCE_PROMPT = 9, (SIZE, SIZE)  # text tokens of a question and size of its image: what savings are computed for


# --- tasks ----------------------------------------------------------------------------------------------------------

class Task(NamedTuple):
    kinds: str      # the kinds of quilt it is asked about
    level: int      # -1: the base tile shows it; 0: one cell shows it; n > 0: n relations that build on one another
    template: str   # the question; {} is its argument
    benchmark: str  # what it stands for
    reason: str     # of relations: why text tokens, which read cells but cannot change them, do not suffice


TASKS = {  # text looks at the image once for each cross-attention, head and token of the question
    "shade": Task("scene copy table", -1, "how is {}", "MME, colour", ""),
    "count shade": Task("scene copy table", -1, "how many {}", "MME, count", ""),
    "any shade": Task("scene copy table", -1, "is there any {}", "MME, existence", ""),
    "exist": Task("scene", 0, "is there any {}", "POPE", ""),
    "colour": Task("scene", 0, "what colour is the {}", "GQA", ""),
    "where": Task("scene", 0, "where is the {}", "RealWorldQA", ""),
    "read": Task("copy table", 0, "what is at {}", "OCRBench, TextVQA", ""),
    "value": Task("table", 0, "what is the value of {}", "DocVQA", ""),  # two looks, the second knowing the first
    "changed row": Task("copy", 1, "how many changed in {}", "ChartQA", "6 cells to read and 3 pairs of them to "
                        "compare, each pair on its own: a mean over the cells does not tell"),
    "changed": Task("copy", 1, "how many changed in {}", "InfoVQA", "18 cells to read and 9 pairs to compare"),
    "odd row": Task("copy", 2, "how many odd in {}", "ChartQA", "12 cells to read, 6 pairs to compare, then 3 pairs of "
                    "results"),
    "odd": Task("copy", 2, "how many odd in {}", "InfoVQA", "36 cells to read, 18 pairs to compare, then 9 pairs of "
                "results"),
    "updated row": Task("table", 2, "how many updated in {}", "DocVQA, several hops", "for each of 3 keys: find it in "
                        "the other table, then compare what stands beside the two"),
    "odd pairs": Task("copy", 3, "how many odd pairs in {}", "InfoVQA", "whether a cell is odd for 9 cells, then 6 "
                      "pairs of neighbours, one above the other"),
    "updated pairs": Task("table", 3, "how many updated pairs in {}", "DocVQA, several hops", "whether a cell is "
                          "updated for 9 cells, then 6 pairs of neighbours"),
}
STRATA = {"coarse": [name for name, task in TASKS.items() if task.level < 0],
          "detail": [name for name, task in TASKS.items() if task.level == 0],
          "relations": [name for name, task in TASKS.items() if task.level > 0]}
KINDS = ["scene", "copy", "table"]
FILLERS = "is there what the at of how many in".split()  # what captions leave out
MARKS = ["same", "changed", "even", "odd", "kept", "updated", "single", "pairs"]  # what a relation can say of a cell


# --- quilts ---------------------------------------------------------------------------------------------------------

class Quilt(NamedTuple):
    kind: str
    signs: np.ndarray  # (6, 6) index into NAMES, or BLANK
    shades: list       # of each panel, a word of SHADES
    marks: np.ndarray  # (3, 4, 9) per level 1, 2, 3: the word that its relation gives to each panel's cells, or None


def panels(grid):
    """(6, 6) cells row by row -> (4, 9), panel by panel in the order of COLOURS."""
    return grid.reshape(2, 3, 2, 3).transpose(0, 2, 1, 3).reshape(4, 9)


def grid(panels):
    """The inverse: (4, 9) -> (6, 6)."""
    return panels.reshape(2, 2, 3, 3).transpose(0, 2, 1, 3).reshape(6, 6)


def make_quilt(rng, kind):
    """A random quilt of one kind. The order of draws is fixed: what a seed has given once, it gives always."""
    signs, marks = {"scene": _scene, "copy": _copy, "table": _table}[kind](rng)
    # A quilt has dark cloth, and light, with probability .58 each: then every other quilt has a panel of that shade
    cloths = ["plain", *(shade for shade in ("dark", "light") if rng.random() < 0.58)]
    shades = [cloths[i] for i in rng.integers(len(cloths), size=4)]
    return Quilt(kind, grid(signs), shades, marks)


def _scene(rng):
    """Half of the shapes, each once, somewhere. Returns signs (4, 9) and marks (3, 4, 9)."""
    signs = np.full((4, 9), BLANK)
    shapes = rng.choice(len(SHAPES), 4, replace=False)
    signs.flat[rng.choice(36, 4, replace=False)] = FIRST_SHAPE + shapes
    return signs, _no_marks()


def _copy(rng):
    """Letters. Green copies red and yellow copies blue, each with changes; a cell is odd if one copy alone changed."""
    signs, marks = np.full((4, 9), BLANK), _no_marks()
    green_changed, odd = _flags(rng), _flags(rng)
    signs[[0, 2]] = rng.integers(len(LETTERS), size=(2, 9))
    for copy, original, changed in ((1, 0, green_changed), (3, 2, green_changed ^ odd)):
        signs[copy] = (signs[original] + changed * rng.integers(1, len(LETTERS), 9)) % len(LETTERS)
        marks[0, copy] = np.where(changed, "changed", "same")
    marks[1, 3] = np.where(odd, "odd", "even")
    marks[2, 3, 3:] = _pairs(odd)
    return signs, marks


def _table(rng):
    """Red and blue have the nine letters as keys, in different orders, green and yellow their values, digits; some of
    yellow's differ from green's: they are updated."""
    _flags(rng)  # unused, as a copy quilt's first: seeds name the quilts that the weights were trained on
    updated, marks = _flags(rng), _no_marks()
    keys, order = rng.permutation(len(LETTERS)), rng.permutation(len(LETTERS))
    values = rng.integers(len(DIGITS), size=9)
    new = (values[order] + updated * rng.integers(1, len(DIGITS), 9)) % len(DIGITS)
    signs = np.stack([keys, FIRST_DIGIT + values, keys[order], FIRST_DIGIT + new])
    marks[0, 1], marks[0, 3] = np.array(NAMES)[signs[0]], np.array(NAMES)[signs[2]]  # each value knows its key
    marks[1, 3] = np.where(updated, "updated", "kept")
    marks[2, 3, 3:] = _pairs(updated)
    return signs, marks


def _no_marks():
    return np.full((3, 4, 9), None, dtype=object)


def _flags(rng):
    """(9,) booleans: in each row 0 to 3 are True, all numbers equally likely, so that counts cannot be guessed."""
    n = rng.integers(4, size=3)
    return (rng.random((3, 3)).argsort(1) < n[:, None]).ravel()


def _pairs(flags):
    """(6,) words for the cells of rows b and c: whether both the cell and the one above it are flagged."""
    return np.where(flags[3:] & flags[:6], "pairs", "single")


# --- rendering ------------------------------------------------------------------------------------------------------

def _stitches():
    """(signs + 1, 12, 12): +1 and -1 where a sign is lighter and darker than the cloth, 0 elsewhere; BLANK is all 0."""
    width = 5 * STITCH  # the last two pixels of a cell are a seam
    checker = np.where(np.add.outer(np.arange(width), np.arange(width)) % 2, -1, 1)
    stitches = np.zeros((BLANK + 1, CELL, CELL), dtype=np.int16)
    for i, sign in enumerate(SIGNS.values()):
        stitches[i, :width, :width] = np.kron(sign, np.ones((STITCH, STITCH), dtype=np.int16)) * checker
    return stitches


STITCHES = _stitches()
PANEL_OF_CELL = grid(np.arange(4).repeat(9).reshape(4, 9)).ravel()  # (36,)


def cloth(shades):
    """(4, 3) RGB of the panels' cloth, and (4, 3) how far stitches on it may go up and down."""
    ground = np.array(list(GROUND.values())) + np.array([SHADES[shade] for shade in shades])[:, None]
    return ground, np.minimum(CONTRAST, np.minimum(ground - FLOOR, CEILING - ground))


def render(quilt, rng):
    """The quilt as a PIL image of 72 x 72 pixels."""
    ground, contrast = (x[PANEL_OF_CELL][:, None, None] for x in cloth(quilt.shades))              # (36, 1, 1, 3)
    cells = STITCHES[quilt.signs.ravel()][..., None] * contrast + ground                           # (36, 12, 12, 3)
    image = cells.reshape(SIDE, SIDE, CELL, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(SIZE, SIZE, 3)
    # The cloth's brightness varies from stitch to stitch: without that, a reader who knows every sign could tell 64 %
    # of the letters from the base tile, as a resized checkerboard's edges do not cancel quite
    mottle = rng.normal(0, MOTTLE, (SIZE // STITCH,) * 2).repeat(STITCH, 0).repeat(STITCH, 1)      # (72, 72)
    return Image.fromarray((image + mottle[..., None]).clip(0, 255).astype(np.uint8))


def is_quilt(image):
    """Whether a PIL image is of this world: its size, and the colours of its panels."""
    if image.size != (SIZE, SIZE):
        return False
    half = SIZE // 2
    mean = np.asarray(image.convert("RGB"), dtype=float).reshape(2, half, 2, half, 3).mean((1, 3)).reshape(4, 3)
    grounds = np.stack([cloth([shade] * 4)[0] for shade in SHADES])  # (3, 4, 3)
    distance = np.abs(mean - grounds).max(-1).min(0)                 # (4,) of each panel to its nearest shade
    return bool(distance.max() < 20)


# --- questions ------------------------------------------------------------------------------------------------------

def questions(quilt):
    """{task: [(question, answer), ...]}: everything that can be asked about a quilt."""
    asked = {}
    facts = {"scene": _scene_facts, "copy": _copy_facts, "table": _table_facts}[quilt.kind]
    for task, argument, answer in (*_coarse_facts(quilt), *facts(panels(quilt.signs), quilt.marks)):
        asked.setdefault(task, []).append((TASKS[task].template.format(argument), str(answer)))
    return asked


# Each of these yields (task, argument of the question, answer). signs (4, 9), marks (3, 4, 9): panel by panel.

def _coarse_facts(quilt):
    for colour, shade in zip(COLOURS, quilt.shades):
        yield "shade", colour, shade
    for shade in ("dark", "light"):
        yield "count shade", shade, quilt.shades.count(shade)
        yield "any shade", shade, "yes" if shade in quilt.shades else "no"


def _scene_facts(signs, marks):
    for i, shape in enumerate(SHAPES, start=FIRST_SHAPE):
        for panel, cell in np.argwhere(signs == i):
            yield "colour", shape, COLOURS[panel]
            yield "where", shape, CELLS[cell]
        yield "exist", shape, "yes" if i in signs else "no"


def _copy_facts(signs, marks):
    yield from _read_facts(signs)
    for panel in (1, 3):
        yield from _row_facts("changed", panel, marks[0])
        yield "changed", COLOURS[panel], (marks[0, panel] == "changed").sum()
    yield from _row_facts("odd", 3, marks[1])
    yield "odd", "yellow", (marks[1, 3] == "odd").sum()
    yield "odd pairs", "yellow", (marks[2, 3] == "pairs").sum()


def _table_facts(signs, marks):
    yield from _read_facts(signs)
    for key, value in zip(signs[0], signs[1]):
        yield "value", NAMES[key], NAMES[value]
    yield from _row_facts("updated", 3, marks[1])
    yield "updated pairs", "yellow", (marks[2, 3] == "pairs").sum()


def _read_facts(signs):
    for address, sign in zip(ADDRESSES, signs.flat):
        yield "read", address, NAMES[sign]


def _row_facts(word, panel, marks):
    """How often a mark stands in each of a panel's rows. marks (4, 9)."""
    for row, cells in zip("abc", marks[panel].reshape(3, 3)):
        yield f"{word} row", f"{COLOURS[panel]}:{row}", (cells == word).sum()


# --- conversations and evaluation -----------------------------------------------------------------------------------

def conversation(rng, turns, kind=None, tasks=TASKS):
    """(image, quilt, [(task, question, answer)]): a random quilt and `turns` different questions about it."""
    quilt = make_quilt(rng, kind or KINDS[rng.integers(len(KINDS))])
    left = {task: list(rng.permutation(pairs)) for task, pairs in questions(quilt).items() if task in tasks}
    asked = []
    while len(asked) < turns and left:
        # Tasks equally often, though one has 36 questions and another one; but the three coarse ones as often as one
        weights = np.array([1 / 3 if TASKS[task].level < 0 else 1.0 for task in left])
        task = list(left)[rng.choice(len(left), p=weights / weights.sum())]
        question, answer = left[task].pop()
        asked.append((task, str(question), str(answer)))
        if not left[task]:
            del left[task]
    return render(quilt, rng), quilt, asked


def caption(asked):
    """[(text, whether it is a target)]: the same questions and answers as one turn, without the words between.

    "any star yes red:b2 k changed green:a 2": each answer follows its question's last word at once. Reading is learned
    from these first, as larger models learn it from captions; from whole questions alone it took many times as long.
    """
    pieces = [(chatml([f"{IMAGE}\ndescribe the quilt"]), False)]
    for _, question, answer in asked:
        pieces += [(" ".join(word for word in question.split() if word not in FILLERS), False), (answer, True)]
    return pieces


def eval_set(seed, n, split=EVAL):
    """[(image, [(task, question, answer), ...])]: n held-out quilts of each kind, and n questions of every task that
    is asked about one kind alone; 2 n of `read`, which is asked about two.

    Each quilt has one question of every task of its kind, and of the coarse tasks, which suit all kinds, one in turn.
    split: TRAIN for those that a router learns from.
    """
    rows, coarse_tasks = [], STRATA["coarse"]
    for i, kind in enumerate(KINDS * n):
        rng = np.random.default_rng((split, seed, i))
        quilt = make_quilt(rng, kind)
        image = render(quilt, rng)
        coarse = coarse_tasks[(i + i // len(KINDS)) % len(coarse_tasks)]  # three rounds bring each to each kind
        rows.append((image, [(task, *pairs[rng.integers(len(pairs))]) for task, pairs in questions(quilt).items()
                             if task == coarse or TASKS[task].level >= 0]))
    return rows


# --- what visual tokens are taught in stage 0 -----------------------------------------------------------------------

# Where a quilt's panels and cells stand among its visual tokens: 9 of the base tile, then 6 rows of 6 and a newline
PANEL_TOKENS = [0, 2, 6, 8]  # the corners of the base tile's 3 x 3 tokens: each sees one panel alone
CELL_TOKENS = [9 + (SIDE + 1) * row + column for row in range(SIDE) for column in range(SIDE)]
PANEL_ORDER = panels(np.arange(36).reshape(6, 6)).ravel().argsort()  # cells row by row as indices into panel order


def words(quilt, level):
    """4 + 36 tuples of words: what is true of each panel and cell at a level, in the order of PANEL_TOKENS and
    CELL_TOKENS.

    Level 0 is what a token's own pixels show: a panel's colour and shade; a cell's colour, place, address, row, sign.
    Levels 1 to 3 are a cell's relations.
    """
    if level:
        of_panels = [()] * 4
        of_cells = [(str(mark),) if mark else () for mark in quilt.marks[level - 1].flat]
    else:
        of_panels = list(zip(COLOURS, quilt.shades))
        of_cells = [(colour, cell, f"{colour}:{cell}", f"{colour}:{cell[0]}") for colour in COLOURS for cell in CELLS]
        signs = [() if sign == BLANK else (NAMES[sign],) for sign in panels(quilt.signs).flat]
        of_cells = [place + sign for place, sign in zip(of_cells, signs)]
    return of_panels + [of_cells[i] for i in PANEL_ORDER]


# --- the miniature model --------------------------------------------------------------------------------------------

def tokenizer():
    """A word-level tokenizer with Qwen2's chat markers. What always stands around a turn is one token."""
    plain = sorted({word for task in TASKS.values() for word in task.template.replace("{}", "").split()})
    plain += ["yes", "no", "describe", "quilt"]
    vocabulary = list(dict.fromkeys(["<unk>", *plain, *NAMES, *MARKS, *SHADES, *COLOURS, *CELLS, *ROWS, *ADDRESSES]))
    t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", "")])
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    t.add_tokens([AddedToken(s, normalized=False) for s in (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", "\n")])
    return t


def config():
    """The dense miniature: LLaVA-OneVision with everything small."""
    return Config(hidden=64, layers=12, heads=2, kv_heads=1, head_dim=32, ffn=176, rope_theta=1e4,
                  vocab=tokenizer().get_vocab_size(), vision_hidden=64, vision_layers=2, vision_heads=2,
                  vision_ffn=192, tile=36, patch=12, pinpoints=((2, 2),), world="toy")
