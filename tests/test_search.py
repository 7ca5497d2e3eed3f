"""Every decoder against a plain, slow version of itself; what the search computes and keeps; what
it makes of its samples."""

import copy
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import beam_search, logits_after, self_backtrack, shares_of
from transformers import (
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import search
from data import Tokenizer, generate, new_record
from model import KVCache, Llama, LlamaConfig, UserError
from search import Response, Settings

TOK = Tokenizer.digits()
PROBLEMS = list(generate(new_record(5, [3, 4]), "train", 8))
SHORT = Settings(b=2, n=9, temperature=0.8, min_p=0.0, max_new_tokens=18, cache_gib=0.02)
RULE = {  # the paper's
    "independent": True,
    "proportional": False,
    "last_line": False,
    "stop_above": 0.0,
}
PAPER = replace(SHORT, **RULE)


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random weights, but a bias to what the search lives on: newlines, `<backtrack>` and the
    end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOK.vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = Llama(config).eval()
    bias = {TOK.backend.token_to_id("\n"): 1.5, TOK.backtrack: 0.8, TOK.eos: 0.3}
    with torch.no_grad():
        model.lm_head.weight *= 0.5
        direction = model.model(torch.randint(0, TOK.vocab_size, (64, 20))).mean((0, 1))
        for token, push in bias.items():
            model.lm_head.weight[token] += push * direction / direction.square().sum()
    return model


@pytest.fixture(scope="module")
def precise(model) -> Llama:
    """The same in float64, so that no rounding decides which token a sample takes."""
    return copy.deepcopy(model).double()


def decode(model, problems: list[dict], keys, settings: Settings) -> list[list[Response]]:
    """The samples of each problem, in the problems' order."""
    found = dict(search.search_all(model, TOK, problems, keys, settings))
    return [found[number] for number in range(len(problems))]


def facts(responses: list[Response]) -> list[tuple]:
    """All that is exact about samples."""
    return [(path.tokens, path.count, path.round, path.inherited) for path in responses]


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOK.backend.encode(text).ids)


# ---- The algorithm, with samples written by hand -------------------------------------------------


def backtracking(b=1, n=5, limit=2, **ours):
    """The algorithm, at the point where it has asked for samples of the prompt."""
    algorithm = search.self_backtrack(TOK, b, n, limit, **ours)
    [prompt] = next(algorithm)
    assert (prompt.tokens, prompt.count, prompt.round) == ((), n, 0)
    return algorithm


def sampled(text: str, count: int = 1) -> Response:
    tokens = ids(text)
    return Response(tokens, (-0.5,) * len(tokens), count=count)


def texts_of(frontier: list[Response]) -> list[str]:
    return [TOK.decode(state.tokens) for state in frontier]


def ends(algorithm, responses: list[Response]) -> bool:
    """Does the algorithm end when it is sent these samples, in place of asking for more?"""
    try:
        algorithm.send(responses)
    except StopIteration:
        return True
    return False


def test_a_state_is_what_a_backtracking_sample_had_before_its_last_action():
    [state] = backtracking(n=7).send([sampled("1+1=2\n2+2=4\n<backtrack>"), sampled("3+3=6\n")])
    assert state.tokens == ids("1+1=2\n")
    assert state.logps == (-0.5,) * 6
    assert (state.count, state.round) == (7, 1)


def test_states_that_most_samples_lead_to_come_first():
    responses = [
        sampled("1+1=2\n9-9=0\n<backtrack>", count=1),
        sampled("2+2=4\n9-9=0\n<backtrack>", count=2),
        sampled("3+3=6\n9-9=0\n<backtrack>", count=3),
        sampled("4+4=8\n9-9=0\n<backtrack>", count=2),
    ]
    frontier = backtracking(limit=4).send(responses)
    assert texts_of(frontier) == ["3+3=6\n", "2+2=4\n", "4+4=8\n", "1+1=2\n"]


def test_responses_that_lead_to_the_same_state_are_added_up():
    responses = [
        sampled("1+1=2\n9-9=0\n<backtrack>", count=2),
        sampled("2+2=4\n9-9=0\n<backtrack>", count=3),
        sampled("1+1=2\n8-8=0\n<backtrack>", count=2),
    ]
    assert texts_of(backtracking(limit=4).send(responses)) == ["1+1=2\n", "2+2=4\n"]


def test_states_share_the_samples_of_a_round_in_proportion():
    """Each sample that stepped back is followed by `limit` new ones, also at the prompt."""
    responses = [
        sampled("1+1=2\n9-9=0\n<backtrack>", count=1),
        sampled("2+2=4\n<backtrack>", count=3),
        sampled("2+2=5\n<backtrack>", count=2),
        sampled("3+3=6\n", count=4),
    ]
    frontier = backtracking(n=10, limit=3, proportional=True).send(responses)
    assert [(TOK.decode(state.tokens), state.count) for state in frontier] == [
        ("1+1=2\n", 3),
        ("", 15),
    ]


@pytest.mark.parametrize(
    "counts,expected", [([4, 2], [12, 6]), ([20, 10], [20, 10]), ([7, 5], [17, 12])]
)
def test_a_round_draws_no_more_samples_than_the_papers_does(counts, expected):
    algorithm = backtracking(b=2, n=10, limit=3, proportional=True)
    algorithm.send([sampled("1+1=2\n2+2=4\n<backtrack>")])
    texts = ("1+1=2\n3+3=6\n9-9=0\n<backtrack>", "1+1=2\n4+4=8\n9-9=0\n<backtrack>")
    responses = [sampled(text, count) for text, count in zip(texts, counts)]
    assert [state.count for state in algorithm.send(responses)] == expected
    assert sum(expected) <= 3 * 10


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_frontier_holds_at_most_the_limit(limit):
    responses = [sampled(f"{digit}+1=2\n9-9=0\n<backtrack>") for digit in range(3)]
    frontier = backtracking(limit=limit).send(responses)
    assert texts_of(frontier) == ["0+1=2\n", "1+1=2\n", "2+1=2\n"][:limit]


