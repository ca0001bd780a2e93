"""A warm start: what earlier studies teach about this one, and which of their plans to run first.

On equal hardware and for the same settings their runs teach the cost model. From anywhere, if the model is the same,
their best plans run first, measured anew: devices stand for each other by their places. Nothing counts that this study
has not measured itself.
"""

import operator
from collections.abc import Sequence
from pathlib import Path

from pipetune.bench.errors import StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Machine
from pipetune.bench.spec import ModelSpec, Plan, SchemaVersion, Value, Workload
from pipetune.tuner.config.schema import TuneConfig
from pipetune.tuner.planning.calibration.observation import Observation, observe
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective
from pipetune.tuner.search.policy.refine import Refiner
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import Point, SearchSpace
from pipetune.tuner.study.files import StudyContents, load_study, read, study_at

BEST_PLANS = 3
"""Taken of each earlier study."""
MOST_OBSERVATIONS = 30
"""Taken of each: the last ones, which are most like today."""
_RUNS_ALIKE = operator.attrgetter(
    *("layer_counts", "devices", "replicas", "engine", "lanes"),
    *("micro_batch_size", "prefill_size", "prefill_chunk_size", "compile"),
)
"""What is equal of two plans that differ in their caps and the switches that a study sets for all."""


class WarmStart(Value):
    """What a study begins with; kept beside it as `warm_start.json`, so that a resume begins with the same."""

    schema_version: SchemaVersion = 1
    folders: tuple[str, ...] = ()
    prior: tuple[Observation, ...] = ()
    first: tuple[dict[str, int], ...] = ()
    """Points of this study's space."""
    said: tuple[str, ...] = ()
    """For people: what of each folder is used, and why the rest is not."""


def warm_start(
    path: Path, config: TuneConfig, model: ModelSpec, machine: Machine, space: SearchSpace, resolve: Resolver
) -> WarmStart:
    """What the earlier studies of `config.warm_start` give, as kept in `path` or read now and kept there; StudyError
    where a folder holds no study, or one that cannot be read."""
    if path.exists():
        kept = read(path, WarmStart)
        if kept.folders == config.warm_start:
            return kept
    if not config.warm_start:
        return WarmStart()
    prior: list[Observation] = []
    first: list[Point] = []
    said: list[str] = []
    for folder in config.warm_start:
        earlier, lessons, text = lessons_of(folder, config, model, machine, resolve.shape)
        points, missing = _best_points(earlier, space, resolve, config) if earlier is not None else ([], 0)
        prior += lessons
        first += [point for point in points if point not in first]
        parts = [text, f"its {len(points)} best plans run first, measured anew" if points else ""]
        parts.append(f"{missing} of its best plans are not in this study's space" if missing else "")
        said.append(f"{folder}: " + ("; ".join(filter(None, parts)) or "it measured nothing"))
    found = WarmStart(folders=config.warm_start, prior=tuple(prior), first=tuple(first), said=tuple(said))
    write_durably(path, found.model_dump_json(exclude_defaults=True) + "\n")
    return found


def lessons_of(
    folder: str, config: TuneConfig, model: ModelSpec, machine: Machine, shape: ModelShape
) -> tuple[StudyContents | None, list[Observation], str]:
    """An earlier study, or None where its model has another shape; those of its runs that teach the cost model of
    `config` on `machine`; and how many these are, or why there are none. StudyError as in `warm_start`."""
    try:
        earlier = load_study(study_at(folder))
    except StudyError as error:
        raise StudyError(f"warm_start: {error}") from None
    if earlier.machine is None or earlier.shape is None:
        raise StudyError(f"warm_start: {earlier.unread[-1]}")
    if not earlier.shape.is_alike(shape):
        what = f"measured {earlier.config.model.name}, a model of another shape than {config.model.name}"
        return None, [], f"{what}; nothing of it is used"
    other_machine = earlier.machine.hardware_id != machine.hardware_id
    if why_not := "they are of other hardware" if other_machine else _why_no_lesson(earlier, config, model):
        return earlier, [], f"its records teach nothing here: {why_not}"
    own = [observe(record) for record in earlier.records if record.source is None]
    lessons = [observation for observation in own if observation is not None][-MOST_OBSERVATIONS:]
    return earlier, lessons, f"its {len(lessons)} last runs teach the cost model" if lessons else ""


def point_of_plan(space: SearchSpace, resolve: Resolver, plan: Plan, devices: Sequence[str]) -> Point | None:
    """The point that runs like a plan under the largest cap, with cuts of its own where the space does not list the
    plan's partition; None where there is none. `devices` are those of the study that the plan is from, in order."""
    ours = dict(zip(devices, space.devices, strict=False))
    if not ours.keys() >= set(plan.devices):
        return None
    wanted = plan.moved(ours)
    caps = {"memory_index": len(space.memory_fractions) - 1} if len(space.memory_fractions) > 1 else {}
    few = space.model_copy(update={"memory_fractions": space.memory_fractions[-1:]})
    refiner = Refiner(space, resolve)
    for rank_ in refiner.nearest_ranks(wanted.layer_counts):
        for listed in few.points(rank_):
            point = refiner.point({**listed, **caps}, wanted.layer_counts)
            if _RUNS_ALIKE(space.plan(point)) == _RUNS_ALIKE(wanted):
                return point
    return None


def _why_no_lesson(earlier: StudyContents, config: TuneConfig, model: ModelSpec) -> str | None:
    """Why the times of an earlier study say nothing of this one's; None where they do."""
    if earlier.config.concrete_devices != config.concrete_devices:
        return f"they are of {', '.join(earlier.config.concrete_devices)}"
    if (earlier.config.engine is None) != (config.engine is None):
        return "another engine ran its plans"
    for name in ("dtype", "storage_dtype", "attention"):
        theirs, ours = getattr(earlier.config.model, name), getattr(model, name)
        if theirs != ours:
            return f"they are of model.{name}={theirs}"
    theirs_, ours_ = _timed_settings(earlier.config.workload), _timed_settings(config.workload)
    changed = [name for name in ours_ if theirs_[name] != ours_[name]]
    return f"their workload has {', '.join(f'{name}={theirs_[name]}' for name in changed)}" if changed else None


def _timed_settings(workload: Workload) -> dict[str, object]:
    """What of a workload decides how long things take."""
    values: dict[str, object] = {
        "kind": workload.kind,
        "num_prompts": workload.num_prompts,
        "output_len": workload.generated_len,
        "output_lens": workload.unlike_lens,
        "sampled": workload.sampling is not None,
        "prompts_sha256": workload.prompts_sha256,
    }
    if workload.prompts_sha256 is None:
        values |= {"input_len": workload.input_len, "random_range_ratio": workload.random_range_ratio}
    return values


def _best_points(
    earlier: StudyContents, space: SearchSpace, resolve: Resolver, config: TuneConfig
) -> tuple[list[Point], int]:
    """Points of the earlier study's best plans by what is asked now, and how many of them have none."""
    rows = rank(earlier.records, [Objective(metric=name) for name in config.objectives], config.constraints).rows
    if max(len(space.devices), len(earlier.config.concrete_devices)) > 1:
        rows = tuple(row for row in rows if len(row.plan.devices) > 1)
    best = [row.plan for row in rows if row.feasible][:BEST_PLANS] or [row.plan for row in rows][:BEST_PLANS]
    points = [point_of_plan(space, resolve, plan, earlier.config.concrete_devices) for plan in best]
    found = [point for point in points if point is not None]
    return found, len(points) - len(found)
