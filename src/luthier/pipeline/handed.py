"""A model that another engine runs: it answers, and does nothing else. Implements `model.tunable.Tunable`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from luthier.assets.adapter_bounds import check_adapter
from luthier.assets.spec import read_json
from luthier.config import Config
from luthier.errors import ConfigError
from luthier.events import Sink, silent
from luthier.infer.vllm import Handed, VllmEngine, installed, largest_rank, refusal
from luthier.model.adapters import check_base
from luthier.model.tunable import Tokens, no_base
from luthier.train.precision import Precision
from luthier.types import Base, Batch, Engine, Plan

if TYPE_CHECKING:
    from luthier.run import RunFolder

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class HandedOver:
    """The weights stay where they are; vLLM loads them when the first question comes."""

    shares = False

    def __init__(self, handed: Handed, base: Base, tuned: Literal["adapter", "weights", "nothing"]) -> None:
        """``tuned``: what of it is other than ``base``."""
        self.handed, self.base, self.tuned = handed, base, tuned

    @property
    def has_base(self) -> bool:
        """Whether the base can still be asked."""
        return self.tuned != "weights"

    def engine(
        self, tokenizer: Tokens, *, batch_size: int | None = None, use_base: bool = False, sink: Sink = silent
    ) -> Engine:
        """Generation by vLLM, which decides itself how many rows it answers at once."""
        if use_base and not self.has_base:
            raise no_base()
        spec = self.base.spec
        return VllmEngine(
            self.handed, tokenizer, vocabulary=spec.vocab, context=spec.context, use_base=use_base, sink=sink
        )

    def base_only(self) -> AbstractContextManager[Any]:
        """Nothing to switch: who asks says which model. Raises RunError when all weights were tuned."""
        if self.has_base:
            return nullcontext()
        raise no_base()

    @property
    def module(self) -> torch.nn.Module:
        """There is none here."""
        raise _only_answers("weights")

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Not known here."""
        raise _only_answers("scores of given answers (probabilities of classes)")

    def score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Not known here."""
        raise _only_answers("scores of given answers")

    def penalty(self) -> torch.Tensor | None:
        """Nothing is trained."""
        return None

    def after_update(self, step: int) -> None:
        """Nothing is trained."""

    def state(self) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def adopt(self, plan: Plan) -> None:
        """Nothing is executed here."""

    def save(self, folder: Path) -> Path:
        """Not here."""
        raise _only_answers("saving")


def hand_over(settings: Config, base: Base, precision: Precision, run: RunFolder | None) -> HandedOver:
    """The base, or what a run made of it, for vLLM.

    Raises DependencyError without it, ConfigError where it cannot, AssetError for a damaged adapter or another base's.
    """
    installed()
    whole = run is not None and run.weights.is_dir()
    folder = run.adapter if run is not None and settings.adapter is not None and not whole else None
    if folder is not None:
        check_base(folder, base.content_hash)
        check_adapter(folder)
    saved = read_json(folder / "adapter_config.json") if folder is not None else None
    quantization = settings.quantization if not whole else None
    why_not = refusal(saved, quantization.bits if quantization else None)
    if why_not:
        raise ConfigError(
            "config-conflict", f"vLLM cannot run this model: {why_not}", where="generation.engine", received="vllm",
            allowed="a base, or a plain LoRA, that vLLM serves",
            fix="set generation.engine: auto, or merge the adapter (adapter.postprocessor) and serve merged/",
        )  # fmt: skip
    handed = Handed(
        run.weights.absolute() if run is not None and whole else base.path,
        base.path,
        DTYPES[precision],
        adapter=folder.absolute() if folder is not None else None,
        rank=largest_rank(saved) if saved is not None else 0,
        four_bits=quantization is not None,
    )
    return HandedOver(handed, base, "weights" if whole else "adapter" if folder is not None else "nothing")


def _only_answers(what: str) -> ConfigError:
    return ConfigError(
        "config-conflict", f"vLLM only answers: {what} are not to be had from it", where="generation.engine",
        received="vllm", allowed=("auto", "luthier"), fix="set generation.engine: auto for this",
    )  # fmt: skip
