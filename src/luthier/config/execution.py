"""The `execution:` section: pins for what is otherwise planned. It changes time and memory, never what is learned."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from luthier.config.section import Auto, Int, Section, key

SIZE = r"^\s*\d+(\.\d+)?\s*([kKMGT]i?B?|B)?\s*$"
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

Size = Annotated[str, StringConstraints(pattern=SIZE), Field(examples=["12GiB"])]
Tokens = Annotated[Int, Field(ge=1)]
Count = Annotated[Int, Field(ge=0)]


def size_bytes(text: str) -> int:
    """Bytes of a size such as ``15GiB``, ``15G`` (the same), ``15 GB`` (decimal) or ``1024``.

    Raises ValueError when ``text`` is no size.
    """
    found = re.match(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*$", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is not a size such as 15GiB")
    number, unit, binary, byte = found.groups()
    base = 1000 if byte and not binary else 1024
    return int(float(number) * base ** _POWERS[unit.lower()])


class Execution(Section):
    """How the run is executed. `auto` is planned from the model, the data and the machine; `luthier plan` shows it."""

    model: Literal["auto", "decoder", "generic"] = key(
        "auto", "decoder: Luthier's own, packed; generic: transformers and PEFT, padded."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = key("auto", "Where it runs; cuda is the GPU with most free memory.")
    tokens_per_pass: Tokens | Auto = key("auto", "Tokens of one forward and backward pass.")
    recompute: Count | Literal["auto", "none", "all"] = key(
        "auto", "Layers whose activations are recomputed in the backward pass, counted from the first."
    )
    offload_checkpoints: bool | Auto = key(
        "auto", "Keep the inputs of recomputed layers in host memory; true without `recompute` recomputes all layers."
    )
    mlp_tile: Count | Auto = key(
        "auto", "Tokens that a feed-forward layer works on at a time, recomputed in the backward pass; 0: all at once."
    )
    attention: Literal["auto", "flash", "padded"] = key(
        "auto", "flash: packed (CUDA, 16 bit, compute capability 8.0); padded: rows are padded inside the attention."
    )
    weights: Literal["auto", "resident", "quantised", "streamed"] = key(
        "auto",
        "Frozen weights. resident: in the type of the arithmetic on the device; quantised: 4 bit there, de-quantised "
        "as they are used; streamed: in host memory, copied layer by layer.",
    )
    embeddings: Literal["auto", "device", "host"] = key("auto", "Where the table of input embeddings is looked up.")
    loss_chunk: Tokens | Auto = key("auto", "Supervised tokens whose logits exist at one time.")
    optimizer: Literal["auto", "device", "host"] = key("auto", "Where the optimizer keeps its state.")
    graphs: bool | Auto = key("auto", "Replay passes as CUDA graphs; auto: where the time saved exceeds making them.")
    pad_to_multiple_of: Tokens | Auto = key("auto", "What the decoder pads the tokens of a pass to, a sample of zeros.")
    share_prefix: bool | Auto = key("auto", "Compute tokens that samples of a pass start with once (dropout 0).")
    memory_limit: Size | None = key(
        None, "Most memory of the device that may be used, such as 12GiB; empty: what is free, less a reserve."
    )
    host_memory_limit: Size | None = key(None, "The same of the host's memory.")

    @property
    def pins(self) -> dict[str, object]:
        """The keys that are not left to the planner, without the limits."""
        limits = ("memory_limit", "host_memory_limit")
        found = {name: getattr(self, name) for name in type(self).model_fields if name not in limits}
        return {name: value for name, value in found.items() if value != "auto"}
