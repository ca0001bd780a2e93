"""Elimination over common rounds: the incumbent, the plans told apart from it, and when that is settled.

The figures are logarithms of costs, less being better. They are read as a randomised block design, a round being the
block: log cost = plan + round + noise, fitted by least squares, so that drift of the machine moves a whole round. A
plan's level is the Hodges-Lehmann centre of what is left of its log costs when the round effects are taken out: nearly
as sharp as the mean, and one astray round of four or more does not move it far. Levels alone give order, differences
and ratios, so that these never contradict each other.

The noise is pooled over all plans that compete: of three plans, three rounds leave 4 degrees of freedom to it where one
pair of plans alone would leave 2. A plan is behind the incumbent when a one-sided t-test of their difference says so. A
test that can speak as early as after three rounds must use the sizes of the differences: by their signs, or ranks, even
six rounds all won give no less than p = 1/64. A round that went astray widens the noise, so that the test errs towards
a tie.

Looking again after every round gives luck further chances. All looks share one nominal level, chosen so that they
together cross it with the chance wanted (Pocock 1977, Biometrika 64, 191-199); the boundary is computed for sums of
normal differences and carried over to t by its tail probability (Jennison and Turnbull 2000, Group Sequential Methods,
section 4.4).

Plans that fell behind leave, as in procedures that select the best by elimination (Kim and Nelson 2001, ACM TOMACS 11,
251-273); a plan that failed twice leaves too.
"""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, stdtr

from pipetune.tuner.stats.ratios import TAIL, Ratio, ratio_of
from pipetune.tuner.stats.signed_rank import hodges_lehmann

MIN_ROUNDS = 3
"""Rounds below which nothing is told apart."""
ALPHA = 0.05
"""Chance that of two equal plans one is called better, over all looks together."""
MARGIN = 0.01
"""A difference of one in a hundred is of no practical use."""
_BETA = 0.05
"""Chance that a plan called no further behind than the margin is."""
_MOST_FAILURES = 1
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(96)
_NOTHING = 1e-12
"""Differences of logarithms that rounding makes."""

Kind = Literal["open", "separated", "tie", "alone", "none"]
Cells = Mapping[str, Mapping[int, float | None]]
"""Log cost by plan and round, counted from 0; None for a run that failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How far a plan is behind another."""

    log_ratio: float
    """log(its cost / the other's)."""
    error: float
    """Standard error of that."""
    freedom: int
    rounds: int
    """Those that both were measured in."""

    def is_behind(self, level: float) -> bool:
        """Whether the test at that level says that the plan is worse."""
        return self.freedom > 0 and self.log_ratio > 0 and self._tail(0.0) <= level

    def is_within(self, margin: float) -> bool:
        """Whether the plan is surely no further behind than the margin."""
        return self.freedom > 0 and 1.0 - self._tail(math.log1p(margin)) <= _BETA

    def ratio(self, level: float | None) -> Ratio:
        """How many times better the other is: above 1 as a whole where the test at that level calls the plan behind."""
        return ratio_of(
            self.log_ratio, self.error, self.freedom if level else 0, tail=level or TAIL, rounds=self.rounds
        )

    def _tail(self, log_ratio: float) -> float:
        """P(a gap at least this large), were the true one `log_ratio`."""
        if self.error <= _NOTHING:
            return 0.0 if self.log_ratio > log_ratio + _NOTHING else 1.0
        return float(stdtr(self.freedom, (log_ratio - self.log_ratio) / self.error))


