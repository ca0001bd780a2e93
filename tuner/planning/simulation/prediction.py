"""What a simulated run says of its plan: its metrics, and where the time goes that it takes beyond the best.

A run takes `duration_s`. All work spread evenly over its devices would take `ideal_s`; no schedule of these stages
takes less than the busiest of them, `bound_s`; the rest is time in which that stage has nothing to do:

    duration = ideal + imbalance (bound - ideal) + fill and drain (before its first and after its last task) + waits
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipetune.bench.metrics import LATENCIES, PERCENTILES, samples_needed
from pipetune.bench.spec import Goodput
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.simulation.schedule import PromptTasks, Timeline

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

    sequence: PromptTasks
    timeline: Timeline
    busy_s: Floats
    """`[stage, plan]`, over the run."""


def predictions_of(
    runs: Sequence[SimulatedRun],
    *,
    prompt_lens: Sequence[int],
    output_lens: Sequence[int],
    num_stages: int,
    goodput: Goodput | None = None,
) -> list[Prediction]:
    """One prediction of each plan, derived from simulated times as `bench.metrics.derive` does from measured ones.

    `runs` are of the replicas that have prompts, and `num_stages` counts those of all; lengths are as in `CostModel`.
    """
    duration_s: Floats = np.max([run.timeline.last_ends_s[-1] for run in runs], axis=0)
    busy_s = _of_stages([run.busy_s for run in runs], num_stages)
    ended_s = _of_stages([run.timeline.ended_s for run in runs], num_stages)
    active_s = ended_s - _of_stages([run.timeline.began_s for run in runs], num_stages)
    num_prompts, output_tokens = len(prompt_lens), sum(output_lens)
    metrics = {"output_throughput": output_tokens / duration_s} if output_tokens else {}
    metrics |= {
        "total_token_throughput": (sum(prompt_lens) + output_tokens) / duration_s,
        "request_throughput": num_prompts / duration_s,
        "duration_s": duration_s,
        **_latencies(runs, num_prompts, goodput, duration_s),
        **_bubble(duration_s, busy_s, active_s),
        "comm_ms": (ended_s - busy_s).sum(axis=0) * 1e3,
    }
    rows = np.stack(list(metrics.values())).T.tolist()
    limiting = busy_s.argmax(axis=0)
    bound, ideal = busy_s.max(axis=0), busy_s.mean(axis=0)
    fill_drain = duration_s - active_s[limiting, np.arange(len(bound))]
    losses = np.stack([bound - ideal, fill_drain, duration_s - bound - fill_drain])
    limits: tuple[Limit, ...] = ("imbalance", "fill and drain", "waits")
    worst = losses.argmax(axis=0)
    heavy = losses.max(axis=0) > _NOTICEABLE * duration_s
    return [
        Prediction(
            duration_s=float(duration_s[plan]),
            metrics=dict(zip(metrics, rows[plan], strict=True)),
            stage_busy_s=tuple(busy),
            limiting_stage=int(limiting[plan]),
            limited_by=limits[worst[plan]] if heavy[plan] else "compute",
            bound_s=float(bound[plan]),
            ideal_s=float(ideal[plan]),
        )
        for plan, busy in enumerate(busy_s.T.tolist())
    ]


def _of_stages(parts: Sequence[Floats], num_stages: int) -> Floats:
    """`[stage, plan]` over all replicas; zeros for those without prompts."""
    together = np.concatenate(parts)
    idle = np.zeros((num_stages - len(together), together.shape[1]))
    return np.concatenate([together, idle]) if len(idle) else together


def _latencies(
    runs: Sequence[SimulatedRun], num_prompts: int, goodput: Goodput | None, duration_s: Floats
) -> dict[str, Floats]:
    """`[plan]` by metric."""

    def known(seconds: str, tasks: str) -> Floats:
        """`[prompt, plan]`, in an order of their own."""
        return np.concatenate([getattr(run.timeline, seconds)[getattr(run.sequence, tasks)] for run in runs])

    last, first = known("last_ends_s", "last_tokens"), known("last_ends_s", "first_tokens")
    found = {"queue": known("first_starts_s", "begins"), "e2el": last}
    lens = np.concatenate([run.sequence.output_lens for run in runs])
    if lens.max() > 0:
        found["ttft"] = first
    if lens.max() > 1:
        found["tpot"] = (last - first) / np.maximum(lens - 1, 1)[:, None]
    values = {}
    if goodput is not None:
        kept = [found[name] <= limit / 1e3 for name, limit in goodput.limits.items() if name in found]
        good = np.all(kept, axis=0).sum(axis=0)
        values = {"request_goodput": good / duration_s, "slo_attainment": good / num_prompts}
    if "tpot" in found:
        found["tpot"] = found["tpot"][lens > 1]
    labels = {"median": 0.5} | {label: q for label, q in PERCENTILES.items() if num_prompts >= samples_needed(q)}
    for name in (name for name in LATENCIES if name in found):
        values[f"mean_{name}_ms"] = np.sort(found[name], axis=0).mean(axis=0) * 1e3
        quantiles = np.quantile(found[name], list(labels.values()), axis=0) * 1e3
        values |= {f"{label}_{name}_ms": of_plans for label, of_plans in zip(labels, quantiles, strict=True)}
    return values


def _bubble(duration_s: Floats, busy_s: Floats, active_s: Floats) -> dict[str, Floats]:
    """`[plan]` by metric; of the arguments the last two are `[stage, plan]`."""
    area = len(busy_s) * duration_s
    busy, active = busy_s.sum(axis=0), active_s.sum(axis=0)
    ratio, fill_drain = 1.0 - busy / area, 1.0 - active / area
    uneven = (busy_s.max(axis=0) - busy_s).sum(axis=0) / area
    imbalance = np.minimum(uneven, np.maximum(ratio - fill_drain, 0.0))
    return {
        "bubble_ratio": ratio,
        "bubble_fill_drain": fill_drain,
        "bubble_imbalance": imbalance,
        "bubble_wait": ratio - fill_drain - imbalance,
        "steady_utilization": busy / active,
    }
