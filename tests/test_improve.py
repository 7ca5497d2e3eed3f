"""What a round of self-improvement learns from."""

from argparse import Namespace

import pytest
import torch

import improve
from data import BACKTRACK, GOAL, Tokenizer
from model import Llama, LlamaConfig, UserError
from search import Response, Settings, judge, rate_candidates

TOKENIZER = Tokenizer.digits()
RIGHT = f"45-39=6\n10*6=60\n2+60=62\n{GOAL}"
RIGHT_TOO = f"39+45=84\n84-2=82\n82-10=72\n{GOAL}"  # for the target 72
LIE = f"45+39=84\n84-10=74\n74-2=62\n{GOAL}"


def problem(path: str = "45-39=7\n" + BACKTRACK, target: int = 62) -> dict:
    return {"nums": [2, 39, 45, 10], "target": target, "search_path": path}


def answer_to(row: dict, *texts: str) -> dict:
    """judge's row of a search that found these texts; the first has the best score."""
    responses = []
    for rank, text in enumerate(texts):
        tokens = (*TOKENIZER.backend.encode(text).ids, TOKENIZER.eos)
        logps = (-0.1 * (rank + 1),) * len(tokens)
        responses.append(Response(tokens=tokens, logps=logps))
    rate_candidates(responses, TOKENIZER, last_line=True)
    return judge(TOKENIZER, row, responses)


def learned_tokens(row: dict) -> list[int]:
    [(_, labels)] = TOKENIZER.encode_rows([row])
    return [label for label in labels if label != -100]


# ---- Its own mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response,kept",
    [
        (LIE, "45+39=84\n84-10=74\n74-2=62\n"),
        (f"45+39=85\n84-10=74\n74-2=62\n{GOAL}", "45+39=85\n"),
        (f"45-39=6\n39+6=45\n45+10=55\n{GOAL}", "45-39=6\n39+6=45\n"),
        (f"45-39=6\n10*6=60\n60-2=58\n{GOAL}", "45-39=6\n10*6=60\n60-2=58\n"),
    ],
)
def test_own_mistakes_end_after_the_action_that_fails_or_misses(response, kept):
    row = problem()
    [mistake] = improve.own_mistakes([row], [answer_to(row, response)])
    assert mistake["search_path"] == kept + BACKTRACK
    assert (mistake["nums"], mistake["target"]) == (row["nums"], row["target"])


@pytest.mark.parametrize("responses", [(), (RIGHT,), (f"45-39=6\n10*6=60\n{GOAL}",), (RIGHT, LIE)])
def test_what_may_be_right_is_no_mistake(responses):
    """None was chosen, it is right, or it stops too early."""
    row = problem()
    assert improve.own_mistakes([row], [answer_to(row, *responses)]) == []


def test_nothing_of_a_mistake_is_imitated_but_stepping_back():
    row = problem()
    [mistake] = improve.own_mistakes([row], [answer_to(row, LIE)])
    assert mistake["no_loss"] == [0, 1, 2]
    assert learned_tokens(mistake) == [TOKENIZER.backtrack, TOKENIZER.eos]


# ---- Its solutions -------------------------------------------------------------------------------


def test_the_best_answer_that_verifies_is_learned_even_where_a_lie_was_chosen():
    row = problem()
    other_order = f"45-39=6\n6*10=60\n60+2=62\n{GOAL}"
    answers = [answer_to(row, LIE, RIGHT, other_order)]
    [solved] = improve.solved_rows([row], answers)
    assert solved["search_path"] == RIGHT
    assert (solved["nums"], solved["target"]) == (row["nums"], row["target"])


def test_all_of_a_solution_is_imitated():
    row = problem()
    [solved] = improve.solved_rows([row], [answer_to(row, RIGHT)])
    assert solved["no_loss"] == []
    assert learned_tokens(solved) == [*TOKENIZER.backend.encode(RIGHT).ids, TOKENIZER.eos]


def test_each_answer_goes_with_its_own_problem():
    rows = [problem(target=72), problem(), problem(target=72)]
    answers = [answer_to(rows[0]), answer_to(rows[1], RIGHT), answer_to(rows[2], RIGHT_TOO)]
    solved = improve.solved_rows(rows, answers)
    assert [row["target"] for row in solved] == [62, 72]
    assert [row["search_path"] for row in solved] == [RIGHT, RIGHT_TOO]


# ---- A round -------------------------------------------------------------------------------------


def one_round(monkeypatch, rows: list[dict], answers: list[dict], **settings) -> list[str]:
    """What a round learns, if its search finds these answers."""
    learned = []
    monkeypatch.setattr(improve, "evaluate", lambda model, tokenizer, problems, settings: answers)
    monkeypatch.setattr(
        improve, "fine_tune", lambda model, tokenizer, kept, *rest: learned.extend(kept)
    )
    improve.improve(torch.nn.Module(), TOKENIZER, rows, Settings(), **settings)
    return [row["search_path"] for row in learned]


