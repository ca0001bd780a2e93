"""Interleaved rounds: who ran, in which order, and ratios round by round."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipetune.bench.record import Failure, Outcome
from pipetune.tuner.commands.comparison import compare, run_rounds
from pipetune.tuner.progress import Reporter
from tests.record_factory import WORKLOAD, make_baseline_measurement, make_failure, make_measurement, make_plan

PLAN = make_plan()
TITLES = {"baseline": "un-pipelined [b]", "plan": "17+13"}


def test_every_contender_runs_once_a_round() -> None:
    order: list[str] = []

    def runner(name: str) -> Outcome:
        order.append(name)
        return make_measurement(PLAN, num_iters=1)

    measured = run_rounds(
        {name: lambda name=name: runner(name) for name in "abc"},  # type: ignore[misc]
        rounds=4,
        seed=0,
        reporter=Reporter(),
    )
    assert not isinstance(measured, Failure)
    assert [len(runs) for runs in measured.values()] == [4, 4, 4]
    assert all(sorted(order[first : first + 3]) == ["a", "b", "c"] for first in range(0, 12, 3))


def test_a_failure_ends_the_rounds() -> None:
    outcome = run_rounds({"a": make_failure}, rounds=4, seed=0, reporter=Reporter())
    assert outcome == make_failure()


def test_ratios_are_taken_round_by_round() -> None:
    """The machine slows down over the rounds, by the same for both: the ratios hardly differ."""
    drifts = (1.0, 1.5, 2.0)
    comparison = compare(
        {
            "baseline": [make_baseline_measurement(32, num_iters=1, drift=drift, noise=0.0) for drift in drifts],
            "plan": [make_measurement(PLAN, num_iters=1, drift=drift, noise=0.0, hop_s=0.0) for drift in drifts],
        },
        TITLES,
    )
    base, plan = comparison.contenders
    assert comparison.rounds == 3
    assert (base.ratio, base.ratio_low, base.ratio_high) == (1.0, 1.0, 1.0)
    assert plan.ratio_low == pytest.approx(plan.ratio_high)
    assert plan.ratio == pytest.approx(plan.throughput / base.throughput)
    assert plan.iqr > 0
    assert base.bubble_ratio is None
    assert len(plan.stage_busy_ms) == 2


def test_scored_texts_compare_by_all_tokens() -> None:
    workload = WORKLOAD.model_copy(update={"kind": "score"})
    runs = [make_measurement(PLAN, workload, num_iters=1, seed=seed) for seed in range(3)]
    base = [make_baseline_measurement(32, workload, num_iters=1, seed=seed) for seed in range(3)]
    comparison = compare({"baseline": base, "plan": runs}, TITLES)
    row = comparison.contenders[1]
    assert row.throughput > 0
    assert row.mean_ttft_ms is None
    console = Console(file=io.StringIO(), width=80)
    comparison.print(console)
    assert isinstance(console.file, io.StringIO)
    assert "E2EL" in console.file.getvalue()


def test_the_table_fits_80_columns_and_escapes() -> None:
    console = Console(file=io.StringIO(), width=80)
    plans = make_plan((8, 8, 7, 7), 8), make_plan((15, 15), 8, replicas=2)
    runs = [[make_measurement(plan, num_iters=1, seed=seed) for seed in range(3)] for plan in plans]
    compare({"baseline": runs[0], "plan": runs[1]}, TITLES).print(console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "un-pipelined [b]" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
