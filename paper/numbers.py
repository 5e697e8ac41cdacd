"""The paper's savings beside what our formula gives, and savings by encoder: two tables of paper/README.md.

    python -m paper.numbers

Language model of the 0.5B geometry, prefill, the paper's convention (full squares, no encoder): 5 tiles, 40 text
tokens, against dense over 729 tokens a tile. "nominal" is the ratio of visual tokens alone.
"""
from dataclasses import replace

from cli import Parser, run
from config import preset
from data import tiling
from flops import (by_layer, cross_parameters, encoder_flops, expected_tokens, llm_flops, llm_parameters,
                   prompt_flops)

CONFIG = preset("llava-ov-0.5b")
DENSE, FULL = tuple(range(24)), CONFIG.viable[-1]
TILES, TEXT = 5, 40
FEW = preset("llava-ov-0.5b-fastvithd").patches ** 2  # tokens a tile (appendix K, Table 11)


QWEN, PICTURE = preset("qwen2-vl-2b"), (1036, 1036)  # appendix H, Table 6


def saving(sa=DENSE, tokens=729, tiles=TILES):
    """Dense over 729 tokens a tile, divided by configuration sa over `tokens` a tile."""
    return (llm_flops(CONFIG, DENSE, TEXT, tiles * 729, paper=True)
            / llm_flops(CONFIG, sa, TEXT, round(tiles * tokens), paper=True))


def on_qwen(sa):
    """Dense Qwen2-VL-2B over a picture, divided by configuration sa."""
    dense, own = (llm_flops(QWEN, x, TEXT, tiling(*PICTURE, QWEN).tokens, paper=True) for x in (range(28), sa))
    return dense / own


def reduced(reduce, sa=DENSE):
    """(saving, nominal) of a reduction: operations, and visual tokens over all layers, of dense over its own."""
    c = replace(CONFIG, reduce=reduce)
    vision = expected_tokens(c, TEXT, [c.reduction.tokens(c.patches, TILES)])
    tokens = sum(len(layers) * sum(counts) for layers, counts in by_layer(c, vision))
    return (llm_flops(CONFIG, DENSE, TEXT, TILES * 729, paper=True) / prompt_flops(c, sa, TEXT, vision, paper=True),
            24 * TILES * 729 / tokens)


def of(reduce):
    """Both for the table."""
    found, nominal = reduced(reduce)
    return f"{found:.1f}x, nominal {nominal:.1f}x"


def rows():
    """(what, the paper's number, ours, why they differ) of each claim."""
    pyramids = [(8 * a + 4 * b) / 12 for a, b in zip(reduced("pyramiddrop:easy"), reduced("pyramiddrop:hard"))]
    visor = {sa: f"{','.join(map(str, sa))}: " for sa in ((1, 4), (1, 4, 7), (1, 4, 7, 16), FULL)}

    def several(configurations, tokens=729):
        return "; ".join(f"{visor[sa]}{saving(sa, tokens):.1f}x" for sa in configurations)
    return [
        ("VISOR, average", "8.6x", several([(1, 4), (1, 4, 7), (1, 4, 7, 16)]),
         "an average over routed samples, between 2 and 4 layers"),
        ("VISOR-TR, packing 2", "up to 18x", several([(1, 4), (1, 4, 7)], 361), "likewise, between 2 and 3 layers"),
        ("VISOR-TR, more packing", "35x", several([(1, 4), (1, 4, 7)], 196), "packing 4, between 2 and 3 layers"),
        ("FastVLM, 36 tokens a tile, dense", "20x", f"{saving(tokens=FEW):.1f}x, nominal {729 / FEW:.1f}x",
         "the paper's is nominal"),
        ("VISOR with FastVLM", "60x", several([(1, 4, 7, 16), FULL], FEW), "20x nominal times 3x, as its text says"),
        ("VISOR on Qwen2-VL-2B", "Table 6", "; ".join(f"{','.join(map(str, sa))}: {on_qwen(sa):.1f}x" for sa in (
            (1, 4), (1, 4, 7), (1, 4, 7, 19))), f"{tiling(*PICTURE, QWEN).tokens:,} visual tokens; a picture's number "
         "follows its size"),
        ("several images", "over 3x", f"4 images, {visor[FULL]}{saving(FULL, 730, 4):.1f}x", ""),
        ("parameters added", "under 7.5 %", f"{cross_parameters(CONFIG) / llm_parameters(CONFIG):.1%}",
         "grouped keys and values; the paper does not say its heads"),
        ("VisionZip, VisPruner: 128 of 729", "5.7x", of("visionzip"), "nominal"),
        ("HiRED: 20 %", "5.0x", of("hired"), "nominal"),
        ("Downsample: 27 x 27 to 14 x 14", "4.0x", of("downsample"), "nominal, as if 27 were even"),
        ("M3 at 8x: 27 x 27 to 10 x 10", "8.0x", of("m3:8"), "nominal, as if 27 had such a side"),
        ("PyramidDrop, 8 easy and 4 hard sets", "4.2x", "{:.1f}x, nominal {:.1f}x".format(*pyramids), "nominal"),
        ("SparseVLM", "4.5x", of("sparsevlm"), "its setting is not given; ours is made to meet it"),
    ]


def backbones():
    """Markdown: visual tokens, and how many times fewer operations two configurations take than dense, by encoder and
    size; in brackets to the first token, encoder included."""
    lines = ["| | visual tokens | 1,4 | 1,4,7 | what the encoder is of dense |", "|---|---|---|---|---|"]
    for label, name, size in (("LLaVA-OneVision 0.5B", "llava-ov-0.5b", 768),
                              ("the same with FastViTHD", "llava-ov-0.5b-fastvithd", 768),
                              ("FastVLM 0.5B", "fastvlm-0.5b", 1024), ("FastVLM 7B", "fastvlm-7b", 1024),
                              ("Qwen2-VL-2B", "qwen2-vl-2b", 1036), ("Qwen2-VL-7B", "qwen2-vl-7b", 1036)):
        c = preset(name)
        seen = tiling(size, size, c)
        encoder = encoder_flops(c, [seen])
        dense, *own = (llm_flops(c, sa, TEXT, seen.tokens) for sa in (range(c.layers), (1, 4), (1, 4, 7)))
        cells = " | ".join(f"{dense / x:.1f}x ({(dense + encoder) / (x + encoder):.2f}x)" for x in own)
        lines.append(f"| {label}, {size} x {size} | {seen.tokens:,} | {cells} | {encoder / (dense + encoder):.0%} |")
    return "\n".join(lines)


def table():
    lines = ["| claim | paper | our formula | if they differ, why |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows()])


def main(argv=None):
    Parser(doc=__doc__, description="The paper's savings beside our formula's; savings by encoder.").parse_args(argv)
    print(f"{table()}\n\n{backbones()}")


if __name__ == "__main__":
    run(main)
