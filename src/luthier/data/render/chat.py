"""Conversations through a chat template: each answer from exactly the history that prediction would see.

A row that is not a conversation becomes one: the inputs are the user's turn, the target the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from luthier.assets.chat import check_template, render_chat
from luthier.assets.tokenizer import Tokenizer
from luthier.data.render.draft import Draft, Settings
from luthier.data.render.guard import Guard
from luthier.errors import DataError
from luthier.types import Message

# For bases without a chat template of their own.
DEFAULT_CHAT = (
    "{% for message in messages %}{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


class ChatRenderer:
    """Drafts of conversations under one template."""

    def __init__(self, template: str, tokenizer: Tokenizer, settings: Settings) -> None:
        """Raises DataError ``data-template`` when the template is malformed."""
        check_template(template)
        self.template, self.tokenizer, self.settings = template, tokenizer, settings

    def prompt(self, messages: Sequence[Message], where: str, tools: Any = None) -> Draft:
        """The draft of a prompt alone: the conversation so far, with the opening of the answer."""
        messages = self._with_system(messages)
        guard, plain, tools = self._guarded(messages, tools)
        rendered = guard.restore(self._render(plain, tools, True, where))
        return Draft(rendered, replace(rendered, text="", data=()), 0, True, bool(rendered.data), guard.control)

    def drafts(self, messages: Sequence[Message], where: str, tools: Any = None) -> list[Draft]:
        """One draft for each answer that is trained, in order; none when there is no answer."""
        messages = self._with_system(messages)
        wanted = self._supervised(messages)
        if not wanted:
            return []
        guard, plain, tools = self._guarded(messages, tools)
        made = []
        for turn, index in enumerate(wanted):
            prompt = self._render(plain[:index], tools, True, where)
            target = self._completion(prompt, plain[: index + 1], tools, guard.marker, where)
            opening, answer = guard.restore(prompt), guard.restore(target)
            made.append(Draft(opening, answer, turn, True, bool(opening.data or answer.data), guard.control))
        return made

    def _completion(self, prompt: str, turns: Sequence[dict[str, Any]], tools: Any, marker: str, where: str) -> str:
        """What follows the prompt once the last of ``turns`` has answered.

        Some templates write the opening of an answer, or earlier turns, otherwise once the answer is there. The answer
        is then found by rendering again with ``marker`` in its place.
        """
        whole = self._render(turns, tools, False, where)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        marked = self._render([*turns[:-1], {**turns[-1], "content": marker}], tools, False, where)
        at = marked.find(marker)
        if at < 0 or whole[:at] != marked[:at]:
            raise DataError(
                "data-chat",
                "the chat template does not write the answer as the data holds it, so it cannot be supervised",
                where=where,
                received=turns[-1]["content"],
                allowed="a template that writes the answer's text after its generation prompt",
                fix="set prompt.chat_template to another template",
            )
        return whole[at:]

    def _supervised(self, messages: Sequence[Message]) -> list[int]:
        answers = [
            i
            for i, m in enumerate(messages)
            if m.role == "assistant" and m.trained is not False and (m.content.strip() or m.tool_calls)
        ]
        if self.settings.train_on == "last" and answers:
            marked = [i for i in answers if messages[i].trained]
            return marked or answers[-1:]
        return answers

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        if self.settings.system and not (messages and messages[0].role in ("system", "developer")):
            return [Message("system", self.settings.system), *messages]
        return list(messages)

    def _guarded(self, messages: Sequence[Message], tools: Any) -> tuple[Guard, list[dict[str, Any]], Any]:
        plain = [m.to_dict() for m in messages]
        guard = Guard(self.tokenizer, self.template + str(plain) + str(tools or ""))
        return guard, [guard.protect(m) for m in plain], guard.protect(tools) if tools else None

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, generating: bool, where: str) -> str:
        return render_chat(
            self.template,
            messages,
            tools=tools,
            add_generation_prompt=generating,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
            where=where,
        )
