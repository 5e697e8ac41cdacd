"""What every configuration costs: operations, memory, parameters. In a second, without weights and without torch.

    python flops.py --image 1024x768
    python flops.py --model llava-ov-7b --tiles 10 --pack 2 --sa 1,4 --sa none --json

One multiplication and one addition count as two operations. Counted are matrix products, convolutions and attention;
norms, activations and softmax are left out, as is usual (under 1 %). Two conventions stand side by side:

  paper     attention over N tokens costs its full square, N x N, and every self-attention layer computes everything,
            as in the paper's O((Nt + Nv)^2 d + (Nt + Nv) d^2) for self-attention and O(Nt Nv d) for cross-attention
  executed  what the code does: half of the square where attention is causal from the first token on, all of the
            rectangle where it needs a mask, and no vision that no later layer reads. Decoding is counted over the keys
            that there are; the code attends to a buffer whose text is rounded up to a multiple of 256
"""
import json
import math
import re
import sys
import textwrap
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from cli import Parser, checkpoint_path, counted, run
from config import PIXELS, PRESETS, checked, preset, sa_name
from data import lone_tile, overview_tiling, overview_tokens, tiling
from families import read_config
from methods import PICKED, add_flags, given, recycled_count, sparse_count

# --- operations -----------------------------------------------------------------------------------------------------


def encoder_flops(c, tilings):
    """Vision tower and connector over images, of which these are the data.Tilings."""
    return sum(tower_flops(c, t.tiles, t.patches) + connector_flops(c, t.tiles, t.patches) for t in tilings)


