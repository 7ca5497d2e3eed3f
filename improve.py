"""Self-improvement: expert iteration turns slow search into fast answers (paper, section 4.3). Read
last.

A search may find an answer only after stepping back. The row that is kept holds this answer alone,
without the mistakes and the steps back that led to it. A model that is trained on such rows comes
to give the answer at once, by greedy decoding.

A round searches training problems and keeps three kinds of rows:

- D_op: of each problem that was solved, the best right answer. This is the paper's.
- D_back: answers that were chosen but are wrong, cut after the action that fails (if any does).
- D_back: a few rows of the usual training data, so that stepping back is not forgotten.

For example, `evaluate` (in search.py) says of two problems, both with the numbers 2, 4, 10, 25 and
the target 60, among other things:

    response      4-2=2 25*2=50 50+10=60 Goal Reached!      4-2=2 25*2=52 52+8=60 Goal Reached!
    correct       True                                      False
    solutions     ["4-2=2 25*2=50 50+10=60 Goal Reached!"]  []
    failed_action None                                      2

The first becomes the row of D_op `4-2=2 25*2=50 50+10=60 Goal Reached!`, the second the row of
D_back `4-2=2 25*2=52 <backtrack>`, whose two actions are named in `no_loss`. (Blanks stand for
newlines.)

The validation problems that accuracy is reported on are never trained on.

    python improve.py --ckpt checkpoint
"""

import argparse
import copy
import sys
from pathlib import Path

import torch

from data import BACKTRACK, Tokenizer, load_record, load_rows, load_validation, whole_path
from model import RESUME, Arguments, Llama, UserError, best_dtype, cli, device_rank_world, is_main
from model import note, number, replacing
from search import PAPER_SEARCH, Settings, compare, evaluate
from train import Batches, as_flags, fit, load_state, rebuild, save, typed_flags


def expert_iteration(
    model: Llama, tokenizer: Tokenizer, record: dict, validation: dict, options, rounds_done, log
) -> None:
    """Measure; then, round after round, improve, save, measure and save. Every round goes on from
    the model of the round before, with the next problems and a new optimizer.

    record: where problems come from, if not from --data (generated ones are new: `main` gives the
    record a seed that training did not have); validation: {split: problems} to measure on; log: a
    line of every round. Raises UserError."""
    settings = search_settings(options)
    source = {"source": options.data} if options.data else record
    for done in range(rounds_done, options.rounds + 1):  # how many rounds are done, at first none
        is_measured = len(log) > done  # by the run that is resumed
        if not is_measured:
            log.append(measure(model, tokenizer, validation, settings, done))
            save_round(model, tokenizer, record, log, options, done)
        if done < options.rounds:
            rows = load_rows("train", source, options.num, options.num * done)
            improve(model, tokenizer, rows, settings, record, options, done + 1)
            save_round(model, tokenizer, record, log, options, done + 1)


