"""Decode steps captured as CUDA graphs, one for each KV slot, number of rows and length of KV.

A decode step of a small batch is hundreds of kernels of a few microseconds each, and the host cannot launch them as
fast as the GPU runs them. A graph is launched at once. For that a step must be the same work on the same memory each
time: ids, positions and received hidden states are copied to fixed places first, and the cache has fixed shapes
(`bench.runtime.kernels.static_step`). What follows the head belongs to the step: the likeliest token or the draw.
Communication stays outside.

Only compute that never asks the host can be captured. What cannot runs as before, and `notes` says why. Every kind of
step is compared with an eager one before it is used.
"""

import contextlib
import functools
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipetune.bench.models.hf_private import kernel_of
from pipetune.bench.models.torch_private import end_allocation
from pipetune.bench.runtime.device import DeviceContext, undisturbed
from pipetune.bench.runtime.job import MicroBatchInputs
from pipetune.bench.runtime.kernels.static_step import Probe, StaticStep, StepKey, disagreement, why_not_static
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.schedule import Task
from pipetune.bench.spec import Sampling

KV_STEP = 256
"""Attention reads KV up to the next multiple of this: at most so many positions too many, and few graphs."""
MAX_GRAPHS = 256
"""Graphs of a stage at most: each takes memory of the driver and a forward pass's time to capture."""
STATIC_KERNELS = ("sdpa", "eager")
"""Attention that a mask tells what to read. Flash attention would have to be told lengths on the host."""
PROBE_ROWS = 16
"""Rows that are compared at least before a step is refused: of a few, near ties alone may be more than their share."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a static step, by the dtype computed in: other kernels round differently."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphsReport:
    """What capturing took."""

    graphs: int = 0
    capture_s: float = 0.0
    pool_bytes: int = 0
    """Bytes that the pool reserves: part of what the allocator reserves, and so under the device's cap."""
    uncounted_bytes: int = 0
    """Bytes of the pool that the allocator does not count as allocated although every run of a graph uses it: a peak of
    allocated bytes lacks it."""
    driver_bytes: int = 0
    """Bytes that the driver takes for the graphs themselves, outside of the allocator."""


def steps_of(tasks: Iterable[Task], *, max_len: int) -> dict[StepKey, int]:
    """The kinds of step that a schedule's decode has, and the last position at which each is used. The largest come
    first: smaller ones then find memory in the pool."""
    last: dict[StepKey, int] = {}
    for task in tasks:
        if not task.is_prefill:
            key = StepKey(task.slot, task.num_rows, kv_length(task.end_token, max_len=max_len))
            last[key] = max(task.first_token, last.get(key, 0))
    return dict(sorted(last.items(), key=lambda item: (-item[0].rows * item[0].kv_len, item[0])))


