"""Profiled costs: as measured on the grid, between its points in between, and growing as work does beyond it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.profile import DeviceProfile, LayerTimes, LinkProfile, Profile, TaskKind, TaskTime
from pipetune.bench.spec import ModelSpec
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from tests.record_factory import make_machine, make_shape

ROWS, LENGTHS, PASTS, CHUNKS = (1, 4, 16), (16, 64), (16, 256), ((32, 64),)
Time = Callable[[int, int, int], float]


def layer_s(rows: int, new: int, past: int) -> float:
    if new == 1:
        return 1e-3 + 1e-5 * rows + 2e-8 * rows * past
    return 5e-4 + 2e-5 * rows * new + 1e-8 * rows * new * (past + new / 2)


def head_s(rows: int, new: int, past: int) -> float:
    return 4e-3 + 1e-4 * rows


def nothing_s(rows: int, new: int, past: int) -> float:
    return 0.0


def overhead_s(rows: int, new: int, past: int) -> float:
    return 3e-4


def points(*, max_tokens: int = 10**6) -> list[tuple[int, int, int]]:
    prefill = [(rows, new, 0) for rows, new in itertools.product(ROWS, LENGTHS)]
    decode = [(rows, 1, past) for rows, past in itertools.product(ROWS, PASTS)]
    chunks = [(rows, new, past) for rows in ROWS for new, past in CHUNKS]
    return [point for point in (*prefill, *decode, *chunks) if point[0] * point[1] <= max_tokens]


def times(seconds: Time, at: Iterable[tuple[int, int, int]]) -> tuple[TaskTime, ...]:
    return tuple(
        TaskTime(rows=rows, new_tokens=new, past_tokens=past, seconds=seconds(rows, new, past))
        for rows, new, past in at
    )


def costs(at: Iterable[tuple[int, int, int]] | None = None, *, layer: Time = layer_s) -> ProfiledCosts:
    """Layers 0-9 take what `layer` says, all others three times as long."""
    at = list(points() if at is None else at)
    device = DeviceProfile(
        device="cpu:0",
        layers=(
            LayerTimes(layers=tuple(range(10, 30)), times=times(lambda *point: 3 * layer(*point), at)),
            LayerTimes(layers=tuple(range(10)), times=times(layer, at)),
        ),
        overhead=times(overhead_s, at),
        embedding=times(nothing_s, at),
        head=times(head_s, at),
    )
    return ProfiledCosts(
        Profile(
            model=ModelSpec(name="smollm2-135m"),
            shape=make_shape(),
            machine=make_machine(),
            device_bytes={"cpu:0": 2**32},
            devices=(device, device.model_copy(update={"device": "cpu:1"})),
            links=(LinkProfile(source="cpu:0", target="cpu:1", latency_s=2e-4, bytes_per_s=1e9),),
            measured_at="2026-01-02T03:04:05Z",
            took_s=40.0,
        )
    )


def first_layer_s(own: ProfiledCosts, rows: int, new: int, past: int) -> float:
    return float(own.layers_s("cpu:0", TaskKind(rows, new, past))[0])


def test_measured_points_are_as_measured_whatever_they_are() -> None:
    rng = np.random.default_rng(0)
    known = {point: rng.uniform(1e-3, 1.0) for point in points()}
    own = costs(layer=lambda *point: known[point])
    for point, seconds in known.items():
        each = own.layers_s("cpu:0", TaskKind(*point))
        assert each[:10] == pytest.approx([seconds] * 10)
        assert each[10:] == pytest.approx([3 * seconds] * 20)


@given(rows=st.integers(1, 16), new=st.integers(16, 64), more_rows=st.integers(0, 8), more=st.integers(0, 40))
def test_time_grows_with_work_within_the_grid_and_beyond(rows: int, new: int, more_rows: int, more: int) -> None:
    own = costs()
    less, much = (first_layer_s(own, *point, 0) for point in ((rows, new), (rows + more_rows, new + more)))
    assert less <= much * (1 + 1e-9)
    less, much = (first_layer_s(own, one, 1, past) for one, past in ((rows, new), (rows + more_rows, new + more)))
    assert less <= much * (1 + 1e-9)


@pytest.mark.parametrize(
    "point",
    [(2, 32, 0), (12, 48, 0), (3, 1, 100), (16, 1, 40), (64, 64, 0), (4, 256, 0), (2, 8, 0), (64, 1, 16), (8, 1, 2048)],
)
def test_what_grows_evenly_is_found_between_the_points_and_beyond(point: tuple[int, int, int]) -> None:
    assert first_layer_s(costs(), *point) == pytest.approx(layer_s(*point), rel=0.03)


def test_points_too_large_to_measure_follow_the_tokens() -> None:
    own = costs(points(max_tokens=256))
    assert (16, 64, 0) not in points(max_tokens=256)
    assert first_layer_s(own, 16, 64, 0) == pytest.approx(layer_s(16, 64, 0), rel=0.03)
    assert first_layer_s(own, 12, 48, 0) == pytest.approx(layer_s(12, 48, 0), rel=0.03)


@pytest.mark.parametrize("point", [(4, 32, 64), (4, 32, 96), (8, 48, 512), (2, 16, 16)])
def test_chunks_cost_prefill_and_their_past(point: tuple[int, int, int]) -> None:
    assert first_layer_s(costs(), *point) == pytest.approx(layer_s(*point), rel=0.05)
    # Chunks that were never timed have at least what their prefill takes.
    without = costs([one for one in points() if one[1:] not in CHUNKS])
    assert first_layer_s(without, *point) == pytest.approx(layer_s(*point), rel=0.3)
    assert first_layer_s(without, *point) >= first_layer_s(without, *point[:2], 0)


def test_from_a_single_point_time_grows_as_work_does() -> None:
    own = costs([(4, 16, 0)])
    assert first_layer_s(own, 8, 16, 0) == pytest.approx(2 * layer_s(4, 16, 0))
    assert first_layer_s(own, 4, 64, 0) == pytest.approx(4 * layer_s(4, 16, 0))
    # Where no decode was timed, as where texts are scored, a step is a chunk of one token.
    assert first_layer_s(own, 4, 1, 8) == pytest.approx(layer_s(4, 16, 0) / 16)


def test_without_prefill_there_is_nothing_to_go_by() -> None:
    with pytest.raises(ValueError, match="no times of prefill"):
        costs([(4, 1, 16)])


def test_ends_are_overhead_embedding_and_head() -> None:
    own = costs()
    kind = TaskKind(16, 64, 0)

    def ends_s(kind: TaskKind, *, is_first: bool = False, is_last: bool = False) -> float:
        return own.ends_s("cpu:0", kind, is_first=is_first, is_last=is_last)

    assert ends_s(kind) == ends_s(kind, is_first=True) == pytest.approx(3e-4)
    assert ends_s(kind, is_last=True) == pytest.approx(3e-4 + head_s(16, 64, 0))
    assert ends_s(kind._replace(samples=False), is_last=True) == pytest.approx(3e-4)
    # One position a row, however long the prompts are.
    assert ends_s(TaskKind(32, 512, 0), is_last=True) == pytest.approx(3e-4 + head_s(32, 512, 0))


def test_messages_take_latency_and_their_bytes() -> None:
    own = costs()
    assert own.hop_s("cpu:0", "cpu:1", 10**6) == pytest.approx(1.2e-3)
    assert own.hop_s("cpu:0", "cpu:0", 10**6) == 0.0
    with pytest.raises(KeyError):
        own.hop_s("cpu:1", "cpu:0", 1)
    with pytest.raises(KeyError):
        own.layers_s("cpu:7", TaskKind(1, 1, 1))
