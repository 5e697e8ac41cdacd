"""What --reduce says: texts to settings and back, counts, and what commands make of them."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
import flops
import methods
from methods import FORMS, OPTIONS, Reduction, parse, text_of
from tests import tiny

AT_THE_LIMITS = ["pack:1", "pack:1000000", "pack:2.0000001", "pack:1.1:widen", "downsample:1.5:picture", "m3:16",
                 "visionzip:0+1", "visionzip:999999+1:mean", "vispruner:1+0", "hired:0.000001", "hired:0.00005",
                 "hired:1", "pyramiddrop:1:1", "pyramiddrop:1,2,9999:0.9,0.000001,0.000001", "sparsevlm:0.000001",
                 "sparsevlm:13.5", "sparsevlm:1000000:drop"]


@pytest.mark.parametrize("text", AT_THE_LIMITS)
def test_a_text_is_its_own_name(text):
    assert text_of(parse(text)) == text


@pytest.mark.parametrize("method", FORMS)
def test_a_method_alone_has_the_papers_settings(method):
    plain = parse(method)
    assert plain.method == method and parse(text_of(plain)) == plain
    if method in OPTIONS:  # method::option has them too
        option = parse(f"{method}::{OPTIONS[method]}")
        assert option == plain._replace(option=OPTIONS[method]) == parse(text_of(option))


def test_random_settings_survive_their_text():
    """Whatever number a user gives: no exponent, no rounding."""
    rng = random.Random(0)
    for _ in range(2000):
        share, ratio = 10 ** rng.uniform(-5.9, 0), 10 ** rng.uniform(0, 5.9)
        falling = tuple(sorted((10 ** rng.uniform(-5.9, 0) for _ in range(3)), reverse=True))
        for r in (Reduction("hired", share=share), Reduction("pack", ratio), Reduction("sparsevlm", scale=share),
                  Reduction("pyramiddrop", drop=((1, 5, 12), falling))):
            assert parse(text_of(r)) == r


@pytest.mark.parametrize("text", [
    "pack:", "pack::", "pack:0.9", "pack:1e3", "pack:2:drop", "pack:2:widen:", "pack: 2", "pack:inf", "pack:-2",
    "m3:8:drawn", "m3:", "downsample:2:widen", "visionzip:", "visionzip:3", "visionzip:0+0", "visionzip:1+2+3",
    "visionzip:1.0+2", "visionzip:1000001+1", "vispruner:1+2:mean", "hired:0", "hired:1.1", "hired:nan",
    "pyramiddrop:", "pyramiddrop:hard:", "pyramiddrop:medium", "pyramiddrop:1,2:.5", "pyramiddrop:2,1:.5,.2",
    "pyramiddrop:0:.5", "pyramiddrop:1,2:.2,.5", "pyramiddrop:1:0", "pyramiddrop:1:.5:.5", "sparsevlm:",
    "sparsevlm::", "sparsevlm:0", "sparsevlm:2:keep"])
def test_what_is_refused_is_told_the_form(text):
    method = text.partition(":")[0]
    with pytest.raises(ValueError) as e:
        parse(text)
    assert str(e.value) == f"{text}: give {FORMS[method]}"


@pytest.mark.parametrize("text", ["fastv", "PACK:2", " pack:2", ":2", "none", "0", "pack,2"])
def test_no_such_method(text):
    with pytest.raises(ValueError, match=": no such method; give one of pack, downsample"):
        parse(text)


@pytest.mark.parametrize("words, reduce", [
    ([], None), (["--reduce", "none"], ""), (["--reduce", "pack:2.0"], "pack:2"), (["--pack", "2"], "pack:2"),
    (["--pack", ".5e1"], 0), (["--pack", "1"], "pack:1"), (["--reduce", "visionzip:3+1"], "visionzip:3+1"),
    (["--reduce", ""], ""), (["--reduce", "sparsevlm"], 0)])
def test_both_flags_make_one(words, reduce, capsys):
    """reduce 0: refused."""
    from cli import Parser
    p = Parser()
    methods.add_flags(p)
    args = p.parse_args(words)
    if reduce == 0:
        with pytest.raises(SystemExit):
            methods.given(p, args, "because")
        assert "because" in (err := capsys.readouterr().err) or "--pack .5e1: give a number 1 or more" in err
    else:
        methods.given(p, args, "because")
        assert args.reduce == reduce


def test_what_is_said_of_what_was_not_learned(capsys):
    for asked, learned, said in (
            ("m3:4", "", "teaches it"), ("m3:4", "m3", ""), ("pack:2", "", ""), ("", "", ""), ("pack:4", "pack:2", ""),
            ("", "m3", "--reduce none: this checkpoint has learned --reduce m3"),
            ("pack:2", "visionzip", "has learned --reduce visionzip"), ("m3", "pack:2", "teaches it")):
        methods.warn_untrained(asked, learned, "DIR")
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said) and err.count("\n") == bool(said)


# --- counts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [6, 12, 24, 28])
@pytest.mark.parametrize("text", ["", *FORMS])
def test_only_what_drops_inside_has_layers(text, layers):
    r = parse(text)
    assert bool(r.drops(layers)) == r.inside == (text in ("pyramiddrop", "sparsevlm"))


@pytest.mark.parametrize("size, ratio, smaller", [
    ((70, 110), 4, (35, 55)), ((71, 33), 4, (35, 16)), ((1, 1), 100, (1, 1)), ((90, 30), 9, (30, 10)),
    ((64, 48), 1, (64, 48))])
def test_downsampling_the_picture(size, ratio, smaller):
    """As if the picture had come in at that size, resized as Pillow does it."""
    c, plain = tiny.config(reduce=f"downsample:{ratio}:picture"), tiny.config()
    image = tiny.image(*size)
    got, wanted = data.process_image(image, c), data.process_image(image.resize(smaller, Image.BICUBIC), plain)
    assert got.tiling == wanted.tiling == data.tiling(*size, c) and np.array_equal(got.pixels, wanted.pixels)
    tiles = got.tiling.tiles
    assert flops.connector_flops(c, tiles) == flops.connector_flops(plain, tiles)


def test_the_overview_of_a_smaller_picture_is_a_whole_tile():
    c = tiny.config(reduce="downsample:4:picture")
    image = data.process_image(tiny.image(90, 120), c)
    prompt = data.encode(data.chatml(["<image>\nwhat?"]), tiny.tokenizer(), [image])
    assert len(data.overview(prompt, c).v_pos) == data.overview_tokens(c) == c.patches ** 2 + 1


@pytest.mark.parametrize("reduce", ["pyramiddrop:4,10,16:.5,.25,.125", "visionzip:104+24:mean", "sparsevlm:13.5:drop",
                                    "pyramiddrop:1,2,3,4,5,6,7,8,9:.9,.8,.7,.6,.5,.4,.3,.2,.1"])
def test_the_page_is_80_columns_wide(reduce, capsys):
    flops.main(["--reduce", reduce])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_plot_counts_what_is_dropped(tmp_path, monkeypatch):
    """Its curve is that of the page: less than without the reduction."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt
    drawn = []
    monkeypatch.setattr(plt.Axes, "plot", lambda self, x, y, **_: drawn.append((list(x), list(y))))
    monkeypatch.setattr(plt.Axes, "legend", lambda *_, **__: None)
    flops.main(["--reduce", "pyramiddrop", "--plot", str(tmp_path / "x.png"), "--json"])
    flops.main(["--sa", "dense", "--plot", str(tmp_path / "x.png"), "--json"])
    (lengths, dropped), *_, (_, dense) = drawn
    c = flops.settings(SimpleNamespace(model="llava-ov-0.5b", reduce="pyramiddrop:hard", min_pixels=None,
                                       max_pixels=None))
    at = 40
    wanted = flops.prompt_flops(c, range(24), 40, flops.expected_tokens(c, 40, [lengths[at]]))
    assert dropped[at] == wanted / 1e12 and all(a < b for a, b in zip(dropped, dense))


def test_text_alone_has_nothing_to_choose():
    for reduce in ("pyramiddrop", "sparsevlm"):
        c = tiny.config(layers=12, reduce=reduce)
        sa = range(12)
        assert flops.prompt_flops(c, sa, 9, flops.expected_tokens(c, 9, [])) == flops.llm_flops(c, sa, 9, 0)
