"""paper/bench.py on a model so small that it is about the program, not about time."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch

import methods
from flops import cache_bytes, connector_flops, llm_flops, tower_flops
from paper import bench, clock, compare, trials
from tests import tiny


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """Of 4 tokens; a token takes as long as any other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ANSWER", 4)
        yield


@pytest.fixture(scope="module")
def result(short_answers):
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    return bench.bench(config, tuple(bench.SYSTEMS), [1, 5], [1], rounds=1, whole=False)


def test_rows_are_complete_and_say_what_they_should(result):
    json.dumps(result)
    assert [r["system"] for r in result["rows"]] == 2 * list(bench.SYSTEMS)
    c = tiny.config(layers=24, tile=384, patch=96)
    c.add_visor()
    for r in result["rows"]:
        assert all(r[k] > 0 for k in ("encoder", "prefill", "decode", "total", "tokens_per_second", "matmul_share"))
        assert r["total"] == pytest.approx(r["encoder"] + r["prefill"] + 3 * r["decode"])
        side = 16 if "packed" not in r["system"] else 9
        if r["tiles"] == 5 and "packed" not in r["system"]:
            assert r["visual_tokens"] == side + 8 * (8 + 1)
        if r["system"] == "2":
            assert r["cache"] == r["batch"] * cache_bytes(c, (1, 4), 44, r["visual_tokens"], 4)
            assert r["llm_flop"] == r["batch"] * llm_flops(c, (1, 4), 40, r["visual_tokens"])
            dense = next(x for x in result["rows"] if x["system"] == "dense" and x["tiles"] == r["tiles"]
                         and x["batch"] == r["batch"])
            assert r["over_dense"]["prefill"] == pytest.approx(dense["prefill"] / r["prefill"])
            assert r["realised"] == pytest.approx(dense["prefill"] / r["prefill"] * r["llm_flop"] / dense["llm_flop"])
        assert r["encoder_share"] == pytest.approx(r["encoder"] / r["first"])
        assert r["prompts_per_second"] == pytest.approx(r["batch"] / (r["prefill"] + 3 * r["decode"]))


def test_more_prompts_at_once_and_training():
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    result = bench.bench(config, ("dense", "2"), [1], [1], rounds=1)
    assert [(r["system"], r["batch"]) for r in result["rows"]] == [(s, b) for b in (1, 4, 16) for s in ("dense", "2")]
    assert [t["training"] for t in result["training"]] == ["dense", "stage 1", "stage 2"]
    assert "| stage 2 |" in bench.table(result)


def test_pixels_are_what_they_are_called(monkeypatch, capsys, tmp_path):
    """Four ways to the first token; inside, each is checked to have taken the pixels that it is named after."""
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    monkeypatch.setattr(clock, "preset", lambda name: config)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["--pixels", "--rounds", "1", "--dtype", "float32"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[1].strip() for row in rows] == ["all", "overview", "asked first, then all", "asked first, overview"]
    assert float(rows[0][3]) == 1 and all(float(row[2]) >= 0 for row in rows)
    kept = json.loads((tmp_path / "bench-pixels-cpu-float32.json").read_text())
    assert [row["pixels"] for row in kept["rows"]] == [row[1].strip() for row in rows]
    assert all(row["first"] > 0 for row in kept["rows"]) and kept["rounds"] == 1 and kept["machine"]
    file = tmp_path / "bench-pixels-cpu-float32.json"
    file.write_text(json.dumps({**kept, "rounds": 2}))
    bench.main(["--pixels", "--rounds", "1", "--dtype", "float32"])
    assert json.loads(file.read_text())["rounds"] == 2 and "stays as it is" in capsys.readouterr().err


def test_seconds_stand_beside_operations(monkeypatch, capsys, tmp_path):
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    monkeypatch.setattr(clock, "preset", lambda name: config)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    bench.main(["--measure", "--rounds", "1", "--dtype", "float32"])
    shown = capsys.readouterr().out
    kept = json.loads((tmp_path / "bench-measure-cpu-float32.json").read_text())
    assert shown.endswith(f"\n\n{clock.operations_table(kept)}\n") and "medians of 1 round" in shown
    assert kept["visual_tokens"] == 5 * config.side ** 2
    assert [row["sa"] for row in kept["rows"]] == ["dense", "1,4,7,10,16,19,22", "1,4", "none"]
    fixed = tower_flops(config, 5) + connector_flops(config, 5)
    for row, sa in zip(kept["rows"], clock.MEASURED):
        assert row["counted"] * kept["matmul"] == pytest.approx(
            fixed + llm_flops(config, sa, clock.TEXT, kept["visual_tokens"]))
        assert row["encoder"] > 0 and row["llm"] > 0


