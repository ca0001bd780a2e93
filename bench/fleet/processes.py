"""Worker processes of this host: forked by one that has imported torch, or each started by itself. No torch here."""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

WORKER = (sys.executable, "-P", "-m", "pipetune.bench.worker")
_PATIENCE_S = 300.0
"""How long the imports may take, from a slow disk."""
_NOT_READ = frozenset({"PYTEST_CURRENT_TEST"})
"""Variables that no worker reads, and that change under a driver."""


def start_worker(arguments: Sequence[str], env: Mapping[str, str], output: IO[bytes], *, forked: bool) -> "Process":
    """One worker's process, in a session of its own, with its output in a file. Where `forked`, it may start from one
    that imported everything under the same environment: no worker with a GPU."""
    if forked and (server := _server_for(env)) is not None:
        with contextlib.suppress(OSError):
            return server.fork(arguments, output)
    return subprocess.Popen(
        [*WORKER, *arguments, "--driver-pid", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(env),
        # A Ctrl-C at the terminal is the driver's to handle.
        start_new_session=True,
    )


class _ForkServer:
    """A process that forks workers, from outside."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Raises OSError where it does not start; a worker that is started by itself will say why."""
        self.environment = dict(environment)
        self._lock = threading.RLock()
        self._forked: list[int] = []
        self._ended: dict[int, int] = {}
        self._ready = False
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The kernel would take the end of another thread for the driver's.
        main_thread = ("--main-thread",) * (threading.current_thread() is threading.main_thread())
        with theirs:
            self._process = subprocess.Popen(
                [*WORKER, "--fork-server", str(theirs.fileno()), "--driver-pid", str(os.getpid()), *main_thread],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Its BLAS shall have no threads when it forks.
                env={"OPENBLAS_NUM_THREADS": "1", **environment},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            self._listen_until(lambda: self._ready)
        except BaseException:
            self.close()
            raise

    @property
    def is_up(self) -> bool:
        """Whether it can fork."""
        return self._process.poll() is None

    @property
    def is_idle(self) -> bool:
        """Whether none of its workers runs."""
        return all(self.exit_code(pid) is not None for pid in self._forked)

    def fork(self, arguments: Sequence[str], output: IO[bytes]) -> "_Forked":
        """One worker's process; OSError where the server is gone."""
        request = json.dumps({"arguments": arguments, "cwd": str(Path.cwd())}).encode()
        with self._lock:
            known = len(self._forked)
            socket.send_fds(self._control, [request], [output.fileno()])
            self._listen_until(lambda: len(self._forked) > known)
            return _Forked(self._forked[-1], self)

    def exit_code(self, pid: int) -> int | None:
        """Exit status of a worker; None while it runs. Workers end with their server, killed."""
        with self._lock:
            is_there = self._read()
            if pid not in self._ended and not is_there:
                self._ended[pid] = -signal.SIGKILL
            return self._ended.get(pid)

    def close(self) -> None:
        """Ends it, and what it forked."""
        self._control.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not done():
            select.select([self._control], [], [], max(deadline - time.monotonic(), 0.0))
            if not self._read() or time.monotonic() > deadline:
                raise ConnectionError("the process that forks workers is gone")

    def _read(self) -> bool:
        """Takes in what was said; False once nothing will be."""
        while True:
            try:
                packet = self._control.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not packet:
                return False
            message = json.loads(packet)
            self._ready |= "ready" in message
            if "started" in message:
                # Numbers of processes come again.
                self._ended.pop(message["started"], None)
                self._forked.append(message["started"])
            if "ended" in message:
                self._ended[message["ended"]] = message["code"]


class _Forked:
    """A worker's process that is no child of ours, as `subprocess.Popen` is of one."""

    def __init__(self, pid: int, server: _ForkServer) -> None:
        self.pid, self._server = pid, server

    def poll(self) -> int | None:
        return self._server.exit_code(self.pid)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(WORKER, timeout)
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


Process = subprocess.Popen[bytes] | _Forked
_servers: dict[int, list[_ForkServer]] = {}
"""By process: one that forked has none of its parent's. Ended with the process."""


def _server_for(environment: Mapping[str, str]) -> _ForkServer | None:
    """A server whose workers see this environment, the last one's or a new one; None where it does not start."""
    wanted = {name: value for name, value in environment.items() if name not in _NOT_READ}
    servers = _servers.setdefault(os.getpid(), [])
    for server in [*servers]:
        if not server.is_up or (server.environment != wanted and server.is_idle):
            servers.remove(server)
            server.close()
    for server in servers:
        if server.environment == wanted:
            return server
    with contextlib.suppress(OSError):
        servers.append(_ForkServer(wanted))
        return servers[-1]
    return None


@atexit.register
def _close_servers() -> None:
    for server in _servers.pop(os.getpid(), ()):
        server.close()
