"""What may be proposed: partitions by their rank, sizes and switches by their index; each point stands for a plan.

A proposal is a point of a few ordinal numbers. `partition_rank` counts through the best partitions of an analytic
cost, on a log scale: TPE then learns how far down the list it pays to look, which it cannot learn of raw cuts. How
many replicas a partition has, and on which devices it lies where these are unlike, is part of its entry, since stages
and replicas share the devices: every point can run.
`micro_batch_index`, `prefill_index` and `chunk_index` count through ascending sizes, `memory_index` through memory
fractions, `compile_index` from off to on, `lane_index` from no lanes on; the last four are there only when they make a
difference. Where another engine runs the plans, `budget_index`, `seqs_index` and `kv_index` stand in place of all.

A point may also carry cuts (`cut_1`, `cut_2` …), the first layers of its stages, where no partition listed is the one
meant; its rank is then that of a neighbour.

The space is stored with the study: partitions keep their ranks whatever becomes of the cost model.
"""

import itertools
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from pipetune.bench.spec import EffectivePlan, EngineSettings, Lane, Plan, Value
from pipetune.tuner.planning.partition.splits import Partition
from pipetune.tuner.search.space.resolver import Resolver

MAX_CANDIDATES = 4000
"""In a space with more plans, those of the worse partitions are left out."""
Point = dict[str, int]
_T = TypeVar("_T")


