"""From growing token ids to text that may be shown: whole characters only, and never half of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not yet a whole character


def whole_characters(text: str) -> str:
    """The text without what an answer that was cut off left of its last character."""
    return text.rstrip(_UNFINISHED)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string in it, and whether there was one."""
    found = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return (text[: min(found)], True) if found else (text, False)


class IncrementalText:
    """Turns ids that arrive one at a time into pieces of text that join to the decoded whole.

    A piece is held back while its last character is unfinished or while it may be the beginning of a stop string.
    Only a short window is decoded again with each id, so a long answer costs no more per token than a short one.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stop for stop in stops if stop)
        self._ids: list[int] = []
        self._window = 0  # decoding starts here, one piece back, so that joins between tokens are seen
        self._read = 0  # ids before this one have become text
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more id; return what may be shown now (often an empty string)."""
        if self.stopped:
            return ""
        self._ids.append(token)
        piece = self._next_piece(final=False)
        return self._release(piece, final=False)

    def finish(self) -> str:
        """What was still held back, at the end of the answer."""
        if self.stopped:
            return ""
        return self._release(self._next_piece(final=True), final=True)

    def _next_piece(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        if not final and (after.endswith(_UNFINISHED) or len(after) <= len(before)):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return (whole_characters(after) if final else after)[len(before) :]

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        text, self.stopped = cut_at_stop(text, self._stops)
        keep = 0 if final or self.stopped else self._possible_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_stop(self, text: str) -> int:
        """How many characters at the end could begin a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
