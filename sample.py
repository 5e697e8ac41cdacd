"""Ask questions about images.

    python sample.py --image a.png --q "What is in the image?"
    python sample.py --image a.png --q "How many?" --q "Which colour?" --sa 1,4 --json
    python sample.py --image a.png                               a conversation
    python sample.py --batch questions.jsonl --out answers.jsonl

The images are encoded once and run through the layers once; each further question costs only its own text. --batch asks
questions that have images of their own, many at once.
"""
import sys

if __name__ == "__main__":  # Ctrl-C ends the imports in one line, too; the rest is cli.run's
    def stopped(kind, error, trace):
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        print("stopped", file=sys.stderr)
        raise SystemExit(130)
    sys.excepthook = stopped

import fcntl
import json
import math
import textwrap
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from tqdm import tqdm

import data
import pictures
from answers import answers
from chat import Chat, Stream, talk
from cli import Parser, checkpoint_path, counted, leave, placement, run, signals, writing
from config import PIXELS
from costs import Costs, Route, report_of, summary, within_budget
from llava.index import kind_of, parse_sample
from llava.samples import image_names
from methods import add_flags, given, warn_untrained

# Keys that --batch adds to a row; the flags that answers depend on
RESULT = "run", "answer", "tokens", "sa", "pixels", "reduce", "routed", "text_tokens", "vision_tokens", "flops", "error"
ASKED = ("model", "sa", "pixels", "budget", "reduce", "min_pixels", "max_pixels", "max_tokens", "temperature", "top_p",
         "seed")


def parse(argv=None):
    p = Parser(doc=__doc__, description="Ask questions about images.",
               epilog="Answers go to stdout, one a line; all else to stderr. Operations of a question are those "
               "spent on it, the images once; what is saved is over all questions so far, against dense asked the "
               "same.")
    p.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="one or more; may be given "
                   "several times")
    p.add_argument("--q", action="append", metavar="TEXT", help="a question; may be given several "
                   "times. <image> inside it puts an image there; otherwise the images stand before it")
    p.add_argument("--batch", metavar="FILE.jsonl", help="questions instead, one a line: {\"image\": a path from "
                   "FILE's directory, a list of them or null, \"question\": text, ...}; the answer is that line and "
                   "what --json says but seconds, or an \"error\", and then exit status 1")
    p.add_argument("--out", metavar="FILE.jsonl", help="where --batch writes (default: stdout); a run that was stopped "
                   "goes on there")
    p.add_argument("--batch-size", type=int, metavar="N", help="questions of --batch at once, fewer where images are "
                   "large (default: 16)")
    p.add_argument("--model", default="nano", metavar="NAME", help="checkpoint directory, hub id, or SIGLIP+QWEN2 "
                   "(default: nano, the one beside this script)")
    p.add_argument("--sa", default="auto", metavar="LAYERS", help="self-attention layers to run: auto, dense, none, or "
                   "numbers such as 1,4,7 (default: auto)")
    p.add_argument("--pixels", choices=("auto", *PIXELS), help="what is seen of a single image: overview, its base "
                   "tile; all; auto, the overview if the router is content with it (default: auto where --sa is)")
    p.add_argument("--budget", type=float, metavar="F", help="run no viable configuration whose prompt costs more "
                   "than F of the dense language model's; without a router, the costliest that fits")
    add_flags(p)
    p.add_argument("--max-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature: draw from the likeliest "
                   "tokens that hold probability P (default: 1)")
    p.add_argument("--seed", type=int, default=0, help="for --temperature (default: 0)")
    p.add_placement()
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    p.add_argument("--compile", action="store_true", help="torch.compile what repeats (see VLM.compile): a minute, for "
                   "many questions")
    p.add_argument("--explain", metavar="FILE.png", help="draw where the (last) answer's attention went, by layer, "
                   "and what --reduce kept")
    p.add_argument("--json", action="store_true", help="one JSON object per question instead of plain answers")
    args = p.parse_args(argv)
    given(p, args)
    check_batch(p, args)
    for name, ok, what in (("max_tokens", args.max_tokens >= 1, "at least 1"),
                           ("batch_size", args.batch_size >= 1, "at least 1"),
                           ("threads", args.threads is None or 1 <= args.threads <= 1024, "from 1 to 1,024"),
                           ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
                           ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
                           ("budget", args.budget is None or 0 < args.budget < math.inf, "above 0")):
        if not ok:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number {what}")
    if not 0 <= args.seed < 1 << 63:
        p.error(f"--seed {args.seed}: give a number from 0 to 2**63 - 1")
    if args.explain and (Path(args.explain).suffix != ".png" or not Path(args.explain).parent.is_dir()):
        p.error(f"--explain {args.explain}: give a .png file in a directory that exists")
    if args.explain and not args.image:
        p.error("--explain draws an image: give one with --image")
    if args.pixels == "auto" and args.sa != "auto":
        p.error("--pixels auto goes with --sa auto; name the pixels, too")
    if args.budget is not None and args.sa != "auto":
        p.error("--budget chooses the configuration itself; leave --sa out")
    return args


