"""Adapters through PEFT: made from the config's section and a seed, saved with their base's hash, loaded strictly."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from luthier import events, json_reader
from luthier.assets.adapter_bounds import check_adapter
from luthier.assets.adapter_files import adapter_folder, adapter_values, no_adapter
from luthier.errors import AssetError
from luthier.model import limits, starts
from luthier.model.adapted import put_on, without_remarks
from luthier.model.decoder.lora import start_a
from luthier.model.load import MISREAD, read_weights
from luthier.registry import Registry
from luthier.run.atomic import write_json
from luthier.types import Base, Example

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from transformers import PreTrainedModel

RECORD = "luthier.json"
WEIGHTS = "adapter_model.safetensors"
Values = dict[str, Any]
KINDS: Registry[Callable[[Any], Values]] = Registry("adapter")
CLASSES = {
    "lora": "LoraConfig", "adalora": "AdaLoraConfig", "ia3": "IA3Config", "vera": "VeraConfig", "loha": "LoHaConfig",
    "lokr": "LoKrConfig", "oft": "OFTConfig", "boft": "BOFTConfig", "ln_tuning": "LNTuningConfig",
}  # fmt: skip
NOT_ALL_LINEAR = ("ia3", "ln_tuning")  # their places are part of the method; PEFT knows them per architecture


@KINDS.register("lora")
def _lora(section: Any) -> Values:
    init = section.init_lora_weights
    values = {
        "r": section.r,
        "lora_alpha": section.alpha if section.alpha is not None else 2 * section.r,
        "lora_dropout": section.dropout,
        "bias": section.bias_type,
        "use_dora": section.use_dora,
        "use_rslora": section.use_rslora,
        "init_lora_weights": True if init == "default" or starts.kind_of(section) else init,
        "rank_pattern": dict(section.rank_pattern or {}),
        "alpha_pattern": dict(section.alpha_pattern or {}),
        "exclude_modules": _names(section.exclude_modules),
    }
    if section.layers_to_transform is not None:
        values["layers_to_transform"] = list(section.layers_to_transform)
    return values


@KINDS.register("adalora")
def _adalora(section: Any) -> Values:
    same = ("target_r", "init_r", "tinit", "tfinal", "beta1", "beta2", "orth_reg_weight", "total_step")
    values = _lora(section) | _take(section, *same) | {"deltaT": section.delta_t}
    del values["r"]  # AdaLoRA starts from init_r
    return values


@KINDS.register("ia3")
def _ia3(section: Any) -> Values:
    return {
        "feedforward_modules": _names(section.feedforward_modules),
        "init_ia3_weights": section.init_ia3_weights,
    }


@KINDS.register("vera")
def _vera(section: Any) -> Values:
    same = _take(section, "r", "d_initial", "projection_prng_key", "save_projection")
    return same | {"vera_dropout": section.dropout}


@KINDS.register("loha")
def _loha(section: Any) -> Values:
    return _take(section, "r", "alpha", "rank_dropout", "module_dropout")


@KINDS.register("lokr")
def _lokr(section: Any) -> Values:
    return _loha(section) | _take(section, "decompose_both", "decompose_factor")


@KINDS.register("oft")
def _oft(section: Any) -> Values:
    size = section.oft_block_size
    values = _take(section, "module_dropout", "coft", "eps", "block_share")
    return values | {"r": 0 if size else section.r, "oft_block_size": size}


@KINDS.register("boft")
def _boft(section: Any) -> Values:
    number = section.boft_block_num
    values = _take(section, "boft_n_butterfly_factor", "boft_dropout")
    return values | {"boft_block_size": 0 if number else section.boft_block_size, "boft_block_num": number}


@KINDS.register("ln_tuning")
def _ln_tuning(section: Any) -> Values:
    return {}


def peft_config(section: Any) -> PeftConfig:
    """The config's ``adapter`` section as PEFT's configuration; ``all-linear`` is what an empty target means."""
    import peft

    values = KINDS.get(section.type, "adapter.type")(section)
    targets = _names(section.target_modules)
    if targets is None and section.type not in NOT_ALL_LINEAR:
        targets = "all-linear"
    values["target_modules"] = targets
    if section.modules_to_save:
        values["modules_to_save"] = list(section.modules_to_save)
    config: PeftConfig = getattr(peft, CLASSES[section.type])(task_type="CAUSAL_LM", **values)
    return config


def add_adapter(
    model: PreTrainedModel,
    adapter_config: Any,
    seed: int,
    *,
    total_steps: int | None = None,
    expect_base_hash: str | None = None,
    rows: Sequence[Example] = (),
    kept: Path | None = None,
    sink: events.Sink = events.silent,
) -> PeftModel:
    """``model`` with a new adapter, trainable in fp32; the same seed gives the same weights.

    With ``pretrained_adapter_weights`` that adapter is loaded instead, to go on from, if it belongs to the base of
    ``expect_base_hash`` or does not say. AdaLoRA needs to know ``total_steps``, some starts of LoRA ``rows`` of the
    training; ``kept`` is the file of a start that is not drawn, see `starts.begin`.
    Raises AssetError: asset-unsupported when the adapter does not fit the model, asset-wrong-base.
    """
    if adapter_config.pretrained_adapter_weights:
        return _continue_from(model, adapter_config, expect_base_hash)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), without_remarks():
        torch.manual_seed(seed)
        names = limits.linear_names(model)
        try:
            adapter_config = limits.left_out(adapter_config, model, sink)
            adapter_config = limits.by_names(adapter_config, model)
            made, ready = peft_config_with_steps(adapter_config, total_steps), _ready(model)
            factors: starts.Factors = {}
            if starts.kind_of(adapter_config):
                made, factors = starts.begin(ready, cast("LoraConfig", made), adapter_config, rows, kept, sink)
            tuned = put_on(ready, made)
            _start(tuned, adapter_config, seed)
            starts.put(tuned, factors, adapter_config)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, TypeError, LookupError) as error:
            raise limits.does_not_fit(adapter_config, model, names, str(error)) from error
    limits.require_butterflies(tuned, adapter_config, device)
    return tuned


def _start(tuned: PeftModel, section: Any, seed: int) -> None:
    """LoRA starts from (seed, module) alone, as in the decoder: how a run is executed changes no number of it."""
    if section.type != "lora" or section.init_lora_weights not in ("default", "gaussian"):
        return
    with torch.no_grad():
        for name, module in tuned.get_base_model().named_modules():
            if "default" in getattr(module, "lora_A", {}):
                weight = module.lora_A["default"].weight
                weight.copy_(start_a(seed, name, weight.shape[0], weight.shape[1], section.init_lora_weights))


def peft_config_with_steps(section: Any, total_steps: int | None) -> PeftConfig:
    """`peft_config`, with AdaLoRA's number of steps filled in where the section leaves it to be counted."""
    if section.type == "adalora" and section.total_step is None:
        assert total_steps, "AdaLoRA's schedule needs the number of optimizer steps"
        section = section.model_copy(update={"total_step": total_steps})
    return peft_config(section)


