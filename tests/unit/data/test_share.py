from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.data.share import LEAST, cut, free, shared_by_all
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
