"""What will be learned from a dataset, counted: nothing is dropped, cut or changed without a line here.

Row numbers count from 0, as in a DataFrame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        """The findings for people, the ordinary ones first."""
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
        out += [f"longer than the maximum, {policy}: {_some(rows)}" for policy, rows in self.cut.items()]
        if self.lost_turns:
            out.append(f"answers left out as too long from conversations that were kept: {self.lost_turns:,}")
        if self.control:
            out.append(f"text that spells a control token, kept as ordinary text: {_some(self.control)}")
        if self.duplicates:
            out.append(f"equal to an earlier row of the same split: {_some(self.duplicates)}")
        if self.leaked:
            out.append(f"in validation or test, and in train too: {_some(self.leaked)}")
        return [*out, *self.notes]


def make_audit(
    outcomes: Mapping[Split, Sequence[Outcome]], tokenizer: Tokenizer, *, rendering: str, notes: Sequence[str] = ()
) -> Audit:
    """Count the outcomes of every row, by split."""
    everything = [outcome for split in SPLITS for outcome in outcomes.get(split, ())]
    train = [example for outcome in outcomes.get("train", ()) for example in outcome.examples]
    duplicates, leaked = _repeats(outcomes)
    return Audit(
        rows=len(everything),
        rendering=rendering,
        splits={split: _count(outcomes[split]) for split in SPLITS if outcomes.get(split)},
        dropped=_by_cause((o.row, (o.dropped.reason,)) for o in everything if o.dropped is not None),
        missing=_by_cause((o.row, o.missing) for o in everything),
        control=sorted(o.row for o in everything if o.control),
        cut=_by_cause((o.row, o.cut) for o in everything),
        lost_turns=sum(o.lost_turns for o in everything),
        answers=sum(o.answers for o in everything),
        ended=sum(o.ended for o in everything),
        duplicates=duplicates,
        leaked=leaked,
        lengths=percentiles([example.length for example in train]),
        notes=tuple(notes),
        samples=tuple(pieces(example, tokenizer) for example in train[:SAMPLES]),
    )


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


def _count(outcomes: Sequence[Outcome]) -> SplitCount:
    examples = [example for outcome in outcomes for example in outcome.examples]
    rows = sum(1 for outcome in outcomes if outcome.examples)
    return SplitCount(rows, len(examples), sum(e.length for e in examples), sum(e.supervised for e in examples))


def _repeats(outcomes: Mapping[Split, Sequence[Outcome]]) -> tuple[list[int], list[int]]:
    """Rows equal to an earlier one of their split, and rows outside train that stand in train."""
    seen: dict[Split, set[tuple[tuple[int, ...], ...]]] = {}
    duplicates, leaked = [], []
    for split in SPLITS:
        mine = seen.setdefault(split, set())
        for outcome in outcomes.get(split, ()):
            if not outcome.examples:
                continue
            key = tuple(tuple(example.ids) for example in outcome.examples)
            if key in mine:
                duplicates.append(outcome.row)
            mine.add(key)
            if split != "train" and key in seen["train"]:
                leaked.append(outcome.row)
    return sorted(duplicates), sorted(leaked)


def _by_cause(found: Iterator[tuple[int, tuple[str, ...]]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for row, causes in found:
        for cause in causes:
            out.setdefault(cause, []).append(row)
    counts = Counter({cause: len(rows) for cause, rows in out.items()})
    return {cause: sorted(out[cause]) for cause, _ in counts.most_common()}


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
