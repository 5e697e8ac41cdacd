"""Pixels on request: the overview and all tiles, who decides between them, and that nothing is done twice for it."""
import json
import random
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import explain
import flops
import report
import router
import sample
from config import Config, Plan
from conversation import Conversation
from costs import Costs, Route
from data import ANSWER, IMAGE, ProcessedImage, Prompt, Tiling, chatml, collate, encode, join, place_images, split_shared
from encoders import normalise
from evaluation import all_results
from families import read_config
from layout import Past, make_layout
from model import VLM
from tests import tiny
from tests.test_flops import counted, halves
from tests.test_toy_training import fresh
from toy import world

VIABLE = ((1,), (1, 4), (1, 7), (1, 4, 7), (1, 4, 7, 10))
OVERVIEW = ((1,), (1, 4))
LETTERS = "abc defg hij"
SPREAD = 8  # standard deviation of the scores that `divide` leaves


def model(seed=0, viable=VIABLE, overview=OVERVIEW, **changes):
    """A random VISOR of 12 layers that is trained for the overview, with a random router of both heads."""
    m = tiny.model(seed, **{"layers": 12, "visor": False, **changes})
    m.add_cross_attention(viable=viable, overview=overview).add_router()
    nn.init.normal_(m.lm_head.weight)
    for p in m.router.parameters():
        nn.init.normal_(p, std=1.0 if p.ndim < 2 else 3 * p.shape[1] ** -0.5)
    return m.requires_grad_(False)


def picture(m, rng, single=True):
    """A random image of at least two tiles' worth of pixels along a side."""
    size = rng.randint(20, 100), rng.randint(20, 100)
    return data.process_image(tiny.image(*size, rng.randrange(1 << 30)), m.config, single)


def words(rng):
    return "".join(rng.choices(LETTERS, k=rng.randint(4, 25)))


def prompts_of(m, n, seed=0, turns=1, images=1):
    rng, found = random.Random(seed), []
    for _ in range(n):
        pictures = [picture(m, rng, images == 1) for _ in range(images)]
        texts = [words(rng) for _ in range(2 * turns - 1)]
        found.append(encode(chatml([place_images(texts[0], images), *texts[1:]]), m.tokenizer, pictures))
    return found


@torch.no_grad()
def token_of(m, prompt, start, stop):
    """The routing token of a question before position `start` as it enters layer `stop`: without a cache, as the last
    token of a text that ends there."""
    n, common = sum(p < start for p in prompt.t_pos), set.intersection(*map(set, m.config.viable))
    batch = collate([Prompt(prompt.ids[:n], prompt.t_pos[:n], prompt.v_pos, prompt.v_img, prompt.images)])
    t, v = m.embed(batch)
    t = torch.cat([t, m.router.token[None, None]], dim=1)
    layout = make_layout(np.append(batch.t_pos, [[start]], axis=1), *batch.positions[1:], Past.empty(1), m.config,
                         m.device)
    return m.language_model.run(t, v, layout, (*common, m.config.layers - 1), stop=stop)[0][0, -1]


def scores_of(m, prompt, pixels):
    """By hand: of each question of a prompt the score of the overview, and those of the layers with these pixels."""
    seen, c = data.seen(prompt, pixels, m.config), m.config
    small = data.overview(prompt, c)
    enough = [m.router.pixels(token_of(m, small, s, c.pixel_layer)).item() for s in small.answer_starts] * bool(small) \
        if small else []
    return enough, torch.stack([m.router.layers(token_of(m, seen, s, c.route_layer)) for s in seen.answer_starts])


def plan_of(m, prompt):
    """By hand, of a prompt of one question: the plan that the router chooses (route_threshold 1: the likeliest)."""
    enough, _ = scores_of(m, prompt, "all")
    content = bool(enough) and 1 / (1 + np.exp(-min(enough))) >= m.config.pixel_threshold
    pixels = "overview" if content else "all"
    own, (scores,) = m.config.configurations(pixels), scores_of(m, prompt, pixels)[1]
    return Plan(max(own, key=lambda sa: scores[m.config.viable.index(sa)].item()), pixels)


