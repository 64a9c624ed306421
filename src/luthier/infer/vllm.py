"""Requests handed to vLLM, where it is installed: the same prompt ids, settings mapped one by one, the adapter.

Run with vLLM 0.32 on a CPU (`tests/e2e/test_vllm.py`). What it cannot honour, or would honour in another sense, is
refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier import json_reader
from luthier.errors import ConfigError, DependencyError, Fault, LuthierError
from luthier.events import Sink, progress, silent
from luthier.infer.answer import Answers
from luthier.infer.drawing import request_seed
from luthier.infer.grammar import BETWEEN
from luthier.infer.several import completed
from luthier.infer.words import banned_ids
from luthier.model.tunable import Tokens
from luthier.types import Completion, Request, Sampling

BLOCK = 1024  # rows handed over together; their answers come back together
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for
CONSTRAINTS = {"schema": "json", "regex": "regex", "choices": "choice"}  # ours -> StructuredOutputsParams
HONOURED = ("min_p", "logit_bias", "bad_words", "bad_words_ids", "max_length", *CONSTRAINTS)  # of `Sampling.extra`
TEMPERATURES = (0.01, 2.0)  # it raises a lower one to the first without an error, and refuses a higher one
MOST_BANNED = (128, 1024)  # sequences and their tokens in a request; on a GPU more of them end its process
MOST_BIASED = 1024  # tokens with a bias, likewise
# What an adapter's config may say besides nothing. Other starts belong to a base that they changed; those that Luthier
# trains are saved as plain ones.
PLAIN_LORA: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "lora_bias": (False,), "modules_to_save": ([],),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "mica", "eva"), "layer_replication": ([],),
    "use_qalora": (False,), "alora_invocation_tokens": ([],), "trainable_token_indices": ([],),
    "target_parameters": ([],),
}  # fmt: skip
# What the package is told before it is imported, unless the environment says otherwise: answers have stdout for
# themselves, a start writes no hundred lines, and nothing is sent over a network.
SURROUNDINGS: Mapping[str, str] = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip
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
        """The loaded model; made once, since that takes vLLM a minute. Raises DependencyError where it cannot begin."""
        # The longest context that its memory holds, where the model's own is longer; vLLM alone would give up there.
        options: dict[str, Any] = {"max_model_len": -1}
        # Its way to follow a constraint that reads schemas and expressions as Luthier's engine does.
        options["structured_outputs_config"] = {"backend": "guidance"}
        if on_cpu():
            options["enable_chunked_prefill"] = False  # 0.32 ends there at a seeded answer to a prompt read in parts
        if self.adapter is not None:
            options |= {"enable_lora": True, "max_lora_rank": next(rank for rank in RANKS if rank >= self.rank)}
        if self.four_bits:
            options["quantization"] = "bitsandbytes"
        with failures("load this model"):
            return self.api.LLM(model=str(self.model), tokenizer=str(self.tokenizer), dtype=self.dtype, **options)

    @property
    def context(self) -> int:
        """Positions that a prompt and its answer have."""
        return int(self.llm.llm_engine.model_config.max_model_len)

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
        self._answers_of_model = Answers(
            tokenizer, tuple(dict.fromkeys(map(int, tokenizer.eos_ids))), context, vocabulary
        )

    @cached_property
    def answers(self) -> Answers:
        """The bounds of the model as it is loaded."""
        known = self._answers_of_model
        return replace(known, limit=min(self.handed.context, known.limit or self.handed.context))

    def refusal(self, request: Request) -> Fault | None:
        """Why this request cannot be answered, or None."""
        return self.answers.refusal(request)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions in blocks. A row that cannot be run yields an error.

        Raises ConfigError config-conflict for a setting that vLLM cannot honour, before anything is generated, and
        DependencyError dependency-failed where vLLM itself ends.
        """
        waiting = list(requests)
        for sampling in {id(request.sampling): request.sampling for request in waiting}.values():
            check(sampling)
        done = completed(waiting, self.refusal, self._answers)
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
            params = [self._params(request) for request in block]
            with failures("answer"):
                outputs = self.handed.llm.generate(
                    [{"prompt_token_ids": list(request.prompt_ids)} for request in block],
                    params,
                    lora_request=None if self.use_base else self.handed.lora,
                    use_tqdm=False,
                )
            for request, output in zip(block, outputs, strict=True):
                (answer,) = output.outputs
                yield self._completion(request, list(answer.token_ids), answer.finish_reason)

    def _completion(self, request: Request, ids: list[int], reason: str | None) -> Completion:
        if reason not in ("stop", "length"):
            fault = f"vLLM did not finish this answer ({reason})"
            return Completion(request.key, (), "", "error", error=fault, number=request.number)
        if any(holds(ids, banned) for banned in self._banned(request)):
            fault = "vLLM's answer holds what generation.bad_words bans: this version does not take them as ids"
            return Completion(request.key, (), "", "error", error=fault, number=request.number)
        done = self.answers.completion(request, ids)
        # An end may be left out of the ids; vLLM's word for why it ended holds then.
        return replace(done, finish_reason="stop") if reason == "stop" else done

    def _banned(self, request: Request) -> list[list[int]]:
        ends = [[end] for end in self.answers.ends]
        return [ids for ids in banned_ids(request.sampling.extra) or () if ids not in ends]

    def _params(self, request: Request) -> Any:
        given = fields_of(request, self.answers.steps(request), self.answers.ends)
        constraint = given.pop("structured_outputs", None)
        with failures("take these settings"):
            if constraint is not None:
                from vllm.sampling_params import StructuredOutputsParams

                given["structured_outputs"] = StructuredOutputsParams(**constraint)
            params = self.handed.api.SamplingParams(**given)
        # Given as texts, it would leave out the spelling after a space where that has another number of tokens.
        params._bad_words_token_ids = self._banned(request) or None
        return params


