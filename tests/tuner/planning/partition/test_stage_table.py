"""What stages take: as the cost model and the plans' own accounting say, stage by stage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetune.bench.memory import LayerShape, resolve
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.planning.partition.stage_table import alike_classes, count_states, stage_needs, stage_seconds
from pipetune.tuner.planning.simulation.model import CostModel
from tests.record_factory import make_shape
from tests.tuner.search.space_factory import rates_of

SHAPE = make_shape()
SMALL = SHAPE.model_copy(update={"layers": SHAPE.layers[:7]})
DEVICES = ("cpu:0", "cpu:1", "cpu:2")


@pytest.mark.parametrize("output_len", [0, 1, 20])
def test_seconds_are_those_of_the_cost_model(output_len: int) -> None:
    workload = Workload(kind="generate" if output_len else "score", num_prompts=9, output_len=max(output_len, 1))
    costs = NominalCosts(SMALL, rates_of(DEVICES, (1.0, 0.5, 2.0)), scores=output_len == 0)
    cost = CostModel.of_workload(SMALL, workload, range(10, 100, 10), costs)
    kinds = cost.kinds(Plan.from_layer_counts((7,), DEVICES, 4, prefill_micro_batch_size=2, prefill_chunk_size=32))
    for device in DEVICES:
        table = stage_seconds(cost.costs, device, kinds)
        for first, end in itertools.combinations(range(8), 2):
            bounds = [bound for bound in ((0, first), (first, end), (end, 7)) if bound[0] < bound[1]]
            place = bounds.index((first, end))
            others = [name for name in DEVICES if name != device]
            plan = Plan.from_layer_counts(
                tuple(stop - begin for begin, stop in bounds),
                (*others[:place], device, *others[place:]),
                4,
                prefill_micro_batch_size=2,
                prefill_chunk_size=32,
            )
            assert table[first, end] == pytest.approx(cost.predict(plan).stage_busy_s[place])


layer_shapes = st.builds(
    LayerShape,
    weight_bytes=st.integers(0, 2**24),
    active_params=st.just(1),
    kv_bytes_per_token=st.integers(0, 2**12),
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_the_table_says_fits_is_what_plans_resolve_to(data: st.DataObject) -> None:
    shape = SHAPE.model_copy(
        update={
            "layers": tuple(data.draw(st.lists(layer_shapes, min_size=3, max_size=6))),
            "tied": data.draw(st.booleans()),
            "head_bytes": data.draw(st.sampled_from([0, 2**24])),
            "embedding_on_every_stage": data.draw(st.booleans()),
            "message_bytes": data.draw(st.sampled_from([None, 2**16])),
            "storage_bytes": data.draw(st.sampled_from([None, 8])),
        }
    )
    kind = data.draw(st.sampled_from(["cpu", "cuda"]))
    devices = tuple(f"{kind}:{index}" for index in range(3))
    rows = data.draw(st.integers(1, 8))
    whole = Plan.from_layer_counts((shape.num_layers,), devices, rows, prefill_micro_batch_size=(rows + 1) // 2)
    output_len = data.draw(st.sampled_from([0, 16]))
    needs = stage_needs(shape, whole, devices[0], prompt_len=64, output_len=output_len)
    # No stage takes more than the two of a cut together.
    assert np.max(needs, where=np.isfinite(needs), initial=0) <= needs[0, 1] + needs[1, -1]
    cuts = sorted(data.draw(st.sets(st.integers(1, shape.num_layers - 1), max_size=2)))
    bounds = list(itertools.pairwise((0, *cuts, shape.num_layers)))
    caps = [int(needs[bound]) + data.draw(st.sampled_from([-1, 0, 1, 2**20])) for bound in bounds]
    plan = Plan.from_layer_counts(
        tuple(end - first for first, end in bounds),
        devices,
        rows,
        prefill_micro_batch_size=(rows + 1) // 2,
        memory_fraction=1.0,
    )
    resolved = resolve(
        shape,
        plan,
        num_prompts=rows,
        prompt_len=64,
        output_len=output_len,
        device_bytes=dict(zip(devices, [*caps, 0, 0], strict=False)),
    )
    fits = all(needs[bound] <= cap for bound, cap in zip(bounds, caps, strict=True))
    assert isinstance(resolved, EffectivePlan) == fits


def test_devices_are_alike_within_a_tolerance_in_all_they_differ_in() -> None:
    values = np.array([[1.0, 8.0], [1.015, 8.0], [2.0, 8.0], [0.99, 8.1], [1.0, 16.0], [2.01, 8.0]])
    assert alike_classes(values) == (0, 0, 1, 0, 2, 1)
    assert alike_classes(values, 0.6) == (0,) * 6
    assert count_states((0, 0, 1, 0, 2, 1)) == 4 * 3 * 2
