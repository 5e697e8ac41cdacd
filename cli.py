"""What all commands share: parsing, how errors end, where the shipped miniature lies, reading JSON, writing
files whole.

Imports nothing of the project, and torch only in functions that need it: --help and flops.py answer at once.
"""
import argparse
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

NANO = Path(__file__).parent / "nano"  # the shipped miniature; its dense model lies in NANO / "dense"


def program(path):
    """What starts a script at a path: its name, for paper/bench.py python -m paper.bench."""
    inside = path.parent.name if path.parent.resolve().parent == Path(__file__).parent.resolve() else ""
    return f"python -m {inside}.{path.stem}".removesuffix(".__main__") if inside else path.name


class Parser(argparse.ArgumentParser):
    """A command line of any script: bad input gives one line `error: ...` on stderr and exit status 2."""

    def __init__(self, doc="", **how):
        """doc: the script's docstring, whose indented lines are the examples at the end of --help."""
        super().__init__(prog=program(Path(sys.argv[0])), **how)
        self.examples = [line.strip() for line in doc.splitlines() if re.match(r" {4}\S", line)]

    def format_help(self):
        wrapped = [textwrap.fill(line, 80, initial_indent="  ", subsequent_indent=" " * 6, break_long_words=False,
                                 break_on_hyphens=False) for line in self.examples]
        return super().format_help() + "\n".join(["\nexamples:", *wrapped, ""] * bool(wrapped))

    def error(self, message):
        message = " ".join(message.split())
        message = message if len(message) < 400 else f"{message[:300]} ... {message[-60:]}"
        print(f"error: {message}{' blank ones' * message.endswith('unrecognized arguments:')}", file=sys.stderr)
        raise SystemExit(2)

    def add_placement(self, dtype="auto"):
        """--device and --dtype, for `placement`. dtype: the default."""
        self.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
        self.add_argument("--dtype", default=dtype, choices=("auto", "float32", "bfloat16", "float16"),
                          help="(default: auto: bfloat16 on CUDA and where a processor has AMX tiles, else float32)"
                          if dtype == "auto" else f"(default: {dtype})")


class Unfailing:
    """A stream that drops what it cannot write: that nobody listens any more is no reason to end a training."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            pass


def run(main):
    """Calls a script's main. A mistake in the input ends like one in the command line, without a traceback."""
    keep_freed_memory()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is written as an escape, never lost
            stream.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = Unfailing(sys.stderr)
    try:
        main()
        with writing("stdout"):
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not is_out_of_memory(e):
            raise  # a bug
        said = str(e)
        if isinstance(e, OSError) and e.strerror:  # files say their names; what has none is what is printed to
            said = f"{e.filename or 'stdout'}: {e.strerror.lower()}"
        print(f"error: {' '.join(said.split()) or 'out of memory: give smaller images or fewer'}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def is_out_of_memory(e):
    """Whether an exception is Python's or torch's way to say that there is too little memory."""
    return isinstance(e, MemoryError) or any(x in str(e) for x in ("out of memory", "allocate memory"))


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
        found = json.loads(Path(path).read_bytes(), object_pairs_hook=unique_keys)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror.lower()}; {mend}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; {mend}") from None
    except (json.JSONDecodeError, KeyError) as e:
        raise ValueError(f"{path}: not valid JSON ({e.args[0]}); {mend}") from None
    except ValueError:  # bytes that are no text, a number of thousands of digits
        raise ValueError(f"{path}: not valid JSON; {mend}") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path}: not a JSON {'object' if kind is dict else kind.__name__}; {mend}")
    return found


def read_rows(file, **types):
    """[(line, row)] of a .jsonl file of the run, without lines that are damaged or cut off: they must not keep a run
    from going on. types: what a row has at least, as step=int."""
    found = []
    for line in open(file, errors="replace") if Path(file).is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith("\n") and isinstance(row, dict) and all(type(row.get(k)) is t for k, t in types.items()):
            found.append((line, row))
    return found


def append_rows(file, rows):
    """Adds dicts to a .jsonl file; a line that is cut off by a failure, read_rows passes over. Raises ValueError."""
    with writing(file), open(file, "a") as f:
        f.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def unique_keys(pairs):
    """A JSON object of its pairs. Raises KeyError where a key stands twice: Python would take the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyError(f"the key {next(key for key in keys if keys.count(key) > 1)[:60]!r} stands twice")
    return found


class Unwritable(ValueError):
    """A file that could not be written."""


@contextmanager
def writing(path):
    """Names a file that could not be written, as an error of the disk does not always. Raises Unwritable."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        if e.filename not in (None, str(path)) and not str(e.filename).startswith(f"{path}."):
            raise  # about another file
        name = re.sub(r"(\.\d+\.writing)+$", "", str(path))  # what it is to become
        raise Unwritable(f"{name}: cannot be written ({(e.strerror or str(e)).lower()}); make room or name another "
                         "place") from None