def shift(layer, scores, middle):
    """Scores, (prompts, choices), get the standard deviation SPREAD around `middle`."""
    layer.weight.mul_(SPREAD / scores.std(0)[:, None])
    layer.bias.sub_(scores.mean(0)).mul_(SPREAD / scores.std(0)).add_(middle)


def divide(m, prompts):
    """Shifts the router's scores so that prompts like these get different layers and different pixels."""
    layers = torch.cat([scores_of(m, p, pixels)[1] for p in prompts for pixels in ("overview", "all")])
    enough = torch.tensor([[min(scores_of(m, p, "all")[0])] for p in prompts])
    threshold = np.log(m.config.pixel_threshold / (1 - m.config.pixel_threshold))
    shift(m.router.layers.down, layers, 0)
    shift(m.router.pixels.down, enough, threshold)


@contextmanager
def watched(m):
    """Within, what runs: tiles through the encoder, and tokens through each layer's MLP."""
    tiles, rows = [], dict.fromkeys(range(m.config.layers), 0)
    hooks = [m.vision_tower.register_forward_pre_hook(lambda _, args: tiles.extend(args[0].clone()))]
    for l, block in enumerate(m.language_model.layers):
        def count(_, args, l=l):
            rows[l] += args[0][..., 0].numel()
        hooks.append(block.mlp.register_forward_pre_hook(count))
    try:
        yield tiles, rows
    finally:
        for hook in hooks:
            hook.remove()


def sorted_tiles(tiles):
    return sorted(x.numpy().tobytes() for x in tiles)


def tiles_of(prompts):
    """Every tile of some prompts, once."""
    return sorted_tiles(x for p in prompts for image in p.images
                        for x in normalise(torch.from_numpy(image.pixels), torch.float32))


def tokens_of(c, sa, text, vision):
    """Tokens that each layer takes in configuration sa."""
    last = c.vision_readers(sa)[1]
    return np.array([text + vision * (l in sa and l < last) for l in range(c.layers)])


def before(c, stop):
    """One token in each layer before `stop`."""
    return np.array([int(l < stop) for l in range(c.layers)])


# --- the overview of a prompt ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"multi_image_newline": False}, {"pack": 2.0}, {"max_tiles": 1}], ids=str)
def test_the_overview_is_the_base_tile_and_one_newline(changes):
    """As if the text stood around one tile with one newline; the text behind the image moves, that before it stays."""
    m, rng = tiny.model(visor=False, **changes), random.Random(0)
    c = m.config
    for _ in range(5):
        size = rng.randint(20, 100), rng.randint(20, 100)
        image = tiny.image(*size, rng.randrange(1 << 30))
        processed = data.process_image(image, c)
        text = chatml([f"{words(rng)}{IMAGE}{words(rng)}", words(rng), words(rng)])
        whole = encode(text, m.tokenizer, [processed], start=rng.randrange(5))
        small = data.overview(whole, c)
        tokens = c.side ** 2 + 1
        assert data.overview_tokens(c) == len(small.v_pos) == tokens and small.v_img == [0] * tokens
        lone = Tiling(None, None, (0, 0), (0, 0), (0, 0), False, 1, tokens)
        alike = encode(text, m.tokenizer, [ProcessedImage(processed.pixels[:1], lone)], start=whole.t_pos[0])
        assert small._replace(images=None) == alike._replace(images=None)
        assert [x.tiling for x in small.images] == [lone]
        base = np.asarray(image.resize((c.tile, c.tile), Image.BICUBIC)).transpose(2, 0, 1)
        assert np.array_equal(small.images[0].pixels, base[None])
        first, dropped = whole.v_pos[0], len(whole.v_pos) - tokens
        n = sum(p < first for p in whole.t_pos)
        assert 0 < n < len(whole.ids) and small.ids == whole.ids and dropped > 0
        assert small.t_pos == whole.t_pos[:n] + [p - dropped for p in whole.t_pos[n:]]
        assert small.v_pos == list(range(first, first + tokens))
        assert small.answer_starts == [p - dropped for p in whole.answer_starts] and len(small.answer_starts) == 2
        assert small.end == whole.end - dropped


