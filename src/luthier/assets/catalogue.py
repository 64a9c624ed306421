"""A small catalogue of base models, and which of them fit a table and a machine. Nothing is looked up or loaded.

Read in November 2026 from stored copies of the models' own pages; a model's page of today is what counts:

* parameters, languages and licence: the card, https://huggingface.co/NAME. Beside the cards: the languages of Qwen3
  from https://qwenlm.github.io/blog/qwen3, Meta's models from MODEL_CARD.md of github.com/meta-llama/llama-models, the
  languages of Phi-4-mini from https://ai.azure.com/catalog/models/Phi-4-mini-instruct, both licences of Swallow from
  https://huggingface.co/tokyotech-llm/Llama-3.1-Swallow-70B-Instruct-v0.1/discussions/1
* context: what the card calls the native context; `max_position_embeddings` of config.json where it names none
* download: the safetensors of the list of files; two bytes a parameter for Phi-4-mini, Qwen3-4B and Qwen3-8B, whose
  list was not to be had
* calls: the chat template as the makers publish it, or as it is quoted: that of Phi-4-mini, which prints no calls, in
  https://github.com/ggml-org/llama.cpp/pull/12288; where no copy was to be had, it is not taken to write them
* gated: the list of files says so (Mistral), or the maker's pages do for the family (Llama, Gemma)
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.assets import licences
from luthier.types import Machine

GIB = 2**30
APACHE = "Apache-2.0"
MANY = "many"  # a language entry: trained on dozens of languages, of which the sources name only some
SPARE = 0.8  # share of free memory that is counted on


@dataclass(frozen=True, slots=True)
class Candidate:
    """One base model as its card describes it."""

    name: str  # what to write as base_model
    parameters: float  # in billions
    languages: tuple[str, ...]  # ISO 639-1, strongest first, where the sources name them
    context: int  # tokens
    licence: str
    gated: bool
    download: float  # GB
    note: str = ""
    calls: bool = False  # the chat template writes the calls of tools

    def speaks(self, language: str) -> bool | None:
        """Whether the model's makers say that it knows the language; None where they name only some of many."""
        if language in self.languages:
            return True
        return None if MANY in self.languages else False

    @property
    def terms(self) -> str | None:
        """What has to be done before this model may be used, None for a permissive licence without a gate."""
        return licences.terms(self.licence, f"https://huggingface.co/{self.name}", gated=self.gated)

    @property
    def training_bytes(self) -> float:
        """Memory to train LoRA on 16-bit weights: weights, adapter and its optimizer, activations of a pass."""
        return self.parameters * 1e9 * 2.4 + 1.0 * GIB

    @property
    def quantised_bytes(self) -> float:
        """The same with the base in 4 bits."""
        return self.parameters * 1e9 * 0.95 + 1.0 * GIB


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate with the reason for its place in the list, on one line."""

    candidate: Candidate
    reason: str
    bits: int | None = None  # 4: fits with quantization.bits: 4 only
    fits: bool = True


def _codes(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Qwen3: those of ISO 639-1 among the 119 languages and dialects that its makers list. Qwen2.5: "over 29 languages".
QWEN3 = _codes(
    "en zh fr es pt de it ru ja ko vi th ar nl pl tr id el he hi bn ta uk cs ro hu sv da fi no bg hr sk sl lt lv et sr"
    " mk bs sq ca gl is be hy fa ur ne mr gu pa or as sd si tg ga cy af yi te kn ml az uz kk tt ms tl jv su lo km my ka"
    " eu ht sw mt oc lb fo sc li"
)
QWEN25 = (*_codes("en zh fr es pt de it ru ja ko vi th ar"), MANY)
LLAMA3 = _codes("en de fr it pt hi es th")
PHI4 = _codes("en ar zh cs da nl fi fr de he hu it ja ko no pl pt ru es sv th tr uk")

CATALOGUE: tuple[Candidate, ...] = (
    Candidate("smollm2", 0.135, ("en",), 8192, APACHE, False, 0.09, "comes with Luthier's demo, no hub needed"),
    Candidate("HuggingFaceTB/SmolLM2-360M-Instruct", 0.362, ("en",), 8192, APACHE, False, 0.72),
    Candidate("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1.71, ("en",), 8192, APACHE, False, 3.4),
    Candidate("Qwen/Qwen2.5-0.5B-Instruct", 0.49, QWEN25, 32768, APACHE, False, 1.0, calls=True),
    Candidate("Qwen/Qwen2.5-1.5B-Instruct", 1.54, QWEN25, 32768, APACHE, False, 3.1, calls=True),
    Candidate("Qwen/Qwen3-0.6B", 0.6, QWEN3, 32768, APACHE, False, 1.5, calls=True),
    Candidate("Qwen/Qwen3-4B-Instruct-2507", 4.0, QWEN3, 262144, APACHE, False, 8.0, calls=True),
    Candidate("Qwen/Qwen3-8B", 8.2, QWEN3, 32768, APACHE, False, 16.4, calls=True),
    Candidate("meta-llama/Llama-3.2-1B-Instruct", 1.23, LLAMA3, 131072, "Llama 3.2 Community", True, 2.5, calls=True),
    Candidate("meta-llama/Llama-3.1-8B-Instruct", 8.0, LLAMA3, 131072, "Llama 3.1 Community", True, 16.1, calls=True),
    Candidate("google/gemma-3-1b-it", 1.0, ("en",), 32768, "Gemma terms", True, 2.0),
    Candidate("mistralai/Mistral-7B-Instruct-v0.3", 7.25, ("en",), 32768, APACHE, True, 14.5, calls=True),
    Candidate("microsoft/Phi-4-mini-instruct", 3.8, PHI4, 131072, "MIT", False, 7.6),
    Candidate("llm-jp/llm-jp-3-1.8b-instruct", 1.87, ("ja", "en"), 4096, APACHE, False, 3.7),
    Candidate("llm-jp/llm-jp-3-3.7b-instruct", 3.78, ("ja", "en"), 4096, APACHE, False, 7.6),
    Candidate("tokyotech-llm/Llama-3.1-Swallow-8B-Instruct-v0.3", 8.0, ("ja", "en"), 8192,
              "Llama 3.1 Community and Gemma terms", False, 16.1),
)  # fmt: skip
MANY_NAMED = 5  # languages from which on their number is told, not their codes
CPU_PARAMETERS = 0.7  # billions: what trains within an hour or so on a few cores
FEW_ROWS = 1000
SIMPLE_TASKS = ("classification",)


def propose(
    language: str,
    rows: int,
    longest_tokens_estimate: int,
    task: str,
    machine: Machine,
    count: int = 4,
    *,
    calls: bool = False,
) -> list[Proposal]:
    """At least three bases for this data on this machine, first choice first, each with a reason.

    ``language`` is an ISO 639-1 code such as "ja", or "" when it could not be told (then treated as not English).
    Models that do not fit, or whose context is too short, come after those that do, and models that were not trained on
    the language after all others; each says so. ``calls``: the rows hold calls of tools, and models whose chat template
    is not known to write them come last of all. Where none fits, the smallest that knows the language is the first.
    """
    judged = [judge(candidate, language, longest_tokens_estimate, machine, calls=calls) for candidate in CATALOGUE]
    order = sorted(
        judged,
        key=lambda one: (
            calls and not one.candidate.calls,
            *_rank(one, language, rows, longest_tokens_estimate, task, machine),
        ),
    )
    return order[: max(count, 3)]


def known(name: str) -> Candidate | None:
    """The catalogue's entry for a base model's name, if it has one."""
    return next((candidate for candidate in CATALOGUE if candidate.name == name), None)


def _memory(machine: Machine) -> float:
    return SPARE * max((gpu.free for gpu in machine.gpus), default=machine.free_memory)


def _gib(count: float) -> str:
    return f"{count / GIB:.1f} GiB"


def judge(candidate: Candidate, language: str, longest: int, machine: Machine, *, calls: bool = False) -> Proposal:
    """One candidate on this machine for rows of ``longest`` tokens: whether it fits, in which bits, and the reasons."""
    memory = _memory(machine)
    bits = None if candidate.training_bytes <= memory else 4
    fits = candidate.quantised_bytes <= memory
    said = [f"{candidate.parameters:.3g}B parameters", _language_words(candidate, language)]
    said.append(
        f"context {candidate.context:,}" + ("" if longest <= candidate.context else ": too short for this data")
    )
    said.append(f"{candidate.download:.2g} GB to download")
    if calls:
        known_to = "writes" if candidate.calls else "is NOT known to write"
        said.append(f"its chat template {known_to} tool calls")
    if candidate.terms:
        said.append(candidate.terms)
    if not fits:
        said.append(
            f"needs about {_gib(candidate.quantised_bytes)} in 4 bits: more than the {_gib(memory)} free for it"
        )
    elif bits:
        said.append("fits with quantization.bits: 4")
    else:
        said.append("fits in 16 bits")
    if not machine.gpus and candidate.parameters > CPU_PARAMETERS:
        said.append("slow without a GPU")
    if candidate.note:
        said.append(candidate.note)
    return Proposal(candidate, "; ".join(said), bits if fits else None, fits)


def _language_words(candidate: Candidate, language: str) -> str:
    named = len(candidate.languages)
    if not language:
        return "languages: " + (", ".join(candidate.languages) if named < MANY_NAMED else f"{named} and more")
    if language == candidate.languages[0] and named < MANY_NAMED:
        return f"made for {language}"
    if candidate.speaks(language) is None:
        return f"trained on many languages; its card does not name {language}"
    return f"knows {language}" if candidate.speaks(language) else f"NOT trained on {language}"


def _rank(
    one: Proposal, language: str, rows: int, longest: int, task: str, machine: Machine
) -> tuple[bool, bool, bool, int, float, bool, bool, bool, float]:
    """Sort key, smallest first: not foreign to the language, usable at all, speaks it, not gated, not in 4 bits, size.

    What was not trained on the language comes after what does not fit: it would train without a word and answer badly.
    What was made for another language comes there too, whatever else it knows.
    """
    candidate = one.candidate
    if language:
        strangeness = {True: 0, None: 1, False: 2}[candidate.speaks(language)]
    else:  # an unknown language asks for a model of many
        strangeness = 0 if len(candidate.languages) >= MANY_NAMED else 2
    excess = 0.0 if one.fits else candidate.parameters  # where nothing fits, the smallest is nearest to it
    too_slow = not machine.gpus and candidate.parameters > CPU_PARAMETERS
    weight = 1.5 if candidate.languages[0] == language != "en" else 1.0
    foreign = strangeness == 2 or candidate.languages[0] not in ("en", language)  # made for another language
    size = -candidate.parameters * weight
    if machine.gpus and task in SIMPLE_TASKS and rows < FEW_ROWS:
        size = abs(candidate.parameters - 1.5)  # a small classification needs no more than a small model
    if not machine.gpus:
        size = abs(candidate.parameters - (0.135 if language == "en" else 0.5))  # speed decides on a CPU
    usable = (not one.fits, longest > candidate.context)
    return (foreign, *usable, strangeness, excess, too_slow, candidate.gated, bool(one.bits), size)
