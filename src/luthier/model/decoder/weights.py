"""Where a frozen matrix lies, and how it comes into the compute type: the placements that a plan chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from luthier.kernels import coded
from luthier.kernels.backend import fused
from luthier.kernels.nf4 import Packed, dequantise


class Scratch:
    """One buffer that de-quantised matrices take turns in. Its size is that of the largest it has held."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self._buffer = torch.empty(0, device=self.device, dtype=dtype)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns], whatever it holds. Work is enqueued in order, so its former content is no longer needed."""
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(0, device=self.device, dtype=self.dtype)  # let go of the old one first
            self._buffer = torch.empty(rows * columns, device=self.device, dtype=self.dtype)
        return self._buffer[: rows * columns].view(rows, columns)


@dataclass(frozen=True, slots=True)
class Resident:
    """In the compute type on the device."""

    weight: torch.Tensor
    parameter: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        """The weight itself."""
        return self.weight


@dataclass(frozen=True, slots=True)
class Trained:
    """A weight that is trained: kept in fp32, handed out in the compute type."""

    parameter: torch.Tensor
    dtype: torch.dtype

    def get(self) -> torch.Tensor:
        """A copy in the compute type."""
        return self.parameter.detach().to(self.dtype)


@dataclass(frozen=True, slots=True)
class Quantised:
    """In 4 bits, as the matrices of the file that it is made of, one under another."""

    parts: Sequence[Packed]
    scratch: Scratch
    parameter: torch.Tensor | None = field(default=None)

    def get(self) -> torch.Tensor:
        """De-quantised into the scratch buffer."""
        rows = sum(part.shape[0] for part in self.parts)
        out = self.scratch.take(rows, self.parts[0].shape[1])
        start = 0
        for part in self.parts:
            dequantise(part, out[start : start + part.shape[0]])
            start += part.shape[0]
        return out

    def multiplies(self, x: torch.Tensor) -> bool:
        """Whether `times` takes x [t, in], without the matrix in the compute type."""
        return fused(x) and coded.multiplies(self.parts)

    def times(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[t, out] from x [t, in], bias and residual [t, out] added when given: the matrix stays in 4 bits."""
        return coded.times(x, self.parts, bias, residual)


class Streamed:
    """On the host; copied to the device when it is asked for, and the next one while this one is in use.

    ``stage`` is shared by all matrices of a model, which are asked for in a known order: forwards, then backwards.
    """

    parameter: torch.Tensor | None = None

    def __init__(self, parts: Sequence[Packed | torch.Tensor], stage: Stage) -> None:
        self.parts = [_pinned(part) for part in parts]
        self.stage = stage
        self.index = stage.add(self)

    def get(self) -> torch.Tensor:
        """The matrix in the scratch buffer of the stage."""
        held = self.stage.fetch(self.index)
        shapes = [part.shape for part in held]
        out = self.stage.scratch.take(sum(shape[0] for shape in shapes), shapes[0][1])
        start = 0
        for part in held:
            into = out[start : start + part.shape[0]]
            if isinstance(part, Packed):
                dequantise(part, into)
            else:
                into.copy_(part)
            start += part.shape[0]
        return out


class Stage:
    """Copies streamed matrices to the device ahead of their use, on a stream of its own."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._matrices: list[Streamed] = []
        self._ahead: dict[int, tuple[list[Packed | torch.Tensor], torch.cuda.Event]] = {}
        self._last = -1
        self._stream = torch.cuda.Stream(scratch.device) if scratch.device.type == "cuda" else None

    def add(self, matrix: Streamed) -> int:
        """Its place in the order of use."""
        self._matrices.append(matrix)
        return len(self._matrices) - 1

    def fetch(self, index: int) -> list[Packed | torch.Tensor]:
        """The parts of a matrix on the device; begins to copy the one that will follow."""
        device = self.scratch.device
        if self._stream is None:
            return [part.to(device) for part in self._matrices[index].parts]
        if index not in self._ahead:
            self._copy(index)
        parts, ready = self._ahead.pop(index)
        torch.cuda.current_stream(device).wait_event(ready)
        for tensor in _tensors(parts):
            tensor.record_stream(torch.cuda.current_stream(device))
        self._ahead.clear()
        step = 1 if index > self._last else -1
        following = index + step
        self._last = index
        if 0 <= following < len(self._matrices):
            self._copy(following)
        return parts

    def _copy(self, index: int) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            parts = [part.to(self.scratch.device, non_blocking=True) for part in self._matrices[index].parts]
            ready = torch.cuda.Event()
            ready.record(self._stream)
        self._ahead[index] = (parts, ready)


def _tensors(parts: Sequence[Packed | torch.Tensor]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append(part)
        else:
            held = (part.codes, part.table, part.scales, part.scale_table, part.scale_scales)
            found += [tensor for tensor in held if tensor is not None]
    return found


def _pinned(part: Packed | torch.Tensor) -> Packed | torch.Tensor:
    """On the host, in memory that the device copies from without the host's help."""
    if not torch.cuda.is_available():
        return part.to("cpu")
    if isinstance(part, torch.Tensor):
        return part.to("cpu").pin_memory()
    host = part.to("cpu")
    return Packed(
        host.codes.pin_memory(), host.table.pin_memory(), host.scales.pin_memory(), host.shape, host.block,
        None if host.scale_table is None else host.scale_table.pin_memory(),
        None if host.scale_scales is None else host.scale_scales.pin_memory(),
        host.scale_block, host.offset,
    )  # fmt: skip
