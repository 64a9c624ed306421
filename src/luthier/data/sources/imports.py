"""Large files are read once into an Arrow file in the cache, and are memory-mapped from there ever after."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from math import inf
from pathlib import Path

from luthier.assets.cache import build_once, code_hash, forget_old, read_made, remembered_hash, writable_cache
from luthier.data.sources.formats import Options, Reader, check_size, mapped
from luthier.data.table import Table

LARGE = 64 << 20  # bytes of a file from which on it is kept in the cache; below, reading it again is as fast


def imported(path: Path, name: str, options: Options, reader: Reader) -> Table:
    """What ``reader`` makes of the file, from the cache where it is there; the key is the content, not the name."""
    root = writable_cache()
    if root is None:
        return reader(path, name, options)
    check_size(path, name, options)
    parts = (remembered_hash(path, root), path.suffix.lower(), repr(replace(options, spill=None)), _code())
    folder = root / "tables" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]
    build_once(folder, lambda staging: _write(staging, path, name, options, reader), inf)
    forget_old(folder)
    known = read_made(folder / "table.json")
    hashes = (str(known["content_hash"]), (folder / "rows.hash").read_bytes())
    return Table(mapped(folder / "rows.arrow"), name, known["notes"], hashes=hashes)


def _write(folder: Path, path: Path, name: str, options: Options, reader: Reader) -> None:
    import pyarrow as pa

    spill = folder / "spill.arrow"
    table = reader(path, name, replace(options, spill=spill))
    rows = folder / "rows.arrow"
    if spill.is_file() and mapped(spill).schema.equals(table.rows.schema, check_metadata=True):
        spill.rename(rows)
    else:
        with pa.OSFile(str(rows), "wb") as out, pa.ipc.new_file(out, table.rows.schema) as writer:
            writer.write_table(table.rows, max_chunksize=4096)
        spill.unlink(missing_ok=True)
    (folder / "rows.hash").write_bytes(table.row_hashes)
    known = {"format": 1, "notes": list(table.notes), "content_hash": table.content_hash}
    (folder / "table.json").write_text(json.dumps(known), encoding="utf-8")


@functools.cache
def _code() -> str:
    here = Path(__file__).parent
    return code_hash(here, here.parent / "table.py", here.parents[1] / "numbers.py")
