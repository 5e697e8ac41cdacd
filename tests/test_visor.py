"""The three kinds of layer, what is cached and what is left out, against a slow reference that computes everything.

The reference is written from the paper's equations: one sample, one interleaved sequence, explicit masks.
"""
import itertools
import random
import string
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import decoding
from cache_tree import CacheTree
from config import PAD
from conversation import Conversation
from data import IMAGE, Prompt, chatml, collate, encode, join, place_images, process_image, split_shared
from layout import Past, make_layout
from model import VLM
from tests import tiny

DENSE = tuple(range(6))
CLOSE = 1e-4  # on logits of scale 10
LAYERS = pytest.mark.parametrize("ca, sa", [
    ((2, 5), ()), ((2, 5), (1,)), ((2, 5), (1, 4)), ((2, 5), (5,)), ((2, 5), (2, 3)), ((2, 5), DENSE), ((2,), (0, 3)),
    ((0,), ()), ((), (1,)), ((), ()), (DENSE, (0, 5)), (DENSE, ())])


# --- inputs and measures --------------------------------------------------------------------------------------------

def new(seed, **changes):
    """(model, random numbers). The head is its own, or answers would repeat one token, and makes large logits."""
    m = tiny.model(seed, **{"tied": False, "visor": "ca" not in changes, **changes})
    nn.init.normal_(m.language_model.embed_tokens.weight if m.lm_head is None else m.lm_head.weight)
    return m, random.Random(str((seed, changes)))


def words(rng):
    return "".join(rng.choices(string.ascii_letters + "    .,?é中", k=rng.randint(3, 30)))


def some_images(m, rng, n, single_image=None):
    images = [tiny.image(rng.randint(8, 60), rng.randint(8, 60), rng.randrange(1 << 30)) for _ in range(n)]
    return [process_image(x, m.config, rng.random() < 0.5 if single_image is None else single_image) for x in images]


def some_prompt(m, rng, images, turns=1, adjacent=False):
    """A conversation of random words with images anywhere in it; adjacent: two of them side by side."""
    text = chatml([words(rng) for _ in range(2 * turns - 1)], system=words(rng))
    cuts = sorted(rng.sample(range(len(text) + 1), images), reverse=True)
    for cut in [cuts[0], *cuts[:1], *cuts[2:]] if adjacent else cuts:
        text = text[:cut] + IMAGE + text[cut:]
    return encode(text, m.tokenizer, some_images(m, rng, images))


def starts(prompt):
    """The positions at which its images start."""
    return [prompt.v_pos[prompt.v_img.index(i)] for i in range(len(prompt.images))]


@torch.no_grad()
def logits(m, prompts, sa, tree=None):
    """For each prompt of a padded batch, the logits (its text tokens, vocab); with a tree, as its next segment."""
    if tree is None:
        h = m(collate(prompts), sa)
    else:
        tree.extend(prompts)
        h = m.language_model.norm(tree.run(sa)[0])
    return [m.head(row[:len(p.ids)]) for row, p in zip(h, prompts)]


def inputs(m, prompts):
    """What LanguageModel.forward takes of a batch: t, v, layout."""
    batch = collate(prompts)
    return *m.embed(batch), m.layout(batch)


