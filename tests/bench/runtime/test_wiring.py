"""Which transport lies between which devices, and in a word for a whole plan."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipetune.bench.runtime.wiring import COMMUNICATOR_BYTES, MAX_CTAS, Links, communicators_bytes

DEVICES = ("cpu:0", "cpu:1", "cuda:0", "cuda:1", "cuda:0")


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [
        ((0,), "local"),
        ((2,), "local"),
        ((0, 1), "gloo"),
        ((2, 3), "nccl"),
        ((2, 4), "gloo+staging"),
        ((0, 2), "gloo+staging"),
        ((2, 3, 4), "nccl"),
        ((0, 1, 2, 3), "gloo, gloo+staging, nccl"),
    ],
)
def test_devices_decide_the_transport(ranks: tuple[int, ...], kind: str) -> None:
    assert Links(DEVICES, 0, torch.device("cpu")).kind(ranks) == kind


@pytest.mark.parametrize("to_all", [False, True])
def test_tokens_go_where_they_are_of_use(to_all: bool) -> None:
    devices, cpu = ("cpu:0", "cpu:1", "cpu:2", "cpu:3"), torch.device("cpu")
    sizes: dict[str, Any] = {"hidden_numel": 1, "hidden_dtype": torch.float32, "tokens_numel": 1, "tokens_depth": 1}
    for ranks in ((3, 0, 2, 1), (1, 0), (2,)):
        edges = {rank: Links(devices, rank, cpu).edges(ranks, **sizes, tokens_to_all=to_all) for rank in ranks}
        told = [rank for rank, one in edges.items() if one is not None and one.tokens_in is not None]
        assert told == list(ranks[:-1] if to_all else ranks[:-1][:1])
        last = edges[ranks[-1]]
        assert last is not None
        assert [sender._destination for sender in last.tokens_out] == told


def test_memory_is_left_for_communicators_with_other_gpus_alone() -> None:
    left = [communicators_bytes(DEVICES, name) // COMMUNICATOR_BYTES for name in DEVICES]
    assert left == [0, 0, 2, 4, 2]
    assert communicators_bytes(("cuda:0", "cuda:0", "cpu:0"), "cuda:0") == 0


def test_communicators_are_few_and_those_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, int]] = []
    closed: list[tuple[int, int]] = []

    def options(is_high_priority_stream: bool) -> Any:
        assert is_high_priority_stream
        return SimpleNamespace(config=SimpleNamespace(max_ctas=0))

    def new_group(ranks: list[int], *, backend: str, timeout: object, pg_options: Any) -> tuple[int, int]:
        assert (backend, pg_options.config.max_ctas) == ("nccl", MAX_CTAS)
        opened.append((ranks[0], ranks[1]))
        return opened[-1]

    kind = SimpleNamespace(Options=options)
    monkeypatch.setattr("torch.distributed.ProcessGroupNCCL", kind, raising=False)
    monkeypatch.setattr("torch.distributed.new_group", new_group)
    monkeypatch.setattr("torch.distributed.destroy_process_group", closed.append)
    devices = (*(f"cuda:{number}" for number in range(4)), "cpu:0")
    # A rank without a stage takes part in opening and closing alone.
    links = Links(devices, 4, torch.device("cpu"))
    sizes: dict[str, Any] = {"hidden_numel": 1, "hidden_dtype": torch.float32, "tokens_numel": 1, "tokens_depth": 1}
    for to_all, ranks in itertools.product((True, False), itertools.permutations(range(4))):
        links.edges(ranks, **sizes, tokens_to_all=to_all)
        there = set(links._groups)
        told = ranks[:-1] if to_all else ranks[:1]
        assert {*itertools.pairwise(ranks), *((ranks[-1], rank) for rank in told)} <= there
        assert len(there) <= 2 * len(devices)
    assert closed
    assert len(opened) - len(closed) == len(links._groups)
