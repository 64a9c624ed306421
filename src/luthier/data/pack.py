"""Which examples share a pass: similar lengths together, as many as the plan's tokens allow. Pure and deterministic."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from luthier.types import Plan

ROWS = 32  # rows that a CPU multiplies together are padded to a multiple: fewer shapes, each of which it compiles


def schedule(lengths: Sequence[int], plan: Plan, world: int = 1, *, shared: int = 0) -> list[list[list[int]]]:
    """Indices of one step's examples by rank, then by pass. Every rank gets as many passes; some may be empty.

    ``lengths`` in tokens, one an example. A packed pass (``plan.model`` decoder) holds at most
    ``plan.tokens_per_pass`` tokens, a padded one rows × longest of at most as many. A longer example is a pass alone.
    ``shared``: tokens that all of them start with, which a packed pass holds once.
    """
    assert world >= 1, world
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))  # out of memory shows early
    if plan.model == "decoder":
        own = [length - shared for length in lengths]
        passes = _packed(own, longest_first, plan.tokens_per_pass - shared, world)
    else:
        passes = _padded(lengths, longest_first, plan.tokens_per_pass, world)
    ranks = [passes[rank::world] for rank in range(world)]
    most = max(map(len, ranks))
    return [own + [[] for _ in range(most - len(own))] for own in ranks]


def _padded(lengths: Sequence[int], order: Sequence[int], room: int, world: int) -> list[list[int]]:
    """Rows of similar length together, a share of them for each rank."""
    passes: list[list[int]] = []
    longest = 0
    rows = -(-len(order) // world)
    for index in order:
        if passes and longest * (len(passes[-1]) + 1) <= room and len(passes[-1]) < rows:
            passes[-1].append(index)
        else:
            passes.append([index])
            longest = lengths[index]
    return passes


def _packed(lengths: Sequence[int], order: Sequence[int], room: int, world: int) -> list[list[int]]:
    """As few passes as first-fit needs, levelled where that keeps within ``room``: equal passes take the least time.

    With several ranks their number is rounded up, so that each has as many.
    """
    if world == 1 and order and sum(lengths) <= room:  # the usual case, without a look at each
        return [list(order)]
    first_fit: list[list[int]] = []
    used: list[int] = []
    for index in order:
        own = lengths[index]
        for fitting, tokens in enumerate(used):
            if tokens + own <= room:
                first_fit[fitting].append(index)
                used[fitting] += own
                break
        else:
            first_fit.append([index])
            used.append(own)
    count = min(-(-len(used) // world) * world, len(order))
    level: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    least = [(0, k) for k in range(count)]  # a heap: the pass with the fewest tokens, the first of several
    for index in order:
        tokens, k = least[0]
        level[k].append(index)
        filled[k] = tokens + lengths[index]
        heapq.heapreplace(least, (filled[k], k))
    fits = all(tokens <= room or len(indices) == 1 for tokens, indices in zip(filled, level, strict=True))
    return level if fits and max(filled, default=0) <= max(used, default=0) else first_fit


def alike(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Neighbouring rows of a packed pass whose padding together is at most a quarter, and their padded length."""
    found: list[tuple[list[int], int]] = []
    held = 0
    for index, own in enumerate(lengths):
        padded = -(-own // ROWS) * ROWS
        if found:
            rows, longest = found[-1]
            most = max(longest, padded)
            if most * (len(rows) + 1) <= 1.25 * (held + padded):
                found[-1], held = ([*rows, index], most), held + padded
                continue
        found.append(([index], padded))
        held = padded
    return found
