"""sample.py --batch and its loop: many questions at once are answered as each is alone, in order; a run can go on."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import answers
import data
import pictures
import sample
from answers import Answer, batches
from cli import NANO
from model import VLM
from tests import tiny
from tests.test_sample import call
from toy import world

ROOT = Path(__file__).parent.parent
SIZES = (60, 40), (30, 50), (200, 40), (33, 32)


@pytest.fixture(scope="module")
def model():
    """With a router that sends questions to all of its configurations."""
    m = tiny.model(layers=12, visor=False)
    m.add_cross_attention(viable=[(1,), (1, 4), (1, 4, 7)], overview=()).add_router()
    torch.manual_seed(274)
    for name, p in m.router.named_parameters():
        torch.nn.init.normal_(p)
        if "bias" in name:  # it would decide alone
            torch.nn.init.zeros_(p)
    return m


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """Images, and rows that ask about none, one or several of them."""
    d = tmp_path_factory.mktemp("batch")
    model.save_pretrained(d / "model")
    for k, size in enumerate(SIZES):
        tiny.image(*size, k).save(d / f"{k}.png")
    rows = []
    for i in range(12):
        images = [f"{(i + j) % 4}.png" for j in range((1, 0, 1, 2, 1)[i % 5])]
        image = {} if not images else {"image": images if len(images) > 1 or i % 2 else images[0]}
        rows.append({"id": i, **image, "question": f"{'abc' * (i % 4)} what {'x' * (7 * i % 5)}?"})
    rows[3]["question"] = "is <image> beside <image>?"
    rows[6]["image"] = None
    (d / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return d


@pytest.fixture
def loaded(monkeypatch, model):
    """Commands find the model in memory. Gives the sizes of the batches that it is asked."""
    sizes, generate = [], VLM.generate
    monkeypatch.setattr(sample, "load_model", lambda args: model)
    monkeypatch.setattr(VLM, "generate", lambda self, prompts, *a, **k: (
        sizes.append(len(prompts)), generate(self, prompts, *a, **k))[1])
    return sizes


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def questions_of(folder):
    return [question for _, question in sample.read_questions(folder / "q.jsonl")]


def alone(model, question, sa="auto", **how):
    """(tokens, route) of a question by itself."""
    (text, paths), routes = question, []
    images = [data.process_image(pictures.load_image(x), model.config, len(paths) == 1) for x in paths]
    prompt = data.encode(data.chatml([data.place_images(text, len(paths))]), model.tokenizer, images)
    return model.generate([prompt], sa, routes=routes, **how)[0], routes[0].sa


# --- the loop ---

def test_answers_are_those_of_each_question_alone_in_order_and_in_batches(model, folder, loaded):
    questions = questions_of(folder)
    found = list(answers.answers(model, iter(questions), batch_size=5, max_tokens=3))
    assert sum(loaded) == len(questions) and sorted(loaded) == [2, 5, 5]
    want = [alone(model, x, max_tokens=3) for x in questions]
    assert [(x.tokens, x.plan.sa) for x in found] == want
    assert len({x.plan for x in found}) == 3 and len({len(x.asked.shared.v_pos) for x in found}) >= 4
    assert len({tuple(x.tokens) for x in found}) >= 10
    assert all(image.pixels is None for x in found for image in x.asked.shared.images)


def test_a_configuration_for_each_question(model, folder, loaded):
    """By its tokens; those that a router may choose differ too, and are kept to."""
    def choose(prefix, text, dense_vision):
        assert len(prefix.v_pos) == dense_vision and text > len(prefix.ids)
        return ((1,) if dense_vision else (1, 4)), None
    questions = questions_of(folder)[:6]
    for x, question in zip(answers.answers(model, questions, choose, 8, max_tokens=2), questions):
        assert (x.tokens, x.plan.sa) == alone(model, question, (1,) if question[1] else (1, 4), max_tokens=2)
    assert max(loaded) == 6
    limits = lambda prefix, text, _: ("auto", [(1,)] if len(prefix.v_pos) else None)
    for x, question in zip(answers.answers(model, questions, limits, 8, max_tokens=2), questions):
        allowed = [(1,)] if question[1] else None
        assert (x.tokens, x.plan.sa) == alone(model, question, "auto", max_tokens=2, allowed=allowed)


def test_batches_are_of_similar_size_and_bounded(model):
    images = [tiny.image(*size) for size in SIZES]
    tokens = [data.tiling(*size, model.config).tokens for size in SIZES]
    window = [(i, ("hi", [images[i % 4]])) for i in range(40)]
    found = batches(window, model.config, 5)
    assert sorted(x for batch in found for x in batch) == window and max(map(len, found)) == 5
    assert sum(len({tokens[i % 4] for i, _ in batch}) for batch in found) == len(found)  # nothing is padded
    assert [min(batch)[0] for batch in found] == sorted(min(batch)[0] for batch in found)
    found = batches(window, model.config, 16, tokens=100)
    assert all(len(batch) * max(tokens[i % 4] for i, _ in batch) <= 100 or len(batch) == 1 for batch in found)
    assert max(map(len, found)) == 100 // min(tokens) and any(len(batch) == 1 for batch in found)
    assert [len(x) for x in batches([(i, ("x" * 200, [])) for i in range(4)], model.config, 4, tokens=100)] == [2, 2]
    two = [(i, ("hi", images[:1] * 2)) for i in range(4)]  # one tile each
    assert [len(x) for x in batches(two, model.config, 4, tokens=100)] == [2, 2] and 100 // tokens[0] == 1


def test_images_are_decoded_when_their_batch_is_due(model, folder, loaded, monkeypatch):
    events, load = [], pictures.load_image
    monkeypatch.setattr(pictures, "load_image", lambda path: (events.append("image"), load(path))[1])
    generate, taken = VLM.generate, []
    monkeypatch.setattr(VLM, "generate", lambda *a, **k: (events.append("batch"), generate(*a, **k))[1])
    endless = (taken.append(i) or ("hi", [folder / "0.png"]) for i in range(10**9))
    found = answers.answers(model, endless, batch_size=2, max_tokens=1)
    for i in range(18):
        next(found)
    assert events[:6] == ["image", "image", "batch"] * 2 and len(taken) == 2 * 2 * answers.WINDOW


def test_a_run_that_goes_on_forms_the_same_batches(model, folder, monkeypatch):
    monkeypatch.setattr(answers, "WINDOW", 2)
    asked, answer_batch = [], answers.answer_batch
    monkeypatch.setattr(answers, "answer_batch", lambda m, batch, *a, **k: (
        asked.append([number for number, _ in batch]), answer_batch(m, batch, *a, **k))[1])
    questions, found = questions_of(folder), {}
    for start in (0, 1, 5, 7, 12):
        del asked[:]
        rest = [x.tokens for x in answers.answers(model, questions, batch_size=3, start=start, max_tokens=1)]
        found[start] = rest, asked[:]
        whole, batches = found[0]
        assert rest == whole[start:] and asked == [batch for batch in batches if max(batch) >= start]
    assert len(found[5][1]) == 3 < len(found[0][1]) == 4 and len(found[7][1]) <= 2  # a batch, a window less


def test_what_is_drawn_depends_on_the_number_and_the_seed_alone(model, folder):
    questions = questions_of(folder)[:2] * 2
    def drawn(**how):
        return [x.tokens for x in answers.answers(model, questions, (1,), max_tokens=3, temperature=2.0, **how)]
    first = drawn(batch_size=3)
    assert first == drawn(batch_size=1) and first[2:] == drawn(batch_size=2, start=2)
    assert first != drawn(seed=1) and first[:2] != first[2:]


@pytest.mark.parametrize("fault, message", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory: give smaller images or fewer"),
    (ValueError("the output is not finite:\nbroken weights"), "the output is not finite: broken weights")])
def test_a_batch_with_a_question_that_fails_is_asked_one_by_one(model, folder, monkeypatch, fault, message):
    generate, questions = VLM.generate, questions_of(folder)[:6]
    want = [x.tokens for x in answers.answers(model, questions, max_tokens=2)]

    def small(self, prompts, *a, **k):
        if len(prompts) > 1 or len(prompts[0].images) > 1:
            raise fault
        return generate(self, prompts, *a, **k)
    monkeypatch.setattr(VLM, "generate", small)
    found = list(answers.answers(model, questions, max_tokens=2))
    want[3] = None  # of two images
    assert [x.tokens for x in found] == want
    assert found[3] == Answer(error=message)

    def broken(*a, **k):
        raise RuntimeError("a bug")
    monkeypatch.setattr(VLM, "generate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        next(answers.answers(model, questions))


# --- the command ---

def test_two_commands_do_not_write_to_one_file(folder, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    with sample.alone_in(out):
        status, _, err = call(capsys, "--model", folder / "model", "--batch", folder / "q.jsonl", "--out", out)
    assert status == 2 and "another run is writing there" in err and not out.read_bytes()


@pytest.mark.parametrize("flags", [[], ["--sa", "1,4"], ["--budget", 0.8], ["--reduce", "pack:2"]])
def test_lines_say_what_json_says_of_each_row_alone(folder, capsys, flags):
    words = ["--model", folder / "model", "--max-tokens", 2, *flags]
    status, out, err = call(capsys, *words, "--batch", folder / "q.jsonl", "--batch-size", 8)
    found, rows = [json.loads(line) for line in out.splitlines()], rows_of(folder / "q.jsonl")
    assert status == 0 and len(found) == len(rows) and "12/12" in err
    assert len({len(x["sa"]) for x in found}) == (1 if "--sa" in flags else 3)
    assert found[3]["routed"] == ("--sa" not in flags)
    if not flags or "--budget" in flags:  # too much for this row alone
        assert (found[3]["sa"] == [1, 4, 7]) == (not flags) and found[0]["sa"] == [1, 4, 7]
    for i in (1, 2, 3):  # no image, one, two
        row = rows[i]
        images = [row["image"]] if isinstance(row.get("image"), str) else row.get("image") or []
        asked = json.loads(call(capsys, *words, *(x for name in images for x in ("--image", folder / name)),
                                "--q", row["question"], "--json")[1])
        del asked["seconds"]
        how = " ".join(map(str, [*words[:2], *flags[:2], *words[2:4], "--dtype", "float32"]))
        assert found[i] == {**row, **asked, "run": how}


BAD = {
    '{"image": "no.png", "question": "hi"}': "no.png: no such image; check the path",
    '{"image": "broken.png", "question": "hi"}': "broken.png: not an image",
    '{"image": "0.png", "question": " "}': "the question is empty",
    '{"image": "0.png"}': "line 4: the question is no text but null; give one",
    '{"image": "0.png", "question": 5}': "line 5: the question is no text but 5; give one",
    '{"image": 5, "question": "hi"}': "line 6: image is neither a path nor a list of paths, but 5",
    '{"image_path": "0.png", "question": "hi"}': "line 7: has pictures under image_path",
    '{"question": "<image> hi"}': "1 <image> but 0 images",
    '{"question": "\\ud800"}': "not valid UTF-8",
    '[{"question": "hi"}]': "line 10: a list instead of a JSON object",
    '{"question": "hi"': "line 11: not valid JSON",
    '{"question": "hi", "question": "ho"}': "line 12: the key 'question' stands twice",
    '{"question": "\udcff"}': "line 13: byte",
    '{"image": ["0.png", "long.png"], "question": "hi"}': "too long to be padded to a square",
    '{"question": "in <video>?"}': "<video>"}


def test_a_row_that_cannot_be_used_costs_no_other(folder, loaded, model, capsys, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "broken.png").write_text("I am a text")
    tiny.image(20000, 1).save(tmp_path / "long.png")
    good = '{"image": "1.png", "question": "hi", "n": 1e3}'
    lines = "\n".join([*BAD, "", good, "  ", good + "\r", ""]).encode(errors="surrogateescape")
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    status, out, err = call(capsys, "--batch", tmp_path / "q.jsonl", "--out", tmp_path / "o.jsonl", "--max-tokens", 2)
    found = rows_of(tmp_path / "o.jsonl")
    assert status == 1 and out == "" and err.endswith(f"\n{len(BAD)} of {len(BAD) + 2} rows could not be answered\n")
    assert len(found) == len(BAD) + 2 and "Traceback" not in err
    for row, message in zip(found, BAD.values()):
        assert message in row["error"] and "tokens" not in row and "\n" not in row["error"]
    assert found[0] == {"image": "no.png", "question": "hi", "run": "--model nano --max-tokens 2 --dtype float32",
                        "error": f"{tmp_path / 'no.png'}: no such image; check the path"}
    tokens = alone(model, ("hi", [folder / "1.png"]), max_tokens=2)[0]
    assert [(x["tokens"], x["n"]) for x in found[-2:]] == [(tokens, 1000)] * 2
    del loaded[:]  # they count as done
    again = call(capsys, "--batch", tmp_path / "q.jsonl", "--out", tmp_path / "o.jsonl", "--max-tokens", 2)
    assert again[0] == 1 and not loaded and rows_of(tmp_path / "o.jsonl") == found
    assert again[2].endswith(f"\n{len(BAD)} of {len(BAD) + 2} rows could not be answered\n")


FILES = {
    "missing": (None, "q.jsonl: no such file"),
    "empty": (b"", "no line of it is a JSON object"),
    "a text": (b"one\ntwo\n", "no line of it is a JSON object"),
    "a list": (b'[{"question": "hi"}]', "no line of it is a JSON object"),
    "UTF-16": ('{"question": "hi"}'.encode("utf-16"), "no line of it is a JSON object"),
    "a result's key": (b'{"question": "hi"}\n{"question": "hi", "answer": "ho"}\n', "line 2: the key answer is one of"),
    "a directory": ("directory", "is a directory")}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_no_rows(tmp_path, capsys, name):
    content, message = FILES[name]
    if content == "directory":
        (tmp_path / "q.jsonl").mkdir()
    elif content is not None:
        (tmp_path / "q.jsonl").write_bytes(content)
    status, out, err = call(capsys, "--batch", tmp_path / "q.jsonl", "--out", tmp_path / "o.jsonl")
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and message in err
    assert not (tmp_path / "o.jsonl").exists()


WORDS = {
    "--q": (["--batch", "q.jsonl", "--q", "hi"], "--q does not go with --batch: write the question into its lines"),
    "--image": (["--batch", "q.jsonl", "--image", "a.png"], "--image does not go with --batch: write the path into"),
    "--explain": (["--batch", "q.jsonl", "--explain", "e.png"], "--explain does not go with --batch: ask a single"),
    "--batch-size": (["--batch", "q.jsonl", "--batch-size", "0"], "--batch-size 0: give a number at least 1"),
    "--out alone": (["--q", "hi", "--out", "o.jsonl"], "--out is for --batch"),
    "--batch-size alone": (["--q", "hi", "--batch-size", "2"], "--batch-size is for --batch"),
    "neither": ([], "give a question, --q TEXT, or many of them, --batch FILE.jsonl")}


@pytest.mark.parametrize("name", WORDS)
def test_words_that_do_not_go_together(capsys, name):
    status, out, err = call(capsys, *WORDS[name][0])
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith(f"error: {WORDS[name][1]}")


def test_a_configuration_that_does_not_exist_ends_all_at_once(folder, loaded, capsys, tmp_path):
    status, out, err = call(capsys, "--batch", folder / "q.jsonl", "--sa", "99")
    assert status == 2 and out == "" and "there is no layer 99" in err and not loaded


def test_flags_reach_the_loop(folder, loaded, capsys, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "hi"}\n' * 4)
    def tokens(*flags):
        out = call(capsys, "--batch", tmp_path / "q.jsonl", "--sa", 1, "--max-tokens", 4, *flags)[1]
        return [json.loads(line)["tokens"] for line in out.splitlines()]
    greedy, hot = tokens("--batch-size", 4), tokens("--temperature", 5)
    assert loaded == [4, 1, 1, 1, 1] and greedy[0] == greedy[3] and len({tuple(x) for x in hot}) == 4
    assert hot == tokens("--temperature", 5, "--batch-size", 2) != tokens("--temperature", 5, "--seed", 1)
    assert tokens("--temperature", 5, "--top-p", 0.001) == greedy


# --- runs that are stopped ---

@pytest.fixture
def run(folder, loaded, capsys, tmp_path):
    """run(*words): (exit status, stderr, what o.jsonl has) of a command that writes there."""
    def run(*words, rows=folder / "q.jsonl"):
        status, out, err = call(capsys, "--batch", rows, "--out", tmp_path / "o.jsonl", "--batch-size", 3,
                                "--max-tokens", 2, *words)
        assert out == ""
        return status, err, (tmp_path / "o.jsonl").read_bytes()
    return run


def test_a_run_that_was_killed_at_any_byte_goes_on(run, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "WINDOW", 2)
    status, _, whole = run()
    assert status == 0 and whole.count(b"\n") == 12 and sum(loaded) == 12
    ends = [i + 1 for i, c in enumerate(whole) if c == ord("\n")]
    for cut in (0, 60, ends[3] - 1, ends[3], ends[6] + 1, ends[6] + 90, ends[9] + 200, len(whole) - 1, len(whole)):
        (tmp_path / "o.jsonl").write_bytes(whole[:cut])
        del loaded[:]
        status, err, again = run()
        assert (status, again) == (0, whole), cut
        assert sum(loaded) <= (12 if cut < ends[5] else 6) and bool(loaded) == (cut < len(whole))
        assert (f"has {sum(end <= cut for end in ends)} of 12 rows already" in err) == (cut >= ends[0])


def test_a_file_about_something_else_is_left_as_it_is(run, folder, tmp_path):
    _, _, whole = run()
    out = tmp_path / "o.jsonl"
    lines = whole.splitlines(keepends=True)
    for content, line in ((lines[1] + lines[0], 1), (lines[0] + lines[2], 2), (b"\n" + whole, 1),
                          (whole + lines[-1], 13), (whole + b"x", 13), (b"my notes", 1), (lines[0] + b"{}\n", 2),
                          (lines[0][:-3] + b"\n", 1), ((folder / "q.jsonl").read_bytes(), 1), (b'{"id": 1', 1)):
        out.write_bytes(content)
        status, err, after = run()
        assert status == 2 and after == content and err == (
            f"error: {out}: line {line} is not what this command with these flags writes there; remove the file, or "
            "name another one\n"), content[:80]
    out.write_bytes(whole)
    for flags in (["--sa", "1"], ["--temperature", 1], ["--seed", 1], ["--pack", 2], ["--model", "other"]):
        assert run(*flags)[0::2] == (2, whole)
    assert run("--batch-size", 5, "--dtype", "float32", "--device", "cpu", "--threads", 1)[0::2] == (0, whole)


def test_a_place_that_cannot_be_written_is_known_before_the_model(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sample, "load_model", lambda args: pytest.fail("loaded"))
    for out in (tmp_path / "no" / "o.jsonl", tmp_path):
        status, _, err = call(capsys, "--batch", folder / "q.jsonl", "--out", out)
        assert status == 2 and err.startswith(f"error: {out}: cannot be written (") and len(err.splitlines()) == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_file_that_goes_on(run, loaded, monkeypatch, tmp_path, number, status):
    _, _, whole = run()
    (tmp_path / "o.jsonl").unlink()
    generate, handlers = VLM.generate, [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    del loaded[:]
    with monkeypatch.context() as m:
        m.setattr(VLM, "generate", lambda *a, **k: (
            os.kill(os.getpid(), number) if len(loaded) == 2 else None, generate(*a, **k))[1])
        found, err, begun = run()
    n = begun.count(b"\n")
    assert found == status and 0 < n < 12 and whole.startswith(begun)
    assert err.endswith(f"\nstopped after {n} of 12 rows; the same command goes on\n") and "Traceback" not in err
    assert handlers == [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    assert run()[::2] == (0, whole)


# --- the miniature ---

def test_as_a_program_about_quilts(tmp_path):
    """Tokens and routes are those of each question alone; the answers are right."""
    rows = []
    for i, kind in enumerate(("scene", "copy", "table")):
        image, _, asked = world.conversation(np.random.default_rng((77, i)), 4, kind)
        image.save(tmp_path / f"{i}.png")
        rows += [{"image": f"{i}.png", "question": question, "truth": answer} for _, question, answer in asked]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = "--batch", "q.jsonl", "--out", "o.jsonl", "--batch-size", "7", "--threads", "1", "--json"
    done = subprocess.run([sys.executable, ROOT / "sample.py", *words], capture_output=True, text=True, cwd=tmp_path)
    found = rows_of(tmp_path / "o.jsonl")
    assert (done.returncode, done.stdout) == (0, "") and "Traceback" not in done.stderr and len(found) == len(rows)
    assert sum(x["answer"] == x["truth"] for x in found) >= 11 and len({tuple(x["sa"]) for x in found}) > 1
    nano = VLM.from_pretrained(NANO)
    for x in found:
        question = x["question"], [tmp_path / x["image"]]
        assert (x["tokens"], tuple(x["sa"])) == alone(nano, question, max_tokens=64, pixels="auto")
