"""Training, all stages, in one loop.

    python train.py              the miniature: stages 1, 2, 3 from the dense weights in nano/dense, then the table
    python train.py --stage 0    a dense miniature from nothing
    python train.py --stage 1 --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf --data mix.yaml --images DIR
    torchrun --nproc-per-node 8 train.py --stage 2 --data mix.yaml --images DIR [--fsdp]

Stage 0 makes the dense model (of a joined SigLIP and Qwen2, its connector), 1 trains the new cross-attentions alone, 2
trains everything, in a viable configuration drawn anew for each step: one universal model (paper 4.2.3, 5.1). Stage 3
trains the router, and nothing else (4.3). Everything random follows from the seed and the step's number, so that a run
that was stopped, or killed, goes on as if it had not been.
"""
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint as run_twice
from tqdm import tqdm

import mixture
import router
import toy
from config import Parser, run
from flops import name
from conversations import Conversations
from learn import optimizers, rate
from model import VLM
from quilts import Quilts, fresh
from ranks import Ranks, shard, whole
from sample import placement

DENSE = Path(__file__).parent / "nano" / "dense"  # where the miniature starts from

GROUPS = toy.STRATA
USUAL = 9, (toy.SIDE * toy.CELL,) * 2  # text tokens of a question, size of its picture: for the savings

RECIPES = {  # of the miniature; batches of pictures with 10 questions or 30 short ones each, in stage 3 of questions
    0: dict(batch_size=24, steps=5000, lr=0.015, warmup=50, flat=0.6, words=1.0, rest_from=3700),
    1: dict(batch_size=24, steps=120, lr=0.02, warmup=20, flat=0.5),
    2: dict(batch_size=24, steps=1200, lr=0.01, warmup=30, flat=0.5, early=0.375),
    3: dict(batch_size=128, steps=400, lr=0.25, warmup=20, flat=0.5, questions=500, labels="task", leave_out=()),
}
RATES = {0: 1e-3, 1: 1e-4, 2: 1e-5}  # on training files, 128 samples a step (paper 5.1; 0 as LLaVA's first stage)
ROUTER = dict(batch_size=16, steps=1000, lr=3e-3, warmup=20, flat=0.5, questions=500, labels="task", leave_out=())
AROUND = dict(keep=2, workers=0, pass_size=4, max_bad=0.01, sample_every=0, dtype="float32", compile=False, fsdp=False,
              checkpointing=False, overfit=False, early=0)  # what does not belong to a recipe


# --- checkpoints ------------------------------------------------------------------------------------------------------

