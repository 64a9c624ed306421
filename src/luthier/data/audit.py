"""What will be learned from a dataset, counted: nothing is dropped, cut or changed without a line here.

Row numbers count from 0, as in a DataFrame.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.assets.tokenizer import Tokenizer
from luthier.data.render.draft import Outcome
from luthier.types import SPLITS, Example, Split

LISTED = 1000  # row numbers kept in the JSON form for each cause; the counts are always whole
SHOWN = 5  # row numbers in a line for people
SAMPLES = 8  # rendered rows kept

Pieces = list[tuple[str, bool]]  # a rendered row: stretches of text, and whether they are trained


@dataclass(frozen=True, slots=True)
class SplitCount:
    """One side of the split, in numbers."""

    rows: int
    examples: int
    tokens: int
    supervised: int


@dataclass(frozen=True, slots=True)
class Audit:
    """The findings of one preparation. Row lists are in order, each row once."""

    rows: int
    rendering: str
    splits: Mapping[str, SplitCount]
    dropped: Mapping[str, Sequence[int]]  # reason -> rows
    missing: Mapping[str, Sequence[int]]  # prompt column -> rows where it had no value
    control: Sequence[int]  # rows whose data spells a special token; it was kept as text
    cut: Mapping[str, Sequence[int]]  # policy -> rows that it shortened
    lost_turns: int  # answers left out as too long from conversations that were kept
    answers: int
    ended: int  # answers whose end-of-turn token is trained
    duplicates: Sequence[int]  # rows equal to an earlier row of their split, as the model sees them
    leaked: Sequence[int]  # rows of validation and test that also stand in train
    lengths: Mapping[str, int]  # of the training examples: min, p50, p90, p99, max tokens
    notes: Sequence[str] = ()
    samples: Sequence[Pieces] = field(default_factory=tuple)
    unread: Mapping[str, Sequence[int]] = field(default_factory=dict)  # key of a turn that nothing reads -> rows
    unprompted: Sequence[int] = ()  # rows whose conversation opens with an answer, which is not trained

    def stored(self) -> dict[str, Any]:
        """Everything as JSON types, for `restored`."""
        return asdict(self)

    @classmethod
    def restored(cls, value: Mapping[str, Any]) -> Audit:
        """What `stored` gave, read back."""
        splits = {name: SplitCount(**count) for name, count in value["splits"].items()}
        samples = tuple([(text, trained) for text, trained in one] for one in value["samples"])
        return cls(**{**value, "splits": splits, "samples": samples, "notes": tuple(value["notes"])})

    @property
    def supervised_share(self) -> float:
        """Trained tokens among all tokens of the training split."""
        train = self.splits.get("train")
        return train.supervised / train.tokens if train and train.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON types: audit.json."""
        return {
            "format": 1,
            "rows": self.rows,
            "rendering": self.rendering,
            "splits": {name: _fields(count) for name, count in self.splits.items()},
            "supervised_share": round(self.supervised_share, 6),
            "dropped": {reason: _listed(rows) for reason, rows in self.dropped.items()},
            "missing": {column: _listed(rows) for column, rows in self.missing.items()},
            "unread": {key: _listed(rows) for key, rows in self.unread.items()},
            "unprompted_answers": _listed(self.unprompted),
            "control_token_rows": _listed(self.control),
            "cut": {policy: _listed(rows) for policy, rows in self.cut.items()},
            "lost_turns": self.lost_turns,
            "answers": self.answers,
            "answers_with_end_trained": self.ended,
            "duplicates": _listed(self.duplicates),
            "leaked": _listed(self.leaked),
            "lengths": dict(self.lengths),
            "notes": list(self.notes),
            "samples": [[{"text": text, "trained": trained} for text, trained in pieces] for pieces in self.samples],
        }

    def lines(self) -> list[str]:
        """The findings for people, the ordinary ones first; the table's notes were told when it was read."""
        out = [f"{self.rows:,} rows, written with {self.rendering}"]
        out += [
            f"{name}: {c.rows:,} rows, {c.examples:,} examples, {c.tokens:,} tokens, {c.supervised:,} of them trained"
            for name, c in self.splits.items()
        ]
        if self.lengths:
            out.append("tokens an example: " + ", ".join(f"{name} {n:,}" for name, n in self.lengths.items()))
        out.append(f"the end of the answer is trained in {self.ended:,} of {self.answers:,} answers")
        out += [f"dropped, {reason}: {_some(rows)}" for reason, rows in self.dropped.items()]
        out += [f"column {column!r} has no value, rendered as empty: {_some(r)}" for column, r in self.missing.items()]
        out += [f"key {key!r} of a turn, which nothing reads: {_some(rows)}" for key, rows in self.unread.items()]
        whole = {"truncate_prompt": "; predictions are asked whole"}
        out += [f"longer than the maximum, {policy}: {_some(rows)}{whole.get(policy, '')}"
                for policy, rows in self.cut.items()]  # fmt: skip
        if self.lost_turns:
            out.append(f"answers left out as too long from conversations that were kept: {self.lost_turns:,}")
        if self.unprompted:
            out.append(f"conversation that begins with an answer, which is not learned: {_some(self.unprompted)}")
        if self.control:
            out.append(f"text that spells a control token, kept as ordinary text: {_some(self.control)}")
        if self.duplicates:
            out.append(f"equal to an earlier row of the same split: {_some(self.duplicates)}")
        if self.leaked:
            out.append(f"in validation or test, and in train too: {_some(self.leaked)}")
        return out


