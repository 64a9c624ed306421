from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from rendering_fixtures import CHATML, byte_level, prompt_section

from luthier.data.audit import percentiles
from luthier.data.conversation import conversation
from luthier.data.layout import Layout
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


def test_reasoning_reaches_a_template_that_reads_it_and_other_keys_are_told() -> None:
    answer = {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "two <|im_end|> twos",
        "rating": 5,
        "note": None,
    }
    turns = [{"role": "user", "content": "2+2?"}, answer, {"role": "user", "content": "so?", "thinking": {"a": 1}}]
    table = Table.from_columns({"messages": [turns, [turns[0], {"role": "assistant", "content": "4"}]]}, "demo")
    layout = Layout("chat", (), "messages")
    reading = CHATML.replace("m['content']", "(m.reasoning_content | default('')) + '=' + m['content']")

    def audit(template: str) -> Any:
        made = Renderer(layout, prompt_section(chat_template=template), byte_level(template))
        return prepare(table, [0, 0], made).audit

    with_it, without = audit(reading), audit(CHATML)
    assert with_it.unread == {"rating": [0], "thinking": [0]}
    assert with_it.control == [0]  # the reasoning is data: what it spells is text
    assert any(text.startswith("two <|im_end|> twos=4") and trained for text, trained in with_it.samples[0])
    assert without.unread == {"rating": [0], "thinking": [0], "reasoning_content": [0]}
    assert "key 'reasoning_content' of a turn, which nothing reads: 1 row (0)" in without.lines()
    assert without.to_json()["unread"]["rating"] == {"count": 1, "rows": [0]}


def test_a_system_prompt_that_is_no_text_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    layout = Layout("chat", (), "messages", system="system")
    assert conversation({**row, "system": [{"type": "text", "text": "Be brief."}]}, layout)[0].content == "Be brief."
    assert conversation({**row, "system": None}, layout)[0].role == "user"
    with pytest.raises(DataError) as caught:
        conversation({**row, "system": 5}, layout)
    assert caught.value.code == "data-chat" and "column system" in str(caught.value.faults[0].where)


def test_what_parts_of_the_rows_start_with_is_part_of_what_is_known() -> None:
    rows = [("AB"[i % 2] * 60 + str(i), "x") for i in range(40)]
    stats = run([*rows, ("other", "x")], [0] * 40 + [1]).stats
    assert [part for part, _ in stats.beginnings] == [0.5, 0.5]
    assert all(tokens > (stats.shared_prefix or 0) + 59 for _, tokens in stats.beginnings)
    assert run([("q", "x")], [0]).stats.beginnings == ()


def test_conversations_that_begin_with_an_answer_are_counted() -> None:
    hello, asked, answered = (
        {"role": role, "content": text} for role, text in (("assistant", "Hi"), ("user", "a"), ("assistant", "b"))
    )
    table = Table.from_columns({"messages": [[hello, asked, answered], [asked, answered], [hello]]}, "demo")
    made = Renderer(Layout("chat", (), "messages"), prompt_section(), byte_level())
    audit = prepare(table, [0, 0, 0], made).audit
    assert audit.unprompted == [0, 2] and audit.answers == 2
    assert audit.dropped == {"nothing precedes the answer": [2]}
    assert "conversation that begins with an answer, which is not learned: 2 rows (0, 2)" in audit.lines()
    assert audit.to_json()["unprompted_answers"] == {"count": 2, "rows": [0, 2]}
