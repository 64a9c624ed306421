"""What the samples of a pass start with in common (a template, a system prompt) is laid out, and computed, once.

Exact where nothing is drawn for a token: with dropout each sample would have drawn its own. A trained token is never
shared: its loss belongs to one sample. One level: a shared beginning has no shared beginning of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from luthier.types import Beginnings, Example

LEAST = 16  # tokens: what a shorter beginning saves, gathering its keys costs
# What is looked at for beginnings of a part of the rows: so many rows, of fewer tokens where they are long.
SAMPLED, SAMPLED_TOKENS, FEWEST = 2048, 2**21, 64
PASS = 32  # rows of a pass in which those beginnings shall save most
RARE = 0.01  # of the rows: a beginning of fewer seldom comes twice in a pass


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start`` to ``stop`` of an example, which go on from those of the piece ``parent`` (-1: from nothing)."""

    example: int
    start: int
    stop: int
    parent: int = -1


def free(example: Example) -> int:
    """Tokens at the start that others may share: none of them is trained, and at least one is left."""
    weights = example.weights
    first = next((i for i in range(1, len(weights)) if weights[i]), len(weights))
    return max(0, min(first, example.length - 1))


def shared_by_all(examples: Iterable[Example]) -> int:
    """Tokens that all of them start with and may share; 0 where they are too few to be worth it."""
    found = Shared()
    for example in examples:
        found.add(example)
    return found.length


def beginnings(examples: Sequence[Example]) -> Beginnings:
    """What parts of the examples start with (templates, system prompts): in a sample that is always the same one.

    Each is the share of the examples and its tokens, those that save most first. The parts are those that save most in
    a pass of `PASS` examples, grouped as `cut` does it; what fewer than `RARE` of them share is left out.
    """
    if not examples:
        return ()
    some = random.Random(0).sample(range(len(examples)), min(len(examples), FEWEST))
    mean = max(1, sum(examples[index].length for index in some) // len(some))
    count = min(len(examples), max(FEWEST, min(SAMPLED, SAMPLED_TOKENS // mean)))
    chosen = [examples[index] for index in sorted(random.Random(0).sample(range(len(examples)), count))]
    found = _groups(chosen, lambda rows, tokens: saved_of(((rows / count, tokens),), PASS))
    parts = [(len(members) / count, tokens) for members, tokens in found if len(members) >= RARE * count]
    return tuple(sorted(parts, key=lambda part: -part[0] * part[1]))


@lru_cache(maxsize=4096)
def begun_of(parts: Beginnings, rows: int, power: int = 1) -> float:
    """Tokens of a shared beginning that each of ``rows`` rows of a pass goes on from, on average; or their squares."""
    return sum(part * float(tokens) ** power * (1 - (1 - part) ** (rows - 1)) for part, tokens in parts)


@lru_cache(maxsize=4096)
def saved_of(parts: Beginnings, rows: int) -> float:
    """Tokens that a pass of ``rows`` rows, drawn by chance, need not compute: exact where all rows start alike."""
    return sum(tokens * (rows * part - 1 + (1 - part) ** rows) for part, tokens in parts)


class Shared:
    """The common beginning of examples that come one by one."""

    def __init__(self) -> None:
        self._ids: list[int] | None = None

    def add(self, example: Example) -> None:
        """One more that has to start alike."""
        if self._ids is None:
            self._ids = list(example.ids[: free(example)])
            return
        room = len(self._ids)
        if not room:
            return
        if list(example.ids[:room]) == self._ids and example.length > room and not any(example.weights[1:room]):
            return  # the usual case, without a look at each token
        del self._ids[_alike(self._ids, example.ids, free(example)) :]

    @property
    def length(self) -> int:
        """Tokens; 0 where they are too few to be worth it."""
        found = len(self._ids or ())
        return found if found >= LEAST else 0


def cut(examples: Sequence[Example]) -> list[Piece]:
    """The examples as pieces, each shared beginning once, before the first that goes on from it."""
    pieces: list[Piece] = []
    groups = {members[0]: (members, length) for members, length in _groups(examples)}
    grouped = {index for members, _ in groups.values() for index in members}
    for index, example in enumerate(examples):
        if index in groups:
            members, length = groups[index]
            parent = len(pieces)
            pieces.append(Piece(index, 0, length))
            pieces += [Piece(one, length, examples[one].length, parent) for one in members]
        elif index not in grouped:
            pieces.append(Piece(index, 0, example.length))
    return pieces


def _in_one_pass(rows: int, tokens: int) -> float:
    """What ``rows`` that start with the same ``tokens`` save, all together."""
    return (rows - 1) * tokens


def _groups(
    examples: Sequence[Example], saving: Callable[[int, int], float] = _in_one_pass
) -> list[tuple[list[int], int]]:
    """Examples that share a beginning, in their order, and its tokens.

    Sorted by their tokens, neighbours have the longest beginnings in common. Runs of neighbours are joined from the
    longest down, where joining saves more tokens than keeping the groups that were found inside.
    """
    if len(examples) < 2:
        return []
    order = sorted(range(len(examples)), key=lambda i: (list(examples[i].ids), i))
    frees = [free(examples[i]) for i in order]
    runs = [_Run(0, 1, 0.0, [])]
    between: list[int] = []

    def join() -> None:
        common, right, left = between.pop(), runs.pop(), runs.pop()
        start, stop = left.start, right.stop
        saved = saving(stop - start, common) if common >= LEAST else 0.0
        apart = left.saved + right.saved
        whole = saved > apart
        groups = [(start, stop, common)] if whole else left.groups + right.groups
        runs.append(_Run(start, stop, max(saved, apart), groups))

    for at in range(1, len(order)):
        before, here = order[at - 1], order[at]
        common = _alike(examples[before].ids, examples[here].ids, min(frees[at - 1], frees[at]))
        while between and between[-1] > common:
            join()
        between.append(common)
        runs.append(_Run(at, at + 1, 0.0, []))
    while between:
        join()
    return [(sorted(order[start:stop]), common) for start, stop, common in runs[0].groups]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours ``start`` to ``stop``: the tokens that sharing saves among them, and the groups that save them."""

    start: int
    stop: int
    saved: float
    groups: list[tuple[int, int, int]]


def _alike(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many of the first ``limit`` tokens are the same; halving, since most often nearly all are."""
    limit = min(limit, len(a), len(b))
    low, high = 0, limit  # the first `low` are alike; more than `high` are not
    while low < high:
        middle = (low + high + 1) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
