"""Compiled blocks: the same numbers, and no storm of recompilations."""
import random

import torch
from torch._dynamo.utils import counters

import data
from tests import tiny


def test_few_graphs_serve_all_sizes_and_configurations_with_the_same_numbers():
    """20 prompts of one or two images of random sizes, in turn in all configurations; prefill, decoding, training."""
    torch.compiler.reset()
    counters.clear()
    plain, fast, rng = tiny.model(layers=9), tiny.model(layers=9), random.Random(8)
    fast.compile(backend="aot_eager")
    configurations = [(), *plain.config.viable, tuple(range(9))]
    for i in range(20):
        images = [tiny.image(rng.randint(20, 200), rng.randint(20, 200), k) for k in range(1 + i % 2)]
        processed = [data.process_image(x, plain.config, len(images) == 1) for x in images]
        text = data.chatml([data.place_images("What is it? " * rng.randint(1, 9), len(images))])
        prompts, sa = [data.encode(text, plain.tokenizer, processed)] * (1 + i % 3 // 2), configurations[i % 5]
        assert plain.generate(prompts, sa, max_tokens=3) == fast.generate(prompts, sa, max_tokens=3)
        batch = data.collate(prompts)
        for m in (plain, fast) if i % 4 == 3 else ():
            m.zero_grad()
            m(batch, sa).square().sum().backward()
        a, b = plain(batch, sa), fast(batch, sa)
        assert torch.allclose(a, b, atol=1e-4)
    for (name, p), q in zip(plain.named_parameters(), fast.parameters()):
        if p.grad is not None:
            assert torch.allclose(p.grad, q.grad, atol=1e-3 * p.grad.abs().max() + 1e-6), name
    assert 0 < counters["stats"]["unique_graphs"] < 10 and not counters["graph_break"]


@torch.no_grad()
def test_compiling_changes_nothing_in_bfloat16():
    plain, fast = (tiny.model(layers=9).to(torch.bfloat16) for _ in range(2))
    fast.compile(backend="aot_eager")
    processed = [data.process_image(tiny.image(90, 60), plain.config)]
    batch = data.collate([data.encode(data.chatml(["<image>\nWhat?"]), plain.tokenizer, processed)])
    for sa in ((1, 4), tuple(range(9))):
        a, b = (m.head(m(batch, sa)).float() for m in (plain, fast))
        assert torch.allclose(a, b, atol=2e-2 * float(a.abs().max()), rtol=0)
