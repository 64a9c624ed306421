"""What a cell of a workbook holds, where that is not what its sheet shows: formats, escapes, days, percentages."""

from __future__ import annotations

import datetime
import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any

ESCAPED = re.compile("_x([0-9A-Fa-f]{4})_")
SHOWS_TIME = re.compile("h", re.IGNORECASE).search  # of a number format
PADDED = re.compile("00+")  # a number format, such as that of 00501
EXACT = Context(prec=700, rounding=ROUND_HALF_UP)  # digits of any number that a cell can hold
UNSEEN = re.compile(r"_.|\*.|\[(?!\$[^-])[^\]]*\]")  # of a number format: room, fill, colours and locales; no currency
DIGITS = re.compile(r"(?P<whole>[#0?,]*)(?:\.(?P<places>[0#?]+))?(?P<percent>\s*%)?")


@dataclass(frozen=True, slots=True)
class Digits:
    """A number format of digits alone, perhaps with thousands and a percent sign."""

    whole: int  # digits that are always shown before the point
    places: int  # at most, after it
    always: int  # of these
    thousands: bool
    percent: bool

    def shown(self, value: int | float) -> str:
        """The value as the sheet shows it."""
        exact = Decimal(str(value)) * (100 if self.percent else 1)
        rounded = exact.quantize(Decimal(1).scaleb(-self.places), context=EXACT)
        text = f"{abs(rounded):{',' if self.thousands else ''}f}"
        before, point, after = text.partition(".")
        after = after[: self.always] + after[self.always :].rstrip("0")
        sign = "-" if rounded < 0 else ""
        return sign + before.zfill(self.whole) + (point + after if after else "") + ("%" if self.percent else "")


@dataclass
class Shown:
    """Cells that show something else than they hold, counted, with the first of each kind."""

    percent: int = 0
    rounded: str = ""
    others: Counter[str] = field(default_factory=Counter)  # by the letters of the column
    first: dict[str, str] = field(default_factory=dict)

    def value_of(self, cell: Any) -> Any:
        """The value as the sheet shows it: a day without a time of 00:00, leading zeros, 25%, text unescaped.

        Other numbers are what is stored, without the thousands, the currency or the rounding of their format, and are
        counted where that differs. With escapes a workbook holds what XML cannot: _x000D_ is a carriage return.
        """
        value = cell.value
        if isinstance(value, str):
            return ESCAPED.sub(lambda found: chr(int(found[1], 16)), value)
        if isinstance(value, datetime.datetime):
            is_day = value.time() == datetime.time() and not SHOWS_TIME(cell.number_format)
            return value.date() if is_day else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or cell.number_format in ("General", "@"):
            return value
        return self._number(cell, value)

    def _number(self, cell: Any, value: int | float) -> Any:
        if isinstance(value, int) and value >= 0 and PADDED.fullmatch(cell.number_format):
            return str(value).zfill(len(cell.number_format))
        digits = _digits(cell.number_format)
        shown = digits.shown(value) if digits is not None else None
        if digits is not None and digits.percent and shown is not None:
            self.percent += 1
            if Decimal(shown[:-1].replace(",", "")) != Decimal(str(value)) * 100:
                self.rounded = self.rounded or f"{cell.coordinate} holds {value} and is read as {shown}"
            return shown
        forms = cell.number_format.count(";")  # one for negative numbers, another for zero
        own = (value < 0 and forms > 0) or (value == 0 and forms > 1)
        if own or shown != str(value):
            self.others[cell.column_letter] += 1
            self.first.setdefault(
                cell.column_letter, f"{cell.coordinate} is {value} under the format {cell.number_format}"
            )
        return value

    def notes(self) -> list[str]:
        """What is to be told."""
        out = []
        if self.percent:
            rounded = f", some of them rounded ({self.rounded})" if self.rounded else ""
            out.append(f"{self.percent:,} percentages are read as the sheet shows them, such as 25%{rounded}")
        for letters, count in self.others.items():
            out.append(
                f"{count:,} numbers of column {letters} are read as they are stored, not as their format shows them "
                f"({self.first[letters]}): write them as text to have them as shown"
            )
        return out


@functools.lru_cache(1000)
def _digits(number_format: str) -> Digits | None:
    """A number format that shows digits alone; None for one with a currency, words, exponents or fractions."""
    found = DIGITS.fullmatch(UNSEEN.sub("", number_format.split(";")[0]).strip())
    if found is None or not found.group():
        return None
    places, whole = found["places"] or "", found["whole"]
    if whole.endswith(","):  # shown in thousands
        return None
    return Digits(whole.count("0"), len(places), places.rfind("0") + 1, "," in whole, bool(found["percent"]))
