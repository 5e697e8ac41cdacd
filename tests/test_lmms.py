"""paper.lmms without lmms-eval: what it drives, against a stand-in for its interface, and the command around it."""
import abc
import copy
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import sample
from cli import NANO
from paper import evaluate, lmms
from tests import tiny
from tests.test_batch import SIZES, alone, loaded, model, rows_of  # noqa: F401 two are fixtures

FLAGS = ["--batch", "lmms-eval"]


class Base(abc.ABC):
    """As lmms_eval.api.model.lmms."""
    is_simple = None

    def __init__(self):
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


class Registry(dict):
    def register_manifest(self, manifest, overwrite):
        self[manifest.model_id] = manifest


@pytest.fixture
def stand_in(monkeypatch):
    """lmms-eval's modules as far as they are used; gives its program."""
    def module(name, **contents):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(contents)
        return sys.modules[name]
    module("lmms_eval")
    module("lmms_eval.api")
    module("lmms_eval.api.model", lmms=Base)
    module("filelock._api")
    module("lmms_eval.models", MODEL_REGISTRY_V2=Registry(), ModelManifest=lambda model_id, simple_class_path:
           SimpleNamespace(model_id=model_id, simple_class_path=simple_class_path))
    monkeypatch.setattr(sys, "argv", ["lmms"])
    return module("lmms_eval.__main__")


def call(capsys, *words):
    """(exit status, stdout, stderr) of the command with these words, in this process."""
    try:
        sample.run(lambda: lmms.main([str(w) for w in words]))
        status = 0
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def requests(instance, asked):
    """lmms-eval's requests for [(text, images, settings)], which are rows of a task in a split."""
    instance.task_dict["task"] = {"test": asked}
    return [SimpleNamespace(args=(text, how, lambda row: row[1], i, "task", "test"))
            for i, (text, _, how) in enumerate(asked)]


def driven(model, *flags, **how):  # noqa: F811
    return lmms.driven(model, sample.parse([*FLAGS, *flags]))(**how)


# --- what lmms-eval drives ------------------------------------------------------------------------------------------

def test_requests_are_answered_as_sample_answers_each_alone(stand_in, model, loaded, tmp_path):  # noqa: F811
    for k, size in enumerate(SIZES):
        tiny.image(*size, k).save(tmp_path / f"{k}.png")
    paths, pictures = [tmp_path / f"{k}.png" for k in range(4)], [tiny.image(*size, k) for k, size in enumerate(SIZES)]
    short, long = {"max_new_tokens": 3, "until": None}, {"max_new_tokens": 5, "temperature": 0.7, "do_sample": False}
    asked = [("what?", pictures[:1], short), ("without", None, long), ("which?", pictures[:2], short),
             ("is <image> or <image>?", pictures[2:], long), ("where?", [str(paths[3])], short),
             ("who?", [None, pictures[1]], long), ("what?", pictures[2:3], short)]
    of = [paths[:1], [], paths[:2], paths[2:], paths[3:], paths[1:2], paths[2:3]]
    before = copy.deepcopy([how for *_, how in asked])
    instance = driven(model, batch_size="4", device="cpu", max_batch_size=None)
    assert isinstance(instance, Base) and instance.is_simple
    found = instance.generate_until(requests(instance, asked))
    assert sorted(loaded) == [3, 4]  # one batch for each number of tokens
    for (text, _, how), images, answer in zip(asked, of, found):
        tokens = alone(model, (text, images), max_tokens=how["max_new_tokens"])[0]
        assert answer == model.tokenizer.decode(tokens).strip()
    assert len(set(found)) == len(found) and [how for *_, how in asked] == before


def test_a_request_that_cannot_be_asked_costs_no_other(stand_in, model, capsys):  # noqa: F811
    image, how = tiny.image(30, 30), {"max_new_tokens": 2}
    asked = [("hi", [image], how), ("<image> <image>", [image], how), ("hi", ["film.mp4"], how), ("hi", [{}], how),
             ("hi", [image], how)]
    instance = driven(model, "--sa", "1")
    first, *bad, last = instance.generate_until(requests(instance, asked))
    assert first == last != "" and bad == ["", "", ""]
    told, stop = capsys.readouterr().err, first[-1]
    assert instance.generate_until(requests(instance, [("hi", [image], how | {"until": [stop]})])) == [
        lmms.cut(first, stop)] != [first]
    assert told.splitlines()[-1].startswith("3 of 5 requests could not be answered, as: the quest")


def test_flags_decide_what_runs(stand_in, model, monkeypatch):  # noqa: F811
    asked = []
    monkeypatch.setattr(lmms, "answers", lambda m, questions, choose, batch_size, **how: asked.append(
        (choose(10, 20, 20), batch_size, how)) or ())
    settings = {"max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "do_sample": True}
    for flags, how in (([], {}), (["--sa", "1,4"], {"batch_size": "auto:4"})):
        instance = driven(model, *flags, **how)
        instance.generate_until(requests(instance, [("hi", [], settings), ("ho", [], {})]))
    drawn = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "pixels": "all"}
    greedy = {"max_tokens": 1024, "temperature": 0.0, "top_p": 1.0, "pixels": "all"}
    assert asked == [(sa, n, how) for sa, n in ((("auto", None), 1), (((1, 4), None), lmms.AUTO))
                     for how in (drawn, greedy)]


