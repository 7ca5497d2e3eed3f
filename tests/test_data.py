"""The verifier, the solver and the generator against exact fractions and brute force; the loss mask
against a mask of characters."""

import json
import lzma
import math
import os
import random
import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from multiprocessing import Pool

import numpy as np
import pytest
import tokenizers
import transformers
from byte_pairs import BOS, byte_pairs
from oracles import count_solutions, is_right, labelled_characters, solutions

import data
from data import BACKTRACK, GOAL, HELD_OUT, KINDS, MISTAKES, Tokenizer, new_record, prompt_text
from model import UserError
from search import Response, roll_back


def rows_of(num: int, sizes: list[int], seed: int = 0, kinds=KINDS, split: str = "train"):
    return list(data.generate(new_record(seed, sizes, kinds), split, num))


# ---- The verifier --------------------------------------------------------------------------------

VERDICTS = [  # numbers, target, response, part of the reason, the step that fails
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62\nGoal Reached!", None, None),
    ([6, 6], 12, "6+6=12\nGoal Reached!", None, None),
    ([5, 5, 9], 0, "5-5=0\n0/9=0\nGoal Reached!", None, None),
    ([7], 7, "Goal Reached!", None, None),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62\nGoal Reached", "it ends in", None),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62", "it ends in '2+60=62'", None),
    ([2, 39, 45, 10], 62, "45-39=6\n<backtrack>", "it ends in '<backtrack>'", None),
    ([3, 5], 8, "", "it ends in ''", None),
    ([2, 39, 45, 10], 60, "45-39=6\n10*6=60\nGoal Reached!", "[2, 60] left", None),
    ([2, 39, 45, 10], 63, "45-39=6\n10*6=60\n2+60=62\nGoal Reached!", "[62] left, not 63", None),
    (
        [2, 39, 45, 10],
        62,
        "45-39=6\n10*6=61\n2+60=62\nGoal Reached!",
        "false, it is 60",
        2,
    ),
    ([2, 39, 45, 10], 62, "45-39=6\n39+6=45\n<backtrack>", "there is no 39", 2),
    ([6, 5], 12, "6+6=12\nGoal Reached!", "there is no 6", 1),
    ([7, 2], 3, "7/2=3\nGoal Reached!", "the rules do not allow it", 1),
    ([7, 0], 0, "7/0=0\nGoal Reached!", "the rules do not allow it", 1),
    ([7, 0], 7, "7/0=7\nGoal Reached!", "the rules do not allow it", 1),
    ([3, 5], 2, "3-5=2\nGoal Reached!", "the rules do not allow it", 1),
    ([3, 5], 2, "3-5=-2\nGoal Reached!", "is no action", 1),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62\nGoal Reached!\n", "is no action", 4),
    ([3, 5], 8, "3+5=8 \nGoal Reached!", "is no action", 1),
    ([3, 5], 8, "3+5=8\n\nGoal Reached!", "is no action", 2),
    ([3, 5], 8, "٣+5=8\nGoal Reached!", "is no action", 1),
    ([3, 5], 8, "3+5=" + "9" * 5000 + "\nGoal Reached!", "is no action", 1),
    ([10**2000, 10**2000], 1, f"{10**2000}*{10**2000}=1\nGoal Reached!", "false, it is 1000", 1),
    ([10**2001, 1], 1, f"{10**2001}*1=1\nGoal Reached!", "is no action", 1),
]


@pytest.mark.parametrize("nums,target,response,complaint,failed_action", VERDICTS)
def test_the_verifier_says_which_step_fails_and_why(
    nums, target, response, complaint, failed_action
):
    verdict = data.verify(nums, target, response)
    assert verdict.correct == (complaint is None)
    assert (complaint or "") in verdict.reason
    assert bool(verdict.reason) != verdict.correct
    assert verdict.failed_action == failed_action


ALPHABET = "0123456789+-*/=\n" * 3 + "G !<"


