"""Constrained answers: always valid, ended within their budget where that is possible, refused in time where not."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import random_grammars
import tokenizers
from test_engine import both
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from luthier.assets.tokenizer import Tokenizer
from luthier.errors import ConfigError
from luthier.infer.closing import automaton
from luthier.infer.constrain import Grammars
from luthier.infer.engine import DecoderEngine
from luthier.infer.generate import HfEngine
from luthier.infer.grammar import fault_of
from luthier.infer.json_rest import Rests
from luthier.infer.sampling import resolve
from luthier.types import Request, Sampling

ENDS = (0,)
LONGEST = 300  # characters of the shortest answer to a random grammar


def make_tokenizer(*, whole: bool = False) -> Tokenizer:
    """Bytes, and some longer pieces as if trained. Not ``whole``: plain text alone, as few as the tiny models' ids."""
    marks = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [chr(code) for code in range(33, 127) if chr(code) in marks and not chr(code).isupper()]
    words = ["<end>", *(marks if whole else [*letters, "Ġ", "Ċ"])]
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ("a", "b"), ("ab", "c"), ('"', "}"), ('"', ":"), ("Ġ", "a")]
    words += ["".join(pair) for pair in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, {"eos_token": "<end>"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer(whole=True)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + 3, ENDS)  # models have scores for ids that no token has


def walk(grammars: Grammars, extra: dict[str, Any], budget: int, draw: np.random.Generator) -> tuple[list[int], bool]:
    """The answer of a model with random scores, and whether it ended by itself."""
    path = grammars.follow(extra, budget)
    assert path is not None
    ids: list[int] = []
    while len(ids) < budget:
        scores = draw.normal(size=grammars._size)
        may = path.allowed(scores)
        assert may.any()
        token = int(np.where(may, scores, -np.inf).argmax())
        if token in grammars._ends:
            return ids, True
        ids.append(token)
        path.take([token])
    return ids, False


def grammar_of_many(draw: random.Random, number: int) -> tuple[dict[str, Any], str]:
    """A schema or an expression, and one of its shortest complete answers."""
    while True:
        if number % 2:
            made, text = random_grammars.regex(draw)
            extra: dict[str, Any] = {"regex": made}
        else:
            schema, text = random_grammars.recursive(draw) if number % 20 == 0 else random_grammars.schema(draw)
            extra = {"schema": schema}
        if len(text) <= LONGEST:
            return extra, text


def check(grammars: Grammars, tokenizer: Tokenizer, count: int, seed: int, *, by_tokens: bool = False) -> None:
    """Follow random grammars with random scores. The budget is the shortest answer's bytes, or more.

    A token is a byte at least, so as many tokens as bytes are always enough. With ``by_tokens`` the budget is that of
    the shortest answer that is known in this vocabulary, which has far fewer tokens.
    """
    for number in range(count):
        draw = random.Random(seed + number)
        extra, shortest = grammar_of_many(draw, number)
        assert fault_of(extra) is None, extra
        least = len(shortest.encode())
        if by_tokens:
            path = grammars.follow(extra, 1)
            assert path is not None and path.grammar.least is not None and len(path.grammar.least) <= least
            least = len(path.grammar.least)
        budget = least + 1 + draw.choice([0, 0, 1, 5, 40, 150])
        ids, ended = walk(grammars, extra, budget, np.random.default_rng(seed + number))
        text = tokenizer.decode(ids)
        assert ended, f"cut after {budget} tokens, and {shortest!r} would have fit: {extra} {text!r}"
        if "regex" in extra:
            made = automaton(extra["regex"])  # re itself takes exponential time on some of these
            assert made is not None and made.end in made.read(made.start, text), (extra, text)
        else:
            jsonschema.validate(json.loads(text), extra["schema"])


def test_answers_are_valid_and_end_within_their_budget(grammars: Grammars, tokenizer: Tokenizer) -> None:
    check(grammars, tokenizer, 80, seed=0)


@pytest.mark.long
def test_a_thousand_answers_are_valid_and_end_within_their_budget(grammars: Grammars, tokenizer: Tokenizer) -> None:
    check(grammars, tokenizer, 1000, seed=1000)


@pytest.mark.long
def test_answers_in_a_real_vocabulary_are_valid_and_end_within_their_budget() -> None:
    from luthier import assets

    real = Tokenizer.load(assets.resolve("smollm2").path)
    check(Grammars(real, real.vocab_size, tuple(real.eos_ids)), real, 200, seed=5000, by_tokens=True)


@pytest.mark.parametrize("seed", range(3))
def test_an_answer_that_cannot_fit_is_cut_and_not_bent(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    extra = {"regex": "[a-c]{20}x"}
    ids, ended = walk(grammars, extra, 5, np.random.default_rng(seed))
    assert not ended and len(ids) == 5 and set(tokenizer.decode(ids)) <= set("abc")


def test_the_automaton_agrees_with_re() -> None:
    """It judges the random answers above, so it is judged here."""
    draw = random.Random(7)
    texts = ["", "a", "ab", "no", "xx", "12", "b1", "so we", "é", "漢a", "x+.", " ,", "\n", "abab", "true", "a" * 12]
    for _ in range(300):
        pattern, text = random_grammars.regex(draw, 1)
        made = automaton(pattern)
        assert made is not None
        assert made.rest(made.start) is not None and len(made.rest(made.start).encode()) <= len(text.encode())
        for one in (text, text + "a", *texts):
            assert (made.end in made.read(made.start, one)) == bool(re.fullmatch(pattern, one)), (pattern, one)


@pytest.mark.parametrize(
    ("schema", "begun", "shortest"),
    [
        ({"type": "string", "minLength": 4}, '"a\\', 'naa"'),
        ({"type": "string", "minLength": 2}, '"\\u00', '00a"'),
        ({"type": "integer", "minimum": 120, "maximum": 140}, "1", "20"),
        ({"type": "integer", "minimum": -12, "maximum": -10}, "-1", "0"),
        ({"enum": ["abc", "abd"]}, '"ab', 'c"'),
        ({"type": "string", "pattern": "^[0-9]{4}$"}, '"12', '00"'),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[tr", "ue,true]"),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": "x"}], "minItems": 2}, "[1", ',"x"]'),
        ({"type": "object", "properties": {"ab": {"type": "null"}}, "required": ["ab"]}, '{"a', 'b":null}'),
        ({"type": "object", "properties": {"a": {}, "b": {"const": 12}}, "required": ["b"]}, '{"a": 1,', '"b":12}'),
        ({"anyOf": [{"type": "string", "minLength": 9}, {"type": "object", "required": ["k"]}]}, "", '{"k":0}'),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}},
         '{"n":{"n":{', "}}}"),
        ({"type": "string", "format": "date"}, '"2000', '-01-01"'),
    ],
)  # fmt: skip
def test_the_shortest_rest_of_a_json_text(schema: Any, begun: str, shortest: str) -> None:
    assert shortest in Rests(schema).rests(begun)
    jsonschema.validate(json.loads(begun + shortest), schema)


