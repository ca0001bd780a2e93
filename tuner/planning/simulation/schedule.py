"""Runs the schedule with predicted times instead of tensors: many plans at once that differ in their stages alone.

The rules are those of the runtime. Every stage works through the same tasks in the same order. A task begins when its
stage is free and its input is there: hidden states from the stage before, one hop after that was done with it and the
link with the messages before, which have it for themselves for `wires_s` each; on the first stage, for a decode step,
the tokens of the step before, one hop after the last stage sampled them. A stage is free again `gap_s` after its
compute, in which it hands the output on. And a stage runs ahead of the next one no further than the rings between them
hold: `depth` sends may be under way, and as many receives are posted.

A message that is sent before its receive is posted does not travel at once, but by threads of the transport's own,
as soon as they get a core. Where both stages compute all the while, on all cores, that takes until the scheduler's
next tick or so, for which the receiver then waits: `stall_s`. It makes balanced stages slower than their compute.

Replicas do not disturb each other: each is simulated alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipetune.bench.profile import TaskKind
from pipetune.bench.schedule import Task, build_schedule, micro_batch_sizes
from pipetune.tuner.planning.arrays import Floats

Indices = npt.NDArray[np.intp]

RING_DEPTH = 2
"""Buffers in each ring between stages, as in the runtime (`bench.runtime.wiring`)."""


@dataclass(frozen=True, eq=False, slots=True)
class PromptTasks:
    """When prompts are worked on, by tasks' places in their order."""

    begins: Indices
    first_tokens: Indices
    last_tokens: Indices
    """`[prompt]`: tasks that first work on it, that give its first and that give its last token."""
    output_lens: Indices
    """`[prompt]`, tokens generated for it."""


@dataclass(frozen=True, eq=False, slots=True)
class TaskSequence(PromptTasks):
    """What every stage of a replica works through, with tasks of one kind counted together; longest prompts first."""

    micro_batches: tuple[int, ...]
    """Micro-batch that each task works on."""
    slots: int
    """Micro-batches in flight."""
    decodes: tuple[bool, ...]
    """Whether each task needs the tokens that its micro-batch gave before."""
    kind_of: tuple[int, ...]
    """Index of each task's kind."""
    kinds: tuple[TaskKind, ...]
    """Different kinds of task, in the order of their first tasks."""
    counts: Indices
    """`[kind]`, number of its tasks."""
    grid_points: tuple[TaskKind, ...]
    """Kinds of task whose costs are looked up; those of the others are interpolated between them."""
    weights: Floats
    """`[kind, grid point]`, shares of which the cost of each kind is made."""

    @classmethod
    def of(cls, tasks: Sequence[Task], sizes: Sequence[int], output_lens: Sequence[int]) -> "TaskSequence":
        """The sequence of a schedule over micro-batches of these sizes, whose rows generate so many tokens."""
        known: dict[TaskKind, int] = {}
        kind_of = []
        lens, scores = np.asarray(output_lens, dtype=np.intp), not any(output_lens)
        first_rows = np.concatenate([[0], np.cumsum(sizes)])
        begins, first_tokens, last_tokens = (np.full(first_rows[-1], -1, dtype=np.intp) for _ in range(3))
        for index, task in enumerate(tasks):
            kind = TaskKind(task.num_rows, task.num_tokens, task.first_token, task.samples or scores)
            kind_of.append(known.setdefault(kind, len(known)))
            rows = slice(first_rows[task.micro_batch] + task.first_row, first_rows[task.micro_batch] + task.end_row)
            last_tokens[rows] = np.where(scores | (task.step < lens[rows]), index, last_tokens[rows])
            if task.is_prefill:
                begins[rows] = np.where(begins[rows] < 0, index, begins[rows])
                first_tokens[rows] = index
        grid_points, weights = grid_points_of(tuple(known))
        return cls(
            micro_batches=tuple(task.micro_batch for task in tasks),
            slots=1 + max(task.slot for task in tasks),
            decodes=tuple(not task.is_prefill for task in tasks),
            kind_of=tuple(kind_of),
            kinds=tuple(known),
            counts=np.bincount(kind_of, minlength=len(known)),
            grid_points=grid_points,
            weights=weights,
            begins=begins,
            first_tokens=first_tokens,
            last_tokens=last_tokens,
            output_lens=lens,
        )


def grid_points_of(kinds: Sequence[TaskKind]) -> tuple[tuple[TaskKind, ...], Floats]:
    """Kinds of which others are made, and `[kind, point]` weights. The past of decode steps grows by one a step. Costs
    are looked up at two pasts an octave (2, 3, 4, 6, 8, 12 …) and taken for linear in between, as reading the KV cache
    is."""
    known: dict[TaskKind, int] = {}
    parts: list[list[tuple[int, float]]] = []
    for kind in kinds:
        shares = _past_shares(kind.past_tokens) if kind.is_decode else ((kind.past_tokens, 1.0),)
        parts.append([(known.setdefault(kind._replace(past_tokens=past), len(known)), share) for past, share in shares])
    weights = np.zeros((len(kinds), len(known)))
    for row, shares_of in zip(weights, parts, strict=True):
        for point, share in shares_of:
            row[point] += share
    return tuple(known), weights


