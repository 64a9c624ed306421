"""The engine on the decoder against transformers' `generate`, and against itself under other batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CASES, make
from transformers import GenerationConfig

from luthier.config.adapter import Lora
from luthier.events import Stage, Warned
from luthier.infer.answer import is_out_of_memory
from luthier.infer.cache import Cache
from luthier.infer.engine import DecoderEngine, sizes_of
from luthier.infer.forward import Forward
from luthier.infer.generate import HfEngine
from luthier.infer.rules import unknown
from luthier.infer.stepping import Step, Stepper
from luthier.kernels.cpu import step as compiled
from luthier.model.decoder.decoder import Decoder
from luthier.model.decoder.load import Placing, load_decoder
from luthier.model.decoder.shape import read_shape
from luthier.model.decoder.weights import Quantised
from luthier.plan.slots import FEW, READ, SHARE, waves
from luthier.types import Request, Sampling

PROMPTS = [[5, 9, 17], [3], [40, 41, 42, 43, 44, 45, 46, 47, 48], [7, 7], [11, 12, 13, 14], [40, 41, 42, 43, 44]]
END = 2


class Letters:
    """A tokenizer whose id n is the character chr(32 + n); id 2 ends an answer."""

    eos_ids = (END,)
    pad_id = 0

    def decode(self, ids):
        return "".join(chr(32 + token) for token in ids)


def both(folder: Path, case: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Decoder]:
    """transformers' model and ours, of the same weights."""
    theirs = make(folder, case)
    for parameter in theirs.parameters():
        parameter.data *= 1.6  # answers that repeat one token would prove little
    theirs.to(dtype).save_pretrained(folder)
    return theirs, load_decoder(folder, read_shape(folder), Placing(dtype=dtype))


def adapted(decoder: Decoder, std: float = 0.3) -> Decoder:
    decoder.adapt(Lora(r=3, alpha=5), seed=3)
    generator = torch.Generator().manual_seed(1)
    for pair in decoder.pairs:
        pair.lora_B.data.copy_(torch.empty(pair.lora_B.shape).normal_(std=std, generator=generator))
    return decoder


def with_peft(theirs: Any, decoder: Decoder) -> Any:
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs, config)
    state = dict(model.named_parameters())
    for pair in decoder.pairs:
        for factor in ("lora_A", "lora_B"):
            state[f"base_model.model.{pair.name}.{factor}.default.weight"].data.copy_(getattr(pair, factor))
    return model.eval()


def reference(model: Any, prompt: list[int], steps: int) -> list[int]:
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, eos_token_id=END, pad_token_id=0)
    ids = torch.tensor([prompt])
    model.generation_config = GenerationConfig()
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


def ask(engine: Any, sampling: Sampling, prompts: list[list[int]] = PROMPTS) -> dict[int, Any]:
    found = {c.key: c for c in engine.generate([Request(key, p, sampling) for key, p in enumerate(prompts)])}
    assert sorted(found) == list(range(len(prompts)))  # tests go through what is here
    return found


def ids(answers: dict[int, Any]) -> dict[int, tuple[int, ...]]:
    return {key: completion.ids for key, completion in answers.items()}


