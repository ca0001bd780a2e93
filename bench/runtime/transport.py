"""Edges between stages: tensors of known shape, received into a ring of buffers posted ahead of the compute.

gloo sends meet their receive even when small, so receives are posted first and a send is waited for only when its
place in the ring is needed again. A tensor handed to `send` is held until then: a buffer that is written before its
send has ended is the classic way to ship garbage.

Three kinds of edge with one shape of use:

* `GlooEdge`: CPU tensors.
* `StagedEdge`: CUDA tensors over pinned host memory and gloo, where two stages share a GPU or kinds of device mix.
* `NcclEdge`: GPU to GPU, one two-rank group per directed edge, waits on the stream and not on the host.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist


class Receiver(Protocol):
    """The receiving end of a directed edge."""

    depth: int

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive for the next message, whose shape is known."""

    def take(self) -> torch.Tensor:
        """Waits for the oldest receive posted. The tensor is valid until `depth` more are posted."""


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
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        return buffer[: torch.Size(shape).numel()].view(shape)


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


class GlooSender:
    """Sends CPU tensors; holds each until its send has ended."""

    def __init__(self, destination: int, tag: int, *, depth: int) -> None:
        self._destination, self._tag, self._depth = destination, tag, depth
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Starts a send; waits for the oldest if the ring is full."""
        while len(self._under_way) >= self._depth:
            self._under_way.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self._destination, tag=self._tag)
        assert work is not None
        self._under_way.append((work, tensor))

    def drain(self) -> None:
        """Waits for every send under way."""
        while self._under_way:
            self._under_way.popleft()[0].wait()


class StagedReceiver:
    """Receives over gloo into pinned memory, then copies to the GPU."""

    def __init__(
        self, source: int, tag: int, *, depth: int, numel: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.depth = depth
        self._source, self._tag, self._device = source, tag, device
        self._ring = _Ring(depth, numel, dtype, torch.device("cpu"), pin=True)
        self._posted: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def post(self, shape: tuple[int, ...]) -> None:
        """Posts a receive into the next pinned buffer."""
        tensor = self._ring.view(shape)
        work = dist.irecv(tensor, src=self._source, tag=self._tag)
        assert work is not None
        self._posted.append((work, tensor))

    def take(self) -> torch.Tensor:
        """Blocks until the oldest message is on the GPU: its pinned buffer may be posted again at once."""
        work, tensor = self._posted.popleft()
        work.wait()
        return tensor.to(self._device)


class StagedSender:
    """Copies to pinned memory, waits for that copy alone, then sends over gloo."""

    def __init__(self, destination: int, tag: int, *, depth: int, numel: int, dtype: torch.dtype) -> None:
        # One buffer more than may be under way: the copy goes into one that no send reads.
        self._ring = _Ring(depth + 1, numel, dtype, torch.device("cpu"), pin=True)
        self._gloo = GlooSender(destination, tag, depth=depth)

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
        self._posted: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def post(self, shape: tuple[int, ...]) -> None:
        """Queues a receive behind the compute that used this buffer last."""
        tensor = self._ring.view(shape)
        work = dist.irecv(tensor, src=self._source, group=self._group)
        assert work is not None
        self._posted.append((work, tensor))

    def take(self) -> torch.Tensor:
        """Makes the compute stream wait for the oldest message."""
        work, tensor = self._posted.popleft()
        work.wait()
        return tensor


class NcclSender:
    """Sends GPU tensors on a group of two ranks; holds each until its send has ended."""

    def __init__(self, destination: int, group: dist.ProcessGroup, *, depth: int) -> None:
        self._destination, self._group, self._depth = destination, group, depth
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """Queues a send behind the compute that made the tensor.

        The wait for an older send is a wait of the compute stream, so that its memory, once given back to the
        allocator, is not written before the send has read it.
        """
        while len(self._under_way) >= self._depth:
            self._under_way.popleft()[0].wait()
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=self._destination, group=self._group)
        assert work is not None
        self._under_way.append((work, tensor))

    def drain(self) -> None:
        """Makes the compute stream wait for every send under way."""
        while self._under_way:
            self._under_way.popleft()[0].wait()
