"""How fast, against what people use today: transformers' LLaVA-OneVision, ours dense, and VISOR's configurations.

    python -m paper.bench             every row, paper/results/bench-DEVICE-DTYPE.json and .png; 40 minutes on 2 cores
    python -m paper.bench --quick     5 tiles, a few rows, one round; nothing is written
    python -m paper.bench --compare   --quick against that JSON: a ratio that fell by more than a fifth is an error
    python -m paper.bench --measure   seconds of encoder and prefill against the operations that flops.py counts
    python -m paper.bench --pixels    seconds to the first token over the overview, and what asking first costs
    python -m paper.bench --reduce    likewise with every reduction of visual tokens
                                      (these three write bench-KIND-DEVICE-DTYPE.json
                                      unless it is of more rounds)

Random weights of the 0.5B geometry. Systems take turns, so that a busy machine slows all alike; medians of the rounds.
An encoder is timed once a round; a row's first token is encoder and prefill, its whole an answer too. transformers runs
without its generate(): its modules, one call a token, with sdpa. (Paper, section 6, "Efficiency analysis".)
"""
import json
import statistics
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cli import Parser, choose_dtype, run, timer
from config import PAPER_VIABLE, preset
from data import collate, tiling
from flops import answer_flops, cache_bytes, connector_flops, llm_flops, router_flops, tower_flops
from paper import clock
from paper.systems import (ANSWER, IMAGES, TEXT, Kernels, Ours, Theirs, about, bandwidth, conditions, device,
                           matmul_rate, peak_bytes)
from parallel import LossModule
from stages import set_trainable
from train import optimizers

RESULTS = Path(__file__).parent / "results"
SYSTEMS = {  # label: (configuration, packing)
    "transformers": (None, 1), "dense": (tuple(range(24)), 1), "7": (PAPER_VIABLE[-1], 1), "4": ((1, 4, 7, 10), 1),
    "2": ((1, 4), 1), "none": ((), 1), "2, packed": ((1, 4), 2), "2, routed": ("auto", 1)}
QUICK = ("transformers", "dense", "2", "none")
RATIOS = "over_transformers", "over_dense", "realised"   # what --compare looks at


# --- measuring --------------------------------------------------------------------------------------------------------

def kernel_counts(config, labels):
    """{label: {"prefill", "token"}}: the kernels that are started for a prompt of one tile and for each further token,
    without the encoder. They depend on the number of layers, not on their width."""
    c = replace(config, hidden=config.heads * 8, head_dim=8, ffn=32, vocab=300, vision_hidden=16, vision_heads=2,
                vision_ffn=16, vision_layers=1)
    ours, found = Ours(c, torch.float32), {}
    ours.model.train()  # or on CUDA a graph would start them as one
    for label in labels:
        sa, pack = SYSTEMS[label]
        system, counts = Theirs(c, torch.float32) if sa is None else ours, []
        ours.model.config.reduce = f"pack:{pack}"
        prompts, images = ours.prompts(1, 1)
        seen = system.encode(images)
        for tokens in (1, 2, 4):  # the second makes the layout of all that follow
            with Kernels() as kernels:
                system.answer(prompts, seen, sa, {}, tokens)
            counts.append(kernels.total)
        found[label] = {"prefill": counts[0], "token": (counts[2] - counts[1]) / 2}
    return found


def measure(ours, theirs, labels, tiles, batch, rounds):
    """{label: {"encoder": seconds, "prefill", "decode" (a token), "peak": bytes that answering takes on top of weights
    and visual tokens}}: medians, for prompts of one image; on CUDA after a round in which its kernels are chosen."""
    runs = {label: [] for label in labels}
    for i in range(device() != "cuda", rounds + 1):
        encoded = {}
        for label in labels if i % 2 else reversed(labels):
            sa, pack = SYSTEMS[label]
            system, key = (theirs, "theirs") if sa is None else (ours, pack)
            ours.model.config.reduce = f"pack:{pack}"
            prompts, images = ours.prompts(tiles, batch)
            timings = {}
            if key not in encoded:
                with timer(timings, "encoder", device()):
                    seen = system.encode(images)
                encoded[key] = timings["encoder"], seen
            timings["encoder"], seen = encoded[key]
            before = peak_bytes(reset=True)
            system.answer(prompts, seen, sa, timings, ANSWER)
            if i:
                timings["decode"] /= ANSWER - 1
                runs[label].append({**timings, "peak": peak_bytes() - before})
    ours.model.config.reduce = ""
    return {label: {k: statistics.median(r[k] for r in found) for k in found[0]} for label, found in runs.items()}


