"""Decode steps captured as CUDA graphs, one for each KV slot, number of rows and length of KV.

A decode step of a small batch is hundreds of kernels of a few microseconds each, and the host cannot launch them as
fast as the GPU runs them. A graph is launched at once. For that a step must be the same work on the same memory each
time: ids, positions and received hidden states are copied to fixed places first, and the cache has fixed shapes
(`bench.runtime.kernels.static_cache`). Communication stays outside.

Only compute that never asks the host can be captured. What cannot runs as before, and `notes` says why. Every kind of
step is compared with an eager one before it is used.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from pipetune.bench.runtime.device import DeviceContext, undisturbed
from pipetune.bench.runtime.kernels.capture import OutsideBytes, Pool
from pipetune.bench.runtime.kernels.static_cache import why_not_static
from pipetune.bench.runtime.kernels.static_step import Inputs, Probe, StaticStep, StepKey, disagreement
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.schedule import Task

KV_STEP = 256
"""Attention reads KV up to the next multiple of this: at most so many positions too many, and few graphs."""
MAX_GRAPHS = 256
"""Graphs of a stage at most: each takes memory of the driver and a forward pass's time to capture."""
STATIC_KERNELS = ("sdpa", "eager")
"""Attention that a mask tells what to read. Flash attention would have to be told lengths on the host."""
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


def steps_of(tasks: Iterable[Task], *, max_len: int, kv_step: int = KV_STEP) -> dict[StepKey, int]:
    """The kinds of step that a schedule's decode has, and the last position at which each is used.

    Args:
        max_len: positions of a KV slot.
        kv_step: lengths of KV are rounded up to multiples of it, and to `max_len` at most.

    Returns:
        The largest first: smaller ones then find memory in the pool.
    """
    last: dict[StepKey, int] = {}
    for task in tasks:
        if not task.is_prefill:
            kv_len = kv_length(task.end_token, max_len=max_len, kv_step=kv_step)
            key = StepKey(task.slot, task.num_rows, kv_len)
            last[key] = max(task.first_token, last.get(key, 0))
    return dict(sorted(last.items(), key=lambda item: (-item[0].rows * item[0].kv_len, item[0])))


