"""Ctrl-C and SIGTERM, tamed: they interrupt what may be interrupted, and never a record that is being written."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Raised where the work may be stopped, once somebody asked for it."""


class StopSignal:
    """Listens for SIGINT and SIGTERM. The first asks to stop, a second one stops at once, wherever it is."""

    def __init__(self) -> None:
        self.asked = False
        self._may_raise = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals within the block, which must run in the main thread."""
        before: dict[int, Any] = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block a signal raises at once; outside it is only noted.

        Raises:
            Interrupted: somebody asked to stop, now or before.
        """
        if self.asked:
            raise Interrupted
        self._may_raise = True
        try:
            yield
        finally:
            self._may_raise = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or self._may_raise:
            self._may_raise = False
            raise Interrupted
