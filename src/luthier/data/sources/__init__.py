"""Read a dataset, wherever it is, into one `Table`: objects in memory, files of many formats, saved folders, the hub.

A new file format is one module with a reader registered in `formats.FORMATS` under its suffixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier import events
from luthier.data.sources import arrow, delimited, excel, hub, jsons, memory  # noqa: F401  (they register themselves)
from luthier.data.sources.formats import FORMATS, Limits, Options, empty, not_opened, tidied, unreadable
from luthier.data.sources.imports import LARGE, imported
from luthier.data.table import Table
from luthier.errors import DataError

PLAIN = (".txt", ".text", ".md")  # a paragraph, a line, or the whole file: what is one row cannot be told
PACKED = (".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar")

__all__ = ["FORMATS", "Limits", "look", "read"]


def read(
    dataset: Any,
    *,
    encoding: str | None = None,
    sheet: str | int | None = None,
    limits: Limits | None = None,
    sink: events.Sink = events.silent,
) -> Table:
    """The dataset as a Table.

    ``dataset`` is a Table (which is returned), a DataFrame, a mapping of columns, a list of mappings, a path to a file
    or to a folder saved by ``datasets``, or a hub dataset id (``owner/name``, ``owner/name:config``,
    ``owner/name@revision``).
    ``encoding`` is for text files whose encoding cannot be told; ``sheet`` (name, or number from 0) for workbooks.
    Raises DataError (data-unreadable, -empty, -encoding, -ragged, -limit) and DependencyError.
    """
    options = Options(encoding, sheet, limits or Limits())
    with events.stage(sink, "read", _describe(dataset)):
        table = _read_path(dataset, options, sink) if isinstance(dataset, (str, Path)) else _read_object(dataset)
    table = tidied(table)
    if not len(table):
        raise empty(table.name)
    for note in table.notes:
        sink(events.Note(text=f"{table.name}: {note}"))
    return table


def look(dataset: Any) -> None:
    """What can be said of a dataset's name without reading it.

    Raises DataError where it leads to nothing, to a file of no known format, or to one without bytes.
    """
    if not isinstance(dataset, (str, Path)):
        return
    name, path = str(dataset), Path(dataset).expanduser()
    if path.is_dir():
        return
    if path.exists():
        _look_at_file(path, name)
    elif not (isinstance(dataset, str) and hub.is_id(dataset)):
        raise _nowhere(path, name)


def _read_object(dataset: Any) -> Table:
    if isinstance(dataset, Table):
        return dataset
    if memory.is_frame(dataset):
        return memory.from_frame(dataset)
    if isinstance(dataset, Mapping):
        return memory.from_mapping(dataset)
    if isinstance(dataset, Sequence):
        return memory.from_rows(dataset)
    return memory.from_arrow(dataset)


def _read_path(dataset: str | Path, options: Options, sink: events.Sink) -> Table:
    name, path = str(dataset), Path(dataset).expanduser()
    if path.is_dir():
        return arrow.read_saved(path, name, options)
    if path.exists():
        return _read_file(path, name, options)
    if isinstance(dataset, str) and hub.is_id(dataset):
        return hub.read_hub(dataset, options, sink)
    raise _nowhere(path, name)


def _nowhere(path: Path, name: str) -> DataError:
    of_ludwig = "`ludwig://` names the data sets that Ludwig fetches: give the file, or its id on the hub (owner/name)"
    return DataError(
        "data-unreadable",
        f"there is no dataset {name!r}",
        where=str(path.absolute()),
        received=name,
        allowed="an existing file, a folder saved by `datasets`, or a hub dataset id such as owner/name",
        fix=of_ludwig if name.startswith("ludwig://") else _nearby(path),
    )


def _look_at_file(path: Path, name: str) -> None:
    suffix = path.suffix.lower()
    if suffix in PACKED:
        why, fix = "it is packed", "unpack it, and name the table that comes out"
        raise unreadable(name, why, received=suffix, allowed=sorted(FORMATS), fix=fix)
    if suffix not in FORMATS:
        raise DataError(
            "data-unreadable",
            f"{suffix} is not a dataset format" if suffix else f"{name} has no suffix that names a dataset format",
            where=name,
            received=suffix or "no suffix",
            allowed=sorted(FORMATS),
            fix="plain text has no rows: make a table with one column `text`, a document (or a page) in each row"
            if suffix in PLAIN
            else "rename the file after its format, or convert it to one of these",
        )
    if path.stat().st_size == 0:
        raise empty(name, "a file of 0 bytes")


def _read_file(path: Path, name: str, options: Options) -> Table:
    _look_at_file(path, name)
    try:
        reader = FORMATS.get(path.suffix.lower())
        if path.stat().st_size > LARGE:
            return imported(path, name, options, lambda *given: tidied(reader(*given)))  # what is kept is whole
        return reader(path, name, options)
    except OSError as error:
        raise not_opened(name, error) from error


def _nearby(path: Path) -> str:
    """What stands where the file was looked for, if something there is named much like it."""
    from luthier.registry import nearest

    folder = path.absolute().parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either; check the path"
    close = nearest(path.name, sorted(p.name for p in folder.iterdir())[:2000])
    return f"did you mean {close!r}?" if close else "check the path"


def _describe(dataset: Any) -> str:
    return str(dataset) if isinstance(dataset, (str, Path)) else type(dataset).__name__
