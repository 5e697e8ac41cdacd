"""Training files that are not what they should be: each fault is named once, in one line, and nothing is lost."""
import gzip
import io
import json
import os
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

import llava.index
from cli import run
from llava.__main__ import main
from llava.index import JsonIndex
from llava.mixtures import MOST_FILES, expand_braces, read_mixture
from llava.samples import conversation
from pictures import SampleError
from tests import tiny, worlds
from tests.test_llava import samples, talk, written

ROWS = [talk(f"question {i}, \"quoted\" \\", f'answer [{i}] "}} once') for i in range(5)]
LIST, LINES = json.dumps(ROWS).encode(), b"\n".join(json.dumps(row).encode() for row in ROWS)
BOM = b"\xef\xbb\xbf"


def saved(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path, *words, read=JsonIndex):
    """The one line by which a file is refused; it names the file and says all the words. No index is left."""
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message and all(word in message for word in words), message
    assert not list(path.parent.glob("*.index.npy*"))
    return message


# --- the file as a whole ---

@pytest.mark.parametrize("before", [b"", BOM, b"\n" * 64, b" \r\n" * 5000, BOM + b"\n\t " * 99], ids=len)
@pytest.mark.parametrize("text", [LIST, json.dumps(ROWS, indent=1).encode(), LINES, LINES.replace(b"\n", b"\r\n\n"),
                                  LIST.replace(b"}]}]", b"}]},\n]")], ids=["list", "wide", "lines", "gaps", "comma"])
@pytest.mark.parametrize("after", [b"", b"\n" * 70 + b"\t"], ids=len)
def test_marks_and_blanks_around_samples_do_not_matter(before, text, after, tmp_path):
    path = saved(tmp_path / "a.json", before + text + after)
    for index in (JsonIndex(path), JsonIndex(path)):  # as it was made, and as it was saved
        assert [index[i] for i in range(len(index))] == ROWS


def test_a_mark_where_files_were_joined(tmp_path):
    index = JsonIndex(saved(tmp_path / "a.jsonl", BOM + LINES + b"\n" + BOM + LINES))
    assert [index[i] for i in range(len(index))] == ROWS * 2


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [LIST, b"\n" + LINES], ids=["list", "lines"])
def test_two_bytes_a_character(code, text, tmp_path):
    refused(saved(tmp_path / "a.json", text.decode().encode(code)), code[:6].upper(), "iconv -f", "-t UTF-8")


@pytest.mark.parametrize("more", [LIST, b"\n" + LIST, LINES, b"\n\nxyz", b"]", b",", b"\n" * 99 + b"\0"], ids=str)
def test_something_after_the_list(more, tmp_path):
    path = saved(tmp_path / "a.json", b" " + LIST + more)
    message = refused(path, f"ends at byte {len(LIST) + 1}", "more follows")
    assert int(message.split("follows at byte ")[1].split(":")[0]) == 1 + len(LIST) + len(more) - len(more.lstrip())


def test_something_after_the_list_when_an_older_index_says_that_all_is_well(tmp_path):
    JsonIndex(path := saved(tmp_path / "a.json", LIST + b"  "))
    rows = np.load(tmp_path / "a.json.index.npy")
    saved(path, LIST + b"[]")
    rows[0] = path.stat().st_size, path.stat().st_mtime_ns
    np.save(tmp_path / "a.json.index.npy", rows)
    with pytest.raises(ValueError, match="more follows"):
        JsonIndex(path)


@pytest.mark.parametrize("text, what", [
    (LIST[:-1], "cut off"), (LIST[:-9], "cut off"), (b"[", "cut off"), (b'[{"a": "' + b'\\"' * 99, "cut off"),
    (b'[{"a": 1}}, {"b": [{"c": 2}]}]', "closed by a } at byte 9"), (b"[" * 2000, "1,000 brackets")], ids=range(6))
def test_a_list_without_its_end(text, what, tmp_path, monkeypatch):
    monkeypatch.setattr(llava.index, "DEEPEST", 1000)
    refused(saved(tmp_path / "a.json", text), what)


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.json", LIST)
    return buffer.getvalue()


def numpy_file(save):
    buffer = io.BytesIO()
    save(buffer, np.arange(3))
    return buffer.getvalue()


