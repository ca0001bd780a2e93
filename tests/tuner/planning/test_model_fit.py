"""What is said of a model must add up, and what is said to fit must be what the plans' own accounting lets run."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pipetune.bench.memory import ModelShape, resolve
from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.planning.model_fit import ModelFit, Wanted, fit_model, group_layers, ranges_text
from pipetune.tuner.report.document import Document
from pipetune.tuner.report.model_fit import parts_of
from pipetune.tuner.report.render.rich import render_rich
from tests.record_factory import make_shape

GIB = 2**30
SHAPE = make_shape()
SMALL = SHAPE.model_copy(update={"layers": SHAPE.layers[:12]})


def wanted(memory: int = 4 * GIB, devices: int = 2, **changes: Any) -> Wanted:
    names = tuple(f"cpu:{index}" for index in range(devices))
    workload = Workload(**{"num_prompts": 32, **changes.pop("workload", {})})
    lens = (workload.input_len,) * workload.num_prompts
    return Wanted(
        workload=workload, prompt_lens=lens, devices=names, device_bytes=dict.fromkeys(names, memory), **changes
    )


def resolved(model_fit: ModelFit, job: Wanted) -> EffectivePlan | Failure:
    """What the plan that was described resolves to."""
    fit = model_fit.fit
    plan = Plan.from_layer_counts(
        fit.layer_counts, job.devices, fit.micro_batch_size, memory_fraction=fit.memory_fraction
    )
    return resolve(
        model_fit.shape,
        plan,
        num_prompts=job.workload.num_prompts,
        prompt_len=max(job.prompt_lens),
        output_len=job.workload.generated_len,
        device_bytes=job.device_bytes,
    )


def printed(model_fit: ModelFit) -> list[str]:
    text = StringIO()
    Console(file=text, width=80).print(render_rich(Document(parts=parts_of(model_fit))))
    return text.getvalue().splitlines()


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        (range(30), "0-29"),
        ((0, 1, 2, 4, 5, 9), "0-2, 4-5, 9"),
        (range(5, 30, 6), "5, 11 … 29"),
        ((0, 2), "0, 2"),
        ((7,), "7"),
        ((), ""),
    ],
)
def test_indices_are_written_as_ranges(indices: Any, text: str) -> None:
    assert ranges_text(tuple(indices)) == text


def test_equal_layers_are_one_group_wherever_they_lie() -> None:
    sliding = SHAPE.layers[0].model_copy(update={"kind": "sliding_attention"})
    groups = group_layers([sliding if index % 3 else layer for index, layer in enumerate(SHAPE.layers)])
    assert [(group.kind, group.indices[:3], len(group.indices)) for group in groups] == [
        ("full_attention", (0, 3, 6), 10),
        ("sliding_attention", (1, 2, 4), 20),
    ]


@settings(max_examples=40, deadline=None)
@given(
    devices=st.integers(1, 4),
    memory=st.integers(2**25, 2**33),
    size=st.none() | st.integers(1, 64),
    forbidden=st.sets(st.integers(1, 11)),
)
def test_what_is_said_to_fit_is_what_a_plan_resolves_to(
    devices: int, memory: int, size: int | None, forbidden: set[int]
) -> None:
    shape = SMALL.model_copy(update={"forbidden_cuts": tuple(sorted(forbidden))})
    job = wanted(memory, devices, micro_batch_size=size)
    model_fit = fit_model(shape, job)
    outcome = resolved(model_fit, job)
    fit = model_fit.fit
    assert fit.in_flight == (outcome.in_flight if isinstance(outcome, EffectivePlan) else 0)
    assert (model_fit.remedy is None) == (fit.in_flight > 0)
    rooms = [stage.in_flight for stage in fit.stages if stage.in_flight is not None]
    assert fit.in_flight == min([*rooms, fit.num_micro_batches])
    assert sum(fit.layer_counts) == len(model_fit.shape.layers)
    assert set(model_fit.cuts) == set(range(1, 12)) - forbidden
    assert len(fit.stages) == min(devices, len(model_fit.cuts) + 1)
    assert max(map(len, printed(model_fit))) <= 80


def test_weights_of_the_stages_are_the_models_and_a_second_embedding() -> None:
    fit = fit_model(SHAPE, wanted()).fit
    total = sum(stage.weight_bytes for stage in fit.stages)
    layers = sum(layer.weight_bytes for layer in SHAPE.layers)
    assert total == layers + 2 * SHAPE.embedding_bytes + 2 * SHAPE.other_bytes


def test_a_model_of_one_layer_can_be_cut_nowhere() -> None:
    shape = SHAPE.model_copy(update={"layers": SHAPE.layers[:1]})
    (line,) = (line for line in printed(fit_model(shape, wanted(devices=1))) if line.startswith("cuts"))
    assert line.split(maxsplit=1)[1].strip() == "nowhere: it runs on one device"


def test_micro_batches_shrink_until_they_fit_unless_they_were_asked_for() -> None:
    job: dict[str, Any] = {"memory": GIB, "workload": {"input_len": 1024, "num_prompts": 64}}
    fit = fit_model(SHAPE, wanted(**job)).fit
    assert fit.whole_size == 32
    assert 1 <= fit.micro_batch_size < 32
    assert fit.in_flight
    assert any("(32 does not fit)" in line for line in printed(fit_model(SHAPE, wanted(**job))))
    asked = fit_model(SHAPE, wanted(**job, micro_batch_size=32))
    assert asked.fit.in_flight == 0
    assert asked.remedy == f"micro-batches of {fit.micro_batch_size} would fit"


def test_a_model_that_is_too_large_says_how_many_devices_would_do() -> None:
    model_fit = fit_model(SHAPE, wanted(2**28))
    assert model_fit.fit.micro_batch_size == 1
    assert model_fit.remedy is not None
    half, more = model_fit.remedy.split("; ")
    assert half == "--dtype bfloat16 would fit"
    count = int(more.split()[0])
    assert fit_model(SHAPE, wanted(2**28, count, micro_batch_size=1)).fit.in_flight
    assert not fit_model(SHAPE, wanted(2**28, count - 1, micro_batch_size=1)).fit.in_flight


def test_devices_that_are_too_small_for_a_layer_are_said_to_be() -> None:
    assert fit_model(SHAPE, wanted(2**22)).remedy == (
        "--dtype bfloat16 is not enough, though it halves the need; it needs larger devices: "
        "not even a layer on each of them would fit"
    )


def test_what_is_refused_is_listed() -> None:
    shape = SHAPE.model_copy(update={"forbidden_cuts": tuple(range(2, 30)), "recurrent": True})
    refused = fit_model(shape, wanted(devices=4)).refused
    assert [text.partition(":")[0] for text in refused] == [
        "cuts before layers 2-29",
        "prefill in smaller pieces or chunks than a micro-batch",
        "more than 2 stages",
    ]


def test_layers_without_a_cache_have_room_for_any_number() -> None:
    layers = tuple(layer.model_copy(update={"kv_bytes_per_token": 0}) for layer in SHAPE.layers)
    model_fit = fit_model(SHAPE.model_copy(update={"layers": layers}), wanted())
    assert [stage.in_flight for stage in model_fit.fit.stages] == [None, None]
    assert model_fit.fit.in_flight == model_fit.fit.num_micro_batches == 2


def test_an_anatomy_survives_json() -> None:
    model_fit = fit_model(SHAPE, wanted())
    assert ModelFit.model_validate_json(model_fit.model_dump_json()) == model_fit
    assert ModelShape.model_validate(model_fit.model_dump()["shape"]) == SHAPE
