"""Seconds to the first token, at the 0.5B geometry with random weights: over the overview, and with every reduction of
visual tokens. What `python -m paper.bench --pixels` and `--reduce` print.
"""
import statistics
import sys

import torch

from config import preset
from flops import connector_flops, prompt_flops, tower_flops
from paper.systems import TEXT, Ours, device, machine, seconds

DENSE = tuple(range(24))
REDUCED = {  # label: (reduction, configuration); 128 of a tile's 729 patches as in the paper's Table 1
    "dense": ("", DENSE), "VISOR, 4 layers": ("", (1, 4, 7, 10)), "VISOR, 2 layers": ("", (1, 4)),
    "VISOR, none": ("", ()), "packing 4x": ("pack:4", DENSE), "Downsample": ("downsample", DENSE),
    "M3 8x": ("m3:8", DENSE), "VisionZip": ("visionzip", DENSE), "VisPruner": ("vispruner", DENSE),
    "HiRED": ("hired", DENSE), "PyramidDrop, easy": ("pyramiddrop:easy", DENSE),
    "PyramidDrop, hard": ("pyramiddrop:hard", DENSE), "SparseVLM": ("sparsevlm", DENSE),
    "VISOR, 2 layers, packing 2x": ("pack:2", (1, 4)), "VISOR, 2 layers, VisionZip": ("visionzip", (1, 4))}


def pixel_seconds(tiles, dtype, rounds):
    """{label: [seconds to the first token, once a round]} of one prompt in layers 1,4: with all tiles, over the
    overview, and asked first, which of the two the router wants."""
    ours = Ours(preset("llava-ov-0.5b"), dtype)
    prompts, _ = ours.prompts(tiles, 1)
    ways = {"all": ("all", 0.0), "overview": ("overview", 0.0), "asked first, then all": ("auto", 1.0),
            "asked first, overview": ("auto", 0.0)}  # pixels, and the probability from which the overview will do
    found = {label: [] for label in ways}
    for i in range(rounds + 1):  # the first warms up
        for label, (pixels, threshold) in ways.items():
            ours.model.config.pixel_threshold, routes = threshold, []
            took = seconds(lambda: ours.model.generate(prompts, "auto", pixels, max_tokens=1, routes=routes,
                                                       allowed=[(1, 4)]))
            assert (routes[0].pixels == "all") == label.endswith("all")
            found[label] += [took] * (i > 0)
    return found


def pixels_table(found, tiles, dtype):
    """Medians, and their ratios to all tiles, as lines."""
    every = statistics.median(found["all"])
    lines = [f"{machine()}, {str(dtype)[6:]}, {tiles} tiles, layers 1,4, medians of {len(found['all'])}", "",
             "| first token | s | times sooner |", "|---|---|---|"]
    return "\n".join(lines + [f"| {label} | {statistics.median(x):.2f} | {every / statistics.median(x):.2f} |"
                              for label, x in found.items()])


def reductions(tiles, dtype, batches, rounds):
    """The JSON object of --reduce: rows of medians over the rounds, in which the systems take turns; operations are of
    one prompt, as it ran."""
    ours, rows = Ours(preset("llava-ov-0.5b"), dtype), []
    model, dense_flop = ours.model, None
    for batch in batches:
        times = {label: [] for label in REDUCED}
        for i in range(rounds + 1):  # the first warms up; on a CPU there is little to warm
            for label, (reduce, sa) in REDUCED.items() if i or device() == "cuda" else ():
                model.config.reduce = reduce
                prompts, tokens, timings = ours.prompts(tiles, batch)[0], [], {}
                took = seconds(lambda: model.generate(prompts, sa, max_tokens=1, timings=timings, layer_tokens=tokens))
                times[label] += [(took, timings["encoder"], timings["prefill"], timings.get("select", 0.0))] * (i > 0)
                print(f"batch {batch}, round {i}, {label}: {took:.2f} s", file=sys.stderr)
                if i == rounds:
                    c, vision = model.config, len(prompts[0].v_pos)
                    llm = prompt_flops(c, sa, TEXT, tokens[0] or vision)
                    dense_flop = dense_flop or llm
                    first, encoder, prefill, select = (statistics.median(x) for x in zip(*times[label]))
                    rows.append({
                        "system": label, "reduce": reduce, "batch": batch, "visual_tokens": vision, "first": first,
                        "encoder": encoder, "prefill": prefill, "select": select, "llm_flop": llm,
                        "encoder_flop": tower_flops(c, tiles) + connector_flops(c, tiles),
                        "llm_saving": dense_flop / llm, "prompts_per_second": batch / first})
    model.config.reduce = ""
    return {"command": " ".join(["python -m paper.bench", *sys.argv[1:]]), "machine": machine(),
            "torch": torch.__version__, "device": device(), "dtype": str(dtype)[6:], "tiles": tiles, "rounds": rounds,
            "text": TEXT, "rows": rows}


def reductions_table(result):
    """Markdown, a table for each batch size."""
    lines = [f"{result['machine']}, {result['dtype']}, {result['tiles']} tiles, medians of {result['rounds']} rounds"]
    for batch in dict.fromkeys(r["batch"] for r in result["rows"]):
        here = [r for r in result["rows"] if r["batch"] == batch]
        dense = here[0]
        lines += ["", f"Batch {batch}:", "", "| | LLM operations | LLM prefill ms | faster | realised | selecting ms | "
                  "encoder ms | first token ms | sooner | prompts/s |", "|---" * 10 + "|"]
        for r in here:
            faster = dense["prefill"] / r["prefill"]
            ms = {k: f"{1000 * r[k]:,.0f}" for k in ("prefill", "select", "encoder", "first")}
            cells = (r["system"], f"{r['llm_saving']:.1f}x fewer", ms["prefill"], f"{faster:.1f}x",
                     f"{faster / r['llm_saving']:.0%}", ms["select"], ms["encoder"], ms["first"],
                     f"{dense['first'] / r['first']:.2f}x", f"{r['prompts_per_second']:.3g}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
