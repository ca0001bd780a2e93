"""Rings and sends: a buffer is used again only when nobody needs what it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipetune.bench.runtime.links import transport
from pipetune.bench.runtime.links.transport import DirectSender


class Work:
    """A send under way."""

    def __init__(self, waited: list[int], number: int) -> None:
        self._waited, self._number = waited, number

    def wait(self) -> None:
        """Notes that it was waited for."""
        self._waited.append(self._number)


def test_a_send_waits_for_the_oldest_where_the_ring_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[torch.Tensor, dict[str, Any]]] = []
    waited: list[int] = []

    def isend(tensor: torch.Tensor, **given: Any) -> Work:
        sent.append((tensor, given))
        return Work(waited, len(sent) - 1)

    monkeypatch.setattr("torch.distributed.isend", isend)
    sender = DirectSender(1, depth=2, tag=7)
    for number in range(3):
        sender.send(torch.full((2, 3), float(number)).T)
        assert waited == list(range(max(0, number - 1)))
    assert all(tensor.is_contiguous() for tensor, _ in sent)
    assert sent[0][1] == {"dst": 1, "group": None, "tag": 7}
    sender.drain()
    assert waited == [0, 1, 2]


def test_a_ring_gives_its_buffers_in_turn() -> None:
    ring = transport._Ring(2, 6, torch.float32, torch.device("cpu"))
    first, second = ring.view((2, 3)), ring.view((1, 4))
    assert (first.shape, second.shape) == ((2, 3), (1, 4))
    assert first.data_ptr() != second.data_ptr()
    assert ring.view((6,)).data_ptr() == first.data_ptr()
