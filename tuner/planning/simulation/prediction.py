"""What a simulated run says of its plan: its metrics, and where the time goes that it takes beyond the best.

A run takes `duration_s`. All work spread evenly over its devices would take `ideal_s`; no schedule of these stages
takes less than the busiest of them, `bound_s`; the rest is time in which that stage has nothing to do:

    duration = ideal + imbalance (bound - ideal) + fill and drain (before its first and after its last task) + waits
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipetune.bench.metrics import LATENCIES, PERCENTILES, samples_needed
from pipetune.tuner.planning.simulation.schedule import TaskSequence, Timeline

Floats = npt.NDArray[np.float64]
Limit = Literal["compute", "imbalance", "fill and drain", "waits"]

_NOTICEABLE = 0.01
"""Share of the duration below which a loss limits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run of a plan is thought to give."""

    duration_s: float
    metrics: dict[str, float]
    """Metrics by the names of `bench.metrics` that follow from the schedule; memory is not among them."""
    stage_busy_s: tuple[float, ...]
    """Compute of each stage over the run; of several replicas, one after the other."""
    limiting_stage: int
    """The busiest, by its place in `stage_busy_s`."""
    limited_by: Limit
    """The largest loss against `ideal_s`; `compute` where there is none to speak of."""
    bound_s: float
    """No schedule of these stages takes less: the busiest stage's compute."""
    ideal_s: float
    """All work spread evenly over the plan's devices."""


@dataclass(frozen=True, eq=False, slots=True)
class SimulatedRun:
    """One replica of many plans."""

    sequence: TaskSequence
    timeline: Timeline
    busy_s: Floats
    """`[stage, plan]`, over the run."""


def predictions_of(
    runs: Sequence[SimulatedRun], *, prompt_lens: Sequence[int], output_len: int, num_stages: int
) -> list[Prediction]:
    """One prediction of each plan.

    Args:
        runs: of the replicas that have prompts.
        prompt_lens: of all prompts, tokens.
        output_len: tokens generated for each; 0 where texts are scored.
        num_stages: of all replicas.
    """
    return _Outcome(runs, prompt_lens, output_len, num_stages).predictions()


class _Outcome:
    """What all replicas of many plans give together."""

    def __init__(
        self, runs: Sequence[SimulatedRun], prompt_lens: Sequence[int], output_len: int, num_stages: int
    ) -> None:
        self.runs, self.prompt_lens, self.output_len, self.num_stages = runs, prompt_lens, output_len, num_stages
        self.duration_s: Floats = np.max([run.timeline.last_ends_s[-1] for run in runs], axis=0)
        self.busy_s = self._of_stages([run.busy_s for run in runs])
        self.began_s = self._of_stages([run.timeline.began_s for run in runs])
        self.ended_s = self._of_stages([run.timeline.ended_s for run in runs])

    def predictions(self) -> list[Prediction]:
        """One of each plan."""
        metrics = self._metrics()
        names, rows = list(metrics), np.stack(list(metrics.values())).T.tolist()
        limiting = self.busy_s.argmax(axis=0)
        bound = self.busy_s.max(axis=0)
        ideal = self.busy_s.mean(axis=0)
        plans = np.arange(len(bound))
        fill_drain = self.duration_s - (self.ended_s - self.began_s)[limiting, plans]
        losses = np.stack([bound - ideal, fill_drain, self.duration_s - bound - fill_drain])
        limits: tuple[Limit, ...] = ("imbalance", "fill and drain", "waits")
        worst = losses.argmax(axis=0)
        heavy = losses.max(axis=0) > _NOTICEABLE * self.duration_s
        busy = self.busy_s.T.tolist()
        return [
            Prediction(
                duration_s=float(self.duration_s[plan]),
                metrics=dict(zip(names, rows[plan], strict=True)),
                stage_busy_s=tuple(busy[plan]),
                limiting_stage=int(limiting[plan]),
                limited_by=limits[worst[plan]] if heavy[plan] else "compute",
                bound_s=float(bound[plan]),
                ideal_s=float(ideal[plan]),
            )
            for plan in range(len(bound))
        ]

    def _of_stages(self, parts: Sequence[Floats]) -> Floats:
        """`[stage, plan]` over all replicas; zeros for those without prompts."""
        together = np.concatenate(parts)
        idle = np.zeros((self.num_stages - len(together), together.shape[1]))
        return np.concatenate([together, idle]) if len(idle) else together

    def _metrics(self) -> dict[str, Floats]:
        """`[plan]` by metric, derived from simulated times as `bench.metrics.derive` does from measured ones."""
        num_prompts = len(self.prompt_lens)
        output_tokens = num_prompts * self.output_len
        values = {"output_throughput": output_tokens / self.duration_s} if output_tokens else {}
        values |= {
            "total_token_throughput": (sum(self.prompt_lens) + output_tokens) / self.duration_s,
            "request_throughput": num_prompts / self.duration_s,
            "duration_s": self.duration_s,
        }
        for name, samples in self._latencies().items():
            ordered = np.sort(samples, axis=0)
            values[f"mean_{name}_ms"] = ordered.mean(axis=0) * 1e3
            values[f"median_{name}_ms"] = _quantile(ordered, 0.5) * 1e3
            for label, quantile in PERCENTILES.items():
                if num_prompts >= samples_needed(quantile):
                    values[f"{label}_{name}_ms"] = _quantile(ordered, quantile) * 1e3
        area = self.num_stages * self.duration_s
        busy, active = self.busy_s.sum(axis=0), (self.ended_s - self.began_s).sum(axis=0)
        ratio = 1.0 - busy / area
        fill_drain = 1.0 - active / area
        uneven = (self.busy_s.max(axis=0) - self.busy_s).sum(axis=0) / area
        imbalance = np.minimum(uneven, np.maximum(ratio - fill_drain, 0.0))
        return values | {
            "bubble_ratio": ratio,
            "bubble_fill_drain": fill_drain,
            "bubble_imbalance": imbalance,
            "bubble_wait": ratio - fill_drain - imbalance,
            "steady_utilization": busy / active,
            "comm_ms": (self.ended_s - self.busy_s).sum(axis=0) * 1e3,
        }

    def _latencies(self) -> dict[str, Floats]:
        """`[prompt, plan]`, seconds, in an order of their own."""

        def known(seconds: str, tasks: str) -> Floats:
            return np.concatenate([getattr(run.timeline, seconds)[getattr(run.sequence, tasks)] for run in self.runs])

        last = known("last_ends_s", "last_tokens")
        first = known("last_ends_s", "first_tokens")
        found = {"queue": known("first_starts_s", "begins"), "e2el": last}
        if self.output_len > 0:
            found["ttft"] = first
        if self.output_len > 1:
            found["tpot"] = (last - first) / (self.output_len - 1)
        return {name: found[name] for name in LATENCIES if name in found}


def _quantile(ordered: Floats, quantile: float) -> Floats:
    """Quantile along the first, sorted axis, interpolated as in `bench.metrics.percentile`."""
    position = quantile * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    values: Floats = ordered[low] + (ordered[high] - ordered[low]) * (position - low)
    return values
