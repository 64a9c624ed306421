"""Fixtures that every test may use."""

from __future__ import annotations

import ipaddress
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but this machine is reached, except by tests that are marked long."""
    if request.node.get_closest_marker("long"):
        return
    connect = socket.socket.connect

    def within(own: socket.socket, address: Any) -> None:
        host = address[0] if own.family in (socket.AF_INET, socket.AF_INET6) else "localhost"
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise OSError(f"a test reached for {host}")
        connect(own, address)

    monkeypatch.setattr(socket.socket, "connect", within)


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer without merges and with ChatML's control tokens; the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer.get_vocab_size()


def write_llama(folder: Path) -> None:
    """A random two-layer Llama (hidden size 32), its byte-level tokenizer and ChatML template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocab + 5,  # padded, as real models often are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (hidden size 32), its byte-level tokenizer and ChatML template."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_llama(folder)
    return folder


@pytest.fixture
def wider_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model at a width that 4-bit blocks of 64 weights divide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "wider"
    shutil.copytree(tiny_llama, folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 64, 128
    config.head_dim = 64 // config.num_attention_heads
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
