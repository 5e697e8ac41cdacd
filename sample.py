"""Ask questions about images.

    python sample.py --image a.png --q "What is in the image?"
    python sample.py --image a.png --q "How many?" --q "Which colour?" --sa 1,4 --json

The images are encoded once and run through the layers once; each further question costs only its own text.
"""
import sys

if __name__ == "__main__":  # Ctrl-C ends the imports in one line, too; the rest is cli.run's
    def stopped(kind, error, trace):
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        print("stopped", file=sys.stderr)
        raise SystemExit(130)
    sys.excepthook = stopped

import json
import math
import textwrap
from collections import Counter
from pathlib import Path

import data
from cli import Parser, checkpoint_path, counted, placement, run
from config import branch_layers
from flops import answer_flops, connector_flops, llm_flops, router_flops, sa_name, tower_flops, within_budget


def parse(argv=None):
    p = Parser(description="Ask questions about images.",
               epilog="Answers go to stdout, one a line; all else to stderr. Operations of a question are those "
               "spent on it, the images once; what is saved is over all questions so far, against dense asked the "
               "same.")
    p.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="one or more; may be given "
                   "several times")
    p.add_argument("--q", action="append", required=True, metavar="TEXT", help="a question; may be given several "
                   "times. <image> inside it puts an image there; otherwise the images stand before it")
    p.add_argument("--model", default="nano", metavar="NAME", help="checkpoint directory, hub id, or SIGLIP+QWEN2 "
                   "(default: nano, the one beside this script)")
    p.add_argument("--sa", default="auto", metavar="LAYERS", help="self-attention layers to run: auto, dense, none, or "
                   "numbers such as 1,4,7 (default: auto)")
    p.add_argument("--budget", type=float, metavar="F", help="run no viable configuration whose prompt costs more "
                   "than F of the dense language model's; without a router, the costliest that fits")
    p.add_argument("--pack", type=float, metavar="R", help="pack the visual tokens of each tile to about 1/R of them")
    p.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature: draw from the likeliest "
                   "tokens that hold probability P (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="for --temperature (default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                   help="(default: auto)")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    p.add_argument("--explain", metavar="FILE.png", help="draw where the (last) answer's attention went, by layer")
    p.add_argument("--json", action="store_true", help="one JSON object per question instead of plain answers")
    args = p.parse_args(argv)
    for name, ok, what in (("max_tokens", args.max_tokens >= 1, "at least 1"),
                           ("threads", args.threads is None or 1 <= args.threads <= 1024, "from 1 to 1,024"),
                           ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
                           ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
                           ("pack", args.pack is None or 1 <= args.pack < math.inf, "1 or more"),
                           ("budget", args.budget is None or 0 < args.budget < math.inf, "above 0")):
        if not ok:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number {what}")
    if not 0 <= args.seed < 1 << 63:
        p.error(f"--seed {args.seed}: give a number from 0 to 2**63 - 1")
    if args.explain and (not args.explain.endswith(".png") or not Path(args.explain).parent.is_dir()):
        p.error(f"--explain {args.explain}: give a .png file in a directory that exists")
    if args.explain and not args.image:
        p.error("--explain draws an image: give one with --image")
    if args.budget is not None and args.sa != "auto":
        p.error("--budget chooses the configuration itself; leave --sa out")
    return args


def text_of(question, n):
    """The prompt of a question about n images. Raises ValueError."""
    try:
        return data.chatml([data.place_images(question, n)])
    except ValueError as e:
        raise ValueError(f"--q {textwrap.shorten(question, 60, placeholder=' ...')!r}: {e}") from None


def configuration(args, config, text, vision, dense_vision):
    """(what VLM.prefill is called with, the configurations that a router may choose) for a prompt of `text` and
    `vision` tokens (`dense_vision` without packing)."""
    if args.budget is not None:
        allowed = within_budget(config, args.budget, text, vision, dense_vision)
        return ("auto", allowed) if config.router else (allowed[0], None)
    if args.sa != "auto":
        return config.configuration(args.sa), None
    if config.router:
        return "auto", None
    return max(config.viable, key=len, default=config.configuration("dense")), None


