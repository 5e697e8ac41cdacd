"""What feeds the model: pixels are bytes until they are on the device, and nothing is read, sent or decoded twice."""
from multiprocessing.connection import Connection
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import encoders
from config import Config
from data import NORMALISED, process_image
from encoders import normalise, send
from llava.batches import ConversationBatches
from llava.samples import Samples
from reduction import reduce
from tests import tiny
from tests.test_llava import talk, written


def floats(pixels):
    """As the pixels were made before: float32, on the host."""
    return ((pixels.astype(np.float64) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


# --- pixels -----------------------------------------------------------------------------------------------------------

def test_pixels_stay_bytes_through_the_pipe(tmp_path, monkeypatch):
    """From a worker process a picture of 17 tiles is 7.5 MB; as float32 it was 30."""
    tiny.image(1536, 1536).save(tmp_path / "x.png", compress_level=1)
    path = written(tmp_path / "a.json", [talk("<image>\nQ", "yes", image="x.png")])
    samples = Samples(path, None, tiny.tokenizer(), Config())
    settings = {"batch_size": 1, "micro_batch_size": 1, "seed": 0, "workers": 1, "overfit": True, "fsdp": False,
                "steps": 1}
    alone = SimpleNamespace(rank=0, size=1, wrap=lambda model, fsdp: (None, None))
    sizes, real = [], Connection.recv_bytes

    def counted(self, *args):
        content = real(self, *args)
        sizes.append(len(content))
        return content
    monkeypatch.setattr(Connection, "recv_bytes", counted)
    (_, sample), = next(ConversationBatches(None, 2, samples, settings, tmp_path, alone).batches(0))
    pixels = sample.prompt.images[0].pixels
    assert pixels.dtype == np.uint8 and pixels.shape == (17, 3, 384, 384) and pixels.flags.c_contiguous
    assert 0 < max(sizes) - pixels.nbytes < 100_000 and pixels.nbytes == 7_520_256


def test_normalised_bytes_are_the_floats_of_before():
    every = np.arange(256, dtype=np.uint8).reshape(1, 4, 8, 8)
    assert np.array_equal(NORMALISED, floats(every).ravel())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = normalise(torch.from_numpy(every), dtype)
        assert found.is_contiguous() and torch.equal(found, torch.from_numpy(floats(every)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encoding_is_that_of_the_float_path_bit_for_bit(dtype):
    m = tiny.model(visor=False).to(dtype).requires_grad_(False)
    images = [process_image(tiny.image(w, h, w), m.config) for w, h in ((200, 90), (30, 40), (300, 300))]
    for x, found in zip(images, m.encode(images), strict=True):
        features = torch.from_numpy(floats(x.pixels)).to(dtype)
        plain = m.arrange(m.multi_modal_projector(reduce(m.vision_tower(features), m.config)), x.tiling)
        assert torch.equal(plain, m.encode([x])[0])
        if dtype == torch.float32:  # in one batch with others, to rounding
            assert torch.allclose(plain, found, atol=1e-4)


def test_the_table_is_sent_once_and_serves_inference_and_training(monkeypatch):
    m, sent = tiny.model(), []
    encoders.table.cache_clear()
    monkeypatch.setattr(encoders, "send", lambda x, device: sent.append(x.shape) or x.to(device))
    image = process_image(tiny.image(50, 40), m.config)
    with torch.inference_mode():
        m.encode([image])
    m.encode([image])[0].sum().backward()
    assert sent == [(256,)] and m.vision_tower.embeddings["patch_embedding"].weight.grad.any()
    encoders.table.cache_clear()


def test_cuda_is_not_waited_for():
    """The copy starts from pinned memory, which is what makes non_blocking true."""
    did = []
    x = SimpleNamespace(pin_memory=lambda: did.append("pin") or x, to=lambda device, **how: did.append((device, how)))
    send(x, torch.device("cuda"))
    assert did == ["pin", (torch.device("cuda"), {"non_blocking": True})]
