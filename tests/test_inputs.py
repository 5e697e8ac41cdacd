"""Images and prompts: token counts, pixels, positions, ids, batches."""
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from config import PAD, Config
from data import (chatml, collate, encode, join, labelled, normalised, place_images, process_image, split_shared,
                  target_mask, tiling, turns_to_learn, with_blank)
from families import load_tokenizer, vocabulary_size
from pictures import load_image, to_rgb
from tests import tiny

GOLDEN = {  # (width, height): grid rows, columns; kept rows, columns; tokens. By the original's rule
    (224, 224): (1, 1, 27, 27, 1485), (384, 384): (1, 1, 27, 27, 1485), (500, 375): (1, 2, 27, 36, 1728),
    (640, 480): (2, 2, 40, 54, 2929), (480, 640): (2, 2, 54, 40, 2943), (850, 600): (2, 3, 54, 77, 4941),
    (1024, 768): (2, 3, 54, 73, 4725), (1000, 1400): (4, 3, 95, 68, 7284), (1700, 2200): (6, 5, 92, 71, 7353),
    (1920, 1080): (3, 5, 60, 108, 7269), (3840, 2160): (4, 6, 61, 107, 7317), (400, 3000): (6, 1, 162, 21, 4293),
    (3000, 400): (1, 6, 21, 162, 4152)}


@pytest.mark.parametrize("size", GOLDEN, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("unpad", ["original", "hf"])
def test_golden_counts(size, unpad):
    t = tiling(*size, Config(unpad=unpad))
    assert (*t.grid, *t.size, t.tokens) == GOLDEN[size]


def test_original_and_hugging_face_round_differently():
    sizes = {(820, 369): (2349, 2403), (1375, 1125): (8748, 7209)}
    for size, counts in sizes.items():
        assert tuple(tiling(*size, Config(unpad=rule)).tokens for rule in ("original", "hf")) == counts


def test_several_images_cost_730_or_729():
    """Training and Hugging Face end each image with a newline; the original's evaluation does not."""
    counts = [tiling(640, 480, Config(multi_image_newline=newline), single_image=False).tokens
              for newline in (True, False)]
    assert counts == [730, 729]
    m = tiny.model(visor=False, multi_image_newline=False)
    processed = [process_image(tiny.image(20, 30, i), m.config, single_image=False) for i in range(2)]
    assert [len(x) for x in m.encode(processed)] == [16, 16]


MID_STAGE = {"pinpoints": [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)], "max_tiles": None}  # plain "anyres"


@pytest.mark.parametrize("changes", [{}, {"max_tiles": None}, {"max_tiles": 2}, {"unpad": "hf"}, MID_STAGE], ids=str)
def test_the_model_makes_as_many_tokens_as_the_function_says(changes):
    m, rng = tiny.model(visor=False, **changes), random.Random(1)
    for i in range(12):
        p = process_image(tiny.image(rng.randint(1, 300), rng.choice([1, rng.randint(1, 300)]), i), m.config)
        assert len(p.pixels) == p.tiling.tiles
        with torch.inference_mode():
            assert m.encode([p])[0].shape == (p.tiling.tokens, 64)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (224, 224), (383, 385), (500, 375), (901, 77), (40, 1999),
                                  (1023, 767), (1700, 2200), (2500, 31)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_pixels_equal_the_reference_bit_for_bit(size):
    c, image = Config(), tiny.image(*size, seed=size[0])
    reference = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    one = np.asarray(reference([image], return_tensors="np")["pixel_values"][0])
    several = np.asarray(reference([[image, image]], return_tensors="np")["pixel_values"][0])
    assert np.array_equal(one, normalised("siglip")[0][process_image(image, c).pixels])
    assert np.array_equal(several, normalised("siglip")[0][process_image(image, c, single_image=False).pixels])


@pytest.mark.parametrize("mode", "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16B I;16L".split())
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (7, 5))).mode == "RGB"