def warn_of_layers(args, config):
    """One line where what runs is not what the checkpoint is made for, or not what the router would choose."""
    if args.sa != "auto":
        sa, universal = config.configuration(args.sa), config.ca and config.stage in ("2", "3")  # trained to the end
        dense = len(sa) == config.layers
        if sa not in config.viable and (universal or not dense):
            instead = "; --model nano/dense is" if dense and args.model == "nano" else ""
            print(f"--sa {args.sa} is no configuration that this checkpoint is trained for{instead}", file=sys.stderr)
    elif config.viable and not config.router and args.budget is None:
        sa = ",".join(map(str, max(config.viable, key=len))) or "none"
        print(f"this checkpoint has no router: running its full configuration, --sa {sa}; "
              f"python train.py --stage 3 --model {args.model} trains one", file=sys.stderr)


def warn_of_other_worlds(questions, images, tokenizer):
    """One line for whoever asks the miniature about a photograph."""
    from toy import world  # only the miniature needs it
    unknown = tokenizer.token_to_id("<unk>")
    words = []
    for question in questions:
        encoded = tokenizer.encode(question.replace(data.IMAGE, " "))
        words += [question[a:b] for i, (a, b) in zip(encoded.ids, encoded.offsets) if i == unknown]
    if words or not all(map(world.is_quilt, images)):
        which = f"; it has no word for {', '.join(dict.fromkeys(words))}" if words else ""
        print(f"this is the miniature: it knows only quilts (python -m toy --show x.png) and questions about "
              f"them{which}", file=sys.stderr)
    if len(images) > 1:
        print("of several images each is one tile, too coarse for the miniature's signs: give one at a time",
              file=sys.stderr)