@contextmanager
def failures(what: str) -> Iterator[None]:
    """Turn what vLLM raises into ConfigError where it refuses a value, else DependencyError. ``what``: it could not."""
    try:
        yield
    except LuthierError:
        raise
    except Exception as error:
        told = f"vLLM could not {what}: {' '.join(str(error).split()) or type(error).__name__}"
        place = {"where": "generation.engine", "received": "vllm"}
        if isinstance(error, ValueError):
            fix = "set generation.engine: auto"
            raise ConfigError("config-conflict", told, **place, allowed="what vLLM takes", fix=fix) from error
        fix = "look above for what it wrote itself, or set generation.engine: auto"
        raise DependencyError("dependency-failed", told, **place, fix=fix) from error


def installed() -> Any:
    """The package vllm. Raises DependencyError: dependency-missing without it, dependency-failed if it cannot begin."""
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    with failures("be imported"):
        try:
            import vllm  # type: ignore[import-not-found,unused-ignore]
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise DependencyError(
                "dependency-missing",
                "generation.engine: vllm needs the package 'vllm', which is not installed",
                where="generation.engine",
                received="vllm, not installed",
                fix="pip install 'vllm>=0.20'   (on a CUDA machine), or leave generation.engine out",
            ) from error
    return vllm


def on_cpu() -> bool:
    """Whether vLLM computes on the CPU."""
    installed()
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    """Whether ``part`` stands in ``ids``, in one piece."""
    return any(list(ids[at : at + len(part)]) == list(part) for at in range(len(ids) - len(part) + 1))


def fields_of(request: Request, steps: int, ends: Sequence[int]) -> dict[str, Any]:
    """The keyword arguments of vLLM's `SamplingParams`; a constraint as those of `StructuredOutputsParams`."""
    sampling, extra = request.sampling, request.sampling.extra
    out: dict[str, Any] = {
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
        "detokenize": bool(sampling.stop),
    }
    for ours, theirs in CONSTRAINTS.items():
        if extra.get(ours) is not None:
            value = extra[ours]
            out["structured_outputs"] = {theirs: list(value) if ours == "choices" else value}
            if ours == "schema":
                schema = json_reader.parse(value) if isinstance(value, str) else value
                if isinstance(schema, Mapping):
                    out["structured_outputs"] = {theirs: {"x-guidance": dict(BETWEEN), **schema}}
    return out


