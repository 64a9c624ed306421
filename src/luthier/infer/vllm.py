"""Requests handed to vLLM, where it is installed: the same prompt ids, settings mapped one by one, the adapter.

Written against vLLM's documented interface (0.12 and newer: `LLM.generate` with prompt ids, `SamplingParams`,
`StructuredOutputsParams`, `LoRARequest`); it has not been run with vLLM itself. What vLLM cannot honour is refused by
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.errors import ConfigError, DependencyError, Fault
from luthier.events import Sink, progress, silent
from luthier.infer.answer import Answers
from luthier.infer.drawing import request_seed
from luthier.infer.several import completed
from luthier.infer.words import texts_of
from luthier.model.tunable import Tokens
from luthier.types import Completion, Request, Sampling

BLOCK = 1024  # rows handed over together; their answers come back together
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
CONSTRAINTS = {"schema": "json", "regex": "regex", "choices": "choice"}  # ours -> StructuredOutputsParams
HONOURED = ("min_p", "logit_bias", "bad_words", "max_length", *CONSTRAINTS)  # keys of `Sampling.extra`
# Settings that change nothing with these values.
IDLE: Mapping[str, tuple[Any, ...]] = {
    "use_cache": (True, False), "early_stopping": (True, False), "renormalize_logits": (False,),
    "remove_invalid_values": (False,), "guidance_scale": (1, 1.0), "no_repeat_ngram_size": (0,), "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0), "encoder_repetition_penalty": (1, 1.0),
}  # fmt: skip


@dataclass
class Handed:
    """What vLLM is to run. ``model``: the folder of the base or of tuned weights; ``adapter``: one in PEFT's format."""

    model: Path
    tokenizer: Path
    dtype: str  # bfloat16, float16, float32
    adapter: Path | None = None
    rank: int = 0
    four_bits: bool = False

    @cached_property
    def api(self) -> Any:
        """The package. Raises DependencyError when it is not installed."""
        return installed()

    @cached_property
    def llm(self) -> Any:
        """The loaded model; made once, since that takes vLLM a minute."""
        options: dict[str, Any] = {"enable_lora": False}
        if self.adapter is not None:
            options = {"enable_lora": True, "max_lora_rank": next(rank for rank in RANKS if rank >= self.rank)}
        if self.four_bits:
            options["quantization"] = "bitsandbytes"
        return self.api.LLM(model=str(self.model), tokenizer=str(self.tokenizer), dtype=self.dtype, **options)

    @property
    def lora(self) -> Any:
        """What names the adapter; None without one."""
        if self.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(lora_name="luthier", lora_int_id=1, lora_path=str(self.adapter))


