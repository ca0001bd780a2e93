"""A history as frozen values; `History` is the document of `history --json`."""

from pipetune.bench.spec import SchemaVersion, Value


class Night(Value):
    """One study."""

    study: str
    place: str
    started_at: str
    """Start of its first record; UTC, ISO 8601."""
    plan: str | None
    """Its best plan; None where no plan has a rank."""
    git_revision: str | None
    software: str
    """Packages that compute, in one line."""


class LevelChange(Value):
    """A new level of a series."""

    night: int
    """Index of the first night at the new level, within the series."""
    study: str
    p: float
    before: float
    after: float
    is_worse: bool
    also_changed: tuple[str, ...]
    """What else changed between that night and the one before: software, the plan."""

    @property
    def share(self) -> float | None:
        """-0.1: the metric is 10 % lower than before; None where that was zero or less."""
        return self.after / self.before - 1.0 if self.before > 0 else None


class Series(Value):
    """One metric over the nights of one question."""

    metric: str
    subject: str
    """`best plan`, `device_map`, or a plan that many nights ran."""
    nights: tuple[int, ...]
    """Indices into `Question.nights`."""
    values: tuple[float, ...]
    changes: tuple[LevelChange, ...]
    dependence: float | None = None
    """Autocorrelation around the levels, where nights hang together; a change may then be a spell that passes."""


class Question(Value):
    """Studies of one model and workload on equal hardware: their nights make series."""

    title: str
    hardware_id: str
    machine: str
    nights: tuple[Night, ...]
    """Nights in order of time."""
    alpha: float
    """Chance of a change being seen in a series that has none."""
    series: tuple[Series, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics that have a series, once each."""
        return tuple(dict.fromkeys(one.metric for one in self.series))


class History(Value):
    """All of it."""

    schema_version: SchemaVersion = 1
    questions: tuple[Question, ...]
    skipped: tuple[str, ...] = ()
    """Folders that hold no study that can be read, and why."""
