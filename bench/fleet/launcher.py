"""How the workers of a fleet come to be, end, and are listened to; on this host. No torch here."""

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipetune.bench.errors import ConfigError
from pipetune.bench.files import scratch_folder
from pipetune.bench.fleet.processes import Process, start_worker
from pipetune.bench.machine.wire import Lines
from pipetune.bench.spec import ModelSpec, device_kind

LOST = -1000
"""Exit status of a worker whose connection has ended, on a host where nobody says why."""
_MAX_SOCKET_PATH = 103
"""Bytes; of the systems that pipetune runs on, the least that a socket's address holds."""
_KILL_TIMEOUT_S = 60.0
"""A killed worker that is not gone after so long is left to the kernel."""


def worker_environment(devices: Sequence[str], interface: str) -> dict[str, str]:
    """What workers see beside their host's own environment."""
    added = {
        # NVML counts GPUs by bus; CUDA would count the fastest first.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": os.environ.get("TRANSFORMERS_VERBOSITY", "error"),
        "PYTHONUNBUFFERED": "1",
    }
    gpus = [device for device in devices if device_kind(device) == "cuda"]
    if len(set(gpus)) > 1 or (len(gpus) > 1 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"):
        # A kernel that is loaded at its first use waits for all that runs, and a posted NCCL receive runs until its
        # message comes: two stages that wait so for each other wait for ever. Without NCCL it only costs time.
        added["CUDA_MODULE_LOADING"] = os.environ.get("CUDA_MODULE_LOADING", "EAGER")
    return added


class LocalLauncher:
    """Processes of this host; a socket and a rendezvous in a private folder that goes with them."""

    connected: Sequence[Lines] = ()
    """Connections that outlive the fleet."""

    def __init__(self, devices: Sequence[str], worker_env: Mapping[str, Mapping[str, str]]) -> None:
        """Raises ConfigError where the folder for temporary files has too long a path for a socket."""
        self._devices, self._worker_env = tuple(devices), worker_env
        self._processes: list[Process] = []
        self._scratch = contextlib.ExitStack()
        self._folder = self._scratch.enter_context(scratch_folder())
        path = self._folder / "driver.sock"
        if (length := len(os.fsencode(path))) > _MAX_SOCKET_PATH:
            self._scratch.close()
            why = f"a socket's path there would have {length} bytes of at most {_MAX_SOCKET_PATH}; give a shorter one"
            raise ConfigError(f"TMPDIR: {tempfile.gettempdir()} is too long: {why}")
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        path.chmod(0o600)
        self.listener.listen(len(self._devices))

    def accept(self, connection: socket.socket) -> Lines:
        """What listens to a connection: whoever can reach the socket is trusted."""
        return Lines(connection)

    def rank_of(self, hello: dict[str, Any], channel: Lines) -> int | None:
        """Rank of the worker that says hello, as it was told."""
        return int(hello["rank"])

    def hears(self, message: dict[str, Any], channel: Lines) -> None:
        """Takes in what somebody says who is no worker."""
        raise AssertionError(f"only workers speak here: {message}")

    def lost(self, channel: Lines) -> None:
        """Takes in that a connection has ended."""

    def start(
        self, model: ModelSpec, log_dir: Path | None, listen: Callable[[], None], say: Callable[[str], None]
    ) -> Sequence[tuple[Process, Path | None]]:
        """One process a rank, with its log; at once."""
        log_dir = log_dir or self._folder
        log_dir.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            # An empty entry is the folder that we were started in.
            "PYTHONPATH": os.pathsep.join(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
            **worker_environment(self._devices, "lo"),
        }
        on_gpus = any(device_kind(device) == "cuda" for device in self._devices)
        logs = [log_dir / f"rank-{rank}.log" for rank in range(len(self._devices))]
        for rank, device in enumerate(self._devices):
            with logs[rank].open("ab") as output:
                process = start_worker(
                    [
                        *("--rank", str(rank), "--devices", ",".join(self._devices)),
                        *("--model", model.model_dump_json(exclude_unset=True)),
                        *("--socket", str(self._folder / "driver.sock")),
                        *("--rendezvous", str(self._folder / "rendezvous")),
                    ],
                    {**environment, **self._worker_env.get(device, {})},
                    output,
                    forked=device not in self._worker_env and not on_gpus,
                )
            self._processes.append(process)
        return list(zip(self._processes, logs, strict=True))

    def end(self) -> None:
        """Kills them, and removes what they were started with."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            # A process that hangs in a GPU's driver cannot even be killed.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_TIMEOUT_S)
        self.listener.close()
        self._scratch.close()
