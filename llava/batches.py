"""Batches of training files: each process's samples of a step, in micro-batches; the errors of samples; answers shown.

train.py goes through `batches` step by step and backward through each of `losses`, as with the batches of the
miniature and of the router. The model and the processes that train together are given, not imported.
"""
from collections import Counter
from itertools import chain, count, islice, repeat

import numpy as np
from torch.utils.data import DataLoader

import data
from cli import append_rows, die_with_parent, read_rows
from config import Plan
from llava.samples import Sample, step_indices
from methods import for_step
from pictures import SampleError


class ConversationBatches:
    """The steps of a stage on a training file. Each rank has its share of a step's samples, and runs them in
    micro-batches of about equal length. Samples with errors are counted, named in out/bad.jsonl and skipped.

    model: the VLM. stage: 0, 1 or 2. samples: llava.samples.Samples. settings: dict of a stage's batch_size (samples
    per step, all ranks), micro_batch_size, seed, workers, overfit, max_bad (share of samples) and fsdp. out: Path of
    the run's directory. distributed: parallel.Distributed.
    """

    def __init__(self, model, stage, samples, settings, out, distributed):
        self.model, self.stage, self.samples, self.settings = model, stage, samples, settings
        self.out, self.distributed = out, distributed
        self.loss_module, self.sync_context = distributed.wrap(model, settings["fsdp"])
        self.tokens = 0      # text and vision of the last step, all ranks
        self.example = None  # index of a sample of the last step: the first of this rank that has no error
        self.empty = 0       # steps in a row, up to now, from which nothing could be learned
        rows = [row for _, row in read_rows(out / "bad.jsonl", stage=int, number=int, kind=str)]
        self.bad = {row["number"]: row for row in rows if row["stage"] == stage}  # index -> row of bad.jsonl

    def plan(self, step):
        """The Plan of a step: one that the model is to be trained for, drawn uniformly (paper 4.2.3). Deterministic:
        it depends only on (seed, step). Stage 0 trains the dense model."""
        if self.stage == 0:
            return Plan(tuple(range(self.model.config.layers)))
        plans = self.model.config.plans
        return plans[np.random.default_rng((self.settings["seed"], step)).integers(len(plans))]

    def batches(self, first):
        """Yields for step after step, from step `first` on, this rank's [(index, Sample or SampleError)].

        Worker processes read ahead. With the setting overfit every step is step 0.
        """
        s, rank, size = self.settings, self.distributed.rank, self.distributed.size
        self.most_empty = min(10, s["steps"] - first)
        per_step = len(range(rank, s["batch_size"], size))
        if not per_step:  # more ranks than samples
            yield from repeat([])
        steps = repeat(0) if s["overfit"] else count(first)
        shares = ([(i, step) for i in step_indices(len(self.samples), s["batch_size"], s["seed"], step)[rank::size]]
                  for step in steps)
        read_ahead = {}
        if s["workers"]:  # together they hold the samples of the next step ready, but at most about 32
            read_ahead["prefetch_factor"] = 2 + min(per_step, 32) // s["workers"]
        loader = DataLoader(Numbered(self.samples, s["seed"]), batch_size=None, sampler=chain.from_iterable(shares),
                            num_workers=s["workers"], collate_fn=identity, worker_init_fn=die_with_parent,
                            **read_ahead)
        items = iter(loader)
        while True:
            yield list(islice(items, per_step))

    def losses(self, items, plan, step):
        """Yields the losses of a step's micro-batches, scalar tensors; each has to be taken backward before the next.

        Their sum over all ranks, divided by the number of ranks, is the mean over all targets of all ranks. Yields
        nothing if there is nothing to learn: no targets, or in stage 1, where cross-attentions alone are trained, no
        image. items: of `batches`. plan: the step's. Raises ValueError when too many samples have errors, or when
        nothing could be learned for ten steps, or in the whole run.
        """
        s = self.settings
        good = [(i, x) for i, x in items if not isinstance(x, SampleError)]
        bad = [(i, x) for i, x in items if isinstance(x, SampleError)]
        self.example = good[0][0] if good else None
        # Longest first: samples of about equal length share a micro-batch, so that little of it is padding
        c = for_step(self.model.config, s["seed"], step)
        samples = [x._replace(prompt=data.seen(x.prompt, plan.pixels, c)) for _, x in good]
        samples.sort(key=lambda x: -x.prompt.end)
        largest_share = -(-s["batch_size"] // self.distributed.size)  # all ranks run equally many micro-batches
        micro_batches = [self.collate(samples[i:i + s["micro_batch_size"]])
                         for i in range(0, largest_share, s["micro_batch_size"])]
        targets = sum(int(data.target_mask(labels, batch.t_pos).sum()) for batch, labels in micro_batches)
        tokens, images = sum(x.prompt.end for x in samples), sum(len(x.prompt.images) for x in samples)
        targets, self.tokens, errors, images = map(int, self.distributed.sum(targets, tokens, len(bad), images))
        if errors:  # of any rank: all of them gather
            self.record_errors(bad, step)
        if not targets or self.stage == 1 and not images:
            self.empty += 1
            if self.empty == self.most_empty:
                raise ValueError(self.why_empty(targets))
            return
        self.empty = 0
        for k, (batch, labels) in enumerate(micro_batches):
            with self.sync_context(k == len(micro_batches) - 1):  # the loop's backward runs in here
                # Data parallelism averages the gradients of ranks, hence the factor
                yield self.loss_module(batch, labels, plan.sa) * (self.distributed.size / targets)

    def why_empty(self, targets):
        """What is wrong with samples from which nothing can be learned, for the error line."""
        if targets:
            return (f"nothing to learn in {self.empty} steps: no sample has an image, and stage 1 trains how text "
                    "looks at images; give a file with images, or go on with --stage 2")
        kinds = Counter(row["kind"] for row in self.bad.values()).most_common(1)
        why = f"most are: {kinds[0][0]}; {self.out / 'bad.jsonl'} names them" if kinds else "no answer is in them"
        return (f"nothing to learn in {self.empty} steps ({why}); look at them with python -m llava --check, or allow "
                "more with --max-tokens")

    def collate(self, samples):
        """(data.Batch, labels (B, Nt) int64, -1 no target) of Samples; of none, one token that is no target.

        Without any image a blank tile, which no token attends to, gives every weight a gradient: in stage 1, and on
        every rank.
        """
        samples = samples or [Sample(data.Prompt([0], [0], [], [], []), [-1], "")]
        batch = data.collate([x.prompt for x in samples])
        if not any(batch.images):
            batch = data.with_blank(batch, self.model.config)
        return batch, data.pad([x.labels for x in samples], -1)

    def record_errors(self, errors, step):
        """Adds new errors, [(index, SampleError)] of this rank, to out/bad.jsonl; all ranks call it.

        Raises ValueError when they are more than the share max_bad of the samples read so far (of a thousand in the
        beginning; of all where there are fewer). Those that are too long do not count: they are no mistake in the data.
        """
        rows = [{"stage": self.stage, "step": step + 1, "number": i, "sample": self.samples.where(i), "kind": x.kind,
                 "message": str(x)} for i, x in errors]
        rows = [row for of_rank in self.distributed.gather(rows) for row in of_rank if row["number"] not in self.bad]
        self.bad |= {row["number"]: row for row in rows}
        if self.distributed.rank == 0:
            append_rows(self.out / "bad.jsonl", rows)
        broken = [row for row in self.bad.values() if row["kind"] != "too long"]
        max_bad = self.settings["max_bad"]
        read = min(max((step + 1) * self.settings["batch_size"], 1000), len(self.samples),
                   self.settings["steps"] * self.settings["batch_size"])
        if len(broken) > max_bad * read:
            raise ValueError(f"{len(broken)} of {read:,} samples cannot be used, more than --max-bad {max_bad:g}: "
                             f"mend them, or allow more; {self.out / 'bad.jsonl'} names all, the last is "
                             f"{broken[-1]['sample']}: {broken[-1]['message']}")

    def show_answer(self):
        """(question, the model's answer, the answer to learn) of a sample of the last step; None without one.

        All ranks call it, and get the same. The answer is of the largest viable configuration.
        """
        index = self.distributed.gather(self.example)[0]
        if index is None:
            return None
        sample = self.samples[index]
        _, turns, _ = self.samples.raw(index)
        whole, start = sample.prompt, sample.prompt.answer_starts[0]
        nt = sum(position < start for position in whole.t_pos)  # text tokens up to the first answer
        nv = sum(position < start for position in whole.v_pos)
        images = whole.images[:len(set(whole.v_img[:nv]))]
        prompt = data.Prompt(whole.ids[:nt], whole.t_pos[:nt], whole.v_pos[:nv], whole.v_img[:nv], images, [start])
        largest = max(self.model.config.viable or [tuple(range(self.model.config.layers))], key=len)
        answer, = self.model.generate([prompt], largest, max_tokens=32)
        return turns[0].replace(data.IMAGE, "").strip(), self.model.tokenizer.decode(answer), turns[1]


class Numbered:
    """Samples of steps with their indices, as worker processes hand them over."""

    def __init__(self, samples, seed):
        self.samples, self.seed = samples, seed

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, which):
        i, step = which
        return i, self.samples.at(i, for_step(self.samples.config, self.seed, step))


def identity(x):
    """Leaves a sample as it is; DataLoader's own function would make tensors of its arrays."""
    return x
