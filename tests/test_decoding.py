"""Decoding: one step is one graph of few kernels; and the parts of a layer by themselves, in each of their forms."""
import gc
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import decoding
from data import chatml, encode, process_image
from layers import Linear, RMSNorm, rotate
from layout import rope_table
from paper.systems import Kernels
from tests import tiny


def prompts_of(m, n=1):
    return [encode(chatml(["<image>\nWhat" + " is it" * i]), m.tokenizer, [process_image(tiny.image(60 + 30 * i, 50),
                                                                                         m.config)]) for i in range(n)]


def begin(m, prompts, sa, steps):
    """(tokens, Steps) of a generation whose prompts have run."""
    tree = m.prefill(prompts, sa, steps)
    t, cache = tree.run(sa)
    last = [len(p.ids) - 1 for p in prompts]
    tokens = m.head(m.language_model.norm(t[range(len(prompts)), last])).argmax(-1)
    return tokens, decoding.Steps(m, tree.runs, sa, cache, steps)


@pytest.mark.parametrize("sa, most", [((1, 4), 600), ((), 600), (tuple(range(24)), 560)])
@torch.no_grad()
def test_kernels_of_a_step(sa, most):
    """transformers' dense model of 24 layers has 882."""
    m = tiny.model(layers=24)
    tokens, steps = begin(m, prompts_of(m), sa, 9)
    with Kernels() as kernels:
        decoding.sample_token(steps(tokens), 0, 1.0, None)
    assert 400 < kernels.total <= most


@pytest.mark.parametrize("sa", [(), (1,), (0, 1, 2)])
@torch.no_grad()
def test_a_step_is_one_graph_wherever_it_stands(sa):
    """For torch.compile without a break, and compiled once; its tokens are the eager step's."""
    torch.compiler.reset()
    counters.clear()
    m = tiny.model(layers=3)
    prompts = prompts_of(m, 2)
    tokens, steps = begin(m, prompts, sa, 12)
    wanted = []
    for _ in range(12):
        wanted.append(tokens.tolist())
        tokens = steps(tokens).argmax(-1)
    tokens, steps = begin(m, prompts, sa, 12)
    steps.step = lambda tokens, step=torch.compile(m.decode_step, fullgraph=True, dynamic=False, backend="aot_eager"): (
        step(tokens, steps.runs, sa, steps.cache))
    for n in range(12):
        assert tokens.tolist() == wanted[n]
        tokens = steps(tokens).argmax(-1)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@torch.no_grad()
def test_a_steps_tensors_stay_where_they_are():
    """What a CUDA graph asks for: every step reads and writes the same memory."""
    m = tiny.model()
    tokens, steps = begin(m, prompts_of(m), (1, 4), 20)

    def places():
        layout = steps.runs[0][2]
        seen = [layout.number, *layout.slots, *layout.masks, layout.ropes]
        seen += [kv.kv for layer in steps.cache for kv in layer if kv.kv is not None]
        return [x.data_ptr() for x in seen]
    before = places()
    for _ in range(20):
        tokens = steps(tokens).argmax(-1)
    assert places() == before and steps.left == 0


