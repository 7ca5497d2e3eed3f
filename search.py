"""Self-backtracking: search by sampling, stepping back and branching. Read after data.py.

The model says `<backtrack>` when its last action was a mistake. The search of section 4.2 (arXiv
2502.04404) believes it. Given a problem, b rounds of stepping back and n samples a state:

1. Expand: sample n continuations of every state of the frontier, first of the prompt alone, each
   until `Goal Reached!` or `<backtrack>`.
2. Collect: those that reached the goal are candidates.
3. Step back: those that end in `<backtrack>` drop their last action. What is left is a state to
   branch from; the first few that are new make the next frontier.
4. Repeat b times.
5. Select: the candidate with the best score is the answer. No verifier takes part.

    python search.py
    python search.py --numbers 92 63 44 86 --target 11
    python search.py --data val --decoder self_backtrack --b 1 --n 32 --num 500
"""

import argparse
import json
import math
import os
import pathlib
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby, product
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import BACKTRACK, GOAL, Tokenizer, Verdict, load_record, load_rows, verify
from model import (
    DTYPES,
    Arguments,
    CachedRows,
    KVCache,
    Llama,
    Slot,
    UserError,
    best_dtype,
    cli,
    number,
    replacing,
    start,
)

# ---- 1. The algorithm, for one problem (paper, section 4.2) --------------------------------------


@dataclass(eq=False)
class Path:
    """A response so far, and how many samples have taken it. States and finished answers are paths,
    too."""

    tokens: tuple[int, ...] = ()  # of the response, from the prompt's end on
    logps: tuple[float, ...] = ()  # the log-probability of each token, at temperature 1
    slots: tuple[Slot, ...] = ()  # where the cache holds the prompt and these tokens
    count: int = 1  # samples that are the same so far
    inherited: int = 0  # how many of the tokens came with the state that this is a sample of
    round: int = 0  # how often the search had stepped back before
    expansion: "Expansion | None" = None  # of that state, while samples go on
    first: float = 0.0  # for `spread`: where in [0, 1) the first sample is,
    spacing: float = 1.0  # and how far it is from each sample to the next


def self_backtrack(
    tokenizer: Tokenizer, b: int, n: int, limit: int, prompt_again: bool
) -> Generator[list[Path], list[Path], list[Path]]:
    """Search one problem. A generator: it yields a frontier of states, and is sent their samples.

    Returns all samples, candidates and others. A frontier holds at most `limit` states. Stepping
    back from the first action leads to the prompt; with prompt_again that may be sampled once more;
    in the paper it has been visited already.
    """
    frontier = [Path(count=n)]  # the first state is the prompt: no tokens yet
    visited = set() if prompt_again else {()}
    all_samples = []
    for round in range(b + 1):
        samples = yield frontier  # n of each state, each until it ends
        all_samples += samples
        frontier = []
        for sample in sorted(samples, key=branching_order):
            if sample.tokens[-1] != tokenizer.backtrack or len(frontier) == limit:
                continue
            state = roll_back(sample, tokenizer)  # believe the model: drop its last action
            if state.tokens not in visited:
                visited.add(state.tokens)
                state.count = n
                state.round = round + 1
                frontier.append(state)
        for sample in samples:
            sample.slots = ()  # what nobody branches from goes back to the cache
        if not frontier:
            break
    return all_samples


def branching_order(sample: Path) -> int:
    """The frontier holds only so many states: those that most samples lead to come first."""
    return -sample.count


def roll_back(sample: Path, tokenizer: Tokenizer) -> Path:
    """Drop `<backtrack>` and the last action: the state to branch from ends with the newline of the
    action before, or with the prompt."""
    kept_tokens = len(sample.tokens) - 2  # up to the action's last token, be it its newline or not
    while kept_tokens > 0 and sample.tokens[kept_tokens - 1] not in tokenizer.line_ends:
        kept_tokens -= 1
    kept_tokens = max(kept_tokens, 0)
    dropped = len(sample.tokens) - kept_tokens
    in_cache = len(sample.slots) - (dropped - 1)  # `<backtrack>` itself was never put there
    return Path(
        sample.tokens[:kept_tokens],
        sample.logps[:kept_tokens],
        sample.slots[:in_cache],
        inherited=kept_tokens,
    )


