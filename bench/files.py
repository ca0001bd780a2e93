"""Files and folders that are whole or not there, even if their writer is killed or the machine dies."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

CACHE_VARIABLE = "PIPETUNE_CACHE"
"""The environment variable that names another cache folder."""


def cache_root() -> Path:
    """The user's cache folder for pipetune; the environment variable `PIPETUNE_CACHE` names another."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else platformdirs.user_cache_path("pipetune")


def build_once(folder: Path, build: Callable[[Path], None], *, on_wait: Callable[[], None] | None = None) -> Path:
    """Returns `folder`, and builds it first if it is not there.

    The work happens in a hidden folder beside it, which is renamed once everything is on disk: whoever finds
    `folder` finds it whole. A lock lets one process build while others wait; the kernel frees it when its holder
    dies, and whoever holds it next clears what the dead one left.

    Args:
        folder: where the result shall be.
        build: fills the empty folder it is given.
        on_wait: called once if another process is building.

    Raises:
        OSError: the cache cannot be written.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire()
    try:
        if folder.is_dir():
            return folder
        stem = f".{folder.name}.partial-"
        for stale in folder.parent.glob(f"{stem}*"):
            shutil.rmtree(stale, ignore_errors=True)
        partial = folder.with_name(stem + secrets.token_hex(8))
        partial.mkdir()
        try:
            build(partial)
            _sync_tree(partial)
            os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder.parent)
    finally:
        lock.release()
    return folder


def write_durably(path: Path, text: str) -> None:
    """Writes a file that is either whole or not there, even if the machine dies: temporary name, fsync, replace.

    Raises:
        OSError: it cannot be written; or there is something else than a file, such as a device, which is not replaced.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is no file, and is not replaced by one", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