@pytest.mark.parametrize("program", ["plain", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_transformers_with_and_without_adapter(
    tmp_path: Path, case: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = both(tmp_path, case)
    run, calls = compiled.attend, list[int]()
    if program == "plain":
        monkeypatch.setattr(compiled, "serves", lambda dtype: False)
    monkeypatch.setattr(compiled, "attend", lambda qkv, *given: (calls.append(len(qkv)), run(qkv, *given))[1])
    want = {key: tuple(reference(theirs, prompt, 20)) for key, prompt in enumerate(PROMPTS)}
    monkeypatch.setattr("luthier.infer.forward.COMPILED", 1)
    monkeypatch.setattr("luthier.infer.forward.LAID_OUT", 16)  # matrices laid out anew for several rows
    sampling = Sampling(max_new_tokens=20)
    assert ids(ask(DecoderEngine(ours, Letters()), sampling)) == want
    adapted(ours)
    assert ids(ask(DecoderEngine(ours, Letters(), use_base=True, batch_size=2), sampling)) == want
    tuned = with_peft(theirs, ours)
    want_tuned = {key: tuple(reference(tuned, prompt, 20)) for key, prompt in enumerate(PROMPTS)}
    ours.train()
    assert want_tuned != want
    assert ids(ask(DecoderEngine(ours, Letters(), batch_size=4), sampling)) == want_tuned
    assert ours.training
    whole = all(2 * len(kind.inverse) == ours.shape.head_dim for kind in ours.shape.rotary)
    assert bool(calls) == (program == "compiled" and whole and ours.shape.attention_softcap is None)


def test_a_numba_that_does_not_run_is_told_and_none_is_not(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.infer.forward.COMPILED", 1)
    monkeypatch.setattr(compiled, "_runs", lambda dtype: False)
    for there in (True, False):
        monkeypatch.setattr(compiled, "_served", {})
        monkeypatch.setattr(compiled, "installed", lambda there=there: there)
        told: list[Any] = []
        ask(DecoderEngine(decoder, Letters(), sink=told.append), Sampling(max_new_tokens=3))
        warned = [one for one in told if isinstance(one, Warned)]
        assert len(warned) == there and any(isinstance(one, Stage) for one in told) == there


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return both(tmp_path_factory.mktemp("llama"))[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return both(tmp_path_factory.mktemp("llama"))[0]


SETTINGS = [
    Sampling(max_new_tokens=12),
    Sampling(max_new_tokens=12, do_sample=True, seed=3),
    Sampling(max_new_tokens=9, do_sample=True, seed=3, temperature=0.7, top_k=20, top_p=0.9, extra={"min_p": 0.01}),
    Sampling(max_new_tokens=12, repetition_penalty=3.0, min_new_tokens=12),
    Sampling(max_new_tokens=12, do_sample=True, seed=5, repetition_penalty=1.3, extra={"no_repeat_ngram_size": 2}),
    Sampling(max_new_tokens=6, num_beams=3, extra={"length_penalty": 2.0, "early_stopping": True}),
    Sampling(max_new_tokens=6, extra={"guidance_scale": 1.5}),
    Sampling(max_new_tokens=6, extra={"encoder_repetition_penalty": 3.0}),
    Sampling(max_new_tokens=6, extra={"bad_words_ids": ((13,), (40, 41)), "suppress_tokens": (7,)}),
    Sampling(max_new_tokens=6, extra={"begin_suppress_tokens": (5, 9), "forced_eos_token_id": 2, "max_length": 9}),
    Sampling(max_new_tokens=6, extra={"forced_bos_token_id": 33, "min_length": 5}),
    Sampling(max_new_tokens=6, min_new_tokens=6, extra={"forced_bos_token_id": 0, "forced_eos_token_id": 0}),
    Sampling(max_new_tokens=6, extra={"use_cache": False}),
    Sampling(max_new_tokens=9, extra={"exponential_decay_length_penalty": (2, 1.5), "remove_invalid_values": True}),
    Sampling(max_new_tokens=6, do_sample=True, seed=2, extra={"typical_p": 0.8, "sequence_bias": (((7,), 3.0),)}),
    Sampling(max_new_tokens=6, extra={"renormalize_logits": True, "max_time": 60.0}),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=repr)
def test_settings_mean_what_they_mean_in_transformers(decoder: Decoder, model: Any, sampling: Sampling) -> None:
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 8]
    want = ids(ask(HfEngine(model, Letters()), sampling, prompts))
    assert ids(ask(DecoderEngine(decoder, Letters(), context=64), sampling, prompts)) == want
    assert ids(ask(DecoderEngine(decoder, Letters(), context=64, batch_size=1), sampling, prompts)) == want


@pytest.mark.parametrize("token", [0, 33])
def test_forced_tokens_are_first_and_last_whatever_their_id(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, token: int
) -> None:
    monkeypatch.delattr(DecoderEngine, "by_transformers")  # by its own steps
    forced = {"forced_bos_token_id": token, "forced_eos_token_id": token}
    for done in ask(
        DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=5, min_new_tokens=5, extra=forced)
    ).values():
        assert (done.ids[0], done.ids[-1], len(done.ids)) == (token, token, 5)


def test_rows_of_other_settings_share_a_batch(decoder: Decoder) -> None:
    requests = [Request(key, PROMPTS[key % 6], sampling) for key, sampling in enumerate(SETTINGS)]
    engine = DecoderEngine(decoder, Letters(), batch_size=3)
    together = ids({c.key: c for c in engine.generate(requests)})
    alone = {r.key: next(iter(engine.generate([r]))).ids for r in requests}
    assert together == alone


def test_what_prompts_share_is_read_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = [(5 * i) % 90 + 3 for i in range(20)]
    prompts = [shared + tail for tail in PROMPTS]
    engine = DecoderEngine(decoder, Letters(), batch_size=4)
    read = []
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda ids_t: read.append(len(ids_t)) or embed(ids_t))
    got = ids(ask(engine, Sampling(max_new_tokens=1), prompts))
    assert sum(read) == 20 + sum(map(len, PROMPTS))
    alone = [next(iter(engine.generate([Request(0, p, Sampling(max_new_tokens=1))]))).ids for p in prompts]
    assert list(dict(sorted(got.items())).values()) == alone


def test_bad_rows_complete_with_an_error_and_the_rest_is_answered(decoder: Decoder) -> None:
    prompts = [[5, 9], [], [3] * 48, [96], [7], [3] * 46]
    engine = DecoderEngine(decoder, Letters(), context=48)
    answers = ask(engine, Sampling(max_new_tokens=3), prompts)
    assert [answers[k].finish_reason == "error" for k in range(6)] == [False, True, True, True, False, False]
    assert len(answers[5].ids) <= 2
    with pytest.raises(ValueError, match="empty"):
        list(engine.stream(Request(0, [], Sampling())))


def test_stop_strings_end_a_row_and_a_stream_gives_the_same(decoder: Decoder) -> None:
    full = ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=12, min_new_tokens=12))
    stop = full[0].text[2:4]
    sampling = Sampling(max_new_tokens=12, min_new_tokens=12, stop=(stop,))
    engine = DecoderEngine(decoder, Letters())
    stopped = ask(engine, sampling)
    assert stopped[0].text == full[0].text[: full[0].text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    for key, prompt in enumerate(PROMPTS):
        assert "".join(engine.stream(Request(key, prompt, sampling))) == stopped[key].text
    beams = Sampling(max_new_tokens=5, num_beams=2)
    assert "".join(engine.stream(Request(0, PROMPTS[0], beams))) == ask(engine, beams)[0].text


def test_logprobs_are_the_models_own_before_any_rule(decoder: Decoder, model: Any) -> None:
    sampling = Sampling(max_new_tokens=8, min_new_tokens=8, do_sample=True, seed=1, temperature=0.5, top_k=5)
    for key, done in ask(DecoderEngine(decoder, Letters(), logprobs=True), sampling).items():
        whole = torch.tensor([[*PROMPTS[key], *done.ids]])
        with torch.no_grad():
            logp = model(whole, use_cache=False).logits[0].log_softmax(-1)
        start = len(PROMPTS[key]) - 1
        want = [float(logp[start + i, token]) for i, token in enumerate(done.ids)]
        assert done.logprobs == pytest.approx(want, abs=1e-4)


def test_out_of_memory_halves_the_rows_at_once(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    want = ids(ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=4)))
    step = Forward.step

    def small(self, ids_r, *rest):
        if len(ids_r) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, ids_r, *rest)

    monkeypatch.setattr(Forward, "step", small)
    assert ids(ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=4))) == want

    def none(self, ids_r, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Forward, "step", none)
    answers = ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=4, min_new_tokens=4))
    assert all("out of memory" in done.error for done in answers.values())
    assert len(answers) == len(PROMPTS)


