"""Pieces join to the whole, hold whole characters, and never show part of a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.infer.text import IncrementalText, cut_at_stop, whole_characters


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_join_to_the_cut_text(text, stops):
    stream = IncrementalText(decode_bytes, stops)
    pieces = [stream.push(byte) for byte in text.encode("utf-8")]
    pieces.append(stream.finish())
    assert "".join(pieces) == cut_at_stop(text, stops)[0] or "\ufffd" in text
    assert all(len(p.encode()) >= len(p) and ("\ufffd" not in p or "\ufffd" in text) for p in pieces)


def test_a_character_of_three_bytes_arrives_once():
    stream = IncrementalText(decode_bytes)
    assert [stream.push(b) for b in "あb".encode()] == ["", "", "あ", "b"]


def test_half_a_stop_string_is_held_and_then_shown():
    stream = IncrementalText(decode_bytes, ["###"])
    shown = [stream.push(b) for b in b"a##b"]
    assert shown == ["a", "", "", "##b"]
    shown = [stream.push(b) for b in b"###c"]
    assert "".join(shown) == ""
    assert stream.stopped


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\ufffd", exclude_categories=("Cs",)), max_size=12))
def test_an_answer_that_is_cut_off_ends_with_a_whole_character(text):
    """At every byte; the streamed pieces join to the text of the whole answer."""
    content = text.encode("utf-8")
    for cut in range(len(content) + 1):
        stream = IncrementalText(decode_bytes)
        shown = "".join([*(stream.push(byte) for byte in content[:cut]), stream.finish()])
        assert text.startswith(shown) and len(shown.encode()) > cut - 4
        assert shown == whole_characters(decode_bytes(content[:cut]))
