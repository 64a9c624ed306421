"""Tiny tokenizers of the two families that matter: byte-level (ChatML, no BOS) and Llama's (▁ marks, adds BOS)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from luthier.assets.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level(chat_template: str | None = CHATML, **settings: Any) -> Tokenizer:
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("he", "l"), ("Ċ", "Ċ"), ("Ġ", "a"), ("l", "l"), ("<", "|")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    named = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>", **settings}
    return Tokenizer(backend, named, chat_template=chat_template)


def llama_style(prepend: str = "first", chat_template: str | None = None, **settings: Any) -> Tokenizer:
    """``prepend``: "first" is Metaspace at the start only, "normalizer" is the older Prepend before every piece."""
    letters = [chr(c) for c in range(32, 127)] + ["▁", "\n"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [*letters, "▁a", "he", "hel", *(f"<0x{i:02X}>" for i in range(256))]:
        vocab.setdefault(piece, len(vocab))
    backend = Backend(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("h", "e"), ("he", "l")], unk_token="<unk>", byte_fallback=True)
    )
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special("<unk>", "<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **settings}
    return Tokenizer(backend, named, chat_template=chat_template)


def prompt_section(**keys: Any) -> SimpleNamespace:
    """What rendering reads of `config.prompt`."""
    defaults = {"template": None, "task": None, "system": None, "chat_template": None, "train_on": "completion"}
    return SimpleNamespace(**{**defaults, **keys})
