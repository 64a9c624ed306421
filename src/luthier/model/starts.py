"""How LoRA's factors start where they are not drawn: from the base's weights, from rows, from what quantising lost.

A start is a function from the base and what it may look at to factors A [r, in] and B [out, r]; one function a kind,
made of PEFT's own. No start changes the base. Those that are defined by taking out of the base what they put into the
factors (W - s B₀A₀ + s BA) leave it where it is and train the left half of factors of twice the rank, [A; A₀] and
[B, -B₀]: the same function of the same weights, and a plain LoRA on the base as it is when it is saved.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from luthier import events
from luthier.data.collate import collate
from luthier.errors import DependencyError, RunError
from luthier.model.generic import GenericModel
from luthier.model.load import read_weights
from luthier.registry import Registry
from luthier.run import atomic, sealed
from luthier.types import Example

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

T = TypeVar("T")
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # of each layer: A [r, in] and B [out, r], fp32
UNSAVED = ("corda", "lora_ga", "loftq", "pissa_niter")  # whose changed base PEFT's own adapters do not tell
PASSES = 1000  # of rows through the model, until eva's directions have to stand still
ONE, NAME = "it", "default"  # the layer in a holder of its own; PEFT's name of the adapter


@dataclass(frozen=True)
class Place:
    """A layer that gets factors: its width, their rank, and how their product is scaled."""

    inputs: int
    outputs: int
    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class Asked:
    """What a start may look at. ``rows``: examples of the training, for those that need some."""

    base: PreTrainedModel
    section: Any
    places: Mapping[str, Place]
    rows: Sequence[Example] = ()
    sink: events.Sink = events.silent

    def told(self, items: Sequence[T], unit: str) -> Iterator[T]:
        """``items``, while the sink is told how many have gone by."""
        return events.progress(self.sink, "start", items, unit=unit)

    def config(self, **own: Any) -> LoraConfig:
        """The section as PEFT's functions want it: ``own`` keys, and the layers by their full names."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.section.r,
            target_modules=list(self.places),
            rank_pattern={name: one.rank for name, one in self.places.items() if one.rank != self.section.r},
            init_lora_weights=self.section.init_lora_weights,
            **own,
        )


STARTS: Registry[Callable[[Asked], Factors]] = Registry("start of LoRA")


def kind_of(section: Any) -> str | None:
    """The registered start that an adapter's section asks for; None where PEFT makes the factors alone."""
    kind = str(getattr(section, "init_lora_weights", "")).partition("_niter_")[0]
    new = section.type == "lora" and section.pretrained_adapter_weights is None
    return kind if new and kind in STARTS else None


def takes(section: Any) -> bool:
    """Whether factors of twice the rank are made, of which half is trained."""
    return kind_of(section) is not None and bool(section.takes_out)


def begin(
    base: PreTrainedModel,
    plain: LoraConfig,
    section: Any,
    rows: Sequence[Example] = (),
    kept: Path | None = None,
    sink: events.Sink = events.silent,
) -> tuple[LoraConfig, Factors]:
    """The factors that training begins with, and PEFT's configuration of the adapter that holds them.

    ``plain``: the configuration of a LoRA drawn instead. ``kept``: the file that the factors are read from where it
    is there, and else written to: what was begun with is never made twice, since it may be another one the next time.
    Raises ValueError where a rank is too large for a layer, RunError run-damaged, and what PEFT raises.
    """
    places = _places(base, plain)
    factors = _read(kept, next(base.parameters()).device) if kept is not None and kept.is_file() else {}
    if not factors:
        factors = _made(Asked(base, section, places, rows, sink))
        if kept is not None:
            _write(kept, factors)
    return _shaped(plain, section, places, factors), factors


def _made(asked: Asked) -> Factors:
    kind = kind_of(asked.section)
    assert kind is not None and (asked.rows or not asked.section.looks_at_rows), "a start from rows needs rows"
    made = STARTS.get(kind)(asked)
    for name, (a, b) in made.items():
        place = asked.places[name]
        rank = place.rank if kind != "eva" else len(a)
        if a.shape != (rank, place.inputs) or b.shape != (place.outputs, rank):
            raise ValueError(f"{name} has not {place.rank} directions to start from: lower r")
    return {name: (a.float().contiguous(), b.float().contiguous()) for name, (a, b) in made.items()}