def save_adapter(model: PeftModel, folder: Path, base: Base) -> None:
    """The adapter in PEFT's format, with sorted lists, and ``luthier.json`` that names its base and its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    with _all_ranks(model), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Could not find a config file"
        )  # PEFT asks the hub for the vocabulary
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=starts.whole_state(model))
    path = folder / "adapter_config.json"
    values = json_reader.read(path)
    values = {key: sorted(value) if _is_names(value) else value for key, value in values.items()}
    values["base_model_name_or_path"] = base.name  # not the cache folder of this machine
    write_json(path, values)
    write_json(folder / RECORD, {"format": 1, "base": base.name, "base_hash": base.content_hash})


def load_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    expect_base_hash: str | None = None,
    trainable: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> PeftModel:
    """``model`` with the adapter in ``folder``; every weight of it must be there, and none besides.

    ``changes`` are put into its config: what is of training and not of its weights.
    Raises AssetError: asset-not-found, asset-wrong-base when its record names another base than
    ``expect_base_hash``, asset-damaged for missing, surplus or misshapen weights.
    """
    import peft

    folder = Path(folder)
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise no_adapter(folder, name)
    check_base(folder, expect_base_hash)
    check_adapter(folder)
    # The kind of start is kept: PEFT's own pissa and olora take out of the base what they put into the factors, from
    # its weights alone, and their saved factors belong to that changed base. Ours are saved as plain LoRA.
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        _refuse_lost_base(config, folder)
        config.inference_mode = not trainable
        for name, value in (changes or {}).items():
            setattr(config, name, value)
        with torch.random.fork_rng(devices=[]), without_remarks():
            tuned = put_on(_ready(model), config)
    except MISREAD as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise AssetError(
            "asset-damaged",
            f"the adapter's config cannot be used on this base: {why}",
            where=str(folder),
            received=f"adapter_config.json on a base of type {model.config.model_type}",
            allowed="an adapter of this base",
            fix="name the base that the adapter was trained on, or get the adapter again",
        ) from error
    weights = read_weights(folder / WEIGHTS)
    expected = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    require_same(weights, expected, folder / WEIGHTS)
    peft.set_peft_model_state_dict(tuned, weights)
    return tuned if trainable else tuned.eval()


def _refuse_lost_base(config: PeftConfig, folder: Path) -> None:
    """Raises AssetError asset-unsupported for factors of a changed base that cannot be made again."""
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith(starts.UNSAVED):
        raise AssetError(
            "asset-unsupported",
            f"the adapter belongs to a base that `init_lora_weights: {start}` has changed, and how is not saved",
            where=str(folder),
            received=start,
            allowed="an adapter of the base as it is",
            fix="save it again by PEFT's save_pretrained with path_initial_model_for_weight_conversion",
        )


def require_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: Path) -> None:
    """Raises AssetError asset-damaged for weights of an adapter that are missing, surplus or of another shape."""
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name} is not part of this adapter" for name in found.keys() - wanted.keys()]
    faults += [
        f"{name} has the shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if faults:
        raise AssetError(
            "asset-damaged",
            f"the adapter does not fit: {sorted(faults)[0]} ({len(faults)} such weights)",
            where=str(where),
            received=sorted(faults)[:3],
            allowed="the weights of this adapter on this base, all of them and none besides",
            fix="name the base that the adapter was trained on, or get the adapter again",
        )


def merge(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter's update added to its weights; the adapter is gone afterwards."""
    untie(model)
    with without_remarks():
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged


