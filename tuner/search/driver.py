"""A study from its first worker to its finals: profile, reference, baseline, single stage, trials, finals.

The order is fixed, and every step first looks at what is on disk: a study that was stopped anywhere goes on there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipetune.bench.errors import StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.record import Measurement
from pipetune.bench.spec import Plan
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.progress import Reporter
from pipetune.tuner.ranking import finals
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.values import Objective, Ranking
from pipetune.tuner.search.participant import Participant, participate
from pipetune.tuner.search.policy.warm_start import warm_start
from pipetune.tuner.search.runs import Runs
from pipetune.tuner.search.space.build import build_space
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.search.stop import Interrupted, StopSignal
from pipetune.tuner.search.study_costs import study_costs
from pipetune.tuner.search.trials import Search
from pipetune.tuner.study.files import read
from pipetune.tuner.study.search_log import SearchLogWriter
from pipetune.tuner.study.store import StudyStore, was_interrupted

if TYPE_CHECKING:
    from pipetune.bench.fleet.experiment import Labels
    from pipetune.bench.fleet.fleet import Fleet


def run_study(store: StudyStore, reporter: Reporter, *, start_fleet: Callable[..., Fleet] | None = None) -> bool:
    """Runs what is left of a study.

    Args:
        start_fleet: in place of `Fleet.start`, where there are no workers.

    Returns:
        False if it was interrupted.

    Raises:
        UserError: a model, prompts or bounds that cannot be used, or a resume that does not fit.
        NothingFeasibleError: no plan fits into memory.
        FleetError: the workers do not start, or are lost again and again.
    """
    stop = StopSignal()
    log = SearchLogWriter(store.search_path)
    runs = Runs(store, start_fleet, reporter, stop, log)
    with stop.listening():
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(log.save_if_there)
                _run(runs, log, stack)
        except Interrupted:
            reporter.say("stopped; what was measured is kept, and --resume goes on with it")
            return False
    return True


def rank_study(store: StudyStore) -> Ranking:
    """What the records say so far."""
    config = store.config
    rounds = (config.finalist_rounds, max(config.finalist_rounds, config.max_finalist_rounds))
    return rank(store.records, _objectives(store), config.constraints, rounds)


def _objectives(store: StudyStore) -> list[Objective]:
    return [Objective(metric=name) for name in store.config.objectives]


def baseline_batch_sizes(wanted: Sequence[int] | None, num_prompts: int) -> tuple[int, ...]:
    """Batch sizes to try the un-pipelined model at, largest first: all prompts at once, a half, a quarter."""
    sizes = wanted or [math.ceil(num_prompts / parts) for parts in (1, 2, 4)]
    return tuple(sorted({min(size, num_prompts) for size in sizes}, reverse=True))


def _run(runs: Runs, log: SearchLogWriter, stack: contextlib.ExitStack) -> None:
    store = runs.store
    with log.spend("start"):
        participant = stack.enter_context(participate(store, runs.reporter.say))
        fleet = runs.open_fleet(stack)
        store.set_revision(fleet.model.revision)
        for line in store.set_machine(fleet.machine, fleet.shape):
            runs.reporter.say(f"other software than when the study began: {line}")
        participant.check(fleet.machine)
        with runs.stop.interruptible():
            lens = fleet.prompt_lens(store.workload)
    resolve = Resolver.of_workload(fleet.shape, store.workload, lens, fleet.device_bytes)
    with log.spend("profile"):
        cost = study_costs(runs, lens, resolve)
    with log.spend("search"):
        space = participant.agree(_space(runs, cost, resolve))
        warm = warm_start(
            store.warm_start_path,
            store.config,
            model=fleet.model,
            machine=fleet.machine,
            space=space,
            resolve=resolve,
        )
        for line in warm.said:
            runs.reporter.say(f"warm start: {line}")
    if not store.records:
        # A model that comes out wrong when it is cut is found out before anything else is measured.
        runs.ensure_reference()
    with log.spend("baseline"):
        _measure_baseline(runs)
    with log.spend("single_stage"):
        _measure_single_stage(runs, space, resolve)
    search = Search(runs, log, participant, space, cost, resolve, warm)
    search.run()
    with log.spend("finals"):
        _run_finals(runs, log, participant, search.preferred)


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
            record = runs.baseline("baseline: un-pipelined", config.protocol, size, role="baseline")
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
    runs.measure(f"single stage: {plan.describe()}", plan, resolve(plan), role="single_stage")


def _run_finals(runs: Runs, log: SearchLogWriter, participant: Participant, preferred: Sequence[str]) -> None:
    """Round by round until the best is told from the others, or a tie is declared."""
    store, config = runs.store, runs.store.config
    objectives = _objectives(store)
    other = participant.claim_finals() if config.finalists else None
    if other is not None:
        runs.reporter.say(other)
        return
    finalists = finals.choose(
        store.records,
        objectives,
        config.constraints,
        count=config.finalists,
        min_stages=config.space.min_stages,
        preferred=preferred,
    )
    if not finalists.plans:
        return
    protocol = finals.side_by_side(config.protocol)
    ran = False
    while True:
        step = finals.next_step(
            store.records,
            finalists,
            objectives=objectives,
            constraints=config.constraints,
            min_rounds=config.finalist_rounds,
            max_rounds=max(config.finalist_rounds, config.max_finalist_rounds),
            seed=config.seed,
        )
        if isinstance(step, finals.FinalsResult):
            break
        if not ran:
            # A fresh fleet: what the workers have become over many plans shall not decide.
            with log.spend("start"):
                runs.renew_fleet()
            ran = True
        label = f"final round {step.shown_round + 1}"
        labels: Labels = {"role": "finalist", "round": step.round}
        if step.name == finals.BASELINE:
            assert finalists.baseline_batch_size is not None
            runs.baseline(f"{label} · baseline", protocol, finalists.baseline_batch_size, **labels)
        else:
            effective = finalists.plan(step.name)
            plan, name = effective.plan, f"{label} · {effective.plan.describe()}"
            runs.measure(name, plan, effective, protocol=protocol, **labels)
    if ran:
        runs.reporter.say(f"the finals end: {step.text}")
    participant.finish_finals()
