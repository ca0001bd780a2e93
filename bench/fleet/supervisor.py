"""Worker processes from outside: started, listened to, diagnosed when they die, hang or fall silent, and ended.

Rank 0 alone is commanded. Every worker has a connection of its own for signs of life and for faults, so that one stuck
rank cannot silence the diagnosis. No torch here.
"""

import contextlib
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from pipetune.bench.errors import ConfigError, FleetError
from pipetune.bench.fleet.hosts import HOST_TIMEOUT_S, LISTEN_VARIABLE, HostsLauncher, RemoteProcess, launcher_at
from pipetune.bench.fleet.launcher import LOST, LocalLauncher
from pipetune.bench.fleet.processes import Process
from pipetune.bench.machine.wire import Lines
from pipetune.bench.record import REMEDIES, Failure, FailureKind
from pipetune.bench.spec import ModelSpec, Value, device_host, device_kind, hosts_of

START_TIMEOUT_S = 1800.0
"""A first start may download and convert a model."""
CONTEXT_S = 120.0
"""A worker may be silent for so long while it claims GPUs: CUDA holds the interpreter's lock and loads every kernel."""
STUCK_AFTER_S = 30.0
"""If every stage waits for another and no task ends for so long, messages were lost."""
STOPPED_S = 2.0
"""The driver looks at its workers many times a second; if it did not for so long, it was itself stopped."""
_SEND_TIMEOUT_S = 30.0
"""A worker that takes in nothing for so long is lost."""
GRACE_S = 1.0
"""How long to wait, after a worker fell, for the one that fell first to say why."""


class Progress(Value):
    """What a fleet is doing, for people who wait."""

    phase: str
    message: str = ""
    stage: int | None = None
    done: int | None = None
    total: int | None = None


class FleetOptions(TypedDict, total=False):
    """How workers are started and listened to."""

    log_dir: Path | None
    """Where `rank-N.log` go; by default a temporary folder that goes with the workers."""
    hang_timeout_s: float
    """A worker that gives no sign of life for so long is taken for hung; by default 10."""
    on_progress: Callable[[Progress], None] | None
    worker_env: Mapping[str, Mapping[str, str]] | None
    """Variables of the environment of single devices' workers, on top of this process's: `{"cpu:1":
    {"ONEDNN_MAX_CPU_ISA": "AVX2"}}` lets one CPU worker compute like an older CPU."""
    listen: str | None
    """Where other hosts join, `ADDRESS:PORT` of this host, where devices name hosts; by default PIPETUNE_LISTEN's."""
    host_timeout_s: float
    """How long hosts may take to join, at first and after a fault; by default 600."""


class _Worker:
    """The driver's view of one worker process."""

    def __init__(self, device: str, process: Process | RemoteProcess, log: Path | None) -> None:
        self.device, self.process, self.log = device, process, log
        self.channel: Lines | None = None
        self.ready = False
        self.beat_at = time.monotonic()
        self.state: dict[str, Any] = {"phase": "start", "activity": "idle", "tasks_done": 0, "stage": None}

    @property
    def where(self) -> str:
        """`stage 1 on cpu:1`; the device alone while the worker holds no stage."""
        stage = self.state["stage"]
        return f"stage {stage} on {self.device}" if stage is not None else f"worker on {self.device}"

    def failure(self, kind: FailureKind, message: str) -> Failure:
        """What befell this worker, with its place and the end of its log."""
        detail = f"its log is on {device_host(self.device)}, in the folder that its agent names"
        if self.log is not None:
            detail = ""
            with contextlib.suppress(OSError):
                detail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        stage, phase = self.state["stage"], self.state["phase"]
        return Failure(kind=kind, stage=stage, device=self.device, phase=phase, message=message, detail=detail)


