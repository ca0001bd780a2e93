"""What the GPUs of a stubbed machine are and do, as values that every process reads from one file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from pipetune.bench.spec import Value

VARIABLE = "PIPETUNE_STUB_GPUS"
"""Names the file; tests may write it anew while workers run."""
GIB = 2**30


class StubGpu(Value):
    """One GPU."""

    name: str = "NVIDIA H100 80GB HBM3"
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    memory_bytes: int = 80 * GIB
    speed: int = 1
    """Where CUDA orders by speed, the larger comes first."""
    throttle_mask: int = 0
    ecc_errors: int | None = 0
    foreign_pids: tuple[int, ...] = ()
    mig_uuids: tuple[str, ...] = ()
    """Where MIG is on: of its instances, in order."""
    is_lost: bool = False
    """To NVML."""
    fault: str | None = None
    """What CUDA says of whatever is asked of it; None while it works."""

    def instance(self, index: int) -> StubGpu:
        """One of its MIG instances, half of it."""
        return StubGpu(name=f"{self.name} MIG 3g.40gb", uuid=self.mig_uuids[index], memory_bytes=self.memory_bytes // 2)


class StubMachine(Value):
    """All GPUs in the order of the bus, and how slow their contexts are."""

    gpus: tuple[StubGpu, ...]
    context_s: int = 0
    """Seconds for which claiming a device holds the interpreter's lock, as loading every kernel does."""

    @classmethod
    def alike(cls, count: int, **rest: int) -> Self:
        """So many equal ones."""
        return cls(gpus=tuple(StubGpu(uuid=f"GPU-{number:08d}") for number in range(count)), **rest)

    def altered(self, index: int, **values: object) -> Self:
        """The same with other values of one GPU."""
        gpus = list(self.gpus)
        gpus[index] = StubGpu.model_validate({**gpus[index].model_dump(), **values})
        return self.model_copy(update={"gpus": tuple(gpus)})

    @classmethod
    def read(cls) -> Self:
        """What the file says now."""
        return cls.model_validate_json(Path(os.environ[VARIABLE]).read_text(encoding="utf-8"))

    def write(self, path: Path) -> None:
        """Replaces the file at once: others read it at any time."""
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(self.model_dump_json(), encoding="utf-8")
        scratch.replace(path)

    def in_cuda_order(self, environment: Mapping[str, str] = os.environ) -> tuple[StubGpu, ...]:
        """The GPUs that CUDA would show, by its own rules for `CUDA_DEVICE_ORDER` and `CUDA_VISIBLE_DEVICES`.

        Written apart from the product's reading of them, which it is held against.
        """
        ordered = list(self.gpus)
        if environment.get("CUDA_DEVICE_ORDER", "FASTEST_FIRST") != "PCI_BUS_ID":
            ordered.sort(key=lambda gpu: -gpu.speed)
        wanted = environment.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return _first_instance(ordered)
        seen: list[StubGpu] = []
        for entry in map(str.strip, wanted.split(",")):
            if entry.startswith("MIG-"):
                parts = [gpu.instance(index) for gpu in ordered for index in range(len(gpu.mig_uuids))]
                return tuple(part for part in parts if part.uuid == entry)
            known = [gpu for gpu in ordered if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
            if entry.isdecimal():
                known = ordered[int(entry) : int(entry) + 1]
            if len(known) != 1:
                break
            seen += known
        return _first_instance(seen) if len({gpu.uuid for gpu in seen}) == len(seen) else ()


def _first_instance(gpus: Sequence[StubGpu]) -> tuple[StubGpu, ...]:
    """Of GPUs among which one is split CUDA shows an instance and nothing beside it."""
    split = [gpu.instance(0) for gpu in gpus if gpu.mig_uuids]
    return tuple(split[:1] or gpus)