def test_every_reduction_is_timed_beside_dense(monkeypatch, capsys):
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    monkeypatch.setattr(clock, "preset", lambda name: config)
    bench.main(["--reduce", "--rounds", "1", "--dtype", "float32", "--batch", "2", "--tiles", "5"])
    out = capsys.readouterr().out
    rows = [line.split("|") for line in out.splitlines() if line.startswith("| ") and "LLM" not in line]
    assert [row[1].strip() for row in rows] == list(clock.REDUCED) and "Batch 2:" in out
    assert {x.partition(":")[0] for x, _ in clock.REDUCED.values()} == {"", *methods.FORMS}
    saved = {row[1].strip(): float(row[2].split("x")[0]) for row in rows}
    assert saved["dense"] == 1 and all(x > 1 for name, x in saved.items() if name != "dense")
    assert saved["VISOR, 2 layers, VisionZip"] > saved["VisionZip"]
    assert {row[1].strip() for row in rows if float(row[6]) > 0} >= {"VisPruner", "PyramidDrop, hard", "SparseVLM"}


def test_a_comparison_says_what_ran(tmp_path, monkeypatch):
    """One training of three steps; each row's accuracy is evaluation's, its saving what flops.py counts."""
    monkeypatch.setattr(compare, "STEPS", 3)
    monkeypatch.setattr(compare, "PROMPTS", 12)
    args = SimpleNamespace(out=str(tmp_path), questions=2, dtype=torch.float32, device="cpu", report=False,
                           exam="2")
    rows = compare.TABLE_1[0], compare.TABLE_1[6], compare.TABLE_1[8], compare.TABLE_1[11]
    assert [row.label for row in rows] == ["dense", "M3, 3 x 3 to 2 x 2", "PyramidDrop, easy", "VISOR"]
    found = [x for row in rows for x in compare.experiment(row, 0, args)]
    assert [x["sa"] for x in found] == 3 * ["dense"] + ["none", "4", "7", "4,7", "4,10", "4,7,10"]
    by_label = {x["label"]: x for x in found}
    dense, pooled, dropped, visor = (by_label[row.label] for row in rows)
    assert dense["saving"] == dense["first_token"] == dense["nominal"] == 1
    assert pooled["nominal"] == pytest.approx(51 / 24) and dropped["nominal"] == pytest.approx(
        12 * 51 / (51 + 2 * 15 + 3 * 10 + 6 * 5))                      # layers 0; 1, 2; 3 to 5; 6 to 11
    assert visor["sa"] == "4,7,10" and 2 < visor["saving"] < 2.6 and visor["nominal"] == 1
    assert all(x["detail"] > 0.7 for x in (dense, visor)) and pooled["detail"] < 0.7
    text = compare.table(rows, found) + compare.by_task(rows, found)
    assert text.count("| VISOR |") == 7 and "| PyramidDrop, easy | dense |" in text
    compare.draw(tmp_path / "x.png", found)
    assert (tmp_path / "x.png").stat().st_size > 10000
    monkeypatch.setattr(compare, "all_results", None)                  # what is there is not made again
    assert compare.experiment(rows[0], 0, args) == found[:1]
    args.report = True
    assert compare.experiment(compare.TABLE_1[2], 0, args) == []


def test_kernels_are_counted(result):
    """A layer on text alone starts at least twelve a token; two layers with vision no more than 600 in all."""
    kernels = result["kernels"]
    assert list(kernels) == list(bench.SYSTEMS) and 24 * 12 < kernels["2"]["token"] <= 600
    assert kernels["dense"]["token"] < kernels["transformers"]["token"] == pytest.approx(880, abs=10)
    assert all(n["prefill"] > n["token"] for n in kernels.values())


