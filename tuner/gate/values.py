"""What a gate is asked and what it answers, as frozen values; `GateResult` is the document of `gate --json`."""

import math
from enum import StrEnum
from typing import Any, Literal

from pydantic import ConfigDict, Field

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.bench.record import Failure, Machine, Moment, Seconds
from pipetune.bench.spec import ModelSpec, Plan, Protocol, SchemaVersion, Value, Workload
from pipetune.tuner.config.gate import Tolerance

SideName = Literal["baseline", "candidate"]
SIDES: tuple[SideName, SideName] = ("baseline", "candidate")


class Side(Value):
    """What one side runs, as far as it may differ from the other."""

    name: SideName
    model: ModelSpec
    plan: Plan
    devices: tuple[str, ...]
    """Devices of its fleet; those without a stage take their share of the cores as well."""
    python: str | None = None
    """Interpreter of the environment that pipetune is installed in; None is this one."""
    ref: str | None = None
    """Revision of pipetune's own repository, as given; it is built in an environment of its own."""
    revision: str | None = None
    """Commit that `ref` resolved to."""
    engine_python: str | None = None
    """Interpreter of the environment whose vLLM runs the plan; None: pipetune's own runtime does."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables that its processes get on top of the gate's own."""

    def describe(self) -> str:
        """What sets it apart, in one line for people."""
        parts = [self.plan.describe(), self.model.dtype]
        parts += [f"at {self.ref}"] if self.ref else [f"by {self.python}"] if self.python else []
        parts += [f"in {self.engine_python}"] if self.engine_python else []
        return " · ".join((*parts, *(f"{key}={value}" for key, value in self.env.items())))


class Case(Value):
    """One config: both sides under one workload."""

    name: str
    workload: Workload
    protocol: Protocol
    baseline: Side
    candidate: Side
    metrics: dict[str, Tolerance]
    noise_floor: float = 0.0

    def side(self, name: SideName) -> Side:
        """One of its sides."""
        return self.baseline if name == "baseline" else self.candidate


class Sample(Value):
    """One fresh process, or one run in a running fleet: a unit of the gate. What is no number is kept, since it decides
    a gate; JSON has no word for it, and says it as a string."""

    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    metrics: dict[str, float] = Field(default_factory=dict)
    """Metrics of the run, each the median over its iterations or as `bench.metrics` derives it; empty for a failure."""
    durations_s: tuple[float, ...] = ()
    """Seconds of its timed iterations."""
    steady: bool = True
    disturbances: tuple[str, ...] = ()
    failure: Failure | None = None
    not_comparable: str | None = None
    """Why nothing was measured though its side did not fail: its GPU was taken, or it did other work than it was asked
    for; and what helps."""
    checked: bool = False
    """Whether its output was compared with the unsplit model's."""
    hardware_id: str | None = None
    """Digest of the machine as its side saw it at first, by this pipetune."""
    recorded_hardware_id: str | None = None
    """Digest of the machine of this very run, by its side's own pipetune, comparable within that side alone; None where
    the run left no record of its own."""
    started_at: Moment
    wall_s: Seconds

    @property
    def is_measured(self) -> bool:
        """Whether there is anything to compare."""
        return self.failure is None and self.not_comparable is None


REHEARSAL = -1
"""Number of a pair that was only to rehearse, which is kept where it failed."""


class Pair(Value):
    """Both sides, one right after the other."""

    case: str
    number: int
    """Counted from 0; or `REHEARSAL`."""
    first: SideName
    """Side that ran first, drawn at random."""
    baseline: Sample
    candidate: Sample

    def side(self, name: SideName) -> Sample:
        """The run of one side."""
        return self.baseline if name == "baseline" else self.candidate


class Session(Value):
    """All runs of one plan in one stored study or file, or the new ones beside them."""

    place: str
    """Folder or file, or `now`."""
    case: str
    """Name of the config, or of the benchmark."""
    samples: tuple[Sample, ...]
    machine: Machine | None = None


class Verdict(StrEnum):
    """What a gate says."""

    FAIL = "FAIL"
    OK = "OK"
    INCONCLUSIVE = "INCONCLUSIVE"


class Reason(StrEnum):
    """Why."""

    WORSE = "worse"
    """FAIL: surely worse, and by more than the least effect and the noise floor."""
    CANDIDATE_FAILED = "candidate_failed"
    """FAIL: it did not run where the baseline ran."""
    WITHIN_MARGIN = "within_margin"
    """OK: surely not worse by the margin."""
    NOT_TOLD = "not_told"
    """The pairs are used up."""
    OUT_OF_TIME = "out_of_time"
    """The minutes are used up."""
    UNFIT_MACHINE = "unfit_machine"
    """Equal sides would seem to differ by more than the margin here."""
    NEVER_STEADY = "never_steady"
    BASELINE_FAILED = "baseline_failed"
    NOT_COMPARABLE = "not_comparable"
    """A run of either side says nothing of it: its GPU was taken, or it did other work than it was asked for."""
    MISSING_BASELINE = "missing_baseline"
    MISSING_CANDIDATE = "missing_candidate"
    MISSING_METRIC = "missing_metric"
    NOT_FINITE = "not_finite"
    """NaN, infinite, or not above zero where a ratio is asked for."""
    OTHER_HARDWARE = "other_hardware"
    SETTLED = "settled"
    """Another metric of the case failed first, which settles it."""
    TOO_FEW = "too_few"
    """Stored sessions too few for their spread to be known."""
    UNREADABLE = "unreadable"
    """A file that is cut off, or none of ours."""


