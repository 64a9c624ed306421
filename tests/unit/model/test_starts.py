"""LoRA's starts from weights, from rows and from what quantising loses: made by PEFT, kept, served as plain LoRA."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from luthier.assets import resolve
from luthier.config import adapter as sections
from luthier.config.quantization import Quantization
from luthier.data.collate import collate
from luthier.errors import AssetError, DependencyError, RunError
from luthier.events import Event, Progress
from luthier.model import adapters, starts
from luthier.model.generic import GenericModel
from luthier.model.load import load_base
from luthier.run import sealed
from luthier.types import Base, Example

MADE = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "eva")
KPM = sections.Lora(r=4, init_lora_weights="corda", corda_config=sections.Corda(corda_method="kpm"))


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Base:
    return resolve(str(tiny_llama), cache=tmp_path)


@pytest.fixture
def wide(tiny_llama: Path, tmp_path: Path) -> Base:
    """Of sizes that blocks of 64 weights fit."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "wide"))
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return resolve(str(folder), cache=tmp_path)


def rows(count: int = 24) -> list[Example]:
    stream = torch.Generator().manual_seed(7)
    lengths = torch.randint(4, 12, (count,), generator=stream).tolist()
    return [
        Example(torch.randint(3, 60, (length,), generator=stream).tolist(), [0.0] + [1.0] * (length - 1), row=at)
        for at, length in enumerate(lengths)
    ]


def section_of(start: str, **more: object) -> sections.Lora:
    return sections.Lora.model_validate({"r": 4, "init_lora_weights": start, **more})


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    return GenericModel(model).logprobs(collate(rows(3)))


def train(model: torch.nn.Module, steps: int = 4) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=5e-3), []
    for _ in range(steps):
        loss = -logprobs(model).mean()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}], ids=str)
