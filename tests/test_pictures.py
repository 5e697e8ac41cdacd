"""Picture files: which are read, what metadata may do (nothing, orientation excepted), transparency, deep greys."""
import io
import json
import random
import struct
import subprocess
import warnings
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from config import Config
from data import normalised, process_image
from families import read_config
from pictures import SampleError, load_image, to_rgb
from tests import tiny


def chunk(kind, body):
    """A PNG's chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segment(marker, body):
    """A JPEG's segment."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def exif(tag, kind, value, orientation=6):
    """EXIF of two entries: an orientation, and another one whose four bytes are `value`."""
    return (b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
            + struct.pack("<HHI", tag, kind, 1) + value + bytes(4))


def written(kind, image=None, **how):
    """The bytes of a picture as Pillow writes them."""
    file = io.BytesIO()
    (image or tiny.image(64, 40)).save(file, kind, **how)
    return file.getvalue()


# --- metadata -------------------------------------------------------------------------------------------------------

NOISE = random.Random(0).randbytes(1_500_000)
PNG_METADATA = {
    "long zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 2_000_000)),
    "long tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
    "long iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 2_000_000)),
    "a bomb": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000))),
    "many texts": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1_000_000))) * 70,
    "large profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(NOISE)),
    "unknown compression": chunk(b"zTXt", b"Comment\0\7abc"),
    "short pHYs": chunk(b"pHYs", b"\0"), "short gAMA": chunk(b"gAMA", b""), "short cHRM": chunk(b"cHRM", b"abc"),
    "animation of nothing": chunk(b"acTL", b""), "wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?"}


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("what", PNG_METADATA)
def test_metadata_of_a_png(tmp_path, what, turned):
    """In front of the pixels or behind them, with an orientation in EXIF or without."""
    png, image = written("PNG"), tiny.image(64, 40)
    turn = chunk(b"eXIf", exif(0x011a, 9, bytes(4))[6:]) if turned else b""
    want = np.asarray(image.transpose(Image.ROTATE_270) if turned else image)
    for where in (33, len(png) - 12):  # after IHDR, before IEND
        content = png[:where] + PNG_METADATA[what] + png[where:]
        (tmp_path / "p.png").write_bytes(content[:33] + turn + content[33:])
        assert np.array_equal(np.asarray(load_image(tmp_path / "p.png")), want)


BITS = struct.pack("<I", 0xffffffff)
JPEG_METADATA = {
    "NaN": exif(0x011a, 11, struct.pack("<f", float("nan"))), "infinity": exif(0x011a, 11, b"\0\0\x80\x7f"),
    "negative": exif(0x011a, 9, struct.pack("<i", -1)), "beyond the end": exif(0x011a, 5, BITS),
    "words": exif(0x011a, 2, b"abc\0"), "no such type": exif(0x011a, 99, BITS),
    "a loop": exif(0x8769, 4, b"\x08\0\0\0"),
    "directory nowhere": exif(0x8769, 4, BITS), "long maker's note": exif(0x927c, 7, BITS)}


@pytest.mark.parametrize("what", JPEG_METADATA)
def test_exif_that_is_partly_broken_still_turns(tmp_path, what):
    jpeg = written("JPEG")
    (tmp_path / "p.jpg").write_bytes(jpeg[:2] + segment(0xe1, JPEG_METADATA[what]) + jpeg[2:])
    want = Image.open(io.BytesIO(jpeg)).transpose(Image.ROTATE_270)
    assert np.array_equal(np.asarray(load_image(tmp_path / "p.jpg")), np.asarray(want))


SEGMENTS = [(0xe1, b"Exif\0\0"), (0xe1, b"Exif\0\0II*\0\xff\xff\xff\xff"), (0xe1, b"Exif\0\0garbage"),
            (0xe0, b"JFIF\0\1"), (0xe0, b"JFIF\0\1\1\1\0"), (0xee, b"Adobe"), (0xed, b"Photoshop 3.0\08BIM"),
            (0xe2, b"MPF\0II*\0\x08\0\0\0\0\0"), (0xe2, b"ICC_PROFILE\0"), (0xfe, b"")]


@pytest.mark.parametrize("body", SEGMENTS, ids=str)
def test_segments_of_a_jpeg_that_are_broken(tmp_path, body):
    jpeg = written("JPEG")
    (tmp_path / "p.jpg").write_bytes(jpeg[:2] + segment(*body) + jpeg[2:])
    assert np.array_equal(np.asarray(load_image(tmp_path / "p.jpg")), np.asarray(Image.open(io.BytesIO(jpeg))))


