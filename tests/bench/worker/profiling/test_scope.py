"""What is timed: windows hold every kind of layer and respect cuts; tasks fit into memory, and rows are unlike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.memory import LayerShape, ModelShape
from pipetune.bench.profile import ProfileGrid, TaskKind
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.worker.profiling.scope import DECODE_STEPS, Scope, repeat, scope_of, windows_of
from tests.record_factory import make_shape

LAYER = LayerShape(weight_bytes=200_000_000, active_params=250, kv_bytes_per_token=10)


def shape_of(num_layers: int = 8, **changes: object) -> ModelShape:
    shape = ModelShape(
        architecture="LlamaForCausalLM",
        num_parameters=1,
        layers_prefix="model.layers",
        first_modules=(),
        last_modules=(),
        embedding_bytes=500,
        head_bytes=500,
        other_bytes=0,
        tied=False,
        hidden_size=4,
        intermediate_size=8,
        num_attention_heads=1,
        vocab_size=16,
        dtype_bytes=4,
        layers=(LAYER,) * num_layers,
    )
    return shape.model_copy(update=changes)


def scope(grid: ProfileGrid, shape: ModelShape, *, device_bytes: int = 10**11, devices: int = 2) -> Scope | Failure:
    names = tuple(f"cpu:{index}" for index in range(devices))
    alike = (0,) * shape.num_layers
    return scope_of(grid, shape, alike, devices=names, device_bytes=device_bytes, packed_weights=True)


def chosen(grid: ProfileGrid, shape: ModelShape, **given: int) -> Scope:
    found = scope(grid, shape, **given)
    assert isinstance(found, Scope)
    return found


@given(
    alike=st.lists(st.integers(0, 3), min_size=1, max_size=24),
    forbidden=st.sets(st.integers(1, 23)),
    width=st.integers(1, 24),
)
def test_windows_hold_every_kind_and_are_cut_where_allowed(alike: list[int], forbidden: set[int], width: int) -> None:
    forbidden = {cut for cut in forbidden if cut < len(alike)}
    windows = windows_of(alike, tuple(forbidden), width)
    assert {alike[layer] for window in windows for layer in window} == set(alike)
    assert len(windows) <= len(set(alike))
    for window in windows:
        assert 0 <= window.start < window.stop <= len(alike)
        assert window.start not in forbidden
        assert window.stop not in forbidden
        parts = [cut for cut in range(window.start + 1, window.stop) if cut not in forbidden]
        assert len(window) <= width or not parts, "longer than wanted only where it cannot be parted"


def test_like_layers_need_one_window_as_long_as_a_stage() -> None:
    assert windows_of((0,) * 30, (), 15) == (range(15),)


def test_one_window_over_two_kinds_is_preferred_to_two() -> None:
    (window,) = windows_of((0,) * 8 + (1,) * 8, (), 8)
    assert window.start < 8 < window.stop
    assert len(window) == 8


def test_the_grid_is_taken_up_to_the_largest_task() -> None:
    grid = ProfileGrid(rows=(1, 4), lengths=(8, 64), pasts=(32,), chunks=((16, 32),), max_tokens=64)
    assert set(chosen(grid, shape_of()).kinds) == {
        *(TaskKind(1, 8, 0), TaskKind(4, 8, 0), TaskKind(1, 64, 0)),
        *(TaskKind(1, 1, 32), TaskKind(4, 1, 32), TaskKind(1, 16, 32), TaskKind(4, 16, 32)),
    }


def test_the_smallest_prefill_is_timed_even_if_it_is_larger_than_wanted() -> None:
    found = chosen(ProfileGrid(rows=(4, 8), lengths=(64,), pasts=(), max_tokens=16), shape_of())
    assert found.kinds == (TaskKind(4, 64, 0),)


def test_scores_have_no_decode() -> None:
    kinds = chosen(ProfileGrid(rows=(1,), lengths=(8,), pasts=(8,), scores=True), shape_of()).kinds
    assert kinds == (TaskKind(1, 8, 0),)


def test_what_keeps_states_is_given_whole_prompts_and_short_pasts() -> None:
    grid = ProfileGrid(rows=(1, 8), lengths=(8,), pasts=(16,), chunks=((4, 8),), max_tokens=64)
    found = chosen(grid, shape_of(recurrent=True))
    assert set(found.kinds) == {TaskKind(1, 8, 0), TaskKind(8, 8, 0), TaskKind(1, 1, 16)}
    assert any("whole prompts" in note for note in found.notes)


def test_nothing_goes_beyond_the_positions_of_the_model() -> None:
    found = chosen(ProfileGrid(rows=(1,), lengths=(16, 512), pasts=(16, 512)), shape_of(max_positions=64))
    assert found.kinds == (TaskKind(1, 16, 0), TaskKind(1, 1, 16))
    assert any("64 positions" in note for note in found.notes)


def test_a_window_becomes_shorter_before_a_task_is_left_out() -> None:
    grid = ProfileGrid(rows=(1,), lengths=(8,), pasts=())
    assert chosen(grid, shape_of()).windows == (range(4),)
    small = chosen(grid, shape_of(), device_bytes=700_000_000)
    (window,) = small.windows
    assert 1 <= len(window) < 4
    assert small.kinds == (TaskKind(1, 8, 0),)
    tight = ProfileGrid(rows=(1, 100_000), lengths=(8,), pasts=(), max_tokens=10**9)
    found = chosen(tight, shape_of(), device_bytes=300_000_000)
    assert found.kinds == (TaskKind(1, 8, 0),)
    assert any("1 of 2 kinds" in note for note in found.notes)


def test_where_not_even_a_layer_fits_the_bytes_are_named() -> None:
    found = scope(ProfileGrid(), shape_of(), device_bytes=1000)
    assert isinstance(found, Failure)
    assert found.kind is FailureKind.OVER_MEMORY_CAP
    assert found.bytes_wanted is not None
    assert found.bytes_had == 900
    assert found.bytes_wanted > found.bytes_had


@pytest.mark.parametrize("kind", [TaskKind(16, 1, 24), TaskKind(16, 24, 0), TaskKind(16, 8, 16)])
@pytest.mark.parametrize("recurrent", [False, True])
def test_no_two_rows_need_work_on_the_same_tokens(kind: TaskKind, recurrent: bool) -> None:
    if recurrent and kind.past_tokens and not kind.is_decode:
        pytest.skip("what keeps states is prefilled whole")
    shape = make_shape().model_copy(update={"recurrent": recurrent})
    grid = ProfileGrid.model_construct(padded=0, scores=False, sampling=None)
    job = repeat(kind, 1, grid, shape, pad_token_id=0)
    inputs = MicroBatchInputs.build(job.prompts, output_len=job.output_len, pad_token_id=0, device=torch.device("cpu"))
    task = job.tasks()[-1]
    ids = inputs.ids[:, task.first_token : task.end_token]
    assert ids.shape == (16, kind.new_tokens)
    assert len({tuple(row) for row in ids.tolist()}) > 12
    # What a step gives is written behind the prompts, where there is room for it.
    assert inputs.prompt_len + task.step < inputs.ids.shape[1]
    assert inputs.prompt_len >= task.end_token + (DECODE_STEPS - 1 if kind.is_decode else 0)
