"""An image and a conversation become arrays: tiles (anyres), ChatML, token positions, batches.

The input side of LLaVA-OneVision, FastVLM and Qwen2-VL, without torch. `tiling` is the one place that knows how many
visual tokens an image of a given size costs; `pixels`, the model and flops.py all follow it. What differs from the
original code is said at the line that differs. Training files are read in llava/ (`python -m llava --check FILE`,
`--show FILE`).
"""
import math
import re
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from PIL import Image

import methods
from cli import counted
from config import PAD
from pictures import SampleError, to_rgb

IMAGE = "<image>"  # stands for an image in a question; never becomes a token of the language model
SYSTEM = "You are a helpful assistant."
ANSWER = "<|im_start|>assistant\n"  # after it an answer is due


# --- images ---------------------------------------------------------------------------------------------------------

class Tiling(NamedTuple):
    """How one image becomes visual tokens. Tokens: base tile, or all of an image without tiles, then the grid, each row
    by row."""
    canvas: tuple    # (width, height) in pixels of the grid of tiles; None when there is none
    resized: tuple   # (width, height) in pixels of the image, on the canvas where there is one; None: it is padded
    grid: tuple      # (rows, columns) of tiles
    crop: tuple      # (rows, columns) of tokens dropped at each side, because they see only black
    size: tuple      # (rows, columns) of the grid's tokens that are kept, after the interpolation
    interpolated: bool  # above max_tiles' worth of tokens the grid is interpolated down to `size`
    newlines: int    # image_newline vectors: one a row, or one after a lone tile
    tokens: int      # visual tokens in all, newlines included
    cells: tuple     # (rows, columns) of a tile's tokens, or of the grid that a reduction picks from
    patches: tuple   # (rows, columns) of tokens that the encoder makes of a tile
    mrope: bool = False  # rotary positions of its tokens count rows and columns

    @property
    def tiles(self):
        return 1 + self.grid[0] * self.grid[1]


def lone_tile(config):
    """The Tiling of an image of one tile, padded to a square."""
    newlines, side = int(config.has_newlines and config.multi_image_newline), config.side
    return Tiling(None, None, (0, 0), (0, 0), (0, 0), False, newlines,
                  config.reduction.tokens(config.patches) + newlines, (side, side), (config.patches,) * 2)


def dynamic_tiling(width, height, config):
    """The Tiling of an image without tiles (Qwen2-VL): as large as it is, to multiples of a token's 28 pixels, within
    config's min_pixels and max_pixels. Raises SampleError."""
    cell = config.cell
    if max(width, height) > 200 * min(width, height):
        raise SampleError("oversized image", f"an image of {width} x {height} is more than 200 times as long as wide, "
                          "which this encoder does not take; crop it")
    h, w = (round(x / cell) * cell for x in (height, width))  # half to even; 0 where it is too small in any case
    if h * w > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        h, w = (max(cell, math.floor(x / shrink / cell) * cell) for x in (height, width))
    elif h * w < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        h, w = (math.ceil(x * grow / cell) * cell for x in (height, width))
    patches = h // cell, w // cell
    rows, columns = cells = config.reduction.grid(patches)
    return Tiling(None, (w, h), (0, 0), (0, 0), (0, 0), False, 0, rows * columns, cells, patches, bool(config.mrope))


