"""A picture of what the model did: the image and its tiles, the layers by kind, and where the answer's attention went.

Drawn with Pillow alone. Used by `sample.py --explain out.png`.
"""
import textwrap
import unicodedata
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import counted
from data import Prompt, collate, join

INK, PALE, PAPER = (32, 33, 36), (112, 117, 125), (255, 255, 255)
KINDS = {"text-only": (218, 221, 226), "cross-attention": (72, 133, 237), "self-attention": (240, 140, 30)}
HEAT = np.array([[10, 8, 40], [90, 20, 110], [190, 55, 80], [245, 130, 30], [255, 230, 120]], dtype=float)
WIDTH, MARGIN, GAP = 1600, 48, 20
# Pillow's own font has ASCII and little more; for other text the first of these that is installed and has it
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf",
         "msyh.ttc")


def attention_to_images(model, prompt, answer, sa):
    """{layer: weights (visual tokens,)} of each layer that looks at vision: the attention of the tokens from which the
    answer was predicted, mean over them and over the heads. A self-attention layer's weights sum to the share that
    goes to vision. prompt: the whole data.Prompt, which runs once more, with the answer's token ids behind it.
    """
    import torch
    positions = [prompt.end + i for i in range(len(answer))]
    whole = join(prompt, Prompt(list(answer), positions, [], [], []))
    first, last = len(prompt.ids) - 1, max(len(whole.ids) - 1, len(prompt.ids))  # its last token predicts the first
    text_queries = list(range(first, last))
    found = {}

    def observe(l, kind, q, k, mask):
        """q (1, Nq, H, D), k (1, Nk, Hkv, D): keys of both streams in order of position, or of vision alone."""
        if kind == "self" and l not in sa:
            return  # a layer on text alone
        # Queries are text alone in a cross-attention, and in the last layer that reads vision; else both streams
        rows = text_queries if q.shape[1] == len(whole.ids) else [whole.t_pos[i] for i in text_queries]
        q, k = q[0, rows].float(), k[0].float().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if kind == "self":  # causal: each query sees its own position and those before
            seen = torch.tensor([whole.t_pos[i] for i in text_queries], device=q.device)
            scores = scores.masked_fill(torch.arange(len(k), device=q.device) > seen[:, None], float("-inf"))
        weights = scores.softmax(-1).mean((0, 1))  # (keys,)
        found[l] = (weights[whole.v_pos] if kind == "self" else weights).cpu().numpy()
    with torch.no_grad(), observed(model, observe):
        model(collate([whole]), tuple(sa))
    return found


@contextmanager
def observed(model, observer):
    """Within, every attention of the language model also calls observer(layer, kind, q, k, mask) before it runs: kind
    "self" (q and k rotated) or "cross", q (B, Nq, H, D), k (B, Nk, Hkv, D), mask as in layers.attention."""
    lm = model.language_model
    watched = [(l, "self", block.self_attn) for l, block in enumerate(lm.layers)]
    watched += [(int(l), "cross", cross) for l, cross in lm.cross.items()]
    for l, kind, module in watched:
        module.observer = partial(observer, l, kind)  # called in Attention.attend, CrossAttention.forward
    try:
        yield
    finally:
        for *_, module in watched:
            module.observer = None