def tower_flops(c, tiles, patches=None):
    """The vision tower over `tiles` tiles, and what a reduction does there to choose among their patches. patches:
    (rows, columns) of tokens of each tile (default: those of a square one)."""
    tokens = math.prod(patches or (c.patches,) * 2)
    if c.encoder == "fastvithd":
        return tiles * fastvithd_flops(c.vision_hidden, tokens)
    n, d = tokens * (c.cell // c.patch) ** 2, c.vision_hidden
    layer = 2 * n * (4 * d * d + 2 * d * c.vision_ffn) + 4 * n * n * d
    return tiles * (2 * n * 3 * c.patch ** 2 * d + c.vision_layers * layer + selection_flops(c))


def fastvithd_flops(width, tokens):
    """FastViTHD, with `width` features at its end, over a picture that becomes so many tokens."""
    d, n = width // 32, tokens << 8                                    # of the first stage: features, places
    total = 4 * n * 27 * d + n * (9 * d + d * d)                       # the stem, which begins at twice that
    for stage, depth in enumerate((2, 12, 24, 4, 2)):
        d, n = width // 32 << stage, tokens << 8 - 2 * stage
        mixer = 9 * d if stage < 3 else 4 * d * d + 2 * n * d          # a convolution, or attention
        total += n * depth * (mixer + 49 * d + 8 * d * d)
        total += n * ((stage > 0) * (49 * d + d * d) + (stage > 2) * 49 * d)  # downsampling, position encoding
    return 2 * (total + 9 * tokens * width + width * width // 8)       # the last, squeeze and excitation


def selection_flops(c):
    """Of one tile: weights of the layers that score patches, and likenesses of patches."""
    r, n, d = c.reduction, c.patches ** 2, c.vision_hidden
    if not r.picks:
        return 0
    scores = (1 + (r.method == "hired")) * 2 * n * n * d
    if r.method == "visionzip":
        dominant, contextual = r.of_tile(c.patches)
        merged = n - dominant - contextual
        return scores + 2 * merged * contextual * (d // c.vision_heads + d)
    return scores + (2 * n * n * d if r.method == "vispruner" else 0)


def connector_flops(c, tiles, patches=None):
    """The connector over the tokens of `tiles` tiles, of which some methods make fewer before it. patches: as in
    `tower_flops`."""
    r, patches = c.reduction, patches or (c.patches,) * 2
    tokens = math.prod(r.grid(patches) if r.method == "pack" else patches)
    if r.method in PICKED:
        tokens = r.tokens(c.patches)
    first = c.features * (4 if r.option == "widen" else 1)
    return 2 * tiles * tokens * (first + c.hidden) * c.connector_hidden


def llm_flops(c, sa, text, vision, past_text=0, past_vision=0, paper=False, head=True, layers=None):
    """The language model over `text` and `vision` new tokens, with the logits of one; `past_*` ones are in the cache.

    A prompt is text, vision > 0 with no past; each generated token is text = 1, vision = 0 with all else past.
    paper: the paper's convention instead of what is executed. head=False: without logits, as in VLM.prefill.
    layers: those that run (default: all).
    """
    d, wide, narrow = c.hidden, c.heads * c.head_dim, c.kv_heads * c.head_dim
    cross, last = c.vision_readers(sa)

    def block(queries, keys, pairs):  # one Qwen2 layer: q and o, k and v, the MLP, and attention over query-key pairs
        return 2 * queries * (2 * d * wide + 3 * d * c.ffn) + 4 * keys * d * narrow + 4 * pairs * wide

    def pairs(new, past):
        return new * (past + new) if past or paper else new * (new + 1) // 2

    both, past = text + vision, past_text + past_vision
    all_vision = vision + past_vision
    total = 2 * d * c.vocab * head
    for l in range(c.layers) if layers is None else layers:
        if l in sa and (l < last or not vision or paper):
            total += block(both, both, pairs(both, past))
        elif l in sa:  # the last layer that reads vision: queries from text only
            total += block(text, both, text * (both + past))
        else:
            total += block(text, text, pairs(text, past_text))
            if l in cross and all_vision:  # its q and o, its k and v and position encoding, its attention
                total += 4 * text * d * wide + vision * (4 * d * narrow + 14 * d) + 4 * text * all_vision * wide
    return total


def answer_flops(c, sa, text, vision, answer):
    """The tokens of an answer after the first, which the prompt gives: answer - 1 steps from the cache. Each costs as
    much more than the one before, so all together cost as many times the mean of the first and the last.
    vision: visual tokens, or the LayerTokens of a prompt."""
    steps = answer - 1
    return steps * sum(token_flops(c, sa, past, vision) for past in (text, text + steps - 1)) // 2


class LayerTokens(NamedTuple):
    """How many visual tokens a prompt has in the layers of the language model, where a reduction drops some inside."""
    counts: list      # of each run of layers: of each image its tokens
    raters: int = 1   # text tokens whose attention decided
    asked: int = 0    # text tokens among which SparseVLM looked for them


def expected_tokens(c, text, images):
    """The LayerTokens of a prompt whose images have so many tokens each. What SparseVLM keeps depends on the question:
    here every third text token is a rater, and their attention has full rank."""
    r, raters, counts = c.reduction, max(1, text // 3), [list(images)]
    for k, _ in enumerate(r.drops(c.layers)):
        if r.method == "pyramiddrop":
            counts.append([r.pyramid_count(k, first, c.layers) for first in images])
            continue
        counts.append([])
        for first, n in zip(images, counts[-2]):
            kept = sparse_count(raters, n, r.sparse_scale(first))
            counts[-1].append(kept + (0 if r.option == "drop" else recycled_count(n - kept)))
    return LayerTokens(counts, raters, text) if r.method == "sparsevlm" and images else LayerTokens(counts)


def by_layer(c, vision):
    """[(layers, visual tokens of each image)] of LayerTokens, or of a number of tokens in all layers."""
    if not isinstance(vision, LayerTokens):
        return [(range(c.layers), [vision])]
    edges = [0, *c.reduction.drops(c.layers), c.layers]
    return [(range(*edge), counts) for edge, counts in zip(pairwise(edges), vision.counts)]


def prompt_flops(c, sa, text, vision, paper=False):
    """The language model over a prompt, and the choices that a reduction makes on the way. vision: visual tokens, or
    the LayerTokens of a prompt."""
    parts = by_layer(c, vision)
    total = sum(llm_flops(c, sa, text, sum(counts), paper=paper, head=False, layers=own) for own, counts in parts)
    return total + 2 * c.hidden * c.vocab + (pruning_flops(c, text, vision) if len(parts) > 1 else 0)


def token_flops(c, sa, text, vision):
    """One token of an answer behind so much text."""
    return 2 * c.hidden * c.vocab + sum(llm_flops(c, sa, 1, 0, text, sum(counts), head=False, layers=own)
                                        for own, counts in by_layer(c, vision))


def pruning_flops(c, text, layer_tokens):
    """What choosing costs: queries of some text tokens, keys of all, and what makes SparseVLM's raters; not its
    clusters, under 0.1 %."""
    counts, raters, asked = layer_tokens
    if not sum(counts[0]):
        return 0
    wide, narrow, total = c.heads * c.head_dim, c.kv_heads * c.head_dim, 2 * sum(counts[0]) * asked * c.hidden
    for tokens in (text + sum(now) for now in counts[:-1]):
        total += 2 * (raters * c.hidden * wide + tokens * c.hidden * narrow + raters * tokens * wide)
    return total


def router_flops(c, text, vision):
    """The routing token behind a prompt: through the layers before the first that may be skipped, and the MLP."""
    return scores_flops(c, c.viable[0], text, vision, c.route_layer, len(c.viable))


def pixel_flops(c, text):
    """The same to decide on the pixels, behind a prompt over the overview."""
    return scores_flops(c, c.overview[0], text, overview_tokens(c), c.pixel_layer, 1)


def asking_flops(c, text):
    """That, and what it was decided from and is not used where all are wanted: the prompt over the overview."""
    seen = llm_flops(c, c.overview[0], text, overview_tokens(c), head=False, layers=range(c.pixel_layer))
    return seen + pixel_flops(c, text)


def scores_flops(c, sa, text, vision, stop, choices):
    """The routing token up to layer `stop`, and what reads it."""
    way = llm_flops(c, sa, 1, 0, text, vision, head=False, layers=range(stop))
    return way + 2 * c.hidden * (c.hidden + choices)


# --- memory and parameters ------------------------------------------------------------------------------------------

def cache_bytes(c, sa, text, vision, itemsize=2):
    """Keys and values: text and vision in self-attention layers, text in the others, vision in cross-attentions.
    vision: visual tokens, or the LayerTokens of a prompt."""
    tokens = sum(len(own) * text + sum(counts) * sum((l in sa) + (l in c.vision_readers(sa)[0]) for l in own)
                 for own, counts in by_layer(c, vision))
    return tokens * 2 * c.kv_heads * c.head_dim * itemsize


def activation_bytes(c, sa, text, vision, itemsize=2):
    """The largest single tensor of the prompt's way through the language model: gate and up of an MLP, which are one
    product, or vision itself."""
    refined = [l for l in sa if l < c.vision_readers(sa)[1]]  # the last reader's MLP runs on text alone
    return itemsize * max((text + vision * bool(refined)) * 2 * c.ffn, vision * c.hidden)


def llm_parameters(c):
    wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer = c.hidden * (2 * wide + 2 * narrow + 3 * c.ffn + 2) + wide + 2 * narrow
    return c.layers * layer + c.hidden + c.vocab * c.hidden * (1 if c.tied else 2)


def cross_parameters(c):
    """What VISOR adds: projections, two norms, and a depthwise convolution of kernel 7, in each layer of ca."""
    wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    return len(c.ca) * (c.hidden * (2 * wide + 2 * narrow + 2 + 8) + wide + 2 * narrow)


# --- the command ----------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(doc=__doc__, description="What every configuration costs.")
    p.add_argument("--model", default="llava-ov-0.5b", help=f"{', '.join(PRESETS)}, nano, or a checkpoint directory "
                   "(default: llava-ov-0.5b)")
    p.add_argument("--image", action="append", metavar="WxH", help="size of an image in pixels; may be given several "
                   "times (default: 1024x768)")
    p.add_argument("--tiles", type=int, metavar="N", help="instead of --image: N tiles, without newlines")
    p.add_argument("--pixels", choices=PIXELS, default="all", help="overview: what a question costs that is answered "
                   "from the base tile alone (default: all)")
    p.add_argument("--text", type=int, default=40, metavar="N", help="text tokens of the prompt (default: 40)")
    p.add_argument("--answer", type=int, default=16, metavar="N", help="tokens of the answer (default: 16)")
    add_flags(p)
    p.add_argument("--sa", action="append", metavar="LAYERS", help="a configuration: dense, none or 1,4,7; may be "
                   "given several times (default: dense, none and all viable ones)")
    p.add_argument("--batch", type=int, default=1, metavar="B", help="prompts at once (default: 1)")
    p.add_argument("--plot", metavar="FILE.png", help="draw operations against visual tokens (needs matplotlib)")
    p.add_argument("--json", action="store_true", help="the numbers as one JSON object")
    args = p.parse_args(argv)
    given(p, args)
    limits = dict.fromkeys(("tiles", "text", "answer", "batch"), range(1, (1 << 30) + 1))
    for name in limits:
        if getattr(args, name) is not None:
            try:
                checked(name, getattr(args, name), f"--{name}", limits)
            except ValueError as e:
                p.error(str(e))
    if args.tiles and args.image:
        p.error("--tiles and --image both say how large the image is; give one of them")
    if args.pixels == "overview" and len(args.image or ()) > 1:
        p.error("--pixels overview: several images have none; give one")
    return args


def settings(args):
    """The Config to count for, with VISOR's layers where a dense checkpoint has none yet."""
    if args.model in PRESETS:
        c = preset(args.model)
    elif args.model and Path(checkpoint_path(args.model)).is_dir():
        c = read_config(checkpoint_path(args.model))
    else:
        raise ValueError(f"--model {args.model}: no such preset or directory; give one of {', '.join(PRESETS)}, nano")
    if not c.ca and not c.sa:
        c.add_visor()
    c.bound_pixels(args)
    return replace(c, reduce=c.reduce if args.reduce is None else args.reduce)


def images(args, c):
    """The data.Tilings of the prompt's images. Raises ValueError."""
    c.allowed_pixels(args.pixels, ())
    if args.pixels == "overview":
        return [overview_tiling(c)]
    if args.tiles:
        if c.aspect != "anyres":
            raise ValueError("--tiles: this model sees an image without a grid of tiles; give its size with --image")
        tokens = c.reduction.tokens(c.patches, args.tiles)
        return [lone_tile(c)._replace(grid=(1, args.tiles - 1), newlines=0, tokens=tokens)]
    sizes = []
    for text in args.image or ["1024x768"]:
        if not re.fullmatch("[1-9][0-9]{0,6}x[1-9][0-9]{0,6}", text):
            raise ValueError(f"--image {text}: give a size in pixels such as 1024x768")
        sizes.append(tuple(map(int, text.split("x"))))
    return [tiling(w, h, c, single_image=len(sizes) == 1) for w, h in sizes]


def count(c, configurations, text, tilings, answer, batch):
    """One row of numbers for each configuration; operations and bytes are those of the whole batch. tilings: of the
    images."""
    encoder, connector = (batch * sum(f(c, t.tiles, t.patches) for t in tilings)
                          for f in (tower_flops, connector_flops))
    images = [t.tokens for t in tilings]
    vision, rows = expected_tokens(c, text, images), []
    for sa in configurations:
        prefill = batch * prompt_flops(c, sa, text, vision)
        rest = batch * answer_flops(c, sa, text, vision, answer)
        rows.append({"sa": sa_name(c, sa), "prefill": prefill, "answer": rest,
                     "token": batch * token_flops(c, sa, text, vision),
                     "prefill_paper": batch * prompt_flops(c, sa, text, vision, paper=True),
                     "encoder": encoder, "connector": connector, "total": encoder + connector + prefill + rest,
                     "cache_bytes": batch * cache_bytes(c, sa, text + answer, vision),
                     "activation_bytes": batch * activation_bytes(c, sa, text, sum(images))})
    return rows


def compare(rows, dense):
    """Adds each row's savings over the dense row, which is never reduced, so that reduction shows as saving."""
    for r in rows:
        r["saving_paper"] = dense["prefill_paper"] / r["prefill_paper"]
        r["saving_executed"] = (dense["prefill"] + dense["answer"]) / (r["prefill"] + r["answer"])
        r["saving_first_token"] = (dense["total"] - dense["answer"]) / (r["total"] - r["answer"])
        r["saving_with_encoder"] = dense["total"] / r["total"]
    return rows


def main(argv=None):
    args = parse(argv)
    c = settings(args)
    tilings = images(args, c)
    tokens = [t.tokens for t in tilings]
    vision = sum(tokens)
    overview, args.pixels = args.pixels == "overview", "all"  # dense looks at everything
    dense_tilings = images(args, c.unreduced())
    every = tuple(range(c.layers))
    asked = [every, *sorted({(), *c.viable}, key=lambda sa: (-len(sa), sa))]
    if c.reduction.inside:
        asked = [every]
    if args.sa:
        asked = [c.configuration(text) for text in args.sa]
        c.check_reduction(asked)
    rows = count(c, asked, args.text, tilings, args.answer, args.batch)
    dense = count(c.unreduced(), [every], args.text, dense_tilings, args.answer, args.batch)[0]
    report = {"model": args.model, "tiles": sum(t.tiles for t in tilings), "overview": overview,
              "visual_tokens": vision, "dense_visual_tokens": sum(t.tokens for t in dense_tilings),
              "text_tokens": args.text, "answer_tokens": args.answer, "batch": args.batch, "reduce": c.reduce,
              "visual_tokens_by_layer": [sum(counts) for own, counts in by_layer(c, expected_tokens(
                  c, args.text, tokens)) for _ in own],
              "parameters": {"llm": llm_parameters(c), "cross_attention": cross_parameters(c)},
              "rows": compare(rows, dense)}
    if c.route_layer and not c.reduction.inside:
        least = min(c.viable, key=lambda sa: llm_flops(c, sa, args.text, vision))
        report["router"] = {"flops": args.batch * router_flops(c, args.text, vision), "cheapest": sa_name(c, least),
                            "share": router_flops(c, args.text, vision) / llm_flops(c, least, args.text, vision)}
    print(json.dumps(report) if args.json else page(c, report))
    if args.plot:
        plot(args.plot, c, asked, args.text)
        print(f"{args.plot}: operations against visual tokens", file=sys.stderr)


def page(c, r):
    """The report for people, 80 columns wide."""
    added = r["parameters"]["cross_attention"]
    out = [r["model"],
           f"  language model  {c.layers} layers, {c.hidden} features, {c.heads} heads ({c.kv_heads} kv), "
           f"MLP {c.ffn:,}",
           f"  vision tower    {c.encoder}, {c.vision_layers} layers, {c.vision_hidden} features, a token for "
           f"{c.cell} x {c.cell} pixels",
           f"  VISOR           cross-attention in {','.join(map(str, c.ca))}",
           f"                  + {added / 1e6:,.1f} M parameters, {added / r['parameters']['llm']:.1%} of the language "
           f"model's {r['parameters']['llm'] / 1e6:,.1f} M",
           f"  prompt          {counted(r['tiles'], 'tile')}{' (the overview)' * r['overview']}, "
           f"{counted(r['visual_tokens'], 'visual token')}, "
           f"{counted(r['text_tokens'], 'text token')}; answer {r['answer_tokens']}",
           *reduction_lines(c, r),
           *[f"  batch           {r['batch']}, operations and bytes are those of all"] * (r["batch"] > 1), "",
           "One layer over n tokens of d features (H: all heads together, K: all kv heads):",
           "  projections 4 n d (H + K)   MLP 6 n d ffn   attention 4 n n H, causal: half",
           "  self-attention layer: n = text + vision.  other layers: n = text.",
           "  cross-attention adds 4 text d H + vision (4 d K + 14 d) + 4 text vision H.", "",
           f"GFLOP: encoder {giga(r['rows'][0]['encoder'])}, connector {giga(r['rows'][0]['connector'])}, and "
           f"the language model:", "",
           f"{'self-':28}{'each':>7}{'answer':>7}{'with':>9}   saving over dense",
           f"{'attention layers':20}{'prefill':>8}{'token':>7}{'of ' + str(r['answer_tokens']):>7}{'encoder':>9}"
           f"{'paper':>7}{'exec.':>7}{'first':>7}{'all':>7}"]
    for row in r["rows"]:
        out.append(f"{row['sa']:20}{giga(row['prefill']):>8}{giga(row['token']):>7}{giga(row['answer']):>7}"
                   f"{giga(row['total']):>9}{row['saving_paper']:>6.1f}x{row['saving_executed']:>6.1f}x"
                   f"{row['saving_first_token']:>6.2f}x{row['saving_with_encoder']:>6.2f}x")
    out += ["", "paper: LLM prefill, full squares, as the paper counts; exec.: LLM prefill and",
            "answer, what is executed; first: encoder, connector and prefill, up to the first",
            "token; all: everything."]
    if "router" in r:
        out.append(f"The router, {giga(r['router']['flops'])}, comes on top: {r['router']['share']:.3%} of a prompt in "
                   f"layers {r['router']['cheapest']}.")
    out += ["",
            f"{'memory, 16-bit numbers':24}{'cache, MB':>12}{'largest activation, MB':>26}"]
    out += [f"{row['sa']:24}{row['cache_bytes'] / 1e6:>12,.1f}{row['activation_bytes'] / 1e6:>26,.1f}"
            for row in r["rows"]]
    return "\n".join(out)


def reduction_lines(c, r):
    """Of the page: what a reduction leaves."""
    if not c.reduce:
        return []
    first = f"{c.reduce}: dense has {r['dense_visual_tokens']:,} visual tokens"
    out = textwrap.wrap(first, 80, initial_indent="  reduction".ljust(18), subsequent_indent=" " * 18)
    if c.reduction.inside:
        runs = [(len(list(group)), n) for n, group in groupby(r["visual_tokens_by_layer"])]
        out += textwrap.wrap("visual tokens: " + ", ".join(f"{n:,} in {counted(k, 'layer')}" for k, n in runs), 80,
                             initial_indent=" " * 18, subsequent_indent=" " * 18)
    if c.reduction.method == "sparsevlm":
        out.append(" " * 18 + "if a third of the text tokens rate them, none alike")
    return out


def giga(flops):
    """Three digits or more, in GFLOP."""
    x = flops / 1e9
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def plot(path, c, configurations, text):
    """The paper's appendix E figure: prefill operations against the number of visual tokens, without the encoder."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    lengths = [64 * i for i in range(1, 138)]
    figure, axes = plt.subplots(figsize=(10, 5), constrained_layout=True)
    curves = {}  # configurations that cost the same share a curve
    for sa in [tuple(range(c.layers)), *configurations]:
        tera = tuple(prompt_flops(c, sa, text, expected_tokens(c, text, [n])) / 1e12 for n in lengths)
        curves.setdefault(tera, {})[sa_name(c, sa)] = None
    for i, (tera, names) in enumerate(curves.items()):
        colour = plt.cm.viridis(1 - i / len(curves)) if i else "black"
        axes.plot(lengths, tera, color=colour, lw=2 if i else 3, label="\n".join(names))
    axes.set(xlabel="visual tokens", ylabel="TFLOP of the language model, prefill", yscale="log",
             title=f"Cost by configuration (self-attention layers), {text} text tokens", xlim=(0, lengths[-1]))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run(main)
