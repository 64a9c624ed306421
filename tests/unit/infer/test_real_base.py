"""The engine on real weights, SmolLM2-135M, against transformers' `generate`: in fp32, token for token."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import adapted, ask, with_peft
from transformers import AutoModelForCausalLM, GenerationConfig

from luthier import assets
from luthier.assets.chat import render_chat
from luthier.assets.tokenizer import Tokenizer
from luthier.export.merge import merged
from luthier.infer.engine import DecoderEngine
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.types import Sampling

TABLE = Path(__file__).parents[3] / "examples" / "dictionary" / "dictionary.csv"
STEPS = 48
ROWS = (1, 8)  # at once

Answers = dict[int, tuple[int, ...]]


def asked(tokenizer: Tokenizer) -> list[list[int]]:
    """24 prompts from all over the table: as the demo's config writes them, and every other as a turn of a chat."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::30]
    texts = [f"{row['instruction']}\n{row['input']}\n" for row in rows]
    turns = [[{"role": "user", "content": text}] for text in texts]
    assert tokenizer.chat_template is not None
    chats = [render_chat(tokenizer.chat_template, turn, add_generation_prompt=True) for turn in turns]
    return [
        tokenizer.encode(chats[at], controls=True) if at % 2 else tokenizer.encode(texts[at]) for at in range(len(rows))
    ]


def by_transformers(model: Any, tokenizer: Tokenizer, prompts: list[list[int]]) -> Answers:
    """All at once, padded on their left: one by one takes many times as long."""
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, eos_token_id=list(tokenizer.eos_ids), pad_token_id=tokenizer.pad_id
    )
    width = max(map(len, prompts))
    given = torch.tensor([[tokenizer.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        made = model.generate(given, attention_mask=seen, generation_config=config)[:, width:].tolist()
    ends = [next((at for at, token in enumerate(ids, 1) if token in tokenizer.eos_ids), len(ids)) for ids in made]
    return {key: tuple(ids[:end]) for key, (ids, end) in enumerate(zip(made, ends, strict=True))}


def differences(model: Any, prompts: list[list[int]], want: Answers, got: Answers) -> list[str]:
    """Where answers part, and how far transformers' own scores of the two tokens are from each other there."""
    told = []
    for key in (key for key in want if want[key] != got[key]):
        pairs = zip(want[key], got[key], strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        if at is None:
            told.append(f"prompt {key}: {len(want[key])} and {len(got[key])} tokens")
            continue
        with torch.inference_mode():
            scores = model(torch.tensor([[*prompts[key], *want[key][:at]]])).logits[0, -1]
        apart = float(scores[want[key][at]] - scores[got[key][at]])
        told.append(f"prompt {key}, token {at}: {want[key][at]} and {got[key][at]}, {apart:.2e} apart")
    return told


def check(model: Any, decoder: Decoder, tokenizer: Tokenizer, prompts: list[list[int]]) -> Answers:
    """The answers, which are the same by both."""
    want = by_transformers(model, tokenizer, prompts)
    for rows in ROWS:
        engine = DecoderEngine(decoder, tokenizer, batch_size=rows)
        got = {key: done.ids for key, done in ask(engine, Sampling(max_new_tokens=STEPS), prompts).items()}
        assert differences(model, prompts, want, got) == [], f"{rows} rows at once"
    return want


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_smollm2_answers_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = assets.resolve("smollm2")
    tokenizer = Tokenizer.load(base.path)
    prompts = asked(tokenizer)
    assert len(prompts) == 24
    theirs: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    ours = load_decoder(base.path, read_shape(base.path), Placing(dtype=torch.float32))
    plain = check(theirs, ours, tokenizer, prompts)

    tuned = with_peft(theirs, adapted(ours, std=0.06))
    monkeypatch.setattr("luthier.infer.forward.COMPILED", 1)  # as answers of more tokens than these run
    with_adapter = check(tuned, ours, tokenizer, prompts)
    monkeypatch.undo()

    folder = merged(tuned, tmp_path / "merged", tokenizer_from=base.path, dtype="fp32")
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    alone = load_decoder(folder, read_shape(folder), Placing(dtype=torch.float32))
    of_merged = check(whole, alone, tokenizer, prompts)

    changed = sum(plain[key] != with_adapter[key] for key in plain)
    same = sum(with_adapter[key] == of_merged[key] for key in plain)
    tokens = [len(answer) for answer in with_adapter.values()]
    print(
        f"{changed} of 24 answers changed by the adapter, {same} the same merged; {min(tokens)} to {max(tokens)} tokens"
    )
    assert changed >= 12