def tiling(width, height, config, single_image=True):
    """Tile grid and token count of an image of width x height pixels (LLaVA-OneVision, anyres_max_9 + spatial_unpad;
    other families by config.aspect).

    Where a reduction picks patches there are no rows any more: no newlines, nothing is interpolated, and with VisionZip
    and VisPruner nothing is unpadded, as in the official code for LLaVA-NeXT; HiRED picks from what sees the picture.
    single_image: it is the only image of its conversation. Of several, each is padded to a square and is one tile.
    Raises SampleError.
    """
    side, tile, reduction = config.side, config.tile, config.reduction
    width, height = reduction.picture(width, height)
    if config.aspect == "dynamic":
        return dynamic_tiling(width, height, config)
    if not single_image or config.aspect == "pad":
        return lone_tile(config)

    def fit(grid):  # the larger image area wins, then the smaller waste, then the earlier grid
        w, h = grid[0] * tile, grid[1] * tile
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - w * h
    columns, rows = max(config.pinpoints, key=fit)
    w, h = columns * tile, rows * tile
    if w / width < h / height:
        resized = w, min(math.ceil(height * (w / width)), h)
    else:
        resized = min(math.ceil(width * (h / height)), w), h

    truncate = int if config.unpad == "original" else lambda x: int(round(x, 7))  # differs for 2 sizes in 88,530
    kept_w, kept_h = columns * side, rows * side  # tokens
    if width / height > kept_w / kept_h:
        crop = (kept_h - truncate(height * (kept_w / width))) // 2, 0
    else:
        crop = 0, (kept_w - truncate(width * (kept_h / height))) // 2
    if reduction.method in methods.PICKED:
        crop = 0, 0
    kept_h, kept_w = kept_h - 2 * crop[0], kept_w - 2 * crop[1]
    if reduction.picks:
        tokens = reduction.tokens(side, 1 + rows * columns, side * side + kept_h * kept_w)
        return Tiling((w, h), resized, (rows, columns), crop, (kept_h, kept_w), False, 0, tokens, (side, side),
                      (config.patches,) * 2)

    times = math.sqrt(kept_h * kept_w / (config.max_tiles * side * side)) if config.max_tiles else 1.0
    interpolated = times > 1.1  # so up to 1.21 * max_tiles tiles' worth stays as it is
    if interpolated:
        kept_h, kept_w = max(1, int(kept_h // times)), max(1, int(kept_w // times))
    return Tiling((w, h), resized, (rows, columns), crop, (kept_h, kept_w), interpolated, kept_h,
                  side * side + kept_h * (kept_w + 1), (side, side), (config.patches,) * 2)


COLOURS = {  # of each encoder: mean and standard deviation of red, green and blue, and the grey beside a padded image
    "siglip": ([0.5] * 3, [0.5] * 3, 127), "fastvithd": ([0.0] * 3, [1.0] * 3, 0),
    "qwen2_vl": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711], 0)}


def normalised(encoder):
    """(3, 256) float32: a byte's value in the network, by colour, to be looked up on the device. Through float64, as
    Hugging Face's processors: the same bits."""
    mean, std = (np.array(x, np.float32)[:, None] for x in COLOURS[encoder][:2])
    return ((np.arange(256) * (1 / 255)).astype(np.float32) - mean) / std


def pixels(image, tiles, config):
    """(tiles, 3, height, width) uint8: the base tile, then the grid row by row."""
    size = config.tile, config.tile
    if config.aspect == "dynamic":
        crops = [image.resize(tiles.resized, Image.BICUBIC)]
    elif tiles.canvas is None:  # one of several images: square on grey, then one tile
        square = Image.new("RGB", (max(image.size),) * 2, COLOURS[config.encoder][2:] * 3)
        square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
        crops = [square.resize(size, Image.BICUBIC)]
    else:
        canvas = Image.new("RGB", tiles.canvas)
        (w, h), (rw, rh) = tiles.canvas, tiles.resized
        canvas.paste(image.resize((rw, rh), Image.BICUBIC), ((w - rw) // 2, (h - rh) // 2))
        crops = [image.resize(size, Image.BICUBIC)]  # the base tile is stretched, not padded
        crops += [canvas.crop((x, y, x + config.tile, y + config.tile))
                  for y in range(0, h, config.tile) for x in range(0, w, config.tile)]
    # In plain order in memory, as it also comes from a worker process: another order means other rounding in the tower
    return np.ascontiguousarray(np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]))


class ProcessedImage(NamedTuple):
    pixels: np.ndarray  # (tiles, 3, height, width) uint8; of most encoders squares
    tiling: Tiling


