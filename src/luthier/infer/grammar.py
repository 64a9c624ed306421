"""A schema, a regular expression or choices as llguidance's grammar, and what is wrong with one, and where. No torch.

Needs the extra `constrain`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from luthier import json_reader

# Space that may stand between the parts of a JSON text: not without end.
BETWEEN: Mapping[str, Any] = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{1,2}"}
KINDS = ("schema", "regex", "choices")
INNER = ("properties", "patternProperties", "$defs", "definitions")  # words that hold schemas by name
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # in a list
ALONE = ("items", "additionalProperties")  # or one


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
    return LLMatcher.grammar_from_json_schema(value, defaults=BETWEEN)  # type: ignore[arg-type]


def fault_of(extra: Mapping[str, Any]) -> str | None:
    """What is wrong with a schema, a regular expression or choices, and where in it; None where nothing is.

    Raises ImportError without llguidance.
    """
    message = _message(extra)
    if message is None:
        return None
    if extra.get("regex") is not None:
        return _in_regex(message)
    schema = extra.get("schema")
    if isinstance(schema, str):
        try:
            schema = json_reader.parse(schema)
        except ValueError:
            return message.split("\n")[0]  # which says line and column
    if not isinstance(schema, Mapping):
        return message.split("\n")[0]
    place, told = _in_schema(schema, schema, message)
    return f"at {place}: {told}" if place else told


def _message(extra: Mapping[str, Any]) -> str | None:
    from llguidance import LLMatcher

    try:
        if any(_repeats(one) for one in _every(extra.get("schema"))):
            return "minProperties counts a name that comes twice: list and require names, or leave it out"
        grammar = grammar_of(extra)
    except ValueError as error:
        return str(error)
    message = LLMatcher.validate_grammar(grammar) if grammar else ""
    return message.strip() if message and not message.startswith("WARNING") else None


def _in_regex(message: str) -> str:
    """The fault and its place, which the library draws as a caret below the expression."""
    lines = message.split("\n")
    told = next((line.strip().removeprefix("error: ") for line in lines if line.strip().startswith("error: ")), "")
    at = next((i for i, line in enumerate(lines) if i and line.strip() and set(line.strip()) == {"^"}), None)
    if not told or at is None:
        return lines[0]
    margin = len(lines[at - 1]) - len(lines[at - 1].lstrip())
    return f"at character {lines[at].index('^') - margin + 1}: {told}"


def _in_schema(root: Mapping[str, Any], schema: Mapping[str, Any], message: str) -> tuple[str, str]:
    """The innermost schema that cannot be followed by itself: its place, and what is said of it."""
    definitions = {word: root[word] for word in ("$defs", "definitions") if word in root}
    for place, inner in _parts(schema):
        own = _message({"schema": {**definitions, **inner}})
        if own is not None and place.split(".")[0] not in definitions:
            below, told = _in_schema(root, inner, own)
            return (f"{place}.{below}" if below else place), told
    for place, inner in _parts(schema):
        if place.split(".")[0] in definitions:
            own = _message({"schema": inner})
            if own is not None and "Pointer" not in own:
                below, told = _in_schema(inner, inner, own)
                return (f"{place}.{below}" if below else place), told
    lines = [line.strip() for line in message.split("\n") if line.strip()]
    return "", lines[-1].removeprefix("error: ") if "regex" in lines[0] else lines[0]


def _every(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema, and all those in it."""
    if isinstance(schema, str):
        with suppress(ValueError):  # the library says where it is no JSON
            schema = json_reader.parse(schema)
    if isinstance(schema, Mapping):
        yield schema
        for _, inner in _parts(schema):
            yield from _every(inner)


def _repeats(schema: Mapping[str, Any]) -> bool:
    """Whether a repeated name could pass for another: the library counts both, JSON keeps one.

    Names that are listed come once. Of the others one is as good as none before it, so that one more is safe.
    """
    least = schema.get("minProperties")
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    if closed or not isinstance(least, (int, float)):
        return False
    listed = schema.get("properties")
    required = schema.get("required")
    sure = set(required if isinstance(required, (list, tuple)) else ())
    return least > 1 + len(sure & set(listed if isinstance(listed, Mapping) else ()))


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for word in INNER:
        for name, inner in schema[word].items() if isinstance(schema.get(word), Mapping) else ():
            if isinstance(inner, Mapping):
                yield f"{word}.{name}", inner
    for word in LISTS:
        for number, inner in enumerate(schema[word] if isinstance(schema.get(word), (list, tuple)) else ()):
            if isinstance(inner, Mapping):
                yield f"{word}[{number}]", inner
    for word in ALONE:
        if isinstance(schema.get(word), Mapping):
            yield word, schema[word]
