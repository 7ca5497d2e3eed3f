"""The verifier against an independent one; every decoder against a plain, slow version of itself."""
import copy
import random
from collections import Counter

import pytest
import torch
from oracles import beam_search, is_right, logits_of, mix, self_backtrack
from transformers import AutoModelForCausalLM

import search
from data import BACKTRACK, GOAL, Tokenizer, generate, new_record
from model import KVCache, Llama, LlamaConfig
from search import Sample, evaluate, select, verify

TOK = Tokenizer.digits()
ROWS = list(generate(new_record(5, [3, 4]), "train", 8))


def decode(*args, **kwargs) -> list[list[Sample]]:
    """The samples of each problem, in the problems' order."""
    return [samples for _, samples in sorted(search.decode(*args, **kwargs))]


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random weights, but a bias to what the search lives on: newlines, `<backtrack>` and the end."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=TOK.vocab_size, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=12, initializer_range=0.3,
                         tie_word_embeddings=False)
    model = Llama(config).eval()
    newline = TOK.tok.token_to_id("\n")
    with torch.no_grad():
        model.lm_head.weight *= 0.5
        direction = model.model(torch.randint(0, TOK.vocab_size, (64, 20))).mean((0, 1))
        for token, push in ((newline, 1.5), (TOK.backtrack, 0.8), (TOK.eos, 0.3)):
            model.lm_head.weight[token] += push * direction / direction.square().sum()
    return model


# ---- Verification --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nums,target,response,complaint", [
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62\nGoal Reached!", ""),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62\nGoal Reached", "the end"),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62", "the end"),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=60\n2+60=62\nGoal Reached!\n", "is no action"),
    ([2, 39, 45, 10], 62, "45-39=6\n10*6=61\n2+60=62\nGoal Reached!", "step 2: 10*6=61: false, it is 60"),
    ([2, 39, 45, 10], 62, "45-39=6\n39+6=45\n<backtrack>", "step 2: 39+6=45: there is no 39"),
    ([2, 39, 45, 10], 60, "45-39=6\n10*6=60\nGoal Reached!", "[2, 60] left"),
    ([2, 39, 45, 10], 63, "45-39=6\n10*6=60\n2+60=62\nGoal Reached!", "[62] left, not 63 alone"),
    ([6, 6], 12, "6+6=12\nGoal Reached!", ""), ([6, 5], 12, "6+6=12\nGoal Reached!", "there is no 6"),
    ([7, 2], 3, "7/2=3\nGoal Reached!", "not whole"), ([7, 0], 0, "7/0=0\nGoal Reached!", "not whole"),
    ([5, 5, 9], 0, "5-5=0\n0/9=0\nGoal Reached!", ""), ([3, 5], 2, "3-5=-2\nGoal Reached!", "no action"),
    ([3, 5], 8, "3+5=8 \nGoal Reached!", "no action"), ([3, 5], 8, "3+5=8\n\nGoal Reached!", "no action"),
    ([3, 5], 8, "٣+5=8\nGoal Reached!", "no action"), ([3, 5], 8, "", "the end"),
    ([3, 5], 8, "3+5=" + "9" * 5000 + "\nGoal Reached!", "no action")])
def test_verifier_says_which_step_fails(nums, target, response, complaint):
    right, why = verify(nums, target, response)
    assert right == (complaint == "") and complaint in why and bool(why) != right


def test_verifier_agrees_with_an_independent_one_on_damaged_answers():
    rng, right, wrong = random.Random(0), 0, 0
    rows = [row for row in generate(new_record(3, [2, 3, 4]), "train", 3000) if row["search_path"].endswith(GOAL)]
    alphabet = "0123456789+-*/=\n" * 3 + "G !<"
    for _ in range(250_000):
        row = rng.choice(rows)
        nums, target, text = list(row["nums"]), row["target"], row["search_path"]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            at, kind = rng.randrange(len(text) + 1), rng.randrange(6)
            if kind == 0:
                text = text[:at] + rng.choice(alphabet) + text[at + 1:]
            elif kind == 1:
                text = text[:at] + text[at + 1:]
            elif kind == 2:
                text = text[:at] + rng.choice(alphabet) + text[at:]
            elif kind == 3:
                lines = text.split("\n")
                rng.shuffle(lines[:-1])
                text = "\n".join(lines[rng.randrange(2):])
            elif kind == 4:
                nums[rng.randrange(len(nums))] = rng.choice(nums) + rng.choice((0, 0, 1))
            else:
                target += rng.choice((0, 1))
        got = verify(nums, target, text)[0]
        assert got == is_right(nums, target, text), (nums, target, text)
        right, wrong = right + got, wrong + (not got)
    assert right > 20_000 and wrong > 100_000