def process_image(image, config, single_image=True):
    """What the model needs of one PIL image. single_image: as in `tiling`. Raises SampleError."""
    tiles = tiling(*image.size, config, single_image)
    if tiles.resized is None and max(image.size) ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
        raise SampleError("oversized image",
                          f"an image of {image.width} x {image.height} is too long to be padded to a square; crop it")
    image, size = to_rgb(image, config.transparency), config.reduction.picture(*image.size)
    if size != image.size:
        image = image.resize(size, Image.BICUBIC)
    return ProcessedImage(pixels(image, tiles, config), tiles)


# --- text -----------------------------------------------------------------------------------------------------------

def place_images(question, n, config=None):
    """The question with n placeholders: before it, joined by spaces, then a newline; or where it has them already.
    config: of a family that writes this another way. Raises ValueError."""
    if not question.isascii() and any("\ud800" <= c <= "\udfff" for c in question):
        raise ValueError("the question is not valid UTF-8; write it anew")
    if not question.replace(IMAGE, "").strip():
        raise ValueError("the question is empty: ask something about the image")
    if IMAGE not in question:
        question = " ".join([IMAGE] * n) + "\n" + question if n else question
    if question.count(IMAGE) != n:
        raise ValueError(f"the question has {question.count(IMAGE)} {IMAGE} but {counted(n, 'image')} given: "
                         "give one image for each, or leave the placeholders out")
    return family_form(question, config)


def family_form(turn, config):
    """A turn of a conversation as LLaVA writes it -> as the family of a Config does. Qwen2-VL: each image between two
    marks, and nothing between images that stand first, or behind them."""
    if config is None or config.encoder != "qwen2_vl":
        return turn
    turn = re.sub(f"^({IMAGE}[ \n])+", lambda first: IMAGE * first[0].count(IMAGE), turn)
    return turn.replace(IMAGE, f"<|vision_start|>{IMAGE}<|vision_end|>")


def chatml(turns, system=SYSTEM):
    """The prompt string of a conversation: turns alternate user, assistant; after a user's turn the answer is due.

    Built by hand, as the original does it; Hugging Face's templates for these models leave the system line out.
    """
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{turn}<|im_end|>\n"
    return text + ANSWER if len(turns) % 2 else text


def split_shared(text):
    """A prompt as (what other questions about the same images share, the rest), with the tokens of the whole."""
    cut = text.rindex(IMAGE) + len(IMAGE) if IMAGE in text else text.index("<|im_start|>user")
    return text[:cut], text[cut:]


class Prompt(NamedTuple):
    """One prompt as two streams. Positions count text and visual tokens together, as LLaVA-OneVision does."""
    ids: list                 # text token ids
    t_pos: list               # position of each text token
    v_pos: list               # position of each visual token
    v_img: list               # which image each visual token belongs to: 0, 1, ...
    images: list              # ProcessedImage, in order
    answer_starts: list = ()  # positions at which answers begin; the router decides there

    @property
    def end(self):
        """The position after the last token."""
        return 1 + max(self.t_pos[-1:] + self.v_pos[-1:], default=-1)


def encode(text, tokenizer, images=(), start=0):
    """Tokenises the text between the <image> placeholders and gives every token its position, from `start` on.

    images: one ProcessedImage for each placeholder; None: it is all plain text, whatever it looks like. Raises
    ValueError.
    """
    if images is None:
        chunks, images = [text], ()
    elif "<video>" in text:
        raise ValueError("<video> stands for a film, which this model does not take; write the question without it")
    else:
        chunks = text.split(IMAGE)
    if len(chunks) != len(images) + 1:
        raise SampleError("placeholders", f"the text has {len(chunks) - 1} {IMAGE} but "
                          f"{counted(len(images), 'image')} given")
    ids, t_pos, v_pos, v_img, answer_starts = [], [], [], [], []
    for i, chunk in enumerate(chunks):
        new = tokenizer.encode(chunk, add_special_tokens=False)
        ids += new.ids
        t_pos += range(start, start + len(new.ids))
        for marker in re.finditer(re.escape(ANSWER), chunk):
            answer_starts.append(start + sum(end <= marker.end() for _, end in new.offsets))
        start += len(new.ids)
        if i < len(images):
            tokens = images[i].tiling.tokens
            v_pos += range(start, start + tokens)
            v_img += [i] * tokens
            start += tokens
    return Prompt(ids, t_pos, v_pos, v_img, list(images), answer_starts)