OTHERS = {
    "gzip": (gzip.compress(LIST), "gzip"), "zip": (zipped(), "zip"), "npz": (numpy_file(np.savez), "npz"),
    "npy": (numpy_file(np.save), "binary"), "parquet": (b"PAR1\x15\x04" + LIST + b"PAR1", "Parquet"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\0" + LIST, "zstd"), "xz": (b"\xfd7zXZ\0" + LIST, "xz"), "bz2": (b"BZh9", "bzip2"),
    "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
    "html": ("<!DOCTYPE html>\n<html>[]</html>", "web page"), "html2": ("\ufeff \n<HTML lang=en>", "web page"),
    "csv": ("id,image,text\n1,a.png,{}\n", "text that begins with 'id,image"), "xml": ("<?xml version='1.0'?>", "text"),
    "umlauts": ("ünïcode [", "text that begins with 'ün"), "string": ('"a"\n' + LINES.decode(), "text"),
    "empty": (b"", "empty"), "blank": (b" \n\n", "blank"), "mark": (BOM, "blank"), "zeros": (b"\0" * 600, "binary"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
    "object": (b'{\n "samples": [\n' + LIST + b"]}", "object over"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_other_files_are_named_as_what_they_are(name, suffix, tmp_path):
    content, what = OTHERS[name]
    path = saved(tmp_path / f"data.{suffix}", content)
    if name != "object" or suffix == "jsonl":
        refused(path, what)
    refused(path, *([what] if name != "object" else []), read=samples)  # it might also be a mixture
    saved(tmp_path / "mix.yaml", f"datasets:\n- json_path: {path}\n")
    refused(path, *([what] if name != "object" else []), read=lambda _: samples(tmp_path / "mix.yaml"))


@pytest.mark.parametrize("name", ["gzip", "zip", "parquet", "lfs", "html"])
def test_other_files_called_mixtures(name, tmp_path):
    refused(saved(tmp_path / "mix.yaml", OTHERS[name][0]), OTHERS[name][1], read=read_mixture)


def test_no_file(tmp_path):
    (tmp_path / "data.json").mkdir()
    refused(tmp_path / "data.json", "directory", read=samples)
    refused(tmp_path / "b.json", "no such", read=samples)
    os.mkfifo(tmp_path / "pipe.json")  # must not wait for somebody who writes
    refused(tmp_path / "pipe.json", "no such", read=samples)


# --- the index ---

@pytest.mark.parametrize("text", [
    b'[{"a": "' + b'\\"' * 5 * 10**5, b'[{"a": "' + b"\\" * 5 * 10**5, b'{"a": "' + b'\\"' * 5 * 10**5,
    b"\n" * 10**6 + b"{", b"{" * 10**6, b'["' + b'"' * 3 * 10**5, b"[" + b'{"a":' * 10**5, b"[" + b"1," * 10**5,
    b"{" + b"\n" * 10**6 + b"{"], ids=range(9))
def test_an_index_takes_linear_time(text, tmp_path):
    start = time.process_time()
    try:
        JsonIndex(saved(tmp_path / "a.jsonl", text))
    except ValueError:
        pass
    assert time.process_time() - start < 4  # what is quadratic takes minutes


def test_an_index_takes_little_memory(tmp_path):
    path = saved(tmp_path / "a.jsonl", b'{"a": "' + b'\\" ' * 2**24)  # one line of 50 MB
    code = ("import re\nfrom llava.index import JsonIndex\n"
            "def peak():\n    return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
            f"before = peak()\nassert len(JsonIndex({str(path)!r})) == 1\nprint(peak() - before)")
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(peak) < 80 * 1024  # kB: the file's own pages, which the system may take back, and no copy


def index_file(path):
    return path.with_name(path.name + ".index.npy")


@pytest.mark.parametrize("text", [b"[]", b"[ ]\n", b"[1, 2]", b"{\\rtf1 hello}\nmore\n", b"{no json}\n{}", b'["a"]'])
def test_no_index_beside_what_holds_no_sample(text, tmp_path):
    path = saved(tmp_path / "a.txt", text)
    JsonIndex(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def with_rows(change, dtype=np.int64):
    """A way to break an index file: its rows are changed."""
    def write(file):
        rows = np.load(file)
        change(rows)
        np.save(file, rows.astype(dtype))
    return write


def swapped(rows):
    rows[[2, 3]] = rows[[3, 2]]


def past_the_end(rows):
    rows[-1, 1] += 10


def negative(rows):
    rows[1, 0] = -5


def damaged(at, byte):
    """A way to break an index file: one byte of its header."""
    def write(file):
        content = bytearray(file.read_bytes())
        content[at] = byte
        file.write_bytes(content)
    return write


BROKEN = {"floats": with_rows(lambda rows: None, np.longdouble), "small": with_rows(lambda rows: None, np.int32),
          "swapped": with_rows(swapped), "past the end": with_rows(past_the_end), "negative": with_rows(negative),
          "bracket": damaged(11, ord("(")), "magic": damaged(0, 0), "version": damaged(6, 9), "length": damaged(9, 255),
          "short": lambda file: file.write_bytes(file.read_bytes()[:-8]), "empty": lambda file: file.write_bytes(b""),
          "no samples": lambda file: np.save(file, np.load(file)[:1]),
          "fewer": lambda file: np.save(file, np.load(file)[:-1]), "later": lambda file: np.save(
              file, np.delete(np.load(file), 1, 0)), "flat": lambda file: np.save(file, np.load(file).reshape(-1)),
          "wide": lambda file: np.save(file, np.load(file).reshape(-1, 2, 1)), "one": lambda file: np.save(file, 1),
          "objects": lambda file: np.save(file, np.array([{}, None]), allow_pickle=True),
          "npz": lambda file: file.write_bytes(numpy_file(np.savez))}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("text", [LIST, LINES], ids=["list", "lines"])
def test_a_broken_index_is_made_anew(how, text, tmp_path, capsys):
    path = saved(tmp_path / "a.json", text)
    JsonIndex(path)
    good = index_file(path).read_bytes()
    BROKEN[how](index_file(path))
    index = JsonIndex(path)
    assert [index[i] for i in range(len(index))] == ROWS and index_file(path).read_bytes() == good
    assert capsys.readouterr() == ("", "")


def test_leftovers_of_killed_processes_are_deleted_and_no_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [f"a.json.index.npy.{os.getppid()}.writing", f"b.json.index.npy.{dead.pid}.writing",
            "a.json.index.npy.x.writing"]
    for name in [*keep, f"a.json.index.npy.{dead.pid}.writing"]:
        saved(tmp_path / name, b"half")
    JsonIndex(saved(tmp_path / "a.json", LIST))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.json", "a.json.index.npy", *keep])


def test_an_index_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    path = saved(tmp_path / "a.json", LIST)
    index_file(path).mkdir()
    assert len(JsonIndex(path)) == 5 and "cannot be written" in capsys.readouterr().err
    index_file(path).rmdir()

    def full(stream, rows):
        stream.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    assert len(JsonIndex(path)) == 5 and "no space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# --- mixtures ---

@pytest.mark.parametrize("datasets, words", [
    ([None], ["datasets[0]", "null"]), ([[]], ["datasets[0]"]),
    ([{"json_path": "a"}, "b.json"], ["datasets[1]", "b.json"]),
    ([{"json_path": 5}], ["datasets[0]", "json_path", "5"]), ([{"json_path": ""}], ["json_path"]),
    ([{"json_path": ["a.json"]}], ["json_path", "a list"]), ([{"json_path": {"a": 1}}], ["json_path", "an object"]),
    ([{"json_path": "a\0.json"}], ["json_path", "NUL"]), ([{"json_path": "\ud800.json"}], ["json_path", "half"]),
    *[([{"json_path": "a", "sampling_strategy": x}], ["datasets[0]", "sampling_strategy"])
      for x in (5, 0, True, 1.5, [], ["all"], {"all": 1}, "some", "first", "first:-1", "first:1e3", "first:٣", "all ",
                f"first:{'9' * 5000}")]], ids=str)
def test_an_entry_of_another_shape(datasets, words, tmp_path):
    refused(written(tmp_path / "mix.json", {"datasets": datasets}), *words, read=read_mixture)
    refused(written(tmp_path / "mix.yaml", {"datasets": datasets}), *words, read=read_mixture)  # JSON is YAML, too


@pytest.mark.parametrize("name", ["mix.json", "mix.yaml"])
@pytest.mark.parametrize("datasets", [None, 5, "ab", {}, {"json_path": "a.json"}, True], ids=str)
def test_datasets_of_another_shape(name, datasets, tmp_path):
    refused(written(tmp_path / name, {"datasets": datasets}), "datasets", read=read_mixture)


@pytest.mark.parametrize("name, n", [("mix.json", 50_000), ("mix.yaml", 900)])
@pytest.mark.parametrize("opening", ["[\n", '{"a":', '[{"a":'])
def test_mixtures_nested_too_deeply(name, n, opening, tmp_path):
    refused(saved(tmp_path / name, '{"datasets": ' + opening * n), "nested too deeply", read=read_mixture)


@pytest.mark.parametrize("before", [b"", BOM, BOM + b"\n" * 99], ids=len)
def test_mixtures_with_a_mark(before, tmp_path):
    for name in ("mix.json", "mix.yaml"):
        path = saved(tmp_path / name, before + b'{"datasets": [{"json_path": "a.json"}]}')
        assert read_mixture(path) == [(tmp_path / "a.json", "all")]


@pytest.mark.parametrize("path", [
    "{a,b}" * 24, "{" * 3000 + "}" * 3000 + "{a,b}" * 24, "{a{b,c},d}" * 24, "{a,b}{" * 24 + "}" * 24,
    "{" + ",".join("ab" * 80) + "}" + "{1,2,3,4,5,6,7,8}"], ids=range(5))
def test_braces_that_stand_for_too_many_files(path, tmp_path):
    refused(written(tmp_path / "mix.json", {"datasets": [{"json_path": path}]}), "datasets[0]", "json_path",
            f"{MOST_FILES:,} files", read=read_mixture)


def test_braces_up_to_the_limit(tmp_path):
    assert len(expand_braces("{0,1,2,3,4,5,6,7,8,9}" * 3)) == MOST_FILES == 10**3
    assert expand_braces("{" * 3000 + "a" + "}" * 3000) == expand_braces("{a}" + "{}" * 3000) == ["a"]  # no recursion
    assert expand_braces("x{a,b}{c{d,e}") == ["xa{c{d,e}", "xb{c{d,e}"]
    entry = {"json_path": "{0,1,2,3,4,5,6,7,8,9}" * 2}
    assert len(read_mixture(written(tmp_path / "mix.json", {"datasets": [entry] * 10}))) == MOST_FILES
    refused(written(tmp_path / "mix.json", {"datasets": [entry] * 11}), "datasets[10]", "files", read=read_mixture)


@pytest.mark.parametrize("level", ["[{x}, {x}, {x}, {x}, {x}, {x}, {x}, {x}]", "{{<<: [{x}, {x}, {x}, {x}, {x}, {x}]}}",
                                   "{{k: {x}, l: {x}, m: {x}}}"])
@pytest.mark.parametrize("use", ["datasets: *a29", "datasets: [*a29]", "datasets: [{json_path: *a29}]",
                                 "datasets: [{json_path: a, sampling_strategy: *a29}]"])
def test_an_alias_that_grows(level, use, tmp_path):
    levels = ["a0: &a0 {k: v}", *(f"a{i}: &a{i} " + level.format(x=f"*a{i - 1}") for i in range(1, 30))]
    refused(saved(tmp_path / "mix.yaml", "\n".join([*levels, use])), read=read_mixture)


def test_merges_are_refused_and_other_aliases_stay(tmp_path):
    for merged in ("{json_path: a.json}", "*d", "[*d, *d]"):
        path = saved(tmp_path / "mix.yaml", f"default: &d {{json_path: a.json}}\ndatasets:\n- <<: {merged}\n")
        refused(path, "line 3", "<< is not taken", read=read_mixture)
    path = saved(tmp_path / "mix.yaml", "datasets:\n- {json_path: a.json, sampling_strategy: &s 'first:5'}\n"
                                        "- {json_path: b.json, sampling_strategy: *s}\n")
    assert [strategy for _, strategy in read_mixture(path)] == ["first:5"] * 2


# --- samples ---

def fault(sample):
    """The SampleError of a sample, whose message is one line with a mend."""
    with pytest.raises(SampleError) as error:
        conversation(sample)
    assert "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize("key", ["images", "Images", "image_path", "imagePath", "image-paths", "image_file",
                                 "image_url", "img", "image_1", "picture", "image_names", "image_file_name", "Image"])
@pytest.mark.parametrize("value", ["p.png", ["p.png"], ["p.png", "q.png"], {"url": "p.png"}], ids=str)
def test_a_picture_under_another_key(key, value):
    for text in ("Q", "<image>\nQ"):
        for error in (fault(talk(text, "A", **{key: value})), fault(talk(text, "A", image=None, **{key: value}))):
            assert error.kind == "wrong key" and key in str(error) and "call it image" in str(error)
    entries = talk("Q", "A")["conversations"]
    assert "turn 1 has" in str(fault({"conversations": [{**entries[0], key: value}, entries[1]]}))


def test_a_picture_in_a_turn():
    entries = talk("Q", "A")["conversations"]
    assert fault({"conversations": [{**entries[0], "image": "p.png"}, entries[1]]}).kind == "wrong key"


@pytest.mark.parametrize("key", ["video", "videos", "video_path", "Video"])
def test_a_film(key):
    for more in ({}, {"image": "p.png"}):
        text = "<image>\nQ" if more else "Q"
        if not more or "path" not in key:  # beside an image a path is a note: where it was taken from
            assert fault(talk(text, "A", **more, **{key: "x.mp4"})).kind == "video"
    assert fault(talk("<video>\nQ", "A")).kind == fault(talk("<image> <video>\nQ", "A", image="p.png")).kind == "video"


@pytest.mark.parametrize("more", [
    {"id": 5, "model": "gpt", "source": "x", "width": 5, "height": 7},
    {"image_id": 7, "image_size": [2, 3], "num_images": 0}, {"images": [], "video": None, "image_path": ""},
    {"imagery": "x", "videographer": "y", "data": "z", "path": "a"}], ids=str)
def test_other_keys_do_not_matter(more):
    assert conversation(talk("Q", "A", **more))[1:] == (["Q", "A"], [])
    assert conversation(talk("<image>\nQ", "A", image="p.png", image_url="http://p", **more))[2] == ["p.png"]


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}, {"image": []}], ids=str)
@pytest.mark.parametrize("turns", [("<image>\nQ", "A"), ("What is <image>?", "A"), ("Q", "see <image>"),
                                   ("Q", "A", "<image>", "B")])
