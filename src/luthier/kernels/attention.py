"""Causal attention over samples laid end to end. Samples never see each other.

Two ways compute the same: ``flash``, the varlen Flash kernel that comes with torch (CUDA, 16 bit), and ``padded``,
where rows are padded inside the attention alone (any device and type). A shared prefix is a sample of its own that
other samples continue: their keys are the prefix's, then their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from luthier.kernels.backend import fused, wide

Kind = Literal["flash", "padded"]
SHORT = 256  # keys up to which plain products beat torch's fused kernel on a CPU in 16 bit (3 times at 64, measured)


@dataclass(frozen=True)
class Spans:
    """Where the samples of a pass lie, for attention. Made once a pass, used by every layer.

    queries, keys: tokens of each sample that ask, and that are asked (its prefix's included).
    starts_q, starts_k: [s + 1] int32, their running sums on the device.
    gather: [sum of keys] int64, the token behind each key; None where keys are the tokens in their order.
    own: [t] int64, where each token is a key of its own sample. copies: tokens of prefixes [p] and the keys that they
    are besides [p, children + 1, themselves first], prefixes with as many children together.
    masks: those of padded attention by the group's first sample and the window: all layers save the same ones.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    starts_q: torch.Tensor
    starts_k: torch.Tensor
    gather: torch.Tensor | None = None
    own: torch.Tensor | None = None
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def longest(self) -> int:
        """The most keys that one query may see."""
        return max(self.keys, default=0)


def spans(lengths: Sequence[int], device: torch.device | str, parents: Sequence[int] | None = None) -> Spans:
    """`Spans` of samples of these lengths; ``parents[i]`` is the sample that sample i continues, or -1."""
    queries = tuple(lengths)
    starts = [0]
    for length in queries:
        starts.append(starts[-1] + length)
    starts_q = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
    if parents is None or all(parent < 0 for parent in parents):
        return Spans(queries, queries, starts_q, starts_q)
    pieces, keys = [], []
    for own, parent in enumerate(parents):
        assert parent < 0 or parents[parent] < 0, "a prefix has no prefix of its own"
        chain = [own] if parent < 0 else [parent, own]
        pieces += [torch.arange(starts[one], starts[one + 1]) for one in chain]
        keys.append(sum(queries[one] for one in chain))
    starts_k = [0, *torch.tensor(keys).cumsum(0).tolist()]
    homes, copies = _homes(queries, starts, starts_k, parents) if torch.is_grad_enabled() else (None, ())

    def there(value: torch.Tensor) -> torch.Tensor:
        return value.to(device, non_blocking=True)

    return Spans(
        queries, tuple(keys), starts_q, there(torch.tensor(starts_k, dtype=torch.int32)), there(torch.cat(pieces)),
        None if homes is None else there(homes), tuple((there(tokens), there(rows)) for tokens, rows in copies),
    )  # fmt: skip


def _homes(
    queries: Sequence[int], starts: Sequence[int], starts_k: Sequence[int], parents: Sequence[int]
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """`Spans.own` and `Spans.copies`."""
    children: dict[int, list[int]] = {}
    own = []
    for one, parent in enumerate(parents):
        first = starts_k[one] + (queries[parent] if parent >= 0 else 0)
        own.append(torch.arange(first, first + queries[one]))
        if parent >= 0:
            children.setdefault(parent, []).append(one)
    alike: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for parent, found in children.items():
        place = torch.arange(queries[parent])
        rows = torch.stack([place + starts_k[one] for one in (parent, *found)], 1)
        alike.setdefault(len(found), []).append((place + starts[parent], rows))
    joined = [tuple(map(torch.cat, zip(*those, strict=True))) for those in alike.values()]
    return torch.cat(own), cast(list[tuple[torch.Tensor, torch.Tensor]], joined)


class _Gathered(torch.autograd.Function):
    """The keys of all samples from those of all tokens. A shared token's gradient is a plain sum, without atomics."""

    @staticmethod
    def forward(ctx: Any, x_tnd: torch.Tensor, where: Spans) -> torch.Tensor:
        ctx.where = where
        assert where.gather is not None
        return x_tnd.index_select(0, where.gather)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        where: Spans = ctx.where
        assert where.own is not None, "made while gradients were off"
        out = grads[0].index_select(0, where.own)
        for tokens, rows in where.copies:
            out.index_copy_(0, tokens, grads[0][rows].sum(1))
        return out, None


def attend(
    q_tnd: torch.Tensor,
    k_tnd: torch.Tensor,
    v_tnd: torch.Tensor,
    where: Spans,
    *,
    kind: Kind,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """[t, heads, d]. k and v may have fewer heads (grouped queries). ``window``: keys a query sees, itself included."""
    if window is not None and window >= where.longest:
        window = None
    if where.gather is not None:
        k_tnd, v_tnd = (cast(torch.Tensor, _Gathered.apply(x, where)) for x in (k_tnd, v_tnd))  # type: ignore[no-untyped-call]
    if kind == "flash" and softcap is None:
        return cast(torch.Tensor, _Flash.apply(q_tnd, k_tnd, v_tnd, where, scale, window))  # type: ignore[no-untyped-call]
    return _padded(q_tnd, k_tnd, v_tnd, where, scale, window, softcap)


def attend_cached(
    q_rnd: torch.Tensor,
    k_rncd: torch.Tensor,
    v_rncd: torch.Tensor,
    held_r: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """[r, heads, d]: one query a row over the first ``held_r`` [r] of its keys and values, whose heads may be fewer.

    ``window``: of these, the last so many. Without gradient.
    """
    if fused(q_rnd):
        from luthier.kernels.gpu import cached as gpu

        return gpu.attend_cached(q_rnd, k_rncd, v_rncd, held_r, scale, window, softcap)
    rows, heads, width = q_rnd.shape
    kv_heads, places = k_rncd.shape[1:3]
    place = torch.arange(places, device=q_rnd.device)
    seen = place < held_r[:, None]
    if window is not None and window < places:
        seen = seen & (place >= held_r[:, None] - window)
    # The queries that share a key head stand in the place of several tokens: nothing is repeated.
    q = q_rnd.view(rows, kv_heads, heads // kv_heads, width)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k_rncd, v_rncd, seen[:, None, None], scale=scale)
    else:
        scores = softcap * torch.tanh(q @ k_rncd.transpose(-1, -2) * (scale / softcap))
        out = wide(scores).masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).to(v_rncd.dtype) @ v_rncd
    return out.reshape(rows, heads, width)


class _Flash(torch.autograd.Function):
    """Varlen attention: this package's kernel, or torch's where keys are not the tokens in their order (prefixes)."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, where: Spans, scale: float, window: int | None
    ) -> torch.Tensor:
        ctx.where, ctx.scale, ctx.window = where, scale, window
        if fused(q) and where.gather is None:
            from luthier.kernels.gpu import attention as gpu

            out, lse = gpu.attend(q, k, v, where.starts_q, where.longest, scale, window)
            ctx.save_for_backward(q, k, v, out, lse)
            return out
        # torch's operators are called directly, since their public name still changes.
        out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, where.starts_q, where.starts_k, max(where.queries), where.longest, 0.0, True, False,
            scale=scale, **_sides(window),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, rng, unused)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *more = ctx.saved_tensors
        where: Spans = ctx.where
        grad = grads[0].contiguous()
        if not more:
            from luthier.kernels.gpu import attention as gpu

            found = gpu.attend_backward(grad, q, k, v, out, lse, where.starts_q, where.longest, ctx.scale, ctx.window)
            return *found, None, None, None
        found = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, where.starts_q, where.starts_k, max(where.queries), where.longest,
            0.0, True, *more, scale=ctx.scale, **_sides(ctx.window),
        )  # fmt: skip
        return *found, None, None, None


def _sides(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _padded(
    q_tnd: torch.Tensor,
    k_tnd: torch.Tensor,
    v_tnd: torch.Tensor,
    where: Spans,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Samples of similar length share a call, so that little is spent on padding."""
    pieces: list[torch.Tensor] = []
    q_parts, k_parts, v_parts = q_tnd.split(where.queries), k_tnd.split(where.keys), v_tnd.split(where.keys)
    for group in _alike(where):
        q, k, v = (_stack([parts[i] for i in group]) for parts in (q_parts, k_parts, v_parts))
        key = group[0], window
        if key not in where.masks:
            seen = _mask([where.queries[i] for i in group], [where.keys[i] for i in group], window, q_tnd.device)
            where.masks[key] = None if seen is None else _added(seen, q_tnd.dtype)
        out_bnld = _rows(q, k, v, where.masks[key], scale, softcap)
        pieces += [out_bnld[row, :, : where.queries[i]].transpose(0, 1) for row, i in enumerate(group)]
    return torch.cat(pieces)


def _alike(where: Spans) -> list[list[int]]:
    """Neighbouring samples in groups whose padding is at most a quarter of what they hold."""
    groups: list[list[int]] = []
    longest = held = 0
    for index, keys in enumerate(where.keys):
        most = max(longest, keys)
        if groups and most * (len(groups[-1]) + 1) <= 1.25 * (held + keys):
            groups[-1].append(index)
            longest, held = most, held + keys
        else:
            groups.append([index])
            longest = held = keys
    return groups


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """[b, heads, longest, d] from parts [length, heads, d], zeros at the end of shorter ones."""
    if len(parts) == 1:
        alone = parts[0].transpose(0, 1)[None]
        # what is saved for the backward pass would keep all samples alive
        return alone if parts[0].nbytes == parts[0].untyped_storage().nbytes() else alone.clone()
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)


def _mask(queries: list[int], keys: list[int], window: int | None, device: torch.device) -> torch.Tensor | None:
    """[b, 1, most queries, most keys] of what may be seen; None where plain causality says it all."""
    if queries == keys and window is None:  # zeros at the end of shorter rows lie in the future of all that count
        return None
    place_q = torch.arange(max(queries), device=device)[None, :, None]
    place_k = torch.arange(max(keys), device=device)[None, None]
    before = torch.tensor([k - q for q, k in zip(queries, keys, strict=True)], device=device)[:, None, None]
    seen = place_k <= place_q + before
    if window is not None:
        seen = seen & (place_k > place_q + before - window)
    seen = seen | ~seen.any(-1, keepdim=True)  # a padding row that saw nothing would be 0 / 0
    return seen[:, None]


def _added(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores: nothing to what may be seen. SDPA would make this of a mask in each layer anew."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    short = q.device.type == "cpu" and q.element_size() == 2 and k.shape[2] <= SHORT
    if q.device.type == "cpu" or softcap is not None:  # the CPU's fast kernel wants as many key heads
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap is None and not short:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    scores = wide(q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _added(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), scores.dtype)
    return (scores + mask).softmax(-1).to(v.dtype) @ v