def untie(model: PeftModel) -> None:
    """Give the head a weight of its own where it is the table's and an adapter stands beside one of them.

    That adapter is of one of the two; merged into what both share it would change the other as well.
    """
    base: Any = model.get_base_model()
    head, table = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or not any(hasattr(part, "base_layer") for part in (head, table)):
        return
    own, shared = (getattr(part, "base_layer", part) for part in (head, table))
    if own.weight is shared.weight:
        own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False


def save_weights(model: PreTrainedModel, folder: Path, base: Base) -> None:
    """All weights of a fully trained model as a folder that loads on its own, in the base's stored type."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    stored = getattr(torch, base.spec.dtype, torch.float32)
    state: Mapping[str, torch.Tensor] = {name: tensor.to(stored) for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=dict(state))
    for path in base.path.iterdir():
        if path.is_file() and (
            "token" in path.name or path.name in ("chat_template.jinja", "vocab.json", "merges.txt")
        ):
            shutil.copy2(path, folder / path.name)
    write_json(folder / RECORD, {"format": 1, "base": base.name, "base_hash": base.content_hash})


@contextlib.contextmanager
def _all_ranks(model: PeftModel) -> Iterator[None]:
    """AdaLoRA's silent ranks are written too, as the zeros they are.

    PEFT would cut out those that are silent now: not those of the weights, when an earlier checkpoint was the best.
    """
    adapters: dict[str, Any] = dict(model.peft_config)
    patterns = {name: one.rank_pattern for name, one in adapters.items() if one.peft_type == "ADALORA"}
    for name in patterns:
        adapters[name].rank_pattern = None
    try:
        yield
    finally:
        for name, pattern in patterns.items():
            adapters[name].rank_pattern = pattern


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    model.requires_grad_(False)
    model.enable_input_require_grads()  # checkpointed layers need an input that carries a gradient
    return model


def _continue_from(model: PreTrainedModel, section: Any, expect_base_hash: str | None) -> PeftModel:
    """The adapter that the section names, trainable; its shape is its own, its dropout what the section says."""
    dropout = {"lora_dropout": section.dropout} if section.type in ("lora", "adalora") else {}
    folder = adapter_folder(section.pretrained_adapter_weights)
    adapter_values(folder, section.type)  # refuses one of another type
    return load_adapter(model, folder, expect_base_hash=expect_base_hash, trainable=True, changes=dropout)


def check_base(folder: Path, expected: str | None) -> None:
    """Raises AssetError asset-wrong-base when the adapter's record names another base."""
    record = folder / RECORD
    if expected is None or not record.is_file():
        return
    try:
        known = json_reader.read(record)
        base, base_hash = str(known["base"]), str(known["base_hash"])
    except (ValueError, KeyError, TypeError) as error:
        raise AssetError(
            "asset-damaged",
            f"{RECORD} does not name the adapter's base",
            where=str(record),
            received=f"{type(error).__name__}: {error}",
            allowed="a JSON object with base and base_hash",
            fix="restore the file from a copy; `luthier runs verify RUN` names what is damaged",
        ) from error
    if base_hash != expected:
        raise AssetError(
            "asset-wrong-base",
            f"the adapter was trained on another base: {base} with another content",
            where=str(folder),
            received=expected[:16],
            allowed=base_hash[:16],
            fix=f"load it on {base} as it was when the adapter was trained",
        )


def _names(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _take(section: Any, *names: str) -> Values:
    return {name: getattr(section, name) for name in names}