def test_how_a_jpegs_colours_are_coded_is_no_metadata(tmp_path):
    """Adobe's segment says that this one's are no YCbCr; JFIF's, before it, that they are."""
    plain, path = written("JPEG"), tmp_path / "p.jpg"
    jfif, rest, adobe = plain[2:20], plain[20:], segment(0xee, b"Adobe\0d\0\0\0\0\0")
    assert jfif[4:8] == b"JFIF"
    found = {}
    for name, head in {"JFIF": jfif, "Adobe": adobe, "both": jfif + adobe}.items():
        path.write_bytes(plain[:2] + head + rest)
        found[name] = np.asarray(load_image(path))
        path.write_bytes(plain[:2] + segment(0xe0, b"JFIF\0\1") + head + rest)
        assert np.array_equal(np.asarray(load_image(path)), found[name]), name
    assert np.array_equal(found["both"], found["JFIF"]) and not np.array_equal(found["Adobe"], found["JFIF"])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(tmp_path, kind, orientation):
    tag = Image.Exif()
    tag[0x0112] = orientation
    (tmp_path / "p").write_bytes(written(kind, exif=tag))
    want = ImageOps.exif_transpose(Image.open(tmp_path / "p")).convert("RGB")
    assert np.array_equal(np.asarray(load_image(tmp_path / "p")), np.asarray(want))
    assert want.size == ((40, 64) if orientation in (5, 6, 7, 8) else (64, 40))


# --- kinds of files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000"])
def test_welcome_kinds(tmp_path, kind):
    """Whatever the file is called; of several frames the first."""
    frames = {"save_all": True, "append_images": [tiny.image(64, 40, 1)]} if kind in ("MPO", "GIF", "TIFF") else {}
    (tmp_path / "p.xyz").write_bytes(written(kind, **frames))
    if kind == "DIB":  # a BMP's inside alone
        with pytest.raises(SampleError, match="not an image that is read here"):
            load_image(tmp_path / "p.xyz")
    else:
        first = Image.open(tmp_path / "p.xyz").convert("RGB")
        assert np.array_equal(np.asarray(load_image(tmp_path / "p.xyz")), np.asarray(first))


def eps():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n"


OTHERS = {"eps": eps, "pdf": lambda: written("PDF"), "psd": lambda: b"8BPS\0\1" + bytes(6) + struct.pack(
    ">HIIHH", 3, 8, 8, 8, 3) + bytes(200), "ico": lambda: written("ICO", Image.new("RGB", (32, 32))),
    "tga": lambda: written("TGA"), "pcx": lambda: written("PCX"), "svg": lambda: b"<svg/>",
    "html": lambda: b"<!doctype html>", "half a signature": lambda: b"\x89PNG",
    "signature": lambda: b"\x89PNG\r\n\x1a\n",
    "only a start": lambda: b"\xff\xd8", "starts": lambda: b"\xff\xd8\xff", "nothing": lambda: b"",
    "zeros": lambda: bytes(99)}


@pytest.mark.parametrize("what", OTHERS)
def test_other_kinds_start_nothing_and_say_what_is_read(tmp_path, what, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "p.png"
    path.write_bytes(OTHERS[what]())
    with pytest.raises(SampleError) as e:
        load_image(path)
    assert str(e.value).startswith(f"{path}: not an image that is read here (PNG, JPEG, ") and "\n" not in str(e.value)


def test_what_the_system_refuses(tmp_path, monkeypatch):
    written_to = tmp_path / "p.png"
    written_to.write_bytes(written("PNG"))

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(SampleError, match="p.png: permission denied; make it readable"):
        load_image(written_to)


# --- transparency ---------------------------------------------------------------------------------------------------

def palette(size, alpha):
    image = tiny.image(*size).quantize(16)
    image.info["transparency"] = alpha
    return image


def noise(mode, size):
    """A picture of random bands, alpha too."""
    return Image.merge(mode, [tiny.image(*size, seed=i).getchannel(i % 3) for i in range(len(mode))])


def keyed(mode, size, key):
    image = tiny.image(*size).convert(mode).point(lambda x: x // 64 * 64)  # so that the key is met
    image.info["transparency"] = key
    return image


SEEN_THROUGH = {"RGBA": lambda s: noise("RGBA", s), "LA": lambda s: noise("LA", s),
                "PA": lambda s: noise("LA", s).convert("PA"), "P, one": lambda s: palette(s, 3),
                "P, some": lambda s: palette(s, bytes(range(0, 256, 16))), "P, few": lambda s: palette(s, b"\0\x80"),
                "L, one grey": lambda s: keyed("L", s, 64), "RGB, one colour": lambda s: keyed("RGB", s, (64, 64, 64)),
                "1, white": lambda s: keyed("1", s, 255), "RGB": lambda s: tiny.image(*s), "P": lambda s: tiny.image(
                    *s).quantize(16), "L": lambda s: tiny.image(*s).convert("L"), "CMYK": lambda s: tiny.image(
                    *s).convert("CMYK")}


@pytest.mark.parametrize("size", [(50, 37), (37, 390)], ids=str)
@pytest.mark.parametrize("what", SEEN_THROUGH)
def test_transparency_on_white_equals_the_reference_bit_for_bit(what, size):
    image = SEEN_THROUGH[what](size)
    reference = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    c = Config(transparency="white")
    one = np.asarray(reference([image], return_tensors="np")["pixel_values"][0])
    several = np.asarray(reference([[image, image]], return_tensors="np")["pixel_values"][0])
    assert np.array_equal(one, normalised("siglip")[0][process_image(image, c).pixels])
    assert np.array_equal(several, normalised("siglip")[0][process_image(image, c, single_image=False).pixels])


@pytest.mark.parametrize("what", [x for x in SEEN_THROUGH if x != "1, white"])
def test_transparency_dropped_is_the_colour_below(what):
    """As the original code has it, with the colours that Pillow says."""
    image = SEEN_THROUGH[what]((50, 37))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow would like to keep it
        assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))
    plain = process_image(image.convert("RGBA").convert("RGB"), Config()).pixels
    assert np.array_equal(process_image(image, Config()).pixels, plain)


