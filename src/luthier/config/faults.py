"""From pydantic's errors to faults in the user's terms: position, what was received, what is allowed, the fix."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from itertools import islice
from typing import Any

from pydantic import ValidationError

from luthier.config.adapter import KINDS as ADAPTERS
from luthier.config.defaults import sections_of
from luthier.config.describe import allowed_values
from luthier.config.section import Conflict, Section
from luthier.errors import Fault
from luthier.registry import nearest

MOST = 1000  # wrong values that are told one by one; nobody reads more, and each takes a tenth of a millisecond

Path = tuple[str | int, ...]
Position = tuple[int, int]


class Places:
    """Where keys stand: a file with positions, or just a name (``config`` for a dict, ``--set`` for overrides)."""

    def __init__(self, name: str, positions: Mapping[Path, Position] | None = None) -> None:
        self.name = name
        self.positions = dict(positions or {})
        self.overridden: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        """``config.yaml:12:3 trainer.learning_rat``; the nearest enclosing key where the path itself does not stand."""
        dotted = ".".join(map(str, path))
        for length in range(len(path), 0, -1):
            head = path[:length]
            if head in self.overridden:
                return f"--set {self.overridden[head]}"
            if head in self.positions:
                line, column = self.positions[head]
                return f"{self.name}:{line}:{column} {dotted}"
        return f"{self.name} {dotted}".strip()


def from_validation(error: ValidationError, data: Any, places: Places, root: type[Section]) -> list[Fault]:
    """One fault for each key that is wrong; a union's several complaints about one value become one."""
    items: dict[Path, Any] = {}
    told: list[Any] = list(error.errors(include_url=False))
    for item in told:
        path = _clean(item["loc"], data, missing=item["type"] in ("missing", "union_tag_not_found"))
        if item["type"] == "missing" and isinstance(path[-1], int):  # the list is wrong, not an item that is not there
            path, item = path[:-1], {"type": "too_few", "input": item["input"]}
        items.setdefault(path, item)
    faults = {path: _fault(items[path], path, data, places, root) for path in islice(items, MOST)}
    outer = {path[:length] for path in faults for length in range(len(path))}  # a fault inside says more than they do
    found = [fault for path, fault in faults.items() if fault.code != "config-bad-value" or path not in outer]
    if len(items) > MOST:
        more, received = f"{len(items) - MOST:,} more are wrong", f"{len(items):,} wrong values"
        fix = "mend these first; is this file the config?"
        found.append(Fault("config-bad-value", more, places.name, received, "the keys and values of a config", fix))
    return found


def _clean(location: tuple[Any, ...], data: Any, missing: bool) -> Path:
    """The location without pydantic's union tags: only steps that exist in ``data``, and a missing last key."""
    path: list[str | int] = []
    node = data
    for index, step in enumerate(location):
        if (isinstance(node, dict) and step in node) or (
            isinstance(node, (list, tuple)) and isinstance(step, int) and step < len(node)
        ):
            node = node[step]
        elif not (missing and index == len(location) - 1):
            continue
        path.append(step)
    return tuple(path)


