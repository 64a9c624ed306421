"""A step's attention and rotation on a CPU, without gradient: fewer and cheaper operations than the general forms.

Names: ``r`` rows, ``n`` key heads, ``g`` queries of each, ``d`` width, ``c`` keys, ``t`` tokens of a pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.kernels.linear import Norm
from luthier.kernels.norm import rms_norm

# Plain products beat torch's fused kernel from so many rows times key heads times keys in 16 bit (1.5 to 4 times), and
# in fp32 from so many rows times key heads up to so many keys (1.1 to 2 times); measured with AVX-512 bf16.
# With AMX the fused kernel holds longer (0.7 times at 18 * 320, 1.1 times at 96 * 96).
PLAIN, PLAIN_AMX, PAIRS, KEYS = 1024, 8192, 16, 1024
COLUMNS = 256  # of scores whose largest is found first
PADDED = 1.25  # times what prompts hold that a call for several of them may be padded to: a call for each costs more


@functools.cache
def _plain_from() -> int:
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return PLAIN_AMX if has_amx is not None and has_amx() else PLAIN


def seen_mask(held_r: torch.Tensor, keys: int, window: int | None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[r, 1, 1, c]: 0 at the first ``held_r`` keys of a row (of these the last ``window``), -inf elsewhere."""
    place_c = torch.arange(keys, device=held_r.device)
    seen = place_c < held_r[:, None]
    if window is not None and window < keys:
        seen = seen & (place_c >= held_r[:, None] - window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))[:, None, None]


def attend_rows(
    q_rnd: torch.Tensor,
    k_rncd: torch.Tensor,
    v_rncd: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    longest: int | None = None,
) -> torch.Tensor:
    """[r, heads, d]: one query a row over its keys and values, whose heads may be fewer.

    ``mask``: of `seen_mask`, in the type of the queries. ``longest``: the first so many keys are all that any row sees;
    None: it may be all of them. Stores that are whole, not slices, are not copied. In 16 bit scores are rounded before
    the softmax, as training rounds them for short rows.
    """
    rows, heads, width = q_rnd.shape
    kv_heads, keys = k_rncd.shape[1:3]
    q = q_rnd.reshape(rows, kv_heads, heads // kv_heads, width)
    pairs = rows * kv_heads
    half = q.element_size() == 2
    if not (pairs * keys >= _plain_from() if half else pairs >= PAIRS and keys <= KEYS):
        if not half:  # in 16 bit the library would compile its products anew for each length
            k_rncd, v_rncd, mask = k_rncd[:, :, :longest], v_rncd[:, :, :longest], mask[..., :longest]
        out = torch.nn.functional.scaled_dot_product_attention(q, k_rncd, v_rncd, mask, scale=scale)
        return out.reshape(rows, heads, width)
    own = mask.expand(rows, kv_heads, 1, keys).reshape(pairs, 1, keys)
    scores = torch.baddbmm(own, q.flatten(0, 1), k_rncd.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v_rncd.flatten(0, 1)).view(rows, heads, width)


@dataclass(frozen=True)
class Prompts:
    """Prompts of a pass, neighbours padded to one length together. Made once a pass, used by every layer.

    groups: how many they are, the longest of them, and the token of each of their places [count * longest].
    back: [t] where the tokens lie among the places of all groups.
    """

    groups: tuple[tuple[int, int, torch.Tensor], ...]
    back: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Prompts:
        """Those of prompts of these lengths laid end to end."""
        groups: list[list[int]] = []
        for length in lengths:
            own = [*groups[-1], length] if groups else []
            if own and max(own) * len(own) <= PADDED * sum(own):
                groups[-1] = own
            else:
                groups.append([length])
        made, back, token, place = [], [], 0, 0
        for group in groups:
            longest = max(group)
            first_b1 = torch.tensor([0, *group[:-1]]).cumsum(0)[:, None] + token
            place_l = torch.arange(longest)
            held_bl = place_l < torch.tensor(group)[:, None]
            # What stands in for padding is any token: it lies in the future of all that count.
            made.append((len(group), longest, torch.where(held_bl, first_b1 + place_l, token).flatten()))
            back.append(held_bl.flatten().nonzero()[:, 0] + place)
            token, place = token + sum(group), place + held_bl.numel()
        return cls(tuple(made), torch.cat(back))


def attend_prompts(all_tnd: torch.Tensor, heads: int, kv_heads: int, prompts: Prompts, scale: float) -> torch.Tensor:
    """[t, heads * d] causal attention of prompts that begin with nothing shared, from what `turned` leaves."""
    width, outs = all_tnd.shape[-1], []
    for count, longest, token in prompts.groups:
        own = all_tnd.index_select(0, token).view(count, longest, -1, width).transpose(1, 2)
        q, k, v = own.split([heads, kv_heads, kv_heads], 1)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads
        )
        outs.append(out.transpose(1, 2).reshape(count * longest, heads * width))
    return (torch.cat(outs) if len(outs) > 1 else outs[0]).index_select(0, prompts.back)


