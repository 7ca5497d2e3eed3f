"""The generator and the solver against brute force with exact fractions; the loss mask against a mask of characters."""
import json
import lzma
import os
import re
from collections import Counter
from fractions import Fraction
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers
from oracles import is_right, labelled_characters, solutions

import data
from data import BACKTRACK, GOAL, HELD_OUT, KINDS, Tokenizer, UserError, generate, new_record, prompt_text, read_rows


@pytest.mark.parametrize("k,count", [(2, 400), (3, 300), (4, 25)])
def test_solver_agrees_with_brute_force(k, count):
    rng = np.random.default_rng(k)
    nums, target = rng.integers(1, 100, (count, k)), rng.integers(10, 101, count)
    nums[: count // 2] = rng.integers(1, 12, (count // 2, k))                  # small numbers: many solutions, many zeros
    expected = [solutions(tuple(n), t) for n, t in zip(nums.tolist(), target.tolist())]
    assert 0 < sum(expected) < count
    assert data.solvable(nums, target).tolist() == expected
    reach = data.reachable(data.programs(nums)[0], target)
    assert reach[-1].reshape(count, -1).any(-1).tolist() == expected
    # After a first choice, too: what is left must reach the target by brute force exactly where the solver says so.
    step = data.programs(nums)[0][0]
    left = data.remaining(step)
    for p in range(0, count, 10):
        for c in range(step.legal.shape[1]):
            assert reach[0][p, c] == (step.legal[p, c] and solutions(tuple(left[p, c].tolist()), int(target[p])))


def test_program_counts():
    assert [data.programs(np.array([[5] * k]))[0][-1].result[0].size for k in (2, 3, 4, 5)] == [4, 48, 1152, 46080]


def test_large_numbers_do_not_overflow():
    nums = np.array([[99] * 5])
    assert max(int(step.result.max()) for step in data.programs(nums)[0]) == 99 ** 5


def take(left: list[int], text: str) -> tuple[list[int], bool, bool]:
    """Apply an action to the numbers left: (numbers left, are both operands there, is the result right)."""
    op = next(o for o in "+-*/" if o in text)
    (a, b), c = map(int, text.split("=")[0].split(op)), int(text.split("=")[1])
    rest = Counter(left)
    rest.subtract([a, b])
    there = min(rest.values()) >= 0
    right = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op] == c
    return list((+rest + Counter([c])).elements()), there, right


def kind_of(row: dict) -> str:
    """What a training row is, by the exact solver; asserts that it is what section 4.1 says."""
    nums, target, path = row["nums"], row["target"], row["search_path"]
    assert all(1 <= x <= 99 for x in nums) and 10 <= target <= 100 and target not in HELD_OUT
    if not path.endswith(BACKTRACK):
        assert is_right(nums, target, path) and row["wrong"] == 0, row
        return "op"
    *before, wrong = path.removesuffix("\n" + BACKTRACK).split("\n")
    left = nums
    for text in before:
        left, there, right = take(left, text)
        assert there and right, row
    if row["wrong"] > 1:
        _, there, right = take(left, wrong)
        assert row["wrong"] == len(before) + 1 == len(nums) - 1 and there and not right
        assert wrong.endswith(f"={target}") and 0.5 < Fraction(*map(int, wrong.split("=")[0].split("/"))) / target < 2, row
        return "false_goal"
    assert row["wrong"] == 1
    assert len(before) < len(nums) - 1 and solutions(tuple(left), target), row          # the beginning of a solution
    after, there, right = take(left, wrong)
    if not there:
        assert right, row
        return "rule_violation"
    if not right:
        return "lie" if len(left) == 2 and wrong.endswith(f"={target}") else "computational"
    assert not solutions(tuple(after), target), row                                    # the exact solver's proof
    return "exploratory"


@pytest.mark.parametrize("sizes", [[3], [4], [3, 4]])
def test_rows_are_solutions_and_proved_mistakes(sizes):
    rows = list(generate(new_record(1, sizes), "train", 2500 if sizes == [3] else 400))
    kinds = Counter(kind_of(row) for row in rows)
    assert min(kinds[kind] for kind in ("lie", *KINDS)) > len(rows) / 100, kinds
    assert 0.4 < kinds["op"] / len(rows) < 0.65


def key(row):
    return tuple(sorted(row["nums"])), row["target"]


def test_splits_share_no_problem():
    train = {key(row) for seed in (0, 1) for row in generate(new_record(seed, [3]), "train", 6000)}
    val, new = ([*generate(new_record(7, [3]), split, 1000)] for split in ("val", "val_new"))
    assert not train & {key(row) for row in val + new}
    assert {row["target"] for row in new} == set(HELD_OUT)
    assert {row["target"] for row in val}.isdisjoint(HELD_OUT) and len(HELD_OUT) == 9
    shuffled = data.in_validation(np.array([row["nums"][::-1] for row in val]),
                                  np.array([row["target"] for row in val]))
    assert shuffled.all()                                             # the order of the numbers changes nothing


