"""What a worker does: commands come over a socket by way of rank 0, and every rank carries them out."""

import argparse
import base64
import contextlib
import dataclasses
import datetime as dt
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import validate_call

from pipetune.bench import spec as s
from pipetune.bench.errors import ConfigError, ModelError, StudyError, disk_fault
from pipetune.bench.files import scratch_folder, write_durably
from pipetune.bench.machine.hardware import bind_near, cores_of, device_bytes, read_machine
from pipetune.bench.memory import ModelShape
from pipetune.bench.models.attention import check_attention_devices
from pipetune.bench.models.describe import describe_model
from pipetune.bench.models.resolve import ResolvedModel, resolve_model
from pipetune.bench.models.weights import check_weights
from pipetune.bench.profile import ProfileGrid
from pipetune.bench.record import Failure, Machine, Measurement
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.loop import Status
from pipetune.bench.runtime.stage.activations import measure_tasks
from pipetune.bench.runtime.stage.unsplit import load_unsplit
from pipetune.bench.runtime.wiring import communicators_bytes
from pipetune.bench.worker.baseline import measure_baseline
from pipetune.bench.worker.channel import ControlGroup, DriverLink, agents_store
from pipetune.bench.worker.faults import failure_of, is_out_of_memory
from pipetune.bench.worker.load_run import LoadRun
from pipetune.bench.worker.online import Online
from pipetune.bench.worker.output_check import make_reference_from_plan
from pipetune.bench.worker.plan_run import PlanRun
from pipetune.bench.worker.profiling.link_times import time_links
from pipetune.bench.worker.profiling.profiler import Profiler
from pipetune.bench.worker.prompts import Tokens, check_text_files
from pipetune.bench.worker.reference import Reference, reference_digest
from pipetune.bench.worker.serving import Serving
from pipetune.bench.worker.stage_host import StageHost, job_of
from pipetune.bench.worker.unsplit_reference import make_reference

# Idle workers wait for commands in a collective, which must not time out over night.
CONTROL_TIMEOUT = dt.timedelta(days=7)
MOST_REFERRED = 64
"""Requests under arrivals whose tokens are compared with the unsplit model's."""
_CHECKED = ("prompts", "measure")
"""Commands, beside those for use, that are refused where they cannot be carried out, and cost no worker."""


def find_model(spec: s.ModelSpec, say: Callable[[str], None]) -> dict[str, Any]:
    """A model whose files are whole and go together, as `resolved`, and its `shape`; ModelError says what is not so."""
    try:
        resolved = resolve_model(spec, on_progress=say)
        check_text_files(resolved.folder)
        resolved = check_weights(resolved)
        return {"resolved": resolved, "shape": describe_model(resolved)}
    # Files come from anywhere, and may hold any type in any place.
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        why = disk_fault(error) if isinstance(error, OSError) else f"damaged, or of another model ({error!r})"
        raise ModelError(f"model.name: {spec.name!r} cannot be read: {why}") from error


