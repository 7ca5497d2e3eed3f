"""Self-improvement: expert iteration turns slow search into fast answers (paper, section 4.3). Read last.

Each round searches fresh training problems (of a dataset: its training rows), keeps the answers that verify and fine-tunes on
them; beyond the paper, it learns from its failures, too. The validation problems that accuracy is reported on are never
searched: no training stream holds them.
"""
import json
import re
from pathlib import Path

import torch

from data import BACKTRACK, Tokenizer, load_record, load_rows
from model import Arguments, Llama, UserError, best_dtype, cli, number, replacing, start
from search import compare, evaluate
from train import Batches, fit, save

def own_mistakes(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_back from chosen answers that are wrong, cut after their first false action (`verify` says which). All actions up to it
    count as wrong, for nobody knows which of them led astray."""
    made = []
    for row, answer in zip(rows, answers):
        if false := re.match(r"step (\d+):", answer["reason"]):
            actions = answer["response"].split("\n")[:int(false[1])]
            made.append({**row, "search_path": "\n".join([*actions, BACKTRACK]), "wrong": len(actions)})
    return made

def harvest(rows: list[dict], answers: list[dict]) -> list[dict]:
    """A round's training rows: the answers that verify, at most as many of the model's own mistakes and, lest it
    forget how to step back from others, a tenth as many of D_back."""
    solved = [{**row, "search_path": answer["solution"]} for row, answer in zip(rows, answers) if answer["verified"]]
    mistakes = [row for row in rows if row["search_path"].endswith(BACKTRACK)]
    return solved + own_mistakes(rows, answers)[:len(solved)] + mistakes[:len(solved) // 10]

def main() -> None:
    args = Arguments("Expert iteration: search, verify, keep, fine-tune, repeat.")
    args.add_argument("--ckpt", default="checkpoint", help="a folder or Hub id")
    args.add_argument("--out", default="improved", help="the folder to save to, after each round")
    args.add_argument("--rounds", type=number(int, 1), default=3)
    args.add_argument("--num", type=number(int, 1), default=15_000, help="problems searched in a round")
    args.add_argument("--b", type=number(int, 0), default=1)
    args.add_argument("--n", type=number(int, 1), default=16)
    args.add_argument("--epochs", type=number(int, 1), default=3, help="over what a round has kept, about")
    args.add_argument("--lr", type=number(float, 0, strict=True), help="2e-3 by Muon, where a model was made by it; else 1e-5")
    args.add_argument("--batch_size", type=number(int, 1), default=64)
    args.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more work")
    args.add_argument("--num_eval", type=number(int, 1), default=300, help="validation problems a split")
    args.add_argument("--seed", type=number(int, 0), default=0)
    args = args.parse_args()
    device, rank, world = start()
    tok, model = Tokenizer.from_pretrained(args.ckpt), Llama.from_pretrained(args.ckpt, device, torch.float32)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    with replacing(args.out):
        pass                                                           # if it cannot be written to, say so now
    record = load_record(args.ckpt)
    settings = record.get("settings", {})                              # of the training, where it was by train.py
    muon = settings.get("optimizer") == "muon"
    lr = args.lr or (2e-3 if muon else 1e-5)
    held = {split: load_rows(split, record, args.num_eval) for split in ("val", "val_new")}
    search = {key: getattr(args, key) for key in ("b", "n", "seed")}
    def measure(round: int, title: str) -> None:
        results = compare(model, tok, held, ["greedy", "self_backtrack"], title, **search)
        line = {"_".join(key): sum(row["correct"] for row in rows) / len(rows) for key, rows in results.items()}
        if rank == 0:
            with open(Path(args.out, "log.jsonl"), "a") as log:
                log.write(json.dumps({"round": round, **line}) + "\n")
    measure(0, "before")
    fresh = {**record, "seed": record.get("seed", 0) + 1_000_000 * (args.seed + 1)}         # a stream that training never drew
    for round in range(1, args.rounds + 1):
        rows = load_rows("train", fresh, args.num, args.num * (round - 1))
        answers = evaluate(model, tok, rows, "self_backtrack", **search)
        kept = harvest(rows, answers)
        if not kept:
            raise UserError("the search solved nothing, so there is nothing to learn from: start from a better checkpoint")
        batches = Batches(kept, tok, args.batch_size, 1, args.seed + round, rank, world, settings.get("mask", "action"))
        steps = -(-len(kept) * args.epochs // batches.size)
        fit(model, batches, steps, lr, warmup=10, muon=muon, dtype=best_dtype(device))
        title = f"round {round} (solved {sum(answer['verified'] for answer in answers)} of {len(rows)})"
        measure(round, title)
        if rank == 0:
            save(Path(args.out), model, tok, fresh)                    # with the seed by which a later run draws other rows

if __name__ == "__main__":
    cli(main)
