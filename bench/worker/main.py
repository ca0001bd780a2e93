"""The worker process: one per device, commanded over a socket by way of rank 0, kept over all plans of a study.

Started as `python -P -m pipetune.bench.worker`. Before anything heavy is imported it arranges to die with its driver.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipetune.bench.worker.channel import DriverLink

PR_SET_PDEATHSIG = 1
HEARTBEAT_S = 0.5
# Idle workers wait for commands in a collective, which must not time out over night.
CONTROL_TIMEOUT_DAYS = 7
STARTING = {"phase": "start", "activity": "idle", "tasks_done": 0, "stage": None}


def die_with_driver(driver_pid: int) -> None:
    """Asks the kernel to kill this process when its driver ends; the driver may have ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != driver_pid:
        os._exit(1)


class Worker:
    """Holds what lives as long as the process, and carries out commands."""

    def __init__(self, args: argparse.Namespace, link: DriverLink) -> None:
        import datetime as dt

        import torch
        import torch.distributed as dist

        from pipetune.bench.machine.hardware import cores_of, device_bytes
        from pipetune.bench.memory import ModelShape
        from pipetune.bench.models.attention import check_attention_devices
        from pipetune.bench.models.describe import describe_model
        from pipetune.bench.models.resolve import ResolvedModel, resolve_model
        from pipetune.bench.runtime.device import DeviceContext
        from pipetune.bench.runtime.loop import Status
        from pipetune.bench.spec import ModelSpec
        from pipetune.bench.worker.channel import ControlGroup
        from pipetune.bench.worker.serving import Serving
        from pipetune.bench.worker.stage_host import StageHost
        from pipetune.bench.worker.tokens import Tokens

        self.link = link
        self.rank: int = args.rank
        self.devices: tuple[str, ...] = tuple(args.devices.split(","))
        self.status = Status()
        device = DeviceContext(self.devices[self.rank], num_threads=cores_of(self.devices[self.rank], self.devices))
        timeout = dt.timedelta(days=CONTROL_TIMEOUT_DAYS)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{args.rendezvous}",
            rank=self.rank,
            world_size=len(self.devices),
            timeout=timeout,
        )
        self.control = ControlGroup(dist.new_group(backend="gloo", timeout=timeout), self.rank, len(self.devices))
        spec = ModelSpec.model_validate_json(args.model)
        check_attention_devices(spec, self.devices)
        # Rank 0 finds the model (and may have to convert it); the others take its word.
        found: dict[str, Any] = {}
        if self.rank == 0:
            resolved = resolve_model(spec, on_progress=lambda message: self._say(message))
            shape = describe_model(resolved)
            found = {"resolved": resolved.model_dump(mode="json"), "shape": shape.model_dump(mode="json")}
        found = self.control.broadcast(found)
        self.resolved = ResolvedModel.model_validate(found["resolved"])
        self.shape = ModelShape.model_validate(found["shape"])
        nominal = device_bytes(self.devices)
        self.control.barrier()
        name = self.devices[self.rank]
        available = device.available_bytes(nominal[name], self.devices.count(name))
        self.device_bytes: dict[str, int] = dict(zip(self.devices, self.control.gather(available), strict=True))
        self._torch = torch
        self.host = StageHost(
            resolved=self.resolved,
            shape=self.shape,
            device=device,
            devices=self.devices,
            device_bytes=self.device_bytes[self.devices[self.rank]],
            control=self.control,
            status=self.status,
            report=self._progress,
        )
        self.shape = self.host.shape
        self.device = device
        self.reference_path: str | None = None
        self.tokens = Tokens(self.resolved, self.shape, self.host.stage.config, self.control)
        self.serving = Serving(self.host, self.tokens)
        self._unsplit: Any = None
        device.touch_libraries(self.host.stage.dtype)
        self.host.note_idle_bytes()

    def serve(self) -> None:
        """Carries out commands until told to exit."""
        while True:
            self.status.phase, self.status.activity = "idle", "idle"
            command = self.link.receive() if self.rank == 0 else None
            command = self.control.broadcast(command)
            name = command["command"]
            if name == "exit":
                return
            result = getattr(self, f"do_{name}")(**command["args"])
            if self.rank == 0:
                self.link.send("answer", id=command["id"], result=result)

    def do_describe(self) -> dict[str, Any]:
        """Model, shape, machine and memory."""
        from pipetune.bench.machine.hardware import read_machine

        if self.rank != 0:
            return {}
        return {
            "model": self.resolved.spec.model_dump(mode="json"),
            "shape": self.shape.model_dump(mode="json"),
            "machine": read_machine().model_dump(mode="json"),
            "device_bytes": self.device_bytes,
        }

    def do_prompts(self, workload: dict[str, Any]) -> dict[str, Any]:
        """Token ids of the prompts."""
        from pipetune.bench.errors import ConfigError
        from pipetune.bench.spec import Workload

        try:
            return {"prompts": self.tokens.of_workload(Workload.model_validate(workload))}
        except ConfigError as error:
            return {"error": str(error)}

    def do_reference(self, path: str, workload: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any] | None:
        """Makes the study's reference with the unsplit model on rank 0."""
        from pipetune.bench.spec import Protocol, Workload
        from pipetune.bench.worker.reference import reference_digest
        from pipetune.bench.worker.unsplit_reference import make_reference

        spec = Workload.model_validate(workload)
        prompts = self.tokens.of_workload(spec)

        def work(model: Any) -> None:
            make_reference(
                model,
                prompts,
                workload=spec,
                protocol=Protocol.model_validate(protocol),
                dtype=self.host.stage.dtype,
                pad_token_id=self.tokens.pad_token_id,
                workload_digest=reference_digest(self.resolved.spec, spec),
            ).save(Path(path))

        self._progress("reference", 0, 1)
        failure = self.control.gather(self._with_unsplit("reference", work))[0]
        self.reference_path = None if failure else path
        return {"failure": failure}

    def do_reference_from_plan(self, path: str, spec: dict[str, Any], effective: dict[str, Any]) -> dict[str, Any]:
        """Makes the study's reference with a plan, where the unsplit model does not fit."""
        from pipetune.bench.spec import EffectivePlan, RunSpec
        from pipetune.bench.worker.output_check import make_reference_from_plan
        from pipetune.bench.worker.reference import reference_digest

        run = RunSpec.model_validate(spec)
        job = self.host.job(
            run,
            EffectivePlan.model_validate(effective),
            self.tokens.of_workload(run.workload),
            self.tokens.pad_token_id,
        )
        self._drop_unsplit()
        make_reference_from_plan(
            self.host,
            job,
            run.plan,
            Path(path),
            reference_digest(run.model, run.workload),
            run.protocol,
            self.host.stage.dtype,
        )
        self.reference_path = path
        return {}

    def do_use_reference(self, path: str) -> dict[str, Any]:
        """Takes a reference made earlier."""
        self.reference_path = path
        return {}

    def do_baseline(self, workload: dict[str, Any], protocol: dict[str, Any], batch_size: int) -> dict[str, Any]:
        """Measures the baseline on rank 0: one CPU worker's cores, or all GPUs by `device_map`."""
        from pipetune.bench.spec import Protocol, Workload
        from pipetune.bench.worker.baseline import measure_baseline

        spec = Workload.model_validate(workload)
        prompts = self.tokens.of_workload(spec)

        def work(model: Any) -> dict[str, Any]:
            measured = measure_baseline(
                model,
                prompts,
                workload=spec,
                protocol=Protocol.model_validate(protocol),
                batch_size=batch_size,
                pad_token_id=self.tokens.pad_token_id,
                devices=self.devices,
                device_bytes=self.device_bytes,
                report=self._progress,
            )
            return measured.model_dump(mode="json")

        outcome = self._with_unsplit("baseline", work)
        self.control.barrier()
        return {"outcome": outcome}

    def do_measure(self, spec: dict[str, Any], effective: dict[str, Any]) -> dict[str, Any]:
        """Measures one plan."""
        from pipetune.bench.spec import EffectivePlan, RunSpec
        from pipetune.bench.worker.plan_run import measure

        run = RunSpec.model_validate(spec)
        prompts = self.tokens.of_workload(run.workload)
        self._drop_unsplit()
        outcome = measure(
            self.host,
            run,
            EffectivePlan.model_validate(effective),
            prompts,
            pad_token_id=self.tokens.pad_token_id,
            reference_path=self.reference_path,
        )
        return {"outcome": outcome.model_dump(mode="json") if outcome is not None else None}

    def do_profile(self, grid: dict[str, Any], packed_weights: bool, cuda_graphs: bool) -> dict[str, Any]:
        """Times the model's parts on every device, and the links between them."""
        from pipetune.bench.profile import ProfileGrid
        from pipetune.bench.worker.profiling.profiler import Profiler

        self._drop_unsplit()
        return Profiler(
            self.host,
            ProfileGrid.model_validate(grid),
            packed_weights=packed_weights,
            cuda_graphs=cuda_graphs,
            pad_token_id=self.tokens.pad_token_id,
        ).run()

    def do_generate(self, **given: Any) -> dict[str, Any]:
        """Generates for use."""
        self._drop_unsplit()
        return self.serving.generate(**given)

    def do_score(self, **given: Any) -> dict[str, Any]:
        """Scores for use."""
        self._drop_unsplit()
        return self.serving.score(**given)

    def _whole_model(self, phase: str) -> Any:
        """The unsplit model, kept until a plan wants the memory; what it is loaded for is the next phase."""
        from pipetune.bench.runtime.stage.unsplit import load_unsplit

        if self._unsplit is None:
            self.status.phase = "load"
            gpus = tuple(dict.fromkeys(name for name in self.devices if name.startswith("cuda")))
            self._unsplit = load_unsplit(self.resolved, gpus or (self.devices[0],))
        self.status.phase = phase
        return self._unsplit

    def _drop_unsplit(self) -> None:
        """Frees the unsplit model, which may lie on every GPU, before any rank loads a stage."""
        if self._unsplit is not None:
            self._unsplit = None
            # No stage is held beside it, so that what it leaves behind is the process's own.
            self.host.note_idle_bytes()
        self.control.barrier()

    def _with_unsplit(self, phase: str, work: Callable[[Any], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Does something with the unsplit model on rank 0, in whose way no stage lies; every rank calls it.

        Returns:
            On rank 0 what the work gives, or the failure where memory runs out, which the process survives.
        """
        from pipetune.bench.worker.faults import failure_of, is_out_of_memory

        self.host.release()
        # Rank 0 is about to use the memory of all.
        self.control.barrier()
        if self.rank != 0:
            return None
        try:
            return work(self._whole_model(phase))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = failure_of(error, stage=None, device=self.device.name, phase=self.status.phase)
        # Not before the exception is gone: its traceback holds what was allocated so far.
        self._unsplit = None
        self.host.release()
        dumped: dict[str, Any] = failure.model_dump(mode="json")
        return dumped

    def state(self) -> dict[str, Any]:
        """What the worker is doing, for its sign of life."""
        return {
            "phase": self.status.phase,
            "activity": self.status.activity,
            "tasks_done": self.status.tasks_done,
            "stage": self.host.index,
        }

    def _progress(self, phase: str, done: int, total: int) -> None:
        if self.rank == 0:
            self.link.send("progress", phase=phase, message="", done=done, total=total)

    def _say(self, message: str) -> None:
        self.link.send("progress", phase="model", message=message, done=None, total=None)


def main() -> None:
    """Entry of the process: everything that goes wrong is told to the driver before it ends."""
    parser = argparse.ArgumentParser(prog="pipetune.bench.worker")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--devices", required=True, help="of all ranks, separated by commas")
    parser.add_argument("--model", required=True, help="a ModelSpec as JSON")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--rendezvous", required=True)
    parser.add_argument("--driver-pid", type=int, required=True)
    args = parser.parse_args()
    die_with_driver(args.driver_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    from pipetune.bench.worker.channel import DriverLink

    link = DriverLink(args.socket, args.rank)
    if args.rank != 0:
        link.end_with_driver()
    worker: Worker | None = None
    # From now on silence counts, and what is imported next may take longer than a worker may be silent.
    link.beat(HEARTBEAT_S, lambda: worker.state() if worker is not None else STARTING)
    try:
        worker = Worker(args, link)
        # What was imported stays for ever: collections between passes need not look at it.
        gc.collect()
        gc.freeze()
        link.send("ready")
        worker.serve()
    except BaseException as error:
        _report(link, worker, args, error)
        # Threads of gloo or NCCL may hang in messages that will never come.
        os._exit(1)
    os._exit(0)


def _report(link: DriverLink, worker: Worker | None, args: argparse.Namespace, error: BaseException) -> None:
    from pipetune.bench.worker.faults import failure_of

    traceback.print_exc()
    sys.stderr.flush()
    status = worker.status if worker is not None else None
    failure = failure_of(
        error,
        stage=worker.host.index if worker is not None else None,
        device=args.devices.split(",")[args.rank],
        phase=status.phase if status is not None else "start",
    )
    link.send("fault", failure=json.loads(failure.model_dump_json()))
