"""Draws the miniature's world, or exports it as training data.

    python -m toy --show out.png      a contact sheet with questions and answers
    python -m toy --write DIR         images, and conversations in LLaVA's format
"""
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from cli import Parser, atomic, counted, run
from data import IMAGE
from toy import world
from toy.font import SIGNS

BLACK, RED, GREY = (32, 33, 36), (190, 40, 30), (130, 134, 140)
TURNS = 10  # questions in an exported conversation


def show(path, seed, n):
    """A contact sheet: n held-out quilts of each kind, five times enlarged, below each a question a task with its
    answer; below all the signs, in two rows."""
    size, width, gap, line = world.SIZE * 5, 400, 24, 46  # pixels of a quilt, a column, a margin, a question
    stratum = {task: name for name, tasks in world.STRATA.items() for task in tasks}
    quilts, in_a_row = world.eval_set(seed, n), -(-len(SIGNS) // 2)
    height = size + line * max(len(asked) for _, asked in quilts) + 2 * gap
    sheet = Image.new("RGB", (len(world.KINDS) * width + gap, n * height + gap + 180), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(19)
    for i, (image, asked) in enumerate(quilts):
        x, y = gap + i % len(world.KINDS) * width, gap + i // len(world.KINDS) * height
        sheet.paste(image.resize((size, size), Image.NEAREST), (x, y))
        y += size + 12
        for task, question, answer in asked:
            level = world.TASKS[task].level
            depth = f", {level} deep" if level > 0 else ""
            pen.text((x, y), f"{question}?", BLACK, font)
            pen.text((x, y + 21), answer, RED, font)
            pen.text((x + 80, y + 21), f"{task} ({stratum[task]}{depth})", GREY, font)
            y += line
    for i, (name, sign) in enumerate(SIGNS.items()):
        x, y = gap + i % in_a_row * (sheet.width - gap) // in_a_row, n * height + gap + i // in_a_row * 86
        sheet.paste(Image.fromarray(np.uint8(~sign) * 255).resize((40, 40), Image.NEAREST), (x, y))
        pen.text((x, y + 44), name, GREY, font)
    sheet.save(path)


def write(directory, seed, n):
    """n quilts as PNG files, and conversations about them as LLaVA JSON: a list of samples, image paths relative."""
    directory, samples = Path(directory), []
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(n), desc="quilts", ncols=80):
        image, quilt, asked = world.conversation(np.random.default_rng((world.TRAIN, seed, i)), TURNS)
        file = f"images/{i:06d}.png"
        image.save(directory / file)
        turns = []
        for _, question, answer in asked:
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"{IMAGE}\n" + turns[0]["value"]
        samples.append({"id": i, "image": file, "data_source": f"toy-{quilt.kind}", "conversations": turns})
    with atomic(directory / "quilts.json") as beside:
        beside.write_text(json.dumps(samples, indent=1) + "\n")


def parse(argv=None):
    p = Parser(doc=__doc__, description="The miniature's world: images, questions, answers.")
    p.add_argument("--show", metavar="FILE.png", help="draw a contact sheet with questions and answers")
    p.add_argument("--write", metavar="DIR", help="write images, and conversations in LLaVA's format: quilts.json")
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
        n = args.n or 3
        show(args.show, args.seed, n)
        print(f"{args.show}: {counted(n, 'quilt')} of each kind", file=sys.stderr)
    if args.write:
        n = args.n or 1000
        write(args.write, args.seed, n)
        print(f"{args.write}/quilts.json: {counted(n, 'conversation')}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
