"""4-bit weights back to the compute type (Dettmers et al. 2023): a 16-value table times a scale per block.

The scales may be quantised themselves (8 bits of a 256-value table times a scale per 256 of them, plus an offset).
Quantising is bitsandbytes'; reading back here writes into a buffer that the next matrix reuses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from luthier.kernels.backend import fused


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix in 4 bits. ``n`` = rows * columns entries, row-major, two to a byte, the first in the high bits."""

    codes: torch.Tensor  # [n / 2] uint8
    table: torch.Tensor  # [16] fp32
    scales: torch.Tensor  # [n / block] fp32, or uint8 where they are quantised
    shape: tuple[int, int]
    block: int
    scale_table: torch.Tensor | None = None  # [256] fp32
    scale_scales: torch.Tensor | None = None  # [n / block / scale_block] fp32
    scale_block: int = 256
    offset: float = 0.0

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        held = (self.codes, self.scales, self.scale_table, self.scale_scales)
        return sum(part.nbytes for part in held if part is not None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The matrix on another device."""

        def move(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part.to(device, non_blocking=non_blocking)

        codes, table, scales = (
            part.to(device, non_blocking=non_blocking) for part in (self.codes, self.table, self.scales)
        )
        return Packed(
            codes, table, scales, self.shape, self.block, move(self.scale_table), move(self.scale_scales),
            self.scale_block, self.offset,
        )  # fmt: skip


def quantise(weight: torch.Tensor, *, kind: str, double: bool) -> Packed:
    """Quantise a matrix where it lies, with bitsandbytes. ``kind``: nf4, fp4; ``double`` quantises the scales too."""
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=double, quant_type=kind)
    nested = state.state2 if state.nested else None
    return Packed(
        codes=codes.view(-1),
        table=state.code.float(),
        scales=state.absmax,
        shape=(weight.shape[0], weight.shape[1]),
        block=state.blocksize,
        scale_table=nested.code.float() if nested else None,
        scale_scales=nested.absmax if nested else None,
        scale_block=nested.blocksize if nested else 256,
        offset=float(state.offset) if nested else 0.0,
    )


def dequantise(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    """Write the matrix into ``out`` [rows, columns] (contiguous; any floating type) and give it back."""
    if fused(out):
        from luthier.kernels.gpu import nf4 as gpu

        return gpu.dequantise(packed, out)
    scales = packed.scales
    if packed.scale_table is not None and packed.scale_scales is not None:
        outer = packed.scale_scales.repeat_interleave(packed.scale_block)[: len(scales)]
        scales = packed.scale_table[scales.int()] * outer + packed.offset
    codes = packed.codes.int()
    values = packed.table[torch.stack([codes >> 4, codes & 15], -1).flatten()]
    blocks = values[: out.numel()].view(-1, packed.block) if out.numel() % packed.block == 0 else None
    if blocks is not None:
        out.view(-1, packed.block).copy_(blocks * scales[:, None])
    else:
        out.view(-1).copy_(values[: out.numel()] * scales.repeat_interleave(packed.block)[: out.numel()])
    return out
