"""Metrics by name. A new one is one `register` line; `score` runs any number of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from luthier.metrics import classes as class_metrics
from luthier.metrics import text as text_metrics
from luthier.registry import Registry

Rows = Callable[[Sequence[str], Sequence[str]], list[float]]
Whole = Callable[[Sequence[str], Sequence[str]], float]
OfClasses = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: over ``rows`` (their mean is the score), over the ``whole`` corpus, or over ``classes``."""

    rows: Rows | None = None
    whole: Whole | None = None
    classes: OfClasses | None = None
    package: str | None = None  # the optional package that it needs


METRICS: Registry[Metric] = Registry("metric")


def _each(one: Callable[[str, str], float]) -> Rows:
    return lambda predictions, references: [one(p, r) for p, r in zip(predictions, references, strict=True)]


METRICS.register("exact_match")(Metric(rows=_each(text_metrics.exact_match)))
METRICS.register("json_match")(Metric(rows=_each(text_metrics.json_match)))
METRICS.register("token_f1")(Metric(rows=_each(text_metrics.token_f1)))
METRICS.register("rouge_l", "rougeL")(Metric(rows=text_metrics.rouge_l, package="rouge_score"))
METRICS.register("bleu")(Metric(whole=text_metrics.bleu, package="sacrebleu"))
METRICS.register("chrf")(Metric(whole=text_metrics.chrf, package="sacrebleu"))
METRICS.register("accuracy")(Metric(classes=class_metrics.accuracy))
METRICS.register("macro_f1")(Metric(classes=class_metrics.macro_f1))

DEFAULT_TEXT = ("exact_match", "token_f1", "rouge_l", "bleu", "chrf")
DEFAULT_CLASS = ("accuracy", "macro_f1")


def available(names: Sequence[str]) -> list[str]:
    """Those of ``names`` whose packages are installed, in order."""
    return [name for name in names if (package := METRICS.get(name).package) is None or find_spec(package) is not None]


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    names: Sequence[str] = DEFAULT_TEXT,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """The named metrics, each between 0 and 1.

    Args:
        predictions: answers, one a row.
        references: what they should be, one a row; at least one row.
        names: metrics of the registry.
        classes: the allowed answers of a classification; without them the distinct references serve.

    Raises:
        ConfigError: config-bad-value, a metric that does not exist.
        DependencyError: dependency-missing, a metric whose package is not installed.
        ValueError: no rows, or not as many predictions as references.
    """
    if not references or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be scored against {len(references)} references")
    names_of_classes = classes or sorted(set(references))
    out: dict[str, float] = {}
    for name in names:
        metric = METRICS.get(name)
        if metric.rows:
            values = metric.rows(predictions, references)
            out[name] = sum(values) / len(values)
        elif metric.whole:
            out[name] = metric.whole(predictions, references)
        else:
            assert metric.classes is not None, f"metric {name!r} computes nothing"
            out[name] = metric.classes(predictions, references, names_of_classes)
    return out


def per_row(
    predictions: Sequence[str], references: Sequence[str], name: str, classes: Sequence[str] | None = None
) -> list[float]:
    """One metric row by row: its own rows; whether the class is right; or the corpus metric of each row alone."""
    metric = METRICS.get(name)
    if metric.rows:
        return metric.rows(predictions, references)
    whole = metric.whole
    if whole:
        return [whole([p], [r]) for p, r in zip(predictions, references, strict=True)]
    allowed = classes or sorted(set(references))
    return [class_metrics.accuracy([p], [r], allowed) for p, r in zip(predictions, references, strict=True)]
