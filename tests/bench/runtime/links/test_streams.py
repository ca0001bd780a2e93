"""Side streams: nothing on a CPU, and on a GPU an order that marks alone make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipetune.bench.runtime.links.streams import SideStream, to_device


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