def test_no_room_is_seen_behind_the_error_that_follows_it() -> None:
    """What ends the capture of a graph after it ran out of memory says nothing of memory itself."""
    with pytest.raises(RuntimeError) as raised:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    assert is_out_of_memory(raised.value) and not is_out_of_memory(RuntimeError("operation failed"))


def check_many(folder: Path, count: int, sizes: tuple[int, ...], between: Sequence[int] = ()) -> None:
    """Greedy answers, prompt by prompt: transformers alone against our engine and the generic one in batches.

    Every prompt is asked in batches of each of ``sizes``. In those ``between``, as many as fill each slot twice and one
    more, the next of them every time.
    """
    theirs, ours = both(folder, "qwen2")
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 96) for _ in range(draw.randint(1, 30))] for _ in range(count)]
    sampling = Sampling(max_new_tokens=12)

    def check(model: Any, decoder: Decoder, **options: Any) -> dict[int, tuple[int, ...]]:
        want = {key: tuple(reference(model, prompt, 12)) for key, prompt in enumerate(prompts)}
        start, asked = 0, [(size, count) for size in sizes] + [(size, 2 * size + 1) for size in between]
        for size, rows in asked:
            own = [at % count for at in range(start, start + rows)]
            start += rows
            engine = DecoderEngine(decoder, Letters(), batch_size=size, **options)
            got = ids(ask(engine, sampling, [prompts[at] for at in own]))
            assert got == {key: want[at] for key, at in enumerate(own)}, size
        assert ids(ask(HfEngine(model, Letters(), batch_size=sizes[-1]), sampling, prompts)) == want
        return want

    base = check(theirs, ours)
    tuned = with_peft(theirs, adapted(ours))
    with_adapter = check(tuned, ours)
    with tuned.disable_adapter():
        assert check(tuned, ours, use_base=True) == base
    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    whole = load_decoder(folder / "merged", read_shape(folder / "merged"), Placing(dtype=torch.float32))
    assert check(merged, whole) == with_adapter != base


