"""Training files: what a sample becomes, which errors it can have, and that nothing else is lost."""
import json
import random
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import data
import pictures
from cli import run
from config import Plan
from llava.__main__ import check, main
from llava.batches import ConversationBatches
from llava.index import JsonIndex
from llava.mixtures import expand_braces, read_mixture, subsample
from llava.samples import KINDS, Samples, conversation, eval_questions, reference_prompt, step_indices
from pictures import SampleError
from tests import tiny, worlds

NASTY = ['{"a": [1, 2]}', "quote \" and \\ and \\\" end", "},{][", "ünïcode ☃", "line\nbreak\ttab", ""]


def samples(path, **options):
    return Samples(path, None, tiny.tokenizer(), tiny.config(), **options)


def talk(*turns, **more):
    """A sample of these turns, question and answer in turn."""
    entries = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"conversations": entries, **more}


def written(path, rows, lines=False):
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return path


# --- files ---

@pytest.mark.parametrize("style", ["tight", "wide", "lines"])
def test_samples_are_those_of_the_json_module(style, tmp_path):
    rng = random.Random(style)
    rows = [{"id": i, "deep": [[{"x": rng.choice(NASTY)}]], rng.choice(NASTY): rng.choice(NASTY)} for i in range(50)]
    path = tmp_path / ("a.jsonl" if style == "lines" else "a.json")
    if style == "lines":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=2 if style == "wide" else None, ensure_ascii=False), encoding="utf-8")
    index = JsonIndex(path)
    assert [index[i] for i in range(len(index))] == rows


def test_the_index_is_used_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    path = written(tmp_path / "a.jsonl", [{"n": i} for i in range(5)], lines=True)
    scans, real = [], JsonIndex._scan
    monkeypatch.setattr(JsonIndex, "_scan", lambda self: scans.append(1) or real(self))
    assert len(JsonIndex(path)) == len(JsonIndex(path)) == 5 and len(scans) == 1
    written(path, [{"n": i} for i in range(7)], lines=True)
    assert JsonIndex(path)[6] == {"n": 6} and len(scans) == 2
    (tmp_path / "a.jsonl.index.npy").write_bytes(b"broken")
    assert len(JsonIndex(path)) == 7 and len(scans) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.index.npy"]


def test_a_million_lines_stay_on_the_disk(tmp_path):
    path = tmp_path / "big.jsonl"
    line = json.dumps(talk("What is this, and what is that? " * 4, "x" * 40))
    with open(path, "w") as file:
        file.writelines(f'{{"id": {i}, {line[1:]}\n' for i in range(10**6))
    JsonIndex(path)
    code = (f"import re\nfrom llava.samples import Samples\ns = Samples({str(path)!r}, None, None, None)\n"
            "assert len(s) == 10**6 and s.raw(999999)[1][1] == 'x' * 40\n"
            "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])")
    peak = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(peak) < 300 * 1024


def test_a_list_that_is_cut_off_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([talk("Q", "A")] * 3)[:-9])
    with pytest.raises(ValueError, match="cut off"):
        JsonIndex(path)


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
    found = read_mixture(tmp_path / "mix.yaml")
    assert [str(f) for f, _ in found] == files
    assert [s for _, s in found] == ["first:25%", "end:2", "end:2", "all", "all"]
    questions = [s.raw(i)[1][0] for s in [samples(tmp_path / "mix.yaml")] for i in range(len(s))]
    assert questions == ["a 0", "a 1", "a 2", "b 5", "b 6", "c 3", "c 4", *(f"a {i}" for i in range(10)),
                         *(f"c {i}" for i in range(5))]
    as_json = {"datasets": [{"json_path": f, "sampling_strategy": s} for f, (_, s) in zip(files, found)]}
    assert read_mixture(written(tmp_path / "mix.json", as_json)) == found
    assert read_mixture(tmp_path / "a.json") == [(tmp_path / "a.json", "all")]
    lines = [json.dumps(talk(f"q {i}", "A")) for i in range(3)]
    (tmp_path / "lines.json").write_text("\n".join(lines))  # one a line, whatever the name says
    assert read_mixture(tmp_path / "lines.json") == [(tmp_path / "lines.json", "all")]
    assert len(samples(tmp_path / "lines.json")) == 3
    (tmp_path / "mix.yaml").write_text("datasets:\n  - json_path: a.json\n    oops\n")
    with pytest.raises(ValueError, match="line 3"):
        read_mixture(tmp_path / "mix.yaml")


