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
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.assets.controls import ControlStrings, Span
from luthier.assets.tokenizer_bounds import check_growth, check_loading, in_time, is_panic
from luthier.assets.tokenizer_files import (
    MODES,
    Mode,
    content_of,
    declare_specials,
    read_json,
    template_of,
    without_prefix,
)
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
        check_growth(backend, where)
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._where = where
        names = {key: content_of(settings.get(key)) for key in NAMED}
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        declare_specials(backend, [name for name in (*names.values(), *map(content_of, extra)) if name], settings)
        self._controls = {t.content: t for t in backend.get_added_tokens_decoder().values() if t.special}
        self._made: dict[tuple[bool, str], tokenizers.Tokenizer] = {(True, "first"): backend}
        self._ids = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._strings = ControlStrings({text: token.single_word for text, token in self._controls.items()})
        self.special_strings: frozenset[str] = frozenset(self._controls)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.chat_template = chat_template or template_of(settings)
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
    def load(cls, folder: str | Path, *, tried: bool = False) -> Tokenizer:
        """Read the tokenizer files of a model folder. ``tried``: without a look at what loading it takes.

        Raises:
            AssetError: ``asset-no-tokenizer`` without a tokenizer.json, ``asset-damaged`` when it cannot be parsed,
                ``asset-tokenizer-bounds`` when it could blow text up, or takes too long to load.
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
        settings = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
        if not tried:
            check_loading(path, path.read_bytes(), settings)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:  # the library raises plain Exception, and panics
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            raise AssetError(
                "asset-damaged",
                f"tokenizer.json cannot be read: {error}",
                where=str(path),
                received=str(error),
                allowed="a whole tokenizer.json",
                fix="fetch the model again",
            ) from error
        digest = hashlib.sha256()
        for name in FILES:
            if (folder / name).is_file():
                digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
        jinja = folder / "chat_template.jinja"
        return cls(
            backend,
            settings,
            generation=read_json(folder / "generation_config.json"),
            config=read_json(folder / "config.json"),
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
        """`encode` for many texts at once, in parallel. Raises ``asset-tokenizer-bounds`` when it takes too long."""
        if not texts:
            return []
        backend = self._variant(controls, mode)
        found = in_time(
            lambda: backend.encode_batch_fast(list(texts), add_special_tokens=False), sum(map(len, texts)), self._where
        )
        out: list[list[int]] = [e.ids for e in found]
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
        return self._strings.find(text)

    def hazards(self, text: str) -> list[Span]:
        """Spans of ``text`` that are, or with other text around them could become, special-token strings."""
        return self._strings.hazards(text)

    def control_id(self, text: str) -> int | None:
        """The id of a special-token string, None for any other text."""
        return self._id(text) if text in self.special_strings else None

    # ------------------------------------------------------------------------------------------ internals

    def _pieces(self, text: str, data: Sequence[Span]) -> Iterator[str | int]:
        """``text`` as the model's tokenizer cuts it: control ids, and the texts between them."""
        start, strip = 0, False
        for begin, end in [*self._strings.outside(text, data), (len(text), len(text))]:
            token = self._controls.get(text[begin:end])
            chunk = text[start:begin]
            chunk = chunk.lstrip() if strip else chunk
            chunk = chunk.rstrip() if token is not None and token.lstrip else chunk
            if chunk:
                yield chunk
            if token is not None:
                yield self._ids[token.content]
                start, strip = end, bool(token.rstrip)

    def _spelt_out(self, text: str, mode: Mode) -> list[int]:
        """Ids of text that the model's vocabulary would swallow whole as a special token: cut it, and cut again."""
        if len(text) < 2:
            ids: list[int] = self._variant(False, mode).encode(text, add_special_tokens=False).ids
            return [i for i in ids if i not in self._guarded_ids]
        begin, end = next(iter(self._strings.find(text)), (0, len(text)))
        middle = begin + max(1, (end - begin) // 2)
        left, right = text[:middle], text[middle:]
        return self.encode_batch([left], mode=mode)[0] + self.encode_batch([right], mode="continuation")[0]

    def _variant(self, controls: bool, mode: Mode) -> tokenizers.Tokenizer:
        """The backend that reads special strings as text, and text that does not start at the start."""
        made = self._made.get((controls, mode))
        if made is None:
            from tokenizers import Tokenizer as Backend

            original = json.loads(self._backend.to_str())
            changed = without_prefix(original, mode)
            if mode != "first" and changed == original:
                made = self._variant(controls, "first")
            else:
                made = Backend.from_str(json.dumps(changed))
                made.encode_special_tokens = not controls
            self._made[(controls, mode)] = made
        return made

    def make_variants(self) -> None:
        """Make every backend that is otherwise made when it is first needed."""
        for mode in MODES:
            for controls in (True, False):
                self._variant(controls, mode)

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
                received=self.eos_token or "no eos_token",
                allowed="eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
                fix="add it to tokenizer_config.json",
            )
        return kept

    def _prefix(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text: its config's word, else what its post-processor does.

        The post-processor is given a token from elsewhere, so that no pattern of this tokenizer runs here.
        """
        if "add_bos_token" in settings or "add_eos_token" in settings:
            return (self.bos_id,) if settings.get("add_bos_token") and self.bos_id is not None else ()
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordLevel

        probe = self._backend.post_process(Backend(WordLevel({"a": 0}, "a")).encode("a"))
        count = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), 0)
        return tuple(probe.ids[:count])
