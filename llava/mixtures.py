"""Mixtures: which training files to read, and how much of each (the format of LLaVA-NeXT's data YAMLs).

    datasets:
      - json_path: a.json                # from the working directory, or else from where the mixture is
        sampling_strategy: "first:25%"   # all (default), first:K, end:K, random:K; K a number or a percentage
      - json_path: "many/{b,c}.json"     # several files; quoted where it begins with a brace, as YAML demands

The same as JSON: {"datasets": [{"json_path": "a.json"}, ...]}.
"""
import codecs
import os
import re
import sys
from pathlib import Path

import numpy as np
import yaml

from cli import read_json
from config import short
from llava.index import NONBLANK, flaw, kind_of, mapped, other_format

LARGEST = 2 * 2**20  # bytes of a mixture
MOST_FILES = 1000  # of a mixture
SHAPE = 'a mixture has datasets: [{"json_path": ...}]'
STRATEGY = re.compile(r"all|(first|end|random):([0-9]{1,15})(%?)")
STRATEGIES = "all, or first:, end: or random: with a number or N%"


def read_mixture(path):
    """[(file as a Path, sampling strategy)] of a mixture; a training file is a mixture of itself alone.

    Keys that have no meaning here are named on stderr. Raises ValueError, one line that names the file and, where YAML
    is broken, the line, else the entry and its field.
    """
    path = Path(path)
    is_yaml = path.suffix in (".yaml", ".yml")
    with mapped(path) as text:
        if not is_yaml and not (path.suffix == ".json" and _is_mixture(text)):
            return [(path, "all")]
        if other := other_format(text):
            raise ValueError(f"{path} {other}")
        if len(text) > LARGEST:
            raise ValueError(f"{path}: {len(text):,} bytes are too many for a mixture; samples go into other files")
    mixture = _load_yaml(path) if is_yaml else read_json(path, mend=f"samples stand in a list or one a line, {SHAPE}")

    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
        raise ValueError(f"{path}: neither samples nor a mixture; {SHAPE}")
    datasets = mixture["datasets"]
    if not datasets:
        raise ValueError(f"{path}: datasets is empty; give each file as a json_path")
    files, unknown = [], {str(key) for key in mixture} - {"datasets"}
    for i, entry in enumerate(datasets):
        try:
            names, strategy = _entry(entry)
        except ValueError as e:
            raise ValueError(f"{path}: datasets[{i}] {e}") from None
        if len(files) + len(names) > MOST_FILES:
            raise ValueError(f"{path}: datasets[{i}] json_path: more than {MOST_FILES:,} files in all; join some")
        files += [(file if os.path.exists(file) else path.parent / file, strategy) for file in map(Path, names)]
        unknown |= {str(key) for key in entry} - {"json_path", "sampling_strategy"}
    if unknown:
        print(f"{path}: {short(', '.join(sorted(unknown)))} not used; known are json_path and sampling_strategy",
              file=sys.stderr)
    return files


def _entry(entry):
    """(paths, sampling strategy) of an entry of datasets. Raises ValueError."""
    name = entry.get("json_path") if isinstance(entry, dict) else None
    if not name or not isinstance(name, str):
        found = f"json_path is {kind_of(name)}" if isinstance(entry, dict) else f"is {kind_of(entry)}"
        raise ValueError(f"has no json_path ({found}); give each its file as text")
    if found := flaw(name, path=True):
        raise ValueError(f"json_path {found}")
    strategy = entry.get("sampling_strategy")
    if strategy in (None, ""):
        strategy = "all"
    if not isinstance(strategy, str) or not STRATEGY.fullmatch(strategy):
        raise ValueError(f"sampling_strategy is {kind_of(strategy)}; give {STRATEGIES}")
    try:
        return expand_braces(name), strategy
    except ValueError as e:
        raise ValueError(f"json_path: {e}") from None


def _is_mixture(text):
    """Whether a .json file is one JSON object, not a list, nor one sample a line, whatever its name promises."""
    begin = NONBLANK.search(text, 3 if text[:3] == codecs.BOM_UTF8 else 0)
    if not begin or begin[0] != b"{" or len(text) > LARGEST:
        return False
    end = text.find(b"\n", begin.start())
    return text.find(b'"conversations"', begin.start(), end if end >= 0 else len(text)) < 0


class _UniqueKeys(yaml.SafeLoader):
    """What yaml.safe_load reads with, but a key given twice is an error: the first value would be lost silently. So is
    a merge (<<), as before PyYAML 6.0.4 a few lines of them make any number of keys."""

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "<< is not taken, write it out", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


def _load_yaml(path):
    """The objects of a YAML file. Raises ValueError with one line that names the file and the line in it."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = 1 + raw.count(b"\n", 0, e.start)
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save it as such") from None
    try:
        return yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as e:
        line, problem = 1 + e.problem_mark.line, e.problem
        if e.context_mark and e.context_mark.line != e.problem_mark.line:  # a missing end is noticed further on
            problem += f" {e.context} that starts in line {1 + e.context_mark.line}"
    except yaml.reader.ReaderError as e:
        line, problem = 1 + text.count("\n", 0, e.position), e.reason
    except RecursionError:
        raise ValueError(f"{path}: not valid YAML (nested too deeply); {SHAPE}") from None
    except Exception:  # a date of month 13: its constructors raise nearly anything
        raise ValueError(f"{path}: not valid YAML (a value is not what its kind asks for); {SHAPE}") from None
    raise ValueError(f"{path}, line {line}: not valid YAML ({problem})")


def expand_braces(path):
    """a/{b,c}.json -> [a/b.json, a/c.json], as a shell does: several braces, and braces in braces, too.

    Raises ValueError, before they are made, when they would be more than MOST_FILES.
    """
    texts, open_braces = [""], []  # of the innermost open brace: the choice so far. Of each: all around that
    at = 0
    for mark in re.finditer(r"[{},]|$", path):
        texts = [text + path[at:mark.start()] for text in texts]
        at = mark.end()
        if mark[0] == "{":
            open_braces.append((mark.start(), texts, []))
            texts = [""]
        elif mark[0] and open_braces:
            _, before, choices = open_braces[-1]
            choices += map(str.strip, texts)
            texts = [""]
            if mark[0] == "}":
                open_braces.pop()
                if len(before) * len(choices) > MOST_FILES:
                    raise ValueError(f"its braces stand for more than {MOST_FILES:,} files; give fewer in each entry")
                texts = [text + choice for text in before for choice in choices]
        else:
            texts = [text + mark[0] for text in texts]
    if open_braces:  # a brace without an end stands for itself
        start, texts, _ = open_braces[0]
        texts = [text + path[start:] for text in texts]
    return texts


def subsample(n, strategy, random):
    """The indices of the samples that a sampling strategy takes of n, as an int array.

    strategy: all, first:K, end:K or random:K, K a number or a percentage, rounded up (as in LLaVA-NeXT's train.py).
    random: a numpy Generator. Raises ValueError.
    """
    match = STRATEGY.fullmatch(strategy)
    if not match:
        raise ValueError(f"sampling_strategy {kind_of(strategy)}: give {STRATEGIES}")
    how, k, percent = match.groups()
    if how is None:
        return np.arange(n)
    k = -(-int(k) * n // 100) if percent else int(k)
    k = min(n, k)
    if how == "first":
        return np.arange(k)
    if how == "end":
        return np.arange(n - k, n)
    return random.permutation(n)[:k]
