"""Sizes that follow from a model's headers: matrices of a layer, bytes of a weight.

Names: ``h`` hidden, ``q`` heads × head size, ``kv`` key heads × head size, ``i`` the inner size of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.types import ModelSpec

# Modules of one layer as transformers names them in the first-class architectures.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("up_proj", "down_proj")
BLOCK = 64  # weights of a 4-bit block, which share one scale
NESTED = 256  # 8-bit scales that share one fp32 scale


@dataclass(frozen=True, slots=True)
class Shape:
    """The parts of a model in weights (numbers, not bytes)."""

    spec: ModelSpec
    matrices: dict[str, tuple[int, int]]  # of one layer: name -> (in, out)

    @classmethod
    def of(cls, spec: ModelSpec) -> Shape:
        """Guess a gated MLP or a plain one from the number of weights, which is exact."""
        q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        sizes = {"q_proj": (spec.hidden, q), "k_proj": (spec.hidden, kv), "v_proj": (spec.hidden, kv),
                 "o_proj": (q, spec.hidden)}  # fmt: skip
        inner = spec.hidden * spec.intermediate
        tables = spec.vocab * spec.hidden * (1 if spec.tied_embeddings else 2)
        left = (spec.parameters - tables) / max(spec.layers, 1) - sum(a * b for a, b in sizes.values())
        names = GATED if left > 2.5 * inner else PLAIN
        for name in names:
            down = name == "down_proj"
            sizes[name] = (spec.intermediate, spec.hidden) if down else (spec.hidden, spec.intermediate)
        return cls(spec, sizes)

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.spec.heads * self.spec.head_dim

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.spec.kv_heads * self.spec.head_dim

    @property
    def embedding(self) -> int:
        """Weights of the table of input embeddings."""
        return self.spec.vocab * self.spec.hidden

    @property
    def head(self) -> int:
        """Weights of the output head that are its own; 0 when it is the embedding table."""
        return 0 if self.spec.tied_embeddings else self.embedding

    @property
    def linear(self) -> int:
        """Weights of all layers; what the headers count beyond the tables, so that it holds for any architecture."""
        return max(self.spec.parameters - self.embedding - self.head, 0)

    @property
    def layer(self) -> float:
        """Weights of one layer."""
        return self.linear / max(self.spec.layers, 1)

    @property
    def largest(self) -> int:
        """Weights of the largest group that is de-quantised together: gate and up of one layer."""
        groups = (ATTENTION[:3], ATTENTION[3:], tuple(n for n in GATED[:2] if n in self.matrices), GATED[2:])
        return max(sum(a * b for a, b in (self.matrices[name] for name in group)) for group in groups)


def quantised_bytes(bits: int | None, double: bool, compute: int) -> float:
    """Bytes a stored weight of a layer takes: 4 bits with its share of scales, 8 bits with theirs, or ``compute``."""
    if bits == 4:
        return 0.5 + (1 / BLOCK + 4 / (BLOCK * NESTED) if double else 4 / BLOCK)
    return 1.0 + 4 / 4096 if bits == 8 else float(compute)
