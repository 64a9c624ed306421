"""Run as a program: `parity_cases.py cpu|cuda`. Compares every kernel with its plain form; exits 1 on a difference."""

# ruff: noqa: B023 (each function is called before its variables change)
from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from luthier.kernels import attention, backend, coded, glu, keyed, logprob, nf4, norm, rotary

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
BOUNDS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # relative to the norm: the type's rounding
# The interpreter cuts bf16 off instead of rounding it, so bf16 is for compiled kernels.
NARROW = torch.float16 if DEVICE == "cpu" else torch.bfloat16
failed: list[str] = []
kernels: set[str] = set()

if DEVICE == "cpu":  # the interpreter turns one-element arrays into loop bounds, which NumPy 2.4 refuses
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_bounds(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = with_bounds


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


def both(name: str, run: Callable[[], object], dtype: torch.dtype, exact: bool = False) -> None:
    kernels.add(name)
    with backend.use("plain"):
        want = run()
    with backend.use("triton"):
        got = run()
    for mine, theirs in zip(flat(got), flat(want), strict=True):
        error = float((mine.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
        same = torch.equal(mine, theirs) if exact else error <= BOUNDS[dtype]
        if not same or mine.shape != theirs.shape:
            failed.append(f"{name} {dtype} {tuple(mine.shape)}: relative error {error:.1e}")


def flat(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [part for one in value for part in flat(one)]  # type: ignore[attr-defined]


for dtype in (torch.float32, NARROW):
    for rows, width in ((1, 8), (3, 48), (5, 100), (2, 4096)):
        x, grad, weight = (
            draw(rows, width, dtype=dtype),
            draw(rows, width, dtype=dtype, seed=1),
            draw(width, dtype=dtype),
        )
        for offset in (0.0, 1.0):
            both("rms_norm", lambda: norm.rms_norm(x, weight, 1e-5, offset), dtype)
            rstd = norm.rms_norm(x, weight, 1e-5, offset)[1]
            for residual in (None, draw(rows, width, dtype=dtype, seed=2)):
                both(
                    "rms_norm_backward",
                    lambda: norm.rms_norm_backward(grad, x, weight, rstd, offset, residual),
                    dtype,
                )
    for tokens, heads, kv_heads, dim, half in ((1, 1, 1, 2, 1), (5, 4, 2, 16, 8), (3, 3, 1, 24, 9), (4, 2, 2, 80, 40)):
        qkv = draw(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
        angle = draw(tokens, half)
        cos, sin = angle.cos(), angle.sin()
        both("rotate", lambda: rotary.rotate(qkv, cos, sin, heads, kv_heads, dim), dtype)
        q, k, v = rotary.rotate(qkv, cos, sin, heads, kv_heads, dim)
        both("rotate_backward", lambda: rotary.rotate_backward(q, k, v, cos, sin), dtype)
    for rows, width in ((1, 3), (4, 50), (2, 1500)):
        fused, grad = draw(rows, 2 * width, dtype=dtype), draw(rows, width, dtype=dtype, seed=3)
        for activation in ("silu", "gelu_tanh"):
            both("gated", lambda: glu.gated(fused, activation), dtype)
            both("gated_backward", lambda: glu.gated_backward(grad, fused, activation), dtype)
            both("gated_backward", lambda: glu.gated_backward(grad, fused, activation, False)[0], dtype)
    for rows, heads, kv_heads, dim, places in ((1, 1, 1, 16, 3), (3, 4, 2, 24, 150), (2, 3, 1, 64, 700)):
        store = draw(rows + 1, 2 * kv_heads, places + 5, dim, dtype=dtype)  # rows of a larger cache
        k, v = store[:rows, :kv_heads, :places], store[:rows, kv_heads:, :places]
        q = draw(rows, heads, dim, dtype=dtype)
        held = torch.tensor([1, places, places // 2][:rows], device=DEVICE)
        for window in (None, 5, 70):
            for softcap in (None, 2.0):
                both(
                    "attend_cached",
                    lambda: attention.attend_cached(q, k, v, held, scale=0.3, window=window, softcap=softcap),
                    dtype,
                )
    for rows, width in ((1, 7), (3, 96), (2, 9000)):
        logits = 3 * draw(rows, width, dtype=dtype)
        targets = torch.tensor([(width - 1) * (i % 2) for i in range(rows)], device=DEVICE)

        def run() -> list[torch.Tensor]:
            own = logits.clone()
            return [logprob.logprob_and_residual(own, targets), own]

        both("logprob_and_residual", run, dtype)
    x = draw(5, 1030, dtype=dtype)
    key = torch.tensor([1, 2**32 - 1, 7, 123456789, 0], device=DEVICE)
    for salt in (0, 5, 2**32 - 7):
        both("dropout", lambda: keyed.dropout(x, key, salt, 0.3), dtype)
        kept = keyed.dropout(torch.ones(64, 4096, device=DEVICE), torch.arange(64, device=DEVICE), salt, 0.3) != 0
        if abs(float(kept.float().mean()) - 0.7) > 0.005:
            failed.append(f"dropout keeps {float(kept.float().mean()):.3f} instead of 0.7")
    for lengths, heads, kv_heads, dim, window in (
        ((5, 1, 70), 2, 1, 8, None), ((130, 3), 2, 2, 16, None), ((64, 0, 65), 4, 2, 24, 7), ((200,), 1, 1, 32, 64),
    ):  # fmt: skip
        tokens = sum(lengths)
        q, grad = draw(tokens, heads, dim, dtype=dtype), draw(tokens, heads, dim, dtype=dtype, seed=4)
        k, v = (draw(tokens, kv_heads, dim, dtype=dtype, seed=seed) for seed in (5, 6))
        where = attention.spans(lengths, DEVICE)

        def attend(kind: str, wide: bool = False) -> list[torch.Tensor]:
            leaves = [(one.double() if wide else one).detach().requires_grad_(True) for one in (q, k, v)]
            out = attention.attend(*leaves, where, kind=kind, scale=0.3, window=window)
            out.backward(grad.to(out.dtype))
            return [out.detach(), *(leaf.grad for leaf in leaves)]

        kernels.add("attend")
        with backend.use("plain"):
            want = attend("padded", wide=True)
        with backend.use("triton"):
            got = attend("flash")
        for mine, theirs in zip(got, want, strict=True):
            error = float((mine.double() - theirs).norm() / theirs.norm())
            if error > 3 * BOUNDS[dtype]:  # several roundings in a row
                failed.append(f"attend {dtype} {lengths} window {window}: relative error {error:.1e}")
    for rows, width, double in ((4, 64, False), (64, 256, True), (3, 128, True), (130, 192, True)):
        packed = nf4.quantise(draw(rows, width, dtype=dtype), kind="nf4", double=double)
        out = torch.full((rows, width), float("nan"), dtype=dtype, device=DEVICE)
        both("dequantise", lambda: nf4.dequantise(packed, out).clone(), dtype, exact=True)
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(
            draw(rows, width, dtype=dtype), blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        theirs = bnb.dequantize_4bit(codes, state)
        error = float((out.double() - theirs.double()).norm() / theirs.double().norm())
        if error > BOUNDS[dtype]:
            failed.append(f"dequantise differs from bitsandbytes by {error:.1e}")
    for rows, outs, width, double in (
        (1, 70, 64, False),
        (5, 33, 320, True),
        (17, 128, 192, True),
        (64, 40, 1024, True),
    ):
        parts = [nf4.quantise(draw(own, width, dtype=dtype, seed=own), kind="nf4", double=double) for own in (outs, 9)]
        x, residual = draw(rows, width, dtype=dtype), draw(rows, outs + 9, dtype=dtype, seed=8)
        bias = draw(outs + 9, dtype=dtype, seed=9)
        for added in ((None, None), (bias, None), (None, residual), (bias, residual)):
            both("few rows times 4 bits", lambda added=added: coded.times(x, parts, *added), dtype)

print("\n".join(failed) if failed else f"{len(kernels)} kernels equal their plain forms on {DEVICE}")
sys.exit(bool(failed))
