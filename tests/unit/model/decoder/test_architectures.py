"""The shared decoder against transformers' own models in fp64, every architecture: values and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CASES, make

from luthier.config.adapter import Lora
from luthier.config.model_parameters import RopeScaling
from luthier.data.collate import collate
from luthier.model.decoder import shape
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.save import save_weights
from luthier.model.decoder.shape import Unsupported, read_shape, shape_of
from luthier.types import Example


def examples() -> list[Example]:
    out = []
    for row, length in enumerate((9, 4, 13, 1, 6)):
        ids = [(7 * row + 3 * i) % 90 + 3 for i in range(length)]
        weights = [0.0 if i < length // 2 else 1.0 + 0.5 * (i % 2) for i in range(length)]
        out.append(Example(ids, weights, row))
    return out


def reference(model: Any, rows: list[Example]) -> torch.Tensor:
    """Sample by sample, without packing."""
    parts = []
    for row in rows:
        logprobs = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        parts += [logprobs[i - 1, row.ids[i]] for i in range(1, row.length) if row.weights[i]]
    return torch.stack(parts)


def close(got: torch.Tensor | None, want: torch.Tensor | None, name: str) -> None:
    """Equal but for transformers' own rounding: norms, rotation and softmax are fp32 there whatever the type."""
    assert got is not None and want is not None
    error = float((got - want).norm() / want.norm())
    assert error < 2e-6, f"{name}: relative error {error:.1e}"


def load(folder: Path, **how: Any) -> Decoder:
    return load_decoder(folder, read_shape(folder), Placing(**{"dtype": torch.float64} | how))


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_weight_gradients(tmp_path: Path, case: str) -> None:
    theirs = make(tmp_path, case)
    ours = load(tmp_path, trained=True)
    got, want = ours.logprobs(collate(examples())), reference(theirs, examples())
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)  # transformers rounds a few steps to fp32 itself
    weight = torch.linspace(0.5, 1.5, len(want), dtype=torch.float64)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    state = dict(theirs.named_parameters())
    prefix = "model.layers.0."
    pairs = {
        "embedding": "model.embed_tokens.weight",
        "norm_weight": "model.norm.weight",
        "layers.0.o_weight": prefix + "self_attn.o_proj.weight",
        "layers.0.down_weight": prefix + "mlp.down_proj.weight",
        "layers.0.qkv_norm": prefix + "input_layernorm.weight",
        "layers.2.down_weight": "model.layers.2.mlp.down_proj.weight",
    }
    for own, other in pairs.items():
        close(mine[own], state[other].grad, own)
    parts = ["qkv_proj"] if CASES[case][0] == "Phi3" else ["q_proj", "k_proj", "v_proj"]
    qkv = torch.cat([state[f"{prefix}self_attn.{part}.weight"].grad for part in parts])
    close(mine["layers.0.qkv_weight"], qkv, "qkv")


@pytest.mark.parametrize("case", CASES)
def test_adapter_gradients_equal_pefts(tmp_path: Path, case: str) -> None:
    import peft

    theirs = make(tmp_path, case)
    section = Lora(r=3, alpha=5, use_rslora=True)
    ours = load(tmp_path)
    ours.adapt(section, seed=3)
    their = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    ).double()
    state = dict(their.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for pair in ours.pairs:
        pair.lora_B.data.normal_(std=0.2, generator=generator)
        for factor in ("lora_A", "lora_B"):
            state[f"base_model.model.{pair.name}.{factor}.default.weight"].data.copy_(getattr(pair, factor))
    got, want = ours.logprobs(collate(examples())), reference(their, examples())
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    got.sum().backward()
    want.sum().backward()
    assert len(ours.pairs) * 2 == sum(p.requires_grad for p in their.parameters())
    for pair in ours.pairs:
        for factor in ("lora_A", "lora_B"):
            other = state[f"base_model.model.{pair.name}.{factor}.default.weight"].grad
            close(getattr(pair, factor).grad, other, pair.name)
    with ours.without_adapter(), their.disable_adapter():
        torch.testing.assert_close(
            ours.logprobs(collate(examples())), reference(their, examples()), atol=1e-6, rtol=1e-6
        )


def test_what_the_decoder_cannot_run_is_said() -> None:
    with pytest.raises(Unsupported, match="GPT2LMHeadModel"):
        shape_of(transformers.GPT2Config(architectures=["GPT2LMHeadModel"]))
    with pytest.raises(Unsupported, match="dynamic"):
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        shape_of(transformers.LlamaConfig(architectures=["LlamaForCausalLM"], rope_parameters=rope))


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_a_complete_config_is_read_as_the_library_reads_it(tmp_path: Path, case: str) -> None:
    make(tmp_path, case)
    values = json.loads((tmp_path / "config.json").read_text())
    plain = shape._complete(values)
    assert plain is not None
    assert shape_of(plain) == shape_of(transformers.AutoConfig.from_pretrained(tmp_path))
    old = {key: value for key, value in values.items() if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    library = transformers.AutoConfig.from_pretrained(tmp_path)
    assert read_shape(tmp_path) == shape_of(library)
    stretch = RopeScaling(rope_type="linear", factor=4.0)
    if not isinstance(next(iter((library.rope_parameters or {}).values()), None), dict):
        assert read_shape(tmp_path, stretch) == shape_of(library, stretch) != read_shape(tmp_path)
    assert shape._complete({key: value for key, value in values.items() if key != "rms_norm_eps"}) is None


@pytest.mark.parametrize("case", CASES)
def test_all_weights_are_written_and_read_again(case: str, tmp_path: Path) -> None:
    """In the type that they are trained in, in which nothing copies them on the way."""
    make(tmp_path / "base", case)
    decoder = load(tmp_path / "base", trained=True, dtype=torch.float32)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight.add_(0.5)
    save_weights(decoder, tmp_path / "base", tmp_path / "saved", torch.float32)
    again = load(tmp_path / "saved", trained=True, dtype=torch.float32)
    read = dict(again.named_parameters())
    assert all(torch.equal(weight, read[name]) for name, weight in decoder.named_parameters()) and read


@pytest.mark.parametrize("case", ["llama", "mistral-window", "qwen2", "qwen3"])
def test_a_key_that_a_config_leaves_out_is_what_transformers_takes_it_for(case: str, tmp_path: Path) -> None:
    make(tmp_path, case)
    file = tmp_path / "config.json"
    whole = json.loads(file.read_text())
    fixed = {"architectures", "model_type", "dtype", "transformers_version", "num_hidden_layers"}
    for name in whole.keys() - fixed:
        file.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert read_shape(tmp_path) == shape_of(config), name
