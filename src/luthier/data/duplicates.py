"""Rows that say the same, or nearly: they have to stand on one side of a split, or the test would be an echo.

Exact: equal after Unicode normalisation, case folding and collapsing of blanks. Near: an estimated Jaccard similarity
of at least `SIMILAR` between the sets of 5-character pieces, by MinHash with banding (Broder 1997).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIMILAR = 0.8
PIECE = 5  # characters
SHORTEST = 40  # shorter texts are compared exactly only: "2 + 2" and "2 + 3" are two questions
LONGEST = 4000  # characters of a text that are looked at
BANDS, ROWS = 16, 4  # two texts of similarity 0.8 share a band with probability 0.9998
LARGEST = 0.05  # a larger share of the rows that are all alike is a house style, not a duplicate


def normalised(text: str) -> str:
    """``text`` as it is compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class Groups:
    """Sets of rows that belong together, merged pair by pair."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, row: int) -> int:
        """The row that stands for the set of ``row``."""
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, one: int, other: int) -> None:
        """Merge two sets; the smaller row number stands for both."""
        a, b = sorted((self.find(one), self.find(other)))
        self._parent[b] = a

    def join_equal(self, keys: Sequence[Hashable]) -> None:
        """Merge all rows with equal keys; None is a key of its own for each row."""
        first: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key is not None and first.setdefault(key, row) != row:
                self.join(first[key], row)

    def sets(self) -> list[list[int]]:
        """All sets, in the order of their first rows."""
        out: dict[int, list[int]] = {}
        for row in range(len(self._parent)):
            out.setdefault(self.find(row), []).append(row)
        return list(out.values())


def near_pairs(texts: Sequence[str]) -> tuple[list[tuple[int, int]], int]:
    """Pairs of near duplicates among normalised ``texts``, enough to join each set of them.

    Also how many rows were in sets so large that they are a common form rather than duplicates; those are left out.
    """
    import numpy as np

    rows = [i for i, text in enumerate(texts) if len(text) >= SHORTEST]
    if len(rows) < 2:
        return [], 0
    draws = np.random.default_rng(0).integers(1, 2**63, size=(2, BANDS * ROWS, 1), dtype=np.uint64)
    signatures = np.stack([_signature(texts[i], draws[0] | np.uint64(1), draws[1]) for i in rows])
    groups, pairs = Groups(len(rows)), []
    for band in range(BANDS):
        buckets: dict[bytes, int] = {}
        for k, signature in enumerate(signatures):
            key = signature[band * ROWS : (band + 1) * ROWS].tobytes()
            other = buckets.setdefault(key, k)
            apart = other != k and groups.find(other) != groups.find(k)
            if apart and float(np.mean(signatures[other] == signature)) >= SIMILAR:
                groups.join(other, k)
                pairs.append((other, k))
    most = max(10, int(LARGEST * len(texts)))
    large = {groups.find(s[0]) for s in groups.sets() if len(s) > most}
    kept = [(rows[a], rows[b]) for a, b in pairs if groups.find(a) not in large]
    return kept, sum(len(s) for s in groups.sets() if groups.find(s[0]) in large)


def _signature(text: str, factors: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The least of each of the hash functions over the text's pieces: [BANDS * ROWS] uint64."""
    import numpy as np

    codes = np.frombuffer(text[:LONGEST].encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    pieces = np.zeros(len(codes) - PIECE + 1, dtype=np.uint64)
    for k in range(PIECE):  # a polynomial of the piece's characters, modulo 2**64
        pieces = pieces * np.uint64(0x9E3779B97F4A7C15) + codes[k : k + len(pieces)]
    pieces ^= pieces >> np.uint64(29)
    hashes = (np.unique(pieces)[None, :] * factors + offsets) >> np.uint64(20)
    return np.asarray(hashes.min(axis=1))
