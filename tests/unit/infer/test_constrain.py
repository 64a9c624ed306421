"""Constrained answers: always valid, ended within their budget where that is possible, refused in time where not."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from test_engine import both
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from luthier.assets.tokenizer import Tokenizer
from luthier.errors import ConfigError
from luthier.infer.closing import automaton
from luthier.infer.constrain import ZONE, Grammars, fault_of
from luthier.infer.engine import DecoderEngine
from luthier.infer.generate import HfEngine
from luthier.infer.sampling import resolve
from luthier.types import Request, Sampling

ENDS = (0,)


def make_tokenizer() -> Tokenizer:
    """Fewer tokens than the tiny models have ids: bytes of plain text, and some longer pieces as if trained."""
    marks = pre_tokenizers.ByteLevel.alphabet()
    letters = [chr(code) for code in range(33, 127) if chr(code) in marks and not chr(code).isupper()]
    words = ["<end>", *letters, "Ġ", "Ċ"]
    merges = [("t", "r"), ("tr", "u"), ("tru", "e"), ("a", "b"), ("ab", "c"), ('"', "}"), ('"', ":"), ("Ġ", "a")]
    words += ["".join(pair) for pair in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, {"eos_token": "<end>"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


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
        if token in ENDS:
            return ids, True
        ids.append(token)
        path.take([token])
    return ids, False


def random_schema(draw: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = draw.choice(["integer", "string", "boolean", "null", "number", "enum", "object", "array"])
    if kind == "enum":
        return {"enum": draw.sample(["abc", "x", "true", 7, None, "a b"], draw.randint(1, 4))}
    if kind == "string":
        least = draw.choice([0, 0, 3, 12])
        return {"type": "string", "minLength": least, "maxLength": least + draw.choice([0, 5])}
    if kind == "integer":
        return {"type": "integer", "minimum": draw.randint(-50, 10), "maximum": draw.randint(11, 900)}
    if kind == "object" and depth:
        names = draw.sample(["a", "b", "c", "name"], draw.randint(1, 3))
        return {
            "type": "object", "properties": {name: random_schema(draw, depth - 1) for name in names},
            "required": names[: draw.randint(0, len(names))], "additionalProperties": False,
        }  # fmt: skip
    if kind == "array" and depth:
        least = draw.randint(0, 2)
        return {"type": "array", "items": random_schema(draw, depth - 1), "minItems": least, "maxItems": least + 2}
    return {"type": kind} if kind in ("boolean", "null", "number") else {"type": "boolean"}


def random_regex(draw: random.Random, depth: int = 2) -> str:
    def one() -> str:
        plain = draw.choice(["[a-c]", "[0-9]", "x", "ab", "[^a]", r"\d", "(true|no)"])
        inner = random_regex(draw, depth - 1) if depth and draw.random() < 0.3 else plain
        return f"({inner})" + draw.choice(["", "", "?", "*", "+", "{2}", "{1,3}"])

    return "".join(one() for _ in range(draw.randint(1, 4)))


def check(grammars: Grammars, tokenizer: Tokenizer, count: int, seed: int) -> int:
    """Follow random grammars with random scores under random budgets; how many answers were cut."""
    cut = 0
    for number in range(count):
        draw = random.Random(seed + number)
        schema = random_schema(draw) if number % 2 else None
        extra = {"regex": random_regex(draw)} if schema is None else {"schema": schema}
        assert fault_of(extra) is None, extra
        path = grammars.follow(extra, 10)
        assert path is not None
        least = path.grammar.least
        assert least is not None, extra
        budget = len(least) + 1 + draw.choice([0, 1, 5, 40])
        ids, ended = walk(grammars, extra, budget, np.random.default_rng(seed + number))
        if not ended:
            cut += 1
            continue
        text = tokenizer.decode(ids)
        if schema is None:
            assert re.fullmatch(extra["regex"], text, re.DOTALL), (extra, text)
        else:
            jsonschema.validate(json.loads(text), schema)
    return cut


def test_answers_are_valid_and_end_within_their_budget(grammars: Grammars, tokenizer: Tokenizer) -> None:
    assert check(grammars, tokenizer, 60, seed=0) == 0


@pytest.mark.long
def test_a_thousand_answers_are_valid_and_end_within_their_budget(grammars: Grammars, tokenizer: Tokenizer) -> None:
    assert check(grammars, tokenizer, 1000, seed=1000) == 0


def test_far_from_its_end_an_answer_is_free(grammars: Grammars) -> None:
    path = grammars.follow({"regex": "[a-z]*"}, 10 * ZONE)
    assert path is not None
    assert path.allowed(np.zeros(grammars._size)).sum() > 25
    path.take([5] * (10 * ZONE - 1))
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
