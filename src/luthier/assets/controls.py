"""Where a model's control strings stand in text, and where text could become one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

Span = tuple[int, int]  # start and end of a piece of text, in characters


class ControlStrings:
    """The strings that a tokenizer reads as one control token, such as ``<|im_end|>``."""

    def __init__(self, tokens: Mapping[str, bool]) -> None:
        """``tokens``: each string, and whether it counts as a whole word only."""
        self._tokens = tokens

    def find(self, text: str) -> list[Span]:
        """Where special-token strings stand in ``text``, leftmost and longest first."""
        if self._pattern is None or self._opening.search(text) is None:
            return []
        return [m.span() for m in self._pattern.finditer(text) if self._stands(m)]

    def hazards(self, text: str) -> list[Span]:
        """Spans of ``text`` that are, or with other text around them could become, special-token strings."""
        found = self.find(text)
        head = tail = 0
        most = min(self._longest - 1, len(text))
        if self._closing.search(text, 0, most):  # the rest of a token ends as a token does
            head = next((n for n in range(most, 0, -1) if text[:n] in self._suffixes), 0)
        if self._opening.search(text, len(text) - most):
            tail = next((n for n in range(most, 0, -1) if text[-n:] in self._prefixes), 0)
        if head and not (found and found[0][0] < head):
            found.insert(0, (0, head))
        start = len(text) - tail
        if tail and not (found and found[-1][1] > start):
            found.append((start, len(text)))
        return found

    def outside(self, text: str, data: Sequence[Span]) -> Iterator[Span]:
        """Spans of special strings that lie wholly between the data spans."""
        position = 0
        for begin, end in [*data, (len(text), len(text))]:
            for a, b in self.find(text[position:begin]):
                yield position + a, position + b
            position = end

    def _stands(self, match: re.Match[str]) -> bool:
        """Whether a match counts: a token declared ``single_word`` does not match inside a word."""
        if not self._tokens[match.group()]:
            return True
        around = match.string[max(0, match.start() - 1) : match.start()] + match.string[match.end() : match.end() + 1]
        return not any(c.isalnum() or c == "_" for c in around)

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._tokens, key=lambda s: (-len(s), s))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _opening(self) -> re.Pattern[str]:
        """Any character that a special string begins with."""
        return _any_of(s[0] for s in self._tokens)

    @cached_property
    def _closing(self) -> re.Pattern[str]:
        """Any character that a special string ends with."""
        return _any_of(s[-1] for s in self._tokens)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._tokens), default=1)

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        return frozenset(s[:n] for s in self._tokens for n in range(1, len(s)))

    @cached_property
    def _suffixes(self) -> frozenset[str]:
        return frozenset(s[n:] for s in self._tokens for n in range(1, len(s)))


def _any_of(characters: Iterable[str]) -> re.Pattern[str]:
    found = "".join(sorted({re.escape(c) for c in characters}))
    return re.compile(f"[{found}]" if found else r"(?!)")
