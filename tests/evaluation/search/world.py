"""What a search is let loose on: plans that can be run, what each run gave, and how good each plan really is.

A measured world's runs are split into two halves: a search draws its runs from one, as they are; every plan is judged
by the other, the machine's drift taken out, lest luck be the optimum. Which half is which changes from seed to seed.
The best plan is named by all runs, and so is one for all searches: named by the half that a search draws from, a search
that has drawn all of it would have named it itself, luck included.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from pipetune.bench import metrics
from pipetune.bench.errors import StudyError
from pipetune.bench.memory import ModelShape, resolve
from pipetune.bench.profile import Profile
from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import EffectivePlan, Plan, Workload
from pipetune.tuner.config.schema import SpaceConfig
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from tests.evaluation.search import drift
from tests.evaluation.search.landscape import Landscape, LandscapeFolder, usable_runs

METRIC = "output_throughput"


class World(Protocol):
    """Plans of a model on devices, and what running them gives."""

    name: str
    about: str
    simulated: bool
    shape: ModelShape
    workload: Workload
    prompt_lens: tuple[int, ...]
    devices: tuple[str, ...]
    device_bytes: dict[str, int]
    micro_batch_sizes: tuple[int, ...]
    num_plans: int
    has_orders: bool
    """Whether other orders of the devices are plans of this world."""
    costs: Costs
    """What is known before any plan has run."""
    profile_s: float
    """How long it took to learn that, on all devices."""
    auto_counts: tuple[int, ...] | None
    """Layers of each device under `device_map="auto"`."""

    def resolve(self, plan: Plan) -> EffectivePlan:
        """What the plan comes to under its memory caps."""
        ...

    def run(self, plan: Plan, visit: int, seed: int) -> Record:
        """What the plan's run number `visit` gave to a search of this seed."""
        ...

    def score(self, plan: Plan, seed: int) -> float:
        """How good the plan is, by what the search did not see: a share of the best plan's throughput."""
        ...


def bounds_of(world: World) -> SpaceConfig:
    """A space of the world's plans and no others."""
    return SpaceConfig(
        micro_batch_sizes=world.micro_batch_sizes,
        prefill_micro_batch_sizes=(max(world.micro_batch_sizes),),
        prefill_chunk_sizes=(None,),
        replicas=(1,),
        min_stages=len(world.devices),
        max_stages=len(world.devices),
        memory_fractions=(0.9,),
        device_order="auto" if world.has_orders else "given",
    )


class MeasuredWorld:
    """A landscape that was measured exhaustively."""

    simulated: bool = False

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            StudyError: the landscape is not complete, or lacks its profile.
        """
        files = LandscapeFolder(folder)
        if not files.is_complete:
            raise StudyError(
                f"{folder}: is not complete; `python -m tests.evaluation.search measure {folder.name}` goes on with it"
            )
        self.landscape: Landscape = files.read()
        spec = self.landscape.spec
        self.name, self.about = spec.name, spec.about
        self.shape, self.workload = self.landscape.shape, spec.workload
        self.prompt_lens, self.device_bytes = self.landscape.prompt_lens, self.landscape.device_bytes
        self.devices = spec.device_orders[0]
        self.has_orders = len(spec.device_orders) > 1
        self.micro_batch_sizes = spec.micro_batch_sizes
        self.auto_counts = self.landscape.auto_counts
        profile = read_profile(folder)
        self.costs: Costs = ProfiledCosts(profile)
        self.profile_s = profile.took_s
        self._runs = {_key(rows[0]): rows for rows in usable_runs(files.records()).values()}
        self.num_plans = len(self._runs)
        self.drift = drift.fit(all_timed(self._runs.values()))
        self._judged: dict[int, tuple[drift.Judged, drift.Judged]] = {}

    @property
    def runs(self) -> Mapping[str, list[Record]]:
        """Runs of each plan, repeat by repeat, by the effective plan's key."""
        return self._runs

    def resolve(self, plan: Plan) -> EffectivePlan:
        lens = {"prompt_len": max(self.prompt_lens), "output_len": self.workload.generated_len}
        resolved = resolve(self.shape, plan, num_prompts=len(self.prompt_lens), **lens, device_bytes=self.device_bytes)
        assert isinstance(resolved, EffectivePlan), f"{self.name}: {resolved}"
        return resolved

    def run(self, plan: Plan, visit: int, seed: int) -> Record:
        key = self.resolve(plan).key
        records = self._runs[key]
        seen, _ = _halves(len(records), key, seed)
        order = random.Random(f"{seed}-{key}").sample(seen, len(seen))
        return records[order[visit % len(order)]]

    def score(self, plan: Plan, seed: int) -> float:
        """By the half of the runs that the search did not see; 1 for the plan that is best by all runs."""
        _, unseen = self.judged(seed)
        everything = self.judged_by_all
        best = max(everything.logs, key=lambda one: everything.logs[one])
        own = list(self._runs).index(self.resolve(plan).key)
        return math.exp(unseen.logs[own] - unseen.logs[best])

    @cached_property
    def judged_by_all(self) -> drift.Judged:
        """What plans are worth by all their runs."""
        return drift.judge(all_timed(self._runs.values()), self.drift)

    def judged(self, seed: int) -> tuple[drift.Judged, drift.Judged]:
        """What plans are worth by each half of the runs, the machine's drift taken out; plans by their place."""
        if seed not in self._judged:
            halves = [_halves(len(rows), key, seed) for key, rows in self._runs.items()]
            first, second = (timed(self._runs.values(), [half[side] for half in halves]) for side in (0, 1))
            self._judged[seed] = drift.judge(first, self.drift), drift.judge(second, self.drift)
        return self._judged[seed]


def timed(runs: Iterable[Sequence[Record]], chosen: Iterable[Sequence[int]]) -> list[drift.Run]:
    """Of each plan the runs chosen, as `drift` reads them; plans by their place."""
    return [
        drift.Run(plan=plan, at_s=_at_s(rows[index]), log=math.log(throughput(rows[index])))
        for plan, (rows, indices) in enumerate(zip(runs, chosen, strict=True))
        for index in indices
    ]


def all_timed(runs: Iterable[Sequence[Record]]) -> list[drift.Run]:
    """All runs of all plans."""
    rows = list(runs)
    return timed(rows, [range(len(one)) for one in rows])


def read_profile(folder: Path) -> Profile:
    """The profile that was made beside a landscape.

    Raises:
        StudyError: there is none.
    """
    path = folder / "profile.json"
    try:
        return Profile.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StudyError(
            f"{path}: holds no profile: {error}; `python -m tests.evaluation.search profile {folder.name}` makes one"
        ) from error


def throughput(record: Record) -> float:
    """Tokens put out a second."""
    assert isinstance(record.result, Measurement)
    return metrics.derive(record.result)[METRIC]


def _key(record: Record) -> str:
    assert record.effective is not None, f"run {record.number} was refused"
    return record.effective.key


def _at_s(record: Record) -> float:
    return dt.datetime.fromisoformat(record.started_at).timestamp()


def _halves(count: int, key: str, seed: int) -> tuple[list[int], list[int]]:
    """Of a plan's repeats, those that a search of this seed draws from and those that judge it."""
    order = random.Random(f"halves-{seed}-{key}").sample(range(count), count)
    return sorted(order[: count // 2]), sorted(order[count // 2 :])
