"""What all harnesses share: the checkout's modules as processes, exit codes, progress, and tables in documents."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pipetune.bench.errors import ConfigError, PipetuneError
from pipetune.bench.files import write_durably
from tests.prose import wrapped

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


def module_command(module: str, *arguments: str) -> list[str]:
    """A module of this checkout as a process of its own, whatever lies in the current directory.

    It is found by way of `findable`.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def findable(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment whose Python finds this checkout first, installed or not."""
    given = environment.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(ROOT), *(part for part in given if part and part != str(ROOT))]
    return {**environment, "PYTHONPATH": os.pathsep.join(path)}


def exit_code_of(work: Callable[[], int]) -> int:
    """A harness's whole work; errors of users are one line and the error's own code, an interruption is 130.

    Workers that it starts find this checkout as well.
    """
    os.environ.update(findable(os.environ))
    try:
        return work()
    except PipetuneError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with what is there")
        return 130


def say(text: str) -> None:
    """A line of progress, with the time of day."""
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stderr.flush()


def begin_mark(command: str) -> str:
    """`<!-- bench-search: begin, written by `make bench-search` -->`."""
    return f"<!-- {command}: begin, written by `make {command}` -->"


def end_mark(command: str) -> str:
    """`<!-- bench-search: end -->`."""
    return f"<!-- {command}: end -->"


def put_between_marks(path: Path, command: str, text: str) -> None:
    """Replaces what stands between a command's marks, and leaves the rest alone; raises as `around_marks`."""
    before, after = around_marks(path, command)
    begin, end = begin_mark(command), end_mark(command)
    write_durably(path, f"{before}{begin}\n\n{wrapped(text.strip())}\n\n{end}{after}")


def around_marks(path: Path, command: str) -> tuple[str, str]:
    """What stands before and behind a command's marks.

    Raises:
        ConfigError: the document is missing or lacks the marks, in this order.
    """
    begin, end = begin_mark(command), end_mark(command)
    try:
        before, begun, rest = path.read_text(encoding="utf-8").partition(begin)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give another with --docs") from error
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ConfigError(f"{path}: has no lines {begin} and {end}; add them where the table belongs")
    return before, after
