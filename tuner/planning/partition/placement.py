"""Which of alike devices holds which stage, so that what crosses from stage to stage takes the fast links.

The sum is least of what hidden states take from each stage to the next one and tokens from the last to the first, over
all replicas. One pipeline on few devices is placed by dynamic programming over what is taken and the last device (M.
Held and R. M. Karp, A dynamic programming approach to sequencing problems, 1962), from each first device; what is
larger by exchanges that shorten it, from the order given and from nearest neighbours, until none does.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from pipetune.tuner.planning.arrays import Floats

ALIKE_LINKS = 1.5
"""Links on which messages take no more than so many times as long count as equal."""
MAX_EXACT = 8
"""Devices of which the best order is found for sure."""
_GAIN = 1e-9

Order = tuple[int, ...]


def levels_of(seconds: Floats) -> Floats:
    """The seconds, those that are nearly alike made equal: to the least of them."""
    levels: list[float] = []
    for value in np.unique(seconds).tolist():
        if not levels or value > ALIKE_LINKS * levels[-1]:
            levels.append(value)
    return np.array(levels)[np.searchsorted(levels, seconds, side="right") - 1]


def crossing_s(order: Order, hops_s: Floats, returns_s: Floats, replicas: int = 1) -> float:
    """What crosses between the stages of an order, replica by replica, in seconds; `hops_s`, `[source, target]`, is for
    hidden states from one device to another, `returns_s` for tokens."""
    rows = np.array(order).reshape(replicas, -1)
    if rows.shape[1] == 1:
        return 0.0
    return float(hops_s[rows[:, :-1], rows[:, 1:]].sum() + returns_s[rows[:, -1], rows[:, 0]].sum())


def place(order: Order, classes: Sequence[int], hops_s: Floats, returns_s: Floats, *, replicas: int = 1) -> Order:
    """The order of devices, replica by replica and stage by stage, with the least `crossing_s`; the one given, where
    none has less. Each place keeps its class."""
    others = ~np.eye(len(classes), dtype=bool)
    if np.ptp(hops_s[others]) == np.ptp(returns_s[others]) == 0.0:
        return order
    if replicas == 1 and len(classes) <= MAX_EXACT:
        found = [_best(order, classes, hops_s, returns_s)]
    else:
        starts = (order, _nearest(order, classes, hops_s, len(order) // replicas))
        found = [_exchanged(start, classes, hops_s, returns_s, replicas) for start in starts]
    least_s, best = min((crossing_s(one, hops_s, returns_s, replicas), one) for one in found)
    return best if least_s < crossing_s(order, hops_s, returns_s, replicas) * (1 - _GAIN) else order


def _best(order: Order, classes: Sequence[int], hops_s: Floats, returns_s: Floats) -> Order:
    ends: list[tuple[float, Order]] = []
    for first in _alike(order[0], classes):
        paths: dict[tuple[frozenset[int], int], tuple[float, Order]] = {(frozenset((first,)), first): (0.0, (first,))}
        for given in order[1:]:
            longer: dict[tuple[frozenset[int], int], tuple[float, Order]] = {}
            for (taken, last), (seconds, path) in paths.items():
                for device in _alike(given, classes):
                    if device not in taken:
                        key = taken | {device}, device
                        entry = seconds + float(hops_s[last, device]), (*path, device)
                        longer[key] = min(entry, longer.get(key, entry))
            paths = longer
        ends += [(seconds + float(returns_s[path[-1], first]), path) for seconds, path in paths.values()]
    return min(ends)[1]


def _nearest(order: Order, classes: Sequence[int], hops_s: Floats, stages: int) -> Order:
    """Always the nearest device that is left; replicas begin with the first one left."""
    path: list[int] = []
    for number, given in enumerate(order):
        left = [device for device in _alike(given, classes) if device not in path]
        path.append(min(left, key=hops_s[path[-1]].tolist().__getitem__) if number % stages else left[0])
    return tuple(path)


def _exchanged(order: Order, classes: Sequence[int], hops_s: Floats, returns_s: Floats, replicas: int) -> Order:
    """The order after exchanges of two devices of a class, and turns of a stretch, as long as they gain."""
    row = [*order, *(device for device in range(len(classes)) if device not in order)]
    kinds, count = [classes[device] for device in row], len(order)
    best_s = crossing_s(order, hops_s, returns_s, replicas)
    gains = True
    while gains:
        gains = False
        for one, other in itertools.combinations(range(len(row)), 2):
            swapped = list(row)
            swapped[one], swapped[other] = row[other], row[one]
            turned = [*row[:one], *row[one : other + 1][::-1], *row[other + 1 :]]
            for tried in (swapped, turned):
                if [classes[device] for device in tried] == kinds:
                    seconds = crossing_s(tuple(tried[:count]), hops_s, returns_s, replicas)
                    if seconds < best_s * (1 - _GAIN):
                        row, best_s, gains = tried, seconds, True
    return tuple(row[:count])


def _alike(device: int, classes: Sequence[int]) -> list[int]:
    """The devices of its class."""
    return [other for other, kind in enumerate(classes) if kind == classes[device]]
