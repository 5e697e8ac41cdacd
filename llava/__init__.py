"""Training files: LLaVA's JSON and JSONL, mixtures of them, and how a sample becomes a labelled prompt.

    python -m llava --check FILE | --show FILE [--index N] [--images DIR] [--model DIR]

FILE is a list of samples in JSON, or one sample a line (.jsonl), or a mixture of such files (.yaml or .json, see
mixtures.py). A sample:

    {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"] or absent,
     "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "A"}, ...]}

`system`, a text, beside them or a first turn from "system" replaces the usual system line. Other keys are not read, but
pictures under another key than `image` are an error, and so is an <image> without one: nothing is learned blind.

A file of any size stays on the disk (index.py). What is wrong with a sample is a data.SampleError, which training
counts, names and skips; nothing is ever put in a sample's place (samples.py). batches.py shares the samples of a step
out to the processes that train; it alone needs torch, and it is given its model.
"""
