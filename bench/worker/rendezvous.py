"""The driver as a rendezvous of torch.distributed.elastic: `torchrun --rdzv-backend pipetune`, and `pipetune join`.

The elastic agent of each host starts the workers there, notices their ends, and ends and starts all of them together.
When that is to be the driver alone says: it hears from every worker, and so knows of those that hang and of hosts that
are gone, which no agent notices.
"""

import contextlib
import importlib.metadata
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.distributed.elastic.rendezvous as elastic

from pipetune.bench.machine.wire import Wire, WireError, read_token, split_address

DRIVER_VARIABLE, ROUND_VARIABLE = "PIPETUNE_DRIVER", "PIPETUNE_ROUND"
"""Where workers that an agent starts find the driver, and for which round they are."""
SAME_PACKAGES = ("pipetune", "torch", "transformers")
"""What all hosts need the same version of."""
RETRY_S = 1.0
_torch: Any = dist
"""Whose stores have no types."""


class DriverRendezvous(elastic.RendezvousHandler):
    """One host's part in the rounds that the driver calls."""

    def __init__(self, params: elastic.RendezvousParameters) -> None:
        """Joins the driver at the endpoint, as the host of rank `node`; tries for `join_timeout` seconds.
        RendezvousConnectionError where nobody is there who knows the token."""
        host, port = split_address(params.endpoint)
        self._run_id, self._backend = params.run_id, params.backend
        node = int(params.get("node", os.environ.get("GROUP_RANK", "-1")))
        self._wire = connect(host, port, float(params.get("join_timeout") or 60.0))
        os.environ[DRIVER_VARIABLE] = params.endpoint
        # The address that leads to the driver is the one that leads to the other hosts, unless told otherwise: a host's
        # own name may resolve to loopback.
        self._address: str = params.get("host_ip") or self._wire.socket.getsockname()[0]
        self._listener = socket.create_server((self._address, 0))
        self._port: int = self._listener.getsockname()[1]
        self._store: Any = None
        self._news = threading.Condition()
        self._round: dict[str, Any] | None = None
        self._is_over = self._is_closed = self._is_lost = False
        self._why: str | None = None
        """The driver's reason where it refuses this host."""
        self._wire.send(
            {
                "type": "agent",
                "node": node,
                "hostname": socket.gethostname(),
                "pid": os.getpid(),
                "versions": {name: importlib.metadata.version(name) for name in SAME_PACKAGES},
            }
        )
        self._listening = threading.Thread(target=self._listen, name="driver", daemon=True)
        self._listening.start()

    def get_backend(self) -> str:
        """What `--rdzv-backend` calls this."""
        return self._backend

    @property
    def use_agent_store(self) -> bool:
        """Workers use the agents' store."""
        return True

    def next_rendezvous(self) -> elastic.RendezvousInfo:
        """Waits until every host is there and the driver wants workers."""
        with self._news:
            self._is_over = False
        with contextlib.suppress(OSError):
            self._wire.send({"type": "join", "store": [self._address, self._port]})
        with self._news:
            self._news.wait_for(lambda: self._round is not None or self._is_closed or self._is_lost)
            if self._is_closed or self._round is None:
                raise self._end()
            told, self._round = self._round, None
        address, port = told["store"]
        is_host = told["node"] == 0
        if self._store is None:
            self._store = _torch.TCPStore(
                address,
                port,
                is_master=is_host,
                timeout=timedelta(seconds=60),
                # It would listen on all interfaces otherwise.
                master_listen_fd=self._listener.detach() if is_host else None,
                multi_tenant=False,
            )
        os.environ[ROUND_VARIABLE] = str(told["round"])
        store = _torch.PrefixStore(f"agents-{told['round']}", self._store)
        return elastic.RendezvousInfo(store, told["node"], told["nodes"], elastic.RendezvousStoreInfo(address, port))

    def num_nodes_waiting(self) -> int:
        """The agent asks ten times a second; more than none ends its workers and brings it to `next_rendezvous`."""
        if self._is_closed or self._is_lost:
            raise self._end()
        return int(self._is_over)

    def _end(self) -> Exception:
        why = self._why if self._is_closed else "the driver is gone"
        return elastic.RendezvousConnectionError(why) if why else elastic.RendezvousClosedError()

    @property
    def was_cut(self) -> bool:
        """Whether the driver may be there still, behind a network that is not."""
        return self._wire.was_cut and not self._is_closed

    def is_closed(self) -> bool:
        """Whether there will be no further round."""
        return self._is_closed

    def set_closed(self) -> None:
        """Ends it."""
        self._is_closed = True

    def get_run_id(self) -> str:
        """What `--rdzv-id` says."""
        return self._run_id

    def shutdown(self) -> bool:
        """Leaves the driver."""
        with contextlib.suppress(OSError):
            self._wire.socket.shutdown(socket.SHUT_RDWR)
        self._listening.join()
        self._wire.socket.close()
        self._listener.close()
        return True

    def _listen(self) -> None:
        while (message := self._wire.receive()) is not None:
            with self._news:
                if message["type"] == "end":
                    # A stopped process heeds no SIGTERM, and the agent would wait for it.
                    for pid in message["pids"]:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    self._is_over = True
                elif message["type"] == "round":
                    self._round, self._is_over = message, False
                elif message["type"] == "close":
                    self._is_closed, self._why = True, message.get("why")
                self._news.notify_all()
        with self._news:
            self._is_lost = True
            self._news.notify_all()


def connect(host: str, port: int, patience_s: float) -> Wire:
    """A connection to the driver, once it listens; RendezvousConnectionError if it does not in time, or knows another
    token."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Wire.connect(host, port, read_token())
        except WireError as error:
            raise elastic.RendezvousConnectionError(str(error)) from None
        except OSError as error:
            if time.monotonic() > deadline:
                raise elastic.RendezvousConnectionError(
                    f"{host}:{port}: no driver listens there ({error}); start it with --listen, or look at the firewall"
                ) from None
        time.sleep(RETRY_S)


def handler() -> type[DriverRendezvous]:
    """What the entry point `torchrun.handlers` names."""
    return DriverRendezvous
