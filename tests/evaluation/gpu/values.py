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
        """Whether something is broken, or correctness was not shown to the end: an aim of speed alone may be missed."""
        proves = self.name in ("memory", "timing") or self.name.startswith("equality")
        unfinished = proves and self.status in ("running", "out of time")
        missed = any(aim.proves_correctness and not aim.is_met for aim in self.aims)
        return self.status == "failed" or unfinished or missed


class Report(Value):
    """The whole check."""

    started_at: str
    """UTC, ISO 8601."""
    wall_s: float = 0.0
    machine: Machine
    sections: tuple[Section, ...] = ()
