"""`Comm` over torch.distributed: gloo between CPUs, NCCL between GPUs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import distributed

from luthier.errors import TrainingError

NUMBERS = count()  # of the notes that this process has taken part in: the same on all ranks, none used twice
POLL = 0.1  # seconds between two looks at the notes of other ranks
BUCKET = 2**24  # numbers that are summed in one message: a copy of so many is made, not of all gradients


@dataclass(frozen=True)
class Ranks:
    """Implements `luthier.train.comm.Comm`. Every rank has to make the same calls in the same order.

    Sums are the same bits on all ranks, and the same whenever as many ranks sum the same values.
    """

    rank: int
    world: int

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of ``value`` over all ranks."""
        out = value.detach().clone()
        with _others():
            distributed.all_reduce(out)
        return out

    def sum_gradients(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients of ``weights`` by their sums, in fp32. A rank without passes has none and adds 0.

        A weight that has no gradient on any rank keeps none.
        """
        there = torch.tensor([int(weight.grad is not None) for weight in weights])
        with _others():
            distributed.all_reduce(there)
        summed = [weight for weight, count in zip(weights, there.tolist(), strict=True) if count]
        for bucket in _buckets(summed):
            flat = torch.cat([_gradient(weight) for weight in bucket])
            with _others():
                distributed.all_reduce(flat)
            for weight, part in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
                weight.grad = part.view_as(weight).to(weight.dtype)

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give all ranks what rank 0 has in ``tensors``."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            with _others():
                distributed.broadcast(whole, 0)
            tensor.detach().copy_(whole)

    def share(self, value: Any) -> Any:
        """Rank 0's ``value`` (JSON types), on all ranks; the others' is not looked at."""
        text = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor(len(text))
        with _others():
            distributed.broadcast(size, 0)
            buffer = torch.zeros(int(size), dtype=torch.uint8)
            if text:
                buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            distributed.broadcast(buffer, 0)
        return json.loads(buffer.numpy().tobytes())

    def made_by_first(self, make: Callable[[], Any], received: Sequence[int], pass_on: Callable[[int], None]) -> Any:
        """What ``make()`` gives on rank 0 (JSON types), on all ranks.

        The others wait awake, since who waits in a collective hears no signal. What one of them has ``received``
        meanwhile is told rank 0 by ``pass_on``, in another thread.
        """
        number = next(NUMBERS)
        made, called = f"luthier/{number}/made", f"luthier/{number}/called"
        store = _store()
        if self.rank:
            with _others():
                while not store.check([made]):
                    if received:
                        store.set(called, str(received[0]))
                    time.sleep(POLL)
            return self.share(None)
        with _listening(store, called, pass_on):
            value = make()
        store.set(made, "")
        return self.share(value)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` holds on any rank."""
        count = torch.tensor(int(flag))
        with _others():
            distributed.all_reduce(count)
        return bool(count)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)


def _buckets(weights: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    for weight in weights:
        if bucket and sum(one.numel() for one in bucket) + weight.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _gradient(weight: torch.nn.Parameter) -> torch.Tensor:
    """[numel], in fp32 at least."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.grad is None:
        return torch.zeros(weight.numel(), dtype=dtype, device=weight.device)
    return weight.grad.detach().flatten().to(dtype)


@contextmanager
def _listening(store: Any, called: str, pass_on: Callable[[int], None]) -> Iterator[None]:
    """Pass on, once, what another rank writes under the name ``called`` while the body runs."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(POLL):
            try:
                if store.check([called]):
                    number = int(store.get(called))
                    if not over.wait(3 * POLL):  # a signal to all ranks has reached this one by now
                        pass_on(number)
                    return
            except RuntimeError:  # the store has gone: the next collective says so
                return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()


def _store() -> Any:
    """Where the ranks can leave each other notes beside their collectives."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


@contextmanager
def _others() -> Iterator[None]:
    """What the backends raise when a process has gone, as an error that can be explained."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TrainingError(
            "training-rank-lost",
            "another process of this run has ended, so this one ends too",
            received=str(error).split("\n")[0],
            fix="see what the other process has printed; then run the same command again: it goes on from the last "
            "checkpoint",
        ) from error
