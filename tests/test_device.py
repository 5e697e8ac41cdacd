"""What a GPU would find wrong, found without one: tensors on other devices, waits for the device, mixed precision."""
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conversation import Conversation
from data import collate, encode, labelled, process_image, turns_to_learn
from layout import DecodeLayout
from model import VLM
from tests import tiny

CONFIGURATIONS = [(), (1,), (1, 4), tuple(range(6))]


def conversations(m, seed=0):
    """A batch of two conversations of unequal length with labels; one image, and two."""
    rng, prompts, labels = random.Random(seed), [], []
    for n in (1, 2):
        images = [process_image(tiny.image(30 + 9 * i, 40, i), m.config, n == 1) for i in range(n)]
        turns = ["<image>" * n + "what " * rng.randint(1, 5), "this", "and?", "that"]
        prompt, label = labelled(turns_to_learn(turns), tiny.tokenizer(), images)
        prompts.append(prompt)
        labels.append(label)
    batch = collate(prompts)
    return prompts, batch, np.array([row + [-1] * (batch.ids.shape[1] - len(row)) for row in labels])


def meta_model():
    """A model without any numbers in it: whatever reads one back, or makes a tensor elsewhere, fails."""
    with torch.device("meta"):
        c = tiny.config(layers=6, ca=(2, 5), sa=(1, 4), viable=((), (1,), (1, 4)), router=True)
        m = VLM(c)
    m.config.ca = (0, 2, 5)  # something to look at before the route layer
    m.language_model.cross["0"] = m.language_model.cross["2"]
    return m


@pytest.mark.parametrize("sa", CONFIGURATIONS)
def test_training_prefill_and_decoding_on_the_meta_device(sa):
    m = meta_model()
    prompts, batch, labels = conversations(m)
    loss = m.answer_loss(m(batch, sa), labels, batch.t_pos)
    loss.backward()
    opt = torch.optim.AdamW(m.parameters(), 1e-3, foreach=False)
    opt.step()
    assert loss.device.type == "meta" and m.language_model.layers[1].mlp.gate_up_proj.weight.grad is not None
    with torch.no_grad():
        tree = m.prefill(prompts, [sa], 0)
        t, cache = tree.run(sa)
        assert t.shape == (2, batch.ids.shape[1], 64)
        layout = [(0, 6, DecodeLayout(tree.past, np.array([p.end for p in prompts]), 9, m.config, m.device))]
        for _ in range(2):
            logits = m.decode_step(torch.zeros(2, dtype=torch.long, device="meta"), layout, sa, cache)
        assert logits.shape == (2, 259) and logits.device.type == "meta"
        tree.extend([encode("why?", tiny.tokenizer(), start=p.end) for p in prompts])
        assert tree.run(sa)[0].shape[1] == 4


def test_routing_on_the_meta_device():
    m = meta_model()
    prompts, batch, _ = conversations(m)
    with torch.no_grad():
        tree = m.prefill(prompts, "auto", 0)
        assert m.route_scores(tree, batch.answer_starts).shape == (2, 2, 3)
        assert tree.select([1]).run((1,))[0].shape == (1, batch.ids.shape[1], 64)


class Reads(TorchDispatchMode):
    """Counts the operations whose result the host has to wait for."""
    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.WAITS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def watch(monkeypatch):
    """Counts every way in which Python reads a tensor. tolist and numpy do not go through the dispatcher."""
    reads = Counter()
    for name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        def counted(self, *args, name=name, real=getattr(torch.Tensor, name), **kw):
            reads[name] += 1
            return real(self, *args, **kw)
        monkeypatch.setattr(torch.Tensor, name, counted)
    return reads


@pytest.mark.parametrize("sa", CONFIGURATIONS)
def test_a_decode_step_reads_nothing_back_but_the_token(sa, monkeypatch):
    m = tiny.model()
    monkeypatch.setattr(VLM, "stop_id", -1)
    prompts, *_ = conversations(m)
    read, dispatched = [], []
    for steps in (1, 9):  # what 8 more tokens read
        with monkeypatch.context() as patch, Reads() as mode:
            reads = watch(patch)
            m.generate(prompts, sa, max_tokens=steps)
        read.append(reads)
        dispatched.append(mode.found)
    assert read[1] - read[0] == Counter({"tolist": 8}) and not read[0] - read[1]
    assert dispatched[0] == dispatched[1]
    alone = Counter(tolist=1)  # prefill: the first token, nothing else
    assert read[0] == alone and not dispatched[0]


@pytest.mark.parametrize("reduce", ["pack:2", "downsample", "m3:2", "visionzip:4+3", "visionzip:4+3:mean",
                                    "vispruner:5+2"])
def test_a_reduction_reads_nothing_back(reduce, monkeypatch):
    m = tiny.model().add_reduction(reduce)
    _, batch, labels = conversations(m)
    with monkeypatch.context() as patch, Reads() as mode:
        reads = watch(patch)
        m.answer_loss(m(batch, (1, 4)), labels, batch.t_pos).backward()
    assert not reads and not mode.found


@pytest.mark.parametrize("sa", CONFIGURATIONS)
def test_a_training_step_reads_nothing_back(sa, monkeypatch):
    m = tiny.model()
    _, batch, labels = conversations(m)
    with monkeypatch.context() as patch, Reads() as mode:
        reads = watch(patch)
        m.answer_loss(m(batch, sa), labels, batch.t_pos).backward()
    assert not reads and not mode.found


@pytest.mark.parametrize("sa", CONFIGURATIONS)
def test_autocast_with_caches(sa):
    """Keys are kept in the dtype that the products have; a question after the images is as in one prompt."""
    m = tiny.model()
    image = process_image(tiny.image(60, 40), m.config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prefix = encode("a <image>", m.tokenizer, [image])
        question = encode("what is this?", m.tokenizer, start=prefix.end)
        tree = Conversation(m, prefix, sa)
        cache = tree.tree("all")
        cache.extend([question])
        h = m.language_model.norm(cache.run(sa)[0])
        whole = m(collate([encode("a <image>what is this?", m.tokenizer, [image])]), sa)
        assert tree.answer(encode("so?", m.tokenizer, start=tree.end), max_tokens=4)
    kept = [cache.kv.dtype for layer in cache.root.cache for cache in layer if cache.kv is not None]
    assert set(kept) == {torch.bfloat16}
    exact = m(collate([encode("a <image>what is this?", m.tokenizer, [image])]), sa)[:, len(prefix.ids):]
    noise = (whole[:, len(prefix.ids):] - exact).abs().max()
    assert (h - exact).abs().max() < 2 * noise + 1e-3
