"""Answers that a JSON Schema, a regular expression or a list of choices allows, and that end within their budget.

Needs the extra `constrain` (llguidance), which says what tokens may follow; here is who asks it, and how an answer is
brought to its end in time: near its last tokens a row may only go where a known completion still fits.

The light half (`grammar_of`, `fault_of`) needs no torch.
"""

from __future__ import annotations

import heapq
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from luthier.infer.closing import States, automaton

if TYPE_CHECKING:
    import llguidance
    import numpy as np

KINDS = ("schema", "regex", "choices")
ZONE = 48  # tokens beyond the known completion within which each step is checked; more if completions are longer
EVERY = 8  # steps between two looks at how far the end is, outside of the zone
TRIED = 3  # likeliest tokens whose completion is looked for, within the zone
WIDTH = 6  # ways of one length that the search for a completion goes on with
SEARCH = 3000  # steps that it tries, at most
FEW = 48  # tokens that are all tried
# What brings an answer nearer to its end: tried before anything else, in this order.
CLOSERS = ('"', "}", "]", '"}', '"]', '"}}', "}}", "0", "1", "[]", "{}", '""', "null", "true", "false", ":", ",", " ")


class Serialised(Protocol):
    """A tokenizer that can be handed on whole."""

    def to_json(self) -> str:
        """Its tokenizer.json."""
        ...


def grammar_of(extra: Mapping[str, Any]) -> str | None:
    """What the settings allow, in llguidance's terms; None where they constrain nothing."""
    kind = next((kind for kind in KINDS if extra.get(kind) is not None), None)
    if kind is None:
        return None
    from llguidance import LLMatcher

    value = extra[kind]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choices":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in value))
    flexible = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{1,2}"}  # not without end
    return LLMatcher.grammar_from_json_schema(value, defaults=flexible)  # type: ignore[arg-type]


def fault_of(extra: Mapping[str, Any]) -> str | None:
    """What is wrong with a schema, a regular expression or choices; None where nothing is.

    Raises ImportError without llguidance.
    """
    from llguidance import LLMatcher

    try:
        grammar = grammar_of(extra)
    except ValueError as error:
        return str(error)
    message = LLMatcher.validate_grammar(grammar) if grammar else ""
    return message.strip().split("\n")[0] if message and not message.startswith("WARNING") else None


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
        self._start = LLMatcher(vocabulary.tokens, grammar_of(extra) or "")
        if self._start.is_error():
            raise ValueError(self._start.get_error())
        pattern = extra.get("regex")
        if extra.get("choices") is not None:
            pattern = "|".join(map(re.escape, extra["choices"]))
        self.automaton = automaton(pattern) if pattern is not None else None

    def follow(self, budget: int) -> Path:
        """A row at its beginning, which has ``budget`` tokens."""
        return Path(self, self.start(), budget, len(self.least) + 1 if self.least is not None else 0)

    def start(self) -> Place:
        """Where every row begins."""
        return Place(self._start.deep_copy(), None if self.automaton is None else self.automaton.start)

    @cached_property
    def least(self) -> list[int] | None:
        """A short complete answer; None where none was found."""
        return self.complete(self.start())

    def after(self, place: Place, token: int) -> Place | None:
        """Where ``token`` leads; None where it may not follow."""
        matcher = place.matcher.deep_copy()
        if not matcher.consume_token(token):
            return None
        return Place(matcher, *self._read(place, token))

    def _read(self, place: Place, token: int) -> tuple[States | None, bytes]:
        """The automaton's states after a token, and what the token leaves of a character that is not yet whole."""
        if place.states is None or self.automaton is None:
            return None, b""
        held = place.held + self.vocabulary.tokens.decode_bytes([token])
        text = held.decode("utf-8", "ignore")
        rest = held[len(text.encode()) :]
        return self.automaton.read(place.states, text), rest

    def complete(self, place: Place, most: int | None = None) -> list[int] | None:
        """A short way to a complete answer, at most ``most`` tokens; None where none was found."""
        if self.automaton is not None and place.states is not None and not place.held:
            text = self.automaton.rest(place.states)
            way = None if text is None else self.vocabulary.tokens.tokenize_str(text)
            if way is not None and place.matcher.validate_tokens(way) == len(way):
                return way if most is None or len(way) <= most else None
        return search(place.matcher, self.vocabulary, most)