class AuditBuilder:
    """Counts outcomes as they come, keeping a few numbers a row and no example."""

    def __init__(self) -> None:
        self._counts: dict[Split, list[int]] = {split: [0, 0, 0, 0] for split in SPLITS}
        self._causes: dict[str, dict[str, array[int]]] = {"dropped": {}, "missing": {}, "unread": {}, "cut": {}}
        self._control, self._unprompted = array("q"), array("q")
        self._seen = {split: (array("q"), array("Q")) for split in SPLITS}  # rows, and a hash of what they became
        self._rows = self._lost = self._answers = self._ended = 0
        self._lengths = array("i")
        self._samples: list[Example] = []

    def add(self, split: Split, outcome: Outcome) -> None:
        """Count one row of ``split``."""
        row = outcome.row
        self._rows += 1
        for kind, causes in (
            ("dropped", (outcome.dropped.reason,) if outcome.dropped else ()),
            ("missing", outcome.missing),
            ("unread", outcome.unread),
            ("cut", outcome.cut),
        ):
            for cause in causes:
                self._causes[kind].setdefault(cause, array("q")).append(row)
        if outcome.control:
            self._control.append(row)
        if outcome.unprompted:
            self._unprompted.append(row)
        self._lost += outcome.lost_turns
        self._answers += outcome.answers
        self._ended += outcome.ended
        if outcome.examples:
            self._add_examples(split, row, outcome.examples)

    def _add_examples(self, split: Split, row: int, examples: Sequence[Example]) -> None:
        digest = hashlib.blake2b(digest_size=8)
        count = self._counts[split]
        count[0] += 1
        for example in examples:
            count[1] += 1
            count[2] += example.length
            count[3] += example.supervised
            digest.update(array("I", example.ids).tobytes() + b"|")
            if split == "train":
                self._lengths.append(example.length)
        rows, digests = self._seen[split]
        rows.append(row)
        digests.append(int.from_bytes(digest.digest(), "little"))
        if split == "train" and len(self._samples) < SAMPLES:
            self._samples += examples[: SAMPLES - len(self._samples)]

    @property
    def supervised(self) -> int:
        """Trained tokens of the training split so far."""
        return self._counts["train"][3]

    def finish(self, tokenizer: Tokenizer, *, rendering: str, notes: Sequence[str] = ()) -> Audit:
        """The audit of everything that was added."""
        duplicates, leaked = _repeats(self._seen)
        return Audit(
            rows=self._rows,
            rendering=rendering,
            splits={split: SplitCount(*count) for split, count in self._counts.items() if self._has(split)},
            dropped=_by_size(self._causes["dropped"]),
            missing=_by_size(self._causes["missing"]),
            control=sorted(self._control),
            cut=_by_size(self._causes["cut"]),
            lost_turns=self._lost,
            answers=self._answers,
            ended=self._ended,
            duplicates=duplicates,
            leaked=leaked,
            lengths=percentiles(self._lengths),
            notes=tuple(notes),
            samples=tuple(pieces(example, tokenizer) for example in self._samples),
            unread=_by_size(self._causes["unread"]),
            unprompted=sorted(self._unprompted),
        )

    def _has(self, split: Split) -> bool:
        return self._counts[split][0] > 0 or (split == "train" and self._rows > 0)


def pieces(example: Example, tokenizer: Tokenizer) -> Pieces:
    """An example as text again, special tokens shown, cut where training begins and ends."""
    out: Pieces = []
    start = 0
    for i in range(1, example.length + 1):
        if i == example.length or bool(example.weights[i]) != bool(example.weights[start]):
            text = tokenizer.decode(example.ids[start:i], skip_special=False)
            out.append((text, bool(example.weights[start])))
            start = i
    return out


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Min, median, p90, p99 and max, by nearest rank; empty for no lengths."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    last = len(ordered) - 1
    marks = {"min": 0.0, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: ordered[round(share * last)] for name, share in marks.items()}


def _repeats(seen: Mapping[Split, tuple[array[int], array[int]]]) -> tuple[list[int], list[int]]:
    """Rows equal to an earlier one of their split, and rows outside train that stand in train."""
    import numpy as np

    duplicates: list[int] = []
    leaked: list[int] = []
    train = np.frombuffer(seen["train"][1], dtype="u8") if seen["train"][1] else np.empty(0, "u8")
    for split, (rows, digests) in seen.items():
        if not digests:
            continue
        here, numbers = np.frombuffer(digests, dtype="u8"), np.frombuffer(rows, dtype="i8")
        again = np.ones(len(here), dtype=bool)
        again[np.unique(here, return_index=True)[1]] = False  # the first of each stays
        duplicates += numbers[again].tolist()
        if split != "train":
            leaked += numbers[np.isin(here, train)].tolist()
    return sorted(duplicates), sorted(leaked)


def _by_size(causes: Mapping[str, array[int]]) -> dict[str, list[int]]:
    return {cause: sorted(rows) for cause, rows in sorted(causes.items(), key=lambda item: -len(item[1]))}


def _fields(count: SplitCount) -> dict[str, int]:
    return {
        "rows": count.rows,
        "examples": count.examples,
        "tokens": count.tokens,
        "supervised_tokens": count.supervised,
    }


def _listed(rows: Sequence[int]) -> dict[str, Any]:
    return {"count": len(rows), "rows": list(rows[:LISTED])}


def _some(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
    return f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'} ({shown})"
