"""Measure every decoder on one checkpoint: the tables of the README and what figures.py draws, as JSON lines.

    torchrun --nproc_per_node=2 -- assets/measure.py              the shipped model; each process takes a split

A line has the decoder and its flags, accuracy (selected, verified), sampled tokens a problem and seconds; one also has, for
every kind of mistake (paper, section 4.1), how many samples made it first and how many of these said `<backtrack>` right after.
"""
import json
import re
import sys
import time
from collections import Counter
from functools import cache
from itertools import product, zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import BACKTRACK, GOAL, SPLITS, Tokenizer, calculate, load_record, load_rows, solvable  # noqa: E402
from model import Arguments, Llama, best_dtype, cli, number, replacing, start  # noqa: E402
from search import PAPER, SHIPPED, decode, gather, judge  # noqa: E402

LINES = [("greedy", {}), ("beam", {"n": 32}),
         *(("best_of_n", {"n": n, **PAPER}) for n in (8, 16, 32)),
         *(("self_backtrack", {"b": 1, "n": n, **PAPER}) for n in (8, 32)),
         *(("best_of_n", {"n": n}) for n in (8, 16, 32, 128)),
         *(("self_backtrack", {"b": b, "n": n}) for b, n in ((1, 8), (1, 32), (1, 128), (3, 8), (3, 32), (7, 32)))]
LOOKED_INTO = ("best_of_n", {"n": 32})                                       # the line whose samples' mistakes are counted


@cache
def can_reach(left: tuple[int, ...], target: int) -> bool:
    return bool(solvable(np.array([left]), np.array([target]))[0]) if len(left) > 1 else left == (target,)


def first_mistake(nums: list[int], target: int, response: str) -> tuple[str, bool]:
    """The kind of the first wrong action of a response ("none" if all are right), and whether `<backtrack>` follows at once."""
    actions, left = response.removesuffix(BACKTRACK).removesuffix(GOAL).removesuffix("\n").split("\n"), Counter(nums)
    for i, action in enumerate(actions, 1):
        caught = i == len(actions) and response.endswith(BACKTRACK)
        step = re.fullmatch(r"([0-9]{1,9})([-+*/])([0-9]{1,9})=([0-9]{1,9})", action)
        if not step:
            return "no action", caught
        a, op, b, result = int(step[1]), step[2], int(step[3]), int(step[4])
        if calculate(a, op, b) != result:
            return "computational", caught
        left.subtract([a, b])
        if min(left[a], left[b]) < 0:
            return "rule violation", caught
        left[result] += 1
        if not can_reach(tuple(sorted(left.elements())), target):
            return "exploratory", caught
    return "none", response.endswith(BACKTRACK)


def main() -> None:
    args = Arguments("Measure every decoder on a checkpoint.")
    args.add_argument("--ckpt", default=str(SHIPPED), help="a folder or Hub id")
    args.add_argument("--num", type=number(int, 1), default=500, help="problems a split")
    args.add_argument("--out", type=Path, default=ROOT / "assets" / "results.jsonl")
    args = args.parse_args()
    device, rank, world = start()
    tok, record = Tokenizer.from_pretrained(args.ckpt), load_record(args.ckpt)
    model = Llama.from_pretrained(args.ckpt, device, best_dtype(device)).eval()
    lines, todo = [], list(product(LINES, SPLITS[1:]))
    for (decoder, flags), split in tqdm(todo[rank::world], unit=" lines", disable=rank > 0):
        problems, begin, rows, first = load_rows(split, record, args.num), time.perf_counter(), [], Counter()
        for i, samples in decode(model, tok, problems, range(len(problems)), decoder, **flags):
            rows.append(judge(tok, problems[i], samples, decoder))
            for tokens, times in Counter(s.tokens for s in samples).items() if (decoder, flags) == LOOKED_INTO else ():
                first[first_mistake(problems[i]["nums"], problems[i]["target"], tok.decode(tokens))] += times
        line = {"decoder": decoder, **flags, "split": split, "num": len(rows)}
        line |= {name: round(100 * sum(row[key] for row in rows) / len(rows), 2)
                 for name, key in (("selected", "correct"), ("verified", "verified"))}
        line["tokens"] = round(sum(row["tokens"] for row in rows) / len(rows), 1)
        line["seconds"] = round(time.perf_counter() - begin, 1)
        if first:
            line["first_mistake"] = {kind: [first[kind, False] + first[kind, True], first[kind, True]] for kind, _ in first}
        lines.append(line)
        tqdm.write(json.dumps(line))
    lines = [line for group in zip_longest(*gather(lines, device)) for line in group if line]        # in LINES' order
    if rank == 0:
        with replacing(args.out.parent) as new:
            (new / args.out.name).write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    cli(main)
