"""Training, all stages, in one loop, with its optimisers and schedule.

    python train.py              the miniature: stages 1, 2, 3 from the dense weights in nano/dense, then the table
    python train.py --stage 0    a dense miniature from nothing
    python train.py --stage 1 --model llava-hf/llava-onevision-qwen2-0.5b-ov-hf --data mix.yaml --images DIR
    torchrun --nproc-per-node 8 train.py --stage 2 --data mix.yaml --images DIR [--fsdp]

Stage 0 makes the dense model (of a joined SigLIP and Qwen2, its connector), 1 trains the new cross-attentions alone, 2
trains everything, in a viable configuration drawn anew for each step: one universal model (paper 4.2.3, 5.1). Stage 3
trains the router, and nothing else (4.3). Everything random follows from the seed and the step's number, so that a run
that was stopped, or killed, goes on as if it had not been. What a step learns from are ToyBatches, ConversationBatches
or RouterBatches; the loop does not tell them apart.
"""
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_twice
from tqdm import tqdm

import router
from checkpoints import SETTINGS, drop_rows_after, locked, newest, read_state, restore, save
from cli import Parser, Unwritable, append_rows, checkpoint_path, free_threads, interrupts, placement, run
from config import Plan, checked, plan_name
from evaluation import all_results
from families import read_config
from llava.samples import Samples, eval_questions, reference_prompt
from methods import add_flags, given, warn_untrained
from model import VLM
from parallel import Distributed, full_tensor, shard
from stages import (DEFAULTS, DENSE, first_model, first_settings, given_plans, given_settings, go_on_with, load,
                    make_batches, set_trainable)
from toy import world
from toy.muon import Muon
from toy.training import RECIPES, matrices_of
from weights import parts

NOT_INSIDE = "nothing of it is learned; give it to sample.py, with --sa dense"

# --- optimisers and schedule ------------------------------------------------------------------------------------------

