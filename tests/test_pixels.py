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
from config import Config, Plan
from conversation import Conversation
from costs import Costs, Route
from data import (ANSWER, IMAGE, ProcessedImage, Prompt, Tiling, chatml, collate, encode, join, place_images,
                  split_shared)
from encoders import normalise
from evaluation import all_results
from families import read_config
from layout import Past, make_layout
from model import VLM
from tests import tiny
from tests.test_flops import counted
from tests.test_sample import call
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
    """A random image of up to four tiles and the base tile."""
    size = rng.randint(20, 64), rng.randint(20, 64)
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
def token_of(m, token, prompt, start, stop):
    """A routing token of a question before position `start` as it enters layer `stop`: without a cache, as the last
    token of a text that ends there."""
    n, common = sum(p < start for p in prompt.t_pos), set.intersection(*map(set, m.config.viable))
    batch = collate([Prompt(prompt.ids[:n], prompt.t_pos[:n], prompt.v_pos, prompt.v_img, prompt.images)])
    t, v = m.embed(batch)
    t = torch.cat([t, token[None, None]], dim=1)
    layout = make_layout(np.append(batch.t_pos, [[start]], axis=1), *batch.positions[1:], Past.empty(1), m.config,
                         m.device)
    return m.language_model.run(t, v, layout, (*common, m.config.layers - 1), stop=stop)[0][0, -1]


def scores_of(m, prompt, pixels):
    """By hand: of each question of a prompt the score of the overview, and those of the layers with these pixels."""
    c, heads = m.config, m.router
    seen, small = data.seen(prompt, pixels, c), data.overview(prompt, c)

    def of(head, prompt, stop):
        return [head(token_of(m, head.token, prompt, start, stop)) for start in prompt.answer_starts]
    enough = [x.item() for x in of(heads.pixels, small, c.pixel_layer)] if small else []
    return enough, torch.stack(of(heads.layers, seen, c.route_layer))


def plan_of(m, prompt):
    """By hand, of a prompt of one question: the plan that the router chooses (route_threshold 1: the likeliest)."""
    enough, _ = scores_of(m, prompt, "all")
    content = bool(enough) and torch.tensor(min(enough)).sigmoid() >= m.config.pixel_threshold
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
                        for x in normalise(torch.from_numpy(image.pixels), torch.float32, Config()))


def tokens_of(c, sa, text, vision):
    """Tokens that each layer takes in configuration sa."""
    last = c.vision_readers(sa)[1]
    return np.array([text + vision * (l in sa and l < last) for l in range(c.layers)])


def before(c, stop):
    """One token in each layer before `stop`."""
    return np.array([int(l < stop) for l in range(c.layers)])


# --- the overview of a prompt ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"multi_image_newline": False}, {"reduce": "pack:2"}, {"max_tiles": 1}],
                         ids=str)
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
        lone = Tiling(None, None, (0, 0), (0, 0), (0, 0), False, 1, tokens, (c.side,) * 2, (c.patches,) * 2)
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
    text, later = encode("abc", m.tokenizer), encode("abc", m.tokenizer, start=70)
    for p in (text, later, two, lone, data.overview(one, m.config)):
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
    answers = m.generate(prompts, "auto", "auto", max_tokens=3, routes=plans)
    assert all(type(plan) is Plan for plan in plans)
    for kind in ("overview", "all"):
        assert len({plan.sa for plan in plans if plan.pixels == kind}) >= 2, plans
    assert plans[:14] == [plan_of(m, p) for p in prompts[:14]] and [x.pixels for x in plans[12:14]] == ["all"] * 2
    assert len(set(map(tuple, answers))) >= 8
    for p, plan, answer in zip(prompts, plans, answers):
        routes, seen = [], data.seen(p, plan.pixels, m.config)
        assert m.generate([p], plan.sa, plan.pixels, max_tokens=3, routes=routes) == [answer] and routes == [plan]
        assert m.generate([p], "auto", "auto", max_tokens=3, routes=routes) == [answer] and routes == [plan]
        assert m.generate([seen], plan.sa, max_tokens=3) == [answer]  # the overview is a prompt like others


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
    prompts, plans = prompts_of(m, 10, 18), []
    divide(m, prompts)
    answers = m.generate(prompts, "auto", "auto", max_tokens=3, routes=plans)
    assert plans == [plan_of(m, p) for p in prompts] and len({x for x in plans if x.pixels == "overview"}) >= 2
    assert {x.pixels for x in plans} == {"overview", "all"}
    assert answers == [m.generate([p], *plan, max_tokens=3)[0] for p, plan in zip(prompts, plans)]


