"""README.md of a tuned model, as the hub reads it: facts in front matter, then what was done and how to use it."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.data.redact import ORDER, redacted
from luthier.metrics.calibration import BINS, Calibration
from luthier.run.atomic import write_text

RESULTS = "## Results"
SAMPLES = "## Samples"
SHOWN = 3  # samples at most
LONGEST = 400  # characters of each of a sample's texts
JOINER = "\u200d"
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def write_card(
    folder: Path | str,
    *,
    name: str,
    base_model: str,
    config_yaml: str,
    scores: Mapping[str, Mapping[str, float]] | None = None,
    rows: int | None = None,
    held_out: int | None = None,
    calibration: Calibration | None = None,
    samples: Sequence[Mapping[str, str]] = (),
    adapter: str | None = "lora",
    license_name: str | None = None,
    language: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write ``folder/README.md`` and return its path.

    Args:
        folder: the folder that is to be shared.
        name: the model's name.
        base_model: the base as a hub id or name.
        config_yaml: the whole resolved config as YAML.
        scores: contestant → metric → value between 0 and 1, the tuned model last.
        rows: how many rows it was trained on.
        held_out: how many rows the scores are over.
        calibration: the temperature of a category's probabilities, when one was fitted.
        samples: held-out rows as mappings with ``prompt, before, answer, reference``; the first few are shown. A card
            is made to be shared: whatever looks like personal data or a secret is replaced in them.
        adapter: the adapter's type; None for merged weights.
        license_name: the hub's identifier of the licence; left out when it is not known.
        language: the hub's language codes.
        versions: package → version.
    """
    library = "peft" if adapter else "transformers"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["luthier"]}
    if "/" in base_model and not Path(base_model).exists():  # the hub refuses what is no id
        front["base_model"] = base_model
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    if license_name:
        front["license"] = license_name
    if language:
        front["language"] = list(language)
    how = f"a {adapter} adapter on" if adapter else "a fine-tuned version of"
    trained = f", trained on {rows} rows" if rows is not None else ""
    parts = [
        # JSON is YAML, and quotes whatever needs it.
        "---\n" + "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items()) + "---",
        f"# {_plain(name)}",
        f"This is {how} `{_plain(base_model)}`{trained}. It was made with Luthier.",
        _results(scores or {}, held_out, None, calibration) if scores or calibration else "",
        _samples(samples[:SHOWN]) if samples else "",
        "## Use\n\n```bash\nluthier chat FOLDER\nluthier predict FOLDER --dataset rows.csv\n```",
        f"## Config\n\n{_fenced(config_yaml, 'yaml')}",
        _versions(versions) if versions else "",
    ]
    path = Path(folder) / "README.md"
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def write_results(
    folder: Path | str,
    scores: Mapping[str, Mapping[str, float]],
    rows: int | None = None,
    *,
    held_out: bool = True,
    measured: Mapping[str, float] | None = None,
    calibration: Calibration | None = None,
) -> Path | None:
    """Put these results into the card that stands in ``folder``, in place of those it had; the rest stays as it is.

    ``rows``: how many rows the scores are over; ``held_out``: whether it was trained on none of them.
    ``measured``: the tuned model's `Contestant.calibration` on the same rows.

    Returns its path; None where there is no card.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    section = _results(scores, rows, measured, calibration, held_out=held_out) + "\n\n"
    sections = [*_sections(text), ("", len(text))]
    at = next((at for at, (heading, _) in enumerate(sections) if heading == RESULTS), None)
    if at is None:
        begin = end = next(start for heading, start in sections if heading in (SAMPLES, "## Use", ""))
    else:
        begin, end = sections[at][1], sections[at + 1][1]
    write_text(path, text[:begin] + section + text[end:])
    return path


def has_samples(folder: Path) -> bool:
    """Whether the card in ``folder`` shows rows of the data."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return any(heading == SAMPLES for heading, _ in _sections(text))


def _results(
    scores: Mapping[str, Mapping[str, float]],
    rows: int | None,
    measured: Mapping[str, float] | None,
    calibration: Calibration | None,
    *,
    held_out: bool = True,
) -> str:
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    head = ["model", *(m.replace("_", " ") for m in metrics)]
    lines = [" | ".join(head), " | ".join(["---", *("---:" for _ in metrics)])]
    lines += [
        " | ".join([_plain(who), *(f"{100 * values[m]:.1f} %" if m in values else "" for m in metrics)])
        for who, values in scores.items()
    ]
    over = f"On {rows} rows{' that it was not trained on' if held_out else ''}:\n\n" if rows is not None else ""
    table = over + "\n".join(f"| {line} |" for line in lines) if scores else ""
    return "\n\n".join(part for part in (RESULTS, table, _believed(measured, calibration)) if part)


def _believed(measured: Mapping[str, float] | None, calibration: Calibration | None) -> str:
    """How far the probabilities of classes can be believed, in words; nothing where there are none."""
    told = []
    if measured is not None:
        told.append(_error(measured["error_before"], measured["error"], measured["rows"], "these"))
    if calibration is not None:
        rows = "the validation" if measured is not None else "validation"
        told.append(_error(calibration.error_before, calibration.error_after, calibration.rows, rows))
        told.append(f"The temperature is {calibration.temperature:.3f}, fitted on the validation rows.")
    if not told:
        return ""
    meaning = f"Expected calibration error over {BINS} bins of equal width (Guo et al. 2017)"
    return f"{meaning}: " + " ".join(told)


def _error(before: float, after: float, rows: float, which: str) -> str:
    change = f"{100 * before:.1f} % as the model says, {100 * after:.1f} % with the temperature"
    return f"{change}, on {which} {int(rows)} rows."


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    told = "Rows that it was not trained on, with the base's answer before and its own after. "
    told += f"A text of more than {LONGEST} characters is cut."
    names = (("Prompt", "prompt"), ("Before", "before"), ("After", "answer"), ("Reference", "reference"))
    shown = [
        f"### Sample {number}\n\n"
        + "\n\n".join(
            f"{name}:\n\n{_fenced(_short(text) or '(empty)', 'text')}"
            for name, key in names
            if (text := one.get(key)) is not None
        )
        for number, one in enumerate(samples, 1)
    ]
    return "\n\n".join([SAMPLES, told, *shown])


def _short(text: str) -> str:
    """The beginning of a text in whole characters, without what looks like personal data or a secret."""
    text = redacted(text, ORDER).strip()
    if len(text) <= LONGEST:
        return text
    end = LONGEST
    while end and (_joins(text[end]) or text[end - 1] == JOINER):
        end -= 1
    return text[: end or LONGEST].rstrip() + " …"


def _joins(character: str) -> bool:
    """Whether it is part of the character before it: an accent, a joiner, a variant, a shade of an emoji."""
    return unicodedata.category(character)[0] == "M" or character == JOINER or "\U0001f3fb" <= character <= "\U0001f3ff"


def _sections(text: str) -> Iterator[tuple[str, int]]:
    """The headings of the second level and where they begin; what stands in a fenced block is none."""
    start, fence = 0, ""
    for line in text.splitlines(keepends=True):
        run = FENCE.match(line)
        if not fence and line.startswith("## "):
            yield line.rstrip(), start
        elif not fence and run:
            fence = run[1]
        elif fence and run and run[1].startswith(fence) and not line[run.end() :].strip():
            fence = ""
        start += len(line)


def _versions(versions: Mapping[str, str]) -> str:
    return "## Versions\n\n" + "\n".join(f"- {package} {version}" for package, version in versions.items())


def _plain(text: str) -> str:
    """Text that stays on its line and in its table cell."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