class Supervisor:
    """One worker process per device; down until started, and down again after any failure."""

    def __init__(self, devices: Sequence[str], **options: Unpack[FleetOptions]) -> None:
        self.hang_timeout_s = options.get("hang_timeout_s", 10.0)
        self.on_progress = options.get("on_progress") or (lambda progress: None)
        self.on_served: Callable[[dict[str, Any]], None] = lambda message: None
        """Told what comes of requests that were given with `tell`."""
        self._devices, self._log_dir = tuple(devices), options.get("log_dir")
        self._options = options
        self._workers: list[_Worker] = []
        self._launcher: LocalLauncher | HostsLauncher | None = None
        self._selector: selectors.BaseSelector | None = None
        self._telling = threading.Lock()
        self._next_id = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._oom_kills_before = 0

    @property
    def is_up(self) -> bool:
        """Whether there are workers: from their start until they are ended."""
        return bool(self._workers)

    def start(self, model: ModelSpec) -> None:
        """Starts one worker per device and waits until each has read the model.

        Whoever calls this kills what was started if anything is raised: ConfigError for a TMPDIR that is too long,
        FleetError for workers that do not start, an interrupt.
        """
        self._oom_kills_before = oom_kills()
        self._launcher = self._make_launcher()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._launcher.listener, selectors.EVENT_READ, None)
        for channel in self._launcher.connected:
            self._selector.register(channel.socket, selectors.EVENT_READ, channel)
        self._say(f"starting {len(self._devices)} workers")
        started = self._launcher.start(model, self._log_dir, lambda: self._listen(0.05), self._say)
        self._workers = [_Worker(device, *how) for device, how in zip(self._devices, started, strict=True)]
        self._await(lambda: all(worker.ready for worker in self._workers), START_TIMEOUT_S, "start")

    def request(self, command: str, args: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends rank 0 a command, values in it as JSON, and waits for its answer; FleetError if the workers failed."""
        self._next_id += 1
        number = self._next_id
        for worker in self._workers:
            worker.beat_at = time.monotonic()
        self._send({"id": number, "command": command, "args": args})
        self._await(lambda: number in self._answers, timeout_s, command)
        return self._answers.pop(number)

    def tell(self, command: str, rank: int, **args: Any) -> None:
        """Sends a worker something that it has no answer to; from any thread, while another waits for an answer, and
        finds out who is gone."""
        with contextlib.suppress(OSError, IndexError), self._telling:
            channel = self._workers[rank].channel
            assert channel is not None
            channel.send({"command": command, "args": args})

    def close(self) -> None:
        """Asks the workers to exit, and ends those that do not."""
        can_hear = all(worker.process.poll() is None and worker.ready for worker in self._workers)
        if self._workers and can_hear and isinstance(self._launcher, LocalLauncher):
            with contextlib.suppress(OSError, FleetError):
                self._send({"id": -1, "command": "exit", "args": {}})
                deadline = time.monotonic() + 2.0
                while time.monotonic() < deadline and any(worker.process.poll() is None for worker in self._workers):
                    time.sleep(0.01)
        self.kill()

    def kill(self) -> None:
        """Ends the workers at once, and removes what they were started with."""
        if self._selector is not None:
            for key in list(self._selector.get_map().values()):
                if key.data is not None and (self._launcher is None or key.data not in self._launcher.connected):
                    key.data.socket.close()
            self._selector.close()
        if self._launcher is not None:
            self._launcher.end()
        self._workers, self._selector, self._launcher = [], None, None
        self._answers = {}

    def _send(self, message: dict[str, Any]) -> None:
        channel = self._workers[0].channel
        assert channel is not None
        try:
            channel.send(message)
        except OSError:
            self._fail(self._find_dead() or self._silent(self._workers[0]))

    def _await(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Listens until `done`; whatever goes wrong meanwhile ends the workers and is raised."""
        began = moved_at = ran_at = time.monotonic()
        tasks_done = -1
        while not done():
            self._listen(0.05)
            now = time.monotonic()
            if now - ran_at > STOPPED_S:
                # What the workers said meanwhile is not read yet, and no time of theirs went by for us.
                began += now - ran_at
                moved_at = now
                for worker in self._workers:
                    worker.beat_at = now
            ran_at = now
            if (dead := self._find_dead()) is not None:
                self._fail(dead)
            for worker in self._workers:
                if worker.channel is not None and now - worker.beat_at > self._patience_s(worker):
                    self._fail(self._silent(worker))
            total = sum(worker.state["tasks_done"] for worker in self._workers)
            stages = [worker for worker in self._workers if worker.state["activity"] != "idle"]
            waiting = bool(stages) and all(worker.state["activity"] in ("receive", "send") for worker in stages)
            if total != tasks_done or not waiting:
                tasks_done, moved_at = total, now
            elif now - moved_at > STUCK_AFTER_S:
                self._fail(self._stuck(stages, now - moved_at))
            if now - began > timeout_s:
                phase, late = self._workers[0].state["phase"], f"{what} took longer than {timeout_s:.0f} s"
                why = f"{late}; raise protocol.timeout_s or choose a smaller workload"
                self._fail(Failure(kind=FailureKind.TIMEOUT, phase=phase, message=why))

    def _say(self, message: str) -> None:
        self.on_progress(Progress(phase="start", message=message))

    def _make_launcher(self) -> LocalLauncher | HostsLauncher:
        listen = self._options.get("listen") or os.environ.get(LISTEN_VARIABLE)
        if hosts_of(self._devices) == ("",):
            if listen:
                why = "name no host, and other hosts are to join; write host0/cuda:0-3,host1/cuda:0-3"
                raise ConfigError(f"devices: {', '.join(self._devices)} {why}")
            return LocalLauncher(self._devices, self._options.get("worker_env") or {})
        if not listen:
            raise ConfigError("devices: they name hosts, which have to join; give --listen ADDRESS:PORT, or --nnodes")
        return launcher_at(listen, self._devices, patience_s=self._options.get("host_timeout_s", HOST_TIMEOUT_S))

    def _listen(self, timeout_s: float) -> None:
        assert self._selector is not None
        assert self._launcher is not None
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._launcher.listener:
                connection, _ = self._launcher.listener.accept()
                connection.settimeout(_SEND_TIMEOUT_S)
                with contextlib.suppress(OSError):
                    channel = self._launcher.accept(connection)
                    self._selector.register(connection, selectors.EVENT_READ, channel)
                continue
            channel = key.data
            try:
                data = channel.socket.recv(1 << 16)
                messages = channel.feed(data) if data else []
            except (OSError, ValueError):
                data, messages = b"", []
            if not data:
                self._selector.unregister(channel.socket)
                channel.socket.close()
                self._launcher.lost(channel)
            for message in messages:
                self._receive(message, channel)

    def _receive(self, message: dict[str, Any], channel: Lines) -> None:
        assert self._launcher is not None
        if message["type"] == "hello":
            if (rank := self._launcher.rank_of(message, channel)) is None:
                return
            self._workers[rank].channel = channel
        if (worker := next((one for one in self._workers if one.channel is channel), None)) is None:
            self._launcher.hears(message, channel)
            return
        worker.beat_at = time.monotonic()
        kind = message["type"]
        if kind == "ready":
            worker.ready = True
        elif kind == "beat":
            worker.state.update({name: message[name] for name in worker.state})
        elif kind == "progress":
            # All ranks take the same steps, and signs of life come seldom: a fault shall name the phase it fell into.
            for other in self._workers:
                other.state["phase"] = message["phase"]
            told = {name: message[name] for name in ("phase", "message", "done", "total")}
            self.on_progress(Progress(stage=worker.state["stage"], **told))
        elif kind == "answer":
            self._answers[message["id"]] = message["result"]
        elif kind in ("open", "tokens", "served"):
            self.on_served(message)
        elif kind == "fault":
            self._fault(Failure.model_validate(message["failure"]))

    def _fault(self, failure: Failure) -> None:
        """A worker told of its own fault. A lost peer is a consequence: whoever was lost is looked for first."""
        if failure.kind is FailureKind.COMMUNICATION_TIMEOUT:
            deadline = time.monotonic() + GRACE_S
            while time.monotonic() < deadline:
                if (dead := self._find_dead(only_signals=True)) is not None:
                    self._fail(dead)
                # Another worker's own fault, if it is on its way, is raised from within.
                self._listen(0.05)
        self._fail(failure)

    def _find_dead(self, *, only_signals: bool = False) -> Failure | None:
        for worker in self._workers:
            code = worker.process.poll()
            if code is None or (only_signals and code >= 0):
                continue
            if code > 0:
                # It exits by itself only after it has told why: read that first.
                deadline = time.monotonic() + GRACE_S
                while time.monotonic() < deadline:
                    self._listen(0.05)
            return self._died(worker, code)
        return None

    def _died(self, worker: _Worker, code: int) -> Failure:
        kind = FailureKind.WORKER_DIED
        if code == LOST:
            by, hint = "lost its connection", "it was killed, or its host, the network or its agent is gone"
        elif code < 0:
            name = signal.Signals(-code).name
            by, hint = f"was killed by {name}", "see its log"
            if name == "SIGKILL" and oom_kills() > self._oom_kills_before:
                kind = FailureKind.OUT_OF_MEMORY
                hint = "the host ran out of memory, as the kernel's log says; " + REMEDIES[FailureKind.OUT_OF_MEMORY]
            elif name == "SIGKILL":
                hint = "somebody killed it: the kernel has not killed anyone for memory meanwhile"
        else:
            by, hint = f"exited with code {code}", "see its log"
        return worker.failure(kind, f"{worker.where} {by} during {worker.state['phase']}; {hint}")

    def _patience_s(self, worker: _Worker) -> float:
        """How long a worker may be silent now; the unsplit model is loaded by one of them onto all GPUs."""
        claims = device_kind(worker.device) == "cuda" and worker.state["phase"] in ("start", "load")
        return max(self.hang_timeout_s, CONTEXT_S) if claims else self.hang_timeout_s

    def _silent(self, worker: _Worker) -> Failure:
        phase, waited_s = worker.state["phase"], self._patience_s(worker)
        why = "it is stopped or stuck; a slower machine may need a larger protocol.hang_timeout_s"
        told = f"{worker.where} gave no sign of life for {waited_s:.0f} s during {phase}: {why}"
        return worker.failure(FailureKind.WORKER_HUNG, told)

    def _stuck(self, stages: Sequence[_Worker], waited_s: float) -> Failure:
        doing = ", ".join(f"{worker.where} {worker.state['activity']}s" for worker in stages)
        why = f"nothing moved between the workers for {waited_s:.0f} s ({doing}): a message was lost"
        why += "; check the links, or NCCL_DEBUG=INFO on GPUs"
        kind, stage, phase = FailureKind.COMMUNICATION_TIMEOUT, stages[0].state["stage"], stages[0].state["phase"]
        return Failure(kind=kind, stage=stage, device=stages[0].device, phase=phase, message=why)

    def _fail(self, failure: Failure) -> None:
        """Ends the workers and raises; a worker that died may have been the first victim of another's fault."""
        self.kill()
        raise FleetError(failure)


def oom_kills() -> int:
    """How often the kernel has killed a process for memory since it booted; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
