"""Numbers as their source wrote them: 1.10 and 1e5 count as numbers and read as text.

JSON knows no difference between 1.1 and 1.10; whoever learns from the text does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any

MAYBE_WRITTEN = re.compile(r"\d\.\d|\de[-+]?\d|Infinity")  # what JSON of a Python float holds somewhere


class Written(float):
    """A number that Python would write otherwise than its source did."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str | float) -> Written:
        """``text``: a number as a source wrote it."""
        self = super().__new__(cls, text)
        self.text = str(text)
        return self

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]
        return (self.text,)


def number(text: str) -> float:
    """The number of a JSON text, a plain float where Python writes it the same; ``parse_float`` of `json.loads`."""
    value = float(text)
    return value if float.__repr__(value) == text else Written(text)


DECODER = json.JSONDecoder(parse_float=number)


def dumps(value: Any, default: Callable[[Any], Any] | None = None, separators: tuple[str, str] = (", ", ": ")) -> str:
    """JSON of ``value`` in which numbers stand as they were written; `loads` gives them back."""
    text = json.dumps(value, ensure_ascii=False, separators=separators, default=default)
    return _walk(value, default, separators) if MAYBE_WRITTEN.search(text) else text


def written(value: Any, **options: Any) -> str:
    """`json.dumps` with any of its ``options``, in which numbers stand as they were written."""
    text = json.dumps(value, **options)
    if not MAYBE_WRITTEN.search(text):
        return text
    stem, held = "zqn", list[Written]()
    while stem in text:
        stem += "n"
    text = json.dumps(_held(value, stem, held), **options)
    return re.sub(f'"{stem}(\\d+)"', lambda found: held[int(found[1])].text, text) if held else text


def _held(value: Any, stem: str, held: list[Written]) -> Any:
    """``value`` with a word of its own, ``stem`` and its place in ``held``, for each number to be kept."""
    if isinstance(value, Written):
        held.append(value)
        return f"{stem}{len(held) - 1}"
    if isinstance(value, dict):
        return {key: _held(inner, stem, held) for key, inner in value.items()}
    return [_held(inner, stem, held) for inner in value] if isinstance(value, (list, tuple)) else value


def loads(text: str) -> Any:
    """The value of a JSON text that `dumps` made."""
    return DECODER.decode(text)


def _walk(value: Any, default: Callable[[Any], Any] | None, separators: tuple[str, str]) -> str:
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, Written):
        return value.text
    comma, colon = separators
    if isinstance(value, dict):
        pairs = (f"{encode_basestring(_key(k))}{colon}{_walk(v, default, separators)}" for k, v in value.items())
        return "{" + comma.join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + comma.join(_walk(inner, default, separators) for inner in value) + "]"
    if type(value) is int:
        return str(value)
    return json.dumps(value, ensure_ascii=False, separators=separators, default=default)


def _key(key: Any) -> str:
    """A key as JSON writes it: those of Python may be numbers."""
    return key if isinstance(key, str) else next(iter(json.loads(json.dumps({key: 0}))))