def test_a_placeholder_without_a_picture(image, turns):
    error = fault(talk(*turns, **image))
    assert error.kind == "placeholders" and "1 <image> in the text for 0 images" in str(error)
    assert conversation(talk(*(x.replace("<image>", "it") for x in turns), **image))[2] == []


@pytest.mark.parametrize("image", [0, False, 5, True, {}, {"path": "p"}, [None], [["p.png"]], ["p.png", 5]], ids=str)
def test_a_picture_that_is_no_path(image):
    assert fault(talk("Q", "A", image=image)).kind == "malformed line"


def test_the_system_line():
    assert conversation(talk("Q", "A", system="Be brief."))[0] == "Be brief."
    usual = conversation(talk("Q", "A"))[0]
    assert usual and conversation(talk("Q", "A", system=""))[0] == conversation(talk("Q", "A", system=None))[0] == usual
    turn = {"from": "system", "value": "Be brief."}
    entries = talk("Q", "A", "Q", "A")["conversations"]
    first = {"conversations": [turn, *entries]}
    assert conversation(first)[0] == conversation({**first, "system": "Be brief."})[0] == "Be brief."
    assert fault({**first, "system": "Be long."}).kind == "turns"
    for i in range(1, 5):
        error = fault({"conversations": [*entries[:i], turn, *entries[i:]]})
        assert error.kind == "turns" and f"turn {i + 1} is a system turn" in str(error)
    assert "turn 2" in str(fault({"conversations": [turn, turn, *entries]}))
    for other in (5, 0, False, [], ["Be brief."], {"a": "b"}):
        assert "system" in str(fault(talk("Q", "A", system=other)))
    assert fault(talk("<image>", "A", image="p.png", system="<image>")).kind == "placeholders"