def test_an_answer_before_the_image_stays_where_it_is():
    m = tiny.model(visor=False)
    image = data.process_image(tiny.image(60, 90), m.config)
    whole = encode(chatml(["a", "b", f"{IMAGE}c"]), m.tokenizer, [image])
    small, dropped = data.overview(whole, m.config), len(whole.v_pos) - 17
    assert small.answer_starts == [whole.answer_starts[0], whole.answer_starts[1] - dropped]


def test_where_there_is_no_overview():
    """No image, two, a lone tile, and a question that goes on behind one: they are seen as they are."""
    m, rng = tiny.model(visor=False), random.Random(1)
    lone = encode(f"a{IMAGE}b", m.tokenizer, [picture(m, rng, single=False)])
    two = encode(f"{IMAGE}{IMAGE}", m.tokenizer, [picture(m, rng, single=False) for _ in range(2)])
    one = encode(f"a{IMAGE}b", m.tokenizer, [picture(m, rng)])
    for p in (encode("abc", m.tokenizer), two, lone, encode("abc", m.tokenizer, start=70), data.overview(one, m.config)):
        assert data.overview(p, m.config) is None and data.seen(p, "overview", m.config) is p
    assert data.seen(one, "all", m.config) is one and len(data.seen(one, "overview", m.config).v_pos) == 17


# --- answers --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def divided():
    """A model whose router sends some of these prompts to the overview, and some to others' layers; the last three have
    no image, two, and one image in several turns."""
    m = model(1)
    prompts = prompts_of(m, 12)
    divide(m, prompts)
    prompts += prompts_of(m, 1, 1, images=0) + prompts_of(m, 1, 2, images=2) + prompts_of(m, 2, 3, turns=2)
    return m, prompts


def test_answers_are_those_of_the_same_plan_by_hand(divided):
    """In one batch and alone; the plan is the one that a routing token without any cache would choose."""
    m, prompts = divided
    plans = []
    answers = m.generate(prompts, "auto", "auto", max_tokens=6, routes=plans)
    assert all(type(plan) is Plan for plan in plans)
    for kind in ("overview", "all"):
        assert len({plan.sa for plan in plans if plan.pixels == kind}) >= 2, plans
    assert plans[:14] == [plan_of(m, p) for p in prompts[:14]] and [x.pixels for x in plans[12:14]] == ["all"] * 2
    assert len(set(map(tuple, answers))) > 12
    for p, plan, answer in zip(prompts, plans, answers):
        routes, seen = [], data.seen(p, plan.pixels, m.config)
        assert m.generate([p], plan.sa, plan.pixels, max_tokens=6, routes=routes) == [answer] and routes == [plan]
        assert m.generate([p], "auto", "auto", max_tokens=6, routes=routes) == [answer] and routes == [plan]
        assert m.generate([seen], plan.sa, max_tokens=6) == [answer]  # the overview is a prompt like others


def test_pixels_named_by_hand(divided):
    """Also with layers of each prompt's own, or routed among those trained for these pixels; routes say what was seen,
    and on_token which prompt a token belongs to."""
    m, prompts = divided
    small = [i for i, p in enumerate(prompts) if data.overview(p, m.config)]
    for kind in ("overview", "all"):
        routes, came = [], [[] for _ in prompts]
        answers = m.generate(prompts, "auto", kind, max_tokens=4, routes=routes,
                             on_token=lambda i, token: came[i].append(token))
        assert [x.pixels == "overview" for x in routes] == [kind == "overview" and i in small for i in range(16)]
        assert all(x.sa in m.config.configurations(x.pixels) for x in routes) and came == answers
        assert answers == m.generate(prompts, [x.sa for x in routes], kind, max_tokens=4)


def test_the_router_is_content_only_where_it_may_be():
    """pixels "auto" ask for a router with both heads, and for layers that it chooses."""
    m, plain = model(2), model(2, overview=())
    for own, sa in ((m, (1, 4)), (m, [(1, 4)]), (plain, "auto"), (tiny.model(), "auto")):
        with pytest.raises(ValueError, match="pixels|router"):
            own.generate(prompts_of(m, 1), sa, "auto")
    with pytest.raises(ValueError, match="not trained for the overview"):
        plain.generate(prompts_of(m, 1), "auto", "overview")
    assert m.router.pixels is not None and plain.router.pixels is None


