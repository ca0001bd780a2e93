"""What the check of a GPU machine found: sections of rows, aims met and missed."""

from __future__ import annotations

from typing import Literal

from pipetune.bench.record import Machine
from pipetune.bench.spec import Value

Cell = str | int | float | bool | None
Status = Literal["running", "done", "failed", "skipped", "out of time"]


class Aim(Value):
    """Something that was to be reached."""

    text: str
    is_met: bool
    seen: str
    """What was reached, in words."""
    proves_correctness: bool = False
    """Missing it is an error, and not a slow machine."""


class Section(Value):
    """One part of the check, written after each row, so that nothing is lost with what comes behind it."""

    name: str
    status: Status = "running"
    seconds: float = 0.0
    rows: tuple[dict[str, Cell], ...] = ()
    aims: tuple[Aim, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None
    """Why it failed or did not run."""

    @property
    def is_wrong(self) -> bool:
        """Whether something is broken: an aim of speed alone may be missed."""
        return self.status == "failed" or any(aim.proves_correctness and not aim.is_met for aim in self.aims)


class Report(Value):
    """The whole check."""

    started_at: str
    """UTC, ISO 8601."""
    wall_s: float = 0.0
    machine: Machine
    sections: tuple[Section, ...] = ()
