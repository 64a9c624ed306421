"""Tokenizers that are out to hurt: each ends in an error with a code, soon, and in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rendering_fixtures import byte_level, llama_style

from luthier.assets import tokenizer_bounds
from luthier.assets.tokenizer import Tokenizer
from luthier.errors import AssetError

CUBIC = r"\p{L}*\p{L}*\p{N}"  # a match fails within the library's own limit, at each letter anew
EXPONENTIAL = r"(?:a|a)*(?!a)(?<!a)"
TWICE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}


def hostile(folder: Path, **parts: Any) -> Path:
    """A tokenizer's files with these parts of tokenizer.json in place of its own."""
    spec = {**json.loads(byte_level().to_json()), **parts}
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), encoding="utf-8")
    return folder


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step]}}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def refused(work: Any) -> AssetError:
    with pytest.raises(AssetError) as caught:
        work()
    assert caught.value.code == "asset-tokenizer-bounds"
    return caught.value


@pytest.mark.alone
def test_a_pattern_that_takes_minutes_is_left_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_bounds, "PATIENCE", 0.5)
    tokenizer = Tokenizer.load(hostile(tmp_path, **split(CUBIC)))
    assert tokenizer.encode("aa1") == byte_level().encode("aa1")
    started = time.monotonic()
    error = refused(lambda: tokenizer.encode("a" * 3000))
    assert time.monotonic() - started < 2, error
    assert "3,000 characters" in str(error) and str(tmp_path) in str(error)