@pytest.mark.parametrize("answer", ["<image>", " <image>\n", "<image><image>"])
def test_an_answer_that_is_an_image(answer):
    error = fault(talk("Q", answer, image=["p.png"] * answer.count("<image>")))
    assert error.kind == "empty answer" and "image alone" in str(error)
    assert fault(talk("Q", "A", "Q", answer)).kind == "empty answer"


@pytest.mark.parametrize("value, shown", [
    (5, "5"), (0, "0"), (1.5, "1.5"), (True, "true"), (None, "null"), (["A"], "a list"), ({"text": "A"}, "an object"),
    (float("nan"), "NaN")])
def test_values_that_are_no_text_are_shown(value, shown):
    for i in range(4):
        for key, other in (("value", "content"), ("from", "role")):
            sample = talk("Q", "A", "Q", "A")
            sample["conversations"][i][key] = value
            assert str(fault(sample)).startswith(f"turn {i + 1}: {key} {shown} is no text")
            del sample["conversations"][i][key]
            assert str(fault(sample)).startswith(f"turn {i + 1} has neither {key} nor {other}")
        sample = talk("Q", "A", "Q", "A")
        sample["conversations"][i] = value
        assert str(fault(sample)).startswith(f"turn {i + 1} ")
    assert "conversations is" in str(fault({"conversations": value})) or isinstance(value, list)
    assert '"bot"' in str(fault({"conversations": [{"from": "bot", "value": "Q"}]}))


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_halves_of_characters(half):
    for sample in (talk(half, "A"), talk("Q", half), talk("Q", "A", system=half), talk("<image>", "A", image=half),
                   talk("<image>" * 2, "A", image=["p.png", half])):
        assert fault(sample).kind == "malformed line" and "half a character" in str(fault(sample))
    assert "NUL" in str(fault(talk("<image>", "A", image="p\0.png")))
    assert conversation(talk("\U0001f600", "A"))[1] == ["\U0001f600", "A"]