def replace_character(rng, nums: list[int], text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(ALPHABET) + text[place + 1 :]


def drop_character(rng, nums: list[int], text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + text[place + 1 :]


def add_character(rng, nums: list[int], text: str) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice(ALPHABET) + text[place:]


def shuffle_actions(rng, nums: list[int], text: str) -> str:
    *actions, end = text.split("\n")
    rng.shuffle(actions)
    return "\n".join([*actions, end][rng.randrange(2) :])


def change_a_number(rng, nums: list[int], text: str) -> str:
    nums[rng.randrange(len(nums))] = rng.choice(nums) + rng.choice((0, 0, 1))
    return text


DAMAGES = [replace_character, drop_character, add_character, shuffle_actions, change_a_number]


def test_the_verifier_agrees_with_exact_fractions_on_damaged_answers():
    """250,000 answers, damaged up to three times or not at all, against oracles.is_right."""
    rng = random.Random(0)
    rows = rows_of(1500, [2, 3, 4], seed=3, kinds=[])
    verdicts = Counter()
    for _ in range(250_000):
        row = rng.choice(rows)
        nums = list(row["nums"])
        target = row["target"] + rng.choice((0, 0, 0, 0, 0, 1))
        text = row["search_path"]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            text = rng.choice(DAMAGES)(rng, nums, text)
        correct = data.verify(nums, target, text).correct
        assert correct == is_right(nums, target, text), (nums, target, text)
        verdicts[correct] += 1
    assert verdicts[True] > 20_000 and verdicts[False] > 100_000


def test_the_step_that_fails_is_the_first_one_that_was_damaged():
    """The damaged action is known: its result is one too many."""
    rng = random.Random(0)
    for row in rows_of(500, [4], kinds=[]):
        actions = row["search_path"].split("\n")
        step = rng.randrange(3)
        choice, _, result = actions[step].partition("=")
        actions[step] = f"{choice}={int(result) + 1}"
        verdict = data.verify(row["nums"], row["target"], "\n".join(actions))
        assert verdict.failed_action == step + 1, actions


# ---- The solver ----------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def legal_actions(left: tuple[int, ...]) -> list[tuple[str, float, tuple[int, ...]]]:
    """What can be done with the numbers left: each action's text, its own effort and the numbers
    that are left after it. The effort of the last action's result does not count."""
    actions = []
    for first in range(len(left)):
        for second in range(first + 1, len(left)):
            others = [left[index] for index in range(len(left)) if index not in (first, second)]
            a = max(left[first], left[second])
            b = min(left[first], left[second])
            results = {"+": a + b, "-": a - b, "*": a * b}
            if b > 0 and a % b == 0:
                results["/"] = a // b
            for operator, result in results.items():
                effort = 4.0 if operator in "*/" else 0.0
                if others:
                    effort += math.log2(result + 2)
                after = tuple(sorted([*others, result]))
                actions.append((f"{a}{operator}{b}={result}", effort, after))
    return actions


@lru_cache(maxsize=None)
def least_effort(left: tuple[int, ...], target: int) -> float:
    """The effort of the simplest solution, by recursion over all of them; infinite if none is."""
    if len(left) == 1:
        return 0.0 if left[0] == target else math.inf
    efforts = [effort + least_effort(after, target) for _, effort, after in legal_actions(left)]
    return min(efforts)


def some_problems(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Solvable and others; half of them of small numbers, with many solutions and many zeros."""
    rng = np.random.default_rng(size)
    nums = rng.integers(1, 100, (count, size))
    nums[: count // 2] = rng.integers(1, 12, (count // 2, size))
    return nums, rng.integers(10, 101, count)


@pytest.mark.parametrize("size,count", [(2, 400), (3, 300), (4, 25)])
def test_what_is_solvable_agrees_with_brute_force(size, count):
    """Against oracles.solutions, which goes through exact fractions."""
    nums, target = some_problems(size, count)
    expected = [solutions(tuple(row), goal) for row, goal in zip(nums.tolist(), target.tolist())]
    assert 0 < sum(expected) < count
    assert data.solvable(nums, target).tolist() == expected
    for efforts in data.plan_efforts(data.programs(nums)[0], target):
        assert np.isfinite(efforts).reshape(count, -1).any(-1).tolist() == expected


@pytest.mark.parametrize("size,count", [(2, 400), (3, 300), (4, 25)])
def test_a_first_choice_is_right_where_brute_force_solves_what_it_leaves(size, count):
    """Against oracles.solutions of the numbers that are left."""
    nums, target = some_problems(size, count)
    steps, _ = data.programs(nums)
    right = np.isfinite(data.plan_efforts(steps, target)[0])
    left = data.remaining(steps[0])
    for problem in range(0, count, 5):
        for choice in range(right.shape[1]):
            expected = bool(steps[0].legal[problem, choice])
            if expected:
                goal = int(target[problem])
                expected = solutions(tuple(left[problem, choice].tolist()), goal)
            assert right[problem, choice] == expected


@pytest.mark.parametrize("size,count", [(2, 200), (3, 200), (4, 50)])
def test_the_effort_of_a_first_choice_is_that_of_the_simplest_solution(size, count):
    """Against `least_effort`, a recursion over all solutions: so argmin is a simplest one."""
    nums, target = some_problems(size, count)
    steps, _ = data.programs(nums)
    efforts = data.plan_efforts(steps, target)
    solved = 0
    for problem in range(count):
        goal = int(target[problem])
        expected = {}
        for action, effort, after in legal_actions(tuple(nums[problem].tolist())):
            expected[action] = effort + least_effort(after, goal)
        solved_problem = data.SolvedProblem(nums[problem].tolist(), goal, problem, steps, efforts)
        state = data.Position(solved_problem)
        for choice in state.choices:
            text = state.action(choice).text().strip()
            assert state.effort[choice] == pytest.approx(expected.get(text, math.inf), abs=1e-4)
        solved += math.isfinite(min(expected.values()))
    assert 0 < solved < count


@pytest.mark.parametrize("size,count", [(2, 4), (3, 48), (4, 1152), (5, 46080)])
def test_there_are_as_many_programs_as_one_can_count(size, count):
    steps, left = data.programs(np.array([[5] * size]))
    assert steps[-1].result.size == count
    assert left.size == count


def test_large_numbers_do_not_overflow():
    steps, _ = data.programs(np.array([[99] * 5]))
    assert max(int(step.result.max()) for step in steps) == 99**5


# ---- The rows ------------------------------------------------------------------------------------


def take_action(left: list[int], action: str) -> tuple[list[int], bool, bool]:
    """Exactly: the numbers left after an action, whether both its numbers are there, and whether
    its result is right and allowed."""
    a, operator, b, claimed = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", action).groups()
    after = list(left)
    there = True
    for operand in (int(a), int(b)):
        if operand in after:
            after.remove(operand)
        else:
            there = False
    results = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__}
    results["/"] = Fraction.__truediv__
    false_division = operator == "/" and int(b) == 0
    right = not false_division and results[operator](Fraction(a), Fraction(b)) == int(claimed)
    return [*after, int(claimed)], there, right


def follow(left: list[int], actions: list[str]) -> list[int]:
    """The numbers left after actions, all of which must be right."""
    for action in actions:
        left, there, right = take_action(left, action)
        assert there and right, action
    return left


def prove_the_way(nums: list[int], target: int, actions: list[str], detours: list[int]) -> None:
    """Each action is a simplest one, but those at `detours`: some other is at least as simple."""
    left = tuple(nums)
    for depth, action in enumerate(actions):
        efforts = []
        own_effort = math.inf
        for text, effort, after in legal_actions(left):
            efforts.append(effort + least_effort(after, target))
            if text == action:
                own_effort = efforts[-1]
        simplest = min(efforts) + 1e-4
        assert math.isfinite(own_effort)
        if depth in detours:
            assert own_effort > simplest or sum(effort < simplest for effort in efforts) > 1
        else:
            assert own_effort < simplest
        left = tuple(follow(list(left), [action]))


def prove_exploratory(left: list[int], target: int, wrong: str) -> None:
    after, there, right = take_action(left, wrong)
    assert there and right
    assert not solutions(tuple(after), target)


def prove_computational(left: list[int], target: int, wrong: str) -> None:
    _, there, right = take_action(left, wrong)
    assert there and not right


def prove_rule_violation(left: list[int], target: int, wrong: str) -> None:
    _, there, right = take_action(left, wrong)
    assert right and not there


PROOFS = {
    "exploratory": prove_exploratory,
    "computational": prove_computational,
    "rule_violation": prove_rule_violation,
}


def prove_false_goal(row: dict, actions: list[str]) -> None:
    """A whole path, right up to a last division that is not exact, but not far from the target."""
    *before, last = actions
    assert len(actions) == len(row["nums"]) - 1
    assert row["no_loss"] == list(range(len(actions)))
    _, there, right = take_action(follow(row["nums"], before), last)
    assert there and not right
    a, b, claimed = re.fullmatch(r"(\d+)/(\d+)=(\d+)", last).groups()
    assert int(claimed) == row["target"]
    assert 0.5 < Fraction(int(a), int(b)) / row["target"] < 2


def prove_near_miss(row: dict, actions: list[str]) -> None:
    """A whole path of right actions, whose end is beside the target."""
    assert len(actions) == len(row["nums"]) - 1
    assert row["no_loss"] == list(range(len(actions)))
    [end] = follow(row["nums"], actions)
    off = abs(end - row["target"])
    assert off in range(1, 10) or off in range(10, 100, 10)


def prove(row: dict) -> None:
    """Assert that a row is what its kind says (section 4.1), by exact fractions and brute force."""
    nums = row["nums"]
    target = row["target"]
    *actions, end = row["search_path"].split("\n")
    if row["kind"] in ("solution", "detour"):
        assert end == GOAL and is_right(nums, target, row["search_path"])
        assert len(row["no_loss"]) == (row["kind"] == "detour")
        prove_the_way(nums, target, actions, row["no_loss"])
        return
    assert end == BACKTRACK
    if row["kind"] == "false_goal":
        prove_false_goal(row, actions)
        return
    if row["kind"] == "near_miss":
        prove_near_miss(row, actions)
        return
    *way, wrong = actions
    *detours, last = row["no_loss"]
    assert last == len(way) < len(nums) - 1
    assert len(detours) <= 1
    prove_the_way(nums, target, way, detours)
    left = follow(nums, way)
    assert solutions(tuple(left), target)  # it was the beginning of a solution
    PROOFS[row["kind"]](left, target, wrong)


@pytest.mark.parametrize(
    "sizes,num", [([2], 1000), ([3], 2500), ([4], 400), ([5], 12), ([3, 4], 400)]
)
def test_every_row_is_proved_to_be_of_its_kind(sizes, num):
    """Against exact fractions and brute force, see `prove`."""
    rows = rows_of(num, sizes, seed=1)
    for row in rows:
        assert len(row["nums"]) in sizes
        assert all(1 <= number <= 99 for number in row["nums"])
        assert 10 <= row["target"] <= 100
        assert row["target"] not in HELD_OUT
        prove(row)
    assert "exploratory" in {row["kind"] for row in rows}


def text_of_the_simplest(row: dict) -> str:
    """The response that `plan_efforts` calls the simplest."""
    steps, _ = data.programs(np.array([row["nums"]]))
    efforts = data.plan_efforts(steps, np.array([row["target"]]))
    state = data.Position(data.SolvedProblem(row["nums"], row["target"], 0, steps, efforts))
    text = ""
    for depth in range(len(steps)):
        choice = int(np.argmin(state.effort))
        text += state.action(choice).text()
        if depth < len(steps) - 1:
            state = state.after(choice)
    return text + GOAL


def test_solutions_are_canonical_and_detours_are_not():
    """Against argmin of `plan_efforts`. Where a number comes twice, a detour may read the same."""
    differ = Counter()
    for row in rows_of(1500, [4]):
        if row["kind"] == "solution":
            assert row["search_path"] == text_of_the_simplest(row)
        if row["kind"] == "detour":
            differ[row["search_path"] != text_of_the_simplest(row)] += 1
    assert differ[True] > 50 * differ[False]


def test_detours_are_at_every_depth_where_there_is_another_way():
    depths = Counter(row["no_loss"][0] for row in rows_of(5000, [4]) if row["kind"] == "detour")
    assert depths[0] > depths[1] > 0
    assert depths[1] > 10 * depths[2]  # two numbers seldom reach the target in two ways


def test_rows_that_step_back_may_begin_with_a_detour():
    rows = [row for row in rows_of(2000, [4]) if row["kind"] in PROOFS]
    begin_with_one = [row for row in rows if len(row["no_loss"]) == 2]
    assert 0.05 < len(begin_with_one) / len(rows) < 0.15
    assert {row["kind"] for row in begin_with_one} == PROOFS.keys()


def form_of(row: dict) -> str:
    """What is special about the mistake of a row that steps back."""
    *before, wrong, _ = row["search_path"].split("\n")
    a, operator, b, claimed = data.ACTION.fullmatch(wrong).groups()
    a, b, claimed = int(a), int(b), int(claimed)
    if row["kind"] == "computational":
        result, legal = data.calculate(a, operator, b)
        is_last = len(before) == len(row["nums"]) - 2
        if not legal:
            return "inexact"
        if is_last and claimed == row["target"]:
            return "claims the target"
        return "too small" if claimed < result else "too large"
    if row["kind"] == "rule_violation":
        left = follow(row["nums"], before)
        missing = next(number for number in (a, b) if number not in left)
        return "used up" if missing in row["nums"] else "never there"
    if row["kind"] == "near_miss":
        return "by ones" if abs(claimed - row["target"]) < 10 else "by tens"
    return row["kind"]


def test_every_form_of_a_mistake_is_there():
    found = Counter(form_of(row) for row in rows_of(5000, [4]) if row["kind"] in KINDS)
    forms = ["inexact", "claims the target", "too small", "too large", "used up", "by tens"]
    assert all(found[form] > 20 for form in forms), found


def test_kinds_come_in_the_shares_of_mistakes():
    """Within four standard deviations of a sample of this size."""
    rows = rows_of(5000, [4])
    shares = {mistake: share / sum(MISTAKES.values()) for mistake, share in MISTAKES.items()}
    kinds = Counter(row["kind"] for row in rows if row["kind"] in KINDS)
    total = kinds.total()
    assert abs(total / len(rows) - data.BACK) < 4 * math.sqrt(0.25 / len(rows))
    for mistake, share in shares.items():
        deviation = math.sqrt(share * (1 - share) / total)
        assert abs(kinds[mistake.__name__] / total - share) < 4 * deviation, mistake


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_left_out_leaves_half_of_the_rows_to_the_others(kind):
    others = [other for other in KINDS if other != kind]
    kinds = Counter(row["kind"] for row in rows_of(1024, [4], kinds=others))
    assert kinds.keys() == {"solution", "detour", *others}
    assert abs(sum(kinds[other] for other in others) / 1024 - 0.5) < 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_alone_takes_half_of_the_rows(kind):
    kinds = Counter(row["kind"] for row in rows_of(1024, [4], kinds=[kind]))
    assert kinds.keys() == {"solution", "detour", kind}
    assert abs(kinds[kind] / 1024 - 0.5) < 0.06


def test_without_any_kind_all_rows_are_solutions():
    rows = rows_of(512, [4], kinds=[])
    assert {row["kind"] for row in rows} == {"solution", "detour"}
    assert all(row["search_path"].endswith(GOAL) for row in rows)


def test_kinds_do_not_change_the_problems():
    problems = [(row["nums"], row["target"]) for row in rows_of(512, [4])]
    for kinds in ([], ["exploratory"], ["computational", "false_goal"]):
        rows = rows_of(512, [4], kinds=kinds)
        assert [(row["nums"], row["target"]) for row in rows] == problems


def test_a_record_that_names_no_kinds_means_all():
    record = new_record(0, [4])
    del record["mistakes"]
    assert list(data.generate(record, "train", 512)) == rows_of(512, [4])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_however_few_problems_there_are_each_gets_a_row(size):
    rng = np.random.default_rng(0)
    nums, target = data.draw_problems(rng, "train", size, 3)
    rows = []
    for index in range(30):
        rows += data.make_rows(rng, nums[index % 3 :], target[index % 3 :])
    assert len(rows) == 60
    assert {row["search_path"].endswith(BACKTRACK) for row in rows} == {True, False}


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_no_problems_no_rows(size):
    nums = np.empty((0, size), int)
    assert data.make_rows(np.random.default_rng(0), nums, np.empty(0, int)) == []


@pytest.mark.parametrize("size,num", [(2, 4096), (3, 512), (5, 256)])
@pytest.mark.parametrize("kind", ["false_goal", "near_miss"])
def test_paths_that_lose_their_way_are_proved_for_every_size(kind, size, num):
    rows = rows_of(num, [size], kinds=[kind])
    paths = [row for row in rows if row["kind"] == kind]
    assert paths
    for row in paths:
        prove(row)


@pytest.mark.parametrize("size,num", [(2, 60), (3, 40), (4, 12)])
def test_solve_counts_programs_and_shows_one(size, num):
    rng = np.random.default_rng(size)
    counts = []
    for _ in range(num):
        nums = rng.integers(1, 13, size).tolist()
        target = int(rng.integers(1, 30))
        reaching, total, actions = data.solve(nums, target)
        assert reaching == count_solutions(nums, target)
        assert total == {2: 4, 3: 48, 4: 1152}[size]
        response = "".join(action.text() for action in actions) + GOAL
        assert is_right(nums, target, response) == (reaching > 0)
        counts.append(reaching)
    assert 0 in counts and max(counts) > 1


def test_a_single_number_is_solved_by_no_action():
    assert data.solve([7], 7) == (1, 1, [])
    assert data.solve([7], 8) == (0, 1, [])


@pytest.mark.parametrize(
    "nums,target,unlike",
    [
        ([3, 5, 8, 6], 48, 0),
        ([99, 1, 2], 100, 0),
        ([3, 5], 10, 1),
        ([3, 5, 8, 6, 2], 48, 1),
        ([3, 100, 8, 6], 48, 1),
        ([3, 5, 8, 6], 9, 1),
        ([3, 5, 8, 6], 101, 1),
    ],
)
def test_problems_of_another_kind_are_counted(capsys, nums, target, unlike):
    like = {"nums": [1, 2, 3], "target": 50}
    data.warn_of_unlike(new_record(0, [3, 4]), [like, {"nums": nums, "target": target}])
    line = "note: 1 of 2 problems are unlike what the model was trained on: "
    line += "3 or 4 numbers up to 99, targets 10 to 100\n"
    assert capsys.readouterr().err == line * unlike


def test_a_model_of_any_targets_knows_them(capsys):
    rows = [{"nums": [1, 2, 3], "target": target} for target in (0, 1, 299, 300)]
    data.warn_of_unlike(new_record(0, [3], any_target=0.5), rows)
    assert capsys.readouterr().err.startswith("note: 2 of 4 problems are unlike")


def test_what_a_model_of_other_data_knows_is_unknown(capsys):
    data.warn_of_unlike({"source": "rows.jsonl"}, [{"nums": [1], "target": 1000}])
    assert capsys.readouterr().err == ""


# ---- Splits and streams --------------------------------------------------------------------------


def problem_of(row: dict) -> tuple:
    return tuple(sorted(row["nums"])), row["target"]


def test_splits_share_no_problem():
    train = {problem_of(row) for row in rows_of(6000, [3], 0) + rows_of(6000, [3], 1)}
    val = {problem_of(row) for row in rows_of(1000, [3], 7, split="val")}
    val_new = {problem_of(row) for row in rows_of(1000, [3], 7, split="val_new")}
    assert not train & val
    assert not train & val_new


def test_the_targets_that_were_held_out_are_the_new_ones_alone():
    assert len(HELD_OUT) == 9
    assert {row["target"] for row in rows_of(1000, [3], split="val_new")} == set(HELD_OUT)
    for split in ("train", "val"):
        assert {row["target"] for row in rows_of(1000, [3], split=split)}.isdisjoint(HELD_OUT)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_targets_are_reached_and_never_those_of_validation(size):
    record = new_record(0, [size], any_target=0.75)
    rows = list(data.generate(record, "train", 1024))
    assert len(rows) == 1024
    nums = np.array([row["nums"] for row in rows])
    target = np.array([row["target"] for row in rows])
    assert data.solvable(nums, target).all()
    assert 1 <= target.min() <= 9 and 250 < target.max() <= 299
    assert set(HELD_OUT).isdisjoint(target.tolist())
    assert not data.in_validation(nums, target).any()
    assert 0.3 < np.isin(target, data.TARGETS).mean() < 0.75  # a quarter, and by chance
    for split in ("val", "val_new"):
        assert list(data.generate(record, split, 64)) == rows_of(64, [size], split=split)


def test_the_order_of_the_numbers_does_not_decide_on_the_split():
    rows = rows_of(500, [3], split="val")
    backwards = np.array([row["nums"][::-1] for row in rows])
    assert data.in_validation(backwards, np.array([row["target"] for row in rows])).all()


def test_the_problems_of_each_split_are_always_the_same():
    """Else the shipped model might be measured on problems that it was trained on."""
    known = {
        "train": [(28, 81, 67, 1, 14), (89, 20, 76, 94, 51), (5, 37, 64, 11, 46)],
        "val": [(87, 17, 78, 3, 51), (56, 1, 73, 47, 29), (74, 34, 8, 4, 38)],
        "val_new": [(83, 26, 11, 30, 18), (95, 20, 45, 88, 28), (59, 64, 45, 41, 42)],
    }
    for split, problems in known.items():
        rows = rows_of(3, [4], split=split)
        assert [(*row["nums"], row["target"]) for row in rows] == problems


def test_one_problem_in_16_is_of_validation():
    rng = np.random.default_rng(0)
    nums = rng.integers(1, 100, (50_000, 4))
    share = data.in_validation(nums, rng.integers(10, 101, 50_000)).mean()
    assert abs(share - 1 / 16) < 0.004  # almost four standard deviations


def test_rows_depend_on_the_seed_alone():
    rows = rows_of(1500, [3, 4])
    assert Counter(len(row["nums"]) for row in rows).keys() == {3, 4}
    assert rows_of(1500, [3, 4], seed=1) != rows
    assert list(data.generate(new_record(0, [3, 4]), "train", 700, offset=300)) == rows[300:1000]


def test_rows_made_in_parallel_are_the_same():
    record = new_record(0, [3, 4])
    with Pool(2) as pool:
        rows = list(data.generate(record, "train", 1500, map_function=pool.imap))
    assert rows == rows_of(1500, [3, 4])


@pytest.mark.parametrize("split", ["val", "val_new"])
def test_validation_problems_do_not_depend_on_the_seed(split):
    assert rows_of(50, [3], 0, split=split) == rows_of(50, [3], 9, split=split)


# ---- Tokens and the loss mask --------------------------------------------------------------------

WITHOUT_NO_LOSS = [  # as the reference's rows
    "45-39=6\n10*6=60\n2+60=62\nGoal Reached!",
    "45-39=6\n39+6=45\n<backtrack>",
    "45-39=7\n<backtrack>",
    "39+6=45<backtrack>",
    "<backtrack>",
    "45-39=6\n10*6=60\n1+1273=1274\n<backtrack>",
]
ROWS = [{"nums": [2, 39, 45, 10], "target": 62, "search_path": path} for path in WITHOUT_NO_LOSS]
ALL_KINDS = ("solution", "detour", *KINDS)
MASK_ROWS = [*ROWS, *rows_of(500, [3, 4])]


# Llama 3's own tokenizer.json (or .xz), if there is one; byte_pairs is of the same make
LLAMA3 = os.environ.get("LLAMA3_TOKENIZER")
LIKE_LLAMA3 = ["byte_pairs", "llama3"] if LLAMA3 else ["byte_pairs"]


def llama3() -> Tokenizer:
    """Llama 3's own tokenizer, with `<backtrack>`."""
    opener = lzma.open if LLAMA3.endswith("xz") else open
    with opener(LLAMA3, "rt", encoding="utf-8") as file:
        backend = tokenizers.Tokenizer.from_str(file.read())
    backend.add_special_tokens([tokenizers.AddedToken(BACKTRACK, special=True, normalized=False)])
    assert backend.token_to_id(BACKTRACK) == 128256
    return Tokenizer(backend)


def pairs() -> Tokenizer:
    """One token for every two characters, so that many belong to two lines."""
    special = [BACKTRACK, data.EOS]
    pieces = list(special)
    for row in MASK_ROWS:
        text = prompt_text(row["nums"], row["target"]) + row["search_path"]
        for part in text.split(BACKTRACK):
            pieces += [part[begin : begin + 2] for begin in range(0, len(part), 2)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    two = tokenizers.Regex(r"[\s\S]{1,2}")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(two, "isolated")
    backend.add_special_tokens(special)
    return Tokenizer(backend)


MAKERS = {"digits": Tokenizer.digits, "pairs": pairs, "byte_pairs": byte_pairs, "llama3": llama3}
make_tokenizer = lru_cache(lambda name: MAKERS[name]())


@pytest.fixture(params=["digits", "pairs", *LIKE_LLAMA3])
def any_tokenizer(request) -> Tokenizer:
    return make_tokenizer(request.param)


@pytest.fixture(params=["digits", *LIKE_LLAMA3])
def tokenizer(request) -> Tokenizer:
    return make_tokenizer(request.param)


@pytest.fixture(params=LIKE_LLAMA3)
def like_llama3(request) -> Tokenizer:
    return make_tokenizer(request.param)


def no_loss_of(row: dict) -> list[int]:
    """Which actions carry no loss; where the row does not say, the one before `<backtrack>`."""
    if "no_loss" in row:
        return row["no_loss"]
    actions, goes_back, _ = row["search_path"].partition(BACKTRACK)
    return [len(actions.splitlines()) - 1] if goes_back else []


def test_rows_of_all_kinds_are_masked_here():
    assert {row.get("kind") for row in MASK_ROWS} == {None, *ALL_KINDS}


def test_the_papers_mask_hides_what_a_mask_of_characters_hides(any_tokenizer):
    """Against oracles.labelled_characters: a token is learned where all its characters are."""
    tokenizer = any_tokenizer
    for row, (ids, labels) in zip(MASK_ROWS, tokenizer.encode_rows(MASK_ROWS, "action")):
        prompt = prompt_text(row["nums"], row["target"])
        mask = labelled_characters(prompt, row["search_path"], no_loss_of(row))
        encoding = tokenizer.backend.encode(prompt + row["search_path"])
        assert ids == [*encoding.ids, tokenizer.eos]
        assert labels[-1] == tokenizer.eos
        for token, label, (start, end) in zip(ids, labels, encoding.offsets):
            learned = end > start and all(mask[start:end])
            assert label == (token if learned else -100)


def test_the_papers_mask_keeps_the_end_and_what_came_before_the_first_hidden_action(tokenizer):
    """Against the lines of the response."""
    for row, (_, labels) in zip(MASK_ROWS, tokenizer.encode_rows(MASK_ROWS)):
        if not row["search_path"].endswith(BACKTRACK):
            continue
        assert labels[-2:] == [tokenizer.backtrack, tokenizer.eos]
        actions = row["search_path"].removesuffix(BACKTRACK).splitlines(keepends=True)
        kept = [action for at, action in enumerate(actions) if at not in no_loss_of(row)]
        learned = [label for label in labels if label != -100]
        assert tokenizer.decode(learned[:-2]) == "".join(kept)


def test_the_choice_mask_learns_right_results_as_well_and_nothing_else(tokenizer):
    """Against the results of the hidden actions, computed in exact fractions."""
    learned = 0
    paper_rows = tokenizer.encode_rows(MASK_ROWS, "action")
    for row, (ids, paper), (same_ids, labels) in zip(
        MASK_ROWS, paper_rows, tokenizer.encode_rows(MASK_ROWS, "choice")
    ):
        assert ids == same_ids
        more = []
        for paper_label, label in zip(paper, labels):
            assert paper_label in (label, -100)
            if paper_label != label:
                more.append(label)
        actions = row["search_path"].partition(BACKTRACK)[0].splitlines(keepends=True)
        expected = ""
        for depth in no_loss_of(row):
            if actions and take_action([], actions[depth].strip())[2]:
                expected += actions[depth].partition("=")[2]
        assert tokenizer.decode(more) == expected
        learned += bool(more)
    assert learned > 50


def test_without_a_mask_every_token_of_the_response_is_learned(tokenizer):
    for row, (ids, labels) in zip(MASK_ROWS, tokenizer.encode_rows(MASK_ROWS, "none")):
        [prompt] = tokenizer.prompts([row])
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]


def test_a_prompt_alone_is_encoded_as_within_a_row(tokenizer):
    for row, (ids, _) in zip(MASK_ROWS, tokenizer.encode_rows(MASK_ROWS)):
        [prompt] = tokenizer.prompts([row])
        assert ids[: len(prompt)] == prompt


def test_where_lines_end(tokenizer):
    newline = tokenizer.backend.encode("\n").ids[-1]
    assert newline in tokenizer.line_ends
    assert tokenizer.eos not in tokenizer.line_ends
    assert tokenizer.backtrack not in tokenizer.line_ends


def test_begin_of_text_stands_in_front_once_and_is_never_learned(like_llama3):
    """In a prompt, and in a row."""
    bos = like_llama3.backend.token_to_id(BOS)
    for row, (ids, labels) in zip(MASK_ROWS, like_llama3.encode_rows(MASK_ROWS, "none")):
        [prompt] = like_llama3.prompts([row])
        assert prompt[0] == ids[0] == bos
        assert ids.count(bos) == prompt.count(bos) == 1
        assert bos not in labels
        text = prompt_text(row["nums"], row["target"]) + row["search_path"]
        assert like_llama3.decode(ids[1:]) == text


def test_numbers_are_pieces_of_three_digits_and_newlines_join_what_is_before(like_llama3):
    """What makes such a tokenizer hard for masks and for stepping back."""
    pieces = like_llama3.backend.encode("###Response:\n1273-39=1234\n").ids[1:]
    texts = [like_llama3.backend.decode([piece]) for piece in pieces]
    assert texts == ["###", "Response", ":\n", "127", "3", "-", "39", "=", "123", "4", "\n"]


def test_stepping_back_drops_a_line_of_text(tokenizer):
    """Against the text without its last line, encoded anew."""
    stepped = 0
    for row in MASK_ROWS:
        actions, goes_back, _ = row["search_path"].partition(BACKTRACK)
        if not goes_back or not actions.endswith("\n"):
            continue
        [prompt] = tokenizer.prompts([row])
        [(ids, _)] = tokenizer.encode_rows([row])
        tokens = tuple(ids[len(prompt) : -1])  # `<backtrack>` is the last
        rolled = roll_back(Response(tokens, (0.0,) * len(tokens)), tokenizer)
        kept = "".join(actions.splitlines(keepends=True)[:-1])
        assert tokenizer.decode(rolled.tokens) == kept
        stepped += 1
    assert stepped > 100


def test_transformers_reads_our_tokenizer(tmp_path):
    """Against transformers' AutoTokenizer."""
    ours = Tokenizer.digits()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eos
    assert len(theirs) == ours.vocab_size
    for row, (ids, _) in zip(ROWS, ours.encode_rows(ROWS)):
        text = prompt_text(row["nums"], row["target"]) + row["search_path"]
        assert theirs(text)["input_ids"] == ids[:-1]
        assert theirs.decode(ids[:-1]) == text
        assert ours.decode(ids) == text


def test_a_saved_tokenizer_opens_as_it_was(tmp_path):
    ours = Tokenizer.digits()
    ours.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.eos, again.backtrack) == (ours.eos, ours.backtrack)
    assert again.encode_rows(ROWS) == ours.encode_rows(ROWS)


# ---- Files of rows -------------------------------------------------------------------------------


def test_lines_and_arrays_of_rows_are_read(tmp_path):
    lines = tmp_path / "rows.jsonl"
    array = tmp_path / "rows.json"
    lines.write_text("\n".join(json.dumps(row) for row in MASK_ROWS) + "\n\n")
    array.write_text(json.dumps(MASK_ROWS, indent=1))
    assert data.read_rows(lines) == MASK_ROWS
    assert data.read_rows(array) == MASK_ROWS


def test_splits_of_the_references_files_are_read(tmp_path, capsys):
    """Train, and the two halves of val; of several files the one that backtracks."""
    (tmp_path / "train_backtrack.json").write_text(json.dumps(ROWS[:2]))
    (tmp_path / "train.json").write_text(json.dumps(ROWS[:1]))
    (tmp_path / "val_backtrack.json").write_text(json.dumps(ROWS))
    splits = [data.read_split(str(tmp_path), split) for split in data.SPLITS]
    assert splits == [ROWS[:2], ROWS[:3], ROWS[3:]]
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("has 2 files of train rows: reading train_backtrack.json alone")


GOOD = '"nums": [1, 2], "target": 3, "search_path": ""'
ODD_ROWS = [
    ('{"nums": [1, 2], "target": 3', "line 2 cannot be read"),
    ("[]", "row 2 lacks the column nums"),
    ('{"nums": [1, 2], "search_path": ""}', "row 2 lacks the column target"),
    ('{"nums": [1, -2], "target": 3, "search_path": ""}', "row 2: nums must be positive"),
    ('{"nums": [], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [1, 0], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [1, true], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": 12, "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [1, 2], "target": 3.5, "search_path": ""}', "target must be a whole number"),
    ('{"nums": [1, 2], "target": 3, "search_path": null}', "search_path must be text"),
    ("{" + GOOD + ', "no_loss": 1}', "no_loss must be numbers of actions"),
    ("{" + GOOD + ', "no_loss": [0, -1]}', "no_loss must be numbers of actions"),
    ("{" + GOOD + ', "no_loss": [true]}', "no_loss must be numbers of actions"),
]


@pytest.mark.parametrize("line,complaint", ODD_ROWS)
def test_odd_rows_are_named(tmp_path, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=complaint):
        data.read_rows(path)


@pytest.mark.parametrize("text", ["", "[]", "\n\n"])
def test_a_file_without_rows_is_complained_of(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="holds no rows"):
        data.read_rows(path)


# ---- Rows to look at -----------------------------------------------------------------------------

DIGITS = Tokenizer.digits()
SHOWN = {
    "nums": [2, 4, 10, 25],
    "target": 60,
    "search_path": "25*4=100\n100/2=51\n<backtrack>",
    "kind": "computational",
    "no_loss": [0, 1],
}
PROMPT = "###Question: numbers [2, 4, 10, 25]->target 60\n###Response:\n"


def test_a_shown_row_has_brackets_around_what_is_not_learned(monkeypatch):
    monkeypatch.setattr(data.sys.stdout, "isatty", lambda: False, raising=False)
    end = "<backtrack><|end_of_text|>\n"
    shown = data.show_row(DIGITS, SHOWN, "action")
    assert shown == f"D_back, computational\n\n{PROMPT}[25*4=100]\n[100/2=51]\n{end}"
    shown = data.show_row(DIGITS, SHOWN, "choice")
    assert shown == f"D_back, computational\n\n{PROMPT}[25*4=]100\n[100/2=51]\n{end}"
    assert data.show_row(DIGITS, SHOWN, "none").endswith(f"{PROMPT}25*4=100\n100/2=51\n{end}")


def test_a_terminal_shows_rows_in_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(data.sys.stdout, "isatty", lambda: True, raising=False)
    shown = data.show_row(DIGITS, SHOWN, "choice")
    assert f"\033[2m{PROMPT}\033[0m\033[36m[25*4=]\033[0m\033[32m100\n\033[0m" in shown
    assert "\033[33m<backtrack>\033[0m" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in data.show_row(DIGITS, SHOWN, "choice")


def test_of_each_kind_a_row_is_shown(capsys):
    data.show_rows(new_record(0, [3]), 2 * len(ALL_KINDS), "action")
    names = ["D_op, solution", "D_op, detour", *(f"D_back, {kind}" for kind in KINDS)]
    shown = Counter(line for line in capsys.readouterr().out.split("\n") if line in names)
    assert shown == dict.fromkeys(names, 2)


def test_as_many_rows_are_shown_as_are_asked_for(capsys):
    """Of two numbers false goals are rare."""
    data.show_rows(new_record(0, [2]), 200, "action")
    assert capsys.readouterr().out.count("###Question") == 200
