"""The paper's savings beside what our formula gives. Prints the README's table.

    python -m paper.numbers

Language model of the 0.5B geometry, prefill, the paper's convention (full squares, no encoder): 5 tiles, 40 text
tokens, against dense over 729 tokens a tile. "nominal" is the ratio of visual tokens alone.
"""
from config import preset
from flops import cross_parameters, llm_flops, llm_parameters

CONFIG = preset("llava-ov-0.5b")
DENSE, FULL = tuple(range(24)), CONFIG.viable[-1]
TILES, TEXT = 5, 40


def saving(sa=DENSE, tokens=729, tiles=TILES):
    """Dense over 729 tokens a tile, divided by configuration sa over `tokens` a tile."""
    return (llm_flops(CONFIG, DENSE, TEXT, tiles * 729, paper=True)
            / llm_flops(CONFIG, sa, TEXT, round(tiles * tokens), paper=True))


def pyramid(layers, kept):
    """Saving of PyramidDrop: stages of so many layers, each over that share of the visual tokens (appendix L)."""
    head = 2 * CONFIG.hidden * CONFIG.vocab

    def layer(share):
        return (llm_flops(CONFIG, DENSE, TEXT, round(TILES * 729 * share), paper=True) - head) / 24
    return 24 * layer(1) / sum(n * layer(share) for n, share in zip(layers, kept))


def rows():
    """(what, the paper's number, ours, why they differ) of each claim."""
    easy, hard = ((1, 5, 6, 12), (1, 0.3, 0.2, 0.1)), ((4, 6, 6, 8), (1, 0.5, 0.25, 0.125))
    pyramids = (8 * pyramid(*easy) + 4 * pyramid(*hard)) / 12
    nominal = sum(sets / 12 * 24 / sum(n * share for n, share in zip(*stages))
                  for sets, stages in ((8, easy), (4, hard)))
    visor = {sa: f"{','.join(map(str, sa))}: " for sa in ((1, 4), (1, 4, 7), (1, 4, 7, 16), FULL)}

    def several(configurations, tokens=729):
        return "; ".join(f"{visor[sa]}{saving(sa, tokens):.1f}x" for sa in configurations)
    return [
        ("VISOR, average", "8.6x", several([(1, 4), (1, 4, 7), (1, 4, 7, 16)]),
         "an average over routed samples, between 2 and 4 layers"),
        ("VISOR-TR, packing 2", "up to 18x", several([(1, 4), (1, 4, 7)], 361), "likewise, between 2 and 3 layers"),
        ("VISOR-TR, more packing", "35x", several([(1, 4), (1, 4, 7)], 196), "packing 4, between 2 and 3 layers"),
        ("FastVLM, 36 tokens a tile, dense", "20x", f"{saving(tokens=36):.1f}x, nominal {729 / 36:.1f}x",
         "the paper's is nominal"),
        ("VISOR with FastVLM", "60x", several([(1, 4, 7, 16), FULL], 36), "20x nominal times 3x, as its text says"),
        ("several images", "over 3x", f"4 images, {visor[FULL]}{saving(FULL, 730, 4):.1f}x", ""),
        ("parameters added", "under 7.5 %", f"{cross_parameters(CONFIG) / llm_parameters(CONFIG):.1%}",
         "grouped keys and values; the paper does not say its heads"),
        ("VisionZip, VisPruner: 128 of 729", "5.7x", f"{saving(tokens=128):.1f}x, nominal {729 / 128:.1f}x", "nominal"),
        ("HiRED: 20 %", "5.0x", f"{saving(tokens=0.2 * 729):.1f}x, nominal 5.0x", "nominal"),
        ("Downsample: 27 x 27 to 14 x 14", "4.0x", f"{saving(tokens=196):.1f}x, nominal {729 / 196:.1f}x",
         "nominal, as if 27 were even"),
        ("M3 at 8x", "8.0x", f"{saving(tokens=729 / 8):.1f}x, nominal 8.0x", "nominal"),
        ("PyramidDrop, 8 easy and 4 hard sets", "4.2x", f"{pyramids:.1f}x, nominal {nominal:.1f}x", "nominal"),
    ]


def table():
    lines = ["| claim | paper | our formula | if they differ, why |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows()])


if __name__ == "__main__":
    print(table())