def test_a_state_is_visited_once():
    algorithm = backtracking(b=5, limit=4)
    first = sampled("1+1=2\n2+2=4\n<backtrack>")
    same_state = sampled("1+1=2\n7-7=0\n<backtrack>")
    assert texts_of(algorithm.send([first, same_state])) == ["1+1=2\n"]
    again = sampled("1+1=2\n8-8=0\n<backtrack>")
    assert ends(algorithm, [again])


@pytest.mark.parametrize("b", [0, 1, 2])
def test_it_steps_back_at_most_b_times(b):
    algorithm = backtracking(b=b)
    for digit in range(b):
        response = sampled(f"{digit}+1=2\n9-9=0\n<backtrack>")
        assert texts_of(algorithm.send([response])) == [f"{digit}+1=2\n"]
    assert ends(algorithm, [sampled("7+1=8\n9-9=0\n<backtrack>")])


def test_in_the_paper_the_prompt_has_been_visited():
    response = sampled("1+1=2\n<backtrack>")
    assert ends(backtracking(), [response])


def test_the_prompt_may_be_sampled_once_more():
    algorithm = backtracking(b=5, proportional=True)
    first = sampled("1+1=2\n<backtrack>")
    [state] = algorithm.send([first])
    assert (state.tokens, state.round) == ((), 1)
    second = sampled("1+1=3\n<backtrack>")
    assert ends(algorithm, [second])


def test_a_search_keeps_all_samples_without_slots_and_states_with_theirs():
    one = search.Search(0, [], 0, TOK, Settings(b=1, n=5, limit=2))
    one.advance()
    response = sampled("1+1=2\n2+2=4\n<backtrack>")
    response.slots = tuple(range(100, 100 + 4 + 12))  # of a prompt of 4 tokens and of 12 of its own
    one.frontier[0].ended = [response]
    one.advance()
    [state] = one.frontier
    assert state.slots == tuple(range(100, 100 + 4 + 6))
    assert one.all_responses == [response]
    assert response.slots == ()


# ---- Stepping back -------------------------------------------------------------------------------

STEPS_BACK = [
    ("45-39=6\n39+6=45\n<backtrack>", "45-39=6\n"),
    ("45-39=6\n<backtrack>", ""),
    ("45-39=6\n39+<backtrack>", "45-39=6\n"),
    ("45-39=6\n3<backtrack>", "45-39=6\n"),
    ("<backtrack>", ""),
    ("\n<backtrack>", ""),
    ("1\n2\n\n<backtrack>", "1\n2\n"),
]


@pytest.mark.parametrize("text,state", STEPS_BACK)
def test_rolling_back_drops_the_last_action(text, state):
    response = sampled(text)
    response.logps = tuple(range(len(response.tokens)))
    rolled = search.roll_back(response, TOK)
    assert rolled.tokens == ids(state)
    assert rolled.logps == response.logps[: len(rolled.tokens)]


@pytest.mark.parametrize("text,state", STEPS_BACK)
def test_rolling_back_keeps_the_slots_of_the_prompt_and_the_state(text, state):
    response = sampled(text)
    response.slots = tuple(range(4 + len(response.tokens) - 1))  # `<backtrack>` has none
    assert search.roll_back(response, TOK).slots == tuple(range(4 + len(ids(state))))


# ---- Candidates, their scores, the answer --------------------------------------------------------


def finished(text: str, logp: float = -1.0, last_line: bool = True, **fields) -> Response:
    tokens = (*ids(text), TOK.eos)
    response = Response(tokens, (logp,) * len(tokens), **fields)
    search.rate_candidates([response], TOK, last_line)
    return response


@pytest.mark.parametrize(
    "logp,last_line,stop_above,stops",
    [
        (-0.1, False, -0.2, True),
        (-0.3, False, -0.2, False),
        (-0.1, True, -0.2, False),  # with two tokens in the last line: -0.3
        (-0.1, True, -0.4, True),
        (0.0, False, 0.0, False),  # the paper's: however sure it is
    ],
)
def test_a_search_ends_once_it_is_sure(logp, last_line, stop_above, stops):
    algorithm = backtracking(stop_above=stop_above)
    doubtful = sampled("1+1=2\n2+2=4\n<backtrack>")
    candidate = finished("3+5=8\nGoal Reached!", logp, last_line)
    assert ends(algorithm, [doubtful, candidate]) is stops


@pytest.mark.parametrize("settings,stops", [({}, True), (search.PAPER_SEARCH, False)])
def test_by_the_papers_rule_no_search_ends_early(settings, stops):
    algorithm = Settings(**settings).algorithm(TOK)
    next(algorithm)
    doubtful = sampled("1+1=2\n2+2=4\n<backtrack>")
    assert ends(algorithm, [doubtful, finished("3+5=8\nGoal Reached!", 0.0)]) is stops


def test_a_sure_sample_that_has_not_reached_the_goal_ends_nothing():
    algorithm = backtracking(stop_above=-0.9)
    assert not ends(algorithm, [sampled("1+1=2\n2+2=4\n<backtrack>"), finished("3+5=8", -0.1)])


@pytest.mark.parametrize(
    "text,candidate",
    [
        ("3+5=8\nGoal Reached!", True),
        ("Goal Reached!", True),
        ("3+5=8\n", False),
        ("3+5=8\nGoal Reached!\n", False),
        ("3+5=8Goal Reached!", False),
        ("3+5=8\nGoal Reached!\n3", False),
    ],
)
def test_a_candidate_ends_in_the_goal(text, candidate):
    assert search.reached_goal(finished(text), TOK) == candidate


def test_what_the_length_limit_cut_off_is_no_candidate():
    assert not search.reached_goal(sampled("3+5=8\nGoal Reached!"), TOK)


LINES = [("3+5=8\nGoal Reached!", 2), ("3+5=8\n1+", 3), ("3+5", 4)]


