"""From an exception in a worker to a failure that names its kind and the remedy."""

import re
import traceback

from pipetune.bench.errors import UserError
from pipetune.bench.record import REMEDIES, Failure, FailureKind

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory|CU\w+_STATUS_ALLOC_FAILED", re.I
)
_SIZE = r"([\d.]+) ?(bytes|KiB|MiB|GiB)"
_WANTED = re.compile(rf"tried to allocate {_SIZE}", re.I)
_FREE = re.compile(rf"of which {_SIZE} is free", re.I)
_ALLOWED = re.compile(rf"{_SIZE} allowed;.*?allocated memory {_SIZE} is allocated", re.I | re.S)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LOST_GPU = re.compile(
    r"(CUDA error|Cuda failure).*(unspecified launch failure|uncorrectable|hardware|timed out|unknown error"
    r"|busy or unavailable|no CUDA-capable device|is lost|Xid)",
    re.I,
)
"""What CUDA, or NCCL in its name, says of a GPU that fell out; the process cannot use it again."""
_LOST_PEER = re.compile(r"Connection (closed|reset)|peer|Broken pipe|gloo|NCCL", re.I)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: CUDA's allocator, the CPU's, or Python's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_OUT_OF_MEMORY.search(str(error)))


def failure_of(error: BaseException, *, stage: int | None, device: str | None, phase: str) -> Failure:
    """Names what went wrong; `device` is None where it may be any of those that the unsplit model lies on."""
    kind = FailureKind.WORKER_ERROR
    if is_out_of_memory(error):
        kind = FailureKind.OUT_OF_MEMORY
    elif isinstance(error, RuntimeError) and _LOST_GPU.search(str(error)):
        kind = FailureKind.WORKER_DIED
    elif isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
        # Another worker went away while this one talked to it: a consequence, never the cause.
        kind = FailureKind.COMMUNICATION_TIMEOUT
    elif isinstance(error, UserError | ValueError):
        kind = FailureKind.UNSUPPORTED_MODEL
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    where = f"stage {stage} on {device}" if stage is not None else f"worker on {device}"
    where = where if device is not None else "the unsplit model on several GPUs"
    # A user's error says itself what to do.
    remedy = "" if isinstance(error, UserError) else f"; {REMEDIES[kind]}"
    wanted = _WANTED.search(str(error))
    return Failure(
        kind=kind,
        stage=stage,
        device=device,
        phase=phase,
        message=first_line if isinstance(error, UserError) else f"{where}, {phase}: {first_line}{remedy}",
        bytes_wanted=_bytes(wanted[1], wanted[2]) if wanted else None,
        bytes_had=_bytes_had(str(error)),
        detail="".join(traceback.format_exception(error))[-4000:],
    )


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit.lower()])


def _bytes_had(text: str) -> int | None:
    """What was left: free on the GPU, or under the process's own limit if that is less; the CPU does not say."""
    free, allowed = _FREE.search(text), _ALLOWED.search(text)
    left = [_bytes(free[1], free[2])] if free else []
    if allowed:
        left.append(max(0, _bytes(allowed[1], allowed[2]) - _bytes(allowed[3], allowed[4])))
    return min(left, default=None)