def improve(model, tokenizer, rows, settings, record, options, round_number: int) -> None:
    """One round: search the problems of `rows`, keep three kinds of rows, fine-tune on them. Raises
    UserError if the search solved none."""
    answers = evaluate(copy_to_search(model), tokenizer, rows, settings)
    solved = solved_rows(rows, answers)
    mistakes = own_mistakes(rows, answers)
    if not solved:
        raise UserError("the search solved nothing to learn from: start from a better checkpoint")
    # at most as many mistakes as solutions, and some of D_back
    back = [row for row in rows if row.get("search_path", "").endswith(BACKTRACK)]
    kept_rows = solved + mistakes[: len(solved)] + back[: len(solved) // 10]
    fine_tune(model, tokenizer, kept_rows, record, options, options.seed + round_number)
    if is_main():
        found = f"solved {len(solved)} of {len(rows)}, trained on {len(kept_rows)} rows"
        print(f"round {round_number}: {found}", flush=True)


def copy_to_search(model: Llama) -> Llama:
    """A copy in the device's best dtype, in which search.py searches, too. (Training goes on with
    the weights in fp32.)"""
    copied = copy.deepcopy(model)
    dtype = best_dtype(device_rank_world()[0])
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied


def solved_rows(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_op from what the search found: of each problem the best candidate that verifies, if there
    is one, even where the search chose another that does not."""
    kept_rows = []
    for row, answer in zip(rows, answers):
        for solution in answer["solutions"][:1]:  # one, or none
            kept_rows.append(training_row(row, solution, no_loss=[]))
    return kept_rows


def own_mistakes(rows: list[dict], answers: list[dict]) -> list[dict]:
    """D_back from answers that were chosen but are wrong: cut after the action that fails, or whole
    where only the end misses the target. All actions are named in `no_loss`: an earlier one may
    have lost the target already. (An answer that stops while numbers are left is not used: it may
    be right so far.)"""
    kept_rows = []
    for row, answer in zip(rows, answers):
        actions = answer["response"].split("\n")[:-1]  # without `Goal Reached!`
        uses_all = len(actions) == len(row["nums"]) - 1
        if answer["failed_action"]:
            actions = actions[: answer["failed_action"]]  # up to and with it: it counts from 1
        elif answer["correct"] or not uses_all:
            continue
        response = "\n".join([*actions, BACKTRACK])
        kept_rows.append(training_row(row, response, no_loss=list(range(len(actions)))))
    return kept_rows


def training_row(problem: dict, response: str, no_loss: list[int]) -> dict:
    nums, target = problem["nums"], problem["target"]
    return {"nums": nums, "target": target, "search_path": response, "no_loss": no_loss}


def fine_tune(model, tokenizer, kept_rows, record, options, seed: int) -> None:
    """A few epochs over what a round has kept, with the optimizer and mask of the checkpoint's own
    training, if its record tells them; else with the paper's. No weight decay, as in the
    reference. The default learning rate is for a model that is trained well; one that has seen few
    solutions gains more by a larger one (assets/NOTES.md)."""
    device, rank, world = device_rank_world()
    training = record.get("settings", {})
    uses_muon = training.get("optimizer") == "muon"
    loss_mask = training.get("mask", "action")
    peak_lr = options.lr or (2e-4 if uses_muon else 1e-5)
    batches = Batches(kept_rows, tokenizer, options.batch_size, 1, seed, rank, world, loss_mask)
    steps = -(-len(kept_rows) * options.epochs // batches.rows_per_step)  # rounded up
    dtype = best_dtype(device)
    fit(model, batches, steps, peak_lr, 10, weight_decay=0.0, muon=uses_muon, dtype=dtype)


# ==== Plumbing: a first reading may stop here =====================================================


def search_settings(options: argparse.Namespace) -> Settings:
    chosen = dict(PAPER_SEARCH) if options.paper else {}
    if options.temperature is not None:
        chosen["temperature"] = options.temperature
    return Settings(b=options.b, n=options.n, seed=options.seed, **chosen)


def measure(model, tokenizer, validation: dict, settings: Settings, rounds_done: int) -> dict:
    """Print the table of greedy decoding and search; the line of log.jsonl."""
    title = f"after round {rounds_done}" if rounds_done else "before"
    decoders = ["greedy", "self_backtrack"]
    results = compare(copy_to_search(model), tokenizer, validation, decoders, settings, title)
    log_line = {"round": rounds_done}
    for (split, decoder), rows in results.items():
        log_line[f"{split}_{decoder}"] = sum(row["correct"] for row in rows) / len(rows)
    return log_line


def save_round(model, tokenizer, record: dict, log: list[dict], options, rounds_done: int) -> None:
    """Save, from where --resume goes on."""
    if is_main() and rounds_done:  # one of the ranks is enough
        settings = vars(options).copy()
        del settings["out"], settings["resume"]
        save(
            options.out, model, tokenizer, record, log, {"round": rounds_done, "settings": settings}
        )


def arguments() -> tuple[argparse.Namespace, dict | None]:
    """The command line; and with --resume the state of the run, whose own settings count where
    none are given. Raises UserError."""
    options = Arguments("Expert iteration: search, verify, keep, fine-tune, repeat.")
    add = options.add_argument_group("what to improve, and where to save it").add_argument
    add("--ckpt", type=whole_path, default="checkpoint", help="a folder or Hub id")
    add("--data", type=whole_path, help="problems; else as in its training")
    add("--out", metavar="DIR", type=Path, default="improved", help="the folder to save to")
    add("--resume", action="store_true", help="go on after --out's last round")
    add("--num_eval", metavar="N", type=number(int, 1), default=300, help="problems a split")
    add = options.add_argument_group("the search of a round").add_argument
    add("--rounds", metavar="N", type=number(int, 1), default=3, help="how many")
    add("--num", metavar="N", type=number(int, 1), default=15_000, help="problems a round")
    add("--b", metavar="B", type=number(int, 0), default=1, help="how often to step back")
    add("--n", metavar="N", type=number(int, 1), default=16, help="samples a state")
    add("--temperature", metavar="X", type=number(float, 0.001), help="else search.py's")
    add("--paper", action="store_true", help="search by the paper's rule")
    add("--seed", metavar="N", type=number(int, 0), default=0, help="of problems")
    add = options.add_argument_group("training on what it kept").add_argument
    add("--epochs", metavar="N", type=number(int, 1), default=3, help="over what it kept")
    add("--lr", metavar="X", type=number(float, 0, True), help="else 2e-4; 1e-5 of AdamW")
    add("--batch_size", metavar="N", type=number(int, 1), default=64, help="rows")
    switch = argparse.BooleanOptionalAction
    add("--gradient_checkpointing", action=switch, help="saves memory")
    known = options.parse_known_args()[0]
    if not known.resume:
        if (known.out / RESUME).exists():
            note(
                f"the first round will replace the run in {known.out}: --resume would go on with it"
            )
        return options.parse_args(), None
    if "--ckpt" in typed_flags():
        note(f"--resume goes on from {known.out}: --ckpt has no effect")
    state = load_state(known.out, ("round", "settings"))
    options = options.parse_args(as_flags(state["settings"]) + sys.argv[1:])
    if state["round"] >= options.rounds:
        note(
            f"{options.out} is after round {state['round']} of {options.rounds}: give --rounds more"
        )
    return options, state


def main() -> None:
    options, state = arguments()
    device = device_rank_world()[0]
    if not state and options.ckpt == "checkpoint":  # were it there, --ckpt would be its whole path
        raise UserError("no folder checkpoint: run train.py first, or give --ckpt")
    tokenizer = Tokenizer.from_pretrained(options.out if state else options.ckpt)
    with replacing(options.out):
        pass  # if it cannot be written to, say so now
    if state:
        model = rebuild(options.out, state).to(device)
        record = state["record"]
    else:
        state = {"round": 0, "log": []}
        model = Llama.from_pretrained(options.ckpt, device, torch.float32)
        record = load_record(options.ckpt)
        # Of generated data: another seed than training had, so that its problems are unseen. It is
        # saved with the model, so that improving that one again takes still another.
        record["seed"] = record.get("seed", 0) + 1_000_000 * (options.seed + 1)
    model.model.gradient_checkpointing = options.gradient_checkpointing
    if is_main():
        print(f"each round is saved to {options.out}", flush=True)
    validation = load_validation(record, options.num_eval)
    expert_iteration(model, tokenizer, record, validation, options, state["round"], state["log"])


if __name__ == "__main__":
    cli(main)
