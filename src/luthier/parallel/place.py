"""Which of how many processes this one is: what torchrun writes into the environment of those that it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from luthier.errors import ConfigError

if TYPE_CHECKING:
    from luthier.types import Machine


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all, and among those of this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: it writes the run folder and prints."""
        return self.rank == 0

    def share_of(self, machine: Machine) -> Machine:
        """What a process may plan with: its part of the cores and the host's memory, and the GPU with the least room.

        Every rank has a GPU of its own. Raises ConfigError when there are fewer.
        """
        if self.local_world == 1:
            return machine
        if machine.gpus and len(machine.gpus) < self.local_world:
            raise ConfigError(
                "config-conflict",
                "each process needs a GPU of its own",
                where="torchrun --nproc-per-node",
                received=f"{self.local_world} processes, {len(machine.gpus)} GPUs",
                allowed=f"at most {len(machine.gpus)}",
                fix=f"torchrun --nproc-per-node={len(machine.gpus)}, or set execution.device: cpu",
            )
        return replace(
            machine,
            cores=max(1, machine.cores // self.local_world),
            memory=machine.memory // self.local_world,
            free_memory=machine.free_memory // self.local_world,
            gpus=tuple(sorted(machine.gpus[: self.local_world], key=lambda gpu: gpu.free)[:1]),
        )

    def device(self, planned: str) -> str:
        """The device of this process where the plan, made for one of them, names ``planned``."""
        return f"cuda:{self.local_rank}" if self.world > 1 and planned.startswith("cuda") else planned


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process stands; alone without torchrun."""
    world = int(environment.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in environment:
        return Place()
    local = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", str(world)))
    return Place(int(environment["RANK"]), world, *local)
