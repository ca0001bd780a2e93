"""What tasks cost by a profile: as measured where something was, between measured points in a straight line.

A part of the model (a layer, the head …) was timed on a grid of rows × new tokens from an empty cache, one of rows ×
past tokens for decode, and at a few chunks behind others. Within a grid, times are bilinear, as work is: some for each
task, some for each row, some for each token. Outside of it, and at points of it that were too large to measure, they
follow a least-squares fit that knows no negative terms,

    prefill  c₀ + c₁ · rows · new + c₂ · rows · new · (past + new / 2)
    decode   c₀ + c₁ · rows + c₂ · rows · past

scaled to the nearest measured point. The head, which works on one position a row, has c₀ + c₁ · rows. Chunks take what
prefill of so many tokens takes, times what the fit says of their past, times what the measured chunks near by took more
or less than that.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from pipetune.bench.profile import Profile, TaskKind, TaskTime
from pipetune.tuner.planning.arrays import Floats, remembered
from pipetune.tuner.planning.costs.contention import Contention

Point = tuple[int, int]
Point3 = tuple[int, int, int]
"""Rows, new and past tokens."""
Seconds = Callable[[int, int, int], float]


class ProfiledCosts:
    """Costs by a profile of the machine; see `tuner.planning.costs.base.Costs`. A device or a link that was not
    profiled is a KeyError, a profile without times of prefill from an empty cache a ValueError."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._layers = {
            one.device: [(list(group.layers), _Part(group.times)) for group in one.layers] for one in profile.devices
        }
        self._overhead = {one.device: _Part(one.overhead) for one in profile.devices}
        self._embedding = {one.device: _Part(one.embedding) for one in profile.devices}
        self._head = {one.device: _Part(one.head, by_rows=not profile.scores) for one in profile.devices}
        self._links = {(link.source, link.target): link for link in profile.links}

    @property
    def contention(self) -> Contention | None:
        """What the devices lose to each other; None where that was not measured."""
        prefill, decode = self.profile.contention.prefill, self.profile.contention.decode
        if len(self._layers) < 2 or (prefill is None and decode is None):
            return None
        return Contention(prefill=prefill or 0.0, decode=decode or 0.0, devices=len(self._layers))

    def layers_s(self, device: str, kind: TaskKind) -> Floats:
        """`[num_layers]`, of each layer if it lay on the device."""
        return self._layers_s(device, kind._replace(samples=True))

    @remembered
    def _layers_s(self, device: str, kind: TaskKind) -> Floats:
        seconds = np.zeros(self.profile.shape.num_layers)
        for layers, part in self._layers[device]:
            seconds[layers] = part.seconds(kind)
        seconds.setflags(write=False)
        return seconds

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """Seconds of a task beside its layers: overhead, the embedding on the first stage, the head on the last."""
        seconds = self._overhead[device].seconds(kind)
        if is_first:
            seconds += self._embedding[device].seconds(kind)
        if is_last and kind.samples:
            seconds += self._head[device].seconds(kind)
        return seconds

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """Seconds of a message; 0 where both stages share a device."""
        return 0.0 if source == target else self._links[source, target].seconds(num_bytes)


class _Part:
    """Times of one part of the model over all kinds of tasks."""

    def __init__(self, times: Sequence[TaskTime], *, by_rows: bool = False) -> None:
        """`by_rows` where the part works on one position a row, however many tokens there are."""
        points = {(one.rows, one.new_tokens, one.past_tokens): one.seconds for one in times}
        decode = {point: seconds for point, seconds in points.items() if point[1] == 1 and point[2] > 0}
        prefill = {point: seconds for point, seconds in points.items() if point not in decode}
        whole = {(rows, new): seconds for (rows, new, past), seconds in prefill.items() if past == 0}
        if not whole:
            raise ValueError("the profile has no times of prefill from an empty cache: profile the model anew")
        self._fit = fit = _fit(prefill, _row_terms if by_rows else _prefill_terms)
        self._prefill = _Grid(whole, lambda rows, new: fit(rows, new, 0))
        self._decode: _Grid | None = None
        if decode:
            steps = _fit(decode, _row_terms if by_rows else _decode_terms)
            self._decode = _Grid(
                {(rows, past): seconds for (rows, _, past), seconds in decode.items()},
                lambda rows, past: steps(rows, 1, past),
            )
        self._chunks = {
            point: math.log(seconds / expected)
            for point, seconds in prefill.items()
            if point[2] > 0 and (expected := self._expected_s(*point)) > 0 and seconds > 0
        }

    def seconds(self, kind: TaskKind) -> float:
        if kind.past_tokens == 0:
            return self._prefill.seconds(kind.rows, kind.new_tokens)
        if kind.is_decode and self._decode is not None:
            return self._decode.seconds(kind.rows, kind.past_tokens)
        point = (kind.rows, kind.new_tokens, kind.past_tokens)
        return self._expected_s(*point) * math.exp(_nearby(self._chunks, point))

    def _expected_s(self, rows: int, new: int, past: int) -> float:
        """Seconds of a chunk, by what is known of whole prefills."""
        without = self._fit(rows, new, 0)
        more = self._fit(rows, new, past) / without if without > 0 else 1.0
        return self._prefill.seconds(rows, new) * more