def kv_length(filled: int, *, max_len: int, kv_step: int = KV_STEP) -> int:
    """Positions that a step reads when `filled` of them hold something."""
    return min(max_len, -(-filled // kv_step) * kv_step)


class DecodeGraphs:
    """The captured decode steps of one stage, over the KV slots of its loop.

    The loop calls `prepare` when its slots are there, then `run` for each decode task. After `Stage.assign` a new one
    is needed: graphs know weights by their place in memory.
    """

    def __init__(
        self, stage: Stage, device: DeviceContext, *, where: str = "this stage", capture: bool | None = None
    ) -> None:
        """
        Args:
            where: `stage 1`, for the notes.
            capture: False runs the static steps without capturing them, which works on a CPU too; by default they are
                captured where the device is a GPU.
        """
        self.report = GraphsReport()
        self._stage = stage
        self._device = device
        self._where = where
        self._captures = device.is_cuda if capture is None else capture
        self._pool: Pool | None = None
        self._slots: tuple[SlotCache, ...] = ()
        self._steps: dict[StepKey, StaticStep] = {}
        self._max_len = 0
        self._cleared: set[int] = set()
        self._compared: dict[tuple[int, int], int] = {}
        self._has_failed = False
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Where steps run eagerly, and why; empty if all that was asked for is captured."""
        return tuple(self._notes)

    def prepare(self, slots: Sequence[SlotCache], tasks: Iterable[Task]) -> None:
        """Captures what a schedule's decode needs and is not captured yet.

        Call it while no message is under way: capturing waits for the whole device, and a receive that was posted would
        never end if its sender waited for this stage. What the slots hold is lost.
        """
        if [id(slot) for slot in slots] != [id(slot) for slot in self._slots]:
            self.close()
            self._slots = tuple(slots)
            self._max_len = min((slot.max_len for slot in slots), default=0)
        if self._has_failed or not slots:
            return
        tasks = tuple(tasks)
        wanted = steps_of(tasks, max_len=self._max_len)
        new = {
            key: last
            for key, last in wanted.items()
            if key not in self._steps or last > self._compared[key.rows, key.kv_len]
        }
        if not new:
            return
        reason = self._why_not(len(new.keys() | self._steps.keys()))
        if reason is not None:
            self._note(reason)
            return
        most_tokens = max(task.num_rows * task.num_tokens for task in tasks)
        began = time.perf_counter()
        outside = OutsideBytes(self._device)
        with undisturbed():
            for key, last in new.items():
                if not self._add(key, last, most_tokens):
                    break
        reserved, allocated = self._pool.bytes() if self._pool is not None else (0, 0)
        self.report = GraphsReport(
            graphs=len(self._steps),
            capture_s=self.report.capture_s + time.perf_counter() - began,
            pool_bytes=reserved,
            uncounted_bytes=reserved - allocated,
            driver_bytes=self.report.driver_bytes + outside.grown(),
        )

    @torch.inference_mode()
    def run(self, task: Task, inputs: Inputs, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """The stage's output for a decode step; None if it is none, or is not captured.

        Args:
            inputs: of the task's micro-batch, the same object for all its steps.
            hidden: `[rows, 1, M]` as received; None on the first stage.

        Returns:
            As `Stage.forward`. On the last stage the logits lie where the next run may write: use them on the same
            stream before it. On others the tensor is the caller's own.
        """
        if task.is_prefill or not self._steps:
            return None
        kv_len = kv_length(task.end_token, max_len=self._max_len)
        step = self._steps.get(StepKey(task.slot, task.num_rows, kv_len))
        if step is None:
            return None
        step.load(task.first_token, inputs, hidden)
        output = step.run()
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
        self._cleared.clear()
        self._compared.clear()
        self._slots = ()
        self.report = GraphsReport()

    def _why_not(self, count: int) -> str | None:
        reason = why_not_static(self._slots[0])
        config = self._stage.model.config.get_text_config(decoder=True)
        kernel = getattr(config, "_attn_implementation", None)
        if reason is None and kernel not in STATIC_KERNELS:
            reason = f"attention by {kernel} has no static form"
        if reason is None and count > MAX_GRAPHS:
            reason = f"{count} graphs would be needed, and {MAX_GRAPHS} are the most"
        return reason

    def _note(self, reason: str) -> None:
        self._notes[f"cuda_graphs: eager on {self._where}: {reason}"] = None

    def _add(self, key: StepKey, last: int, most_tokens: int) -> bool:
        """Makes one step that is used up to position `last`; False if that failed: then no further one is tried."""
        try:
            step = self._steps.get(key) or self._make(key)
            error = self._compare(step, key, last, most_tokens)
        # Families fail in every way there is, and none of them may cost the plan: eager steps are always there.
        except Exception as failure:
            self._has_failed = True
            self._note(_describe(failure))
            return False
        if error > TOLERANCES[self._stage.dtype]:
            self.close()
            self._has_failed = True
            self._note(f"a static step differs from an eager one by {error:.2g} of its size")
            return False
        self._steps[key] = step
        return True

    @torch.inference_mode()
    def _make(self, key: StepKey) -> StaticStep:
        slot = self._slots[key.slot]
        if key.slot not in self._cleared:
            # The first pass gives the slot its memory.
            Probe.build(self._stage, key, length=1).run_eagerly(self._stage, slot, most_tokens=key.rows)
            slot.fill(0.0)
            self._cleared.add(key.slot)
        step = StaticStep(self._stage, slot, key)
        if self._captures:
            self._pool = self._pool or Pool(self._device.torch_device)
            step.graph, step.output = self._pool.capture(step.forward)
        return step

    @torch.inference_mode()
    def _compare(self, step: StaticStep, key: StepKey, last: int, most_tokens: int) -> float:
        """How far what a step gives is from what an eager step gives, once for each number of rows and length of KV.

        At the last position, since some families change their way where the KV is long, and windows are left behind.
        """
        kind = key.rows, key.kv_len
        if self._compared.get(kind, -1) >= last:
            return 0.0
        probe = Probe.build(self._stage, key, length=last)
        expected = probe.run_eagerly(self._stage, self._slots[key.slot], most_tokens=most_tokens)
        probe.load(step)
        error = disagreement(expected, step.run())
        self._compared[kind] = last
        return error


def _describe(error: Exception) -> str:
    """First line of an error, and the place in the model's code where it came from."""
    if "captur" in str(error) and isinstance(error.__context__, Exception):
        # The end of a capture says that something broke it; what did came before.
        error = error.__context__
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "transformers" in frame.filename]
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{text}{place}"
