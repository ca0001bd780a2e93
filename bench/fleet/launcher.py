"""Worker processes of this host: forked by one that has imported torch, or each started by itself. No torch here."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic_core import to_jsonable_python

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import scratch_folder
from pipetune.bench.spec import ModelSpec, device_kind

WORKER = (sys.executable, "-P", "-m", "pipetune.bench.worker")
_PATIENCE_S = 300.0
"""How long the imports may take, from a slow disk."""
_NOT_READ = frozenset({"PYTEST_CURRENT_TEST"})
"""Variables that no worker reads, and that change under a driver."""


LOST = -1000
"""Exit status of a worker whose connection has ended, on a host where nobody says why."""
_MAX_SOCKET_PATH = 103
"""Bytes; of the systems that pipetune runs on, the least that a socket's address holds."""
_KILL_TIMEOUT_S = 60.0
"""A killed worker that is not gone after so long is left to the kernel."""


class Process(Protocol):
    """A worker's process; of `subprocess.Popen`, what is needed of one."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, that of a signal negative; None while it runs."""

    def wait(self, timeout: float) -> int:
        """The same, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not by then; `timeout` in seconds.
        """

    def kill(self) -> None:
        """Ends it, if it has not ended."""


class Channel(Protocol):
    """One worker's connection: bytes in, messages out."""

    socket: socket.socket

    def send(self, message: dict[str, Any]) -> None:
        """
        Raises:
            OSError: the worker is gone.
        """

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages that these bytes complete.

        Raises:
            ConnectionError: they are none that a worker of ours would send.
        """


class Launcher(Protocol):
    """How a fleet's workers come to be, end, and are listened to."""

    listener: socket.socket

    @property
    def connected(self) -> Sequence[Channel]:
        """Connections that outlive the fleet."""

    def accept(self, connection: socket.socket) -> Channel:
        """What listens to a connection."""

    def rank_of(self, hello: dict[str, Any], channel: Channel) -> int | None:
        """Rank of the worker that says hello; None for who is no worker, or one of a fleet that has ended."""

    def hears(self, message: dict[str, Any], channel: Channel) -> None:
        """Takes in what somebody says who is no worker."""

    def lost(self, channel: Channel) -> None:
        """Takes in that a connection has ended."""

    def start(
        self, model: ModelSpec, log_dir: Path | None, listen: Callable[[], None], say: Callable[[str], None]
    ) -> Sequence[tuple[Process, Path | None]]:
        """One process a rank, with its log where that is on this host.

        Args:
            listen: hears connections for a moment, while hosts are waited for.
            say: tells people.

        Raises:
            FleetError: a host that does not come.
        """

    def end(self) -> None:
        """Ends all workers at once."""


class Lines:
    """Plain lines of JSON: the folder that the socket lies in keeps others out."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._rest = connection, b""

    def send(self, message: dict[str, Any]) -> None:
        """A line."""
        self.socket.sendall((json.dumps(message, default=to_jsonable_python) + "\n").encode())

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """What these bytes complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def worker_environment(devices: Sequence[str], interface: str) -> dict[str, str]:
    """What workers see beside their host's own environment."""
    added = {
        # NVML counts GPUs by bus; CUDA would count the fastest first.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
        "PYTHONUNBUFFERED": "1",
    }
    gpus = [device for device in devices if device_kind(device) == "cuda"]
    if len(set(gpus)) > 1 or (len(gpus) > 1 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"):
        # A kernel that is loaded at its first use waits for all that runs, and a posted NCCL receive runs until its
        # message comes: two stages that wait so for each other wait for ever. Without NCCL it only costs time.
        added["CUDA_MODULE_LOADING"] = os.environ.get("CUDA_MODULE_LOADING", "EAGER")
    return added


class LocalLauncher:
    """Processes of this host; a socket and a rendezvous in a private folder that goes with them."""

    def __init__(self, devices: Sequence[str], worker_env: Mapping[str, Mapping[str, str]]) -> None:
        """
        Raises:
            ConfigError: the folder for temporary files has too long a path for a socket.
        """
        self._devices, self._worker_env = tuple(devices), worker_env
        self._processes: list[Process] = []
        self._scratch = contextlib.ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        path = self._folder / "driver.sock"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            self._scratch.close()
            raise ConfigError(
                f"TMPDIR: {tempfile.gettempdir()} is too long: a socket's path there would have "
                f"{len(os.fsencode(path))} bytes of at most {_MAX_SOCKET_PATH}; give a shorter one"
            )
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        path.chmod(0o600)
        self.listener.listen(len(self._devices))

    @property
    def connected(self) -> Sequence[Channel]:
        """None."""
        return ()

    def accept(self, connection: socket.socket) -> Channel:
        """Whoever can reach the socket is trusted."""
        return Lines(connection)

    def rank_of(self, hello: dict[str, Any], channel: Channel) -> int | None:
        """As it was told."""
        rank: int = hello["rank"]
        return rank

    def hears(self, message: dict[str, Any], channel: Channel) -> None:
        """Never called."""
        raise AssertionError(f"only workers speak here: {message}")

    def lost(self, channel: Channel) -> None:
        """Nothing: processes tell of themselves."""

    def start(
        self, model: ModelSpec, log_dir: Path | None, listen: Callable[[], None], say: Callable[[str], None]
    ) -> Sequence[tuple[Process, Path | None]]:
        """At once."""
        log_dir = log_dir or self._folder
        log_dir.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            # An empty entry is the folder that we were started in.
            "PYTHONPATH": os.pathsep.join(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
            **worker_environment(self._devices, "lo"),
        }
        on_gpus = any(device_kind(device) == "cuda" for device in self._devices)
        logs = [log_dir / f"rank-{rank}.log" for rank in range(len(self._devices))]
        for rank, device in enumerate(self._devices):
            with logs[rank].open("ab") as output:
                process = start_worker(
                    [
                        *("--rank", str(rank), "--devices", ",".join(self._devices)),
                        *("--model", model.model_dump_json(exclude_unset=True)),
                        *("--socket", str(self._folder / "driver.sock")),
                        *("--rendezvous", str(self._folder / "rendezvous")),
                    ],
                    {**environment, **self._worker_env.get(device, {})},
                    output,
                    forked=device not in self._worker_env and not on_gpus,
                )
            self._processes.append(process)
        return list(zip(self._processes, logs, strict=True))

    def end(self) -> None:
        """Kills them, and removes what they were started with."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            # A process that hangs in a GPU's driver cannot even be killed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_TIMEOUT_S)
        self.listener.close()
        self._scratch.close()


def start_worker(
    arguments: Sequence[str], environment: Mapping[str, str], output: IO[bytes], *, forked: bool
) -> Process:
    """One worker's process, in a session of its own, with its output in a file.

    Args:
        forked: it may start from a process that imported everything under the same environment: no worker with a GPU.
    """
    if forked and (server := _server_for(environment)) is not None:
        with contextlib.suppress(OSError):
            return server.fork(arguments, output)
    return subprocess.Popen(
        [*WORKER, *arguments, "--driver-pid", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=dict(environment),
        # A Ctrl-C at the terminal is the driver's to handle.
        start_new_session=True,
    )


class _ForkServer:
    """A process that forks workers, from outside."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """
        Raises:
            OSError: it does not start; a worker that is started by itself will say why.
        """
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

    def fork(self, arguments: Sequence[str], output: IO[bytes]) -> Process:
        """One worker's process.

        Raises:
            OSError: the server is gone.
        """
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
    """A worker's process that is no child of ours."""

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
