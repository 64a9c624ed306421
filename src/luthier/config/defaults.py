"""Defaults from the schema: Ludwig's for every absent key, and the list of what was filled in."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from luthier.config.section import Section

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Filled:
    """A value that was filled in where the user was silent. ``ludwig`` is Ludwig's default of that key."""

    key: str
    value: Any
    ludwig: Any
    why: str


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What `key` noted of a field: ``ludwig``, ``ludwig_note``, ``why``."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def sections_of(annotation: Any) -> list[type[Section]]:
    """The section classes that a key may hold directly (not in a list), in their declared order."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) else []
    if typing.get_origin(annotation) in (tuple, dict, list):
        return []
    return [found for argument in typing.get_args(annotation) for found in sections_of(argument)]


def fill_ludwig(section: type[Section], data: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``data`` in which every absent key of ``section`` that differs in Ludwig has Ludwig's default."""
    out = dict(data)
    for name, field in section.model_fields.items():
        extra = extra_of(field)
        if name not in out and "ludwig" in extra:
            out[name] = extra["ludwig"]
            continue
        kinds = sections_of(field.annotation)
        value = out.get(name, {})
        optional = name not in out and field.default is None
        if not kinds or optional or not isinstance(value, dict):
            continue
        kind = next((k for k in kinds if "type" in value and k.model_fields["type"].default == value["type"]), kinds[0])
        out[name] = fill_ludwig(kind, value)
    if data.get("temperature") in (0, "0") and "do_sample" not in data:
        out["do_sample"] = False  # the user said greedy
    return out


def filled(config: Section, given: frozenset[Path], prefix: Path = ()) -> tuple[Filled, ...]:
    """Every key with a default of its own (other than Ludwig's) that is not among the ``given`` paths."""
    out: list[Filled] = []
    for name, field in type(config).model_fields.items():
        path, value, extra = (*prefix, name), getattr(config, name), extra_of(field)
        if path not in given and ("ludwig" in extra or "ludwig_note" in extra):
            shown = getattr(value, "type", value) if isinstance(value, Section) else value
            there = extra.get("ludwig_note", extra.get("ludwig"))
            out.append(Filled(".".join(map(str, path)), shown, there, extra.get("why", "")))
        if isinstance(value, Section):
            out += filled(value, given, path)
    return tuple(out)
