"""Edges between stages: tensors of known shape, received into a ring of buffers posted ahead of the compute.

gloo sends meet their receive even when small, so receives are posted first and a send is waited for only when its
place in the ring is needed again. A tensor handed to `send` is held until then: a buffer that is written before its
send has ended is the classic way to ship garbage.

Tensors go from where they lie to where they are read: between CPUs over gloo, between GPUs over NCCL, by one two-rank
group per directed edge, whose waits are on the stream and not on the host. Where two stages share a GPU or kinds of
device mix, `Staged…` ends send CUDA tensors over pinned host memory and gloo.

On GPUs a buffer is read and written by several streams. What holds for all of them: a ring is allocated once and lives
as long as its edge, so the allocator never gives its memory to others while a message is under way; and a buffer is
written again only behind the mark of the compute that read it last (`consumed`), or, where nobody says so, behind
everything that the compute stream was given until then. A mark is a point of a stream: the work issued there so far.
Work put behind a mark starts when that work is done, and not, as it would on the compute stream itself, when everything
is done that was issued meanwhile.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

Mark = torch.cuda.Event | None
"""None on a CPU."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to a device; to a GPU from pinned memory, so that the host does not wait for it. The pinned
    copy may be let go at once: its allocator keeps it until the stream has read it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class SideStream:
    """A stream beside the compute stream, for copies and messages; none on a CPU, where work ends before its call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # Streams come from pools that are used in turn, one pool a priority. NCCL's are of high priority: were
            # this stream one of those, a receive would wait for the sends there.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Mark:
        """The work issued so far on the stream that is current: the compute stream, or inside `behind` this one."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def behind(self, mark: Mark) -> Iterator[None]:
        """What is issued inside runs on this stream, once the marked work is done.

        The caching allocator knows nothing of this use: memory touched inside must be held until the compute stream was
        made to wait for it (`join`), or outlive the stream's work for another reason.
        """
        if self._stream is None:
            yield
            return
        if mark is not None:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            yield

    def join(self, mark: Mark) -> None:
        """Makes the compute stream, and not the host, wait for the marked work."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """What travels on one kind of edge."""

    tag: int
    depth: int
    """Messages under way at most, at each end."""
    numel: int
    """Elements of the largest."""
    dtype: torch.dtype


class _Ring:
    """`depth` flat buffers used in turn."""

    def __init__(self, depth: int, messages: Messages, device: torch.device, *, pin: bool = False) -> None:
        self._buffers = [
            torch.empty(messages.numel, dtype=messages.dtype, device=device, pin_memory=pin) for _ in range(depth)
        ]
        self._next = 0

    def next(self, shape: tuple[int, ...]) -> tuple[int, torch.Tensor]:
        """The next buffer in turn: its place, and so much of it as the shape needs."""
        place = self._next
        self._next = (place + 1) % len(self._buffers)
        return place, self._buffers[place][: torch.Size(shape).numel()].view(shape)


class Receiver:
    """The receiving end of a directed edge: over NCCL where a group of the two ranks is given, else over gloo."""

    def __init__(
        self, source: int, messages: Messages, device: torch.device, group: dist.ProcessGroup | None = None
    ) -> None:
        self.depth = messages.depth
        self._source, self._tag, self._group = source, messages.tag, group
        self._ring = _Ring(self.depth, messages, device)
        self._side = SideStream(device)
        self._posted: deque[tuple[dist.Work, int, torch.Tensor]] = deque()
        # Who reads the buffers on the compute stream, and until when.
        self._consumed: list[Mark] = [None] * self.depth
        self._taken: int | None = None

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive for the next message, whose shape is known: behind the compute that used its buffer last.

        NCCL's own stream waits for the stream that is current when the receive is issued. Were that the compute stream,
        the receive would wait for whatever was given to it since, such as its wait for tokens.
        """
        place, tensor = self._ring.next(shape)
        with self._side.behind(self._free(place)):
            self._receive(place, tensor)

    def take(self) -> torch.Tensor:
        """Waits for the oldest receive posted. The tensor is valid until `depth` more are posted."""
        work, self._taken, tensor = self._posted.popleft()
        work.wait()
        return tensor

    def consumed(self) -> None:
        """Says that all compute that reads the tensor taken last has been issued; sooner than anyone could guess."""
        if self._taken is not None:
            self._consumed[self._taken] = self._side.mark()

    def _free(self, place: int) -> Mark:
        """Behind this, the buffer may be written. Used once: what reads the buffer next is not known yet."""
        mark, self._consumed[place] = self._consumed[place], None
        return self._side.mark() if mark is None else mark

    def _receive(self, place: int, tensor: torch.Tensor) -> None:
        work = dist.irecv(tensor, src=self._source, group=self._group, tag=self._tag)
        assert work is not None
        self._posted.append((work, place, tensor))