@pytest.mark.parametrize("text,_", LINES)
def test_the_papers_score_is_the_mean(text, _):
    path = finished(text)
    path.logps = tuple(-0.1 * number for number in range(len(path.tokens)))
    assert search.rate(path, TOK, False) == pytest.approx(-0.1 * (len(path.tokens) - 1) / 2)


@pytest.mark.parametrize("text,last_line", LINES)
def test_the_last_lines_tokens_come_on_top(text, last_line):
    """Of the last line there are so many tokens, end-of-text included."""
    path = finished(text)
    path.logps = tuple(-0.1 * number for number in range(len(path.tokens)))
    bonus = sum(path.logps[-last_line:])
    assert search.rate(path, TOK, True) == pytest.approx(search.rate(path, TOK, False) + bonus)


def test_the_answer_is_the_candidate_with_the_best_score():
    worse = finished("1\nGoal Reached!", -0.5)
    best = finished("2\nGoal Reached!", -0.1)
    stopped = finished("3\n", -0.01)
    assert search.select([worse, best, stopped]) is best
    assert search.select([stopped]) is None


def test_the_last_line_may_decide():
    even = Response((*ids("1\nGoal Reached!"), TOK.eos), (-0.5, -0.5, -0.5, -0.5))
    sure_of_its_end = Response((*ids("2\nGoal Reached!"), TOK.eos), (-2.0, -2.0, 0.0, 0.0))
    for last_line, answer in ((False, even), (True, sure_of_its_end)):
        search.rate_candidates([even, sure_of_its_end], TOK, last_line)
        assert search.select([even, sure_of_its_end]) is answer


SUM = {"nums": [3, 5], "target": 8}
RIGHT = "3+5=8\nGoal Reached!"
WRONG = "5+3=9\nGoal Reached!"


def test_a_wrong_answer_is_judged_with_its_reason():
    row = search.judge(TOK, SUM, [finished(WRONG)])
    assert (row["nums"], row["target"], row["response"]) == ([3, 5], 8, WRONG)
    assert (row["correct"], row["verified"], row["solutions"]) == (False, False, [])
    assert "false, it is 8" in row["reason"]
    assert row["failed_action"] == 1
    assert row["score"] == pytest.approx(-1 - 2)


def test_a_right_candidate_that_was_not_selected_is_verified():
    row = search.judge(TOK, SUM, [finished(RIGHT, -1.0), finished(WRONG, -0.5)])
    assert (row["response"], row["correct"]) == (WRONG, False)
    assert (row["verified"], row["solutions"]) == (True, [RIGHT])


def test_solutions_are_different_and_the_best_comes_first():
    other = "5+3=8\nGoal Reached!"
    responses = [finished(RIGHT, -1.0), finished(other, -0.5), finished(RIGHT, -1.0, round=1)]
    assert search.judge(TOK, SUM, responses)["solutions"] == [other, RIGHT]


def test_a_right_answer_is_correct():
    row = search.judge(TOK, SUM, [finished(RIGHT, -0.5), finished(WRONG, -1.0)])
    assert (row["response"], row["correct"], row["reason"]) == (RIGHT, True, "")


def test_no_candidate_is_no_answer():
    row = search.judge(TOK, SUM, [sampled("3+5=9\n<backtrack>")])
    assert (row["response"], row["correct"], row["score"]) == ("", False, None)
    assert row["reason"] == "no sample reached the goal"
    assert row["failed_action"] is None


def test_the_judge_scores_by_the_papers_rule_where_asked():
    row = search.judge(TOK, SUM, [finished(RIGHT, last_line=False)])
    assert row["score"] == pytest.approx(-1.0)


@pytest.mark.parametrize("last_line", [True, False])
def test_a_search_rates_its_responses_by_its_settings(last_line):
    one = search.Search(0, [], 0, TOK, Settings(last_line=last_line))
    one.advance()
    response = finished(RIGHT)
    response.score = None
    one.frontier[0].ended = [response, sampled("3+5=8\nGoal Reached!")]
    one.advance()
    assert [found.score for found in one.all_responses] == [-3.0 if last_line else -1.0, None]


def test_only_sampled_tokens_are_counted():
    """Those of every sample, without what it inherited."""
    responses = [finished(RIGHT, count=3), finished(RIGHT, inherited=6, count=2)]
    assert search.judge(TOK, SUM, responses)["tokens"] == 3 * 8 + 2 * 2


# ---- Sampling rules ------------------------------------------------------------------------------


def test_spread_gives_the_example_of_its_docstring():
    """Points 0.1, 0.35, 0.6, 0.85; tokens of probabilities 0.4 and 0.6."""
    logits = torch.tensor([[0.4, 0.6]]).log()
    four_samples = [Response(count=4, first_point=0.1, spacing=0.25)]
    first, second = search.spread(logits, four_samples, Settings(temperature=1.0, min_p=0.0))
    assert (first.token, first.count) == (0, 2)
    assert first.first_point == pytest.approx(0.1 / 0.4)
    assert first.spacing == pytest.approx(0.25 / 0.4)
    assert (second.token, second.count) == (1, 2)
    assert second.first_point == pytest.approx(0.2 / 0.6)
    assert second.spacing == pytest.approx(0.25 / 0.6)


def test_spread_points_take_the_tokens_in_whose_intervals_they_lie():
    logits = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0]]).log()
    paths = [
        Response(count=10, first_point=0.05, spacing=0.1),
        Response(count=2, first_point=0.2, spacing=0.6),
    ]
    draws = search.spread(logits, paths, Settings(temperature=1.0, min_p=0.0))
    taken = [(draw.parent, draw.token, draw.count) for draw in draws]
    assert taken == [(0, 0, 5), (0, 2, 3), (0, 3, 2), (1, 2, 2)]
    # within a token's own interval: where the first of its points is, and how far to the next
    assert [draw.first_point for draw in draws] == pytest.approx([0.1, 1 / 6, 0.25, 0.2], abs=1e-6)
    assert [draw.spacing for draw in draws] == pytest.approx([0.2, 1 / 3, 0.5, 0.6], abs=1e-6)


