"""The shortest text that completes a regular expression from anywhere in it.

The expression becomes an automaton (Thompson 1968) whose states know how many bytes they are from the end.
"""

from __future__ import annotations

import heapq
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

LARGEST = 20_000  # states; a larger expression is closed by search
WITNESSES = string.ascii_lowercase + string.digits + string.ascii_uppercase + string.punctuation + " \n\t" + "éñ漢あ"

Test = Callable[[str], bool]
States = frozenset[int]


class Unknown(Exception):
    """A construct that the automaton does not know."""


@dataclass
class Automaton:
    """States are numbers; the last one made is the end."""

    edges: list[list[tuple[Test, str, int]]] = field(default_factory=list)  # test, a character that passes it, target
    free: list[list[int]] = field(default_factory=list)  # targets that cost nothing
    end: int = 0
    distance: list[int | None] = field(default_factory=list)
    _next: list[tuple[str, int]] = field(default_factory=list)

    def state(self) -> int:
        """A new state."""
        if len(self.edges) >= LARGEST:
            raise Unknown("too large")
        self.edges.append([])
        self.free.append([])
        return len(self.edges) - 1

    @property
    def start(self) -> States:
        """Before anything was read."""
        return self._spread([0])

    def read(self, states: States, text: str) -> States:
        """Where the states are after ``text``."""
        for character in text:
            states = self._spread(to for one in states for test, _, to in self.edges[one] if test(character))
        return states

    def rest(self, states: States) -> str | None:
        """The shortest text to the end; None where there is none."""
        reached = [(d, one) for one in states if (d := self.distance[one]) is not None]
        if not reached:
            return None
        at = min(reached)[1]
        text = ""
        while at != self.end:
            character, at = self._next[at]
            text += character
        return text

    def settle(self, end: int) -> None:
        """Compute the distances, from the end backwards."""
        self.end = end
        count = len(self.edges)
        back: list[list[tuple[int, str]]] = [[] for _ in range(count)]
        for one in range(count):
            for to in self.free[one]:
                back[to].append((one, ""))
            for _, character, to in self.edges[one]:
                back[to].append((one, character))
        self.distance, self._next = [None] * count, [("", end)] * count
        self.distance[end] = 0
        waiting = [(0, end)]
        while waiting:  # the nearest first (Dijkstra)
            length, at = heapq.heappop(waiting)
            if length > (self.distance[at] or 0):
                continue  # it was reached on a shorter way
            for one, character in back[at]:
                longer = length + len(character.encode())
                known = self.distance[one]
                if known is None or longer < known:
                    self.distance[one], self._next[one] = longer, (character, at)
                    heapq.heappush(waiting, (longer, one))

    def _spread(self, states: Iterable[int]) -> States:
        waiting = list(states)
        found = set(waiting)
        while waiting:
            for to in self.free[waiting.pop()]:
                if to not in found:
                    found.add(to)
                    waiting.append(to)
        return frozenset(found)


def automaton(pattern: str) -> Automaton | None:
    """The automaton of a regular expression that has to match whole; None for one that it cannot hold."""
    from re import _parser  # type: ignore[attr-defined]  # the standard library's own, without a public name

    try:
        tree = _parser.parse(pattern)
        made = Automaton()
        start = made.state()
        made.settle(_sequence(made, tree, start))
    except (Unknown, re.error, RecursionError, OverflowError):
        return None
    return made


def _sequence(made: Automaton, items: Iterable[tuple[Any, Any]], at: int) -> int:
    for kind, value in items:
        build = _BUILD.get(str(kind))
        if build is None:
            raise Unknown(str(kind))
        at = build(made, value, at)
    return at


def _one(made: Automaton, test: Test, at: int, first: str = "") -> int:
    witness = next((c for c in first + WITNESSES if test(c)), None)
    if witness is None:
        raise Unknown("no character that is known to pass")
    to = made.state()
    made.edges[at].append((test, witness, to))
    return to


def _class(made: Automaton, items: list[tuple[Any, Any]], at: int) -> int:
    tests = [_member(str(kind), value) for kind, value in items if str(kind) != "NEGATE"]
    negated = str(items[0][0]) == "NEGATE"
    named = "".join(chr(value if isinstance(value, int) else value[0]) for kind, value in items
                    if str(kind) in ("LITERAL", "RANGE"))  # fmt: skip
    return _one(made, lambda c: any(test(c) for test in tests) != negated, at, named)


def _member(kind: str, value: Any) -> Test:
    if kind == "LITERAL":
        return lambda c: ord(c) == value
    if kind == "RANGE":
        return lambda c: value[0] <= ord(c) <= value[1]
    category = re.compile({"CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
                           "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w",
                           "CATEGORY_NOT_WORD": r"\W"}[str(value)])  # fmt: skip
    return lambda c: category.match(c) is not None


def _repeat(made: Automaton, value: tuple[Any, Any, Any], at: int) -> int:
    least, most, inner = value
    for _ in range(int(least)):
        at = _sequence(made, inner, at)
    if str(most) == "MAXREPEAT":
        loop = made.state()
        made.free[at].append(loop)
        made.free[_sequence(made, inner, loop)].append(loop)
        return loop
    out = made.state()
    for _ in range(int(most) - int(least)):
        made.free[at].append(out)
        at = _sequence(made, inner, at)
    made.free[at].append(out)
    return out


def _branch(made: Automaton, value: tuple[Any, list[Any]], at: int) -> int:
    out = made.state()
    for inner in value[1]:
        begin = made.state()
        made.free[at].append(begin)
        made.free[_sequence(made, inner, begin)].append(out)
    return out


_BUILD: dict[str, Callable[[Automaton, Any, int], int]] = {
    "LITERAL": lambda made, value, at: _one(made, lambda c: ord(c) == value, at, chr(value)),
    "NOT_LITERAL": lambda made, value, at: _one(made, lambda c: ord(c) != value, at),
    "ANY": lambda made, value, at: _one(made, lambda c: c != "\n", at),
    "IN": _class,
    "MAX_REPEAT": _repeat,
    "MIN_REPEAT": _repeat,
    "SUBPATTERN": lambda made, value, at: _sequence(made, value[3], at),
    "BRANCH": _branch,
    "AT": lambda made, value, at: at,  # an anchor: the whole text has to match anyway
}
