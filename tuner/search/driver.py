"""A study from its first worker to its finals: profile, reference, baseline, single stage, trials, finals.

The order is fixed, and every step first looks at what is on disk: a study that was stopped anywhere goes on there.
"""

import contextlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

from pipetune.bench.errors import FleetError, StudyError
from pipetune.bench.files import write_durably
from pipetune.bench.fleet.experiment import Labels
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import EffectivePlan, Plan
from pipetune.tuner.planning.simulation.load import under_load
from pipetune.tuner.planning.simulation.model import CostModel
from pipetune.tuner.progress import Reporter
from pipetune.tuner.ranking import finals
from pipetune.tuner.ranking.rank import rank
from pipetune.tuner.ranking.runs import BASELINE
from pipetune.tuner.ranking.values import Objective, Ranking
from pipetune.tuner.search.policy.history import is_due
from pipetune.tuner.search.policy.warm_start import warm_start
from pipetune.tuner.search.runs import Interrupted, Runs
from pipetune.tuner.search.shared.participant import Member, Participant
from pipetune.tuner.search.space.engine import default_point
from pipetune.tuner.search.space.resolver import Resolver
from pipetune.tuner.search.space.space import SearchSpace
from pipetune.tuner.search.study_costs import resolver_of, space_of, study_costs
from pipetune.tuner.search.trials import Search
from pipetune.tuner.study.files import RECORDS_FOLDER, StudyFile, fitting
from pipetune.tuner.study.store import StudyStore


def run_study(store: StudyStore, reporter: Reporter, *, start_fleet: Callable[..., Fleet] | None = None) -> bool:
    """Runs what is left of a study; False if it was interrupted. `start_fleet` is in place of `Fleet.start`, where
    there are no workers. UserError: a model, prompts or bounds that cannot be used, or a resume that does not fit;
    NothingFeasibleError: no plan fits into memory; FleetError: the workers do not start, or are lost again and again,
    and the study cannot or shall not go on."""
    return _to_the_end(Runs(store, start_fleet, reporter), _run)


def run_plans(
    store: StudyStore,
    reporter: Reporter,
    plans: Sequence[EffectivePlan],
    *,
    start_fleet: Callable[..., Fleet] | None = None,
) -> bool:
    """Runs given plans in place of a search: each once a round, in an order of its own, and none again that is there;
    returns and raises as `run_study`."""

    def run(runs: Runs, stack: contextlib.ExitStack) -> None:
        fleet, config = runs.open_fleet(stack), store.config
        store.set_revision(fleet.model.revision, fleet.model.dtype)
        store.set_machine(fleet.machine, fleet.shape)
        order = random.Random(config.seed)
        runs.expect(config.finalist_rounds * len(plans) - len(store.records))
        for turn in range(config.finalist_rounds):
            there = [record for record in store.records if record.round == turn and record.spec]
            for one in order.sample(plans, len(plans)):
                if is_due([record for record in there if record.spec and record.spec.plan == one.plan]):
                    label = f"round {turn + 1} of {config.finalist_rounds} · {one.plan.describe()}"
                    known = fleet.resolve(one.plan, store.workload)
                    runs.measure(label, one.plan, known, role="finalist", round=turn)

    return _to_the_end(Runs(store, start_fleet, reporter), run)


def _to_the_end(runs: Runs, work: Callable[[Runs, contextlib.ExitStack], None]) -> bool:
    """Whether the work ended without an interrupt; it begins anew after a loss, and without what was lost twice."""
    for loss in runs.store.losses.losses:
        runs.reporter.say(str(loss))
    with runs.stop.listening():
        try:
            while True:
                try:
                    with contextlib.ExitStack() as stack:
                        stack.callback(runs.log.save)
                        work(runs, stack)
                    break
                except FleetError as error:
                    runs.survive(error)
        except Interrupted:
            if runs.store.records:
                runs.reporter.say("stopped; what was measured is kept, and --resume goes on with it")
            else:
                runs.reporter.say("stopped before the first run had ended: nothing was measured, and begin anew")
            return False
    return True


def rank_study(store: StudyStore) -> Ranking:
    """What the records of the devices that are left say so far."""
    config = store.config
    rounds = (config.finalist_rounds, max(config.finalist_rounds, config.max_finalist_rounds))
    return rank(store.current, _objectives(store), config.constraints, rounds, space=config.space)