def _past_shares(past: int) -> tuple[tuple[int, float], ...]:
    """The lengths looked up around a past, with their shares."""
    octave = 1 << (past.bit_length() - 1)
    low, high = (octave, octave * 3 // 2) if past < octave * 3 / 2 else (octave * 3 // 2, octave * 2)
    if past == low:
        return ((low, 1.0),)
    share = (past - low) / (high - low)
    return ((low, 1.0 - share), (high, share))


@lru_cache(maxsize=512)
def task_sequence_of(
    prompt_lens: tuple[int, ...],
    *,
    output_len: int | tuple[int, ...],
    micro_batch_size: int,
    prefill_size: int,
    chunk_size: int | None,
    in_flight: int | None,
) -> TaskSequence:
    """The sequence over prompts of these lengths, longest first; `output_len`, 0 where texts are scored, is that of all
    or of each, and of `in_flight`, the micro-batches resident at once, None means all."""
    sizes = micro_batch_sizes(len(prompt_lens), micro_batch_size)
    first_rows = np.concatenate([[0], np.cumsum(sizes)])
    lens = (output_len,) * len(prompt_lens) if isinstance(output_len, int) else output_len
    tasks = build_schedule(
        sizes,
        prompt_lens=[prompt_lens[first] for first in first_rows[:-1]],
        output_len=[max(1, *lens[first : first + size]) for first, size in zip(first_rows, sizes, strict=False)],
        in_flight=in_flight or len(sizes),
        prefill_size=prefill_size,
        chunk_size=chunk_size,
    )
    return TaskSequence.of(tasks, sizes, lens)


@dataclass(frozen=True, eq=False, slots=True)
class Timeline:
    """When things happened, in seconds from when the prompts were given; the last axis runs over plans."""

    first_starts_s: Floats
    last_ends_s: Floats
    """`[task, plan]` on the first stage, and on the last one, where tokens are known."""
    began_s: Floats
    ended_s: Floats
    """`[stage, plan]` of each stage's first and last task."""


def simulate_plans(
    sequence: TaskSequence,
    busy_s: Floats,
    hops_s: Floats,
    returns_s: Floats,
    *,
    gap_s: Floats | float = 0.0,
    stall_s: Floats | float = 0.0,
    wires_s: Floats | float = 0.0,
    depth: int | None = RING_DEPTH,
) -> Timeline:
    """Runs the sequence on many plans of equally many stages; rings between stages have a depth, or None for no end.

    A task computes for `busy_s[kind, stage, plan]`, and its stage can begin another `gap_s[stage, plan]` after that.
    Its message takes `hops_s[kind, stage - 1, plan]` to the next stage, of which `wires_s[kind, stage - 1, plan]` with
    the link for itself, and tokens take `returns_s[kind, plan]` from the last stage to the first. `stall_s[stage - 1,
    plan]` is how long a stage waits that asks for a message which was sent before its receive was posted, where the
    sender computes all the while; less, as the square of the share of time that it does.
    """
    num_stages, num_plans = busy_s.shape[1:]
    busy = [list(of_kind) for of_kind in busy_s]
    hops = [list(of_kind) for of_kind in hops_s]
    gaps = list(np.broadcast_to(gap_s, (num_stages, num_plans)))
    ahead = len(sequence.kind_of) if depth is None else 2 * depth
    # A sender that waits for room in the ring is idle for the rest of the next stage's task.
    stalls_s = stall_s * np.minimum(1.0, busy_s[:, :-1] / np.maximum(busy_s[:, 1:], 1e-12)) ** 2
    stalls = [list(of_kind) for of_kind in stalls_s] if depth is not None and np.any(stalls_s) else []
    wires = [list(of_kind) for of_kind in np.broadcast_to(wires_s, hops_s.shape)]
    zero = np.zeros(num_plans)
    link_free = [zero] * (num_stages - 1)
    free: list[list[Floats]] = [[] for _ in range(num_stages)]
    """When each stage was free again, task by task."""
    tokens_at: dict[int, Floats] = {}
    first_starts_s, last_ends_s = (np.empty((len(sequence.kind_of), num_plans)) for _ in range(2))
    began_s, ended_s = (np.empty((num_stages, num_plans)) for _ in range(2))
    start = end = zero
    tasks = zip(sequence.micro_batches, sequence.decodes, sequence.kind_of, strict=True)
    for index, (micro_batch, decodes, kind) in enumerate(tasks):
        ready = tokens_at[micro_batch] if decodes else zero
        for stage in range(num_stages):
            start = np.maximum(ready, free[stage][-1]) if index else ready
            if stalls and depth is not None and index >= depth and stage > 0:
                posted = free[stage][index - depth]
                start = np.where(posted > end, np.maximum(start, free[stage][-1] + stalls[kind][stage - 1]), start)
            if stage == 0:
                first_starts_s[index] = start
            end = start + busy[kind][stage]
            handed_over = end + gaps[stage]
            if index >= ahead and stage + 1 < num_stages:
                # The sends under way are in the way of this one.
                handed_over = np.maximum(handed_over, free[stage + 1][index - ahead])
            free[stage].append(handed_over)
            if index == 0:
                began_s[stage] = start
            if index == len(sequence.kind_of) - 1:
                ended_s[stage] = end
            if stage + 1 < num_stages:
                sent = np.maximum(end, link_free[stage])
                link_free[stage] = sent + wires[kind][stage]
                ready = sent + hops[kind][stage]
        last_ends_s[index] = end
        tokens_at[micro_batch] = end + returns_s[kind] if num_stages > 1 else end
    return Timeline(first_starts_s=first_starts_s, last_ends_s=last_ends_s, began_s=began_s, ended_s=ended_s)
