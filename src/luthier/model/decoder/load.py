"""Weights from safetensors files into the placement that the plan names, one matrix at a time.

Host memory holds no more than the matrices on their way; the device holds one matrix more than the result, and where
the quantised base is being kept, those of five layers in 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from luthier.kernels.linear import Linear, Matrix, Norm
from luthier.kernels.nf4 import Packed, dequantise, quantise
from luthier.model.decoder.decoder import Decoder, modules
from luthier.model.decoder.files import Files
from luthier.model.decoder.kept import Keeper, Keeping, Kept
from luthier.model.decoder.layer import Layer
from luthier.model.decoder.shape import Shape
from luthier.model.decoder.weights import Quantised, Resident, Scratch, Stage, Streamed, Trained

Placement = Literal["resident", "quantised", "streamed"]
NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
GEMMA_NORMS = {
    "qkv": "input_layernorm",
    "o": "post_attention_layernorm",
    "gate_up": "pre_feedforward_layernorm",
    "down": "post_feedforward_layernorm",
}


def norm_names(shape: Shape) -> dict[str, str]:
    """Product -> the norm before it (qkv, gate_up) or after it (o, down), as files name it."""
    return GEMMA_NORMS if shape.post_norms else NORMS


@dataclass(frozen=True, slots=True)
class Placing:
    """How weights are held.

    quantised: "nf4" or "fp4" where the config quantises the base, with ``double`` for its scales; None where not.
    weights: where matrices lie. embeddings: where the input table lies. trained: all weights are trained, in fp32.
    """

    dtype: torch.dtype
    device: str = "cpu"
    quantised: str | None = None
    double: bool = True
    weights: Placement = "resident"
    embeddings: Literal["device", "host"] = "device"
    trained: bool = False


def load_decoder(
    folder: Path,
    shape: Shape,
    how: Placing,
    *,
    told: Callable[[int, int], None] | None = None,
    keeping: Keeping | None = None,
) -> Decoder:
    """The decoder with the weights of ``folder``; ``told`` hears of layers done and their number.

    ``keeping``: where a base in 4 bits is read from when it was quantised before, and kept when it was not.
    Raises AssetError asset-damaged for a weight that is missing or of another shape.
    """
    with ExitStack() as stack:
        files, kept, keeper = Files(folder, stack, how.device), None, None
        if keeping is not None and how.quantised is not None:
            where = keeping.folder(kind=how.quantised, double=how.double, dtype=how.dtype, device=how.device)
            kept = keeping.read(where, shape.layers, stack)
            if kept is None and keeping.writes:
                keeper = keeping.write(where, _packed_bytes(shape, how.double), stack)
        return _Builder(files, shape, how, kept, keeper).build(told)


def _packed_bytes(shape: Shape, double: bool) -> int:
    """What the matrices of all layers take in 4 bits, and their scales: one for 64 weights, of 4 bytes or of 1."""
    weights = sum(
        (part.stop - part.start) * _width(shape, product)
        for product, parts in modules(shape).items()
        for part in parts.values()
    )
    return int(shape.layers * weights * (1 / 2 + (1 if double else 4) / 64 + 1 / 4096))


def _width(shape: Shape, product: str) -> int:
    """The columns of a product's matrix."""
    return {"o": shape.q_rows, "down": shape.intermediate}.get(product, shape.hidden)


