"""Low-rank adapters of the decoder: which matrices get one, how it starts, and PEFT's file format, both ways."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from luthier.kernels.keyed import hash_of
from luthier.kernels.linear import Part, Update

PREFIX = "base_model.model."  # what PEFT puts before the name of a module


@dataclass(frozen=True, slots=True)
class Rank:
    """The adapter of one module: rank, scale of B A, dropout."""

    r: int
    scale: float
    p: float


def ranks(section: Any, modules: Sequence[str]) -> dict[str, Rank]:
    """Which of ``modules`` (full dotted names) get an update, by PEFT's rules for the config's ``adapter`` section."""
    chosen = [name for name in modules if _targeted(section, name)]
    return {name: _rank(section, name) for name in chosen}


def _targeted(section: Any, name: str) -> bool:
    if section.exclude_modules is not None and _matches(section.exclude_modules, name):
        return False
    if section.layers_to_transform is not None:
        number = re.search(r"\.(\d+)\.", name)
        if number is None or int(number[1]) not in section.layers_to_transform:
            return False
    targets = section.target_modules
    return targets is None or targets == "all-linear" or _matches(targets, name)


def _matches(targets: str | Sequence[str], name: str) -> bool:
    """A pattern must match the whole name; a name of a list is the last part or parts of it."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _rank(section: Any, name: str) -> Rank:
    r = _pattern(section.rank_pattern, name, section.r)
    alpha = _pattern(section.alpha_pattern, name, section.alpha if section.alpha is not None else 2 * section.r)
    return Rank(r, alpha / (math.sqrt(r) if section.use_rslora else r), section.dropout)


def _pattern(patterns: Mapping[str, int] | None, name: str, default: int) -> int:
    """The value of the first pattern that matches the end of the name."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def start_a(seed: int, name: str, r: int, width: int, init: str = "default") -> torch.Tensor:
    """[r, width] fp32: how A starts, from (seed, module name) alone, so every way of execution starts alike.

    ``default`` is PEFT's uniform within 1 / sqrt(width); ``gaussian`` has the standard deviation 1 / r. B starts at 0.
    """
    digest = hashlib.sha256(f"lora_A\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if init == "gaussian":
        return torch.randn(r, width, generator=generator) / r
    return (torch.rand(r, width, generator=generator) * 2 - 1) / math.sqrt(width)


class Pair(nn.Module):
    """The two factors of one module, trained in fp32."""

    def __init__(self, name: str, rank: Rank, rows: int, a: torch.Tensor) -> None:
        super().__init__()
        self.name, self.rank = name, rank
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(a.new_zeros(rows, rank.r))


class Group:
    """The pairs of one fused matrix, and their copies in the compute type, which the kernels read."""

    def __init__(self, pairs: Iterable[tuple[Pair, slice]], dtype: torch.dtype) -> None:
        found = list(pairs)
        self.pairs = [pair for pair, _ in found]
        first = self.pairs[0].lora_A
        total = sum(pair.rank.r for pair in self.pairs)
        a = torch.empty(total, first.shape[1], dtype=dtype, device=first.device)
        b = tuple(torch.empty_like(pair.lora_B, dtype=dtype, requires_grad=False) for pair in self.pairs)
        parts, start = [], 0
        for pair, rows in found:
            stop = start + pair.rank.r
            salt = hash_of(*pair.name.encode())
            parts.append(Part(rows, slice(start, stop), pair.rank.scale, pair.rank.p, salt))
            start = stop
        self.update = Update(tuple(parts), a, b)

    @property
    def masters(self) -> tuple[nn.Parameter, ...]:
        """A and B of each pair, in turn."""
        return tuple(factor for pair in self.pairs for factor in (pair.lora_A, pair.lora_B))

    def copies(self) -> list[torch.Tensor]:
        """Where each of the masters is copied to."""
        spots = zip(self.update.parts, self.update.b, strict=True)
        return [copy for part, b in spots for copy in (self.update.a_rh[part.ranks], b)]


class Copies:
    """Keeps the copies of all groups as the masters are, with one call for all of them."""

    def __init__(self, groups: Iterable[Group]) -> None:
        found = list(groups)
        self._masters = [master.detach() for group in found for master in group.masters]
        self._copies = [copy for group in found for copy in group.copies()]

    def refresh(self) -> None:
        """Copy the masters. Always: an optimizer that writes through pointers leaves no trace of having done so."""
        if self._masters:
            torch._foreach_copy_(self._copies, self._masters)


def state_dict(pairs: Iterable[Pair]) -> dict[str, torch.Tensor]:
    """PEFT's names to the factors, on the CPU."""
    out = {}
    for pair in pairs:
        for factor in ("lora_A", "lora_B"):
            out[f"{PREFIX}{pair.name}.{factor}.weight"] = getattr(pair, factor).detach().cpu().contiguous()
    return out


def peft_config(section: Any, base_name: str, modules: Sequence[str]) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT reads it; an empty target is written out as the names of the modules."""
    targets = section.target_modules
    if targets is None or targets == "all-linear":
        targets = sorted({name.rsplit(".", 1)[1] for name in modules})
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": section.r,
        "lora_alpha": section.alpha if section.alpha is not None else 2 * section.r,
        "lora_dropout": section.dropout,
        "bias": "none",
        "use_rslora": section.use_rslora,
        "init_lora_weights": True if section.init_lora_weights == "default" else section.init_lora_weights,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "rank_pattern": dict(section.rank_pattern or {}),
        "alpha_pattern": dict(section.alpha_pattern or {}),
    }
    excluded = section.exclude_modules
    if excluded is not None:
        values["exclude_modules"] = excluded if isinstance(excluded, str) else sorted(excluded)
    if section.layers_to_transform is not None:
        values["layers_to_transform"] = list(section.layers_to_transform)
    return values
