"""Countdown: the task, its training rows, its tokens. Read after model.py, before search.py.

The task is to combine all the numbers, each exactly once, so that the last result is the target.
A row is a prompt and a response. Section 4.1 of arXiv 2502.04404 has two datasets of rows. In D_op
(optimal paths) the response solves the problem. In D_back it begins a solution, then takes a wrong
action and says `<backtrack>`.

    ###Question: numbers [2, 4, 10, 25]->target 60
    ###Response:
    4-2=2
    25*2=50
    50+10=60
    Goal Reached!

A response of each kind to this prompt, its lines side by side. Lines in brackets carry no loss
under the paper's mask, --mask action. (--mask choice masks a true line only up to its `=`, see
`no_loss_spans`.)

    D_op    solution         4-2=2        25*2=50      50+10=60     Goal Reached!
            detour           [25*4=100]   100/2=50     50+10=60     Goal Reached!
    D_back  exploratory      4-2=2        [25+10=35]   <backtrack>
            computational    4-2=2        [25*2=52]    <backtrack>
            rule_violation   4-2=2        [25*4=100]   <backtrack>
            false_goal       [25*10=250]  [4+2=6]      [250/6=60]   <backtrack>
            near_miss        [25*2=50]    [10-4=6]     [50+6=56]    <backtrack>

So the model learns to notice mistakes, but is not trained to make them. The task, the two datasets,
the first three kinds of mistakes and the mask are the paper's. Ours are detours, false goals and
near misses, the shares of all kinds, the inexact divisions among computational mistakes, which of a
problem's solutions is learned, `any_target`, `--mask choice`, and the tokens (digits).

Most problems have several solutions. The model learns the simplest one, with few * and / and small
results. It is called the canonical solution. A detour is a right action that takes more effort than
the canonical one. Without detours in its training rows, the model comes to treat every unusual
action as a mistake. A detour is masked like a mistake, so that the model still answers with the
canonical solution. A row of D_back may begin with a detour.

    python data.py --show
    python data.py --num 500000 --out data/
"""

import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tqdm import tqdm

from model import CARRIED, COUNT, MOST_TOKENS, OBJECT, TEXT, Arguments, UserError, at_least
from model import check_fields, checkpoint_folder, cli, in_worker, is_list, is_whole, note
from model import read_json, replacing

# ---- The task ------------------------------------------------------------------------------------

GOAL = "Goal Reached!"
BACKTRACK = "<backtrack>"
EOS = "<|end_of_text|>"
PAD = "<|pad|>"
MAX_NUMBER = 99  # the largest number in a problem


def prompt_text(nums: list[int], target: int) -> str:
    """The prompt of a problem. The response follows it directly."""
    return f"###Question: numbers {list(nums)}->target {target}\n###Response:\n"


# The rule of each operator: (the result of a operator b, is it allowed?), for whole numbers or,
# elementwise, for arrays of them. The solver tries only the order in which the larger number comes
# first. This loses nothing: the other order of + and * gives the same, 3-5 and 3/5 are forbidden,
# and 0/5 is 5*0. (An operator that you add must be like this, too; `false_goal` needs the /.)


def add(a, b):
    return a + b, True


def subtract(a, b):
    return a - b, a >= b  # so no result is ever negative


def multiply(a, b):
    return a * b, True


def divide(a, b):
    quotient, rest = divmod(a, b + (b == 0))  # by 1 in place of 0, which is forbidden anyway
    return quotient, (b != 0) & (rest == 0)  # the division must be exact


OPERATORS = {  # (rule, effort); the efforts were found by trial, see `plan_efforts`
    "+": (add, 0.0),
    "-": (subtract, 0.0),
    "*": (multiply, 4.0),
    "/": (divide, 4.0),
}


def calculate(a, operator: str, b):
    rule, _ = OPERATORS[operator]
    return rule(a, b)


NUMBER = "(0|[1-9][0-9]{0,2000})"  # Python converts at most 4,300 digits, also of a product
SIGN = f"([{re.escape(''.join(OPERATORS))}])"
ACTION = re.compile(f"{NUMBER}{SIGN}{NUMBER}={NUMBER}")  # 45-39=6


class Verdict(NamedTuple):
    correct: bool
    reason: str = ""  # what is wrong
    failed_action: int | None = None  # which action is wrong, from 1; None if all are right


def verify(nums: list[int], target: int, response: str) -> Verdict:
    """Does the response solve the problem? Exact, on integers, and never part of the search.

    The last line must be `Goal Reached!`, and each line before it an action: `a-b=c` (or + * /)
    with the right result, where a and b are numbers that are left. (A number that occurs twice can
    be used twice.) At the end only the target must be left. The reason says what is wrong, in these
    words: "'5+' is no action", "there is no 39 (left)", "the rules do not allow it", "false, it is
    20", "it ends in '...', not in 'Goal Reached!'", "[6, 2] left, not 62 alone". Each action is
    checked in this order, and then the end.
    """
    *actions, end = response.split("\n")
    numbers_left = Counter(nums)
    for action_number, action in enumerate(actions, 1):
        match = ACTION.fullmatch(action)
        if not match:
            return Verdict(False, f"{action!r} is no action", action_number)
        a, operator, b, claimed = match.groups()
        for operand in (int(a), int(b)):
            if numbers_left[operand] == 0:
                return Verdict(False, f"there is no {operand} (left)", action_number)
            numbers_left[operand] -= 1
        result, legal = calculate(int(a), operator, int(b))
        if not legal:
            return Verdict(False, "the rules do not allow it", action_number)
        if result != int(claimed):
            return Verdict(False, f"false, it is {result}", action_number)
        numbers_left[result] += 1
    if end != GOAL:
        return Verdict(False, f"it ends in {end!r}, not in {GOAL!r}")
    if list(numbers_left.elements()) != [target]:
        return Verdict(False, f"{list(numbers_left.elements())} left, not {target} alone")
    return Verdict(True)


# ---- Rows (paper, section 4.1) -------------------------------------------------------------------
# Everything here is about one response to one problem. The exact solver, which comes later, has
# already tried every choice at every position. A choice is an operator and two of the numbers that
# are left. Of each choice the solver knows whether it is `legal`, and the least `effort` that this
# choice and those after it need to reach the target: inf if it is out of reach. Take this on trust
# for now. For example, with the numbers 5, 3, 2 and the target 13, the first choices:
#
#     choice    0      1      2      3      4      5      6       7       8      9      10     11
#     action    5+3    5+2    3+2    5-3    5-2    3-2    5*3     5*2     3*2    5/3    5/2    3/2
#     result    8      7      5      2      3      1      15      10      6      1      2      1
#     legal     yes    yes    yes    yes    yes    yes    yes     yes     yes    no     no     no
#     effort    inf    inf    inf    inf    inf    inf    8.1     7.6     inf    inf    inf    inf
#
# Two of them can still lead to 13, by 15-2 and by 10+3. The second is the simpler solution.

