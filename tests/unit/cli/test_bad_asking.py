"""Bad input to `predict`, `evaluate` and `chat` through the real command line: told before anything is generated."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier import cli, config, pipeline
from luthier.error_codes import CODES

LONG = "w" * 600  # the tiny model's context is 512 tokens, a byte each


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that answers `question` from a template."""
    settings = {
        "base_model": str(tiny_llama),
        "prompt": {"template": "{question}\n"},
        "output_features": [{"name": "answer"}],
        "adapter": {"type": "lora", "r": 2},
        "generation": {"max_new_tokens": 4},
        "trainer": {"train_steps": 1, "batch_size": 4, "precision": "fp32", "eval_generation_rows": 0},
    }
    rows = [{"question": f"what is {i}?", "answer": f"it is {i}", "split": i % 3} for i in range(12)]
    return pipeline.train(config.load(settings), rows, output=tmp_path_factory.mktemp("runs") / "run").folder


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, typed: str = "") -> int:
    monkeypatch.setattr(sys, "argv", ["luthier", *argv])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def table(text: str, name: str = "rows.csv") -> Callable[[Path], list[str]]:
    def written(folder: Path) -> list[str]:
        (folder / name).write_text(text, encoding="utf-8")
        return ["--dataset", str(folder / name)]

    return written


def setting(value: str, rows: str = "question\nhow?\n") -> Callable[[Path], list[str]]:
    return lambda folder: [*table(rows)(folder), "--set", value]


