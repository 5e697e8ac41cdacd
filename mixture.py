"""Training files: LLaVA's JSON and JSONL and mixtures of them, and how a sample becomes a labelled prompt.

A file of any size stays on the disk: an index of where its samples stand is made once beside it. What is wrong with a
sample is a data.Fault, which training counts, names and skips; nothing is ever put in a sample's place. Without torch,
as data.py.

    {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"] or absent,
     "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}, ...]}
"""
import json
import mmap
import os
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import data
from config import Parser, read_config
from data import IMAGE, Fault

KINDS = ("malformed line", "turns", "empty answer", "placeholders", "video", "missing picture", "broken picture",
         "oversized picture", "too long")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


# --- files -----------------------------------------------------------------------------------------------------------

class Records:
    """The samples of one LLaVA file by number, each read from the disk when it is asked for.

    FILE.index.npy beside the file holds the first and last byte of each sample; it is made anew when the file changes.
    Raises ValueError when there is no such file, or it is not a list of samples.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such training file; check the path")
        stat, index = self.path.stat(), self.path.with_name(self.path.name + ".index.npy")
        seal = [stat.st_size, stat.st_mtime_ns]
        try:
            spans = np.load(index, mmap_mode="r")
            fresh = spans.ndim == 2 and spans.shape[1] == 2 and spans[0].tolist() == seal
        except (OSError, ValueError, EOFError, IndexError):
            fresh = False
        if not fresh:
            spans = np.array([seal, *self._scan()], dtype=np.int64)
            try:
                beside = index.with_name(f"{index.name}.{os.getpid()}.npy")
                np.save(beside, spans)
                os.replace(beside, index)
            except OSError as e:
                print(f"{index}: cannot be written ({e.strerror}); the next run makes the index again", file=sys.stderr)
        self.spans = spans[1:]

    def _scan(self):
        """(first byte, last byte + 1) of each sample."""
        if not self.path.stat().st_size:
            return []
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text[:64].lstrip()[:1] == b"[":
                return elements(text, self.path)
            spans, start = [], 0
            while start < len(text):
                end = text.find(b"\n", start) % (len(text) + 1)  # -1, no more of them, is the end
                if text[start:end].strip():
                    spans.append((start, end))
                start = end + 1
            return spans

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """The dict of a sample. Raises Fault."""
        start, end = self.spans[i].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            sample = json.loads(text)
        except ValueError as e:
            raise Fault("malformed line", f"not valid JSON ({e})") from None
        if not isinstance(sample, dict):
            raise Fault("malformed line", f"a {type(sample).__name__} instead of a JSON object")
        return sample


def elements(text, path):
    """(start, end) of each element of the JSON list in `text`, without making objects of them."""
    spans, depth, start = [], 0, 0
    for token in re.finditer(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', text, re.DOTALL):
        mark = text[token.start():token.start() + 1]
        if mark in b"[{":
            depth += 1
            if depth == 1:
                start = token.end()
        elif mark in b"]}":
            depth -= 1
        if mark == b"," and depth == 1 or mark == b"]" and depth == 0:
            if text[start:token.start()].strip():
                spans.append((start, token.start()))
            start = token.end()
            if depth == 0:
                return spans
    raise ValueError(f"{path}: the list of samples has no end; the file is cut off, get it again")


def sampled(n, strategy, random):
    """Numbers of the samples that a sampling strategy takes of n: all, first:K, end:K or random:K, K a number or a
    percentage, rounded up. random: a numpy generator. Raises ValueError."""
    match = re.fullmatch(r"all|(first|end|random):(\d+)(%?)", strategy)
    if not match:
        raise ValueError(f"sampling_strategy {strategy!r}: give all, or first:, end: or random: with a number or N%")
    how, k, percent = match.groups()
    if how is None:
        return np.arange(n)
    k = min(n, -(-int(k) * n // 100) if percent else int(k))
    return {"first": lambda: np.arange(k), "end": lambda: np.arange(n - k, n),
            "random": lambda: random.permutation(n)[:k]}[how]()


def entries(path):
    """[(json_path, sampling_strategy)] of a mixture file, or of a single training file.

    A mixture is YAML or JSON: datasets: a list of json_path and, if not all of it, sampling_strategy. Of YAML this
    much is read: one `key: value` a line, quoted or not, and comments. Raises ValueError.
    """
    path, found = Path(path), []
    if not path.is_file():
        raise ValueError(f"{path}: no such training file; check the path")
    if path.suffix in (".yaml", ".yml"):
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = re.sub(r"(^|\s)#.*", "", line).rstrip()
            dash, line = re.fullmatch(r"\s*(-(?=\s|$))?\s*(.*)", line).groups()
            if dash:
                found.append({})
            if line in ("", "---"):
                continue
            match = re.fullmatch(r"""(\w+):\s*(?:"(.*)"|'(.*)'|(.*))""", line)
            if not match:
                raise ValueError(f"{path}, line {i}: give `- json_path: FILE` or `sampling_strategy: all`")
            if match[1] != "datasets" and found:
                found[-1][match[1]] = next(x for x in match.groups()[1:] if x is not None)
    elif path.suffix == ".json" and open(path, "rb").read(64).lstrip()[:1] == b"{":
        with open(path, "rb") as file:
            if b'"conversations"' in file.readline():  # one sample a line, whatever the name says
                return [(path, "all")]
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["datasets"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: neither samples nor a mixture; a mixture has datasets: "
                             '[{"json_path": ...}]') from None
    else:
        return [(path, "all")]
    strange = {key for entry in found for key in entry} - {"json_path", "sampling_strategy"}
    if strange:
        print(f"{path}: {', '.join(sorted(strange))} not used; known are json_path and sampling_strategy",
              file=sys.stderr)
    if not found or not all(entry.get("json_path") for entry in found):
        raise ValueError(f"{path}: a dataset has no json_path; give each its file")
    return [(file if file.exists() else path.parent / file, entry.get("sampling_strategy") or "all")
            for entry in found for file in map(Path, unfold(entry["json_path"]))]


def unfold(path):
    """a/{b,c}.json -> a/b.json, a/c.json."""
    match = re.search(r"\{(.*?)\}", path)
    return [y for x in match[1].split(",") for y in unfold(path[:match.start()] + x.strip() + path[match.end():])] \
        if match else [path]


# --- samples ---------------------------------------------------------------------------------------------------------

class Sample(NamedTuple):
    prompt: data.Prompt
    labels: list   # its token ids where they are to be learned, else -1
    subset: str    # the file that it comes from, as a name


class Samples:
    """A training file or a mixture as labelled prompts, by number: a Sample, or the Fault that it has.

    Numbers go through the mixture's files in order. images: the directory that paths of pictures start from (default:
    that of each file). rule: "assistant", answers and the <|im_end|> after them are learned, or "llava", see `labels`.
    max_tokens: of text and vision together; who has more gets fewer tiles, and is a fault if that does not do.
    """

    def __init__(self, path, images, tokenizer, config, rule="assistant", max_tokens=None, seed=0):
        self.images, self.tokenizer, self.config = images, tokenizer, config
        self.rule, self.max_tokens, self.parts = rule, max_tokens, []
        for i, (file, strategy) in enumerate(entries(path)):
            records = Records(file)
            self.parts.append((records, sampled(len(records), strategy, np.random.default_rng((seed, i)))))
        self.ends = np.cumsum([len(numbers) for _, numbers in self.parts])
        if not len(self):
            raise ValueError(f"{path}: holds no samples")

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        """(Records, the sample's number there)."""
        part = int(np.searchsorted(self.ends, i, side="right"))
        records, numbers = self.parts[part]
        return records, int(numbers[i - int(self.ends[part])])

    def where(self, i):
        """The place of sample i, for people."""
        records, k = self.find(i)
        return f"{records.path}, sample {k}"

    def raw(self, i):
        """(system text, [user, assistant, ...] turns, pictures as RGB images or None for text alone). Raises Fault."""
        records, k = self.find(i)
        system, turns, files = conversation(records[k])
        folder = Path(self.images or records.path.parent)
        return system, turns, [data.load_image(folder / file) for file in files] if files else None

    def __getitem__(self, i):
        try:
            return self.sample(i)
        except Fault as fault:
            return fault
        except Exception as e:  # whatever a file holds, one sample does not end a training
            return Fault("malformed line", f"{type(e).__name__}: {e}")

    def sample(self, i):
        system, turns, images = self.raw(i)
        pieces = data.turns_to_learn(turns, system) if self.rule == "assistant" else whole_turns(turns, system)
        for tiles in self.grids(images):
            tiling = [data.tiling(*image.size, self.config, len(images) == 1, tiles) for image in images or ()]
            empty = None if images is None else [data.Picture(None, t) for t in tiling]
            prompt, labels = data.labelled(pieces, self.tokenizer, empty)
            if self.max_tokens is None or prompt.end <= self.max_tokens:
                break
        else:
            raise Fault("too long", f"{prompt.end} tokens, at the least, are more than --max-tokens {self.max_tokens}")
        pictures = [data.picture(image, self.config, len(images) == 1, tiles) for image in images or ()]
        labels = labels if self.rule == "assistant" else with_markers(prompt.ids, labels, self.tokenizer)
        return Sample(prompt._replace(pictures=pictures), labels, self.find(i)[0].path.stem)

    def grids(self, images):
        """How many tiles a lone picture's grid may have, one try after the other: all, then fewer."""
        if images is None or len(images) != 1:
            return [None]
        grid = data.tiling(*images[0].size, self.config).grid
        sizes = {w * h for w, h in self.config.pinpoints if w * h < grid[0] * grid[1]}
        return [None, *sorted(sizes, reverse=True)]


def conversation(sample):
    """(system text, turns, names of pictures) of a sample's dict, its placeholders as LLaVA puts them. Raises Fault."""
    if sample.get("video"):
        raise Fault("video", "a film, which this model does not take")
    images, said = sample.get("image") or [], sample.get("conversations")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise Fault("malformed line", "image is neither a path nor a list of paths")
    if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
        raise Fault("malformed line", "conversations is not a list of turns")
    system, turns = data.SYSTEM, []
    for turn in said:
        role, text = ROLES.get(turn.get("from", turn.get("role"))), turn.get("value", turn.get("content"))
        if role is None or not isinstance(text, str):
            raise Fault("malformed line", "a turn without from and value, or role and content")
        if role == "system":
            system = text
        elif turns or role == "user":  # an answer to nothing is dropped
            turns.append((role, text))
    if not turns or len(turns) % 2 or any(role != ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns)):
        raise Fault("turns", "turns are not question, answer, question, answer")
    turns = [text for _, text in turns]
    if not all(answer.strip() for answer in turns[1::2]):
        raise Fault("empty answer", "an answer is empty")
    if images:
        turns = [f"{IMAGE}\n{text.replace(IMAGE, '').strip()}".strip()
                 if text.count(IMAGE) == 1 and not text.startswith(IMAGE) else text for text in turns]
        if (n := sum(text.count(IMAGE) for text in turns)) != len(images):
            raise Fault("placeholders", f"{n} {IMAGE} in the text for {len(images)} pictures")
    return system, turns, images


