import pytest
import torch

from luthier.data.collate import collate
from luthier.objectives import Sft
from luthier.types import Example

STEP = [Example(ids=(1, 2, 3, 4), weights=(0, 0, 1, 1), row=0), Example(ids=(5, 6), weights=(0, 0.5), row=1)]
LOGPROBS = torch.tensor([-1.0, -3.0, -4.0])


@pytest.mark.parametrize(("normalization", "expected"), [("token", (1 + 3 + 2) / 2.5), ("sample", (2 + 4) / 2)])
def test_loss_is_the_mean_as_declared(normalization, expected) -> None:
    objective = Sft(normalization)
    constants = objective.prepare(STEP)
    made = objective.loss(LOGPROBS, collate(STEP), constants)
    term = made.terms["nll"]
    assert float(term.sum / constants["nll"]) == pytest.approx(expected)
    assert float(term.weight) == pytest.approx(constants["nll"])
    assert float(made.statistics["tokens"]) == 3


def test_a_weight_on_the_first_token_counts_nowhere() -> None:
    step = [Example(ids=(1, 2), weights=(1, 1), row=0)]
    assert Sft().prepare(step) == {"nll": 1}
    assert float(Sft().loss(torch.tensor([-2.0]), collate(step), {"nll": 1}).terms["nll"].sum) == 2