def test_layers_that_may_not_be_chosen_are_not_chosen_over_the_overview_either(divided):
    """allowed (--budget) holds for both; where it leaves nothing over the overview, all pixels are seen."""
    m, prompts = divided
    prompts = prompts[:8]
    for allowed in ([(1, 4)], [(1, 7), (1, 4, 7)]):
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


def test_a_batch_that_parts_runs_nothing_twice():
    """Prompts of one length, routed over the overview in two configurations that part behind the pixel layer: each
    layer takes each token once, beside routing tokens; also where some of them are content and some not."""
    m, rng = model(10), random.Random(13)
    c, images = m.config, [data.process_image(tiny.image(60, 90, i), m.config) for i in range(6)]
    prompts = [encode(chatml([f"{IMAGE}\n" + "".join(rng.choices(LETTERS, k=9))]), m.tokenizer, [x]) for x in images]
    divide(m, prompts)
    n, vision, small = len(prompts[0].ids), len(prompts[0].v_pos), 17
    for kind in ("all", "overview", "auto"):
        routes = []
        with watched(m) as (_, rows):
            m.generate(prompts, "auto", kind, max_tokens=1, routes=routes)
        assert len({x.sa for x in routes}) >= 2 and len({x.pixels for x in routes}) == 1 + (kind == "auto")
        wanted = sum(tokens_of(c, x.sa, n, small if x.pixels == "overview" else vision) for x in routes)
        wanted += 6 * before(c, c.route_layer)
        if kind == "auto":
            wanted += 6 * before(c, c.pixel_layer) + sum(x.pixels == "all" for x in routes) * tokens_of(
                c, (1,), n, small) * before(c, c.pixel_layer)
        assert list(rows.values()) == wanted.tolist(), kind


def test_known_features_are_those_of_the_tiles(divided):
    m, prompts = divided
    images = [p.images[0] for p in prompts[:4]]
    with torch.no_grad():
        alone = [m.pieces([x])[0] for x in images]
        known = [alone[0].of(slice(1)), None, alone[2], alone[3].of(slice(2))]
        with watched(m) as (tiles, _):
            found = m.pieces(images, known)
    assert len(tiles) == sum(x.tiling.tiles for x in images) - 1 - len(alone[2].features) - 2
    for a, b, image in zip(found, alone, images):
        a, b = a.features, b.features
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
    alone = m.generate(whole, "auto", "auto", max_tokens=2)
    content = [i for i, plan in enumerate(wanted) if plan.pixels == "overview"]
    others = [i for i in range(10) if i not in content]
    assert content and others and len(set(wanted)) >= 4
    for order in ([*content, *others, content[0]], [*others[:2], *content[:2], others[0]]):
        with watched(m) as (tiles, rows):
            talk, routes = Conversation(m, prefix, "auto", "auto", text_capacity=8), []
            for k, i in enumerate(order):
                assert talk.answer(own[i], max_tokens=2, routes=routes) == alone[i] and routes == [wanted[i]]
                if order[:k + 1] == content[:k + 1]:
                    assert len(tiles) == 1
        assert sorted_tiles(tiles) == tiles_of([prefix])
    for kind, plan in (("overview", (1, 7)), ("all", (1, 4))):  # named by hand
        talk = Conversation(m, prefix, plan, kind)
        for i in (2, 0, 2):
            assert talk.answer(own[i], max_tokens=2, routes=routes) == m.generate([whole[i]], plan, kind,
                                                                                  max_tokens=2)[0]
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


def kept_turns(m, kinds, seed, after=lambda talk, turn: None):
    """A conversation whose turns are kept, compared turn by turn with one prompt of all that was said so far.
    kinds: the pixels that the router is made to choose. after: called with (conversation, another question) when a
    turn is done. Returns the plans that ran."""
    rng, taken, routes, bias = random.Random(seed), [], [], m.router.pixels.down.bias.clone()
    whole = encode(split_shared(chatml([f"{IMAGE}\nx"]))[0], m.tokenizer, [picture(m, rng)])
    talk, encoded = Conversation(m, whole, "auto", "auto", text_capacity=16), 1
    for kind in kinds:
        m.router.pixels.down.bias.copy_(bias + (1000 if kind == "overview" else -1000))
        turn = encode(f"\n{words(rng)}<|im_end|>\n{ANSWER}", m.tokenizer, start=whole.end)
        with watched(m) as (tiles, _):
            answer = talk.answer(turn, keep=True, max_tokens=3, routes=routes)
            after(talk, encode(f"\n{words(rng)}<|im_end|>\n{ANSWER}", m.tokenizer, start=talk.end))
        encoded, whole = encoded + len(tiles), join(whole, turn)
        assert routes == [plan_of(m, whole._replace(answer_starts=whole.answer_starts[-1:]))]
        assert answer == m.generate([whole], *routes[0], max_tokens=3)[0] and routes[0].pixels == kind
        closed = answer + m.tokenizer.encode("<|im_end|>\n").ids
        whole = join(whole, Prompt(closed, [whole.end + i for i in range(len(closed))], [], [], []))
        assert talk.end == whole.end
        taken += routes
    m.router.pixels.down.bias.copy_(bias)
    assert encoded == whole.images[0].tiling.tiles
    return taken


