"""Training on a CPU in fewer operations: the same values and gradients as the general forms give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from luthier.kernels import host_training
from luthier.kernels.attention import attend, spans
from luthier.kernels.linear import Linear, Norm, Part, Update
from luthier.kernels.logprob import selected_logprob
from luthier.kernels.rotary import rotate
from luthier.model.decoder.weights import Resident


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"norm": Norm(drawn(6, seed=3), 1e-5)},
    "norm of Gemma": {"norm": Norm(drawn(6, seed=3), 1e-5, 1.0)},
    "silu": {"gate": "silu"},
    "gelu": {"gate": "gelu_tanh"},
    "bias": {"bias": drawn(10, seed=4)},
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_all_its_gradients(kind: str, adapted: bool, deep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if deep:  # the halves are for 16 bit, where nothing could be compared to 1e-10
        monkeypatch.setattr(host_training, "DEEP", 4)
        monkeypatch.setattr(torch.Tensor, "element_size", lambda self: 2)
    op = Linear(Resident(drawn(10, 6, seed=1)), **KINDS[kind])
    x = drawn(7, 12 if op.gate else 6, seed=2).requires_grad_()
    residual = drawn(7, 10, seed=5).requires_grad_()
    if adapted:
        masters = tuple(drawn(*size, seed=7 + n).requires_grad_() for n, size in enumerate([(2, 6), (4, 2)]))
        update = Update((Part(slice(3, 7), slice(0, 2), 1.7),), masters[0].detach(), (masters[1].detach(),))
        op = replace(op, update=update, masters=masters)
    inputs = [x, residual, *op.masters]
    found = []
    for way in (host_training.product, Linear.with_input):
        out, passed = way(op, x, None, residual)
        loss = (out * drawn(7, 10, seed=9)).sum() + (passed * drawn(*x.shape, seed=10)).sum()
        found.append([out, *torch.autograd.grad(loss, inputs)])
    assert host_training.serves(op, x)
    assert_close(*found, rtol=1e-10, atol=1e-12)


def test_what_is_trained_is_left_to_the_general_form() -> None:
    weight = drawn(10, 6).requires_grad_()
    assert not host_training.serves(Linear(Resident(weight, weight)), drawn(7, 6))
    assert not host_training.serves(Linear(Resident(drawn(10, 6)), norm=Norm(drawn(6).requires_grad_(), 1.0)), weight)


@pytest.mark.parametrize("window", [None, 9])
def test_attention_and_its_gradient(window: int | None) -> None:
    lengths, heads, kv_heads, width = (40, 33, 5, 70, 3, 1), 6, 2, 8
    tokens = sum(lengths)
    qkv = drawn(tokens, (heads + 2 * kv_heads) * width).requires_grad_()
    turn = drawn(tokens, width // 2, seed=1), drawn(tokens, width // 2, seed=2)
    where, wanted = spans(lengths, "cpu"), drawn(tokens, heads * width, seed=3)
    assert host_training.attends(qkv, where, width // 2, width, None)
    mine = host_training.attention(qkv, turn, where, heads, kv_heads, scale=0.4, window=window)
    q, k, v = rotate(qkv, *turn, heads, kv_heads, width)
    theirs = attend(q, k, v, where, kind="padded", scale=0.4, window=window).flatten(1)
    assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((one * wanted).sum(), qkv)[0] for one in (mine, theirs)]
    assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [5, 20, 100])
def test_the_loss_and_its_gradient(chunk: int) -> None:
    hidden, head = drawn(43, 8).requires_grad_(), drawn(300, 8, seed=1)
    targets = torch.arange(43) * 6
    assert host_training.scores(hidden, head, None) and not host_training.scores(hidden, head, 30.0)
    both = [host_training.selected_logprob(hidden, head, targets, chunk=chunk),
            selected_logprob(hidden, head, targets, chunk=chunk)]  # fmt: skip
    assert_close(*both, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((one * drawn(43, seed=2)).sum(), hidden)[0] for one in both]
    assert_close(*grads, rtol=1e-10, atol=1e-12)
