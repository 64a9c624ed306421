"""Answers that a JSON Schema, a regular expression or a list of choices allows, and that end within their budget.

Needs the extra `constrain` (llguidance), which says what tokens may follow; here is who asks it, and how an answer is
brought to its end in time: near its last tokens a row may only go where a known completion still fits.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from luthier.infer.closing import States, automaton
from luthier.infer.grammar import grammar_of
from luthier.infer.json_rest import Rests

if TYPE_CHECKING:
    import llguidance
    import numpy as np

ZONE = 48  # tokens by which one token may put the end further off, where nothing else is known
MARGIN = 8  # tokens that are added to what is known of it
TRIED = 3  # likeliest tokens whose completion is looked for, near the end of the budget
WIDTH = 6  # ways of one length that the search for a completion goes on with
SEARCH = 3000  # steps that it tries, at most
FEWER = 300  # and after a token that need not be taken
FEW = 48  # tokens that are all tried
# What brings an answer nearer to its end: tried before anything else, in this order.
CLOSERS = ('"', "}", "]", '"}', '"]', '"}}', "}}", "0", "1", "[]", "{}", '""', "null", "true", "false", ":", ",", " ")


class Serialised(Protocol):
    """A tokenizer that can be handed on whole."""

    def to_json(self) -> str:
        """Its tokenizer.json."""
        ...


class Vocabulary:
    """A tokenizer as llguidance knows it, and which of its tokens are short ways to an end."""

    def __init__(self, tokenizer: Serialised, size: int, ends: Sequence[int]) -> None:
        """``size``: scores that the model gives; it may be more than there are tokens."""
        from llguidance import LLTokenizer

        self.size, self.ends = size, frozenset(ends)
        self.tokens: llguidance.LLTokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=list(ends))

    @cached_property
    def closers(self) -> list[int]:
        """The tokens that are one of `CLOSERS`, in their order."""
        spelled = {self.tokens.decode_bytes([token]): token for token in reversed(range(self.size))}
        return [spelled[text.encode()] for text in CLOSERS if text.encode() in spelled]

    @cached_property
    def by_length(self) -> np.ndarray[Any, Any]:
        """All tokens but the ends, the longest first: what fills a required length, or a name, soonest."""
        import numpy as np

        texts = [self.tokens.decode_bytes([token]) for token in range(self.size)]
        order = sorted(range(self.size), key=lambda token: (not texts[token].isalnum(), -len(texts[token])))
        return np.array([token for token in order if token not in self.ends])

    @cached_property
    def solid(self) -> np.ndarray[Any, Any]:
        """[v] bool: the tokens that neither begin with white space nor end an answer."""
        import numpy as np

        texts = (self.tokens.decode_bytes([token]) for token in range(self.size))
        own = [not text[:1].isspace() and token not in self.ends for token, text in enumerate(texts)]
        return np.array(own)


class Grammar:
    """What a request's settings allow, ready to be followed by any number of rows."""

    def __init__(self, extra: Mapping[str, Any], vocabulary: Vocabulary) -> None:
        from llguidance import LLMatcher

        self.vocabulary = vocabulary
        self._start = LLMatcher(vocabulary.tokens, grammar_of(extra) or "", log_level=0)
        if self._start.is_error():
            raise ValueError(self._start.get_error())
        pattern = extra.get("regex")
        if extra.get("choices") is not None:
            pattern = "|".join(map(re.escape, extra["choices"]))
        self.automaton = automaton(pattern) if pattern is not None else None
        self.json = Rests(extra["schema"]) if extra.get("schema") is not None else None

    @cached_property
    def growth(self) -> int:
        """Tokens by which one token may put the end further off: it may begin another part, as long as any."""
        if self.automaton is not None:
            return max(one or 0 for one in self.automaton.distance) + MARGIN
        return 2 * self.json.largest() + MARGIN if self.json is not None else ZONE

    def follow(self, budget: int) -> Path:
        """A row at its beginning, which has ``budget`` tokens."""
        return Path(self, self.start(), budget)

    def start(self) -> Place:
        """Where every row begins."""
        return Place(self._start.deep_copy(), None if self.automaton is None else self.automaton.start)

    @cached_property
    def least(self) -> list[int] | None:
        """A short complete answer; None where none was found."""
        return self.complete(self.start())

    def after(self, place: Place, token: int) -> Place | None:
        """Where ``token`` leads; None where it may not follow."""
        if place.matcher.is_error():  # a limit of the library; what is known goes on without it
            return self._read(place, place.matcher, token)
        if place.matcher.validate_tokens([token]) != 1:
            return None
        matcher = place.matcher.deep_copy()
        matcher.consume_token(token)
        return self._read(place, matcher, token)

    def _read(self, place: Place, matcher: llguidance.LLMatcher, token: int) -> Place:
        """The text and the automaton's states after a token, and what it leaves of a character not yet whole."""
        held = place.held + self.vocabulary.tokens.decode_bytes([token])
        new = held.decode("utf-8", "ignore")
        states = None
        if place.states is not None and self.automaton is not None:
            states = self.automaton.read(place.states, new)
        text = place.text + new if self.json is not None else ""
        return Place(matcher, states, text, held[len(new.encode()) :])

    def complete(self, place: Place, most: int | None = None, tried: int = SEARCH) -> list[int] | None:
        """A short way to a complete answer, at most ``most`` tokens; None where none was found.

        ``tried``: steps of a search, where no proposal holds.
        """
        ways = sorted(map(self.vocabulary.tokens.tokenize_str, self.proposals(place)), key=len)
        right = (way for way in ways if place.matcher.validate_tokens(way) == len(way) and _ends(place.matcher, way))
        way = next(right, None)
        if way is not None:
            return way if most is None or len(way) <= most else None
        return search(place.matcher, self.vocabulary, most, tried)

    def proposals(self, place: Place) -> list[str]:
        """Texts that should complete the answer."""
        if place.held:
            return []
        if self.automaton is not None and place.states is not None:
            text = self.automaton.rest(place.states)
            return [] if text is None else [text]
        return self.json.rests(place.text) if self.json is not None else []


