"""Encode once, ask many: what questions about the same images share is run once, and kept.

Attention is causal, so none of it depends on the question. With each kind of pixels the images stand in a cache of
their own, made when a question first needs it.
"""
import torch

import data
from cli import timer
from config import PIXELS, Plan
from data import Prompt
from decoding import generate


class Conversation:
    """What several questions share, and the turns that were kept."""

    def __init__(self, model, prompt, sa, pixels="all", text_capacity=512, timings=None, known=None):
        """prompt: the system text and the images, a data.Prompt; it runs now, over the pixels that may do. With sa
        "auto" the layers before the route layer run, and each other layer when a question is first sent there. sa,
        pixels: as in VLM.generate. text_capacity: tokens to reserve for questions and answers; the cache grows beyond.
        known: of each image the arrange.Pieces of its first tiles, where they have been encoded.
        """
        self.model, self.sa, self.wanted, self.capacity = model, sa, pixels, text_capacity
        self.prompts, self.trees, self.known = [prompt], {}, known
        small = data.overview(prompt, model.config)
        self.pixels = model.config.allowed_pixels(pixels, sa) if small else "all"
        self.shift = small.end - prompt.end if small else 0
        first = "all" if self.pixels == "all" else "overview"
        with torch.no_grad():
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
        """The tree with these pixels, with all that was kept: what came in while others answered runs now, and the base
        tile is not encoded again."""
        if pixels not in self.trees:
            first = [self.seen(self.prompts[0], pixels)]
            self.trees[pixels] = self.model.new_tree(self.sa, first, self.capacity, pixels)
        tree = self.trees[pixels]
        for prompt in self.prompts[len(tree.segments):]:
            seen = self.seen(prompt, pixels)
            tree.extend([seen], timings, self.encoded(seen.images, timings))
        return tree

    def encoded(self, images, timings):
        """The Pieces of images, of which none is encoded twice; all tiles stay known where the overview asks for one.
        """
        if not images:
            return None
        known = self.known and [k.of(slice(x.tiling.tiles)) for k, x in zip(self.known, images)]
        with timer(timings, "encoder", self.model.device):
            found = self.model.pieces(images, known, timings)
        if self.known is None or len(found[0].features) > len(self.known[0].features):
            self.known = found
        return found

    def with_layers(self, sa, pixels="all"):
        """The same images and turns in another configuration, or with other pixels: what was said runs anew there, and
        nothing is encoded again. sa, pixels: as in VLM.generate."""
        new = Conversation(self.model, self.prompts[0], sa, pixels, self.capacity, known=self.known)
        new.prompts = list(self.prompts)
        return new

    @torch.no_grad()
    def answer(self, prompt, keep=False, routes=None, layer_tokens=None, timings=None, **how):
        """The answer (token ids) to a prompt that goes on from here: data.encode(..., start=conversation.end).

        keep: question and answer stay, so that the next turn can refer to them; otherwise all is as it was. routes,
        layer_tokens: lists that receive the Plan and the flops.LayerTokens. how: as in decoding.generate. Raises
        ValueError where a turn is to be kept with a reduction that depends on the question."""
        n = len(self.prompts)
        if keep and self.model.config.reduction.inside:
            raise ValueError(f"--reduce {self.model.config.reduce}: which tokens go depends on the question, so a "
                             "conversation has nothing to go on from; ask with --q")
        try:
            pixels, tree = self.ask(prompt, timings, how.get("allowed"))
            (answer,), (ran,) = generate(self.model, tree, [self.seen(prompt, pixels)], self.sa, timings=timings, **how)
        except BaseException:   # Ctrl-C too
            self.truncate(n)
            raise
        if routes is not None:
            routes[:] = [Plan(ran, pixels)]
        if layer_tokens is not None:
            layer_tokens[:] = [tree.ran(0)]
        if keep:                # the answer's keys stand in the cache of its own route; others run it when they need it
            closed = answer + self.model.tokenizer.encode("<|im_end|>\n", add_special_tokens=False).ids
            turn = Prompt(closed, [prompt.end + i for i in range(len(closed))], [], [], [])
            self.prompts += [prompt, turn]
        else:                   # its cache positions are written again by the next question
            self.truncate(n)
        return answer

    def ask(self, prompt, timings, allowed=None):
        """(pixels, the tree with them): the ones that a question gets, with the question at its end."""
        wanted = self.model.config.allowed_pixels(self.pixels, self.sa, allowed)
        for pixels in PIXELS if wanted == "auto" else [wanted]:
            tree, n = self.tree(pixels, timings), len(self.prompts)
            seen = self.seen(prompt, pixels)
            tree.extend([seen], timings)
            if pixels == wanted or pixels == "all" or self.model.overview_will_do(tree, [seen.answer_starts])[0]:
                return pixels, tree
            tree.truncate(n)

    def truncate(self, n):
        for tree in self.trees.values():
            tree.truncate(n)
