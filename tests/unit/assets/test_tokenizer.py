from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering_fixtures import CHATML, byte_level, llama_style

from luthier.assets.tokenizer import Tokenizer
from luthier.errors import AssetError

FAMILIES = {"bytes": byte_level(), "first": llama_style(), "normalizer": llama_style("normalizer")}
TEXT = st.text(st.sampled_from("ahel <|>/s\nü😀▁"), max_size=20)


def test_what_the_tokenizer_adds() -> None:
    assert byte_level().bos_ids == ()
    assert llama_style().bos_ids == (1,)
    assert llama_style(add_bos_token=False).bos_ids == ()
    assert byte_level(add_bos_token=True).bos_ids == (byte_level().bos_id,)


def test_pad_is_eos_when_none_is_named() -> None:
    assert llama_style().pad_id == llama_style().eos_id == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_special_strings_in_text_are_ordinary(family: str) -> None:
    tokenizer = FAMILIES[family]
    controls = {tokenizer.control_id(s) for s in tokenizer.special_strings}
    assert tokenizer.special_strings and None not in controls
    for name in tokenizer.special_strings:
        assert controls.isdisjoint(tokenizer.encode(f"a{name}b"))
        assert tokenizer.control_id(name) in tokenizer.encode(f"a{name}b", controls=True)
        assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == f"a{name}b"


@pytest.mark.parametrize("family", FAMILIES)
@given(parts=st.lists(st.one_of(TEXT, st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_start|>"])), max_size=6))
@settings(max_examples=60, deadline=None)
def test_spans_without_data_equal_the_tokenizer_itself(family: str, parts: list[str]) -> None:
    tokenizer, text = FAMILIES[family], "".join(parts)
    assert tokenizer.encode_spans([(text, ())])[0] == tokenizer.encode(text, controls=True)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.lists(st.one_of(TEXT, st.sampled_from(["<s>", "</s>", "<|im_end|>"]))).map("".join))
@settings(max_examples=60, deadline=None)
def test_data_never_gives_a_control_token(family: str, text: str) -> None:
    tokenizer = FAMILIES[family]
    controls = {tokenizer.control_id(s) for s in tokenizer.special_strings} - {tokenizer.unk_id}
    whole = f"a{text}a"
    (ids,) = tokenizer.encode_spans([(whole, [(1, 1 + len(text))])])
    assert controls.isdisjoint(ids)


def test_a_continuation_gets_no_word_start() -> None:
    for tokenizer in (llama_style(), llama_style("normalizer")):
        assert tokenizer.encode("hel", continuation=True) == tokenizer.encode("ahel")[-1:]
        assert tokenizer.encode("hel") != tokenizer.encode("hel", continuation=True)


def test_a_vocabulary_that_swallows_the_string_whole() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocab = {"<unk>": 0, "</s>": 1, "<": 2, "/": 3, "s": 4, ">": 5, "</": 6, "s>": 7}
    backend = Backend(models.Unigram([(piece, -1.0) for piece in vocab], unk_id=0))
    tokenizer = Tokenizer(backend, {"eos_token": "</s>", "unk_token": "<unk>"})
    assert tokenizer.encode("</s>") == [6, 7]
    assert tokenizer.encode("</s>", controls=True) == [1]


def test_edges_that_could_join_are_hazards() -> None:
    tokenizer = byte_level()
    assert tokenizer.hazards("plain text") == []
    assert tokenizer.hazards("a <|im_") == [(2, 7)]
    assert tokenizer.hazards("end|> b") == [(0, 5)]
    assert tokenizer.hazards("a<|im_end|>b") == [(1, 11)]


def test_eos_of_every_source(tmp_path: Path) -> None:
    tokenizer = byte_level()
    write(tmp_path, tokenizer, {"eos_token": "<|endoftext|>", "chat_template": CHATML})
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_id == tokenizer.control_id("<|endoftext|>")
    assert tokenizer.control_id("<|im_end|>") in loaded.eos_ids  # the template ends turns with it
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert Tokenizer.load(tmp_path).eos_ids == (loaded.eos_id, 3, 4)


def test_the_hash_is_of_the_files(tmp_path: Path) -> None:
    write(tmp_path, byte_level(), {"eos_token": "<|im_end|>"})
    first = Tokenizer.load(tmp_path).content_hash
    assert Tokenizer.load(tmp_path).content_hash == first
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.load(tmp_path).content_hash != first
    assert Tokenizer.load(tmp_path).chat_template == CHATML


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(AssetError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == "asset-no-tokenizer"


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(AssetError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == "asset-damaged"
    write(tmp_path, byte_level(), {})
    (tmp_path / "tokenizer_config.json").write_text("{,")
    with pytest.raises(AssetError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == "asset-damaged"


def test_no_end_of_sequence(tmp_path: Path) -> None:
    write(tmp_path, byte_level(), {})
    with pytest.raises(AssetError) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.code == "asset-unsupported"


def write(folder: Path, tokenizer: Tokenizer, settings: dict[str, str]) -> None:
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