def save(out, model, opts, state, keep=2, rank=0):
    """out/stageN-STEP: a checkpoint as any other, with the optimisers and state.json beside it; renamed into place.

    All ranks call it, rank 0 writes."""
    model.config.stage, model.config.step = str(state["stage"]), state["step"]
    target = out / f"stage{state['stage']}-{state['step']:06d}"
    beside = out / (target.name + ".writing")
    weights = {n: whole(p.detach()) for n, p in model.named_parameters()}
    moments = {f"{kind}.{name}.{key}": whole(x).cpu() for kind, (opt, names, _) in opts.items()
               for name, p in zip(names, opt.param_groups[0]["params"]) for key, x in opt.state[p].items()}
    if rank or target.exists():
        return target
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed here
    model.save_pretrained(beside, weights)
    save_file(moments, beside / "optimizer.safetensors")
    (beside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    os.replace(beside, target)
    for old in sorted(out.glob(f"stage{state['stage']}-??????"))[:-keep]:
        shutil.rmtree(old)
    return target


def restore(checkpoint, opts):
    """Puts the optimisers' tensors back, each rank its part."""
    from torch.distributed.tensor import distribute_tensor
    for label, x in load_file(checkpoint / "optimizer.safetensors").items():
        kind, _, rest = label.partition(".")
        parameter, _, key = rest.rpartition(".")
        opt, names, _ = opts[kind]
        p = opt.param_groups[0]["params"][names.index(parameter)]
        if x.ndim:  # a step counter stays where it is
            x = x.to(p.device)
            x = distribute_tensor(x, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else x
        opt.state[p][key] = x


def newest(out, stages):
    """The newest checkpoint directory of the latest of these stages that has one; None without."""
    found = [p for stage in sorted(stages) for p in sorted(out.glob(f"stage{stage}-??????"))]
    return found[-1] if found else None


def forget(file, stage, step):
    """Drops what a run wrote into a .jsonl file after the checkpoint from which it goes on."""
    if file.exists():
        rows = [line for line in open(file) if line.endswith("\n")]
        kept = [line for line in rows if (x := json.loads(line)).get("stage", stage) != stage or x["step"] <= step]
        beside = file.with_name(file.name + ".writing")
        beside.write_text("".join(kept))
        os.replace(beside, file)


# --- the loop ---------------------------------------------------------------------------------------------------------

def draw(viable, seed, step, early=0):
    """The configuration of a step (paper 4.2.3), the smallest twice and the largest three times as often as the others.

    In the first `early` steps only these two, three to one for the largest: what it has learned before the others
    come, it keeps."""
    small, large = min(viable, key=len), max(viable, key=len)
    pool = [small, large, large, large] if step < early else [*viable, small, large, large]
    return pool[np.random.default_rng((seed, step)).integers(len(pool))]


def lessons(model, stage, out, s, samples, ranks):
    """What a stage learns from: batches by number, and their losses. For stage 3 the pseudo-labels are made first."""
    if samples is not None and stage < 3:
        return Conversations(model, stage, samples, s, out, ranks)
    if stage < 3:
        return Quilts(model, s["seed"], s["batch_size"], s["turns"], s.get("words", 0.0), s.get("rest_from", 0))
    n, seed = s["questions"], s["seed"]
    exam = mixture.Exam(samples, n, seed) if samples else toy.exam(seed, n, toy.TRAIN)
    records = router.log_records(out / "labels.jsonl", model, exam)
    targets = router.pseudo_labels(model.config.viable, records, s["labels"], s["leave_out"])
    return router.Lessons(model, exam, targets, s["seed"], s["batch_size"])


def trainable(model, stage, joined=False):
    """What a stage trains. Stage 0 of a joined SigLIP and Qwen2 trains the connector between them, which is new."""
    model.requires_grad_(stage in (0, 2) and not joined)
    for part in {1: [model.language_model.cross], 3: [model.router]}.get(stage, []):
        part.requires_grad_(True)
    if joined:
        model.multi_modal_projector.requires_grad_(True)
        model.image_newline.requires_grad_(True)


def train(model, stage, out, settings, checkpoint=None, samples=None, ranks=None):
    """Runs a stage to its end, from a checkpoint of the same stage if there is one, and leaves checkpoints in out/.

    settings: what RECIPES has, and what main adds. samples: mixture.Samples, else the miniature's world. Ctrl-C saves,
    says so and leaves.
    """
    s, c, ranks = {**AROUND, **settings}, model.config, ranks or Ranks(model.image_newline.device)
    first = json.loads((checkpoint / "state.json").read_text())["step"] if checkpoint else 0
    out.mkdir(parents=True, exist_ok=True)
    trainable(model, stage, s.get("joined", False))
    n, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == x) for x in (True, False))
    if ranks.rank == 0:
        print(f"stage {stage}: {n:,} parameters train, {frozen:,} are frozen", file=sys.stderr)
        for file in ("log.jsonl", "bad.jsonl"):
            forget(out / file, stage, first)
    ranks.total(0)  # the others wait for that
    for block in model.blocks() if s["checkpointing"] else ():
        block.forward = partial(run_twice, block.forward, use_reentrant=False, preserve_rng_state=False)
    if s["compile"]:
        model.compile()
    if s["fsdp"]:
        shard(model)
    opts = optimizers(model, s["lr"], muon=samples is None)
    if checkpoint:
        restore(checkpoint, opts)
    source = lessons(model, stage, out, s, samples, ranks)
    feed = source.batches(first + (0 if samples else stage << 40))
    log, mean, start = open(out / "log.jsonl", "a") if ranks.rank == 0 else None, 0.0, time.perf_counter()
    asked_to_stop = []
    before = signal.signal(signal.SIGINT, lambda *_: asked_to_stop.append(1))
    bar = tqdm(range(first, s["steps"]), initial=first, total=s["steps"], desc=f"stage {stage}", ncols=80,
               disable=ranks.rank > 0)
    model.train()

    def keep_it(step):
        return save(out, model, opts, {**s, "stage": stage, "step": step}, s["keep"], ranks.rank)
    mixed = torch.autocast(ranks.device.type, torch.bfloat16, enabled=s["dtype"] == "bfloat16")
    for step in bar:
        sa = tuple(range(c.layers)) if stage == 0 else draw(c.viable, s["seed"], step, s["early"] * s["steps"])
        value = 0.0
        try:
            with mixed:
                for loss in source.losses(next(feed), sa, step):
                    loss.backward()
                    value += loss.item() / ranks.size
        except ValueError:  # too many faults in the data
            if step > first:
                keep_it(step)
            raise
        value, = ranks.total(value)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, _, lr in opts.values():
            opt.param_groups[0]["lr"] = lr * rate(step, s["steps"], s["warmup"], s["flat"])
            opt.step()
            opt.zero_grad()
        mean = 0.95 * mean + 0.05 * value if mean else value
        if log:
            factor = rate(step, s["steps"], s["warmup"], s["flat"])
            log.write(json.dumps({"stage": stage, "step": step + 1, "loss": value, "sa": list(sa),
                                  "lr": {kind: lr * factor for kind, (_, _, lr) in opts.items()},
                                  **({"tokens": source.tokens} if hasattr(source, "tokens") else {}),
                                  "seconds": round(time.perf_counter() - start, 2)}) + "\n")
            log.flush()
        if step % 10 == 9:
            bar.set_postfix_str(f"loss {mean:.3f}" + f", layers {name(c, sa)}" * (stage < 3))
        done, stop = step + 1 == s["steps"], ranks.total(len(asked_to_stop))[0]
        with mixed:
            said = source.answer() if s["sample_every"] and (step + 1) % s["sample_every"] == 0 else None
        if said and log:
            asked, answer, wanted = (shorten(x, 36 - 8 * i) for i, x in enumerate(said))
            bar.write(f"{asked} {answer} (to learn: {wanted})", file=sys.stderr)
            log.write(json.dumps({"stage": stage, "step": step + 1, "question": said[0], "answer": said[1],
                                  "wanted": said[2]}) + "\n")
        if done or stop or (step + 1) % s["save_every"] == 0:
            checkpoint = keep_it(step + 1)
        if stop and not done:
            bar.close()
            signal.signal(signal.SIGINT, before)
            if log:
                print(f"stopped after step {step + 1} of {s['steps']}, saved as {checkpoint}; add --resume to the "
                      "same command to go on", file=sys.stderr)
            raise SystemExit(130)
    signal.signal(signal.SIGINT, before)
    return model.eval()


