"""Every numeric key of the schema: it may come as text, and its bounds are told wherever they are looked for."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import annotated_types
import pytest
from pydantic.fields import FieldInfo

from luthier.config import Config, json_schema, load, reference_markdown
from luthier.config.section import Section
from luthier.errors import ConfigError

SAID = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}
KEYWORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
SCHEMA, PAGE = json_schema(), reference_markdown()


class Key(NamedTuple):
    """A key and the sections that lead to it, each with the step to it and whether it is an item of a list."""

    section: type[Section]
    name: str
    way: tuple[tuple[str, type[Section], bool], ...]

    @property
    def field(self) -> FieldInfo:
        return self.section.model_fields[self.name]

    @property
    def node(self) -> dict[str, Any]:
        holder = SCHEMA if self.section is Config else SCHEMA["$defs"][self.section.__name__]
        return holder["properties"][self.name]

    def given(self, value: Any) -> dict[str, Any]:
        """A config that gives this key and what else has to be there."""
        data: Any = {self.name: value}
        for name, section, listed in reversed(self.way):
            nodes = SCHEMA["$defs"][section.__name__]
            for needed in set(nodes.get("required", ())) - set(data):
                data[needed] = nodes["properties"][needed].get("enum", ["x"])[0]
            tag = section.model_fields.get("type")
            if tag is not None and isinstance(tag.default, str):
                data.setdefault("type", tag.default)
            data = {name: [data] if listed else data}
        return {"base_model": "x"} | data

    def read(self, value: Any) -> Any:
        """What the config holds at this key; what it says, where the key wants company that is not there."""
        try:
            found: Any = load(self.given(value))
        except ConfigError as error:
            assert {fault.code for fault in error.faults} == {"config-conflict"}, error
            return [fault.message for fault in error.faults]
        for name, _, listed in self.way:
            found = getattr(found, name)[0] if listed else getattr(found, name)
        return getattr(found, self.name)


def sections(annotation: Any, listed: bool = False) -> Iterator[tuple[type[Section], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, listed
    for argument in typing.get_args(annotation):
        yield from sections(argument, listed or typing.get_origin(annotation) in (tuple, list))


def keys(section: type[Section] = Config, way: tuple[Any, ...] = ()) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        yield Key(section, name, way)
        for inner, listed in sections(field.annotation):
            yield from keys(inner, (*way, (name, inner, listed)))


def named(key: Key) -> str:
    return ".".join([*(f"{name}[{section.__name__}]" for name, section, _ in key.way), key.name])


def sample(node: dict[str, Any]) -> Any:
    """A value of a numeric key, None for another key and for one where a text is a value of its own."""
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in node:
        if any(option.get("type") == "string" and not {"const", "enum"} & set(option) for option in node["anyOf"]):
            return None
        return next((found for option in node["anyOf"] if (found := sample(option)) is not None), None)
    if "enum" in node:
        return next((one for one in node["enum"] if isinstance(one, int)), None)
    kind = node.get("type")
    if kind in ("integer", "number"):
        low = node.get("minimum", node.get("exclusiveMinimum", 0))
        high = node.get("maximum", node.get("exclusiveMaximum", low + 4))
        return (low + high) / 2 if kind == "number" else (low + high + 1) // 2
    if kind == "array":
        items = node.get("prefixItems") or [node["items"]]
        found = [1 / len(items) if item == {"type": "number"} else sample(item) for item in items]  # shares sum to 1
        return None if None in found else found
    if kind == "object" and isinstance(node.get("additionalProperties"), dict):
        found = sample(node["additionalProperties"])
        return None if found is None else {"5": found}
    return None


def as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [as_text(one) for one in value]
    if isinstance(value, dict):
        return {name: as_text(one) for name, one in value.items()}
    return str(value)


def bounds(annotation: Any, metadata: typing.Iterable[Any] = ()) -> Iterator[tuple[str, float]]:
    """What pydantic holds a key to: (``ge``, 8), of the key itself, of an option of its union or of a list's items."""
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from bounds(None, one.metadata)
        elif isinstance(one, (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)):
            name = type(one).__name__.lower()
            yield name, getattr(one, name)
    if typing.get_origin(annotation) is typing.Annotated:
        yield from bounds(annotation.__origin__, annotation.__metadata__)
        return
    for argument in typing.get_args(annotation):
        yield from bounds(argument)


def options(node: dict[str, Any], lists: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """A key's node, the options of its union and the items of its lists, each with the lists that it is in."""
    yield node, lists
    for option in node.get("anyOf", ()):
        yield from options(option, lists)
    if "items" in node:
        yield from options(node["items"], lists + 1)


KEYS = list(keys())
NUMERIC = [key for key in KEYS if sample(key.node) is not None]
BOUNDED = [(key, *bound) for key in KEYS for bound in bounds(key.field.annotation, key.field.metadata)]


def test_the_keys_are_found():
    numeric, bounded = {named(key) for key in NUMERIC}, {(named(key), *bound) for key, *bound in BOUNDED}
    assert {"random_seed", "quantization[Quantization].bits", "generation[Generation].logit_bias"} <= numeric
    assert {"trainer[Trainer].batch_size", "trainer[Trainer].optimizer[Optimizer].betas"} <= numeric
    assert ("preprocessing[Preprocessing].max_sequence_length", "ge", 8) in bounded
    assert ("trainer[Trainer].eval_batch_size", "ge", 1) in bounded
    assert len(numeric) > 100 and len(bounded) > 120


@pytest.mark.parametrize("key", NUMERIC, ids=named)
def test_numbers_may_be_text_in_a_dict(key: Key):
    value = sample(key.node)
    read = key.read(value)
    assert key.read(as_text(value)) == read and repr(key.read(as_text(value))) == repr(read)


@pytest.mark.parametrize(("key", "bound", "number"), BOUNDED, ids=[f"{named(k)}-{b}" for k, b, _ in BOUNDED])
def test_a_bound_is_told_in_the_schema_the_reference_and_the_error(key: Key, bound: str, number: float):
    lists = [lists for option, lists in options(key.node) if option.get(KEYWORDS[bound]) == number]
    assert lists
    said = f"{SAID[bound]} {number:g}"
    assert any(said in row.split(" | ")[1] for row in PAGE.splitlines() if row.startswith(f"| `{key.name}` |"))
    outside: Any = number + {"ge": -1, "gt": 0, "le": 1, "lt": 0}[bound]
    for _ in range(lists[0]):
        outside = [outside]
    with pytest.raises(ConfigError) as caught:
        load(key.given(outside))
    (fault,) = (
        fault for fault in caught.value.faults if f"{fault.where}".removesuffix(".0" * lists[0]).endswith(key.name)
    )
    assert fault.code == "config-bad-value" and said in fault.allowed
