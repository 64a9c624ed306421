"""Names to files: what is found, what is refused, and with which words."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from luthier import events
from luthier.assets import content_hash, convert_pickled, read_spec, resolve
from luthier.assets.cache import build_once, remembered_hash
from luthier.errors import AssetError

module = importlib.import_module("luthier.assets.resolve")  # the package's name is its function


def code(name: str, cache: Path, **options: bool) -> tuple[str, str]:
    with pytest.raises(AssetError) as error:
        resolve(name, cache=cache, **options)
    return error.value.code, str(error.value)


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    base = resolve(str(folder), cache=tmp_path / "cache")
    assert base.source == "folder" and len(base.content_hash) == 64 and not base.remote_code
    assert base.spec.architecture == "LlamaForCausalLM" and base.spec.layers == 2 and base.spec.kv_heads == 2


def card(*lines: str) -> str:
    return "\n".join(["---", "language: [en, ja]", *lines, "---", "# A model", "", "license: mit", ""])


APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"
MIT = "Copyright (c) 2026 Someone\n\nPermission is hereby granted, free of charge, to any\nperson obtaining a copy"
LLAMA = "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023\n"
GEMMA = "https://ai.google.dev/gemma/terms"


@pytest.mark.parametrize(
    ("files", "licence", "place"),
    [
        ({}, None, ""),
        ({"README.md": "# A model\nlicense: llama2\n"}, None, ""),
        ({"README.md": card("license: apache-2.0")}, None, ""),
        ({"README.md": card("license: [mit, cc0-1.0]")}, None, ""),
        ({"README.md": card("license:", "- mit", "- llama2")}, "mit, llama2", "README.md"),
        ({"README.md": card("license: llama2"), "LICENSE.txt": LLAMA}, "llama2", "LICENSE.txt"),
        ({"README.md": card("license: other", "license_name: gemma", f"license_link: {GEMMA}")}, "gemma", GEMMA),
        ({"README.md": card("license: other", "license_link: LICENSE")}, "other", "README.md"),
        ({"README.md": card("license: unknown"), "LICENSE": APACHE}, None, ""),
        ({"README.md": card("license: {a: ["), "LICENSE": MIT}, None, ""),
        ({"LICENSE": LLAMA}, "LLAMA 2 COMMUNITY LICENSE AGREEMENT", "LICENSE"),
        ({"LICENSE": "\x1b[2J" + "x" * 200}, ("[2J" + "x" * 200)[:80], "LICENSE"),
    ],
)
def test_a_folders_licence_is_said_before_it_is_loaded(
    files: dict[str, str], licence: str | None, place: str, folder: Path, tmp_path: Path
) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    place = place if place.startswith("https:") else str(folder / place)
    wanted = [] if licence is None else [f"{folder}: LICENCE-BOUND ({licence}): read its terms at {place}"]
    seen: list[events.Event] = []
    resolve(str(folder), cache=tmp_path / "cache", sink=seen.append)
    assert [one.text for one in seen if isinstance(one, events.Note)] == wanted
    (folder / "model.safetensors").write_bytes(b"not weights")
    seen.clear()
    with pytest.raises(AssetError):
        resolve(str(folder), cache=tmp_path / "cache", sink=seen.append)
    assert len(seen) == len(wanted), "it is said before the weights are looked at"


def test_a_licence_that_is_a_link_out_of_the_folder_is_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2", encoding="utf-8")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    seen: list[events.Event] = []
    with pytest.raises(AssetError, match="links to files outside"):
        resolve(str(folder), cache=tmp_path / "cache", sink=seen.append)
    assert seen == []


def test_parameters_are_counted_exactly(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert read_spec(folder).parameters == sum(p.numel() for p in model.parameters())


def test_the_hash_follows_content_not_place(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("nothing to do with it")
    assert content_hash(folder, tmp_path) == content_hash(copy, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert content_hash(folder, tmp_path) != content_hash(copy, tmp_path)


def test_not_found_says_where_it_looked(tmp_path: Path) -> None:
    kind, text = code("no-such-model", tmp_path)
    assert kind == "asset-not-found" and "smollm2" in text and "no-such-model" in text and "did you mean" not in text
    assert "did you mean 'smollm2'?" in code("SmolLM", tmp_path)[1]
    assert code(str(tmp_path / "x.gguf"), tmp_path)[0] == "asset-not-found"
    (tmp_path / "empty").mkdir()
    assert code(str(tmp_path / "empty"), tmp_path)[0] == "asset-not-found"


def test_hub_failures_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    answer = MagicMock(headers={})

    def failing(error: Exception) -> None:
        def download(*args: object, **options: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    failing(GatedRepoError("gated", response=answer))
    kind, text = code("owner/gated", tmp_path)
    assert kind == "asset-gated" and "huggingface.co/owner/gated" in text
    failing(RepositoryNotFoundError("none", response=answer))
    kind, text = code("owner/none", tmp_path)
    assert kind == "asset-not-found" and "does not have it" in text and "hub cache" in text
    failing(LocalEntryNotFoundError("offline"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kind, text = code("owner/model", tmp_path)
    assert kind == "asset-not-found" and "HF_HUB_OFFLINE" in text


def test_remote_code_needs_the_callers_word(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.Y"}}))
    kind, text = code(str(folder), tmp_path)
    assert kind == "asset-remote-code" and "trust_remote_code=True" in text
    assert resolve(str(folder), cache=tmp_path, trust_remote_code=True).remote_code


def test_incomplete_folders(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert code(str(folder), tmp_path)[0] == "asset-damaged"
    (folder / "model.safetensors").write_bytes(whole)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    kind, text = code(str(folder), tmp_path)
    assert kind == "asset-damaged" and "model-00001-of-00002" in text
    (folder / "model.safetensors.index.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert code(str(folder), tmp_path)[0] == "asset-no-tokenizer"
    (folder / "config.json").write_text("{")
    assert code(str(folder), tmp_path)[0] == "asset-damaged"


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert code(str(tmp_path), tmp_path)[0] == "asset-unsupported"


def test_not_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    assert code(str(tmp_path / "x.gguf"), tmp_path)[0] == "asset-damaged"


def test_a_gguf_that_declares_what_it_has_not_is_refused_before_it_is_built(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def file(blocks: int = 1, tensors: int = 1, dimension: int = 32, key: str = "llama.block_count") -> bytes:
        keys = [
            text("general.architecture") + struct.pack("<I", 8) + text("llama"),
            text(key) + struct.pack("<II", 4, blocks),
            text("llama.embedding_length") + struct.pack("<II", 4, 32),
        ]
        tensor = text("token_embd.weight") + struct.pack("<IQQIQ", 2, dimension, 2, 0, 0)
        head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys) + tensor
        return head + bytes(-len(head) % 32) + bytes(32 * 2 * 4)

    for content, said in (
        (file(blocks=10**6), "llama.block_count is 1,000,000"),
        (file(tensors=10**9), "declares 1,000,000,000 entries"),
        (file(dimension=2**40), "a tensor of"),
        (file(key="other.block_count"), "lacks llama.block_count"),
        (file()[:60], "declares"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(AssetError, match=said) as caught:
            resolve(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")
        assert caught.value.code == "asset-damaged"


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code from a pickle ran",))


def test_pickled_weights_are_refused_and_converted(folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")
    kind, text = code(str(folder), tmp_path)
    assert kind == "asset-pickled-weights" and f"luthier convert {folder}" in text
    with pytest.raises(AssetError) as harmful:
        convert_pickled(folder)
    assert harmful.value.code == "asset-damaged"
    torch.save(weights, folder / "pytorch_model.bin")
    made = convert_pickled(folder)
    back = load_file(made / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[k], weights[k]) for k in weights)
    assert resolve(str(made), cache=tmp_path).spec.layers == 2
    with pytest.raises(AssetError) as none:
        convert_pickled(made)
    assert none.value.code == "asset-not-found"


def test_two_makers_make_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make(target: Path) -> None:
        made.append(1)
        time.sleep(0.3)
        (target / "file").write_text("whole")

    threads = [threading.Thread(target=build_once, args=(tmp_path / "x", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "x" / "file").read_text() == "whole"


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    def make(target: Path) -> None:
        (target / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "x", make)
    assert not (tmp_path / "x").exists()
    assert not (build_once(tmp_path / "x", lambda target: None) / "half").exists()


def test_remembered_hashes_notice_a_change(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("one")
    first = remembered_hash(path, tmp_path)
    assert remembered_hash(path, tmp_path) == first
    path.write_text("another")
    assert remembered_hash(path, tmp_path) != first


def test_the_alias_takes_the_first_place_that_has_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache, the package, the hub: in that order, and no further than needed. Other content is named."""
    import huggingface_hub

    def file(name: str, text: str) -> Path:
        path = tmp_path / name / module.SMOLLM2_FILE
        path.parent.mkdir()
        path.write_text(text)
        return path

    cached, packaged, fetched = file("cache", "other"), file("package", "the one"), file("hub", "the one")
    asked: list[str] = []

    def place(name: str, path: Path | None) -> Any:
        def find(*given: Any, **named: Any) -> Any:
            asked.append(name)
            return None if path is None else str(path)

        return find

    spec = SimpleNamespace(submodule_search_locations=[str(packaged.parent)])
    monkeypatch.setattr(module, "SMOLLM2_SHA256", hashlib.sha256(b"the one").hexdigest())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: asked.append("package") or spec)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", place("hub", fetched))
    monkeypatch.setattr(module, "_gguf_base", lambda name, path, *rest: path)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", place("cache", fetched))
    assert module._smollm2(tmp_path / "own", events.silent) == fetched and asked == ["cache"]
    asked.clear()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", place("cache", cached))
    assert module._smollm2(tmp_path / "own", events.silent) == packaged and asked == ["cache", "package"]
    packaged.unlink()
    assert module._smollm2(tmp_path / "own", events.silent) == fetched and asked[-1] == "hub"
    fetched.write_text("another")
    with pytest.raises(AssetError) as none:
        module._smollm2(tmp_path / "own", events.silent)
    assert str(none.value).count("another content") == 2  # the cache's and the hub's


@pytest.mark.e2e
def test_the_embedded_model() -> None:
    base = resolve("smollm2")
    assert base.spec.parameters == 134_515_008 and base.content_hash.endswith("728110db53")
    assert (base.path / "tokenizer.json").is_file()
