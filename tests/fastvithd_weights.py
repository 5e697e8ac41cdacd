"""Weights and inputs that are formulas, for the tests of FastViTHD and FastVLM: 123 M numbers need no file.

A weight depends on its name and shape alone. Everything comes from raw bits of PCG64, which numpy promises to keep as
they are, and from whole numbers. What they should give is in fastvithd_golden.npz, of make_fastvithd_golden.py.
"""
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("fastvithd_golden.npz")
PUBLISHED = SimpleNamespace(vision_hidden=3072)
IN_FILES = "model.vision_tower.timm_model."  # before the tower's names in Hugging Face's files
SIZES = (256, 256), (384, 384), (512, 512), (384, 256)  # width, height of pictures whose features the golden file has
FEATURES = slice(5, None, 23)                # of 3,072: which it has

# The small language model of the whole
TEXT = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            vocab_size=320, tie_word_embeddings=False, max_position_embeddings=4096)
ROPE_THETA = 1e6
IMAGE_ID = 300                               # stands at every visual token; the tokenizer's own ids end before
TOKENS = 259                                 # of tests.tiny's tokenizer
SIDE = 256                                   # of the square that the picture becomes: 16 visual tokens
QUESTION = "What is it?"
PROMPT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n" + QUESTION
          + "<|im_end|>\n<|im_start|>assistant\n")


def numbers(name, shape):
    """Evenly spread around 0, of variance 1."""
    n = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw((n + 1) // 2).view(np.int32)[:n]
    return (bits.astype(np.float32) * np.float32(3 ** 0.5 / 2 ** 31)).reshape(shape)


def weight(name, shape):
    """A tensor by its name in Hugging Face's files, or in encoders.fastvithd: signals keep their size on the way, no
    bias is zero and no norm one."""
    name = name.removeprefix(IN_FILES)
    if name.endswith("num_batches_tracked"):
        return np.array(1000)
    x, module = numbers(name, shape), name.rpartition(".")[0]
    if name.endswith("running_var"):
        return 1 + x / 4
    if name.endswith("gamma"):
        return np.float32(0.3) + x / 20
    if name.endswith(("bias", "running_mean")):
        return x / 10
    if x.ndim == 1:                          # of a norm
        return 1 + x / 5
    if "embed_tokens" in name:
        return x
    x *= np.float32(np.prod(shape[1:]) ** -0.5)
    if module.endswith(("token_mixer.reparam_conv", "pos_emb.reparam_conv")):
        x /= 4
        x[:, :, shape[2] // 2, shape[3] // 2] += 1   # the skip that is in the kernel
    elif module.endswith("reparam_conv"):            # what GELU takes away
        x *= np.float32(1.4)
    elif name == "lm_head.weight":
        x *= 4
    return x


def whole_model_shapes(golden):
    """{name in Hugging Face's files: shape} of the 671 tensors of the model whose logits the golden file has."""
    return {str(name): tuple(map(int, filter(None, str(shape).split(","))))
            for name, shape in zip(golden["names"], golden["shapes"])}


def save_whole_model(directory, golden, tokenizer):
    """That model as a checkpoint, as transformers saves it: 492 MB."""
    tensors = {name: weight(name, shape) for name, shape in whole_model_shapes(golden).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(str(golden["config"]))
    tokenizer.save(str(directory / "tokenizer.json"))


def picture(width, height):
    """A PIL image: coarse squares, light and dark, with slopes and edges on them."""
    x, y, colour = np.arange(width)[:, None], np.arange(height)[:, None, None], np.arange(3)
    squares = (x // 71 * 101 + y // 53 * 149 + colour * 47) % 193
    slopes = (x * (3 + colour) + y * (5 - 2 * colour) + x * y // 37) % 63
    return Image.fromarray((squares + slopes).astype(np.uint8))


def pixels(image):
    """(1, 3, height, width), float32 in [0, 1]."""
    return (np.asarray(image).astype(np.float32) / 255).transpose(2, 0, 1)[None]


def square(image, side):
    """The image in the middle of a black square, which is then resized to `side`, as FastVLM prepares it."""
    width, height = image.size
    whole = Image.new("RGB", (max(image.size),) * 2)
    whole.paste(image, ((whole.width - width) // 2, (whole.height - height) // 2))
    return whole.resize((side, side), Image.BICUBIC)


def whole_model_input(tokenizer):
    """What the golden file's logits belong to: a picture of 300 x 200, its pixels (1, 3, SIDE, SIDE), and PROMPT's
    token ids, with IMAGE_ID for each visual token."""
    image = picture(300, 200)
    before, after = (tokenizer.encode(part, add_special_tokens=False).ids for part in PROMPT.split("<image>"))
    return image, pixels(square(image, SIDE)), before + [IMAGE_ID] * (SIDE // 64) ** 2 + after
