"""Steps that are replayed as CUDA graphs make the tokens of steps that are not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import Letters, Repeated, adapted, ids
from test_several_adapters import SECTIONS, single
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.events import Warned
from luthier.infer.engine import DecoderEngine
from luthier.infer.forward import Forward
from luthier.infer.stepping import Stepper
from luthier.model.decoder.adapter import read_adapter
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.save import save_adapter
from luthier.model.decoder.shape import read_shape
from luthier.types import Request, Sampling

BATCHES = (1, 5, 32)
LONGEST = 60  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of three layers, with heads as wide as real ones."""
    path = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def opened(folder: Path, device: str, dtype: torch.dtype) -> Decoder:
    return load_decoder(folder, read_shape(folder), Placing(dtype=dtype, device=device))


def engines(folder: Path, device: str, dtype: torch.dtype, place: Path) -> dict[str, tuple[Decoder, dict[str, Any]]]:
    """Who answers: the base, the base with an adapter of its own, the base for rows of three adapters and of none."""
    base = opened(folder, device, dtype)
    several = {}
    for name, section in SECTIONS.items():
        save_adapter(single(folder, name, section), section, place / name, "base")
        several[name] = read_adapter(base, section, place / name, name)
    return {"base": (base, {}), "own": (adapted(opened(folder, device, dtype)), {}), "several": (base, several)}


def requests(adapters: dict[str, Any]) -> list[Request]:
    """40 rows of ragged prompts, whose answers end after 1 to `LONGEST` tokens; some must not end before half of them.

    Without adapters the prompts have a beginning in common, which is read once.
    """
    draw = random.Random(3)
    begin = [] if adapters else [draw.randrange(3, 320) for _ in range(20)]
    names = [None, *adapters]
    made = []
    for key in range(40):
        most = draw.choice([1, 2, 3, 5, 8, 13, 21, 34, LONGEST])
        sampling = Sampling(max_new_tokens=most, min_new_tokens=most // 2 if key % 3 else 0)
        prompt = [*begin, *(draw.randrange(3, 320) for _ in range(draw.randint(1, 30)))]
        made.append(Request(key, prompt, sampling, adapter=names[key % len(names)]))
    return made


def answers(decoder: Decoder, adapters: dict[str, Any], rows: int) -> dict[int, tuple[int, ...]]:
    told: list[Any] = []
    engine = DecoderEngine(decoder, Letters(), batch_size=rows, adapters=adapters, sink=told.append)
    found = ids({done.key: done for done in engine.generate(requests(adapters))})
    assert sorted(found) == list(range(40)) and len({len(one) for one in found.values()}) > 5
    assert [one for one in told if isinstance(one, Warned)] == []  # as when a graph cannot be captured
    return found


def replayed(monkeypatch: pytest.MonkeyPatch, *, real: bool) -> list[int]:
    """Have steps replayed, from graphs or from what stands in for them; the sizes that are captured from now on."""
    sizes: list[int] = []
    capture = Stepper._capture

    def watched(self: Stepper, rows: int) -> bool:
        sizes.append(rows)
        if real:
            return capture(self, rows)
        graph: Any = Repeated(self, rows)
        self._captured[rows] = (graph, graph.left)
        return True

    monkeypatch.setattr(Stepper, "_capture", watched)
    if not real:
        monkeypatch.setattr(Forward, "graphable", True)
    return sizes


@pytest.mark.parametrize("who", ["base", "own", "several"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_fp32_replayed_steps_make_the_tokens_of_plain_ones(
    device: str, who: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain steps are as long as their rows; replayed ones have rows to spare and read the whole cache."""
    decoder, adapters = engines(folder, device, torch.float32, tmp_path)[who]
    with monkeypatch.context() as plain:
        plain.setattr(Forward, "graphable", False)
        want = {rows: answers(decoder, adapters, rows) for rows in BATCHES}
    assert want[1] == want[5] == want[32]
    for rows in BATCHES:
        with monkeypatch.context() as here:
            sizes = replayed(here, real=device == "cuda")
            assert answers(decoder, adapters, rows) == want[rows], rows
        assert rows in sizes and (rows == 1 or len(sizes) > 2)


@pytest.mark.gpu
@pytest.mark.parametrize("who", ["base", "own", "several"])
def test_in_bf16_a_graph_makes_the_tokens_of_the_steps_it_was_captured_from(
    who: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 a step of other rows rounds otherwise, so both have the same shapes here."""
    decoder, adapters = engines(folder, "cuda", torch.bfloat16, tmp_path)[who]
    for rows in BATCHES:
        found = []
        for real in (False, True):
            with monkeypatch.context() as here:
                sizes = replayed(here, real=real)
                found.append(answers(decoder, adapters, rows))
            assert rows in sizes
        assert found[0] == found[1], rows
