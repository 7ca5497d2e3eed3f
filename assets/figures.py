"""Draw the README's figures from results.jsonl (measure.py), the shipped checkpoint's log.jsonl,
and rounds.jsonl, the log.jsonl of its self-improvement. Needs matplotlib. What a file lacks is left
out of its picture.

    python assets/figures.py
"""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

ASSETS = Path(__file__).parent
COLOURS = {0: "tab:blue", 1: "tab:orange", 3: "tab:green"}  # of b
TITLES = {"val": "seen targets", "val_new": "new targets"}
RULES = {"independent", "temperature", "last_line", "prompt_again"}  # lines with other rules
KINDS = ("none", "exploratory", "computational", "rule violation")


def read(file: str) -> list[dict]:
    path = ASSETS / file
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def percent(line: dict, key: str) -> float:
    share, _, _ = line[key]  # the others are its interval
    return share


def legend(ax, **settings) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**settings)


# ---- search.png ----------------------------------------------------------------------------------


def searches(ax, lines: list[dict], split: str) -> None:
    """Accuracy against sampled tokens: a line for each b, a point for each n."""
    lines = [line for line in lines if line["split"] == split and not RULES & line.keys()]
    for line in lines:
        if line.get("decoder") == "greedy":
            height = percent(line, "selected")
            ax.axhline(height, color="grey", linewidth=1, linestyle=":")
            place = (0.01, height + 1)
            at = ("axes fraction", "data")
            ax.annotate("greedy", place, xycoords=at, color="grey", fontsize=8)
    for b, colour in COLOURS.items():
        points = [line for line in lines if steps_back(line) == b]
        if not points:
            continue
        tokens = [point["tokens"] for point in points]
        for key, style in (("selected", "o-"), ("verified", "o--")):
            heights = [percent(point, key) for point in points]
            label = f"b = {b}, {key}"
            ax.plot(tokens, heights, style, color=colour, markersize=4, label=label)
        if b < 3:
            name_points(ax, points, b)
    ax.set(xscale="log", xlabel="sampled tokens a problem", ylabel="% of problems")
    ax.set(ylim=(30, 100), title=TITLES[split])
    ax.margins(x=0.12)
    ax.grid(alpha=0.3)


def steps_back(line: dict) -> int | None:
    """b; best of n is b = 0, and the other decoders have none."""
    if line.get("decoder") == "best_of_n":
        return 0
    return line.get("b")


def name_points(ax, points: list[dict], b: int) -> None:
    """Each point's n: above the lines of b = 0, below those of b = 1."""
    key = "selected" if b else "verified"
    up = -13 if b else 6
    for point in points:
        place = (point["tokens"], percent(point, key))
        away = {"xytext": (-9, up), "textcoords": "offset points"}
        ax.annotate(f"n = {point['n']}", place, fontsize=7, **away)


# ---- training.png --------------------------------------------------------------------------------


def mistakes(ax, lines: list[dict]) -> None:
    """What goes wrong first in a sample of the prompt, and how much of it `<backtrack>` catches at
    once."""
    for line in lines:
        if line["split"] == "val" and "first_mistake" in line:
            found = line["first_mistake"]  # {kind: [made, caught]}
            total = sum(made for made, _ in found.values())
            kinds = [kind for kind in KINDS if kind in found]
            made = [100 * found[kind][0] / total for kind in kinds]
            caught = [100 * found[kind][1] / total for kind in kinds]
            ax.bar(kinds, made, color="lightgrey", label="samples")
            ax.bar(kinds, caught, color="tab:orange", label="`<backtrack>` right after it")
    ax.tick_params(axis="x", labelsize=8)
    ax.set(ylabel="% of samples", title="the first mistake of a sample (best of 32)")
    legend(ax, fontsize=8)


def training(ax, log: list[dict]) -> None:
    for split, title in TITLES.items():
        lines = [line for line in log if f"{split}_greedy" in line]
        rows = [line["rows"] / 1000 for line in lines]
        heights = [100 * line[f"{split}_greedy"] for line in lines]
        ax.plot(rows, heights, "o-", markersize=4, label=title)
    ax.set(xlabel="thousand training rows", ylabel="greedy, % of 200 problems")
    ax.set(title="training", ylim=(0, None))
    ax.grid(alpha=0.3)
    legend(ax, fontsize=8)


def rounds(ax, log: list[dict]) -> None:
    """Accuracy before and after each round of self-improvement."""
    numbers = [line["round"] for line in log]
    for decoder, name, style in (("greedy", "greedy", "o-"), ("self_backtrack", "search", "s--")):
        for split, new, colour in (("val", "seen", "tab:blue"), ("val_new", "new", "tab:orange")):
            heights = [100 * line[f"{split}_{decoder}"] for line in log]
            label = f"{name}, {new}"
            ax.plot(numbers, heights, style, color=colour, markersize=4, label=label)
    ax.set(xlabel="round", ylabel="% of problems", title="self-improvement")
    ax.set(xticks=numbers, ylim=(0, 100))
    ax.grid(alpha=0.3)
    legend(ax, fontsize=8)


def main() -> None:
    matplotlib.use("agg")
    lines = read("results.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for ax, split in zip(axes, TITLES):
        searches(ax, lines, split)
    legend(axes[0], fontsize=7, loc="lower right", ncols=2)
    figure.savefig(ASSETS / "search.png", dpi=110)

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    mistakes(axes[0], lines)
    training(axes[1], read("checkpoint/log.jsonl"))
    rounds(axes[2], read("rounds.jsonl"))
    figure.savefig(ASSETS / "training.png", dpi=110)


if __name__ == "__main__":
    main()