def _read(path: Path, device: torch.device) -> Factors:
    why = sealed.fault(path)
    if why:
        raise RunError(
            "run-damaged", f"what the training began with cannot be read: {why}", where=str(path), received=why,
            allowed="the file as the training wrote it",
            fix="restore the file from a copy or a mirror, or start a new run in another folder",
        )  # fmt: skip
    found = read_weights(path)
    names = [key.removesuffix(".A") for key in found if key.endswith(".A")]
    return {name: (found[f"{name}.A"].to(device), found[f"{name}.B"].to(device)) for name in sorted(names)}


def _write(path: Path, factors: Factors) -> None:
    from safetensors.torch import save

    tensors = {f"{name}.{side}": one.cpu() for name, pair in factors.items()
               for side, one in zip("AB", pair, strict=True)}  # fmt: skip
    atomic.write_bytes(path, sealed.seal(save(tensors, metadata={"sha256": sealed.OPEN})))


def _shaped(plain: LoraConfig, section: Any, places: Mapping[str, Place], factors: Factors) -> LoraConfig:
    """``plain`` with the ranks of ``factors``, twice them where half is frozen.

    A layer whose rank is another than the section's keeps the scale of its update, unless eva's section says otherwise.
    """
    times = 2 if takes(section) else 1
    grow = times**0.5 if section.use_rslora else times  # alpha's, so that the scale stays
    keep = section.eva_config is None or section.eva_config.adjust_scaling_factors
    out = copy.copy(plain)
    out.r, out.lora_alpha = times * plain.r, _whole(grow * plain.lora_alpha)  # type: ignore[assignment]  # any number
    ranks = {name: times * len(a) for name, (a, _) in factors.items()}
    alphas = {
        name: _whole(grow * places[name].alpha * (len(a) / places[name].rank if keep else 1))
        for name, (a, _) in factors.items()
    }
    out.rank_pattern = {name: rank for name, rank in ranks.items() if rank != out.r}
    out.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != out.lora_alpha}
    if factors.keys() != places.keys():  # eva has left layers without a rank
        out.target_modules = set(factors)  # type: ignore[assignment]  # as PEFT keeps them
    return out


@torch.no_grad()
def put(tuned: PeftModel, factors: Factors, section: Any) -> None:
    """Begin with ``factors``; where they are taken out of the base, their negative stands frozen beside them."""
    for name, (a, b) in factors.items():
        layer: Any = tuned.get_base_model().get_submodule(name)
        for module, start, frozen, side in ((layer.lora_A, a, a, 0), (layer.lora_B, b, -b, 1)):
            linear = module[NAME]
            start, frozen = start.to(linear.weight), frozen.to(linear.weight)
            if takes(section):
                parametrize.register_parametrization(linear, "weight", Beside(frozen, side))
                linear.parametrizations.weight.original.copy_(start)
            else:
                linear.weight.copy_(start)


class Beside(nn.Module):
    """A weight whose first half along ``side`` is trained and whose second half stays ``frozen``."""

    frozen: torch.Tensor

    def __init__(self, frozen: torch.Tensor, side: int) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("frozen", frozen.clone(), persistent=False)

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        """The whole weight."""
        return torch.cat([trained, self.frozen.to(trained.dtype)], self.side)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        """The trained half of a whole weight."""
        return whole.narrow(self.side, 0, self.frozen.shape[self.side]).clone()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model, halves put together to the weights that they are of."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            del state[f"{name}.parametrizations.weight.original"]
            state[f"{name}.weight"] = module.weight.detach()  # type: ignore[operator,union-attr]
    return state


@STARTS.register("pissa", "olora")
def _of_weights(asked: Asked) -> Factors:
    layers = asked.told(list(asked.places), "layers")
    return {name: _peft_start(asked, name, _linear(asked.base.get_submodule(name))) for name in layers}


@STARTS.register("corda")
def _corda(asked: Asked) -> Factors:
    """Row by row: PEFT sums the products of one sequence's inputs, padding and all."""
    from peft.tuners.lora.config import CordaConfig

    try:
        from peft.tuners.lora.corda import preprocess_corda
    except ImportError as error:
        raise DependencyError(
            "dependency-missing",
            f"init_lora_weights: corda is PEFT's, which needs another package: {error}",
            where="adapter.init_lora_weights",
            received="corda, no package attrs",
            allowed="corda with attrs installed",
            fix="pip install attrs",
        ) from error
    section, generic = asked.section.corda_config, GenericModel(asked.base)
    details = CordaConfig(corda_method=section.corda_method if section else "ipm")

    def run() -> None:
        for row in asked.told(asked.rows, "rows"):
            generic.score(collate([row]))

    preprocess_corda(asked.base, asked.config(corda_config=details), run_model=run)
    return _with_found(asked, "eigens", corda_config=details)


