"""Memory predicted against memory measured, stage by stage, over a landscape.

    python -m tests.evaluation.search memory smollm2-prefill-heavy

Predicted is what `bench.memory` accounts for; measured is the peak of the worker's resident set while the plan was
timed. Both are compared whole, with what the process took before any model was loaded, and without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipetune.bench.memory import ModelShape, stage_bytes
from pipetune.bench.record import Measurement, Record


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryErrors:
    """Relative errors of one stage's memory over many runs: predicted / measured - 1."""

    stage: int
    runs: int
    under: int
    """How many of them took more than was predicted."""
    median: float
    worst_over: float
    """The largest; 0 if none lies above."""
    worst_under: float
    """The least; 0 if none lies below."""
    own_median: float
    """The same without what the process took before any model was loaded."""
    own_worst_over: float
    own_worst_under: float


def memory_errors(shape: ModelShape, records: Iterable[Record]) -> tuple[MemoryErrors, ...]:
    """Errors by stage; runs that gave no measurement are left out."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for record in records:
        result, effective = record.result, record.effective
        if not isinstance(result, Measurement) or effective is None:
            continue
        plan = effective.plan
        for place, seen in enumerate(result.memory):
            replica, index = divmod(place, len(plan.stages))
            need = stage_bytes(
                shape,
                plan.replica(replica),
                index,
                prompt_len=max(result.prompt_lens),
                output_len=result.output_len,
            )
            predicted = need.total(effective.in_flight)
            found.setdefault(index, []).append((predicted, seen.peak_bytes - seen.baseline_bytes, seen.baseline_bytes))
    return tuple(_errors(stage, rows) for stage, rows in sorted(found.items()))


def _errors(stage: int, rows: Sequence[tuple[int, int, int]]) -> MemoryErrors:
    predicted, own, baseline = np.array(rows, dtype=float).T
    whole = (predicted + baseline) / (own + baseline) - 1.0
    alone = predicted / own - 1.0
    return MemoryErrors(
        stage=stage,
        runs=len(rows),
        under=int(np.sum(whole < 0.0)),
        median=float(np.median(whole)),
        worst_over=float(max(whole.max(), 0.0)),
        worst_under=float(min(whole.min(), 0.0)),
        own_median=float(np.median(alone)),
        own_worst_over=float(max(alone.max(), 0.0)),
        own_worst_under=float(min(alone.min(), 0.0)),
    )


def describe(errors: Sequence[MemoryErrors]) -> str:
    """As a Markdown table, in per cent."""
    lines = [
        "| stage | runs | of them under | process: median | most over | most under "
        "| model alone: median | most over | most under |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in errors:
        shares = (
            row.median,
            row.worst_over,
            row.worst_under,
            row.own_median,
            row.own_worst_over,
            row.own_worst_under,
        )
        cells = " | ".join(f"{100 * share:+.1f} %" for share in shares)
        lines.append(f"| {row.stage} | {row.runs} | {row.under} | {cells} |")
    return "\n".join(lines)