def reached_goal(path: Path, tokenizer: Tokenizer) -> bool:
    """Is this sample a candidate? One that the length limit cut off is not."""
    if path.tokens[-1] != tokenizer.eos:
        return False
    return tokenizer.decode(path.tokens).split("\n")[-1] == GOAL


def rate(path: Path, tokenizer: Tokenizer, last_line: bool) -> float:
    """The score of a response: the mean log-probability of its tokens, end-of-text included, as in
    the paper. With last_line, ours, the last line's log-probability comes on top: where `Goal
    Reached!` stands the model could have said `<backtrack>`, and this is how sure it was not to."""
    score = sum(path.logps) / len(path.logps)
    if last_line:
        begin = len(path.tokens)
        while begin > 0 and path.tokens[begin - 1] not in tokenizer.line_ends:
            begin -= 1
        score += sum(path.logps[begin:])
    return score


def select(samples: list[Path], tokenizer: Tokenizer, last_line: bool) -> Path | None:
    """The answer: the candidate with the best score."""
    candidates = [sample for sample in samples if reached_goal(sample, tokenizer)]
    return max(candidates, key=lambda path: rate(path, tokenizer, last_line), default=None)


# ---- 2. One step: which tokens the samples take --------------------------------------------------
# A sampling rule is given R paths and the logits (R, V) of what follows each. It returns a draw for
# every different continuation: samples that take the same token stay one path.


class Draw(NamedTuple):
    parent: int  # which of the paths goes on
    token: int
    count: int  # how many of its samples take this token
    logp: float  # the token's log-probability, at temperature 1
    first: float = 0.0  # where these samples are, see Path
    spacing: float = 1.0


def spread(logits: torch.Tensor, paths: list[Path], temperature: float, min_p: float) -> list[Draw]:
    """Samples spread evenly (arithmetic sampling, Vilnis et al., 2023).

    All responses tile [0, 1), in order: a path of probability p covers an interval of length p. The
    n samples of a state are n points, 1 / n apart, so that floor(n p) or ceil(n p) of them take the
    path, and they differ as much as they can. Within a path's own interval, scaled to [0, 1) again,
    its points are first, first + spacing, first + 2 spacing and so on.
    """
    widest = max(path.count for path in paths)
    first = np.array([path.first for path in paths])
    spacing = np.array([path.spacing for path in paths])
    points = first[:, None] + spacing[:, None] * np.arange(widest)  # (R, M)
    return take_tokens(logits, points, spacing, paths, temperature, min_p)


def independent(
    logits: torch.Tensor, paths: list[Path], temperature: float, min_p: float
) -> list[Draw]:
    """The paper's rule: every sample draws for itself."""
    widest = max(path.count for path in paths)
    points = np.ones((len(paths), widest))  # (R, M)
    for own_points, path in zip(points, paths):
        own_points[: path.count] = np.sort(path.expansion.rng.random(path.count))
    no_spacing = np.zeros(len(paths))
    return take_tokens(logits, points, no_spacing, paths, temperature, min_p)


def take_tokens(logits, points, spacing, paths, temperature: float, min_p: float) -> list[Draw]:
    """Where do the points of each path (R, M), in order and `spacing` (R,) apart, fall in the
    cumulative distribution of its next token (logits: (R, V))? Tokens less than min_p times as
    probable as the best, at temperature 1, are out of the question (min-p sampling, Nguyen et al.,
    2024)."""
    precision = torch.float32 if logits.device.type == "mps" else torch.float64
    logps = logits.to(precision).log_softmax(-1)  # (R, V)
    too_rare = logps < logps.amax(-1, keepdim=True) + math.log(max(min_p, 1e-30))
    shares = (logps / temperature).masked_fill(too_rare, -torch.inf).softmax(-1)  # (R, V)
    interval_ends = shares.cumsum(-1)  # token t covers [end - share, end)
    below_one = 1 - torch.finfo(precision).eps
    points = torch.from_numpy(points).to(logits.device, precision).clamp(max=below_one)
    points = points * interval_ends[:, -1:]  # which rounding leaves a little off 1
    token = torch.searchsorted(interval_ends, points, right=True)  # (R, M)
    share = shares.gather(1, token)
    place = 1 - (interval_ends.gather(1, token) - points) / share  # within the token's own interval
    place = place.clamp(0, below_one)
    logp = logps.gather(1, token)
    token, share, place, logp = (tensor.cpu().numpy() for tensor in (token, share, place, logp))

    # One draw for each run of equal tokens: a path's points are in order, so its tokens are, too.
    counts = np.array([path.count for path in paths])
    parent, sample = np.nonzero(np.arange(points.shape[1]) < counts[:, None])  # of all samples
    other_parent = np.diff(parent, prepend=-1) != 0
    other_token = np.diff(token[parent, sample], prepend=-1) != 0
    begins = np.flatnonzero(other_parent | other_token)
    count = np.diff(begins, append=len(parent))
    parent = parent[begins]
    first = (parent, sample[begins])  # the first sample of each run
    columns = [
        parent,
        token[first],
        count,
        logp[first],
        place[first],
        spacing[parent] / share[first],
    ]
    columns = [column.tolist() for column in columns]
    return [Draw(*values) for values in zip(*columns)]