@pytest.mark.parametrize("text, files", [
    ("datasets:\n- json_path: a.json # one\n- {json_path: 'b # c.json'}\n", ["a.json", "b # c.json"]),
    ("# first\n---\n'datasets':\n    -   json_path: \"tab\\tü.json\"\n", ["tab\tü.json"]),
    ("\ufeffdatasets: [{json_path: a.json, sampling_strategy: }]\n", ["a.json"]),
    ("datasets:\n  - json_path: many/{a,{b,c}/d}.json\n", ["many/a.json", "many/b/d.json", "many/c/d.json"]),
    ('datasets:\n  - json_path: "{a, b}/{c}.json"\n', ["a/c.json", "b/c.json"])])
def test_yaml_mixtures(text, files, tmp_path):
    (tmp_path / "mix.yml").write_text(text, encoding="utf-8")
    assert read_mixture(tmp_path / "mix.yml") == [(tmp_path / file, "all") for file in files]


@pytest.mark.parametrize("text, named", [
    ("datasets:\n  - json_path: a.json\n  sampling_strategy: all\n", "line 3"),
    ("datasets:\n  - json_path: 'a.json\n  - json_path: b.json\n", "line 2"),
    ("datasets:\n\t- json_path: a.json\n", "line 2"), ("datasets:\n  - json_path: {a,b}.json\n", "line 2"),
    ("datasets:\n  - json_path: a.json\n    json_path: b.json\n", "line 3"),
    ("datasets:\n  - json_path: a.json\ndatasets:\n  - json_path: b.json\n", "line 3"),
    ("datasets:\n  - json_path: !!python/name:os.system\n", "line 2"), ("datasets:\n  - json_path: \0\n", "line 2"),
    ("datasets:\n  - json_path: a.json\n---\ndatasets:\n", "line 3"), ("a: 2000-13-01", "not valid YAML"),
    ("- json_path: a.json\n", "a mixture has datasets"), ("", "a mixture has datasets"),
    ("datasets: a.json\n", "a mixture has datasets"), ("datasets: []\n", "datasets is empty"),
    ("datasets:\n  - a.json\n", r"datasets\[0\] has no json_path"),
    ("datasets:\n  - json_path: a.json\n  - json_path: [b.json]\n", r"datasets\[1\] has no json_path")])
def test_broken_yaml_is_one_line_that_names_the_place(text, named, tmp_path):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"mix.yaml.*{named}") as error:
        read_mixture(tmp_path / "mix.yaml")
    assert "\n" not in str(error.value)


def test_yaml_that_is_not_utf_8(tmp_path):
    (tmp_path / "mix.yaml").write_bytes("datasets:\n  - json_path: ü.json\n".encode("latin-1"))
    with pytest.raises(ValueError, match="mix.yaml, line 2: not UTF-8"):
        read_mixture(tmp_path / "mix.yaml")


def test_broken_json_mixtures(tmp_path):
    for rows in ({"datasets": {"json_path": "a.json"}}, {"a": 1}, {"datasets": ["a.json"]}, {"datasets": [{}]}):
        with pytest.raises(ValueError, match="mix.json"):
            read_mixture(written(tmp_path / "mix.json", rows))


def test_unknown_keys_are_named(tmp_path, capsys):
    (tmp_path / "mix.yaml").write_text("datasets:\n- json_path: a.json\n  weight: 2\n  1: 2\nname: x\n")
    assert read_mixture(tmp_path / "mix.yaml") == [(tmp_path / "a.json", "all")]
    assert "1, name, weight not used; known are json_path and sampling_strategy" in capsys.readouterr().err


def test_braces():
    for path, names in (("a", "a"), ("{a}", "a"), ("{a,b}{c,d}", "ac ad bc bd"), ("x{a,b{c,d}e}", "xa xbce xbde"),
                        ("{a,}b", "ab b"), ("{{a,b},c}", "a b c"), ("a{b", "a{b"), ("a}b,c", "a}b,c"), ("{a", "{a")):
        assert expand_braces(path) == names.split()


