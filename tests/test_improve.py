"""What a round of self-improvement learns from."""
import pytest

from data import BACKTRACK, GOAL, Tokenizer
from improve import harvest, own_mistakes
from search import Sample, judge

TOK = Tokenizer.digits()
RIGHT = f"45-39=6\n10*6=60\n2+60=62\n{GOAL}"


def answer_to(row: dict, *responses: str) -> dict:
    """judge's row of a search that found these; the first has the best score."""
    samples = []
    for i, text in enumerate(responses):
        tokens = (*TOK.tok.encode(text).ids, TOK.eos)
        samples.append(Sample(tokens, (), 0, 0, GOAL, -i))
    return judge(TOK, row, samples, "self_backtrack")


def problem(path: str) -> dict:
    return {"nums": [2, 39, 45, 10], "target": 62, "search_path": path}


@pytest.mark.parametrize("response,kept", [
    (f"45+39=84\n84-10=74\n74-2=62\n{GOAL}", "45+39=84\n84-10=74\n74-2=62\n"),
    (f"45+39=85\n84-10=74\n74-2=62\n{GOAL}", "45+39=85\n"), (f"45-39=6\n39+6=45\n45+10=55\n{GOAL}", "45-39=6\n39+6=45\n"),
    (f"45-39=6\n10*6=60\n{GOAL}", None), (RIGHT, None)])
def test_own_mistakes_end_after_the_first_false_action(response, kept):
    rows = [problem("45-39=7\n" + BACKTRACK)]
    found = own_mistakes(rows, [answer_to(rows[0], response)])
    assert [row["search_path"] for row in found] == ([] if kept is None else [kept + BACKTRACK])
    assert all(row["wrong"] == kept.count("\n") and row["nums"] == rows[0]["nums"] for row in found)
    for _, labels in TOK.rows(found):
        assert [i for i in labels if i != -100] == [TOK.backtrack, TOK.eos]                # nothing of it is to be imitated


def test_a_round_learns_from_answers_mistakes_and_some_of_d_back():
    lie = f"45+39=84\n84-10=74\n74-2=62\n{GOAL}"
    back = problem("45-39=7\n" + BACKTRACK)
    rows = [back] * 40
    answers = [answer_to(back, *found) for found in [(RIGHT,)] * 20 + [(lie, RIGHT)] * 10 + [()] * 10]
    kept = [row["search_path"] for row in harvest(rows, answers)]
    assert kept == [RIGHT] * 30 + [lie.removesuffix(GOAL) + BACKTRACK] * 10 + [back["search_path"]] * 3
    assert harvest(rows[30:], answers[30:]) == []
