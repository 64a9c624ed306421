"""Every command: its options, its JSON, its help, and what a person or a machine gets when something is wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import typer.main

from luthier import cli, pipeline
from luthier.cli import app
from luthier.errors import RunError

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CONFIGURABLE = ("init", "check", "plan", "train", "evaluate", "predict", "chat")  # those that read a config
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def luthier(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in an empty folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["luthier", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.csv, config.yaml and a finished run `made`, one short epoch of the tiny model."""
    folder = tmp_path_factory.mktemp("work")
    lines = ["question,answer", *(f"say {i},yes {i}" for i in range(20))]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "base_model": str(tiny_llama),
        "dataset": "rows.csv",
        "prompt": {"template": "{question}\n"},
        "trainer": {"epochs": 1, "batch_size": 8, "precision": "fp32"},
        "generation": {"max_new_tokens": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    from luthier import config as configs
    from luthier import pipeline

    pipeline.train(configs.load(folder / "config.yaml"), folder / "rows.csv", output=folder / "made")
    return folder


# ------------------------------------------------------------------------------------------------ options and help


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_json_help_and_examples_that_parse(name: str, luthier: Run) -> None:
    command = COMMANDS[name]
    options = {option for parameter in command.params for option in parameter.opts}
    assert "--json" in options
    assert all(parameter.help for parameter in command.params if parameter.name != "help"), "an option without a word"
    code, out, _ = luthier(name, "--help")
    assert code == 0 and "For example:" in out
    module = getattr(cli, name)
    assert all(f"\n    {example}\n" in out for example in module.EXAMPLES), "an example that cannot be copied"
    for example in module.EXAMPLES:
        program, called, *arguments = shlex.split(example)
        assert (program, called) == ("luthier", name)
        command.make_context(name, list(arguments))  # parses, or raises a usage error


def test_the_help_says_what_each_command_does_in_one_whole_line(luthier: Run) -> None:
    code, out, _ = luthier("--help")
    said = re.findall(r"^  (\w+) +([A-Z].*\.)$", out, re.MULTILINE)
    assert code == 0 and {name for name, _ in said} == set(COMMANDS)
    assert not any(line.endswith("...") for _, line in said)


def test_commands_with_a_config_take_overrides_and_the_others_are_said_to_have_none() -> None:
    taking = [name for name, one in COMMANDS.items() if any("--set" in parameter.opts for parameter in one.params)]
    assert taking == list(CONFIGURABLE)
    page = (Path(__file__).parents[3] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    said = re.search(r"`--set key.path=value` ([^;]+);\s(.+?) have no config", page, re.DOTALL)
    assert said is not None and set(re.findall("`(\\w+)`", said[2])) == set(COMMANDS) - set(CONFIGURABLE)


@pytest.mark.parametrize(
    ("name", "spellings"),
    [
        ("train", ["--config", "-c", "--output_directory", "-od", "--dataset"]),
        ("check", ["--config", "-c", "--dataset"]),
        ("predict", ["--model_path", "-m", "--output_directory", "-od", "--dataset"]),
        ("evaluate", ["--model_path", "-m", "--output_directory", "-od", "--dataset"]),
        ("chat", ["--model_path", "-m"]),
    ],
)
def test_ludwigs_spellings(name: str, spellings: list[str]) -> None:
    assert set(spellings) <= {option for parameter in COMMANDS[name].params for option in parameter.opts}


def test_the_version(luthier: Run) -> None:
    from luthier import __version__

    assert luthier("--version")[:2] == (0, f"luthier {__version__}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_once_the_run_is_finished_interrupts_nothing(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(trained: SimpleNamespace) -> None:
        print("trained")
        os.kill(os.getpid(), number)

    (tmp_path / "config.yaml").write_text("base_model: smollm2\ndataset: rows.csv\n")
    monkeypatch.setattr("luthier.pipeline.train", lambda *_, **__: SimpleNamespace(folder=tmp_path))
    monkeypatch.setattr("luthier.cli.train._show", show)
    monkeypatch.setattr(sys, "argv", ["luthier", "train", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert not caught.value.code and out == "trained\n" and "ended by" not in err


# ------------------------------------------------------------------------------------------------ with a trained run


def test_ludwigs_spelling_of_train_is_the_same_run(trained: Path, luthier: Run) -> None:
    made = str(trained / "made")
    code, out, _ = luthier("train", "-c", str(trained / "config.yaml"), "-od", made, "--json")
    assert code == 0 and json.loads(out)["run"] == made  # finished already, and the same lock
    code, out, err = luthier("train", "-c", str(trained / "config.yaml"), "-od", made)
    assert code == 0 and "is finished: nothing to do" in err and "luthier evaluate" in out


def test_train_as_json_tells_what_it_tells_people(trained: Path, luthier: Run) -> None:
    rows = trained / "rows.csv"
    (trained / "gappy.csv").write_text(rows.read_text("utf-8") + "say nothing,\n")
    short = ("--set", "trainer.train_steps=1", "--set", "preprocessing.split.probabilities=[1, 0, 0]")
    arguments = ("train", str(trained / "config.yaml"), "--dataset", str(trained / "gappy.csv"), "--output", "run")
    code, out, err = luthier(*arguments, *short, "--json")
    told = json.loads(out)
    assert code == 0 and not err, err
    assert told["standing"] == "new" and told["state"] == "finished" and Path(told["report"]).is_file()
    assert {"key": "adapter", "value": "lora", "ludwig": None} in told["filled"]
    assert sum(told["dropped"].values()) == 1 and told["cut"] == {} and told["best"] is None
    assert any("no row validates" in line for line in told["warnings"])
    assert any(line.startswith("filled in: adapter = lora") for line in told["notes"])
    code, out, _ = luthier(*arguments, *short, "--json")
    again = json.loads(out)
    assert code == 0 and again["standing"] == "finished" and again["filled"] == told["filled"]
    assert any("is finished: nothing to do" in line for line in again["notes"])


def test_train_as_json_says_which_weights_were_kept(trained: Path, luthier: Run) -> None:
    code, out, _ = luthier("train", str(trained / "config.yaml"), "-od", str(trained / "made"), "--json")
    best = json.loads(out)["best"]
    assert code == 0 and best["metric"] == "loss" and best["step"] >= 1
    assert best["value"] == pytest.approx(json.loads(out)["last"]["validation"]["loss"])


def test_check_as_json_has_the_warnings(trained: Path, luthier: Run) -> None:
    config = str(trained / "config.yaml")
    code, out, _ = luthier("check", config, "--set", "preprocessing.split.probabilities=[1, 0, 0]", "--json")
    assert code == 0 and any("no row validates" in line for line in json.loads(out)["warnings"])
    code, out, _ = luthier("check", config, "--json")
    assert code == 0 and json.loads(out)["warnings"] == [] and json.loads(out)["notes"]


def test_the_config_of_a_run_folder_goes_on_from_any_folder(trained: Path, luthier: Run) -> None:
    # what a message after an interruption says to type; the table stands beside the first config, not beside its copy
    code, _, err = luthier("train", str(trained / "made/config.yaml"), "--output", str(trained / "made"))
    assert code == 0, err
    assert "is finished: nothing to do" in err


def test_a_base_and_a_table_named_from_the_folder_of_training_are_found_from_another(
    tiny_llama: Path, luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny_llama)
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"say {i},yes\n" for i in range(12)))
    short = "base_model: model\ntrainer: {train_steps: 1}\ngeneration: {max_new_tokens: 2}\n"
    (tmp_path / "config.yaml").write_text(short)
    code, _, err = luthier("train", "config.yaml", "--dataset", "rows.csv", "--output", "run")
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = luthier("evaluate", "../run", "--rows", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["count"] == 1


@pytest.fixture
def apart(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder `own` with a config whose base and table lie beside it; the working directory is another one."""
    own = tmp_path / "own"
    own.mkdir()
    shutil.copytree(tiny_llama, own / "tiny")
    (own / "rows.csv").write_text("question,answer\n" + "".join(f"say {i},yes\n" for i in range(12)))
    short = "trainer: {train_steps: 1, eval_generation_rows: 0}\ngeneration: {max_new_tokens: 2}\n"
    (own / "config.yaml").write_text(f"base_model: ./tiny\ndataset: rows.csv\n{short}")
    return own


def test_a_base_beside_the_config_is_found_as_the_table_is_and_a_run_goes_on_with_the_recorded_one(
    apart: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("check", "plan"):
        code, out, _ = luthier(name, "own/config.yaml", *(["--no-probe"] if name == "plan" else []), "--json")
        assert code == 0, out
    code, out, _ = luthier("train", "own/config.yaml", "--output", "run", "--json")
    assert code == 0, out
    (apart / "elsewhere").mkdir()
    monkeypatch.chdir(apart / "elsewhere")
    code, out, _ = luthier("train", "--resume", "../../run", "--json")
    assert code == 0 and json.loads(out)["standing"] == "finished", out
    monkeypatch.chdir(apart)  # the same declared name, the same run
    code, out, _ = luthier("train", "config.yaml", "--output", "../run", "--json")
    assert code == 0 and json.loads(out)["standing"] == "finished", out
    (apart / "tiny").rename(apart / "moved")
    code, out, _ = luthier("train", "--resume", "../run", "--json")
    (fault,) = json.loads(out)["error"]
    assert (code, fault["code"]) == (4, "asset-not-found")
    assert str(apart.parent) in fault["message"] and fault["fix"] == "put it back where it was"
    code, out, _ = luthier("evaluate", "../run", "--rows", "1", "--set", "base_model=moved", "--json")
    assert code == 0, out


def test_from_python_a_base_beside_the_config_is_found_too(apart: Path, luthier: Run) -> None:
    from luthier.api import LudwigModel

    model = LudwigModel("own/config.yaml")
    assert Path(model.train(dataset="own/rows.csv", random_seed=3)[2]).is_dir()


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("./tinny", "did you mean '{own}/tiny'?"),
        ("smolm2", "did you mean 'smollm2'?"),
        ("./quite/else", "name a folder that is there, a hub id, or a built-in base: smollm2"),
        ("./tiny.gguf", "did you mean '{own}/tiny'?"),
    ],
)
def test_a_base_that_is_nowhere_says_where_it_was_looked_for_and_what_is_near(
    name: str, fix: str, apart: Path, luthier: Run, tmp_path: Path
) -> None:
    code, out, _ = luthier("check", "own/config.yaml", "--set", f"base_model={name}", "--json")
    (fault,) = json.loads(out)["error"]
    assert (code, fault["code"], fault["fix"]) == (4, "asset-not-found", fix.format(own=apart))
    assert str(apart / name) in fault["message"] and str(tmp_path / name) in fault["message"]


def test_another_config_is_refused_with_the_difference(trained: Path, luthier: Run) -> None:
    arguments = ("train", str(trained / "config.yaml"), "--output", str(trained / "made"), "--set", "trainer.epochs=9")
    code, _, err = luthier(*arguments)
    assert code == 5 and "run-other-lock" in err and "config.trainer.epochs: 1 → 9" in err and "--fork" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("init", "rows.csv", "--output", "new.yaml"),
        ("check", "config.yaml"),
        ("plan", "config.yaml", "--no-probe"),
        ("train", "config.yaml", "--output", "other"),
        ("evaluate", "made"),
        ("predict", "made", "--dataset", "rows.csv"),
        ("chat", "made"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_override_reaches_the_config_of_each_command(
    arguments: tuple[str, ...], trained: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    code, out, _ = luthier(*arguments, "--set", "generation.max_new_token=3", "--json")
    (fault,) = json.loads(out)["error"]
    assert code == 2 and fault["code"] == "config-unknown-key" and "max_new_tokens" in fault["fix"]
    assert not (trained / "other").exists() and not (trained / "new.yaml").exists()


def test_predict_prints_or_writes(trained: Path, luthier: Run, tmp_path: Path) -> None:
    made, rows = str(trained / "made"), str(trained / "rows.csv")
    code, out, _ = luthier("predict", made, "--dataset", rows)
    assert code == 0 and len(out.splitlines()) >= 20 and out.startswith("[0] ")
    drawn = ("--set", "generation.temperature=1.0", "--set", "generation.n=3")
    code, out, _ = luthier("predict", made, "--dataset", rows, *drawn)
    assert code == 0 and out.count("[0] ") == 3
    code, out, _ = luthier("predict", made, "--dataset", rows, *drawn, "--json")
    assert all(len(answer["responses"]) == 3 for answer in json.loads(out)["answers"])
    code, _, err = luthier("predict", made, "--dataset", rows, "--set", "generation.engine=vllm")
    assert code == 7 and "pip install 'vllm" in err
    for output in ("a.csv", "b.jsonl", "c.parquet", "d"):
        file = "d/predictions.csv" if output == "d" else output
        code, out, _ = luthier("predict", "-m", made, "--dataset", rows, "-od", output, "--json")
        told = json.loads(out)
        assert code == 0 and told | {"notes": [], "warnings": []} == told | {"notes": told["notes"]}
        assert {"output": file, "rows": 20, "errors": 0, "answers": None}.items() <= told.items()
        assert (tmp_path / file).stat().st_size


@pytest.mark.parametrize("name", ["rows.csv", "other.csv", "other.jsonl", "other.parquet"])
def test_what_predict_did_not_write_is_not_replaced(name: str, trained: Path, luthier: Run, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"question": ["say 1", "say 2"], "answer": ["yes", "no"]})
    shutil.copy(trained / "rows.csv", tmp_path / "rows.csv")
    frame.to_csv("other.csv", index=False)
    frame.to_json("other.jsonl", orient="records", lines=True)
    frame.to_parquet("other.parquet")
    before = (tmp_path / name).read_bytes()
    code, _, err = luthier("predict", str(trained / "made"), "--dataset", "rows.csv", "--output", name)
    assert code == 5 and "run-foreign-files" in err and (tmp_path / name).read_bytes() == before
    again = f"own{Path(name).suffix}"
    for _ in range(2):  # what it wrote itself it writes again
        assert luthier("predict", str(trained / "made"), "--dataset", "rows.csv", "--output", again)[0] == 0
    with pytest.raises(RunError):
        pipeline.load(trained / "made").predict("rows.csv").write(tmp_path / name)


def test_what_evaluate_and_schema_did_not_write_is_not_replaced(trained: Path, luthier: Run, tmp_path: Path) -> None:
    (tmp_path / "precious.json").write_text('{"mine": 1}')
    (tmp_path / "config.yaml").write_text("base_model: smollm2\n")
    code, _, err = luthier("evaluate", str(trained / "made"), "--rows", "1", "--output", "precious.json")
    assert code == 5 and "run-foreign-files" in err and "mine" in (tmp_path / "precious.json").read_text()
    code, _, err = luthier("schema", "--output", "config.yaml")
    assert code == 5 and "smollm2" in (tmp_path / "config.yaml").read_text()
    for _ in range(2):
        assert luthier("schema", "--output", "config.schema.json")[0] == 0
        assert luthier("evaluate", str(trained / "made"), "--rows", "1", "--output", "own.json")[0] == 0


def test_a_tracker_that_is_not_installed_is_told_by_check(
    trained: Path, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.pipeline.named.find_spec", lambda name: None)
    code, _, err = luthier("check", str(trained / "config.yaml"), "--set", "trainer.track=[mlflow]")
    assert code == 7 and "mlflow" in err and "luthier[track]" in err


def test_a_name_that_cannot_be_written_is_refused_before_the_work(luthier: Run) -> None:
    code, _, err = luthier("predict", "no-run-at-all", "--dataset", "x.csv", "--output", "answers.txt")
    assert code == 3 and "answers cannot be written" in err and "answers.csv" in err


def test_evaluate_shows_the_contestants(trained: Path, luthier: Run) -> None:
    code, out, _ = luthier("evaluate", str(trained / "made"), "--rows", "2", "--shots", "1")
    assert code == 0 and "base, 1-shot" in out and "exact_match" in out and "report.html" in out


@pytest.mark.parametrize(("named", "file"), [("said", "said/evaluation.json"), ("to/said.json", "to/said.json")])
def test_evaluate_writes_the_comparison_where_it_is_told(
    named: str, file: str, trained: Path, luthier: Run, tmp_path: Path
) -> None:
    code, out, err = luthier("evaluate", "-m", str(trained / "made"), "--rows", "1", "-od", named, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert json.loads((tmp_path / file).read_text("utf-8")) | {key: told[key] for key in ("notes", "warnings")} == told
    (tmp_path / "taken").touch()
    code, out, _ = luthier("evaluate", str(trained / "made"), "-od", "taken", "--json")
    assert code == 5 and json.loads(out)["error"][0]["code"] == "run-not-writable"


@pytest.mark.parametrize(
    "arguments",
    [
        ("schema", "-o", "{place}/schema.json"),
        ("init", "rows.csv", "-o", "{place}/config.yaml"),
        ("predict", "made", "--dataset", "rows.csv", "--output", "{place}/answers.csv"),
        ("evaluate", "made", "--rows", "1", "--output", "{place}/compared.json"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_gets_its_folder_and_one_that_cannot_be_written_is_said_before_the_work(
    arguments: tuple[str, ...], trained: Path, luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    (tmp_path / "taken").touch()
    code, out, err = luthier(*(one.format(place=tmp_path / "taken") for one in arguments), "--json")
    (fault,) = json.loads(out)["error"]
    assert (code, fault["code"], err) == (5, "run-not-writable", "")
    assert fault["where"] == arguments[-1].format(place=tmp_path / "taken") and "--output" in fault["fix"]
    code, out, err = luthier(*(one.format(place=tmp_path / "new" / "folder") for one in arguments), "--json")
    assert code == 0, out
    assert Path(arguments[-1].format(place=tmp_path / "new" / "folder")).stat().st_size


def test_a_disk_that_fills_while_the_output_is_written_is_said(
    luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("luthier.run.atomic.write_json", full)
    code, out, _ = luthier("schema", "-o", "schema.json", "--json")
    assert code == 5 and json.loads(out)["error"][0]["code"] == "run-no-space"


@pytest.mark.parametrize(
    ("error", "code", "slug"), [(MemoryError(), 6, "training-no-memory"), (ValueError("odd"), 1, "unexpected")]
)
def test_what_no_one_expected_is_said_as_json_too(
    error: Exception, code: int, slug: str, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.config.json_schema", Mock(side_effect=error))
    found, out, err = luthier("schema", "--json")
    told = json.loads(out)
    assert found == told["exit_code"] == code and [one["code"] for one in told["error"]] == [slug] and not err
    found, out, err = luthier("schema")
    assert found == code and not out and f"[{slug}]" in err


def test_chat_asks_the_way_the_model_was_taught(trained: Path, luthier: Run) -> None:
    from luthier import pipeline

    tuned = pipeline.load(trained / "made")
    tables = tuned.predict({"question": ["say 3", "say 4"]}).texts
    code, out, _ = luthier("chat", str(trained / "made"), "--json", stdin="say 3\nsay 4\n/quit\n")
    # The template's prompt, and no earlier turn before it.
    assert code == 0 and [one["answer"] for one in _objects(out)] == tables
    code, _, err = luthier("chat", str(trained / "made"), "--system", "Be brief.", stdin="")
    assert code == 2 and "config-conflict" in err


def test_chat_with_a_template_of_more_columns_keeps_what_all_rows_hold(
    tiny_llama: Path, luthier: Run, tmp_path: Path
) -> None:
    from luthier import pipeline

    rows = "".join(f"Say it.,word {i},yes {i},{'loud' if i % 2 else ''}\n" for i in range(16))
    (tmp_path / "rows.csv").write_text("instruction,input,output,how\n" + rows)
    (tmp_path / "config.yaml").write_text(
        f"base_model: {tiny_llama}\ndataset: rows.csv\ntrainer: {{train_steps: 1}}\ngeneration: {{max_new_tokens: 4}}\n"
        'prompt: {template: "{instruction} {input} {how}\\n"}\n'
        "input_features: [{name: instruction}]\noutput_features: [{name: output, type: text}]\n"
    )
    code, _, err = luthier("train", "config.yaml", "--output", "run")
    assert code == 0, err
    tuned = pipeline.load("run")
    conversation = tuned.chat()
    assert (conversation.column, conversation.others) == ("input", {"instruction": "Say it.", "how": None})
    asked = {"instruction": ["Say it.", "Say it."], "input": ["word 3"] * 2, "how": ["", "loud"]}
    code, out, _ = luthier("chat", "run", "--json", stdin="word 3\n/set how loud\nword 3\n/set nothing x\n/quit\n")
    plain, loud, wrong = _objects(out)
    assert code == 0 and [plain["answer"], loud["answer"]] == tuned.predict(asked).texts
    assert "instruction, how" in wrong["error"]


def test_running_text_is_not_to_be_compared_and_chat_goes_on_from_it(
    tiny_llama: Path, luthier: Run, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f"the sea {i} is calm\n" for i in range(16)))
    settings = "trainer: {train_steps: 1}\ngeneration: {max_new_tokens: 2}\n"
    (tmp_path / "config.yaml").write_text(f"base_model: {tiny_llama}\ndataset: rows.csv\n{settings}")
    code, out, err = luthier("train", "config.yaml", "--output", "run")
    assert code == 0 and "luthier chat" in out and "luthier evaluate" not in out, err
    code, out, err = luthier("chat", "run", stdin="the sea\n/quit\n")
    assert code == 0 and out.strip() and "goes on from a message" in err


def test_a_column_that_is_set_after_the_first_message_is_told_to_wait(
    tiny_llama: Path, luthier: Run, tmp_path: Path
) -> None:
    (tmp_path / "rows.csv").write_text("q,how,a\n" + "".join(f"word {i},x{i % 2},yes\n" for i in range(16)))
    (tmp_path / "config.yaml").write_text(
        f"base_model: {tiny_llama}\ndataset: rows.csv\ntrainer: {{train_steps: 1}}\ngeneration: {{max_new_tokens: 2}}\n"
        'prompt: {template: "{q} {how}", chat_template: true}\n'
        "input_features: [{name: q}, {name: how}]\noutput_features: [{name: a, type: text}]\n"
    )
    code, _, err = luthier("train", "config.yaml", "--output", "run")
    assert code == 0, err
    code, _, err = luthier("chat", "run", stdin="/set how loud\nword 3\n/quit\n")
    assert code == 0 and "after /reset" not in err
    code, _, err = luthier("chat", "run", stdin="word 3\n/set how loud\nword 4\n/quit\n")
    assert code == 0 and "holds after /reset" in err


def test_chat_compares_warms_and_goes_on_after_a_fault(trained: Path, luthier: Run) -> None:
    lines = "/compare say 3\n/base say 3\nsay 3\n/temp hot\n/nothing\n/base\n/temp 100\nsay 3\n/temp 0\nsay 3\n/quit\n"
    code, out, _ = luthier("chat", str(trained / "made"), "--json", stdin=lines)
    base, tuned, again, same, hot, nothing, empty, warm, cold = map(json.loads, out.splitlines())
    assert code == 0 and base["base"] and not tuned["base"]
    assert base["answer"] == again["answer"] and tuned["answer"] == same["answer"] == cold["answer"]
    assert "temperature" in hot["error"] and "/help" in nothing["error"] and "message" in empty["error"]
    assert warm["answer"] != cold["answer"]
    code, out, err = luthier("chat", str(trained / "made"), "--json", stdin="/help\nsay 3\n")
    assert code == 0 and json.loads(out) == tuned and "/compare MESSAGE" in err
    code, out, err = luthier("chat", str(trained / "made"), stdin="/help\n/compare say 3\n/reset\n/temp x\n")
    assert code == 0 and "/compare MESSAGE" in out and "base:  " in out and "tuned: " in out and "temperature" in err


def _objects(text: str) -> list[Any]:
    """JSON objects that stand one after the other."""
    out, rest = [], text.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        out.append(value)
        rest = rest[end:].lstrip()
    return out


def test_runs_lists_and_compares(trained: Path, luthier: Run, tmp_path: Path) -> None:
    code, out, _ = luthier("runs")
    assert code == 0 and out.startswith("no runs in runs yet: `luthier train CONFIG` makes one there")
    code, out, _ = luthier("runs", str(trained))
    assert code == 0 and "made" in out and "finished" in out
    made = str(trained / "made")
    other = str(tmp_path / "other")
    overrides = ("--set", "adapter.type=lora", "--set", "adapter.r=4")
    assert luthier("train", str(trained / "config.yaml"), "--output", other, *overrides)[0] == 0
    code, out, _ = luthier("runs", made, other, "--json")
    assert code == 0 and json.loads(out)["differences"]["adapter.r"] == ["16", "4"]
    assert "adapter.r" in luthier("runs", made, other)[1]
    code, _, err = luthier("runs", "nowhere")
    assert code == 5 and "run-not-a-run" in err and "luthier train" in err


def test_many_runs_stay_readable(luthier: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for number in range(9):
        folder = tmp_path / "runs" / f"run-{number}"
        folder.mkdir(parents=True)
        noise = {f"key_{one}": number for one in range(40)} if number == 8 else {}
        lock = {"config": {"adapter": {"r": 8 if number % 2 else 4}, "idle": [None, {}][number % 2], **noise}}
        (folder / "run.json").write_text(json.dumps({"lock": lock | {"base_name": "tiny"}}))
    code, out, _ = luthier("runs")
    assert code == 0 and len(out.splitlines()) < 16 and "What differs" not in out
    code, out, _ = luthier("runs", "runs", "--json")
    assert code == 0 and len(json.loads(out)["runs"]) == 9 and json.loads(out)["differences"] == {}
    named = [str(Path("runs") / f"run-{number}") for number in range(4)]
    code, out, _ = luthier("runs", *named)
    assert code == 0 and out.endswith("\nWhat differs\nadapter.r\n  4: run-0, run-2\n  8: run-1, run-3\n"), out
    code, out, _ = luthier("runs", *named[:3])
    row = re.search(r"adapter.r *│ 4 *│ 8 *│ 4", out)
    assert code == 0 and row is not None, out


def test_check_shows_rows_and_what_is_trained(trained: Path, luthier: Run) -> None:
    code, out, _ = luthier("check", str(trained / "config.yaml"), "--rows", "1")
    assert code == 0 and "sample 1: green is trained" in out and "say" in out


# ------------------------------------------------------------------------------------------- without a trained run


def test_schema_and_doctor(luthier: Run, tmp_path: Path) -> None:
    code, out, _ = luthier("schema")
    assert code == 0 and "base_model" in json.loads(out)["properties"]
    assert luthier("schema", "-o", "s.json")[0] == 0 and json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert json.loads(luthier("schema", "--output", "t.json", "--json")[1]) == {"schema": "t.json"}
    assert (tmp_path / "t.json").read_bytes() == (tmp_path / "s.json").read_bytes()
    assert json.loads(luthier("schema", "--json")[1]) == json.loads(out)
    code, out, _ = luthier("doctor", "--json")
    assert code == 0 and {"machine", "packages", "support"} <= set(json.loads(out))
    assert "Supported where" in luthier("doctor")[1]


def test_wrong_usage_and_wrong_names_say_what_is_right(luthier: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base_model: smollm2\n", encoding="utf-8")
    code, _, err = luthier("trian")
    assert code == 2 and "train" in err
    code, _, err = luthier("train", "config.yml")
    assert code == 2 and "config.yaml" in err
    code, _, err = luthier("train", "config.yaml")
    assert code == 2 and "--dataset FILE" in err
    code, _, err = luthier("chat")
    assert code == 2 and "RUN is missing" in err and "--model_path" in err
    code, _, err = luthier("chat", "one", "-m", "two")
    assert code == 2 and "given twice" in err
    code, out, _ = luthier("train", "config.yaml", "--dataset", "x.csv", "--set", "trainer.epoch=1", "--json")
    failure = json.loads(out)
    assert code == failure["exit_code"] == 2 and "epochs" in failure["error"][0]["fix"]


def test_debug_shows_the_traceback_and_nothing_else_does(luthier: Run) -> None:
    assert "Traceback" not in luthier("check", "none.yaml")[2]
    for line in (("--debug", "check", "none.yaml"), ("check", "none.yaml", "--debug")):
        code, _, err = luthier(*line)
        assert code == 2 and "Traceback" in err and "config-unreadable" in err


@pytest.mark.parametrize(
    ("line", "where", "said"),
    [
        (("predict", "--json", "--dataset", "t.csv"), "luthier predict", "RUN is missing"),
        (("evaluate", "a-run", "--row", "3", "--json"), "luthier evaluate", "--row"),
        (("check", "config.yaml", "--rows", "many", "--json"), "luthier check", "--rows"),
        (("trian", "--json"), "luthier", "trian"),
    ],
)
def test_wrong_usage_is_json_where_json_was_asked_for(
    line: tuple[str, ...], where: str, said: str, luthier: Run
) -> None:
    code, out, err = luthier(*line)
    told = json.loads(out)
    fault = told["error"][0]
    assert code == told["exit_code"] == 2 and not err
    assert fault["code"] == "config-usage" and fault["where"] == where and said in fault["message"]
    assert fault["received"] == shlex.join(line) and where in fault["allowed"] and fault["fix"] == f"{where} --help"
    code, out, err = luthier(*(word for word in line if word != "--json"))
    assert code == 2 and not out and said in err and "Usage:" in err
    assert "[config-usage]" in err and f"fix:      {where} --help" in err and "allowed:" in err


def test_a_line_without_a_word_is_the_help(luthier: Run) -> None:
    code, out, err = luthier()
    assert code == 2 and "Fine-tune language models" in out + err and "config-usage" not in err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "ended by SIGINT"),
        (SystemExit(143), 143, "ended by SIGTERM"),
        (MemoryError(), 6, "training-no-memory"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_other_ends_have_their_codes(
    raised: BaseException, code: int, said: str, luthier: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    got, _, err = luthier("anything")
    assert got == code and said in err


def test_convert_makes_safetensors(tiny_llama: Path, luthier: Run, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    shutil.copytree(tiny_llama, tmp_path / "old")
    torch.save(load_file(tmp_path / "old" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    code, out, _ = luthier("convert", "old", "--json")
    assert code == 0 and (Path(json.loads(out)["folder"]) / "model.safetensors").is_file()


def test_the_package_is_the_command_line_too() -> None:
    from luthier import __version__

    done = subprocess.run([sys.executable, "-m", "luthier", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"luthier {__version__}\n"), done.stderr
