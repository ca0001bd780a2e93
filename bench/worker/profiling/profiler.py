"""Times a model's parts on every device at the same time, inside the workers.

Each worker holds the same window of layers between the model's embedding and head, and works as the single stage of a
pipeline of its own: the times are spans of the loop that plans run in. Real pipelines keep their devices busy together,
and so does this: workers begin each kind of task at the same moment, and a fast one repeats it until the slowest has
done, since they share what lies between them and the memory.

Whole tasks are timed as plans run them. How a task is shared among its parts comes of a few more runs with hooks on the
parts, which plans do not have; a part's time is its share of the whole. So the parts of a window always add up to it.
"""

import dataclasses
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from pipetune.bench.cuts import idle_layers
from pipetune.bench.machine.telemetry import read_telemetry, sensors_for
from pipetune.bench.models.describe import build_on_meta
from pipetune.bench.models.layers import find_layers, kind_of
from pipetune.bench.profile import DeviceProfile, LayerTimes, ProfileGrid, TaskKind, TaskTime
from pipetune.bench.record import Failure
from pipetune.bench.runtime.device import undisturbed
from pipetune.bench.runtime.loop import StageLoop
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.worker.profiling.link_times import time_links
from pipetune.bench.worker.profiling.part_times import Part, PartStamps
from pipetune.bench.worker.profiling.scope import MEMORY_FRACTION, Scope, repeat, scope_of
from pipetune.bench.worker.stage_host import StageHost

ENOUGH_S = 0.6
"""Seconds of whole tasks of a kind over all rounds; at least `MIN_SAMPLES` and at most `MAX_SAMPLES` tasks."""
MIN_SAMPLES, MAX_SAMPLES = 4, 30
ROUNDS = 3
"""The kinds are gone through so often, each time in another order: a machine's drift changes within seconds."""
LONG_S = 0.05
"""A task that takes longer is not slowed by hooks, so that those runs count as well; nor is one run cold by much."""
CONTENTION_KINDS, CONTENTION_DEVICES = 3, 4
"""So many kinds of each phase are also timed alone, on so many of the devices."""
CONTENTION_TASK_S = 0.08
"""Kinds that take longer are left out there."""
BURST_S = 0.08
"""Seconds of tasks alone or together, one burst behind the other, so that the machine drifts little in between."""


