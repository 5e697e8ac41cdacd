"""What happens inside a model: where attention goes, how vision changes, what is lost without it (paper, section 3).

The computations behind Figures 2, 3 and 4; paper.analyse is the command that runs and draws them. Each looks at a model
as it runs in one configuration, see `whole`: every layer of a dense model, as in the paper.

Letters: B batch, L layers, N tokens (Nq queries, Nk keys, Nv vision), d features, H query heads, Hkv key/value heads,
D features of a head.
"""
from itertools import combinations

import numpy as np
import torch

import data
from cli import not_finite
from config import Plan
from evaluation import accuracy, all_results, image_batches
from explain import observed

INTERACTIONS = "query to image", "answer to image", "answer to query"  # the curves of Figure 2
AT_ONCE = 16  # configurations that are evaluated together: each keeps caches of its own


def whole(config):
    """The configuration that is looked at: all candidates of VISOR, every layer of a dense model."""
    return config.sa if config.sa or config.ca else tuple(range(config.layers))


def mean_by_task(pairs):
    """(task, tensor) pairs -> {task: the mean of its tensors}."""
    sums = {}  # task: [sum, number]
    for task, x in pairs:
        total, n = sums.get(task, (0, 0))
        sums[task] = total + x, n + 1
    return {task: total / n for task, (total, n) in sums.items()}


# --- attention (Figure 2) -------------------------------------------------------------------------------------------

def attention(model, eval_set):
    """{task: (L, 3)}: shares of attention by layer in the order of INTERACTIONS, mean over a task's questions."""
    sa = whole(model.config)

    def pairs():
        for (_, image, questions), in image_batches(eval_set, model.config, progress=True, batch_size=1):
            asked = [answered(question, answer, image, model) for _, question, answer in questions]
            yield from zip((task for task, *_ in questions), attention_shares(model, *zip(*asked), sa))
    return mean_by_task(pairs())


def answered(question, answer, image, model):
    """(data.Prompt, n) of a question about one image: its true answer stands behind it, and from the last n tokens that
    answer is predicted, token by token."""
    text = data.chatml([data.place_images(question, 1, model.config)])
    prompt, labels = data.labelled([(text, False), (answer, True)], model.tokenizer, [image])
    prompt = prompt._replace(ids=prompt.ids[:-1], t_pos=prompt.t_pos[:-1])  # the last one predicts nothing of it
    return prompt, sum(label >= 0 for label in labels)


@torch.no_grad()
def attention_shares(model, prompts, n, sa):
    """Shares of the attention in each layer, (B, L, 3), mean over heads and tokens; see INTERACTIONS.

    prompts (B): about one image, alike up to its end; n (B): how many of each one's last tokens are the answer, those
    from which its tokens are predicted. The query is all text between the image and them. What is left of the attention
    goes to the system text and among the answer's own tokens. A layer on text alone sees no image, and a
    cross-attention, whose softmax is over vision alone, is left out.
    """
    c, vision, batch = model.config, len(prompts[0].v_pos), data.collate(prompts)
    first = prompts[0].v_pos[0]                                          # text tokens before the image
    length, n = np.array([len(p.ids) for p in prompts]) - first, np.array(n)  # (B,) tokens behind the image
    place = np.arange(batch.ids.shape[1] - first)                        # (T,) T: the most tokens behind the image
    is_query = place < (length - n)[:, None]                             # (B, T)
    is_answer = ~is_query & (place < length[:, None])
    is_query, is_answer = (torch.from_numpy(x).to(model.device) for x in (is_query, is_answer))
    found = [None] * c.layers

    def mean(x, tokens):
        """Of x (B, T) over some tokens (B, T): (B,)."""
        return (x * tokens).sum(1) / tokens.sum(1)

    def observe(l, kind, q, k, mask):
        """q (B, Nq, H, D), k (B, Nk, Hkv, D), in order of position: in both the text behind the image is last."""
        if kind == "cross":
            return
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q[:, -len(place):].to(wide), k.to(wide).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * c.head_dim ** -0.5   # (B, H, T, Nk)
        keys = torch.arange(k.shape[1], device=k.device)
        later = keys > keys[-len(place):, None]                               # (T, Nk) causal
        weights = scores.masked_fill(later, float("-inf")).softmax(-1).mean(1)  # (B, T, Nk)
        to_query = (weights[..., -len(place):] * is_query[:, None]).sum(-1)   # (B, T)
        to_image = weights[..., first:first + vision].sum(-1) if l in sa else torch.zeros_like(to_query)
        found[l] = torch.stack([mean(to_image, is_query), mean(to_image, is_answer), mean(to_query, is_answer)], 1)
    with observed(model, observe):
        t, v = model.embed(batch, known=model.pieces(prompts[0].images) * len(prompts))  # the encoder runs once
        model.language_model(t, v, model.layout(batch), sa)
    shares = torch.stack(found, dim=1).cpu()
    if not shares.isfinite().all():
        raise not_finite("the attention", model.dtype)
    return shares


# --- how vision changes (Figure 3, appendix M) ----------------------------------------------------------------------