def beams(logits: torch.Tensor, paths: list[Path], n: int) -> list[Draw]:
    """Not samples, but the n most probable continuations of a state, those that have ended among
    them. With n = 1 this is greedy decoding."""
    logps = logits.float().log_softmax(-1)  # (R, V)
    draws = []
    begin = 0
    for expansion, siblings in groupby(paths, key=lambda path: path.expansion):
        totals = torch.tensor([[sum(path.logps)] for path in siblings], device=logits.device)
        own_logps = logps[begin : begin + len(totals)]  # (beams, V)
        wanted = min(n - len(expansion.ended), own_logps.numel())
        most_probable = (totals + own_logps).flatten().topk(wanted).indices
        for index in most_probable.tolist():
            beam_number, token = divmod(index, logits.shape[1])
            draws.append(Draw(begin + beam_number, token, 1, float(own_logps[beam_number, token])))
        begin += len(totals)
    return draws


# ---- 3. The engine: the states of many problems, one token a step --------------------------------


@dataclass(eq=False)
class Search:
    """One problem's search, waiting for the samples of a frontier."""

    problem: int  # its number
    prompt: list[int]
    key: int  # of its random numbers
    algorithm: Generator[list[Path], list[Path], list[Path]]
    frontier: list["Expansion"] = field(default_factory=list)
    all_samples: list[Path] | None = None  # all samples, when it has ended

    def send(self, samples: list[Path] | None) -> None:
        """Give the algorithm the samples that it asked for; it asks for more, or ends."""
        try:
            states = self.algorithm.send(samples)
            self.frontier = [Expansion(self, state, rank) for rank, state in enumerate(states)]
        except StopIteration as result:
            self.frontier = []
            self.all_samples = result.value


@dataclass(eq=False)
class Expansion:
    """A state whose samples are drawn, or are to be drawn."""

    search: Search
    state: Path
    rank: int  # its place in the frontier
    rng: np.random.Generator | None = None
    ended: list[Path] = field(default_factory=list)  # the samples that have ended
    finished: bool = False  # have all?


