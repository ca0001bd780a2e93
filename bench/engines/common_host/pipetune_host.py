"""The host of an engine, commanded by JSON lines, and its guard. Knows nothing of pipetune.

Beside it, from before the engine is imported, a guard waits in a process of its own: once the driver or this process is
gone, it kills what is left of the session and removes its files, also those in /dev/shm.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

BEAT_S = 0.5
TRACKER_S = 1.0
_PR_SET_PDEATHSIG = 1
_SHM = "/dev/shm/"  # noqa: S108


def members(session: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdecimal() else []
        except OSError:
            continue
        if fields and fields[3] == str(session) and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def is_tracker(process: int) -> bool:
    """Whether it is what multiprocessing keeps account of shared files by."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def shared_files(processes: list[int]) -> set[Path]:
    """Files in shared memory that processes have mapped, and that still have a name."""
    found = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/maps").read_text().splitlines()
        except OSError:
            continue
        found |= {Path(line.split(maxsplit=5)[5]) for line in lines if _SHM in line and not line.endswith("(deleted)")}
    return found


def guard(driver: int, host: int, folder: str) -> int:
    """Waits for the end of the driver's pipe or of the host, and leaves nothing behind; the host's exit status."""
    status = None
    while status is None and not select.select([driver], [], [], 0.1)[0]:
        ended, how = os.waitpid(host, os.WNOHANG)
        status = how if ended else None
    files: set[Path] = set()
    patience = time.monotonic() + TRACKER_S
    while left := members(host):
        files |= shared_files(left)
        for process in left:
            # Python's own tracker unlinks what the others leave, semaphores among it, and ends by itself.
            if time.monotonic() > patience or not is_tracker(process):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    for file in files:
        file.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(os.waitpid(host, 0)[1] if status is None else status)
    return code if code >= 0 else 128 - code


class Host:
    """One engine, and the line to its driver."""

    packages: tuple[str, ...]
    """Whose versions it tells, the engine's first."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        # What the engine prints goes to the log.
        os.dup2(2, 1)
        self._lock = threading.Lock()
        self._steps = 0

    def serve(self) -> None:
        """Says who it is, then answers until nobody asks any more."""
        known = packages_distributions()
        versions = {name: version(known[name][0]) for name in self.packages if name in known}
        self._send({"hello": os.getpid(), "versions": versions})
        threading.Thread(target=self._beat, daemon=True).start()
        for line in sys.stdin:
            command = json.loads(line)
            try:
                answer = {"answer": getattr(self, f"do_{command['do']}")(**command["args"])}
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:4000], "died": self._died()}
            self._send({"id": command["id"], **answer})

    def _died(self) -> dict[str, Any] | None:
        """The worker that ended, if one did: its rank and its exit code."""
        raise NotImplementedError

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_S)
            died = None
            with contextlib.suppress(AttributeError):
                died = self._died()
            self._send({"beat": self._steps, "died": died})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._out.write(json.dumps(message) + "\n")


def main(kind: type[Host]) -> None:
    """Splits into guard and host; the one argument is the end of the driver's pipe."""
    driver, folder = int(sys.argv[1]), tempfile.mkdtemp(prefix="pipetune-engine-")
    host = os.fork()
    if host:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(nothing, number)
        os._exit(guard(driver, host, folder))
    os.close(driver)
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    kind().serve()
