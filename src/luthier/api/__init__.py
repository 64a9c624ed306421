"""The Python interfaces: `Model`, Luthier's own, and `LudwigModel`, Ludwig's calling conventions unchanged.

from luthier import Model
model = Model({"base_model": "smollm2"}); model.train("rows.csv"); model.generate("Hello")

from luthier.api import Models
models = Models.load(["runs/letters", "runs/emails"]); models.generate([("letters", "Dear"), ("emails", "Hi")])

from luthier.api import LudwigModel
results = LudwigModel(config="config.yaml").train(dataset=df)
"""

from luthier.api.ludwig import LudwigModel
from luthier.api.model import Model
from luthier.api.models import Models
from luthier.api.results import PreprocessedData, TrainingResults, TrainingStats

__all__ = ["LudwigModel", "Model", "Models", "PreprocessedData", "TrainingResults", "TrainingStats"]
