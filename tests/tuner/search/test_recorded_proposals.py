"""The search proposes over recorded runs what it proposed before.

A change of the cost model or of a rule moves it: then it is recorded anew, with the reason, by
`python -m tests.tuner.search.recorded_proposals REASON`.
"""

from __future__ import annotations

import json

import pytest

from tests.tuner.search.recorded_proposals import CASES, RECORDED

CASES_RECORDED = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]


def test_every_case_is_recorded() -> None:
    assert list(CASES_RECORDED) == list(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_proposals_are_those_recorded(name: str) -> None:
    assert CASES[name]() == CASES_RECORDED[name]
