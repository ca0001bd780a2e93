"""The processes of one peer, from outside: started, asked for a pass, ended; whatever goes wrong becomes a reason."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pipetune.bench.spec import ModelSpec
from tests.evaluation.harness import findable, module_command

START_TIMEOUT_S = 300.0
"""Torch, transformers and the weights; a model that must be fetched was fetched before."""

Kind = Literal["hf", "pp", "gpipe", "cb"]
"""What `worker` says of them; `cb` is that of `tests.evaluation.load.worker`."""

WORKERS = {"cb": "tests.evaluation.load.worker"}


class PeerError(Exception):
    """A peer that does not start, fails at a pass, or takes too long; says why."""


class PeerGroup:
    """Processes of one kind that hold a model; they wait for commands without using the CPU."""

    def __init__(
        self, kind: Kind, model: ModelSpec, *, size: int, threads: int, sleeps: bool = False, log_dir: Path
    ) -> None:
        """Starts them and waits until each has its model.

        Args:
            size: processes.
            threads: of each.
            sleeps: threads that wait for each other sleep at once; by default they spin a while first.
            log_dir: where `<kind>-<size>x<threads>-<rank>.log` go.

        Raises:
            PeerError: one of them does not get ready.
        """
        self.kind, self.size = kind, size
        self._folder = Path(tempfile.mkdtemp(prefix="pipetune-peers-"))
        self._logs: list[Path] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        # One node's worth of what torchrun would say; the rendezvous itself is a file of ours. Whatever number of
        # threads this process was told does not hold for them.
        common = {
            **findable(os.environ),
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
            "PYTHONUNBUFFERED": "1",
        }
        if sleeps:
            common["OMP_WAIT_POLICY"] = "PASSIVE"
        for rank in range(size):
            log = log_dir / f"{kind}-{size}x{threads}-{rank}.log"
            with log.open("ab") as output:
                process = subprocess.Popen(
                    [
                        *module_command(WORKERS.get(kind, "tests.evaluation.peers.worker")),
                        *("--kind", kind, "--rank", str(rank), "--size", str(size), "--threads", str(threads)),
                        *("--model", model.model_dump_json()),
                        *("--rendezvous", str(self._folder / "rendezvous")),
                        *("--driver-pid", str(os.getpid())),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    start_new_session=True,
                )
            self._processes.append(process)
            self._logs.append(log)
        try:
            self._answers(range(size), START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank."""
        return tuple(process.pid for process in self._processes)

    def request(
        self, command: str, args: dict[str, Any], *, ranks: Sequence[int] | None = None, timeout_s: float
    ) -> list[dict[str, Any]]:
        """Gives a command to some processes, or to all, and gathers their answers.

        Raises:
            PeerError: one of them failed or took too long; the group must be closed then.
        """
        chosen = range(self.size) if ranks is None else ranks
        line = (json.dumps({"command": command, "args": args}) + "\n").encode()
        for rank in chosen:
            stdin = self._processes[rank].stdin
            assert stdin is not None
            try:
                stdin.write(line)
                stdin.flush()
            except OSError as error:
                raise PeerError(f"{self.kind} process {rank} is gone: {self._tail(rank)}") from error
        return self._answers(chosen, timeout_s)

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self, ranks: Sequence[int], timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        results: dict[int, dict[str, Any]] = {}
        buffers = dict.fromkeys(ranks, b"")
        with selectors.DefaultSelector() as selector:
            for rank in ranks:
                stdout = self._processes[rank].stdout
                assert stdout is not None
                selector.register(stdout, selectors.EVENT_READ, rank)
            while len(results) < len(ranks):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise PeerError(f"{self.kind} took longer than {timeout_s:.0f} s")
                for key, _ in ready:
                    rank = key.data
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        raise PeerError(f"{self.kind} process {rank} ended: {self._tail(rank)}")
                    buffers[rank] += data
                    if buffers[rank].endswith(b"\n"):
                        answer = json.loads(buffers[rank])
                        if "error" in answer:
                            raise PeerError(f"{self.kind}: {answer['error']}")
                        results[rank] = answer.get("result", {})
                        selector.unregister(key.fileobj)
        return [results[rank] for rank in ranks]

    def _tail(self, rank: int) -> str:
        lines = self._logs[rank].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it left no log"
