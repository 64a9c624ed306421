"""`Config`: all sections together, frozen, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from luthier.config.adapter import Adapter, Lora
from luthier.config.backend import Backend
from luthier.config.defaults import Filled, Path, fill_ludwig, filled
from luthier.config.execution import Execution
from luthier.config.features import Feature
from luthier.config.generation import Generation
from luthier.config.model_parameters import ModelParameters
from luthier.config.preprocessing import Preprocessing
from luthier.config.prompt import Prompt
from luthier.config.quantization import Quantization
from luthier.config.section import Conflict, Int, Section, key
from luthier.config.trainer import FULL_LEARNING_RATE, Trainer


class Config(Section):
    """One declaration: base model, data, prompt, what is trained and how."""

    model_type: Literal["llm"] = key("llm", "The kind of model.")
    name: str | None = key(None, "Name of the run; empty: from the dataset.", min_length=1, max_length=100)
    base_model: str = key(
        ...,
        "Hub id, folder, .gguf file, or a built-in name such as smollm2. A relative path is looked for beside the "
        "config first, then in the working directory; a run that goes on takes the place that it has recorded.",
        min_length=1,
    )
    dataset: str | None = key(
        None,
        "Data file, folder or hub dataset, where the command line names none. A relative path is looked for beside the "
        "config first, then in the working directory; a run that goes on takes the place that it has recorded.",
    )
    input_features: Annotated[tuple[Feature, ...], Field(min_length=1)] | None = key(
        None, "Columns of the prompt; empty: from the template and the data."
    )
    output_features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=1)] | None = key(
        None, "The column to learn; empty: from the data."
    )
    prompt: Prompt = key(Prompt, "How a row becomes a prompt.")
    preprocessing: Preprocessing = key(Preprocessing, "How rows are read, split and cut.")
    generation: Generation = key(Generation, "How answers are drawn.")
    adapter: Adapter | None = Field(
        default_factory=lambda: Lora.model_validate({}),
        description="Which small set of weights is trained; null trains all weights.",
        json_schema_extra={
            "ludwig": None,
            "why": "nearly as good as training all weights, at a fraction of the memory",
        },
    )
    quantization: Quantization | None = key(None, "Store the base in 4 or 8 bits; empty: as it is.")
    model_parameters: ModelParameters = key(ModelParameters, "Small changes to the base model.")
    trainer: Trainer = key(Trainer, "What is learned and for how long.")
    backend: Backend = key(Backend, "Where the run is executed.")
    execution: Execution = key(Execution, "Pins for what is otherwise planned; changes time and memory only.")
    defaults: Literal["luthier", "ludwig"] = key("luthier", "Whose defaults fill the keys that are left out.")
    random_seed: Int = key(42, "Seed of everything random.", ge=0, lt=2**32)

    _given: frozenset[Path] = PrivateAttr(default=frozenset())
    _file: FilePath | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _conditional_defaults(cls, data: Any) -> Any:
        """Ludwig's defaults where asked for; all weights at once want a tenth of an adapter's learning rate."""
        if not isinstance(data, dict):
            return data
        if data.get("defaults") == "ludwig":
            data = fill_ludwig(cls, data)
        if data.get("adapter", ...) is not None:
            return data
        trainer = data.get("trainer") or {}
        if isinstance(trainer, dict) and "learning_rate" not in trainer:
            return {**data, "trainer": {**trainer, "learning_rate": FULL_LEARNING_RATE}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.quantization and self.adapter is None and self.trainer.type == "finetune":
            raise Conflict(
                "a quantised base cannot be trained whole",
                received=f"quantization.bits: {self.quantization.bits}, adapter: null",
                allowed="quantization with an adapter, or neither",
                fix="give an `adapter`, or leave `quantization` out",
            )
        if self.quantization and self.adapter and self.adapter.postprocessor.merge_adapter_into_base_model:
            raise Conflict(
                "an adapter is not merged into a quantised base",
                received=f"quantization.bits: {self.quantization.bits}, merge_adapter_into_base_model: true",
                allowed="merging into a base that is not quantised",
                fix="leave out `quantization`, or the merging",
            )
        start = getattr(self.adapter, "init_lora_weights", None)
        if start == "loftq" and self.quantization is None:
            raise Conflict(
                "init_lora_weights: loftq makes up for what quantising loses, and the base is not quantised",
                received="init_lora_weights: loftq, no quantization",
                allowed="loftq with quantization.bits",
                fix="give `quantization`, or use pissa",
            )
        if start in ("corda", "lora_ga") and self.quantization:
            raise Conflict(
                f"init_lora_weights: {start} needs weights that are not quantised",
                received=f"init_lora_weights: {start}, quantization.bits: {self.quantization.bits}",
                allowed=f"{start} on a base that is not quantised",
                fix="leave `quantization` out, or use eva",
            )
        task, template = self.prompt.task, self.prompt.template
        if task and template and "{__task__}" not in template:
            raise Conflict(
                "prompt.task is given and prompt.template does not say where",
                received=f"prompt.task: {task}",
                allowed="a prompt.template that holds {__task__}",
                fix="put {__task__} into prompt.template, or leave prompt.task out",
            )
        if template and isinstance(self.prompt.chat_template, str):
            raise Conflict(
                "prompt.template and a Jinja prompt.chat_template are both given",
                received="prompt.template and prompt.chat_template",
                allowed="one of the two",
                fix="leave prompt.template out, or prompt.chat_template",
            )
        return self

    def __eq__(self, other: object) -> bool:
        """Equal when every key has the same value, whoever gave it."""
        return isinstance(other, Config) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @property
    def effective_batch(self) -> int:
        """Rows of one optimizer step, over all ranks."""
        return self.trainer.effective_batch

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, as JSON types. `load` of it gives an equal config."""
        return self.model_dump(mode="json")

    @property
    def file(self) -> FilePath | None:
        """The file that the config was read from, beside which relative names are looked for."""
        return self._file

    def filled(self) -> tuple[Filled, ...]:
        """What was filled in where the user was silent, and differs from Ludwig or is worth telling."""
        return filled(self, self._given)


def with_features(
    config: Config, inputs: Sequence[str], output: str, output_type: Literal["text", "category"] = "text"
) -> Config:
    """A new config whose features are the derived ones; features that were given stay as they are."""
    update: dict[str, Any] = {}
    if config.input_features is None and inputs:
        update["input_features"] = tuple(Feature(name=name) for name in inputs)
    if config.output_features is None:
        update["output_features"] = (Feature(name=output, type=output_type),)
    return config.model_copy(update=update)
