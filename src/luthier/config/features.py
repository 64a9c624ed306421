"""The `input_features:` and `output_features:` sections: which columns are asked and answered."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from luthier.config.section import Conflict, Int, Section, key


class Match(Section):
    """When an answer counts as a class."""

    type: Literal["contains", "equals", "regex"] = key(
        "contains", "How the value is looked for in the answer: anywhere in it, as the whole of it, or as a pattern."
    )
    value: str = key(..., "The text or the regular expression.", min_length=1)

    @model_validator(mode="after")
    def _pattern(self) -> Match:
        if self.type == "regex":
            try:
                re.compile(self.value)
            except re.error as error:
                raise Conflict(
                    f"the value is no regular expression: {error}",
                    received=self.value,
                    allowed="a regular expression of Python's re",
                    fix="correct it, or use type: contains for plain text",
                ) from error
        return self


class Decoder(Section):
    """How an answer is read."""

    type: Literal["text_extractor", "category_extractor"] = key(
        "text_extractor", "text_extractor keeps the answer; category_extractor reads a class from it."
    )
    match: dict[str, Match] = key(
        {}, "For each class, what an answer has to hold; the first class that fits counts. Empty: the class itself."
    )
    fallback_label: str | None = key(None, "The class of an answer that holds none; empty: the most probable one.")


class FeaturePreprocessing(Section):
    """How one column is read."""

    max_sequence_length: Int | None = key(
        None,
        "Refused: preprocessing.max_sequence_length holds for the whole example.",
        ge=1,
    )
    fallback_label: str | None = key(None, "The class of an answer that names none (category).")
    vocab: tuple[str, ...] | None = key(None, "The allowed answers (category); empty: those in the data.")


class Feature(Section):
    """One column."""

    name: str = key(
        ...,
        "The column, and the name of the predictions. The one input beside a `prompt.template` may name the prompt "
        "instead, as Ludwig's examples do: the columns of the template are the inputs then.",
        min_length=1,
    )
    type: Literal["text", "category"] = key("text", "text, or category for one of few answers.")
    column: str | None = key(None, "The column, where it is not called as the feature is.")
    preprocessing: FeaturePreprocessing = key(FeaturePreprocessing, "How the column is read.")
    decoder: Decoder | None = key(None, "How the answer is read; empty: what suits the type.")
    constrained: bool | None = key(
        None,
        "Whether answers of a category are held to its classes: the most probable one is taken, whole, and draws are "
        "made among them alone. false: answers are free text, and `decoder` reads a class from them. "
        "Empty: true, but false under `defaults: ludwig`.",
        ludwig_note="free text, read by the rules",
    )

    @model_validator(mode="after")
    def _reads_its_type(self) -> Feature:
        if self.type == "text" and self.decoder is not None and self.decoder.type == "category_extractor":
            raise _no_category("decoder.type: category_extractor", "a category_extractor reads classes")
        if self.type == "text" and self.constrained:
            raise _no_category("constrained: true", "answers are held to classes")
        return self

    @property
    def fallback_label(self) -> str | None:
        """The class of an answer that names none, wherever it was declared."""
        own = self.decoder.fallback_label if self.decoder is not None else None
        return own if own is not None else self.preprocessing.fallback_label


def _no_category(asked: str, why: str) -> Conflict:
    return Conflict(
        f"{why}, and the feature is text",
        received=f"{asked}, type: text",
        allowed=f"{asked} with type: category",
        fix="set the feature's type to category",
    )
