"""What a plan comes to, and how far over its memory one is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipetune.bench.record import Failure
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.search.space.resolver import identity, overrun
from tests.record_factory import make_plan
from tests.tuner.search.space_factory import MIB, build


def test_overrun_is_graded() -> None:
    def failure(wanted: int | None, had: int | None) -> Failure:
        return Failure(kind="over_memory_cap", message="", bytes_wanted=wanted, bytes_had=had)  # type: ignore[arg-type]

    assert overrun(failure(300, 100)) == pytest.approx(2.0)
    assert overrun(failure(101, 100)) < overrun(failure(150, 100)) < overrun(failure(None, None))


def test_replicas_share_the_prompts_out() -> None:
    *_, resolve = build()
    one, two = resolve(make_plan((17, 13), 4)), resolve(make_plan((30,), 4, replicas=2))
    assert isinstance(one, EffectivePlan)
    assert isinstance(two, EffectivePlan)
    assert (one.in_flight, two.in_flight) == (8, 4)


def test_texts_that_are_scored_need_logits_of_every_position() -> None:
    *_, generate = build(memory=600 * MIB)
    *_, score = build(memory=600 * MIB, kind="score")
    assert isinstance(generate(make_plan((15, 15), 32)), EffectivePlan)
    assert isinstance(score(make_plan((15, 15), 32)), Failure)


def test_refused_plans_have_identities_of_their_own() -> None:
    *_, roomy = build()
    resolve = replace(roomy, device_bytes=dict.fromkeys(roomy.device_bytes, 50 * MIB))
    plans = [make_plan((15, 15), 8), make_plan((15, 15), 16), make_plan((30,), 8, replicas=2)]
    assert len({identity(plan, resolve(plan)) for plan in plans}) == 3
