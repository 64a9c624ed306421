"""Examples on disk come back as they went in; a preparation is made once and found again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering_fixtures import byte_level, prompt_section

from luthier.data import store as stores
from luthier.data.layout import Layout
from luthier.data.prepare import Prepared, prepare
from luthier.data.render import Renderer
from luthier.data.store import ExampleStore, StoreWriter
from luthier.data.table import Table
from luthier.errors import DataError, RunError
from luthier.events import Event, Note
from luthier.types import Example

LAYOUT = Layout("completion", ("q",), "y")
IDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9)


def made(tmp_path: Path, examples: list[Example]) -> ExampleStore:
    with StoreWriter(tmp_path, "train") as writer:
        for example in examples:
            writer.append(example)
    return ExampleStore(tmp_path, "train")


@given(rows=st.lists(IDS, max_size=12), fraction=st.sampled_from([1.0, 0.25]), buffer=st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[Any], fraction: float, buffer: int) -> None:
    examples = [
        Example(tuple(ids), (0.0, *[fraction] * (len(ids) - 1)), 2 * (n // 2), n % 2) for n, ids in enumerate(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "BUFFER", buffer)
        store = made(tmp_path_factory.mktemp("store"), examples)
    assert list(store) == examples and len(store) == len(examples)
    assert list(store.lengths) == [e.length for e in examples]
    assert list(store.rows) == sorted({e.row for e in examples})
    assert list(store[1:9:2]) == examples[1:9:2] and list(store[1:9:2].lengths) == [e.length for e in examples[1:9:2]]
    if examples:
        assert store[-1] == examples[-1]
    with pytest.raises(IndexError):
        store[len(examples)]


def test_weights_of_zero_and_one_take_a_byte(tmp_path: Path) -> None:
    made(tmp_path, [Example((1, 2, 3), (0.0, 1.0, 1.0), 0)])
    assert (tmp_path / "train.weights").stat().st_size == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.ids", b"\1\0\0\0"),
        ("train.weights", b"\1\1\1\1"),
        ("train.ends", b"\2"),
        ("train.origins", bytes(8)),
        ("train.origins", bytes(32)),
        ("train.json", b'{"weights": "O"}'),  # objects: the bytes of a file would be taken for addresses
        ("train.json", b"[]"),
    ],
)
def test_files_that_were_changed_are_told(name: str, content: bytes, tmp_path: Path) -> None:
    made(tmp_path, [Example((1, 2, 3), (0.0, 1.0, 1.0), 0)])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=f"delete {tmp_path}") as caught:
        ExampleStore(tmp_path, "train")
    assert caught.value.code == "run-damaged"


def prepared(cache: Path | None, count: int = 20, template: str = "{q}", sink: Any = None) -> Prepared:
    table = Table.from_columns({"q": [f"q{n}" for n in range(count)], "y": ["y" * n for n in range(count)]}, "demo")
    renderer = Renderer(LAYOUT, prompt_section(template=template), byte_level())
    return prepare(table, [n % 3 for n in range(count)], renderer, cache=cache, **({"sink": sink} if sink else {}))


def test_on_disk_equals_in_memory(tmp_path: Path) -> None:
    here, there = prepared(None), prepared(tmp_path)
    assert {k: list(v) for k, v in there.examples.items()} == here.examples
    assert {k: list(v) for k, v in there.rows.items()} == here.rows
    assert there.audit == here.audit and there.stats == here.stats
    again = prepared(tmp_path)
    assert again.audit == here.audit and list(again.examples["test"]) == here.examples["test"]


def test_found_again_only_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**keys: Any) -> bool:
        events: list[Event] = []
        prepared(tmp_path, sink=events.append, **keys)
        return any(isinstance(e, Note) and "cache" in e.text for e in events)

    assert [told(), told()] == [False, True]
    assert [told(template="{q}?"), told(count=21)] == [False, False]
    monkeypatch.setattr("luthier.data.prepare._code", lambda: "other code")
    assert not told()


def test_what_fails_leaves_nothing_to_find(tmp_path: Path) -> None:
    table = Table.from_columns({"q": ["a"], "y": [None]}, "demo")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            prepare(table, [0], Renderer(LAYOUT, prompt_section(template="{q}"), byte_level()), cache=tmp_path)
        assert caught.value.code == "data-no-supervision"
