"""A base model's tokenizer, through the `tokenizers` library alone: what it adds, what ends a turn, what is control.

Three ways to encode, all without special tokens added:

* `Tokenizer.encode(text, controls=True)`: as the model's own tokenizer reads text that the template's author wrote;
* `Tokenizer.encode(text)`: as text and nothing else; ``<|im_end|>`` typed by a user becomes ordinary tokens;
* `Tokenizer.encode_spans([(text, data), …])`: mixtures; control tokens written outside ``data`` stay control.

Where no control string stands in the data, the first and the last give the same ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.errors import AssetError

if TYPE_CHECKING:
    import tokenizers

# Strings that end a turn in today's chat formats. One counts only where the chat template itself writes it.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endofturn|>",
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<turn|>",
    "<|return|>",
)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

Span = tuple[int, int]  # start and end of a piece of text, in characters
Mode = Literal["first", "later", "continuation"]
# How a piece of text begins: at the very start of the ids, after a control token, or going on from other text. They
# differ only for tokenizers that put a word-start mark before text (Llama's dummy space).


class Tokenizer:
    """Text to ids and back for one base model. Make it with `Tokenizer.load`; it never changes afterwards."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: dict[str, Any] | None = None,
        *,
        generation: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        content_hash: str = "",
        where: str = "tokenizer",
    ) -> None:
        """Wrap ``backend``; ``settings`` is tokenizer_config.json, the others are the model's files of those names."""
        settings = settings or {}
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        names = {key: _content(settings.get(key)) for key in NAMED}
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        _declare_specials(backend, [name for name in (*names.values(), *map(_content, extra)) if name], settings)
        self._controls = {t.content: t for t in backend.get_added_tokens_decoder().values() if t.special}
        self._made: dict[tuple[bool, str], tokenizers.Tokenizer] = {(True, "first"): backend}
        self._ids = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.special_strings: frozenset[str] = frozenset(self._controls)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.chat_template = chat_template or _template_of(settings)
        self.bos_token, self.eos_token = names["bos_token"], names["eos_token"]
        self.bos_id = self._id(self.bos_token)
        self.unk_id = self._id(names["unk_token"])
        self.eos_ids = self._ending(generation or {}, config or {})
        self.eos_id: int = self.eos_ids[0]
        pad = self._id(names["pad_token"])
        self.pad_id: int = self.eos_id if pad is None else pad
        self.bos_ids: tuple[int, ...] = self._prefix(settings)
        self.content_hash = content_hash or hashlib.sha256(backend.to_str().encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer files of a model folder.

        Raises:
            AssetError: ``asset-no-tokenizer`` without a tokenizer.json, ``asset-damaged`` when it cannot be parsed.
        """
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise AssetError(
                "asset-no-tokenizer",
                "the base model has no tokenizer.json",
                where=str(folder),
                received=", ".join(sorted(p.name for p in folder.glob("*"))[:20]) or "an empty or absent folder",
                allowed="a model folder with tokenizer.json (a fast tokenizer)",
                fix="copy the tokenizer files of the original model into the folder, or name the original model",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise AssetError(
                "asset-damaged", f"tokenizer.json cannot be read: {error}", where=str(path), fix="fetch the model again"
            ) from error
        digest = hashlib.sha256()
        for name in FILES:
            if (folder / name).is_file():
                digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
        jinja = folder / "chat_template.jinja"
        settings = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
        return cls(
            backend,
            settings,
            generation=_json(folder / "generation_config.json"),
            config=_json(folder / "config.json"),
            chat_template=jinja.read_text(encoding="utf-8") if jinja.is_file() else None,
            content_hash=digest.hexdigest(),
            where=str(folder),
        )

    def to_json(self) -> str:
        """The whole tokenizer as a tokenizer.json, with the control tokens that the model's files declare."""
        return self._backend.to_str()

    # ------------------------------------------------------------------------------------------- encoding

    def encode(self, text: str, *, controls: bool = False, continuation: bool = False) -> list[int]:
        """Ids of ``text``; nothing is added. With ``controls`` False no special token comes out, whatever it spells.

        ``continuation``: the text goes on from other text (an answer after its prompt), so it gets no word-start mark.
        """
        if controls and continuation:
            return self.encode_spans([(text, ())], continuation=True)[0]
        return self.encode_batch([text], controls=controls, mode="continuation" if continuation else "first")[0]

    def encode_batch(self, texts: Sequence[str], *, controls: bool = False, mode: Mode = "first") -> list[list[int]]:
        """`encode` for many texts at once, in parallel."""
        if not texts:
            return []
        backend = self._variant(controls, mode)
        out: list[list[int]] = [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if not controls:
            for i, ids in enumerate(out):
                if not self._guarded_ids.isdisjoint(ids):
                    out[i] = self._spelt_out(texts[i], mode)
        return out

    def encode_spans(
        self, texts: Sequence[tuple[str, Sequence[Span]]], *, continuation: bool = False
    ) -> list[list[int]]:
        """Ids of texts whose ``data`` spans (sorted, disjoint) are plain text; control tokens elsewhere are control."""
        jobs: dict[Mode, list[str]] = {"first": [], "later": [], "continuation": []}
        layouts: list[list[tuple[Mode, int] | int]] = []  # of each text: a control id, or which chunk of which mode
        for text, data in texts:
            layout: list[tuple[Mode, int] | int] = []
            mode: Mode = "continuation" if continuation else "first"
            for piece in self._pieces(text, data):
                if isinstance(piece, int):
                    layout.append(piece)
                else:
                    layout.append((mode, len(jobs[mode])))
                    jobs[mode].append(piece)
                mode = "later"
            layouts.append(layout)
        done = {mode: self.encode_batch(chunks, mode=mode) for mode, chunks in jobs.items()}
        return [
            [i for part in layout for i in ((part,) if isinstance(part, int) else done[part[0]][part[1]])]
            for layout in layouts
        ]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ``ids``; special tokens are left out unless ``skip_special`` is False."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def find_special(self, text: str) -> list[Span]:
        """Where special-token strings stand in ``text``, leftmost and longest first."""
        if self._pattern is None or self._opening.search(text) is None:
            return []
        return [m.span() for m in self._pattern.finditer(text) if self._stands(m)]

    def hazards(self, text: str) -> list[Span]:
        """Spans of ``text`` that are, or with other text around them could become, special-token strings."""
        found = self.find_special(text)
        head = tail = 0
        most = min(self._longest - 1, len(text))
        if self._closing.search(text, 0, most):  # the rest of a token ends as a token does
            head = next((n for n in range(most, 0, -1) if text[:n] in self._suffixes), 0)
        if self._opening.search(text, len(text) - most):
            tail = next((n for n in range(most, 0, -1) if text[-n:] in self._prefixes), 0)
        if head and not (found and found[0][0] < head):
            found.insert(0, (0, head))
        start = len(text) - tail
        if tail and not (found and found[-1][1] > start):
            found.append((start, len(text)))
        return found

    def control_id(self, text: str) -> int | None:
        """The id of a special-token string, None for any other text."""
        return self._id(text) if text in self.special_strings else None

    # ------------------------------------------------------------------------------------------ internals

    def _pieces(self, text: str, data: Sequence[Span]) -> Iterator[str | int]:
        """``text`` as the model's tokenizer cuts it: control ids, and the texts between them."""
        start, strip = 0, False
        for begin, end in [*self._outside(text, data), (len(text), len(text))]:
            token = self._controls.get(text[begin:end])
            chunk = text[start:begin]
            chunk = chunk.lstrip() if strip else chunk
            chunk = chunk.rstrip() if token is not None and token.lstrip else chunk
            if chunk:
                yield chunk
            if token is not None:
                yield self._ids[token.content]
                start, strip = end, bool(token.rstrip)

    def _outside(self, text: str, data: Sequence[Span]) -> Iterator[Span]:
        """Spans of special strings that lie wholly between the data spans."""
        position = 0
        for begin, end in [*data, (len(text), len(text))]:
            for a, b in self.find_special(text[position:begin]):
                yield position + a, position + b
            position = end

    def _stands(self, match: re.Match[str]) -> bool:
        """Whether a match counts: a token declared ``single_word`` does not match inside a word."""
        if not self._controls[match.group()].single_word:
            return True
        around = match.string[max(0, match.start() - 1) : match.start()] + match.string[match.end() : match.end() + 1]
        return not any(c.isalnum() or c == "_" for c in around)

    def _spelt_out(self, text: str, mode: Mode) -> list[int]:
        """Ids of text that the model's vocabulary would swallow whole as a special token: cut it, and cut again."""
        if len(text) < 2:
            ids: list[int] = self._variant(False, mode).encode(text, add_special_tokens=False).ids
            return [i for i in ids if i not in self._guarded_ids]
        begin, end = next(iter(self.find_special(text)), (0, len(text)))
        middle = begin + max(1, (end - begin) // 2)
        left, right = text[:middle], text[middle:]
        return self.encode_batch([left], mode=mode)[0] + self.encode_batch([right], mode="continuation")[0]

    def _variant(self, controls: bool, mode: Mode) -> tokenizers.Tokenizer:
        """The backend that reads special strings as text, and text that does not start at the start."""
        made = self._made.get((controls, mode))
        if made is None:
            from tokenizers import Tokenizer as Backend

            original = json.loads(self._backend.to_str())
            changed = _without_prefix(original, mode)
            if mode != "first" and changed == original:
                made = self._variant(controls, "first")
            else:
                made = Backend.from_str(json.dumps(changed))
                made.encode_special_tokens = not controls
            self._made[(controls, mode)] = made
        return made

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self.special_strings, key=lambda s: (-len(s), s))
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _opening(self) -> re.Pattern[str]:
        """Any character that a special string begins with."""
        return _any_of(s[0] for s in self.special_strings)

    @cached_property
    def _closing(self) -> re.Pattern[str]:
        """Any character that a special string ends with."""
        return _any_of(s[-1] for s in self.special_strings)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.special_strings), default=1)

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        return frozenset(s[:n] for s in self.special_strings for n in range(1, len(s)))

    @cached_property
    def _suffixes(self) -> frozenset[str]:
        return frozenset(s[n:] for s in self.special_strings for n in range(1, len(s)))

    @cached_property
    def _guarded_ids(self) -> frozenset[int]:
        return frozenset(
            i for i in self._ids.values() if i != self.unk_id
        )  # an unknown character honestly becomes <unk>

    def _id(self, text: str | None) -> int | None:
        return None if text is None else self._backend.token_to_id(text)

    def _ending(self, generation: dict[str, Any], config: dict[str, Any]) -> tuple[int, ...]:
        """Every id that ends an answer, the tokenizer's own EOS first."""
        declared = generation.get("eos_token_id", config.get("eos_token_id"))
        listed = [declared] if isinstance(declared, int) else list(declared or ())
        own = self._id(self.eos_token)
        ids = [own, *listed]
        if len(listed) < 2 and self.chat_template:  # a list is the model's own full answer
            ids += [self.control_id(end) for end in END_OF_TURN if end in self.chat_template]
        kept = tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < self.vocab_size))
        if not kept:
            raise AssetError(
                "asset-unsupported",
                "the tokenizer names no end-of-sequence token, so an answer could never end",
                where=self._where,
                received=self.eos_token,
                allowed="eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
                fix="add it to tokenizer_config.json",
            )
        return kept

    def _prefix(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text: its config's word, else what its post-processor does."""
        if "add_bos_token" in settings or "add_eos_token" in settings:
            return (self.bos_id,) if settings.get("add_bos_token") and self.bos_id is not None else ()
        probe = self._backend.encode("a", add_special_tokens=True)
        count = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), 0)
        return tuple(probe.ids[:count])


