"""Which class was taken for which: the matrix, and what is counted from it, in Ludwig's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.metrics.classes import normal_class
from luthier.metrics.text import trimmed

AVERAGED = ("precision", "recall", "f1_score")


def confusion(predictions: Sequence[str], references: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """``confusion_matrix``, ``overall_stats`` and ``per_class_stats``.

    A row of the matrix is a right class, a column what was said, both in the order of the classes. An answer that names
    no class stands in no column, and counts as a miss of the class that was right.
    """
    names = list(dict.fromkeys(trimmed(one) for one in classes))
    got = [normal_class(one, names) for one in predictions]
    want = [normal_class(one, names) for one in references]
    pairs = list(zip(want, got, strict=True))
    each = {name: _counted(name, pairs) for name in names}
    return {
        "confusion_matrix": [[pairs.count((right, said)) for said in names] for right in names],
        "overall_stats": _overall(each, pairs),
        "per_class_stats": each,
    }


def _counted(name: str, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    hits = pairs.count((name, name))
    said, there = sum(got == name for _, got in pairs), sum(want == name for want, _ in pairs)
    false, missed, others = said - hits, there - hits, len(pairs) - said - there + hits
    return {
        "true_positives": hits,
        "true_negatives": others,
        "false_positives": false,
        "false_negatives": missed,
        "accuracy": _share(hits + others, len(pairs)),
        "precision": _share(hits, said),
        "recall": _share(hits, there),
        "specificity": _share(others, others + false),
        "f1_score": _share(2 * hits, said + there),
    }


def _overall(each: dict[str, dict[str, float]], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    support = {name: one["true_positives"] + one["false_negatives"] for name, one in each.items()}
    said = {name: one["true_positives"] + one["false_positives"] for name, one in each.items()}
    hits = sum(one["true_positives"] for one in each.values())
    accuracy = _share(sum(want == got for want, got in pairs), len(pairs))
    chance = sum(support[name] * said[name] for name in each) / max(len(pairs), 1) ** 2
    micro = {"precision": _share(hits, sum(said.values())), "recall": _share(hits, sum(support.values()))}
    micro["f1_score"] = _share(2 * hits, sum(said.values()) + sum(support.values()))

    def mean(weights: Mapping[str, float], kind: str) -> float:
        return _share(sum(weights[name] * one[kind] for name, one in each.items()), sum(weights.values()))

    even = dict.fromkeys(each, 1.0)
    averages = {f"avg_{kind}_macro": mean(even, kind) for kind in AVERAGED}
    averages |= {f"avg_{kind}_micro": micro[kind] for kind in AVERAGED}
    averages |= {f"avg_{kind}_weighted": mean(support, kind) for kind in AVERAGED}
    return {
        "token_accuracy": accuracy,  # Ludwig's word for that of classes
        **averages,
        "kappa_score": _share(accuracy - chance, 1 - chance),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
