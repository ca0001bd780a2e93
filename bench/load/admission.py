"""Which request is worked on next: one policy for the runtime and for the simulator, without a clock or a device.

A slot holds up to `rows` requests that decode together, a token a step. A request has its row from the moment its
prefill begins, so that nothing is ever taken back; it is prefilled beside the slot, in chunks if it is long, and joins
at the slot's next step. Where rows cannot be moved, or not be padded, slots are filled whole: prompts of one length at
once, prefilled in place, and no others until all of them have left. The first stage asks `decide` whenever it could
begin a task, and says what came of tasks by `prefilled` and `decoded`.

Of a lane the request that has waited longest is in its next prefill, with those of about its length. Between lanes
prefilled tokens are shared out by weight, so that short prompts go before the next chunk of a long one, and none waits
for ever: by start-time fair queueing (P. Goyal, H. M. Vin and H. Cheng, 1996), the lane whose turn began first, of
those that had as much the one of shorter prompts.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipetune.bench.errors import PlanError
from pipetune.bench.spec import Lane, Plan, slots_needed

WaitReason = Literal["empty", "underfilled", "blocked"]
"""`empty`: no request is in the system; `underfilled`: all that are wait for their tokens; `blocked`: some wait for a
row as well."""

_MOST_PADDING, _MOST_SEEN = 0.25, 64
"""Share of a prefill's positions that may be padding, where prompts of unlike lengths are prefilled together; and
requests that are looked at to find such."""


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
    """Tokens of a prompt prefilled at a time, at most; None prefills whole prompts."""
    lanes: tuple[Lane, ...] = (Lane(),)
    """By rising lengths, the last one without a limit."""
    joins: bool = False
    """Whether prompts of any lengths, and a decode step, go through one forward pass, without padding."""
    whole_slots: bool = False
    """Whether requests come to a slot, and are computed in it, all together: rows cannot be moved, or not be padded."""

    def __post_init__(self) -> None:
        """Raises ValueError for a number below 1, or more slots of lanes than there are."""
        for name, value in dataclasses.asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if (needed := slots_needed(self.lanes)) > self.slots:
            raise ValueError(f"slots={self.slots}: these lanes need {needed}; give them fewer of their own")


def rules_of(plan: Plan, in_flight: int, *, joins: bool, whole_slots: bool) -> Rules:
    """How a plan admits requests: a slot for each micro-batch in flight; what else is said is the model's. PlanError:
    its lanes need more."""
    try:
        return Rules(
            slots=in_flight,
            rows=plan.micro_batch_size,
            prefill_rows=plan.prefill_size,
            chunk_size=plan.prefill_chunk_size,
            lanes=plan.lanes or (Lane(),),
            joins=joins,
            whole_slots=whole_slots,
        )
    except ValueError as error:
        raise PlanError(f"plan.lanes: {error}") from None


def deal(replicas: int, max_concurrency: int | None) -> list[tuple[slice, int | None]]:
    """Which of the requests each replica gets, dealt out in turn, and how many it has at once; with fewer places than
    replicas some get none."""
    count = min(replicas, max_concurrency or replicas)
    return [
        (slice(one, None if one < count else 0, count), max_concurrency and len(range(one, max_concurrency, count)))
        for one in range(replicas)
    ]


@dataclass(frozen=True, slots=True)
class Decode:
    """A step of a slot: a token for each of its requests."""

    slot: int
    requests: tuple[Request, ...]
    joined: tuple[Request, ...]
    """Those of them that were prefilled since the last step."""
    rows: int
    """That are computed: of a whole slot also those of requests that have left."""
    samples: ClassVar = True

    @property
    def together(self) -> "tuple[Decode]":
        """All that is one forward pass."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Prefill:
    """A task on prompts: the positions `[first_token, end_token)` of requests, counted as if they were padded on the
    left to the longest; and a step of a slot beside it, where the model takes both at once."""

    slot: int
    """That they will join."""
    requests: tuple[Request, ...]
    first_token: int
    end_token: int
    samples: bool
    """Whether tokens come of it: not of a chunk that is not the last."""
    tokens: int
    """Positions of each request that are computed, padding among them; without padding their mean, rounded up."""
    beside: Decode | None = None

    @property
    def together(self) -> "tuple[Prefill] | tuple[Prefill, Decode]":
        """All that is one forward pass."""
        return (self,) if self.beside is None else (self, self.beside)

    @property
    def rows(self) -> int:
        """That are computed."""
        return len(self.requests)


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something arrives or becomes known."""

    reason: WaitReason


Order = Prefill | Decode | Wait


@dataclass(eq=False, slots=True)
class _Lane:
    own: Lane
    slots: range
    waiting: deque[Request] = field(default_factory=deque)
    """Requests without a row, in the order in which they came."""
    open: "_Group | None" = None
    """That is prefilled in part."""
    turn: float = 0.0
    """Tokens over weight by which its next task is due."""


@dataclass(eq=False, slots=True)
class _Group:
    """Requests that are prefilled together."""

    lane: _Lane
    slot: int
    requests: tuple[Request, ...]
    done: int = 0

    @property
    def length(self) -> int:
        return max(request.prompt_len for request in self.requests)


@dataclass(slots=True)
class _Slot:
    live: list[Request] = field(default_factory=list)
    joining: list[Request] = field(default_factory=list)
    coming: list[_Group] = field(default_factory=list)
    """That are prefilled for it."""
    is_under_way: bool = False
    ready_since: int = 0
    prefills: int = 0
    """The pipeline's, since its last step or since it had requests."""
    steps: int = 0
    """Its own, since the pipeline's last prefill."""
    filled: int = 0
    """Rows of the group that came last."""

    @property
    def taken(self) -> int:
        return len(self.live) + len(self.joining) + sum(len(group.requests) for group in self.coming)

    def is_filled_by(self, lane: _Lane) -> bool:
        return not self.live and any(group.lane is lane for group in self.coming)


