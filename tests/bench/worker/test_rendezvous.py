"""A host's side of the driver's rounds."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousParameters

from pipetune.bench.machine.wire import TOKEN_VARIABLE, Wire
from pipetune.bench.worker.rendezvous import DRIVER_VARIABLE, DriverRendezvous


@pytest.mark.parametrize("is_told", [True, False])
def test_a_reset_connection_is_a_cut_cable_unless_the_driver_had_sent_the_host_home(
    monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "a secret of this test")
    monkeypatch.setenv(DRIVER_VARIABLE, "")
    listener = socket.create_server(("127.0.0.1", 0))

    def drive() -> None:
        wire = Wire(listener.accept()[0], b"a secret of this test", is_driver=True)
        while not any(message["type"] == "join" for message in wire.feed(wire.socket.recv(4096))):
            pass
        if is_told:
            wire.send({"type": "close", "why": "host1 has other versions"})
        # A reset: what a driver that ends with unread messages sends.
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wire.socket.close()

    driver = threading.Thread(target=drive)
    driver.start()
    endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    host = DriverRendezvous(
        RendezvousParameters(backend="pipetune", endpoint=endpoint, run_id="", min_nodes=1, max_nodes=1, node=1)
    )
    with pytest.raises(RendezvousConnectionError, match="other versions" if is_told else "the driver is gone"):
        host.next_rendezvous()
    driver.join()
    host.shutdown()
    assert host.was_cut is not is_told
    listener.close()
