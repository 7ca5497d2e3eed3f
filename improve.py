"""Self-improvement: expert iteration turns slow search into fast answers (paper, section 4.3).
Read last.

A search may find an answer only after stepping back. We keep the answer alone, as a row, without
the mistakes and the steps back that led to it. A model that is trained on such rows learns to give
the answer at once, by greedy decoding.

A round searches training problems and keeps three kinds of rows:

- D_op: for each problem with right candidates, the best of them. This is the paper's.
- D_back: answers that were selected but are wrong, cut after the action that fails, if one fails.
  (Not those that stop while numbers are left, and at most as many as there are rows of D_op.)
- D_back: rows that were made for the same problems as training data, a tenth as many as of D_op, so
  that stepping back is not forgotten.

With --paper only the first kind.

For example, the numbers 2, 4, 10, 25 and the target 60, with a right answer and with a wrong one.
`evaluate` (in search.py) returns, among other things:

    response      4-2=2 25*2=50 50+10=60 Goal Reached!      4-2=2 25*2=52 52+8=60 Goal Reached!
    correct       True                                      False
    solutions     ["4-2=2 25*2=50 50+10=60 Goal Reached!"]  []
    failed_action None                                      2

The first becomes the row of D_op `4-2=2 25*2=50 50+10=60 Goal Reached!`, the second the row of
D_back `4-2=2 25*2=52 <backtrack>`. For the mask its two actions count as wrong. (Blanks stand for
newlines.)

Accuracy is reported on validation problems, which are never trained on.

    python improve.py --ckpt checkpoint
"""

import argparse
import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data import BACKTRACK, Tokenizer, load_record, load_rows, load_validation, whole_path
from model import RESUME, Arguments, Llama, UserError, above, at_least, best_dtype, cli
from model import check_writable, device_rank_world, is_main, note
from search import PAPER_SEARCH, Settings, compare, evaluate
from train import PAPER_TRAINING, Batches, Training, as_flags, fit, load_state, rebuild, save
from train import typed_flags

# How a round trains on the rows that it keeps; without weight decay, as in the reference. It suits
# a small model that has been trained well. One that has seen few solutions gains more from a larger
# lr (assets/NOTES.md). Optimizer and mask are the checkpoint's: see `training_settings`.
TUNING = Training(lr=2e-4, warmup=10, weight_decay=0.0)
EPOCHS = 3


def expert_iteration(
    model: Llama, tokenizer: Tokenizer, record: dict, validation: dict, options, rounds_done, log
) -> None:
    """Measure; then, round after round, improve, save the weights, measure, and save again with
    this measurement. Every round continues with the model of the round before, on the next
    problems, with a new optimizer.

    record: the source of the problems, unless --data gives another. validation: {split: problems}
    to measure on. log: a line for every measurement. Raises UserError."""
    settings = search_settings(options)
    training = training_settings(options, record)
    source = {"source": options.data} if options.data else record
    for done in range(rounds_done, options.rounds + 1):  # `done` rounds are complete
        if len(log) == done:  # log[done] is the measurement after them
            log.append(measure(model, tokenizer, validation, settings, done))
            if done > 0:
                save_round(model, tokenizer, record, log, options, done)
        if done == options.rounds:
            return
        rows = load_rows("train", source, options.num, options.num * done)
        improve(
            model,
            tokenizer,
            rows,
            settings,
            training,
            options.epochs,
            only_solved=options.paper,
            round_number=done + 1,
        )
        save_round(model, tokenizer, record, log, options, done + 1)


