"""Draw the README's figures: the method; and, from results.jsonl (measure.py), the shipped
checkpoint's log.jsonl and rounds.jsonl, the log.jsonl of its self-improvement, what came of it.
Needs matplotlib. What a file lacks is left out of its picture.

    python assets/figures.py
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch
from tables import FLAGS, KINDS, PAPER_SEARCH, SPLITS, WORDS, read_lines

ASSETS = Path(__file__).parent
BEST_OF_N = {"decoder": "best_of_n"}
BACK_ONCE = {"decoder": "self_backtrack", "b": 1}
SEARCHES = {  # name: (colour, line, flags); a curve of search.png has a point for each n
    "best of n": ("tab:blue", "o-", BEST_OF_N),
    "b = 1": ("tab:orange", "o-", BACK_ONCE),
    "b = 3": ("tab:green", "o-", {"decoder": "self_backtrack", "b": 3}),
    "beam search": ("tab:red", "o-", {"decoder": "beam"}),
    "paper's rule, best of n": ("tab:blue", "o:", {**BEST_OF_N, **PAPER_SEARCH}),
    "paper's rule, b = 1": ("tab:orange", "o:", {**BACK_ONCE, **PAPER_SEARCH}),
}
TOKENS = (100, 200, 500, 1000, 2000, 5000)  # where the axis of search.png has marks
MONO = "monospace"


def percent(line: dict, key: str) -> float:
    share, _, _ = line[key]  # the others are its interval
    return share


def legend(ax, **settings) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**settings)


# ---- search.png ----------------------------------------------------------------------------------


def searches(ax, lines: list[dict], split: str) -> None:
    """Accuracy against sampled tokens: a curve for each search, a point for each n."""
    lines = [line for line in lines if line["split"] == split]
    for line in lines:
        if line.get("decoder") == "greedy":
            height = percent(line, "selected")
            ax.axhline(height, color="grey", linewidth=1, linestyle=":")
            place = (0.01, height + 1)
            at = ("axes fraction", "data")
            ax.annotate("greedy", place, xycoords=at, color="grey", fontsize=8)
    for name, (colour, style, flags) in SEARCHES.items():
        points = [line for line in lines if is_of(line, flags)]
        tokens = [point["tokens"] for point in points]
        heights = [percent(point, "selected") for point in points]
        ax.plot(tokens, heights, style, color=colour, markersize=4, label=name)
        if name == "best of n":
            name_points(ax, points)
    ax.set(xscale="log", xlabel="sampled tokens a problem", ylabel="% of problems")
    ax.set_xticks(TOKENS, [f"{tokens:,}" for tokens in TOKENS])
    ax.minorticks_off()
    ax.set(ylim=(50, 102), title=SPLITS[split])
    ax.margins(x=0.12)
    ax.grid(alpha=0.3)


def is_of(line: dict, flags: dict) -> bool:
    """Has a line exactly these flags, and any n?"""
    return {flag: line[flag] for flag in FLAGS if flag in line and flag != "n"} == flags


def name_points(ax, points: list[dict]) -> None:
    """Each point's n, below it; the first one's above, because another curve begins below it. (With
    the same n, more steps back lie to its right.)"""
    for point in points:
        place = (point["tokens"], percent(point, "selected"))
        away = {"xytext": (-6, -14), "textcoords": "offset points"}
        if point is points[0]:
            away["xytext"] = (-24, 6)
        ax.annotate(f"n = {point['n']}", place, fontsize=8, **away)


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
            ax.bar(kinds, caught, color="tab:orange", label="<backtrack> right after it")
            named = {"none": "none (orange:\nfalse alarms)"}
            labels = [named.get(kind, WORDS.get(kind, kind).replace(" ", "\n")) for kind in kinds]
            ax.set_xticks(range(len(kinds)), labels)
    ax.tick_params(axis="x", labelsize=8)
    ax.set(ylabel="% of samples", title="first mistakes (best of 32, seen targets)")
    legend(ax, fontsize=8)


def training(ax, first_leg: list[dict], second_leg: list[dict]) -> None:
    """Accuracy against all rows so far. Each leg (see NOTES.md) counts its own."""
    rows_before = first_leg[-1]["rows"]
    log = first_leg + [{**line, "rows": rows_before + line["rows"]} for line in second_leg]
    for split, title in SPLITS.items():
        lines = [line for line in log if f"{split}_greedy" in line]
        rows = [line["rows"] / 1e6 for line in lines]
        heights = [100 * line[f"{split}_greedy"] for line in lines]
        ax.plot(rows, heights, "o-", markersize=4, label=title)
    style = {"color": "grey", "linestyle": ":"}
    ax.axvline(rows_before / 1e6, label="leg 2: near misses, targets 1 to 299", **style)
    ax.set(xlabel="million training rows", ylabel="greedy, % of 200 problems")
    ax.set(title="training the shipped model", ylim=(0, 100))
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
    ax.set(xlabel="round", ylabel="% of 300 problems")
    ax.set(title="self-improvement of a small model")
    ax.set(xticks=numbers, ylim=(0, 100))
    ax.grid(alpha=0.3)
    legend(ax, fontsize=8)


# ---- method.png ----------------------------------------------------------------------------------

INK = {  # as the tree and the page have them
    "right": "#1a7f37",
    "wrong": "#c62828",
    "stopped": "#9a6700",
    "branched": "#0b7285",
    "faint": "#666666",
}


def box(ax, x: float, y: float, text: str, ink: str, width: float = 13, line: str = "-") -> None:
    """A line of a response."""
    style = {"boxstyle": "round,pad=0.1,rounding_size=0.6", "linewidth": 1.6}
    colours = {"edgecolor": INK[ink], "facecolor": "white", "linestyle": line}
    ax.add_patch(FancyBboxPatch((x, y), width, 3, **style, **colours))
    ax.text(x + width / 2, y + 1.4, text, ha="center", va="center", color=INK[ink], family=MONO)


def arrow(ax, begin: tuple, end: tuple, ink: str = "faint", bend: float = 0.0) -> None:
    shape = {"arrowstyle": "-|>", "color": INK[ink], "linewidth": 1.6}
    shape["connectionstyle"] = f"arc3,rad={bend}"
    ax.annotate("", xy=end, xytext=begin, arrowprops=shape)


def words(ax, x: float, y: float, text: str, ink: str = "faint", **style) -> None:
    ax.text(x, y, text, color=INK[ink], va="center", **style)


def method(ax) -> None:
    """The method in one picture: the rows, a search of two rounds, what is folded back. (Numbers 2,
    4, 10, 25 and the target 60, as in data.py's first lines.)"""
    ax.set(xlim=(-1, 131), ylim=(1, 40))
    ax.axis("off")
    black = {"fontsize": 13, "weight": "bold"}
    ax.text(0, 38, "Train (steps 1, 2)", **black)
    ax.text(43, 38, "Search (steps 3, 4)", **black)
    ax.text(106, 38, "Select, improve (5, 6)", **black)

    words(ax, 0, 3, "(numbers 2, 4, 10, 25; target 60)", fontsize=10)
    words(ax, 0, 34, "D_op, a solution: all is learned")
    for place, line in enumerate(["4-2=2", "25*2=50", "50+10=60", "Goal Reached!"]):
        box(ax, 0, 29 - 4 * place, line, "right", 14)
    words(ax, 17, 31.5, "D_back: all but")
    words(ax, 17, 29.4, "the mistake is learned")
    box(ax, 17, 25, "4-2=2", "right", 14)
    box(ax, 17, 21, "25*2=52", "wrong", 14, line="--")
    box(ax, 17, 17, "<backtrack>", "stopped", 14)
    words(ax, 0, 11, "cross-entropy over the solid lines,", fontsize=10)
    words(ax, 0, 8.6, "none on the dashed one (paper's mask)", fontsize=10)

    words(ax, 43, 34, "round 0: n samples of the prompt")
    box(ax, 43, 24, "the prompt", "branched", 13)
    box(ax, 62, 29, "4-2=2", "faint")
    box(ax, 62, 19, "25-10=15", "wrong")
    arrow(ax, (56.5, 26), (61.5, 30))
    arrow(ax, (56.5, 25), (61.5, 21))
    box(ax, 80, 29, "25*2=52", "wrong")
    arrow(ax, (75.5, 30.5), (79.5, 30.5))
    words(ax, 94, 30.5, "<backtrack>", "stopped", family=MONO)
    words(ax, 76.5, 20.5, "<backtrack>", "stopped", family=MONO)
    arrow(ax, (86, 28.7), (71, 28.7), "stopped", -0.35)
    arrow(ax, (68, 18.7), (50, 23.5), "stopped", -0.3)
    words(ax, 74, 24.6, "step back: drop the last action", "stopped", fontsize=10)

    words(ax, 43, 13.5, "round 1: n samples of each new state")
    box(ax, 43, 8, "4-2=2", "branched", 13)
    for place, line in enumerate(["25*2=50", "50+10=60", "Goal Reached!"]):
        box(ax, 62 + 17 * place, 8, line, "right", 14)
        arrow(ax, (57.5 if place == 0 else 59.5 + 17 * place, 9.5), (61.5 + 17 * place, 9.5))
    box(ax, 62, 2, "10*2=20", "wrong", 14)
    arrow(ax, (56.5, 8.6), (61.5, 4))
    words(ax, 78, 3.5, "<backtrack>", "stopped", family=MONO)

    words(ax, 107, 32, "all that reached the goal")
    words(ax, 107, 29.8, "are candidates; the best")
    words(ax, 107, 27.6, "score is the answer:")
    ax.text(107, 24.4, "score = mean log p", family=MONO, va="center")
    arrow(ax, (111.5, 9.5), (113.5, 22.5), bend=0.3)
    words(ax, 116, 18.5, "in training, one", "right")
    words(ax, 116, 16.3, "that verifies", "right")
    words(ax, 116, 14.1, "becomes a row", "right")
    words(ax, 116, 11.9, "of D_op", "right")


def main() -> None:
    matplotlib.use("agg")
    figure, ax = plt.subplots(figsize=(13.6, 4), layout="constrained")
    method(ax)
    figure.savefig(ASSETS / "method.png", dpi=110)

    lines = read_lines("results.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for ax, split in zip(axes, SPLITS):
        searches(ax, lines, split)
    legend(axes[0], fontsize=7, loc="lower right", ncols=2)
    figure.savefig(ASSETS / "search.png", dpi=110)

    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    mistakes(axes[0], lines)
    training(axes[1], read_lines("first_leg.jsonl"), read_lines("checkpoint/log.jsonl"))
    rounds(axes[2], read_lines("rounds.jsonl"))
    figure.savefig(ASSETS / "training.png", dpi=110)


if __name__ == "__main__":
    main()
