"""Costs corrected by what plans took: factors on the times of layers and of a stage's ends, and some seconds.

A task of one kind takes on one stage

    exp(K) · ( exp(A) · Σ_g exp(h_g) · L_g  +  exp(B) · E  +  c · u )

where L_g is what the uncorrected costs say of the stage's layers of group g (layers of one shape), E of its ends
(overhead, embedding, head), and u the time of the smallest task of one layer. K is how fast a device is: the sum of a
term for all, one for each phase, each device, and both together. A tells sizes apart, by a curve over them and one
more term for each on each device; B and c tell the first and the last stage from the others, c being what they do that
nobody foresaw. So what was never run gets what it has in common with all that was.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import device_host
from pipetune.tuner.planning.arrays import Floats, remembered
from pipetune.tuner.planning.costs.base import Costs

Term: TypeAlias = tuple[str | int | bool, ...]
"""What a term is of: its level, then device, phase, size … as far as they matter."""
Weighted: TypeAlias = tuple[tuple[Term, float], ...]

SMALLEST = TaskKind(1, 1, 1)


def octaves_of(kind: TaskKind) -> float:
    """The size of a task in doublings: of its rows in decode, of its tokens in prefill."""
    return math.log2(kind.rows if kind.is_decode else kind.rows * kind.new_tokens)


def speed_terms(device: str, kind: TaskKind) -> Weighted:
    """The terms of K."""
    decode = kind.is_decode
    return (("all",), 1.0), (("phase", decode), 1.0), (("device", device), 1.0), (("device_phase", device, decode), 1.0)


def layer_terms(device: str, kind: TaskKind, middle: int) -> Weighted:
    """The terms of A; `middle` is that of the sizes seen, in doublings."""
    decode, octaves = kind.is_decode, octaves_of(kind)
    # A random walk from the middle, a step each doubling: beyond the sizes seen it goes on level.
    low, high, sign = (middle, octaves, 1.0) if octaves > middle else (octaves, middle, -1.0)
    steps = range(math.floor(low), math.ceil(high))
    curve = tuple((("size", decode, step), sign * (min(step + 1, high) - max(step, low))) for step in steps)
    return (*curve, (("cell", device, decode, kind.rows, round(2 * octaves)), 1.0))


def group_term(group: int, kind: TaskKind) -> Term:
    """h of one group of layers."""
    return ("group", group, kind.is_decode)


def place_terms(level: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> Weighted:
    """The terms of B, level `ends`, or of c, level `extra`."""
    decode = kind.is_decode
    places = ["any"] + ["first"] * is_first + ["last"] * is_last
    return tuple(((level, decode, place), 1.0) for place in places)


def between_hosts(source: str, target: str) -> bool:
    """Whether a message leaves its host."""
    return device_host(source) != device_host(target)


@dataclass(frozen=True, kw_only=True)
class RefittedCosts:
    """`Costs` over others, corrected by terms; terms that are missing are zero."""

    base: Costs
    terms: Mapping[Term, float]
    groups: tuple[int, ...]
    """Number of the group that each layer belongs to."""
    middles: tuple[int, int] = (0, 0)
    """Middle of the sizes seen in prefill and in decode, in doublings."""
    hops: Mapping[bool, tuple[float, float, float]] = field(default_factory=dict)
    """By whether messages go between hosts: they take exp(the first) times as long, and exp(the second) times more for
    each doubling above the third."""

    @remembered
    def layers_s(self, device: str, kind: TaskKind) -> Floats:
        """Seconds of each layer, the base costs times the correction of this device, phase and size."""
        terms = (*speed_terms(device, kind), *layer_terms(device, kind, self.middles[kind.is_decode]))
        factor = math.exp(self._sum(terms))
        by_group = np.exp([self.terms.get(group_term(group, kind), 0.0) for group in range(max(self.groups) + 1)])
        return self.base.layers_s(device, kind) * factor * by_group[list(self.groups)]

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """Seconds of a task beside its layers, corrected by phase and place in the pipeline."""
        place = {"is_first": is_first, "is_last": is_last}
        seconds = math.exp(self._sum(place_terms("ends", kind, **place))) * self.base.ends_s(device, kind, **place)
        if extra := self._sum(place_terms("extra", kind, **place)):
            seconds += extra * float(self.base.layers_s(device, SMALLEST).mean())
        seconds *= math.exp(self._sum(speed_terms(device, kind)))
        # What is taken off must leave a stage of a single layer something to do.
        return max(seconds, -0.5 * float(self.layers_s(device, kind).min()))

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """Seconds of a message, corrected by a factor and a slope over doublings of its size."""
        log, slope, middle_bytes = self.hops.get(between_hosts(source, target), (0.0, 0.0, 1.0))
        doublings = math.log2(max(num_bytes, 1) / middle_bytes)
        return self.base.hop_s(source, target, num_bytes) * math.exp(log + slope * doublings)

    def _sum(self, terms: Iterable[tuple[Term, float]]) -> float:
        return sum(weight * self.terms.get(term, 0.0) for term, weight in terms)