def _objectives(store: StudyStore) -> list[Objective]:
    return [Objective(metric=name) for name in store.config.objectives]


def baseline_batch_sizes(wanted: Sequence[int] | None, num_prompts: int) -> tuple[int, ...]:
    """Batch sizes to try the un-pipelined model at, largest first: all prompts at once, a half, a quarter."""
    sizes = wanted or [math.ceil(num_prompts / parts) for parts in (1, 2, 4)]
    return tuple(sorted({min(size, num_prompts) for size in sizes}, reverse=True))


def _run(runs: Runs, stack: contextlib.ExitStack) -> None:
    store, log = runs.store, runs.log
    with log.spend("start"):
        takes_part = Participant if store.config.shared_study is None else Member
        participant = stack.enter_context(takes_part(store, runs.reporter.say))
        fleet = runs.open_fleet(stack)
        store.set_revision(fleet.model.revision, fleet.model.dtype)
        for line in store.set_machine(fleet.machine, fleet.shape):
            runs.reporter.say(f"other software than when the study began: {line}")
        participant.check(fleet.machine)
        with runs.stop.interruptible():
            lens = fleet.prompt_lens(store.workload)
    resolve = resolver_of(fleet, store.config, lens)
    with log.spend("profile"):
        cost = study_costs(runs, lens, resolve)
    with log.spend("search"):
        space = participant.agree(_space(runs, cost, resolve))
        warm = warm_start(store.path(StudyFile.WARM_START), store.config, fleet.model, fleet.machine, space, resolve)
        for line in warm.said:
            runs.reporter.say(f"warm start: {line}")
        if space.engine is not None:
            # What the engine does by itself is what others are compared with.
            warm = warm.model_copy(update={"first": (default_point(space), *warm.first)})
    if not store.current:
        # A model that comes out wrong when it is cut is found out before anything else is measured.
        runs.ensure_reference()
    config = store.config
    finals_runs = max(config.finalist_rounds, config.max_finalist_rounds) * (config.finalists + 2)
    before = len(baseline_batch_sizes(config.baseline_batch_sizes, config.workload.num_prompts)) + 1 + config.n_trials
    runs.expect(before + finals_runs * bool(config.finalists) - len(store.current))
    with log.spend("baseline"):
        _measure_baseline(runs)
    with log.spend("single_stage"):
        _measure_single_stage(runs, space, resolve, cost)
    preferred = Search(runs, participant, space, cost, resolve, warm).run()
    with log.spend("finals"):
        _run_finals(runs, participant, preferred)
    best = rank_study(store).best
    own = best.effective.by(served=False).key if best else None
    trials = [one for one in store.current if one.role == "trial"]
    trials = [one for one in trials if one.effective and one.effective.by(served=False).key == own]
    # The database is a copy for others: a study does not end without its reports for want of it.
    with contextlib.suppress(Exception), contextlib.closing(participant.open_study(space, resolve)) as study:
        study.note_best(trials[0] if trials else None)


def _space(runs: Runs, cost: CostModel, resolve: Resolver) -> SearchSpace:
    """The recorded space, or a new one: a point in a record must mean the same plan for ever."""
    path = runs.store.path(StudyFile.SPACE)
    points = {record.number: record.params or {} for record in runs.store.current if record.role == "trial"}
    if points and not path.exists():
        raise StudyError(
            f"{path} is missing, and the points of {len(points)} records refer to it; put it back, or take another "
            "folder"
        )
    space = space_of(runs, cost, resolve)
    with fitting(path):
        for rank_ in range(1, len(space.partitions) + 1):
            space.plan(next(space.points(rank_)))
    for number, params in points.items():
        with fitting(runs.store.folder / RECORDS_FOLDER / f"{number:04}.json"):
            if params:
                space.plan({name: int(value) for name, value in params.items()})
    if not path.exists():
        write_durably(path, space.model_dump_json() + "\n")
    return space


