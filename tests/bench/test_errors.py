"""Every error knows its exit code, and the tree drawn in the docstring is the tree in the code."""

from __future__ import annotations

import errno
import os
import re

import pytest

from pipetune.bench import errors
from pipetune.bench.record import Failure, FailureKind


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (errors.PipetuneError, 4),
        (errors.UserError, 2),
        (errors.ConfigError, 2),
        (errors.PlanError, 2),
        (errors.ModelError, 2),
        (errors.StudyError, 2),
        (errors.NothingFeasibleError, 3),
        (errors.FleetError, 4),
    ],
)
def test_exit_codes(error: type[errors.PipetuneError], exit_code: int) -> None:
    assert error.exit_code == exit_code


def test_docstring_names_every_error_with_its_exit_code() -> None:
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.PipetuneError)
    ]
    drawn = re.findall(r"(\w+Error)\b", errors.__doc__ or "")
    assert sorted(drawn) == sorted(error.__name__ for error in classes)
    for name, code in re.findall(r"(\w+Error) +exit (\d)", errors.__doc__ or ""):
        assert getattr(errors, name).exit_code == int(code)


def test_fleet_error_carries_its_failure() -> None:
    failure = Failure(kind=FailureKind.WORKER_DIED, message="the worker of stage 1 died", stage=1)
    error = errors.FleetError(failure)
    assert error.failure is failure
    assert str(error) == "the worker of stage 1 died"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_spent_quota_name_the_file_and_what_helps(number: int) -> None:
    fault = errors.disk_fault(OSError(number, os.strerror(number), "/s/search.json"))
    assert fault == f"/s/search.json: {os.strerror(number)}; make room there"
