"""lmms-eval asks our models: its benchmarks, prompts and metrics instead of those of paper/evaluate.py.

    python -m paper.lmms --tasks mme,docvqa_val --model DIR --sa auto --batch_size 16 --output_path out/lmms
    python -m paper.lmms --tasks quilts --model nano        offline: the miniature's world as a task of lmms-eval

--model, --sa, --pixels, --budget, --reduce, --pack, --min-pixels, --max-pixels, --device, --dtype and --threads are
those of sample.py; all else goes to lmms-eval as it is, with its own --model and --model_args filled in. Nothing but
this command needs it:

    pip install lmms-eval==0.7.3 'filelock<4'      without a GPU, a CPU torch first: it would bring CUDA's

As with lmms-eval's own class for LLaVA-OneVision an answer is greedy unless the task samples, has up to 1,024 tokens
unless the task says how many, and images stand before the text unless it says where. What differs: questions are asked
in batches, as sample.py --batch asks them, and answers end at the task's stop strings, which that class ignores.
"""
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from tqdm import tqdm

import sample
from answers import answers
from cli import Parser, atomic, counted, run
from methods import add_flags
from toy import world

INSTALL = "pip install lmms-eval==0.7.3 'filelock<4'; on a machine without a GPU a CPU torch first"
LONGEST = 1024  # tokens of an answer, where no task says it
AUTO = 16       # questions at once, of --batch_size auto
QUILTS = 8      # of each kind, in the task of that name


# --- what lmms-eval drives ------------------------------------------------------------------------------------------

def driven(model, args):
    """The class that lmms-eval makes its object of. It asks a VLM as args, sample.py's, say."""
    from lmms_eval.api.model import lmms

    class NanoVISOR(lmms):
        is_simple = True  # gets texts and images, not messages

        def __init__(self, batch_size=1, **_):
            super().__init__()
            self.batch_size = AUTO if str(batch_size).startswith("auto") else int(batch_size)

        def generate_until(self, requests):
            """The answers to lmms-eval's requests, in their order; "" to one that cannot be asked."""
            found, errors, alike = [""] * len(requests), [], {}  # alike: those with the same settings, by number
            for i, request in enumerate(requests):
                alike.setdefault(settings(request.args[1]), []).append(i)
            with tqdm(total=len(requests), desc="answers", ncols=80) as bar:
                for how, numbers in alike.items():
                    questions = (self.question(*requests[i].args) for i in numbers)
                    asked = answers(model, questions, partial(sample.configuration, args, model.config),
                                    self.batch_size, pixels=sample.pixels_of(args, model.config), **dict(how))
                    for i, answer in zip(numbers, asked):
                        if answer.error:
                            errors.append(answer.error)
                        else:
                            found[i] = cut(model.tokenizer.decode(answer.tokens), requests[i].args[1].get("until"))
                        bar.update()
            if errors:
                print(f"{len(errors)} of {counted(len(requests), 'request')} could not be answered, as: {errors[0]}",
                      file=sys.stderr)
            return found

        def question(self, text, _, images_of, number, task, split):
            """(text, images) of a request, or the ValueError that it has. images_of: of a row of the task's."""
            images = [x for x in images_of(self.task_dict[task][split][number]) or () if x is not None]
            other = next((x for x in images if not isinstance(x, str | Image.Image)), None)
            return (text, images) if other is None else ValueError(f"a {type(other).__name__} is no image")

        def loglikelihood(self, requests):
            raise NotImplementedError("the model writes answers; it gives no likelihoods, and has no rounds")

        generate_until_multi_round = loglikelihood

    return NanoVISOR


def settings(asked):
    """What answers.answers is called with, as pairs, by a task's generation_kwargs."""
    temperature = asked.get("temperature") or 0.0 if asked.get("do_sample") else 0.0
    top_p = asked.get("top_p") or 1.0 if temperature else 1.0
    return ("max_tokens", asked.get("max_new_tokens", LONGEST)), ("temperature", temperature), ("top_p", top_p)


def cut(text, until):
    """An answer up to the first of the stop strings, if there are any."""
    text = text.strip()
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()


# --- a task of our own ----------------------------------------------------------------------------------------------

TASK = """task: quilts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answers
generation_kwargs: {{max_new_tokens: 64}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
"""
UTILS = '''"""What lmms-eval needs beside quilts.yaml."""
from PIL import Image


def images(row):
    return [Image.open(row["image"]).convert("RGB")]
'''


