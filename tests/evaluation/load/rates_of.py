"""The highest rates of several sides, run by run in turns; and which of its settings a side takes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from pipetune.bench.load.rates import RateSearch

ATTAINMENT = 0.9
"""Share of requests within the limits at a rate that is sustained."""

S = TypeVar("S")


def search_from(guess: float, *, tolerance: float = 0.01) -> RateSearch:
    """A search by simulated runs, which goes as far as it takes."""
    return RateSearch(wanted=ATTAINMENT, guess=guess, tolerance=tolerance, most=40, lowest=2**12)


def find_together(
    share_at: Mapping[str, Callable[[float], float]],
    guesses: Mapping[str, float],
    *,
    order: random.Random,
    tolerance: float,
    most: int,
) -> dict[str, RateSearch]:
    """Searches for each side's rate: a run of each, in an order drawn anew, then the next of each that has not done.

    Args:
        share_at: what share keeps the limits at a rate, by measuring it.
        guesses: where to begin.
        most: runs of each.
    """
    searches = {
        name: RateSearch(wanted=ATTAINMENT, guess=guesses[name], tolerance=tolerance, most=most) for name in share_at
    }
    left = list(searches)
    while left:
        order.shuffle(left)
        for name in tuple(left):
            rate = searches[name].next()
            if rate is None:
                left.remove(name)
            else:
                searches[name].shares[rate] = share_at[name](rate)
    return searches


def best_setting(
    settings: Sequence[S], share_at: Callable[[S, float], float], *, guess: float, tolerance: float, most: int
) -> tuple[S, float, list[tuple[S, float | None]]]:
    """The setting of the highest rate, that rate, and what was seen of each: None of those that lost at the best rate.

    Where none sustained any rate that was tried, the first one is taken, with the lowest of its rates.

    A setting is challenged at the best rate so far: most losers cost one run.

    Args:
        guess: where to begin with the first one.
    """
    best, best_rate = settings[0], 0.0
    lowest = guess
    seen: list[tuple[S, float | None]] = []
    for setting in settings:
        search = RateSearch(wanted=ATTAINMENT, guess=best_rate or guess, tolerance=tolerance, most=most)
        while (rate := search.next()) is not None:
            search.shares[rate] = share_at(setting, rate)
            if best_rate and search.shares[next(iter(search.shares))] < ATTAINMENT:
                break
        if setting == settings[0]:
            lowest = min(search.shares)
        lost = bool(best_rate) and search.highest < best_rate
        seen.append((setting, None if lost else search.highest))
        if search.highest > best_rate:
            best, best_rate = setting, search.highest
    return best, best_rate or lowest, seen
