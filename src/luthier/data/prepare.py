"""Every row of a table to token ids, by split, with the audit: the last thing that needs no model.

Rows are drafted (texts, chat templates in their worker process) while the rows before them are tokenised (the
`tokenizers` library's threads). With a cache folder the result is written to disk under a hash of everything that it
depends on, and memory does not grow with the rows; the same preparation is then there at once the next time.
"""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, Protocol

from luthier.assets.cache import build_once, code_hash, forget_old, read_made
from luthier.data.audit import Audit, AuditBuilder
from luthier.data.render import Outcome, Renderer
from luthier.data.share import Shared, beginnings
from luthier.data.store import ExampleStore, StoreWriter
from luthier.data.table import Table
from luthier.errors import DataError
from luthier.events import Note, Sink, progress, silent, stage
from luthier.types import SPLITS, DataStats, Example, Split

CHUNK = 512  # rows encoded together: enough to keep the tokenizer's threads busy, few enough to report progress
READERS = ("prepare", "share", "store", "audit", "conversation")
SOURCES = ("data/render", *(f"data/{name}.py" for name in READERS), "numbers.py", "assets")


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples by split, and which rows of the table they came from (rows that were dropped are not among them)."""

    examples: dict[Split, Sequence[Example]]
    rows: dict[Split, Sequence[int]]
    audit: Audit
    stats: DataStats  # of the training examples


class Sides(Protocol):
    """The side of each row: 0, 1 or 2 (train, validation, test), None for neither."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> int | None: ...


def prepare(
    table: Table, splits: Sides, renderer: Renderer, *, sink: Sink = silent, cache: Path | None = None
) -> Prepared:
    """Render and tokenise the table. ``splits[i]`` is 0, 1 or 2 for row i (train, validation, test), None for neither.

    ``cache``: the folder under which preparations are kept on disk; None keeps the examples in memory.

    Raises:
        DataError: ``data-no-supervision`` when no token of the training split would be trained, with rows and reasons;
            whatever rendering a row raises.
        RunError: ``run-no-space`` when the cache's disk is full.
    """
    assert len(splits) == len(table), f"{len(splits)} splits for {len(table)} rows"
    if cache is None:
        return _in_memory(table, splits, renderer, sink)
    folder = cache / "prepared" / _key(table, splits, renderer)
    if folder.is_dir():
        sink(Note(text="tokenised before: taken from the cache"))
    build_once(folder, lambda staging: _write(staging, table, splits, renderer, sink), inf)
    forget_old(folder)
    return _read(folder, table)


def _in_memory(table: Table, splits: Sides, renderer: Renderer, sink: Sink) -> Prepared:
    builder, shared = AuditBuilder(), Shared()
    examples: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    rows: dict[Split, list[int]] = {split: [] for split in SPLITS}
    for split, outcome in _outcomes(table, splits, renderer, sink):
        builder.add(split, outcome)
        examples[split] += outcome.examples
        _share(shared, split, outcome)
        rows[split] += [outcome.row] if outcome.examples else []
    audit = builder.finish(renderer.tokenizer, rendering=renderer.describe, notes=table.notes)
    _require_supervision(table, splits, audit, builder.supervised)
    lengths = array("i", [e.length for e in examples["train"]])
    stats = DataStats(lengths, builder.supervised, table.content_hash, shared.length, beginnings(examples["train"]))
    return Prepared(dict(examples), dict(rows), audit, stats)


def _write(folder: Path, table: Table, splits: Sides, renderer: Renderer, sink: Sink) -> None:
    builder, shared = AuditBuilder(), Shared()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(StoreWriter(folder, split)) for split in SPLITS}
        for split, outcome in _outcomes(table, splits, renderer, sink):
            builder.add(split, outcome)
            for example in outcome.examples:
                writers[split].append(example)
            _share(shared, split, outcome)
        audit = builder.finish(renderer.tokenizer, rendering=renderer.describe)
        _require_supervision(table, splits, audit, builder.supervised)
    parts = beginnings(ExampleStore(folder, "train"))
    stored = {
        "audit": audit.stored(),
        "supervised": builder.supervised,
        "shared": shared.length,
        "beginnings": parts,
    }
    (folder / "prepared.json").write_text(json.dumps(stored, ensure_ascii=True), encoding="utf-8")


