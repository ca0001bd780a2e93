"""What the searches came to, as Markdown: trials and device-seconds until the plan recommended is near the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pipetune.bench.metrics import percentile
from tests.evaluation.search.methods import OURS
from tests.evaluation.search.replay import Curve
from tests.evaluation.search.world import MeasuredWorld, World

GOALS = (0.98, 0.99)
"""Worth of the recommended plan, as a share of the best one's."""
BY_RUN = (4, 8)
"""Runs by which these are wanted."""
_GOOD_START = 0.95


def judging_table(worlds: Sequence[MeasuredWorld]) -> str:
    """How well the best plan of each landscape is known, and how many are as good."""
    lines = [
        "| landscape | runs | SD of a run: drift, noise | standard error of a judged plan near the best "
        "| plans within 2 %, within 5 % of the best |",
        "|---|--:|--:|--:|--:|",
    ]
    for world in worlds:
        runs = sum(len(rows) for rows in world.runs.values())
        drift = world.drift
        errors, near = [], world.landscape.spec.near
        for seed in range(8):
            for judged in world.judged(seed):
                best = max(judged.logs.values())
                errors += [judged.errors[plan] for plan, log in judged.logs.items() if log > best - near / 2]
        judged = world.judged_by_all
        gaps = [max(judged.logs.values()) - log for log in judged.logs.values()]
        within = tuple(sum(-math.expm1(-gap) <= share for gap in gaps) for share in (0.02, 0.05))
        lines.append(
            f"| {world.name} | {runs} | {math.sqrt(drift.ratio) * drift.noise:.1%}, {drift.noise:.1%} "
            f"| {statistics.median(errors):.1%} | {within[0]}, {within[1]} of {world.num_plans} |"
        )
    return "\n".join(lines)


def searches_table(worlds: Sequence[World], curves: Sequence[Curve], methods: Sequence[str]) -> str:
    """A row for each world and method."""
    lines = [
        "| landscape | method | runs to 2 %: median, p90 | reached | runs to 1 %: median, p90 | reached "
        "| device-s to 2 %: median, p90 |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for world in worlds:
        name = f"{world.name}{' (simulated)' if world.simulated else ''}, {world.num_plans} plans"
        for method in methods:
            own = [curve for curve in curves if curve.world == world.name and curve.method == method]
            if not own:
                continue
            cells = [name, method]
            for goal in GOALS:
                counts = [curve.trials_to(goal) for curve in own]
                cells += [_median_and_p90(counts, 0), _share(counts)]
            cells.append(_median_and_p90([curve.device_seconds_to(GOALS[0]) for curve in own], 0))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def first_plan_table(worlds: Sequence[World], curves: Sequence[Curve]) -> str:
    """What our search's first plan is worth, which no run has taught it, where it ends, and what its finals find."""
    lines = [
        "| landscape | worth of the plan predicted first: median, least | within 5 % | within 2 % by run 4 "
        "| within 1 % by run 8 | trials, then runs of the finals: median, most | worth in the end: median, least "
        "| within 2 %, within 1 % | times fewer runs to 2 % and 1 % than TPE's default |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for world in worlds:
        own = [curve for curve in curves if curve.world == world.name and curve.method == OURS]
        tpe = [curve for curve in curves if curve.world == world.name and curve.method == "TPE, default"]
        if not own:
            continue
        firsts = [curve.scores[0] for curve in own]
        ends = [curve.scores[-1] for curve in own]
        trials = [curve.trials or len(curve.scores) for curve in own]
        finals = [len(curve.scores) - count for curve, count in zip(own, trials, strict=True)]
        early = [
            statistics.fmean((curve.trials_to(goal) or math.inf) <= run for curve in own)
            for goal, run in zip(GOALS, BY_RUN, strict=True)
        ]
        good = [statistics.fmean(end >= goal for end in ends) for goal in GOALS]
        fewer = [_times_fewer(own, tpe, goal) for goal in GOALS]
        cells = (
            world.name,
            f"{statistics.median(firsts):.1%}, {min(firsts):.1%}",
            f"{statistics.fmean(first >= _GOOD_START for first in firsts):.0%}",
            *(f"{share:.0%}" for share in early),
            f"{statistics.median(trials):g}, {max(trials)}, then {statistics.median(finals):g}, {max(finals)}",
            f"{statistics.median(ends):.1%}, {min(ends):.1%}",
            ", ".join(f"{share:.0%}" for share in good),
            ", ".join(fewer),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _median_and_p90(values: Sequence[float | None], digits: int) -> str:
    """Searches that never came there count as endless."""
    ranked = [math.inf if value is None else value for value in values]
    return ", ".join(
        "never" if math.isinf(value) else f"{value:.{digits}f}"
        for value in (_upper_median(ranked), _upper(ranked, 0.9))
    )


def _upper_median(values: Sequence[float]) -> float:
    return _upper(values, 0.5)


def _upper(values: Sequence[float], quantile: float) -> float:
    """The least value that so great a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)]


def _share(values: Sequence[float | None]) -> str:
    return f"{sum(value is not None for value in values) / len(values):.0%}"


def _times_fewer(own: Sequence[Curve], tpe: Sequence[Curve], goal: float) -> str:
    """By medians; where the other never came there, by its whole budget: at least so many times."""
    if not tpe:
        return "–"
    mine = _upper_median([curve.trials_to(goal) or math.inf for curve in own])
    theirs = _upper_median([curve.trials_to(goal) or math.inf for curve in tpe])
    if math.isinf(mine):
        return "–"
    if math.isinf(theirs):
        return f"> {percentile([len(curve.scores) for curve in tpe], 0.5) / mine:.1f}"
    return f"{theirs / mine:.1f}"