class Stream:
    """Writes an answer to the terminal as it comes. Bytes of a character that is not complete yet are held back."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, _, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids).rstrip("\ufffd")
        print(text[len(self.shown):], end="", flush=True)
        self.shown = text


def main(argv=None):
    args = parse(argv)
    images = [data.load_image(path) for path in args.image]  # before the model: mistakes show at once
    texts = [text_of(q, len(images)) for q in args.q]
    device, dtype = placement(args.device, args.dtype)

    import torch  # 1.5 s

    from model import VLM
    if args.threads:
        torch.set_num_threads(args.threads)
    model = VLM.from_pretrained(checkpoint_path(args.model), dtype, device)
    if args.pack is not None:
        model.add_packing(args.pack)
    c, single = model.config, len(images) == 1
    images = [data.to_rgb(image, c.transparency) for image in images]
    processed = [data.process_image(image, c, single) for image in images]
    dense_vision = sum(data.tiling(*image.size, c.unpacked(), single).tokens for image in images)
    if not images:
        print("no --image: the model answers from the text alone", file=sys.stderr)
    if c.world == "toy":
        warn_of_other_worlds(args.q, images, model.tokenizer)
    warn_of_layers(args, c)
    stream = sys.stdout.isatty() and not args.json
    trees, costs = {}, Costs(c, processed, dense_vision)
    for question, text in zip(args.q, texts):
        prefix, own = data.split_shared(text)
        prefix = data.encode(prefix, model.tokenizer, processed)
        prompt = data.encode(own, model.tokenizer, start=prefix.end)
        n_text, n_vision = len(prefix.ids) + len(prompt.ids), len(prefix.v_pos)
        sa, allowed = configuration(args, c, n_text, n_vision, dense_vision)
        timings = dict.fromkeys(("encoder", "prefill", "decode"), 0.0)
        key, routes = ((tuple(prefix.ids), tuple(prefix.t_pos)), sa), []
        if key not in trees:
            capacity = len(prompt.ids) + min(args.max_tokens, 1024)
            trees[key] = model.prefill([prefix], sa, text_capacity=capacity, timings=timings)
        tokens = model.answer(trees[key], prompt, max_tokens=args.max_tokens, temperature=args.temperature,
                              top_p=args.top_p, seed=args.seed, timings=timings, allowed=allowed, routes=routes,
                              on_token=Stream(model.tokenizer) if stream else None)
        answer = model.tokenizer.decode(tokens).strip()
        report = {"question": question, "answer": answer, "tokens": tokens, "sa": list(routes[0]),
                  "routed": sa == "auto", "text_tokens": n_text, "vision_tokens": n_vision,
                  "flops": costs.add(key, routes[0], prefix, prompt, len(tokens)),
                  "seconds": {k: round(s, 4) for k, s in timings.items()}}
        if args.json:
            print(json.dumps(report), flush=True)
        else:
            print("" if stream else " ".join(answer.splitlines()), flush=True)
        print(summary(c, report, costs.questions), file=sys.stderr)
    if args.explain:
        import explain
        attention = explain.attention_to_images(model, data.join(prefix, prompt), tokens, routes[0])
        explain.draw(args.explain, images, processed, c, report, attention, costs.questions)
        print(f"{args.explain}: where the last answer's attention went", file=sys.stderr)


class Costs:
    """Operations of a run's questions as they were run, and of dense without packing asked the same. In both, images
    and shared text count once."""

    def __init__(self, config, images, dense_vision):
        self.config, self.dense_vision = config, dense_vision
        self.tiles = sum(image.tiling.tiles for image in images)
        self.ran, self.total, self.questions = {}, Counter(), 0  # ran: of each tree the configurations it has run

    def add(self, key, sa, prefix, prompt, answer):
        """FLOPs of one more question: what was spent on it, and what was saved over all so far.

        key: of its tree (what it shares with other questions, --sa); sa: what ran; answer: its number of tokens.
        """
        c, shared, own, vision = self.config, len(prefix.ids), len(prompt.ids), len(prefix.v_pos)
        everything, ran = range(c.layers), self.ran.setdefault(key, [])
        known = max([min(branch_layers([sa, other]), default=c.layers) for other in ran], default=0)  # layers
        tiles = 0 if ran else self.tiles
        prefill = llm_flops(c, sa, shared, vision, head=False, layers=range(known, c.layers))
        prefill += llm_flops(c, sa, own, 0, shared, vision)
        prefill += router_flops(c, shared + own, vision) if key[1] == "auto" else 0
        encoder = tower_flops(c, tiles) + connector_flops(c, tiles)
        llm = prefill + answer_flops(c, sa, shared + own, vision, answer)

        new = not any(runs and other[0] == key[0] for other, runs in self.ran.items())  # to dense, which has one tree
        tiles = self.tiles if new else 0
        dense = llm_flops(c, everything, shared, self.dense_vision, head=False, layers=everything if new else ())
        dense += llm_flops(c, everything, own, 0, shared, self.dense_vision)
        dense_encoder = tower_flops(c, tiles) + connector_flops(c.unpacked(), tiles)
        dense_llm = dense + answer_flops(c, everything, shared + own, self.dense_vision, answer)

        ran.append(sa)
        self.questions += 1
        self.total.update(llm=llm, dense=dense_llm, first=encoder + prefill, dense_first=dense_encoder + dense)
        return {"encoder": encoder, "llm": llm, "llm_dense": dense_llm,
                "saving": round(self.total["dense"] / self.total["llm"], 3),
                "first_token_saving": round(self.total["dense_first"] / self.total["first"], 3)}


def summary(config, report, questions):
    """For people: what a question cost and what it took; `questions`: how many there are so far."""
    s, n, flops = report["seconds"], len(report["tokens"]), report["flops"]
    rate = f" ({(n - 1) / s['decode']:.1f} tokens/s)" if n > 1 and s["decode"] else ""  # prefill gave the first
    saving = flops["saving"]
    less = f"{saving:.3g}x less than" if saving > 1 else f"{1 / saving:.3g}x more than" if saving < 1 else "as much as"
    so_far = f" for this question; {less} dense over the {questions} so far" if questions > 1 else f", {less} dense"
    return textwrap.fill(f"{'routed to' if report['routed'] else 'ran'} --sa {sa_name(config, report['sa'])}; "
                         f"{report['text_tokens']} text + {counted(report['vision_tokens'], 'visual token')}; "
                         f"language model {flops['llm'] / 1e9:,.4g} GFLOP{so_far}; encoder {s['encoder']:.2f} s, "
                         f"prefill {s['prefill']:.2f} s, decode {s['decode']:.2f} s{rate}", 80)


if __name__ == "__main__":
    run(main)
