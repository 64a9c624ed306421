"""Weights from safetensors files into the placement that the plan names, one matrix at a time.

Host memory holds no more than the matrices on their way; the device holds one matrix more than the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from luthier.assets.spec import weight_files
from luthier.errors import AssetError
from luthier.kernels.linear import Linear, Matrix, Norm
from luthier.kernels.nf4 import Packed, dequantise, quantise
from luthier.model.decoder.decoder import Decoder, modules
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
    folder: Path, shape: Shape, how: Placing, *, told: Callable[[int, int], None] | None = None
) -> Decoder:
    """The decoder with the weights of ``folder``; ``told`` hears of layers done and their number.

    Raises AssetError asset-damaged for a weight that is missing or of another shape.
    """
    with ExitStack() as stack:
        files = Files(folder, stack)
        return _Builder(files, shape, how).build(told)


class Files:
    """The tensors of a model folder by name, read when they are asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._of: dict[str, Any] = {}
        for path in weight_files(folder):
            handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            self._of |= dict.fromkeys(handle.keys(), handle)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor on the host, mapped from the file."""
        if name not in self._of:
            raise self._damaged(f"it has no weight {name}")
        value: torch.Tensor = self._of[name].get_tensor(name)
        if tuple(value.shape) != shape:
            raise self._damaged(f"{name} has the shape {tuple(value.shape)}, not {shape}")
        return value

    def _damaged(self, why: str) -> AssetError:
        return AssetError(
            "asset-damaged",
            f"the base model's files are incomplete: {why}",
            where=str(self.folder),
            received=why,
            allowed="all weights of the architecture in config.json",
            fix="get the model again",
        )


class _Builder:
    def __init__(self, files: Files, shape: Shape, how: Placing) -> None:
        self.files, self.shape, self.how = files, shape, how
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
            width = {"o": shape.q_rows, "down": shape.intermediate}.get(product, shape.hidden)
            matrix = self._matrix([prefix + part for part in parts], [s.stop - s.start for s in parts.values()], width)
            bias = self._bias(prefix, parts) if product == "qkv" and shape.qkv_bias else None
            gate = shape.activation if product == "down" else None
            products[product] = Linear(matrix, bias, before.get(product), gate)
            if bias is not None:
                biases[product] = bias
        layer = Layer(number, shape, products, alone)
        if self.how.trained:
            for name, norm in norms.items() | alone.items():
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
        return self._held(self.files.read(name, shape), on_host)

    def _held(self, value: torch.Tensor, on_host: bool = False) -> torch.Tensor:
        """A tensor that is no matrix of a layer, where it is used; a parameter in fp32 when all weights are trained."""
        device = "cpu" if on_host else self.how.device
        if self.how.trained:
            return nn.Parameter(value.to(device, self._master()))
        return value.to(device, self.how.dtype)

    def _master(self) -> torch.dtype:
        return torch.float64 if self.how.dtype == torch.float64 else torch.float32

    def _matrix(self, names: Sequence[str], rows: Sequence[int], width: int) -> Matrix:
        """Matrices of the file, one under another, held as the placing says."""
        how = self.how
        parts = (self.files.read(f"{name}.weight", (count, width)) for name, count in zip(names, rows, strict=True))
        if how.quantised is None and how.weights == "streamed":
            assert self.stage is not None
            return Streamed([part.to(how.dtype) for part in parts], self.stage)
        if how.quantised is not None and how.weights != "resident":
            packed = [self._pack(part) for part in parts]
            return Streamed(packed, self.stage) if self.stage is not None else Quantised(packed, self.scratch)
        whole = torch.empty(sum(rows), width, device=how.device, dtype=self._master() if how.trained else how.dtype)
        start = 0
        for part in parts:
            into = whole[start : start + len(part)]
            if how.quantised is None:
                into.copy_(part, non_blocking=True)
            else:
                dequantise(self._pack(part), into)  # resident values are those of the quantised base
            start += len(part)
        return Trained(nn.Parameter(whole), how.dtype) if how.trained else Resident(whole)

    def _pack(self, part: torch.Tensor) -> Packed:
        assert self.how.quantised is not None
        return quantise(part.to(self.how.device, self.how.dtype), kind=self.how.quantised, double=self.how.double)
