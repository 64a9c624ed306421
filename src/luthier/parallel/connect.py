"""From the environment to a `Comm`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from luthier.parallel.place import place
from luthier.train.comm import Comm, OneRank

WAIT = timedelta(days=1)  # rank 0 may evaluate and save for long; a process that ends is noticed at once


@contextmanager
def connect() -> Iterator[Comm]:
    """The ranks of this run, as long as it lasts; one rank where torchrun has not started this process."""
    here = place()
    if here.world == 1:
        yield OneRank()
        return
    import torch
    from torch import distributed

    from luthier.parallel.ranks import Ranks

    if distributed.is_initialized():  # by the program that calls us
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
        return
    cuda = torch.cuda.is_available() and here.local_rank < torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(here.local_rank)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield Ranks(here.rank, here.world)
    finally:
        distributed.destroy_process_group()


@contextmanager
def in_turn(comm: Comm) -> Iterator[None]:
    """Rank 0 does it first, then the others at once: they find in the caches what it has left there."""
    if comm.rank:
        comm.barrier()
    yield
    if not comm.rank:
        comm.barrier()