VERDICTS = {Reason.WORSE: Verdict.FAIL, Reason.CANDIDATE_FAILED: Verdict.FAIL, Reason.WITHIN_MARGIN: Verdict.OK}
"""All other reasons are INCONCLUSIVE."""
EXIT_CODES = {Verdict.OK: 0, Verdict.FAIL: 1, Verdict.INCONCLUSIVE: 3}


class LookTaken(Value):
    """What one look at one hypothesis said."""

    pairs: int
    p_fail: float
    alpha_fail: float
    p_ok: float
    alpha_ok: float
    estimate: float
    """Share by which the candidate is worse: 0.05 is 5 % worse, -0.02 is 2 % better."""
    floor: float
    """Share that equal sides may seem to differ by here."""


class Finding(Value):
    """One hypothesis: a metric of a case."""

    case: str
    metric: str
    margin: float
    least_effect: float
    verdict: Verdict
    reason: Reason
    text: str
    """For people: what was found, and what to do."""
    pairs: int = 0
    estimate: float | None = None
    """Share by which the candidate is worse; None where there was nothing to compare."""
    interval: tuple[float, float] | None = None
    """95 % confidence, as shares; None where the pairs are too few for one."""
    floor: float | None = None
    looks: tuple[LookTaken, ...] = ()
    differences: tuple[float, ...] = ()
    """log(candidate / baseline) of each pair, turned so that worse is positive."""
    baseline: float | None = None
    """Median over the runs, in the metric's own unit."""
    candidate: float | None = None

    @property
    def change(self) -> float | None:
        """-0.33: the metric itself is 33 % less; of a rate that is worse, of a time or of memory better."""
        return None if self.estimate is None else change_of(self.metric, self.estimate)

    @property
    def change_interval(self) -> tuple[float, float] | None:
        """The interval of that."""
        if self.interval is None:
            return None
        low, high = sorted(change_of(self.metric, end) for end in self.interval)
        return low, high


def change_of(metric: str, worse: float) -> float:
    """Change of a metric whose cost grows by a share: of a rate -0.33 for 0.5, of all else the share itself."""
    return from_log_cost(metric, math.log1p(worse)) - 1


def finding_of(case: str, metric: str, tolerance: Tolerance, reason: Reason, text: str, **values: Any) -> Finding:
    """A finding, with the verdict that its reason means; `values` are its further fields."""
    return Finding(
        case=case,
        metric=metric,
        margin=tolerance.margin,
        least_effect=tolerance.least_effect,
        verdict=VERDICTS.get(reason, Verdict.INCONCLUSIVE),
        reason=reason,
        text=text,
        **values,
    )


Method = Literal["fresh_processes", "running_fleet", "stored"]


class GateResult(Value):
    """A gate, whole."""

    schema_version: SchemaVersion = 1
    verdict: Verdict
    exit_code: int
    method: Method
    cannot_see: tuple[str, ...] = ()
    """What this way of comparing is blind to."""
    findings: tuple[Finding, ...]
    cases: tuple[Case, ...] = ()
    pairs: tuple[Pair, ...] = ()
    sessions: tuple[Session, ...] = ()
    """Sessions of a stored baseline and of the candidate, whose session is the last of each case."""
    order_seed: int | None = None
    """Seed of the randomised order, which says which side of a pair runs first."""
    machines: dict[SideName, Machine | None] = Field(default_factory=dict)
    """Hardware and software of both sides."""
    started_at: str
    took_s: float
    notes: tuple[str, ...] = ()
    """What a reader must know: software that differs, disturbed runs, unsteady ones."""


def log_cost(metric: str, value: float) -> float:
    """The logarithm of a value above zero, turned so that more is worse."""
    return -math.log(value) if metric in HIGHER_IS_BETTER else math.log(value)


def from_log_cost(metric: str, cost: float) -> float:
    """The value of a metric whose `log_cost` that is."""
    return math.exp(-cost if metric in HIGHER_IS_BETTER else cost)


def verdict_of(findings: tuple[Finding, ...]) -> Verdict:
    """FAIL goes before INCONCLUSIVE, and that before OK; of nothing at all nothing can be said."""
    found = {finding.verdict for finding in findings}
    worst = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.OK)
    return next((verdict for verdict in worst if verdict in found), Verdict.INCONCLUSIVE)
