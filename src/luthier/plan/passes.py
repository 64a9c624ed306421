"""How the rows of a step fall into passes, and into the rounded lengths that graphs are made for."""

from __future__ import annotations

from functools import lru_cache

from luthier.data.pack import alike, schedule
from luthier.types import Plan

# On a GPU the tokens of a pass, and those that predict supervised ones, are padded to a multiple: for a shape that is
# new to them its libraries look for a way to multiply, 0.2 to 0.8 ms a product beside an H200, 0.03 when it is known.
ROUND = 64
GRAPH_TOKENS = 128  # a pass that runs as a graph is padded to a multiple: what a matrix product rounds it up to itself
COARSE = 32  # or to this share of its length, down to a power of two, so that long passes need no more graphs


def rounded(tokens: int, multiple: int = ROUND) -> int:
    """``tokens`` up to a multiple."""
    return -(-tokens // multiple) * multiple


def graph_tokens(tokens: int) -> int:
    """The length of the graph for a pass of ``tokens``."""
    return rounded(tokens, max(GRAPH_TOKENS, 1 << (tokens // COARSE).bit_length() >> 1))


@lru_cache(maxsize=4096)
def passes_of(lengths: tuple[int, ...], tokens: int, model: str, shared: int) -> tuple[tuple[int, ...], ...]:
    """The lengths of each pass of a step, as training will cut it."""
    passes = schedule(lengths, Plan("", tokens, model), shared=shared)[0]  # type: ignore[arg-type]
    return tuple(tuple(lengths[i] for i in indices) for indices in passes)


@lru_cache(maxsize=256)
def graphs_of(steps: tuple[tuple[int, ...], ...], tokens: int) -> int:
    """How many graphs the passes of these steps need: one for each rounded length, that of the largest among them."""
    lengths = {graph_tokens(sum(rows)) for step in steps for rows in passes_of(step, tokens, "decoder", 0)}
    return len(lengths | {graph_tokens(tokens)})


@lru_cache(maxsize=256)
def laid_of(steps: tuple[tuple[int, ...], ...], tokens: int) -> tuple[float, float, float]:
    """Of a CPU's attention: places of rows and scores of a head, for each token; the most that is worked on at once.

    That is a share of a pass's scores.
    """
    passes = [alike(rows) for step in steps for rows in passes_of(step, tokens, "decoder", 0)]
    places = sum(len(own) * length for groups in passes for own, length in groups)
    scores = [[len(own) * length * length for own, length in groups] for groups in passes]
    every, most = sum(map(sum, scores)), sum(max(own, default=0) for own in scores)
    real = max(sum(map(sum, steps)), 1)
    return places / real, every / real, most / max(every, 1)
