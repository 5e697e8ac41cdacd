"""A picture and a conversation become arrays: tiles (anyres), ChatML, token positions, batches.

LLaVA-OneVision's input side, without torch: `tiling` is the one place that knows how many visual tokens a picture
of a given size costs, and `pixels`, the model and flops.py all follow it. What differs from the original code is
said at the line that differs. Training files are read in mixture.py, which also shows and checks them:

    python data.py --show FILE [--index N]    what a sample becomes: learned tokens green, others red
    python data.py --check FILE               reads every sample once and counts what is wrong with them
"""
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from config import PAD, run

IMAGE = "<image>"  # stands for a picture in a question; never becomes a token of the language model
SYSTEM = "You are a helpful assistant."
ANSWER = "<|im_start|>assistant\n"  # after it an answer is due


class Fault(ValueError):
    """Something is wrong with a picture or a sample. kind: in two words what, for counting."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # so that it comes back whole from a worker process
        return Fault, (self.kind, str(self))


# --- pictures -------------------------------------------------------------------------------------------------------

class Tiling(NamedTuple):
    """How one picture becomes visual tokens. Tokens: base tile (side * side), then the grid row by row."""
    canvas: tuple    # (width, height) in pixels of the grid of tiles; None when the picture is one padded tile
    resized: tuple   # (width, height) in pixels of the picture on the canvas; the rest is black
    grid: tuple      # (rows, columns) of tiles
    cut: tuple       # (rows, columns) of tokens dropped at each side, because they see only black
    size: tuple      # (rows, columns) of tokens kept, after the shrink
    shrunk: bool     # above max_tiles' worth of tokens the grid is interpolated down to `size`
    newlines: int    # image_newline vectors: one a row, or one after a lone tile
    tokens: int      # visual tokens in all, newlines included

    @property
    def tiles(self):
        return 1 + self.grid[0] * self.grid[1]


def tiling(width, height, config, alone=True, most=None):
    """Tile grid and token count of a picture of width x height pixels (LLaVA-OneVision, anyres_max_9 + spatial_unpad).

    alone: it is the only picture of its conversation. Of several, each is padded to a square and is one tile.
    most: the most tiles that the grid may have, the base tile not counted (default: as many as the config allows).
    """
    side, tile = config.side, config.tile
    if not alone:
        newlines = int(config.multi_image_newline)
        return Tiling(None, None, (0, 0), (0, 0), (0, 0), False, newlines, side * side + newlines)

    def fit(grid):  # the larger picture area wins, then the smaller waste, then the earlier grid
        w, h = grid[0] * tile, grid[1] * tile
        scale = min(w / width, h / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - w * h
    columns, rows = max([g for g in config.pinpoints if most is None or g[0] * g[1] <= most], key=fit)
    w, h = columns * tile, rows * tile
    if w / width < h / height:
        resized = w, min(math.ceil(height * (w / width)), h)
    else:
        resized = min(math.ceil(width * (h / height)), w), h

    truncate = int if config.unpad == "original" else lambda x: int(round(x, 7))  # differs for 2 sizes in 88,530
    kept_w, kept_h = columns * side, rows * side  # tokens
    if width / height > kept_w / kept_h:
        cut = (kept_h - truncate(height * (kept_w / width))) // 2, 0
    else:
        cut = 0, (kept_w - truncate(width * (kept_h / height))) // 2
    kept_h, kept_w = kept_h - 2 * cut[0], kept_w - 2 * cut[1]

    times = math.sqrt(kept_h * kept_w / (config.max_tiles * side * side)) if config.max_tiles else 1.0
    shrunk = times > 1.1  # so up to 1.21 * max_tiles tiles' worth stays as it is
    if shrunk:
        kept_h, kept_w = int(kept_h // times), int(kept_w // times)
    return Tiling((w, h), resized, (rows, columns), cut, (kept_h, kept_w), shrunk, kept_h,
                  side * side + kept_h * (kept_w + 1))


def load_image(path):
    """An RGB PIL image, turned upright by its EXIF tag. Raises Fault with one line about the file."""
    try:
        if not Path(path).is_file():
            raise Fault("missing picture", f"{path}: no such picture; check the path")
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise Fault("oversized picture",
                    f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise Fault("broken picture",
                    f"{path}: not a picture that Pillow can read; give a PNG, JPEG, WebP, ...") from None
    except Fault:
        raise
    except Exception as e:  # Pillow raises nearly anything on broken files
        raise Fault("broken picture", f"{path}: broken picture ({e}); get it again") from None


def to_rgb(image):
    """RGB as the reference makes it (transparency is dropped), but deep greys are scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float32)
        top = 65535 if image.mode.startswith("I;16") else max(255, grey.max())
        image = Image.fromarray((grey.clip(0, top) * (255 / top)).astype(np.uint8))
    elif image.mode == "La":  # Pillow has no direct way
        image = image.convert("LA")
    return image.convert("RGB")


