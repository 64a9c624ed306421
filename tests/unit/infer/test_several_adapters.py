"""Rows of several adapters share a batch, and each is answered as if it were alone with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import PROMPTS, Letters, both

from luthier.config.adapter import Lora
from luthier.errors import AssetError
from luthier.infer.engine import DecoderEngine
from luthier.infer.forward import Forward
from luthier.model.decoder.adapter import Adapter, read_adapter
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.save import save_adapter
from luthier.model.decoder.shape import read_shape
from luthier.types import Request, Sampling

SECTIONS = {
    "a": Lora(r=3, alpha=5),
    "b": Lora(r=2, alpha=9, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj")),
    "c": Lora(r=4, alpha=2, target_modules=("o_proj", "gate_proj"), layers_to_transform=(1,)),
}
SAMPLINGS = [
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=12, do_sample=True, temperature=1.3, seed=4),
    Sampling(max_new_tokens=12, num_beams=2),
]


def single(folder: Path, name: str, section: Lora) -> Decoder:
    """The base with one adapter of its own, as training has it."""
    made = load_decoder(folder, read_shape(folder), Placing(dtype=torch.float32))
    made.adapt(section, seed=3)
    generator = torch.Generator().manual_seed(ord(name))
    for pair in made.pairs:
        pair.lora_B.data.normal_(std=0.4, generator=generator)
    return made


@pytest.fixture(params=["llama", "gemma2", "phi3"])
def world(request: Any, tmp_path: Path) -> tuple[Decoder, dict[str, Decoder], dict[str, Adapter]]:
    """The base, the same with each adapter alone, and the adapters as their files say."""
    _, base = both(tmp_path, request.param)
    names = dict(SECTIONS)
    if request.param == "phi3":  # whose projections are fused in its files
        names["b"] = Lora(r=2, alpha=9, target_modules=("qkv_proj", "down_proj"))
        names["c"] = Lora(r=4, alpha=2, target_modules=("o_proj", "gate_up_proj"), layers_to_transform=(1,))
    alone = {name: single(tmp_path, name, section) for name, section in names.items()}
    found = {}
    for name, section in names.items():
        save_adapter(alone[name], section, tmp_path / name, "base")
        found[name] = read_adapter(base, section, tmp_path / name, name)
    return base, alone, found


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn", "beams"])
def test_each_row_is_answered_as_if_alone(world: Any, sampling: Sampling) -> None:
    base, alone, adapters = world
    names = [None, *adapters]
    requests = [
        Request(at * 10 + n, prompt, sampling, adapter=name)
        for n, name in enumerate(names)
        for at, prompt in enumerate(PROMPTS)
    ]
    for batch in (None, 3):  # all rows at once, or rows coming and going
        engine = DecoderEngine(base, Letters(), adapters=adapters, batch_size=batch)
        got = {done.key: done.ids for done in engine.generate(requests)}
        answers = set()
        for n, name in enumerate(names):
            own = [Request(at * 10 + n, prompt, sampling) for at, prompt in enumerate(PROMPTS)]
            want = DecoderEngine(base if name is None else alone[name], Letters()).generate(own)
            expected = {done.key: done.ids for done in want}
            assert {key: got[key] for key in expected} == expected, name
            answers.add(tuple(sorted((key // 10, ids) for key, ids in expected.items())))
        assert len(answers) == len(names)  # else equality would prove nothing


def test_a_shared_beginning_is_read_once_for_each_adapter(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, alone, adapters = world
    prompts = [[*range(5, 30), 40 + at] for at in range(4)]
    sampling = Sampling(max_new_tokens=6)
    engine = DecoderEngine(base, Letters(), adapters=adapters)
    read: list[int] = []
    read_prefix = Forward.read_prefix
    monkeypatch.setattr(
        Forward, "read_prefix", lambda self, ids, *which: read.append(len(ids)) or read_prefix(self, ids, *which)
    )
    for names, together in ((["a"] * 4, [25]), (["a", "b", "a", "b"], [25, 25]), (["a", "b", "a", "c"], [25])):
        requests = [Request(at, prompt, sampling, adapter=names[at]) for at, prompt in enumerate(prompts)]
        read.clear()
        answered = sorted(engine.generate(requests), key=lambda done: done.key)
        assert read == together and [done.key for done in answered] == [0, 1, 2, 3]
        for done in answered:
            own = Request(done.key, prompts[done.key], sampling)
            (want,) = DecoderEngine(alone[names[done.key]], Letters()).generate([own])
            assert done.ids == want.ids


def test_streams_know_their_adapter_and_an_unknown_one_is_told(world: Any) -> None:
    base, alone, adapters = world
    engine = DecoderEngine(base, Letters(), adapters=adapters)
    asked = Request(0, PROMPTS[0], Sampling(max_new_tokens=8), adapter="b")
    assert "".join(engine.stream(asked)) == "".join(
        DecoderEngine(alone["b"], Letters()).stream(Request(0, PROMPTS[0], Sampling(max_new_tokens=8)))
    )
    (done,) = engine.generate([Request(0, [3], Sampling(), adapter="z")])
    assert done.finish_reason == "error" and "'z'" in (done.error or "") and "a, b, c" in (done.error or "")


def test_files_of_another_shape_are_refused(tmp_path: Path) -> None:
    _, base = both(tmp_path)
    save_adapter(single(tmp_path, "a", SECTIONS["a"]), SECTIONS["a"], tmp_path / "a", "base")
    for section in (Lora(r=5), SECTIONS["b"]):
        with pytest.raises(AssetError) as caught:
            read_adapter(base, section, tmp_path / "a", "a")
        assert caught.value.code == "asset-damaged"