@pytest.mark.parametrize("overview", [((1,), (1, 7)), ((1, 4), (1, 4, 7), (1, 4, 7, 10))], ids=str)
def test_configurations_over_the_overview_may_branch_later_than_over_all_pixels(overview):
    """The route layer is 4, but those trained for the overview first differ in layer 7."""
    m = model(3, overview=overview)
    prompts, plans = prompts_of(m, 10, 4), []
    divide(m, prompts)
    answers = m.generate(prompts, "auto", "auto", max_tokens=3, routes=plans)
    assert plans == [plan_of(m, p) for p in prompts] and len({x for x in plans if x.pixels == "overview"}) >= 2
    assert {x.pixels for x in plans} == {"overview", "all"}
    assert answers == [m.generate([p], *plan, max_tokens=3)[0] for p, plan in zip(prompts, plans)]


def test_layers_that_may_not_be_chosen_are_not_chosen_over_the_overview_either(divided):
    """allowed (--budget) holds for both; where it leaves nothing over the overview, all pixels are seen."""
    m, prompts = divided
    for allowed in ([(1,)], [(1, 4)], [(1, 7), (1, 4, 7)]):
        routes = []
        answers = m.generate(prompts, "auto", "auto", max_tokens=2, allowed=allowed, routes=routes)
        assert {x.sa for x in routes} <= set(allowed)
        assert answers == [m.generate([p], *plan, max_tokens=2)[0] for p, plan in zip(prompts, routes)]
        assert any(x.pixels == "overview" for x in routes) == bool(set(allowed) & set(OVERVIEW))


# --- nothing is done twice ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("overview", [((1,),), OVERVIEW], ids=str)
def test_nothing_is_done_twice(overview):
    """Tiles that are encoded, and tokens that each layer takes, of every prompt alone: one that is content runs over
    one tile once; of another all tiles are encoded once, and nothing more of the overview runs than up to the pixel
    layer. On top come routing tokens: to decide on the pixels, and where there is a choice of layers on these."""
    m = model(4, overview=overview)
    prompts, c, kinds = prompts_of(m, 8, 5), m.config, []
    divide(m, prompts)
    small = data.overview_tokens(c)
    for p in prompts:
        routes = []
        with watched(m) as (tiles, rows):
            m.generate([p], "auto", "auto", max_tokens=1, routes=routes)
        (sa, pixels), = routes
        kinds.append(pixels)
        wanted = before(c, c.pixel_layer)
        if pixels == "overview":
            wanted += tokens_of(c, sa, len(p.ids), small) + (len(overview) > 1) * before(c, c.route_layer)
        else:
            wanted += tokens_of(c, (1,), len(p.ids), small) * before(c, c.pixel_layer)
            wanted += tokens_of(c, sa, len(p.ids), len(p.v_pos)) + before(c, c.route_layer)
        assert list(rows.values()) == wanted.tolist(), pixels
        assert sorted_tiles(tiles) == tiles_of([p if pixels == "all" else data.overview(p, c)])
    assert set(kinds) == {"overview", "all"}


def test_in_a_batch_each_tile_is_encoded_once(divided):
    m, prompts = divided
    routes = []
    with watched(m) as (tiles, _):
        m.generate(prompts, "auto", "auto", max_tokens=1, routes=routes)
    assert sorted_tiles(tiles) == tiles_of([data.seen(p, plan.pixels, m.config) for p, plan in zip(prompts, routes)])
    with watched(m) as (tiles, rows):  # with pixels named nothing is decided
        m.generate(prompts[:1], (1,), "overview", max_tokens=1)
    assert len(tiles) == 1 and list(rows.values()) == tokens_of(m.config, (1,), len(prompts[0].ids), 17).tolist()


def test_known_features_are_those_of_the_tiles(divided):
    m, prompts = divided
    images = [p.images[0] for p in prompts[:4]]
    with torch.no_grad():
        alone = [m.pieces([x])[0] for x in images]
        known = [alone[0][:1], None, alone[2], alone[3][:2]]
        with watched(m) as (tiles, _):
            found = m.pieces(images, known)
    assert len(tiles) == sum(x.tiling.tiles for x in images) - 1 - len(alone[2]) - 2
    for a, b, image in zip(found, alone, images):
        assert a.shape == b.shape == (image.tiling.tiles, 16, 64) and torch.allclose(a, b, atol=1e-5)