def kv_length(filled: int, *, max_len: int) -> int:
    """Positions that a step reads when `filled` hold something: a multiple of `KV_STEP`, or the slot's `max_len`."""
    return min(max_len, -(-filled // KV_STEP) * KV_STEP)


class Pool:
    """Memory for graphs that run one after the other on one stream.

    What one graph computes on the way lies where another's does too, and so does its output unless somebody holds it
    while the next one is captured; but even a held output may lie where an earlier graph computes. So an output must be
    read, or copied, before another graph of the pool runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handle: Any = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """Runs some work twice beside the compute stream, then captures it there; returns the graph and its output.

        The first run may compile, load kernels and make workspaces. What asks the host in the second would break the
        capture, and with it more than itself, so that it is refused before, by a RuntimeError. Capture happens on the
        stream of these runs, since cuBLAS keeps a workspace for each stream: made here, outside of the pool, it
        outlives every graph. Only this thread's calls can break it: NCCL's watchdog queries events from another.
        """
        side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                work()
                with _no_waiting_for_the_device():
                    work()
                # Waits for the whole device, which is why no message may be under way.
                with torch.cuda.graph(graph, pool=self._handle, stream=side, capture_error_mode="thread_local"):
                    output = work()
        except Exception:
            # The allocator would refuse ever after to give memory back. Where the capture did end in order, the first
            # call is an error to ignore, and the second, which lets go of the pool once more, is not reached.
            end_allocation(self._device.index, self._handle)
            raise
        finally:
            current.wait_stream(side)
        return graph, output

    def bytes(self) -> tuple[int, int]:
        """Reserved by the pool, and counted as allocated: what is freed when a capture ends is used by each run."""
        snapshot: Any = torch.cuda.memory_snapshot
        segments = [row for row in snapshot() if tuple(row.get("segment_pool_id", ())) == tuple(self._handle)]
        return sum(row["total_size"] for row in segments), sum(row["allocated_size"] for row in segments)


class DecodeGraphs:
    """The captured decode steps of one stage, over the KV slots of its loop.

    The loop calls `prepare` when its slots are there, then `run` for each decode task. After `Stage.assign` a new one
    is needed: graphs know weights by their place in memory.
    """

    def __init__(
        self, stage: Stage, device: DeviceContext, *, where: str = "this stage", capture: bool | None = None
    ) -> None:
        """For a stage; notes name it by `where`. Steps are captured on GPUs unless `capture` says otherwise. Without
        capture the static steps run as they are, which works on a CPU too."""
        self.report = GraphsReport()
        self.chosen: torch.Tensor | None = None
        """Tokens `[rows]` that the last run chose as the job wants it; None where they are left to the caller."""
        self._sampling: Sampling | None = None
        self._is_wanted = True
        self._stage = stage
        self._device = device
        self._where = where
        self._captures = device.is_cuda if capture is None else capture
        self._pool: Pool | None = None
        self._slots: tuple[SlotCache, ...] = ()
        self._steps: dict[StepKey, StaticStep] = {}
        self._max_len = 0
        self._filled: set[int] = set()
        self._outputs: dict[int, torch.Tensor] = {}
        self._compared: dict[tuple[int, int], int] = {}
        self._has_failed = False
        self._notes: dict[str, None] = {}

    def again(self, whose: str) -> "DecodeGraphs":
        """One for the same stage that has captured nothing: its graphs hold what is hooked to modules by then."""
        return DecodeGraphs(self._stage, self._device, where=whose + self._where, capture=self._captures)

    @property
    def notes(self) -> tuple[str, ...]:
        """Where steps run eagerly, and why; empty if all that was asked for is captured."""
        return tuple(self._notes)

    def prepare(self, slots: Sequence[SlotCache], tasks: Iterable[Task], sampling: Sampling | None = None) -> None:
        """Captures what a schedule's decode needs and is not captured yet.

        Call it while no message is under way: capturing waits for the whole device, and a receive that was posted would
        never end if its sender waited for this stage. What the slots hold is lost.

        On the last stage a graph also chooses the tokens, as the first job wants it: those of other jobs are left to
        their callers.
        """
        if [id(slot) for slot in slots] != [id(slot) for slot in self._slots]:
            self.close()
            self._slots = tuple(slots)
            self._max_len = min((slot.max_len for slot in slots), default=0)
        if not self._steps:
            self._sampling = sampling
        self._is_wanted = sampling == self._sampling
        if self._has_failed or not slots:
            return
        wanted = steps_of(tasks, max_len=self._max_len)
        known, compared = self._steps, self._compared
        new = {key: last for key, last in wanted.items() if key not in known or last > compared[key.rows, key.kv_len]}
        if not new:
            return
        if (reason := self._why_not(len(new.keys() | self._steps.keys()))) is not None:
            self._note(reason)
            return
        began = time.perf_counter()
        outside = outside_bytes(self._device)
        with undisturbed():
            for key, last in new.items():
                if not self._add(key, last):
                    break
        reserved, allocated = self._pool.bytes() if self._pool is not None else (0, 0)
        self.report = GraphsReport(
            graphs=len(self._steps),
            capture_s=self.report.capture_s + time.perf_counter() - began,
            pool_bytes=reserved,
            uncounted_bytes=reserved - allocated,
            driver_bytes=self.report.driver_bytes + max(0, outside_bytes(self._device) - outside),
        )

    @torch.inference_mode()
    def run(
        self, task: Task, inputs: MicroBatchInputs, hidden: torch.Tensor | None, u: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """The stage's output for a decode step, as `Stage.forward`'s; None if it is none, or is not captured.

        What it is given is as in `StaticStep.load`. On the last stage the logits lie where the next run may write: use
        them on the same stream before it. On others the tensor is the caller's own.
        """
        self.chosen = None
        if task.is_prefill or not self._steps:
            return None
        key = StepKey(task.slot, task.num_rows, kv_length(task.end_token, max_len=self._max_len))
        if (step := self._steps.get(key)) is None:
            return None
        step.load(task.first_token, inputs, hidden, u)
        output = step.run()
        # Sent and learned by the time that this step runs again: its next ids come of them.
        self.chosen = step.tokens if self._is_wanted else None
        # NCCL's stream may still be reading it when another graph of the pool runs, and writes there.
        return output if self._stage.is_last or step.graph is None else output.clone()

    def close(self) -> None:
        """Lets go of graphs and their memory."""
        if self._steps:
            # Nothing but the end of its work keeps a graph that runs from being freed.
            self._device.synchronize()
        self._steps.clear()
        # A pool that no graph uses any more is given back and cannot be used again.
        self._pool = None
        self._filled.clear()
        self._outputs.clear()
        self._compared.clear()
        self._slots = ()
        self.report = GraphsReport()

    def _why_not(self, count: int) -> str | None:
        reason = why_not_static(self._slots[0])
        kernel = kernel_of(self._stage.model.config.get_text_config(decoder=True))
        if reason is None and kernel not in STATIC_KERNELS:
            reason = f"attention by {kernel} has no static form"
        if reason is None and count > MAX_GRAPHS:
            reason = f"{count} graphs would be needed, and {MAX_GRAPHS} are the most"
        return reason

    def _note(self, reason: str) -> None:
        self._notes[f"cuda_graphs: eager on {self._where}: {reason}"] = None

    def _add(self, key: StepKey, last: int) -> bool:
        """Makes one step that is used up to position `last`; False if that failed: then no further one is tried."""
        try:
            step = self._steps.get(key) or self._make(key)
            fault = self._fault(step, key, last)
        # Families fail in every way there is, and none of them may cost the plan: eager steps are always there.
        except Exception as failure:
            self._has_failed = True
            self._note(_describe(failure))
            return False
        if fault is not None:
            self.close()
            self._has_failed = True
            self._note(fault)
            return False
        self._steps[key] = step
        return True

    @torch.inference_mode()
    def _make(self, key: StepKey) -> StaticStep:
        slot = self._slots[key.slot]
        if key.slot not in self._filled:
            # The first pass gives the slot its memory.
            Probe.build(self._stage, key.rows, position=0).run_eagerly(self._stage, slot)
            slot.fill(0.0, spread=1.0)
            self._filled.add(key.slot)
        step = StaticStep(self._stage, slot, key)
        if self._captures:
            self._pool = self._pool or Pool(self._device.torch_device)
            if self._stage.is_last:
                step.tokens = torch.zeros(key.rows, dtype=torch.long, device=self._device.torch_device)

            def work() -> torch.Tensor:
                output = self._into_output(step.forward(), key.rows)
                if step.tokens is not None:
                    step.tokens.copy_(step.choose(output, self._sampling))
                return output

            step.graph, step.output = self._pool.capture(work)
        return step

    def _into_output(self, output: torch.Tensor, rows: int) -> torch.Tensor:
        """One place for what steps of as many rows give, and a copy to it: each graph's own would stay in memory."""
        place = self._outputs.setdefault(rows, output)
        return place if place is output else place.copy_(output)

    @torch.inference_mode()
    def _fault(self, step: StaticStep, key: StepKey, last: int) -> str | None:
        """What is wrong with a step; compared with eager ones once for each number of rows and length of KV.

        At the last position, since some families change their way where the KV is long, and windows are left behind;
        behind a past of random numbers, which no prompt is needed for. A graph must repeat its own step to the bit.
        """
        kind = key.rows, key.kv_len
        if self._compared.get(kind, -1) >= last:
            return None
        expected, actual, error = [], [], 0.0
        for seed in range(-(-PROBE_ROWS // key.rows)):
            probe = Probe.build(self._stage, key.rows, position=last, seed=seed)
            expected.append(probe.run_eagerly(self._stage, self._slots[key.slot]))
            step.load(last, probe.inputs, probe.hidden)
            actual.append(step.run().clone())
            error = disagreement(torch.cat(expected), torch.cat(actual))
            if error <= TOLERANCES[self._stage.dtype]:
                break
        if error > TOLERANCES[self._stage.dtype]:
            return f"a static step differs from an eager one by {error:.2g} of its size"
        if step.graph is not None:
            plain, again = step.forward(), step.forward()
            # What adds up in no fixed order does not even repeat itself.
            if torch.equal(plain, again) and not torch.equal(plain, actual[-1]):
                return "a captured step differs from the same step as it is"
            if step.tokens is not None and not torch.equal(step.tokens, step.choose(actual[-1], self._sampling)):
                return "a captured step chooses other tokens than the same step as it is"
        self._compared[kind] = last
        return None


def _describe(error: Exception) -> str:
    """First line of an error, and the place in the model's code where it came from."""
    if "captur" in str(error) and isinstance(error.__context__, Exception):
        # The end of a capture says that something broke it; what did came before.
        error = error.__context__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "transformers" in frame.filename]
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{text}{place}"


def outside_bytes(device: DeviceContext) -> int:
    """Bytes of a GPU that are in use and not this process's allocator's; other processes on it blur it. 0 on a CPU."""
    if not device.is_cuda:
        return 0
    device.synchronize()
    device.free_cached()
    free, total = torch.cuda.mem_get_info(device.torch_device)
    return int(total - free - torch.cuda.memory_reserved(device.torch_device))


@contextlib.contextmanager
def _no_waiting_for_the_device() -> Iterator[None]:
    """Turns what makes the host wait for the GPU into an error that says where it happened."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # Once a process torch warns that this is a prototype: where warnings are errors, no step would be captured.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the life of the process: cuBLAS never gives back the workspace that it makes for a stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
