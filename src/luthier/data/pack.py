"""Which examples share a pass: similar lengths together, as many as the plan's tokens allow. Pure and deterministic."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.types import Plan


def schedule(lengths: Sequence[int], plan: Plan, world: int = 1) -> list[list[list[int]]]:
    """Indices of one step's examples by rank, then by pass. Every rank gets as many passes; some may be empty.

    ``lengths`` in tokens, one an example. A pass holds rows × longest ≤ ``plan.tokens_per_pass`` padded tokens; an
    example longer than that is a pass of its own.
    """
    assert world >= 1, world
    passes: list[list[int]] = []
    longest = 0
    for index in sorted(
        range(len(lengths)), key=lambda i: (-lengths[i], i)
    ):  # longest first: out of memory shows early
        if passes and longest * (len(passes[-1]) + 1) <= plan.tokens_per_pass:
            passes[-1].append(index)
        else:
            passes.append([index])
            longest = lengths[index]
    ranks = [passes[rank::world] for rank in range(world)]
    most = max(map(len, ranks))
    return [own + [[] for _ in range(most - len(own))] for own in ranks]