class Fit:
    """Log costs that were measured before a round, as plan + round + noise, by least squares."""

    def __init__(self, cells: Cells, rounds: float = math.inf) -> None:
        self.figures = {
            name: {at: x for at, x in row.items() if at < rounds and x is not None} for name, row in cells.items()
        }
        """What was measured, by plan and round."""
        names = [name for name, row in self.figures.items() if row]
        numbers = sorted({at for name in names for at in self.figures[name]})
        entries = [(n, numbers.index(at), x) for n, name in enumerate(names) for at, x in self.figures[name].items()]
        design = np.zeros((len(entries), len(names) + len(numbers)))
        for line, (place, at, _) in enumerate(entries):
            design[line, place] = design[line, len(names) + at] = 1.0
        values, inverse = np.array([x for *_, x in entries]), np.linalg.pinv(design)
        solution, self._inverse = inverse @ values, inverse[: len(names)]
        residual, own = values - design @ solution, solution[len(names) :]
        self.freedom = len(entries) - round(float(np.trace(design @ inverse)))
        self.sd = math.sqrt(float(residual @ residual) / self.freedom) if self.freedom else 0.0
        """Standard deviation of one run."""
        self.effects = dict(zip(numbers, map(float, own - own.mean()), strict=True)) if names else {}
        """Log cost of each round over their mean."""
        self.levels = {name: hodges_lehmann(self.steady(name)) for name in names}
        """Level of each plan that has a figure."""

    def steady(self, name: str) -> tuple[float, ...]:
        """The plan's log costs without the effects of their rounds."""
        return tuple(x - self.effects[at] for at, x in self.figures[name].items())

    def ordered(self, names: Sequence[str]) -> list[str]:
        """Best first; those without any figure come last, in the order given."""
        return sorted(names, key=lambda name: self.levels.get(name, math.inf))

    def gap(self, plan: str, other: str, pool: "Fit | None" = None) -> Gap | None:
        """How far one plan is behind another by the noise of `pool`, a fit of fewer plans, or of this one; None without
        a common round."""
        if not (common := self.figures.get(plan, {}).keys() & self.figures.get(other, {}).keys()):
            return None
        noise, places = pool or self, [*self.levels]
        contrast = self._inverse[places.index(plan)] - self._inverse[places.index(other)]
        difference = self.levels[plan] - self.levels[other]
        return Gap(
            log_ratio=difference if abs(difference) > _NOTHING else 0.0,
            error=noise.sd * math.sqrt(float(contrast @ contrast)),
            freedom=noise.freedom,
            rounds=len(common),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """How an elimination stands."""

    kind: Kind
    """`open`: a further round is due. `alone`: one plan, and none that it beat. `none`: no plan is left."""
    rounds: int
    """Whole ones so far."""
    level: float
    """Level of each test."""
    fit: Fit
    """The fit of all figures, controls included."""
    pool: Fit
    """The fit of the rivals' alone, whose noise their tests go by."""
    active: tuple[str, ...]
    """Best first: those that did not leave."""
    due: tuple[str, ...] = ()
    """Plans and controls that the round to come still lacks."""

    def ratio(self, ours: str, theirs: str) -> Ratio | None:
        """How many times better ours is: of two rivals by the rivals' noise; None without a common round. The interval
        is what the tests leave possible, so that it leaves 1 out where one of them tells the two apart; rounds that are
        too few for a test give none."""
        are_rivals = {ours, theirs} <= self.pool.levels.keys()
        gap = self.fit.gap(theirs, ours, self.pool if are_rivals else None)
        return gap.ratio(self.level if gap.rounds >= MIN_ROUNDS else None) if gap else None


def decide(
    cells: Cells,
    *,
    min_rounds: int,
    max_rounds: int,
    rivals: Collection[str] | None = None,
    controls: Collection[str] = (),
) -> State:
    """Replays an elimination, round by round, as far as its figures go; after `max_rounds` what is not told apart is a
    tie. Cells hold figures of all plans and controls, those without any yet an empty row. Rivals, all but the controls
    by default, compete; controls run in every round and compete with nobody."""
    last = max(min_rounds, max_rounds)
    first_look = max(min_rounds, MIN_ROUNDS)
    level = nominal_level(first_look, max(first_look, last))
    table = {name: row for name, row in cells.items() if name not in controls and (rivals is None or name in rivals)}
    active, any_left, rounds = list(table), False, 0
    while True:
        active = [name for name in active if _failures(table[name], rounds) <= _MOST_FAILURES]
        gaps: dict[str, Gap] = {}
        if rounds >= first_look and active:
            fit, pool = Fit(cells, rounds), Fit(table, rounds)
            fastest, *others = active = fit.ordered(active)
            gaps = {name: gap for name in others if (gap := fit.gap(name, fastest, pool))}
            beaten = [name for name, gap in gaps.items() if gap.is_behind(level)]
            active, any_left = [name for name in active if name not in beaten], any_left or bool(beaten)
        are_alike = all(name in gaps and gaps[name].is_within(MARGIN) for name in active[1:])
        kind: Kind = "open"
        if not active:
            kind = "none"
        elif rounds >= min_rounds and len(active) == 1:
            kind = "separated" if any_left else "alone"
        elif rounds >= last or (rounds >= first_look and are_alike):
            kind = "tie"
        running = [name for name in controls if _failures(cells[name], rounds) <= _MOST_FAILURES]
        due = tuple(name for name in (*active, *running) if rounds not in cells[name])
        if kind != "open" or due:
            fit, pool = Fit(cells), Fit(table)
            ahead, due = tuple(fit.ordered(active)), due if kind == "open" else ()
            return State(kind=kind, rounds=rounds, level=level, fit=fit, pool=pool, active=ahead, due=due)
        rounds += 1


@functools.lru_cache
def nominal_level(first_look: int, last_look: int, alpha: float = ALPHA) -> float:
    """The level of each one-sided test, such that looks after each of these rounds err together with `alpha` / 2."""
    low, high = 0.0, 6.0
    for _ in range(40):
        bound = (low + high) / 2
        low, high = (bound, high) if _crossing(bound, first_look, last_look) > alpha / 2 else (low, bound)
    return float(ndtr(-high))


def _crossing(bound: float, first_look: int, last_look: int) -> float:
    """P(a sum of n standard normal differences exceeds bound·√n at some look n). The density of the sums that have not
    crossed is carried from look to look by quadrature (Armitage, McPherson and Rowe 1969, JRSS A 132, 235-244)."""
    crossed, place, mass = float(ndtr(-bound)), np.zeros(1), np.ones(1)
    step = math.sqrt(first_look)
    for look in range(first_look, last_look):
        top, foot = bound * math.sqrt(look), -8.0 * math.sqrt(look)
        here = foot + (_NODES + 1) * (top - foot) / 2
        density = np.exp(-0.5 * ((here[:, None] - place[None, :]) / step) ** 2) @ mass / (step * math.sqrt(2 * math.pi))
        place, mass, step = here, density * _WEIGHTS * (top - foot) / 2, 1.0
        crossed += float(mass @ ndtr(place - bound * math.sqrt(look + 1)))
    return crossed


def _failures(row: Mapping[int, float | None], rounds: int) -> int:
    return sum(x is None for at, x in row.items() if at < rounds)