KINDS = "overview overview all overview all all overview".split()


@pytest.fixture(scope="module")
def talker():
    m = model(7)
    divide(m, [join(a, b) for seed in range(4) for a, own, _ in [questions_about(m, 4, seed)] for b in own])
    return m


def test_a_conversation_may_change_its_pixels(talker):
    """What was said while the others answered is run in the cache of those that answer now; tiles are encoded once."""
    taken = kept_turns(talker, KINDS, 20) + kept_turns(talker, KINDS[2:5], 21)
    assert len(set(taken)) >= 4 and {x.pixels for x in taken} == {"overview", "all"}


class Interrupted(KeyboardInterrupt):
    pass


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(talker):
    """At its second token: whatever was asked, later turns are as if it had not been."""
    came = []

    def interrupt(talk, turn):
        def stop(_, token):
            came.append(token)
            if len(came) % 2 == 0:
                raise Interrupted
        end = talk.end
        with pytest.raises(Interrupted):
            talk.answer(turn, keep=True, max_tokens=4, on_token=stop)
        assert talk.end == end
    assert len(set(kept_turns(talker, KINDS[1:6], 24, interrupt))) >= 3 and len(came) == 10


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
        talk.answer(own[small], keep=True, max_tokens=1, routes=routes)
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
                    talk.answer(question, max_tokens=2)
            answer = talk.answer(question, max_tokens=2, routes=(second := []))
        finally:
            for hook in hooks:
                hook.remove()
        assert routes[0].pixels == "overview" and second[0].pixels == "all"
        return answer
    wanted = ask()
    total = len(calls)
    assert total == 1 if at == "encoder" else total > 40
    for k in range(1, total + 1, 7):
        assert ask(k) == wanted, k


# --- how sure the router must be ------------------------------------------------------------------------------------

def test_the_threshold_is_strict():
    """Of several questions in a prompt each must reach it, whichever is the least sure, whoever else is in the batch;
    the probability itself is the scores' sigmoid."""
    m = model(8)
    prompts = prompts_of(m, 3, 9, turns=3) + prompts_of(m, 2, 10, turns=2) + prompts_of(m, 1, 11)
    divide(m, prompts)
    m.router.pixels.down.weight.mul_(0.25)  # no probability is so near 0 or 1 that floats cannot tell
    m.router.pixels.down.bias.mul_(0.25)
    p = [[1 / (1 + np.exp(-x)) for x in scores_of(m, prompt, "all")[0]] for prompt in prompts]
    least = [min(x) for x in p]
    assert len({x.index(min(x)) for x in p if len(x) > 1}) > 1 and sum(max(x) > 1.2 * min(x) for x in p) >= 3
    for i, near in product(range(0, len(prompts), 2), (-1e-4, 1e-4)):
        m.config.pixel_threshold, routes = least[i] * (1 + near), []
        m.generate(prompts, "auto", "auto", max_tokens=1, routes=routes)
        assert [x.pixels == "overview" for x in routes] == [x >= m.config.pixel_threshold for x in least]
        assert (routes[i].pixels == "overview") == (near < 0)
    m.config.pixel_threshold = 0.0
    m.generate(prompts, "auto", "auto", max_tokens=1, routes=routes)
    assert {x.pixels for x in routes} == {"overview"}


def test_a_broken_router_says_so():
    m = model(8)
    m.router.pixels.down.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="router's output"):
        m.generate(prompts_of(m, 2), "auto", "auto")


# --- evaluation, labels, training -----------------------------------------------------------------------------------

