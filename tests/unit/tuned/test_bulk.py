"""Predictions into a file: in order, resumable after any end, one bad row reported, flat in memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from luthier import events
from luthier.data.sources import read
from luthier.errors import DataError
from luthier.infer.sampling import resolve
from luthier.tuned.bulk import predict_into
from luthier.types import Completion, Sampling


class Asked:
    """Stands in for `Tuned`: its answers are the rows' texts, in capitals, and come in any order."""

    config = SimpleNamespace(generation=None, random_seed=1)
    output, folder, reader, model, temperature = "answer", None, None, None, 1.0

    def __init__(self, ends_after: int | None = None) -> None:
        self.ends_after, self.asked = ends_after, list[int]()

    def sampling(self, generation: Any) -> Sampling:
        return resolve(None, generation)

    def read(self, dataset: Any, encoding: str | None, sink: events.Sink) -> Any:
        return read(dataset, encoding=encoding, sink=sink)

    def each(self, table: Any, rows: Sequence[int], **ignored: Any) -> Iterator[tuple[Completion, tuple[float, ...]]]:
        texts = {row: table.row(row)["text"] for row in rows}
        for row in rows:
            if texts[row] == "bad":
                yield Completion(row, (), "", "error", error="no text"), ()
        able = [row for row in rows if texts[row] != "bad"]
        for row in random.Random(1).sample(able, len(able)):
            if len(self.asked) == self.ends_after:
                raise KeyboardInterrupt
            self.asked.append(row)
            yield Completion(row, (2,), texts[row].upper() + ",\né", "stop"), ()


ROWS = pd.DataFrame({"text": [f"row {i}" if i != 7 else "bad" for i in range(30)]})
WANT = ["" if i == 7 else f"ROW {i},\né" for i in range(30)]


def texts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [json.loads(line)["response"] for line in path.read_text(encoding="utf-8").splitlines()]
    frame = pd.read_csv(path, keep_default_na=False) if path.suffix == ".csv" else pd.read_parquet(path)
    assert list(frame["row"]) == list(range(len(frame)))
    return list(frame["response"])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_rows_keep_their_order_and_a_bad_one_is_reported(tmp_path: Path, name: str) -> None:
    made = predict_into(tmp_path / name, Asked(), ROWS)  # type: ignore[arg-type]
    assert (made.rows, made.errors) == (30, 1)
    assert texts(made.path) == WANT
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_after_an_end_only_missing_rows_are_asked(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_into(tmp_path / name, Asked(ends_after=11), ROWS)  # type: ignore[arg-type]
    assert not (tmp_path / name).exists()
    partial = tmp_path / f"{name}.partial"
    with partial.open("ab") as file:
        file.write(b'{"row": 29, "respon')  # a kill in the middle of a line
    again, heard = Asked(), list[events.Event]()
    made = predict_into(tmp_path / name, again, ROWS, sink=heard.append)  # type: ignore[arg-type]
    assert len(again.asked) == 30 - 11 - 1
    assert texts(made.path) == WANT and made.errors == 1
    assert "12 of 30" in next(event.text for event in heard if isinstance(event, events.Note))
    assert not partial.exists()


def test_a_journal_of_other_work_is_replaced_and_told(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        predict_into(tmp_path / "a.csv", Asked(ends_after=3), ROWS)  # type: ignore[arg-type]
    other, heard = Asked(), list[events.Event]()
    predict_into(tmp_path / "a.csv", other, ROWS, generation={"max_new_tokens": 3}, sink=heard.append)  # type: ignore[arg-type]
    assert len(other.asked) == 29
    assert any(isinstance(event, events.Warned) for event in heard)


def test_a_name_without_a_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        predict_into(tmp_path / "a.txt", Asked(), ROWS)  # type: ignore[arg-type]


def check_memory(folder: Path, rows: int) -> None:
    table = folder / "rows.csv"
    table.write_text("text\n" + "".join(f"row {i}\n" for i in range(rows)))

    class Long(Asked):
        def each(self, *given: Any, **ignored: Any) -> Iterator[tuple[Completion, tuple[float, ...]]]:
            for done, scores in super().each(*given):
                yield Completion(done.key, done.ids, done.text * 100, "stop"), scores

    tracemalloc.start()
    try:
        made = predict_into(folder / "a.jsonl", Long(), table)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    size = made.path.stat().st_size
    assert made.rows == rows and peak < 30e6 < size, f"{peak / 1e6:.0f} MB held for a file of {size / 1e6:.0f} MB"


@pytest.mark.long
def test_a_hundred_thousand_rows_take_little_memory(tmp_path: Path) -> None:
    check_memory(tmp_path, 100_000)
