"""Mixtures: which training files to read, and how much of each (the format of LLaVA-NeXT's data YAMLs).

    datasets:
      - json_path: a.json                # from the working directory, or else from where the mixture is
        sampling_strategy: "first:25%"   # all (default), first:K, end:K, random:K; K a number or a percentage
      - json_path: "many/{b,c}.json"     # several files; quoted where it begins with a brace, as YAML demands

The same as JSON: {"datasets": [{"json_path": "a.json"}, ...]}.
"""
import json
import re
import sys
from pathlib import Path

import numpy as np
import yaml


def read_mixture(path):
    """[(file as a Path, sampling strategy)] of a mixture; a training file is a mixture of itself alone.

    Keys that have no meaning here are named on stderr. Raises ValueError, naming the file and, where YAML is broken,
    the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such training file; check the path")
    if path.suffix in (".yaml", ".yml"):
        mixture = _load_yaml(path)
    elif path.suffix == ".json" and _is_object(path):
        try:
            mixture = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            mixture = None
    else:
        return [(path, "all")]

    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
        raise ValueError(f"{path}: neither samples nor a mixture; a mixture has datasets: "
                         '[{"json_path": ...}]')
    datasets = mixture["datasets"]
    if not datasets:
        raise ValueError(f"{path}: datasets is empty; give each file as a json_path")
    for i, entry in enumerate(datasets):
        file = entry.get("json_path") if isinstance(entry, dict) else None
        if not file or not isinstance(file, str):
            raise ValueError(f"{path}: datasets[{i}] has no json_path; give each its file")
    unknown = {str(key) for entry in datasets for key in entry} - {"json_path", "sampling_strategy"}
    unknown |= {str(key) for key in mixture} - {"datasets"}
    if unknown:
        print(f"{path}: {', '.join(sorted(unknown))} not used; known are json_path and sampling_strategy",
              file=sys.stderr)

    files = []
    for entry in datasets:
        strategy = entry.get("sampling_strategy")
        strategy = "all" if strategy in (None, "") else str(strategy)  # YAML reads 10 as a number
        for file in map(Path, expand_braces(entry["json_path"])):
            files.append((file if file.exists() else path.parent / file, strategy))
    return files


def _is_object(path):
    """Whether a .json file is one JSON object, not a list, nor one sample a line, whatever its name promises."""
    with open(path, "rb") as file:
        if file.read(64).lstrip()[:1] != b"{":
            return False
        file.seek(0)
        return b'"conversations"' not in file.readline()


class _UniqueKeys(yaml.SafeLoader):
    """What yaml.safe_load reads with, but a key given twice is an error: the first value would be lost silently."""

    def construct_mapping(self, node, deep=False):
        names = set()
        for key, _ in node.value:
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
    except Exception as e:  # a date of month 13, a thousand brackets: its constructors raise nearly anything
        raise ValueError(f"{path}: not valid YAML ({e})") from None
    raise ValueError(f"{path}, line {line}: not valid YAML ({problem})")


def expand_braces(path):
    """a/{b,c}.json -> [a/b.json, a/c.json], as a shell does: several braces, and braces in braces, too."""
    start = path.find("{")
    if start < 0:
        return [path]
    depth, borders = 0, [start]  # borders: the outer brace, its commas, its end
    for i in range(start, len(path)):
        depth += (path[i] == "{") - (path[i] == "}")
        if depth == 0 or (depth == 1 and path[i] == ","):
            borders.append(i)
        if depth == 0:
            break
    if depth:  # a brace without an end stands for itself
        return [path]
    choices = [path[a + 1:b].strip() for a, b in zip(borders, borders[1:])]
    return [name for choice in choices for name in expand_braces(path[:start] + choice + path[borders[-1] + 1:])]


def subsample(n, strategy, random):
    """The indices of the samples that a sampling strategy takes of n, as an int array.

    strategy: all, first:K, end:K or random:K, K a number or a percentage, rounded up (as in LLaVA-NeXT's train.py).
    random: a numpy Generator. Raises ValueError.
    """
    match = re.fullmatch(r"all|(first|end|random):(\d+)(%?)", strategy)
    if not match:
        raise ValueError(f"sampling_strategy {strategy!r}: give all, or first:, end: or random: with a number or N%")
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
