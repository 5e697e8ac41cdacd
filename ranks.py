"""Training with many processes, as torchrun starts them: DDP, or FSDP2 where each has its share of the weights too.

Each rank's gradients are the mean over all ranks' labelled tokens, so that how many there are changes nothing.
"""
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from learn import Learner


class Ranks:
    """The processes that torchrun has started, or this one alone."""

    def __init__(self, device):
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.many, self.rank, self.device = "WORLD_SIZE" in os.environ, int(os.environ.get("RANK", 0)), device
        if self.many:
            if device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def total(self, *numbers):
        """The sums of these numbers over all ranks."""
        if not self.many:
            return numbers
        x = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def gather(self, thing):
        """Every rank's thing, in a list."""
        things = [None] * self.size
        if not self.many:
            return [thing]
        dist.all_gather_object(things, thing)
        return things

    def leave(self):
        """At the end."""
        if self.many:
            dist.destroy_process_group()

    def spread(self, model, fsdp):
        """(what to call for the loss, a function of whether this backward is the step's last: the context to be in)."""
        learner = Learner(model)
        if fsdp:
            def last_one(last):
                model.set_requires_gradient_sync(last)
                return nullcontext()
            return learner, last_one
        if self.many:
            learner = nn.parallel.DistributedDataParallel(learner)
            return learner, lambda last: nullcontext() if last else learner.no_sync()
        return learner, lambda last: nullcontext()


def shard(model):
    """FSDP2: each rank keeps its part of every weight, gradient and optimiser state."""
    for block in model.blocks():
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")
    return model


def whole(x):
    """A tensor of which this rank may have a part alone."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