def test_sampling_strategies():
    def take(n, s, seed=0):
        return subsample(n, s, np.random.default_rng(seed)).tolist()
    assert take(7, "all") == list(range(7)) and take(7, "first:3") == [0, 1, 2] and take(7, "end:3") == [4, 5, 6]
    assert take(7, "first:10%") == [0] and take(7, "end:50%") == [3, 4, 5, 6] and take(3, "first:9") == [0, 1, 2]
    drawn = take(100, "random:30%")
    assert len(set(drawn)) == 30 and drawn == take(100, "random:30%") != take(100, "random:30%", 1)
    for bad in ("first", "first:x", "some:3", "first:-1"):
        with pytest.raises(ValueError, match="sampling_strategy"):
            take(7, bad)


def test_every_sample_comes_once_in_every_epoch():
    drawn = [i for step in range(15) for i in step_indices(20, 8, 3, step)]
    assert all(sorted(drawn[k:k + 20]) == list(range(20)) for k in range(0, 120, 20))
    assert drawn[:20] != drawn[20:40]
    assert step_indices(20, 8, 3, 4) == drawn[32:40] and step_indices(20, 8, 4, 0) != drawn[:8]


# --- samples ---

def llava_labels(turns, tokenizer):
    """preprocess_qwen of LLaVA-NeXT, written down slowly, of a text without images."""
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
    targets = t.decode([x for x in ours.labels if x >= 0], skip_special_tokens=False)
    assert targets == "No.\nBlue<|im_end|>Yes<|im_end|>"
    tiny.image(50, 40).save(tmp_path / "x.png")
    path = written(tmp_path / "b.json", [talk("What is <image> this?", *turns[1:], image="x.png")])
    prompt, labels = samples(path, rule="llava")[0][:2]
    whole = data.chatml(["\nWhat is  this?", *turns[1:]])
    assert t.decode(prompt.ids, skip_special_tokens=False) == whole  # the image stands before it
    k = next(i for i in range(1, len(prompt.ids)) if prompt.t_pos[i] != prompt.t_pos[i - 1] + 1)
    assert t.decode(prompt.ids[:k]).endswith("user\n") and labels[k] == t.encode("\n").ids[0]