class StagedReceiver(Receiver):
    """Receives over gloo into pinned memory; a stream of its own copies to the GPU. Two rings, place for place: pinned
    buffers that gloo writes, and buffers on the GPU that the compute reads."""

    def __init__(self, source: int, messages: Messages, device: torch.device) -> None:
        super().__init__(source, messages, device)
        self._host = _Ring(self.depth, messages, torch.device("cpu"), pin=True)
        self._copied: list[Mark] = [None] * self.depth

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive into the next pinned buffer, once the copy that read it last has ended.

        gloo writes from a thread of the host, which no stream orders: the host itself must know that the copy is over.
        It was issued `depth` messages ago and waits for nothing but its own buffer: there is little to wait for.
        """
        place, tensor = self._host.next(shape)
        if (copied := self._copied[place]) is not None:
            copied.synchronize()
        self._receive(place, tensor)

    def take(self) -> torch.Tensor:
        """Blocks until the oldest message is on the host; for its way to the GPU the compute stream alone waits."""
        work, place, staged = self._posted.popleft()
        work.wait()
        there, tensor = self._ring.next(tuple(staged.shape))
        assert there == place
        with self._side.behind(self._free(place)):
            tensor.copy_(staged, non_blocking=True)
            copied = self._side.mark()
        self._side.join(copied)
        self._copied[place], self._taken = copied, place
        return tensor


class Sender:
    """The sending end of a directed edge; holds each tensor until its send has ended.

    It sends over NCCL if a group of the two ranks is given, else over gloo. NCCL sends on a stream of its own, behind
    the compute that made the tensor, and its wait is one of the compute stream: the memory goes back to the allocator,
    which gives it to later work of that stream, and so never before the send has read it. With `depth` sends under way
    the stream is meant to wait: the stages behind are that far behind.
    """

    def __init__(self, destination: int, messages: Messages, group: dist.ProcessGroup | None = None) -> None:
        self._destination, self._depth, self._tag, self._group = destination, messages.depth, messages.tag, group
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Sends without waiting for the other side, unless `depth` sends are under way."""
        while len(self._under_way) >= self._depth:
            self._under_way.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self._destination, group=self._group, tag=self._tag)
        assert work is not None
        self._under_way.append((work, tensor))

    def drain(self) -> None:
        """Waits for every send under way."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


class StagedSender(Sender):
    """Copies to pinned memory, waits for that copy alone, then sends over gloo."""

    def __init__(self, destination: int, messages: Messages) -> None:
        super().__init__(destination, messages)
        # One buffer more than may be under way: the copy goes into one that no send reads.
        self._ring = _Ring(messages.depth + 1, messages, torch.device("cpu"), pin=True)

    def send(self, tensor: torch.Tensor) -> None:
        """Blocks for the copy to the host, not for the send."""
        _, staged = self._ring.next(tuple(tensor.shape))
        staged.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        copied.synchronize()
        super().send(staged)
