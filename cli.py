"""What all commands share: parsing, how errors end, where the shipped miniature lies, reading JSON, writing
files whole.

Imports nothing of the project, and torch only in functions that need it: --help and flops.py answer at once.
"""
import argparse
import io
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

NANO = Path(__file__).parent / "nano"  # the shipped miniature; its dense model lies in NANO / "dense"


class Parser(argparse.ArgumentParser):
    """A command line of any script: bad input gives one line `error: ...` on stderr and exit status 2."""

    def error(self, message):
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def run(main):
    """Calls a script's main. A mistake in the input ends like one in the command line, without a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is written as an escape, never lost
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not any(x in str(e) for x in ("out of memory", "allocate memory")):
            raise  # not torch's way to say that there is too little, but a bug
        print(f"error: {' '.join(str(e).split()) or 'out of memory: give smaller images or fewer'}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def counted(n, what):
    """1 tile, 2 tiles, 1,000 tiles."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def checkpoint_path(name):
    """What --model means: `nano` is the shipped miniature unless a directory of that name is here."""
    return NANO if name == "nano" and not Path("nano/config.json").is_file() else name


def read_json(path, kind=dict, mend="get it again"):
    """What a JSON file holds, in UTF-8, 16 or 32, with or without a byte order mark. Raises ValueError, one line, if it
    is missing, no JSON, nested too deeply, or no `kind` (dict or list); mend: what the line advises."""
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror.lower()}; {mend}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; {mend}") from None
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); {mend}") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: not a JSON {'object' if kind is dict else kind.__name__}; {mend}")
    return found


@contextmanager
def atomic(path):
    """Gives a path beside `path` to write a file or a directory to, and renames it into place when all is written.

    A process that is killed or fails in between leaves *.writing behind and the old content as it was. Into a directory
    that exists the files are moved one by one.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    yield beside
    if path.is_dir():
        for file in beside.iterdir():
            os.replace(file, path / file.name)
        beside.rmdir()
    else:
        os.replace(beside, path)


def remove_unfinished(directory):
    """Deletes what `atomic` left in a directory when its process was killed."""
    for path in Path(directory).glob("*.writing"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def placement(device, dtype):
    """(device, torch dtype) for --device and --dtype; says on stderr what "auto" became and why. Raises ValueError."""
    import torch
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: each process has a device of its own
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # before anything touches a device, or the first one holds memory too
        torch.zeros(1, device=device).item()
    except Exception as e:  # torch raises its own kinds, one for each backend
        raise ValueError(f"--device {device}: not available here ({str(e).splitlines()[0]})") from None
    if dtype == "auto":
        bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if bf16 else "float16" if device.startswith("cuda") else "float32"
        print(f"{dtype}: the fastest that is safe on {device}", file=sys.stderr)
    return device, getattr(torch, dtype)


@contextmanager
def timer(timings, name, device, out_of=None):
    """Adds a code block's seconds to timings[name], and takes them from timings[out_of]; without a dict nothing."""
    if timings is None:
        return (yield)
    import torch
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    yield
    wait()
    spent = time.perf_counter() - start
    timings[name] = timings.get(name, 0.0) + spent
    if out_of:
        timings[out_of] = timings.get(out_of, 0.0) - spent
