"""The pipelined generation loop of one stage: take the input, run the layers, hand the output on, task by task.

Every rank holds the same `Job` and derives the same schedule from it, so no metadata travels. Sampled tokens go from
the last stage to all others: the first embeds them, and every stage needs the real ids and, where generation may end
early, must know which micro-batches are done.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.runtime.cache import SlotCache
from bench.runtime.device import DeviceContext
from bench.runtime.job import Job, MicroBatchInputs, margins_of
from bench.runtime.stage import Stage
from bench.runtime.timeline import ResolvedTimeline, Timeline
from bench.runtime.transport import Receiver, Sender
from bench.schedule import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Edges:
    """A stage's links to the others; None where there is nothing to link."""

    hidden_in: Receiver | None = None
    hidden_out: Sender | None = None
    tokens_in: Receiver | None = None
    """From the last stage; None on the last itself."""
    tokens_out: tuple[Sender, ...] = ()
    """To every other stage; filled on the last alone."""


@dataclass(slots=True)
class Status:
    """What a worker is doing, read by the thread that tells the driver; written without a lock, word by word."""

    phase: str = "start"
    activity: str = "idle"
    """`idle`, `compute`, `receive` or `send`: if all stages receive or send and none moves, the pipeline is stuck."""
    tasks_done: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResult:
    """What a stage knows after a pass."""

    timeline: ResolvedTimeline
    tokens: dict[int, list[int]] | None
    """Last stage: tokens of each prompt, by given index."""
    logits: dict[int, torch.Tensor] | None
    """Last stage with forced tokens: `[output_len, V]` of each prompt, fp32 on the host."""
    margins: dict[int, torch.Tensor] | None
    """Last stage, where asked for: `[output_len]` of each prompt."""
    ran: tuple[int, ...]
    """Indices of the tasks that ran; all of them unless generation ended early."""


class StageLoop:
    """Runs jobs on one stage; KV slots are kept from job to job."""

    def __init__(
        self, stage: Stage, device: DeviceContext, edges: Edges, status: Status, *, instrument: bool = True
    ) -> None:
        self._stage = stage
        self._status = status
        self._device = device
        self._edges = edges
        self._timeline = Timeline(device.clock(), enabled=instrument)
        self._slots: list[SlotCache] = []

    def rewire(self, edges: Edges, *, instrument: bool = True) -> None:
        """Takes new edges, for a job of another size; KV slots are kept."""
        self._edges = edges
        self._timeline = Timeline(self._device.clock(), enabled=instrument)

    def kv_bytes(self) -> int:
        """Bytes allocated for KV over all slots."""
        return sum(slot.nbytes() for slot in self._slots)

    def prepare(self, job: Job) -> None:
        """Makes the KV slots that the job needs; those that fit are kept.

        Raises:
            ValueError: prefill in pieces is asked of a model whose state cannot be split by rows.
        """
        max_len = job.longest + job.output_len
        count = min(job.in_flight, len(job.sizes))
        fits = all(slot.rows >= job.micro_batch_size and slot.max_len >= max_len for slot in self._slots)
        if not fits or len(self._slots) < count:
            self._slots = []
            self._slots = [self._stage.new_cache(rows=job.micro_batch_size, max_len=max_len) for _ in range(count)]
        if job.prefill_size < job.micro_batch_size and not self._slots[0].rows_are_separable:
            raise ValueError(
                "this model keeps recurrent states for whole micro-batches: prefill_micro_batch_size must equal "
                "micro_batch_size"
            )

    def run(self, job: Job, start: Callable[[], object] = lambda: None) -> PassResult:
        """Works through the schedule; returns when this stage's part and all its messages are done.

        Args:
            start: called when the inputs lie ready; where the stages meet, so that time counts from there.
        """
        work = _Pass(self._stage, self._device, self._edges, self._timeline, self._slots, job, self._status)
        start()
        return work.run()


