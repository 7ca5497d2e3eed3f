"""Countdown: the task, its training rows, its tokens. Read after model.py, before search.py.

The task is to combine all the numbers, each exactly once, so that the last result is the target.
A row is a prompt and a response. Section 4.1 of arXiv 2502.04404 has rows of two kinds: in those of
D_op the response solves the problem; in those of D_back it begins to, takes a wrong action and says
`<backtrack>`.

    ###Question: numbers [2, 4, 10, 25]->target 60
    ###Response:
    4-2=2
    25*2=50
    50+10=60
    Goal Reached!

A response of each kind to this prompt, its lines side by side; lines in brackets carry no loss:

    D_op    solution         4-2=2        25*2=50      50+10=60     Goal Reached!
            detour           [25*4=100]   100/2=50     50+10=60     Goal Reached!
    D_back  exploratory      4-2=2        [25+10=35]   <backtrack>
            computational    4-2=2        [25*2=52]    <backtrack>
            rule_violation   4-2=2        [25*4=100]   <backtrack>
            false_goal       [25*10=250]  [4+2=6]      [250/6=60]   <backtrack>

So the model learns to notice mistakes and never to make them. Detours and false goals are ours. A
detour is right, but it is not the canonical way: unless the model sees some, it takes every unusual
action for a mistake. A row of D_back may begin with one.

    python data.py --num 500000 --out data/
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tqdm import tqdm

from model import Arguments, UserError, checkpoint_folder, cli, number, read_json, replacing

# ---- The task ------------------------------------------------------------------------------------

GOAL = "Goal Reached!"
BACKTRACK = "<backtrack>"
EOS = "<|end_of_text|>"
PAD = "<|pad|>"
EFFORT = {"+": 0.0, "-": 0.0, "*": 4.0, "/": 4.0}  # of a step: see `plan_efforts`
OPERATORS = list(EFFORT)


def prompt_text(nums: list[int], target: int) -> str:
    """The prompt of a problem, up to where the response begins."""
    return f"###Question: numbers {list(nums)}->target {target}\n###Response:\n"


def calculate(a, operator: str, b):
    """(a operator b, whether the rules allow it), for whole numbers or, elementwise, arrays of
    them. No negative number ever appears, and a division must be exact."""
    if operator == "+":
        return a + b, True
    if operator == "-":
        return a - b, a >= b
    if operator == "*":
        return a * b, True
    if operator == "/":
        quotient, rest = divmod(a, b + (b == 0))
        return quotient, (b != 0) & (rest == 0)
    raise ValueError(f"no such operator: {operator}")


ACTION = re.compile(
    r"([0-9]{1,20})([%s])([0-9]{1,20})=([0-9]{1,20})" % re.escape("".join(OPERATORS))
)


class Verdict(NamedTuple):
    correct: bool
    reason: str = ""  # why not
    failed_step: int | None = None  # the number of the action that is wrong, from 1; else None


def verify(nums: list[int], target: int, response: str) -> Verdict:
    """Does the response solve the problem? Exact, on integers, and never part of the search.

    Every action must be `a-b=c` (or + * /) on numbers that are there, each copy used once, with the
    right result; all numbers must be used, and `Goal Reached!` must follow when the target is left.
    """
    *actions, end = response.split("\n")
    left = Counter(nums)
    for step_number, action in enumerate(actions, 1):
        match = ACTION.fullmatch(action)
        if not match:
            return Verdict(False, f"{action!r} is no action", step_number)
        a, operator, b, claimed = match.groups()
        for operand in (int(a), int(b)):
            if left[operand] == 0:
                return Verdict(False, f"{action}: there is no {operand} (left)", step_number)
            left[operand] -= 1
        result, legal = calculate(int(a), operator, int(b))
        if not legal:
            return Verdict(False, f"{action}: the rules allow no such step", step_number)
        if result != int(claimed):
            return Verdict(False, f"{action}: false, it is {result}", step_number)
        left[result] += 1
    if end != GOAL:
        return Verdict(False, f"it ends in {end!r}, not in {GOAL!r}")
    if list(left.elements()) != [target]:
        return Verdict(False, f"{list(left.elements())} left, not {target} alone")
    return Verdict(True)


# ---- The exact solver: all programs of a batch of problems, as arrays ----------------------------
# A program is a choice at each step: of a pair of the numbers that are left, and of an operator.
# Four numbers have 6 pairs, so that step 1 has 6 * 4 = 24 choices; then three numbers have 3 pairs,
# step 2 has 12 choices; and step 3 has 4: 24 * 12 * 4 = 1,152 programs a problem, all of them
# computed.
#
#     step 1: arrays (problems, 24)           [p, 5]: what choice 5 does in problem p
#     step 2: arrays (problems, 24, 12)       [p, 5, 7]: what choice 7 does after choice 5
#     step 3: arrays (problems, 24, 12, 4)    [p, 5, 7, 2]: what choice 2 does after both
#
# The axes before the last say what came before: the problem, and the choices of the steps before.
# Shapes write them as "...": (..., choices) is (problems, 24, 12) at step 2.


@dataclass
class Step:
    """Every choice of one step, after everything that may have come before."""

    numbers: np.ndarray  # (..., m): the numbers that are left
    a: np.ndarray  # (..., pairs): the larger number of each pair
    b: np.ndarray  # (..., pairs): the smaller one
    result: np.ndarray  # (..., choices): first all pairs added, then all subtracted, ...
    legal: np.ndarray  # (..., choices) bool: this step and all before it obey the rules

    def take(self, index: tuple[np.ndarray, ...]) -> "Step":
        """Of many rows the choices that remain to each, as arrays (rows, m), (rows, pairs), ...
        index: the problem (rows,), the choice at step 1 (rows,), and so on. The first axes alone
        may be given: (problem,) takes the problems whole."""
        fields = (self.numbers, self.a, self.b, self.result, self.legal)
        taken = [field[index] for field in fields]
        return Step(*taken)


def take_step(numbers: np.ndarray, legal: np.ndarray) -> Step:
    """Every choice that numbers (..., m) leave, after steps that were legal (...) bool or not."""
    first, second = np.triu_indices(numbers.shape[-1], 1)
    a = np.maximum(numbers[..., first], numbers[..., second])  # (..., pairs)
    b = np.minimum(numbers[..., first], numbers[..., second])
    by_operator = (*legal.shape, len(OPERATORS), len(first))
    result = np.empty(by_operator, numbers.dtype)
    allowed = np.empty(by_operator, bool)
    for index, operator in enumerate(OPERATORS):
        result[..., index, :], allowed[..., index, :] = calculate(a, operator, b)
    allowed &= legal[..., None, None]
    by_choice = (*legal.shape, len(OPERATORS) * len(first))  # (..., choices)
    return Step(numbers, a, b, result.reshape(by_choice), allowed.reshape(by_choice))


def remaining(step: Step) -> np.ndarray:
    """(..., choices, m - 1): the numbers that are left after each choice; its result comes last."""
    count_left = step.numbers.shape[-1]
    first, second = np.triu_indices(count_left, 1)
    not_in_pair = []
    for pair in zip(first, second):
        not_in_pair.append([index for index in range(count_left) if index not in pair])
    not_in_pair = np.array(not_in_pair, int)  # (pairs, m - 2)
    not_chosen = np.tile(not_in_pair, (len(OPERATORS), 1))  # (choices, m - 2)
    others = step.numbers[..., not_chosen]  # (..., choices, m - 2)
    return np.concatenate([others, step.result[..., None]], -1)


def programs(nums: np.ndarray, stop_at: int = 1) -> tuple[list[Step], np.ndarray]:
    """All ways to combine nums (problems, k) until `stop_at` numbers are left: the steps, and the
    numbers that are left then. Down to one number these are k - 1 steps."""
    small = int(nums.max(initial=1)) ** nums.shape[1] < 2**31  # no product overflows
    left = nums.astype(np.int32 if small else np.int64)
    left = -np.sort(-left, axis=1)  # so that the order in which they are written decides nothing
    legal = np.ones(len(nums), bool)
    steps = []
    while left.shape[-1] > stop_at:
        step = take_step(left, legal)
        steps.append(step)
        left = remaining(step)
        legal = step.legal
    return steps, left


def beside(target: np.ndarray, array: np.ndarray) -> np.ndarray:
    """target (problems,) as (problems, 1, 1, ...), to be compared with array (problems, ...)."""
    return target.reshape(-1, *[1] * (array.ndim - 1))


def solvable(nums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(problems,) bool: can any program reach target (problems,)? Faster than `plan_efforts`: it
    stops at two numbers and compares what they give with the target, but stores none of it."""
    steps, left = programs(nums, stop_at=2)
    a = np.maximum(left[..., 0], left[..., 1])  # (problems, choices of step 1, of step 2, ...)
    b = np.minimum(left[..., 0], left[..., 1])
    wanted = beside(target.astype(a.dtype), a)
    reached = np.zeros(a.shape, bool)
    for operator in OPERATORS:
        result, legal = calculate(a, operator, b)
        reached |= (result == wanted) & legal
    if steps:
        reached &= steps[-1].legal
    return reached.reshape(len(nums), -1).any(-1)


