"""One reader for JSON from outside: one kind of error, one limit of nesting, and nobody reads past it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from luthier import json_reader
from luthier.json_reader import MAX_DEPTH, parse, read

SOURCE = Path(json_reader.__file__).parent
# Where `json.loads` reads what this process has just written, or what its own rank 0 or a library's object said.
OWN = {
    "json_reader.py", "assets/tokenizer.py",
    "assets/tokenizer_bounds.py", "config/describe.py", "numbers.py", "parallel/ranks.py",
    "run/lock.py", "train/checkpoint.py",
}  # fmt: skip


def nested(depth: int, begin: str = "[", end: str = "]") -> str:
    return begin * depth + "1" + end * depth


@pytest.mark.parametrize("begin, end", [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_nesting_has_a_limit_of_its_own(begin: str, end: str) -> None:
    levels = begin.count("[") + begin.count("{")
    value = parse(nested(MAX_DEPTH // levels, begin, end))
    assert json.dumps(value, separators=(",", ":")) == nested(MAX_DEPTH // levels, begin, end)
    for depth in (MAX_DEPTH // levels + 1, 2_000, 200_000):
        with pytest.raises(ValueError, match="nests deeper than 200"):
            parse(nested(depth, begin, end))


def test_width_is_no_depth() -> None:
    wide = [{"a": [1, {}], "b": []}] * 1000
    assert parse(json.dumps(wide)) == wide
    assert parse('"' + "[" * 500 + '"') == "[" * 500


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe[\x00]\x00", b'"\xed\xa0\x80"', b"\xef\xbb\xbf[]", b"[" * 10**6]
)
def test_what_is_no_json_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for act in (lambda: read(path), lambda: parse(content)):
        with pytest.raises(ValueError):
            act()


def test_a_file_that_cannot_be_read_is_a_value_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=path.name):
            read(path)


def test_where_it_is_wrong_is_told() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        parse('{"a": 1,\n oops}')
    assert (caught.value.lineno, caught.value.colno) == (2, 2)


def test_nobody_reads_past_it() -> None:
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("load", "loads") and ast.unparse(node.value) == "json":
                found.add(path.relative_to(SOURCE).as_posix())
    assert found == OWN