def rows(config, found, tiles, batch, rate, speed, itemsize):
    """What `measure` found, with what follows from it and from the operations that flops.py counts."""
    out = []
    for label, m in found.items():
        sa, pack = SYSTEMS[label]
        c = config
        sa, routed = ((1, 4), True) if sa == "auto" else (tuple(range(c.layers)) if sa is None else sa, False)
        c.reduce = f"pack:{pack}"
        size = IMAGES[tiles]
        vision = tiling(*(size or (c.tile,) * 2), c, single_image=size is not None).tokens
        llm = batch * (llm_flops(c, sa, TEXT, vision) + (router_flops(c, TEXT, vision) if routed else 0))
        flop = llm + batch * (tower_flops(c, tiles) + connector_flops(c, tiles)
                              + answer_flops(c, sa, TEXT, vision, ANSWER))
        c.reduce = ""
        cache = batch * cache_bytes(c, sa, TEXT + ANSWER, vision, itemsize)
        read = itemsize * weights_read(c, sa) + cache  # by one step of decoding
        first = m["encoder"] + m["prefill"]
        total = first + (ANSWER - 1) * m["decode"]
        out.append({"system": label, "tiles": tiles, "batch": batch, "visual_tokens": vision, **m, "first": first,
                    "total": total, "encoder_share": m["encoder"] / first,
                    "prompts_per_second": batch / (total - m["encoder"]),
                    "tokens_per_second": batch * (TEXT + vision + ANSWER) / total, "cache": cache, "llm_flop": llm,
                    "matmul_share": flop / total / rate, "bandwidth_share": read / m["decode"] / speed})
    by = {r["system"]: r for r in out}
    for r in out:
        for other in ("transformers", "dense"):
            if other in by:
                r[f"over_{other}"] = {k: by[other][k] / r[k] for k in ("encoder", "prefill", "decode", "first",
                                                                             "total")}
        if "dense" in by and r["system"] not in ("transformers", "dense"):
            r["realised"] = by["dense"]["prefill"] / r["prefill"] / (by["dense"]["llm_flop"] / r["llm_flop"])
    return out


def weights_read(c, sa):
    """Parameters that decoding a token reads: the layers and the head; cross-attention's q and o."""
    wide = c.heads * c.head_dim
    return c.hidden * (c.layers * (2 * wide + 2 * c.kv_heads * c.head_dim + 3 * c.ffn) + c.vocab
                       + len(c.vision_readers(sa)[0]) * 2 * wide)


def training(ours, config, tiles, batch, rate, dtype):
    """Tokens/s of a training step, loss to update, and its operations as a share of the matmul rate: rows for dense
    training, stage 1 and stage 2, these the mean over the viable configurations. An operation forward is two backward;
    of frozen weights one, of a frozen encoder none."""
    model, out = ours.model.remove_router().float(), []
    drawn = Counter(config.viable)
    model.encode = ours.real
    prompts, _ = ours.prompts(tiles, batch)
    batch_of, labels = collate(prompts), np.full((batch, TEXT), -1)
    labels[:, -8:] = 7
    for label, stage in (("dense", 2), ("stage 1", 1), ("stage 2", 2)):
        set_trainable(model, stage)
        opts, vision = optimizers(model, 1e-5), len(prompts[0].v_pos)
        loss_module, spent, flop = LossModule(model), 0.0, 0.0
        shares = Counter([tuple(range(config.layers))]) if label == "dense" else drawn
        peak_bytes(reset=True)
        for warm, (sa, share) in [(True, x) for x in [*shares.items()][:1]] + [(False, x) for x in shares.items()]:
            encoder = tower_flops(config, tiles) + connector_flops(config, tiles)
            start = time.perf_counter()
            with torch.autocast(device(), torch.bfloat16, enabled=dtype == torch.bfloat16):
                (loss_module(batch_of, labels, sa) / batch).backward()
            for opt, _, _ in opts.values():
                opt.step()
                opt.zero_grad()
            if device() == "cuda":
                torch.cuda.synchronize()
            share *= not warm
            spent += share / shares.total() * (time.perf_counter() - start)
            flop += share / shares.total() * batch * (llm_flops(config, sa, TEXT, vision) * (2 if stage == 1 else 3)
                                                      + encoder * (1 if stage == 1 else 3))
        out.append({"training": label, "tiles": tiles, "batch": batch, "seconds": spent, "peak": peak_bytes(),
                    "tokens_per_second": batch * (TEXT + vision) / spent, "matmul_share": flop / spent / rate})
        del opts, opt  # or its states would count for the next row
    return out


