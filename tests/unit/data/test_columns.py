import pytest

from luthier.data.columns import detect, language_of, reference_of
from luthier.data.conversation import conversation, tools_of
from luthier.data.language import recognised
from luthier.data.table import Table
from luthier.errors import DataError
from luthier.types import Message


def table(**columns):
    return Table.from_columns(columns, "t.csv")


@pytest.mark.parametrize(
    "names, kind, inputs, target",
    [
        ("instruction input output", "instruction", ("instruction", "input"), "output"),
        ("Instruction Context Response category", "instruction", ("Instruction", "Context"), "Response"),
        ("instruction output", "instruction", ("instruction",), "output"),
        ("prompt completion", "completion", ("prompt",), "completion"),
        ("id question answer", "completion", ("question",), "answer"),
        ("質問 回答", "completion", ("質問",), "回答"),
        ("text", "text", (), "text"),
        ("text source_url", "text", (), "text"),
        ("context question answer", "instruction", ("question", "context"), "answer"),
    ],
)
def test_known_headings(names, kind, inputs, target):
    layout = detect(table(**{name: ["some words"] for name in names.split()}))
    assert (layout.kind, layout.inputs, layout.target, layout.is_guess) == (kind, inputs, target, False)


def test_any_headings_are_a_guess_until_they_are_said():
    tickets = table(
        ticket_id=[str(i) for i in range(30)],
        subject=[f"help with {i}" for i in range(30)],
        body=["words"] * 30,
        queue=["sales", "support", "billing"] * 10,
        split=[0] * 30,
    )
    layout = detect(tickets)
    assert (layout.inputs, layout.target, layout.is_guess) == (("subject", "body"), "queue", True)
    assert layout.classes == ("billing", "sales", "support")
    said = detect(tickets, inputs=["subject"], target="queue")
    assert (said.kind, said.inputs, said.is_guess) == ("columns", ("subject",), False)
    half = detect(tickets, target="body")
    assert half.inputs == ("subject", "queue") and half.classes is None and half.is_guess
    assert detect(tickets, inputs=["subject"], target="queue", category=False).classes is None


@pytest.mark.parametrize(
    "names, unused",
    [
        ("question A B answer", "A, B"),
        ("instruction input output history", "history"),
        ("prompt chosen rejected", "rejected"),
        ("text title", "title"),
        ("question answer system split", ""),
    ],
)
def test_columns_that_known_headings_leave_out_are_told(names, unused):
    columns = table(**{name: ["some words"] for name in names.split()})
    told = [line for line in detect(columns).explanation if line.startswith("not used")]
    assert told == ([f"not used: {unused}"] if unused else [])
    assert not any("title" in line for line in detect(columns, written=["title"]).explanation)


def test_columns_left_out_are_told_of_conversations_and_of_what_was_said():
    chats = table(messages=[[{"role": "user", "content": "hi"}]], topic=["x"])
    assert "not used: topic" in detect(chats).explanation
    many = table(**{f"c{i:02}": ["words"] for i in range(20)})
    assert detect(many, inputs=["c00"], target="c01").explanation[-1].endswith("c13 and 6 more")


@pytest.mark.parametrize("name, values", [("emotion", ["joy", "fear"]), ("stars", ["1", "5"]), ("is_spam", [0, 1])])
@pytest.mark.parametrize("text", ["text", "review"])
def test_a_class_beside_a_text_is_the_target_and_no_running_text(text, name, values):
    columns = {text: [f"some words {i}" for i in range(40)], name: values * 20}
    for order in (columns, dict(reversed(columns.items()))):
        layout = detect(table(**order))
        assert (layout.kind, layout.inputs, layout.target, layout.is_guess) == ("columns", (text,), name, True)
        assert layout.classes == tuple(sorted(map(str, values)))


def test_text_stays_running_text_where_it_is_said_or_nothing_looks_like_a_class():
    words = [f"some words {i}" for i in range(40)]
    assert detect(table(text=words, emotion=["joy", "fear"] * 20), target="text").kind == "text"
    layout = detect(table(text=words, source=["web", "books"] * 20, title=words))
    assert layout.kind == "text" and layout.explanation[-1] == "not used: source, title"


def test_free_answers_are_not_classes():
    assert detect(table(question=["q"] * 100, answer=[f"a {i}" for i in range(100)])).classes is None
    assert detect(table(text=["q"] * 8, label=["x", "y"] * 4)).classes is None


