"""Text metrics: exact, JSON and token comparison here; BLEU and chrF by sacrebleu, ROUGE-L by rouge-score."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from luthier import json_reader
from luthier.errors import missing_extra
from luthier.metrics.words import ScriptAware, signs, spaced_out, words


def trimmed(text: str) -> str:
    """The text as exact match sees it: composed Unicode (NFC), no space at either end, one kind of line end."""
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n").strip()


def exact_match(prediction: str, reference: str) -> float:
    """1 where the trimmed texts are the same."""
    return float(trimmed(prediction) == trimmed(reference))


def json_match(prediction: str, reference: str) -> float:
    """1 where both parse as JSON and the values are equal; order of keys and spacing do not count.

    A reference that is no JSON is compared as text. ``1`` and ``true`` differ, ``1`` and ``1.0`` do not.
    """
    want = _parsed(reference)
    if want is _NOT_JSON:
        return exact_match(prediction, reference)
    return float(_same(_parsed(prediction), want))


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bag of tokens (SQuAD's F1, with script-aware tokens)."""
    if trimmed(prediction) == trimmed(reference):
        return 1.0
    got, want = Counter(words(prediction)), Counter(words(reference))
    common = sum((got & want).values())
    return 2 * common / (sum(got.values()) + sum(want.values())) if common else 0.0


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F of each row (longest common subsequence of tokens), by rouge-score with script-aware tokens."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_extra("rouge-score", "metrics", "ROUGE-L") from error
    scorer = RougeScorer(["rougeL"], tokenizer=ScriptAware())
    return [
        1.0 if trimmed(p) == trimmed(r) else float(scorer.score(r, p)["rougeL"].fmeasure)
        for p, r in zip(predictions, references, strict=True)
    ]


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU over 1, by sacrebleu: 13a words, single signs where a script writes no spaces.

    Not smoothed: smoothing grants short unrelated answers a score. ``effective_order`` lets an answer shorter than four
    tokens reach 1.
    """
    if _identical(predictions, references):
        return 1.0
    BLEU = _sacrebleu("BLEU")
    metric = BLEU(tokenize="13a", smooth_method="none", effective_order=True)
    got = [spaced_out(trimmed(text)) for text in predictions]
    want = [spaced_out(trimmed(text)) for text in references]
    return float(min(1.0, metric.corpus_score(got, [want]).score / 100))


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF over 1 (character 6-grams, beta 2), by sacrebleu."""
    if _identical(predictions, references):
        return 1.0
    CHRF = _sacrebleu("CHRF")
    got, want = ([signs(trimmed(text)) for text in texts] for texts in (predictions, references))
    score = CHRF().corpus_score(got, [want])
    return float(min(1.0, score.score / 100))


def _identical(predictions: Sequence[str], references: Sequence[str]) -> bool:
    """Also true of answers that are rightly empty, which n-grams cannot score."""
    return all(trimmed(p) == trimmed(r) for p, r in zip(predictions, references, strict=True))


def _sacrebleu(name: str) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise missing_extra("sacrebleu", "metrics", name.replace("CHRF", "chrF")) from error
    return getattr(metrics, name)


_NOT_JSON = object()


def _parsed(text: str) -> Any:
    try:
        return json_reader.parse(trimmed(text))
    except ValueError:
        return _NOT_JSON


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
