"""Write the tables of README.md and NOTES.md from results.jsonl and smollm2.jsonl (see measure.py)
and from ablations.jsonl (see ablations.py) into their places, which are marked by comments.

    python assets/tables.py
"""

import json
import sys
from pathlib import Path

ASSETS = Path(__file__).parent
sys.path.insert(0, str(ASSETS.parent))

import ablations  # noqa: E402
from search import PAPER_SEARCH  # noqa: E402

README = ASSETS.parent / "README.md"
NOTES = ASSETS / "NOTES.md"
FLAGS = ("decoder", "b", "n", *PAPER_SEARCH)
ACCURACY = "selected: seen | new | verified: seen | new | tokens a problem"
PAPERS = [  # what it reports of Llama-3.2-1B
    "| *the paper's Llama-3.2-1B, b = 1, n = 32* | *73.5* | *73.8* | | | |",
]


def best_of(n: int, **others) -> dict:
    return {"decoder": "best_of_n", "n": n, **others}


def stepping_back(b: int, n: int, **others) -> dict:
    return {"decoder": "self_backtrack", "b": b, "n": n, **others}


MAIN = [
    ("**greedy**", {"decoder": "greedy"}),
    ("beam search, 32 beams", {"decoder": "beam", "n": 32}),
    ("best of 32", best_of(32)),
    ("best of 128", best_of(128)),
    ("**self-backtracking, b = 1, n = 32**", stepping_back(1, 32)),
    ("b = 3, n = 32", stepping_back(3, 32)),
    ("*paper's rule:* best of 32", best_of(32, **PAPER_SEARCH)),
    ("*paper's rule:* b = 1, n = 32", stepping_back(1, 32, **PAPER_SEARCH)),
]
OTHERS = [
    ("best of 8", best_of(8)),
    ("best of 16", best_of(16)),
    ("b = 1, n = 8", stepping_back(1, 8)),
    ("b = 1, n = 16", stepping_back(1, 16)),
    ("*paper's rule:* best of 8", best_of(8, **PAPER_SEARCH)),
    ("*paper's rule:* best of 16", best_of(16, **PAPER_SEARCH)),
    ("*paper's rule:* b = 1, n = 8", stepping_back(1, 8, **PAPER_SEARCH)),
]
ADDITIONS = [
    ("all of ours", stepping_back(1, 32)),
    ("independent samples", stepping_back(1, 32, independent=True)),
    ("temperature 0.7, no min-p", stepping_back(1, 32, temperature=0.7, min_p=0.0)),
    ("stepping back as in the paper", stepping_back(1, 32, proportional=False)),
    ("not ended when sure", stepping_back(1, 32, stop_above=0.0)),
    ("not ended, the mean alone as score", stepping_back(1, 32, stop_above=0.0, last_line=False)),
    ("all of the paper's", stepping_back(1, 32, **PAPER_SEARCH)),
]
PRETRAINED = [
    ("greedy", {"decoder": "greedy"}),
    ("best of 32", best_of(32)),
    ("*paper's rule:* best of 8", best_of(8, **PAPER_SEARCH)),
    ("*paper's rule:* best of 32", best_of(32, **PAPER_SEARCH)),
    ("*paper's rule:* b = 1, n = 8", stepping_back(1, 8, **PAPER_SEARCH)),
    ("*paper's rule:* b = 1, n = 32", stepping_back(1, 32, **PAPER_SEARCH)),
]
SPLITS = {"val": "seen targets", "val_new": "new targets"}
KINDS = ("none", "exploratory", "computational", "rule violation", "no action")
WORDS = {"none": "none (false alarms)", "no action": "unreadable line"}


def accuracy(lines: list[dict], asked: list[tuple[str, dict]], first_column: str) -> list[str]:
    table = [f"| {first_column} | {ACCURACY} |".replace("|  |", "| |"), "|---|---|---|---|---|---|"]
    for name, flags in asked:
        found = []
        for split in SPLITS:
            for line in lines:
                own_flags = {flag: line[flag] for flag in FLAGS if flag in line}
                if line["split"] == split and own_flags == flags:
                    found.append(line)
        if len(found) != 2:
            raise SystemExit(f"there are {len(found)} lines, not 2, of {name}")
        shares = [f"{line[key][0]:.1f}" for key in ("selected", "verified") for line in found]
        tokens = round(sum(line["tokens"] for line in found) / 2)
        table.append(f"| {name} | {' | '.join(shares)} | {tokens:,} |")
    return table


def judgement(lines: list[dict]) -> list[str]:
    table = ["| | canonical | other right | wrong | area: wrong, other right | wrong, canonical |"]
    table.append("|---|---|---|---|---|---|")
    for line in lines:
        for depth, found in line.get("judgement", {}).items():
            means = [found[kind][0] for kind in ("canonical", "other_right", "wrong")]
            cells = [*means, found["area_wrong_other_right"], found["area_wrong_canonical"]]
            cells = " | ".join(f"{cell:.2f}" for cell in cells)
            table.append(f"| {SPLITS[line['split']]}, {depth.replace('_', ' ')} | {cells} |")
    return table


def mistakes(lines: list[dict]) -> list[str]:
    """Of the samples of best of 32: the kinds of their first mistakes, and how many of these said
    `<backtrack>` at once; of mistakes in the first and in the second action, too."""
    columns = "samples | `<backtrack>` at once | after action 1, 2"
    table = [
        f"| first mistake | seen: {columns} | new: {columns} |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        cells = [WORDS.get(kind, kind)]
        for line in lines:
            if "first_mistake" in line:
                made_of_all = sum(made for made, _ in line["first_mistake"].values())
                made, caught = line["first_mistake"].get(kind, [0, 0])
                cells += [percent(made, made_of_all), percent(caught, made)]
                by_action = line["first_mistake_by_action"].get(kind, [])[:2]
                shares = [percent(caught, made) for made, caught in by_action]
                cells.append("" if kind == "none" else ", ".join(shares))
        table.append(f"| {' | '.join(cells)} |")
    return table


def percent(count: int, of_all: int) -> str:
    return f"{100 * count / of_all:.1f} %" if of_all else "none"


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / name).read_text().splitlines()]


def main() -> None:
    lines = read_lines("results.jsonl")
    tables = {
        "main": accuracy(lines, MAIN, "decoder") + PAPERS,
        "others": accuracy(lines, OTHERS, "decoder"),
        "additions": accuracy(lines, ADDITIONS, ""),
        "judgement": judgement(lines),
        "mistakes": mistakes(lines),
        "smollm2": accuracy(read_lines("smollm2.jsonl"), PRETRAINED, "decoder"),
        "ablations": ablations.table(read_lines("ablations.jsonl")),
    }
    for path in (README, NOTES):
        text = path.read_text()
        for name, table in tables.items():
            begin = f"<!-- {name} -->\n"
            if begin in text:
                before, after = text.split(begin)
                _, after = after.split("\n<!-- end -->", 1)
                text = before + begin + "\n".join(table) + "\n<!-- end -->" + after
        path.write_text(text)


if __name__ == "__main__":
    main()
