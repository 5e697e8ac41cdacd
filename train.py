"""Training, all stages, in one loop.

    python train.py               the miniature: stages 1, 2, 3 from the dense weights in nano/dense, then the table
    python train.py --stage 0     a dense miniature from nothing

Stage 0 makes the dense model, 1 trains the new cross-attentions alone, 2 trains everything, in a viable configuration
drawn anew for each step: one universal model (paper 4.2.3, 5.1). Stage 3 trains the router, and nothing else (4.3).
Everything random follows from the seed and the step's number, so that a run that was stopped goes on as if it had not
been.
"""
import json
import os
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import data
import router
import toy
from config import Parser, run
from flops import name
from model import VLM

DENSE = Path(__file__).parent / "nano" / "dense"  # where the miniature starts from

GROUPS = {"easy": toy.EASY, "hard": toy.HARD}
USUAL = 9, (toy.SIDE * toy.CELL,) * 2  # text tokens of a question, size of its picture: for the savings


# --- optimisers -----------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by about the same amount in all its directions (Jordan et al. 2024).

    Newton-Schulz in float32, for all matrices of a shape at once: on a CPU 13 times faster than torch.optim.Muon, which
    takes them one by one in bfloat16 (84 small matrices: 18 ms a step against 229).
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.mul_(group["momentum"]).add_(p.grad)
                    same[p.shape].append((p, p.grad + group["momentum"] * m))  # Nesterov
            for (rows, columns), pairs in same.items():
                x = torch.stack([g for _, g in pairs])
                x = x if rows <= columns else x.mT
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                x = x if rows <= columns else x.mT
                for (p, _), update in zip(pairs, x):
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def optimizers(model, lr):
    """{name: (optimizer, names of its parameters, learning rate)}: Muon for the matrices, AdamW with a tenth of the
    rate for embeddings, convolutions, norms, biases and the router."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [n for n, p in trained.items() if p.ndim == 2 and "embed" not in n and not n.startswith("router.")]
    rest = [n for n in trained if n not in matrices]
    opts = {"adamw": (torch.optim.AdamW([trained[n] for n in rest], lr / 10, betas=(0.9, 0.98), weight_decay=0.0),
                      rest, lr / 10)}
    return {"muon": (Muon([trained[n] for n in matrices], lr), matrices, lr), **opts} if matrices else opts


def rate(step, steps, warmup, flat):
    """The share of the learning rate at a step: linear warm-up, constant, then linear down to 2 % from flat * steps."""
    down = max(0.0, step / steps - flat) / (1 - flat)
    return min(1.0, (step + 1) / warmup) * (1 - 0.98 * down)


# --- losses ---------------------------------------------------------------------------------------------------------

def answer_loss(model, h, labels):
    """Mean cross-entropy of the next token where labels (B, Nt) are not -1. The head runs for those alone."""
    due = labels[:, 1:] >= 0
    return F.cross_entropy(model.head(h[:, :-1][due]), labels[:, 1:][due])


def word_loss(model, v, truth):
    """Lets the visual tokens of a quilt's cells, v (B, cells, d), say the words that are true of them.

    The output head reads each visual token as it reads text, and a sigmoid for each word is to be 1 for true (B, cells,
    vocab) and 0 for others: several labels at once, or a relation would erase the token's own sign. This stands in for
    what a large model's pretraining brings along, and belongs to stage 0.
    """
    z = model.head(model.language_model.norm(v)) - 4  # as few words are true, the start is that none is
    return F.binary_cross_entropy_with_logits(z, truth, reduction="sum") / truth.sum()


# --- the miniature's data ---------------------------------------------------------------------------------------------

class Quilts:
    """Batches of conversations about toy.py's quilts; batch i is the same whenever it is asked for."""

    def __init__(self, model, seed, batch_size, turns=10, words=0.0, rest_from=0):
        self.model, self.seed, self.batch_size, self.turns = model, seed, batch_size, turns
        self.words, self.rest_from = words, rest_from
        self.vocabulary = model.tokenizer.get_vocab()

    def __getitem__(self, i):
        """(data.Batch, labels (B, Nt), the quilts)."""
        quilts, prompts, labels = [], [], []
        for j in range(self.batch_size):
            rng, short = np.random.default_rng((toy.TRAIN, self.seed, i, j)), j % 2
            image, quilt, asked = toy.conversation(rng, self.turns * (1 + 2 * short))
            if short:
                pieces = toy.caption(asked)
            else:
                turns = [words for _, question, answer in asked for words in (question, answer)]
                pieces = data.turns_to_learn([data.place_images(turns[0], 1), *turns[1:]])
            prompt, learned = data.labelled(pieces, self.model.tokenizer, [data.picture(image, self.model.config)])
            quilts.append(quilt)
            prompts.append(prompt)
            labels.append(learned)
        return data.collate(prompts), torch.from_numpy(data.pad(labels, -1)), quilts

    def loss(self, item, sa, step):
        """The loss of one batch in configuration sa.

        words: the weight of what visual tokens say, stage 0's auxiliary loss. The pictures run once more, without the
        questions: the connector's output is to say the words of level 0, and what the first, second, third
        self-attention candidate makes of it those of level 1, 2, 3. Meanwhile visual tokens rest in each other layer
        with probability 1/2 (stochastic depth, Huang et al. 2016), and from step rest_from on, every other time, in all
        of them. From then on something like it goes for the questions too: a share of the layers is drawn, and of those
        in it the ones that will have no attention to vision in VISOR run on text alone; in those that will have a
        cross-attention visual tokens rest. What a layer has learned is not to depend on all those before it, and text
        is not to look at the picture everywhere: large models are like this by themselves (paper, section 3).
        """
        batch, labels, pictures = item
        model, rng, n = self.model, np.random.default_rng((self.seed, step)), self.model.config.layers
        t, v, t_pos, v_pos = model.embed(batch)
        tired, late = (), step >= self.rest_from
        if self.words and late:
            drawn = [l for l, x in enumerate(rng.random(n) < rng.random()) if x and l not in toy.SA]
            sa, tired = [l for l in sa if l not in drawn or l in toy.CA], [l for l in drawn if l in toy.CA]
        loss = answer_loss(model, model.language_model(t, v, t_pos, v_pos, tuple(sa), rest=tired), labels)
        if self.words:
            states, truth = {-1: v}, torch.zeros(())
            share = rng.choice([0.5, 1.0]) if late else 0.5
            tired = [l for l, x in enumerate(rng.random(n) < share) if x and l not in toy.SA]
            model.language_model(t[:, :2], v, t_pos[:, :2], v_pos, range(n), states=states, rest=tired)  # 2 before it
            for level, l in enumerate((-1, *toy.SA)):
                truth = truth.maximum(self.truth(pictures, level))
                loss = loss + self.words * word_loss(model, states[l][:, toy.CELL_TOKENS], truth)
        return loss

    def truth(self, quilts, level):
        """(B, 36, vocab) 1 for each word that becomes true of a cell at this level."""
        truth = np.zeros((len(quilts) * 36, self.model.config.vocab), dtype=np.float32)
        said = [words for quilt in quilts for words in toy.words(quilt, level)]
        cells = [i for i, words in enumerate(said) for _ in words]
        truth[cells, [self.vocabulary[w] for words in said for w in words]] = 1
        return torch.from_numpy(truth).unflatten(0, (-1, 36))