@STARTS.register("lora_ga")
def _lora_ga(asked: Asked) -> Factors:
    """The gradient of the loss over all rows, each trained token weighing as it does in training."""
    from peft import LoraGAConfig, preprocess_loraga

    section, generic = asked.section.lora_ga_config, GenericModel(asked.base)
    for name, place in asked.places.items():
        if 2 * place.rank > min(place.inputs, place.outputs):  # PEFT would fail on its way
            raise ValueError(f"lora_ga chooses among 2 r directions, and {name} has fewer: lower r")
    details = LoraGAConfig(**(section.model_dump() if section else {}))
    batches = [batch for batch in (collate([row]) for row in asked.rows) if batch.target_weight.any()]
    total = float(sum(batch.target_weight.sum() for batch in batches))

    def step() -> None:
        for batch in asked.told(batches, "rows"):
            logprobs = generic.logprobs(batch)
            weight = batch.target_weight[batch.target_weight != 0].to(logprobs)
            loss = -(logprobs * weight).sum() * (len(batches) / total)  # PEFT divides by the number of passes
            loss.backward()  # type: ignore[no-untyped-call]

    preprocess_loraga(asked.base, asked.config(lora_ga_config=details), step)
    return _with_found(asked, "_peft_loraga_grad", lora_ga_config=details)


@STARTS.register("eva")
def _eva(asked: Asked) -> Factors:
    """Directions in which the inputs of a layer vary most, as many as help; layers may end with none."""
    from peft import EvaConfig, get_eva_state_dict

    section = asked.section.eva_config
    details = EvaConfig(**(section.model_dump() if section else {}))
    need = 2 * max(round(place.rank * details.rho) for place in asked.places.values())  # of PEFT's search
    narrow = min(place.inputs for place in asked.places.values())
    if need > narrow:
        raise ValueError(
            f"eva looks among 2 rho r = {need} directions, a layer has {narrow}: lower r or eva_config.rho"
        )
    passes, last = iter(range(PASSES)), {}
    if "logits_to_keep" in inspect.signature(asked.base.forward).parameters:
        last = {"logits_to_keep": 1}

    def forward(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
        if next(passes, None) is None:
            raise ValueError(f"eva finds no end in {PASSES} passes: raise init_rows or lower eva_config.tau")
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **last)

    found = get_eva_state_dict(
        asked.base,
        _padded(asked.rows, need, trained_only=details.use_label_mask),
        asked.config(eva_config=details),
        forward_fn=forward,
        gather_distributed_inputs=False,  # one rank makes the start of all
        show_progress_bar=False,
    )
    return {name: (a, a.new_zeros(asked.places[name].outputs, len(a))) for name, a in found.items() if len(a)}


@STARTS.register("loftq")
def _loftq(asked: Asked) -> Factors:
    """The best factors of what quantising took from each weight (Li et al. 2023, LoftQ, one round).

    PEFT's own function runs on a GPU alone and leaves the scale of the update out.
    """
    from peft.utils.integrations import dequantize_module_weight

    out: Factors = {}
    stored = _stored(Path(str(asked.base.name_or_path)), list(asked.places))
    for name, weight in events.progress(asked.sink, "start", stored, len(asked.places), "layers"):
        place = asked.places[name]
        held = dequantize_module_weight(asked.base.get_submodule(name)).float()
        u, s, vh = torch.linalg.svd(weight.to(held) - held, full_matrices=False)
        root = (s[: place.rank] / place.scale).sqrt()
        out[name] = (root[:, None] * vh[: place.rank], u[:, : place.rank] * root)
    return {name: out[name] for name in asked.places}


