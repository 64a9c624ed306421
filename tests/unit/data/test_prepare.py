from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from rendering_fixtures import byte_level, prompt_section

from luthier.data.audit import percentiles
from luthier.data.columns import Layout
from luthier.data.prepare import Prepared, prepare
from luthier.data.render import Renderer
from luthier.data.table import Table
from luthier.errors import DataError
from luthier.events import Event, Progress

LAYOUT = Layout("completion", ("q",), "y")


def run(rows: list[tuple[Any, Any]], splits: list[int | None], limit: int | None = None, **keys: Any) -> Prepared:
    table = Table.from_columns({"q": [q for q, _ in rows], "y": [y for _, y in rows]}, "demo")
    section = SimpleNamespace(max_sequence_length=limit, global_max_sequence_length=None, truncation="truncate_prompt")
    return prepare(table, splits, Renderer(LAYOUT, prompt_section(), byte_level(), preprocessing=section), **keys)


def test_everything_is_counted() -> None:
    rows = [("a", "x"), (None, "y"), ("c", None), ("d <|im_end|>", "z"), ("a", "x"), ("a", "x"), ("left out", "x")]
    made = run(rows, [0, 0, 0, 0, 0, 1, None])
    audit = made.audit
    assert made.rows == {"train": [0, 1, 3, 4], "validation": [5], "test": []}
    assert [e.row for e in made.examples["train"]] == [0, 1, 3, 4]
    assert audit.dropped == {"no target": [2]}
    assert audit.missing == {"q": [1]}
    assert audit.control == [3] and audit.duplicates == [4] and audit.leaked == [5]
    assert (audit.answers, audit.ended) == (5, 5)
    assert list(made.stats.lengths) == [e.length for e in made.examples["train"]]
    assert made.stats.supervised_tokens == 8 == audit.splits["train"].supervised
    assert json.loads(json.dumps(audit.to_json()))["dropped"]["no target"] == {"count": 1, "rows": [2]}
    text = "\n".join(audit.lines())
    for said in (
        "no target: 1 row (2)",
        "'q' has no value",
        "control token",
        "equal to an earlier row",
        "in train too",
    ):
        assert said in text


def test_samples_show_what_is_trained() -> None:
    pieces = run([("a", "x")], [0]).audit.samples[0]
    assert [trained for _, trained in pieces] == [False, True]
    assert pieces[1][0] == "x<|im_end|>" and pieces[0][0].endswith("assistant\n")


def test_cut_rows_are_counted() -> None:
    audit = run([("a" * 60, "x"), ("a", "x"), ("a", "x" * 60)], [0, 0, 0], limit=45).audit
    assert audit.cut == {"truncate_prompt": [0]}
    assert audit.dropped == {"too long": [2]}


def test_nothing_to_learn() -> None:
    with pytest.raises(DataError) as caught:
        run([("a", None), ("b", ""), ("c", "x")], [0, 0, 1])
    assert caught.value.code == "data-no-supervision"
    assert "no target (rows 0, 1)" in str(caught.value)


def test_progress_is_reported() -> None:
    seen: list[Event] = []
    run([("a", "x")] * 3, [0, 0, 0], sink=seen.append)
    assert [e.completed for e in seen if isinstance(e, Progress)][-1] == 3


def test_percentiles() -> None:
    assert percentiles([]) == {}
    assert percentiles([5]) == {"min": 5, "p50": 5, "p90": 5, "p99": 5, "max": 5}
    assert percentiles(list(range(101)))["p90"] == 90