def write_quilts(task, folder="out/quilts"):
    """The task `quilts` in a directory for lmms-eval's --include_path, and its questions in another one: paper.evaluate
    takes them, too."""
    folder, rows = Path(folder).resolve(), []
    folder.mkdir(parents=True, exist_ok=True)
    for i, (image, asked) in enumerate(world.eval_set(0, QUILTS)):
        image.save(folder / f"{i}.png")
        rows += [{"image": str(folder / f"{i}.png"), "question": question, "answers": [answer], "category": category,
                  "metric": "exact_match"} for category, question, answer in asked]
    file = folder / "quilts.jsonl"
    with atomic(file) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(task, "utils.py").write_text(UTILS)
    Path(task, "quilts.yaml").write_text(TASK.format(file=json.dumps(str(file))))
    print(f"{file}: {counted(len(rows), 'question')}; python -m paper.evaluate --data {file} asks them too",
          file=sys.stderr)


# --- the command ----------------------------------------------------------------------------------------------------

def parse(argv=None):
    """(sample.py's arguments, the words for lmms-eval without --model and --model_args)."""
    p = Parser(doc=__doc__, description="lmms-eval's benchmarks for one's own weights.",
               allow_abbrev=False, epilog="All else goes to lmms-eval: --batch_size, --limit, --log_samples, "
               "--output_path, --include_path, ...; python -m lmms_eval eval --help lists it.")
    p.add_argument("--tasks", metavar="NAME,...", help="of lmms-eval, or quilts, the miniature's; list shows them")
    p.add_argument("--model", metavar="NAME", help="checkpoint directory, or hub id (default: nano)")
    p.add_argument("--sa", metavar="LAYERS", help="self-attention layers: auto, dense, none, or 1,4,7 (default: auto)")
    p.add_argument("--pixels", metavar="WHICH", help="of a single image: auto, overview or all")
    p.add_argument("--budget", metavar="F", help="of the dense language model's cost, for the prompt")
    add_flags(p)
    p.add_placement()
    p.add_argument("--threads", metavar="N", help="processor threads (default: all cores)")
    args, more = p.parse_known_args(argv)
    if any(word.split("=")[0] == "--model_args" for word in more):
        p.error("--model_args: give --model, --sa, ... as flags")
    ours = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items()
            if name != "tasks" and value is not None]
    return sample.parse(["--batch", "lmms-eval", *ours]), ["--tasks", args.tasks] * (args.tasks is not None) + more


def installed():
    """lmms-eval's command line. Raises ValueError, one line, where it is not here as it has to be."""
    try:
        program = importlib.import_module("lmms_eval.__main__")
        importlib.import_module("filelock._api")  # gone from version 4; lmms-eval misses it when a run begins
        return program
    except ImportError as e:
        raise ValueError(f"{e}; {INSTALL}") from None


def evaluate(program, words):
    """Runs lmms-eval's command line, which tells an error and ends as if there was none: here with status 1."""
    failed, single = [], program.cli_evaluate_single

    def noticed(args):
        try:
            return single(args)
        except Exception as e:
            failed.append(e)
            raise
    program.cli_evaluate_single = noticed
    sys.argv[1:] = words
    program.cli_evaluate()
    if failed:
        raise SystemExit(1)


def main(argv=None):
    args, words = parse(argv)
    program = installed()
    model = sample.load_model(args)  # before lmms-eval begins: mistakes show at once
    sample.pixels_of(args, model.config)
    sample.warn_of_layers(args, model.config)
    globals()["Driven"] = driven(model, args)  # where the registry finds it by name
    registry = importlib.import_module("lmms_eval.models")
    registry.MODEL_REGISTRY_V2.register_manifest(
        registry.ModelManifest("nanovisor", simple_class_path=f"{__name__}.Driven"), overwrite=True)
    # The rest of the name is for its tables and its caches of answers; a comma would end it
    name = f"asked={args.run} --dtype {str(model.dtype)[6:]}".replace(",", "+")
    with TemporaryDirectory() as task:
        if words[:1] == ["--tasks"] and "quilts" in words[1].split(","):
            write_quilts(task)
            words = ["--include_path", task, *words]
        evaluate(program, ["--model", "nanovisor", f"--model_args={name}", *words])


if __name__ == "__main__":
    run(main)
