"""NVML, tamed: the GPUs that CUDA would show this process, in CUDA's numbering, and reads that may fail quietly."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pynvml

_DEV = Path("/dev")


@contextmanager
def visible_gpus() -> Iterator[dict[int, Any]]:
    """Opens NVML for a while and gives its handles by CUDA index; none where there is no driver. Sessions nest.

    `CUDA_VISIBLE_DEVICES` is respected. NVML counts in PCI order, which is CUDA's own where all GPUs are alike or
    `CUDA_DEVICE_ORDER=PCI_BUS_ID` is set. The handle of a GPU that NVML cannot tell from others, or at all, is None.
    """
    with ExitStack() as stack:
        try:
            pynvml.nvmlInit()
            stack.callback(pynvml.nvmlShutdown)
            gpus = [read(pynvml.nvmlDeviceGetHandleByIndex, index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError:
            # A container may have GPUs without NVML.
            gpus = [None for _ in _DEV.glob("nvidia[0-9]*")]
        yield dict(enumerate(_visible(gpus)))


def _visible(gpus: Sequence[Any]) -> list[Any]:
    """Those of all GPUs that CUDA shows: of a split one its first MIG instance, and beside an instance nothing."""
    uuids = [read(pynvml.nvmlDeviceGetUUID, gpu) or "" for gpu in gpus]
    shown, blind = list(gpus), set()
    instances: dict[str, Any] = {}
    for index, gpu in enumerate(gpus):
        slots = read(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu)
        found = [read(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, slot) for slot in range(slots or 0)]
        for part in (part for part in reversed(found) if part is not None):
            of, share = read(pynvml.nvmlDeviceGetGpuInstanceId, part), read(pynvml.nvmlDeviceGetComputeInstanceId, part)
            shown[index] = instances[f"MIG-{uuids[index]}/{of}/{share}"] = part
            instances[read(pynvml.nvmlDeviceGetUUID, part) or ""] = part
        if not uuids[index]:
            blind.add("GPU-")
        if slots is None or (slots and shown[index] is gpu):
            blind.add("MIG-")
    chosen = visible_indices(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids, list(instances), tuple(blind))
    handles = [None if index is None else (*shown, *instances.values())[index] for index in chosen]
    return [handle for handle in handles if handle in instances.values()][:1] or handles


def visible_indices(
    visible: str | None, uuids: Sequence[str], instances: Sequence[str] = (), blind: tuple[str, ...] = ()
) -> tuple[int | None, ...]:
    """Which GPUs the variable `CUDA_VISIBLE_DEVICES` leaves, in its order; all where it is None, which is not set.

    As CUDA reads it: entries begin with an index, or are beginnings of names; the first one that fits no GPU, or more
    than one, ends the list, a GPU named twice empties it, and a MIG instance is shown alone. `uuids` are of all GPUs,
    in NVML's order; `instances` name MIG instances, which are counted on behind the GPUs; an entry that begins as one
    of `blind` may be right without being known, and is None.
    """
    if visible is None:
        return tuple(range(len(uuids)))
    chosen: list[int | None] = []
    for entry in map(str.strip, visible.split(",")):
        matches: list[int | None] = []
        if number := re.match(r"[+-]?\d+", entry):
            matches += [int(number[0])] if 0 <= int(number[0]) < len(uuids) else []
        elif entry.startswith(("GPU-", "MIG-")):
            matches += [index for index, name in enumerate((*uuids, *instances)) if name.startswith(entry)]
            matches = matches or ([None] if entry.startswith(blind) else [])
        if len(matches) != 1:
            break
        if matches[0] in chosen and matches[0] is not None:
            return ()
        if entry.startswith("MIG-"):
            return (matches[0],)
        chosen.append(matches[0])
    return tuple(chosen)


def read(function: Callable[..., Any], *args: Any) -> Any:
    """What an NVML function says, or None where the GPU or the driver has no answer, or the GPU is not known."""
    try:
        return None if None in args else function(*args)
    except pynvml.NVMLError:
        return None
