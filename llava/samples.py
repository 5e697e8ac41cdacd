"""What a sample of a training file becomes: a prompt of two streams with labels, or the SampleError that it has.

Follows LLaVA-NeXT's llava/train/train.py (preprocess_multimodal for placeholders, preprocess_qwen for labels); what
differs is said at the function that differs. Also here: the order of samples in training, and the questions of a
training file that router.py evaluates.
"""
import os
import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import pictures
from data import IMAGE
from llava.index import JsonIndex, flaw, kind_of
from llava.mixtures import read_mixture, subsample
from pictures import SampleError

KINDS = ("malformed line", "turns", "empty answer", "wrong key", "placeholders", "video", "missing image",
         "broken image", "oversized image", "too long")  # of SampleErrors, in the order of reports
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Keys under which other formats keep pictures and films. Not image_id, image_size or num_images, which are about them
PICTURES = re.compile(r"(image|img|picture|photo|video)s?([_-]?\d+|(?P<place>[_-]?(path|file|(file_?)?name|ur[il]|list|"
                      r"data|base64|bytes)s?))?", re.IGNORECASE)


class Sample(NamedTuple):
    prompt: data.Prompt
    labels: list   # of each text token: its id where it is a target, else -1
    subset: str    # the file that it comes from, without folder and suffix


class Samples:
    """A training file or a mixture as labelled prompts: samples[i] is a Sample, or the SampleError that it has.

    Indices go through the mixture's files in order. images: the directory that image paths start from (default: that
    of each file). rule: "assistant", answers and the <|im_end|> after each are targets, or "llava", see
    `label_markers`. max_tokens: of text and vision together; longer samples are re-tiled with fewer tiles, and those
    still too long are rejected. seed: of random sampling strategies. Raises ValueError.
    """

    def __init__(self, path, images, tokenizer, config, rule="assistant", max_tokens=None, seed=0):
        self.images, self.tokenizer, self.config = images, tokenizer, config
        self.rule, self.max_tokens = rule, max_tokens
        self.files = []  # (JsonIndex, the indices that are used of it)
        indices = {}     # a file may be named many times
        for i, (file, strategy) in enumerate(read_mixture(path)):
            index = indices.setdefault(file, None) or JsonIndex(file)
            indices[file] = index
            self.files.append((index, subsample(len(index), strategy, np.random.default_rng((seed, i)))))
        self.ends = np.cumsum([len(used) for _, used in self.files])  # of each file: 1 + the index of its last sample
        if not len(self):
            raise ValueError(f"{path}: holds no samples")

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        """(JsonIndex, index in it) of sample i."""
        k = int(np.searchsorted(self.ends, i, side="right"))
        index, used = self.files[k]
        return index, int(used[i - int(self.ends[k])])  # negative: it counts from the file's end

    def where(self, i):
        """The place of sample i, for people."""
        index, k = self.find(i)
        return f"{index.path}, sample {k}"

    def raw(self, i):
        """(system text, [user, assistant, ...] turns, paths of the images). Raises SampleError."""
        index, k = self.find(i)
        system, turns, names = conversation(index[k])
        folder = Path(self.images or index.path.parent)
        return system, turns, [folder / name for name in names]

    def __getitem__(self, i):
        return self.at(i, self.config)

    def at(self, i, config):
        """Sample i for a model of a Config, which may have another number of tokens a tile than this one's."""
        try:
            return self.sample(i, config)
        except SampleError as error:
            return error
        except Exception as e:  # whatever a file holds, one sample does not end a training
            return SampleError("malformed line", f"{type(e).__name__}: {' '.join(str(e).split())}")

    def sample(self, i, config):
        """Sample i for a Config. Raises SampleError, or nearly anything where a file holds nonsense."""
        system, turns, paths = self.raw(i)
        images = [pictures.load_image(path) for path in paths] or None  # None: text alone
        single_image = len(paths) == 1
        turns = [data.family_form(text, config) for text in turns]
        pieces = data.turns_to_learn(turns, system) if self.rule == "assistant" else whole_turns(turns, system)
        for c in smaller(images, config):
            # First without pixels, as the length follows from the sizes alone
            tilings = [data.tiling(*image.size, c, single_image) for image in images or ()]
            unread = None if images is None else [data.ProcessedImage(None, tiling) for tiling in tilings]
            prompt, labels = data.labelled(pieces, self.tokenizer, unread)
            if self.max_tokens is None or prompt.end <= self.max_tokens:
                break
        else:
            raise SampleError("too long", f"{prompt.end} tokens, at the least, are more than --max-tokens "
                              f"{self.max_tokens}")
        processed = [data.process_image(image, c, single_image) for image in images or ()]
        if self.rule == "llava":
            labels = label_markers(prompt.ids, labels, self.tokenizer)
        return Sample(prompt._replace(images=processed), labels, self.find(i)[0].path.stem)


