"""Whole gates made by hand: one of each verdict, several cases, names that a format must escape."""

from __future__ import annotations

import numpy as np

from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.rule import judge
from pipetune.tuner.gate.values import EXIT_CODES, GateResult, Reason, verdict_of
from pipetune.tuner.stats.signed_rank import looks_for
from tests.record_factory import make_machine
from tests.tuner.gate.factory import make_case, make_pairs

METRIC = "mean_ttft_ms"


def make_result(shifts: dict[str, float | None], *, metric: str = METRIC) -> GateResult:
    """A gate of cases whose candidate is worse by so much; None stops one before its first look."""
    draws = np.random.default_rng(0)
    looks = looks_for(len(shifts))
    cases = tuple(make_case(name, {metric: Tolerance()}) for name in shifts)
    pairs, findings = [], []
    for case, shift in zip(cases, shifts.values(), strict=True):
        count = 4 if shift is None else 24
        own = make_pairs((draws.normal(shift or 0.0, 0.01, count)).tolist(), metric, case=case.name)
        finding = judge(case, metric, own, looks, because=Reason.OUT_OF_TIME)
        assert finding is not None
        pairs += own
        findings.append(finding)
    verdict = verdict_of(tuple(findings))
    machine = make_machine()
    return GateResult(
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        method="fresh_processes",
        findings=tuple(findings),
        cases=cases,
        pairs=tuple(pairs),
        order_seed=7,
        machines={"baseline": machine, "candidate": machine},
        started_at="2026-01-02T03:04:05+00:00",
        took_s=321.0,
        notes=("software differs: packages.torch: 2.11.0 → 2.13.0",),
    )
