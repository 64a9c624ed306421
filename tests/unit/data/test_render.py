from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendering_fixtures import CHATML, LLAMA_CHAT, byte_level, llama_style, prompt_section

from luthier.data.layout import Layout
from luthier.data.render import Dropped, Renderer
from luthier.data.render.template import parse
from luthier.data.sources import read
from luthier.errors import DataError
from luthier.types import Example, Message

TOKENIZERS = {
    "bytes-chat": byte_level(),
    "bytes": byte_level(None),
    "llama": llama_style(),
    "llama-old": llama_style("normalizer"),
    "llama-chat": llama_style(chat_template=LLAMA_CHAT),
}
ABC = Layout("instruction", ("a", "b"), "y")
CHAT = Layout("chat", (), "messages")
NASTY = st.lists(
    st.sampled_from(
        ["a", "hel", " ", "\n", "{", "}", "{a}", "<", "|>", "<s>", "</s>", "<|im_end|>", "<|im_", "end|>", "ü"]
    ),
    max_size=6,
).map("".join)


def renderer(tokenizer: Any, layout: Layout = ABC, preprocessing: Any = None, **prompt: Any) -> Renderer:
    return Renderer(layout, prompt_section(**prompt), tokenizer, preprocessing=preprocessing)


def examples(made: Renderer, row: dict[str, Any]) -> list[Example]:
    found = made.examples(row, 0)
    assert isinstance(found, list), found
    return found


def answers(example: Example) -> list[int]:
    return [i for i, w in zip(example.ids, example.weights, strict=True) if w]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "template", [None, "{a}{b}", "Q: {a}\n{{{b}}}", "{b} hel", "<s>{a}", "<|im_start|>{a}<|im_end|>\n{b}"]
)
@given(a=NASTY, b=NASTY, y=NASTY)
@settings(max_examples=15, deadline=None)
def test_training_and_prediction_give_the_same_prompt(name: str, template: str | None, a: str, b: str, y: str) -> None:
    tokenizer = TOKENIZERS[name]
    made = renderer(tokenizer, template=template)
    row = {"a": a, "b": b, "y": y}
    prompt = list(made.prompt({"a": a, "b": b}).ids)
    assert prompt == list(made.prompts([{"a": "x", "b": ""}, row])[1].ids)
    found = made.examples(row, 0)
    if isinstance(found, Dropped):
        assert not y.strip()
        return
    (example,) = found
    assert list(example.ids[: len(prompt)]) == prompt
    assert [bool(w) for w in example.weights] == [False] * len(prompt) + [True] * (example.length - len(prompt))
    assert example.ids[-1] in tokenizer.eos_ids
    assert not any(i in tokenizer.eos_ids for i in example.ids[len(prompt) : -1])
    text = tokenizer.decode([*tokenizer.encode("hel"), *example.ids[len(prompt) : -1]], skip_special=False)
    assert text.removeprefix("hel").strip() == y.strip()


@pytest.mark.parametrize("template", ["{a}", "<s>{a}", "{a}<s>{b}"])
@given(a=NASTY)
@settings(max_examples=15, deadline=None)
def test_one_bos(template: str, a: str) -> None:
    ids = renderer(llama_style(), template=template).prompt({"a": a, "b": ""}).ids
    assert ids[0] == 1
    opened = template.startswith("<s>") or (not a and template.startswith("{a}<s>"))  # a row spells text, no token
    assert ids.count(1) == template.count("<s>") + (0 if opened else 1)


def test_a_chat_template_writes_its_own_bos() -> None:
    ids = renderer(llama_style(chat_template=LLAMA_CHAT)).prompt({"a": "hel", "b": "x"}).ids
    assert ids.count(1) == 1 and ids[0] == 1


def test_a_row_without_hazards_is_encoded_as_the_tokenizer_does() -> None:
    tokenizer = byte_level()
    text = "<|im_start|>user\nhel\n\nyou<|im_end|>\n<|im_start|>assistant\n"
    got = renderer(tokenizer).prompt({"a": "hel", "b": "you"})
    assert got.text == text and list(got.ids) == tokenizer.encode(text, controls=True)


def test_typed_control_tokens_are_text() -> None:
    tokenizer = byte_level()
    made = renderer(tokenizer)
    row = {"a": "x<|im_end|>y", "b": "<|im_start|>system", "y": "z<|im_end|>w"}
    (example,) = examples(made, row)
    assert example.ids.count(tokenizer.control_id("<|im_end|>")) == 2
    assert example.ids.count(tokenizer.control_id("<|im_start|>")) == 2
    assert tokenizer.decode(answers(example), skip_special=False) == "z<|im_end|>w<|im_end|>"
    assert made.outcomes([(0, row)])[0].control
    assert not made.outcomes([(0, {"a": "x <", "b": "", "y": "z"})])[0].control


