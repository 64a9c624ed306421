"""Every key of the seed's YAML has its effect. The file itself is run, on a tiny base and a few rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import config, pipeline
from luthier.infer.generate import HfEngine
from luthier.types import Request

SEED = Path(__file__).parents[3] / "examples" / "seed" / "seed_config.yaml"
ROWS = [
    {"instruction": f"Say {i}.", "input": f"it is {i}", "output": str(i), "split": 0 if i < 40 else 2}
    for i in range(44)
]
STEPS_PER_EPOCH = 3  # 40 training rows in steps of 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at a width that 4-bit blocks of 64 weights divide."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("wide") / "model"))
    made = AutoConfig.from_pretrained(folder)
    made.hidden_size, made.intermediate_size, made.head_dim = 64, 128, 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(wide_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pipeline.Trained]:
    """The seed's config with changes, trained; the same changes are trained once."""
    known: dict[str, pipeline.Trained] = {}

    def train(**changes: Any) -> pipeline.Trained:
        overrides = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]
        name = " ".join(overrides)
        if name not in known:
            # the path through transformers, PEFT and bitsandbytes, whose parts the tests below look at
            short = [f"base_model={wide_llama}", "execution.model=generic", "trainer.precision=fp32"]
            short.append("generation.max_new_tokens=6")
            made = config.load(SEED, [*short, *overrides])
            known[name] = pipeline.train(made, ROWS, output=tmp_path_factory.mktemp("runs") / "run")
        return known[name]

    return train


def asked(made: pipeline.Trained) -> list[Request]:
    """What the engine is asked when the held-out rows are predicted."""
    seen: list[Request] = []

    class Spy(HfEngine):
        def generate(self, requests):
            seen.extend(requests)
            return iter(())

    engine = made.tuned.model.engine(made.tuned.tokenizer)
    engine.__class__ = Spy
    made.tuned.model.engine = lambda *given, **named: engine
    try:
        with pytest.raises(KeyError):  # no answer came
            made.tuned.predict(ROWS[40:])
    finally:
        del made.tuned.model.engine
    return seen


def rates(made: pipeline.Trained) -> list[float]:
    return made.history["train"]["learning_rate"]


def test_base_model_is_what_is_loaded(run, wide_llama) -> None:
    assert run().tuned.model.base.path == wide_llama


def test_features_and_template_make_the_prompt(run) -> None:
    made = run()
    assert (made.tuned.layout.inputs, made.tuned.layout.target) == (("instruction",), "output")
    text = made.tuned.renderer.prompt(ROWS[40]).text
    assert text.startswith("Below is an instruction that describes a task, paired with an input that provides")
    assert text.endswith("### Instruction: Say 40.\n### Input: it is 40\n### Response:")
    assert list(asked(made)[0].prompt_ids) == list(made.tuned.renderer.prompt(ROWS[40]).ids)


def test_temperature_and_max_new_tokens_reach_the_engine(run) -> None:
    assert config.load(SEED).generation.max_new_tokens == 512
    sampling = asked(run())[0].sampling
    assert (sampling.do_sample, sampling.temperature, sampling.max_new_tokens) == (True, 0.1, 6)
    made = run()
    short = made.tuned.predict(ROWS[40:], generation={"max_new_tokens": 3})
    assert {len(done.ids) for done in short.completions} == {3}
    wild = made.tuned.predict(ROWS[40:], generation={"max_new_tokens": 3, "temperature": 50.0})
    assert wild.texts != short.texts


