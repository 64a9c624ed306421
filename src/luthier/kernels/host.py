"""A step's attention and rotation on a CPU, without gradient: fewer and cheaper operations than the general forms.

Names: ``r`` rows, ``n`` key heads, ``g`` queries of each, ``d`` width, ``c`` keys, ``t`` tokens of a pass.
"""

from __future__ import annotations

import torch

PAIRS = 16  # rows times key heads from which plain products beat torch's fused kernel in 16 bit (1.3 to 1.6 times)
KEYS = 512  # and up to which; measured on two cores with AVX-512 bf16


def seen_mask(held_r: torch.Tensor, keys: int, window: int | None) -> torch.Tensor:
    """[r, 1, 1, c] fp32: 0 at the first ``held_r`` keys of a row (of these the last ``window``), -inf elsewhere."""
    place_c = torch.arange(keys, device=held_r.device)
    seen = place_c < held_r[:, None]
    if window is not None and window < keys:
        seen = seen & (place_c >= held_r[:, None] - window)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None, None]


def attend_rows(
    q_rnd: torch.Tensor, k_rncd: torch.Tensor, v_rncd: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """[r, heads, d]: one query a row over its keys and values, whose heads may be fewer; ``mask`` of `seen_mask`.

    In 16 bit scores are rounded before the softmax, as training rounds them for rows of this length.
    """
    rows, heads, width = q_rnd.shape
    kv_heads, keys = k_rncd.shape[1:3]
    group = heads // kv_heads
    q = q_rnd.reshape(rows, kv_heads, group, width)
    plain = q.element_size() == 2 and group > 1 and rows * kv_heads >= PAIRS and keys <= KEYS
    if not plain:
        own = mask.to(q.dtype)
        out = torch.nn.functional.scaled_dot_product_attention(q, k_rncd, v_rncd, own, scale=scale)
        return out.reshape(rows, heads, width)
    # Keys on the left: they lie as the product wants them, while their transpose would be laid out anew.
    scores = torch.bmm(k_rncd.flatten(0, 1), q.flatten(0, 1).transpose(1, 2)).transpose(1, 2)
    wide = scores.to(torch.float32, memory_format=torch.contiguous_format).view(rows, kv_heads, group, keys)
    weights = torch.add(mask, wide, alpha=scale).softmax(-1).to(v_rncd.dtype)
    return torch.bmm(weights.flatten(0, 1), v_rncd.flatten(0, 1)).view(rows, heads, width)


def doubled(cos_td: torch.Tensor, sin_td: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, 1, d] cosines and signed sines for `turned`, from those of half the width."""
    return torch.cat([cos_td, cos_td], -1)[:, None], torch.cat([-sin_td, sin_td], -1)[:, None]


def turned(
    qkv_to: torch.Tensor, cos_t1d: torch.Tensor, sin_t1d: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `rotary.rotate` gives, as views, where all of a head is rotated; cosines and sines from `doubled`."""
    width = cos_t1d.shape[-1]
    all_tnd = qkv_to.view(len(qkv_to), heads + 2 * kv_heads, width)
    plain = all_tnd[:, : heads + kv_heads].to(cos_t1d.dtype)
    out = (plain * cos_t1d).addcmul_(plain.roll(width // 2, -1), sin_t1d).to(qkv_to.dtype)
    return out[:, :heads], out[:, heads:], all_tnd[:, heads + kv_heads :]
