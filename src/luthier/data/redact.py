"""Personal data and secrets are replaced before anything else sees the rows: `preprocessing.redact`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from luthier.data.table import JSON_MARK, Table, column_array
from luthier.registry import Registry

Span = tuple[int, int]
Finder = Callable[[str], Iterable[Span]]
KINDS: Registry[Finder] = Registry("redaction")
ORDER = ("key", "email", "card", "phone")  # a card is no phone number, and a key may hold either

_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_RUN = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,60}(?!\d)")
_GAP = r"[\s./‐-―－ー-]"
_PHONE = re.compile(
    rf"(?<![\w.])(?:\+\d{{1,3}}{_GAP}?)?(?:[(（]\d{{1,5}}[)）]{_GAP}?|\d{{2,5}}{_GAP})"
    rf"\d{{2,4}}(?:{_GAP}?\d{{2,4}}){{1,4}}(?!\w)"
    r"|(?<![\w.])\+\d{8,15}(?!\w)|(?<![\w.])0\d{9,10}(?!\w)"
)
_DATE = re.compile(rf"(?:\d{{4}}{_GAP}\d{{1,2}}{_GAP}\d{{1,2}}|\d{{1,2}}{_GAP}\d{{1,2}}{_GAP}\d{{4}})(?!\d)")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|pk|rk)[-_](?:live[-_]|test[-_]|proj-|ant-)?[A-Za-z0-9_-]{16,}"
    r"|\b(?:hf|gh[pousr]|glpat|npm|pypi)[-_][A-Za-z0-9_-]{16,}|\bgithub_pat_\w{20,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bxox[abeprs]-[\w-]{10,}"
    r"|\beyJ[\w-]{8,2000}\.[\w-]{8,4000}\.[\w-]*"
    r"|(?<=Bearer )[\w.~+/-]{12,}=*"
    r"|(?i:(?<=password[:=] )|(?<=password[:=])|(?<=api_key[:=] )|(?<=api_key[:=])|(?<=secret[:=] )|(?<=secret[:=]))"
    r"[^\s\[]{6,}",
    re.DOTALL,
)


@KINDS.register("email")
def _email(text: str) -> Iterable[Span]:
    return (found.span() for found in _EMAIL.finditer(text)) if "@" in text else ()


@KINDS.register("card")
def _card(text: str) -> Iterable[Span]:
    for found in _RUN.finditer(text):
        groups = [(one.start() + found.start(), one.end() + found.start()) for one in re.finditer(r"\d+", found[0])]
        first = 0
        while first < len(groups):  # a number before or after it is no part of a card
            fits = (n for n in range(len(groups), first, -1) if _is_card(text, groups[first:n]))
            end = next(fits, None)
            if end is not None:
                yield groups[first][0], groups[end - 1][1]
            first = end or first + 1


def _is_card(text: str, groups: Sequence[Span]) -> bool:
    digits = "".join(text[start:end] for start, end in groups)
    return 13 <= len(digits) <= 19 and _luhn(digits)


@KINDS.register("phone")
def _phone(text: str) -> Iterable[Span]:
    for found in _PHONE.finditer(text):
        digits = sum(map(str.isdigit, found[0]))
        if 9 <= digits <= 15 and not _DATE.match(found[0]):
            yield found.span()


@KINDS.register("key")
def _key(text: str) -> Iterable[Span]:
    return (found.span() for found in _KEY.finditer(text))


def _luhn(text: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1)."""
    digits = [int(one) for one in text if one.isdigit()]
    doubled = (d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits)))
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0


def redacted(text: str, kinds: Sequence[str], counts: Counter[str] | None = None) -> str:
    """``text`` with ``[email]`` and so on where something of these kinds stood."""
    for kind in (one for one in ORDER if one in kinds):
        out, end = [], 0
        for first, last in KINDS.get(kind)(text):
            out += [text[end:first], f"[{kind}]"]
            end = last
        if out:
            text = "".join(out) + text[end:]
            if counts is not None:
                counts[kind] += len(out) // 2
    return text


def redact(table: Table, kinds: Sequence[str]) -> Table:
    """The table with everything of these kinds replaced, in text and in whatever holds text, and a note of how many."""
    if not kinds:
        return table
    import pyarrow as pa

    counts: Counter[str] = Counter()
    fields, columns = [], []
    for field in table.rows.schema:
        values = table.column(field.name)
        changed = [_walk(value, kinds, counts) for value in values]
        if changed == values:
            fields.append(field)
            columns.append(table.rows.column(field.name))
            continue
        if any(isinstance(value, str) for value in changed):  # numbers, of which one was a card's or a phone's
            changed = [str(value) if isinstance(value, int) else value for value in changed]
        array, as_json = column_array(changed, field.name, table.name)
        fields.append(pa.field(field.name, array.type, metadata=JSON_MARK if as_json else None))
        columns.append(array)
    said = ", ".join(f"{counts[kind]:,} {kind}" for kind in ORDER if kind in kinds)
    rows = pa.Table.from_arrays(columns, schema=pa.schema(fields))
    return Table(rows, table.name, [*table.notes, f"redacted: {said}"])


def _walk(value: Any, kinds: Sequence[str], counts: Counter[str]) -> Any:
    if isinstance(value, str):
        return redacted(value, kinds, counts)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        text = redacted(str(value), kinds, counts)
        return value if text == str(value) else text
    if isinstance(value, Mapping):
        return {name: _walk(inner, kinds, counts) for name, inner in value.items()}
    if isinstance(value, list):
        return [_walk(inner, kinds, counts) for inner in value]
    return value