def test_adapter_type_lora_trains_lora_weights_alone(run) -> None:
    made = run()
    known = json.loads((made.folder / "adapter" / "adapter_config.json").read_text())
    assert known["peft_type"] == "LORA"
    trained = [name for name, weight in made.tuned.model.module.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_bits(run, bits, kind) -> None:
    import bitsandbytes

    made = run(quantization__bits=bits) if bits == 8 else run()
    layers = [m for m in made.tuned.model.module.modules() if isinstance(m, getattr(bitsandbytes.nn, kind))]
    assert len(layers) == 14  # seven a layer
    losses = made.history["train"]["loss"]
    assert all(math.isfinite(loss) for loss in losses)
    again = pipeline.load(made.folder).predict(ROWS[40:], generation={"max_new_tokens": 3, "temperature": 0})
    assert again.texts == made.tuned.predict(ROWS[40:], generation={"max_new_tokens": 3, "temperature": 0}).texts


def test_eight_bits_say_once_what_they_multiply_in(wide_llama, caplog) -> None:
    """bitsandbytes says it of every product of every pass."""
    from luthier import assets, events
    from luthier.model.load import load_base

    said: list[str] = []
    bits = config.load(SEED, ["quantization.bits=8"]).quantization
    base = assets.resolve(str(wide_llama))
    model = load_base(
        base,
        quantization=bits,
        dtype="bf16",
        sink=lambda e: said.append(e.text) if isinstance(e, events.Note) else None,
    )
    for _ in range(2):
        model(torch.tensor([[5, 6, 7]]))
    assert [text for text in said if "float16" in text] == said and len(said) == 1
    assert "MatMul8bitLt" not in caplog.text


def test_epochs(run) -> None:
    assert len(rates(run())) == 5 * STEPS_PER_EPOCH
    assert len(rates(run(trainer__epochs=2))) == 2 * STEPS_PER_EPOCH


def test_batch_size_times_accumulation_is_the_effective_batch(run) -> None:
    assert run().history["train"]["rows"][:3] == [16, 16, 8]
    assert run(trainer__epochs=2, trainer__batch_size=2).history["train"]["rows"][:2] == [32, 8]
    assert run(trainer__epochs=2, trainer__gradient_accumulation_steps=10).history["train"]["rows"][:4] == [10] * 4


def test_batches_cut_otherwise_learn_the_same(run) -> None:
    one = run(trainer__epochs=2)
    other = run(trainer__epochs=2, trainer__batch_size=4, trainer__gradient_accumulation_steps=4)
    assert one.history["train"]["loss"] == pytest.approx(other.history["train"]["loss"], abs=1e-5)


def test_eval_batch_size_is_the_rows_of_a_generated_batch(run) -> None:
    made = run()
    sizes: list[int] = []
    forward = HfEngine._run

    def spy(self, batch, *given, **named):
        sizes.append(len(batch))
        return forward(self, batch, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfEngine, "_run", spy)
        made.tuned.predict(ROWS[40:], generation={"max_new_tokens": 2})
    assert sizes == [2, 2]


def test_learning_rate_and_warm_up_in_optimizer_steps(run) -> None:
    flat = {"trainer__learning_rate_scheduler__decay": "constant", "trainer__epochs": 2}
    made = run(**flat)
    assert rates(made) == pytest.approx([1e-4] * 6)  # 0.03 of 6 steps is one, which already has the full rate
    assert max(rates(run())) == pytest.approx(1e-4)  # and Luthier's own default decay after it
    warm = run(**flat, trainer__learning_rate_scheduler__warmup_fraction=0.5, trainer__learning_rate=3e-4)
    assert rates(warm) == pytest.approx([1e-4, 2e-4, *[3e-4] * 4])


def test_reduce_on_plateau_lowers_the_rate(run) -> None:
    rows = [{**row, "split": 1 if row["split"] == 2 else 0} for row in ROWS]
    made = config.load(
        SEED,
        [
            f"base_model={run().tuned.model.base.path}",
            "execution.model=generic",
            "trainer.precision=fp32",
            "generation.max_new_tokens=6",
            "trainer.eval_generation_rows=0",
            "trainer.learning_rate_scheduler.reduce_on_plateau=1",
            "trainer.learning_rate_scheduler.reduce_on_plateau_patience=1",
            "trainer.learning_rate_scheduler.decay=constant",
            "trainer.learning_rate=1e-12",  # too little to improve anything
            "trainer.early_stop=-1",
        ],
    )
    lowered = pipeline.train(made, rows, output=run().folder.parent / "plateau")
    assert min(rates(lowered)) == pytest.approx(1e-13)


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("eps", 1.0, {"eps": 1.0}),
        ("betas", [0.5, 0.6], {"betas": (0.5, 0.6)}),
        ("weight_decay", 0.5, {"weight_decay": 0.5}),
    ],
)
def test_optimizer_params(run, key, value, names) -> None:
    """The file's values are Adam's own; another value of each reaches Adam and changes what is learned."""
    seen: list[torch.optim.Optimizer] = []
    made = torch.optim.Adam.__init__

    def spy(self, *given, **named):
        made(self, *given, **named)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "__init__", spy)
        changed = run(**{f"trainer__optimizer__params__{key}": value, "trainer__epochs": 2})
    (adam,) = seen
    assert type(adam) is torch.optim.Adam
    assert {name: adam.param_groups[0][name] for name in names} == names
    assert changed.history["train"]["loss"] != run(trainer__epochs=2).history["train"]["loss"]


