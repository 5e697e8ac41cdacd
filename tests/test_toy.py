"""The miniature's world: answers are right, held-out, and not to be guessed from the question; the base tile alone
tells the coarse ones and no others."""
import collections
import json

import numpy as np
import pytest
from PIL import Image

import data
from cli import run
from toy import __main__ as toy_main
from toy import world

FULL, BASE = 72, 36  # pixels along the whole image, along the base tile


def read_back(quilt):
    """({(colour, cell): sign}, {colour: shade}) of a quilt, by a way of its own."""
    found = {}
    for y in range(6):
        for x in range(6):
            if quilt.signs[y, x] != world.BLANK:
                colour = [["red", "green"], ["blue", "yellow"]][y // 3][x // 3]
                found[colour, "abc"[y % 3] + "123"[x % 3]] = world.NAMES[quilt.signs[y, x]]
    return found, dict(zip(("red", "green", "blue", "yellow"), quilt.shades))


def answer(signs, shades, question):
    """The answer to a question about {(colour, cell): sign} and {colour: shade}: the tasks' meaning, spelled out."""
    words = question.split()
    rows, columns, last = "abc", "123", words[-1]
    of = {sign: place for place, sign in signs.items()}

    def differs(copy, cell):
        return signs[copy, cell] != signs[{"green": "red", "yellow": "blue"}[copy], cell]

    def odd(cell):
        return differs("green", cell) != differs("yellow", cell)

    def updated(cell):
        key = signs["blue", cell]
        return signs["green", red(key)] != signs["yellow", cell]

    def red(key):
        cell, = [c for (colour, c), sign in signs.items() if colour == "red" and sign == key]
        return cell

    def cells(where):
        return [r + c for r in (where.split(":")[1] if ":" in where else rows) for c in columns]
    flag = odd if "odd" in words else updated
    if question.startswith("how is"):
        return shades[last]
    if last in ("dark", "light"):
        n = sum(shade == last for shade in shades.values())
        return str(n) if question.startswith("how many") else "yes" if n else "no"
    if question.startswith("is there"):
        return "yes" if last in of else "no"
    if question.startswith("what colour"):
        return of[last][0]
    if question.startswith("where"):
        return of[last][1]
    if question.startswith("what is at"):
        return signs[tuple(last.split(":"))]
    if "value" in words:
        return signs["green", red(last)]
    if "changed" in words:
        return str(sum(differs(last.split(":")[0], cell) for cell in cells(last)))
    if "pairs" in words:
        return str(sum(flag(a + c) and flag(b + c) for a, b in ("ab", "bc") for c in columns))
    return str(sum(flag(cell) for cell in cells(last)))


def everything(n, seed):
    """[(quilt, task, question, answer)]: every question about n quilts of each kind."""
    rng = np.random.default_rng(seed)
    for i in range(3 * n):
        quilt = world.make_quilt(rng, world.KINDS[i % 3])
        for task, pairs in world.questions(quilt).items():
            for question, right in pairs:
                yield quilt, task, question, right


def test_every_answer_follows_from_signs_and_shades():
    tasks = set()
    for quilt, task, question, right in everything(40, seed=1):
        assert answer(*read_back(quilt), question) == right, (task, question)
        tasks.add(task)
    assert tasks == set(world.TASKS)


def guess_rates(rows):
    """{task: accuracy of always giving the task's most frequent answer}."""
    counts = collections.defaultdict(collections.Counter)
    for _, task, _, right in rows:
        counts[task][right] += 1
    return {task: max(c.values()) / sum(c.values()) for task, c in counts.items()}


def test_the_question_alone_says_nothing():
    """The best answer to each question, learned from as many quilts as one likes, is no better than one for the task,
    but for `read`, which knows what kind of sign a panel can have."""
    learned = collections.defaultdict(collections.Counter)
    for _, _, question, right in everything(600, seed=2):
        learned[question][right] += 1
    hits = collections.defaultdict(list)
    rows = list(everything(300, seed=1))
    for _, task, question, right in rows:
        hits[task].append(learned[question].most_common(1)[0][0] == right if learned[question] else False)
    guess = guess_rates(rows)
    for task, h in hits.items():
        assert np.mean(h) < guess[task] + 0.05, task
        # A panel is plain with probability .532, and no quilt has dark cloth with .502
        assert guess[task] < (0.56 if task in world.STRATA["coarse"] else 0.52), (task, guess[task])


# --- a reader with templates ----------------------------------------------------------------------------------------

def templates(size):
    """(signs + 1, step, step): what each sign's stitches look like in an image of size x size pixels, in its middle."""
    step, seen = size // 6, []
    for stitches in world.STITCHES:
        panel = np.zeros((36, 36), dtype=np.float32)
        panel[12:24, 12:24] = stitches
        panel = np.asarray(Image.fromarray(panel).resize((step * 3, step * 3), Image.BICUBIC))
        seen.append(panel[step:2 * step, step:2 * step])
    return np.array(seen)


def best_match(cell, ground, signs):
    """The sign whose stitches lie nearest to a cell (step, step, 3) of an image, least squares over the brightness."""
    flat = (cell.astype(float) - ground).mean(-1)
    flat -= flat.mean()
    return int(((signs - signs.mean((1, 2), keepdims=True) - flat) ** 2).sum((1, 2)).argmin())


def look(image, size):
    """({(colour, cell): sign}, {colour: shade}) read from a quilt's image, shrunk to size x size pixels: the shade from
    each panel's mean colour, then the best template for each cell, at the contrast that stitches have on that shade."""
    small = np.asarray(image.resize((size, size), Image.BICUBIC))
    step, plain = size // 6, templates(size)
    signs, shades = np.zeros((6, 6), dtype=int), []
    for panel in range(4):
        top, left = panel // 2 * 3, panel % 2 * 3  # in cells
        mean = small[top * step:(top + 3) * step, left * step:(left + 3) * step].mean((0, 1))
        cloths = {shade: [x[panel] for x in world.cloth([shade] * 4)] for shade in world.SHADES}
        shades.append(min(cloths, key=lambda shade: np.abs(cloths[shade][0] - mean).max()))
        ground, contrast = cloths[shades[-1]]
        for y in range(top, top + 3):
            for x in range(left, left + 3):
                cell = small[y * step:(y + 1) * step, x * step:(x + 1) * step]
                signs[y, x] = best_match(cell, ground, plain * contrast.mean())
    return read_back(world.Quilt("", signs, shades, None))


@pytest.mark.parametrize("size", [FULL, BASE])
def test_the_base_tile_alone_tells_coarse_tasks_and_no_others(size):
    """A reader that knows every template and every rule is right with the whole image; with the base tile's pixels it
    is right in every coarse task, and at the guessing rate in every other."""
    rng, hits, rows = np.random.default_rng(3), collections.defaultdict(list), []
    for i in range(180):
        quilt = world.make_quilt(rng, world.KINDS[i % 3])
        seen = look(world.render(quilt, rng), size)
        for task, pairs in world.questions(quilt).items():
            for question, right in pairs:
                try:
                    said = answer(*seen, question)
                except (KeyError, ValueError):  # it looks for a sign that it has not seen, or has seen several times
                    said = None
                hits[task].append(said == right)
                rows.append((quilt, task, question, right))
    guess = guess_rates(rows)
    assert set(hits) == set(world.TASKS)
    for task, h in hits.items():
        if size == FULL or task in world.STRATA["coarse"]:
            assert np.mean(h) == 1, task
        else:
            assert np.mean(h) < guess[task] + 0.06, (task, np.mean(h), guess[task])


class Still:
    """Stands in for a random generator whose cloth has the same brightness everywhere."""

    @staticmethod
    def normal(mean, deviation, shape):
        return np.zeros(shape)


def test_stitches_are_never_clipped_and_average_to_the_cloth():
    rng = np.random.default_rng(4)
    for shade in world.SHADES:
        ground, contrast = world.cloth([shade] * 4)
        assert (ground - contrast).min() >= world.FLOOR and (ground + contrast).max() <= world.CEILING
        assert contrast.mean(1).min() > 3 * world.MOTTLE  # a sign can still be told from the cloth's own brightness
        for kind in world.KINDS:
            quilt = world.make_quilt(rng, kind)._replace(shades=[shade] * 4)
            image = np.asarray(world.render(quilt, Still)).astype(float)
            assert image.min() >= world.FLOOR and image.max() <= world.CEILING
            halved = image.reshape(2, 18, 2, 2, 18, 2, 3).mean((2, 5))  # (panel row, y, panel column, x, RGB)
            assert np.array_equal(halved, np.broadcast_to(ground.reshape(2, 1, 2, 1, 3), halved.shape))


# --- the rest -------------------------------------------------------------------------------------------------------

def test_levels_name_the_strata():
    assert [task for tasks in world.STRATA.values() for task in tasks] == list(world.TASKS)
    levels = {name: {world.TASKS[task].level for task in tasks} for name, tasks in world.STRATA.items()}
    assert levels == {"coarse": {-1}, "detail": {0}, "relations": {1, 2, 3}}
    for task in world.TASKS.values():
        assert set(task.kinds.split()) <= set(world.KINDS) and bool(task.reason) == (task.level > 0)
    asked = collections.defaultdict(set)
    for quilt, task, _, _ in everything(3, seed=5):
        asked[task].add(quilt.kind)
    assert asked == {name: set(task.kinds.split()) for name, task in world.TASKS.items()}


def test_a_seed_always_gives_the_same_and_evaluation_is_held_out():
    a, b = world.eval_set(0, 5), world.eval_set(0, 5)
    assert all(np.array_equal(x, y) and p == q for (x, p), (y, q) in zip(a, b))
    assert a[0][1] != world.eval_set(1, 5)[0][1]
    trained = {np.asarray(world.conversation(np.random.default_rng((world.TRAIN, 0, i, 0)), 1)[0]).tobytes()
               for i in range(50)}
    assert not trained & {np.asarray(image).tobytes() for image, _ in world.eval_set(0, 20)}


def test_an_evaluation_has_n_questions_of_each_task_and_coarse_ones_about_all_kinds():
    n, count = 12, collections.Counter()
    for i, (_, asked) in enumerate(world.eval_set(3, n)):
        count.update((task, world.KINDS[i % 3]) for task, _, _ in asked)
    for name, task in world.TASKS.items():
        kinds = task.kinds.split()
        each = n // len(kinds) if name in world.STRATA["coarse"] else n
        assert {kind: count[name, kind] for kind in world.KINDS} == {
            kind: each if kind in kinds else 0 for kind in world.KINDS}, name


def test_conversations_ask_different_questions_and_coarse_ones_as_often_as_one_task():
    tasks = collections.Counter()
    for i in range(300):
        _, quilt, asked = world.conversation(np.random.default_rng(i), 1 + i % 9, "scene")
        assert len({question for _, question, _ in asked}) == len(asked)
        assert all((question, right) in world.questions(quilt)[task] for task, question, right in asked)
        tasks[asked[0][0]] += 1
    coarse = sum(tasks[task] for task in world.STRATA["coarse"])
    assert coarse / 300 == pytest.approx(1 / 4, abs=0.08)  # the others are exist, colour, where


def test_images_of_this_world_are_recognised():
    rng = np.random.default_rng(0)
    quilts = [world.render(world.make_quilt(rng, kind), rng) for kind in world.KINDS * 10]
    assert all(map(world.is_quilt, quilts))
    assert not world.is_quilt(quilts[0].resize((73, 72)))
    assert not world.is_quilt(quilts[0].rotate(90))
    assert not world.is_quilt(Image.new("RGB", (72, 72), (128, 128, 128)))


def test_cells_and_panels_stand_where_world_says():
    config, rng = world.config(), np.random.default_rng(0)
    tiles = data.tiling(72, 72, config)
    assert tiles.grid == (2, 2) and config.side == 3 and tiles.tokens == max(world.CELL_TOKENS) + 2
    assert (72, 72) == world.REFERENCE_PROMPT[1]
    blank = world.Quilt("scene", np.full((6, 6), world.BLANK), ["plain"] * 4, None)

    def changed(quilt):
        """(1 + tiles, 3, 3): how much each patch differs from the blank quilt's."""
        a, b = (data.pixels(world.render(q, np.random.default_rng(1)), tiles, config) for q in (blank, quilt))
        return np.abs(a - b).reshape(5, 3, 3, 12, 3, 12).max((1, 3, 5))  # tile, row, column
    # An image with one cell painted: the token that CELL_TOKENS names is the one whose patch changes
    for y, x in ((0, 0), (2, 3), (4, 1), (5, 5)):
        signs = blank.signs.copy()
        signs[y, x] = 0
        grid = changed(blank._replace(signs=signs))[1:].reshape(2, 2, 3, 3).transpose(0, 2, 1, 3).reshape(6, 6)
        assert list(np.argwhere(grid > 0.2)[0]) == [y, x]
        tokens = np.concatenate([grid, np.zeros((6, 1))], 1).ravel()  # a newline after each row
        assert world.CELL_TOKENS[y * 6 + x] == 9 + int(tokens.argmax())
    # With one panel dark: of the base tile's corners the one that PANEL_TOKENS names changes, and its own tile
    for panel in range(4):
        shades = ["plain"] * 4
        shades[panel] = "dark"
        change = changed(blank._replace(shades=shades))
        corners = change[0].ravel()[world.PANEL_TOKENS]
        assert list(np.flatnonzero(corners > 0.1)) == [panel]
        assert list(np.flatnonzero(change[1:].max((1, 2)) > 0.1)) == [panel]
    assert len(world.words(world.make_quilt(rng, "table"), 3)) == len(world.PANEL_TOKENS + world.CELL_TOKENS)


def test_words_of_visual_tokens_agree_with_the_answers():
    for quilt, task, question, right in everything(20, seed=5):
        words = [sum(levels, ()) for levels in zip(*(world.words(quilt, level) for level in range(4)))]
        last = question.split()[-1]
        if task in ("odd", "updated pairs", "odd pairs", "changed"):
            word = {"odd": "odd", "updated pairs": "pairs", "odd pairs": "pairs", "changed": "changed"}[task]
            assert sum(word in w and last in w for w in words) == int(right)
        if task == "read":
            assert sum(right in w and last in w for w in words) == 1
        if task == "count shade":
            assert sum(last in w for w in words[:4]) == int(right) and not any(last in w for w in words[4:])


def test_the_tokenizer_has_every_word_and_few_tokens():
    t = world.tokenizer()
    unknown = t.token_to_id("<unk>")
    for _, _, question, right in everything(5, seed=1):
        ids = t.encode(question + "?").ids
        assert unknown not in ids and len(ids) == len(question.split()), question
        assert len(t.encode(right).ids) == 1
        assert t.decode(t.encode(right).ids) == right
    image, _, asked = world.conversation(np.random.default_rng(0), 3)
    turns = [x for _, q, a in asked for x in (q, a)]
    turns[0] = data.place_images(turns[0], 1)
    processed = data.process_image(image, world.config())
    prompt, labels = data.labelled(data.turns_to_learn(turns), t, [processed])
    whole = data.encode(data.chatml(turns), t, [processed])
    assert (prompt.ids, prompt.t_pos, prompt.v_pos) == (whole.ids, whole.t_pos, whole.v_pos)
    learned = [t.id_to_token(i) for i, l in zip(prompt.ids, labels) if l >= 0]
    assert learned == [x for _, _, a in asked for x in (a, "<|im_end|>")]
    assert all(l in (-1, i) for i, l in zip(prompt.ids, labels))


def test_a_caption_has_the_same_answers_right_after_the_questions_last_words():
    _, _, asked = world.conversation(np.random.default_rng(1), 12)
    (opening, opening_is_target), *pieces = world.caption(asked)
    assert opening.count(data.IMAGE) == 1 and not opening_is_target
    assert [text for text, is_target in pieces if is_target] == [right for _, _, right in asked]
    for (text, is_target), (_, question, _) in zip(pieces[::2], asked):
        assert not is_target and question.endswith(text) or set(text.split()) < set(question.split())


def test_the_command_line_draws_and_exports(tmp_path, capsys):
    toy_main.main(["--show", str(tmp_path / "sheet.png"), "--n", "2"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet.shape[1] > 1000
    row = (sheet.shape[0] - 24 - 180) // 2  # between two rows of quilts nothing is printed, nor between the columns
    assert all((sheet[y:y + 22] == 255).all() for y in (row + 2, 2 * row + 2))
    assert all((sheet[:2 * row, x:x + 10] == 255).all() for x in (10, 410, 810, 1210))
    below = [(sheet[y:y + 44] < 255).any(axis=0) for y in (2 * row + 24, 2 * row + 110)]
    assert sum((np.diff(x.astype(int)) == 1).sum() for x in below) >= 27  # all signs, apart from one another
    toy_main.main(["--write", str(tmp_path / "data"), "--n", "6"])
    samples = json.loads((tmp_path / "data" / "quilts.json").read_text())
    assert len(samples) == 6
    for s in samples:
        assert Image.open(tmp_path / "data" / s["image"]).size == (72, 72)
        assert [turn["from"] for turn in s["conversations"]] == ["human", "gpt"] * (len(s["conversations"]) // 2)
        assert s["conversations"][0]["value"].startswith("<image>\n")
        assert "<image>" not in "".join(turn["value"] for turn in s["conversations"][1:])
    capsys.readouterr()
    for words in ([], ["--show", "x.jpg"], ["--write", "d", "--n", "0"]):
        with pytest.raises(SystemExit) as stop:
            run(lambda words=words: toy_main.main(words))
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
