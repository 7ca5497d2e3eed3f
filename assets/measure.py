"""Measure every decoder on one checkpoint, and how its `<backtrack>` judges: the tables of the
README and what figures.py draws, as JSON lines.

    torchrun --nproc_per_node=2 -- assets/measure.py     the shipped model; each process takes lines
    torchrun --nproc_per_node=2 -- assets/measure.py --resume              after it has been stopped
    python assets/measure.py --lines greedy "b=1 n=32"   a part of them, only printed (or to --out)

The line of a decoder has its flags, accuracy with Wilson's 95 % interval (selected, verified: each
[percent, low, high]), sampled tokens a problem and seconds. Greedy's also has of how many problems
the response ends in `<backtrack>` (stepped_back). Another has, for every kind of mistake (paper,
section 4.1), how many samples made it first and how many of these said `<backtrack>` right after:
[made, caught], in all and for a mistake in the first, second, ... action.

The line of the judgement is about P(<backtrack>) right after an action, over all legal actions: see
`judge_actions`.
"""

import json
import sys
import time
from collections import Counter, defaultdict
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import (  # noqa: E402
    ACTION,
    BACKTRACK,
    SPLITS,
    Position,
    SolvedProblem,
    Tokenizer,
    calculate,
    load_record,
    load_rows,
    plan_efforts,
    programs,
    prompt_text,
    solvable,
)
from model import (  # noqa: E402
    Arguments,
    Llama,
    UserError,
    at_least,
    best_dtype,
    cli,
    replacing,
    device_rank_world,
)
from search import (  # noqa: E402
    PAPER_SEARCH,
    SHIPPED,
    Settings,
    backtrack_chances,
    gather,
    judge,
    node_of,
    search_all,
    steps_back,
    wilson_interval,
)

DECODERS = [
    {"decoder": "greedy"},
    {"decoder": "beam", "n": 32},
    {"decoder": "best_of_n", "n": 8, **PAPER_SEARCH},
    {"decoder": "best_of_n", "n": 16, **PAPER_SEARCH},
    {"decoder": "best_of_n", "n": 32, **PAPER_SEARCH},
    {"decoder": "self_backtrack", "b": 1, "n": 8, **PAPER_SEARCH},
    {"decoder": "self_backtrack", "b": 1, "n": 32, **PAPER_SEARCH},
    {"decoder": "best_of_n", "n": 8},
    {"decoder": "best_of_n", "n": 16},
    {"decoder": "best_of_n", "n": 32},
    {"decoder": "best_of_n", "n": 128},
    {"decoder": "self_backtrack", "b": 1, "n": 8},
    {"decoder": "self_backtrack", "b": 1, "n": 16},
    {"decoder": "self_backtrack", "b": 1, "n": 32},
    {"decoder": "self_backtrack", "b": 3, "n": 32},
    # without one of our additions to the paper's rule
    {"decoder": "self_backtrack", "b": 1, "n": 32, "independent": True},
    {"decoder": "self_backtrack", "b": 1, "n": 32, "temperature": 0.7, "min_p": 0.0},
    {"decoder": "self_backtrack", "b": 1, "n": 32, "proportional": False},
    {"decoder": "self_backtrack", "b": 1, "n": 32, "stop_above": 0.0},
    {"decoder": "self_backtrack", "b": 1, "n": 32, "stop_above": 0.0, "last_line": False},
]
LOOKED_INTO = {"decoder": "best_of_n", "n": 32}  # the line whose samples' mistakes are counted
JUDGEMENT = {"judgement": None}


def line_name(line: dict) -> str:
    """What --lines asks for: `judgement`, `greedy`, `self_backtrack b=1 n=32 paper`."""
    if line == JUDGEMENT:
        return "judgement"
    words = [line["decoder"]]
    is_papers = PAPER_SEARCH.items() <= line.items()
    for flag, value in line.items():
        if flag != "decoder" and not (is_papers and flag in PAPER_SEARCH):
            words.append(f"{flag}={value}")
    if is_papers:
        words.append("paper")
    return " ".join(words)