def join(a, b):
    """Two prompts as one, the second encoded from the end of the first on."""
    ids, t_pos, v_pos, v_img, images, answer_starts = (list(x) + list(y) for x, y in zip(a, b))
    v_img[len(a.v_img):] = [i + len(a.images) for i in b.v_img]
    return Prompt(ids, t_pos, v_pos, v_img, images, answer_starts)


def overview_tiling(config):
    """The Tiling of an overview: the base tile and one newline."""
    return lone_tile(config)._replace(newlines=1, tokens=overview_tokens(config))


def overview_tokens(config):
    """Visual tokens of an overview."""
    return config.reduction.tokens(config.patches) + 1


def has_overview(prompt):
    """Whether an image's base tile could be shown alone: it is the only image, and not a lone tile anyway."""
    return len(prompt.images) == 1 and prompt.images[0].tiling.canvas is not None


def overview(prompt, config):
    """The same prompt over an image's base tile alone: its tokens and one newline, where the full image had its own.
    None where it has no overview."""
    if not has_overview(prompt):
        return None
    image, = prompt.images
    lone = overview_tiling(config)
    return with_tokens(prompt, [lone.tokens])._replace(images=[ProcessedImage(image.pixels[:1], lone)])


def with_tokens(prompt, counts):
    """The same prompt where each image takes as many positions as `counts` says, and all else closes up."""
    firsts, before = [prompt.v_img.index(i) for i in range(len(counts))], [0]
    for i, (first, end) in enumerate(zip(firsts, firsts[1:] + [len(prompt.v_img)])):
        before.append(before[i] + end - first - counts[i])  # positions that the first i images no longer take
    starts = [prompt.v_pos[i] for i in firsts]

    def closer(positions):
        return [p - before[bisect_left(starts, p)] for p in positions]
    v_img = [i for i, n in enumerate(counts) for _ in range(n)]
    v_pos = [starts[i] - before[i] + k for i, n in enumerate(counts) for k in range(n)]
    return prompt._replace(t_pos=closer(prompt.t_pos), v_pos=v_pos, v_img=v_img,
                           answer_starts=closer(prompt.answer_starts))


def moved(prompt, by):
    """The same text at other positions."""
    return prompt._replace(t_pos=[p + by for p in prompt.t_pos], answer_starts=[p + by for p in prompt.answer_starts])


def seen(prompt, pixels, config):
    """The prompt with these pixels: over the overview, where that is asked for and there is one."""
    return pixels == "overview" and overview(prompt, config) or prompt


def labelled(pieces, tokenizer, images=(), start=0):
    """(Prompt, labels) of consecutive pieces of a conversation, (text, whether it is a target).

    labels has a token's own id where it is a target, and -1 elsewhere. Pieces meet at special tokens, so the ids are
    those of the whole text. images: as in `encode`.
    """
    prompt, labels = Prompt([], [], [], [], [], []), []
    plain, left = images is None, list(images or ())
    for text, is_target in pieces:
        here = [left.pop(0) for _ in range(min(len(left), text.count(IMAGE)))]
        new = encode(text, tokenizer, None if plain else here, start)
        start += len(new.ids) + len(new.v_pos)
        labels += new.ids if is_target else [-1] * len(new.ids)
        new.v_img[:] = [i + len(prompt.images) for i in new.v_img]
        for whole, more in zip(prompt, new):
            whole += more
    if left:
        raise SampleError("placeholders", f"the text has {len(images) - len(left)} {IMAGE} but "
                          f"{counted(len(images), 'image')} given")
    return prompt, labels