def test_a_round_learns_from_answers_mistakes_and_a_tenth_of_d_back(monkeypatch, capsys):
    rows = [problem()] * 40
    answers = [answer_to(rows[0], RIGHT)] * 20
    answers += [answer_to(rows[0], LIE, RIGHT)] * 10
    answers += [answer_to(rows[0])] * 10
    learned = one_round(monkeypatch, rows, answers)
    assert capsys.readouterr().out == "round 1: solved 30 of 40, trained on 43 rows\n"
    mistake = LIE.removesuffix(GOAL) + BACKTRACK
    assert learned == [RIGHT] * 30 + [mistake] * 10 + [rows[0]["search_path"]] * 3


def test_the_papers_round_learns_from_solutions_alone(monkeypatch):
    rows = [problem()] * 40
    answers = [answer_to(rows[0], RIGHT)] * 30 + [answer_to(rows[0], LIE)] * 10
    assert one_round(monkeypatch, rows, answers, only_solved=True) == [RIGHT] * 30


def test_no_answer_is_no_mistake_even_of_a_single_number():
    row = {"nums": [5], "target": 6}
    assert improve.own_mistakes([row], [answer_to(row)]) == []


def test_a_round_learns_from_no_more_mistakes_than_solutions(monkeypatch):
    rows = [problem()] * 12
    answers = [answer_to(rows[0], RIGHT)] * 2 + [answer_to(rows[0], LIE)] * 10
    learned = one_round(monkeypatch, rows, answers)
    assert learned == [RIGHT] * 2 + [LIE.removesuffix(GOAL) + BACKTRACK] * 2


def test_a_round_takes_no_solution_that_it_did_not_find(monkeypatch):
    """Of the training rows only D_back: else it would be taught, not improve itself."""
    rows = [problem(RIGHT)] * 20
    learned = one_round(monkeypatch, rows, [answer_to(rows[0], RIGHT)] * 20)
    assert learned == [RIGHT] * 20


def test_a_round_searches_the_problems_by_the_settings(monkeypatch):
    """It is `evaluate` that searches, see test_search.py."""
    seen = []

    def evaluate(*given):
        seen.append(given)
        return [answer_to(rows[0], RIGHT)]

    rows = [problem()]
    settings = Settings(n=3, seed=7)
    monkeypatch.setattr(improve, "evaluate", evaluate)
    monkeypatch.setattr(improve, "fine_tune", lambda *given: None)
    monkeypatch.setattr(improve, "copy_to_search", lambda model: f"a copy of {model}")
    improve.improve("the model", TOKENIZER, rows, settings)
    assert seen == [("a copy of the model", TOKENIZER, rows, settings)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_round_searches_with_a_copy_in_the_best_dtype(monkeypatch, tmp_path, dtype, tied):
    """As search.py opens them; what is trained stays as it is."""
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    model = Llama(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(improve, "best_dtype", lambda device: dtype)
    copied = improve.copy_to_search(model)
    model.save_pretrained(tmp_path, torch.float32)
    opened = Llama.from_pretrained(tmp_path, dtype=dtype)
    input_ids = torch.arange(20)[None]
    assert copied(input_ids).dtype == dtype
    assert torch.equal(copied(input_ids), opened(input_ids))
    assert len(list(copied.parameters())) == len(list(model.parameters()))
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_a_round_that_solves_nothing_says_so_and_learns_nothing(monkeypatch):
    rows = [problem()] * 3
    answers = [answer_to(rows[0], LIE), answer_to(rows[0]), answer_to(rows[0], LIE)]
    with pytest.raises(UserError, match="solved nothing"):
        one_round(monkeypatch, rows, answers)


@pytest.mark.parametrize(
    "trained_with,lr,expected",
    [
        ({"optimizer": "muon", "mask": "choice"}, None, (2e-4, "muon", "choice")),
        ({"optimizer": "muon", "mask": "none"}, 1e-3, (1e-3, "muon", "none")),
        ({"optimizer": "adamw", "mask": "action"}, None, (1e-5, "adamw", "action")),
        (None, None, (1e-5, "adamw", "action")),
    ],
)
def test_a_round_trains_as_the_checkpoint_was_trained(trained_with, lr, expected):
    """Or else as the paper does."""
    record = {"settings": trained_with} if trained_with else {}
    found = improve.training_settings(Namespace(batch_size=7, lr=lr), record)
    assert (found.lr, found.optimizer, found.mask) == expected
    assert (found.batch_size, found.warmup, found.weight_decay) == (7, 10, 0.0)
