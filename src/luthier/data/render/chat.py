"""Conversations through a chat template: each answer from exactly the history that prediction would see.

A row that is not a conversation becomes one: the inputs are the user's turn, the target the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.assets.chat import render_chat
from luthier.assets.template_worker import Job, shared
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


@dataclass(frozen=True, slots=True)
class Asked:
    """One conversation to be written."""

    messages: Sequence[Message]
    where: str
    tools: Any = None


@dataclass(frozen=True, slots=True)
class Guarded:
    """A conversation as it goes into the template: control strings in it stand for themselves, nothing else."""

    guard: Guard
    turns: Sequence[dict[str, Any]]
    tools: Any
    where: str
    wanted: Sequence[int] = ()  # the answers that are trained

    def job(self, cuts: Sequence[tuple[int, bool]]) -> Job:
        """What the template is asked to write."""
        return Job(self.turns, cuts, self.tools, self.where)


class ChatRenderer:
    """Drafts of conversations under one template, many in one call."""

    def __init__(self, template: str, tokenizer: Tokenizer, settings: Settings) -> None:
        self.template, self.tokenizer, self.settings = template, tokenizer, settings

    def check(self) -> None:
        """Raise DataError ``data-template`` when the template is malformed."""
        if self.template != DEFAULT_CHAT:
            shared().check(self.template, "prompt.chat_template")

    def prompts(self, asked: Sequence[Asked]) -> list[Draft]:
        """The drafts of prompts alone: each conversation so far, with the opening of the answer."""
        ready = [self._guarded(one, ()) for one in asked]
        made = []
        for one, (text,) in zip(ready, self._render([one.job([(len(one.turns), True)]) for one in ready]), strict=True):
            rendered = one.guard.restore(text)
            empty = replace(rendered, text="", data=())
            made.append(Draft(rendered, empty, 0, True, bool(rendered.data), one.guard.control))
        return made

    def drafts(self, asked: Sequence[Asked]) -> list[list[Draft]]:
        """Of each conversation a draft for each answer that is trained, in order; none when there is no answer."""
        ready = [self._guarded(one, self._supervised(one)) for one in asked]
        jobs = [one.job([cut for i in one.wanted for cut in ((i, True), (i + 1, False))]) for one in ready]
        texts = self._render(jobs)
        answers = self._answers(ready, texts)
        out = []
        for one, prompts, targets in zip(ready, texts, answers, strict=True):
            made = []
            for index, target in zip(one.wanted, targets, strict=True):
                _require_calls(target, one, one.turns[index])
            for turn, (prompt, target) in enumerate(zip(prompts[::2], targets, strict=True)):
                opening, answer = one.guard.restore(prompt), one.guard.restore(target)
                made.append(Draft(opening, answer, turn, True, bool(opening.data or answer.data), one.guard.control))
            out.append(made)
        return out

    def _answers(self, ready: Sequence[Guarded], texts: Sequence[Sequence[str]]) -> list[list[str]]:
        """What follows each prompt once its turn has answered.

        Some templates write the opening of an answer, or earlier turns, otherwise once the answer is there. The answer
        is then found by rendering again with a marker in its place.
        """
        out = [[w[len(p) :] if w.startswith(p) else "" for p, w in zip(t[::2], t[1::2], strict=True)] for t in texts]
        odd = [
            (n, k, one)
            for n, (one, t) in enumerate(zip(ready, texts, strict=True))
            for k in range(len(one.wanted))
            if not t[2 * k + 1].startswith(t[2 * k])
        ]
        jobs = []
        for _, k, one in odd:
            last = one.wanted[k]
            turns = [*one.turns[:last], {**one.turns[last], "content": one.guard.marker}]
            jobs.append(Job(turns, [(last + 1, False)], one.tools, one.where))
        for (n, k, one), (marked,) in zip(odd, self._render(jobs), strict=True):
            out[n][k] = _after_marker(texts[n][2 * k + 1], marked, one, one.turns[one.wanted[k]])
        return out

    def unprompted(self, asked: Asked) -> bool:
        """Whether the conversation opens with an answer that would be trained if anything stood before it.

        Prediction is always asked something: it never sees an empty history, so nothing is learned from one.
        """
        as_text = self.settings.train_on == "all" and self._supervised(asked)  # with all that precedes a later answer
        return 0 in self._answered(asked.messages) and not as_text

    def _supervised(self, asked: Asked) -> list[int]:
        """The answers that are trained, by their place once the system prompt stands first."""
        added = len(self._with_system(asked.messages)) - len(asked.messages)
        return [added + i for i in self._answered(asked.messages) if i]

    def _answered(self, messages: Sequence[Message]) -> list[int]:
        """The answers that ``train_on`` and the weights of the data ask for."""
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

    def _guarded(self, asked: Asked, wanted: Sequence[int]) -> Guarded:
        plain = [m.to_dict() for m in self._with_system(asked.messages)]
        guard = Guard(self.tokenizer, self.template + str(plain) + str(asked.tools or ""))
        tools = guard.protect(asked.tools) if asked.tools else None
        return Guarded(guard, [guard.protect(m) for m in plain], tools, asked.where, wanted)

    def _render(self, jobs: Sequence[Job]) -> list[list[str]]:
        """Luthier's own template here; any other is somebody else's program, and runs in the worker."""
        variables: dict[str, Any] = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
        wanted = [job for job in jobs if job.cuts]
        if self.template != DEFAULT_CHAT:
            texts = iter(shared().render(self.template, wanted, variables) if wanted else ())
        else:
            texts = iter(
                [
                    render_chat(
                        self.template,
                        job.messages[:count],
                        tools=job.tools,
                        add_generation_prompt=opened,
                        where=job.where,
                        **variables,
                    )
                    for count, opened in job.cuts
                ]
                for job in wanted
            )
        return [next(texts) if job.cuts else [] for job in jobs]


def _require_calls(target: str, one: Guarded, turn: Mapping[str, Any]) -> None:
    """Many templates know no tools and leave a call out: the model would learn to answer nothing."""
    for call in turn.get("tool_calls", ()):
        name = call["function"]["name"]
        if name not in target:
            raise DataError(
                "data-chat",
                "the chat template does not write tool calls, so this answer cannot be supervised",
                where=one.where,
                received=f"a call of {one.guard.restore(name).text!r}",
                allowed="a template that writes message['tool_calls']",
                fix="choose a base model whose template knows tools, set prompt.chat_template to one that does, "
                'or give these turns "weight": 0',
            )


def _after_marker(whole: str, marked: str, one: Guarded, turn: Mapping[str, Any]) -> str:
    at = marked.find(one.guard.marker)
    if at < 0 or whole[:at] != marked[:at]:
        raise DataError(
            "data-chat",
            "the chat template does not write the answer as the data holds it, so it cannot be supervised",
            where=one.where,
            received=turn["content"],
            allowed="a template that writes the answer's text after its generation prompt",
            fix="set prompt.chat_template to another template",
        )
    return whole[at:]
