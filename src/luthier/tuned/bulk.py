"""Predictions of any number of rows straight into a file: flat in memory, and nothing is made twice after a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.run.output import require_ours
from luthier.tuned.answered import Answered
from luthier.tuned.writing import Journal, answers_file, are_answers

if TYPE_CHECKING:
    from luthier.tuned.tuned import Tuned

ASKED = 4096  # rows whose prompts are held at one time


@dataclass(frozen=True)
class Written:
    """What was written: the file, its rows, and how many of them hold an error in place of an answer."""

    path: Path
    rows: int
    errors: int


def predict_into(
    path: Path,
    tuned: Tuned,
    dataset: Any,
    *,
    encoding: str | None = None,
    use_base: bool = False,
    generation: Mapping[str, Any] | None = None,
    probabilities: bool | None = None,
    sink: events.Sink = events.silent,
) -> Written:
    """`Tuned.predict` into `answers_file` of ``path``.

    While it runs, finished rows stand in ``<file>.partial``; the same call goes on from there after it was ended.

    Raises DataError as `answers_file` and reading the table do, RunError run-foreign-files where the file is none of
    ours.
    """
    path = answers_file(path)
    require_ours(path, are_answers)  # before the work
    table = tuned.read(dataset, encoding, sink)
    probabilities = tuned.reader is not None if probabilities is None else probabilities
    sampling = tuned.sampling(generation)
    asked = [asdict(sampling), use_base, probabilities, tuned.temperature]
    work = [table.content_hash, *asked, tuned.output, *_identity(tuned)]
    journal = Journal(path, hashlib.sha256(json.dumps(work, default=repr).encode()).hexdigest())
    if journal.foreign:
        sink(events.Warned(text=f"{journal.path.name} was left by other work and has been replaced"))
    if journal.done:
        sink(events.Note(text=f"going on: {len(journal.done)} of {len(table)} rows were finished before"))
    left = [row for row in range(len(table)) if row not in journal.done]
    try:
        with events.stage(sink, "generate", f"{len(left)} rows" + (", base model" if use_base else "")):
            for start in range(0, len(left), ASKED):
                told = events.part_of(sink, "generate", start, len(left))
                part = left[start : start + ASKED]
                options: Any = {"use_base": use_base, "generation": generation, "probabilities": probabilities}
                for done, scores in tuned.each(table, part, sink=told, **options):
                    one = Answered(
                        tuned.output, (done.key,), (done,), (None,), tuned.reader, (scores,) if probabilities else None,
                        1.0 if use_base else tuned.temperature,
                    )  # fmt: skip
                    journal.add(one.records()[0])
        errors = journal.errors
        journal.finish(range(len(table)))
    finally:
        journal.close()
    return Written(path, len(table), errors)


def _identity(tuned: Tuned) -> list[Any]:
    """What tells this model from another one, also from one that the same folder held earlier."""
    if tuned.folder is None:
        return [id(tuned.model)]
    files = [tuned.folder / "run.json", *sorted(tuned.folder.glob("*/*.safetensors"))]
    return [str(tuned.folder), *((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists())]
