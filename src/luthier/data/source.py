"""The steps of training over a table: which examples each optimizer step takes, a pure function of three numbers."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace

from luthier.errors import DataError
from luthier.types import Example


def order(
    count: int, epoch: int, seed: int, data_hash: str, shuffle: bool = True, *, purpose: str = "order"
) -> Sequence[int]:
    """Indices of ``count`` examples in the order of ``epoch``, 8 bytes each; the planner asks for the steps to come."""
    if not shuffle:
        return range(count)
    import numpy as np

    digest = hashlib.sha256(f"{purpose}\0{seed}\0{epoch}\0{data_hash}".encode()).digest()
    keys = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return array("q", np.argsort(keys, kind="stable").astype("i8").tobytes())


def weighed(step: Sequence[Example], micro_batch: int) -> list[Example]:
    """The examples of a step, the weights of each ``micro_batch`` of them divided by their sum.

    The mean over supervised tokens is then the mean over micro-batches of their means. A micro-batch without a weight
    stays as it is.
    """
    out: list[Example] = []
    for start in range(0, len(step), micro_batch):
        part = step[start : start + micro_batch]
        total = sum(sum(example.weights[1:]) for example in part)  # nothing precedes the first token
        out += (
            [replace(one, weights=tuple(weight / total for weight in one.weights)) for one in part] if total else part
        )
    return out


class TableSource:
    """A `StepSource` over fixed examples. The order of an epoch depends on (seed, epoch, data_hash) and nothing else.

    The last step of an epoch is short when the examples do not divide by the effective batch; no example is seen twice
    in an epoch and none is left out. With ``classes`` (one an example) every class fills as much of an epoch as the
    largest one: the examples of smaller ones come round again, each as often as the others, or once more. With
    ``micro_batch`` each so many examples of a step weigh the same together, in their order.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        effective_batch: int,
        seed: int,
        data_hash: str,
        shuffle: bool = True,
        *,
        classes: Sequence[str] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """Raises DataError ``data-no-supervision`` when there are no examples."""
        assert effective_batch >= 1, effective_batch
        if not examples:
            raise DataError(
                "data-no-supervision",
                "there are no examples to train on",
                received="0 examples",
                fix="see the audit of the data",
            )
        self._examples, self._batch, self._micro = examples, effective_batch, micro_batch
        self._seed, self._hash, self._shuffle = seed, data_hash, shuffle
        self._members: list[list[int]] = []  # of each class, where they are balanced
        if classes is not None:
            assert len(classes) == len(examples), f"{len(classes)} classes for {len(examples)} examples"
            members: dict[str, list[int]] = {}
            for index, name in enumerate(classes):
                members.setdefault(name, []).append(index)
            self._members = list(members.values())
        self.epoch_length = len(self._members) * max(map(len, self._members), default=0) or len(examples)
        self.steps_per_epoch = -(-self.epoch_length // effective_batch)
        self._epoch = self._step = 0
        self._order = self.order(0)

    def order(self, epoch: int) -> Sequence[int]:
        """Example indices in the order of ``epoch``."""
        known = (epoch, self._seed, self._hash, self._shuffle)
        taken = order(len(self._examples), *known)
        if not self._members:
            return taken
        drawn = self._drawn(taken)
        if not self._shuffle:
            return sorted(drawn)
        return [drawn[i] for i in order(len(drawn), *known, purpose="balance")]

    def _drawn(self, taken: Sequence[int]) -> list[int]:
        """Each class as often as the largest: whole rounds of its examples, then the first of them in ``taken``."""
        place = {index: at for at, index in enumerate(taken)}
        most = max(map(len, self._members))
        rounds = (sorted(members, key=place.__getitem__) for members in self._members)
        return [again[i % len(again)] for again in rounds for i in range(most)]

    def next_step(self) -> list[Example]:
        """The next effective batch, in its order; the epochs go on forever."""
        start = self._step * self._batch
        taken = [self._examples[i] for i in self._order[start : start + self._batch]]
        self._step += 1
        if self._step == self.steps_per_epoch:
            self._go(self._epoch + 1, 0)
        return taken if self._micro is None else weighed(taken, self._micro)

    def state(self) -> dict[str, int]:
        """Where the source stands: the epoch, and the steps taken in it."""
        return {"epoch": self._epoch, "step": self._step}

    def restore(self, state: Mapping[str, int]) -> None:
        """Stand where ``state`` was taken."""
        epoch, step = state["epoch"], state["step"]
        assert epoch >= 0 and 0 <= step < self.steps_per_epoch, f"not a state of this source: {dict(state)}"
        self._go(epoch, step)

    def _go(self, epoch: int, step: int) -> None:
        if epoch != self._epoch:
            self._order = self.order(epoch)
        self._epoch, self._step = epoch, step
