"""Requests as vLLM gets them: a stand-in of its interface checks every field and answers from a script.

`tests/e2e/test_vllm.py` asks vLLM itself, where it is installed.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pandas as pd
import pytest

from luthier import config, pipeline
from luthier.errors import AssetError, ConfigError, DependencyError
from luthier.infer.drawing import request_seed
from luthier.infer.grammar import BETWEEN
from luthier.infer.vllm import SURROUNDINGS, check, refusal
from luthier.pipeline.handed import hand_over
from luthier.types import Sampling

ROWS = pd.DataFrame({"text": ["one", "two", "three"]})


@dataclass
class SamplingParams:
    """The fields of vLLM's of that name that are written here, with its defaults."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    _bad_words_token_ids: list[list[int]] | None = None

    def __post_init__(self) -> None:
        """What vLLM verifies."""
        if self.repetition_penalty > 9:
            raise ValueError("repetition_penalty must be 9 at most")  # a bound that this test invents
        assert 0 <= self.temperature <= 2 and 0 < self.top_p <= 1 and self.top_k >= -1 and 0 <= self.min_p <= 1
        assert -2 <= self.presence_penalty <= 2 and -2 <= self.frequency_penalty <= 2
        assert self.max_tokens is None or 0 <= self.min_tokens <= self.max_tokens
        assert not (self.stop and not self.detokenize), "stop strings need the text"
        assert self.seed is None or -(2**63) <= self.seed < 2**63


@dataclass
class StructuredOutputsParams:
    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None

    def __post_init__(self) -> None:
        assert sum(value is not None for value in (self.json, self.regex, self.choice)) == 1


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class LLM:
    model: str
    tokenizer: str
    dtype: str
    max_model_len: int
    structured_outputs_config: dict[str, Any]
    enable_chunked_prefill: bool = True
    enable_lora: bool = False
    max_lora_rank: int = 16
    quantization: str | None = None
    calls: list[Any] = field(default_factory=list)
    fits: ClassVar[int] = 512
    answer: ClassVar[Any] = ((ord("a") - ord("!"), ord("b") - ord("!")), "stop")

    @property
    def llm_engine(self) -> Any:
        assert self.max_model_len == -1, "as many positions as its memory holds"
        return SimpleNamespace(model_config=SimpleNamespace(max_model_len=self.fits))

    def generate(self, prompts: Any, sampling_params: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        """Answers "ab" and the end."""
        assert len(prompts) == len(sampling_params) and not use_tqdm
        assert lora_request is None or self.enable_lora
        self.calls.append((prompts, sampling_params, lora_request))
        ids, reason = self.answer
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=reason, index=0)]) for _ in prompts
        ]


@dataclass
class PEFTHelper:
    rank_pattern: dict[str, int]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {"StructuredOutputsParams": StructuredOutputsParams},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.peft_helper": {"PEFTHelper": PEFTHelper},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": ["awq", "bitsandbytes"]},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    for name in SURROUNDINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return sys.modules["vllm"]


def opened(folder: Path, **generation: Any) -> Any:
    made = {"base_model": str(folder), "prompt": {"template": "{text}"},
            "trainer": {"precision": "fp32"}, "generation": {"engine": "vllm", **generation}}  # fmt: skip
    return pipeline.untuned(config.load(made))


def test_without_vllm_the_error_says_how_to_install_it(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DependencyError, match=r"pip install 'vllm"):
        opened(tiny_llama)


def test_every_setting_arrives_in_its_field(tiny_llama: Path, vllm: ModuleType) -> None:
    asked = opened(tiny_llama)
    generation = {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9,
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.25, "stop": ["END"],
        "logit_bias": {"x": 3, "7": -1}, "bad_words": ["no way"], "seed": 4, "n": 2,
    }  # fmt: skip
    answered = asked.predict(ROWS, generation=generation)
    llm = asked.model.handed.llm
    assert (llm.model, llm.tokenizer) == (str(tiny_llama), str(tiny_llama))
    assert (llm.dtype, llm.enable_lora) == ("float32", False)
    assert llm.structured_outputs_config == {"backend": "guidance"} and not llm.enable_chunked_prefill
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr", "its log is no part of the answers"
    ((prompts, params, lora),) = llm.calls
    assert lora is None and len(prompts) == 6
    assert prompts[0] == {"prompt_token_ids": list(asked.renderer.prompt({"text": "one"}, 0).ids)}
    ends = list(asked.tokenizer.eos_ids)
    (x,) = asked.tokenizer.encode("x", continuation=True)
    assert params[0] == SamplingParams(
        n=1, temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.25, max_tokens=9, min_tokens=2, stop=["END"], stop_token_ids=ends,
        logit_bias={7: -1.0, x: 3.0}, seed=request_seed(4, 0),
        _bad_words_token_ids=[asked.tokenizer.encode(text, continuation=True) for text in ("no way", " no way")],
    )  # fmt: skip
    assert [one.seed for one in params[:2]] == [request_seed(4, 0), request_seed(4, 0, 1)]
    assert answered.texts == ["ab"] * 3
    assert all(done.finish_reason == "stop" and len(done.others) == 1 for done in answered.completions)
    assert "".join(asked.stream("a")) == "ab"


