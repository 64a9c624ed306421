"""Compile the kernels of a model while its weights are on their way: with an empty cache that takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from luthier.kernels import attention, glu, keyed, logprob, nf4, norm, rotary
from luthier.kernels.nf4 import Packed

TOKENS = 3  # kernels do not depend on how many


def warm(
    *,
    device: str,
    dtype: torch.dtype,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotated: int,
    vocab: int,
    activation: glu.Activation,
    windows: Sequence[int | None] = (None,),
    offset: float = 0.0,
    packed: bool = False,
    dropout: bool = False,
) -> threading.Thread:
    """Run each kernel once on a few tokens, in a thread of its own, which is returned.

    A failure in there is left to the first pass, which then meets it in the open.
    """

    def run() -> None:
        with torch.cuda.stream(torch.cuda.Stream(device)), torch.no_grad():
            x = torch.zeros(TOKENS, hidden, device=device, dtype=dtype)
            weight = torch.ones(hidden, device=device, dtype=dtype)
            _, rstd = norm.rms_norm(x, weight, 1e-5, offset)
            for residual in (None, x):
                norm.rms_norm_backward(x, x, weight, rstd, offset, residual)
            qkv = torch.zeros(TOKENS, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
            turn = torch.ones(TOKENS, rotated // 2, device=device)
            q, k, v = rotary.rotate(qkv, turn, turn, heads, kv_heads, head_dim)
            rotary.rotate_backward(q, k, v, turn, turn)
            gate_up = torch.zeros(TOKENS, 2 * intermediate, device=device, dtype=dtype)
            glu.gated(gate_up, activation)
            for again in (True, False):
                glu.gated_backward(gate_up[:, :intermediate].contiguous(), gate_up, activation, again)
            logits = torch.zeros(TOKENS, vocab, device=device, dtype=dtype)
            logprob.logprob_and_residual(logits, torch.zeros(TOKENS, device=device, dtype=torch.int64))
            if dropout:
                keyed.dropout(x, torch.zeros(TOKENS, device=device, dtype=torch.int64), 1, 0.5)
            if packed:
                nf4.dequantise(_nothing(device), torch.empty(64, 64, device=device, dtype=dtype))
            _attend(q, k, v, device, windows)
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=run, name="compile kernels", daemon=True)
    thread.start()
    return thread


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, device: str, windows: Sequence[int | None]) -> None:
    from luthier.kernels.gpu.attention import attend, attend_backward

    where = attention.spans([TOKENS], device)
    for window in set(windows):
        out, lse = attend(q, k, v, where.starts_q, TOKENS, 1.0, window)
        attend_backward(out, q, k, v, out, lse, where.starts_q, TOKENS, 1.0, window)


def _nothing(device: str) -> Packed:
    """A matrix of 64 times 64 in 4 bits with quantised scales."""
    codes = torch.zeros(64 * 32, dtype=torch.uint8, device=device)
    table, scale_table = torch.zeros(16, device=device), torch.zeros(256, device=device)
    scales = torch.zeros(64, dtype=torch.uint8, device=device)
    return Packed(codes, table, scales, (64, 64), 64, scale_table, torch.zeros(1, device=device), 256, 0.5)