def _read(folder: Path, table: Table) -> Prepared:
    stored = read_made(folder / "prepared.json")
    stores = {split: ExampleStore(folder, split) for split in SPLITS}
    audit = replace(Audit.restored(stored["audit"]), notes=table.notes)
    return Prepared(
        dict(stores),
        {split: store.rows for split, store in stores.items()},
        audit,
        DataStats(
            stores["train"].lengths,
            stored["supervised"],
            table.content_hash,
            stored["shared"],
            tuple((part, tokens) for part, tokens in stored["beginnings"]),
        ),
    )


def _share(shared: Shared, split: Split, outcome: Outcome) -> None:
    """What the training examples start with in common, one outcome further."""
    if split == "train":
        for example in outcome.examples:
            shared.add(example)


def _outcomes(table: Table, splits: Sides, renderer: Renderer, sink: Sink) -> Iterator[tuple[Split, Outcome]]:
    """What becomes of each row, with its split, in the order of the table."""
    with stage(sink, "tokenise", f"{len(table):,} rows"):
        counted = progress(sink, "tokenise", range(len(table)), len(table), "rows")
        rows = ((i, table.row(i)) for i in counted if splits[i] is not None)
        for drafted in _ahead(iter(lambda: list(islice(rows, CHUNK)), []), renderer.draft):
            for outcome in renderer.encode(drafted):
                number = splits[outcome.row]
                assert number is not None and 0 <= number < len(SPLITS), number
                yield SPLITS[number], outcome


def _ahead(chunks: Iterable[Any], work: Any) -> Iterator[Any]:
    """``work`` of each chunk in order, the next one under way in a thread while the caller uses the last."""
    with ThreadPoolExecutor(1, "draft") as pool:
        waiting = None
        for chunk in chunks:
            begun = pool.submit(work, chunk)
            if waiting is not None:
                yield waiting.result()
            waiting = begun
        if waiting is not None:
            yield waiting.result()


def _key(table: Table, splits: Sides, renderer: Renderer) -> str:
    """A hash of everything that the tokenised examples depend on."""
    sides = bytes(255 if side is None else side for side in splits)  # type: ignore[attr-defined]
    parts = (
        table.content_hash,
        hashlib.sha256(sides).hexdigest(),
        renderer.fingerprint,
        _code(),
        metadata.version("tokenizers"),
        metadata.version("jinja2"),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


@functools.cache
def _code() -> str:
    """A hash of the code that makes examples of rows, so that no result of an older version is taken for this one's."""
    root = Path(__file__).parents[1]
    return code_hash(*(root / name for name in SOURCES))


def _require_supervision(table: Table, splits: Sides, audit: Audit, supervised: int) -> None:
    """Raises DataError ``data-no-supervision`` where nothing would be learned."""
    if supervised:
        return
    reasons = {reason: [row for row in rows if splits[row] == 0] for reason, rows in audit.dropped.items()}
    said = [
        f"{len(rows):,} dropped, {reason} (rows {', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''})"
        for reason, rows in reasons.items()
        if rows
    ]
    count = sum(1 for row in range(len(table)) if splits[row] == 0)
    raise DataError(
        "data-no-supervision",
        "not one token of the training rows would be trained",
        where=table.name,
        received=f"{count:,} training rows: " + ("; ".join(said) or "none"),
        allowed="at least one training row with an answer that fits the maximum length",
        fix="check which column is the target, fill in its empty values, or raise preprocessing.max_sequence_length",
    )
