"""One plan measured on a fake fleet, and compared with the un-pipelined model: who ran, in which order, and ratios."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from pipetune.bench.errors import ModelError
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import Workload
from pipetune.tuner.commands.bench import Bench, BenchResult, Comparison, comparison_of
from pipetune.tuner.commands.bench_document import document_of
from pipetune.tuner.commands.plan_request import PlanRequest
from pipetune.tuner.config.schema import GENERATE_OBJECTIVE, SCORE_OBJECTIVE, TuneConfig
from pipetune.tuner.progress import PlainReporter, Reporter
from pipetune.tuner.ranking.runs import BASELINE
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.report.render.rich import render_rich
from tests.record_factory import (
    WORKLOAD,
    make_baseline_measurement,
    make_effective,
    make_failure,
    make_measurement,
    make_plan,
    make_record,
)
from tests.tuner.fake_fleet import Lab, failure

PLAN = make_plan()
NOISE = (1.0, 1.01, 0.995, 1.004)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    """What fleets are started in."""
    lab = Lab()
    monkeypatch.setattr(Fleet, "start", lab.start)
    return lab


def bench(rounds: int = 0, *, console: Console | None = None, output: Path | None = None) -> BenchResult:
    config = TuneConfig.model_validate({"model": {"name": "m"}, "devices": "cpu:0-1", "baseline_batch_sizes": [16, 32]})
    request = PlanRequest.of({"layers": "17,13", "micro_batch_size": 8})
    reporter = PlainReporter(console) if console is not None else Reporter()
    return Bench(config=config, request=request, rounds=rounds, output=output).run(reporter)


def compared(
    rounds: Sequence[tuple[Measurement, Measurement]],
    *,
    workload: Workload = WORKLOAD,
    metric: str = GENERATE_OBJECTIVE,
) -> Comparison:
    """Rounds of the baseline and of a plan."""
    records: list[Record] = []
    for number, (base, own) in enumerate(rounds):
        for plan, result in ((None, base), (PLAN, own)):
            # A side may hold the run of another plan, for its numbers.
            made = make_record(len(records), "finalist", plan, make_failure(), round_=number, workload=workload)
            records.append(made.model_copy(update={"result": result}))
    titles = {BASELINE: ("baseline", "un-pipelined [b]"), make_effective(PLAN, workload).key: ("plan", "17+13")}
    return comparison_of(records, titles, Objective(metric=metric))


def shown(comparison: Comparison) -> str:
    console = Console(file=io.StringIO(), width=80)
    result = BenchResult(plan=PLAN, outcome=make_measurement(PLAN), comparison=comparison)
    console.print(render_rich(document_of(result)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_side_runs_once_a_round_in_an_order_of_its_own(lab: Lab, tmp_path: Path) -> None:
    result = bench(rounds=8, output=tmp_path / "records.jsonl")
    assert result.comparison is not None
    assert result.comparison.rounds == 8
    assert [row.name for row in result.comparison.contenders] == ["baseline", "single stage", "plan"]
    assert [len(row.throughputs) for row in result.comparison.contenders] == [8, 8, 8]
    # The plan, which is checked, and two batch sizes come first.
    first, of_rounds = result.records[:3], result.records[3:]
    assert [record.role for record in first] == ["bench"] * 3
    keys = [record.effective.key if record.effective else BASELINE for record in of_rounds]
    orders = [tuple(keys[at : at + 3]) for at in range(0, 24, 3)]
    assert len(set(map(frozenset, orders))) == 1
    assert len(set(orders)) > 1
    assert [record.round for record in of_rounds] == [at // 3 for at in range(24)]
    assert len(result.files[tmp_path / "records.jsonl"].splitlines()) == len(result.records)
    assert [record.number for record in result.records] == list(range(27))


@pytest.mark.parametrize("of_baseline", [True, False])
def test_a_failure_ends_the_rounds(lab: Lab, of_baseline: bool) -> None:
    asked: list[int] = []

    def fourth(*args: object) -> Failure | None:
        asked.append(1)
        return failure(FailureKind.WORKER_DIED) if len(asked) == 4 else None

    if of_baseline:
        lab.baseline_fault = fourth
    else:
        lab.fault = fourth
    result = bench(rounds=5)
    assert isinstance(result.outcome, Failure)
    assert result.comparison is None
    assert result.records[-1].result == result.outcome


def test_without_a_comparison_there_is_one_record_of_the_whole_protocol(lab: Lab) -> None:
    (record,) = bench().records
    assert isinstance(record.result, Measurement)
    assert (record.role, record.number, len(record.result.iterations)) == ("bench", 0, 3)


@pytest.mark.parametrize("kind", [FailureKind.OUT_OF_MEMORY, FailureKind.WRONG_OUTPUT])
def test_a_reference_that_cannot_be_made_is_missed_or_refuses_the_model(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: FailureKind
) -> None:
    from tests.tuner.fake_fleet import FakeFleet

    monkeypatch.setattr(FakeFleet, "make_reference", lambda *args: failure(kind))
    console = Console(file=io.StringIO(), width=200)
    if kind is FailureKind.WRONG_OUTPUT:
        with pytest.raises(ModelError, match="made wrong_output"):
            bench()
        return
    assert isinstance(bench(console=console).outcome, Measurement)
    assert isinstance(console.file, io.StringIO)
    assert "made out_of_memory; the output goes unchecked" in console.file.getvalue()


def test_ratios_are_taken_round_by_round() -> None:
    """The machine slows down over the rounds, by the same for both: the ratios hardly differ."""
    comparison = compared(
        [
            (
                make_baseline_measurement(32, num_iters=1, drift=drift, noise=0.0),
                make_measurement(PLAN, num_iters=1, drift=drift, noise=0.0, hop_s=0.0),
            )
            for drift in (1.0, 1.5, 2.0)
        ]
    )
    base, plan = comparison.contenders
    assert comparison.rounds == 3
    assert (base.ratio, base.ratio_low, base.ratio_high) == (1.0, 1.0, 1.0)
    assert plan.ratio_low == pytest.approx(plan.ratio_high)
    assert plan.ratio == pytest.approx(plan.throughput / base.throughput)
    assert plan.iqr == pytest.approx(0.0, abs=1e-9), "drift is no spread of the plan"
    assert base.bubble_ratio is None
    assert len(plan.stage_busy_ms) == 2


def noisy(rounds: int) -> Comparison:
    return compared(
        [
            (
                make_baseline_measurement(32, num_iters=1, noise=0.0),
                make_measurement(PLAN, num_iters=1, drift=NOISE[at], noise=0.0),
            )
            for at in range(rounds)
        ]
    )


def test_the_interval_holds_the_ratio_and_narrows_with_rounds() -> None:
    widths = []
    for rounds in (2, 3, 4):
        row = noisy(rounds).contenders[1]
        assert row.ratio_low is not None
        assert row.ratio_high is not None
        assert row.ratio_low < row.ratio < row.ratio_high
        widths.append(row.ratio_high / row.ratio_low)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 1.05


def test_one_round_has_no_interval() -> None:
    comparison = noisy(1)
    row = comparison.contenders[1]
    assert (row.ratio_low, row.ratio_high) == (None, None)
    assert row.ratio > 0
    assert f"{row.ratio:.2f}" in shown(comparison)


def test_scored_texts_compare_by_all_tokens() -> None:
    workload = WORKLOAD.model_copy(update={"kind": "score"})
    comparison = compared(
        [
            (
                make_baseline_measurement(32, workload, num_iters=1, seed=seed),
                make_measurement(PLAN, workload, num_iters=1, seed=seed),
            )
            for seed in range(3)
        ],
        workload=workload,
        metric=SCORE_OBJECTIVE,
    )
    row = comparison.contenders[1]
    assert row.throughput > 0
    assert row.mean_ttft_ms is None
    assert "E2EL" in shown(comparison)


def test_the_table_fits_80_columns_and_escapes() -> None:
    plans = make_plan((8, 8, 7, 7), 8), make_plan((15, 15), 8, replicas=2)
    runs = [[make_measurement(plan, num_iters=1, seed=seed) for seed in range(3)] for plan in plans]
    text = shown(compared(list(zip(*runs, strict=True))))
    assert "un-pipelined [b]" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
