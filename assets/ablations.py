"""What is each part of the training worth? Small models on four numbers, with one part left out,
equally many rows each, two seeds: a line a model in ablations.jsonl, and a table.

    OMP_NUM_THREADS=1 python assets/ablations.py --seeds 0 &    a seed a core: 2.5 hours
    OMP_NUM_THREADS=1 python assets/ablations.py --seeds 1
    python assets/ablations.py                                  both in one table

Each model is trained by train.py, into a folder below --out, and measured as measure.py does.
What is complete is not done again: other settings want another --out.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from measure import JUDGEMENT, judge_actions, measure_decoder

ROOT = Path(__file__).parent.parent

from data import KINDS, Tokenizer, load_record, load_rows  # noqa: E402  measure made it findable
from model import Arguments, Llama, UserError, best_dtype, at_least, cli, device_rank_world  # noqa: E402


def without(kind: str) -> list[str]:
    return ["--mistakes", *(other for other in KINDS if other != kind)]


VARIANTS = {
    "all of it": [],
    "without D_back": ["--mistakes"],
    "without exploratory mistakes": without("exploratory"),
    "the paper's mask": ["--mask", "action"],
    "no mask": ["--mask", "none"],
}
BATCH_SIZE = 64
DECODERS = [
    {"decoder": "greedy"},
    {"decoder": "best_of_n", "n": 32},
    {"decoder": "self_backtrack", "b": 1, "n": 32},
]


def train(folder: Path, flags: list[str], seed: int, args) -> None:
    """Raises UserError."""
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(folder), "--seed", str(seed)]
    if (folder / "resume.pt").exists():
        command += ["--resume"]
    else:
        command += ["--sizes", "4", "--any_target", "1", "--num_eval", "100", *flags]
        command += ["--hidden_size", str(args.hidden_size), "--layers", str(args.layers)]
        command += ["--batch_size", str(BATCH_SIZE), "--compile"]
    steps = ["--steps", str(args.steps), "--eval_every", str(max(args.steps // 4, 1))]
    if subprocess.run([*command, *steps]).returncode:
        raise UserError("train.py failed, see above")


def measure(folder: Path, num: int) -> list[dict]:
    """A line for each decoder and split, and one for the judgement of `<backtrack>`."""
    device = device_rank_world()[0]
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Llama.from_pretrained(folder, device, best_dtype(device)).eval()
    lines = []
    for flags, split in product([*DECODERS, JUDGEMENT], ("val", "val_new")):
        problems = load_rows(split, load_record(folder), num)
        if flags == JUDGEMENT:
            found = {"judgement": judge_actions(model, tokenizer, problems[:100])}
        else:
            found = {**flags, **measure_decoder(model, tokenizer, problems, flags)}
        lines.append({"split": split, **found})
    return lines


def table(runs: list[dict]) -> list[str]:
    """In percent, seen / new targets; a line for each seed."""
    printed = ["| | seed | greedy | best of 32 | b = 1, n = 32 | verified | area |"]
    printed.append("|---|---|---|---|---|---|---|")
    for run in sorted(runs, key=lambda run: list(VARIANTS).index(run["variant"])):
        cells = [run["variant"], str(run["seed"])]
        for flags in DECODERS:
            cells.append(both(run, flags, "selected"))
        cells.append(both(run, DECODERS[-1], "verified"))
        areas = [line["judgement"] for line in run["lines"] if "judgement" in line]
        areas = [area["first_action"]["area_wrong_other_right"] for area in areas]
        cells.append(" / ".join(f"{area:.2f}" for area in areas))
        printed.append(f"| {' | '.join(cells)} |")
    return printed


def both(run: dict, flags: dict, key: str) -> str:
    found = [line[key][0] for line in run["lines"] if flags.items() <= line.items()]
    return " / ".join(f"{share:.1f}" for share in found)


def main() -> None:
    args = Arguments("Train and measure small models, each without one part of the training.")
    args.add_argument("--steps", type=at_least(1), default=6000, help="of a model")
    args.add_argument("--hidden_size", type=at_least(32), default=128)
    args.add_argument("--layers", type=at_least(1), default=6)
    args.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1])
    args.add_argument("--num", type=at_least(1), default=500, help="problems a split")
    args.add_argument("--out", type=Path, default=Path("ablations"), help="the models' folder")
    args = args.parse_args()
    runs = []
    for seed, (variant, flags) in product(args.seeds, VARIANTS.items()):
        folder = args.out / f"{variant.replace(' ', '_')}-{seed}".replace("'", "")
        measured = folder / "measured.json"
        if not measured.exists():
            train(folder, flags, seed, args)
            run = {"variant": variant, "seed": seed, "rows": BATCH_SIZE * args.steps}
            measured.write_text(json.dumps({**run, "lines": measure(folder, args.num)}) + "\n")
        runs.append(json.loads(measured.read_text()))
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    (ROOT / "assets" / "ablations.jsonl").write_text(lines)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    cli(main)
