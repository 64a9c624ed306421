"""How much a workbook makes of itself, told from its XML before a library builds it all in memory.

A workbook is a zip of XML. A kilobyte of it can unpack to millions of cells, and one merged range can stand for
seventeen thousand million of them. The parts are parsed here as they are unpacked, and nothing of them is kept.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO
from xml.parsers import expat

PIECE = 1 << 20
LIGHT = frozenset(("v", "t", "si", "r", "rPr", "f"))  # elements of which a cell or a text has several
HEAVY = 4  # light ones that any other element takes as much memory as
FREE = 100_000  # what the parts beside the cells come to in any workbook
SHARE = 2 * HEAVY  # what a cell with a text of its own comes to
_CORNER = re.compile(r"\$?([A-Za-z]{1,3})\$?([0-9]{1,7})")


class TooMany(Exception):
    """The parts hold more than so many cells."""


def require_cells(path: Path, most: int) -> None:
    """Go through every part of the zip. Raises TooMany beyond ``most`` cells or what takes as much memory as they.

    Raises zipfile.BadZipFile, ValueError and the like for what is no zip.
    """
    count = _Count(most)
    with zipfile.ZipFile(path) as archive:
        for item in archive.infolist():
            with archive.open(item) as part:
                count.take(part)


class _Count:
    """Adds up over the parts of one workbook."""

    def __init__(self, most: int) -> None:
        self.most, self.weight, self.merged = most, 0, 0

    def take(self, part: IO[bytes]) -> None:
        """Parse one part; what is no XML is passed over where it ceases to be."""
        parser = expat.ParserCreate()
        parser.StartElementHandler = self._element
        try:
            while piece := part.read(PIECE):
                parser.Parse(piece, False)
        except expat.ExpatError:
            return

    def _element(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        self.weight += 1 if name in LIGHT else HEAVY
        if name == "mergeCell":
            self.merged += _area(attributes.get("ref", ""))
        if self.weight > self.most * SHARE + FREE or self.merged > self.most:
            raise TooMany


def _area(ref: str) -> int:
    """The cells of a range such as A1:C9; of what is none, 0."""
    corners = [_CORNER.fullmatch(corner) for corner in ref.split(":")]
    if len(corners) != 2 or corners[0] is None or corners[1] is None:
        return 0
    (left, top), (right, bottom) = ((_column(found[1]), int(found[2])) for found in (corners[0], corners[1]))
    return max(0, right - left + 1) * max(0, bottom - top + 1)


def _column(letters: str) -> int:
    number = 0
    for letter in letters.upper():
        number = number * 26 + ord(letter) - ord("A") + 1
    return number