# ---- Random numbers ------------------------------------------------------------------------------------------------------
def test_keyed_numbers():
    keys = torch.arange(100_000)
    assert search.mix(keys[:50], 7).tolist() == [(x + 2 ** 63) % 2 ** 64 - 2 ** 63 for x in (mix(k, 7) for k in range(50))]
    u = search.uniform(keys)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 150                      # chi-squared with 99 degrees of freedom
    first, second = (search.uniform(search.mix(keys, step)) * 10 for step in (1, 2))
    pairs = torch.histc(first.floor() * 10 + second, 100, 0, 100)
    assert ((pairs - 1000) ** 2 / 1000).sum() < 150                       # neighbouring steps are independent


def test_a_token_is_drawn_by_inverting_the_cumulative_distribution():
    logits = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0]]).log()
    row, u = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0.0, 0.49, 0.51, 0.81, 0.0, 0.999999])
    token, logp, rest = search.draw(logits, row, u, torch.zeros(6), 1.0, 0.0)
    assert token.tolist() == [0, 0, 2, 3, 2, 2]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.5, 0.3, 0.2, 1.0, 1.0]))
    torch.testing.assert_close(rest, torch.tensor([0.0, 0.98, 1 / 30, 0.05, 0.0, 0.999999]), atol=1e-5, rtol=0)
    token, logp, _ = search.draw(logits, row, u, torch.zeros(6), 2.0, 0.5)                # of 0.5 and 0.3, at temperature 2
    assert token.tolist() == [0, 0, 0, 2, 2, 2]                           # the first ends at 0.56 now
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.5, 0.5, 0.3, 1.0, 1.0]))  # as at temperature 1, of all tokens


def test_a_code_is_never_spent():
    """After 60 tokens from one code of 24 bits, tokens are still distributed as they should be, and independent."""
    size, logits = 40_000, torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.125, 0.125, 0.0]]).log()
    code, before = search.uniform(torch.arange(size)), torch.zeros(size, dtype=torch.int64)
    for step in range(60):
        fresh = search.uniform(search.mix(torch.arange(size), step))
        token, _, code = search.draw(logits, torch.zeros(size, dtype=torch.int64), code, fresh, 1.0, 0.0)
        pairs, before = torch.bincount(before * 7 + token, minlength=49).view(7, 7), token
        if step:
            expected = size * logits[0].exp()[:, None] * logits[0].exp()
            assert not pairs[expected == 0].any()
            chi = ((pairs - expected) ** 2 / expected)[expected > 0].sum()          # 15 degrees of freedom
            assert chi < 50, step


@pytest.mark.parametrize("min_p", [0.0, 0.05])
def test_samples_are_spread_evenly(model, min_p):
    """Of n samples every path of probability p, whatever its length, is taken floor(n * p) or ceil(n * p) times."""
    n, counts, settings = 3000, Counter(), {"temperature": 0.9, "min_p": min_p, "max_new": 4}
    [samples] = decode(model, TOK, [ROWS[0]], [4], b=0, n=n, **settings)
    counts.update(sample.tokens[:d] for sample in samples for d in range(1, len(sample.tokens) + 1))
    prompt, chance = TOK.prompts([ROWS[0]])[0], {(): 1.0}
    for path in sorted(counts, key=len):
        logits = logits_of(model, prompt + list(path[:-1]))
        chances = logits.softmax(-1)
        following = (logits / 0.9).softmax(-1) * (chances >= min_p * chances.max())
        following /= following.sum()
        chance[path] = chance[path[:-1]] * float(following[path[-1]])
    assert len(counts) > 300 and max(abs(counts[path] - n * chance[path]) for path in counts) < 1.01
    [independent] = decode(model, TOK, [ROWS[0]], [4], b=0, n=n, paper=True, **settings)
    assert len({sample.tokens for sample in independent}) < len({sample.tokens for sample in samples})


