"""Countdown problems, solutions, mistakes and tokens. Read after model.py, before search.py.

A model learns from two kinds of rows (paper, section 4.1). D_op: a problem and one solution of it. D_back: a problem, the
beginning of a solution, one wrong action (or a whole wrong path) and `<backtrack>`. This file draws the problems, finds every
solution of each by enumerating all programs as arrays, makes the mistakes, proves each to be one, and turns rows into tokens
with labels.
"""
import itertools, json, re
from collections import namedtuple
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tqdm import tqdm

from model import Arguments, UserError, checkpoint_folder, cli, number, read_json, replacing

GOAL, BACKTRACK, EOS, PAD, OPS = "Goal Reached!", "<backtrack>", "<|end_of_text|>", "<|pad|>", "+-*/"
MAX_NUMBER, TARGETS = 99, range(10, 101)
HELD_OUT = (18, 21, 28, 42, 56, 81, 89, 96, 98)      # a tenth of the targets, drawn once: the *new* ones, never trained on
REFERENCE = "yangxw/countdown-backtracking"           # the reference's dataset on the Hub
SPLITS = ("train", "val", "val_new")                 # val: validation problems of seen targets; val_new: of new targets

def prompt_text(nums: list[int], target: int) -> str:
    return f"###Question: numbers {list(nums)}->target {target}\n###Response:\n"

def calculate(a: int, op: str, b: int) -> int | None:
    """a op b on whole numbers; None for a division that is not exact."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else None}[op]

# ---- All programs of a batch of problems, as arrays ----------------------------------------------------------------------
Step = namedtuple("Step", "left a b result legal")
"""Every choice of step j of every problem, as arrays with leading axes (problems, C_1, ..., C_j-1): all histories before it.
left (..., k - j + 1): the numbers that are there. a >= b (..., pairs): the operands. result, legal (..., C_j), with
C_j = 4 * pairs: choice c takes pair c // 4 and operation OPS[c % 4]; `legal` says that this step and all before it
obey the rules (division exact and by no zero; nothing negative can appear, as a >= b)."""

def take_step(left: np.ndarray, legal: np.ndarray) -> Step:
    """Every choice that the numbers left (..., m) allow, after histories that are legal (...) or not."""
    i, j = np.triu_indices(left.shape[-1], 1)
    a, b = np.maximum(left[..., i], left[..., j]), np.minimum(left[..., i], left[..., j])
    quotient, rest = np.divmod(a, np.maximum(b, 1))
    rules = np.stack([np.ones_like(a, bool)] * 3 + [(b > 0) & (rest == 0)], -1).reshape(*legal.shape, 4 * len(i))
    return Step(left, a, b, np.stack([a + b, a - b, a * b, quotient], -1).reshape(rules.shape), legal[..., None] & rules)

def remaining(step: Step) -> np.ndarray:
    """(..., C_j, k - j): the numbers that are there after each choice; the result comes last."""
    size = step.left.shape[-1]
    others = np.array([[m for m in range(size) if m not in pair] for pair in zip(*np.triu_indices(size, 1))], int)
    return np.concatenate([step.left[..., others.repeat(4, 0)], step.result[..., None]], -1)

def programs(nums: np.ndarray, stop: int = 1) -> tuple[list[Step], np.ndarray]:
    """All ways to combine nums (problems, k), ints >= 1, until `stop` are left: the steps, and what is left after each.
    Down to one number these are k - 1 steps; for four numbers 24 * 12 * 4 = 1,152 programs."""
    fits = int(nums.max(initial=1)) ** nums.shape[1] < 2 ** 31                 # no product overflows
    left, legal, steps = -np.sort(-nums, axis=1).astype(np.int32 if fits else np.int64), np.ones(len(nums), bool), []
    while left.shape[-1] > stop:
        steps.append(take_step(left, legal))
        left, legal = remaining(steps[-1]), steps[-1].legal
    return steps, left

def solvable(nums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(problems,) bool: does any program reach the target? As `reachable` would say, but the last step is only compared."""
    steps, left = programs(nums, stop=2)
    a, b = np.maximum(left[..., 0], left[..., 1]), np.minimum(left[..., 0], left[..., 1])
    t = target.astype(a.dtype).reshape(-1, *[1] * (a.ndim - 1))
    hit = (a + b == t) | (a - b == t) | (a * b == t) | (b > 0) & (a == b * t)
    return (hit & steps[-1].legal if steps else hit).reshape(len(nums), -1).any(-1)