def test_evaluation_of_all_plans_is_that_of_each_alone():
    """And "route" is the plan that generate takes. Some answers are right, as they are the model's own with one of the
    plans: it speaks ASCII, and its head is made to end each after two tokens."""
    m = model(9)
    names = m.tokenizer.get_vocab()
    m.lm_head.weight[[i for name, i in names.items() if not name.isascii() or len(name) > 1]] = 0
    rng, eval_set = random.Random(12), []
    images = [tiny.image(rng.randint(20, 90), rng.randint(20, 90), i) for i in range(4)]
    prompts = [[(q := words(rng), encode(chatml([place_images(q, 1)]), m.tokenizer, [data.process_image(x, m.config)]))
                for _ in range(2)] for x in images]
    divide(m, [p for row in prompts for _, p in row])
    plans = m.config.plans
    assert plans == (*[Plan(sa, "overview") for sa in OVERVIEW], *[Plan(sa, "all") for sa in VIABLE])
    ends = []  # (hidden state, whether an answer of two tokens ends there)
    for i, (image, row) in enumerate(zip(images, prompts)):
        questions = []
        for k, (q, p) in enumerate(row):
            sa, kind = plans[(5 * k + i) % len(plans)]
            answer, = m.generate([p], sa, kind, max_tokens=2)
            seen = data.seen(p, kind, m.config)
            said = join(seen, Prompt(answer, [seen.end, seen.end + 1], [], [], []))
            ends += zip(m(collate([said]), sa)[0][-3:], (-30.0, -30.0, 30.0))
            questions.append((f"task {k}", q, m.tokenizer.decode(answer)))
        eval_set.append((image, questions))
    h, wanted = torch.stack([h for h, _ in ends]), torch.tensor([x for _, x in ends])
    m.lm_head.weight[names["<|im_end|>"]] = torch.linalg.lstsq(h, wanted[:, None]).solution[:, 0]
    results = all_results(m, eval_set, plans, progress=False)
    assert len(results) == 8
    for i, plan in enumerate(plans):
        for r, alone in zip(results, all_results(m, eval_set, [plan], progress=False)):
            assert [r[k] for k in ("image", "task", "question")] == [alone[k] for k in ("image", "task", "question")]
            assert ([r["correct"][i]], [r["prefix_match"][i]]) == (alone["correct"], alone["prefix_match"])
            assert r["loss"][i] == pytest.approx(alone["loss"][0], abs=2e-3) and "route" not in alone
    for kind in ("overview", "all"):  # plans do differ, and some answers are right with these pixels
        own = [i for i, plan in enumerate(plans) if plan.pixels == kind]
        assert any(r["correct"][i] for r in results for i in own)
    assert len({tuple(r["loss"]) for r in results}) == 8 and any(len(set(r["correct"])) == 2 for r in results)
    routes, flat = [], [p for row in prompts for _, p in row]
    m.generate(flat, "auto", "auto", max_tokens=1, routes=routes)
    assert [plans[r["route"]] for r in results] == routes and {x.pixels for x in routes} == {"overview", "all"}


PLANS = [Plan((), "overview"), Plan((4,), "overview"), Plan(()), Plan((4,)), Plan((4, 7))]


def result(task, correct, **more):
    return {"image": 0, "task": task, "question": f"of {task}", "correct": correct, "prefix_match": correct,
            "loss": [1.0] * len(correct), **more}


def test_labels_say_whether_the_overview_will_do_and_which_layers_if_it_were_not_there():
    """99 % of what the largest plan over all pixels can do is enough, 98 % is not; the layers are those that are
    cheapest over all pixels, whatever is said of the pixels."""
    full = [1, 1, 1, 1, 1]
    rows = [result("enough", full)] * 99 + [result("enough", [0, 0, 0, 1, 1])]             # 0.99 of it; all hold
    rows += [result("short", full)] * 98 + [result("short", [0, 0, 0, 1, 1])] * 2          # 0.98
    rows += [result("other layers", [1, 1, 0, 1, 1])] * 4                                  # over all pixels (4,)
    rows += [result("second", [0, 1, 0, 0, 1])] * 4                                        # (4,) over the overview
    rows += [result("hard", [0, 0, 0, 0, 1])] * 3 + [result("hard", [1, 1, 0, 0, 0])]      # 0.25 of 0.75
    rows += [result("half", [1, 0, 0, 1, 1]), result("half", [0, 0, 0, 0, 0])]             # 0.5 of 0.5
    wanted = {"enough": (True, ()), "short": (False, (4,)), "other layers": (True, (4,)), "second": (True, (4, 7)),
              "hard": (False, (4, 7)), "half": (True, (4,))}
    labels = router.pseudo_labels(PLANS, rows)
    assert [(image, q) for image, q, *_ in labels] == [(0, r["question"]) for r in rows]
    assert {q[3:]: rest for _, q, *rest in labels} == {task: list(x) for task, x in wanted.items()}
    assert {q[3:] for _, q, *_ in router.pseudo_labels(PLANS, rows, leave_out=["hard", "half"])} == {*wanted} - {
        "hard", "half"}
    best = router.labels_by_task(PLANS, rows)
    assert (best["enough"], best["second"], best["short"]) == (0, 1, 3)
    assert router.labels_by_task(PLANS, rows, keep=0.98)["short"] == 0


