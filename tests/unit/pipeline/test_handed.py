"""Requests as vLLM gets them: a stand-in of its documented interface checks every field and answers from a script."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from luthier import config, pipeline
from luthier.config.adapter import Lora
from luthier.errors import ConfigError, DependencyError
from luthier.infer.drawing import request_seed
from luthier.infer.vllm import check, refusal
from luthier.pipeline.handed import hand_over
from luthier.types import Sampling

ROWS = pd.DataFrame({"text": ["one", "two", "three"]})


@dataclass
class SamplingParams:
    """The fields of vLLM 0.12's of that name that are for writing, with its defaults."""

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

    def __post_init__(self) -> None:
        """What vLLM verifies."""
        assert self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= -1 and 0 <= self.min_p <= 1
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
    enable_lora: bool = False
    max_lora_rank: int = 16
    quantization: str | None = None
    calls: list[Any] = field(default_factory=list)

    def generate(self, prompts: Any, sampling_params: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        """Answers "ab" and the end."""
        assert len(prompts) == len(sampling_params) and not use_tqdm
        assert lora_request is None or self.enable_lora
        self.calls.append((prompts, sampling_params, lora_request))
        ids = [ord("a") - ord("!"), ord("b") - ord("!")]
        return [
            SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids), finish_reason="stop", index=0)])
            for _ in prompts
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    lora, request = ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    params.StructuredOutputsParams, request.LoRARequest = StructuredOutputsParams, LoRARequest  # type: ignore[attr-defined]
    for module in (package, params, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


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
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.25, "stop": ["END"],
        "logit_bias": {"x": 3, "7": -1}, "bad_words": ["no way"], "seed": 4, "n": 2,
    }  # fmt: skip
    answered = asked.predict(ROWS, generation=generation)
    llm = asked.model.handed.llm
    assert (llm.model, llm.tokenizer) == (str(tiny_llama), str(tiny_llama))
    assert (llm.dtype, llm.enable_lora) == ("float32", False)
    ((prompts, params, lora),) = llm.calls
    assert lora is None and len(prompts) == 6
    assert prompts[0] == {"prompt_token_ids": list(asked.renderer.prompt({"text": "one"}, 0).ids)}
    ends = list(asked.tokenizer.eos_ids)
    (x,) = asked.tokenizer.encode("x", continuation=True)
    assert params[0] == SamplingParams(
        n=1, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-0.25, max_tokens=9, min_tokens=2, stop=["END"], stop_token_ids=ends,
        logit_bias={7: -1.0, x: 3.0}, bad_words=["no way"], seed=request_seed(4, 0),
    )  # fmt: skip
    assert [one.seed for one in params[:2]] == [request_seed(4, 0), request_seed(4, 0, 1)]
    assert answered.texts == ["ab"] * 3
    assert all(done.finish_reason == "stop" and len(done.others) == 1 for done in answered.completions)
    assert "".join(asked.stream("a")) == "ab"


def test_greedy_and_constraints(tiny_llama: Path, vllm: ModuleType) -> None:
    pytest.importorskip("llguidance")
    asked = opened(tiny_llama, max_new_tokens=5)
    schema = {"type": "object"}
    for key, value, theirs in (
        ("schema", schema, StructuredOutputsParams(json=schema)),
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
        {"extra": {"suppress_tokens": (1,)}}, {"extra": {"bad_words_ids": ((1,),)}}, {"extra": {"guidance_scale": 2.0}},
        {"extra": {"max_time": 1.0}}, {"extra": {"forced_bos_token_id": 1}},
    ],
)  # fmt: skip
def test_what_vllm_cannot_honour_is_refused_by_name(settings: dict[str, Any]) -> None:
    name = "num_beams" if "num_beams" in settings else next(iter(settings.get("extra", settings)))
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
    run = SimpleNamespace(weights=tmp_path / "weights", adapter=tmp_path / "adapter")
    model = hand_over(made, base, "bf16", run)  # type: ignore[arg-type]
    llm = model.handed.llm
    assert (llm.enable_lora, llm.max_lora_rank, llm.quantization, llm.dtype) == (True, 16, "bitsandbytes", "bfloat16")
    assert model.has_base and model.tuned == "adapter"
    assert model.handed.lora == LoRARequest("luthier", 1, str(tmp_path / "adapter"))
    run.weights.mkdir()
    whole = hand_over(made, base, "bf16", run)  # type: ignore[arg-type]
    assert (whole.handed.llm.model, whole.handed.llm.enable_lora) == (str(run.weights), False)
    assert not whole.has_base
    for ask in (lambda: model.logprobs(None), lambda: model.module, lambda: model.save(tmp_path)):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="vLLM only answers"):
            ask()


def test_adapters_that_vllm_does_not_serve() -> None:
    assert refusal(Lora(r=8), 4) is None and refusal(None, None) is None
    assert "DoRA" in str(refusal(Lora(r=8, use_dora=True), None))
    assert "rank" in str(refusal(Lora(r=1024), None))
    assert "8 bits" in str(refusal(None, 8))
    assert "ia3" in str(refusal(SimpleNamespace(type="ia3"), None))


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
