"""GPUs as CUDA numbers them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.machine.nvml import visible_indices

UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (0, 1, 2, 3)),
        ("", ()),
        ("2,0", (2, 0)),
        (" 1 , 3 ", (1, 3)),
        ("0,-1,1", (0,)),
        ("0,9,1", (0,)),
        ("GPU-bb,GPU-aa22", (2, 1)),
        ("GPU-aa", ()),
        ("GPU-zz", ()),
        ("1,GPU-aa22", ()),
        ("none", ()),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, expected: tuple[int, ...]) -> None:
    assert visible_indices(visible, UUIDS) == expected


@given(st.permutations(range(len(UUIDS))), st.integers(0, len(UUIDS)))
def test_visible_devices_by_index_and_by_uuid_agree(order: list[int], count: int) -> None:
    chosen = order[:count]
    by_index = visible_indices(",".join(map(str, chosen)), UUIDS)
    assert by_index == tuple(chosen) == visible_indices(",".join(UUIDS[index] for index in chosen), UUIDS)
