"""What paper.bench measures: the machine, nanoVISOR and transformers' LLaVA-OneVision with random weights."""
import ctypes
import gc
import platform
import re
import shlex
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from cli import counted, timer
from data import Prompt, process_image
from encoders import normalise, send
from model import VLM

TEXT, ANSWER = 40, 32                                  # tokens
IMAGES = {1: None, 5: (768, 768), 10: (1152, 1152)}    # tiles: size of the image; None: one of several, one tile


# --- the machine ------------------------------------------------------------------------------------------------------

def about(name, argv=None):
    """What the JSON of a result begins with: the command paper.NAME as it was given, the day, the machine."""
    words = sys.argv[1:] if argv is None else map(str, argv)
    return {"command": shlex.join(["python", "-m", f"paper.{name}", *words]), "date": date.today().isoformat(),
            "machine": machine(), "torch": torch.__version__}


def conditions(x):
    """How a result x was measured, as far as its JSON says it, in one line."""
    found = [x["machine"], *(f"{name} {x[name]}" for name in ("torch", "transformers") if x.get(name)), x["dtype"]]
    if "tiles" in x:
        found.append(counted(x["tiles"], "tile"))
    if "at_once" in x:
        found.append(f"{x['at_once']} prompts at once")
    if "questions" in x:
        found.append(f"{x['questions']:,} questions a task, seeds {', '.join(map(str, x['seeds']))}")
    if "rounds" in x:
        found.append(f"medians of {counted(x['rounds'], 'round')}")
    if "matmul" in x:
        found.append(f"matrix products at {x['matmul'] / 1e9:,.0f} GFLOP/s")
    if "bandwidth" in x:
        found.append(f"memory at {x['bandwidth'] / 1e9:,.0f} GB/s")
    return "; ".join([*found, x["date"]])


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        name = next((x.split(":")[1].strip() for x in open(info) if x.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_bytes(reset=False):
    """The most memory held since the last reset, of the process or of the CUDA device; at a reset, what is held."""
    if device() == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if not Path("/proc/self/clear_refs").exists():
        return 0  # only Linux forgets a peak
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or what is free would still count
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@torch.inference_mode()
def seconds(run, *args):
    """Wall time of run(*args)."""
    start = time.perf_counter()
    run(*args)
    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Kernels(TorchDispatchMode):
    """Counts what would be started on a device: every operation that is not a view of what is there."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += not (func.is_view or func._schema.name == "aten::_unsafe_view")
        return func(*args, **(kwargs or {}))


def product_seconds(x, w):
    """Of x @ w.T, median of 9; on CUDA fifty in a row, so that starting them does not count."""
    n = 50 if device() == "cuda" else 1
    return statistics.median([seconds(lambda: [F.linear(x, w) for _ in range(n)]) for _ in range(12)][3:]) / n


def matmul_rate(config, n=4096, dtype=torch.float32):
    """FLOP/s of the language model's largest product over n tokens."""
    x, w = (torch.randn(m, config.hidden, device=device(), dtype=dtype) for m in (n, config.ffn))
    return 2 * n * config.hidden * config.ffn / product_seconds(x, w)


def bandwidth(config, dtype=torch.float32):
    """Bytes/s at which a vector meets a matrix as large as the output head: what decoding is bound by."""
    w = torch.randn(config.vocab, config.hidden, device=device(), dtype=dtype)
    return w.nbytes / product_seconds(w[:1], w)


def random_module(kind, config, dtype=torch.float32):
    """A module with random weights, made without initialising it twice."""
    with torch.device("meta"):
        module = kind(config)
    module = module.to_empty(device=device()).to(dtype).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return module


# --- the systems ------------------------------------------------------------------------------------------------------

class Ours:
    """nanoVISOR; the vision tokens of a batch are made once and given to every configuration."""

    def __init__(self, config, dtype):
        config.add_visor()
        config.router = True
        self.model, self.dtype = random_module(VLM, config, dtype), dtype
        self.model.tokenizer = SimpleNamespace(token_to_id=lambda token: -1)  # nothing ends an answer
        self.real = self.model.encode

    def prompts(self, tiles, batch):
        """(Prompts of one image each, a list of images)."""
        c, size = self.model.config, IMAGES[tiles]
        shown = process_image(Image.new("RGB", size or (c.tile,) * 2, (90, 120, 60)), c, single_image=size is not None)
        before, n = min(14, TEXT - 1), shown.tiling.tokens
        t_pos = [*range(before), *range(before + n, TEXT + n)]
        prompt = Prompt(list(range(TEXT)), t_pos, list(range(before, before + n)), [0] * n, [shown], [TEXT + n])
        return [prompt] * batch, [shown] * batch

    @torch.no_grad()
    def encode(self, images):
        return self.real(images)

    def answer(self, prompts, seen, sa, timings, tokens):
        """Seconds of prefill and decode are added to timings."""
        self.model.encode = lambda images, known=None, timings=None: seen
        self.model.generate(prompts, sa, max_tokens=tokens, timings=timings, allowed=[(1, 4)] if sa == "auto" else None)


class Theirs:
    """transformers' LLaVA-OneVision of the same geometry. Raises ImportError without it."""

    def __init__(self, config, dtype):
        from transformers import (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config,
                                  SiglipVisionConfig)
        self.config = c = config
        vision = SiglipVisionConfig(hidden_size=c.vision_hidden, num_hidden_layers=c.vision_layers,
                                    num_attention_heads=c.vision_heads, intermediate_size=c.vision_ffn,
                                    image_size=c.tile, patch_size=c.patch, vision_use_head=False)
        text = Qwen2Config(hidden_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
                           num_key_value_heads=c.kv_heads, intermediate_size=c.ffn, vocab_size=c.vocab,
                           tie_word_embeddings=True)
        config = LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=True,
                                      vision_feature_layer=-1, attn_implementation="sdpa")
        self.model = LlavaOnevisionForConditionalGeneration(config).to(device(), dtype).eval()

    @torch.no_grad()
    def encode(self, images):
        model, like = self.model.model, self.model.lm_head.weight
        x = send(torch.stack([torch.from_numpy(p.pixels) for p in images]), like.device)
        x = normalise(x, like.dtype, self.config)      # (images, tiles, 3, tile, tile)
        if images[0].tiling.canvas is None:
            out = model.vision_tower(x.flatten(0, 1), output_hidden_states=True)
            return list(model.multi_modal_projector(out.hidden_states[-1]))
        sizes = torch.tensor([p.tiling.canvas[::-1] for p in images])
        return list(self.model.get_image_features(x, sizes, output_hidden_states=True).pooler_output)

    @torch.no_grad()
    def answer(self, prompts, seen, sa, timings, tokens):
        lm, head, before = self.model.model.language_model, self.model.lm_head, min(14, TEXT - 1)
        ids = torch.tensor([p.ids for p in prompts], device=head.weight.device)
        with timer(timings, "prefill", ids.device):
            t = lm.embed_tokens(ids)
            x = torch.cat([t[:, :before], torch.stack(seen), t[:, before:]], dim=1)
            out = lm(inputs_embeds=x, use_cache=True)
            token = head(out.last_hidden_state[:, -1:]).argmax(-1)
        with timer(timings, "decode", ids.device):
            for _ in range(tokens - 1):
                out = lm(inputs_embeds=lm.embed_tokens(token), past_key_values=out.past_key_values, use_cache=True)
                token = head(out.last_hidden_state[:, -1:]).argmax(-1)
            token.tolist()