def test_labels_by_sample():
    """Of each question alone: the overview will do where no plan over all pixels matches more of the answer."""
    for prefix_match, wanted in (([2, 1, 2, 2, 2], (True, ())), ([1, 1, 1, 1, 2], (False, (4, 7))),
                                 ([1, 2, 1, 2, 2], (True, (4,))), ([3, 1, 1, 2, 2], (True, (4,)))):
        (_, _, *label), = router.pseudo_labels(PLANS, [result("a", [0] * 5, prefix_match=prefix_match)], per="sample")
        assert tuple(label) == wanted


def test_stage_3_learns_which_words_ask_for_all_pixels():
    """From questions about shades, for which the overview will do, and others; nothing but the router changes."""
    m = fresh(1).add_cross_attention(world.CA, world.SA, world.VIABLE, world.OVERVIEW).eval()
    torch.manual_seed(0)
    m.add_router().requires_grad_(False)
    m.router.requires_grad_(True)
    before = {n: p.clone() for n, p in m.named_parameters()}
    eval_set = world.eval_set(0, 8, world.TRAIN)
    targets = [(i, q, world.TASKS[task].level < 0, m.config.viable[max(0, world.TASKS[task].level)])
               for i, (_, questions) in enumerate(eval_set) for task, q, _ in questions
               if world.TASKS[task].level < 0 or task in ("where", "read", "odd row")]
    batches = router.RouterBatches(m, eval_set, targets, 0, 24)
    opt = torch.optim.AdamW(m.router.parameters(), 0.03)
    for step in range(40):  # a model that knows nothing: the words alone tell
        losses = list(batches.losses(batches[step], None, step))
        assert len(losses) == 2
        sum(losses).backward()
        opt.step()
        opt.zero_grad()
    after = dict(m.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith("router.")}
    prompts, enough, _ = router.RouterBatches(m, eval_set, targets, 1, 64)[0]
    small = [data.overview(p, m.config) for p in prompts]
    m.config.pixel_threshold = 0.5
    with torch.no_grad():
        tree = m.prefill(small, "auto", pixels="overview")
        content = m.overview_will_do(tree, [p.answer_starts for p in small])
    assert 10 < enough.sum() < 54 and np.mean(np.array(content) == enough.numpy()) > 0.95


def test_the_losses_are_the_cross_entropies_of_both_heads(divided):
    """Worked out from routing tokens without a cache, with label smoothing and without."""
    m, prompts = divided
    prompts = prompts[:4]
    enough, numbers = torch.tensor([True, False, False, True]), torch.tensor([0, 4, 2, 1])
    pixels = torch.tensor([scores_of(m, p, "all")[0][0] for p in prompts]).double()
    layers = torch.stack([scores_of(m, p, "all")[1][0] for p in prompts])
    for smoothing in (0.0, 0.1):
        batches = router.RouterBatches(m, [], [], 0, label_smoothing=smoothing)
        of_layers, of_pixels = batches.losses((prompts, enough, numbers), None, 0)
        wanted = enough.double() * (1 - smoothing) + smoothing / 2
        by_hand = -(wanted * F.logsigmoid(pixels) + (1 - wanted) * F.logsigmoid(-pixels)).mean()
        assert of_pixels.item() == pytest.approx(by_hand.item(), rel=1e-3)
        by_hand = F.cross_entropy(layers, numbers, label_smoothing=smoothing)
        assert of_layers.item() == pytest.approx(by_hand.item(), rel=1e-3)
    assert len(list(batches.losses((prompts_of(m, 2, images=0), enough[:2], numbers[:2]), None, 0))) == 1


# --- what it costs --------------------------------------------------------------------------------------------------

def tree_over(m, prompt):
    """A cache over the overview with this prompt in it, up to the pixel layer."""
    seen = data.overview(prompt, m.config)
    return m.prefill([seen], "auto", 0, pixels="overview"), [seen.answer_starts]


@pytest.mark.parametrize("changes", [{}, {"reduce": "pack:4"}], ids=str)
def test_pixel_flops_are_those_that_torch_counts(changes):
    m = model(11, **changes)
    for p in prompts_of(m, 3, 14):
        says = flops.pixel_flops(m.config, len(p.ids))
        assert says == pytest.approx(counted(m.overview_will_do, *tree_over(m, p)), rel=0.005)