# ---- Accuracy ------------------------------------------------------------------------------------


def percentage(rows: list[dict], key: str) -> list[float]:
    """Of how many rows the key holds: percent, and Wilson's 95 % interval."""
    count = len(rows)
    share = sum(row[key] for row in rows) / count
    low, high = wilson_interval(share, count)
    return [round(100 * value, 2) for value in (share, low, high)]


def measure_decoder(model: Llama, tokenizer: Tokenizer, problems: list[dict], flags: dict) -> dict:
    settings = Settings(**flags)
    begin = time.perf_counter()
    rows = []
    mistakes = Counter()
    for i, responses in search_all(model, tokenizer, problems, range(len(problems)), settings):
        row = judge(tokenizer, problems[i], responses)
        row["stepped_back"] = all(steps_back(response, tokenizer) for response in responses)
        rows.append(row)
        if flags == LOOKED_INTO:
            for response in responses:
                text = tokenizer.decode(response.tokens)
                mistakes[first_mistake(problems[i], text)] += response.count
    line = {
        "num": len(rows),
        "selected": percentage(rows, "correct"),
        "verified": percentage(rows, "verified"),
        "tokens": round(sum(row["tokens"] for row in rows) / len(rows), 1),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if settings.decoder == "greedy":
        line["stepped_back"] = percentage(rows, "stepped_back")
    if mistakes:
        line |= mistake_tables(mistakes)
    return line


# ---- First mistakes ------------------------------------------------------------------------------


@cache
def can_reach(left: tuple[int, ...], target: int) -> bool:
    if len(left) == 1:
        return left == (target,)
    return bool(solvable(np.array([left]), np.array([target]))[0])


def first_mistake(problem: dict, response: str) -> tuple[str, int, bool]:
    """The kind of the first wrong action of a response ("none" if all are right), the number of
    that action (or of the last one) from 1, and whether `<backtrack>` follows it at once."""
    actions = node_of(response) or ("",)
    gives_up = response.endswith(BACKTRACK)
    left = Counter(problem["nums"])
    for step, action in enumerate(actions, 1):
        kind = mistake_of(action, left, problem["target"])
        if kind != "none":
            return kind, step, gives_up and step == len(actions)
    return "none", len(actions), gives_up


def mistake_of(action: str, left: Counter, target: int) -> str:
    """The kind of mistake that an action is, where these numbers are left, or "none"; puts the
    result in place of the operands."""
    match = ACTION.fullmatch(action)
    if not match:
        return "no action"
    a, operator, b, claimed = match.groups()
    result, legal = calculate(int(a), operator, int(b))
    if not legal or result != int(claimed):
        return "computational"
    left.subtract([int(a), int(b)])
    if min(left.values()) < 0:
        return "rule violation"
    left[result] += 1
    if not can_reach(tuple(sorted(left.elements())), target):
        return "exploratory"
    return "none"


def mistake_tables(mistakes: Counter) -> dict:
    """From samples counted by (kind, number of the action, caught): by kind [made, caught], and the
    same for each number of the action, from 1."""
    deepest = max(step for _, step, _ in mistakes)
    in_all = {}
    by_step = {}
    for (kind, step, caught), count in sorted(mistakes.items()):
        in_all.setdefault(kind, [0, 0])
        by_step.setdefault(kind, [[0, 0] for _ in range(deepest)])
        for made_and_caught in (in_all[kind], by_step[kind][step - 1]):
            made_and_caught[0] += count
            made_and_caught[1] += count * caught
    return {"first_mistake": in_all, "first_mistake_by_action": by_step}


# ---- The judgement of <backtrack> ----------------------------------------------------------------

WRONG, OTHER_RIGHT, CANONICAL = range(3)  # kinds of legal actions; the later, the better


def judge_actions(model: Llama, tokenizer: Tokenizer, problems: list[dict]) -> dict:
    """How well P(<backtrack>) right after an action tells wrong from right, over all legal first
    actions, and over all legal second ones after the canonical first one.

    For each kind of action [mean of P(<backtrack>), how many there are]; the canonical action is
    the right one that begins the simplest solution, see data.py. And two areas under the curve: how
    often a wrong action gets a larger P(<backtrack>) than a right one, of either kind.
    """
    by_size = defaultdict(list)  # as arrays, problems must have equally many numbers
    for problem in problems:
        by_size[len(problem["nums"])].append(problem)
    found = {}
    for depth, name in enumerate(("first_action", "second_action")):
        kinds = {}
        for size, group in by_size.items():
            if depth < size - 1:
                kinds |= legal_actions(group, depth)
        if kinds:
            chances = np.array(backtrack_chances(model, tokenizer, list(kinds)))
            found[name] = summarize(chances, np.array(list(kinds.values())))
    return found


def legal_actions(problems: list[dict], depth: int) -> dict[str, int]:
    """All legal actions after `depth` canonical ones: {prompt and response up to that action:
    kind}. An action that two choices write alike, because a number is there twice, counts once, as
    the better kind of the two."""
    nums = np.array([problem["nums"] for problem in problems])
    target = np.array([problem["target"] for problem in problems])
    steps, _ = programs(nums)
    efforts = plan_efforts(steps, target)
    kinds = {}
    for index, problem in enumerate(problems):
        nums, target = problem["nums"], problem["target"]
        text = prompt_text(nums, target)
        position = Position(SolvedProblem(nums, target, index, steps, efforts))
        for _ in range(depth):
            text += position.action(position.simplest()).text()
            position = position.after(position.simplest())
        canonical = position.simplest()
        for choice in position.choices:
            if not position.legal[choice]:
                continue
            kind = OTHER_RIGHT if np.isfinite(position.effort[choice]) else WRONG
            if choice == canonical:
                kind = CANONICAL
            way = text + position.action(choice).text()
            kinds[way] = max(kinds.get(way, WRONG), kind)
    return kinds


def summarize(chances: np.ndarray, kinds: np.ndarray) -> dict:
    wrong = chances[kinds == WRONG]
    other_right = chances[kinds == OTHER_RIGHT]
    canonical = chances[kinds == CANONICAL]
    return {
        "canonical": mean_and_count(canonical),
        "other_right": mean_and_count(other_right),
        "wrong": mean_and_count(wrong),
        "area_wrong_other_right": area_under_curve(wrong, other_right),
        "area_wrong_canonical": area_under_curve(wrong, canonical),
    }


def mean_and_count(chances: np.ndarray) -> list:
    if len(chances) == 0:
        return [None, 0]
    return [round(float(chances.mean()), 4), len(chances)]


def area_under_curve(upper: np.ndarray, lower: np.ndarray) -> float | None:
    """The share of all pairs, one of `upper` and one of `lower`, in which the former is the larger;
    ties count half. This is the area under the curve of true against false alarms."""
    if len(upper) == 0 or len(lower) == 0:
        return None
    lower = np.sort(lower)
    smaller = np.searchsorted(lower, upper, side="left")  # (upper,): how many of `lower` are
    smaller_or_equal = np.searchsorted(lower, upper, side="right")
    twice = int(smaller.sum()) + int(smaller_or_equal.sum())
    return round(twice / (2 * len(upper) * len(lower)), 4)


# ---- The command ---------------------------------------------------------------------------------


def arguments():
    """The command line. Raises UserError."""
    args = Arguments("Measure every decoder, and the judgement of <backtrack>, on a checkpoint.")
    args.add_argument("--ckpt", default=str(SHIPPED), help="a folder or Hub id")
    args.add_argument("--num", type=at_least(1), default=5000, help="problems a split")
    judged = "problems a split whose actions are judged"
    args.add_argument("--num_judged", type=at_least(1), default=300, help=judged)
    lines = "only those with all words of one of these, as in: judgement 'best_of_n n=32' paper"
    args.add_argument("--lines", nargs="+", help=lines)
    out = "the file to write; without --lines: assets/results.jsonl"
    args.add_argument("--out", type=Path, help=out)
    resume = "keep the lines that a stopped run of the same command has left in --out's FILE.part"
    args.add_argument("--resume", action="store_true", help=resume)
    args = args.parse_args()
    if args.out is None and args.lines is None:
        args.out = ROOT / "assets" / "results.jsonl"
    if args.out and args.out.is_dir():
        raise UserError(f"--out wants a file, and {args.out} is a folder")
    if args.resume and args.out is None:
        raise UserError("--resume goes with --out")
    return args


def choose_lines(wanted: list[str] | None) -> list[dict]:
    """Raises UserError where none is chosen."""
    everything = [*DECODERS, JUDGEMENT]
    if wanted is None:
        return everything
    chosen = []
    for line in everything:
        words = set(line_name(line).split())
        if any(set(name.split()) <= words for name in wanted):
            chosen.append(line)
    if not chosen:
        names = [line_name(line) for line in everything]
        raise UserError(f"there is no such line; there are: {', '.join(names)}")
    return chosen


def measure_line(model, tokenizer, record: dict, line: dict, split: str, args) -> dict:
    if line == JUDGEMENT:
        problems = load_rows(split, record, args.num_judged)
        found = judge_actions(model, tokenizer, problems)
        return {"judgement": found, "split": split, "num": len(problems)}
    problems = load_rows(split, record, args.num)
    return {**line, "split": split, **measure_decoder(model, tokenizer, problems, line)}


def read_part(part: Path, made_by: list) -> dict[int, dict]:
    """The lines that a stopped run has left, by their places; but not a last one that is cut. The
    first says what the run was asked for, and the dtype, which differs between machines. Raises
    UserError if that was something else."""
    if not part.exists():
        return {}
    texts = part.read_text(encoding="utf-8").split("\n")[:-1]
    if texts and json.loads(texts[0]) != made_by:
        raise UserError(f"{part} is of another command or dtype: {texts[0]}")
    return dict(json.loads(text) for text in texts[1:])


def as_lines(values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def main() -> None:
    args = arguments()
    device, rank, world = device_rank_world()
    tokenizer = Tokenizer.from_pretrained(args.ckpt)
    record = load_record(args.ckpt)
    model = Llama.from_pretrained(args.ckpt, device, best_dtype(device)).eval()
    wanted = list(product(choose_lines(args.lines), SPLITS[1:]))
    made_by = [args.ckpt, args.num, args.num_judged, args.lines, str(best_dtype(device))]
    part = args.out.with_name(args.out.name + ".part") if args.out else None
    lines = read_part(part, made_by) if args.resume else {}  # by their places in `wanted`
    todo = [place for place in range(len(wanted)) if place not in lines]
    gather(None)  # nobody writes before all have read
    if part and rank == 0:
        part.write_text(as_lines([made_by, *lines.items()]), encoding="utf-8")
    gather(None)
    for place in tqdm(todo[rank::world], unit=" lines", disable=rank > 0):
        lines[place] = measure_line(model, tokenizer, record, *wanted[place], args)
        tqdm.write(json.dumps(lines[place]))
        if part:
            with open(part, "a", encoding="utf-8") as file:
                file.write(as_lines([(place, lines[place])]))
    for lines_of_rank in gather(lines):
        lines |= lines_of_rank
    if part and rank == 0:
        with replacing(args.out.parent) as staging:
            in_order = [lines[place] for place in range(len(wanted))]
            (staging / args.out.name).write_text(as_lines(in_order), encoding="utf-8")
        part.unlink()


if __name__ == "__main__":
    cli(main)