def parse(argv=None):
    p = Parser(description="Train: without --stage, the miniature's stages 1 to 3 from nano/dense, then the table.",
               epilog="The miniature's stage 0 takes about 42 minutes on one core, its others 7 together on two. Under "
               "torchrun, training files are shared out among the processes.")
    p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="0 dense pretraining, 1 the new cross-attentions "
                   "alone, 2 everything, universal, 3 the router")
    p.add_argument("--model", metavar="NAME", help="what the (first) stage starts from (default: the newest earlier "
                   "stage in --out; for the miniature nano/dense, in stage 3 nano)")
    p.add_argument("--data", default="toy", metavar="FILE", help="toy: the quilts of toy.py (default); or LLaVA's "
                   ".json or .jsonl, or a mixture of them, .yaml or .json")
    p.add_argument("--images", metavar="DIR", help="where the pictures' paths start (default: where each file is)")
    p.add_argument("--out", default="out", metavar="DIR", help="checkpoints, log.jsonl, bad.jsonl, table.json, "
                   "table.png (default: out)")
    p.add_argument("--steps", type=int, metavar="N", help="optimisation steps of a stage (default: of a file, once "
                   "through it)")
    p.add_argument("--batch-size", type=int, metavar="N", help="samples a step: default 128, of the miniature 24 "
                   "pictures, in stage 3 128 questions")
    p.add_argument("--pass-size", type=int, metavar="N", help="samples at once in memory, the step's gradient adds "
                   "up (default: 4)")
    p.add_argument("--turns", type=int, default=10, metavar="N", help="miniature: questions a picture (default: 10)")
    p.add_argument("--lr", type=float, metavar="X", help="AdamW's learning rate (default: 1e-4 in stage 1, 1e-5 in "
                   "stage 2); of the miniature, Muon's, and AdamW has a tenth of it")
    p.add_argument("--words", type=float, metavar="X", help="weight of the words that visual tokens say (default: 1 in "
                   "stage 0, else 0)")
    p.add_argument("--rest-from", type=int, metavar="N", help="stage 0: from which step on layers rest (default: 3200)")
    p.add_argument("--early", type=float, metavar="F", help="stage 2: the share of the steps that comes first and "
                   "trains the largest and the smallest configuration alone (default: 0, of the miniature 0.375)")
    p.add_argument("--viable", action="append", metavar="LAYERS", help="a configuration to train: none or 4,7; may be "
                   "given several times (default: the miniature's six, or by the number of layers)")
    p.add_argument("--labels", choices=("task", "sample"), help="stage 3: what the router is to choose, per task as "
                   "the paper (default), or the oracle's choice per sample")
    p.add_argument("--leave-out", action="append", metavar="TASK", help="stage 3: a task, of a mixture the name of a "
                   "file, that the router does not learn from; may be given several times")
    p.add_argument("--label-rule", choices=("assistant", "llava"), help="what is learned of a conversation: answers "
                   "(default), or what LLaVA-OneVision learns, all markers and newlines too")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest sample, text and vision; a longer one gets "
                   "fewer tiles, or is left out")
    p.add_argument("--max-bad", type=float, metavar="F", help="stop when more than this share of the samples cannot be "
                   "used (default: 0.01)")
    p.add_argument("--workers", type=int, metavar="N", help="processes that read ahead (default: 2; 0: none)")
    p.add_argument("--overfit", action="store_true", help="the first step's samples again and again")
    p.add_argument("--sample-every", type=int, metavar="N", help="steps between shown answers (default: 100; 0: never)")
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 200)")
    p.add_argument("--keep", type=int, metavar="K", help="checkpoints of a stage to keep (default: 2)")
    p.add_argument("--exam", type=int, default=250, metavar="N", help="questions a task for the table (default: 250)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; weights are float32 (default: "
                   "bfloat16 on CUDA, else float32)")
    p.add_argument("--compile", action="store_true", help="torch.compile the blocks (see VLM.compile)")
    p.add_argument("--checkpointing", action="store_true", help="keep only the blocks' inputs and run them twice: "
                   "less memory, a third more time")
    p.add_argument("--fsdp", action="store_true", help="under torchrun: share weights and optimiser states out too")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    p.add_argument("--resume", action="store_true", help="go on with what is in --out, in its own settings")
    args = p.parse_args(argv)
    for flag in ("steps", "batch_size", "pass_size", "turns", "save_every", "keep", "exam", "threads", "max_tokens"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a number of at least 1")
    if args.lr is not None and not args.lr > 0:
        p.error(f"--lr {args.lr}: give a number above 0")
    for flag in ("workers", "sample_every", "max_bad", "early"):
        if getattr(args, flag) is not None and not getattr(args, flag) >= 0:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give 0 or more")
    if args.data == "toy" and (args.fsdp or "WORLD_SIZE" in os.environ):
        p.error("the miniature trains in one process: give a training file with --data, or leave torchrun out")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        p.error("--fsdp shares a model out among processes: start them with torchrun --nproc-per-node N train.py ...")
    if args.data != "toy" and args.stage is None:
        p.error(f"--data {args.data}: give --stage 1, 2 or 3, or 0 for a new connector")
    if (args.data == "toy" or args.stage == 3) and (args.overfit or args.pass_size or args.sample_every):
        p.error("--overfit, --pass-size and --sample-every are for training files, in stages 0 to 2")
    if args.stage == 3 and "WORLD_SIZE" in os.environ:
        p.error("--stage 3 trains in one process: leave torchrun out")
    return args


def start(stage, name, args, out):
    """The model that a stage begins with. name: of a checkpoint, or None."""
    mini = args.data == "toy"
    if stage == 0 and not name and mini:
        return fresh(args.seed)
    nano = name == "nano" and not Path("nano/config.json").is_file()
    source = DENSE.parent if nano else name or newest(out, range(stage))
    if not source and not mini:
        raise ValueError("nothing to start from: give a checkpoint with --model, or an --out with an earlier stage")
    model = VLM.from_pretrained(source or (DENSE.parent if stage == 3 else DENSE))
    if stage == 3:
        torch.manual_seed(args.seed)
        if args.labels == "sample":  # chance decides many of the oracle's choices: there is always doubt
            model.config.doubt = 1.0
        return model.add_router()
    if stage and not model.config.ca:
        model.add_cross_attention(*((toy.CA, toy.SA, toy.VIABLE) if mini else ()))
    return model.remove_router()


def prepare(stage, args, model, samples):
    """The settings of a stage that begins."""
    flags = ("steps", "batch_size", "lr", "words", "rest_from", "labels", "leave_out", "label_rule", "max_tokens",
             *AROUND)
    given = {k: v for k in flags if (v := getattr(args, k)) is not None}
    cuda = model.image_newline.device.type == "cuda"
    common = {**AROUND, "seed": args.seed, "save_every": 200, "dtype": "bfloat16" if cuda and samples else "float32",
              "joined": stage == 0 and model.config.stage == "pretrained"}
    if samples is None:
        return {**common, **RECIPES[stage], "turns": args.turns, **given}
    if stage == 3:
        return {**common, **ROUTER, "samples": len(samples), **given}
    size = given.get("batch_size", 128)
    steps = given.get("steps", -(-len(samples) // size))
    return {**common, "workers": 2, "sample_every": 100, "batch_size": size, "steps": steps, "lr": RATES[stage],
            "flat": None, "warmup": -(-3 * steps // 100), "label_rule": "assistant", "samples": len(samples), **given}


def main(argv=None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # vanishing gradients of saturated sigmoids would be 100 times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked
    ranks = Ranks(torch.device(placement(args.device, "float32")[0]))
    out, stages = Path(args.out), [1, 2, 3] if args.stage is None else [args.stage]
    if not args.resume and any(newest(out, [stage]) for stage in stages):
        raise ValueError(f"{out} holds a run of this stage already: --resume goes on with it, --out begins another")
    for stage in stages:
        checkpoint = newest(out, [stage])
        settings = json.loads((checkpoint / "state.json").read_text()) if checkpoint else {}
        model = (VLM.from_pretrained(checkpoint) if checkpoint else
                 start(stage, args.model if stage == stages[0] else None, args, out)).to(ranks.device)
        samples = None if args.data == "toy" else mixture.Samples(
            args.data, args.images, model.tokenizer, model.config, settings.get("label_rule") or args.label_rule
            or "assistant", settings.get("max_tokens") or args.max_tokens, settings.get("seed", args.seed))
        if not checkpoint:
            settings = prepare(stage, args, model, samples)
            if stage in (1, 2) and args.viable:
                c = model.config
                c.viable = c.visor_layers(c.ca, c.sa, [c.configuration(v) for v in args.viable])[2]
        elif settings.get("samples") != (len(samples) if samples else None):
            raise ValueError(f"{checkpoint} learned from {settings.get('samples') or 'no'} samples of a file, "
                             f"{args.data} has {len(samples) if samples else 'none'}: give the same --data, or another "
                             "--out")
        settings |= {k: v for k in (*AROUND, "save_every") if (v := getattr(args, k)) is not None and v is not False}
        settings["fsdp"] = args.fsdp  # a run may go on with other processes
        if not (checkpoint and settings["step"] == settings["steps"]):
            model = train(model, stage, out, settings, checkpoint, samples, ranks)
    if args.data == "toy":
        report(model, args, out)
    elif ranks.rank == 0:
        if stages == [3]:  # with the questions that it has learned from
            router.report(model, exam := mixture.Exam(samples, settings["questions"], settings["seed"]), *exam.usual())
        print(newest(out, stages))
    ranks.leave()


def report(model, args, out):
    """The table of accuracy by configuration and task, on held-out questions, and what the router did."""
    c, exam = model.config, toy.exam(args.seed, args.exam)
    everything = [tuple(range(c.layers))]
    records = router.all_records(model, exam, c.viable or everything)
    dense = router.all_records(VLM.from_pretrained(DENSE), exam, everything) if c.viable else None
    table = router.Report(c, records, GROUPS, *USUAL, dense)
    print(table.text())
    if model.router is not None:
        print("\n" + table.routes())
    table.save(out / "table.json")
    try:
        table.draw(out / "table.png")
    except ImportError:
        print(f"no {out}/table.png: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)
    print(f"the table is in {out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
