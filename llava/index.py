"""Where each sample of a training file stands, so that a file of any size stays on the disk.

FILE.index.npy beside FILE is int64, (1 + samples, 2). Row 0 is FILE's size in bytes and its time of change in ns: if
either differs, the index is made again. Row 1 + i is the first byte of sample i and the byte after its last.
(LLaVA-NeXT keeps the whole file in the memory of every process instead: LazySupervisedDataset in its train.py.)
"""
import codecs
import glob
import json
import mmap
import os
import re
import sys
from array import array
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from cli import atomic, unique_keys
from pictures import SampleError

MARK = re.compile(rb'["\[\]{},]')  # all that matters to the depth of nested JSON, where no string holds it
NONBLANK = re.compile(rb"\S")
DEEPEST = 10**6  # open brackets in a list of samples
LONGEST = 2**24  # bytes of a sample

SIGNATURES = (  # how other files begin (in any case), what they are, the mend
    (b"\x1f\x8b", "gzip", "unpack it with gunzip"), (b"PK\x03\x04", "a zip archive (.zip, .npz)", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it with unzstd"), (b"BZh", "bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "packed by xz", "unpack it with unxz"), (b"PAR1", "Parquet", "write its rows as JSON lines"),
    (b"version https://git-lfs", "a Git LFS pointer", "get the file that it stands for with git lfs pull"),
    (b"<!doctype", "a web page (HTML)", "get the file itself"), (b"<html", "a web page (HTML)", "get the file itself"))


class JsonIndex:
    """The samples of one LLaVA file by number, each read from the disk when it is needed.

    path: a .json list or .jsonl lines, told apart by the first character, whatever the name. spans (samples, 2): the
    first byte of each sample and the byte after its last. Raises ValueError, one line, when the file is anything else
    or its list does not end with the file. Time is linear in the file's size, memory in the number of samples.
    """

    def __init__(self, path):
        self.path = Path(path)
        with mapped(self.path) as text:
            self.first = first_byte(text, self.path)
            self.is_list = text[self.first] == ord("[")
        stat = self.path.stat()
        version = [stat.st_size, stat.st_mtime_ns]
        file = self.path.with_name(self.path.name + ".index.npy")
        self.spans = self._load(file, version)
        if self.spans is None:
            self.spans = np.array(self._scan(), dtype=np.int64).reshape(-1, 2)
            if self._holds_objects():  # else it may be anything that starts with a bracket: leave no traces there
                _save(file, np.concatenate([[version], self.spans]))

    def _load(self, file, version):
        """The spans of an index file, memory-mapped; None where it is missing, broken or not of this file."""
        try:
            rows = np.load(file, mmap_mode="r")
            offsets = rows[1:].reshape(-1)
            fits = (rows.dtype == np.int64 and rows.shape[1:] == (2,) and rows[0].tolist() == version
                    and offsets[0] == self.first + self.is_list and offsets[-1] <= version[0]
                    and (offsets[:-1] <= offsets[1:]).all())
            with mapped(self.path) as text:  # the rest is looked at, too: once, indices ended with a file's first list
                return rows[1:] if fits and not NONBLANK.search(text, int(offsets[-1]) + self.is_list) else None
        except Exception:  # numpy raises nearly anything on a broken file
            return None

    def _scan(self):
        """The first byte and the last byte + 1 of each sample in turn, int64, from one pass over the file."""
        with mapped(self.path) as text:
            if self.is_list:
                return elements(text, self.first, self.path)
            spans, end = array("q"), self.first
            while line := NONBLANK.search(text, end):
                end = text.find(b"\n", line.start())
                if end < 0:  # the last line need not end in a newline
                    end = len(text)
                spans.extend((line.start(), end))
            return spans

    def _holds_objects(self):
        """Whether any of the first hundred samples is what a sample has to be. Huge ones are not looked at."""
        for i in range(min(len(self), 100)):
            try:
                if self[i]:
                    return True
            except SampleError:
                pass
        return False

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        """The dict of sample i. Raises SampleError."""
        start, end = self.spans[i].tolist()
        if end - start > LONGEST:
            raise SampleError("malformed line", f"{end - start:,} bytes are too many for one sample; take it out")
        with open(self.path, "rb") as file:
            file.seek(start)
            text = file.read(end - start)
        return parse_sample(text, start)


def parse_sample(text, start):
    """The dict of a JSON object. text: its bytes; start: where they stand in the file. Raises SampleError."""
    try:
        # Files that were joined may have marks within
        sample = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as e:
        raise SampleError("malformed line", f"byte {start + e.start} is not UTF-8; save the file as such") from None
    except KeyError as e:
        raise SampleError("malformed line", f"{e.args[0]}; leave one") from None
    except RecursionError:
        raise SampleError("malformed line", "nested too deeply to be a sample; take it out") from None
    except json.JSONDecodeError as e:
        raise SampleError("malformed line", f"not valid JSON ({e.msg}) at byte "
                          f"{start + len(e.doc[:e.pos].encode())}; mend it there") from None
    except ValueError:  # Python's own limit
        raise SampleError("malformed line", "a number of thousands of digits; write it as text") from None
    if not isinstance(sample, dict):
        raise SampleError("malformed line", f"{kind_of(sample)} instead of a JSON object; take it out")
    return sample


