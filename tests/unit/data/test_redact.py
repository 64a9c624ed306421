"""What `preprocessing.redact` takes out of rows, what it leaves, and that it reaches nothing that a run writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from luthier import config, pipeline
from luthier.data import sources
from luthier.data.redact import ORDER, redact, redacted

PLANTED = {
    "email": [
        "jane.doe@example.com", "a+tag@mail.example.co.uk", "x_1%y@sub-domain.example.org", "O.Neil@example.museum",
        "taro@example.co.jp", "user.name@example.io", "ceo@example.de", "info@example-shop.eu", "1234@example.net",
        "müller@example.ch", "support@xn--bcher-kva.example", "first-last@example.dev",
    ],
    "phone": [
        "+1 415 555 0123", "(415) 555-0123", "415-555-0123", "415.555.0123", "+44 20 7946 0958", "+442079460958",
        "03-1234-5678", "090-1234-5678", "09012345678", "０９０－１２３４－５６７８", "+81-90-1234-5678",
        "+49 (0)30 123456 78", "06 12 34 56 78",
    ],
    "card": [
        "4111 1111 1111 1111", "4111111111111111", "5500-0000-0000-0004", "340000000000009", "3000 000000 0004",
        "6011000000000004", "3530111333300000", "5105105105105100", "4012888888881881", "4222222222222",
        "6011 1111 1111 1117", "378282246310005",
    ],
    "key": [
        "sk-proj-abcdefghijklmnop1234567890", "sk-ant-api03-ABCDEFGHIJKLMNOP", "hf_abcdefghijklmnopqrstuvwx",
        "ghp_0123456789abcdefghijklmnopqrstuvwxyz", "github_pat_11ABCDEFG0abcdefghijkl_more",
        "AKIAIOSFODNN7EXAMPLE", "AIzaSyA-1234567890abcdefghijklmnopqrstu", "xoxb-123456789012-abcdefghij",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "sk_live_abcdefghijklmnop1234",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
        "glpat-abcdefghij0123456789", "correct-horse-battery",
    ],
}  # fmt: skip
CONTEXT = {"correct-horse-battery": "password: {}"}
KEPT = (
    "born on 2026-11-24 at 10:00:00, or 24.11.2026", "order 12345, 3.14159265358979", "1, 2, 3, 4, 5, 6, 7",
    "version 1.2.3.4", "a@b", "see section 4.1.2", "1234567812345678 has no check digit", "@someone said hi",
    "the password is asked for", "skip-this-one", "pages 100-120", "in 1990-2000", "１２３円", "7 * 6 = 42",
)  # fmt: skip


def test_fifty_are_planted() -> None:
    assert sum(map(len, PLANTED.values())) == 50


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PLANTED.items() for text in texts])
def test_each_is_taken_out_and_counted(kind: str, text: str) -> None:
    counts: Counter[str] = Counter()
    said = "please note " + CONTEXT.get(text, "{}").format(text) + ", thanks"
    out = redacted(said, ORDER, counts)
    assert text not in out and f"[{kind}]" in out and out.startswith("please note ") and out.endswith("thanks")
    assert counts == {kind: 1}
    others = [one for one in ORDER if one != kind]
    assert kind in ("card", "key", "email") or redacted(said, others) == said


@pytest.mark.parametrize("text", KEPT)
def test_what_is_none_stays(text: str) -> None:
    assert redacted(text, ORDER) == text


@pytest.mark.parametrize("text", ["4111 1111 1111 1111 24", "7 4111 1111 1111 1111", "12 4111-1111-1111-1111 7 3"])
def test_numbers_beside_a_card(text: str) -> None:
    assert "[card]" in redacted(text, ["card"]) and "1111" not in redacted(text, ["card"])


def test_in_nested_values_and_numbers() -> None:
    rows = [{"n": 4111111111111111, "turns": [{"role": "user", "content": "mail jane@example.com"}], "k": 7, "b": True},
            {"n": 5, "turns": [{"role": "user", "content": "hi"}], "k": 8, "b": False}]  # fmt: skip
    table = redact(sources.read(rows), ["email", "card"])
    assert table.row(0) == {
        "n": "[card]", "turns": [{"role": "user", "content": "mail [email]"}], "k": 7, "b": True
    }  # fmt: skip
    assert table.row(1)["n"] == "5" and table.notes[-1] == "redacted: 1 email, 1 card"
    same = sources.read(rows)
    assert redact(same, []) is same
    assert redact(sources.read([{"a": "x"}]), ["key"]).content_hash == sources.read([{"a": "x"}]).content_hash


def test_planted_strings_reach_nothing_of_a_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No training row, event, log line, or file of the run folder holds one, nor a token of the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    secrets = {name: f"canary-{name}-0123456789" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    texts = [text for of in PLANTED.values() for text in of]
    rows = [{"question": f"what of {CONTEXT.get(text, '{}').format(text)} ?", "answer": f"it is {text} {i}"
             if text not in CONTEXT else f"yes {i}"} for i, text in enumerate(texts)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    settings = config.load({
        "base_model": str(tiny_llama), "prompt": {"template": "{question}\n"}, "execution": {"device": "cpu"},
        "trainer": {"epochs": 1, "batch_size": 16, "precision": "fp32", "eval_generation_rows": 2},
        "preprocessing": {"redact": list(ORDER)}, "generation": {"max_new_tokens": 4},
    })  # fmt: skip
    events: list[Any] = []
    trained = pipeline.train(settings, path, output=tmp_path / "run", sink=events.append)
    assert trained.tuned.table is not None
    seen = json.dumps([trained.tuned.table.row(i) for i in range(50)], ensure_ascii=False) + repr(events)
    out, err = capfd.readouterr()
    seen += out + err
    tuned = pipeline.load(tmp_path / "run")
    pipeline.evaluate(tuned, path, rows=20, shots=1, sink=events.append)  # rows given anew are shown in the report
    assert "[email]" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    files = {one: one.read_bytes() for one in (tmp_path / "run").rglob("*") if one.is_file()}
    for text in (*texts, *secrets.values()):
        assert text not in seen, text
        for name, content in files.items():
            assert text.encode() not in content and json.dumps(text)[1:-1].encode() not in content, (text, name)
    again = pipeline.load(tmp_path / "run")
    assert again.table is not None and again.table.content_hash == trained.tuned.table.content_hash