def test_a_long_sample_of_improbable_tokens_stays_random():
    """Its probability is 1000 ** -200, which in 64 bits is 0."""
    logits = torch.zeros(1, 1000)
    path = Response(count=1, state=search.State(rng=np.random.default_rng(0)))
    for _ in range(200):
        [draw] = search.spread(logits, [path], Settings(min_p=0.0))
        path = search.extend(path, draw)
    assert len(set(path.tokens[-100:])) > 50


def test_temperature_and_min_p_change_what_is_drawn_and_no_log_probability():
    logits = torch.tensor([[0.5, 0.0, 0.3, 0.2]], dtype=torch.float64).log()
    paths = [Response(count=10, first_point=0.05, spacing=0.1)]
    # 0.2 is less than half of 0.5; the roots of 0.5 and 0.3 are as 0.56 to 0.44
    first, second = search.spread(logits, paths, Settings(temperature=2.0, min_p=0.5))
    assert (first.token, first.count) == (0, 6)
    assert (second.token, second.count) == (2, 4)
    assert torch.tensor([first.logp, second.logp]).exp().tolist() == pytest.approx([0.5, 0.3])


def prefix_counts(responses: list[Response]) -> Counter:
    """How many samples took each path, whatever its length."""
    counts = Counter()
    for path in responses:
        for length in range(len(path.tokens) + 1):
            counts[path.tokens[:length]] += path.count
    return counts


PEAKS = """
import resource, search
from data import Tokenizer, new_record, generate
from model import Llama
tokenizer = Tokenizer.from_pretrained(search.SHIPPED)
model = Llama.from_pretrained(search.SHIPPED).float()
problems = list(generate(new_record(0, [4]), "val", 64))
settings = search.Settings(b=0, n=32, cache_gib=0.05)
for num in (4, 64):
    search.evaluate(model, tokenizer, problems[:num], settings)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_many_problems_take_no_more_memory_than_the_bound_allows():
    """Of the whole process: 51 MiB for keys and values, and as much again for what passes by."""
    environment = {**os.environ, "PYTHONPATH": str(search.SHIPPED.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True
    )
    few, many = map(int, done.stdout.split())
    assert many - few < 110


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.8}])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_top_k_and_top_p_leave_out_what_transformers_leaves_out(cut, temperature):
    torch.manual_seed(0)
    logps = torch.randn(50, 30, dtype=torch.float64).mul(2).log_softmax(-1)
    settings = Settings(temperature=temperature, min_p=0.0, **cut)
    expected = TemperatureLogitsWarper(temperature)(None, logps)
    if "top_k" in cut:
        expected = TopKLogitsWarper(cut["top_k"])(None, expected)
    if "top_p" in cut:
        expected = TopPLogitsWarper(cut["top_p"])(None, expected)
    shares = search.shares_of_tokens(logps, settings)
    torch.testing.assert_close(shares, expected.softmax(-1))
    assert (shares == 0).any()


def test_what_is_left_out_is_never_drawn(precise):
    """By the command's own path, not by the shares alone."""
    settings = replace(SHORT, b=0, n=64, temperature=5.0, top_k=2)
    [(_, responses)] = search.search_all(precise, TOK, PROBLEMS[:1], [0], settings)
    for response in responses:
        tokens = TOK.prompts(PROBLEMS[:1])[0]
        for token in response.tokens:
            best_two = np.argsort(logits_after(precise, tokens))[-2:]
            assert token in best_two
            tokens = [*tokens, token]


@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_samples_are_spread_as_evenly_as_can_be(precise, min_p):
    """Of n samples every path of probability p, whatever its length, is taken floor(n p) or
    ceil(n p) times: probabilities by the model without a cache, multiplied."""
    n = 3000
    settings = replace(SHORT, b=0, n=n, temperature=0.9, min_p=min_p, max_new_tokens=4)
    [responses] = decode(precise, PROBLEMS[:1], [4], settings)
    [prompt] = TOK.prompts(PROBLEMS[:1])
    counts = prefix_counts(responses)
    chances = {(): 1.0}
    goes_on = [()]
    for path in goes_on:
        shares = shares_of(logits_after(precise, prompt + list(path)), 0.9, min_p)
        for token, share in enumerate(shares):
            child = (*path, token)
            chances[child] = chances[path] * share
            ended = token in (TOK.eos, TOK.backtrack) or len(child) == 4
            if counts[child] and not ended:
                goes_on.append(child)
    assert len(goes_on) > 300
    for path, chance in chances.items():
        assert abs(counts[path] - n * chance) < 1, path