def optimizers(model, lr, miniature=False):
    """{name: (optimizer, names of its parameters, learning rate)} for what trains: AdamW without weight decay (paper
    5.1). The miniature learns better with Muon for its matrices, and AdamW with a tenth of the rate for all else."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = matrices_of(model) if miniature else []
    others = [n for n in trained if n not in matrices]
    share, betas = (0.1, (0.9, 0.98)) if miniature else (1.0, (0.9, 0.999))
    fused = model.device.type in ("cpu", "cuda")  # one kernel: over 94 M parameters 0.10 s on one core, not 1.3 s
    opts = {}
    if matrices:
        rows = [[n or len(trained[name]) for n in parts(name, model.config).values()] for name in matrices]
        opts["muon"] = Muon([trained[n] for n in matrices], lr, rows=rows), matrices, lr
    if others:
        adamw = torch.optim.AdamW([trained[n] for n in others], lr * share, betas, weight_decay=0.0, fused=fused)
        opts["adamw"] = adamw, others, lr * share
    return opts


def lr_factor(step, steps, warmup, decay_start=None, restart=0):
    """The share of the learning rate at a step. Linear warm-up; then a cosine down to 0, or with decay_start constant
    up to decay_start * steps and linear down to 2 %. From step `restart` on all of it begins anew, and again after each
    half of as many steps, each time at two thirds of the rate."""
    if 0 < restart <= step:
        again, begun = restart // 2 or 1, restart
        times = (step - begun) // again
        begun += times * again
        return (2 / 3) ** (times + 1) * lr_factor(step - begun, min(again, steps - begun), warmup, decay_start)
    steps = min(steps, restart or steps)
    up = min(1.0, (step + 1) / max(warmup, 1))
    if decay_start is None:
        return up * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / max(1, steps - warmup))))
    return up * (1 - 0.98 * max(0.0, step / steps - decay_start) / (1 - decay_start))


# --- the loop ---------------------------------------------------------------------------------------------------------

def train(model, stage, out, settings, checkpoint=None, samples=None, distributed=None):
    """Runs a stage to its end, from a checkpoint of the same stage if there is one, and leaves checkpoints in out/.

    settings: what RECIPES has, and what main adds. samples: llava's, else the miniature's world. Ctrl-C and SIGTERM
    save and leave with status 130 or 143. Raises ValueError, and takes no step, where the loss is not finite."""
    s, distributed = {**DEFAULTS, **settings}, distributed or Distributed(model.device)
    first = read_state(checkpoint)["step"] if checkpoint else 0
    batches, opts = start(model, stage, out, s, first, checkpoint, samples, distributed)
    feed, began, mean, learned = batches.batches(first), time.perf_counter(), 0.0, False
    main_rank = distributed.rank == 0
    # FSDP has a policy of its own for mixed precision
    mixed = torch.autocast(model.device.type, torch.bfloat16, enabled=s["dtype"] == "bfloat16" and not s["fsdp"])
    bar = tqdm(range(first, s["steps"]), initial=first, total=s["steps"], desc=f"stage {stage}", ncols=80,
               disable=not main_rank)

    def save_step(step):
        path = save(out, model, opts, {**s, "stage": stage, "step": step}, s["keep"], distributed.rank)
        distributed.sum(0)  # no rank leaves before rank 0 has written
        return path

    with interrupts() as asked:
        for step in bar:
            plan, value = batches.plan(step), 0.0
            try:
                with mixed:
                    for loss in batches.losses(next(feed), plan, step):       # micro-batches add their gradients up
                        loss.backward()
                        value += loss.detach().double()                     # read once a step
            except ValueError as e:                                         # too many bad samples
                if learned and not isinstance(e, Unwritable):               # what was learned is kept
                    save_step(step)
                raise
            value = distributed.sum(float(value))[0] / distributed.size
            norm = float(full_tensor(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            if not math.isfinite(value + norm):
                raise ValueError(f"step {step + 1}: the loss is {value:g}, the norm of its gradient {norm:g}; the step "
                                 f"is not taken. Last saved: {checkpoint or 'nothing'}. " + (
                                     "Begin again in another --out, with a lower --lr" if step > first else
                                     "The weights that it begins with are broken; begin with others"))
            learned = learned or value > 0
            factor = lr_factor(step, s["steps"], s["warmup"], s["decay_start"], s.get("restart", 0))
            for opt, _, lr in opts.values():
                opt.param_groups[0]["lr"] = lr * factor
                opt.step()
                opt.zero_grad()
            mean = 0.95 * mean + 0.05 * value if mean else value
            if step % 10 == 9:
                bar.set_postfix_str(f"loss {mean:.3f}" + (f", layers {plan_name(model.config, plan)}" if plan else ""))
            rows = [{"stage": stage, "step": step + 1, "loss": value or None, **(plan._asdict() if plan else {}),
                     "tokens": batches.tokens,
                     "lr": {kind: lr * factor for kind, (_, _, lr) in opts.items()},
                     "seconds": round(time.perf_counter() - began, 2)}]
            if s["sample_every"] and (step + 1) % s["sample_every"] == 0:
                with mixed:
                    shown = batches.show_answer()                           # on every rank
                if shown:
                    short = [shorten(x, 36 - 8 * i) for i, x in enumerate(shown)]
                    bar.write("{} {} (to learn: {})".format(*short), file=sys.stderr)
                    rows.append({"stage": stage, "step": step + 1, "question": shown[0], "answer": shown[1],
                                 "wanted": shown[2]})
            append_rows(out / "log.jsonl", rows if main_rank else ())
            done, stop = step + 1 == s["steps"], distributed.sum(len(asked))[0]
            if done or stop or (step + 1) % s["save_every"] == 0:
                checkpoint = save_step(step + 1)
            if stop and not done:
                bar.close()
                if main_rank:
                    print(f"stopped after step {step + 1} of {s['steps']}, saved as {checkpoint}; add --resume to the "
                          "same command to go on", file=sys.stderr)
                raise SystemExit(128 + (asked or [signal.SIGTERM])[0])
    return model.eval()


def start(model, stage, out, s, first, checkpoint, samples, distributed):
    """Makes a model ready for a stage that begins, or goes on, at step `first`: (what it learns from, optimisers)."""
    out.mkdir(parents=True, exist_ok=True)
    set_trainable(model, stage, s.get("joined", False))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    if distributed.rank == 0:
        print(f"stage {stage}: {trained:,} parameters train, {frozen:,} are frozen; threads: {torch.get_num_threads()}",
              file=sys.stderr)
        append_rows(out / "log.jsonl", ())                  # that it can be written to
        drop_rows_after(out / "log.jsonl", stage, first)
        drop_rows_after(out / "bad.jsonl", stage, first, number=int, sample=str, kind=str, message=str)
    distributed.sum(0)  # the others wait for that
    for block in model.blocks() if s["checkpointing"] else ():
        block.forward = partial(run_twice, block.forward, use_reentrant=False, preserve_rng_state=False)
    if s["compile"]:
        model.compile()
    if s["fsdp"] and model.config.aspect == "dynamic":
        raise ValueError("--fsdp: this encoder runs once for each size of picture, and processes that share it out "
                         "would not run it equally often; leave --fsdp out")
    if s["fsdp"]:
        shard(model, s["dtype"] == "bfloat16")
    opts = optimizers(model, s["lr"], miniature=samples is None)
    if checkpoint:
        restore(checkpoint, opts)
    batches = make_batches(model, stage, out, s, samples, distributed)
    model.train()
    return batches, opts


# --- command line -----------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(doc=__doc__,
               description="Train: without --stage, the miniature's stages 1 to 3 from nano/dense, then the table.",
               epilog="The miniature's stage 0 takes about 2 h 45 min on one core, its others 13 min together on two.")
    p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="0 dense pretraining, 1 the new cross-attentions "
                   "alone, 2 everything, universal, 3 the router")
    p.add_argument("--model", metavar="NAME", help="what the (first) stage starts from (default: the newest earlier "
                   "stage in --out; for the miniature nano/dense, in stage 3 nano)")
    p.add_argument("--data", default="toy", metavar="FILE", help="toy: the quilts of toy/ (default); or LLaVA's "
                   ".json or .jsonl, or a mixture of them, .yaml or .json")
    p.add_argument("--images", metavar="DIR", help="where the images' paths start (default: where each file is)")
    p.add_argument("--out", default="out", metavar="DIR", help="checkpoints, log.jsonl, bad.jsonl, table.json, "
                   "table.png (default: out)")
    p.add_argument("--steps", type=int, metavar="N", help="optimisation steps of a stage (default: of a file, once "
                   "through it)")
    p.add_argument("--batch-size", type=int, metavar="N", help="samples a step: default 128, of the miniature 24 "
                   "images, in stage 3 64 questions")
    p.add_argument("--micro-batch-size", type=int, metavar="N", help="samples in memory at once (default: 4)")
    p.add_argument("--lr", type=float, metavar="X", help="AdamW's learning rate (default: 1e-3 for a new connector, "
                   "1e-4 in stage 1, else 1e-5); of the miniature, Muon's, and AdamW has a tenth of it")
    p.add_argument("--viable", action="append", metavar="LAYERS", help="what to train: none, 4,7, or ov:none over the "
                   "overview; may be given several times (default: the miniature's, or by the number of layers)")
    add_flags(p, "what to learn with, fewer visual tokens; stage 0 goes on from a dense model")
    p.add_argument("--labels", choices=("task", "sample"), help="stage 3: what the router is to choose, per task as "
                   "the paper (default), or the oracle's choice per sample")
    p.add_argument("--leave-out", action="append", metavar="TASK", help="stage 3: a task, of a mixture the name of a "
                   "file, that the router does not learn from; may be given several times")
    p.add_argument("--label-rule", choices=("assistant", "llava"), help="what is learned of a conversation: answers "
                   "(default), or what LLaVA-OneVision learns, all markers and newlines too")
    p.add_argument("--max-tokens", type=int, metavar="N", help="longest sample, text and vision; a longer one gets "
                   "fewer tiles, or is left out")
    p.add_argument("--max-bad", type=float, metavar="F", help="most of the samples that may be bad (default: 0.01)")
    p.add_argument("--workers", type=int, metavar="N", help="processes that read ahead (default: 2; 0: none)")
    p.add_argument("--overfit", action="store_true", help="the first step's samples again and again")
    p.add_argument("--sample-every", type=int, metavar="N", help="steps between shown answers (default: 100; 0: never)")
    p.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 200)")
    p.add_argument("--keep", type=int, metavar="K", help="checkpoints of a stage to keep (default: 2)")
    p.add_argument("--seed", type=int, metavar="N", help="(default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the arithmetic; weights are float32 (default: "
                   "bfloat16 on CUDA and on processors with AMX tiles, of the miniature float32)")
    p.add_argument("--compile", action="store_true", help="torch.compile what repeats (see VLM.compile)")
    p.add_argument("--checkpointing", action="store_true", help="keep only the blocks' inputs and run them twice: "
                   "less memory, a third more time")
    p.add_argument("--fsdp", action="store_true", help="under torchrun: share weights and optimiser states out too")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: as many as there are idle "
                   "cores at the start, at least one; a resumed run keeps its number)")
    p.add_argument("--resume", action="store_true", help="go on with what is in --out, in its own settings; says which "
                   "flags it does not follow")
    p.add_argument("--skip-stage-1", action="store_true", help="stage 2: start from a dense model all the same")
    toy = p.add_argument_group("the miniature")
    toy.add_argument("--turns", type=int, metavar="N", help="questions an image (default: 10)")
    toy.add_argument("--questions", type=int, default=250, metavar="N", help="a task, for the table (default: 250)")
    toy.add_argument("--auxiliary-weight", type=float, metavar="X", help="stage 0: weight of the words that visual "
                     "tokens are taught (default: 1)")
    toy.add_argument("--draw-from", type=int, metavar="N", help="stage 0: the step from which vision is refined in "
                     f"viable configurations, too (default: {RECIPES[0]['draw_from']})")
    toy.add_argument("--restart", type=int, metavar="N", help="stage 0: the step from which the rate begins anew, and "
                     f"again every N / 2, at two thirds; 0: never (default: {RECIPES[0]['restart']})")
    toy.add_argument("--largest-first", type=float, metavar="F", help="stage 2: the share of the steps that comes "
                     "first and trains the largest and the smallest configuration alone (default: 0.375)")
    args = p.parse_args(argv)
    given(p, args, NOT_INSIDE)
    if args.reduce:
        for name in ("auxiliary_weight", "draw_from", "restart"):
            if getattr(args, name) is not None:
                p.error(f"--{name.replace('_', '-')} is for the dense miniature from nothing: leave it or --reduce out")
    for name in SETTINGS:
        if (value := getattr(args, name, None)) is not None:
            try:
                checked(name, value, f"--{name.replace('_', '-')}", SETTINGS)
            except ValueError as e:
                p.error(str(e))
    if args.data == "toy" and (args.fsdp or "WORLD_SIZE" in os.environ):
        p.error("the miniature trains in one process: give a training file with --data, or leave torchrun out")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        p.error("--fsdp shares a model out among processes: start them with torchrun --nproc-per-node N train.py ...")
    if args.data != "toy" and args.stage is None:
        p.error(f"--data {args.data}: give --stage 1, 2 or 3, or 0 for a new connector")
    if (args.data == "toy" or args.stage == 3) and (args.overfit or args.micro_batch_size or args.sample_every):
        p.error("--overfit, --micro-batch-size and --sample-every are for training files, in stages 0 to 2")
    if args.stage == 3 and "WORLD_SIZE" in os.environ:
        p.error("--stage 3 trains in one process: leave torchrun out")
    return args


def main(argv=None):
    args = parse(argv)
    if args.data != "toy" and not Path(args.data).is_file():
        raise ValueError(f"--data {args.data}: no such file")
    torch.set_flush_denormal(True)  # vanishing gradients of saturated sigmoids would be 100 times slower
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked
    distributed = Distributed(placement(args.device))
    out, stages = Path(args.out), [1, 2, 3] if args.stage is None else [args.stage]
    begun = newest(out, stages)
    if begun and not args.resume:
        raise ValueError(f"{out} holds a run of this stage already: --resume goes on with it, --out begins another")
    if (args.stage == 2 and args.data == "toy" and not (begun or args.skip_stage_1)
            and not read_config(checkpoint_path(args.model or DENSE)).ca and (args.resume or not newest(out, [1]))):
        print(f"stage 2 begins with what stage 1 makes, which {out} does not have yet: stage 1 first", file=sys.stderr)
        stages, begun = [1, 2], newest(out, [1])
    if args.resume and not begun:
        if not (out / "log.jsonl").is_file():
            raise ValueError(f"--resume: {out} holds no run of this stage: mend --out, or leave --resume out")
        print(f"{out} has no checkpoint of this stage yet: it begins anew", file=sys.stderr)
    torch.set_num_threads(args.threads or free_threads())
    with locked(out) if distributed.rank == 0 else nullcontext():
        for stage in stages:
            source = args.model if stage == stages[0] else None
            # A stage that was not asked for has its recipe, whatever is given for the one that was
            own = ["--seed", str(args.seed or 0), *["--reduce", args.reduce or "none"] * (args.reduce is not None)]
            flags = parse(own) if args.stage and stage < args.stage else args
            model, samples, settings = run_stage(stage, source, flags, out, distributed)
        if args.data == "toy":
            print_report(model, args, out)
        elif distributed.rank == 0:
            if stages == [3]:  # with the questions that it has learned from
                eval_set = eval_questions(samples, settings["questions"], settings["seed"])
                results = all_results(model, eval_set, model.config.plans)
                table = router.summarise(model.config, results, *reference_prompt(samples, eval_set, results))
                print(table.text() + "\n\n" + table.routes())
            print(newest(out, stages))
    distributed.close()


def run_stage(stage, source, args, out, distributed):
    """Begins a stage or goes on with it, to its end: (model, Samples or None, settings)."""
    checkpoint, given = newest(out, [stage]), given_settings(args)
    settings = read_state(checkpoint) if checkpoint else {}
    model = load(checkpoint) if checkpoint else first_model(stage, source, args, out)
    model.to(distributed.device)
    samples = None
    if args.data != "toy":
        s = settings or given
        samples = Samples(args.data, args.images, model.tokenizer, model.config, s.get("label_rule", "assistant"),
                          s.get("max_tokens"), s.get("seed", 0))
    if not checkpoint:
        model.config.bound_pixels(args)
        if args.reduce is not None:
            if stage == 3:  # before that it is what is learned
                warn_untrained(args.reduce, model.config.reduce, source or out)
            model.add_reduction(args.reduce)
        if model.config.reduction.inside:
            raise ValueError(f"--reduce {model.config.reduce}: {NOT_INSIDE}, and --reduce none here")
        settings = first_settings(stage, args, model, samples)
        if stage in (1, 2) and args.viable:
            c = model.config
            own = given_plans(c, args)
            c.add_visor(c.ca, c.sa, own["all"], own["overview"])
    else:
        go_on_with(settings, checkpoint, stage, args, model, samples)
    torch.set_num_threads(settings["threads"])
    if settings.get("step") != settings["steps"]:
        model = train(model, stage, out, settings, checkpoint, samples, distributed)
    return model, samples, settings


def print_report(model, args, out):
    """The table of accuracy by configuration and task, on held-out questions, and what the router did."""
    c, eval_set = model.config, world.eval_set(args.seed or 0, args.questions)
    everything = [Plan(tuple(range(c.layers)))]
    results = all_results(model, eval_set, c.plans or everything)
    dense = VLM.from_pretrained(DENSE, device=model.device) if c.viable else None
    dense = dense and all_results(dense, eval_set, everything)
    table = router.summarise(c, results, world.STRATA, *world.REFERENCE_PROMPT, dense)
    print(table.text() + ("\n\n" + table.routes() if c.router else ""))
    table.save(out / "table.json")
    try:
        table.draw(out / "table.png")
    except ImportError:
        print(f"no {out}/table.png: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)
    print(f"the table is in {out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
