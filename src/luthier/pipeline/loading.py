"""From a run folder, or a config alone, to a model that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import assets, config, events
from luthier.assets.tokenizer import Tokenizer
from luthier.config import Config
from luthier.data import sources
from luthier.data.layout import Layout
from luthier.data.render import Renderer
from luthier.data.render.template import fields_of
from luthier.data.table import Table
from luthier.errors import AssetError, LuthierError
from luthier.infer.sampling import idle
from luthier.metrics.calibration import Calibration
from luthier.pipeline.located import base_name
from luthier.pipeline.opening import declared_precision, open_base, open_tuned
from luthier.pipeline.overriding import asked_as_trained
from luthier.pipeline.overriding import idle as idle_keys
from luthier.pipeline.preparing import divide, renderer_of
from luthier.pipeline.reading import read_table
from luthier.pipeline.unchanged import require_same_model, require_unchanged
from luthier.plan import machine as machines
from luthier.plan import planner
from luthier.run import Lock, RunFolder
from luthier.run.inputs import RECORD
from luthier.tuned import CALIBRATION, TrainedOn, Tuned
from luthier.types import Base

if TYPE_CHECKING:
    from luthier.model.tunable import Tunable
    from luthier.plan.precision import Precision


def load(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
    dataset: Any = None,
    sink: events.Sink = events.silent,
) -> Tuned:
    """The model of a finished run. ``overrides`` change its config for this use (generation keys, eval_batch_size).

    ``dataset``: what it will be asked about; a name that leads to nothing is refused before any weights are read.

    Raises RunError when ``path`` is no finished run, AssetError when its base is not here or has another content,
    DataError as `sources.look`.
    """
    found = find(path, overrides=overrides, sink=sink)
    sources.look(dataset)
    base = assets.resolve(found.base_name, trust_remote_code=trust_remote_code, sink=sink)
    found.require(base)
    if overrides:
        for line in [*idle_keys(found.declared, found.settings), *idle(found.settings.generation)]:
            sink(events.Warned(text=line))
    model = open_tuned(found.settings, base, found.precision, found.device, found.folder, sink)
    return tuned_of(found, base, model, sink)


@dataclass(frozen=True)
class Found:
    """What a finished run says of itself, before any weights are read."""

    folder: RunFolder
    settings: Config
    declared: Config  # the settings as the run folder has them, without overrides
    lock: Lock
    record: Mapping[str, Any]  # what it was made from
    base_name: str
    precision: Precision
    device: str

    def require(self, base: Base) -> None:
        """Raise AssetError asset-wrong-base when ``base`` has another content than the one that was trained on."""
        if base.content_hash != self.lock.base_hash:
            raise AssetError(
                "asset-wrong-base",
                f"{base.name} is not the base model that this run was trained on",
                where=str(self.folder.path),
                received=f"{base.content_hash[:16]}… from {base.source}",
                allowed=f"{self.lock.base_hash[:16]}…",
                fix="put the original base model where it was, or train again",
            )


def find(path: str | Path, *, overrides: Sequence[str] = (), sink: events.Sink = events.silent) -> Found:
    """Read a finished run's records.

    Raises RunError when ``path`` is none, or its model is not what was trained, ConfigError where its config is of
    another model.
    """
    from luthier.plan.precision import resolve_precision

    folder = RunFolder.load(path)
    require_unchanged(folder, sink)
    file = folder.path / "config.yaml"
    settings = config.load(file, overrides)
    declared = config.load(file) if overrides else settings
    lock = folder.lock
    assert lock is not None, "a run with a model has a lock"
    require_same_model(folder, lock, settings, sink)
    known = folder.read_json(RECORD)
    machine = machines.probe(settings.execution.device)
    precision = resolve_precision(declared_precision(settings), machine)
    name = base_name(settings)
    return Found(folder, settings, declared, lock, known, name, precision, planner.device_of(machine))


def tuned_of(found: Found, base: Base, model: Tunable, sink: events.Sink = events.silent) -> Tuned:
    """A run with its model, ready to answer."""
    settings, folder = found.settings, found.folder
    columns: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.record["layout"].items()}
    layout = Layout(**columns)
    # the table and its split are the training's, whatever is overridden here
    data = partial(_training_data, found.declared, found.record, layout, found.lock, sink)
    tokenizer = Tokenizer.load(base.path)

    def renders(config: Config) -> Renderer:
        return renderer_of(config, layout, tokenizer, base, found.record["columns"], "data")

    renderer, wanted = renders(settings), found.lock.template_hash
    if renderer.template_hash != wanted != renders(asked_as_trained(settings, found.lock.config)).template_hash:
        told = (
            "prompts are not written as in the training: the config's prompt, or the base's chat template, is another"
        )
        sink(events.Warned(text=told))
    open_it = partial(open_base, settings, base, found.precision, found.device, sink)
    calibration = None
    if (folder.path / CALIBRATION).is_file():
        calibration = Calibration.from_json(folder.read_json(CALIBRATION))
    where = folder.path.absolute()
    divided = partial(_divided, found.declared, layout, found.lock)
    return Tuned(
        settings, tokenizer, layout, renderer, model, where, data, open_it, calibration=calibration, divided=divided
    )


def untuned(settings: Config, *, trust_remote_code: bool = False, sink: events.Sink = events.silent) -> Tuned:
    """The base model of a config, without training: what `trainer.type: none` predicts with."""
    from luthier.train.precision import resolve_precision

    base = assets.resolve(base_name(settings), trust_remote_code=trust_remote_code, sink=sink)
    machine = machines.probe(settings.execution.device)
    precision = resolve_precision(declared_precision(settings), machine)
    inputs = tuple(f.name for f in settings.input_features or ())
    output = settings.output_features[0] if settings.output_features else None
    classes = None
    if output is not None and output.type == "category":
        classes = output.preprocessing.vocab or tuple(output.decoder.match if output.decoder else ()) or None
        if classes is None:
            told = f"the category {output.name!r} names no classes, so its answers are free text: name them in "
            sink(events.Warned(text=told + "output_features[0].preprocessing.vocab or in decoder.match"))
        elif output.fallback_label is not None and output.fallback_label not in classes:
            classes = (*classes, output.fallback_label)
    layout = Layout("columns" if inputs else "text", inputs, output.name if output else None, classes=classes)
    model = open_base(settings, base, precision, planner.device_of(machine), sink)
    tokenizer = Tokenizer.load(base.path)
    renderer = renderer_of(settings, layout, tokenizer, base, _columns(settings), "data")
    return Tuned(settings, tokenizer, layout, renderer, model, learned=False)


def _columns(settings: Config) -> list[str] | None:
    """What a table for this config has to have, where none is at hand: what the features and the template name."""
    named = [one.name for one in (*(settings.input_features or ()), *(settings.output_features or ()))]
    if settings.prompt.template is not None:
        named += [name for name in fields_of(settings.prompt.template) if not name.startswith("__")]
    return list(dict.fromkeys(named)) or None


def _divided(settings: Config, layout: Layout, lock: Lock, table: Table) -> Sequence[int] | None:
    """The split of a table that is the one of the training, by its content; None of another."""
    return divide(settings, table, layout).rows if table.content_hash == lock.data_hash else None


def _training_data(
    settings: Config, known: Mapping[str, Any], layout: Layout, lock: Lock, sink: events.Sink
) -> TrainedOn:
    """The table a run was trained on and its split, if it is still there unchanged; a hub dataset is read again."""
    name = known["dataset"]
    if name is None:
        return TrainedOn(why="it was trained on data in memory, which a run folder does not keep")
    if Path(name).is_absolute() and not Path(name).exists():
        return TrainedOn(why=f"{name} is not there any more")
    try:
        table = read_table(settings, name, encoding=known["encoding"], sink=sink)
    except LuthierError as error:
        return TrainedOn(why=f"{name} cannot be read: {error.faults[0].message}")
    if table.content_hash != lock.data_hash:
        return TrainedOn(why=f"{name} has changed since the training")
    return TrainedOn(table, divide(settings, table, layout).rows)