def test_deep_greys_are_scaled_not_clipped():
    deep = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(to_rgb(Image.fromarray(deep.astype(np.int32) // 257)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_rotation(tmp_path):
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # turn a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


@pytest.fixture
def qwen2(tmp_path_factory):
    """The real Qwen2 tokenizer as llava-hf has it, cut down to the words of these tests (Apache-2.0)."""
    directory = tmp_path_factory.mktemp("qwen2")
    shutil.copy(Path(__file__).parent / "qwen2_cut.json", directory / "tokenizer.json")
    return load_tokenizer(directory)


def test_golden_ids(qwen2):
    c = Config()
    p = process_image(tiny.image(384, 384), c)
    prompt = encode(chatml([place_images("What is shown in this image?", 1)]), qwen2, [p])
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    question = [198, 3838, 374, 6839, 304, 419, 2168, 30]
    assert prompt.ids == [*system, 151644, 872, 198, *question, 151645, 198, 151644, 77091, 198]
    assert prompt.t_pos == [*range(14), *range(14 + 1485, 14 + 1485 + 13)]
    assert prompt.v_pos == list(range(14, 14 + 1485)) and prompt.end == 14 + 1485 + 13
    assert vocabulary_size(qwen2) == 151646


def test_several_turns(qwen2):
    text = chatml(["<image>\nIs there a clock in the image?", "Yes", "What is shown in this image?"])
    assert text.count("<|im_start|>") == 5 and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert chatml(["a", "b"]).endswith("assistant\nb<|im_end|>\n")  # nothing is due
    assert encode(text.replace("<image>", ""), qwen2).v_pos == []


def test_where_images_stand():
    assert place_images("Q", 0) == "Q" and place_images("Q", 1) == "<image>\nQ"
    assert place_images("Q", 3) == "<image> <image> <image>\nQ"
    assert place_images("A <image> B <image>", 2) == "A <image> B <image>"
    for question, n, what in (("A <image>", 2, "2 images"), ("<image> A", 0, "0 images"), ("", 1, "empty"),
                              (" \n", 0, "empty"), ("<image>", 1, "empty")):
        with pytest.raises(ValueError, match=what):
            place_images(question, n)


def test_prompt_in_two_pieces_is_the_same_prompt():
    c, tokenizer = tiny.config(), tiny.tokenizer()
    processed = [process_image(tiny.image(20, 30, i), c, single_image=False) for i in range(2)]
    for text in (chatml(["<image> <image>\nWhat?"]), chatml(["What <image> and <image>? Say"]), chatml(["\n\nHi"])):
        shown = processed[:text.count("<image>")]
        whole = encode(text, tokenizer, shown)
        shared, own = split_shared(text)
        first = encode(shared, tokenizer, shown)
        rest = encode(own, tokenizer, start=first.end)
        assert (first.ids + rest.ids, first.t_pos + rest.t_pos, first.v_pos) == whole[:3] and rest.end == whole.end
        assert join(first, rest) == whole


def test_collate_pads_on_the_right_with_positions_past_the_end():
    c, tokenizer = tiny.config(), tiny.tokenizer()
    p = process_image(tiny.image(20, 30), c)
    batch = collate([encode("ab<image>c", tokenizer, [p]), encode("abcde", tokenizer)])
    assert batch.ids.shape == (2, 5) and batch.v_pos.shape == (2, p.tiling.tokens)
    assert batch.t_pos[0].tolist() == [0, 1, 2 + p.tiling.tokens, PAD, PAD + 1]
    assert batch.v_pos[1].tolist() == [PAD + i for i in range(p.tiling.tokens)]
    assert collate([encode("abc", tokenizer)]).v_pos.shape == (1, 0)


# --- which image a visual token belongs to --------------------------------------------------------------------------

def some_images(c, n, single_image=False):
    return [process_image(tiny.image(20 + 9 * i, 30, i), c, single_image) for i in range(n)]


def counts(images):
    """v_img of a prompt with these images, from its definition."""
    return [i for i, x in enumerate(images) for _ in range(x.tiling.tokens)]


def test_visual_tokens_know_their_image():
    """One tile, a grid of tiles, and none; side by side and apart."""
    c, tokenizer = tiny.config(), tiny.tokenizer()
    small, large = some_images(c, 1)[0], process_image(tiny.image(90, 40), c)
    assert small.tiling.tokens == 17 and large.tiling.tokens > 17
    for text, images in (("<image>ab", [large]), ("a<image>b<image>c<image>", [small, large, small]),
                         ("<image><image>", [large, small]), ("abc", [])):
        prompt = encode(text, tokenizer, images)
        assert prompt.v_img == counts(images) and len(prompt.v_img) == len(prompt.v_pos)
    assert encode("<image>", tokenizer, None).v_img == []  # plain text, whatever it looks like


def test_joined_pieces_count_their_images_on():
    c, tokenizer = tiny.config(), tiny.tokenizer()
    x, y, z = some_images(c, 3)
    a = encode("a<image>b<image>", tokenizer, [x, y])
    assert a.v_img == counts([x, y])
    b = encode("c<image>d", tokenizer, [z], start=a.end)
    text = encode("only text", tokenizer, start=b.end)
    whole = encode("a<image>b<image>c<image>donly text", tokenizer, [x, y, z])
    assert join(join(a, b), text) == join(a, join(b, text)) == whole and whole.v_img == counts([x, y, z])
    assert a.v_img == counts([x, y]) and b.v_img == counts([z])  # the pieces are as they were


def test_labelled_pieces_count_their_images_on():
    """A conversation with images in three of its turns, an answer among them: the ids, positions and images are those
    of the whole text, and the labels those of its answers."""
    c, tokenizer = tiny.config(), tiny.tokenizer()
    images = some_images(c, 4)
    turns = ["<image> and <image>?", "yes", "then <image>", "no <image> at all", "why", "so"]
    for start in (0, 7):
        prompt, labels = labelled(turns_to_learn(turns), tokenizer, images, start)
        whole = encode(chatml(turns), tokenizer, images, start)
        assert prompt == whole and prompt.v_img == counts(images) and len(labels) == len(prompt.ids)
        said = [token for token, label in zip(prompt.ids, labels) if label >= 0]
        assert all(label in (-1, token) for token, label in zip(prompt.ids, labels))
        assert tokenizer.decode(said, skip_special_tokens=False) == "yes<|im_end|>no  at all<|im_end|>so<|im_end|>"


# --- batches --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def batch():
    """Two images, none, one image; one, two and no answers that begin."""
    c, tokenizer = tiny.config(), tiny.tokenizer()
    x, y, z = some_images(c, 3)
    return collate([encode(chatml(["<image> or <image>?"]), tokenizer, [x, y]),
                    encode(chatml(["one", "two", "three"]), tokenizer), encode("<image>c", tokenizer, [z])])


def test_padding_belongs_to_no_image(batch):
    n = [len(counts(images)) for images in batch.images]
    assert batch.v_img.shape == batch.v_pos.shape == (3, max(n)) and batch.v_img.dtype == np.int64
    for row, images in zip(batch.v_img.tolist(), batch.images):
        assert row == counts(images) + [-1] * (max(n) - len(counts(images)))
    assert ((batch.v_img == -1) == (batch.v_pos >= PAD)).all()
    assert all(a is b for a, b in zip(batch.positions, (batch.t_pos, batch.v_pos, batch.v_img, batch.v_rope)))


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1], [1, 1, 2]], ids=str)
def test_some_prompts_of_a_batch(batch, rows):
    """Every field, padding as it was; by a list of rows or an array."""
    for own in (rows, np.array(rows)):
        chosen = batch.select(own)
        assert type(chosen) is type(batch)
        for before, after in zip(batch, chosen):
            assert len(after) == len(rows) and type(after) is type(before)
            for k, i in enumerate(rows):
                assert np.array_equal(after[k], before[i]) if isinstance(before, np.ndarray) else after[k] is before[i]