# --- conversations --------------------------------------------------------------------------------------------------

def questions_about(m, n, seed):
    """(what questions about one image share, what is each one's own, whole prompts)."""
    rng = random.Random(seed)
    image = picture(m, rng)
    texts = [chatml([f"{IMAGE}\n{words(rng)}"]) for _ in range(n)]
    prefix = encode(split_shared(texts[0])[0], m.tokenizer, [image])
    own = [encode(split_shared(t)[1], m.tokenizer, start=prefix.end) for t in texts]
    return prefix, own, [encode(t, m.tokenizer, [image]) for t in texts]


def test_each_question_about_an_image_is_decided_for_itself():
    """In any order, and equal to asking it alone; the image is encoded once for all, and its other tiles not at all
    until a question needs them."""
    m = model(5)
    prefix, own, whole = questions_about(m, 10, 6)
    divide(m, whole)
    wanted = [plan_of(m, p) for p in whole]
    alone = m.generate(whole, "auto", "auto", max_tokens=5)
    content = [i for i, plan in enumerate(wanted) if plan.pixels == "overview"]
    others = [i for i in range(10) if i not in content]
    assert content and others and len(set(wanted)) >= 4
    for order in ([*content, *others, *content], [*others, *content], [*range(10), 3, 0, 7]):
        with watched(m) as (tiles, rows):
            talk, routes = Conversation(m, prefix, "auto", "auto", text_capacity=8), []
            for k, i in enumerate(order):
                assert talk.answer(own[i], max_tokens=5, routes=routes) == alone[i] and routes == [wanted[i]]
                if order[:k + 1] == content[:k + 1]:
                    assert len(tiles) == 1
        assert sorted_tiles(tiles) == tiles_of([prefix])
    for kind, plan in (("overview", (1, 7)), ("all", (1, 4))):  # named by hand
        talk = Conversation(m, prefix, plan, kind)
        for i in (2, 0, 2):
            assert talk.answer(own[i], max_tokens=5, routes=routes) == m.generate([whole[i]], plan, kind,
                                                                                  max_tokens=5)[0]
            assert routes == [Plan(plan, kind)]


def test_the_images_run_once_with_each_kind_of_pixels():
    """Tokens of each layer: those of the questions, and what they share, over the overview once, over all pixels once
    up to the route layer, and from there on once for each configuration that is taken."""
    m = model(6, viable=((1,), (1, 4)), overview=((1,),))
    prefix, own, whole = questions_about(m, 8, 7)
    divide(m, whole)
    c, wanted, n = m.config, [plan_of(m, p) for p in whole], len(prefix.ids)
    pixel_layer, route_layer = before(c, c.pixel_layer), before(c, c.route_layer)
    assert (c.pixel_layer, c.route_layer) == (2, 4) and {x.pixels for x in wanted} == {"overview", "all"}
    with watched(m) as (_, rows):
        talk = Conversation(m, prefix, "auto", "auto")
        assert list(rows.values()) == (tokens_of(c, (1,), n, 17) * pixel_layer).tolist()
        for p in own:
            talk.answer(p, max_tokens=1)
    shared = tokens_of(c, (1,), n, 17) + tokens_of(c, (1,), n, len(prefix.v_pos)) * route_layer
    for sa in {plan.sa for plan in wanted if plan.pixels == "all"}:
        shared += tokens_of(c, sa, n, len(prefix.v_pos)) * (1 - route_layer)
    for p, plan in zip(own, wanted):
        shared += len(p.ids) + pixel_layer
        if plan.pixels == "all":
            shared += len(p.ids) * pixel_layer + route_layer
    assert list(rows.values()) == shared.tolist()


