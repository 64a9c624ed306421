"""No word of an event or a fault holds a secret, whoever put it there; so no sink and no screen can show one."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import pytest

from luthier import events, secrets
from luthier.errors import DataError

SAID = (
    "403 for s3://AKIAKEY01:canary-one@bucket/x?X-Amz-Signature=canary-two&x=1: the signature of canary-one "
    "with canary-three is not https://canary-four@host/y?b=2&sig=canary-five"
)
KEPT = ("403 for s3://", "@bucket/x?X-Amz-Signature=", "&x=1: the signature of ", "@host/y?b=2&sig=")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_entered", set())
    monkeypatch.setenv("FSSPEC_S3_KEY", "canary-three")
    secrets.enter_with("s3://AKIAKEY01:canary-one@bucket/x")


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (events.Warned, {"text": SAID}),
        (events.Note, {"text": SAID}),
        (events.Stage, {"name": "fetch", "detail": SAID}),
        (events.Planned, {"plan": {}, "why": SAID}),
        (events.Rewound, {"step": 1, "failed": 2, "why": SAID}),
    ],
)
def test_events(kind: type[events.Event], given: dict[str, Any]) -> None:
    said = repr(kind(**given))
    assert "canary" not in said and "AKIAKEY01" not in said
    assert all(text in said for text in KEPT)


def test_faults() -> None:
    """Also where what was received is cut: a piece of a secret is one, too."""
    cut = "x" * 190 + " canary-three"
    error = DataError("data-unreadable", SAID, where=SAID, received=cut, allowed=[SAID], fix=SAID)
    for said in (str(error), json.dumps(error.faults[0].to_json())):
        assert "canary" not in said and said.count(KEPT[0]) == 4


@pytest.mark.parametrize("secret", ["with/slash+and=more", "p@ss/word-long", "colon:within-it"])
def test_what_an_address_is_entered_with(secret: str) -> None:
    """Written as it is or quoted; libraries repeat either form, and the secret without its address."""
    quoted = urllib.parse.quote(secret, safe="")
    secrets.enter_with(f"s3://user:{quoted}@bucket/some@path")
    said = secrets.hidden(f"s3://user:{quoted}@bucket: {secret} or {quoted}")
    assert secret not in said and quoted not in said and said.startswith("s3://[credentials]@bucket: ")


def test_a_slash_in_a_secret_ends_no_host() -> None:
    secrets.enter_with("s3://user:with/slash@bucket/x")
    assert secrets.hidden("s3://user:with/slash@bucket/x: with/slash") == "s3://[credentials]@bucket/x: [credentials]"


def test_addresses_without_secrets_stay() -> None:
    for text in (
        "hf://datasets/owner/name@main/rows.csv", "s3://bucket/a@b", "https://host:8080/x?page=2&key", "a@example.org",
        "memory://mirror", "/some/folder@x", "https://host/@user?step=3",
    ):  # fmt: skip
        secrets.enter_with(text)
        assert secrets.hidden(text) == text
