"""A conversation with a tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from luthier.infer.sampling import resolve
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.tuned.tuned import Tuned


class Conversation:
    """Turns with one model; the history is rendered by the same code as training's."""

    def __init__(self, tuned: Tuned, system: str | None) -> None:
        self._tuned, self._system = tuned, system
        self.reset()

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.messages = [Message("system", self._system)] if self._system else []

    def say(self, text: str, *, use_base: bool = False, generation: Mapping[str, Any] | None = None) -> Iterator[str]:
        """Add a user turn and stream the answer, which joins the history once it has been read to its end."""
        tuned = self._tuned
        self.messages.append(Message("user", text))
        ids = tuned.renderer.chat_prompt(self.messages).ids
        sampling = resolve(tuned.config.generation, generation, seed=tuned.config.random_seed)
        pieces = []
        for piece in tuned.stream_ids(ids, sampling, use_base=use_base):
            pieces.append(piece)
            yield piece
        self.messages.append(Message("assistant", "".join(pieces)))
