"""Any transformers causal language model, as the training step wants it: a Batch in, log-probabilities out.

Names: ``n`` supervised targets, ``b`` rows (segments), ``l`` the longest row, ``t`` tokens of the batch.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from luthier.model.dropout import key_dropouts, token_keys
from luthier.plan.support import ROTARY_BY_LENGTH
from luthier.types import Batch

CHUNK = 4096  # rows of logits that are turned into fp32 log-probabilities at a time


class GenericModel:
    """Pads segments to rows, runs the model, and computes the head only where something is supervised."""

    def __init__(
        self, model: nn.Module, *, checkpointing: bool = False, neftune_alpha: float = 0.0, seed: int = 0
    ) -> None:
        """Wrap a transformers or PEFT model.

        ``checkpointing`` recomputes activations in the backward pass. ``neftune_alpha`` scales uniform noise on the
        embeddings while the model is in training mode (Jain et al. 2023), drawn from ``seed``, the step and the sample;
        so are the masks of dropout.
        """
        self.model = model
        get_base = getattr(model, "get_base_model", None)
        core: Any = get_base() if get_base is not None else model
        names = inspect.signature(core.forward).parameters
        self._selects = "logits_to_keep" in names
        self._positions = "position_ids" in names
        self.noise = Neftune(core.get_input_embeddings(), neftune_alpha, seed) if neftune_alpha else None
        self._core = core
        self._seed, self._dropped = seed, key_dropouts(model, seed)
        self._by_length = stretched_by_length(getattr(core, "config", None))
        if checkpointing:
            self.recompute()

    def recompute(self) -> None:
        """From now on, compute activations again in the backward pass instead of keeping them."""
        how: dict[str, Any] = {"use_reentrant": False}
        if self._dropped is not None:
            how["context_fn"] = self._dropped.recalled
        if hasattr(self._core, "activation_checkpointing_enable"):  # the name in newer transformers
            self._core.activation_checkpointing_enable(how)
        else:
            self._core.gradient_checkpointing_enable(how)

    def logprobs(self, batch: Batch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[n] fp32: log p(ids[i] | what precedes it in its segment) for each ``positions[i]`` of the batch.

        ``positions`` are indices into the batch's tokens; left out, the nonzeros of ``target_weight`` in order.
        Position 0 of a segment has nothing before it and is refused.
        """
        return _select(*self._predicted(batch, positions))

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] log-probabilities of the supervised targets, and [n] whether each was the likeliest token."""
        logits, targets = self._predicted(batch, None)
        return _select(logits, targets), logits.argmax(-1) == targets

    def _predicted(self, batch: Batch, positions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, v] logits from the token before each position, and [n] the ids that stand there."""
        if positions is None:
            positions = batch.target_weight.nonzero().squeeze(-1)
        if self._by_length and len(batch.lengths) > 1:
            return self._row_by_row(batch, positions)
        device = next(self.model.parameters()).device
        ids, place = batch.ids.to(device), batch.positions.to(device)
        segment, positions = batch.segment.to(device), positions.to(device)
        assert batch.parent_segment is None or bool((batch.parent_segment < 0).all()), "shared prefixes: not here"
        rows, columns = segment[positions], place[positions] - 1  # predicted from the token before
        assert bool((columns >= 0).all()), "the first token of a segment has no prediction"
        count, longest = len(batch.lengths), max(batch.lengths)
        padded = ids.new_zeros(count, longest)
        padded[segment, place] = ids
        mask = torch.zeros_like(padded)
        mask[segment, place] = 1
        inputs: dict[str, Any] = {"input_ids": padded, "attention_mask": mask, "use_cache": False}
        if self._positions:
            inputs["position_ids"] = torch.arange(longest, device=device).expand(count, longest)
        if self._selects:
            kept, columns = torch.unique(columns, return_inverse=True)  # the union of columns over the rows
            inputs["logits_to_keep"] = kept
        if self.noise is not None:
            self.noise.expect(batch)
        if self._dropped is not None:
            key_bl = None
            if batch.key is not None and self.model.training:
                key_bl = torch.zeros_like(padded)
                key_bl[segment, place] = token_keys(batch.key, self._seed).to(device)
            self._dropped.expect(key_bl, inputs.get("logits_to_keep"), batch.step)
        logits = self.model(**inputs).logits
        return logits[rows, columns], ids[positions]

    def _row_by_row(self, batch: Batch, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`_predicted` where rotary positions are stretched by the longest row of a pass: so each row is one."""
        rows = batch.segment[positions]
        parts = [
            self._predicted(_row(batch, number), batch.positions[positions[rows == number]])
            for number in rows.unique().tolist()
        ]
        logits, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        asked = rows.argsort(stable=True).argsort().to(logits.device)  # back from the order of rows
        return logits[asked], targets[asked]


def _row(batch: Batch, number: int) -> Batch:
    """One segment of a batch, alone."""
    here = batch.segment == number
    ids, places, weight = batch.ids[here], batch.positions[here], batch.target_weight[here]
    key = None if batch.key is None else batch.key[here]
    return Batch(ids, places, torch.zeros_like(places), weight, (batch.lengths[number],), key=key, step=batch.step)


def stretched_by_length(config: Any) -> bool:
    """Whether a model's rotary positions depend on the longest row beside a row."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, Mapping))]
    return any(kind.get("rope_type") in ROTARY_BY_LENGTH for kind in kinds)


class Neftune:
    """Uniform noise on the embeddings, of magnitude alpha / sqrt(tokens × hidden), in training mode only.

    Drawn anew for each (seed, step, sample, position) and scaled by the sample's own tokens, so that neither a resume
    nor the padding beside a sample changes what it gets. On the CPU, so that all devices draw the same.
    """

    def __init__(self, embedding: nn.Module, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self.lengths: tuple[int, ...] = ()
        self.draws: list[int] = []
        self.handle = embedding.register_forward_hook(self._add)

    def expect(self, batch: Batch) -> None:
        """The next forward pass has these segments as its rows."""
        self.lengths = batch.lengths
        starts = (batch.positions == 0).nonzero().squeeze(-1)
        self.draws = list(range(len(batch.lengths))) if batch.key is None else batch.key[starts].tolist()

    def _add(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        noise_bld = torch.zeros(output.shape)
        for row, (length, draw) in enumerate(zip(self.lengths, self.draws, strict=True)):
            digest = hashlib.blake2b(f"neftune:{self.seed}:{draw}".encode(), digest_size=8).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            drawn_ld = torch.rand(length, output.shape[-1], generator=stream) * 2 - 1
            noise_bld[row, :length] = drawn_ld * (self.alpha / (length * output.shape[-1]) ** 0.5)
        return output + noise_bld.to(output.device, output.dtype)


def _select(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log softmax in fp32 at the targets: [n, v] and [n] to [n]."""
    parts = [
        -nn.functional.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)
