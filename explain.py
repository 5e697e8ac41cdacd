"""A picture of what the model did: the image, its tiles and what a reduction kept of it, the layers by kind, and where
the answer's attention went.

Drawn with Pillow alone. Used by `sample.py --explain out.png`.
"""
import math
import textwrap
import unicodedata
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import counted
from data import Prompt, join

INK, PALE, PAPER = (32, 33, 36), (112, 117, 125), (255, 255, 255)
KINDS = {"text-only": (218, 221, 226), "cross-attention": (72, 133, 237), "self-attention": (240, 140, 30)}
HEAT = np.array([[10, 8, 40], [90, 20, 110], [190, 55, 80], [245, 130, 30], [255, 230, 120]], dtype=float)
WIDTH, MARGIN, GAP = 1600, 48, 20
# Pillow's own font has ASCII and little more; for other text the first of these that is installed and has it
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "arial.ttf",
         "msyh.ttc")


class Look(NamedTuple):
    """What an answer looked at. Visual tokens are those that enter layer 0, of all images in order; each has a place,
    the number of a cell of its image: first the base tile's, row by row, then the grid's."""
    weights: dict       # {layer that looks at vision: (visual tokens,)}; zero where a token is gone
    shares: dict        # {layer: what all its visual tokens get}, those without a place too
    keys: dict          # {layer: the number of tokens that it sees, text too}
    places: np.ndarray  # (visual tokens,) -1: none, as newlines
    merged: np.ndarray  # (visual tokens,) bool: others were merged into it (VisionZip)
    kept: np.ndarray    # (visual tokens,) bool: it is in the last layer
    added: int = 0      # tokens of the last layer that were merged inside the language model, and have no place


def attention_to_images(model, prompt, answer, sa):
    """The Look of an answer: the attention of the tokens from which it was predicted, mean over them and over the
    heads. prompt: the whole data.Prompt, text at its end; it runs once more, with the answer's token ids behind it.
    """
    import torch
    n, end, found = len(answer), prompt.end, {}
    # Where the answer starts, it is decided which visual tokens are dropped inside the language model
    whole = join(prompt, Prompt(list(answer), [end + i for i in range(n)], [], [], [], [end]))
    # The prompt's last token predicts the first. Counted from the end, as visual tokens before may be dropped
    queries = list(range(-n - 1, -1 if n else 0))

    def observe(l, kind, q, k, mask):
        """q (1, Nq, H, D), k (1, Nk, Hkv, D): keys of both streams in order of position, or of vision alone."""
        if kind == "self" and l not in sa:
            return  # a layer on text alone
        q, k = q[0, queries].float(), k[0].float().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if kind == "self":  # causal: each query sees its own position and those before
            seen = len(k) + torch.tensor(queries, device=q.device)
            scores = scores.masked_fill(torch.arange(len(k), device=q.device) > seen[:, None], float("-inf"))
        found[l] = scores.softmax(-1).mean((0, 1)).cpu().numpy()  # (keys,)
    with torch.no_grad(), observed(model, observe):
        pieces = model.pieces(prompt.images)
        tree = model.prefill([whole], tuple(sa), 0, known=pieces)
        tree.run(tuple(sa))
    weights, shares, keys, kept = {}, {}, {}, tree.kept(0)
    for (start, stop, past), numbers in zip(tree.runs, kept):
        for l in sorted(found.keys() & set(range(start, stop))):
            own = found[l][past.v_pos[0, :past.vision[0]]] if l in sa else found[l]
            weights[l], shares[l] = np.zeros(len(prompt.v_pos), np.float32), float(own.sum())
            keys[l] = len(found[l])
            weights[l][numbers[numbers >= 0]] = own[numbers >= 0]
    lie = [places_of(x, p.tiling, model.config) for x, p in zip(pieces, prompt.images)]
    places, merged = map(np.concatenate, zip(*lie))
    last = kept[-1]
    return Look(weights, shares, keys, places, merged, np.isin(np.arange(len(places)), last), int((last < 0).sum()))


