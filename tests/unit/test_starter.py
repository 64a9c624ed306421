"""`luthier init`: three languages on four sizes of memory, from the table's rows to the config that is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier import config, starter
from luthier.assets.catalogue import CATALOGUE
from luthier.data.render import template
from luthier.errors import ConfigError
from luthier.types import Gpu, Machine

GIB = 2**30
MACHINES = {
    "4 GiB, no GPU": Machine(2, 4 * GIB, 3 * GIB),
    "16 GiB, no GPU": Machine(4, 16 * GIB, 14 * GIB),
    "16 GiB GPU": Machine(8, 64 * GIB, 60 * GIB, (Gpu("T4", 16 * GIB, 15 * GIB, (7, 5)),)),
    "80 GiB GPU": Machine(16, 128 * GIB, 120 * GIB, (Gpu("H100", 80 * GIB, 78 * GIB, (9, 0)),)),
}
TABLES = {
    "en": ("question,answer", "What is the capital of country number {i}?,It is the city of {i} and the river there."),
    "ja": ("質問,回答", "{i}番目の国の首都はどこですか？教えてください。,それは{i}という町です。川のそばにあります。"),
    "de": ("frage,antwort", "Wie heißt die Hauptstadt von Land Nummer {i}?,Sie heißt {i} und liegt am großen Fluss."),
}  # fmt: skip
# First choices, so that a change of the catalogue or of the ranking is seen and meant.
FIRST = {
    ("en", "4 GiB, no GPU"): "smollm2",
    ("en", "16 GiB, no GPU"): "smollm2",
    ("en", "16 GiB GPU"): "Qwen/Qwen3-4B-Instruct-2507",
    ("en", "80 GiB GPU"): "Qwen/Qwen3-8B",
    ("ja", "4 GiB, no GPU"): "Qwen/Qwen2.5-0.5B-Instruct",
    ("ja", "16 GiB, no GPU"): "Qwen/Qwen2.5-0.5B-Instruct",
    ("ja", "16 GiB GPU"): "llm-jp/llm-jp-3-3.7b-instruct",
    ("ja", "80 GiB GPU"): "tokyotech-llm/Llama-3.1-Swallow-8B-Instruct-v0.3",
    ("de", "4 GiB, no GPU"): "Qwen/Qwen2.5-0.5B-Instruct",
    ("de", "16 GiB, no GPU"): "Qwen/Qwen2.5-0.5B-Instruct",
    ("de", "16 GiB GPU"): "Qwen/Qwen3-4B-Instruct-2507",
    ("de", "80 GiB GPU"): "Qwen/Qwen3-8B",
}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def make(language: str = "en", machine: str = "16 GiB, no GPU", **options):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(starter, "probe", lambda: MACHINES[machine])
        heading, row = TABLES[language]
        rows = [row.format(i=i) for i in range(50)]
        (tmp_path / "rows.csv").write_text("\n".join([heading, *rows]), encoding="utf-8")
        inputs, target = heading.split(",")
        given = {"inputs": [inputs], "target": target} | options
        return starter.write_config(str(tmp_path / "rows.csv"), tmp_path / "config.yaml", **given)

    return make


def test_a_table_with_one_answer_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"parcel {i},late\n" for i in range(40)), encoding="utf-8"
    )
    for target in (None, "label"):
        found = starter.write_config(str(tmp_path / "rows.csv"), tmp_path / "config.yaml", target=target).lines
        assert any(line.startswith("WARNING: all 40 rows to learn from have one answer in 'label'") for line in found)


FOREIGN = {
    "am": "የኢትዮጵያ ዋና ከተማ ማን ናት?,አዲስ አበባ ናት።\nእንዴት ነህ?,ደህና ነኝ",
    "cs": "Jak si mohu změnit heslo?,Otevřete nastavení.\nJaké je hlavní město?,Hlavní město je Praha.",
    "da": "Hvordan nulstiller jeg min adgangskode?,Klik på glemt.\nHvad koster det?,Du kan se prisen efter køb af den.",
    "fi": "Miten voin vaihtaa salasanani?,Avaa asetukset ja valitse salasana.\nMissä tilaus viipyy?,Se saapuu.",
    "gu": "ભારતની રાજધાની કઈ છે?,નવી દિલ્હી\nતમે કેમ છો?,હું મજામાં છું",
    "hu": "Hogyan tudom megváltoztatni a jelszavamat?,Nyissa meg a beállításokat.\nMi a fővárosa?,Budapest.",
    "hy": "Ո՞րն է Հայաստանի մայրաքաղաքը?,Երևանն է\nԻնչպես եք?,Լավ շնորհակալություն",
    "ka": "რა არის საქართველოს დედაქალაქი?,დედაქალაქი არის თბილისი.\nროგორ ხარ?,კარგად გმადლობთ",
    "km": "តើរដ្ឋធានីនៃប្រទេសកម្ពុជាគឺជាអ្វី?,ភ្នំពេញ\nសុខសប្បាយទេ?,ខ្ញុំសុខសប្បាយ",
    "my": "မြန်မာနိုင်ငံ၏မြို့တော်ကဘာလဲ?,နေပြည်တော်\nနေကောင်းလား?,နေကောင်းပါတယ်",
    "ro": "Cum îmi schimb parola?,Deschide setările și alege parola.\nCare este capitala României?,Este București.",
    "sv": "Hur byter jag lösenord?,Öppna inställningar och välj lösenord.\nVad heter huvudstaden?,Den heter Stockholm.",
    "sw": "Mji mkuu wa Kenya ni upi?,Mji mkuu wa Kenya ni Nairobi.\nHabari yako?,Nzuri asante",
    "te": "భారతదేశ రాజధాని ఏది?,న్యూఢిల్లీ\nమీరు ఎలా ఉన్నారు?,నేను బాగున్నాను",
    "": "Nola alda dezaket pasahitza?,Ireki ezarpenak eta aukeratu pasahitza.\nZein da hiriburua?,Bilbo ez da.",
}  # fmt: skip
ENGLISH = {
    "questions": "How do I reset my password?,Click Forgot Password.\nWhere do I find invoices?,Open Billing.",
    "visa": "Do I need a visa to go to Japan?,I do not think so.",
    "complaints": "Printer broken,Restart it and wait\nCannot log in,Reset the password",
    "code": "def do(i): return i,lambda i: i\nfor z in w: print(z),while z: z -= 1",
    "digits": "1 2 3 4,10\n5 6 7 8,26",
    "numbers": "1,10\n5,26\n1e5,2e7",
}


def init_of(rows: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> starter.Started:
    monkeypatch.setattr(starter, "probe", lambda: MACHINES["16 GiB, no GPU"])
    (folder / "rows.csv").write_text(f"question,answer\n{rows}\n", encoding="utf-8")
    return starter.write_config(str(folder / "rows.csv"), folder / "c.yaml", inputs=["question"], target="answer")


@pytest.mark.parametrize("language", FOREIGN)
def test_smollm2_is_not_taken_for_a_small_table_in_another_language(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = init_of(FOREIGN[language], tmp_path, monkeypatch)
    assert any(line.endswith(f"language: {language or 'not recognised'}") for line in started.lines)
    base = config.load(started.path).base_model
    (chosen,) = (one for one in CATALOGUE if one.name == base)
    assert len(chosen.languages) > 5 and "SmolLM2" not in base


@pytest.mark.parametrize("kind", ENGLISH)
def test_smollm2_is_taken_for_english_code_and_numbers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = init_of(ENGLISH[kind], tmp_path, monkeypatch)
    assert any(line.endswith("language: en") for line in started.lines)
    assert config.load(started.path).base_model == "smollm2"


@pytest.mark.parametrize(("language", "machine"), FIRST)
def test_three_languages_on_four_sizes(language: str, machine: str, made) -> None:  # type: ignore[no-untyped-def]
    started = made(language, machine)
    assert f"language: {language}" in started.lines[-1] or f"language: {language}" in started.lines[-2]
    names = [p.candidate.name for p in started.proposals]
    assert len(set(names)) == len(names) >= 3 and all(p.reason for p in started.proposals)
    assert names[0] == FIRST[language, machine]
    written = config.load(started.path)
    assert written.base_model == names[0]
    assert (written.quantization is not None) == (started.proposals[0].bits is not None)
    for proposal in started.proposals:
        assert f"#   {proposal.candidate.name}: {proposal.reason}" in started.text
        if proposal.candidate.terms:  # gated or bound by a licence: said here, before anything is loaded
            assert proposal.candidate.terms in proposal.reason and "https://" in proposal.candidate.terms


def test_a_licence_bound_choice_is_said_by_itself(made) -> None:  # type: ignore[no-untyped-def]
    assert any("LICENCE-BOUND" in line for line in made("ja", "80 GiB GPU").lines)
    assert any("GATED" in line for line in made(base="meta-llama/Llama-3.1-8B-Instruct").lines)


def test_the_licence_of_a_folder_is_said_too(made, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: llama2\n---\n", encoding="utf-8")
    base = str(tmp_path / "model")
    place = tmp_path / "model" / "README.md"
    assert f"{base}: LICENCE-BOUND (llama2): read its terms at {place}" in made(base=base).lines


def test_a_base_of_ones_own_that_does_not_know_the_language_is_said(made) -> None:  # type: ignore[no-untyped-def]
    assert (
        "WARNING: smollm2 was NOT trained on de; the first choice for this table: Qwen/Qwen2.5-0.5B-Instruct"
        in made("de", base="smollm2").lines
    )
    assert not any("NOT trained" in line for line in made("en", base="smollm2").lines)


@pytest.mark.parametrize("free", [1.0, 1.5])
def test_where_nothing_of_the_language_fits_it_is_said(made, monkeypatch: pytest.MonkeyPatch, free: float) -> None:  # type: ignore[no-untyped-def]
    full = Machine(8, 64 * GIB, 60 * GIB, (Gpu("T4", 16 * GIB, int(free * GIB), (7, 5)),))
    monkeypatch.setitem(MACHINES, "full", full)
    started = made("ja", "full")
    assert config.load(started.path).base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert any(line.startswith("WARNING: Qwen/Qwen2.5-0.5B-Instruct does not fit") for line in started.lines)
    assert "that fit" not in started.text and "NONE that knows its language fits" in started.text
    named = made("ja", "full", base="smollm2").lines
    assert (
        "WARNING: smollm2 was NOT trained on ja; the first choice for this table: Qwen/Qwen2.5-0.5B-Instruct" in named
    )


def test_a_choice_that_is_not_known_to_know_the_language_is_said(made, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(starter, "recognised", lambda table, columns: ("nl", False))
    tight = Machine(8, 64 * GIB, 60 * GIB, (Gpu("T4", 16 * GIB, int(1.85 * GIB), (7, 5)),))
    monkeypatch.setitem(MACHINES, "tight", tight)
    started = made("de", "tight")
    assert "WARNING: Qwen/Qwen2.5-0.5B-Instruct may not know nl: its card does not name it" in started.lines
    assert not any("does not fit" in line for line in started.lines)
    assert "that fit this data" not in started.text and "each says whether it fits" in started.text


@pytest.mark.parametrize(("language", "machine"), FIRST)
def test_a_choice_that_fits_and_knows_the_language_has_no_warning(language: str, machine: str, made) -> None:  # type: ignore[no-untyped-def]
    assert not any("WARNING" in line for line in made(language, machine).lines)


def test_every_gated_or_bound_model_says_what_to_do() -> None:
    for candidate in CATALOGUE:
        permissive = candidate.licence in ("Apache-2.0", "MIT") and not candidate.gated
        assert (candidate.terms is None) == permissive
        if candidate.gated:
            assert candidate.terms is not None and "hf auth login" in candidate.terms


def test_a_base_that_fits_in_four_bits_only_is_written_so(made, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    small = Machine(4, 32 * GIB, 30 * GIB, (Gpu("card", 12 * GIB, 11 * GIB, (8, 6)),))
    monkeypatch.setitem(MACHINES, "12 GiB GPU", small)
    started = made(machine="12 GiB GPU", base="Qwen/Qwen3-8B")
    assert config.load(started.path).quantization.bits == 4


def test_answers_get_the_room_they_need(made) -> None:  # type: ignore[no-untyped-def]
    assert config.load(made("en").path).generation.max_new_tokens == 32


def init_of_rows(rows: list[dict[str, object]], folder: Path, **options: object) -> starter.Started:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return starter.write_config(str(folder / "rows.jsonl"), folder / "c.yaml", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "heading",
    ["subject", "Body\nText", "a\u2028b", "a\x85b", "{x}", "body: text", "addr[0]", "a.b", "x!r", "件 名", '"q"', "#1"],
)
def test_every_heading_becomes_a_config_that_can_be_read_and_rendered(heading: str, tmp_path: Path) -> None:
    row = {heading: "some words", "queue:1": "b"}
    written = config.load(init_of_rows([row] * 3, tmp_path, inputs=[heading], target="queue:1").path)
    assert [f.name for f in written.input_features or ()] == [heading]
    assert (written.output_features or ())[0].name == "queue:1"
    text = written.prompt.template
    if heading in ("{x}", "body: text", "x!r"):  # a template would take these for something else
        assert text is None and "cannot be named" in (tmp_path / "c.yaml").read_text(encoding="utf-8")
    else:
        assert text is not None
        parsed = template.parse(text, list(row), target="queue:1")
        assert parsed.fields == (heading,) and parsed.render(row).text.endswith("some words\n\n### queue:1:\n")


def test_a_system_column_stands_first_in_the_template(tmp_path: Path) -> None:
    rows = [{"input": f"words {i}", "output": "more", "system_prompt": "be kind"} for i in range(3)]
    written = config.load(init_of_rows(rows, tmp_path).path).prompt.template
    assert written is not None and written.startswith("{system_prompt}\n\n### input:\n{input}\n")


def test_rows_with_tool_calls_get_a_base_whose_chat_template_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "probe", lambda: MACHINES["4 GiB, no GPU"])
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "What is the weather in the city?"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    broken: list[dict[str, object]] = [{"messages": [{"role": "user", "content": None}]}]
    started = init_of_rows([{"messages": turns}] * 9 + broken, tmp_path)
    assert started.proposals[0].candidate.name == "Qwen/Qwen2.5-0.5B-Instruct"
    assert all("writes tool calls" in p.reason for p in started.proposals)
    named = init_of_rows([{"messages": turns}] * 9, tmp_path, base="smollm2")
    assert any("WARNING: smollm2: its chat template is not known to write tool calls" in line for line in named.lines)
    plain = init_of_rows([{"messages": [turns[0], {"role": "assistant", "content": "It is the sun."}]}] * 9, tmp_path)
    assert plain.proposals[0].candidate.name == "smollm2" and "tool calls" not in plain.text


def test_overrides_are_written_and_comments_kept(made) -> None:  # type: ignore[no-untyped-def]
    started = made(sets=["trainer.epochs=7", "preprocessing.max_sequence_length=64"])
    written = config.load(started.path)
    assert written.trainer.epochs == 7 and written.preprocessing.max_sequence_length == 64
    assert "# Written by `luthier init`" in started.text and "# null trains all weights" in started.text
    with pytest.raises(ConfigError) as error:
        made(sets=["trainer.epoch=7"])
    assert error.value.code == "config-unknown-key"
