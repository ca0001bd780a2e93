"""What fits under a cap: exact at the boundary, never more under a smaller cap; refusals name stage and setting."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import PlanError
from pipetune.bench.memory import (
    CPU_WORKSPACE_BYTES,
    GRAPHS_WORKSPACE_BYTES,
    LayerShape,
    ModelShape,
    TaskBytes,
    check_plan,
    gpu_workspace_bytes,
    resolve,
    resolve_slots,
    stage_bytes,
)
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.spec import EffectivePlan, Lane, Plan

MIB = 2**20


def shape(
    num_layers: int = 6, *, tied: bool = False, kv_bytes_per_token: int = 1024, forbidden_cuts: tuple[int, ...] = ()
) -> ModelShape:
    layer = LayerShape(weight_bytes=MIB, active_params=MIB // 4, kv_bytes_per_token=kv_bytes_per_token)
    return ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=num_layers * MIB // 4,
        layers_prefix="model.layers",
        first_modules=("model.embed_tokens",),
        last_modules=("model.norm", "lm_head"),
        embedding_bytes=3 * MIB,
        head_bytes=0 if tied else 3 * MIB,
        other_bytes=4096,
        tied=tied,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=512,
        dtype_bytes=4,
        layers=(layer,) * num_layers,
        forbidden_cuts=forbidden_cuts,
    )


def plan(*counts: int, micro_batch_size: int = 2, **more: float | int | None) -> Plan:
    devices = tuple(f"cpu:{index}" for index in range(len(counts)))
    return Plan.from_layer_counts(counts, devices, micro_batch_size, **more)  # type: ignore[arg-type]


def resolved(
    model: ModelShape, wanted: Plan, device_bytes: int | dict[str, int], *, num_prompts: int = 16
) -> EffectivePlan | Failure:
    if isinstance(device_bytes, int):
        device_bytes = {stage.device: device_bytes for stage in wanted.stages}
    return resolve(model, wanted, num_prompts=num_prompts, prompt_len=32, output_len=8, device_bytes=device_bytes)


def in_flight(outcome: EffectivePlan | Failure) -> int:
    """0 for a refusal."""
    return 0 if isinstance(outcome, Failure) else outcome.in_flight


def test_weights_stand_where_the_modules_do() -> None:
    def weights(model: ModelShape, *counts: int, packed: bool = True) -> list[int]:
        wanted = plan(*counts).model_copy(update={"packed_weights": packed})
        return [
            stage_bytes(model, wanted, index, prompt_len=32, output_len=8).weights - model.other_bytes
            for index in range(len(counts))
        ]

    assert weights(shape(), 2, 3, 1) == [5 * MIB, 3 * MIB, 4 * MIB]
    assert weights(shape(tied=True), 2, 3, 1) == [5 * MIB, 3 * MIB, 4 * MIB], "a tied embedding stands on both ends"
    assert weights(shape(), 6) == [12 * MIB]
    assert weights(shape(tied=True), 6) == [12 * MIB], "a packed head lies beside the embedding"
    assert weights(shape(tied=True), 6, packed=False) == [9 * MIB], "and once where the ends meet"


@given(micro_batch_size=st.integers(1, 16), prompt_len=st.integers(1, 100), output_len=st.integers(1, 100))
def test_a_slot_holds_every_position_of_every_row(micro_batch_size: int, prompt_len: int, output_len: int) -> None:
    wanted = plan(2, 4, micro_batch_size=micro_batch_size)
    slots = [
        stage_bytes(shape(), wanted, index, prompt_len=prompt_len, output_len=output_len).kv_per_slot
        for index in range(2)
    ]
    assert slots == [layers * 1024 * micro_batch_size * (prompt_len + output_len) for layers in (2, 4)]


def test_states_take_room_by_the_row_and_not_by_the_token() -> None:
    model = shape()
    recurrent = model.model_copy(
        update={"layers": tuple(layer.model_copy(update={"state_bytes": 512}) for layer in model.layers)}
    )
    for prompt_len in (16, 64):
        plain, kept = (
            stage_bytes(one, plan(2, 4, micro_batch_size=3), 1, prompt_len=prompt_len, output_len=8).kv_per_slot
            for one in (model, recurrent)
        )
        assert kept - plain == 3 * 4 * 512


@pytest.mark.parametrize(
    "changes", [{"message_bytes": 4 * 64 * 4}, {"eager_attention": True}, {"dtype_bytes": 2, "storage_bytes": 4}]
)
def test_what_a_family_needs_beside_is_counted(changes: dict[str, int | bool]) -> None:
    model = shape()
    wider = model.model_copy(update=changes)
    wanted = plan(3, 3).model_copy(update={"packed_weights": False})
    plain, more = (stage_bytes(one, wanted, 1, prompt_len=256, output_len=8).activations for one in (model, wider))
    if "dtype_bytes" in changes:
        narrow = model.model_copy(update={"dtype_bytes": 2})
        plain = stage_bytes(narrow, wanted, 1, prompt_len=256, output_len=8).activations
    assert more > plain


def test_a_cpu_worker_keeps_more_than_its_tensors() -> None:
    on_cpu, on_gpu = (
        stage_bytes(shape(), Plan.from_layer_counts((6,), (device,), 2), 0, prompt_len=32, output_len=16).activations
        for device in ("cpu:0", "cuda:0")
    )
    assert on_cpu - CPU_WORKSPACE_BYTES >= on_gpu - gpu_workspace_bytes(Plan.from_layer_counts((6,), ("cuda:0",), 2))


MEASURED = TaskBytes(
    prompt=((512, 1000, 1400), (2048, 2000, 2400), (8192, 6000, 6400)),
    chunk=((512, 900, 1300), (2048, 1900, 2300), (8192, 5900, 6300)),
    decode=((512, 1100, 3000), (2048, 1200, 3100), (8192, 1600, 3500)),
)


@pytest.mark.parametrize(
    ("index", "prompt_len", "chunk", "tokens_bytes"),
    [
        (0, 512, None, 2 * 512 * 1000),
        (0, 256, None, 2 * 256 * 1000),
        (0, 1280, None, 2 * 1280 * 1500),
        (0, 16384, None, 2 * 16384 * (6000 + 8192 * 4000 // 6144 + 1)),
        (1, 2048, None, 2 * 2048 * 2400),
        (0, 2048, 512, 2 * 512 * 1900 + 2 * 1200),
    ],
)
def test_a_gpus_tasks_take_what_they_took_without_memory(
    index: int, prompt_len: int, chunk: int | None, tokens_bytes: int
) -> None:
    model = shape().model_copy(update={"task_bytes": MEASURED})
    wanted = Plan.from_layer_counts((3, 3), ("cuda:0", "cuda:1"), 2, prefill_chunk_size=chunk)
    need = stage_bytes(model, wanted, index, prompt_len=prompt_len, output_len=8).activations
    rings = 2 * 2 * min(chunk or prompt_len, prompt_len) * model.crossing_bytes
    logits = 2 * 2 * model.vocab_size * 4 if index else 0
    assert need == gpu_workspace_bytes(wanted) + tokens_bytes + rings + logits
    eager = wanted.model_copy(update={"cuda_graphs": False})
    without = stage_bytes(model, eager, index, prompt_len=prompt_len, output_len=8).activations
    assert need - without == GRAPHS_WORKSPACE_BYTES
    on_cpu = plan(3, 3, prefill_chunk_size=chunk)
    unlike = [stage_bytes(one, on_cpu, index, prompt_len=prompt_len, output_len=8) for one in (shape(), model)]
    assert unlike[0] == unlike[1]


@given(prefill=st.integers(1, 16))
def test_smaller_prefill_pieces_never_need_more(prefill: int) -> None:
    whole = stage_bytes(shape(), plan(3, 3, micro_batch_size=16), 1, prompt_len=32, output_len=8)
    pieces = stage_bytes(
        shape(), plan(3, 3, micro_batch_size=16, prefill_micro_batch_size=prefill), 1, prompt_len=32, output_len=8
    )
    assert (pieces.weights, pieces.kv_per_slot) == (whole.weights, whole.kv_per_slot)
    assert pieces.activations <= whole.activations


@given(slots=st.integers(1, 8), short=st.booleans())
def test_the_boundary_is_exact(slots: int, short: bool) -> None:
    # With the whole device as the cap, one byte decides about a slot.
    wanted = plan(6, memory_fraction=1.0)
    need = stage_bytes(shape(), wanted, 0, prompt_len=32, output_len=8).total(slots)
    assert in_flight(resolved(shape(), wanted, need - short)) == slots - short


@given(fraction=st.floats(0.01, 1.0), other=st.floats(0.01, 1.0), num_prompts=st.integers(1, 40))
def test_a_larger_cap_never_fits_less(fraction: float, other: float, num_prompts: int) -> None:
    low, high = sorted((fraction, other))
    fits = [
        in_flight(resolved(shape(), plan(3, 3, memory_fraction=each), 80 * MIB, num_prompts=num_prompts))
        for each in (low, high)
    ]
    assert fits[0] <= fits[1]


@given(room=st.integers(0, 100 * MIB), counts=st.sampled_from([(6,), (3, 3), (1, 5), (2, 2, 2)]))
def test_what_fits_stays_under_every_cap(room: int, counts: tuple[int, ...]) -> None:
    wanted = plan(*counts)
    outcome = resolved(shape(), wanted, room)
    needs = [stage_bytes(shape(), wanted, index, prompt_len=32, output_len=8) for index in range(len(counts))]
    cap = int(0.9 * room)
    if isinstance(outcome, Failure):
        assert any(need.total(1) > cap for need in needs)
    else:
        assert all(need.total(outcome.in_flight) <= cap for need in needs)
        one_more = outcome.in_flight + 1
        assert one_more > 8 or any(need.total(one_more) > cap for need in needs)


def test_in_flight_is_no_more_than_micro_batches_nor_the_plan_s_own_limit() -> None:
    assert in_flight(resolved(shape(), plan(3, 3), 2**40)) == 8
    assert in_flight(resolved(shape(), plan(3, 3), 2**40, num_prompts=5)) == 3
    limited = plan(3, 3).model_copy(update={"max_in_flight": 2})
    assert in_flight(resolved(shape(), limited, 2**40)) == 2


def test_slots_leave_room_for_the_prompts_beside_them() -> None:
    def slots(wanted: Plan, room: int) -> int | Failure:
        lens = {"prompt_len": 32, "output_len": 8}
        found = resolve_slots(shape(), wanted, **lens, device_bytes=dict.fromkeys(wanted.devices, room))
        return found if isinstance(found, Failure) else found.in_flight

    wanted = plan(3, 3, micro_batch_size=4, memory_fraction=1.0)
    assert slots(wanted, 2**40) == 4, "two a stage"
    alone = plan(6, micro_batch_size=4, memory_fraction=1.0)
    assert slots(alone, 2**40) == 1
    assert slots(alone.model_copy(update={"lanes": (Lane(up_to_tokens=4, slots=1), Lane())}), 2**40) == 2
    assert slots(wanted.model_copy(update={"max_in_flight": 3}), 2**40) == 3
    needs = [stage_bytes(shape(), wanted, index, prompt_len=32, output_len=8) for index in range(2)]
    # Two slots, and three prefills of four fifths of one each.
    enough = max(need.total(0) + math.ceil(4.4 * need.kv_per_slot) for need in needs)
    assert slots(wanted, enough + max(need.kv_per_slot for need in needs)) == 2
    assert slots(wanted, enough - max(need.kv_per_slot for need in needs)) == 1
    assert isinstance(slots(wanted, 8 * MIB), Failure)


def test_prefills_between_steps_say_nothing_where_each_takes_the_only_slot_along() -> None:
    joining = shape().model_copy(update={"joins": True})

    def lanes(model: ModelShape, wanted: Plan, *given_: Lane) -> tuple[Lane, ...]:
        room = dict.fromkeys(wanted.devices, 2**40)
        own = wanted.model_copy(update={"lanes": given_})
        found = resolve_slots(model, own, prompt_len=32, output_len=8, device_bytes=room)
        assert isinstance(found, EffectivePlan)
        return found.plan.lanes

    alone, steady, gathering = plan(6), Lane(prefills_per_decode=1), Lane(prefills_per_decode=0.5)
    short = Lane(up_to_tokens=4, weight=4)
    assert lanes(joining, alone, steady) == ()
    assert lanes(joining, alone, short, steady) == (short, Lane())
    for kept in ((shape(), alone, steady), (joining, alone, gathering), (joining, plan(3, 3), steady)):
        assert lanes(*kept) == kept[2:]


def test_a_model_without_kv_is_limited_by_micro_batches_alone() -> None:
    model = shape(kv_bytes_per_token=0)
    wanted = plan(6, memory_fraction=1.0)
    need = stage_bytes(model, wanted, 0, prompt_len=32, output_len=8)
    assert need.kv_per_slot == 0
    assert in_flight(resolved(model, wanted, need.total(1))) == 8


def test_a_refusal_names_the_stage_the_bytes_and_the_knob() -> None:
    wanted = plan(3, 3, memory_fraction=0.5)
    outcome = resolved(shape(), wanted, {"cpu:0": 2**30, "cpu:1": 8 * MIB})
    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.stage, outcome.device) == (FailureKind.OVER_MEMORY_CAP, 1, "cpu:1")
    assert outcome.bytes_wanted == stage_bytes(shape(), wanted, 1, prompt_len=32, output_len=8).total(1)
    assert outcome.bytes_had == 4 * MIB
    assert "stage 1 on cpu:1" in outcome.message
    assert "memory_fraction than 0.5" in outcome.message


@pytest.mark.parametrize(
    ("counts", "cuts", "message"),
    [
        ((3, 2), (), "layers 0-4 are given and LlamaForCausalLM has 6 layers (0-5); layer 5 is missing"),
        ((4, 3), (), "layers 0-6 are given and LlamaForCausalLM has 6 layers (0-5); there are too many layers"),
        ((4, 2), (4, 5), "must not be cut before layer 4; possible cuts: [1, 2, 3]"),
    ],
)
def test_plans_that_do_not_fit_the_model(counts: tuple[int, ...], cuts: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        check_plan(shape(forbidden_cuts=cuts), plan(*counts))


def test_a_device_that_is_not_there_is_an_error_even_where_another_stage_would_not_fit() -> None:
    with pytest.raises(PlanError, match=re.escape("plan.stages[1].device: cpu:1 is not among the devices cpu:0")):
        resolved(shape(), plan(3, 3), {"cpu:0": 1})
