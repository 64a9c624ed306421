"""`pip install luthier` where torch and numpy are there already: pip's own resolver, without network.

The image is an environment that holds the metadata of its packages and nothing else. What pip may choose from are
empty wheels with the names, versions and requirements of this test's environment, and newer ones of torch and numpy.
"""

from __future__ import annotations

import json
import os
import re
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

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "tests" / "data" / "images"
CUDA = re.compile("nvidia-|cuda-|triton$")  # torch's own, where it is built for CUDA: beside torch they do not count
NEWER = {"torch": "2.99.0", "numpy": "2.99.0"}  # what a careless resolution would take


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]  # type: ignore[no-any-return]


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that ``names`` lead to, without extras."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        needed = waiting.pop()
        key = canonicalize_name(needed.name)
        if key in found or (needed.marker is not None and not needed.marker.evaluate({"extra": ""})):
            continue
        found[key] = metadata.distribution(key)
        waiting += [Requirement(text) for text in found[key].requires or ()]
    return found


def text_of(name: str, version: str, requires: list[str]) -> str:
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*head, *(f"Requires-Dist: {r}" for r in requires)]) + "\n"


def wheel(folder: Path, name: str, version: str, requires: list[str]) -> None:
    """An empty wheel with these requirements."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as out:
        out.writestr(f"{stem}.dist-info/METADATA", text_of(name, version, requires))
        out.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    needs = list(project()["dependencies"])  # type: ignore[call-overload]
    wheel(folder, "luthier", "0", needs)
    for name, found in closure(needs).items():
        wheel(folder, name, found.version, found.requires or [])
    for name, version in NEWER.items():
        wheel(folder, name, version, [])
    return folder


def read_image(name: str) -> tuple[dict[str, str], set[str]]:
    """The packages of an image, and those that something in it pins."""
    packages, pinned = {}, set()
    for line in (IMAGES / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        package, _, remark = line.partition("#")
        key, version = package.strip().split("==")
        packages[canonicalize_name(key)] = version
        if "pinned" in remark:
            pinned.add(canonicalize_name(key))
    return packages, pinned


def installs(image: dict[str, str], wheels: Path, folder: Path) -> dict[str, str]:
    """What `pip install luthier` would install on the image: name -> version."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in image.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(text_of(name, version, []), encoding="utf-8")
        (info / "RECORD").write_text("", encoding="utf-8")
        (info / "INSTALLER").write_text("pip\n", encoding="utf-8")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--isolated", "install", "--dry-run",
         "--quiet", "--disable-pip-version-check", "--no-index", "--find-links", str(wheels), "--report", str(report),
         "luthier"],
        env=env | {"PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen = [one["metadata"] for one in json.loads(report.read_text("utf-8"))["install"]]
    return {canonicalize_name(one["name"]): one["version"] for one in chosen}


@pytest.mark.parametrize("name", ["colab.txt", "kaggle.txt"])
def test_an_image_keeps_its_torch_and_numpy(name: str, wheels: Path, tmp_path: Path) -> None:
    image, pinned = read_image(name)
    chosen = installs(image, wheels, tmp_path / "image")
    assert chosen["luthier"] == "0"
    assert {"torch", "numpy", "torchvision", "triton"} & set(chosen) == set()
    assert pinned & set(chosen) == set(), "google-colab requires these exactly"
    # The rest of the image goes on working with what is there now: its own requirements of the packages that change.
    assert "rich" not in chosen, "bigframes holds rich below 14"


def test_an_older_torch_would_be_changed(wheels: Path, tmp_path: Path) -> None:
    image, _ = read_image("colab.txt")
    assert installs(image | {"torch": "2.9.0+cu126"}, wheels, tmp_path / "image")["torch"] == NEWER["torch"]


def test_a_core_install_has_at_most_sixty_distributions() -> None:
    found = {name for name in closure(list(project()["dependencies"])) if not CUDA.match(name)}  # type: ignore[call-overload]
    assert len(found) + 1 <= 60, sorted(found)  # and Luthier itself


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_the_torch_that_others_get_fits_the_constraints(tmp_path: Path) -> None:
    """Needs a package index. torch for CUDA requires packages that torch for CPU does not; no pin may exclude them."""
    report = tmp_path / "report.json"
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    subprocess.run([*pip, "--report", str(report), "torch===2.13.0"], check=True, timeout=900)
    (torch,) = (one["metadata"] for one in json.loads(report.read_text("utf-8"))["install"])
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if not line.startswith("#"))}
    needs = [Requirement(text) for text in torch["requires_dist"]]
    needs = [one for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert sys.platform != "linux" or "triton" in {one.name for one in needs}, "this is not torch for CUDA"
    wrong = [str(one) for one in needs if (pin := pins.get(canonicalize_name(one.name))) and pin not in one.specifier]
    assert wrong == []


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_core_install_in_a_fresh_environment(tmp_path: Path) -> None:
    """Needs a package index. At most 60 distributions, and 950 MB beside torch, at the versions of constraints.txt."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints]
    subprocess.run([*pip, "torch==2.13.0"], check=True, timeout=900)
    subprocess.run([*pip, str(ROOT)], check=True, timeout=900)
    code = (
        "import json, importlib.metadata as m\n"
        "sizes = {d.name: sum(f.locate().stat().st_size for f in d.files or () if f.locate().is_file())"
        " for d in m.distributions()}\n"
        "print(json.dumps(sizes))"
    )
    sizes = json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)
    cuda = {name for name in sizes if CUDA.match(canonicalize_name(name))}
    beside = {name: size for name, size in sizes.items() if name not in {"torch", "pip", "setuptools", *cuda}}
    assert "bitsandbytes" in beside and len(beside) + 1 <= 60, sorted(beside)  # and torch
    print(f"{len(beside) + 1} distributions, {sum(beside.values()) / 1e6:.0f} MB beside torch")
    assert sum(beside.values()) < 950e6, sorted(beside.items(), key=lambda item: -item[1])[:10]
    subprocess.run([str(python.parent / "luthier"), "doctor", "--json"], check=True, capture_output=True, timeout=60)