def check_batch(p, args):
    """Either --q or --batch, and what goes with it; adds what the second needs."""
    if not args.batch:
        if not args.q and not (sys.stdin.isatty() and sys.stdout.isatty()):
            p.error("give a question, --q TEXT, or many of them, --batch FILE.jsonl; on a terminal a conversation "
                    "begins without them")
        for name, mend in (("json", "is for --q"), ("explain", "is for --q; in a conversation type /explain FILE.png")):
            if not args.q and getattr(args, name):
                p.error(f"--{name} {mend}")
        for name in ("out", "batch_size"):
            if getattr(args, name) is not None:
                p.error(f"--{name.replace('_', '-')} is for --batch; leave it out")
    for name, mend in (("q", "write the question into its lines"), ("image", "write the path into its lines"),
                       ("explain", "ask a single question with --image and --q")):
        if args.batch and getattr(args, name):
            p.error(f"--{name} does not go with --batch: {mend}")
    args.batch_size = 16 if args.batch_size is None else args.batch_size
    given = [name for name in ASKED if name == "model" or getattr(args, name) != p.get_default(name)]
    args.run = " ".join(f"--{name.replace('_', '-')} {getattr(args, name)}" for name in given)


def text_of(question, n, config=None):
    """The prompt of a question about n images, as the family of a Config has it. Raises ValueError."""
    try:
        return data.chatml([data.place_images(question, n, config)])
    except ValueError as e:
        raise ValueError(f"--q {textwrap.shorten(question, 60, placeholder=' ...')!r}: {e}") from None


def configuration(args, config, prefix, text, dense_vision):
    """(what VLM.prefill is called with, the configurations that a router may choose) for a prompt that begins by
    `prefix`, with all its images, and has `text` tokens; without reduction `dense_vision` visual ones."""
    if args.budget is not None:
        asks = pixels_of(args, config) == "auto" and data.has_overview(prefix)
        allowed = within_budget(config, args.budget, text, len(prefix.v_pos), dense_vision, asks)
        return ("auto", allowed) if config.router else (allowed[0], None)
    if args.sa != "auto":
        return config.configuration(args.sa), None
    if config.router:
        return "auto", None
    return max(config.viable, key=len, default=config.configuration("dense")), None


def pixels_of(args, config):
    """What VLM.generate is called with. Raises ValueError where the model cannot have it."""
    config.allowed_pixels(args.pixels if args.pixels == "overview" else "all", ())
    chooses = config.router and config.overview
    if args.pixels == "auto" and not chooses:
        raise ValueError("--pixels auto: this model has no router that chooses them; give overview or all")
    return args.pixels or ("auto" if chooses and args.sa == "auto" else "all")


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
        words = textwrap.shorten(", ".join(dict.fromkeys(words)), 400, placeholder=" ...")
        which = f"; it has no word for {words}" if words else ""
        print(f"this is the miniature: it knows only quilts (python -m toy --show x.png) and questions about "
              f"them{which}", file=sys.stderr)
    if len(images) > 1:
        print("of several images each is one tile, too coarse for the miniature's signs: give one at a time",
              file=sys.stderr)


def load_model(args):
    """The VLM of --model, placed, reduced and compiled as the command line says."""
    device = placement(args.device)

    import torch  # 1.5 s

    from model import VLM
    if args.threads:
        torch.set_num_threads(args.threads)
    model = VLM.from_pretrained(checkpoint_path(args.model), args.dtype, device)
    if args.compile:
        model.compile()
    model.config.bound_pixels(args)
    if args.reduce is not None:
        warn_untrained(args.reduce, model.config.reduce, args.model)
        model.add_reduction(args.reduce)
    if model.config.reduction.inside:  # before any question
        sa = "auto" if args.sa == "auto" and model.config.viable else model.config.configuration(
            "dense" if args.sa == "auto" else args.sa)
        model.config.check_reduction(sa if args.budget is None else "auto")
    return model


