"""A conversation on the terminal: each answer as if all of it were asked anew, images encoded once, commands, mistakes.
"""
import os
import pty
import select
import sys
import time
from functools import reduce
from pathlib import Path

import pytest
import torch

import chat
import data
import sample
from chat import Chat, talk
from config import Plan
from tests import tiny
from tests.test_router import call

ROOT = Path(__file__).parent.parent
BACKBONES = {"siglip": {}, "qwen2-vl": tiny.BACKBONES["qwen2-vl"], "fastvlm": tiny.BACKBONES["fastvlm"]}


def model(name="siglip"):
    m = tiny.model(4, **BACKBONES[name])
    torch.nn.init.normal_(m.lm_head.weight)
    m.config.add_visor((2, 5), (1, 3, 4), ((1,), (1, 4), (1, 3, 4)))
    return tiny.shake(m.add_router(), 0.7).eval()


def chosen(m):
    """As sample.converse chooses, and checks."""
    def choose(sa, *_):
        if sa == "auto":
            return "auto", None, "auto" if m.config.overview else "all"
        return m.config.configuration(sa), None, "all"
    return choose, lambda sa: sa == "auto" or m.config.configuration(sa, "/sa")


def lines(*words):
    """In place of input: these lines, then the end."""
    left = list(words)

    def read(_):
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line
    return read


def turns_of(m, images, *turns):
    """The whole conversation as one prompt: question, answer ids, question, ..."""
    processed = [data.process_image(image, m.config, len(images) == 1) for image in images]
    prompt = data.encode(data.chatml([data.place_images(turns[0], len(images), m.config)]), m.tokenizer, processed)
    for answer, question in zip(turns[1::2], turns[2::2]):
        ids = answer + m.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
        text = f"<|im_start|>user\n{question}<|im_end|>\n{data.ANSWER}"
        ids += m.tokenizer.encode(text, add_special_tokens=False).ids
        prompt = data.join(prompt, data.Prompt(ids, [prompt.end + i for i in range(len(ids))], [], [], []))
    return prompt


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_each_answer_is_that_of_the_whole_conversation_asked_anew(name, n, capsys):
    m = model(name)
    images = [tiny.image(70 + 40 * i, 90, i) for i in range(n)]
    own, said = Chat(m, images, "1,4", *chosen(m), max_tokens=5), []
    for question, sa in (("What?", "1,4"), ("And then?", "1,4"), ("Why?", "1"), ("So?", "dense")):
        if own.sa != sa:
            own.command(f"/sa {sa}")
        own.ask(question)
        said.append(question)
        want = m.generate([turns_of(m, images, *said)], m.config.configuration(sa), max_tokens=5)[0]
        assert own.last[2] == want
        said.append(want)
        assert capsys.readouterr().out == m.tokenizer.decode(want).rstrip("\ufffd") + "\n"


def test_the_router_decides_for_each_question_and_no_tile_is_encoded_twice(capsys):
    m, tiles = model(), []
    m.vision_tower.register_forward_pre_hook(lambda _, args: tiles.append(len(args[0])))
    own, said, seen = Chat(m, [tiny.image(70, 90)], "auto", *chosen(m), max_tokens=4), [], set()
    content = []  # whether the overview will do, for the question that is asked
    m.overview_will_do = lambda *_: content
    for i, question in enumerate(("What?", "Is it red?", "a", "bb", "ccc", "dddd", "How many?")):
        content[:] = [i not in (2, 5)]
        note = own.ask(question)
        said.append(question)
        count, routes = len(tiles), []
        want = m.generate([turns_of(m, [tiny.image(70, 90)], *said)], "auto", "auto", max_tokens=4, routes=routes)[0]
        del tiles[count:]  # what asking anew encodes
        assert own.last[2] == want and own.last[3].ran == routes[0]
        assert ("over the overview" in note) == (routes[0].pixels == "overview")
        seen.add(routes[0])
        said.append(want)
        if i == 4:
            own.command("/sa 1")
            own.ask("in between")
            said += ["in between", own.last[2]]
            own.command("/sa auto")
    assert {plan.pixels for plan in seen} == {"overview", "all"}
    assert sum(tiles) == own.prefix.images[0].tiling.tiles


def test_commands_and_mistakes_leave_the_conversation_as_it_was(tmp_path, capsys):
    m = model()
    tiny.image(50, 60).save(tmp_path / "a.png")
    own = Chat(m, [tiny.image(70, 90)], "1", *chosen(m), max_tokens=3)
    talk(own, lines("/explain x.png", "one", "/sa 99", "/sa", "/jump", "/image no.png", "<image> two",
                    f"/explain {tmp_path}/e.jpg", f"/explain {tmp_path}/e.png", "/help", "", "   ", '/sa "1', "three"))
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 8 and "ask first" in errors[0] and "no layer 99" in errors[1] and "no such image" in errors[4]
    assert chat.HELP in err and (tmp_path / "e.png").is_file() and len(out.splitlines()) == 3  # two answers, the end
    assert len(own.conversation.prompts) == 5
    assert own.last[2] == m.generate([turns_of(m, [tiny.image(70, 90)], "one", reduce(list.__add__, [
        own.conversation.prompts[2].ids[:-2]]), "three")], (1,), max_tokens=3)[0]
    talk(own, lines(f"/image {tmp_path}/a.png", "four", "/image", "five"))
    assert "1 image, " in (err := capsys.readouterr().err) and "0 images, 0 visual tokens" in err
    assert own.last[2] == m.generate([turns_of(m, [], "five")], (1,), max_tokens=3)[0]


