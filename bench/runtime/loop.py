"""The pipelined generation loop of one stage: take the input, run the layers, hand the output on, task by task.

Every rank holds the same `Job` and derives the same schedule from it, so no metadata travels. Sampled tokens go from
the last stage to the first, which embeds them; and to all others where the model's layers read ids, or where generation
may end early, so that every stage must know which micro-batches are done. Without them a stage's ids are padding.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from pipetune.bench.memory import KV_ALIGNMENT
from pipetune.bench.runtime.device import DeviceContext
from pipetune.bench.runtime.job import Job, MicroBatchInputs, margins_of
from pipetune.bench.runtime.kernels.graphs import DecodeGraphs
from pipetune.bench.runtime.links import Receiver, Sender
from pipetune.bench.runtime.sampling import draw, draw_margins, log_probabilities, uniforms
from pipetune.bench.runtime.stage.kv_cache import SlotCache
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.runtime.timeline import ResolvedTimeline, Timeline
from pipetune.bench.schedule import Task
from pipetune.bench.spec import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Edges:
    """A stage's links to the others; None where there is nothing to link."""

    hidden_in: Receiver | None = None
    hidden_out: Sender | None = None
    tokens_in: Receiver | None = None
    """From the last stage; None on the last itself, and where tokens are of no use."""
    tokens_out: tuple[Sender, ...] = ()
    """To every stage that takes them; filled on the last alone."""


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
    scores: dict[int, torch.Tensor] | None
    """Last stage where prompts are scored: `[length - 1]` log-probabilities of all but the first token, on the host."""
    margins: dict[int, torch.Tensor] | None
    """Last stage, where asked for: `[output_len]` of each prompt."""
    ran: tuple[int, ...]
    """Indices of the tasks that ran; all of them unless generation ended early."""


