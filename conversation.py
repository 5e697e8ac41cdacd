"""Encode once, ask many: what questions about the same images share is run once, and kept.

Attention is causal, so none of it depends on the question. With each kind of pixels the images stand in a cache of
their own, made when a question first needs it.
"""
import torch

import data
from cli import timer
from config import PIXELS, Plan
from data import Prompt, collate
from decoding import generate
from pruning import PrunedCache


class Conversation:
    """What several questions share, and the turns that were kept."""

    def __init__(self, model, prompt, sa, pixels="all", text_capacity=512, timings=None):
        """prompt: the system text and the images, a data.Prompt; it runs now, over the pixels that may do. With sa
        "auto" the layers before the route layer run, and each other layer when a question is first sent there. sa,
        pixels: as in VLM.generate. text_capacity: tokens to reserve for questions and answers; the cache grows beyond.
        """
        self.model, self.sa, self.capacity = model, sa, text_capacity
        self.prompts, self.trees, self.known = [prompt], {}, None
        small = data.overview(prompt, model.config)
        self.pixels = model.config.allowed_pixels(pixels, sa) if small else "all"
        self.shift = small.end - prompt.end if small else 0
        first = "all" if self.pixels == "all" else "overview"
        with torch.no_grad():
            if model.config.reduction.inside:
                model.configurations(sa)
                self.encode(self.seen(prompt, first), timings)
            else:
                self.tree(first, timings)

    @property
    def end(self):
        """The position that follows the last token, over all pixels: where the next prompt starts."""
        return self.prompts[-1].end

    def seen(self, prompt, pixels):
        """A prompt of this conversation as it stands with these pixels."""
        if pixels == "all":
            return prompt
        return data.overview(prompt, self.model.config) or data.moved(prompt, self.shift)

    def tree(self, pixels, timings=None):
        """The cache_tree.CacheTree with these pixels, with all that was kept: what came in while others answered runs
        now, and the base tile is not encoded again."""
        model, first = self.model, collate([self.seen(self.prompts[0], pixels)])
        if pixels not in self.trees:
            self.trees[pixels] = model.new_tree(self.sa, 1, first.ids.shape[1] + self.capacity, first.v_pos.shape[1],
                                                pixels)
        tree = self.trees[pixels]
        for prompt in self.prompts[len(tree.segments):]:
            seen = self.seen(prompt, pixels)
            if seen.images and pixels == "overview":
                self.encode(seen, timings)
            model.extend(tree, collate([seen]), timings, self.known)
        return tree

    def encode(self, prompt, timings):
        with timer(timings, "encoder", self.model.device):
            self.known = self.model.pieces(prompt.images, timings=timings)

    @torch.no_grad()
    def answer(self, prompt, keep=False, routes=None, stages=None, timings=None, **how):
        """The answer (token ids) to a prompt that goes on from here: data.encode(..., start=conversation.end).

        keep: question and answer stay, so that the next turn can refer to them; otherwise all is as it was. routes,
        stages: lists that receive the Plan and the flops.Stages. how: as in decoding.generate. Raises ValueError where
        a turn is to be kept with a reduction that depends on the question."""
        n, inside = len(self.prompts), self.model.config.reduction.inside
        if keep and inside:
            raise ValueError(f"--reduce {self.model.config.reduce}: which tokens go depends on the question, so a "
                             "conversation has nothing to go on from; ask with --q")
        try:
            pixels, tree = (self.ask_anew if inside else self.ask)(prompt, timings, how.get("allowed"))
            seen = tree.prompts[0] if inside else self.seen(prompt, pixels)
            (answer,), (ran,) = generate(self.model, tree, [seen], self.sa, timings=timings, **how)
        except BaseException:   # Ctrl-C too
            self.truncate(n)
            raise
        if routes is not None:
            routes[:] = [Plan(ran, pixels)]
        if stages is not None:
            stages[:] = [tree.ran(0)]
        if keep:                # the answer's keys stand in the cache of its own route; others run it when they need it
            closed = answer + self.model.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
            turn = Prompt(closed, [prompt.end + i for i in range(len(closed))], [], [], [])
            self.prompts += [prompt, turn]
        else:                   # its cache positions are written again by the next question
            self.truncate(n)
        return answer

    def ask_anew(self, prompt, timings, _):
        """`ask` where visual tokens go by what is asked: images and question run together."""
        pixels = "all" if self.pixels == "all" else "overview"
        whole = data.join(*(self.seen(x, pixels) for x in (self.prompts[0], prompt)))
        return pixels, PrunedCache(self.model, [whole], self.capacity, timings, self.known)

    def ask(self, prompt, timings, allowed=None):
        """(pixels, the tree with them): the ones that a question gets, with the question at its end."""
        wanted = self.model.config.allowed_pixels(self.pixels, self.sa, allowed)
        for pixels in PIXELS if wanted == "auto" else [wanted]:
            tree, n = self.tree(pixels, timings), len(self.prompts)
            seen = self.seen(prompt, pixels)
            self.model.extend(tree, collate([seen]), timings)
            if pixels == wanted or pixels == "all" or self.model.overview_will_do(tree, [seen.answer_starts])[0]:
                return pixels, tree
            tree.truncate(n)

    def truncate(self, n):
        for tree in self.trees.values():
            tree.truncate(n)
