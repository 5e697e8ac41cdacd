"""What the fuzz tests run inputs in: a forked process that tells a fault from a result and from a line for people.

The process has a limit on memory and an alarm, so that nothing that hangs, fills the memory or kills its process ends
the run: its parent notes the input and starts another process with the next one.
"""
import contextlib
import io
import json
import os
import random
import re
import resource
import select
import signal
import traceback
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 10  # of the processor, after which a call hangs


class Kind(NamedTuple):
    originals: Callable   # () -> inputs as they should be
    change: Callable      # (random.Random, original) -> input
    run: Callable         # (input); raises what is wrong with it
    names: tuple = ()     # a message has one of them, or a flag; of a command line one of its words
    count: int = 100      # inputs in the ordinary run
    megabytes: int = 100  # that it may take beyond twice what an original takes

    def make(self, number):
        originals = self.originals()
        if number < len(originals):
            return originals[number]
        rng = random.Random(number)
        return self.change(rng, rng.choice(originals))


@contextlib.contextmanager
def quiet():
    """Gives what the block writes to stdout and stderr, which take the characters that the true ones take."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield err


# --- what is a fault ------------------------------------------------------------------------------------------------

PYTHON = re.compile(  # how Python and its libraries say things
    r"values to unpack|object is not|object cannot be|object does not|not iterable|has no attribute|"
    r"has no len|unhashable|'NoneType'|<class '|invalid literal for|could not convert|must be real|"
    r"must be str|cannot convert float|cannot be interpreted|not supported between|unsupported operand|"
    r"argument of type|a bytes-like|index out of range|indices must be|division by zero|too large to convert|"
    r"too large for|overflow|positional argument|unexpected keyword|recursion depth|embedded null|"
    r"codec can't|surrogates not allowed|Exceeds the limit|Traceback|expected string or bytes|expected str\b|"
    r"[A-Z]\w+Error\b")


class Fault(Exception):
    """What is wrong with the way in which an input was received."""


class Hang(BaseException):
    """Raised by the alarm."""


def check_line(message, names):
    """Raises Fault where a message is not one line for people that names one of `names` or a flag."""
    if "\n" in message:
        raise Fault(f"more than one line: {message!r}")
    if found := PYTHON.search(message):
        raise Fault(f"bare Python ({found[0]}): {message!r}")
    named = re.search(r"--[a-z]|^unrecognized arguments", message)
    if not named and not any(name and name in message for name in names):
        raise Fault(f"names no file, flag or field: {message!r}")


def receive(kind, x, welcome=False):
    """Runs one input. Raises Fault, or whatever goes wrong, where it ends otherwise than it may. welcome: it is as it
    should be, and may not be refused at all."""
    names = kind.names or [" ".join(word.encode("utf-8", "backslashreplace").decode().split()) for word in x]
    with quiet() as err, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            kind.run(x)
        except (ValueError, OSError) as e:
            if welcome:
                raise
            check_line(str(e), names)
        except SystemExit as e:
            if welcome or e.code not in (0, 2):
                raise
            err.flush()
            printed = err.buffer.getvalue().decode().removesuffix("\n").split("\n")
            if e.code == 2:
                if [i for i, line in enumerate(printed) if line.startswith("error: ")] != [len(printed) - 1]:
                    raise Fault(f"not one line of error: {printed}")
                check_line(printed[-1][7:], names)
    for x in warned:
        if not issubclass(x.category, (DeprecationWarning, ResourceWarning)):
            raise Fault(f"a warning of {Path(x.filename).name}: {x.message}")


def resident(field):
    """Megabytes of this process's memory: VmRSS now, VmHWM at most. 0 where the system does not say."""
    try:
        return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024
    except OSError:
        return 0


def measure(kind, x, seconds, welcome=False):
    """(None or (what, where, traceback) of a fault, megabytes that it took at most)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, fault = resident("VmRSS"), None
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        receive(kind, x, welcome)
        signal.setitimer(signal.ITIMER_PROF, 0)
    except BaseException as e:  # Rust's panics are no Exceptions
        signal.setitimer(signal.ITIMER_PROF, 0)
        cause = e
        while isinstance(cause, (Fault, SystemExit)) and cause.__context__:
            cause = cause.__context__
        frames = traceback.extract_tb(cause.__traceback__)
        ours = [f for f in frames if Path(f.filename).parent in (ROOT, ROOT / "llava", ROOT / "toy")]
        where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else ""
        kept = "".join(traceback.format_exception(cause)[-12:])
        fault = f"{type(e).__name__}: {str(e)[:300]}", where, kept[-4000:]
    return fault, resident("VmHWM") - before


# --- the run --------------------------------------------------------------------------------------------------------

def work(kind, numbers, seconds, directory, pipe):
    """The forked process: writes a line to the pipe when it is ready, then the fault of each input, or null."""
    def say(x):
        os.write(pipe, json.dumps(x).encode() + b"\n")

    def hang(*_):
        raise Hang(f"more than {seconds} s")
    signal.signal(signal.SIGPROF, hang)
    resource.setrlimit(resource.RLIMIT_AS, ((int(resident("VmSize")) + 6000) << 20,) * 2)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries write there
    os.chdir(directory)
    originals = kind.originals()
    usual = max(measure(kind, x, seconds)[1] for x in originals)
    say("ready")
    for number in numbers:
        x = kind.make(number)
        fault, megabytes = measure(kind, x, seconds, welcome=number < len(originals))
        if not fault and megabytes > 2 * usual + kind.megabytes:
            fault = "Fault: memory", "", f"{megabytes:.0f} MB, an input as it should be takes {usual:.0f} MB"
        say(fault)


def replies(pipe, seconds):
    """Yields each line of a pipe, read as JSON. Raises Hang when none comes in five times `seconds`."""
    text, wait = b"", 100  # until the first
    while select.select([pipe], [], [], wait)[0]:
        if not (new := os.read(pipe, 4096)):
            return
        *lines, text = (text + new).split(b"\n")
        yield from map(json.loads, lines)
        wait = 5 * seconds
    raise Hang


def faults(kind, numbers, directory, seconds=SECONDS):
    """[(number, (what, where, traceback))] of the inputs of a kind that are received badly. They run in `directory`."""
    kind.originals()  # what they need is made before the fork
    numbers, found = list(numbers), []
    while numbers:
        read, write = os.pipe()
        if not (pid := os.fork()):
            try:
                work(kind, numbers, seconds, directory, write)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(write)
        said, ready, hung = replies(read, seconds), None, False
        try:
            ready = next(said, None)
            for fault in said:
                number = numbers.pop(0)
                found += [(number, fault)] if fault else []
        except Hang:
            hung = True
            os.kill(pid, signal.SIGKILL)
        os.close(read)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ready, "the inputs as they should be end the process"
        if status:
            what = f"Hang: more than {seconds} s, not to be interrupted" if hung else f"Fault: exit status {status}"
            found.append((numbers.pop(0), (what, "", "")))
    return found


def short(x, n=2000):
    x = x if isinstance(x, str) else repr(x)
    return x if len(x) <= n else f"{x[:n // 2]} ... {x[-n // 2:]} ({len(x):,} characters)"


def distinct(kind, found):
    """One of each kind of fault, that with the shortest input: [(how many, number, input, fault)]."""
    groups = {}
    for number, fault in found:
        what, where, _ = fault
        reason = re.sub(r"['\"\d].*", "", what)
        groups.setdefault((reason[:60], where), []).append((number, kind.make(number), fault))
    return [(len(group), *min(group, key=lambda x: len(repr(x[1])))) for group in groups.values()]
