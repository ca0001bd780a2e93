"""Which request is worked on next: one policy for the runtime and for the simulator, without a clock or a device.

A slot holds up to `rows` requests that decode together, a token a step. A request has its row from the moment its
prefill begins, so that nothing is ever taken back; it is prefilled beside the slot, in chunks if it is long, and joins
at the slot's next step. The first stage asks `decide` whenever it could begin a task, and says what came of tasks by
`prefilled` and `decoded`.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from pipetune.bench.spec import Plan

WaitReason = Literal["empty", "underfilled", "blocked"]
"""`empty`: no request is in the system; `underfilled`: all that are wait for their tokens; `blocked`: some wait for a
row as well."""

_MOST_PADDING = 0.25
"""Share of a prefill's positions that may be padding, where prompts of unlike lengths are prefilled together."""
_MOST_OVERTAKEN = 64
"""Later requests that may go before one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request, as far as its order is concerned."""

    number: int
    prompt_len: int
    """Tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """How a plan admits requests."""

    slots: int
    rows: int
    """Requests that decode together, in each slot."""
    prefill_rows: int
    """Requests that are prefilled together at most."""
    chunk_size: int | None = None
    """Tokens of a prompt prefilled at a time; None prefills whole prompts."""
    prefills_per_decode: int | None = None
    """Prefill tasks that may go before a step that is ready; None lets all go."""
    order: Literal["fcfs", "shortest"] = "fcfs"
    """First come, first served; or the request with the fewest tokens left to prefill, a short one between the chunks
    of a long one."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number below 1."""
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


def rules_of(plan: Plan, in_flight: int) -> Rules:
    """How a plan admits requests: a slot for each micro-batch in flight."""
    return Rules(
        slots=in_flight, rows=plan.micro_batch_size, prefill_rows=plan.prefill_size, chunk_size=plan.prefill_chunk_size
    )


@dataclass(frozen=True, slots=True)
class Prefill:
    """A task on prompts: the positions `[first_token, end_token)` of requests that are padded to the longest."""

    slot: int
    """That they will join."""
    requests: tuple[Request, ...]
    first_token: int
    end_token: int
    samples: bool
    """Whether tokens come of it: not of a chunk that is not the last."""


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of a slot: a token for each of its requests."""

    slot: int
    requests: tuple[Request, ...]
    joined: tuple[Request, ...]
    """Those of them that were prefilled since the last step."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something arrives or becomes known."""

    reason: WaitReason


Order = Prefill | Decode | Wait


@dataclass(slots=True)
class _Slot:
    live: list[Request] = field(default_factory=list)
    joining: list[Request] = field(default_factory=list)
    reserved: int = 0
    """Rows of requests that are prefilled."""
    is_under_way: bool = False
    ready_since: int = 0

    @property
    def taken(self) -> int:
        return len(self.live) + len(self.joining) + self.reserved

    @property
    def is_filling(self) -> bool:
        return self.reserved > 0 and not self.live


@dataclass(slots=True)
class _Group:
    """Requests that are prefilled together."""

    slot: int
    requests: tuple[Request, ...]
    done: int = 0

    @property
    def length(self) -> int:
        return max(request.prompt_len for request in self.requests)


