"""Slow, independent second ways of computing things: exact fractions, brute force, no cache, one sample at a time."""
from fractions import Fraction
from itertools import permutations

import torch


def solutions(nums: tuple[int, ...], target: int) -> bool:
    """Can the numbers reach the target by the task's rules? By recursion on exact fractions."""
    if len(nums) == 1:
        return nums[0] == target
    for a, b, *rest in permutations(map(Fraction, nums)):
        results = [a + b, a * b] + ([a - b] if a >= b else []) + ([a / b] if b else [])
        if any(r.denominator == 1 and solutions((*rest, r), target) for r in results):
            return True
    return False


def is_right(nums: list[int], target: int, response: str) -> bool:
    """Does the response solve the problem? By splitting at the signs and comparing exact fractions."""
    lines, there = response.split("\n"), list(nums)
    if lines.pop() != "Goal Reached!":
        return False
    for line in lines:
        signs = [c for c in line if c not in "0123456789"]
        if len(signs) != 2 or signs[0] not in "+-*/" or signs[1] != "=":
            return False
        parts = line.replace(signs[0], " ", 1).replace("=", " ", 1).split(" ")
        if not all(parts):
            return False
        a, b, c = map(int, parts)
        for x in (a, b):
            if x not in there:
                return False
            there.remove(x)
        if signs[0] == "/" and b == 0:
            return False
        exact = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b or 1)}[signs[0]]
        if exact != c:
            return False
        there.append(c)
    return there == [target]


def labelled_characters(prompt: str, path: str, wrong: int = 1) -> list[bool]:
    """The loss mask of section 4.1, character by character; the last `wrong` actions before the tag are wrong."""
    mask = [False] * len(prompt) + [True] * len(path)
    body, tag, rest = path.partition("<backtrack>")
    if tag and not rest and body:
        hidden = sum(map(len, body.splitlines(keepends=True)[-wrong:]))
        for i in range(len(prompt) + len(body) - hidden, len(prompt) + len(body)):
            mask[i] = False
    return mask


def mix(key: int, part: int) -> int:
    """search.mix on Python integers, modulo 2^64."""
    mask = 2 ** 64 - 1
    x = (key * 31 + part + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def logits_of(model, tokens: list[int]) -> torch.Tensor:
    """Next-token logits after `tokens`, in float64, everything computed anew."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1].double()


def sample_one(model, tok, prompt, state, temperature, key, max_new):
    """One continuation of prompt + state, token by token: the tokens, their log-probabilities, the narrowest escape."""
    tokens, logps, margin = [], [], 1.0
    for t in range(max_new):
        logits = logits_of(model, prompt + state + tokens)
        u = (mix(mix(key, t), 0) >> 40) / 2 ** 24
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        token = int((cumulative <= u).sum())
        margin = min(margin, float((cumulative[:-1] - u).abs().min()))
        tokens.append(token)
        logps.append(float(logits.log_softmax(-1)[token]))
        if token in (tok.eos, tok.backtrack):
            break
    return tokens, logps, margin


def self_backtrack(model, tok, problem, key, b, n, temperature, limit, seed, max_new):
    """method.md's pseudocode for one problem, as it stands there: [(tokens, logps, round)], or None where rounding decides."""
    prompt = tok.prompts([problem])[0]
    frontier, visited, out = [([], [])], {()}, []
    for round in range(b + 1):
        following = []
        for rank, (state, before) in enumerate(frontier):
            for i in range(n):
                parts = [mix(seed, key)]
                for part in (round, rank, i):
                    parts.append(mix(parts[-1], part))
                tokens, logps, margin = sample_one(model, tok, prompt, state, temperature, parts[-1], max_new - len(state))
                if margin < 1e-5:
                    return None
                out.append((tuple(state + tokens), before + logps, round))
                if tokens[-1] != tok.backtrack or len(following) >= limit:
                    continue
                branch = (state + tokens)[:-2]                         # without `<backtrack>` and the action's last token
                while branch and not tok.decode(branch).endswith("\n"):
                    branch.pop()
                back = len(branch)
                if tuple(branch) not in visited:
                    visited.add(tuple(branch))
                    following.append((branch, (before + logps)[:back]))
        frontier = following
    return out


def beam_search(model, tok, problem, n, max_new):
    """Beam search for one problem: [(tokens, total log-probability)] of all that ended."""
    prompt, beams, done = tok.prompts([problem])[0], [([], 0.0)], []
    for t in range(max_new):
        options = []
        for tokens, total in beams:
            logps = logits_of(model, prompt + tokens).log_softmax(-1)
            options += [(total + float(logp), tokens + [i]) for i, logp in enumerate(logps)]
        best = sorted(options, key=lambda option: -option[0])[:n - len(done)]
        over = [option for option in best if option[1][-1] in (tok.eos, tok.backtrack) or t == max_new - 1]
        done += [(tokens, total) for total, tokens in over]
        beams = [(tokens, total) for total, tokens in best if (total, tokens) not in over]
        if not beams:
            break
    return done