def test_spread_samples_differ_more_than_independent_ones(model):
    settings = replace(SHORT, b=0, n=1000)
    [spread] = decode(model, PROBLEMS[:1], [4], settings)
    [independent] = decode(model, PROBLEMS[:1], [4], replace(settings, **RULE))
    assert len(independent) < len(spread)


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Over what is possible; what is impossible must not have happened."""
    assert not counts[expected == 0].any()
    return float(((counts - expected).square() / expected)[expected > 0].sum())


def test_independent_samples_follow_the_model(precise):
    """First tokens of 20,000 samples against the softmax at the temperature."""
    n = 20_000
    settings = replace(PAPER, b=0, n=n, temperature=0.7, max_new_tokens=1)
    [responses] = decode(precise, PROBLEMS[:1], [0], settings)
    [prompt] = TOK.prompts(PROBLEMS[:1])
    expected = n * torch.tensor(shares_of(logits_after(precise, prompt), 0.7, 0.0))
    counts = torch.zeros(TOK.vocab_size)
    for response in responses:
        counts[response.tokens[0]] += response.count
    assert chi_squared(counts, expected) < 60  # 23 degrees of freedom


@pytest.mark.parametrize("chances", [(0.25, 0.25, 0.25, 0.25), (0.5, 0.3, 0.15, 0.05)])
def test_a_samples_place_is_never_spent(model, monkeypatch, chances):
    """A point has 53 bits, and a token takes one or two of them. Yet after 60 tokens, one is still
    distributed as it should be, and independently of the one before."""
    n = 2000
    share = torch.zeros(TOK.vocab_size, dtype=torch.float64)
    share[3:7] = torch.tensor(chances)
    monkeypatch.setattr(
        search.Engine, "feed", lambda self, paths, *rest: share.log().expand(len(paths), -1)
    )
    settings = replace(SHORT, b=0, n=n, temperature=1.0, max_new_tokens=60, cache_gib=0.1)
    [responses] = decode(model, PROBLEMS[:1], [0], settings)
    expected = n * (share[:, None] * share).flatten()
    tokens = torch.tensor([response.tokens for response in responses])
    counts = torch.tensor([response.count for response in responses])
    for length in range(20, 60):
        pair = tokens[:, length - 1] * TOK.vocab_size + tokens[:, length]
        pairs = torch.bincount(pair, counts, minlength=len(expected))
        assert chi_squared(pairs, expected) < 50, length  # 15 degrees of freedom


# ---- Decoders against slow versions of themselves ------------------------------------------------


def test_samples_of_the_random_model_end_in_every_way(precise):
    """Else what follows would not say much."""
    responses = sum(decode(precise, PROBLEMS, range(8), SHORT), [])
    ends = Counter(path.tokens[-1] for path in responses if len(path.tokens) < SHORT.max_new_tokens)
    assert ends.keys() == {TOK.eos, TOK.backtrack}
    assert sum(ends.values()) < len(responses)  # the length limit cut off the others


def assert_same_samples(responses: list[Response], expected: list[Response]) -> None:
    assert facts(responses) == facts(expected)
    for path, other in zip(responses, expected):
        assert path.logps == pytest.approx(other.logps, abs=1e-9)
        assert path.score == (None if other.score is None else pytest.approx(other.score, abs=1e-9))


@pytest.mark.parametrize("rule", [RULE, {}], ids=["independent", "evenly"])
@pytest.mark.parametrize(
    "b,n,asked,limit",  # the limit asked for, and the one that holds: int(sqrt(n)) by itself
    [(0, 6, None, 2), (1, 9, None, 3), (3, 4, None, 2), (2, 6, 1, 1), (2, 5, 5, 5)],
)
def test_self_backtracking_equals_the_plain_version(precise, rule, b, n, asked, limit):
    """Token for token, in order. The plain version: one sample at a time, without a cache."""
    settings = replace(SHORT, **rule, b=b, n=n, limit=asked, seed=3)
    keys = range(10, 16)
    found = decode(precise, PROBLEMS[:6], keys, settings)
    for key, problem, responses in zip(keys, PROBLEMS, found):
        expected = self_backtrack(precise, TOK, problem, key, limit, settings)
        assert_same_samples(responses, expected)
    assert {path.round for path in sum(found, [])} == set(range(b + 1))


@pytest.mark.parametrize("min_p,temperature", [(0.05, 1.5), (0.3, 0.5)])
def test_the_plain_version_agrees_on_min_p_and_temperature(precise, min_p, temperature):
    settings = replace(SHORT, b=1, n=8, min_p=min_p, temperature=temperature)
    found = decode(precise, PROBLEMS[:4], range(4), settings)
    for key, responses in enumerate(found):
        expected = self_backtrack(precise, TOK, PROBLEMS[key], key, 2, settings)
        assert_same_samples(responses, expected)


@pytest.mark.parametrize("rule", [RULE, {}], ids=["independent", "evenly"])
def test_the_plain_version_agrees_where_samples_end_the_same(precise, rule):
    settings = replace(SHORT, b=1, n=16, temperature=0.3, **rule)
    found = decode(precise, PROBLEMS[:2], range(2), settings)
    for key, responses in enumerate(found):
        expected = self_backtrack(precise, TOK, PROBLEMS[key], key, 4, settings)
        assert_same_samples(responses, expected)
        assert any(path.count > 1 for path in responses)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_beam_search_equals_the_plain_version(precise, n):
    settings = replace(SHORT, decoder="beam", n=n, max_new_tokens=14)
    for problem, responses in zip(PROBLEMS, decode(precise, PROBLEMS, range(8), settings)):
        expected = beam_search(precise, TOK, problem, n, 14)
        assert [path.tokens for path in responses] == [tokens for tokens, _ in expected]
        totals = [sum(path.logps) for path in responses]
        assert totals == pytest.approx([total for _, total in expected], abs=1e-3)


def test_greedy_decoding_equals_transformers(model, tmp_path):
    model.save_pretrained(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    found = decode(model, PROBLEMS, range(8), replace(SHORT, decoder="greedy", max_new_tokens=20))
    for prompt, [response] in zip(TOK.prompts(PROBLEMS), found):
        expected = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=[TOK.eos, TOK.backtrack],
        )
        assert response.tokens == tuple(expected[0, len(prompt) :].tolist())


def test_best_of_n_is_a_search_that_never_steps_back(precise):
    best_of_n = decode(precise, PROBLEMS, range(8), replace(SHORT, decoder="best_of_n"))
    never_back = decode(precise, PROBLEMS, range(8), replace(SHORT, b=0))
    assert list(map(facts, best_of_n)) == list(map(facts, never_back))


@pytest.mark.parametrize("decoder", search.DECODERS)
@pytest.mark.parametrize("independent", [False, True])
def test_the_engine_gives_what_the_slow_search_gives(precise, decoder, independent):
    """Against search.search_slowly: the same rules, but state by state and without a cache."""
    settings = replace(SHORT, decoder=decoder, independent=independent, b=2, seed=3)
    engine = list(decode(precise, PROBLEMS, range(8), settings))
    for key, prompt in enumerate(TOK.prompts(PROBLEMS)):
        slowly = search.search_slowly(precise, TOK, prompt, key, settings)
        assert sorted(facts(slowly)) == sorted(facts(engine[key]))


# ---- Samples depend on their keys alone ----------------------------------------------------------


@pytest.fixture(scope="module", params=[RULE, {}], ids=["independent", "evenly"])
def settings(request) -> Settings:
    return replace(SHORT, **request.param, seed=1)


@pytest.fixture(scope="module")
def whole(precise, settings) -> list[list[tuple]]:
    """The samples of 16 problems, the last 8 the same as the first, in one batch."""
    return list(map(facts, decode(precise, PROBLEMS * 2, range(16), settings)))


def test_another_key_or_seed_gives_other_samples(precise, settings, whole):
    assert whole[0] != whole[8]
    [other] = decode(precise, PROBLEMS[:1], [0], replace(settings, seed=2))
    assert facts(other) != whole[0]


@pytest.mark.parametrize("number", [0, 7, 13])
def test_alone_a_problem_gets_the_same_samples(precise, settings, whole, number):
    [alone] = decode(precise, [PROBLEMS[number % 8]], [number], settings)
    assert facts(alone) == whole[number]


def test_in_another_order_problems_get_the_same_samples(precise, settings, whole):
    order = [11, 3, 6, 0, 15, 8]
    problems = [PROBLEMS[number % 8] for number in order]
    found = decode(precise, problems, order, settings)
    assert list(map(facts, found)) == [whole[number] for number in order]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 128])
def test_in_batches_of_another_size_problems_get_the_same_samples(
    precise, settings, whole, batch_size
):
    found = decode(precise, PROBLEMS * 2, range(16), replace(settings, batch_size=batch_size))
    assert list(map(facts, found)) == whole


def rounded(answers: list[dict]) -> list[dict]:
    """In another batch a score may have another last digit."""
    return [
        {**answer, "score": answer["score"] and round(answer["score"], 9)} for answer in answers
    ]


def test_problems_are_keyed_by_their_place_in_the_data(precise, settings):
    """Evaluated from an offset on, problems get the answers that they get among all others."""
    answers = search.evaluate(precise, TOK, PROBLEMS, settings)
    some = search.evaluate(precise, TOK, PROBLEMS[3:], settings, offset=3)
    assert rounded(some) == rounded(answers[3:])
    assert [answer["nums"] for answer in answers] == [problem["nums"] for problem in PROBLEMS]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_find_what_one_finds(precise, settings, monkeypatch, rank):
    """A rank of two searches every other problem, and all answers come back in order."""
    answers = search.evaluate(precise, TOK, PROBLEMS, settings, offset=3)
    by_rank = []
    for own in (answers[0::2], answers[1::2]):
        by_rank.append({answer["number"]: answer for answer in own})
    gathered = []

    def gather(own):
        gathered.append(dict(own))
        return by_rank

    monkeypatch.setattr(search, "device_rank_world", lambda: (torch.device("cpu"), rank, 2))
    monkeypatch.setattr(search, "gather", gather)
    assert search.evaluate(precise, TOK, PROBLEMS, settings, offset=3) == answers
    [own] = gathered
    assert own.keys() == by_rank[rank].keys()
    assert rounded(own.values()) == rounded(by_rank[rank][number] for number in own)


def test_no_problems_no_samples(model):
    assert decode(model, [], [], SHORT) == []
    assert search.evaluate(model, TOK, [], SHORT) == []


# ---- What passes the model, and what the cache holds ---------------------------------------------


def branches_of(responses: list[Response]) -> dict[tuple, list[Response]]:
    """{(round, state): its samples}"""
    branches = {}
    for path in responses:
        state = path.tokens[: path.inherited]
        branches.setdefault((path.round, state), []).append(path)
    return branches


@pytest.mark.parametrize("rule", [RULE, {}], ids=["independent", "evenly"])
def test_every_prefix_passes_the_model_once(model, monkeypatch, rule):
    """The prompts, each different prefix below a state, and one token more for each branch, whose
    logits no cache holds. Where a sample ends, its last token does not pass."""
    passed = []
    forward = Llama.forward

    def counting(self, input_ids, labels=None, cached_rows=None, *rest, **others):
        places = cached_rows.slots.gather(1, cached_rows.positions)
        passed.append(int((places > 0).sum()))  # 0 is where padding goes
        return forward(self, input_ids, labels, cached_rows, *rest, **others)

    monkeypatch.setattr(Llama, "forward", counting)
    found = decode(model, PROBLEMS, range(8), replace(SHORT, n=16, **rule))
    expected = sum(map(len, TOK.prompts(PROBLEMS)))
    for responses in found:
        for (round, state), paths in branches_of(responses).items():
            prefixes = set()
            for path in paths:
                for length in range(len(state) + 1, len(path.tokens)):
                    prefixes.add(path.tokens[:length])
            expected += len(prefixes) + (round > 0)
    assert sum(passed) == expected
    tokens = [path.count * (len(path.tokens) - path.inherited) for path in sum(found, [])]
    assert expected < sum(tokens)


@pytest.fixture
def engines(monkeypatch) -> list:
    """The engines of a test's searches; each remembers what it did."""
    engines = []

    class Watched(search.Engine):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.sizes = []  # states that were expanded together, at each step
            self.waiting = []  # prompts that had not begun
            self.given_up = 0
            engines.append(self)

        def make_room(self):
            expanded = len(self.expanding)
            self.sizes.append(expanded)
            self.waiting.append(len(self.new_prompts))
            super().make_room()
            self.given_up += expanded - len(self.expanding)

    monkeypatch.setattr(search, "Engine", Watched)
    return engines