def test_ctrl_c_stops_an_answer_and_forgets_its_question(capsys, monkeypatch):
    m = model()
    own = Chat(m, [tiny.image(70, 90)], "1", *chosen(m), max_tokens=4)
    own.ask("one")
    first, real = own.last[2], chat.Stream.__call__

    def stopped(self, i, token):
        real(self, i, token)
        if len(self.ids) == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(chat.Stream, "__call__", stopped)
    talk(own, lines(KeyboardInterrupt(), "two"))
    assert "stopped; the question is forgotten" in capsys.readouterr().err
    monkeypatch.setattr(chat.Stream, "__call__", real)
    own.ask("three")
    assert own.last[2] == m.generate([turns_of(m, [tiny.image(70, 90)], "one", first, "three")], (1,), max_tokens=4)[0]


def test_the_picture_is_of_the_last_answer(tmp_path, monkeypatch, capsys):
    import explain
    m, drawn = model(), []
    own = Chat(m, [tiny.image(70, 90)], "1,4", *chosen(m), max_tokens=3)
    own.ask("one")
    own.ask("two")
    monkeypatch.setattr(explain, "draw", lambda *args: drawn.append(args))
    own.command(f"/explain {tmp_path}/e.png")
    (_, _, _, _, report, look), = drawn
    whole = turns_of(m, [tiny.image(70, 90)], "one", own.conversation.prompts[2].ids[:-2], "two")
    want = explain.attention_to_images(m, whole, own.last[2], (1, 4))
    assert report["question"] == "two" and report["text_tokens"] == len(whole.ids)
    assert look.weights.keys() == want.weights.keys()
    assert all(abs(look.weights[l] - want.weights[l]).max() < 1e-5 for l in want.weights)


@pytest.mark.parametrize("words, said", [([], "on a terminal a conversation begins"), (["--json"], "--q TEXT"),
                                         (["--batch-size", "3"], "--q TEXT")], ids=str)
def test_without_a_terminal_there_is_none(words, said, capsys):
    assert call(sample.main, *words) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--json"], "--json is for --q"), (["--explain", "x.png"], "--explain is for --q"),
    (["--reduce", "pyramiddrop:1:.5", "--sa", "dense"], "ask with --q"),
    (["--batch-size", "3"], "--batch-size")], ids=str)
def test_what_does_not_go_with_a_conversation(words, said, tmp_path, capsys, monkeypatch):
    model().save_pretrained(tmp_path / "m")
    tiny.image(50, 60).save(tmp_path / "x.png")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    flags = words if "--explain" not in words else ["--explain", tmp_path / "x.png"]
    assert call(sample.main, "--model", tmp_path / "m", "--image", tmp_path / "x.png", *flags) == 2
    assert said in capsys.readouterr().err


def test_on_a_terminal(tmp_path):
    """The program itself: two questions, one stopped line, the end by Ctrl-D; exit status 0."""
    tiny.image(90, 80).save(tmp_path / "x.png")
    model().save_pretrained(tmp_path / "m")
    pid, fd = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "sample.py", "--model", str(tmp_path / "m"), "--image",
                                  str(tmp_path / "x.png"), "--max-tokens", "3", "--device", "cpu"])
    out, todo, end = b"", [b"what?\n", b"and?\n", b"\x04"], time.time() + 120
    while time.time() < end:
        if select.select([fd], [], [], 0.2)[0]:
            try:
                out += os.read(fd, 1 << 16)
            except OSError:  # it has ended
                break
        if todo and out.count(b"> ") > 3 - len(todo):
            os.write(fd, todo.pop(0))
    assert os.waitpid(pid, 0)[1] == 0 and out.count(b"--sa ") == 2 and b"3 of answer" in out and b"Traceback" not in out


def test_plans_are_told_as_sa_calls_them():
    m = model()
    own = Chat(m, [tiny.image(70, 90)], "dense", *chosen(m), max_tokens=2)
    assert own.ask("what?").startswith("--sa dense, ") and own.last[3].ran == Plan(tuple(range(6)))


def test_what_was_said_in_other_layers_stays_apart():
    m = model()
    own = Chat(m, [tiny.image(70, 90)], "1", *chosen(m), max_tokens=2)
    own.ask("one")
    first = own.conversation
    own.command("/sa 1,4")
    own.ask("two")
    assert len(first.prompts) == 3 and len(own.conversation.prompts) == 5


def test_layers_by_name_go_on_without_the_router_of_pixels(tmp_path, monkeypatch, capsys):
    """--pixels auto is for --sa auto; /sa names layers, and then all is seen."""
    model().save_pretrained(tmp_path / "m")
    tiny.image(50, 60).save(tmp_path / "x.png")
    monkeypatch.setattr(chat, "talk", lambda own: talk(own, lines("one", "/sa 1,4", "two", "/sa auto", "three")))
    monkeypatch.setattr(sample, "talk", chat.talk)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert call(sample.main, "--model", tmp_path / "m", "--image", tmp_path / "x.png", "--pixels", "auto",
                "--max-tokens", 2, "--device", "cpu") == 0
    err = capsys.readouterr().err
    assert "error" not in err and err.count(" of answer, ") == 3


def test_a_line_that_is_no_text_ends_nothing(capsys):
    m = model()
    own = Chat(m, [], "1", *chosen(m), max_tokens=2)
    talk(own, lines(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "one"))
    assert "not valid UTF-8" in capsys.readouterr().err and len(own.conversation.prompts) == 3
