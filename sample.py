"""Ask questions about images.

    python sample.py --image a.png --q "What is in the image?"
    python sample.py --image a.png --q "How many?" --q "Which colour?" --sa 1,4 --json

The images are encoded once and run through the layers once; each further question costs only its own text.
"""
import json
import sys
from pathlib import Path

import data
from cli import Parser, checkpoint_path, placement, run
from config import branch_layers
from flops import answer_flops, connector_flops, llm_flops, router_flops, tower_flops, within_budget


def parse(argv=None):
    p = Parser(description="Ask questions about images.",
               epilog="Answers go to stdout, one a line; all else to stderr.")
    p.add_argument("--image", action="append", default=[], metavar="FILE", help="may be given several times")
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
    p.add_argument("--explain", metavar="FILE.png", help="draw where the (last) answer's attention went, by layer")
    p.add_argument("--json", action="store_true", help="one JSON object per question instead of plain answers")
    args = p.parse_args(argv)
    for name, ok, what in (("max_tokens", args.max_tokens >= 1, "at least 1"),
                           ("temperature", args.temperature >= 0, "0 or more"),
                           ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
                           ("pack", args.pack is None or args.pack >= 1, "1 or more"),
                           ("budget", args.budget is None or args.budget > 0, "above 0")):
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
        sa = config.configuration(args.sa)
        if len(sa) < config.layers and sa not in config.viable:
            print(f"--sa {args.sa} is no configuration that this checkpoint is trained for", file=sys.stderr)
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
    texts = [data.chatml([data.place_images(q, len(images))]) for q in args.q]
    device, dtype = placement(args.device, args.dtype)

    from model import VLM  # imports torch, 1.5 s
    model = VLM.from_pretrained(checkpoint_path(args.model), dtype, device)
    if args.pack is not None:
        model.add_packing(args.pack)
    c, single = model.config, len(images) == 1
    processed = [data.process_image(image, c, single) for image in images]
    dense_vision = sum(data.tiling(*image.size, c.unpacked(), single).tokens for image in images)
    if c.world == "toy":
        warn_of_other_worlds(args.q, images, model.tokenizer)
    warn_of_layers(args, c)
    stream = sys.stdout.isatty() and not args.json
    trees, ran = {}, {}  # what is prefilled, and in which configurations it has run
    for question, text in zip(args.q, texts):
        prefix, own = data.split_shared(text)
        prefix = data.encode(prefix, model.tokenizer, processed)
        prompt = data.encode(own, model.tokenizer, start=prefix.end)
        n_text, n_vision = len(prefix.ids) + len(prompt.ids), len(prefix.v_pos)
        sa, allowed = configuration(args, c, n_text, n_vision, dense_vision)
        timings = dict.fromkeys(("encoder", "prefill", "decode"), 0.0)
        key, routes = (tuple(prefix.ids), tuple(prefix.t_pos), sa), []
        if key not in trees:
            capacity = len(prompt.ids) + min(args.max_tokens, 1024)
            trees[key] = model.prefill([prefix], sa, text_capacity=capacity, timings=timings)
        tokens = model.answer(trees[key], prompt, max_tokens=args.max_tokens, temperature=args.temperature,
                              top_p=args.top_p, seed=args.seed, timings=timings, allowed=allowed, routes=routes,
                              on_token=Stream(model.tokenizer) if stream else None)
        answer = model.tokenizer.decode(tokens).strip()
        report = {"question": question, "answer": answer, "tokens": tokens, "sa": list(routes[0]),
                  "routed": sa == "auto", "text_tokens": n_text, "vision_tokens": n_vision,
                  "flops": cost(c, routes[0], prefix, prompt, len(tokens), processed, dense_vision,
                                ran.setdefault(key, []), sa == "auto"),
                  "seconds": {k: round(s, 4) for k, s in timings.items()}}
        ran[key].append(routes[0])
        if args.json:
            print(json.dumps(report), flush=True)
        else:
            print("" if stream else " ".join(answer.splitlines()), flush=True)
        print(summary(report), file=sys.stderr)
    if args.explain:
        import explain
        attention = explain.attention_to_images(model, data.join(prefix, prompt), tokens, routes[0])
        explain.draw(args.explain, images, processed, c, report, attention)
        print(f"{args.explain}: where the last answer's attention went", file=sys.stderr)


def cost(config, sa, prefix, prompt, answer, images, dense_vision, ran, routed):
    """FLOPs of one question as it was run, and of dense without packing asked in the same way. Images and shared
    text count once: ran names the configurations in which they have been run before."""
    shared, own = len(prefix.ids), len(prompt.ids)

    def llm(sa, vision, layers):
        total = llm_flops(config, sa, shared, vision, head=False, layers=layers)
        total += llm_flops(config, sa, own, 0, shared, vision)
        return total + answer_flops(config, sa, shared + own, vision, answer)
    known = max([min(branch_layers([sa, other]), default=config.layers) for other in ran], default=0)  # layers
    executed = llm(sa, len(prefix.v_pos), range(known, config.layers))
    executed += router_flops(config, shared + own, len(prefix.v_pos)) if routed else 0
    dense = llm(range(config.layers), dense_vision, () if ran else range(config.layers))
    tiles = 0 if ran else sum(x.tiling.tiles for x in images)
    return {"encoder": tower_flops(config, tiles) + connector_flops(config, tiles), "llm": executed,
            "llm_dense": dense, "saving": round(dense / executed, 3)}


def summary(report):
    """Two lines for people: what it cost and what it took."""
    s, n = report["seconds"], len(report["tokens"])
    rate = f" ({n / s['decode']:.1f} tokens/s)" if s["decode"] else ""
    layers, saving = ",".join(map(str, report["sa"])) or "none", report["flops"]["saving"]
    # A question on another route than those before it runs the images through that route; dense has done so already
    less = f"{saving:.3g}x less" if saving >= 1 else f"{1 / saving:.3g}x more"
    return (f"{'routed to' if report['routed'] else 'ran'} --sa {layers}; {report['text_tokens']} text + "
            f"{report['vision_tokens']:,} visual tokens; language model\n{report['flops']['llm'] / 1e9:,.4g} GFLOP, "
            f"{less} than dense; encoder {s['encoder']:.2f} s, "
            f"prefill {s['prefill']:.2f} s, decode {s['decode']:.2f} s{rate}")


if __name__ == "__main__":
    run(main)
