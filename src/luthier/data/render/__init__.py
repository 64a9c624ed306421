"""From a request to token ids and target weights: the same function for training, prediction, chat and export."""

from luthier.data.render.draft import Dropped, Outcome, PromptIds
from luthier.data.render.renderer import Renderer

__all__ = ["Dropped", "Outcome", "PromptIds", "Renderer"]
