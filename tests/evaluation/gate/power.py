"""How often gates err, simulated: ours beside three habits, over noises, true differences and numbers of hypotheses.

    python -m tests.evaluation.gate.power --repetitions 2000 --seeds 3

A process's logarithm of time is session + drift + noise. Sessions (nights) differ; drifts are those of neighbours on
the host, alike from one process to the next; the noise has bursts. All three are scaled so that the paired difference
of two processes in a row has the standard deviation that names the class. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import mannwhitneyu

from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.rule import look_at
from pipetune.tuner.gate.values import VERDICTS, Verdict
from pipetune.tuner.stats.signed_rank import Look, looks_for

Floats = npt.NDArray[np.float64]

CLASSES = {"quiet": 0.012, "typical": 0.024, "noisy": 0.046}
"""SD of the paired difference of logarithms."""
EFFECTS = (0.0, 0.03, 0.05, 0.10)
HYPOTHESES = (1, 4, 12)
POSITION = 0.005
"""What comes second in a pair is slower by so much."""
_NOISE, _MOOD, _SESSION = math.sqrt(0.4), math.sqrt(0.222), 1.2
"""Of a process, as shares of the class: 2 · noise² + 2 · drift² · (1 - kept) = 1."""
_KEPT = 0.55
"""Correlation of the drifts of two processes in a row."""
_COMMON = 0.5
"""Share of the noise that the metrics of one process have in common."""
_BURSTS, _BURST = 0.05, 3.0
_RUNS = 10
"""Of a stored baseline, and of a candidate beside it."""
_MARGIN = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One simulated gate."""

    verdict: Verdict
    pairs: int


Method = Callable[[np.random.Generator, float, float], Outcome]


def ours(hypotheses: int) -> Method:
    """Our rule; the first hypothesis is worse by the effect, the others are equal."""
    looks, tolerance = looks_for(hypotheses), Tolerance(margin=_MARGIN)

    def gate(draws: np.random.Generator, sd: float, effect: float) -> Outcome:
        differences = _paired(draws, sd, hypotheses, looks[-1].pairs)
        differences[0] += math.log1p(effect)
        return judged(differences, looks, tolerance)

    return gate


def judged(differences: Floats, looks: Sequence[Look], tolerance: Tolerance) -> Outcome:
    """What our rule says of `differences[hypothesis, pair]`, logarithms that are positive where the candidate is worse,
    of as many pairs as the last look has."""
    left, failed = set(range(len(differences))), False
    for look in looks:
        for one in sorted(left):
            _, reason = look_at(
                differences[one, : look.pairs].tolist(), look, tolerance, noise_floor=0.0, last=looks[-1].pairs
            )
            if reason is not None:
                left.remove(one)
                failed |= VERDICTS[reason] is Verdict.FAIL
        if failed or not left:
            return Outcome(verdict=Verdict.FAIL if failed else Verdict.OK, pairs=look.pairs)
    return Outcome(verdict=Verdict.INCONCLUSIVE, pairs=looks[-1].pairs)


def stored_mean(draws: np.random.Generator, sd: float, effect: float) -> Outcome:
    """A threshold on the mean over a stored baseline's mean."""
    old, new = np.exp(_session(draws, sd, _RUNS)), np.exp(_session(draws, sd, _RUNS) + math.log1p(effect))
    return _told(float(new.mean() / old.mean()) > 1 + _MARGIN)


def mann_whitney(draws: np.random.Generator, sd: float, effect: float) -> Outcome:
    """As asv judges two results: Mann-Whitney's test at 0.002, and a ratio of medians beyond the factor."""
    old, new = np.exp(_session(draws, sd, _RUNS)), np.exp(_session(draws, sd, _RUNS) + math.log1p(effect))
    p = float(mannwhitneyu(new, old, alternative="two-sided").pvalue)
    return _told(p < 0.002 and float(np.median(new) / np.median(old)) > 1 + _MARGIN)


def compare_fail(draws: np.random.Generator, sd: float, effect: float) -> Outcome:
    """`pytest --benchmark-compare-fail=mean:5%`: rounds in one process, against those of another night's process."""
    within = 0.3 * sd
    old = np.exp(_session(draws, sd, 1)[0] + draws.normal(0, within, _RUNS))
    new = np.exp(_session(draws, sd, 1)[0] + draws.normal(0, within, _RUNS) + math.log1p(effect))
    return _told(float(new.mean() / old.mean()) > 1 + _MARGIN)