class _Pass:
    """The state of one pass over one job."""

    def __init__(
        self,
        stage: Stage,
        device: DeviceContext,
        edges: Edges,
        timeline: Timeline,
        slots: list[SlotCache],
        job: Job,
        status: Status,
    ) -> None:
        self.stage, self.device, self.edges = stage, device, edges
        self.timeline, self.slots, self.job, self.status = timeline, slots, job, status
        self.tasks = job.tasks()
        rows = [job.prompts[index] for index in job.order]
        self.inputs: list[MicroBatchInputs] = []
        self.first_rows: list[int] = []
        first = 0
        for size in job.sizes:
            self.first_rows.append(first)
            self.inputs.append(
                MicroBatchInputs.build(
                    rows[first : first + size],
                    output_len=job.output_len,
                    pad_token_id=job.pad_token_id,
                    device=device.torch_device,
                )
            )
            first += size
        self.forced = None
        if job.forced is not None:
            in_order = torch.tensor([job.forced[index] for index in job.order], dtype=torch.long)
            self.forced = in_order.to(device.torch_device)
        # Rows that have not met an end-of-sequence token yet; with fixed length, always all.
        self.unfinished = [[True] * size for size in job.sizes]
        self.known_step = [-1] * len(job.sizes)
        self.awaited: dict[int, list[Task]] = {index: [] for index in range(len(job.sizes))}
        self.next_post = 0
        self.outstanding = 0
        self.logits: list[tuple[Task, torch.Tensor]] = []
        self.margins: list[tuple[Task, torch.Tensor]] = []

    def run(self) -> PassResult:
        self.timeline.reset()
        ran = []
        self.post_hidden(in_use=0)
        for index, task in enumerate(self.tasks):
            if self.is_done(task.micro_batch):
                continue
            self.status.activity = "receive"
            self.timeline.receive_begins()
            if task.step > 0:
                self.take_tokens(task.micro_batch)
                if self.is_done(task.micro_batch):
                    continue
            self.run_task(task)
            self.status.tasks_done += 1
            ran.append(index)
        self.status.activity = "send"
        for sender in (self.edges.hidden_out, *self.edges.tokens_out):
            if sender is not None:
                sender.drain()
        # Where the host ran ahead, the device still computes: to wait for it is not to wait for a message.
        self.status.activity = "compute"
        timeline = self.timeline.resolve()
        self.status.activity = "idle"
        return PassResult(
            timeline=timeline,
            tokens=self.collect_tokens() if self.stage.is_last else None,
            logits=self.by_prompt(self.logits) if self.stage.is_last and self.forced is not None else None,
            margins=self.by_prompt(self.margins) if self.stage.is_last and self.job.keep_margins else None,
            ran=tuple(ran),
        )

    def run_task(self, task: Task) -> None:
        """Receive, compute, send."""
        stage, edges = self.stage, self.edges
        hidden = None
        if edges.hidden_in is not None:
            self.post_hidden(in_use=0)
            hidden = edges.hidden_in.take()
            self.outstanding -= 1
            self.post_hidden(in_use=1)
        inputs = self.inputs[task.micro_batch]
        past = 0 if task.is_prefill else inputs.prompt_len + task.step - 1
        end = past + (inputs.prompt_len if task.is_prefill else 1)
        rows = slice(task.first_row, task.end_row)
        cache = self.slots[task.slot]
        cache.seek(task.first_row, task.end_row, past)
        self.status.activity = "compute"
        self.timeline.compute_begins()
        output = stage.forward(
            inputs.ids[rows, past:end], inputs.mask[rows, :end], inputs.positions[rows, past:end], cache, hidden
        )
        tokens = self.sample(task, output) if stage.is_last else None
        self.timeline.compute_ended()
        if tokens is not None:
            self.timeline.tokens_known()
        self.status.activity = "send"
        sending = time.monotonic()
        if edges.hidden_out is not None:
            edges.hidden_out.send(output)
        if task.step + 1 < self.job.output_len:
            if tokens is not None:
                for sender in edges.tokens_out:
                    sender.send(tokens)
            if edges.tokens_in is not None:
                edges.tokens_in.post((task.num_rows,))
                self.awaited[task.micro_batch].append(task)
        self.timeline.sent(time.monotonic() - sending)
        if tokens is not None:
            self.status.activity = "compute"
            self.learn(task, tokens)

    def sample(self, task: Task, logits: torch.Tensor) -> torch.Tensor:
        """Greedy tokens `[rows]`, or the forced ones; writes them where the next step reads its ids."""
        if self.job.keep_margins:
            self.margins.append((task, margins_of(logits.float()).cpu()))
        if self.forced is None:
            tokens = logits.argmax(-1)
        else:
            self.logits.append((task, logits.float().cpu()))
            first = self.first_rows[task.micro_batch]
            tokens = self.forced[first + task.first_row : first + task.end_row, task.step]
        return tokens

    def take_tokens(self, micro_batch: int) -> None:
        """Waits for the tokens that the micro-batch's last step gave, piece by piece."""
        receiver = self.edges.tokens_in
        for task in self.awaited[micro_batch]:
            assert receiver is not None
            self.learn(task, receiver.take())
        self.awaited[micro_batch] = []

    def learn(self, task: Task, tokens: torch.Tensor) -> None:
        """Writes sampled tokens into the ids and marks rows that met an end-of-sequence token."""
        inputs = self.inputs[task.micro_batch]
        inputs.ids[task.first_row : task.end_row, inputs.prompt_len + task.step] = tokens
        if task.end_row == self.job.sizes[task.micro_batch]:
            self.known_step[task.micro_batch] = task.step
        if self.job.eos_token_ids is not None:
            unfinished = self.unfinished[task.micro_batch]
            for row, token in zip(range(task.first_row, task.end_row), tokens.tolist(), strict=True):
                if token in self.job.eos_token_ids:
                    unfinished[row] = False

    def is_done(self, micro_batch: int) -> bool:
        """Whether every row of the micro-batch has met its end."""
        return not any(self.unfinished[micro_batch])

    def post_hidden(self, *, in_use: int) -> None:
        """Posts receives for the tasks that come next, as far as the ring goes and it is known that they will run."""
        receiver = self.edges.hidden_in
        if receiver is None:
            return
        while self.next_post < len(self.tasks) and self.outstanding + in_use < receiver.depth:
            task = self.tasks[self.next_post]
            if self.job.eos_token_ids is not None and task.step > 0:
                if self.is_done(task.micro_batch):
                    self.next_post += 1
                    continue
                if self.known_step[task.micro_batch] < task.step - 1:
                    return
            tokens = 1 if task.step > 0 else self.inputs[task.micro_batch].prompt_len
            receiver.post((task.num_rows, tokens, self.stage.hidden_size))
            self.next_post += 1
            self.outstanding += 1

    def collect_tokens(self) -> dict[int, list[int]]:
        """Tokens of each prompt by given index, up to and with its end-of-sequence token where there is one."""
        eos = self.job.eos_token_ids or frozenset()
        order = iter(self.job.order)
        tokens: dict[int, list[int]] = {}
        for micro_batch, inputs in enumerate(self.inputs):
            count = self.known_step[micro_batch] + 1
            for row in inputs.ids[:, inputs.prompt_len : inputs.prompt_len + count].tolist():
                stop = next((place for place, token in enumerate(row) if token in eos), len(row) - 1)
                tokens[next(order)] = row[: stop + 1]
        return tokens

    def by_prompt(self, kept: list[tuple[Task, torch.Tensor]]) -> dict[int, torch.Tensor]:
        """What was kept of every task, `[rows, …]`, as `[output_len, …]` of each prompt by given index."""
        rows: dict[int, list[torch.Tensor]] = {index: [] for index in self.job.order}
        for task, values in kept:
            first = self.first_rows[task.micro_batch] + task.first_row
            for offset, row in enumerate(values):
                rows[self.job.order[first + offset]].append(row)
        return {index: torch.stack(steps) for index, steps in rows.items()}
