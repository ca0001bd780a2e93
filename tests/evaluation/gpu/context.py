"""What a section writes to and how long it may take."""

from __future__ import annotations

import time
from pathlib import Path

from pipetune.bench.files import write_durably
from tests.evaluation.gpu.values import Aim, Cell, Section


class Context:
    """A section at work: each row is on disk as soon as it is known."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        """
        Args:
            folder: where results lie; other sections' among them.
            seconds: until whoever started this section ends it.
        """
        self.folder = folder
        self._began = time.monotonic()
        self._deadline = self._began + seconds
        self._section = Section(name=name)
        self._write()

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self._deadline - time.monotonic()

    @property
    def work(self) -> Path:
        """A folder for models and logs, which does not stay."""
        path = self.folder / "work" / self._section.name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def row(self, **cells: Cell) -> None:
        """Adds a row to the section's table."""
        self._section = self._section.model_copy(update={"rows": (*self._section.rows, cells)})
        self._write()

    def aim(self, text: str, is_met: bool, seen: str, *, proves_correctness: bool = False) -> None:
        """Says whether something was reached; what was said of it before no longer counts."""
        aim = Aim(text=text, is_met=is_met, seen=seen, proves_correctness=proves_correctness)
        others = (one for one in self._section.aims if one.text != text)
        self._section = self._section.model_copy(update={"aims": (*others, aim)})
        self._write()

    def note(self, text: str) -> None:
        """Adds what a reader must know."""
        if text not in self._section.notes:
            self._section = self._section.model_copy(update={"notes": (*self._section.notes, text)})
            self._write()

    def end(self, status: str = "done", error: str | None = None) -> None:
        """The section is over."""
        self._section = Section.model_validate({**self._section.model_dump(), "status": status, "error": error})
        self._write()

    def of(self, name: str) -> Section | None:
        """Another section's result, if it has run."""
        return read_section(self.folder, name)

    def _write(self) -> None:
        self._section = self._section.model_copy(update={"seconds": round(time.monotonic() - self._began, 2)})
        path = section_path(self.folder, self._section.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, self._section.model_dump_json(indent=2) + "\n")


class SkippedError(Exception):
    """This machine lacks what a section needs; the message says what."""


def section_path(folder: Path, name: str) -> Path:
    """Where a section's result lies while the check runs."""
    return folder / "work" / f"{name}.json"


def read_section(folder: Path, name: str) -> Section | None:
    """A section's result, or None if it has not begun."""
    path = section_path(folder, name)
    return Section.model_validate_json(path.read_text()) if path.exists() else None