@pytest.mark.parametrize("text, what", [
    (b"[" * 99_999 + b"]" * 99_999, "nested too deeply"),
    (b'{"a": ' * 99_999 + b"1" + b"}" * 99_999, "nested too deeply"), (b'{"id": ' + b"7" * 5000 + b"}", "digits"),
    (b'{"id": "\xff"}', "byte 8 of the file"), (b'{"id": 1', "not valid JSON"), (b'{"id": 1} {}', "not valid JSON"),
    (b"5", "5 instead of a JSON object"), (b"null", "null instead"), (b"{\0}", "JSON"),
    (b'"' + b"x" * 999 + b'"', "instead of")], ids=range(10))
def test_one_sample_that_cannot_be_read(text, what, tmp_path):
    good = json.dumps(talk("Q", "A")).encode()
    found = samples(saved(tmp_path / "a.jsonl", b"\n".join([good, text, good])))
    where = len(good) + 1 if "byte" in what else 0
    what = what.replace("byte 8 of the file", f"byte {where + 8} ")
    assert len(found) == 3 and not isinstance(found[0], SampleError) and not isinstance(found[2], SampleError)
    assert found[1].kind == "malformed line" and what in str(found[1]) and len(str(found[1])) < 200
    assert "\n" not in str(found[1])