class Engine:
    """Expands states one token a step. Samples that are the same so far are one path and one row of
    the batch: nothing is computed twice. States join whenever there is room.

    The rows of `slot_table` and `logits` belong to the paths of `live`, in order.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, settings: "Settings", longest: int):
        """longest: the tokens of the longest prompt."""
        head = model.lm_head.weight  # (V, C)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.sampling_rule = settings.sampling_rule()
        cache_bytes = int(settings.cache_gib * 2**30)
        slots = cache_bytes // KVCache.bytes_per_slot(model.config, head.dtype)
        self.cache = KVCache(model.config, max(slots, 1), head.device, head.dtype)
        self.expansions = []  # the oldest first
        self.live = []  # R paths, whose samples go on
        width = longest + settings.max_new_tokens
        no_slots = torch.zeros(0, width, dtype=torch.int64, device=head.device)
        self.slot_table = no_slots  # (R, width): the numbers of each path's slots
        self.logits = head.new_zeros(0, len(head))  # (R, V): what follows each path

    def add(self, expansions: list[Expansion]) -> None:
        """Begin to expand states: prompts that are new, or states whose tokens the cache holds. Of
        those the last token passes the model again, for a cache holds no logits."""
        paths, texts = [], []
        slot_table = torch.zeros(len(expansions), self.slot_table.shape[1], dtype=torch.int64)
        for own_slots, expansion in zip(slot_table, expansions):
            search, state = expansion.search, expansion.state
            seed = [self.settings.seed, search.key, state.round, expansion.rank]
            expansion.rng = np.random.default_rng(seed)
            in_cache = state.slots[:-1]
            text = search.prompt + list(state.tokens)
            text = text[len(in_cache) :]
            path = replace(state, expansion=expansion)
            path.slots = in_cache + tuple(self.cache.lend() for _ in text)
            path.spacing = 1 / state.count
            path.first = path.spacing * expansion.rng.random()
            own_slots[: len(path.slots)] = torch.tensor([slot.number for slot in path.slots])
            paths.append(path)
            texts.append(text)
        slot_table = slot_table.to(self.slot_table.device)
        logits = self.feed(paths, texts, slot_table)
        self.expansions += expansions
        self.live += paths
        self.slot_table = torch.cat([self.slot_table, slot_table])
        self.logits = torch.cat([self.logits, logits])

    def step(self) -> list[Expansion]:
        """One token for every sample: the samples of a path that draw the same token go on
        together, as one path. Returns the expansions whose samples have now all ended."""
        parents, children = [], []
        for draw in self.sampling_rule(self.logits, self.live):
            parent = self.live[draw.parent]
            child = self.extend(parent, draw)
            if self.has_ended(child):
                parent.expansion.ended.append(child)
            else:
                child.slots = parent.slots + (self.cache.lend(),)
                child.expansion = parent.expansion
                parents.append(draw.parent)
                children.append(child)
        self.live = children
        self.logits = self.logits[:0]
        device = self.slot_table.device
        parents = torch.tensor(parents, dtype=torch.int64, device=device)
        self.slot_table = self.slot_table[parents]  # a fork copies the numbers of slots, no more
        if children:
            columns = torch.tensor([[len(path.slots) - 1] for path in children], device=device)
            numbers = torch.tensor([[path.slots[-1].number] for path in children], device=device)
            self.slot_table.scatter_(1, columns, numbers)
            texts = [[path.tokens[-1]] for path in children]
            self.logits = self.feed(children, texts, self.slot_table)
        going_on = {path.expansion for path in children}
        finished = [expansion for expansion in self.expansions if expansion not in going_on]
        self.expansions = [expansion for expansion in self.expansions if expansion in going_on]
        return finished

    def extend(self, parent: Path, draw: Draw) -> Path:
        """The path of the samples that take a token."""
        first = draw.first
        if draw.spacing > 1:  # one sample alone: its place is all but spent, so it gets a new one
            first = parent.expansion.rng.random()
        return Path(
            tokens=parent.tokens + (draw.token,),
            logps=parent.logps + (draw.logp,),
            slots=parent.slots,
            count=draw.count,
            inherited=parent.inherited,
            round=parent.round,
            first=first,
            spacing=draw.spacing,
        )

    def has_ended(self, path: Path) -> bool:
        if len(path.tokens) == self.settings.max_new_tokens:
            return True
        return path.tokens[-1] in (self.tokenizer.eos, self.tokenizer.backtrack)

    def feed(
        self, paths: list[Path], texts: list[list[int]], slot_table: torch.Tensor
    ) -> torch.Tensor:
        """Pass texts, the last tokens of each path, through the model; the logits after each, (R,
        V). Rows are filled up to 16s and columns to 8s, so that shapes recur: libraries build, and
        keep, a kernel for every new one."""
        device = slot_table.device
        filler = [[0]] * (-len(paths) % 16)
        longest = max(len(text) for text in texts)
        begins = [len(path.slots) - len(text) for path, text in zip(paths, texts)]
        begins = torch.tensor(begins + [0] * len(filler), device=device)
        texts = texts + filler
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        input_ids = [text + [0] * (longest - len(text)) for text in texts]
        input_ids = torch.tensor(input_ids, device=device)  # (rows, T)
        positions = begins[:, None] + torch.arange(longest, device=device)
        width = max(len(path.slots) for path in paths)
        width = min(width + -width % 8, slot_table.shape[1])
        slots = F.pad(slot_table[:, :width], (0, 0, 0, len(filler)))  # (rows, S)
        cached = CachedRows(self.cache, slots, positions)
        return self.model(input_ids, cached=cached, last=last)[: len(paths)]

    def free_places(self) -> int:
        """How many more states to expand now: at most batch_size at a time, and only while half of
        the cache is free for what they will need; but one, if there is none."""
        free_slots = len(self.cache.free) - self.cache.kv.shape[2] // 2
        slots_a_state = self.slot_table.shape[1] + 8 * self.settings.n  # about; see make_room
        free_places = self.settings.batch_size - len(self.expansions)
        free_places = min(free_places, free_slots // slots_a_state)
        return max(free_places, 0 if self.expansions else 1)

    def make_room(self) -> list[Expansion]:
        """Before a step: while the cache might run out of slots, give up the youngest expansion. It
        is to be added again, and its samples will be the same. Raises UserError if it is the
        last."""
        given_up = []
        while sum(path.count for path in self.live) > len(self.cache.free):
            if len(self.expansions) == 1:
                raise UserError("the cache is too small for one state's samples: more --cache_gib")
            youngest = self.expansions.pop()
            youngest.ended = []
            given_up.append(youngest)
            self.live = [path for path in self.live if path.expansion is not youngest]
            self.slot_table = self.slot_table[: len(self.live)]  # its paths were the last ones
            self.logits = self.logits[: len(self.live)]
        return given_up


# ---- 4. Many problems ----------------------------------------------------------------------------

DECODERS = ("greedy", "beam", "best_of_n", "self_backtrack")
PAPER = {"temperature": 0.7, "min_p": 0.0, "paper": True}


@dataclass(frozen=True)
class Settings:
    """How to search. The defaults are what finds most on the shipped model; `paper` is the paper's
    rule, and PAPER its settings in full."""

    decoder: str = "self_backtrack"  # one of DECODERS
    b: int = 1  # how often to step back
    n: int = 32  # samples a state; beams
    temperature: float = 1.5
    min_p: float = 0.02
    paper: bool = False  # independent samples; the mean as score; the prompt sampled only once
    limit: int | None = None  # states in a frontier; None: int(sqrt(n)), as the reference had first
    max_new_tokens: int = 64  # of a response
    seed: int = 0
    batch_size: int = 128  # states expanded together
    cache_gib: float = 1.0  # memory for keys and values

    def algorithm(self, tokenizer: Tokenizer):
        """One problem's search. The other decoders are self-backtracking that never steps back:
        best of n; beam search; and greedy decoding, which is a single beam."""
        b = self.b if self.decoder == "self_backtrack" else 0
        n = 1 if self.decoder == "greedy" else self.n
        limit = self.limit or math.isqrt(n)
        return self_backtrack(tokenizer, b, n, limit, prompt_again=not self.paper)

    def sampling_rule(self) -> Callable[[torch.Tensor, list[Path]], list[Draw]]:
        if self.decoder == "greedy":
            return partial(beams, n=1)
        if self.decoder == "beam":
            return partial(beams, n=self.n)
        rule = independent if self.paper else spread
        return partial(rule, temperature=self.temperature, min_p=self.min_p)


@torch.inference_mode()
def decode(
    model: Llama,
    tokenizer: Tokenizer,
    problems: list[dict],
    keys: Sequence[int],
    settings: Settings,
) -> Iterator[tuple[int, list[Path]]]:
    """(i, all samples) of problem i {nums, target}, when its search is done. A state's random
    numbers depend on the seed, keys[i], its round and its place in the frontier alone, so that who
    shares its batch changes nothing. Raises UserError."""
    prompts = tokenizer.prompts(problems)
    engine = Engine(model, tokenizer, settings, longest=max(map(len, prompts), default=0))
    waiting = deque()  # expansions of prompts that are new,
    branches = deque()  # and of states that the cache holds: these first, for they hold slots
    for problem, (prompt, key) in enumerate(zip(prompts, keys)):
        search = Search(problem, prompt, key, settings.algorithm(tokenizer))
        search.send(None)
        waiting += search.frontier
    while engine.expansions or branches or waiting:
        for queue in (branches, waiting):
            free_places = engine.free_places()
            crowded = free_places <= settings.batch_size // 4  # states join in groups
            if queue and not (crowded and engine.expansions):
                engine.add([queue.popleft() for _ in range(min(free_places, len(queue)))])
        for expansion in engine.make_room():
            queue = branches if expansion.state.slots else waiting
            queue.appendleft(expansion)
        for expansion in engine.step():
            expansion.finished = True
            expansion.state.slots = ()
            search = expansion.search
            if all(sibling.finished for sibling in search.frontier):
                samples = [path for sibling in search.frontier for path in sibling.ended]
                search.send(samples)
                branches += search.frontier
                if search.all_samples is not None:
                    yield search.problem, search.all_samples


# ---- 5. Measuring --------------------------------------------------------------------------------


def judge(tokenizer: Tokenizer, problem: dict, samples: list[Path], settings: Settings) -> dict:
    """The answer selected, and whether and why (not) it is right; `verified`: is any candidate, and
    `solutions`: which, the best first."""
    nums, target = problem["nums"], problem["target"]
    last_line = not settings.paper
    candidates = [sample for sample in samples if reached_goal(sample, tokenizer)]
    candidates.sort(key=lambda path: -rate(path, tokenizer, last_line))
    texts = [tokenizer.decode(candidate.tokens) for candidate in candidates]
    solutions = [text for text in texts if verify(nums, target, text).correct]
    verdict = Verdict(False, "no sample reached the goal")
    response = ""
    score = None
    answer = select(samples, tokenizer, last_line)
    if answer:
        response = tokenizer.decode(answer.tokens)
        verdict = verify(nums, target, response)
        score = rate(answer, tokenizer, last_line)
    return {
        "nums": nums,
        "target": target,
        "response": response,
        "score": score,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "failed_step": verdict.failed_step,
        "verified": bool(solutions),
        "solutions": list(dict.fromkeys(solutions)),
        "tokens": sum(path.count * (len(path.tokens) - path.inherited) for path in samples),
    }


def evaluate(
    model: Llama, tokenizer: Tokenizer, problems: list[dict], settings: Settings, offset: int = 0
) -> list[dict]:
    """`judge`'s row for every problem. Its samples are keyed by offset + i, so that neither batches
    nor ranks change them."""
    _, rank, world = start()
    own_problems = problems[rank::world]
    keys = range(offset + rank, offset + len(problems), world)
    searches = decode(model, tokenizer, own_problems, keys, settings)
    progress = tqdm(
        searches,
        settings.decoder,
        len(own_problems),
        unit=" problems",
        leave=False,
        disable=rank > 0,
    )
    rows = {i: judge(tokenizer, own_problems[i], samples, settings) for i, samples in progress}
    by_rank = gather([rows[i] for i in range(len(own_problems))])
    return [by_rank[i % world][i // world] for i in range(len(problems))]


def gather(rows: list) -> list[list]:
    """Every rank's rows, on every rank."""
    if not dist.is_initialized():
        return [rows]
    by_rank = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, rows)
    return by_rank