def diff(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item() if a.numel() else 0.0


@contextmanager
def counting(modules, attentions=()):
    """Rows (tokens) that go into each module of a dict, by name, and into products for queries and for keys of the
    attentions of some layers: ("q", number), ("k", number)."""
    rows = dict.fromkeys(modules, 0)
    hooks = [module.register_forward_pre_hook(lambda _, args, name=name: rows.update(
        {name: rows[name] + args[0].shape[:-1].numel()})) for name, module in modules.items()]
    for l, attention in enumerate(attentions):
        rows["q", l] = rows["k", l] = 0

        def count(name, *args, l=l, real=None):
            rows["q", l] += args[0].shape[:-1].numel()
            rows["k", l] += args[name == "project_apart"].shape[:-1].numel()
            return real(*args)
        for name in ("project", "project_apart"):
            setattr(attention, name, partial(count, name, real=getattr(attention, name)))
    yield rows
    for attention in attentions:
        del attention.project, attention.project_apart
    for hook in hooks:
        hook.remove()


# --- the reference --------------------------------------------------------------------------------------------------

def slow_attention(q, k, v, may_look, c):
    """q (n, H * D), k and v (n, Hkv * D), may_look (n, n) -> (n, H * D). Whoever may look at nobody gets zero."""
    q, k, v = (x.split(c.head_dim, dim=1) for x in (q, k, v))
    heads = []
    for h in range(c.heads):
        g = h // (c.heads // c.kv_heads)
        score = (q[h] @ k[g].T / c.head_dim ** 0.5).masked_fill(~may_look, -1e30)
        heads.append((score.softmax(-1) * may_look) @ v[g])
    return torch.cat(heads, dim=1)


def slow_rotary(x, c):
    """At position p, features i and i + D / 2 of each head turn by the angle p * theta ** (-2 i / D)."""
    half = c.head_dim // 2
    angle = torch.arange(len(x)).double()[:, None] * c.rope_theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    pairs = [head.split(half, dim=1) for head in x.split(c.head_dim, dim=1)]
    return torch.cat([y for a, b in pairs for y in (a * cos - b * sin, b * cos + a * sin)], dim=1)


def slow_block(block, x, may_look, c):
    h, a = block.input_layernorm(x), block.self_attn
    q, k, v = a.qkv_proj(h).split([n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)], dim=1)
    q, k = slow_rotary(q, c), slow_rotary(k, c)
    x = x + a.o_proj(slow_attention(q, k, v, may_look, c))
    return x + block.mlp(block.post_attention_layernorm(x))


def slow_cross(cross, x, is_text, image, c):
    """What each row of the interleaved sequence gets from the visual rows before it; meant for its text rows. image:
    which one each visual row belongs to."""
    y = x + cross.cpe.bias
    for i, j in itertools.product(range(len(x)), range(-3, 4)):
        if 0 <= i + j < len(x) and not is_text[i] and not is_text[i + j] and image[i] == image[i + j]:
            y = y.index_add(0, torch.tensor([i]), x[i + j:i + j + 1] * cross.cpe.weight[:, 0, j + 3])
    y = cross.kv_norm(y)
    may_look = torch.ones(len(x), len(x)).tril(-1).bool() & ~is_text
    return cross.o_proj(slow_attention(cross.q_proj(cross.q_norm(x)), *cross.kv_proj(y).chunk(2, dim=1), may_look, c))


def slow(lm, t, v, prompt, sa, frozen=()):
    """The language model on one whole prompt: t (Nt, d), v (Nv, d) -> (Nt, d). frozen: layers that leave v as it is."""
    c, order = lm.config, [None] * prompt.end
    for i, p in enumerate([*prompt.t_pos, *prompt.v_pos]):
        order[p] = i
    x = torch.cat([t, v])[order]
    is_text = torch.tensor(order) < len(t)
    image = [None if i < len(t) else prompt.v_img[i - len(t)] for i in order]
    causal = torch.ones(len(x), len(x)).tril().bool()
    for l, block in enumerate(lm.layers):
        if l in sa:
            x = torch.where(is_text[:, None] | (l not in frozen), slow_block(block, x, causal, c), x)
            continue
        if l in c.ca:
            x = torch.where(is_text[:, None], x + slow_cross(lm.cross[str(l)], x, is_text, image, c), x)
        x = torch.where(is_text[:, None], slow_block(block, x, causal & is_text, c), x)
    return lm.norm(x)[is_text]


