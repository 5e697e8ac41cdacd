"""One thread a process: tests run in several processes at once (pytest -n 2), and bits depend on the threads."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start, too

import torch  # noqa: E402

torch.set_num_threads(1)
