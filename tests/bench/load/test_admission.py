"""The policy under random arrivals and a random machine: every request is served whole, in a row of its own."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import PlanError
from pipetune.bench.load.admission import Admission, Decode, Order, Prefill, Request, Rules, Wait, deal, rules_of
from pipetune.bench.spec import Lane, Plan

REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=40)


@given(st.integers(1, 5), st.none() | st.integers(1, 7), st.integers(0, 20))
def test_every_request_and_every_place_is_one_replicas(replicas: int, places: int | None, count: int) -> None:
    shares = deal(replicas, places)
    assert sorted(number for own, _ in shares for number in range(count)[own]) == list(range(count))
    assert len(shares) == replicas
    if places is not None:
        assert sum(own or 0 for _, own in shares) == places
        assert all(own or not range(count)[share] for share, own in shares)


@st.composite
def rules_of_any_kind(draw: st.DrawFn) -> Rules:
    """With one lane to three, some with slots of their own."""
    limits, whole = sorted(draw(st.sets(st.integers(1, 30), max_size=2))), draw(st.booleans())
    spare, lanes = draw(st.integers(0, 2)), list[Lane]()
    for limit in (*limits, None):
        own = draw(st.none() | st.just(1)) if spare else None
        spare -= own or 0
        lanes.append(
            Lane(
                up_to_tokens=limit,
                prefill_chunk_size=draw(st.none() | st.integers(1, 16)),
                prefill_micro_batch_size=draw(st.none() | st.integers(1, 3)),
                prefills_per_decode=draw(st.none() | st.sampled_from([0.4, 1.0, 2.5])),
                slots=own,
                weight=draw(st.sampled_from([0.5, 1.0, 4.0])),
            )
        )
    return Rules(
        slots=sum(lane.slots or 0 for lane in lanes) + draw(st.integers(1, 2)),
        rows=draw(st.integers(1, 4)),
        prefill_rows=draw(st.integers(1, 4)),
        chunk_size=draw(st.none() | st.integers(1, 16)),
        lanes=tuple(lanes),
        joins=not whole and draw(st.booleans()),
        whole_slots=whole,
    )


RULES = rules_of_any_kind()


def lane_of(rules: Rules, request: Request) -> Lane:
    return next(lane for lane in rules.lanes if lane.up_to_tokens is None or request.prompt_len <= lane.up_to_tokens)


def serve(rules: Rules, wanted: list[tuple[int, int]], seed: int) -> tuple[list[Order], dict[int, int]]:
    """Orders, and tokens that each request got, on a machine where tasks end in order and after random times."""
    source, admission = random.Random(seed), Admission(rules)
    coming = [Request(number=number, prompt_len=length) for number, (length, _) in enumerate(wanted)]
    under_way: list[Prefill | Decode] = []
    orders: list[Order] = []
    tokens: Counter[int] = Counter()
    while coming or len(admission):
        if coming and source.random() < 0.4:
            admission.arrive(coming.pop(0))
        order = admission.decide()
        orders.append(order)
        if not isinstance(order, Wait):
            under_way.append(order)
        elif not coming and not under_way:
            raise AssertionError(f"nothing to wait for: {order}, {len(admission)} requests")
        while under_way and (isinstance(order, Wait) or source.random() < 0.5):
            known = [one for one in under_way.pop(0).together if one.samples]
            for done in known:
                tokens.update(request.number for request in done.requests)
                finished = {one.number for one in done.requests if tokens[one.number] == wanted[one.number][1]}
                if isinstance(done, Prefill):
                    admission.prefilled(done.requests, finished)
                else:
                    admission.decoded(done.slot, finished)
            if known:
                break
    return orders, tokens


def each(orders: list[Order]) -> list[Order]:
    """Orders one by one, those of one forward pass as well."""
    return [one for order in orders for one in ((order,) if isinstance(order, Wait) else order.together)]


@given(RULES, REQUESTS, st.integers(0, 99))
def test_every_request_gets_all_its_tokens_and_no_row_is_used_twice(
    rules: Rules, wanted: list[tuple[int, int]], seed: int
) -> None:
    orders, tokens = serve(rules, wanted, seed)
    assert tokens == {number: count for number, (_, count) in enumerate(wanted)}
    done, seen = Counter[int](), Counter[int]()
    joined: set[int] = set()
    groups: dict[int, set[int]] = {}
    for order in each(orders):
        if isinstance(order, Prefill):
            if rules.whole_slots:
                assert len({request.prompt_len for request in order.requests}) == 1
                if order.first_token == 0:
                    assert all(tokens[number] == seen[number] for number in groups.get(order.slot, ())), "all have left"
                    groups[order.slot] = {request.number for request in order.requests}
            seen.update(request.number for request in order.requests if order.samples)
            assert rules.joins or not order.beside
            (lane,) = {lane_of(rules, request) for request in order.requests}
            assert len(order.requests) <= min(rules.prefill_rows, rules.rows, lane.prefill_micro_batch_size or 9)
            length = max(request.prompt_len for request in order.requests)
            chunk = min(rules.chunk_size or length, lane.prefill_chunk_size or length)
            assert order.end_token - order.first_token == min(chunk, length - order.first_token)
            assert order.samples == (order.end_token == length)
            for request in order.requests:
                assert done[request.number] == order.first_token
                done[request.number] = order.end_token
            lens = [request.prompt_len for request in order.requests]
            padded, starts = order.end_token - order.first_token, [length - own for own in lens]
            own = [len(range(max(order.first_token, start), order.end_token)) for start in starts]
            assert order.tokens == (math.ceil(sum(own) / len(own)) if rules.joins else padded)
            assert rules.joins or sum(lens) >= 0.75 * length * len(lens)
        elif isinstance(order, Decode):
            numbers = [request.number for request in order.requests]
            seen.update(numbers)
            assert order.rows == len(groups[order.slot] if rules.whole_slots else numbers)
            assert not rules.whole_slots or set(numbers) <= groups[order.slot]
            if any(lane_of(rules, request).slots for request in order.requests):
                assert len({lane_of(rules, request) for request in order.requests}) == 1, "a slot of one lane's own"
            assert len(set(numbers)) == len(numbers) <= rules.rows
            assert {request.number for request in order.joined} <= set(numbers)
            assert not joined & {request.number for request in order.joined}
            joined |= {request.number for request in order.joined}
            assert set(numbers) <= joined


@given(RULES, REQUESTS, st.integers(0, 99))
def test_of_each_lane_the_one_that_waited_longest_is_in_the_next_prefill(
    rules: Rules, wanted: list[tuple[int, int]], seed: int
) -> None:
    orders, _ = serve(rules, wanted, seed)
    begun = [order.requests for order in orders if isinstance(order, Prefill) and not order.first_token]
    for lane in rules.lanes:
        groups = [[one.number for one in group] for group in begun if lane_of(rules, group[0]) == lane]
        left = sorted(itertools.chain(*groups))
        for numbers in groups:
            assert numbers == sorted(numbers)
            assert numbers[0] == left[0]
            left = [number for number in left if number not in numbers]


SHORT_FIRST = (Lane(up_to_tokens=8, weight=4), Lane())


@pytest.mark.parametrize("weight", [1, 4, 32])
def test_no_stream_of_short_prompts_keeps_a_long_one_waiting(weight: int) -> None:
    admission = order_of(slots=1, rows=2, chunk_size=10, lanes=(Lane(up_to_tokens=8, weight=weight), Lane()))
    admission.arrive(Request(number=0, prompt_len=40))
    tokens = {"short": 0, "long": 0}
    for number in range(1, 1000):
        admission.arrive(Request(number=number, prompt_len=5))
        order = admission.decide()
        assert isinstance(order, Prefill | Decode)
        if isinstance(order, Prefill):
            tokens["long" if order.requests[0].number == 0 else "short"] += order.end_token - order.first_token
        finished = {one.number for one in order.requests if one.number}
        if isinstance(order, Decode):
            admission.decoded(order.slot, finished)
        elif order.samples:
            admission.prefilled(order.requests, finished)
        if tokens["long"] == 40:
            break
    # While both wait, either has its weight's share, to a task.
    assert abs(tokens["short"] / weight - 30) <= 10 + 5 / weight


def order_of(**rules: Any) -> Admission:
    return Admission(Rules(**{"slots": 2, "rows": 2, "prefill_rows": 1} | rules))


@pytest.mark.parametrize(
    ("most", "expected"), [(0.5, "PDDPDDDDP"), (1, "PPDPD"), (2, "PPPDP"), (2.5, "PPPDP"), (None, "PPPPP")]
)
def test_prefills_go_between_two_steps_of_a_slot_as_often_as_the_rules_let_them(
    most: float | None, expected: str
) -> None:
    admission = order_of(slots=4, rows=4, lanes=(Lane(prefills_per_decode=most),))
    for number in range(9):
        admission.arrive(Request(number=number, prompt_len=4))
    found = ""
    while len(found) < len(expected):
        order = admission.decide()
        found += type(order).__name__[0]
        if isinstance(order, Prefill):
            admission.prefilled(order.requests)
        elif isinstance(order, Decode):
            admission.decoded(order.slot)
    assert found == expected


def test_a_step_goes_with_each_prefill_where_one_pass_takes_both() -> None:
    admission = order_of(slots=1, rows=4, prefill_rows=2, chunk_size=6, joins=True)
    found = []
    for number, prompt_len in enumerate((9, 4, 2, 3)):
        admission.arrive(Request(number=number, prompt_len=prompt_len))
        order = admission.decide()
        assert not isinstance(order, Wait)
        found.append([(type(one).__name__[0], [request.number for request in one.requests]) for one in order.together])
        for one in order.together:
            if isinstance(one, Prefill) and one.samples:
                admission.prefilled(one.requests)
            elif isinstance(one, Decode):
                admission.decoded(one.slot)
    # The second chunk of a prompt of nine; then two of unlike lengths, and a step of the first beside them.
    assert found == [[("P", [0])], [("P", [0])], [("P", [1, 2]), ("D", [0])], [("P", [3]), ("D", [0, 1, 2])]]


def test_prompts_gather_while_steps_go_before_the_next_prefill() -> None:
    admission = order_of(slots=1, rows=4, prefill_rows=4, lanes=(Lane(prefills_per_decode=0.5),))
    together = []
    for number in range(7):
        admission.arrive(Request(number=number, prompt_len=4))
        order = admission.decide()
        if isinstance(order, Prefill):
            together.append([one.number for one in order.requests])
            admission.prefilled(order.requests)
        elif isinstance(order, Decode):
            admission.decoded(0, [one.number for one in order.requests[1:]])
    assert together == [[0], [1, 2, 3], [4, 5, 6]]


def test_prompts_of_about_one_length_are_prefilled_together_wherever_they_stand() -> None:
    admission = order_of(rows=8, prefill_rows=3)
    for number, prompt_len in enumerate((40, 10, 40, 30, 10, 9)):
        admission.arrive(Request(number=number, prompt_len=prompt_len))
    found = []
    while isinstance(order := admission.decide(), Prefill):
        found.append([one.number for one in order.requests])
    assert found == [[0, 2, 3], [1, 4, 5]]


def test_a_short_prompt_goes_between_the_chunks_of_a_long_one() -> None:
    for lanes, numbers in (((Lane(),), [0, 0, 0, 1]), (SHORT_FIRST, [0, 1, 0, 0])):
        admission = order_of(chunk_size=10, lanes=lanes)
        admission.arrive(Request(number=0, prompt_len=30))
        orders = [admission.decide()]
        admission.arrive(Request(number=1, prompt_len=8))
        orders += [admission.decide() for _ in range(3)]
        assert [one.requests[0].number for one in orders if isinstance(one, Prefill)] == numbers


def test_a_short_request_does_not_wait_in_an_empty_slot_for_a_long_one() -> None:
    admission = order_of(slots=1, chunk_size=10, lanes=SHORT_FIRST)
    admission.arrive(Request(number=0, prompt_len=30))
    admission.decide()
    admission.arrive(Request(number=1, prompt_len=5))
    order = admission.decide()
    assert isinstance(order, Prefill)
    admission.prefilled(order.requests)
    orders = [admission.decide() for _ in range(3)]
    assert [type(one) for one in orders] == [Prefill, Prefill, Decode]
    assert isinstance(orders[2], Decode)
    assert [one.number for one in orders[2].requests] == [1]


def test_it_says_why_it_waits() -> None:
    admission = order_of(slots=1, rows=1)
    assert admission.decide() == Wait("empty")
    admission.arrive(Request(number=0, prompt_len=4))
    order = admission.decide()
    assert isinstance(order, Prefill)
    assert admission.decide() == Wait("underfilled")
    admission.arrive(Request(number=1, prompt_len=4))
    assert admission.decide() == Wait("blocked")
    assert admission.cancel(1)
    assert not admission.cancel(0)
    assert admission.decide() == Wait("underfilled")
    admission.prefilled(order.requests, {0})
    assert admission.decide() == Wait("empty")


def test_a_rule_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rows=0: must be at least 1"):
        Rules(slots=1, rows=0, prefill_rows=1)
    plan = Plan.from_layer_counts((4,), ("cpu:0",), 2).model_copy(
        update={"lanes": (Lane(up_to_tokens=9, slots=2), Lane())}
    )
    with pytest.raises(PlanError, match=r"plan\.lanes: slots=2: these lanes need 3"):
        rules_of(plan, 2, joins=False, whole_slots=False)
    own = rules_of(plan, 3, joins=False, whole_slots=True)
    assert (own.lanes, own.joins, own.whole_slots) == (plan.lanes, False, True)