class Admission:
    """The state of a pipeline's slots, and the policy over it."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._slots = [_Slot() for _ in range(rules.slots)]
        self._lanes: list[_Lane] = []
        first, shared = 0, range(sum(lane.slots or 0 for lane in rules.lanes), rules.slots)
        for lane in rules.lanes:
            self._lanes.append(_Lane(lane, shared if lane.slots is None else range(first, first + lane.slots)))
            first += lane.slots or 0
        self._now = 0.0
        """When the last prefill was due."""
        self._count = self._orders = 0

    def __len__(self) -> int:
        """Requests in the system."""
        return self._count

    @property
    def waiting(self) -> list[Request]:
        """Requests without a row."""
        return [request for lane in self._lanes for request in lane.waiting]

    def arrive(self, request: Request) -> None:
        """Takes a request in."""
        lane = self._lane_of(request)
        if not lane.waiting and lane.open is None:
            # Nobody saves turns up.
            lane.turn = max(lane.turn, self._now)
        lane.waiting.append(request)
        self._count += 1

    def decide(self) -> Order:
        """What the first stage does next; what is ordered counts as under way from now on."""
        self._orders += 1
        ready = [(slot.ready_since, index) for index, slot in enumerate(self._slots) if self._is_ready(slot)]
        if (lane := self._next_lane()) is not None:
            most, slot = lane.own.prefills_per_decode, self._slots[min(ready)[1]] if ready else None
            if slot is None or most is None or slot.prefills + 1 <= most or slot.steps * most >= 1:
                prefill = self._prefill(lane)
                if ready and self.rules.joins:
                    return dataclasses.replace(prefill, beside=self._decode(min(ready)[1]))
                return prefill
        if ready:
            return self._decode(min(ready)[1])
        if not len(self):
            return Wait("empty")
        return Wait("blocked" if self.waiting else "underfilled")

    def prefilled(self, requests: Iterable[Request], finished: Collection[int] = ()) -> None:
        """First tokens of requests are known; those of them whose numbers are finished want no more."""
        requests = tuple(requests)
        found = ((slot, group) for slot in self._slots for group in slot.coming if group.requests == requests)
        slot, group = next(found)
        slot.coming.remove(group)
        self._count -= len(finished)
        if not slot.live:
            slot.ready_since, slot.prefills, slot.steps = self._orders, 0, 0
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
            self._lane_of(found).waiting.remove(found)
            self._count -= 1
        return found is not None

    def _lane_of(self, request: Request) -> _Lane:
        return next(one for one in self._lanes if request.prompt_len <= (one.own.up_to_tokens or request.prompt_len))

    def _is_ready(self, slot: _Slot) -> bool:
        if slot.is_under_way or slot.live:
            return not slot.is_under_way
        # An empty slot waits for all of a lane that are on their way to it: a step costs about as much for half of
        # them.
        return bool(slot.joining) and not any(slot.is_filled_by(self._lane_of(one)) for one in slot.joining)

    def _next_lane(self) -> _Lane | None:
        """Whose prefill is next, of those that have one, or have requests and room for them."""
        # Each group needs a cache to be prefilled in, until its tokens are known.
        may_begin = sum(len(slot.coming) for slot in self._slots) <= self.rules.slots
        able = (one for one in self._lanes if one.open or (may_begin and one.waiting and self._with_room(one)))
        return min(able, key=lambda one: one.turn, default=None)

    def _with_room(self, lane: _Lane) -> list[int]:
        most = 1 if self.rules.whole_slots else self.rules.rows
        return [index for index in lane.slots if self._slots[index].taken < most]

    def _new_group(self, lane: _Lane) -> _Group:
        def preference(index: int) -> tuple[bool, int]:
            # One that is being filled first, so that it does not begin to decode half empty; then the emptiest.
            return not self._slots[index].is_filled_by(lane), self._slots[index].taken

        index = min(self._with_room(lane), key=preference)
        most = lane.own.prefill_micro_batch_size or self.rules.prefill_rows
        room = min(self.rules.rows - self._slots[index].taken, self.rules.prefill_rows, most)
        chosen = list[Request]()
        padding = 1.0 if self.rules.joins else 0.0 if self.rules.whole_slots else _MOST_PADDING
        for request in itertools.islice(lane.waiting, _MOST_SEEN):
            lens = [one.prompt_len for one in (*chosen, request)]
            if len(chosen) < room and sum(lens) >= (1 - padding) * len(lens) * max(lens):
                chosen.append(request)
        for request in chosen:
            lane.waiting.remove(request)
        group = _Group(lane, index, tuple(chosen))
        self._slots[index].coming.append(group)
        self._slots[index].filled = len(chosen)
        return group

    def _prefill(self, lane: _Lane) -> Prefill:
        group = lane.open or self._new_group(lane)
        first, sizes = group.done, (self.rules.chunk_size, lane.own.prefill_chunk_size, group.length)
        group.done = min(first + min(size for size in sizes if size), group.length)
        for slot in self._slots:
            slot.prefills, slot.steps = slot.prefills + 1, 0
        self._now = lane.turn
        lane.turn += len(group.requests) * (group.done - first) / lane.own.weight
        lane.open = group if group.done < group.length else None
        tokens = group.done - first
        if self.rules.joins:
            starts = [group.length - request.prompt_len for request in group.requests]
            tokens = -(-sum(max(group.done - max(first, start), 0) for start in starts) // len(starts))
        return Prefill(group.slot, group.requests, first, group.done, lane.open is None, tokens)

    def _decode(self, index: int) -> Decode:
        slot = self._slots[index]
        joined, slot.joining = tuple(slot.joining), []
        slot.live += joined
        slot.is_under_way, slot.prefills, slot.steps = True, 0, slot.steps + 1
        rows = slot.filled if self.rules.whole_slots else len(slot.live)
        return Decode(index, tuple(slot.live), joined, rows)
