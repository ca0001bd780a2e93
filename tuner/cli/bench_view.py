"""What `bench` found, for people and for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipetune.bench import metrics
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.tuner.commands.bench import BenchResult, Comparison
from pipetune.tuner.progress import values_text
from pipetune.tuner.report.data import host_us_a_task
from pipetune.tuner.report.wording import compared_text, steps_text

_PLANS_FAULT = frozenset(
    {FailureKind.OVER_MEMORY_CAP, FailureKind.OUT_OF_MEMORY, FailureKind.WRONG_OUTPUT, FailureKind.TIMEOUT}
)
_SHOWN = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "bubble_ratio")
_SHOWN_OF_SCORES = ("total_token_throughput", "mean_e2el_ms", "bubble_ratio")
_MOST_SHOWN = 4
"""Stages whose times fit side by side."""


def exit_code(result: BenchResult) -> int:
    """0 with a measurement; 3 where the plan is at fault, 2 the model, 4 the machine or we."""
    if isinstance(result.outcome, Measurement):
        return 0
    if result.outcome.kind == FailureKind.UNSUPPORTED_MODEL:
        return 2
    return 3 if result.outcome.kind in _PLANS_FAULT else 4


def document(result: BenchResult) -> dict[str, Any]:
    """For `--json`."""
    outcome = result.outcome
    values: dict[str, Any] = {
        "schema_version": 1,
        "exit_code": exit_code(result),
        "plan": result.plan.model_dump(mode="json"),
        "in_flight": result.in_flight,
        "metrics": None,
        "stages": None,
        "check": None,
        "notes": [],
        "failure": None,
        "comparison": result.comparison.model_dump(mode="json") if result.comparison else None,
    }
    if isinstance(outcome, Failure):
        return values | {"failure": outcome.model_dump(mode="json")}
    return values | {
        "metrics": metrics.derive(outcome),
        "stages": {
            **{name: list(row) for name, row in metrics.stage_metrics(outcome).items()},
            "host_us_a_task": list(host_us_a_task(outcome)),
        },
        "load_s": outcome.load_s,
        "check_s": outcome.check_s,
        "prepare_s": outcome.prepare_s,
        "check": outcome.check.model_dump(mode="json") if outcome.check else None,
        "notes": [*outcome.notes, *outcome.telemetry.disturbances],
    }


def show(result: BenchResult, console: Console) -> None:
    """For people, in 80 columns."""
    outcome = result.outcome
    if isinstance(outcome, Failure):
        console.print(f"{result.plan.describe()}: {outcome.kind.value}: {outcome.message}", markup=False)
        return
    if result.comparison is not None:
        _show_comparison(result.comparison, console)
        if result.single_stage_missing:
            console.print(f"Without our single stage: {result.single_stage_missing}", markup=False)
    else:
        _show_one(result, outcome, console)
    _show_check(outcome, console)
    for note in (*outcome.notes, *outcome.telemetry.disturbances):
        console.print(f"note: {note}", markup=False)


def _show_one(result: BenchResult, outcome: Measurement, console: Console) -> None:
    derived = metrics.derive(outcome)
    console.print(f"{result.plan.describe()} · {result.in_flight} in flight", markup=False)
    console.print(values_text(derived, _SHOWN if "output_throughput" in derived else _SHOWN_OF_SCORES), markup=False)
    console.print()
    stages = metrics.stage_metrics(outcome)
    host_us = host_us_a_task(outcome)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("stage", "device", "layers", "busy", "waits", "host/task", "peak memory", "cap"):
        table.add_column(name, justify="left" if name in ("stage", "device", "layers") else "right")
    width = len(result.plan.stages)
    for index, device in enumerate(result.plan.devices):
        replica, own = divmod(index, width)
        stage = result.plan.stages[own]
        memory = outcome.memory[index] if index < len(outcome.memory) else None
        table.add_row(
            f"{replica}.{own}" if result.plan.replicas > 1 else str(own),
            escape(device),
            f"{stage.first_layer}-{stage.end_layer - 1}",
            f"{stages['stage_busy_ms'][index] / 1e3:.2f} s" if stages else "–",
            f"{stages['comm_ms'][index] / 1e3:.2f} s" if stages else "–",
            f"{host_us[index]:.0f} µs" if host_us else "–",
            f"{memory.peak_bytes / 2**20:.0f} MiB" if memory else "–",
            f"{memory.cap_bytes / 2**20:.0f} MiB" if memory else "–",
        )
    console.print(table)
    if result.plan.replicas > 1:
        console.print("stages are numbered replica.stage", markup=False)
    console.print(f"before the timed iterations: {steps_text(outcome)}", markup=False)


def _show_comparison(comparison: Comparison, console: Console) -> None:
    generates = all(row.mean_ttft_ms is not None for row in comparison.contenders)
    table = Table("", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("tok/s", "IQR", "×", "95 % interval", "bubble", "TTFT" if generates else "E2EL", "busy/stage"):
        table.add_column(name, justify="right")
    for row in comparison.contenders:
        console.print(f"{row.name}: {row.title}", markup=False)
        wait_ms = row.mean_ttft_ms if generates and row.mean_ttft_ms else row.mean_e2el_ms
        table.add_row(
            row.name,
            f"{row.throughput:.1f}",
            f"{row.iqr:.1f}",
            f"{row.ratio:.2f}",
            "–" if row.ratio_low is None else f"{row.ratio_low:.2f}–{row.ratio_high:.2f}",
            "–" if row.bubble_ratio is None else f"{100 * row.bubble_ratio:.0f} %",
            f"{wait_ms / 1e3:.2f} s",
            _busy_text(row.stage_busy_ms),
        )
    console.print()
    console.print(table)
    console.print(
        f"\nMedians of {comparison.rounds} interleaved rounds in random order; × is over the baseline, round by round.",
        markup=False,
    )


def _busy_text(stage_busy_ms: Sequence[float]) -> str:
    """Seconds of each stage, or of very many the least and the largest."""
    if not stage_busy_ms:
        return "–"
    shown = [f"{busy / 1e3:.2f}" for busy in stage_busy_ms]
    if len(shown) > _MOST_SHOWN:
        shown = [f"{min(stage_busy_ms) / 1e3:.2f}–{max(stage_busy_ms) / 1e3:.2f}"]
    return " ".join(shown) + " s"


def _show_check(outcome: Measurement, console: Console) -> None:
    check = outcome.check
    if check is None:
        console.print("output: not checked", markup=False)
        return
    tokens = {True: ", tokens equal", False: ", free-running tokens differ at near ties", None: ""}[check.tokens_equal]
    console.print(
        f"output: as the {check.reference} model says, {compared_text(check, scored=outcome.output_len == 0)}{tokens}",
        markup=False,
    )