def test_blank_tile_belongs_to_no_image():
    c, tokenizer = tiny.config(), tiny.tokenizer()
    text = collate([encode(chatml(["one"]), tokenizer), encode("two", tokenizer)])
    assert text.v_img.shape == (2, 0)
    blank = with_blank(text, c)
    assert blank.v_img.tolist() == [[-1] * 17] * 2 and blank.v_pos.tolist() == [[PAD + i for i in range(17)]] * 2
    assert [len(images) for images in blank.images] == [1, 0] and blank.images[0][0].tiling.tokens == 17
    assert np.array_equal(blank.ids, text.ids) and np.array_equal(blank.t_pos, text.t_pos)
    assert blank.answer_starts == text.answer_starts and text.images == [[], []]  # the batch itself is as it was


# --- targets --------------------------------------------------------------------------------------------------------

def slow_mask(labels, t_pos):
    """A token's next one is a target where it has a label and stands right behind the token."""
    return [[row[i + 1] >= 0 and pos[i + 1] == pos[i] + 1 for i in range(len(row) - 1)]
            for row, pos in zip(labels, t_pos)]


def test_a_token_right_after_an_image_is_no_target():
    c, tokenizer = tiny.config(), tiny.tokenizer()
    x, y = some_images(c, 2)
    turns = ["<image>a", "b", "c", "d<image>ef"]
    prompts, labels = zip(*[labelled(turns_to_learn(turns), tokenizer, [x, y]),
                            labelled([("xy", True)], tokenizer), labelled([("<image>xy", True)], tokenizer, [y])])
    whole = collate(prompts)
    labels = np.array([row + [-1] * (whole.ids.shape[1] - len(row)) for row in labels])
    mask = target_mask(labels, whole.t_pos)
    assert isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == (3, whole.ids.shape[1] - 1)
    assert mask.tolist() == slow_mask(labels.tolist(), whole.t_pos.tolist())
    found = [tokenizer.decode(row[1:][m].tolist(), skip_special_tokens=False) for row, m in zip(whole.ids, mask)]
    assert found == ["b<|im_end|>df<|im_end|>", "y", "y"]  # not e, right after an image, nor x: no text before it
    assert (mask.sum(1) == (labels >= 0).sum(1) - 1).all()


def test_padding_is_no_target():
    """The token before padding predicts nothing; a batch of one token has no target."""
    tokenizer = tiny.tokenizer()
    whole = collate([encode("abcd", tokenizer), encode("a", tokenizer)])
    labels = np.full(whole.ids.shape, 7)
    assert target_mask(labels, whole.t_pos)[0].all() and not target_mask(labels, whole.t_pos)[1, 0]
    assert target_mask(labels[:, :1], whole.t_pos[:, :1]).shape == (2, 0)
