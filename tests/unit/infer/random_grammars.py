"""Random JSON schemas and regular expressions, each with one of its shortest complete answers, made beside it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Made = tuple[dict[str, Any], str]  # a schema and a shortest JSON text that satisfies it
NAMES = ("a", "b", "c", "name", "long name", 'quo"ted', "été")


def schema(draw: random.Random, depth: int = 3) -> Made:
    """A schema of any kind that has an answer."""
    deep = ("object", "object", "array", "any_of", "tuple") if depth else ()
    return KINDS[draw.choice(("integer", "number", "string", "pattern", "enum", "const", "boolean", "null", *deep))](
        draw, depth
    )


def _integer(draw: random.Random, depth: int) -> Made:
    least = draw.choice([-1000, -50, 0, 7, 100, 12345])
    most = least + draw.choice([0, 5, 900])
    return {"type": "integer", "minimum": least, "maximum": most}, min(map(str, range(least, most + 1)), key=len)


def _number(draw: random.Random, depth: int) -> Made:
    return {"type": "number"}, "0"


def _string(draw: random.Random, depth: int) -> Made:
    least = draw.choice([0, 0, 1, 3, 12, 40])
    out: dict[str, Any] = {"type": "string", "minLength": least}
    if draw.random() < 0.7:
        out["maxLength"] = least + draw.choice([0, 1, 30])
    return out, json.dumps("a" * least)


def _pattern(draw: random.Random, depth: int) -> Made:
    pattern, text = draw.choice(
        [("^[a-z]{3}-[0-9]{4}$", "abc-1234"), ("^(yes|no)$", "no"), ("^x+$", "x"), ("^[0-2][0-9]:[0-5][0-9]$", "12:34")]
    )
    return {"type": "string", "pattern": pattern}, json.dumps(text)


def _enum(draw: random.Random, depth: int) -> Made:
    values = draw.sample(["abc", "x", "true", 7, None, "a b", "ünï", False, -3.5], draw.randint(1, 4))
    return {"enum": values}, min((json.dumps(value, ensure_ascii=False) for value in values), key=len)


def _const(draw: random.Random, depth: int) -> Made:
    value = draw.choice(["so it is", 12, {"a": 1}, [1, 2], None])
    return {"const": value}, json.dumps(value, separators=(",", ":"))


def _object(draw: random.Random, depth: int) -> Made:
    names = draw.sample(NAMES, draw.randint(1, 4))
    required = draw.sample(names, draw.randint(0, len(names)))
    made = {name: schema(draw, depth - 1) for name in names}
    body = ",".join(f"{json.dumps(n, ensure_ascii=False)}:{made[n][1]}" for n in names if n in required)
    own = {name: one for name, (one, _) in made.items()}
    out = {"type": "object", "properties": own, "required": required, "additionalProperties": False}
    if draw.random() < 0.2:
        out["additionalProperties"] = {"type": "integer"}
    if len(required) == len(names):  # llguidance counts names only where all that are listed must come
        out["minProperties"] = draw.randint(0, len(names))
    return out, "{" + body + "}"


def _array(draw: random.Random, depth: int) -> Made:
    item, text = schema(draw, depth - 1)
    least = draw.choice([0, 1, 2, 5])
    out: dict[str, Any] = {"type": "array", "items": item, "minItems": least}
    if draw.random() < 0.7:
        out["maxItems"] = least + draw.choice([0, 2])
    return out, "[" + ",".join([text] * least) + "]"


def _tuple(draw: random.Random, depth: int) -> Made:
    items = [schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    count = len(items)
    out = {
        "type": "array", "prefixItems": [one for one, _ in items], "items": False,
        "minItems": count, "maxItems": count,
    }  # fmt: skip
    return out, "[" + ",".join(text for _, text in items) + "]"


def _any_of(draw: random.Random, depth: int) -> Made:
    ways = [schema(draw, depth - 1) for _ in range(draw.randint(2, 3))]
    return {"anyOf": [one for one, _ in ways]}, min((text for _, text in ways), key=len)


KINDS: dict[str, Callable[[random.Random, int], Made]] = {
    "integer": _integer, "number": _number, "string": _string, "pattern": _pattern, "enum": _enum, "const": _const,
    "object": _object, "array": _array, "tuple": _tuple, "any_of": _any_of,
    "boolean": lambda draw, depth: ({"type": "boolean"}, "true"),
    "null": lambda draw, depth: ({"type": "null"}, "null"),
}  # fmt: skip


def recursive(draw: random.Random) -> Made:
    """A schema that refers to itself."""
    leaf, text = _enum(draw, 0)
    refers = {"$ref": "#/$defs/node"}
    node = {
        "type": "object", "additionalProperties": False, "required": ["v"],
        "properties": {"v": leaf, "next": refers, "all": {"type": "array", "items": refers}},
    }  # fmt: skip
    return {"$defs": {"node": node}, **refers}, f'{{"v":{text}}}'


ATOMS = [
    ("[a-c]", "a"), ("[0-9]", "0"), ("x", "x"), ("ab", "ab"), ("[^a]", "b"), ("[ ,]", " "), (r"\s", " "),
    (".", "a"), ("(true|no)", "no"), ("[^0-9a-f]", "g"), ("é", "é"), (r"\.", "."), ("(?:so|we)", "so"), (r"\+", "+"),
    ("[A-Za-z_]", "a"), ("漢", "漢"), ("[-+]", "-"),
]  # fmt: skip
REPEATS = [
    ("", 1), ("", 1), ("?", 0), ("*", 0), ("+", 1), ("{2}", 2), ("{1,3}", 1), ("{0,7}", 0), ("{12}", 12), ("{3,}", 3),
]  # fmt: skip


def regex(draw: random.Random, depth: int = 3) -> tuple[str, str]:
    """An expression and a shortest text that matches it whole."""
    if depth and draw.random() < 0.2:
        ways = [regex(draw, depth - 1) for _ in range(draw.randint(2, 3))]
        return "(" + "|".join(one for one, _ in ways) + ")", min((text for _, text in ways), key=len)
    pattern, text = "", ""
    for _ in range(draw.randint(1, 4)):
        inner, own = regex(draw, depth - 1) if depth and draw.random() < 0.3 else draw.choice(ATOMS)
        times, least = draw.choice(REPEATS)
        pattern += f"({inner}){times}"
        text += own * least
    return pattern, text
