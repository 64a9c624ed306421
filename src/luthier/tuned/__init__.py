"""A model that is ready to answer: predict a table, compare with its base, generate, chat.

The same renderer, tokenizer and weights as in training, so what is asked here is what was learned there.
"""

from luthier.tuned.answered import Answered
from luthier.tuned.conversation import Conversation
from luthier.tuned.trained_on import TrainedOn
from luthier.tuned.tuned import CALIBRATION, Tuned

__all__ = ["CALIBRATION", "Answered", "Conversation", "TrainedOn", "Tuned"]