def places_of(pieces, tiling, c):
    """Of one image's visual tokens: where they lie, and into which others were merged, (tokens,) each; as in Look."""
    from arrange import places
    (n, m), (rows, columns), (h, w), (down, along) = tiling.cells, tiling.grid, tiling.size, tiling.crop
    base, grid = np.arange(n * m), n * m + np.arange(h * w).reshape(h, w)
    found, merged = np.full(tiling.tokens, -1), np.zeros(tiling.tokens, bool)
    if c.reduction.picks:
        cells = np.pad(grid, ((down, down), (along, along)), constant_values=-1)  # of all tiles, as one
        cells = cells.reshape(rows, n, columns, n).swapaxes(1, 2).reshape(-1, n * n)
        order, tiles, patches = (x.cpu().numpy() for x in places(pieces, tiling, c))
        found[:len(order)] = np.concatenate([base[None], cells])[tiles, patches]
        if c.reduction.method == "visionzip":
            by_attention, contextual = c.reduction.of_tile(c.patches)
            merged[:len(order)] = order % (by_attention + contextual) >= by_attention
    else:
        cells = np.concatenate([base, np.pad(grid, ((0, 0), (0, 1)), constant_values=-1).ravel()])  # newlines
        found[:len(cells)] = cells
    return found, merged


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


