"""Workers on several hosts: an elastic agent a host starts them, and the driver is their rendezvous. No torch here.

pipetune tune --listen 10.0.0.1:29400 ─┬─ its own agent, host0 ── workers
                                       └─ pipetune join, host1 ── workers
"""

import atexit
import contextlib
import importlib.metadata
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ConfigError, FleetError
from pipetune.bench.fleet.launcher import LOST, worker_environment
from pipetune.bench.machine.wire import DEFAULT_PORT, HANDSHAKE_S, Lines, Wire, read_token, split_address
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.spec import ModelSpec, device_host, on_host

HOST_TIMEOUT_S = 600.0
MOST_STRANGERS = 32
"""Connections that have not shown the token yet; the oldest goes for a newer one."""
_SAY_EVERY_S = 10.0
_DISMISS_S = 15.0
LISTEN_VARIABLE = "PIPETUNE_LISTEN"
STAY_VARIABLE = "PIPETUNE_STAY"
"""Set where a further driver listens once this one has ended: hosts that have joined wait for it."""
NODE_RANK_VARIABLES = ("SLURM_NODEID", "PET_NODE_RANK", "GROUP_RANK", "JOB_COMPLETION_INDEX")
"""Slurm's, Kubeflow's, torchrun's, and that of Kubernetes' Indexed Jobs."""
JOIN = (sys.executable, "-P", "-m", "pipetune.bench.worker.join")


class RemoteProcess:
    """A worker on a host that its agent alone sees: it lives as long as its connection."""

    def __init__(self) -> None:
        self.pid = 0
        self._code: int | None = None

    def poll(self) -> int | None:
        """`LOST` once its connection has ended."""
        return self._code

    def kill(self) -> None:
        """Takes it for lost; its agent ends it."""
        self._code = LOST