def _ends(matcher: llguidance.LLMatcher, way: Sequence[int]) -> bool:
    """Whether the answer is complete after these tokens, which may follow."""
    after = matcher.deep_copy()
    return (not way or bool(after.consume_tokens(list(way)))) and bool(after.is_accepting())


@dataclass(frozen=True)
class Place:
    """A point in a grammar: llguidance's, the automaton's where there is one, a schema's text; half a character."""

    matcher: llguidance.LLMatcher
    states: States | None
    text: str = ""
    held: bytes = b""


class Grammars:
    """The grammars of one engine, each compiled once."""

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._size, self._ends = tokenizer, size, ends
        self._found: dict[str, Grammar] = {}

    def follow(self, extra: Mapping[str, Any], budget: int) -> Path | None:
        """A row's path; None where the settings constrain nothing. Raises ValueError for a grammar that is none."""
        text = grammar_of(extra)
        if text is None:
            return None
        if text not in self._found:
            self._found[text] = Grammar(extra, _vocabulary(self._tokenizer, self._size, tuple(self._ends)))
        return self._found[text].follow(budget)


# Making one reads the whole vocabulary, and engines are made by the question.
_VOCABULARIES: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Vocabulary]] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any, size: int, ends: tuple[int, ...]) -> Vocabulary:
    known = _VOCABULARIES.setdefault(tokenizer, {})
    if (size, ends) not in known:
        known[size, ends] = Vocabulary(tokenizer, size, ends)
    return known[size, ends]


