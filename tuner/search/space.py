"""What may be proposed: partitions by their rank, sizes by their index, and which of it is worth trying first.

A proposal is a point of four ordinal numbers. `partition_rank` counts through the best partitions of an analytic
cost, on a log scale: TPE then learns how far down the list it pays to look, which it cannot learn of raw cuts.
`micro_batch_index` and `prefill_index` count through ascending sizes, `memory_index` through memory fractions; the
last is there only when the caps change how many micro-batches fit.

The space is stored with the study: partitions keep their ranks whatever becomes of the cost model.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field

from bench import memory
from bench.errors import ConfigError, NothingFeasibleError
from bench.memory import ModelShape
from bench.record import Failure
from bench.spec import EffectivePlan, Plan, Value, Workload
from tuner.config import SpaceConfig
from tuner.planning.cost import CostModel
from tuner.planning.partition import Partition, best_partitions, count_partitions

Point = dict[str, int]

MAX_PARTITIONS = 400
MAX_HEAD = 16
"""So many plans of the analytic ranking run before TPE takes over."""
_ENUMERABLE = 20_000
_JOINT_PARTITIONS = 30
"""Partitions that the joint ranking looks at; the worse ones are left to TPE."""
_ALIKE_PENALTY = 1.15
"""Each further plan of one stage count and micro-batch size is taken for so much slower than it is predicted."""


class SearchSpace(Value):
    """The space of one study; partitions and sizes are listed, points refer to them by position."""

    study_id: str = Field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Names the study in a database that holds several."""
    devices: tuple[str, ...]
    partitions: tuple[Partition, ...]
    """Best first by the cost model at the time; rank 1 is the first."""
    micro_batch_sizes: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
    memory_fractions: tuple[float, ...]
    """One alone when caps make no difference."""

    def plan(self, point: Mapping[str, int]) -> Plan:
        """The plan that a point stands for."""
        micro_batch_size = self.micro_batch_sizes[point["micro_batch_index"]]
        prefill = self.prefill_sizes[point.get("prefill_index", len(self.prefill_sizes) - 1)]
        return Plan.from_layer_counts(
            self.partitions[point["partition_rank"] - 1],
            self.devices,
            micro_batch_size,
            prefill_micro_batch_size=prefill if prefill < micro_batch_size else None,
            memory_fraction=self.memory_fractions[point.get("memory_index", len(self.memory_fractions) - 1)],
        )

    def dimensions(self) -> dict[str, tuple[int, int, bool]]:
        """Name → (low, high, whether on a log scale), both ends included."""
        dimensions = {
            "partition_rank": (1, len(self.partitions), True),
            "micro_batch_index": (0, len(self.micro_batch_sizes) - 1, False),
            "prefill_index": (0, len(self.prefill_sizes) - 1, False),
        }
        if len(self.memory_fractions) > 1:
            dimensions["memory_index"] = (0, len(self.memory_fractions) - 1, False)
        return dimensions

    @property
    def num_points(self) -> int:
        return math.prod(high - low + 1 for low, high, _ in self.dimensions().values())

    def points(self) -> Iterator[Point]:
        """Every point, good partitions first."""
        dimensions = self.dimensions()
        for values in itertools.product(*(range(low, high + 1) for low, high, _ in dimensions.values())):
            yield dict(zip(dimensions, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class Resolver:
    """Tells what a plan comes to under the memory caps of these devices."""

    shape: ModelShape
    num_prompts: int
    prompt_len: int
    """Longest prompt, tokens."""
    output_len: int
    device_bytes: dict[str, int]
    _known: dict[Plan, EffectivePlan | Failure] = field(default_factory=dict, compare=False)

    @classmethod
    def of_workload(
        cls, shape: ModelShape, workload: Workload, prompt_lens: Sequence[int], device_bytes: dict[str, int]
    ) -> Resolver:
        """A resolver for these prompts; `prompt_lens` in tokens."""
        return cls(
            shape=shape,
            num_prompts=workload.num_prompts,
            prompt_len=max(prompt_lens),
            output_len=workload.output_len,
            device_bytes=device_bytes,
        )

    def __call__(self, plan: Plan) -> EffectivePlan | Failure:
        if plan not in self._known:
            self._known[plan] = memory.resolve(
                self.shape,
                plan,
                num_prompts=self.num_prompts,
                prompt_len=self.prompt_len,
                output_len=self.output_len,
                device_bytes=self.device_bytes,
            )
        return self._known[plan]


def identity(plan: Plan, resolved: EffectivePlan | Failure) -> str:
    """Equal for points that would run the same way."""
    return resolved.key if isinstance(resolved, EffectivePlan) else f"refused {plan.digest()}"


def build_space(
    config: SpaceConfig, devices: Sequence[str], shape: ModelShape, cost: CostModel, resolve: Resolver
) -> SearchSpace:
    """Lays the space out.

    Raises:
        ConfigError: bounds that the model cannot meet.
        NothingFeasibleError: no plan of the space fits into memory; says what the best partition lacks.
    """
    cuts = shape.num_layers - 1 - len(set(shape.forbidden_cuts))
    for name in ("min_stages", "max_stages"):
        wanted = getattr(config, name)
        if wanted is not None and wanted > cuts + 1:
            raise ConfigError(
                f"space.{name}={wanted}: {shape.architecture} has {shape.num_layers} layers "
                f"and can be cut into {cuts + 1} stages at most"
            )
    sizes = _micro_batch_sizes(config, cost.num_prompts, len(devices))
    prefill_sizes = _clipped(config.prefill_micro_batch_sizes or sizes, max(sizes))
    fractions = tuple(sorted(set(config.memory_fractions)))
    max_stages = min(config.max_stages or len(devices), len(devices), cuts + 1)

    def smallest(partition: Partition) -> Plan:
        return Plan.from_layer_counts(
            partition,
            tuple(devices),
            sizes[0],
            prefill_micro_batch_size=min(prefill_sizes[0], sizes[0]),
            memory_fraction=fractions[-1],
        )

    def rank_by(partition: Partition) -> float:
        """Cost; beyond any cost, by how much the smallest plan of the partition overruns its cap."""
        resolved = resolve(smallest(partition))
        if isinstance(resolved, Failure):
            return 1e12 * (1.0 + overrun(resolved))
        bounds = _bounds(partition, devices)
        prefill = min(cost.prefill_s(bounds, max(sizes), size) for size in prefill_sizes)
        return prefill + min(cost.decode_s(bounds, size) for size in sizes)

    ranked = best_partitions(
        shape.num_layers,
        rank_by,
        min_stages=config.min_stages,
        max_stages=max_stages,
        forbidden_cuts=shape.forbidden_cuts,
        limit=MAX_PARTITIONS,
    )
    fitting = tuple(partition for partition in ranked if isinstance(resolve(smallest(partition)), EffectivePlan))
    if not fitting:
        refused = resolve(smallest(ranked[0]))
        assert isinstance(refused, Failure)
        raise NothingFeasibleError(f"no plan fits into memory; the nearest one: {refused.message}")
    space = SearchSpace(
        devices=tuple(devices),
        partitions=fitting,
        micro_batch_sizes=sizes,
        prefill_sizes=prefill_sizes,
        memory_fractions=fractions,
    )
    if not _caps_matter(space, resolve):
        space = space.model_copy(update={"memory_fractions": fractions[-1:]})
    return space


def overrun(failure: Failure) -> float:
    """How far over its memory a plan is, as a share of what there was; 1 where nobody knows."""
    if failure.bytes_wanted is None or not failure.bytes_had:
        return 1.0
    return max(failure.bytes_wanted / failure.bytes_had - 1.0, 0.01)


def head(space: SearchSpace, cost: CostModel, resolve: Resolver, n_trials: int) -> tuple[Point, ...]:
    """What to try before TPE knows anything, most promising first; all that fits when that is no more than `n_trials`.

    Balanced partitions lead by themselves, since the slowest stage sets the beat. The cost model knows bubbles better
    than it knows kernels: so the further plans of a stage count and micro-batch size, which differ from the first in
    small ways, wait until other sizes had their turn.
    """
    distinct = distinct_points(space, resolve, limit=n_trials)
    predicted: dict[str, tuple[float, Point]] = {}
    for point in distinct if distinct is not None else _joint_points(space):
        plan = space.plan(point)
        resolved = resolve(plan)
        if isinstance(resolved, EffectivePlan):
            predicted.setdefault(resolved.key, (cost.duration_s(plan, resolved.in_flight), point))
    alike: Counter[tuple[int, int]] = Counter()
    ranked: list[tuple[float, tuple[int, ...], Point]] = []
    for seconds, point in sorted(predicted.values(), key=lambda entry: (entry[0], *entry[1].values())):
        kind = (len(space.partitions[point["partition_rank"] - 1]), point["micro_batch_index"])
        ranked.append((seconds * _ALIKE_PENALTY ** alike[kind], tuple(point.values()), point))
        alike[kind] += 1
    count = n_trials if distinct is not None else min(MAX_HEAD, max(1, math.ceil(n_trials * 2 / 3)))
    return tuple(point for _, _, point in sorted(ranked, key=lambda entry: entry[:2])[:count])


def distinct_points(space: SearchSpace, resolve: Resolver, *, limit: int) -> tuple[Point, ...] | None:
    """One point for each plan that runs differently and fits; None when there are more than `limit`."""
    found: dict[str, Point] = {}
    for count, point in enumerate(space.points()):
        if count >= _ENUMERABLE:
            return None
        resolved = resolve(space.plan(point))
        if isinstance(resolved, EffectivePlan):
            found.setdefault(resolved.key, point)
            if len(found) > limit:
                return None
    return tuple(found.values())


def _joint_points(space: SearchSpace) -> Iterator[Point]:
    few = space.model_copy(update={"partitions": space.partitions[:_JOINT_PARTITIONS]})
    if len(few.memory_fractions) > 1:
        # A larger cap never costs time, so that the ranking needs only the largest.
        return ({**point, "memory_index": len(few.memory_fractions) - 1} for point in _without_memory(few).points())
    return few.points()


def _without_memory(space: SearchSpace) -> SearchSpace:
    return space.model_copy(update={"memory_fractions": space.memory_fractions[-1:]})


def _caps_matter(space: SearchSpace, resolve: Resolver) -> bool:
    few = _without_memory(space.model_copy(update={"partitions": space.partitions[:_JOINT_PARTITIONS]}))
    last = len(space.memory_fractions) - 1

    def outcome(point: Point, index: int) -> int | None:
        resolved = resolve(space.plan({**point, "memory_index": index}))
        return resolved.in_flight if isinstance(resolved, EffectivePlan) else None

    return any(outcome(point, index) != outcome(point, last) for point in few.points() for index in range(last))


def _bounds(partition: Partition, devices: Sequence[str]) -> list[tuple[str, int, int]]:
    ends = list(itertools.accumulate(partition))
    return [(device, end - count, end) for device, count, end in zip(devices, partition, ends, strict=False)]


def _micro_batch_sizes(config: SpaceConfig, num_prompts: int, num_devices: int) -> tuple[int, ...]:
    """Even divisions of the prompts, into as many micro-batches as keep every stage busy and a few more, and powers
    of two; tiny ones are left out, since decode reads all weights once for each."""
    if config.micro_batch_sizes is not None:
        return _clipped(config.micro_batch_sizes, num_prompts)
    counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if count <= max(4, 2 * num_devices)]
    divisions = {math.ceil(num_prompts / count) for count in counts}
    powers = {1 << exponent for exponent in range(num_prompts.bit_length())}
    least = math.ceil(num_prompts / max(16, 2 * num_devices))
    return tuple(sorted(size for size in divisions | powers if least <= size <= num_prompts))


def _clipped(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(sorted({min(size, most) for size in sizes}))


def count_raw_partitions(config: SpaceConfig, shape: ModelShape, num_devices: int) -> int:
    """Partitions before any ranking, for people who want to know how large the space is."""
    cuts = shape.num_layers - 1 - len(set(shape.forbidden_cuts))
    return count_partitions(
        shape.num_layers,
        min_stages=config.min_stages,
        max_stages=min(config.max_stages or num_devices, num_devices, cuts + 1),
        forbidden_cuts=shape.forbidden_cuts,
    )
