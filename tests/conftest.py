"""One thread a process: tests run in several processes at once (pytest -n 2), and bits depend on the threads."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser):
    group = parser.getgroup("fuzzing, tests/test_fuzz.py")
    group.addoption("--fuzz", type=int, metavar="N", help="about N inputs, over all kinds (default: 2,880)")
    group.addoption("--fuzz-only", metavar="KIND[:NUMBER]", help="one kind of input, or one input, alone")
