"""The plan: the fastest that fits, monotone in memory, honest when nothing fits, pins obeyed or refused."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import CPU, GIB, SEVEN, SMALL, declared, gpu, rows

from luthier.errors import ConfigError, TrainingError
from luthier.plan import best, device_of, make_plan, plan_for, planner
from luthier.plan.memory import memory
from luthier.plan.passes import padded, padding_of
from luthier.plan.planner import cost, forecast
from luthier.plan.shape import Shape
from luthier.plan.speed import rates_of
from luthier.plan.support import BUILT
from luthier.plan.trained import trained
from luthier.types import DataStats, Gpu, Machine, Plan

DATA = rows()


def planned(machine: Machine, spec=SEVEN, data: DataStats = DATA, **sections):  # type: ignore[no-untyped-def]
    return best(declared(**sections), spec, data, machine, engine=BUILT)


def test_the_seeds_config_packs_a_whole_step_on_a_large_card() -> None:
    found = planned(gpu(140))
    plan = found.plan
    assert (plan.model, plan.attention, plan.weights, plan.recompute_layers) == ("decoder", "flash", "resident", 0)
    assert found.speed.passes == 1 and plan.tokens_per_pass >= found.job.most("decoder")
    assert set(plan.reasons) >= {"device", "model", "tokens_per_pass", "attention", "recompute_layers", "weights"}
    assert all(plan.reasons.values())


def test_less_memory_takes_the_means_in_their_order() -> None:
    kinds = [planned(gpu(free)).plan for free in (40, 16, 8, 6, 3)]
    assert [plan.weights for plan in kinds] == ["resident", "quantised", "quantised", "quantised", "streamed"]
    assert [plan.recompute_layers > 0 for plan in kinds] == [False, False, False, True, True]
    assert kinds[2].tokens_per_pass < kinds[0].tokens_per_pass


def test_turing_pads_inside_the_attention_in_fp16() -> None:
    found = planned(gpu(14.5, (7, 5), "Tesla T4"))
    assert found.plan.attention == "padded" and found.job.precision == "fp16"
    assert "7.5" in found.plan.reasons["attention"]


@settings(deadline=None, max_examples=40)
@given(free=st.floats(1.5, 80), more=st.floats(0, 60), spec=st.sampled_from([SMALL, SEVEN]), full=st.booleans())
def test_more_memory_never_costs_more(free: float, more: float, spec, full: bool) -> None:  # type: ignore[no-untyped-def]
    sections = {"adapter": None, "quantization": None} if full else {}
    less, much = (planned(gpu(size), spec, **sections) for size in (free, free + more))
    if less.fits:
        assert much.fits
        price = [cost(one.job, one.plan, one.rates) for one in (less, much)]
        assert price[1] <= price[0]


@settings(deadline=None, max_examples=40)
@given(
    free=st.floats(1.5, 80),
    spec=st.sampled_from([SMALL, SEVEN]),
    card=st.sampled_from([((9, 0), "H200"), ((7, 5), "Tesla T4"), None]),
    sections=st.sampled_from([
        {}, {"adapter": None, "quantization": None}, {"trainer": {"enable_gradient_checkpointing": True}},
        {"execution": {"weights": "quantised"}}, {"adapter": {"type": "lora", "r": 64, "dropout": 0}},
    ]),
)  # fmt: skip
def test_plans_that_are_passed_over_would_not_have_been_chosen(free: float, spec, card, sections) -> None:  # type: ignore[no-untyped-def]
    machine = replace(CPU, free_memory=int(free * GIB)) if card is None else gpu(free, *card)
    data = replace(DATA, shared_prefix=36)
    found = planned(machine, spec, data, **sections)
    config, job, room = declared(**sections), found.job, found.room
    start = planner._start(config, spec, job, machine, found.plan.device, BUILT)
    rates = rates_of(machine, found.plan.device, job.precision)
    every = []
    for plan, tokens in planner._candidates(config, job, start, BUILT, rates):
        plan = planner._with_recompute(config, job, plan, tokens, room)
        if room.holds(memory(job, plan, tokens), plan.device):
            every.append((cost(job, plan, rates), plan))
    assert found.fits == bool(every)
    if every:
        assert cost(job, found.plan, rates) <= min(price for price, _ in every) * (1 + 1e-12)  # a tie but for rounding


def test_a_plan_of_a_large_card_is_found_among_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits without further means is not tried with them: `--budget` plans dozens of times."""
    tried: list[Plan] = []
    monkeypatch.setattr(planner, "cost", lambda job, plan, rates: tried.append(plan) or cost(job, plan, rates))
    planned(gpu(140))
    means = {(plan.weights, plan.optimizer, plan.embeddings, plan.offload_checkpoints, plan.mlp_tile) for plan in tried}
    assert means == {("resident", "device", "device", False, 0)}


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 8192), min_size=1, max_size=60),
    free=st.floats(0.6, 40),
    batch=st.integers(1, 64),
    on_cpu=st.booleans(),
)
def test_one_row_always_fits_or_it_says_so(lengths: list[int], free: float, batch: int, on_cpu: bool) -> None:
    machine = replace(CPU, free_memory=int(free * GIB)) if on_cpu else gpu(free)
    data = DataStats(tuple(lengths), max(1, sum(lengths) // 3), "h")
    sections = {"trainer": {"batch_size": batch}}
    try:
        found = plan_for(declared(**sections), SMALL, data, machine, engine=BUILT)
    except TrainingError as error:
        fault = error.faults[0]
        assert fault.code == "training-no-memory" and fault.fix
        assert re.search(r"\d+\.\d GiB", fault.message) and re.search(r"\d+\.\d GiB", str(fault.allowed))
    else:
        assert found.plan.tokens_per_pass >= max(lengths)
        assert found.room.holds(found.memory, found.plan.device)


def test_what_does_not_fit_names_the_smallest_change_that_does() -> None:
    sections = {"adapter": None, "quantization": None}
    with pytest.raises(TrainingError, match=r"leanest plan needs \d+\.\d GiB of the GPU") as caught:
        plan_for(declared(**sections), SEVEN, DATA, gpu(23, (8, 6), "NVIDIA A10", host=400), engine=BUILT)
    assert "adapter: {type: lora}" in str(caught.value.faults[0].fix)
    long = DataStats((100_000, 200, 300), 1000, "h")
    with pytest.raises(TrainingError) as caught:
        plan_for(declared(), SEVEN, long, gpu(8, (8, 6), "RTX 3060", host=10), engine=BUILT)
    fix = str(caught.value.faults[0].fix)
    length = int(re.search(r"max_sequence_length: (\d+)", fix)[1])  # type: ignore[index]
    assert "cuts 1 of 3 rows" in fix
    cut = DataStats((length, 200, 300), 1000, "h")
    assert best(declared(), SEVEN, cut, gpu(8, (8, 6), "RTX 3060", host=10), engine=BUILT).fits


@pytest.mark.parametrize(("spec", "machine"), [(SMALL, gpu(140)), (SEVEN, gpu(15, (7, 5), "T4"))])
def test_the_leanest_plan_lacks_least_and_claims_no_room(spec, machine: Machine) -> None:  # type: ignore[no-untyped-def]
    """Also where it is the host that has too little: on the device it then takes no more than it has to."""
    short = planned(machine, spec, execution={"host_memory_limit": "1GiB"})
    least = planned(replace(machine, gpus=(replace(machine.gpus[0], free=GIB // 4),)), spec)
    assert not short.fits and not least.fits
    assert short.memory.host_total > short.room.host and short.memory.total < short.room.device
    assert not short.plan.graphs and short.plan.tokens_per_pass < short.job.most("decoder")
    assert least.room.device == 0
    for found in (short, least):
        said = " ".join(found.plan.reasons.values())
        assert "none fits" in said and not re.search("fits? in|fits? on|has room|longer than making", said)


def test_a_cpu_takes_passes_that_stay_in_its_cache() -> None:
    found = planned(CPU, SMALL, rows(64))
    assert found.plan.device == "cpu" and found.plan.attention == "padded"
    assert max(found.job.longest, 200) <= found.plan.tokens_per_pass <= 768 < found.job.most("decoder")


def test_the_tokens_of_a_pass_have_the_reason_that_keeps_them_from_being_more() -> None:
    """It was always "the largest pass that fits"."""
    whole = planned(gpu(140), trainer={"batch_size": 16}).plan
    assert "a whole step" in whole.reasons["tokens_per_pass"]
    slower = best(declared(trainer={"batch_size": 4096}), SMALL, rows(9000), gpu(139), engine=BUILT)
    assert "no less time" in slower.plan.reasons["tokens_per_pass"]
    capped = replace(slower.plan, tokens_per_pass=planner.MAX_TOKENS)
    assert planner._bound(slower.job, capped, slower.room) == "gain"
    tight = planned(gpu(5), trainer={"batch_size": 64}).plan
    assert "a larger pass does not fit" in tight.reasons["tokens_per_pass"]
    seen = set()
    for free in (6, 8, 12, 16, 24, 40, 80):  # each reason is held against the memory of the next larger pass
        found = planned(gpu(free), trainer={"batch_size": 64})
        most = found.job.most("decoder", found.plan.share_prefix)
        larger = [size for size in planner._cuts(found.job, "decoder", False) if size > found.plan.tokens_per_pass]
        if found.plan.tokens_per_pass >= most or not larger:
            continue
        tried = replace(found.plan, tokens_per_pass=min(larger))
        fits = found.room.holds(memory(found.job, tried, min(min(larger), most)), "cuda:0")
        seen.add(fits)
        assert ("larger passes would fit" in found.plan.reasons["tokens_per_pass"]) == fits
    assert False in seen


def test_long_rows_fit_a_small_card() -> None:
    data = DataStats((8192,) * 32, 32 * 4096, "h")
    found = planned(gpu(15, (8, 6), "RTX 3090"), data=data)
    assert found.fits and found.plan.tokens_per_pass == 8192 and found.plan.recompute_layers > 0


def test_what_the_engine_lacks_is_not_planned() -> None:
    plan = make_plan(declared(), replace(SEVEN, architecture="FalconMambaForCausalLM"), DATA, gpu(140), engine=BUILT)
    assert (plan.model, plan.attention, plan.weights) == ("generic", "padded", "quantised")
    assert "FalconMamba" in plan.reasons["model"]
    bare = replace(BUILT, weights=frozenset({"resident", "quantised"}), offload_checkpoints=False)
    for free in (3, 6, 12, 40):
        plan = best(declared(), SEVEN, DATA, gpu(free), engine=bare).plan
        assert plan.weights != "streamed" and not plan.offload_checkpoints
    dora = declared(adapter={"type": "lora", "use_dora": True})
    assert best(dora, SEVEN, DATA, gpu(80), engine=BUILT).plan.model == "generic"


def test_checkpointing_keeps_ludwigs_key() -> None:
    sections = {"trainer": {"batch_size": 16, "enable_gradient_checkpointing": True}}
    plan = planned(gpu(140), **sections).plan
    assert plan.recompute_layers == SEVEN.layers and plan.checkpointing


def test_a_written_false_recomputes_nothing_and_says_what_it_takes() -> None:
    """It acted as auto; a config that leaves it out is planned, also under Ludwig's defaults, where it is false."""
    never = {"trainer": {"batch_size": 16, "enable_gradient_checkpointing": False}}
    tight = gpu(6)
    assert planned(tight, trainer={"batch_size": 16}).plan.recompute_layers > 0
    found = planned(tight, **never)
    assert found.plan.recompute_layers == 0 and not found.plan.offload_checkpoints
    assert found.plan.reasons["recompute_layers"] == "trainer.enable_gradient_checkpointing is false"
    with pytest.raises(TrainingError) as caught:
        plan_for(declared(**never), SEVEN, rows(most=4096, median=2000), gpu(5), engine=BUILT)
    assert str(caught.value.faults[0].fix).startswith("trainer.enable_gradient_checkpointing: auto ")
    for pins in ({"recompute": "all"}, {"offload_checkpoints": True}):
        with pytest.raises(ConfigError, match=r"recomputes no layer|no checkpoints"):
            planned(gpu(80), execution=pins, **never)
    assert declared(defaults="ludwig").trainer.enable_gradient_checkpointing == "auto"


@pytest.mark.parametrize(
    ("pin", "value", "field", "want"),
    [
        ("model", "generic", "model", "generic"),
        ("tokens_per_pass", 600, "tokens_per_pass", 600),
        ("recompute", "all", "recompute_layers", 32),
        ("recompute", 5, "recompute_layers", 5),
        ("attention", "padded", "attention", "padded"),
        ("weights", "quantised", "weights", "quantised"),
        ("weights", "streamed", "weights", "streamed"),
        ("embeddings", "host", "embeddings", "host"),
        ("optimizer", "host", "optimizer", "host"),
        ("loss_chunk", 77, "loss_chunk", 77),
        ("mlp_tile", 256, "mlp_tile", 256),
        ("pad_to_multiple_of", 48, "pad_to_multiple_of", 48),
        ("device", "cpu", "device", "cpu"),
    ],
)
def test_every_pin_acts(pin: str, value: object, field: str, want: object) -> None:
    free, pinned = planned(gpu(140)).plan, planned(gpu(140), execution={pin: value}).plan
    assert getattr(pinned, field) == want != getattr(free, field)
    assert pinned.reasons.get(field, "set in execution:") == "set in execution:"


def test_the_pin_of_graphs_acts_either_way() -> None:
    for wanted in (True, False):
        assert planned(gpu(140), execution={"graphs": wanted}).plan.graphs is wanted


@pytest.mark.parametrize("graphs", [True, False])
def test_the_longer_a_run_the_less_padding(graphs: bool) -> None:
    """A further length costs once; what its padding saves, it saves in each step."""
    short, middle, long = (
        planned(gpu(140), data=rows(450), execution={"graphs": graphs}, trainer={"epochs": epochs, "batch_size": 16})
        for epochs in (1, 60, 20_000)
    )
    found = [one.plan.pad_to_multiple_of for one in (short, middle, long)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] == 8
    assert short.plan.reasons["pad_to_multiple_of"] != long.plan.reasons["pad_to_multiple_of"]


def test_passes_are_padded_as_planned() -> None:
    assert [padded(tokens, 128, True) for tokens in (1, 128, 4095, 8191, 8193)] == [128, 128, 4096, 8192, 8448]
    assert [padded(tokens, 8, True) for tokens in (1, 4097, 8193)] == [8, 4104, 8208]
    assert [padded(tokens, 64, False) for tokens in (1, 8193)] == [64, 8256]
    steps = ((100, 28), (60,), (64, 64))
    assert padding_of(steps, 128, 64, False) == (4 / 3, 2)
    assert padding_of(steps, 128, 128, True) == (68 / 3, 1)


def test_a_plan_from_before_padding_was_planned_pads_as_it_did() -> None:
    def recorded(**fields: object) -> Plan:
        value = asdict(Plan("cuda:0", 512, "decoder")) | fields
        del value["pad_to_multiple_of"]
        return Plan.from_json(value)

    assert recorded(graphs=True).pad_to_multiple_of == 128
    assert recorded().pad_to_multiple_of == 64
    assert recorded(device="cpu").pad_to_multiple_of == 32


def test_graphs_pay_where_starting_kernels_is_what_takes_time() -> None:
    """A small model on a fast card waits for the host; one step does not repay the graphs."""
    data = rows(2000)
    small = best(declared(), SMALL, data, gpu(140), engine=BUILT)
    assert small.plan.graphs and not small.plan.recompute_layers
    assert (
        small.speed.seconds
        < best(declared(execution={"graphs": False}), SMALL, data, gpu(140), engine=BUILT).speed.seconds
    )
    few = {"trainer": {"batch_size": 16, "train_steps": 1}}
    assert not best(declared(**few), SMALL, data, gpu(140), engine=BUILT).plan.graphs
    assert not best(declared(adapter=None, quantization=None), SMALL, data, gpu(140), engine=BUILT).plan.graphs


def test_long_rows_in_little_memory_go_tile_by_tile() -> None:
    """Where a row of 8,192 tokens does not fit otherwise; no tile is cut where there is room, or nothing to cut."""
    long = DataStats((8192,) * 32, 32 * 4096, "x")
    quiet = {"trainer": {"batch_size": 16, "eval_generation_rows": 0}}
    assert planned(gpu(140), data=long, **quiet).plan.mlp_tile == 0
    assert planned(gpu(6.1), **quiet).plan.mlp_tile == 0
    tiled = planned(gpu(6.1), data=long, execution={"weights": "quantised"}, **quiet)
    assert tiled.plan.mlp_tile == 1024 and tiled.fits
    assert not planned(gpu(6.1), data=long, execution={"weights": "quantised", "mlp_tile": 0}, **quiet).fits


def test_all_validation_rows_are_answered_in_a_plan_too() -> None:
    """A tenth validates, eight train."""
    every = {"trainer": {"batch_size": 16, "eval_generation_rows": None}}
    assert best(declared(**every), SMALL, rows(800), gpu(140), engine=BUILT).job.answers == 100


def test_tied_embeddings_cannot_wait_on_the_host() -> None:
    """The head needs the same table on the device: the pin would save nothing, and copy the table in every pass."""
    with pytest.raises(ConfigError, match="output head is the same table") as caught:
        planned(gpu(80), SMALL, execution={"embeddings": "host"})
    assert caught.value.faults[0].fix == "execution.embeddings: device"
    assert planned(gpu(80), SEVEN, execution={"embeddings": "host"}).plan.embeddings == "host"


def test_offloading_by_a_pin_alone_moves_what_all_layers_keep() -> None:
    """It made one layer's input wait on the host, and said that its activations would not fit."""
    plan = planned(gpu(140), SMALL, execution={"offload_checkpoints": True}).plan
    assert plan.offload_checkpoints and plan.recompute_layers == SMALL.layers and not plan.graphs
    assert "offload_checkpoints is set" in plan.reasons["recompute_layers"]
    some = planned(gpu(140), SMALL, execution={"offload_checkpoints": True, "recompute": 3}).plan
    assert some.recompute_layers == 3 and some.reasons["recompute_layers"] == "set in execution:"


def test_offloading_and_limits_act() -> None:
    plan = planned(gpu(140), execution={"offload_checkpoints": True, "recompute": "all"}).plan
    assert plan.offload_checkpoints and plan.recompute_layers == 32
    limited = planned(gpu(140), execution={"memory_limit": "12GiB"})
    assert limited.memory.total <= 12 * GIB < planned(gpu(140)).memory.total
    assert planned(gpu(3), execution={"host_memory_limit": "4GiB"}).fits is False
    assert planned(gpu(3)).fits


@pytest.mark.parametrize(
    ("pins", "machine", "says"),
    [
        ({"model": "decoder"}, gpu(80), "runs through transformers"),
        ({"attention": "flash"}, gpu(15, (7, 5), "Tesla T4"), "compute capability 8.0"),
        ({"attention": "flash"}, CPU, "CUDA"),
        ({"tokens_per_pass": 100}, gpu(80), "longest row has 501"),
        ({"recompute": 99}, gpu(80), "32 layers"),
        ({"weights": "streamed"}, CPU, "CUDA GPU"),
        ({"embeddings": "host", "model": "generic"}, gpu(80), "Luthier's own decoder"),
        ({"recompute": 3, "model": "generic"}, gpu(80), "all layers or none"),
        ({"offload_checkpoints": True, "recompute": "none"}, gpu(80), "no checkpoints"),
        ({"share_prefix": True, "graphs": True}, gpu(80), "a graph's keys are its tokens"),
        ({"graphs": True, "recompute": "all"}, gpu(80), "recompute nothing"),
        ({"graphs": True, "mlp_tile": 512}, gpu(80), "recomputes the feed-forward"),
        ({"graphs": True, "offload_checkpoints": True}, gpu(80), "no checkpoints to offload"),
        ({"graphs": True}, gpu(15, (7, 5), "Tesla T4"), "flash attention"),
        ({"device": "cuda"}, CPU, "no cuda device"),
    ],
)
def test_a_pin_that_cannot_work_is_refused(pins: dict[str, object], machine: Machine, says: str) -> None:
    spec = replace(SEVEN, architecture="OtherForCausalLM") if pins == {"model": "decoder"} else SEVEN
    with pytest.raises(ConfigError, match=says) as caught:
        planned(machine, spec, execution=pins)
    assert caught.value.code == "config-conflict" and str(caught.value.faults[0].where).startswith("execution.")


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))])
def test_bf16_is_refused_where_the_card_has_none(name: str, capability: tuple[int, int]) -> None:
    asked = {"trainer": {"batch_size": 1, "precision": "bf16"}}
    with pytest.raises(ConfigError, match=rf"needs compute capability 8.0; {name} has 7") as caught:
        planned(gpu(15, capability, name), SMALL, **asked)
    assert caught.value.faults[0].where == "trainer.precision"
    assert planned(gpu(15, capability, name), SMALL).job.precision == "fp16"
    assert planned(gpu(15, (8, 6), "NVIDIA A10"), SMALL, **asked).job.precision == "bf16"
    assert planned(gpu(15, capability, name), SMALL, execution={"device": "cpu"}, **asked).plan.device == "cpu"


@pytest.mark.parametrize("pin", ["mlp_tile", "loss_chunk"])
def test_tiny_products_are_predicted_to_be_slow(pin: str) -> None:
    seconds = [planned(gpu(80), execution={pin: size, "graphs": False}).speed.seconds for size in (1, 64, 1024)]
    assert seconds[0] > 2 * seconds[1] > 2 * seconds[2]


def test_quantising_is_never_a_plans_choice() -> None:
    with pytest.raises(ConfigError, match="would change what is learned"):
        planned(gpu(80), quantization=None, execution={"weights": "quantised"})
    assert planned(gpu(80), quantization=None).plan.weights == "resident"


def test_all_pins_that_cannot_work_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(CPU, SMALL, execution={"attention": "flash", "weights": "streamed", "tokens_per_pass": 1})
    assert len(caught.value.faults) == 3


def test_the_gpu_with_most_free_memory_is_used() -> None:
    two = Machine(8, 64 * GIB, 60 * GIB, (Gpu("a", 8 * GIB, GIB), Gpu("b", 24 * GIB, 23 * GIB, (8, 6))))
    assert device_of(two) == "cuda:1" and planned(two).plan.device == "cuda:1"
    assert device_of(Machine(8, GIB, GIB, (Gpu("m", GIB, GIB, None, "mps"),))) == "mps"


def test_the_same_inputs_give_the_same_plan_and_a_probe_changes_times_alone() -> None:
    one = plan_for(declared(), SMALL, DATA, CPU, engine=BUILT)
    two = plan_for(declared(), SMALL, DATA, CPU, engine=BUILT, measured=(2e12, 1e12))
    assert one.plan == two.plan and two.speed.seconds < one.speed.seconds


def test_a_recorded_plan_is_read_back() -> None:
    plan = planned(gpu(5)).plan
    assert Plan.from_json(asdict(plan) | {"of a later version": 1}) == plan
    old = Plan.from_json({"device": "cpu", "tokens_per_pass": 512, "checkpointing": True, "reasons": {}})
    assert old.checkpointing and old.tokens_per_pass == 512


def test_graphs_take_memory_of_their_own() -> None:
    """What their pool loses, and what each rounded length reads and writes."""
    data = rows(2000)
    with_graphs = best(declared(execution={"graphs": True}), SMALL, data, gpu(140), engine=BUILT)
    eager = forecast(
        declared(execution={"graphs": True}), SMALL, data, gpu(140), replace(with_graphs.plan, graphs=False)
    )
    assert with_graphs.memory.device["graphs"] > 0 == eager.memory.device["graphs"]
    assert with_graphs.memory.peak - eager.memory.peak == with_graphs.memory.device["graphs"]


def test_an_update_in_one_kernel_needs_no_buffers() -> None:
    full = {"adapter": None, "quantization": None}
    moments = {
        kind: planned(gpu(140), trainer={"optimizer": {"type": kind}}, **full).memory.moments["update"]
        for kind in ("adamw", "lion")
    }  # fmt: skip
    assert moments["lion"] == 2 * moments["adamw"]


def test_graphs_are_no_larger_than_any_pass_that_comes() -> None:
    pinned = {"graphs": True, "tokens_per_pass": 30_000}
    found = best(declared(execution=pinned), SMALL, rows(2000), gpu(140), engine=BUILT)
    most = found.job.most("decoder")
    assert most <= found.plan.tokens_per_pass < most + 64
    eager = best(declared(execution=pinned | {"graphs": False}), SMALL, rows(2000), gpu(140), engine=BUILT)
    assert eager.plan.tokens_per_pass == 30_000


def test_declared_recomputing_of_all_layers_and_a_pin_of_some_contradict() -> None:
    declared_all = {"trainer": {"batch_size": 1, "enable_gradient_checkpointing": True}}
    with pytest.raises(ConfigError, match="which recomputes all layers"):
        planned(gpu(80), execution={"recompute": 3}, **declared_all)
    assert planned(gpu(80), execution={"recompute": "all"}, **declared_all).plan.recompute_layers == 32


def test_excluded_modules_are_not_counted() -> None:
    shape, mlp = Shape.of(SMALL), ["gate_proj", "up_proj", "down_proj"]
    every, some, named = (
        trained(declared(adapter={"type": "lora", "r": 8} | more).adapter, shape)
        for more in ({}, {"exclude_modules": mlp}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    )
    assert some == named != every


def test_a_start_that_is_taken_out_of_the_base_has_a_frozen_half() -> None:
    shape = Shape.of(SMALL)
    drawn, taken, eva = (
        trained(declared(adapter={"type": "lora", "r": 8, "init_lora_weights": start}).adapter, shape)
        for start in ("default", "pissa", "eva")
    )
    assert eva == drawn and (drawn.frozen, taken.frozen) == (0, drawn.weights)
    assert taken.weights == drawn.weights and taken.ranks == 2 * drawn.ranks
