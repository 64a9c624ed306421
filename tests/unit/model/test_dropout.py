"""Dropout on the generic path: however a step is cut the same masks, and the decoder's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from test_executions import SECTION, adapted, gradients
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, OPTConfig

from luthier.data.collate import collate
from luthier.kernels.keyed import dropout, hash_of, threshold
from luthier.model.dropout import Drawing, KeyedDropout, drawn_by_pass, key_dropouts, token_keys
from luthier.model.generic import GenericModel
from luthier.types import Example

P = SECTION.dropout


def rows() -> list[Example]:
    return [Example([5 + (3 * row + i) % 80 for i in range(4 + 2 * row)], [0.0] * 2 + [1.0] * (2 + 2 * row), row)
            for row in range(5)]  # fmt: skip


def made(folder: Path, config: Any, *, checkpointing: bool = False) -> GenericModel:
    """An adapter on the tiny model whose B is not zero, in fp64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), config).double()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lora_B" in name or "vera_lambda" in name):
            weight.data.normal_(std=0.3, generator=generator)
    return GenericModel(model.train(), checkpointing=checkpointing, seed=7)


def gradient(generic: GenericModel, passes: list[list[Example]], step: int = 3) -> torch.Tensor:
    for part in passes:
        generic.logprobs(collate(part, step)).sum().backward()
    weights = [weight for weight in generic.model.parameters() if weight.requires_grad]
    found = torch.cat([torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights])
    generic.model.zero_grad()
    return found


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


LORA = LoraConfig(r=4, lora_dropout=0.25, target_modules="all-linear", task_type="CAUSAL_LM")
DORA = LoraConfig(r=4, lora_dropout=0.25, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
VERA = VeraConfig(r=4, vera_dropout=0.25, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("config", [LORA, DORA, VERA], ids=["lora", "dora", "vera"])
def test_gradients_do_not_depend_on_how_a_step_is_cut(tiny_llama: Path, config: Any) -> None:
    generic, step = made(tiny_llama, config), rows()
    want = gradient(generic, [step])
    torch.manual_seed(99)  # no mask is torch's own
    assert error(gradient(generic, [[row] for row in step]), want) < 1e-7  # transformers' norms round to fp32
    assert error(gradient(generic, [[step[3], step[0]], [step[4], step[2], step[1]]]), want) < 1e-7
    assert error(gradient(generic, [step], step=4), want) > 0.1
    assert not drawn_by_pass(generic.model)


def test_what_is_computed_again_drops_the_same(tiny_llama: Path) -> None:
    generic, again = made(tiny_llama, LORA), made(tiny_llama, LORA, checkpointing=True)
    want = gradient(generic, [rows()])
    assert error(gradient(again, [rows()]), want) < 1e-7
    # two passes before one backward, as where rows of a pass are computed one by one
    sum(again.logprobs(collate([row], 3)).sum() for row in rows()).backward()
    assert error(gradient(again, []), want) < 1e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_architectures import make

    where = tmp_path_factory.mktemp("llama")
    make(where, "llama")
    return where


def test_the_decoder_draws_the_same(folder: Path) -> None:
    """The same base, adapter, seed and step on both paths."""
    decoder, step = adapted(folder), rows()
    config = LoraConfig(r=SECTION.r, lora_alpha=2 * SECTION.r, lora_dropout=P, target_modules="all-linear",
                        task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), config).double()
    for pair in decoder.pairs:
        module: Any = model.get_submodule(f"base_model.model.{pair.name}")
        module.lora_A["default"].weight.data.copy_(pair.lora_A)
        module.lora_B["default"].weight.data.copy_(pair.lora_B)
    generic = GenericModel(model.train(), seed=7)
    total = sum(sum(row.weights[1:]) for row in step)
    (-generic.logprobs(collate(step, 5)).sum() / total).backward()
    found = [part.grad.flatten() for pair in decoder.pairs
             for part in (model.get_submodule(f"base_model.model.{pair.name}").lora_A["default"].weight,
                          model.get_submodule(f"base_model.model.{pair.name}").lora_B["default"].weight)]  # fmt: skip
    want = gradients(decoder, [[row] for row in step])
    assert error(torch.cat(found), want) < 2e-6  # transformers' norms and softmax round to fp32
    decoder.eval()
    assert error(torch.cat(found), _without(decoder, step)) > 0.1


def _without(decoder: Any, step: list[Example]) -> torch.Tensor:
    total = sum(sum(row.weights[1:]) for row in step)
    (-decoder.logprobs(collate(step, 5)).sum() / total).backward()
    return torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])