@pytest.mark.parametrize("overview", [((1,),), OVERVIEW], ids=str)
def test_costs_of_a_conversation(overview):
    """Overview, all, overview, all: each step's sum by hand from what runs; and what torch counts when it runs."""
    m = model(12, overview=overview)
    prefix, own, whole = questions_about(m, 10, 15)
    divide(m, whole)
    c, plans, n = m.config, [plan_of(m, p) for p in whole], len(prefix.ids)
    kinds = {kind: [i for i, x in enumerate(plans) if x.pixels == kind] for kind in ("overview", "all")}
    order = [i for pair in zip(kinds["overview"], kinds["all"]) for i in pair][:4]
    tiles, vision, small = prefix.images[0].tiling.tiles, len(prefix.v_pos), data.overview_tokens(c)
    costs, ran = Costs(c, prefix.images, vision), {"overview": [], "all": []}
    run, squares, spent, dense = flops.llm_flops, 0, [0, 0], [0, 0]
    every = tuple(range(12))
    for k, i in enumerate(order):
        sa, kind = plans[i]
        seen, more, questions = small if kind == "overview" else vision, len(own[i].ids), len(overview) > 1
        llm = flops.pixel_flops(c, n + more)
        if kind == "all":  # the overview was there already; the question ran up to the pixel layer
            llm += run(c, overview[0], more, 0, n, small, head=False, layers=range(c.pixel_layer))
        if kind == "all" or questions:
            llm += flops.router_flops(c, n + more, seen)
        new = set(range(12))  # layers in which what they share has not run yet
        for other in ran[kind]:
            differ = [l for l in range(12) if (l in sa) != (l in other)]
            new -= set(range(min(differ, default=12)))
        llm += run(c, sa, n, seen, head=False, layers=sorted(new))
        squares += sum(x * (x - 1) * 2 * c.heads * c.head_dim for l, x in enumerate(tokens_of(c, sa, n, seen))
                       if l in new and not (l in sa and x == n))  # torch counts causal attention's other half
        llm += run(c, sa, more, 0, n, seen) + run(c, sa, 1, 0, n + more, seen) + run(c, sa, 1, 0, n + more + 1, seen)
        ran[kind].append(sa)
        left = 0 if k > 1 else 1 if k == 0 else tiles - 1
        encoder = flops.tower_flops(c, left) + flops.connector_flops(c, left)
        alone = run(c, every, n, vision, head=False) * (k == 0) + run(c, every, more, 0, n, vision)
        steps = sum(run(c, every, 1, 0, n + more + j, vision) for j in (0, 1))
        tower = (flops.tower_flops(c, tiles) + flops.connector_flops(c, tiles)) * (k == 0)
        found = costs.add(Route("x", "auto", "auto", plans[i]), prefix, own[i], 3)
        assert (found["encoder"], found["llm"], found["llm_dense"]) == (encoder, llm, alone + steps)
        answer = run(c, sa, 1, 0, n + more, seen) + run(c, sa, 1, 0, n + more + 1, seen)
        spent = [spent[0] + llm, spent[1] + llm - answer + encoder]
        dense = [dense[0] + alone + steps, dense[1] + alone + tower]
        assert found["saving"] == round(dense[0] / spent[0], 3)
        assert found["first_token_saving"] == round(dense[1] / spent[1], 3)
    assert [plans[i].pixels for i in order] == ["overview", "all"] * 2

    def conversation():
        talk = Conversation(m, prefix, "auto", "auto")
        for i in order:
            talk.answer(own[i], max_tokens=1)
    first = Costs(c, prefix.images, vision)
    for i in order:
        first.add(Route("x", "auto", "auto", plans[i]), prefix, own[i], 1)
    assert first.total["first"] == pytest.approx(counted(conversation) - squares, rel=0.005)


@pytest.mark.parametrize("overview", [((1,),), OVERVIEW], ids=str)
def test_a_report_counts_what_the_router_costs(overview):
    """Over the overview the decision on the pixels, and on the layers where there is a choice; over all pixels both,
    and the prompt over the overview up to the pixel layer."""
    c = model(overview=overview).config
    table = report.Report(c, {}, 40, (90, 70))
    tokens, small = data.tiling(90, 70, c).tokens, data.overview_tokens(c)
    decide, choice = flops.pixel_flops(c, 40), (len(overview) > 1) * flops.router_flops(c, 40, small)
    assert table.router_flops(Plan((1,), "overview")) == decide + choice
    looked = flops.llm_flops(c, (1,), 40, small, head=False, layers=range(c.pixel_layer))
    assert table.router_flops(Plan((1, 4))) == decide + looked + flops.router_flops(c, 40, tokens)
    assert table.cost[Plan((1,), "overview")] == flops.llm_flops(c, (1,), 40, small)
    assert table.encoder["overview"] == flops.tower_flops(c, 1) + flops.connector_flops(c, 1)


