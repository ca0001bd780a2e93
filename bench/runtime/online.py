"""Requests that come over time on the stages of a pipeline: the first decides, and tells the others task by task.

The first stage holds the policy (`bench.load.admission`) and knows where every row lies (`bench.load.slots`). It says
what is copied and run, in one message a task over a local socket; hidden states travel between neighbours as ever. The
last stage answers with the tokens, so that the first waits at once for them, for new requests and for the time of the
next. All others do what they are told, and know nothing of requests. Tasks run eagerly, on GPUs too: no captured
graphs.
"""

import marshal
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pipetune.bench.load.admission import Admission, Decode, Prefill, Request, Rules, Wait
from pipetune.bench.load.online import OnlineRequest, ServedRequest
from pipetune.bench.load.slots import Edit, Rows, Slots, Task
from pipetune.bench.memory import KV_ALIGNMENT
from pipetune.bench.record import LoadTask
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.links import to_device
from pipetune.bench.runtime.loop import Edges, Status, likeliest
from pipetune.bench.runtime.sampling import draw, uniforms
from pipetune.bench.runtime.stage.joined import JoinedCache, Part
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.runtime.timeline import Timeline
from pipetune.bench.spec import Sampling

_PACKET = 1 << 16
"""Bytes of a message that are sent at once: the kernel takes no packet larger than a socket's buffer."""
_REHEARSED = 128
"""Tokens of a row that are rehearsed at most."""
_AHEAD = 2
"""Tasks that a GPU may be given before it is waited for, so that the first stage decides on what it knows by then."""