BACK = 0.5  # the share of D_back in all rows
DETOUR = 0.5  # the probability of looking for a detour, at a random depth (often there is none)


class Action(NamedTuple):
    """One line of a response: `45-39=6`."""

    a: int
    operator: str
    b: int
    result: int  # as it is written; in a mistake it may be false

    def text(self) -> str:
        return f"{self.a}{self.operator}{self.b}={self.result}\n"


class SolvedProblem(NamedTuple):
    """One problem out of a block of problems that were solved together."""

    nums: list[int]
    target: int
    index: int  # its place in the block
    steps: list["Step"]  # arrays of the whole block, in which [index] is this problem
    efforts: list[np.ndarray]  # likewise


class Position:
    """Where a response stands after some legal actions, and how it can go on: choice i has
    `action(i)`, `legal[i]` and `effort[i]`, as in the table above. A choice is right if its effort
    is below inf."""

    def __init__(self, problem: SolvedProblem, path=(), used_up=()):
        self.problem = problem
        self.path = path  # the choices so far
        self.used_up = used_up  # the numbers that they have used up
        place = (problem.index, *path)  # of this position in the solver's arrays
        step = problem.steps[len(path)]
        self.numbers = step.numbers[place].tolist()  # the numbers that are left
        self.a = step.a[place].tolist()  # the larger number of each pair
        self.b = step.b[place].tolist()  # the smaller number of each pair
        self.result = step.result[place].tolist()
        self.legal = step.legal[place].tolist()
        self.effort = problem.efforts[len(path)][place].tolist()  # inf: the target is lost
        self.choices = range(len(self.legal))

    def action(self, choice: int) -> Action:
        operator_index, pair = divmod(choice, len(self.a))
        operator = list(OPERATORS)[operator_index]
        return Action(self.a[pair], operator, self.b[pair], self.result[choice])

    def simplest(self) -> int:
        """The choice of least effort: the canonical solution continues with it."""
        return self.effort.index(min(self.effort))

    def after(self, choice: int) -> "Position":
        """The position that a choice leads to."""
        action = self.action(choice)
        return Position(self.problem, (*self.path, choice), (*self.used_up, action.a, action.b))


def make_row(rng: random.Random, problem: SolvedProblem, kinds: Sequence[str]) -> dict:
    """A row of D_op or, with probability BACK, of D_back: {nums, target, search_path, kind,
    no_loss}. search_path is the response (the paper's dataset calls it so). no_loss: the
    masked actions, counted from 0; `no_loss_spans` says how much of each."""
    positions, actions, detour = draw_solution(rng, problem)
    kind = "solution" if detour is None else "detour"
    no_loss = [] if detour is None else [detour]
    end = GOAL

    # So far it is a row of D_op. Now let it go wrong.
    if rng.random() < BACK:
        position = positions[draw_depth(rng, len(actions))]
        mistake_kind, mistake = draw_mistake(rng, position, kinds)
        if mistake:
            kind = mistake_kind
            actions = [*actions[: mistake.depth], *mistake.actions]
            no_loss = [depth for depth in no_loss if depth < mistake.depth]
            # A false goal and a near miss consist of all actions. Any of them may have lost the
            # target, and the model must not learn to go on after that: so all of them are masked.
            no_loss += range(mistake.depth, len(actions))
            end = BACKTRACK
    return {
        "nums": problem.nums,
        "target": problem.target,
        "search_path": "".join(action.text() for action in actions) + end,
        "kind": kind,
        "no_loss": no_loss,
    }


def draw_solution(
    rng: random.Random, problem: SolvedProblem
) -> tuple[list[Position], list[Action], int | None]:
    """The canonical solution, of least effort. Or, with probability DETOUR, a solution with a
    detour: at a random depth it takes another action that still reaches the target, with more
    effort, if there is one. Then it continues with the least effort.

    Returns the positions before each action, the actions, and the depth of the detour or None."""
    leave_at = draw_depth(rng, len(problem.steps)) if rng.random() < DETOUR else None
    positions = [Position(problem)]
    actions = []
    detour = None
    for depth in range(len(problem.steps)):
        position = positions[-1]
        chosen = position.simplest()
        if depth == leave_at:
            least = position.effort[chosen]
            others = [
                choice for choice in position.choices if least < position.effort[choice] < math.inf
            ]
            if others:
                chosen = rng.choice(others)
                detour = depth
        actions.append(position.action(chosen))
        if len(actions) < len(problem.steps):
            positions.append(position.after(chosen))
    return positions, actions, detour


def draw_depth(rng: random.Random, depths: int) -> int:
    """A random depth. Early ones are more probable: the first action is the hardest to judge."""
    return rng.choices(range(depths), range(depths, 0, -1))[0]


# ---- Mistakes: how a row of D_back goes wrong ----------------------------------------------------


class Mistake(NamedTuple):
    depth: int  # how many actions of the solution come before it
    actions: list[Action]  # the wrong action; for a false goal or a near miss, the whole path


def exploratory(rng: random.Random, position: Position) -> Mistake | None:
    """The paper's exploratory error: a legal action after which the target can no longer be
    reached."""
    wrong = []
    for choice in position.choices:
        if position.legal[choice] and position.effort[choice] == math.inf:
            wrong.append(choice)
    if not wrong:
        return None
    return Mistake(len(position.path), [position.action(rng.choice(wrong))])


def computational(rng: random.Random, position: Position) -> Mistake:
    """An action with a false result. Half of the time, if possible, it is a division that is not
    exact, because that is the most common false line of small models. Else it is an action that the
    rules allow, but for its result.

    If it is the last action and misses the target, it claims the target with probability 3/4.
    Otherwise the quotient of an inexact division is rounded down with probability 1/2. All other
    results are off by 1 ... 9, or by 10, 20 ... 90."""
    target = position.problem.target
    legal = []
    inexact = []
    for choice in position.choices:
        action = position.action(choice)
        if position.legal[choice]:
            legal.append(action)
        elif action.operator == "/" and action.b > 0:
            inexact.append(action)
    divides = len(inexact) > 0 and rng.random() < 0.5
    action = rng.choice(inexact if divides else legal)

    if len(position.numbers) == 2 and action.result != target and rng.random() < 0.75:
        claimed = target
    elif divides and rng.random() < 0.5:
        claimed = action.result
    else:
        slip = rng.randint(1, 9) * rng.choice([1, 1, 10])
        downwards = slip <= action.result and rng.random() < 0.5
        claimed = action.result - slip if downwards else action.result + slip
    return Mistake(len(position.path), [action._replace(result=claimed)])