def plan_efforts(steps: list[Step], target: np.ndarray) -> list[np.ndarray]:
    """For each step (..., choices) float32: the effort of the simplest solution that makes this
    choice, inf where no solution does. So the target can be reached where it is finite.

    By dynamic programming from the last step back. Simple is + and - before * and /, then small
    results: one canonical answer is far easier to learn than any one of many."""
    efforts = []
    for step in reversed(steps):
        pairs = step.a.shape[-1]
        own_effort = np.repeat(np.array(list(EFFORT.values()), np.float32), pairs)  # (choices,)
        if efforts:
            possible = step.legal
            onwards = efforts[0].min(-1)  # (..., choices): of the simplest way on
            total = own_effort + np.log2(step.result + 2, dtype=np.float32) + onwards
        else:
            possible = step.legal & (step.result == beside(target, step.result))
            total = own_effort  # the last result is the target, whatever the choice
        efforts.insert(0, np.where(possible, total, np.float32(np.inf)))
    return efforts


# ---- Problems ------------------------------------------------------------------------------------

MAX_NUMBER = 99
TARGETS = range(10, 101)
HELD_OUT = (18, 21, 28, 42, 56, 81, 89, 96, 98)  # a tenth of the targets, never trained on: *new*
SPLITS = ("train", "val", "val_new")  # val: validation problems of seen targets; val_new: of new