@dataclass(frozen=True)
class Place:
    """A point in a grammar: llguidance's, and the automaton's where there is one, with bytes of half a character."""

    matcher: llguidance.LLMatcher
    states: States | None
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
    """Where one row is in its grammar. ``need``: tokens of a known completion, its end included, when last looked."""

    def __init__(self, grammar: Grammar, place: Place, budget: int, need: int) -> None:
        self.grammar, self.place, self.budget, self.need = grammar, place, budget, need
        self.made, self.ended, self.zone = 0, False, max(ZONE, need)
        self._known: list[int] | None = None  # a completion from here, found earlier

    def take(self, tokens: Sequence[int]) -> None:
        """The row's next tokens."""
        for token in tokens:
            self.made += 1
            self.ended = self.ended or token in self.grammar.vocabulary.ends
            if not self.ended:
                self.place = self.grammar.after(self.place, token) or self.place
                self._known = self._known[1:] if self._known and self._known[0] == token else None

    def allowed(self, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[v] bool: what may come next. ``scores`` [v] decide which tokens are looked at near the end of the budget."""
        import numpy as np

        if self.ended:  # a row of a padded batch: what it writes now is cut off
            return np.ones(len(scores), dtype=bool)
        vocabulary = self.grammar.vocabulary
        may = bits(self.place.matcher, vocabulary.size)
        left = self.budget - self.made
        if left > self.need + self.zone and self.made % EVERY:
            return may
        found = [way for way in (self.grammar.complete(self.place), self._known) if way is not None]
        if not found:
            return may
        self._known = min(found, key=len)
        self.need = len(self._known) + 1
        self.zone = max(self.zone, self.need)  # one token may begin another part as long as any before
        if left > self.need + self.zone:
            return may
        own = np.where(may, scores, -np.inf)
        likeliest = np.argpartition(-own, TRIED)[:TRIED].tolist()
        fits = [token for token in likeliest if may[token] and self._fits(token, left - 1)]
        narrow = np.zeros_like(may)
        ends = [token for token in vocabulary.ends if may[token]]
        narrow[fits or self._known[:1] or ends] = True
        return narrow

    def _fits(self, token: int, left: int) -> bool:
        """Whether an answer that goes on with ``token`` can be completed, its end included, in ``left`` more."""
        if token in self.grammar.vocabulary.ends:
            return True
        after = self.grammar.after(self.place, token)
        return after is not None and self.grammar.complete(after, left - 1) is not None


def bits(matcher: llguidance.LLMatcher, size: int) -> np.ndarray[Any, Any]:
    """[size] bool: the tokens that may come next."""
    import numpy as np

    packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little", count=size).astype(bool)


def search(matcher: llguidance.LLMatcher, vocabulary: Vocabulary, most: int | None = None) -> list[int] | None:
    """A short way to a complete answer, at most ``most`` tokens: the best of those that a narrow search looks at."""
    waiting: list[tuple[int, int, list[int], llguidance.LLMatcher]] = [(0, 0, [], matcher)]
    looked: dict[int, int] = defaultdict(int)
    met: set[tuple[int, bytes]] = set()
    count = 0
    while waiting and count < SEARCH:
        length, _, way, here = heapq.heappop(waiting)
        if most is not None and length > most:
            return None
        if here.is_accepting():
            return way
        looked[length] += 1
        if looked[length] > WIDTH:
            continue
        for step in _steps(here, vocabulary):
            after = here.deep_copy()
            if not after.consume_tokens(step):
                continue
            count += 1
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
