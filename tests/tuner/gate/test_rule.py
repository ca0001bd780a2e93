"""From differences to verdicts: what fails, what passes, what is left open, and what ends a comparison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.rule import judge
from pipetune.tuner.gate.values import Finding, Pair, Reason, Sample, Verdict, verdict_of
from pipetune.tuner.stats.signed_rank import looks_for
from tests.tuner.gate.factory import make_case, make_pairs, make_sample

METRIC = "mean_ttft_ms"
ONE, TWELVE = looks_for(1), looks_for(12)


def noise(count: int, sd: float = 0.01, seed: int = 0) -> list[float]:
    return [float(one) for one in np.random.default_rng(seed).normal(0.0, sd, count)]


def found(pairs: list[Pair], looks: Any = ONE, **options: Any) -> Finding:
    finding = judge(make_case(), METRIC, pairs, looks, **options)
    assert finding is not None
    return finding


def test_a_candidate_that_is_clearly_worse_fails_at_the_first_look() -> None:
    finding = found(make_pairs([0.1 + one for one in noise(8)]))
    assert (finding.verdict, finding.reason, finding.pairs) == (Verdict.FAIL, Reason.WORSE, 8)
    assert finding.estimate == pytest.approx(math.expm1(0.1), abs=0.01)
    assert finding.interval is not None
    assert finding.estimate is not None
    assert finding.interval[0] < finding.estimate < finding.interval[1]


def test_equal_sides_pass_at_the_first_look() -> None:
    finding = found(make_pairs(noise(8)))
    assert (finding.verdict, finding.reason, finding.pairs) == (Verdict.OK, Reason.WITHIN_MARGIN, 8)


def test_throughput_is_worse_when_it_is_less() -> None:
    case = make_case(metrics={"output_throughput": Tolerance()})
    slower = make_pairs([-0.1 + one for one in noise(8)], "output_throughput")
    finding = judge(case, "output_throughput", slower, ONE)
    assert finding is not None
    assert finding.verdict is Verdict.FAIL
    assert finding.estimate is not None
    assert finding.estimate > 0.05


def test_fail_goes_before_ok_where_both_hold() -> None:
    finding = found(make_pairs([0.03 + one for one in noise(8, 0.001)]))
    look = finding.looks[-1]
    assert look.p_fail <= look.alpha_fail
    assert look.p_ok <= look.alpha_ok
    assert finding.verdict is Verdict.FAIL


def test_a_sure_difference_below_the_least_effect_passes() -> None:
    finding = found(make_pairs([0.01 + one for one in noise(8, 0.001)]))
    assert finding.looks[-1].p_fail <= finding.looks[-1].alpha_fail
    assert finding.verdict is Verdict.OK


def test_memory_that_is_always_the_same_is_decided_exactly() -> None:
    assert found(make_pairs([0.0] * 8)).verdict is Verdict.OK
    assert found(make_pairs([math.log(1.03)] * 8)).verdict is Verdict.FAIL
    assert found(make_pairs([math.log(1.01)] * 8)).verdict is Verdict.OK


def test_fewer_pairs_than_the_first_look_leave_it_open() -> None:
    assert judge(make_case(), METRIC, make_pairs(noise(7)), ONE) is None


def test_a_look_that_could_not_have_failed_does_not_pass_either() -> None:
    assert judge(make_case(), METRIC, make_pairs(noise(8)), TWELVE) is None
    assert found(make_pairs(noise(12)), TWELVE).verdict is Verdict.OK


def test_what_was_decided_stays_decided_whatever_comes_later() -> None:
    early = noise(8)
    finding = found(make_pairs([*early, *([0.5] * 16)]))
    assert (finding.verdict, finding.pairs) == (Verdict.OK, 8)
    assert len(finding.differences) == 24


KINDS = st.sampled_from(["good"] * 12 + ["failed", "nan", "missing", "shaky", "elsewhere"])
STORIES = st.lists(st.tuples(KINDS, st.floats(-0.2, 0.2)), max_size=26)


def pair_of(number: int, kind: str, difference: float) -> Pair:
    pair = make_pairs([difference])[0]
    metrics = dict(pair.candidate.metrics)
    candidate = {
        "good": pair.candidate,
        "failed": make_sample(),
        "nan": make_sample({METRIC: math.nan}),
        "missing": make_sample({"other": 1.0}),
        "shaky": make_sample(metrics, steady=False),
        "elsewhere": make_sample(metrics, hardware_id="another"),
    }[kind]
    return pair.model_copy(update={"number": number, "candidate": candidate})


@given(STORIES, st.floats(-0.1, 0.1), st.integers(1, 12))
def test_what_was_decided_after_some_pairs_is_what_all_pairs_say(
    story: list[tuple[str, float]], shift: float, hypotheses: int
) -> None:
    looks = looks_for(hypotheses)
    pairs = [pair_of(number, kind, shift + one / 10) for number, (kind, one) in enumerate(story)]
    decided = None
    for count in range(len(pairs) + 1):
        finding = judge(make_case(), METRIC, pairs[:count], looks)
        if decided is None:
            decided = finding
        else:
            assert finding is not None
            assert (finding.reason, finding.pairs, finding.looks) == (decided.reason, decided.pairs, decided.looks)
    if decided is not None and decided.verdict is Verdict.OK:
        look = next(look for look in looks if look.pairs == decided.pairs)
        assert look.can_fail


@given(st.lists(st.floats(-0.1, 0.1), min_size=24, max_size=24))
def test_both_directions_never_fail_together(differences: list[float]) -> None:
    there = found(make_pairs(differences))
    back = found(make_pairs([-one for one in differences]))
    assert (there.verdict, back.verdict) != (Verdict.FAIL, Verdict.FAIL)


def test_pairs_that_are_used_up_are_inconclusive_and_say_so() -> None:
    finding = found(make_pairs([0.03 + one for one in noise(24, 0.06, seed=3)]))
    assert (finding.verdict, finding.reason) == (Verdict.INCONCLUSIVE, Reason.NOT_TOLD)
    assert len(finding.looks) == 4


def test_a_noise_floor_above_the_margin_is_an_unfit_machine() -> None:
    finding = found(make_pairs(noise(24, 0.25)))
    assert (finding.verdict, finding.reason) == (Verdict.INCONCLUSIVE, Reason.UNFIT_MACHINE)
    assert finding.floor is not None
    assert finding.floor > finding.margin


def test_a_known_noise_floor_lifts_what_fails() -> None:
    pairs = make_pairs([0.03 + one for one in noise(24, 0.001)])
    finding = judge(make_case(noise_floor=0.04), METRIC, pairs, ONE)
    assert finding is not None
    assert finding.verdict is Verdict.OK


def test_time_that_is_up_is_inconclusive() -> None:
    finding = found(make_pairs(noise(5)), because=Reason.OUT_OF_TIME)
    assert (finding.verdict, finding.reason) == (Verdict.INCONCLUSIVE, Reason.OUT_OF_TIME)
    assert "--max-minutes" in finding.text


def replaced(pairs: list[Pair], **sides: Sample) -> list[Pair]:
    return [*pairs[:-1], pairs[-1].model_copy(update=sides)]


GOOD = {METRIC: 100.0}


@pytest.mark.parametrize(
    ("sides", "verdict", "reason"),
    [
        ({"candidate": make_sample()}, Verdict.FAIL, Reason.CANDIDATE_FAILED),
        ({"baseline": make_sample()}, Verdict.INCONCLUSIVE, Reason.BASELINE_FAILED),
        ({"baseline": make_sample(), "candidate": make_sample()}, Verdict.INCONCLUSIVE, Reason.BASELINE_FAILED),
        ({"candidate": make_sample({"other": 1.0})}, Verdict.INCONCLUSIVE, Reason.MISSING_METRIC),
        ({"baseline": make_sample({METRIC: math.nan})}, Verdict.INCONCLUSIVE, Reason.NOT_FINITE),
        ({"candidate": make_sample({METRIC: math.inf})}, Verdict.INCONCLUSIVE, Reason.NOT_FINITE),
        ({"candidate": make_sample({METRIC: 0.0})}, Verdict.INCONCLUSIVE, Reason.NOT_FINITE),
        ({"candidate": make_sample(GOOD, hardware_id="xyz")}, Verdict.INCONCLUSIVE, Reason.OTHER_HARDWARE),
        ({"baseline": make_sample(GOOD, hardware_id=None)}, Verdict.INCONCLUSIVE, Reason.OTHER_HARDWARE),
        (
            {"candidate": make_sample({}, not_comparable="its GPU was taken")},
            Verdict.INCONCLUSIVE,
            Reason.NOT_COMPARABLE,
        ),
    ],
)
def test_one_broken_run_ends_it_even_among_good_ones(
    sides: dict[str, Sample], verdict: Verdict, reason: Reason
) -> None:
    finding = found(replaced(make_pairs(noise(8)), **sides))
    assert (finding.verdict, finding.reason) == (verdict, reason)
    assert finding.text.startswith("pair 8, ")


def test_hardware_that_changes_within_a_side_ends_it_and_another_digest_of_the_other_side_does_not() -> None:
    def recorded(pair: Pair, baseline: str, candidate: str) -> Pair:
        sides = {"baseline": (pair.baseline, baseline), "candidate": (pair.candidate, candidate)}
        return pair.model_copy(
            update={name: run.model_copy(update={"recorded_hardware_id": one}) for name, (run, one) in sides.items()}
        )

    pairs = [recorded(pair, "by old digests", "by ours") for pair in make_pairs(noise(8))]
    assert found(pairs).verdict is Verdict.OK
    moved = found([*pairs[:-1], recorded(pairs[-1], "by old digests", "by ours, with a card less")])
    assert (moved.verdict, moved.reason) == (Verdict.INCONCLUSIVE, Reason.OTHER_HARDWARE)
    assert moved.text.startswith("pair 8, candidate: ")


def test_a_side_that_never_gets_steady_is_inconclusive_though_its_numbers_look_good() -> None:
    pairs = make_pairs(noise(24))
    shaken = [
        pair.model_copy(update={"candidate": make_sample(dict(pair.candidate.metrics), steady=index % 2 == 0)})
        for index, pair in enumerate(pairs)
    ]
    finding = found(shaken)
    assert (finding.verdict, finding.reason) == (Verdict.INCONCLUSIVE, Reason.NEVER_STEADY)
    assert "12 of 24 runs of the candidate" in finding.text


def test_a_gate_is_as_bad_as_its_worst_finding_and_never_ok_of_nothing() -> None:
    ok, fail, unsure = (
        found(make_pairs(noise(8))),
        found(make_pairs([0.1 + one for one in noise(8)])),
        found(make_pairs(noise(5)), because=Reason.OUT_OF_TIME),
    )
    assert verdict_of((ok, ok)) is Verdict.OK
    assert verdict_of((ok, unsure)) is Verdict.INCONCLUSIVE
    assert verdict_of((unsure, fail, ok)) is Verdict.FAIL
    assert verdict_of(()) is Verdict.INCONCLUSIVE
