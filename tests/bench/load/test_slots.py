"""What stages are told to copy and run, against a memory whose cells say which token of which request they hold."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.load.admission import Admission, Decode, Prefill, Request, Rules, Wait
from pipetune.bench.load.slots import Edit, Slots, Task
from tests.bench.load.test_admission import RULES

Cell = tuple[int, int] | None
"""Request and position; None for padding, and for what was never written."""


@dataclass
class Memory:
    """Caches of cells, and the copies made in them by kind."""

    rules: Rules
    max_len: int
    prompt_len: int
    kinds: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        slots, staged = self.rules.slots, 0 if self.rules.whole_slots else self.rules.slots + 1
        sizes = [(self.rules.rows, self.max_len)] * slots + [(self.rules.prefill_rows, self.prompt_len)] * staged
        self.caches: list[list[list[Cell]]] = [[[None] * length for _ in range(rows)] for rows, length in sizes]

    def copy(self, edit: Edit) -> None:
        self.kinds.add(
            "join"
            if edit.source != edit.target
            else "move"
            if edit.first == edit.to_first
            else "shift" + ("-left" if edit.to_first < edit.first else "-right")
        )
        rows = self.caches[edit.source][edit.first_row : edit.first_row + edit.num_rows]
        held = [row[edit.first : edit.end] for row in rows]
        assert min(edit.to_first, edit.first) >= 0
        for offset, cells in enumerate(held):
            target = self.caches[edit.target][edit.to_row + offset]
            assert edit.to_first + len(cells) <= len(target)
            target[edit.to_first : edit.to_first + len(cells)] = cells

    def run(self, task: Task, numbers: dict[bool, list[int]], tokens: dict[int, list[int]]) -> None:
        """Checks that each row holds all of its request's positions behind its padding, and writes the new ones; whose
        they are is given for rows of slots and for those of prompts."""
        assert task.ids is not None
        ids = list(task.ids)
        for part in task.parts:
            for row, start in enumerate(part.starts, start=part.first):
                number = numbers[part.cache < self.rules.slots][row]
                cells = self.caches[part.cache][row]
                end = part.past + part.tokens
                for place in range(part.past, end):
                    token, position = ids.pop(0), place - start
                    if position >= 0:
                        assert token == tokens[number][position], "the token that stands there"
                    cells[part.base + place] = (number, position) if position >= 0 else None
                held = cells[part.base + min(start, end) : part.base + end]
                assert held == [(number, position) for position in range(end - start)]
        assert not ids
        assert self.rules.joins or len(task.parts) == 1


@given(RULES, st.integers(0, 8), st.integers(0, 10**6))
def test_every_task_finds_all_positions_of_its_requests(rules: Rules, slack: int, seed: int) -> None:
    run(rules, slack, seed)


def run(rules: Rules, slack: int, seed: int, count: int = 25) -> set[str]:
    """Serves random requests, tokens known late and requests ended or cancelled at random; the kinds of copies made."""
    source = random.Random(seed)
    # Short prompts with long outputs and the other way round: the clock is where neither wants it.
    lens = [(source.randint(1, 3), source.randint(1, 12))[:: source.choice((1, -1))] for _ in range(count)]
    max_len = max(map(sum, lens)) + slack
    book, admission = Slots(rules, max_len), Admission(rules)
    memory = Memory(rules, max_len, max(prompt for prompt, _ in lens))
    tokens: dict[int, list[int]] = {}
    left = list(range(count))
    under_way: list[Prefill | Decode] = []
    while left or len(admission) or under_way:
        if left and source.random() < 0.3:
            number = left.pop(0)
            tokens[number] = [1000 * number + position for position in range(lens[number][0])]
            book.arrive(number, tuple(tokens[number]), lens[number][1], None)
            admission.arrive(Request(number=number, prompt_len=lens[number][0]))
        if admission.waiting and source.random() < 0.02:
            number = source.choice(admission.waiting).number
            assert admission.cancel(number)
            book.forget(number)
        if under_way and source.random() < 0.5:
            for order in (one for one in under_way.pop(0).together if one.samples):
                numbers = book.numbers(order)
                for number in numbers:
                    tokens[number].append(1000 * number + len(tokens[number]))
                finished = [
                    number
                    for number in numbers
                    if number in book.rows and (len(tokens[number]) >= sum(lens[number]) or source.random() < 0.05)
                ]
                book.known(order, [tokens[number][-1] for number in numbers], finished)
                if isinstance(order, Prefill):
                    admission.prefilled(order.requests, finished)
                else:
                    admission.decoded(order.slot, finished)
        decision = admission.decide()
        if isinstance(decision, Wait):
            continue
        edits, task = book.order(decision)
        owners = {isinstance(order, Decode) or rules.whole_slots: book.numbers(order) for order in decision.together}
        for order in decision.together:
            numbers = owners[isinstance(order, Decode) or rules.whole_slots]
            assert {one.number for one in order.requests} == set(numbers) & set(book.rows)
            assert rules.whole_slots or set(numbers) <= set(book.rows)
        for edit in edits:
            memory.copy(edit)
        memory.run(task, owners, tokens)
        if task.samples:
            under_way.append(decision)
    assert not book.rows
    assert len(book.free) == (0 if rules.whole_slots else rules.slots + 1)
    return memory.kinds


def test_rows_are_joined_moved_and_shifted_both_ways() -> None:
    rules = [Rules(slots=2, rows=4, prefill_rows=2, joins=joins) for joins in (False, True)]
    kinds = set().union(*(run(own, 0, seed) for own in rules for seed in range(5)))
    assert kinds == {"join", "move", "shift-left", "shift-right"}