class _Builder:
    def __init__(
        self, files: Files, shape: Shape, how: Placing, kept: Kept | None = None, keeper: Keeper | None = None
    ) -> None:
        self.files, self.shape, self.how, self.kept, self.keeper = files, shape, how, kept, keeper
        self.scratch = Scratch(how.device, how.dtype)
        self.stage = Stage(self.scratch) if how.weights == "streamed" else None

    def build(self, told: Callable[[int, int], None] | None) -> Decoder:
        shape, how = self.shape, self.how
        embedding = self._vector(
            "model.embed_tokens.weight", (shape.vocab, shape.hidden), on_host=how.embeddings == "host"
        )
        layers = []
        for number in range(shape.layers):
            layers.append(self._layer(number))
            if self.keeper is not None:
                self.keeper.end_layer()
            if told is not None:
                told(number + 1, shape.layers)
        head = None if shape.tied else self._vector("lm_head.weight", (shape.vocab, shape.hidden))
        norm = Norm(self._vector("model.norm.weight", (shape.hidden,)), shape.eps, shape.norm_offset)
        decoder = Decoder(shape, layers, embedding, norm, head, dtype=how.dtype, device=how.device)
        if how.trained:
            decoder.register_parameter("norm_weight", norm.weight)  # type: ignore[arg-type]
        return decoder.eval()

    def _layer(self, number: int) -> Layer:
        shape, prefix = self.shape, f"model.layers.{number}."
        norms = {product: self._norm(prefix + name) for product, name in norm_names(shape).items()}
        before = {product: norm for product, norm in norms.items() if product in ("qkv", "gate_up")}
        alone = {product: norm for product, norm in norms.items() if product in ("o", "down")}
        if shape.head_norms:
            alone |= {part: self._norm(f"{prefix}self_attn.{part}_norm", shape.head_dim) for part in ("q", "k")}
        products, biases = {}, {}
        for product, parts in modules(shape).items():
            sizes = {prefix + part: (s.stop - s.start, _width(shape, product)) for part, s in parts.items()}
            matrix = self._matrix(sizes)
            bias = self._bias(prefix, parts) if product == "qkv" and shape.qkv_bias else None
            gate = shape.activation if product == "down" else None
            products[product] = Linear(matrix, bias, before.get(product), gate)
            if bias is not None:
                biases[product] = bias
        layer = Layer(number, shape, products, alone)
        if self.how.trained:
            for name, norm in (norms | alone).items():  # in one order everywhere: ranks and checkpoints go by it
                layer.register_parameter(f"{name}_norm", norm.weight)  # type: ignore[arg-type]
            for name, op in products.items():
                layer.register_parameter(f"{name}_weight", op.matrix.parameter)  # type: ignore[arg-type]
            for name, bias in biases.items():
                layer.register_parameter(f"{name}_bias", bias)  # type: ignore[arg-type]
        return layer

    def _norm(self, name: str, width: int | None = None) -> Norm:
        weight = self._vector(f"{name}.weight", (width or self.shape.hidden,))
        return Norm(weight, self.shape.eps, self.shape.norm_offset)

    def _bias(self, prefix: str, parts: Mapping[str, slice]) -> torch.Tensor:
        read = [self.files.read(f"{prefix}{part}.bias", (s.stop - s.start,)) for part, s in parts.items()]
        return self._held(torch.cat(read))

    def _vector(self, name: str, shape: tuple[int, ...], on_host: bool = False) -> torch.Tensor:
        return self._held(self.files.read(name, shape) if on_host else self.files.to_device(name, shape), on_host)

    def _held(self, value: torch.Tensor, on_host: bool = False) -> torch.Tensor:
        """A tensor that is no matrix of a layer, where it is used; a parameter in fp32 when all weights are trained."""
        device = "cpu" if on_host else self.how.device
        if self.how.trained:
            return nn.Parameter(value.to(device, self._master()))
        return value.to(device, self.how.dtype)

    def _master(self) -> torch.dtype:
        return torch.float64 if self.how.dtype == torch.float64 else torch.float32

    def _matrix(self, sizes: Mapping[str, tuple[int, int]]) -> Matrix:
        """Matrices of the file by name, [rows, columns] each, one under another, held as the placing says."""
        how = self.how
        if how.quantised is None and how.weights == "streamed":
            assert self.stage is not None
            read = (self.files.read(f"{name}.weight", size) for name, size in sizes.items())
            return Streamed([weight.to(how.dtype) for weight in read], self.stage)
        if how.quantised is not None and how.weights != "resident":
            packed = [self._packed(name, size) for name, size in sizes.items()]
            return Streamed(packed, self.stage) if self.stage is not None else Quantised(packed, self.scratch)
        rows, width = sum(rows for rows, _ in sizes.values()), next(iter(sizes.values()))[1]
        whole = torch.empty(rows, width, device=how.device, dtype=self._master() if how.trained else how.dtype)
        start = 0
        for name, size in sizes.items():
            into = whole[start : start + size[0]]
            if how.quantised is None:
                into.copy_(self.files.to_device(f"{name}.weight", size), non_blocking=True)
            else:
                dequantise(self._packed(name, size), into)  # resident values are those of the quantised base
            start += size[0]
        return Trained(nn.Parameter(whole), how.dtype) if how.trained else Resident(whole)

    def _packed(self, name: str, size: tuple[int, int]) -> Packed:
        """A matrix in 4 bits on the device: as it was kept, else quantised there. One that is streamed may lie here."""
        how = self.how
        assert how.quantised is not None
        if self.kept is not None:
            read = self.kept.read(name, size)
            return read if self.stage is not None else read.to(how.device)
        weight = self.files.to_device(f"{name}.weight", size)
        packed = quantise(weight.to(how.device, how.dtype), kind=how.quantised, double=how.double)
        if self.keeper is not None:
            self.keeper.add(name, packed)
        return packed