def test_min_p_alone(tiny_llama: Path, vllm: ModuleType) -> None:
    asked = opened(tiny_llama)
    asked.predict(ROWS, generation={"temperature": 1.0, "min_p": 0.1})
    assert asked.model.handed.llm.calls[0][1][0].min_p == 0.1


def test_an_answer_that_vllm_did_not_finish_is_an_error(
    tiny_llama: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = opened(tiny_llama)
    a, b = LLM.answer[0]
    monkeypatch.setattr(LLM, "answer", ((a, b), "abort"))
    (*_, done) = asked.predict(ROWS).completions
    assert done.finish_reason == "error" and "abort" in str(done.error)
    monkeypatch.setattr(LLM, "answer", ((a, b, a), "length"))
    (*_, done) = asked.predict(ROWS, generation={"bad_words_ids": [[b, a]]}).completions
    assert done.finish_reason == "error" and "bad_words" in str(done.error)
    (*_, done) = asked.predict(ROWS, generation={"bad_words_ids": [[b, b]]}).completions
    assert (done.text, done.finish_reason) == ("aba", "length")


def test_what_its_memory_holds_bounds_a_row(
    tiny_llama: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "fits", 40)
    asked = opened(tiny_llama)
    rows = pd.DataFrame({"text": ["one", "o" * 40]})
    short, long = asked.predict(rows, generation={"max_new_tokens": 99}).completions
    assert short.text == "ab" and "context 40" in str(long.error)
    (params,) = asked.model.handed.llm.calls[0][1]
    assert params.max_tokens == 40 - len(asked.renderer.prompt({"text": "one"}, 0).ids)


def test_what_vllm_raises_is_told_as_an_error_of_ours(
    tiny_llama: Path, vllm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = opened(tiny_llama)
    with pytest.raises(ConfigError, match="could not take these settings: repetition_penalty must be 9"):
        asked.predict(ROWS, generation={"repetition_penalty": 10.0})

    def ends(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Engine core\ninitialization failed.")

    monkeypatch.setattr(vllm, "LLM", ends)
    with pytest.raises(DependencyError, match=r"could not load this model: Engine core initialization failed") as told:
        opened(tiny_llama).predict(ROWS)
    assert told.value.code == "dependency-failed"


def test_a_vllm_that_cannot_be_imported_is_not_called_missing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(DependencyError, match="could not be imported: No module named") as told:
        opened(tiny_llama)
    assert told.value.code == "dependency-failed"


def test_greedy_and_constraints(tiny_llama: Path, vllm: ModuleType) -> None:
    pytest.importorskip("llguidance")
    asked = opened(tiny_llama, max_new_tokens=5)
    schema = {"type": "object"}
    for key, value, theirs in (
        ("schema", schema, StructuredOutputsParams(json=schema | {"x-guidance": BETWEEN})),
        ("schema", json.dumps(schema), StructuredOutputsParams(json=schema | {"x-guidance": BETWEEN})),
        ("regex", "[a-z]+", StructuredOutputsParams(regex="[a-z]+")),
        ("choices", ["a", "b"], StructuredOutputsParams(choice=["a", "b"])),
    ):
        asked.predict(ROWS, generation={key: value})
        params = asked.model.handed.llm.calls[-1][1][0]
        assert params.structured_outputs == theirs
        assert (params.temperature, params.top_k, params.seed, params.max_tokens) == (0.0, 0, None, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2}, {"logprobs": True}, {"extra": {"typical_p": 0.5}}, {"extra": {"no_repeat_ngram_size": 2}},
        {"extra": {"suppress_tokens": (1,)}}, {"extra": {"guidance_scale": 2.0}},
        {"extra": {"max_time": 1.0}}, {"extra": {"forced_bos_token_id": 1}},
        {"temperature": 2.5, "do_sample": True}, {"temperature": 0.001, "do_sample": True},
        {"extra": {"min_p": 0.1}, "top_p": 0.9, "do_sample": True},
        {"extra": {"bad_words": (("x", tuple((token,) for token in range(129))),)}},
        {"extra": {"logit_bias": tuple((token, 1.0) for token in range(1025))}},
    ],
    ids=lambda settings: "-".join(settings) + "-" + "-".join(settings.get("extra", ())),
)  # fmt: skip
def test_what_vllm_cannot_honour_is_refused_by_name(settings: dict[str, Any]) -> None:
    name = next(iter(settings.get("extra", settings)))
    with pytest.raises(ConfigError, match=f"vLLM cannot honour {name}"):
        check(Sampling(**settings))


def test_settings_without_effect_are_no_obstacle() -> None:
    idle = {"use_cache": True, "length_penalty": 1.5, "early_stopping": True, "typical_p": 1.0, "max_time": None}
    check(Sampling(extra=idle))


def test_an_adapter_is_named_by_its_folder_and_the_base_is_asked_without_it(
    tiny_llama: Path, vllm: ModuleType, tmp_path: Path
) -> None:
    made = config.load({"base_model": str(tiny_llama), "adapter": {"type": "lora", "r": 12},
                        "quantization": {"bits": 4}, "generation": {"engine": "vllm"}})  # fmt: skip
    base = pipeline.untuned(config.load({"base_model": str(tiny_llama), "trainer": {"precision": "fp32"}})).model.base
    run: Any = SimpleNamespace(weights=tmp_path / "weights", adapter=tmp_path / "adapter")
    run.adapter.mkdir()
    (run.adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 12}), encoding="utf-8")
    model = hand_over(made, base, "bf16", run)
    llm = model.handed.llm
    assert (llm.enable_lora, llm.max_lora_rank, llm.quantization, llm.dtype) == (True, 16, "bitsandbytes", "bfloat16")
    assert model.has_base and model.tuned == "adapter"
    assert model.handed.lora == LoRARequest("luthier", 1, str(tmp_path / "adapter"))
    run.weights.mkdir()
    whole = hand_over(made, base, "bf16", run)
    assert (whole.handed.llm.model, whole.handed.llm.enable_lora) == (str(run.weights), False)
    assert not whole.has_base
    for ask in (lambda: model.logprobs(None), lambda: model.module, lambda: model.save(tmp_path)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="vLLM only answers"):
            ask()
    run.weights.rmdir()
    (run.adapter / "luthier.json").write_text('{"base": "x", "base_hash": "0"}', encoding="utf-8")
    with pytest.raises(AssetError, match="another base"):
        hand_over(made, base, "bf16", run)


