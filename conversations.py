"""What training learns from files: each rank's samples of a step, in passes of a few; their faults; answers to look at.

`train.train` asks for `batches` and goes backward through `losses`, here as in quilts.py and router.Lessons.
"""
import json
from itertools import chain, count, islice, repeat

import numpy as np
import torch
from torch.utils.data import DataLoader

import data
import mixture
from learn import due


class Conversations:
    """Steps of a training file. Each rank has its share of a step's samples, and takes them a few at a time, those of
    about equal length together. Faults are counted, named in out/bad.jsonl and skipped."""

    def __init__(self, model, stage, samples, s, out, ranks):
        """s: a stage's settings."""
        self.model, self.stage, self.samples, self.s, self.ranks, self.out = model, stage, samples, s, ranks, out
        self.learner, self.last_one = ranks.spread(model, s["fsdp"])
        rows = map(json.loads, open(out / "bad.jsonl")) if (out / "bad.jsonl").exists() else ()
        self.bad = {row["number"]: row for row in rows if row["stage"] == stage}

    def batches(self, first):
        """This rank's samples of step after step, from step `first` on; worker processes read ahead."""
        s, r = self.s, self.ranks
        steps = count(first) if not s["overfit"] else (0 for _ in count())
        shares = (mixture.plan(len(self.samples), s["batch_size"], s["seed"], step)[r.rank::r.size] for step in steps)
        mine = len(range(r.rank, s["batch_size"], r.size))
        if not mine:
            yield from repeat([])
        # Workers hold the next step's samples ready, or 32 of them
        early = dict(prefetch_factor=2 + min(mine, 32) // s["workers"]) if s["workers"] else {}
        ahead = iter(DataLoader(Numbered(self.samples), batch_size=None, sampler=chain.from_iterable(shares),
                                num_workers=s["workers"], collate_fn=itself, **early))
        while True:
            yield list(islice(ahead, mine))

    def losses(self, items, sa, step):
        """The step's loss in parts, each to be taken backward before the next: together the mean over all labelled
        tokens of all ranks. Nothing, if there are none."""
        self.tokens = 0
        good = [(i, x) for i, x in items if not isinstance(x, data.Fault)]
        self.example, good = (good or [None])[0], sorted((x for _, x in good), key=lambda x: -x.prompt.end)
        most = -(-self.s["batch_size"] // self.ranks.size)  # all ranks go through equally many passes
        passes = [self.collate(good[i:i + self.s["pass_size"]]) for i in range(0, most, self.s["pass_size"])]
        learned = sum(int(due(labels, torch.from_numpy(batch.t_pos)).sum()) for batch, labels in passes)
        tokens = sum(x.prompt.end for x in good)
        learned, self.tokens, bad = map(int, self.ranks.total(learned, tokens, len(items) - len(good)))
        if bad:
            self.note([(i, x) for i, x in items if isinstance(x, data.Fault)], step)
        for k, (batch, labels) in enumerate(passes if learned else ()):
            with self.last_one(k == len(passes) - 1):  # the loop's backward runs in here
                yield self.learner(batch, labels, sa) * (self.ranks.size / learned)  # ranks' gradients are averaged

    def collate(self, samples):
        """(data.Batch, labels); of no samples at all, one token that is not learned. Without any picture a blank tile
        that nobody sees gives all weights their gradients, in stage 1 and on every rank."""
        samples = samples or [mixture.Sample(data.Prompt([0], [0], [], [], []), [-1], "")]
        batch = data.collate([x.prompt for x in samples])
        if not any(batch.pictures):
            batch = data.with_blank(batch, self.model.config)
        return batch, torch.from_numpy(data.pad([x.labels for x in samples], -1))

    def note(self, faults, step):
        """Writes new faults down. Raises ValueError when they are more than max_bad of what was read."""
        rows = [{"stage": self.stage, "step": step + 1, "number": i, "sample": self.samples.where(i), "kind": x.kind,
                 "message": str(x)} for i, x in faults]
        rows = [row for part in self.ranks.gather(rows) for row in part if row["number"] not in self.bad]
        self.bad |= {row["number"]: row for row in rows}
        if self.ranks.rank == 0:
            with open(self.out / "bad.jsonl", "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        broken = [row for row in self.bad.values() if row["kind"] != "too long"]
        read = min(max((step + 1) * self.s["batch_size"], 1000), len(self.samples))
        if len(broken) > self.s["max_bad"] * read:
            raise ValueError(f"{len(broken)} of {read:,} samples cannot be used, more than --max-bad "
                             f"{self.s['max_bad']:g}: mend them, or allow more; {self.out / 'bad.jsonl'} names all, "
                             f"the last is {broken[-1]['sample']}: {broken[-1]['message']}")

    def answer(self):
        """(question, the model's answer, the one to learn) of a sample of the last step, on every rank alike."""
        example = self.ranks.gather(self.example)[0]
        if example is None:
            return None
        number, sample = example
        _, turns, _ = self.samples.raw(number)
        p, place = sample.prompt, sample.prompt.asks[0]
        n, seen = sum(x < place for x in p.t_pos), sum(x < place for x in p.v_pos)
        sizes = np.cumsum([picture.tiling.tokens for picture in p.pictures])
        prompt = data.Prompt(p.ids[:n], p.t_pos[:n], p.v_pos[:seen], p.pictures[:int((sizes <= seen).sum())], [place])
        everything = max(self.model.config.viable or [range(self.model.config.layers)], key=len)
        said, = self.model.generate([prompt], everything, max_tokens=32)
        return turns[0].replace(data.IMAGE, "").strip(), self.model.tokenizer.decode(said), turns[1]


class Numbered:
    """Samples with their numbers, as worker processes hand them over."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return i, self.samples[i]


def itself(x):
    return x
