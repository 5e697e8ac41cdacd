"""Looks at training data before it is trained on: `--show` prints one sample, `--check` reads them all.

    python -m llava --show mix.yaml --images DIR --index 3
    python -m llava --check mix.yaml --images DIR --model MODEL
"""
import sys
from collections import Counter
from itertools import pairwise
from textwrap import wrap

import numpy as np
from tqdm import tqdm

import cli
import methods
from families import load_tokenizer, read_config
from llava.samples import KINDS, Samples
from pictures import SampleError

TARGET, OTHER = ("[[", "]]"), ("", "")  # what stands around the tokens of --show
GREEN, RED = ("\033[32m", "\033[0m"), ("\033[31m", "\033[0m")  # on a terminal


class TokenCounts:
    """(text tokens, visual tokens, targets) of each sample, or its SampleError: what worker processes send back."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        sample = self.samples[i]
        if isinstance(sample, SampleError):
            return sample
        return len(sample.prompt.ids), len(sample.prompt.v_pos), sum(label >= 0 for label in sample.labels)


def check(samples, workers):
    """Reads every sample once. Returns (a table as text: how many have which error, and where the first of each is; the
    number of those that have one)."""
    from torch.utils.data import DataLoader  # here, so that --help needs no torch
    loader = DataLoader(TokenCounts(samples), batch_size=16, num_workers=workers, collate_fn=list)
    results = [x for batch in tqdm(loader, desc="check", unit_scale=16, ncols=80) for x in batch]
    errors = [(i, x) for i, x in enumerate(results) if isinstance(x, SampleError)]
    good = np.array([x for x in results if not isinstance(x, SampleError)]).reshape(-1, 3)

    lines = [f"{len(results):,} samples: {len(good):,} can be learned from, {len(errors):,} cannot"]
    if len(good):
        lines.append(f"{(good[:, 1] == 0).sum():,} of them are text alone; tokens of a sample:")
        for name, x in zip(("text", "visual", "learned"), good.T):
            lines.append(f"  {name:8} median {int(np.median(x)):6,}, at most {x.max():6,}")
    counts = Counter(error.kind for _, error in errors)
    for kind in KINDS:
        if counts[kind]:
            i, error = next((i, error) for i, error in errors if error.kind == kind)
            lines.append(f"{counts[kind]:9,}  {kind}, for instance")
            lines += wrap(f"{samples.where(i)}: {error}", 79, initial_indent=" " * 11, subsequent_indent=" " * 11)
    return "\n".join(lines), len(errors)


def show(samples, i, colours):
    """Sample i as the model gets it, as text, with images where they stand: targets green and other tokens red, or,
    without colours, targets in [[...]]. Raises ValueError when it has an error.
    """
    sample = samples[i]
    if isinstance(sample, SampleError):
        raise ValueError(f"{samples.where(i)}: {sample}")
    prompt, is_target = sample.prompt, [label >= 0 for label in sample.labels]
    lines = [f"{samples.where(i)}:",
             f"{len(prompt.ids)} text tokens, {sum(is_target)} of them learned, {len(prompt.v_pos)} visual tokens"]

    # Tokens are decoded in runs, as one character may be several tokens. A run ends at an image or where colours change
    borders = [0, *(k for k in range(1, len(prompt.ids)) if is_target[k] != is_target[k - 1]
                    or prompt.t_pos[k] != prompt.t_pos[k - 1] + 1), len(prompt.ids)]
    text, position, images = "", 0, iter(prompt.images)

    def images_until(end):
        """The images that stand between `position` and the position `end`."""
        nonlocal text, position
        while position < end:
            tiling = next(images).tiling
            rows, columns = tiling.grid
            tiles = f"base tile and {rows} x {columns} tiles, " if tiling.canvas else ""
            text += f"[image: {tiles}{tiling.tokens} tokens]"
            position += tiling.tokens
    for start, stop in pairwise(borders):
        images_until(prompt.t_pos[start])
        decoded = samples.tokenizer.decode(prompt.ids[start:stop], skip_special_tokens=False)
        text += decoded.join((GREEN, RED, TARGET, OTHER)[2 * (not colours) + (not is_target[start])])
        position += stop - start
    images_until(prompt.end)
    return "\n".join([*lines, text])


def main(argv=None):
    p = cli.Parser(doc=__doc__, description="Training data: look at a sample, or check them all.")
    action = p.add_mutually_exclusive_group(required=True)
    action.add_argument("--show", metavar="FILE", help="a sample as the model gets it: learned tokens green, others "
                        "red; into a pipe or a file, learned ones in [[...]]")
    action.add_argument("--check", metavar="FILE", help="reads every sample once and counts what is wrong with them; "
                        "exit status 1 if anything is")
    p.add_argument("--index", type=int, default=0, metavar="N", help="which sample to show (default: 0)")
    p.add_argument("--images", metavar="DIR", help="where the images' paths start (default: where FILE is)")
    p.add_argument("--model", default=cli.NANO, metavar="DIR", help="checkpoint directory with the tokenizer and what "
                   "images become (default: nano)")
    methods.add_pixels(p)
    p.add_argument("--label-rule", default="assistant", choices=("assistant", "llava"), help="what is learned: answers "
                   "(default), or what LLaVA-OneVision learns, all markers and newlines too")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest sample, text and vision together")
    p.add_argument("--workers", type=int, default=cli.cores(), metavar="N", help="processes that read "
                   "(default: all cores)")
    args = p.parse_args(argv)
    model = cli.checkpoint_path(args.model)
    config = read_config(model)
    config.bound_pixels(args)
    samples = Samples(args.check if args.show is None else args.show, args.images, load_tokenizer(model), config,
                      args.label_rule, args.max_tokens)
    if args.check:
        table, errors = check(samples, args.workers)
        print(table)
        if errors:
            raise SystemExit(1)
    elif 0 <= args.index < len(samples):
        print(show(samples, args.index, colours=sys.stdout.isatty()))
    else:
        p.error(f"--index {args.index}: {args.show} has samples 0 to {len(samples) - 1}")


if __name__ == "__main__":
    cli.run(main)
