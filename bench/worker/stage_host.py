"""What one worker holds between runs: its stage, its links, its KV slots; and how all ranks move from plan to plan.

Every rank runs the same steps in the same order; what one rank alone knows (tokens, logits) is gathered before any
rank decides, so that all decide alike.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import psutil

from pipetune.bench.memory import ModelShape
from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.runtime.device import DeviceContext, undisturbed
from pipetune.bench.runtime.job import Job
from pipetune.bench.runtime.kernels.compiled import CompiledLayers
from pipetune.bench.runtime.kernels.graphs import DecodeGraphs
from pipetune.bench.runtime.loop import Edges, PassResult, StageLoop, Status
from pipetune.bench.runtime.stage.stage import Stage, is_mixed
from pipetune.bench.runtime.wiring import Links
from pipetune.bench.spec import Plan, device_host
from pipetune.bench.worker.channel import ControlGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A plan laid over the ranks of a fleet, as one of them sees it."""

    replicas: tuple[tuple[int, ...], ...]
    """The rank of each stage, replica by replica."""
    replica: int | None
    """The replica that this rank is part of; None if it holds no stage."""
    index: int | None
    """The stage of this rank within its replica."""

    @classmethod
    def of(cls, plan: Plan, devices: Sequence[str], rank: int) -> Self:
        """Lays a plan over all ranks' devices, in a rank's view; a device named twice takes its workers in turn."""
        taken: list[int] = []
        for wanted in plan.devices:
            taken.append(next(free for free, name in enumerate(devices) if name == wanted and free not in taken))
        width = len(plan.stages)
        replicas = tuple(tuple(taken[first : first + width]) for first in range(0, len(taken), width))
        replica, index = divmod(taken.index(rank), width) if rank in taken else (None, None)
        return cls(replicas=replicas, replica=replica, index=index)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of all stages, replica by replica."""
        return tuple(rank for row in self.replicas for rank in row)

    @property
    def last_ranks(self) -> tuple[int, ...]:
        """Holders of each replica's last stage."""
        return tuple(row[-1] for row in self.replicas)