def test_two_columns_cannot_join_to_a_control_token() -> None:
    tokenizer = byte_level(None)
    ids = renderer(tokenizer, template="{a}{b}").prompt({"a": "<|im_", "b": "end|>"}).ids
    assert tokenizer.control_id("<|im_end|>") not in ids


def test_missing_is_empty_and_counted() -> None:
    made = renderer(byte_level(None), template="[{a}|{b}]")
    assert made.prompt({"a": None, "b": float("nan")}).text == "[|]"
    assert made.outcomes([(0, {"a": None, "b": "x", "y": "z"})])[0].missing == ("a",)


@pytest.mark.parametrize("target", [None, "", "  ", float("nan")])
def test_no_target(target: Any) -> None:
    assert renderer(byte_level()).examples({"a": "q", "b": "", "y": target}, 7) == Dropped("no target", 7)


def test_pad_equal_to_eos_is_still_trained() -> None:
    tokenizer = byte_level(None)
    assert tokenizer.pad_id == tokenizer.eos_id
    (example,) = examples(renderer(tokenizer, template="{a}"), {"a": "q", "b": "", "y": "z"})
    assert answers(example)[-1] == tokenizer.eos_id


def test_text_is_learned_whole() -> None:
    for tokenizer in (byte_level(), llama_style()):
        made = renderer(tokenizer, Layout("text", (), "t"))
        (example,) = examples(made, {"t": "hel a"})
        assert example.ids[:1] == made.prompt({}).ids and len(answers(example)) == example.length - 1


def test_task_sample_and_context() -> None:
    section = prompt_section(template="{__task__}|{__sample__}|{__context__}", task="T{a}")
    made = Renderer(ABC, section, byte_level(None), context=lambda row: f"ctx {row['a']}")
    assert made.prompt({"a": "{b}", "b": None}).text == "T{a}|a: {b}\nb: |ctx {b}"
    for template, fix in (("{__task__}", "set prompt.task"), ("{__context__}", "put the passage into a column")):
        with pytest.raises(DataError) as caught:
            renderer(byte_level(), template=template)
        assert caught.value.code == "data-template" and fix in (caught.value.faults[0].fix or "")
        assert "retrieval" not in str(caught.value)


def test_defaults_without_chat_template() -> None:
    made = renderer(byte_level(None))
    assert made.prompt({"a": "q", "b": "r"}).text == "### Instruction:\nq\n\n### B:\nr\n\n### Response:\n"
    assert made.prompt({"a": "q", "b": ""}).text == "### Instruction:\nq\n\n### Response:\n"
    columns = renderer(byte_level(None), Layout("columns", ("a", "b"), "y"))
    assert columns.prompt({"a": "q", "b": 3}).text == "a: q\nb: 3\n\n### Response:\n"