class StageLoop:
    """Runs jobs on one stage, decode steps as captured graphs if given; KV slots are kept from job to job."""

    def __init__(self, stage: Stage, device: DeviceContext, status: Status, graphs: DecodeGraphs | None = None) -> None:
        self.graphs = graphs
        self.slots: list[SlotCache] = []
        self._stage, self._device, self._status = stage, device, status

    def kv_bytes(self) -> int:
        """Bytes allocated for KV over all slots."""
        return sum(slot.nbytes() for slot in self.slots)

    def prepare(self, job: Job, edges: Edges | None = None, *, instrument: bool = True) -> None:
        """Takes edges, and makes the KV slots that the job needs; those that fit are kept."""
        self._edges = edges or Edges()
        self._timeline = Timeline(self._device.clock(), self._device.now, enabled=instrument)
        max_len = job.longest + job.output_len
        if self._device.is_cuda:
            max_len = -(-max_len // KV_ALIGNMENT) * KV_ALIGNMENT
        count = min(job.in_flight, len(job.sizes))
        fits = all(slot.rows >= job.micro_batch_size and slot.max_len >= max_len for slot in self.slots)
        if not fits or len(self.slots) < count:
            self.slots = []
            self.slots = [self._stage.new_cache(rows=job.micro_batch_size, max_len=max_len) for _ in range(count)]
        if self.graphs is not None:
            self.graphs.prepare(self.slots, job.tasks(), job.sampling)

    @torch.inference_mode()
    def rehearse(self, job: Job) -> None:
        """Runs the tasks of a micro-batch of each kind, without a message and on made-up hidden states. Call it after
        `prepare`, while no message is under way: what compiles may wait for the whole device."""
        self._status.activity = "compute"
        work, stage = _Pass(self, job), self._stage
        kinds = {(len(inputs.ids), inputs.prompt_len, inputs.full_rows): own for own, inputs in enumerate(work.inputs)}
        for task in work.tasks:
            if task.micro_batch in kinds.values():
                self.slots[task.slot].seek(task.first_row, task.end_row, task.first_token)
                shape = (task.num_rows, task.num_tokens, stage.message_values)
                hidden = torch.empty(shape, dtype=stage.message_dtype, device=stage.device).normal_()
                work.forward(task, None if stage.is_first else hidden)
        self._status.activity = "idle"

    def close(self) -> None:
        """Lets go of KV slots and graphs."""
        if self.graphs is not None:
            self.graphs.close()
        self.slots = []

    def run(self, job: Job, start: Callable[[], object] = lambda: None) -> PassResult:
        """Works through the schedule; returns when this stage's part and all its messages are done. Time counts from
        `start`, which is called when the inputs lie ready, and where the stages meet."""
        work = _Pass(self, job)
        start()
        return work.run()


class _Pass:
    """The state of one pass over one job."""

    def __init__(self, loop: StageLoop, job: Job) -> None:
        device = loop._device.torch_device
        self.stage, self.edges, self.graphs = loop._stage, loop._edges, loop.graphs
        self.timeline, self.slots, self.job, self.status = loop._timeline, loop.slots, job, loop._status
        self.tasks = job.tasks()
        rows = [job.prompts[index] for index in job.order]
        self.first_rows, self.steps = job.first_rows, job.steps
        build = partial(MicroBatchInputs.build, output_len=job.output_len, pad_token_id=job.pad_token_id, device=device)
        self.inputs = [
            build(rows[first : first + size]) for first, size in zip(self.first_rows, job.sizes, strict=True)
        ]
        self.forced = None
        if job.forced is not None:
            self.forced = torch.tensor([job.forced[index] for index in job.order], dtype=torch.long).to(device)
        self.uniforms = None
        if job.sampling is not None and self.stage.is_last:
            numbers = job.numbers or range(len(job.prompts))
            self.uniforms = uniforms(job.sampling, [numbers[index] for index in job.order], job.output_len).to(device)
        # Rows that have not met an end-of-sequence token yet; with fixed length, always all.
        self.unfinished = [[True] * size for size in job.sizes]
        self.known_step = [-1] * len(job.sizes)
        self.awaited: defaultdict[int, list[Task]] = defaultdict(list)
        self.next_post = 0
        self.outstanding = 0
        self.logits: list[tuple[Task, torch.Tensor]] = []
        self.margins: list[tuple[Task, torch.Tensor]] = []
        self.scores: list[tuple[Task, torch.Tensor]] = []

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
            tokens=self.collect_tokens() if self.stage.is_last and not self.job.scores else None,
            logits=self.stacked(self.logits) if self.stage.is_last and self.forced is not None else None,
            margins=self.stacked(self.margins) if self.stage.is_last and self.job.keep_margins else None,
            scores=self.collect_scores() if self.stage.is_last and self.job.scores else None,
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
        self.slots[task.slot].seek(task.first_row, task.end_row, task.first_token)
        self.status.activity = "compute"
        self.timeline.compute_begins()
        output = self.forward(task, hidden)
        tokens = None
        if stage.is_last and self.job.scores:
            self.score(task, output)
        elif stage.is_last and task.samples:
            tokens = self.sample(task, output)
        self.timeline.compute_ended()
        if edges.hidden_in is not None:
            edges.hidden_in.consumed()
        if stage.is_last:
            self.timeline.tokens_known()
        self.status.activity = "send"
        sending = time.monotonic()
        if edges.hidden_out is not None:
            edges.hidden_out.send(output)
        if task.samples and task.step + 1 < self.steps[task.micro_batch]:
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

    def forward(self, task: Task, hidden: torch.Tensor | None) -> torch.Tensor:
        """The stage's output for a task."""
        inputs = self.inputs[task.micro_batch]
        if self.graphs is not None:
            output = self.graphs.run(task, inputs, hidden, self.drawn_by(task))
            if output is not None:
                return output
        rows = slice(task.first_row, task.end_row)
        span = slice(task.first_token, task.end_token)
        has_mask = self.stage.needs_mask or task.end_row > inputs.full_rows
        mask = inputs.mask[rows, : task.end_token] if has_mask else None
        ids, positions, slot = inputs.ids[rows, span], inputs.positions[rows, span], self.slots[task.slot]
        which = {"all_logits": self.job.scores, "without_logits": not (task.samples or self.job.scores)}
        return self.stage.forward(ids, mask, positions, slot, hidden, **which)

    def rows(self, task: Task) -> slice:
        """Rows of a task, counted over all micro-batches."""
        first = self.first_rows[task.micro_batch]
        return slice(first + task.first_row, first + task.end_row)

    def drawn_by(self, task: Task) -> torch.Tensor | None:
        """Numbers `[rows]` that the tokens behind a task are drawn by; None where none are."""
        return None if self.uniforms is None else self.uniforms[self.rows(task), task.step]

    def sample(self, task: Task, logits: torch.Tensor) -> torch.Tensor:
        """The tokens `[rows]` that follow: the likeliest, drawn, or forced ones."""
        sampling, u = self.job.sampling or Sampling(), self.drawn_by(task)
        if self.job.keep_margins:
            margins = margins_of(logits.float()) if u is None else draw_margins(logits, u, sampling)
            self.margins.append((task, margins.cpu()))
        if self.forced is not None:
            self.logits.append((task, logits.float().cpu()))
            return self.forced[self.rows(task), task.step]
        if self.graphs is not None and self.graphs.chosen is not None:
            return self.graphs.chosen
        return likeliest(logits) if u is None else draw(logits, u, sampling)

    def score(self, task: Task, logits: torch.Tensor) -> None:
        """Keeps the log-probability of the token behind each position, `[rows, tokens]`; the last one has none."""
        inputs = self.inputs[task.micro_batch]
        end = min(task.end_token, inputs.prompt_len - 1)
        behind = inputs.ids[task.first_row : task.end_row, task.first_token + 1 : end + 1]
        # Row by row: in fp32 the logits of all of them at once would be the largest tensor of the whole run.
        rows = [log_probabilities(row[: behind.shape[1]], ids) for row, ids in zip(logits, behind, strict=True)]
        self.scores.append((task, torch.stack(rows)))

    def take_tokens(self, micro_batch: int) -> None:
        """Waits for the tokens that the micro-batch's last step gave, piece by piece."""
        for task in self.awaited.pop(micro_batch, ()):
            assert self.edges.tokens_in is not None
            self.learn(task, self.edges.tokens_in.take())

    def learn(self, task: Task, tokens: torch.Tensor) -> None:
        """Writes sampled tokens into the ids and marks rows that met an end-of-sequence token."""
        inputs = self.inputs[task.micro_batch]
        inputs.ids[task.first_row : task.end_row, inputs.prompt_len + task.step] = tokens
        if task.end_row == self.job.sizes[task.micro_batch]:
            self.known_step[task.micro_batch] = task.step
        if self.job.eos_token_ids is not None:
            for row, token in zip(range(task.first_row, task.end_row), tokens.tolist(), strict=True):
                if token in self.job.eos_token_ids:
                    self.unfinished[task.micro_batch][row] = False

    def is_done(self, micro_batch: int) -> bool:
        """Whether every row of the micro-batch has met its end."""
        return not any(self.unfinished[micro_batch])

    def post_hidden(self, *, in_use: int) -> None:
        """Posts receives for the tasks that come next, as far as the ring goes and it is known that they will run."""
        if (receiver := self.edges.hidden_in) is None:
            return
        while self.next_post < len(self.tasks) and self.outstanding + in_use < receiver.depth:
            task = self.tasks[self.next_post]
            if self.job.eos_token_ids is not None and task.step > 0:
                if self.is_done(task.micro_batch):
                    self.next_post += 1
                    continue
                if self.known_step[task.micro_batch] < task.step - 1:
                    return
            receiver.post((task.num_rows, task.num_tokens, self.stage.message_values))
            self.next_post += 1
            self.outstanding += 1

    def collect_tokens(self) -> dict[int, list[int]]:
        """Tokens of each prompt by given index: all that were asked for, or up to its end-of-sequence token."""
        eos, lens = self.job.eos_token_ids or frozenset(), self.job.output_lens
        order = iter(self.job.order)
        tokens: dict[int, list[int]] = {}
        for micro_batch, inputs in enumerate(self.inputs):
            count = self.known_step[micro_batch] + 1
            for row in inputs.ids[:, inputs.prompt_len : inputs.prompt_len + count].tolist():
                stop = next((place for place, token in enumerate(row) if token in eos), len(row) - 1)
                index = next(order)
                tokens[index] = row[: stop + 1 if lens is None else min(stop + 1, lens[index])]
        return tokens

    def collect_scores(self) -> dict[int, torch.Tensor]:
        """Log-probabilities of each prompt's tokens but the first, by given index; padding cut off."""
        whole = {index: torch.cat(parts).cpu() for index, parts in self.by_prompt(self.scores).items()}
        # Padding lies in front; and where a prompt has one token, nothing is left.
        return {index: values[len(values) - len(self.job.prompts[index]) + 1 :] for index, values in whole.items()}

    def by_prompt(self, kept: list[tuple[Task, torch.Tensor]]) -> dict[int, list[torch.Tensor]]:
        """What was kept of every task, `[rows, …]`, task by task for each prompt, by given index."""
        order = self.job.order
        rows: dict[int, list[torch.Tensor]] = {index: [] for index in order}
        for task, values in kept:
            first = self.first_rows[task.micro_batch] + task.first_row
            for offset, row in enumerate(values):
                rows[order[first + offset]].append(row)
        return rows

    def stacked(self, kept: list[tuple[Task, torch.Tensor]]) -> dict[int, torch.Tensor]:
        """What was kept of every step, as `[output_len, …]` of each prompt, by given index."""
        return {index: torch.stack(steps) for index, steps in self.by_prompt(kept).items()}


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest of the last dimension."""
    if logits.device.type == "cpu" and logits.dtype is torch.float32:
        # numpy's is vectorised, torch's is not.
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)
