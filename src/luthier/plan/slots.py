"""How many rows are answered at one time, and what each takes: the engine and `luthier plan` ask the same functions.

sizes of the model, free memory, longest row -> Slots (rows at once, tokens of each, prompt tokens read together)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.types import ModelSpec

ROWS = {"cuda": 256, "cpu": 32, "mps": 32}  # at once, when neither the caller nor memory says otherwise
READ = {"cuda": 8192, "cpu": 2048, "mps": 2048}  # prompt tokens of one round, at most
LEAST = 256  # and at least; a longer prompt is read in pieces
SHARE = {"cuda": 0.85, "cpu": 0.5, "mps": 0.5}  # of the free memory; the rest is for graphs, and for others
READING = 0.2  # of that, for the pass that reads prompts, at most
ROUNDED = 64  # capacities are multiples of it
RESIDENT = 0.6  # share of free memory that weights may take in the compute type; the rest is for keys and values
SCORES = 16  # bytes of a number of the vocabulary beside the score itself: in fp32, sorted, summed up
APART = 2  # a cache that is as many times longer than a row needs is worth a wave of its own
POSITIONS = 16384  # of a padded batch on the generic path, at most
LAID_OUT = 32  # steps that pay for laying matrices out for a CPU
FEW = 4  # rows that are multiplied on CUDA with matrices that stay in 4 bits; for more these are spread out each step
COMPILED = 1536  # steps times layers that pay for loading compiled programs: 0.7 s against 0.4 ms each and more


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a row takes depends on these. ``kv``, ``q``: widths of all heads; ``number``: bytes of a number."""

    layers: int
    hidden: int
    intermediate: int
    q: int
    kv: int
    vocab: int
    number: int

    @classmethod
    def of(cls, spec: ModelSpec, number: int) -> Sizes:
        """Those of a model's headers."""
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        return cls(spec.layers, spec.hidden, spec.intermediate, q, kv, spec.vocab, number)

    @property
    def token(self) -> int:
        """Bytes that the keys and values of one token take in all layers."""
        return 2 * self.layers * self.kv * self.number

    @property
    def scores(self) -> int:
        """Bytes that choosing the next token of one row takes."""
        return self.vocab * (self.number + SCORES)

    @property
    def reading(self) -> int:
        """Bytes that a prompt token takes in the pass that reads it, beside its keys and values in the cache."""
        return self.number * (4 * self.hidden + 2 * self.q + 2 * self.kv + 3 * self.intermediate)


@dataclass(frozen=True, slots=True)
class Slots:
    """``rows`` at one time, each with room for ``capacity`` tokens; ``read`` prompt tokens are read in one round."""

    rows: int
    capacity: int
    read: int

    def bytes(self, sizes: Sizes) -> dict[str, int]:
        """What they take, by item."""
        return {
            "cache": self.rows * self.capacity * sizes.token,
            "scores": self.rows * sizes.scores,
            "reading": self.read * sizes.reading,
        }


def capacity_of(tokens: int) -> int:
    """What a slot for a row of so many tokens, prompt and answer, holds."""
    return -(-tokens // ROUNDED) * ROUNDED


def slots_of(sizes: Sizes, kind: str, free: int, longest: int, rows: int, declared: int | None = None) -> Slots:
    """As many rows as are wanted and as fit; one at least.

    Args:
        sizes: of the model.
        kind: of the device.
        free: bytes that nothing takes yet.
        longest: tokens of the longest row, prompt and answer.
        rows: how many there are.
        declared: most rows at once by the config or the caller; None lets memory decide.
    """
    capacity = capacity_of(longest)
    room = max(0.0, SHARE[kind] * free)
    read = max(LEAST, min(READ[kind], int(READING * room // sizes.reading)))
    fitting = int((room - read * sizes.reading) // (capacity * sizes.token + sizes.scores))
    return Slots(max(1, min(rows, declared or ROWS[kind], fitting)), capacity, read)


def waves(
    sizes: Sizes, kind: str, free: int, needs: Sequence[int], declared: int | None = None
) -> list[tuple[int, Slots]]:
    """Rows of ``needs`` tokens, longest first, divided so that a few long ones do not make all slots long.

    [(rows, their slots)]: one wave where memory holds as many rows as are wanted; else rows that need at most half of
    the longest are answered in a cache of their own, which holds more of them at one time.
    """
    out, start = [], 0
    while start < len(needs):
        left = needs[start:]
        slots = slots_of(sizes, kind, free, left[0], len(left), declared)
        count = len(left)
        if slots.rows < min(count, declared or ROWS[kind]):
            count = next((at for at, need in enumerate(left) if APART * capacity_of(need) <= slots.capacity), count)
            slots = replace(slots, rows=min(slots.rows, count))
        out.append((count, slots))
        start += count
    return out


def positions_of(sizes: Sizes, kind: str, free: int) -> int:
    """Positions of a padded batch on the generic path, prompts and answers together."""
    return max(1, min(POSITIONS, int(SHARE[kind] * free // (sizes.token + sizes.hidden * 8 * sizes.number))))


def fits_spread(elements: int, number: int, free: float) -> bool:
    """Whether so many weights may lie in the compute type: a step of a few rows takes as long as they are read."""
    return elements * number <= RESIDENT * free