def improve(
    model: Llama,
    tokenizer: Tokenizer,
    rows: list[dict],
    settings: Settings,
    training: Training = TUNING,
    epochs: int = EPOCHS,
    only_solved: bool = False,
    round_number: int = 1,
) -> None:
    """One round: search the problems of `rows`, keep three kinds of rows (only_solved: the paper's
    alone), fine-tune on them. Raises UserError if the search solved none."""
    answers = evaluate(copy_to_search(model), tokenizer, rows, settings)
    solved = solved_rows(rows, answers)
    mistakes = own_mistakes(rows, answers)
    if not solved:
        raise UserError("the search solved nothing to learn from: start from a better checkpoint")
    back = [row for row in rows if row.get("search_path", "").endswith(BACKTRACK)]
    kept_rows = solved
    if not only_solved:
        # at most as many mistakes as solutions, and a tenth as many of the usual D_back
        kept_rows = solved + mistakes[: len(solved)] + back[: len(solved) // 10]
    fine_tune(model, tokenizer, kept_rows, training, epochs, settings.seed + round_number)
    if is_main():
        found = f"solved {len(solved)} of {len(rows)}, trained on {len(kept_rows)} rows"
        print(f"round {round_number}: {found}", flush=True)


def copy_to_search(model: Llama) -> Llama:
    """A copy in the device's best dtype, as search.py opens it. (Training needs the weights in
    fp32.)"""
    copied = copy.deepcopy(model)
    dtype = best_dtype(device_rank_world()[0])
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied


def solved_rows(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_op from what the search found: for each problem the best candidate that verifies, if there
    is one, even if the search selected another that does not."""
    kept_rows = []
    for row, answer in zip(rows, answers):
        if answer["solutions"]:
            kept_rows.append(training_row(row, answer["solutions"][0], no_loss=[]))
    return kept_rows


def own_mistakes(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_back from answers that were selected but are wrong. They are cut after the action that
    fails; if none fails, and only the last result misses the target, they are kept whole. (If an
    answer stops while numbers are left, it may be right so far, and is not used.) For the mask
    all actions count as wrong (no_loss): an earlier one may already have lost the target."""
    kept_rows = []
    for row, answer in zip(rows, answers):
        if answer["correct"] or not answer["response"]:
            continue
        actions = answer["response"].split("\n")[:-1]  # without `Goal Reached!`
        uses_all = len(actions) == len(row["nums"]) - 1
        if answer["failed_action"]:
            actions = actions[: answer["failed_action"]]  # including it: failed_action is 1-based
        elif not uses_all:
            continue
        response = "\n".join([*actions, BACKTRACK])
        kept_rows.append(training_row(row, response, no_loss=list(range(len(actions)))))
    return kept_rows


def training_row(problem: dict, response: str, no_loss: list[int]) -> dict:
    nums, target = problem["nums"], problem["target"]
    return {"nums": nums, "target": target, "search_path": response, "no_loss": no_loss}


def fine_tune(
    model, tokenizer, kept_rows: list[dict], training: Training, epochs: int, seed: int
) -> None:
    """A few epochs over the rows that a round has kept."""
    device, rank, world = device_rank_world()
    batches = Batches(
        kept_rows, tokenizer, training.batch_size, 1, seed, rank, world, training.mask
    )
    steps = math.ceil(len(kept_rows) * epochs / batches.rows_per_step)
    fit(model, batches, steps, training, dtype=best_dtype(device))


# ==== Plumbing: a first reading may stop here =====================================================


def search_settings(options: argparse.Namespace) -> Settings:
    chosen = dict(PAPER_SEARCH) if options.paper else {}
    if options.temperature is not None:
        chosen["temperature"] = options.temperature
    return Settings(b=options.b, n=options.n, seed=options.seed, **chosen)


def training_settings(options: argparse.Namespace, record: dict) -> Training:
    """The optimizer and the mask are those of the checkpoint's own training, if its record has
    them, and else the paper's."""
    trained_with = record.get("settings", {})
    optimizer = trained_with.get("optimizer", PAPER_TRAINING.optimizer)
    mask = trained_with.get("mask", PAPER_TRAINING.mask)
    lr = options.lr or (TUNING.lr if optimizer == "muon" else PAPER_TRAINING.lr)
    return replace(TUNING, batch_size=options.batch_size, lr=lr, optimizer=optimizer, mask=mask)


def measure(model, tokenizer, validation: dict, settings: Settings, rounds_done: int) -> dict:
    """Print a table of greedy decoding and search. Returns the line for log.jsonl."""
    title = f"after round {rounds_done}" if rounds_done else "before"
    decoders = ["greedy", "self_backtrack"]
    results = compare(copy_to_search(model), tokenizer, validation, decoders, settings, title)
    log_line = {"round": rounds_done}
    for (split, decoder), rows in results.items():
        log_line[f"{split}_{decoder}"] = sum(row["correct"] for row in rows) / len(rows)
    return log_line


def save_round(model, tokenizer, record: dict, log: list[dict], options, rounds_done: int) -> None:
    """Save, so that --resume continues after this round."""
    if is_main():
        settings = vars(options).copy()
        del settings["out"], settings["resume"]
        save(
            options.out, model, tokenizer, record, log, {"round": rounds_done, "settings": settings}
        )


def arguments() -> tuple[argparse.Namespace, dict | None]:
    """The command line, and with --resume the state of the run: its saved settings are then the
    defaults. Raises UserError."""
    options = Arguments("Expert iteration: search, verify, keep, fine-tune, repeat.")
    add = options.add_argument_group("what to improve, and where to save it").add_argument
    add("--ckpt", type=whole_path, default="checkpoint", help="a folder or Hub id")
    add("--data", type=whole_path, help="problems; default: drawn like its own")
    add("--out", metavar="DIR", type=Path, default="improved", help="the folder to save to")
    add("--resume", action="store_true", help="continue after --out's last round")
    add("--rounds", metavar="N", type=at_least(1), default=3, help="rounds of improvement")
    add("--num_eval", metavar="N", type=at_least(1), default=300, help="problems in each split")
    add = options.add_argument_group("the search of a round").add_argument
    add("--num", metavar="N", type=at_least(1), default=15_000, help="problems of each round")
    add("--b", metavar="B", type=at_least(0), default=1, help="rounds of stepping back")
    add("--n", metavar="N", type=at_least(1), default=16, help="samples of the prompt")
    add("--temperature", metavar="X", type=at_least(0.001), help="default: search.py's")
    add("--paper", action="store_true", help="search, and keep rows, as the paper does")
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of problems and samples")
    add = options.add_argument_group("training on what it kept").add_argument
    add("--epochs", metavar="N", type=at_least(1), default=EPOCHS, help="over these rows")
    add("--lr", metavar="X", type=above(0.0), help="default: 2e-4, or AdamW's 1e-5")
    add(
        "--batch_size",
        metavar="N",
        type=at_least(1),
        default=TUNING.batch_size,
        help="rows on each device",
    )
    switch = argparse.BooleanOptionalAction
    add("--gradient_checkpointing", action=switch, help="saves memory")
    known = options.parse_known_args()[0]
    if not known.resume:
        if (known.out / RESUME).exists():
            note(f"the first round will replace the run in {known.out}: --resume would continue it")
        return options.parse_args(), None
    if "--ckpt" in typed_flags():
        note(f"--resume continues the run in {known.out}: --ckpt has no effect")
    state = load_state(known.out, ("round", "settings"))
    options = options.parse_args(as_flags(state["settings"]) + sys.argv[1:])
    if state["round"] >= options.rounds:
        note(
            f"{options.out} is after round {state['round']} of {options.rounds}: increase --rounds"
        )
    return options, state


def main() -> None:
    options, state = arguments()
    device = device_rank_world()[0]
    tokenizer = Tokenizer.from_pretrained(options.out if state else options.ckpt)
    check_writable(options.out)
    if state:
        model = rebuild(options.out, state).to(device)
        record = state["record"]
    else:
        state = {"round": 0, "log": []}
        model = Llama.from_pretrained(options.ckpt, device, torch.float32)
        record = load_record(options.ckpt)
        # Generated problems are drawn with another seed than in training. (With three numbers about
        # half recur from training; none are validation's.) The new seed is saved with the model, so
        # that improving the improved one uses yet another.
        record["seed"] = record.get("seed", 0) + 1_000_000 * (options.seed + 1)
    model.model.gradient_checkpointing = options.gradient_checkpointing
    if is_main():
        print(f"each round is saved to {options.out}", flush=True)
    validation = load_validation(record, options.num_eval)
    expert_iteration(model, tokenizer, record, validation, options, state["round"], state["log"])


if __name__ == "__main__":
    cli(main)