def whole_turns(turns, system):
    """Pieces for data.labelled under LLaVA's rule: an assistant's turn is learned from its first marker to its line's
    end."""
    said = [("system", system), *zip(("user", "assistant") * (len(turns) // 2), turns)]
    return [(f"<|im_start|>{role}\n{text}<|im_end|>\n", role == "assistant") for role, text in said]


def with_markers(ids, labels, tokenizer):
    """LLaVA's rule has every newline and turn marker learned too, questions' included (LLaVA-NeXT, preprocess_qwen)."""
    marks = {tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>"),
             *tokenizer.encode("\n", add_special_tokens=False).ids}
    return [token if token in marks else label for token, label in zip(ids, labels)]


def plan(n, batch_size, seed, step):
    """Numbers of the samples of an optimisation step: of n, in an order drawn anew for every time through them."""
    return [int(order(n, seed, i // n)[i % n]) for i in range(step * batch_size, (step + 1) * batch_size)]


@lru_cache(maxsize=2)
def order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


class Exam:
    """What router.py examines, of a mixture: [(image, [(subset, question, answer)])], each image read when asked for.

    The first questions about lone pictures, up to `most` of each file, drawn by seed. Faults are passed over, and said
    on stderr.
    """

    def __init__(self, samples, most, seed=0):
        self.samples, self.numbers, self.faults, first = samples, [], {}, 0
        for i, end in enumerate(samples.ends.tolist()):
            left = most
            for k in np.random.default_rng((seed, i)).permutation(end - first).tolist():
                if left and self._question(first + k):
                    self.numbers.append(first + k)
                    left -= 1
            first = end
        said = next((f"{len(self.faults)} samples cannot be used, as {x}" for x in self.faults.values()), "")
        if not self.numbers:
            raise ValueError("no question about a single picture in the training file" + (said and f"; {said}"))
        if said:
            print(said, file=sys.stderr)
        self.paths = {samples.find(i)[0].path for i in self.numbers}

    def _question(self, i):
        """(image, question, answer) of a sample, or None where it is not about one picture."""
        try:
            _, turns, images = self.samples.raw(i)
        except Fault as fault:
            self.faults[i] = f"{self.samples.where(i)}: {fault}"
            return None
        question = turns[0].removeprefix(IMAGE).strip()
        return (images[0], question, turns[1]) if images and len(images) == 1 and question else None

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        image, question, answer = self._question(self.numbers[i])  # IndexError ends a loop over the exam
        return image, [(self._subset(self.numbers[i]), question, answer)]

    def _subset(self, i):
        """The file's name, or its path where two have the same."""
        path = self.samples.find(i)[0].path
        return path.stem if len({p.stem for p in self.paths}) == len(self.paths) else str(path.with_suffix(""))

    def usual(self):
        """({"all": subsets}, text tokens and picture size of the first question): what router.Report wants to know."""
        image, [(_, question, _)] = self[0]
        tokens = self.samples.tokenizer.encode(data.chatml([question]), add_special_tokens=False).ids
        subsets = dict.fromkeys(map(self._subset, self.numbers))
        return {"all": list(subsets)}, len(tokens), image.size


# --- looking at them -------------------------------------------------------------------------------------------------

class Verdicts:
    """(text tokens, visual tokens, learned tokens) of each sample, or its Fault."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        if isinstance(sample, Fault):
            return sample
        return len(sample.prompt.ids), len(sample.prompt.v_pos), sum(label >= 0 for label in sample.labels)


def check(samples, workers):
    """Reads every sample once; a table of what is wrong with how many, and where first."""
    from torch.utils.data import DataLoader
    loader = DataLoader(Verdicts(samples), batch_size=16, num_workers=workers, collate_fn=list)
    verdicts = [v for batch in tqdm(loader, desc="check", unit_scale=16, ncols=80) for v in batch]
    good = np.array([v for v in verdicts if not isinstance(v, Fault)]).reshape(-1, 3)
    counts = Counter(v.kind for v in verdicts if isinstance(v, Fault))
    lines = [f"{len(verdicts):,} samples: {len(good):,} can be learned from, {len(verdicts) - len(good):,} cannot"]
    if len(good):
        lines.append(f"{(good[:, 1] == 0).sum():,} of them are text alone; tokens of a sample:")
        lines += [f"  {name:8} median {int(np.median(x)):6,}, at most {x.max():6,}"
                  for name, x in zip(("text", "visual", "learned"), good.T)]
    for kind in KINDS:
        if counts[kind]:
            i, fault = next((i, v) for i, v in enumerate(verdicts) if isinstance(v, Fault) and v.kind == kind)
            lines.append(f"{counts[kind]:9,}  {kind}, for instance")
            lines += wrap(f"{samples.where(i)}: {fault}", 79, initial_indent=" " * 11, subsequent_indent=" " * 11)
    return "\n".join(lines)


def show(samples, i):
    """A sample as the model gets it: tokens that are learned green, the others red, pictures where they stand."""
    sample = samples.sample(i)
    prompt, tokenizer = sample.prompt, samples.tokenizer
    learned = sum(label >= 0 for label in sample.labels)
    lines = [f"{samples.where(i)}:",
             f"{len(prompt.ids)} text tokens, {learned} of them learned, {len(prompt.v_pos)} visual tokens"]
    text, at, start, pictures = "", 0, 0, iter(prompt.pictures)
    for k in range(len(prompt.ids) + 1):
        position = prompt.t_pos[k] if k < len(prompt.ids) else prompt.end
        kind = k < len(prompt.ids) and sample.labels[k] >= 0
        if k and (k == len(prompt.ids) or position != at or kind != (sample.labels[k - 1] >= 0)):
            said = tokenizer.decode(prompt.ids[start:k], skip_special_tokens=False)
            text += f"\033[{32 if sample.labels[k - 1] >= 0 else 31}m{said}\033[0m"
            start = k
        while position != at:
            tiling = next(pictures).tiling
            rows, columns = tiling.grid
            text += f"[picture: base tile and {rows} x {columns} tiles, {tiling.tokens} tokens]"
            at += tiling.tokens
        at += 1
    return "\n".join([*lines, text])


def main(argv=None):
    p = Parser(description="Training data: look at a sample, or check them all.", prog="data.py")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--show", metavar="FILE", help="a sample as the model gets it: learned tokens green, others red")
    what.add_argument("--check", metavar="FILE", help="reads every sample once and counts what is wrong with them")
    p.add_argument("--index", type=int, default=0, metavar="N", help="which sample to show (default: 0)")
    p.add_argument("--images", metavar="DIR", help="where the pictures' paths start (default: where FILE is)")
    p.add_argument("--model", default=str(Path(__file__).parent / "nano"), metavar="DIR", help="checkpoint directory "
                   "with the tokenizer and the tile size (default: nano)")
    p.add_argument("--label-rule", default="assistant", choices=("assistant", "llava"), help="what is learned: answers "
                   "(default), or what LLaVA-OneVision learns, all markers and newlines too")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest sample, text and vision together")
    p.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that read "
                   "(default: all cores)")
    args = p.parse_args(argv)
    samples = Samples(args.show or args.check, args.images, data.load_tokenizer(args.model), read_config(args.model),
                      args.label_rule, args.max_tokens)
    if args.check:
        print(check(samples, args.workers))
    elif 0 <= args.index < len(samples):
        print(show(samples, args.index))
    else:
        p.error(f"--index {args.index}: {args.show} has samples 0 to {len(samples) - 1}")