@pytest.mark.parametrize("kind, what", [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P, one"), ("PNG", "P, some"),
                                        ("PNG", "L, one grey"), ("PNG", "RGB, one colour"), ("GIF", "P, one"),
                                        ("WEBP", "RGBA"), ("TIFF", "RGBA")])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_files_transparency_lasts_until_the_model_is_known(tmp_path, kind, what, orientation):
    image, tag = SEEN_THROUGH[what]((50, 37)), Image.Exif()
    tag[0x0112] = orientation
    more = {} if kind == "GIF" else {"exif": tag}
    image.save(tmp_path / "p", kind, **more)
    found = load_image(tmp_path / "p")
    assert found.mode == "RGBA"
    reference = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "p"))
    want = np.asarray(reference([upright], return_tensors="np")["pixel_values"][0])
    white, dropped = (process_image(found, Config(transparency=t)).pixels for t in ("white", "drop"))
    assert np.array_equal(normalised("siglip")[0][white], want) and not np.array_equal(white, dropped)


def test_the_checkpoints_family_decides():
    """As with `unpad`: Hugging Face's configuration says white, the original's drops; ours keeps what it was."""
    sizes = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
                 intermediate_size=96)
    tower = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32,
                 patch_size=8)
    hf = {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2", **sizes},
          "vision_config": {"model_type": "siglip_vision_model", **tower}}
    original = {"mm_vision_tower": "google/siglip-so400m-patch14-384", "image_grid_pinpoints": [[384, 384]],
                "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres_max_9", **sizes}
    found = [config_of(x) for x in (hf, original)]
    assert [c.transparency for c in found] == ["white", "drop"] and [c.unpad for c in found] == ["hf", "original"]
    assert [config_of(json.loads(c.to_json())) for c in found] == found
    for wrong in ("black", "", None, 1):
        with pytest.raises(ValueError, match="transparency"):
            Config(transparency=wrong)


def config_of(raw):
    with TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(raw))
        return read_config(place)


# --- deep greys -----------------------------------------------------------------------------------------------------

def greys(values, dtype):
    return Image.fromarray(np.array([values], dtype=dtype))


@pytest.mark.parametrize("dtype, values, want", [
    (np.float32, [0, 0.25, 0.5, 1], [0, 63, 127, 255]), (np.float32, [0, 0.1], [0, 25]),
    (np.float32, [-1, -0.5, 0.5, 1], [0, 0, 127, 255]), (np.float32, [-3, -2], [0, 0]), (np.float32, [0, 0], [0, 0]),
    (np.float32, [0, 1, 2, 255], [0, 1, 2, 255]), (np.float32, [0, 1.5], [0, 1]),
    (np.float32, [0, 1000, 2000], [0, 127, 255]), (np.float32, [0, 3e38], [0, 255]),
    (np.int32, [0, 1], [0, 1]), (np.int32, [-7, 255], [0, 255]), (np.int32, [0, 2 ** 31 - 1], [0, 255]),
    (np.uint16, [0, 1, 65535], [0, 0, 255]), (np.uint16, [0, 32896], [0, 128])], ids=str)
def test_deep_greys(tmp_path, dtype, values, want):
    """The rule of to_rgb; in files as in memory; without a word from numpy."""
    image = greys(values, dtype)
    image.save(tmp_path / "p.tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (to_rgb(image), load_image(tmp_path / "p.tiff")):
            assert np.asarray(found).tolist() == [[[x] * 3 for x in want]]


def test_a_dark_pgm_of_16_bits_stays_dark(tmp_path):
    (tmp_path / "p.pgm").write_bytes(b"P5 2 1 65535\n\0\0\x40\x40")
    assert np.asarray(load_image(tmp_path / "p.pgm"))[0, :, 0].tolist() == [0, 64]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_greys_that_are_not_finite(tmp_path, value):
    image = greys([0, value, 1], np.float32)
    image.save(tmp_path / "p.tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SampleError) as e:
            load_image(tmp_path / "p.tiff")
        assert str(e.value) == f"{tmp_path / 'p.tiff'}: broken image (NaN or infinity among its greys); get it again"
        assert e.value.kind == "broken image"
        with pytest.raises(SampleError, match="NaN or infinity"):
            process_image(image, tiny.config())
