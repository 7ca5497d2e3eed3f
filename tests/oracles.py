"""Slow, independent second ways of computing things: exact fractions, brute force, no cache, one
sample at a time."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, groupby, permutations

import numpy as np
import torch

import search

# ---- The task ------------------------------------------------------------------------------------


def solutions(nums: tuple[int, ...], target: int) -> bool:
    """Can the numbers reach the target by the task's rules? By recursion on exact fractions."""
    if len(nums) == 1:
        return nums[0] == target
    for a, b, *others in permutations(map(Fraction, nums)):
        results = [a + b, a * b]
        if a >= b:
            results.append(a - b)
        if b != 0:
            results.append(a / b)
        for result in results:
            if result.denominator == 1 and solutions((*others, result), target):
                return True
    return False


def count_solutions(nums: list, target: int) -> int:
    """How many ways to choose a pair and an operator, step after step, lead to the target."""
    if len(nums) == 1:
        return int(nums[0] == target)
    count = 0
    for chosen in combinations(range(len(nums)), 2):
        others = [Fraction(number) for place, number in enumerate(nums) if place not in chosen]
        b, a = sorted(Fraction(nums[place]) for place in chosen)
        for result in (a + b, a - b, a * b, a / b if b else Fraction(1, 2)):
            if result.denominator == 1:
                count += count_solutions([*others, result], target)
    return count


def is_right(nums: list[int], target: int, response: str) -> bool:
    """Does the response solve the problem? By splitting at the signs and comparing exact
    fractions."""
    *lines, end = response.split("\n")
    left = list(nums)
    if end != "Goal Reached!":
        return False
    for line in lines:
        signs = [character for character in line if character not in "0123456789"]
        if len(signs) != 2 or signs[0] not in "+-*/" or signs[1] != "=":
            return False
        operator = signs[0]
        parts = line.replace(operator, " ", 1).replace("=", " ", 1).split(" ")
        if not all(parts) or any(part != str(int(part)) for part in parts):
            return False
        a, b, claimed = map(int, parts)
        for operand in (a, b):
            if operand not in left:
                return False
            left.remove(operand)
        if operator == "/" and b == 0:
            return False
        results = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b or 1)}
        if results[operator] != claimed:
            return False
        left.append(claimed)
    return left == [target]


def labelled_characters(prompt: str, path: str, no_loss: list[int]) -> list[bool]:
    """Which characters of prompt + path carry loss (section 4.1 of arXiv 2502.04404): none of the
    prompt and none of the actions whose indices are in no_loss, one character after the other."""
    mask = [False] * len(prompt)
    action = 0
    for character in path.partition("<backtrack>")[0]:
        mask.append(action not in no_loss)
        if character == "\n":
            action += 1
    return mask + [True] * (len(prompt) + len(path) - len(mask))


# ---- The search ----------------------------------------------------------------------------------


def logits_after(model, tokens: list[int]) -> list[float]:
    """What the model says of the token that follows, everything computed anew."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1].tolist()


def softmax(logits: list[float]) -> list[float]:
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def shares_of(logits: list[float], temperature: float, min_p: float) -> list[float]:
    """How often each token is to be drawn: tokens less than min_p times as probable as the best are
    not; the others are, by the softmax at the temperature."""
    chances = softmax(logits)
    least = min_p * max(chances)
    shares = softmax([logit / temperature for logit in logits])
    for token, chance in enumerate(chances):
        if chance < least:
            shares[token] = 0.0
    total = sum(shares)
    return [share / total for share in shares]


@dataclass
class Sample:
    """One sample of a state, by itself."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    point: float  # where in [0, 1) it is, 1 being all that can follow its tokens
    spacing: float  # how far it is from the next sample there


def draw_token(sample: Sample, logits: list[float], settings: search.Settings) -> None:
    """The sample takes the token in whose interval its point lies; the interval becomes [0, 1)."""
    shares = shares_of(logits, settings.temperature, settings.min_p)
    token = 0
    begin = 0.0
    while begin + shares[token] <= sample.point:
        begin += shares[token]
        token += 1
    sample.tokens += (token,)
    sample.logps += (math.log(softmax(logits)[token]),)
    sample.point = (sample.point - begin) / shares[token]
    sample.spacing /= shares[token]


