"""The search space of another engine: its replicas, stages and shards, splits near the even one, and its limits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipetune.bench import memory
from pipetune.bench.errors import ConfigError, NothingFeasibleError
from pipetune.bench.fleet.engine import Engine
from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.arrays import remembered
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.partition.splits import Partition, best_partitions, unevenness
from pipetune.tuner.planning.partition.stage_table import stage_seconds
from pipetune.tuner.search.space.resolver import Resolver, overrun
from pipetune.tuner.search.space.space import SearchSpace

SPLITS = 24
"""Partitions of each number of replicas, stages and shards, the most even ones."""
_TOLERANCE = 0.5
_LEAST_BUDGET, _BUDGETS, _SEQS = 32, 6, 3
"""Tokens of the least budget, and how many halves of all prompts' tokens and of all prompts are tried."""


@dataclass(frozen=True, kw_only=True)
class EngineResolver(Resolver):
    """Tells what a plan comes to on an engine."""

    engine: Engine
    work: Workload

    @remembered
    def __call__(self, plan: Plan) -> EffectivePlan | Failure:
        """The plan, or why it does not fit; each plan is resolved once."""
        return self.engine.resolve(plan, self.work)

    def stage_bytes(self, plan: Plan, index: int) -> memory.StageBytes:
        """Weights and KV cache of each worker; the engine does not tell what else it needs."""
        own = memory.stage_bytes(self.shape, plan, index, prompt_len=self.prompt_len, output_len=self.output_len)
        given = plan.engine and plan.engine.kv_cache_memory_bytes
        kv = given * len(plan.stages) if given else own.kv_per_slot * self.num_prompts
        return memory.StageBytes(weights=own.weights // plan.width, kv_per_slot=kv // len(plan.stages), activations=0)


def build_engine_space(
    config: TuneConfig, devices: Sequence[str], cost: EngineModel, resolve: EngineResolver
) -> SearchSpace:
    """Lays the space out; raises as `build_space`, over splits at the engine's own limits."""
    assert config.engine is not None
    given = config.engine
    space = SearchSpace(
        devices=tuple(devices),
        partitions=((resolve.shape.num_layers,),),
        micro_batch_sizes=(1,),
        prefill_sizes=(1,),
        memory_fractions=(max(config.space.memory_fractions),),
        max_memory_bytes=config.space.max_memory_per_device,
        num_prompts=cost.num_prompts,
        engine=given.settings,
        token_budgets=_limits(given.max_num_batched_tokens, sum(cost.prompt_lens), _BUDGETS, least=_LEAST_BUDGET),
        max_num_seqs=_limits(given.max_num_seqs, cost.num_prompts, _SEQS),
        kv_cache_sizes=tuple(sorted(set(given.kv_cache_memory_bytes or ()))),
    )
    found: list[tuple[float, tuple[int, int, Partition]]] = []
    refused: list[Failure] = []
    if not (entries := list(_entries(config, len(devices), cost))):
        raise ConfigError(
            f"space.min_stages={config.space.min_stages}, space.replicas, engine.tensor_parallel_sizes: no such plan "
            f"on {len(devices)} devices for {resolve.shape.num_attention_heads} attention heads and {cost.num_prompts} "
            "prompts; allow fewer"
        )
    for entry in entries:
        own, sizes = _space_of(space, [entry]), range(max(1, len(space.kv_cache_sizes)))
        tried = [resolve(own.plan({"partition_rank": 1, "kv_index": place})) for place in sizes]
        fits = [one.plan for one in tried if isinstance(one, EffectivePlan)]
        refused += [one for one in tried if isinstance(one, Failure)]
        if fits:
            found.append((cost.predict(fits[-1]).duration_s, entry))
    if not found:
        raise NothingFeasibleError(f"no plan fits into memory; the nearest one: {min(refused, key=overrun).message}")
    return _space_of(space, [entry for _, entry in sorted(found)])


def default_point(space: SearchSpace) -> dict[str, int]:
    """What the engine does by itself over all devices: one pipeline, split most evenly, at its own limits."""
    alone = [
        (*unevenness(partition), rank)
        for rank, partition in enumerate(space.partitions, start=1)
        if space.replicas_of({"partition_rank": rank}) == space.shards_of({"partition_rank": rank}) == 1
    ]
    rank = min(alone)[-1] if alone else 1
    limits = {name: high for name, (_, high, _) in space.dimensions().items() if name != "partition_rank"}
    return {"partition_rank": rank} | limits


def _entries(config: TuneConfig, num_devices: int, cost: EngineModel) -> Iterator[tuple[int, int, Partition]]:
    """Replicas, shards and layers of stages, of every kind; one pipeline may leave devices idle."""
    assert config.engine is not None
    bounds, shape = config.space, cost.shape
    divisors = [count for count in range(1, num_devices + 1) if num_devices % count == 0]
    for shards in config.engine.tensor_parallel_sizes or divisors:
        if shape.num_attention_heads % shards:
            continue
        for replicas in bounds.replicas or divisors:
            most = min(num_devices // (replicas * shards), bounds.max_stages or num_devices)
            least = bounds.min_stages if replicas == shards == 1 else max(bounds.min_stages, most)
            if replicas <= cost.num_prompts:
                for stages in range(least, most + 1):
                    yield from ((replicas, shards, split) for split in _splits(cost, stages))


def _splits(cost: EngineModel, stages: int) -> tuple[Partition, ...]:
    """By nominal rates on equal devices."""
    shape = cost.shape
    if stages > shape.num_layers - len(set(shape.forbidden_cuts)):
        return ()
    whole = Plan.from_layer_counts((shape.num_layers,), ("cpu:0",), cost.num_prompts)
    table = stage_seconds(cost.costs, "cpu:0", cost.kinds(whole))
    return best_partitions(np.array([table] * stages), shape.forbidden_cuts, tolerance=_TOLERANCE, limit=SPLITS)


def _space_of(space: SearchSpace, entries: Sequence[tuple[int, int, Partition]]) -> SearchSpace:
    replicas, shards, partitions = zip(*entries, strict=True)
    # A stage's shards are on its device and on those after it.
    orders = [tuple(range(0, many * width * len(split), width)) for many, width, split in entries]
    return space.model_copy(
        update={"partitions": partitions, "replicas": replicas, "shards": shards, "orders": tuple(orders)}
    )


def _limits(wanted: Sequence[int] | None, whole: int, count: int, least: int = 1) -> tuple[int | None, ...]:
    """Given limits; else halves of the whole, and the engine's own."""
    if wanted is not None:
        return tuple(sorted(set(wanted)))
    halves = {math.ceil(whole / 2**power) for power in range(1, count)}
    return (*sorted(half for half in halves if half >= least), None)