class Path:
    """Where one row is in its grammar.

    While there is room to spare a row goes where it likes, for as many steps as cannot use that room up. Then it is
    looked how far the end is; and where that is near the budget, only tokens may follow after which a known completion
    fits. From then on one is always known.
    """

    def __init__(self, grammar: Grammar, place: Place, budget: int) -> None:
        self.grammar, self.place, self.budget = grammar, place, budget
        self.made, self.ended = 0, False
        self._look = 0  # tokens after which is looked next
        self._known: list[int] | None = None  # a completion from here
        self._after: dict[int, list[int]] = {}  # completions after tokens that may follow

    def take(self, tokens: Sequence[int]) -> None:
        """The row's next tokens."""
        for token in tokens:
            self.made += 1
            self.ended = self.ended or token in self.grammar.vocabulary.ends
            if not self.ended:
                self.place = self.grammar.after(self.place, token) or self.place
                own = self._known[1:] if self._known and self._known[0] == token else None
                self._known, self._after = self._after.get(token, own), {}

    def allowed(self, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[v] bool: what may come next. ``scores`` [v] decide which tokens are looked at near the end of the budget."""
        import numpy as np

        if self.ended:  # a row of a padded batch: what it writes now is cut off
            return np.ones(len(scores), dtype=bool)
        vocabulary = self.grammar.vocabulary
        may = bits(self.place.matcher, vocabulary.size)
        if self.place.matcher.is_error():
            return self._without_library()
        if self.made < self._look:
            return may
        left = self.budget - self.made
        found = [way for way in (self.grammar.complete(self.place), self._known) if way is not None]
        if not self.made and min(map(len, found), default=left) >= left:  # few characters may still be many tokens
            found += [way for way in (search(self.place.matcher, vocabulary, left - 1),) if way is not None]
        if not found:
            return may
        self._known = min(found, key=len)
        free = (left - len(self._known) - 1) // (self.grammar.growth + 1)
        if free > 0:
            self._look = self.made + free
            return may
        own = np.where(may, scores, -np.inf)
        likeliest = np.argpartition(-own, TRIED)[:TRIED].tolist()
        fits = [token for token in likeliest if may[token] and self._fits(token, left - 1)]
        narrow = np.zeros_like(may)
        ends = [token for token in vocabulary.ends if may[token]]
        narrow[fits or self._known[:1] or ends] = True
        return narrow

    def _without_library(self) -> np.ndarray[Any, Any]:
        """[v] bool: the next token of the shortest completion, where the library gave up on an expression's size."""
        import numpy as np

        vocabulary = self.grammar.vocabulary
        if self._known is None:
            texts = self.grammar.proposals(self.place)
            self._known = vocabulary.tokens.tokenize_str(texts[0]) if texts else []
        narrow = np.zeros(vocabulary.size, dtype=bool)
        narrow[self._known[:1] or list(vocabulary.ends)] = True
        return narrow

    def _fits(self, token: int, left: int) -> bool:
        """Whether an answer that goes on with ``token`` can be completed, its end included, in ``left`` more."""
        if token in self.grammar.vocabulary.ends:
            return True
        after = self.grammar.after(self.place, token)
        way = None if after is None else self.grammar.complete(after, left - 1, FEWER)
        if way is not None:
            self._after[token] = way
        return way is not None


def bits(matcher: llguidance.LLMatcher, size: int) -> np.ndarray[Any, Any]:
    """[size] bool: the tokens that may come next."""
    import numpy as np

    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little", count=size).astype(bool)


def search(
    matcher: llguidance.LLMatcher, vocabulary: Vocabulary, most: int | None = None, tried: int = SEARCH
) -> list[int] | None:
    """A short way to a complete answer, at most ``most`` tokens: the best of those that a narrow search looks at."""
    waiting: list[tuple[int, int, list[int], llguidance.LLMatcher]] = [(0, 0, [], matcher)]
    looked: dict[int, int] = defaultdict(int)
    met: set[tuple[int, bytes]] = set()
    count = 0
    while waiting and count < tried:
        length, _, way, here = heapq.heappop(waiting)
        if most is not None and length > most:
            return None
        if here.is_accepting():
            return way
        looked[length] += 1
        if looked[length] > WIDTH:
            continue
        for step in _steps(here, vocabulary):
            count += 1
            if here.validate_tokens(step) != len(step):
                continue
            after = here.deep_copy()
            after.consume_tokens(step)
            key = (length + len(step), after.compute_bitmask())
            if key not in met:
                met.add(key)
                heapq.heappush(waiting, (length + len(step), count, way + step, after))
    return None


def _steps(matcher: llguidance.LLMatcher, vocabulary: Vocabulary) -> list[list[int]]:
    """What to try next: what is forced, else tokens that close something, long ones, and any."""
    forced = matcher.compute_ff_tokens()
    if forced:
        return [forced]
    may = bits(matcher, vocabulary.size)
    solid = may & vocabulary.solid
    may = solid if solid.any() else may
    found = [token for token in vocabulary.closers if may[token]]
    long = vocabulary.by_length[may[vocabulary.by_length]][: FEW if may.sum() <= FEW else 3].tolist()
    return [[token] for token in dict.fromkeys([*found, *long])]