class Worker:
    """Holds what lives as long as the process, and carries out commands."""

    def __init__(self, args: argparse.Namespace, link: DriverLink) -> None:
        self.link = link
        self.rank: int = args.rank
        self.devices: tuple[str, ...] = tuple(args.devices.split(","))
        self.status = Status()
        name = self.devices[self.rank]
        self.blamed: str | None = name
        """The device that a fault of this worker is laid to; None where several come into question."""
        self._local = s.on_host(self.devices, s.device_host(name))
        own_name = s.local_name(name)
        if s.device_kind(name) == "cuda":
            bind_near(own_name)
        cores = min(cores_of(own_name, self._local), len(os.sched_getaffinity(0)))
        device = DeviceContext(name, num_threads=cores)
        file = args.rendezvous
        meet: dict[str, Any] = {"store": agents_store()} if file is None else {"init_method": f"file://{file}"}
        dist.init_process_group("gloo", **meet, rank=self.rank, world_size=len(self.devices), timeout=CONTROL_TIMEOUT)
        group = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        self.control = ControlGroup(group, self.rank, len(self.devices))
        spec = s.ModelSpec.model_validate_json(args.model)
        check_attention_devices(spec, self.devices)
        # Rank 0 finds the model (and may have to convert it); the others take its word.
        found: dict[str, Any] = {}
        if self.rank == 0:
            found = find_model(spec, lambda message: self._progress("model", message=message))
            if any(s.device_kind(one) == "cuda" for one in self.devices):
                tasks = measure_tasks(found["resolved"], found["shape"])
                found["shape"] = found["shape"].model_copy(update={"task_bytes": tasks})
        found = self.control.broadcast(found)
        self.resolved = ResolvedModel.model_validate(found["resolved"])
        self._check_same_model()
        nominal = device_bytes([one for one in self._local if s.device_kind(one) == "cpu"])
        self.control.barrier()
        available = device.available_bytes(nominal.get(own_name), self.devices.count(name))
        available -= communicators_bytes(self.devices, name)
        self.device_bytes: dict[str, int] = dict(zip(self.devices, self.control.gather(available), strict=True))
        self.host = StageHost(
            resolved=self.resolved,
            shape=ModelShape.model_validate(found["shape"]),
            device=device,
            devices=self.devices,
            device_bytes=self.device_bytes[name],
            control=self.control,
            status=self.status,
            report=self._progress,
        )
        self.reference_path: Path | None = None
        self.tokens = Tokens(self.resolved, self.host.shape, self.host.stage.config, self.control)
        self.online, serving = Online(self.host, self.tokens, link), Serving(self.host, self.tokens)
        self._for_use: dict[str, Callable[..., dict[str, Any]]] = {
            "generate": serving.generate,
            "score": serving.score,
            "run_trace": self.online.run_trace,
            "open_queue": self.online.open_queue,
        }
        self._unsplit: Any = None
        # Over all GPUs by `device_map`, or on one CPU worker's cores.
        gpus = tuple(one for one in self._local if s.device_kind(one) == "cuda")
        self._unsplit_devices = tuple(dict.fromkeys(gpus)) or self._local[:1]
        device.touch_libraries(self.host.stage.dtype)
        self.host.note_idle_bytes()

    def _check_same_model(self) -> None:
        """Raises ModelError where another host has another model in its place, or none."""
        if len(s.hosts_of(self.devices)) == 1:
            return
        digest = hashlib.sha256()
        for name in ("config.json", "model.safetensors.index.json"):
            if (path := self.resolved.folder / name).exists():
                digest.update(path.read_bytes())
        seen = self.control.gather(digest.hexdigest())
        if other := [s.device_host(one) for one, there in zip(self.devices, seen, strict=True) if there != seen[0]]:
            raise ModelError(
                f"model.name: {self.resolved.folder} on {other[0]} is not what it is on host0; all hosts need the same "
                "model at the same path, or the same revision in their caches"
            )

    def serve(self) -> None:
        """Carries out commands until told to exit."""
        while True:
            self.status.phase, self.status.activity = "idle", "idle"
            command = self.control.broadcast(self.link.question() if self.rank == 0 else None)
            if (name := command["command"]) == "exit":
                return
            try:
                if name in self._for_use:
                    self._drop_unsplit()
                    result = self._for_use[name](**command["args"])
                else:
                    result = getattr(self, f"do_{name}")(**command["args"])
            except (ConfigError, StudyError) as error:
                # A StudyError is the reference's: no plan's fault.
                if isinstance(error, ConfigError) and name not in (*self._for_use, *_CHECKED):
                    raise
                result = {"error": str(error), "of_study": isinstance(error, StudyError)}
            if self.rank == 0:
                self.link.send("answer", id=command["id"], result=result)

    def do_describe(self) -> dict[str, Any]:
        """Model, shape, memory, and the machine, of all hosts."""
        hosts = [s.device_host(one) for one in self.devices]
        is_first = hosts.index(hosts[self.rank]) == self.rank
        found = self.control.gather(read_machine() if is_first else None)
        machine, *others = [Machine.model_validate(row) for row in found if row is not None]
        hardware = machine.hardware.model_copy(update={"further_hosts": tuple(one.hardware for one in others)})
        names = ", ".join(one.hostname for one in (machine, *others))
        whole = {"hostname": names, "hardware": hardware, "hardware_id": hardware.hardware_id}
        return {
            "model": self.resolved.spec,
            "shape": self.host.shape,
            "machine": machine.model_copy(update=whole),
            "device_bytes": self.device_bytes,
            "folder": str(self.resolved.folder),
        }

    @validate_call
    def do_prompts(self, workload: s.Workload, as_text: bool) -> dict[str, Any]:
        """Token ids of the prompts."""
        return {"prompts": self.tokens.of_workload(workload, as_text=as_text)}

    @validate_call
    def do_reference(self, path: Path, workload: s.Workload, protocol: s.Protocol) -> dict[str, Any]:
        """Makes the study's reference with the unsplit model on rank 0."""
        prompts = self.tokens.of_workload(workload)
        make = partial(
            make_reference,
            prompts=prompts if workload.arrivals is None else prompts[:MOST_REFERRED],
            workload=workload,
            protocol=protocol,
            dtype=self.host.stage.dtype,
            pad_token_id=self.tokens.pad_token_id,
            workload_digest=reference_digest(self.resolved.spec, workload),
        )
        self._progress("reference", 0, 1)
        failure = self.control.broadcast(self._with_unsplit("reference", lambda model: make(model).save(path)))
        self.reference_path = None if failure else path
        return {"failure": failure}

    @validate_call
    def do_reference_from_plan(self, path: Path, spec: s.RunSpec, effective: s.EffectivePlan) -> dict[str, Any]:
        """Makes the study's reference with a plan, where the unsplit model does not fit."""
        job = self._job(spec, effective)
        self._drop_unsplit()
        digest = reference_digest(spec.model, spec.workload)
        with self._kept_by_rank_0(path) as own:
            make_reference_from_plan(self.host, job, spec.plan, own, digest, spec.protocol)
        self.reference_path = path
        return {}

    @validate_call
    def do_use_reference(self, path: Path, workload: s.Workload) -> dict[str, Any]:
        """Takes a reference made earlier, if it can be read and is of this workload."""
        self._load_reference(path, reference_digest(self.resolved.spec, workload))
        self.reference_path = path
        return {}

    @contextlib.contextmanager
    def _on_every_host(self, path: Path) -> Iterator[Path]:
        """A file of rank 0's host, by a name that it has here."""
        if len(s.hosts_of(self.devices)) == 1:
            yield path
            return
        held = self.control.broadcast_bytes(path.read_bytes() if self.rank == 0 and path.exists() else b"")
        with scratch_folder() as folder:
            copy = folder / path.name
            if held:
                copy.write_bytes(held)
            yield copy

    @contextlib.contextmanager
    def _kept_by_rank_0(self, path: Path) -> Iterator[Path]:
        """Where one rank may write a file that shall be on rank 0's host."""
        if len(s.hosts_of(self.devices)) == 1:
            yield path
            return
        with scratch_folder() as folder:
            own = folder / path.name
            yield own
            rows = self.control.gather(base64.b64encode(own.read_bytes()).decode() if own.exists() else None)
        if self.rank == 0:
            write_durably(path, base64.b64decode(next(row for row in rows if row is not None)))

    def _load_reference(self, path: Path, digest: str) -> Reference:
        """The reference, where every rank can read it; else StudyError on all of them, none left behind."""
        reference, error = None, None
        try:
            with self._on_every_host(path) as own:
                reference = Reference.load(own, digest)
        except StudyError as refused:
            error = str(refused)
        errors = [one for one in self.control.gather(error) if one is not None]
        if reference is None or errors:
            raise StudyError(errors[0])
        return reference

    @validate_call
    def do_baseline(self, workload: s.Workload, protocol: s.Protocol, batch_size: int) -> dict[str, Any]:
        """Measures the baseline on rank 0."""
        prompts = self.tokens.of_workload(workload)
        host = s.device_host(self.devices[0])
        work = partial(
            measure_baseline,
            prompts=prompts,
            workload=workload,
            protocol=protocol,
            batch_size=batch_size,
            pad_token_id=self.tokens.pad_token_id,
            devices=self._unsplit_devices,
            device_bytes={one: self.device_bytes[f"{host}/{one}" if host else one] for one in self._unsplit_devices},
            report=self._progress,
        )
        outcome = self._with_unsplit("baseline", work)
        self.control.barrier()
        return {"outcome": outcome}

    @validate_call
    def do_measure(self, spec: s.RunSpec, effective: s.EffectivePlan) -> dict[str, Any]:
        """Measures one plan."""
        job = self._job(spec, effective)
        self._drop_unsplit()
        reference = None
        if self.reference_path is not None and spec.protocol.check_outputs:
            reference = self._load_reference(self.reference_path, reference_digest(spec.model, spec.workload))
        if spec.workload.arrivals is not None:
            return {"outcome": LoadRun(self.host, spec, effective.in_flight, job, reference, self.online).measure()}
        return {"outcome": PlanRun(self.host, spec, job, reference).measure()}

    @validate_call
    def do_profile(self, grid: ProfileGrid, packed_weights: bool, cuda_graphs: bool) -> dict[str, Any]:
        """Times the model's parts on every device, and the links between them."""
        self._drop_unsplit()
        switches = {"packed_weights": packed_weights, "cuda_graphs": cuda_graphs}
        return Profiler(self.host, grid, **switches, pad_token_id=self.tokens.pad_token_id).run()

    def do_links(self) -> dict[str, Any]:
        """Times the links between devices alone."""
        self._drop_unsplit()
        self.host.status.phase = "profile"
        return {"links": time_links(self.host)}

    def _job(self, spec: s.RunSpec, effective: s.EffectivePlan) -> Job:
        """The pass over all prompts that a run spec asks for."""
        return job_of(
            spec.plan,
            self.tokens.of_workload(spec.workload),
            output_len=spec.workload.generated_len,
            output_lens=spec.workload.unlike_lens,
            in_flight=effective.in_flight,
            pad_token_id=self.tokens.pad_token_id,
            sampling=spec.workload.sampling,
        )

    def _drop_unsplit(self) -> None:
        """Frees the unsplit model, which may lie on every GPU, before any rank loads a stage."""
        if self._unsplit is not None:
            self._unsplit = None
            # No stage is held beside it, so that what it leaves behind is the process's own.
            self.host.note_idle_bytes()
        self.control.barrier()

    def _with_unsplit(self, phase: str, work: Callable[[Any], Measurement | None]) -> Measurement | Failure | None:
        """Does something with the unsplit model on rank 0, in whose way no stage lies; every rank calls it.

        The model is kept until a plan wants the memory. Rank 0 gets what the work gives, or the failure where memory
        runs out, which the process survives.
        """
        self.host.release()
        # Rank 0 is about to use the memory of all.
        self.control.barrier()
        if self.rank != 0:
            return None
        try:
            if self._unsplit is None:
                self.status.phase = "load"
                # Before the interpreter's lock is held: CUDA makes contexts on the other GPUs.
                self._progress("load")
                self._unsplit = load_unsplit(self.resolved, self._unsplit_devices)
            self.status.phase = phase
            return work(self._unsplit)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                self.blamed = self.blamed if len(self._unsplit_devices) == 1 else None
                raise
            failure = failure_of(error, stage=None, device=self.devices[0], phase=self.status.phase)
        # Not before the exception is gone: its traceback holds what was allocated so far.
        self._unsplit = None
        self.host.release()
        return failure

    def state(self) -> dict[str, Any]:
        """What the worker is doing, for its sign of life."""
        return {**dataclasses.asdict(self.status), "stage": self.host.index}

    def _progress(self, phase: str, done: int | None = None, total: int | None = None, *, message: str = "") -> None:
        if self.rank == 0:
            self.link.send("progress", phase=phase, message=message, done=done, total=total)
