"""The step against plain transformers + PEFT: same loss, same gradients, however the passes are cut."""

import pytest
import torch
from tiny_training import make_examples, make_model

from luthier.data.pack import schedule
from luthier.train.step import _run_passes, new_training


def reference(model, examples, weight):
    """Each row alone through transformers' own loss, summed and divided once."""
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = torch.tensor([[i if w else -100 for i, w in zip(example.ids, example.weights, strict=True)]])
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=weight).loss
        loss.backward()
        total += float(loss.detach())
    gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)
    return total, gradients


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("pieces", [1, 4, 16])
def test_loss_and_gradients_equal_the_reference(tiny_llama, make_setup, adapter, pieces) -> None:
    model = make_model(tiny_llama, adapter=adapter)
    examples = make_examples(16)
    setup = make_setup(model=model, tokens_per_pass={1: 10_000, 4: 80, 16: 1}[pieces])
    constants = setup.objective.prepare(examples)
    passes = schedule([example.length for example in examples], setup.plan)[0]
    assert len(passes) == pieces or (pieces == 4 and 3 <= len(passes) <= 5)
    expected_loss, expected = reference(model, examples, constants["nll"])

    now = new_training(setup, torch.optim.SGD([w for w in model.parameters() if w.requires_grad]))
    totals = _run_passes(setup, now, [[examples[i] for i in indices] for indices in passes], constants)

    assert float(totals["loss"]) == pytest.approx(expected_loss, abs=1e-5)
    got = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert got.keys() == expected.keys()
    assert max(float((got[name] - expected[name]).abs().max()) for name in got) <= 1e-5
    assert max(float(one.abs().max()) for one in got.values()) > 1e-4  # the comparison is not of zeros
