"""What the records say of plans: which ran, which are due again, what they gave, and what stages ran out of memory.

Plans that would run the same way are one, whatever points proposed them. It grows with the records, each read once.
"""

import math
import operator
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipetune.bench import metrics
from pipetune.bench.record import TRANSIENT, Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.planning.calibration.observation import Observation, observe
from pipetune.tuner.search.space.resolver import Resolver, identity
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.files import was_interrupted

OVER_MEMORY = frozenset({FailureKind.OVER_MEMORY_CAP, FailureKind.OUT_OF_MEMORY})

ENOUGH_BROKE = 2
"""Failures that condemn a trait of plans, where no plan with it has worked."""


@dataclass(kw_only=True)
class PlanHistory:
    """One plan with its runs."""

    effective: EffectivePlan | None
    """None where it is too large to run."""
    records: list[Record] = field(default_factory=list)
    runs: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each measurement."""
    observed: bool = False
    """Whether a run of it teaches the cost model."""

    @property
    def point(self) -> Point | None:
        """The first that the search proposed for it."""
        params = next((record.params for record in self.records if record.role == "trial" and record.params), None)
        return {name: int(value) for name, value in params.items()} if params else None

    @property
    def finished(self) -> list[Record]:
        """Runs that nobody stopped."""
        return [record for record in self.records if not was_interrupted(record)]

    def value(self, metric: str) -> float | None:
        """Median over the runs."""
        values = [run[metric] for run in self.runs if metric in run]
        return statistics.median(values) if values else None


class History:
    """The records so far."""

    def __init__(self, space: SearchSpace, resolve: Resolver) -> None:
        self._space, self._resolve = space, resolve
        self.records: list[Record] = []
        self.taken: frozenset[str] = frozenset()
        """Identities of plans that others run now."""
        self.plans: dict[str, PlanHistory] = {}
        """Plans by identity, in the order of their first records."""
        self.observations: list[Observation] = []
        self._lessons: list[Observation | None] = []
        """What each record teaches."""
        self.refused = 0
        self.replicates = 0
        """Runs of plans that were measured already."""
        self.marks: list[int] = []
        """How many records there were once each trial that counts against the budget had its own: neither stopped ones
        count, nor refusals, nor a first loss of workers."""
        self.out_of_memory: dict[str, int] = {}
        """Least accounted bytes of a plan that ran out of memory, by device."""
        self.fitted: Counter[str] = Counter()
        """Most accounted bytes of a plan that ran, by device."""
        self.worked: Counter[tuple[str, object]] = Counter()
        """Runs that gave a measurement, by traits of plans."""
        self.broke: Counter[tuple[str, object]] = Counter()
        """Runs that failed for another reason than memory, by traits of plans."""

    @property
    def counted(self) -> int:
        """How many trials count against the budget."""
        return len(self.marks)

    def is_extended_by(self, records: Sequence[Record]) -> bool:
        """Whether these are the records known, and perhaps more."""
        return len(records) >= len(self.records) and all(map(operator.is_, self.records, records))

    def extend(self, records: Sequence[Record]) -> None:
        """Reads the records beyond those known."""
        for record in records[len(self.records) :]:
            self._read(record, observe(record))

    def until(self, count: int) -> "History":
        """The history as it was when there were so many records."""
        before = History(self._space, self._resolve)
        for record, lesson in zip(self.records[:count], self._lessons[:count], strict=True):
            before._read(record, lesson)
        return before

    def take(self, points: Collection[Point]) -> None:
        """Leaves these points' plans to others, who run them now."""
        plans = [self._space.plan(point) for point in points]
        self.taken = frozenset(identity(plan, self._resolve(plan)) for plan in plans)

    def is_open(self, key: str) -> bool:
        """Whether an effective plan, by its key, may be proposed: it never ended or has a second chance."""
        known = self.plans.get(key)
        return key not in self.taken and (known is None or is_due(known.records))

    def is_new(self, point: Point, *, most_refused: int) -> bool:
        """Whether the point's plan is worth a run: it never ended, lost its workers once, or was never tried. Refusals
        cost no time, but shall not go on for ever: there may be `most_refused`."""
        plan = self._space.plan(point)
        resolved = self._resolve(plan)
        may_run = isinstance(resolved, EffectivePlan) or self.refused < most_refused
        return may_run and self.is_open(identity(plan, resolved))

    def due_again(self) -> PlanHistory | None:
        """The first plan of the search's whose run was stopped or lost its workers, and that has a chance left."""
        return next((known for key, known in self.plans.items() if known.point and self.is_open(key)), None)

    def chance_to_work(self, plan: Plan) -> float:
        """A guess from plans that share traits, of use for comparing plans. The product of `(worked + 1) / (worked +
        broke + 1)` over them; 0 where all that share one broke, others not."""
        if not self.broke:
            return 1.0
        found = traits(plan)
        if any(self._is_condemned(trait) for trait in found):
            return 0.0
        return math.prod((self.worked[trait] + 1) / (self.worked[trait] + self.broke[trait] + 1) for trait in found)

    def _is_condemned(self, trait: tuple[str, object]) -> bool:
        name, _ = trait
        others = any(other[0] == name and other != trait for other, count in self.worked.items() if count)
        return self.broke[trait] >= ENOUGH_BROKE and not self.worked[trait] and others

    def chance_to_fit(self, needed: Mapping[str, int]) -> float:
        """How likely a plan that needs so many accounted bytes by device has memory enough: the limit of each may lie
        anywhere between what was enough and what was too much."""
        chance = 1.0
        for device, too_much in self.out_of_memory.items():
            enough, wanted = self.fitted[device], needed.get(device, 0)
            if wanted > enough:
                chance *= max(0.0, (too_much - wanted) / (too_much - enough)) if too_much > enough else 0.0
        return chance

    def _read(self, record: Record, lesson: Observation | None) -> None:
        self.records.append(record)
        self._lessons.append(lesson)
        if record.spec is None or record.role == "bench":
            return
        plan, result = record.spec.plan, record.result
        resolved = record.effective or self._resolve(plan)
        effective = resolved if isinstance(resolved, EffectivePlan) else None
        known = self.plans.setdefault(identity(plan, resolved), PlanHistory(effective=effective))
        is_trial = record.role == "trial"
        comes_again = was_interrupted(record) or (is_lost(record) and not known.finished)
        if is_trial and known.runs:
            self.replicates += 1
        known.records.append(record)
        if isinstance(result, Measurement):
            known.runs.append(metrics.derive(result))
            self.worked.update(traits(plan))
            for device, wanted in (self._resolve.needed_bytes(effective) if effective else {}).items():
                self.fitted[device] = max(self.fitted[device], wanted)
        elif not comes_again:
            self._note_failure(record.effective, plan, result)
        if lesson is not None:
            self.observations.append(lesson)
            known.observed = True
        over_cap = isinstance(result, Failure) and result.kind == FailureKind.OVER_MEMORY_CAP
        if is_trial and over_cap and record.effective is None:
            self.refused += 1
        elif is_trial and not comes_again:
            self.marks.append(len(self.records))

    def _note_failure(self, effective: EffectivePlan | None, plan: Plan, failure: Failure) -> None:
        if failure.kind not in OVER_MEMORY:
            self.broke.update(traits(plan))
        elif effective is not None:
            needed = self._resolve.needed_bytes(effective)
            device = failure.device if failure.device in needed else max(needed, key=lambda name: needed[name])
            self.out_of_memory[device] = min(needed[device], self.out_of_memory.get(device, needed[device]))