# --- the file as a whole --------------------------------------------------------------------------------------------

@contextmanager
def mapped(path):
    """The bytes of a file as a memory map. Raises ValueError when there are none."""
    path = Path(path)
    try:
        if path.is_dir():
            raise ValueError(f"{path}: a directory; give the training file that lies there")
        if not path.is_file():
            raise ValueError(f"{path}: no such training file; check the path")
        if not path.stat().st_size:
            raise ValueError(f"{path}: empty; a training file holds samples, a mixture has datasets")
        file = open(path, "rb")
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror.lower()}; check the path") from None
    with file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        yield text


def other_format(text):
    """What a file is that holds neither JSON nor YAML, and the mend, for people; None where that cannot be told.

    text: bytes or a memory map.
    """
    head = text[:512]
    encoding = json.detect_encoding(head)
    if encoding.startswith(("utf-16", "utf-32")):  # without a mark that may also be zeros in a binary file
        name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
        if name in ("UTF-16", "UTF-32") or head.decode(encoding, "ignore").lstrip()[:1] in ("[", "{"):
            return f"is {name}: convert it with iconv -f {name} -t UTF-8"
    head = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return next((f"is {name}, no training file: {mend}" for signature, name, mend in SIGNATURES
                 if head.startswith(signature.lower())), None)


def first_byte(text, path):
    """Where the list or the first object of a training file begins: after a byte order mark and blanks.

    text: its memory map. Raises ValueError, naming the file as what it is, where it holds neither.
    """
    if other := other_format(text):
        raise ValueError(f"{path} {other}")
    begin = NONBLANK.search(text, 3 if text[:3] == codecs.BOM_UTF8 else 0)
    if not begin:
        raise ValueError(f"{path}: blank, no samples; get it again")
    head = text[begin.start():begin.start() + 512]
    if begin[0] not in b"[{":
        what = "binary" if b"\0" in head else f"text that begins with {head[:24].decode(errors='ignore')!r}"
    elif head.split(b"\n")[0].strip() == b"{":
        what = "an object over several lines"
    else:
        return begin.start()
    raise ValueError(f"{path} is {what}, no training file: give a JSON list of samples, or one object a line")


def elements(text, first, path):
    """The first byte and the last byte + 1 of each element of a JSON list in turn, without making objects of them.

    text: bytes or a memory map. first: where the list begins. path: its file, for the message. Returns array("q").
    Raises ValueError when the list has no end, or something follows it.
    """
    spans, depth, start, after = array("q"), 0, first + 1, first
    while token := MARK.search(text, after):
        mark, at, after = token[0], token.start(), token.end()
        if mark == b'"':
            after = after_string(text, at)
        elif mark in b"[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"{path}: {DEEPEST:,} brackets are open at byte {at}; mend the file there")
        elif mark in b"]}":
            depth -= 1
        if depth == 0 and mark == b"}":
            raise ValueError(f"{path}: the list of samples is closed by a }} at byte {at}; mend it there")
        if depth == 0 or (depth == 1 and mark == b","):  # an element ends here
            if NONBLANK.search(text, start, at):  # an empty list has none
                spans.extend((start, at))
            start = after
        if depth == 0:
            if more := NONBLANK.search(text, after):
                raise ValueError(f"{path}: the list of samples ends at byte {after}, and more follows at byte "
                                 f"{more.start()}: give each list a file of its own, or make one list of them")
            return spans
    raise ValueError(f"{path}: the list of samples has no end; the file is cut off, get it again")


def after_string(text, at):
    """The byte after the JSON string that begins at byte `at`, or after the text, if the string has no end."""
    while (at := text.find(b'"', at + 1)) >= 0:
        backslash = at
        while text[backslash - 1] == ord("\\"):
            backslash -= 1
        if (at - backslash) % 2 == 0:  # each pair of them is one that is meant, a last one is for the quote
            return at + 1
    return len(text)


def _save(file, rows):
    """Writes an index file, where that is possible, and deletes what killed processes left of it."""
    try:
        with atomic(file) as beside, open(beside, "wb") as stream:  # np.save would add .npy to a mere name
            np.save(stream, rows)
    except ValueError as e:  # a read-only disk is no reason to stop
        print(f"{e}; the next run makes the index again", file=sys.stderr)
    for left in file.parent.glob(glob.escape(file.name) + ".*.writing"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            try:
                left.unlink(missing_ok=True)
            except OSError:  # somebody else's
                pass


def _is_running(pid):
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        pass
    return True


# --- values, for people ---------------------------------------------------------------------------------------------

def kind_of(value):
    """A value of a file as an error line shows it: a short one itself, in JSON; of others the kind."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    shown = json.dumps(value, default=str)
    return shown if len(shown) < 60 else f"{shown[:56]}..."


def flaw(text, path=False):
    """Why a text, or a path, of a file cannot be used; None for a good one."""
    half = next((c for c in text if "\ud800" <= c <= "\udfff"), None) if not text.isascii() else None
    if half:
        return f"holds half a character (\\u{ord(half):x}); write it anew"
    return "holds a NUL character; write it anew" if path and "\0" in text else None