# --- showing ----------------------------------------------------------------------------------------------------------

def short_table(result):
    """How much faster than transformers one prompt of 5 tiles is: three rows, as markdown."""
    found = {r["system"]: r["over_transformers"] for r in result["rows"] if (r["tiles"], r["batch"]) == (5, 1)}
    lines = ["| | prefill | first token, encoder included |", "|---|---|---|"]
    return "\n".join(lines + [f"| {label} | {found[system]['prefill']:.1f}x | {found[system]['first']:.2f}x |" for
                              label, system in (("ours, dense", "dense"), ("2 self-attention layers", "2"),
                                                ("none", "none"))])


def table(result):
    """The rows as markdown, a table for each number of tiles and batch size."""
    lines, found, kernels = [], result["rows"], result.get("kernels")
    for key in dict.fromkeys((r["tiles"], r["batch"]) for r in found):
        here = [r for r in found if (r["tiles"], r["batch"]) == key]
        lines += ["", f"{key[0]} tiles, {here[0]['visual_tokens']:,} visual tokens, batch {key[1]}:", "",
                  "| layers | encoder s | prefill s | faster | realised | first token s | faster | encoder | "
                  f"token ms | faster | with {ANSWER} tokens s | faster | prompts/s | matmul | bandwidth | KV MB |",
                  "|---" * 16 + "|"]
        for r in here:
            over = r.get("over_transformers") or r.get("over_dense")
            lines.append(f"| {r['system']} | {r['encoder']:.2f} | {r['prefill']:.3f} | {over['prefill']:.1f}x | "
                         + (f"{r['realised']:.0%}" if "realised" in r else "-")
                         + f" | {r['first']:.2f} | {over['first']:.2f}x | {r['encoder_share']:.0%} | "
                         f"{1000 * r['decode']:.1f} | {over['decode']:.2f}x | "
                         f"{r['total']:.2f} | {over['total']:.2f}x | {r['prompts_per_second']:.3g} | "
                         f"{r['matmul_share']:.0%} | {r['bandwidth_share']:.0%} | {r['cache'] / 1e6:.0f} |")
    if kernels:
        lines += ["", "| kernels started |" + "".join(f" {label} |" for label in kernels),
                  "|---" * (1 + len(kernels)) + "|"]
        lines += [f"| {what} |" + "".join(f" {n[what]:,.0f} |" for n in kernels.values())
                  for what in ("prefill", "token")]
    if result.get("training"):
        lines += ["", "| training | tiles | batch | s a step | tokens/s | matmul | GB |", "|---" * 7 + "|"]
        lines += [f"| {r['training']} | {r['tiles']} | {r['batch']} | {r['seconds']:.2f} | "
                  f"{r['tokens_per_second']:,.0f} | {r['matmul_share']:.0%} | {r['peak'] / 1e9:.1f} |"
                  for r in result["training"]]
    return "\n".join(lines).strip()


def fallen(before, now, by=0.2):
    """Lines about ratios of `now` that are more than `by` below those of the same rows before."""
    old = {(r["system"], r["tiles"], r["batch"]): r for r in before["rows"]}
    lines = []
    for r in now["rows"]:
        o = old.get((r["system"], r["tiles"], r["batch"]), {})
        for ratio in RATIOS:
            pairs = r.get(ratio, {}), o.get(ratio, {})
            if not isinstance(pairs[0], dict):
                pairs = {"": pairs[0]}, {"": pairs[1] or 0}
            lines += [f"{r['system']}, {r['tiles']} tiles, batch {r['batch']}: {ratio} {k} {o:.2f} -> {pairs[0][k]:.2f}"
                      for k, o in pairs[1].items() if k in pairs[0] and pairs[0][k] < (1 - by) * o]
    return lines


