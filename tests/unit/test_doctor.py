"""What the doctor says of machines that this one is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier import doctor
from luthier.train.precision import resolve_precision
from luthier.types import Gpu, Machine

GIB = 2**30


def machine(*gpus: Gpu, bf16: bool = False) -> Machine:
    return Machine(8, 32 * GIB, 30 * GIB, gpus, cpu_bf16=bf16)


def card(name: str, major: int, minor: int, size: int = 16) -> Gpu:
    return Gpu(name, size * GIB, (size - 1) * GIB, (major, minor))


MACHINES = {
    "Linux, CPU with bf16": (machine(bf16=True), "Linux 6.1 x86_64"),
    "Linux, CPU without bf16": (machine(), "Linux 6.1 x86_64"),
    "NVIDIA Ampere and newer": (machine(card("H100", 9, 0, 80)), "Linux 6.1 x86_64"),
    "NVIDIA Turing and Volta": (machine(card("T4", 7, 5)), "Linux 6.1 x86_64"),
    "NVIDIA Pascal": (machine(card("P100", 6, 0)), "Linux 6.1 x86_64"),
    "two GPUs": (machine(card("T4", 7, 5), card("T4", 7, 5)), "Linux 6.1 x86_64"),
    "Windows through WSL": (machine(), "Linux 5.15.90.1-microsoft-standard-WSL2 x86_64"),
    "Windows": (machine(), "Windows 11 AMD64"),
    "macOS (MPS)": (machine(Gpu("Apple GPU", 16 * GIB, 12 * GIB, None, "mps")), "Darwin 24.0 arm64"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_finds_its_row_and_trains_as_the_row_says(name: str) -> None:
    given, system = MACHINES[name]
    rows = {row[0]: row for row in doctor.SUPPORT}
    here = doctor.platforms(given, system)
    assert any(one.startswith(name) for one in here), here
    said = rows[here[0]][1]
    if not said.startswith(("as ", "on ")):
        assert said.startswith(resolve_precision("auto", given))


def test_every_row_has_a_machine() -> None:
    assert len(doctor.SUPPORT) == len(MACHINES)
    for row in doctor.SUPPORT:
        assert any(row[0].startswith(name) for name in MACHINES)


def test_the_page_says_the_same() -> None:
    page = (Path(__file__).parents[2] / "docs" / "machines.md").read_text(encoding="utf-8")
    rows = page.split("|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert rows == [f"| {' | '.join(row)} |" for row in doctor.SUPPORT]


def test_old_cards_and_second_cards_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", lambda: machine(card("P100", 6, 0), card("P100", 6, 0)))
    advice = " ".join(doctor.examine().advice)
    assert "CUDA 12.6" in advice and "CUDA_VISIBLE_DEVICES" in advice


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:8080")
    report = doctor.examine()
    assert "secret" not in str(report.to_json()) and "secret" not in str(report.machine_rows())
    assert report.variables["HTTPS_PROXY"] == "http://***@proxy:8080" and report.variables["HF_TOKEN"] == "set"