def wilson_interval(share: float, count: int, deviations: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` problems: (low, high)."""
    square = deviations * deviations
    middle = share + square / 2 / count
    half_width = deviations * math.sqrt(share * (1 - share) / count + square / 4 / count**2)
    whole = 1 + square / count
    return max(middle - half_width, 0.0) / whole, (middle + half_width) / whole


def compare(
    model: Llama,
    tokenizer: Tokenizer,
    problems_by_split: dict[str, list[dict]],
    decoders: list[str],
    settings: Settings,
    title: str = "",
    offset: int = 0,
) -> dict:
    """Evaluate every decoder on the problems of every split and print a table, one line for each;
    {(split, decoder): rows}."""
    results = {}
    prints = start()[1] == 0
    if prints:
        headings = ("selected % [95 %]", "verified % [95 %]", "tokens")
        print(f"{title:34}{headings[0]:>20}{headings[1]:>20}{headings[2]:>13}", flush=True)
    for split, decoder in product(problems_by_split, decoders):
        rows = evaluate(
            model, tokenizer, problems_by_split[split], replace(settings, decoder=decoder), offset
        )
        results[split, decoder] = rows
        selected = sum(row["correct"] for row in rows) / len(rows)
        verified = sum(row["verified"] for row in rows) / len(rows)
        tokens = sum(row["tokens"] for row in rows) / len(rows)
        if prints:
            shares = percent(selected, len(rows)) + percent(verified, len(rows))
            print(f"{f'{decoder}, {split}':34}{shares}{tokens:13.1f}", flush=True)
    return results


def percent(share: float, count: int) -> str:
    """A share of `count` problems in percent, with its interval."""
    low, high = wilson_interval(share, count)
    return f"{100 * share:6.1f} [{100 * low:4.1f}, {100 * high:5.1f}]"


# ==== Plumbing: a first reading may stop here =====================================================

# ---- The drawn tree ------------------------------------------------------------------------------

COLOURS = {"right": 32, "wrong": 31, "stopped": 33, "branched": 36}  # as terminals number them


class Tree:
    """The actions of all samples of one search. A node is a tuple of actions."""

    def __init__(
        self, tokenizer: Tokenizer, problem: dict, samples: list[Path], settings: Settings
    ):
        self.chosen = Counter()  # node: how many samples chose its last action
        self.outcomes = defaultdict(Counter)  # node: {(what happens, colour): how many samples}
        self.children = defaultdict(list)
        self.tokenizer = tokenizer
        self.last_line = not settings.paper
        self.answer = ()  # the node that is the answer
        answer = select(samples, tokenizer, self.last_line)
        for sample in samples:
            text = tokenizer.decode(sample.tokens)
            actions = text.removesuffix(BACKTRACK).removesuffix(GOAL).removesuffix("\n")
            node = tuple(actions.split("\n")) if actions else ()
            if sample is answer:
                self.answer = node
            inherited = tokenizer.decode(sample.tokens[: sample.inherited]).count("\n")
            for depth in range(inherited + 1, len(node) + 1):
                self.chosen[node[:depth]] += sample.count
            outcome = self.outcome_of(sample, problem["nums"], problem["target"], text)
            self.outcomes[node][outcome] += sample.count
            if sample.round:
                branched = f"round {sample.round} from here", "branched"
                self.outcomes[node[:inherited]][branched] += sample.count
        for node in sorted(self.chosen, key=self.drawing_order):
            self.children[node[:-1]].append(node)

    def outcome_of(self, sample: Path, nums: list[int], target: int, text: str) -> tuple[str, str]:
        """How a sample ended: (words, a key of COLOURS)."""
        if sample.tokens[-1] == self.tokenizer.backtrack:
            return BACKTRACK, "stopped"
        if not reached_goal(sample, self.tokenizer):
            return "stopped", "stopped"
        verdict = verify(nums, target, text)
        score = rate(sample, self.tokenizer, self.last_line)
        judgement = "right" if verdict.correct else verdict.reason.split(": ")[-1]
        is_answer = tuple(text.split("\n")[:-1]) == self.answer
        words = f"goal {score:.3f}, {judgement}" + (" <= chosen" if is_answer else "")
        return words, "right" if verdict.correct else "wrong"

    def drawing_order(self, node: tuple[str, ...]) -> tuple[bool, int]:
        """The way to the answer first, then what most samples chose."""
        return node != self.answer[: len(node)], -self.chosen[node]

    def lines(self, node: tuple[str, ...] = (), indent: str = "", width: int = 5) -> Iterator[str]:
        """A line for every action below a node, at most `width` a node."""
        children = self.children[node]
        for child in children[:width]:
            is_last = child == children[-1]
            branch = indent + ("└─ " if is_last else "├─ ") + child[-1][:22]
            outcomes = "; ".join(self.words_at(child))
            yield f"{branch:30}{self.chosen[child]:<5}{outcomes}"
            yield from self.lines(child, indent + ("   " if is_last else "│  "), width)
        if children[width:]:
            not_shown = sum(self.chosen[child] for child in children[width:])
            yield f"{indent}└─ {len(children) - width} more, x{not_shown}"

    def words_at(self, node: tuple[str, ...]) -> Iterator[str]:
        """What happens at a node, in colour where a terminal shows it."""
        plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
        for (outcome, colour), count in self.outcomes[node].items():
            coloured = f"\033[{COLOURS[colour]}m{outcome}\033[0m"
            yield f"{outcome if plain else coloured} x{count}"


def draw_tree(tokenizer: Tokenizer, problem: dict, samples: list[Path], settings: Settings) -> str:
    """The search as text, in 100 columns."""
    tree = Tree(tokenizer, problem, samples, settings)
    header = f"numbers {problem['nums']}  target {problem['target']}"
    if select(samples, tokenizer, not settings.paper) is None:
        header += "  (no sample reached the goal)"
    for words in tree.words_at(()):  # of the prompt, sampled again
        header += f"  ({words})"
    return "\n".join([header, f"{'action':30}samples", *tree.lines()])


# ---- The command ---------------------------------------------------------------------------------

SHIPPED = pathlib.Path(__file__).parent / "assets" / "checkpoint"
EXAMPLE = {"nums": [7, 23, 12, 5], "target": 56}  # the shipped model solves it by stepping back


def arguments() -> argparse.Namespace:
    """The command line. Raises UserError."""
    options = Arguments(
        "Search with a checkpoint: one problem and its tree, an evaluation, or both."
    )
    options.add_argument("--ckpt", default=str(SHIPPED), help="a folder or Hub id")
    options.add_argument(
        "--numbers", type=number(int, 1), nargs="+", help="search this one problem"
    )
    options.add_argument("--target", type=number(int, 0), help="of that problem")
    options.add_argument(
        "--data", help="val (seen targets), val_new (new ones), or a file of JSON Lines"
    )
    options.add_argument("--num", type=number(int, 1), default=200, help="problems")
    options.add_argument("--offset", type=number(int, 0), default=0, help="problems to pass over")
    options.add_argument("--decoder", choices=DECODERS)
    options.add_argument("--b", type=number(int, 0), help="how often to step back")
    options.add_argument("--n", type=number(int, 1), help="samples a state; beams")
    options.add_argument("--temperature", type=number(float, 0.001))
    options.add_argument("--min_p", type=number(float, 0), help="leaves out tokens that much rarer")
    options.add_argument("--paper", action="store_true", help="the paper's rule and settings")
    options.add_argument("--limit", type=number(int, 1), help="states in a frontier: int(sqrt(n))")
    options.add_argument("--seed", type=number(int, 0))
    options.add_argument("--batch_size", type=number(int, 1), help="states expanded together")
    options.add_argument("--cache_gib", type=number(float, 0, True), help="for keys and values")
    options.add_argument("--max_new_tokens", type=number(int, 1), help="of a whole response")
    options.add_argument("--dtype", choices=DTYPES, help="the best of the device by itself")
    options.add_argument(
        "--out", type=pathlib.Path, help="write one JSON line a problem to this file"
    )
    options.set_defaults(**asdict(Settings()))
    if "--paper" in sys.argv:
        options.set_defaults(**PAPER)
    options = options.parse_args()
    if (options.numbers is None) != (options.target is None) or (options.numbers and options.data):
        raise UserError("--numbers and --target go together, and --data goes without them")
    if options.min_p > 1:
        raise UserError(
            f"--min_p is a share of the best token's, so at most 1, not {options.min_p}"
        )
    if options.out and (options.data is None or options.out.is_dir()):
        raise UserError("--out wants a file, and --data beside it")
    return options


def main() -> None:
    options = arguments()
    device, rank, _ = start()
    dtype = DTYPES.get(options.dtype) or best_dtype(device)
    tokenizer = Tokenizer.from_pretrained(options.ckpt)
    record = load_record(options.ckpt)
    model = Llama.from_pretrained(options.ckpt, device, dtype).eval()
    settings = Settings(**{name: getattr(options, name) for name in asdict(Settings())})
    if options.data is None and rank == 0:
        problem = EXAMPLE
        if options.numbers:
            problem = {"nums": options.numbers, "target": options.target}
        [(_, samples)] = decode(model, tokenizer, [problem], [0], settings)
        print(draw_tree(tokenizer, problem, samples, settings), end="\n\n")
    if options.numbers:
        return
    names = [options.data] if options.data else ["val", "val_new"]
    problems_by_split = {
        name: load_rows(name, record, options.num, options.offset) for name in names
    }
    decoders = (
        [options.decoder] if options.data else list(dict.fromkeys(["greedy", options.decoder]))
    )
    if options.out is None:
        compare(model, tokenizer, problems_by_split, decoders, settings, offset=options.offset)
        return
    with replacing(options.out.parent) as staging:  # an unwritable folder is told at once
        results = compare(
            model, tokenizer, problems_by_split, decoders, settings, offset=options.offset
        )
        if rank == 0:
            with open(staging / options.out.name, "w", encoding="utf-8") as out_file:
                for row in results[options.data, options.decoder]:
                    out_file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cli(main)
