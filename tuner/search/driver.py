"""A study from its first worker to its finals: reference, baseline, single stage, trials, finals.

The order is fixed, and every step first looks at the records: a study that was stopped anywhere goes on there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench.errors import StudyError
from bench.record import Measurement, write_durably
from bench.spec import Plan
from tuner import locks
from tuner.planning.cost import CostModel
from tuner.progress import Reporter
from tuner.ranking import rank
from tuner.search import finalists
from tuner.search.build import build_space
from tuner.search.resolver import Resolver
from tuner.search.runs import Runs
from tuner.search.space import SearchSpace
from tuner.search.stop import Interrupted, StopSignal
from tuner.search.trials import Search
from tuner.standings import Objective, Ranking
from tuner.store import StudyStore, was_interrupted
from tuner.study_files import read

if TYPE_CHECKING:
    from bench.launch import Fleet


def run_study(store: StudyStore, start_fleet: Callable[..., Fleet], reporter: Reporter) -> bool:
    """Runs what is left of a study.

    Args:
        start_fleet: `bench.launch.Fleet.start`.

    Returns:
        False if it was interrupted.

    Raises:
        UserError: a model, prompts or bounds that cannot be used, or a resume that does not fit.
        NothingFeasibleError: no plan fits into memory.
        FleetError: the workers do not start, or are lost again and again.
    """
    stop = StopSignal()
    runs = Runs(store, start_fleet, reporter, stop)
    with stop.listening():
        try:
            with contextlib.ExitStack() as stack:
                _run(runs, stack)
        except Interrupted:
            reporter.say("stopped; what was measured is kept, and --resume goes on with it")
            return False
    return True


def rank_study(store: StudyStore) -> Ranking:
    """What the records say so far."""
    objectives = [Objective(metric=name) for name in store.config.objectives]
    return rank(store.records, objectives, store.config.constraints)


def baseline_batch_sizes(wanted: Sequence[int] | None, num_prompts: int) -> tuple[int, ...]:
    """Batch sizes to try the un-pipelined model at, largest first: all prompts at once, a half, a quarter."""
    sizes = wanted or [math.ceil(num_prompts / parts) for parts in (1, 2, 4)]
    return tuple(sorted({min(size, num_prompts) for size in sizes}, reverse=True))


def _run(runs: Runs, stack: contextlib.ExitStack) -> None:
    store = runs.store
    fleet = runs.open_fleet(stack)
    stack.enter_context(locks.hold_gpus(fleet.devices, fleet.machine.hardware.gpus))
    store.set_revision(fleet.model.revision)
    for line in store.set_machine(fleet.machine, fleet.shape):
        runs.reporter.say(f"other software than when the study began: {line}")
    with runs.stop.interruptible():
        lens = fleet.prompt_lens(store.workload)
    resolve = Resolver.of_workload(fleet.shape, store.workload, lens, fleet.device_bytes)
    cost = CostModel.of_workload(fleet.shape, store.workload, lens)
    space = _space(runs, cost, resolve)
    if not store.records:
        # A model that comes out wrong when it is cut is found out before anything else is measured.
        runs.ensure_reference()
    _measure_baseline(runs)
    _measure_single_stage(runs, space, resolve)
    Search(runs, space, cost, resolve).run()
    _run_finals(runs, stack)


def _space(runs: Runs, cost: CostModel, resolve: Resolver) -> SearchSpace:
    """The recorded space, or a new one: a point in a record must mean the same plan for ever."""
    path = runs.store.space_path
    if path.exists():
        return read(path, SearchSpace)
    trials = [record for record in runs.store.records if record.role == "trial"]
    if trials:
        raise StudyError(
            f"{path} is missing, and the points of {len(trials)} records refer to it; put it back, or take another "
            "folder"
        )
    space = build_space(runs.store.config.space, runs.fleet.devices, runs.fleet.shape, cost, resolve)
    write_durably(path, space.model_dump_json() + "\n")
    return space


def _measure_baseline(runs: Runs) -> None:
    """The un-pipelined model over a few batch sizes; if it runs at none of them, over smaller ones."""
    config = runs.store.config
    records = [record for record in runs.store.records if record.role == "baseline" and record.params]
    done = {record.params["batch_size"] for record in records if record.params}
    measured = any(isinstance(record.result, Measurement) for record in records)
    sizes = list(baseline_batch_sizes(config.baseline_batch_sizes, config.workload.num_prompts))
    while sizes:
        size = sizes.pop(0)
        if size not in done:
            record = runs.baseline("baseline", "baseline: un-pipelined", config.protocol, size)
            measured = measured or isinstance(record.result, Measurement)
        if not sizes and not measured and size > 1:
            sizes.append(size // 2)


def _measure_single_stage(runs: Runs, space: SearchSpace, resolve: Resolver) -> None:
    """Our runtime without a pipeline, which tells what pipelining gains from what the rest of it gains."""
    if any(record.role == "single_stage" and not was_interrupted(record) for record in runs.store.records):
        return
    baseline = rank_study(runs.store).baseline
    plan = Plan.from_layer_counts(
        (runs.fleet.shape.num_layers,),
        runs.fleet.devices,
        baseline.batch_size if baseline else runs.store.config.workload.num_prompts,
        compile=space.compile[0],
        memory_fraction=max(runs.store.config.space.memory_fractions),
    )
    plan = space.switch(plan)
    runs.measure("single_stage", f"single stage: {plan.describe()}", plan, resolve(plan))


def _run_finals(runs: Runs, stack: contextlib.ExitStack) -> None:
    config = runs.store.config
    ranking = rank_study(runs.store)
    best = finalists.choose(ranking, config.finalists, min_stages=config.space.min_stages)
    chosen = {effective.key: effective for effective in best}
    if not chosen:
        return
    first_round, done = finalists.finished(runs.store.records)
    contenders = [*chosen, *([finalists.BASELINE] if ranking.baseline else [])]
    rounds = config.finalist_rounds
    order = finalists.schedule(contenders, rounds=rounds, seed=config.seed, done=done, first_round=first_round)
    if not order:
        return
    # A fresh fleet: what the workers have become over many plans shall not decide.
    runs.fleet.close()
    runs.open_fleet(stack)
    protocol = finalists.side_by_side(config.protocol)
    for round_, contender in order:
        label = f"final round {round_ - first_round + 1} of {rounds}"
        if contender == finalists.BASELINE:
            assert ranking.baseline is not None
            runs.baseline("finalist", f"{label} · baseline", protocol, ranking.baseline.batch_size, round_)
        else:
            effective = chosen[contender]
            plan = effective.plan
            runs.measure("finalist", f"{label} · {plan.describe()}", plan, effective, protocol=protocol, round_=round_)