def _fault(item: Any, path: Path, data: Any, places: Places, root: type[Section]) -> Fault:
    kind, where, dotted = str(item["type"]), places.of(path), ".".join(map(str, path))
    if kind == "extra_forbidden":
        known = known_keys(path[:-1], data, root)
        likely = nearest(str(path[-1]), known) or _elsewhere(str(path[-1]), root)
        fix = f"did you mean `{likely}`?" if likely else "leave it out; `luthier schema` lists every key"
        return Fault("config-unknown-key", f"there is no key `{dotted}`", where, item["input"], known, fix)
    allowed = allowed_values(root, path, data)
    if kind == "missing":
        return Fault("config-bad-value", f"`{dotted}` has to be given", where, "nothing", allowed, f"add `{path[-1]}:`")
    if kind == "union_tag_invalid":
        received = item["input"].get("type") if isinstance(item["input"], dict) else item["input"]
        kinds = str(item["ctx"]["expected_tags"]).replace("'", "").split(", ")
        close = nearest(str(received), kinds)
        suggestion = f"did you mean `{close}`?" if close else "set `type:` to one of these"
        where = places.of((*path, "type"))
        message = f"there is no kind of {dotted} named {received!r}"
        return Fault("config-bad-value", message, where, received, kinds, suggestion)
    if kind == "union_tag_not_found":
        kinds = list(ADAPTERS)  # the only keys whose section is told by its type
        return Fault(
            "config-bad-value", f"`{dotted}` needs its type", where, "no type", kinds, f"add `type: {kinds[0]}`"
        )
    if kind == "value_error":
        error = item["ctx"]["error"]
        assert isinstance(error, Conflict), "a section's check says what is allowed and how to mend it"
        message = f"{dotted}: {error}" if dotted else str(error)
        return Fault("config-conflict", message, where, error.received, error.allowed, error.fix)
    return Fault(
        "config-bad-value",
        _wrong(item, dotted) if dotted else "the config is a mapping of keys",
        where,
        item["input"] if item["input"] is not None else "null",
        allowed or item.get("msg"),
        _count_advice(item, dotted) or _suggest_value(item["input"], allowed),
    )


def _wrong(item: Any, dotted: str) -> str:
    if item["type"] in ("too_few", "too_short", "too_long"):
        few = "many" if item["type"] == "too_long" else "few"
        return f"`{dotted}` has {len(item['input'])} values, which are too {few}"
    return f"`{dotted}` cannot have this value"


def _count_advice(item: Any, dotted: str) -> str | None:
    """How to mend a list that is too long or too short."""
    counts = item.get("ctx", {})
    if item["type"] == "too_long":
        return f"keep {counts['max_length']} of the {counts['actual_length']}"
    if item["type"] == "too_short":
        return f"give {counts['min_length']} of them, or leave `{dotted}` out"
    if item["type"] == "too_few":
        return f"give all of them, or leave `{dotted}` out"
    return None


def _suggest_value(value: Any, allowed: str | None) -> str | None:
    if isinstance(value, str) and allowed and allowed.startswith("one of "):
        choices = allowed.removeprefix("one of ").split(",")
        close = nearest(value, [word.strip().removeprefix("or ") for word in choices])
        return f"did you mean `{close}`?" if close else None
    return (
        "quote it: texts that look like numbers are numbers"
        if _is_number(value) and "text" in (allowed or "")
        else None
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def section_at(path: Path, data: Any, root: type[Section]) -> type[Section] | None:
    """The section class that the mapping at ``path`` belongs to."""
    current: type[Section] | None = root
    node: Any = data
    step: Any
    for step in path:
        node = node[step] if isinstance(node, (dict, list)) else None
        if isinstance(step, int) or current is None:
            continue
        field = current.model_fields.get(step)
        current = _choose(field.annotation, node) if field else None
    return current


def _choose(annotation: Any, node: Any) -> type[Section] | None:
    kinds = sections_of(annotation) or _item_sections(annotation)
    tag = node.get("type") if isinstance(node, dict) else None
    return next((k for k in kinds if "type" in k.model_fields and k.model_fields["type"].default == tag), None) or (
        kinds[0] if kinds else None
    )


def _item_sections(annotation: Any) -> list[type[Section]]:
    """The section classes inside a list- or mapping-valued key."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _item_sections(argument)]


def known_keys(path: Path, data: Any, root: type[Section]) -> list[str]:
    """The keys that may stand in the mapping at ``path``."""
    section = section_at(path, data, root)
    return sorted(section.model_fields) if section else []


@functools.cache
def _all_keys(root: type[Section], prefix: str = "") -> dict[str, str]:
    """Every key's own name and the dotted path it has, sections first met first."""
    out: dict[str, str] = {}
    for name, field in root.model_fields.items():
        out.setdefault(name, prefix + name)
        for kind in sections_of(field.annotation)[:1]:
            for inner, dotted in _all_keys(kind, f"{prefix}{name}.").items():
                out.setdefault(inner, dotted)
    return out


def _elsewhere(name: str, root: type[Section]) -> str | None:
    """The path of a key of this very name in another section."""
    return _all_keys(root).get(name)
