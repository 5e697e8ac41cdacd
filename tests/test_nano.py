"""The miniature that ships in nano/: it answers, and shows the paper's effects, on held-out questions."""
import numpy as np
import pytest
from PIL import Image

import costs
import data
import router
import sample
from cli import NANO
from config import Plan, sa_name
from conversation import Conversation
from evaluation import accuracy, all_results
from model import VLM
from toy import world
from train import DENSE

ASSETS = NANO.parent / "assets"
FULL, ALL = max(world.VIABLE, key=len), tuple(range(12))


@pytest.fixture(scope="module")
def nano():
    return VLM.from_pretrained(NANO)


@pytest.fixture(scope="module")
def report(nano):
    """A Report of 100 questions a task, with a seed that no figure in the README uses."""
    eval_set = world.eval_set(77, 100)
    dense = all_results(VLM.from_pretrained(DENSE), eval_set, [Plan(ALL)], progress=False)
    results = all_results(nano, eval_set, nano.config.plans, progress=False)
    return router.summarise(nano.config, results, world.STRATA, *world.REFERENCE_PROMPT, dense)


def test_the_staircase(report):
    rows = {tuple(row["sa"]): row for row in report.rows if row["pixels"] == "all"}
    dense, none, full = rows[ALL], rows[()], rows[FULL]
    assert all(dense[stratum] > 0.95 for stratum in world.STRATA)
    assert all(row[stratum] >= 0.99 * dense[stratum] for row in rows.values() for stratum in ("coarse", "detail"))
    assert none["relations"] < 0.6 * dense["relations"]
    assert full["relations"] > 0.95 * dense["relations"] and full["relations"] > 2 * none["relations"]
    best = [max(row["relations"] for sa, row in rows.items() if len(sa) == n) for n in range(4)]
    assert best == sorted(best)
    assert all(row["saving"] > 1.5 for sa, row in rows.items() if sa != ALL)


def test_the_overview_answers_coarse_questions_and_no_others(report):
    row, = (row for row in report.rows if row["pixels"] == "overview")
    assert row["coarse"] >= 0.99 and row["detail"] < 0.4 and row["relations"] < 0.4 and row["end_to_end"] > 5


def test_the_router_spends_little_on_coarse_and_detail_and_much_on_relations(report):
    rows = {row["name"]: row for row in report.rows}
    routed, full = rows["router"], rows[sa_name(report.config, FULL)]
    for stratum in world.STRATA:
        assert routed[stratum] > 0.985 * full[stratum]
    assert routed["saving"] > 1.4 * full["saving"]
    layers = {stratum: x["layers"] for stratum, x in routed["by_group"].items()}
    assert layers["detail"] < 0.3 and layers["relations"] > 1.5
    share = {task: x["shares"] for task, x in routed["by_task"].items()}
    over = {task: share[task].get("ov:none", 0) for task in world.STRATA["coarse"]}  # "is there any light"
    assert np.mean(list(over.values())) >= 0.95 and min(over.values()) > 0.85
    for task in world.STRATA["detail"] + world.STRATA["relations"]:  # "is there any star": the same first words
        assert share[task].get("ov:none", 0) <= 0.01, task
    for task in world.STRATA["detail"]:
        assert share[task].get("none", 0) > 0.9, task
    for task in world.STRATA["relations"]:
        assert share[task].get("none", 0) < 0.1, task
    assert routed["by_group"]["coarse"]["end_to_end"] > 5 and routed["end_to_end"] > 2


def test_a_budget_holds_with_all_that_the_router_costs(nano):
    """What was run of a prompt that the router chose is what --budget allowed; cut in two it costs a little more."""
    c, image = nano.config, Image.open(ASSETS / "copy.png").convert("RGB")
    prefix, own = data.split_shared(data.chatml([data.place_images("How many changed in yellow?", 1)]))
    prefix = data.encode(prefix, nano.tokenizer, [data.process_image(image, c)])
    prompt, vision = data.encode(own, nano.tokenizer, start=prefix.end), len(prefix.v_pos)
    text = len(prefix.ids) + len(prompt.ids)
    for pixels in ("auto", "all"):
        for sa in c.viable:
            route = costs.Route("", "auto", pixels, Plan(sa))
            spent = costs.Costs(c, prefix.images, vision).add(route, prefix, prompt, 1)
            share = spent["llm"] / spent["llm_dense"]
            assert sa in costs.within_budget(c, share, text, vision, vision, pixels == "auto")
            if sa:
                assert sa not in costs.within_budget(c, 0.99 * share, text, vision, vision, pixels == "auto")
    with pytest.raises(ValueError, match="--sa none, costs 0.218 of dense"):
        costs.within_budget(c, 0.2, text, vision, vision, True)


def test_sample_answers(capsys):
    # what is in the quilts of assets/
    for kind, question, answer in (("scene", "What colour is the heart?", "green"), ("scene", "How is blue?", "dark"),
                                   ("copy", "what is at red:b1?", "c"), ("table", "What is the value of k?", "5")):
        sample.main(["--image", str(ASSETS / f"{kind}.png"), "--q", question])
        out, err = capsys.readouterr()
        assert out.strip() == answer and "miniature" not in err and "routed to --sa none" in err


def test_another_world_is_announced_in_one_line(tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    sample.main(["--image", str(tmp_path / "x.png"), "--q", "where is the tree"])
    assert sum("knows only quilts" in line for line in capsys.readouterr().err.splitlines()) == 1
    sample.main(["--image", str(ASSETS / "scene.png"), "--q", "where is the dog"])
    line, = [line for line in capsys.readouterr().err.splitlines() if "knows only quilts" in line]
    assert line.endswith("no word for dog")


def test_evaluate_counts_exactly_the_answers_that_are_given(nano):
    """Teacher-forced evaluation against generation as in sample.py."""
    eval_set = world.eval_set(78, 8)
    for sa in ((), FULL):
        results, given = all_results(nano, eval_set, [Plan(sa)], progress=False), {}
        for image, questions in eval_set:
            prefix = data.encode(data.split_shared(data.chatml(["<image>\nx"]))[0], nano.tokenizer,
                                 [data.process_image(image, nano.config)])
            tree = Conversation(nano, prefix, sa)
            for task, question, answer in questions:
                own = data.split_shared(data.chatml([f"<image>\n{question}"]))[1]
                ids = tree.answer(data.encode(own, nano.tokenizer, start=prefix.end), max_tokens=4)
                given.setdefault(task, []).append(nano.tokenizer.decode(ids) == answer)
        correct = sum(sum(x) for x in given.values())
        assert 0 < correct < sum(map(len, given.values())) or sa == FULL
        assert {t: np.mean(x) for t, x in given.items()} == accuracy(results, 0)
