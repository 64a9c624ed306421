"""One token for every row, as often as asked: on CUDA as a replayed graph, one a rounded number of rows.

A graph reads and writes its own state, so that several steps follow one another without the host in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from luthier.infer.cache import Cache
from luthier.infer.forward import Forward
from luthier.kernels.host import likeliest

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
WIDE = 64  # beyond them, in multiples of so many


@dataclass(frozen=True)
class Step:
    """What one step leaves: raw scores [r, v], those with blocked ends, and [r] the likeliest tokens of the latter."""

    raw: torch.Tensor
    scores: torch.Tensor
    likeliest: torch.Tensor

    def first(self, rows: int) -> Step:
        """Those of the first rows alone."""
        return Step(self.raw[:rows], self.scores[:rows], self.likeliest[:rows])


class Stepper:
    """The state of the running rows on the device, and how it advances.

    ids [s]: the last token of each row; lengths [s]: tokens of it in the cache; blocked [s]: steps until it may end;
    adapters [s]: the number of the adapter that answers it.
    """

    def __init__(self, forward: Forward, cache: Cache, ends: Sequence[int], told: Callable[[str], None]) -> None:
        """``told`` hears when graphs cannot be used though they should."""
        self.forward, self.cache, self.told = forward, cache, told
        device = forward.device
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self.ids, self.lengths, self.blocked, self.adapters = (
            torch.zeros(cache.slots, dtype=torch.long, device=device) for _ in range(4)
        )
        # Scores of a step on a CPU: memory that is asked for and let go of at each step costs more than filling it.
        own = device.type == "cpu"
        self._kept = [torch.empty(cache.slots, forward.shape.vocab) for _ in range(2)] if own else None
        self.graphs = forward.graphable
        self._met: set[int] = set()
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Step]] = {}
        self._pool: Any = None

    def put(
        self,
        ids: Sequence[int],
        lengths: Sequence[int],
        blocked: Sequence[int],
        adapters: Sequence[int] = (),
        idle: int = 0,
    ) -> None:
        """Set the state of the first rows; the others write to slots that are not in use, at position ``idle``.

        The last position of a slot never holds what counts: the last token of an answer is not put into the cache.
        """
        rest = [0] * (self.cache.slots - len(ids))
        state = (self.ids, self.lengths, self.blocked, self.adapters)
        for own, values in zip(state, (ids, lengths, blocked, adapters or [0] * len(ids)), strict=True):
            own.copy_(torch.tensor([*values, *rest]))
        self.lengths[len(ids) :] = idle

    def advance(self, rows: int, longest: int, floor: bool) -> Step:
        """One step of the first ``rows``. ``longest``: tokens of the longest with the new one. ``floor``: any blocked.

        What it leaves is valid until the next step.
        """
        if not self.graphs:
            return self._once(rows, longest, floor)
        bucket = min(next((size for size in BUCKETS if size >= rows), -(-rows // WIDE) * WIDE), self.cache.slots)
        if bucket not in self._met:  # for real, and every kernel comes into memory
            self._met.add(bucket)
            return self._once(bucket, self.cache.capacity, True).first(rows)
        if bucket not in self._captured and not self._capture(bucket):
            return self._once(rows, longest, floor)
        graph, left = self._captured[bucket]
        graph.replay()
        return left.first(rows)

    def block(self, raw_rv: torch.Tensor, blocked_r: torch.Tensor, out_rv: torch.Tensor | None = None) -> torch.Tensor:
        """Scores with those of the ends at -inf in rows that must go on; ``out_rv`` where given."""
        closed_re = raw_rv.index_select(1, self.ends).masked_fill(blocked_r[:, None] > 0, float("-inf"))
        if out_rv is None:
            return raw_rv.index_copy(1, self.ends, closed_re)
        return out_rv.copy_(raw_rv).index_copy_(1, self.ends, closed_re)

    def _once(self, rows: int, longest: int, floor: bool) -> Step:
        out, blocked = (None, None) if self._kept is None else (kept[:rows] for kept in self._kept)
        raw_rv = self.forward.step(self.ids[:rows], self.lengths[:rows], self.cache, longest, self.adapters[:rows], out)
        scores_rv = self.block(raw_rv, self.blocked[:rows], blocked) if floor else raw_rv
        likeliest_r = likeliest(scores_rv)
        self.ids[:rows].copy_(likeliest_r)
        self.lengths[:rows].add_(1).clamp_(max=self.cache.capacity - 1)  # idle rows stay within their slot
        self.blocked[:rows].sub_(1)
        return Step(raw_rv, scores_rv, likeliest_r)

    def _capture(self, bucket: int) -> bool:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.forward.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                left = self._once(bucket, self.cache.capacity, True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.graphs = False
            self.told(f"decoding runs without CUDA graphs, slower: {str(error).splitlines()[0]}")
            return False
        self._pool = self._pool or graph.pool()
        self._captured[bucket] = (graph, left)
        return True
