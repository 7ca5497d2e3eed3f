"""Self-backtracking: search by sampling, stepping back and branching. Read after data.py.

The model says `<backtrack>` when its last action was a mistake, and the search of section 4.2
(arXiv 2502.04404) trusts it. With b rounds of stepping back, n samples of the prompt, and
limit = int(sqrt(n)):

1. Round 0: sample n continuations of the prompt. Each goes on until the model ends it, normally
   after `Goal Reached!`, or says `<backtrack>`, or until it is too long.
2. Rounds 1 to b: the samples of the previous round that end in `<backtrack>` drop their last
   action. What is left is a state to branch from. The frontier is made of states that have not
   been visited. Sample new continuations of them:
   - the paper: n for each of at most `limit` states; the prompt counts as visited.
   - ours, the default: for every sample that stepped back to a state, `limit` new ones. The prompt
     may be sampled once more, because most samples step back to it.
3. Of all rounds, the samples that reached the goal are candidates. The candidate with the best
   score is the answer. The verifier is not used.

By default a search also ends early, if it has a confident answer. (--paper: the paper's rule, but
for the order of states.)

For instance, with the numbers 52, 49, 38, 6, the target 21, n = 32, and limit = 5, in fp32, by our
rule. (Blanks stand for newlines, and `...` for what is left out.)

    round 0    52-49=3 6/3=2 38/2=19 <backtrack>            6 samples
               49-38=11 <backtrack>                         3 samples
               38+6=44 <backtrack>                          2 samples
               52-38=14 14*6=84 <backtrack>                 2 samples
               ...
    frontier   52-49=3 6/3=2                                6 stepped back: 30 new samples
               the prompt                                   17 stepped back: 85 new samples (from
                                                            the second and third lines, and others)
               52-38=14                                     2 stepped back: 10 new samples
               ...
    round 1    52-38=14 49*6=294 294/14=21 Goal Reached!    1 of these 10 samples, 2 of the 85
               ...
    answer     this one, for there is no other candidate

    python search.py
    python search.py --numbers 52 49 38 6 --target 21 --b 0
    python search.py --data val --decoder self_backtrack --b 1 --n 32 --num 500

Shapes: R responses, M the largest count of samples in one of them, V vocabulary size.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice, product
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import ACTION, BACKTRACK, GOAL, Tokenizer, Verdict, load_record, load_rows
from data import load_validation, paint, prompt_text, solve, verify, warn_of_unlike
from model import BOOL, COUNT, DTYPES, Arguments, CachedRows, KVCache, Llama, Slot, UserError, above
from model import at_least, best_dtype, check_fields, cli, device_rank_world, fingerprint, is_main
from model import no_bar

# ---- 1. The algorithm, for one problem (paper, section 4.2) --------------------------------------


@dataclass(eq=False)
class State:
    """Where samples begin: at the prompt, or after the actions that a step back has kept."""

    # what the algorithm uses
    tokens: tuple[int, ...] = ()  # those after the prompt
    logps: tuple[float, ...] = ()  # the log-probability of each token, at temperature 1
    stepped_back: int = 0  # how many samples have stepped back to it
    count: int = 0  # how many samples to draw
    round: int = 0  # in which round
    # what the engine needs, below
    slots: tuple[Slot, ...] = ()  # in the cache, of the prompt and of these tokens
    search: "Search | None" = None  # which it belongs to
    place: int = 0  # its index in the frontier
    rng: np.random.Generator | None = None
    ended: list["Response"] = field(default_factory=list)  # the responses that are complete
    finished: bool = False  # are all of its responses complete?


@dataclass(eq=False)
class Response:
    """What samples of a state have written so far. Samples with the same tokens are one Response,
    with their count."""

    # what the algorithm uses
    tokens: tuple[int, ...] = ()  # those after the prompt; its state's come first
    logps: tuple[float, ...] = ()  # as in State
    count: int = 1  # how many samples have written it
    round: int = 0  # in which round it was sampled
    inherited: int = 0  # how many of its first tokens it has from its state
    score: float | None = None  # of a complete response that has reached the goal, see `rate`
    # what the engine needs, below
    slots: tuple[Slot, ...] = ()  # of the prompt and the tokens (but not of the one that ends it)
    state: State | None = None  # where it began, while it grows
    first_point: float = 0.0  # the lowest of its samples' points, see `spread`
    spacing: float = 1.0  # the distance from one point to the next


def self_backtrack(
    tokenizer: Tokenizer,
    b: int,
    n: int,
    limit: int,
    proportional: bool = False,
    stop_above: float = 0.0,
) -> Generator[list[State], list[Response], None]:
    """Search one problem. This is a generator, so that the samples of many problems can be drawn
    together: it yields a frontier, is sent the responses to its states, and continues.

        search = self_backtrack(tokenizer, b, n, limit)
        frontier = next(search)            # runs to the first `yield`: the prompt alone
        frontier = search.send(responses)  # `responses = yield frontier` receives them, and the
                                           # search runs to the next `yield`, or to its end, which
                                           # raises StopIteration

    The caller rates the responses (`rate_candidates`) before it sends them, and keeps them: at the
    end `judge` lets `select` choose among all of them. A round draws at most limit * n samples. A
    search ends if there is no new state, and at the latest after round b.

    A state does not rule out the action that was dropped: a sample may take it again. If a sample
    of a state says `<backtrack>` at once, without an action of its own, the state's last action is
    dropped: so the next round begins still closer to the prompt.

    What is ours is off in this function, and on in `Settings`. `proportional`: every sample that
    steps back gives its state `limit` new ones (`share_in_proportion`), and the prompt may be
    sampled once more. stop_above: a search ends if the best candidate of a round has a score
    (`rate`) above it. (No score is above 0.)
    """
    share = share_in_proportion if proportional else share_as_the_paper
    # () is the prompt. In the paper it counts as visited; in ours it may be branched from once.
    visited = set() if proportional else {()}
    responses = yield [State(count=n)]  # round 0: n samples of the prompt, with no tokens after it
    for round_number in range(1, b + 1):
        if is_sure(responses, stop_above):
            return
        frontier = share(new_states(responses, visited, tokenizer), n, limit)
        if not frontier:
            return
        for state in frontier:
            visited.add(state.tokens)  # only these: a state beyond the paper's limit stays new
            state.round = round_number
        responses = yield frontier  # `count` samples of each state, each until it ends


def new_states(responses: list[Response], visited: set, tokenizer: Tokenizer) -> list[State]:
    """The states that have not been visited, in the order of the responses: state by state of the
    last frontier, and as they ended. (Several responses may step back to the same state.)"""
    found = {}  # by their tokens
    for response in responses:
        if steps_back(response, tokenizer):
            state = roll_back(response, tokenizer)  # trust the model: drop its last action
            if state.tokens not in visited:
                found.setdefault(state.tokens, state).stepped_back += response.count
    return list(found.values())


def share_in_proportion(states: list[State], n: int, limit: int) -> list[State]:
    """Ours: for every sample that stepped back to a state it gets `limit` new ones. If more than n
    samples stepped back, which may happen from round 2 on, limit * n new ones are shared in
    proportion, rounded down. (No state gets none, because a round has at most limit * n samples.)
    """
    in_all = sum(state.stepped_back for state in states)
    for state in states:
        state.count = state.stepped_back * limit * n // max(n, in_all)
    return states


def share_as_the_paper(states: list[State], n: int, limit: int) -> list[State]:
    """At most `limit` states, with n samples each. The paper takes them in the order of the
    samples, which is random. Here equal samples are one response, so the states come first that
    most samples stepped back to. (`sorted` leaves states of equally many in their order.)"""
    most_first = sorted(states, key=lambda state: state.stepped_back, reverse=True)
    frontier = most_first[:limit]
    for state in frontier:
        state.count = n
    return frontier


def steps_back(response: Response, tokenizer: Tokenizer) -> bool:
    """Does this response end in `<backtrack>`?"""
    return response.tokens[-1] == tokenizer.backtrack


def roll_back(response: Response, tokenizer: Tokenizer) -> State:
    """Drop `<backtrack>` and the last action: of the lines 4-2=2, 25*2=52, <backtrack> the first is
    kept. An unfinished action is dropped in the same way: 4-2=2, 25*<backtrack>. The state has the
    logps and the slots of the tokens that are kept."""
    kept = line_begin(response.tokens[:-1], tokenizer)
    # It has slots for the prompt and for all of its tokens but `<backtrack>`, which ended it; or
    # none at all, in a search without a cache.
    dropped_slots = len(response.tokens) - 1 - kept
    slots = response.slots[: len(response.slots) - dropped_slots]
    return State(response.tokens[:kept], response.logps[:kept], slots=slots)


def line_begin(tokens: tuple[int, ...], tokenizer: Tokenizer) -> int:
    """The position at which the last line of `tokens` begins. (A newline at the end is a part of
    the last line.)"""
    begin = max(len(tokens) - 1, 0)
    while begin > 0 and tokens[begin - 1] not in tokenizer.line_ends:
        begin -= 1
    return begin


def reached_goal(response: Response, tokenizer: Tokenizer) -> bool:
    """Is this response a candidate? (One that was cut because it became too long is not.)"""
    if response.tokens[-1] != tokenizer.eos:
        return False
    return tokenizer.decode(response.tokens).split("\n")[-1] == GOAL


def rate(response: Response, tokenizer: Tokenizer, last_line: bool) -> float:
    """The score: the mean log-probability of the response's tokens, end-of-text included, as in the
    paper. Ours, with last_line: plus the log-probability of the whole last line. It says how surely
    the model preferred `Goal Reached!` to `<backtrack>`. (A sum, not a mean, because it is the log
    of one probability: that of being done.)"""
    score = sum(response.logps) / len(response.logps)
    if last_line:
        score += sum(response.logps[line_begin(response.tokens, tokenizer) :])
    return score


def rate_candidates(responses: list[Response], tokenizer: Tokenizer, last_line: bool) -> None:
    """Give every response that reached the goal its score."""
    for response in responses:
        if reached_goal(response, tokenizer):
            response.score = rate(response, tokenizer, last_line)


def candidates(responses: list[Response]) -> list[Response]:
    """The responses that reached the goal, with the best score first."""
    found = [response for response in responses if response.score is not None]
    return sorted(found, key=lambda response: -response.score)


def select(responses: list[Response]) -> Response | None:
    """The answer: the candidate with the best score."""
    return next(iter(candidates(responses)), None)


def is_sure(responses: list[Response], stop_above: float) -> bool:
    """Has a candidate among these responses a score above stop_above?"""
    best = select(responses)
    return best is not None and best.score > stop_above


@dataclass(frozen=True)
class Settings:
    """How to search. The defaults were found by trial with the shipped model, b = 1 and n = 32.
    PAPER_SEARCH is the paper's rule, but for the order of states (`share_as_the_paper`)."""

    decoder: str = "self_backtrack"  # one of DECODERS
    b: int = 1  # rounds of stepping back
    n: int = 32  # samples of the prompt (in the paper's rule of every state), or beams
    temperature: float = 2.0
    min_p: float = 0.002  # drop tokens that are less probable than min_p times the best
    top_k: int = 0  # keep only the k most probable tokens; 0: all
    top_p: float = 1.0  # keep only the most probable tokens that add up to this probability
    independent: bool = False  # True: each sample draws for itself; False: spread evenly
    proportional: bool = True  # `limit` new samples for each that stepped back? False: n a state
    last_line: bool = True  # add the last line's log-probability to the score?
    stop_above: float = -0.2  # a candidate with a better score ends the search; 0: none does
    # None: int(sqrt(n)). Ours: how many new samples for each that stepped back. The paper's: how
    # many states a round has at most. Either way a round draws at most limit * n samples.
    limit: int | None = None
    max_new_tokens: int = 64  # the maximum length of a response, its state's tokens included
    seed: int = 0
    batch_size: int = 128  # the maximum of states expanded together
    cache_gib: float = 1.0  # memory for keys and values

    def prompt_samples(self) -> int:
        """How many samples or beams the prompt gets. Greedy decoding is a single beam."""
        return 1 if self.decoder == "greedy" else self.n

    def algorithm(self, tokenizer: Tokenizer):
        """One problem's search. Best of n, beam search and greedy decoding are self-backtracking
        that never steps back."""
        b = self.b if self.decoder == "self_backtrack" else 0
        return self_backtrack(
            tokenizer,
            b,
            self.prompt_samples(),
            self.limit or math.isqrt(self.n),
            self.proportional,
            self.stop_above,
        )

    def sampling_rule(self) -> Callable[..., list["Draw"]]:
        if self.decoder in ("greedy", "beam"):
            return beams
        return independently if self.independent else spread


