"""How the rows of a step fall into passes, and the lengths that these are padded to."""

from __future__ import annotations

from functools import lru_cache

from luthier.data.pack import ROWS, alike, schedule
from luthier.types import Plan

# The tokens of a pass, and those that predict supervised ones, are padded to a multiple. A further length costs
# something once: a graph has to be made for it, or the GPU's libraries look for a way to multiply. So few lengths are
# right for a short run, and little padding for a long one. On a CPU it is what its attention pads rows to.
ROUND = 64
GRAPHED, EAGER, ON_CPU = (128, 64, 32, 16, 8), (ROUND, 8), (ROWS,)
FINE = 4096  # tokens; longer passes of graphs are padded to that larger a multiple, so that they need no more graphs


def rounded(tokens: int, multiple: int = ROUND) -> int:
    """``tokens`` up to a multiple."""
    return -(-tokens // multiple) * multiple


def padded(tokens: int, multiple: int, graphs: bool) -> int:
    """The length that the decoder brings a pass of ``tokens`` to, where nothing is shared."""
    return rounded(tokens, multiple * (1 << (tokens // FINE).bit_length() >> 1 or 1) if graphs else multiple)


@lru_cache(maxsize=4096)
def passes_of(lengths: tuple[int, ...], tokens: int, model: str, shared: int) -> tuple[tuple[int, ...], ...]:
    """The lengths of each pass of a step, as training will cut it."""
    passes = schedule(lengths, Plan("", tokens, model), shared=shared)[0]  # type: ignore[arg-type]
    return tuple(tuple(lengths[i] for i in indices) for indices in passes)


class Steps(tuple[tuple[int, ...], ...]):
    """The lengths of the rows of each step. Its hash is made once: it is what a plan's results are kept by."""

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("hash")
        if known is None:
            known = self.__dict__["hash"] = super().__hash__()
        return known


@lru_cache(maxsize=256)
def _real_of(steps: Steps, tokens: int) -> list[int]:
    """The tokens of each pass of these steps."""
    return [sum(rows) for step in steps for rows in passes_of(step, tokens, "decoder", 0)]


@lru_cache(maxsize=1024)
def padding_of(steps: Steps, tokens: int, multiple: int, graphs: bool) -> tuple[float, int]:
    """What the passes of these steps are padded with, tokens a step, and how many lengths they have."""
    real = _real_of(steps, tokens)
    lengths = [padded(length, multiple, graphs) for length in real]
    first = {padded(tokens, multiple, graphs)} if graphs else set()  # the graph of the largest pass is made in any case
    return (sum(lengths) - sum(real)) / max(len(steps), 1), len(first.union(lengths))


@lru_cache(maxsize=256)
def laid_of(steps: Steps, tokens: int) -> tuple[float, float, float]:
    """Of a CPU's attention: places of rows and scores of a head, for each token; the most that is worked on at once.

    That is a share of a pass's scores.
    """
    passes = [alike(rows) for step in steps for rows in passes_of(step, tokens, "decoder", 0)]
    places = sum(len(own) * length for groups in passes for own, length in groups)
    scores = [[len(own) * length * length for own, length in groups] for groups in passes]
    every, most = sum(map(sum, scores)), sum(max(own, default=0) for own in scores)
    real = max(sum(map(sum, steps)), 1)
    return places / real, every / real, most / max(every, 1)
