from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.data.share import LEAST, PASS, SAMPLED, beginnings, begun_of, cut, free, saved_of, shared_by_all
from luthier.types import Example, Plan

PREFIX = tuple(range(100, 100 + LEAST))


def example(row: int, ids: tuple[int, ...], trained: int = 1) -> Example:
    return Example(ids, (0.0,) * (len(ids) - trained) + (1.0,) * trained, row)


@st.composite
def batches(draw: st.DrawFn) -> list[Example]:
    """Samples that start with up to two of a few templates, and are trained from anywhere."""
    templates = [(7,) * LEAST, (8,) * (LEAST + 3), (7,) * LEAST + (9,) * 5]
    out = []
    for row in range(draw(st.integers(0, 9))):
        ids = draw(st.sampled_from([(), *templates])) + tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
        trained = draw(st.integers(0, len(ids)))
        out.append(example(row, ids, trained))
    return out


@given(batches())
def test_pieces_make_up_the_examples_and_share_nothing_that_is_trained(rows: list[Example]) -> None:
    pieces = cut(rows)
    seen = []
    for at, piece in enumerate(pieces):
        children = [one for one in pieces if one.parent == at]
        if children:
            assert piece.start == 0 and piece.parent == -1 and piece.stop >= LEAST and len(children) >= 2
            for child in children:
                assert child.start == piece.stop < child.stop and piece.stop <= free(rows[child.example])
                assert tuple(rows[child.example].ids[: piece.stop]) == tuple(rows[piece.example].ids[: piece.stop])
            continue
        assert piece.stop == rows[piece.example].length and (piece.start == 0) == (piece.parent == -1)
        assert piece.parent < at
        seen.append(piece.example)
    assert sorted(seen) == list(range(len(rows)))
    assert sum(one.stop - one.start for one in pieces) <= sum(one.length for one in rows)


@given(batches())
def test_a_shared_batch_trains_the_same_tokens(rows: list[Example]) -> None:
    def trained(share: bool) -> list[tuple[int, float, int]]:
        batch = collate(rows, 3, share=share)
        assert batch.supervised is not None and batch.source is not None
        at = batch.supervised
        assert (batch.positions[batch.source] == batch.positions[at] - 1).all()
        return sorted(zip(batch.ids[at].tolist(), batch.target_weight[at].tolist(), batch.positions[at].tolist(),
                          strict=True))  # fmt: skip

    assert trained(True) == trained(False)


def test_what_all_start_with() -> None:
    rows = [example(0, (*PREFIX, 1, 2)), example(1, (*PREFIX, 1, 3, 4)), example(2, (*PREFIX, 5))]
    assert shared_by_all(rows) == LEAST
    assert shared_by_all(rows[:2]) == LEAST + 1
    assert shared_by_all([*rows, example(3, (1, 2))]) == 0
    assert shared_by_all([]) == 0
    assert shared_by_all([rows[0], example(3, (*PREFIX, 1, 2), trained=8)]) == 0  # what is trained is not shared


def test_the_longer_of_two_beginnings_is_chosen_where_it_saves_more() -> None:
    long = tuple(range(200, 250))
    rows = [example(i, (*PREFIX, *long, i)) for i in range(3)] + [example(9, (*PREFIX, 9))]
    assert [(one.stop, one.parent) for one in cut(rows)][:4] == [(66, -1), (67, 0), (67, 0), (67, 0)]
    assert cut(rows)[-1].parent == -1


@given(lengths=st.lists(st.integers(31, 90), max_size=40), room=st.integers(95, 200))
def test_passes_hold_a_common_beginning_once(lengths: list[int], room: int) -> None:
    shared = 30
    passes = schedule(lengths, Plan("cpu", room, "decoder"), shared=shared)[0]
    assert sorted(i for p in passes for i in p) == list(range(len(lengths)))
    assert all(shared + sum(lengths[i] - shared for i in p) <= room for p in passes if p)
    assert len(passes) <= len(schedule(lengths, Plan("cpu", room, "decoder"))[0])


def test_what_parts_of_the_rows_start_with() -> None:
    """Two system prompts behind the same few tokens, and rows of their own; in whatever order they come."""
    first, second = (*PREFIX, *range(300, 400)), (*PREFIX, *range(500, 540))
    draw = random.Random(1)
    rows = [example(i, (*first, 1000 + i, 1)) for i in range(60)] + [example(i, (*second, 2000 + i)) for i in range(30)]
    rows += [example(i, (3000 + i,) * 20) for i in range(10)]
    for _ in range(3):
        assert beginnings(rows) == ((0.6, 116), (0.3, 56))
        draw.shuffle(rows)
    assert beginnings([example(i, (*PREFIX, i, 2)) for i in range(40)]) == ((1.0, LEAST),)
    assert beginnings([example(i, (i, 2, 3)) for i in range(40)]) == () == beginnings([])
    assert beginnings(rows[:1]) == ()
    assert beginnings([example(i, (*PREFIX, i, 2), trained=9) for i in range(40)]) == ()  # what is trained


def test_rows_that_alternate_or_are_very_many_are_sampled() -> None:
    starts = [(k,) * (LEAST + k) for k in (1, 2)]
    rows = [example(i, (*starts[i % 2], 10_000 + i)) for i in range(4 * SAMPLED)]
    rows.append(example(0, (5, 6)))  # one that is odd takes nothing from the rest
    found = beginnings(rows)
    assert {tokens for _, tokens in found} == {LEAST + 1, LEAST + 2}
    assert all(part == pytest.approx(0.5, abs=0.05) for part, _ in found)


def test_what_a_pass_of_drawn_rows_saves() -> None:
    assert saved_of(((1.0, 40),), 6) == 5 * 40 and begun_of(((1.0, 40),), 6) == 40
    assert saved_of(((1.0, 40),), 1) == 0 == begun_of(((1.0, 40),), 1)
    parts = ((0.5, 100), (0.25, 40))
    draw, saved, begun, times = random.Random(3), 0, 0, 4000
    for _ in range(times):
        drawn = draw.choices([*parts, (0.25, 0)], [0.5, 0.25, 0.25], k=PASS // 4)
        for _, tokens in parts:
            count = sum(1 for _, own in drawn if own == tokens)
            saved += max(count - 1, 0) * tokens
            begun += count * tokens if count > 1 else 0
    assert saved_of(parts, PASS // 4) == pytest.approx(saved / times, rel=0.03)
    assert begun_of(parts, PASS // 4) == pytest.approx(begun / times / (PASS // 4), rel=0.03)
