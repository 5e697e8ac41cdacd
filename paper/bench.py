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

from config import PAPER_VIABLE, Config
from data import tiling
from flops import llm_flops
from model import LanguageModel


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as f:
        name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.processor())
    return f"{name}, {torch.get_num_threads()} threads"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--size", default="768x768", help="picture, WxH pixels (default: 768x768)")
    p.add_argument("--text", type=int, default=40, help="text tokens (default: 40)")
    p.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = p.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    config = Config()
    config.ca, config.sa, config.viable = config.visor_layers()
    with torch.device("meta"):
        llm = LanguageModel(config)
    llm = llm.to_empty(device=device).to(dtype).eval()
    for p in llm.parameters():
        torch.nn.init.normal_(p, std=0.02)

    vision = tiling(*map(int, args.size.split("x")), config).tokens
    before = 14  # the system line and the start of the user's
    pos = torch.arange(args.text + vision, device=device)[None]
    t_pos, v_pos = torch.cat([pos[:, :before], pos[:, before + vision:]], 1), pos[:, before:before + vision]
    t, v = (torch.randn(1, n, config.hidden, device=device, dtype=dtype) for n in (args.text, vision))

    @torch.inference_mode()
    def prefill(sa):
        start = time.perf_counter()
        h = llm(t, v, t_pos, v_pos, sa)[:, -1]
        torch.nn.functional.linear(h, llm.embed_tokens.weight)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    configurations = [tuple(range(config.layers)), PAPER_VIABLE[-1], (1, 4, 7), (1, 4), ()]
    seconds = {sa: [] for sa in configurations}
    for sa in configurations[1:]:
        prefill(sa)  # warms up
    for _ in range(args.repeat):
        for sa in configurations:
            seconds[sa].append(prefill(sa))
    median = {sa: statistics.median(s) for sa, s in seconds.items()}

    dense = configurations[0]
    print(f"{machine()}, torch {torch.__version__}, {args.dtype}\n0.5B geometry, {vision} visual + {args.text} text "
          f"tokens, prefill of the language model, median of {args.repeat}\n")
    print(f"{'self-attention layers':24}{'GFLOP':>8}{'seconds':>9}{'fewer operations':>18}{'faster':>9}{'of it':>8}")
    rows = []
    for sa in configurations:
        cost = llm_flops(config, sa, args.text, vision)
        fewer, faster = llm_flops(config, dense, args.text, vision) / cost, median[dense] / median[sa]
        name = "dense" if sa == dense else ",".join(map(str, sa)) or "none"
        print(f"{name:24}{cost / 1e9:8.0f}{median[sa]:9.2f}{fewer:17.1f}x{faster:8.1f}x{faster / fewer:8.0%}")
        rows.append({"sa": name, "flop": cost, "seconds": seconds[sa], "fewer": fewer, "faster": faster})
    print(json.dumps({"machine": machine(), "torch": torch.__version__, "dtype": args.dtype, "visual_tokens": vision,
                      "text_tokens": args.text, "rows": rows}))


if __name__ == "__main__":
    main()
