"""Parts 1 and 6: the highest rates of our plans and of continuous batching; and of one plan as both sides."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipetune.bench.load.rates import RateSearch, estimate
from pipetune.tuner.stats.signed_rank import above, below
from tests.evaluation.harness import say
from tests.evaluation.load.estimates import interval
from tests.evaluation.load.lab import PILOT_SEED, Lab
from tests.evaluation.load.rates_of import ATTAINMENT, find_together
from tests.evaluation.load.sides import serve
from tests.evaluation.load.values import Row

AIM = 1.3
TOKENS_CHECKED = 16
"""Requests whose tokens are compared."""


def compare(lab: Lab, name: str) -> tuple[list[Row], dict[str, Any]]:
    """Each side's best setting by the pilot; then rounds, each with a trace of its own, all sides in turns."""
    chosen = {side.name: (side, *lab.choose(side)) for side in lab.sides}
    equal = _equal_tokens(lab, {key: (side, setting) for key, (side, setting, _, _) in chosen.items()})
    guesses = {key: rate for key, (_, _, rate, _) in chosen.items()}
    rounds: list[dict[str, RateSearch]] = []
    for number in range(lab.extent.rounds):
        trace = lab.trace(number)
        found = find_together(
            {key: partial(lab.share, side, setting, trace) for key, (side, setting, _, _) in chosen.items()},
            guesses,
            order=lab.order,
            tolerance=lab.extent.tolerance,
            most=lab.extent.runs,
        )
        rounds.append(found)
        guesses = {key: search.highest or min(search.shares) for key, search in found.items()}
        say(f"{name}, round {number}: " + ", ".join(f"{key} {search.highest:.3g}/s" for key, search in found.items()))
    rates = {key: [found[key].highest for found in rounds] for key in chosen}
    ours, one, two = (side.name for side in lab.sides)
    # A search that enclosed nothing within its runs says nothing of the ratio.
    ratios = [
        own / max(a, b) for own, a, b in zip(rates[ours], rates[one], rates[two], strict=True) if min(own, a, b) > 0
    ]
    raw = {
        "limits": {"ttft": lab.limits.ttft, "tpot": lab.limits.tpot},
        "chosen": {key: {"setting": setting.name, "tried": seen} for key, (_, setting, _, seen) in chosen.items()},
        "rounds": [{key: search.shares for key, search in found.items()} for found in rounds],
        "handed_over_late_s": max(lab.one.late_s, lab.two.late_s),
        "equal_tokens": equal,
    }
    rows = []
    if ratios:
        low, high = interval(ratios)
        note = f"{name}; of the better peer in each round"
        if missing := len(rounds) - len(ratios):
            note += f"; {missing} rounds in which a side sustained no rate that was tried are left out"
        rows.append(
            Row(
                name="highest rate, ours / continuous batching",
                value=statistics.median(ratios),
                low=low,
                high=high,
                n=len(ratios),
                of="rounds",
                aim=AIM,
                note=note,
            )
        )
    for key, (_, setting, _, _) in chosen.items():
        if own := [rate for rate in rates[key] if rate > 0]:
            low, high = interval(own)
            rows.append(
                Row(
                    name=f"highest rate, {key}",
                    value=statistics.median(own),
                    low=low,
                    high=high,
                    n=len(own),
                    of="rounds",
                    unit="/s",
                    note=f"{name}; {setting.name}",
                )
            )
    for key, (same, count) in equal.items():
        rows.append(Row(name=f"outputs equal to ours, {key}", value=same / count, n=count, of="requests", note=name))
    return rows, raw


def null(lab: Lab, name: str) -> tuple[list[Row], dict[str, Any]]:
    """One plan as both sides: what rounds differ by when nothing does."""
    setting = lab.subject.pair
    guess = 0.7 * lab.capacity(lab.ours, setting)
    kept = []
    for number in range(lab.extent.rounds):
        trace = lab.trace(number)
        found = find_together(
            {key: partial(lab.share, lab.ours, setting, trace) for key in ("a", "b")},
            {"a": guess, "b": guess},
            order=random.Random(number),
            tolerance=lab.extent.tolerance,
            most=lab.extent.runs,
        )
        kept.append({key: search.shares for key, search in found.items()})
        if (a := found["a"].highest) and (b := found["b"].highest):
            guess = (a * b) ** 0.5
            say(f"{name}, round {number}: {a:.4g} and {b:.4g} requests/s")
    return null_rows(f"{name}; {setting.name}", kept), {"rounds": kept}


def null_rows(note: str, rounds: Sequence[Mapping[str, Mapping[float, float]]]) -> list[Row]:
    """What the shares of either side in each round, by the rates that were tried, tell of one plan as both."""
    rates = [[estimate(round_[key], ATTAINMENT) for key in ("a", "b")] for round_ in rounds]
    ratios = [a / b for a, b in rates if a and b]
    if not ratios:
        return []
    apart = [max(ratio, 1 / ratio) - 1 for ratio in ratios]
    logs = [math.log(ratio) for ratio in ratios]
    either = min(1.0, 2 * min(above(logs), below(logs, 0.0)))
    rows = [Row(name="null: p of the gate's test", value=either, n=len(ratios), of="rounds", note=note, aim=0.05)]
    for label, values in (("null: rate of a plan / its own", ratios), ("null: how far apart", apart)):
        low, high = interval(values)
        rows.append(
            Row(name=label, value=statistics.median(values), low=low, high=high, n=len(values), of="rounds", note=note)
        )
    return rows


def _equal_tokens(lab: Lab, chosen: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """How many of the first outputs of each peer are equal to ours."""
    trace = lab.trace(PILOT_SEED, TOKENS_CHECKED)
    tokens = {
        key: [one.tokens for one in serve(side, setting, trace, None, used=lab.used)]
        for key, (side, setting) in chosen.items()
    }
    own = tokens.pop(lab.ours.name)
    return {
        key: (sum(one == other for one, other in zip(own, others, strict=True)), len(own))
        for key, others in tokens.items()
    }
