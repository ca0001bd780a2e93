"""All processes for one model: our fleets and the peers' groups, started when first needed, idle until their turn."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Progress
from pipetune.bench.machine.hardware import cores_of, cpu_cores
from pipetune.bench.spec import ModelSpec
from tests.evaluation.peers.group import Kind, PeerGroup
from tests.workers import worker_pids

DEVICES = ("cpu:0", "cpu:1")
"""Two CPU workers: every side has them, or their cores, and nothing else."""
SAVE_TIMEOUT_S = 300.0


class Rig:
    """Processes of one model by name; what was dropped after a failure starts anew when next used."""

    def __init__(self, model: ModelSpec, *, on_start: Callable[[str], None]) -> None:
        """
        Args:
            on_start: told, in words, what is being started.
        """
        self.model = model
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        """Hears of the phases of whatever fleet is at work."""
        self._on_start = on_start
        self._folder = Path(tempfile.mkdtemp(prefix="pipetune-rig-"))
        self._experiments: dict[str, Experiment] = {}
        self._groups: dict[str, PeerGroup] = {}
        self._checkpoint: ModelSpec | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for experiment in self._experiments.values():
            experiment.close()
        for group in self._groups.values():
            group.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def experiment(self, name: str, devices: Sequence[str] = DEVICES) -> Experiment:
        """Our workers, a fleet for each plan that is compared, so that no round moves layers.

        Raises:
            PipetuneError: they do not start.
        """
        if name not in self._experiments:
            self._on_start(f"starting our workers for {name}")
            self._experiments[name] = Experiment.start(
                self.model,
                devices,
                log_dir=self._folder / f"fleet-{name}",
                on_progress=lambda progress: self.on_progress(progress),
            )
        return self._experiments[name]

    def group(self, kind: Kind, *, size: int, all_cores: bool = False, sleeps: bool = False) -> PeerGroup:
        """Processes of a peer, each with one worker's cores or with all of them.

        Raises:
            PeerError: they do not start.
        """
        name = f"{kind}-{size}{'-all' if all_cores else ''}{'-sleeps' if sleeps else ''}"
        if name not in self._groups:
            model = self._as_checkpoint() if kind == "pp" else self.model
            self._on_start(f"starting {name}")
            self._groups[name] = PeerGroup(
                kind,
                model,
                size=size,
                sleeps=sleeps,
                threads=cpu_cores() if all_cores else cores_of(DEVICES[0], DEVICES),
                log_dir=self._folder,
            )
        return self._groups[name]

    def drop(self, group: PeerGroup) -> None:
        """Ends a group that failed."""
        group.close()
        self._groups = {name: other for name, other in self._groups.items() if other is not group}

    def cpu_s(self) -> dict[int, float]:
        """CPU time so far of every process here, by its id."""
        pids = [pid for experiment in self._experiments.values() for pid in worker_pids(experiment.fleet)]
        pids += [pid for group in self._groups.values() for pid in group.pids]
        taken = {}
        for pid in pids:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                taken[pid] = times.user + times.system
        return taken

    def _as_checkpoint(self) -> ModelSpec:
        """The model as a folder with weights: transformers' pipeline mode loads nothing else."""
        if self.model.load_format != "dummy":
            return self.model
        if self._checkpoint is None:
            folder = self._folder / "checkpoint"
            self.group("hf", size=2).request("save", {"folder": str(folder)}, ranks=[0], timeout_s=SAVE_TIMEOUT_S)
            self._checkpoint = ModelSpec(name=str(folder), dtype=self.model.dtype)
        return self._checkpoint
