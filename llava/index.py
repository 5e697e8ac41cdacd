"""Where each sample of a training file stands, so that a file of any size stays on the disk.

FILE.index.npy beside FILE is int64, (1 + samples, 2). Row 0 is FILE's size in bytes and its time of change in ns: if
either differs, the index is made again. Row 1 + i is the first byte of sample i and the byte after its last.
(LLaVA-NeXT keeps the whole file in the memory of every process instead: LazySupervisedDataset in its train.py.)
"""
import json
import mmap
import re
import sys
from pathlib import Path

import numpy as np

from cli import atomic
from data import SampleError

# All that matters to the depth of nested JSON: whole strings, so that nothing inside them counts; brackets; commas
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', re.DOTALL)


class JsonIndex:
    """The samples of one LLaVA file by number, each read from the disk when it is needed.

    path: a .json list or .jsonl lines, told apart by the first character, whatever the name. spans (samples, 2): the
    first byte of each sample and the byte after its last. Raises ValueError when there is no such file, or its list
    has no end.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such training file; check the path")
        stat = self.path.stat()
        version = [stat.st_size, stat.st_mtime_ns]
        file = self.path.with_name(self.path.name + ".index.npy")
        rows = self._load(file, version)
        if rows is None:
            rows = np.array([version, *self._scan()], dtype=np.int64)
            try:
                with atomic(file) as beside, open(beside, "wb") as stream:  # np.save would add .npy to a mere name
                    np.save(stream, rows)
            except OSError as e:  # a read-only disk is no reason to stop
                print(f"{file}: cannot be written ({e.strerror}); the next run makes the index again", file=sys.stderr)
        self.spans = rows[1:]

    @staticmethod
    def _load(file, version):
        """The rows of an index file, memory-mapped; None where it is missing, broken or of another version."""
        try:
            rows = np.load(file, mmap_mode="r")
            return rows if rows.ndim == 2 and rows.shape[1] == 2 and rows[0].tolist() == version else None
        except (OSError, ValueError, EOFError, IndexError):
            return None

    def _scan(self):
        """[(first byte, last byte + 1)] of each sample, from one pass over the file."""
        if not self.path.stat().st_size:
            return []  # an empty file cannot be memory-mapped
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text[:64].lstrip()[:1] == b"[":
                return elements(text, self.path)
            spans, start = [], 0
            while start < len(text):
                end = text.find(b"\n", start)
                if end < 0:  # the last line need not end in a newline
                    end = len(text)
                if text[start:end].strip():
                    spans.append((start, end))
                start = end + 1
            return spans

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """The dict of sample i. Raises SampleError."""
        start, end = self.spans[i].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        try:
            sample = json.loads(text)
        except ValueError as e:
            raise SampleError("malformed line", f"not valid JSON ({e})") from None
        if not isinstance(sample, dict):
            raise SampleError("malformed line", f"a {type(sample).__name__} instead of a JSON object")
        return sample


def elements(text, path):
    """[(first byte, last byte + 1)] of each element of the JSON list in `text`, without making objects of them.

    text: bytes or a memory map. path: its file, for the message. Raises ValueError when the list has no end.
    """
    spans, depth, start = [], 0, 0
    for token in TOKEN.finditer(text):
        mark = text[token.start():token.start() + 1]
        if mark in (b"[", b"{"):
            depth += 1
            if depth == 1:  # the list itself opens: its first element starts here
                start = token.end()
        elif mark in (b"]", b"}"):
            depth -= 1
        closed = mark == b"]" and depth == 0
        if closed or (mark == b"," and depth == 1):  # an element ends here
            if text[start:token.start()].strip():  # an empty list has none
                spans.append((start, token.start()))
            start = token.end()
        if closed:
            return spans
    raise ValueError(f"{path}: the list of samples has no end; the file is cut off, get it again")