def cka(model, eval_set):
    """{task: (S, S)}: similarity of the vision stream between all pairs of layers, see `vision_states`, mean over the
    images that a task's questions are about. The stream knows no question: the image stands before it."""
    sa, prefix = whole(model.config), data.split_shared(data.chatml([data.place_images("?", 1, model.config)]))[0]

    def pairs():
        for (_, image, questions), in image_batches(eval_set, model.config, progress=True, batch_size=1):
            prompt = data.encode(prefix, model.tokenizer, [image])         # system text and image
            similarity = linear_cka(vision_states(model, prompt, sa)).cpu()
            if not similarity.isfinite().all():
                raise not_finite("the similarity of vision between layers", model.dtype)
            yield from ((task, similarity) for task, *_ in questions)
    return mean_by_task(pairs())


@torch.no_grad()
def vision_states(model, prompt, sa):
    """(S, Nv, d): the vision stream of one prompt as it enters layer 0, 1, ... and the last that reads it; what would
    leave that one nobody reads."""
    batch = data.collate([prompt])
    (t, v), layout = model.embed(batch), model.layout(batch)
    states = [v[0]]
    for l in range(model.config.vision_readers(sa)[1]):
        t, v = model.language_model.run(t, v, layout, sa, l, l + 1)
        states.append(v[0])
    return torch.stack(states)


def linear_cka(x):
    """Linear CKA (Eq. 4) between all pairs of x (S, n, d), S states of n tokens with d features: (S, S).

    K~ = H X X^T H is the Gram matrix of the centred features. Its inner products <K~, L~> equal |X^T Y|^2 of those
    features (Kornblith et al. 2019), which takes d x d numbers instead of n x n: an image of LLaVA-OneVision has
    n = 7,000 tokens, and d = 896.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(1, keepdim=True)                                        # H X
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)          # CKA does not change, and nothing overflows
    n, d = x.shape[1:]
    if n <= d:
        grams = (x @ x.mT).flatten(1)                                      # (S, n * n)
        inner = grams @ grams.T                                            # (S, S)
    else:
        inner = torch.stack([(y.T @ x).square().sum((1, 2)) for y in x])   # each y against all: (S, d, d) -> (S,)
    norms = inner.diagonal().sqrt()
    return inner / (norms[:, None] * norms)


# --- without vision in some layers (Figure 4) -----------------------------------------------------------------------

def layer_subsets(layers, n, seed):
    """n different sets of layers in which vision is dropped, ascending tuples: 1 to half of all layers, each number
    equally often, as with fewer layers left hardly any task is more than guessed. Raises ValueError."""
    most = 2 ** layers // 4
    if n > most:
        raise ValueError(f"--subsets {n}: of {layers} layers at most {most} subsets are drawn; give fewer")
    rng, found = np.random.default_rng(seed), set()
    while len(found) < n:
        size = rng.integers(1, layers // 2 + 1)
        found.add(tuple(sorted(rng.choice(layers, size, replace=False).tolist())))
    return sorted(found)


def drop(model, eval_set, subsets):
    """[{task: accuracy}] of a dense model with all of its layers, then with vision dropped in each of `subsets`: there
    a layer runs on the text alone, and vision passes by."""
    every = range(model.config.layers)
    kept = [tuple(l for l in every if l not in dropped) for dropped in ((), *subsets)]
    order = sorted(range(len(kept)), key=kept.__getitem__)                 # what begins alike is computed once
    found = [None] * len(kept)
    for start in range(0, len(order), AT_ONCE):
        own = order[start:start + AT_ONCE]
        results = all_results(model, eval_set, [Plan(kept[i]) for i in own])
        for k, i in enumerate(own):
            found[i] = accuracy(results, k)
    return found


def correlation(x):
    """Pearson's, between the columns of x (subsets, tasks): (tasks, tasks). A task whose accuracy never changes
    correlates with nothing but itself."""
    x = x - x.mean(0)
    spread = np.sqrt((x ** 2).sum(0))
    unchanged = spread < 1e-9
    found = x.T @ x / np.outer(np.where(unchanged, 1, spread), np.where(unchanged, 1, spread))
    np.fill_diagonal(found, 1)
    return found


def two_clusters(similarity):
    """Lists of numbers, two of them: single tasks are joined, always those two groups whose members are most alike in
    the mean (average linkage), until two groups are left."""
    groups = [[i] for i in range(len(similarity))]
    while len(groups) > 2:
        a, b = max(combinations(range(len(groups)), 2),
                   key=lambda pair: similarity[np.ix_(groups[pair[0]], groups[pair[1]])].mean())
        groups[a] += groups.pop(b)
    return [sorted(group) for group in groups]


def easy_and_hard(similarity, kept):
    """The clusters, easy first: that whose tasks keep more of their accuracy without vision in some layers. kept
    (tasks,): that share. One task alone is hard or easy by nothing: ([it], [])."""
    groups = sorted(two_clusters(similarity), key=lambda group: -np.mean(kept[group]))
    return tuple(groups) if len(groups) == 2 else (*groups, [])
