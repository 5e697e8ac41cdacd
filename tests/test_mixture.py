"""Training files: what a sample becomes, what is a fault, and that nothing else is lost."""
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import data
import mixture
from config import run
from data import IMAGE, Fault
from mixture import Records, Samples, conversation, entries, plan, sampled
from tests import tiny, worlds

NASTY = ['{"a": [1, 2]}', "quote \" and \\ and \\\" end", "},{][", "ünïcode ☃", "line\nbreak\ttab", ""]


def samples(path, **how):
    return Samples(path, None, tiny.tokenizer(), tiny.config(), **how)


def talk(*turns, **more):
    """A sample of these turns, question and answer in turn."""
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"conversations": said, **more}


def written(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


# --- files ---

@pytest.mark.parametrize("style", ["tight", "wide", "lines"])
def test_records_are_those_of_the_json_module(style, tmp_path):
    rng = random.Random(style)
    rows = [{"id": i, "deep": [[{"x": rng.choice(NASTY)}]], rng.choice(NASTY): rng.choice(NASTY)} for i in range(50)]
    path = tmp_path / ("a.jsonl" if style == "lines" else "a.json")
    if style == "lines":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=2 if style == "wide" else None, ensure_ascii=False), encoding="utf-8")
    records = Records(path)
    assert [records[i] for i in range(len(records))] == rows


def test_the_index_is_used_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl", [{"n": i} for i in range(5)], lines=True)
    scans, real = [], Records._scan
    monkeypatch.setattr(Records, "_scan", lambda self: scans.append(1) or real(self))
    assert len(Records(path)) == len(Records(path)) == 5 and len(scans) == 1
    written(path, [{"n": i} for i in range(7)], lines=True)
    assert Records(path)[6] == {"n": 6} and len(scans) == 2
    (tmp_path / "a.jsonl.index.npy").write_bytes(b"broken")
    assert len(Records(path)) == 7 and len(scans) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index.npy"]


def test_a_million_lines_stay_on_the_disk(tmp_path):
    path = tmp_path / "big.jsonl"
    line = json.dumps(talk("What is this, and what is that? " * 4, "x" * 40))
    with open(path, "w") as file:
        file.writelines(f'{{"id": {i}, {line[1:]}\n' for i in range(10**6))
    Records(path)
    code = (f"import re, mixture; s = mixture.Samples({str(path)!r}, None, None, None)\n"
            "assert len(s) == 10**6 and s.raw(999999)[1][1] == 'x' * 40\n"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])")
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(peak) < 300 * 1024


def test_a_list_that_is_cut_off_is_said_so(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([talk("Q", "A")] * 3)[:-9])
    with pytest.raises(ValueError, match="cut off"):
        Records(path)


def test_mixtures(tmp_path):
    for name, n in (("a", 10), ("b", 7), ("c", 5)):
        written(tmp_path / f"{name}.json", [talk(f"{name} {i}", "A") for i in range(n)])
    (tmp_path / "mix.yaml").write_text(f"""# what we train on
datasets:
  - json_path: {tmp_path}/a.json
    sampling_strategy: "first:25%"   # rounded up
  - json_path: '{tmp_path}/{{b,c}}.json'
    sampling_strategy: end:2
  - json_path: a.json

  -
    sampling_strategy: all
    json_path: "c.json"
""")
    files = [str(tmp_path / f"{x}.json") for x in "abcac"]
    found = entries(tmp_path / "mix.yaml")
    assert [str(f) for f, _ in found] == files
    assert [s for _, s in found] == ["first:25%", "end:2", "end:2", "all", "all"]
    questions = [s.raw(i)[1][0] for s in [samples(tmp_path / "mix.yaml")] for i in range(len(s))]
    assert questions == ["a 0", "a 1", "a 2", "b 5", "b 6", "c 3", "c 4", *(f"a {i}" for i in range(10)),
                         *(f"c {i}" for i in range(5))]
    as_json = {"datasets": [{"json_path": f, "sampling_strategy": s} for f, (_, s) in zip(files, found)]}
    assert entries(written(tmp_path / "mix.json", as_json)) == found
    assert entries(tmp_path / "a.json") == [(tmp_path / "a.json", "all")]
    lines = [json.dumps(talk(f"q {i}", "A")) for i in range(3)]
    (tmp_path / "lines.json").write_text("\n".join(lines))  # one a line, whatever the name says
    assert entries(tmp_path / "lines.json") == [(tmp_path / "lines.json", "all")]
    assert len(samples(tmp_path / "lines.json")) == 3
    (tmp_path / "mix.yaml").write_text("datasets:\n  - json_path: a.json\n    oops\n")
    with pytest.raises(ValueError, match="line 3"):
        entries(tmp_path / "mix.yaml")


