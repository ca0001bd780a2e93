"""What any run of layers would take as a stage: seconds over the whole run, and bytes; and which devices are alike.

Tables are `[first, end]`, for the layers `[first, end)`. What begins with layer 0 is a first stage, and what ends with
the last layer a last one.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from pipetune.bench.memory import ModelShape, stage_bytes
from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import Plan, StagePlan
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.partition.splits import Partition, Table, best_partitions
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.planning.simulation.schedule import grid_points_of

ALIKE = 0.02
"""Devices whose times and memory differ by no more than this share are taken for equal."""
_NEAR, _LOOKED_AT = 0.1, 50
"""Splits whose slowest stage is so near to the best one are worth a comparison by their whole duration."""


def stage_seconds(costs: Costs, device: str, kinds: Mapping[TaskKind, int]) -> Floats:
    """Seconds that a stage on the device computes over a run of so many tasks of each kind."""
    grid_points, weights = grid_points_of(tuple(kinds))
    counts = np.array(list(kinds.values()), dtype=float) @ weights
    layers = np.sum([n * costs.layers_s(device, kind) for kind, n in zip(grid_points, counts, strict=True)], axis=0)
    before = np.concatenate([[0.0], np.cumsum(layers)])
    seconds = before[np.newaxis, :] - before[:, np.newaxis]
    places = np.arange(len(before))
    for is_first, is_last in itertools.product((False, True), repeat=2):
        ends_s = sum(
            count * costs.ends_s(device, kind, is_first=is_first, is_last=is_last)
            for kind, count in zip(grid_points, counts.tolist(), strict=True)
        )
        seconds[np.ix_((places == 0) == is_first, (places == len(layers)) == is_last)] += ends_s
    table: Floats = np.maximum(seconds, 0.0)
    return table


def stage_needs(shape: ModelShape, plan: Plan, device: str, *, prompt_len: int, output_len: int) -> Floats:
    """Bytes that a stage takes on a device of this kind with one micro-batch in flight, as `stage_bytes` has them;
    infinity where there is no stage. Sizes and switches are those of the plan, whose stages do not matter."""
    num_layers = shape.num_layers
    needs = np.full((num_layers + 1, num_layers + 1), np.inf)
    # Thousands of them, and nothing in them to check.
    stages = {
        (first, end): StagePlan.model_construct(device=device, first_layer=first, end_layer=end)
        for first, end in itertools.combinations(range(num_layers + 1), 2)
    }
    for (first, end), stage in stages.items():
        before = () if first == 0 else (stages[0, first],)
        behind = () if end == num_layers else (stages[end, num_layers],)
        cut = plan.model_copy(update={"stages": (*before, stage, *behind)})
        need = stage_bytes(shape, cut, len(before), prompt_len=prompt_len, output_len=output_len)
        needs[first, end] = need.total(1)
    return needs


def alike_classes(values: Floats, tolerance: float = ALIKE) -> tuple[int, ...]:
    """Class of each device, counted from 0 in order; a device is of the first class whose first member is like it: of
    the positive `values`, `[device, quantity]`, any two differ by no more than a share `tolerance` of the larger."""
    firsts: list[Floats] = []
    classes = []
    for row in values:
        near = (np.all(np.abs(row - other) <= tolerance * np.maximum(row, other)) for other in firsts)
        kind = next((kind for kind, is_near in enumerate(near) if is_near), len(firsts))
        if kind == len(firsts):
            firsts.append(row)
        classes.append(kind)
    return tuple(classes)


def count_states(classes: Sequence[int]) -> int:
    """How many ways there are to have taken some of the devices, equal ones apart."""
    return int(np.prod([count + 1 for count in Counter(classes).values()], dtype=object))


def near_best(
    cost: CostModel, kinds: Mapping[TaskKind, int], devices: Sequence[str], fill: Table
) -> tuple[Partition, ...]:
    """Partitions over all devices, in the order given, that fit and whose slowest stage is near to the fastest, over so
    many tasks of each kind; the best first, none where nothing fits. `fill` is `[device, first, end]`, the share of its
    memory that a stage would take; up to 1 fits."""
    seconds = np.array([stage_seconds(cost.costs, device, kinds) for device in devices])
    table = np.where(fill <= 1.0, seconds, np.inf)
    return best_partitions(table, cost.shape.forbidden_cuts, tolerance=_NEAR, limit=_LOOKED_AT)
