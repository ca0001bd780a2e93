"""Specs refuse what is wrong and say where; equal values have equal identities."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipetune.bench.spec import (
    Arrivals,
    EffectivePlan,
    EngineSettings,
    Goodput,
    Lane,
    ModelSpec,
    Plan,
    Protocol,
    RunSpec,
    StagePlan,
    Workload,
    device_index,
    device_kind,
    devices_here,
    parse_devices,
)

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


def devices(num: int) -> tuple[str, ...]:
    return tuple(f"cpu:{index}" for index in range(num))


def stage(first_layer: int, end_layer: int, device: str = "cpu:0", **more: Any) -> StagePlan:
    return StagePlan(device=device, first_layer=first_layer, end_layer=end_layer, **more)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        *(("half", "float16"), ("FP16", "float16"), ("bf16", "bfloat16"), ("float", "float32"), ("fp32", "float32")),
        *(("torch.bfloat16", "bfloat16"), (torch.float16, "float16"), ("auto", "auto")),
    ],
)
def test_dtypes_are_known_by_the_names_that_others_give_them(given: Any, dtype: str) -> None:
    assert ModelSpec.model_validate({"name": "m", "dtype": given}).dtype == dtype
    with pytest.raises(ValidationError, match="storage_dtype"):
        ModelSpec.model_validate({"name": "m", "storage_dtype": "auto"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu:0", ("cpu:0",)),
        ("cpu:0-1", ("cpu:0", "cpu:1")),
        ("cuda:0,cuda:2", ("cuda:0", "cuda:2")),
        (" cuda:1-2 , cpu:0 ", ("cuda:1", "cuda:2", "cpu:0")),
        ("cuda:00", ("cuda:0",)),
        ("cuda:0,cuda:0", ("cuda:0", "cuda:0")),
    ],
)
def test_parse_devices(text: str, expected: tuple[str, ...]) -> None:
    assert parse_devices(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a device; write cpu:0-1"),
        ("gpu:0", "'gpu:0' is not a device"),
        ("cuda:0,", "'' is not a device"),
        ("cuda", "'cuda' is not a device"),
        ("cuda:-1", "'cuda:-1' is not a device"),
        ("cuda:3-1", "'cuda:3-1' runs backwards; write cuda:1-3"),
        ("cpu:0-1,cpu:1", "cpu:1 named twice"),
        ("host1/cpu:0,host0/cpu:0", "hosts are host1, host0; name every device's host, from host0 on in order"),
        ("host0/cpu:0,host2/cpu:0", "hosts are host0, host2; name every device's host, from host0 on in order"),
        ("host0/cpu:0,cpu:1", "hosts are host0, none; name every device's host"),
    ],
)
def test_parse_devices_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_devices(text)


def test_here_are_the_devices_of_the_host_that_leads() -> None:
    assert devices_here(parse_devices("cpu:0-1")) == ("cpu:0", "cpu:1")
    assert devices_here(parse_devices("host0/cuda:3,host1/cuda:0-1")) == ("cuda:3",)
    assert devices_here(("host1/cuda:0",)) == ()


@given(kind=st.sampled_from(["cpu", "cuda"]), first=st.integers(0, 50), num=st.integers(1, 20))
def test_device_ranges_name_each_device_once(kind: str, first: int, num: int) -> None:
    found = parse_devices(f"{kind}:{first}-{first + num - 1}")
    assert [device_kind(device) for device in found] == [kind] * num
    assert [device_index(device) for device in found] == list(range(first, first + num))


@pytest.mark.parametrize("device", ["cuda", "cuda:", "cuda:01", "cpu:00", "tpu:0", "cuda:0 ", "cuda:0-1", "cuda:١"])
def test_a_stage_takes_only_the_one_spelling_of_a_device(device: str) -> None:
    with pytest.raises(ValidationError, match="neither cpu:N nor cuda:N"):
        stage(0, 1, device)


@given(counts=COUNTS, micro_batch_size=st.integers(1, 64))
def test_layer_counts_round_trip(counts: tuple[int, ...], micro_batch_size: int) -> None:
    plan = Plan.from_layer_counts(counts, devices(len(counts)), micro_batch_size)
    assert plan.layer_counts == counts
    assert plan.num_layers == sum(counts)
    assert plan.prefill_size == micro_batch_size
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_stages_may_be_fewer_than_devices_but_not_more() -> None:
    assert len(Plan.from_layer_counts((3, 3), devices(4), 1).stages) == 2
    with pytest.raises(ValueError, match="3 stages need as many devices; given are 2"):
        Plan.from_layer_counts((1, 1, 1), devices(2), 1)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((stage(1, 4),), "plan.stages[0]: layer 0 is missing before 1"),
        ((stage(0, 15), stage(16, 30, "cpu:1")), "plan.stages[1]: layer 15 is missing before 16"),
        ((stage(0, 10), stage(14, 30, "cpu:1")), "plan.stages[1]: layer 10-13 is missing before 14"),
        ((stage(0, 15), stage(14, 30, "cpu:1")), "plan.stages[1]: layer 14 is given twice"),
        ((stage(0, 15), stage(15, 30)), "cpu:0 would hold two stages; give each its own CPU worker"),
    ],
)
def test_a_plan_names_the_layer_that_is_wrong(stages: tuple[StagePlan, ...], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        Plan(stages=stages, micro_batch_size=1)


@given(counts=st.lists(st.integers(2, 9), min_size=2, max_size=5).map(tuple), data=st.data())
def test_any_gap_or_overlap_is_refused(counts: tuple[int, ...], data: st.DataObject) -> None:
    good = Plan.from_layer_counts(counts, devices(len(counts)), 1)
    index = data.draw(st.integers(1, len(counts) - 1))
    shift = data.draw(st.sampled_from([-1, 1]))
    moved = good.stages[index].model_copy(update={"first_layer": good.stages[index].first_layer + shift})
    bad = (*good.stages[:index], moved, *good.stages[index + 1 :])
    layer = moved.first_layer if shift < 0 else moved.first_layer - 1
    problem = "given twice" if shift < 0 else "missing"
    with pytest.raises(ValidationError, match=rf"plan\.stages\[{index}\]: layer {layer} is {problem}"):
        Plan(stages=bad, micro_batch_size=1)


def test_stages_may_share_a_gpu() -> None:
    plan = Plan(stages=(stage(0, 3, "cuda:0"), stage(3, 6, "cuda:0")), micro_batch_size=1)
    assert EffectivePlan(plan=plan, in_flight=1).key == "cuda:0[0:3],cuda:0[3:6] mb=1 prefill=1 in_flight=1"


def test_empty_stages_and_plans_are_refused() -> None:
    with pytest.raises(ValidationError, match="stage on cpu:0 holds no layer: first_layer=3, end_layer=3"):
        stage(3, 3)
    with pytest.raises(ValidationError, match="at least 1 item"):
        Plan(stages=(), micro_batch_size=1)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_memory_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValidationError, match="memory_fraction"):
        stage(0, 1, memory_fraction=fraction)


@pytest.mark.parametrize(
    ("given", "count"), [("600MiB", 600 * 2**20), ("1.5 GiB", 3 * 2**29), ("2gb", 2 * 10**9), (7, 7), ("7", 7)]
)
def test_a_cap_in_bytes_has_a_unit(given: str | int, count: int) -> None:
    assert stage(0, 1, max_memory_bytes=given).max_memory_bytes == count


@pytest.mark.parametrize("given", ["much", "-1MiB", "0", "600MiBs"])
def test_what_is_no_amount_of_memory_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match=r"600MiB|greater than or equal to 1"):
        stage(0, 1, max_memory_bytes=given)


def test_the_lesser_cap_counts() -> None:
    both = stage(0, 1, memory_fraction=0.5, max_memory_bytes=100)
    assert [both.cap_bytes(size) for size in (100, 200, 400)] == [50, 100, 100]
    assert stage(0, 1, memory_fraction=1.0).cap_bytes(400) == 400


def test_prefill_pieces_fit_their_micro_batch() -> None:
    with pytest.raises(ValidationError, match="prefill_micro_batch_size=8 is larger than micro_batch_size=4"):
        Plan(stages=(stage(0, 1),), micro_batch_size=4, prefill_micro_batch_size=8)


def test_a_plan_describes_itself() -> None:
    plan = Plan.from_layer_counts((17, 13), devices(2), 16)
    assert plan.describe() == "17+13 · micro-batch 16"
    swapped = Plan.from_layer_counts((17, 13), ("cpu:1", "cpu:0"), 16)
    assert swapped.describe() == "17+13 on cpu:1,cpu:0 · micro-batch 16"
    apart = Plan.from_layer_counts((17, 13), ("cuda:0", "cuda:2", "cuda:1", "cuda:3"), 16, replicas=2)
    assert apart.describe() == "2 × 17+13 on cuda:0,cuda:2|cuda:1,cuda:3 · micro-batch 16"
    pieces = Plan.from_layer_counts((17, 13), devices(2), 16, prefill_micro_batch_size=8)
    assert pieces.describe() == "17+13 · micro-batch 16 (prefill 8)"


_PLACES = st.lists(
    st.sampled_from(("cuda:0", "cuda:1", "cuda:2", "cpu:0", "cpu:1")), min_size=4, max_size=4, unique=True
)
_PLANS = st.builds(
    Plan.from_layer_counts,
    st.sampled_from([(3,), (1, 2), (2, 1)]),
    st.one_of(_PLACES.map(tuple), st.just(("cuda:0",) * 4)),
    st.sampled_from([4, 8]),
    prefill_micro_batch_size=st.sampled_from([None, 2, 4]),
    prefill_chunk_size=st.sampled_from([None, 16]),
    replicas=st.sampled_from([1, 2]),
    compile=st.booleans(),
    memory_fraction=st.sampled_from([0.5, 0.9]),
).map(lambda plan: plan.model_copy(update={"cuda_graphs": False}) if plan.micro_batch_size == 8 else plan)


@given(plan=_PLANS, other=_PLANS, limit=st.sampled_from([None, 1, 2]))
def test_plans_that_differ_are_never_described_by_one_line(plan: Plan, other: Plan, limit: int | None) -> None:
    other = other.model_copy(update={"max_in_flight": limit})

    def identity(plan: Plan) -> tuple[object, ...]:
        key = EffectivePlan(plan=plan, in_flight=1).key
        return key, plan.max_in_flight, [stage.memory_fraction for stage in plan.stages]

    # A line does not say whether `cpu:0` or `cuda:0` is the first of the devices.
    lines = [(device_kind(one.devices[0]), one.describe()) for one in (plan, other)]
    assert (lines[0] == lines[1]) == (identity(plan) == identity(other))


def test_caps_that_resolve_alike_are_one_plan() -> None:
    loose = Plan.from_layer_counts((2, 2), devices(2), 4, memory_fraction=0.9)
    tight = Plan.from_layer_counts((2, 2), devices(2), 4, memory_fraction=0.5)
    spelled = Plan.from_layer_counts((2, 2), devices(2), 4, prefill_micro_batch_size=4)
    keys = {EffectivePlan(plan=plan, in_flight=3).key for plan in (loose, tight, spelled)}
    assert keys == {"cpu:0[0:2],cpu:1[2:4] mb=4 prefill=4 in_flight=3"}
    assert EffectivePlan(plan=tight, in_flight=2).key not in keys


@given(counts=COUNTS, replicas=st.integers(1, 3), data=st.data())
def test_a_plan_without_a_device_is_a_plan_of_the_same_model(
    counts: tuple[int, ...], replicas: int, data: st.DataObject
) -> None:
    plan = Plan.from_layer_counts(counts, devices(len(counts) * replicas), 4, replicas=replicas)
    device = data.draw(st.sampled_from(plan.devices))
    left = plan.without(device)
    if len(plan.devices) == 1:
        assert left is None
        return
    assert left is not None
    left = Plan.model_validate(left.model_dump())
    assert set(left.devices) <= set(plan.devices) - {device}
    assert sum(left.layer_counts) == sum(counts)
    assert left.replicas == max(1, replicas - 1)
    assert left.without(device) == left


@given(counts=COUNTS, other=COUNTS, sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_plans_that_run_differently_have_different_keys(
    counts: tuple[int, ...], other: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    keys = [
        EffectivePlan(plan=Plan.from_layer_counts(each, devices(len(each)), size), in_flight=1).key
        for each, size in zip((counts, other), sizes, strict=True)
    ]
    assert (keys[0] == keys[1]) == ((counts, sizes[0]) == (other, sizes[1]))


def test_digest_sees_every_field_and_nothing_else() -> None:
    base = Workload(num_prompts=4)
    assert base.digest() == Workload.model_validate(base.model_dump()).digest()
    changed = [base.model_copy(update={name: value}) for name, value in {"seed": 1, "input_len": 65}.items()]
    assert len({base.digest(), *(workload.digest() for workload in changed)}) == 3


def test_values_are_frozen_and_closed() -> None:
    model = ModelSpec(name="gpt2")
    with pytest.raises(ValidationError, match="frozen"):
        model.name = "other"
    with pytest.raises(ValidationError, match="dtypo"):
        ModelSpec.model_validate({"name": "gpt2", "dtypo": "float32"})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Workload, "num_prompts", 0),
        (Workload, "output_len", 0),
        (Workload, "random_range_ratio", 1.0),
        (Protocol, "num_iters", 0),
        (Protocol, "timeout_s", 0.0),
        (Protocol, "timeout_s", float("inf")),
    ],
)
def test_numbers_out_of_range_are_refused(kind: type[Workload] | type[Protocol], field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        kind.model_validate({field: value})


def test_a_run_spec_round_trips() -> None:
    spec = RunSpec(
        model=ModelSpec(name="examples/dummy-llama-12l", load_format="dummy", seed=3),
        workload=Workload(prompts_file="prompts.jsonl", prompts_sha256="ab"),
        plan=Plan.from_layer_counts((7, 5), devices(2), 8, prefill_micro_batch_size=4),
    )
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_limits_of_a_good_request_are_written_as_vllm_writes_them() -> None:
    for wanted in ("ttft:500 tpot:50", "ttft:500,tpot:50", ["ttft:500", "tpot:50"], {"ttft": 500, "tpot": 50}):
        assert Workload.model_validate({"goodput": wanted}).goodput == Goodput(ttft=500, tpot=50)
    text = Workload(goodput=Goodput(ttft=500, tpot=50)).model_dump_json()
    with pytest.raises(ValueError, match=r"workload\.arrivals: texts are scored in batches"):
        Workload(kind="score", arrivals=Arrivals(request_rate=1.0))
    # Records are read strictly.
    assert Workload.model_validate_json(text, strict=True).goodput == Goodput(ttft=500, tpot=50)
    assert '"ttft:500 tpot:50"' in text
    assert Workload.model_validate_json(text).goodput == Goodput(ttft=500, tpot=50)


@pytest.mark.parametrize(
    "given", ["itl:5", "ttft", "ttft:x", "ttft:-1", "ttft:0", "ttft:nan", "ttft:inf", "", [], "ttft:1 ttft:2"]
)
def test_limits_that_say_nothing_are_refused(given: object) -> None:
    with pytest.raises(ValueError, match="as in "):
        Workload.model_validate({"goodput": given})


def test_output_lengths_are_spread_and_the_same_for_a_seed() -> None:
    workload = Workload(num_prompts=200, output_len=10, random_output_range_ratio=0.5)
    lens = workload.generated_lens
    assert (min(lens), max(lens)) == (5, 15)
    assert lens == workload.generated_lens
    assert lens != workload.model_copy(update={"seed": 1}).generated_lens
    assert workload.generated_len == 15
    assert Workload(num_prompts=3, output_len=4).unlike_lens is None
    assert Workload(num_prompts=2, kind="score", random_output_range_ratio=0.5).generated_lens == (0, 0)
    with pytest.raises(ValueError, match="output_lens: 1 of 2 prompts"):
        Workload(num_prompts=2, output_lens=(4,))


def engine_plan(**settings: Any) -> Plan:
    plan = Plan.from_layer_counts((3, 3), ("cpu:0", "cpu:2"), 1)
    return Plan.model_validate(plan.model_dump() | {"engine": settings})


def test_an_engines_settings_are_part_of_the_key_and_of_nothing_where_there_is_none() -> None:
    plan = Plan.from_layer_counts((3, 3), ("cpu:0", "cpu:1"), 2)
    assert plan.digest() == "3b79ce0591f12edd"
    assert EffectivePlan(plan=plan, in_flight=2).key == "cpu:0[0:3],cpu:1[3:6] mb=2 prefill=2 in_flight=2"
    varied: list[dict[str, Any]] = [
        {},
        {"max_num_batched_tokens": 256},
        {"max_num_seqs": 64},
        {"kv_cache_memory_bytes": "256MiB"},
        {"kv_cache_memory_bytes": "255.5MiB"},
        {"enforce_eager": True},
        {"tensor_parallel_size": 2},
    ]
    plans = [engine_plan(**settings) for settings in varied]
    assert len({EffectivePlan(plan=one, in_flight=2).key for one in plans}) == len(varied)
    assert len({one.describe() for one in plans}) == len({one.digest() for one in plans}) == len(varied)
    all_of_them = engine_plan(**{name: value for settings in varied for name, value in settings.items()})
    assert all_of_them.describe() == "3+3 on cpu:0,cpu:2 · vllm · budget 256 · seqs 64 · KV 255.5MiB · TP 2 · eager"
    assert all_of_them.shards("cpu:2") == ("cpu:2", "cpu:3")


def test_without_a_size_of_its_own_the_kv_cache_is_what_the_caps_leave() -> None:
    keys = []
    for kv in (None, "64MiB"):
        plan = engine_plan(kv_cache_memory_bytes=kv)
        tight = tuple(stage.model_copy(update={"memory_fraction": 0.5}) for stage in plan.stages)
        both = (plan, plan.model_copy(update={"stages": tight}))
        keys.append({EffectivePlan(plan=one, in_flight=2).key for one in both})
    assert list(map(len, keys)) == [2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 4}, r"plan\.micro_batch_size: vllm forms its batches by itself"),
        ({"prefill_chunk_size": 8}, r"plan\.prefill_chunk_size: vllm forms"),
        ({"compile": True}, r"plan\.compile: vllm forms"),
        ({"engine": {"tensor_parallel_size": 3}}, "cpu:2 would hold two shards"),
        ({"engine": {"max_num_batched_tokens": 8, "max_num_seqs": 9}}, "must be at least max_num_seqs=9"),
    ],
)
def test_what_an_engine_has_no_use_for_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Plan.model_validate(engine_plan().model_dump() | changes)


def test_other_versions_read_plans_of_our_own_runtime() -> None:
    plan = Plan.from_layer_counts((3, 3), ("cpu:0", "cpu:1"), 2)
    assert "engine" not in plan.model_dump_json()
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    other = engine_plan(max_num_seqs=4)
    assert Plan.model_validate_json(other.model_dump_json()) == other


def test_a_plan_without_lanes_is_what_it_was_and_one_with_them_another() -> None:
    plan = Plan.from_layer_counts((2, 4), devices(2), 4)
    one = Plan.model_validate({**plan.model_dump(), "lanes": [{}]})
    assert one == plan
    assert "lanes" not in one.model_dump()
    lanes = (Lane(up_to_tokens=64, weight=4), Lane(prefill_chunk_size=32, prefills_per_decode=1))
    laned = Plan.model_validate({**plan.model_dump(), "lanes": lanes})
    assert Plan.model_validate_json(laned.model_dump_json()) == laned
    keys = [EffectivePlan(plan=each, in_flight=2).key for each in (plan, laned)]
    assert keys[1].removeprefix(keys[0]) == " lanes_≤64_weight_4,_others_chunk_32_prefills_a_step_1"
    assert len({plan.digest(), one.digest(), laned.digest()}) == 2
    assert laned.describe() == "2+4 · micro-batch 4 · lanes ≤64 weight 4, others chunk 32 prefills a step 1"
    assert [laned.lane_of(length) for length in (1, 64, 65)] == [lanes[0], *lanes]
    assert plan.lane_of(65) == Lane()
    steady = plan.model_copy(update={"lanes": (Lane(prefills_per_decode=1),)})
    assert steady.describe() == "2+4 · micro-batch 4 · prefills a step 1"


@pytest.mark.parametrize("limits", [(64,), (None, None), (None, 64), (64, 32, None), (32, 32, None)])
def test_lanes_rise_and_the_last_one_takes_the_rest(limits: tuple[int | None, ...]) -> None:
    plan = Plan.from_layer_counts((2, 4), devices(2), 4)
    with pytest.raises(ValidationError, match=r"plan\.lanes: up_to_tokens must rise"):
        Plan.model_validate({**plan.model_dump(), "lanes": [{"up_to_tokens": limit} for limit in limits]})


def test_another_engine_has_no_lanes() -> None:
    plan = Plan.from_layer_counts((2, 4), ("cuda:0", "cuda:1"), 1)
    with pytest.raises(ValidationError, match=r"plan\.lanes: vllm forms its batches by itself"):
        Plan.model_validate({**plan.model_dump(), "engine": EngineSettings(), "lanes": [Lane(weight=2)]})
