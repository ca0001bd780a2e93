"""The command `pipetune`: every error is caught here, once, and becomes a message and an exit code.

0 done, 1 regression, 2 usage or config, 3 nothing feasible, 4 harness or infrastructure fault, 130 interrupted.
Nothing heavy is imported before a command runs.
"""

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

import pipetune

USAGE, FAULT, INTERRUPTED = 2, 4, 130


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits."""
    from pipetune.tuner.cli.streams import prepare_streams

    # Records are very many values and hardly any cycles.
    gc.set_threshold(100_000, 50, 100)
    prepare_streams()
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        from pipetune.tuner.cli.app import app

        code = app(args=list(args) if args is not None else None, prog_name="pipetune", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("pipetune: interrupted")
        return INTERRUPTED
    except Exception as error:
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    """Says what went wrong, in a line where it can be said in one."""
    if isinstance(error, ImportError | AttributeError) and (astray := pipetune.led_astray()):
        _say(f"pipetune: {astray}")
        return USAGE
    from pipetune.bench.errors import PipetuneError, disk_fault, harmless

    if isinstance(error, PipetuneError):
        _say(f"pipetune: {harmless(str(error))}")
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        _say(f"pipetune: {harmless(disk_fault(error))}")
        return USAGE
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
