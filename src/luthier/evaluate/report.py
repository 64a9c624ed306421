"""report.html: one self-contained page on a run. No script, no network; every text from data is escaped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from luthier.evaluate.charts import line_chart, short
from luthier.evaluate.compare import Comparison
from luthier.metrics.calibration import Calibration
from luthier.run.atomic import write_text

MOST_POINTS = 600  # of one curve: more than the page has pixels for
SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}


def write_report(
    folder: Path | str,
    *,
    config: Mapping[str, Any],
    audit: Mapping[str, Any] | None = None,
    metrics_lines: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    calibration: Calibration | None = None,
    machine: Any = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        folder: the run folder; it exists.
        config: the resolved config as a plain mapping.
        audit: what happened to the data (`Audit.to_json()`).
        metrics_lines: the lines of metrics.jsonl, in order.
        comparison: base against tuned, when it was run.
        samples: answers where there is no comparison: mappings with ``prompt, answer, reference`` and perhaps
            ``before``.
        calibration: the temperature of a category's probabilities, when one was fitted.
        machine: a `types.Machine` or a mapping.
        versions: package → version.
    """
    template = _environment().from_string(files("luthier.evaluate").joinpath("report.html.j2").read_text("utf-8"))
    text = template.render(
        title=str(config.get("name") or config.get("base_model") or "run"),
        headline=_headline(metrics_lines, comparison),
        charts=_charts(metrics_lines),
        comparison=comparison,
        calibration=calibration,
        cards=_cards(comparison, samples),
        config=list(_flat(config)),
        audit=list(_flat(audit or {})),
        machine=list(_flat(dataclasses.asdict(machine) if dataclasses.is_dataclass(machine) else machine or {})),  # type: ignore[arg-type]
        versions=dict(versions or {}),
    )
    path = Path(folder) / "report.html"
    write_text(path, text)
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["rows"] = lambda rows: ", ".join(map(str, rows[:20])) + (" …" if len(rows) > 20 else "")
    return environment


def _headline(lines: Sequence[Mapping[str, Any]], comparison: Comparison | None) -> list[tuple[str, str, str]]:
    """The few numbers at the top: (value, what it is, a remark)."""
    out: list[tuple[str, str, str]] = []
    if comparison:
        first, last = comparison.contestants[0], comparison.contestants[-1]
        before, after = first.scores[comparison.metric], last.scores[comparison.metric]
        name = comparison.metric.replace("_", " ")
        remark = f"{first.name}: {100 * before:.1f} %" if first is not last else f"{len(comparison.rows)} rows"
        out.append((f"{100 * after:.1f} %", f"{name}, {last.name}", remark))
    held_out = [line for line in lines if line.get("split") == "validation" and _number(line.get("loss"))]
    trained = [line for line in lines if line.get("split") == "train" and _number(line.get("loss"))]
    if held_out:
        best = min(held_out, key=lambda line: float(line["loss"]))
        out.append((f"{best['loss']:.4f}", "best validation loss", f"at step {best['step']}"))
    if trained:
        out.append((f"{trained[-1]['loss']:.4f}", "last training loss", f"from {trained[0]['loss']:.4f}"))
        out.append((str(trained[-1]["step"]), "optimizer steps", f"{trained[-1].get('epoch', 0):.3g} epochs"))
        speed = [float(line["tokens_per_s"]) for line in trained if _number(line.get("tokens_per_s"))]
        if speed:
            out.append((f"{sorted(speed)[len(speed) // 2]:,.0f}", "tokens a second", "median of the steps"))
    return out


def _charts(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """The curves that the lines have data for: the loss of each split, the learning rate."""
    losses = {
        SPLIT_NAMES.get(split, split): _curve(lines, split, "loss")
        for split in dict.fromkeys(str(line.get("split")) for line in lines)
    }
    rate = {"learning rate": _curve(lines, "train", "learning_rate")}
    charts = [
        ("Loss", line_chart(losses, x_label="optimizer step", y_label="loss a token (nats)", title="Loss by step")),
        ("Learning rate", line_chart(rate, x_label="optimizer step", y_label="learning rate", title="Learning rate")),
    ]
    return [(name, chart) for name, chart in charts if chart]


def _curve(lines: Sequence[Mapping[str, Any]], split: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of one split, averaged over neighbours where there are more points than the page can show."""
    points = [(float(x["step"]), float(x[key])) for x in lines if x.get("split") == split and _number(x.get(key))]
    size = -(-len(points) // MOST_POINTS) or 1
    chunks = (points[at : at + size] for at in range(0, len(points), size))
    return [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _cards(comparison: Comparison | None, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples in one shape: row, prompt, reference, and answers as (who, text, right or None)."""
    if comparison:
        return [
            {
                "row": s.row,
                "prompt": s.prompt,
                "reference": s.reference,
                "answers": [(who, text, s.right[who]) for who, text in s.answers.items()],
            }
            for s in comparison.samples
        ]
    cards = []
    for sample in samples:
        answers = [("before", sample["before"], None)] if sample.get("before") is not None else []
        answers.append(("after", sample["answer"], None))
        cards.append(
            {
                "row": sample.get("row"),
                "prompt": sample.get("prompt"),
                "reference": sample.get("reference"),
                "answers": answers,
            }
        )
    return cards


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, text) lines; what is unset or empty is left out."""
    if isinstance(value, Mapping):
        return [
            line for key, inner in value.items() for line in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if value is None or value == [] or value == () or value == "":
        return []
    if isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
        return [line for i, inner in enumerate(value[:8]) for line in _flat(inner, f"{prefix}[{i}]")]
    if isinstance(value, (list, tuple)):
        more = f" … ({len(value)} in all)" if len(value) > 20 else ""
        return [(prefix, ", ".join(map(str, value[:20])) + more)]
    if isinstance(value, float):
        return [(prefix, short(value))]
    return [(prefix, str(value))]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
