"""A comparison of studies as frozen values; `StudyComparison` is the document of `compare --json`."""

from pipetune.bench.record import Machine
from pipetune.bench.spec import ModelSpec, Plan, Protocol, SchemaVersion, Value, Workload
from pipetune.tuner.stats.ratios import Ratio


class PlanResult(Value):
    """What one plan gave in one study."""

    plan: Plan
    in_flight: int
    stage_devices: tuple[str, ...]
    cap_bytes: tuple[int, ...]
    """What each stage might take."""
    peak_bytes: tuple[int, ...]
    """The peak of its process, on GPUs of its allocator: more than what a cap counts, which the model takes."""
    throughputs: tuple[float, ...]
    """Tokens per second of each run."""
    metrics: dict[str, float]
    """By name, as the study ranks by them."""
    tokens_per_joule: float | None = None
    """Tokens per joule, the same tokens; None where no energy was measured."""
    disturbed_runs: int = 0

    @property
    def throughput(self) -> float:
        """Tokens per second: those generated, or all where texts are scored."""
        return self.metrics.get("output_throughput", self.metrics["total_token_throughput"])


class Contestant(Value):
    """One study, or one file of records."""

    name: str
    """Unique among those compared."""
    place: str
    hardware_id: str
    machine: Machine | None
    """None of a file of records, which knows its `hardware_id` alone."""
    model: ModelSpec
    workload: Workload
    protocol: Protocol
    goals: tuple[str, ...]
    """Objectives and constraints that its best plan was chosen by."""
    devices: tuple[str, ...]
    price_per_hour: float | None
    """Price of an hour of all its devices together; None where a device has no price."""
    baseline: float | None
    """Tokens per second of the un-pipelined model."""
    over_baseline: Ratio | None = None
    """How many times better its best plan is, as that study says."""
    best: PlanResult | None
    """Its own best plan; None where no plan has a rank."""
    best_key: str | None = None
    """Key of that plan, as `SharedPlan.key`."""

    @property
    def tokens_per_device(self) -> float | None:
        """Tokens per second and device of the best plan; devices that it leaves idle count as well."""
        return self.best.throughput / len(self.devices) if self.best else None

    @property
    def tokens_per_price(self) -> float | None:
        """Tokens for one unit of money."""
        if self.best is None or self.price_per_hour is None:
            return None
        return 3600.0 * self.best.throughput / self.price_per_hour


class SharedPlan(Value):
    """A plan that several studies ran, wherever its stages lay."""

    key: str
    """Layers, sizes, replicas and switches, without the devices' names and without how many are in flight."""
    text: str
    figures: dict[str, PlanResult]
    """Results by the study's name."""
    ratios: dict[str, Ratio]
    """Throughput of each later study that has it over the first study's; empty where that did not run it."""
    notes: tuple[str, ...] = ()
    """Caps or numbers in flight that differ."""


class Change(Value):
    """A later study against the first."""

    name: str
    hardware: tuple[str, ...]
    """What differs, `key: before → now`, GPUs' UUIDs and devices' names included."""
    protocol: tuple[str, ...]
    """What differs in how it was measured, and in what the best plan was chosen by."""
    software: tuple[str, ...]
    work: tuple[str, ...]
    """What differs in model and workload: then nothing else compares."""
    same_plan: Ratio | None
    """The first study's best plan in both; None where this one did not run it."""
    own_best: Ratio | None
    """Each at its own best."""
    moved: str | None
    """Where the best plan moved; None where it is the same."""
    text: str
    """In words: a plan that is slower is not the same as another plan that is best now."""


class StudyComparison(Value):
    """Studies side by side, the first being what the others are compared with."""

    schema_version: SchemaVersion = 1
    contestants: tuple[Contestant, ...]
    plans: tuple[SharedPlan, ...]
    """Fastest first, by the first study that has each."""
    changes: tuple[Change, ...]
