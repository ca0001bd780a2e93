"""Which partitions on which devices are worth proposing, for a number of replicas and of stages: by predicted time."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import TaskKind
from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan, Plan, StagePlan, device_kind
from pipetune.tuner.config.schema import SpaceConfig
from pipetune.tuner.planning.arrays import Floats, remembered
from pipetune.tuner.planning.partition import stage_table
from pipetune.tuner.planning.partition.placement import Order, levels_of, place
from pipetune.tuner.planning.partition.splits import Columns, Partition, Split, Table, best_splits
from pipetune.tuner.planning.simulation.model import TOKEN_BYTES, CostModel
from pipetune.tuner.search.space.resolver import Resolver

_NEAR, _PHASE_NEAR = 120, 20
"""Splits taken of those near the least bottleneck: of a whole run, and of its prefill and its decoding each."""
_TOLERANCE = 1.0
"""A split whose slowest stage takes twice as long as it need is not worth a run."""
_SIZES = 3
"""Pairs of sizes at which splits are sought and compared."""
_MAX_STATES = 512
"""More ways to take devices are not looked through: devices that are nearly alike are then taken for equal."""

_Phase = Literal["run", "prefill", "decode"]


class Sizes(NamedTuple):
    """Rows of a micro-batch, and those prefilled together."""

    rows: int
    prefill: int


class Layout(NamedTuple):
    """Replicas of a partition on devices; sorts by predicted time."""

    predicted_s: float
    replicas: int
    partition: Partition
    order: tuple[int, ...] = ()
    """Places of the devices, replica by replica and stage by stage; empty for the first ones in order."""


@dataclass(frozen=True, kw_only=True)
class Layouts:
    """Finds layouts of one model on one set of devices."""

    config: SpaceConfig
    devices: tuple[str, ...]
    shape: ModelShape
    cost: CostModel
    resolve: Resolver
    sizes: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
    _needs: dict[tuple[str, Sizes], Floats] = field(default_factory=dict, compare=False)

    @cached_property
    def classes(self) -> tuple[int, ...]:
        """Class of each device; those are of one class whose times and memory hardly differ."""
        kinds = sorted({device_kind(device) for device in self.devices})
        every = self.every_size(1)
        tasks = [self.kinds(sizes, 1) for sizes in dict.fromkeys((every[0], every[-1]))]
        values = np.array(
            [
                [
                    *(stage_table.stage_seconds(self.cost.costs, device, each)[0, -1] for each in tasks),
                    self.resolve.device_bytes[device],
                    # Memory is accounted for by the kind of device.
                    10.0 ** kinds.index(device_kind(device)),
                ]
                for device in self.devices
            ]
        )
        tolerance = stage_table.ALIKE
        while stage_table.count_states(classes := stage_table.alike_classes(values, tolerance)) > _MAX_STATES:
            tolerance *= 2
        return classes

    @cached_property
    def by_speed(self) -> tuple[int, ...]:
        """Places of the devices, the fastest first, those of a class together."""
        whole_s = self.seconds(self.every_size(1)[-1], 1)[:, 0, -1]
        of_class = [(whole_s[kind], kind) for kind in self.classes]
        return tuple(sorted(range(len(self.devices)), key=lambda place: (of_class[place], place)))

    def every_size(self, replicas: int) -> tuple[Sizes, ...]:
        """Sizes that make a difference for replicas that share the prompts out, the smallest first."""
        share = self._share(replicas)
        pairs = itertools.product({min(size, share) for size in self.sizes}, self.prefill_sizes)
        every = {Sizes(size, size if self.shape.recurrent else min(prefill, size)) for size, prefill in pairs}
        return tuple(sorted(every))

    def kinds(self, sizes: Sizes, replicas: int, phase: _Phase = "run") -> Mapping[TaskKind, int]:
        """What one replica runs, by kinds of tasks."""
        kinds = self.cost.kinds(self._whole(sizes, replicas), math.ceil(self._share(replicas) / sizes.rows))
        if phase == "run":
            return kinds
        return {kind: count for kind, count in kinds.items() if kind.is_decode == (phase == "decode")}

    @remembered
    def seconds(self, sizes: Sizes, replicas: int, phase: _Phase = "run") -> Table:
        """`[class of device, first, end]` over a run; of a class, the mean of its devices."""
        kinds = self.kinds(sizes, replicas, phase)
        tables = np.array([stage_table.stage_seconds(self.cost.costs, device, kinds) for device in self.devices])
        own = np.array(self.classes)
        return np.array([tables[own == kind].mean(axis=0) for kind in range(max(own) + 1)])

    def fill(self, sizes: Sizes, replicas: int) -> Table:
        """`[class of device, first, end]`, share of the least cap that a stage takes with one micro-batch in flight;
        zeros on a device with room in plenty."""
        fills, whole = [], self._whole(sizes, replicas)
        lens = {"prompt_len": self.resolve.prompt_len, "output_len": self.resolve.output_len}
        for kind in range(max(self.classes) + 1):
            own = [device for device, other in zip(self.devices, self.classes, strict=True) if other == kind]
            cap, device = min((whole.stages[0].cap_bytes(self.resolve.device_bytes[name]), name) for name in own)
            cap = max(cap, 1)
            if self._most_bytes(whole, device) <= cap:
                fills.append(np.zeros((self.shape.num_layers + 1,) * 2))
                continue
            key = (device_kind(device), sizes)
            if key not in self._needs:
                self._needs[key] = stage_table.stage_needs(self.shape, whole, device, **lens)
            fills.append(self._needs[key] / cap)
        return np.array(fills)

    @remembered
    def placed(self, order: Order, replicas: int) -> Order:
        """The order with devices of a class exchanged so that the least time is spent on links; the same where these
        are alike, or devices are to be taken as given."""
        if self.config.device_order == "given" or len(order) == replicas:
            return order
        hops_s, returns_s = (self._crossings_s(replicas, tokens) for tokens in (False, True))
        return place(order, self.classes, hops_s, returns_s, replicas=replicas)

    @remembered
    def _crossings_s(self, replicas: int, tokens: bool) -> Floats:
        """`[source, target]`: what hidden states, or tokens, take from one device to another over a run."""
        counts: Counter[int] = Counter()
        for kind, count in self.kinds(self.every_size(replicas)[-1], replicas).items():
            counts[kind.rows * (TOKEN_BYTES if tokens else kind.new_tokens * self.shape.crossing_bytes)] += count
        seconds = [
            sum(count * self.cost.costs.hop_s(source, target, size) for size, count in counts.items())
            for source, target in itertools.product(self.devices, repeat=2)
        ]
        return levels_of(np.array(seconds).reshape(len(self.devices), -1))

    def plan(self, partition: Partition, devices: tuple[str, ...], sizes: Sizes, replicas: int) -> Plan:
        """A plan of these sizes under the largest cap."""
        plan = Plan.from_layer_counts(
            partition,
            devices,
            sizes.rows,
            prefill_micro_batch_size=sizes.prefill if sizes.prefill < sizes.rows else None,
            replicas=replicas,
            memory_fraction=max(self.config.memory_fractions),
            max_memory_bytes=self.config.max_memory_per_device,
        )
        return plan.model_copy(update={"packed_weights": self.config.packed_weights})

    def _whole(self, sizes: Sizes, replicas: int) -> Plan:
        """A plan of these sizes, whatever its stages."""
        return self.plan((self.shape.num_layers,), self.devices, sizes, replicas)

    def _share(self, replicas: int) -> int:
        """Prompts of the replica that has most."""
        return math.ceil(self.resolve.num_prompts / replicas)

    def _most_bytes(self, whole: Plan, device: str) -> int:
        """More than any stage takes: what two stages do that hold the model, or its only layer."""
        pairs = itertools.pairwise((0, 1, self.shape.num_layers) if self.shape.num_layers > 1 else (0, 1))
        stages = tuple(StagePlan(device=device, first_layer=first, end_layer=end) for first, end in pairs)
        plan = whole.model_copy(update={"stages": stages})
        return sum(self.resolve.stage_bytes(plan, index).total(1) for index in range(len(stages)))


class LayoutSearch:
    """Finds the layouts of one number of replicas and of stages."""

    def __init__(self, layouts: Layouts, replicas: int, stages: int) -> None:
        self._all, self._replicas, self._stages = layouts, replicas, stages
        self._every_size = layouts.every_size(replicas)
        classes, by_speed, any_order = layouts.classes, layouts.by_speed, layouts.config.device_order == "auto"
        self._columns = Columns(classes, by_speed, replicas=replicas, stages=stages, any_order=any_order)

    def fitting(self) -> list[Layout]:
        """Layouts that fit into memory, best first."""
        smallest = self._every_size[0]
        if not (first := self._splits(self._table(smallest))):
            return []
        best = self._best_sizes(first[0])
        near = itertools.chain.from_iterable((self._of_phases(best[0]), *map(self._near_best, best)))
        splits = dict.fromkeys(near)
        least_s: dict[Split, float] = {}
        for sizes in dict.fromkeys((*best, smallest)):
            for split, seconds in zip(splits, self._durations((*split, sizes) for split in splits), strict=True):
                least_s[split] = min(seconds, least_s.get(split, math.inf))
        return sorted(
            Layout(seconds, self._replicas, partition, self._order(order))
            for (partition, order), seconds in least_s.items()
            if math.isfinite(seconds)
        )

    def nearest(self) -> Failure:
        """What the layout that comes nearest to fitting lacks."""
        smallest = self._every_size[0]
        split = self._splits(self._columns.slowest(self._all.fill(smallest, self._replicas)))[0]
        failure = self._all.resolve(self._plan(split.partition, split.order, smallest))
        assert isinstance(failure, Failure)
        return failure

    def _best_sizes(self, split: Split) -> tuple[Sizes, ...]:
        """The sizes that suit a split best, no two of as many rows."""
        durations = self._durations((*split, sizes) for sizes in self._every_size)
        found: dict[int, Sizes] = {}
        for _, sizes in sorted(zip(durations, self._every_size, strict=True)):
            found.setdefault(sizes.rows, sizes)
        return tuple(found.values())[:_SIZES]

    def _of_phases(self, sizes: Sizes) -> Iterator[Split]:
        """Splits near the least bottleneck of prefill and of decoding, which want other cuts of unlike layers."""
        phases: tuple[_Phase, ...] = ("prefill", "decode")
        if all(self._all.kinds(sizes, self._replicas, phase) for phase in phases):
            for phase in phases:
                yield from self._splits(self._table(sizes, phase), limit=_PHASE_NEAR)

    def _near_best(self, sizes: Sizes) -> Iterator[Split]:
        """Splits near the least bottleneck of a run, and the one that leaves most room for micro-batches in flight."""
        yield from self._splits(self._table(sizes), limit=_NEAR)
        fill = self._columns.slowest(self._all.fill(sizes, self._replicas))
        if fill.any():
            yield from self._splits(fill)

    def _table(self, sizes: Sizes, phase: _Phase = "run") -> Table:
        """`[kind of column, first, end]`, seconds of what fits."""
        seconds = self._columns.slowest(self._all.seconds(sizes, self._replicas, phase))
        fill = self._columns.slowest(self._all.fill(sizes, self._replicas))
        return np.where(fill <= 1.0, seconds, np.inf)

    def _splits(self, table: Table, limit: int = 1) -> tuple[Split, ...]:
        """The best ones by a table of the columns; their orders are of columns."""
        return best_splits(
            table,
            self._columns.kinds,
            min_stages=self._stages,
            max_stages=self._stages,
            any_order=self._columns.may_move,
            forbidden_cuts=self._all.shape.forbidden_cuts,
            tolerance=_TOLERANCE if limit > 1 else 0.0,
            limit=limit,
        )

    def _durations(self, entries: Iterable[tuple[Partition, tuple[int, ...], Sizes]]) -> list[float]:
        """Predicted seconds; infinite for what does not fit."""
        resolved = [self._all.resolve(self._plan(*entry)) for entry in entries]
        runs = [(each.plan, each.in_flight) for each in resolved if isinstance(each, EffectivePlan)]
        predictions = iter(self._all.cost.predict_many(runs))
        return [next(predictions).duration_s if isinstance(each, EffectivePlan) else math.inf for each in resolved]

    def _plan(self, partition: Partition, order: tuple[int, ...], sizes: Sizes) -> Plan:
        devices = tuple(self._all.devices[place] for place in self._places(order))
        return self._all.plan(partition, devices, sizes, self._replicas)

    def _places(self, order: tuple[int, ...]) -> Order:
        """The devices of columns in this order, on the links that suit them best."""
        return self._all.placed(self._columns.devices_of(order), self._replicas)

    def _order(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """Places of the devices; empty where they are the first ones in order."""
        places = self._places(order)
        return () if places == tuple(range(len(places))) else places
