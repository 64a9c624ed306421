"""What is said of two tables that differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data import rowdiff, sources
from luthier.data.table import ROW_HASH, Table

LETTERS = "abcdefgh"


def hashes(rows: str) -> bytes:
    return Table.from_columns({"one": list(rows)}, "t").row_hashes


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("abcdefgh", []),
        ("abXdefYh", ["2 rows changed: 2, 6"]),
        ("Xabcdefgh", ["8 rows → 9", "1 row added: 0"]),
        ("abgh", ["8 rows → 4", "4 rows removed: 2, 3, 4, 5"]),
        ("bcdefghX", ["1 row removed: 0", "1 row added: 7"]),
        ("bacdefgh", ["the same rows in another order"]),
        ("aacdefgh", ["1 row removed: 1"]),
        ("ABCDEFGH", ["8 rows changed: 0, 1, 2, 3, 4 …"]),
        ("", ["8 rows → 0", "8 rows removed: 0, 1, 2, 3, 4 …"]),
        ("abcdefghh", ["8 rows → 9"]),
    ],
)
def test_rows(after: str, said: list[str]) -> None:
    assert rowdiff.differences(hashes(LETTERS), hashes(after)) == said


def test_repeated_rows() -> None:
    assert rowdiff.differences(hashes("aab"), hashes("abb")) == ["the same rows, some of them another number of times"]


def test_columns() -> None:
    said = ["column 'b' is gone", "column 'c' is new"]
    assert rowdiff.columns(["a", "b"], ["a", "c"]) == said
    assert rowdiff.columns(["a", "b"], ["b", "a"]) == ["the columns stand in another order"]
    assert rowdiff.columns(["a", "b"], ["a", "b"]) == []


def test_a_file_of_the_cache_has_the_same_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.csv").write_text("q,a\n" + "".join(f"ask {i},say {i}\n" for i in range(700)))
    small = sources.read(tmp_path / "rows.csv")
    monkeypatch.setattr(sources, "LARGE", 1)
    for _ in range(2):  # made, and found again
        large = sources.read(tmp_path / "rows.csv")
        assert (large.row_hashes, large.content_hash) == (small.row_hashes, small.content_hash)
    assert len(small.row_hashes) == 700 * ROW_HASH
