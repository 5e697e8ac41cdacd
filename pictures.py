"""An image file becomes an upright picture in RGB, whatever it is; or one line says why not.

Pillow decodes. What files get wrong without harm to their pixels (metadata, orientation, deep greys) is put right here.
"""
import io
import os
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image

# Pillow knows more: EPS and PDF, which start other programs, documents, films. MPO, many a phone's, is a kind of JPEG
FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"
TURNS = dict(enumerate((Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
                        Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90), 2))  # EXIF orientations; 1 is upright


class SampleError(ValueError):
    """An image or a sample that cannot be used. kind: the reason in two words, for counting."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # so that it comes back whole from a worker process
        return SampleError, (self.kind, str(self))


def load_image(path):
    """An upright PIL image, RGB, or RGBA where it has transparency. Raises SampleError with one line about the file.

    Metadata never decides: a file that opens only without its comments and profiles is read without them.
    """
    if not os.path.isfile(path):
        found = "a directory, no" if os.path.isdir(path) else "no such"
        raise SampleError("missing image", f"{path}: {found} image; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about EXIF and large images
            try:
                return decode(path)
            except Image.DecompressionBombError:
                raise
            except Exception:
                return decode(without_metadata(path))
    except Image.DecompressionBombError:
        raise SampleError("oversized image",
                    f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller first") from None
    except Image.UnidentifiedImageError:
        raise SampleError("broken image", f"{path}: not an image that is read here ({', '.join(FORMATS)}); convert it "
                          "to PNG, or get it again") from None
    except Exception as e:  # Pillow raises nearly anything on broken files
        if isinstance(e, OSError) and e.errno:  # the system's word, not Pillow's
            raise SampleError("missing image", f"{path}: {e.strerror.lower()}; make it readable") from None
        why = f" ({e})" if isinstance(e, (OSError, SampleError)) else ""  # its own words; others' are Python's
        raise SampleError("broken image", f"{path}: broken image{why}; get it again") from None


def decode(file):
    """The image of a path or a binary file, as load_image gives it. Raises nearly anything."""
    Image.init()  # knows all of Pillow's formats from here on
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        image.load()
        try:
            turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        except Exception:  # EXIF is as others left it; one that cannot be read turns nothing
            turn = None
        return colours(image if turn is None else image.transpose(turn))


def without_metadata(path):
    """A PNG or JPEG as a binary file without what decoding does not need, EXIF excepted; the path of any other kind."""
    with open(path, "rb") as file:
        head = file.read(8)
        is_png, is_jpeg = head == b"\x89PNG\r\n\x1a\n", head.startswith(b"\xff\xd8")
        if not (is_png or is_jpeg):
            return path
        content = head + file.read()
    if is_png:
        kept, at = [head], 8
        while at + 8 <= len(content):  # a chunk: length, name, that many bytes, checksum
            name, end = content[at + 4:at + 8], at + 12 + int.from_bytes(content[at:at + 4], "big")
            whole = zlib.crc32(content[at + 4:end - 4]) == int.from_bytes(content[end - 4:end], "big")
            if name[:1].isupper() or (name in (b"tRNS", b"eXIf") and whole):
                kept.append(content[at:end])
            at = end
    else:
        kept, at = [head[:2]], 2
        while at + 4 <= len(content) and content[at] == 0xff and content[at + 1] != 0xda:  # segments, to the first scan
            marker, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2:at + 4], "big")
            body, optional = content[at + 4:end], 0xe0 <= marker <= 0xef or marker == 0xfe  # applications', comments
            colour_code = marker in (0xe0, 0xee) and len(body) >= 12  # JFIF's and Adobe's: YCbCr, CMYK, ...
            if not optional or colour_code or body.startswith(b"Exif\0\0"):
                kept.append(content[at:end])
            at = end
    return io.BytesIO(b"".join([*kept, content[at:]]))


def colours(image):
    """RGBA where a PIL image has transparency, else RGB; of greys deeper than 8 bits see to_rgb."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image).astype(np.float32)
        if not np.isfinite(grey).all():
            raise SampleError("broken image", "NaN or infinity among its greys")
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # a PGM of 16 bits
            top = 65535
        else:
            top = 1 if image.mode == "F" and grey.max() <= 1 else max(255, grey.max())
        return Image.fromarray((grey.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # Pillow has no direct way
        image = image.convert("LA")
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    return image.convert("RGBA" if transparent else "RGB")


def to_rgb(image, transparency="drop"):
    """A PIL image in RGB as the reference makes it, but deep greys are scaled, not clipped.

    transparency: as in Config. Black is 0 and what is below; white is 65535 in greys of 16 bits; elsewhere the largest
    value, at least 255, or 1 where floats lie at or below it. Raises SampleError where a grey is not finite.
    """
    image = colours(image)
    if transparency == "white" and image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
