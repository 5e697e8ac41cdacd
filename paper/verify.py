"""nanoVISOR beside transformers, and VISOR against itself: the proof for who has real weights, or a GPU.

    python -m paper.verify --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf --device cuda
    python -m paper.verify --model DIR --dtype bfloat16 --images a.jpg b.png --quick

A line for each check: PASS, FAIL or SKIP, the number found, and the most that it may be. First the dense model, on
pictures and questions that both sides get; transformers runs before ours is loaded, so that memory holds one of them.
Then VISOR's ways to save work, each against the plain way of computing the same, with the same weights.

How far apart two ways may be. In float32: 1e-4 of the standard deviation of the logits, five times what the miniature
shows and thirty times what random models do. In bfloat16 it is measured: logits in float32 of the same, rounded weights
are the truth, and our way may be at most twice as far from it as the plain way (or transformers) is in bfloat16. Twice,
because the largest of many errors is itself uncertain: ratios of 0.8 to 1.2 were seen.
"""
import hashlib
import json
import math
import textwrap
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cli import Parser, checkpoint_path, choose_dtype, counted, placement, read_json, run, timer, writing
from config import short
from data import Prompt, chatml, collate, encode, family_form, place_images, process_image
from families import load_tokenizer, read_config, vocabulary_size
from model import VLM
from paper.equalities import QUESTIONS, TOKENS, encoded, equalities, likeliest
from paper.systems import about
from pictures import load_image
from weights import find, weight_files

END = -1  # in place of the token that ends an answer, as a model may have several
PICTURES = {  # name: (width, height) in tiles, colours
    "small": (0.1, 0.07, "RGB"), "one tile": (1, 1, "RGB"), "photo, grey": (1.3, 0.98, "L"),
    "larger than all grids": (4.43, 7.1, "RGB"), "wide": (4, 0.5, "RGB"), "tall, CMYK": (0.5, 4, "CMYK"),
    "portrait, transparent": (0.87, 1.3, "RGBA"), "four tiles, palette": (2, 2, "P"), "one pixel": (0, 0, "RGB"),
    "a line": (7.8, 0.1, "RGB"), "landscape, grey, transparent": (2.6, 1.9, "LA"),
    "rounds differently": (820 / 384, 369 / 384, "RGB")}  # where the original code and Hugging Face count otherwise


class Case(NamedTuple):
    """What both sides are asked."""
    name: str
    images: list    # PIL images, for transformers
    prompt: Prompt  # the same for ours


# --- pictures and questions -------------------------------------------------------------------------------------------

def picture(i, width, height, mode):
    """Clouds of random colours and transparency, width x height pixels."""
    noise = np.random.default_rng(i).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    image = Image.fromarray(noise).resize((max(1, width), max(1, height)), Image.BICUBIC)
    return image if mode == "RGBA" else image.convert(mode) if mode == "LA" else image.convert("RGB").convert(mode)


def pictures(files, tile, quick):
    """{name: PIL image} of the user's files, or of what PICTURES describes."""
    if files:
        return {file: load_image(file) for file in files}
    wanted = list(PICTURES.items())[:4 if quick else None]
    return {name: picture(i, round(w * tile), round(h * tile), mode) for i, (name, (w, h, mode)) in enumerate(wanted)}


def make_cases(images, tokenizer, config):
    """A Case for each picture, and three more: two pictures at once, a picture in the second turn, none."""
    def case(name, images, turns):
        processed = [process_image(image, config, single_image=len(images) == 1) for image in images]
        return Case(name, images, encode(chatml(turns), tokenizer, processed))
    ask = cycle(QUESTIONS)
    found = [case(name, [image], [place_images(next(ask), 1, config)]) for name, image in images.items()]
    first, *_, last = [*images.values()] * 2
    return [*found, case("two pictures", [first, last], [place_images("What changed?", 2, config)]),
            case("second turn", [first], [QUESTIONS[1], "Show me the picture.",
                                           family_form(f"Here: <image>\n{QUESTIONS[0]}", config)]),
            case("no picture", [], ["Write a poem about rain."])]


# --- the report -------------------------------------------------------------------------------------------------------

