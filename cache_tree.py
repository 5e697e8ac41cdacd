"""What several questions, or several configurations, share is computed once: a KV cache that is a small tree.

Used by conversation.py (encode once, ask many), by generation with a router, and by evaluation.py, which asks the same
questions in every configuration.
"""
from typing import NamedTuple

import numpy as np

from cli import timer
from config import branch_layers
from data import collate
from layout import KV, LayerCache, Past, TokenLayout, compute_dtype, make_layout


class Segment(NamedTuple):
    """Tokens that came in together: a prompt, or the images and then each question, each answer."""
    positions: tuple       # those of its data.Batch
    past: Past             # what the cache held before them
    layout: TokenLayout


class Node:
    """A stretch of layers that all configurations of a group run alike: its caches, and what left its last layer."""

    def __init__(self, group, start, cache, c, capacity, pauses=()):
        self.group = group
        ends = branch_layers(group) | {l for l in pauses if l > start}
        self.start, self.stop = start, min(ends, default=c.layers)
        # They agree on these layers; the one that reads vision longest also refines it for the others
        self.sa = max(group, key=lambda sa: c.vision_readers(sa)[1])
        text, vision = capacity  # text is kept everywhere, vision only where it is read
        self.cache = cache + [LayerCache(KV(text + vision * (l in self.sa)), KV(vision))
                              for l in range(start, self.stop)]  # one for every layer before `stop`
        self.outputs = []      # (t, v) of each segment as they enter layer `stop`
        self.children = {}     # whether layer `stop` is a self-attention layer -> Node


class CacheTree:
    """The KV cache of a batch in several configurations: a tree, as a layer's keys depend only on the self-attention
    layers before it.

    Below the first layer in which the configurations differ all share the root; each other node is made when a
    configuration is first asked for, and goes on from what its parent kept. Segments that are taken back
    (truncate) need no clearing: their cache positions are written again.
    """

    def __init__(self, model, configurations, batch, capacity, pauses=()):
        """model: a VLM. configurations: those that may be asked for. batch: samples. capacity: text and visual tokens
        of a sample to reserve. pauses: layers before which nodes end, although all may agree on more."""
        self.model, self.configurations, self.capacity = model, configurations, capacity
        self.pauses, c = pauses, model.config
        self.root = Node(configurations, 0, [], c, capacity, pauses)
        self.segments, self.past = [], Past.empty(batch)

    def extend(self, prompts, timings=None, known=None):
        """Adds a segment, a data.Prompt for each sample, and runs it through the layers that all configurations share.
        known: as in VLM.pieces."""
        with timer(timings, "prefill", self.model.device):
            batch = collate(prompts)
            t, v = self.model.embed(batch, timings, known)                      # (B, Nt, d), (B, Nv, d)
            layout = make_layout(*batch.positions, self.past, self.model.config, t.device, compute_dtype(t))
            self.run_node(self.root, t, v, layout)  # first: if it is interrupted, all is as it was
            self.segments.append(Segment(batch.positions, self.past, layout))
            self.past = self.past.extend(*batch.positions)

    def run_node(self, node, t, v, layout):
        """Takes a segment through the layers of a node."""
        node.outputs.append(self.model.language_model.run(t, v, layout, node.sa, node.start, node.stop, node.cache))

    def run(self, sa):
        """Runs all layers in configuration sa, as far as another one has not done it already.
        Returns t (B, Nt, d) of the newest segment after the last layer, and the cache of every layer."""
        if tuple(sa) not in map(tuple, self.configurations):
            raise ValueError(f"configuration {tuple(sa)} is not one of those that this cache was made for")
        node, c = self.root, self.model.config
        while node.stop < c.layers:
            node = self.child(node, node.stop in sa)
        t, _ = node.outputs[-1]
        node.outputs = [None] * (len(node.outputs) - 1) + [(t, None)]  # no node goes on from here: v is not kept
        return t, node.cache

    def child(self, parent, side):
        """The node that goes on from a parent on one side, with all that has come in run."""
        if side not in parent.children:
            group = [own for own in parent.group if (parent.stop in own) == side]
            c = self.model.config
            parent.children[side] = Node(group, parent.stop, parent.cache, c, self.capacity, self.pauses)
        node = parent.children[side]
        for i in range(len(node.outputs), len(self.segments)):
            self.run_node(node, *parent.outputs[i], self.segments[i].layout)
        return node

    def shared(self, stop):
        """The node of layers that all configurations run alike which ends before layer `stop`. Raises ValueError."""
        node = self.root
        while node.stop < stop and not branch_layers(node.group) & {node.stop}:
            node = self.child(node, node.stop in node.group[0])
        if node.stop != stop:
            raise ValueError(f"this cache has no node that ends before layer {stop}")
        return node

    def truncate(self, n):
        """Takes all segments after the first n back."""
        if n < len(self.segments):
            self.past = self.segments[n].past
            del self.segments[n:]
        nodes = [self.root]
        while nodes:
            node = nodes.pop()
            del node.outputs[n:]
            nodes += node.children.values()

    def select(self, rows):
        """A tree for some samples of the batch, with copies of what all configurations share."""
        new = CacheTree(self.model, self.configurations, len(rows), self.capacity, self.pauses)
        node, n = self.root, len(self.segments)
        while not branch_layers(node.group) & {node.stop}:  # what goes on from there for all, as far as it has run
            following = [x for x in node.children.values() if len(x.outputs) == n]
            if not following:
                break
            node, = following
        like, _ = node.outputs[0]
        for positions, *_ in self.segments:
            positions = tuple(x[rows] for x in positions)
            layout = make_layout(*positions, new.past, self.model.config, like.device, compute_dtype(like))
            new.segments.append(Segment(positions, new.past, layout))
            new.past = new.past.extend(*positions)
        new.root.stop, new.root.outputs = node.stop, [(t[rows], v[rows]) for t, v in node.outputs]
        new.root.cache = [LayerCache(*(kv.select(rows) for kv in layer)) for layer in node.cache]
        return new

    @property
    def runs(self):
        """What decoding goes on from, [(first layer, the one behind the last, Past)]: all layers keep the same tokens.
        """
        return [(0, self.model.config.layers, self.past)]

    def kept(self, b):
        """Of each run of layers, which of prompt b's visual tokens are there, (tokens,)."""
        return [np.arange(self.past.vision[b])]

    def ran(self, _):
        """The flops.LayerTokens of a prompt: no visual tokens are dropped inside."""

    @property
    def end(self):
        """The position that follows the first sample's last token."""
        return int(self.past.text[0] + self.past.vision[0])