class Admission:
    """The state of a pipeline's slots, and the policy over it."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.waiting: deque[Request] = deque()
        """Requests without a row, in the order in which they came."""
        self._slots = [_Slot() for _ in range(rules.slots)]
        self._groups: list[_Group] = []
        self._overtaken: dict[int, int] = {}
        self._count = self._orders = self._prefills_since_decode = 0

    def __len__(self) -> int:
        """Requests in the system."""
        return self._count

    def arrive(self, request: Request) -> None:
        """Takes a request in."""
        self.waiting.append(request)
        self._count += 1

    def decide(self) -> Order:
        """What the first stage does next; what is ordered counts as under way from now on."""
        self._orders += 1
        ready = [
            (slot.ready_since, index)
            for index, slot in enumerate(self._slots)
            # An empty slot waits for all that are on their way to it: a step costs about as much for half of them.
            if not slot.is_under_way and (slot.live or (slot.joining and not slot.reserved))
        ]
        most = self.rules.prefills_per_decode
        decodes_first = ready and most is not None and self._prefills_since_decode >= most
        if not decodes_first and (group := self._next_group()) is not None:
            self._prefills_since_decode += 1
            return self._prefill(group)
        if ready:
            self._prefills_since_decode = 0
            return self._decode(min(ready)[1])
        if not len(self):
            return Wait("empty")
        return Wait("blocked" if self.waiting else "underfilled")

    def prefilled(self, requests: Iterable[Request], finished: Collection[int] = ()) -> None:
        """First tokens of requests are known; those of them whose numbers are finished want no more."""
        requests = tuple(requests)
        index = next(index for index, group in enumerate(self._groups) if group.requests == requests)
        slot = self._slots[self._groups.pop(index).slot]
        slot.reserved -= len(requests)
        self._count -= len(finished)
        if not slot.live:
            slot.ready_since = self._orders
        slot.joining += [request for request in requests if request.number not in finished]

    def decoded(self, slot: int, finished: Collection[int] = ()) -> None:
        """Tokens of a slot's step are known; its requests whose numbers are finished leave it."""
        own = self._slots[slot]
        own.is_under_way, own.ready_since = False, self._orders
        self._count -= len(finished)
        own.live = [request for request in own.live if request.number not in finished]

    def cancel(self, number: int) -> bool:
        """Takes a request out that has no row yet; False where it has one, and leaves when it is next finished."""
        found = next((request for request in self.waiting if request.number == number), None)
        if found is not None:
            self.waiting.remove(found)
            self._count -= 1
            self._overtaken.pop(number, None)
        return found is not None

    def _next_group(self) -> _Group | None:
        """Whose chunk is next; a new group where there is room to begin one."""
        open_groups = [group for group in self._groups if group.done < group.length]
        # Each needs room to be prefilled in, until its tokens are known.
        may_begin = bool(self.waiting) and len(self._groups) <= self.rules.slots
        if self.rules.order == "fcfs":
            return open_groups[0] if open_groups else self._new_group(self.waiting) if may_begin else None
        shortest = min(open_groups, key=lambda group: group.length - group.done, default=None)
        if may_begin:
            queue = sorted(self.waiting, key=lambda request: (not self._is_starved(request), request.prompt_len))
            left = math.inf if shortest is None else shortest.length - shortest.done
            if self._is_starved(queue[0]) or queue[0].prompt_len < left:
                return self._new_group(queue) or shortest
        return shortest

    def _is_starved(self, request: Request) -> bool:
        return self._overtaken.get(request.number, 0) >= _MOST_OVERTAKEN

    def _new_group(self, candidates: Iterable[Request]) -> _Group | None:
        # One that is being filled first, so that it does not begin to decode half empty; then the emptiest.
        with_room = [index for index, slot in enumerate(self._slots) if slot.taken < self.rules.rows]
        if not with_room:
            return None
        index = min(with_room, key=lambda index: (not self._slots[index].is_filling, self._slots[index].taken, index))
        room = min(self.rules.rows - self._slots[index].taken, self.rules.prefill_rows)
        chosen: list[Request] = []
        for request in candidates:
            if len(chosen) == room:
                break
            lens = [one.prompt_len for one in (*chosen, request)]
            if chosen and sum(lens) < (1 - _MOST_PADDING) * len(lens) * max(lens):
                break
            chosen.append(request)
        if not chosen:
            return None
        last = max(request.number for request in chosen)
        for request in chosen:
            self.waiting.remove(request)
            self._overtaken.pop(request.number, None)
        for request in self.waiting:
            if request.number < last:
                self._overtaken[request.number] = self._overtaken.get(request.number, 0) + len(chosen)
        self._slots[index].reserved += len(chosen)
        self._groups.append(_Group(index, tuple(chosen)))
        return self._groups[-1]

    def _prefill(self, group: _Group) -> Prefill:
        first = group.done
        group.done = min(first + (self.rules.chunk_size or group.length), group.length)
        return Prefill(group.slot, group.requests, first, group.done, group.done == group.length)

    def _decode(self, index: int) -> Decode:
        slot = self._slots[index]
        joined, slot.joining = tuple(slot.joining), []
        slot.live += joined
        slot.is_under_way = True
        return Decode(index, tuple(slot.live), joined)