def test_a_masked_value_is_its_own_and_nothing_is_drawn_in_evaluation() -> None:
    drawing = Drawing()
    one = KeyedDropout(0.4, 11, drawing, by_pass=False).train()
    key_bl = token_keys(torch.arange(6).reshape(2, 3), 1)
    drawing.expect(key_bl, torch.tensor([1, 2]), 0)
    x = torch.randn(2, 3, 500, requires_grad=True)
    got = one(x)
    assert torch.equal(got.reshape(6, -1), dropout(x.reshape(6, -1), key_bl.reshape(-1), 11, 0.4))
    assert torch.equal(one(x[:, 1:]), got[:, 1:])  # as the head sees them
    assert float((got == 0).float().mean()) == pytest.approx(0.4, abs=0.03)
    got.sum().backward()
    assert torch.equal(x.grad != 0, got != 0) and torch.equal(one(x.detach().reshape(6, 500)), got.reshape(6, 500))
    assert one.eval()(x) is x and threshold(0.4) and not one.by_pass


def test_shapes_without_tokens_are_drawn_by_pass_and_told() -> None:
    model = nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2))
    assert key_dropouts(model, 1) is None and drawn_by_pass(model) == []
    wrapped = nn.ModuleDict({"lora_dropout": nn.ModuleDict({"default": nn.Dropout(0.5)})})
    outer = nn.ModuleDict({"expert": wrapped}).train()
    drawing = key_dropouts(outer, 1)
    assert drawing is not None and drawn_by_pass(outer) == []
    one: Any = wrapped["lora_dropout"]["default"]
    assert one.salt == hash_of(*b"expert")
    one(torch.ones(4, 8))
    assert drawn_by_pass(outer) == []  # nothing known of the pass: no training of ours
    drawing.expect(torch.zeros(2, 3, dtype=torch.int64), None, 0)
    one(torch.ones(4, 8))  # rows that were routed here
    assert drawn_by_pass(outer) == ["expert.lora_dropout.default"]


@pytest.mark.parametrize(("config", "keys"), [
    (GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=90), ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
    (OPTConfig(num_hidden_layers=1, num_attention_heads=2, hidden_size=8, ffn_dim=8, vocab_size=90,
               word_embed_proj_dim=8), ["dropout"]),
    (BloomConfig(n_layer=1, n_head=2, hidden_size=8, vocab_size=90, hidden_dropout=0.1), ["hidden_dropout"]),
], ids=["gpt2", "opt", "bloom"])  # fmt: skip
def test_a_base_with_dropout_of_its_own_is_told(config: Any, keys: list[str]) -> None:
    """Whether its code has modules for it or calls a function."""
    model = AutoModelForCausalLM.from_config(config)
    assert sorted(drawn_by_pass(model)) == sorted(keys)
    GenericModel(model.train(), seed=1).logprobs(collate(rows(), 0)).sum().backward()
    assert sorted(drawn_by_pass(model)) == sorted(keys)
    silent = type(config)(**{**config.to_dict(), **dict.fromkeys(keys, 0.0)})
    assert drawn_by_pass(AutoModelForCausalLM.from_config(silent)) == []


@pytest.mark.parametrize("config", [
    LoraConfig(r=4, lora_dropout=0.25, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    LoHaConfig(r=4, rank_dropout=0.4, module_dropout=0.2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
], ids=["head", "loha"])  # fmt: skip
@pytest.mark.parametrize("row_by_row", [False, True])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_the_head_and_what_drops_weights_do_not_depend_on_the_cut(
    tiny_llama: Path, config: Any, row_by_row: bool
) -> None:
    """Nor where rows are computed one by one, because the longest would turn the others."""
    generic, step = made(tiny_llama, config), rows()
    for name, weight in generic.model.named_parameters():
        if weight.requires_grad and "lora" not in name:
            weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    want = gradient(generic, [step])
    generic._by_length = row_by_row
    torch.manual_seed(99)
    assert error(gradient(generic, [[row] for row in step]), want) < 1e-6
    assert error(gradient(generic, [[step[3], step[0]], [step[4], step[2], step[1]]]), want) < 1e-6
    assert max(error(gradient(generic, [step], step=other), want) for other in (4, 5)) > 0.01
    assert drawn_by_pass(generic.model) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_on_a_gpu_is_the_cpus(tiny_llama: Path, dtype: torch.dtype) -> None:
    here, there = made(tiny_llama, LORA), made(tiny_llama, LORA)
    there.model.to("cuda")
    found = {}
    for name, generic in (("cpu", here), ("cuda", there)):
        kept = []
        for module in generic.model.modules():
            if isinstance(module, KeyedDropout):
                module.register_forward_hook(lambda module, inputs, out, kept=kept: kept.append((out != 0).cpu()))
        generic.model.to(dtype)
        gradient(generic, [rows()[:3], rows()[3:]])
        found[name] = kept
    assert len(found["cpu"]) == len(found["cuda"]) > 10
    differ = [float((one != two).float().mean()) for one, two in zip(found["cpu"], found["cuda"], strict=True)]
    assert max(differ) < 1e-3  # a value that is zero itself
