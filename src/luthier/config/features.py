"""The `input_features:` and `output_features:` sections: which columns are asked and answered."""

from __future__ import annotations

from typing import Literal

from luthier.config.section import Int, Section, key


class Match(Section):
    """When an answer counts as a class."""

    type: Literal["contains", "regex"] = key("contains", "How the value is looked for in the answer.")
    value: str = key(..., "The text or the regular expression.", min_length=1)


class Decoder(Section):
    """How an answer is read."""

    type: Literal["text_extractor", "category_extractor"] = key(
        "text_extractor", "text_extractor keeps the answer; category_extractor reads a class from it."
    )
    match: dict[str, Match] = key({}, "For each class, what an answer has to hold.")
    fallback_label: str | None = key(None, "The class of an answer that holds none.")


class FeaturePreprocessing(Section):
    """How one column is read."""

    max_sequence_length: Int | None = key(None, "Longest text of this column in tokens; empty: no own limit.", ge=1)
    fallback_label: str | None = key(None, "The class of an answer that names none (category).")
    vocab: tuple[str, ...] | None = key(None, "The allowed answers (category); empty: those in the data.")


class Feature(Section):
    """One column."""

    name: str = key(..., "The column, and the name of the predictions.", min_length=1)
    type: Literal["text", "category"] = key("text", "text, or category for one of few answers.")
    column: str | None = key(None, "The column, where it is not called as the feature is.")
    preprocessing: FeaturePreprocessing = key(FeaturePreprocessing, "How the column is read.")
    decoder: Decoder | None = key(None, "How the answer is read; empty: what suits the type.")
