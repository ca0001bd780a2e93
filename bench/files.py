"""Files and folders that are whole or not there, even if their writer is killed or the machine dies."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

CACHE_VARIABLE = "PIPETUNE_CACHE"
"""The environment variable that names another cache folder."""


_MOST_BYTES = 2**30
"""More than any file of ours has."""
_SCRATCH, _MARK = "pipetune-", ".pipetune-scratch"


def cache_root() -> Path:
    """The user's cache folder for pipetune; the environment variable `PIPETUNE_CACHE` names another."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else platformdirs.user_cache_path("pipetune")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, which goes at the end of the block; what killed processes left of theirs goes before it.

    Its mark holds the folder's name and this boot of the host, and is locked as long as its process lives, whichever
    namespace of processes that is in. What lacks such a mark, or whose lock is held, is somebody else's.
    """
    boot = _boot()
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError, ValueError):
            mark = folder / _MARK
            if folder.is_symlink() or mark.is_symlink() or not mark.is_file() or mark.stat().st_uid != os.getuid():
                continue
            with mark.open("r+", encoding="utf-8") as file:
                if file.read() == f"{folder.name} {boot}":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as name:
        own = Path(name)
        with (own / _MARK).open("x", encoding="utf-8") as file:
            # A file system without locks keeps what a killed process leaves.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(f"{own.name} {boot}")
                file.flush()
            yield own


def _boot() -> str:
    """The host's boot: processes of another host, which may share the folder, can hold locks that this one misses."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def build_once(folder: Path, build: Callable[[Path], None], *, on_wait: Callable[[], None] | None = None) -> Path:
    """Returns `folder`, and builds it first if it is not there.

    The work happens in a hidden folder beside it, which is renamed once everything is on disk: whoever finds
    `folder` finds it whole. A lock lets one process build while others wait; the kernel frees it when its holder
    dies, and whoever holds it next clears what the dead one left.

    `build` fills the empty folder it is given; `on_wait` is called once if another process is building. OSError where
    the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait()
        held = lock.acquire()
    with held:
        if folder.is_dir():
            return folder
        stem = f".{folder.name}.partial-"
        for stale in folder.parent.glob(f"{stem}*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = folder.with_name(stem + secrets.token_hex(8))
        partial.mkdir()
        try:
            build(partial)
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder.parent)
    return folder


def read_text(path: Path) -> str:
    """The text of a regular file, or of a link to one; nothing else is waited for, or read without end.

    OSError for what cannot be read, a pipe, device or folder, or more than any file of ours has; UnicodeDecodeError for
    what is not UTF-8.
    """
    with open(path, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if found.st_size > _MOST_BYTES:
            raise OSError(errno.EFBIG, f"has {found.st_size} bytes, more than any file of ours", str(path))
        return file.read()


def write_durably(path: Path, text: str | bytes) -> None:
    """Writes a file that is either whole or not there, even if the machine dies: temporary name, fsync, replace.

    OSError names the file that cannot be written, or where something else is, such as a device, which is not replaced.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file, and is not replaced by one", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            # A full disk names no file, and others the temporary one.
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
