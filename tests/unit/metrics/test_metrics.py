"""Each metric: 1 for the same answer in any script, little for an unrelated one, and known values between."""

from __future__ import annotations

import builtins

import pytest
from sacrebleu.metrics import BLEU, CHRF

from luthier.errors import ConfigError, DependencyError
from luthier.metrics import METRICS, available, class_report, per_row, score
from luthier.metrics.confusion import confusion
from luthier.metrics.words import words

TEXT = [n for n in METRICS if METRICS.get(n).classes is None]
SAME = ["東京は日本の首都です。", "はい", "The cat sat.", "สวัสดีครับ", "हिन्दी में", "?", "🙂", "", "서울은 수도입니다"]
UNRELATED = [
    ("今日は天気がいいです。", "私の車は赤いです。"),
    ("会議は中止になりました。", "彼は医者になりました。"),
    ("おはようございます。", "ありがとうございます。"),
    ("窓を閉めてください。", "名前を書いてください。"),
    ("駅まで歩きます。", "本を読みます。"),
    ("猫が好きです。", "明日は休みです。"),
    ("昨日映画を見ました。", "父に電話をかけました。"),
    ("駅はどこでしょうか。", "会議は何時でしょうか。"),
    ("部屋を掃除しています。", "東京に住んでいます。"),
    ("お金がありません。", "英語は話せません。"),
    ("送料は無料です。", "営業時間は九時からです。"),
    ("返品をお願いいたします。", "ご連絡をお待ちしております。"),
    ("注文をキャンセルしたいです。", "パスワードを忘れました。"),
    ("荷物が届いていません。", "画面が映りません。"),
    ("明日の会議は中止になりました。", "りんごは赤い果物です。"),
    ("本日はお越しいただきありがとうございます。", "この薬は食後に服用してください。"),
    ("東京は日本の首都です。", "彼女は音楽を聴くのが好きです。"),
    ("ご注文の商品は本日発送いたしました。", "解約の手続きはサイトから行うことができます。"),
    ("犬を飼っています。", "雨が降っています。"),
    ("とても楽しかったです。", "値段が高かったです。"),
    ("写真を撮ってもいいですか。", "ここに座ってもいいですか。"),
    ("サイトから申し込むことができます。", "無料で使うことができます。"),
    ("ご確認をお願いします。", "よろしくお願いします。"),
    ("雨が降るかもしれません。", "彼は来ないかもしれません。"),
    ("薬を飲まなければなりません。", "会社に行かなければなりません。"),
    ("明日は晴れるそうです。", "店は閉まっているそうです。"),
    ("窓を開けてもらえますか。", "塩を取ってもらえますか。"),
    ("来月結婚するつもりです。", "車を買うつもりです。"),
    ("楽しみにしております。", "現在調査しております。"),
    ("カードは利用できません。", "変更はできません。"),
    ("学校へ行きましたか。", "ご飯を食べましたか。"),
    ("とても面白い本です。", "彼は親切な人です。"),
    ("兄は銀行員です。", "空は青いです。"),
    ("海で泳ぎました。", "手紙を書きました。"),
    ("電気を消してください。", "静かにしてください。"),
    ("ขอน้ำหน่อยค่ะ", "รอสักครู่หน่อยค่ะ"),
    ("ห้องน้ำอยู่ที่ไหนครับ", "ราคาเท่าไหร่ครับ"),
    ("你能帮我吗？", "他是学生吗？"),
    ("请打开窗户。", "请写下名字。"),
    ("我觉得很好吃。", "这里太吵了。"),
    ("お待たせいたしました。", "承知いたしました。"),
    ("お世話になっております。", "誠に申し訳ございません。"),
    ("今天天气很好。", "我的车是红色的。"),
    ("请问现在几点了？", "请问您贵姓？"),
    ("我喜欢猫。", "他住在北京。"),
    ("会议已经取消了。", "他当医生了。"),
    ("订单已经发货了。", "密码忘记了怎么办？"),
    ("谢谢您的帮助。", "请把窗户关上。"),
    ("东京是日本的首都。", "她喜欢听音乐。"),
    ("วันนี้อากาศดีครับ", "รถของผมสีแดงครับ"),
    ("ขอบคุณมากค่ะ", "ประชุมกี่โมงค่ะ"),
    ("กรุณาปิดหน้าต่างครับ", "แมวอยู่บนโต๊ะครับ"),
    ("ผมชอบดนตรี", "เธออยู่ที่กรุงเทพ"),
    ("ยกเลิกคำสั่งซื้อได้ไหมครับ", "ร้านเปิดกี่โมงครับ"),
]
# One word differs.
NEAR = [
    ("今日は天気がいいです。", "明日は天気がいいです。"),
    ("東京は日本の首都です。", "京都は日本の首都です。"),
    ("ご注文の商品は本日発送いたしました。", "ご注文の商品は昨日発送いたしました。"),
    ("りんごはおいしいです。", "みかんはおいしいです。"),
    ("この薬は食後に服用してください。", "この薬は食前に服用してください。"),
    ("今天天气很好。", "明天天气很好。"),
    ("东京是日本的首都。", "京都是日本的首都。"),
    ("订单已经在昨天发货了。", "订单已经在今天发货了。"),
    ("วันนี้อากาศดีครับ", "พรุ่งนี้อากาศดีครับ"),
    ("รถของผมสีแดงครับ", "รถของผมสีดำครับ"),
    ("กรุณาปิดหน้าต่างครับ", "กรุณาเปิดหน้าต่างครับ"),
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
def test_unrelated_sentences_without_spaces_score_little(name, pair):
    """Also short ones with the same polite ending, which is half of their characters."""
    assert score([pair[0]], [pair[1]], [name])[name] < 0.2


@pytest.mark.parametrize("name", [name for name in TEXT if "match" not in name])
@pytest.mark.parametrize("pair", NEAR)
def test_sentences_without_spaces_of_which_one_word_differs_score_much(name, pair):
    assert 0.5 < score([pair[0]], [pair[1]], [name])[name] < 1


@pytest.mark.parametrize("name", [name for name in TEXT if "match" not in name])
@pytest.mark.parametrize(
    "pair", [("駅まで歩きます。", "駅まで歩きません。"), ("行きます", "行きました"), ("です", "ます")]
)
def test_how_a_polite_sentence_ends_counts(name, pair):
    assert score([pair[0]], [pair[1]], [name])[name] < 1


def test_text_with_spaces_is_compared_as_by_the_libraries_themselves():
    got, want = ["The cat (a big one) sat\non the mat."], ["The old cat sat down on the mat."]
    values = score(got, want, ["bleu", "chrf"])
    by_them = BLEU(smooth_method="none", effective_order=True).corpus_score(got, [want]).score
    assert values["bleu"] == pytest.approx(by_them / 100) and values["bleu"] > 0
    assert values["chrf"] == pytest.approx(CHRF().corpus_score(got, [want]).score / 100)


def test_partly_right_japanese_scores_between():
    for name in ("rouge_l", "token_f1", "bleu", "chrf"):
        assert 0.3 < score(["東京は日本の大きな都市です"], ["東京は日本の首都です"], [name])[name] < 0.95


def test_english_rouge_is_over_words():
    assert score(["the cat sat"], ["The cat, sat down!"], ["rouge_l"])["rouge_l"] == pytest.approx(2 * 1 * 0.75 / 1.75)


def test_words():
    assert words("Ｈello, 日本語 x") == ["hello", "日本", "本語", "x"]
    assert words("हिन्दी") == ["हिन्दी"]
    assert len(words("行きました。")) == 2  # 行き and き with the ending
    assert words("です") != words("ます") and len(words("です")) == 1


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


def test_confusion_counts_what_was_taken_for_what() -> None:
    want = ["a", "a", "a", "b", "b", "c", "c", "a"]
    said = ["a", "b", "a", "b", "b", "a", "C", "none of them"]
    found = confusion(said, want, ["a", "b", "c"])
    assert found["confusion_matrix"] == [[2, 1, 0], [0, 2, 0], [1, 0, 1]]
    overall, each = found["overall_stats"], found["per_class_stats"]
    assert overall["token_accuracy"] == 5 / 8
    assert overall["avg_recall_macro"] == pytest.approx((2 / 4 + 1 + 1 / 2) / 3)
    assert overall["avg_precision_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert overall["avg_precision_micro"] == 5 / 7 and overall["avg_recall_micro"] == 5 / 8
    assert overall["avg_recall_weighted"] == pytest.approx((4 * 2 / 4 + 2 * 1 + 2 * 1 / 2) / 8)
    chance = (4 * 3 + 2 * 3 + 2 * 1) / 64
    assert overall["kappa_score"] == pytest.approx((5 / 8 - chance) / (1 - chance))
    counted = {"true_positives": 2, "true_negatives": 3, "false_positives": 1, "false_negatives": 2}
    assert counted.items() <= each["a"].items()
    assert (each["a"]["specificity"], each["a"]["f1_score"]) == (3 / 4, pytest.approx(4 / 7))
