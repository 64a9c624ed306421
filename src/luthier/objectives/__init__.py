"""What is learned, one file each: pure functions from log-probabilities to terms."""

from luthier.objectives.sft import Sft
from luthier.objectives.terms import Loss, Objective, Term

__all__ = ["Loss", "Objective", "Sft", "Term"]
