"""Which self-attention layers run: what each configuration can do, and what it costs (paper 4.2.3, 4.3).

`examine` asks a model the same questions in several configurations and notes, for every question, whether the answer
is right and how likely the model found it. `Report` turns that into accuracy by configuration and task. An exam is a
list of (image, [(task, question, answer), ...]).
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from flops import llm_flops, name


@torch.no_grad()
def examine(model, exam, configurations, batch_size=128, progress=True):
    """{configuration: {task: (n, 2) array}}: per question 1 or 0 for right or wrong, and the summed token loss.

    An answer is right if greedy decoding gives exactly it: if every one of its tokens, and <|im_end|> after them, is
    the likeliest given those before. One teacher-forced forward tells that, and the loss with it. Pictures are seen
    once for a configuration, as in VLM.see, and asked many questions; they are batched with those that have equally
    many visual tokens and questions.
    """
    groups = {}
    for image, asked in exam:
        picture = data.picture(image, model.config)
        groups.setdefault((picture.tiling.tokens, len(asked)), []).append((picture, asked))
    batches = [g[i:i + batch_size] for g in groups.values() for i in range(0, len(g), batch_size)]
    results = {sa: {} for sa in configurations}
    bar = tqdm(total=len(batches) * len(configurations), desc="examination", disable=not progress, leave=False)
    for rows in batches:
        shared, _ = data.split_shared(data.chatml([data.place_images("?", 1)]))
        seen = data.collate([data.encode(shared, model.tokenizer, [picture]) for picture, _ in rows])
        t, v, t_pos, v_pos = model.embed(seen)  # the encoder's work is the same for all configurations
        for sa in configurations:
            cache = model.new_cache(len(rows), sa, 64, v.shape[1])
            model.language_model(t, v, t_pos, v_pos, sa, cache)
            start, mark = cache.end, cache.mark()
            for asked in zip(*(asked for _, asked in rows)):
                scored = score(model, [(q, a) for _, q, a in asked], start, sa, cache)
                for (task, _, _), row in zip(asked, scored):
                    results[sa].setdefault(task, []).append(row)
                cache.rewind(mark)
            bar.update()
    bar.close()
    return {sa: {task: np.array(rows) for task, rows in tasks.items()} for sa, tasks in results.items()}


def score(model, pairs, start, sa, cache):
    """(right, loss) for each (question, answer) that follows what the cache holds."""
    prompts, labels = [], []
    for question, answer in pairs:
        asked = data.split_shared(data.chatml([data.place_images(question, 1)]))[1]
        prompt, learned = data.labelled([(asked, False), (answer + "<|im_end|>", True)], model.tokenizer, start=start)
        prompts.append(prompt)
        labels.append(learned)
    batch, labels = data.collate(prompts), data.pad(labels, -1)
    h = model(batch, sa, cache)[:, :-1]
    labels = torch.from_numpy(labels)[:, 1:].to(h.device)
    due = labels >= 0
    logits, wanted = model.head(h[due]).float(), labels[due]
    wrong, loss = torch.zeros(due.shape), torch.zeros(due.shape)
    wrong[due] = (logits.argmax(-1) != wanted).float().cpu()
    loss[due] = F.cross_entropy(logits, wanted, reduction="none").cpu()
    return list(zip((wrong.sum(1) == 0).float().tolist(), loss.sum(1).tolist()))


def accuracy(results):
    """{configuration: {task: share of right answers}}."""
    return {sa: {task: float(rows[:, 0].mean()) for task, rows in tasks.items()} for sa, tasks in results.items()}


def saving(config, sa, text, vision):
    """How many times fewer operations than dense the language model's prefill executes."""
    return llm_flops(config, range(config.layers), text, vision) / llm_flops(config, sa, text, vision)


class Report:
    """Accuracy by configuration and task, with means over groups of tasks (easy and hard) and the saving."""

    def __init__(self, config, results, groups, text, vision):
        """results: of `examine`; groups: {"easy": [tasks], "hard": [tasks]}; text, vision: tokens of a usual prompt."""
        self.groups, self.rows = groups, []
        for sa, tasks in accuracy(results).items():
            means = {g: float(np.mean([tasks[t] for t in names])) for g, names in groups.items()}
            self.rows.append({"sa": list(sa), "name": name(config, sa), "saving": saving(config, sa, text, vision),
                              **means, "tasks": tasks, "questions": {t: len(r) for t, r in results[sa].items()}})

    def text(self, width=80):
        """The table for the terminal: a line for each task, a column for each configuration; it fits into `width`."""
        names = [row["name"].replace("dense", "all") for row in self.rows]
        cell = max(6, *(len(n) + 1 for n in names))
        lines = [f"{'layers':<15}" + "".join(f"{n:>{cell}}" for n in names),
                 f"{'saving':<15}" + "".join(f"{row['saving']:>{cell - 1}.2f}x" for row in self.rows)]
        for group, tasks in self.groups.items():
            lines.append("")
            lines += [f"{task:<15}" + "".join(f"{row['tasks'][task]:>{cell}.3f}" for row in self.rows)
                      for task in tasks]
            lines.append(f"{group.upper() + ' mean':<15}" + "".join(f"{row[group]:>{cell}.3f}" for row in self.rows))
        return "\n".join(line[:width] for line in lines)

    def save(self, path):
        Path(path).write_text(json.dumps({"groups": self.groups, "rows": self.rows}, indent=1) + "\n")

    def draw(self, path):
        """Two panels: accuracy against saving, a point for each configuration and group; accuracy by task. ImportError
        without matplotlib, which only drawing needs."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(1, 1.35), constrained_layout=True)
        for (group, _), colour in zip(self.groups.items(), ("tab:blue", "tab:red")):
            x, y = [row["saving"] for row in self.rows], [row[group] for row in self.rows]
            order = np.argsort(x)
            left.plot(np.array(x)[order], np.array(y)[order], "o", color=colour, label=group)
            left.plot(*frontier(x, y), color=colour, alpha=0.4)
            if group == list(self.groups)[-1]:
                for row in self.rows:
                    left.annotate(row["name"], (row["saving"], row[group]), xytext=(6, -4), textcoords="offset points",
                                  fontsize=8)
        left.set(xlabel="times fewer operations in the language model than dense", ylabel="accuracy", ylim=(0, 1.05),
                 title="what each configuration costs and can do")
        left.set_xlim(left=0.5, right=1.15 * max(row["saving"] for row in self.rows))
        left.legend(loc="lower left")
        tasks = [task for names in self.groups.values() for task in names]
        values = np.array([[row["tasks"][task] for task in tasks] for row in self.rows])
        right.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for i, j in np.ndindex(*values.shape):
            right.text(j, i, f"{values[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=9,
                       color="black" if values[i, j] > 0.6 else "white")
        right.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right")
        right.set_yticks(range(len(self.rows)), [row["name"] for row in self.rows])
        right.axvline(len(next(iter(self.groups.values()))) - 0.5, color="white", linewidth=3)
        right.set_title("accuracy by self-attention layers (rows) and task: " + " | ".join(self.groups))
        figure.savefig(path, dpi=90)
        plt.close(figure)


def frontier(x, y):
    """The points that none with at least as much x beats in y, as two lists in the order of x."""
    best = sorted((a, b) for a, b in zip(x, y) if not any(c >= a and d > b for c, d in zip(x, y)))
    return [a for a, _ in best], [b for _, b in best]
