"""Elimination over common rounds: the incumbent, the plans told apart from it, and when that is settled.

The figures are logarithms of costs, less being better. They are read as a randomised block design, a round being the
block: log cost = plan + round + noise, fitted by least squares, so that drift of the machine moves a whole round. The
noise is pooled over all plans: of three plans, three rounds leave 4 degrees of freedom to it where one pair of plans
alone would leave 2. A plan is behind the incumbent when a one-sided t-test of their mean difference over common rounds
says so. A test that can speak as early as after three rounds must use the sizes of the differences: by their signs, or
ranks, even six rounds all won give no less than p = 1/64. A round that went astray widens the noise, so that the test
errs towards a tie.

Looking again after every round gives luck further chances. All looks share one nominal level, chosen so that they
together cross it with the chance wanted (Pocock 1977, Biometrika 64, 191-199); the boundary is computed for sums of
normal differences and carried over to t by its tail probability (Jennison and Turnbull 2000, Group Sequential Methods,
section 4.4).

Plans that fell behind leave, as in procedures that select the best by elimination (Kim and Nelson 2001, ACM TOMACS 11,
251-273); a plan that failed twice leaves too.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, stdtr, stdtrit

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
_NODES = 96

Cells = Mapping[str, Mapping[int, float | None]]
"""Log cost by plan and round, counted from 0; None for a run that failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How far a plan is behind the incumbent, or behind another plan that all are compared with."""

    rival: str
    log_ratio: float
    """Mean over common rounds of log(its cost / the incumbent's)."""
    error: float
    """Standard error of that."""
    freedom: int
    rounds: int

    @property
    def share(self) -> float:
        """0.02: its cost is 2 % above the incumbent's."""
        return math.expm1(self.log_ratio)

    @property
    def p_ahead(self) -> float:
        """How likely so large a gap is, or a larger one, of two equal plans."""
        return self._tail(0.0)

    def is_behind(self, level: float) -> bool:
        """Whether the test at that level says that the plan is worse."""
        return self.freedom > 0 and self.log_ratio > 0 and self.p_ahead <= level

    def is_within(self, margin: float) -> bool:
        """Whether the plan is surely no further behind than the margin."""
        return self.freedom > 0 and 1.0 - self._tail(math.log1p(margin)) <= _BETA

    def interval(self, level: float) -> tuple[float, float]:
        """Shares that the test at that level leaves possible; the plan is behind if they begin above 0."""
        half = float(stdtrit(self.freedom, 1 - level)) * self.error
        return math.expm1(self.log_ratio - half), math.expm1(self.log_ratio + half)

    def _tail(self, log_ratio: float) -> float:
        """P(a gap at least this large), were the true one `log_ratio`."""
        if self.error <= 1e-12:
            return 0.0 if self.log_ratio > log_ratio + 1e-12 else 1.0
        return float(stdtr(self.freedom, (log_ratio - self.log_ratio) / self.error))


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """How an elimination stands."""

    kind: Literal["open", "separated", "tie", "alone", "none"]
    """`open`: a further round is due. `alone`: one plan, and none that it beat. `none`: no plan is left."""
    rounds: int
    """Whole ones so far."""
    level: float
    """Level of each test."""
    active: tuple[str, ...]
    """Best first: those that did not leave."""
    behind: tuple[str, ...] = ()
    """Best first: those told apart from the incumbent."""
    gaps: tuple[Gap, ...] = ()
    """Gaps of all others behind the incumbent, in order."""
    due: tuple[str, ...] = ()
    """Plans and controls that the round to come still lacks."""

    @property
    def incumbent(self) -> str | None:
        """The plan that is best so far; None where none is left."""
        return next(iter(self.active), None)

    def gap(self, rival: str) -> Gap | None:
        """How far a plan is behind the incumbent; None where the two share no round."""
        return next((gap for gap in self.gaps if gap.rival == rival), None)


def decide(cells: Cells, *, min_rounds: int, max_rounds: int, controls: Collection[str] = ()) -> State:
    """Replays an elimination, round by round, as far as its figures go.

    Args:
        cells: figures of all plans and controls; those without any yet have an empty row.
        min_rounds: rounds before anything is decided.
        max_rounds: rounds after which what is not told apart is a tie.
        controls: names of `cells` that run in every round and compete with nobody.
    """
    last = max(min_rounds, max_rounds)
    first_look = max(min_rounds, MIN_ROUNDS)
    level = nominal_level(first_look, max(first_look, last))
    table = {name: dict(row) for name, row in cells.items() if name not in controls}
    active, behind, rounds = list(table), list[str](), 0
    while True:
        active = [name for name in active if _failures(table[name], rounds) <= _MOST_FAILURES]
        seen = {name: {at: x for at, x in row.items() if at < rounds and x is not None} for name, row in table.items()}
        active = ordered(seen, active)
        if rounds >= first_look and active:
            beaten = [gap.rival for gap in _gaps(seen, active) if gap.is_behind(level)]
            active, behind = [name for name in active if name not in beaten], [*beaten, *behind]
        kind = _kind(seen, active, behind, rounds, min_rounds=min_rounds, first_look=first_look, last=last)
        running = [name for name in controls if _failures(cells[name], rounds) <= _MOST_FAILURES]
        due = tuple(name for name in (*active, *running) if rounds not in cells[name])
        if kind != "open" or due:
            everything = {name: {at: x for at, x in row.items() if x is not None} for name, row in table.items()}
            active, behind = ordered(everything, active), ordered(everything, behind)
            return State(
                kind=kind,
                rounds=rounds,
                level=level,
                active=tuple(active),
                behind=tuple(behind),
                gaps=tuple(_gaps(everything, [*active, *behind])) if active else (),
                due=due if kind == "open" else (),
            )
        rounds += 1


def ordered(table: Mapping[str, Mapping[int, float]], names: Sequence[str]) -> list[str]:
    """Best first, by the Hodges-Lehmann centre of what is left of their log costs when the round effects are taken out.

    It is nearly as sharp as the mean, and one astray round of four or more does not move it far. Names without any
    figure come last, in the order given.
    """
    effects = _fit(table).effects
    centres = {
        name: hodges_lehmann([x - effects[at] for at, x in table[name].items()]) if table[name] else math.inf
        for name in names
    }
    return sorted(names, key=lambda name: centres[name])


@functools.lru_cache
def nominal_level(first_look: int, last_look: int, alpha: float = ALPHA) -> float:
    """The level of each one-sided test, such that all looks together find a difference by chance with `alpha` / 2.

    Args:
        first_look: number of rounds at the first look; a look follows every further round.
    """
    low, high = 0.0, 6.0
    for _ in range(40):
        bound = (low + high) / 2
        low, high = (bound, high) if _crossing(bound, first_look, last_look) > alpha / 2 else (low, bound)
    return float(ndtr(-high))


def _crossing(bound: float, first_look: int, last_look: int) -> float:
    """P(a sum of n standard normal differences exceeds bound·√n at some look n).

    The density of the sums that have not crossed is carried from look to look by quadrature (Armitage, McPherson and
    Rowe 1969, JRSS A 132, 235-244).
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    crossed, place, mass = float(ndtr(-bound)), np.zeros(1), np.ones(1)
    step = math.sqrt(first_look)
    for look in range(first_look, last_look):
        top, foot = bound * math.sqrt(look), -8.0 * math.sqrt(look)
        here = foot + (nodes + 1) * (top - foot) / 2
        density = np.exp(-0.5 * ((here[:, None] - place[None, :]) / step) ** 2) @ mass / (step * math.sqrt(2 * math.pi))
        place, mass, step = here, density * weights * (top - foot) / 2, 1.0
        crossed += float(mass @ ndtr(place - bound * math.sqrt(look + 1)))
    return crossed


@dataclass(frozen=True, slots=True)
class _Fitted:
    effects: dict[int, float]
    """Effect of each round, in log cost."""
    sd: float
    """Standard deviation of one run, in log cost."""
    freedom: int


def _fit(table: Mapping[str, Mapping[int, float]]) -> _Fitted:
    """Plans and rounds by least squares."""
    names = [name for name, row in table.items() if row]
    rounds = sorted({at for name in names for at in table[name]})
    entries = [(index, rounds.index(at), x) for index, name in enumerate(names) for at, x in table[name].items()]
    if not entries:
        return _Fitted({}, 0.0, 0)
    design = np.zeros((len(entries), len(names) + len(rounds)))
    for line, (index, at, _) in enumerate(entries):
        design[line, index] = design[line, len(names) + at] = 1.0
    values = np.array([x for *_, x in entries])
    solution, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(entries) - int(rank)
    residual = values - design @ solution
    sd = math.sqrt(float(residual @ residual) / freedom) if freedom else 0.0
    return _Fitted(dict(zip(rounds, map(float, solution[len(names) :]), strict=True)), sd, freedom)


def gaps_behind(cells: Cells, name: str) -> dict[str, Gap]:
    """Gaps of all others behind one plan or control, whichever is best."""
    table = {other: {at: x for at, x in row.items() if x is not None} for other, row in cells.items()}
    return {gap.rival: gap for gap in _gaps(table, [name, *(other for other in table if other != name)])}


def _gaps(table: Mapping[str, Mapping[int, float]], names: Sequence[str]) -> list[Gap]:
    """Gaps of all behind the first."""
    fitted, incumbent = _fit(table), table[names[0]]
    gaps = []
    for name in names[1:]:
        common = sorted(incumbent.keys() & table[name].keys())
        if common:
            mean = statistics.fmean(table[name][at] - incumbent[at] for at in common)
            error = fitted.sd * math.sqrt(2 / len(common))
            gaps.append(Gap(rival=name, log_ratio=mean, error=error, freedom=fitted.freedom, rounds=len(common)))
    return gaps


def _failures(row: Mapping[int, float | None], rounds: int) -> int:
    return sum(x is None for at, x in row.items() if at < rounds)


def _kind(
    seen: Mapping[str, Mapping[int, float]],
    active: Sequence[str],
    behind: Sequence[str],
    rounds: int,
    *,
    min_rounds: int,
    first_look: int,
    last: int,
) -> Literal["open", "separated", "tie", "alone", "none"]:
    if not active:
        return "none"
    if rounds < min_rounds:
        return "open"
    if len(active) == 1:
        return "separated" if behind else "alone"
    gaps = _gaps(seen, active)
    same = rounds >= first_look and len(gaps) == len(active) - 1 and all(gap.is_within(MARGIN) for gap in gaps)
    return "tie" if rounds >= last or same else "open"
