"""Bad input through the real command line: a stable code, a place, what was received, what is allowed, the fix."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from luthier import cli, pipeline
from luthier.assets.template_worker import shared
from luthier.error_codes import CODES
from luthier.errors import DataError

ROWS = "instruction,input,output\n" + "".join(f"say {n},,answer {n}\n" for n in range(20))
Make = Callable[[Path, Path], list[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["luthier", *argv])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def check(config: str = "", data: str | bytes = ROWS, name: str = "data.csv", *more: str) -> Make:
    """`luthier check` of ``config`` and a file of these contents."""

    def make(folder: Path, base: Path) -> list[str]:
        (folder / "config.yaml").write_text(f"base_model: {base}\n{config}", encoding="utf-8")
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return ["check", str(folder / "config.yaml"), "--dataset", str(folder / name), *more]

    return make


def no_tokenizer(folder: Path, base: Path) -> list[str]:
    bare = folder / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(base / file, bare / file)
    return check()(folder, bare)


def no_weights(folder: Path, base: Path) -> list[str]:
    bare = folder / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    return check()(folder, bare)


def no_model(folder: Path, base: Path) -> list[str]:
    (folder / "bare").mkdir()
    return check()(folder, folder / "bare")


def foreign_output(folder: Path, base: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    return ["train", *check()(folder, base)[1:], "--output", str(folder / "out")]


def chat(*turns: dict[str, Any]) -> str:
    return json.dumps({"messages": list(turns)}) + "\n"


USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TEMPLATE = "prompt:\n  template: '{}'\n"
FOREVER = "{% for a in 'x' * 999999 %}{% for b in 'x' * 999999 %}{% endfor %}{% endfor %}"

# what it is -> (how it comes about, code, exit code, what the place says, what the message or the fix says)
CASES: dict[str, tuple[Make, str, int, str, str]] = {
    "no config": (lambda f, b: ["check", str(f / "confg.yaml"), "--dataset", "x.csv"], "config-unreadable", 2, "confg.yaml", "luthier init"),
    "config is not YAML": (check("a: [1\n"), "config-unreadable", 2, "config.yaml:", "YAML"),
    "misspelt key": (check("trainer:\n  learning_rat: 1\n"), "config-unknown-key", 2, "config.yaml:3:3", "learning_rate"),
    "duplicate key": (check("trainer: {epochs: 1, epochs: 2}\n"), "config-duplicate-key", 2, "config.yaml:2:", "keep one"),
    "bad value": (check("trainer: {epochs: many}\n"), "config-bad-value", 2, "config.yaml:2:", "epochs"),
    "Ludwig's key": (check("hyperopt: {goal: minimize}\n"), "config-not-implemented", 2, "config.yaml:2:", "luthier runs"),
    "bad override": (check("", ROWS, "data.csv", "--set", "epochs"), "config-bad-override", 2, "--set epochs", "key.path=value"),
    "no such dataset": (lambda f, b: [*check()(f, b)[:2], "--dataset", str(f / "dta.csv")], "data-unreadable", 3, "dta.csv", "'data.csv'"),
    "no dataset named": (lambda f, b: check()(f, b)[:2], "config-conflict", 2, "config.yaml", "--dataset"),
    "unreadable CSV": (check("", 'a,b\n"open,x\n'), "data-unreadable", 3, "line 2", "quote"),
    "ragged CSV": (check("", "a,b\n1,2,3\n"), "data-ragged", 3, "line 2", "quotes around"),
    "bad UTF-8": (check("", "a,b\n日本語の文章,よい\n".encode() + b"\xff,x\n"), "data-encoding", 3, "line 3", "--encoding"),
    "ambiguous encoding": (check("", "東京,大阪\n京都,神戸\n".encode("euc_jp")), "data-encoding", 3, "data.csv", "--encoding"),
    "NUL bytes": (check("", "a,b\nx,y\0z\n"), "data-unreadable", 3, "line 2", "without NUL"),
    "a workbook that is none": (check("", b"PK, but no zip", "d.xlsx"), "data-unreadable", 3, "d.xlsx", "PK, but"),
    "broken JSON": (check("", '[{"a": 1},\n {"a": 2,, "b": 3}]', "d.json"), "data-unreadable", 3, "d.json:2:", '2,, '),
    "JSON of another shape": (check("", "3", "d.json"), "data-unreadable", 3, "d.json", "list of objects"),
    "a heading twice": (check("", "a,a\n1,2\n"), "data-unreadable", 3, "line 1", "once"),
    "empty file": (check("", ""), "data-empty", 3, "data.csv", "at least one row"),
    "header only": (check("", "a,b\n"), "data-empty", 3, "data.csv", "at least one row"),
    "unknown format": (check("", "a", "data.doc"), "data-unreadable", 3, "data.doc", "rename"),
    "plain text": (check("", "Once upon a time.\n", "tale.txt"), "data-unreadable", 3, "tale.txt", "one column `text`"),
    "missing column": (check("input_features: [{name: instructoin}]\n"), "data-missing-column", 3, "data.csv", "'instruction'"),
    "template without a known column": (check(TEMPLATE.format("{instructoin}")), "data-missing-column", 3, "prompt.template", "{instruction}"),
    "template reaches into a value": (check(TEMPLATE.format("{instruction.__class__}")), "data-template", 3, "prompt.template", "{instruction}"),
    "endless chat template": (check(f"prompt:\n  chat_template: \"{FOREVER}\"\n"), "data-chat", 3, "data.csv row 0", "chat_template"),
    "malformed chat template": (check('prompt:\n  chat_template: "{% for %}"\n'), "data-template", 3, "prompt.chat_template", "correct the template"),
    "split by time without its column": (check("preprocessing: {split: {type: datetime}}\n"), "config-conflict", 2, "config.yaml:2:", "column: NAME"),
    "stratified without its column": (check("preprocessing: {split: {type: stratify}}\n"), "data-split", 3, "preprocessing.split.column", "instruction"),
    "shares that are none": (check("preprocessing: {split: {probabilities: [1, 1, 1]}}\n"), "config-conflict", 2, "config.yaml:2:", "[0.8, 0.1, 0.1]"),
    "split without training rows": (check("", "q,a,split\nx,y,1\nz,w,2\n"), "data-split", 3, "data.csv", "train"),
    "split column of unknown values": (check("", "q,a,split\nx,y,tset\n"), "data-split", 3, "row 0 column split", "mend"),
    "task without a place": (check("prompt: {task: sort, template: '{instruction}'}\n"), "config-conflict", 2, "config.yaml", "{__task__}"),
    "template of no column": (check(TEMPLATE.format("Answer the question.")), "data-template", 3, "prompt.template", "{instruction} {input}"),
    "input that is the target": (check("input_features: [{name: output}]\noutput_features: [{name: output}]\n"), "data-no-target", 3, "output_features", "leave 'output' out"),
    "no output feature": (check("output_features: []\n"), "config-bad-value", 2, "config.yaml:2:", "exactly 1"),
    "two output features": (check("output_features: [{name: a}, {name: b}]\n"), "config-bad-value", 2, "config.yaml:2:", "keep 1 of the 2"),
    "kind of adapter without its name": (check("adapter: {r: 8}\n"), "config-bad-value", 2, "config.yaml:2:", "type: lora"),
    "no target": (check("", "id,url\n1,x\n2,y\n"), "data-no-target", 3, "data.csv", "--target"),
    "nothing to learn": (check("", "instruction,output\na,\nb,\n"), "data-no-supervision", 3, "data.csv", "target"),
    "too long": (check("preprocessing: {truncation: error, max_sequence_length: 8}\n"), "data-too-long", 3, "row", "truncation"),
    "unknown role": (check("", chat(USER, {"role": "wizard", "content": "x"}) + chat(USER, BOT), "d.jsonl"), "data-chat", 3, "row 0 column messages turn 2", "wizard"),
    "a turn without content": (check("", chat(USER, BOT) + chat(USER, {"role": "assistant"}), "d.jsonl"), "data-chat", 3, "row 1", "turns such as"),
    "a broken line": (check("", '{"a": 1}\n{"a": \n', "d.jsonl"), "data-unreadable", 3, "d.jsonl:2:", "object a line"),
    "unknown model": (lambda f, b: check()(f, Path("smolm2")), "asset-not-found", 4, "base_model", "looked in"),
    "base without tokenizer": (no_tokenizer, "asset-no-tokenizer", 4, "bare", "tokenizer"),
    "base without weights": (no_weights, "asset-damaged", 4, "bare", "tokenizer.json"),
    "base that is no model": (no_model, "asset-not-found", 4, "bare", "an empty folder"),
    "output folder not empty": (foreign_output, "run-foreign-files", 5, "out", "--output"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input(
    name: str,
    tmp_path: Path,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make, code, exit_code, place, says = CASES[name]
    monkeypatch.setattr(shared(), "_patience", 1.0)
    argv = make(tmp_path, tiny_llama)
    assert run([*argv, "--json"], monkeypatch) == exit_code
    told = json.loads(capsys.readouterr().out)
    fault = told["error"][0]
    assert (fault["code"], told["exit_code"]) == (code, exit_code), fault
    assert code in CODES
    assert place in (fault["where"] or ""), fault
    assert says in json.dumps(fault, ensure_ascii=False), fault
    assert all(fault[part] for part in ("where", "received", "allowed", "fix")), fault
    assert run(argv, monkeypatch) == exit_code
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).split())
    assert code in text and "Traceback" not in text


def test_all_faults_of_a_config_at_once(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = "trainer: {learning_rat: 1, epochs: many}\nhyperopt: {}\nadapter: {type: lorra}\nadapter: {type: lora}\n"
    assert run([*check(config)(tmp_path, tiny_llama), "--json"], monkeypatch) == 2
    codes = [fault["code"] for fault in json.loads(capsys.readouterr().out)["error"]]
    assert sorted(codes) == sorted(
        ["config-unknown-key", "config-bad-value", "config-not-implemented", "config-bad-value", "config-duplicate-key"]
    )


def test_a_full_disk(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        free = 1000

    argv = ["train", *check()(tmp_path, tiny_llama)[1:], "--output", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full)
    assert run(argv, monkeypatch) == 5
    fault = json.loads(capsys.readouterr().out)["error"][0]
    assert fault["code"] == "run-no-space" and "free" in fault["received"] and fault["fix"]


def test_debug_shows_the_traceback(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--debug", *check("", "")(tmp_path, tiny_llama)], monkeypatch) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err and "luthier.errors.DataError" in err


def test_a_fault_of_ours_is_said_as_one_and_shows_no_secret(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor does any other failure, with --debug or --json: tokens and the user of an address are taken out."""
    token = "hf_canary0123456789"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:canary-pass@proxy:3128")

    text = f"401 for https://me:canary-pass@hub/x?token={token} of s3://key:canary-else@bucket"
    for failure, code in ((ZeroDivisionError(text), 1), (DataError("data-unreadable", text, received=text), 3)):
        monkeypatch.setattr(pipeline, "check", Mock(side_effect=failure))
        for more in ([], ["--debug"], ["--json"]):
            command = check()(tmp_path, tiny_llama)
            argv = [*command, *more] if more == ["--json"] else [*more, *command]
            assert run(argv, monkeypatch) == code
            said = "".join(capsys.readouterr())
            assert "401 for" in said and "canary" not in said
            assert ("Traceback" in said) == (more == ["--debug"])
    assert all(name in said for name in ("[HF_TOKEN]", "[HTTPS_PROXY]", "[credentials]"))
