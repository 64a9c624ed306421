"""YAML 1.2 to plain Python values with the position of every key, bounded against hostile input.

The parser's events are turned into values here, with an explicit stack, so that nothing recurses, tags construct
nothing, a duplicate key is seen, and aliases cannot make a small file large. Scalars follow YAML 1.2's core schema:
``1e-4`` is a number, ``yes`` and ``007a`` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from luthier.errors import ConfigError, Fault

MAX_BYTES = 200_000  # these two are read in half a second, whatever stands in them
MAX_NODES = 10_000
MAX_DEPTH = 40
MAX_DIGITS = 400

Path = tuple[str | int, ...]
Position = tuple[int, int]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(slots=True)
class Document:
    """The values of a file, where each key stands (line and column from 1), and keys that stand twice."""

    data: Any
    positions: dict[Path, Position]
    duplicates: list[tuple[Path, Position]] = field(default_factory=list)


@dataclass(slots=True)
class _Node:
    """A value before it is handed out: a scalar, or a list of (key, key position, node)."""

    kind: str
    position: Position
    scalar: Any = None
    items: list[tuple[str | int, Position, _Node]] = field(default_factory=list)
    pending: tuple[str, Position] | None = None
    size: int = 1
    depth: int = 1
    closed: bool = False


def decode(raw: bytes, name: str) -> str:
    """The text of a config file: UTF-8, or UTF-16 with its byte-order mark. Raises ConfigError."""
    if len(raw) > MAX_BYTES:
        raise ConfigError(
            "config-unreadable",
            "the config is too large",
            where=name,
            received=f"{len(raw):,} bytes",
            allowed=f"at most {MAX_BYTES:,} bytes",
            fix="is it the data? give that with --dataset",
        )
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            "config-unreadable",
            f"the config is not valid {encoding.removesuffix('-sig').upper()}",
            where=f"{name}:{line}",
            received=raw[error.start : error.start + 4],
            allowed="UTF-8 text",
            fix="save the file as UTF-8",
        ) from None


def scalar(text: str) -> Any:
    """A plain (unquoted) scalar by YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base) if base == 10 else int(text[2:], base)
    return float(text) if _FLOAT.fullmatch(text) else text


def read(text: str, name: str) -> Document:
    """Parse one YAML document. Raises ConfigError (config-unreadable) with the position of what is wrong."""
    if len(text) > MAX_BYTES:
        raise ConfigError(
            "config-unreadable",
            "the config is too large",
            where=name,
            received=f"{len(text):,} characters",
            allowed=f"at most {MAX_BYTES:,}",
            fix="is it the data? give that with --dataset",
        )
    builder = _Builder(name)
    for event in _events(text, name):
        builder.take(event)
    document = Document(None, {})
    if builder.root is not None:
        document.data = _plain(builder.root, (), document)
    return document


