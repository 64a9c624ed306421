"""The project as a whole: light imports, honest docs, layers, and a tree that stands alone."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import luthier

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "pandas")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")],
    key=lambda path: path.as_posix(),
)
CONFIG_BLOCK = re.compile(r"^```ya?ml\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


def tool(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of the environment that runs the tests."""
    path = Path(sys.executable).parent / command[0]
    return subprocess.run([str(path), *command[1:]], capture_output=True, text=True, cwd=ROOT, timeout=120)


def blocks(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for found in pattern.finditer(page.read_text(encoding="utf-8")):
            yield page.relative_to(ROOT).as_posix(), found.group(1)


def takes_under(limit: float, code: str, *arguments: str) -> bool:
    """Whether a fresh process ends within so many seconds, in one of twenty tries: other work makes them longer."""
    for _ in range(20):
        before = time.monotonic()
        assert python(code, *arguments).returncode == 0
        if time.monotonic() - before < limit:
            return True
    return False


@pytest.mark.alone
def test_importing_luthier_takes_under_a_fifth_of_a_second() -> None:
    assert takes_under(0.2, "import luthier")


@pytest.mark.alone
def test_help_takes_under_three_tenths_of_a_second() -> None:
    assert takes_under(0.3, "from luthier.cli import main; main()", "--help")


@pytest.mark.parametrize("module", ["errors", "events", "config", "run", "assets", "data", "plan", "cli"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    done = python(f"import sys, luthier.{module}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other_is_promised() -> None:
    assert sorted(luthier.__all__) == luthier.__all__
    for name in luthier.__all__:
        assert getattr(luthier, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = luthier.nothing


def test_configs_in_the_docs_load_and_excerpts_of_them() -> None:
    import ruamel.yaml

    from luthier.config import load

    loaded = 0
    for page, text in blocks(CONFIG_BLOCK):
        mapping = ruamel.yaml.YAML(typ="safe", pure=True).load(text)
        if "apiVersion" not in mapping:  # Kubernetes's own
            assert load({"base_model": "smollm2", **mapping}).base_model, page
            loaded += 1
    assert loaded >= 10


def test_the_japanese_readme_keeps_up_with_the_english_one() -> None:
    """The same figures, links, and commands and code less their words."""
    english, japanese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))

    def figures(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w.])\d[\d,]*\d(?:\.\d+)?(?!\w)|(?<![\w.])\d\.\d+", text))

    def links(text: str) -> set[str]:
        return set(re.findall(r"\]\(([^)#]+)", text)) - {"README.md", "README.ja.md"}

    def commands(text: str) -> list[str]:
        lines = "".join(SHELL_BLOCK.findall(text) + PYTHON_BLOCK.findall(text)).splitlines()
        return [line.partition("#")[0].rstrip() for line in lines]

    assert len(figures(english)) > 10
    assert figures(english) == figures(japanese)
    assert links(english) == links(japanese)
    assert commands(english) == commands(japanese)


def test_python_in_the_docs_compiles_and_imports_what_exists() -> None:
    seen = 0
    for page, text in blocks(PYTHON_BLOCK):
        compile(text, page, "exec")
        imports = [line for line in text.splitlines() if line.startswith(("from luthier", "import luthier"))]
        done = python("\n".join(imports))
        assert done.returncode == 0, f"{page}: {done.stderr}"
        seen += 1
    assert seen >= 2


def test_commands_in_the_docs_parse() -> None:
    import click
    import typer.main

    from luthier.cli import app

    group = typer.main.get_command(app)
    commands = group.commands  # type: ignore[attr-defined]
    seen = set()
    for page, text in blocks(SHELL_BLOCK):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] not in ("luthier", ".venv/bin/luthier"):
                continue
            name, *rest = words[1:]
            assert name in commands, f"{page}: {line}"
            try:
                commands[name].make_context(name, list(rest))
            except click.ClickException as error:
                pytest.fail(f"{page}: {line}: {error.format_message()}")
            seen.add(name)
    assert {"init", "check", "train", "evaluate", "predict", "chat"} <= seen


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    named = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    named += (ROOT / "docs" / "decisions" / "index.md").read_text(encoding="utf-8")  # the nav leads there
    assert [page for page in sorted(pages) if page.removeprefix("decisions/") not in named] == []
    done = tool("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").exists()


def test_links_between_pages_lead_somewhere() -> None:
    links = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
    found = [(page, link) for page in PAGES for link in links.findall(page.read_text(encoding="utf-8"))]
    local = [(page, link) for page, link in found if not link.startswith(("http:", "https:"))]
    assert local
    assert [(str(page.relative_to(ROOT)), link) for page, link in local if not (page.parent / link).exists()] == []


def test_generated_docs_are_not_stale() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/generate_docs.py", "--check"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "luthier"
    modules = [p.name + "/" for p in package.iterdir() if (p / "__init__.py").exists()]
    modules += [p.name for p in package.glob("*.py") if p.name != "__init__.py"]
    assert [m for m in sorted(modules) if f"`{m}`" not in text] == []


def test_the_tree_names_no_place_of_its_making() -> None:
    # Split, so that this file does not contain what it looks for.
    words = [
        "/work" + "/main",
        "/work" + "/shared",
        "." + "library",
        "py" + "pi.org",
        "python" + "hosted",
        "npm" + "js.",
    ]
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file():
            text = path.read_bytes().decode("utf-8", errors="replace")
            places += [f"{name}: {word}" for word in words if word in text]
    assert places == []


def test_every_result_of_a_benchmark_says_how_it_was_made() -> None:
    folder = ROOT / "benchmarks" / "results"
    rows = re.findall(r"^\| (`[^|]*`) \|", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(told) == sorted(path.name for path in folder.iterdir() if path.name != "README.md")


def test_the_losses_of_merging_on_the_page_are_those_measured() -> None:
    """Each to four decimals, under the name that the result has."""
    found = json.loads((ROOT / "benchmarks" / "results" / "merge_loss.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "howto" / "choose-a-base.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| ([^|]+) \| (\d\.\d{4}) \|$", page, re.MULTILINE)
    assert told == [(name, f"{loss:.4f}") for name, loss in found["loss"].items()]
    assert f"{found['rows']} test rows ({found['supervised_tokens']:,} trained tokens)" in " ".join(page.split())


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (version,) = pin.specifier
            assert version.operator == "==", line
            pinned[canonicalize_name(pin.name)] = version.version
    assert pinned["torch"] == "2.13.0"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        needed = Requirement(text)
        if needed.name != "luthier":
            assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), text


def test_every_dependency_of_every_extra_has_a_lower_and_an_upper_bound() -> None:
    """So has what builds the package. A version that is newer than the next major cannot arrive unasked."""
    from packaging.requirements import Requirement

    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = about["project"]["optional-dependencies"].values()
    texts = [*about["project"]["dependencies"], *about["build-system"]["requires"], *(t for e in extras for t in e)]
    needed = [one for one in map(Requirement, texts) if one.name != "luthier"]
    assert len(needed) > 30
    assert [str(one) for one in needed if {part.operator for part in one.specifier} != {">=", "<"}] == []


def test_every_extra_that_an_error_names_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for path in (ROOT / "src").rglob("*.py"):
        calls = re.findall(r'missing_extra\(\s*"[^"]+",\s*"([a-z]+)"', path.read_text(encoding="utf-8"))
        named |= set(calls)
    assert "excel" in named
    assert named <= set(project["optional-dependencies"])


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_valid_clean_and_compile(path: Path) -> None:
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]
            compile("\n".join(lines), path.name, "exec")


CHECKS = [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("lint-imports",)]


@pytest.mark.parametrize("command", CHECKS, ids=" ".join)
def test_style_and_layers_hold(command: tuple[str, ...]) -> None:
    done = tool(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_a_python_is_claimed_only_where_its_run_is_kept() -> None:
    """3.11 is what CI runs; the run of any other is in tests/results, and passed."""
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    claimed = {one.rpartition(" ")[2] for one in classifiers if re.search(r":: 3\.\d+$", one)}
    for path in (ROOT / "tests" / "results").glob("*.json"):
        kept = json.loads(path.read_text(encoding="utf-8"))
        assert kept["exit_code"] == 0 and set(kept["outcomes"]) <= {"passed", "skipped"}, path.name
        assert re.fullmatch("[0-9a-f]{40}", kept["commit"]), f"{path.name}: of a tree that is no commit"
        if path.name.startswith("python-"):
            version = path.stem.removeprefix("python-")
            assert kept["python"].startswith(version + ".")
            claimed.discard(version)
    assert claimed == {"3.11"}