# A byte's value in the network. Through float64, as Hugging Face's processor: bit for bit the same
NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def pixels(image, tiles, config):
    """(tiles, 3, tile, tile) float32 in [-1, 1]: the base tile, then the grid row by row."""
    size = config.tile, config.tile
    if tiles.canvas is None:  # one of several pictures: square on grey 127, then one tile
        square = Image.new("RGB", (max(image.size),) * 2, (127, 127, 127))
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
    return NORMALISED[np.ascontiguousarray(np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops]))]


class Picture(NamedTuple):
    pixels: np.ndarray  # (tiles, 3, tile, tile)
    tiling: Tiling


def picture(image, config, alone=True, most=None):
    """What the model needs of one PIL image. alone, most: as in `tiling`. Raises Fault."""
    tiles = tiling(*image.size, config, alone, most)
    if not alone and max(image.size) ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
        raise Fault("oversized picture",
                    f"a picture of {image.width} x {image.height} is too long to be padded to a square; crop it")
    return Picture(pixels(to_rgb(image), tiles, config), tiles)


# --- text -----------------------------------------------------------------------------------------------------------

def load_tokenizer(directory):
    """The Qwen2 tokenizer of a checkpoint directory. Raises ValueError."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; copy it from the checkpoint's page or from Qwen/Qwen2-0.5B-Instruct")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file ({e}); download it again") from None
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: has no token {token}; use the tokenizer of a Qwen2 chat model")
    if tokenizer.token_to_id(IMAGE) is not None:  # llava-hf's; here such words are placeholders or plain text
        spec = json.loads(tokenizer.to_str())
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in (IMAGE, "<video>")]
        spec["model"]["vocab"] = {t: i for t, i in spec["model"]["vocab"].items() if t not in (IMAGE, "<video>")}
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


def vocabulary_size(tokenizer):
    """Rows that the embedding needs; files pad it to more (151936, 152000), with rows that were never trained."""
    return max(tokenizer.get_vocab().values()) + 1


def place_images(question, n):
    """The question with n placeholders: before it, joined by spaces, then a newline; or where it has them already."""
    if not question.isascii() and any("\ud800" <= c <= "\udfff" for c in question):
        raise ValueError("the question is not valid UTF-8; write it anew")
    if not question.replace(IMAGE, "").strip():
        raise ValueError("the question is empty: ask something about the picture")
    if IMAGE not in question:
        return " ".join([IMAGE] * n) + "\n" + question if n else question
    if question.count(IMAGE) != n:
        raise ValueError(f"the question has {question.count(IMAGE)} {IMAGE} but {n} pictures were given: "
                         "give one picture for each, or leave the placeholders out")
    return question


def chatml(turns, system=SYSTEM):
    """The prompt string of a conversation: turns alternate user, assistant; after a user's turn the answer is due.

    Built by hand, as the original does it; Hugging Face's templates for these models leave the system line out.
    """
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{turn}<|im_end|>\n"
    return text + ANSWER if len(turns) % 2 else text


def split_shared(text):
    """A prompt as (what other questions about the same pictures share, the rest), with the tokens of the whole."""
    cut = text.rindex(IMAGE) + len(IMAGE) if IMAGE in text else text.index("<|im_start|>user")
    return text[:cut], text[cut:]


class Prompt(NamedTuple):
    """One prompt as two streams. Positions count text and visual tokens together, as LLaVA-OneVision does."""
    ids: list        # text token ids
    t_pos: list      # position of each text token
    v_pos: list      # position of each visual token
    pictures: list   # Picture, in order
    asks: list = ()  # positions at which answers are due, for the router

    @property
    def end(self):
        """The position after the last token."""
        return 1 + max(self.t_pos[-1:] + self.v_pos[-1:], default=-1)


def encode(text, tokenizer, pictures=(), start=0):
    """Tokenises the text between the <image> placeholders and gives every token its place, from `start` on.

    pictures: one Picture for each placeholder; None: it is all plain text, whatever it looks like. Raises ValueError.
    """
    if pictures is None:
        chunks, pictures = [text], ()
    elif "<video>" in text:
        raise ValueError("<video> stands for a film, which this model does not take; write the question without it")
    else:
        chunks = text.split(IMAGE)
    if len(chunks) != len(pictures) + 1:
        raise Fault("placeholders", f"the text has {len(chunks) - 1} {IMAGE} but {len(pictures)} pictures were given")
    ids, t_pos, v_pos, asks = [], [], [], []
    for i, chunk in enumerate(chunks):
        new = tokenizer.encode(chunk, add_special_tokens=False)
        ids += new.ids
        t_pos += range(start, start + len(new.ids))
        for due in re.finditer(re.escape(ANSWER), chunk):
            asks.append(start + sum(end <= due.end() for _, end in new.offsets))
        start += len(new.ids)
        if i < len(pictures):
            v_pos += range(start, start + pictures[i].tiling.tokens)
            start += pictures[i].tiling.tokens
    return Prompt(ids, t_pos, v_pos, list(pictures), asks)


def labelled(pieces, tokenizer, pictures=(), start=0):
    """(Prompt, labels) of consecutive pieces of a conversation, (text, whether it is to be learned).

    labels has a token's own id where it is to be learned, and -1 elsewhere. Pieces meet at special tokens, so the ids
    are those of the whole text. pictures: as in `encode`.
    """
    prompt, labels = Prompt([], [], [], [], []), []
    plain, left = pictures is None, list(pictures or ())
    for text, learn in pieces:
        here = [left.pop(0) for _ in range(min(len(left), text.count(IMAGE)))]
        new = encode(text, tokenizer, None if plain else here, start)
        start += len(new.ids) + len(new.v_pos)
        labels += new.ids if learn else [-1] * len(new.ids)
        for all_of_it, part in zip(prompt, new):
            all_of_it += part
    if left:
        raise Fault("placeholders",
                    f"the text has {len(pictures) - len(left)} {IMAGE} but {len(pictures)} pictures were given")
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
    ids: np.ndarray    # (B, Nt) int64; 0 where padded
    t_pos: np.ndarray  # (B, Nt) int64; PAD, PAD + 1, ... where padded
    v_pos: np.ndarray  # (B, Nv) likewise
    pictures: list     # per prompt, its Pictures
    asks: list         # per prompt, the positions at which answers are due


def with_blank(batch, config):
    """A Batch without pictures, with one black tile whose tokens all count as padding: nobody sees it.

    Processes that train together must run the same parts of the model, whatever their own samples have.
    """
    blank = picture(Image.new("RGB", (config.tile,) * 2), config, alone=False)
    v_pos = pad([[], [0] * blank.tiling.tokens], PAD)[:1].repeat(len(batch.ids), axis=0)
    return batch._replace(v_pos=v_pos, pictures=[[blank], *batch.pictures[1:]])


def collate(prompts):
    return Batch(pad([p.ids for p in prompts], 0), pad([p.t_pos for p in prompts], PAD),
                 pad([p.v_pos for p in prompts], PAD), [p.pictures for p in prompts], [p.asks for p in prompts])


def pad(rows, filler):
    """Lists of numbers -> (rows, the longest) int64, filled on the right; PAD counts up, so that no two are equal."""
    n, count = max(map(len, rows)), filler == PAD
    return np.array([list(row) + [filler + i * count for i in range(n - len(row))] for row in rows],
                    dtype=np.int64).reshape(len(rows), n)


if __name__ == "__main__":
    import mixture
    run(mixture.main)
