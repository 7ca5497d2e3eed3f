"""The README's closed exercises: a function's body is deleted, and tests grade what is written in
its place. Here each grader fails with nothing in its place, and passes with a solution that is not
ours."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

VERIFY = """
    left = list(nums)
    *lines, end = response.split("\\n")
    for place, line in enumerate(lines, 1):
        parts = ACTION.fullmatch(line)
        if parts is None:
            return Verdict(False, f"{line!r} is no action", place)
        for operand in map(int, parts.group(1, 3)):
            if operand not in left:
                return Verdict(False, f"{line}: there is no {operand} (left)", place)
            left.remove(operand)
        true_result, allowed = calculate(int(parts[1]), parts[2], int(parts[3]))
        if not allowed:
            return Verdict(False, f"{line}: the rules do not allow it", place)
        if int(parts[4]) != true_result:
            return Verdict(False, f"{line}: false, it is {true_result}", place)
        left.append(true_result)
    if end == GOAL and left == [target]:
        return Verdict(True)
    missed = f"{left} left, not {target} alone"
    return Verdict(False, missed if end == GOAL else f"it ends in {end!r}, not in {GOAL!r}")
"""
NO_LOSS_SPANS = """
    prompt = len(prompt_text(row["nums"], row["target"]))
    spans = [(0, prompt)]
    actions = row["search_path"].split(BACKTRACK)[0].splitlines(True)
    named = range(0)
    if BACKTRACK in row["search_path"]:
        named = [len(actions) - 1]
    named = row.get("no_loss", named)
    for depth in range(len(actions) if mask != "none" else 0):
        if depth not in named:
            continue
        begin = prompt + sum(map(len, actions[:depth]))
        shown = actions[depth]
        if mask == "choice" and is_true(shown):
            shown = shown.split("=")[0] + "="
        spans.append((begin, begin + len(shown)))
    return spans
"""
EXPLORATORY = """
    losing = [i for i in position.choices if position.legal[i] and math.isinf(position.effort[i])]
    if losing:
        return Mistake(len(position.path), [position.action(rng.choice(losing))])
"""
ROLL_BACK = """
    kept = list(response.tokens)
    slots = list(response.slots)
    kept.pop()  # `<backtrack>`, which has no slot
    while kept:
        kept.pop()
        if slots:
            slots.pop()
        if kept and kept[-1] in tokenizer.line_ends:
            break
    count = len(kept)
    return State(tuple(kept), response.logps[:count], slots=tuple(slots))
"""
SPREAD = """
    most = max(response.count for response in responses)
    points = np.empty((len(responses), most))
    for row, response in zip(points, responses):
        row[:] = [response.first_point + place * response.spacing for place in range(most)]
    spacing = np.array([response.spacing for response in responses])
    return look_up(logits, points, spacing, responses, settings)
"""
LEARNING_RATE = """
    warming = lr * (step + 1) / warmup
    falling = lr * math.cos(math.pi / 2 * step / steps) ** 2
    return min(warming, falling)
"""
EXERCISES = [  # file, function, grader, solution
    ("data.py", "verify", "tests/test_data.py -k verifier", VERIFY),
    ("data.py", "no_loss_spans", "tests/test_data.py -k mask", NO_LOSS_SPANS),
    ("data.py", "exploratory", "tests/test_data.py -k proved", EXPLORATORY),
    ("search.py", "roll_back", "tests/test_search.py -k rolling_back", ROLL_BACK),
    ("search.py", "spread", "tests/test_search.py -k spread", SPREAD),
    ("train.py", "learning_rate", "tests/test_train.py -k learning_rate", LEARNING_RATE),
]


def with_body(text: str, name: str, body: str) -> str:
    """A file with another body in place of a function's; its docstring stays."""
    [function] = [node for node in ast.parse(text).body if getattr(node, "name", "") == name]
    lines = text.split("\n")
    begin = function.body[1 if ast.get_docstring(function) else 0].lineno - 1
    return "\n".join([*lines[:begin], body.strip("\n"), *lines[function.end_lineno :]])


def grade(folder: Path, grader: str) -> subprocess.CompletedProcess:
    """As the README has it: python -m pytest GRADER."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*command, *grader.split()], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exercise")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for part in ("tests", "assets"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    return folder


@pytest.mark.parametrize("file,function,grader,solution", EXERCISES)
def test_the_grader_passes_a_solution_and_nothing_less(checkout, file, function, grader, solution):
    ours = (checkout / file).read_text()
    try:
        (checkout / file).write_text(with_body(ours, function, "    pass"))
        assert grade(checkout, grader).returncode in (1, 2)  # 2: the tests' own rows need it
        (checkout / file).write_text(with_body(ours, function, solution))
        graded = grade(checkout, grader)
        assert graded.returncode == 0, graded.stdout
    finally:
        (checkout / file).write_text(ours)


def test_the_readme_has_these_exercises():
    readme = (ROOT / "README.md").read_text()
    for _, function, grader, _ in EXERCISES:
        assert f"`{function}`" in readme
        assert f"`{grader}`" in readme