class HostsLauncher:
    """Listens for agents and workers, at one address for as long as this process lives."""

    def __init__(self, address: str, secret: bytes) -> None:
        """Raises ConfigError where nothing can listen."""
        self.address, self._secret = address, secret
        host, port = split_address(address)
        if host in ("", "0.0.0.0", "::"):  # noqa: S104
            raise ConfigError(f"listen: {address} is every interface; give the one address that the other hosts reach")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
            if str(found).startswith("127.") and found != host:
                raise ConfigError(f"listen: {host} is loopback here, {found}; give this host's address for the others")
            self.listener = socket.create_server((host, port), backlog=64)
        except OSError as error:
            raise ConfigError(
                f"listen: {address}: {error.strerror}; give an address of this host and a free port"
            ) from None
        self.devices: tuple[str, ...] = ()
        self.patience_s = HOST_TIMEOUT_S
        self._hosts: tuple[str, ...] = ()
        self._agents: dict[str, Lines] = {}
        self._stores: dict[str, list[Any]] = {}
        """Where each host that has joined would have the workers' store; not while its workers run."""
        self._own: subprocess.Popen[bytes] | None = None
        self._log_dir = tempfile.TemporaryDirectory(prefix="pipetune-host0-")
        self._strangers: dict[Lines, float] = {}
        self._round = 0
        self._told: dict[str, Any] = {}
        self._workers: dict[Lines, RemoteProcess] = {}
        self._processes: list[RemoteProcess] = []
        self._pids: dict[str, list[int]] = {}
        self._refused = ""

    @property
    def connected(self) -> Sequence[Lines]:
        """The agents' connections, which outlive the fleet."""
        return list(self._agents.values())

    def accept(self, connection: socket.socket) -> Lines:
        """A stranger, until it has shown the token."""
        now = time.monotonic()
        self._strangers = {wire: since for wire, since in self._strangers.items() if not wire.is_trusted}
        for wire, since in list(self._strangers.items()):
            if now - since > HANDSHAKE_S or len(self._strangers) >= MOST_STRANGERS:
                del self._strangers[wire]
                with contextlib.suppress(OSError):
                    wire.socket.shutdown(socket.SHUT_RDWR)
        wire = Wire(connection, self._secret, is_driver=True)
        self._strangers[wire] = now
        return wire

    def rank_of(self, hello: dict[str, Any], channel: Lines) -> int | None:
        """Rank of the worker that says hello, by host and place there, which it is told; None if it has no place."""
        if hello["node"] >= len(self._hosts):
            return None
        host = self._hosts[hello["node"]]
        ranks = [rank for rank, device in enumerate(self.devices) if device_host(device) == host]
        if hello["round"] != self._round:
            channel.socket.shutdown(socket.SHUT_RDWR)
            return None
        self._pids.setdefault(host, []).append(hello["pid"])
        if hello["local_rank"] >= len(ranks):
            # Its agent would end all of its workers with it: it waits until this fleet's end.
            return None
        rank: int = ranks[hello["local_rank"]]
        self._processes[rank].pid = hello["pid"]
        self._workers[channel] = self._processes[rank]
        channel.send({"type": "assignment", "rank": rank, **self._told})
        return rank

    def hears(self, message: dict[str, Any], channel: Lines) -> None:
        """An agent that joins, or whose workers have ended."""
        if message["type"] == "ask":
            workers = len(on_host(self.devices, f"host{message['node']}"))
            stays = message["node"] > 0 and STAY_VARIABLE in os.environ
            channel.send({"type": "workers", "workers": workers, "hosts": self._hosts, "stays": stays})
        elif message["type"] == "agent":
            host = f"host{message['node']}"
            theirs = message["versions"].items()
            ours = {name: importlib.metadata.version(name) for name, _ in theirs}
            other = [f"{name} {there} ({ours[name]} here)" for name, there in theirs if there != ours[name]]
            if other or host not in self._hosts:
                strange = f"is none of {', '.join(self._hosts)}"
                why = f"has {', '.join(other)}: install the same versions" if other else strange
                self._refused = f"{host} ({message['hostname']}) {why}"
                channel.send({"type": "close", "why": self._refused})
                return
            self._agents[host] = channel
            self._stores.pop(host, None)
        for host, agent in self._agents.items():
            if agent is channel and message["type"] == "join":
                self._stores[host] = message["store"]
                # It comes for the next round: its workers of this one have ended.
                for device, worker in zip(self.devices, self._processes, strict=False):
                    if device_host(device) == host:
                        worker.kill()

    def lost(self, channel: Lines) -> None:
        """A worker that is gone, or an agent, whose workers go with it."""
        self._strangers.pop(channel, None)
        if (worker := self._workers.pop(channel, None)) is not None:
            worker.kill()
        self._agents = {host: agent for host, agent in self._agents.items() if agent is not channel}
        self._stores = {host: store for host, store in self._stores.items() if host in self._agents}

    def start(
        self, model: ModelSpec, log_dir: Path | None, listen: Callable[[], None], say: Callable[[str], None]
    ) -> Sequence[tuple[RemoteProcess, None]]:
        """Waits for every host, then has all agents start their workers. Meanwhile `listen` hears connections for a
        moment, and `say` tells people. A host that does not join in time, or has other versions, is a FleetError."""
        self._start_own(log_dir)
        deadline, said, self._refused = time.monotonic() + self.patience_s, -_SAY_EVERY_S, ""
        while missing := [host for host in self._hosts if host not in self._stores]:
            if self._refused or time.monotonic() > deadline:
                late = f"{', '.join(missing)} did not join {self.address} within {self.patience_s:.0f} s"
                raise FleetError(Failure(kind=FailureKind.WORKER_DIED, phase="start", message=self._refused or late))
            others = [host for host in missing if host != self._hosts[0]]
            if others and time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                ranks = " and ".join(host.removeprefix("host") for host in others)
                say(f"waiting for {', '.join(others)}: pipetune join {self.address} --node-rank {ranks}")
            listen()
        self._round += 1
        self._told = {"devices": self.devices, "model": model, "environment": worker_environment(self.devices, "")}
        self._pids, self._workers = {}, {}
        self._processes = [RemoteProcess() for _ in self.devices]
        store = self._stores[self._hosts[0]]
        for node, host in enumerate(self._hosts):
            del self._stores[host]
            told = {"round": self._round, "node": node, "nodes": len(self._hosts), "store": store}
            self._agents[host].send({"type": "round", **told})
        return [(process, None) for process in self._processes]

    def end(self) -> None:
        """Has the agents end their workers, stopped ones too; they are ready for the next fleet then."""
        for process in self._processes:
            process.kill()
        for wire in self._workers:
            wire.socket.close()
        for host, agent in self._agents.items():
            if host not in self._stores:
                with contextlib.suppress(OSError):
                    agent.send({"type": "end", "pids": self._pids.get(host, [])})
        self._workers, self._processes = {}, []

    def close(self) -> None:
        """Sends the agents home."""
        self.end()
        for agent in self._agents.values():
            with contextlib.suppress(OSError):
                agent.send({"type": "close"})
                agent.socket.close()
        self.listener.close()
        if self._own is not None:
            try:
                self._own.wait(5.0)
            except subprocess.TimeoutExpired:
                self._own.kill()
                self._own.wait()
        self._log_dir.cleanup()

    def use(self, devices: Sequence[str], patience_s: float) -> None:
        """Takes the devices of the next fleet, and the time that its hosts have to join."""
        self.devices, self.patience_s = tuple(devices), patience_s
        self._hosts = tuple(sorted({device_host(device) for device in devices}, key=lambda host: int(host[4:])))

    def _start_own(self, log_dir: Path | None) -> None:
        if "host0" not in self._hosts or (self._own is not None and self._own.poll() is None):
            return
        folder = (log_dir or Path(self._log_dir.name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        command = [*JOIN, self.address, "--node-rank", "0", "--timeout", "30", "--log-dir", str(folder / "host0")]
        command += ["--driver-pid", str(os.getpid())]
        with (folder / "host0.log").open("ab") as output:
            self._own = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )


def join(address: str, node_rank: int, *, host_ip: str | None = None, timeout_s: float = HOST_TIMEOUT_S) -> int:
    """Puts this host's devices at the disposal of the driver at an address, until it ends; 0 for a good end, else 4.

    `host_ip` is this host's address for the others; by default the one that leads to the driver. Without a token or an
    address it is a ConfigError.
    """
    read_token()
    split_address(address)
    command = [*JOIN, address, "--node-rank", str(node_rank), "--timeout", str(timeout_s), "--host-ip", host_ip or ""]
    command += ["--driver-pid", str(os.getpid())]
    # A Ctrl-C at the terminal ends it by ours.
    return 0 if subprocess.run(command, check=False, start_new_session=True).returncode == 0 else 4


def dismiss(address: str, hosts: Iterable[str]) -> None:
    """Sends hosts home that stayed for a further driver; one that cannot be reached gives up by itself."""
    left, deadline = {*hosts} - {"host0"}, time.monotonic() + _DISMISS_S
    with contextlib.suppress(OSError), socket.create_server(split_address(address)) as listener:
        listener.settimeout(1.0)
        while left and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(1.0)
                    wire = Wire(connection, read_token(), is_driver=True)
                    messages: list[dict[str, Any]] = []
                    while not messages and (data := connection.recv(1 << 16)):
                        messages = wire.feed(data)
                    for message in messages:
                        left.discard(f"host{message['node']}")
                        wire.send({"type": "workers", "workers": 0, "hosts": (), "stays": False})


def lead_or_join(
    *,
    listen: str | None,
    nnodes: int | None,
    node_rank: int | None,
    master_addr: str | None,
    master_port: int | None,
    host_ip: str | None,
) -> int | None:
    """Exit status of a host that joined another; None on the one that leads, and listens from now on; or ConfigError
    where something is missing, or does not go together."""
    if nnodes is None or nnodes == 1:
        if listen:
            os.environ[LISTEN_VARIABLE] = listen
        return None
    if master_addr is None:
        raise ConfigError("--nnodes: give --master-addr as well, the address of host 0")
    found = [os.environ[name] for name in NODE_RANK_VARIABLES if os.environ.get(name, "").isdecimal()]
    rank = int(found[0]) if node_rank is None and found else node_rank
    if rank is None or rank >= nnodes:
        given, names = "not given" if rank is None else rank, ", ".join(NODE_RANK_VARIABLES)
        raise ConfigError(f"--node-rank: {given}; give 0 to {nnodes - 1}, or one of {names} in the environment")
    address = f"{master_addr}:{master_port or DEFAULT_PORT}"
    if rank > 0:
        return join(address, rank, host_ip=host_ip)
    os.environ[LISTEN_VARIABLE] = listen or address
    return None


_launchers: dict[tuple[int, str], HostsLauncher] = {}
"""By process and address: hosts join once for all of a driver's fleets."""


def launcher_at(address: str, devices: Sequence[str], *, patience_s: float) -> HostsLauncher:
    """The one that listens at an address, for a fleet of these devices; ConfigError without a token, or as its own."""
    key = os.getpid(), address
    if key not in _launchers:
        _launchers[key] = HostsLauncher(address, read_token())
    _launchers[key].use(devices, patience_s)
    return _launchers[key]


@atexit.register
def _close_launchers() -> None:
    for key, launcher in list(_launchers.items()):
        if key[0] == os.getpid():
            launcher.close()
            del _launchers[key]