def rule_violation(rng: random.Random, position: Position) -> Mistake:
    """A true equation with a number that is not available, often one that is used up."""
    used_up = [other for other in position.used_up if other not in position.numbers]
    if used_up and rng.random() < 0.8:
        missing = rng.choice(used_up)
    else:
        every_number = range(1, MAX_NUMBER + 1)
        missing = rng.choice([other for other in every_number if other not in position.numbers])
    b, a = sorted([missing, rng.choice(position.numbers)])
    actions = []
    for operator in OPERATORS:
        result, legal = calculate(a, operator, b)
        if legal:
            actions.append(Action(a, operator, b, result))
    return Mistake(len(position.path), [rng.choice(actions)])


def false_goal(rng: random.Random, position: Position) -> Mistake | None:
    """Ours: a complete but wrong path, of the kind that small models still give after
    training: `25*10=250`, `4+2=6`, `250/6=60`. It begins at the prompt, not at `position`. All of
    its actions are legal but the last one, an inexact division that claims the target. The true
    quotient is between half of the target and twice the target."""
    problem = position.problem
    target = problem.target
    # At the last step one pair is left: [..., 0]. These arrays have an entry for each path to the
    # last step. With four numbers they are (24, 12): a[i, j] is the larger number after choices i
    # and j.
    last = problem.steps[-1]
    a = last.a[problem.index][..., 0]
    b = last.b[problem.index][..., 0]
    inexact = a % np.maximum(b, 1) != 0
    near = (a < 2 * target * b) & (target * b < 2 * a)
    fitting = inexact & near
    if len(problem.steps) > 1:
        fitting &= problem.steps[-2].legal[problem.index]
    paths = np.argwhere(fitting)  # (paths, steps - 1): all (i, j) that fit
    if len(paths) == 0:
        return None
    actions, here = follow(problem, rng.choice(paths).tolist())
    b, a = sorted(here.numbers)
    return Mistake(0, [*actions, Action(a, "/", b, problem.target)])


def near_miss(rng: random.Random, position: Position) -> Mistake | None:
    """Ours: a complete path, from the prompt on, of legal actions that miss the target by 1 to 9,
    or by 10, 20 ... 90: `25*2=50`, `10-4=6`, `50+6=56` for the target 60. Without them a model
    recognises familiar targets rather than comparing digits, and accepts 58 for a 56 that it does
    not know."""
    problem = position.problem
    last = problem.steps[-1]
    # These arrays have an entry for each path. With four numbers they are (24, 12, 4).
    off = np.abs(last.result[problem.index] - problem.target)
    by_ones = (off > 0) & (off < 10)
    by_tens = (off > 0) & (off < 100) & (off % 10 == 0)
    paths = np.argwhere((by_ones | by_tens) & last.legal[problem.index])  # (paths, steps)
    if len(paths) == 0:
        return None
    *before, chosen = rng.choice(paths).tolist()
    actions, here = follow(problem, before)
    return Mistake(0, [*actions, here.action(chosen)])


def follow(problem: SolvedProblem, choices: list[int]) -> tuple[list[Action], Position]:
    """Make these choices, from the prompt on: the actions, and the position after them."""
    position = Position(problem)
    actions = []
    for choice in choices:
        actions.append(position.action(choice))
        position = position.after(choice)
    return actions, position


MISTAKES = {  # with their relative shares: how often each is drawn
    exploratory: 0.45,
    computational: 0.25,
    rule_violation: 0.1,
    false_goal: 0.2,
    near_miss: 0.2,
}
KINDS = [mistake.__name__ for mistake in MISTAKES]


def draw_mistake(
    rng: random.Random, position: Position, kinds: Sequence[str]
) -> tuple[str, Mistake | None]:
    """Draw one of `kinds`, by their shares, and a mistake of this kind. If it is impossible at this
    position, another kind is drawn. Returns (kind, mistake): ("", None) if none is possible."""
    allowed = [make_mistake for make_mistake in MISTAKES if make_mistake.__name__ in kinds]
    while allowed:
        shares = [MISTAKES[make_mistake] for make_mistake in allowed]
        [make_mistake] = rng.choices(allowed, shares)
        mistake = make_mistake(rng, position)
        if mistake:
            return make_mistake.__name__, mistake
        allowed.remove(make_mistake)
    return "", None


# ---- Tokens and the loss mask --------------------------------------------------------------------

MASKS = ("none", "action", "choice")


def no_loss_spans(row: dict, mask: str) -> list[tuple[int, int]]:
    """Which parts of a row's text, prompt + response, carry no loss: [begin, end) in characters.
    The prompt is always one of them. The others are of the actions in the row's `no_loss`. For
    instance, of 25*4=100:

        mask="action"   the whole line 25*4=100 with its newline: the paper's mask
        mask="choice"   25*4= alone, which was chosen. The result is learned, even where 25 or 4
                        is not available. (But a line whose arithmetic is false, like 25*2=52, is
                        masked as a whole.)
        mask="none"     nothing

    Why "choice", which is ours? With "action" the only last lines that are trained on are those of
    solutions, and their results are always the target. So a small model learns to write the target
    as the result of any last line: `50-10=60`. With "choice" it is also trained on last lines that
    are true and miss the target.

    If a row has no `no_loss`, the last action before `<backtrack>` is masked, if there is one. (It
    may lack its newline: `39+6=45<backtrack>`.)"""
    place = len(prompt_text(row["nums"], row["target"]))  # where the next line begins
    spans = [(0, place)]
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
            spans.append((place, place + length))
        place += len(line)
    return spans


def is_true(line: str) -> bool:
    """Is a line, like `45-39=6` with its newline, an action with the right result?"""
    match = ACTION.fullmatch(line.removesuffix("\n"))
    if not match:
        return False
    a, operator, b, claimed = match.groups()
    return calculate(int(a), operator, int(b)) == (int(claimed), True)


