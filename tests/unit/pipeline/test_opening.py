"""Where the weights of a model that is only asked lie."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from luthier import assets, config
from luthier.events import Event, Note, silent
from luthier.model.decoder import load
from luthier.pipeline import opening
from luthier.types import Machine, Plan

ROOMY = Machine(2, 2**34, 2**34)


@pytest.mark.parametrize(
    ("free", "pins", "kind"),
    [(2**34, {}, "Resident"), (2**16, {}, "Quantised"), (2**34, {"weights": "quantised"}, "Quantised")],
)
def test_a_base_in_4_bits_stays_so_where_memory_is_short(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, pins: dict[str, str], kind: str
) -> None:
    monkeypatch.setattr(opening.machines, "probe", lambda wanted: Machine(2, 2**34, free))
    settings = config.load({"base_model": str(tiny_llama), "quantization": {"bits": 4}, "execution": pins})
    base = assets.resolve(str(tiny_llama), cache=tmp_path)
    opened: Any = opening.open_base(settings, base, "fp32", "cpu", silent)
    matrices = [product.matrix for layer in opened.module.layers for product in layer.products.values()]
    assert {type(matrix).__name__ for matrix in matrices} == {kind}


@pytest.mark.parametrize(
    ("environment", "of_run", "kept"),
    [
        ({}, False, True),
        ({"LUTHIER_KEEP_QUANTISED": "0"}, False, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, False, True),
        ({}, True, False),
    ],
)
def test_the_first_rank_keeps_a_base_in_4_bits(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    of_run: bool,
    kept: bool,
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(opening.machines, "probe", lambda wanted: ROOMY)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = config.load({"base_model": str(tiny_llama), "quantization": {"bits": 4}})
    base = assets.resolve(str(tiny_llama), cache=tmp_path)
    told: list[Event] = []
    opening.open_base(settings, replace(base, content_hash="") if of_run else base, "fp32", "cpu", told.append)
    assert len(list((tmp_path / "cache").glob("quantised/*/files.json"))) == kept
    assert sum(isinstance(event, Note) and "is kept in" in event.text for event in told) == kept


def test_a_part_of_a_base_is_read_and_not_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(opening.machines, "probe", lambda wanted: ROOMY)
    settings = config.load({"base_model": str(tiny_llama), "quantization": {"bits": 4}, "adapter": {"type": "lora"}})
    base = assets.resolve(str(tiny_llama), cache=tmp_path)
    plan = Plan("cpu", 64, "decoder", "padded")
    part: Any = partial(opening.open_for_tuning, settings, base, "fp32", plan, silent, steps=1, layers=1)
    part()
    assert not list((tmp_path / "cache").glob("quantised/*"))
    opening.open_for_tuning(settings, base, "fp32", plan, silent, steps=1)
    monkeypatch.setattr(load, "quantise", lambda *_, **__: pytest.fail("quantised anew"))
    assert len(part().module.layers) == 1


def test_a_run_is_opened_by_the_path_that_its_config_names(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening.machines, "probe", lambda wanted: ROOMY)
    base = assets.resolve(str(tiny_llama), cache=tmp_path)
    for model, name in (("auto", "Decoded"), ("generic", "Generic")):
        settings = config.load({"base_model": str(tiny_llama), "execution": {"model": model}})
        assert type(opening.open_base(settings, base, "fp32", "cpu", silent)).__name__ == name


def test_a_cpus_libraries_keep_few_shapes_unless_told_otherwise(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, ours = opening.CACHES
    monkeypatch.setenv(told, "7")
    monkeypatch.setenv(ours, "to be taken back")
    monkeypatch.delenv(ours)
    base = assets.resolve(str(tiny_llama), cache=tmp_path)
    opening.open_base(config.load({"base_model": str(tiny_llama)}), base, "fp32", "cpu", silent)
    assert (os.environ[told], os.environ[ours]) == ("7", str(opening.KEPT))
