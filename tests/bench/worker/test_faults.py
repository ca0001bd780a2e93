"""What an exception in a worker is called, and what is read from its words."""

from __future__ import annotations

import pytest

from pipetune.bench.record import FailureKind
from pipetune.bench.worker.faults import failure_of

GIB, MIB = 2**30, 2**20
CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.81 GiB of which {free} is "
    "free. Including non-PyTorch memory, this process has 9.50 GiB memory in use. {allowed}Of the allocated memory "
    "8.75 GiB is allocated by PyTorch, and 256.00 MiB is reserved by PyTorch but unallocated."
)


@pytest.mark.parametrize(
    ("text", "wanted", "had"),
    [
        (CUDA.format(free="12.00 MiB", allowed=""), 20 * MIB, 12 * MIB),
        (CUDA.format(free="130.00 GiB", allowed="9.00 GiB allowed; "), 20 * MIB, GIB // 4),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", 4096, None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None, None),
    ],
)
def test_out_of_memory_tells_the_bytes_wanted_and_had(text: str, wanted: int | None, had: int | None) -> None:
    failure = failure_of(RuntimeError(text), stage=1, device="cuda:1", phase="load")
    assert failure.kind is FailureKind.OUT_OF_MEMORY
    assert (failure.bytes_wanted, failure.bytes_had) == (wanted, had)
    assert failure.message.startswith("stage 1 on cuda:1, load: ")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA error: unspecified launch failure\nCompile with", FailureKind.WORKER_DIED),
        ("CUDA error: uncorrectable ECC error encountered", FailureKind.WORKER_DIED),
        ("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error", FailureKind.WORKER_DIED),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", FailureKind.WORKER_DIED),
        (
            "NCCL error in: x.cpp:7, unhandled cuda error\nCuda failure 719 'unspecified launch failure'",
            FailureKind.WORKER_DIED,
        ),
        # What the peers of a lost GPU say, and what the software's own faults are.
        (
            "NCCL error in: x.cpp:7, remote process exited or there was a network error",
            FailureKind.COMMUNICATION_TIMEOUT,
        ),
        ("CUDA error: an illegal memory access was encountered", FailureKind.WORKER_ERROR),
        ("CUDA error: device-side assert triggered", FailureKind.WORKER_ERROR),
        ("CUDA error: no kernel image is available for execution on the device", FailureKind.WORKER_ERROR),
        ("shapes differ: an unspecified launch failure is no matter of theirs", FailureKind.WORKER_ERROR),
    ],
)
def test_a_gpu_that_fell_out_is_told_from_faults_of_software(text: str, kind: FailureKind) -> None:
    failure = failure_of(RuntimeError(text), stage=1, device="cuda:1", phase="measure")
    assert failure.kind is kind
    assert failure.lost_device == ("cuda:1" if kind is FailureKind.WORKER_DIED else None)
    assert failure.message.startswith("stage 1 on cuda:1, measure: ")
