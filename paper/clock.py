"""Smaller measurements at the 0.5B geometry with random weights: do the counted operations explain the seconds; the
first token over the overview, and with every reduction of visual tokens. What `python -m paper.bench --measure`,
`--pixels` and `--reduce` print.
"""
import statistics
import sys

import numpy as np
import torch
import torch.nn.functional as F

from config import PAPER_VIABLE, preset, sa_name
from encoders.siglip import VisionTower
from flops import connector_flops, llm_flops, prompt_flops, tower_flops
from layout import Past, make_layout
from model import Connector, LanguageModel
from paper.systems import TEXT, Ours, about, device, matmul_rate, random_module, seconds

DENSE = tuple(range(24))
MEASURED = DENSE, PAPER_VIABLE[-1], (1, 4), ()
REDUCED = {  # label: (reduction, configuration); 128 of a tile's 729 patches as in the paper's Table 1
    "dense": ("", DENSE), "VISOR, 4 layers": ("", (1, 4, 7, 10)), "VISOR, 2 layers": ("", (1, 4)),
    "VISOR, none": ("", ()), "packing 4x": ("pack:4", DENSE), "Downsample": ("downsample", DENSE),
    "M3 8x": ("m3:8", DENSE), "VisionZip": ("visionzip", DENSE), "VisPruner": ("vispruner", DENSE),
    "HiRED": ("hired", DENSE), "PyramidDrop, easy": ("pyramiddrop:easy", DENSE),
    "PyramidDrop, hard": ("pyramiddrop:hard", DENSE), "SparseVLM": ("sparsevlm", DENSE),
    "VISOR, 2 layers, packing 2x": ("pack:2", (1, 4)), "VISOR, 2 layers, VisionZip": ("visionzip", (1, 4))}


def started(tiles, dtype, rounds):
    """What a result's JSON begins with."""
    return {**about("bench"), "device": device(), "dtype": str(dtype)[6:], "tiles": tiles, "rounds": rounds,
            "text": TEXT}


# --- do the operations explain the seconds? ---------------------------------------------------------------------------

def prefill_seconds(config, configurations, vision, rounds, dtype):
    """{configuration: [seconds of the language model's prefill, once a round]}; configurations take turns."""
    torch.manual_seed(0)
    llm = random_module(LanguageModel, config, dtype)
    before = min(14, TEXT - 1)  # the system line and the start of the user's
    pos = np.arange(TEXT + vision)[None]
    t_pos, v_pos = np.concatenate([pos[:, :before], pos[:, before + vision:]], 1), pos[:, before:before + vision]
    t, v = (torch.randn(1, n, config.hidden, device=device(), dtype=dtype) for n in (TEXT, vision))

    def prefill(sa):
        layout = make_layout(t_pos, v_pos, 0 * v_pos, np.zeros((1, vision, 0), int), Past.empty(1), config, t.device)
        h = llm(t, v, layout, sa)[:, -1]
        F.linear(h, llm.embed_tokens.weight)
    for sa in configurations:
        if len(sa) < config.layers:
            seconds(prefill, sa)  # warms up
    out = {sa: [] for sa in configurations}
    for _ in range(rounds):
        for sa in configurations:
            out[sa].append(seconds(prefill, sa))
    return out


def operations(tiles, dtype, batches, rounds):
    """Encoder and prefill of a prompt in seconds, and the counted operations over the matmul rate."""
    config = preset("llava-ov-0.5b")
    tower, connector = random_module(VisionTower, config, dtype), random_module(Connector, config, dtype)
    x, vision = torch.randn(tiles, 3, config.tile, config.tile, device=device(), dtype=dtype), tiles * config.side ** 2
    seconds(lambda: connector(tower(x[:1])))
    encoder = statistics.median(seconds(lambda: connector(tower(x))) for _ in range(rounds))
    rate = matmul_rate(config, dtype=dtype)
    times = prefill_seconds(config, MEASURED, vision, rounds, dtype)
    rate = (rate + matmul_rate(config, dtype=dtype)) / 2  # before and after, as the machine may change its mind
    fixed = tower_flops(config, tiles) + connector_flops(config, tiles)
    return {**started(tiles, dtype, rounds), "visual_tokens": vision, "matmul": rate, "rows": [
        {"sa": sa_name(config, sa), "encoder": encoder, "llm": statistics.median(times[sa]),
         "counted": (fixed + llm_flops(config, sa, TEXT, vision)) / rate} for sa in MEASURED]}


def operations_table(result):
    lines = ["| seconds | encoder | LLM prefill | sum | counted | sum / counted |", "|---" * 6 + "|"]
    for x in result["rows"]:
        total = x["encoder"] + x["llm"]
        lines.append(f"| {x['sa']} | {x['encoder']:.2f} | {x['llm']:.2f} | {total:.2f} | {x['counted']:.2f} | "
                     f"{total / x['counted']:.2f} |")
    return "\n".join(lines)


# --- pixels on request ------------------------------------------------------------------------------------------------

def pixels(tiles, dtype, batches, rounds):
    """Seconds to the first token of one prompt in layers 1,4: with all tiles, over the overview, and asked first, which
    of the two the router wants."""
    ours = Ours(preset("llava-ov-0.5b"), dtype)
    prompts, _ = ours.prompts(tiles, 1)
    ways = {"all": ("all", 0.0), "overview": ("overview", 0.0), "asked first, then all": ("auto", 1.0),
            "asked first, overview": ("auto", 0.0)}  # pixels, and the probability from which the overview will do
    found = {label: [] for label in ways}
    for i in range(rounds + 1):  # the first warms up
        for label, (seen, threshold) in ways.items():
            ours.model.config.pixel_threshold, routes = threshold, []
            took = seconds(lambda: ours.model.generate(prompts, "auto", seen, max_tokens=1, routes=routes,
                                                       allowed=[(1, 4)]))
            assert (routes[0].pixels == "all") == label.endswith("all")
            found[label] += [took] * (i > 0)
    return {**started(tiles, dtype, rounds), "visual_tokens": len(prompts[0].v_pos),
            "rows": [{"pixels": label, "first": statistics.median(x)} for label, x in found.items()]}


def pixels_table(result):
    every = result["rows"][0]["first"]
    lines = ["| first token, layers 1,4 | s | times sooner |", "|---|---|---|"]
    return "\n".join(lines + [f"| {r['pixels']} | {r['first']:.2f} | {every / r['first']:.2f} |"
                              for r in result["rows"]])


# --- reductions of visual tokens --------------------------------------------------------------------------------------

def reductions(tiles, dtype, batches, rounds):
    """Rows of medians over the rounds, in which the systems take turns; operations are of one prompt, as it ran."""
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
    return {**started(tiles, dtype, rounds), "rows": rows}


def reductions_table(result):
    """Markdown, a table for each batch size."""
    lines = []
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
    return "\n".join(lines).strip()


KINDS = {  # of paper.bench's flags: (the JSON object of tiles, dtype, batches and rounds; that as lines)
    "measure": (operations, operations_table), "pixels": (pixels, pixels_table),
    "reduce": (reductions, reductions_table)}