def _any_of(characters: Iterable[str]) -> re.Pattern[str]:
    found = "".join(sorted({re.escape(c) for c in characters}))
    return re.compile(f"[{found}]" if found else r"(?!)")


def _declare_specials(backend: tokenizers.Tokenizer, names: Sequence[str], settings: dict[str, Any]) -> None:
    """Make every token that the config calls special special in the backend, adding none that has no id."""
    from tokenizers import AddedToken

    decoder = settings.get("added_tokens_decoder") or {}
    for _, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        flags = {
            key: bool(entry.get(key, False)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        if backend.token_to_id(entry["content"]) is None:
            backend.add_tokens([AddedToken(entry["content"], **flags)])
        elif flags["special"]:
            backend.add_special_tokens([AddedToken(entry["content"], **flags)])
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for name in names:
        if name not in special and backend.token_to_id(name) is not None:
            backend.add_special_tokens([AddedToken(name, normalized=False, special=True)])


def _without_prefix(node: Any, mode: Mode) -> Any:
    """A tokenizer's JSON without the word-start marks that do not apply in ``mode``."""
    if mode == "first":
        return node
    out = {**node}
    for part in ("normalizer", "pre_tokenizer"):
        out[part] = _unmarked(node.get(part), mode)
    return out


def _unmarked(node: Any, mode: Mode) -> Any:
    if isinstance(node, list):
        return [kept for item in node if (kept := _unmarked(item, mode)) is not None]
    if not isinstance(node, dict):
        return node
    if mode == "continuation" and node.get("type") == "Prepend":
        return None
    out = {key: _unmarked(value, mode) for key, value in node.items()}
    if out.get("type") == "Metaspace" and (mode == "continuation" or out.get("prepend_scheme") == "first"):
        out["prepend_scheme"] = "never"
    if out.get("type") == "ByteLevel" and mode == "continuation":
        out["add_prefix_space"] = False
    return out


def _content(token: Any) -> str | None:
    """The string of a token that a config writes as text or as a mapping."""
    return token.get("content") if isinstance(token, dict) else token


def _template_of(settings: dict[str, Any]) -> str | None:
    """The chat template of a tokenizer_config.json, which may list several by name."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty when there is none. Raises ``asset-damaged``."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AssetError(
            "asset-damaged", f"{path.name} is not valid JSON: {error}", where=str(path), fix="fetch the model again"
        ) from error
    return found if isinstance(found, dict) else {}