# --- forward --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_insertion_changes_nothing(seed):
    """An untrained cross-attention is silent: dense is the model before, other configurations are as without it."""
    m, rng = new(seed, visor=False)
    prompts = [some_prompt(m, rng, n) for n in (2, 0, 1)]
    configurations = [DENSE, (), (1,), (4,), (1, 4), *(tuple(sorted(rng.sample(DENSE, n))) for n in (1, 2, 3, 4))]
    before = [logits(m, prompts, sa) for sa in configurations]
    m.add_cross_attention()
    assert m.config.sa == (1, 4) and m.config.ca == (2, 5)
    for sa, old in zip(configurations, before):
        assert max(map(diff, logits(m, prompts, sa), old)) < CLOSE, sa


@pytest.mark.parametrize("seed", range(14))
@torch.no_grad()
def test_forward_is_the_reference(seed):
    """Random layers, images anywhere, also side by side, a padded batch; then with noise in the padding, which nobody
    may see."""
    rng = random.Random(seed)
    m, _ = new(seed, ca=(2, 5) if seed % 2 else tuple(sorted(rng.sample(DENSE, rng.randint(0, 6)))))
    sa = ((), DENSE)[seed // 2 % 2] if seed < 4 else tuple(sorted(rng.sample(DENSE, rng.randint(0, 6))))
    prompts = [some_prompt(m, rng, rng.randint(0, 3), turns=rng.randint(1, 2)) for _ in range(3)]
    prompts.append(some_prompt(m, rng, 3, adjacent=True))
    assert len({len(p.ids) for p in prompts}) > 1
    batch = collate(prompts)
    t, v = m.embed(batch)
    t, v = (torch.where(torch.from_numpy(pos)[..., None] < PAD, x, 10 * torch.randn_like(x))
            for x, pos in ((t, batch.t_pos), (v, batch.v_pos)))
    noisy = m.head(m.language_model(t, v, m.layout(batch), sa))
    for p, fast, with_noise in zip(prompts, logits(m, prompts, sa), noisy):
        t, v, _ = inputs(m, [p])
        expected = m.head(slow(m.language_model, t[0], v[0], p, sa))
        assert 4 < expected.std() < 20  # else the tolerance would mean nothing
        assert diff(fast, expected) < CLOSE and diff(with_noise[:len(p.ids)], expected) < CLOSE, (m.config.ca, sa)


@pytest.mark.parametrize("sa, frozen", [(DENSE, (0, 2, 3)), (DENSE, DENSE), ((1, 4), (1,)), ((1, 4), (4,)),
                                        ((1,), (2,)), ((0, 3, 5), ())])
@torch.no_grad()
def test_stretches_of_run(sa, frozen):
    """Layers one by one, or two by two, are all at once; alone in its configuration a dense model's layer leaves v as
    it is."""
    m, rng = new(5, ca=())
    prompts = [some_prompt(m, rng, images) for images in (1, 2, 0)]
    t0, v0, layout = inputs(m, prompts)
    t, v = t0, v0
    for l in DENSE:
        before = v
        t, v = m.language_model.run(t, v, layout, (l,) if l in sa and l in frozen else sa, l, l + 1)
        assert torch.equal(v, before) == (l not in sa or l in frozen or l == max(sa))
    for p, row in zip(prompts, m.language_model.norm(t)):
        a, b, _ = inputs(m, [p])
        expected = m.head(slow(m.language_model, a[0], b[0], p, sa, frozen))
        assert diff(m.head(row[:len(p.ids)]), expected) < CLOSE
    if not frozen:
        t, v = t0, v0
        for l in (0, 2, 4):
            t, v = m.language_model.run(t, v, layout, sa, l, l + 2)
        assert torch.equal(m.language_model.norm(t), m.language_model(t0, v0, layout, sa))


@torch.no_grad()
def test_run_has_no_memory():
    """The same call twice, with others between, gives the same bits, and changes none of its arguments."""
    m, rng = new(11)
    t, v, layout = inputs(m, [some_prompt(m, rng, 2), some_prompt(m, rng, 1)])
    kept = t.clone(), v.clone()
    first = m.language_model.run(t, v, layout, (1, 4))
    m.language_model.run(t, v, layout, DENSE), m.language_model.run(t, v, layout, (), 2, 5)
    again = m.language_model.run(t, v, layout, (1, 4))
    assert all(torch.equal(a, b) for a, b in zip((*first, *kept), (*again, t, v)))


@pytest.mark.parametrize("sa", [(), (1,), (4,), (1, 4), (5,), DENSE])
@pytest.mark.parametrize("which", [0, 1])
def test_only_later_text_attends_to_an_image(sa, which):
    """Another image in the same place: text before it stays as it is, all text after it changes."""
    m, rng = new(3)
    text = chatml([f"{words(rng)}{IMAGE}{words(rng)}{IMAGE}{words(rng)}"])
    images = [process_image(tiny.image(40, 30, i), m.config, single_image=which == 1) for i in range(3)]
    a = encode(text, m.tokenizer, images[:2])
    b = encode(text, m.tokenizer, [images[2], images[1]] if which == 0 else [images[0], images[2]])
    looked = {}
    for l, cross in m.language_model.cross.items():
        cross.register_forward_hook(lambda _, args, y, l=l: looked.update({int(l): (y - args[0])[0]}))
    (x,), (y,) = logits(m, [a], sa), logits(m, [b], sa)
    before = torch.tensor(a.t_pos) < starts(a)[which]
    assert diff(x[before], y[before]) <= 1e-6
    assert (x - y)[~before].abs().amax(1).min() > 10 * CLOSE
    has_image = torch.tensor(a.t_pos) > a.v_pos[0]
    assert sorted(looked) == [l for l in m.config.ca if l not in sa]
    assert all((y[~has_image] == 0).all() and (y[has_image] != 0).any(1).all() for y in looked.values())


@pytest.mark.parametrize("seed", range(3))
def test_cross_attention_has_no_order_of_images(seed):
    """Two images of equal size swapped. Text also attends to the text between, so for () self-attention is silenced."""
    m, rng = new(seed)
    text = chatml([f"{words(rng)}{IMAGE}{words(rng)}{IMAGE}{words(rng)}"])
    images = some_images(m, rng, 2, single_image=False)
    a, b = encode(text, m.tokenizer, images), encode(text, m.tokenizer, images[::-1])
    t_pos = torch.tensor(a.t_pos)
    before, after = t_pos < a.v_pos[0], t_pos > a.v_pos[-1]
    (x,), (y,) = logits(m, [a], DENSE), logits(m, [b], DENSE)
    assert diff(x[before], y[before]) <= 1e-6
    assert (x - y)[after].abs().amax(1).min() > 10 * CLOSE
    for block in m.language_model.layers:
        nn.init.zeros_(block.self_attn.o_proj.weight)
    (x,), (y,) = logits(m, [a], ()), logits(m, [b], ())
    assert diff(x[before], y[before]) <= 1e-6
    assert diff(x[after], y[after]) < CLOSE
    assert (x - y)[~before & ~after].abs().amax(1).min() > 10 * CLOSE


@LAYERS
def test_dead_vision_is_not_computed(ca, sa):
    """Logits and all gradients are those of the reference, which updates v to the end; the rows show where v stops."""
    m, rng = new(4, ca=ca)
    lm, prompts = m.language_model, [some_prompt(m, rng, 1), some_prompt(m, rng, 2)]
    batch = collate(prompts)
    t, v = (x.detach() for x in m.embed(batch))
    layout, t_pos, v_pos = m.layout(batch), batch.t_pos, batch.v_pos
    names, parameters = zip(*m.named_parameters())
    weight = torch.randn(*t.shape[:2], m.config.vocab) / 100

    def run(forward):
        """Logits of each prompt, gradients of t, v and all parameters."""
        leaves = t.clone().requires_grad_(), v.clone().requires_grad_(), *parameters
        out = [m.head(h) for h in forward(*leaves[:2])]
        loss = sum((x * w[:len(x)]).sum() for x, w in zip(out, weight))
        return out, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    watched = {("mlp", l): block.mlp for l, block in enumerate(lm.layers)}
    with counting(watched, [block.self_attn for block in lm.layers]) as rows:
        out, grads = run(lambda t, v: [h[:len(p.ids)] for h, p in zip(lm(t, v, layout, sa), prompts)])
    expected, slow_grads = run(lambda t, v: [slow(lm, t[i, :len(p.ids)], v[i, :len(p.v_pos)], p, sa)
                                             for i, p in enumerate(prompts)])
    assert max(map(diff, out, expected)) < CLOSE
    for name, g, s in zip(("t", "v", *names), grads, slow_grads):
        assert diff(g, s) <= CLOSE * max(1, s.abs().max().item()), name
    assert (grads[1] != 0).any() == bool(ca or sa)

    text, both = t_pos.size, t_pos.size + v_pos.size
    last = max([*sa, *(l for l in ca if l not in sa)], default=-1)
    for l in range(m.config.layers):
        assert rows["mlp", l] == rows["q", l] == (both if l in sa and l < last else text), l
        assert rows["k", l] == (both if l in sa else text), l


@pytest.mark.parametrize("sa", [(), (1,), DENSE, [(1,), DENSE, (), (1,), (1, 4), DENSE]])
def test_batches(sa):
    """Unequal prompts, also with a configuration each, answer as if alone; drawn answers repeat with their seed."""
    m, rng = new(9)
    prompts = [some_prompt(m, rng, n, turns) for n, turns in ((1, 1), (2, 2), (0, 1), (0, 2), (3, 1), (1, 1))]
    each = list(zip(prompts, sa if isinstance(sa, list) else [sa] * 6))
    assert all(diff(x, *logits(m, [p], own)) < CLOSE for x, (p, own) in zip(logits(m, prompts, sa), each))
    emitted = [[] for _ in prompts]
    answers = m.generate(prompts, sa, max_tokens=10, on_token=lambda i, token: emitted[i].append(token))
    assert answers == emitted == [m.generate([p], own, max_tokens=10)[0] for p, own in each]
    assert answers == m.generate(prompts, sa, max_tokens=10)
    drawn = [m.generate(prompts, sa, max_tokens=10, temperature=5.0, top_p=0.9, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


# --- cache ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sa", [(), (1,), (1, 4), (1, 4, 7), (1, 4, 7, 10), tuple(range(12))])
@pytest.mark.parametrize("images", [1, 2])
def test_answer_after_prefill(sa, images):
    """Questions about images that are prefilled once: as in one prompt, in any order; no vision work is repeated."""
    m, rng = new(images, layers=12)
    shown = some_images(m, rng, images, single_image=images == 1)
    texts = [chatml([place_images(words(rng), images)]) for _ in range(3)]
    whole = [encode(text, m.tokenizer, shown) for text in texts]
    prefix = encode(split_shared(texts[0])[0], m.tokenizer, shown)
    questions = [encode(split_shared(text)[1], m.tokenizer, start=prefix.end) for text in texts]
    assert [join(prefix, q)[:4] for q in questions] == [w[:4] for w in whole]
    tree = Conversation(m, prefix, sa)
    first = tree.answer(questions[0], max_tokens=8)
    assert first == m.generate([whole[0]], sa, max_tokens=8)[0] and len(first) == 8

    blocks = m.language_model.layers
    vision = {"tower": m.vision_tower, **{f"cross {l}": x.kv_proj for l, x in m.language_model.cross.items()}}
    with counting(dict(enumerate(b.mlp for b in blocks)) | vision, [b.self_attn for b in blocks]) as rows:
        second = tree.answer(questions[1], max_tokens=8)
    assert second == m.generate([whole[1]], sa, max_tokens=8)[0] and len(second) == 8
    text_rows = {n for name, n in rows.items() if name not in vision}
    assert text_rows == {len(questions[1].ids) + 7}  # the last token of an answer is not run
    assert not any(rows[x] for x in vision)

    assert tree.answer(questions[0], max_tokens=8) == first
    one_shot, = logits(m, [whole[2]], sa)
    assert diff(logits(m, [questions[2]], sa, tree.tree("all"))[0], one_shot[len(prefix.ids):]) < CLOSE


@pytest.mark.parametrize("sa", [(), (1,), (1, 4), DENSE])
@pytest.mark.parametrize("stop", [0, 1, 2, None])
@pytest.mark.parametrize("brings", [0, 1, 2])
def test_conversation(sa, stop, brings, monkeypatch):
    """Kept turns, cut short or ended by a stop token, with `brings` new images in turn 2: as in one prompt."""
    m, rng = new(6)
    shared, own = split_shared(chatml([place_images("what is this?", 1)]))
    follow_up = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
    more = " or ".join([IMAGE] * brings)
    turns = [(own, 0), (follow_up.format(more, "and?"), brings), (follow_up.format("so", "?"), 0)]
    whole = encode(shared, m.tokenizer, some_images(m, rng, 1))
    tree, length = Conversation(m, whole, sa, text_capacity=8), 5
    if stop is not None:  # any token will do to stop at
        free, = m.generate([join(whole, encode(own, m.tokenizer, start=whole.end))], sa, max_tokens=5)
        monkeypatch.setattr(VLM, "stop_id", free[stop])
        length = free.index(free[stop])
    for i, (text, images) in enumerate(turns):
        aside = encode(follow_up.format(IMAGE, "?"), m.tokenizer, some_images(m, rng, 1), start=whole.end)
        tree.answer(aside, max_tokens=3)  # leaves nothing behind
        turn = encode(text, m.tokenizer, some_images(m, rng, images), start=whole.end)
        answer = tree.answer(turn, keep=True, max_tokens=5)
        whole = join(whole, turn)
        assert answer == m.generate([whole], sa, max_tokens=5)[0]
        assert i > 0 or len(answer) == length
        closed = [*answer, m.tokenizer.token_to_id("<|im_end|>"), *m.tokenizer.encode("\n").ids]
        whole = join(whole, Prompt(closed, [whole.end + i for i in range(len(closed))], [], [], []))
        assert tree.end == whole.end
    probe = encode("and?", m.tokenizer, start=whole.end)
    one_shot, = logits(m, [join(whole, probe)], sa)
    assert diff(logits(m, [probe], sa, tree.tree("all"))[0], one_shot[len(whole.ids):]) < CLOSE


@torch.no_grad()
def test_long_answers(monkeypatch):
    """Past the capacity that was reserved, and past a stretch of the decode layout: as without a cache."""
    monkeypatch.setattr(VLM, "stop_id", -1)
    m, rng = new(12)
    p, sa = some_prompt(m, rng, 1), (1, 4)
    tree = CacheTree(m, [sa], 1, (1, 1))
    tree.extend([p])
    (answer,), _ = decoding.generate(m, tree, [p], sa, max_tokens=1030)
    assert len(answer) == 1030
    tail = Prompt(answer, [p.end + i for i in range(1030)], [], [], [])
    predicted = logits(m, [join(p, tail)], sa)[0][len(p.ids) - 1:-1]
    best = predicted.max(-1).values
    assert diff(predicted[range(1030), answer], best) < CLOSE  # ties may fall either way


def tensors(x):
    """All tensors inside a tree's caches."""
    if isinstance(x, torch.Tensor):
        return [x]
    inside = x if isinstance(x, (list, tuple)) else vars(x).values() if hasattr(x, "kv") else ()
    return [t for y in inside for t in tensors(y)]


@LAYERS
def test_cache_bytes(ca, sa):
    """A cache holds text everywhere and vision only where it is read; decoding does not make it grow."""
    m, rng = new(7, ca=ca)
    prompts = [some_prompt(m, rng, n) for n in (2, 0, 1)]
    text, vision = max(len(p.ids) for p in prompts) + 9, max(len(p.v_pos) for p in prompts)
    tree = m.prefill(prompts, sa, 9)
    decoding.generate(m, tree, prompts, sa, max_tokens=9)
    cross = [l for l in ca if l not in sa]
    reserved = -(-text // 256) * 256  # capacities are multiples of 256, and vision's where a layer keeps it too
    joint = max(reserved + vision, -(-(max(p.end for p in prompts) + 9) // 256) * 256)
    tokens = sum(joint if l in sa else reserved for l in range(6)) + sum(vision for _ in cross)
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors(tree.root.cache)}
    assert sum(held.values()) == 3 * tokens * 2 * m.config.kv_heads * m.config.head_dim * 4
    assert all((images.kv is None) == (l not in cross) for l, (_, images) in enumerate(tree.root.cache))


def pieces(prompt, cuts):
    """The prompt cut at positions, as prompts."""
    for low, high in itertools.pairwise([0, *sorted(cuts), prompt.end]):
        ids, images = zip(prompt.ids, prompt.t_pos), zip(prompt.images, starts(prompt))
        v = [(p, i) for p, i in zip(prompt.v_pos, prompt.v_img) if low <= p < high]
        yield Prompt([x for x, p in ids if low <= p < high], [p for p in prompt.t_pos if low <= p < high],
                     [p for p, _ in v], [i for _, i in v], [x for x, p in images if low <= p < high])


@LAYERS
@pytest.mark.parametrize("n", [2, 7, None])
def test_piece_by_piece(ca, sa, n):
    """A padded batch in n pieces a prompt, or one prompt token by token: all text as in one forward."""
    m, rng = new(8, ca=ca)
    prompts = [some_prompt(m, rng, images) for images in ((2, 0, 1) if n else (2,))]
    rows = []
    for p in prompts:  # an image stays in one piece, because the convolution needs it whole
        spots = sorted({*p.t_pos, *starts(p)} - {0})
        rows.append(list(pieces(p, rng.sample(spots, n - 1) if n else spots)))
    assert sum(len(x.images) for row in rows for x in row) == sum(len(p.images) for p in prompts)
    tree = CacheTree(m, [sa], len(prompts), (20, 20))  # it grows
    steps = []
    for step in zip(*rows):
        if n:
            segments = len(tree.segments)
            logits(m, prompts[::-1], sa, tree)
            tree.truncate(segments)  # a detour that leaves no trace
        steps.append(logits(m, step, sa, tree))
    for row, whole in zip(zip(*steps), logits(m, prompts, sa)):
        assert diff(torch.cat(row), whole) < CLOSE


VIABLE = [(), (1,), (4,), (1, 4), (1, 7), (1, 4, 7), (1, 4, 7, 10)]


def test_configurations_share_what_they_can(monkeypatch):
    """All configurations on one tree: each as alone, bit for bit, and every stretch of layers that several have in
    common runs once; a second segment too, and after taking one back."""
    m, rng = new(13, layers=12)
    prompts = [some_prompt(m, rng, 1) for _ in range(2)]
    more = [encode("and this?", m.tokenizer, start=p.end) for p in prompts]
    ran = []
    real = type(m.language_model).run
    monkeypatch.setattr(type(m.language_model), "run", lambda self, *args, **kw: (
        ran.append(args[5] - args[4] if len(args) > 5 else 12), real(self, *args, **kw))[1])
    prefixes = {(l, tuple(x for x in sa if x <= l)) for sa in VIABLE for l in range(12)}  # layers that differ
    tree = m.new_tree(VIABLE, prompts, 99)
    found = {sa: logits(m, prompts, sa, tree) if sa == VIABLE[0] else
             [m.head(h[:len(p.ids)]) for h, p in zip(m.language_model.norm(tree.run(sa)[0]), prompts)] for sa in VIABLE}
    assert sum(ran) == len(prefixes) < 12 * len(VIABLE)
    segments, first = len(tree.segments), {}
    for _ in range(2):
        ran.clear()
        tree.extend(more)
        second = {sa: tree.run(sa)[0] for sa in VIABLE[::-1]}
        assert sum(ran) == len(prefixes)
        assert all(torch.equal(second[sa], first.get(sa, second[sa])) for sa in VIABLE)
        first = second
        tree.truncate(segments)
    for sa in VIABLE:
        for a, b in zip(found[sa], logits(m, prompts, sa)):
            assert diff(a, b) < CLOSE
        whole = logits(m, [join(p, q) for p, q in zip(prompts, more)], sa)
        for h, p, q, b in zip(m.language_model.norm(first[sa]), prompts, more, whole):
            assert diff(m.head(h[:len(q.ids)]), b[len(p.ids):]) < CLOSE


# --- layout ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
def test_masks_only_where_needed(seed, monkeypatch):
    """No attention has a mask and grouped heads in one call; a question after its images needs none in
    cross-attention."""
    m, rng = new(seed, heads=4, kv_heads=rng_heads(seed))
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        calls.append((attn_mask is not None, enable_gqa or q.shape[1] != k.shape[1]))
        return real(q, k, v, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    p = some_prompt(m, rng, 2)
    m.generate([p, some_prompt(m, rng, 1)], (1, 4), max_tokens=3)
    assert calls and not any(mask and grouped for mask, grouped in calls)
    tree = m.prefill([p], (1,))
    q = collate([encode("what?", m.tokenizer, start=p.end)])
    assert make_layout(*q.positions, tree.past, m.config, m.device).cross.mask is None


def rng_heads(seed):
    return (1, 2, 4)[seed % 3]


def test_layout_of_no_past_needs_no_mask_in_self_attention():
    m, rng = new(14)
    layout = m.layout(collate([some_prompt(m, rng, 1), some_prompt(m, rng, 2)]))
    assert layout.joint.mask is None and layout.text.mask is None and layout.joint_text_queries.mask is not None
    after = make_layout(*collate([some_prompt(m, rng, 0)]).positions, Past.empty(1), m.config, m.device)
    assert after.cross is None and after.joint_text_queries is after.joint


# --- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tied, tmp_path):
    """A checkpoint comes back bit for bit; what lacks the cross-attention starts with an untrained one."""
    m, rng = new(10, tied=tied, stage="2", step=7)
    prompts, sas = [some_prompt(m, rng, n) for n in (1, 0, 2)], [(), (1,), DENSE]
    m.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path)
    assert again.config == m.config and again.config.ca == (2, 5) and again.config.viable == ((1,), (1, 4))
    assert dict(again.named_parameters()).keys() == dict(m.named_parameters()).keys()
    assert all(torch.equal(x, y) for sa in sas for x, y in zip(logits(again, prompts, sa), logits(m, prompts, sa)))

    file = tmp_path / "model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if ".cross." not in k}, file, metadata={"format": "pt"})
    fresh = VLM.from_pretrained(tmp_path)
    assert fresh.config == m.config and sorted(fresh.language_model.cross) == ["2", "5"]
    assert all((x.o_proj.weight == 0).all() for x in fresh.language_model.cross.values())
    m.config.ca = ()  # the same model without them
    assert all(diff(x, y) < CLOSE for sa in sas for x, y in zip(logits(fresh, prompts, sa), logits(m, prompts, sa)))
