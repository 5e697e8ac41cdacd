"""The miniature world: quilts. Pictures, questions and answers drawn from a seed; nothing to download.

A quilt is 72 x 72 pixels: four panels (red and green above, blue and yellow below) of 3 x 3 cells, so that a model with
36-pixel tiles and 12-pixel patches sees a panel as a tile and a cell as a patch. A cell is blank or has one sign, sewn
in cross-stitch: each stitch is a 2 x 2 checkerboard around the cloth's own colour. Averaged two by two, as the base
tile is, the stitches vanish: whoever has only the overview knows nothing (tests/test_toy.py proves it).

Three kinds of quilt, each with its own questions (TASKS). Easy ones find a cell and read it; a text token can do that
by itself. Hard ones are about relations between cells, in parallel over a panel. `level` counts the relations that
build on one another: each needs one more layer in which visual tokens look at visual tokens.

    python toy.py --show out.png      a contact sheet with questions and answers
    python toy.py --write DIR         pictures and a LLaVA JSON file
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tqdm import tqdm

from config import Config, Parser, run
from data import IMAGE, chatml

CELL, STITCH, SIDE = 12, 2, 6  # pixels of a cell, of a stitch; cells along a quilt
GROUND = {"red": (178, 92, 86), "green": (86, 150, 96), "blue": (88, 110, 176), "yellow": (176, 150, 78)}
SHADES = {"plain": 0, "dark": -30, "light": 30}  # added to a panel's ground
CONTRAST, MOTTLE = 64, 10      # a stitch is +- this around its ground; the cloth's own brightness varies by this
FLOOR, CEILING = 12, 243       # stitches stay between: what is clipped at 0 or 255 would not average away
FONT = """
a .###. c .#### e ##### h #...# k #...# l #.... p ####. t ##### x #...#
a #...# c #.... e #.... h #...# k #..#. l #.... p #...# t ..#.. x .#.#.
a ##### c #.... e ####. h ##### k ###.. l #.... p ####. t ..#.. x ..#..
a #...# c #.... e #.... h #...# k #..#. l #.... p #.... t ..#.. x .#.#.
a #...# c .#### e ##### h #...# k #...# l ##### p #.... t ..#.. x #...#
0 .###. 1 ..#.. 2 ####. 3 ####. 4 #..#. 5 ##### 6 .###. 7 ##### 8 .###. 9 .###.
0 #...# 1 .##.. 2 ....# 3 ....# 4 #..#. 5 #.... 6 #.... 7 ....# 8 #...# 9 #...#
0 #...# 1 ..#.. 2 .###. 3 .###. 4 ##### 5 ####. 6 ####. 7 ...#. 8 .###. 9 .####
0 #...# 1 ..#.. 2 #.... 3 ....# 4 ...#. 5 ....# 6 #...# 7 ..#.. 8 #...# 9 ....#
0 .###. 1 .###. 2 ##### 3 ####. 4 ...#. 5 ####. 6 .###. 7 ..#.. 8 .###. 9 .###.
star ..#.. heart .#.#. moon .###. grid .#.#. cross ..#.. box ##### gem ..#.. tree ..#..
star ##### heart ##### moon ..##. grid ##### cross ..#.. box #...# gem .###. tree .###.
star .###. heart ##### moon ...## grid .#.#. cross ##### box #...# gem ##### tree .###.
star ##.## heart .###. moon ..##. grid ##### cross ..#.. box #...# gem .###. tree #####
star #...# heart ..#.. moon .###. grid .#.#. cross ..#.. box ##### gem ..#.. tree ..#..
"""


def _signs():
    """Name -> 5 x 5 booleans, in the order of the font."""
    rows = {}
    for line in FONT.split("\n"):
        words = line.split()
        for name, row in zip(words[::2], words[1::2]):
            rows.setdefault(name, []).append([x == "#" for x in row])
    return {name: np.array(x) for name, x in rows.items()}


SIGNS = _signs()
NAMES = list(SIGNS)
LETTERS, DIGITS, SHAPES = NAMES[:9], NAMES[9:19], NAMES[19:]
BLANK = len(NAMES)
COLOURS = list(GROUND)
CELLS = [row + column for row in "abc" for column in "123"]
ADDRESSES = [f"{colour}:{cell}" for colour in COLOURS for cell in CELLS]
ROWS = [f"{colour}:{row}" for colour in COLOURS for row in "abc"]


class Task(NamedTuple):
    kind: str     # the quilts it is asked about
    level: int    # -1: the base tile shows it; 0: one cell shows it; n > 0: n relations that build on one another
    ask: str      # the question; {} is the argument
    like: str     # the benchmark it stands for
    why: str      # hard tasks: why text tokens alone, which read cells but cannot change them, do not suffice


TASKS = {  # text looks at the picture once for each cross-attention, head and token of the question
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
FILLERS = "is there what the at of how many in".split()  # what captions leave out
KINDS = ["scene", "copy", "table"]
MARKS = ["same", "changed", "even", "odd", "kept", "updated", "single", "pairs"]  # what a relation can say of a cell


# --- quilts ---------------------------------------------------------------------------------------------------------

TRAIN, EXAM = 0, 1  # the first number of every seed: what is learned from and what is asked in exams never meet
PANEL_TOKENS = [0, 2, 6, 8]  # the corners of the base tile's 3 x 3 tokens: each sees one panel alone
CELL_TOKENS = [9 + 7 * row + column for row in range(SIDE) for column in range(SIDE)]  # the base tile has 9; newlines
# A new cross-attention starts from its layer's own weights, so it belongs where the dense model looks at the picture.
# For shapes that is layer 0 (without it, "where" falls from 1.00 to .07): with ca 2, 5, 8, 11 it was at .20 after 400
# steps of stage 2, with 0, 5, 8, 11 at 1.00. The first candidate is 4, so that a router can look before it decides.
CA, SA = (0, 5, 8, 11), (4, 7, 10)
VIABLE = ((), (4,), (7,), (4, 7), (4, 10), (4, 7, 10))


class Quilt(NamedTuple):
    kind: str
    signs: np.ndarray  # (6, 6) index into NAMES, or BLANK
    shades: list       # of each panel, a word of SHADES
    marks: list        # per level 1, 2, 3: (4, 9) words that the relations give to the cells of each panel, or None


def panels(grid):
    """(6, 6) <-> (4, 9), panel by panel in the order of COLOURS."""
    return grid.reshape(2, 3, 2, 3).transpose(0, 2, 1, 3).reshape(4, 9)


def quilt(rng, kind):
    """A random quilt of one kind."""
    p = np.full((4, 9), BLANK)
    marks = np.full((3, 4, 9), None, dtype=object)
    first_digit, letters = len(LETTERS), len(LETTERS)
    if kind == "scene":  # half of the shapes, each once
        p.flat[rng.choice(36, 4, replace=False)] = NAMES.index(SHAPES[0]) + rng.choice(len(SHAPES), 4, replace=False)
    else:
        # Per row of three cells 0 to 3 are odd or updated, all numbers equally likely; so counts cannot be guessed
        flags = np.stack([_flags(rng), _flags(rng)])
        if kind == "copy":  # green copies red and yellow copies blue, each with changes
            p[[0, 2]] = rng.integers(letters, size=(2, 9))
            changed = flags[0], flags[0] ^ flags[1]
            for copy, original, which in ((1, 0, changed[0]), (3, 2, changed[1])):
                p[copy] = (p[original] + which * rng.integers(1, letters, 9)) % letters
                marks[0, copy] = np.where(which, "changed", "same")
            marks[1, 3] = np.where(flags[1], "odd", "even")  # changed in one of the two copies only
        else:  # red and blue have keys, green and yellow their values; some of yellow's differ from green's
            keys, order = rng.permutation(letters), rng.permutation(letters)
            values = rng.integers(10, size=9)
            new = (values[order] + flags[1] * rng.integers(1, 10, 9)) % 10
            p[:] = keys, first_digit + values, keys[order], first_digit + new
            marks[0, 1], marks[0, 3] = np.array(NAMES)[p[0]], np.array(NAMES)[p[2]]  # each value knows its key
            marks[1, 3] = np.where(flags[1], "updated", "kept")
        above = flags[1][:6] & flags[1][3:]
        marks[2, 3, 3:] = np.where(above, "pairs", "single")  # it and the cell above
    # A quilt has dark cloth, and light, with probability .58 each: then every other quilt has a panel of that shade
    cloths = ["plain", *(shade for shade in ("dark", "light") if rng.random() < 0.58)]
    shades = [cloths[i] for i in rng.integers(len(cloths), size=4)]
    return Quilt(kind, p.reshape(2, 2, 3, 3).transpose(0, 2, 1, 3).reshape(6, 6), shades, marks)


def _flags(rng):
    """9 cells of which 0 to 3 in each row are True."""
    n = rng.integers(4, size=3)
    return (rng.random((3, 3)).argsort(1) < n[:, None]).ravel()


STITCHES = np.zeros((BLANK + 1, CELL, CELL), dtype=np.int16)  # +1 and -1 where a sign is lighter, darker than the cloth
for _i, _sign in enumerate(SIGNS.values()):
    _checker = np.where(np.add.outer(np.arange(10), np.arange(10)) % 2, -1, 1)
    STITCHES[_i, :10, :10] = np.kron(_sign, np.ones((STITCH, STITCH), dtype=np.int16)) * _checker
PANEL_OF_CELL = np.array([0, 0, 0, 1, 1, 1] * 3 + [2, 2, 2, 3, 3, 3] * 3)


def cloth(shades):
    """(4, 3) RGB of the panels' cloth, and how far stitches on it may go up and down."""
    ground = np.array(list(GROUND.values())) + np.array([SHADES[shade] for shade in shades])[:, None]
    return ground, np.minimum(CONTRAST, np.minimum(ground - FLOOR, CEILING - ground))