@pytest.mark.parametrize("start", MADE)
def test_a_start_leaves_the_base_and_is_served_as_plain_lora(
    base: Base, tmp_path: Path, start: str, more: dict[str, object]
) -> None:
    section = section_of(start, **more)
    want = logprobs(load_base(base)).detach()
    model = adapters.add_adapter(load_base(base), section, seed=3, rows=rows())
    torch.testing.assert_close(logprobs(model).detach(), want, atol=2e-5, rtol=2e-5)
    losses = train(model)
    assert losses[-1] < losses[0]
    after = logprobs(model).detach()
    with model.disable_adapter():
        assert torch.equal(logprobs(model), logprobs(load_base(base)))
    adapters.save_adapter(model, tmp_path / "a", base)
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["init_lora_weights"] is True and said["r"] == (4 if start == "eva" else 8)
    ours = adapters.load_adapter(load_base(base), tmp_path / "a", expect_base_hash=base.content_hash)
    assert torch.equal(logprobs(ours), after)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "a").eval()
    torch.testing.assert_close(logprobs(theirs).detach(), after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs(adapters.merge(ours)).detach(), after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", MADE)
def test_what_was_begun_with_is_kept_and_never_made_twice(base: Base, tmp_path: Path, start: str) -> None:
    section, kept = section_of(start), tmp_path / "start.safetensors"

    def made(seed: int, looked: list[Example], to: Path | None) -> dict[str, torch.Tensor]:
        return starts.whole_state(adapters.add_adapter(load_base(base), section, seed, rows=looked, kept=to))

    first = made(3, rows(), kept)
    torch.testing.assert_close(made(3, rows(), None), first, rtol=0, atol=0)
    torch.testing.assert_close(made(4, rows()[:9], kept), first, rtol=0, atol=0)
    if section.looks_at_rows:
        other = made(3, rows()[12:], None)
        assert any(name not in other or not torch.equal(other[name], one) for name, one in first.items())
    whole = load_file(kept)
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(RunError) as damaged:
        made(3, rows(), kept)
    assert damaged.value.code == "run-damaged"
    other = {name: one[..., :3].contiguous() for name, one in whole.items()}
    kept.write_bytes(sealed.seal(save(other, metadata={"sha256": sealed.OPEN})))
    with pytest.raises(AssetError):
        made(3, rows(), kept)


@pytest.mark.parametrize("start", MADE)
def test_on_a_base_in_bf16(base: Base, tmp_path: Path, start: str) -> None:
    def opened() -> torch.nn.Module:
        return load_base(base, dtype="bf16")

    model = adapters.add_adapter(opened(), section_of(start), seed=3, rows=rows())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(logprobs(model).detach(), logprobs(opened()).detach(), atol=2e-2, rtol=2e-2)
    train(model)
    adapters.save_adapter(model, tmp_path / "a", base)
    loaded = adapters.load_adapter(opened(), tmp_path / "a")
    assert torch.equal(logprobs(loaded), logprobs(model))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("start", ["loftq", "pissa", "olora", "eva"])
def test_on_a_quantised_base(wide: Base, tmp_path: Path, start: str, bits: int) -> None:
    quantization = Quantization(bits=bits, bnb_4bit_compute_dtype="float32")

    def opened() -> torch.nn.Module:
        return load_base(wide, quantization=quantization)

    def error(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return float((logprobs(model) - logprobs(load_base(wide))).square().sum())

    model = adapters.add_adapter(opened(), section_of(start, r=8), seed=3, rows=rows(64))
    if start == "loftq":
        assert error(model) < (0.8 if bits == 4 else 1) * error(opened())  # in 8 bits inputs are rounded too
    else:
        with torch.no_grad():
            torch.testing.assert_close(logprobs(model), logprobs(opened()), atol=1e-4, rtol=1e-4)
    losses = train(model)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        after = logprobs(model.eval())
        adapters.save_adapter(model, tmp_path / "a", wide)
        assert torch.equal(logprobs(adapters.load_adapter(opened(), tmp_path / "a")), after)


def test_loftq_gives_the_nearest_weights_of_its_rank(wide: Base) -> None:
    """Whatever the scale of the update is, which PEFT's own leaves out."""
    from peft.utils.integrations import dequantize_module_weight

    plain = load_base(wide)
    for alpha in (8, 64):
        model = adapters.add_adapter(
            load_base(wide, quantization=Quantization(bits=4)), section_of("loftq", r=8, alpha=alpha), seed=1
        )
        for name, layer in model.get_base_model().named_modules():
            if "default" in getattr(layer, "lora_A", {}):
                lost = plain.get_submodule(name).weight - dequantize_module_weight(layer.base_layer).float()
                left = lost - layer.get_delta_weight("default")
                want = torch.linalg.svdvals(lost)[8:].square().sum()
                torch.testing.assert_close(left.square().sum(), want, rtol=1e-3, atol=1e-9)


def peft_model(base: Base, config: peft.LoraConfig, prepare=lambda model, config: None) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base.path).eval()
    prepare(model, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on memory
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("start", ["pissa", "corda", "kpm", "lora_ga"])
def test_losses_and_gradients_are_those_of_pefts_own_start(base: Base, start: str) -> None:
    """PEFT takes the factors out of the base; ours stand beside it."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    looked = rows()
    batches = [{"input_ids": torch.tensor([list(one.ids)])} for one in looked]

    def covariance(model: torch.nn.Module, config: peft.LoraConfig) -> None:
        preprocess_corda(model, config, run_model=lambda: [model(**one) for one in batches])

    def gradient(model: torch.nn.Module, config: peft.LoraConfig) -> None:
        tokens = sum(len(one.ids) - 1 for one in looked)

        def step() -> None:
            for one in batches:
                labels, share = one["input_ids"], (one["input_ids"].shape[1] - 1) * len(looked) / tokens
                (model(**one, labels=labels).loss * share).backward()

        model.enable_input_require_grads()
        torch.manual_seed(3)
        peft.preprocess_loraga(model, config, step)

    own = {
        "pissa": ({}, lambda model, config: None),
        "corda": ({"corda_config": CordaConfig()}, covariance),
        "kpm": ({"corda_config": CordaConfig(corda_method="kpm")}, covariance),
        "lora_ga": ({"lora_ga_config": peft.LoraGAConfig()}, gradient),
    }[start]
    method = "corda" if start == "kpm" else start
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=method, **own[0])
    theirs = peft_model(base, config, own[1])
    section = KPM if start == "kpm" else section_of(start)
    section = section.model_copy(update={"target_modules": tuple(targets)})
    ours = adapters.add_adapter(load_base(base), section, seed=3, rows=looked)
    got, want = logprobs(ours), logprobs(theirs)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    (-got.mean()).backward()
    (-want.mean()).backward()
    layers = dict(ours.get_base_model().named_modules())
    for name, layer in theirs.get_base_model().named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            # The factors may be turned where the search for them draws; the change of the product is not.
            torch.testing.assert_close(step_of(layers[name]), step_of(layer), atol=2e-4, rtol=2e-2)


def step_of(layer: torch.nn.Module) -> torch.Tensor:
    """The first-order change of the product under a step along the gradient: dB A + B dA."""
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if hasattr(a, "parametrizations"):
        a, b = a.parametrizations.weight.original, b.parametrizations.weight.original
    else:
        a, b = a.weight, b.weight
    return (b.grad @ a + b @ a.grad).detach()


def test_eva_is_pefts_own(base: Base) -> None:
    section = section_of("eva", r=2, eva_config={"rho": 2.0}, init_rows=24)
    ours = adapters.add_adapter(load_base(base), section, seed=3, rows=rows())
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights="eva", task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig(rho=2.0),
    )  # fmt: skip
    theirs = peft_model(base, config)
    batches = starts._padded(rows(), 8, trained_only=True)
    peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    want = {name: one for name, one in theirs.state_dict().items() if "lora_" in name}
    got = {name: one for name, one in ours.state_dict().items() if "lora_" in name}
    assert len({len(one) for name, one in want.items() if "lora_A" in name}) > 1  # ranks have moved
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    scales = {n: m.scaling["default"] for n, m in theirs.named_modules() if "default" in getattr(m, "lora_A", {})}
    mine = {n: m.scaling["default"] for n, m in ours.named_modules() if "default" in getattr(m, "lora_A", {})}
    assert mine == scales


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("start", ["pissa", "corda", "lora_ga", "eva"])
def test_on_weights_that_lie_across(tmp_path: Path, start: str) -> None:
    """GPT-2's, among them square ones, where an untransposed gradient would fit."""
    torch.manual_seed(3)
    without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}
    config = GPT2Config(vocab_size=264, n_positions=64, n_embd=32, n_layer=2, n_head=4, **without)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    plain = logprobs(model)
    seen: list[Event] = []
    section = section_of(start, target_modules=["c_attn", "c_proj"])
    tuned = adapters.add_adapter(model, section, seed=3, rows=rows(), sink=seen.append)
    torch.testing.assert_close(logprobs(tuned).detach(), plain, atol=2e-5, rtol=2e-5)
    assert start == "eva" or any(isinstance(one, Progress) and one.unit == "layers" for one in seen)
    if start == "lora_ga":  # A spans the first right singular vectors of the gradient
        layer = tuned.get_base_model().transformer.h[0].attn.c_proj
        whole = GPT2LMHeadModel(config).eval()
        whole.load_state_dict(GPT2LMHeadModel(config).state_dict() | clean(tuned))
        looked = rows()
        tokens = sum(len(one.ids) - 1 for one in looked)
        (-GenericModel(whole).logprobs(collate(looked)).sum() / tokens).backward()
        gradient = whole.transformer.h[0].attn.c_proj.weight.grad.T
        first = torch.linalg.svd(gradient)[2][:4]
        a = layer.lora_A["default"].weight[:4]
        torch.testing.assert_close(a.T @ a, first.T @ first, atol=1e-3, rtol=1e-3)


def clean(tuned: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The base's weights by their names without PEFT."""
    state = tuned.get_base_model().state_dict()
    return {name.replace(".base_layer", ""): one for name, one in state.items() if "lora_" not in name}


def test_corda_without_what_peft_needs_for_it_says_so(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.corda", None)
    with pytest.raises(DependencyError, match="pip install attrs"):
        adapters.add_adapter(load_base(base), section_of("corda"), seed=3, rows=rows())


@pytest.mark.parametrize(
    ("section", "count", "said"),
    [
        (section_of("pissa", r=40), 0, "lower r"),
        (section_of("lora_ga", r=20), 24, "lower r"),
        (section_of("eva", r=16), 24, "directions"),
        (section_of("eva", r=4), 1, "raise init_rows"),
    ],
)
def test_a_start_that_does_not_fit_says_why(base: Base, section: sections.Lora, count: int, said: str) -> None:
    with pytest.raises(AssetError, match=said) as refused:
        adapters.add_adapter(load_base(base), section, seed=3, rows=rows(count))
    assert refused.value.code == "asset-unsupported" and "init_lora_weights" in str(refused.value)


def test_pefts_own_adapters_of_a_changed_base(base: Base, tmp_path: Path) -> None:
    """PEFT makes the base of pissa again from its weights; that of a drawn start is lost, and it says nothing."""
    for start in ("pissa", "pissa_niter_4", "lora_ga"):
        own = {"lora_ga_config": peft.LoraGAConfig()} if start == "lora_ga" else {}
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM", **own
        )  # fmt: skip
        model = peft_model(base, config)
        model.save_pretrained(tmp_path / start)
        if start == "pissa":
            loaded = adapters.load_adapter(load_base(base), tmp_path / start)
            torch.testing.assert_close(logprobs(loaded), logprobs(model), atol=1e-5, rtol=1e-5)
            continue
        with pytest.raises(AssetError, match="has changed") as refused:
            adapters.load_adapter(load_base(base), tmp_path / start)
        assert refused.value.code == "asset-unsupported"
