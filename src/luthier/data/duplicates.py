"""Rows that say the same, or nearly: they have to stand on one side of a split, or the test would be an echo.

Exact: equal after Unicode normalisation, case folding and collapsing of blanks. Near: a Jaccard similarity of at least
`SIMILAR` between the sets of 5-character pieces. Candidates are found by MinHash with banding (Broder 1997), and each
is then measured. What is kept of a row is a few numbers: 64 bytes of bands, 8 of its set, 8 of a hash of its text.
"""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SIMILAR = 0.8
PIECE = 5  # characters
SHORTEST = 40  # shorter texts are compared exactly only: "2 + 2" and "2 + 3" are two questions
LONGEST = 4000  # characters of a text that are looked at
BANDS, ROWS = 16, 4  # two texts of similarity 0.8 share a band with probability 0.9998
PLAUSIBLE = 2  # bands that two texts share before they are measured; one may be chance, and 0.8 shares six or seven
LARGEST = 0.05  # a larger share of the rows that are all alike is a house style, not a duplicate
BLOCK = 256  # texts hashed together
LOOKED_AT = 1000  # texts that show what all of them begin with


def normalised(text: str) -> str:
    """``text`` as it is compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fingerprint(text: str) -> int:
    """64 bits of a hash of ``text``; 0 for none, which equals nothing."""
    if not text:
        return 0
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1


class Groups:
    """Sets of rows that belong together, merged pair by pair."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

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

    def join_equal(self, keys: Sequence[int]) -> None:
        """Merge all rows with equal `fingerprint`; 0 is a key of its own for each row."""
        import numpy as np

        found = np.frombuffer(keys, dtype="u8") if isinstance(keys, array) and keys else np.array(keys, dtype="u8")
        for rows in equal_runs(found):
            if found[rows[0]]:
                for row in rows[1:]:
                    self.join(rows[0], row)

    def sets(self) -> tuple[list[list[int]], np.ndarray[Any, Any]]:
        """The sets of several rows, in the order of their first rows; and the rows that are alone."""
        import numpy as np

        if not self._parent:
            return [], np.empty(0, "i8")
        roots = np.frombuffer(self._parent, dtype="i8")
        while not np.array_equal(deeper := roots[roots], roots):
            roots = deeper
        counts = np.bincount(roots, minlength=len(roots))
        together = np.flatnonzero(counts[roots] > 1)
        out: dict[int, list[int]] = {}
        for row, root in zip(together.tolist(), roots[together].tolist(), strict=True):
            out.setdefault(root, []).append(row)
        return list(out.values()), np.flatnonzero(counts[roots] == 1)


def equal_runs(keys: np.ndarray[Any, Any]) -> Iterator[list[int]]:
    """The positions of equal values, in order, for each value that stands more than once."""
    import numpy as np

    if len(keys) < 2:
        return
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    starts, ends = np.concatenate(([0], edges)), np.concatenate((edges, [len(keys)]))
    for begin, end in zip(*(x[ends - starts > 1].tolist() for x in (starts, ends)), strict=True):
        yield order[begin:end].tolist()


def beginning(texts: Iterable[str]) -> str:
    """What all ``texts`` begin with, such as one system prompt: it tells none of them from another.

    Told from the first of them; nothing where that is short, as the names of keys in front of a text are.
    """
    looked_at = list(islice(texts, LOOKED_AT))
    least, most = min(looked_at, default=""), max(looked_at, default="")  # what these two share, all between them do
    end = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least))
    return least[:end] if end >= SHORTEST else ""


def near_pairs(texts: Iterable[str], text_of: Callable[[int], str], count: int) -> tuple[list[tuple[int, int]], int]:
    """Pairs of near duplicates among ``count`` normalised ``texts``, enough to join each set of them.

    Also how many rows were in sets so large that they are a common form rather than duplicates; those are left out.
    ``text_of`` gives one text again, by its number.
    """
    import numpy as np

    bands, rows = _bands(texts, count)
    if len(rows) < 2:
        return [], 0
    groups, pairs = Groups(len(rows)), []
    for band in range(BANDS):
        for run in equal_runs(np.ascontiguousarray(bands[:, band])):
            first, pieces = run[0], None
            for other in run[1:]:
                if groups.find(first) == groups.find(other):
                    continue
                if int((bands[first] == bands[other]).sum()) < PLAUSIBLE:
                    continue
                pieces = _pieces(text_of(int(rows[first]))) if pieces is None else pieces
                if _jaccard(pieces, _pieces(text_of(int(rows[other])))) >= SIMILAR:
                    groups.join(first, other)
                    pairs.append((first, other))
    most = max(10, int(LARGEST * count))
    large = [one for one in groups.sets()[0] if len(one) > most]
    common = {groups.find(one[0]) for one in large}
    kept = [(int(rows[a]), int(rows[b])) for a, b in pairs if groups.find(a) not in common]
    return kept, sum(map(len, large))


def _bands(texts: Iterable[str], count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Band hashes [n, BANDS] uint32 of the texts that are long enough, and their numbers [n]."""
    import numpy as np

    draws = np.random.default_rng(0).integers(1, 2**32, size=(2, BANDS * ROWS), dtype=np.uint32)
    bands, rows, used = np.empty((count, BANDS), np.uint32), np.empty(count, np.int64), 0
    long = ((i, text[:LONGEST]) for i, text in enumerate(texts) if len(text) >= SHORTEST)
    while block := list(islice(long, BLOCK)):
        end = used + len(block)
        rows[used:end] = [i for i, _ in block]
        bands[used:end] = _banded(_signatures([text for _, text in block], draws[0] | np.uint32(1), draws[1]))
        used = end
    return bands[:used], rows[:used]


def _signatures(
    texts: Sequence[str], factors: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The least of each hash function over each text's pieces: [texts, BANDS * ROWS] uint32."""
    import numpy as np

    hashes = _piece_hashes("".join(texts))
    sizes = np.array([len(text) for text in texts])
    ends = np.cumsum(sizes)
    inside = np.ones(len(hashes) + PIECE - 1, dtype=bool)
    for k in range(1, PIECE):  # pieces that run over into the next text
        inside[ends - k] = False
    own = hashes[inside[: len(hashes)]]
    starts = np.concatenate(([0], np.cumsum(sizes - PIECE + 1)[:-1]))
    out = np.empty((len(texts), len(factors)), np.uint32)
    for k, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
        out[:, k] = np.minimum.reduceat(own * factor + offset, starts)
    return out


def _banded(signatures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """One number for the `ROWS` values of each band: [texts, BANDS] uint32."""
    import numpy as np

    parts = signatures.reshape(len(signatures), BANDS, ROWS).astype(np.uint64)
    mixed = np.zeros(parts.shape[:2], np.uint64)
    for k in range(ROWS):
        mixed = (mixed ^ parts[:, :, k]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _piece_hashes(text: str) -> np.ndarray[Any, Any]:
    """A hash of the `PIECE` characters from each place on: [len - PIECE + 1] uint32."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    pieces = np.zeros(len(codes) - PIECE + 1, dtype=np.uint32)
    for k in range(PIECE):
        pieces = pieces * np.uint32(0x9E3779B1) + codes[k : k + len(pieces)]
    pieces ^= pieces >> np.uint32(15)
    pieces *= np.uint32(0x85EBCA77)
    return pieces ^ (pieces >> np.uint32(13))


def _pieces(text: str) -> frozenset[str]:
    text = text[:LONGEST]
    return frozenset(text[i : i + PIECE] for i in range(len(text) - PIECE + 1))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
