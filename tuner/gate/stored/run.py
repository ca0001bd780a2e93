"""A gate whose baseline is stored: it says how little it can see, and INCONCLUSIVE rather than a guess.

The units are sessions, as `tuner.gate.stored.rule` judges them. One stored session says nothing of how much nights
differ, and decides nothing unless `gate.session_noise` says it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipetune.bench.errors import StudyError
from pipetune.tuner.config.gate import GateConfig, Tolerance
from pipetune.tuner.gate.cases import SideRequest, case_of, metrics_of
from pipetune.tuner.gate.python_env import OutOfTime
from pipetune.tuner.gate.run import Clock, result_of
from pipetune.tuner.gate.runners import FreshProcesses, SideRunner
from pipetune.tuner.gate.stored.read import Stored, notes_of, other_plans, other_work, read_benchmarks, read_stored
from pipetune.tuner.gate.stored.rule import SESSION_RUNS, foreseen, judge_case, out_of_time
from pipetune.tuner.gate.values import Case, Finding, GateResult, Reason, Sample, Session, finding_of
from pipetune.tuner.progress import Reporter

BLIND_TO_NIGHTS = (
    "what changed on the machine between the stored sessions and now, or a drift of it that no stored session had: "
    "it counts as the candidate's"
)
BLIND_TO_FLEETS = (
    "what a fleet shows that has run other plans before: the runs of a study share one, and the candidate's have none"
)


def compare_stored(
    places: Sequence[Path],
    candidate: SideRequest,
    reporter: Reporter,
    *,
    other_dtype: bool = False,
    max_minutes: float | None = None,
    start: Callable[[tuple[Case, ...]], SideRunner] = FreshProcesses,
) -> GateResult:
    """Stored sessions beside a candidate that is measured now, by the runner that `start` gives; with `other_dtype`
    another dtype is what is compared. ConfigError: the stored side did other work than the candidate is asked for."""
    clock = Clock(max_minutes)
    case = case_of("default", candidate, candidate)
    try:
        stored = read_stored(places, case, other_dtype=other_dtype)
    except StudyError as error:
        return _undecided(case.name, case.metrics, Reason.UNREADABLE, str(error), clock)
    plan = next((one.plan for one in stored if one.plan is not None), case.baseline.plan)
    update = {"name": "baseline", "model": stored[0].model, "plan": plan}
    case = case.model_copy(update={"baseline": case.baseline.model_copy(update=update)})
    gate = candidate.config.gate
    new = Session(place="now", case=case.name, samples=())
    if lines := foreseen(case.metrics, stored, gate):
        with reporter, start((case,)) as runner:
            for line in lines:
                reporter.say(line)
            machine = runner.prepare(clock.deadline)["candidate"]
            here = None if machine is None else machine.hardware.hardware_id
            # Runs on other hardware than that of the stored ones would tell nothing.
            comparable = here is None or here in {run.hardware_id for one in stored for run in one.samples}
            samples = _runs(case, runner, reporter, clock) if comparable else []
        new = new.model_copy(update={"samples": tuple(samples), "machine": machine})
    findings = judge_case(case.name, case.metrics, stored, new, gate)
    if len(new.samples) < SESSION_RUNS:
        # Runs that are missing though none failed are those for which there was no time.
        findings = out_of_time(findings, len(new.samples))
    return _result(clock, findings, stored, (new,), cases=(case,), notes=notes_of(stored, new, case.candidate.model))


def _runs(case: Case, runner: SideRunner, reporter: Reporter, clock: Clock) -> list[Sample]:
    """A rehearsal, which compares its output with the unsplit model's and is not counted, then the session. Fewer than
    a session's where one failed, or the time was up."""
    samples: list[Sample] = []
    for number in range(1 + SESSION_RUNS):
        label = f"candidate {number} of {SESSION_RUNS}" if number else "rehearsal"
        label, check = f"{label}: {case.candidate.describe()}", not number and case.protocol.check_outputs
        try:
            last = clock.sample(runner, case, "candidate", reporter, label, check=check)
        except OutOfTime:
            # The deadline ended a run, which says nothing of the candidate.
            break
        if number or not last.is_measured:
            samples.append(last)
        else:
            minutes = max(1, round(SESSION_RUNS * last.wall_s / 60))
            reporter.say(clock.bounded(f"{SESSION_RUNS} runs of about {last.wall_s:.0f} s: {minutes} min from here"))
        if not last.is_measured or last.wall_s > clock.left_s():
            break
    return samples


