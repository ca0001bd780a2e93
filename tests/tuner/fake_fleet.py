"""A fleet without processes: simulated times, and faults on demand; it stands where `bench.fleet.fleet.Fleet` does.

Its machine is the record factory's: profiles say what its tasks take, and measurements are its schedule simulated with
these times, noise, and what a test adds that no profile knows of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pipetune.bench.errors import FleetError, StudyError
from pipetune.bench.fleet.fleet import Progress
from pipetune.bench.memory import ModelShape, resolve
from pipetune.bench.profile import DeviceProfile, LayerTimes, LinkProfile, Profile, ProfileGrid, TaskTime
from pipetune.bench.record import Failure, FailureKind, Machine, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from tests.record_factory import (
    HEAD_LAYERS,
    layer_s,
    make_baseline_measurement,
    make_machine,
    make_measurement,
    make_prompt_lens,
    make_shape,
)

HOP_S = 1e-3
Fault = Callable[[RunSpec, int], Failure | None]
"""Given the spec and how many plans were asked for before, a failure or None; it may raise."""


class FakeFleet:
    """Measures by the record factory's simulated machine."""

    def __init__(self, lab: Lab, model: ModelSpec, devices: Sequence[str]) -> None:
        self._lab = lab
        self.model = model.model_copy(update={"revision": lab.revision})
        self.devices = tuple(devices)
        self.shape = lab.shape
        self.machine = lab.machine
        self.device_bytes = dict.fromkeys(devices, lab.device_bytes)
        self.worker_env: dict[str, dict[str, str]] = {}
        self.closed = False

    def profile(self, grid: ProfileGrid, *, packed_weights: bool = True, cuda_graphs: bool = True) -> Profile:
        self._lab.calls.append("profile")
        if self._lab.profile_fault is not None:
            raise FleetError(self._lab.profile_fault)
        return make_profile(self.model, self.shape, self.machine, self.device_bytes, grid, hop_s=HOP_S)

    def prompts(self, workload: Workload, *, as_text: bool = False) -> tuple[tuple[int, ...], ...]:
        return ((1,) * 16,) * workload.num_prompts

    def prompt_lens(self, workload: Workload) -> tuple[int, ...]:
        return make_prompt_lens(workload)

    def resolve(self, plan: Plan, workload: Workload) -> EffectivePlan | Failure:
        prompt_lens = self.prompt_lens(workload)
        lens = {"prompt_len": max(prompt_lens), "output_len": workload.generated_len}
        return resolve(self.shape, plan, num_prompts=len(prompt_lens), **lens, device_bytes=self.device_bytes)

    def make_reference(self, path: Path, workload: Workload, protocol: Protocol) -> Failure | None:
        self._lab.calls.append("reference")
        path.write_bytes(b"reference")
        return None

    def make_reference_from_plan(self, path: Path, spec: RunSpec, effective: EffectivePlan) -> Failure | None:
        self._lab.calls.append(f"reference {effective.key}")
        path.write_bytes(b"reference")
        return None

    def use_reference(self, path: Path, workload: Workload) -> None:
        if not path.is_file() or path.read_bytes() != b"reference":
            raise StudyError(f"{path}: not a reference; --resume makes it anew")
        self._lab.calls.append("use_reference")

    def baseline(self, workload: Workload, protocol: Protocol, batch_size: int) -> Measurement | Failure:
        assert not self.closed
        self._lab.calls.append(f"baseline {batch_size}")
        failure = self._lab.baseline_fault(batch_size)
        seed = len(self._lab.calls)
        return failure or make_baseline_measurement(batch_size, workload, num_iters=protocol.num_iters, seed=seed)

    def measure(self, spec: RunSpec, effective: EffectivePlan) -> Measurement | Failure:
        assert not self.closed
        self._lab.calls.append(f"measure {effective.key}")
        failure = self._lab.fault(spec, self._lab.measured)
        self._lab.measured += 1
        if failure is not None:
            return failure
        plan = spec.plan.model_copy(update={"max_in_flight": effective.in_flight})
        measured = make_measurement(
            plan,
            spec.workload,
            num_iters=spec.protocol.num_iters,
            seed=len(self._lab.calls),
            hop_s=HOP_S,
            drift=self._lab.drift(spec),
        )
        return measured if spec.protocol.check_outputs else measured.model_copy(update={"check": None})

    def interrupt(self) -> None:
        self._lab.calls.append("interrupt")

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exit_info: object) -> None:
        self.close()


class Lab:
    """What fake fleets share: the machine, the model, the faults, and what was asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.measured = 0
        self.starts = 0
        self.revision = "0123abc"
        self.shape: ModelShape = make_shape()
        self.machine: Machine = make_machine()
        self.device_bytes = 4 * 2**30
        self.profile_fault: Failure | None = None
        self.drift: Callable[[RunSpec], float] = lambda spec: 1.0
        """How much slower a plan's tasks are than any profile says."""
        self.fault: Fault = lambda spec, number: None
        self.baseline_fault: Callable[[int], Failure | None] = lambda batch_size: None

    def start(
        self,
        model: ModelSpec,
        devices: Sequence[str],
        *,
        log_dir: Path | None = None,
        hang_timeout_s: float = 10.0,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Any:
        self.starts += 1
        if on_progress is not None:
            on_progress(Progress(phase="start", message="starting"))
        return FakeFleet(self, model, devices)


def make_profile(
    model: ModelSpec,
    shape: ModelShape,
    machine: Machine,
    device_bytes: dict[str, int],
    grid: ProfileGrid,
    *,
    hop_s: float,
) -> Profile:
    """What the record factory's machine takes for a layer and for the head; all else takes no time."""
    sizes = [(rows, length, 0) for rows in grid.rows for length in grid.lengths]
    sizes += [(rows, size, past) for rows in grid.rows for size, past in grid.chunks]
    sizes += [(rows, 1, past) for rows in grid.rows for past in grid.pasts]

    def times(layers: float) -> tuple[TaskTime, ...]:
        return tuple(
            TaskTime(
                rows=rows,
                new_tokens=tokens,
                past_tokens=past,
                seconds=layers * layer_s(rows, tokens, is_prefill=past == 0 or tokens > 1),
            )
            for rows, tokens, past in sizes
        )

    return Profile(
        model=model,
        shape=shape,
        machine=machine,
        device_bytes=device_bytes,
        scores=grid.scores,
        devices=tuple(
            DeviceProfile(
                device=device,
                layers=(LayerTimes(layers=tuple(range(shape.num_layers)), times=times(1.0)),),
                overhead=times(0.0),
                embedding=times(0.0),
                head=times(HEAD_LAYERS),
            )
            for device in device_bytes
        ),
        links=tuple(
            LinkProfile(source=source, target=target, latency_s=hop_s, bytes_per_s=1e12)
            for source in device_bytes
            for target in device_bytes
            if source != target
        ),
        measured_at="2026-01-02T03:00:00+00:00",
        took_s=12.5,
    )


def failure(kind: FailureKind, **fields: Any) -> Failure:
    return Failure(kind=kind, message=f"made {kind.value}", phase="measure", stage=0, **fields)
