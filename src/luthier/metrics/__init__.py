"""Scores of answers against references: `score` runs metrics by name, `class_report` details a classification.

Every score lies between 0 and 1, and 1 is best. ``bleu``, ``chrf`` and ``rouge_l`` need the extra ``[metrics]``.
"""

from luthier.metrics.classes import ClassScore, class_report, normal_class
from luthier.metrics.registry import DEFAULT_CLASS, DEFAULT_TEXT, METRICS, available, per_row, score

__all__ = [
    "DEFAULT_CLASS",
    "DEFAULT_TEXT",
    "METRICS",
    "ClassScore",
    "available",
    "class_report",
    "normal_class",
    "per_row",
    "score",
]
