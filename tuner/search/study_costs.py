"""What tasks cost, as a study knows it before its first run: from its own profile, kept beside it, or nominal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipetune.bench.errors import FleetError
from pipetune.bench.files import write_durably
from pipetune.bench.profile import Profile, ProfileGrid
from pipetune.bench.spec import Workload
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.costs.profile_cache import grid_for, profile_for, profile_key, read_kept
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.runs import Runs
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import read

if TYPE_CHECKING:
    from pipetune.bench.fleet.fleet import Fleet


def study_costs(runs: Runs, lens: Sequence[int], resolve: Resolver) -> CostModel:
    """The cost model of a study: over its profile, which is measured or taken from the cache once, and then its own.

    Raises:
        ConfigError, NothingFeasibleError: as `build_space`; before anything is timed.
        StudyError: the study's profile cannot be read.
        Interrupted: somebody asked to stop.
    """
    store, fleet = runs.store, runs.fleet
    nominal = CostModel.of_workload(fleet.shape, store.workload, lens)
    profile = read(store.profile_path, Profile) if store.profile_path.exists() else None
    if profile is None and store.config.profile:
        space = _space(runs, nominal, resolve)
        profile = _measured(runs, grid_of(space, store.workload, lens))
    return nominal if profile is None else over_profile(fleet, store.workload, lens, profile)


def kept_costs(fleet: Fleet, config: TuneConfig, lens: Sequence[int], resolve: Resolver) -> tuple[CostModel, bool]:
    """The cost model that a study would begin with if nothing is measured, and whether it is over a kept profile."""
    nominal = CostModel.of_workload(fleet.shape, config.workload, lens)
    if not config.profile:
        return nominal, False
    space = build_space(config.space, fleet.devices, fleet.shape, nominal, resolve)
    key = profile_key(
        fleet,
        grid_of(space, config.workload, lens),
        packed_weights=space.packed_weights,
        cuda_graphs=space.cuda_graphs,
    )
    profile = read_kept(key)
    return (nominal, False) if profile is None else (over_profile(fleet, config.workload, lens, profile), True)


def over_profile(fleet: Fleet, workload: Workload, lens: Sequence[int], profile: Profile) -> CostModel:
    """A cost model over what was timed."""
    return CostModel.of_workload(fleet.shape, workload, lens, ProfiledCosts(profile))


def grid_of(space: SearchSpace, workload: Workload, lens: Sequence[int]) -> ProfileGrid:
    """What of tasks predictions of a space's plans need."""
    return grid_for(
        workload,
        lens,
        space.micro_batch_sizes,
        space.prefill_sizes,
        space.chunk_sizes,
        devices=space.devices,
    )


def _space(runs: Runs, nominal: CostModel, resolve: Resolver) -> SearchSpace:
    """The study's space, or one of the same sizes; its partitions do not matter here."""
    path = runs.store.space_path
    if path.exists():
        return read(path, SearchSpace)
    return build_space(runs.store.config.space, runs.fleet.devices, runs.fleet.shape, nominal, resolve)


def _measured(runs: Runs, grid: ProfileGrid) -> Profile | None:
    """The profile; None, and said so, where the workers failed at it."""
    config = runs.store.config.space
    runs.reporter.begin("profile: what layers and links take")
    try:
        with runs.stop.interruptible():
            profile = profile_for(
                runs.fleet, grid, packed_weights=config.packed_weights, cuda_graphs=config.cuda_graphs
            )
    except FleetError as error:
        runs.reporter.end(f"failed, nominal costs serve instead: {error}")
        return None
    write_durably(runs.store.profile_path, profile.model_dump_json(indent=1) + "\n")
    when = f"measured at {profile.measured_at} in {profile.took_s:.0f} s"
    runs.reporter.end("; ".join((f"{len(profile.devices)} devices, {when}", *profile.notes)))
    return profile
