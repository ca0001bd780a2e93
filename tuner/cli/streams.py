"""Standard output and error whatever they lead to: another encoding, no width, a full disk, a reader who left."""

import io
import os
import re
import sys
from typing import Any

_WIDTH = re.compile(r"[4-9][0-9]|[1-9][0-9]{2}")
"""Columns that a result can be printed in."""


class _Stream(io.FileIO):
    """A descriptor that drops what comes after its first fault, so that a command goes on to its own exit code."""

    _failed = False

    def write(self, data: Any, /) -> int:
        """Writes bytes. A reader who left is no fault, and what nobody can read on stderr stops no work.
        OSError: a result cannot be written; once."""
        if not self._failed:
            try:
                return super().write(data)
            except OSError as error:
                self._failed = True
                if self.name == 1 and not isinstance(error, BrokenPipeError):
                    error.filename = "standard output"
                    raise
        return memoryview(data).nbytes


def prepare_streams() -> None:
    """Makes this process's output one that takes any text; signs that its encoding lacks are replaced."""
    for variable in ("COLUMNS", "TERMINAL_WIDTH"):
        if not _WIDTH.fullmatch(os.environ.get(variable, "")):
            os.environ.pop(variable, None)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        given = getattr(sys, name)
        if given is None:
            # Its descriptor is closed.
            number, given = os.open(os.devnull, os.O_WRONLY), io.StringIO()
        buffer = io.BufferedWriter(_Stream(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(buffer, given.encoding, "replace", line_buffering=given.line_buffering))