def render(quilt, rng):
    """The quilt as a PIL image of 72 x 72 pixels."""
    ground, contrast = (x[PANEL_OF_CELL][:, None, None] for x in cloth(quilt.shades))          # (36, 1, 1, 3)
    cells = STITCHES[quilt.signs.ravel()][..., None] * contrast + ground                       # (36, 12, 12, 3)
    image = cells.reshape(SIDE, SIDE, CELL, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(SIDE * CELL, SIDE * CELL, 3)
    mottle = rng.normal(0, MOTTLE, (SIDE * CELL // STITCH,) * 2).repeat(STITCH, 0).repeat(STITCH, 1)
    return Image.fromarray((image + mottle[..., None]).clip(0, 255).astype(np.uint8))


def is_quilt(image):
    """Whether a picture is of this world: its size, and the colours of its panels."""
    if image.size != (SIDE * CELL,) * 2:
        return False
    panel = np.asarray(image.convert("RGB"), dtype=float).reshape(2, 36, 2, 36, 3).mean((1, 3)).reshape(4, 3)
    grounds = [cloth([shade] * 4)[0] for shade in SHADES]
    return bool(np.min([np.abs(panel - ground).max(1) for ground in grounds], axis=0).max() < 20)


# --- questions ------------------------------------------------------------------------------------------------------

def questions(quilt):
    """{task: [(question, answer), ...]}: everything that can be asked about a quilt."""
    asks = {}

    def add(task, argument, answer):
        asks.setdefault(task, []).append((TASKS[task].ask.format(argument), str(answer)))
    p, (one, two, three) = panels(quilt.signs), quilt.marks
    for colour, shade in zip(COLOURS, quilt.shades):
        add("shade", colour, shade)
    for shade in ("dark", "light"):
        add("count shade", shade, quilt.shades.count(shade))
        add("any shade", shade, "yes" if shade in quilt.shades else "no")
    if quilt.kind == "scene":
        for i, shape in enumerate(SHAPES, start=NAMES.index(SHAPES[0])):
            found = np.argwhere(p == i)
            for colour, cell in found:
                add("colour", shape, COLOURS[colour])
                add("where", shape, CELLS[cell])
            add("exist", shape, "yes" if len(found) else "no")
        return asks
    for address, sign in zip(ADDRESSES, p.flat):
        add("read", address, NAMES[sign])

    def count(task, panel, word, marks):
        for row, cells in zip("abc", marks[panel].reshape(3, 3)):
            add(task + " row", f"{COLOURS[panel]}:{row}", (cells == word).sum())
    if quilt.kind == "copy":
        for panel in (1, 3):
            count("changed", panel, "changed", one)
            add("changed", COLOURS[panel], (one[panel] == "changed").sum())
        count("odd", 3, "odd", two)
        add("odd", "yellow", (two[3] == "odd").sum())
        add("odd pairs", "yellow", (three[3] == "pairs").sum())
    else:
        for key, value in zip(p[0], p[1]):
            add("value", NAMES[key], NAMES[value])
        count("updated", 3, "updated", two)
        add("updated pairs", "yellow", (three[3] == "pairs").sum())
    return asks


def conversation(rng, turns, kind=None):
    """(image, quilt, [(task, question, answer)]): a quilt and `turns` different questions about it."""
    q = quilt(rng, kind or KINDS[rng.integers(len(KINDS))])
    asks = {task: list(rng.permutation(pairs)) for task, pairs in questions(q).items()}
    asked = []
    while len(asked) < turns and asks:  # tasks equally often, though one has 36 questions and another one; but the three
        weights = np.array([1 / 3 if TASKS[task].level < 0 else 1.0 for task in asks])  # coarse ones as often as one
        task = list(asks)[rng.choice(len(asks), p=weights / weights.sum())]
        asked.append((task, *map(str, asks[task].pop())))
        if not asks[task]:
            del asks[task]
    return render(q, rng), q, asked


def caption(asked):
    """[(text, whether it is to be learned)]: the same questions and answers as one turn, without the words between.

    "any star yes red:b2 k changed green:a 2": each answer follows its question's last word at once. Reading is learned
    from these first, as larger models learn it from captions; from whole questions alone it took many times as long.
    """
    pieces = [(chatml([f"{IMAGE}\ndescribe the quilt"]), False)]
    for _, question, answer in asked:
        pieces += [(" ".join(w for w in question.split() if w not in FILLERS), False), (answer, True)]
    return pieces


def exam(seed, n, split=EXAM):
    """[(image, [(task, question, answer), ...])]: held-out quilts, n of each kind, and n questions a task: each quilt has
    one of every task of its kind, and of the coarse tasks, which suit all kinds, one in turn. split: TRAIN for those
    that a router learns from."""
    papers = []
    for i, kind in enumerate(KINDS * n):
        rng = np.random.default_rng((split, seed, i))
        q = quilt(rng, kind)
        image, others = render(q, rng), set(STRATA["coarse"]) - {STRATA["coarse"][(i + i // 3) % 3]}
        papers.append((image, [(task, *pairs[rng.integers(len(pairs))]) for task, pairs in questions(q).items()
                               if task not in others]))
    return papers


ORDER = panels(np.arange(36).reshape(6, 6)).ravel().argsort()  # for each cell, row by row, its place in panel order
PLACES = [(colour, cell, f"{colour}:{cell}", f"{colour}:{cell[0]}") for colour in COLOURS for cell in CELLS]


def words(quilt, level):
    """4 + 36 tuples of words: what becomes known of each panel and cell at a level, for stage 0, in the order of
    PANEL_TOKENS and CELL_TOKENS.

    Level 0 is what a token's own pixels show: a panel's colour and shade; a cell's colour, place, address, row and sign.
    Levels 1 to 3 are a cell's relations.
    """
    if level:
        said = [(str(word),) if word else () for word in quilt.marks[level - 1].flat]
        return [()] * 4 + [said[i] for i in ORDER]
    signs = [(name,) for name in NAMES] + [()]
    said = [place + signs[s] for place, s in zip(PLACES, panels(quilt.signs).flat)]
    return [*zip(COLOURS, quilt.shades), *(said[i] for i in ORDER)]


def tokenizer():
    """A word-level tokenizer with Qwen2's chat markers. What always stands around a turn is one token."""
    plain = sorted({w for t in TASKS.values() for w in t.ask.replace("{}", "").split()})
    plain += ["yes", "no", "describe", "quilt"]
    vocabulary = list(dict.fromkeys(["<unk>", *plain, *NAMES, *MARKS, *SHADES, *COLOURS, *CELLS, *ROWS, *ADDRESSES]))
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("?", "")])
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    t.add_special_tokens([AddedToken(s, normalized=False) for s in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    t.add_tokens([AddedToken(s, normalized=False) for s in (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n", "\n")])
    return t


def config():
    """The miniature model: LLaVA-OneVision with everything small."""
    return Config(hidden=64, layers=12, heads=2, kv_heads=1, head_dim=32, ffn=176, rope_theta=1e4,
                  vocab=tokenizer().get_vocab_size(), vision_hidden=64, vision_layers=2, vision_heads=2,
                  vision_ffn=192, tile=36, patch=12, pinpoints=((2, 2),), world="toy")


# --- command line ---------------------------------------------------------------------------------------------------

def show(path, seed, n):
    """A contact sheet: n held-out quilts of each kind, six times enlarged, with a question a task and its answer."""
    size, width, gap = SIDE * CELL * 4, 760, 24
    papers = exam(seed, n)
    sheet = Image.new("RGB", (len(KINDS) * width + gap, n * (size + gap) + gap), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(19)
    for i, (image, asked) in enumerate(papers):
        x, y = gap + i % len(KINDS) * width, gap + i // len(KINDS) * (size + gap)
        sheet.paste(image.resize((size, size), Image.NEAREST), (x, y))
        for j, (task, question, answer) in enumerate(asked):
            at = x + size + 18, y + 46 * j
            pen.text(at, f"{question}?", (32, 33, 36), font)
            pen.text((at[0], at[1] + 21), answer, (190, 40, 30), font)
            pen.text((at[0] + 60, at[1] + 21), f"{task}, level {TASKS[task].level}", (130, 134, 140), font)
    sheet.save(path)


def write(directory, seed, n, turns=10):
    """n quilts as PNG files and conversations about them as LLaVA JSON (a list of samples, image paths relative)."""
    directory, samples = Path(directory), []
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(n), desc="quilts", ncols=80):
        image, quilt, asked = conversation(np.random.default_rng((TRAIN, seed, i)), turns)
        file = f"images/{i:06d}.png"
        image.save(directory / file)
        said = [{"from": who, "value": text} for _, q, a in asked for who, text in (("human", q), ("gpt", a))]
        said[0]["value"] = f"{IMAGE}\n" + said[0]["value"]
        samples.append({"id": i, "image": file, "data_source": f"toy-{quilt.kind}", "conversations": said})
    (directory / "quilts.json").write_text(json.dumps(samples, indent=1) + "\n")


def parse(argv=None):
    p = Parser(description="The miniature world: pictures, questions, answers.")
    p.add_argument("--show", metavar="FILE.png", help="draw a contact sheet with questions and answers")
    p.add_argument("--write", metavar="DIR", help="write pictures, and conversations in LLaVA's format: quilts.json")
    p.add_argument("--n", type=int, metavar="N", help="quilts of each kind to show, quilts to write (default: 3, 1000)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    args = p.parse_args(argv)
    if not (args.show or args.write):
        p.error("nothing to do: give --show FILE.png or --write DIR")
    if args.n is not None and args.n < 1 or args.seed < 0:
        p.error("--n must be at least 1 and --seed at least 0")
    if args.show and (not args.show.endswith(".png") or not Path(args.show).parent.is_dir()):
        p.error(f"--show {args.show}: give a .png file in a directory that exists")
    return args


def main(argv=None):
    args = parse(argv)
    if args.show:
        show(args.show, args.seed, args.n or 3)
        print(f"{args.show}: {args.n or 3} quilts of each kind", file=sys.stderr)
    if args.write:
        write(args.write, args.seed, args.n or 1000)
        print(f"{args.write}/quilts.json: {args.n or 1000} conversations", file=sys.stderr)


if __name__ == "__main__":
    run(main)