def test_sampling_follows_the_model(model):
    """First tokens of 20,000 samples against the softmax at the temperature."""
    problem = ROWS[0]
    plain = {"temperature": 0.7, "min_p": 0, "paper": True}
    samples = decode(model, TOK, [problem], [0], "best_of_n", n=20_000, max_new=1, **plain)[0]
    with torch.no_grad():
        expected = (model(torch.tensor(TOK.prompts([problem])))[0, -1] / 0.7).softmax(-1)
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in samples]), minlength=TOK.vocab_size)
    assert (counts / 20_000 - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5


# ---- Decoders against slow versions of themselves ------------------------------------------------------------------------
def same(samples: list[Sample], expected: list[tuple]):
    assert [s.tokens for s in samples] == [tokens for tokens, *_ in expected]
    for sample, (_, logps, round) in zip(samples, expected):
        torch.testing.assert_close(torch.tensor(sample.logps), torch.tensor(logps), atol=2e-4, rtol=0)
        assert sample.round == round and abs(sample.score - sum(logps) / len(logps)) < 1e-4


@pytest.mark.parametrize("b,n,limit", [(0, 6, None), (1, 9, None), (3, 4, None), (2, 6, 1), (2, 8, 8)])
def test_self_backtracking_equals_the_plain_version(model, b, n, limit):
    search = {"b": b, "n": n, "temperature": 0.8, "limit": limit, "seed": 3, "max_new": 18, "min_p": 0, "paper": True}
    found = decode(model, TOK, ROWS, range(10, 18), **search)
    compared = branched = ended = 0
    for problem, key, samples in zip(ROWS, range(10, 18), found):
        expected = self_backtrack(model, TOK, problem, key, b, n, 0.8, limit or int(n ** 0.5), 3, 18)
        if expected is not None:                                      # None: a uniform within 1e-5 of a boundary
            same(samples, expected)
            compared, branched = compared + 1, branched + any(s.state for s in samples)
            ended += sum(s.tokens[-1] == TOK.eos for s in samples)
    assert compared >= 6 and ended and (branched >= 4 or not b)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_beam_search_equals_the_plain_version(model, n):
    for problem, samples in zip(ROWS, decode(model, TOK, ROWS, range(8), "beam", n=n, max_new=14)):
        expected = beam_search(model, TOK, problem, n, 14)
        assert [s.tokens for s in samples] == [tuple(tokens) for tokens, _ in expected]
        torch.testing.assert_close(torch.tensor([sum(s.logps) for s in samples]), torch.tensor([t for _, t in expected]),
                                   atol=1e-3, rtol=0)


def test_greedy_equals_transformers(model, tmp_path):
    model.save_pretrained(tmp_path, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt, [sample] in zip(TOK.prompts(ROWS), decode(model, TOK, ROWS, range(8), "greedy", max_new=20)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0,
                                   eos_token_id=[TOK.eos, TOK.backtrack])[0, len(prompt):]
        assert sample.tokens == tuple(expected.tolist())


@pytest.mark.parametrize("paper", [True, False])
def test_samples_depend_on_their_keys_alone(model, paper):
    """Whatever the batch, the offset, the order and, if independent, n: problem 13's third sample is always the same."""
    model = copy.deepcopy(model).double()                              # so that no rounding moves a boundary across a uniform
    problems, settings = ROWS * 3, dict(b=2, n=9, seed=1, max_new=18, paper=paper)
    whole = decode(model, TOK, problems, range(24), **settings)
    assert whole[0] != whole[8]           # the same problem under another key differs
    for at in (0, 7, 13, 23):
        alone = decode(model, TOK, [problems[at]], [at], **settings)[0]
        assert [s.tokens for s in alone] == [s.tokens for s in whole[at]]
    if paper:
        few = decode(model, TOK, problems[:5], range(5), b=0, n=4, seed=1, max_new=18, paper=True)
        assert all([s.tokens for s in a] == [s.tokens for s in b[:4]] for a, b in zip(few, whole))
    rows = [evaluate(model, TOK, problems[offset:], "self_backtrack", offset, batch_size=size, **settings)
            for offset, size in ((0, 24), (0, 5), (6, 7))]
    for row in sum(rows, []):
        row["score"] = round(row["score"], 3) if row["score"] else None
    assert rows[0] == rows[1] and rows[0][6:] == rows[2]


def test_no_token_of_a_prefix_is_computed_twice(model, monkeypatch):
    """What goes through the model: the prompts once, every different prefix once, and one token more for each branch."""
    fed, forward = [], Llama.forward

    def counting(self, ids, **kwargs):
        rows = int((kwargs["cache"].length[:len(ids)] > 0).sum())     # rows that only fill up a shape hold nothing
        fed.append(rows if ids.shape[1] == 1 else sum(map(len, TOK.prompts(ROWS))))
        assert ids.shape[1] > 1 or len(ids) < rows + 16
        return forward(self, ids, **kwargs)

    monkeypatch.setattr(Llama, "forward", counting)
    found = decode(model, TOK, ROWS, range(8), b=2, n=16, max_new=18)
    expected = sum(map(len, TOK.prompts(ROWS)))
    for samples in found:
        states = {(s.round, s.tokens[:s.state]) for s in samples}
        expected += sum(1 for round, _ in states if round)
        for round, state in states:                                  # below a state, each different prefix is fed once
            mine = [s.tokens for s in samples if s.round == round and s.tokens[:s.state] == state]
            expected += len({t[:i] for t in mine for i in range(len(state) + 1, len(t))})
    assert sum(fed) == expected
    assert sum(fed) < sum(len(s.tokens) - s.state for samples in found for s in samples)


@pytest.mark.parametrize("batch_size", [1, 3, 128, None])
def test_the_cache_is_bounded_and_parked_rows_return(model, monkeypatch, batch_size):
    """At most batch_size * n rows at any step (without it, what fits CACHE_BYTES), the same samples as with one large batch,
    and no parked row lost."""
    engines, sizes, model = [], [], copy.deepcopy(model).double()
    longest = max(map(len, TOK.prompts(ROWS))) + 18
    monkeypatch.setattr(search, "CACHE_BYTES", 2 * 9 * KVCache(model.config, 1, longest, "cpu", torch.float64).kv.nbytes)
    most = batch_size or 2

    class Watched(search.Engine):
        def __init__(self, *args):
            super().__init__(*args)
            engines.append(self)

        def step(self, b):
            sizes.append(len(self.logits))
            assert len(self.flying) <= most
            return super().step(b)

    whole = decode(model, TOK, ROWS, range(8), b=3, n=9, max_new=18, batch_size=128)
    monkeypatch.setattr(search, "Engine", Watched)
    assert [[s.tokens for s in samples] for samples in decode(model, TOK, ROWS, range(8), b=3, n=9, max_new=18,
                                                              batch_size=batch_size)] == [[s.tokens for s in x] for x in whole]
    assert max(sizes) <= 9 * most and engines[0].spare
    assert sorted(engines[0].spare) == list(range(next(engines[0].unused)))


def test_no_problems_no_samples(model):
    assert decode(model, TOK, [], []) == [] and evaluate(model, TOK, [], "greedy") == []


# ---- Stepping back, selection, evaluation --------------------------------------------------------------------------------
def ids(text: str) -> tuple[int, ...]:
    return tuple(TOK.tok.encode(text).ids)


@pytest.mark.parametrize("text,state", [
    ("45-39=6\n39+6=45\n<backtrack>", "45-39=6\n"), ("45-39=6\n<backtrack>", ""), ("45-39=6\n39+<backtrack>", "45-39=6\n"),
    ("45-39=6\n3<backtrack>", "45-39=6\n"), ("<backtrack>", ""), ("\n<backtrack>", ""), ("1\n2\n\n<backtrack>", "1\n2\n")])
def test_rolling_back_drops_the_last_action(text, state):
    assert search.roll_back(ids(text), TOK) == ids(state)


def test_selection():
    def sample(text, score, end=GOAL):
        return Sample((*ids(text), TOK.eos), (), 0, 0, end, score)

    a, b, c = sample("1", -0.5), sample("2", -0.1), sample("3", -0.05, BACKTRACK)
    assert select([a, a, b, c], "self_backtrack") is b and select([a, a, b, c], "majority") == a
    assert select([a, b], "majority") is b and select([c], "best_of_n") is None


@pytest.mark.parametrize("text", ["3+5=8\nGoal Reached!", "3+5=8\n1+", "3+5"])
def test_the_score_is_the_mean_and_the_last_line(text):
    tokens = (*ids(text), TOK.eos)
    logps = tuple(-0.1 * (i + 1) for i in range(len(tokens)))
    last = len(ids(text.split("\n")[-1])) + 1                             # tokens of the last line, end-of-text included
    assert search.rate(tokens, logps, TOK, paper=True) == pytest.approx(sum(logps) / len(tokens))
    assert search.rate(tokens, logps, TOK, paper=False) == pytest.approx(sum(logps) / len(tokens) + sum(logps[-last:]))


def test_judging():
    tokens = (*ids("3+5=8\nGoal Reached!"), TOK.eos)
    false = (*ids("5+3=9\nGoal Reached!"), TOK.eos)
    problem = {"nums": [3, 5], "target": 8}
    right, wrong = Sample(tokens, (), 0, 0, GOAL, -1.0), Sample(false, (), 3, 1, GOAL, -0.5)
    row = search.judge(TOK, problem, [right, wrong], "self_backtrack")
    assert (row["correct"], row["verified"], row["response"]) == (False, True, "5+3=9\nGoal Reached!")
    assert "false, it is 8" in row["reason"] and row["tokens"] == 2 * len(tokens) - 3
    assert row["solution"] == "3+5=8\nGoal Reached!"
    assert search.judge(TOK, problem, [right], "self_backtrack")["correct"]
    assert search.judge(TOK, problem, [], "self_backtrack")["reason"] == "no sample reached the goal"


def test_compare_prints_a_line_for_each_split_and_decoder(monkeypatch, capsys):
    rows = [{"correct": i < 30, "verified": True, "tokens": 2} for i in range(100)]
    monkeypatch.setattr(search, "evaluate", lambda *arguments, **search: rows)
    assert search.compare(None, TOK, {"x": [], "y": []}, ["greedy"]) == {(split, "greedy"): rows for split in "xy"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == "greedy, x 30.0 [21.9, 39.6] 100.0 [96.3, 100.0] 2.0".split() and lines[2][1] == "y"
    assert search.compare(None, TOK, {}, ["greedy"]) == {}