def main(argv=None):
    args = parse(argv)
    if args.batch:
        return answer_file(args)
    images = [pictures.load_image(path) for path in args.image]  # before the model: mistakes show at once
    for q in args.q or ():
        text_of(q, len(images))
    model = load_model(args)
    c, single = model.config, len(images) == 1
    if not args.q:
        return converse(args, model, images)
    texts = [text_of(q, len(images), c) for q in args.q]
    images = [pictures.to_rgb(image, c.transparency) for image in images]
    processed = [data.process_image(image, c, single) for image in images]
    dense_vision = sum(data.tiling(*image.size, c.unreduced(), single).tokens for image in images)
    if not images:
        print("no --image: the model answers from the text alone", file=sys.stderr)
    if c.world == "toy":
        warn_of_other_worlds(args.q, images, model.tokenizer)
    warn_of_layers(args, c)
    from conversation import Conversation  # with torch, 1.5 s
    stream, wanted = sys.stdout.isatty() and not args.json, pixels_of(args, c)
    conversations, costs = {}, Costs(c, processed, dense_vision)
    for question, text in zip(args.q, texts):
        prefix, own = data.split_shared(text)
        prefix = data.encode(prefix, model.tokenizer, processed)
        prompt = data.encode(own, model.tokenizer, start=prefix.end)
        sa, allowed = configuration(args, c, prefix, len(prefix.ids) + len(prompt.ids), dense_vision)
        timings = dict.fromkeys(("encoder", "prefill", "decode"), 0.0)
        key, pixels = (tuple(prefix.ids), tuple(prefix.t_pos)), c.allowed_pixels(wanted, sa, allowed)
        routes, layer_tokens = [], []
        if (key, sa, pixels) not in conversations:
            capacity = len(prompt.ids) + min(args.max_tokens, 1024)
            conversations[key, sa, pixels] = Conversation(model, prefix, sa, pixels, capacity, timings)
        tokens = conversations[key, sa, pixels].answer(
            prompt, max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
            timings=timings, allowed=allowed, routes=routes, layer_tokens=layer_tokens,
            on_token=Stream(model.tokenizer) if stream else None)
        asked = Route(key, sa, pixels, routes[0], layer_tokens[0])
        report = {"question": question, **report_of(model, costs, asked, prefix, prompt, tokens),
                  "seconds": {k: round(timings[k], 4) for k in ("encoder", "prefill", "decode")}}
        if args.json:
            print(json.dumps(report), flush=True)
        else:
            print("" if stream else " ".join(report["answer"].splitlines()), flush=True)
        print(summary(c, report, costs.questions), file=sys.stderr)
    if args.explain:
        import explain
        seen = data.seen(data.join(prefix, prompt), routes[0].pixels, c)
        look = explain.attention_to_images(model, seen, tokens, routes[0].sa)
        explain.draw(args.explain, images, seen.images, c, report, look, costs.questions)
        print(f"{args.explain}: where the last answer's attention went", file=sys.stderr)


def converse(args, model, images):
    """Without --q: a conversation on the terminal."""
    c = model.config
    if c.reduction.inside:
        raise ValueError(f"--reduce {c.reduce}: which tokens go depends on the question, so a conversation has nothing "
                         "to go on from; ask with --q")
    warn_of_layers(args, c)
    warn = partial(warn_of_other_worlds, tokenizer=model.tokenizer) if c.world == "toy" else None
    pixels_of(args, c)  # mistakes show at once

    def choose(sa, *prompt):
        own = {"sa": sa, "budget": args.budget if sa == "auto" else None}
        if args.pixels == "auto" and sa != "auto":
            own["pixels"] = None
        own = Namespace(**{**vars(args), **own})
        sa, allowed = configuration(own, c, *prompt)
        return sa, allowed, c.allowed_pixels(pixels_of(own, c), sa, allowed)

    def check(sa):
        if sa != "auto":
            c.configuration(sa, "/sa")
        warn_of_layers(Namespace(**{**vars(args), "sa": sa}), c)
    talk(Chat(model, images, args.sa, choose, check, warn, max_tokens=args.max_tokens, temperature=args.temperature,
              top_p=args.top_p, seed=args.seed))


# --- many questions, each with images of its own --------------------------------------------------------------------

def answer_file(args):
    """Answers the rows of --batch in order, each as soon as those before it are done; those in --out already, not."""
    rows = read_questions(args.batch)  # before the model: mistakes show at once
    with alone_in(args.out) if args.out else nullcontext():
        answer_rows_of(args, rows, load_model(args))


