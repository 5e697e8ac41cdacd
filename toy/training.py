"""What only the miniature's training has: recipes, batches of quilts, weighted drawing of configurations, its first
weights, and what its dense pretraining (stage 0) needs: an auxiliary loss, and text that looks where VISOR will.

train.py runs it in its loop as it runs anyone's data. Nothing of it is in the paper, whose models start from
LLaVA-OneVision and draw configurations uniformly.
"""
from itertools import count

import numpy as np
import torch
import torch.nn.functional as F

import data
from config import Plan
from methods import for_step
from toy import world

# Batches are of images, with 10 questions each or 30 short ones; in stage 3 of questions. lr is Muon's, AdamW has a
# tenth; it is constant up to decay_start * steps, then falls linearly. LOG.md has the experiments behind the numbers.
RECIPES = {
    0: dict(batch_size=24, steps=12000, lr=0.015, warmup=50, decay_start=0.55,
            restart=6000,             # then twice more, for the counts over whole panels
            auxiliary_weight=1.0,     # without it no task rises above guessing in this budget
            draw_from=3500),          # the step from which viable configurations are drawn
    1: dict(batch_size=24, steps=120, lr=0.02, warmup=20, decay_start=0.5),  # a warm-up; 300 steps bring little more
    2: dict(batch_size=24, steps=1200, lr=0.01, warmup=30, decay_start=0.5,
            largest_first=0.375),     # of the steps: relations learned first in the largest configuration stay
    3: dict(batch_size=64, steps=1000, lr=0.25, warmup=20, decay_start=0.5,
            questions=500,            # of each task; with 250 chance decided the label of one
            labels="task", leave_out=(),
            label_smoothing=0.06),    # without it a router is sure even about kinds of questions that it never saw
}


def matrices_of(model):
    """Names of the parameters that Muon trains: matrices that multiply features. AdamW, with a tenth of the rate and
    betas (0.9, 0.98), trains embeddings, convolutions, norms, biases and the router."""
    return [name for name, p in model.named_parameters()
            if p.requires_grad and p.ndim == 2 and "embed" not in name and not name.startswith("router.")]


OVERVIEW_SHARE = 0.1  # of the steps: over the overview


def sample_plan(config, seed, step, largest_first_steps=0):
    """The Plan of a step. A tenth of the steps are over the overview; of the configurations over all tiles the
    smallest comes twice and the largest three times as often as the others (the paper, 4.2.3, draws uniformly).

    In the first `largest_first_steps` only these two are drawn, the largest three times in four: what the model has
    learned in it before the others come, it keeps.
    """
    rng, viable = np.random.default_rng((seed, step)), config.viable
    smallest, largest = min(viable, key=len), max(viable, key=len)
    if step < largest_first_steps:
        pool = [smallest, largest, largest, largest]
    else:
        pool = [*viable, smallest, largest, largest]
    plan = Plan(pool[rng.integers(len(pool))])
    if config.overview and rng.random() < OVERVIEW_SHARE:
        return Plan(config.overview[rng.integers(len(config.overview))], "overview")
    return plan


