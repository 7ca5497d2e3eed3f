"""Draw the README's figures from results.jsonl (measure.py), the shipped checkpoint's log.jsonl and rounds.jsonl, the log.jsonl
of its self-improvement. Needs matplotlib.

    python assets/figures.py
"""
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

ASSETS = Path(__file__).parent
COLOURS = {0: "tab:blue", 1: "tab:orange", 3: "tab:green"}


def read(file: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / file).read_text().splitlines()]


def searches(ax, lines: list[dict], split: str) -> None:
    """Accuracy against sampled tokens: a line for each b, a point for each n."""
    greedy = next(line for line in lines if line["decoder"] == "greedy" and line["split"] == split)
    ax.axhline(greedy["selected"], color="grey", linewidth=1, linestyle=":")
    ax.annotate("greedy", (0.01, greedy["selected"] + 1), xycoords=("axes fraction", "data"), color="grey", fontsize=8)
    for b, colour in COLOURS.items():
        decoder = "self_backtrack" if b else "best_of_n"
        points = [line for line in lines if line["decoder"] == decoder and line.get("b", 0) == b
                  and line["split"] == split and "paper" not in line]
        for key, style in (("selected", "o-"), ("verified", "o--")):
            ax.plot([p["tokens"] for p in points], [p[key] for p in points], style, color=colour, markersize=4,
                    label=f"b = {b}, {key}")
        for p in points if b < 3 else ():                                # b = 0 above its lines, b = 1 below
            key, up = ("selected", -13) if b else ("verified", 6)
            ax.annotate(f"n = {p['n']}", (p["tokens"], p[key]), xytext=(-9, up), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", xlabel="sampled tokens a problem", ylabel="% of problems", ylim=(30, 100),
           title={"val": "seen targets", "val_new": "new targets"}[split])
    ax.grid(alpha=0.3)


def mistakes(ax, lines: list[dict]) -> None:
    """What goes wrong first in a sample of the prompt, and how much of it `<backtrack>` catches at once."""
    [line] = [line for line in lines if "first_mistake" in line and line["split"] == "val"]
    total = sum(made for made, _ in line["first_mistake"].values())
    kinds = [kind for kind in ("none", "exploratory", "computational", "rule violation") if kind in line["first_mistake"]]
    made, caught = zip(*([100 * x / total for x in line["first_mistake"][kind]] for kind in kinds))
    ax.bar(kinds, made, color="lightgrey", label="samples")
    ax.bar(kinds, caught, color="tab:orange", label="`<backtrack>` right after it")
    ax.tick_params(axis="x", labelsize=8)
    ax.set(ylabel="% of samples", title="the first mistake of a sample (best of 32)")
    ax.legend(fontsize=8)


def training(ax, log: list[dict]) -> None:
    rows = [line["rows"] / 1000 for line in log]
    ax.plot(rows, [100 * line["val_greedy"] for line in log], "o-", markersize=4, label="seen targets")
    ax.plot(rows, [100 * line["val_new_greedy"] for line in log], "o-", markersize=4, label="new targets")
    ax.set(xlabel="thousand training rows", ylabel="greedy, % of 200 problems", title="training", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def rounds(ax, log: list[dict]) -> None:
    """Accuracy before and after each round of self-improvement."""
    for decoder, style in (("greedy", "o-"), ("self_backtrack", "s--")):
        for split, colour in (("val", "tab:blue"), ("val_new", "tab:orange")):
            ax.plot([line["round"] for line in log], [100 * line[f"{split}_{decoder}"] for line in log], style, color=colour,
                    markersize=4, label=f"{decoder.replace('self_backtrack', 'search')}, {'new' if 'new' in split else 'seen'}")
    ax.set(xlabel="round", ylabel="% of problems", title="self-improvement", xticks=range(len(log)), ylim=(0, 100))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def main() -> None:
    matplotlib.use("agg")
    lines = read("results.jsonl")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for ax, split in zip(axes, ("val", "val_new")):
        searches(ax, lines, split)
    axes[0].legend(fontsize=7, loc="lower right", ncols=2)
    figure.savefig(ASSETS / "search.png", dpi=110)
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.6), layout="constrained")
    mistakes(axes[0], lines)
    training(axes[1], read("checkpoint/log.jsonl"))
    rounds(axes[2], read("rounds.jsonl"))
    figure.savefig(ASSETS / "training.png", dpi=110)


if __name__ == "__main__":
    main()
