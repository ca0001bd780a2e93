"""Errors of memory by stage: none where it came as predicted, signed and worst where it did not."""

from __future__ import annotations

import pytest

from pipetune.bench.memory import stage_bytes
from pipetune.bench.record import Measurement, Record
from tests.evaluation.search.memory_error import describe, memory_errors
from tests.record_factory import make_effective, make_failure, make_measurement, make_plan, make_record, make_shape

BASE = 400 * 2**20
SHAPE = make_shape()


def record(number: int, factors: tuple[float, float]) -> Record:
    """A run whose stages took so many times what is predicted of them."""
    plan = make_plan((17, 13))
    measured = make_measurement(plan)
    in_flight = make_effective(plan).in_flight
    memory = []
    for index, (stage, factor) in enumerate(zip(measured.memory, factors, strict=True)):
        need = stage_bytes(
            SHAPE, plan, index, prompt_len=max(measured.prompt_lens), output_len=measured.output_len
        ).total(in_flight)
        memory.append(stage.model_copy(update={"peak_bytes": BASE + int(factor * need), "baseline_bytes": BASE}))
    return make_record(number, "trial", plan, measured.model_copy(update={"memory": tuple(memory)}))


def test_errors_are_signed_and_the_worst_of_either_side_is_kept() -> None:
    first, second = memory_errors(SHAPE, [record(0, (1.0, 0.5)), record(1, (1.0, 1.25)), record(2, (1.0, 1.0))])
    assert (first.stage, first.runs) == (0, 3)
    for error in (first.median, first.own_worst_over, first.own_worst_under):
        assert error == pytest.approx(0.0, abs=1e-6)
    assert second.own_median == pytest.approx(0.0, abs=1e-6)
    assert second.own_worst_over == pytest.approx(1.0, rel=1e-6)
    assert second.own_worst_under == pytest.approx(1 / 1.25 - 1, rel=1e-6)
    assert 0 < second.worst_over < second.own_worst_over, "the process itself takes part"
    assert "| 1 | 3 | 1 | +0.0 % |" in describe((first, second))


def test_failures_are_left_out() -> None:
    failed = make_record(1, "trial", make_plan((17, 13)), make_failure())
    (first, _) = memory_errors(SHAPE, [record(0, (1.0, 1.0)), failed])
    assert first.runs == 1
    assert isinstance(record(0, (1.0, 1.0)).result, Measurement)