def draw(path, images, processed, config, report, attention, questions=1):
    """Writes the PNG.

    images and processed: PIL images and their data.ProcessedImage; report: sample.py's row about the question;
    attention: of attention_to_images; questions: how many the report's saving is over.
    """
    images = [fit(image, 900, 900) for image in images]  # nothing is drawn larger
    maps = {l: (heat(weights, processed, config), float(weights.sum())) for l, weights in sorted(attention.items())}
    columns = 6
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
    thumbs = {l: montage(images, m, cell) for l, (m, _) in maps.items()}
    line = max((t.height for t, _ in thumbs.values()), default=0) + 72
    shown = fit(tiled(images, processed, config), 520, 380)
    asked, answer = (wrap(report[name], size, WIDTH - 2 * MARGIN) for name, size in (("question", 34), ("answer", 26)))
    answer = answer[:3] or ["(no answer)"]
    top = 150 + 34 * len(answer)
    heads = top + max(shown.height, 250) + 70
    page = Image.new("RGB", (WIDTH, heads + line * -(-len(maps) // columns) + MARGIN - 10), PAPER)
    pen = ImageDraw.Draw(page)

    write(pen, MARGIN, 36, asked[0] + " ..." * (len(asked) > 1), 34)
    y = 88
    for row in answer:
        y = write(pen, MARGIN, y, row, 26, PALE) + 8

    page.paste(shown, (MARGIN, top))
    grids = [f"{counted(p.tiling.tiles, 'tile')}, {counted(p.tiling.tokens, 'token')}" for p in processed]
    write(pen, MARGIN, top + shown.height + 10, textwrap.shorten("; ".join(grids), 60, placeholder=" ..."), 18, PALE)

    left = MARGIN + 520 + 2 * GAP
    strip(pen, left, top, WIDTH - MARGIN - left, config, report["sa"])
    flops = report["flops"]
    saving = flops["saving"]
    less = f"{saving:.1f}x fewer operations than" if saving > 1 else f"{1 / saving:.1f}x more operations than" if \
        saving < 1 else "as many operations as"
    spent = f"instead of {flops['llm_dense'] / 1e9:,.4g} GFLOP" if questions == 1 else "GFLOP for this one"
    facts = [f"Language model: {less} dense" + f" over {counted(questions, 'question')}" * (questions > 1),
             f"{flops['llm'] / 1e9:,.4g} {spent}; the vision encoder took {flops['encoder'] / 1e9:,.4g}",
             f"{report['text_tokens']} text and {counted(report['vision_tokens'], 'visual token')}, "
             f"{counted(len(report['tokens']), 'token')} of answer"]
    y = top + 150
    for i, fact in enumerate(facts):
        y = write(pen, left, y, fact, 20 if i else 30, PALE if i else INK) + 14

    write(pen, MARGIN, heads - 16, "Where the answer's attention went, each layer on its own scale:", 24)
    scale(page, pen, WIDTH - MARGIN - 620, heads - 12)
    for i, (l, (_, share)) in enumerate(maps.items()):
        x, y, (thumb, peak) = MARGIN + i % columns * (cell + GAP), heads + 26 + i // columns * line, thumbs[l]
        kind = "self-attention" if l in report["sa"] else "cross-attention"
        pen.rectangle((x, y, x + cell - 1, y + 4), fill=KINDS[kind])
        page.paste(thumb, (x, y + 5))
        note = f"layer {l}, self: {percent(share)} on the image" if l in report["sa"] else f"layer {l}, cross"
        below = write(pen, x, y + thumb.height + 9, note, 16, PALE)
        write(pen, x, below, f"brightest: {peak:.3g}x the mean", 16, PALE)
    page.save(path)


def heat(weights, processed, config):
    """Of each image its maps, base tile and grid, as (h, w) arrays. weights (visual tokens,)."""
    maps, start, side = [], 0, config.side
    for p in processed:
        w = weights[start:start + p.tiling.tokens]
        start += p.tiling.tokens
        base = w[:side * side].reshape(side, side)
        if p.tiling.canvas is None:
            maps.append([base])
        else:  # the last column is newlines, which show nothing
            h, wide = p.tiling.size
            maps.append([base, w[side * side:].reshape(h, wide + 1)[:, :-1]])
    return maps


def montage(images, maps, width):
    """(The images side by side, dimmed, with their heat on top; how many times the mean the brightest colour is). One
    scale for all of them, from low to high."""
    layers = []
    for image, own in zip(images, maps):
        w, h = image.size
        total = np.zeros((h, w))
        for heat_map in own:
            density = heat_map * heat_map.size  # attention per area: base tile and grid show the same image
            box = square_box(w, h) if len(images) > 1 else None  # one of several was padded to a square
            stretched = Image.fromarray(density.astype(np.float32)).resize(
                (max(w, h),) * 2 if box else (w, h), Image.BICUBIC)
            total += np.asarray(stretched.crop(box) if box else stretched)
        layers.append(total.clip(0))
    low, high = (np.quantile(np.concatenate([t.ravel() for t in layers]), q) for q in (0.05, 0.995))
    mean, out = np.concatenate([t.ravel() for t in layers]).mean(), []
    for image, total in zip(images, layers):
        x = ((total - low) / ((high - low) or 1)).clip(0, 1)[..., None]
        grey = np.asarray(image.convert("L"), dtype=float)[..., None] * 0.45 + 20
        colour = heat_colour(x[..., 0])
        mix = 0.25 + 0.55 * x
        out.append(Image.fromarray((grey * (1 - mix) + colour * mix).astype(np.uint8)))
    return fit(side_by_side(out), width, width * 2), high / mean if mean > 0 else 0.0


def heat_colour(x):
    """RGB (..., 3) of x (...) from 0, dark, to 1, bright."""
    at = x * (len(HEAT) - 1)
    below = at.astype(int).clip(0, len(HEAT) - 2)
    return HEAT[below] + (HEAT[below + 1] - HEAT[below]) * (at - below)[..., None]


def scale(page, pen, x, y):
    """What the colours mean."""
    bar = np.broadcast_to(heat_colour(np.linspace(0, 1, 200)), (16, 200, 3)).astype(np.uint8)
    x += 20 + pen.textlength("least", ImageFont.load_default(18))
    write(pen, x - 12 - pen.textlength("least", ImageFont.load_default(18)), y - 2, "least", 18, PALE)
    page.paste(Image.fromarray(bar), (round(x), y))
    write(pen, x + 212, y - 2, "most, as said below; the mean is the image's", 18, PALE)


def square_box(w, h):
    m = max(w, h)
    return (m - w) // 2, (m - h) // 2, (m - w) // 2 + w, (m - h) // 2 + h


def tiled(images, processed, config):
    """The images side by side, with the borders of their tiles."""
    out = []
    for image, p in zip(images, processed):
        image = image.resize([round(s * 900 / max(image.size)) or 1 for s in image.size])
        pen = ImageDraw.Draw(image)
        if p.tiling.canvas:
            (w, h), (rw, rh) = p.tiling.canvas, p.tiling.resized
            for x in range(config.tile, w, config.tile):
                x = (x - (w - rw) // 2) * image.width / rw
                pen.line((x, 0, x, image.height), fill=(255, 255, 255), width=4)
                pen.line((x, 0, x, image.height), fill=INK, width=1)
            for y in range(config.tile, h, config.tile):
                y = (y - (h - rh) // 2) * image.height / rh
                pen.line((0, y, image.width, y), fill=(255, 255, 255), width=4)
                pen.line((0, y, image.width, y), fill=INK, width=1)
        out.append(image)
    return side_by_side(out)


def side_by_side(images, gap=6):
    height = max(image.height for image in images)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    out = Image.new("RGB", (sum(s.width for s in scaled) + gap * (len(scaled) - 1), height), PAPER)
    x = 0
    for s in scaled:
        out.paste(s, (x, 0))
        x += s.width + gap
    return out


def fit(image, width, height):
    scale = min(width / image.width, height / image.height)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.LANCZOS)


def strip(pen, x, y, width, config, sa):
    """A box for each layer, coloured by its kind, and the legend."""
    step = width / config.layers
    count = dict.fromkeys(KINDS, 0)
    for l in range(config.layers):
        kind = "self-attention" if l in sa else "cross-attention" if l in config.ca else "text-only"
        count[kind] += 1
        box = (x + l * step, y + 30, x + (l + 1) * step - 4, y + 84)
        pen.rounded_rectangle(box, 4, fill=KINDS[kind])
        pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), str(l), anchor="mm", font=ImageFont.load_default(15),
                 fill=INK if kind == "text-only" else PAPER)
    write(pen, x, y - 2, "Layers", 20, PALE)
    for kind, colour in KINDS.items():
        pen.rectangle((x, y + 102, x + 16, y + 118), fill=colour)
        label = f"{count[kind]} {kind}"
        write(pen, x + 24, y + 100, label, 18)
        x += 24 + pen.textlength(label, ImageFont.load_default(18)) + 28


def percent(x):
    """A share that is not zero never reads as zero."""
    return f"{x:.0%}" if x >= 0.1 else f"{x:.1%}" if x >= 0.001 else "<0.1%"


# --- text -----------------------------------------------------------------------------------------------------------

@lru_cache
def fonts(size):
    """The fonts that are here, Pillow's own first."""
    found, matplotlib = [ImageFont.load_default(size)], find_spec("matplotlib")
    own = [str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")] if matplotlib else []
    for name in (*FONTS, *own):
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            pass  # not installed
    return found


@lru_cache(4096)
def has(font, character):
    """Whether a font knows a character: it draws another one than for a character that does not exist."""
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))


def legible(text, size):
    """(font, text): the first font that has most of a text, and the text with what it lacks in ASCII: e for an e with
    an accent, an escape for what has no Latin letter."""
    font = max(fonts(size), key=lambda font: sum(has(font, c) for c in text))
    return font, "".join(c if has(font, c) else in_ascii(c) for c in text)


def in_ascii(character):
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain if plain and plain.isprintable() else character.encode("unicode_escape").decode()


def wrap(text, size, width):
    """Text as lines of about `width` pixels."""
    font, text = legible(" ".join(text.split()), size)
    return textwrap.wrap(text, max(1, int(0.95 * width * len(text) / max(1, font.getlength(text)))))


def write(pen, x, y, text, size, colour=INK):
    """One line of text; returns the y below it."""
    font, text = legible(text, size)
    pen.text((x, y), text, fill=colour, font=font)
    return y + round(size * 1.15)
