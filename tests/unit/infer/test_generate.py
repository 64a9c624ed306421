"""The engine against plain `model.generate` and against itself under other batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from luthier.events import Progress
from luthier.infer.generate import HfEngine
from luthier.infer.score import choice_scores, logprobs_of
from luthier.model.generic import GenericModel
from luthier.tuned.choosing import Choices, chosen
from luthier.types import Example, Request, Sampling

PROMPTS = [[5, 9, 17], [3], [40, 41, 42, 43, 44, 45, 46], [7, 7], [11, 12, 13, 14]]


class Letters:
    """A tokenizer whose id n is the character chr(32 + n); id 1 ends an answer."""

    eos_ids = (1,)
    pad_id = 1

    def decode(self, ids):
        return "".join(chr(32 + token) for token in ids)


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def model():
    return make_model()


def ask(engine, sampling, prompts=PROMPTS):
    requests = [Request(key, prompt, sampling) for key, prompt in enumerate(prompts)]
    found = {c.key: c for c in engine.generate(requests)}
    assert sorted(found) == list(range(len(prompts)))  # tests go through what is here
    return found


def test_a_longer_row_beside_it_stretches_no_answer():
    own = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 12}
    model = make_model()
    config = model.config
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0} | own
    stretched = LlamaForCausalLM(config)
    stretched.load_state_dict(model.state_dict())
    prompts = [[5, 9, 17], [3, 4, 5, 6, 7] * 5]
    sampling = Sampling(max_new_tokens=6)
    together = ask(HfEngine(stretched, Letters(), batch_size=2), sampling, prompts)
    for key, prompt in enumerate(prompts):
        alone = ask(HfEngine(stretched, Letters()), sampling, [prompt])[0]
        assert together[key].ids == alone.ids


def test_greedy_equals_plain_generate_row_by_row(model):
    answers = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=9))
    model.eval()
    for key, prompt in enumerate(PROMPTS):
        config = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=1, pad_token_id=1)
        ids = torch.tensor([prompt])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert list(answers[key].ids) == plain[0, len(prompt) :].tolist()


def test_models_own_generation_config_neither_leaks_nor_changes(model):
    want = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=9))
    model.generation_config = GenerationConfig(
        repetition_penalty=9.0, no_repeat_ngram_size=1, suppress_tokens=list(range(2, 60)), eos_token_id=1
    )
    before = model.generation_config.to_dict()
    model.train()
    got = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=9))
    assert {k: c.ids for k, c in got.items()} == {k: c.ids for k, c in want.items()}
    assert model.generation_config.to_dict() == before
    assert all(module.training for module in model.modules())


def test_a_models_own_end_of_sequence_ids_end_an_answer(model):
    first = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=4))[0]
    model.generation_config.eos_token_id = [1, first.ids[1]]
    ended = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=4))[0]
    stop_at = first.ids.index(first.ids[1])
    assert ended.ids == first.ids[: stop_at + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == Letters().decode(first.ids[:stop_at])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=8, do_sample=True, seed=3),
        Sampling(max_new_tokens=8, do_sample=True, seed=3, temperature=0.7, top_k=20, top_p=0.9, extra={"min_p": 0.01}),
        Sampling(max_new_tokens=5, do_sample=True, seed=3, num_beams=2),
    ],
)
def test_sampled_answers_do_not_depend_on_the_batch(model, sampling):
    together = ask(HfEngine(model, Letters(), batch_size=5), sampling)
    alone = ask(HfEngine(model, Letters(), batch_size=1), sampling)
    assert {k: c.ids for k, c in together.items()} == {k: c.ids for k, c in alone.items()}


def test_the_draw_follows_the_models_distribution(model):
    model.eval()
    with torch.no_grad():
        want = model(torch.tensor([[5, 9]])).logits[0, -1].softmax(0)
    sampling = Sampling(max_new_tokens=1, do_sample=True, seed=1)
    answers = ask(HfEngine(model, Letters(), batch_size=500), sampling, [[5, 9]] * 2000)
    counts = torch.zeros(64)
    for completion in answers.values():
        counts[completion.ids[0]] += 1
    assert (counts / 2000 - want).abs().max() < 0.04
    assert len({c.ids for c in answers.values()}) > 5


def test_seeds_change_answers_and_global_random_state_stays(model):
    before = torch.get_rng_state()
    draws = [
        [c.ids for c in ask(HfEngine(model, Letters()), Sampling(max_new_tokens=8, do_sample=True, seed=s)).values()]
        for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.get_rng_state())


def test_top_k_one_is_greedy(model):
    greedy = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6))
    drawn = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6, do_sample=True, top_k=1, seed=0))
    assert {k: c.ids for k, c in drawn.items()} == {k: c.ids for k, c in greedy.items()}


def test_bad_rows_complete_with_an_error_and_the_rest_is_answered(model):
    prompts = [[5, 9], [], [3] * 48, [64], [7]]
    answers = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=3), prompts)
    assert [answers[k].finish_reason == "error" for k in range(5)] == [False, True, True, True, False]
    assert "empty" in answers[1].error
    assert "48 tokens" in answers[2].error
    assert "vocabulary" in answers[3].error


def test_the_context_bounds_an_answer_without_touching_its_neighbours(model):
    prompts = [[3] * 46, [5, 9, 17]]
    answers = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=9), prompts)
    assert len(answers[0].ids) <= 2
    assert answers[1].ids == ask(HfEngine(model, Letters()), Sampling(max_new_tokens=9))[0].ids


def test_stop_strings_end_each_row_and_are_cut_off(model):
    full = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=12))
    stop = full[0].text[2:4]
    stopped = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=12, stop=(stop,)))
    assert stopped[0].text == full[0].text[: full[0].text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    for key, completion in stopped.items():
        assert stop not in completion.text
        assert full[key].text.startswith(completion.text)


def test_min_new_tokens_and_repetition_penalty_have_their_effect(model):
    end = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=1))[0].ids[0]
    model.generation_config.eos_token_id = end
    assert len(ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6))[0].ids) == 1
    assert len(ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6, min_new_tokens=4))[0].ids) >= 4
    punished = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=20, repetition_penalty=50.0))[2]
    assert len(set(punished.ids)) == len(punished.ids)


def test_stream_gives_the_same_text_as_generate(model):
    sampling = Sampling(max_new_tokens=12, do_sample=True, seed=4)
    request = Request(8, PROMPTS[0], sampling)
    engine = HfEngine(model, Letters())
    (whole,) = engine.generate([request])
    assert "".join(engine.stream(request)) == whole.text


def test_closing_a_stream_stops_the_model(model):
    engine = HfEngine(model, Letters())
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    pieces = engine.stream(Request(0, [5, 9], Sampling(max_new_tokens=40, extra={"suppress_tokens": [1]})))
    next(pieces)
    pieces.close()
    after = len(calls)
    assert after < 40
    assert model.generation_config.eos_token_id == 1


def test_stream_raises_what_generation_raised(model):
    engine = HfEngine(model, Letters())
    with pytest.raises(ValueError, match="empty"):
        list(engine.stream(Request(0, [], Sampling())))

    def broken(*args):
        raise KeyError("broken layer")

    model.register_forward_pre_hook(broken)
    with pytest.raises(KeyError, match="broken layer"):
        list(engine.stream(Request(0, [5], Sampling())))


def test_out_of_memory_halves_the_batch(model):
    want = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=4))

    def small(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(small, with_kwargs=True)
    got = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=4))
    assert {k: c.ids for k, c in got.items()} == {k: c.ids for k, c in want.items()}


def test_progress_counts_rows(model):
    seen = []
    ask(HfEngine(model, Letters(), sink=seen.append), Sampling(max_new_tokens=2))
    assert all(isinstance(e, Progress) for e in seen)
    assert (seen[0].completed, seen[-1].completed, seen[-1].total) == (0, 5, 5)


# PEFT 0.21 asks transformers for a name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_model_and_disabled_adapter(model):
    from peft import LoraConfig, get_peft_model

    base = {k: c.ids for k, c in ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6)).items()}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = {k: c.ids for k, c in ask(HfEngine(tuned, Letters()), Sampling(max_new_tokens=6)).items()}
    without = ask(HfEngine(tuned, Letters(), context=tuned.disable_adapter), Sampling(max_new_tokens=6))
    assert adapted != base
    assert {k: c.ids for k, c in without.items()} == base


def test_logprobs_of_equals_each_row_alone_and_keeps_the_mode(model):
    model.train()
    rows = [[5, 9, 5, 1], [5, 9, 9, 3, 1], [7, 2, 1]]
    examples = [Example(ids, [0.0, 0.0] + [1.0] * (len(ids) - 2), at) for at, ids in enumerate(rows)]
    got = logprobs_of(Small(model, 10**6), examples, tokens_per_pass=8)
    assert model.training
    model.eval()
    for ids, values in zip(rows, got, strict=True):
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [float(logp[at - 1, ids[at]]) for at in range(2, len(ids))]
        assert values == pytest.approx(want, abs=1e-5)


class Small(GenericModel):
    """A model whose memory holds ``room`` tokens of a pass; ``asked`` of each pass."""

    module = property(lambda self: self.model)
    shares = False

    def __init__(self, model, room):
        super().__init__(model)
        self.room, self.asked = room, []

    def logprobs(self, batch):
        self.asked.append(len(batch.ids))
        if len(batch.ids) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return super().logprobs(batch)


def test_scoring_without_room_goes_on_in_halves_and_gives_up_on_a_row_alone(model):
    prompts, endings = [[5, 9, 5], [7, 2], [3] * 20, [8, 8]], [[1, 4], [6]]
    want = dict(choice_scores(Small(model, 10**6), prompts, endings))
    small = Small(model, 12)
    got = dict(choice_scores(small, prompts, endings))
    assert got.pop(2) == () and want.pop(2) != ()
    assert {row: pytest.approx(values, abs=1e-5) for row, values in got.items()} == want
    assert max(small.asked) > 12 and min(small.asked) < 12

    class Broken(Small):
        def logprobs(self, batch):
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(choice_scores(Broken(model, 1), prompts, endings))


def test_a_class_that_memory_cannot_score_is_an_error_of_its_row(model):
    small = Small(model, 12)
    small.base = SimpleNamespace(spec=SimpleNamespace(context=None))
    choices = Choices(("a", "b"), ((1, 4), (6,)))
    requests = [Request(0, [5, 9, 5], Sampling()), Request(1, [3] * 20, Sampling())]
    done = {completion.key: (completion, scores) for completion, scores in chosen(small, choices, requests)}
    assert done[0][0].text in ("a", "b") and len(done[0][1]) == 2
    assert done[1][0].finish_reason == "error" and "out of memory" in done[1][0].error and done[1][1] == ()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=12, repetition_penalty=3.0),
        Sampling(max_new_tokens=12, extra={"no_repeat_ngram_size": 1}),
        Sampling(max_new_tokens=12, extra={"encoder_repetition_penalty": 3.0}),
    ],
)
def test_penalties_do_not_see_padding(model, sampling):
    together = ask(HfEngine(model, Letters(), batch_size=5), sampling)
    alone = ask(HfEngine(model, Letters(), batch_size=1), sampling)
    assert {k: c.ids for k, c in together.items()} == {k: c.ids for k, c in alone.items()}
    assert {k: c.ids for k, c in alone.items()} != {
        k: c.ids for k, c in ask(HfEngine(model, Letters()), Sampling(max_new_tokens=12)).items()
    }


def test_keys_that_name_tokens_have_their_effect(model):
    plain = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6))
    used = plain[0].ids

    def first_row(extra, **more):
        return ask(HfEngine(model, Letters()), Sampling(max_new_tokens=6, extra=extra, **more))[0].ids

    assert first_row({"forced_bos_token_id": 33})[0] == 33
    assert first_row({"forced_bos_token_id": 33}, do_sample=True, seed=1)[0] == 33
    assert used[0] not in first_row({"suppress_tokens": (used[0],)})
    assert first_row({"begin_suppress_tokens": (used[0],)})[0] != used[0]
    assert used[0] not in first_row({"bad_words_ids": ((used[0],),)})
    assert first_row({"forced_eos_token_id": 1, "suppress_tokens": ()})[-1] == 1
    assert len(first_row({"max_length": 5})) == 2
    assert first_row({"use_cache": False}) == used
    assert first_row({"length_penalty": 2.0, "early_stopping": True}, num_beams=3)
    assert first_row({"exponential_decay_length_penalty": (1, 50.0)})[-1] == 1
    assert first_row(
        {"guidance_scale": 1.5, "renormalize_logits": True, "remove_invalid_values": True, "max_time": 60.0}
    )
    for name, value in {"typical_p": 0.2, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2, "min_p": 0.9}.items():
        narrow = ask(
            HfEngine(model, Letters()),
            Sampling(max_new_tokens=1, do_sample=True, seed=1, extra={name: value}),
            [[5, 9]] * 200,
        )
        wide = ask(HfEngine(model, Letters()), Sampling(max_new_tokens=1, do_sample=True, seed=1), [[5, 9]] * 200)
        assert len({c.ids for c in narrow.values()}) < len({c.ids for c in wide.values()}), name
