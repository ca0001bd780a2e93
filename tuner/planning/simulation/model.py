"""Predicts what a plan gives before it is run: the real schedule, simulated with what its tasks are thought to cost.

What tasks cost is told by `Costs`: nominal rates (`nominal`), a profile of this machine (`profiled`), or either of
them corrected by what plans took (`refit`). None of them tells compiled from eager layers, packed weights from unpacked
ones or CUDA graphs from launches: they predict these alike, unless they were measured with them.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import Arrivals, Goodput, Plan, StagePlan, Workload, device_host, device_kind
from pipetune.tuner.planning.arrays import Floats, remembered
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.contention import Contention
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.prediction import Prediction, SimulatedRun, predictions_of
from pipetune.tuner.planning.simulation.schedule import TaskSequence, grid_points_of, simulate_plans, task_sequence_of

GAPS_S: Mapping[str, float] = {"cpu": 3e-4, "cuda": 0.0}
"""By kind of device: from the end of a task's compute until its stage can begin another, while it hands the output on.
On CPUs measured, with gloo: the median over many plans. On GPUs the host does it while the device computes."""
STALLS_S: Mapping[str, float] = {"cpu": 2e-3, "cuda": 0.0}
"""By kind of device: see `simulate_plans`. On CPUs measured, with gloo, on a machine whose workers take every core."""
TOKEN_BYTES = 8
FEW = TaskKind(1, 16, 0), TaskKind(1, 32, 0)
"""A prefill that is mostly what any pass takes, and one of twice as many tokens."""


def joined_s(prefill_s: float, step_s: float, few_s: float, twice_s: float) -> float:
    """Seconds of a prefill and a decode step in one forward pass: what a pass takes whatever its tokens, of which
    reading the weights is a part, is spent once. It is what prefills of few tokens come to, drawn on to none."""
    return prefill_s + max(0.0, step_s - max(0.0, 2 * few_s - twice_s))


def of_device(known: Mapping[str, float], device: str) -> float:
    """What is known of a device by its name, or else by its kind; 0 where nothing is."""
    return known.get(device, known.get(device_kind(device), 0.0))


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicts runs of one workload on one model."""

    shape: ModelShape
    prompt_lens: tuple[int, ...]
    """Tokens of every prompt, in any order."""
    output_lens: tuple[int, ...]
    """Tokens generated for each prompt; 0 where texts are scored."""
    costs: Costs
    goodput: Goodput | None = None
    arrivals: Arrivals | None = None
    """How the prompts come over time; what is predicted here is of all at once, and `load.under_load` has the rest."""
    gaps_s: Mapping[str, float] = field(default_factory=lambda: GAPS_S)
    """By a device's name or its kind, as in `GAPS_S`."""
    stalls_s: Mapping[str, float] = field(default_factory=lambda: STALLS_S)
    """By the receiving device, as in `STALLS_S`."""
    contention: Contention | None = None
    """None where the costs hold as they are."""

    @classmethod
    def of_workload(
        cls, shape: ModelShape, workload: Workload, prompt_lens: Sequence[int], costs: Costs | None = None
    ) -> Self:
        """A model for these prompts; `prompt_lens` in tokens, costs by nominal rates where none are given."""
        return cls(
            shape=shape,
            prompt_lens=tuple(prompt_lens),
            output_lens=workload.unlike_lens or (workload.generated_len,) * len(prompt_lens),
            costs=NominalCosts(shape, scores=workload.generated_len == 0) if costs is None else costs,
            contention=costs.contention if isinstance(costs, ProfiledCosts) else None,
            goodput=workload.goodput,
            arrivals=workload.arrivals,
        )

    @property
    def num_prompts(self) -> int:
        """Prompts of the workload."""
        return len(self.prompt_lens)

    @cached_property
    def _longest_first(self) -> tuple[tuple[int, int], ...]:
        """Lengths of each prompt and of its output."""
        lens = zip(self.prompt_lens, self.output_lens, strict=True)
        return tuple(sorted(lens, key=lambda pair: -pair[0]))

    def kinds(self, plan: Plan, in_flight: int | None = None) -> Counter[TaskKind]:
        """How many tasks of each kind every stage runs, in the replica that has most prompts. Here as below,
        `in_flight` counts the micro-batches resident at once in each replica; None means all."""
        sequence = self._sequence(plan, in_flight, 0)
        return Counter(dict(zip(sequence.kinds, sequence.counts.tolist(), strict=True)))

    def predict(self, plan: Plan, in_flight: int | None = None) -> Prediction:
        """What a run of the plan is thought to give."""
        return self.predict_many([(plan, in_flight)])[0]

    def predict_many(self, plans: Sequence[tuple[Plan, int | None]]) -> tuple[Prediction, ...]:
        """What runs of many plans, each with its number in flight, are thought to give; in the order given. Plans of
        one schedule are simulated together, so that many at once cost little more than one."""
        groups: dict[object, list[int]] = defaultdict(list)
        for index, (plan, in_flight) in enumerate(plans):
            groups[self._schedule_of(plan, in_flight)].append(index)
        found: dict[int, Prediction] = {}
        for members in groups.values():
            alike = [plans[index][0] for index in members]
            predictions = predictions_of(
                self._simulate_alike(alike, plans[members[0]][1]),
                prompt_lens=self.prompt_lens,
                output_lens=self.output_lens,
                goodput=self.goodput,
                num_stages=len(alike[0].devices),
            )
            found.update(zip(members, predictions, strict=True))
        return tuple(found[index] for index in range(len(plans)))

    def task_s(self, plan: Plan, kind: TaskKind) -> tuple[list[float], list[float], float]:
        """Seconds of a task on each stage of a single pipeline, of each hop between them, and of its tokens' way back.
        Times are those while all devices compute; `contention` says how much less a task takes that runs alone."""
        points, ((*shares,),) = grid_points_of((kind,))
        last = len(plan.stages) - 1
        busy = []
        for index, stage in enumerate(plan.stages):
            costs = []
            for point in points:
                before = self._layers_before(stage.device, point)
                ends_s = self.costs.ends_s(stage.device, point, is_first=index == 0, is_last=index == last)
                costs.append(float(before[stage.end_layer] - before[stage.first_layer]) + ends_s)
            busy.append(float(np.dot(shares, costs)))
        size = kind.rows * kind.new_tokens * self.shape.crossing_bytes
        hops = [self.costs.hop_s(source, target, size) for source, target in itertools.pairwise(plan.devices)]
        back = self.costs.hop_s(plan.devices[-1], plan.devices[0], kind.rows * TOKEN_BYTES) if last else 0.0
        return busy, hops, back

    def joined_s(self, plan: Plan, kinds: Sequence[TaskKind]) -> tuple[list[float], list[float], float]:
        """As `task_s`, of tasks that are one forward pass, as the function `joined_s` has it."""
        each = [self.task_s(plan, kind) for kind in kinds]
        busy, hops, back = each[0]
        if len(each) > 1:
            few, twice = (self.task_s(plan, kind)[0] for kind in FEW)
            step, further, _ = each[1]
            busy = list(map(joined_s, busy, step, few, twice))
            hops = [max(pair) for pair in zip(hops, further, strict=True)]
        return busy, hops, back

    @remembered
    def known_tasks(
        self, stages: tuple[StagePlan, ...]
    ) -> dict[tuple[TaskKind, ...], tuple[list[float], list[float], float]]:
        """What `joined_s` gave, for those who ask it often."""
        return {}

    def _sequence(self, plan: Plan, in_flight: int | None, replica: int) -> TaskSequence:
        prompt_lens, output_lens = zip(*self._longest_first[replica :: plan.replicas], strict=True)
        return task_sequence_of(
            prompt_lens,
            output_len=output_lens,
            micro_batch_size=plan.micro_batch_size,
            prefill_size=plan.prefill_size,
            chunk_size=plan.prefill_chunk_size,
            in_flight=in_flight,
        )

    def _schedule_of(self, plan: Plan, in_flight: int | None) -> object:
        """Equal for plans of one schedule."""
        sizes = (plan.micro_batch_size, plan.prefill_size, plan.prefill_chunk_size)
        return plan.replicas, len(plan.stages), *sizes, in_flight

    def _simulate_alike(self, plans: Sequence[Plan], in_flight: int | None) -> Sequence[SimulatedRun]:
        """The replicas of plans that differ in the layers and devices of their stages alone."""
        width = len(plans[0].stages)
        devices = [plan.devices for plan in plans]
        bounds = np.array([[(stage.first_layer, stage.end_layer) for stage in plan.stages] for plan in plans])
        runs = []
        # A replica without prompts has idle stages.
        for replica in range(min(plans[0].replicas, self.num_prompts)):
            part = slice(replica * width, (replica + 1) * width)
            # The last stage's is of no link.
            sharers = np.array([self._sharers(names, width)[part][:-1] for names in devices]).T
            sequence = self._sequence(plans[0], in_flight, replica)
            runs.append(self._run(sequence, [names[part] for names in devices], bounds, sharers, plans[0].replicas))
        return runs

    def _run(
        self,
        sequence: TaskSequence,
        devices: Sequence[tuple[str, ...]],
        bounds: npt.NDArray[np.int_],
        sharers: npt.NDArray[np.int_],
        replicas: int,
    ) -> SimulatedRun:
        """A replica of each plan; `bounds` is `[plan, stage, (first, end)]`, and `sharers` `[stage - 1, plan]`."""
        num_plans, num_stages = bounds.shape[:2]
        names = sorted({name for row in devices for name in row})
        place = {name: index for index, name in enumerate(names)}
        device = np.array([[place[name] for name in row] for row in devices])
        layers = np.stack([self._layers_of(sequence, name) for name in names])
        busy_s = np.empty((len(sequence.kinds), num_stages, num_plans))
        for stage in range(num_stages):
            at, first, end = device[:, stage], bounds[:, stage, 0], bounds[:, stage, 1]
            is_first, is_last = stage == 0, stage == num_stages - 1
            ends = np.stack([self._ends_of(sequence, name, is_first, is_last) for name in names])
            busy_s[:, stage] = (layers[at, :, end] - layers[at, :, first] + ends[at]).T
        if self.contention is not None:
            busy_s *= self.contention.factors(
                sequence.kinds, sequence.counts, busy_s, slots=sequence.slots, replicas=replicas
            )
        links = [tuple(itertools.pairwise(row)) for row in devices]
        hops_s = np.empty((len(sequence.kinds), num_stages - 1, num_plans))
        for stage in range(num_stages - 1):
            hops_s[:, stage] = self._hops(sequence, [row[stage] for row in links])
        # What a message of no bytes takes is latency, which others may share.
        empty_s = {link: self.costs.hop_s(*link, 0) for link in {link for row in links for link in row}}
        latency_s = np.array([[empty_s[link] for link in row] for row in links]).T.reshape(num_stages - 1, num_plans)
        gaps, stalls = (np.array([of_device(known, name) for name in names]) for known in (self.gaps_s, self.stalls_s))
        timeline = simulate_plans(
            sequence,
            busy_s,
            hops_s,
            self._hops(sequence, [(row[-1], row[0]) for row in devices], tokens=True),
            # A stage alone hands nothing on.
            gap_s=gaps[device.T] if num_stages > 1 else 0.0,
            stall_s=stalls[device.T[1:]],
            wires_s=np.maximum(hops_s - latency_s, 0.0) * sharers,
        )
        busy = np.einsum("k,ksp->sp", sequence.counts.astype(float), busy_s)
        return SimulatedRun(sequence=sequence, timeline=timeline, busy_s=busy)

    @remembered
    def _sharers(self, devices: tuple[str, ...], width: int) -> tuple[int, ...]:
        """By stage: how many send through the same network card as it does on its way to the next one."""
        hosts = [device_host(device) for device in devices]
        ways = [
            (source, target if stage % width else source)
            for stage, (source, target) in enumerate(zip(hosts, [*hosts[1:], ""], strict=True), start=1)
        ]
        leaving, coming = (Counter(way[end] for way in ways if way[0] != way[1]) for end in (0, 1))
        return tuple(max(leaving[way[0]], coming[way[1]]) if way[0] != way[1] else 1 for way in ways)

    @remembered
    def _layers_before(self, device: str, kind: TaskKind) -> Floats:
        """`[num_layers + 1]`: of all layers before each one."""
        return np.concatenate([[0.0], np.cumsum(self.costs.layers_s(device, kind))])

    @remembered
    def _layers_of(self, sequence: TaskSequence, device: str) -> Floats:
        """`[kind, num_layers + 1]`: of all layers before each one."""
        return sequence.weights @ np.stack([self._layers_before(device, at) for at in sequence.grid_points])

    @remembered
    def _ends_of(self, sequence: TaskSequence, device: str, is_first: bool, is_last: bool) -> Floats:
        """`[kind]`."""
        seconds: Floats = sequence.weights @ np.array(
            [self.costs.ends_s(device, kind, is_first=is_first, is_last=is_last) for kind in sequence.grid_points]
        )
        return seconds

    def _hops(self, sequence: TaskSequence, links: Sequence[tuple[str, str]], *, tokens: bool = False) -> Floats:
        """`[kind, plan]`: messages from one device to another, of hidden states or of tokens."""
        place = {link: index for index, link in enumerate(dict.fromkeys(links))}
        each = np.stack([self._message_s(sequence, source, target, tokens) for source, target in place])
        return each[[place[link] for link in links]].T

    @remembered
    def _message_s(self, sequence: TaskSequence, source: str, target: str, tokens: bool) -> Floats:
        """`[kind]`."""
        crossing_bytes = self.shape.crossing_bytes
        sizes = [kind.rows * (TOKEN_BYTES if tokens else kind.new_tokens * crossing_bytes) for kind in sequence.kinds]
        return np.array([self.costs.hop_s(source, target, size) for size in sizes])
