"""`luthier check` on tables as people have them: what is what, what is split how, what is trained, what is counted."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import cli

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def check(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Check:
    """What `luthier check --json` says of a file of these bytes under these config lines."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))

    def run(data: str | bytes | None, name: str = "data.csv", config: str = "", *more: str) -> dict[str, Any]:
        if data is not None:
            (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
        (tmp_path / "config.yaml").write_text(f"base_model: {tiny_llama}\n{config}", encoding="utf-8")
        argv = ["check", str(tmp_path / "config.yaml"), "--dataset", str(tmp_path / name), "--json", *more]
        monkeypatch.setattr(sys, "argv", ["luthier", *argv])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert not caught.value.code, told
        return told

    return run


def rows(head: str, line: str, count: int = 20) -> str:
    return head + "\n" + "".join(line.replace("#", str(n)) + "\n" for n in range(count))


def conversation(*turns: dict[str, Any], **more: Any) -> str:
    return json.dumps({"messages": list(turns), **more}) + "\n"


def shown(told: dict[str, Any]) -> str:
    return "".join(piece["text"] for piece in told["audit"]["samples"][0])


def trained(told: dict[str, Any]) -> list[str]:
    return [piece["text"] for piece in told["audit"]["samples"][0] if piece["trained"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp932", "euc_jp"])
def test_encodings(check: Check, encoding: str) -> None:
    told = check(rows("質問,答え", "これは何ですか#,りんごです#").encode(encoding))
    assert "これは何ですか" in shown(told) and "りんごです" in trained(told)[0]


def test_a_folder_of_datasets_keeps_its_texts_and_its_missing_answers_are_counted(check: Check, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        missing = "datasets is not installed: the extras hub and dev have it"
        datasets = pytest.importorskip("datasets", reason=missing)
    cells = {"question": ["007", "NA", "1e5", "true"] * 5, "answer": ["NA", "007", None, "None"] * 5}
    datasets.Dataset.from_dict(cells).save_to_disk(tmp_path / "saved")
    told = check(None, "saved")
    assert told["audit"]["dropped"] == {"no target": {"count": 5, "rows": [2, 6, 10, 14, 18]}}
    assert "\n007<" in shown(told) and trained(told) == ["NA<|im_end|>"]


def test_latin_1_and_the_option(check: Check) -> None:
    data = rows("question,answer", "où est l'église # à côté,près du café #")
    assert "près du café" in trained(check(data.encode("latin-1")))[0]
    kanji = rows("東京,大阪", "京都#,神戸#").encode("euc_jp")
    assert "京都" in shown(check(kanji, "d.csv", "", "--encoding", "euc-jp"))


def test_text_stays_text(check: Check) -> None:
    cells = [("007", "1e5"), ("NA", "true"), ("None", "x")]
    told = check("question,answer\n" + "".join(f"{q},{a}\n" for q, a in cells))
    texts = ["".join(p["text"] for p in sample) for sample in told["audit"]["samples"]]
    assert any("007" in t and "1e5" in t for t in texts) and told["audit"]["missing"] == {}


def test_any_headings_and_classes(check: Check) -> None:
    draw = random.Random(0)
    names = ["billing", "tech", "sales"]
    data = "subject,body,queue\n" + "".join(f"s{n},{draw.random()},{names[n % 3]}\n" for n in range(60))
    told = check(data)
    assert told["layout"]["is_guess"] and told["layout"]["classes"] == sorted(names)
    named = check(data, "data.csv", "input_features: [{name: subject}]\noutput_features: [{name: queue}]\n")
    assert not named["layout"]["is_guess"] and named["layout"]["inputs"] == ["subject"]


def test_splits(check: Check) -> None:
    def sizes(told: dict[str, Any]) -> list[int]:
        return [told["audit"]["splits"].get(side, {"rows": 0})["rows"] for side in ("train", "validation", "test")]

    names = ["train", "valid", "2"]
    assert sizes(check("q,a,split\n" + "".join(f"q{n},a{n},{names[n % 3]}\n" for n in range(12)))) == [4, 4, 4]
    dated = "prompt,completion,day,who\n" + "".join(f"q{n},a{n},2024-01-{n + 1:02d},p\n" for n in range(30))
    when = "preprocessing:\n  split: {type: datetime, column: day, probabilities: [0.5, 0.25, 0.25]}\n"
    assert sizes(check(dated, "data.csv", when)) == [15, 8, 7]
    grouped = "preprocessing:\n  split: {type: random, group: who}\n"
    assert sizes(check(dated, "data.csv", grouped)) == [30, 0, 0]


def test_missing_values_and_no_target_are_counted(check: Check) -> None:
    told = check("instruction,input,output\na,,x\nb,in,\n,,y\n" + rows("", "i#,in,o#")[1:])
    audit = told["audit"]
    assert audit["dropped"]["no target"]["rows"] == [1]
    assert audit["missing"]["input"]["count"] == 2 and audit["missing"]["instruction"]["rows"] == [2]
    assert "nan" not in json.dumps(audit["samples"])


def test_control_tokens_in_rows_are_text_and_counted(check: Check) -> None:
    told = check("question,answer\nhi <|im_end|> there,ok <|im_start|>\n" + rows("", "q#,a#")[1:])
    assert told["audit"]["control_token_rows"]["rows"] == [0]


@pytest.mark.parametrize("policy", ["drop", "truncate_prompt", "truncate_target"])
def test_truncation_is_counted(check: Check, policy: str) -> None:
    config = f"prompt: {{template: '{{question}}'}}\npreprocessing: {{max_sequence_length: 24, truncation: {policy}}}\n"
    target = "t" * 40 if policy == "truncate_target" else "t"
    asked = "q" if policy == "truncate_target" else "q" * 40
    told = check(f"question,answer\n{asked},{target}\n" + rows("", "q#,a#", 30)[1:], "data.csv", config)
    counted = told["audit"]["dropped"].get("too long") if policy == "drop" else told["audit"]["cut"].get(policy)
    assert counted["rows"] == [0]


USER, BOT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}


@pytest.mark.parametrize(
    ("train_on", "answers"), [("completion", ["two<|im_end|>", "four<|im_end|>"]), ("last", ["four<|im_end|>"])]
)
def test_train_on(check: Check, train_on: str, answers: list[str]) -> None:
    turns = [USER, BOT, {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    told = check(conversation(*turns) * 3, "d.jsonl", f"prompt: {{train_on: {train_on}}}\n")
    assert trained(told) == answers


def test_train_on_all(check: Check) -> None:
    told = check(conversation(USER, BOT) * 3, "d.jsonl", "prompt: {train_on: all}\n")
    assert "one" in trained(told)[0] and "two" in trained(told)[0]


def test_sharegpt_and_weights(check: Check) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    told = check((json.dumps({"conversations": turns}) + "\n") * 3, "d.jsonl")
    assert told["layout"]["kind"] == "chat" and trained(told) == ["ho<|im_end|>"]
    told = check(conversation(USER, {**BOT, "weight": 0}, USER, {**BOT, "content": "six"}) * 3, "d.jsonl")
    assert trained(told) == ["six<|im_end|>"]


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Kyoto"}'}}
TOOLS = """prompt:
  chat_template: "{% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}{% if m.tool_calls %}\
{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>\\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
"""


def test_tool_calls(check: Check) -> None:
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    told = check(conversation(*turns) * 3, "d.jsonl", TOOLS)
    assert trained(told) == ['{"name": "weather", "arguments": {"city": "Kyoto"}}<|im_end|>']


def test_a_template_without_tools_is_told(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    with pytest.raises(AssertionError, match="does not write tool calls"):
        check(conversation(*turns) * 3, "d.jsonl")


def test_excel_with_a_title_and_merged_cells(check: Check, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(["Our questions, spring"])
    sheet.append([])
    sheet.append(["question", "answer"])
    for n in range(12):
        sheet.append([f"q{n // 2}", f"a{n}"])
    sheet.merge_cells("A4:A5")
    book.save(tmp_path / "made.xlsx")
    told = check((tmp_path / "made.xlsx").read_bytes(), "d.xlsx")
    assert told["audit"]["rows"] == 12 and told["audit"]["missing"] == {}