def check(sampling: Sampling) -> None:
    """Raise ConfigError config-conflict for every setting that vLLM cannot honour."""
    refused = [
        (name, value, "")
        for name, value in sampling.extra.items()
        if name not in HONOURED and value not in (None, ()) and value not in IDLE.get(name, ())
    ]
    if sampling.num_beams == 1:
        refused = [one for one in refused if one[0] != "length_penalty"]
    if sampling.num_beams > 1:
        refused.append(("num_beams", sampling.num_beams, ""))
    if sampling.logprobs:
        refused.append(("logprobs", True, ""))
    faults = [
        Fault(
            "config-conflict", f"vLLM cannot honour {name}{why}", f"generation.{name}", value,
            f"{name} with another engine",
            fix=f"leave {name} out, or set generation.engine: auto",
        )
        for name, value, why in refused + _beyond(sampling)
    ]  # fmt: skip
    if faults:
        raise ConfigError(faults)


def _beyond(sampling: Sampling) -> list[tuple[str, Any, str]]:
    """The settings that vLLM knows, but not with these values: name, value, why."""
    out: list[tuple[str, Any, str]] = []
    low, high = TEMPERATURES
    if sampling.do_sample and not low <= sampling.temperature <= high:
        out.append(("temperature", sampling.temperature, f" outside {low} to {high}"))
    if sampling.do_sample and sampling.top_p < 1 and sampling.extra.get("min_p"):
        out.append(("min_p", sampling.extra["min_p"], " beside top_p: it would apply min_p first"))
    banned = banned_ids(sampling.extra) or []
    sequences, tokens = MOST_BANNED
    if len(banned) > sequences or sum(map(len, banned)) > tokens:
        out.append(("bad_words", len(banned), f": more than {sequences} spellings, or {tokens} tokens in them"))
    biased = sampling.extra.get("logit_bias") or ()
    if len(biased) > MOST_BIASED:
        out.append(("logit_bias", len(biased), f" of more than {MOST_BIASED} tokens"))
    return out


def refusal(saved: Mapping[str, Any] | None, bits: int | None) -> str | None:
    """Why vLLM cannot run what was trained; None if it can. Raises DependencyError without it.

    ``saved``: what the adapter's ``adapter_config.json`` holds. ``bits``: the base's, None where it is not quantised.
    """
    if bits is not None and bits != 4:
        return f"a base in {bits} bits is not quantised on loading there"
    if bits is not None and not _has_bitsandbytes():
        return "this version of it has no bitsandbytes to quantise a base with"
    if saved is None:
        return None
    kind = str(saved.get("peft_type", "")).lower()
    if kind != "lora":
        return f"it serves adapters of type lora, not {kind}"
    # Versions differ in which of these they refuse, and which they run as if it were not there.
    for key, plain in PLAIN_LORA.items():
        if saved.get(key) not in (None, *plain):
            return f"it does not serve adapters with {key}: {saved[key]!r}"
    if (saved.get("rank_pattern") or saved.get("alpha_pattern")) and not _knows_patterns():
        return "this version of it scales all layers of an adapter alike: rank_pattern and alpha_pattern are lost"
    return f"its largest rank is {RANKS[-1]}" if largest_rank(saved) > RANKS[-1] else None


def largest_rank(saved: Mapping[str, Any]) -> int:
    """The rank to make room for."""
    return max(int(rank) for rank in (saved["r"], *(saved.get("rank_pattern") or {}).values()))


def _has_bitsandbytes() -> bool:
    installed()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return "bitsandbytes" in QUANTIZATION_METHODS


def _knows_patterns() -> bool:
    installed()
    from vllm.lora.peft_helper import PEFTHelper

    return "rank_pattern" in {one.name for one in fields(PEFTHelper)}
