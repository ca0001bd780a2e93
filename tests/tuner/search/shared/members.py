"""Processes of a shared study without fleets: each a folder, a membership and a study."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipetune.bench.record import Machine, Outcome, Record
from pipetune.bench.spec import EffectivePlan, RunSpec
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.search.optuna_study import OptunaStudy
from pipetune.tuner.search.shared.participant import Member, Participant
from pipetune.tuner.search.space.resolver import Resolver, identity
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.files import StudyFile
from pipetune.tuner.study.store import StudyStore
from tests.record_factory import MODEL, NUM_LAYERS, make_machine, make_measurement, make_prompt_lens, make_shape

POINTS: list[Point] = [{"partition_rank": 1 + i, "micro_batch_index": 2, "prefill_index": i % 3} for i in range(9)]
PARTITIONS = tuple((first, NUM_LAYERS - first) for first in (15, 16, 14, 17, 13, 18, 12, 19, 11, 20))


def config(url: str, devices: str = "cpu:0-1", **values: Any) -> TuneConfig:
    """Settings of a process of study `nightly`."""
    return TuneConfig.model_validate(
        {"model": MODEL, "devices": devices, "storage": url, "shared_study": "nightly", **values}
    )


@dataclass
class Process:
    """One of them, after it has joined."""

    store: StudyStore
    member: Participant
    space: SearchSpace
    resolve: Resolver
    study: OptunaStudy
    said: list[str]
    left: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def claim(self, point: Point) -> int | None:
        """Pulls what others measured, then takes a plan unless it was measured or is taken."""
        self.study.pull(self.store)
        known = {self.identity(_point(record)) for record in self.store.records}
        if self.identity(point) in known | {self.identity(taken) for taken in self.study.taken}:
            return None
        return self.study.ask(point)

    def write(self, number: int, point: Point, result: Outcome | None = None) -> Record:
        """The durable record of a trial that nobody has been told of."""
        plan = self.space.plan(point)
        effective = self.resolve(plan)
        return self.store.add(
            Record(
                number=0,
                role="trial",
                result=result or make_measurement(plan),
                hardware_id=make_machine().hardware_id,
                started_at="2026-01-02T03:04:05+00:00",
                wall_s=1.0,
                spec=RunSpec(model=MODEL, workload=self.store.config.workload, plan=plan),
                effective=effective if isinstance(effective, EffectivePlan) else None,
                trial_number=number,
                params=dict(point),
            )
        )

    def run(self, point: Point) -> Record:
        """A whole trial."""
        number = self.study.ask(point)
        assert number is not None
        record = self.write(number, point)
        self.study.tell(record)
        return record

    def identity(self, point: Point) -> str:
        plan = self.space.plan(point)
        return identity(plan, self.resolve(plan))

    def sharing(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.store.folder / StudyFile.SHARING).read_text(encoding="utf-8"))
        return values

    def vanish(self) -> None:
        """Ends without a word, as by `kill -9`."""
        assert isinstance(self.member, Member)
        self.member._ended.set()
        self.store.close()


@contextlib.contextmanager
def join(
    folder: Path,
    url: str,
    devices: str = "cpu:0-1",
    *,
    resume: bool = False,
    machine: Machine | None = None,
    **values: Any,
) -> Iterator[Process]:
    """Joins the study as a process would, with what its folder holds."""
    wanted = config(url, devices, **values)
    said: list[str] = []
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(StudyStore.resume(folder, wanted) if resume else StudyStore.create(folder, wanted))
        member = stack.enter_context(Member(store, said.append))
        member.check(machine or make_machine())
        names = wanted.concrete_devices
        space = make_space(names)
        resolve = Resolver.of_workload(
            make_shape(), wanted.workload, make_prompt_lens(wanted.workload), dict.fromkeys(names, 4 * 2**30)
        )
        if (store.folder / StudyFile.SPACE).exists():
            space = SearchSpace.model_validate_json((store.folder / StudyFile.SPACE).read_text(encoding="utf-8"))
        space = member.agree(space)
        study = member.open_study(space, resolve)
        stack.callback(study.close)
        study.restore(store.records)
        yield Process(store, member, space, resolve, study, said)


def make_space(devices: tuple[str, ...]) -> SearchSpace:
    """A space of two stages."""
    return SearchSpace(
        devices=devices,
        partitions=PARTITIONS,
        micro_batch_sizes=(4, 8, 16),
        prefill_sizes=(4, 8, 16),
        memory_fractions=(0.9,),
        num_prompts=32,
    )


def _point(record: Record) -> Point:
    return {name: int(value) for name, value in (record.params or {}).items()}
