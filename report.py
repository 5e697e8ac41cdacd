"""What the plans of a model can do and what they save, by task: a table for the terminal, JSON, plots.

Made from the results of evaluation.evaluate (paper: Tables 1 and 5, figures 6 to 10). Drawing needs matplotlib, nothing
else does.
"""
import json
from collections import Counter

import numpy as np

import data
from cli import atomic
from config import Plan, plan_name
from flops import asking_flops, encoder_flops, llm_flops, pixel_flops, router_flops


class Report:
    """Rows of accuracy and saving, by task and by group of tasks: one for a plan, a router or an oracle.

    Savings are operations of the dense model, without reduction, over the mean of those that ran: "saving" of the
    language model's prefill, router included, "end_to_end" up to the first token, with the encoder too. "mean_saving"
    is the mean of the tasks' own savings, larger wherever they differ.
    """

    def __init__(self, config, groups, text, image_size):
        """groups: {"detail": [tasks], ...}; text, image_size: tokens and (width, height) of a usual prompt, image."""
        self.config, self.groups, self.text_tokens = config, groups, text
        self.rows, self.labels = [], {}  # labels: the pseudo-label of each task, number in config.plans
        plain = config.unreduced()
        self.tiling, dense_tiling = data.tiling(*image_size, config), data.tiling(*image_size, plain)
        everything = tuple(range(config.layers))
        self.dense = llm_flops(plain, everything, text, dense_tiling.tokens)
        self.dense_encoder = encoder_flops(plain, [dense_tiling])
        seen = {"all": self.tiling, "overview": data.overview_tiling(config)}
        self.encoder = {pixels: encoder_flops(config, [tiling]) for pixels, tiling in seen.items()}
        self.cost = {plan: llm_flops(config, plan.sa, text, seen[plan.pixels].tokens) for plan in config.plans}
        self.cost[Plan(everything)] = self.dense

    def router_flops(self, plan):
        """Operations of choosing a plan for a usual prompt: of the routing token, and of the prompt over the overview
        where that did not do."""
        c, text, vision = self.config, self.text_tokens, data.overview_tokens(self.config)
        if plan.pixels == "overview":  # where one configuration is all there is, layers are not chosen
            return pixel_flops(c, text) + (router_flops(c, text, vision) if len(c.overview) > 1 else 0)
        return (asking_flops(c, text) if c.overview else 0) + router_flops(c, text, self.tiling.tokens)

    def add(self, label, plan, results, plans, choice, extra=lambda plan: 0):
        """A row: what happens if result r is answered with plan number choice(r).

        plan: it, or None where it differs; extra: operations besides those of a plan, such as the router's.
        """
        tasks = {}
        for r in results:
            i = choice(r)
            tasks.setdefault(r["task"], []).append((plans[i], r["correct"][i]))
        accuracy = {t: float(np.mean([ok for _, ok in x])) for t, x in tasks.items()}

        def account(names):
            """Of some tasks, each with the same weight: mean layers, savings, shares of the plans."""
            shares = Counter()
            for t in names:
                for own, _ in tasks[t]:
                    shares[own] += 1 / len(tasks[t]) / len(names)
            cost = sum((extra(own) + self.cost[own]) * share for own, share in shares.items())
            encoder = sum(self.dense_encoder if label == "dense" else self.encoder[own.pixels] * share
                          for own, share in shares.items())
            return {"layers": sum(len(own.sa) * share for own, share in shares.items()),
                    "saving": self.dense / cost,
                    "end_to_end": (self.dense + self.dense_encoder) / (cost + encoder),
                    "shares": {plan_name(self.config, own): share for own, share in sorted(shares.items())}}

        by_task = {t: account([t]) for t in tasks}
        self.rows.append({
            "name": label, "sa": plan and list(plan.sa), "pixels": plan and plan.pixels, "tasks": accuracy,
            "questions": {t: len(x) for t, x in tasks.items()},
            **{group: float(np.mean([accuracy[t] for t in names])) for group, names in self.groups.items()},
            **account(list(tasks)), "mean_saving": float(np.mean([x["saving"] for x in by_task.values()])),
            "by_task": by_task, "by_group": {group: account(names) for group, names in self.groups.items()}})

    # --- for the terminal ---

    def text(self):
        """The table: a line for each task, a column for each row."""
        lines = [["layers", *(row["name"].replace("dense", "all") for row in self.rows)],
                 ["saving", *(f"{row['saving']:.2f}x" for row in self.rows)],
                 ["with encoder", *(f"{row['end_to_end']:.2f}x" for row in self.rows)]]
        for group, tasks in self.groups.items():
            lines += [[]] + [[task, *(f"{row['tasks'][task]:.3f}" for row in self.rows)] for task in tasks]
            lines.append([group.upper(), *(f"{row[group]:.3f}" for row in self.rows)])
        return columns(lines) + "\n\nov: over the overview, an image's base tile alone" * bool(self.config.overview)

    def routes(self):
        """What the router did with each task: layers, savings, configurations in %, * that of its pseudo-label."""
        row = next(r for r in self.rows if r["name"] == "router")
        names = [plan_name(self.config, plan) for plan in self.config.plans]
        lines = [["routed to, %", "layers", "LLM", "in all", *names]]
        for group, tasks in self.groups.items():
            for label, x in [*((t, row["by_task"][t]) for t in tasks), (group.upper(), row["by_group"][group])]:
                shares = [f"{100 * x['shares'][n]:.0f}" if n in x["shares"] else "." for n in names]
                if label in self.labels:
                    shares[self.labels[label]] += "*"
                lines.append([label, f"{x['layers']:.2f}", f"{x['saving']:.2f}x", f"{x['end_to_end']:.2f}x", *shares])
        return columns(lines) + "\n* the pseudo-label of these questions"

    # --- files ---

    def save(self, path):
        with atomic(path) as beside:
            beside.write_text(json.dumps({"groups": self.groups, "rows": self.rows}, indent=1) + "\n")

    def draw(self, path):
        """A PNG of two panels, accuracy against saving and accuracy by task; where there is a router a third, what it
        chose. Raises ImportError without matplotlib."""
        plt = pyplot()
        routed = [r for r in self.rows if r["sa"] is None]
        tasks = [task for names in self.groups.values() for task in names]
        with plt.rc_context({"font.size": 12}):  # legible at half the size
            figure = plt.figure(figsize=(13, 10), constrained_layout=True)
            panels = figure.subplot_mosaic([["savings", "routes" if routed else "savings"], ["tasks", "tasks"]])
            self.draw_savings(panels["savings"])
            values = np.array([[r["tasks"][t] for t in tasks] for r in self.rows])
            heat_map(panels["tasks"], values, [r["name"] for r in self.rows], tasks)
            for x in np.cumsum([len(names) for names in self.groups.values()])[:-1]:
                panels["tasks"].axvline(x - 0.5, color="white", linewidth=3)
            panels["tasks"].set_title("accuracy by plan (ov: over the overview) and task: "
                                      + " | ".join(self.groups))
            if routed:
                self.draw_routes(panels["routes"], routed[0], tasks, plt.cm)
            figure.savefig(path, dpi=100)
        plt.close(figure)

    def draw_savings(self, axes):
        """Accuracy against saving: a point for each configuration and group, stars for the router."""
        routed = [r for r in self.rows if r["sa"] is None]
        fixed = [r for r in self.rows if r["sa"] is not None]
        for group, colour in zip(self.groups, ("tab:green", "tab:blue", "tab:red", "tab:purple")):
            x, y = [r["end_to_end"] for r in fixed], [r[group] for r in fixed]
            axes.plot(x, y, "o", color=colour, label=group)
            axes.plot(*frontier(x, y), color=colour, alpha=0.4)
            for r, marker in zip(routed, "*P"):
                axes.plot(r["by_group"][group]["end_to_end"], r[group], marker, color=colour, markersize=14,
                          markeredgecolor="black")
        for r, marker in zip(routed, "*P"):
            axes.plot([], [], marker, color="white", markersize=12, markeredgecolor="black", label=r["name"])
        for r in fixed:
            axes.annotate(r["name"], (r["end_to_end"], r[list(self.groups)[-1]]), xytext=(-4, -5), fontsize=10,
                          textcoords="offset points", ha="right", va="top")
        axes.set(xlabel="times fewer operations to the first token,\nencoder included, than dense", ylabel="accuracy",
                 ylim=(0, 1.05), title="what each plan costs and can do")
        axes.set_xlim(left=0.2, right=1.15 * max(r["end_to_end"] for r in self.rows))
        axes.legend(loc="lower left", fontsize=11)

    def draw_routes(self, axes, row, tasks, maps):
        """Bars: the share of each task's questions that went to each plan; those over the overview in grey."""
        start, plans = np.zeros(len(tasks)), sorted(self.config.plans, key=lambda plan: plan.pixels == "all")
        small = sum(plan.pixels == "overview" for plan in plans)
        colours = *maps.Greys(np.linspace(0.4, 0.8, small)), *maps.viridis(np.linspace(0, 1, len(plans) - small))
        for plan, colour in zip(plans, colours):
            label = plan_name(self.config, plan)
            share = np.array([row["by_task"][t]["shares"].get(label, 0) for t in tasks])
            axes.barh(range(len(tasks)), share, left=start, label=label, color=colour)
            start += share
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="share of questions", title="what the router chose")
        axes.legend(fontsize=10, loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.15))