def with_slots(model: Llama, slots: int, settings: Settings) -> Settings:
    """The same settings, but a cache of so many slots."""
    size = KVCache.bytes_per_slot(model.config, model.lm_head.weight.dtype)
    return replace(settings, cache_gib=(slots + 0.5) * size / 2**30)


@pytest.mark.parametrize("slots", [800, 1200])
def test_in_a_small_cache_problems_get_the_same_samples(precise, settings, whole, engines, slots):
    small = with_slots(precise, slots, settings)
    assert list(map(facts, decode(precise, PROBLEMS * 2, range(16), small))) == whole
    [engine] = engines
    assert engine.cache.kv.shape[2] == slots
    assert engine.cache.kv.nbytes <= small.cache_gib * 2**30


def test_a_state_that_was_given_up_draws_the_same_samples_again(
    precise, settings, whole, engines, monkeypatch
):
    """Let in far too many states: as if a state needed no more slots than one sample does."""

    def free_places(engine) -> int:
        places = len(engine.cache.free) // engine.slot_table.shape[1]
        return places if engine.expanding else max(places, 1)

    monkeypatch.setattr(search.Engine, "free_places", free_places)
    small = with_slots(precise, 1000, settings)
    assert list(map(facts, decode(precise, PROBLEMS * 2, range(16), small))) == whole
    [engine] = engines
    assert engine.given_up > 20


