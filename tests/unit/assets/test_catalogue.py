"""Three languages on four sizes of memory: what is proposed, and why."""

from __future__ import annotations

import pytest

from luthier.assets.catalogue import CATALOGUE, GIB, propose
from luthier.types import Gpu, Machine

MACHINES = {
    "2 GiB, no GPU": Machine(2, 2 * GIB, 2 * GIB),
    "16 GiB, no GPU": Machine(4, 16 * GIB, 14 * GIB),
    "16 GiB GPU": Machine(8, 64 * GIB, 60 * GIB, (Gpu("T4", 16 * GIB, 15 * GIB),)),
    "80 GiB GPU": Machine(16, 128 * GIB, 120 * GIB, (Gpu("H100", 80 * GIB, 78 * GIB),)),
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("language", ["en", "ja", "sw"])
def test_at_least_three_that_fit_best_first(language: str, machine: Machine) -> None:
    proposals = propose(language, 2000, 300, "instruction", machine)
    first = proposals[0]
    assert len(proposals) >= 3 and len({p.candidate.name for p in proposals}) == len(proposals)
    assert first.fits and first.candidate.speaks(language) and not first.candidate.gated
    assert all("\n" not in p.reason and len(p.reason) > 20 for p in proposals)
    if language != "en" or machine.gpus:
        assert first.candidate.name != "smollm2"
    assert all(p.candidate.name in p.reason and "GATED" in p.reason for p in proposals if p.candidate.gated)


def gpu_with(free: float) -> Machine:
    """A machine with a GPU of 16 GiB of which only ``free`` GiB are not taken."""
    return Machine(8, 64 * GIB, 60 * GIB, (Gpu("T4", 16 * GIB, int(free * GIB)),))


@pytest.mark.parametrize("free", [1.0, 1.5])
@pytest.mark.parametrize("language", ["ja", "de", ""])
def test_on_a_gpu_that_is_nearly_full_the_smallest_of_the_language_comes_first(language: str, free: float) -> None:
    proposals = propose(language, 2000, 300, "instruction", gpu_with(free), count=99)
    first = proposals[0]
    assert first.candidate.name == "Qwen/Qwen2.5-0.5B-Instruct" and not first.fits and first.bits is None
    assert "needs about 1.4 GiB in 4 bits: more than the " + f"{0.8 * free:.1f} GiB" in first.reason
    knowing = [p.candidate.parameters for p in proposals if language and p.candidate.speaks(language)]
    assert knowing == sorted(knowing)
    foreign = [
        (p.candidate.speaks(language) if language else len(p.candidate.languages) > 4) is False for p in proposals
    ]
    assert foreign == sorted(foreign) and any(foreign)  # among them smollm2, which alone may fit


def test_one_that_fits_and_may_know_the_language_comes_before_one_that_knows_it_and_does_not_fit() -> None:
    names = [p.candidate.name for p in propose("nl", 2000, 300, "instruction", gpu_with(1.85))]
    assert names[:2] == ["Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B"]


@pytest.mark.parametrize("free", [1.0, 1.5])
def test_english_on_a_gpu_that_is_nearly_full_takes_what_is_smallest(free: float) -> None:
    first = propose("en", 2000, 300, "instruction", gpu_with(free))[0]
    assert first.candidate.name == "smollm2" and first.fits == (free == 1.5)


def test_english_on_a_cpu_starts_with_the_embedded_model() -> None:
    assert propose("en", 600, 300, "instruction", MACHINES["16 GiB, no GPU"])[0].candidate.name == "smollm2"


def test_japanese_on_a_gpu_starts_with_a_japanese_model() -> None:
    assert propose("ja", 600, 300, "instruction", MACHINES["80 GiB GPU"])[0].candidate.languages[0] == "ja"


def test_english_is_not_given_a_japanese_model_first() -> None:
    for machine in MACHINES.values():
        assert propose("en", 600, 300, "instruction", machine)[0].candidate.languages[0] == "en"


@pytest.mark.parametrize("task", ["columns", "classification"])
@pytest.mark.parametrize("free", [0.5, 4, 6, 15, 24, 78])
def test_english_is_given_no_model_made_for_another_language(free: float, task: str) -> None:
    proposals = propose("en", 200, 300, task, gpu_with(free))
    assert {p.candidate.languages[0] for p in proposals} == {"en"}, [p.candidate.name for p in proposals]


def test_an_unknown_language_wants_many() -> None:
    first = propose("", 600, 300, "instruction", MACHINES["2 GiB, no GPU"])[0]
    assert len(first.candidate.languages) > 10 and "and more" in first.reason


def test_a_language_that_no_source_names_is_neither_claimed_nor_denied() -> None:
    dutch = {p.candidate.name: p for p in propose("nl", 600, 300, "instruction", MACHINES["16 GiB GPU"], count=99)}
    assert "knows nl" in dutch["Qwen/Qwen3-0.6B"].reason and "NOT trained on nl" in dutch["smollm2"].reason
    unsaid = dutch["Qwen/Qwen2.5-0.5B-Instruct"]
    assert "its card does not name nl" in unsaid.reason and unsaid.candidate.speaks("nl") is None
    english = propose("en", 600, 300, "instruction", MACHINES["16 GiB GPU"], count=99)
    made = [p.candidate.name for p in english if "made for en" in p.reason]
    assert "smollm2" in made and not any(name.startswith(("Qwen", "meta-llama")) for name in made)
    names = list(dutch)
    assert names.index("Qwen/Qwen3-0.6B") < names.index(unsaid.candidate.name) < names.index("smollm2")


def test_long_data_wants_a_long_context() -> None:
    first = propose("en", 600, 20_000, "instruction", MACHINES["80 GiB GPU"])[:3]
    assert len(first) == 3 and min(proposal.candidate.context for proposal in first) >= 20_000


def test_a_small_classification_stays_small() -> None:
    assert propose("en", 300, 100, "classification", MACHINES["80 GiB GPU"])[0].candidate.parameters < 3


def test_the_catalogue_is_whole() -> None:
    assert len(CATALOGUE) >= 12 and any(c.gated for c in CATALOGUE)
    assert all(c.parameters > 0 and c.context > 0 and c.licence and c.download > 0 for c in CATALOGUE)