def _peft_start(asked: Asked, name: str, linear: nn.Linear, **own: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors that PEFT gives a layer; ``linear`` is a copy, from which they are taken out."""
    from peft import LoraConfig, inject_adapter_in_model

    place, section = asked.places[name], asked.section
    if place.rank > min(place.inputs, place.outputs):  # PEFT would make fewer, or fail on its way
        raise ValueError(f"r is {place.rank} and {name} has {min(place.inputs, place.outputs)} directions: lower r")
    config = LoraConfig(
        r=place.rank,
        lora_alpha=place.alpha,  # type: ignore[arg-type]  # any number
        use_rslora=section.use_rslora,
        init_lora_weights=section.init_lora_weights,
        target_modules=[ONE],
        **own,
    )
    layer: Any = inject_adapter_in_model(config, nn.ModuleDict({ONE: linear})).get_submodule(ONE)
    return layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()


def _with_found(asked: Asked, attribute: str, **own: Any) -> Factors:
    """The factors that PEFT makes of what its preprocessing left at each layer, which is taken away from there."""
    out: Factors = {}
    for name in asked.told(list(asked.places), "layers"):
        module = asked.base.get_submodule(name)
        linear = _linear(module)
        if hasattr(module, attribute):
            found = getattr(module, attribute)
            delattr(module, attribute)
            lies_across = torch.is_tensor(found) and not isinstance(module, nn.Linear)  # GPT-2's, with its weight
            setattr(linear, attribute, found.T if lies_across else found)
        out[name] = _peft_start(asked, name, linear, **own)
    return out


@torch.no_grad()
def _linear(module: nn.Module) -> nn.Linear:
    """A linear layer with a copy of a layer's weight, de-quantised, in fp32."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(module).detach()
    weight = weight if isinstance(module, nn.Linear) else weight.T  # GPT-2 keeps it as [in, out]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(torch.float32, copy=True).contiguous(), requires_grad=False)
    return linear


def _places(base: PreTrainedModel, plain: LoraConfig) -> dict[str, Place]:
    """The layers that the configuration means: PEFT finds them, puts factors there, and they are taken off again."""
    import peft

    tried = copy.copy(plain)
    tried.modules_to_save = None
    tuned = peft.get_peft_model(base, tried)
    tables = [name for name, module in tuned.get_base_model().named_modules()
              if NAME in getattr(module, "lora_embedding_A", {})]  # fmt: skip
    found = {
        name: Place(
            module.in_features, module.out_features, module.r[NAME], module.lora_alpha[NAME], module.scaling[NAME]
        )
        for name, module in tuned.get_base_model().named_modules()
        if NAME in getattr(module, "lora_A", {})
    }
    tuned.unload()  # type: ignore[operator]
    base.requires_grad_(False)
    if tables:  # PEFT's starts know linear layers; a table would get factors of twice the rank, drawn and all trained
        raise ValueError(
            f"{tables[0]} is a table, and {plain.init_lora_weights or 'such a start'} starts linear layers"
        )
    return found


def _padded(rows: Sequence[Example], need: int, *, trained_only: bool) -> list[dict[str, torch.Tensor]]:
    """Batches of whole rows as PEFT takes them, each with at least ``need`` tokens that count."""
    groups: list[list[Example]] = [[]]
    for row in rows:
        if _counted(groups[-1], trained_only) >= need:
            groups.append([])
        groups[-1].append(row)
    if (last := _counted(groups[-1], trained_only)) < need:
        if len(groups) == 1:
            raise ValueError(f"eva needs {need} tokens and the rows hold {last}: raise init_rows, or lower r")
        groups[-2:] = [groups[-2] + groups[-1]]
    return [_batch(group) for group in groups]


def _counted(rows: Sequence[Example], trained_only: bool) -> int:
    return sum(sum(1 for weight in row.weights if weight) if trained_only else row.length for row in rows)


def _batch(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    shape = (len(rows), max(row.length for row in rows))
    ids, mask, labels = torch.zeros(shape).long(), torch.zeros(shape).long(), torch.full(shape, -100)
    for at, row in enumerate(rows):
        taken = torch.tensor(list(row.ids))
        ids[at, : row.length], mask[at, : row.length] = taken, 1
        labels[at, : row.length] = torch.where(torch.tensor(list(row.weights)) != 0, taken, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _stored(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of layers as they are stored, before quantising. Raises ValueError where one has another name."""
    from safetensors import safe_open

    missing = {f"{name}.weight": name for name in names}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in missing.keys() & set(file.keys()):
                yield missing.pop(key), file.get_tensor(key)
    if missing:
        raise ValueError(f"loftq needs the stored weights, and the base's files have no {next(iter(missing))}")


def _whole(value: float) -> float:
    """As an integer where it is one."""
    return int(value) if float(value).is_integer() else value
