"""Locks that name their holder: one study a folder, one study at a time on each GPU."""

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from pipetune.bench.errors import StudyError
from pipetune.bench.files import read_text, write_durably
from pipetune.bench.record import GpuInfo
from pipetune.bench.spec import device_index, device_kind


@contextlib.contextmanager
def hold(path: Path, what: str, *, remedy: str) -> Iterator[None]:
    """Holds a lock until the block or the process ends, and writes beside it who holds it; the file at `path` stays.
    Who does not get it gets a StudyError that names what is locked, who holds it, and a remedy."""
    lock = FileLock(path, blocking=False)
    holder = path.with_name(f"{path.name}.holder")
    try:
        lock.acquire()
    except Timeout:
        try:
            who = read_text(holder).strip()
        except (OSError, UnicodeDecodeError):
            who = "another process"
        raise StudyError(f"{what} is in use by {who}; {remedy}") from None
    try:
        write_durably(holder, f"pid {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def hold_gpus(devices: Sequence[str], gpus: Sequence[GpuInfo]) -> Iterator[None]:
    """Holds the devices' GPUs by UUID, for this user; StudyError where another study has one. CPUs need no lock."""
    used = sorted({device_index(device) for device in devices if device_kind(device) == "cuda"})
    remedy = "two studies on one GPU would spoil each other: wait for it, or take other devices"
    with contextlib.ExitStack() as stack:
        # In the order of UUIDs, so that two studies cannot each hold what the other waits for.
        for index in sorted(used, key=lambda index: gpus[index].uuid):
            name = gpus[index].uuid or f"cuda-{index}"
            path = _runtime_folder() / f"{name.replace('/', '_')}.lock"
            stack.enter_context(hold(path, f"cuda:{index} ({name})", remedy=remedy))
        yield


def _runtime_folder() -> Path:
    """A folder of this user's own, where locks outlive no reboot."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "pipetune" if base else Path(tempfile.gettempdir()) / f"pipetune-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise StudyError(f"{folder} belongs to somebody else or is writable by others; remove it, it holds our locks")
    return folder
