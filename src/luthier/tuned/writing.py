"""Answers on their way to a file: a journal that grows row by row and survives a kill, and the formats it becomes.

Rows are written to the journal as they are finished, in any order. Once all are there, the file is made from it in the
table's order and renamed into place, so that it never exists in half. Memory stays flat: of a row only the place of its
line is held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from luthier import json_reader
from luthier.errors import DataError, RunError
from luthier.run import atomic
from luthier.run.oslock import held_elsewhere
from luthier.run.output import require_ours

FORMATS = (".csv", ".jsonl", ".parquet")
# In this order, those there are.
FIELDS = (
    "row", "response", "finish_reason", "prediction", "probability",
    "responses", "logprobs", "warped_logprobs", "error",
)  # fmt: skip
BLOCK = 4096  # rows that become part of a file together

Record = Mapping[str, Any]


def answers_file(path: Path) -> Path:
    """The file for the answers, by its ending; a folder, or a name without an ending, gets a predictions.csv.

    Raises DataError for another ending, so that it can be asked before the work is done.
    """
    if path.is_dir() or not path.suffix:
        return path / "predictions.csv"
    if path.suffix not in FORMATS:
        raise DataError(
            "data-unreadable",
            "answers cannot be written in this format",
            where=str(path),
            received=path.suffix,
            allowed=FORMATS,
            fix=f"name it {path.with_suffix('.csv').name}",
        )
    return path


def are_answers(path: Path) -> bool:
    """Whether the file holds what `write_records` writes."""
    try:
        return _names(path)[:3] == list(FIELDS[:3])
    except (OSError, ValueError):  # what pyarrow raises is a ValueError
        return False


def _names(path: Path) -> list[str]:
    """The columns of a file of answers."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return list(parquet.read_schema(path).names)
    with path.open("rb") as file:
        first = file.readline(1 << 24)
    if path.suffix == ".csv":
        return first.decode().strip().split(",")
    found = json_reader.parse(first)
    return list(found) if isinstance(found, dict) else []


def write_records(path: Path, records: Iterable[Record], fields: Sequence[str]) -> None:
    """Write records with these fields, in the format that the ending names; the file appears whole or not at all.

    Raises RunError run-foreign-files where it would take the place of something else.
    """
    require_ours(path, are_answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    try:
        _WRITERS[path.suffix](staged, iter(records), fields)
        atomic.sync_file(staged)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    atomic.sync_folder(path.parent)


def _blocks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while block := list(islice(records, BLOCK)):
        yield block


def _write_jsonl(path: Path, records: Iterator[Record], fields: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(dict(record), ensure_ascii=False) + "\n")


def _write_csv(path: Path, records: Iterator[Record], fields: Sequence[str]) -> None:
    import pandas as pd

    pd.DataFrame(columns=list(fields)).to_csv(path, index=False)
    for block in _blocks(records):
        told = [{name: _in_a_cell(value) for name, value in record.items()} for record in block]
        pd.DataFrame(told, columns=list(fields)).to_csv(path, index=False, header=False, mode="a")


def _in_a_cell(value: Any) -> Any:
    """Lists as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _write_parquet(path: Path, records: Iterator[Record], fields: Sequence[str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    numbers = pa.list_(pa.float64())
    kinds = {
        "row": pa.int64(), "probability": pa.float64(),
        "responses": pa.list_(pa.string()), "logprobs": numbers, "warped_logprobs": numbers,
    }  # fmt: skip
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in fields])
    with parquet.ParquetWriter(path, schema) as out:
        for block in _blocks(records):
            out.write_table(pa.Table.from_pylist([dict(record) for record in block], schema=schema))


_WRITERS = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}


def _held(path: Path) -> BinaryIO:
    """The journal, open and locked; the lock ends with the process, however that ends."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b")
        if held_elsewhere(file.fileno()):
            file.close()
            raise RunError(
                "run-in-use",
                "another process is writing these answers",
                where=str(path),
                received="a file that another process has open",
                fix="wait for it to end, or name another file with --output",
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # who held it has just finished and removed it


class Journal:
    """The rows that are finished, one JSON line each, beside the file that they will become."""

    def __init__(self, target: Path, identity: str) -> None:
        """Go on with the journal of ``target``, when there is one of the same work; else begin one.

        ``identity`` stands for everything that the answers depend on. ``foreign`` says that a journal of other work was
        there; it has been replaced.

        Raises:
            RunError: ``run-in-use`` while another process writes it.
        """
        self.target, self.path = target, target.with_name(f"{target.name}.partial")
        self.fields: set[str] = set()
        self.errors = 0
        self._places: dict[int, int] = {}
        target.parent.mkdir(parents=True, exist_ok=True)
        head = (json.dumps({"format": 1, "identity": identity}) + "\n").encode()
        self._file: BinaryIO = _held(self.path)
        known = os.fstat(self._file.fileno()).st_size > 0
        self.foreign = known and not self._read(head)
        if not known or self.foreign:
            self._file.seek(0)
            self._file.truncate()
            self._file.write(head)
            self._file.flush()

    @property
    def done(self) -> set[int]:
        """The rows that are in it."""
        return set(self._places)

    def add(self, record: Record) -> None:
        """Keep a finished row. What is kept outlives this process."""
        self._note(record, self._file.tell())
        self._file.write((json.dumps(dict(record), ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def finish(self, rows: Sequence[int]) -> None:
        """Make the file of these rows, in their order, and remove the journal."""
        write_records(self.target, map(self._at, rows), [name for name in FIELDS if name in self.fields])
        if os.name == "nt":  # there an open file cannot be removed
            self.close()
        self.path.unlink()  # while it is held: nobody goes on with what is about to go
        self.close()

    def close(self) -> None:
        """Let go of it; what is in it stays."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _note(self, record: Record, place: int) -> None:
        self._places[int(record["row"])] = place
        self.fields |= set(record)
        self.errors += "error" in record

    def _at(self, row: int) -> Record:
        self._file.seek(self._places[row])
        record: Record = json_reader.parse(self._file.readline())
        return record

    def _read(self, head: bytes) -> bool:
        """Take in what an earlier process left, up to a line that is not whole: what follows is done again."""
        if self._file.readline() != head:
            return False
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                self._note(json_reader.parse(line), end)
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        self._file.seek(end)
        self._file.truncate()
        return True
