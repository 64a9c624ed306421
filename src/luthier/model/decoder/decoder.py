"""The shared decoder: a packed pass in, log-probabilities of the supervised tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from luthier.kernels import attention, host_training
from luthier.kernels.linear import Norm, Update
from luthier.kernels.logprob import score, selected_logprob
from luthier.model.decoder import lora
from luthier.model.decoder.graphs import Graphs
from luthier.model.decoder.layer import Layer, Pass
from luthier.model.decoder.nodes import normed, recomputed
from luthier.model.decoder.shape import Rotary, Shape
from luthier.model.dropout import token_keys
from luthier.plan.passes import ROUND, padded, rounded
from luthier.types import Batch


@dataclass(frozen=True, slots=True)
class Execution:
    """How passes are carried out: the part of a plan that concerns the forward and backward computation."""

    attention: attention.Kind = "padded"
    recompute_layers: int = 0  # the first so many layers keep only their input
    offload: bool = False  # and keep it on the host
    mlp_tile: int = 0  # tokens that a feed-forward layer works on at a time, and recomputes; 0: all at once
    loss_chunk: int = 1024  # supervised tokens whose logits exist at a time
    graphs: bool = False  # replay all layers but the last as CUDA graphs (no recomputation, Flash, frozen embedding)
    tokens: int = 0  # of the largest pass that graphs may have to hold
    multiple: int = 1  # what tokens of a pass are padded to a multiple of; so are those kept for the loss, up to 64


class Decoder(nn.Module):
    """Embedding, layers, norm, head. `parameters()` are what is trained: adapters, or all weights."""

    def __init__(
        self,
        shape: Shape,
        layers: Sequence[Layer],
        embedding: torch.Tensor,
        norm: Norm,
        head: torch.Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """``embedding`` [v, h] on the device or the host; ``head`` [v, h], None where the embedding serves."""
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        self.layers = cast(Sequence[Layer], nn.ModuleList(layers))  # torch knows its items as modules alone
        self.embedding, self.norm, self.head = embedding, norm, head
        self.execution = Execution()
        self._copies: lora.Copies | None = None
        self._graphs: Graphs | None = None
        self._warm = False
        self._seed = 0
        self._inverse = {
            kind: torch.tensor(kind.inverse, dtype=torch.float32, device=self.device) for kind in set(shape.rotary)
        }
        # Gemma rounds the factor to the type of its weights before it multiplies.
        self._scale = float(torch.tensor(shape.embedding_scale, dtype=dtype))

    def execute(self, execution: Execution) -> None:
        """Run passes so from the next one on. Graphs of another way are dropped, and the memory of the largest."""
        if execution != self.execution:
            self._graphs = None
        self.execution = execution

    # ------------------------------------------------------------------------------------------ what it answers

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """[n] log p of each supervised token given what precedes it in its sample, fp32; on the device."""
        hidden_nh, targets_n, count = self._predicted(batch)
        head_vh, chunk, softcap = self.head_weight(), self.execution.loss_chunk, self.shape.final_softcap
        if host_training.scores(hidden_nh, head_vh, softcap):
            found = host_training.selected_logprob(hidden_nh, head_vh, targets_n, chunk=chunk)
        else:
            found = selected_logprob(hidden_nh, head_vh, targets_n, chunk=chunk, softcap=softcap)
        return found[:count]

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] log-probabilities and [n] whether each supervised token was the likeliest; without gradient."""
        hidden_nh, targets_n, count = self._predicted(batch)
        logprobs, hits = score(
            hidden_nh, self.head_weight(), targets_n,
            chunk=self.execution.loss_chunk, softcap=self.shape.final_softcap,
        )  # fmt: skip
        return logprobs[:count], hits[:count]

    def head_weight(self) -> torch.Tensor:
        """[v, h] in the compute type."""
        weight = self.embedding if self.head is None else self.head
        return weight.to(self.device, self.dtype)

    # --------------------------------------------------------------------------------------------- how it does so

    def _predicted(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
        """[n, h] normed hidden states that predict supervised tokens, [n] those tokens, and how many are no padding.

        What a pass is padded with is a sample of its own: zeros, of which nothing is wanted.
        """
        self.refresh()
        device = self.device
        assert batch.supervised is not None and batch.source is not None, "collate fills them in"
        keep, targets, back, parents = batch.source, batch.ids[batch.supervised], None, None
        tokens, count = len(batch.ids), len(keep)
        if batch.parent_segment is not None:  # several may start from one prefix
            keep, back = torch.unique(batch.source, return_inverse=True)
            parents = batch.parent_segment.tolist()
        else:
            tokens = self._padded(tokens)
            keep = _filled(keep, rounded(count, min(self.execution.multiple, ROUND)), tokens)
            targets = _to_length(targets, len(keep))
        more = tokens - len(batch.ids)
        now = Pass(
            spans=attention.spans((*batch.lengths, more) if more else batch.lengths, device, parents),
            turns=self.turns(_to_length(batch.positions, tokens).to(device, non_blocking=True)),
            attention=self.execution.attention,
            tile=self.execution.mlp_tile,
            keep=keep.to(device, non_blocking=True),
            key_t=self._keys(batch, tokens),
        )
        x_th = nn.functional.pad(self.embed(batch.ids), (0, 0, 0, more)) if more else self.embed(batch.ids)
        hidden_nh = normed(self.run(x_th, now), self.norm)
        if back is not None:
            hidden_nh = hidden_nh[back.to(device, non_blocking=True)]
        return hidden_nh, targets.to(device, non_blocking=True), count

    def _padded(self, tokens: int) -> int:
        """The length that a pass of so many tokens is brought to."""
        return padded(tokens, self.execution.multiple, self.execution.graphs)

    def _keys(self, batch: Batch, tokens: int) -> torch.Tensor | None:
        """[tokens] their keys for dropout, in 32 bits and with the seed in them; None where nothing is drawn."""
        if batch.key is None or not self.training or not any(pair.rank.p for pair in self.pairs):
            return None
        return token_keys(_to_length(batch.key, tokens), self._seed).to(self.device, non_blocking=True)

    def refresh(self) -> None:
        """Bring the compute copies of the adapters up to date; to be called after their weights have changed."""
        if self._copies is None:
            self._copies = lora.Copies(group for layer in self.layers for group in layer.groups)
        self._copies.refresh()

    def embed(self, ids_t: torch.Tensor) -> torch.Tensor:
        """[t, h] embeddings on the device of ids anywhere, looked up where the table lies."""
        table = self.embedding
        x_th = nn.functional.embedding(ids_t.to(table.device, non_blocking=True), table)
        x_th = x_th.to(self.device, self.dtype, non_blocking=True)
        return x_th if self._scale == 1.0 else x_th * self._scale

    def run(self, x_th: torch.Tensor, now: Pass) -> torch.Tensor:
        """All layers, the first of them recomputed in the backward pass as the plan says."""
        if self._graphable(x_th, now):
            return cast(torch.Tensor, self.layers[-1](self._graphs_for()(x_th, now), now))
        return self._layers(self.layers, x_th, now)

    def _layers(self, layers: Iterable[Layer], x_th: torch.Tensor, now: Pass) -> torch.Tensor:
        again = self.execution.recompute_layers if torch.is_grad_enabled() else 0
        anchor = next(self.parameters(), None)
        for layer in layers:
            learns = x_th.requires_grad or next(layer.parameters(), None) is not None  # else nothing is kept of it
            if layer.number < again and anchor is not None and learns:
                x_th = recomputed(partial(layer, now=now), x_th, anchor, offload=self.execution.offload)
            else:
                x_th = layer(x_th, now)
        return x_th

    def _graphable(self, x_th: torch.Tensor, now: Pass) -> bool:
        """Whether this pass runs as a graph. The first one never does: it brings every kernel into memory."""
        if (
            not (self.execution.graphs and torch.is_grad_enabled())
            or x_th.requires_grad
            or now.spans.gather is not None
        ):
            return False
        first, self._warm = not self._warm, True
        return not first

    def _graphs_for(self) -> Graphs:
        if self._graphs is None:
            self._graphs = Graphs(list(self.layers)[:-1], self.device, self._padded(self.execution.tokens))
        return self._graphs

    def turns(self, positions_t: torch.Tensor) -> dict[Rotary, tuple[torch.Tensor, torch.Tensor]]:
        """Cosine and sine [t, half] of each kind of rotary positions, fp32 (fp64 for an fp64 model)."""
        out = {}
        for kind, inverse in self._inverse.items():
            angles = positions_t[:, None].float() * inverse
            cos, sin = angles.cos() * kind.factor, angles.sin() * kind.factor
            out[kind] = (cos, sin) if self.dtype != torch.float64 else (cos.double(), sin.double())
        return out

    # --------------------------------------------------------------------------------------------------- adapters

    @property
    def pairs(self) -> list[lora.Pair]:
        """The adapters of all modules, in the order of the model."""
        return [pair for layer in self.layers for pair in layer.pairs.values()]

    def adapt(self, section: Any, seed: int) -> None:
        """Add the low-rank adapter that the config's section describes, in fp32, trainable.

        Raises ValueError when it matches no module.
        """
        master = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = modules(self.shape)
        chosen = lora.ranks(section, [name for layer in self.layers for name in _names(layer.number, rows)])
        if not chosen:
            raise ValueError("the adapter's target_modules match no layer")
        for layer in self.layers:
            for product, parts in rows.items():
                pairs = []
                for part, place in parts.items():
                    name = f"model.layers.{layer.number}.{part}"
                    if name not in chosen:
                        continue
                    width = self.width_of(product)
                    start = lora.start_a(seed, name, chosen[name].r, width, section.init_lora_weights)
                    start = start.to(self.device, master)
                    pairs.append((lora.Pair(name, chosen[name], place.stop - place.start, start), place))
                if pairs:
                    layer.adapt(product, pairs, self.dtype)
        self._seed = seed
        self._copies, self._graphs = None, None

    def width_of(self, product: str) -> int:
        """What enters a product."""
        widths = {"down": self.shape.intermediate, "o": self.shape.q_rows}
        return widths.get(product, self.shape.hidden)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model alone, within a block."""
        with self.using([{} for _ in self.layers]):
            yield

    @contextmanager
    def using(self, layers: Sequence[Mapping[str, Update]]) -> Iterator[None]:
        """The base model with these updates of each layer's products, within a block; nothing of them is trained."""
        before = [dict(layer.products) for layer in self.layers]
        for layer, own in zip(self.layers, layers, strict=True):
            layer.products = {
                name: replace(op, update=own.get(name), masters=()) for name, op in layer.products.items()
            }
        try:
            yield
        finally:
            for layer, products in zip(self.layers, before, strict=True):
                layer.products = products


def modules(shape: Shape) -> dict[str, dict[str, slice]]:
    """Product -> the modules of the file that it is fused from -> their rows in it."""
    q, kv, f, h = shape.q_rows, shape.kv_rows, shape.intermediate, shape.hidden
    if shape.fused_weights:
        qkv = {"self_attn.qkv_proj": slice(0, q + 2 * kv)}
        gate_up = {"mlp.gate_up_proj": slice(0, 2 * f)}
    else:
        qkv = {
            "self_attn.q_proj": slice(0, q),
            "self_attn.k_proj": slice(q, q + kv),
            "self_attn.v_proj": slice(q + kv, q + 2 * kv),
        }
        gate_up = {"mlp.gate_proj": slice(0, f), "mlp.up_proj": slice(f, 2 * f)}
    return {
        "qkv": qkv,
        "o": {"self_attn.o_proj": slice(0, h)},
        "gate_up": gate_up,
        "down": {"mlp.down_proj": slice(0, h)},
    }


def _to_length(values_n: torch.Tensor, length: int) -> torch.Tensor:
    """``values`` with zeros after them."""
    return nn.functional.pad(values_n, (0, length - len(values_n)))


def _filled(keep_n: torch.Tensor, count: int, tokens: int) -> torch.Tensor:
    """``keep`` and, after it, as many other tokens of the pass as make it ``count``."""
    if len(keep_n) == count:
        return keep_n
    others = torch.ones(tokens, dtype=torch.bool)
    others[keep_n] = False
    return torch.cat([keep_n, others.nonzero().squeeze(-1)[: count - len(keep_n)]])


def _names(number: int, rows: dict[str, dict[str, slice]]) -> list[str]:
    return [f"model.layers.{number}.{part}" for parts in rows.values() for part in parts]
