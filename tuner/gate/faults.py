"""What ends a comparison whatever the numbers say: runs that failed, say nothing, or hold no number. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipetune.tuner.gate.values import Reason, Sample, SideName

Fault = tuple[Reason, str]
"""Why nothing can be compared, and that in words."""


def fault_of(metric: str, side: SideName, run: Sample) -> Fault | None:
    """Why a run yields no number to compare; None where it does."""
    if run.not_comparable is not None:
        return Reason.NOT_COMPARABLE, run.not_comparable
    if run.failure is not None:
        failed = Reason.CANDIDATE_FAILED if side == "candidate" else Reason.BASELINE_FAILED
        return failed, f"{run.failure.kind.value}: {run.failure.message}"
    if metric not in run.metrics:
        return Reason.MISSING_METRIC, f"there is no {metric}; there are: {', '.join(run.metrics) or 'none'}"
    value = run.metrics[metric]
    if not (math.isfinite(value) and value > 0):
        return Reason.NOT_FINITE, f"{metric} is {value}, of which there is no ratio"
    return None


def unsteady_of(side: SideName, runs: Sequence[Sample]) -> Fault | None:
    """Whether more than a third of a side's runs never got steady."""
    unsteady = sum(not run.steady for run in runs)
    if 3 * unsteady <= len(runs):
        return None
    return Reason.NEVER_STEADY, (
        f"{unsteady} of {len(runs)} runs of the {side} never got steady; give them more warm-up "
        "(protocol.max_warmup), or look at what else the machine does"
    )