class Report:
    """Prints a line for each check, and keeps them."""

    def __init__(self):
        self.lines = []

    def add(self, name, ok, note="", measured=None, bound=None):
        """ok: whether it passed; None: it was skipped. note: where it is worst. Returns the bound."""
        status = {True: "PASS", False: "FAIL", None: "SKIP"}[ok]
        finite = measured is None or math.isfinite(measured)
        self.lines.append({"check": name, "status": status, "measured": measured if finite else str(measured),
                           "bound": bound, "note": note})
        print(check_line(self.lines[-1]), flush=True)
        return bound

    def logits(self, name, labels, ours, plain, exact=None):
        """Lists of logits (n, vocab) of ours and of the plain way; exact: these in float32, where they are not."""
        far = np.array([largest(a - b) for a, b in zip(ours, exact or plain)])
        bound = 2 * max(largest(a - b) for a, b in zip(plain, exact)) if exact else 1e-4 * max(
            x.std().item() for x in plain)
        worst = int(far.argmax())  # NaN counts as the largest
        return self.add(name, bool(far[worst] <= bound), labels[worst], float(far[worst]), bound)

    def tokens(self, name, labels, ours, plain, margins, tie):
        """Lists of greedy answers: equal in float32 (tie None), elsewhere up to where the plain side's two likeliest
        tokens are no further apart than `tie`; what follows there is not compared."""
        equal, parted, wrong = 0, 0, []
        for label, a, b, margin in zip(labels, ours, plain, margins):
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(b))
            equal += at
            if at < len(b):
                parted += 1
                wrong += [f"{label}, token {at}"] * (tie is None or not margin[at] <= tie)
        why = f"; {wrong[0]}" if wrong else f", {counted(parted, 'answer')} part near a tie" * (parted > 0)
        self.add(name, not wrong, f"{equal} of {sum(map(len, plain))}{why}")


def largest(x):
    return x.abs().max().item()


def check_line(line):
    """One of Report.lines for the terminal."""
    numbers = "" if line["measured"] is None else f"{float(line['measured']):.1e} of {line['bound']:.1e}"
    return textwrap.fill(f"{line['status']}  {line['check']:<30} {numbers:<19}  {line['note']}".rstrip(), 80,
                         subsequent_indent=" " * 37)


def head(result):
    """What is verified, where, and the heads of the columns that follow."""
    return (f"{result['model']}, {result['dtype']}\n{result['machine']}, torch {result['torch']}, transformers "
            f"{result['transformers']}\n\n      {'check':<30} {'found of bound':<19}  where")


def tail(result):
    """What ran how long, if transformers did, and how many checks passed."""
    lines, seconds = [], result["seconds"]
    if "transformers" in seconds:
        lines += ["", f"{'seconds, all prompts':<37}{'transformers':>13}{'ours':>10}"]
        for key, label, scale in (("encoder", "encoder", 1), ("prefill", "prefill, dense", 1),
                                  ("decode", "a token, milliseconds", 1000)):
            both = (scale * x.get(key, 0) / (max(1, x["tokens"]) if key == "decode" else 1)
                    for x in (seconds["transformers"], seconds["ours"]))
            lines.append(f"      {label:<31}" + "{:>13.2f}{:>10.2f}".format(*both))
    count = result["count"]
    return "\n".join([*lines, "", f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped"])


def page(result):
    """All that a run has printed, from its JSON."""
    return "\n".join([head(result), *map(check_line, result["lines"]), tail(result)])


# --- the dense model, on both sides -----------------------------------------------------------------------------------

@contextmanager
def watched(tower):
    """Collects the pixels that enter a vision tower."""
    seen = []
    hook = tower.register_forward_pre_hook(lambda _, args: seen.append(args[0].float().cpu()))
    yield seen
    hook.remove()


def load_theirs(directory, dtype, device):
    """transformers' model and image processor. Raises ValueError."""
    import transformers
    try:
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as Processor)
    except ImportError:
        raise ValueError(f"transformers {transformers.__version__} is too old to compare with: pip install -U "
                         "'transformers>=5'") from None
    transformers.logging.set_verbosity_error()
    model, info = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"transformers {transformers.__version__} finds no {min(info['missing_keys'])} in {directory} "
                         "and would take random numbers: try another version")
    tile = model.config.vision_config.image_size
    own = (Path(directory) / "preprocessor_config.json").is_file()
    processor = Processor.from_pretrained(directory) if own else Processor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": tile, "width": tile},
        image_grid_pinpoints=[list(p) for p in model.config.image_grid_pinpoints])
    return model.to(device).eval(), processor


