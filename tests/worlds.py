"""A small set of training data on the disk: images, and conversations of every kind about them."""
import json

import numpy as np

from tests import tiny

ANSWERS = "yes no red blue three".split()


def write(directory, n=24, seed=0):
    """data.json with n samples: text alone, one image, several, one and several turns. Returns its path."""
    rng, samples = np.random.default_rng(seed), []
    for k in range(5):
        tiny.image(int(rng.integers(20, 120)), int(rng.integers(20, 120)), k).save(directory / f"{k}.png")
    for i in range(n):
        names = [f"{k}.png" for k in rng.permutation(5)[:(0, 1, 1, 2, 3)[i % 5]]]
        turns = []
        for k in range(1 + i % 3):
            placeholders = "<image>\n" * (len(names) if k == 0 else 0)
            turns += [{"from": "human", "value": placeholders + f"question {rng.integers(99)}, number {k}?"},
                      {"from": "gpt", "value": str(rng.choice(ANSWERS))}]
        image = {} if not names else {"image": names[0] if len(names) == 1 and i % 2 else names}
        samples.append({"id": i, **image, "conversations": turns})
    path = directory / "data.json"
    path.write_text(json.dumps(samples, indent=1))
    return path
