"""Going on from an adapter: its own shape is what is trained, and a config that says another one is refused."""

from __future__ import annotations

from typing import Any

from luthier.assets.adapter_files import adapter_folder, adapter_values
from luthier.config import Config
from luthier.errors import AssetError, ConfigError, Fault
from luthier.pipeline.unchanged import require_whole
from luthier.run import manifest


def with_adapter_of(settings: Config) -> Config:
    """``settings`` with the shape of the adapter that is gone on from where its section leaves it out.

    Raises ConfigError for each key that says otherwise, AssetError when the adapter is not there or of another type,
    RunError when it is that of a run and not as the run left it.
    """
    section = settings.adapter
    if section is None or not section.pretrained_adapter_weights:
        return settings
    folder = adapter_folder(section.pretrained_adapter_weights)
    found = adapter_values(folder, section.type)
    if (folder / manifest.NAME).is_file():  # that of a run; others have none
        require_whole(folder)
    known = {name: value for name, value in found.items() if name in type(section).model_fields}
    _check(section, known)
    faults = [
        Fault(
            "config-conflict",
            f"`adapter.{name}` is not that of the adapter to go on from",
            f"adapter.{name}",
            said,
            list(map(str, value)) if isinstance(value, (list, tuple)) else str(value),
            f"leave adapter.{name} out; only a new adapter can have another",
        )
        for name, value in known.items()
        if ("adapter", name) in settings._given
        and (said := getattr(section, name)) is not None
        and _differ(said, value)
    ]
    if faults:
        raise ConfigError(faults)
    made = settings.model_copy(update={"adapter": section.model_copy(update=known)})
    made._given = settings._given
    return made


def _check(section: Any, known: dict[str, Any]) -> None:
    """Raises AssetError ``asset-damaged`` where the adapter's config holds what no config could."""
    from pydantic import ValidationError

    try:
        type(section).model_validate(section.model_dump() | known)
    except ValidationError as error:
        raise AssetError([
            Fault("asset-damaged", f"the adapter's config holds no {fault['loc'][0]} that could be: {fault['msg']}",
                  section.pretrained_adapter_weights, str(fault["input"])[:80], fix="get the adapter again")
            for fault in error.errors()
            if fault["loc"]
        ]) from error  # fmt: skip


def _differ(one: Any, other: Any) -> bool:
    """Whether two values of a key differ; names in another order are the same."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return sorted(map(str, one)) != sorted(map(str, other))
    return bool(one != other)