@torch.no_grad()
def their_answer(model, processor, case, c, timings, decode=True):
    """A dict of pixels, tokens an image ("counts"), and unless these differ from ours logits (Nt, vocab) and the greedy
    answer. Their modules one after the other, without generate()."""
    prompt, like, pixels, features = case.prompt, model.lm_head.weight, [], []
    if case.images:
        sent = processor([case.images] if len(case.images) > 1 else case.images, return_tensors="pt")
        with watched(model.model.vision_tower) as pixels, timer(timings, "encoder", like.device):
            features = model.get_image_features(
                sent["pixel_values"].to(like), sent["image_sizes"], batch_num_images=sent["batch_num_images"],
                output_hidden_states=True).pooler_output
    found = {"pixels": pixels, "counts": [len(x) for x in features]}
    if found["counts"] != [x.tiling.tokens for x in prompt.images]:
        return found
    ids, t_pos, v_pos = (torch.tensor(x, dtype=torch.long, device=like.device) for x in prompt[:3])
    with timer(timings, "prefill", like.device):
        x = like.new_empty(1, prompt.end, like.shape[1])
        x[0, t_pos] = model.get_input_embeddings()(ids)
        if features:
            x[0, v_pos] = torch.cat(list(features))
        out = model(inputs_embeds=x, use_cache=True, logits_to_keep=t_pos)
    found["logits"] = out.logits[0, :, :c.vocab].float().cpu()  # rows beyond the vocabulary are padding
    return {**found, **(their_tokens(model, out, c, timings) if decode else {})}


def their_tokens(model, out, c, timings):
    """The greedy answer that goes on from a forward's output, and by how much each token is ahead of the second."""
    tokens, margins, device = [], [], out.logits.device
    with timer(timings, "decode", device):
        while len(tokens) < TOKENS and END not in tokens:
            if tokens:
                out = model(input_ids=torch.tensor([tokens[-1:]], device=device),
                            past_key_values=out.past_key_values, use_cache=True)
            (token,), (margin,) = likeliest(out.logits[0, -1:, :c.vocab])
            tokens.append(END if token in c.stop_ids else token)
            margins.append(margin)
    timings["tokens"] = timings.get("tokens", 0) + len(tokens) - 1
    return {"tokens": tokens, "margins": margins}


def run_theirs(directory, cases, c, dtype, device):
    """What their_answer says of each case, outside float32 with "exact" logits, and the seconds that it took."""
    model, processor = load_theirs(directory, dtype, device)
    their_answer(model, processor, cases[0], c, {})  # warms up
    timings = {}
    found = [their_answer(model, processor, case, c, timings) for case in tqdm(cases, "transformers")]
    if dtype != torch.float32:
        model.float()
        for case, one in zip(tqdm(cases, "transformers, float32"), found):
            one["exact"] = their_answer(model, processor, case, c, {}, decode=False).get("logits")
    return found, timings


@torch.no_grad()
def our_answer(model, case, timings):
    """The same of ours."""
    dense, prompt = range(model.config.layers), case.prompt
    with watched(model.vision_tower) as pixels, encoded(model, prompt.images, timings):
        logits = model.head(model(collate([prompt]), dense))[0]
        tokens, = model.generate([prompt], dense, max_tokens=TOKENS, timings=timings)
    tokens += [END] * (len(tokens) < TOKENS)
    timings["tokens"] = timings.get("tokens", 0) + len(tokens) - 1
    return {"pixels": pixels, "logits": logits.float().cpu(), "tokens": tokens}


