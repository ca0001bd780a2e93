"""NVML, tamed: the GPUs that CUDA would show this process, in CUDA's numbering, and reads that may fail quietly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pynvml


@contextmanager
def nvml_session() -> Iterator[bool]:
    """Opens NVML for a while; gives False where there is no driver. Sessions nest."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> dict[int, Any]:
    """NVML handles by CUDA index, `CUDA_VISIBLE_DEVICES` respected; call it within a session.

    NVML counts in PCI order, which is CUDA's own where all GPUs are alike or `CUDA_DEVICE_ORDER=PCI_BUS_ID` is set.
    """
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(read(pynvml.nvmlDeviceGetCount) or 0)]
    uuids = [text(read(pynvml.nvmlDeviceGetUUID, handle)) for handle in handles]
    chosen = visible_indices(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
    return {number: handles[index] for number, index in enumerate(chosen)}


def visible_indices(visible: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """Which GPUs `CUDA_VISIBLE_DEVICES` leaves, in its order.

    As CUDA reads it: entries are indices or beginnings of UUIDs; the first one that fits no GPU, or more than one,
    ends the list, and a GPU named twice empties it.

    Args:
        visible: the variable; None where it is not set.
        uuids: of all GPUs, in NVML's order.
    """
    if visible is None:
        return tuple(range(len(uuids)))
    chosen: list[int] = []
    for entry in visible.split(","):
        entry = entry.strip()
        if entry.isdecimal():
            matches = [int(entry)] if int(entry) < len(uuids) else []
        else:
            matches = [index for index, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        if matches[0] in chosen:
            return ()
        chosen.append(matches[0])
    return tuple(chosen)


def read(function: Callable[..., Any], *args: Any) -> Any:
    """What an NVML function says, or None where the GPU or the driver has no answer."""
    try:
        return function(*args)
    except pynvml.NVMLError:
        return None


def text(value: str | bytes | None) -> str:
    """NVML's strings are bytes in some versions."""
    return value.decode() if isinstance(value, bytes) else value or ""
