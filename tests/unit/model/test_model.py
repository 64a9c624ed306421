"""The model path against plain transformers and PEFT: losses, gradients, adapters kept and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import CASES, make
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.assets import resolve
from luthier.config import adapter as sections
from luthier.config.model_parameters import ModelParameters
from luthier.config.quantization import Quantization
from luthier.data.collate import collate
from luthier.errors import AssetError
from luthier.model import adapters
from luthier.model.adalora import AdaLora
from luthier.model.generic import GenericModel
from luthier.model.load import load_base
from luthier.types import Base, Batch, Example

ROWS = ((5, 6, 7, 8, 9, 10, 11), (20, 21, 22), (40, 41, 42, 43, 44))
TRAINED = ((3, 4, 6), (1, 2), (4,))


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Base:
    return resolve(str(tiny_llama), cache=tmp_path)


def batch() -> Batch:
    weight = [float(i in on) for row, on in zip(ROWS, TRAINED, strict=True) for i in range(len(row))]
    return Batch(
        ids=torch.tensor([i for row in ROWS for i in row]),
        positions=torch.tensor([i for row in ROWS for i in range(len(row))]),
        segment=torch.tensor([n for n, row in enumerate(ROWS) for _ in row]),
        target_weight=torch.tensor(weight),
        lengths=tuple(len(row) for row in ROWS),
    )


def reference(model: torch.nn.Module) -> torch.Tensor:
    """Row by row, without padding, with the whole head."""
    out = []
    for row, on in zip(ROWS, TRAINED, strict=True):
        logprobs = model(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1)
        out += [logprobs[i - 1, row[i]] for i in on]
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["lora", "full", "4bit", "checkpointed"])
def test_losses_and_gradients_equal_plain_transformers(base: Base, kind: str) -> None:
    def make() -> torch.nn.Module:
        quantization = Quantization(bits=4, bnb_4bit_compute_dtype="float32") if kind == "4bit" else None
        model = load_base(base, quantization=quantization)
        if kind == "full":
            return model.requires_grad_(True)
        tuned = adapters.add_adapter(model, sections.Lora(r=4), seed=1)
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        return tuned

    ours, plain = make(), make()
    if kind == "checkpointed":
        ours.train()
    got = GenericModel(ours, checkpointing=kind == "checkpointed").logprobs(batch())
    want = reference(plain)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    want.sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None for g in gradients.values())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_models_without_logits_to_keep_give_the_same(base: Base) -> None:
    model = load_base(base)
    generic = GenericModel(model)
    want = generic.logprobs(batch())
    generic._selects = False
    torch.testing.assert_close(generic.logprobs(batch()), want, atol=1e-6, rtol=1e-6)


KINDS = {
    "lora": sections.Lora(r=4),
    "dora": sections.Lora(r=4, use_dora=True),
    "rslora": sections.Lora(r=4, use_rslora=True),
    "pissa": sections.Lora(r=4, init_lora_weights="pissa"),
    "olora": sections.Lora(r=4, init_lora_weights="olora"),
    "mica": sections.Lora(r=4, init_lora_weights="mica"),
    "gaussian": sections.Lora(r=4, init_lora_weights="gaussian"),
    "orthogonal": sections.Lora(r=4, init_lora_weights="orthogonal"),
    "adalora": sections.AdaLora(),
    "ia3": sections.Ia3(),
    "vera": sections.Vera(r=16),
    "loha": sections.Loha(),
    "lokr": sections.Lokr(),
    "oft": sections.Oft(),
    "boft": sections.Boft(),
    "ln_tuning": sections.LnTuning(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_trains_comes_back_and_merges(base: Base, tmp_path: Path, kind: str) -> None:
    def make() -> torch.nn.Module:
        return adapters.add_adapter(load_base(base), KINDS[kind], seed=3, total_steps=10)

    model, again = make(), make()
    torch.testing.assert_close(dict(model.named_parameters()), dict(again.named_parameters()), rtol=0, atol=0)
    generic = GenericModel(model)
    before = generic.logprobs(batch())
    before.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad():
        for p in trained:
            p.add_(0.02 if p.grad is None else 0.02 * p.grad.sign())
    after = generic.logprobs(batch()).detach()
    assert (after - before).abs().max() > 1e-5
    adapters.save_adapter(model, tmp_path / "a", base)
    loaded = adapters.load_adapter(load_base(base), tmp_path / "a", expect_base_hash=base.content_hash)
    torch.testing.assert_close(GenericModel(loaded).logprobs(batch()), after, atol=1e-5, rtol=1e-5)
    merged = GenericModel(adapters.merge(loaded)).logprobs(batch())
    torch.testing.assert_close(merged, after, atol=1e-4, rtol=1e-4)


def test_adapter_files_are_reproducible_and_name_the_base(base: Base, tmp_path: Path) -> None:
    model = adapters.add_adapter(load_base(base), sections.Lora(r=2), seed=1)
    adapters.save_adapter(model, tmp_path, base)
    known = json.loads((tmp_path / "adapter_config.json").read_text())
    assert known["target_modules"] == sorted(known["target_modules"])
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in known["target_modules"]} == linear  # all but the head
    assert json.loads((tmp_path / "luthier.json").read_text())["base_hash"] == base.content_hash


def test_another_base_and_missing_weights_are_refused(base: Base, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapters.save_adapter(adapters.add_adapter(load_base(base), sections.Lora(r=2), seed=1), tmp_path, base)
    with pytest.raises(AssetError) as wrong:
        adapters.load_adapter(load_base(base), tmp_path, expect_base_hash="0" * 64)
    assert wrong.value.code == "asset-wrong-base"
    for damaged in ("[" * 100_000, "[]", "{}"):
        (tmp_path / "luthier.json").write_text(damaged)
        with pytest.raises(AssetError) as wrong:
            adapters.load_adapter(load_base(base), tmp_path, expect_base_hash=base.content_hash)
        assert wrong.value.code == "asset-damaged"
    (tmp_path / "luthier.json").unlink()
    weights = load_file(tmp_path / adapters.WEIGHTS)
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / adapters.WEIGHTS)
    with pytest.raises(AssetError) as damaged:
        adapters.load_adapter(load_base(base), tmp_path)
    assert damaged.value.code == "asset-damaged" and "missing" in str(damaged.value)
    with pytest.raises(AssetError) as absent:
        adapters.load_adapter(load_base(base), tmp_path / "nowhere")
    assert absent.value.code == "asset-not-found"


def test_going_on_from_an_adapter(base: Base, tmp_path: Path) -> None:
    first = adapters.add_adapter(load_base(base), sections.Lora(r=2), seed=1)
    adapters.save_adapter(first, tmp_path, base)
    section = sections.Lora(r=2, pretrained_adapter_weights=str(tmp_path))
    second = adapters.add_adapter(load_base(base), section, seed=9)
    torch.testing.assert_close(dict(second.named_parameters()), dict(first.named_parameters()), rtol=0, atol=0)
    assert any(p.requires_grad for p in second.parameters())


def test_unfitting_targets_are_explained(base: Base) -> None:
    with pytest.raises(AssetError) as error:
        adapters.add_adapter(load_base(base), sections.Lora(target_modules=("nothing",)), seed=1)
    assert error.value.code == "asset-unsupported"


def test_eight_bits_stay_near(base: Base) -> None:
    want = GenericModel(load_base(base)).logprobs(batch())
    with torch.no_grad():
        got = GenericModel(load_base(base, quantization=Quantization(bits=8))).logprobs(batch())
    assert (got - want).abs().max() < 0.1


def test_four_bits_have_gradients_after_an_evaluation(base: Base, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "wide"))
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16  # blocks of 64 weights fit
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    wide = load_base(resolve(str(folder), cache=tmp_path), quantization=Quantization(bits=4))
    model = adapters.add_adapter(wide, sections.Lora(r=2, init_lora_weights="gaussian"), seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.05)
    generic = GenericModel(model)

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        generic.logprobs(batch()).sum().backward()
        found = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    before = gradients()
    model.eval()
    with torch.no_grad():
        generic.score(batch())
    torch.testing.assert_close(gradients(), before)


def test_neftune_is_keyed_by_step_and_sample_and_only_while_training(base: Base) -> None:
    model = load_base(base)
    long, short = Example((5, 6, 7, 8, 9, 10), [1.0] * 6, row=3), Example((5, 6, 7), [1.0] * 3, row=4)
    noisy = GenericModel(model, neftune_alpha=50.0, seed=1)

    def at(step: int, *examples: Example) -> torch.Tensor:
        return noisy.logprobs(collate(examples, step)).detach()

    silent = at(1, long)
    model.train()
    both = at(1, long, short)
    assert not torch.allclose(both[:5], silent)
    torch.testing.assert_close(at(1, short, long)[:2], both[5:])  # whatever is beside it
    torch.testing.assert_close(at(1, long), both[:5])
    assert not torch.allclose(at(2, long), both[:5])  # another step, another noise
    noisy.noise.handle.remove()
    other = GenericModel(model, neftune_alpha=50.0, seed=2).logprobs(collate([long], 1)).detach()
    assert not torch.allclose(other, both[:5])


def test_adalora_penalty_is_pefts_own(base: Base) -> None:
    section = sections.AdaLora(init_r=4, target_r=2, orth_reg_weight=0.5)
    model = adapters.add_adapter(load_base(base), section, seed=1, total_steps=10)
    ids = torch.tensor([[5, 6, 7, 8]])
    ours = AdaLora.of(model).penalty()
    with_penalty = model(input_ids=ids, labels=ids).loss
    model.peft_config["default"].orth_reg_weight = 0.0
    torch.testing.assert_close(ours, with_penalty - model(input_ids=ids, labels=ids).loss)
    assert AdaLora.of(load_base(base)) is None


def test_going_on_from_an_adapter_of_another_base_or_kind_is_refused(base: Base, tmp_path: Path) -> None:
    adapters.save_adapter(adapters.add_adapter(load_base(base), sections.Lora(r=2), seed=1), tmp_path, base)
    section = sections.Lora(r=2, pretrained_adapter_weights=str(tmp_path))
    with pytest.raises(AssetError) as wrong:
        adapters.add_adapter(load_base(base), section, seed=9, expect_base_hash="0" * 64)
    assert wrong.value.code == "asset-wrong-base"
    loha = sections.Loha(pretrained_adapter_weights=str(tmp_path))
    with pytest.raises(AssetError) as kind:
        adapters.add_adapter(load_base(base), loha, seed=9)
    assert kind.value.code == "asset-unsupported" and "lora" in str(kind.value)


def test_rope_scaling_is_applied(base: Base) -> None:
    section = ModelParameters(rope_scaling={"rope_type": "linear", "factor": 2.0})
    stretched = load_base(base, model_parameters=section)
    assert stretched.config.rope_parameters["factor"] == 2.0
    assert not torch.equal(GenericModel(stretched).logprobs(batch()), GenericModel(load_base(base)).logprobs(batch()))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_row_is_not_stretched_by_the_longest_beside_it(base: Base, kind: str) -> None:
    """transformers takes one set of frequencies for a whole pass; a plan that cuts otherwise would give others."""
    half = AutoConfig.from_pretrained(base.path).head_dim // 2
    config = AutoConfig.from_pretrained(base.path, max_position_embeddings=5)
    own = {"original_max_position_embeddings": 5, "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    config.rope_parameters = rope | (own if kind == "longrope" else {})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    got, want = GenericModel(model).logprobs(batch()), reference(model)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    order = torch.tensor([8, 3, 14, 6])  # any positions, in any order
    asked = GenericModel(model).logprobs(batch(), order)
    alone = torch.cat([GenericModel(model).logprobs(batch(), at[None]) for at in order])
    torch.testing.assert_close(asked, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_runs_on_the_generic_path(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Also one that has no implementation by torch's own attention (Gemma 2)."""
    make(tmp_path / "base", case)
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, tmp_path / "base" / path.name)
    model = load_base(resolve(str(tmp_path / "base"), cache=tmp_path / "cache"))
    with torch.no_grad():
        torch.testing.assert_close(GenericModel(model).logprobs(batch()), reference(model), atol=1e-5, rtol=1e-5)


def test_full_weights_come_back(base: Base, tmp_path: Path) -> None:
    model = load_base(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    adapters.save_weights(model, tmp_path / "w", base)
    loaded = resolve(str(tmp_path / "w"), cache=tmp_path / "c")
    want = GenericModel(model).logprobs(batch())
    torch.testing.assert_close(GenericModel(load_base(loaded)).logprobs(batch()), want, atol=1e-6, rtol=1e-6)


def test_missing_base_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError) as error:
        load_base(resolve(str(folder), cache=tmp_path))
    assert error.value.code == "asset-damaged" and "norm" in str(error.value)


def test_unknown_architecture_is_explained(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-thing"}))
    with pytest.raises(AssetError) as error:
        load_base(resolve(str(folder), cache=tmp_path))
    assert error.value.code == "asset-unsupported"


def test_the_fixture_is_what_transformers_loads(tiny_llama: Path) -> None:
    assert AutoModelForCausalLM.from_pretrained(tiny_llama).config.hidden_size == 32
