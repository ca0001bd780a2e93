"""What looks may spend adds up, and none says OK that could not have said FAIL."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipetune.tuner.stats.signed_rank import FALSE_ALARM, MISSED, PAIRS, least_p, looks_for


@given(st.integers(1, 200))
def test_all_looks_at_all_hypotheses_spend_no_more_than_the_gate_has(hypotheses: int) -> None:
    looks = looks_for(hypotheses)
    assert tuple(look.pairs for look in looks) == PAIRS
    spent = sum(look.alpha_fail for look in looks if look.can_fail)
    assert hypotheses * spent <= FALSE_ALARM * (1 + 1e-12)
    assert sum(look.alpha_ok for look in looks) <= MISSED * (1 + 1e-12)


@given(st.integers(1, 200))
def test_a_look_that_cannot_fail_cannot_say_ok(hypotheses: int) -> None:
    for look in looks_for(hypotheses):
        assert look.can_fail == (least_p(look.pairs) <= look.alpha_fail)
        assert bool(look.alpha_ok) == look.can_fail


def test_one_hypothesis_is_looked_at_from_eight_pairs_and_many_from_twelve() -> None:
    assert [look.can_fail for look in looks_for(1)] == [True] * 4
    assert [look.can_fail for look in looks_for(12)] == [False, True, True, True]


def test_what_a_look_cannot_use_goes_to_the_next() -> None:
    assert looks_for(12)[1].alpha_fail == 0.6 * FALSE_ALARM / 12