METHODS: dict[str, Method] = {
    **{f"pipetune gate, {count} hypothes{'es' if count > 1 else 'is'}": ours(count) for count in HYPOTHESES},
    "stored baseline, mean > 5 %": stored_mean,
    "stored baseline, Mann-Whitney as asv, factor 1.05": mann_whitney,
    "pytest-benchmark, compare-fail mean:5%": compare_fail,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Many gates of one kind."""

    method: str
    noise: str
    effect: float
    fail: float
    ok: float
    inconclusive: float
    pairs: float
    seeds: tuple[float, ...]
    """Share of FAIL, seed by seed."""


def cell(method: str, noise: str, effect: float, *, repetitions: int, seeds: int) -> Cell:
    """Simulates one cell of the table."""
    found: list[Outcome] = []
    by_seed = []
    for seed in range(seeds):
        key = [seed, *(list(names).index(name) for names, name in ((METHODS, method), (CLASSES, noise)))]
        draws = np.random.default_rng([*key, round(1000 * effect)])
        own = [METHODS[method](draws, CLASSES[noise], effect) for _ in range(repetitions)]
        by_seed.append(_share(own, Verdict.FAIL))
        found += own
    return Cell(
        method=method,
        noise=noise,
        effect=effect,
        fail=_share(found, Verdict.FAIL),
        ok=_share(found, Verdict.OK),
        inconclusive=_share(found, Verdict.INCONCLUSIVE),
        pairs=statistics.fmean(one.pairs for one in found),
        seeds=tuple(by_seed),
    )


def table(*, repetitions: int, seeds: int, jobs: int) -> str:
    """As Markdown."""
    wanted = [(method, noise, effect) for noise in CLASSES for method in METHODS for effect in EFFECTS]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {key: pool.submit(cell, *key, repetitions=repetitions, seeds=seeds) for key in wanted}
        cells = {key: future.result() for key, future in futures.items()}
    lines = [
        f"{repetitions} simulated gates × {seeds} seeds a cell; in brackets the least and the largest share of a seed.",
        "",
        "| noise | method | FAIL of equal sides | FAIL at +3 % | at +5 % | OK at +5 % | FAIL at +10 % "
        "| INCONCLUSIVE: equal, +5 % | pairs: equal, +5 % |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for noise in CLASSES:
        for method in METHODS:
            none, three, five, ten = (cells[method, noise, effect] for effect in EFFECTS)
            is_ours = method.startswith("pipetune")
            texts = (
                f"{noise} ({CLASSES[noise]:.1%})",
                method,
                f"{none.fail:.1%} ({min(none.seeds):.1%}–{max(none.seeds):.1%})",
                f"{three.fail:.1%}",
                f"{five.fail:.1%}",
                f"{five.ok:.1%}",
                f"{ten.fail:.1%}",
                f"{none.inconclusive:.1%}, {five.inconclusive:.1%}" if is_ours else "–",
                f"{none.pairs:.1f}, {five.pairs:.1f}" if is_ours else f"{_RUNS} runs",
            )
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines)


def _paired(draws: np.random.Generator, sd: float, hypotheses: int, pairs: int) -> Floats:
    """Differences of equal sides, a row for each hypothesis: candidate less baseline, in randomised order."""
    runs = _session(draws, sd, 2 * pairs, hypotheses=hypotheses)
    later = runs[:, 1::2] - runs[:, ::2] + math.log1p(POSITION)
    result: Floats = later * draws.choice((-1.0, 1.0), pairs)
    return result


def _session(draws: np.random.Generator, sd: float, runs: int, *, hypotheses: int | None = None) -> Floats:
    """Logarithms of time of processes in a row: one row, or one for each hypothesis."""
    rows = hypotheses or 1
    drift = np.empty(runs)
    state = float(draws.normal())
    for index in range(runs):
        drift[index] = state
        state = _KEPT * state + math.sqrt(1 - _KEPT**2) * float(draws.normal())
    common, own = _bursty(draws, (1, runs)), _bursty(draws, (rows, runs))
    noise = math.sqrt(_COMMON) * common + math.sqrt(1 - _COMMON) * own if rows > 1 else common
    values: Floats = sd * (_SESSION * draws.normal() + _MOOD * drift[None, :] + _NOISE * noise)
    return values if hypotheses else values[0]


def _bursty(draws: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Unit variance; one value of twenty comes from a distribution three times as wide."""
    wide = np.where(draws.random(shape) < _BURSTS, _BURST, 1.0)
    values: Floats = draws.normal(size=shape) * wide / math.sqrt(1 - _BURSTS + _BURSTS * _BURST**2)
    return values


def _told(is_worse: bool) -> Outcome:
    return Outcome(verdict=Verdict.FAIL if is_worse else Verdict.OK, pairs=_RUNS)


def _share(found: Sequence[Outcome], verdict: Verdict) -> float:
    return sum(one.verdict is verdict for one in found) / len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.gate.power", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    print(table(repetitions=args.repetitions, seeds=args.seeds, jobs=args.jobs))


if __name__ == "__main__":
    main()