def _events(text: str, name: str) -> Iterator[Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        yield from YAML(typ="safe", pure=True).parse(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = " ".join(part for part in (error.context, error.problem) if part)
        fix = "indent with spaces" if "\\t" in repr(error.problem) else "close what is open, quote what is text"
        raise _invalid(said, where, text.splitlines()[mark.line : mark.line + 1] if mark else [], fix) from None
    except (YAMLError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _invalid(said, name, [], "take out what is no text; save the file as UTF-8") from None


def _invalid(said: str, where: str, line: list[str], fix: str) -> ConfigError:
    """The error for a text that is not YAML; ``line`` holds the one where that showed, if there is one."""
    return ConfigError(
        "config-unreadable",
        f"the config is not valid YAML: {said}",
        where=where,
        received=(line[0].strip() if line else "") or "the end of the text",
        allowed="YAML 1.2",
        fix=fix,
    )


class _Builder:
    """Turns parser events into a tree of nodes; every bound is checked as events arrive."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.root: _Node | None = None
        self.documents = 0
        self.nodes = 0
        self.stack: list[_Node] = []
        self.anchors: dict[str, _Node] = {}

    def take(self, event: Any) -> None:
        """Handle one event; stream and document ends carry nothing."""
        kind = type(event).__name__
        handler = {
            "DocumentStartEvent": self._document,
            "ScalarEvent": self._scalar,
            "AliasEvent": self._alias,
            "MappingStartEvent": self._open,
            "SequenceStartEvent": self._open,
            "MappingEndEvent": self._close,
            "SequenceEndEvent": self._close,
        }.get(kind)
        if handler:
            handler(event)

    def _fail(self, message: str, event: Any, received: str, allowed: str, fix: str) -> NoReturn:
        line, column = _position(event)
        where = f"{self.name}:{line}:{column}"
        raise ConfigError("config-unreadable", message, where=where, received=received, allowed=allowed, fix=fix)

    def _too_deep(self, event: Any) -> NoReturn:
        most = f"at most {MAX_DEPTH} levels"
        self._fail(
            "the config is nested too deeply", event, f"more than {MAX_DEPTH} levels", most, "close brackets earlier"
        )

    def _document(self, event: Any) -> None:
        self.documents += 1
        if self.documents > 1:
            message, fix = "the config holds more than one YAML document", "leave out what follows `---`"
            self._fail(message, event, "a second document", "one document", fix)

    def _scalar(self, event: Any) -> None:
        plain = event.style is None or event.style == ""
        tag = str(event.tag) if event.tag is not None else None
        if tag not in (None, "!", "tag:yaml.org,2002:str"):
            self._fail(f"the tag {tag} is not allowed", event, tag, "plain values", "leave the tag out")
        parent = self.stack[-1] if self.stack else None
        if parent is not None and parent.kind == "map" and parent.pending is None:
            if event.value == "<<" and plain:
                self._fail("merge keys (<<) are not part of YAML 1.2", event, "<<", "plain keys", "write the keys out")
            parent.pending = (event.value, _position(event))
            self._count(event, 1)
            return
        value = scalar(event.value) if plain and tag is None else event.value
        self._add(_Node("scalar", _position(event), value, closed=True), event)

    def _alias(self, event: Any) -> None:
        anchor = str(event.anchor)
        node = self.anchors.get(anchor)
        if node is None:
            fix = "write the anchor before it, or the value itself; put text with a * in quotes"
            known = ", ".join(f"*{name}" for name in self.anchors) or "no alias: there is no anchor before it"
            self._fail(f"the alias *{anchor} has no anchor before it", event, f"*{anchor}", known, fix)
        if not node.closed:
            message, allowed = f"the alias *{anchor} stands inside its own anchor", "aliases after what they stand for"
            self._fail(message, event, f"*{anchor}", allowed, "write the value itself")
        if self.stack and self.stack[-1].kind == "map" and self.stack[-1].pending is None:
            self._fail("an alias cannot be a key", event, f"*{anchor}", "plain text", "write the key itself")
        self._add(node, event)

    def _open(self, event: Any) -> None:
        is_map = type(event).__name__ == "MappingStartEvent"
        tag = str(event.tag) if event.tag is not None else None
        if tag is not None and tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!"):
            self._fail(f"the tag {tag} is not allowed", event, tag, "plain values", "leave the tag out")
        if self.stack and self.stack[-1].kind == "map" and self.stack[-1].pending is None:
            received = "a mapping in braces" if is_map else "a list in brackets"
            fix = "write {column} in quotes where it is a text"
            self._fail("a key has to be plain text", event, received, "plain text", fix)
        if len(self.stack) >= MAX_DEPTH:
            self._too_deep(event)
        node = _Node("map" if is_map else "list", _position(event))
        if event.anchor is not None:
            self.anchors[str(event.anchor)] = node
        self.stack.append(node)

    def _close(self, event: Any) -> None:
        node = self.stack.pop()
        node.closed = True
        self._add(node, event, anchored=True)

    def _count(self, event: Any, size: int) -> None:
        self.nodes += size
        if self.nodes > MAX_NODES:
            message, fix = (
                "the config holds too many values (aliases counted in full)",
                "write fewer aliases of aliases",
            )
            self._fail(message, event, f"more than {MAX_NODES:,}", f"at most {MAX_NODES:,}", fix)

    def _add(self, node: _Node, event: Any, anchored: bool = False) -> None:
        is_alias = type(event).__name__ == "AliasEvent"
        self._count(event, node.size if is_alias else 1)
        if not is_alias and not anchored and event.anchor is not None:
            self.anchors[str(event.anchor)] = node
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        parent.size += node.size
        parent.depth = max(parent.depth, node.depth + 1)
        if parent.depth + len(self.stack) > MAX_DEPTH + 2:
            self._too_deep(event)
        if parent.kind == "map":
            assert parent.pending is not None
            name, position = parent.pending
            parent.items.append((name, position, node))
            parent.pending = None
        else:
            parent.items.append((len(parent.items), node.position, node))


def _position(event: Any) -> Position:
    return event.start_mark.line + 1, event.start_mark.column + 1


def _plain(node: _Node, path: Path, document: Document) -> Any:
    """The node as plain values; its depth is bounded by the builder."""
    if node.kind == "scalar":
        return node.scalar
    out: dict[str | int, Any] = {}
    for name, position, child in node.items:
        here = (*path, name)
        if name in out:
            document.duplicates.append((here, position))
            continue
        document.positions[here] = position
        out[name] = _plain(child, here, document)
    return list(out.values()) if node.kind == "list" else out


def duplicate_faults(document: Document, name: str) -> list[Fault]:
    """One fault for each key that stands twice, naming where it stood first."""
    return [
        Fault(
            "config-duplicate-key",
            f"the key `{path[-1]}` stands twice",
            f"{name}:{line}:{column} {'.'.join(map(str, path))}",
            f"`{path[-1]}` in the lines {document.positions[path][0]} and {line}",
            "each key once in a mapping",
            f"keep one; the first is in line {document.positions[path][0]}",
        )
        for path, (line, column) in document.duplicates
    ]
