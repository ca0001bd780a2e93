"""Edges between stages: tensors of known shape, received into a ring of buffers posted ahead of the compute.

gloo sends meet their receive even when small, so receives are posted first and a send is waited for only when its
place in the ring is needed again. A tensor handed to `send` is held until then: a buffer that is written before its
send has ended is the classic way to ship garbage.

Three kinds of edge with one shape of use:

* `Gloo…`: CPU tensors.
* `Staged…`: CUDA tensors over pinned host memory and gloo, where two stages share a GPU or kinds of device mix.
* `Nccl…`: GPU to GPU, one two-rank group per directed edge, waits on the stream and not on the host.

On GPUs a buffer is read and written by several streams. What holds for all of them: a ring is allocated once and lives
as long as its edge, so the allocator never gives its memory to others while a message is under way; and a buffer is
written again only behind the mark of the compute that read it last (`consumed`), or, where nobody says so, behind
everything that the compute stream was given until then.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist

from pipetune.bench.runtime.links.streams import Mark, SideStream


class Receiver(Protocol):
    """The receiving end of a directed edge."""

    depth: int

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive for the next message, whose shape is known."""

    def take(self) -> torch.Tensor:
        """Waits for the oldest receive posted. The tensor is valid until `depth` more are posted."""

    def consumed(self) -> None:
        """Says that all compute that reads the tensor taken last has been issued; sooner than anyone could guess."""


class Sender(Protocol):
    """The sending end of a directed edge."""

    def send(self, tensor: torch.Tensor) -> None:
        """Sends without waiting for the other side, unless `depth` sends are under way."""

    def drain(self) -> None:
        """Waits for every send under way."""


