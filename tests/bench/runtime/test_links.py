"""Rings, sends and side streams: a buffer is used again only when nobody needs what it holds, and marks alone order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipetune.bench.runtime.links import Messages, Sender, SideStream, _Ring, to_device

MESSAGES = Messages(tag=7, depth=2, numel=6, dtype=torch.float32)


def test_on_a_cpu_work_is_done_where_it_is_called() -> None:
    side = SideStream(torch.device("cpu"))
    mark = side.mark()
    assert mark is None
    tensor = torch.zeros(3)
    with side.behind(mark):
        tensor.add_(1)
    side.join(mark)
    assert tensor.tolist() == [1, 1, 1]
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.gpu
def test_work_behind_a_mark_waits_for_it_and_for_nothing_else() -> None:
    device = torch.device("cuda", 0)
    side = SideStream(device)
    source, target = torch.zeros(1 << 20, device=device), torch.empty(1 << 20, device=device)
    sleep: Any = torch.cuda._sleep
    sleep(10_000_000)
    source.fill_(7)
    filled = side.mark()
    # Long work of the compute stream that the copy must not wait for.
    sleep(2_000_000_000)
    busy: Any = side.mark()
    with side.behind(filled):
        target.copy_(source)
        copied = side.mark()
    assert copied is not None
    copied.synchronize()
    assert not busy.query()
    side.join(copied)
    assert target.eq(7).all().item()


@pytest.mark.gpu
def test_a_copy_from_pinned_memory_arrives_whole() -> None:
    device = torch.device("cuda", 0)
    rows = [torch.full((1 << 16,), number) for number in range(20)]
    there = [to_device(row, device) for row in rows]
    assert all(bool(one.eq(number).all()) for number, one in enumerate(there))


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
    sender = Sender(1, MESSAGES)
    for number in range(3):
        sender.send(torch.full((2, 3), float(number)).T)
        assert waited == list(range(max(0, number - 1)))
    assert all(tensor.is_contiguous() for tensor, _ in sent)
    assert sent[0][1] == {"dst": 1, "group": None, "tag": 7}
    sender.drain()
    assert waited == [0, 1, 2]


def test_a_ring_gives_its_buffers_in_turn() -> None:
    ring = _Ring(2, MESSAGES, torch.device("cpu"))
    (_, first), (_, second) = ring.next((2, 3)), ring.next((1, 4))
    assert (first.shape, second.shape) == ((2, 3), (1, 4))
    assert first.data_ptr() != second.data_ptr()
    assert ring.next((6,))[1].data_ptr() == first.data_ptr()
