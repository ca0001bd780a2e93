"""What the finals can tell: simulated over noises and true differences, how often they err, tie, and take how long.

`python -m tests.evaluation.search.finals_power` prints the table. Three plans run; the second is slower than the best
by the difference, the third by twice that. A round has a drift of its own, which all plans share.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipetune.tuner.ranking.elimination import decide

MOOD_SD = 0.05
_BURST_SHARE, _BURST = 0.05, 0.30
NOISES = {"even": (1.0, 1.0, 1.0), "unlike": (0.5, 0.5, 1.7), "bursts": (1.0, 1.0, 1.0)}
"""Factors on the plans' noise; with bursts one run of twenty takes 30 % longer on top."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """Many finals of one kind."""

    noise: str
    sd: float
    """Of one run, relative; a difference of two runs has √2 times that."""
    difference: float
    wrong: float
    """Share of finals that told a plan apart as the best which is not; of equal plans: that told any apart."""
    tie: float
    wrong_leader: float
    """Share whose fastest plan is not the truly fastest, told apart or not."""
    loss: float
    """Mean true difference of the fastest plan measured from the truly fastest."""
    rounds: float
    runs: float
    """Of plans, the baseline's apart; means."""


def power(
    difference: float,
    sd: float,
    noise: str = "even",
    *,
    finals: int = 300,
    rounds: tuple[int, int] = (3, 8),
    seed: int = 0,
) -> Power:
    """Simulates finals of three plans.

    Args:
        difference: of the second plan from the best, relative.
        sd: of one run, relative.
        noise: a key of `NOISES`.
    """
    rng = np.random.default_rng([seed, int(1e4 * difference), int(1e4 * sd), sorted(NOISES).index(noise)])
    gaps = np.log1p(difference * np.arange(3))
    wrong, ties, wrong_leaders, losses, lengths, runs = 0, 0, 0, [], [], []
    for _ in range(finals):
        table = gaps[:, None] + _noise(rng, sd, noise, rounds[1]) + rng.normal(0, MOOD_SD, rounds[1])
        kind, leader, took, count = _hold(table, rounds)
        is_wrong = leader != 0 or difference == 0
        wrong += kind == "separated" and is_wrong
        ties += kind == "tie"
        wrong_leaders += leader != 0
        losses.append(difference * leader)
        lengths.append(took)
        runs.append(count)
    return Power(
        noise=noise,
        sd=sd,
        difference=difference,
        wrong=wrong / finals,
        tie=ties / finals,
        wrong_leader=wrong_leaders / finals,
        loss=statistics.fmean(losses),
        rounds=statistics.fmean(lengths),
        runs=statistics.fmean(runs),
    )


def _noise(rng: np.random.Generator, sd: float, noise: str, rounds: int) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = rng.normal(0, sd, (3, rounds)) * np.array(NOISES[noise])[:, None]
    if noise == "bursts":
        drawn += np.log1p(_BURST) * (rng.random((3, rounds)) < _BURST_SHARE)
    return drawn


def _hold(table: NDArray[np.float64], rounds: tuple[int, int]) -> tuple[str, int, int, int]:
    """One finals, given round by round as it would be: its kind, fastest plan, rounds and runs."""
    cells: dict[str, dict[int, float | None]] = {str(plan): {} for plan in range(len(table))}
    while True:
        state = decide(cells, min_rounds=rounds[0], max_rounds=rounds[1])
        if state.kind != "open":
            return state.kind, int(state.active[0]), state.rounds, sum(map(len, cells.values()))
        for name in state.due:
            cells[name][state.rounds] = float(table[int(name), state.rounds])


def table_of(rows: Sequence[Power]) -> str:
    """As Markdown."""
    head = (
        "noise",
        "SD of a run",
        "difference",
        "told wrongly",
        "tie",
        "fastest is not best",
        "loss",
        "rounds",
        "runs",
    )
    lines = [f"| {' | '.join(head)} |", "|:---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = (
            row.noise,
            f"{100 * row.sd:.0f} %",
            f"{100 * row.difference:.0f} %",
            f"{100 * row.wrong:.1f} %",
            f"{100 * row.tie:.0f} %",
            f"{100 * row.wrong_leader:.0f} %" if row.difference else "–",
            f"{100 * row.loss:.2f} %",
            f"{row.rounds:.1f}",
            f"{row.runs:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--finals", type=int, default=300, help="simulated for each line")
    finals = parser.parse_args().finals
    rows = [power(gap, sd, finals=finals) for sd in (0.01, 0.02, 0.03) for gap in (0.0, 0.01, 0.03, 0.05)]
    rows += [power(gap, 0.02, noise, finals=finals) for noise in ("unlike", "bursts") for gap in (0.0, 0.03)]
    print(table_of(rows))


if __name__ == "__main__":
    main()
