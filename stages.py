"""What a stage of training begins with, or goes on with: the model, the settings, what is trained, on what."""
import math
import sys
from pathlib import Path

import torch

import router
from checkpoints import SETTINGS, damaged, is_checkpoint, newest, read_state
from cli import NANO, checkpoint_path, choose_dtype
from llava.batches import ConversationBatches
from llava.samples import eval_questions
from model import VLM
from toy import world
from toy.training import RECIPES, ToyBatches, init_weights

DENSE = NANO / "dense"  # where the miniature starts from

# On training files, with 128 samples a step (paper 5.1; a new connector as in LLaVA's first stage)
LEARNING_RATES = {"connector": 1e-3, 0: 1e-5, 1: 1e-4, 2: 1e-5}
ROUTER_RECIPE = dict(batch_size=16, steps=1000, lr=3e-3, warmup=20, decay_start=0.5, questions=500, labels="task",
                     leave_out=(), label_smoothing=0.0)
DEFAULTS = dict(keep=2, workers=0, micro_batch_size=4, max_bad=0.01, sample_every=0, dtype="float32", compile=False,
                fsdp=False, checkpointing=False, overfit=False)  # of every stage; a resumed run may change them


def first_model(stage, source, args, out):
    """The model that a stage begins with. source: a checkpoint's name, or None."""
    miniature, seed = args.data == "toy", args.seed or 0
    if stage == 0 and not source and miniature and not args.reduce:
        torch.manual_seed(seed)
        return init_weights(VLM(world.config()))
    source = checkpoint_path(source) if source else newest(out, range(stage))
    if not source and not miniature:
        raise ValueError("nothing to start from: give a checkpoint with --model, or an --out with an earlier stage")
    source = source or (NANO if stage == 3 else DENSE)
    model = VLM.from_pretrained(source)
    if is_checkpoint(Path(source)):  # of a run; a copy under another name is a model as any other
        state = read_state(Path(source))
        if state["step"] < state["steps"]:
            print(f"{source} has only {state['step']} of its {state['steps']} steps", file=sys.stderr)
    missing = 1 if not model.config.ca else 2 if model.config.stage == "1" else 3  # the stage that comes next
    if stage > missing and not (stage == 2 and args.skip_stage_1):
        raise ValueError(f"{source} has not been through stage {missing}: python train.py --stage {missing} --model "
                         f"{source} makes what stage {stage} begins with" + ", or give --skip-stage-1" * (stage == 2))
    if stage == 3:
        recipe = RECIPES[3] if miniature else ROUTER_RECIPE
        torch.manual_seed(seed)
        # Chance decides many of the oracle's choices: then every configuration has some probability
        smoothing = 0.0 if args.labels == "sample" else recipe["label_smoothing"]
        return model.add_router(router.conservative_threshold(smoothing, len(model.config.viable)))
    if stage and not model.config.ca:
        model.add_cross_attention(*((world.CA, world.SA, world.VIABLE, world.OVERVIEW) if miniature else ()))
    return model.remove_router()