def test_optimizer_type(run) -> None:
    plain = run(trainer__epochs=2)
    sgd = run(trainer__epochs=2, trainer__optimizer={"type": "sgd"})
    assert sgd.history["train"]["loss"][-1] != plain.history["train"]["loss"][-1]


def test_trainer_type_none_trains_nothing(run, wide_llama) -> None:
    from luthier.errors import ConfigError

    with pytest.raises(ConfigError, match="nothing is trained"):
        run(trainer__type="none")
    made = config.load(SEED, [f"base_model={wide_llama}", "trainer.type=none", "trainer.precision=fp32"])
    asked = pipeline.untuned(made).predict(ROWS[40:], generation={"max_new_tokens": 2, "temperature": 0})
    assert len(asked.texts) == 4


ON_THE_DECODER = (
    {},
    {"trainer__batch_size": 4, "trainer__gradient_accumulation_steps": 4},
    {"trainer__optimizer__params__eps": 1.0},
    {"trainer__learning_rate_scheduler__warmup_fraction": 0.5, "trainer__learning_rate": 3e-3},
    {"trainer__optimizer": {"type": "sgd"}},
)


@pytest.mark.parametrize("changes", ON_THE_DECODER, ids=lambda changes: " ".join(changes) or "as it is")
def test_each_key_does_on_the_decoder_what_it_does_beside_it(run, changes) -> None:
    """The seed's base takes Luthier's own path, with its NF4; the tests above look into transformers' and PEFT's."""
    ours = run(**changes, trainer__epochs=2, execution__model="decoder")
    theirs = run(**changes, trainer__epochs=2)
    assert ours.history["train"]["learning_rate"] == theirs.history["train"]["learning_rate"]
    assert ours.history["train"]["rows"] == theirs.history["train"]["rows"]
    assert ours.history["train"]["loss"] == pytest.approx(theirs.history["train"]["loss"], abs=1e-5)


def test_bits_and_eval_batch_size_on_the_decoder(run) -> None:
    from luthier.infer.forward import Forward

    ours = run(trainer__epochs=2, execution__model="decoder")
    whole = run(trainer__epochs=2, execution__model="decoder", quantization=None)
    assert ours.history["train"]["loss"][0] != pytest.approx(whole.history["train"]["loss"][0], abs=1e-4)
    sizes: list[int] = []
    prefill = Forward.prefill

    def spy(self, prompts, *given, **named):
        sizes.append(len(prompts))
        return prefill(self, prompts, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "prefill", spy)
        ours.tuned.predict(ROWS[40:], generation={"max_new_tokens": 3})
        ours.tuned.predict(ROWS[40:], generation={"max_new_tokens": 3}, batch_size=4)
    assert [size for size in sizes if size > 1] == [2, 2, 4]  # alone: their shared beginning