def test_the_process_ends_though_the_pattern_goes_on(tmp_path: Path) -> None:
    code = (
        "import sys; from luthier.assets import tokenizer_bounds; from luthier.assets.tokenizer import Tokenizer\n"
        "tokenizer_bounds.PATIENCE = 0.5\n"
        "try: Tokenizer.load(sys.argv[1]).encode('a' * 3000)\n"
        "except Exception as error: sys.exit(error.code)"
    )
    command = [sys.executable, "-c", code, str(hostile(tmp_path, **split(CUBIC)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr.strip()) == (1, "asset-tokenizer-bounds")


def test_a_pattern_that_the_library_gives_up_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.load(hostile(tmp_path, **split(EXPONENTIAL)))
    assert "retry-limit" in str(refused(lambda: tokenizer.encode("a" * 300)))
    capfd.readouterr()  # the library writes of it itself


@pytest.mark.parametrize("count", [9, 30, 60])
def test_text_that_doubles_and_doubles(count: int, tmp_path: Path) -> None:
    refused(lambda: Tokenizer.load(hostile(tmp_path, **sequence(*[TWICE] * count))))


def test_text_that_grows_inside_of_sequences(tmp_path: Path) -> None:
    inner = sequence(TWICE, TWICE)["normalizer"]
    for _ in range(5):
        inner = sequence(inner, inner)["normalizer"]
    refused(lambda: Tokenizer.load(hostile(tmp_path, normalizer=inner)))


@pytest.mark.parametrize(
    "part",
    [
        sequence({"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 1000}),
        sequence({"type": "Prepend", "prepend": "x" * 1000}),
        {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 1000}},
        {"decoder": {"type": "Replace", "pattern": {"Regex": CUBIC}, "content": "x"}},
    ],
)
def test_pages_for_a_letter(part: dict[str, Any], tmp_path: Path) -> None:
    refused(lambda: Tokenizer.load(hostile(tmp_path, **part)))


@pytest.mark.parametrize("depth", [50, 200, 100_000])
def test_sequences_in_sequences(depth: int, tmp_path: Path) -> None:
    spec = (hostile(tmp_path, normalizer="NESTED") / "tokenizer.json").read_text(encoding="utf-8")
    nested = '{"type":"Sequence","normalizers":[' * depth + "]}" * depth
    (tmp_path / "tokenizer.json").write_text(spec.replace('"NESTED"', nested), encoding="utf-8")
    if depth == 50:
        assert Tokenizer.load(tmp_path).encode("ab") == byte_level().encode("ab")
        return
    with pytest.raises(AssetError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == "asset-damaged"


def normalised(folder: Path, *contents: str, **parts: Any) -> Path:
    """A tokenizer's files with tokens that the library normalises while it loads them."""
    tokens = json.loads(byte_level().to_json())["added_tokens"]
    first = max(one["id"] for one in tokens) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False, "normalized": True}
    tokens += [{"id": first + at, "content": content, **flags} for at, content in enumerate(contents)]
    return hostile(folder, added_tokens=tokens, **parts)


SLOW = sequence({"type": "Replace", "pattern": {"Regex": CUBIC}, "content": "x"})
LONG = ["a" * count for count in range(500, 700)]  # each takes a tenth of a second or more


def hidden(folder: Path) -> Path:
    """The same file with its telling keys spelled in escapes, which JSON allows."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"normaliz', '"normali\\u007a'), encoding="utf-8")
    return folder


@pytest.mark.alone
@pytest.mark.parametrize("hide", [False, True])
def test_loading_that_takes_minutes_is_killed(hide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_bounds, "PATIENCE", 1.5)
    folder = normalised(tmp_path, *LONG, **SLOW)
    started = time.monotonic()
    error = refused(lambda: Tokenizer.load(hidden(folder) if hide else folder))
    assert time.monotonic() - started < 20 and "longer than 2 s" in str(error) and str(tmp_path) in str(error)


def test_a_declared_token_that_takes_minutes_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_bounds, "PATIENCE", 1.5)
    folder = hostile(tmp_path, **SLOW)
    tokens = {str(300 + at): {"content": content, "normalized": True} for at, content in enumerate(LONG)}
    said = {"eos_token": "<|im_end|>", "added_tokens_decoder": tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
    refused(lambda: Tokenizer.load(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="no memory limit there")
def test_loading_that_takes_gigabytes_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_bounds, "PATIENCE", 60.0)
    monkeypatch.setattr(tokenizer_bounds, "LOADING_MEMORY", 512 << 20)
    pages = {"type": "Replace", "pattern": {"String": "b"}, "content": "b" * 10_000}
    error = refused(lambda: Tokenizer.load(normalised(tmp_path, "bc", **sequence(*[pages] * 3))))
    assert "512 MiB" in str(error)


def test_what_the_child_could_load_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_bounds, "LOADING_MEMORY", 512 << 20)
    quotes = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    made = Tokenizer.load(normalised(tmp_path, "<``>", **sequence(quotes)))
    assert made.encode("``") == byte_level().encode('"') and len(made.encode("<``>")) == 1


def test_no_child_where_nothing_is_normalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child was started"))
    for number, content in enumerate(("<a>", None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        parts = {} if content else SLOW
        assert Tokenizer.load(normalised(folder, content) if content else hostile(folder, **parts)).encode("b")


def test_every_added_token_says_whether_it_is_normalised() -> None:
    """The library takes no token without it, so that its absence means false."""
    spec = json.loads(byte_level().to_json())
    del spec["added_tokens"][0]["normalized"]
    with pytest.raises(Exception, match="normalized"):
        type(byte_level()._backend).from_str(json.dumps(spec))


@pytest.mark.alone
def test_nothing_of_it_runs_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it puts before a text is asked of its post-processor alone."""
    monkeypatch.setattr(tokenizer_bounds, "PATIENCE", 0.2)
    grown = sequence({"type": "Prepend", "prepend": "a" * 200})
    started = time.monotonic()
    Tokenizer.load(hostile(tmp_path, **grown, **split("|".join([CUBIC] * 300))))
    assert time.monotonic() - started < 5


def test_ordinary_normalizers_pass(tmp_path: Path) -> None:
    doubled = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    quotes = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    Tokenizer.load(hostile(tmp_path, **sequence({"type": "NFKC"}, quotes, quotes, doubled)))
    assert llama_style("normalizer").encode("hel")


@pytest.mark.alone
def test_watching_costs_little() -> None:
    taken = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(200):
            tokenizer_bounds.in_time(lambda: None, 5, "")
        taken.append((time.process_time() - started) / 200)
    assert min(taken) < 0.0005  # seconds of a processor for a call; 60 µs where it was written
