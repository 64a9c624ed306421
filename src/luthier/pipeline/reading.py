"""A dataset as a config wants it read, and what is what in it."""

from __future__ import annotations

from typing import Any

from luthier import events
from luthier.config import Config
from luthier.data import columns, sources
from luthier.data.layout import Layout
from luthier.data.redact import redact
from luthier.data.render.template import fields_of
from luthier.data.sample import sampled
from luthier.data.table import Table


def read_table(settings: Config, dataset: Any, *, encoding: str | None, sink: events.Sink) -> Table:
    """The rows to learn from: a sample where that is asked for, with what shall not be learned taken out of them."""
    given = settings.preprocessing
    limits = sources.Limits(**given.limits.model_dump())
    whole = sources.read(dataset, encoding=encoding or given.encoding, sheet=given.sheet, limits=limits, sink=sink)
    table = sampled(whole, given.sample_ratio, given.sample_size, settings.random_seed)
    table = redact(table, given.redact)
    for note in table.notes[len(whole.notes) :]:
        sink(events.Note(text=note))
    return table


def layout_of(settings: Config, table: Table) -> Layout:
    """The roles of the table's columns, as the config says or as they are found. Raises DataError as `detect`."""
    split, template = settings.preprocessing.split, settings.prompt.template
    output = settings.output_features[0] if settings.output_features else None
    return columns.detect(
        table,
        inputs=[f.name for f in settings.input_features] if settings.input_features else None,
        target=output.name if output else None,
        category=output.type == "category" if output and "type" in output.model_fields_set else None,
        exclude=[name for name in (split.group, split.column) if name is not None],
        written=() if template is None else fields_of(template),
    )
