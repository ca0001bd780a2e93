"""What a driver and other hosts say to each other: only who knows the token is heard, and only what was really said."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench.errors import ConfigError
from pipetune.bench.machine.wire import Wire, WireError, read_token, split_address

SECRET = b"a secret of the tests"


def pair(secret: bytes = SECRET, other: bytes = SECRET) -> tuple[Wire, Wire]:
    """A driver's wire and a client's, shaken."""
    one, two = tcp_pair()
    driver = Wire(one, secret, is_driver=True)
    client = Wire(two, other, is_driver=False)
    client.feed(two.recv(1000))
    driver.feed(one.recv(1000))
    client.feed(two.recv(1000))
    return driver, client


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    return accepted, client


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    driver, client = pair()
    yield driver, client
    driver.socket.close()
    client.socket.close()


def line_of(sender: Wire, reader: Wire, message: dict[str, Any]) -> bytes:
    sender.send(message)
    return reader.socket.recv(1 << 16)


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none()), max_size=4), st.data())
def test_messages_arrive_whole_however_they_are_cut(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    driver, client = pair()
    with driver.socket, client.socket:
        assert driver.is_trusted
        assert client.is_trusted
        sent = b"".join(line_of(driver, client, message) for message in messages)
        heard: list[dict[str, Any]] = []
        while sent:
            count = data.draw(st.integers(1, len(sent)))
            heard += client.feed(sent[:count])
            sent = sent[count:]
        assert heard == messages


def test_each_side_finds_out_that_the_other_has_another_token() -> None:
    one, two = tcp_pair()
    with one, two:
        driver, client = Wire(one, SECRET, is_driver=True), Wire(two, b"another secret", is_driver=False)
        client.feed(two.recv(1000))
        with pytest.raises(WireError, match="does not know the token"):
            driver.feed(one.recv(1000))
        assert not driver.is_trusted
        # A driver that lets everybody in has not shown that it knows the token.
        one.sendall(bytes(32))
        with pytest.raises(WireError, match="does not know the token"):
            client.feed(two.recv(1000))


@pytest.mark.parametrize("place", [0, 10, 64, 66, -2])
def test_a_flipped_bit_is_refused(ends: tuple[Wire, Wire], place: int) -> None:
    driver, client = ends
    line = bytearray(line_of(driver, client, {"type": "end", "pids": [1, 2]}))
    line[place] ^= 1
    with pytest.raises(WireError, match="wrong signature"):
        client.feed(bytes(line))


def test_a_line_that_is_said_again_is_refused(ends: tuple[Wire, Wire]) -> None:
    driver, client = ends
    line = line_of(client, driver, {"type": "join"})
    assert driver.feed(line) == [{"type": "join"}]
    with pytest.raises(WireError, match="wrong signature"):
        driver.feed(line)
    # Nor is what one side said taken for the other's.
    with pytest.raises(WireError, match="wrong signature"):
        client.feed(line)


def test_an_overlong_line_is_refused_before_it_ends(ends: tuple[Wire, Wire], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wire, "most_bytes", 1000)
    with pytest.raises(WireError, match="more than 1000 bytes"):
        ends[0].feed(b"x" * 1001)


def test_a_client_names_what_is_wrong_with_the_other_side() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            connection, _ = server.accept()
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(WireError, match=rf"127.0.0.1:{port} ended the handshake: its PIPETUNE_TOKEN is another"):
            Wire.connect("127.0.0.1", port, SECRET)
        thread.join()


@pytest.mark.parametrize("value", ["", "short"])
def test_without_a_token_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PIPETUNE_TOKEN", value)
    with pytest.raises(ConfigError, match="PIPETUNE_TOKEN: must hold the same secret on all hosts"):
        read_token()


@pytest.mark.parametrize(
    ("text", "found"),
    [("10.0.0.1:5", ("10.0.0.1", 5)), ("node", ("node", 29400)), ("[::1]:7", ("::1", 7)), ("[::1]", ("::1", 29400))],
)
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert split_address(text) == found


@pytest.mark.parametrize("text", ["", ":5", "host:port", "host:70000"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        split_address(text)