class _Grid:
    """Times over two sizes."""

    def __init__(self, points: Mapping[Point, float], fit_s: Callable[[int, int], float]) -> None:
        self._fit_s = fit_s
        self._axes = [sorted({point[axis] for point in points}) for axis in range(2)]
        self._seconds = dict(points)
        for point in itertools.product(self._axes[0], self._axes[1]):
            if point not in points:
                # Of a point with about as much to do, and of those the one most alike.
                nearest = min(points, key=lambda other: (_far(other, point), other))
                self._seconds[point] = points[nearest] * self._scale(point, nearest)

    def seconds(self, one: int, other: int) -> float:
        """Bilinear within the grid; outside, scaled from its edge as the fit grows."""
        wanted = (one, other)
        (one, other) = edge = self._clipped(one, 0), self._clipped(other, 1)
        low, high, down = _around(self._axes[0], one)
        left, right, across = _around(self._axes[1], other)
        seconds = (1 - down) * ((1 - across) * self._seconds[low, left] + across * self._seconds[low, right])
        seconds += down * ((1 - across) * self._seconds[high, left] + across * self._seconds[high, right])
        return seconds if wanted == edge else seconds * self._scale(wanted, edge)

    def _clipped(self, value: int, axis: int) -> int:
        return min(max(value, self._axes[axis][0]), self._axes[axis][-1])

    def _scale(self, wanted: Point, known: Point) -> float:
        there = self._fit_s(*known)
        return self._fit_s(*wanted) / there if there > 0 else 1.0


def _fit(points: Mapping[Point3, float], terms: Callable[[int, int, int], tuple[float, ...]]) -> Seconds:
    """Non-negative least squares of relative errors (C. L. Lawson and R. J. Hanson, Solving Least Squares Problems,
    1974, ch. 23)."""
    rows = np.array([terms(*point) for point in points], dtype=float)
    seconds = np.array(list(points.values()))
    # A term that only repeats an earlier one, as where all lengths are equal, would share its part at random.
    kept: list[int] = []
    for column in range(rows.shape[1]):
        if np.linalg.matrix_rank(rows[:, [*kept, column]] / rows[:, [*kept, column]].max(axis=0)) > len(kept):
            kept.append(column)
    weights = 1.0 / np.maximum(seconds, 1e-3 * max(seconds.max(), 1e-12))
    scales = (rows * weights[:, None]).max(axis=0)
    solution, _ = nnls(rows[:, kept] * weights[:, None] / scales[kept], seconds * weights)
    found = np.zeros(rows.shape[1])
    found[kept] = solution / scales[kept]
    factors = found.tolist()
    return lambda *point: sum(factor * term for factor, term in zip(factors, terms(*point), strict=True))


def _prefill_terms(rows: int, new: int, past: int) -> tuple[float, ...]:
    # The growing one first: from a single point, time grows as tokens do.
    return (rows * new, 1.0, rows * new * (past + new / 2))


def _decode_terms(rows: int, new: int, past: int) -> tuple[float, ...]:
    return (1.0, rows, rows * past)


def _row_terms(rows: int, new: int, past: int) -> tuple[float, ...]:
    return (1.0, rows)


def _nearby(logs: Mapping[Point3, float], point: Point3) -> float:
    """Mean of the logs by inverse distance, in doublings, to the fourth (D. Shepard, ACM National Conference 1968)."""
    if point in logs:
        return logs[point]
    weights = {other: sum(math.log2(a / b) ** 2 for a, b in zip(point, other, strict=True)) ** -2 for other in logs}
    whole = sum(weights.values())
    return sum(weight * logs[other] for other, weight in weights.items()) / whole if whole else 0.0


def _far(one: Point, other: Point) -> tuple[float, float]:
    return abs(math.log2(one[0] * one[1] / (other[0] * other[1]))), abs(math.log2(one[0] / other[0]))


def _around(axis: Sequence[int], value: int) -> tuple[int, int, float]:
    """The values of the axis at and above one that it covers, and how far that is from the first to the second."""
    place = bisect.bisect_right(axis, value) - 1
    low, high = axis[place], axis[min(place + 1, len(axis) - 1)]
    return low, high, (value - low) / (high - low) if high > low else 0.0