class VllmEngine:
    """Implements `types.Engine` by vLLM's offline interface."""

    def __init__(
        self,
        handed: Handed,
        tokenizer: Tokens,
        *,
        vocabulary: int,
        context: int | None,
        use_base: bool = False,
        sink: Sink = silent,
        stage: str = "generate",
    ) -> None:
        """``use_base`` leaves the adapter out; ``context``: positions of the model, None where it has no bound."""
        self.handed, self.use_base, self.sink, self.stage = handed, use_base, sink, stage
        self.answers = Answers(tokenizer, tuple(dict.fromkeys(map(int, tokenizer.eos_ids))), context, vocabulary)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions in blocks. A row that cannot be run yields an error.

        Raises ConfigError config-conflict for a setting that vLLM cannot honour, before anything is generated.
        """
        waiting = list(requests)
        for sampling in {id(request.sampling): request.sampling for request in waiting}.values():
            check(sampling)
        done = completed(waiting, self.answers.refusal, self._answers)
        yield from progress(self.sink, self.stage, done, total=len(waiting), unit="rows")

    def stream(self, request: Request) -> Iterator[str]:
        """The first answer, in one piece: the offline interface knows an answer only at its end.

        Raises ValueError when the request cannot be run.
        """
        for number, text in self.stream_several(replace(request, sampling=replace(request.sampling, n=1))):
            if number == 0:
                yield text

    def stream_several(self, request: Request) -> Iterator[tuple[int, str]]:
        """Each answer in one piece, with its number. Raises as `stream`."""
        done = next(iter(self.generate([request])))
        if done.error:
            raise ValueError(done.error)
        yield from ((one.number, one.text) for one in (done, *done.others))

    def _answers(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for start in range(0, len(requests), BLOCK):
            block = requests[start : start + BLOCK]
            outputs = self.handed.llm.generate(
                [{"prompt_token_ids": list(request.prompt_ids)} for request in block],
                [self._params(request) for request in block],
                lora_request=None if self.use_base else self.handed.lora,
                use_tqdm=False,
            )
            for request, output in zip(block, outputs, strict=True):
                (answer,) = output.outputs
                done = self.answers.completion(request, list(answer.token_ids))
                # An end may be left out of the ids; vLLM's word for why it ended holds then.
                yield replace(done, finish_reason="stop") if answer.finish_reason == "stop" else done

    def _params(self, request: Request) -> Any:
        fields = fields_of(request, self.answers.steps(request), self.answers.ends)
        constraint = fields.pop("structured_outputs", None)
        if constraint is not None:
            from vllm.sampling_params import StructuredOutputsParams

            fields["structured_outputs"] = StructuredOutputsParams(**constraint)
        return self.handed.api.SamplingParams(**fields)


def installed() -> Any:
    """The package vllm. Raises DependencyError dependency-missing with the command that installs it."""
    try:
        import vllm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise DependencyError(
            "dependency-missing",
            "generation.engine: vllm needs the package 'vllm', which is not installed",
            where="generation.engine",
            fix="pip install 'vllm>=0.12'   (on a CUDA machine), or leave generation.engine out",
        ) from error
    return vllm


def fields_of(request: Request, steps: int, ends: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments of vLLM's `SamplingParams`; a constraint as those of `StructuredOutputsParams`."""
    sampling, extra = request.sampling, request.sampling.extra
    fields: dict[str, Any] = {
        "n": 1,  # each answer is a request of its own, with a seed of its own
        "temperature": float(sampling.temperature) if sampling.do_sample else 0.0,
        "top_k": sampling.top_k if sampling.do_sample else 0,
        "top_p": float(sampling.top_p) if sampling.do_sample else 1.0,
        "min_p": float(extra.get("min_p") or 0.0) if sampling.do_sample else 0.0,
        "presence_penalty": float(sampling.presence_penalty),
        "frequency_penalty": float(sampling.frequency_penalty),
        "repetition_penalty": float(sampling.repetition_penalty),
        "max_tokens": steps,
        "min_tokens": min(sampling.min_new_tokens, steps),
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(ends) or None,
        "seed": request_seed(sampling.seed, request.key, request.number) if sampling.do_sample else None,
        "logit_bias": dict(extra.get("logit_bias") or ()) or None,
        "bad_words": texts_of(extra) or None,
        "detokenize": bool(sampling.stop or texts_of(extra)),
    }
    for ours, theirs in CONSTRAINTS.items():
        if extra.get(ours) is not None:
            value = extra[ours]
            fields["structured_outputs"] = {theirs: list(value) if ours == "choices" else value}
    return fields


def check(sampling: Sampling) -> None:
    """Raise ConfigError config-conflict for every setting that vLLM cannot honour."""
    refused = [
        (name, value)
        for name, value in sampling.extra.items()
        if name not in HONOURED and value not in (None, ()) and value not in IDLE.get(name, ())
    ]
    if sampling.num_beams == 1:
        refused = [(name, value) for name, value in refused if name != "length_penalty"]
    if sampling.num_beams > 1:
        refused.append(("num_beams", sampling.num_beams))
    if sampling.logprobs:
        refused.append(("logprobs", True))
    faults = [
        Fault(
            "config-conflict", f"vLLM cannot honour {name}", f"generation.{name}", value,
            fix=f"leave {name} out, or set generation.engine: auto",
        )
        for name, value in refused
    ]  # fmt: skip
    if faults:
        raise ConfigError(faults)


def refusal(adapter: Any, bits: int | None) -> str | None:
    """Why vLLM cannot run what was trained, by the config's ``adapter`` section and quantisation; None if it can."""
    if bits is not None and bits != 4:
        return f"a base in {bits} bits is not quantised on loading there"
    if adapter is None:
        return None
    if adapter.type != "lora":
        return f"it serves adapters of type lora, not {adapter.type}"
    if adapter.use_dora:
        return "it does not serve DoRA"
    if getattr(adapter, "modules_to_save", None):
        return "it does not serve adapters with modules_to_save"
    return f"its largest rank is {RANKS[-1]}" if largest_rank(adapter) > RANKS[-1] else None


def largest_rank(adapter: Any) -> int:
    """The rank to make room for."""
    return max(int(rank) for rank in (adapter.r, *(getattr(adapter, "rank_pattern", None) or {}).values()))