def test_columns_that_cannot_be():
    for code, options in [
        ("data-missing-column", {"inputs": ["subjet"], "target": "body"}),
        ("data-no-target", {"inputs": ["subject"], "target": "subject"}),
    ]:
        with pytest.raises(DataError) as caught:
            detect(table(subject=["a"], body=["b"]), **options)
        assert caught.value.code == code
    with pytest.raises(DataError) as caught:
        detect(table(a_id=["1"], b_id=["2"]))
    assert caught.value.code == "data-no-target"
    with pytest.raises(DataError) as caught:
        detect(table(subject=["a"], body=["b"]), inputs=["subjet"], target="body")
    assert "'subject'" in caught.value.faults[0].fix


GPT = ("system", "human", "gpt")
TURNS = [Message("system", "be kind"), Message("user", "hi"), Message("assistant", "hello")]


@pytest.mark.parametrize(
    "column, value",
    [
        ("messages", [{"role": m.role, "content": m.content} for m in TURNS]),
        ("dialogue", [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in TURNS]),
        ("conversations", [{"from": f, "value": m.content} for f, m in zip(GPT, TURNS, strict=True)]),
        ("messages", '[{"role":"system","content":"be kind"},{"role":"user","content":"hi"},'
                     '{"role":"assistant","content":"hello"}]'),
    ],
)  # fmt: skip
def test_conversations(column, value):
    chats = table(**{column: [value], "source": ["x"]})
    layout = detect(chats)
    assert (layout.kind, layout.inputs, layout.target) == ("chat", (), column)
    assert conversation(chats.row(0), layout) == TURNS
    assert reference_of(chats.row(0), layout) == "hello"


def test_prompt_and_completion_as_turns_and_system_column():
    chats = table(prompt=[[{"role": "user", "content": "hi"}]], completion=[[{"role": "assistant", "content": "yo"}]])
    layout = detect(chats)
    assert (layout.kind, layout.inputs, layout.target) == ("chat", ("prompt",), "completion")
    assert [m.content for m in conversation(chats.row(0), layout)] == ["hi", "yo"]
    chats = table(conversations=[[{"from": "human", "value": "hi"}]], system=["be kind"])
    assert conversation(chats.row(0), detect(chats)) == TURNS[:2]


def test_tool_calls_weights_and_tools():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    turns = [
        {"role": "user", "content": "?", "weight": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"from": "function_call", "value": '{"name": "stop", "arguments": {}}'},
    ]
    chats = table(messages=[turns], tools=[[{"name": "weather", "parameters": {}}]])
    layout = detect(chats)
    out = conversation(chats.row(0), layout)
    assert out[1].tool_calls[0]["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert (out[1].trained, out[0].trained, out[2].tool_call_id) == (False, None, "c1")
    assert out[3].role == "assistant" and out[3].tool_calls[0]["function"]["name"] == "stop"
    assert tools_of(chats.row(0), layout)[0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "usr", "content": "x"}],
        [{"content": "x"}],
        ["x"],
        "not json",
        {"a": 1},
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "assistant", "tool_calls": [{"x": 1}]}],
        [{"role": "assistant", "content": "x", "weight": 3}],
    ],
)
def test_conversations_that_cannot_be_understood(value):
    layout = detect(table(messages=[[{"role": "user", "content": "x"}]]))
    with pytest.raises(DataError) as caught:
        conversation({"messages": value}, layout, "t row 4")
    assert caught.value.code == "data-chat" and "t row 4" in caught.value.faults[0].where


@pytest.mark.parametrize("key", ["content", "value"])
def test_an_answer_of_null_is_an_empty_one(key):
    """It stops nothing: the row is dropped and counted. A turn without the key is no turn."""
    asked = {"role": "user", key: "x"}
    chats = table(messages=[[asked, {"role": "assistant", key: None}], [asked, {"role": "assistant", key: ""}]])
    layout = detect(chats)
    assert conversation(chats.row(0), layout) == conversation(chats.row(1), layout)
    with pytest.raises(DataError, match="no content"):
        conversation({"messages": [asked, {"role": "assistant"}]}, layout)


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"a":' * 100_000])
def test_a_cell_that_nests_too_deep_is_no_conversation(text):
    assert detect(table(messages=[text, text])).kind != "chat"
    layout = detect(table(messages=['[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]']))
    with pytest.raises(DataError) as caught:
        conversation({"messages": text}, layout)
    assert caught.value.code == "data-chat"