@dataclasses.dataclass(slots=True)
class _Seen:
    """What was timed of one kind of task in one window."""

    whole_s: list[float] = dataclasses.field(default_factory=list)
    shares: list[dict[Part, float]] = dataclasses.field(default_factory=list)
    wanted: int = MIN_SAMPLES
    slowest_s: float = 0.0
    """Seconds of one task on the slowest device."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Times:
    """Times of one kind of task in one window, part by part."""

    samples: int
    spread: float
    """Distance between the quartiles of whole tasks, as a share of their median."""
    parts_s: dict[Part, float]


class Profiler:
    """Times one grid; every rank makes one and calls `run`."""

    def __init__(
        self, host: StageHost, grid: ProfileGrid, *, packed_weights: bool, cuda_graphs: bool, pad_token_id: int
    ) -> None:
        self.host, self.grid = host, grid
        self.packed_weights, self.cuda_graphs = packed_weights, cuda_graphs
        self.pad_token_id = pad_token_id
        self._filled: SlotCache | None = None
        self._notes: dict[str, None] = {}
        self._bursts: dict[TaskKind, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        """Seconds of tasks on all devices together, and on this one alone, by kind of task."""

    def run(self) -> dict[str, Any]:
        """`devices`, `contention`, `links`, `notes`, `disturbances` and `took_s`, or a `failure`; for rank 0 alone."""
        host, began = self.host, time.perf_counter()
        sensors = sensors_for([host.device.name])
        before = sensors.state()
        host.status.phase = "profile"
        least = min(host.control.gather(host.device_bytes))
        alike = _alike(host)
        scope = scope_of(
            self.grid, host.shape, alike, devices=host.devices, device_bytes=least, packed_weights=self.packed_weights
        )
        if isinstance(scope, Failure):
            return {"failure": scope}
        sensors.start()
        links = time_links(host)
        self._notes |= dict.fromkeys(scope.notes)
        windows: list[dict[TaskKind, _Times]] = []
        for number, window in enumerate(scope.windows):
            windows.append(self._window(window, scope, done=number))
            assert host.loop is not None
            self._notes |= dict.fromkeys(host.loop.graphs.notes if host.loop.graphs is not None else ())
            host.loop.close()
            host.loop = None
        disturbances = read_telemetry(sensors, before).disturbances
        host.free()
        own = _device_profile(host.device.name, scope.kinds, windows, alike)
        contention = {"prefill": self._contention(is_decode=False), "decode": self._contention(is_decode=True)}
        rows = host.control.gather({"device": own, "notes": list(self._notes), "disturbances": disturbances})
        # Workers that share a GPU saw the same; one of them speaks for it.
        devices = {row["device"]["device"]: row["device"] for row in reversed(rows)}
        return {
            "devices": [devices[name] for name in dict.fromkeys(host.devices)],
            "contention": contention,
            "links": links,
            "notes": list(dict.fromkeys(text for row in rows for text in row["notes"])),
            "disturbances": list(dict.fromkeys(text for row in rows for text in row["disturbances"])),
            "took_s": round(time.perf_counter() - began, 3),
        }

    def _window(self, window: range, scope: Scope, *, done: int) -> dict[TaskKind, _Times]:
        """Times every kind of task on one window."""
        host = self.host
        cap = int(MEMORY_FRACTION * host.device_bytes)
        loop = host.hold(window, packed_weights=self.packed_weights, cuda_graphs=self.cuda_graphs, cap_bytes=cap)
        host.status.phase = "profile"
        self._filled = None
        seen: dict[TaskKind, _Seen] = {kind: _Seen() for kind in scope.kinds}
        total = len(scope.windows) * ROUNDS * len(scope.kinds)
        for number in range(ROUNDS):
            # The same on every rank.
            order = random.Random(number).sample(scope.kinds, len(scope.kinds))
            for place, kind in enumerate(order):
                host.report("profile", (done * ROUNDS + number) * len(order) + place, total)
                with undisturbed():
                    if number == 0:
                        self._begin(loop, kind, seen[kind])
                    elif seen[kind].slowest_s < LONG_S:
                        self._time(loop, kind, 1)
                    missing = seen[kind].wanted - len(seen[kind].whole_s)
                    seen[kind].whole_s += self._time(loop, kind, max(1, missing // (ROUNDS - number)))
            if done == 0 and len(host.devices) > 1:
                for kind in _contending(seen):
                    self._contend(loop, kind, max(3, round(BURST_S / seen[kind].slowest_s)))
        return {kind: _times_of(one) for kind, one in seen.items()}

    def _contend(self, loop: StageLoop, kind: TaskKind, burst: int) -> None:
        """Times a burst of tasks on all devices together, and then on one after the other alone."""
        control = self.host.control
        last = control.world_size - 1
        turns = sorted({place * last // (CONTENTION_DEVICES - 1) for place in range(CONTENTION_DEVICES)})
        burst = min(burst, MAX_SAMPLES)
        together, alone = self._bursts[kind]
        with undisturbed():
            self._time(loop, kind, 1)
            together += self._time(loop, kind, burst)
            for rank in turns:
                control.barrier()
                if control.rank == rank:
                    alone += [end - start for start, end in self._spans(loop, kind, burst, together=False)]
            control.barrier()

    def _contention(self, *, is_decode: bool) -> float | None:
        """Logarithm of how much longer tasks take while all devices compute than while one does; None without tasks. By
        lower quartiles: whatever else runs on the machine can only make tasks longer, those alone above all."""
        found = [
            math.log(_lower_quartile(together) / _lower_quartile(alone))
            for kind, (together, alone) in self._bursts.items()
            if kind.is_decode == is_decode and alone
        ]
        ratios = [ratio for row in self.host.control.gather(found) for ratio in row]
        return round(max(0.0, statistics.median(ratios)), 4) if ratios else None

    def _begin(self, loop: StageLoop, kind: TaskKind, seen: _Seen) -> None:
        """Warms up, takes shares, and says how many whole tasks are to be timed on this device."""
        (cold_s,) = self._time(loop, kind, 1)
        device = self.host.device
        count = 1 if max(self.host.control.gather(cold_s)) > 4 * LONG_S else 4
        spans, seen.shares = self._shares(loop, kind, count)
        task_s = statistics.median(end - start for start, end in spans)
        seen.slowest_s = max(self.host.control.gather(task_s))
        if seen.slowest_s > LONG_S and not device.is_cuda:
            seen.whole_s += [end - start for start, end in spans]
        # As long as the slowest device takes for the least number, so that none of them idles meanwhile.
        wanted_s = max(ENOUGH_S, MIN_SAMPLES * seen.slowest_s)
        seen.wanted = min(max(math.ceil(wanted_s / max(task_s, 1e-6)), MIN_SAMPLES), MAX_SAMPLES)

    def _shares(
        self, loop: StageLoop, kind: TaskKind, count: int
    ) -> tuple[list[tuple[float, float]], list[dict[Part, float]]]:
        """Begins and ends of so many tasks, and their shares: those within a second graph where plans would run one.
        Run eagerly, the parts of a small step take as long as the host takes to launch their kernels."""
        plain, timed = loop.graphs, None
        spans: list[tuple[float, float]] = []
        shares: list[dict[Part, float]] = []
        try:
            with PartStamps(self.host.stage, self.host.device.clock()) as stamps:
                loop.graphs = None
                if plain is not None and kind.is_decode and not plain.notes:
                    loop.graphs = timed = plain.again("the parts of ")
                    loop.prepare(repeat(kind, 1, self.grid, self.host.shape, pad_token_id=self.pad_token_id))
                    if timed.notes:
                        self._notes |= dict.fromkeys(timed.notes)
                        loop.graphs = None
                        stamps.forget()
                # A replay writes over the stamps of the one before: so where one device has a graph, all take turns.
                turns = count if any(self.host.control.gather(loop.graphs is not None)) else 1
                for _ in range(turns):
                    found = self._spans(loop, kind, count // turns)
                    spans, shares = spans + found, shares + stamps.shares(found)
        finally:
            loop.graphs = plain
            if timed is not None:
                timed.close()
        return spans, shares

    def _time(self, loop: StageLoop, kind: TaskKind, count: int) -> list[float]:
        return [end - start for start, end in self._spans(loop, kind, count)]

    def _spans(self, loop: StageLoop, kind: TaskKind, count: int, together: bool = True) -> list[tuple[float, float]]:
        """Begin and end of so many tasks, in monotonic seconds; all devices begin together, or only this one does."""
        job = repeat(kind, count, self.grid, self.host.shape, pad_token_id=self.pad_token_id)
        loop.prepare(job)
        if kind.past_tokens > 0 and not self.host.shape.recurrent and loop.slots[0] is not self._filled:
            loop.run(repeat(kind, 1, self.grid, self.host.shape, pad_token_id=self.pad_token_id))
            # Pages of a new slot that nobody ever wrote are all one, which never leaves the processor's cache.
            loop.slots[0].fill(0.01)
            self._filled = loop.slots[0]
        timeline = loop.run(job, start=self.host.control.barrier if together else lambda: None).timeline
        return list(zip(timeline.compute_start_s, timeline.compute_end_s, strict=True))[-count:]


def _alike(host: StageHost) -> tuple[int, ...]:
    """The number of each layer's kind: equal in shape, in what it is made of, and in whether it is called."""
    kinds: dict[Hashable, int] = {}
    found: list[int] = []
    if host.rank == 0:
        skeleton = build_on_meta(host.stage.resolved)
        idle = idle_layers(skeleton.config)
        for index, layer in enumerate(find_layers(skeleton)[1]):
            found.append(kinds.setdefault((host.shape.layers[index], kind_of(layer), index in idle), len(kinds)))
    return tuple(host.control.broadcast(found))


