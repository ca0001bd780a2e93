"""What a search needs of whatever runs plans: our own fleet, or another engine beside it.

Profiles, generation and scoring are the fleet's alone: who wants them asks for a `Fleet`.
"""

from pathlib import Path
from typing import Protocol

from pipetune.bench.memory import ModelShape
from pipetune.bench.record import Failure, Machine, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, RunSpec, Workload
from pipetune.bench.spec import Protocol as MeasuringProtocol


class Engine(Protocol):
    """Runs plans of one model on some devices, and starts again by itself after a failure, when next used. A run that
    fails gives a `Failure`, in a driver that lives on. Errors are those of `Fleet`."""

    model: ModelSpec
    """With its revision."""
    devices: tuple[str, ...]
    shape: ModelShape
    machine: Machine
    device_bytes: dict[str, int]

    def prompt_lens(self, workload: Workload) -> tuple[int, ...]:
        """Length of every prompt in tokens."""

    def resolve(self, plan: Plan, workload: Workload) -> EffectivePlan | Failure:
        """What the plan comes to under its memory caps, or why it does not fit."""

    def make_reference(self, path: Path, workload: Workload, protocol: MeasuringProtocol) -> Failure | None:
        """Asks the unsplit model for what outputs are compared with from now on, and keeps it in a file."""

    def make_reference_from_plan(self, path: Path, spec: RunSpec, effective: EffectivePlan) -> Failure | None:
        """Takes a plan's own output for it, where the unsplit model fits on no device."""

    def use_reference(self, path: Path, workload: Workload) -> None:
        """Takes a reference made earlier."""

    def baseline(self, workload: Workload, protocol: MeasuringProtocol, batch_size: int) -> Measurement | Failure:
        """Measures the model un-pipelined."""

    def measure(self, spec: RunSpec, effective: EffectivePlan) -> Measurement | Failure:
        """Moves to the plan, checks its output, warms up and measures."""

    def interrupt(self) -> None:
        """Ends what runs, at once."""

    def close(self) -> None:
        """Ends everything."""
