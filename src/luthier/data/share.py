"""What the samples of a pass start with in common (a template, a system prompt) is laid out, and computed, once.

Exact where nothing is drawn for a token: with dropout each sample would have drawn its own. A trained token is never
shared: its loss belongs to one sample. One level: a shared beginning has no shared beginning of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luthier.types import Example

LEAST = 16  # tokens: what a shorter beginning saves, gathering its keys costs


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


def _groups(examples: Sequence[Example]) -> list[tuple[list[int], int]]:
    """Examples that share a beginning, in their order, and its tokens.

    Sorted by their tokens, neighbours have the longest beginnings in common. Runs of neighbours are joined from the
    longest down, where joining saves more tokens than keeping the groups that were found inside.
    """
    if len(examples) < 2:
        return []
    order = sorted(range(len(examples)), key=lambda i: (list(examples[i].ids), i))
    frees = [free(examples[i]) for i in order]
    runs = [_Run(0, 1, 0, [])]
    between: list[int] = []

    def join() -> None:
        common, right, left = between.pop(), runs.pop(), runs.pop()
        start, stop = left.start, right.stop
        saved = (stop - start - 1) * common if common >= LEAST else 0
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
        runs.append(_Run(at, at + 1, 0, []))
    while between:
        join()
    return [(sorted(order[start:stop]), common) for start, stop, common in runs[0].groups]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbours ``start`` to ``stop``: the tokens that sharing saves among them, and the groups that save them."""

    start: int
    stop: int
    saved: int
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
