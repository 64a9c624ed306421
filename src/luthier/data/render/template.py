"""Plain prompt templates: text with ``{column}`` fields, filled from a row without evaluating anything.

A field is a column's name or one of Ludwig's reserved ones (``{__sample__}``, ``{__task__}``, ``{__context__}``),
perhaps with a simple number format (``{year:.2f}``); ``{{`` and ``}}`` write braces. Nothing else is allowed: no
attributes, indices, conversions, nested or wide formats. Braces inside the data are text.
"""

from __future__ import annotations

import datetime
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError, Fault
from luthier.numbers import dumps
from luthier.registry import nearest

RESERVED = ("__sample__", "__task__", "__context__")
OFFERED = ("__sample__", "__task__")  # nothing retrieves a context
MAX_LENGTH = 100_000  # characters of a template
NUMBER_FORMAT = re.compile(r"[<>=^]?[-+ ]?#?0?\d{0,2}[,_]?(\.\d{1,2})?[bcdeEfFgGoxX%]?")
INTEGER_FORMAT = re.compile(r".*[bcdoxX]$")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text, and which spans of it came from data rather than from the template's author."""

    text: str
    data: tuple[Span, ...] = ()
    missing: tuple[str, ...] = ()  # columns that had no value and stand as empty


@dataclass(frozen=True, slots=True)
class Template:
    """A checked template: its literals and fields in order. Make it with `parse`."""

    source: str
    parts: tuple[tuple[str, str | None, str], ...]  # literal before the field, field or None, format

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields named, each once, in order."""
        return tuple(dict.fromkeys(field for _, field, _ in self.parts if field is not None))

    def render(self, values: Mapping[str, Any], where: str = "") -> Rendered:
        """Fill the fields from ``values``. A missing value (None, NaN) is empty and is named in the result.

        Raises:
            DataError: ``data-missing-column`` or, where a number format meets something else, ``data-template``.
        """
        pieces: list[str] = []
        spans: list[Span] = []
        missing: list[str] = []
        at = 0
        for literal, field, spec in self.parts:
            pieces.append(literal)
            at += len(literal)
            if field is None:
                continue
            if field not in values:
                raise _absent(field, list(values), where)
            if field not in RESERVED and is_missing(values[field]):
                missing.append(field)
            text = formatted(values[field], spec, field, where)
            pieces.append(text)
            if text:
                spans.append((at, at + len(text)))
            at += len(text)
        return Rendered("".join(pieces), tuple(spans), tuple(dict.fromkeys(missing)))


def parse(
    source: str, columns: Sequence[str], *, target: str | None = None, where: str = "prompt.template"
) -> Template:
    """Check a template against the columns it may name and take it apart. All faults are reported at once.

    Raises:
        DataError: ``data-template`` for a refused construct, ``data-missing-column`` for an unknown field.
    """
    if len(source) > MAX_LENGTH:
        raise DataError(
            "data-template",
            "the prompt template is too long",
            where=where,
            received=f"{len(source):,} characters",
            allowed=f"at most {MAX_LENGTH:,} characters",
            fix="shorten it; text of the rows comes in by {column} fields",
        )
    try:
        parsed = list(string.Formatter().parse(source))
    except ValueError as error:
        raise DataError(
            "data-template",
            f"the prompt template is malformed: {error}",
            where=where,
            received=source,
            allowed="{column} fields; {{ and }} for braces that are text",
            fix="double every brace that is meant as text: {{ }}",
        ) from error
    faults = [
        fault
        for _, field, spec, conversion in parsed
        if field is not None and (fault := _fault(field, spec or "", conversion, columns, target, where))
    ]
    if faults:
        raise DataError(faults)
    return Template(source, tuple((literal, field, spec or "") for literal, field, spec, _ in parsed))


def fields_of(source: str) -> tuple[str, ...]:
    """The fields that a template names, unchecked; none of one that `parse` will find malformed."""
    try:
        return tuple(dict.fromkeys(field for _, field, _, _ in string.Formatter().parse(source) if field))
    except ValueError:
        return ()


def is_missing(value: Any) -> bool:
    """Whether a value is absent: None, NaN, pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and math.isnan(value)


def plain_text(value: Any) -> str:
    """A value as it reads in a prompt: text as it is, missing as empty, nested values and booleans as JSON."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, (dict, list, tuple)):
        return dumps(value, str)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat(" ") if isinstance(value, datetime.datetime) else value.isoformat()
    return str(value)


def formatted(value: Any, spec: str, field: str, where: str) -> str:
    """``value`` under a number format; text that is a number counts as one."""
    if not spec or is_missing(value):
        return plain_text(value)
    try:
        number = float(value) if isinstance(value, str) else value
        if INTEGER_FORMAT.match(spec) and isinstance(number, float) and number.is_integer():
            number = int(number)
        return format(number, spec)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            "data-template",
            f"the format {{{field}:{spec}}} does not fit the value",
            where=f"{where} column {field}".strip(),
            received=value,
            allowed="a number",
            fix=f"write {{{field}}} without a format, or correct the value",
        ) from error


def _fault(
    field: str, spec: str, conversion: str | None, columns: Sequence[str], target: str | None, where: str
) -> Fault | None:
    """What is wrong with one field, if anything."""
    written = "{" + field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
    usable = [column for column in columns if column != target]  # the output is what is learned
    allowed = "{column} or {column:.2f}, with the columns " + ", ".join([*usable, *OFFERED])
    root = re.split(r"[.\[]", field, maxsplit=1)[0]
    close = nearest(root, usable) or nearest(field, usable)
    hint = f"write {{{close}}}" if close else "name a column of the table"
    if conversion or "{" in spec or (spec and not NUMBER_FORMAT.fullmatch(spec)):
        kind = "a conversion" if conversion else "a nested format" if "{" in spec else f"the format {spec!r}"
        return Fault(
            "data-template",
            f"the template field {written} uses {kind}, which is refused",
            where=where,
            received=written,
            allowed=allowed,
            fix=hint,
        )
    if target is not None and field == target:
        return Fault(
            "data-template",
            f"the template names the output column {target!r}, which is what is learned",
            where=where,
            received=written,
            allowed=allowed,
            fix="leave the output column out of the template",
        )
    if field in columns or field in RESERVED:
        return None
    if root != field:
        return Fault(
            "data-template",
            f"the template field {written} reaches into a value, which is refused",
            where=where,
            received=written,
            allowed=allowed,
            fix=hint,
        )
    if not field.strip() or field.isdigit():
        return Fault(
            "data-template",
            f"the template field {written} names no column",
            where=where,
            received=written,
            allowed=allowed,
            fix="double the braces for text: {{ }}",
        )
    return Fault(
        "data-missing-column",
        f"the template names the column {field!r}, which the table does not have",
        where=where,
        received=field,
        allowed=[*usable, *OFFERED],
        fix=f"did you mean {{{close}}}?" if close else "name a column, or double the braces for text: {{ }}",
    )


def _absent(field: str, columns: list[str], where: str) -> DataError:
    close = nearest(field, columns)
    return DataError(
        "data-missing-column",
        f"the row has no column {field!r}, which the prompt needs",
        where=where or None,
        received=[name for name in columns if name not in RESERVED],
        allowed=field,
        fix=f"rename {close!r} to {field!r}" if close else f"add a column {field!r}",
    )
