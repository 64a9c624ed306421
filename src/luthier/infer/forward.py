"""The decoder's forward pass for generation: prompts packed into a pass, answers one token a row, no gradients.

Names: ``r`` rows of a step, ``t`` tokens of a pass, ``n`` heads, ``d`` their width, ``v`` vocabulary, ``c`` capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from luthier.events import Sink, Warned, silent, stage
from luthier.infer.cache import Cache, Prefix
from luthier.infer.memory import free_bytes
from luthier.infer.mixing import Chosen, Mixing
from luthier.kernels import host
from luthier.kernels.attention import Kind, Spans, attend, attend_cached
from luthier.kernels.cpu import step as compiled
from luthier.kernels.glu import gated
from luthier.kernels.linear import Linear, Matrix, Norm, Part, Update
from luthier.kernels.prepacked import Prepacked, inferred, prepacked
from luthier.model.decoder.adapter import Adapter
from luthier.model.decoder.decoder import Decoder, modules
from luthier.model.decoder.layer import Layer
from luthier.model.decoder.shape import Rotary
from luthier.model.decoder.weights import Quantised, Resident, Streamed, Trained
from luthier.plan.slots import COMPILED, FEW, LAID_OUT, fits_spread

Turns = Mapping[Rotary, tuple[torch.Tensor, torch.Tensor]]  # cosines and sines
Attended = Callable[[Layer, torch.Tensor], torch.Tensor]  # [r, o] of the fused product -> [r, heads * d]
Normed = Callable[[torch.Tensor, Norm], torch.Tensor]


class Heads(NamedTuple):
    """Queries [t, heads, d], keys and values [t, n, d]; ``whole`` [t, heads + 2n, d] where they lie side by side."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    whole: torch.Tensor | None = None


