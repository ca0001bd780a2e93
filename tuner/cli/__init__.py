"""The command `pipetune`: every error is caught here, once, and becomes a message and an exit code.

0 done, 1 regression, 2 usage or config, 3 nothing feasible, 4 harness or infrastructure fault, 130 interrupted.
Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

USAGE, FAULT, INTERRUPTED = 2, 4, 130


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits."""
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    from pipetune.tuner.cli.app import app

    try:
        code = app(args=list(args) if args is not None else None, prog_name="pipetune", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("pipetune: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter shall not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    """Says what went wrong, in a line where it can be said in one."""
    from pipetune.bench.errors import PipetuneError

    if isinstance(error, PipetuneError):
        _say(f"pipetune: {error}")
        return error.exit_code
    show = getattr(error, "show", None)
    if callable(show) and hasattr(error, "format_message"):
        # Usage errors of the command line parser, which knows best how to say them.
        show(file=sys.stderr)
        return USAGE
    handle, path = tempfile.mkstemp(prefix="pipetune-error-", suffix=".txt")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    _say(f"pipetune: an error that nobody foresaw: {type(error).__name__}: {error}\nIts traceback is in {path}.")
    return FAULT


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
