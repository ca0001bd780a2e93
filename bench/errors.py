"""The exception tree, in one place.

PipetuneError
├── UserError            exit 2: bad input; carries the place and the value, says the remedy
│   ├── ConfigError      a YAML file, a flag or a combination of them
│   ├── PlanError        stages, maps and cuts that do not describe the model
│   ├── ModelError       the model cannot be found, read or split
│   └── StudyError       a folder that holds something else, a resume that does not fit
├── NothingFeasibleError exit 3: the work was done and no plan ran
├── StorageError         exit 4: the server that keeps a study's database was lost on the way
└── FleetError           exit 4: workers that die, hang or answer nonsense; carries a Failure
"""

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipetune.bench.record import Failure


class PipetuneError(Exception):
    """Base class of every error that pipetune raises on purpose."""

    exit_code = 4


class UserError(PipetuneError):
    """Something the user gave is wrong; the message names the place, the value and the remedy."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration file, a flag, or a combination of them is wrong."""


class PlanError(UserError):
    """A plan, a device map or a cut does not describe the model."""


class ModelError(UserError):
    """A model cannot be found, read or split."""


class StudyError(UserError):
    """A study folder holds something else, or a resume does not fit what was recorded."""


class NothingFeasibleError(PipetuneError):
    """The search ended and no plan produced a measurement."""

    exit_code = 3


class StorageError(PipetuneError):
    """A study's database was lost on the way; what was measured is kept in the study's folder."""


class FleetError(PipetuneError):
    """The workers failed; `failure` says which stage, when and why."""

    def __init__(self, failure: "Failure") -> None:
        super().__init__(failure.message)
        self.failure = failure


def explain(error: Exception) -> str:
    """What is wrong: the first problem of a value that does not fit, after its dotted key, else the error's own words.

    A `pydantic.ValidationError` is told by what it offers, since commands that need no values import this module too.
    """
    if (problems := getattr(error, "errors", None)) is None:
        return str(error)
    first = problems(include_url=False)[0]
    where, what = ".".join(map(str, first["loc"])), str(first["msg"]).removeprefix("Value error, ")
    if where and isinstance(first["input"], int | float | str):
        what += f" (given: {first['input']!r:.60})"
    return f"{where}: {what}" if where else what


def disk_fault(error: OSError) -> str:
    """What befell which file, and what helps: `/s/search.json: No space left on device; make room there`."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.filename}: {error.strerror or error}{'; make room there' if is_full else ''}"


def harmless(text: str) -> str:
    """Foreign text in its lines: other control characters, which could drive a terminal, become spaces."""
    return "".join(char if char == "\n" or char.isprintable() else " " for char in text)
