"""Counted operations, bytes and parameters are those of the real modules; the command line says so in good form."""
import json
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import decoding
import flops
from cache_tree import CacheTree
from cli import run
from config import Config, preset
from data import chatml, collate, encode, process_image
from encoders import normalise
from layout import make_layout, round_up
from model import VLM
from paper import numbers
from reduction import reduce_tiles
from tests import tiny

VIABLE = [(), (1,), (1, 4), (1, 4, 7), (1, 4, 7, 10)]
OTHERS = [(5,), (11,), (2, 5), (0, 3, 11), tuple(range(12))]


def counted(f, *args):
    """What torch counts. Only the plain attention is counted by torch, and always as its full rectangle."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        f(*args)
    return counter.get_total_flops()


def halves(c, sa, text, vision):
    """What torch counts too much: the other half of causal squares, in layers where no mask is needed."""
    cross = [l for l in c.ca if l not in sa]
    last = max([*sa, *cross], default=-1)
    n = [text + vision if l in sa and (l < last or not vision) else text for l in range(c.layers)
         if not (l in sa and l == last and vision)]
    return sum(4 * c.heads * c.head_dim * (k * k - k * (k + 1) // 2) for k in n)


@pytest.fixture(scope="module")
def m():
    return tiny.model(layers=12)


def prompt_of(m, sizes=((70, 110),), text="what is it?"):
    processed = [process_image(tiny.image(*s), m.config, len(sizes) == 1) for s in sizes]
    return encode(chatml([" ".join(["<image>"] * len(sizes)) + text]), m.tokenizer, processed)


def prefill(m, prompts, sa, tree=None):
    """The language model over the prompts and one row of logits each; with a tree, after what it holds."""
    batch = collate(prompts)
    t, v = m.embed(batch)
    if tree is None:
        layout, cache = m.layout(batch), None
    else:
        layout, (_, cache) = make_layout(*batch.positions, tree.past, m.config, m.device), tree.run(sa)
    lm = m.language_model
    return lambda: m.head(lm.norm(lm.run(t, v, layout, sa, cache=cache)[0])[:, -1])


@pytest.mark.parametrize("sa", VIABLE + OTHERS, ids=str)
@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("sizes", [(), ((70, 110),), ((30, 30), (50, 20))], ids=["no image", "one", "two"])
def test_prefill(sa, pack, sizes):
    m = tiny.model(layers=12).add_reduction(f"pack:{pack}")
    p = prompt_of(m, sizes)
    text, vision = len(p.ids), len(p.v_pos)
    torch_says = counted(prefill(m, [p], sa)) - halves(m.config, sa, text, vision)
    assert flops.llm_flops(m.config, sa, text, vision) == pytest.approx(torch_says, rel=0.005)


@pytest.mark.parametrize("sa", VIABLE + OTHERS, ids=str)
def test_decode_and_second_question(m, sa):
    p, q = prompt_of(m), encode("<|im_start|>user\nmore?", m.tokenizer)
    text, vision = len(p.ids), len(p.v_pos)
    for ids in ([5], q.ids):
        tree = m.prefill([p], sa)
        more = encode("x" * len(ids), m.tokenizer, start=tree.end)
        says = flops.llm_flops(m.config, sa, len(ids), 0, text, vision)
        assert says == pytest.approx(counted(prefill(m, [more], sa, tree)), rel=0.005)


@pytest.mark.parametrize("sa", VIABLE, ids=str)
def test_batch_costs_its_prompts(m, sa):
    p = prompt_of(m)
    one = flops.llm_flops(m.config, sa, len(p.ids), len(p.v_pos)) + halves(m.config, sa, len(p.ids), len(p.v_pos))
    assert 3 * one == pytest.approx(counted(prefill(m, [p, p, p], sa)), rel=0.005)


def test_papers_convention_is_the_full_square_and_no_dead_layers(m):
    """Dense by torch, with the last layer's vision put back, is the paper's count."""
    c, p, sa = m.config, prompt_of(m), tuple(range(12))
    text, vision = len(p.ids), len(p.v_pos)
    dead = vision * (4 * 64 * 64 + 6 * 64 * 96) + 4 * vision * (text + vision) * 64
    says = flops.llm_flops(c, sa, text, vision, paper=True)
    assert says == pytest.approx(counted(prefill(m, [p], sa)) + dead, rel=0.005)


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("pack", [1, 2])
def test_encoder_and_connector(pack, widen):
    m = tiny.model().add_reduction(f"pack:{pack}" + ":widen" * widen)
    p = process_image(tiny.image(70, 110), m.config)
    x = normalise(torch.from_numpy(p.pixels), torch.float32, m.config)
    assert flops.tower_flops(m.config, len(x)) == pytest.approx(counted(m.vision_tower, x), rel=0.005)
    y, *_ = reduce_tiles(m.vision_tower(x).detach(), (m.config.patches,) * 2, [], m.config)
    assert flops.connector_flops(m.config, len(x)) == pytest.approx(counted(m.multi_modal_projector, y), rel=0.005)


def nbytes(tree):
    """What the buffers of a tree of one node take."""
    assert not tree.root.children
    buffers = [cache.kv for layer in tree.root.cache for cache in layer]
    return sum(x.nbytes for x in buffers if x is not None)


@pytest.mark.parametrize("sa", VIABLE + OTHERS, ids=str)
def test_bytes_are_those_allocated(m, sa):
    p = prompt_of(m)
    text, vision = len(p.ids), len(p.v_pos)
    for tree, capacity in ((CacheTree(m, [sa], 1, (text + 9, vision)), text + 9),
                           (m.new_tree(sa, [p], 9), round_up(text + 9))):
        tree.extend([p])
        decoding.generate(m, tree, [p], sa, max_tokens=1)
        assert flops.cache_bytes(m.config, sa, capacity, vision, itemsize=4) == nbytes(tree)
    largest = []
    hooks = [x.register_forward_hook(lambda _, __, y: largest.append(y.nbytes)) for x in m.language_model.modules()
             if isinstance(x, torch.nn.Linear)]
    with torch.no_grad():
        m(collate([p]), sa)
    for h in hooks:
        h.remove()
    assert flops.activation_bytes(m.config, sa, text, vision, 4) == max(*largest, vision * 64 * 4)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters(tied):
    m = tiny.model(layers=12, tied=tied)
    n = sum(p.numel() for k, p in m.named_parameters() if k.startswith(("language_model", "lm_head")))
    cross = sum(p.numel() for p in m.language_model.cross.parameters())
    assert flops.cross_parameters(m.config) == cross and flops.llm_parameters(m.config) == n - cross
    published = {"llava-ov-0.5b": (494_032_768, 151936), "llava-ov-1.5b": (1_543_714_304, 151936),
                 "llava-ov-7b": (7_615_616_512, 152064)}
    for size, (parameters, rows) in published.items():  # which count the vocabulary's padding
        assert flops.llm_parameters(Config(**{**vars(preset(size)), "vocab": rows})) == parameters


# --- the paper's numbers --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("row", numbers.rows(), ids=lambda r: r[0])
def test_papers_numbers_lie_where_ours_do(row):
    """Within 8 % of one of ours, or between two of them."""
    ours = [float(x) for x in re.findall(r"([\d.]+)(?:x|%)", row[2])]
    paper = float(re.search(r"[\d.]+", row[1])[0])
    if row[1].startswith("over"):
        assert paper <= min(ours) < 1.2 * paper
    elif row[1].startswith("under"):
        assert max(ours) < paper
    else:
        assert min(ours) * 0.92 <= paper <= max(ours) * 1.08


# --- the command ----------------------------------------------------------------------------------------------------

def call(capsys, *words):
    try:
        run(lambda: flops.main([str(w) for w in words]))
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_page_fits_a_terminal(capsys):
    for model in ("llava-ov-0.5b", "llava-ov-1.5b", "llava-ov-7b", "nano"):
        for words in ((), ("--pack", 2, "--batch", 4), ("--tiles", 5, "--sa", "none", "--sa", "1,4")):
            status, out, err = call(capsys, "--model", model, *words)
            assert status == 0 and not err and max(map(len, out.splitlines())) <= 80


def test_json_has_the_numbers(capsys, tmp_path):
    tiny.model(layers=12).add_reduction("pack:2").save_pretrained(tmp_path / "c")
    _, out, _ = call(capsys, "--model", tmp_path / "c", "--image", "70x110", "--text", 33, "--answer", 5, "--json")
    r = json.loads(out)
    m = VLM.from_pretrained(tmp_path / "c")
    p = process_image(tiny.image(70, 110), m.config)
    assert (r["visual_tokens"], r["tiles"]) == (p.tiling.tokens, p.tiling.tiles) and r["dense_visual_tokens"] > 159
    assert [row["sa"] for row in r["rows"]] == ["dense", "1,4,7,10", "1,4,7", "1,4,10", "1,4", "1,7", "1", "none"]
    for row in r["rows"]:
        sa = m.config.configuration(row["sa"])
        assert row["prefill"] == flops.llm_flops(m.config, sa, 33, p.tiling.tokens)
        steps = [flops.llm_flops(m.config, sa, 1, 0, 33 + i, p.tiling.tokens) for i in range(4)]
        assert row["answer"] == sum(steps) and row["token"] == steps[0]
        assert row["total"] == row["encoder"] + row["connector"] + row["prefill"] + row["answer"]
    assert r["rows"][0]["saving_paper"] > 1.3  # packed dense against unpacked dense


def test_several_images(capsys):
    _, out, _ = call(capsys, "--image", "640x480", "--image", "100x900", "--json")
    assert json.loads(out)["visual_tokens"] == 2 * 730


def test_plot(capsys, tmp_path):
    assert call(capsys, "--plot", tmp_path / "p.png")[0] == 0 and (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize("words, message", [
    (("--pack", 0.5), "--pack 0.5"), (("--model", "llava-ov-3b"), "--model llava-ov-3b: no such preset"),
    (("--tiles", 0), "--tiles 0"), (("--sa", "1,24"), "--sa 1,24: there is no layer 24"), (("--sa", "auto"), "--sa"),
    (("--image", "640"), "--image 640: give a size"), (("--image", "0x9"), "--image 0x9"), (("--text", 0), "--text 0"),
    (("--batch", 0), "--batch 0"), (("--answer", 0), "--answer 0"), (("--tiles", 2, "--image", "9x9"), "--tiles and"),
    (("--pack", "nan"), "--pack nan")], ids=str)
def test_bad_input(capsys, words, message):
    status, out, err = call(capsys, *words)
    assert status == 2 and out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
