"""Every row of a table to token ids, by split, with the audit: the last thing that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from luthier.data.audit import Audit, make_audit
from luthier.data.render import Outcome, Renderer
from luthier.data.table import Table
from luthier.errors import DataError
from luthier.events import Sink, progress, silent, stage
from luthier.types import SPLITS, DataStats, Example, Split

CHUNK = 512  # rows encoded together: enough to keep the tokenizer's threads busy, few enough to report progress


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples by split, and which rows of the table they came from (rows that were dropped are not among them)."""

    examples: dict[Split, list[Example]]
    rows: dict[Split, list[int]]
    audit: Audit
    stats: DataStats  # of the training examples


def prepare(table: Table, splits: Sequence[int | None], renderer: Renderer, *, sink: Sink = silent) -> Prepared:
    """Render and tokenise the table. ``splits[i]`` is 0, 1 or 2 for row i (train, validation, test), None for neither.

    Raises:
        DataError: ``data-no-supervision`` when no token of the training split would be trained, with rows and reasons;
            whatever rendering a row raises.
    """
    assert len(splits) == len(table), f"{len(splits)} splits for {len(table)} rows"
    outcomes: dict[Split, list[Outcome]] = {split: [] for split in SPLITS}
    with stage(sink, "tokenise", f"{len(table):,} rows"):
        rows = ((i, table.row(i)) for i in progress(sink, "tokenise", range(len(table)), len(table), "rows"))
        chosen = ((i, row) for i, row in rows if splits[i] is not None)
        while chunk := list(islice(chosen, CHUNK)):
            for outcome in renderer.outcomes(chunk):
                number = splits[outcome.row]
                assert number is not None and 0 <= number < len(SPLITS), number
                outcomes[SPLITS[number]].append(outcome)
    audit = make_audit(outcomes, renderer.tokenizer, rendering=renderer.describe, notes=table.notes)
    examples = {split: [e for o in found for e in o.examples] for split, found in outcomes.items()}
    supervised = sum(e.supervised for e in examples["train"])
    if not supervised:
        raise _nothing_learned(table, audit, outcomes["train"])
    return Prepared(
        examples,
        {split: [o.row for o in found if o.examples] for split, found in outcomes.items()},
        audit,
        DataStats(tuple(e.length for e in examples["train"]), supervised, table.content_hash),
    )


def _nothing_learned(table: Table, audit: Audit, train: Sequence[Outcome]) -> DataError:
    mine = {o.row for o in train}
    reasons = {reason: [row for row in rows if row in mine] for reason, rows in audit.dropped.items()}
    said = [
        f"{len(rows):,} dropped, {reason} (rows {', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''})"
        for reason, rows in reasons.items()
        if rows
    ]
    return DataError(
        "data-no-supervision",
        "not one token of the training rows would be trained",
        where=table.name,
        received=f"{len(train):,} training rows: " + ("; ".join(said) or "none"),
        allowed="at least one training row with an answer that fits the maximum length",
        fix="check which column is the target, fill in its empty values, or raise preprocessing.max_sequence_length",
    )