def draw(path, images, processed, config, report, look, questions=1):
    """Writes the PNG.

    images and processed: PIL images and their data.ProcessedImage; report: sample.py's row about the question;
    look: of attention_to_images; questions: how many the report's saving is over.
    """
    if report["pixels"] == "overview":  # what was seen of them
        images = [image.resize((config.tile, config.tile)).resize(image.size) for image in images]
    images = [fit(image, 900, 900) for image in images]  # nothing is drawn larger
    padded = config.aspect == "pad" or len(images) > 1 and config.aspect == "anyres"
    where = [boxes(image, p.tiling, padded) for image, p in zip(images, processed)]
    kept, merged = (heat(x, look.places, processed) for x in (look.kept, look.merged))
    columns = 6
    cell = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
    found = {l: times_an_even_share(images, heat(weights, look.places, processed), where, look.keys[l])
             for l, weights in look.weights.items()}
    peaks = {l: peak for l, (_, peak) in found.items()}
    top = max(peaks.values(), default=0.0)
    thumbs = {l: montage(images, layers, top, cell) for l, (layers, _) in found.items()}
    line = max((t.height for t in thumbs.values()), default=0) + 72
    shown = fit(tiled(images, processed, config, kept, merged, where), 520, 380)
    grids = [f"{counted(p.tiling.tiles, 'tile')}, {counted(p.tiling.tokens, 'token')}" for p in processed]
    caption = [textwrap.shorten("; ".join(grids), 60, placeholder=" ..."),
               *wrap(kept_note(kept, merged, where, look.added, config), 18, 520)]
    asked, answer = (wrap(report[name], size, WIDTH - 2 * MARGIN) for name, size in (("question", 34), ("answer", 26)))
    answer = answer[:3] or ["(no answer)"]
    middle = 150 + 34 * len(answer)
    heads = middle + max(shown.height + 25 * len(caption), 275) + 45
    page = Image.new("RGB", (WIDTH, heads + line * -(-len(thumbs) // columns) + MARGIN - 10), PAPER)
    pen = ImageDraw.Draw(page)

    write(pen, MARGIN, 36, asked[0] + " ..." * (len(asked) > 1), 34)
    y = 88
    for row in answer:
        y = write(pen, MARGIN, y, row, 26, PALE) + 8

    page.paste(shown, (MARGIN, middle))
    y = middle + shown.height + 10
    for row in caption:
        y = write(pen, MARGIN, y, row, 18, PALE) + 4

    left = MARGIN + 520 + 2 * GAP
    strip(pen, left, middle, WIDTH - MARGIN - left, config, report["sa"])
    flops = report["flops"]
    saving = flops["saving"]
    less = f"{saving:.1f}x fewer operations than" if saving > 1 else f"{1 / saving:.1f}x more operations than" if \
        saving < 1 else "as many operations as"
    spent = f"instead of {flops['llm_dense'] / 1e9:,.4g} GFLOP" if questions == 1 and saving != 1 else \
        "GFLOP" + " for this one" * (questions > 1)
    facts = [f"Language model: {less} dense" + f" over {counted(questions, 'question')}" * (questions > 1),
             f"{flops['llm'] / 1e9:,.4g} {spent}; the vision encoder took {flops['encoder'] / 1e9:,.4g}",
             f"{report['text_tokens']} text and {counted(report['vision_tokens'], 'visual token')}, "
             f"{counted(len(report['tokens']), 'token')} of answer"]
    y = middle + 150
    for i, fact in enumerate(facts):
        y = write(pen, left, y, fact, 20 if i else 30, PALE if i else INK) + 14

    write(pen, MARGIN, heads - 16, "Where the answer's attention went, all layers on one scale:", 24)
    scale(page, pen, WIDTH - MARGIN, heads - 20, top)
    for i, (l, thumb) in enumerate(thumbs.items()):
        x, y = MARGIN + i % columns * (cell + GAP), heads + 26 + i // columns * line
        kind = "self-attention" if l in report["sa"] else "cross-attention"
        pen.rectangle((x, y, x + cell - 1, y + 4), fill=KINDS[kind])
        page.paste(thumb, (x, y + 5))
        note = f"layer {l}, self: {percent(look.shares[l])} on the image" if l in report["sa"] else f"layer {l}, cross"
        below = write(pen, x, y + thumb.height + 9, note, 16, PALE)
        brightest = f"brightest: {peaks[l]:.2g}x an even share" if peaks[l] >= 0.01 else "brightest: <0.01x"
        elsewhere = peaks[l] < 0.01 <= look.shares[l]  # on newlines, or merged tokens
        write(pen, x, below, "on tokens without a place" if elsewhere else brightest, 16, PALE)
    page.save(path)


def heat(weights, places, processed):
    """Of each image its maps, base tile and grid, as (h, w) arrays: weights (visual tokens,) in the cells that places
    (visual tokens,) names, zero in all others."""
    maps, ends = [], np.cumsum([p.tiling.tokens for p in processed])[:-1]
    for p, w, at in zip(processed, np.split(weights, ends), np.split(places, ends)):
        base, (rows, columns) = math.prod(p.tiling.cells), p.tiling.size
        cells = np.bincount(at + 1, w, 1 + base + rows * columns)[1:]  # without what has no place
        own = cells[:base].reshape(p.tiling.cells), cells[base:].reshape(rows, columns)
        maps.append([x for x in own if x.size])
    return maps


def kept_note(kept, merged, where, added, config):
    """What is dark in the picture of the tiles, and what is outlined, in words; "" where all is kept. kept, merged,
    where: as in `tiled`; added: of Look."""
    def count(maps, i):
        """Of each image's i-th map: (cells that see the picture and are not zero, all that see it)."""
        seen = []
        for own, own_boxes in zip(maps, where):
            start, top, end, bottom = own_boxes[i]
            seen.append(own[i][int(top):math.ceil(bottom), int(start):math.ceil(end)])
        return int(sum((x > 0).sum() for x in seen)), sum(x.size for x in seen)
    (bright, drawn), (in_base, base), (outlined, _) = count(kept, -1), count(kept, 0), count(merged, -1)
    if (bright, in_base) == (drawn, base):
        return ""
    beyond = int(sum((own[-1] > 0).sum() for own in kept)) - bright
    note = "Left in the last layer" if config.reduction.inside else "Kept"
    note += f": {f'the bright {bright:,}' if bright else 'none'} of {drawn:,} patches"
    note += f", {in_base:,} of {base:,} of the base tile" * (len(kept[0]) > 1)
    note += f", {beyond:,} of the padding" * (beyond > 0)
    note += f"; others went into the {outlined:,} outlined ones" * (outlined > 0)
    return note + f"; {counted(added, 'merged token')} without a place" * (added > 0)


def boxes(image, tiling, padded):
    """Where a picture lies on its maps: for each, (left, top, right, bottom) in cells. padded: it lies in a square."""
    side = tiling.cells[0]
    if padded:
        return [tuple(x * side / max(image.size) for x in square_box(*image.size))]
    found = [(0, 0, *tiling.cells[::-1])]  # the base tile is stretched; an image without tiles is as it is
    if tiling.canvas and all(tiling.size):
        canvas, resized, crop, size, grid = map(np.array, (tiling.canvas, tiling.resized, tiling.crop[::-1],
                                                           tiling.size[::-1], tiling.grid[::-1]))  # (x, y) each
        start = (canvas - resized) // 2
        ends = np.array([start, start + resized]) * grid * side / canvas - crop  # cells of the grid
        found.append(tuple((ends * size / (grid * side - 2 * crop)).ravel().tolist()))
    return found


def stretched(cells, box, size, how):
    """A map (h, w) over its picture, as an image. Unpadding rounds: up to half a cell of the picture may lie beyond the
    map's edge; it is as the edge is."""
    return Image.fromarray(np.pad(cells, 1, mode="edge")).resize(size, how, [x + 1 for x in box])


def times_an_even_share(images, maps, where, keys):
    """(Of each image how many times an even share of a layer's attention a pixel gets, (height, width); how many times
    the brightest get). maps: of `heat`; where: their `boxes`; keys: the tokens that share the attention."""
    layers = []
    for image, own, own_boxes in zip(images, maps, where):
        total, even = np.zeros(image.size[::-1]), 0.0
        for heat_map, box in zip(own, own_boxes):
            # Attention per area: base tile and grid show the same image; one that was padded is part of a square
            cells = (box[2] - box[0]) * (box[3] - box[1]) if len(images) == 1 else heat_map.size
            total += stretched((heat_map * cells).astype(np.float32), box, image.size, Image.BICUBIC)
            even += cells / keys
        layers.append(total.clip(0) / even)
    every = np.concatenate([t.ravel() for t in layers])
    return layers, np.quantile(every[every > 0], 0.995) if every.any() else 0.0  # of a few patches, too


def montage(images, layers, top, width):
    """The images side by side, dimmed, with their heat on top. layers: of `times_an_even_share`; the colours are
    logarithmic, from nothing to `top` times that, for all layers alike."""
    out = []
    for image, times in zip(images, layers):
        x = (np.log1p(times) / np.log1p(max(top, 1))).clip(0, 1)[..., None]
        grey = np.asarray(image.convert("L"), dtype=float)[..., None] * 0.45 + 20
        mix = 0.25 + 0.55 * x
        out.append(Image.fromarray((grey * (1 - mix) + heat_colour(x[..., 0]) * mix).astype(np.uint8)))
    return fit(side_by_side(out), width, width * 2)


def heat_colour(x):
    """RGB (..., 3) of x (...) from 0, dark, to 1, bright."""
    at = x * (len(HEAT) - 1)
    below = at.astype(int).clip(0, len(HEAT) - 2)
    return HEAT[below] + (HEAT[below + 1] - HEAT[below]) * (at - below)[..., None]


def scale(page, pen, right, y, top):
    """What the colours mean, in times an even share of a layer's attention: a bar that ends at `right`."""
    width, font = 320, ImageFont.load_default(18)
    bar = np.broadcast_to(heat_colour(np.linspace(0, 1, width)), (16, width, 3)).astype(np.uint8)
    unit = "x an even share"
    x = round(right - width - pen.textlength(unit, font) - 50)
    page.paste(Image.fromarray(bar), (x, y))
    marks = [n for n in (0, 1, 3, 10, 30, 100, 300) if n < 0.7 * top]
    for n in [*marks, top] if top > 1 else [0, 1]:
        label, at = f"{n:.3g}", x + width * math.log1p(n) / math.log1p(max(top, 1))
        pen.line((at, y, at, y + 20), fill=INK, width=1)
        write(pen, at - pen.textlength(label, font) / 2, y + 19, label, 16, PALE)
    write(pen, x + width + 30, y - 2, unit, 18, PALE)


def square_box(w, h):
    m = max(w, h)
    return (m - w) // 2, (m - h) // 2, (m - w) // 2 + w, (m - h) // 2 + h


def tiled(images, processed, config, kept, merged, where):
    """The images side by side, with the borders of their tiles. kept, merged: maps of `heat`, of which the last is
    drawn, the grid where there is one: what is not kept is dark, what is merged has an outline. where: their `boxes`.
    """
    out = []
    for image, p, (*_, bright), (*_, outlined), (*_, box) in zip(images, processed, kept, merged, where):
        image = image.resize([round(s * 900 / max(image.size)) or 1 for s in image.size])
        mask = stretched((bright > 0).astype(np.uint8) * 255, box, image.size, Image.NEAREST)
        image = Image.composite(image, image.point(lambda x: x // 4), mask)
        pen = ImageDraw.Draw(image)
        across, down = image.width / (box[2] - box[0]), image.height / (box[3] - box[1])  # pixels to a cell
        for y, x in np.argwhere(outlined > 0):
            x, y = (x - box[0]) * across, (y - box[1]) * down
            pen.rectangle((x, y, x + across, y + down), outline=KINDS["self-attention"], width=4)
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