def reachable(steps: list[Step], target: np.ndarray) -> list[np.ndarray]:
    """For each step, (..., C_j) bool: does any program still reach target (problems,) after it? The last: the solutions."""
    last = steps[-1]
    reach = [last.legal & (last.result == target.reshape(-1, *[1] * (last.result.ndim - 1)))]
    for _ in steps[1:]:
        reach.insert(0, reach[0].any(-1))
    return reach

def chosen(step: Step, history: tuple[np.ndarray, ...], choice: np.ndarray):
    """a, b and result, each (rows,), of `choice` (rows,) after `history`: indices (rows,) into the leading axes."""
    return step.a[*history, choice // 4], step.b[*history, choice // 4], step.result[*history, choice]

def simplest(steps: list[Step], solved: np.ndarray) -> tuple[np.ndarray, ...]:
    """The choices (problems,) at each step of every problem's simplest solution: + and - before * and /, then small results,
    then the first program. One canonical answer a problem is far easier to learn than any one of many. All must have one."""
    problem, *path = np.nonzero(solved)
    cost = np.zeros(len(problem))
    for j, step in enumerate(steps):
        cost += np.log2(chosen(step, (problem, *path[:j]), path[j])[2] + 2) + 4 * (path[j] % 4 >= 2)
    order = np.lexsort((cost, problem))
    first = order[np.searchsorted(problem, np.arange(len(solved)))]           # problem is sorted: where each one begins
    return tuple(choices[first] for choices in path)

# ---- Problems ------------------------------------------------------------------------------------------------------------
def in_validation(nums: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(problems,) bool: a hash of sorted numbers and target puts one problem in 16 into validation, whatever the seed."""
    key = target.astype(np.uint64)
    for column in np.sort(nums, axis=1).T:
        key = key * np.uint64(1_000_003) + column.astype(np.uint64)
    return (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(60) == 0

def draw_problems(rng: np.random.Generator, split: str, k: int, num: int, held_out=HELD_OUT) -> tuple[np.ndarray, np.ndarray]:
    """`num` solvable problems of a split: nums (num, k) in 1..99 and target (num,) in 10..100, both uniform draws."""
    pool, found = held_out if split == "val_new" else [t for t in TARGETS if t not in held_out], np.empty((0, k + 1), int)
    while len(found) < num:
        draws = np.column_stack([rng.integers(1, MAX_NUMBER + 1, (1024, k)), rng.choice(pool, 1024)])
        if split != "val_new":
            draws = draws[in_validation(draws[:, :-1], draws[:, -1]) == (split == "val")]
        found = np.concatenate([found, draws[solvable(draws[:, :-1], draws[:, -1])]])
    return found[:num, :-1], found[:num, -1]

# ---- Mistakes: the wrong actions of D_back (paper, section 4.1) ----------------------------------------------------------
# Each but `false_goal` sees `step` (its arrays: (rows, ...)), the step that follows the beginning of a solution, `reach`
# (rows, C), target (rows,) and `used` (rows, u), the numbers used up before. It returns a, choice, b, result, found: (rows,).
def pick(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A random true place in each row of mask (rows, C); place 0 in a row without one."""
    return (rng.random(mask.shape, np.float32) * mask).argmax(-1)

def exploratory(rng, step, reach, target, used):
    """A legal step from which the target cannot be reached any more."""
    wrong = step.legal & ~reach
    choice = pick(rng, wrong)
    a, b, result = chosen(step, (np.arange(len(target)),), choice)
    return a, choice, b, result, wrong.any(-1)

def computational(rng, step, reach, target, used):
    """A legal step whose result is off by 1 to 9 or 10 to 90; or, half the time, a division that is not exact (the commonest
    lie of small models), its quotient rounded down or off likewise. A last step mostly claims the target."""
    rows = np.arange(len(target))
    inexact = ~step.legal & (step.b > 0).repeat(4, -1)
    divide = inexact.any(-1) & (rng.random(len(rows)) < 0.5)
    choice = pick(rng, np.where(divide[:, None], inexact, step.legal))
    a, b, result = chosen(step, (rows,), choice)
    slip = rng.integers(1, 10, len(rows)) * rng.choice([1, 1, 10], len(rows)) * ~(divide & (rng.random(len(rows)) < 0.5))
    false = np.where((rng.random(len(rows)) < 0.5) & (slip <= result), result - slip, result + slip)
    if step.left.shape[-1] == 2:
        false = np.where((rng.random(len(rows)) < 0.75) & (result != target), target, false)
    return a, choice, b, false, np.ones(len(rows), bool)

def rule_violation(rng, step, reach, target, used):
    """A step with a right result that takes a number that is not there, mostly one that has been used up."""
    rows = np.arange(len(target))
    gone = rng.integers(1, MAX_NUMBER + 1, len(rows))
    if used.shape[1]:
        again = used[rows, rng.integers(0, used.shape[1], len(rows))]
        gone = np.where(rng.random(len(rows)) < 0.8, again, gone)
    there = step.left[rows, rng.integers(0, step.left.shape[1], len(rows))]
    a, b = np.maximum(gone, there), np.minimum(gone, there)
    choice = rng.integers(0, 3, len(rows))                                    # + - *
    return a, choice, b, np.choose(choice, [a + b, a - b, a * b]), (step.left != gone[:, None]).all(-1)

def write_actions(a, choice, b, result) -> list[str]:
    """The text of an action for each row of the arrays (rows,): `45-39=6` and a newline."""
    return [f"{x}{OPS[c % 4]}{y}={r}\n" for x, c, y, r in zip(*(v.tolist() for v in (a, choice, b, result)))]

def false_goal(rng, steps, target):
    """Not one action but a whole path that has lost its way: legal steps that end near the target, and a division that is not
    exact but claims it, as small models answer in the end. Sees all steps; returns the actions' texts and found, (rows,)."""
    rows, last = np.arange(len(target)), steps[-1]
    a, b, legal = last.a[..., 0], last.b[..., 0], last.legal[..., 0]          # (rows, C_1, ..., C_k-2): every history's end
    t = target.reshape(-1, *[1] * (a.ndim - 1))
    near = legal & (a % np.maximum(b, 1) != 0) & (a < 2 * b * t) & (b * t < 2 * a)
    near = near.reshape(len(rows), np.prod(a.shape[1:], dtype=int))
    path = np.unravel_index(pick(rng, near), a.shape[1:]) if a.ndim > 1 else ()
    path, texts = (*path, np.full(len(rows), OPS.index("/"))), []
    for j, step in enumerate(steps):
        x, y, result = chosen(step, (rows, *path[:j]), path[j])
        texts.append(write_actions(x, path[j], y, target if step is last else result))
    return list(zip(*texts)), near.any(-1)

MISTAKES = {exploratory: 0.35, computational: 0.35, rule_violation: 0.1, false_goal: 0.2}       # shares of D_back
KINDS = [make.__name__ for make in MISTAKES]
BACK = 0.5                                                                    # share of D_back in all rows, at most

def make_rows(rng: np.random.Generator, nums: np.ndarray, target: np.ndarray, kinds: Sequence[str] = KINDS) -> list[dict]:
    """A row {nums, target, search_path, wrong} for each of nums (problems, k), target (problems,), all solvable, of D_op or of
    D_back; `wrong` is the number of actions before `<backtrack>` that are wrong. What would be a mistake of another kind than
    `kinds` stays in D_op; without any, all rows do."""
    steps, rows = programs(nums)[0], np.arange(len(nums))
    reach = reachable(steps, target)
    path = simplest(steps, reach[-1])
    actions, used = [], [np.empty((len(rows), 0), np.int64)]                   # by step: each row's action; numbers used up
    for j, step in enumerate(steps):
        a, b, result = chosen(step, (rows, *path[:j]), path[j])
        actions.append(write_actions(a, path[j], b, result))
        used.append(np.column_stack([used[-1], a, b]))

    paths = [[*right, GOAL] for right in zip(*actions)]                        # D_op; those of D_back are cut and go wrong:
    back, depth = rng.random(len(rows)) < BACK, rng.integers(0, len(steps), len(rows))
    kind, wrong = rng.choice(len(MISTAKES), len(rows), p=list(MISTAKES.values())), [0] * len(rows)
    for d, (m, make) in itertools.product(range(len(steps)), enumerate(MISTAKES)):
        if make.__name__ not in kinds:
            continue
        at = np.flatnonzero(back & (depth == d) & (kind == m))
        if make is false_goal:
            cut, (texts, found) = 0, make(rng, [Step(*(x[at] for x in step)) for step in steps], target[at])
        else:
            cut, here = d, (at, *(choices[at] for choices in path[:d]))
            *action, found = make(rng, Step(*(x[here] for x in steps[d])), reach[d][here], target[at], used[d][at])
            texts = zip(write_actions(*action))
        for i, text, ok in zip(at.tolist(), texts, found.tolist()):
            if ok:
                paths[i][cut:], wrong[i] = [*text, BACKTRACK], len(text)
    return [{"nums": n, "target": t, "search_path": "".join(p), "wrong": w}
            for n, t, p, w in zip(nums.tolist(), target.tolist(), paths, wrong)]

# ---- Streams and files of rows -------------------------------------------------------------------------------------------
def new_record(seed: int, sizes: list[int], mistakes: Sequence[str] = KINDS) -> dict:
    """What a checkpoint remembers of its data, so that nobody measures "new" on targets that it has seen."""
    return {"source": "generated", "seed": seed, "sizes": sizes, "held_out": list(HELD_OUT), "mistakes": list(mistakes)}

def block(record: dict, split: str, i: int) -> list[dict]:
    """Block i, 256 rows of sizes[i % len(sizes)] numbers, of a split's endless stream. The seed moves training rows only."""
    rng = np.random.default_rng([SPLITS.index(split), record["seed"] if split == "train" else 0, i])
    problems = draw_problems(rng, split, record["sizes"][i % len(record["sizes"])], 256, record["held_out"])
    return make_rows(rng, *problems, record.get("mistakes", KINDS))

def generate(record: dict, split: str, num: int, offset: int = 0, over=map) -> Iterator[dict]:
    """Rows offset .. offset + num of a split's stream; `over` maps a function over blocks (a pool's imap: in parallel)."""
    blocks = over(partial(block, record, split), range(offset // 256, -(-(offset + num) // 256)))
    return itertools.islice(itertools.chain.from_iterable(blocks), offset % 256, offset % 256 + num)

COLUMNS = {"nums": ("positive whole numbers", lambda x: isinstance(x, list) and x and all(type(i) is int and i > 0 for i in x)),
           "target": ("a whole number", lambda x: type(x) is int),
           "search_path": ("text", lambda x: isinstance(x, str))}

def read_rows(path: Path, columns: Sequence[str] = tuple(COLUMNS)) -> list[dict]:
    """Rows of a JSON Lines file, or of a JSON file that is one list of rows. Raises UserError that names the line."""
    try:
        text = path.read_text(encoding="utf-8")
        where, whole = f"{path}", text.lstrip()[:1] == "["
        rows = json.loads(text) if whole else []
        for i, line in enumerate([] if whole else text.split("\n"), 1):
            where = f"{path}, line {i}"
            rows += [json.loads(line)] if line.strip() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{where if isinstance(error, json.JSONDecodeError) else path} cannot be read: {error}") from None
    for i, row in enumerate(rows or [None], 1):                               # a file without rows is complained of, too
        if isinstance(row, dict) and (type(wrong := row.get("wrong", 1)) is not int or wrong < 0):
            raise UserError(f"{path}: row {i}: wrong must be a whole number, at least 0, not {row['wrong']!r}")
        for column in columns:
            what, holds = COLUMNS[column]
            if not isinstance(row, dict) or column not in row:
                raise UserError(f"{path}: row {i} lacks the column {column}")
            if not holds(row[column]):
                raise UserError(f"{path}: row {i}: {column} must be {what}, not {row[column]!r}")
    return rows

def read_split(source: str, split: str) -> list[dict]:
    """A split of a folder that `data.py` wrote, or of a dataset like the reference's, in a folder or on the Hub: JSON files
    with `train` and `val` in their names. Of the latter `val` is the first half, `val_new` the second. Raises UserError."""
    folder = checkpoint_folder(source, "dataset")
    if (folder / f"{split}.jsonl").exists():
        return read_rows(folder / f"{split}.jsonl")
    kind = split.removesuffix("_new")
    files = [file for file in sorted(folder.glob("*.json*")) if kind in file.name]
    if not files:
        raise UserError(f"{source} holds no JSON with {kind!r} in its name (parquet is not read)")
    rows = read_rows(next((file for file in files if "backtrack" in file.name), files[0]))
    half = len(rows) // 2
    return {"train": rows, "val": rows[:half], "val_new": rows[half:]}[split]

def load_record(name: str, kind: str = "model") -> dict:
    """What a checkpoint or dataset was made from; where nobody wrote it down: the reference's, or itself."""
    path = checkpoint_folder(name, kind) / "record.json"
    return read_json(path) if path.exists() else {"source": REFERENCE if kind == "model" else str(name)}

def load_rows(data: str, record: dict, num: int, offset: int = 0) -> list[dict]:
    """Rows offset .. offset + num of a split by the checkpoint's record, of `dataset:split` or of a file. Raises UserError."""
    if data not in SPLITS and Path(data).is_file():
        rows = read_rows(Path(data), ("nums", "target"))[offset:offset + num]
    elif (parts := data.rpartition(":"))[2] not in SPLITS:
        raise UserError(f"--data wants val, val_new, DATASET:val or a file of JSON Lines, and {data} is none of them")
    elif parts[0]:
        rows = load_rows(parts[2], load_record(parts[0], "dataset"), num, offset)
    elif Path(record["source"]).is_file():
        raise UserError(f"no {data}: the checkpoint's data was a file (search.py takes one as --data)")
    elif record["source"] == "generated":
        rows = list(generate(record, data, num, offset))
    else:
        rows = read_split(record["source"], data)[offset:offset + num]
    if not rows:
        raise UserError(f"{data} has no row number {offset}")
    return rows

# ---- Tokens --------------------------------------------------------------------------------------------------------------
class Tokenizer:
    """A `tokenizers` tokenizer and what the method asks of one: prompts, rows with labels, where lines end."""
    def __init__(self, tok: tokenizers.Tokenizer, eos: str = EOS):
        self.tok = tok
        self.eos, self.backtrack, self.vocab_size = tok.token_to_id(eos), tok.token_to_id(BACKTRACK), tok.get_vocab_size()
        if None in (self.eos, self.backtrack):
            raise UserError(f"the tokenizer lacks {BACKTRACK if self.backtrack is None else eos}")
        pieces = tok.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        self.ends_line = [piece.endswith("\n") for piece in pieces]

    @classmethod
    def digits(cls) -> "Tokenizer":
        """One token a digit, one a fixed piece of text: with whole numbers as tokens a small model fails on new targets."""
        fixed = ["###Question: numbers [", ", ", "]->target ", "\n###Response:\n", GOAL]
        special = [PAD, EOS, BACKTRACK]
        vocabulary = {piece: i for i, piece in enumerate([*special, *"0123456789", *OPS, "=", "\n", *fixed])}
        tok = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        tok.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, fixed)) + r"|[0-9]|\n|."), "isolated")
        tok.decoder = decoders.Fuse()
        tok.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        return cls(tok)

    @classmethod
    def from_pretrained(cls, name: str | Path, grow: bool = False) -> "Tokenizer":
        """The tokenizer in a folder or of a Hub id; `grow` adds `<backtrack>` where it is lacking. Raises UserError."""
        folder = checkpoint_folder(name)
        eos = read_json(folder / "tokenizer_config.json").get("eos_token", EOS)
        try:
            tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:                                     # the library raises bare Exceptions
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        if grow:
            tok.add_special_tokens([AddedToken(BACKTRACK, special=True, normalized=False)])       # its old id, if it is there
        return cls(tok, eos["content"] if isinstance(eos, dict) else eos)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them."""
        eos = self.tok.id_to_token(self.eos)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": eos,
                  "pad_token": eos if self.tok.token_to_id(PAD) is None else PAD}
        with replacing(folder) as new:
            self.tok.save(str(new / "tokenizer.json"))
            (new / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def prompts(self, problems: list[dict]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tok.encode_batch([prompt_text(p["nums"], p["target"]) for p in problems])]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of response tokens, `<backtrack>` included, without end-of-text."""
        return self.tok.decode([i for i in tokens if i != self.eos], skip_special_tokens=False)

    def rows(self, rows: list[dict], mask: str = "action") -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) of each row {nums, target, search_path}, end-of-text included. Label -100 carries no loss: the
        prompt and, before `<backtrack>`, the wrong action with its newline (section 4.1), or as many as `wrong` says. The model
        learns to step back from mistakes, never to make them. mask="choice" goes beyond the paper: where a wrong action's
        result is right (the choice was wrong), the result is learned. Else every last step with a loss makes the target, and
        the model comes to claim it after any. Offsets in one encoding of the whole text say which tokens have a masked
        character."""
        prompts = [prompt_text(row["nums"], row["target"]) for row in rows]
        encoded, out = self.tok.encode_batch([p + row["search_path"] for p, row in zip(prompts, rows)]), []
        for prompt, row, encoding in zip(prompts, rows, encoded):
            body, back, _ = row["search_path"].rpartition(BACKTRACK)
            hidden, at = bytearray(b"\1" * len(prompt)) + bytes(len(row["search_path"])), len(prompt) + len(body)
            actions = re.findall(".*\n|.+", body) if back and mask != "none" else []
            for action in reversed(actions[-(row.get("wrong") or 1):]):                       # from the end, where `at` is
                at -= len(action)
                step = re.fullmatch(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,20})\n", action)
                right = step and calculate(int(step[1]), step[2], int(step[3])) == int(step[4])
                end = step.end(3) + 1 if mask == "choice" and right else len(action)
                hidden[at:at + end] = b"\1" * end
            labels = [-100 if start == end or hidden.find(1, start, end) >= 0 else i
                      for i, (start, end) in zip(encoding.ids, encoding.offsets)]
            out.append((encoding.ids + [self.eos], labels + [self.eos]))
        return out

def main() -> None:
    args = Arguments("Generate Countdown data: training rows and two validation splits, as JSON Lines.")
    args.add_argument("--num", type=number(int, 1), default=500_000, help="training rows")
    args.add_argument("--num_val", type=number(int, 1), default=5_000, help="problems in each of val and val_new")
    args.add_argument("--sizes", type=int, choices=range(2, 6), nargs="+", default=[4], help="how many numbers; or several")
    args.add_argument("--seed", type=number(int, 0), default=0)
    args.add_argument("--out", default="data", help="the folder to write to")
    args = args.parse_args()
    record = new_record(args.seed, args.sizes)
    with replacing(args.out) as new, Pool() as pool:
        for split, num in zip(SPLITS, (args.num, args.num_val, args.num_val)):
            with open(new / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for row in tqdm(generate(record, split, num, over=pool.imap), desc=split, total=num, unit=" rows"):
                    file.write(json.dumps(row) + "\n")
        (new / "record.json").write_text(json.dumps(record) + "\n")
    print(f"wrote {args.num} training rows and twice {args.num_val} validation problems to {args.out}")

if __name__ == "__main__":
    cli(main)
