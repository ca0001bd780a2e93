"""A stream beside the compute stream, for copies and messages; none on a CPU, where work ends before its call returns.

A mark is a point of a stream: the work issued there so far. Work put behind a mark starts when that work is done, and
not, as it would on the compute stream itself, when everything is done that was issued meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

Mark = torch.cuda.Event | None
"""None on a CPU."""


class SideStream:
    """A second stream of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # Streams come from pools that are used in turn, one pool a priority. NCCL's come from another one: were
            # this stream one of those, a receive would wait for the sends there.
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to a device; to a GPU from pinned memory, so that the host does not wait for it.

    The pinned copy may be let go at once: its allocator keeps it until the stream has read it.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
