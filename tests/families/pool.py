"""Families surveyed in processes of their own: one that crashes or hangs costs its own verdict and no other's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from tests.families.result import Survey

TIMEOUT_S = 240.0
"""For one family, on a machine that is busy with other things as well."""


def _serve(connection: Connection, work: Callable[[str], Survey]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Whoever asked may be gone by the time of the answer.
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            connection.send(work(connection.recv()))


class Surveyor:
    """One process that surveys family after family; a new one starts where the last one ended."""

    def __init__(self, work: Callable[[str], Survey], *, timeout_s: float = TIMEOUT_S) -> None:
        """
        Args:
            work: surveys one family; found by name in the other process.
        """
        self._work = work
        self._timeout_s = timeout_s
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def survey(self, family: str) -> Survey:
        """Whatever happens in the process, there is an answer."""
        connection = self._start()
        connection.send(family)
        if not connection.poll(self._timeout_s):
            self.close()
            return Survey(family=family, verdict="crashed", reason=f"took more than {self._timeout_s:.0f} s")
        try:
            found: Survey = connection.recv()
        except EOFError:
            code = self._end()
            return Survey(family=family, verdict="crashed", reason=f"the process ended with {code}")
        return found

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> Connection:
        if self._connection is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
            self._process.start()
            theirs.close()
        return self._connection

    def _end(self) -> int | None:
        assert self._process is not None
        assert self._connection is not None
        self._process.join()
        code = self._process.exitcode
        self._process.close()
        self._connection.close()
        self._process, self._connection = None, None
        return code


def survey_all(
    families: Iterable[str], work: Callable[[str], Survey], *, processes: int, on_result: Callable[[Survey], None]
) -> list[Survey]:
    """Surveys families in several processes at once.

    Args:
        on_result: told of each as it comes, from several threads.

    Returns:
        By family.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for family in families:
        waiting.put(family)
    found: list[Survey] = []

    def run() -> None:
        with Surveyor(work) as surveyor:
            while True:
                try:
                    family = waiting.get_nowait()
                except queue.Empty:
                    return
                found.append(surveyor.survey(family))
                on_result(found[-1])

    threads = [threading.Thread(target=run) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found, key=lambda survey: survey.family)
