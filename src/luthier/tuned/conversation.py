"""A conversation with a tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from luthier.errors import ConfigError
from luthier.infer.sampling import resolve
from luthier.types import Message

if TYPE_CHECKING:
    from luthier.tuned.tuned import Tuned


class Conversation:
    """Turns with one model, each written as training wrote its rows.

    A model that learned conversations is given the turns so far. One that learned from a plain template is asked the
    way it was taught: the message fills the template's first column (``column``), and no earlier turn is shown.
    """

    def __init__(self, tuned: Tuned, system: str | None) -> None:
        self._tuned, self._system = tuned, system
        inputs = tuned.layout.inputs
        self.column = inputs[0] if inputs and not tuned.renderer.is_chat else None
        if self.column is not None and system is not None:
            raise ConfigError(
                "config-conflict",
                "a system prompt was given, and this model was trained with a plain template, which has none",
                received=system,
                fix="leave it out; a system prompt belongs to a run trained on chat",
            )
        self.reset()

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.messages = [Message("system", self._system)] if self._system else []

    def say(
        self,
        text: str,
        *,
        use_base: bool = False,
        generation: Mapping[str, Any] | None = None,
        remember: bool = True,
    ) -> Iterator[str]:
        """Stream the answer to a user turn; both join the history once the answer has been read to its end.

        ``remember`` false leaves the history as it is, as an answer that is not read to its end does.

        Raises ValueError where the turns so far no longer fit into the model's context.
        """
        tuned = self._tuned
        asked = [*self.messages, Message("user", text)]
        if self.column is None:
            ids = tuned.renderer.chat_prompt(asked).ids
        else:
            ids = tuned.renderer.prompt({self.column: text}).ids
        sampling = resolve(tuned.config.generation, generation, seed=tuned.config.random_seed)
        pieces = []
        for piece in tuned.stream_ids(ids, sampling, use_base=use_base):
            pieces.append(piece)
            yield piece
        if remember:
            self.messages = [*asked, Message("assistant", "".join(pieces))]