def turns_to_learn(turns, system=SYSTEM):
    """A conversation (user, assistant, user, ..., assistant) as pieces for `labelled`: the answers are to be learned,
    and the <|im_end|> that closes each."""
    pieces = []
    for i in range(0, len(turns), 2):
        asked = chatml(turns[i:i + 1], system)
        pieces += [(asked if i == 0 else asked[asked.index("<|im_start|>user"):], False),
                   (turns[i + 1] + "<|im_end|>", True), ("\n", False)]
    return pieces


# --- batches --------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Prompts padded on the right, in both streams, to the longest of them."""
    ids: np.ndarray      # (B, Nt) int64; 0 where padded
    t_pos: np.ndarray    # (B, Nt) int64; PAD, PAD + 1, ... where padded
    v_pos: np.ndarray    # (B, Nv) likewise
    v_img: np.ndarray    # (B, Nv) which image of its prompt; -1 where padded
    v_rope: np.ndarray   # (B, Nv, 3) M-RoPE: rotary positions beyond v_pos, by time, row and column; else (B, Nv, 0)
    images: list         # of each prompt its ProcessedImages
    answer_starts: list  # of each prompt the positions at which answers begin

    @property
    def positions(self):
        return self.t_pos, self.v_pos, self.v_img, self.v_rope

    def select(self, rows):
        """Some of the prompts."""
        return Batch(*(x[rows] if isinstance(x, np.ndarray) else [x[i] for i in rows] for x in self))


def collate(prompts):
    """Prompts -> Batch."""
    ids, t_pos, v_pos, v_img, images, answer_starts = zip(*prompts)
    v_pos = pad(v_pos, PAD)
    v_rope = rope_offsets(images, v_pos.shape[1])
    return Batch(pad(ids, 0), pad(t_pos, PAD), v_pos, pad(v_img, -1), v_rope, list(images), list(answer_starts))


def rope_offsets(images, n):
    """Batch.v_rope of n visual tokens: all of an image have the time of its first, which counts as its rows' and its
    columns' beginning, too (Qwen2-VL, 2.1)."""
    tilings = [[x.tiling for x in own] for own in images]
    out = np.zeros((len(images), n, 3 * any(t.mrope for own in tilings for t in own)), np.int64)
    for row, own in zip(out, tilings if out.size else ()):
        parts = []
        for t in own:
            at = np.arange(t.tokens)
            parts.append(np.stack([0 * at, at // t.cells[1], at % t.cells[1]], axis=1) - at[:, None])
        row[:sum(map(len, parts))] = np.concatenate([row[:0], *parts])
    return out


def pad(rows, filler):
    """Lists of numbers -> (rows, the longest) int64, filled on the right; PAD counts up, so that no two are equal."""
    n, count = max(map(len, rows)), filler == PAD
    return np.array([list(row) + [filler + i * count for i in range(n - len(row))] for row in rows],
                    dtype=np.int64).reshape(len(rows), n)


def with_blank(batch, config):
    """A Batch without images, with one black tile whose tokens all count as padding: no token attends to it.

    Processes that train together must run the same modules, whatever their own samples have.
    """
    blank = process_image(Image.new("RGB", (config.tile,) * 2), config, single_image=False)
    shape = len(batch.ids), blank.tiling.tokens
    v_pos = np.tile(PAD + np.arange(shape[1]), (shape[0], 1))
    images = [[blank], *batch.images[1:]]
    return batch._replace(v_pos=v_pos, v_img=np.full(shape, -1), v_rope=rope_offsets(images, shape[1]), images=images)


def target_mask(labels, t_pos):
    """(B, Nt - 1): the tokens whose next one is a target. labels and t_pos (B, Nt) in numpy; -1 is no label.

    A token right after an image has no text token before it and is never a target: in a large model the last visual
    token would predict it (LLaVA's label rule asks that), but VISOR's vision stream has no end that a head could read.
    """
    return (labels[:, 1:] >= 0) & (t_pos[:, 1:] == t_pos[:, :-1] + 1)
