"""A column of dates as seconds: ISO 8601, 2023/1/23, 2023年1月23日, or day and month in the order that fits all."""

from __future__ import annotations

import datetime
import re
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError

CLOCK = r"(?:[T ]\s*(\d{1,2})[:時时](\d{1,2})(?:[:分](?:(\d{1,2}(?:\.\d+)?)秒?)?)?\s*([AaPp][Mm])?)?"
YEAR_FIRST = re.compile(rf"(\d{{4}})(?:[-/.](\d{{1,2}})[-/.](\d{{1,2}})|年\s*(\d{{1,2}})月\s*(\d{{1,2}})日){CLOCK}")
YEAR_LAST = re.compile(rf"(\d{{1,2}})[-/.](\d{{1,2}})[-/.](\d{{4}}){CLOCK}")
ORDERS = {"day/month/year": (1, 0), "month/day/year": (0, 1)}  # where month and day stand


@dataclass(frozen=True, slots=True)
class Unordered:
    """A date whose first two numbers are day and month, or month and day."""

    row: int
    given: str
    numbers: tuple[int, int]
    year: int
    seconds: float  # of its time of day

    def read(self, order: str) -> float | None:
        """Seconds since the epoch in one of `ORDERS`, None where there is no such day."""
        month, day = (self.numbers[at] for at in ORDERS[order])
        return _seconds(self.year, month, day, self.seconds)


def seconds_of(values: Iterable[Any], where: str) -> tuple[array[float], list[str]]:
    """Seconds since the epoch of each value, and what is to be told; a time without zone counts as UTC.

    Dates that may begin with the day or the month are read in the one order that all of them allow.
    ``where`` is how messages call the column. Raises DataError ``data-split``.
    """
    out: array[float] = array("d")
    open_: list[Unordered] = []
    for row, value in enumerate(values):
        found = _read(row, value)
        if found is None:
            raise _no_time(row, value, where)
        if isinstance(found, Unordered):
            open_.append(found)
        out.append(found.row if isinstance(found, Unordered) else found)
    if not open_:
        return out, []
    order = _order(open_, where)
    for one in open_:
        seconds = one.read(order)
        assert seconds is not None, "the order fits every row"
        out[one.row] = seconds
    return out, [f"the dates of {where} are read as {order}, the one order that fits all of them"]


def _order(dates: list[Unordered], where: str) -> str:
    """The one order in which every date is a day. Raises DataError where there are two, or none."""
    against = {order: next((one for one in dates if one.read(order) is None), None) for order in ORDERS}
    fitting = [order for order, one in against.items() if one is None]
    if len(fitting) == 1:
        return fitting[0]
    shown = dates[0]
    if not fitting:
        shown = next(one for one in against.values() if one is not None)
        misfits = [f"{one.given} (row {one.row}) is no {order}" for order, one in against.items() if one is not None]
        why, allowed = "the dates follow no one order", "; ".join(misfits)
    else:
        readings = {order: _iso(shown.read(order)) for order in ORDERS}
        if len(set(readings.values())) == 1:  # 05/05/2024 says nothing: show one that does, if there is any
            shown = next((one for one in dates if one.numbers[0] != one.numbers[1]), shown)
            readings = {order: _iso(shown.read(order)) for order in ORDERS}
        why = "the dates can be read in two ways, and every row fits both"
        allowed = " or ".join(f"{iso} ({order})" for order, iso in readings.items())
    raise DataError(
        "data-split",
        why,
        where=f"{where} row {shown.row}",
        received=shown.given,
        allowed=allowed,
        fix="write them year first, such as 2024-05-31, or split in another way",
    )


def _read(row: int, value: Any) -> float | Unordered | None:
    """The seconds of one value; None where it is no time."""
    if isinstance(value, str):
        return _read_text(row, value)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, datetime.date):
        return _seconds(value.year, value.month, value.day, 0.0)
    return float(value) if isinstance(value, (int, float)) else None


def _read_text(row: int, given: str) -> float | Unordered | None:
    text = unicodedata.normalize("NFKC", given).strip()
    if re.fullmatch(r"[0-9]{9,}(\.[0-9]*)?", text):
        return float(text)  # seconds or milliseconds; as ISO 8601, 1701011512345 is 1701-01-15, "1" and 23:45
    try:
        return _read(row, datetime.datetime.fromisoformat(text.replace("/", "-")))
    except ValueError:
        pass
    if found := YEAR_FIRST.fullmatch(text):
        year, month, day = (int(part) for part in found.groups()[:5] if part is not None)
        seconds = _time_of_day(found.groups()[5:])
        return None if seconds is None else _seconds(year, month, day, seconds)
    if found := YEAR_LAST.fullmatch(text):
        one, other, year = (int(part) for part in found.groups()[:3])
        seconds = _time_of_day(found.groups()[3:])
        return None if seconds is None else Unordered(row, given, (one, other), year, seconds)
    try:
        return float(text)
    except ValueError:
        return None


def _time_of_day(parts: tuple[str | None, ...]) -> float | None:
    """Seconds since midnight; None for a time that no day has."""
    hours, minutes, seconds = int(parts[0] or 0), int(parts[1] or 0), float(parts[2] or 0)
    half = (parts[3] or "").lower()
    if minutes > 59 or seconds >= 60 or hours > 23 or (half and not 1 <= hours <= 12):
        return None
    if half:
        hours = hours % 12 + (12 if half == "pm" else 0)
    return hours * 3600 + minutes * 60 + seconds


def _seconds(year: int, month: int, day: int, time: float) -> float | None:
    try:
        return datetime.datetime(year, month, day, tzinfo=datetime.UTC).timestamp() + time
    except ValueError:
        return None


def _iso(seconds: float | None) -> str:
    assert seconds is not None, "the order fits every row"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _no_time(row: int, value: Any, where: str) -> DataError:
    return DataError(
        "data-split",
        "a value is not a date or time",
        where=f"{where} row {row}",
        received="nothing" if value is None else value,
        allowed="a date such as 2024-05-31, 2024-05-31T12:00:00, 2024年5月31日 or 31/05/2024, or a number",
        fix="mend the value, or split in another way",
    )
