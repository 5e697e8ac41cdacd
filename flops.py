"""What a configuration costs, in floating-point operations: one multiplication and one addition count as two.

Counted is what the code executes: matrix products, convolutions and attention. Attention that starts from nothing is
causal and costs half of its square; attention with a mask costs all of its rectangle; vision that no later layer reads
is not computed. Norms, activations and softmax are left out, as is usual (under 1 % here). No torch.
"""


def tower_flops(c, tiles):
    """The SigLIP tower over `tiles` tiles."""
    n, d = c.patches ** 2, c.vision_hidden
    layer = 2 * n * (4 * d * d + 2 * d * c.vision_ffn) + 4 * n * n * d
    return tiles * (2 * n * 3 * c.patch ** 2 * d + c.vision_layers * layer)


def connector_flops(c, tiles):
    return 2 * tiles * c.side ** 2 * (c.vision_hidden * (4 if c.pack_widen else 1) * c.hidden + c.hidden ** 2)


def llm_flops(c, sa, text, vision, past_text=0, past_vision=0):
    """The language model over `text` and `vision` new tokens, with the logits of one; `past_*` ones are in the cache.

    A prompt is text, vision > 0 with no past; each generated token is text = 1, vision = 0 with all else past.
    """
    d, wide, narrow = c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim
    cross = [l for l in c.ca if l not in sa]
    last = max([*sa, *cross], default=-1)

    def block(asking, keys, pairs):  # one Qwen2 layer: q and o, k and v, the MLP, and attention over query-key pairs
        return 2 * asking * (2 * d * wide + 3 * d * c.ffn) + 4 * keys * d * narrow + 4 * pairs * wide

    def pairs(new, past):
        return new * (past + new) if past else new * (new + 1) // 2

    both, past = text + vision, past_text + past_vision
    text_only = block(text, text, pairs(text, past_text))
    seen = vision + past_vision
    total = 2 * d * c.vocab
    for l in range(c.layers):
        if l in sa and (l < last or not vision):
            total += block(both, both, pairs(both, past))
        elif l in sa:  # the last layer that reads vision: only the text asks
            total += block(text, both, text * (both + past))
        else:
            total += text_only
            if l in cross and seen:
                total += 4 * text * d * wide + vision * (4 * d * narrow + 14 * d) + 4 * text * seen * wide
    return total


def within_budget(c, budget, text, vision):
    """The costliest viable configuration whose prompt costs at most `budget` of dense. Raises ValueError."""
    dense = llm_flops(c, range(c.layers), text, vision)
    costs = {sa: llm_flops(c, sa, text, vision) / dense for sa in c.viable}
    if not costs:
        raise ValueError("--budget: this checkpoint has no viable configurations; give --sa instead")
    affordable = [sa for sa in costs if costs[sa] <= budget]
    if not affordable:
        cheapest = min(costs, key=costs.get)
        raise ValueError(f"--budget {budget:g}: the cheapest viable configuration, --sa "
                         f"{','.join(map(str, cheapest)) or 'none'}, costs {costs[cheapest]:.3f} of dense; raise the "
                         "budget to that")
    return max(affordable, key=costs.get)