DECODERS = ("greedy", "beam", "best_of_n", "self_backtrack")
PAPER_SEARCH = {
    "temperature": 0.7,
    "min_p": 0.0,
    "independent": True,
    "proportional": False,
    "last_line": False,
    "stop_above": 0.0,
}


# ---- 2. One step: which tokens the samples take --------------------------------------------------
# A sampling rule gets R responses and the logits (R, V) of their next tokens. It returns a Draw for
# every different continuation: samples of a response that take the same token stay together. A
# Draw's logp enters the score, so it is taken before temperature and filters.
#
# The tokens, in the order of their ids, divide [0, 1) into intervals. The length of an interval is
# the token's share: its probability after temperature and filters. A sample is a point in [0, 1):
# it takes the token in whose interval it lies.


class Draw(NamedTuple):
    parent: int  # which of the R responses continues
    token: int
    count: int  # how many of its samples take this token
    logp: float  # the token's log-probability, at temperature 1
    first_point: float = 0.0  # of these samples, after the stretch; see `spread`
    spacing: float = 1.0


def independently(
    logits: torch.Tensor, responses: list[Response], settings: Settings
) -> list[Draw]:
    """The paper's rule: every sample draws a new point for every token. (`look_up` needs them in
    ascending order; the samples of a response are interchangeable.)"""
    most = max(response.count for response in responses)
    points = np.ones((len(responses), most))  # (R, M)
    for own_points, response in zip(points, responses):
        drawn = response.state.rng.random(response.count)
        own_points[: response.count] = np.sort(drawn)
    no_spacing = np.zeros(len(responses))
    return look_up(logits, points, no_spacing, responses, settings)


def spread(logits: torch.Tensor, responses: list[Response], settings: Settings) -> list[Draw]:
    """Samples spread evenly (arithmetic sampling, Vilnis et al., 2023).

    If a state gets n samples, they are n points, 1 / n apart. The samples in a token's interval
    take this token. Then the interval, with its points in it, is stretched to [0, 1), and the
    points choose the next token in the same way. Only two things are random: the first point, in
    [0, 1 / n), and the points of samples whose spacing has grown above 1 (see `extend`).

    Four samples at 0.1, 0.35, 0.6, 0.85, and two tokens of probabilities 0.4 and 0.6: the first two
    samples take the first token. Its interval [0, 0.4) is stretched to [0, 1), and they are at 0.25
    and 0.875: their first point is 0.25, and their spacing is 0.25 / 0.4 = 0.625.

    So a whole response of probability p (the product of its tokens' shares) is taken by floor(n p)
    or ceil(n p) samples, whereas independent samples might all take the same one."""
    most = max(response.count for response in responses)
    first_point = np.array([response.first_point for response in responses])
    spacing = np.array([response.spacing for response in responses])
    points = first_point[:, None] + spacing[:, None] * np.arange(most)  # (R, M)
    return look_up(logits, points, spacing, responses, settings)


