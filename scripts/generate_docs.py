"""Regenerate the documentation that comes from the code: errors, commands, base models, config, JSON Schema.

python scripts/generate_docs.py            writes the files
python scripts/generate_docs.py --check    writes nothing; exit 1 and the names of the files that are stale
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from luthier import errors
from luthier.config import json_schema, reference_markdown
from luthier.error_codes import CODES

ROOT = Path(__file__).resolve().parents[1]

# The prefix of a code -> (its error class, the heading on the page)
GROUPS: dict[str, tuple[type[errors.LuthierError], str]] = {
    "config": (errors.ConfigError, "The config"),
    "data": (errors.DataError, "The data"),
    "asset": (errors.AssetError, "Base models and adapters"),
    "run": (errors.RunError, "Run folders"),
    "training": (errors.TrainingError, "Training"),
    "dependency": (errors.DependencyError, "Optional packages"),
}

INTRODUCTION = """\
<!-- Generated from src/luthier/error_codes.py by scripts/generate_docs.py. -->
# Errors

Every error that Luthier raises on purpose says what is wrong, what was received, what is allowed, and how to mend it;
and where, if it has a place in a file, a config or a folder. (A run that a signal ended only says how to go on.) It
carries one of the codes below; a code never changes its meaning. What is allowed and the fix below are the general
ones; most errors say them for the value at hand. With `--json` a command prints the faults as JSON, also those of its
own command line. A validation collects all faults before it reports.

The exit code of a command tells the kind of cause. 0 is success, 1 an unexpected failure (please report it; `--debug`
shows the traceback), 130 stands for Ctrl-C and 143 for SIGTERM. In Python, each kind is a class in `luthier.errors`
under `LuthierError`; `error.code` is the code, `error.faults` has all of them.
"""


def errors_page() -> str:
    """The page docs/errors/index.md: one table a kind of cause."""
    strays = [code for code in CODES if code.split("-", 1)[0] not in GROUPS]
    if strays:
        raise SystemExit(f"these codes belong to no group of {Path(__file__).name}: {', '.join(strays)}")
    parts = [INTRODUCTION]
    for prefix, (kind, heading) in GROUPS.items():
        rows = [
            f"| `{name}` | {code.cause} | {code.allowed or ''} | {code.fix or ''} |"
            for name, code in CODES.items()
            if name.split("-", 1)[0] == prefix
        ]
        parts.append(
            f"## {heading}: `{kind.__name__}`, exit code {kind.exit_code}\n\n"
            + "\n".join(["| code | cause | allowed | fix |", "|---|---|---|---|", *rows])
            + "\n"
        )
    return "\n".join(parts)


COMMANDS = """\
<!-- Generated from src/luthier/cli/ by scripts/generate_docs.py. -->
# Commands

With `--json` a command prints one JSON object on stdout and nothing else (`chat` one for each answer, each on a line);
otherwise progress goes to stderr. What people are told on the way stands in it as `notes` and `warnings`. A failure
prints a code that [Errors](../errors/index.md) explains.
`--debug`, before or after the command, shows tracebacks.

`--set key.path=value` changes a key of the config that a command reads or writes;
{without} have no config, and so no `--set`.
"""


def commands_page() -> str:
    """The page docs/reference/cli.md: every command with its examples and options."""
    import typer.main

    from luthier import cli

    commands = typer.main.get_command(cli.app).commands
    without = [f"`{name}`" for name, one in commands.items() if not any("--set" in param.opts for param in one.params)]
    parts = [COMMANDS.replace("{without}", f"{', '.join(without[:-1])} and {without[-1]}")]
    for name, command in commands.items():
        examples = "\n".join(getattr(cli, name).EXAMPLES)
        rows = []
        for one in command.params:
            names = one.opts if one.param_type_name == "option" else [one.metavar or one.name.upper()]
            default = one.default if isinstance(one.default, (int, str, Path)) else None
            shown = f"`{default}`" if default else ""  # a switch that is off needs no word
            rows.append(f"| {', '.join(f'`{spelling}`' for spelling in names)} | {one.help} | {shown} |")
        table = "\n".join(["| argument or option | what it does | default |", "|---|---|---|", *rows])
        parts.append(f"## luthier {name}\n\n{command.help}\n\n```sh\n{examples}\n```\n\n{table}\n")
    return "\n".join(parts)


BASES = """\
<!-- Generated from src/luthier/assets/catalogue.py by scripts/generate_docs.py. -->
# Base models that `luthier init` knows

Any other base works too; these are the ones that are proposed. Where the facts come from stands at the head of
`src/luthier/assets/catalogue.py`. A model's own page is what counts. The memory is what training LoRA takes at most
with short rows, in 16 bits and with `quantization.bits: 4`; `luthier plan` computes it for your rows.

"""


def bases_page() -> str:
    """The page docs/reference/bases.md: the catalogue."""
    from luthier.assets.catalogue import CATALOGUE, GIB, MANY

    columns = ("base", "parameters", "languages", "context", "licence", "download", "memory")
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for one in CATALOGUE:
        shown = [code for code in one.languages if code != MANY]
        languages = ", ".join(shown) if len(shown) < 25 else f"{len(shown)} languages"
        languages += " and more" if MANY in one.languages else ""
        licence = one.licence + (", gated" if one.gated else "")
        memory = f"{one.training_bytes / GIB:.1f} / {one.quantised_bytes / GIB:.1f} GiB"
        cells = [f"`{one.name}`", f"{one.parameters:g}B", languages, f"{one.context:,}", licence]
        rows.append(f"| {' | '.join(cells)} | {one.download:g} GB | {memory} |")
    return BASES + "\n".join(rows) + "\n"


def schema_text() -> str:
    """The JSON Schema of a config file, as editors read it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "docs/errors/index.md": errors_page,
    "docs/reference/bases.md": bases_page,
    "docs/reference/cli.md": commands_page,
    "docs/reference/config.md": reference_markdown,
    "docs/reference/schema.json": schema_text,
}


def stale() -> list[str]:
    """The generated files whose content on disk is not what the code would write now."""
    return [
        name
        for name, make in PAGES.items()
        if not (ROOT / name).exists() or (ROOT / name).read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    """Write the pages, or with --check only compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is stale")
    changed = stale()
    if parser.parse_args().check:
        for name in changed:
            print(f"stale: {name}   (run: python scripts/generate_docs.py)", file=sys.stderr)
        return 1 if changed else 0
    for name in changed:
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAGES[name](), encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