# what it is -> (the command, its arguments, code, exit code, what the place says, what the fault says)
Case = tuple[str, Callable[[Path], list[str]], str, int, str, str]
CASES: dict[str, Case] = {
    "column missing": ("predict", table("qestion\nhow?\n"), "data-missing-column", 3, "rows.csv", "'qestion'"),
    "column missing, evaluate": ("evaluate", lambda f: [*table("qestion,answer\nhow?,so\n")(f), "--shots", "0"], "data-missing-column", 3, "rows.csv", "'qestion'"),
    "answers missing": ("evaluate", table("question\nhow?\n"), "data-missing-column", 3, "rows.csv", "'answer'"),
    "empty table": ("predict", table("question\n"), "data-empty", 3, "rows.csv", "at least one row"),
    "empty file": ("predict", table(""), "data-empty", 3, "rows.csv", "at least one row"),
    "empty table, evaluate": ("evaluate", table("question,answer\n"), "data-empty", 3, "rows.csv", "at least one row"),
    "no such table": ("predict", lambda f: ["--dataset", str(f / "none.csv")], "data-unreadable", 3, "none.csv", "there is no dataset"),
    "a broken table": ("predict", table('question\n"open\n'), "data-unreadable", 3, "line 2", "quote"),
    "schema of no type": ("predict", setting('generation.schema={properties: {a: {type: nope}}}'), "config-bad-value", 2, "generation.schema", "at properties.a: Invalid type: nope"),
    "schema that is no JSON": ("predict", setting("generation.schema='{'"), "config-bad-value", 2, "generation.schema", "line 1 column"),
    "regex that is not closed": ("predict", setting("generation.regex='x(ab'"), "config-bad-value", 2, "generation.regex", "at character 2: unclosed group"),
    "regex, evaluate": ("evaluate", lambda f: [*table("question,answer\na,b\n")(f), "--shots", "0", "--set", "generation.regex='['"], "config-bad-value", 2, "generation.regex", "unclosed"),
    "two constraints": ("predict", setting("generation={regex: a, choices: [a]}"), "config-conflict", 2, "generation.", "one"),
    "unknown setting": ("predict", setting("generation.temprature=1"), "config-unknown-key", 2, "generation.temprature", "temperature"),
    "value out of range": ("predict", setting("generation.top_p=2"), "config-bad-value", 2, "generation.top_p", "1"),
    "no run": ("predict", lambda f: ["--dataset", "x.csv", "RUN:" + str(f / "nowhere")], "run-not-a-run", 5, "nowhere", "no such folder"),
    "no run, chat": ("chat", lambda f: ["RUN:" + str(f / "nowhere")], "run-not-a-run", 5, "nowhere", "no such folder"),
    "a file that holds no comparison": ("evaluate", lambda f: [*table("question,answer\na,b\n", "mine.csv")(f), "--output", str(f / "mine.csv")], "config-bad-value", 2, "--output", "a .json file"),
    "a comparison as a table": ("evaluate", lambda f: [*table("question,answer\na,b\n")(f), "--output", str(f / "new.csv")], "config-bad-value", 2, "--output", "new.json"),
    "a format that cannot be written": ("predict", lambda f: [*table("question\nhow?\n")(f), "--output", str(f / "a.xml")], "data-unreadable", 3, "a.xml", ".csv"),
    "a system prompt for a plain template": ("chat", lambda f: ["--system", "be brief"], "config-conflict", 2, "--system", "plain template"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_before_anything_is_generated(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, make, code, exit_code, place, says = CASES[name]
    given = make(tmp_path)
    path = next((one.removeprefix("RUN:") for one in given if one.startswith("RUN:")), str(made))
    argv = [command, path, *(one for one in given if not one.startswith("RUN:"))]

    def never(*ignored: Any, **named: Any) -> Any:
        raise AssertionError("something was generated")

    monkeypatch.setattr("luthier.infer.engine.DecoderEngine.generate", never)
    monkeypatch.setattr("luthier.infer.engine.DecoderEngine.stream", never)
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
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("name", ["none.csv", "rows.xyz", "empty.csv"])
def test_a_table_that_cannot_be_is_told_before_the_weights_are_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    command: str, name: str,
) -> None:  # fmt: skip
    (tmp_path / "rows.xyz").write_text("question\nhow?\n")
    (tmp_path / "empty.csv").touch()

    def never(*ignored: Any, **named: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("luthier.pipeline.loading.open_tuned", never)
    assert run([command, str(made), "--dataset", str(tmp_path / name), "--json"], monkeypatch) == 3
    fault = json.loads(capsys.readouterr().out)["error"][0]
    assert fault["code"] in ("data-unreadable", "data-empty") and name in fault["where"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_prompt_without_room_is_an_error_of_its_row_alone(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    import pandas as pd

    given = table(f"question\nhow?\n{LONG}\nwhy?\n")(tmp_path)
    output = tmp_path / f"answers{suffix}"
    assert run(["predict", str(made), *given, "--output", str(output), "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["errors"] == 1
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".jsonl": lambda path: pd.read_json(path, lines=True)}
    frame = read[suffix](output)
    assert list(frame["row"]) == [0, 1, 2]
    assert list(frame["finish_reason"] == "error") == [False, True, False]
    assert "601 tokens" in frame["error"][1] and "context 512" in frame["error"][1]
    assert run(["predict", str(made), *given], monkeypatch) == 0
    shown = capsys.readouterr()
    assert "[1]" in shown.out and "601 tokens" in shown.out and "Traceback" not in shown.out + shown.err


def test_evaluate_tells_of_rows_that_could_not_be_asked(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = table(f"question,answer\nhow?,so\n{LONG},so\n")(tmp_path)
    assert run(["evaluate", str(made), *given, "--shots", "0"], monkeypatch) == 0
    shown = capsys.readouterr()
    text = " ".join((shown.out + shown.err).split())
    assert "1 of 2 rows could not be asked" in text and "row 1: " in text and "601 tokens" in text
    assert "Traceback" not in shown.out + shown.err


def test_faults_in_chat_end_an_answer_and_not_the_conversation(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = f"{LONG}\n/nonsense\n/temp warm\n/temp -1\n/set nothing x\n/base\nhow?\n/quit\n"
    assert run(["chat", str(made)], monkeypatch, typed) == 0
    shown = capsys.readouterr()
    for said in ("601 tokens", "there is no /nonsense", "temperature", "the columns to set are", "a message has to"):
        assert said in shown.err, (said, shown.err)
    assert "Traceback" not in shown.out + shown.err


def test_chat_as_json_tells_faults_as_json(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["chat", str(made), "--json"], monkeypatch, f"{LONG}\nhow?\n") == 0
    told = capsys.readouterr().out
    fault, end = json.JSONDecoder().raw_decode(told)
    answer, _ = json.JSONDecoder().raw_decode(told[end:].strip())
    assert "601 tokens" in fault["error"] and "answer" in answer