class _Ring:
    """`depth` flat buffers used in turn."""

    def __init__(self, depth: int, numel: int, dtype: torch.dtype, device: torch.device, *, pin: bool = False) -> None:
        self._buffers = [torch.empty(numel, dtype=dtype, device=device, pin_memory=pin) for _ in range(depth)]
        self._next = 0

    def view(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self.next(shape)[1]

    def next(self, shape: tuple[int, ...]) -> tuple[int, torch.Tensor]:
        """The next buffer in turn: its place, and so much of it as the shape needs."""
        place = self._next
        self._next = (place + 1) % len(self._buffers)
        return place, self._buffers[place][: torch.Size(shape).numel()].view(shape)


class _Marks:
    """Who reads the buffers of a ring on the compute stream, and until when."""

    def __init__(self, depth: int, side: SideStream) -> None:
        self._side = side
        self._consumed: list[Mark] = [None] * depth
        self._taken: int | None = None

    def take(self, place: int) -> None:
        """A buffer is about to be read."""
        self._taken = place

    def consumed(self) -> None:
        """All that reads the buffer taken last has been issued."""
        if self._taken is not None:
            self._consumed[self._taken] = self._side.mark()

    def free(self, place: int) -> Mark:
        """Behind this, the buffer may be written. Used once: what reads the buffer next is not known yet."""
        mark, self._consumed[place] = self._consumed[place], None
        return self._side.mark() if mark is None else mark


class GlooReceiver:
    """Receives CPU tensors."""

    def __init__(self, source: int, tag: int, *, depth: int, numel: int, dtype: torch.dtype) -> None:
        self.depth = depth
        self._source, self._tag = source, tag
        self._ring = _Ring(depth, numel, dtype, torch.device("cpu"))
        self._posted: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive into the next buffer of the ring."""
        tensor = self._ring.view(shape)
        work = dist.irecv(tensor, src=self._source, tag=self._tag)
        assert work is not None
        self._posted.append((work, tensor))

    def take(self) -> torch.Tensor:
        """Blocks until the oldest message is there."""
        work, tensor = self._posted.popleft()
        work.wait()
        return tensor

    def consumed(self) -> None:
        """Nothing to remember: on a CPU, compute has ended once it was issued."""


class DirectSender:
    """Sends tensors from where they lie, over gloo or NCCL; holds each until its send has ended.

    NCCL sends on a stream of its own, behind the compute that made the tensor, and its wait is one of the compute
    stream: the memory goes back to the allocator, which gives it to later work of that stream, and so never before the
    send has read it. With `depth` sends under way the stream is meant to wait: the stages behind are that far behind.
    """

    def __init__(self, destination: int, *, depth: int, tag: int = 0, group: dist.ProcessGroup | None = None) -> None:
        """
        Args:
            group: NCCL's, of the two ranks; None sends over gloo.
        """
        self._destination, self._depth, self._tag, self._group = destination, depth, tag, group
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Starts a send; waits for the oldest if `depth` are under way."""
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


class StagedReceiver:
    """Receives over gloo into pinned memory; a stream of its own copies to the GPU.

    Two rings, place for place: pinned buffers that gloo writes, and buffers on the GPU that the compute reads.
    """

    def __init__(
        self, source: int, tag: int, *, depth: int, numel: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.depth = depth
        self._source, self._tag = source, tag
        self._host = _Ring(depth, numel, dtype, torch.device("cpu"), pin=True)
        self._device = _Ring(depth, numel, dtype, device)
        self._side = SideStream(device)
        self._marks = _Marks(depth, self._side)
        self._copied: list[Mark] = [None] * depth
        self._posted: deque[tuple[dist.Work, int, torch.Tensor]] = deque()

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive into the next pinned buffer, once the copy that read it last has ended.

        gloo writes from a thread of the host, which no stream orders: the host itself must know that the copy is over.
        It was issued `depth` messages ago and waits for nothing but its own buffer: there is little to wait for.
        """
        place, tensor = self._host.next(shape)
        copied = self._copied[place]
        if copied is not None:
            copied.synchronize()
        work = dist.irecv(tensor, src=self._source, tag=self._tag)
        assert work is not None
        self._posted.append((work, place, tensor))

    def take(self) -> torch.Tensor:
        """Blocks until the oldest message is on the host; for its way to the GPU the compute stream alone waits."""
        work, place, staged = self._posted.popleft()
        work.wait()
        there, tensor = self._device.next(tuple(staged.shape))
        assert there == place
        with self._side.behind(self._marks.free(place)):
            tensor.copy_(staged, non_blocking=True)
            copied = self._side.mark()
        self._side.join(copied)
        self._copied[place] = copied
        self._marks.take(place)
        return tensor

    def consumed(self) -> None:
        """Marks the point of the compute stream behind which the buffer taken last may be written again."""
        self._marks.consumed()


class StagedSender:
    """Copies to pinned memory, waits for that copy alone, then sends over gloo."""

    def __init__(self, destination: int, tag: int, *, depth: int, numel: int, dtype: torch.dtype) -> None:
        # One buffer more than may be under way: the copy goes into one that no send reads.
        self._ring = _Ring(depth + 1, numel, dtype, torch.device("cpu"), pin=True)
        self._gloo = DirectSender(destination, depth=depth, tag=tag)

    def send(self, tensor: torch.Tensor) -> None:
        """Blocks for the copy to the host, not for the send."""
        staged = self._ring.view(tuple(tensor.shape))
        staged.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        copied.synchronize()
        self._gloo.send(staged)

    def drain(self) -> None:
        """Waits for every send under way."""
        self._gloo.drain()


class NcclReceiver:
    """Receives GPU tensors on a group of two ranks; `take` makes the stream wait, not the host."""

    def __init__(
        self,
        source: int,
        group: dist.ProcessGroup,
        *,
        depth: int,
        numel: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.depth = depth
        self._source, self._group = source, group
        self._ring = _Ring(depth, numel, dtype, device)
        self._side = SideStream(device)
        self._marks = _Marks(depth, self._side)
        self._posted: deque[tuple[dist.Work, int, torch.Tensor]] = deque()

    def post(self, shape: tuple[int, ...]) -> None:
        """Queues a receive behind the compute that used this buffer last, and behind no other.

        NCCL's own stream waits for the stream that is current when the receive is issued. Were that the compute stream,
        the receive would wait for whatever was given to it since, such as its wait for tokens.
        """
        place, tensor = self._ring.next(shape)
        with self._side.behind(self._marks.free(place)):
            work = dist.irecv(tensor, src=self._source, group=self._group)
        assert work is not None
        self._posted.append((work, place, tensor))

    def take(self) -> torch.Tensor:
        """Makes the compute stream wait for the oldest message."""
        work, place, tensor = self._posted.popleft()
        work.wait()
        self._marks.take(place)
        return tensor

    def consumed(self) -> None:
        """Marks the point of the compute stream behind which the buffer taken last may be written again."""
        self._marks.consumed()
