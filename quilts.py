"""The miniature's lessons: batches of conversations about toy.py's quilts, their loss, and a model with random weights.

train.py runs them in its loop as it runs anyone's data. Only stage 0 has the auxiliary loss, on what visual tokens say.
"""
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

import data
import toy
from learn import answer_loss, due
from model import VLM


def word_loss(model, v, truth):
    """Lets the visual tokens of a quilt's cells, v (B, cells, d), say the words that are true of them.

    The output head reads each visual token as it reads text, and a sigmoid for each word is to be 1 for true (B, cells,
    vocab) and 0 for others: several labels at once, or a relation would erase the token's own sign. This stands in for
    what a large model's pretraining brings along, and belongs to stage 0.
    """
    z = model.head(model.language_model.norm(v)) - 4  # as few words are true, the start is that none is
    return F.binary_cross_entropy_with_logits(z, truth, reduction="sum") / truth.sum()


class Quilts:
    """Batches of conversations about toy.py's quilts; batch i is the same whenever it is asked for."""

    def __init__(self, model, seed, batch_size, turns=10, words=0.0, rest_from=0):
        self.model, self.seed, self.batch_size, self.turns = model, seed, batch_size, turns
        self.words, self.rest_from = words, rest_from
        self.vocabulary = model.tokenizer.get_vocab()

    def __getitem__(self, i):
        """(data.Batch, labels (B, Nt), the quilts)."""
        quilts, prompts, labels = [], [], []
        for j in range(self.batch_size):
            rng, short = np.random.default_rng((toy.TRAIN, self.seed, i, j)), j % 2
            image, quilt, asked = toy.conversation(rng, self.turns * (1 + 2 * short))
            if short:
                pieces = toy.caption(asked)
            else:
                turns = [words for _, question, answer in asked for words in (question, answer)]
                pieces = data.turns_to_learn([data.place_images(turns[0], 1), *turns[1:]])
            prompt, learned = data.labelled(pieces, self.model.tokenizer, [data.picture(image, self.model.config)])
            quilts.append(quilt)
            prompts.append(prompt)
            labels.append(learned)
        return data.collate(prompts), torch.from_numpy(data.pad(labels, -1)), quilts

    def batches(self, first):
        """Batch after batch, from number `first` on."""
        return map(self.__getitem__, count(first))

    def losses(self, item, sa, step):
        """The loss of one batch in configuration sa; the loop takes several, this is one.

        words: the weight of what visual tokens say, stage 0's auxiliary loss. The pictures run once more, without the
        questions: the connector's output is to say the words of level 0, and what the first, second, third
        self-attention candidate makes of it those of level 1, 2, 3. Meanwhile visual tokens rest in each other layer
        with probability 1/2 (stochastic depth, Huang et al. 2016), and from step rest_from on, every other time, in all
        of them. From then on something like it goes for the questions too: a share of the layers is drawn, and of those
        in it the ones that will have no attention to vision in VISOR run on text alone; in those that will have a
        cross-attention visual tokens rest. What a layer has learned is not to depend on all those before it, and text
        is not to look at the picture everywhere: large models are like this by themselves (paper, section 3).
        """
        batch, labels, pictures = item
        model, rng, n = self.model, np.random.default_rng((self.seed, step)), self.model.config.layers
        t, v, t_pos, v_pos = model.embed(batch)
        tired, late = (), step >= self.rest_from
        if self.words and late:
            drawn = [l for l, x in enumerate(rng.random(n) < rng.random()) if x and l not in toy.SA]
            sa, tired = [l for l in sa if l not in drawn or l in toy.CA], [l for l in drawn if l in toy.CA]
        h = model.language_model(t, v, t_pos, v_pos, tuple(sa), rest=tired)
        labels = labels.to(v.device)
        loss = answer_loss(model, h, labels, t_pos) / due(labels, t_pos).sum()
        if self.words:
            states, truth = {-1: v}, torch.zeros((), device=v.device)
            share = rng.choice([0.5, 1.0]) if late else 0.5
            tired = [l for l, x in enumerate(rng.random(n) < share) if x and l not in toy.SA]
            model.language_model(t[:, :2], v, t_pos[:, :2], v_pos, range(n), states=states, rest=tired)  # 2 before it
            for level, l in enumerate((-1, *toy.SA)):
                truth = truth.maximum(self.truth(pictures, level).to(v.device))
                loss = loss + self.words * word_loss(model, states[l][:, toy.PANEL_TOKENS + toy.CELL_TOKENS], truth)
        yield loss

    def truth(self, quilts, level):
        """(B, 40, vocab) 1 for each word that becomes true of a panel or a cell at this level."""
        n = len(toy.PANEL_TOKENS + toy.CELL_TOKENS)
        truth = np.zeros((len(quilts) * n, self.model.config.vocab), dtype=np.float32)
        said = [words for quilt in quilts for words in toy.words(quilt, level)]
        cells = [i for i, words in enumerate(said) for _ in words]
        truth[cells, [self.vocabulary[w] for words in said for w in words]] = 1
        return torch.from_numpy(truth).unflatten(0, (-1, n))


def fresh(seed):
    """A miniature with random weights, of a scale at which every part gets a gradient from the first step on."""
    torch.manual_seed(seed)
    model = VLM(toy.config())
    model.tokenizer = toy.tokenizer()
    c = model.config
    with torch.no_grad():
        for label, p in model.named_parameters():
            if "embed_tokens" in label:
                p.normal_(0, 0.5)
            elif "position_embedding" in label:
                p.normal_(0, 0.3)
            elif p.ndim > 1:
                p.normal_(0, 0.8 * p[0].numel() ** -0.5)
        for block in model.language_model.layers:  # queries start near the keys: attention is by content at once
            key = block.self_attn.k_proj.weight.unflatten(0, (c.kv_heads, -1))
            block.self_attn.q_proj.weight += 0.5 * key.repeat_interleave(c.heads // c.kv_heads, 0).flatten(0, 1)
    return model