def test_far_from_its_end_an_answer_is_free(grammars: Grammars) -> None:
    path = grammars.follow({"regex": "[a-z]*"}, 100)
    assert path is not None
    assert path.allowed(np.zeros(grammars._size)).sum() > 25
    letter = grammars._tokenizer.encode("e")[0]
    path.take([letter] * 99)
    assert set(path.allowed(np.zeros(grammars._size)).nonzero()[0]) == set(ENDS)


@pytest.mark.parametrize(
    ("pattern", "begun", "rest"),
    [
        ("ab{3}(c|de)*f", "ab", "bbf"),
        ("([^a])*x[0-9]{2}", "yx", "00"),
        (r"(yes|no|so\ long)", "so", " long"),
        ("a+?|b{2,4}", "b", "b"),
        (".*!", "é", "!"),
        ("x", "xy", None),
    ],
)
def test_the_shortest_rest_of_an_expression(pattern: str, begun: str, rest: str | None) -> None:
    made = automaton(pattern)
    assert made is not None
    assert made.rest(made.read(made.start, begun)) == rest


def test_expressions_that_no_automaton_holds() -> None:
    assert automaton(r"(a)\1") is None
    assert automaton("(a{500}){500}") is None


CONSTRAINTS: list[dict[str, Any]] = [
    {"choices": ("yes", "no", 'so "so"')},
    {"regex": "[a-c]{3}x?"},
    {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                "additionalProperties": False}},
]  # fmt: skip


