"""The same questions with several plans: what each of them answers right, question by question.

An evaluation set is a list of (PIL image or path of one, [(task, question, answer), ...]). Viable configurations,
pseudo-labels and reports are made from the results (router.py, report.py).
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import pictures
from cli import not_finite
from config import PIXELS, Plan
from flops import sa_name
from layout import upload


def image_batches(eval_set, config, done=(), progress=False, batch_size=128, tokens=1 << 14, waiting=1 << 29):
    """Lists of (number, data.ProcessedImage, questions) of the set's images, of those with equally many visual tokens
    and questions, so that no visual tokens are padded.

    Each image is decoded once and waits until its list has batch_size images or would pass `tokens` visual tokens with
    another; where more than `waiting` bytes wait, the largest list goes. An image that cannot be read is named on
    stderr and passed over. done: numbers of images to leave out. Raises ValueError where none can be read.
    """
    groups, unread = {}, 0  # (visual tokens, questions): those that wait
    for i, (image, questions) in enumerate(tqdm(eval_set, "evaluation", disable=not progress, leave=False, ncols=80)):
        if i in done:
            continue
        try:
            x = data.process_image(opened(image), config)
        except data.SampleError as e:
            tqdm.write(f"{e}; passed over", file=sys.stderr)
            unread += 1
            continue
        kind = x.tiling.tokens, len(questions)
        groups.setdefault(kind, []).append((i, x, questions))
        size = {k: sum(x.pixels.nbytes for _, x, _ in group) for k, group in groups.items()}
        if len(groups[kind]) >= min(batch_size, tokens // x.tiling.tokens):
            yield groups.pop(kind)
        elif sum(size.values()) > waiting:
            yield groups.pop(max(size, key=size.get))
    yield from groups.values()
    if unread == len(eval_set):
        raise ValueError("none of the images can be read: nothing to evaluate")


def opened(image):
    """The PIL image of an evaluation set, which has paths where it comes from a file."""
    return pictures.load_image(image) if isinstance(image, Path) else image


@torch.no_grad()
def evaluate(model, eval_set, plans, done=(), progress=True):
    """Yields a list of results for each batch of images: one dict for each question.

    {"image": number in the set, "task", "question", "answer", "correct": [1 or 0 for each plan], "prefix_match":
     [answer tokens before the first wrong one], "loss": [summed over the answer's tokens], "route": number of the plan
     that the router chooses, where the model has one and its configurations are those asked for}

    An answer is correct if greedy decoding gives exactly it: if each of its tokens, and <|im_end|> after them, is the
    likeliest given those before. One teacher-forced forward tells that, and the loss with it. Each image is decoded
    once, and encoded once with the same pixels; what configurations have in common is computed once for all of them,
    as they walk one CacheTree. plans: of config.Plan. done, progress: as in image_batches.
    """
    prefix, _ = data.split_shared(data.chatml([data.place_images("?", 1, model.config)]))  # system text and image
    model.config.check_reduction([plan.sa for plan in plans])
    numbers = {pixels: [i for i, plan in enumerate(plans) if plan.pixels == pixels] for pixels in PIXELS}
    routed = model.router is not None and tuple(plans) == model.config.plans
    for batch in image_batches(eval_set, model.config, done, progress):
        whole = [data.encode(prefix, model.tokenizer, [x]) for _, x, _ in batch]
        seen = {pixels: [data.seen(x, pixels, model.config) for x in whole] for pixels, own in numbers.items() if own}
        trees = {pixels: model.prefill(prompts, [plans[i].sa for i in numbers[pixels]], 64, pixels=pixels)
                 for pixels, prompts in seen.items()}
        results = []                                                         # of this batch
        for asked in zip(*(questions for *_, questions in batch)):           # the k-th question of every image
            pairs = [(q, a) for _, q, a in asked]
            scores = {pixels: score_answers(model, pairs, tree, pixels, routed) for pixels, tree in trees.items()}
            for k, ((i, *_), (task, question, answer)) in enumerate(zip(batch, asked)):
                found = {"image": i, "task": task, "question": question, "answer": answer}
                for key in ("correct", "prefix_match", "loss"):
                    of = {n: x for pixels, own in scores.items() for n, x in zip(numbers[pixels], own[k][key])}
                    found[key] = [of[n] for n in range(len(plans))]
                if routed:  # the first pixels that the router is content with
                    pixels = next(x for x in scores if scores[x][k]["enough"])
                    found["route"] = plans.index(Plan(scores[pixels][k]["route"], pixels))
                results.append(found)
        yield sorted(results, key=lambda r: r["image"])


def score_answers(model, pairs, tree, pixels="all", routed=False):
    """What `evaluate` says about one (question, answer) for each sample of a tree, in the tree's configurations.

    routed: also which of them the router chooses, "route", and whether it is content with these pixels, "enough"."""
    prompts, labels = [], []                                                 # what follows the images
    for question, answer in pairs:
        text = data.split_shared(data.chatml([data.place_images(question, 1, model.config)]))[1]  # behind it
        prompt, label = data.labelled([(text, False), (answer + "<|im_end|>", True)], model.tokenizer, start=tree.end)
        prompts.append(prompt)
        labels.append(label)
    batch, labels = data.collate(prompts), data.pad(labels, -1)              # (B, Nt) where an answer stands, else -1
    is_target = data.target_mask(labels, batch.t_pos)                        # (B, Nt - 1)
    sample, token = is_target.nonzero()                                      # on the host
    on = upload(model.device, index=sample * labels.shape[1] + token, targets=labels[sample, token + 1])
    segments = len(tree.segments)
    tree.extend(prompts)                                                     # the layers that all configurations share
    if routed:                                                               # before the answer: it is not seen
        enough = [True] * len(pairs)
        if pixels == "overview":
            enough = model.overview_will_do(tree, batch.answer_starts)
        routes = model.route(tree, batch.answer_starts)
    found = []                                                               # (2, targets) of each configuration
    for sa in tree.configurations:                                           # each goes on where they branch
        h = tree.run(sa)[0].flatten(0, 1).index_select(0, on.index)          # (targets, d)
        logits = model.head(model.language_model.norm(h))                    # (targets, vocab) stay on the device
        loss = F.cross_entropy(logits.float(), on.targets, reduction="none")
        found.append(torch.stack([logits.argmax(-1) == on.targets, loss]))
    hit, loss = np.ones((len(found), *is_target.shape)), np.zeros((len(found), *is_target.shape))
    hit[:, sample, token], loss[:, sample, token] = torch.stack(found, 1).cpu().numpy()  # the only thing read back
    for sa, own in zip(tree.configurations, loss):
        if not np.isfinite(own).all():
            raise not_finite(f"the loss of configuration {sa_name(model.config, sa)}", logits.dtype)
    matches = (hit.cumprod(2) * is_target).sum(2).astype(int)                # targets before the first wrong one
    scores = [{"correct": [int(n == length) for n in own],                   # the whole answer, and where it ends
               "prefix_match": own.tolist(), "loss": [round(x, 5) for x in losses.tolist()]}
              for own, length, losses in zip(matches.T, is_target.sum(1), loss.sum(2).T)]
    if routed:
        scores = [{**score, "route": sa, "enough": ok} for score, sa, ok in zip(scores, routes, enough)]
    tree.truncate(segments)                                                  # ready for the next question
    return scores


def all_results(model, eval_set, plans, progress=True):
    """The results of a whole evaluation, in the order of its images."""
    results = [r for batch in evaluate(model, eval_set, plans, progress=progress) for r in batch]
    return sorted(results, key=lambda r: r["image"])


def accuracy(results, i):
    """{task: share of correct answers with plan number i}."""
    tasks = {}  # task: [1 or 0 for each question]
    for r in results:
        tasks.setdefault(r["task"], []).append(r["correct"][i])
    return {task: float(np.mean(correct)) for task, correct in tasks.items()}
