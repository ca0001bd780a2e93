"""The host of an engine from outside: a process under another Python, commanded and watched, and ended with all it has.

driver ── JSON lines ──► host ── the engine's own ways ──► its workers
   └───── a pipe ──────► guard: once the pipe or the host ends, it ends the session and removes its files
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipetune.bench.engines.failures import died, reason_of
from pipetune.bench.errors import ConfigError, FleetError
from pipetune.bench.fleet.supervisor import oom_kills
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.spec import Plan

COMMON = Path(__file__).parent / "common_host"
HELLO_TIMEOUT_S = 120.0
START_PATIENCE_S = 120.0
"""Imports may hold the interpreter's lock for so long, and the host cannot give signs of life meanwhile."""
END_S = 5.0
"""The guard needs some milliseconds."""


class EngineHost:
    """One host process; it is ended, and raises, at the first thing that goes wrong."""

    def __init__(
        self, python: Path, script: Path, *, log: Path | None, environment: Mapping[str, str], hang_timeout_s: float
    ) -> None:
        """Starts the host; ConfigError where there is no such Python."""
        self._hang_timeout_s, self._phase, self._next_id = hang_timeout_s, "start", 0
        self._plan: Plan | None = None
        self._oom_kills_before = oom_kills()
        self._log = log
        self._file = log.open("a+b") if log is not None else tempfile.TemporaryFile()  # noqa: SIM115
        self._log_begin = self._file.seek(0, os.SEEK_END)
        watched, self._alive = os.pipe()
        try:
            self._process = subprocess.Popen(
                [python, script, str(watched)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._file,
                env={**os.environ, **environment, "PYTHONPATH": f"{script.parent}:{COMMON}", "PYTHONUNBUFFERED": "1"},
                pass_fds=[watched],
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._alive)
            self._file.close()
            raise ConfigError(f"engine_python: {python} cannot be run: {error.strerror}; name a Python") from error
        finally:
            os.close(watched)
        self._lines: queue.Queue[Any] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._beat_at = time.monotonic()
        try:
            self.hello = self._await("hello", self._beat_at + HELLO_TIMEOUT_S, HELLO_TIMEOUT_S)
        except BaseException:
            # An interrupt among them.
            self.close()
            raise

    def send(self, do: str, phase: str, plan: Plan, **args: Any) -> None:
        """Gives a command; the plan, of this host's replica, says whose worker a rank is."""
        self._phase, self._plan, self._next_id = phase, plan, self._next_id + 1
        line = json.dumps({"id": self._next_id, "do": do, "args": args}) + "\n"
        assert self._process.stdin is not None
        self._beat_at = time.monotonic()
        # One that ended says more by its exit status, which `receive` looks at.
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def receive(self, deadline: float) -> dict[str, Any]:
        """The answer to the last command; FleetError where the host or a worker failed, hung, or was too slow."""
        patience_s = max(self._hang_timeout_s, START_PATIENCE_S if self._phase == "start" else 0.0)
        message = self._await("id", deadline, patience_s)
        if message["id"] != self._next_id:
            self._fail(FailureKind.WORKER_ERROR, f"it answered command {message['id']!r}, not {self._next_id}")
        if "error" in message:
            if message.get("died"):
                self._died(message["died"])
            kind, text = reason_of(message["error"], self.log_text())
            self._fail(kind, text)
        answer: dict[str, Any] = message["answer"]
        return answer

    def close(self) -> None:
        """Ends the host, its workers and the guard."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(END_S)
        self._file.close()

    def log_text(self) -> str:
        """The end of what this host's engine wrote."""
        with contextlib.suppress(OSError, ValueError):
            size = os.fstat(self._file.fileno()).st_size
            begin = max(self._log_begin, size - 20_000)
            return os.pread(self._file.fileno(), size - begin, begin).decode(errors="replace") if size > begin else ""
        return ""

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    message = line.decode(errors="replace")
                self._lines.put(message)
        self._lines.put(None)

    def _await(self, key: str, deadline: float, patience_s: float) -> dict[str, Any]:
        while True:
            try:
                message = self._lines.get(timeout=min(max(deadline - time.monotonic(), 0.0), 0.2))
            except queue.Empty:
                now = time.monotonic()
                if now >= deadline:
                    text = f"{self._phase} took too long; raise protocol.timeout_s, or choose a smaller workload"
                    self._fail(FailureKind.TIMEOUT, text)
                if now - self._beat_at > patience_s:
                    text = f"no sign of life for {patience_s:.0f} s during {self._phase}: it is stopped or stuck"
                    self._fail(FailureKind.WORKER_HUNG, text)
                continue
            self._beat_at = time.monotonic()
            if message is None:
                self._ended()
            if not isinstance(message, dict) or not {"hello", "beat", "id"} & set(message):
                self._fail(FailureKind.WORKER_ERROR, f"it said what is no message: {str(message)[:200]!r}")
            if key in message:
                return message
            if message.get("died"):
                self._died(message["died"])

    def _ended(self) -> NoReturn:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = 0
        if code < 0 or code > 128:
            # The guard tells by which signal its host ended, unless it was killed itself. An engine may kill all of it
            # by itself, and tell why in the log alone.
            kind, text = reason_of("", self.log_text())
            if kind is not FailureKind.WORKER_ERROR:
                self._fail(kind, text)
            self._died({"rank": None, "exit_code": min(code, 128 - code)})
        kind, text = reason_of(f"it exited with code {code} during {self._phase}", self.log_text())
        self._fail(FailureKind.WORKER_DIED if kind is FailureKind.WORKER_ERROR else kind, text)

    def _died(self, who: Mapping[str, Any]) -> NoReturn:
        code: int = who["exit_code"]
        by_kernel = code == -signal.SIGKILL and oom_kills() > self._oom_kills_before
        kind, text = died(code, self._phase, by_kernel=by_kernel)
        self._fail(kind, text, who["rank"])

    def _fail(self, kind: FailureKind, text: str, rank: int | None = None) -> NoReturn:
        detail = self.log_text()[-2000:]
        stage = device = None
        if rank is not None and self._plan is not None:
            workers = [(place, one) for place, own in enumerate(self._plan.devices) for one in self._plan.shards(own)]
            stage, device = workers[rank]
        self.close()
        where = f"stage {stage} on {device}" if stage is not None else "the engine's host"
        told = f"{where}: {text}" + (f"; its log is {self._log}" if self._log is not None else "")
        raise FleetError(Failure(kind=kind, stage=stage, device=device, phase=self._phase, message=told, detail=detail))