def smaller(images, config):
    """Yields Configs with which images cost fewer and fewer tokens, the given one first: of a single image the grid has
    fewer tiles; images without tiles have a quarter less of the largest one's pixels each time."""
    yield config
    tilings = [data.tiling(*image.size, config, len(images) == 1) for image in images or ()]
    if config.aspect == "dynamic":
        most = max((t.resized[0] * t.resized[1] for t in tilings), default=0)
        while (most := most * 3 // 4) > config.min_pixels:
            yield replace(config, max_pixels=most)
    elif len(tilings) == 1:  # of several images, each is one tile already
        grids = sorted({w * h for w, h in config.pinpoints if w * h < tilings[0].tiles - 1}, reverse=True)
        for most in grids if config.aspect == "anyres" else ():
            yield replace(config, pinpoints=[g for g in config.pinpoints if g[0] * g[1] <= most])


# --- conversations --------------------------------------------------------------------------------------------------

def conversation(sample):
    """(system text, turns, names of images) of a sample's dict, with placeholders where LLaVA puts them.

    Turns alternate user, assistant. An answer before the first question is dropped. Raises SampleError.
    """
    names = image_names(sample)
    system, turns = _turns(sample)
    if any("<video>" in text for text in [system, *turns]):
        raise SampleError("video", "<video> in the text stands for a film, which this model does not take; leave the "
                          "sample out")
    if IMAGE in system:
        raise SampleError("placeholders", f"{IMAGE} in the system text; put it into a question")
    turns = [_placeholder_first(text) for text in turns]
    n = sum(text.count(IMAGE) for text in turns)
    if n != len(names):
        raise SampleError("placeholders", f"{n} {IMAGE} in the text for {len(names)} images; give each its path under "
                          "image")
    return system, turns, names


def image_names(sample):
    """The list of a sample's image paths, empty for text alone. Raises SampleError."""
    names = sample.get("image")
    if names in (None, ""):
        names = []
    if isinstance(names, str):
        names = [names]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        found = kind_of(names) if not isinstance(names, list) else "a list of other things"
        raise SampleError("malformed line", f"image is neither a path nor a list of paths, but {found}")
    for name in names:
        if found := flaw(name, path=True):
            raise SampleError("malformed line", f"the image's path {found}")
    _no_other_pictures(sample, "", known=("image",), also_place=bool(names))
    return names


def _no_other_pictures(holder, where, known=(), also_place=False):
    """Raises SampleError where a sample or a turn has pictures under a key that is not read.

    where: which turn, for the message. also_place: keys like image_url may stand beside an image, as a note.
    """
    for key, value in holder.items():
        match = PICTURES.fullmatch(key)
        if not match or not value or key in known or (also_place and match["place"]):
            continue
        if match[1].lower() == "video":
            raise SampleError("video", f"{where}has {key}: this model takes no films; leave the sample out")
        raise SampleError("wrong key", f"{where}has pictures under {key}, which is not read: call it image, in the "
                          "sample, and give a path or a list of paths")


def _turns(sample):
    """(system text, [user, assistant, ...]) of a sample's dict, in LLaVA's or OpenAI's keys. Raises SampleError."""
    entries = sample.get("conversations")
    if not isinstance(entries, list):
        found = f"conversations is {kind_of(entries)}" if entries is not None else "conversations is missing"
        raise SampleError("malformed line", f'{found}; give a list of turns, {{"from": ..., "value": ...}}')
    system, roles, turns = sample.get("system"), [], []
    if system == "":
        system = None
    if not isinstance(system, str | None):
        raise SampleError("malformed line", f"system {kind_of(system)} is no text")
    for i, entry in enumerate(entries):
        role, text = _turn(entry, i)
        if role == "system":
            if i:
                raise SampleError("turns", f"turn {i + 1} is a system turn; only the first can be one")
            if system not in (None, text):
                raise SampleError("turns", "a system key and another system turn; give one of them")
            system = text
        elif turns or role == "user":  # an answer to nothing is dropped
            roles.append(role)
            turns.append(text)
    if not turns or roles != ["user", "assistant"] * (len(turns) // 2):
        raise SampleError("turns", "turns are not question, answer, question, answer")
    for answer in turns[1::2]:
        if not answer.replace(IMAGE, "").strip():
            raise SampleError("empty answer", "an answer is an image alone, which cannot be learned; answer in words"
                              if IMAGE in answer else "an answer is empty")
    if found := flaw(system or ""):
        raise SampleError("malformed line", f"the system text {found}")
    return data.SYSTEM if system is None else system, turns


def _turn(entry, i):
    """(user, assistant or system; text) of entry i of conversations. Raises SampleError."""
    turn = f"turn {i + 1}"
    if not isinstance(entry, dict):
        raise SampleError("malformed line", f'{turn} is {kind_of(entry)}; give {{"from": ..., "value": ...}}')
    role, text = (_text(entry, turn, *keys) for keys in (("from", "role"), ("value", "content")))
    if role not in ROLES:
        raise SampleError("malformed line", f"{turn} is from {kind_of(role)}, none of {', '.join(ROLES)}")
    if found := flaw(text):
        raise SampleError("malformed line", f"{turn} {found}")
    _no_other_pictures(entry, f"{turn} ")
    return ROLES[role], text


def _text(entry, turn, key, other):
    """entry[key], or that of the other key where it has none, if that is a text. turn: for the message."""
    key = key if key in entry or other not in entry else other
    if key not in entry:
        raise SampleError("malformed line", f"{turn} has neither {key} nor {other}; give one as text")
    if not isinstance(entry[key], str):
        raise SampleError("malformed line", f"{turn}: {key} {kind_of(entry[key])} is no text; write it as one")
    return entry[key]


def _placeholder_first(text):
    """A turn's only <image> moves to its front (LLaVA-NeXT, preprocess_multimodal); several stay where they are."""
    if text.count(IMAGE) != 1 or text.startswith(IMAGE):
        return text
    return f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()


def whole_turns(turns, system):
    """Pieces for data.labelled under LLaVA's rule: an assistant's turn is a target as a whole, from its <|im_start|>
    to the newline after its <|im_end|>."""
    roles = ["system", *("user", "assistant") * (len(turns) // 2)]
    return [(f"<|im_start|>{role}\n{text}<|im_end|>\n", role == "assistant")
            for role, text in zip(roles, [system, *turns])]


def label_markers(ids, labels, tokenizer):
    """The labels of `whole_turns` with every newline and turn marker a target too, those of questions included.

    Thus LLaVA-NeXT's preprocess_qwen does it. ids, labels: lists of the same length.
    """
    markers = {tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>"),
               *tokenizer.encode("\n", add_special_tokens=False).ids}
    return [token if token in markers else label for token, label in zip(ids, labels)]


# --- the order of training ------------------------------------------------------------------------------------------

def step_indices(n, batch_size, seed, step):
    """The batch_size sample indices of an optimisation step, of n samples. Deterministic: they depend only on the
    arguments, and each epoch holds every sample once, in an order of its own."""
    return [int(epoch_order(n, seed, i // n)[i % n]) for i in range(step * batch_size, (step + 1) * batch_size)]


@lru_cache(maxsize=2)  # a step may lie across two epochs
def epoch_order(n, seed, epoch):
    """The permutation of n samples, (n,) int, that is an epoch's order."""
    return np.random.default_rng((seed, epoch)).permutation(n)


# --- the router's questions -----------------------------------------------------------------------------------------

def eval_questions(samples, per_file, seed=0):
    """The questions of a mixture that router.py evaluates: [(path of the image, [(subset, question, answer)])].

    The first questions about single images, up to `per_file` of each file, drawn by seed; no image is decoded yet.
    Samples that cannot be used are passed over, and counted on stderr. Raises ValueError when no question is left.
    """
    found, errors, first = [], [], 0  # first: index of the file's first sample
    for i, (end, (index, _)) in enumerate(zip(samples.ends.tolist(), samples.files)):
        wanted = per_file
        for k in np.random.default_rng((seed, i)).permutation(end - first).tolist():
            if not wanted:
                break
            try:
                _, turns, paths = samples.raw(first + k)
            except SampleError as error:
                errors.append(f"{samples.where(first + k)}: {error}")
                continue
            question = turns[0].removeprefix(IMAGE).strip()
            if len(paths) != 1 or not question:
                continue
            if not os.path.isfile(paths[0]) or not os.access(paths[0], os.R_OK):
                errors.append(f"{samples.where(first + k)}: {paths[0]}: no such image, or not readable")
                continue
            found.append((paths[0], index.path, question, turns[1]))
            wanted -= 1
        first = end
    note = f"{len(errors)} samples cannot be used, as {errors[0]}" if errors else ""
    if not found:
        raise ValueError(f"{samples.find(0)[0].path}: no question about a single image" + (note and f"; {note}"))
    if note:
        print(note, file=sys.stderr)
    files = {path for _, path, *_ in found}
    unique = len({path.stem for path in files}) == len(files)  # or a subset is called by its path
    return [(image, [(path.stem if unique else str(path.with_suffix("")), question, answer)])
            for image, path, question, answer in found]


def reference_prompt(samples, eval_set, results):
    """({"all": subsets}, text tokens, (width, height) of the image) of the first question with a result, by which
    report.Report counts savings."""
    image, [(_, question, _)] = eval_set[results[0]["image"]]
    tokens = samples.tokenizer.encode(data.chatml([question]), add_special_tokens=False).ids
    subsets = dict.fromkeys(r["task"] for r in results)  # without repetition, in order
    return {"all": list(subsets)}, len(tokens), pictures.load_image(image).size
