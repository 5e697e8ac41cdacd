"""Many questions in batches: answers in the order of the questions, whatever images and routes they have.

The loop behind `sample.py --batch`. Questions are taken in windows of several batches; within one, those with about as
many visual tokens go together, so that little is padded. Headers of images tell enough for that: an image is decoded
when its batch is due, and forgotten with it.
"""
import warnings
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

import data
import pictures
from cli import is_out_of_memory
from config import Plan

WINDOW = 8  # batches


class Asked(NamedTuple):
    """A question as the model is asked it."""
    shared: data.Prompt  # what other questions about the same images would share
    own: data.Prompt     # the rest; goes on from `shared`
    dense_vision: int    # visual tokens without reduction
    sa: object           # a configuration, or "auto"
    pixels: str          # as in VLM.generate
    allowed: tuple       # configurations that a router may choose; None: all


class Answer(NamedTuple):
    """What came of a question: the first three, or the last."""
    asked: Asked = None  # its images without pixels
    tokens: list = None  # ids, without the closing <|im_end|>
    plan: Plan = None    # what ran
    layer_tokens: object = None  # of flops; where visual tokens were dropped inside the language model
    error: str = None    # one line: why it could not be asked


def answers(model, questions, sa="auto", batch_size=16, start=0, temperature=0.0, seed=0, pixels="all", **how):
    """Yields an Answer for each of an iterable of questions, in order.

    A question is (text, images): paths or PIL images, where the text has <image> or before it. A ValueError in place
    of one is the reason why there is none, and becomes the answer's error.
    sa: a configuration, "auto", or a function that gives (sa, allowed) of Asked for the shared beginning of a prompt,
    its text tokens, and its visual ones without reduction. start: the first question to answer; batches are formed as
    without it, so that a run that goes on with the same batch_size gives the same bits. temperature, seed, pixels, how:
    as in VLM.generate; what is drawn for a question depends on the seed and its number only.
    """
    choose = sa if callable(sa) else lambda *_: (sa, None)
    largest = 1 if temperature else batch_size  # of a batch: VLM.generate draws for all of one from one seed
    numbered = enumerate(questions)
    while window := list(islice(numbered, WINDOW * batch_size)):
        found = {}  # number: Answer
        for batch in batches(window, model.config, largest) if window[-1][0] >= start else ():
            first, last = min(batch)[0], max(batch)[0]
            if last >= start:
                drawn = int(np.random.default_rng((seed, first)).integers(1 << 63))
                found |= answer_batch(model, batch, choose, pixels, temperature=temperature, seed=drawn, **how)
            while start in found:
                yield found.pop(start)
                start += 1


def batches(window, config, batch_size, tokens=1 << 14):
    """[(number, question), ...] in lists of those with about as many visual tokens, the lowest number first. A list has
    up to batch_size questions, and no more than about `tokens` tokens, padding included, unless it is one question."""
    def size(question):
        text, images = ("", []) if isinstance(question, ValueError) else question
        return sum(visual_tokens(x, config, len(images) == 1) for x in images), len(text) // 4
    found = []
    for (vision, text), item in sorted([(size(x[1]), x) for x in window], key=lambda x: x[0]):
        if not found or len(found[-1]) == batch_size or (len(found[-1]) + 1) * (vision + text) > tokens:
            found.append([])
        found[-1].append(item)
    return sorted(found, key=lambda batch: min(number for number, _ in batch))


def visual_tokens(image, config, single_image):
    """How many an image will have, by its header, if that says how large it is when upright. 0 where it cannot be
    read: what is wrong with it, decoding tells."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about large images
            if isinstance(image, Image.Image):
                return data.tiling(*image.size, config, single_image).tokens
            with Image.open(image) as opened:
                return data.tiling(*opened.size, config, single_image).tokens
    except Exception:  # Pillow raises nearly anything on broken files
        return 0


def answer_batch(model, batch, choose, pixels, **how):
    """{number: Answer} for [(number, question), ...]."""
    found, groups = {}, {}  # groups: those that VLM.generate takes together, [(number, Asked), ...]
    for number, question in batch:
        try:
            asked = ask(model, question, choose, pixels)
            groups.setdefault((asked.sa == "auto", asked.pixels, asked.allowed), []).append((number, asked))
        except ValueError as e:
            found[number] = Answer(error=" ".join(str(e).split()))
    for group in groups.values():
        numbers, asked = zip(*group)
        found.update(zip(numbers, generate(model, asked, **how)))
    return found


def ask(model, question, choose, pixels):
    """The Asked of a question, its images decoded. Raises ValueError."""
    if isinstance(question, ValueError):
        raise question
    (text, images), c = question, model.config
    single = len(images) == 1
    shared, own = data.split_shared(data.chatml([data.place_images(text, len(images), c)]))
    images = [x if isinstance(x, Image.Image) else pictures.load_image(x) for x in images]
    shared = data.encode(shared, model.tokenizer, [data.process_image(x, c, single) for x in images])
    own = data.encode(own, model.tokenizer, start=shared.end)
    dense_vision = sum(data.tiling(*x.size, c.unreduced(), single).tokens for x in images)
    sa, allowed = choose(shared, len(shared.ids) + len(own.ids), dense_vision)
    pixels = c.allowed_pixels(pixels if sa == "auto" or pixels != "auto" else "all", sa, allowed)
    return Asked(shared, own, dense_vision, sa, pixels, allowed and tuple(allowed))


def generate(model, asked, **how):
    """The Answers to a sequence of Asked with the same pixels: all "auto" with the same `allowed`, or none "auto".
    Where memory does not suffice for them, or what comes of one is not finite, one by one."""
    prompts, routes, layer_tokens = [data.join(x.shared, x.own) for x in asked], [], []
    sa = "auto" if asked[0].sa == "auto" else [x.sa for x in asked]
    try:
        tokens = model.generate(prompts, sa, asked[0].pixels, allowed=asked[0].allowed, routes=routes,
                                layer_tokens=layer_tokens, **how)
    except (MemoryError, RuntimeError, ValueError) as e:
        if not (isinstance(e, ValueError) or is_out_of_memory(e)):
            raise
        why = str(e) if isinstance(e, ValueError) else "out of memory: give smaller images or fewer"
    else:
        return [Answer(without_pixels(x), *rest) for x, *rest in zip(asked, tokens, routes, layer_tokens)]
    if len(asked) == 1:  # only here, where the exception no longer holds on to tensors
        return [Answer(error=" ".join(why.split()))]
    return [answer for x in asked for answer in generate(model, [x], **how)]


def without_pixels(asked):
    """It may wait for others, and pixels are large."""
    images = [x._replace(pixels=None) for x in asked.shared.images]
    return asked._replace(shared=asked.shared._replace(images=images))
