"""What tasks cost, as a study knows it before its first run: from its own profile, kept beside it, or nominal."""

from collections.abc import Sequence

from pipetune.bench.errors import FleetError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.profile import Profile, ProfileGrid
from pipetune.bench.spec import Workload
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.planning.costs.profile_cache import grid_for, profile_for, profile_key, read_kept
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.search.runs import Runs
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.engine import EngineResolver, build_engine_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.study.files import StudyFile, fitting, read


def resolver_of(fleet: Fleet, config: TuneConfig, lens: Sequence[int]) -> Resolver:
    """What tells what plans of a study come to, by its fleet or its engine."""
    of = (fleet.shape, config.workload, lens, fleet.device_bytes)
    if config.engine is None:
        return Resolver.of_workload(*of)
    return EngineResolver.of_workload(*of, engine=fleet, work=config.workload)


def study_costs(runs: Runs, lens: Sequence[int], resolve: Resolver) -> CostModel:
    """The cost model of a study: over its profile, which is measured or taken from the cache once, and then its own.
    Raises as `build_space` before anything is timed, StudyError where the study's profile cannot be read, and
    Interrupted where somebody asked to stop."""
    store, fleet = runs.store, runs.fleet
    if store.config.engine is not None:
        return EngineModel.of_workload(fleet.shape, store.workload, lens)
    path = store.path(StudyFile.PROFILE)
    profile = read(path, Profile) if path.exists() else None
    if profile is not None and profile.disturbances:
        runs.reporter.say(f"the study's profile is doubtful: {'; '.join(profile.disturbances)}")
    if profile is None and store.config.profile:
        # Of the same sizes as the study's; its partitions do not matter here.
        space = space_of(runs, _model(fleet, store.workload, lens), resolve)
        profile = _measured(runs, _grid(space, store.workload, lens))
    with fitting(path):
        return _model(fleet, store.workload, lens, profile)


def kept_costs(fleet: Fleet, config: TuneConfig, lens: Sequence[int], resolve: Resolver) -> tuple[CostModel, bool]:
    """The cost model that a study would begin with if nothing is measured, and whether it is over a kept profile."""
    if config.engine is not None:
        return EngineModel.of_workload(fleet.shape, config.workload, lens), False
    profile = None
    if config.profile:
        space = build_space(config.space, fleet.devices, fleet.shape, _model(fleet, config.workload, lens), resolve)
        switches = {"packed_weights": space.packed_weights, "cuda_graphs": space.cuda_graphs}
        profile = read_kept(profile_key(fleet, _grid(space, config.workload, lens), **switches))
    return _model(fleet, config.workload, lens, profile), profile is not None


def space_of(runs: Runs, cost: CostModel, resolve: Resolver) -> SearchSpace:
    """The study's space, or a new one; raises as `build_space`."""
    path = runs.store.path(StudyFile.SPACE)
    if path.exists():
        return read(path, SearchSpace)
    return new_space(runs.store.config, runs.fleet.devices, cost, resolve)


def new_space(config: TuneConfig, devices: Sequence[str], cost: CostModel, resolve: Resolver) -> SearchSpace:
    """A space to search; raises as `build_space`."""
    if isinstance(cost, EngineModel) and isinstance(resolve, EngineResolver):
        return build_engine_space(config, devices, cost, resolve)
    return build_space(config.space, devices, cost.shape, cost, resolve)


def _model(fleet: Fleet, workload: Workload, lens: Sequence[int], profile: Profile | None = None) -> CostModel:
    """A cost model over what was timed, or nominal."""
    links, scores = fleet.machine.hardware.links, workload.generated_len == 0
    costs = NominalCosts(fleet.shape, scores=scores, links=links) if profile is None else ProfiledCosts(profile)
    return CostModel.of_workload(fleet.shape, workload, lens, costs)


def _grid(space: SearchSpace, workload: Workload, lens: Sequence[int]) -> ProfileGrid:
    """What of tasks predictions of a space's plans need."""
    sizes = space.micro_batch_sizes, space.prefill_sizes, space.chunk_sizes
    return grid_for(workload, lens, *sizes, devices=space.devices)


def _measured(runs: Runs, grid: ProfileGrid) -> Profile | None:
    """The profile; None, and said so, where the workers failed at it."""
    space = runs.store.config.space
    runs.reporter.begin("profile: what layers and links take")
    try:
        with runs.stop.interruptible():
            profile = profile_for(runs.fleet, grid, packed_weights=space.packed_weights, cuda_graphs=space.cuda_graphs)
    except FleetError as error:
        runs.reporter.end(f"failed, nominal costs serve instead: {error}")
        return None
    write_durably(runs.store.path(StudyFile.PROFILE), profile.model_dump_json(indent=1) + "\n")
    when = f"measured at {profile.measured_at} in {profile.took_s:.0f} s"
    runs.reporter.end("; ".join((f"{len(profile.devices)} devices, {when}", *profile.notes)))
    return profile