# --- files and the command line -------------------------------------------------------------------------------------

def test_plans_in_config_json(tmp_path):
    m = model(13)
    m.config.pixel_threshold = 0.75
    m.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert {"sa": [1, 4], "pixels": "overview"} in raw["viable"] and "overview" not in raw and len(raw["viable"]) == 7
    c = read_config(tmp_path)
    assert (c.viable, c.overview, c.plans, c.pixel_threshold) == (VIABLE, OVERVIEW, m.config.plans, 0.75)
    again, prompts, routes = VLM.from_pretrained(tmp_path), prompts_of(m, 6, 16), ([], [])
    divide(m, prompts)
    m.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path)
    answers = [x.generate(prompts, "auto", "auto", max_tokens=3, routes=r) for x, r in zip((m, again), routes)]
    assert answers[0] == answers[1] and routes[0] == routes[1] and {x.pixels for x in routes[0]} == {"overview", "all"}


BAD_PLANS = [{"sa": [1, 4], "pixels": "some"}, {"sa": [1, 4], "pixels": None}, {"pixels": "all"}, {"sa": [1, 4]},
             [1, 4], {"sa": [1, 4, 7, 10], "pixels": "overview", "x": 1}, {"sa": [4], "pixels": "overview"}, 3, None,
             {"sa": 4, "pixels": "all"}, {"sa": [4, 1], "pixels": "all"}, {"sa": [1], "pixels": ["all"]},
             {"sa": [1], "pixels": "all"}, {"sa": [2], "pixels": "overview"}, {"sa": [99], "pixels": "all"}]


@pytest.mark.parametrize("bad", BAD_PLANS, ids=str)
def test_bad_plans_are_one_line(bad, tmp_path):
    path = tmp_path / "config.json"
    raw = json.loads(model().config.to_json())
    path.write_text(json.dumps({**raw, "viable": [*raw["viable"], bad]}))
    with pytest.raises(ValueError) as e:
        read_config(tmp_path)
    line = str(e.value)
    assert line.startswith(str(path)) and "\n" not in line and ("viable" in line or "overview" in line)