def kept_turns(m, seed, turns, after=lambda talk, turn: None):
    """A conversation whose turns are kept, compared turn by turn with one prompt of all that was said so far.
    after: called with (conversation, the question) when each turn is done. Returns the plans that ran."""
    rng, taken, routes = random.Random(seed), [], []
    whole = encode(split_shared(chatml([f"{IMAGE}\nx"]))[0], m.tokenizer, [picture(m, rng)])
    with watched(m) as (tiles, _):
        talk = Conversation(m, whole, "auto", "auto", text_capacity=16)
        for _ in range(turns):
            turn = encode(f"\n{words(rng)}<|im_end|>\n{ANSWER}", m.tokenizer, start=whole.end)
            answer = talk.answer(turn, keep=True, max_tokens=4, routes=routes)
            encoded, whole = len(tiles), join(whole, turn)
            assert answer == m.generate([whole], *routes[0], max_tokens=4)[0]
            del tiles[encoded:]
            closed = answer + m.tokenizer.encode("<|im_end|>\n").ids
            whole = join(whole, Prompt(closed, [whole.end + i for i in range(len(closed))], [], [], []))
            assert talk.end == whole.end
            after(talk, encode(f"\n{words(rng)}<|im_end|>\n{ANSWER}", m.tokenizer, start=whole.end))
            taken += routes
    assert len(tiles) == max(1 if x.pixels == "overview" else whole.images[0].tiling.tiles for x in taken)
    return [plan.pixels for plan in taken]


def test_a_conversation_may_change_its_pixels():
    """What was said while the others answered is run in the cache of those that answer now; tiles are encoded once."""
    m, changes = model(7), 0
    divide(m, [join(a, b) for seed in range(4) for a, own, _ in [questions_about(m, 4, seed)] for b in own])
    for seed in range(4):
        taken = kept_turns(m, 20 + seed, 7)
        changes += sum(a != b for a, b in zip(taken, taken[1:]))
    assert changes >= 6


class Interrupted(KeyboardInterrupt):
    pass


def test_an_interrupted_answer_leaves_the_conversation_as_it_was():
    """At its second token: whatever was asked, later turns are as if it had not been."""
    m = model(7)
    divide(m, [join(a, b) for seed in range(4) for a, own, _ in [questions_about(m, 4, seed)] for b in own])
    came = []

    def interrupt(talk, turn):
        def stop(_, token):
            came.append(token)
            if len(came) % 2 == 0:
                raise Interrupted
        end = talk.end
        with pytest.raises(Interrupted):
            talk.answer(turn, keep=True, max_tokens=9, on_token=stop)
        assert talk.end == end
    for seed in range(2):
        assert len(set(kept_turns(m, 20 + seed, 6, interrupt))) == 2
    assert len(came) == 24


@pytest.mark.parametrize("at", ["language model", "encoder"])
def test_interrupted_anywhere_a_conversation_goes_on(at):
    """Ctrl-C comes when it likes: in any layer that a question runs through, while what was kept is run in the other
    cache, and while tiles are encoded. Asked again, the answer is that of a conversation that was never stopped."""
    m = model(5)
    prefix, own, whole = questions_about(m, 10, 6)
    divide(m, whole)
    bias, calls = m.router.pixels.down.bias.clone(), []
    small = next(i for i, p in enumerate(whole) if plan_of(m, p).pixels == "overview")

    def ask(stop_at=None):
        """A turn over the overview that is kept, then one over all pixels; the latter is stopped at a call of some
        module, and asked again. Returns its answer."""
        m.router.pixels.down.bias.copy_(bias)
        talk, routes = Conversation(m, prefix, "auto", "auto"), []
        talk.answer(own[small], keep=True, max_tokens=3, routes=routes)
        m.router.pixels.down.bias.sub_(100)
        question = encode(split_shared(chatml([f"{IMAGE}\nb c"]))[1], m.tokenizer, start=talk.end)
        calls[:] = []

        def stop(*_):
            calls.append(1)
            if len(calls) == stop_at:
                raise Interrupted
        hooks = [x.register_forward_pre_hook(stop)
                 for x in ([m.vision_tower] if at == "encoder" else m.language_model.layers)]
        try:
            if stop_at:
                with pytest.raises(Interrupted):
                    talk.answer(question, max_tokens=3)
            answer = talk.answer(question, max_tokens=3, routes=(second := []))
        finally:
            for hook in hooks:
                hook.remove()
        assert routes[0].pixels == "overview" and second[0].pixels == "all"
        return answer
    wanted = ask()
    total = len(calls)
    assert total == 1 if at == "encoder" else total > 40
    for k in range(1, total + 1):
        assert ask(k) == wanted, k
