"""How commands and answers travel: JSON over a Unix socket to the driver and over gloo among workers; no pickle."""

import contextlib
import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from pipetune.bench.machine.wire import Lines, Wire, encode, read_token, split_address

PINGS = 8
"""Round trips by which two hosts' clocks are compared."""


class DriverLink:
    """A worker's own connection to the driver: every worker can report, rank 0 alone is commanded, but that those which
    serve requests are given them. When the driver goes away the connection ends, and the worker with it."""

    def __init__(self, lines: Lines, rank: int, **hello: Any) -> None:
        self._lines, self.rank = lines, rank
        self._lock = threading.Lock()
        self._watch: threading.Thread | None = None
        self.send("hello", **hello)

    @classmethod
    def local(cls, path: str, rank: int) -> Self:
        """A connection to the driver of this host, by the path of its socket."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        return cls(Lines(connection), rank)

    @classmethod
    def remote(cls, address: str, round_number: int, node: int, local_rank: int) -> tuple[Self, dict[str, Any]]:
        """A connection to a driver elsewhere, and what it wants this worker to be."""
        wire = Wire.connect(*split_address(address), read_token())
        link = cls(wire, -1, round=round_number, node=node, local_rank=local_rank, pid=os.getpid())
        told = link.receive()
        link.rank = told["rank"]
        own_address = wire.socket.getsockname()[0]
        interfaces = psutil.net_if_addrs().items()
        (interface,) = (name for name, found in interfaces if own_address in (one.address for one in found))
        told["environment"] |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        return link, told

    def send(self, kind: str, **fields: Any) -> None:
        """Sends one message; ends the process if nobody listens any more."""
        try:
            with self._lock:
                self._lines.send({"type": kind, "rank": self.rank, **fields})
        except OSError:
            os._exit(1)

    def receive(self) -> dict[str, Any]:
        """Waits for the next command; ends the process when the driver is gone."""
        if (received := self._lines.receive()) is None:
            os._exit(1)
        return received

    def question(self) -> dict[str, Any]:
        """Waits for the next command that is answered; what was told of requests that have left is dropped."""
        while "id" not in (received := self.receive()):
            pass
        return received

    def fileno(self) -> int:
        """What turns readable when a command comes."""
        return self._lines.socket.fileno()

    def pending(self) -> list[dict[str, Any]]:
        """Commands that have come, without waiting for more."""
        found = []
        while self._lines.holds_message or select.select([self], [], [], 0)[0]:
            found.append(self.receive())
        return found

    def beat(self, interval_s: float, state: Callable[[], dict[str, Any]]) -> None:
        """Starts the thread that gives a sign of life, with what the worker is doing."""

        def run() -> None:
            while True:
                self.send("beat", **state())
                time.sleep(interval_s)

        threading.Thread(target=run, name="heartbeat", daemon=True).start()

    def end_with_driver(self) -> None:
        """Starts the thread that ends this worker when the driver is gone, for ranks that get no commands, until it
        says `begin`; what is told before is dropped."""

        def run() -> None:
            while self.receive()["command"] != "begin":
                pass

        self._watch = threading.Thread(target=run, name="driver-watch", daemon=True)
        self._watch.start()

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Waits until the driver says `begin`, if this rank is no other's to command; what comes is to be read then."""
        if self._watch is not None:
            self._watch.join()
        yield
        if self._watch is not None:
            self.end_with_driver()


class ControlGroup:
    """JSON among the ranks over a gloo group of its own, so that commands never mix with hidden states."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        self._group, self.rank, self.world_size = group, rank, world_size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return json.loads(self.broadcast_bytes(encode(value) if self.rank == 0 else b""))

    def clock_ahead(self, hosts: Sequence[str]) -> tuple[float, float]:
        """How far the monotonic clock of this rank's host is ahead of that of rank 0's, and how far off that may be.

        Every rank calls it, with every rank's host; in seconds. The quickest of several round trips leaves the least
        doubt.
        """
        if len(set(hosts)) == 1:
            return 0.0, 0.0
        found = {hosts[0]: (0.0, 0.0)}
        clock = torch.zeros(1, dtype=torch.float64)
        for host in dict.fromkeys(hosts[1:]):
            other = hosts.index(host)
            trips = []
            for _ in range(PINGS if host != hosts[0] else 0):
                if self.rank == 0:
                    sent = time.monotonic()
                    dist.send(clock, dst=other, group=self._group)
                    dist.recv(clock, src=other, group=self._group)
                    back = time.monotonic()
                    trips.append(((back - sent) / 2, float(clock[0]) - (sent + back) / 2))
                elif self.rank == other:
                    dist.recv(clock, src=0, group=self._group)
                    clock[0] = time.monotonic()
                    dist.send(clock, dst=0, group=self._group)
            if trips:
                error, ahead = min(trips)
                found[host] = ahead, error
        ahead, error = self.broadcast(found)[hosts[self.rank]]
        return ahead, error

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in the order of ranks, on every rank."""
        payload = encode(value)
        sizes = torch.zeros(self.world_size, dtype=torch.long)
        sizes[self.rank] = len(payload)
        dist.all_reduce(sizes, group=self._group)
        buffer = torch.zeros(int(sizes.max().item()), dtype=torch.uint8)
        buffer[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        buffers = [torch.empty_like(buffer) for _ in range(self.world_size)]
        dist.all_gather(buffers, buffer, group=self._group)
        return [json.loads(bytes(other[:size].numpy())) for other, size in zip(buffers, sizes.tolist(), strict=True)]

    def broadcast_bytes(self, payload: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        size = torch.tensor([len(payload)], dtype=torch.long)
        dist.broadcast(size, src=0, group=self._group)
        buffer = torch.empty(int(size.item()), dtype=torch.uint8)
        if self.rank == 0 and payload:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, src=0, group=self._group)
        return bytes(buffer.numpy())

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.barrier(group=self._group)


def agents_store() -> Any:
    """Where workers of several hosts meet: the elastic agents' store, with a part of its own for every round."""
    from pipetune.bench.worker.rendezvous import ROUND_VARIABLE

    torch_stores: Any = dist
    store = torch_stores.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return torch_stores.PrefixStore(f"workers-{os.environ[ROUND_VARIABLE]}", store)
