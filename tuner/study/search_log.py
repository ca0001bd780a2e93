"""The search's log: why each trial ran, what was predicted of it before, why the search ended, where the time went.

It is kept beside the records as `search.json` and written whole at every step, so that a kill loses nothing.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipetune.bench.files import write_durably
from pipetune.bench.record import Amount, Count, Seconds
from pipetune.bench.spec import SchemaVersion, Value
from pipetune.tuner.study.files import read

Reason = Literal["again", "first", "all", "model", "kind", "tpe", "replicate"]
"""Why a plan runs: `again`, it was stopped or lost its workers; `first`, an earlier study liked it; `all`, the space is
within the budget; `model`, the cost model promises most of it; `kind`, no plan of its kind was measured; `tpe`, Optuna
likes it; `replicate`, it is the incumbent, not surely."""

Phase = Literal["start", "profile", "reference", "baseline", "single_stage", "trials", "search", "finals", "reports"]
"""What a study spends time on; `search` is choosing the next trial and telling what came of it."""
_MEASURING: tuple[Phase, ...] = ("baseline", "single_stage", "trials", "finals")


class Proposal(Value):
    """What to run next."""

    point: dict[str, int]
    kind: Reason
    reason: str
    """Text for people."""
    predicted: dict[str, Amount] = Field(default_factory=dict)
    """Metrics, before it runs."""
    predicted_sd: dict[str, Amount] = Field(default_factory=dict)
    """Relative standard deviations of these."""


class Stop(Value):
    """The end of a search."""

    kind: Literal["budget", "time", "converged", "exhausted"]
    text: str
    """Reason, for people."""


class LoggedTrial(Proposal):
    """A proposal that became a trial."""

    trial_number: Count


class SearchLog(Value):
    """The log of one study; a resume goes on with it."""

    schema_version: SchemaVersion = 1
    entries: tuple[LoggedTrial, ...] = ()
    stop: Stop | None = None
    """None while the search goes on, or where it was interrupted."""
    seconds: dict[Phase, Seconds] = Field(default_factory=dict)
    """Seconds by phase, over all sessions of the study."""

    @property
    def total_s(self) -> float:
        """Seconds of the whole study."""
        return sum(self.seconds.values())

    @property
    def measuring_share(self) -> float | None:
        """How much of it went into runs of plans and of the baseline; None where it is not known."""
        measured = (self.seconds.get(phase, 0.0) for phase in _MEASURING)
        return sum(measured) / self.total_s if self.seconds else None


class SearchLogWriter:
    """Writes the log of a study."""

    def __init__(self, path: Path) -> None:
        """Goes on with what is there; raises as `read`."""
        self._path = path
        self.log = read(path, SearchLog) if path.exists() else SearchLog()
        self._phases: list[Phase] = []
        self._since = 0.0

    @contextlib.contextmanager
    def spend(self, phase: Phase) -> Iterator[None]:
        """Counts the block's time for a phase, and not for the phase that it interrupts."""
        self._count()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def note(self, trial_number: int, proposal: Proposal) -> None:
        """Writes down what is to run, before it runs."""
        entry = LoggedTrial(trial_number=trial_number, **proposal.model_dump())
        others = (other for other in self.log.entries if other.trial_number != trial_number)
        self._write({"entries": (*others, entry), "stop": None})

    def end(self, stop: Stop) -> None:
        """Writes down why the search ended."""
        self._write({"stop": stop})

    def save(self) -> None:
        """Writes down the time spent so far, where the study has anything to keep."""
        if self._path.exists():
            self._write({})

    def _count(self) -> None:
        now = time.monotonic()
        if self._phases:
            seconds = dict(self.log.seconds)
            seconds[self._phases[-1]] = round(seconds.get(self._phases[-1], 0.0) + now - self._since, 4)
            self.log = self.log.model_copy(update={"seconds": seconds})
        self._since = now

    def _write(self, update: dict[str, object]) -> None:
        self._count()
        self.log = self.log.model_copy(update=update)
        write_durably(self._path, self.log.model_dump_json(exclude_defaults=True, indent=1) + "\n")
