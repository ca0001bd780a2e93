"""How much of a checkpoint each rank reads, against its share: `python -m tests.bench.runtime.stage.bytes_read --help`.

Every stage is loaded by a process of its own, as in a fleet, after the checkpoint was put out of the page cache.
Three measures, from the surest to the nearest to the metal:

- *taken*: bytes of the tensors that transformers took out of the files. Headers apart, nothing else is read on purpose.
- *from disk*: pages of the files that are in the page cache afterwards (`mincore`). Beyond what is taken that is the
  kernel's read-ahead, for every stretch of tensors that lie side by side (`/sys/block/*/queue/read_ahead_kb`).
- *peak*: growth of the process's resident memory (`VmHWM`), mapped pages of the files included.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from pipetune.bench.models.checkpoint import weight_files
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.spec import Dtype, ModelSpec

ROOT = Path(__file__).parents[4]


class RankRead(pydantic.BaseModel):
    """What one rank read."""

    layers: tuple[int, int]
    share_bytes: int
    """Parameters of the stage, in the checkpoint's dtype."""
    taken_bytes: int
    taken: tuple[str, ...]
    """Names of the tensors in the checkpoint."""
    disk_bytes: int | None
    """None where the files could not be put out of the page cache."""
    peak_bytes: int
    weights_bytes: int
    """What the stage holds, in its own dtype."""


def read_by_ranks(model: str, counts: Sequence[int], *, dtype: Dtype = "float32") -> tuple[RankRead, ...]:
    """Loads every stage in a process of its own, one after the other.

    Args:
        model: a name or folder.
        counts: layers of each stage.
    """
    reads = []
    first = 0
    for index, count in enumerate(counts):
        command = [sys.executable, "-m", "tests.bench.runtime.stage.bytes_read", "--model", model, "--dtype", dtype]
        command += ["--stage", f"{first},{first + count},{int(index == 0)},{int(index == len(counts) - 1)}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        reads.append(RankRead.model_validate_json(result.stdout.splitlines()[-1]))
        first += count
    return tuple(reads)


def table(reads: Sequence[RankRead], checkpoint_bytes: int) -> str:
    """For people, in Markdown."""
    lines = ["| rank | layers | share MiB | taken | from disk | peak memory |", "|---|---|---|---|---|---|"]
    for rank, read in enumerate(reads):
        disk = "–" if read.disk_bytes is None else _of(read.disk_bytes, read.share_bytes)
        lines.append(
            f"| {rank} | {read.layers[0]}–{read.layers[1] - 1} | {_mib(read.share_bytes)} "
            f"| {_of(read.taken_bytes, read.share_bytes)} | {disk} | {_of(read.peak_bytes, read.share_bytes)} |"
        )
    lines.append(f"\nMiB, and × of the share; the checkpoint has {_mib(checkpoint_bytes)} MiB.")
    return "\n".join(lines)


def _of(size: int, share: int) -> str:
    return f"{_mib(size)} ({size / share:.2f}×)"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _load_stage(model: str, dtype: Dtype, first: int, end: int, *, is_first: bool, is_last: bool) -> RankRead:
    """In the rank's own process."""
    import torch
    from transformers import modeling_utils

    from pipetune.bench.runtime.stage.stage import Stage

    resolved = resolve_model(ModelSpec(name=model, dtype=dtype))
    files = weight_files(resolved.folder)
    sizes = {name: size for file in files for name, size in _tensor_sizes(file).items()}
    stage = Stage(resolved, torch.device("cpu"))
    taken: set[str] = set()
    loader: Any = modeling_utils
    loader.safe_open = recording(loader.safe_open, taken)
    for file in files:
        _evict(file)
    cold = not any(_cached_bytes(file) for file in files)
    peak_before = _reset_peak()
    stage.assign(first, end, is_first=is_first, is_last=is_last)
    with torch.inference_mode():
        # Without a change of dtype tensors stay in the mapped file until they are first used.
        for parameter in stage.model.parameters():
            parameter.sum()
    peak = _status("VmHWM") - peak_before
    cached = sum(_cached_bytes(file) for file in files)
    parameters = {id(parameter): parameter for parameter in stage.model.parameters()}.values()
    stored = torch.float32 if not taken else _dtype_of(files)
    return RankRead(
        layers=(first, end),
        share_bytes=sum(parameter.numel() for parameter in parameters) * stored.itemsize,
        taken_bytes=sum(sizes[name] for name in taken),
        taken=tuple(sorted(taken)),
        disk_bytes=cached if cold else None,
        peak_bytes=peak,
        weights_bytes=sum(parameter.nbytes for parameter in parameters),
    )


def recording(real: Any, taken: set[str]) -> Any:
    """`safe_open` that notes which tensors are taken out of a file, not only looked up."""

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self._name, self._inner = name, inner

        def __getitem__(self, index: Any) -> Any:
            taken.add(self._name)
            return self._inner[index]

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    class Opened:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._inner = real(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._inner.get_slice(name))

        def get_tensor(self, name: str) -> Any:
            taken.add(name)
            return self._inner.get_tensor(name)

        def __enter__(self) -> Any:
            self._inner.__enter__()
            return self

        def __exit__(self, *info: object) -> None:
            self._inner.__exit__(*info)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    return Opened


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _tensor_sizes(file: Path) -> dict[str, int]:
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in _header(file).items()}


def _dtype_of(files: Sequence[Path]) -> Any:
    import torch

    kinds = {entry["dtype"] for file in files for entry in _header(file).values()}
    assert len(kinds) == 1, f"the checkpoint mixes {kinds}"
    return {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[kinds.pop()]


def _evict(file: Path) -> None:
    """Puts a file out of the page cache, unless its file system or another process keeps it there."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cached_bytes(file: Path) -> int:
    """How much of a file is in the page cache."""
    size = file.stat().st_size
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as mapped,
    ):
        view = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), pages)
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return mmap.PAGESIZE * sum(page & 1 for page in pages)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _reset_peak() -> int:
    """Forgets the peak so far; gives the resident memory of now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.runtime.stage.bytes_read", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--counts", default="", help="layers of each stage, as in 17,13")
    parser.add_argument("--stage", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        first, end, is_first, is_last = (int(part) for part in args.stage.split(","))
        read = _load_stage(args.model, args.dtype, first, end, is_first=bool(is_first), is_last=bool(is_last))
        print(read.model_dump_json())
        return
    counts = tuple(int(part) for part in args.counts.split(","))
    files = weight_files(resolve_model(ModelSpec(name=args.model)).folder)
    reads = read_by_ranks(args.model, counts, dtype=args.dtype)
    print(table(reads, sum(file.stat().st_size for file in files)))


if __name__ == "__main__":
    main()
