"""The shortest texts that complete a JSON text under its schema, from anywhere in it.

They are proposals: whoever asks checks them against the grammar. Keywords that are not known here are passed over, so a
proposal may be wrong or missing where they matter; it is never the last word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from luthier import json_reader
from luthier.infer.closing import Automaton, automaton

FEW = 6  # proposals that are kept of each part
DEEP = 40  # levels that a value may have
ANY: Mapping[str, Any] = {"enum": [0, None, "", [], {}]}
FORMATS = {
    "date": "2000-01-01", "time": "00:00:00Z", "date-time": "2000-01-01T00:00:00Z", "email": "a@b.co",
    "ipv4": "0.0.0.0", "ipv6": "::", "uuid": "00000000-0000-0000-0000-000000000000", "uri": "a:b", "hostname": "a",
}  # fmt: skip
NUMBER = re.compile(r"[-+0-9.eE]*")
SPACE = re.compile(r"[ \t\r\n]*")

Schema = Mapping[str, Any]


class Rests:
    """The completions of texts of one schema."""

    def __init__(self, schema: Any) -> None:
        self.schema: Any = json_reader.parse(schema) if isinstance(schema, str) else schema
        self._least: dict[int, str | None] = {}
        self._open: set[int] = set()
        self._patterns: dict[str, Automaton | None] = {}
        self._kept: list[Any] = []  # merged schemas, which are known by their ids

    def rests(self, text: str) -> list[str]:
        """What may follow ``text``, the shortest first."""
        found = self._value([self.schema], text, 0, 0)
        if isinstance(found, int):
            return [""]
        return _few(found)

    def largest(self) -> int:
        """Characters of the longest of the shortest values that any part of the schema asks for."""
        sizes = [0]
        waiting: list[Any] = [self.schema]
        while waiting:
            one = waiting.pop()
            if isinstance(one, dict):
                text = self.least(one)
                sizes.append(len(text) if text is not None else 0)
                waiting.extend(one.values())
                sizes.extend(len(name) + 3 for name in one.get("properties", {}) if isinstance(name, str))
            elif isinstance(one, list):
                waiting.extend(one)
        return max(sizes)

    # ------------------------------------------------------------------------------------------- whole values

    def least(self, schema: Any) -> str | None:
        """A shortest value; None where none is known."""
        if not isinstance(schema, dict):
            return None if schema is False else "0"
        if id(schema) in self._open:  # it holds itself: another way has to be shorter
            return None
        if id(schema) not in self._least:
            self._open.add(id(schema))
            found = [text for one in self._ways(schema) if (text := self._least_of(one)) is not None]
            self._open.discard(id(schema))
            if self._open and not found:
                return None  # unknown while something around it is open; asked again later
            self._least[id(schema)] = min(found, key=len, default=None)
        return self._least[id(schema)]

    def _least_of(self, schema: Schema) -> str | None:
        if "const" in schema or "enum" in schema:
            return min(_literals(schema), key=len, default=None)
        kind = schema.get("type") or _kind(schema)
        if kind == "object":
            rest = next(iter(self._members(schema, [], False)), None)
            return None if rest is None else "{" + rest
        if kind == "array":
            rest = next(iter(self._items(schema, 0, False)), None)
            return None if rest is None else "[" + rest
        if kind == "string":
            return min((f'"{text}' for text in self._string(schema, "")), key=len, default=None)
        if kind in ("integer", "number"):
            return min(_numbers(schema, ""), key=len, default=None)
        return {"boolean": "true", "null": "null", None: "0"}.get(kind)

    def _ways(self, schema: Any) -> list[Schema]:
        """The schema without references and alternatives: one for each way to satisfy it."""
        out: list[Schema] = []
        waiting = [(schema, 0)]
        while waiting:
            one, depth = waiting.pop()
            if not isinstance(one, dict) or depth > DEEP:
                if one is not False:
                    out.append(ANY)
                continue
            ways = self._alternatives(one)
            if ways is None:
                out.append(one)
            else:
                waiting.extend((way, depth + 1) for way in ways)
        return out

    def _alternatives(self, schema: dict[str, Any]) -> list[Any] | None:
        for word in ("$ref", "anyOf", "oneOf", "allOf"):
            if word not in schema:
                continue
            rest = {name: value for name, value in schema.items() if name not in (word, "$defs", "definitions")}
            if word == "$ref":
                return [self._merged(rest, self._target(schema[word]))]
            if word == "allOf":
                made: Any = rest
                for one in schema[word]:
                    made = self._merged(made, one)
                return [made]
            return [self._merged(rest, one) for one in schema[word]]
        kinds = schema.get("type")
        if isinstance(kinds, list):
            return [self._merged(schema, {"type": kind}) for kind in kinds]
        return None

    def _merged(self, first: Any, second: Any) -> Any:
        if not first or not isinstance(second, dict):
            return second
        made = {**first, **second}
        for word in ("properties", "required"):
            if word in first and word in second:
                joined = {**first[word], **second[word]} if word == "properties" else [*first[word], *second[word]]
                made[word] = joined
        self._kept.append(made)
        return made

    def _target(self, reference: Any) -> Any:
        at: Any = self.schema
        for part in str(reference).removeprefix("#").strip("/").split("/"):
            if part:
                at = at.get(part.replace("~1", "/").replace("~0", "~"), {}) if isinstance(at, dict) else {}
        return at

    # ------------------------------------------------------------------------------------------- begun values

    def _value(self, schemas: Sequence[Any], text: str, at: int, depth: int) -> int | list[str]:
        """Where a value that begins at ``at`` ends in the text; of one that does not, what completes it."""
        at = _space(text, at)
        if at >= len(text):
            return [found for one in schemas if (found := self.least(one)) is not None]
        ways = [way for one in schemas for way in self._ways(one)] if depth < DEEP else []
        literals = [literal[len(text) - at :] for way in ways for literal in _literals(way)
                    if literal.startswith(text[at:])]  # fmt: skip
        free = [way for way in ways if "const" not in way and "enum" not in way]
        known = self._begun(free, text, at, depth)
        return known if isinstance(known, int) else _few([*literals, *known])

    def _begun(self, ways: Sequence[Schema], text: str, at: int, depth: int) -> int | list[str]:
        if text[at] == "{":
            objects = [way for way in ways if (way.get("type") or _kind(way)) == "object"]
            return self._object(objects, text, at + 1, depth)
        if text[at] == "[":
            lists = [way for way in ways if (way.get("type") or _kind(way)) == "array"]
            return self._array(lists, text, at + 1, depth)
        if text[at] == '"':
            return self._begun_string(ways, text, at + 1)
        number = NUMBER.match(text, at)
        if number is not None and number.end() > at:
            return number.end() if number.end() < len(text) else [n for way in ways for n in _numbers(way, text[at:])]
        word = next((word for word in ("true", "false", "null") if word[0] == text[at]), "")
        left = word[len(text) - at :]
        return [left] if left else at + max(len(word), 1)

    def _object(self, ways: Sequence[Schema], text: str, at: int, depth: int) -> int | list[str]:
        names: list[str] = []
        comma = False
        while True:
            at = _space(text, at)
            if at >= len(text):
                return [rest for way in ways for rest in self._members(way, names, comma)]
            if text[at] == "}":
                return at + 1
            if text[at] == ",":
                comma, at = True, at + 1
                continue
            end = _string_end(text, at + 1)
            if end is None:
                return [rest for way in ways for rest in self._begun_name(way, names, text[at:])]
            name = _decoded(text[at:end])
            names, comma = [*names, name], False
            at = _space(text, end)
            values = [way.get("properties", {}).get(name, way.get("additionalProperties", True)) for way in ways]
            if at >= len(text):
                pairs = zip(ways, map(self.least, values), strict=True)
                known = ((way, least) for way, least in pairs if least is not None)
                return [f":{least}{rest}" for way, least in known for rest in self._members(way, names, False)]
            out: list[str] = []
            ends: int | None = None
            for way, value in zip(ways, values, strict=True):
                found = self._value([value], text, at + 1, depth + 1)
                if isinstance(found, int):
                    ends = found
                else:
                    out += [own + rest for own in found for rest in self._members(way, names, False)]
            if ends is None:
                return _few(out)
            at = ends

    def _members(self, way: Schema, names: Sequence[str], comma: bool) -> Iterator[str]:
        """What ends an object that has these members; ``comma``: one more has been announced."""
        properties: Mapping[str, Any] = way.get("properties", {})
        wanted = [name for name in properties if name in way.get("required", ())]
        wanted += [name for name in way.get("required", ()) if name not in properties]
        missing = [name for name in dict.fromkeys(wanted) if name not in names]
        if comma and not missing:
            after = max((list(properties).index(name) for name in names if name in properties), default=-1)
            later = [name for name in list(properties)[after + 1 :] if name not in names]
            made = [member for name in later if (member := self._member(name, properties[name])) is not None]
            extra = way.get("additionalProperties", True)
            if extra is not False and (least := self.least(extra)) is not None:
                made.append(f'"x{len(names)}":{least}')
            yield from (f"{member}}}" for member in _few(made))
            return
        members = [self._member(name, properties.get(name, way.get("additionalProperties", True))) for name in missing]
        if any(member is None for member in members):
            return
        body = ",".join(member for member in members if member is not None)
        yield ("," if names and body and not comma else "") + body + "}"

    def _member(self, name: str, schema: Any) -> str | None:
        least = self.least(schema)
        return None if least is None else f"{json.dumps(name, ensure_ascii=False)}:{least}"

    def _begun_name(self, way: Schema, names: Sequence[str], begun: str) -> Iterator[str]:
        """What ends an object in which a name has been begun."""
        properties: Mapping[str, Any] = way.get("properties", {})
        for name, schema in properties.items():
            spelled = json.dumps(name, ensure_ascii=False)
            least = self.least(schema)
            if name not in names and spelled.startswith(begun) and least is not None:
                for rest in self._members(way, [*names, name], False):
                    yield f"{spelled[len(begun) :]}:{least}{rest}"
        extra = way.get("additionalProperties", True)
        least = self.least(extra)
        if extra is not False and least is not None:
            for rest in self._members(way, [*names, begun], False):
                yield f'{_escape_rest(begun)}":{least}{rest}'
                yield f'{_escape_rest(begun)}0":{least}{rest}'  # the name alone may be one that stands for another

    def _array(self, ways: Sequence[Schema], text: str, at: int, depth: int) -> int | list[str]:
        count, comma = 0, False
        while True:
            at = _space(text, at)
            if at >= len(text):
                return [rest for way in ways for rest in self._items(way, count, comma)]
            if text[at] == "]":
                return at + 1
            if text[at] == ",":
                comma, at = True, at + 1
                continue
            out: list[str] = []
            ends: int | None = None
            for way in ways:
                found = self._value([_item(way, count)], text, at, depth + 1)
                if isinstance(found, int):
                    ends = found
                else:
                    out += [own + rest for own in found for rest in self._items(way, count + 1, False)]
            if ends is None:
                return _few(out)
            count, comma, at = count + 1, False, ends

    def _items(self, way: Schema, count: int, comma: bool) -> Iterator[str]:
        """What ends a list of so many items; ``comma``: one more has been announced."""
        wanted = max(int(way.get("minItems", 0)), count + comma)
        items = [self.least(_item(way, number)) for number in range(count, wanted)]
        if not any(item is None for item in items):
            body = ",".join(item for item in items if item is not None)
            yield ("," if count and body and not comma else "") + body + "]"

    def _begun_string(self, ways: Sequence[Schema], text: str, at: int) -> int | list[str]:
        end = _string_end(text, at)
        return end if end is not None else [rest for way in ways for rest in self._string(way, text[at:])]

    def _string(self, way: Schema, begun: str) -> Iterator[str]:
        """What ends a string of which ``begun`` stands there, quotes left out; that of an escape first."""
        if way.get("type", "string") != "string":
            return
        escape = _escape_rest(begun)
        content = _decoded(f'"{begun}{escape}"')
        if "pattern" in way:
            made = self._pattern(str(way["pattern"]))
            rest = None if made is None else made.rest(made.read(made.start, content))
            if rest is not None:
                yield escape + json.dumps(rest, ensure_ascii=False)[1:]
            return
        known = FORMATS.get(str(way.get("format")))
        if known is not None and known.startswith(content):
            yield f'{escape}{known[len(content) :]}"'
        yield escape + "a" * max(0, int(way.get("minLength", 0)) - len(content)) + '"'

    def _pattern(self, pattern: str) -> Automaton | None:
        """The automaton of what may stand in a string: without anchors anything may stand around it."""
        if pattern not in self._patterns:
            before, after = "" if pattern.startswith("^") else "(.|\n)*", "" if pattern.endswith("$") else "(.|\n)*"
            self._patterns[pattern] = automaton(f"{before}(?:{pattern.removeprefix('^').removesuffix('$')}){after}")
        return self._patterns[pattern]


def _few(found: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(found), key=len)[:FEW]


def _space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found is not None else at


def _kind(schema: Schema) -> str | None:
    """The type of a schema that names none, by its other words."""
    words = {"properties": "object", "required": "object", "items": "array", "prefixItems": "array",
             "minItems": "array", "pattern": "string", "minLength": "string", "format": "string",
             "minimum": "number", "maximum": "number"}  # fmt: skip
    return next((kind for word, kind in words.items() if word in schema), None)


def _literals(schema: Schema) -> list[str]:
    values = [schema["const"]] if "const" in schema else schema.get("enum", ())
    return [json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values]


def _item(way: Schema, number: int) -> Any:
    first = way.get("prefixItems", ())
    return first[number] if number < len(first) else way.get("items", True)


def _string_end(text: str, at: int) -> int | None:
    """The place after the quote that ends a string; None where it goes on."""
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if text[at] == '"':
            return at + 1
        at += 1
    return None


def _escape_rest(begun: str) -> str:
    """What completes an escape that the text ends in."""
    found = re.search(r"(?:^|[^\\])(?:\\\\)*\\(u[0-9a-fA-F]{0,3})?$", begun)
    if found is None:
        return ""
    return "n" if found[1] is None else "0" * (5 - len(found[1]))


def _decoded(text: str) -> str:
    try:
        return str(json_reader.parse(text, strict=False))
    except ValueError:
        return text[1:-1]


def _numbers(way: Schema, begun: str) -> list[str]:
    """What completes a number; the number may be complete already."""
    if way.get("type", "number") not in ("integer", "number"):
        return []
    if re.search(r"[.eE+]", begun):
        return ["", "0", "5"]
    low, high = way.get("minimum", way.get("exclusiveMinimum")), way.get("maximum", way.get("exclusiveMaximum"))
    if low is None and high is None:
        return ["0"] if begun in ("", "-") else ["", ".0"]
    least = int(low if low is not None else min(-9, high - 10))
    most = int(high if high is not None else max(9, low + 10))
    strict = ("exclusiveMinimum" in way) + 0
    values = {0, 1, -1, 9, -9, 10, 99, least + strict, least + 1, most, most - 1, (least + most) // 2}
    values |= {10**k for k in range(1, 12)} | {-(10**k) for k in range(1, 12)}
    digits = begun.lstrip("-")
    if digits:
        sign = -1 if begun.startswith("-") else 1
        for k in range(12):
            first, last = sorted((sign * int(digits + "0" * k), sign * int(digits + "9" * k)))
            values |= {max(first, least), min(last, most)}
    allowed = sorted((str(v) for v in values if least <= v <= most), key=len)
    return [text[len(begun) :] for text in allowed if text.startswith(begun)][:FEW]
