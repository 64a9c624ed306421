"""Every parser of files that come from outside, its seeds, and what it may raise: the targets of the fuzzers.

A parser may read the file or refuse it with an error of its kind. Anything else, a crash, or a hang is a fault.
"""

from __future__ import annotations

import csv
import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.errors import LuthierError

ROWS = [{"question": f"say {i}", "answer": f"yes {i} é", "n": i} for i in range(6)]


@dataclass(frozen=True)
class Target:
    """A parser: the file's name, valid contents to begin from, what reads it, what it may raise besides ours."""

    name: str
    seeds: Callable[[], list[bytes]]
    parse: Callable[[Path], Any]
    allowed: tuple[type[BaseException], ...] = ()
    words: tuple[bytes, ...] = ()  # pieces that are put in
    cheap: bool = True  # takes milliseconds

    def run(self, path: Path) -> None:
        """Read the file. Raises what is a fault."""
        try:
            self.parse(path)
        except (LuthierError, *self.allowed):
            return


def _dataset(path: Path) -> None:
    from luthier.data import sources

    table = sources.read(path)
    assert table.content_hash and len(table.row(0)) == len(table.columns)


def _csv(delimiter: str = ",") -> list[bytes]:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    quoted = 'a,b\n"x ""y""\nz",1\nNA,007\n'
    plain, marked, wide = out.getvalue().encode(), b"\xef\xbb\xbf" + quoted.encode(), quoted.encode("utf-16")
    return [plain, marked, wide, "a,b\né,ü\n".encode("latin-1")]


def _jsonl() -> list[bytes]:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    return ["\n".join(map(json.dumps, ROWS)).encode(), "\n".join([json.dumps(chat)] * 3).encode()]


def _json() -> list[bytes]:
    return [json.dumps(one).encode() for one in (ROWS, {"data": ROWS}, {"a": [1, 2], "b": [3, 4]})]


def _parquet() -> list[bytes]:
    import pyarrow as pa
    from pyarrow import parquet

    out = []
    for compression in ("none", "snappy", "zstd"):
        sink = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(ROWS), sink, compression=compression)
        out.append(sink.getvalue())
    return out


def _arrow() -> list[bytes]:
    import pyarrow as pa

    rows, out = pa.Table.from_pylist(ROWS), []
    for begin in (pa.ipc.new_file, pa.ipc.new_stream):
        sink = io.BytesIO()
        with begin(sink, rows.schema) as writer:
            writer.write_table(rows)
        out.append(sink.getvalue())
    return out


def _excel() -> list[bytes]:
    import openpyxl

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(list(ROWS[0]))
    for row in ROWS:
        sheet.append(list(row.values()))
    out = io.BytesIO()
    book.save(out)
    stored = io.BytesIO()  # the same without compression, so that what is changed is XML
    with zipfile.ZipFile(io.BytesIO(out.getvalue())) as packed, zipfile.ZipFile(stored, "w") as plain:
        for name in packed.namelist():
            plain.writestr(name, packed.read(name))
    return [out.getvalue(), stored.getvalue()]


def _safetensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    return [save({"w": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, {"format": "pt"})]


def _header(path: Path) -> None:
    from luthier.assets.spec import tensors

    list(tensors(path))


def _spec(path: Path) -> None:
    from luthier.assets.spec import read_json, spec_of

    spec_of(read_json(path), 1000, "float32")


def _model_config() -> list[bytes]:
    return [b'{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "architectures": ["A"]}']


def _config() -> list[bytes]:
    text = (Path(__file__).parents[2] / "examples" / "dictionary" / "config.yaml").read_bytes()
    merged = b"base_model: x\n<<: {a: 1}\ntrainer: {epochs: 1e-4, type: !!python/name:os.system }\n"
    return [text, b"a: &x [1, *x]\n", merged]


def _yaml(path: Path) -> None:
    from luthier import config

    config.load(path)


def _manifest() -> list[bytes]:
    return [json.dumps({"format": 1, "files": {"a.txt": {"sha256": "0" * 64, "bytes": 3}}}).encode()]


def _faults(path: Path) -> None:
    from luthier.run import manifest

    manifest.faults(path.parent)


def _record() -> list[bytes]:
    names = ("config_hash", "data_hash", "base_hash", "base_name", "tokenizer_hash", "template_hash")
    lock = {**dict.fromkeys(names, "a"), "config": {}, "seed": 1}
    return [json.dumps({"format": 1, "state": "training", "name": "n", "lock": lock}).encode()]


def _run(path: Path) -> None:
    from luthier.run import RunFolder

    _ = RunFolder.load(path.parent, trained=False).state


def _tokenizer() -> list[bytes]:
    from tokenizers import Tokenizer, models

    return [Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).to_str().encode()]


def _read_tokenizer(path: Path) -> None:
    from luthier.assets.tokenizer import Tokenizer

    made = Tokenizer.load(path.parent)
    made.decode(made.encode("abba")[:5])


def _gguf() -> list[bytes]:
    """A header with a few keys and one tensor, written by hand as the format says."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 1),
        text("llama.embedding_length") + struct.pack("<II", 4, 32),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    ]
    tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, 32, 2, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys) + tensor
    return [head + bytes(-len(head) % 32) + bytes(32 * 2 * 4)]


def _convert(path: Path) -> None:
    from luthier.assets.gguf import convert_gguf

    convert_gguf(path, cache=path.parent / "cache")


DEEP = (b"[" * 3000, b"{" * 3000, b'{"a":' * 2000)
BRACKETS = (*DEEP, b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"1e999", b"-", b'"' * 50, b"\n\n")
SIZES = tuple(struct.pack("<Q", n) for n in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1))

TARGETS = {
    "csv": Target("rows.csv", _csv, _dataset, words=BRACKETS),
    "tsv": Target("rows.tsv", lambda: _csv("\t"), _dataset, words=BRACKETS),
    "jsonl": Target("rows.jsonl", _jsonl, _dataset, words=BRACKETS),
    "json": Target("rows.json", _json, _dataset, words=BRACKETS),
    "parquet": Target("rows.parquet", _parquet, _dataset, words=SIZES),
    "arrow": Target("rows.arrow", _arrow, _dataset, words=SIZES),
    "excel": Target("rows.xlsx", _excel, _dataset, words=(*SIZES, b"<!DOCTYPE a [<!ENTITY b \"c\">]>", b"&b;" * 50)),
    "safetensors": Target("model.safetensors", _safetensors, _header, words=(*SIZES, *BRACKETS)),
    "gguf": Target("model.gguf", _gguf, _convert, words=SIZES, cheap=False),
    "config.json": Target("config.json", _model_config, _spec, words=BRACKETS),
    "tokenizer": Target("tokenizer.json", _tokenizer, _read_tokenizer, words=BRACKETS),
    "yaml": Target("config.yaml", _config, _yaml, words=(*BRACKETS, b"&a ", b"*a", b"!!binary ", b"<<: ", b"? ")),
    "manifest": Target("manifest.json", _manifest, _faults, (OSError, ValueError), words=BRACKETS),
    "run.json": Target("run.json", _record, _run, words=BRACKETS),
}  # fmt: skip
