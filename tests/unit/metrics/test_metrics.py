"""Each metric: 1 for the same answer in any script, little for an unrelated one, and known values between."""

from __future__ import annotations

import builtins

import pytest

from luthier.errors import ConfigError, DependencyError
from luthier.metrics import METRICS, available, class_report, per_row, score
from luthier.metrics.words import words

TEXT = [n for n in METRICS if METRICS.get(n).classes is None]
SAME = ["東京は日本の首都です。", "はい", "The cat sat.", "สวัสดีครับ", "हिन्दी में", "?", "🙂", "", "서울은 수도입니다"]
UNRELATED = [
    ("明日の会議は中止になりました。", "りんごは赤い果物です。"),
    ("本日はお越しいただきありがとうございます。", "この薬は食後に服用してください。"),
    ("東京は日本の首都です。", "彼女は音楽を聴くのが好きです。"),
]


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("text", SAME)
def test_the_same_answer_scores_one(name, text):
    assert score([text], [text], [name])[name] == pytest.approx(1.0)


@pytest.mark.parametrize("name", TEXT)
def test_identical_and_different_rows_mixed(name):
    assert score(SAME, SAME, [name])[name] == pytest.approx(1.0)
    assert 0 < score([*SAME[:8], "x"], SAME, [name])[name] < 1


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("pair", UNRELATED)
def test_unrelated_japanese_scores_little(name, pair):
    assert score([pair[0]], [pair[1]], [name])[name] < 0.2


def test_partly_right_japanese_scores_between():
    for name in ("rouge_l", "token_f1", "bleu", "chrf"):
        assert 0.3 < score(["東京は日本の大きな都市です"], ["東京は日本の首都です"], [name])[name] < 0.95


def test_english_rouge_is_over_words():
    assert score(["the cat sat"], ["The cat, sat down!"], ["rouge_l"])["rouge_l"] == pytest.approx(2 * 1 * 0.75 / 1.75)


def test_words():
    assert words("Ｈello, 日本語 x") == ["hello", "日本", "本語", "x"]
    assert words("हिन्दी") == ["हिन्दी"]


@pytest.mark.parametrize(
    ("got", "want", "value"),
    [
        ('{"b": 1, "a": [2]}', '{"a":[2.0],"b":1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": 1', '{"a": 1}', 0.0),
        ("[1, 2]", "[2, 1]", 0.0),
        (" plain ", "plain", 1.0),
    ],
)
def test_json_match(got, want, value):
    assert score([got], [want], ["json_match"])["json_match"] == value


def test_json_that_nests_too_deep_is_compared_as_text():
    deep = "[" * 600 + "1" + "]" * 600
    assert score([deep, deep, deep], [deep, "[1]", deep + " "], ["json_match"])["json_match"] == pytest.approx(2 / 3)


def test_class_metrics():
    want = ["a", "a", "b", "c"]
    got = ["A ", "b", "b", "unknown"]
    values = score(got, want, ["accuracy", "macro_f1"], classes=["a", "b", "c", "never"])
    assert values["accuracy"] == 0.5
    assert values["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    report = class_report(got, want, ["a", "b", "c", "never"])
    assert (report["a"].precision, report["a"].recall, report["a"].support) == (1.0, 0.5, 2)
    assert report["never"].f1 == 0.0
    assert per_row(got, want, "macro_f1", ["a", "b", "c"]) == [1.0, 0.0, 1.0, 0.0]


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        score(["a"], ["a"], ["rouge_1"])
    assert caught.value.code == "config-bad-value"
    with pytest.raises(ValueError, match="0 references"):
        score([], [], ["bleu"])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("sacrebleu", "rouge_score"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("bleu", "chrf", "rouge_l"):
        with pytest.raises(DependencyError) as missing:
            score(["a"], ["b"], [name])
        assert missing.value.code == "dependency-missing"
        assert "luthier[metrics]" in str(missing.value)


def test_available_leaves_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("luthier.metrics.registry.find_spec", lambda package: None)
    assert available(["exact_match", "bleu", "rouge_l"]) == ["exact_match"]
