"""A `Setup` around a tiny model."""

from pathlib import Path

import pytest
import torch
from tiny_training import make_examples, make_model

from luthier.config.trainer import Trainer
from luthier.data.source import TableSource
from luthier.model.generic import GenericModel
from luthier.objectives import Sft
from luthier.train.evaluation import Evaluator
from luthier.train.setup import Setup
from luthier.types import Plan


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they give on a model this small, above all where tests share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_setup(tiny_llama: Path, tmp_path: Path):
    def make(**changes) -> Setup:
        trainer = Trainer.model_validate({"batch_size": 4, "epochs": 2, **changes.pop("trainer", {})})
        model = changes.pop("model", None) or make_model(tiny_llama, dropout=changes.pop("dropout", 0.0))
        score = GenericModel(model).score
        plan = Plan(device="cpu", tokens_per_pass=changes.pop("tokens_per_pass", 64))
        base = {
            "model": model,
            "logprobs": lambda batch: score(batch)[0],
            "objective": Sft(trainer.loss_normalization),
            "source": TableSource(make_examples(12), trainer.effective_batch, 42, "data"),
            "plan": plan,
            "trainer": trainer,
            "learning_rate": 1e-2,
            "checkpoints": tmp_path / "checkpoints",
            "evaluate": Evaluator(model=model, score=score, examples=make_examples(5, seed=9)),
        }
        return Setup(**{**base, **changes})

    return make
