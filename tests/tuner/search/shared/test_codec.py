"""Records on their way between processes: whole, with the reader's names for devices, and nothing else changed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import StudyError
from pipetune.bench.record import FailureKind
from pipetune.tuner.search.shared.shared_study import pack, unpack
from tests.record_factory import make_failure, make_measurement, make_plan, make_record

PACKED = pack(make_record(0, "trial", make_plan(), make_failure()))
HERE = ("cpu:0", "cpu:1", "cpu:2", "cpu:3")


@given(st.permutations(HERE))
def test_there_and_back_is_the_same_record(there: list[str]) -> None:
    plan = make_plan((10, 20), 8, replicas=2)
    record = make_record(3, "trial", plan, make_measurement(plan), trial_number=1)
    moved = unpack(pack(record), theirs=HERE, ours=there)
    assert moved.spec is not None
    assert moved.spec.plan.devices == tuple(there)
    assert unpack(pack(moved), theirs=there, ours=HERE) == record


def test_every_mention_is_renamed_but_logs_and_where_it_really_ran() -> None:
    failure = make_failure(FailureKind.OUT_OF_MEMORY).model_copy(
        update={"message": "stage 1 on cpu:1, not cpu:11", "device": "cpu:1", "detail": "cpu:1 said"}
    )
    record = make_record(0, "trial", make_plan(), failure).model_copy(update={"source_devices": ("cpu:1", "cpu:0")})
    moved = unpack(pack(record), theirs=HERE[:2], ours=("cpu:4", "cpu:5"))
    assert moved.result.outcome == "failure"
    assert moved.result.message == "stage 1 on cpu:5, not cpu:11"
    assert (moved.result.device, moved.result.detail) == ("cpu:5", "cpu:1 said")
    assert moved.source_devices == ("cpu:1", "cpu:0")


@pytest.mark.parametrize(
    "text", ["", "!!", "eJyrBQAAewB7", pack(make_record(0, "trial", make_plan(), make_failure()))[:-9]]
)
def test_what_is_no_record_is_an_error_that_says_so(text: str) -> None:
    with pytest.raises(StudyError, match="all of them need the same version of pipetune"):
        unpack(text, theirs=HERE, ours=HERE)


def test_names_may_change_places() -> None:
    for ours in itertools.permutations(HERE[:2]):
        record = make_record(0, "trial", make_plan(), make_failure())
        moved = unpack(pack(record), theirs=HERE[:2], ours=ours)
        assert moved.effective is not None
        assert moved.effective.plan.devices == ours
