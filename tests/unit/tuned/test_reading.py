"""How an answer becomes a class."""

from __future__ import annotations

import pytest

from luthier.config.features import Feature
from luthier.tuned.reading import Reader

CLASSES = ("no", "yes", "maybe")


def reader(**decoder) -> Reader:
    declared = {"name": "out", "type": "category"}
    if decoder:
        declared["decoder"] = {"type": "category_extractor", **decoder}
    return Reader.of(Feature.model_validate(declared), CLASSES)


@pytest.mark.parametrize(
    ("kind", "value", "answer", "fits"),
    [
        ("contains", "sure", "I am sure.", True),
        ("contains", "sure", "I am Sure.", False),  # as Ludwig does
        ("equals", "sure", " sure\n", True),
        ("equals", "sure", "sure!", False),
        ("regex", r"\bsur(e|ely)\b", "I am surely", True),
        ("regex", r"^sure", "I am sure", False),
    ],
)
def test_each_kind_of_rule(kind: str, value: str, answer: str, fits: bool) -> None:
    made = reader(match={"yes": {"type": kind, "value": value}}, fallback_label="no")
    assert made.read(answer) == ("yes" if fits else "no")


def test_the_first_rule_that_fits_counts() -> None:
    rules = {"maybe": {"value": "may"}, "yes": {"value": "y"}}
    assert reader(match=rules).read("may") == "maybe"
    assert reader(match=dict(reversed(rules.items()))).read("may") == "yes"


def test_without_rules_the_class_itself_in_any_case() -> None:
    assert reader().read(" YES ") == "yes"


def test_what_names_no_class_is_the_fallbacks_then_the_likeliest_then_itself() -> None:
    assert reader(fallback_label="no").read("hm", (0.1, 0.7, 0.2)) == "no"
    assert reader().read("hm", (0.1, 0.7, 0.2)) == "yes"
    assert reader().read("hm") == "hm"
    older = Feature.model_validate({"name": "o", "type": "category", "preprocessing": {"fallback_label": "no"}})
    assert Reader.of(older, CLASSES).read("hm") == "no"


@pytest.mark.parametrize(
    "feature",
    [
        {"name": "o", "type": "text", "decoder": {"type": "category_extractor"}},
        {"name": "o", "type": "category", "decoder": {"match": {"a": {"type": "regex", "value": "("}}}},
    ],
)
def test_rules_that_cannot_work_are_refused(feature) -> None:
    with pytest.raises(ValueError, match=r"category|regular expression"):
        Feature.model_validate(feature)
