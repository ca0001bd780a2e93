"""The policy under random arrivals and a random machine: every request is served whole, in a row of its own."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.load.admission import Admission, Decode, Order, Prefill, Request, Rules, Wait

REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=40)
RULES = st.builds(
    Rules,
    slots=st.integers(1, 3),
    rows=st.integers(1, 4),
    prefill_rows=st.integers(1, 4),
    chunk_size=st.none() | st.integers(1, 16),
    prefills_per_decode=st.none() | st.integers(1, 3),
    order=st.sampled_from(["fcfs", "shortest"]),
)


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
            done = under_way.pop(0)
            if isinstance(done, Prefill) and not done.samples:
                continue
            tokens.update(request.number for request in done.requests)
            finished = {one.number for one in done.requests if tokens[one.number] == wanted[one.number][1]}
            if isinstance(done, Prefill):
                admission.prefilled(done.requests, finished)
            else:
                admission.decoded(done.slot, finished)
            break
    return orders, tokens


@given(RULES, REQUESTS, st.integers(0, 99))
def test_every_request_gets_all_its_tokens_and_no_row_is_used_twice(
    rules: Rules, wanted: list[tuple[int, int]], seed: int
) -> None:
    orders, tokens = serve(rules, wanted, seed)
    assert tokens == {number: count for number, (_, count) in enumerate(wanted)}
    done: Counter[int] = Counter()
    joined: set[int] = set()
    for order in orders:
        if isinstance(order, Prefill):
            assert len(order.requests) <= min(rules.prefill_rows, rules.rows)
            length = max(request.prompt_len for request in order.requests)
            assert order.end_token - order.first_token == min(rules.chunk_size or length, length - order.first_token)
            assert order.samples == (order.end_token == length)
            for request in order.requests:
                assert done[request.number] == order.first_token
                done[request.number] = order.end_token
            assert sum(request.prompt_len for request in order.requests) >= 0.75 * length * len(order.requests)
        elif isinstance(order, Decode):
            numbers = [request.number for request in order.requests]
            assert len(set(numbers)) == len(numbers) <= rules.rows
            assert {request.number for request in order.joined} <= set(numbers)
            assert not joined & {request.number for request in order.joined}
            joined |= {request.number for request in order.joined}
            assert set(numbers) <= joined


@given(RULES, REQUESTS, st.integers(0, 99))
def test_what_came_first_is_begun_first_unless_the_shortest_is(
    rules: Rules, wanted: list[tuple[int, int]], seed: int
) -> None:
    orders, _ = serve(rules, wanted, seed)
    begun = [
        one.number for order in orders if isinstance(order, Prefill) and not order.first_token for one in order.requests
    ]
    if rules.order == "fcfs":
        assert begun == sorted(begun)
    overtaken = Counter(
        early for place, late in enumerate(begun) for early in range(late) if early not in begun[:place]
    )
    assert max(overtaken.values(), default=0) <= 64 + rules.rows


def order_of(**rules: Any) -> Admission:
    return Admission(Rules(**{"slots": 2, "rows": 2, "prefill_rows": 1} | rules))


@pytest.mark.parametrize(("most", "expected"), [(1, "PDPDP"), (2, "PPDPP"), (None, "PPPPP")])
def test_prefills_go_before_a_ready_step_as_often_as_the_rules_let_them(most: int | None, expected: str) -> None:
    admission = order_of(slots=4, rows=4, prefills_per_decode=most)
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


def test_a_short_prompt_goes_between_the_chunks_of_a_long_one() -> None:
    for order, numbers in (("fcfs", [0, 0, 0, 1]), ("shortest", [0, 1, 0, 0])):
        admission = order_of(chunk_size=10, order=order)
        admission.arrive(Request(number=0, prompt_len=30))
        orders = [admission.decide()]
        admission.arrive(Request(number=1, prompt_len=8))
        orders += [admission.decide() for _ in range(3)]
        assert [one.requests[0].number for one in orders if isinstance(one, Prefill)] == numbers


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
