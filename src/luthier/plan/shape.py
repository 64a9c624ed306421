"""Sizes that follow from a model's headers and the config: matrices of a layer, what is trained, bytes of a weight.

Names: ``h`` hidden, ``q`` heads × head size, ``kv`` key heads × head size, ``i`` the inner size of the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.types import ModelSpec

# Modules of one layer as transformers names them in the first-class architectures.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("up_proj", "down_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # Phi-3's names
NORMED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # matrices that follow a norm, fused
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


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained. ``ranks``: LoRA's inner widths of a layer in sum; ``span``: its inputs and outputs in sum."""

    weights: int
    frozen: int = 0  # weights of the adapter that are not trained
    full: bool = False
    ranks: int = 0
    span: int = 0
    mlp: bool = False  # whether a matrix of the MLP is adapted
    pairs: float = 0.0  # low-rank pairs of a layer
    normed: float = 0.0  # norms of a layer that an adapted product follows


def quantised_bytes(bits: int | None, double: bool, compute: int) -> float:
    """Bytes a stored weight of a layer takes: 4 bits with its share of scales, 8 bits with theirs, or ``compute``."""
    if bits == 4:
        return 0.5 + (1 / BLOCK + 4 / (BLOCK * NESTED) if double else 4 / BLOCK)
    return 1.0 + 4 / 4096 if bits == 8 else float(compute)


def trained(adapter: Any, shape: Shape) -> Trained:
    """What the config's ``adapter`` section trains; all weights where it is None."""
    if adapter is None:
        return Trained(shape.spec.parameters, full=True)
    chosen = _targets(getattr(adapter, "target_modules", None), shape)
    if excluded := getattr(adapter, "exclude_modules", None):
        out = _targets(excluded, shape)
        chosen = [name for name in chosen if name not in out or out == list(shape.matrices)]
    count = COUNTS.get(adapter.type, _lora)
    layers = shape.spec.layers
    numbers = getattr(adapter, "layers_to_transform", None)
    share = len(numbers) if numbers else layers
    saved = sum(
        shape.embedding for name in getattr(adapter, "modules_to_save", None) or () if "embed" in name or "head" in name
    )
    weights = int(share * sum(count(adapter, name, *shape.matrices[name]) for name in chosen)) + saved
    if adapter.type == "ln_tuning":
        weights = layers * 2 * shape.spec.hidden + shape.spec.hidden
    fraction = share / max(layers, 1)
    low_rank = adapter.type in ("lora", "adalora")
    halved = bool(getattr(adapter, "takes_out", False))  # a frozen half goes through the products too
    return Trained(
        weights,
        frozen=(weights - saved) * halved,
        ranks=int((1 + halved) * fraction * sum(_rank(adapter, name) for name in chosen)) if low_rank else 0,
        span=int(fraction * sum(sum(shape.matrices[name]) for name in chosen)) if low_rank else 0,
        mlp=any(name in GATED for name in chosen),
        pairs=fraction * len(chosen) if low_rank else 0.0,
        normed=fraction * sum(not part.isdisjoint(chosen) for part in NORMED) if low_rank else 0.0,
    )


def _targets(declared: Any, shape: Shape) -> list[str]:
    """Names of the matrices that ``target_modules`` means; all of them where it is empty or speaks of other names."""
    if declared is None or declared == "all-linear":
        return list(shape.matrices)
    paths = {name: f"model.layers.0.{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for name in shape.matrices}
    if isinstance(declared, str):
        try:
            found = [name for name, path in paths.items() if re.fullmatch(declared, path)]
        except re.error:
            found = []
        return found or list(shape.matrices)
    wanted = {part for name in declared for part in FUSED.get(name.rsplit(".", 1)[-1], (name.rsplit(".", 1)[-1],))}
    return [name for name in shape.matrices if name in wanted] or list(shape.matrices)


def _rank(adapter: Any, name: str) -> int:
    pattern = getattr(adapter, "rank_pattern", None) or {}
    return int(next((rank for key, rank in pattern.items() if re.search(rf"(.*\.)?({key})$", name)), adapter.r))


def _lora(adapter: Any, name: str, rows: int, columns: int) -> float:
    return _rank(adapter, name) * (rows + columns) + (columns if getattr(adapter, "use_dora", False) else 0)


# Weights that each kind of adapter trains for one matrix of (in, out).
COUNTS: dict[str, Callable[[Any, str, int, int], float]] = {
    "lora": _lora,
    "adalora": lambda a, name, rows, columns: a.init_r * (rows + columns + 1),
    "ia3": lambda a, name, rows, columns: {"k_proj": columns, "v_proj": columns, "down_proj": rows}.get(name, 0),
    "vera": lambda a, name, rows, columns: a.r + columns,
    "loha": lambda a, name, rows, columns: 2 * a.r * (rows + columns),
    "lokr": lambda a, name, rows, columns: a.r * (rows**0.5 + columns**0.5) * 2,
    "oft": lambda a, name, rows, columns: rows * (rows / max(a.r, 1) - 1) / 2,
    "boft": lambda a, name, rows, columns: rows * (a.boft_block_size or 4) + columns,
    "ln_tuning": lambda a, name, rows, columns: 0,
}
