"""Batches as an engine's scheduler forms them, and when they run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.tuner.planning.simulation.engine_steps import engine_steps, served_steps

ENDLESS = 1 << 30


def test_two_stages_take_turns_where_a_batch_fits_one_step() -> None:
    steps = engine_steps((4, 4), (3, 3), budget=64, most_rows=8, room=ENDLESS, depth=2)
    assert steps.tokens.tolist() == [8, 2, 2]
    assert steps.rows.tolist() == [2, 2, 2]
    # Nothing else is there to be done until the tokens of the step before are known.
    assert steps.awaits.tolist() == [0, 1, 2]


def test_a_smaller_budget_fills_both_stages() -> None:
    steps = engine_steps((4, 4), (3, 3), budget=4, most_rows=8, room=ENDLESS, depth=2)
    assert steps.tokens.tolist() == [4, 4, 1, 1, 1, 1]
    assert steps.awaits.tolist() == [0, 0, 1, 2, 3, 4]
    assert steps.begins.tolist() == [0, 1]
    assert steps.first_tokens.tolist() == [0, 1]
    assert steps.last_tokens.tolist() == [4, 5]


def test_a_long_prompt_is_cut_and_decode_goes_first() -> None:
    steps = engine_steps((2, 7), (4, 1), budget=4, most_rows=8, room=ENDLESS, depth=1)
    assert steps.tokens.tolist() == [4, 4, 3, 1]
    assert steps.rows.tolist() == [2, 2, 2, 1]
    assert steps.first_tokens.tolist() == [0, 2]


def test_no_more_run_at_once_than_rows_and_room_allow() -> None:
    by_rows = engine_steps((2, 2, 2), (2, 2, 2), budget=64, most_rows=2, room=ENDLESS, depth=1)
    by_room = engine_steps((2, 2, 2), (2, 2, 2), budget=64, most_rows=8, room=9, depth=1)
    assert by_rows.begins.tolist() == by_room.begins.tolist() == [0, 0, 2]


lens = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12)


@given(lens, st.integers(1, 64), st.integers(1, 12), st.integers(20, 200), st.integers(1, 4))
def test_every_token_is_computed_once_within_the_limits(
    sizes: list[tuple[int, int]], budget: int, most_rows: int, room: int, depth: int
) -> None:
    prompts, outputs = (tuple(column) for column in zip(*sizes, strict=True))
    steps = engine_steps(prompts, outputs, budget=budget, most_rows=most_rows, room=room, depth=depth)
    # The last token of each is put out, and never computed with.
    assert steps.tokens.sum() == sum(prompts) + sum(outputs) - len(prompts)
    assert steps.tokens.max() <= budget
    assert steps.rows.max() <= most_rows
    assert (steps.rows <= steps.tokens).all()
    assert (steps.begins <= steps.first_tokens).all()
    assert (steps.first_tokens <= steps.last_tokens).all()
    under_way = np.arange(len(steps.awaits)) - steps.awaits
    assert under_way.min() >= 0
    assert under_way.max() < depth


def test_a_timeline_by_hand() -> None:
    steps = engine_steps((4, 4), (2, 2), budget=4, most_rows=8, room=ENDLESS, depth=2)
    busy_s = np.array([[[2.0], [3.0]], [[2.0], [3.0]], [[1.0], [1.0]], [[1.0], [1.0]]])
    timeline = steps.timeline(busy_s, np.array([0.5]), 0.25)
    # First stage: 0.25–2.25, 2.5–4.5; second: 2.75–5.75, 5.75–8.75. Then each step awaits the one two before.
    assert timeline.first_starts_s[:, 0].tolist() == [0.25, 2.5, 6.0, 9.0]
    assert timeline.last_ends_s[:, 0].tolist() == [5.75, 8.75, 9.75, 11.5]
    assert timeline.began_s[:, 0].tolist() == [0.25, 2.75]
    assert timeline.ended_s[:, 0].tolist() == [10.0, 11.5]


def test_requests_that_come_at_once_are_served_as_prompts_given_at_once() -> None:
    lens, limits = ((4, 3), (9, 2), (5, 4)), {"budget": 6, "most_rows": 2, "room": ENDLESS, "depth": 2}
    steps = engine_steps((4, 9, 5), (3, 2, 4), **limits)
    busy_s = np.array([[[0.1 + 0.01 * new], [0.2 + 0.01 * new]] for new in steps.tokens.tolist()])
    timeline = steps.timeline(busy_s, np.array([0.002]), 0.003)
    served = served_steps(
        [(0.0, *own) for own in lens],
        lambda rows, new: (0.1 + 0.01 * new, 0.2 + 0.01 * new),
        hop_s=0.002,
        gap_s=0.003,
        **limits,
    )
    known = timeline.last_ends_s[:, 0]
    assert served.first_s == pytest.approx(known[steps.first_tokens].tolist())
    assert served.last_s == pytest.approx(known[steps.last_tokens].tolist())
    assert served.busy_s == pytest.approx(busy_s.sum(axis=0)[:, 0].tolist())


def test_a_request_waits_for_the_step_under_way_and_for_nobody_where_there_is_none() -> None:
    limits = {"budget": 64, "most_rows": 8, "room": ENDLESS, "depth": 1}
    requests = [(1.0, 8, 2), (1.5, 8, 1), (9.0, 8, 1)]
    served = served_steps(requests, lambda rows, new: (1.0,), hop_s=0.0, gap_s=0.0, **limits)
    # The second one comes while the first is prefilled, and goes along with its second token.
    assert served.first_s == [2.0, 3.0, 10.0]
    assert served.last_s == [3.0, 3.0, 10.0]
    assert served.busy_s == [3.0]