def same_so_far(samples: list[Sample]) -> list[list[Sample]]:
    """Samples in groups of those with equal tokens. They are in order, so equal ones are
    neighbours."""
    return [list(group) for _, group in groupby(samples, key=lambda sample: sample.tokens)]


def expand(model, tokenizer, prompt: list[int], state, place: int, key: int, settings):
    """The samples of one state (a search.State), each by itself; merged, at last, as the engine
    reports them: short ones first, equal ones as one Response."""
    rng = np.random.default_rng([settings.seed, key, state.round, place])
    first = rng.random() / state.count
    samples = []
    for number in range(state.count):
        point = first + number / state.count
        samples.append(Sample(state.tokens, state.logps, point, 1 / state.count))
    going_on = samples
    while going_on:
        if settings.independent:  # section 4.2: every sample draws for itself
            for group in same_so_far(going_on):
                for sample, point in zip(group, np.sort(rng.random(len(group)))):
                    sample.point = float(point)
                    sample.spacing = 0.0
        for sample in going_on:
            draw_token(sample, logits_after(model, prompt + list(sample.tokens)), settings)
        for group in same_so_far(going_on):
            if group[0].spacing > 1:
                group[0].point = rng.random()
        ends = (tokenizer.eos, tokenizer.backtrack)
        going_on = [
            sample
            for sample in going_on
            if sample.tokens[-1] not in ends and len(sample.tokens) < settings.max_new_tokens
        ]
    paths = []
    for group in same_so_far(sorted(samples, key=lambda sample: len(sample.tokens))):
        path = search.Response(group[0].tokens, group[0].logps, count=len(group))
        path.inherited = len(state.tokens)
        path.round = state.round
        path.score = score_of(path, tokenizer, settings)
        paths.append(path)
    return paths


def score_of(path: search.Response, tokenizer, settings: search.Settings) -> float | None:
    """Of a response that reached the goal: the mean of its log-probabilities (section 4.2) and, if
    asked for, the sum of its last line's on top."""
    words = [tokenizer.backend.id_to_token(token) for token in path.tokens]
    last_line = words[::-1]
    if "\n" in last_line:
        last_line = last_line[: last_line.index("\n")]
    if last_line != [tokenizer.backend.id_to_token(tokenizer.eos), search.GOAL]:
        return None
    score = np.mean(path.logps)
    return score + sum(path.logps[-2:]) if settings.last_line else score


def self_backtrack(model, tokenizer, problem: dict, key: int, limit: int, settings) -> list:
    """Section 4.2 of arXiv 2502.04404 for one problem: the same algorithm, but every state is
    expanded alone, in plain Python. Returns all samples (search.Response, with no slots)."""
    [prompt] = tokenizer.prompts([problem])
    b, n = settings.b, settings.n
    algorithm = search.self_backtrack(
        tokenizer, b, n, limit, settings.proportional, settings.stop_above
    )
    all_responses = []
    frontier = next(algorithm)
    while frontier:
        samples = []
        for place, state in enumerate(frontier):
            samples += expand(model, tokenizer, prompt, state, place, key, settings)
        all_responses += samples
        try:
            frontier = algorithm.send(samples)
        except StopIteration:
            frontier = []
    return all_responses


def beam_search(model, tokenizer, problem: dict, n: int, longest: int) -> list[tuple]:
    """Beam search for one problem: (tokens, total log-probability) of all that ended, in order."""
    [prompt] = tokenizer.prompts([problem])
    beams = [((), 0.0)]
    ended = []
    while beams:
        options = []
        for tokens, total in beams:
            chances = softmax(logits_after(model, prompt + list(tokens)))
            for token, chance in enumerate(chances):
                options.append(((*tokens, token), total + math.log(chance)))
        options.sort(key=lambda option: -option[1])
        beams = []
        for tokens, total in options[: n - len(ended)]:
            over = tokens[-1] in (tokenizer.eos, tokenizer.backtrack) or len(tokens) == longest
            (ended if over else beams).append((tokens, total))
    return ended