def nothing_stored(place: Path, gate: GateConfig) -> GateResult:
    """The result for a study without a best plan, as one that is empty: there is nothing to run now either."""
    why = f"{place}: the study has no best plan, since it is empty or did not end; name a plan by --candidate-plan FILE"
    return _undecided("default", gate.metrics, Reason.MISSING_BASELINE, why, Clock())


def compare_files(baselines: Sequence[Path], candidate: Path, gate: GateConfig) -> GateResult:
    """Files of pytest-benchmark, benchmark by benchmark; one that only one side has is never passed over.
    ConfigError: a metric that is asked for by name is not measured in a benchmark."""
    clock = Clock()
    try:
        old, new = [read_benchmarks(path) for path in baselines], read_benchmarks(candidate)
    except StudyError as error:
        return _undecided("all", gate.metrics, Reason.UNREADABLE, str(error), clock)
    if not (names := list(dict.fromkeys(name for file in (*old, new) for name in file))):
        why = f"there is no benchmark in {', '.join(map(str, (*baselines, candidate)))}"
        return _undecided("all", gate.metrics, Reason.MISSING_BASELINE, why, clock)
    metrics: dict[str, dict[str, Tolerance]] = {}
    for name in names:
        one = next(file[name] for file in (*old, new) if name in file)
        machine = one.machine
        gpu = machine is not None and bool(machine.hardware.gpus)
        metrics[name] = metrics_of(name, gate, one.workload, gpu=gpu)
    hypotheses = sum(map(len, metrics.values()))
    findings: list[Finding] = []
    newest: list[Session] = []
    notes: dict[str, list[str]] = {}
    for name in names:
        stored, now = [file[name] for file in old if name in file], new.get(name)
        session = now or Session(place=str(candidate), case=name, samples=())
        newest.append(session)
        lacking = [path for path, file in zip(baselines, old, strict=True) if stored and name not in file]
        lines = [f"{path} is left out: it lacks the benchmark" for path in lacking]
        for line in (*lines, *notes_of(stored, session, now.model if now is not None else None)):
            notes.setdefault(line, []).append(name)
        if now is not None and (other := other_work(stored, now.model, now.workload)):
            why = f"what is stored under this name did other work ({other}); give the plan another name"
        elif other := other_plans(stored):
            why = f"what is stored under this name is of different plans ({other}); give each plan a name of its own"
        else:
            findings += judge_case(name, metrics[name], stored, session, gate, hypotheses=hypotheses)
            continue
        findings += [finding_of(name, *one, Reason.MISSING_BASELINE, why) for one in metrics[name].items()]
    every = [file[name] for name in names for file in old if name in file]
    told = [line if len(of) == len(names) else f"{', '.join(of)}: {line}" for line, of in notes.items()]
    return _result(clock, findings, every, newest, notes=told)


def _undecided(case: str, metrics: Mapping[str, Tolerance], reason: Reason, why: str, clock: Clock) -> GateResult:
    """One finding for every metric alike, where there is nothing to compare."""
    return _result(clock, [finding_of(case, *one, reason, why) for one in metrics.items()])


def _result(
    clock: Clock,
    findings: Sequence[Finding],
    stored: Sequence[Stored] = (),
    new: Sequence[Session] = (),
    *,
    cases: tuple[Case, ...] = (),
    notes: Sequence[str] = (),
) -> GateResult:
    return result_of(
        tuple(findings),
        clock,
        method="stored",
        cannot_see=(BLIND_TO_NIGHTS, *((BLIND_TO_FLEETS,) if any(one.of_study for one in stored) else ())),
        cases=cases,
        sessions=(*stored, *new),
        machines={
            "baseline": stored[0].machine if stored else None,
            "candidate": next((one.machine for one in new if one.machine is not None), None),
        },
        notes=notes,
    )