class Mail:
    """One end of a line between the first stage and another: plain values, told within some 30 µs. All raise
    RuntimeError once the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection` is of kind SEQPACKET."""
        self._socket = connection

    def fileno(self) -> int:
        """What can be waited for."""
        return self._socket.fileno()

    def send(self, value: Any) -> None:
        """Tells the other end."""
        self.put(marshal.dumps(value))

    def put(self, data: bytes) -> None:
        """The same, of a value that is packed."""
        try:
            for first in range(0, len(data), _PACKET - 1):
                part = data[first : first + _PACKET - 1]
                self._socket.send((b"." if first + len(part) == len(data) else b"+") + part)
        except OSError as error:
            raise RuntimeError(f"a line for orders between stages: connection closed by peer ({error})") from error

    def receive(self, *, wait: bool = True) -> Any:
        """What the other end told next; None if nothing is there and it is not waited for."""
        parts: list[bytes] = []
        while not parts or parts[-1][:1] == b"+":
            try:
                part = self._socket.recv(_PACKET, 0 if wait or parts else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise RuntimeError(f"a line for orders between stages: connection reset ({error})") from error
            if not part:
                raise RuntimeError("a line for orders between stages: connection closed by peer")
            parts.append(part)
        return marshal.loads(b"".join(part[1:] for part in parts))  # noqa: S302  from our own processes alone

    def pending(self) -> list[Any]:
        """All that the other end has told, without waiting for more."""
        return list(iter(partial(self.receive, wait=False), None))

    def close(self) -> None:
        """Hangs up."""
        self._socket.close()


def pack(edits: Sequence[Edit], task: Task) -> bytes:
    """An order, as `Mail.put` takes it."""
    plain: Any = [tuple(edit) for edit in edits], [tuple(part) for part in task.parts], task.ids, task.draws
    return marshal.dumps(plain)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What caches and messages are made for."""

    rules: Rules
    max_len: int
    """Positions of a slot's row: the longest prompt and output."""
    prompt_len: int
    """Tokens of the longest prompt."""

    @property
    def chunk(self) -> int:
        """Tokens of a row in the largest task."""
        return min(self.rules.chunk_size or self.prompt_len, self.prompt_len)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest task."""
        prefill, rows = self.rules.prefill_rows * self.chunk, self.rules.rows
        return prefill + rows if self.rules.joins else max(prefill, rows)


class OnlineStage:
    """One stage's caches, and how it carries out orders."""

    def __init__(
        self,
        stage: Stage,
        device: DeviceContext,
        status: Status,
        edges: Edges,
        sizes: Sizes,
        *,
        sampling: Sampling | None = None,
        pad_token_id: int = 0,
        instrument: bool = True,
    ) -> None:
        self.stage, self.device, self.status, self.edges = stage, device, status, edges
        self.sampling, self.pad_token_id = sampling, pad_token_id
        self.timeline = Timeline(device.clock(), device.now, enabled=instrument)
        rules = sizes.rules

        def caches(count: int, rows: int, length: int) -> list[Any]:
            aligned = -(-length // KV_ALIGNMENT) * KV_ALIGNMENT if device.is_cuda else length
            return [stage.new_cache(rows=rows, max_len=aligned) for _ in range(count)]

        self.caches = caches(rules.slots, rules.rows, sizes.max_len)
        self.caches += caches(0 if rules.whole_slots else rules.slots + 1, rules.prefill_rows, sizes.prompt_len)
        self._sizes = sizes
        self._marks: deque[torch.cuda.Event] = deque()

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Runs a task of each kind on made-up hidden states, and leaves zeros in all caches: what a mask hides still
        must not be NaN. Call it while no message is under way."""
        rules, prompt = self._sizes.rules, min(self._sizes.chunk, _REHEARSED)
        # A whole slot's step goes on from its prompts.
        first = [(0, 0, prompt), (0, prompt, 1)] if rules.whole_slots else [(0, self._sizes.max_len - 1, 1)]
        first += [(index, 0, 1 if index != rules.slots else prompt) for index in range(1, len(self.caches))]
        for index, past, tokens in first:
            task = Task([Rows(index, 0, 0, past, tokens, [0] * self.caches[index].rows, True)], None, None)
            shape = (self.caches[index].rows, tokens, self.stage.message_values)
            hidden = torch.zeros(shape, dtype=self.stage.message_dtype, device=self.stage.device)
            self._forward(task, None if self.stage.is_first else hidden)
        for cache in self.caches:
            cache.fill(0.0)

    def follow(self, line: Mail) -> None:
        """Carries out the first stage's orders until it says that all is over, on those behind it; raises as `Mail`."""
        receiver = self.edges.hidden_in
        assert receiver is not None
        orders: deque[tuple[list[Edit], Task]] = deque()
        unposted: deque[Task] = deque()
        is_over = False

        def read(*, wait: bool, room: int) -> None:
            nonlocal is_over
            while not is_over and (order := line.receive(wait=wait)) is not None:
                wait = False
                is_over = order == ()
                if not is_over:
                    edits, parts, *rest = order
                    orders.append(([Edit(*edit) for edit in edits], Task([Rows(*part) for part in parts], *rest)))
                    unposted.append(orders[-1][1])
            # The ring holds so many, the one that is computed with among them.
            while unposted and len(orders) - len(unposted) < room:
                task = unposted.popleft()
                receiver.post((*task.shape, self.stage.message_values))

        self.timeline.receive_begins()
        while True:
            # To wait for an order is not to wait for a message: there may be no request.
            self.status.activity = "idle"
            read(wait=not orders, room=receiver.depth)
            if not orders:
                break
            self.status.activity = "receive"
            hidden = receiver.take()
            edits, task = orders.popleft()
            read(wait=False, room=receiver.depth - 1)
            tokens = self.run(edits, task, hidden)
            if tokens is not None:
                line.send(tokens)
        self.finish()

    def run(self, edits: Sequence[Edit], task: Task, hidden: torch.Tensor | None) -> list[int] | None:
        """Carries out one order, and hands its output on; on the last stage the tokens that come of it."""
        self.status.activity = "compute"
        self.timeline.compute_begins()
        for edit in edits:
            rows, span = slice(edit.first_row, edit.first_row + edit.num_rows), slice(edit.first, edit.end)
            target, source = self.caches[edit.target], self.caches[edit.source]
            target.copy(source, rows, span, to_row=edit.to_row, to_first=edit.to_first)
        output = self._forward(task, hidden)
        tokens = self._sample(output, task) if self.stage.is_last and task.samples else None
        self.timeline.compute_ended()
        if self.edges.hidden_in is not None:
            self.edges.hidden_in.consumed()
        self.status.activity = "send"
        sending = time.monotonic()
        if self.edges.hidden_out is not None:
            self.edges.hidden_out.send(output)
        self.timeline.sent(time.monotonic() - sending)
        if self.device.is_cuda:
            self._marks.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._marks[-1].record()
            if len(self._marks) == _AHEAD:
                self._marks.popleft().synchronize()
        self.status.tasks_done += 1
        self.timeline.receive_begins()
        return tokens

    def finish(self) -> None:
        """Waits for every send under way."""
        self.status.activity = "send"
        if self.edges.hidden_out is not None:
            self.edges.hidden_out.drain()
        self.device.synchronize()
        self.status.activity = "idle"

    def _forward(self, task: Task, hidden: torch.Tensor | None) -> torch.Tensor:
        """`[rows, tokens, M]`, or logits `[rows, V]`; of joined parts `[1, N, M]`, or logits of each one's rows."""
        device, is_joined = self.stage.device, len(task.parts) > 1
        parts, positions = list[Part](), list[torch.Tensor]()
        for own in task.parts:
            rows, end = len(own.starts), own.past + own.tokens
            starts = torch.tensor(own.starts).unsqueeze(-1)
            positions.append((torch.arange(own.past, end) - starts).clamp(min=0))
            has_mask = any(own.starts) or (self.stage.needs_mask and not is_joined)
            mask = to_device((torch.arange(end) >= starts).long(), device) if has_mask else None
            parts.append(Part(self.caches[own.cache], own.first, rows, own.base, own.past, own.tokens, mask))
        ids = torch.full(task.shape, self.pad_token_id) if task.ids is None else torch.tensor(task.ids).view(task.shape)
        cache: JoinedCache | SlotCache
        if is_joined:
            lens = torch.tensor([part.tokens for part in parts for _ in range(part.rows)])
            cache = JoinedCache(parts, to_device(lens.cumsum(0) - 1, device))
            # Made part by part; some models look for padding where there is none at all.
            mask = to_device(torch.ones(task.shape).long(), device) if self.stage.needs_mask else None
        else:
            cache, mask = parts[0].seek(), parts[0].mask
        places = torch.cat([own.flatten() for own in positions]).view(task.shape)
        ids, places = to_device(ids, device), to_device(places, device)
        return self.stage.forward(ids, mask, places, cache, hidden, without_logits=not task.samples)

    @torch.inference_mode()
    def _sample(self, logits: torch.Tensor, task: Task) -> list[int]:
        if not all(part.samples for part in task.parts):
            logits = logits[[part.samples for part in task.parts for _ in part.starts]]
        if task.draws is None:
            return likeliest(logits).tolist()
        assert self.sampling is not None
        draws = torch.tensor(task.draws, dtype=torch.float64, device=logits.device)
        return draw(logits, draws, self.sampling).tolist()


class Source:
    """Where requests come from, and what comes of them goes to: here those whose times are known beforehand. Times are
    seconds from the start."""

    waits_on: Sequence[Any] = ()
    """What turns readable when one comes whose time is not known."""

    def __init__(self, requests: Sequence[OnlineRequest] = ()) -> None:
        """Those without a time come at once."""
        self._numbers = [one.number for one in requests]
        self._left = deque(sorted(requests, key=lambda one: one.at_s or 0.0))
        self.served: dict[int, ServedRequest] = {}

    @property
    def is_over(self) -> bool:
        """Whether no more will come."""
        return not self._left

    @property
    def next_s(self) -> float | None:
        """When the next one comes, where that is known."""
        return (self._left[0].at_s or 0.0) if self._left else None

    def take(self, now_s: float) -> Sequence[OnlineRequest]:
        """Requests that have come since the last call."""
        found = []
        while self._left and (self._left[0].at_s or 0.0) <= now_s:
            found.append(self._left.popleft())
        return found

    def cancelled(self) -> Sequence[int]:
        """Numbers of requests that are no longer wanted, since the last call."""
        return ()

    def told(self, tokens: Sequence[tuple[int, int]]) -> None:
        """Takes tokens of requests, by number."""

    def finished(self, request: OnlineRequest, served: ServedRequest) -> None:
        """Takes a request that has left."""
        self.served[served.number] = served

    def in_order(self) -> list[ServedRequest]:
        """What came of all of them, in the order given."""
        return [self.served[number] for number in self._numbers]


@dataclass(slots=True)
class _Served:
    request: OnlineRequest
    arrived_s: float
    noticed_s: float
    admitted_s: float | None = None
    began_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    is_cancelled: bool = False

    def result(self) -> ServedRequest:
        seen = {name: getattr(self, name) for name in ServedRequest.model_fields if name != "number"}
        return ServedRequest(number=self.request.number, **seen)


class Leader:
    """The first stage's part: takes requests in, decides, tells the others, and takes tokens in."""

    def __init__(
        self,
        stage: OnlineStage,
        lines: Sequence[Mail],
        source: Source,
        sizes: Sizes,
        *,
        max_concurrency: int | None = None,
        keep_tasks: bool = True,
    ) -> None:
        """`lines` go to the other stages, in their order. At most `max_concurrency` requests are in the system at once.
        `keep_tasks` keeps what grows with time: tasks, `idle_s` and `underfilled_s`."""
        self.admission = Admission(sizes.rules)
        self.slots = Slots(sizes.rules, sizes.max_len, stage.pad_token_id)
        self.tasks: list[LoadTask] = []
        self.idle_s: list[tuple[float, float]] = []
        self.underfilled_s: list[tuple[float, float]] = []
        self.last_s = 0.0
        """When the last token was known."""
        self._stage, self._lines, self._source = stage, lines, source
        self._max_concurrency, self._keep_tasks = max_concurrency, keep_tasks
        self._outside: deque[_Served] = deque()
        self._served: dict[int, _Served] = {}
        self._under_way: deque[Prefill | Decode] = deque()
        self._empty_since_s: float | None = 0.0
        self._zero_s = 0.0

    def run(self, zero_s: float) -> None:
        """Serves until no requests come and all have left; times count from the moment given. Raises as `Mail`."""
        self._zero_s = zero_s
        self._stage.timeline.receive_begins()
        self._listen(0.0)
        while not (self._source.is_over and not self._served and not self._outside):
            order = self.admission.decide()
            if isinstance(order, Wait):
                self._stage.status.activity = "idle" if order.reason == "empty" else "receive"
                next_s, began_s = self._source.next_s, self._now()
                self._listen(None if next_s is None else max(0.0, next_s - began_s))
                if order.reason == "underfilled" and self._keep_tasks:
                    self.underfilled_s.append((began_s, self._now()))
            else:
                self._carry_out(order)
                self._listen(0.0)
        for line in self._lines:
            line.send(())
        self._stage.finish()

    def _now(self) -> float:
        # To the microsecond, as times are in records.
        return round(self._stage.device.now() - self._zero_s, 6)

    def _listen(self, timeout_s: float | None) -> None:
        """Takes in tokens and requests; waits for some as long as given."""
        waits_on = [*self._lines, *self._source.waits_on]
        if waits_on:
            ready, _, _ = select.select(waits_on, [], [], timeout_s)
            for line in (one for one in ready if one in self._lines):
                # Of stages but the last nothing is heard but that they are gone.
                for tokens in line.pending():
                    self._learn(self._under_way.popleft(), tokens)
        elif timeout_s:
            time.sleep(timeout_s)
        now = self._now()
        for request in self._source.take(now):
            self._outside.append(_Served(request, now if request.at_s is None else request.at_s, now))
        for number in self._source.cancelled():
            self._cancel(number)
        while self._outside and len(self._served) < (self._max_concurrency or len(self._served) + 1):
            self._admit(self._outside.popleft())

    def _admit(self, one: _Served) -> None:
        if self._empty_since_s is not None and self._keep_tasks and one.arrived_s > self._empty_since_s:
            self.idle_s.append((self._empty_since_s, one.arrived_s))
        self._empty_since_s = None
        number, prompt, length = one.request.number, one.request.prompt, one.request.output_len
        sampling = self._stage.sampling
        draws = uniforms(sampling, [number], length)[0].tolist() if sampling is not None else None
        one.admitted_s = self._now()
        self._served[number] = one
        self.slots.arrive(number, prompt, length, draws)
        self.admission.arrive(Request(number=number, prompt_len=len(prompt)))

    def _cancel(self, number: int) -> None:
        if (one := next((one for one in self._outside if one.request.number == number), None)) is not None:
            self._outside.remove(one)
        elif (one := self._served.get(number)) is not None and self.admission.cancel(number):
            self.slots.forget(number)
            self._forget([number], self._now())
        elif one is not None:
            # It leaves with its next token.
            one.is_cancelled = True
            return
        if one is not None:
            one.is_cancelled = True
            self._source.finished(one.request, one.result())

    def _carry_out(self, order: Prefill | Decode) -> None:
        edits, task = self.slots.order(order)
        if isinstance(order, Prefill) and order.first_token == 0:
            now = self._now()
            for request in order.requests:
                self._served[request.number].began_s = now
        data = pack(edits, task if self._stage.stage.reads_ids else task._replace(ids=None)) if self._lines else b""
        for line in self._lines:
            line.put(data)
        if self._keep_tasks:
            self.tasks.append(_task_of(order, task.parts[-1].past))
        tokens = self._stage.run(edits, task, None)
        if tokens is not None:
            self._learn(order, tokens)
        elif task.samples:
            self._under_way.append(order)

    def _learn(self, order: Prefill | Decode, tokens: Sequence[int]) -> None:
        now = self.last_s = self._now()
        for one in order.together:
            if one.samples:
                own, tokens = tokens[: one.rows], tokens[one.rows :]
                self._learn_of(one, own, now)

    def _learn_of(self, order: Prefill | Decode, tokens: Sequence[int], now: float) -> None:
        finished, told = [], []
        for number, token in zip(self.slots.numbers(order), tokens, strict=True):
            if (one := self._served.get(number)) is None:
                continue
            if not one.is_cancelled:
                one.token_ids.append(token)
                one.token_times_s.append(now)
                told.append((number, token))
            is_last = len(one.token_ids) == one.request.output_len or token in one.request.eos_token_ids
            if one.is_cancelled or is_last:
                finished.append(number)
        self.slots.known(order, tokens, finished)
        if isinstance(order, Prefill):
            self.admission.prefilled(order.requests, finished)
        else:
            self.admission.decoded(order.slot, finished)
        self._source.told(told)
        gone = [self._served[number] for number in finished]
        self._forget(finished, now)
        for one in gone:
            self._source.finished(one.request, one.result())

    def _forget(self, numbers: Sequence[int], now_s: float) -> None:
        for number in numbers:
            del self._served[number]
        if not self._served:
            self._empty_since_s = now_s


def _task_of(order: Prefill | Decode, past: int) -> LoadTask:
    """What records say of an order; a step that is part of it has `past` positions behind it."""
    if isinstance(order, Decode):
        return LoadTask(kind="decode", slot=order.slot, rows=order.rows, tokens=1, past=past)
    step = {"decode_rows": order.beside.rows, "decode_past": past} if order.beside is not None else {}
    own = {"slot": order.slot, "rows": order.rows, "tokens": order.tokens, "past": order.first_token}
    return LoadTask(kind="prefill", **own, samples=order.samples, **step)