def plot(result, path):
    """Two panels: seconds end to end, stacked; the language model's saving in operations against that in time. Of 5
    tiles and the largest batch that has all systems: on a GPU the work of a single prompt is smaller than its start."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    batch = max(r["batch"] for r in result["rows"] if (r["tiles"], r["system"]) == (5, "2, routed"))
    here = [r for r in result["rows"] if (r["tiles"], r["batch"]) == (5, batch)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    start = [0.0] * len(here)
    for part, colour in (("encoder", "#9aa5b1"), ("prefill", "#3b6ea8"), ("decode", "#e0883a")):
        size = [r[part] * (ANSWER - 1 if part == "decode" else 1) for r in here]
        left.barh([r["system"] for r in here], size, left=start, color=colour,
                  label=f"{ANSWER - 1} tokens" if part == "decode" else part)
        start = [a + b for a, b in zip(start, size)]
    left.invert_yaxis()
    left.set_xlabel("seconds, end to end")
    left.legend()
    dense = next(r for r in here if r["system"] == "dense")
    for r in here:
        if "realised" in r:
            x, y = dense["llm_flop"] / r["llm_flop"], dense["prefill"] / r["prefill"]
            right.plot(x, y, "o", color="#3b6ea8")
            slower = any(o["prefill"] < r["prefill"] for o in here if 0.99 < o["llm_flop"] / r["llm_flop"] < 1.01)
            right.annotate(r["system"], (x, y), textcoords="offset points", xytext=(6, -14 if slower else -4))
    top = max(dense["llm_flop"] / r["llm_flop"] for r in here)
    right.plot([1, top], [1, top], color="#9aa5b1", lw=1, label="every operation saved is time saved")
    right.set(xscale="log", yscale="log", xlim=(0.8, 2 * top), ylabel="faster, times",
              xlabel="fewer operations, LLM prefill, times")
    right.legend()
    figure.suptitle(f"{result['machine']}, {result['dtype']}, 5 tiles, batch {batch}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(argv=None):
    p = Parser(doc=__doc__, description="How fast, against transformers' LLaVA-OneVision and ours dense.")
    p.add_argument("--tiles", type=int, action="append", choices=list(IMAGES), help="tiles of the image; may be "
                   "given several times (default: 1, 5, on CUDA 10, too)")
    p.add_argument("--batch", type=int, action="append", metavar="N", help="prompts at once; may be given several "
                   "times (default: 1; with one tile also 4 and 16, one round of the --quick rows; on CUDA 8 and 64, "
                   "as far as they fit)")
    p.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="may be given several times "
                   "(default: bfloat16 on CUDA; else float32, and bfloat16 where the processor has AMX tiles)")
    p.add_argument("--rounds", type=int, metavar="N", help="(default: 3; --quick: 1)")
    p.add_argument("--quick", action="store_true", help="5 tiles, transformers, dense, 2 and no layers, one round")
    p.add_argument("--compare", action="store_true", help="--quick, then against the JSON of this kind of device; exit "
                   "status 1 if a ratio is more than 20 %% lower")
    p.add_argument("--compile", action="store_true", help="ours compiled, see VLM.compile")
    p.add_argument("--measure", action="store_true", help="encoder and prefill of the first of --tiles (default: 5) "
                   "in four configurations, beside the operations that flops.py counts")
    p.add_argument("--pixels", action="store_true", help="time to the first token, of the first of --tiles "
                   "(default: 5): all tiles, the overview, asked first")
    p.add_argument("--reduce", action="store_true", help="time to the first token, of the first of --tiles "
                   "(default: 5): VISOR's configurations and the reductions of visual tokens")
    p.add_argument("--plot", action="store_true", help="only draw the JSON of this kind of device again")
    args = p.parse_args(argv)
    if (args.rounds or 1) < 1 or min(args.batch or [1]) < 1:
        p.error("--rounds and --batch: give at least 1")
    return args


def main(argv=None):
    args = parse(argv)
    fast = choose_dtype("auto", device(), 1e9)[0]
    for kind, (measured, table_of) in clock.KINDS.items():
        if getattr(args, kind):
            dtype = getattr(torch, args.dtype[0]) if args.dtype else fast
            result = measured((args.tiles or [5])[0], dtype, args.batch or [1, 8], args.rounds or 3)
            file = RESULTS / f"bench-{kind}-{device()}-{result['dtype']}.json"
            had = json.loads(file.read_text())["rounds"] if file.is_file() else 0
            if result["rounds"] < had:
                print(f"{file} is of more rounds, and stays as it is", file=sys.stderr)
            elif not (args.tiles or args.batch):
                file.write_text(json.dumps(result, indent=1) + "\n")
            return print(f"{textwrap.fill(conditions(result), 80)}\n\n{table_of(result)}")
    dtypes = args.dtype or dict.fromkeys([str(fast)[6:]] if device() == "cuda" else ["float32", str(fast)[6:]])
    files, failed = {dtype: RESULTS / f"bench-{device()}-{dtype}.json" for dtype in dtypes}, []
    for dtype, committed in files.items() if args.plot or args.compare else ():
        if not committed.is_file():
            raise ValueError(f"{committed} is missing: make it with python -m paper.bench, or name others by --dtype")
    for dtype, committed in files.items():
        if args.plot:
            plot(json.loads(committed.read_text()), committed.with_suffix(".png"))
            continue
        quick = args.quick or args.compare
        whole = not (quick or args.tiles or args.batch)
        sizes = args.tiles or ([5] if quick else list(IMAGES) if device() == "cuda" else [1, 5])
        result = bench(preset("llava-ov-0.5b"), QUICK if quick else tuple(SYSTEMS), sizes, args.batch or [1],
                       args.rounds or (1 if quick else 3), getattr(torch, dtype), args.compile, whole)
        print(f"{textwrap.fill(conditions(result), 80)}\n\n{table(result)}\n")
        print(json.dumps(result))
        if whole and not result["transformers"]:
            print(f"{committed} stays as it is: transformers' row is missing", file=sys.stderr)
        elif whole:
            committed.write_text(json.dumps(result, indent=1) + "\n")
            plot(result, committed.with_suffix(".png"))
        if args.compare:
            failed += fallen(json.loads(committed.read_text()), result)
    if failed:
        print("\n".join(failed), file=sys.stderr)
        raise SystemExit(1)


def bench(config, labels, sizes, batches, rounds, dtype=torch.float32, compiled=False, whole=True):
    """All rows; the JSON object that main prints. whole: more batches too, as far as they fit, and training."""
    rate, speed, version = matmul_rate(config, dtype=dtype), bandwidth(config, dtype), None
    ours = Ours(config, dtype)
    try:
        theirs = Theirs(config, dtype) if "transformers" in labels else None
        from transformers import __version__ as version
    except ImportError:
        print("transformers is not installed, its row is left out: pip install transformers", file=sys.stderr)
        labels, theirs = [x for x in labels if x != "transformers"], None
    if compiled:
        ours.model.compile()
    found = []
    measure(ours, theirs, labels, 1, 1, 1)  # warms up
    for tiles in sizes:
        todo = list(batches)
        if whole:
            todo += [8, 64] if device() == "cuda" else [4, 16] if tiles == 1 else []
        for batch in todo:
            print(f"{str(dtype)[6:]}, {tiles} tiles, batch {batch}", file=sys.stderr)
            some = labels if batch in batches or device() == "cuda" else [x for x in labels if x in QUICK]
            try:
                measured = measure(ours, theirs, some, tiles, batch, rounds if some is labels else 1)
            except torch.cuda.OutOfMemoryError:
                ours.model.config.reduce = ""
                torch.cuda.empty_cache()
                break
            found += rows(config, measured, tiles, batch, rate, speed, dtype.itemsize)
    del theirs
    trained = training(ours, config, 5 if device() == "cuda" else 1, 1, rate, dtype) if whole else []
    return {**about("bench"), "transformers": version, "dtype": str(dtype)[6:], "text": TEXT,
            "answer": ANSWER, "matmul": rate, "bandwidth": speed, "compiled": compiled,
            "kernels": kernel_counts(config, labels), "rows": found, "training": trained}


if __name__ == "__main__":
    run(main)
