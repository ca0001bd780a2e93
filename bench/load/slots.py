"""Where the keys and values of requests lie in a pipeline's caches: what every stage copies and runs, as numbers.

Caches `0 … slots-1` are the slots; those behind them are for prompts, one more than there are slots, in which groups of
requests are prefilled, padded on the left. A slot has one clock: each of its n requests fills the row's last positions
before it, and rows are `[0, n)`. Once a group's first tokens are known it is copied to its slot, so that it ends at the
clock; where slots are filled whole it is prefilled in the slot itself, and stays there. The clock starts as late as
lets the rows come to their ends, so that a longer one seldom has to shift them.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipetune.bench.load.admission import Decode, Prefill, Rules


class Edit(NamedTuple):
    """A copy of the positions `[first, end)` of some rows, to another cache or place."""

    source: int
    first_row: int
    num_rows: int
    first: int
    end: int
    target: int
    to_row: int
    to_first: int


class Rows(NamedTuple):
    """Rows of a cache, `first` and those behind it, whose positions count from `base`."""

    cache: int
    first: int
    base: int
    past: int
    """Positions that are filled."""
    tokens: int
    """Positions of each row that are computed."""
    starts: Sequence[int]
    """Padded positions of each row."""
    samples: bool


class Task(NamedTuple):
    """One forward pass, over rows of several caches where the model can take them together."""

    parts: Sequence[Rows]
    ids: Sequence[int] | None
    """Tokens that are computed, row by row; None for a stage that reads none."""
    draws: Sequence[float] | None
    """Numbers that tokens are drawn by, row by row of those that are; None takes the likeliest."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of each; what is joined is one row."""
        if len(self.parts) == 1:
            return len(self.parts[0].starts), self.parts[0].tokens
        return 1, sum(len(part.starts) * part.tokens for part in self.parts)

    @property
    def samples(self) -> bool:
        """Whether tokens come of it."""
        return any(part.samples for part in self.parts)


@dataclass(slots=True)
class _Row:
    number: int
    prompt: Sequence[int]
    draws: Sequence[float] | None
    length: int
    """Positions that it has in its cache once all orders are carried out."""
    left: int
    """Steps that it may still be ordered."""
    token: int = 0
    """The one known last, which is not in the cache."""
    known: int = 0


@dataclass(slots=True)
class _Slot:
    rows: list[_Row] = field(default_factory=list)
    clock: int = 0

    @property
    def longest(self) -> int:
        return max((row.length for row in self.rows), default=0)