def test_what_the_model_cannot_do_says_so(stand_in, model):  # noqa: F811
    for method in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="no likelihoods"):
            getattr(driven(model), method)([])


@pytest.mark.parametrize("text, until, answer", [
    (" a b\n", None, "a b"), ("a b", [], "a b"), ("a\n\nb", ["\n\n"], "a"), ("a. b, c", [",", "."], "a"),
    ("a b", "b", "a"), ("\n\na", ["\n\n"], "a"), ("a", [""], "a"), ("STOP a", ["STOP"], "")])
def test_answers_end_at_stop_strings(text, until, answer):
    assert lmms.cut(text, until) == answer


# --- the command ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lacking", ["lmms_eval", "filelock._api"])
def test_without_lmms_eval_one_line_says_what_to_install(stand_in, monkeypatch, capsys, lacking):
    monkeypatch.setattr(sample, "load_model", lambda args: pytest.fail("loaded"))
    monkeypatch.delitem(sys.modules, "lmms_eval.__main__")
    if lacking != "lmms_eval":
        monkeypatch.setitem(sys.modules, "lmms_eval.__main__", ModuleType("lmms_eval.__main__"))
    monkeypatch.setitem(sys.modules, lacking, None)
    status, out, err = call(capsys, "--tasks", "quilts")
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and lacking in err and err.endswith(lmms.INSTALL + "\n")


@pytest.mark.parametrize("words, message", [
    (["--sa", "1,99"], "--sa 1,99"), (["--model", "no/such"], "no/such"), (["--reduce", "no"], "--reduce no"),
    (["--pixels", "some"], "argument --pixels: invalid choice"), (["--dtype", "int8"], "argument --dtype: invalid"),
    (["--model_args", "x=y"], "--model_args: give --model, --sa, ... as flags"),
    (["--sa", "1", "--pixels", "auto"], "--pixels auto goes with --sa auto")])
def test_bad_words_give_one_line(stand_in, capsys, words, message):
    status, out, err = call(capsys, "--tasks", "mme", *words)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith(f"error: {message}") and "Trace" not in err


def test_all_else_goes_to_lmms_eval(stand_in, model, loaded, capsys):  # noqa: F811
    """Its program finds the class by name. An error, which it only tells, becomes the exit status."""
    seen = []

    def single(args):
        seen.append(args)
        manifest = sys.modules["lmms_eval.models"].MODEL_REGISTRY_V2[args[1]]
        place, name = manifest.simple_class_path.rsplit(".", 1)
        instance = getattr(importlib.import_module(place), name)(batch_size="2", asked="x")
        print(instance.generate_until(requests(instance, [("hi", [], {"max_new_tokens": 2})])))
        if "--fail" in args:
            raise KeyError("a bug")

    def program():
        try:
            stand_in.cli_evaluate_single(sys.argv[1:])
        except Exception as e:
            print("told:", e)
    stand_in.cli_evaluate = program
    words = ["--limit", "8", "--gen_kwargs", "a=1,b=2", "-b", "4"]
    for more, status in (([], 0), (["--fail"], 1)):
        stand_in.cli_evaluate_single = single
        found, out, err = call(capsys, "--tasks", "mme,gqa", *words, "--sa", "1,4", *more)
        answer = model.tokenizer.decode(alone(model, ("hi", []), (1, 4), max_tokens=2)[0]).strip()
        assert found == status and out.startswith(f"{[answer]}\n") and ("told:" in out) == (status == 1)
        assert seen.pop() == ["--model", "nanovisor", "--model_args=asked=--model nano --sa 1+4 --dtype float32",
                              "--tasks", "mme,gqa", *words, *more]


def test_the_task_of_quilts(stand_in, monkeypatch, capsys, tmp_path):
    """Its files, its images, and the number that paper.evaluate finds on the same questions."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lmms, "QUILTS", 1)
    found, yaml = [], []

    def program():
        task = sys.argv[sys.argv.index("--include_path") + 1]
        monkeypatch.syspath_prepend(task)
        images = importlib.import_module("utils").images
        yaml.append(Path(task, "quilts.yaml").read_text())
        rows = rows_of(tmp_path / "out/quilts/quilts.jsonl")
        instance = lmms.Driven(batch_size=8)
        found.extend(instance.generate_until(requests(instance, [
            (row["question"], images(row), {"max_new_tokens": 64, "until": ["\n\n"]}) for row in rows])))
    stand_in.cli_evaluate, stand_in.cli_evaluate_single = program, None
    status, _, err = call(capsys, "--tasks", "quilts", "--model", NANO)
    monkeypatch.delitem(sys.modules, "utils")
    data = tmp_path / "out/quilts/quilts.jsonl"
    assert status == 0 and f"python -m paper.evaluate --data {data} asks them too" in err
    evaluate.main(["--data", str(data), "--model", str(NANO), "--out", str(tmp_path / "asked")])
    rows = rows_of(tmp_path / "asked/quilts.jsonl")
    assert [row["answer"] for row in rows] == found and len(found) > 10
    assert f"{{data_files: {{test: {json.dumps(str(data))}}}}}" in yaml[0] and "{max_new_tokens: 64}" in yaml[0]