@contextmanager
def atomic(path):
    """Gives a path beside `path` to write a file or a directory to, and renames it into place when all is written.

    A process that fails in between leaves the old content as it was; one that is killed also a *.writing. Into a
    directory that exists the files are moved one by one. Raises ValueError where the disk is full.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    try:
        with writing(path):
            yield beside
            if path.is_dir():
                for file in beside.iterdir():
                    os.replace(file, path / file.name)
                beside.rmdir()
            else:
                os.replace(beside, path)
    except BaseException:
        remove(beside)
        raise


def remove(path):
    """Deletes a file or a directory, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_unfinished(directory):
    """Deletes what `atomic` left in a directory when its process was killed."""
    for path in Path(directory).glob("*.writing"):
        remove(path)


@contextmanager
def signals(handler):
    """Within, Ctrl-C and SIGTERM (of a scheduler) call handler(number, frame)."""
    heard = [x for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(x) != signal.SIG_IGN]
    before = {x: signal.signal(x, handler) for x in heard}  # nohup ignores the last
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


@contextmanager
def interrupts():
    """Within, Ctrl-C and SIGTERM only add to the list that it gives: no step is left half done."""
    asked = []
    with signals(lambda number, _: asked.append(number)):
        yield asked


def leave(number, _):
    """A handler for `signals`: ends the process at once, with the status that tells the signal."""
    raise SystemExit(128 + number)


def cores():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def free_threads():
    """As many threads as this process's share of the cores that nothing else keeps busy, as torch would start them; at
    least one. On a machine where all cores are busy two threads wait for one another: 7 times slower than one alone.
    """
    import torch
    idle = cores()
    try:
        before = cpu_times()
        time.sleep(0.3)
        ticks = [b - a for a, b in zip(before, cpu_times())]
        idle = min(idle, round(os.cpu_count() * sum(ticks[3:5]) / sum(ticks)))  # of user, nice, system, idle, iowait
    except (OSError, ValueError, ZeroDivisionError):
        pass                                                                    # no Linux
    return max(1, min(torch.get_num_threads(), idle // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def cpu_times():
    """What all cores together have done since the start, in ticks."""
    return [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]


def die_with_parent(*_):
    """Of a worker process: it ends when the process that reads from it does, however that comes about (Linux)."""
    if sys.platform == "linux":
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def keep_freed_memory():
    """Has the C library keep what is freed. Else large tensors go back to the system each time, and come back page by
    page: a RMSNorm of 3,699 x 896 takes 48 ms instead of 5, a prefill a tenth to a fifth more (Linux, glibc)."""
    if sys.platform == "linux":
        import ctypes
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        mallopt(-4, 0)                # M_MMAP_MAX: no mappings of their own for large blocks
        mallopt(-1, (1 << 31) - 1)    # M_TRIM_THRESHOLD: nothing goes back before 2 GB are free at the end


def placement(device):
    """The device that --device means; sets CUDA's. Raises ValueError."""
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
    return device


def choose_dtype(dtype, device, parameters):
    """(torch dtype, why it is that one) for --dtype, of a model with so many parameters.

    "auto" is bfloat16 where its products are fast, CUDA devices that have it and processors with AMX tiles (there not
    for a miniature, which is bound by other things); else float32. It is told by the hardware's name and never by a
    timing, so that answers do not depend on the load; and never float16, as Qwen2's activations pass 65,504.
    """
    import torch
    if dtype != "auto":
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype, ""
    if str(device).startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        why = "the device has it" if fast else "the device has no bfloat16"
    elif str(device) == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        fast = parameters > 20e6
        why = "the processor has AMX tiles" if fast else "a miniature is no faster in bfloat16"
    else:
        fast, why = False, "bfloat16 is for CUDA devices that have it and processors with AMX tiles"
    return torch.bfloat16 if fast else torch.float32, why


def not_finite(what, dtype):
    """The error for `what` (a loss, an output) in a torch dtype, whose numbers are not all finite."""
    mend = ("float16 ends at 65,504: give --dtype bfloat16 or float32" if str(dtype) == "torch.float16" else
            "the weights are broken; get them again, or take an earlier checkpoint")
    return ValueError(f"{what} is not finite: {mend}")


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
