"""What the rounds say: ratios within a round, their spread, and how they stand to the aims. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipetune.bench.metrics import bubble, percentile
from tests.evaluation.peers.values import Cell, Contest

SIDES = {
    "pipeline": "ours, two stages",
    "pipeline_bare": "ours, two stages, not instrumented",
    "single": "ours, one stage on one worker",
    "single_plain": "ours, one stage, PyTorch's own weight layout",
    "replicas": "ours, two replicas of one stage",
    "hf_one": "HF generate, one worker's cores",
    "hf_all": "HF generate, all cores",
    "hf_two": "two processes of HF generate, half the prompts each",
    "hf_pp": "transformers' pp_size=2",
    "gpipe": "torch ScheduleGPipe, forward only",
    "score_pipeline": "ours, two stages, scoring",
    "score_single": "ours, one stage, scoring",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two sides of a contest and what is aimed at; without an aim the ratio is only shown."""

    contest: Contest
    ours: str
    peer: str
    aim: float | None = None
    single: str | None = None
    """Our own single stage in the same contest, to stand beside the peer as well."""


COMPARISONS = (
    Comparison(contest="generate", ours="pipeline", peer="hf_one", aim=1.85, single="single"),
    Comparison(contest="generate", ours="pipeline", peer="hf_all", aim=1.0, single="single"),
    Comparison(contest="generate", ours="pipeline", peer="hf_two", aim=0.9, single="single"),
    Comparison(contest="generate", ours="replicas", peer="hf_two", aim=1.0),
    Comparison(contest="generate", ours="pipeline", peer="hf_pp", aim=1.8, single="single"),
    Comparison(contest="score", ours="score_pipeline", peer="gpipe", aim=1.1, single="score_single"),
    Comparison(contest="generate", ours="pipeline", peer="single", aim=1.75),
    Comparison(contest="generate", ours="single", peer="single_plain"),
    Comparison(contest="instrument", ours="pipeline", peer="pipeline_bare", aim=0.99),
)

STEADY_AIM = 0.92
BUBBLE_AIM = 0.12
REPLAN_AIM_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A few numbers in short."""

    count: int
    median: float
    low: float
    high: float
    iqr: float


def spread(values: Sequence[float]) -> Spread | None:
    """Median, extremes and interquartile range; None of nothing."""
    if not values:
        return None
    return Spread(
        count=len(values),
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        iqr=percentile(values, 0.75) - percentile(values, 0.25),
    )


def pair_ratios(cell: Cell, contest: Contest, ours: str, peer: str) -> tuple[float, ...]:
    """Throughput of ours over the peer's, round by round, where both ran: > 1 means that ours was faster."""
    ratios = []
    for one in cell.of_contest(contest):
        durations = {sample.side: sample.duration_s for sample in one.samples}
        own_s, peer_s = durations.get(ours), durations.get(peer)
        if own_s and peer_s:
            ratios.append(peer_s / own_s)
    return tuple(ratios)


def throughput(cell: Cell, contest: Contest, side: str) -> Spread | None:
    """Tokens per second of one side over the rounds."""
    samples = [sample for one in cell.of_contest(contest) for sample in one.samples if sample.side == side]
    return spread([sample.tokens_per_s for sample in samples if sample.tokens_per_s])


def efficiency(cell: Cell) -> tuple[Spread, Spread] | None:
    """Steady-state utilisation and bubble ratio of our two stages over the rounds, from their records."""
    parts = [
        bubble(sample.measurement, 0)
        for one in cell.of_contest("generate")
        for sample in one.samples
        if sample.side == "pipeline" and sample.measurement is not None
    ]
    steady = spread([part["steady_utilization"] for part in parts if part])
    ratio = spread([part["bubble_ratio"] for part in parts if part])
    return (steady, ratio) if steady and ratio else None


def bound(cell: Cell, comparison: Comparison, ratio: float) -> float | None:
    """The ratio if the same tasks took as long and no stage ever waited: what their kernels' own times allow."""
    if comparison.ours != "pipeline" or comparison.contest != "generate" or (found := efficiency(cell)) is None:
        return None
    return ratio / (1 - found[1].median)


def verdict(value: float, aim: float | None, *, at_least: bool = True) -> str:
    """`met`, by how much it is missed, or that there is no aim."""
    if aim is None:
        return "shown"
    if value >= aim if at_least else value <= aim:
        return "met"
    return f"missed by {abs(value - aim) / aim:.0%}"
