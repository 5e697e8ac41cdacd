"""VISOR the slow way: one sequence of text and visual tokens, and for each layer a mask that says who attends to whom.

What model.py and layers.py do with two streams and no mask, written once more from the paper's Eq. 1 to 3, so that the
fast form has something to equal (paper.verify). Of the fast form it takes the weights, and images as visual tokens.
"""
import torch
import torch.nn.functional as F

from data import collate


def masked_logits(model, prompt, sa):
    """Logits (Nt, vocab) of the text tokens of one data.Prompt in configuration sa."""
    lm, c = model.language_model, model.config
    t, v = model.embed(collate([prompt]))                           # (1, Nt, d), (1, Nv, d)
    position = torch.tensor(prompt.t_pos + prompt.v_pos, device=t.device)
    order = position.argsort()
    position = position[order]                                      # (N,) N = Nt + Nv
    rotary = torch.tensor(rotary_positions(prompt), device=t.device)  # (N, 3)
    image = torch.tensor([-1] * len(prompt.ids) + prompt.v_img, device=t.device)[order]  # (N,) -1: text
    is_text = image < 0
    before = position[None] < position[:, None]                     # (N, N) row: who looks, column: who is looked at
    causal = position[None] <= position[:, None]                    # a token also looks at itself
    x = torch.cat([t[0], v[0]])[order]                              # (N, d) the interleaved sequence
    for l, block in enumerate(lm.layers):
        if l in sa:                                                 # Eq. 3, case 1
            x = qwen2_layer(block, x, rotary, causal, c)
            continue
        z = x
        if l in c.ca:                                               # case 2, Eq. 2
            z = x + cross_attention(lm.cross[str(l)], x, image, before & ~is_text, c)
        z = qwen2_layer(block, z, rotary, causal & is_text, c)      # case 3: text looks at text
        x = torch.where(is_text[:, None], z, x)                     # vision passes by
    return model.head(lm.norm(x[is_text]))


def rotary_positions(prompt):
    """[(time, row, column)] of each token in order: of text, and of an image's tokens without M-RoPE, a counter thrice.
    With it an image's tokens count from where the counter stands, which goes on behind the largest."""
    counter, found, before = 0, [], -1
    tokens = sorted([(p, -1) for p in prompt.t_pos] + list(zip(prompt.v_pos, prompt.v_img)))
    for position, image in tokens:
        tiling = prompt.images[image].tiling if image >= 0 else None
        if tiling is None or not tiling.mrope:
            found.append((counter,) * 3)
            counter += 1
        elif image > before:                                        # its first token: all of it at once
            rows, columns = tiling.cells
            found += [(counter, counter + y, counter + x) for y in range(rows) for x in range(columns)]
            counter, before = counter + max(rows, columns), image
    return found


def qwen2_layer(block, x, position, mask, c):
    """x (N, d) after one Qwen2 layer."""
    h, own = block.input_layernorm(x), block.self_attn
    q, k, v = own.qkv_proj(h).split([n * c.head_dim for n in (c.heads, c.kv_heads, c.kv_heads)], dim=1)
    x = x + own.o_proj(attention(rotated(q, position, c), rotated(k, position, c), v, mask, c))
    return x + block.mlp(block.post_attention_layernorm(x))


def cross_attention(cross, x, image, mask, c):
    """What each row of x (N, d) gets from the visual rows that mask (N, N) shows it."""
    v = x.clone()
    for i in image[image >= 0].unique():  # the position encoding, image by image: a window of 7 tokens, zeros outside
        own = x[image == i]                                         # (n, d)
        window = F.pad(own, (0, 0, 3, 3)).unfold(0, 7, 1)           # (n, d, 7)
        v[image == i] = own + (window * cross.cpe.weight[:, 0]).sum(-1) + cross.cpe.bias
    k, v = cross.kv_proj(cross.kv_norm(v)).chunk(2, dim=1)
    return cross.o_proj(attention(cross.q_proj(cross.q_norm(x)), k, v, mask, c))


def attention(q, k, v, mask, c):
    """q (N, H * D), k and v (N, Hkv * D), mask (N, N) -> (N, H * D). Who may look at nobody gets zero."""
    q, k, v = (x.split(c.head_dim, dim=1) for x in (q, k, v))
    heads = []
    for h in range(c.heads):
        group = h // (c.heads // c.kv_heads)                        # query heads that share keys and values
        score = (q[h].float() @ k[group].float().T) * c.head_dim ** -0.5
        weight = score.masked_fill(~mask, -1e30).softmax(-1) * mask
        heads.append(weight.to(v[group].dtype) @ v[group])
    return torch.cat(heads, dim=1)


def rotated(x, position, c):
    """Rotary positions (N, 3): at position p features i and i + D / 2 of a head turn by p * theta ** (-2 i / D). With
    M-RoPE p is the time for the first of them, then the row, then the column."""
    half = c.head_dim // 2
    which = torch.tensor([k for k, n in enumerate(c.mrope or (half,)) for _ in range(n)], device=x.device)
    angle = position[:, which] * c.rope_theta ** (-torch.arange(half, device=x.device) / half)  # (N, D / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    pairs = [head.split(half, dim=1) for head in x.split(c.head_dim, dim=1)]
    return torch.cat([y for a, b in pairs for y in (a * cos - b * sin, b * cos + a * sin)], dim=1)