@pytest.mark.parametrize("extra", CONSTRAINTS, ids=str)
def test_both_engines_follow_a_constraint(tmp_path: Any, extra: dict[str, Any]) -> None:
    theirs, ours = both(tmp_path)
    theirs.generation_config.eos_token_id = None  # the tokenizer's alone
    tokenizer = make_tokenizer()
    for sampling in (
        Sampling(max_new_tokens=14, extra=extra),
        Sampling(max_new_tokens=14, do_sample=True, seed=1, extra=extra),
        Sampling(max_new_tokens=14, extra={**extra, "suppress_tokens": tuple(range(50))}),
    ):
        answers = []
        for engine in (HfEngine(theirs, tokenizer), DecoderEngine(ours, tokenizer), DecoderEngine(ours, tokenizer)):
            requests = [Request(key, [5 + key, 9, 17], sampling) for key in range(4)]
            answers.append({done.key: done.text for done in engine.generate(requests)})
        assert answers[0] == answers[1] == answers[2]
        for text in answers[0].values():
            if "choices" in extra:
                assert text in extra["choices"]
            elif "regex" in extra:
                assert re.fullmatch(extra["regex"], text)
            else:
                jsonschema.validate(json.loads(text), extra["schema"])


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"regex": "x(ab"}, "at character 2: unclosed group"),
        ({"regex": "(a)b\\1"}, "at character 5: backreferences"),
        ({"schema": '{"type": '}, "line 1 column 9"),
        ({"schema": {"properties": {"a": {"items": {"type": "strng"}}}}}, "at properties.a.items: Invalid type: strng"),
        ({"schema": {"anyOf": [{"type": "null"}, {"minLength": "x", "type": "string"}]}}, "at anyOf[1]: Expected pos"),
        ({"schema": {"$defs": {"n": {"type": "nope"}}, "$ref": "#/$defs/n"}}, "at $defs.n: Invalid type: nope"),
        ({"schema": {"$defs": {"n": {}}, "items": {"$ref": "#/$defs/m"}}}, "at items: Pointer '/$defs/m'"),
        ({"schema": {"properties": {"p": {"type": "string", "pattern": "(a"}}}}, "at properties.p: unclosed group"),
        ({"schema": {"$defs": {"n": {"type": "null"}}, "items": {"$ref": "#/$defs/n"}}}, None),
        ({"schema": {"items": {"additionalProperties": {}, "minProperties": 2}}}, "at items: minProperties"),
        ({"schema": '{"patternProperties": {"^x": {}}, "minProperties": 2}'}, "comes twice"),
        ({"schema": {"properties": {"a": {}}, "required": ["a"], "minProperties": 2}}, None),
        ({"schema": {"properties": {"a": {}}, "required": ["a"], "minProperties": 1}}, None),
    ],
)  # fmt: skip
def test_a_fault_names_its_place(extra: dict[str, Any], says: str | None) -> None:
    told = fault_of(extra)
    assert told is None if says is None else told is not None and says in told, told


@pytest.mark.parametrize(
    ("section", "code", "where"),
    [
        ({"regex": "(ab"}, "config-bad-value", "generation.regex"),
        ({"schema": {"type": "nope"}}, "config-bad-value", "generation.schema"),
        ({"schema": "{"}, "config-bad-value", "generation.schema"),
        ({"regex": "a", "choices": ("a",)}, "config-conflict", "generation.regex"),
        ({"regex": "a", "num_beams": 2}, "config-conflict", "generation.regex"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_runs(section: Any, code: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(section)
    assert caught.value.code == code
    assert where in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.errors import DependencyError

    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(DependencyError, match="constrain"):
        resolve({"choices": ("a", "b")})
    assert resolve({"choices": None}).extra == {}
