"""Answers, token by token: VLM.decode_step makes logits of a token, `sample_token` the next token of logits, `decode`
repeats both until all samples have ended; `generate` begins where prompts end, in the configuration of each. On CUDA a
step is recorded once an answer is a few tokens long, and then replayed, as its hundreds of small kernels take longer to
start than to run.
"""
from functools import partial

import torch

from cli import not_finite, timer
from config import group_by_configuration
from layout import DecodeLayout, compute_dtype

NOT_FINITE = -1  # in place of a token, or of a choice: the numbers that it would be made from are not finite
STRETCH = 256    # steps for which caches are laid out at once
EAGER = 8        # steps of a stretch before one is recorded, which takes as long as several; the first chooses kernels


def generate(model, tree, prompts, sa, max_tokens=64, temperature=0.0, top_p=1.0, seed=0, allowed=None, timings=None,
             on_token=None):
    """(answers, configurations): of each prompt the token ids of its answer, without the closing <|im_end|>, and the
    configuration that ran.

    tree: a cache_tree.CacheTree whose newest segment the prompts are. sa: a configuration, a list with one for each
    prompt, or "auto"; allowed: those that the router may choose. temperature 0 is greedy; otherwise tokens are drawn
    from the smallest set with probability top_p, repeatable by `seed`. timings, on_token: as in VLM.generate.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens {max_tokens}: give at least 1")
    with timer(timings, "prefill", model.device):
        sa = model.route(tree, [p.answer_starts for p in prompts], allowed) if sa == "auto" else sa
    chosen = sa if isinstance(sa, list) else [tuple(sa)] * len(prompts)
    answers, groups = [None] * len(prompts), group_by_configuration(chosen)  # mixed routes: each group on its own
    for own, rows in groups:
        with timer(timings, "prefill", model.device):
            branch = tree if len(groups) == 1 else tree.select(rows)  # nothing runs for a route not taken
            t, cache = branch.run(own)                                # (rows, Nt, d)
            last = [len(prompts[i].ids) - 1 for i in rows]            # padding stands behind
            logits = model.head(model.language_model.norm(t[torch.arange(len(rows)), last]))  # (rows, vocab)
        with timer(timings, "decode", model.device):
            sampler = partial(sample_token, temperature=temperature, top_p=top_p,
                              random=torch.Generator(model.device).manual_seed(seed))
            emit = on_token and (lambda i, token, rows=rows: on_token(rows[i], token))
            for i, answer in zip(rows, decode(model, logits, branch.runs, own, cache, max_tokens, sampler, emit)):
                answers[i] = answer
    return answers, chosen


def decode(model, logits, runs, sa, cache, max_tokens, sampler, on_token=None):
    """The answers (token id lists) that begin by logits (B, vocab).

    runs, cache: what came before, as in CacheTree; sampler: logits -> tokens (B,); on_token(i, id) is called for each
    token as it comes. An answer ends before one of the model's stop tokens. Raises ValueError where logits are not
    finite.
    """
    answers, running, taken, steps = [[] for _ in range(len(logits))], set(range(len(logits))), 0, None
    stop_ids = {model.stop_id, *model.config.stop_ids}
    while True:
        tokens = sampler(logits)                     # (B,)
        for i, token in enumerate(tokens.tolist()):  # the only thing that is read back from the device
            if i not in running:                     # it goes on with the batch; its tokens are dropped
                continue
            if token == NOT_FINITE:
                raise not_finite("the language model's output", logits.dtype)
            if token not in stop_ids:                # they are not part of the answer
                answers[i].append(token)
                if on_token:
                    on_token(i, token)
            if token in stop_ids or len(answers[i]) == max_tokens:
                running.discard(i)
        if not running:
            return answers
        if not (steps and steps.left):               # the first stretch, or a very long answer's next one
            now = [(start, stop, past._replace(text=past.text + taken)) for start, stop, past in runs]
            steps = Steps(model, now, sa, cache, min(max_tokens - taken, STRETCH))
        logits, taken = steps(tokens), taken + 1


class Steps:
    """The next `left` decoding steps of a batch, over caches of fixed length."""

    def __init__(self, model, runs, sa, cache, left):
        """Arguments: as in `decode`."""
        self.model, self.sa, self.cache, self.left = model, sa, cache, left
        self.runs, dtype = [], compute_dtype(model.language_model.norm.weight)
        for start, stop, past in runs:
            layout = DecodeLayout(past, past.text + past.vision, left, model.config, model.device, dtype)
            self.runs.append((start, stop, layout))
            for l in range(start, stop):
                cache[l].self_attn.reserve(layout.lengths[l in sa])
        self.replays = model.device.type == "cuda" and not model.training  # FSDP, autocast do more than can be recorded
        self.taken, self.graph = 0, None

    def __call__(self, tokens):
        """tokens (B,) -> logits (B, vocab) of what follows. They stay as they are up to the next call."""
        self.left -= 1
        self.taken += 1
        if not self.replays or self.taken <= EAGER:
            return self.step(tokens)
        if self.graph is None:
            self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # records, and runs nothing
                self.logits = self.step(self.tokens)
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits

    def step(self, tokens):
        return self.model.decode_step(tokens, self.runs, self.sa, self.cache)


def sample_token(logits, temperature, top_p, random):
    """The next token of each row of logits (B, vocab): the likeliest, or drawn from the nucleus. Returns (B,), with
    NOT_FINITE where logits are not: the token is read back anyway, so that costs no wait of its own."""
    finite = logits.sum(-1, dtype=torch.float32).isfinite()  # (B,)
    if temperature == 0:
        return logits.argmax(-1).where(finite, NOT_FINITE)
    logits = logits.where(finite[:, None], 0).float()
    logits = logits - logits.amax(-1, keepdim=True)          # nothing overflows, however low the temperature
    p, order = (logits / max(temperature, 1e-30)).softmax(-1).sort(-1, descending=True)  # (B, vocab) each
    out = p.cumsum(-1) - p >= top_p                  # tokens before which top_p has gathered; never the first
    p[:, 1:] = p[:, 1:].masked_fill(out[:, 1:], 0)
    return order.gather(-1, torch.multinomial(p, 1, generator=random))[:, 0].where(finite, NOT_FINITE)
