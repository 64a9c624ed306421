"""The decoder as a transformers model, for what transformers' `generate` alone knows: beams, guidance, time limits.

Names: ``b`` rows, ``l`` new tokens of each, ``c`` tokens in the cache, ``h`` width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from luthier.kernels.norm import rms_norm
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.layer import Layer


class Wrapped(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Rows padded on the left, keys and values in transformers' own cache. Right and general, not fast."""

    config_class = LlamaConfig  # the names of sizes, which is all that is read of it
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, decoder: Decoder, context: int | None) -> None:
        """``context``: positions of the model's context; None where it has no bound."""
        shape = decoder.shape
        config = LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
            max_position_embeddings=context or 2**31 - 1, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        super().__init__(config)
        # Not registered as a submodule: it keeps its training mode and its parameters to itself.
        object.__setattr__(self, "decoder", decoder)
        object.__setattr__(self, "table", _Table(decoder.embedding))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return cast(Decoder, self.decoder).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return cast(Decoder, self.decoder).dtype

    def get_input_embeddings(self) -> Any:
        """What tells the device and the vocabulary."""
        return self.table

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, l or the last, v] of new tokens ``input_ids`` [b, l] after those in the cache."""
        decoder = cast(Decoder, self.decoder)
        rows, new = input_ids.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(rows, held + new)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        turns = decoder.turns(position_ids.expand(rows, new).reshape(-1).to(decoder.device))
        x_th = decoder.embed(input_ids.reshape(-1))
        for layer in decoder.layers:
            x_th = _layer(layer, x_th, turns, attention_mask.bool(), past_key_values)
        norm = decoder.norm
        kept = x_th.view(rows, new, -1)[:, -logits_to_keep:] if logits_to_keep else x_th.view(rows, new, -1)
        hidden, _ = rms_norm(kept.reshape(-1, kept.shape[-1]), norm.weight, norm.eps, norm.offset)
        logits = (hidden @ decoder.head_weight().t()).view(rows, kept.shape[1], -1)
        cap = decoder.shape.final_softcap
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class _Table(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight.detach()


def _layer(
    layer: Layer, x_th: torch.Tensor, turns: Any, seen_bc: torch.Tensor, cache: DynamicCache | None
) -> torch.Tensor:
    shape, (rows, total) = layer.shape, seen_bc.shape
    new = len(x_th) // rows
    q, k, v, x_th = layer.heads(x_th, turns[shape.rotary[layer.number]], None)
    q, k, v = (part.view(rows, new, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
    if cache is not None:
        k, v = cache.update(k, v, layer.number)
    groups = shape.heads // shape.kv_heads
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    place_q = torch.arange(total - new, total, device=x_th.device)[:, None]
    place_k = torch.arange(total, device=x_th.device)
    allowed = place_k <= place_q
    window = shape.window[layer.number]
    if window is not None:
        allowed = allowed & (place_k > place_q - window)
    # A padding row sees itself: a row that sees nothing would be 0 / 0.
    mask = (allowed & seen_bc[:, None, :].to(x_th.device)) | (place_k == place_q)
    out = _attend(q, k, v, mask[:, None], shape.attention_scale, shape.attention_softcap)
    heads_to = out.transpose(1, 2).reshape(rows * new, -1)
    return layer.feed_forward(layer.joined("o", heads_to, x_th, None), None)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    return scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v
