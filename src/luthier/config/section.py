"""What every section of the config is made of: the frozen base model and `key`, which documents one key.

A key carries its type, default, range and description, and Ludwig's default where it differs from ours. The reference
page, the JSON Schema, the error texts and `defaults: ludwig` are all made from these, so a default stands in one place.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

_BOOL = TypeAdapter(bool)
SAME: Any = object()  # "Ludwig's default is ours"


class Conflict(ValueError):
    """Keys that do not go together, raised by a section's own checks; becomes a fault ``config-conflict``."""

    def __init__(self, message: str, *, received: str, allowed: str, fix: str) -> None:
        super().__init__(message)
        self.received, self.allowed, self.fix = received, allowed, fix


class Section(BaseModel):
    """A frozen mapping of declared keys; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def key(
    default: Any,
    description: str,
    *,
    ludwig: Any = SAME,
    ludwig_note: str = "",
    why: str = "",
    source: str = "",
    **limits: Any,
) -> Any:
    """Declare one key.

    Args:
        default: Luthier's default (``...`` for a key that has to be given).
        description: one or two sentences for the reference.
        ludwig: Ludwig's default where it differs.
        ludwig_note: what Ludwig does, in words, where no value of this key means it.
        why: what speaks for our default, in the reference.
        source: who recommends or measured it: a paper, a published recipe, a library's guide; or that it is our own.
        limits: pydantic's ``ge``, ``gt``, ``le``, ``lt``, ``min_length``, …
    """
    extra: dict[str, Any] = {}
    if ludwig is not SAME:
        extra["ludwig"] = ludwig
    if ludwig_note:
        extra["ludwig_note"] = ludwig_note
    if why:
        extra["why"] = why
    if source:
        extra["source"] = source
    if isinstance(default, type) and issubclass(default, BaseModel):
        return Field(default_factory=default, description=description, json_schema_extra=extra or None, **limits)
    return Field(default, description=description, json_schema_extra=extra or None, **limits)


def read_bool(value: Any) -> Any:
    """``value`` as a key of true or false reads it ("true", "no", 1, …), unchanged where such a key would refuse it."""
    try:
        return _BOOL.validate_python(value)
    except ValidationError:
        return value


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")
    return value


def _whole(value: Any) -> Any:
    try:
        return int(value) if isinstance(value, str) else _no_bool(value)
    except ValueError:  # told by the field's own check
        return value


# Numbers may come as text (PyYAML reads 1e-4 so); true and false are never numbers.
Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
ReadInt = BeforeValidator(_whole)  # for a Literal of integers, which pydantic compares as they come
Auto = Literal["auto"]
