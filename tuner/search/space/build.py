"""Lays the search space out: replicas and stages, partitions and the devices that hold them, sizes and caps."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from pipetune.bench.errors import ConfigError, NothingFeasibleError
from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import EffectivePlan, Lane
from pipetune.tuner.config.schema import SpaceConfig
from pipetune.tuner.planning.partition.splits import count_partitions
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.space.layouts import Layouts, LayoutSearch
from pipetune.tuner.search.space.resolver import Resolver, overrun
from pipetune.tuner.search.space.space import Point, SearchSpace, best_ranks

_T = TypeVar("_T")

MAX_PARTITIONS = 400
_LEAST_OF_EACH = 4
"""So many entries each number of replicas and of stages keeps, whatever the cost model thinks of it beside others."""
_ROWS_UNDER_ARRIVALS = (1, 2, 4, 8, 16, 32)
_CAPPED_PARTITIONS = 30
"""Partitions that are looked at for whether caps make a difference; the best ones."""
_UNLIKE_PROMPTS, _WEIGHT = 3.0, 4.0
"""Times as long as others prompts are, on average, that get a lane of their own, and the weight of the others' lane."""
_LONG_PROMPT, _LEAST_CHUNK, _CHUNK_STEP = 128, 64, 16
"""Tokens: of prompts that are worth cutting, of the smallest chunk, and what chunks are rounded up to."""


def build_space(
    config: SpaceConfig, devices: Sequence[str], shape: ModelShape, cost: CostModel, resolve: Resolver
) -> SearchSpace:
    """Lays the space out; ConfigError for bounds that model or devices cannot meet, NothingFeasibleError where no plan
    fits into memory, which says what the best partition lacks."""
    cuts = shape.num_layers - 1 - len(set(shape.forbidden_cuts))
    for name in ("min_stages", "max_stages"):
        wanted = getattr(config, name)
        if wanted is not None and wanted > cuts + 1:
            raise ConfigError(
                f"space.{name}={wanted}: {shape.architecture} has {shape.num_layers} layers "
                f"and can be cut into {cuts + 1} stages at most"
            )
    _check_recurrent(config, shape)
    sizes = _micro_batch_sizes(config, cost.num_prompts, len(devices), under_arrivals=cost.arrivals is not None)
    together = config.prefill_micro_batch_sizes or sizes
    is_whole = shape.recurrent or (shape.whole_slots and cost.arrivals is not None)
    prefill_sizes = (max(sizes),) if is_whole else _clipped(together, max(sizes))
    fractions = tuple(sorted(set(config.memory_fractions)))
    if not (widths := tuple(_widths(config, len(devices), cuts + 1, cost.num_prompts))):
        raise ConfigError(
            f"space.replicas={', '.join(map(str, config.replicas or ()))}: {cost.num_prompts} prompts over "
            f"{len(devices)} devices give no replica work for {config.min_stages} stages or more; allow 1"
        )
    layouts = Layouts(
        config=config,
        devices=tuple(devices),
        shape=shape,
        cost=cost,
        resolve=resolve,
        sizes=sizes,
        prefill_sizes=prefill_sizes,
    )
    searches = [LayoutSearch(layouts, replicas, count) for replicas, stages in widths for count in stages]
    found = [search.fitting() for search in searches]
    if not any(found):
        nearest = min((search.nearest() for search in searches), key=overrun)
        raise NothingFeasibleError(f"no plan fits into memory; the nearest one: {nearest.message}")
    first = sorted(layout for own in found for layout in own[:_LEAST_OF_EACH])
    others = sorted(layout for own in found for layout in own[_LEAST_OF_EACH:])
    kept = sorted([*first, *others[: max(0, MAX_PARTITIONS - len(first))]])
    space = SearchSpace(
        devices=tuple(devices),
        partitions=tuple(layout.partition for layout in kept),
        replicas=_unless_all([layout.replicas for layout in kept], 1),
        orders=_unless_all([layout.order for layout in kept], ()),
        micro_batch_sizes=sizes,
        prefill_sizes=prefill_sizes,
        chunk_sizes=_chunk_sizes(config, shape, resolve, len(devices)),
        memory_fractions=fractions,
        max_memory_bytes=config.max_memory_per_device,
        compile=(False, True) if config.compile == "search" else (config.compile,),
        lanes=_lane_sets(cost.prompt_lens) if cost.arrivals is not None else ((),),
        cuda_graphs=config.cuda_graphs,
        packed_weights=config.packed_weights,
        num_prompts=cost.num_prompts,
    )
    if not _caps_matter(space, resolve):
        space = space.model_copy(update={"memory_fractions": fractions[-1:]})
    return space


