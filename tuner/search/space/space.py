"""What may be proposed: partitions by their rank, sizes and switches by their index; each point stands for a plan.

A proposal is a point of a few ordinal numbers. `partition_rank` counts through the best partitions of an analytic
cost, on a log scale: TPE then learns how far down the list it pays to look, which it cannot learn of raw cuts. How
many replicas a partition has, and on which devices it lies where these are unlike, is part of its entry, since stages
and replicas share the devices: every point can run.
`micro_batch_index`, `prefill_index` and `chunk_index` count through ascending sizes, `memory_index` through memory
fractions, `compile_index` from off to on; the last three are there only when they make a difference.

A point may also carry cuts (`cut_1`, `cut_2` …), the first layers of its stages, where no partition listed is the one
meant; its rank is then that of a neighbour.

The space is stored with the study: partitions keep their ranks whatever becomes of the cost model.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from pydantic import Field

from pipetune.bench.spec import Plan, Value
from pipetune.tuner.planning.partition.splits import Partition

Point = dict[str, int]
_T = TypeVar("_T")


class SearchSpace(Value):
    """The space of one study; partitions and sizes are listed, points refer to them by position.

    What has a default was not searched when the first spaces were written: these read back as they were.
    """

    study_id: str = Field(default_factory=lambda: uuid.uuid4().hex[:12])
    """Names the study in a database that holds several."""
    devices: tuple[str, ...]
    partitions: tuple[Partition, ...]
    """Best first by the cost model at the time; rank 1 is the first."""
    replicas: tuple[int, ...] = ()
    """Pipelines of each partition that stand side by side; empty for one of each."""
    orders: tuple[tuple[int, ...], ...] = ()
    """Devices that hold each partition's stages, replica by replica and stage by stage; empty, for one or
    for all, takes the first ones in order."""
    micro_batch_sizes: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
    chunk_sizes: tuple[int | None, ...] = (None,)
    """Tokens of a prompt prefilled at once, ascending; None, which is last, for whole prompts."""
    memory_fractions: tuple[float, ...]
    """One alone when caps make no difference."""
    compile: tuple[bool, ...] = (False,)
    cuda_graphs: bool = True
    packed_weights: bool = True
    num_prompts: int | None = None
    """A micro-batch is no larger than a replica's share of them; None leaves sizes as they are."""

    def replicas_of(self, point: Mapping[str, int]) -> int:
        """How many pipelines side by side the point stands for."""
        return self.replicas[point["partition_rank"] - 1] if self.replicas else 1

    def partition_of(self, point: Mapping[str, int]) -> Partition:
        """The layers of each stage: those of its rank, unless the point carries cuts of its own."""
        partition = self.partitions[point["partition_rank"] - 1]
        if cut_name(1) not in point:
            return partition
        cuts = (point[cut_name(index)] for index in range(1, len(partition)))
        return tuple(end - first for first, end in itertools.pairwise((0, *cuts, sum(partition))))

    def devices_of(self, point: Mapping[str, int]) -> tuple[str, ...]:
        """The devices that hold the stages, replica by replica and stage by stage; perhaps more at the end."""
        order = self.orders[point["partition_rank"] - 1] if self.orders else ()
        return tuple(self.devices[place] for place in order) or self.devices

    def plan(self, point: Mapping[str, int]) -> Plan:
        """The plan that a point stands for."""
        replicas = self.replicas_of(point)
        micro_batch_size = self.micro_batch_sizes[point["micro_batch_index"]]
        if replicas > 1 and self.num_prompts is not None:
            micro_batch_size = min(micro_batch_size, math.ceil(self.num_prompts / replicas))
        prefill = _pick(self.prefill_sizes, point, "prefill_index")
        return self.switch(
            Plan.from_layer_counts(
                self.partition_of(point),
                self.devices_of(point),
                micro_batch_size,
                prefill_micro_batch_size=prefill if prefill < micro_batch_size else None,
                prefill_chunk_size=_pick(self.chunk_sizes, point, "chunk_index"),
                replicas=replicas,
                compile=self.compile[point.get("compile_index", 0)],
                memory_fraction=_pick(self.memory_fractions, point, "memory_index"),
            )
        )

    def switch(self, plan: Plan) -> Plan:
        """The plan with the switches that are set for the whole study."""
        return plan.model_copy(update={"cuda_graphs": self.cuda_graphs, "packed_weights": self.packed_weights})

    def dimensions(self) -> dict[str, tuple[int, int, bool]]:
        """Name → (low, high, whether on a log scale), both ends included."""
        dimensions = {
            "partition_rank": (1, len(self.partitions), True),
            "micro_batch_index": (0, len(self.micro_batch_sizes) - 1, False),
            "prefill_index": (0, len(self.prefill_sizes) - 1, False),
        }
        optional = {
            "chunk_index": self.chunk_sizes,
            "memory_index": self.memory_fractions,
            "compile_index": self.compile,
        }
        return dimensions | {
            name: (0, len(choices) - 1, False) for name, choices in optional.items() if len(choices) > 1
        }

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


def cut_name(index: int) -> str:
    """Name of the value that holds the first layer of a stage, counted from 0, where no rank stands for the cuts."""
    return f"cut_{index}"


def _pick(choices: Sequence[_T], point: Mapping[str, int], name: str) -> _T:
    """The choice of a point; the last one where there is no such dimension."""
    return choices[point.get(name, len(choices) - 1)]
