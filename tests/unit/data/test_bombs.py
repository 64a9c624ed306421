"""Files of kilobytes that would make gigabytes of themselves: refused before they do, with the limit to raise."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from luthier.data.sources import Limits, read
from luthier.errors import DataError

MB = 1 << 20


def refused(path: Path, limit: str, **limits: int) -> None:
    began = time.process_time()
    with pytest.raises(DataError) as caught:
        read(path, limits=Limits(**limits))
    assert caught.value.code == "data-limit"
    assert f"preprocessing.limits.{limit}" in str(caught.value.faults[0].fix)
    assert time.process_time() - began < 5


def arrow(path: Path, column: Any, *, stream: bool = False, compression: str | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    table = pa.table({"q": column})
    begin = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as out, begin(out, table.schema, options=options) as writer:
        writer.write_table(table)
    return path


def shared_views(count: int) -> pa.Array:
    """So many texts that are all the same megabyte."""
    views = b"".join(MB.to_bytes(4, "little") + b"aaaa" + bytes(8) for _ in range(count))
    parts = [None, pa.py_buffer(views), pa.py_buffer(b"a" * MB)]
    return pa.StringViewArray.from_buffers(pa.string_view(), count, parts)


ARROW: dict[str, Callable[[], pa.Array]] = {
    "a dictionary of one long text": lambda: pa.DictionaryArray.from_arrays(pa.array([0] * 100_000), ["a" * MB]),
    "rows without bytes": lambda: pa.nulls(2**31 - 1),
    "texts that share their bytes": lambda: shared_views(10_000),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ARROW)
def test_arrow(name: str, stream: bool, tmp_path: Path) -> None:
    refused(arrow(tmp_path / "x.arrow", ARROW[name](), stream=stream), "unpacked_bytes")


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("stream", [True, False])
def test_compressed_arrow(compression: str, stream: bool, tmp_path: Path) -> None:
    path = arrow(tmp_path / "x.arrow", pa.array(["a" * MB] * 40), stream=stream, compression=compression)
    refused(path, "unpacked_bytes", unpacked_bytes=20 * MB)
    assert len(read(path)) == 40
    good = arrow(tmp_path / "x.arrow", pa.array(["é", None, "b"]), stream=stream, compression=compression)
    assert [read(good).row(i)["q"] for i in range(3)] == ["é", None, "b"]


def test_a_saved_dataset_that_names_a_file_again_and_again(tmp_path: Path) -> None:
    arrow(tmp_path / "x.arrow", pa.array(["a"]), stream=True)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}] * 9}), encoding="utf-8")
    with pytest.raises(DataError, match="names a file twice"):
        read(tmp_path)


def test_plain_texts_of_polars_are_read(tmp_path: Path) -> None:
    path = arrow(tmp_path / "x.arrow", pa.array(["a text of more than twelve bytes", "b", None], pa.string_view()))
    assert [read(path).row(i)["q"] for i in range(3)] == ["a text of more than twelve bytes", "b", None]


def test_columns(tmp_path: Path) -> None:
    rows = [json.dumps({f"k{i}": 1}) for i in range(20_000)]
    texts = {"x.csv": "," * 200_000 + "\nx", "x.jsonl": "\n".join(rows), "x.json": f"[{','.join(rows)}]"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        refused(tmp_path / name, "columns")
    refused(tmp_path / "x.jsonl", "unpacked_bytes", columns=10**6)
    refused(tmp_path / "x.json", "unpacked_bytes", columns=10**6)
    few = "\n".join(json.dumps({f"k{i % 50}": 1, "text": "some text"}) for i in range(2000))
    (tmp_path / "x.jsonl").write_text(few, encoding="utf-8")
    assert len(read(tmp_path / "x.jsonl").columns) == 51


def workbook(path: Path, part: str, before: bytes, put: bytes) -> Path:
    """A workbook of five rows with something put into one of its parts."""
    import openpyxl

    book, plain = openpyxl.Workbook(), io.BytesIO()
    for row in (("question", "answer"), *((f"a{i}", f"b{i}") for i in range(5))):
        book.active.append(row)
    book.save(plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(before, put + before) if part in name else content)
    return path


def test_workbooks(tmp_path: Path) -> None:
    path = tmp_path / "x.xlsx"
    end, merged = b"</sheetData>", b'<mergeCells count="1"><mergeCell ref="A1:XFD1048576"/></mergeCells>'
    for part, before, put in (
        ("sheet1", end, b"<row>" + b"<c/>" * 450_000 + b"</row>"),
        ("sheet1", end, b"<x:row xmlns:x='y'>" + b"<x:c/>" * 450_000 + b"</x:row>"),
        ("sheet1", end, b"<row/>" * 450_000),
        ("sheet1", end, b"<row><c>" + b"<v/>" * 1_900_000 + b"</c></row>"),
        ("styles", b"</cellXfs>", b"<xf/>" * 450_000),
        ("sheet1", b"<pageMargins", merged),
    ):
        refused(workbook(path, part, before, put), "cells", cells=200_000)
    small = merged.replace(b"A1:XFD1048576", b"$A$2:$A$3")
    table = read(workbook(path, "sheet1", b"<pageMargins", small))
    assert [table.row(i)["question"] for i in range(3)] == ["a0", "a0", "a2"]
    assert len(read(workbook(path, "sheet1", end, b""), limits=Limits(cells=20))) == 5
