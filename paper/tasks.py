"""The tasks of the paper's benchmarks: what each asks a model, and which metric judges the answer. No torch.

    TASKS["docvqa"]                                    prompt, tokens, metric, group: a Task
    prompt("docvqa", row)                              the text for the model
    score("docvqa", answer, row, rules="classic")      how right an answer is, 0.0 to 1.0
    aggregate("docvqa", rows)                          {"score": the number of the paper's table, ...}

A row is one question as a dict: "question", "answers" (all that are right; a letter where there are options) and, where
the task has them, "options" (texts, without letters), "hint", "category" and "group"; TASKS says which of a benchmark's
own columns these are. Scored rows have their "answer" and "score" as well.

Prompts are those that lmms-eval gives LLaVA-OneVision. Of its two sets of rules (paper/metrics.py) the paper names
neither; its preprint is of March 2026, the newer rules of April, so "classic" is what `score` takes unless told. The
numbers of the two are not comparable: print the rules beside every number.
"""
from statistics import fmean
from typing import Callable, NamedTuple

from paper import metrics
from paper.metrics import LETTERS, NEEDS

RULES = ("classic", "0.7.2+")


# --- prompts --------------------------------------------------------------------------------------------------------
# The text before a task's post prompt; the images stand before all of it (data.place_images)

def as_it_is(row):
    return row["question"]


def stripped(row):
    return row["question"].strip()


def lettered(options):
    """The options, one a line: "A. red"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def with_options(row):
    return f"{row['question']}\n{lettered(row['options'])}"


def with_context(row):
    """ScienceQA: the hint first, where there is one."""
    return (f"Context: {row['hint']}\n" if row.get("hint") else "") + with_options(row)


def without_yes_or_no(row):
    """MME's questions say how to answer; the post prompt says it instead. MMStar's go the same way."""
    return row["question"].strip().replace(" Please answer yes or no.", "")


def mmbench_question(row):
    hint = f"{row['hint']} " if row.get("hint") else ""
    return f"{hint}{row['question']} There are several options:\n{lettered(row['options'])}"


def capitalised(row):
    """TextVQA: the first letter large and, as Python's capitalize has it, all others small."""
    return row["question"].capitalize()


def only_the_letter(row):
    """BLINK: the question, which lists its options itself, behind a note."""
    letters = ", ".join(LETTERS[:len(row["options"])])
    note = f"Note: You only need to respond with {letters} without providing any additional information."
    return f"{note}\n{row['question']}"


def question_then_context(row):
    """MMIU, whose context lists the options. Its authors fix no prompt; this one is ours, after InternVL's."""
    return f"{row['question']}\n{row['hint']}"


# --- the tasks ------------------------------------------------------------------------------------------------------

class Task(NamedTuple):
    """A benchmark: what is asked, and what is right."""
    lmms: str                 # lmms-eval's name of it, "" if it has none
    group: str                # easy or hard, as in the paper's Table 1; several: of several images, Table 12; or ""
    form: Callable            # (row) -> the question's text
    post: str                 # the post prompt, behind that text
    max_new: int              # tokens of an answer
    metric: Callable          # (answer, references, what NEEDS says) -> 0 to 1, by the rules "0.7.2+"
    classic: Callable = None  # the same by the rules "classic", where they differ
    aggregate: Callable = metrics.mean  # (rows) -> {"score": ...}

    def judge(self, answer, row, rules):
        """How right an answer to a row is, 0.0 to 1.0."""
        metric = self.classic if self.classic and rules == "classic" else self.metric
        return metric(answer, row["answers"], *[row[field] for field in NEEDS.get(metric, ())])


WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
TASKS = {
    "realworldqa": Task("realworldqa", "easy", stripped, "", 16, metrics.letter_or_word, metrics.option_or_word),
    # answers: the letter of the column answer, which counts from 0; AI2D's too
    "scienceqa": Task("scienceqa_img", "easy", with_context, LETTER, 16, metrics.letter_alone),
    "gqa": Task("gqa", "easy", as_it_is, WORD, 16, metrics.exact_match),
    # group: question_id, which two questions of an image share
    "mme": Task("mme", "easy", without_yes_or_no, WORD, 16, metrics.yes_or_no, aggregate=metrics.mme_score),
    # category: l2_category. The question has its options, the post prompt no full stop
    "mmstar": Task("mmstar", "easy", without_yes_or_no, LETTER[:-1], 1024, metrics.letter, metrics.leading_letter,
                   metrics.macro_mean),
    "pope": Task("pope", "easy", stripped, WORD, 128, metrics.same_word, aggregate=metrics.pope_scores),
    "textvqa": Task("textvqa_val", "easy", capitalised, WORD, 1024, metrics.vqa_accuracy),
    "ai2d": Task("ai2d", "easy", with_options, LETTER, 16, metrics.letter_exact),
    # category: type, human_test or augmented_test
    "chartqa": Task("chartqa", "hard", as_it_is, "\nAnswer the question with a single word.", 16,
                    metrics.relaxed_accuracy, aggregate=metrics.mean_and_parts),
    # category: question_type
    "ocrbench": Task("ocrbench", "hard", stripped, "", 128, metrics.contained, metrics.contained_classic,
                     metrics.mean_and_parts),
    "infovqa": Task("infovqa_val", "hard", as_it_is, WORD, 32, metrics.anls),
    "docvqa": Task("docvqa_val", "hard", as_it_is, WORD, 32, metrics.anls),
    # Named in Section 5.1, but in no table. group: index modulo 1,000,000; options and hint: those that are not "nan"
    "mmbench": Task("mmbench_en_dev", "", mmbench_question, "\n" + LETTER, 1024, metrics.inferred_or_found,
                    metrics.inferred, metrics.circular),
    # category: task. Question and options say where the images stand
    "muirbench": Task("muirbench", "several", with_options, LETTER, 16, metrics.letter_same,
                      aggregate=metrics.mean_and_parts),
    # question: prompt; options: choices; category: sub_task
    "blink": Task("blink", "several", only_the_letter, "", 1024, metrics.stated_letter, metrics.first_letter,
                  metrics.macro_mean),
    # hint: context; options: one for each line of the column of that name; category: task
    "mmiu": Task("", "several", question_then_context, LETTER, 16, metrics.mmiu_letter, aggregate=metrics.macro_mean),
}


def prompt(name, row):
    """The text of a row for the model. Images go before it, unless the text says where they stand."""
    return TASKS[name].form(row) + TASKS[name].post


def score(name, answer, row, rules="classic"):
    """How right an answer to a row is, 0.0 to 1.0. rules: one of RULES. Raises ValueError."""
    if rules not in RULES:
        raise ValueError(f"there are no rules {rules!r}; take one of {', '.join(RULES)}")
    return TASKS[name].judge(answer, row, rules)


def aggregate(name, rows):
    """{"score": the number that the paper's table has, ...} of rows with "answer" and "score". Raises ValueError."""
    if not rows:
        raise ValueError(f"{name}: there are no rows to take a score of")
    return TASKS[name].aggregate(rows)


def group_means(scores):
    """{"easy": ..., "hard": ...}, Table 1's averages, of {task: score}: each group of which all tasks are there."""
    names = {group: [name for name, task in TASKS.items() if task.group == group] for group in ("easy", "hard")}
    return {group: fmean(scores[name] for name in own) for group, own in names.items() if scores.keys() >= set(own)}
