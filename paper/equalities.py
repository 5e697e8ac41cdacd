"""VISOR's ways to save work, each against the plain way of computing the same: what paper.verify asks of a device.

A check gives labels, logits of the fast way, and a function that computes them in the plain way with the weights that
the model has at that time: outside float32 it is called once more, with the same weights in float32.
"""
from contextlib import contextmanager
from itertools import cycle

import torch

from cli import timer
from data import Prompt, chatml, collate, encode, join, place_images, split_shared
from decoding import Steps
from flops import sa_name
from paper.masked import masked_logits

TOKENS = 32  # of each greedy answer
QUESTIONS = ("What is this?", "Which colours are there, and where in the picture does each of them stand?",
             "Describe the picture in one sentence.", "Why?",
             "First count the things in the picture, then say which of them is the largest, and at last write a short "
             "story in which all of them appear, for a child who is not yet able to read.")


# --- the checks -----------------------------------------------------------------------------------------------------

def logits_of(model, prompt, sa):
    """Of the text tokens of a prompt alone, (Nt, vocab)."""
    return model.head(model(collate([prompt]), sa))[0]


def two_streams(model, shown, sa):
    """Text and vision apart and no mask, against one sequence with masks (paper/masked.py)."""
    return ([x.name for x in shown], [logits_of(model, x.prompt, sa) for x in shown],
            lambda: [masked_logits(model, x.prompt, sa) for x in shown])


def ask_many(model, shown, configurations):
    """Images once, several questions in all configurations from one cache, against each question with its images."""
    case, n, labels, got, whole = shown[0], len(shown[0].images), [], [], []
    texts = [chatml([place_images(question, n, model.config)]) for question in QUESTIONS[:3]]
    images = case.prompt.images
    tree = model.prefill([encode(split_shared(texts[0])[0], model.tokenizer, images)], configurations)
    for i, text in enumerate(texts):
        question = encode(split_shared(text)[1], model.tokenizer, start=tree.end)
        tree.extend([question])
        for sa in configurations:
            labels.append(f"{sa_name(model.config, sa)}, question {i + 1}")
            got.append(model.head(model.language_model.norm(tree.run(sa)[0]))[0])
            whole.append((encode(text, model.tokenizer, images), sa, len(question.ids)))
        tree.truncate(1)
    return labels, got, lambda: [logits_of(model, prompt, sa)[-new:] for prompt, sa, new in whole]


def mixed_batch(model, shown, configurations):
    """A configuration for each prompt of a batch, against each alone."""
    rows = [*zip(cycle(shown[:-1]), configurations), (shown[-1], configurations[1])]  # last: one without a picture
    h = model(collate([case.prompt for case, _ in rows]), [sa for _, sa in rows])
    return ([f"{case.name}, {sa_name(model.config, sa)}" for case, sa in rows],
            [model.head(x[:len(case.prompt.ids)]) for x, (case, _) in zip(h, rows)],
            lambda: [logits_of(model, case.prompt, sa) for case, sa in rows])


def decoding(model, shown, configurations, step=None):
    """Greedy answers token by token from the cache, on CUDA by a graph that is replayed, against the prompt with the
    same answer anew, without a cache. step: in place of VLM.decode_step."""
    got, whole, prompt = [], [], shown[0].prompt
    for sa in configurations:
        tree = model.prefill([prompt], sa, TOKENS)
        t, cache = tree.run(sa)
        logits = [model.head(model.language_model.norm(t[:, -1]))]            # (1, vocab) each
        steps = Steps(model, tree.runs, sa, cache, TOKENS)
        if step:
            steps.step = lambda tokens: step(tokens, steps.runs, sa, cache)
        while steps.left > 1:
            logits.append(steps(logits[-1].argmax(-1)).clone())
        got.append(torch.cat(logits))                                         # (steps, vocab)
        fed = got[-1][:-1].argmax(-1).tolist()                                # all but the last one were read again
        after = Prompt(fed, list(range(prompt.end, prompt.end + len(fed))), [], [], [])
        whole.append((join(prompt, after), sa, len(logits)))
    return ([sa_name(model.config, sa) for sa in configurations], got,
            lambda: [logits_of(model, prompt, sa)[-n:] for prompt, sa, n in whole])