def normed(x_th: torch.Tensor, norm: Norm) -> torch.Tensor:
    """[t, h] what `norm.rms_norm` gives, on a CPU in half its operations."""
    if x_th.device.type != "cpu" or x_th.dtype == torch.float64 or norm.offset:
        return rms_norm(x_th, norm.weight, norm.eps, norm.offset)[0]
    norm_t1 = torch.linalg.vector_norm(x_th, dim=-1, keepdim=True, dtype=torch.float32)
    rstd_t1 = torch.addcmul(_number(norm.eps), norm_t1, norm_t1, value=1 / x_th.shape[-1]).rsqrt_()
    return torch.mul(x_th, rstd_t1, out=torch.empty_like(x_th)).mul_(norm.weight.to(x_th.dtype))


@functools.cache
def _number(value: float) -> torch.Tensor:
    return torch.tensor(value)


def likeliest(scores_rv: torch.Tensor) -> torch.Tensor:
    """[r] what `argmax` over the last dimension gives, the first of equals; on a CPU 5 to 10 times faster."""
    size = scores_rv.shape[-1]
    whole = size // COLUMNS * COLUMNS
    if not whole or scores_rv.device.type != "cpu":
        return scores_rv.argmax(-1)
    top = scores_rv[:, :whole].unflatten(1, (-1, COLUMNS)).amax(-1)
    if whole < size:
        top = torch.cat([top, scores_rv[:, whole:].amax(-1, keepdim=True)], 1)
    first_r1 = top.argmax(-1, keepdim=True) * COLUMNS
    place_rc = (first_r1 + torch.arange(COLUMNS, device=scores_rv.device)).clamp_(max=size - 1)
    within_r: torch.Tensor = scores_rv.gather(1, place_rc).argmax(-1)
    return within_r.add_(first_r1[:, 0])


def doubled(cos_td: torch.Tensor, sin_td: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[t, 1, d] cosines and signed sines for `turned`, from those of half the width."""
    return torch.cat([cos_td, cos_td], -1)[:, None], torch.cat([-sin_td, sin_td], -1)[:, None]


def turned(
    qkv_to: torch.Tensor, cos_t1d: torch.Tensor, sin_t1d: torch.Tensor, heads: int, kv_heads: int
) -> torch.Tensor:
    """[t, heads + 2 kv_heads, d] what `rotary.rotate` gives, in the place of ``qkv_to``: queries, keys, values.

    Where all of a head is rotated. Cosines and sines from `doubled`.
    """
    width = cos_t1d.shape[-1]
    all_tnd = qkv_to.view(len(qkv_to), heads + 2 * kv_heads, width)
    turning = all_tnd[:, : heads + kv_heads]
    plain = turning.to(cos_t1d.dtype)
    turning.copy_((plain * cos_t1d).addcmul_(plain.roll(width // 2, -1), sin_t1d))
    return all_tnd
