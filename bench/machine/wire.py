"""Messages between the driver and its workers: lines of JSON, and with other hosts signed ones over TCP.

There both sides have shown their token before, no line is parsed before its signature is checked, and nothing is
pickled. Lines are signed, not encrypted: hidden states travel in the clear beside them, so the network has to be one's
own.
"""

import hashlib
import hmac
import json
import math
import os
import secrets
import socket
from typing import Any, Self

from pydantic_core import to_jsonable_python

from pipetune.bench.errors import ConfigError

TOKEN_VARIABLE = "PIPETUNE_TOKEN"  # noqa: S105
LEAST_TOKEN = 16
"""Characters."""
DEFAULT_PORT = 29400
"""That of torchrun's rendezvous."""
HANDSHAKE_S = 5.0
_NONCE, _MAC = 32, 32
"""Bytes."""


class WireError(ConnectionError):
    """The other side is gone, or is not who it should be."""


def read_token() -> bytes:
    """The secret that all hosts share, from the environment: everybody sees command lines. ConfigError if short."""
    found = os.environ.get(TOKEN_VARIABLE, "")
    if len(found) < LEAST_TOKEN:
        raise ConfigError(
            f"{TOKEN_VARIABLE}: must hold the same secret on all hosts, of {LEAST_TOKEN} characters or more; make one "
            "by `openssl rand -hex 32`"
        )
    return found.encode()


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`, `[::1]:port` or `host`; ConfigError for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if not host.strip("[]") or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ConfigError(f"{text!r} is no address; write HOST:PORT, such as 10.0.0.1:{DEFAULT_PORT}")
    return host.strip("[]"), int(port)


def encode(value: Any) -> bytes:
    """JSON, of pydantic values as well."""
    return json.dumps(value, allow_nan=False, default=to_jsonable_python).encode()


class Lines:
    """One connection, a line of JSON a message: here plain ones, of a socket in a folder that keeps others out."""

    most_bytes = math.inf
    """Longest line that is taken in."""
    is_trusted = True

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self.was_cut = connection, False
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        """Sends one; OSError where the other side is gone."""
        self.socket.sendall(self._seal(encode(message)) + b"\n")

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages that these bytes complete. WireError for a wrong proof or signature, a replayed line, or one over
        `most_bytes`; OSError where nobody is."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*lines, self._rest))) > self.most_bytes:
            raise WireError(f"a line of more than {self.most_bytes} bytes")
        return [self._open(line) for line in lines]

    def receive(self) -> dict[str, Any] | None:
        """Waits for one message; None once the other side is gone, or is not who it was."""
        while not self.holds_message:
            try:
                data = self.socket.recv(1 << 16)
            except OSError:
                # The other process did not end: the network or its host did.
                self.was_cut = True
                return None
            if not data or len(self._rest) > self.most_bytes:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            return self._open(line)
        except WireError:
            return None

    @property
    def holds_message(self) -> bool:
        """Whether `receive` need not wait."""
        return b"\n" in self._rest

    def _seal(self, payload: bytes) -> bytes:
        return payload

    def _open(self, line: bytes) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(line)
        return message


class Wire(Lines):
    """Signed lines to another host, once the other side has shown that it knows the token.

    driver → client   nonce
    client → driver   nonce, proof
    driver → client   proof
    """

    most_bytes = 64 * 2**20

    def __init__(self, connection: socket.socket, secret: bytes, *, is_driver: bool) -> None:
        """Sends the driver's nonce; OSError where the other side is gone."""
        super().__init__(connection)
        self.is_trusted, self._secret, self._is_driver = False, secret, is_driver
        self._nonce, self._key = secrets.token_bytes(_NONCE), b""
        self._sent = self._received = 0
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # It ends some 9 seconds after the other host vanished, whether there is something to send or not.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("KEEPIDLE", 3), ("KEEPINTVL", 2), ("KEEPCNT", 3), ("USER_TIMEOUT", 9_000)):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
        if is_driver:
            connection.sendall(self._nonce)

    @classmethod
    def connect(cls, host: str, port: int, secret: bytes, *, timeout_s: float = HANDSHAKE_S) -> Self:
        """A client's connection, trusted; WireError where the driver does not know the token, OSError where none is."""
        connection = socket.create_connection((host, port), timeout=timeout_s)
        try:
            wire = cls(connection, secret, is_driver=False)
            while not wire.is_trusted:
                try:
                    data = connection.recv(_NONCE + _MAC)
                except TimeoutError:
                    data = b""
                if not data:
                    raise WireError(
                        f"{host}:{port} ended the handshake: its {TOKEN_VARIABLE} is another, or it is no driver"
                    )
                wire.feed(data)
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return wire

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Messages that these bytes complete, behind the handshake; raises as that of any lines."""
        if not self.is_trusted:
            self._rest, data = self._rest + data, b""
            self._shake()
        return super().feed(data) if self.is_trusted else []

    def _shake(self) -> None:
        if self._is_driver:
            if len(self._rest) < _NONCE + _MAC:
                return
            nonces = self._nonce + self._rest[:_NONCE]
            self._check(b"client", nonces, self._rest[_NONCE : _NONCE + _MAC])
            self._rest = self._rest[_NONCE + _MAC :]
            self.socket.sendall(self._proof(b"driver", nonces))
        else:
            if not self._key and len(self._rest) >= _NONCE:
                self._key = self._rest[:_NONCE] + self._nonce
                self._rest = self._rest[_NONCE:]
                self.socket.sendall(self._nonce + self._proof(b"client", self._key))
            if not self._key or len(self._rest) < _MAC:
                return
            nonces = self._key
            self._check(b"driver", nonces, self._rest[:_MAC])
            self._rest = self._rest[_MAC:]
        self._key, self.is_trusted = self._proof(b"key", nonces), True

    def _proof(self, side: bytes, nonces: bytes) -> bytes:
        return hmac.digest(self._secret, side + nonces, "sha256")

    def _check(self, side: bytes, nonces: bytes, proof: bytes) -> None:
        if not hmac.compare_digest(proof, self._proof(side, nonces)):
            raise WireError("the other side does not know the token")

    def _seal(self, payload: bytes) -> bytes:
        self._sent += 1
        return self._sign(self._is_driver, self._sent, payload) + b" " + payload

    def _open(self, line: bytes) -> dict[str, Any]:
        signature, _, payload = line.partition(b" ")
        if not hmac.compare_digest(signature, self._sign(not self._is_driver, self._received + 1, payload)):
            raise WireError("a line with a wrong signature")
        self._received += 1
        return super()._open(payload)

    def _sign(self, by_driver: bool, number: int, payload: bytes) -> bytes:
        told = (b"d" if by_driver else b"c") + str(number).encode() + b":" + payload
        return hmac.new(self._key, told, hashlib.sha256).hexdigest().encode()
