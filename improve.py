"""Self-improvement: expert iteration turns slow search into fast answers (paper, section 4.3). Read
last.

Each round searches fresh training problems (of a dataset: its training rows), keeps the answers
that verify and fine-tunes on them; beyond the paper, it learns from its failures, too. The
validation problems that accuracy is reported on are never searched: no training stream holds them.

    python improve.py --ckpt checkpoint
"""

import argparse
import json
from pathlib import Path

import torch

from data import BACKTRACK, Tokenizer, load_record, load_rows
from model import Arguments, Llama, UserError, best_dtype, cli, number, replacing, start
from search import Settings, compare, evaluate
from train import Batches, fit, save


def expert_iteration(
    model: Llama, tokenizer: Tokenizer, record: dict, validation: dict, options: argparse.Namespace
) -> None:
    """Every round goes on from the model of the round before, with problems that are new and an
    optimizer that is new. `record`: where the problems come from; `validation`: {split: problems}
    to measure on. Raises UserError."""
    settings = Settings(b=options.b, n=options.n, seed=options.seed)
    measure(model, tokenizer, validation, settings, options, 0, "before")
    for round_number in range(1, options.rounds + 1):
        rows = load_rows("train", record, options.num, options.num * (round_number - 1))
        solved = improve(model, tokenizer, rows, settings, record, options, round_number)
        title = f"round {round_number} (solved {solved} of {len(rows)})"
        measure(model, tokenizer, validation, settings, options, round_number, title)
        if start()[1] == 0:  # one of the ranks is enough
            save(options.out, model, tokenizer, record)


def improve(model, tokenizer, rows, settings, record, options, round_number: int) -> int:
    """One round: search the problems of `rows`, keep what verifies, fine-tune on it. Returns how
    many problems were solved. Raises UserError if none was."""
    answers = evaluate(model, tokenizer, rows, settings)
    solved = solved_rows(rows, answers)
    mistakes = own_mistakes(rows, answers)
    if not solved:
        message = "the search solved nothing to learn from: start from a better checkpoint"
        raise UserError(message)
    # at most as many mistakes as answers; and, lest it forget how to step back, some of D_back
    back = [row for row in rows if row["search_path"].endswith(BACKTRACK)]
    kept_rows = solved + mistakes[: len(solved)] + back[: len(solved) // 10]
    fine_tune(model, tokenizer, kept_rows, record, options, options.seed + round_number)
    return len(solved)


def solved_rows(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_op from what the search found: of each problem the best candidate that verifies, if there
    is one, even where the search chose another that does not."""
    kept_rows = []
    for row, answer in zip(rows, answers):
        for solution in answer["solutions"][:1]:
            kept_rows.append(training_row(row, solution, no_loss=[]))
    return kept_rows


def own_mistakes(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_back from chosen answers that are wrong, cut after the first action that fails. All actions
    up to it are named in `no_loss`, for nobody knows which of them led astray."""
    kept_rows = []
    for row, answer in zip(rows, answers):
        if answer["failed_step"]:
            actions = answer["response"].split("\n")[: answer["failed_step"]]  # it counts from 1
            response = "\n".join([*actions, BACKTRACK])
            kept_rows.append(training_row(row, response, no_loss=list(range(len(actions)))))
    return kept_rows


def training_row(problem: dict, response: str, no_loss: list[int]) -> dict:
    nums, target = problem["nums"], problem["target"]
    return {"nums": nums, "target": target, "search_path": response, "no_loss": no_loss}


def fine_tune(model, tokenizer, kept_rows, record, options, seed: int) -> None:
    """A few epochs over what a round has kept, by the optimizer and the mask that the checkpoint
    was trained with (where train.py made it, and its record says so)."""
    device, rank, world = start()
    training = record.get("settings", {})
    uses_muon = training.get("optimizer") == "muon"
    loss_mask = training.get("mask", "action")
    learning_rate = options.lr or (2e-3 if uses_muon else 1e-5)
    batches = Batches(kept_rows, tokenizer, options.batch_size, 1, seed, rank, world, loss_mask)
    total_steps = -(-len(kept_rows) * options.epochs // batches.step_rows)  # rounded up
    fit(
        model,
        batches,
        total_steps,
        learning_rate,
        warmup=10,
        muon=uses_muon,
        dtype=best_dtype(device),
    )


# ==== Plumbing: a first reading may stop here =====================================================


def measure(
    model, tokenizer, validation: dict, settings: Settings, options, round_number: int, title: str
) -> None:
    """Print the table of greedy decoding and search, and add a line to log.jsonl."""
    decoders = ["greedy", "self_backtrack"]
    results = compare(model, tokenizer, validation, decoders, settings, title)
    log_line = {"round": round_number}
    for (split, decoder), rows in results.items():
        log_line[f"{split}_{decoder}"] = sum(row["correct"] for row in rows) / len(rows)
    if start()[1] == 0:
        with open(options.out / "log.jsonl", "a") as log_file:
            log_file.write(json.dumps(log_line) + "\n")


def arguments() -> argparse.Namespace:
    options = Arguments("Expert iteration: search, verify, keep, fine-tune, repeat.")
    options.add_argument("--ckpt", default="checkpoint", help="a folder or Hub id")
    options.add_argument("--out", type=Path, default="improved", help="the folder to save to")
    options.add_argument("--rounds", type=number(int, 1), default=3)
    options.add_argument("--num", type=number(int, 1), default=15_000, help="problems a round")
    options.add_argument("--b", type=number(int, 0), default=1, help="how often to step back")
    options.add_argument("--n", type=number(int, 1), default=16, help="samples a state")
    options.add_argument("--epochs", type=number(int, 1), default=3, help="over what a round kept")
    options.add_argument("--lr", type=number(float, 0, True), help="Muon: 2e-3; AdamW: 1e-5")
    options.add_argument("--batch_size", type=number(int, 1), default=64)
    options.add_argument("--gradient_checkpointing", action="store_true", help="saves memory")
    options.add_argument("--num_eval", type=number(int, 1), default=300, help="problems a split")
    options.add_argument("--seed", type=number(int, 0), default=0)
    return options.parse_args()


def main() -> None:
    options = arguments()
    device, _, _ = start()
    tokenizer = Tokenizer.from_pretrained(options.ckpt)
    model = Llama.from_pretrained(options.ckpt, device, torch.float32)
    model.model.gradient_checkpointing = options.gradient_checkpointing
    with replacing(options.out):
        pass  # if it cannot be written to, say so now
    record = load_record(options.ckpt)
    validation = {split: load_rows(split, record, options.num_eval) for split in ("val", "val_new")}
    # Where data is generated: a stream that training never drew. It is saved, so that a later run
    # draws other rows again.
    record = {**record, "seed": record.get("seed", 0) + 1_000_000 * (options.seed + 1)}
    expert_iteration(model, tokenizer, record, validation, options)


if __name__ == "__main__":
    cli(main)