def test_what_a_config_may_say_of_the_overview():
    settings = dict(layers=12, ca=(2, 5), sa=(1, 4, 7), viable=((1,), (1, 4)))
    with pytest.raises(ValueError, match="overview.*viable"):
        Config(**settings, overview=((1, 7),))
    with pytest.raises(ValueError, match="pixel_threshold"):
        Config(pixel_threshold=1.5)
    assert Config(**settings).pixel_layer is None and Config(**settings).plans == (Plan((1,)), Plan((1, 4)))
    assert Config(**settings, overview=((1,),)).pixel_layer == 2
    assert Config(layers=12, ca=(0, 5), sa=(4, 7), viable=((), (4,)), overview=((),)).pixel_layer == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Checkpoints with a pixel head, without, and without a router; an image, and questions about it."""
    d = tmp_path_factory.mktemp("pixels")
    m = model(14)
    tiny.image(60, 90).save(d / "a.png")
    image, rng = data.process_image(Image.open(d / "a.png"), m.config), random.Random(17)
    questions = [words(rng).strip() + "?" for _ in range(6)]
    prompts = [encode(chatml([place_images(q, 1)]), m.tokenizer, [image]) for q in questions]
    divide(m, prompts)
    m.save_pretrained(d / "model")
    model(14, overview=()).save_pretrained(d / "plain")
    m2 = VLM.from_pretrained(d / "model").remove_router()
    m2.save_pretrained(d / "unrouted")
    tiny.model(visor=False).save_pretrained(d / "dense")
    return d, m, questions, prompts


@pytest.mark.parametrize("pixels", [None, "auto", "overview", "all"])
def test_the_command_line(place, capsys, pixels):
    """JSON says which pixels a question was answered from; by default the router chooses."""
    d, m, questions, prompts = place
    asked = [w for q in questions for w in ("--q", q)] + (["--pixels", pixels] if pixels else [])
    status, out, err = call(capsys, "--model", d / "model", "--image", d / "a.png", "--json", "--max-tokens", 3, *asked)
    assert status == 0, err
    rows, plans = [json.loads(line) for line in out.splitlines()], []
    answers = m.generate(prompts, "auto", pixels or "auto", max_tokens=3, routes=plans)
    assert [r["tokens"] for r in rows] == answers
    assert [(tuple(r["sa"]), r["pixels"], r["routed"]) for r in rows] == [(*plan, True) for plan in plans]
    assert {x.pixels for x in plans} == ({"overview", "all"} if pixels in (None, "auto") else {pixels})
    tokens = {"overview": 17, "all": len(prompts[0].v_pos)}
    assert [r["vision_tokens"] for r in rows] == [tokens[x.pixels] for x in plans]
    assert ("over the overview" in err) == (pixels != "all") and sum(r["flops"]["encoder"] for r in rows) == sum(
        f(m.config, 1 if pixels == "overview" else prompts[0].images[0].tiling.tiles)
        for f in (flops.tower_flops, flops.connector_flops))


@pytest.mark.parametrize("pixels", ["auto", "overview", "all"])
def test_questions_in_a_file(place, capsys, pixels):
    """--batch says the same of each as --q asked alone, but seconds."""
    d, m, questions, prompts = place
    file, plans = d / "questions.jsonl", []
    file.write_text("".join(json.dumps({"image": "a.png", "question": q}) + "\n" for q in questions))
    status, out, err = call(capsys, "--model", d / "model", "--batch", file, "--max-tokens", 3, "--pixels", pixels)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0, (err, out)
    answers = m.generate(prompts, "auto", pixels, max_tokens=3, routes=plans)
    assert [r["tokens"] for r in rows] == answers and [(tuple(r["sa"]), r["pixels"]) for r in rows] == plans
    alone = json.loads(call(capsys, "--model", d / "model", "--image", d / "a.png", "--json", "--max-tokens", 3, "--q",
                            questions[0], "--pixels", pixels)[1])
    assert rows[0]["flops"] == alone["flops"] and rows[0]["vision_tokens"] == alone["vision_tokens"]


@pytest.mark.parametrize("name, words, message", [
    ("model", ["--pixels", "auto", "--sa", "1,4"], "--pixels auto"), ("plain", ["--pixels", "auto"], "--pixels auto"),
    ("unrouted", ["--pixels", "auto"], "--pixels auto"), ("dense", ["--pixels", "auto"], "--pixels auto"),
    ("model", ["--pixels", "some"], "--pixels"), ("plain", ["--pixels", "overview"], "overview")])
def test_pixels_that_cannot_be_are_one_line(place, capsys, name, words, message):
    status, out, err = call(capsys, "--model", place[0] / name, "--image", place[0] / "a.png", "--q", "x?", *words)
    assert status == 2 and not out
    assert message in err.splitlines()[-1] and sum("error" in line for line in err.splitlines()) == 1


def test_pixels_with_layers_named_and_where_there_is_no_overview(place, capsys):
    """Over the overview in any layers, of any checkpoint; text alone and two images are as they are."""
    d, m, questions, prompts = place
    words = ["--json", "--max-tokens", 3, "--q", questions[0]]
    for name, sa in (("model", "1,7"), ("unrouted", "none")):
        own = VLM.from_pretrained(d / name)
        row = json.loads(call(capsys, "--model", d / name, "--image", d / "a.png", "--pixels", "overview", "--sa", sa,
                              *words)[1])
        wanted = own.generate([data.overview(prompts[0], own.config)], own.config.configuration(sa), max_tokens=3)
        assert [row["tokens"]] == wanted and (row["pixels"], row["vision_tokens"]) == ("overview", 17)
    for images, tokens, pixels in (([], 0, "overview"), (["--image", d / "a.png", d / "a.png"], 34, "auto")):
        row = json.loads(call(capsys, "--model", d / "model", *images, "--pixels", pixels, *words)[1])
        assert (row["pixels"], row["vision_tokens"]) == ("all", tokens)


# --- what the answer looked at --------------------------------------------------------------------------------------

def test_attention_over_the_overview(place, capsys):
    """Weights for its tokens alone, and those of an image of one tile; the page is drawn."""
    d, m, questions, prompts = place
    small, c = data.overview(prompts[0], m.config), m.config
    found = explain.attention_to_images(m, small, [40, 50], (1, 4)).weights
    assert set(found) == {1, 4, 2, 5, 8, 11} and all(w.shape == (17,) for w in found.values())
    assert all(abs(found[l].sum() - 1) < 1e-4 for l in (2, 5, 8, 11)) and all(0 < found[l].sum() < 1 for l in (1, 4))
    large = explain.attention_to_images(m, prompts[0], [40, 50], (1, 4)).weights
    assert all(w.shape == (len(prompts[0].v_pos),) for w in large.values()) and data.overview_tokens(c) == 17
    status, _, err = call(capsys, "--model", d / "model", "--image", d / "a.png", "--q", questions[0], "--pixels",
                          "overview", "--explain", d / "x.png", "--max-tokens", 3)
    assert status == 0, err
    assert (d / "x.png").stat().st_size > 10000
