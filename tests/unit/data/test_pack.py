from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.data.pack import schedule
from luthier.types import Plan


@given(lengths=st.lists(st.integers(1, 90), max_size=40), room=st.integers(1, 200), world=st.integers(1, 4))
def test_schedule(lengths: list[int], room: int, world: int) -> None:
    ranks = schedule(lengths, Plan("cpu", room), world)
    assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
    passes = [p for rank in ranks for p in rank if p]
    assert sorted(i for p in passes for i in p) == list(range(len(lengths)))
    assert all(len(p) == 1 or len(p) * max(lengths[i] for i in p) <= room for p in passes)


def test_similar_lengths_share_a_pass() -> None:
    assert schedule([5, 90, 6, 88], Plan("cpu", 180)) == [[[1, 3], [2, 0]]]


def test_a_long_row_is_alone() -> None:
    assert schedule([500, 4], Plan("cpu", 100)) == [[[0], [1]]]


@given(lengths=st.lists(st.integers(1, 90), max_size=40), room=st.integers(1, 200), world=st.integers(1, 4))
def test_packed_passes(lengths: list[int], room: int, world: int) -> None:
    ranks = schedule(lengths, Plan("cpu", room, "decoder"), world)
    assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
    passes = [p for rank in ranks for p in rank if p]
    assert sorted(i for p in passes for i in p) == list(range(len(lengths)))
    assert all(len(p) == 1 or sum(lengths[i] for i in p) <= room for p in passes)
    least = -(-max(1, 2 * sum(lengths) / room) // world) * world  # what first-fit promises, as many for each rank
    assert len(passes) <= least


def test_every_rank_has_its_share() -> None:
    for model in ("decoder", "generic"):
        ranks = schedule([30] * 16, Plan("cpu", 10_000, model), 4)
        assert [[len(indices) for indices in rank] for rank in ranks] == [[4]] * 4


def test_packed_passes_are_level() -> None:
    assert schedule([50, 50, 20, 20, 20, 20], Plan("cpu", 100, "decoder")) == [[[0, 2, 4], [1, 3, 5]]]


def level_of(lengths: list[int], room: int) -> list[list[int]]:
    """First-fit, longest first, and levelled where that keeps within ``room``: step by step."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fitted: list[list[int]] = []
    for index in order:
        into = next((own for own in fitted if sum(lengths[i] for i in own) + lengths[index] <= room), None)
        if into is None:
            fitted.append(into := [])
        into.append(index)
    level: list[list[int]] = [[] for _ in fitted]
    for index in order:
        min(level, key=lambda own: sum(lengths[i] for i in own)).append(index)

    def tokens(passes: list[list[int]]) -> list[int]:
        return [sum(lengths[i] for i in own) for own in passes]

    fits = all(size <= room or len(own) == 1 for size, own in zip(tokens(level), level, strict=True))
    return level if fits and max(tokens(level), default=0) <= max(tokens(fitted), default=0) else fitted


@given(lengths=st.lists(st.integers(1, 90), max_size=40), room=st.integers(1, 2000))
def test_packing_is_first_fit_levelled(lengths: list[int], room: int) -> None:
    assert schedule(lengths, Plan("cpu", room, "decoder"))[0] == level_of(lengths, room)
