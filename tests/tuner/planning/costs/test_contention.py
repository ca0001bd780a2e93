"""Contention: none alone, all of it where every device computes all the while, and something in between."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.tuner.planning.costs.contention import Contention
from pipetune.tuner.planning.simulation.schedule import TaskSequence, task_sequence_of

CONTENTION = Contention(prefill=0.1, decode=0.2, devices=2)


def sequence(micro_batch: int = 4, in_flight: int | None = None) -> TaskSequence:
    return task_sequence_of(
        (32,) * 16, output_len=4, micro_batch_size=micro_batch, prefill_size=micro_batch, chunk_size=None,
        in_flight=in_flight,
    )  # fmt: skip


def factors(work: TaskSequence, stages: tuple[float, ...], *, replicas: int = 1) -> tuple[list[float], list[float]]:
    """Of prefill and of decode, stage by stage, when stages take so long for every task."""
    busy_s = np.broadcast_to(np.array(stages)[None, :, None], (len(work.kinds), len(stages), 1)).copy()
    found = CONTENTION.factors(work.kinds, work.counts, busy_s, slots=work.slots, replicas=replicas)[:, :, 0]
    decodes = np.array([kind.is_decode for kind in work.kinds])
    return found[~decodes][0].tolist(), found[decodes][0].tolist()


def test_a_device_alone_loses_nothing() -> None:
    prefill, decode = factors(sequence(), (1.0,))
    assert prefill == [pytest.approx(math.exp(-0.1))]
    assert decode == [pytest.approx(math.exp(-0.2))]
    assert factors(sequence(in_flight=1), (1.0, 1.0))[1] == [pytest.approx(math.exp(-0.2))] * 2


def test_equal_stages_and_copies_lose_all_of_it_in_decode() -> None:
    assert factors(sequence(), (1.0, 1.0))[1] == [pytest.approx(1.0)] * 2
    prefill, decode = factors(sequence(), (1.0,), replicas=2)
    assert prefill + decode == [pytest.approx(1.0)] * 2


def test_a_pipe_that_fills_and_drains_loses_less_in_prefill() -> None:
    few, many = factors(sequence(8), (1.0, 1.0))[0], factors(sequence(1), (1.0, 1.0))[0]
    assert math.exp(-0.1) < few[0] < many[0] < 1.0


def test_the_longer_stage_computes_alone_for_the_rest_of_the_time() -> None:
    short, long = factors(sequence(), (1.0, 4.0))[1]
    assert short == pytest.approx(1.0)
    assert long == pytest.approx(math.exp(-0.2 * 0.75))


@given(
    stages=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5),
    micro_batch=st.sampled_from((1, 4, 16)),
    in_flight=st.sampled_from((None, 1, 2)),
    replicas=st.integers(1, 3),
)
def test_factors_lie_between_alone_and_together(
    stages: list[float], micro_batch: int, in_flight: int | None, replicas: int
) -> None:
    contention = Contention(prefill=0.1, decode=0.2, devices=len(stages) * replicas)
    work = sequence(micro_batch, in_flight)
    busy_s = np.broadcast_to(np.array(stages)[None, :, None], (len(work.kinds), len(stages), 1)).copy()
    found = contention.factors(work.kinds, work.counts, busy_s, slots=work.slots, replicas=replicas)
    assert np.all(found <= 1.0 + 1e-12)
    assert np.all(found >= math.exp(-0.2) - 1e-12)