def _contending(seen: dict[TaskKind, _Seen]) -> list[TaskKind]:
    """Some kinds of each phase, the shortest among them: what is to be told of long ones would take long as well."""
    chosen: list[TaskKind] = []
    for is_decode in (False, True):
        ranked = sorted((one.slowest_s, kind) for kind, one in seen.items() if kind.is_decode == is_decode)
        short = [kind for slowest_s, kind in ranked if slowest_s <= CONTENTION_TASK_S]
        short = short or [kind for _, kind in ranked[:1]]
        places = {place * (len(short) - 1) // (CONTENTION_KINDS - 1) for place in range(CONTENTION_KINDS)}
        chosen += [short[place] for place in sorted(places) if short]
    return chosen


def _lower_quartile(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _times_of(seen: _Seen) -> _Times:
    whole_s = statistics.median(seen.whole_s)
    quarters = statistics.quantiles(seen.whole_s, n=4, method="inclusive")
    return _Times(
        samples=len(seen.whole_s),
        spread=(quarters[2] - quarters[0]) / whole_s,
        parts_s={part: whole_s * statistics.fmean(shares[part] for shares in seen.shares) for part in seen.shares[0]},
    )


def _device_profile(
    device: str, kinds: Sequence[TaskKind], windows: Sequence[dict[TaskKind, _Times]], alike: Sequence[int]
) -> DeviceProfile:
    """Puts windows together: what several of them hold is the mean over them, and like layers are one."""

    def times(*parts: Part) -> tuple[TaskTime, ...]:
        rows = []
        for kind in kinds:
            timed = [window[kind] for window in windows]
            found = [(one.parts_s[part], one) for one in timed for part in parts if part in one.parts_s]
            seconds = statistics.fmean(time_s for time_s, _ in found)
            rows.append(
                TaskTime(
                    rows=kind.rows,
                    new_tokens=kind.new_tokens,
                    past_tokens=kind.past_tokens,
                    seconds=round(seconds, 9),
                    spread_s=round(seconds * statistics.fmean(one.spread for _, one in found), 9),
                    samples=min(one.samples for _, one in found),
                )
            )
        return tuple(rows)

    groups: dict[int, list[int]] = defaultdict(list)
    for layer, number in enumerate(alike):
        groups[number].append(layer)
    return DeviceProfile(
        device=device,
        layers=tuple(LayerTimes(layers=tuple(layers), times=times(*layers)) for layers in groups.values()),
        overhead=times("overhead"),
        embedding=times("embedding"),
        head=times("head"),
    )