def compare(report, cases, theirs, ours, dtype):
    """The lines about the dense model."""
    names = [case.name for case in cases if case.images]
    far = np.array([largest(torch.cat(a["pixels"]) - torch.cat(b["pixels"]))
                    if sum(map(len, a["pixels"])) == sum(map(len, b["pixels"])) else math.inf  # of another tiling
                    for a, b in zip(theirs, ours) if b["pixels"]])
    # Both sides round a number up to 1 once: a step of bfloat16 there is 1 / 256
    report.add("pixels", bool(far.max() <= (bound := 0.0 if dtype == torch.float32 else 2.0 ** -8)),
               names[far.argmax()], float(far.max()), bound)
    counts = [[x.tiling.tokens for x in case.prompt.images] for case in cases]
    wrong = [f"{case.name}: {own}, transformers {x['counts']}" for case, own, x in zip(cases, counts, theirs)
             if own != x["counts"]]
    total = sum(map(sum, counts))
    report.add("visual tokens", not wrong, wrong[0] if wrong else f"{total:,}, all equal")
    rows = [i for i, x in enumerate(theirs) if "logits" in x]
    labels = [cases[i].name for i in rows]

    def column(side, key):
        return [side[i][key] for i in rows]
    exact = None if dtype == torch.float32 else column(theirs, "exact")
    bound = report.logits("logits", labels, column(ours, "logits"), column(theirs, "logits"), exact)
    report.tokens("greedy tokens", labels, column(ours, "tokens"), column(theirs, "tokens"), column(theirs, "margins"),
                  exact and 2 * bound)  # each of two logits may be off by the bound


# --- command line -----------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(doc=__doc__,
               description="A checkpoint in transformers and here, side by side, then VISOR's equalities on this "
               "device. Exit status 1 if a line says FAIL.")
    p.add_argument("--model", required=True, metavar="DIR|HUB-ID", help="a checkpoint; transformers loads those of "
                   "llava-hf, of others its half is skipped")
    p.add_argument("--images", nargs="+", metavar="FILE", help="pictures (default: twelve of many sizes and kinds, "
                   "made on the spot)")
    p.add_argument("--quick", action="store_true", help="four pictures instead of twelve")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                   help="(default: auto); the last two also run in float32, which needs 4 bytes a parameter")
    p.add_argument("--out", default="verify.json", metavar="FILE", help="the result as JSON, to share (default: "
                   "verify.json, here)")
    args = p.parse_args(argv)
    if not Path(args.out).absolute().parent.is_dir():
        p.error(f"--out {args.out}: name a file in a directory that exists")
    return args


def sha256(path):
    """As the hub lists it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def main(argv=None):
    args = parse(argv)
    if not find_spec("transformers"):
        raise ValueError("transformers is needed, to compare with: pip install 'transformers>=5'")
    from transformers import __version__ as version
    torch.backends.cudnn.allow_tf32 = False  # or the patch embedding would have 10 bits on CUDA
    directory = find(checkpoint_path(args.model))
    device = placement(args.device)
    dtype, _ = choose_dtype(args.dtype, device, sum(f.stat().st_size for f in weight_files(directory)) / 4)
    c, tokenizer = read_config(directory), load_tokenizer(directory)
    c.vocab = vocabulary_size(tokenizer)
    c.stop_ids = {*c.stop_ids, tokenizer.token_to_id("<|im_end|>")}
    cases = make_cases(pictures(args.images, c.tile, args.quick), tokenizer, c)
    result = {**about("verify", argv), "transformers": version, "device": device, "dtype": str(dtype)[6:],
              "model": args.model, "sha256": {file.name: sha256(file) for file in weight_files(directory)},
              "prompts": {case.name: len(case.prompt.v_pos) for case in cases}}
    print(head(result))
    report, theirs, seconds = Report(), None, {}
    kind = read_json(directory / "config.json").get("model_type")
    if kind == "llava_onevision":
        theirs, seconds["transformers"] = run_theirs(directory, cases, c, dtype, device)
    else:
        report.add("transformers", None, f"does not load {short(kind)}")
    model = VLM.from_pretrained(directory, dtype, device)
    if theirs:
        our_answer(model, cases[0], {})  # warms up
        seconds["ours"] = {}
        ours = [our_answer(model, case, seconds["ours"]) for case in tqdm(cases, "ours")]
        compare(report, cases, theirs, ours, dtype)
        del theirs, ours
    equalities(report, model, cases)
    count = {x: sum(line["status"] == x for line in report.lines) for x in ("PASS", "FAIL", "SKIP")}
    result |= {"ok": not count["FAIL"], "count": count, "lines": report.lines, "seconds": seconds}
    with writing(args.out):
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{tail(result)}: {args.out}")
    if count["FAIL"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
