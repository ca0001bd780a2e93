"""What two stages lose against 2.0× one stage, by the rounds' traces: `python -m tests.evaluation.peers losses`.

In a round, with T1 the time of our single stage, which is never idle, W that of two stages and B the sum of what both
were busy, T1 / W = 2 · (T1 / B) · (B / 2W). T1 / B is what compute loses: to smaller micro-batches, to a memory and a
cache that two stages share. B / 2W is one less the bubble ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from pipetune.bench import metrics
from pipetune.bench.record import Measurement
from tests.evaluation.peers.values import Cell

COLUMNS = ("T1/W", "T1/B", "B/2W", "T1, s", "prefill of B, s", "decode of B, s")


def losses_table(cells: Iterable[Cell | None]) -> str:
    """Medians over each cell's rounds, as a Markdown table; cells without such rounds are left out."""
    lines = ["| model, workload | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    for cell in cells:
        rows = _rows(cell) if cell is not None else []
        if cell is not None and rows:
            medians = [statistics.median(column) for column in zip(*rows, strict=True)]
            values = " | ".join(f"{value:.2f}" for value in medians)
            lines.append(f"| {Path(cell.model.name).name}, {cell.workload_name} | {values} |")
    return "\n".join(lines) + "\n"


def _rows(cell: Cell) -> list[tuple[float, ...]]:
    rows: list[tuple[float, ...]] = []
    for one in cell.of_contest("generate"):
        found = {sample.side: sample for sample in one.samples}
        single, pipeline = found.get("single"), found.get("pipeline")
        if single is None or single.duration_s is None or pipeline is None or pipeline.measurement is None:
            continue
        measurement = pipeline.measurement
        t1, w = single.duration_s, measurement.iterations[0].duration_s
        busy = sum(metrics.stage_busy_s(measurement, 0))
        rows.append((t1 / w, t1 / busy, busy / (2 * w), t1, *_kinds(measurement)))
    return rows


def _kinds(measurement: Measurement) -> tuple[float, float]:
    """Seconds of compute over all stages: of prefill and of decode."""
    prefill = decode = 0.0
    for trace in measurement.iterations[0].stages:
        for task, start, end in zip(measurement.tasks, trace.compute_start_s, trace.compute_end_s, strict=True):
            if task.step:
                decode += end - start
            else:
                prefill += end - start
    return prefill, decode