def compiled(model, shown, configurations):
    """Compiled blocks against eager ones: VLM.compile was called before."""
    rows = [(case, sa) for case in shown for sa in configurations]
    return ([f"{case.name}, {sa_name(model.config, sa)}" for case, sa in rows],
            [logits_of(model, case.prompt, sa) for case, sa in rows],
            lambda: [logits_of(model, case.prompt, sa) for case, sa in rows])


def decode_graph(model, shown, configurations, how):
    """The decoding step as one graph, without a break, against the prompt anew."""
    return decoding(model, shown, configurations,
                    torch.compile(model.decode_step, fullgraph=True, dynamic=False, backend=how))


# --- all of them ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def equalities(report, model, cases):
    """The lines about VISOR."""
    add_random_visor(model)
    c = model.config
    alone = min(cases[:-3], key=lambda case: case.prompt.end)  # the slow reference wants small pictures
    shown, configurations = [alone, *cases[-3:]], chosen_configurations(c)
    with encoded(model, [image for case in shown for image in case.prompt.images]):
        for sa in configurations:
            judge(report, f"two streams, {sa_name(c, sa)}", model, two_streams(model, shown, sa))
        judge(report, "ask many", model, ask_many(model, shown, configurations))
        judge(report, "mixed batch", model, mixed_batch(model, shown, configurations))
        judge(report, "cached decoding", model, decoding(model, shown, configurations), tokens=True)
    how = backend(model.device)
    judge(report, "decode graph", model, decode_graph(model, shown, configurations[-2:], how), tokens=True)
    model.compile(backend=how)
    judge(report, f"compiled, {how}", model, compiled(model, shown, configurations[-2:]))
    judge(report, "compiled decoding", model, decoding(model, shown, configurations[-2:]), tokens=True)


def judge(report, name, model, found, tokens=False):
    """The line of a check; tokens: and one about the greedy answers that its logits are of."""
    labels, fast, plain = found
    dtype, exact = model.dtype, None
    with torch.compiler.set_stance("force_eager"):  # what was compiled is not the plain way
        fast, reference = host(fast), host(plain())
        if dtype != torch.float32:
            model.float()
            exact = host(plain())
            model.to(dtype)  # the same weights as before
    bound = report.logits(name, labels, fast, reference, exact)
    if tokens:
        chosen, margins = zip(*map(likeliest, reference))
        report.tokens(f"{name}, tokens", labels, [likeliest(x)[0] for x in fast], chosen, margins, exact and 2 * bound)


def add_random_visor(model):
    """Cross-attention for a dense model, with an output of random weights instead of zeros, so that it matters."""
    if model.config.ca:
        return
    model.add_cross_attention()
    random = torch.Generator().manual_seed(0)
    for l, cross in model.language_model.cross.items():
        own = model.language_model.layers[int(l)].self_attn.o_proj.weight.float().std().item()
        for p, std in ((cross.o_proj.weight, own), (cross.cpe.weight, 0.2)):
            p.data.copy_(std * torch.randn(p.shape, generator=random))


def chosen_configurations(c):
    """None, one layer, the largest viable one, dense."""
    return list(dict.fromkeys([(), c.sa[:1], max(c.viable, key=len, default=()), tuple(range(c.layers))]))


@contextmanager
def encoded(model, images, timings=None):
    """Within, the encoder has run over these data.ProcessedImage, once for all that follows."""
    with timer(timings, "encoder", model.device):
        features = model.encode(images) if images else []
    seen = {id(image): x for image, x in zip(images, features)}
    model.encode = lambda images, known=None, timings=None: [
        seen[id(x)].to(model.dtype) for x in images]
    try:
        yield
    finally:
        del model.encode


def likeliest(logits):
    """logits (n, vocab) -> the likeliest tokens, a list, and how far each is ahead of the second."""
    best = logits.float().topk(2)
    return best.indices[:, 0].tolist(), (best.values[:, 0] - best.values[:, 1]).tolist()


def host(logits):
    return [x.float().cpu() for x in logits]


def backend(device):
    """torch.compile's default where its compiler works here, else one that needs none."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
        return "inductor"
    except Exception:  # of the compiler, of whatever it is made of
        return "aot_eager"
