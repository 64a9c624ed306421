"""Two processes that would write one file of answers: the second is refused, and a killed one leaves nothing stuck."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from luthier.errors import RunError
from luthier.tuned.writing import Journal

HOLDING = (
    "import sys, time; from pathlib import Path; from luthier.tuned.writing import Journal\n"
    "journal = Journal(Path(sys.argv[1]), 'work'); journal.add({'row': 0, 'response': 'a'})\n"
    "print('held', flush=True); time.sleep(60)"
)


def test_the_second_is_refused_until_the_first_was_killed(tmp_path: Path) -> None:
    target = tmp_path / "answers.csv"
    command = [sys.executable, "-c", HOLDING, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        before = (tmp_path / "answers.csv.partial").read_bytes()
        for identity in ("work", "other work"):
            with pytest.raises(RunError) as caught:
                Journal(target, identity)
            assert caught.value.code == "run-in-use" and "answers.csv" in str(caught.value)
        assert (tmp_path / "answers.csv.partial").read_bytes() == before
        first.kill()
        first.wait()
        journal = Journal(target, "work")
        assert journal.done == {0} and not journal.foreign
        journal.add({"row": 1, "response": "b"})
        journal.finish([0, 1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.csv"]
    assert target.read_text(encoding="utf-8").splitlines()[1:] == ["0,a", "1,b"]


def test_another_file_beside_it_is_free(tmp_path: Path) -> None:
    one, other = Journal(tmp_path / "a.csv", "work"), Journal(tmp_path / "b.csv", "work")
    one.close()
    other.close()
    Journal(tmp_path / "a.csv", "work").close()


@pytest.mark.parametrize("line", [b"[1]", b"{}", b"\0\0", b"\xff", b'{"row": "x"}', b"[" * 5000])
def test_what_follows_a_damaged_line_is_done_again(line: bytes, tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    journal = Journal(target, "work")
    journal.add({"row": 0, "response": "a"})
    journal.add({"row": 1, "response": "b"})
    journal.close()
    head, first, second = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(head + first + line + b"\n" + second)
    again = Journal(target, "work")
    assert again.done == {0} and not again.foreign
    again.add({"row": 1, "response": "c"})
    again.finish([0, 1])
    assert target.read_text(encoding="utf-8").splitlines()[1:] == ["0,a", "1,c"]