class Recording(TorchDispatchMode):
    """A stand-in for CUDA's graph: the operations of a step, to be done again on the same memory."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func._schema.name == "aten::_unsafe_view"):
            self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("sa", [(), (1, 4), tuple(range(6))])
@torch.no_grad()
def test_a_replayed_step_goes_on_as_an_eager_one(sa, monkeypatch):
    """What a step does anew in Python each time would be frozen in a graph. In stretches, each with its own."""
    m = tiny.model()
    monkeypatch.setattr(type(m), "stop_id", -1)
    monkeypatch.setattr(decoding, "STRETCH", 9)
    monkeypatch.setattr(decoding, "EAGER", 2)
    prompts, graphs = prompts_of(m, 2), []
    wanted = m.generate(prompts, sa, max_tokens=20)

    @contextmanager
    def recording(graph, **how):
        """As CUDA's, it leaves no trace of what runs meanwhile."""
        graphs.append(graph)
        steps = next(x for x in gc.get_objects() if isinstance(x, decoding.Steps) and x.graph is graph)
        layout = steps.runs[0][2]
        changed = [layout.number, *layout.slots, *layout.masks]
        changed += [kv.kv for layer in steps.cache for kv in layer if kv.kv is not None]
        before = [x.clone() for x in changed]
        with graph:
            yield
        for x, old in zip(changed, before):
            x.copy_(old)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    real = decoding.Steps.__init__
    monkeypatch.setattr(decoding.Steps, "__init__", lambda self, *args: (real(self, *args),
                                                                         setattr(self, "replays", True))[0])
    assert m.generate(prompts, sa, max_tokens=20) == wanted
    assert len(graphs) == 2  # of stretches of 9, 9 and 1 steps


@torch.no_grad()
def test_long_answers_go_on_in_stretches(monkeypatch):
    """Each stretch lays out its own masks; the answer is that of one stretch."""
    m = tiny.model()
    monkeypatch.setattr(type(m), "stop_id", -1)
    prompts = prompts_of(m, 2)
    whole = m.generate(prompts, (1, 4), max_tokens=30)
    monkeypatch.setattr(decoding, "STRETCH", 7)
    assert m.generate(prompts, (1, 4), max_tokens=30) == whole and len(whole[0]) == 30


# --- parts, in each of their forms ---

@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 7, 48), (1, 513, 48), (2, 1100, 48)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2 ** -8)])
@pytest.mark.parametrize("grad", [True, False])
def test_rms_norm(shape, dtype, bound, grad):
    torch.manual_seed(sum(shape))
    norm = RMSNorm(48, 1e-3).to(dtype)  # an eps that matters
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(shape).mul(torch.rand(*shape[:2], 1) * 0.1).to(dtype)
    x[0, 0] = 0
    with torch.set_grad_enabled(grad):
        y = norm(x)
    d = x.double()
    wanted = d / (d.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert y.dtype == dtype and y.shape == shape
    assert ((y.double() - wanted).abs() <= bound * wanted.abs()).all()


@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_linear_with_what_goes_on_top(rows, dtype, bound, bias, grad):
    """One row and several, with and without a residual; under autocast the residual keeps its float32."""
    torch.manual_seed(0)
    linear, x, add = Linear(40, 24, bias=bias), torch.randn(*rows, 40), torch.randn(*rows, 24)
    exact = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", torch.bfloat16):
            mixed = linear(x, add)
        linear.to(dtype)
        plain, both = linear(x.to(dtype)), linear(x.to(dtype), add.to(dtype))
    assert mixed.dtype == torch.float32 and plain.dtype == both.dtype == dtype
    for y, wanted, within in ((mixed, exact + add, 0.02), (plain, exact, bound), (both, exact + add, bound)):
        assert y.shape == wanted.shape and (y.double() - wanted).abs().max() <= within * wanted.abs().max()


@pytest.mark.parametrize("grad", [True, False])
def test_rotary_positions_turn_pairs_of_features(grad):
    c, x = tiny.config(), torch.randn(2, 5, 3, 16)
    pos, kept = torch.randint(0, 4000, (2, 5)), x.clone()
    with torch.set_grad_enabled(grad):
        y = rotate(x, 2, rope_table(pos, c))
    angle = pos.double()[..., None, None] * c.rope_theta ** (-torch.arange(8).double() / 8)
    pairs = torch.view_as_complex(torch.stack([kept[..., :8], kept[..., 8:]], -1).double()) * torch.polar(
        torch.ones_like(angle), angle)
    assert (y[:, :, :2] - torch.cat([pairs.real, pairs.imag], -1)[:, :, :2]).abs().max() < 2e-3  # float32 at 4,000
    assert torch.equal(y[:, :, 2], kept[:, :, 2])
