"""`luthier plan`: a config, its data and a machine, real or imagined, become an estimate.

Without weights and without torch, but for `refined`, which times a few layers of the base on this very machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier import events
from luthier.assets.resolve import terms_of
from luthier.assets.sketch import Sketch, sketch
from luthier.config import Config
from luthier.errors import LuthierError
from luthier.pipeline.located import base_name
from luthier.pipeline.named import check_butterflies, check_layers
from luthier.pipeline.preparing import examine
from luthier.pipeline.reading import layout_of, read_table
from luthier.plan import answering, estimate, planner
from luthier.plan import machine as machines
from luthier.plan.answering import Answering
from luthier.plan.cards import IMAGINED
from luthier.plan.estimate import Held, Times
from luthier.plan.measure import cpu_rates
from luthier.plan.planner import Planned
from luthier.plan.remedies import Remedy, remedies
from luthier.plan.support import BUILT, Engine, refusal_of
from luthier.types import Base, DataStats, Machine

ASSUMED_ROWS, ASSUMED_TOKENS = 1000, 256  # where no dataset is named
CHARACTERS = 3.5  # of Latin text in a token; other scripts have about one a token


@dataclass(frozen=True)
class Need:
    """What is known of a training apart from the machine."""

    config: Config
    base: Sketch
    stats: DataStats
    held: Held  # the validation rows
    notes: tuple[str, ...]  # what was assumed; what the base's licence asks for
    engine: Engine = BUILT  # what of Luthier's own decoder serves this model


@dataclass(frozen=True)
class Estimate:
    """A need on a machine."""

    need: Need
    machine: Machine
    planned: Planned
    times: Times
    remedies: tuple[Remedy, ...]

    @property
    def disk(self) -> int:
        """Bytes that the run folder will take."""
        return estimate.disk_bytes(self.planned, self.need.config.trainer.keep_last)

    @property
    def prediction(self) -> Answering:
        """Answering a table with the result of the training."""
        return answering.prediction(self.planned, self.machine)

    @property
    def evaluation(self) -> Answering:
        """Answering validation rows between its steps."""
        return answering.evaluation(self.planned, self.machine)

    def to_json(self) -> dict[str, Any]:
        """The estimate as JSON types."""
        out = estimate.to_json(self.planned, self.times)
        return out | {
            "base": {"name": self.need.base.name, "source": self.need.base.source},
            "generation": {"prediction": self.prediction.to_json(), "evaluation": self.evaluation.to_json()},
            "download": self.need.base.download,
            "disk": self.disk,
            "notes": list(self.need.notes),
            "remedies": [{"change": one.change, "cost": one.cost} for one in self.remedies],
        }


def need_of(
    settings: Config,
    dataset: Any | None,
    *,
    encoding: str | None = None,
    trust_remote_code: bool = False,
    sink: events.Sink = events.silent,
) -> Need:
    """Read the headers of the base and the lengths of the data. Raises ConfigError, DataError, AssetError."""
    located = base_name(settings)
    base = sketch(located, trust_remote_code=trust_remote_code)
    engine = replace(BUILT, refusal=refusal_of(base.config))
    here = None if base.folder is None else Base(base.name, base.folder, base.source, "", base.spec)
    if here is not None and any(here.path.glob("*.safetensors")):
        check_layers(settings, here, engine)
    asked = terms_of(located)
    terms = () if asked is None else (f"{settings.base_model}: {asked}",)
    if dataset is None:
        note = f"no dataset: {ASSUMED_ROWS:,} rows of {ASSUMED_TOKENS} tokens are assumed; name yours with --dataset"
        stats = DataStats((ASSUMED_TOKENS,) * ASSUMED_ROWS, ASSUMED_ROWS * ASSUMED_TOKENS // 2, "")
        held = Held(ASSUMED_ROWS // 10, stats.tokens // 10)
        return Need(settings, base, stats, held, (*terms, note), engine)
    if here is None:
        return replace(_guessed(settings, base, dataset, encoding, terms, sink), engine=engine)
    seen = examine(settings, dataset, lambda name: here, encoding=encoding, sink=sink)
    validation = seen.prepared.examples["validation"]
    held = Held(len(validation), sum(example.length for example in validation))
    return Need(seen.config, base, seen.stats, held, terms, engine)


def estimate_of(need: Need, machine: Machine, *, measured: tuple[float, float] | None = None) -> Estimate:
    """The plan of ``need`` on ``machine``, or the leanest one with what would make it fit."""
    device = planner.device_of(machine, need.config.execution.device)
    check_butterflies(need.config, device, here=machine.system != IMAGINED)
    found = planner.best(need.config, need.base.spec, need.stats, machine, engine=need.engine, measured=measured)
    told = estimate.times(found, need.held)
    changes: tuple[Remedy, ...] = ()
    if not found.fits:
        changes = tuple(remedies(need.config, need.base.spec, need.stats, machine, need.engine))
    return Estimate(need, machine, found, told, changes)


def refined(found: Estimate, sink: events.Sink = events.silent) -> Estimate:
    """The estimate with the time that a step takes here, where the base's weights are; the same where they are not.

    The plan and its memory stay. ``found`` has to be of the machine that this runs on.
    """
    from luthier.pipeline import probing

    sketched = found.need.base
    if sketched.folder is None:
        return found
    base = Base(sketched.name, sketched.folder, sketched.source, "", sketched.spec)
    if not probing.can_probe(found.planned, base):
        return found
    try:
        planned = probing.probed(found.need.config, base, found.planned, sink)
    except (LuthierError, MemoryError, RuntimeError) as error:  # recomputed layers may not fit as plain ones
        sink(events.Warned(text=f"no probe, so times are a range: {str(error).splitlines()[0]}"))
        return found
    return replace(found, planned=planned, times=estimate.times(planned, found.need.held))


def here(settings: Config) -> tuple[Machine, tuple[float, float] | None]:
    """This machine, and the rates of its CPU where that is what would train."""
    machine = machines.probe(settings.execution.device)
    return machine, None if machine.gpus else cpu_rates()


def _guessed(
    settings: Config, base: Sketch, dataset: Any, encoding: str | None, terms: tuple[str, ...], sink: events.Sink
) -> Need:
    """Lengths from the characters of the rows, where the tokenizer is not here."""
    given = settings.preprocessing
    table = read_table(settings, dataset, encoding=encoding, sink=sink)
    layout = layout_of(settings, table)
    frame = _tokens(settings.prompt.template or "") + 8
    prompts = [frame + sum(_tokens(table.row(i).get(name)) for name in layout.inputs) for i in range(len(table))]
    answers = [_tokens(table.row(i).get(layout.target)) + 1 if layout.target else 0 for i in range(len(table))]
    limit = given.max_sequence_length or base.spec.context
    lengths = [min(prompt + answer, limit) for prompt, answer in zip(prompts, answers, strict=True)]
    share = (sum(answers) or sum(lengths)) / max(sum(prompts) + sum(answers), 1)
    train = round(given.split.probabilities[0] * len(lengths))
    stats = DataStats(tuple(lengths[:train]), max(1, round(share * sum(lengths[:train]))), table.content_hash)
    part = given.split.probabilities[1]
    held = Held(round(part * len(lengths)), round(part * sum(lengths)))
    note = "the tokenizer is not here: lengths are guessed from the text"
    return Need(settings, base, stats, held, (*terms, note))


def _tokens(value: Any) -> int:
    text = "" if value is None else str(value)
    plain = sum(character.isascii() for character in text)
    return round(plain / CHARACTERS + (len(text) - plain))


__all__: Sequence[str] = ["Estimate", "Need", "estimate_of", "here", "need_of", "refined"]
