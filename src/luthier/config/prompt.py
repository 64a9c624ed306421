"""The `prompt:` section: how a row becomes the text the model sees."""

from __future__ import annotations

from typing import Literal

from luthier.config.section import Section, key


class Prompt(Section):
    """What the model is asked, and which part of the text is trained."""

    template: str | None = key(
        None,
        "Prompt text with {column} fields, {__sample__} (all inputs) and {__task__}; Ludwig's {__context__} is "
        "refused, as nothing is retrieved: put the passage into a column. Number formats such as {year:.2f} work. "
        "Empty: derived from the data.",
    )
    task: str | None = key(
        None, "What to do, in words; put where the template says {__task__}, without a template before the inputs."
    )
    system: str | None = key(None, "System message of every conversation, when a chat template is used.")
    chat_template: bool | str | None = key(
        None,
        "true: the tokenizer's own chat template; text: a Jinja chat template; false: never; "
        "empty: used when the data holds conversations.",
    )
    retrieval: None = key(None, "Retrieval of examples into the prompt. Not in this version; leave it empty.")
    train_on: Literal["completion", "all", "last"] = key(
        "completion",
        "Which tokens are trained: the answers, the whole text, or only the last answer of a conversation.",
    )
