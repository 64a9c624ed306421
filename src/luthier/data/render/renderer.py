"""The one function from a request to prompt ids, for training, prediction, chat, server and export.

Prompt and target are tokenised apart, so that the prompt's ids at training are those at prediction. BOS is what the
tokenizer itself adds, never twice; control tokens come from templates, never from data; an answer's end is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.assets.tokenizer import Tokenizer
from luthier.data.conversation import conversation, tools_of
from luthier.data.layout import Layout
from luthier.data.render.chat import DEFAULT_CHAT, Asked, ChatRenderer
from luthier.data.render.draft import Draft, Dropped, Outcome, PromptIds, Settings, merge
from luthier.data.render.plain import Context, PlainRenderer, sample
from luthier.data.render.template import Rendered, is_missing, plain_text
from luthier.errors import DataError
from luthier.types import Example, Message

Drafted = tuple[int, list[Draft], "Silent"]  # a row's number, what it is to learn, and what of it says nothing


@dataclass(frozen=True, slots=True)
class Silent:
    """Columns of a row without a value, keys of its turns that nothing reads, and whether an answer opens it."""

    missing: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    unprompted: bool = False


class Renderer:
    """Turns rows, conversations and texts of one run into token ids."""

    def __init__(
        self,
        layout: Layout,
        prompt_config: Any,
        tokenizer: Tokenizer,
        *,
        preprocessing: Any = None,
        context: Context | None = None,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        name: str = "data",
    ) -> None:
        """``columns``: what a template may name (default: the layout's own); ``limit``: the model's context in tokens.

        ``prompt_config`` and ``preprocessing`` are the config sections; ``name`` is the dataset's, for messages.

        Raises:
            DataError: ``data-template``, ``data-missing-column``.
        """
        self.layout, self.tokenizer, self.name = layout, tokenizer, name
        self.settings = Settings.of(prompt_config, preprocessing, limit)
        known = (
            tuple(columns) if columns is not None else (*layout.inputs, *((layout.target,) if layout.target else ()))
        )
        self._plain = PlainRenderer(layout, self.settings, known, context)
        template = self._chat_source()
        self._in_chat = template is not None
        self._chat = ChatRenderer(template or tokenizer.chat_template or DEFAULT_CHAT, tokenizer, self.settings)
        if self._in_chat:
            self._chat.check()

    @property
    def template_hash(self) -> str:
        """Sha256 over everything that decides how a row is written."""
        s = self.settings
        source = self._chat.template if self._in_chat else ""
        parts: list[Any] = [source, self._plain.source, s.task, s.system, s.train_on, s.max_length, s.truncation]
        parts += [self.layout.kind, list(self.layout.inputs), self.layout.target, list(self.tokenizer.bos_ids)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Sha256 over everything that decides which ids a row becomes."""
        parts = [self.template_hash, self.tokenizer.content_hash, self.layout.system, self.layout.tools, self.describe]
        parts.append(repr((self.tokenizer.eos_ids, self.tokenizer.bos_ids)))
        return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()

    @property
    def is_chat(self) -> bool:
        """Whether rows are written as a conversation, so that earlier turns can stand before a question."""
        return self._in_chat

    @property
    def describe(self) -> str:
        """One line on how rows are written, for people."""
        if self._in_chat:
            own = self._chat.template == self.tokenizer.chat_template
            return "the base model's chat template" if own else "a chat template"
        return "prompt.template" if self.settings.template is not None else f"the default {self.layout.kind} template"

    # ------------------------------------------------------------------------------------------- training

    def examples(self, row: Mapping[str, Any], index: int) -> list[Example] | Dropped:
        """The training examples of a row, or why there are none."""
        outcome = self.outcomes([(index, row)])[0]
        return outcome.dropped or list(outcome.examples)

    def outcomes(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Outcome]:
        """What becomes of each (index, row), encoded together. Raises DataError naming the row."""
        return self.encode(self.draft(rows))

    def draft(self, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Drafted]:
        """The first half of `outcomes`: texts, not yet tokens. May run beside `encode` of other rows."""
        rows = list(rows)
        if not self._in_chat:
            plain = [(index, *self._plain_drafts(row, self._where(index))) for index, row in rows]
            return [(index, drafts, Silent(missing)) for index, drafts, missing in plain]
        asked = [self._asked_of(row, self._where(index)) for index, row in rows]
        made = iter(self._chat.drafts([one for one, _ in asked if one is not None]))
        return [
            (
                index,
                next(made) if one is not None else [],
                Silent(missing, self._unread(one), one is not None and self._chat.unprompted(one)),
            )
            for (index, _), (one, missing) in zip(rows, asked, strict=True)
        ]

    def encode(self, drafted: Sequence[Drafted]) -> list[Outcome]:
        """The second half of `outcomes`."""
        flat = [draft for _, drafts, _ in drafted for draft in drafts]
        prompts, targets = self._encode_prompts(flat), self._encode_targets(flat)
        out, at = [], 0
        for index, drafts, silent in drafted:
            pairs = list(zip(prompts[at : at + len(drafts)], targets[at : at + len(drafts)], strict=True))
            made = self._outcome(index, drafts, pairs, silent)
            out.append(replace(made, unread=silent.unread, unprompted=silent.unprompted))
            at += len(drafts)
        return out

    # ----------------------------------------------------------------------------------------- prediction

    def prompt(self, row: Mapping[str, Any], index: int = 0) -> PromptIds:
        """What the model is given for a row: the same ids as at training, whether or not the row has a target."""
        return self.prompts([row], index)[0]

    def prompts(self, rows: Sequence[Mapping[str, Any]], first: int = 0) -> list[PromptIds]:
        """`prompt` for many rows, encoded together; ``first`` is the number of the first one, for messages."""
        places = [self._where(first + i) for i in range(len(rows))]
        if self._in_chat:
            drafts = self._chat.prompts([self._question(row, w) for row, w in zip(rows, places, strict=True)])
        else:
            drafts = [self._plain_question(row, w) for row, w in zip(rows, places, strict=True)]
        encoded = zip(drafts, self._encode_prompts(drafts), self._begun(drafts), strict=True)
        return [PromptIds((*ids, *begun), d.prompt.text + d.target.text) for d, ids, begun in encoded]

    @property
    def goes_on(self) -> bool:
        """Whether rows are running text, of which a prediction is the continuation: nothing in them asks."""
        return self.layout.kind == "text" and not self._in_chat and self.settings.template is None

    def chat_prompt(self, messages: Sequence[Message], tools: Any = None) -> PromptIds:
        """The ids of a conversation so far, ready for the next answer, as training wrote them."""
        draft = self._chat.prompts([Asked(messages, "the conversation", tools)])[0]
        return PromptIds(tuple(self._encode_prompts([draft])[0]), draft.prompt.text)

    def beside(self, row: Mapping[str, Any], index: int = 0) -> tuple[Message | None, Any] | None:
        """The system turn that opens a row's conversation, as its data has it, and its tools; None of an empty one."""
        if self.layout.kind == "chat":
            asked = self._conversation(row, self._where(index))
            if not asked.messages:
                return None
            return (asked.messages[0] if asked.messages[0].role == "system" else None), asked.tools
        return self._system(row), None

    def _system(self, row: Mapping[str, Any]) -> Message | None:
        said = plain_text(row.get(self.system_column)) if self.system_column else ""
        return Message("system", said) if said.strip() else None

    def question(self, row: Mapping[str, Any]) -> str:
        """What the user's turn says of a row that is not a conversation, before any chat template."""
        return self._asked(row, "the message").text

    def text_prompt(self, text: str) -> PromptIds:
        """The ids of a bare text that the model goes on from; what it spells is text."""
        draft = Draft(Rendered(text, ((0, len(text)),) if text else ()), Rendered(""))
        return PromptIds(tuple(self._encode_prompts([draft])[0]), text)

    def answer_ids(self, row: Mapping[str, Any], answer: str) -> list[int]:
        """The ids that training would supervise if the row's answer were this one, its end included.

        They are the same after any prompt. Empty where there is nothing to learn from such a row.
        """
        assert self.layout.target is not None, "an answer has a column"
        drafts = self.draft([(0, {**row, self.layout.target: answer})])[0][1]
        return self._encode_targets(drafts[-1:])[0] if drafts else []

    # ------------------------------------------------------------------------------------------ internals

    def _chat_source(self) -> str | None:
        """The chat template that rows are written with, None for plain text."""
        asked = self.settings.chat_template
        if isinstance(asked, str):
            return asked
        if asked is True or self.layout.kind == "chat":
            return self.tokenizer.chat_template or DEFAULT_CHAT
        if asked is False or self.settings.template is not None or self.layout.kind == "text":
            return None
        return self.tokenizer.chat_template

    def _where(self, index: int) -> str:
        return f"{self.name} row {index}"

    def _conversation(self, row: Mapping[str, Any], where: str) -> Asked:
        """The conversation of a row, and the tools it may call."""
        return Asked(conversation(row, self.layout, where), where, tools_of(row, self.layout, where))

    def _unread(self, asked: Asked | None) -> tuple[str, ...]:
        """The keys of a row's turns that neither Luthier nor the chat template reads."""
        turns = asked.messages if asked is not None else ()
        keys = [key for turn in turns for key in turn.unread]
        keys += [key for turn in turns for key in turn.reasoning if key not in self._chat.template]
        return tuple(dict.fromkeys(keys))

    def _plain_drafts(self, row: Mapping[str, Any], where: str) -> tuple[list[Draft], tuple[str, ...]]:
        """The draft of a row (none when it has nothing to learn), and its prompt columns without a value."""
        answer = self._answer(row)
        if not answer.strip():
            return [], ()
        asked = self._plain.prompt(row, where)
        return [self._guard(Draft(asked, Rendered(answer, ((0, len(answer)),))))], asked.missing

    def _plain_question(self, row: Mapping[str, Any], where: str) -> Draft:
        """The draft of what a row asks; of running text, its beginning stands where training learned it."""
        begun = self._answer(row) if self.goes_on else ""
        return self._guard(Draft(self._plain.prompt(row, where), Rendered(begun, ((0, len(begun)),) if begun else ())))

    def _asked_of(self, row: Mapping[str, Any], where: str) -> tuple[Asked | None, tuple[str, ...]]:
        """The conversation that a row is, with its answer; None when it has nothing to learn."""
        if self.layout.kind == "chat":
            return self._conversation(row, where), ()
        answer = self._answer(row)
        if not answer.strip():
            return None, ()
        asked = self._asked(row, where)
        return Asked([*self._turns(row, asked), Message("assistant", answer)], where), asked.missing

    def _answer(self, row: Mapping[str, Any]) -> str:
        return plain_text(None if self.layout.target is None else row.get(self.layout.target))

    def _question(self, row: Mapping[str, Any], where: str) -> Asked:
        """The conversation of a row up to the answer that is asked for."""
        if self.layout.kind != "chat":
            return Asked(self._turns(row, self._asked(row, where)), where)
        asked = self._conversation(row, where)
        answered = bool(asked.messages) and asked.messages[-1].role == "assistant"
        history = asked.messages[:-1] if answered else asked.messages
        if not history:
            raise DataError(
                "data-chat",
                f"the conversation {'is one answer' if answered else 'is empty'}: there is nothing to answer",
                where=where,
                received="no turn before the answer" if answered else "no turns",
                allowed="at least one turn to answer",
                fix="fill it in, or take the row out of the table",
            )
        return replace(asked, messages=history)

    def _asked(self, row: Mapping[str, Any], where: str) -> Rendered:
        """What the inputs of a row ask, before any chat template."""
        if self.settings.template is not None:
            return self._plain.prompt(row, where)
        inputs = self.layout.inputs
        missing = tuple(name for name in inputs if is_missing(row.get(name)))
        if self.layout.kind == "columns":
            return Rendered(sample(row, self.layout, where), (), missing)
        sample(row, self.layout, where)  # names a column that is not there
        return Rendered(
            "\n\n".join(text for name in inputs if (text := plain_text(row.get(name))).strip()), (), missing
        )

    @property
    def system_column(self) -> str | None:
        """The column whose text opens each row's conversation; none where plain text or the template writes it."""
        column = self.layout.system
        return column if self._in_chat and column not in self._plain.fields else None

    def _turns(self, row: Mapping[str, Any], asked: Rendered) -> list[Message]:
        system = self._system(row)
        return [*([system] if system is not None else []), Message("user", asked.text)]

    def _guard(self, draft: Draft) -> Draft:
        """Note whether the data of a plain draft needs care."""
        texts = [draft.prompt.text[a:b] for a, b in draft.prompt.data]
        risky = any(self.tokenizer.hazards(text) for text in texts)
        control = any(self.tokenizer.find_special(text) for text in (*texts, draft.target.text))
        return replace(draft, guarded=risky, control=control)

    def _encode_prompts(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Prompt ids of drafts. They start as the chat template writes, else with BOS as the tokenizer adds it."""
        safe = [i for i, d in enumerate(drafts) if not d.guarded]
        care = [i for i, d in enumerate(drafts) if d.guarded]
        out: list[list[int]] = [[] for _ in drafts]
        for i, ids in zip(
            safe, self.tokenizer.encode_batch([drafts[i].prompt.text for i in safe], controls=True), strict=True
        ):
            out[i] = ids
        spans = [(drafts[i].prompt.text, drafts[i].prompt.data) for i in care]
        for i, ids in zip(care, self.tokenizer.encode_spans(spans), strict=True):
            out[i] = ids
        bos = list(self.tokenizer.bos_ids)
        for i, draft in enumerate(drafts):
            if bos and not draft.from_chat and out[i][: len(bos)] != bos:
                out[i] = bos + out[i]
            if not out[
                i
            ]:  # something has to precede the first answer token: the mark that ends one text and starts another
                out[i] = [self.tokenizer.eos_id]
        return out

    def _encode_targets(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Target ids of drafts, each through its first end-of-turn token."""
        spans = [(d.target.text, d.target.data) for d in drafts]
        ends = frozenset(self.tokenizer.eos_ids)
        out = []
        for ids in self.tokenizer.encode_spans(spans, continuation=True):
            stop = next((i for i, token in enumerate(ids) if token in ends), None)
            out.append([*ids, self.tokenizer.eos_id] if stop is None else ids[: stop + 1])
        return out

    def _begun(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """The ids of answers that have begun and are to be gone on with, as training wrote them; without their end."""
        texts = [(d.target.text, d.target.data) for d in drafts]
        return self.tokenizer.encode_spans(texts, continuation=True) if self.goes_on else [[] for _ in drafts]

    def _outcome(
        self,
        index: int,
        drafts: Sequence[Draft],
        pairs: Sequence[tuple[list[int], list[int]]],
        silent: Silent,
    ) -> Outcome:
        missing, control = silent.missing, any(d.control for d in drafts)
        if not drafts:
            reason = "nothing precedes the answer" if silent.unprompted else "no target"
            return Outcome(index, dropped=Dropped(reason, index), missing=missing)
        fitted = [self._fit(prompt, target, index) for prompt, target in pairs]
        made: list[Example] = []
        for draft, fit in zip(drafts, fitted, strict=True):
            if fit is not None:
                made.append(self._example(fit, index, draft.turn))
        if not made:
            return Outcome(index, dropped=Dropped("too long", index), missing=missing, control=control)
        ends = frozenset(self.tokenizer.eos_ids)
        return Outcome(
            index,
            tuple(merge(made)),
            missing=missing,
            control=control,
            cut=tuple(dict.fromkeys(fit.cut for fit in fitted if fit is not None and fit.cut)),
            lost_turns=len(drafts) - len(made),
            answers=len(made),
            ended=sum(1 for example in made if example.ids[-1] in ends and example.weights[-1]),
        )

    def _example(self, fit: Fit, index: int, turn: int) -> Example:
        """Weights: 1 on the answer (on everything under ``train_on: all``); nothing precedes the first token, so 0."""
        before = 1.0 if self.settings.train_on == "all" else 0.0
        weights = [before] * len(fit.prompt) + [1.0] * len(fit.target)
        weights[0] = 0.0
        return Example((*fit.prompt, *fit.target), tuple(weights), index, turn)

    def _fit(self, prompt: list[int], target: list[int], index: int) -> Fit | None:
        """Prompt and target within the maximum length under the declared policy; None drops the example."""
        room = self.settings.max_length
        length = len(prompt) + len(target)
        if room is None or length <= room:
            return Fit(prompt, target)
        if self.settings.truncation == "error":
            raise DataError(
                "data-too-long",
                "a row is longer than the maximum, and the policy is 'error'",
                where=self._where(index),
                received=f"{length} tokens ({len(prompt)} prompt, {len(target)} answer)",
                allowed=f"at most {room} tokens (preprocessing.max_sequence_length, or the model's context)",
                fix="raise preprocessing.max_sequence_length, shorten the row, or set preprocessing.truncation",
            )
        bos = list(self.tokenizer.bos_ids)
        head = bos if bos and prompt[: len(bos)] == bos else []
        keep = room - len(target) - len(head)
        if self.settings.truncation == "truncate_prompt" and keep >= 1:
            return Fit([*head, *prompt[len(prompt) - keep :]], target, "truncate_prompt")
        if self.settings.truncation == "truncate_target" and room > len(prompt):
            return Fit(prompt, target[: room - len(prompt)], "truncate_target")
        return None


@dataclass(frozen=True, slots=True)
class Fit:
    """A prompt and target that fit, and which policy made them."""

    prompt: list[int]
    target: list[int]
    cut: str = ""