@pytest.mark.parametrize("decoder", search.DECODERS)
@pytest.mark.parametrize("slots", [700, 30_000])
def test_all_slots_come_back(precise, engines, slots, decoder):
    settings = with_slots(precise, slots, replace(SHORT, decoder=decoder))
    decode(precise, PROBLEMS, range(8), settings)
    [engine] = engines
    assert sorted(engine.cache.free) == list(range(1, slots))


@pytest.mark.parametrize("slots", [0, 1, 8, 20, 60, 120])
def test_a_cache_too_small_for_one_state_is_complained_of(precise, slots):
    with pytest.raises(UserError, match="--cache_gib"):
        decode(precise, PROBLEMS[:1], [0], with_slots(precise, slots, SHORT))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_no_more_states_are_expanded_together_than_asked(precise, engines, batch_size):
    decode(precise, PROBLEMS, range(8), replace(SHORT, batch_size=batch_size))
    [engine] = engines
    assert max(engine.sizes) == batch_size
    assert max(engine.waiting) <= batch_size  # others take no memory yet


# ---- What is printed -----------------------------------------------------------------------------


def test_compare_prints_a_line_for_each_split_and_decoder(monkeypatch, capsys):
    """Intervals by Wilson's formula; 30 of 100 is a textbook example."""
    rows = []
    for number in range(100):
        rows.append({"number": number, "correct": number < 30, "verified": True, "tokens": 2})
    clock = iter([0.0, 8.0, 10.0, 12.0])
    monkeypatch.setattr(search.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(search, "evaluate", lambda *arguments: rows)
    results = search.compare(None, TOK, {"x": [], "y": []}, ["greedy"], Settings())
    assert results == {("x", "greedy"): rows, ("y", "greedy"): rows}
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == "greedy, x 30.0 [21.9, 39.6] 100.0 [96.3, 100.0] 2.0 12.5 25".split()
    assert second.split()[:2] == ["greedy,", "y"]
    assert second.split()[-2:] == ["50.0", "100"]
    assert max(len(first), len(second)) <= 100


def test_answers_that_were_there_already_took_no_time(monkeypatch, capsys):
    rows = [{"number": 7, "correct": 1, "verified": 1, "tokens": 500}]
    rows += [{"number": number, "correct": 1, "verified": 1, "tokens": 30} for number in (8, 9)]
    clock = iter([1.0, 5.0])
    monkeypatch.setattr(search.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(search, "evaluate", lambda *arguments: rows)
    known = SimpleNamespace(answers={7: rows[0]})
    search.compare(None, TOK, {"x": []}, ["greedy"], Settings(), answer_file=known)
    assert capsys.readouterr().out.split()[-2:] == ["0.5", "15"]


def test_compare_gives_each_decoder_its_settings(monkeypatch):
    asked = []

    def evaluate(model, tokenizer, problems, settings, offset, answers):
        asked.append((problems, settings, offset))
        return [{"number": 0, "correct": True, "verified": True, "tokens": 1}]

    monkeypatch.setattr(search, "evaluate", evaluate)
    search.compare(None, TOK, {"x": SUM}, ["greedy", "beam"], SHORT, offset=7)
    assert asked == [
        (SUM, replace(SHORT, decoder="greedy"), 7),
        (SUM, replace(SHORT, decoder="beam"), 7),
    ]


TREE = [
    sampled("1+2=3\n3*4=13\n<backtrack>", count=3),
    sampled("1+2=3\n3+4=7\n2", count=2),
    finished("1*2=2\n2+4=6\nGoal Reached!", -2.0, count=1),
    finished("1+2=3\n3*4=12\nGoal Reached!", -0.25, count=4, inherited=6, round=1),
    sampled("1+2=3\n<backtrack>", count=5),
]
TREE[-1].inherited = 6
TREE[-1].round = 1
PRODUCT = {"nums": [1, 2, 4], "target": 12}


def test_the_tree_counts_who_chose_an_action_and_not_who_inherited_it():
    tree = search.Tree(TOK, PRODUCT, TREE)
    assert tree.chosen == {
        ("1+2=3",): 3 + 2,
        ("1+2=3", "3*4=13"): 3,
        ("1+2=3", "3+4=7"): 2,
        ("1+2=3", "3+4=7", "2"): 2,
        ("1*2=2",): 1,
        ("1*2=2", "2+4=6"): 1,
        ("1+2=3", "3*4=12"): 4,
    }


def test_the_tree_is_drawn_with_the_most_chosen_first(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    lines = search.draw_tree(TOK, PRODUCT, TREE, Settings()).splitlines()
    assert lines[0] == "numbers [1, 2, 4]  target 12"
    assert lines[1] == "solver: 1 of 48 programs reaches the target: 2+1=3, 4*3=12"
    assert [line.split() for line in lines[2:]] == [
        "action samples".split(),
        "├─ 1+2=3 5 round 1 from here x9; <backtrack> at once x5".split(),
        "│ ├─ 3*4=12 4 goal -0.750, right, selected x4".split(),
        "│ ├─ 3*4=13 3 <backtrack> x3".split(),
        "│ └─ 3+4=7 2".split(),
        "│ └─ 2 2 no goal x2".split(),
        "└─ 1*2=2 1".split(),
        "└─ 2+4=6 1 goal -6.000, [6] left, not 12 alone x1".split(),
    ]


def test_the_tree_is_drawn_with_the_way_to_the_answer_first():
    responses = [
        sampled("1*2=2\n<backtrack>", count=9),
        finished("1+2=3\n3*4=12\nGoal Reached!", -0.25, count=1),
    ]
    lines = search.draw_tree(TOK, PRODUCT, responses, Settings(b=0)).splitlines()
    assert [line.split()[1] for line in lines[3:]] == ["1+2=3", "└─", "1*2=2"]


def test_an_answer_may_have_written_no_action_of_its_own():
    actions = "1+2=3\n3*4=12\n"
    begun = sampled(actions + "<backtrack>")
    answer = finished(actions + search.GOAL, -0.25, inherited=len(ids(actions)), round=1)
    tree = search.Tree(TOK, PRODUCT, [begun, answer])
    assert tree.answer == ("1+2=3", "3*4=12")
    words = [words for words, _ in tree.outcomes[tree.answer]]
    assert "goal -0.750, right, selected at once" in words
    assert search.Tree(TOK, {"nums": [5], "target": 5}, [finished(search.GOAL)]).answer == ()


def test_the_tree_says_where_nobody_reached_the_goal():
    drawn = search.draw_tree(TOK, PRODUCT, TREE[:2], Settings())
    assert drawn.splitlines()[0] == "numbers [1, 2, 4]  target 12  (no sample reached the goal)"


def test_the_solver_says_where_nobody_can_reach_the_goal():
    assert (
        search.solver_line([3, 5, 8, 6], 48) == "solver: none of 1152 programs reaches the target"
    )
    assert search.solver_line([5], 5) == "solver: 1 of 1 programs reaches the target"
    not_asked = "solver: not asked, for the numbers are too many or too large"
    assert search.solver_line([1] * 7, 7) == not_asked
    # their product is 2**32 when it wraps around in 64 bits
    assert search.solver_line([2**32 + 1, 2**32], 2**32) == not_asked


def test_a_wide_tree_is_cut():
    responses = [sampled(f"{number}+1=2\n", count=20 - number) for number in range(8)]
    lines = search.draw_tree(TOK, PRODUCT, responses, Settings(b=0)).splitlines()
    assert len(lines) == 3 + 5 + 1
    assert lines[-1] == "└─ 3 more, x42"


def test_a_long_action_is_cut_so_that_its_count_stands_in_its_column():
    actions = ["1+2=3", "9" * 40, "8" * 40]
    responses = [sampled("\n".join(actions) + "\n", count=7)]
    lines = search.draw_tree(TOK, PRODUCT, responses, Settings(b=0)).splitlines()
    assert [line[29:31] for line in lines[3:]] == [" 7"] * 3
    assert [line[28] for line in lines[3:]] == [" ", "…", "…"]


@pytest.mark.parametrize("columns", [50, 70, 100])
def test_a_line_of_the_tree_is_no_wider_than_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    begun = ids("1+2=3\n")
    responses = [sampled("1+2=3\n<backtrack>", count=3)]
    for round_number in (1, 2):
        text = "1+2=3\n<backtrack>" if round_number == 2 else "1+2=3\n"
        responses.append(replace(sampled(text, 99), inherited=len(begun), round=round_number))
    [line] = search.draw_tree(TOK, PRODUCT, responses, Settings(b=2)).splitlines()[3:]
    assert len(line) <= columns
    assert line.endswith("...")


WORSE = finished("1+2=3\n3*4=12\nGoal Reached!", -0.25)
SURE = finished("1+2=3\n3*4=12\nGoal Reached!", -0.01)
LATER = finished("1+2=3\n3*4=12\nGoal Reached!", -0.01, round=1)


@pytest.mark.parametrize(
    "responses,settings,reason",
    [
        ([SURE, WORSE], {}, "round 0, because an answer scores above -0.2"),
        ([WORSE], {}, "round 0, because there is no new state"),
        ([SURE], {"stop_above": 0.0}, "round 0, because there is no new state"),
        ([WORSE, LATER], {"b": 3}, "round 1, because an answer scores above -0.2"),
        ([WORSE, LATER], {"b": 1}, None),
        ([SURE], {"decoder": "best_of_n"}, None),
    ],
)
def test_the_tree_says_why_a_search_ended_before_its_last_round(responses, settings, reason):
    drawn = search.draw_tree(TOK, PRODUCT, responses, Settings(**settings)).splitlines()
    told = [line for line in drawn if line.startswith("search: ")]
    assert told == ([f"search: it ended after {reason}"] if reason else [])


def test_the_page_says_what_its_decoder_depends_on():
    told = search.settings_line(Settings(b=2, n=8, temperature=0.7, independent=True))
    rules = "samples shared in proportion, ends above -0.2, score with the last line"
    assert told == f"self_backtrack, n = 8, independent samples at temperature 0.7, b = 2, {rules}"
    told = search.settings_line(Settings(**search.PAPER_SEARCH))
    assert told == "self_backtrack, n = 32, independent samples at temperature 0.7, b = 1"
    assert search.settings_line(Settings(decoder="greedy", last_line=False)) == "greedy, n = 1"
    assert search.settings_line(Settings(decoder="beam", n=4, last_line=False)) == "beam, n = 4"


def test_the_prompts_second_round_is_told_above_the_tree():
    responses = [sampled("1+2=4\n<backtrack>"), finished("1+2=3\n", count=4, round=1)]
    head = search.draw_tree(TOK, PRODUCT, responses, Settings()).splitlines()[0]
    assert head.endswith("  (no sample reached the goal)  (round 1 from here x4)")