# --- the command line ---

def called(capsys, *words):
    """(exit status, stdout, last line of stderr) of python -m llava."""
    status = 0
    try:
        run(lambda: main([str(word) for word in words]))
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err.strip().splitlines()[-1] if err.strip() else ""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(tiny.config().to_json())
    tiny.tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    return tmp_path / "m"


@pytest.mark.parametrize("bad", [0, 1, 5])
def test_check_ends_with_1_if_anything_is_wrong(bad, tmp_path, capsys, model):
    path = written(tmp_path / "a.jsonl", ROWS[bad:] + [talk("Q", 5)] * bad, lines=True)
    status, out, _ = called(capsys, "--check", path, "--model", model, "--workers", 0)
    assert status == (bad > 0) and f"{5 - bad} can be learned from, {bad} cannot" in out
    assert ("malformed line" in out) == ("turn 2: value 5" in " ".join(out.split())) == (bad > 0)


def test_show_of_what_cannot_be_shown(tmp_path, capsys, model):
    path = written(tmp_path / "a.json", [ROWS[0], talk("Q", 5), [["from"]]])
    for i, what in ((1, "turn 2: value 5"), (2, "a list")):
        status, out, line = called(capsys, "--show", path, "--index", i, "--model", model)
        assert (status, out) == (2, "") and line.startswith(f"error: {path}, sample {i}: {what}")


def test_show_marks_targets_without_colours_in_a_pipe(tmp_path, capsys, model):
    worlds.write(tmp_path)
    found = samples(tmp_path / "data.json")
    for i in range(6):
        status, out, _ = called(capsys, "--show", tmp_path / "data.json", "--index", i, "--model", model)
        answers = [turn["value"] for turn in json.loads((tmp_path / "data.json").read_text())[i]["conversations"][1::2]]
        assert status == 0 and "\033" not in out and out.count("[image:") == len(found[i].prompt.images)
        assert [x.split("]]")[0] for x in out.split("[[")[1:]] == [f"{answer}<|im_end|>" for answer in answers]
    assert "[[...]]" in subprocess.run([sys.executable, "-m", "llava", "--help"], capture_output=True, text=True).stdout
