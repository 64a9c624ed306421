"""The shared ground: errors explain themselves, names are suggested, events reach their sink."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from luthier import console, events
from luthier.error_codes import CODES
from luthier.errors import ConfigError, Fault, LuthierError, missing_extra
from luthier.registry import Registry, nearest

SOURCE = Path(__file__).parents[2] / "src" / "luthier"


def test_an_error_says_what_where_received_allowed_and_fix() -> None:
    error = ConfigError(
        "config-unknown-key",
        "there is no key 'learning_rat'",
        where="config.yaml:12:3",
        received="learning_rat",
        allowed=["learning_rate"],
        fix="did you mean 'learning_rate'?",
    )
    text = str(error)
    for part in ("[config-unknown-key]", "config.yaml:12:3", "learning_rat", "did you mean"):
        assert part in text
    assert error.code == "config-unknown-key"
    assert error.faults[0].to_json()["allowed"] == ["learning_rate"]


def test_an_error_carries_all_faults() -> None:
    faults = [Fault("config-bad-value", "one"), Fault("config-conflict", "two")]
    error = ConfigError(faults)
    assert str(error).count("[config-") == 2


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("value", [16, 0.5, False, ["a", 2, None], {"b"}, Path("x"), 10**5000, Unspeakable()], ids=type)
def test_a_fault_can_be_told_whatever_it_holds(value: Any) -> None:
    error = ConfigError("config-conflict", "one thing", where=value, received=value, allowed=value, fix=value)
    assert "received: " in str(error) and "allowed:  " in str(error)
    assert json.loads(json.dumps(error.faults[0].to_json()))["message"] == "one thing"


def test_an_undeclared_code_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="undeclared"):
        Fault("config-no-such-code", "x")


def test_exit_codes_differ_by_kind() -> None:
    kinds = [LuthierError, *LuthierError.__subclasses__()]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)


def test_every_code_in_the_source_is_declared() -> None:
    prefixes = sorted({code.split("-")[0] for code in CODES})
    pattern = re.compile(rf'(?:Error|Fault)\(\s*"((?:{"|".join(prefixes)})-[a-z-]+)"')
    used = {code for path in SOURCE.rglob("*.py") for code in pattern.findall(path.read_text("utf-8"))}
    assert used
    assert used <= set(CODES)


# The one error that a user does not cause by an input: a signal ended the run, and its fix is the way to go on.
EXEMPT = {"run-interrupted"}
KINDS = {"LuthierError", "Fault", *(kind.__name__ for kind in LuthierError.__subclasses__())} - {"Interrupted"}
PARTS = ("where", "received", "allowed", "fix")


def _constructions() -> Iterator[tuple[str, ast.Call]]:
    """Every error or fault that the source makes with a message, and its place."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
                continue
            if len(node.args) > 1:  # one argument is a list of faults, which are looked at by themselves
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def _said(call: ast.Call) -> set[str]:
    assert isinstance(call.func, ast.Name)
    by_place = PARTS[: max(0, len(call.args) - 2)] if call.func.id == "Fault" else ()
    named = {keyword.arg for keyword in call.keywords}
    return set(PARTS) if None in named else {*by_place, *(name for name in named if name)}


def test_every_error_says_what_was_received_and_what_is_allowed_or_the_fix() -> None:
    found = list(_constructions())
    assert len(found) > 200
    mute = [place for place, call in found if not _said(call) & {"allowed", "fix"}]
    unreceived = [place for place, call in found if "received" not in _said(call)]
    assert (mute, unreceived) == ([], [])


def test_every_code_knows_what_is_allowed_and_a_fix_and_lends_them() -> None:
    assert {name for name, code in CODES.items() if not (code.allowed and code.fix)} == EXEMPT
    fault = Fault("data-empty", "no rows", fix="add some")
    assert fault.allowed == CODES["data-empty"].allowed and fault.fix == "add some"


def test_no_check_of_the_config_raises_an_error_that_says_only_what_is_wrong() -> None:
    raised = [
        path.name
        for path in (SOURCE / "config").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "ValueError"
    ]
    assert raised == ["execution.py"]  # size_bytes, whose callers say the rest


def test_a_missing_extra_names_the_command() -> None:
    assert "luthier[excel]" in str(missing_extra("openpyxl", "excel", "reading Excel"))


def test_nearest_forgives_a_slip_and_no_more() -> None:
    assert nearest("learning_rat", ["epochs", "learning_rate"]) == "learning_rate"
    assert nearest("zzz", ["epochs", "learning_rate"]) is None


def test_a_registry_suggests_and_lists() -> None:
    registry: Registry[int] = Registry("optimizer")
    registry.register("adam", "adamw")(1)
    assert registry.get("adamw") == 1
    with pytest.raises(ConfigError) as caught:
        registry.get("adamm", "trainer.optimizer.type")
    fault = caught.value.faults[0]
    assert fault.fix == "did you mean 'adam'?" and fault.allowed == ["adam", "adamw"]
    with pytest.raises(AssertionError, match="twice"):
        registry.register("adam")(2)


def test_stage_and_progress_reach_every_sink() -> None:
    first: list[events.Event] = []
    second: list[events.Event] = []
    sink = events.fan_out(first.append, second.append)
    with events.stage(sink, "tokenise"):
        assert list(events.progress(sink, "tokenise", [1, 2, 3])) == [1, 2, 3]
    assert first == second
    stages = [event for event in first if isinstance(event, events.Stage)]
    assert [stage.done for stage in stages] == [False, True]
    last = [event for event in first if isinstance(event, events.Progress)][-1]
    assert (last.completed, last.total) == (3, 3)


def test_the_plain_log_writes_steps_notes_and_warnings() -> None:
    lines: list[str] = []
    log = console.PlainLog(lines.append)
    log(events.Note(text="3 rows dropped"))
    log(events.Warned(text="text is long"))
    log(events.Stepped(step=1, total_steps=9, epoch=0.1, split="train", loss=1.5, values={"tokens_per_s": 400.0}))
    log(events.Stepped(step=2, total_steps=9, epoch=0.2, split="train", loss=1.4))  # too soon for another line
    log(events.Stepped(step=2, total_steps=9, epoch=0.2, split="validation", loss=1.25))
    assert lines[0] == "3 rows dropped"
    assert lines[1] == "warning: text is long"
    assert "step 1/9  train loss 1.5000" in lines[2] and "tok/s 400" in lines[2]
    assert "validation loss 1.2500" in lines[3] and len(lines) == 4
