"""Folders that are built once and then kept: whole or not there, safe against a killed or concurrent build."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

CACHE_VARIABLE = "PIPETUNE_CACHE"


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


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