def columns(lines, first=14, width=80):
    """Lines of cells as text: the first left, the others right-aligned; what does not fit goes into a block below."""
    cell = max(6, *(len(x) + 1 for line in lines for x in line[1:]))
    n = (width - first) // cell  # columns of a block
    blocks = []
    for i in range(1, max(map(len, lines)), n):
        rows = ["".join([f"{line[0]:<{first}}", *(f"{x:>{cell}}" for x in line[i:i + n])]) if line else ""
                for line in lines]
        blocks.append("\n".join(rows))
    return "\n\n".join(blocks)


def frontier(x, y):
    """The points that none with at least as much x beats in y, as two lists in the order of x."""
    best = sorted((a, b) for a, b in zip(x, y) if not any(c >= a and d > b for c, d in zip(x, y)))
    return [a for a, _ in best], [b for _, b in best]


def pyplot():
    """matplotlib.pyplot that draws into files. Raises ImportError."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def heat_map(axes, values, rows, columns):
    """A heat map of values (rows, columns) from 0 to 1, with the numbers in it."""
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, j in np.ndindex(*values.shape):
        axes.text(j, i, f"{values[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=10,
                  color="black" if values[i, j] > 0.6 else "white")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right")
    axes.set_yticks(range(len(rows)), rows)


def draw_heat_map(path, values, rows, columns, title):
    """A PNG of a heat map alone."""
    figure, axes = pyplot().subplots(figsize=(9, 1 + 0.4 * len(rows)), constrained_layout=True)
    heat_map(axes, values, rows, columns)
    axes.set_title(title)
    figure.savefig(path, dpi=90)