# ------------------------------------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    ("template", "code", "says"),
    [
        ("{a.b}", "data-template", "{a}"),
        ("{a[0]}", "data-template", "{a}"),
        ("{a!r}", "data-template", "conversion"),
        ("{a:{b}}", "data-template", "nested"),
        ("{a:>99999}", "data-template", "format"),
        ("{}", "data-template", "{{ }}"),
        ("{0}", "data-template", "{{ }}"),
        ("{a", "data-template", "malformed"),
        ("{y}", "data-template", "output column"),
        ("{yeer}", "data-missing-column", "year"),
        ("x" * 100_001, "data-template", "too long"),
    ],
)
def test_refused_templates(template: str, code: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(template, ["a", "b", "year", "y"], target="y")
    assert caught.value.code == code and says in str(caught.value)


@pytest.mark.parametrize("template", ["Answer the question.", "", "{__task__}:"])
def test_a_template_that_asks_every_row_the_same_is_refused(template: str) -> None:
    with pytest.raises(DataError) as caught:
        renderer(byte_level(), template=template, task="Sort")
    fault = caught.value.faults[0]
    assert fault.code == "data-template" and fault.where == "prompt.template" and "{a} {b}" in str(fault.fix)
    for whole in ("{b}", "{__sample__}"):
        assert renderer(byte_level(), template=template + whole, task="Sort").prompt({"a": "q", "b": "r"}).ids
    text = renderer(byte_level(), Layout("text", (), "y"), template=template, task="Sort")  # asks nothing
    assert text.prompt({"y": "z"}).ids


@pytest.mark.parametrize("template", ["{answr}", "{answer}", "{a.b}", "{}", "{a!r}"])
def test_the_output_column_is_not_offered_to_a_template(template: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(template, ["a", "b", "answer"], target="answer")
    fault = caught.value.faults[0]
    offered = fault.allowed if isinstance(fault.allowed, str) else ", ".join(fault.allowed or ())
    assert "a, b, __sample__" in offered and "answer" not in offered
    assert "{answer}" not in (fault.fix or "")


def test_all_faults_of_a_template_at_once() -> None:
    with pytest.raises(DataError) as caught:
        parse("{a!r} {nope} {a.b}", ["a"])
    assert len(caught.value.faults) == 3


def test_number_formats() -> None:
    template = parse("{a:.2f}/{b:d}/{{x}}", ["a", "b"])
    assert template.render({"a": "3.14159", "b": 7.0}).text == "3.14/7/{x}"
    assert template.render({"a": None, "b": 1}).text == "/1/{x}"
    with pytest.raises(DataError) as caught:
        template.render({"a": "many", "b": 1}, "data row 5")
    assert caught.value.code == "data-template" and "data row 5" in str(caught.value)


def test_a_row_without_the_column() -> None:
    for template in (None, "{a} {b}"):
        for tokenizer in (byte_level(), byte_level(None)):
            with pytest.raises(DataError) as caught:
                renderer(tokenizer, template=template).prompt({"b": "x", "aa": "z"})
            assert caught.value.code == "data-missing-column" and "'a'" in str(caught.value)


def test_the_template_hash_follows_what_is_written() -> None:
    hashes = {
        renderer(byte_level(), **prompt).template_hash
        for prompt in ({}, {"template": "{a}"}, {"template": "{b}"}, {"system": "s"}, {"train_on": "all"})
    }
    assert len(hashes) == 5
    assert renderer(byte_level()).template_hash == renderer(byte_level()).template_hash


# ------------------------------------------------------------------------------------------------ chat


def talk(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


@pytest.mark.parametrize("name", ["bytes-chat", "bytes", "llama-chat"])
@given(turns=st.lists(NASTY.map(lambda s: "h" + s + "a"), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_every_answer_is_trained_from_the_history_of_prediction(name: str, turns: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    made = renderer(tokenizer, CHAT)
    found = examples(made, talk(*turns))
    trained = sum(sum(1 for i in answers(e) if i in tokenizer.eos_ids) for e in found)
    assert trained == len(turns) // 2
    for index in range(1, len(turns), 2):
        history = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(turns[:index])]
        ids = made.chat_prompt(history).ids
        begun = [e for e in found if tuple(e.ids[: len(ids)]) == ids]
        assert begun
        assert any(e.weights[len(ids)] == 1 and e.weights[len(ids) - 1] == 0 for e in begun)


def test_shared_prefixes_stay_one_example() -> None:
    tokenizer = byte_level()
    (example,) = examples(renderer(tokenizer, CHAT), talk("a", "b", "c", "d"))
    assert tokenizer.decode(answers(example), skip_special=False) == "b<|im_end|>d<|im_end|>"


def test_a_template_that_rewrites_turns_gives_separate_examples() -> None:
    rewriting = CHATML.replace("m['content']", "(m['content'] if loop.last else m['content'] | upper)")
    made = renderer(byte_level(), CHAT, chat_template=rewriting)
    found = examples(made, talk("a", "b", "c", "d"))
    assert [e.turn for e in found] == [0, 1]
    assert all(len(answers(e)) == 2 for e in found)


def test_train_on() -> None:
    tokenizer = byte_level()
    (last,) = examples(renderer(tokenizer, CHAT, train_on="last"), talk("a", "b", "c", "d"))
    assert tokenizer.decode(answers(last), skip_special=False) == "d<|im_end|>"
    (whole,) = examples(renderer(tokenizer, CHAT, train_on="all"), talk("a", "b", "c", "d"))
    assert whole.weights == (0.0, *[1.0] * (whole.length - 1))


def test_weights_of_the_data_are_heeded() -> None:
    row = talk("a", "b", "c", "d")
    row["messages"][1]["weight"] = 0
    tokenizer = byte_level()
    (example,) = examples(renderer(tokenizer, CHAT), row)
    assert tokenizer.decode(answers(example), skip_special=False) == "d<|im_end|>"


def greeted(*turns: str) -> dict[str, Any]:
    """A conversation that the assistant begins."""
    return {"messages": [{"role": "assistant", "content": "Hello!"}, *talk(*turns)["messages"]]}


# Reads the first message, as the templates of Llama 3 and Qwen do.
FIRST_READ = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}" + CHATML


@pytest.mark.parametrize("template", [CHATML, FIRST_READ])
@pytest.mark.parametrize("system", [None, "Be kind."])
def test_an_answer_that_nothing_precedes_is_not_trained(template: str, system: str | None) -> None:
    tokenizer = byte_level()
    made = renderer(tokenizer, CHAT, chat_template=template, system=system)
    (outcome,) = made.outcomes([(0, greeted("a", "b"))])
    (example,) = outcome.examples
    assert tokenizer.decode(answers(example), skip_special=False) == "b<|im_end|>"
    assert "Hello!" in tokenizer.decode(example.ids, skip_special=False)
    assert outcome.unprompted and outcome.answers == 1
    assert made.examples(greeted(), 3) == Dropped("nothing precedes the answer", 3)
    with pytest.raises(DataError, match="there is nothing to answer"):
        made.prompt(greeted())


def test_a_first_answer_of_weight_0_is_not_counted() -> None:
    row = greeted("a", "b")
    row["messages"][0]["weight"] = 0
    made = renderer(byte_level(), CHAT, chat_template=FIRST_READ)
    (outcome,) = made.outcomes([(0, row)])
    assert outcome.answers == 1 and not outcome.unprompted
    row = greeted("a", "b")
    row["messages"][2]["weight"] = 0
    assert made.examples(row, 3) == Dropped("nothing precedes the answer", 3)
    (whole,) = renderer(byte_level(), CHAT, train_on="all").outcomes([(0, greeted("a", "b"))])
    assert not whole.unprompted and whole.examples[0].supervised == whole.examples[0].length - 1


def test_no_answer_in_a_conversation() -> None:
    assert renderer(byte_level(), CHAT).examples(talk("a"), 3) == Dropped("no target", 3)


def test_an_answer_that_the_template_hides() -> None:
    with pytest.raises(DataError) as caught:
        renderer(byte_level(), CHAT, chat_template="{{ add_generation_prompt }}").examples(talk("a", "b"), 4)
    assert caught.value.code == "data-chat" and "row 4" in str(caught.value)


def test_system_prompt() -> None:
    made = renderer(byte_level(), CHAT, system="Be kind.")
    assert made.prompt(talk("a")).text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert made.prompt(talk("a", "b")).ids == made.prompt(talk("a")).ids


# ------------------------------------------------------------------------------------------------ length


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("truncate_prompt", "rst" + "xyz!"), ("truncate_target", "qrst" + "xyz"), ("drop", None)],
)
def test_truncation(policy: str, expected: str | None) -> None:
    tokenizer = byte_level(None, eos_token="!", bos_token=None)
    section = SimpleNamespace(max_sequence_length=7, global_max_sequence_length=None, truncation=policy)
    made = renderer(tokenizer, preprocessing=section, template="{a}")
    (outcome,) = made.outcomes([(0, {"a": "qrst", "b": "", "y": "xyz"})])
    if expected is None:
        assert outcome.dropped == Dropped("too long", 0)
        return
    assert tokenizer.decode(outcome.examples[0].ids, skip_special=False) == expected
    assert outcome.cut == (policy,)
    assert outcome.ended == (1 if policy == "truncate_prompt" else 0)


def test_bos_survives_truncation() -> None:
    section = SimpleNamespace(max_sequence_length=4, global_max_sequence_length=None, truncation="truncate_prompt")
    (example,) = examples(
        renderer(llama_style(), preprocessing=section, template="{a}"), {"a": "qrs", "b": "", "y": "x"}
    )
    assert example.ids[0] == 1 and example.length == 4


def test_too_long() -> None:
    section = SimpleNamespace(max_sequence_length=4, global_max_sequence_length=None, truncation="error")
    with pytest.raises(DataError) as caught:
        renderer(byte_level(), preprocessing=section).examples({"a": "q", "b": "", "y": "x"}, 9)
    assert caught.value.code == "data-too-long" and "row 9" in str(caught.value)


CALLS = (
    "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }} "
    "{{ call.function.arguments | tojson }} {{ call.function.arguments.z }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}> {% endif %}"
)


@pytest.mark.parametrize("shape", ["text", "an object", "messages as text"])
def test_numbers_of_a_tool_call_stand_as_they_were_written(shape: str, tmp_path: Path) -> None:
    """`1e5` and `1.10` became 100000.0 and 1.1 where the arguments were read, and again where the template wrote."""
    written = '{"z": 1e5, "amount": 1.10, "in": [2.50, {"x": 3.00}], "plain": 0.5, "ja": "東京 1.10"}'
    call = '{"type": "function", "function": {"name": "pay", "arguments": %s}}'
    called = call % (json.dumps(written) if shape == "text" else written)
    turns = f'[{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content": null, "tool_calls": [{called}]}}]'
    cell = json.dumps(turns) if shape == "messages as text" else turns
    tools = '[{"name": "pay", "parameters": {"most": 1.50}}]'
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"messages": {cell}, "tools": {tools}}}\n', encoding="utf-8")
    row = read(path).row(0)
    template = "{{ tools | tojson(indent=2) }}" + CALLS
    made = renderer(byte_level(None), Layout("chat", (), "messages", tools="tools"), chat_template=template)
    ids = examples(made, row)[0].ids
    text = byte_level(None).decode(list(ids))
    assert f"pay {written} 1e5" in text and '"most": 1.50\n' in text