def test_adapters_that_vllm_does_not_serve(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"peft_type": "LORA", "r": 8, "bias": "none", "use_dora": False, "init_lora_weights": True,
             "rank_pattern": {"q_proj": 16}, "modules_to_save": None}  # fmt: skip
    assert refusal(plain, 4) is None and refusal(None, None) is None
    assert "rank" in str(refusal(plain | {"r": 1024}, None))
    assert "8 bits" in str(refusal(None, 8))
    assert "ia3" in str(refusal({"peft_type": "IA3"}, None))
    for key, value in (("use_dora", True), ("bias", "all"), ("init_lora_weights", "pissa"), ("modules_to_save", ["x"])):
        assert key in str(refusal(plain | {key: value}, None))
    older = type("Older", (), {"__dataclass_fields__": {}})
    monkeypatch.setattr(sys.modules["vllm.lora.peft_helper"], "PEFTHelper", older)
    assert "rank_pattern" in str(refusal(plain, None))
    monkeypatch.setattr(sys.modules["vllm.model_executor.layers.quantization"], "QUANTIZATION_METHODS", ["awq"])
    assert "bitsandbytes" in str(refusal(None, 4))


def test_the_other_engines_are_chosen_by_name(tiny_llama: Path) -> None:
    made = {"base_model": str(tiny_llama), "prompt": {"template": "{text}"}, "trainer": {"precision": "fp32"}}
    texts = {}
    for name in ("auto", "luthier", "transformers"):
        asked = pipeline.untuned(config.load(made | {"generation": {"engine": name, "max_new_tokens": 6}}))
        texts[name] = asked.predict(ROWS).texts
        kind = type(asked.model.engine(asked.tokenizer)).__name__
        assert kind == ("HfEngine" if name == "transformers" else "DecoderEngine")
    assert texts["auto"] == texts["luthier"] == texts["transformers"]
    generic = made | {"generation": {"engine": "luthier"}, "execution": {"model": "generic"}}
    with pytest.raises(ConfigError, match="engine"):
        pipeline.untuned(config.load(generic))
    with pytest.raises(ConfigError, match="chosen when the model is loaded"):
        asked.predict(ROWS, generation={"engine": "vllm"})
