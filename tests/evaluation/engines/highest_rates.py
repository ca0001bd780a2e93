"""The highest rates of requests of our runtime and of vLLM on the same cores, each at the best of as many settings.

Limits are fixed first: multiples of what a request takes that runs alone, on the slower side. A side's settings are
compared on one trace; then come rounds, each with gaps of its own, the sides in random order and in fresh processes.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipetune.bench import metrics
from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.record import Measurement
from pipetune.bench.spec import Arrivals, EngineSettings, Goodput, Plan, Protocol, Workload
from tests.evaluation.engines.grid import DEVICES, KV_BYTES, SMOLLM2
from tests.evaluation.load.estimates import round_up
from tests.evaluation.load.lab import GATHERING, PILOT_SEED, STEADY, TPOT_FACTOR, TTFT_FACTOR
from tests.evaluation.load.rates_of import ATTAINMENT, best_setting
from tests.evaluation.load.sides import OurSetting

WORKLOAD = Workload(num_prompts=100, input_len=64, output_len=16, random_range_ratio=0.5, random_output_range_ratio=0.5)
_ALONE, _ALONE_RATE, _MOST_RATES = 8, 0.5, 8
_ROUGHLY = 0.2
"""How narrowly a setting's rate is looked for before the rounds."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One runtime, and what it may run with: plans, each with the devices that its workers are bound to."""

    name: str
    settings: tuple[tuple[tuple[str, ...], Plan], ...]
    start: Callable[..., Any] | None

    def measure(self, setting: tuple[tuple[str, ...], Plan], workload: Workload) -> dict[str, float]:
        """Metrics of a run in fresh processes."""
        devices, plan = setting
        protocol = Protocol(num_iters=1, num_iters_warmup=1, check_outputs=False)
        with Experiment.start(SMOLLM2.model, devices, start_fleet=self.start) as experiment:
            result = experiment.measure(plan, workload, protocol).result
        assert isinstance(result, Measurement), result
        return metrics.derive(result)


def sides(python: Path) -> tuple[Side, Side]:
    """Five settings each: two workers that share the layers, or with a copy each; of ours also with steps between
    prefills, of vLLM also one worker with all cores."""
    ours = [OurSetting(counts=(30,), rows=16, slots=1, replicas=2, lanes=own) for own in (STEADY, GATHERING)]
    ours += [OurSetting(counts=(30,), rows=rows, slots=1, replicas=2) for rows in (16, 8)]
    ours += [OurSetting(counts=(17, 13), rows=16, slots=2)]
    theirs = [_engine((30,), 256), *(_engine((30,), budget, replicas=2) for budget in (256, 128))]
    theirs += [_engine((15, 15), budget) for budget in (256, 128)]
    return (
        Side(name="pipetune", settings=tuple(map(_with_slots, ours)), start=None),
        Side(name="vLLM", settings=tuple(theirs), start=partial(VllmEngine, python=python)),
    )


def _with_slots(setting: OurSetting) -> tuple[tuple[str, ...], Plan]:
    return setting.devices, setting.plan.model_copy(update={"max_in_flight": setting.slots})


def _engine(counts: tuple[int, ...], budget: int, *, replicas: int = 1) -> tuple[tuple[str, ...], Plan]:
    devices = DEVICES[: len(counts) * replicas]
    settings = EngineSettings(max_num_batched_tokens=budget, kv_cache_memory_bytes=KV_BYTES, enforce_eager=True)
    plan = Plan.from_layer_counts(counts, devices, 1, replicas=replicas)
    return devices, plan.model_copy(update={"engine": settings})


def _under(rate: float, seed: int, limits: Goodput | None = None, **own: Any) -> Workload:
    arrivals = Arrivals(request_rate=float(f"{rate:.4g}"), seed=seed, most_rates=_MOST_RATES, **own)
    return WORKLOAD.model_copy(update={"arrivals": arrivals, "goodput": limits})


def compare(python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """The table, as Markdown."""
    both = sides(python)
    alone = _under(_ALONE_RATE, PILOT_SEED).model_copy(update={"num_prompts": _ALONE})
    seen = [side.measure(side.settings[0], alone) for side in both]
    ttft, tpot = (max(one[f"median_{name}_ms"] for one in seen) for name in ("ttft", "tpot"))
    limits = Goodput(ttft=round_up(TTFT_FACTOR * ttft), tpot=round_up(TPOT_FACTOR * tpot))
    say(f"limits: ttft {limits.ttft:g} ms, tpot {limits.tpot:g} ms")

    def share(side: Side, setting: tuple[tuple[str, ...], Plan], rate: float) -> float:
        found = side.measure(setting, _under(rate, PILOT_SEED, limits))["slo_attainment"]
        say(f"{side.name}, {setting[1].describe()}: {found:.1%} at {rate:g} requests/s")
        return found

    chosen, rates = {}, {side.name: list[float]() for side in both}
    guesses = {}
    for side in both:
        guess = 0.5 * side.measure(side.settings[0], WORKLOAD)["request_throughput"]
        best, guesses[side.name], _ = best_setting(
            side.settings, partial(share, side), guess=guess, tolerance=_ROUGHLY, most=_MOST_RATES
        )
        chosen[side.name] = best
        say(f"{side.name}: {best[1].describe()}")
    order = random.Random(0)
    for turn in range(rounds):
        for side in order.sample(both, 2):
            workload = _under(guesses[side.name], turn, limits, slo_attainment=ATTAINMENT)
            rates[side.name].append(side.measure(chosen[side.name], workload)["max_request_rate"])
            say(f"round {turn + 1} of {rounds}: {side.name}, {rates[side.name][-1]:.3g} requests/s")
    ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    lines = [
        f"| {name} | {chosen[name][1].describe()} | {statistics.median(own):.2f} ({min(own):.2f}–{max(own):.2f}) |"
        for name, own in rates.items()
    ]
    return "\n".join(
        (
            f"| runtime | best of {len(both[0].settings)} settings | highest requests/s: median (range) |",
            "|---|---|--:|",
            *lines,
            f"\npipetune over vLLM: {statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f}, {rounds} "
            f"rounds); {WORKLOAD.num_prompts} requests of {WORKLOAD.input_len} tokens in, {WORKLOAD.output_len} out, "
            f"each ± 50 %; {ATTAINMENT:.0%} within ttft {limits.ttft:g} ms and tpot {limits.tpot:g} ms, "
            f"{TTFT_FACTOR:g} and {TPOT_FACTOR:g} times a request alone on the slower side.",
        )
    )
