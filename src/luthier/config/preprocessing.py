"""The `preprocessing:` section: splits, lengths and how the file is read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from luthier.config.section import Conflict, Float, Int, Section, key

Truncation = Literal["drop", "truncate_prompt", "truncate_target", "error"]


class SplitConfig(Section):
    """Which rows train, validate and test."""

    type: Literal["auto", "random", "fixed", "stratify", "datetime", "hash"] = key(
        "auto",
        "auto: a column named `split` when the table has one, stratify for classification, else random. "
        "fixed reads a column (0 train, 1 validation, 2 test, or the names); datetime puts the latest rows last: equal "
        "rows and those of a group go with their latest, near duplicates across the cut are told; hash keeps a row on "
        "its side when rows are added, unless they join what was apart.",
        ludwig="random",
        why="a split column in the table is honoured",
    )
    probabilities: tuple[Float, Float, Float] = key(
        (0.8, 0.1, 0.1), "Shares of train, validation and test; they sum to 1.", ludwig=(0.7, 0.1, 0.2)
    )
    column: str | None = key(
        None,
        "Column that fixed, stratify, datetime or hash reads. Dates are written year first (2024-05-31, 2024/5/31, "
        "2024年5月31日) or with day and month in the one order that fits every row.",
    )
    group: str | None = key(
        None,
        "Column whose equal values never stand on two sides, such as customer_id; a row without one stands alone.",
    )
    seed: Int | None = key(None, "Seed of the split; empty: random_seed.", ge=0)

    @field_validator("probabilities")
    @classmethod
    def _shares(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if any(share < 0 for share in value) or abs(sum(value) - 1) > 1e-6:
            raise _shares_are(f"the three shares are not negative and sum to 1, not {sum(value):g}", value)
        if value[0] == 0:
            raise _shares_are("the share of train is over 0", value)
        return value

    @model_validator(mode="after")
    def _column(self) -> SplitConfig:
        if self.type in ("datetime", "hash") and not self.column:
            raise Conflict(
                f"split type {self.type} needs `column`",
                received=f"type: {self.type}, no column",
                allowed="the column with the dates" if self.type == "datetime" else "a column of the table",
                fix="add `column: NAME` with a column of the table, or use type: random",
            )
        return self


class ReadLimits(Section):
    """How large a dataset may be before it is refused; what is raised here is memory that a hostile file may take."""

    file_bytes: Int = key(8 << 30, "Bytes of a file.", ge=1)
    field_chars: Int = key(16 << 20, "Characters of one field of a CSV or TSV file.", ge=1)
    unpacked_bytes: Int = key(
        512 << 20, "Bytes that a workbook may unpack to, and another file beyond a hundred times its size.", ge=1
    )
    cells: Int = key(
        2_000_000, "Cells of a workbook, merged ones and empty ones before a sheet's last cell among them.", ge=1
    )
    columns: Int = key(10_000, "Columns of a table.", ge=1)


class Preprocessing(Section):
    """How rows are read, split and cut."""

    split: SplitConfig = key(SplitConfig, "Which rows train, validate and test.")
    sample_ratio: Float = key(
        1.0, "Share of the rows that is used, drawn with random_seed before the split; over 0, up to 1.", gt=0, le=1
    )
    sample_size: Int | None = key(None, "Rows that are used at most, drawn as by sample_ratio.", ge=1)
    max_sequence_length: Int | None = key(
        None, "Longest example in tokens, prompt and answer together; empty: what the base model can take.", ge=8
    )
    global_max_sequence_length: Int | None = key(None, "Ludwig's name for max_sequence_length; the two are one.", ge=8)
    truncation: Truncation = key(
        "truncate_prompt",
        "What happens to an example that is too long: dropped, its prompt or its answer cut, or an error.",
        ludwig="truncate_target",
        why="a cut answer teaches the model to stop in the middle",
    )
    balance_classes: bool = key(False, "Draw the classes of a classification target equally often.")
    near_duplicates: bool = key(
        True,
        "Keep rows that are nearly equal on one side of the split, so that the test stays honest; datetime tells them "
        "instead, fixed takes the sides as they are. More than 10 of them that are over 5 % of the rows are a common "
        "form, not copies, and are divided; what all rows begin with, and a column with one value, count for nothing.",
        ludwig=False,
    )
    redact: tuple[Literal["email", "phone", "card", "key"], ...] = key(
        (),
        "What is replaced in every row by its name in brackets before anything else sees the rows: email addresses, "
        "phone numbers, card numbers (with a valid check digit), keys and passwords.",
    )
    encoding: str | None = key(None, "Text encoding of the data file, such as cp932; empty: detected.")
    sheet: str | Int | None = key(None, "Sheet of an Excel file, by name or number from 0; empty: the first.")
    limits: ReadLimits = key(ReadLimits, "How large a dataset may be before it is refused.")

    @model_validator(mode="after")
    def _one_sample(self) -> Preprocessing:
        if self.sample_size is not None and self.sample_ratio < 1:
            raise Conflict(
                "sample_ratio and sample_size both say how many rows are used",
                received=f"sample_ratio: {self.sample_ratio:g}, sample_size: {self.sample_size}",
                allowed="one of the two",
                fix="leave sample_ratio or sample_size out",
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, data: Any) -> Any:
        """The two names of the longest example are one value."""
        if isinstance(data, dict):
            own, ludwig = data.get("max_sequence_length"), data.get("global_max_sequence_length")
            value = own if own is not None else ludwig
            if own is not None and ludwig is not None and not _same_number(own, ludwig):
                raise Conflict(
                    "max_sequence_length and global_max_sequence_length are one key and differ",
                    received=f"max_sequence_length: {own}, global_max_sequence_length: {ludwig}",
                    allowed="one of the two",
                    fix="leave global_max_sequence_length out",
                )
            if value is not None:
                return {**data, "max_sequence_length": value, "global_max_sequence_length": value}
        return data


def _same_number(one: Any, other: Any) -> bool:
    """Whether two values are one number, however it is written; text that is none is compared as it stands."""
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def _shares_are(message: str, shares: tuple[float, float, float]) -> Conflict:
    return Conflict(
        message,
        received=str(list(shares)),
        allowed="three numbers from 0 to 1 that sum to 1, the first over 0",
        fix="probabilities: [0.8, 0.1, 0.1]",
    )