@pytest.mark.parametrize(
    "text, code",
    [
        ("これは何ですか", "ja"),
        ("你叫什么名字", "zh"),
        ("이름이 뭐예요", "ko"),
        ("Как дела", "ru"),
        ("ما اسمك", "ar"),
        ("What is the name of the dog", "en"),
        ("Wie ist der Name und wo ist das Haus", "de"),
        ("Quel est le nom de la ville dans les Alpes", "fr"),
        ("Cuál es el nombre de los perros que están en la casa", "es"),
        ("def f(x): return x", "en"),
        ("Ann has a billing problem, no 3", "en"),
        ("positive review, I want no refund", "en"),
        ("1e5 2e7 0o7 3e_4", "en"),
        ("Де ти живеш? Я живу у Києві", ""),
        ("پایتخت ایران کجاست؟ شهر تهران", ""),
        ("Парус белеет, see the docs of the API for what it does", "ru"),
        ("Frühling lässt sein blaues Band wieder flattern durch Lüfte", ""),
        ("Cafe\u0301 do centro: onde esta\u0301 a minha fatura?", "pt"),
    ],
)
def test_language(text, code):
    assert language_of(table(a=[text]), ["a"]) == code
    assert language_of(table(a=[[{"role": "user", "content": text}]])) == code


def test_short_english_notes_are_english():
    notes = [f"paid Ana {i}.50 on March {i}" for i in range(1, 40)]
    lines = [f"ANA, 03-{i:02d}, {i}.50" for i in range(1, 40)]
    assert recognised(table(note=notes, line=lines), ["note", "line"]) == ("en", False)


def test_hardly_a_word_under_english_headings_is_a_guess():
    notes = ["refund on card Ana", "order on hold Ben", "fee to Tom"]
    assert recognised(table(note=notes), ["note"]) == ("en", True)
    assert recognised(table(notiz=notes), ["notiz"]) == ("", False)
    assert language_of(table(note=notes)) == "en"


@pytest.mark.parametrize(
    "notes",
    [
        ["Ana 3.50 gezahlt April 3", "Ben bekam 7 Euro", "Termin Tom Montag 10 Uhr", "Rechnung offen"],
        ["Ana 3,50 bezahlt am 3. Mai", "Ben 7 Euro erhalten", "Taxi Tom 12"],
        ["pagado Ana 3.50 marzo 3", "cobrado Ben 7 euros 14 mayo", "comida Tom 12"],
        ["bayar Ana 3.50 tanggal 3 Maret", "Ben dapat 7 ribu", "makan siang Tom 12"],
        ["Ana ni 3.50 en haratta", "Ben kara 7 en moratta", "Tom to ohiru 12", "raamen no dai"],
        ["ashita 3 ji kaigi", "Tanaka denwa", "kyou shigoto owari"],
    ],
)
def test_short_notes_of_another_language_do_not_become_english(notes):
    assert recognised(table(note=notes), ["note"]) == ("", False)


@pytest.mark.parametrize(
    "turns",
    [
        [{"human": "hi", "assistant": "hello"}, {"human": "and?", "assistant": "on"}],
        [{"assistant": "hello", "Human": "hi"}, {"user": "and?"}, {"gpt": "on"}],
        '[{"user": "hi", "bot": "hello"}, {"user": "and?", "bot": "on"}]',
    ],
)
@pytest.mark.parametrize("column", ["conversation", "talks"])
def test_turns_whose_keys_are_their_speakers(turns, column):
    """They were taken for running text, and their JSON was trained."""
    chats = table(**{column: [turns, turns]})
    layout = detect(chats)
    assert (layout.kind, layout.target) == ("chat", column)
    said = [(turn.role, turn.content) for turn in conversation(chats.row(0), layout)]
    assert said == [("user", "hi"), ("assistant", "hello"), ("user", "and?"), ("assistant", "on")]


@pytest.mark.parametrize(
    "turns", [["hi", "hello"], [{"q": "hi", "a": "hello"}], [{"user": "a", "human": "b", "bot": "c"}]]
)
def test_lists_that_are_no_turns_are_refused_in_a_column_of_conversations(turns):
    chats = table(dialogue=[turns, turns])
    with pytest.raises(DataError) as caught:
        conversation(chats.row(1), detect(chats), "t row 1")
    assert caught.value.code == "data-chat" and "t row 1" in caught.value.faults[0].where
    beside = table(dialogue=[turns, turns], question=["a", "b"], answer=["c", "d"])
    assert detect(beside).kind == "completion", "known headings say what is learned"
    other = table(tags=[["x"], ["y"]], note=["a b", "c d"], reply=["e", "f"])
    assert detect(other).kind == "columns"
