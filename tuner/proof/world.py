"""What a search is let loose on: plans that can be run, what each run gave, and how good each plan really is.

A measured world's runs are split into two halves: a search draws its runs from one, and every plan is judged by its
mean over the other, lest luck be the optimum. Which half is which changes from seed to seed.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from bench import metrics
from bench.errors import StudyError
from bench.memory import ModelShape, resolve
from bench.profile import Profile
from bench.record import Measurement, Record
from bench.spec import EffectivePlan, Plan, Workload
from tuner.config import SpaceConfig
from tuner.planning.costs import Costs
from tuner.planning.profiled import ProfiledCosts
from tuner.proof.landscape import Landscape, LandscapeFolder, cell_of, is_undisturbed

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
                f"{folder}: is not complete; `python -m tuner.proof measure {folder.name}` goes on with it"
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
        self._runs = usable_runs(files.records(), spec.repeats)
        self.num_plans = len(self._runs)
        self._values = {key: [throughput(record) for record in records] for key, records in self._runs.items()}

    @property
    def runs(self) -> Mapping[str, list[Record]]:
        """Runs of each plan, repeat by repeat, by the effective plan's key."""
        return self._runs

    def resolve(self, plan: Plan) -> EffectivePlan:
        resolved = resolve(
            self.shape,
            plan,
            num_prompts=len(self.prompt_lens),
            prompt_len=max(self.prompt_lens),
            output_len=self.workload.generated_len,
            device_bytes=self.device_bytes,
        )
        assert isinstance(resolved, EffectivePlan), f"{self.name}: {resolved}"
        return resolved

    def run(self, plan: Plan, visit: int, seed: int) -> Record:
        records = self._runs[self.resolve(plan).key]
        seen, _ = _halves(len(records), seed)
        order = random.Random(f"{seed}-{self.resolve(plan).key}").sample(seen, len(seen))
        return records[order[visit % len(order)]]

    def score(self, plan: Plan, seed: int) -> float:
        """By the half of the runs that the search did not see; 1 for the plan that is best by the half that it saw."""
        some = next(iter(self._values.values()))
        seen, unseen = _halves(len(some), seed)
        best = max(self._values, key=lambda key: statistics.fmean(self._values[key][index] for index in seen))

        def judged(key: str) -> float:
            return statistics.fmean(self._values[key][index] for index in unseen)

        return judged(self.resolve(plan).key) / judged(best)


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
            f"{path}: holds no profile: {error}; `python -m tuner.proof profile {folder.name}` makes one"
        ) from error


def usable_runs(records: tuple[Record, ...], repeats: int) -> dict[str, list[Record]]:
    """Of each plan the run of every repeat: the last undisturbed one, or else the last."""
    chosen: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        assert record.effective is not None, f"run {record.number} was refused"
        if not isinstance(record.result, Measurement):
            raise StudyError(f"run {record.number} failed: {record.result.message}")
        _, repeat = cell_of(record)
        before = chosen[record.effective.key].get(repeat)
        if before is None or is_undisturbed(record) or not is_undisturbed(before):
            chosen[record.effective.key][repeat] = record
    return {key: [runs[repeat] for repeat in range(repeats)] for key, runs in chosen.items()}


def throughput(record: Record) -> float:
    """Tokens put out a second."""
    assert isinstance(record.result, Measurement)
    return metrics.derive(record.result)[METRIC]


def _halves(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Of the repeats, those that a search of this seed draws from and those that judge it."""
    order = random.Random(f"halves-{seed}").sample(range(count), count)
    return sorted(order[: count // 2]), sorted(order[count // 2 :])