class Forward:
    """Runs a decoder's layers over a cache, with the weights that it has when this is made."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        use_base: bool = False,
        steps: int = 0,
        adapters: Sequence[Adapter] = (),
        sink: Sink = silent,
    ) -> None:
        """Take the weights.

        Args:
            decoder: the model.
            use_base: leave its own adapter out.
            steps: so many will be made of several rows, at most; 0: unknown.
            adapters: those that rows may choose from, in place of the decoder's own.
            sink: hears of programs that are compiled first.
        """
        use_base = use_base or bool(adapters)
        self.decoder, self.shape, self.device = decoder, decoder.shape, decoder.device
        decoder.refresh()
        self.layers = cast(list[Layer], list(decoder.layers))
        flash = self.device.type == "cuda" and decoder.dtype in (torch.bfloat16, torch.float16)
        self.attention: Kind = "flash" if flash and torch.cuda.get_device_capability(self.device)[0] >= 8 else "padded"
        with torch.no_grad(), decoder.without_adapter() if use_base else nullcontext():
            products = resident([layer.products for layer in self.layers], decoder)
            if steps >= LAID_OUT:
                products = laid_out(products, decoder)
            self._products = [{name: joined(op) for name, op in own.items()} for own in products]
            self._head_vh = decoder.head_weight()
            self._head = prepacked(self._head_vh) if steps >= LAID_OUT else None

        rows = {name: max(own.stop for own in parts.values()) for name, parts in modules(self.shape).items()}
        self.mixing = Mixing(adapters, rows) if adapters else None
        whole = all(2 * len(kind.inverse) == self.shape.head_dim for kind in self.shape.rotary)
        self._host = self.device.type == "cpu" and decoder.dtype != torch.float64 and whole
        lasting = self._host and steps * self.shape.layers >= COMPILED and self.shape.attention_softcap is None
        self._compiled = lasting and self._compiles(sink)
        self._normed: Normed = compiled.normed if self._compiled else host.normed
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def _compiles(self, sink: Sink) -> bool:
        dtype = self.decoder.dtype
        if not compiled.installed():
            return False
        if compiled.tried(dtype):
            return compiled.serves(dtype)
        with stage(sink, "compile", "what a step of several answers does on this processor; kept for the next time"):
            serves = compiled.serves(dtype)
        if not serves and dtype in compiled.DTYPES:
            sink(Warned(text="numba is installed, but what it compiles does not run here: answers take longer"))
        return serves

    @property
    def graphable(self) -> bool:
        """Whether a step is the same work on the device each time: all it reads lies there."""
        here = not any(isinstance(op.matrix, Streamed) for products in self._products for op in products.values())
        return self.device.type == "cuda" and self.decoder.embedding.device.type == "cuda" and here

    def number_of(self, adapter: str | None) -> int:
        """The number by which passes know an adapter; 0 is none."""
        return self.mixing.numbers[adapter] if self.mixing is not None else 0

    def read_prefix(self, ids: Sequence[int], adapter: int = 0, read: int | None = None) -> Prefix:
        """Read tokens that several prompts of one adapter begin with; ``read``: of them in one pass, at most."""
        held = Cache(self.shape, 1, len(ids), self.device, self.decoder.dtype)
        for start in range(0, len(ids), read or len(ids)):
            self.prefill([ids[: start + read if read else None]], [0], held, [start], [adapter])
        return held.prefix(0, ids)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[int],
        cache: Cache,
        held: Sequence[int] = (),
        adapters: Sequence[int] = (),
    ) -> torch.Tensor:
        """[r, v] fp32 scores of what follows each prompt; its keys and values are put into its slot.

        ``held``: how many of its tokens the slot holds already, fewer than all; none: 0. ``adapters``: the number of
        each prompt's; none: 0.
        """
        held = list(held) or [0] * len(prompts)
        lengths = [len(prompt) - start for prompt, start in zip(prompts, held, strict=True)]
        new = [prompt[start:] for prompt, start in zip(prompts, held, strict=True)]
        ids_t = torch.tensor([token for own in new for token in own], device=self.device)
        cache.reach(max(map(len, prompts)))
        slot_t, positions_t = _laid(slots, held, lengths, self.device)
        places = self._places(cache, slot_t, positions_t)
        last_r = torch.tensor(lengths).cumsum(0).sub(1).to(self.device)
        turns = self._turns(positions_t)
        spans = _spans(lengths, held, self.device)
        asked = _laid(slots, [0] * len(slots), spans.keys, self.device) if any(held) else None
        half = self._host and self.decoder.dtype.itemsize == 2  # in fp32 the general form takes the same time
        alone = host.Prompts.of(lengths) if half and asked is None and self.shape.attention_softcap is None else None
        x_th = self.decoder.embed(ids_t)
        number_t = torch.tensor(list(adapters) or [0] * len(prompts)).repeat_interleave(torch.tensor(lengths))
        mix = self._choose(number_t)
        for number, layer in enumerate(self.layers):
            heads = self._heads(layer, self._product(layer, "qkv", x_th, mix), turns)
            self._keep(cache, number, places, heads)
            q, k, v, whole = heads
            if asked is not None:
                k, v = cache.at(number, *asked)
            window, scale = self.shape.window[number], self.shape.attention_scale
            if alone is not None and whole is not None and (window is None or window >= max(lengths)):
                out = host.attend_prompts(whole, self.shape.heads, self.shape.kv_heads, alone, scale)
            else:
                softcap = self.shape.attention_softcap
                out = attend(q, k, v, spans, kind=self.attention, scale=scale, window=window, softcap=softcap)
                out = out.flatten(1)
            if number == len(self.layers) - 1:
                out, x_th, mix = out[last_r], x_th[last_r], None if mix is None else mix.first(last_r)
            x_th = self._rest(layer, out, x_th, mix)
        return self._scores(x_th).float()

    def step(
        self,
        ids_r: torch.Tensor,
        lengths_r: torch.Tensor,
        cache: Cache,
        longest: int,
        adapter_r: torch.Tensor,
        out_rv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[r, v] fp32 scores of what follows one more token of each of the first r slots; ``out_rv`` where given.

        ``lengths_r`` [r] int64: tokens that the slots hold, which is where the new one goes. ``longest``: no slot holds
        more than this with the new one. ``adapter_r`` [r]: the number of each row's adapter.
        """
        cache.fit(longest)
        x_rh, mix = self.decoder.embed(ids_r), self._choose(adapter_r)
        attended = (self._compiled_step if self._compiled else self._plain_step)(lengths_r, cache, longest)
        for layer in self.layers:
            out = attended(layer, self._product(layer, "qkv", x_rh, mix))
            x_rh = self._rest(layer, out, x_rh, mix)
        scores_rv = self._scores(x_rh)
        return scores_rv.float() if out_rv is None else out_rv.copy_(scores_rv)

    def _places(self, cache: Cache, slot_t: torch.Tensor, position_t: torch.Tensor) -> torch.Tensor:
        """Where `_keep` puts what these tokens leave in each layer."""
        return (cache.pair_places if self._host else cache.places)(slot_t, position_t)

    def _keep(self, cache: Cache, layer: int, places: torch.Tensor, heads: Heads) -> None:
        if heads.whole is None:
            cache.put(layer, places, heads.k, heads.v)
        else:
            cache.put_pairs(layer, places, heads.whole[:, self.shape.heads :])

    def _compiled_step(self, lengths_r: torch.Tensor, cache: Cache, longest: int) -> Attended:
        """Attention of one more token a row: heads are rotated, kept and used in one program."""
        compiled.share_threads()
        turns = self.decoder.turns(lengths_r)

        def attended(layer: Layer, qkv_ro: torch.Tensor) -> torch.Tensor:
            if self.shape.head_norms:
                qkv_ro = layer.norm_heads(qkv_ro)
            number = layer.number
            turn, window = turns[self.shape.rotary[number]], self.shape.window[number]
            store = cache.keys[number], cache.values[number]
            return compiled.attend(qkv_ro, turn, *store, lengths_r, self.shape.attention_scale, window)

        return attended

    def _plain_step(self, lengths_r: torch.Tensor, cache: Cache, longest: int) -> Attended:
        """Attention of one more token a row, in torch's operations."""
        rows = len(lengths_r)
        turns, held_r = self._turns(lengths_r), lengths_r + 1
        places = self._places(cache, torch.arange(rows, device=self.device), lengths_r)
        scale, softcap = self.shape.attention_scale, self.shape.attention_softcap
        masks: dict[int | None, torch.Tensor] = {}  # layers of one window share them

        def attended(layer: Layer, qkv_ro: torch.Tensor) -> torch.Tensor:
            heads = self._heads(layer, qkv_ro, turns)
            self._keep(cache, layer.number, places, heads)
            k, v = cache.keys[layer.number][:rows], cache.values[layer.number][:rows]
            window = self.shape.window[layer.number]
            if not self._host or softcap is not None:
                k, v = k[:, :, :longest], v[:, :, :longest]
                out = attend_cached(heads.q, k, v, held_r, scale=scale, window=window, softcap=softcap)
            else:
                if window not in masks:
                    masks[window] = host.seen_mask(held_r, k.shape[2], window, heads.q.dtype)
                out = host.attend_rows(heads.q, k, v, masks[window], scale, longest)
            return out.flatten(1)

        return attended

    def _turns(self, positions_t: torch.Tensor) -> Turns:
        turns = self.decoder.turns(positions_t)
        return {kind: host.doubled(*turn) for kind, turn in turns.items()} if self._host else turns

    def _choose(self, number_t: torch.Tensor) -> Chosen | None:
        return None if self.mixing is None else self.mixing.choose(number_t.to(self.device))

    def _heads(self, layer: Layer, qkv_to: torch.Tensor, turns: Turns) -> Heads:
        turn = turns[self.shape.rotary[layer.number]]
        if not self._host:
            return Heads(*layer.split(qkv_to, turn))
        if self.shape.head_norms:
            qkv_to = layer.norm_heads(qkv_to)
        whole = host.turned(qkv_to, *turn, self.shape.heads, self.shape.kv_heads)
        first_k, first_v = self.shape.heads, self.shape.heads + self.shape.kv_heads
        return Heads(whole[:, :first_k], whole[:, first_k:first_v], whole[:, first_v:], whole)

    def _rest(self, layer: Layer, out: torch.Tensor, x_th: torch.Tensor, mix: Chosen | None) -> torch.Tensor:
        x_th = self._joined(layer, "o", out, x_th, mix)
        return self._joined(layer, "down", self._product(layer, "gate_up", x_th, mix), x_th, mix)

    def _joined(
        self, layer: Layer, product: str, value: torch.Tensor, x_th: torch.Tensor, mix: Chosen | None
    ) -> torch.Tensor:
        norm = layer.norms.get(product)
        if norm is None:
            return self._product(layer, product, value, mix, x_th)
        return x_th + self._normed(self._product(layer, product, value, mix), norm)

    def _product(
        self, layer: Layer, product: str, x: torch.Tensor, mix: Chosen | None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """In a graph, the update's first factor runs beside the matrix; elsewhere a second stream costs too much."""
        op = self._products[layer.number][product]
        if mix is not None and mix.has(layer.number, product):
            x, op = entered(op, x, self._normed)
            return mix.add(layer.number, product, self._times(op, x, residual), x)
        return self._times(op, x, residual)

    def _times(self, op: Linear, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        if isinstance(op.matrix, Prepacked):
            return inferred(op, op.matrix, x, residual, self._normed)
        if isinstance(op.matrix, Quantised) and len(x) <= FEW and op.matrix.multiplies(x):
            return inferred(op, op.matrix, x, residual, self._normed)
        beside = self._side if self._side is not None and torch.cuda.is_current_stream_capturing() else None
        return op.inferred(x, residual, beside)

    def _scores(self, x_rh: torch.Tensor) -> torch.Tensor:
        norm = self.decoder.norm
        hidden_rh = self._normed(x_rh, norm)
        scores_rv = hidden_rh @ self._head_vh.t() if self._head is None else self._head.times(hidden_rh)
        if self.shape.final_softcap is not None:
            scores_rv = self.shape.final_softcap * torch.tanh(scores_rv / self.shape.final_softcap)
        return scores_rv


Products = Mapping[str, Linear]


def resident(layers: Sequence[Products], decoder: Decoder) -> list[Products]:
    """The products with their matrices in the compute type, where there is room for all of them; else as they are.

    A step of a few rows takes as long as its weights are read: four bits that are spread out anew for each step cost
    more than sixteen that lie there.
    """
    ops = [op for products in layers for op in products.values() if isinstance(op.matrix, (Quantised, Trained))]
    elements = sum(_elements(op.matrix) for op in ops)
    if not ops or not fits_spread(elements, decoder.dtype.itemsize, free_bytes(decoder.device)):
        return list(layers)
    spread = {id(op): replace(op, matrix=Resident(_kept(op.matrix))) for op in ops}
    return [{name: spread.get(id(op), op) for name, op in products.items()} for products in layers]


def laid_out(layers: Sequence[Products], decoder: Decoder) -> list[Products]:
    """The products with their matrices as the CPU multiplies fastest, where there is room for a second copy of them."""
    ops = [op for products in layers for op in products.values() if isinstance(op.matrix, (Resident, Trained))]
    elements = sum(op.matrix.get().numel() for op in ops)
    if decoder.device.type != "cpu" or not fits_spread(elements, decoder.dtype.itemsize, free_bytes(decoder.device)):
        return list(layers)
    made = {id(op): replace(op, matrix=found) for op in ops if (found := prepacked(op.matrix.get())) is not None}
    return [{name: made.get(id(op), op) for name, op in products.items()} for products in layers]


def joined(op: Linear) -> Linear:
    """The product with the updates of its parts as one of all its rows: two small products instead of four or six."""
    update = op.update
    if update is None or len(update.parts) < 2 or len({part.scale for part in update.parts}) > 1:
        return op
    first, last = min(p.rows.start for p in update.parts), max(p.rows.stop for p in update.parts)
    b_or = update.a_rh.new_zeros(last - first, len(update.a_rh))
    for part, b in zip(update.parts, update.b, strict=True):
        b_or[part.rows.start - first : part.rows.stop - first, part.ranks] = b
    whole = Part(slice(first, last), slice(0, len(update.a_rh)), update.parts[0].scale)
    return replace(op, update=Update((whole,), update.a_rh, (b_or,)))


def entered(op: Linear, x: torch.Tensor, normed: Normed = host.normed) -> tuple[torch.Tensor, Linear]:
    """What enters the matrix, after norm or gate, and the product without them."""
    if op.norm is not None:
        x = normed(x, op.norm)
    elif op.gate is not None:
        x = gated(x, op.gate)
    return x, replace(op, norm=None, gate=None)


def _elements(matrix: Matrix) -> int:
    if isinstance(matrix, Quantised):
        return sum(part.shape[0] * part.shape[1] for part in matrix.parts)
    return 0 if matrix.parameter is None else matrix.parameter.numel()


def _kept(matrix: Matrix) -> torch.Tensor:
    """The matrix apart from the buffer that it is made in."""
    return matrix.get().clone() if isinstance(matrix, Quantised) else matrix.get()


def _laid(
    slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[t] slots and positions of so many tokens of each slot, from its start on, laid end to end."""
    slot_t = torch.tensor(list(slots)).repeat_interleave(torch.tensor(lengths))
    position_t = torch.cat([torch.arange(at, at + length) for at, length in zip(starts, lengths, strict=True)])
    return slot_t.to(device), position_t.to(device)


def _spans(lengths: Sequence[int], held: Sequence[int], device: torch.device) -> Spans:
    """Rows of so many tokens, whose keys are those that are held and their own, laid end to end."""
    queries = tuple(lengths)
    keys = tuple(length + start for length, start in zip(lengths, held, strict=True))

    def sums(parts: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *parts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)

    if not any(held):
        return Spans(queries, queries, sums(queries), sums(queries))
    # All keys in their order. That there is an order at all chooses a kernel for more keys than queries.
    return Spans(queries, keys, sums(queries), sums(keys), torch.arange(sum(keys), device=device))