@pytest.fixture(params=["plain", "compiled"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Short answers in the form that long ones have: matrices laid out, and steps compiled or not."""
    monkeypatch.setattr("luthier.infer.forward.LAID_OUT", 2)
    monkeypatch.setattr("luthier.infer.forward.COMPILED", 1 if request.param == "compiled" else 10**9)
    return str(request.param)


def test_many_ragged_prompts_in_batches_of_any_size(tmp_path: Path, program: str) -> None:
    check_many(tmp_path, 20, (1, 7, 32))


@pytest.mark.long
def test_two_hundred_ragged_prompts_in_batches_of_any_size(tmp_path: Path, program: str) -> None:
    check_many(tmp_path, 200, (1, 32), range(2, 32))


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=10), Sampling(max_new_tokens=10, do_sample=True, seed=8)])
def test_an_answer_does_not_depend_on_its_neighbours(
    decoder: Decoder, model: Any, sampling: Sampling, program: str
) -> None:
    """The same request beside none, beside others in any order, and at any place of the batch; on both engines."""
    asked = Request(7, PROMPTS[0], sampling)
    draw = random.Random(1)
    for engine in (DecoderEngine(decoder, Letters(), batch_size=6), HfEngine(model, Letters(), batch_size=6)):
        (alone,) = engine.generate([asked])
        for _ in range(6):
            others = [
                Request(20 + at, [draw.randrange(3, 96) for _ in range(draw.randint(1, 25))], sampling)
                for at in range(draw.randint(1, 9))
            ]
            mixed = draw.sample([asked, *others], len(others) + 1)
            assert next(done for done in engine.generate(mixed) if done.key == 7) == alone
        again = DecoderEngine(decoder, Letters()) if isinstance(engine, DecoderEngine) else HfEngine(model, Letters())
        assert next(iter(again.generate([asked]))) == alone  # the same seed, the same text


def test_free_slots_are_filled_several_at_a_time(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    prefill = Forward.prefill
    monkeypatch.setattr(Forward, "prefill", lambda self, p, *rest: read.append(len(p)) or prefill(self, p, *rest))
    sampling = [Sampling(max_new_tokens=3 + key % 7, min_new_tokens=3 + key % 7) for key in range(96)]
    requests = [Request(key, [5, key % 90 + 3], one) for key, one in enumerate(sampling)]
    done = list(DecoderEngine(decoder, Letters(), batch_size=32).generate(requests))
    assert sorted(completion.key for completion in done) == list(range(96))
    assert all(len(completion.ids) == 3 + completion.key % 7 for completion in done)
    assert sum(read) == 96 and min(read) >= 2


class Repeated:
    """What a graph does, without one: the same step again, into the same tensors."""

    def __init__(self, stepper: Stepper, rows: int) -> None:
        self.stepper, self.rows = stepper, rows
        scores = torch.empty(rows, stepper.forward.shape.vocab, device=stepper.forward.device)
        self.left = Step(scores, scores.clone(), torch.empty(rows, dtype=torch.long, device=scores.device))

    def replay(self) -> None:
        new = self.stepper._once(self.rows, self.stepper.cache.capacity, True)
        for name in ("raw", "scores", "likeliest"):
            getattr(self.left, name).copy_(getattr(new, name))


def test_replayed_steps_give_the_same_answers(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def capture(self, rows):
        graph = Repeated(self, rows)
        self._captured[rows] = (graph, graph.left)
        sizes.append(rows)
        return True

    def requests():
        lengths = (3, 17, 9, 30, 12, 1, 25)
        plain = [Sampling(max_new_tokens=n, min_new_tokens=n // 2) for n in lengths]
        mixed = [*plain, *(s for s in SETTINGS if not unknown(s))]
        for settings in (plain, mixed):
            yield [Request(key, PROMPTS[key % 6], sampling) for key, sampling in enumerate(settings)]

    engine = DecoderEngine(decoder, Letters(), batch_size=5)
    want = [ids({c.key: c for c in engine.generate(some)}) for some in requests()]
    monkeypatch.setattr(Forward, "graphable", True)
    monkeypatch.setattr(Stepper, "_capture", capture)
    got = [ids({c.key: c for c in engine.generate(some)}) for some in requests()]
    assert got == want
    assert {4, 5} <= set(sizes)


LONG = [[7 + (at * at + n) % 80 for n in range(length)] for at, length in enumerate((75, 3, 32, 48, 8, 17, 65, 20))]


@pytest.mark.parametrize("case", CASES)
def test_a_long_prompt_is_read_in_pieces_between_the_steps_of_others(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a round may read: the same answers, no pass longer than that, and rows on their way are not kept."""
    _, decoder = both(tmp_path, case)
    adapted(decoder)
    sampling = [Sampling(max_new_tokens=n, min_new_tokens=n) for n in (9, 20, 5, 12, 15, 3, 7, 11)]
    drawn = Sampling(max_new_tokens=12, do_sample=True, temperature=1.5, seed=5, repetition_penalty=1.2)
    for settings in (sampling, [drawn] * len(LONG)):
        requests = [Request(key, prompt, own) for key, (prompt, own) in enumerate(zip(LONG, settings, strict=True))]
        want = ids({done.key: done for done in DecoderEngine(decoder, Letters()).generate(requests)})
        for replayed in (False, True):
            with monkeypatch.context() as patch:
                if replayed:
                    patch.setattr(Forward, "graphable", True)
                    patch.setattr(Stepper, "_capture", captured)
                for most, batch in ((5, 3), (16, 5), (65, 1)):
                    got, events = in_pieces(patch, decoder, requests, most, batch)
                    assert got == want, (most, batch, replayed)
                    assert max(events) <= most and sum(events) == sum(map(len, LONG))
                    if batch > 1:  # steps (0) between the pieces of one prompt
                        told = [key for key, _ in itertools.groupby(events)]
                        assert (most, 0, most) in zip(told, told[1:], told[2:], strict=False)


def test_what_is_read_of_a_prompt_stays_while_shorter_rows_are_answered(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's cache follows its rows: those on their way are short here, what is read of the other is not."""
    requests = [
        Request(0, [5], Sampling(max_new_tokens=120, min_new_tokens=120)),
        Request(1, LONG[0], Sampling(max_new_tokens=9)),
    ]
    want = ids({done.key: done for done in DecoderEngine(decoder, Letters()).generate(requests)})
    got, events = in_pieces(monkeypatch, decoder, requests, 40, 2)
    assert got == want and events[:5] == [1, 0, 40, 0, 35]


def in_pieces(
    patch: pytest.MonkeyPatch, decoder: Decoder, requests: list[Request], most: int, batch: int
) -> tuple[dict[int, tuple[int, ...]], list[int]]:
    """The answers where a round reads so many tokens at most; tokens of each pass that reads, 0 for a step."""
    events: list[int] = []
    prefill, advance = Forward.prefill, Stepper.advance

    def read(self, prompts, slots, cache, held=(), adapters=()):
        events.append(sum(map(len, prompts)) - sum(held))
        return prefill(self, prompts, slots, cache, held, adapters)

    with patch.context() as inner:
        inner.setattr("luthier.plan.slots.LEAST", 1)
        inner.setitem(READ, "cpu", most)
        inner.setattr(Forward, "prefill", read)
        inner.setattr(Stepper, "advance", lambda self, *given: (events.append(0), advance(self, *given))[1])
        engine = DecoderEngine(decoder, Letters(), batch_size=batch)
        return ids({done.key: done for done in engine.generate(requests)}), events


def captured(self: Stepper, rows: int) -> bool:
    graph = Repeated(self, rows)
    self._captured[rows] = (graph, graph.left)  # type: ignore[assignment]
    return True


def test_a_long_shared_beginning_is_read_in_pieces_too(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [LONG[0] + [9, 4 + at] + LONG[at][: 15 * (at % 3)] for at in range(6)]
    requests = [Request(key, prompt, Sampling(max_new_tokens=9)) for key, prompt in enumerate(prompts)]
    want = ids({done.key: done for done in DecoderEngine(decoder, Letters()).generate(requests)})
    got, events = in_pieces(monkeypatch, decoder, requests, 20, 4)
    assert got == want
    assert max(events) <= 20 and sum(events) == 76 + sum(len(prompt) - 76 for prompt in prompts)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", ["llama", "mistral-window", "gemma3"])
def test_pieces_and_shared_beginnings_on_a_gpu(tmp_path: Path, case: str, dtype: torch.dtype, bound: float) -> None:
    """Scores after prompts that were read in pieces, or after what they share, are those after the whole prompts."""
    make(tmp_path, case).to(dtype).save_pretrained(tmp_path)
    decoder = adapted(load_decoder(tmp_path, read_shape(tmp_path), Placing(dtype=dtype, device="cuda")))
    begin = LONG[0][:30]
    prompts = [begin + one for one in LONG]
    count = len(prompts)

    def cache() -> Cache:
        return Cache(decoder.shape, count, 128, decoder.device, dtype)

    def after(forward: Forward, held: Cache) -> torch.Tensor:
        ids_r, lengths_r = torch.full((count,), 9), torch.tensor([len(prompt) for prompt in prompts])
        adapter_r = torch.zeros(count, dtype=torch.long)
        return forward.step(ids_r.cuda(), lengths_r.cuda(), held, 128, adapter_r.cuda())

    with torch.inference_mode():
        forward, whole = Forward(decoder), cache()
        first = forward.prefill(prompts, range(count), whole)
        then = after(forward, whole)
        for way in ("pieces", "shared"):
            held = cache()
            if way == "pieces":
                stops = [1 + len(prompt) // 3 for prompt in prompts]
                forward.prefill([p[:stop] for p, stop in zip(prompts, stops, strict=True)], range(count), held)
                got = forward.prefill(prompts, range(count), held, stops)
            else:
                held.spread(range(count), forward.read_prefix(begin, read=13))
                got = forward.prefill(prompts, range(count), held, [len(begin)] * count)
            for mine, theirs in ((got, first), (after(forward, held), then)):
                assert float((mine - theirs).norm() / theirs.norm()) < bound, way


def test_a_turn_of_a_conversation_reads_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those of an engine that has read nothing; what was read with other weights is not used again."""
    _, decoder = both(tmp_path, "gemma3")
    adapted(decoder)
    read: list[int] = []
    prefill = Forward.prefill

    def counted(self, prompts, slots, cache, held=(), adapters=()):
        read.append(sum(map(len, prompts)) - sum(held))
        return prefill(self, prompts, slots, cache, held, adapters)

    monkeypatch.setattr(Forward, "prefill", counted)
    settings = Sampling(max_new_tokens=12, min_new_tokens=12)
    engine = DecoderEngine(decoder, Letters())

    def say(ids: list[int], given: Sampling = settings) -> tuple[list[int], int]:
        """The answer, which a fresh engine gives too, and how many tokens were read for it."""
        read.clear()
        text = "".join(engine.stream(Request(0, ids, given)))
        own = sum(read)
        assert text == "".join(DecoderEngine(decoder, Letters()).stream(Request(0, ids, given)))
        return [ord(letter) - 32 for letter in text], own

    history = LONG[0][:40]
    answer, own = say(history)
    assert own == 40 and len(answer) == 12
    history = [*history, *answer, 9, 8, 7]
    answer, own = say(history)
    assert own == 4  # the last token of an answer is not in the cache
    history = [*history, *answer[:5], 6, 6]
    _, own = say(history)
    assert own == 2
    assert say(history)[1] == 1  # the same again: what follows the last token is asked for
    assert say(history[:20])[1] == 1
    assert say(history)[1] == len(history) - 20  # the answer that followed the 20 is another
    pieces = engine.stream(Request(0, [*history, 9, 9], settings))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert say([*history, 9, 9, 5])[1] == 1  # an answer that was broken off
    assert say([*LONG[0][:8], 3, 3, 3])[1] == 11  # what both begin with is little
    say(history)
    with torch.no_grad():
        decoder.pairs[0].lora_B.add_(0.5)
    assert say(history)[1] == len(history)
    list(engine.stream_several(Request(0, history, replace(settings, n=2))))
    assert say(history)[1] == 1  # several answers leave nothing, and what was there stays


def test_quantised_weights_are_spread_out_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "qwen2")
    how = Placing(dtype=torch.float32, quantised="nf4", weights="quantised")
    decoder = adapted(load_decoder(tmp_path, read_shape(tmp_path), how))
    spread = ids(ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=8)))
    monkeypatch.setattr("luthier.infer.forward.fits_spread", lambda *sizes: False)
    assert ids(ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=8))) == spread
    met, times = set(), Quantised.times

    def counted(self: Quantised, x: torch.Tensor, *added: Any) -> torch.Tensor:
        met.add(len(x))
        return times(self, x, *added)

    monkeypatch.setattr(Quantised, "multiplies", lambda self, x: True)  # as on CUDA: in 4 bits as they are
    monkeypatch.setattr(Quantised, "times", counted)
    for most in (FEW, FEW + 2):
        answers = ask(DecoderEngine(decoder, Letters(), batch_size=most), Sampling(max_new_tokens=8))
        assert ids(answers) == spread and max(met) == FEW


def test_rows_are_answered_in_the_slots_that_the_plan_gives(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, a long row has a cache of its own, and answers stay the same."""
    made = []
    monkeypatch.setattr(
        "luthier.infer.engine.Cache", lambda shape, slots, capacity, *rest: made.append((slots, capacity)) or
        Cache(shape, slots, capacity, *rest),
    )  # fmt: skip
    prompts = [[5] * 300, *PROMPTS]
    want = ids(ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=8), prompts))
    assert made == [(7, 320)]
    sizes = sizes_of(decoder)
    short = int((256 * sizes.reading + 3 * (320 * sizes.token + sizes.scores)) / SHARE["cpu"])
    monkeypatch.setattr("luthier.infer.engine.free_bytes", lambda device: short)
    made.clear()
    assert ids(ask(DecoderEngine(decoder, Letters()), Sampling(max_new_tokens=8), prompts)) == want
    needs = [308, *sorted((len(prompt) + 8 for prompt in PROMPTS), reverse=True)]
    planned = waves(sizes, "cpu", short, needs)
    assert made == [(slots.rows, slots.capacity) for _, slots in planned] == [(1, 320), (6, 64)]