class SearchSpace(Value):
    """The space of one study; partitions and sizes are listed, points refer to them by position. What has a default was
    not searched when the first spaces were written: these read back as they were."""

    study_id: str = Field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Names the study in a database that holds several."""
    devices: tuple[str, ...]
    partitions: tuple[Partition, ...] = Field(min_length=1)
    """Best first by the cost model at the time; rank 1 is the first."""
    replicas: tuple[int, ...] = ()
    """Pipelines of each partition that stand side by side; empty for one of each."""
    orders: tuple[tuple[int, ...], ...] = ()
    """Devices that hold each partition's stages, replica by replica and stage by stage; empty, for one or
    for all, takes the first ones in order."""
    micro_batch_sizes: tuple[int, ...] = Field(min_length=1)
    prefill_sizes: tuple[int, ...] = Field(min_length=1)
    chunk_sizes: tuple[int | None, ...] = Field(default=(None,), min_length=1)
    """Tokens of a prompt prefilled at once, ascending; None, which is last, for whole prompts."""
    memory_fractions: tuple[float, ...] = Field(min_length=1)
    """One alone when caps make no difference."""
    max_memory_bytes: int | None = None
    """Most that any device may give, whatever share that is."""
    compile: tuple[bool, ...] = Field(default=(False,), min_length=1)
    lanes: tuple[tuple[Lane, ...], ...] = Field(default=((),), min_length=1)
    """Under arrivals."""
    cuda_graphs: bool = True
    packed_weights: bool = True
    num_prompts: int | None = None
    """A micro-batch is no larger than a replica's share of them; None leaves sizes as they are."""
    engine: EngineSettings | None = None
    """Another engine that runs the plans, with the settings that are the same for all."""
    shards: tuple[int, ...] = ()
    """Workers that share each stage of each partition, on as many devices; empty for one."""
    token_budgets: tuple[int | None, ...] = (None,)
    max_num_seqs: tuple[int | None, ...] = (None,)
    """Ascending; None, which is last, for the engine's own default."""
    kv_cache_sizes: tuple[int, ...] = ()
    """Bytes of each worker, ascending; empty: as `engine` has it."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without lanes or an engine as before there were any."""
        later = ("lanes", "engine", "shards", "token_budgets", "max_num_seqs", "kv_cache_sizes")
        usual = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in write(self).items() if name not in usual}

    def replicas_of(self, point: Mapping[str, int]) -> int:
        """How many pipelines side by side the point stands for."""
        return self.replicas[point["partition_rank"] - 1] if self.replicas else 1

    def shards_of(self, point: Mapping[str, int]) -> int:
        """How many workers share each stage."""
        return self.shards[point["partition_rank"] - 1] if self.shards else 1

    def plan(self, point: Mapping[str, int]) -> Plan:
        """The plan that a point stands for."""
        index, replicas = point["partition_rank"] - 1, self.replicas_of(point)
        partition = self.partitions[index]
        if cut_name(1) in point:
            cuts = (point[cut_name(stage)] for stage in range(1, len(partition)))
            partition = tuple(end - first for first, end in itertools.pairwise((0, *cuts, sum(partition))))
        order = self.orders[index] if self.orders else ()
        if self.engine is not None:
            return self._engine_plan(point, partition, tuple(self.devices[place] for place in order) or self.devices)
        micro_batch_size = self.micro_batch_sizes[point["micro_batch_index"]]
        if replicas > 1 and self.num_prompts is not None:
            micro_batch_size = min(micro_batch_size, math.ceil(self.num_prompts / replicas))
        prefill = _pick(self.prefill_sizes, point, "prefill_index")
        return self.switch(
            Plan.from_layer_counts(
                partition,
                tuple(self.devices[place] for place in order) or self.devices,
                micro_batch_size,
                prefill_micro_batch_size=prefill if prefill < micro_batch_size else None,
                prefill_chunk_size=_pick(self.chunk_sizes, point, "chunk_index"),
                replicas=replicas,
                compile=self.compile[point.get("compile_index", 0)],
                memory_fraction=_pick(self.memory_fractions, point, "memory_index"),
                max_memory_bytes=self.max_memory_bytes,
            ).model_copy(update={"lanes": self.lanes[point.get("lane_index", 0)]})
        )

    def _engine_plan(self, point: Mapping[str, int], partition: Partition, devices: tuple[str, ...]) -> Plan:
        assert self.engine is not None
        budget = _pick(self.token_budgets, point, "budget_index")
        seqs = _pick(self.max_num_seqs, point, "seqs_index")
        settings = {
            "max_num_batched_tokens": budget,
            "max_num_seqs": min(seqs, budget) if seqs and budget else seqs,
            "tensor_parallel_size": self.shards_of(point),
        }
        if self.kv_cache_sizes:
            settings["kv_cache_memory_bytes"] = _pick(self.kv_cache_sizes, point, "kv_index")
        plan = Plan.from_layer_counts(
            partition,
            devices,
            1,
            replicas=self.replicas_of(point),
            memory_fraction=self.memory_fractions[-1],
            max_memory_bytes=self.max_memory_bytes,
        )
        return plan.model_copy(update={"engine": self.engine.model_copy(update=settings)})

    def switch(self, plan: Plan) -> Plan:
        """The plan with the switches that are set for the whole study."""
        return plan.model_copy(update={"cuda_graphs": self.cuda_graphs, "packed_weights": self.packed_weights})

    def dimensions(self) -> dict[str, tuple[int, int, bool]]:
        """Name → (low, high, whether on a log scale), both ends included."""
        always: dict[str, Sequence[object]] = {}
        if self.engine is None:
            always = {"micro_batch_index": self.micro_batch_sizes, "prefill_index": self.prefill_sizes}
        optional: dict[str, Sequence[object]] = {
            "budget_index": self.token_budgets,
            "seqs_index": self.max_num_seqs,
            "kv_index": self.kv_cache_sizes,
            "chunk_index": self.chunk_sizes,
            "memory_index": self.memory_fractions,
            "compile_index": self.compile,
            "lane_index": self.lanes,
        }
        listed = always | {name: values for name, values in optional.items() if len(values) > 1}
        ranks = {"partition_rank": (1, len(self.partitions), True)}
        return ranks | {name: (0, len(values) - 1, False) for name, values in listed.items()}

    @property
    def num_points(self) -> int:
        """How many points there are, whether they run alike or not."""
        return math.prod(high - low + 1 for low, high, _ in self.dimensions().values())

    def points(self, partition_rank: int | None = None) -> Iterator[Point]:
        """Every point, good partitions first; or those of one partition."""
        ranges = {name: range(low, high + 1) for name, (low, high, _) in self.dimensions().items()}
        if partition_rank is not None:
            ranges["partition_rank"] = range(partition_rank, partition_rank + 1)
        for values in itertools.product(*ranges.values()):
            yield dict(zip(ranges, values, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A point, and what its plan comes to."""

    point: Point
    effective: EffectivePlan


def candidates(space: SearchSpace, resolve: Resolver, *, limit: int = MAX_CANDIDATES) -> tuple[Candidate, ...]:
    """One of every plan that runs differently, those of the best partitions first. Points under the largest cap come
    before all others, and stand for those whose cap makes no difference; smaller caps follow as far as there is room:
    about `limit`. Each number of replicas and of stages has its best partition among them."""
    found: dict[str, Candidate] = {}
    for point in _points(space, limit):
        if len(found) >= limit and point.get("memory_index", 0) < len(space.memory_fractions) - 1:
            break
        if isinstance(resolved := resolve(space.plan(point)), EffectivePlan):
            found.setdefault(resolved.key, Candidate(point=point, effective=resolved))
    return tuple(found.values())


def best_ranks(space: SearchSpace, count: int) -> tuple[int, ...]:
    """Ranks of the best partitions, and of the best one of each number of replicas and of stages: these at least."""
    firsts: dict[tuple[int, int, int], int] = {}
    for rank, partition in enumerate(space.partitions, start=1):
        point = {"partition_rank": rank}
        firsts.setdefault((space.replicas_of(point), space.shards_of(point), len(partition)), rank)
    others = [rank for rank in range(1, len(space.partitions) + 1) if rank not in firsts.values()]
    return tuple(sorted([*firsts.values(), *others[: max(0, count - len(firsts))]]))


def _points(space: SearchSpace, limit: int) -> Iterator[Point]:
    """Points of the best partitions, cap by cap from the largest on."""
    few = space.model_copy(update={"memory_fractions": space.memory_fractions[-1:]})
    sizes = {(rows, min(prefill, rows)) for rows in space.micro_batch_sizes for prefill in space.prefill_sizes}
    limits = space.token_budgets, space.max_num_seqs, space.kv_cache_sizes or (None,)
    others = math.prod(map(len, (space.chunk_sizes, space.compile, space.lanes, *limits)))
    ranks = best_ranks(space, limit // (len(sizes) * others))
    many_caps = len(space.memory_fractions) > 1
    for cap in reversed(range(len(space.memory_fractions))):
        for rank in ranks:
            for point in few.points(rank):
                yield {**point, "memory_index": cap} if many_caps else point


def cut_name(index: int) -> str:
    """Name of the value that holds the first layer of a stage, counted from 0, where no rank stands for the cuts."""
    return f"cut_{index}"


def _pick(choices: Sequence[_T], point: Mapping[str, int], name: str) -> _T:
    """The choice of a point; the last one where there is no such dimension."""
    return choices[point.get(name, len(choices) - 1)]