def first_settings(stage, args, model, samples):
    """The settings of a stage that begins: its recipe, and what the command line gives."""
    given = given_settings(args)
    dtype, _ = choose_dtype("auto" if samples else "float32", model.device, math.inf)
    joined = stage == 0 and model.config.stage == "pretrained"
    common = {**DEFAULTS, "seed": 0, "save_every": 200, "dtype": str(dtype)[6:], "threads": torch.get_num_threads(),
              "joined": joined}
    if samples is None:
        recipe = RECIPES[stage]
        if stage == 0 and model.config.reduce:  # it goes on from a dense model, and there is one configuration
            recipe = {**RECIPES[2], "largest_first": 0.0}
        return {**common, **recipe, "turns": 10, **given}
    if stage == 3:
        return {**common, **ROUTER_RECIPE, "samples": len(samples), **given}
    size = given.get("batch_size", 128)
    steps = given.get("steps", -(-len(samples) // size))  # once through the file
    return {**common, "workers": 2, "sample_every": 100, "batch_size": size, "steps": steps,
            "lr": LEARNING_RATES["connector" if joined else stage], "decay_start": None,
            "warmup": -(-3 * steps // 100), "label_rule": "assistant", "samples": len(samples), **given}


def given_settings(args):
    """What the command line gives of a run's settings."""
    names = [name for name in (*SETTINGS, "leave_out") if name not in ("stage", "questions")]
    return {name: v for name in names if (v := getattr(args, name, None)) is not None and v is not False}


def set_trainable(model, stage, joined=False):
    """What a stage trains. Stage 0 of a joined SigLIP and Qwen2 trains the connector between them, which is new; with
    VisionZip it is the connector that learns from fewer tokens, as the article has it."""
    connector = joined or stage == 0 and model.config.reduction.method == "visionzip"
    model.requires_grad_(stage in (0, 2) and not connector)
    for module in {1: [model.language_model.cross], 3: [model.router]}.get(stage, []):
        module.requires_grad_(True)
    if connector:
        model.multi_modal_projector.requires_grad_(True)
        if model.config.has_newlines:
            model.image_newline.requires_grad_(joined)


def make_batches(model, stage, out, s, samples, distributed):
    """What a stage learns from. For stage 3 the pseudo-labels are made first (4.3)."""
    if samples is not None and stage < 3:
        return ConversationBatches(model, stage, samples, s, out, distributed)
    if stage < 3:
        pretrains = stage == 0 and not model.config.reduce  # what that adds is about all visual tokens
        return ToyBatches(model, s["seed"], s["batch_size"], s["turns"], s.get("auxiliary_weight", 0.0),
                          s.get("draw_from", 0) if pretrains else None, s.get("largest_first", 0), s["steps"], stage)
    n, seed = s["questions"], s["seed"]
    eval_set = eval_questions(samples, n, seed) if samples else world.eval_set(seed, n, world.TRAIN)
    results = router.log_results(out / "labels.jsonl", model, eval_set)
    targets = router.pseudo_labels(model.config.plans, results, s["labels"], s["leave_out"])
    return router.RouterBatches(model, eval_set, targets, s["seed"], s["batch_size"], s["label_smoothing"])


def given_plans(config, args):
    """{pixels: configurations} of --viable."""
    texts = {"overview": [v[3:] for v in args.viable or () if v.startswith("ov:")],
             "all": [v for v in args.viable or () if not v.startswith("ov:")]}
    return {pixels: [config.configuration(v, "--viable") for v in own] for pixels, own in texts.items()}


def load(checkpoint):
    """The model of a checkpoint of this run. Raises ValueError."""
    try:
        return VLM.from_pretrained(checkpoint)
    except ValueError as e:
        raise ValueError(f"{e} (or remove {checkpoint} to go on from the one before it)") from None


def go_on_with(settings, checkpoint, stage, args, model, samples):
    """Makes a checkpoint's settings those of a run that goes on, and says which flags it does not follow. Raises
    ValueError where it would not be the same run."""
    if settings.get("samples") != (len(samples) if samples else None):
        raise ValueError(f"{checkpoint} learned from {settings.get('samples') or 'no'} samples of a file, --data "
                         f"{args.data} has {len(samples) if samples else 'none'}: give the same, or another --out")
    if missing := sorted(first_settings(stage, args, model, samples).keys() - settings.keys() - {"max_tokens"}):
        raise damaged(checkpoint / "state.json", f"{missing[0]} is missing")
    given = given_settings(args)
    may_change = (*DEFAULTS, "save_every", "threads")  # a run may also go on with other processes
    settings |= {**{k: v for k, v in given.items() if k in may_change}, "fsdp": args.fsdp}
    asked = given_plans(model.config, args)
    passed_over = [f"--{k.replace('_', '-')} {v} (it has {settings.get(k)})" for k, v in given.items()
                   if settings.get(k) != v] + ["--viable"] * bool(
                       args.viable and any(set(asked[x]) != set(model.config.configurations(x)) for x in asked))
    if args.reduce not in (None, model.config.reduce):
        passed_over.append(f"--reduce {args.reduce} (it has {model.config.reduce or 'none'})")
    if passed_over:
        print(f"--resume goes on with stage {stage} in the run's own settings and does not follow "
              f"{', '.join(passed_over)}; for others begin in another --out", file=sys.stderr)
