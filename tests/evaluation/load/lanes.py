"""Part 7: plans with lanes against plans without, where short prompts and long ones come together, and where all are
alike.

The limits of either length are multiples of what such a request takes alone, found before any rate is measured. Each
side has as many settings and as many runs to choose by; then rounds, each with a trace that neither has seen.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipetune.bench.spec import Lane, Workload
from tests.evaluation.harness import say
from tests.evaluation.load.estimates import Limits, Served, interval, limits_of
from tests.evaluation.load.lab import PILOT_SEED, TPOT_FACTOR, TTFT_FACTOR, Lab
from tests.evaluation.load.rates_of import best_setting, find_together
from tests.evaluation.load.sides import OurSetting, Trace, serve, serve_alone
from tests.evaluation.load.values import Row

SHORT, LONG, SHARE_OF_LONG, OUTPUT_LEN = 16, 512, 0.15, 16
AIMS = {"mixed": 1.15, "uniform": 0.99}
"""Of the ratio of rates, with lanes over without."""


def grids(counts: tuple[int, ...]) -> dict[str, tuple[OurSetting, ...]]:
    """As many settings of each side."""
    short, long = Lane(up_to_tokens=SHORT, weight=4), Lane(prefills_per_decode=1)
    both, own = (short, long), (short.model_copy(update={"slots": 1}), long)

    def ours(rows: int, slots: int, chunk: int | None, lanes: tuple[Lane, ...] = ()) -> OurSetting:
        return OurSetting(counts=counts, rows=rows, slots=slots, chunk=chunk, lanes=lanes)

    return {
        "without": (
            *(ours(16, 2, chunk) for chunk in (64, 128, None)),
            ours(32, 1, 64),
            ours(32, 1, 128),
            ours(8, 4, 64),
        ),
        "with": (
            *(ours(16, 2, chunk, both) for chunk in (64, 128)),
            ours(16, 2, 64, own),
            *(ours(32, 1, chunk, both) for chunk in (64, 128)),
            ours(8, 4, 64, own),
        ),
    }


def trace_of(lab: Lab, seed: int, count: int, lens: Sequence[int]) -> Trace:
    """Requests whose prompts have some of these lengths, drawn with the gaps."""
    from pipetune.bench.worker.prompts import random_prompts

    long = random.Random(seed)
    input_lens = tuple(lens[-1] if long.random() < SHARE_OF_LONG else lens[0] for _ in range(count))
    workload = Workload(num_prompts=count, input_lens=input_lens, output_len=OUTPUT_LEN)
    prompts = random_prompts(workload, lab.vocab_size)
    return Trace.drawn(prompts, workload.generated_lens, max_len=max(lens) + OUTPUT_LEN, seed=seed)


def share(lab: Lab, limits: Mapping[int, Limits], trace: Trace, setting: OurSetting, rate: float) -> float:
    """The share of requests that keep the limits of their length, of the length that fares worse."""
    served: dict[int, list[Served]] = {}
    for prompt, one in zip(trace.prompts, serve(lab.ours, setting, trace, rate, used=lab.used), strict=True):
        served.setdefault(len(prompt), []).append(one)
    shares = {length: limits[length].share(own) for length, own in sorted(served.items())}
    told = ", ".join(f"{own:.1%} of {length}" for length, own in shares.items())
    say(f"{setting.name}: {told} at {rate:g} requests/s")
    return min(shares.values())


def compare(lab: Lab, name: str) -> tuple[list[Row], dict[str, Any], str]:
    """The ratio of the highest rates, on mixed lengths and on uniform ones, and what was run, in words."""
    count, sides = lab.requests, grids(lab.subject.pair.counts)
    if lab.extent.is_short:
        sides = {side: settings[:2] for side, settings in sides.items()}
    limits, runs = {}, dict.fromkeys(sides, 0)
    for length in (SHORT, LONG):
        alone = trace_of(lab, PILOT_SEED, lab.extent.alone, [length])
        found = serve_alone(lab.ours, sides["without"][0], alone, lab.extent.alone, used=lab.used)
        limits[length] = limits_of([found], ttft_factor=TTFT_FACTOR, tpot_factor=TPOT_FACTOR)
        say(f"limits of {length} tokens: ttft {limits[length].ttft:g} ms, tpot {limits[length].tpot:g} ms")
    pilot = trace_of(lab, PILOT_SEED, max(8, round(count * lab.extent.pilot_share)), [SHORT, LONG])
    guess = _half_of_all(lab, sides["without"][0], pilot)
    chosen: dict[str, OurSetting] = {}
    guesses: dict[str, float] = {}

    def counted(side: str, setting: OurSetting, rate: float) -> float:
        runs[side] += 1
        return share(lab, limits, pilot, setting, rate)

    for side, settings in sides.items():
        chosen[side], guesses[side], _ = best_setting(
            settings,
            partial(counted, side),
            guess=guess,
            tolerance=lab.extent.pilot_tolerance,
            most=lab.extent.pilot_runs,
        )
        say(f"{side} lanes: {chosen[side].name}")
    rows, raw = [], {"limits": {str(key): [one.ttft, one.tpot] for key, one in limits.items()}, "pilot_runs": runs}
    for kind, lens in (("mixed", [SHORT, LONG]), ("uniform", [LONG])):
        rates: dict[str, list[float]] = {side: [] for side in sides}
        if kind == "uniform":
            guesses = dict.fromkeys(sides, _half_of_all(lab, chosen["without"], trace_of(lab, PILOT_SEED, 24, lens)))
        for number in range(lab.extent.rounds):
            # All long, they come as many times less often, and a quarter has more long ones than the mixed trace.
            trace = trace_of(lab, number, count if kind == "mixed" else max(8, count // 4), lens)
            searches = find_together(
                {side: partial(share, lab, limits, trace, setting) for side, setting in chosen.items()},
                guesses,
                order=lab.order,
                tolerance=lab.extent.tolerance,
                most=lab.extent.runs,
            )
            for side, search in searches.items():
                rates[side].append(search.highest)
            guesses = {side: search.highest or min(search.shares) for side, search in searches.items()}
            say(f"{kind}, round {number}: " + ", ".join(f"{side} {own[-1]:.3g}/s" for side, own in rates.items()))
        raw[kind] = rates
        rows += _rows(name, kind, rates, chosen)
    told = (
        f"{name}: {count} requests a trace, {SHARE_OF_LONG:.0%} of them {LONG} tokens and the others {SHORT}, uniform: "
        f"a quarter as many, all {LONG}; {OUTPUT_LEN} out; within "
        + " and ".join(f"ttft {one.ttft:g} ms, tpot {one.tpot:g} ms ({length})" for length, one in limits.items())
        + f", {TTFT_FACTOR:g} and {TPOT_FACTOR:g} times a request alone; each length counts by itself, chosen of "
        f"{len(sides['with'])} settings a side in {runs['with']} and {runs['without']} runs (with, without)."
    )
    return rows, raw, told


def _half_of_all(lab: Lab, setting: OurSetting, trace: Trace) -> float:
    """Half the requests a second of a trace whose requests come at once: where searches begin."""
    served = serve(lab.ours, setting, trace, None, used=lab.used)
    return 0.5 * len(served) / max(one.times_s[-1] for one in served)


def _rows(name: str, kind: str, rates: Mapping[str, Sequence[float]], chosen: Mapping[str, OurSetting]) -> list[Row]:
    rows = []
    ratios = [own / other for own, other in zip(rates["with"], rates["without"], strict=True) if min(own, other) > 0]
    if ratios:
        low, high = interval(ratios)
        label = f"highest rate on {kind} lengths, with lanes / without"
        given = {"value": statistics.median(ratios), "low": low, "high": high, "n": len(ratios), "of": "rounds"}
        rows.append(Row.model_validate({"name": label, **given, "aim": AIMS[kind], "note": name}))
    for side, own in rates.items():
        low, high = interval(own)
        given = {"value": statistics.median(own), "low": low, "high": high, "n": len(own), "of": "rounds"}
        note = f"{name}; {chosen[side].name}"
        rows.append(
            Row.model_validate({"name": f"on {kind} lengths, {side} lanes", **given, "unit": "/s", "note": note})
        )
    return rows
