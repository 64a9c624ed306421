"""Base against tuned on rows that were held out; what the report shows of them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import events
from luthier.data.columns import reference_of
from luthier.data.table import Table, missing_column
from luthier.errors import ConfigError, DataError, RunError
from luthier.evaluate import Comparison, compare, few_shot
from luthier.run import atomic
from luthier.tuned.held_out import Picked, held_out, picked

if TYPE_CHECKING:
    from luthier.tuned.tuned import Tuned

ONE = {"n": 1}  # what is compared or shown is the first answer, which is the same with and without others
SEPARATOR = "\n\n"  # between the examples of a few-shot prompt


def evaluate(
    tuned: Tuned,
    dataset: Any = None,
    *,
    rows: int | None = None,
    shots: int = 3,
    encoding: str | None = None,
    sink: events.Sink = events.silent,
) -> Comparison:
    """Base, base with a few-shot prompt, and tuned on ``dataset`` or else the held-out rows of the training table.

    Of a ``dataset`` that is that table, or has a split column, the held-out rows are taken; else all, with a warning
    where the run was trained on some of them. The comparison is written to ``evaluation.json`` in the run folder.
    Raises RunError run-not-a-run, before anything is asked, where that is not there any more; ConfigError for ``rows``
    or ``shots`` that are no such numbers.
    """
    _check_number("rows", rows, least=1, unless_none="leave it out for all rows")
    _check_number("shots", shots, least=0)
    if tuned.folder is not None:
        _require_there(tuned.folder)
    table, compared = _to_compare(tuned, dataset, rows, encoding, sink)
    held = list(compared.rows)
    training = tuned.trained_on.required(tuned.folder, "show") if shots else None
    contestants = {"base": tuned.answer(table, held, use_base=True, generation=ONE, sink=sink)}
    if training is not None:
        pairs = _solved(tuned, *training)
        texts = {i: few_shot(pairs, tuned.prompt_of(table, i), shots=shots, separator=SEPARATOR) for i in held}
        prompts = {i: tuned.renderer.text_prompt(text).ids for i, text in texts.items()}
        contestants[f"base, {shots}-shot"] = tuned.answer(
            table,
            held,
            use_base=True,
            prompts=prompts,
            # A base shown examples goes on to write the next one; its answer ends where the examples' answers do.
            generation=ONE | {"stop": [SEPARATOR if any("\n" in answer.strip() for _, answer in pairs) else "\n"]},
            sink=sink,
        )
    tuned.release_base()
    contestants["tuned"] = tuned.answer(table, held, generation=ONE, sink=sink)
    failed = {i: done for one in contestants.values() for i, done in zip(held, one.completions, strict=True)
              if done.error}  # fmt: skip
    if failed:
        row, done = next(iter(failed.items()))
        sink(events.Warned(text=f"{len(failed)} of {len(held)} rows could not be asked and count as wrong; "
                                f"row {row}: {done.error}"))  # fmt: skip
    comparison = compare(
        held,
        [reference or "" for reference in contestants["tuned"].references],
        {name: answered.predictions for name, answered in contestants.items()},
        calibrations={name: found for name, one in contestants.items() if (found := one.calibration())},
        classes=tuned.layout.classes,
        prompts=[tuned.prompt_of(table, i) for i in held],
        held_out=compared.held_out,
    )
    if tuned.folder is not None:
        try:
            atomic.write_json(tuned.folder / "evaluation.json", comparison.to_json())
        except OSError as error:  # what took minutes to answer is not lost for it
            sink(events.Warned(text=f"evaluation.json was not written to {tuned.folder}: {error}"))
    return comparison


def samples(tuned: Tuned, count: int = 3) -> list[dict[str, str]]:
    """A few held-out rows with the base's and the tuned answer, for the report; none without held-out rows."""
    if tuned.table is None or tuned.splits is None:
        return []
    held = [i for i in held_out(tuned.splits) if reference_of(tuned.table.row(i), tuned.layout) is not None][:count]
    if not held:
        return []
    try:
        before = tuned.answer(tuned.table, held, use_base=True, generation=ONE).texts
    finally:
        tuned.release_base()  # it takes as much memory as what was tuned
    after = tuned.answer(tuned.table, held, generation=ONE)
    return [
        {"prompt": tuned.prompt_of(tuned.table, i), "before": was, "answer": now, "reference": reference or ""}
        for i, was, now, reference in zip(held, before, after.texts, after.references, strict=True)
    ]