def test_rows_depend_on_the_seed_alone():
    with Pool(2) as pool:
        first, again, other = (list(generate(new_record(seed, [3, 4]), "train", 1500, over=over))
                               for seed, over in ((0, map), (0, pool.imap), (1, map)))
    assert first == again and first != other
    assert list(generate(new_record(0, [3, 4]), "train", 700, offset=300)) == first[300:1000]
    for split in ("val", "val_new"):                                  # so that runs of other seeds are measured on the same
        assert list(generate(new_record(0, [3]), split, 50)) == list(generate(new_record(9, [3]), split, 50))
    assert Counter(len(row["nums"]) for row in first).keys() == {3, 4}


def test_simplest_solution_is_a_cheapest_one():
    """Of all solutions found by brute force over the arrays, none is cheaper by the docstring's measure."""
    nums, target = data.draw_problems(np.random.default_rng(0), "train", 3, 300)
    steps, _ = data.programs(nums)
    path = data.simplest(steps, data.reachable(steps, target)[-1])

    def cost(p, c1, c2):
        return sum(np.log2(r + 2) + (4 if c % 4 > 1 else 0) for r, c in
                   ((steps[0].result[p, c1], c1), (steps[1].result[p, c1, c2], c2)))
    for p in range(len(nums)):
        all_costs = [cost(p, c1, c2) for c1 in range(12) for c2 in range(4)
                     if steps[1].legal[p, c1, c2] and steps[1].result[p, c1, c2] == target[p]]
        assert cost(p, path[0][p], path[1][p]) == min(all_costs)


def check_mask(tok: Tokenizer, rows: list[dict]):
    for row, (ids, labels) in zip(rows, tok.rows(rows)):
        prompt = prompt_text(row["nums"], row["target"])
        mask = labelled_characters(prompt, row["search_path"], row.get("wrong", 1))
        encoding = tok.tok.encode(prompt + row["search_path"])
        assert ids == encoding.ids + [tok.eos] and labels[-1] == tok.eos
        for i, label, (start, end) in zip(ids, labels, encoding.offsets):
            assert label in (i, -100)
            assert (label == i) == (end > start and all(mask[start:end]))
        if row["search_path"].endswith(BACKTRACK):
            assert labels[-2:] == [tok.backtrack, tok.eos]
            actions = row["search_path"].removesuffix(BACKTRACK).rstrip("\n").split("\n")
            before = "\n".join(actions[:-row.get("wrong", 1)])
            kept = [i for i, label in zip(ids, labels) if label != -100][:-2]
            assert tok.decode(kept).rstrip("\n") == before                # the prefix is learned, the wrong action is not
        assert ids[:len(tok.prompts([row])[0])] == tok.prompts([row])[0]       # a prompt alone is encoded as within a row


ROWS = [{"nums": [2, 39, 45, 10], "target": 62, "search_path": text} for text in
        ("45-39=6\n10*6=60\n2+60=62\nGoal Reached!", "45-39=6\n39+6=45\n<backtrack>", "45-39=7\n<backtrack>",
         "39+6=45<backtrack>", "<backtrack>", "45-39=6\n10*6=60\n1+1273=1274\n<backtrack>")]


def test_mask_of_the_digit_tokenizer():
    check_mask(Tokenizer.digits(), rows := ROWS + list(generate(new_record(0, [3, 4]), "train", 500)))
    check_choice_mask(Tokenizer.digits(), rows)


def test_without_a_mask_every_token_of_the_response_is_learned():
    tok = Tokenizer.digits()
    for row, (ids, labels) in zip(ROWS, tok.rows(ROWS, "none")):
        prompt = tok.prompts([row])[0]
        assert labels == [-100] * len(prompt) + ids[len(prompt):]


def test_a_kind_of_mistake_can_be_left_out():
    """Its rows become D_op; the problems stay as they were. Without any kind all rows are D_op."""
    def rows(*kinds):
        return list(generate(new_record(0, [4], kinds), "train", 512))
    every = rows(*KINDS)
    assert every == list(generate({k: v for k, v in new_record(0, [4]).items() if k != "mistakes"}, "train", 512))
    assert all(row["search_path"].endswith(GOAL) for row in rows())
    for kind in KINDS:
        less = rows(*(other for other in KINDS if other != kind))
        assert [(r["nums"], r["target"]) for r in less] == [(r["nums"], r["target"]) for r in every]
        kinds = {"computational" if (name := kind_of(row)) == "lie" else name for row in less}
        assert kinds == {"op", *KINDS} - {kind}


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_rows_of_a_few_problems(k):
    """However few problems there are of a kind, none included."""
    rng = np.random.default_rng(0)
    nums, target = data.draw_problems(rng, "train", k, 3)
    made = [row for i in range(100) for row in data.make_rows(rng, nums[i % 3:], target[i % 3:])]
    assert {row["search_path"].endswith(BACKTRACK) for row in made} == {True, False} and len(made) == 201
    assert data.make_rows(rng, nums[:0], target[:0]) == []


