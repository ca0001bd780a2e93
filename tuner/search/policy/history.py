"""What the records say of plans: which ran, which are due again, what they gave, and what stages ran out of memory.

Plans that would run the same way are one, whatever points proposed them. It grows with the records, each read once.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from pipetune.bench import metrics
from pipetune.bench.record import Failure, FailureKind, Measurement, Record
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.planning.calibration.observation import Observation, observe
from pipetune.tuner.search.space.resolver import Resolver, identity
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.files import was_interrupted

TRANSIENT = frozenset({FailureKind.WORKER_DIED, FailureKind.WORKER_HUNG, FailureKind.COMMUNICATION_TIMEOUT})
"""Failures that may not come again."""
MEMORY = frozenset({FailureKind.OVER_MEMORY_CAP, FailureKind.OUT_OF_MEMORY})

ENOUGH_BROKE = 2
"""Failures that condemn a trait of plans, where no plan with it has worked."""

Lessons = dict[int, tuple[Record, Observation | None]]
"""What records teach, by their `id`; the record is held, so that the `id` stays its own."""


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
        return next((point_of(record) for record in self.records if record.role == "trial" and record.params), None)

    @property
    def finished(self) -> list[Record]:
        """Runs that nobody stopped."""
        return [record for record in self.records if not was_interrupted(record)]

    @property
    def is_due(self) -> bool:
        """Whether it was only ever stopped, or lost its workers once: a second chance, no third."""
        finished = self.finished
        return not finished or (len(finished) == 1 and is_lost(finished[0]))

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
        self.counted = 0
        """Trials that count against the budget: neither stopped ones, nor refusals, nor a first loss of workers."""
        self.refused = 0
        self.replicates = 0
        """Runs of plans that were measured already."""
        self.marks: list[int] = []
        """How many records there were once each counted trial had its own."""
        self.out_of_memory: dict[str, int] = {}
        """Least accounted bytes of a plan that ran out of memory, by device."""
        self.fitted: Counter[str] = Counter()
        """Most accounted bytes of a plan that ran, by device."""
        self.worked: Counter[tuple[str, object]] = Counter()
        """Runs that gave a measurement, by traits of plans."""
        self.broke: Counter[tuple[str, object]] = Counter()
        """Runs that failed for another reason than memory, by traits of plans."""

    def is_extended_by(self, records: Sequence[Record]) -> bool:
        """Whether these are the records known, and perhaps more."""
        return len(records) >= len(self.records) and all(
            known is record for known, record in zip(self.records, records, strict=False)
        )

    def extend(self, records: Sequence[Record], lessons: Lessons) -> None:
        """Reads the records beyond those known.

        Args:
            lessons: what is known already of what records teach; filled.
        """
        for record in records[len(self.records) :]:
            self.records.append(record)
            if record.spec is None or record.role == "bench":
                continue
            self._note(record, _lesson(record, lessons))

    def until(self, count: int, lessons: Lessons) -> History:
        """The history as it was when there were so many records."""
        before = History(self._space, self._resolve)
        before.extend(self.records[:count], lessons)
        return before

    def take(self, points: Collection[Point]) -> None:
        """Leaves these points' plans to others, who run them now."""
        plans = [self._space.plan(point) for point in points]
        self.taken = frozenset(identity(plan, self._resolve(plan)) for plan in plans)

    def is_open(self, key: str) -> bool:
        """Whether an effective plan, by its key, may be proposed: it never ended or has a second chance."""
        known = self.plans.get(key)
        return key not in self.taken and (known is None or known.is_due)

    def of(self, plan: Plan) -> PlanHistory | None:
        """The plan's runs; None where it never ran."""
        return self.plans.get(identity(plan, self._resolve(plan)))

    def is_new(self, point: Point, *, most_refused: int) -> bool:
        """Whether the point's plan is worth a run: it never ended, lost its workers once, or was never tried.

        Args:
            most_refused: refusals cost no time, but shall not go on for ever.
        """
        plan = self._space.plan(point)
        resolved = self._resolve(plan)
        key = identity(plan, resolved)
        known = self.plans.get(key)
        if known is not None and known.finished:
            return self.is_open(key)
        if key in self.taken:
            return False
        return isinstance(resolved, EffectivePlan) or self.refused < most_refused

    def due_again(self) -> Point | None:
        """The first point whose run was stopped or lost its workers, and that has a chance left."""
        for key, known in self.plans.items():
            if known.is_due and known.point is not None and key not in self.taken:
                return known.point
        return None

    def chance_to_work(self, plan: Plan) -> float:
        """A guess from plans that share traits, of use for comparing plans.

        Returns:
            The product of `(worked + 1) / (worked + broke + 1)` over the traits; 0 where all that share one broke and
            others worked.
        """
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
        """How likely a plan has memory enough: on each device the limit may lie anywhere between what was enough and
        what was too much.

        Args:
            needed: accounted bytes by device.
        """
        chance = 1.0
        for device, too_much in self.out_of_memory.items():
            enough, wanted = self.fitted[device], needed.get(device, 0)
            if wanted > enough:
                chance *= max(0.0, (too_much - wanted) / (too_much - enough)) if too_much > enough else 0.0
        return chance

    def _note(self, record: Record, observation: Observation | None) -> None:
        assert record.spec is not None
        plan = record.spec.plan
        resolved = record.effective or self._resolve(plan)
        effective = resolved if isinstance(resolved, EffectivePlan) else None
        known = self.plans.setdefault(identity(plan, resolved), PlanHistory(effective=effective))
        first_loss = is_lost(record) and not known.finished
        if record.role == "trial" and known.runs:
            self.replicates += 1
        known.records.append(record)
        result = record.result
        if isinstance(result, Measurement):
            known.runs.append(metrics.derive(result))
            self.worked.update(traits(plan))
            self._note_fit(effective)
        elif not was_interrupted(record) and not first_loss:
            self._note_failure(record, plan, result)
        if observation is not None:
            self.observations.append(observation)
            known.observed = True
        if record.role != "trial":
            return
        if is_refusal(record):
            self.refused += 1
        elif not was_interrupted(record) and not first_loss:
            self.counted += 1
            self.marks.append(len(self.records))

    def _note_fit(self, effective: EffectivePlan | None) -> None:
        needed = {} if effective is None else self._resolve.needed_bytes(effective)
        for device, wanted in needed.items():
            self.fitted[device] = max(self.fitted[device], wanted)

    def _note_failure(self, record: Record, plan: Plan, failure: Failure) -> None:
        if failure.kind not in MEMORY:
            self.broke.update(traits(plan))
        elif record.effective is not None:
            needed = self._resolve.needed_bytes(record.effective)
            device = failure.device
            if device not in needed:
                device = max(needed, key=lambda name: needed[name])
            self.out_of_memory[device] = min(needed[device], self.out_of_memory.get(device, needed[device]))


def _lesson(record: Record, lessons: Lessons) -> Observation | None:
    if id(record) not in lessons:
        lessons[id(record)] = (record, observe(record))
    return lessons[id(record)][1]


def kinds_of(plan: Plan, num_devices: int) -> tuple[tuple[str, int], ...]:
    """What the cost model knows least of: replicas, prompts in chunks, compiled layers; or a single device of many."""
    if len(plan.devices) == 1 < num_devices:
        return (("devices", 1),)
    return (
        ("replicas", plan.replicas),
        ("chunks", int(plan.prefill_chunk_size is not None)),
        ("compile", int(plan.compile)),
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
    )


def point_of(record: Record) -> Point:
    """What the search proposed."""
    return {name: int(value) for name, value in (record.params or {}).items()}


def is_lost(record: Record) -> bool:
    """Whether the run lost its workers, which may have been chance."""
    return isinstance(record.result, Failure) and record.result.kind in TRANSIENT


def is_refusal(record: Record) -> bool:
    """Whether a plan was found too large before it ran."""
    result = record.result
    return isinstance(result, Failure) and result.kind == FailureKind.OVER_MEMORY_CAP and record.effective is None
