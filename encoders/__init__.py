"""The vision networks, one file each.

The seam that they share: data.py says how an image becomes pieces (a tile, or a whole image) and how many tokens these
cost, and makes their pixels, uint8; `send` and `normalise` bring them to the device; a file's VisionTower turns pieces
of one size (pieces, 3, height, width) into features (pieces, tokens, features), and has `blocks`, the modules that
repeat. What follows is the same for all and stands in model.py: reduce, connector, arrange.
"""
from functools import cache
from importlib import import_module

import torch

from data import normalised


def vision_tower(c):
    """The encoder that a Config names, at its initial values."""
    return import_module(f"encoders.{c.encoder}").VisionTower(c)


def send(x, device):
    """A tensor of the host on the device; where that is CUDA, without a wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@cache
def table(encoder, device, dtype):
    """data.normalised on a device, sent once: (256,) where the colours are alike, else (768,), one after another."""
    values = normalised(encoder)
    alike = (values == values[0]).all()
    return send(torch.from_numpy(values[0] if alike else values.ravel()), device).to(dtype)


def normalise(pixels, dtype, c):
    """uint8 pixels (..., 3, height, width) as the encoder of a Config takes them, in the same order in memory.

    index_select of int32 takes a CPU 2 to 4 ns a byte; take, gather and advanced indexing 7 to 11.
    """
    values, index = table(c.encoder, pixels.device, dtype), pixels.int()
    if len(values) > 256:
        index += 256 * torch.arange(3, dtype=torch.int32, device=pixels.device)[:, None, None]
    return values.index_select(0, index.flatten()).view(pixels.shape)