class StageHost:
    """One worker's part in the present plan."""

    def __init__(
        self,
        *,
        resolved: ResolvedModel,
        shape: ModelShape,
        device: DeviceContext,
        devices: Sequence[str],
        device_bytes: int,
        control: ControlGroup,
        status: Status,
        report: Any,
    ) -> None:
        """`devices` are those of all ranks, by rank; `report` is called with phase, done and total, for progress."""
        self.rank = control.rank
        self.device = device
        self.devices = tuple(devices)
        self._hosts = tuple(map(device_host, devices))
        self.control = control
        self.status = status
        self.report = report
        self.device_bytes = device_bytes
        self.idle_bytes = 0
        """What the process took when last no model was loaded."""
        self.stage = Stage(resolved, device.torch_device)
        message_bytes = self.stage.message_values * self.stage.message_dtype.itemsize
        if message_bytes != shape.crossing_bytes:
            shape = shape.model_copy(update={"message_bytes": message_bytes})
        self.shape = shape
        self.links = Links(self.devices, self.rank, device.torch_device)
        self._packed = False
        self.compiled = CompiledLayers()
        self.loop: StageLoop | None = None
        self.plan: Plan | None = None
        self.placement: Placement | None = None

    @property
    def index(self) -> int | None:
        """The stage that this rank holds, within its replica."""
        return self.placement.index if self.placement is not None else None

    def apply(self, plan: Plan) -> tuple[float, tuple[int, ...]]:
        """Moves to a plan; loads only layers that changed hands. Gives the seconds until the slowest stage was ready,
        and all layers that were loaded."""
        self.status.phase = "load"
        began = time.perf_counter()
        self._leave()
        self.plan, self.placement = plan, Placement.of(plan, self.devices, self.rank)
        gc.collect()
        loaded: tuple[int, ...] = ()
        load_s = 0.0
        if self.index is None:
            self.stage.release()
        else:
            own = plan.stages[self.index]
            loaded = self._take(
                range(own.first_layer, own.end_layer),
                is_first=self.index == 0,
                is_last=self.index == len(plan.stages) - 1,
                packed_weights=plan.packed_weights,
                cap_bytes=own.cap_bytes(self.device_bytes),
            )
            load_s = time.perf_counter() - began
            if plan.compile:
                self.compiled.apply(self.stage.model, self.stage.own_layers, where=f"stage {self.index}")
        self.device.free_cached()
        gathered = self.control.gather({"loaded": loaded, "load_s": load_s})
        layers = sorted({layer for row in gathered for layer in row["loaded"]})
        return max(row["load_s"] for row in gathered), tuple(layers)

    def hold(self, window: range, *, packed_weights: bool, cuda_graphs: bool, cap_bytes: int) -> StageLoop:
        """Leaves the present plan: this rank alone holds some layers between embedding and head, a pipeline of its own.
        The next plan, or the next window, takes its loop away."""
        self._leave()
        gc.collect()
        self._take(window, is_first=True, is_last=True, packed_weights=packed_weights, cap_bytes=cap_bytes)
        self.device.free_cached()
        graphs = self._graphs(self.device.name) if cuda_graphs else None
        self.loop = StageLoop(self.stage, self.device, self.status, graphs=graphs)
        return self.loop

    def _take(
        self, layers: range, *, is_first: bool, is_last: bool, packed_weights: bool, cap_bytes: int
    ) -> tuple[int, ...]:
        """Makes the stage hold some layers, packed or not; returns those that were loaded."""
        # Packed kernels compute in the dtype that weights are kept in.
        packed = packed_weights and not self.device.is_cuda and not is_mixed(self.stage.resolved.spec)
        if self._packed and not packed:
            self.stage.release()
        self._packed = packed
        self.device.cap_memory(cap_bytes)
        with self.device.lasting():
            loaded = self.stage.assign(layers.start, layers.stop, is_first=is_first, is_last=is_last)
            if packed:
                self.stage.pack()
        return loaded

    def release(self) -> None:
        """Frees the stage and its KV, before something else wants the memory."""
        self._leave()
        self.stage.release()
        # The last plan's cap is not meant for what comes now.
        self.device.cap_memory(None)
        self.free()

    def _leave(self) -> None:
        if self.loop is not None:
            self.loop.close()
        self.compiled.remove()
        self.loop = self.plan = self.placement = None

    def free(self) -> None:
        """Gives memory that nothing holds any more back to the device, where other workers may want it."""
        gc.collect()
        self.device.free_cached()

    def note_idle_bytes(self) -> None:
        """Notes what the process takes now, while no model is loaded."""
        self.free()
        self.idle_bytes = psutil.Process().memory_info().rss

    def parts(self, job: Job) -> tuple[Job | None, ...]:
        """Each replica's part of a job; None where there are fewer prompts than replicas."""
        assert self.plan is not None
        count = self.plan.replicas
        shares = [job.share(replica, count) for replica in range(count)]
        return tuple(job.part(share) if share else None for share in shares) if count > 1 else (job,)

    def open(self, jobs: Sequence[Job | None], *, instrument: bool = True) -> None:
        """Makes edges and KV slots for a job of each replica under the present plan; every rank calls it."""
        assert self.plan is not None
        assert self.placement is not None
        own = Edges()
        for ranks, job in zip(self.placement.replicas, jobs, strict=True):
            if job is None:
                continue
            edges = self.links.edges(
                ranks,
                hidden_numel=job.most_tokens * self.stage.message_values,
                hidden_dtype=self.stage.message_dtype,
                tokens_numel=job.micro_batch_size,
                tokens_depth=job.in_flight * math.ceil(job.micro_batch_size / job.prefill_size),
                tokens_to_all=self.stage.reads_ids or job.eos_token_ids is not None,
            )
            own = edges or own
        if (job := self.own_job(jobs)) is None:
            return
        if self.loop is None:
            graphs = self._graphs(f"stage {self.index}") if self.plan.cuda_graphs else None
            self.loop = StageLoop(self.stage, self.device, self.status, graphs=graphs)
        self.loop.prepare(job, own, instrument=instrument)
        if self.plan.compile:
            self.loop.rehearse(job)

    def _graphs(self, where: str) -> DecodeGraphs | None:
        return DecodeGraphs(self.stage, self.device, where=where) if self.device.is_cuda else None

    def own_job(self, jobs: Sequence[Job | None]) -> Job | None:
        """The job of this rank's replica; None on ranks without work."""
        assert self.placement is not None
        return None if self.placement.replica is None else jobs[self.placement.replica]

    def run(self, jobs: Sequence[Job | None]) -> PassResult | None:
        """One pass over the jobs; None on ranks without work."""
        self.device.clock_ahead_s, self.device.clock_error_s = self.control.clock_ahead(self._hosts)
        job = self.own_job(jobs)
        if self.loop is None or job is None:
            self.control.barrier()
            return None
        with undisturbed():
            return self.loop.run(job, start=self.control.barrier)

    def window(self, result: PassResult | None) -> tuple[float, float]:
        """When the prompts were given and how long the pass took until its last token, alike on every rank."""
        assert self.placement is not None
        mine = None
        if result is not None:
            times = result.timeline.token_times_s
            mine = [result.timeline.started_s, times[-1] if times else None]
        rows = self.control.gather(mine)
        zero_s: float = min(rows[row[0]][0] for row in self.placement.replicas if rows[row[0]] is not None)
        last_s: float = max(rows[rank][1] for rank in self.placement.last_ranks if rows[rank] is not None)
        return zero_s, last_s - zero_s

    def transport(self) -> str:
        """What lies between the stages, in a word."""
        assert self.placement is not None
        return ", ".join(sorted({self.links.kind(ranks) for ranks in self.placement.replicas}))


def job_of(plan: Plan, prompts: tuple[tuple[int, ...], ...], **rest: Any) -> Job:
    """A pass over prompts, batched as a plan says; `rest` are the job's other fields."""
    return Job(
        prompts=prompts,
        micro_batch_size=plan.micro_batch_size,
        prefill_size=plan.prefill_size,
        chunk_size=plan.prefill_chunk_size,
        **rest,
    )