def kinds_of(plan: Plan, num_devices: int) -> tuple[tuple[str, int], ...]:
    """What the cost model knows least of: replicas, prompts in chunks, compiled layers, lanes; or a single device of
    many."""
    if plan.engine is not None:
        layout = ("replicas", plan.replicas), ("stages", len(plan.stages)), ("shards", plan.width)
        return (*layout, ("budget", int(plan.engine.max_num_batched_tokens is not None)))
    if len(plan.devices) == 1 < num_devices:
        return (("devices", 1),)
    return (
        ("replicas", plan.replicas),
        ("chunks", int(plan.prefill_chunk_size is not None)),
        ("compile", int(plan.compile)),
        *([("lanes", len(plan.lanes))] if plan.lanes else []),
    )


def traits(plan: Plan) -> tuple[tuple[str, object], ...]:
    """What plans have in common that may break them all."""
    return (
        ("replicas", plan.replicas),
        ("stages", len(plan.stages)),
        ("micro_batch", plan.micro_batch_size),
        ("prefill", plan.prefill_size),
        ("chunk", plan.prefill_chunk_size),
        ("compile", plan.compile),
        ("shards", plan.width),
        ("budget", plan.engine and plan.engine.max_num_batched_tokens),
    )


def is_lost(record: Record) -> bool:
    """Whether the run lost its workers, which may have been chance."""
    return isinstance(record.result, Failure) and record.result.kind in TRANSIENT


def is_due(records: Sequence[Record]) -> bool:
    """Whether what these are runs of was only ever stopped, or lost its workers once: a second chance, no third."""
    finished = [record for record in records if not was_interrupted(record)]
    return not finished or (len(finished) == 1 and is_lost(finished[0]))