def _check_number(name: str, value: Any, *, least: int, unless_none: str = "") -> None:
    """Raise ConfigError for what is no whole number of at least ``least``; ``unless_none``: None may stand for one."""
    if value is None and unless_none:
        return
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:  # numpy's too
        return
    raise ConfigError(
        "config-bad-value",
        f"{name} is not a number of rows that can be taken",
        where=name,
        received="None" if value is None else value,
        allowed=f"a whole number, at least {least}" + (", or None" if unless_none else ""),
        fix=unless_none or f"{name}=0 shows the base no examples",
    )


def _require_there(folder: Path) -> None:
    """Raise RunError where a run was moved or removed after it was loaded."""
    if (folder / "run.json").is_file():
        return
    raise RunError(
        "run-not-a-run",
        "the run folder, which the comparison is written to, is not there any more",
        where=str(folder),
        received="a folder without run.json" if folder.is_dir() else "nothing",
        allowed="the folder that the model was loaded from or trained into",
        fix="put it back, or load the run from where it is now: Model.load(FOLDER)",
    )


def _to_compare(
    tuned: Tuned, dataset: Any, most: int | None, encoding: str | None, sink: events.Sink
) -> tuple[Table, Picked]:
    """The table and its rows with a known answer, at most ``most``. Raises DataError when there is none."""
    if dataset is None:
        table, splits = tuned.trained_on.required(tuned.folder, "evaluate")
        found = Picked(held_out(splits), True)
        advice = ("data-split", "there are no held-out rows to evaluate on",
                  "give --dataset, or leave rows for validation or test in preprocessing.split")  # fmt: skip
        if found.rows:
            advice = ("data-no-target", "no held-out row holds an answer to compare with",
                      "give --dataset with answers; of running text, `luthier runs` tells the loss")  # fmt: skip
        received = (
            f"{len(found.rows):,} held-out rows without an answer" if found.rows else "no row beside the training rows"
        )
    else:
        table = tuned.read(dataset, encoding, sink)
        if tuned.layout.target is not None and tuned.layout.target not in table.columns:
            without = "evaluation compares with answers: add the column; luthier predict answers rows without them"
            otherwise = tuned.renaming(table, tuned.layout.target) or without
            raise missing_column(tuned.layout.target, table.columns, table.name, otherwise=otherwise)
        found = picked(tuned, table, sink)
        advice = ("data-no-target", f"no row of {table.name} holds an answer to compare with",
                  f"fill the column {tuned.output!r}, or ask for answers alone: luthier predict")  # fmt: skip
        received = f"{len(found.rows):,} rows without an answer"
    rows = [i for i in found.rows if reference_of(table.row(i), tuned.layout) is not None][:most]
    if not rows:
        code, message, fix = advice
        allowed = f"at least one row with an answer in the column {tuned.output!r}"
        raise DataError(code, message, where=table.name, received=received, allowed=allowed, fix=fix)
    return table, Picked(rows, found.held_out)


def _solved(tuned: Tuned, training: Table, splits: Sequence[int]) -> list[tuple[str, str]]:
    """Prompts and answers of training rows, for a few-shot prompt."""
    rows = [i for i, number in enumerate(splits) if number == 0]
    pairs = ((tuned.prompt_of(training, i), reference_of(training.row(i), tuned.layout)) for i in rows)
    return [(prompt, answer) for prompt, answer in pairs if answer is not None]