class Tokenizer:
    """A `tokenizers` tokenizer, and what the method needs: prompts, rows with labels, and which
    tokens end a line."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_text=EOS, carried: dict | None = None):
        """carried: the content of other files that are saved with it, see CARRIED."""
        self.backend = backend
        self.carried = carried or {}
        self.eos = backend.token_to_id(eos_text)
        self.backtrack = backend.token_to_id(BACKTRACK)
        self.vocab_size = 1 + max(backend.get_vocab().values())  # ids may have gaps
        if self.eos is None or self.backtrack is None:
            raise UserError(
                f"the tokenizer lacks {BACKTRACK if self.backtrack is None else eos_text}"
            )
        pieces = backend.decode_batch(
            [[index] for index in range(self.vocab_size)], skip_special_tokens=False
        )
        self.line_ends = {token for token, piece in enumerate(pieces) if piece.endswith("\n")}

    def prompts(self, problems: list[dict]) -> list[list[int]]:
        """The token ids of each problem's prompt. problems: {nums, target}."""
        texts = [prompt_text(problem["nums"], problem["target"]) for problem in problems]
        return [encoding.ids for encoding in self.encode(texts)]

    def encode_rows(
        self, rows: list[dict], mask: str = "action"
    ) -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) of each row {nums, target, search_path}.

        A token's label is its id if all of its characters carry loss, and else -100; -100, too, if
        it has no characters, like begin-of-text. End-of-text is added, and always has a label:
        after `Goal Reached!`, and after `<backtrack>`. (There it has no use, because a search stops
        at `<backtrack>`; but the reference, the authors' code, does the same.)"""
        texts = [prompt_text(row["nums"], row["target"]) + row["search_path"] for row in rows]
        encoded = []
        for row, text, encoding in zip(rows, texts, self.encode(texts)):
            masked = [False] * len(text)  # by character
            for begin, end in no_loss_spans(row, mask):
                masked[begin:end] = [True] * (end - begin)
            labels = []
            for token, (begin, end) in zip(encoding.ids, encoding.offsets):
                learned = begin < end and not any(masked[begin:end])
                labels.append(token if learned else -100)
            encoded.append((encoding.ids + [self.eos], labels + [self.eos]))
        return encoded

    def encode(self, texts: list[str]) -> Iterator[tokenizers.Encoding]:
        """Raises UserError for text that the tokenizer does not know."""
        for begin in range(0, len(texts), 1024):  # an Encoding is large: not all at once
            some = texts[begin : begin + 1024]
            try:
                encodings = self.backend.encode_batch(some)
            except Exception:  # the library raises bare Exceptions
                raise UserError(unknown_text(self.backend, some)) from None
            yield from encodings

    def ids_without_token(self, size: int) -> list[int]:
        """Which of the ids 0 ... size - 1 stand for no token: models often pad their vocabulary."""
        return [index for index in range(size) if self.backend.id_to_token(index) is None]

    def check_fits(self, size: int) -> None:
        """Raises UserError if a model with `size` embeddings is too small for this tokenizer."""
        if size < self.vocab_size:
            raise UserError(
                f"the model has {size} embeddings, its tokenizer {self.vocab_size} tokens"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of response tokens, `<backtrack>` included, without end-of-text."""
        tokens = [token for token in tokens if token != self.eos]
        return self.backend.decode(tokens, skip_special_tokens=False)

    @classmethod
    def digits(cls) -> "Tokenizer":
        """Our own: every digit, every sign and every fixed piece of text is a token. (With whole
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
        """The tokenizer in a folder or of a Hub id. add_backtrack: add `<backtrack>` if it lacks
        it. Raises UserError."""
        folder = checkpoint_folder(name)
        backend = read_tokenizer(folder / "tokenizer.json")
        if add_backtrack:  # if it is there already, it keeps its id
            backend.add_special_tokens([AddedToken(BACKTRACK, special=True, normalized=False)])
        return cls(backend, read_eos(folder, backend), read_carried(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer
        reads."""
        eos_text = self.backend.id_to_token(self.eos)
        config = json.loads(self.carried.get("tokenizer_config.json", "{}"))
        config.setdefault("clean_up_tokenization_spaces", False)
        config.setdefault("pad_token", eos_text if self.backend.token_to_id(PAD) is None else PAD)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # it takes the file as it is
        config["eos_token"] = eos_text
        files = {**self.carried, "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        with replacing(folder) as staging:
            self.backend.save(str(staging / "tokenizer.json"))
            for name, text in files.items():
                (staging / name).write_text(text, encoding="utf-8")


# ---- The exact solver: all programs of a block of problems, as arrays ----------------------------
# A program makes one choice at each step: an operator, and a pair of the numbers that are left.
# Four numbers have 6 pairs, so step 1 has 4 * 6 = 24 choices. Then three numbers have 3 pairs, and
# step 2 has 12 choices. Step 3 has 4. So a problem has 24 * 12 * 4 = 1,152 programs. All of them
# are computed: with arrays that is much faster than a recursion that stops early.
#
#     step 1: arrays (problems, 24)           [p, 5]: what choice 5 does in problem p
#     step 2: arrays (problems, 24, 12)       [p, 5, 7]: what choice 7 does after choice 5
#     step 3: arrays (problems, 24, 12, 4)    [p, 5, 7, 2]: what choice 2 does after both
#
# The axes before the last one are the problem and the choices of all earlier steps. In shapes they
# are written "...": at step 2, (..., choices) is (problems, 24, 12).
#
# The index of a choice is operator_index * pairs + pair_index, as in the table above `Action`.


class Step(NamedTuple):
    """Every choice of one step, after all possible choices of the steps before."""

    numbers: np.ndarray  # (..., m): the m numbers that are left
    a: np.ndarray  # (..., pairs): the larger number of each pair
    b: np.ndarray  # (..., pairs): the smaller number
    result: np.ndarray  # (..., choices): of all pairs added, then of all subtracted, and so on
    legal: np.ndarray  # (..., choices) bool: do this step and all steps before it obey the rules?


def all_choices(numbers: np.ndarray, legal_before: np.ndarray) -> Step:
    """Every choice if numbers (..., m) are left. legal_before (...) bool: did all steps up to here
    obey the rules?"""
    first, second = np.triu_indices(numbers.shape[-1], 1)  # the pairs, as indices into `numbers`
    a = np.maximum(numbers[..., first], numbers[..., second])  # (..., pairs)
    b = np.minimum(numbers[..., first], numbers[..., second])
    results = []
    allowed = []
    for operator in OPERATORS:
        result, obeys_rules = calculate(a, operator, b)
        results.append(result)
        allowed.append(np.broadcast_to(obeys_rules, a.shape))  # for + and * it is just True
    legal = np.concatenate(allowed, -1) & legal_before[..., None]  # (..., choices)
    return Step(numbers, a, b, np.concatenate(results, -1), legal)


def remaining(step: Step) -> np.ndarray:
    """(..., choices, m - 1): the numbers that are left after each choice, its result the last."""
    count = step.numbers.shape[-1]
    unused = []  # for each pair the indices of the other numbers
    for pair in itertools.combinations(range(count), 2):
        unused.append([index for index in range(count) if index not in pair])
    # (choices, m - 2): the same for every operator
    unused = np.tile(np.array(unused, int), (len(OPERATORS), 1))
    others = step.numbers[..., unused]  # (..., choices, m - 2)
    return np.concatenate([others, step.result[..., None]], -1)


def programs(nums: np.ndarray, stop_at: int = 1) -> tuple[list[Step], np.ndarray]:
    """All ways to combine nums (problems, k) until `stop_at` numbers are left: the steps, and the
    numbers that are left after them."""
    largest = max(int(nums.max(initial=1)), 2) ** nums.shape[1]  # no result is larger
    numbers_left = nums.astype(np.int32 if largest < 2**31 else np.int64)
    # sorted, so that their order in the problem does not matter
    numbers_left = -np.sort(-numbers_left, axis=1)
    legal = np.ones(len(nums), bool)
    steps = []
    while numbers_left.shape[-1] > stop_at:
        step = all_choices(numbers_left, legal)
        steps.append(step)
        numbers_left = remaining(step)
        legal = step.legal
    return steps, numbers_left


def expand_like(target: np.ndarray, array: np.ndarray) -> np.ndarray:
    """target (problems,) as (problems, 1, 1, ...), to be compared with array (problems, ...)."""
    return target.reshape(-1, *[1] * (array.ndim - 1))


def solvable(nums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(problems,) bool: does any program reach target (problems,)? Faster than `plan_efforts`: the
    results of the last step are not stored, but compared with the target at once."""
    steps, numbers_left = programs(nums, stop_at=2)
    # (problems, choices of step 1, of step 2, ...): the larger number of the two, and the smaller
    a = np.maximum(numbers_left[..., 0], numbers_left[..., 1])
    b = np.minimum(numbers_left[..., 0], numbers_left[..., 1])
    wanted = expand_like(target.astype(a.dtype), a)
    reached = np.zeros(a.shape, bool)
    for operator in OPERATORS:
        result, legal = calculate(a, operator, b)
        reached |= (result == wanted) & legal
    if steps:
        reached &= steps[-1].legal
    return reached.reshape(len(nums), -1).any(-1)


def plan_efforts(steps: list[Step], target: np.ndarray) -> list[np.ndarray]:
    """For each step (..., choices) float32: the least effort that this choice and those after it
    need to reach target (problems,); inf if it is out of reach.

    The effort of a solution is 4 for each * and /, and log2(result + 2) for each intermediate
    result. One canonical solution, the simplest, is far easier to learn than a random one of many.

    By dynamic programming, from the last step to the first."""
    operator_efforts = np.float32([effort for _, effort in OPERATORS.values()])
    efforts = []  # from the last step to the first
    for step in reversed(steps):
        own_effort = np.repeat(operator_efforts, step.a.shape[-1])  # (choices,)
        if not efforts:
            possible = step.legal & (step.result == expand_like(target, step.result))
            total = own_effort
        else:
            possible = step.legal
            # the best choice at the next step, for example (problems, 24, 12) -> (problems, 24)
            onwards = efforts[-1].min(-1)
            total = own_effort + np.log2(step.result + 2, dtype=np.float32) + onwards
        efforts.append(np.where(possible, total, np.float32(np.inf)))
    return efforts[::-1]


def solve(nums: list[int], target: int) -> tuple[int, int, list[Action]]:
    """How many of a problem's programs reach the target, how many programs there are, and the
    actions of the canonical solution (none if the target cannot be reached)."""
    steps, numbers_left = programs(np.array([nums]))
    if not steps:  # a single number
        return int(nums == [target]), 1, []
    efforts = plan_efforts(steps, np.array([target]))
    reaching = int(np.isfinite(efforts[-1]).sum())
    actions = []
    if reaching:
        position = Position(SolvedProblem(nums, target, 0, steps, efforts))
        actions.append(position.action(position.simplest()))
        for _ in steps[1:]:
            position = position.after(position.simplest())
            actions.append(position.action(position.simplest()))
    return reaching, efforts[-1].size, actions


# ---- Problems ------------------------------------------------------------------------------------

TARGETS = range(10, 101)
# Ours: the targets of a share of the training problems (any_target) are drawn from these. Only 82
# TARGETS are not held out: in a long training a model learns them by heart, and fails on new ones.
ANY_TARGETS = range(1, 300)
HELD_OUT = (18, 21, 28, 42, 56, 81, 89, 96, 98)  # a tenth of the targets, never trained on: "new"
SPLITS = ("train", "val", "val_new")  # val: validation problems of seen targets; val_new: of new


def in_validation(nums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(problems,) bool: a hash of the sorted numbers and the target puts one problem in 16 into
    validation, independent of any seed."""
    hash_key = target.astype(np.uint64)
    for column in np.sort(nums, axis=1).T:
        hash_key = hash_key * np.uint64(1_000_003) + column.astype(np.uint64)
    hashed = hash_key * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: the high bits are mixed
    return (hashed >> np.uint64(60)) == 0


def draw_problems(
    rng, split: str, size: int, num: int, held_out: Sequence[int] = HELD_OUT, targets=TARGETS
):
    """`num` solvable problems of a split: nums (num, size) from 1 to MAX_NUMBER, and target (num,).
    val_new has the targets held_out, which no other split has. Of the rest of `targets` a hash
    decides which problems are val's and which are train's."""
    if split == "val_new":
        allowed_targets = held_out
    else:
        allowed_targets = [target for target in targets if target not in held_out]
    found = np.empty((0, size + 1), int)
    while len(found) < num:
        candidates = rng.integers(1, MAX_NUMBER + 1, (1024, size))
        candidates = np.column_stack([candidates, rng.choice(allowed_targets, 1024)])
        if split != "val_new":
            validation = in_validation(candidates[:, :-1], candidates[:, -1])
            candidates = candidates[validation if split == "val" else ~validation]
        found = np.concatenate([found, candidates[solvable(candidates[:, :-1], candidates[:, -1])]])
    return found[:num, :-1], found[:num, -1]


# ---- Streams of rows -----------------------------------------------------------------------------


THIS_TASK = {"operators": "".join(OPERATORS), "max_number": MAX_NUMBER}


def new_record(
    seed: int, sizes: list[int], mistakes: Sequence[str] = KINDS, any_target: float = 0.0
) -> dict:
    """What is stored with a checkpoint about its data, so that held-out targets stay held out."""
    return {
        "source": "generated",
        "seed": seed,
        "sizes": sizes,
        "held_out": list(HELD_OUT),
        "mistakes": list(mistakes),
        "any_target": any_target,  # the share of training problems with ANY_TARGETS
        **THIS_TASK,
    }


BLOCK = 256  # problems that are solved together


def make_block(record: dict, split: str, index: int) -> list[dict]:
    """Block `index` of a split's endless stream of rows. Its problems have sizes[index %
    len(sizes)] numbers. Only training rows depend on the record's seed."""
    seed = record["seed"] if split == "train" else 0
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    size = record["sizes"][index % len(record["sizes"])]
    others = round(BLOCK * record.get("any_target", 0.0)) if split == "train" else 0
    held_out = record["held_out"]
    nums, target = draw_problems(rng, split, size, BLOCK - others, held_out)
    if others:
        other_nums, other_target = draw_problems(rng, split, size, others, held_out, ANY_TARGETS)
        nums = np.concatenate([nums, other_nums])
        target = np.concatenate([target, other_target])
    return make_rows(rng, nums, target, record.get("mistakes", KINDS))


def make_rows(rng, nums: np.ndarray, target: np.ndarray, kinds=KINDS) -> list[dict]:
    """`make_row` for each of nums (problems, k) and target (problems,), all solvable."""
    steps, _ = programs(nums)
    efforts = plan_efforts(steps, target)
    # Python's generator, which is faster than numpy's if numbers are drawn one by one
    row_rng = random.Random(int(rng.integers(2**62)))
    rows = []
    for index, (own_nums, own_target) in enumerate(zip(nums.tolist(), target.tolist())):
        problem = SolvedProblem(own_nums, own_target, index, steps, efforts)
        rows.append(make_row(row_rng, problem, kinds))
    return rows


def generate(
    record: dict, split: str, num: int, offset: int = 0, map_function=map
) -> Iterator[dict]:
    """Rows offset .. offset + num of a split's stream. map_function maps a function over blocks:
    the imap of a multiprocessing pool does it in parallel."""
    indices = range(offset // BLOCK, -(-(offset + num) // BLOCK))  # -(-a // b) rounds up
    blocks = map_function(partial(make_block, record, split), indices)
    rows = itertools.chain.from_iterable(blocks)
    return itertools.islice(rows, offset % BLOCK, offset % BLOCK + num)


# ==== Plumbing: a first reading may stop here =====================================================

# ---- Files of rows -------------------------------------------------------------------------------

REFERENCE = "yangxw/countdown-backtracking"  # the reference's dataset on the Hub


def to_whole(value, smallest: int) -> int:
    """A whole number; 51.0 and "51" are accepted. Raises ValueError or TypeError."""
    real = float(value)
    if isinstance(value, bool) or real != int(real) or real < smallest:
        raise ValueError
    return int(value) if isinstance(value, int | str) else int(real)


def to_list(value, smallest: int, fewest: int = 0) -> list[int]:
    """A list of whole numbers; its JSON text is accepted. Raises ValueError or TypeError."""
    values = json.loads(value) if isinstance(value, str) else value
    if not isinstance(values, list):
        raise TypeError
    if len(values) < fewest:
        raise ValueError
    return [to_whole(one, smallest) for one in values]


def to_text(value) -> str:
    """Text, stripped of blanks and newlines at both ends. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError
    return value.strip()


COLUMNS = {  # of a row: (what it must be, a function that converts to it)
    "nums": ("positive whole numbers", partial(to_list, smallest=1, fewest=1)),
    "target": ("a whole number", partial(to_whole, smallest=-(2**62))),
    "search_path": ("text", to_text),
    "no_loss": ("numbers of actions, from 0", partial(to_list, smallest=0)),
}
PROBLEM_COLUMNS = ("nums", "target")
ROW_COLUMNS = (*PROBLEM_COLUMNS, "search_path")


NAMES = {"train": ["train"], "val": ["val", "dev"]}  # how the files of each part are named
TO_JSON = (
    "python -c \"import pandas; pandas.read_parquet('FILE.parquet')"
    ".to_json('FILE.jsonl', orient='records', lines=True)\""
)


def read_rows(path: Path, columns: Sequence[str] = ROW_COLUMNS) -> list[dict]:
    """The rows of a JSON Lines file, or of a JSON file that is a list of rows or has one as "data".
    Raises UserError that names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte-order mark or without
        rows = read_json_or_lines(text, path)
    except (OSError, ValueError, RecursionError) as error:
        hint = f"; parquet becomes JSON by {TO_JSON}" if path.suffix == ".parquet" else ""
        raise UserError(f"{path} cannot be read: {error}{hint}") from None
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} holds no rows")
    for row_number, row in enumerate(rows, 1):
        check_row(row, columns, f"{path}: row {row_number}")
    return rows


def read_json_or_lines(text: str, path: Path):
    """The content of JSON, or the list of JSON Lines' contents. Raises UserError that names the
    line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass  # it may be JSON Lines
    rows = []
    for line_number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {line_number} cannot be read: {error}") from None
    return rows


def check_row(row, columns: Sequence[str], place: str) -> None:
    """Convert every column to what it must be. Raises UserError if that fails or one is missing."""
    for column, (what, convert) in COLUMNS.items():
        present = isinstance(row, dict) and column in row
        if column in columns and not present:
            raise UserError(f"{place} lacks the column {column}")
        if not present:
            continue
        try:
            row[column] = convert(row[column])
        except (ValueError, TypeError, OverflowError, RecursionError):
            found = str(row[column])[:80]
            raise UserError(f"{place}: {column} must be {what}, not {found!r}") from None


def doubtful_rows(rows: list[dict]) -> list[str]:
    """Warnings, one for each kind of training row that is probably wrong."""
    signs = re.escape("".join(OPERATORS) + "=")
    found = {}
    for row_number, row in enumerate(rows, 1):
        doubt = None
        if re.search(rf"\s[{signs}]|[{signs}]\s", row["search_path"]):
            doubt = "have blanks around a sign"
        elif not row["search_path"].endswith((GOAL, BACKTRACK)):
            doubt = f"end neither in {GOAL!r} nor in {BACKTRACK!r}"
        elif row["search_path"].endswith(GOAL):
            if not verify(row["nums"], row["target"], row["search_path"]).correct:
                doubt = f"end in {GOAL!r}, but do not solve their problem"
        if doubt:
            found.setdefault(doubt, []).append(row_number)
    return [
        f"{len(numbers)} of {len(rows)} rows {doubt}: the first is row {numbers[0]}"
        for doubt, numbers in found.items()
    ]


def read_split(source: str, split: str) -> list[dict]:
    """A split of a folder that `data.py` wrote, or of a dataset like the reference's, in a folder
    or on the Hub: JSON files with `train`, or with `val` or `dev`, in their names. The first half
    of the validation file is `val`, the second half `val_new`. Raises UserError."""
    part = split.removesuffix("_new")
    patterns = [f"*{name}*.json*" for name in NAMES[part]]
    folder = checkpoint_folder(source, "dataset", patterns)
    columns = ROW_COLUMNS if split == "train" else PROBLEM_COLUMNS
    if (folder / f"{split}.jsonl").exists():
        return read_rows(folder / f"{split}.jsonl", columns)
    files = []
    for file in sorted(folder.rglob("*.json*")):
        if any(name in file.name for name in NAMES[part]):
            files.append(file)
    if not files:
        wanted = " or ".join(repr(name) for name in NAMES[part])
        raise UserError(
            f"{source} holds no JSON with {wanted} in its name; parquet becomes JSON by {TO_JSON}"
        )
    files.sort(key=lambda file: "backtrack" not in file.name)  # the reference has files without it
    if len(files) > 1:
        note(f"{source} has {len(files)} files of {split} rows: reading {files[0].name} alone")
    rows = read_rows(files[0], columns)
    half = len(rows) // 2
    return {"train": rows, "val": rows[:half], "val_new": rows[half:]}[split]


def are_sizes(value) -> bool:
    return is_list(value, lambda one: is_whole(one, 2, 6)) and len(value) > 0


def are_held_out(value) -> bool:
    """Some of the targets, but not all of them: training needs some, too."""
    is_target = partial(is_whole, low=TARGETS.start, high=TARGETS.stop)
    return is_list(value, is_target) and 0 < len(set(value)) < len(TARGETS)


def is_share(value) -> bool:
    return isinstance(value, float | int) and 0 <= value <= 1


FIRST_TASK = {"operators": "+-*/", "max_number": 99}  # of records that do not say
RECORD_FIELDS = {  # of record.json
    "source": TEXT,
    "seed": COUNT,
    "sizes": ("numbers from 2 to 5", are_sizes),
    "held_out": ("targets", are_held_out),
    "mistakes": (f"among {KINDS}", lambda value: is_list(value, KINDS.__contains__)),
    "any_target": ("a share, from 0 to 1", is_share),
    "operators": TEXT,
    "max_number": COUNT,
    "settings": OBJECT,
}


def load_record(name: str, repo_type: str = "model") -> dict:
    """record.json of a checkpoint or dataset: what it was made from. Without one a checkpoint is
    assumed to be made from the reference's data, a dataset from itself. Raises UserError."""
    if repo_type == "dataset" and Path(name).is_file():
        return {"source": name}
    patterns = ["record.json"] if repo_type == "dataset" else None
    path = checkpoint_folder(name, repo_type, patterns) / "record.json"
    if path.exists():
        record = read_json(path)
        needed = ["source"]
        if record.get("source") == "generated":
            needed += ["seed", "sizes", "held_out"]
        check_fields(record, RECORD_FIELDS, str(path), needed)
        warn_of_changed_task(record, str(path))
        return record
    return {"source": REFERENCE if repo_type == "model" else str(name)}


def warn_of_changed_task(record: dict, place: str) -> None:
    """Warn if operators or numbers have changed since: then validation problems have, too."""
    for field, now in THIS_TASK.items():
        before = record.get(field, FIRST_TASK[field])
        if record.get("source") == "generated" and before != now:
            changed = f"{field} {before}, but data.py now has {now}"
            note(f"{place} says {changed}: that is another task, with other validation problems")


def whole_path(name: str) -> str:
    """A path, made absolute; a name on the Hub is left as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def load_rows(data: str, record: dict, num: int, offset: int = 0) -> list[dict]:
    """Rows offset .. offset + num of a split of the checkpoint's data (its record), of
    `dataset:split` or of a file. Raises UserError."""
    dataset, _, split = data.rpartition(":")
    if data not in SPLITS and Path(data).is_file():
        rows = read_rows(Path(data), PROBLEM_COLUMNS)[offset : offset + num]
    elif split not in SPLITS or data.startswith(":"):
        wanted = "val, val_new, DATASET:val or a file of JSON Lines"
        raise UserError(f"--data wants {wanted}, and {data} is none of them")
    elif dataset:
        return load_rows(split, {"source": dataset}, num, offset)
    elif record["source"] == "generated":
        rows = list(generate(record, data, num, offset))
    elif is_one_file(record) and data != "train":
        raise UserError(f"no {data}: the checkpoint's data was the file {record['source']}")
    else:
        source = record["source"]
        whole_file = is_one_file(record)
        rows = read_rows(Path(source), PROBLEM_COLUMNS) if whole_file else read_split(source, data)
        # Training problems begin again after the last one. (But one call does not go past it.)
        begin = offset % len(rows) if data == "train" else offset
        rows = rows[begin : begin + num]
    if not rows:
        raise UserError(f"{data} has no row number {offset}")
    if len(rows) < num:
        note(f"{data} has only {len(rows)} rows from {offset} on")
    return rows


def is_one_file(record: dict) -> bool:
    return record["source"] != "generated" and Path(record["source"]).is_file()


def warn_of_unlike(record: dict, rows: list[dict]) -> None:
    """Warn if problems are not of the kind that a checkpoint was trained on."""
    if record["source"] != "generated":
        return
    targets = ANY_TARGETS if record.get("any_target") else TARGETS
    largest = record.get("max_number", FIRST_TASK["max_number"])
    unlike = 0
    for row in rows:
        fits = len(row["nums"]) in record["sizes"] and max(row["nums"]) <= largest
        unlike += not (fits and row["target"] in targets)
    if unlike:
        sizes = " or ".join(map(str, record["sizes"]))
        known = f"{sizes} numbers up to {largest}, targets {targets[0]} to {targets[-1]}"
        note(f"{unlike} of {len(rows)} problems are unlike what the model was trained on: {known}")


def load_validation(record: dict, num: int, offset: int = 0) -> dict[str, list[dict]]:
    """The rows of both validation splits; if the data was a file, none, and a warning. Raises
    UserError."""
    if is_one_file(record):
        note(f"no table, because {record['source']} has no validation splits")
        return {}
    return {split: load_rows(split, record, num, offset) for split in ("val", "val_new")}


def unknown_text(backend: tokenizers.Tokenizer, texts: list[str]) -> str:
    """An error message: which text the tokenizer refuses, and from which character on."""

    def knows(text: str) -> bool:
        try:
            backend.encode(text)
        except Exception:  # the library raises bare Exceptions
            return False
        return True

    for text in texts:
        if not knows(text):
            text = text[:500]  # enough of it to look through
            known = next(end for end in range(len(text), -1, -1) if knows(text[:end]))
            return f"the tokenizer does not know {text[known:][:1]!r} in {text!r}"
    return "the tokenizer refuses the text"


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Raises UserError."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        largest = max(backend.get_vocab().values())
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path} cannot be read: {error}") from None
    if largest >= MOST_TOKENS:
        raise UserError(f"{path} has a token {largest}: an embedding of this size is not supported")
    backend.no_padding()  # the file may ask for either
    backend.no_truncation()
    return backend


def read_carried(folder: Path) -> dict[str, str]:
    """The content of the files that are saved again as they were read."""
    found = {}
    for name in CARRIED:
        if (folder / name).is_file():
            found[name] = (folder / name).read_text(encoding="utf-8-sig", errors="replace")
    return found


def read_eos(folder: Path, backend: tokenizers.Tokenizer) -> str:
    """The end-of-text token: named in tokenizer_config.json, or else by its id in config.json.
    Raises UserError."""
    eos_text = None
    if (folder / "tokenizer_config.json").exists():
        eos_text = read_json(folder / "tokenizer_config.json").get("eos_token")
    if isinstance(eos_text, dict):
        eos_text = eos_text.get("content")
    if eos_text is None and (folder / "config.json").exists():
        token = read_json(folder / "config.json").get("eos_token_id")
        token = token[0] if isinstance(token, list) and token else token
        if type(token) is int and token >= 0:
            eos_text = backend.id_to_token(token)
    if eos_text is None and backend.token_to_id(EOS) is not None:
        eos_text = EOS
    if not isinstance(eos_text, str):
        raise UserError(f"{folder} does not say what its end-of-text token is")
    return eos_text


# ---- Rows to look at -----------------------------------------------------------------------------

# terminals' codes; search.py and its page use the same colours
COLOURS = {"dim": 2, "wrong": 31, "right": 32, "stopped": 33, "branched": 36}


def paint(text: str, colour: str) -> str:
    """The text, in colour if stdout is a terminal."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    return f"\033[{COLOURS[colour]}m{text}\033[0m"


def show_row(tokenizer: Tokenizer, row: dict, mask: str) -> str:
    """A row as text: the prompt dim, tokens with loss green (`<backtrack>` yellow), others cyan."""
    [(input_ids, labels)] = tokenizer.encode_rows([row], mask)
    [prompt] = tokenizer.prompts([row])
    shown = paint(prompt_text(row["nums"], row["target"]), "dim")
    response = zip(input_ids[len(prompt) :], labels[len(prompt) :])
    for learned, group in itertools.groupby(response, key=lambda pair: pair[1] != -100):
        tokens = [token for token, _ in group]
        text = tokenizer.backend.decode(tokens, skip_special_tokens=False)
        if learned:
            text = text.replace(BACKTRACK, paint(BACKTRACK, "stopped"))
            shown += paint(text, "right")
        else:
            lines = [paint(f"[{line}]", "branched") if line else "" for line in text.split("\n")]
            shown += "\n".join(lines)
    dataset = "D_back" if row["kind"] in KINDS else "D_op"
    return f"{dataset}, {row['kind']}\n\n{shown}\n"


def show_rows(record: dict, num: int, mask: str) -> None:
    """Print training rows: one of every kind, then another of every kind, and so on."""
    tokenizer = Tokenizer.digits()
    by_kind = {}
    for row in generate(record, "train", 256 + 16 * num):
        by_kind.setdefault(row["kind"], []).append(row)
    kinds = sorted(by_kind.values(), key=len, reverse=True)
    in_turns = filter(None, itertools.chain.from_iterable(itertools.zip_longest(*kinds)))
    no_loss = f"{paint('the prompt', 'dim')} and {paint('[what is in brackets]', 'branched')}"
    print(f"--mask {mask}: no loss on {no_loss}\n")
    for row in itertools.islice(in_turns, num):
        print(show_row(tokenizer, row, mask))


# ---- The command ---------------------------------------------------------------------------------


def main() -> None:
    options = Arguments("Generate Countdown data: training rows and two validation splits.")
    add = options.add_argument_group("what to generate").add_argument
    add("--num", metavar="N", type=at_least(1), default=500_000, help="training rows")
    add("--num_val", metavar="N", type=at_least(1), default=5_000, help="problems in each split")
    add("--sizes", type=int, choices=range(2, 6), nargs="+", default=[4], help="how many numbers")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of the training rows")
    add("--out", metavar="DIR", default="data", help="the folder to write to, as JSON Lines")
    add = options.add_argument_group("or only to look at").add_argument
    add(
        "--show",
        metavar="N",
        type=at_least(1),
        nargs="?",
        const=len(KINDS) + 2,  # a solution, a detour, and each mistake
        help="print N training rows, the kinds in turn",
    )
    add("--mask", choices=MASKS, default="action", help="the loss mask that --show uses")
    options = options.parse_args()
    record = new_record(options.seed, options.sizes)
    if options.show:
        show_rows(record, options.show, options.mask)
        return
    counts = {"train": options.num, "val": options.num_val, "val_new": options.num_val}
    with replacing(options.out) as staging, Pool(initializer=in_worker) as pool:
        for split, num in counts.items():
            rows = generate(record, split, num, map_function=pool.imap)
            with open(staging / f"{split}.jsonl", "w", encoding="utf-8") as out_file:
                for row in tqdm(rows, split, num, unit=" rows", disable=None):
                    out_file.write(json.dumps(row) + "\n")
        (staging / "record.json").write_text(json.dumps(record) + "\n")
    print(f"wrote {options.num} rows and twice {options.num_val} problems to {options.out}")


if __name__ == "__main__":
    cli(main)
