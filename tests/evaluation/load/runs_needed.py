"""Part 5: how many runs the search for the highest rate takes, on loads that are simulated; and how often a gate calls
a plan's rate worse than its own.

Shares come from curves: of a plan and a trace, over a grid of rates, simulated once with nominal costs. A run has a
speed of its own, so that its share is the curve's at another rate; the guess is the curves' median, as a prediction
would have it, with an error. Nothing here is measured on the machine.
"""

from __future__ import annotations

import bisect
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipetune.bench.load.rates import RateSearch, estimate
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import Workload
from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.values import Verdict
from pipetune.tuner.planning.simulation.load import LoadedRequest, simulate_load
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.stats.signed_rank import looks_for
from tests.evaluation.gate.power import judged
from tests.evaluation.harness import say
from tests.evaluation.load.estimates import Limits, Served, interval, limits_of
from tests.evaluation.load.lab import TPOT_FACTOR, TTFT_FACTOR, Subject
from tests.evaluation.load.predicted import simulated_share
from tests.evaluation.load.rates_of import ATTAINMENT, search_from
from tests.evaluation.load.sides import OurSetting, Trace
from tests.evaluation.load.values import Row

AIM_RUNS, AIM_ERROR, AIM_ALARMS = 4, 0.03, 5.0
SPEEDS_SD = {"still": 0.0, "quiet": 0.012, "typical": 0.024, "noisy": 0.046}
"""By how much runs of one plan differ in speed, in logarithms: the machines of `make bench-gate`, and none."""
GUESS_SD = 0.05
"""By how much a prediction is wrong."""
MOST = 15
_SPAN, _POINTS = 1.6, 81
"""Rates of a curve: this factor to both sides of its crossing, so many."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Shares over rates, of one plan and trace; between points in a straight line over the logarithm of the rate."""

    rates: tuple[float, ...]
    shares: tuple[float, ...]

    def at(self, rate: float) -> float:
        """The share at a rate; beyond the ends theirs."""
        place = bisect.bisect(self.rates, rate)
        if place in (0, len(self.rates)):
            return self.shares[min(place, len(self.rates) - 1)]
        low, high = self.rates[place - 1], self.rates[place]
        part: float = math.log(rate / low) / math.log(high / low)
        return self.shares[place - 1] + part * (self.shares[place] - self.shares[place - 1])

    def crossing(self, wanted: float) -> float:
        """The lowest rate at which the share falls below what is wanted."""
        for place in range(1, len(self.rates)):
            if self.shares[place] < wanted:
                above, below = self.shares[place - 1], self.shares[place]
                part: float = min(max((above - wanted) / (above - below), 0.0), 1.0) if above > below else 0.0
                return self.rates[place - 1] * math.pow(self.rates[place] / self.rates[place - 1], part)
        return self.rates[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repetition:
    """One simulated search."""

    highest: float
    runs: int
    """Until two rates enclose it narrowly, or no run was left."""
    is_narrow: bool
    error: float | None
    """Of what was found, against the curve's crossing."""
    early_error: float | None
    """The same after as many runs as are aimed at."""


def repeat(
    curve: Curve, guess: float, source: random.Random, *, tolerance: float = AIM_ERROR, speed_sd: float
) -> Repetition:
    """One search on a curve, with runs of unlike speed."""
    search = RateSearch(wanted=ATTAINMENT, guess=guess, tolerance=tolerance, most=MOST)
    truth = curve.crossing(ATTAINMENT)
    early: float | None = None
    while (rate := search.next()) is not None:
        search.shares[rate] = curve.at(rate * math.exp(source.gauss(0.0, speed_sd)))
        if len(search.shares) == AIM_RUNS:
            early = estimate(search.shares, search.wanted)
    found = estimate(search.shares, search.wanted)
    if len(search.shares) < AIM_RUNS:
        early = found
    return Repetition(
        highest=search.highest,
        runs=len(search.shares),
        is_narrow=search.is_narrow,
        error=None if found is None else abs(found / truth - 1),
        early_error=None if early is None else abs(early / truth - 1),
    )


def curves_of(
    model: CostModel, settings: Sequence[OurSetting], workload: Workload, *, traces: int, points: int
) -> dict[str, list[Curve]]:
    """Curves of each plan, a trace each; limits are multiples of what a request alone is predicted to take."""
    prompts = [(0,) * length for length in model.prompt_lens]

    def trace_of(seed: int) -> Trace:
        return Trace.drawn(prompts, workload.generated_lens, max_len=0, seed=seed)

    found = {}
    for setting in settings:
        limits = _limits(model, setting)
        curves = []
        for seed in range(traces):
            trace = trace_of(seed)

            def share(rate: float, trace: Trace = trace, setting: OurSetting = setting, of: Limits = limits) -> float:
                return simulated_share(model, setting, trace, of, rate)

            middle = search_from(10.0, tolerance=0.02).run(share)
            rates = tuple(middle * _SPAN ** (2 * index / (points - 1) - 1) for index in range(points))
            curves.append(Curve(rates=rates, shares=tuple(map(share, rates))))
        found[setting.name] = curves
        say(f"simulated: {setting.name}, {traces} traces of {len(prompts)} requests")
    return found


def _limits(model: CostModel, setting: OurSetting) -> Limits:
    request = LoadedRequest(at_s=0.0, prompt_len=max(model.prompt_lens), output_len=max(model.output_lens))
    times_s = simulate_load(model, setting.plan, setting.slots, [request]).times_s
    first, each = times_s["ttft"][0], times_s["tpot"][0]
    alone = Served(at_s=0.0, times_s=tuple(first + each * index for index in range(request.output_len)))
    return limits_of([[alone]], ttft_factor=TTFT_FACTOR, tpot_factor=TPOT_FACTOR)


def compare(subject: Subject, name: str, *, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """Many searches on each kind of machine, each on a curve drawn at random."""
    requests, traces, points, repetitions = (100, 2, 25, 50) if quick else (500, 8, 41, 1000)
    settings = (subject.pair,) if quick else (subject.ours[0], subject.ours[1], subject.pair)
    workload = subject.workload(requests)
    source = random.Random(0)
    spread = subject.input_len // 2
    lens = [source.randint(subject.input_len - spread, subject.input_len + spread) for _ in range(requests)]
    model = CostModel.of_workload(describe_model(resolve_model(subject.model)), workload, lens)
    curves = curves_of(model, settings, workload, traces=traces, points=points)
    predictions = {key: statistics.median(curve.crossing(ATTAINMENT) for curve in own) for key, own in curves.items()}
    rows, raw = [], {"predictions": predictions, "guess_sd": GUESS_SD, "speed_sd": SPEEDS_SD}
    for machine, speed_sd in SPEEDS_SD.items():
        done = []
        for _ in range(repetitions):
            key = source.choice(list(curves))
            guess = predictions[key] * math.exp(source.gauss(0.0, GUESS_SD))
            done.append(repeat(source.choice(curves[key]), guess, source, speed_sd=speed_sd))
        rows += rows_of(done, f"{name}, {machine} machine, {speed_sd:.1%}")
        raw[f"runs_{machine}"] = [one.runs for one in done]
    every = [(predictions[key], curve) for key, own in curves.items() for curve in own]
    rows += [_alarms(every, machine, source, gates=repetitions, note=name) for machine in SPEEDS_SD]
    return rows, raw


def _alarms(
    curves: Sequence[tuple[float, Curve]], machine: str, source: random.Random, *, gates: int, note: str
) -> Row:
    """How often the gate fails a plan beside itself: each pair of searches begins from one guess, on one trace."""
    looks, tolerance = looks_for(1), Tolerance(margin=0.05)

    def difference() -> float:
        guess, curve = source.choice(curves)
        rates = [repeat(curve, guess, source, speed_sd=SPEEDS_SD[machine]).highest for _ in range(2)]
        # Where no rate was sustained within the runs, the pair says that one is infinitely worse.
        return math.log(max(rates[0], 1e-9) / max(rates[1], 1e-9))

    failed = 0
    for _ in range(gates):
        differences = np.array([[difference() for _ in range(looks[-1].pairs)]])
        failed += judged(differences, looks, tolerance).verdict is Verdict.FAIL
    return Row(
        name="null: a plan's highest rate called worse than its own",
        value=100 * failed / gates,
        n=gates,
        of="gates",
        aim=AIM_ALARMS,
        at_least=False,
        unit="%",
        note=f"{note}, {machine} machine, {SPEEDS_SD[machine]:.1%}",
    )


def rows_of(done: Sequence[Repetition], place: str) -> list[Row]:
    """How many runs searches took, and how far from the truth they ended."""
    counts = [float(one.runs) for one in done]
    within = sum(one.is_narrow and one.runs <= AIM_RUNS for one in done) / len(done)
    low, high = interval(counts, statistics.fmean)
    rows = [
        Row(
            name=f"runs until the highest rate is enclosed to {AIM_ERROR:.0%}, mean",
            value=statistics.fmean(counts),
            low=low,
            high=high,
            n=len(counts),
            of="searches",
            aim=AIM_RUNS,
            at_least=False,
            note=f"{place}; median {statistics.median(counts):.0f}, {within:.0%} within {AIM_RUNS}, "
            f"most {max(counts):.0f}",
        )
    ]
    for label, errors in (
        (f"after {AIM_RUNS} runs", [one.early_error for one in done]),
        ("at the end", [one.error for one in done]),
    ):
        values = [100 * error for error in errors if error is not None]
        if values:
            low, high = interval(values)
            good = sum(value <= 100 * AIM_ERROR for value in values) / len(done)
            rows.append(
                Row(
                    name=f"error of the highest rate {label}, median",
                    value=statistics.median(values),
                    low=low,
                    high=high,
                    n=len(values),
                    of="searches",
                    aim=100 * AIM_ERROR,
                    at_least=False,
                    unit="%",
                    note=f"{place}; {good:.0%} of all within",
                )
            )
    return rows
