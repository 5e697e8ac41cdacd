"""How much of the saving in operations becomes a saving in time: LLM prefill of several configurations in one run.

    python -m paper.bench

The language model of the 0.5B geometry gets random weights; a 768 x 768 picture (5 tiles) stands in the prompt as in
LLaVA-OneVision. Configurations take turns, so that a busy machine slows all of them alike; medians are printed, and
one line of JSON at the end. (Paper, section 6, "Efficiency analysis".)
"""
import argparse
import json
import platform
import statistics
import time

import torch

from config import PAPER_VIABLE, preset
from data import tiling
from flops import connector_flops, llm_flops, name, tower_flops
from model import Connector, LanguageModel, VisionTower


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as f:
        name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_module(kind, config, dtype=torch.float32):
    """A module with random weights, made without initialising it twice."""
    with torch.device("meta"):
        module = kind(config)
    module = module.to_empty(device=device()).to(dtype).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return module


@torch.inference_mode()
def seconds(run, *args):
    """Wall time of run(*args)."""
    start = time.perf_counter()
    run(*args)
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def prefill_seconds(config, configurations, text, vision, repeat, dtype=torch.float32):
    """{configuration: [seconds of the language model's prefill, once a round]}; configurations take turns."""
    torch.manual_seed(0)
    llm = random_module(LanguageModel, config, dtype)
    before = min(14, text - 1)  # the system line and the start of the user's
    pos = torch.arange(text + vision, device=device())[None]
    t_pos, v_pos = torch.cat([pos[:, :before], pos[:, before + vision:]], 1), pos[:, before:before + vision]
    t, v = (torch.randn(1, n, config.hidden, device=device(), dtype=dtype) for n in (text, vision))

    def prefill(sa):
        h = llm(t, v, t_pos, v_pos, sa)[:, -1]
        torch.nn.functional.linear(h, llm.embed_tokens.weight)
    for sa in configurations:
        if len(sa) < config.layers:
            seconds(prefill, sa)  # warms up
    out = {sa: [] for sa in configurations}
    for _ in range(repeat):
        for sa in configurations:
            out[sa].append(seconds(prefill, sa))
    return out


def matmul_rate(config, n=4096):
    """FLOP/s of the language model's largest product over n tokens, median of 9."""
    x, w = torch.randn(n, config.hidden, device=device()), torch.randn(config.ffn, config.hidden, device=device())
    times = [seconds(torch.nn.functional.linear, x, w) for _ in range(12)][3:]
    return 2 * n * config.hidden * config.ffn / statistics.median(times)


def explain_seconds(config, configurations, text, vision, tiles, repeat=3):
    """For `flops.py --measure`: encoder and prefill in seconds, and the counted operations over the matmul rate."""
    tower, connector = random_module(VisionTower, config), random_module(Connector, config)
    x = torch.randn(tiles, 3, config.tile, config.tile, device=device())
    seconds(lambda: connector(tower(x[:1])))
    encoder = statistics.median(seconds(lambda: connector(tower(x))) for _ in range(repeat))
    rate = matmul_rate(config)
    times = prefill_seconds(config, configurations, text, vision, repeat)
    rate = (rate + matmul_rate(config)) / 2  # before and after, as the machine may change its mind
    fixed = tower_flops(config, tiles) + connector_flops(config, tiles)
    return {"machine": machine(), "matmul": rate, "rows": [
        {"sa": name(config, sa), "encoder": encoder, "llm": statistics.median(times[sa]),
         "counted": (fixed + llm_flops(config, sa, text, vision)) / rate} for sa in configurations]}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", default="768x768", help="picture, WxH pixels (default: 768x768)")
    p.add_argument("--text", type=int, default=40, help="text tokens (default: 40)")
    p.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = p.parse_args()

    config = preset("llava-ov-0.5b")
    vision = tiling(*map(int, args.size.split("x")), config).tokens
    configurations = [tuple(range(config.layers)), PAPER_VIABLE[-1], (1, 4, 7), (1, 4), ()]
    times = prefill_seconds(config, configurations, args.text, vision, args.repeat, getattr(torch, args.dtype))
    median = {sa: statistics.median(s) for sa, s in times.items()}

    dense = configurations[0]
    print(f"{machine()}, torch {torch.__version__}, {args.dtype}\n0.5B geometry, {vision} visual + {args.text} text "
          f"tokens, prefill of the language model, median of {args.repeat}\n")
    print(f"{'self-attention layers':24}{'GFLOP':>8}{'seconds':>9}{'fewer operations':>18}{'faster':>9}{'of it':>8}")
    rows = []
    for sa in configurations:
        cost = llm_flops(config, sa, args.text, vision)
        fewer, faster = llm_flops(config, dense, args.text, vision) / cost, median[dense] / median[sa]
        print(f"{name(config, sa):24}{cost / 1e9:8.0f}{median[sa]:9.2f}{fewer:17.1f}x{faster:8.1f}x"
              f"{faster / fewer:8.0%}")
        rows.append({"sa": name(config, sa), "flop": cost, "seconds": times[sa], "fewer": fewer, "faster": faster})
    print(json.dumps({"machine": machine(), "torch": torch.__version__, "dtype": args.dtype, "visual_tokens": vision,
                      "text_tokens": args.text, "rows": rows}))


if __name__ == "__main__":
    main()