def test_both_models_do_the_same_work(result):
    """Theirs and ours dense get equally many visual tokens, for one tile and for a grid."""
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    ours, theirs = bench.Ours(config, torch.float32), bench.Theirs(config, torch.float32)
    for tiles in (1, 5):
        prompts, images = ours.prompts(tiles, 2)
        a, b = ours.encode(images), theirs.encode(images)
        assert len(a) == len(b) == 2 and abs(a[0].shape[0] - b[0].shape[0]) <= 1 and a[0].shape[1] == b[0].shape[1]


def test_a_fall_is_found_and_noise_is_not(result):
    worse = copy.deepcopy(result)
    assert bench.fallen(result, worse) == []
    row = next(r for r in worse["rows"] if r["system"] == "2" and r["tiles"] == 5)
    row["over_dense"]["prefill"] *= 0.85
    assert bench.fallen(result, worse) == []
    row["over_dense"]["prefill"] *= 0.9
    row["realised"] *= 0.7
    lines = bench.fallen(result, worse)
    assert len(lines) == 2 and "over_dense prefill" in lines[0] and "realised" in lines[1]


def test_table_and_plot(result, tmp_path):
    text = bench.table(result)
    assert text.count("\n| none |") == 2 and "| kernels started | transformers |" in text
    bench.plot(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10000


def test_without_transformers_its_row_is_left_out(monkeypatch, capsys, tmp_path):
    def missing(*_):
        raise ImportError
    monkeypatch.setattr(bench, "Theirs", missing)
    config = tiny.config(layers=24, tile=384, patch=96, tied=True)
    rows = bench.bench(config, ("transformers", "dense", "2"), [1], [1], rounds=1, whole=False)["rows"]
    assert [r["system"] for r in rows] == ["dense", "2"] and "pip install transformers" in capsys.readouterr().err
    found = bench.bench(config, ("transformers", "dense"), [1], [1], rounds=1, whole=False)
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "bench", lambda *_: found)
    bench.main(["--dtype", "float32"])  # the pages' tables need the row
    assert not list(tmp_path.iterdir()) and "transformers' row is missing" in capsys.readouterr().err


# --- what experiments have in common ---------------------------------------------------------------------------------

@pytest.mark.parametrize("words, message", [
    (["--threads", "0"], "--threads from 1"), (["--questions", "0"], "at least 1"), (["--seed", "-1"], "at least 0"),
    (["--only", "FastV"], "--only 'FastV'")])
def test_bad_flags_of_an_experiment_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as status:
        compare.main(words)
    err = capsys.readouterr().err.splitlines()
    assert status.value.code == 2 and len(err) == 1 and message in err[0]


def test_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="^--report: .* holds nothing"):
        compare.main(["--report", "--out", str(tmp_path)])


def test_larger_results_stay(tmp_path, capsys):
    """Fewer questions, seeds or rows replace nothing; as many or more do."""
    file, args = tmp_path / "x.json", SimpleNamespace(seeds=[0, 1], questions=5, dtype=torch.float32)
    assert trials.save("ablate", file, args, rows=[1, 2]) and json.loads(file.read_text())["rows"] == [1, 2]
    for less in ({"questions": 4}, {"seeds": [0]}, {}):
        assert not trials.save("ablate", file, SimpleNamespace(**{**vars(args), **less}), rows=[3, 4] if less else [3])
        assert json.loads(file.read_text())["rows"] == [1, 2] and "stays as it is" in capsys.readouterr().err
    assert trials.save("ablate", file, args, rows=[3, 4]) and json.loads(file.read_text())["rows"] == [3, 4]


@pytest.mark.parametrize("report", [False, True])
def test_a_report_alone_measures_nothing(report, tmp_path):
    """The day and the machine of what is there stay."""
    file, args = tmp_path / "x.json", SimpleNamespace(seeds=[0], questions=5, dtype=torch.float32, report=report)
    trials.save("ablate", file, args, rows=[1])
    was = {"date": "2020-02-02", "machine": "another", "torch": "0.4"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **was}))
    assert trials.save("ablate", file, args, rows=[2])
    now = json.loads(file.read_text())
    assert now["rows"] == [2] and report == all(now[key] == x for key, x in was.items())
