"""The step against plain transformers + PEFT: same loss, same gradients, however the passes are cut."""

from dataclasses import replace

import bitsandbytes
import pytest
import torch
from tiny_training import make_examples, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.config.adapter import Lora
from luthier.data.collate import collate
from luthier.data.pack import schedule
from luthier.data.source import TableSource
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.objectives import Sft
from luthier.train.state import new_training
from luthier.train.step import _run_passes


def reference(model, examples, weight):
    """Each row alone through transformers' own loss, summed and divided once."""
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = torch.tensor([[i if w else -100 for i, w in zip(example.ids, example.weights, strict=True)]])
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=weight).loss
        loss.backward()
        total += float(loss.detach())
    gradients = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)
    return total, gradients


@pytest.fixture(scope="module")
def four_bit_folder(tiny_llama, tmp_path_factory):
    """The tiny model at a width that 4-bit blocks of 64 weights divide."""
    folder = tmp_path_factory.mktemp("wide")
    config = AutoConfig.from_pretrained(tiny_llama)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["lora", "full", "4-bit"])
@pytest.mark.parametrize("pieces", [1, 4, 16])
def test_loss_and_gradients_equal_the_reference(tiny_llama, four_bit_folder, make_setup, kind, pieces) -> None:
    if kind == "4-bit":
        model = make_model(four_bit_folder, bits=4)
        assert sum(isinstance(one, bitsandbytes.nn.Linear4bit) for one in model.modules()) == 14  # 7 a layer
    else:
        model = make_model(tiny_llama, adapter=kind == "lora")
    examples = make_examples(16)
    setup = make_setup(model=model, tokens_per_pass={1: 10_000, 4: 80, 16: 1}[pieces])
    constants = setup.objective.prepare(examples)
    passes = schedule([example.length for example in examples], setup.plan)[0]
    assert len(passes) == pieces or (pieces == 4 and 3 <= len(passes) <= 5)
    expected_loss, expected = reference(model, examples, constants["nll"])

    now = new_training(setup, torch.optim.SGD([w for w in model.parameters() if w.requires_grad]))
    totals = _run_passes(setup, now, [[examples[i] for i in indices] for indices in passes], constants)

    assert float(totals["loss"]) == pytest.approx(expected_loss, abs=1e-5)
    got = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert got.keys() == expected.keys()
    assert max(float((got[name] - expected[name]).abs().max()) for name in got) <= 1e-5
    assert max(float(one.abs().max()) for one in got.values()) > 1e-4  # the comparison is not of zeros


@pytest.mark.parametrize("tokens_per_pass", [10_000, 80])
def test_micro_batches_weigh_as_in_a_loop_that_accumulates_their_means(tiny_llama, make_setup, tokens_per_pass) -> None:
    """The last one is short, and each has other numbers of tokens."""
    model, examples = make_model(tiny_llama, adapter=True), make_examples(16)
    parts = [examples[start : start + 5] for start in range(0, 16, 5)]
    expected_loss = 0.0
    for part in parts:
        tokens = sum(example.supervised for example in part)
        for example in part:
            labels = torch.tensor([[i if w else -100 for i, w in zip(example.ids, example.weights, strict=True)]])
            loss = model(input_ids=torch.tensor([example.ids]), labels=labels, num_items_in_batch=tokens).loss / len(
                parts
            )
            loss.backward()
            expected_loss += float(loss.detach())
    expected = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    model.zero_grad(set_to_none=True)

    step = TableSource(examples, 16, 1, "", shuffle=False, micro_batch=5).next_step()
    setup = make_setup(model=model, tokens_per_pass=tokens_per_pass)
    setup = replace(setup, objective=Sft("micro_batch"))
    constants = setup.objective.prepare(step)
    assert constants["nll"] == pytest.approx(len(parts))
    now = new_training(setup, torch.optim.SGD([w for w in model.parameters() if w.requires_grad]))
    passes = schedule([example.length for example in step], setup.plan)[0]
    totals = _run_passes(setup, now, [[step[i] for i in indices] for indices in passes], constants)
    assert float(totals["loss"]) == pytest.approx(expected_loss, abs=1e-5)
    assert float(totals["tokens"]) == sum(example.supervised for example in examples)
    got = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert max(float((got[name] - expected[name]).abs().max()) for name in got) <= 1e-5


@pytest.mark.parametrize("weights", ["resident", "quantised", "streamed"])
def test_the_decoders_4_bit_gradients_equal_pefts_on_what_bitsandbytes_stores(four_bit_folder, weights) -> None:
    # bitsandbytes' own product on a CPU rounds (2e-3 here), so what it stores is compared, in plain fp32 products
    theirs, examples = make_model(four_bit_folder), make_examples(16)
    for name, module in theirs.named_modules():
        if name.endswith("base_layer"):
            stored, scales = bitsandbytes.functional.quantize_4bit(module.weight.data, quant_type="nf4", blocksize=64)
            module.weight.data = bitsandbytes.functional.dequantize_4bit(stored, scales)
    state = dict(theirs.named_parameters())
    placing = Placing(torch.float32, quantised="nf4", double=False, weights=weights)
    ours = load_decoder(four_bit_folder, read_shape(four_bit_folder), placing)
    ours.adapt(Lora(r=4, alpha=8), seed=1)
    names = {f"base_model.model.{pair.name}.{part}.default.weight": (pair, part)
             for pair in ours.pairs for part in ("lora_A", "lora_B")}  # fmt: skip
    assert names.keys() == {name for name, weight in state.items() if weight.requires_grad}
    for name, (pair, part) in names.items():
        getattr(pair, part).data.copy_(state[name])
    weight = sum(sum(example.weights[1:]) for example in examples)
    expected_loss, expected = reference(theirs, examples, weight)

    batch = collate(examples)
    loss = -(ours.logprobs(batch) * batch.target_weight[batch.supervised]).sum() / weight
    loss.backward()

    assert float(loss.detach()) == pytest.approx(expected_loss, abs=1e-5)
    for name, (pair, part) in names.items():
        assert float((getattr(pair, part).grad - expected[name]).abs().max()) <= 1e-5, name
    assert max(float(one.abs().max()) for one in expected.values()) > 1e-4  # the comparison is not of zeros
