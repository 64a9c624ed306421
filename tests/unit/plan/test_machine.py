"""The machine as it is read, and the table of GPUs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from luthier.errors import ConfigError
from luthier.plan import probe
from luthier.plan.cards import CARDS, UNKNOWN, card_named, card_of, imagined
from luthier.plan.machine import _cgroup_memory, for_process, parse_gpus
from luthier.types import Gpu

MIB = 2**20


def test_gpus_are_read_from_nvidia_smi() -> None:
    gpus = parse_gpus("NVIDIA H100, 81559, 81008, 9.0\nTesla T4, 15360, 15000, 7.5\nbroken\nX, [N/A], 1, 2\n")
    assert [g.name for g in gpus] == ["NVIDIA H100", "Tesla T4"]
    assert gpus[1].memory == 15360 * MIB and gpus[0].capability == (9, 0)


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    assert _cgroup_memory(tmp_path) == (0, 0)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert _cgroup_memory(tmp_path) == (1000, 400)
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_memory(tmp_path) == (0, 0)


def test_this_machine() -> None:
    machine = probe()
    assert machine.cores >= 1 and 0 < machine.free_memory <= machine.memory


def test_a_card_is_found_by_any_of_its_names() -> None:
    assert card_named("t4").name == "T4" and card_named("4090").name == "RTX 4090"
    assert card_named("a100-80") == card_named("A100") != card_named("A100-40")
    for driver, total, name in (
        ("Tesla T4", 15360, "T4"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX 4090"),
        ("NVIDIA A10G", 23028, "A10G"),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100-40"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100"),
        ("Tesla V100-PCIE-32GB", 32768, "V100-32"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIe"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA Unheard-of", 20000, "unknown GPU"),
    ):
        assert card_of(Gpu(driver, total * MIB, total * MIB)).name == name, driver
        assert name == "unknown GPU" or card_named(driver).name == name, driver
    assert card_of(Gpu("x", MIB, MIB)) is UNKNOWN
    for typed, name in (
        ("A100-80GB", "A100"), ("a100 40gib", "A100-40"), ("V100", "V100"), ("V100 32GB", "V100-32"),
        ("A100-PCIe", "A100"), ("T4 16GB", "T4"), ("H100-SXM5-80GB", "H100"), ("RTX 2080 Ti", "RTX 2080 Ti"),
    ):  # fmt: skip
        assert card_named(typed).name == name, typed


def test_an_unknown_card_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        card_named("T44")
    fault = caught.value.faults[0]
    assert set(fault.allowed) == {card.name for card in CARDS} and fault.fix == "did you mean 'T4'?"
    for other in ("GH200", "A100-24GB", ""):  # a card of its own, one that is not made, none
        with pytest.raises(ConfigError) as caught:
            card_named(other)
        assert "H200" not in str(caught.value.faults[0].fix) and caught.value.faults[0].received


def test_every_card_is_whole() -> None:
    names = [name.lower() for card in CARDS for name in (card.name, *card.aliases)]
    assert len(names) == len(set(names))
    for card in CARDS:
        assert 0 < card.gemm <= 1 and card.half16 >= card.single * 0.9 and card.bandwidth > 0 and card.source
        machine = imagined(card)
        assert card_of(machine.gpus[0]) == card and machine.gpus[0].free < card.memory


def test_a_process_that_capped_itself_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch tells it: 2 GiB in use, 3 GiB kept for reuse, and no more than 15 GiB of 80 in all."""
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        device_count=lambda: 1,
        memory_allocated=lambda index: 2048 * MIB,
        memory_reserved=lambda index: 5120 * MIB,
        get_per_process_memory_fraction=lambda index: 15 / 80,
    )
    gpu = Gpu("H100", 80 * 1024 * MIB, 70 * 1024 * MIB, (9, 0))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert for_process(0, gpu).free == 13 * 1024 * MIB
    assert for_process(1, gpu) == gpu  # torch does not know that one
    cuda.get_per_process_memory_fraction = lambda index: 1.0
    assert for_process(0, gpu).free == 73 * 1024 * MIB
    cuda.is_initialized = lambda: False
    assert for_process(0, gpu) == gpu