def in_validation(nums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(problems,) bool: a hash of sorted numbers and target puts one problem in 16 into validation,
    whatever the seed."""
    hash_key = target.astype(np.uint64)
    for column in np.sort(nums, axis=1).T:
        hash_key = hash_key * np.uint64(1_000_003) + column.astype(np.uint64)
    return (hash_key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(60) == 0


def draw_problems(rng, split: str, size: int, num: int, held_out: Sequence[int] = HELD_OUT):
    """`num` solvable problems of a split: nums (num, k) in 1..99 and target (num,) in 10..100."""
    if split == "val_new":
        allowed_targets = held_out
    else:
        allowed_targets = [target for target in TARGETS if target not in held_out]
    found = np.empty((0, size + 1), int)
    while len(found) < num:
        candidates = rng.integers(1, MAX_NUMBER + 1, (1024, size))
        candidates = np.column_stack([candidates, rng.choice(allowed_targets, 1024)])
        if split != "val_new":
            validation = in_validation(candidates[:, :-1], candidates[:, -1])
            candidates = candidates[validation == (split == "val")]
        found = np.concatenate([found, candidates[solvable(candidates[:, :-1], candidates[:, -1])]])
    return found[:num, :-1], found[:num, -1]


# ---- Mistakes: the wrong actions of D_back (paper, section 4.1) ----------------------------------


class Action(NamedTuple):
    """An action of each of many rows: arrays (rows,), in the order in which it is written."""

    a: np.ndarray
    operator: np.ndarray
    b: np.ndarray
    result: np.ndarray


def choose(step: Step, choice: np.ndarray) -> Action:
    """The action of each row's choice (rows,) among a step's (rows, choices)."""
    row = np.arange(len(choice))
    operator_index, pair = np.divmod(choice, step.a.shape[1])
    operator = np.array(OPERATORS)[operator_index]
    return Action(step.a[row, pair], operator, step.b[row, pair], step.result[row, choice])


def write_actions(action: Action) -> list[str]:
    """The text of each row's action: `45-39=6` and a newline."""
    columns = [column.tolist() for column in action]
    return [f"{a}{operator}{b}={result}\n" for a, operator, b, result in zip(*columns)]


def pick_random(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """(rows,): a random true place of each row of mask (rows, places); 0 in a row without one."""
    return (rng.random(mask.shape, np.float32) * mask).argmax(-1)


@dataclass
class Situation:
    """Where many rows stand, after the beginning of a solution, when they are to go wrong."""

    depth: int  # how many actions they have taken
    step: Step  # (rows, choices): what they can do next
    reachable: np.ndarray  # (rows, choices) bool: can the target still be reached then?
    used_up: np.ndarray  # (rows, u): the numbers that are used up
    target: np.ndarray  # (rows,)
    all_steps: list[Step]  # from the problem's first step on: (rows, choices of step 1, of 2, ...)


class Mistake(NamedTuple):
    actions: list[Action]  # the wrong ones, mostly one
    depth: int  # how many actions of the solution stand before them
    found: np.ndarray  # (rows,) bool: is there such a mistake? Else the row stays in D_op


def exploratory(rng: np.random.Generator, here: Situation) -> Mistake:
    """A legal step from which the target cannot be reached any more."""
    wrong = here.step.legal & ~here.reachable
    return Mistake([choose(here.step, pick_random(rng, wrong))], here.depth, wrong.any(-1))


def computational(rng: np.random.Generator, here: Situation) -> Mistake:
    """A legal step with a false result; or, half the time, a division that is not exact, the
    commonest lie of small models. A last step mostly claims the target."""
    count = len(here.target)
    pairs = here.step.a.shape[1]
    is_division = np.repeat([operator == "/" for operator in OPERATORS], pairs)  # (choices,)
    inexact = is_division & ~here.step.legal & np.tile(here.step.b > 0, len(OPERATORS))
    divide = inexact.any(-1) & (rng.random(count) < 0.5)
    choice = pick_random(rng, np.where(divide[:, None], inexact, here.step.legal))
    action = choose(here.step, choice)

    # The result is off by 1 ... 9, or by 10, 20 ... 90, upwards or downwards.
    slip = rng.integers(1, 10, count) * rng.choice([1, 1, 10], count)
    downwards = (rng.random(count) < 0.5) & (slip <= action.result)
    claimed = np.where(downwards, action.result - slip, action.result + slip)
    # Half of the inexact quotients are only rounded down.
    rounded = divide & (rng.random(count) < 0.5)
    claimed = np.where(rounded, action.result, claimed)
    # Three quarters of the last steps claim the target.
    if here.step.numbers.shape[-1] == 2:
        claims_target = (rng.random(count) < 0.75) & (action.result != here.target)
        claimed = np.where(claims_target, here.target, claimed)
    return Mistake([action._replace(result=claimed)], here.depth, np.ones(count, bool))


def rule_violation(rng: np.random.Generator, here: Situation) -> Mistake:
    """A step with a true result that takes a number that is not there, mostly a used one."""
    count = len(here.target)
    every_row = np.arange(count)
    numbers = here.step.numbers
    missing_number = rng.integers(1, MAX_NUMBER + 1, count)
    if here.used_up.shape[1]:
        used_number = here.used_up[every_row, rng.integers(0, here.used_up.shape[1], count)]
        missing_number = np.where(rng.random(count) < 0.8, used_number, missing_number)
    present_number = numbers[every_row, rng.integers(0, numbers.shape[1], count)]
    step = take_step(np.column_stack([missing_number, present_number]), np.ones(count, bool))
    found = (numbers != missing_number[:, None]).all(-1)
    return Mistake([choose(step, pick_random(rng, step.legal))], here.depth, found)


def false_goal(rng: np.random.Generator, here: Situation) -> Mistake:
    """Beyond the paper: a whole path that has lost its way, as small models answer in the end:
    `25*10=250`, `4+2=6`, `250/6=60`. It begins at the prompt, wherever the row stands. Its steps
    are legal up to the last, a division that claims the target: it is not exact, and the quotient
    is within a factor of two of the target."""
    every_row = np.arange(len(here.target))

    # Which beginnings, a choice at every step but the last, leave two numbers for such a division?
    last = here.all_steps[-1]
    a = last.a[..., 0]  # (rows, choices of step 1, of step 2, ...): the larger of the two
    b = last.b[..., 0]
    target = beside(here.target, a)
    inexact = a % np.maximum(b, 1) != 0
    near = (a < 2 * b * target) & (b * target < 2 * a)
    fitting = inexact & near
    if len(here.all_steps) > 1:
        fitting &= here.all_steps[-2].legal

    # Pick one of them, by its number, and take that number apart into the choices.
    choice_counts = fitting.shape[1:]
    fitting = fitting.reshape(len(every_row), np.prod(choice_counts, dtype=int))
    picked = pick_random(rng, fitting)
    choices = list(np.unravel_index(picked, choice_counts)) if choice_counts else []
    choices.append(np.full(len(every_row), OPERATORS.index("/")))  # of the one pair that is left

    # Write it down; the last action claims the target.
    actions = []
    for depth, choice in enumerate(choices):
        step = here.all_steps[depth].take((every_row, *choices[:depth]))
        actions.append(choose(step, choice))
    actions[-1] = actions[-1]._replace(result=here.target)
    return Mistake(actions, 0, fitting.any(-1))


MISTAKES = {exploratory: 0.45, computational: 0.25, rule_violation: 0.1, false_goal: 0.2}  # shares
KINDS = [mistake.__name__ for mistake in MISTAKES]
BACK = 0.5  # the share of D_back in all rows
DETOUR = 0.5  # the share of rows that leave the canonical way, where there is another


# ---- Rows ----------------------------------------------------------------------------------------


@dataclass
class Solutions:
    """A solution of each of many problems, step by step."""

    choices: list[np.ndarray]  # (problems,) by step
    detours: list[np.ndarray]  # (problems,) bool by step: is it not the simplest choice?
    actions: list[list[str]]  # by step, the text of each problem's action
    used_up: list[np.ndarray]  # (problems, u) by step: the numbers used up before


def make_rows(
    rng, nums: np.ndarray, target: np.ndarray, kinds: Sequence[str] = KINDS
) -> list[dict]:
    """A row of D_op or D_back for each of nums (problems, k), target (problems,), all solvable:
    {nums, target, search_path: the response, kind, no_loss: which of its actions carry no loss}.
    First every problem becomes a row of D_op; then some of these go wrong."""
    steps, _ = programs(nums)
    efforts = plan_efforts(steps, target)
    solutions = draw_solutions(rng, steps, efforts)
    rows = []
    for problem in range(len(nums)):
        row = {"nums": nums[problem].tolist(), "target": int(target[problem])}
        no_loss = [depth for depth, detour in enumerate(solutions.detours) if detour[problem]]
        row["search_path"] = "".join(texts[problem] for texts in solutions.actions) + GOAL
        row["kind"] = "detour" if no_loss else "solution"
        row["no_loss"] = no_loss
        rows.append(row)
    for make_mistake, depth, chosen in draw_mistakes(rng, len(nums), len(steps), kinds):
        before = [choices[chosen] for choices in solutions.choices[:depth]]
        here = Situation(
            depth=depth,
            step=steps[depth].take((chosen, *before)),
            reachable=np.isfinite(efforts[depth][chosen, *before]),
            used_up=solutions.used_up[depth][chosen],
            target=target[chosen],
            all_steps=[step.take((chosen,)) for step in steps],
        )
        mistake = make_mistake(rng, here)
        wrong = [write_actions(action) for action in mistake.actions]
        for place in np.flatnonzero(mistake.found):
            problem = chosen[place]
            right_actions = [texts[problem] for texts in solutions.actions[: mistake.depth]]
            wrong_actions = [texts[place] for texts in wrong]
            go_wrong(rows[problem], right_actions, wrong_actions, make_mistake.__name__)
    return rows


def go_wrong(row: dict, right_actions: list[str], wrong_actions: list[str], kind: str) -> None:
    """Make a row of D_op, which begins with right_actions, one of D_back."""
    depth = len(right_actions)
    row["search_path"] = "".join(right_actions + wrong_actions) + BACKTRACK
    row["kind"] = kind
    row["no_loss"] = [earlier for earlier in row["no_loss"] if earlier < depth]
    row["no_loss"] += range(depth, depth + len(wrong_actions))


def draw_solutions(
    rng: np.random.Generator, steps: list[Step], efforts: list[np.ndarray]
) -> Solutions:
    """The simplest solution of each problem; some leave it once, for any other right choice."""
    problems = np.arange(len(efforts[0]))
    leave_at = draw_depths(rng, len(steps), len(problems))
    leave_at[rng.random(len(problems)) >= DETOUR] = len(steps)  # never
    solutions = Solutions([], [], [], [np.empty((len(problems), 0), int)])
    for depth, step in enumerate(steps):
        so_far = (problems, *solutions.choices)
        effort = efforts[depth][so_far]  # (problems, choices)
        simplest = effort.argmin(-1)
        others = np.isfinite(effort) & (effort > effort.min(-1, keepdims=True))
        detour = (leave_at == depth) & others.any(-1)
        choice = np.where(detour, pick_random(rng, others), simplest)
        action = choose(step.take(so_far), choice)
        solutions.choices.append(choice)
        solutions.detours.append(detour)
        solutions.actions.append(write_actions(action))
        solutions.used_up.append(np.column_stack([solutions.used_up[-1], action.a, action.b]))
    return solutions


def draw_mistakes(rng: np.random.Generator, count: int, depths: int, kinds: Sequence[str]):
    """Which of `count` problems go wrong, how, and after how many actions (fewer than `depths`):
    yields (function of MISTAKES, depth, problems (rows,) int64) for every mistake and depth."""
    allowed = [mistake for mistake in MISTAKES if mistake.__name__ in kinds]
    if not allowed:
        return
    shares = np.array([MISTAKES[mistake] for mistake in allowed])
    drawn = rng.choice(len(allowed), count, p=shares / shares.sum())
    drawn[rng.random(count) >= BACK] = -1  # none: these stay in D_op
    drawn_depth = draw_depths(rng, depths, count)
    for depth in range(depths):
        for index, make_mistake in enumerate(allowed):
            yield make_mistake, depth, np.flatnonzero((drawn == index) & (drawn_depth == depth))


def draw_depths(rng: np.random.Generator, depths: int, count: int) -> np.ndarray:
    """(count,): random depths, early ones more often: the first step is the hardest to judge."""
    weights = np.arange(depths, 0, -1)
    return rng.choice(depths, count, p=weights / weights.sum())


# ---- Streams of rows -----------------------------------------------------------------------------


def new_record(seed: int, sizes: list[int], mistakes: Sequence[str] = KINDS) -> dict:
    """What a checkpoint remembers of its data, so that nobody measures "new" on seen targets."""
    return {
        "source": "generated",
        "seed": seed,
        "sizes": sizes,
        "held_out": list(HELD_OUT),
        "mistakes": list(mistakes),
    }


BLOCK = 256  # rows are drawn so many at a time


def make_block(record: dict, split: str, index: int) -> list[dict]:
    """A block of a split's endless stream, of sizes[index % len(sizes)] numbers. The seed moves
    training rows only."""
    seed = record["seed"] if split == "train" else 0
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    size = record["sizes"][index % len(record["sizes"])]
    nums, target = draw_problems(rng, split, size, BLOCK, record["held_out"])
    return make_rows(rng, nums, target, record.get("mistakes", KINDS))


def generate(record: dict, split: str, num: int, offset: int = 0, over=map) -> Iterator[dict]:
    """Rows offset .. offset + num of a split's stream; `over` maps a function over blocks (a pool's
    imap: in parallel)."""
    indices = range(offset // BLOCK, -(-(offset + num) // BLOCK))  # -(-a // b) rounds up
    blocks = over(partial(make_block, record, split), indices)
    rows = itertools.chain.from_iterable(blocks)
    return itertools.islice(rows, offset % BLOCK, offset % BLOCK + num)


# ---- Tokens and the loss mask --------------------------------------------------------------------

MASKS = ("none", "action", "choice")


def no_loss_spans(row: dict, mask: str) -> list[tuple[int, int]]:
    """Where a row's text, prompt + response, carries no loss: [begin, end) in characters. The
    prompt never does. Of the actions that the row's `no_loss` names, this much:

        mask="action"   25*4=100 and its newline: the paper's mask
        mask="choice"   25*4=, what was chosen; the result is learned. But a line that is false is
                        masked whole: nobody is to learn 25*2=52
        mask="none"     nothing

    Why "choice", which is ours: by the paper's mask every last step with a loss makes the target,
    so that small models come to write the target after any last step. A row without `no_loss` is a
    stranger's: then it is the action before `<backtrack>`, if it says that."""
    begin = len(prompt_text(row["nums"], row["target"]))
    spans = [(0, begin)]
    if mask == "none":
        return spans
    body, goes_back, _ = row["search_path"].partition(BACKTRACK)
    lines = body.splitlines(keepends=True)
    no_loss = row.get("no_loss", [len(lines) - 1] if goes_back else [])
    for depth, line in enumerate(lines):
        if depth in no_loss:
            length = len(line)
            if mask == "choice" and is_true(line):
                length = line.index("=") + 1
            spans.append((begin, begin + length))
        begin += len(line)
    return spans


def is_true(line: str) -> bool:
    """Is a line `45-39=6` and a newline an action whose result is right?"""
    match = ACTION.fullmatch(line.removesuffix("\n"))
    if not match:
        return False
    a, operator, b, claimed = match.groups()
    return calculate(int(a), operator, int(b)) == (int(claimed), True)


class Tokenizer:
    """A `tokenizers` tokenizer and what the method asks of one: prompts, rows with labels, where
    lines end."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_text: str = EOS):
        self.backend = backend
        self.eos = backend.token_to_id(eos_text)
        self.backtrack = backend.token_to_id(BACKTRACK)
        self.vocab_size = backend.get_vocab_size()
        if self.eos is None or self.backtrack is None:
            raise UserError(
                f"the tokenizer lacks {BACKTRACK if self.backtrack is None else eos_text}"
            )
        pieces = backend.decode_batch(
            [[index] for index in range(self.vocab_size)], skip_special_tokens=False
        )
        self.line_ends = {token for token, piece in enumerate(pieces) if piece.endswith("\n")}

    def prompts(self, problems: list[dict]) -> list[list[int]]:
        """The token ids of each problem's prompt."""
        texts = [prompt_text(problem["nums"], problem["target"]) for problem in problems]
        return [encoding.ids for encoding in self.backend.encode_batch(texts)]

    def rows(self, rows: list[dict], mask: str = "action") -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) of each row {nums, target, search_path}, end-of-text included, which
        always carries a label: after `<backtrack>`, too.

        A label is the token's own id, or -100: no loss, where any of the token's characters is in
        one of `no_loss_spans`, or where the token has no characters."""
        texts = [prompt_text(row["nums"], row["target"]) + row["search_path"] for row in rows]
        encoded = []
        for row, text, encoding in zip(rows, texts, self.backend.encode_batch(texts)):
            masked = [False] * len(text)  # by character
            for begin, end in no_loss_spans(row, mask):
                masked[begin:end] = [True] * (end - begin)
            labels = []
            for token, (begin, end) in zip(encoding.ids, encoding.offsets):
                learned = begin < end and not any(masked[begin:end])
                labels.append(token if learned else -100)
            encoded.append((encoding.ids + [self.eos], labels + [self.eos]))
        return encoded

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of response tokens, `<backtrack>` included, without end-of-text."""
        tokens = [token for token in tokens if token != self.eos]
        return self.backend.decode(tokens, skip_special_tokens=False)

    @classmethod
    def digits(cls) -> "Tokenizer":
        """Each digit and each sign is a token, and so is each fixed piece of text. (With whole
        numbers as tokens a small model fails on new targets.)"""
        fixed = ["###Question: numbers [", ", ", "]->target ", "\n###Response:\n", GOAL]
        special = [PAD, EOS, BACKTRACK]
        pieces = [*special, *"0123456789", *OPERATORS, "=", "\n", *fixed]
        backend = tokenizers.Tokenizer(
            models.WordLevel({piece: index for index, piece in enumerate(pieces)})
        )
        split = "|".join(map(re.escape, fixed)) + r"|[0-9]|\n|."
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(
            [AddedToken(text, special=True, normalized=False) for text in special]
        )
        return cls(backend)

    @classmethod
    def from_pretrained(cls, name: str | Path, add_backtrack: bool = False) -> "Tokenizer":
        """The tokenizer in a folder or of a Hub id; add_backtrack: where it is lacking.
        Raises UserError."""
        folder = checkpoint_folder(name)
        eos_text = read_json(folder / "tokenizer_config.json").get("eos_token", EOS)
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        if add_backtrack:  # if it is there already, it keeps its id
            backend.add_special_tokens([AddedToken(BACKTRACK, special=True, normalized=False)])
        return cls(backend, eos_text["content"] if isinstance(eos_text, dict) else eos_text)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads
        them."""
        eos_text = self.backend.id_to_token(self.eos)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": eos_text,
            "pad_token": eos_text if self.backend.token_to_id(PAD) is None else PAD,
        }
        with replacing(folder) as staging:
            self.backend.save(str(staging / "tokenizer.json"))
            (staging / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


# ==== Plumbing: a first reading may stop here =====================================================

# ---- Files of rows -------------------------------------------------------------------------------

REFERENCE = "yangxw/countdown-backtracking"  # the reference's dataset on the Hub


def is_whole(value, smallest: float = -np.inf) -> bool:
    return type(value) is int and value >= smallest  # isinstance would take True for a number


def is_list(value, smallest: int) -> bool:
    return isinstance(value, list) and all(is_whole(element, smallest) for element in value)


COLUMNS = {  # name: (what it must be, is it so?)
    "nums": ("positive whole numbers", lambda value: is_list(value, 1) and len(value) > 0),
    "target": ("a whole number", is_whole),
    "search_path": ("text", lambda value: isinstance(value, str)),
    "no_loss": ("numbers of actions, from 0", lambda value: is_list(value, 0)),
}
NEEDED_COLUMNS = ("nums", "target", "search_path")


def read_rows(path: Path, columns: Sequence[str] = NEEDED_COLUMNS) -> list[dict]:
    """Rows of a JSON Lines file, or of a JSON file that is one list of rows. Raises UserError that
    names the line."""
    rows = []
    place = str(path)
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for line_number, line in enumerate(text.split("\n"), 1):
                place = f"{path}, line {line_number}"
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{place} cannot be read: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for row_number, row in enumerate(rows or [None], 1):  # no row at all is complained of, too
        check_row(row, columns, f"{path}: row {row_number}")
    return rows


def check_row(row, columns: Sequence[str], place: str) -> None:
    """Raises UserError where a needed column is lacking, or any column is not what it must be."""
    for column, (what, holds) in COLUMNS.items():
        present = isinstance(row, dict) and column in row
        if column in columns and not present:
            raise UserError(f"{place} lacks the column {column}")
        if present and not holds(row[column]):
            raise UserError(f"{place}: {column} must be {what}, not {row[column]!r}")


def read_split(source: str, split: str) -> list[dict]:
    """A split of a folder that `data.py` wrote, or of a dataset like the reference's, in a folder
    or on the Hub: JSON files with `train` and `val` in their names. Of the latter `val` is the
    first half, `val_new` the second. Raises UserError."""
    folder = checkpoint_folder(source, "dataset")
    if (folder / f"{split}.jsonl").exists():
        return read_rows(folder / f"{split}.jsonl")
    part = split.removesuffix("_new")
    files = [file for file in sorted(folder.glob("*.json*")) if part in file.name]
    if not files:
        raise UserError(f"{source} holds no JSON with {part!r} in its name (parquet is not read)")
    files.sort(key=lambda file: "backtrack" not in file.name)  # the reference has files without it
    rows = read_rows(files[0])
    half = len(rows) // 2
    return {"train": rows, "val": rows[:half], "val_new": rows[half:]}[split]


def load_record(name: str, repo_type: str = "model") -> dict:
    """What a checkpoint or dataset was made from; where nobody wrote it down: the reference's, or
    itself."""
    path = checkpoint_folder(name, repo_type) / "record.json"
    if path.exists():
        return read_json(path)
    return {"source": REFERENCE if repo_type == "model" else str(name)}


def load_rows(data: str, record: dict, num: int, offset: int = 0) -> list[dict]:
    """Rows offset .. offset + num of a split by the checkpoint's record, of `dataset:split` or of a
    file. Raises UserError."""
    dataset, _, split = data.rpartition(":")
    if data not in SPLITS and Path(data).is_file():
        rows = read_rows(Path(data), ("nums", "target"))[offset : offset + num]
    elif split not in SPLITS:
        wanted = "val, val_new, DATASET:val or a file of JSON Lines"
        raise UserError(f"--data wants {wanted}, and {data} is none of them")
    elif dataset:
        rows = load_rows(split, load_record(dataset, "dataset"), num, offset)
    elif Path(record["source"]).is_file():
        message = f"no {data}: the checkpoint's data was a file (search.py takes one as --data)"
        raise UserError(message)
    elif record["source"] == "generated":
        rows = list(generate(record, data, num, offset))
    else:
        rows = read_split(record["source"], data)[offset : offset + num]
    if not rows:
        raise UserError(f"{data} has no row number {offset}")
    return rows


# ---- The command ---------------------------------------------------------------------------------


def main() -> None:
    options = Arguments("Generate Countdown data: training rows and two validation splits.")
    options.add_argument("--num", type=number(int, 1), default=500_000, help="training rows")
    options.add_argument("--num_val", type=number(int, 1), default=5_000, help="problems a split")
    options.add_argument(
        "--sizes", type=int, choices=range(2, 6), nargs="+", default=[4], help="how many numbers"
    )
    options.add_argument("--seed", type=number(int, 0), default=0)
    options.add_argument("--out", default="data", help="the folder to write to, as JSON Lines")
    options = options.parse_args()
    record = new_record(options.seed, options.sizes)
    counts = {"train": options.num, "val": options.num_val, "val_new": options.num_val}
    with replacing(options.out) as staging, Pool() as pool:
        for split, num in counts.items():
            rows = generate(record, split, num, over=pool.imap)
            with open(staging / f"{split}.jsonl", "w", encoding="utf-8") as out_file:
                for row in tqdm(rows, desc=split, total=num, unit=" rows"):
                    out_file.write(json.dumps(row) + "\n")
        (staging / "record.json").write_text(json.dumps(record) + "\n")
    print(
        f"wrote {options.num} training rows and twice {options.num_val} problems to {options.out}"
    )


if __name__ == "__main__":
    cli(main)
