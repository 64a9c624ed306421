"""The schema in words and as JSON Schema: allowed values of a key, the reference page, `json_schema`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from luthier.config.section import Section

Path = tuple[str | int, ...]
_LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "over",
    "maximum": "at most",
    "exclusiveMaximum": "under",
}
# pydantic's words for the same, which it leaves standing in the options of a union
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_TYPES = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false", "null": "null"}


@functools.cache
def _schema(root: type[Section]) -> dict[str, Any]:
    schema = root.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    _name_bounds(schema)
    return schema


def _name_bounds(node: Any) -> None:
    """Bounds by JSON Schema's keywords, in place."""
    if isinstance(node, dict):
        for name in [name for name in _BOUNDS if isinstance(node.get(name), (int, float))]:
            node[_BOUNDS[name]] = node.pop(name)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _name_bounds(child)


def schema_of(root: type[Section]) -> dict[str, Any]:
    """A fresh copy of the JSON Schema."""
    copied: dict[str, Any] = json.loads(json.dumps(_schema(root)))
    return copied


def _resolve(node: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return {**defs[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
    return node


def words(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """What a schema node allows, in words: ``an integer, at least 1, or auto``."""
    node = _resolve(node, defs)
    for union in ("anyOf", "oneOf"):
        if union in node:
            options = list(dict.fromkeys(words(option, defs) for option in node[union]))
            return (", or " if any("," in option for option in options[:-1]) else " or ").join(options)
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(map(str, node["enum"]))
    kind = node.get("type", "")
    if kind == "array":
        if "prefixItems" in node:
            return f"a list of {len(node['prefixItems'])}: " + ", ".join(words(n, defs) for n in node["prefixItems"])
        least, most = node.get("minItems", 0), node.get("maxItems")
        count = f"exactly {least}: " if least == most else f"at least {least}: " if least else ""
        return f"a list of {count}{words(node.get('items', {}), defs)}"
    if kind == "object":
        return f"a mapping ({node['title']})" if "properties" in node else "a mapping"
    if "pattern" in node and "examples" in node:
        return f"text like {node['examples'][0]}"
    limits = [f"{said} {node[limit]:g}" for limit, said in _LIMITS.items() if limit in node]
    if node.get("minLength"):
        limits.append("not empty")
    return ", ".join([_TYPES.get(kind, "any value"), *limits])


def allowed_values(root: type[Section], path: Path, data: Any) -> str | None:
    """What the key at ``path`` may hold, in words; None where the path is not in the schema."""
    schema = _schema(root)
    defs = schema.get("$defs", {})
    node: dict[str, Any] | None = schema
    value = data
    for step in path:
        node = _step(node, step, value, defs) if node is not None else None
        value = value.get(step) if isinstance(value, dict) else None
    return words(node, defs) if node is not None else None


def _step(node: dict[str, Any], step: str | int, value: Any, defs: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of one key or item of ``node``; among variants the one whose type `value` names."""
    options = list(_variants(node, defs))
    tag = value.get("type") if isinstance(value, dict) else None
    options.sort(key=lambda option: option.get("properties", {}).get("type", {}).get("const") != tag)
    for option in options:
        if isinstance(step, int):
            if "prefixItems" in option and step < len(option["prefixItems"]):
                return dict(option["prefixItems"][step])
            if "items" in option:
                return dict(option["items"])
        elif step in option.get("properties", {}):
            return dict(option["properties"][step])
        elif isinstance(option.get("additionalProperties"), dict):
            return dict(option["additionalProperties"])
    return None


def _variants(node: dict[str, Any], defs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    node = _resolve(node, defs)
    union = node.get("anyOf") or node.get("oneOf")
    if union:
        for option in union:
            yield from _variants(option, defs)
    else:
        yield node


def markdown(root: type[Section]) -> str:
    """The reference page: one table a section, every key with type, default, Ludwig's default and description."""
    schema = _schema(root)
    out = [
        "# Config reference",
        "",
        "Generated from the schema; do not edit. A key that is not listed is an error. "
        "*Ludwig* shows Ludwig's default where it differs; `defaults: ludwig` takes it for every key left out. "
        "*Source* says who recommends or measured the default of a key that decides what is learned.",
        "",
    ]
    out += _section_lines("Top level", schema, schema["$defs"])
    for name, property_ in schema["properties"].items():
        out += _nested(name, property_, schema["$defs"])
    return "\n".join(out).rstrip() + "\n"


def _nested(path: str, node: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    out: list[str] = []
    for variant in _variants(node, defs):
        if variant.get("type") == "array" and "items" in variant:
            out += _nested(f"{path}[]", variant["items"], defs)
            continue
        if isinstance(variant.get("additionalProperties"), dict):
            out += _nested(f"{path}.<name>", variant["additionalProperties"], defs)
            continue
        if "properties" not in variant:
            continue
        kind = variant["properties"].get("type", {}).get("const") if "oneOf" in json.dumps(node) else None
        out += _section_lines(f"{path} (type: {kind})" if kind else path, variant, defs)
        if kind in (None, "lora"):  # what the variants share is told once
            for name, property_ in variant["properties"].items():
                out += _nested(f"{path}.{name}", property_, defs)
    return out


def _section_lines(title: str, section: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    about = " ".join(section.get("description", "").split())
    head = ["| Key | Allowed | Default | Ludwig | What it does |", "|---|---|---|---|---|"]
    required = section.get("required", [])
    rows = [_row(name, node, name in required, defs) for name, node in section["properties"].items()]
    return [f"## {title}", "", about, "", *head, *rows, ""]


def _row(name: str, node: dict[str, Any], required: bool, defs: dict[str, Any]) -> str:
    ludwig = f"`{json.dumps(node['ludwig'])}`" if "ludwig" in node else node.get("ludwig_note", "")
    default = "required" if required else f"`{json.dumps(node['default'])}`" if "default" in node else "see below"
    about = node.get("description", "") + "".join(
        f" {word.capitalize()}: {node[word]}." for word in ("why", "source") if node.get(word)
    )
    return "| " + " | ".join(_cell(c) for c in (f"`{name}`", words(node, defs), default, ludwig, about)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
