"""`load`: a file, a YAML text or a dict, with overrides, to a `Config`; every fault is collected into one error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from luthier.config import yaml_reader
from luthier.config.adapter import KINDS as ADAPTERS
from luthier.config.describe import allowed_values
from luthier.config.faults import Path, Places, from_validation
from luthier.config.refused import refusals
from luthier.config.schema import Config
from luthier.errors import ConfigError, Fault
from luthier.registry import nearest

DRAWING = frozenset(f"generation.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "typical_p"))

NAMED_WITH_VALUE = ("type", "model_type", "learning_rate")  # keys of which some values alone are refused


def load(
    source: str | FilePath | Mapping[str, Any], overrides: Sequence[str] = (), *, file: FilePath | None = None
) -> Config:
    """Read, check and complete a config.

    Args:
        source: a file, a mapping, or a text that holds a line break (then it is YAML itself).
        overrides: ``key.path=value`` each, the value read as YAML; they win over the source.
        file: where ``source``, if it is no file itself, was read from: see `Config.file`.

    Raises:
        ConfigError: with one fault for each thing that is wrong, each with its place in the file.
    """
    faults: list[Fault] = []
    if isinstance(source, Mapping):
        data, places = _copy(source), Places("config")
    else:
        file = file or _file_of(source)
        data, places = _read(source, faults)
    if not isinstance(data, dict):
        raise ConfigError(
            "config-unreadable",
            "the config is not a mapping of keys",
            where=places.name,
            received="nothing" if data is None else data,
            allowed="lines such as `base_model: smollm2`",
            fix="`luthier init DATA` writes a config",
        )
    unsaid = "adapter" not in data
    for override in overrides:
        _override(data, override, places, faults)
    _drawing_named(data, overrides)
    if unsaid and isinstance(data.get("adapter"), dict):  # `--set adapter.r=4` is said of the adapter that is there
        data["adapter"].setdefault("type", ADAPTERS[0])
    _rename(data, places, faults)
    for path, value, advice in refusals(data):
        dotted = ".".join(map(str, path))
        named = f"`{dotted}: {value}`" if isinstance(value, str) and path[-1] in NAMED_WITH_VALUE else f"`{dotted}`"
        faults.append(
            Fault("config-not-implemented", f"{named} is not part of Luthier", places.of(path), value, fix=advice)
        )
    config = _validate(data, places, faults)
    if faults or config is None:
        raise ConfigError(faults)
    config._given, config._file = frozenset(_paths(data, ())), file
    return config


def _file_of(source: str | FilePath) -> FilePath | None:
    """The file that a config is read from; a text with a line break is YAML itself."""
    text = isinstance(source, str) and "\n" in source
    return None if text or not isinstance(source, (str, FilePath)) else FilePath(source).expanduser()


def _read(source: str | FilePath, faults: list[Fault]) -> tuple[Any, Places]:
    path = _file_of(source)
    if path is None and isinstance(source, str):
        name, text = "config", source
    else:
        if path is None:
            raise ConfigError(
                "config-unreadable",
                "the config is neither a file nor a mapping",
                where="config",
                received="None" if source is None else source,
                allowed="a path of a YAML file, a text of YAML, or a dict",
                fix="give one of these, such as {'base_model': 'smollm2'}",
            )
        name = str(path)
        text = yaml_reader.decode(_bytes(path), name)
    document = yaml_reader.read(text, name)
    faults += yaml_reader.duplicate_faults(document, name)
    return document.data, Places(name, document.positions)


def _bytes(path: FilePath) -> bytes:
    try:
        if path.is_file() and path.stat().st_size > yaml_reader.MAX_BYTES:
            raise ConfigError(
                "config-unreadable",
                "the config is too large",
                where=str(path),
                received=f"{path.stat().st_size:,} bytes",
                allowed=f"at most {yaml_reader.MAX_BYTES:,} bytes",
                fix="the first argument is the config, not the data: give the data with --dataset",
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            "config-unreadable",
            f"the config cannot be read: {said}",
            where=str(path),
            received=str(path),
            allowed="a YAML file that can be read",
            fix=f"did you mean {str(path.parent / close)!r}?" if close else "`luthier init DATA` writes a config",
        ) from None


def _copy(value: Any, depth: int = 0) -> Any:
    """Plain dicts, lists and Python scalars from what a caller passes (tuples, numpy numbers), bounded in depth."""
    if depth > yaml_reader.MAX_DEPTH:
        raise ConfigError(
            "config-unreadable",
            "the config is nested too deeply",
            where="config",
            received=f"more than {yaml_reader.MAX_DEPTH} levels",
            allowed=f"{yaml_reader.MAX_DEPTH} levels",
            fix="pass the config itself, without what stands around it",
        )
    if isinstance(value, Mapping):
        return {str(name): _copy(child, depth + 1) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(child, depth + 1) for child in value]
    if isinstance(value, FilePath):
        return str(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value


def _drawing_named(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """An override that names how to draw decides whether to: a run holds `do_sample`, though nobody said it."""
    named = {override.partition("=")[0].strip() for override in overrides}
    section = data.get("generation")
    if not isinstance(section, dict) or "generation.do_sample" in named or not named & DRAWING:
        return
    section.pop("do_sample", None)
    if "generation.temperature" not in named and section.get("temperature") == 0:
        del section["temperature"]


def _override(data: dict[str, Any], override: str, places: Places, faults: list[Fault]) -> None:
    """Apply one ``key.path=value``."""
    name, equals, text = override.partition("=")
    steps = name.strip().split(".")
    where = f"--set {override}"
    if not equals or not all(steps):
        faults.append(
            Fault(
                "config-bad-override",
                "an override is key.path=value",
                where,
                override,
                "key.path=value",
                "write it as in --set trainer.epochs=1",
            )
        )
        return
    if not text.strip():
        message, fix = "nothing stands after the equals sign", "write null for no value, or '\"\"' for an empty text"
        faults.append(Fault("config-bad-override", message, where, override, "key.path=value", fix))
        return
    try:
        value = yaml_reader.read(text, where).data
    except ConfigError as error:
        first = error.faults[0]
        faults.append(Fault("config-bad-override", first.message, where, text, "a YAML value", "quote the value"))
        return
    node: Any = data
    path: list[str | int] = []
    for index, step in enumerate(steps):
        at: Any = int(step) if isinstance(node, list) and step.isdigit() else step
        path.append(at)
        if isinstance(node, list) and not (isinstance(at, int) and at < len(node)):
            message = f"`{'.'.join(steps[:index])}` is a list of {len(node)}; {step!r} is none of its items"
            allowed = f"an item's number, 0 to {len(node) - 1}" if node else "no item: the list is empty"
            faults.append(Fault("config-bad-override", message, where, step, allowed, "name an item by its number"))
            return
        if index == len(steps) - 1:
            node[at] = value
            break
        child = node[at] if isinstance(node, list) else node.get(at)
        if child is None:
            child = node[at] = _begun(path, steps[index + 1], data)
        if not isinstance(child, (dict, list)):
            message = f"`{'.'.join(steps[: index + 1])}` holds a value, not keys"
            fix = f"write --set {'.'.join(steps[: index + 1])}=VALUE"
            faults.append(Fault("config-bad-override", message, where, child, "the path of a key", fix))
            return
        node = child
    places.overridden[tuple(path)] = override


def _begun(path: Sequence[str | int], step: str, data: dict[str, Any]) -> dict[str, Any] | list[Any]:
    """What a key that is not there holds once ``step`` is set in it: a list with a first item, or a mapping."""
    if not (step.isdigit() and (allowed_values(Config, tuple(path), data) or "").startswith("a list")):
        return {}
    return [{}] if step == "0" else []


def _rename(data: dict[str, Any], places: Places, faults: list[Fault]) -> None:
    """Other spellings of the same: `optimizer.params` is merged into `optimizer`; a bare type is a section."""
    for name in ("adapter", "backend"):
        if isinstance(data.get(name), str):
            data[name] = {"type": data[name]}
    trainer = data.get("trainer")
    if isinstance(trainer, dict) and isinstance(trainer.get("optimizer"), str):
        trainer["optimizer"] = {"type": trainer["optimizer"]}
    optimizer = trainer.get("optimizer") if isinstance(trainer, dict) else None
    if isinstance(optimizer, dict) and isinstance(optimizer.get("params"), dict):
        base: Path = ("trainer", "optimizer")
        for name, value in optimizer.pop("params").items():
            inner = (*base, "params", name)
            if name in optimizer and optimizer[name] != value:
                message = f"`optimizer.{name}` and `optimizer.params.{name}` differ"
                faults.append(Fault("config-conflict", message, places.of(inner), value, "one of the two", "keep one"))
                continue
            optimizer[name] = value
            if inner in places.positions:
                places.positions[(*base, name)] = places.positions[inner]
    parameters = data.get("model_parameters")
    scaling = parameters.get("rope_scaling") if isinstance(parameters, dict) else None
    if isinstance(scaling, dict) and "type" in scaling:  # as transformers called it once
        _respell(scaling, ("model_parameters", "rope_scaling"), "type", "rope_type", places, faults)
    defaults = data.get("defaults")
    if isinstance(defaults, dict):
        del data["defaults"]
        faults.append(
            Fault(
                "config-not-implemented",
                "`defaults` for feature types is not part of Luthier",
                places.of(("defaults",)),
                defaults,
                ["luthier", "ludwig"],
                "write the keys at the features, or at `preprocessing` for all of them",
            )
        )
    _drop_null_sections(data)


def _respell(node: dict[str, Any], path: Path, old: str, new: str, places: Places, faults: list[Fault]) -> None:
    """A key in its older spelling becomes the one of today."""
    value, where = node.pop(old), places.of((*path, old))
    if node.get(new, value) != value:
        faults.append(
            Fault("config-conflict", f"`{old}` and `{new}` differ", where, value, "one of the two", f"keep {new}")
        )
        return
    node[new] = value
    if (*path, old) in places.positions:
        places.positions[(*path, new)] = places.positions[(*path, old)]


def _drop_null_sections(data: dict[str, Any]) -> None:
    """A section heading with nothing under it (`prompt:`) is the section with its defaults."""
    for holder, names in (
        (data, ("prompt", "preprocessing", "generation", "model_parameters", "trainer", "backend", "execution")),
        (data.get("trainer"), ("optimizer", "learning_rate_scheduler")),
        (data.get("preprocessing"), ("split",)),
        (data.get("adapter"), ("postprocessor",)),
    ):
        for name in names:
            if isinstance(holder, dict) and name in holder and holder[name] is None:
                del holder[name]
    trainer = data.get("trainer")
    if isinstance(trainer, dict) and "gradient_clipping" in trainer and trainer["gradient_clipping"] is None:
        trainer["gradient_clipping"] = {"clipglobalnorm": None}  # Ludwig: no clipping
    if isinstance(trainer, dict) and "epochs" in trainer and trainer["epochs"] is None:
        del trainer["epochs"]


def _validate(data: dict[str, Any], places: Places, faults: list[Fault]) -> Config | None:
    """The config, or None after adding its faults. Unknown keys do not hide what else is wrong."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        faults += from_validation(error, data, places, Config)
        return None


def _paths(data: Any, prefix: Path) -> list[Path]:
    """Every path that stands in ``data``."""
    if not isinstance(data, dict):
        return []
    return [path for name, child in data.items() for path in ((*prefix, name), *_paths(child, (*prefix, name)))]