@torch.no_grad()
def init_weights(model):
    """Gives a dense miniature, VLM(world.config()) with its tokenizer still to come, weights of a scale at which every
    part gets a gradient from the first step on. Biases, norms and image_newline stay as they are. Returns the model."""
    model.tokenizer = world.tokenizer()
    c = model.config
    for name, p in model.named_parameters():
        if "embed_tokens" in name:
            p.normal_(0, 0.5)
        elif "position_embedding" in name:
            p.normal_(0, 0.3)
        elif p.ndim > 1:
            p.normal_(0, 0.8 * p[0].numel() ** -0.5)
    for block in model.language_model.layers:  # queries start near the keys: attention is by content at once
        heads = block.self_attn.qkv_proj.weight.unflatten(0, (-1, c.head_dim))                   # (H + 2 Hkv, D, d)
        queries, keys, _ = heads.split([c.heads, c.kv_heads, c.kv_heads])
        queries += 0.5 * keys.repeat_interleave(c.heads // c.kv_heads, 0)
    return model


def auxiliary_loss(model, v, truth):
    """Teaches visual tokens of a quilt's panels and cells, v (B, N, d), the words that are true of them.

    The output head reads each visual token as it reads text, and a sigmoid for each word is to be 1 where truth
    (B, N, vocab) is 1: several labels at once, as a softmax would let a relation erase the token's own sign. This
    stands in for what a large model's pretraining brings along, and belongs to stage 0.
    """
    z = model.head(model.language_model.norm(v)) - 4  # as few words are true, the start is that none is
    return F.binary_cross_entropy_with_logits(z, truth, reduction="sum") / truth.sum()


class ToyBatches:
    """Batches of conversations about quilts, the configuration of each step, and its loss, for train.py's loop.

    Deterministic: batch i depends only on (seed, i), the configuration and the loss of a step on (seed, step).
    """

    def __init__(self, model, seed, batch_size, turns=10, auxiliary_weight=0.0, draw_from=None, largest_first=0,
                 steps=0, stage=2):
        """turns: questions an image. auxiliary_weight, draw_from: of stage 0's two additions, see `losses` and
        `draw_refining_layers`; draw_from None: neither. largest_first: the share of the stage's `steps` in which the
        largest and the smallest configuration alone are trained."""
        if (auxiliary_weight or draw_from is not None) and model.config.ca:
            raise ValueError("the auxiliary loss is for the dense miniature: leave it out after stage 0")
        self.model, self.seed, self.batch_size, self.turns, self.stage = model, seed, batch_size, turns, stage
        self.pretrains, self.draw_from = draw_from is not None, draw_from or 0
        self.auxiliary_weight = auxiliary_weight if self.pretrains else 0.0
        self.largest_first_steps = largest_first * steps
        self.vocabulary = model.tokenizer.get_vocab()
        self.tokens = None  # of a step: training files count them

    # --- batches ---

    def __getitem__(self, step):
        """(data.Batch, labels (B, Nt) in numpy, the quilts). No stage repeats another's."""
        number, pixels = (self.stage << 40) + step, self.plan(step).pixels
        c = for_step(self.model.config, self.seed, step)
        quilts, prompts, labels = zip(*(self._sample(number, j, pixels, c) for j in range(self.batch_size)))
        return data.collate(prompts), data.pad(labels, -1), list(quilts)

    def _sample(self, i, j, pixels, c):
        """(quilt, Prompt, labels) of sample j of batch i: in turn a conversation, and three times as many questions as
        a caption. Over the overview there are coarse questions alone: of all else it shows nothing."""
        rng = np.random.default_rng((world.TRAIN, self.seed, i, j))
        is_caption = j % 2 == 1
        tasks = world.TASKS if pixels == "all" else world.STRATA["coarse"]
        image, quilt, asked = world.conversation(rng, self.turns * (3 if is_caption else 1), tasks=tasks)
        if is_caption:
            pieces = world.caption(asked)
        else:
            turns = [text for _, question, answer in asked for text in (question, answer)]
            turns[0] = data.place_images(turns[0], 1)
            pieces = data.turns_to_learn(turns)
        prompt, labels = data.labelled(pieces, self.model.tokenizer, [data.process_image(image, c)])
        return quilt, data.seen(prompt, pixels, c), labels

    def batches(self, first):
        """The items of the stage's steps from `first` on."""
        return map(self.__getitem__, count(first))

    def plan(self, step):
        """The Plan that a step trains; of a dense model all layers."""
        c = self.model.config
        if not c.viable:
            return Plan(tuple(range(c.layers)))
        return sample_plan(c, self.seed, step, self.largest_first_steps)

    # --- the loss ---

    def losses(self, item, plan, step):
        """Yields the loss of one batch; the loop takes several, this is one.

        Stage 0 adds two things, both to make of a small dense model what large ones are by themselves (paper, section
        3): features of an image before anyone asks, and text that reads them where VISOR will let it. In every other
        step text looks at vision in VISOR's cross-attention layers alone.
        """
        batch, labels, quilts = item
        model, rng = self.model, np.random.default_rng((self.seed, step))
        t, v = model.embed(batch)                                                  # (B, Nt, d), (B, Nv, d)
        refining = self.draw_refining_layers(rng, step)
        states = self.vision_states(batch, t, v, refining) if self.pretrains else None
        if self.pretrains and step % 2:
            answers = self.read(t, states, model.layout(batch))
        else:
            answers, _ = model.language_model.run(t, v, model.layout(batch), plan.sa)
        h = model.language_model.norm(answers)                                     # (B, Nt, d)
        targets = int(data.target_mask(labels, batch.t_pos).sum())
        loss = model.answer_loss(h, labels, batch.t_pos) / targets
        if self.auxiliary_weight and refining.issuperset(world.SA):
            truth = np.float32(0)
            for level, l in enumerate((0, *(l + 1 for l in world.SA))):
                truth = np.maximum(truth, self.word_targets(quilts, level))        # what was true below is still true
                marked = states[l][:, world.PANEL_TOKENS + world.CELL_TOKENS]      # (B, 40, d)
                wanted = torch.from_numpy(truth).to(v.device)                      # (B, 40, vocab)
                loss = loss + self.auxiliary_weight * auxiliary_loss(model, marked, wanted)
        yield loss

    # --- stage 0 ---

    def draw_refining_layers(self, rng, step):
        """The layers in which vision is refined for `vision_states`: the candidates, and each other layer with
        probability 1/2 (stochastic depth, Huang et al. 2016). Late in the stage every other time none but the
        candidates, and in every fourth step only those of a viable configuration."""
        late = step >= self.draw_from
        p = rng.choice([0.5, 1.0]) if late else 0.5
        rests = rng.random(self.model.config.layers) < p
        candidates = world.VIABLE[rng.integers(len(world.VIABLE))] if late and step % 4 == 3 else world.SA
        return {l for l, is_resting in enumerate(rests) if not is_resting and l not in world.SA} | {*candidates}

    def vision_states(self, batch, t, v, refining):
        """The vision stream (B, Nv, d) as it enters each layer up to the last cross-attention.

        The images run by themselves, without the questions. The two text tokens before an image, system line and user
        marker, stay: visual tokens attend to them.
        """
        cut = batch._replace(ids=batch.ids[:, :2], t_pos=batch.t_pos[:, :2])
        layout, every_layer, states, t = self.model.layout(cut), range(self.model.config.layers), [v], t[:, :2]
        for l in every_layer[:max(world.CA)]:
            # Alone in its configuration, a layer is the last that reads vision (a dense model has no cross-attention),
            # so run leaves v as it is. With all layers in it, others follow and v is refined
            t, v = self.model.language_model.run(t, v, layout, every_layer if l in refining else (l,), l, l + 1)
            states.append(v)
        return states

    def read(self, t, states, layout):
        """The text stream (B, Nt, d) behind all layers, where it looks at vision in world.CA alone. states: of
        `vision_states`."""
        for l in range(self.model.config.layers):
            looks = l in world.CA
            t, _ = self.model.language_model.run(t, states[min(l, max(world.CA))], layout, (l,) * looks, l, l + 1)
        return t

    def word_targets(self, quilts, level):
        """(B, 40, vocab) float32: 1 for each word that becomes true of a panel or a cell at this level, else 0."""
        tokens = len(world.PANEL_TOKENS + world.CELL_TOKENS)
        truth = np.zeros((len(quilts), tokens, self.model.config.vocab), dtype=np.float32)
        for b, quilt in enumerate(quilts):
            for i, words in enumerate(world.words(quilt, level)):
                truth[b, i, [self.vocabulary[word] for word in words]] = 1
        return truth