def _widths(config: SpaceConfig, num_devices: int, most_stages: int, num_prompts: int) -> Iterator[tuple[int, range]]:
    """Numbers of replicas, and of the stages that each may have. One pipeline may leave devices idle. Several take all
    that each of them can use: with a device to spare, a replica more of fewer stages would be the plan to try."""
    most_stages = min(config.max_stages or num_devices, most_stages)
    wanted = config.replicas or [count for count in range(1, num_devices + 1) if num_devices % count == 0]
    for replicas in sorted(set(wanted)):
        stages = min(num_devices // replicas, most_stages)
        if replicas == 1:
            yield 1, range(config.min_stages, stages + 1)
        elif stages >= config.min_stages and replicas <= num_prompts:
            yield replicas, range(stages, stages + 1)


def _check_recurrent(config: SpaceConfig, shape: ModelShape) -> None:
    """Prefill of a model whose state covers whole micro-batches cannot be cut: who asks for it is told."""
    if not shape.recurrent:
        return
    for name in ("prefill_micro_batch_sizes", "prefill_chunk_sizes"):
        wanted = getattr(config, name)
        if wanted is not None and any(size is not None for size in wanted):
            raise ConfigError(
                f"space.{name}: {shape.architecture} must be given whole prompts and whole micro-batches, since a "
                "state covers them or it masks otherwise once something is cached; leave it out"
            )


def _unless_all(values: Sequence[_T], same: _T) -> tuple[_T, ...]:
    """The values; none where all of them are this one."""
    return () if all(value == same for value in values) else tuple(values)


def _caps_matter(space: SearchSpace, resolve: Resolver) -> bool:
    # Whole prompts need the most memory, and no switch needs any.
    first = {"compile": space.compile[:1], "lanes": space.lanes[:1]}
    last = {"chunk_sizes": space.chunk_sizes[-1:], "memory_fractions": space.memory_fractions[-1:]}
    few = space.model_copy(update={**first, **last})

    def outcome(point: Point, fraction: float) -> int | None:
        capped = few.model_copy(update={"memory_fractions": (fraction,)})
        resolved = resolve(capped.plan(point))
        return resolved.in_flight if isinstance(resolved, EffectivePlan) else None

    least, most = space.memory_fractions[0], space.memory_fractions[-1]
    # What lies between cannot differ where these do not.
    return least < most and any(
        outcome(point, least) != outcome(point, most)
        for rank in best_ranks(few, _CAPPED_PARTITIONS)
        for point in few.points(rank)
    )


def _micro_batch_sizes(
    config: SpaceConfig, num_prompts: int, num_devices: int, *, under_arrivals: bool
) -> tuple[int, ...]:
    """Even divisions of the prompts, into as many micro-batches as keep every stage busy and a few more, and powers
    of two; tiny ones are left out, since decode reads all weights once for each. Under arrivals small powers of two:
    how many requests there are says nothing of how many are there at once."""
    if config.micro_batch_sizes is not None:
        return _clipped(config.micro_batch_sizes, num_prompts)
    if under_arrivals:
        return _clipped(_ROWS_UNDER_ARRIVALS, num_prompts)
    counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if count <= max(4, 2 * num_devices)]
    divisions = {math.ceil(num_prompts / count) for count in counts}
    powers = {1 << exponent for exponent in range(num_prompts.bit_length())}
    least = math.ceil(num_prompts / max(16, 2 * num_devices))
    return tuple(sorted(size for size in divisions | powers if least <= size <= num_prompts))


def _chunk_sizes(config: SpaceConfig, shape: ModelShape, resolve: Resolver, num_devices: int) -> tuple[int | None, ...]:
    """Given sizes, those that cut nothing as None; else a half, a quarter and an eighth of the longest prompt. Cutting
    prompts pays where there are too few of them to fill the stages; short ones are not worth it."""
    longest = resolve.prompt_len
    if config.prefill_chunk_sizes is not None:
        wanted = {size if size is not None and size < longest else None for size in config.prefill_chunk_sizes}
    elif (
        shape.recurrent
        or num_devices == 1
        or longest < _LONG_PROMPT
        or (resolve.num_prompts > 8 * num_devices and not resolve.under_arrivals)
    ):
        return (None,)
    else:
        parts = {math.ceil(longest / count / _CHUNK_STEP) * _CHUNK_STEP for count in (2, 4, 8)}
        wanted = {None, *(size for size in parts if _LEAST_CHUNK <= size < longest)}
    return tuple(sorted(wanted, key=lambda size: size or math.inf))


def _lane_sets(prompt_lens: Sequence[int]) -> tuple[tuple[Lane, ...], ...]:
    """No lanes, and one with a step or two after each prefill; where prompts are of two kinds also a lane for each.
    They are told apart where the logarithms of both kinds are least spread (N. Otsu, 1979)."""
    steady, gathering = Lane(prefills_per_decode=1), Lane(prefills_per_decode=0.5)
    logs = sorted(map(math.log, prompt_lens))
    sums = list(itertools.accumulate(logs, initial=0.0))

    def apart(place: int) -> float:
        """Between the means of the logarithms."""
        return (sums[-1] - sums[place]) / (len(logs) - place) - sums[place] / place

    places = [place for place in range(1, len(logs)) if logs[place - 1] < logs[place]]
    cut = max(places, key=lambda place: place * (len(logs) - place) * apart(place) ** 2, default=0)
    if not cut or apart(cut) < math.log(_UNLIKE_PROMPTS):
        return (), (steady,), (gathering,)
    short = Lane(up_to_tokens=sorted(prompt_lens)[cut - 1], weight=_WEIGHT)
    return (), (steady,), (gathering,), (short, steady), (short.model_copy(update={"slots": 1}), steady)


def _clipped(sizes: Sequence[int], most: int) -> tuple[int, ...]:
    return tuple(sorted({min(size, most) for size in sizes}))


def count_raw_partitions(config: SpaceConfig, shape: ModelShape, num_devices: int, num_prompts: int) -> int:
    """Partitions before any ranking, for people who want to know how large the space is."""
    cuts = shape.num_layers - 1 - len(set(shape.forbidden_cuts))
    return sum(
        count_partitions(
            shape.num_layers, min_stages=stages.start, max_stages=stages.stop - 1, forbidden_cuts=shape.forbidden_cuts
        )
        for _, stages in _widths(config, num_devices, cuts + 1, num_prompts)
    )
