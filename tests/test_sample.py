"""The command line: answers, JSON, and one line for every mistake."""
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import explain
import sample
from config import Plan
from conversation import Conversation
from costs import summary
from data import chatml, encode, place_images, process_image, split_shared
from decoding import sample_token
from flops import connector_flops, llm_flops, router_flops, tower_flops
from model import VLM
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with two checkpoints and some images."""
    d = tmp_path_factory.mktemp("sample")
    tiny.model().save_pretrained(d / "model")
    tiny.model(visor=False).save_pretrained(d / "dense")
    tiny.image(60, 40).save(d / "a.png")
    tiny.image(30, 50, 1).save(d / "b.jpg")
    return d


def call(capsys, *words):
    """(exit status, stdout, stderr) of sample.py with these words, in this process."""
    try:
        sample.run(lambda: sample.main([str(w) for w in words]))
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_answers_one_a_line(place, capsys):
    status, out, err = call(capsys, "--model", place / "model", "--image", place / "a.png", "--q", "one", "--q", "two",
                            "--max-tokens", 5)
    assert status == 0 and len(out.split("\n")) == 3
    assert "encoder" in err and "prefill" in err and "decode" in err


def test_json_is_complete_and_true(place, capsys):
    words = ["--model", place / "model", "--image", place / "a.png", "--image", place / "b.jpg", "--sa", "1,4",
             "--max-tokens", 6, "--json", "--q", "What?", "--q", "And <image> beside <image>?"]
    status, out, err = call(capsys, *words)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(rows) == 2
    model = VLM.from_pretrained(place / "model")
    processed = [process_image(Image.open(place / name), model.config, single_image=False)
                 for name in ("a.png", "b.jpg")]
    for row, question in zip(rows, ("What?", "And <image> beside <image>?")):
        assert set(row) == {"question", "answer", "tokens", "sa", "pixels", "reduce", "routed", "text_tokens",
                            "vision_tokens", "flops", "seconds"}
        prompt = encode(chatml([place_images(question, 2)]), model.tokenizer, processed)
        assert row["tokens"] == model.generate([prompt], (1, 4), max_tokens=6)[0] and len(row["tokens"]) == 6
        assert row["answer"] == model.tokenizer.decode(row["tokens"]).strip()
        assert (row["sa"], row["routed"], row["text_tokens"]) == ([1, 4], False, len(prompt.ids))
        assert row["vision_tokens"] == 2 * (16 + 1)
        assert set(row["flops"]) == {"encoder", "llm", "llm_dense", "saving", "first_token_saving"}
        assert row["flops"]["saving"] > 1
        steps = sum(llm_flops(model.config, (1, 4), 1, 0, len(prompt.ids) + i, 34) for i in range(5))
        shared = encode(split_shared(chatml([place_images(question, 2)]))[0], model.tokenizer, processed)
        own = len(prompt.ids) - len(shared.ids)
        assert row["flops"]["llm"] == steps + llm_flops(model.config, (1, 4), own, 0, len(shared.ids), 34) + \
            llm_flops(model.config, (1, 4), len(shared.ids), 34, head=False)
        assert set(row["seconds"]) == {"encoder", "prefill", "decode"} and row["seconds"]["encoder"] > 0
    again = [json.loads(line)["tokens"] for line in call(capsys, *words)[1].splitlines()]
    assert again == [row["tokens"] for row in rows] and len(set(again[0])) > 1  # two runs are equal


def test_second_question_does_not_pay_for_the_image(place, capsys):
    _, out, _ = call(capsys, "--model", place / "model", "--image", place / "a.png", "--q", "a", "--q", "b", "--json")
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["flops"]["encoder"] > 0 and second["flops"]["encoder"] == 0 and second["seconds"]["encoder"] == 0
    assert second["flops"]["llm"] < first["flops"]["llm"]


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("sa", ["none", "1,4", "dense"])
def test_what_is_saved_is_over_all_questions_so_far(place, capsys, sa, pack):
    """Against dense, asked the same: of both the images once; worked out prompt by prompt, from whole prompts."""
    words = ["--model", place / "model", "--image", place / "a.png", "--sa", sa, "--json", "--max-tokens", 3, "--pack",
             pack, "--q", "a", "--q", "bcdefg", "--q", "h"]
    rows = [json.loads(line) for line in call(capsys, *words)[1].splitlines()]
    plain = tiny.model().config
    packed = replace(plain, reduce=f"pack:{pack}")
    sa, tiles = plain.configuration(sa), process_image(Image.open(place / "a.png"), plain).tiling.tiles
    system = len(encode(split_shared(chatml(["<image>\na"]))[0].replace("<image>", ""), tiny.tokenizer()).ids)

    def cost(c, sa, vision, row, first):
        """(to the first token, of the language model): that of the whole prompt, less what was there before."""
        n = row["text_tokens"]
        prefill = llm_flops(c, sa, system, vision, head=False) * first + llm_flops(c, sa, n - system, 0, system, vision)
        rest = sum(llm_flops(c, sa, 1, 0, n + i, vision) for i in range(len(row["tokens"]) - 1))
        return prefill + (tower_flops(c, tiles) + connector_flops(c, tiles)) * first, prefill + rest
    dense_vision = process_image(Image.open(place / "a.png"), plain).tiling.tokens
    spent = [cost(packed, sa, row["vision_tokens"], row, i == 0) for i, row in enumerate(rows)]
    dense = [cost(plain, range(6), dense_vision, row, i == 0) for i, row in enumerate(rows)]
    for i, row in enumerate(rows):
        assert (row["flops"]["llm"], row["flops"]["llm_dense"]) == (spent[i][1], dense[i][1])
        for k, name in enumerate(("first_token_saving", "saving")):
            want = sum(x[k] for x in dense[:i + 1]) / sum(x[k] for x in spent[:i + 1])
            assert row["flops"][name] == round(want, 3)
    assert (rows[0]["flops"]["saving"] == 1) == (len(sa) == 6 and pack == 1)


def test_no_image_and_dense_default(place, capsys):
    status, out, err = call(capsys, "--model", place / "dense", "--q", "hi", "--json", "--max-tokens", 3)
    row = json.loads(out)
    assert status == 0 and row["vision_tokens"] == 0 and row["sa"] == list(range(6))
    assert row["flops"]["saving"] == row["flops"]["first_token_saving"] == 1
    assert "no --image: the model answers from the text alone" in err and "as much as dense" in err.replace("\n", " ")
    assert "no --image" not in call(capsys, "--model", place / "dense", "--image", place / "a.png", "--q", "hi")[2]


def test_auto_without_a_router_runs_the_full_configuration_and_says_so(place, capsys):
    _, out, err = call(capsys, "--model", place / "model", "--q", "hi", "--json", "--max-tokens", 1)
    assert json.loads(out)["sa"] == [1, 4] and "no router" in err and "--stage 3" in err


def test_an_image_that_is_encoded_again_counts_again(place, capsys):
    """A question with the image elsewhere shares nothing with the others; one that has it before it shares all."""
    words = ["--model", place / "model", "--image", place / "a.png", "--sa", "1,4", "--max-tokens", 2, "--json"]
    rows = call(capsys, *words, "--q", "What?", "--q", "And <image> is?", "--q", "Why?")[1].splitlines()
    first, elsewhere, third = (json.loads(row)["flops"]["encoder"] for row in rows)
    assert first == elsewhere > 0 == third


def test_auto_asks_the_router_for_each_question(place, capsys):
    """Each question its own route, as the model says; an image runs again only where routes differ; a budget."""
    model = tiny.model(layers=12, visor=False)
    model.add_cross_attention(viable=[(1,), (1, 4), (1, 4, 7)], overview=()).add_router()
    for p in model.router.parameters():
        torch.nn.init.normal_(p)
    model.save_pretrained(place / "routed")
    questions = [f"{'abc' * i} what {'x' * (7 * i % 5)}?" for i in range(8)]
    words = ["--model", place / "routed", "--image", place / "a.png", "--json", "--max-tokens", 3]
    words += [w for q in questions for w in ("--q", q)]
    status, out, err = call(capsys, *words)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and "routed to" in err and all(row["routed"] for row in rows)
    image, ran = process_image(Image.open(place / "a.png"), model.config), []
    for row, question in zip(rows, questions):
        prompt, routes = encode(chatml([place_images(question, 1)]), model.tokenizer, [image]), []
        assert row["tokens"] == model.generate([prompt], "auto", max_tokens=3, routes=routes)[0]
        sa, text, vision = tuple(row["sa"]), row["text_tokens"], row["vision_tokens"]
        assert sa == routes[0].sa
        shared = len(encode(split_shared(chatml([place_images(question, 1)]))[0], model.tokenizer, [image]).ids)
        start = max([min(set(sa) ^ set(other), default=12) for other in ran], default=0)
        steps = sum(llm_flops(model.config, sa, 1, 0, text + i, vision) for i in range(len(row["tokens"]) - 1))
        assert row["flops"]["llm"] == steps + router_flops(model.config, text, vision) + llm_flops(
            model.config, sa, shared, vision, head=False, layers=range(start, 12)) + llm_flops(
            model.config, sa, text - shared, 0, shared, vision)
        ran.append(sa)
        so_far = [x["flops"] for x in rows[:len(ran)]]
        assert row["flops"]["saving"] == round(sum(x["llm_dense"] for x in so_far) / sum(x["llm"] for x in so_far), 3)
    assert len(set(ran)) >= 2 and min(row["flops"]["saving"] for row in rows) > 1
    assert any(row["flops"]["llm"] > row["flops"]["llm_dense"] for row in rows)  # on a route of its own
    assert f"dense over the {len(rows)} so far" in err.replace("\n", " ") and "more than dense" not in err
    first = rows[ran.index(max(ran, key=len))]
    share = llm_flops(model.config, (1,), first["text_tokens"], vision) / llm_flops(
        model.config, range(12), first["text_tokens"], vision)
    capped = [json.loads(line) for line in call(capsys, *words, "--budget", share + 0.01)[1].splitlines()]
    assert {tuple(row["sa"]) for row in capped} == {(1,)} and all(row["routed"] for row in capped)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_stays_close(place, capsys, dtype):
    words = ["--model", place / "model", "--image", place / "a.png", "--q", "hi", "--json", "--max-tokens", 1]
    full = json.loads(call(capsys, *words)[1])
    low = json.loads(call(capsys, *words, "--dtype", dtype)[1])
    assert {**low, "seconds": 0} == {**full, "seconds": 0}


def test_random_weights_are_announced(place, capsys):
    assert "RANDOM" in call(capsys, "--model", place / "model", "--q", "hi")[2]


def test_budget_takes_the_costliest_that_fits(place, capsys):
    words = ["--model", place / "model", "--image", place / "a.png", "--q", "hi", "--json", "--max-tokens", 1]
    assert json.loads(call(capsys, *words, "--budget", 1)[1])["sa"] == [1, 4]
    costs = {sa: json.loads(call(capsys, *words, "--sa", sa)[1])["flops"] for sa in ("none", "1", "1,4")}
    one = costs["1"]["llm"] / costs["1"]["llm_dense"]
    assert json.loads(call(capsys, *words, "--budget", one + 0.01)[1])["sa"] == [1]


def test_packing_by_one_flag(place, capsys):
    """Fewer visual tokens; the saving is measured against dense without packing."""
    words = ["--model", place / "model", "--image", place / "a.png", "--q", "hi", "--json", "--sa", 1]
    plain, packed = (json.loads(call(capsys, *words, *more)[1]) for more in ([], ["--pack", 2]))
    assert packed["vision_tokens"] < plain["vision_tokens"]
    plain, packed = plain["flops"], packed["flops"]
    assert packed["llm_dense"] == plain["llm_dense"] and packed["llm"] < plain["llm"]


def test_sampling_flags_reach_the_model(place, capsys):
    words = ["--model", place / "dense", "--q", "hi", "--json", "--max-tokens", 8]
    tokens = lambda *more: json.loads(call(capsys, *words, *more)[1])["tokens"]
    greedy, hot = tokens(), tokens("--temperature", 5)
    assert hot != greedy and hot == tokens("--temperature", 5) and hot != tokens("--temperature", 5, "--seed", 1)
    assert tokens("--temperature", 5, "--top-p", 0.001) == greedy == tokens("--temperature", 1e-40)


def test_answers_with_line_breaks_stay_on_one_line(place, capsys, monkeypatch):
    def answer(self, *_, routes, layer_tokens, **__):
        routes[:], layer_tokens[:] = [Plan((1, 4))], [None]
        return self.model.tokenizer.encode("a\nb\rc").ids
    monkeypatch.setattr(Conversation, "answer", answer)
    assert call(capsys, "--model", place / "model", "--q", "hi")[1] == "a b c\n"


def test_untrained_configurations_are_announced(place, capsys):
    assert "no configuration that this checkpoint is trained for" in call(
        capsys, "--model", place / "dense", "--q", "hi", "--sa", "none")[2]


@pytest.mark.parametrize("stage, visor, viable, warned", [
    ("2", True, None, True), ("3", True, None, True), ("1", True, None, False), ("pretrained", False, None, False),
    ("2", False, None, False), ("2", True, [(1, 4), tuple(range(6))], False)], ids=str)
def test_dense_is_a_configuration_as_any_other_once_all_is_trained(tmp_path, capsys, stage, visor, viable, warned):
    m = tiny.model(visor=False)
    if visor:
        m.add_cross_attention(sa=tuple(range(6)) if viable else None, ca=(2, 5), viable=viable)
    m.config.stage = stage
    m.save_pretrained(tmp_path / "m")
    err = call(capsys, "--model", tmp_path / "m", "--q", "hi", "--sa", "dense", "--max-tokens", 1)[2]
    assert ("--sa dense is no configuration that this checkpoint is trained for" in err) == warned


def test_the_miniature_says_what_it_cannot_see(place, capsys):
    quilt, q = ROOT / "assets/copy.png", ["--q", "what is at red:b2", "--max-tokens", 1]
    assert "; --model nano/dense is" in call(capsys, "--image", quilt, "--sa", "dense", *q)[2]
    one, two = (call(capsys, "--image", *[quilt] * n, *q)[2] for n in (1, 2))
    assert "each is one tile" in two and "each is one tile" not in one and "only quilts" not in one + two


def test_images_in_one_flag_or_several():
    files = lambda *words: sample.parse([*words, "--q", "hi"]).image
    assert files("--image", "a", "b", "--image", "c") == files("--image", "a", "--image", "b", "c") == ["a", "b", "c"]
    assert files() == []  # nothing is left of the calls before


def test_transparency_as_the_checkpoint_has_it(tmp_path, capsys, monkeypatch):
    """What the model reads and what --explain draws are the same picture."""
    image = Image.merge("RGBA", [tiny.image(60, 40, i).getchannel(0) for i in range(4)])
    image.save(tmp_path / "a.png")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    white.save(tmp_path / "white.png"), image.convert("RGB").save(tmp_path / "drop.png")
    answers, drawn, seen = {}, {}, []
    monkeypatch.setattr(explain, "draw", lambda path, images, processed, config, report, *_: seen.append(
        (report["tokens"], *images)))
    for how in ("white", "drop"):
        m = tiny.model(transparency=how)
        m.save_pretrained(tmp_path / how)
        for name in ("a.png", "white.png", "drop.png"):
            call(capsys, "--model", tmp_path / how, "--image", tmp_path / name, "--q", "hi", "--max-tokens", 8,
                 "--explain", "e.png")
            answers[how, name], drawn[how, name] = seen.pop()
        assert answers[how, "a.png"] == answers[how, f"{how}.png"] and drawn[how, "a.png"] == drawn[how, f"{how}.png"]
    assert answers["white", "a.png"] != answers["drop", "a.png"]
    assert drawn["white", "a.png"] == white and drawn["drop", "a.png"] == image.convert("RGB")


@pytest.mark.parametrize("n, rate", [(0, None), (1, None), (2, "0.5 tokens/s"), (11, "5.0 tokens/s")])
def test_the_first_token_is_prefills(n, rate):
    report = {"seconds": {"encoder": 0, "prefill": 1, "decode": 2.0}, "tokens": [1] * n, "sa": [1], "pixels": "all",
              "routed": True, "text_tokens": 5, "vision_tokens": 1, "flops": {"llm": 1e9, "saving": 2.0}}
    text = summary(tiny.config(), report, 1)
    assert "tokens/s" not in text if rate is None else rate in text
    assert max(map(len, text.splitlines())) <= 80 and "1 visual token;" in text and "2x less than\ndense;" in text
    assert "0.5" not in text or n == 2
    report["flops"]["saving"] = 0.5
    assert "2x more than dense over the 3 so far" in summary(tiny.config(), report, 3).replace("\n", " ")


def test_budget_message_names_a_budget_that_works(place, capsys):
    words = ["--model", place / "model", "--image", place / "a.png", "--max-tokens", 1]
    for q in ("hi", "hi there", "what is this?"):
        err = call(capsys, *words, "--q", q, "--budget", 0.001)[2]
        enough = float(err.split("costs ")[1].split()[0])
        assert call(capsys, *words, "--q", q, "--budget", enough)[0] == 0
    assert call(capsys, *words[:2], "--q", "no image", "--budget", 0.001)[0] == 0  # nothing to save


def test_temperature_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    draw = lambda t, p, seed=0: sample_token(logits, t, p, torch.Generator().manual_seed(seed))
    assert (draw(0, 1) == 0).all() and (draw(1, 0.1) == 0).all()
    share = draw(1, 1).bincount(minlength=4) / 4000
    assert torch.allclose(share, logits[0].softmax(0), atol=0.03)
    nucleus = draw(1, 0.8)  # .64 and .24 hold .88
    assert set(nucleus.tolist()) == {0, 1} and abs((nucleus == 0).float().mean() - 0.644 / 0.881) < 0.03
    assert torch.equal(draw(1, 1), draw(1, 1)) and not torch.equal(draw(1, 1), draw(1, 1, seed=1))
    assert (draw(0.1, 1) == 0).float().mean() > 0.99


def test_explain_draws_the_last_answer(place, tmp_path, capsys):
    status, out, err = call(capsys, "--model", place / "model", "--image", place / "a.png", "--q", "one", "--q", "two",
                            "--max-tokens", 2, "--explain", tmp_path / "e.png")
    assert status == 0 and len(out.split("\n")) == 3 and err.splitlines()[-1].startswith(f"{tmp_path / 'e.png'}: ")
    assert Image.open(tmp_path / "e.png").width == 1600


def test_streaming_holds_back_incomplete_characters(capsys):
    tokenizer = tiny.tokenizer()
    stream = sample.Stream(tokenizer)
    seen = []
    for token in tokenizer.encode("aé€b").ids:
        stream(0, token)
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "", "é", "", "", "€", "b"]


def test_streams_to_a_terminal(place, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    words = ["--model", str(place / "model"), "--image", str(place / "a.png"), "--q", "one", "--max-tokens", "5"]
    sample.main(words)
    model = VLM.from_pretrained(place / "model")
    image = process_image(Image.open(place / "a.png"), model.config)
    prompt = encode(chatml(["<image>\none"]), model.tokenizer, [image])
    answer = model.tokenizer.decode(model.generate([prompt], (1, 4), max_tokens=5)[0])
    assert terminal.getvalue() == answer.rstrip("\ufffd") + "\n"


def bomb(path):
    """A PNG of a few bytes that says it is 30,000 x 20,000."""
    import struct
    import zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 20000, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


IMAGES = {
    "text.png": (lambda p: p.write_text("I am a text"), "not an image"),
    "empty.png": (lambda p: p.write_bytes(b""), "not an image"),
    "half.jpg": (lambda p: (tiny.image(300, 300).save(p), p.write_bytes(p.read_bytes()[:9000])), "broken image"),
    "half.png": (lambda p: (tiny.image(300, 300).save(p), p.write_bytes(p.read_bytes()[:9000])), "broken image"),
    "bomb.png": (bomb, "pixels; make it smaller"),
    "nowhere.png": (lambda p: None, "no such image"),
    "folder.png": (lambda p: p.mkdir(), "a directory, no image")}


@pytest.mark.parametrize("name", IMAGES)
def test_broken_images(place, tmp_path, capsys, name):
    make, message = IMAGES[name]
    make(tmp_path / name)
    status, out, err = call(capsys, "--model", place / "model", "--image", tmp_path / name, "--q", "hi")
    assert status == 2 and out == "" and err.splitlines()[-1].startswith(f"error: {tmp_path / name}") and message in err
    assert len(err.splitlines()) == 1 and "Traceback" not in err


WORDS = {
    "--q ''": (["--q", ""], "--q '': the question is empty"),
    "--q ' '": (["--q", "\n "], "--q '': the question is empty"),
    "--q without a question": (["--q", "<image>"], "--q '<image>': the question is empty"),
    "no --q": (["--image", "x.png"], "--q"),
    "--sa beyond": (["--q", "hi", "--sa", "1,6"], "--sa 1,6: there is no layer 6; this model has layers 0 to 5"),
    "--sa words": (["--q", "hi", "--sa", "all"], "--sa all: give"),
    "--sa negative": (["--q", "hi", "--sa=-1"], "--sa -1: give"),
    "--pack 0.5": (["--q", "hi", "--pack", "0.5"], "--pack 0.5: give a number 1 or more"),
    "--seed": (["--q", "hi", "--seed", "9" * 30], "--seed"),
    "--device meta": (["--q", "hi", "--device", "meta"], "--device meta"),
    "--q with a film": (["--q", "what is in <video>?"], "<video>"),
    "--q of bytes": (["--q", "\udcff"], "--q '\\udcff': the question is not valid UTF-8"),
    "--image of bytes": (["--q", "hi", "--image", "\udcff.png"], "no such image"),
    "--seed -1": (["--q", "hi", "--seed", "-1"], "--seed -1: give a number from 0"),
    "--budget nan": (["--q", "hi", "--budget", "nan"], "--budget nan: give a number above 0"),
    "--budget inf": (["--q", "hi", "--budget", "inf"], "--budget inf: give a number above 0"),
    "--temperature nan": (["--q", "hi", "--temperature", "nan"], "--temperature nan: give a number 0 or more"),
    "--temperature inf": (["--q", "hi", "--temperature", "inf"], "--temperature inf: give a number 0 or more"),
    "--top-p nan": (["--q", "hi", "--top-p", "nan"], "--top-p nan: give a number above 0"),
    "--pack inf": (["--q", "hi", "--pack", "inf"], "--pack inf: give a number 1 or more"),
    "--pack nan": (["--q", "hi", "--pack", "nan"], "--pack nan: give a number 1 or more"),
    "--explain elsewhere": (["--q", "hi", "--explain", "no/such/e.png"], "--explain"),
    "--explain of another kind": (["--q", "hi", "--explain", "e.txt"], "--explain"),
    "--budget 0": (["--q", "hi", "--budget", "0"], "--budget"),
    "--budget and --sa": (["--q", "hi", "--budget", "0.5", "--sa", "1"], "leave --sa out"),
    "--max-tokens 0": (["--q", "hi", "--max-tokens", "0"], "--max-tokens 0: give a number at least 1"),
    "--threads 0": (["--q", "hi", "--threads", "0"], "--threads 0: give a number from 1 to 1,024"),
    "--top-p 0": (["--q", "hi", "--top-p", "0"], "--top-p"),
    "--temperature -1": (["--q", "hi", "--temperature", "-1"], "--temperature"),
    "--device": (["--q", "hi", "--device", "warp"], "--device warp"),
    "--nonsense": (["--q", "hi", "--nonsense"], "--nonsense"),
    "too many <image>": (["--q", "<image> hi"], "--q '<image> hi': the question has 1 <image> but 0 images"),
    "no model": (["--q", "hi", "--model", "no-such-thing"], "no-such-thing: no such directory")}


@pytest.mark.parametrize("what", WORDS)
def test_bad_words(place, capsys, what):
    words, message = WORDS[what]
    model = [] if "--model" in words else ["--model", place / "model"]
    status, out, err = call(capsys, *model, *words)
    last = err.splitlines()[-1]
    assert status == 2 and out == "" and last.startswith("error: ") and message in last


def test_a_terminal_that_lacks_characters_loses_no_answer(place, monkeypatch):
    """What ASCII cannot say is written as an escape; a stream that is closed takes nothing and hurts nothing."""
    monkeypatch.setattr(Conversation, "answer", lambda self, *_, routes, layer_tokens, **__: (
        routes.append(Plan((1, 4))), layer_tokens.append(None), self.model.tokenizer.encode("café 中").ids)[2])
    words = ["--model", str(place / "model"), "--q", "hi"]
    for encoding, want in (("ascii", b"caf\\xe9 \\u4e2d\n"), ("utf-8", "café 中\n".encode()), (
            "latin-1", b"caf\xe9 \\u4e2d\n")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
        sample.run(lambda: sample.main(words))
        assert raw.getvalue() == want
    for closed in (["stdout"], ["stderr"], ["stdout", "stderr"]):
        for name in closed:
            monkeypatch.setattr(sys, name, None)
        sample.run(lambda: sample.main(words))


@pytest.mark.parametrize("module", ["pathlib", "data", "cli", "numpy", "flops"])
def test_stopped_while_it_imports(module):
    code = f"""import runpy, sys
class Stop:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
for name in {module!r}, "data", "cli":
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Stop())
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path("sample.py", run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_one_pixel_is_an_image(place, tmp_path, capsys):
    tiny.image(1, 1).save(tmp_path / "dot.png")
    status, out, _ = call(capsys, "--model", place / "model", "--image", tmp_path / "dot.png", "--q", "hi", "--json")
    assert status == 0 and json.loads(out)["vision_tokens"] > 0


def test_as_a_program(place):
    """Default model, from another directory; and an error's exit status, without a traceback."""
    def program(*words):
        return subprocess.run([sys.executable, ROOT / "sample.py", *words], capture_output=True, text=True, cwd=place)
    done = program("--image", "a.png", "--q", "hi", "--max-tokens", "3")
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    failed = program("--image", "c.png", "--q", "hi")
    assert failed.returncode == 2 and failed.stderr == "error: c.png: no such image; check the path\n"
    assert program("--help").returncode == 0