def answer_rows_of(args, rows, model):
    """answer_file, once it has --out to itself. Raises SystemExit with status 1 where rows could not be answered."""
    how = f"{args.run} --dtype {str(model.dtype)[6:]}"
    heads = [json.dumps({**row, "run": how})[:-1] for row, _ in rows]  # how their lines begin
    done, bad = go_on(args.out, heads) if args.out else (0, 0)
    if done:
        print(f"{args.out}: has {done} of {counted(len(rows), 'row')} already", file=sys.stderr)
    if done < len(rows):
        bad += answer_rows(args, model, [question for _, question in rows], heads, done)
    if bad:
        print(f"{bad} of {counted(len(rows), 'row')} could not be answered", file=sys.stderr)
        raise SystemExit(1)


def answer_rows(args, model, questions, heads, done):
    """Writes the lines that follow the first `done`. Returns how many of them are errors."""
    c, bad = model.config, 0
    if c.world == "toy":
        warn_of_other_worlds([x[0] for x in questions if not isinstance(x, ValueError)], [], model.tokenizer)
    warn_of_layers(args, c)
    found = answers(model, questions, partial(configuration, args, c), args.batch_size, done, args.temperature,
                    args.seed, pixels_of(args, c), max_tokens=args.max_tokens, top_p=args.top_p)
    try:
        with signals(leave), tqdm(total=len(heads), initial=done, desc="answers", ncols=80) as bar:
            for x in found:
                report = {"error": x.error} if x.error else report_alone(model, x)
                write_line(args.out, f"{heads[done]}, {json.dumps(report)[1:]}")
                done, bad = done + 1, bad + bool(x.error)
                bar.update()
    except SystemExit:  # of a signal
        mend = "the same command goes on" if args.out else "with --out FILE.jsonl it could go on"
        print(f"stopped after {done} of {counted(len(heads), 'row')}; {mend}", file=sys.stderr)
        raise
    return bad


def report_alone(model, answer):
    """report_of an answers.Answer, as of a question that is asked alone."""
    asked, costs = answer.asked, Costs(model.config, answer.asked.shared.images, answer.asked.dense_vision)
    route = Route(None, asked.sa, asked.pixels, answer.plan, answer.layer_tokens)
    return report_of(model, costs, route, asked.shared, asked.own, answer.tokens)


def write_line(out, line):
    """Adds a line to a file, or to stdout, at once. Raises ValueError where there is no room."""
    with writing(out or "stdout"):
        if not out:
            return print(line, flush=True)
        with open(out, "a") as f:
            f.write(line + "\n")


@contextmanager
def alone_in(file):
    """Within, no other run writes there. Raises ValueError."""
    with writing(file), open(file, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{file}: another run is writing there; wait for it, or name another file") from None
        yield


def read_questions(path):
    """[(row, question)] of the lines of a file: a dict, empty where the line is none; (text, paths), or the SampleError
    that the row has. Raises ValueError where nothing can be made of the file."""
    rows, start = [], 0
    for i, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        row = {}
        try:
            if line.strip(b"\xef\xbb\xbf \t\r"):  # byte order marks, and blanks
                row = parse_sample(line, start)
                rows.append((row, question_of(row, Path(path).parent)))
        except data.SampleError as e:
            rows.append((row, data.SampleError(e.kind, f"line {i}: {e}")))
        if taken := row.keys() & set(RESULT):
            raise ValueError(f"{path}, line {i}: the key {min(taken)} is one of those that the answer adds; rename it")
        start += len(line) + 1
    if not any(row for row, _ in rows):
        raise ValueError(f"{path}: no line of it is a JSON object; give one a line, with image and question")
    return rows


def question_of(row, folder):
    """(text, paths) of a row's dict. Raises SampleError."""
    text, images = row.get("question"), image_names(row)
    if not isinstance(text, str):
        raise data.SampleError("malformed line", f"the question is no text but {kind_of(text)}; give one")
    return text, [str(folder / name) for name in images]


def go_on(out, heads):
    """(lines, those with errors) that a stopped run has left in a file; one that it was writing is cut off. heads: how
    each line begins. Raises ValueError where the file is about something else, or cannot be written."""
    lines = Path(out).read_bytes().split(b"\n") if Path(out).is_file() else [b""]
    last, bad = len(lines) - 1, 0  # the last one: as far as it was written
    for i, line in enumerate(lines):
        head = heads[i].encode() + b", " if i < len(heads) else b"\n"  # no line begins so
        whole = line.startswith(head) and line.endswith(b"}")
        if not (whole or i == last and (line.startswith(head) or head.startswith(line))):
            raise ValueError(f"{out}: line {i + 1} is not what this command with these flags writes there; remove the "
                             "file, or name another one")
        bad += i < last and line.startswith(head + b'"error": ')
    with writing(out), open(out, "ab") as f:
        f.truncate(sum(len(line) + 1 for line in lines[:-1]))
    return last, bad


if __name__ == "__main__":
    run(main)