def look_up(logits, points, spacing, responses: list[Response], settings: Settings) -> list[Draw]:
    """The Draws of points (R, M), ascending in each row: first a response's `count` points, then
    filler. (`find_tokens` finds the token of every point; here equal ones are put together.)"""
    rows_at_once = max(2**24 // logits.shape[1], 1)  # fewer with a large vocabulary
    found = []
    for begin in range(0, len(logits), rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        found.append(find_tokens(logits[rows], points[rows], settings))
    token, share, stretched, logp = torch.cat(found, 1).cpu().numpy()  # all (R, M)
    token = token.astype(np.int64)
    check_numbers(share)

    # Each sample as one number, for its response and its token: equal numbers are a Draw.
    counts = np.array([response.count for response in responses])
    row, column = np.nonzero(np.arange(token.shape[1]) < counts[:, None])  # without filler
    samples = row * logits.shape[1] + token[row, column]
    _, first, count = np.unique(samples, return_index=True, return_counts=True)
    parent, lowest = row[first], column[first]  # of each Draw: its row, and its lowest point
    draws = zip(
        parent.tolist(),
        token[parent, lowest].tolist(),
        count.tolist(),
        logp[parent, lowest].tolist(),
        stretched[parent, lowest].tolist(),
        (spacing[parent] / share[parent, lowest]).tolist(),
    )
    return [Draw(*values) for values in draws]


def find_tokens(logits: torch.Tensor, points: np.ndarray, settings: Settings) -> torch.Tensor:
    """For each of points (R, M), four values (4, R, M): the token in whose interval it lies, the
    length of the interval, where the point is after the interval is stretched to [0, 1), and the
    token's log-probability at temperature 1. (In one tensor, to wait for a GPU only once.)"""
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    logps = logits.to(precision).log_softmax(-1)  # (R, V)
    shares = shares_of_tokens(logps, settings)
    ends = shares.cumsum(-1)  # token t covers [ends[t] - shares[t], ends[t])

    # Every point must lie below the last end, so that searchsorted finds a token. The last end is 1
    # but for rounding errors, and the next lines only guard against these.
    below_one = 1 - torch.finfo(precision).eps
    points = torch.from_numpy(points).to(logits.device, precision).clamp(max=below_one)
    points = points * ends[:, -1:]
    token = torch.searchsorted(ends, points, right=True)  # (R, M): the first that ends beyond it
    token = token.clamp(max=ends.shape[1] - 1)  # only for logits that `check_numbers` will refuse
    share = shares.gather(1, token)
    stretched = (points - (ends.gather(1, token) - share)) / share
    stretched = stretched.clamp(0, below_one)
    logp = logps.gather(1, token)
    return torch.stack([token.to(precision), share, stretched, logp])


def shares_of_tokens(logps: torch.Tensor, settings: Settings) -> torch.Tensor:
    """(R, V): the probability with which each token is drawn, given its logp at temperature 1.

    Tokens that are less than min_p times as probable as the best one are never drawn (min-p
    sampling, Nguyen et al., 2024). Top-k and top-p apply after the temperature, as in transformers.
    """
    tempered = logps / settings.temperature
    if settings.min_p > 0:
        too_rare = logps < logps.amax(-1, keepdim=True) + math.log(settings.min_p)
        tempered = tempered.masked_fill(too_rare, -torch.inf)
    if 0 < settings.top_k < logps.shape[1]:
        least = tempered.topk(settings.top_k).values[:, -1:]
        tempered = tempered.masked_fill(tempered < least, -torch.inf)
    if settings.top_p < 1:
        falling, order = tempered.softmax(-1).sort(descending=True)
        too_late = falling.cumsum(-1) - falling >= settings.top_p  # top_p is reached before these
        tempered = tempered.masked_fill(too_late.scatter(1, order, too_late), -torch.inf)
    return tempered.softmax(-1)


def beams(logits: torch.Tensor, responses: list[Response], settings: Settings) -> list[Draw]:
    """Beam search: not samples, but the n most probable continuations of a state. A beam that ends
    is kept, whatever its probability, and reduces the number of beams by one, until all have ended.
    With n = 1 this is greedy decoding. (The responses of a state are neighbours.)"""
    logps = logits.float().log_softmax(-1)  # (R, V)
    so_far = [[sum(response.logps)] for response in responses]
    totals = torch.tensor(so_far, device=logits.device) + logps  # (R, V): all continuations
    vocab_size = logits.shape[1]
    chosen = []
    begin = 0
    for state, beams_of_state in groupby(responses, key=lambda response: response.state):
        end = begin + len(list(beams_of_state))
        own_totals = totals[begin:end].flatten()
        wanted = min(state.count - len(state.ended), len(own_totals))
        chosen.append(begin * vocab_size + own_totals.topk(wanted).indices)
        begin = end
    chosen = torch.cat(chosen)  # indices into the flattened totals
    chosen_logps = logps.flatten()[chosen].tolist()
    check_numbers(chosen_logps)
    draws = []
    for index, logp in zip(chosen.tolist(), chosen_logps):
        parent, token = divmod(index, vocab_size)
        draws.append(Draw(parent, token, 1, logp))
    return draws


def check_numbers(values) -> None:
    """Raises UserError if one of the values is not a number: the logits have overflowed."""
    if np.isnan(values).any():
        raise UserError("the model's logits are not finite: try another --dtype")


# ---- 3. One problem, slowly ----------------------------------------------------------------------
# Who holds whom:
#
#     Search         one problem: runs `self_backtrack`, and keeps all of its responses
#       State        of the current frontier, with its random numbers
#         Response   what some of the state's samples have written so far. At each step its Draws
#                    replace it by others, one for each different token that its samples take.


@dataclass(eq=False)
class Search:
    """One problem's search: the algorithm, and the frontier whose samples it waits for."""

    index: int  # which of the given problems
    prompt: list[int]
    key: int  # the seed of the problem's random numbers
    tokenizer: Tokenizer
    settings: Settings
    frontier: list[State] = field(default_factory=list)
    all_responses: list[Response] = field(default_factory=list)

    def __post_init__(self):
        self.algorithm = self.settings.algorithm(self.tokenizer)

    def advance(self) -> None:
        """Send the algorithm the responses that it waits for, when all are complete. It yields the
        next frontier, or ends: then the frontier is empty."""
        responses = []
        for state in self.frontier:
            responses += state.ended
        rate_candidates(responses, self.tokenizer, self.settings.last_line)
        self.all_responses += responses
        try:
            self.frontier = self.algorithm.send(responses or None)  # None starts a generator
        except StopIteration:
            self.frontier = []
        for response in responses:  # the new states have taken over the slots that they need
            response.slots = ()
        for place, state in enumerate(self.frontier):
            state.search = self
            state.place = place

    def frontier_is_finished(self) -> bool:
        return all(state.finished for state in self.frontier)


def first_response(state: State) -> Response:
    """All samples of a state together, before they draw their first token. The state's random
    numbers begin here."""
    seed = state.search.settings.seed
    state.rng = np.random.default_rng([seed, state.search.key, state.round, state.place])
    spacing = 1 / state.count
    return Response(
        state.tokens,
        state.logps,
        state.count,
        state.round,
        inherited=len(state.tokens),
        slots=state.slots,
        state=state,
        first_point=spacing * state.rng.random(),
        spacing=spacing,
    )


def extend(parent: Response, draw: Draw) -> Response:
    """The Response of the samples that take a token."""
    first_point, spacing = draw.first_point, draw.spacing
    # If the spacing is above 1, only one point fits into [0, 1), and it may be anywhere there: a
    # new uniform point has the same distribution. From now on this sample draws a new point for
    # every token, because a point that is stretched again and again runs out of digits.
    # (Independent samples have the spacing 0, and beams 1: they never come here.)
    if spacing > 1:
        first_point = parent.state.rng.random()
        spacing = 2.0  # any number above 1, so that it does not grow without end
    return replace(
        parent,
        tokens=parent.tokens + (draw.token,),
        logps=parent.logps + (draw.logp,),
        count=draw.count,
        first_point=first_point,
        spacing=spacing,
    )


def has_ended(response: Response, tokenizer: Tokenizer, settings: Settings) -> bool:
    if len(response.tokens) == settings.max_new_tokens:
        return True
    return response.tokens[-1] in (tokenizer.eos, tokenizer.backtrack)


@torch.inference_mode()
def search_slowly(
    model: Llama, tokenizer: Tokenizer, prompt: list[int], key: int, settings: Settings
) -> list[Response]:
    """All responses of one problem's search, state by state and without a cache. The engine below
    gives the same ones, for many problems at once; the tests compare them."""
    device = model.lm_head.weight.device
    no_tokens = tokenizer.ids_without_token(len(model.lm_head.weight))
    sampling_rule = settings.sampling_rule()
    search = Search(0, prompt, key, tokenizer, settings)
    search.advance()
    while search.frontier:
        for state in search.frontier:
            growing = [first_response(state)]
            while growing:
                input_ids = [prompt + list(response.tokens) for response in growing]
                input_ids = torch.tensor(input_ids, device=device)  # (R, T): all of one length
                logits = model(input_ids)[:, -1]  # (R, V)
                logits[:, no_tokens] = -torch.inf
                parents = growing
                growing = []
                for draw in sampling_rule(logits, parents, settings):
                    child = extend(parents[draw.parent], draw)
                    if has_ended(child, tokenizer, settings):
                        state.ended.append(child)
                    else:
                        growing.append(child)
        search.advance()
    return search.all_responses


# ==== You now know the whole search. What follows makes it fast ===================================

# ---- 4. The engine: many problems, one token a step ----------------------------------------------
# The states of many problems are expanded together, one token a step, and the cache keeps what has
# been computed. For example, a state with n = 4, whose prompt is in the slots 1 and 2:
#
#               growing      slot_table         draws
#     step 1    ""      x4   [1, 2]             four take "7"
#     step 2    "7"     x4   [1, 2, 3]          three take "*", one takes "+"
#     step 3    "7*"    x3   [1, 2, 3, 4]       two take "5", one takes "6"
#               "7+"    x1   [1, 2, 3, 5]       takes "5"
#     step 4    "7*5"   x2   [1, 2, 3, 4, 6]
#               "7*6"   x1   [1, 2, 3, 4, 7]
#               "7+5"   x1   [1, 2, 3, 5, 8]    takes `<backtrack>`
#     step 5    "7*5"   x2   ...
#
# When "7+5" says `<backtrack>`, its row leaves the table, and the state that it steps back to, the
# prompt, keeps the slots 1 and 2. In the next round the state's row is, for instance, [1, 9]: its
# last token is fed once more, into a new slot.


class Engine:
    """Draws the samples of many states, one token a step. States join whenever there is room.

    The rows of `slot_table` and `logits` belong to the responses of `growing`, in order.

    A slot of the cache is free again when nobody holds it (see Slot in model.py). Holders are
    growing responses; complete ones until `Search.advance`; states until `finish`.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, settings: Settings, longest: int):
        """longest: the tokens of the longest prompt."""
        head = model.lm_head.weight  # (V, C)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.sampling_rule = settings.sampling_rule()
        cache_bytes = int(settings.cache_gib * 2**30)
        slots = cache_bytes // KVCache.bytes_per_slot(model.config, head.dtype)
        self.cache = KVCache(model.config, max(slots, 1), head.device, head.dtype)
        self.new_prompts = deque()  # states that wait: prompts
        self.branches = deque()  # states that wait and are in the cache already
        self.expanding = []  # the states whose samples are being drawn, the oldest first
        self.growing = []  # the R unfinished responses
        width = longest + settings.max_new_tokens
        no_slots = torch.zeros(0, width, dtype=torch.int64, device=head.device)
        self.slot_table = no_slots  # (R, width): the numbers of each response's slots
        self.logits = head.new_zeros(0, len(head))  # (R, V): of each response's next token
        no_tokens = tokenizer.ids_without_token(len(head))  # these are never drawn
        self.no_tokens = torch.tensor(no_tokens, dtype=torch.int64, device=head.device)

    def submit(self, states: list[State]) -> None:
        """Put states into the queues. They begin when there is room."""
        for state in states:
            self.queue_of(state).append(state)

    def is_busy(self) -> bool:
        return bool(self.expanding or self.branches or self.new_prompts)

    def step(self) -> list[Search]:
        """One token for every sample. Samples of a response that draw the same token stay
        together, as one Response. Returns the searches whose samples have now all ended."""
        self.let_join()
        self.make_room()
        parents, children = [], []
        for draw in self.sampling_rule(self.logits, self.growing, self.settings):
            parent = self.growing[draw.parent]
            child = extend(parent, draw)
            if has_ended(child, self.tokenizer, self.settings):
                parent.state.ended.append(child)
                child.state = None  # no cycle of references may hold slots, see Slot
            else:
                child.slots = parent.slots + (self.cache.lend(),)
                parents.append(draw.parent)
                children.append(child)
        self.growing = children
        device = self.slot_table.device
        parents = torch.tensor(parents, dtype=torch.int64, device=device)
        self.slot_table = self.slot_table[parents]  # a fork copies slot numbers only
        self.logits = self.logits[:0]
        if children:
            columns = torch.tensor([[len(child.slots) - 1] for child in children], device=device)
            numbers = torch.tensor([[child.slots[-1].number] for child in children], device=device)
            self.slot_table.scatter_(1, columns, numbers)
            new_tokens = [[child.tokens[-1]] for child in children]
            self.logits = self.feed(children, new_tokens, self.slot_table)
        return self.finish()

    def finish(self) -> list[Search]:
        """Remove the states whose samples have all ended. Returns the searches whose whole
        frontier is finished with them."""
        going_on = {response.state for response in self.growing}
        finished = [state for state in self.expanding if state not in going_on]
        self.expanding = [state for state in self.expanding if state in going_on]
        for state in finished:
            state.finished = True
            state.slots = ()
        searches = dict.fromkeys(state.search for state in finished)  # each once, in order
        return [search for search in searches if search.frontier_is_finished()]

    def begin(self, states: list[State]) -> None:
        """Begin to expand states, *either* new prompts *or* branches. A new prompt is fed to the
        model as a whole. A branch has its keys and values in the cache, but the logits after its
        last token are gone, so this token is fed once more. It gets a new slot, because others may
        share the old one, and its keys and values may differ by rounding. (Prompts and branches are
        not mixed, because a branch that is padded to the length of a prompt might be longer than
        the table is wide.)"""
        beginnings, new_tokens = [], []
        slot_table = torch.zeros(len(states), self.slot_table.shape[1], dtype=torch.int64)
        for own_slots, state in zip(slot_table, states):
            beginning = first_response(state)
            reused_slots = beginning.slots[:-1]  # a new prompt has none
            tokens = state.search.prompt + list(beginning.tokens)
            to_feed = tokens[len(reused_slots) :]
            new_slots = tuple(self.cache.lend() for _ in to_feed)
            beginning.slots = reused_slots + new_slots
            numbers = [slot.number for slot in beginning.slots]
            own_slots[: len(numbers)] = torch.tensor(numbers)
            beginnings.append(beginning)
            new_tokens.append(to_feed)
        slot_table = slot_table.to(self.slot_table.device)
        logits = self.feed(beginnings, new_tokens, slot_table)
        self.expanding += states
        self.growing += beginnings
        self.slot_table = torch.cat([self.slot_table, slot_table])
        self.logits = torch.cat([self.logits, logits])

    def feed(
        self, responses: list[Response], new_tokens: list[list[int]], slot_table: torch.Tensor
    ) -> torch.Tensor:
        """Feed new_tokens, the last ones of each response, to the model. Returns the logits after
        each response, (R, V). Rows and columns are filled up, so that only a few different shapes
        occur: PyTorch builds and caches a kernel for every new one."""
        device = slot_table.device
        row_grain = 16  # rounded up to a multiple of 16; above 128 rows of 32; above 256 of 64 ...
        while row_grain * 8 < len(responses):
            row_grain *= 2
        filler = [[0]] * (-len(responses) % row_grain)  # rows of one token in slot 0
        cached = [len(response.slots) - len(new) for response, new in zip(responses, new_tokens)]
        cached = torch.tensor(cached + [0] * len(filler), device=device)  # tokens, by row
        new_tokens = new_tokens + filler
        longest = max(len(new) for new in new_tokens)
        input_ids = [new + [0] * (longest - len(new)) for new in new_tokens]
        input_ids = torch.tensor(input_ids, device=device)  # (rows, T), padded on the right
        last = torch.tensor([len(new) - 1 for new in new_tokens], device=device)
        positions = cached[:, None] + torch.arange(longest, device=device)
        width = max(len(response.slots) for response in responses)
        width = min(width + -width % 8, slot_table.shape[1])
        slots = F.pad(slot_table[:, :width], (0, 0, 0, len(filler)))  # (rows, S)
        cached_rows = CachedRows(self.cache, slots, positions)
        logits = self.model(input_ids, cached_rows=cached_rows, last=last)[: len(responses)]
        logits[:, self.no_tokens] = -torch.inf
        return logits

    # Memory: how many states are expanded together. A first reading may skip this.

    def queue_of(self, state: State) -> deque:
        return self.branches if state.slots else self.new_prompts

    def let_join(self) -> None:
        """Begin to expand waiting states: branches first, because they hold slots."""
        for queue in (self.branches, self.new_prompts):
            places = self.free_places()
            all_places = places + len(self.expanding)
            # A call of the model costs almost as much for one state as for many: so wait until a
            # quarter of all places is free.
            worth_a_call = places > all_places // 4
            if queue and worth_a_call:
                self.begin([queue.popleft() for _ in range(min(places, len(queue)))])

    def free_places(self) -> int:
        """How many more states may join. There are batch_size places. An estimate: a state needs
        slots for one whole response, and only 8 more for each of n samples, because samples share
        beginnings. (If it needs more, or gets more than n samples, see make_room.) Half of all
        slots are kept free, so that the current states can grow. If no state is being expanded, one
        may always join."""
        slots_per_state = self.slot_table.shape[1] + 8 * self.settings.prompt_samples()
        spare_slots = len(self.cache.free) - self.cache.kv.shape[2] // 2
        places = self.settings.batch_size - len(self.expanding)
        places = min(places, spare_slots // slots_per_state)
        return places if self.expanding else max(places, 1)

    def most_new_slots(self) -> int:
        """A step needs at most one new slot for each unfinished sample or beam."""
        unfinished = 0
        for state in self.expanding:
            unfinished += state.count - sum(response.count for response in state.ended)
        return unfinished

    def make_room(self) -> None:
        """While fewer slots are free than a step may need, stop expanding the youngest state and
        put it back into its queue. Later it draws the same samples, because these depend only on
        the seed. Raises UserError if a single state is left."""
        while self.most_new_slots() > len(self.cache.free):
            if len(self.expanding) == 1:
                raise UserError("the cache is too small for one state: increase --cache_gib")
            youngest = self.expanding.pop()
            youngest.ended = []  # its slots are free again
            self.growing = [response for response in self.growing if response.state is not youngest]
            self.slot_table = self.slot_table[: len(self.growing)]  # its rows were the last ones
            self.logits = self.logits[: len(self.growing)]
            self.queue_of(youngest).appendleft(youngest)


# ---- 5. Many problems ----------------------------------------------------------------------------


@torch.inference_mode()
def search_all(
    model: Llama,
    tokenizer: Tokenizer,
    problems: list[dict],
    keys: Sequence[int],
    settings: Settings,
) -> Iterator[tuple[int, list[Response]]]:
    """Search many problems, each {nums, target}. Yields (i, all responses of problem i) as soon as
    its search is done. The random numbers of a state depend only on the seed, keys[i], its round
    and its place in the frontier, and not on the other states in the batch. (In bf16 and fp16 the
    batch may still change a sample, by rounding.) Raises UserError."""
    prompts = tokenizer.prompts(problems)
    tokenizer.check_fits(len(model.lm_head.weight))
    engine = Engine(model, tokenizer, settings, longest=max(map(len, prompts), default=0))
    numbered = enumerate(zip(prompts, keys))
    while True:
        # at most batch_size prompts wait, so that memory does not grow with the problems
        wanted = max(settings.batch_size - len(engine.new_prompts), 0)
        for index, (prompt, key) in islice(numbered, wanted):
            search = Search(index, prompt, key, tokenizer, settings)
            search.advance()
            engine.submit(search.frontier)
        if not engine.is_busy():
            return
        for search in engine.step():
            search.advance()
            engine.submit(search.frontier)
            if not search.frontier:
                yield search.index, search.all_responses


# ---- 6. Measuring --------------------------------------------------------------------------------


def judge(tokenizer: Tokenizer, problem: dict, responses: list[Response]) -> dict:
    """The answer to a problem, and whether it is right. `verified`: is at least one candidate
    right? `solutions`: the candidates that are right, the best first. `tokens`: how many the
    samples drew, each sample by itself."""
    nums, target = problem["nums"], problem["target"]
    answer = select(responses)
    text = tokenizer.decode(answer.tokens) if answer else ""
    no_answer = Verdict(False, "no sample reached the goal")
    verdict = verify(nums, target, text) if answer else no_answer
    solutions = []
    for candidate in candidates(responses):
        solution = tokenizer.decode(candidate.tokens)
        if verify(nums, target, solution).correct:
            solutions.append(solution)
    return {
        "nums": nums,
        "target": target,
        "response": text,
        "score": answer.score if answer else None,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "failed_action": verdict.failed_action,
        "verified": bool(solutions),
        "solutions": list(dict.fromkeys(solutions)),
        "tokens": sum(map(tokens_drawn, responses)),
    }


def tokens_drawn(response: Response) -> int:
    return response.count * (len(response.tokens) - response.inherited)


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    problems: list[dict],
    settings: Settings,
    offset: int = 0,
    answer_file: "AnswerFile | None" = None,
) -> list[dict]:
    """`judge`'s answer to every problem. Each has a "number", offset + its index, which seeds its
    samples: so they depend neither on the batch size nor on the number of ranks, but for rounding.
    New answers are added to answer_file, which may hold some already."""
    _, rank, world = device_rank_world()
    answers = dict(answer_file.answers) if answer_file else {}
    numbers = range(offset, offset + len(problems))
    own_numbers = [number for number in numbers if number not in answers][rank::world]
    own = [problems[number - offset] for number in own_numbers]
    searches = search_all(model, tokenizer, own, own_numbers, settings)
    progress = tqdm(
        searches, settings.decoder, len(own), leave=False, unit=" problems", disable=no_bar()
    )
    for i, responses in progress:
        answer = {"number": own_numbers[i], **judge(tokenizer, own[i], responses)}
        answers[own_numbers[i]] = answer
        if answer_file:
            answer_file.add(answer)
    for answers_of_rank in gather(answers):
        answers |= answers_of_rank
    return [answers[number] for number in numbers]


def gather(own) -> list:
    """A list of what each rank has, on every rank."""
    if not dist.is_initialized():
        return [own]
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return by_rank


def compare(
    model: Llama,
    tokenizer: Tokenizer,
    problems_by_split: dict[str, list[dict]],
    decoders: list[str],
    settings: Settings,
    title: str = "",
    offset: int = 0,
    answer_file: "AnswerFile | None" = None,
) -> dict:
    """Evaluate every decoder on the problems of every split, and print a table with a line for
    each. Returns {(split, decoder): answers}."""
    results = {}
    prints = is_main() and len(problems_by_split) > 0
    if prints:
        shares = f"{'selected % [95 %]':>20}{'verified % [95 %]':>20}"
        print(
            f"{title:24}{shares}{'tokens/problem':>15}{'problems/s':>11}{'tokens/s':>10}",
            flush=True,
        )
    for split, decoder in product(problems_by_split, decoders):
        problems = problems_by_split[split]
        own_settings = replace(settings, decoder=decoder)
        begin = time.perf_counter()
        answers = evaluate(model, tokenizer, problems, own_settings, offset, answer_file)
        seconds = time.perf_counter() - begin
        results[split, decoder] = answers
        if prints:
            known = answer_file.answers if answer_file else {}  # read from the file, not searched
            new = [answer for answer in answers if answer["number"] not in known]
            print(f"{f'{decoder}, {split}':24}{table_line(answers, new, seconds)}", flush=True)
    return results


# ==== Plumbing: a first reading may stop here =====================================================

# ---- Figures in the table ------------------------------------------------------------------------


def table_line(answers: list[dict], new: list[dict], seconds: float) -> str:
    """Accuracy and tokens per problem of all answers; problems and tokens a second of new ones."""
    count = len(answers)
    selected = sum(answer["correct"] for answer in answers) / count
    verified = sum(answer["verified"] for answer in answers) / count
    tokens = sum(answer["tokens"] for answer in answers) / count
    new_tokens = sum(answer["tokens"] for answer in new)
    shares = percent(selected, count) + percent(verified, count)
    return f"{shares}{tokens:15.1f}{len(new) / seconds:11.1f}{new_tokens / seconds:10.0f}"


def wilson_interval(share: float, problems: int) -> tuple[float, float]:
    """Wilson's 95 % interval, (low, high), of a share of `problems`."""
    deviations = 1.96
    square = deviations * deviations
    middle = share + square / 2 / problems
    half_width = deviations * math.sqrt(share * (1 - share) / problems + square / 4 / problems**2)
    whole = 1 + square / problems
    return max(middle - half_width, 0.0) / whole, (middle + half_width) / whole


def percent(share: float, problems: int) -> str:
    """A share of `problems` in percent, with its interval."""
    low, high = wilson_interval(share, problems)
    return f"{100 * share:6.1f} [{100 * low:4.1f}, {100 * high:5.1f}]"


# ---- The drawn tree ------------------------------------------------------------------------------


class Tree:
    """The actions of all responses of one search. A node is a tuple of actions."""

    MOST_CHILDREN = 5  # are drawn of a node

    def __init__(self, tokenizer: Tokenizer, problem: dict, responses: list[Response]):
        self.chosen = Counter()  # node: how many samples chose its last action
        self.outcomes = defaultdict(Counter)  # node: {(what happens, colour): how many samples}
        self.children = defaultdict(list)
        self.tokenizer = tokenizer
        self.scores = {}  # node: its best score (equal responses may differ by rounding)
        for candidate in candidates(responses):
            self.scores.setdefault(node_of(tokenizer.decode(candidate.tokens)), candidate.score)
        answer = select(responses)
        self.answer = node_of(tokenizer.decode(answer.tokens)) if answer else None  # its node
        for response in responses:
            text = tokenizer.decode(response.tokens)
            node = node_of(text)
            inherited_actions = tokenizer.decode(response.tokens[: response.inherited]).count("\n")
            for depth in range(inherited_actions + 1, len(node) + 1):
                self.chosen[node[:depth]] += response.count
            if response.round:
                branched = f"round {response.round} from here", "branched"
                self.outcomes[node[:inherited_actions]][branched] += response.count
            words, colour = self.outcome_of(response, problem["nums"], problem["target"], text)
            if response.round and inherited_actions == len(node):  # it wrote no action
                words += " at once"
            self.outcomes[node][words, colour] += response.count
        for node in sorted(self.chosen, key=self.drawing_order):
            self.children[node[:-1]].append(node)

    def outcome_of(
        self, response: Response, nums: list[int], target: int, text: str
    ) -> tuple[str, str]:
        """How a response ended: (words, a key of COLOURS)."""
        if steps_back(response, self.tokenizer):
            return BACKTRACK, "stopped"
        if response.score is None:
            return "no goal", "stopped"  # it was too long, or ended without `Goal Reached!`
        verdict = verify(nums, target, text)
        node = node_of(text)
        judgement = "right" if verdict.correct else verdict.reason
        selected = ", selected" if node == self.answer else ""
        words = f"goal {self.scores[node]:.3f}, {judgement}{selected}"
        return words, "right" if verdict.correct else "wrong"

    def drawing_order(self, node: tuple[str, ...]) -> tuple[bool, int]:
        """A sort key: the path to the answer first, then what most samples chose."""
        leads_to_answer = self.answer is not None and node == self.answer[: len(node)]
        return not leads_to_answer, -self.chosen[node]

    def in_drawing_order(self, node: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        """A node, and all nodes below it."""
        yield node
        for child in self.children[node]:
            yield from self.in_drawing_order(child)

    def lines(self, node: tuple[str, ...] = (), indent: str = "") -> Iterator[str]:
        """The lines of all nodes below a node."""
        children = self.children[node]
        for child in children[: self.MOST_CHILDREN]:
            is_last = child == children[-1]
            branch = indent + ("└─ " if is_last else "├─ ") + child[-1]
            outcomes = "; ".join(self.words_at(child))
            if len(branch) > 29:
                branch = branch[:28] + "…"
            yield f"{branch:30}{self.chosen[child]:<5}{outcomes}".rstrip()
            yield from self.lines(child, indent + ("   " if is_last else "│  "))
        others = children[self.MOST_CHILDREN :]
        if others:
            not_shown = sum(self.chosen[child] for child in others)
            yield f"{indent}└─ {len(others)} more, x{not_shown}"

    def words_at(self, node: tuple[str, ...]) -> list[str]:
        """What happens at a node, as much as fits into the line; in colour on a terminal."""
        room = max(shutil.get_terminal_size((100, 0)).columns - 35, len("..."))
        told = []  # [(words, colour), ...]
        for (outcome, colour), count in self.outcomes[node].items():
            told.append((f"{outcome} x{count}", colour))
        while len("; ".join(words for words, _ in told)) > room:
            told[-2:] = [("...", "dim")]  # in place of the last, and of an earlier ...
        return [paint(words, colour) for words, colour in told]


def node_of(text: str) -> tuple[str, ...]:
    actions = text.removesuffix(BACKTRACK).removesuffix(GOAL).removesuffix("\n")
    return tuple(actions.split("\n")) if actions else ()


def draw_tree(
    tokenizer: Tokenizer, problem: dict, responses: list[Response], settings: Settings
) -> str:
    """The search as text. The tree's lines fit into the terminal, or 100 columns."""
    tree = Tree(tokenizer, problem, responses)
    header = f"numbers {problem['nums']}  target {problem['target']}"
    if tree.answer is None:
        header += "  (no sample reached the goal)"
    for words in tree.words_at(()):  # of the prompt, sampled again
        header += f"  ({words})"
    lines = [header, solver_line(problem["nums"], problem["target"])]
    ended_early = why_it_ended_early(responses, settings)
    if ended_early:
        lines.append(f"search: {ended_early}")
    return "\n".join([*lines, f"{'action':30}samples", *tree.lines()])


def why_it_ended_early(responses: list[Response], settings: Settings) -> str:
    """Why a search ended before round b; empty if it did not."""
    last_round = max(response.round for response in responses)
    if settings.decoder != "self_backtrack" or last_round == settings.b:
        return ""
    of_last_round = [response for response in responses if response.round == last_round]
    reason = "there is no new state"
    if is_sure(of_last_round, settings.stop_above):
        reason = f"an answer scores above {settings.stop_above}"
    return f"it ended after round {last_round}, because {reason}"


def solver_is_asked(nums: list[int]) -> bool:
    """More than six numbers have too many programs to try them all, and the solver computes with
    64 bits."""
    return len(nums) <= 6 and max(*nums, 2) ** len(nums) < 2**63


def solver_line(nums: list[int], target: int) -> str:
    """What the exact solver says about a problem. The search does not use it."""
    if not solver_is_asked(nums):
        return "solver: not asked, for the numbers are too many or too large"
    reaching, programs, actions = solve(nums, target)
    if not reaching:
        return f"solver: none of {programs} programs reaches the target"
    example = ", ".join(action.text().strip() for action in actions)
    reach = "reaches" if reaching == 1 else "reach"
    return f"solver: {reaching} of {programs} programs {reach} the target: {example}".rstrip(": ")


# ---- The page ------------------------------------------------------------------------------------

TEMPLATE = pathlib.Path(__file__).parent / "assets" / "page.html"


def write_page(model, tokenizer, problem: dict, responses, settings: Settings, path) -> None:
    """The search as a single HTML file: the tree after each round, the model's P(<backtrack>) after
    every action, and what the exact solver says about it. Raises OSError."""
    nums, target = problem["nums"], problem["target"]
    trees = []
    for last_round in range(1 + max(response.round for response in responses)):
        so_far = [response for response in responses if response.round <= last_round]
        trees.append(Tree(tokenizer, problem, so_far))
    nodes = list(trees[-1].in_drawing_order())
    solver_said = [solver_says(nums, target, node) for node in nodes]
    rounds = []
    for tree in trees:
        rounds.append([told_of(tree, node) for node in nodes])
    prompt = prompt_text(nums, target)
    texts = [prompt + "\n".join([*node, ""]) for node in nodes]
    chances = backtrack_chances(model, tokenizer, texts)
    rules = settings_line(settings)
    ended_early = why_it_ended_early(responses, settings)
    if ended_early:
        rules += f"; {ended_early}"
    page = {
        "title": f"numbers {nums}  target {target}",
        "solver": solver_line(nums, target),
        "settings": rules,
        "nodes": nodes,
        "chances": chances,
        "solver_says": solver_said,
        "rounds": rounds,
        "answers": [tree.answer for tree in trees],
    }
    data = json.dumps(page).replace("<", "\\u003c")  # so that no text can end the script
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("PAGE_DATA", data), "utf-8")


def settings_line(settings: Settings) -> str:
    """The decoder and the rules that it follows."""
    words = [settings.decoder, f"n = {settings.prompt_samples()}"]
    if settings.decoder in ("best_of_n", "self_backtrack"):
        manner = "independent" if settings.independent else "evenly spread"
        words.append(f"{manner} samples at temperature {settings.temperature}")
    if settings.decoder == "self_backtrack":
        words.append(f"b = {settings.b}")
        if settings.proportional:
            words.append("samples shared in proportion")
        if settings.stop_above < 0:
            words.append(f"ends above {settings.stop_above}")
    if settings.last_line:
        words.append("score with the last line")
    return ", ".join(words)


def told_of(tree: Tree, node: tuple[str, ...]) -> list:
    """How many samples chose a node, and what happens there."""
    outcomes = tree.outcomes[node].items()
    return [tree.chosen[node], [[words, colour, count] for (words, colour), count in outcomes]]


@torch.inference_mode()
def backtrack_chances(model: Llama, tokenizer: Tokenizer, texts: list[str]) -> list[float]:
    """The model's P(<backtrack>) right after each text."""
    device = model.lm_head.weight.device
    chances = []
    for begin in range(0, len(texts), 256):
        rows = [encoding.ids for encoding in tokenizer.encode(texts[begin : begin + 256])]
        longest = max(len(row) for row in rows)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        padded = [row + [tokenizer.eos] * (longest - len(row)) for row in rows]
        logits = model(torch.tensor(padded, device=device), last=last)  # (B, V)
        chances += logits.float().softmax(-1)[:, tokenizer.backtrack].tolist()
    return chances


def solver_says(nums: list[int], target: int, actions: tuple[str, ...]) -> tuple[str, str]:
    """What the exact solver says about the position after some actions: (words, a key of
    COLOURS)."""
    verdict = verify(nums, target, "\n".join([*actions, GOAL]))
    if verdict.failed_action:
        return verdict.reason, "wrong"
    left = Counter(nums)
    for action in actions:
        a, b, result = map(int, ACTION.fullmatch(action).group(1, 3, 4))
        left.subtract([a, b])
        left[result] += 1
    left = list(left.elements())
    if not solver_is_asked(left):
        return "not asked", "dim"
    reaching, _, _ = solve(left, target)
    if reaching == 0:
        return "lost", "wrong"
    return "1 program" if reaching == 1 else f"{reaching} programs", "right"


# ---- The file of answers -------------------------------------------------------------------------


class AnswerFile:
    """The file of --out. Answers are appended to FILE.part as they come, so that none is lost if
    the run is stopped. When all are there, they replace FILE, in order. The first line of FILE.part
    has the run's settings: only a run with the same ones can resume it (but for --batch_size,
    --cache_gib and a larger --num). Raises UserError and OSError."""

    def __init__(self, path: pathlib.Path, resumes: bool, made_by: dict, problems: dict):
        """made_by: the settings, of JSON's types; problems: {number: problem}."""
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.answers = {}  # {number: answer}, of those that were read
        lines = self.read_lines()
        if lines and not resumes:
            raise UserError(f"{self.part} is from a stopped run: --resume it, or remove the file")
        if resumes and not lines and path.exists():
            raise UserError(f"{path} is complete")
        if lines and lines[0] != made_by:
            names = made_by | lines[0]
            differ = [name for name in names if lines[0].get(name) != made_by.get(name)]
            raise UserError(f"{self.part} was made with other settings: {', '.join(differ)}")
        for answer in lines[1:]:
            self.take(answer, problems)
        gather(None)  # nobody writes before all have read
        if is_main():
            self.write(self.part, [made_by, *self.answers.values()])
        gather(None)

    def read_lines(self) -> list[dict]:
        """The lines of FILE.part but for the last, if it is incomplete."""
        if not self.part.exists():
            return []
        try:
            text = self.part.read_text(encoding="utf-8")
            lines = [dict(json.loads(line)) for line in text.split("\n")[:-1]]
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.part} holds a line that is no answer: {error}") from None
        return lines

    def take(self, answer, problems: dict) -> None:
        """Keep an answer that was read, if it belongs to one of the problems."""
        fields = {"number": COUNT, "correct": BOOL, "verified": BOOL, "tokens": COUNT}
        check_fields(answer, fields, f"an answer in {self.part}", needed=fields)
        problem = problems.get(answer["number"])
        asked = answer.get("nums"), answer.get("target")
        if problem is None or asked != (problem["nums"], problem["target"]):
            raise UserError(f"{self.part} holds answers to other problems")
        self.answers[answer["number"]] = answer

    def add(self, answer: dict) -> None:
        with open(self.part, "a", encoding="utf-8") as file:
            file.write(json.dumps(answer) + "\n")

    def write(self, path: pathlib.Path, lines: list[dict]) -> None:
        """Write a whole file. If the program is killed meanwhile, the old file is left."""
        new = path.with_name(path.name + ".new")
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(new, path)

    def finish(self, answers: list[dict]) -> None:
        self.write(self.path, answers)
        self.part.unlink(missing_ok=True)


# ---- The command ---------------------------------------------------------------------------------

SHIPPED = pathlib.Path(__file__).parent / "assets" / "checkpoint"
EXAMPLE = {"nums": [52, 49, 38, 6], "target": 21}  # the shipped model solves it by stepping back


def example(record: dict) -> dict:
    """The problem to show: EXAMPLE; or, if the checkpoint was not trained on four numbers, its
    first validation problem with a new target."""
    if record["source"] == "generated" and len(EXAMPLE["nums"]) not in record["sizes"]:
        [row] = load_rows("val_new", record, 1)
        return row
    return EXAMPLE


def arguments() -> argparse.Namespace:
    """The command line. Raises UserError."""
    options = flags()
    options.set_defaults(**asdict(Settings()))
    if "--paper" in sys.argv:
        options.set_defaults(**PAPER_SEARCH)
    options = options.parse_args()
    if (options.numbers is None) != (options.target is None) or (options.numbers and options.data):
        raise UserError("--numbers and --target go together, and --data goes without them")
    if options.html and (options.data or options.html.is_dir()):
        raise UserError("--html wants a file, and goes without --data")
    if options.html and not options.html.parent.is_dir():
        raise UserError(f"no such folder: {options.html.parent}")
    for name in ("min_p", "top_p"):
        if getattr(options, name) > 1:
            raise UserError(f"--{name} is a share, so at most 1, not {getattr(options, name)}")
    is_no_file = options.out and options.out.exists() and not options.out.is_file()
    if options.out and (options.data is None or is_no_file):
        raise UserError("--out wants a file, and --data beside it")
    if options.resume and options.out is None:
        raise UserError("--resume goes with --out")
    return options


def flags() -> Arguments:
    options = Arguments(
        "Search with a checkpoint: one problem and its tree, an evaluation, or both."
    )
    add = options.add_argument_group("what to search").add_argument
    add("--ckpt", metavar="C", default=str(SHIPPED), help="a folder or Hub id")
    add("--numbers", metavar="A", type=at_least(1), nargs="+", help="one problem's numbers")
    add("--target", metavar="T", type=at_least(0), help="its target")
    add("--data", help="val (seen targets), val_new (new ones), or a file")
    add("--num", metavar="N", type=at_least(1), default=200, help="how many problems")
    add("--offset", metavar="N", type=at_least(0), default=0, help="problems to skip")
    add = options.add_argument_group("the search (paper, section 4.2)").add_argument
    add("--decoder", choices=DECODERS, help="only self_backtrack steps back")
    add("--b", metavar="B", type=at_least(0), help="rounds of stepping back")
    add("--n", metavar="N", type=at_least(1), help="samples of the prompt, or beams")
    limit = "new samples for each that steps back (paper: states a round); default int(sqrt(n))"
    add("--limit", metavar="N", type=at_least(1), help=limit)
    switch = argparse.BooleanOptionalAction
    add("--proportional", action=switch, help="use --limit as ours; --no-: as the paper")
    add("--last_line", action=switch, help="add log p(last line) to the score")
    add(
        "--stop_above",
        metavar="X",
        type=at_least(-1e6),
        help="a better score ends a search; 0: never",
    )
    add("--paper", action="store_true", help="the paper's rule: --paper --help shows its values")
    add = options.add_argument_group("sampling").add_argument
    add("--independent", action=switch, help="do not spread the samples evenly")
    add(
        "--temperature",
        metavar="X",
        type=at_least(0.001),
        help="above 1: more rare tokens",
    )
    add(
        "--min_p",
        metavar="P",
        type=at_least(0.0),
        help="drop tokens rarer than P times the best",
    )
    add("--top_k", metavar="N", type=at_least(0), help="keep the N most probable tokens; 0: all")
    add(
        "--top_p",
        metavar="P",
        type=above(0.0),
        help="keep the most probable tokens that add up to P",
    )
    add("--max_new_tokens", metavar="N", type=at_least(1), help="maximum length of a response")
    add("--seed", metavar="N", type=at_least(0), help="seed of the samples")
    add = options.add_argument_group("what is written").add_argument
    add("--html", metavar="FILE", type=pathlib.Path, help="write the tree as a page to this file")
    add("--out", metavar="FILE", type=pathlib.Path, help="write a JSON line a problem to this file")
    add("--resume", action="store_true", help="continue --out's FILE.part")
    add = options.add_argument_group("the machine").add_argument
    add("--batch_size", metavar="N", type=at_least(1), help="states expanded together")
    add("--cache_gib", metavar="X", type=above(0.0), help="for keys and values")
    add("--dtype", choices=DTYPES, help="default: the device's best")
    return options


def show_search(model, tokenizer, record: dict, settings: Settings, options) -> None:
    """Search one problem, and draw its tree."""
    if options.numbers:
        problem = {"nums": options.numbers, "target": options.target}
        warn_of_unlike(record, [problem])
    else:
        problem = example(record)
    [(_, responses)] = search_all(model, tokenizer, [problem], [0], settings)
    print(draw_tree(tokenizer, problem, responses, settings), end="\n\n")
    if options.html:
        write_page(model, tokenizer, problem, responses, settings, options.html)
        print(f"wrote {options.html}: open it in a browser")


def evaluate_data(model, tokenizer, record: dict, settings: Settings, options) -> None:
    """Evaluate one decoder on the problems of --data."""
    rows = load_rows(options.data, record, options.num, options.offset)
    warn_of_unlike(record, rows)
    answer_file = open_answer_file(model, rows, settings, options) if options.out else None
    splits = {options.data: rows}
    results = compare(
        model,
        tokenizer,
        splits,
        [options.decoder],
        settings,
        offset=options.offset,
        answer_file=answer_file,
    )
    if answer_file and is_main():
        answer_file.finish(results[options.data, options.decoder])


def open_answer_file(model: Llama, rows: list[dict], settings: Settings, options) -> AnswerFile:
    """Raises UserError."""
    settings_alone = replace(settings, batch_size=1, cache_gib=1.0)  # these change no sample
    made_by = {"ckpt": options.ckpt, "data": options.data, "dtype": str(model.lm_head.weight.dtype)}
    # other weights may have the same name
    sums = [weight.detach().view(torch.uint8).sum().item() for weight in model.parameters()]
    made_by |= {"weights": fingerprint(str(sums)), **asdict(settings_alone)}
    problems = dict(enumerate(rows, options.offset))
    return AnswerFile(options.out, options.resume, made_by, problems)


def main() -> None:
    options = arguments()
    device, rank, _ = device_rank_world()
    dtype = DTYPES.get(options.dtype) or best_dtype(device)
    tokenizer = Tokenizer.from_pretrained(options.ckpt)
    record = load_record(options.ckpt)
    model = Llama.from_pretrained(options.ckpt, device, dtype).eval()
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    if options.data:
        evaluate_data(model, tokenizer, record, settings, options)
        return
    if rank == 0:
        show_search(model, tokenizer, record, settings, options)
    if not options.numbers and not options.html:
        splits = load_validation(record, options.num, options.offset)
        decoders = list(dict.fromkeys(["greedy", options.decoder]))
        compare(model, tokenizer, splits, decoders, settings, offset=options.offset)


if __name__ == "__main__":
    cli(main)
