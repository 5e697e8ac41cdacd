"""Training with many processes, as torchrun starts them: DDP, or FSDP2 where each has its share of the weights too.

Each rank's gradients are the mean over all ranks' targets, so that how many ranks there are changes nothing.
"""
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


class LossModule(nn.Module):
    """A model with its loss as one module's forward, which is what data parallelism wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, labels, sa):
        """The summed loss of a data.Batch with labels (B, Nt) in configuration sa."""
        return self.model.answer_loss(self.model(batch, sa), labels, batch.t_pos)


class Distributed:
    """The processes that torchrun has started, or this one alone."""

    def __init__(self, device):
        """device: of this process, as cli.placement gives it."""
        self.many = "WORLD_SIZE" in os.environ
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = torch.device(device)
        if self.many:
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, *numbers):
        """The sums of these numbers over all ranks."""
        if not self.many:
            return numbers
        x = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.tolist()

    def gather(self, thing):
        """Every rank's thing, in a list."""
        if not self.many:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def close(self):
        if self.many:
            dist.destroy_process_group()

    def wrap(self, model, fsdp):
        """(what to call for the loss, a function of whether this backward pass is the step's last: the context in
        which it runs). Gradients go between the ranks in the last one alone."""
        loss_module = LossModule(model)
        if fsdp:
            def sync(last):
                model.set_requires_gradient_sync(last)
                return nullcontext()
            return loss_module, sync
        if self.many:
            loss_module = nn.parallel.DistributedDataParallel(loss_module)
            return loss_module, lambda last: nullcontext() if last else loss_module.no_sync()
        return loss_module, lambda last: nullcontext()


def shard(model, bfloat16=False):
    """FSDP2: each rank keeps its part of every weight, gradient and optimiser state.

    bfloat16: of the arithmetic, by FSDP's own policy; under autocast the casted copies of gathered weights would stay
    for the whole step.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bfloat16 else None
    how = {"mp_policy": policy} if policy else {}
    for block in model.blocks():
        fully_shard(block, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "generate")  # it calls parts of the model without its forward
    return model


def full_tensor(x):
    """A tensor of which this rank may have a part alone."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