def test_sampling_strategies():
    def take(n, s, seed=0):
        return sampled(n, s, np.random.default_rng(seed)).tolist()
    assert take(7, "all") == list(range(7)) and take(7, "first:3") == [0, 1, 2] and take(7, "end:3") == [4, 5, 6]
    assert take(7, "first:10%") == [0] and take(7, "end:50%") == [3, 4, 5, 6] and take(3, "first:9") == [0, 1, 2]
    drawn = take(100, "random:30%")
    assert len(set(drawn)) == 30 and drawn == take(100, "random:30%") != take(100, "random:30%", 1)
    for bad in ("first", "first:x", "some:3", "first:-1"):
        with pytest.raises(ValueError, match="sampling_strategy"):
            take(7, bad)


def test_every_sample_comes_once_in_every_epoch():
    drawn = [i for step in range(15) for i in plan(20, 8, 3, step)]
    assert all(sorted(drawn[k:k + 20]) == list(range(20)) for k in range(0, 120, 20))
    assert drawn[:20] != drawn[20:40] and plan(20, 8, 3, 4) == drawn[32:40] and plan(20, 8, 4, 0) != drawn[:8]


# --- samples ---

def llava_labels(turns, tokenizer):
    """preprocess_qwen of LLaVA-NeXT, written down slowly, of a text without pictures."""
    ids, labels = [], []
    newline = tokenizer.encode("\n").ids[0]
    for role, text in [("system", data.SYSTEM), *((("user", "assistant")[i % 2], t) for i, t in enumerate(turns))]:
        new = tokenizer.encode(f"<|im_start|>{role}\n{text}<|im_end|>\n").ids
        ids += new
        labels += new if role == "assistant" else [-1] * len(new)
    for i, x in enumerate(ids):
        if x in (newline, tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")):
            labels[i] = x
    return ids, labels


def test_label_rules(tmp_path):
    t, turns = tiny.tokenizer(), ["Is it\nred?\n\n", "No.\nBlue", "Sure?", "Yes"]
    path = written(tmp_path / "a.json", [talk(*turns)])
    ids, labels = llava_labels(turns, t)
    llava, ours = samples(path, rule="llava")[0], samples(path)[0]
    assert llava.prompt.ids == ours.prompt.ids == ids and llava.labels == labels
    said = t.decode([x for x in ours.labels if x >= 0], skip_special_tokens=False)
    assert said == "No.\nBlue<|im_end|>Yes<|im_end|>"
    tiny.image(50, 40).save(tmp_path / "x.png")
    path = written(tmp_path / "b.json", [talk("What is <image> this?", *turns[1:], image="x.png")])
    prompt, labels = samples(path, rule="llava")[0][:2]
    whole = data.chatml(["\nWhat is  this?", *turns[1:]])
    assert t.decode(prompt.ids, skip_special_tokens=False) == whole  # the picture stands before it
    k = next(i for i in range(1, len(prompt.ids)) if prompt.t_pos[i] != prompt.t_pos[i - 1] + 1)
    assert t.decode(prompt.ids[:k]).endswith("user\n") and labels[k] == t.encode("\n").ids[0]


def test_placeholders_stand_where_llava_puts_them():
    def first(text, n=1):
        return conversation(talk(text, "A", image=["x.png"] * n))[1][0]
    assert first("<image>\nQ") == "<image>\nQ" and first("Q <image>") == "<image>\nQ" and first("<image>") == "<image>"
    assert first("a <image> b <image>", 2) == "a <image> b <image>"
    assert conversation(talk("Why <image>?", "A"))[1:] == (["Why <image>?", "A"], [])
    said = conversation({"conversations": [{"role": "system", "content": "Be brief."}, {"from": "gpt", "value": "Hi"},
                                           {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    assert said == ("Be brief.", ["Q", "A"], [])


def test_text_alone_keeps_a_literal_placeholder(tmp_path):
    found = samples(written(tmp_path / "a.json", [talk("What does <image> mean in <video>?", "A")]))[0]
    assert found.prompt.pictures == [] and IMAGE in tiny.tokenizer().decode(found.prompt.ids)


FAULTS = {
    "malformed line": [["a", "list"], {"conversations": "no"}, {"conversations": [{"from": "human"}]}, {"id": 1}],
    "turns": [talk("Q"), talk(), talk("Q", "A", "Q")],
    "empty answer": [talk("Q", ""), talk("Q", "A", "Q", " \n")],
    "placeholders": [talk("Q", "A", image="0.png"), talk("<image>", "A", image=["0.png", "1.png"]),
                     talk("<image> <image>", "A", image="0.png")],
    "video": [talk("<image>\nQ", "A", video="x.mp4")],
    "missing picture": [talk("<image>\nQ", "A", image="nothing.png"), talk("<image>\nQ", "A", image=".")],
    "broken picture": [talk("<image>\nQ", "A", image="text.png"), talk("<image>\nQ", "A", image="cut.png"),
                       talk("<image>\nQ", "A", image="x" * 300)],
    "oversized picture": [talk("<image>\nQ", "A", image="huge.png"),
                          talk("<image><image>\nQ", "A", image=["long.png", "0.png"])],
    "too long": [talk("Q " * 400, "A")],
    "malformed line": [talk("\ud800", "A"), {"conversations": [{"from": ["human"], "value": "Q"}] * 2}],
}


@pytest.fixture
def faulty(tmp_path):
    """(path, {kind: numbers}) of a file of 24 good samples with all of FAULTS between them, and a broken line."""
    rows = json.loads(worlds.write(tmp_path).read_text())
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    tiny.image(1, 1).resize((30000, 30)).save(tmp_path / "long.png")
    from PIL import Image
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    lines = [(None, json.dumps(r)) for r in rows]
    lines += [(kind, json.dumps(r)) for kind, bad in FAULTS.items() for r in bad] + [("malformed line", '{"a": ')]
    random.Random(5).shuffle(lines)
    path = tmp_path / "faulty.jsonl"
    path.write_text("\n".join(line for _, line in lines))
    return path, [kind for kind, _ in lines]


def test_planted_faults_are_exactly_those_found(faulty):
    path, kinds = faulty
    found = samples(path, max_tokens=400)
    assert [x.kind if isinstance(x, Fault) else None for x in map(found.__getitem__, range(len(found)))] == kinds
    table = mixture.check(found, 0)
    assert f"{kinds.count(None)} can be learned from" in table.splitlines()[0]
    counted = {m[2]: int(m[1]) for m in re.finditer(r"^ +(\d+)  ([a-z ]+), for instance", table, re.MULTILINE)}
    assert counted == {k: n for k, n in Counter(kinds).items() if k} and set(counted) == set(mixture.KINDS)


def test_a_long_sample_gets_fewer_tiles_first(tmp_path):
    tiny.image(200, 90).save(tmp_path / "x.png")
    path = written(tmp_path / "a.json", [talk("<image>\nQ", "yes", image="x.png")])
    whole = samples(path)[0]
    text, most = len(whole.prompt.ids), whole.prompt.end
    sizes = set()
    for limit in range(most, text, -7):
        found = samples(path, max_tokens=limit)[0]
        if isinstance(found, Fault):
            assert found.kind == "too long" and limit < min(sizes)
            continue
        assert found.prompt.end <= limit and found.prompt.ids == whole.prompt.ids and found.labels == whole.labels
        assert len(found.prompt.pictures[0].pixels) == found.prompt.pictures[0].tiling.tiles
        sizes.add(found.prompt.end)
    assert len(sizes) > 3 and max(sizes) == most


# --- the command line ---

def test_show_has_the_whole_text_and_learned_tokens_in_green(tmp_path, capsys):
    worlds.write(tmp_path)
    tiny.model(visor=False).save_pretrained(tmp_path / "m")
    for i in range(8):
        mixture.main(["--show", str(tmp_path / "data.json"), "--index", str(i), "--model", str(tmp_path / "m")])
        out = capsys.readouterr().out.split("\n", 2)[2]
        sample = samples(tmp_path / "data.json")[i]
        green = "".join(re.findall(r"\033\[32m(.*?)\033\[0m", out, re.DOTALL))
        t = tiny.tokenizer()
        assert green == t.decode([x for x in sample.labels if x >= 0], skip_special_tokens=False)
        plain = re.sub(r"\033\[\d+m|\[picture:.*?\]", "", out).removesuffix("\n")
        assert plain == t.decode(sample.prompt.ids, skip_special_tokens=False)
        assert out.count("[picture:") == len(sample.prompt.pictures)


@pytest.mark.parametrize("words, say", [
    (["--show", "nowhere.json"], "nowhere.json"), (["--check", "mix.yaml"], "mix.yaml"), ([], "--show"),
    (["--show", "data.json", "--index", "99"], "--index"), (["--show", "data.json", "--model", "m"], "m/")])
def test_bad_input_is_one_line(words, say, tmp_path, capsys, monkeypatch):
    worlds.write(tmp_path)
    (tmp_path / "mix.yaml").write_text("datasets:\n")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(lambda: mixture.main(words))
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and err[-1].startswith("error: ") and say in err[-1]
