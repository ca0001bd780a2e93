"""From an exception in a worker to a failure that names its kind and the knob to turn."""

from __future__ import annotations

import re
import traceback

from bench.errors import UserError
from bench.record import Failure, FailureKind

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.I)
_WANTED = re.compile(r"(?:tried to allocate|you tried to allocate) ([\d.]+) ?(bytes|KiB|MiB|GiB)", re.I)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LOST_PEER = re.compile(r"Connection (closed|reset)|peer|Broken pipe|gloo|NCCL", re.I)

KNOBS = {
    FailureKind.OUT_OF_MEMORY: (
        "give this stage fewer layers, use smaller micro-batches, or let fewer be in flight by memory_fraction"
    ),
    FailureKind.COMMUNICATION_TIMEOUT: "see the other stages' logs: one of them stopped answering",
    FailureKind.UNSUPPORTED_MODEL: "choose another model or another cut",
    FailureKind.WORKER_ERROR: "see the traceback in the detail and in the worker's log",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA's allocator, the CPU's, or Python's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))


def is_lost_peer(error: BaseException) -> bool:
    """Whether another worker went away while this one talked to it: a consequence, never the cause."""
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))


def failure_of(error: BaseException, *, stage: int | None, device: str | None, phase: str) -> Failure:
    """Names what went wrong."""
    kind = FailureKind.WORKER_ERROR
    if is_out_of_memory(error):
        kind = FailureKind.OUT_OF_MEMORY
    elif is_lost_peer(error):
        kind = FailureKind.COMMUNICATION_TIMEOUT
    elif isinstance(error, UserError | ValueError):
        kind = FailureKind.UNSUPPORTED_MODEL
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    where = f"stage {stage} on {device}" if stage is not None else f"worker on {device}"
    # A user's error says itself what to do.
    knob = "" if isinstance(error, UserError) else f"; {KNOBS[kind]}"
    wanted = _WANTED.search(str(error))
    return Failure(
        kind=kind,
        stage=stage,
        device=device,
        phase=phase,
        message=first_line if isinstance(error, UserError) else f"{where}, {phase}: {first_line}{knob}",
        bytes_wanted=int(float(wanted[1]) * _UNITS[wanted[2].lower()]) if wanted else None,
        detail="".join(traceback.format_exception(error))[-4000:],
    )
