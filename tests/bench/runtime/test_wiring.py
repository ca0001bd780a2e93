"""Which transport lies between which devices, and in a word for a whole plan."""

from __future__ import annotations

import pytest
import torch

from pipetune.bench.runtime.wiring import Links

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
