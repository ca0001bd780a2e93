"""How far off costs may be before a plan was run: the priors of `regression`, by where the costs are from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Standard deviations of the terms before anything is seen; logs (0.1 is a tenth), but for `extra`."""

    all: float
    phase: float
    device: float
    device_phase: float
    size: float
    """SD of the step of the curve over sizes, each doubling."""
    cell: float
    """SD of the correction of one size on one device."""
    group: float
    """SD of layers of one shape against the others, in each phase."""
    ends: float
    """SD of a stage's ends against its layers, by phase and place in the pipeline."""
    extra: float
    """SD of extra time a task, in times of the smallest task of one layer, by phase and place in the pipeline."""
    contention: float = 0.1
    """SD of what other devices cost a task while all compute, by phase."""
    switches: float = 0.5
    """SD of one set of execution switches against the common one, in each phase."""
    drift: float = 0.04
    """SD of one record against the others: the drift of the machine."""
    task: float = 0.02
    """SD of the time of one kind of task on one stage, however many of them ran."""
    single_task: float = 0.10
    """SD of the time of a single task."""
    log_odds: float = 0.0
    """Logarithm of the odds of this prior against the others."""


MEASURED = Widths(
    all=0.05,
    phase=0.04,
    device=0.04,
    device_phase=0.02,
    size=0.02,
    cell=0.02,
    group=0.04,
    ends=0.1,
    extra=0.3,
)
"""For costs that were measured part by part: a whole pipeline differs from its parts by some hundredths."""
SCALED = dataclasses.replace(MEASURED, all=1.0, log_odds=-0.5)
"""The same, but the machine was slower or faster as a whole while they were measured."""
NOMINAL = Widths(
    all=1.0,
    phase=0.3,
    device=0.05,
    device_phase=0.03,
    size=0.1,
    cell=0.02,
    group=0.2,
    ends=0.3,
    extra=1.0,
    log_odds=-1.0,
)
"""For nominal rates, which may be far off, and in other ways for small and for large tasks; devices are alike."""
UNLIKE = dataclasses.replace(NOMINAL, device=0.5, device_phase=0.2, log_odds=-1.5)
"""The same for devices that are not."""
PRIORS = (MEASURED, SCALED, NOMINAL, UNLIKE)
