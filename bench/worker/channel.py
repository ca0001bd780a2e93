"""How commands and answers travel: JSON over a Unix socket to the driver and over gloo among workers; no pickle."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pydantic_core import to_jsonable_python


class DriverLink:
    """A worker's own connection to the driver: every worker can report, rank 0 alone is commanded.

    When the driver goes away the connection ends, and the worker with it.
    """

    def __init__(self, path: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._lock = threading.Lock()
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._rank = rank
        self.send("hello")

    def send(self, kind: str, **fields: Any) -> None:
        """Sends one message; ends the process if nobody listens any more."""
        line = _encode({"type": kind, "rank": self._rank, **fields}) + b"\n"
        try:
            with self._lock:
                self._socket.sendall(line)
        except OSError:
            os._exit(1)

    def receive(self) -> dict[str, Any]:
        """Waits for the next command; ends the process when the driver is gone."""
        line = self._lines.readline()
        if not line:
            os._exit(1)
        command: dict[str, Any] = json.loads(line)
        return command

    def beat(self, interval_s: float, state: Callable[[], dict[str, Any]]) -> None:
        """Starts the thread that gives a sign of life, with what the worker is doing."""

        def run() -> None:
            while True:
                self.send("beat", **state())
                time.sleep(interval_s)

        threading.Thread(target=run, name="heartbeat", daemon=True).start()

    def end_with_driver(self) -> None:
        """Starts the thread that ends this worker when the driver is gone; for ranks that get no commands."""
        threading.Thread(target=self.receive, name="driver-watch", daemon=True).start()


class ControlGroup:
    """JSON among the ranks over a gloo group of its own, so that commands never mix with hidden states."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
        self._group, self.rank, self.world_size = group, rank, world_size

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        payload = _encode(value) if self.rank == 0 else b""
        size = torch.tensor([len(payload)], dtype=torch.long)
        dist.broadcast(size, src=0, group=self._group)
        buffer = torch.empty(int(size.item()), dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, src=0, group=self._group)
        return json.loads(bytes(buffer.numpy()))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value in the order of ranks, on every rank."""
        payload = _encode(value)
        sizes = torch.zeros(self.world_size, dtype=torch.long)
        sizes[self.rank] = len(payload)
        dist.all_reduce(sizes, group=self._group)
        buffer = torch.zeros(int(sizes.max().item()), dtype=torch.uint8)
        buffer[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        buffers = [torch.empty_like(buffer) for _ in range(self.world_size)]
        dist.all_gather(buffers, buffer, group=self._group)
        return [json.loads(bytes(other[:size].numpy())) for other, size in zip(buffers, sizes.tolist(), strict=True)]

    def barrier(self) -> None:
        """Waits until every rank is here."""
        dist.barrier(group=self._group)


def _encode(value: Any) -> bytes:
    """JSON, of pydantic values as well."""
    return json.dumps(value, allow_nan=False, default=to_jsonable_python).encode()