class Slots:
    """The state of a pipeline's caches after all orders that were given."""

    def __init__(self, rules: Rules, max_len: int, pad_token_id: int = 0) -> None:
        """`max_len` holds any request's prompt and output."""
        self._max_len, self._pad, self._rules = max_len, pad_token_id, rules
        self._slots = [_Slot() for _ in range(rules.slots)]
        self.free = [] if rules.whole_slots else list(range(rules.slots, 2 * rules.slots + 1))
        """Caches for prompts that no group is in."""
        self._prefilling: dict[int, tuple[int, list[_Row]]] = {}
        """Cache and rows of each group, by its first request's number."""
        self.rows: dict[int, _Row] = {}
        """By the requests' numbers."""
        self._edits: list[Edit] = []

    def arrive(self, number: int, prompt: Sequence[int], output_len: int, draws: Sequence[float] | None) -> None:
        """Takes in a request."""
        self.rows[number] = _Row(number, prompt, draws, len(prompt), output_len - 1)

    def forget(self, number: int) -> None:
        """Lets a request go whose prefill was never ordered."""
        del self.rows[number]

    def order(self, order: Prefill | Decode) -> tuple[list[Edit], Task]:
        """What the stages do for an order: copies, and the task behind them."""
        parts, ids, draws = list[Rows](), list[int](), list[float]()
        for one in order.together:
            own, rows = self._prefill(one, ids) if isinstance(one, Prefill) else self._decode(one, ids)
            parts += own
            if own[0].samples and rows[0].draws is not None:
                # Of those that have left what is drawn does not matter.
                draws += [row.draws[min(row.known, len(row.draws) - 1)] for row in rows if row.draws is not None]
        edits, self._edits = self._edits, []
        return edits, Task(parts, ids, draws or None)

    def numbers(self, order: Prefill | Decode) -> list[int]:
        """Whose tokens come of an order, until they are known, those that have left a whole slot among them."""
        return [row.number for row in self._rows(order)]

    def known(self, order: Prefill | Decode, tokens: Sequence[int], finished: Collection[int]) -> None:
        """Takes in the tokens of an order that samples, row by row; requests that are finished give their rows back."""
        own, cache, rows = self._slots[order.slot], order.slot, self._rows(order)
        if isinstance(order, Prefill):
            cache, _ = self._prefilling.pop(order.requests[0].number)
        for row, token in zip(rows, tokens, strict=True):
            row.token = token
            row.known += 1
        for number in finished:
            del self.rows[number]
        if self._rules.whole_slots:
            own.rows = rows if any(row.number in self.rows for row in rows) else []
            own.clock = own.longest
        elif isinstance(order, Prefill):
            self.free.append(cache)
            self._join(own, order.slot, cache, rows, finished)
        else:
            self._leave(own, order.slot, finished)

    def _rows(self, order: Prefill | Decode) -> list[_Row]:
        if isinstance(order, Prefill):
            return self._prefilling[order.requests[0].number][1]
        # Others may have joined behind them since.
        return self._slots[order.slot].rows[: order.rows]

    def _prefill(self, order: Prefill, ids: list[int]) -> tuple[list[Rows], list[_Row]]:
        first = order.requests[0].number
        if order.first_token == 0:
            cache = order.slot if self._rules.whole_slots else self.free.pop()
            self._prefilling[first] = cache, [self.rows[one.number] for one in order.requests]
        cache, rows = self._prefilling[first]
        longest = max(row.length for row in rows)
        starts = [longest - row.length for row in rows]
        begin, end = order.first_token, order.end_token
        if not self._rules.joins:
            for row, start in zip(rows, starts, strict=True):
                ids += ([self._pad] * start + list(row.prompt))[begin:end]
            return [Rows(cache, 0, 0, begin, end - begin, starts, order.samples)], rows
        parts = []
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            past, filled = max(begin - start, 0), max(end - start, 0)
            if filled > past:
                ids += row.prompt[past:filled]
                parts.append(Rows(cache, index, start, past, filled - past, [0], order.samples))
        return parts, rows

    def _decode(self, order: Decode, ids: list[int]) -> tuple[list[Rows], list[_Row]]:
        own = self._slots[order.slot]
        if own.clock == self._max_len:
            self._turn(own, order.slot, own.longest, own.rows)
        longest, rows = own.longest, self._rows(order)
        starts = [longest - row.length for row in rows]
        ids += [row.token for row in rows]
        part = Rows(order.slot, 0, own.clock - longest, longest, 1, starts, True)
        own.clock += 1
        for row in rows:
            row.length += 1
            row.left -= 1
        return [part], rows

    def _join(self, own: _Slot, slot: int, cache: int, rows: list[_Row], finished: Collection[int]) -> None:
        width = max(row.length for row in rows)
        staying = [row for row in rows if row.number not in finished]
        if staying and (not own.rows or own.clock < width):
            self._turn(own, slot, max(width, own.longest), [*own.rows, *staying])
        first = 0
        # Rows beside one another are copied at once, with their padding.
        for stays, group in itertools.groupby(rows, lambda row: row.number not in finished):
            joining = list(group)
            if stays:
                place = (slot, len(own.rows), own.clock - width)
                self._edits.append(Edit(cache, first, len(joining), 0, width, *place))
                own.rows += joining
            first += len(joining)

    def _leave(self, own: _Slot, slot: int, finished: Collection[int]) -> None:
        for index in range(len(own.rows) - 1, -1, -1):
            if own.rows[index].number not in finished:
                continue
            last = own.rows.pop()
            if index < len(own.rows):
                own.rows[index] = last
                begin = own.clock - last.length
                self._edits.append(Edit(slot, len(own.rows), 1, begin, own.clock, slot, index, begin))

    def _turn(self, own: _Slot, slot: int, least: int, rows: Sequence[_Row]) -> None:
        """Sets the clock, to the least that is needed or later, and shifts what is there."""
        clock = max(least, self._max_len - max(row.left for row in rows))
        if own.rows:
            begin = own.clock - own.longest
            shifted = begin + clock - own.clock
            self._edits.append(Edit(slot, 0, len(own.rows), begin, own.clock, slot, 0, shifted))
        own.clock = clock