@pytest.mark.parametrize("k", [2, 3, 5])
def test_paths_that_end_in_a_false_goal_for_every_size(k):
    rows = [row for row in generate(new_record(0, [k], ["false_goal"]), "train", 512) if row["search_path"].endswith(BACKTRACK)]
    assert 0 < len(rows) < 80 and {row["wrong"] for row in rows} == {k - 1}
    assert {kind_of(row) for row in rows} == {"lie" if k == 2 else "false_goal"}


def check_choice_mask(tok: Tokenizer, rows: list[dict]):
    """Beyond the paper's mask, the right results of wrong actions are learned, and nothing else."""
    learned = 0
    for row, (ids, paper), (again, labels) in zip(rows, tok.rows(rows), tok.rows(rows, "choice")):
        assert again == ids and all(x in (y, -100) for x, y in zip(paper, labels))
        more, expected = tok.decode([y for x, y in zip(paper, labels) if x != y]), ""
        for action in row["search_path"].split("\n")[-1 - row.get("wrong", 1):-1] if BACKTRACK in row["search_path"] else ():
            step, _, result = action.partition("=")
            left, op, right = re.split("([-+*/])", step)
            value = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__,
                     "/": Fraction.__truediv__}[op](Fraction(left), Fraction(right))
            expected += f"{result}\n" if value == int(result) else ""
        assert more == expected
        learned += bool(more)
    assert learned > 50


@pytest.mark.skipif("LLAMA3_TOKENIZER" not in os.environ, reason="LLAMA3_TOKENIZER names no tokenizer.json(.xz)")
def test_mask_of_the_llama3_tokenizer():
    path = os.environ["LLAMA3_TOKENIZER"]
    with (lzma.open if path.endswith("xz") else open)(path, "rt", encoding="utf-8") as file:
        tok = tokenizers.Tokenizer.from_str(file.read())
    tok.add_special_tokens([tokenizers.AddedToken(BACKTRACK, special=True, normalized=False)])
    tok = Tokenizer(tok)
    assert tok.backtrack == 128256
    check_mask(tok, rows := ROWS + list(generate(new_record(0, [3, 4]), "train", 300)))
    check_choice_mask(tok, rows)
    assert tok.ends_line[tok.tok.token_to_id("Ċ")] and not tok.ends_line[tok.eos]


def test_transformers_reads_our_tokenizer(tmp_path):
    ours = Tokenizer.digits()
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == ours.eos and len(theirs) == ours.vocab_size
    for row, (ids, _) in zip(ROWS, ours.rows(ROWS)):
        text = prompt_text(row["nums"], row["target"]) + row["search_path"]
        assert theirs(text)["input_ids"] == ids[:-1] and theirs.decode(ids[:-1]) == text
        assert ours.decode(ids) == text
    again = Tokenizer.from_pretrained(tmp_path)
    assert (again.eos, again.backtrack, again.rows(ROWS)) == (ours.eos, ours.backtrack, ours.rows(ROWS))


def test_files_of_rows_are_read_in_every_form(tmp_path):
    lines, array = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    array.write_text(json.dumps(ROWS, indent=1))
    assert read_rows(lines) == read_rows(array) == ROWS
    (tmp_path / "train_backtrack.json").write_text(json.dumps(ROWS[:2]))
    (tmp_path / "val_backtrack.json").write_text(json.dumps(ROWS))
    assert [data.read_split(str(tmp_path), split) for split in data.SPLITS] == [ROWS[:2], ROWS[:3], ROWS[3:]]


@pytest.mark.parametrize("line,complaint", [
    ('{"nums": [1, 2], "target": 3', "line 2"), ('{"nums": [1, 2], "search_path": ""}', "row 2 lacks the column target"),
    ('{"nums": [1, -2], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [1, 0], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [1, true], "target": 3, "search_path": ""}', "nums must be positive"),
    ('{"nums": [1, 2], "target": 3.5, "search_path": ""}', "target must be a whole number"),
    ('{"nums": [1, 2], "target": 3, "search_path": null}', "search_path must be text"),
    ('{"nums": [1, 2], "target": 3, "search_path": "", "wrong": "1"}', "wrong must be a whole number"),
    ("[]", "lacks the column nums")])
def test_odd_rows_are_named(tmp_path, line, complaint):
    file = Path(tmp_path / "rows.jsonl")
    file.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=complaint):
        read_rows(file)
