"""A ranking as frozen values: rows of plans, the baseline, the failures, and how sure the order is."""

from typing import Literal

from pipetune.bench.metrics import HIGHER_IS_BETTER
from pipetune.bench.record import Failure, Role
from pipetune.bench.spec import EffectivePlan, Plan, Value
from pipetune.tuner.config.schema import Constraint
from pipetune.tuner.stats.ratios import Ratio


class Objective(Value):
    """One metric to make better."""

    metric: str

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.metric in HIGHER_IS_BETTER

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """The direction, as Optuna spells it."""
        return "maximize" if self.higher_is_better else "minimize"

    def cost(self, value: float) -> float:
        """The value turned so that less is better."""
        return -value if self.higher_is_better else value

    def gain(self, ours: float, theirs: float) -> float | None:
        """How many times better `ours` is than `theirs`; None where a zero or a sign makes that meaningless."""
        over, under = (ours, theirs) if self.higher_is_better else (theirs, ours)
        return over / under if over > 0 and under > 0 else None

    def __str__(self) -> str:
        return self.metric


class Spread(Value):
    """A metric over repetitions."""

    median: float
    """In a finals the level over its rounds."""
    q1: float
    q3: float
    samples: int
    """Iterations for throughput and duration, runs for other metrics."""
    runs: int

    @property
    def iqr(self) -> float:
        """Interquartile range, in the metric's unit."""
        return self.q3 - self.q1


class Pooled(Value):
    """All runs of a plan, or of the un-pipelined model."""

    spread: Spread | None
    """The first objective's; None when it was not measured."""
    throughput: Spread
    """`output_throughput`, whatever the objective; `total_token_throughput` where texts are scored."""
    metrics: dict[str, float]
    """Every metric over the runs used: its level in a finals if it is the objective or follows from an iteration's
    duration, else its median."""
    in_finals: bool = False
    """Whether the values are of the last finals, where it was measured until it left, one round missed at most; where
    there are such plans, only they are called best. All else is of the search, and compares with that alone."""
    confirmed: bool = False
    """Whether the finals measured it in several rounds."""
    records: tuple[int, ...]
    """Numbers of all measurements."""
    used_records: tuple[int, ...]
    """Those that the values come from."""
    notes: tuple[str, ...] = ()
    disturbed_runs: int = 0

    @property
    def value(self) -> float | None:
        """The first objective's median; None when it was not measured."""
        return self.spread.median if self.spread else None


class Row(Pooled):
    """One effective plan."""

    effective: EffectivePlan
    rank: int | None = None
    """1 is best; None when a constraint is broken or `unranked_because` says why."""
    typical_record: int
    """The used one nearest to the median, with a timeline if any has one."""
    broken_constraints: tuple[str, ...] = ()
    tied: bool = False
    """Not told apart from the fastest finalist, or the fastest itself where there is such a plan."""
    on_front: bool = False
    """No other ranked plan is at least as good in every objective and better in one."""
    speedup_over_baseline: Ratio | None = None
    speedup_over_single_stage: Ratio | None = None
    unranked_because: str | None = None
    is_reference: bool = False
    """Outside the bounds of the search: it has no rank, and shows what the others gain."""
    failed_runs: int = 0

    @property
    def key(self) -> str:
        """Key of the effective plan."""
        return self.effective.key

    @property
    def plan(self) -> Plan:
        """The plan, with its caps as given."""
        return self.effective.plan

    @property
    def feasible(self) -> bool:
        """Whether every constraint is kept."""
        return not self.broken_constraints

    @property
    def recommended(self) -> bool:
        """Whether it is the best plan; `Ranking.recommended_because` says why, where its value alone does not."""
        return self.rank == 1


class BaselineRow(Pooled):
    """The un-pipelined model at one batch size."""

    batch_size: int


class FailureRow(Value):
    """One run that gave no measurement."""

    record: int
    role: Role
    plan: Plan | None
    """None for the baseline."""
    batch_size: int | None
    """Batch size of the baseline, where it is known."""
    failure: Failure


class Rival(Value):
    """The best plan of the other kind: one pipeline where the best plan has replicas, replicas where it has none."""

    row: Row
    gain: Ratio | None
    """How many times better the best plan is."""


class Separation(Value):
    """Whether the fastest finalist is told apart from all others."""

    separated: bool = False
    text: str
    rounds: int = 0
    """Whole interleaved rounds of the last finals."""
    tied: tuple[str, ...] = ()
    """Keys of the plans that are not told apart, the fastest first; empty where one is, and without finals."""


class Ranking(Value):
    """What a study found."""

    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    rows: tuple[Row, ...]
    """Best first: those that keep the constraints, then those that break one."""
    unranked: tuple[Row, ...]
    """Measured, but no basis for a claim of speed."""
    baseline: BaselineRow | None
    """The un-pipelined model at its best batch size, which every speed-up is over."""
    baseline_sweep: tuple[BaselineRow, ...]
    """At every batch size tried, with the values from before the finals, so that they compare with each other."""
    single_stage: Row | None
    """The best plan of one stage on one device, our own runtime without a pipeline: what it gains, pipelining did
    not."""
    rival: Rival | None = None
    """None where plans of one kind alone are ranked."""
    engine_default: Rival | None = None
    """What another engine does by itself, one pipeline at its own limits; without a gain where nothing is better."""
    failures: tuple[FailureRow, ...]
    separation: Separation
    recommended_because: str | None = None
    """Why the best plan is not simply the one with the best value: a tie, or several objectives."""

    @property
    def best(self) -> Row | None:
        """The best plan that keeps every constraint; None when there is none."""
        return next((row for row in self.rows if row.recommended), None)

    def baseline_beside(self, in_finals: bool) -> BaselineRow | None:
        """What speed-ups in the finals, or in the search, are over: the baseline as it was measured there."""
        if self.baseline is None or self.baseline.in_finals == in_finals:
            return self.baseline
        own = (row for row in self.baseline_sweep if row.batch_size == self.baseline.batch_size)
        return None if in_finals else next(own)