def _measure_baseline(runs: Runs) -> None:
    """The un-pipelined model over a few batch sizes; if it runs at none of them, over smaller ones."""
    config = runs.store.config
    by_size: dict[object, list[Record]] = defaultdict(list)
    for record in runs.store.current:
        if record.role == "baseline" and record.params:
            by_size[record.params.get("batch_size")].append(record)
    measured = any(isinstance(record.result, Measurement) for records in by_size.values() for record in records)
    sizes = list(baseline_batch_sizes(config.baseline_batch_sizes, config.workload.num_prompts))
    if config.workload.arrivals is not None:
        # The un-pipelined model takes prompts by the batch.
        sizes = []
    while sizes:
        size = sizes.pop(0)
        if is_due(by_size[size]):
            record = runs.baseline("baseline: un-pipelined", config.protocol, size, role="baseline")
            measured = measured or isinstance(record.result, Measurement)
        if not sizes and not measured and size > 1:
            sizes.append(size // 2)


def _measure_single_stage(runs: Runs, space: SearchSpace, resolve: Resolver, cost: CostModel) -> None:
    """Our runtime without a pipeline, which tells what pipelining gains from what the rest of it gains. Where it does
    not fit below `max_memory_per_device`, it is measured without that cap, to compare with."""
    if space.engine is not None or not is_due([one for one in runs.store.current if one.role == "single_stage"]):
        return
    baseline, workload = rank_study(runs.store).baseline, runs.store.config.workload
    most = workload.num_prompts if workload.arrivals is None else max(space.micro_batch_sizes)
    plan = space.switch(
        Plan.from_layer_counts(
            (runs.fleet.shape.num_layers,),
            runs.fleet.devices,
            baseline.batch_size if baseline else most,
            compile=space.compile[0],
            memory_fraction=max(runs.store.config.space.memory_fractions),
            max_memory_bytes=space.max_memory_bytes,
        )
    )
    if space.max_memory_bytes is not None and not isinstance(resolve(plan), EffectivePlan):
        plan = plan.model_copy(update={"stages": (plan.stages[0].model_copy(update={"max_memory_bytes": None}),)})
    resolved, predicted = resolve(plan), None
    if isinstance(resolved, EffectivePlan) and workload.arrivals is not None and workload.arrivals.slo_attainment:
        predicted = under_load(cost, plan, resolved.in_flight)["max_request_rate"]
    runs.measure(f"single stage: {plan.describe()}", plan, resolved, predicted=predicted, role="single_stage")


def _run_finals(runs: Runs, participant: Participant, preferred: Sequence[str]) -> None:
    """Round by round until the best is told from the others, or a tie is declared."""
    store, config = runs.store, runs.store.config
    objectives = _objectives(store)
    other = participant.claim_finals() if config.finalists else None
    if other is not None:
        runs.reporter.say(other)
        return
    finalists = finals.choose(
        store.current,
        objectives,
        config.constraints,
        count=config.finalists,
        space=config.space,
        preferred=preferred,
        served=config.engine is not None and config.engine.served_finals,
    )
    if not finalists.plans:
        return
    protocol = finals.side_by_side(config.protocol)
    if config.engine is not None:
        # Without the check an engine is started anew for every split.
        protocol = protocol.model_copy(update={"check_outputs": config.protocol.check_outputs})
    most = max(config.finalist_rounds, config.max_finalist_rounds)
    ran = False
    while True:
        step = finals.next_step(
            store.current,
            finalists,
            objectives=objectives,
            constraints=config.constraints,
            space=config.space,
            min_rounds=config.finalist_rounds,
            max_rounds=most,
            seed=config.seed,
        )
        if isinstance(step, str):
            break
        if not ran:
            # A fresh fleet: what the workers have become over many plans shall not decide.
            with runs.log.spend("start"):
                runs.renew_fleet()
            ran = True
            sides = len(finalists.plans) + (finalists.baseline_batch_size is not None)
            runs.expect((most - step.shown_round) * sides)
        label = f"final round {step.shown_round + 1} of at most {most}"
        labels: Labels = {"role": "finalist", "round": step.round}
        if step.name == BASELINE:
            assert finalists.baseline_batch_size is not None
            runs.baseline(f"{label} · baseline", protocol, finalists.baseline_batch_size, **labels)
        else:
            effective = finalists.plan(step.name)
            name = f"{label} · {effective.plan.describe()}"
            runs.measure(name, effective.plan, effective, protocol=protocol, **labels)
    if ran:
        runs.reporter.say(f"the finals end: {step}")
    participant.finish_finals()