def test_placeholders_stand_where_llava_puts_them():
    def first(text, n=1):
        return conversation(talk(text, "A", image=["x.png"] * n))[1][0]
    assert first("<image>\nQ") == "<image>\nQ" and first("Q <image>") == "<image>\nQ" and first("<image>") == "<image>"
    assert first("a <image> b <image>", 2) == "a <image> b <image>"
    mixed = conversation({"conversations": [{"role": "system", "content": "Be brief."}, {"from": "gpt", "value": "Hi"},
                                            {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    assert mixed == ("Be brief.", ["Q", "A"], [])


ERRORS = {
    "malformed line": [["a", "list"], {"conversations": "no"}, {"conversations": [{"from": "human"}]}, {"id": 1},
                       talk("\ud800", "A"), {"conversations": [{"from": ["human"], "value": "Q"}] * 2}],
    "turns": [talk("Q"), talk(), talk("Q", "A", "Q")],
    "empty answer": [talk("Q", ""), talk("Q", "A", "Q", " \n")],
    "wrong key": [talk("Q", "A", images=["0.png"]), talk("<image>\nQ", "A", image_path="0.png")],
    "placeholders": [talk("Q", "A", image="0.png"), talk("What is <image>?", "A"),
                     talk("<image>", "A", image=["0.png", "1.png"]),
                     talk("<image> <image>", "A", image="0.png")],
    "video": [talk("<image>\nQ", "A", video="x.mp4")],
    "missing image": [talk("<image>\nQ", "A", image="nothing.png"), talk("<image>\nQ", "A", image="."),
                      talk("<image>\nQ", "A", image="x" * 300)],
    "broken image": [talk("<image>\nQ", "A", image="text.png"), talk("<image>\nQ", "A", image="cut.png")],
    "oversized image": [talk("<image>\nQ", "A", image="huge.png"),
                          talk("<image><image>\nQ", "A", image=["long.png", "0.png"])],
    "too long": [talk("Q " * 400, "A")],
}


@pytest.fixture
def broken_file(tmp_path):
    """(path, {kind: numbers}) of a file of 24 good samples with all of ERRORS between them, and a broken line."""
    rows = json.loads(worlds.write(tmp_path).read_text())
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    tiny.image(1, 1).resize((30000, 30)).save(tmp_path / "long.png")
    from PIL import Image
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    lines = [(None, json.dumps(r)) for r in rows]
    lines += [(kind, json.dumps(r)) for kind, bad in ERRORS.items() for r in bad] + [("malformed line", '{"a": ')]
    random.Random(5).shuffle(lines)
    path = tmp_path / "broken.jsonl"
    path.write_text("\n".join(line for _, line in lines))
    return path, [kind for kind, _ in lines]


def test_planted_errors_are_exactly_those_found(broken_file):
    path, kinds = broken_file
    found = samples(path, max_tokens=400)
    assert [x.kind if isinstance(x, SampleError) else None for x in map(found.__getitem__, range(len(found)))] == kinds
    table, errors = check(found, 0)
    assert errors == len(kinds) - kinds.count(None)
    assert f"{kinds.count(None)} can be learned from" in table.splitlines()[0]
    counted = {m[2]: int(m[1]) for m in re.finditer(r"^ +(\d+)  ([a-z ]+), for instance", table, re.MULTILINE)}
    assert counted == {k: n for k, n in Counter(kinds).items() if k} and set(counted) == set(KINDS)


def test_a_long_sample_gets_fewer_tiles_first(tmp_path):
    tiny.image(200, 90).save(tmp_path / "x.png")
    path = written(tmp_path / "a.json", [talk("<image>\nQ", "yes", image="x.png")])
    whole = samples(path)[0]
    text, most = len(whole.prompt.ids), whole.prompt.end
    sizes = set()
    for limit in range(most, text, -7):
        found = samples(path, max_tokens=limit)[0]
        if isinstance(found, SampleError):
            assert found.kind == "too long" and limit < min(sizes)
            continue
        assert found.prompt.end <= limit and found.prompt.ids == whole.prompt.ids and found.labels == whole.labels
        assert len(found.prompt.images[0].pixels) == found.prompt.images[0].tiling.tiles
        sizes.add(found.prompt.end)
    assert len(sizes) > 3 and max(sizes) == most


def test_questions_for_the_router_are_those_about_single_images(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        worlds.write(tmp_path / name)
    (tmp_path / "a" / "0.png").unlink()
    (tmp_path / "mix.yaml").write_text("datasets:\n  - json_path: '{a,b}/data.json'\n")
    every = samples(tmp_path / "mix.yaml")
    questions = eval_questions(every, 4)
    assert len(questions) == 8 and re.match(r"\d+ samples cannot be used, as .*0.png", capsys.readouterr().err)
    rows = json.loads((tmp_path / "a" / "data.json").read_text())
    single = [x for x in rows if "image" in x and (isinstance(x["image"], str) or len(x["image"]) == 1)]
    pairs = {tuple(turn["value"] for turn in x["conversations"][:2]) for x in single}
    subsets = [str(tmp_path / name / "data") for name in "ab"]  # by path, as both files are called data.json
    for k, (image, [(subset, question, answer)]) in enumerate(questions):
        assert subset == subsets[k // 4] and image.is_file() and (f"<image>\n{question}", answer) in pairs
    results = [{"image": k, "task": subset} for k, (_, [(subset, *_)]) in enumerate(questions)]
    groups, text_tokens, size = reference_prompt(every, questions, results)
    assert groups == {"all": subsets} and size == pictures.load_image(questions[0][0]).size
    assert text_tokens == len(tiny.tokenizer().encode(data.chatml([questions[0][1][0][1]])).ids)
    text = samples(written(tmp_path / "text.json", [talk("Q", "A")]))
    with pytest.raises(ValueError, match="no question about a single image"):
        eval_questions(text, 4)


# --- batches ---

def batches_of(path, out, rank=0, size=1, stage=2, **settings):
    """ConversationBatches of a file, without a model: one process of several, which hears nothing of the others."""
    settings = {"batch_size": 6, "micro_batch_size": 2, "seed": 0, "workers": 0, "overfit": False, "max_bad": 0.01,
                "fsdp": False, "steps": 1000, **settings}
    alone = SimpleNamespace(rank=rank, size=size, sum=lambda *numbers: numbers, gather=lambda thing: [thing],
                            wrap=lambda model, fsdp: (None, None))
    model = SimpleNamespace(config=tiny.config(sa=(1, 4), viable=[(), (1,), (4,), (1, 4)], overview=[(1,)]))
    return ConversationBatches(model, stage, samples(path), settings, out, alone)


def test_plans_are_drawn_uniformly_by_seed_and_step(tmp_path):
    path = worlds.write(tmp_path)
    drawn = [batches_of(path, tmp_path).plan(step) for step in range(400)]
    counts = Counter(drawn)
    assert set(counts) == {Plan((1,), "overview"), Plan(()), Plan((1,)), Plan((4,)), Plan((1, 4))}
    assert min(counts.values()) > 50
    assert drawn == [batches_of(path, tmp_path).plan(step) for step in range(400)]
    assert drawn != [batches_of(path, tmp_path, seed=1).plan(step) for step in range(400)]
    assert batches_of(path, tmp_path, stage=0).plan(7) == Plan((0, 1, 2, 3, 4, 5))


def test_ranks_share_the_samples_of_a_step(tmp_path):
    path = worlds.write(tmp_path)

    def first_steps(rank, size, first=2, **settings):
        steps = batches_of(path, tmp_path, rank, size, **settings).batches(first)
        return [[i for i, _ in next(steps)] for _ in range(3)]
    shares = [first_steps(rank, 4) for rank in range(4)]
    assert [len(step) for share in shares for step in share] == [2] * 6 + [1] * 6
    for k in range(3):
        assert sorted(i for share in shares for i in share[k]) == sorted(step_indices(24, 6, 0, 2 + k))
    assert first_steps(1, 2, workers=2) == first_steps(1, 2) and first_steps(6, 7) == [[], [], []]
    assert first_steps(0, 1, overfit=True) == [step_indices(24, 6, 0, 0)] * 3


def test_too_many_errors_end_a_training(tmp_path):
    path = written(tmp_path / "a.json", [talk("Q", "A")] * 9 + [talk("Q", "")])
    items = [(i, samples(path)[i]) for i in (9, 0)]
    with pytest.raises(ValueError, match="1 of 10 samples cannot be used, more than --max-bad 0.01.*sample 9: an an"):
        next(batches_of(path, tmp_path).losses(items, Plan(()), 0))
    row, = map(json.loads, open(tmp_path / "bad.jsonl"))
    assert (row["stage"], row["step"], row["number"], row["kind"]) == (2, 1, 9, "empty answer")
    again = batches_of(path, tmp_path, max_bad=0.1)
    again.record_errors(items[:1], 3)  # known already
    assert len(open(tmp_path / "bad.jsonl").readlines()) == 1 and list(again.bad) == [9]
    assert not batches_of(path, tmp_path, stage=1).bad


# --- the command line ---

def test_show_has_the_whole_text_and_learned_tokens_in_green(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    worlds.write(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(tiny.config().to_json())
    tiny.tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    for i in range(8):
        main(["--show", str(tmp_path / "data.json"), "--index", str(i), "--model", str(tmp_path / "m")])
        out = capsys.readouterr().out.split("\n", 2)[2]
        sample = samples(tmp_path / "data.json")[i]
        green = "".join(re.findall(r"\033\[32m(.*?)\033\[0m", out, re.DOTALL))
        t = tiny.tokenizer()
        assert green == t.decode([x for x in sample.labels if x >= 0], skip_special_tokens=False)
        plain = re.sub(r"\033\[\d+m|\[image:.*?\]", "", out).removesuffix("\n")
        assert plain == t.decode(sample.prompt.ids, skip_special_tokens=False)
        assert out.count("[image:") == len(sample.prompt.images)


@pytest.mark.parametrize("words, named", [
    (["--show", "nowhere.json"], "nowhere.json"), (["--check", "mix.yaml"], "mix.yaml"), ([], "--show"),
    (["--show", "data.json", "--index", "99"], "--index"), (["--show", "data.json", "--model", "m"], "m/")])
def test_bad_input_is_one_line(words, named, tmp_path, capsys, monkeypatch):
    worlds.write(tmp_path)
    (tmp_path / "mix.yaml").write_text("datasets:\n")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(lambda: main(words))
    err = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and err[-1].startswith("error: ") and named in err[-1]
