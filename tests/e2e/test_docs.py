"""What the README and the tutorial tell a person to do, done in their order, on the tiny model."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from luthier import cli

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LEFT_OUT = ("make ", "source ", "git ", "pip ")  # the set-up, which other tests and CI itself do


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if kind == language]


@pytest.fixture
def desk(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    lines = [f'"paid Ana {i}.50 on March {i % 28 + 1}","ANA, 03-{i % 28 + 1:02d}, {i}.50"' for i in range(40)]
    table = "\n".join(["note,line", *lines]) + "\n"
    for name in ("my.csv", "notes.csv"):
        (tmp_path / name).write_text(table, encoding="utf-8")
    (tmp_path / "new.csv").write_text("note\npaid Ben 7.00 on May 4\n", encoding="utf-8")
    (tmp_path / "tickets.csv").write_text(
        "subject,body,queue\n" + "".join(f"s{i},b{i},{'ab'[i % 2]}\n" for i in range(40)), encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("paid Eve 3.00 on June 5\n/quit\n"))
    return tmp_path


def small(config: Path, base: Path) -> None:
    """Put the tiny model into a config that `init` wrote."""
    text = config.read_text(encoding="utf-8")
    text = re.sub(r"^base_model: .*", f"base_model: {json.dumps(str(base))}", text, flags=re.MULTILINE)
    text = re.sub(r"max_new_tokens: \d+", "max_new_tokens: 4", text)
    config.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_commands_of_a_page_in_their_order(
    page: str, desk: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    for line in "".join(blocks(page, "sh")).splitlines():
        command = shlex.split(line, comments=True)
        if not command or line.startswith(LEFT_OUT):
            continue
        assert command[0] == "luthier", line
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, line
        if command[1] == "init":
            small(desk / "config.yaml", tiny_llama)
        done.append(command[1])
    assert done[:2] == ["init", "check"] and {"train", "evaluate", "predict", "chat"} <= set(done)
    assert (desk / "answers.csv").read_text(encoding="utf-8").startswith("row,response")


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_python_of_a_page(page: str, number: int, desk: Path, tiny_llama: Path) -> None:
    short = next(text for text in blocks("README.md", "yaml") if "base_model" in text)
    (desk / "config.yaml").write_text(short.replace("epochs: 3", "epochs: 1"), encoding="utf-8")
    small(desk / "config.yaml", tiny_llama)
    with (desk / "config.yaml").open("a", encoding="utf-8") as config:
        config.write("generation:\n  max_new_tokens: 4\n")
    (code,) = blocks(page, "python")[number : number + 1]
    exec(compile(code, page, "exec"), {})
    assert next(desk.glob("r*/*/run.json")).exists()


def test_every_python_block_of_the_readmes_is_among_those() -> None:
    assert [len(blocks(page, "python")) for page in ("README.md", "README.ja.md")] == [2, 2]
