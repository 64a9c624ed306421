from __future__ import annotations

from collections import Counter

import pytest

from luthier.data.source import TableSource
from luthier.errors import DataError
from luthier.types import Example

EXAMPLES = [Example((i,), (1.0,), i) for i in range(10)]


def source(seed: int = 1, data_hash: str = "h", batch: int = 4, shuffle: bool = True) -> TableSource:
    return TableSource(EXAMPLES, batch, seed, data_hash, shuffle)


def test_an_epoch_sees_everything_once() -> None:
    made = source()
    assert made.steps_per_epoch == 3
    steps = [made.next_step() for _ in range(3)]
    assert [len(s) for s in steps] == [4, 4, 2]
    assert sorted(e.row for s in steps for e in s) == list(range(10))
    assert made.state() == {"epoch": 1, "step": 0}


def test_order_is_a_function_of_seed_epoch_and_data() -> None:
    orders = [source().order(0), source().order(1), source(seed=2).order(0), source(data_hash="g").order(0)]
    assert len({tuple(o) for o in orders}) == 4
    assert list(source().order(0)) == list(source(batch=1).order(0)) == [0, 8, 6, 7, 9, 2, 4, 5, 3, 1]


def test_restored_equals_straight() -> None:
    straight = source()
    taken = [straight.next_step() for _ in range(8)]
    for at in range(8):
        first = source()
        for _ in range(at):
            first.next_step()
        second = source()
        second.restore(first.state())
        assert [second.next_step() for _ in range(8 - at)] == taken[at:]


def test_unshuffled() -> None:
    assert [e.row for e in source(shuffle=False).next_step()] == [0, 1, 2, 3]


def test_no_examples() -> None:
    with pytest.raises(DataError) as caught:
        TableSource([], 4, 1, "h")
    assert caught.value.code == "data-no-supervision"


def test_balanced_classes_fill_an_epoch_alike() -> None:
    classes = ["a"] * 7 + ["b"] * 2 + ["c"]
    made = TableSource(EXAMPLES, 4, 1, "h", classes=classes)
    assert made.steps_per_epoch == 6  # 3 classes of 7
    epochs = [made.order(epoch) for epoch in range(2)]
    for order in epochs:
        counts = Counter(order)
        assert [counts[i] for i in range(7)] == [1] * 7
        assert sorted(counts[i] for i in (7, 8)) == [3, 4] and counts[9] == 7
    assert epochs[0] != epochs[1] == made.order(1)
    assert sorted(e.row for _ in range(6) for e in made.next_step()) == sorted(epochs[0])
    still = TableSource(EXAMPLES, 4, 1, "h", shuffle=False, classes=classes)
    assert still.order(0) == still.order(1) == sorted(still.order(0))


def test_micro_batches_weigh_the_same_together() -> None:
    rows = [Example((1,) * (2 + i), (0.0, *[1.0] * (1 + i)), i) for i in range(7)] + [Example((1, 1), (0.0, 0.0), 7)]
    step = TableSource(rows, 8, 1, "h", shuffle=False, micro_batch=3).next_step()
    assert [one.row for one in step] == list(range(8)) and step[7].weights == (0.0, 0.0)
    assert [sum(sum(one.weights) for one in step[at : at + 3]) for at in (0, 3, 6)] == pytest.approx([1.0] * 3)
    assert step[1].weights[1] == step[2].weights[1] == pytest.approx(1 / 6)
