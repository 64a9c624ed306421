"""What a config or a file names as an address is not connected to: the hub's ids are all that goes out."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from luthier import assets, config, pipeline
from luthier.assets.resolve import is_hub_id
from luthier.data import sources
from luthier.data.sources import hub
from luthier.errors import LuthierError

ADDRESSES = (
    "http://169.254.169.254/latest/meta-data", "https://127.0.0.1:8000/rows.csv", "http://2852039166/rows.jsonl",
    "http://0x7f000001/x", "http://[::1]/x", "ftp://127.0.0.1/rows.csv", "file:///etc/passwd", "//127.0.0.1/share/x",
    "s3://bucket/rows.parquet", "gs://bucket/x", "http:/127.0.0.1", "127.0.0.1:80/x", "\\\\127.0.0.1\\share\\x",
    "git+ssh://127.0.0.1/x", "data:text/csv,a", "localhost:80/x",
)  # fmt: skip


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that something tried to reach or to look up."""
    out: list[Any] = []

    def refuse(*given: Any, **named: Any) -> Any:
        out.append(given)
        raise OSError("no connection in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    with pytest.raises(OSError, match="no connection in this test"):
        socket.create_connection(("127.0.0.1", 1))
    assert out.pop()
    return out


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses(address: str, tiny_llama: Path, tmp_path: Path, tried: list[Any]) -> None:
    assert not is_hub_id(address) and not hub.is_id(address)
    with pytest.raises(LuthierError):
        sources.read(address)
    with pytest.raises(LuthierError):
        assets.resolve(address, cache=tmp_path)
    settings = config.load({
        "base_model": str(tiny_llama), "execution": {"device": "cpu", "model": "generic"},
        "adapter": {"type": "lora", "pretrained_adapter_weights": address}, "trainer": {"train_steps": 1},
    })  # fmt: skip
    rows = [{"question": f"say {i}", "answer": f"yes {i}"} for i in range(20)]
    with pytest.raises(LuthierError):
        pipeline.train(settings, rows, output=tmp_path / "run")
    assert tried == []


def test_addresses_in_files(tiny_llama: Path, tmp_path: Path, tried: list[Any]) -> None:
    """In a base's own records, and in rows."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((base / name).read_text(encoding="utf-8"))
        hostile = {"_name_or_path": ADDRESSES[0], "name_or_path": ADDRESSES[0], "vocab_file": ADDRESSES[0]}
        (base / name).write_text(json.dumps(found | hostile), encoding="utf-8")
    settings = config.load({
        "base_model": str(base), "execution": {"device": "cpu"},
        "trainer": {"train_steps": 1, "precision": "fp32", "eval_generation_rows": 0},
    })  # fmt: skip
    rows = [{"question": f"see {address}", "answer": f"![x]({address})"} for address in ADDRESSES]
    pipeline.train(settings, rows, output=tmp_path / "run")
    assert tried == []


def test_no_test_reaches_beyond_this_machine() -> None:
    with pytest.raises(OSError, match=r"a test reached for 192\.0\.2\.1"):
        socket.create_connection(("192.0.2.1", 443), timeout=1)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass
