"""Base against tuned, and what the run folder then says of it: evaluation.json, the report, the model card."""

from __future__ import annotations

from typing import Any

from luthier import events
from luthier.errors import RunError
from luthier.evaluate import Comparison
from luthier.run import RunFolder, read_metrics
from luthier.tuned import Tuned


def evaluate(
    tuned: Tuned,
    dataset: Any = None,
    *,
    rows: int | None = None,
    shots: int = 3,
    encoding: str | None = None,
    sink: events.Sink = events.silent,
) -> Comparison:
    """`Tuned.evaluate`; the comparison is then shown by the report of its run folder and by the card of its model."""
    comparison = tuned.evaluate(dataset, rows=rows, shots=shots, encoding=encoding, sink=sink)
    if tuned.folder is not None:
        try:
            _show(RunFolder.load(tuned.folder), tuned, comparison)
        except (OSError, RunError) as error:  # the comparison itself is there
            said = error.faults[0].message if isinstance(error, RunError) else error
            sink(events.Warned(text=f"the report and the card of {tuned.folder} do not show the comparison: {said}"))
    return comparison


def _show(folder: RunFolder, tuned: Tuned, comparison: Comparison) -> None:
    from luthier.evaluate.report import write_report
    from luthier.export.card import write_results

    lock, audit = folder.lock, folder.path / "audit.json"
    write_report(
        folder.path,
        config=tuned.config.to_dict(),
        audit=folder.read_json("audit.json") if audit.is_file() else None,
        metrics_lines=read_metrics(folder.metrics_path),
        comparison=comparison,
        calibration=tuned.calibration,
        machine=lock.machine if lock is not None else None,
        versions=lock.versions if lock is not None else None,
    )
    if folder.model_path is not None:
        scores = {one.name: one.scores for one in comparison.contestants}
        found = comparison.contestants[-1].calibration
        write_results(
            folder.model_path,
            scores,
            len(comparison.rows),
            held_out=comparison.held_out,
            measured=found,
            calibration=tuned.calibration,
        )