# --- checkpoints ------------------------------------------------------------------------------------------------------

def save(out, model, opts, state, keep=2):
    """out/stageN-STEP: a checkpoint as any other, with the optimisers and state.json beside it; renamed into place."""
    model.config.stage, model.config.step = str(state["stage"]), state["step"]
    target = out / f"stage{state['stage']}-{state['step']:06d}"
    beside = out / (target.name + ".writing")
    model.save_pretrained(beside)
    tensors = {f"{kind}.{name}.{key}": x for kind, (opt, names, _) in opts.items()
               for name, p in zip(names, opt.param_groups[0]["params"]) for key, x in opt.state[p].items()}
    save_file(tensors, beside / "optimizer.safetensors")
    (beside / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    os.replace(beside, target)
    for old in sorted(out.glob(f"stage{state['stage']}-??????"))[:-keep]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    return target


def restore(checkpoint, opts):
    """Puts the optimisers' tensors back."""
    for label, x in load_file(checkpoint / "optimizer.safetensors").items():
        kind, _, rest = label.partition(".")
        parameter, _, key = rest.rpartition(".")
        opt, names, _ = opts[kind]
        opt.state[opt.param_groups[0]["params"][names.index(parameter)]][key] = x


def newest(out, stages):
    """The newest checkpoint directory of the latest of these stages that has one; None without."""
    found = [p for stage in sorted(stages) for p in sorted(out.glob(f"stage{stage}-??????"))]
    return found[-1] if found else None


# --- the loop ---------------------------------------------------------------------------------------------------------

RECIPES = {  # of the miniature; batches of pictures with 10 questions or 30 short ones each, in stage 3 of questions
    0: dict(batch_size=24, steps=4200, lr=0.015, warmup=50, flat=0.6, words=1.0, rest_from=3200),
    1: dict(batch_size=24, steps=120, lr=0.02, warmup=20, flat=0.5),
    2: dict(batch_size=24, steps=1200, lr=0.01, warmup=30, flat=0.5),
    3: dict(batch_size=128, steps=300, lr=0.03, warmup=20, flat=0.5, quilts=500, labels="task", leave_out=()),
}


def draw(viable, seed, step):
    """The configuration of a step (paper 4.2.3), the smallest and the largest twice as often as the others: they carry
    most of the others' parts (the sandwich rule)."""
    ends = [min(viable, key=len), max(viable, key=len)]
    pool = [*viable, *(ends if len(viable) > 2 else [])]
    return pool[np.random.default_rng((seed, step)).integers(len(pool))]


def lessons(model, stage, out, s):
    """What a stage learns from: batches by number, and their loss. For stage 3 the pseudo-labels are made first."""
    if stage < 3:
        return Quilts(model, s["seed"], s["batch_size"], s["turns"], s.get("words", 0.0), s.get("rest_from", 0))
    exam = toy.exam(s["seed"], s["quilts"], toy.TRAIN)
    records = router.log_records(out / "labels.jsonl", model, exam)
    targets = router.pseudo_labels(model.config.viable, records, s["labels"], s["leave_out"])
    return router.Lessons(model, exam, targets, s["seed"], s["batch_size"])


def train(model, stage, out, settings, checkpoint=None):
    """Runs a stage to its end, from a checkpoint of the same stage if there is one, and leaves checkpoints in out/.

    settings: what RECIPES has, and seed, turns, save_every. Ctrl-C saves, says so and leaves.
    """
    s, c = settings, model.config
    model.requires_grad_(stage in (0, 2))
    {1: model.language_model.cross, 3: model.router}.get(stage, model).requires_grad_(True)
    opts, first = optimizers(model, s["lr"]), 0
    if checkpoint:
        restore(checkpoint, opts)
        first = json.loads((checkpoint / "state.json").read_text())["step"]
    n, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == x) for x in (True, False))
    print(f"stage {stage}: {n:,} parameters train, {frozen:,} are frozen", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    source = lessons(model, stage, out, s)
    log, mean, start = open(out / "log.jsonl", "a"), 0.0, time.perf_counter()
    asked_to_stop = []
    before = signal.signal(signal.SIGINT, lambda *_: asked_to_stop.append(1))
    bar = tqdm(range(first, s["steps"]), initial=first, total=s["steps"], desc=f"stage {stage}", ncols=80)
    model.train()
    for step in bar:
        sa = tuple(range(c.layers)) if stage == 0 else draw(c.viable, s["seed"], step) if stage < 3 else c.viable[0]
        loss = source.loss(source[step + (stage << 40)], sa, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, _, lr in opts.values():
            opt.param_groups[0]["lr"] = lr * rate(step, s["steps"], s["warmup"], s["flat"])
            opt.step()
            opt.zero_grad()
        mean = 0.95 * mean + 0.05 * loss.item() if mean else loss.item()
        log.write(json.dumps({"stage": stage, "step": step + 1, "loss": loss.item(), "sa": list(sa),
                              "seconds": round(time.perf_counter() - start, 2)}) + "\n")
        if step % 10 == 9:
            bar.set_postfix_str(f"loss {mean:.3f}" + f", layers {name(c, sa)}" * (stage < 3))
            log.flush()
        done = step + 1 == s["steps"]
        if done or asked_to_stop or (step + 1) % s["save_every"] == 0:
            checkpoint = save(out, model, opts, {**s, "stage": stage, "step": step + 1})
        if asked_to_stop and not done:
            bar.close()
            signal.signal(signal.SIGINT, before)
            print(f"stopped after step {step + 1} of {s['steps']}, saved as {checkpoint}; add --resume to the same "
                  "command to go on", file=sys.stderr)
            raise SystemExit(130)
    signal.signal(signal.SIGINT, before)
    return model.eval()


def fresh(seed):
    """A miniature with random weights, of a scale at which every part gets a gradient from the first step on."""
    torch.manual_seed(seed)
    model = VLM(toy.config())
    model.tokenizer = toy.tokenizer()
    c = model.config
    with torch.no_grad():
        for label, p in model.named_parameters():
            if "embed_tokens" in label:
                p.normal_(0, 0.5)
            elif "position_embedding" in label:
                p.normal_(0, 0.3)
            elif p.ndim > 1:
                p.normal_(0, 0.8 * p[0].numel() ** -0.5)
        for block in model.language_model.layers:  # queries start near the keys: attention is by content at once
            key = block.self_attn.k_proj.weight.unflatten(0, (c.kv_heads, -1))
            block.self_attn.q_proj.weight += 0.5 * key.repeat_interleave(c.heads // c.kv_heads, 0).flatten(0, 1)
    return model


def parse(argv=None):
    p = Parser(description="Train the miniature: without --stage, stages 1 to 3 from nano/dense, then the table.",
               epilog="Stage 0 takes about 42 minutes on one core, the others about 11 together.")
    p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="0 dense pretraining, 1 the new cross-attentions "
                   "alone, 2 everything, universal, 3 the router")
    p.add_argument("--model", metavar="NAME", help="what the (first) stage starts from (default: the newest earlier "
                   "stage in --out, else nano/dense, for stage 3 nano)")
    p.add_argument("--data", default="toy", choices=("toy",), help="toy: the quilts of toy.py (default)")
    p.add_argument("--out", default="out", metavar="DIR", help="checkpoints, log.jsonl, table.json, table.png "
                   "(default: out)")
    p.add_argument("--steps", type=int, metavar="N", help="optimisation steps of a stage")
    p.add_argument("--batch-size", type=int, metavar="N", help="pictures a step (default: 24), in stage 3 questions "
                   "(default: 128)")
    p.add_argument("--turns", type=int, default=10, metavar="N", help="questions a picture (default: 10)")
    p.add_argument("--lr", type=float, metavar="X", help="Muon's learning rate; AdamW's, for all but matrices and "
                   "for the router, is a tenth of it")
    p.add_argument("--words", type=float, metavar="X", help="weight of the words that visual tokens say (default: 1 in "
                   "stage 0, else 0)")
    p.add_argument("--rest-from", type=int, metavar="N", help="stage 0: from which step on layers rest while questions "
                   "are answered (default: 3200)")
    p.add_argument("--viable", action="append", metavar="LAYERS", help="a configuration to train: none or 4,7; may be "
                   f"given several times (default: {' '.join(','.join(map(str, v)) or 'none' for v in toy.VIABLE)})")
    p.add_argument("--labels", choices=("task", "sample"), help="stage 3: what the router is to choose, per task as "
                   "the paper (default), or the oracle's choice per sample")
    p.add_argument("--leave-out", action="append", metavar="TASK", choices=list(toy.TASKS), help="stage 3: a "
                   "task that the router does not learn from; may be given several times")
    p.add_argument("--save-every", type=int, default=200, metavar="N", help="steps between checkpoints (default: 200)")
    p.add_argument("--exam", type=int, default=250, metavar="N", help="held-out questions a task for the table "
                   "(default: 250)")
    p.add_argument("--seed", type=int, default=0, help="(default: 0)")
    p.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    p.add_argument("--resume", action="store_true", help="go on with what is in --out, in its own settings")
    args = p.parse_args(argv)
    for flag in ("steps", "batch_size", "turns", "save_every", "exam", "threads"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a number of at least 1")
    if args.lr is not None and not args.lr > 0:
        p.error(f"--lr {args.lr}: give a number above 0")
    return args


def start(stage, name, args, out):
    """The model that a stage begins with. name: of a checkpoint, or None."""
    if stage == 0 and not name:
        return fresh(args.seed)
    nano = name == "nano" and not Path("nano/config.json").is_file()
    model = VLM.from_pretrained(DENSE.parent if nano else name or newest(out, range(stage))
                                or (DENSE.parent if stage == 3 else DENSE))
    if stage == 3:
        torch.manual_seed(args.seed)
        return model.add_router()
    if stage and not model.config.ca:
        model.add_cross_attention(toy.CA, toy.SA, toy.VIABLE)
    return model.remove_router()


def main(argv=None):
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # vanishing gradients of saturated sigmoids would be 100 times slower
    out, stages = Path(args.out), [1, 2, 3] if args.stage is None else [args.stage]
    if not args.resume and any(newest(out, [stage]) for stage in stages):
        raise ValueError(f"{out} holds a run of this stage already: --resume goes on with it, --out begins another")
    for stage in stages:
        checkpoint = newest(out, [stage])
        if checkpoint:
            model = VLM.from_pretrained(checkpoint)
            settings = json.loads((checkpoint / "state.json").read_text())
        else:
            model = start(stage, args.model if stage == stages[0] else None, args, out)
            flags = ("steps", "batch_size", "lr", "words", "rest_from", "labels", "leave_out")
            given = {k: getattr(args, k) for k in flags if getattr(args, k) is not None}
            settings = {**RECIPES[stage], **given, "seed": args.seed, "turns": args.turns,
                        "save_every": args.save_every}
            if stage in (1, 2) and args.viable:
                c = model.config
                c.viable = c.visor_layers(c.ca, c.sa, [c.configuration(v) for v in args.viable])[2]
        if not (checkpoint and settings["step"] == settings["steps"]):
            model = train(model, stage, out, settings, checkpoint)
    report(model, args, out)


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
