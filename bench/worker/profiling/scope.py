"""What a profile times: kinds of tasks, and windows of layers; chosen alike on every worker, from shapes alone.

A kind is timed in passes of nothing but tasks of it, one behind the other, for the loop that plans run in.

A layer is timed among others, as in a stage: alone it would stay in the cache, and its weights would cost nothing to
read. A window is a run of layers, as long as a stage of the model on so many devices; together the windows hold a
layer of every kind.
"""

import dataclasses
import math
import random
from collections.abc import Hashable, Sequence

from pipetune.bench.memory import ModelShape, stage_bytes
from pipetune.bench.profile import ProfileGrid, TaskKind
from pipetune.bench.record import Failure, FailureKind
from pipetune.bench.runtime.job import Job
from pipetune.bench.schedule import Task
from pipetune.bench.spec import Plan, device_kind

MEMORY_FRACTION = 0.9
"""Share of a device's memory that a window, its KV cache and its activations may take."""
DECODE_STEPS = 64
"""Positions behind the past for which a slot has room."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """What is timed, on every device."""

    windows: tuple[range, ...]
    """Layers held at a time."""
    kinds: tuple[TaskKind, ...]
    notes: tuple[str, ...] = ()


def scope_of(
    grid: ProfileGrid,
    shape: ModelShape,
    alike: Sequence[Hashable],
    *,
    devices: Sequence[str],
    device_bytes: int,
    packed_weights: bool,
) -> Scope | Failure:
    """What to time, or why not even one layer of each kind has room for the smallest task. `alike` has a value for each
    layer, and those with equal ones cost the same; `device_bytes` is the memory of the device that has the least."""
    kinds, notes = _possible(grid, shape)
    cap = int(MEMORY_FRACTION * device_bytes)
    # What a GPU rounds up and a CPU packs is more than what others take: the kind of device that takes most decides.
    used = {device_kind(name): name for name in devices}.values()

    def bytes_of(window: range, kind: TaskKind) -> int:
        """Bytes that a model of these layers alone takes while it runs such a task."""
        part = shape.model_copy(update={"layers": shape.layers[window.start : window.stop]})
        chunk = None if kind.past_tokens == 0 or shape.recurrent else kind.new_tokens
        output_len = 0 if grid.scores else DECODE_STEPS if kind.is_decode else 1
        lens = {"prompt_len": kind.past_tokens + kind.new_tokens, "output_len": output_len}
        plans = (Plan.from_layer_counts((len(window),), (one,), kind.rows, prefill_chunk_size=chunk) for one in used)
        switched = (plan.model_copy(update={"packed_weights": packed_weights}) for plan in plans)
        return max(stage_bytes(part, plan, 0, **lens).total(1) for plan in switched)

    windows: tuple[range, ...] = ()
    for width in range(math.ceil(shape.num_layers / len(devices)), 0, -1):
        windows = windows_of(alike, shape.forbidden_cuts, width)
        if all(bytes_of(window, kind) <= cap for window in windows for kind in kinds):
            return Scope(windows=windows, kinds=kinds, notes=notes)
    need = {kind: max(bytes_of(window, kind) for window in windows) for kind in kinds}
    if not (fitting := tuple(kind for kind in kinds if need[kind] <= cap)):
        least = min(need.values(), default=0)
        return Failure(
            kind=FailureKind.OVER_MEMORY_CAP,
            phase="profile",
            bytes_wanted=least,
            bytes_had=cap,
            message=(
                f"a single layer between embedding and head needs {least / 2**20:.0f} MiB and {MEMORY_FRACTION:.0%} of "
                f"the smallest device are {cap / 2**20:.0f} MiB; use fewer CPU workers, larger devices or a smaller "
                "dtype"
            ),
        )
    left_out = f"{len(kinds) - len(fitting)} of {len(kinds)} kinds of tasks were left out: no memory for them"
    return Scope(windows=windows, kinds=fitting, notes=(*notes, left_out))


def windows_of(alike: Sequence[Hashable], forbidden_cuts: Sequence[int], width: int) -> tuple[range, ...]:
    """Few runs of up to `width` layers that together hold one of every kind, in order. A run is longer where its layers
    cannot be parted. Greedy: each time the one that adds most kinds, then the longest."""
    bounds = [cut for cut in range(len(alike) + 1) if cut not in forbidden_cuts or cut in (0, len(alike))]
    candidates = []
    for start in bounds[:-1]:
        ends = [end for end in bounds if end > start]
        candidates.append(range(start, max((end for end in ends if end - start <= width), default=ends[0])))
    missing, chosen = set(alike), []
    while missing:
        best = max(candidates, key=lambda one: (len(missing & {alike[layer] for layer in one}), len(one), -one.start))
        chosen.append(best)
        missing -= {alike[layer] for layer in best}
    return tuple(sorted(chosen, key=lambda window: window.start))


def _possible(grid: ProfileGrid, shape: ModelShape) -> tuple[tuple[TaskKind, ...], tuple[str, ...]]:
    """Kinds of the grid that the model can run and that are not too large; of prefill always the smallest one."""
    notes = []
    prefill = [TaskKind(rows, length, 0) for length in grid.lengths for rows in grid.rows]
    # What keeps states has to see the whole past before each decode step that is timed.
    pasts = [
        TaskKind(rows, 1, past)
        for past in grid.pasts
        for rows in grid.rows
        if not grid.scores and (not shape.recurrent or rows * past <= grid.max_tokens)
    ]
    chunks = [TaskKind(rows, new, past) for new, past in grid.chunks for rows in grid.rows if not shape.recurrent]
    if grid.chunks and shape.recurrent:
        notes.append(f"chunks were left out: {shape.architecture} must be given whole prompts")
    kinds = list(dict.fromkeys((*prefill, *pasts, *chunks)))
    if shape.max_positions is not None:
        room = shape.max_positions - DECODE_STEPS if shape.recurrent else shape.max_positions
        fitting = [kind for kind in kinds if kind.new_tokens + kind.past_tokens + 1 <= room]
        if not any(kind.past_tokens == 0 for kind in fitting):
            fitting.append(TaskKind(min(grid.rows), 1, 0))
        if len(fitting) < len(kinds):
            notes.append(f"tasks beyond the model's {shape.max_positions} positions were left out")
        kinds = fitting
    small = [kind for kind in kinds if kind.rows * kind.new_tokens <= grid.max_tokens]
    if not any(kind.past_tokens == 0 for kind in small):
        small.append(min(kind for kind in kinds if kind.past_tokens == 0))
    return tuple(small), tuple(notes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Repeats(Job):
    """Tasks given one by one, instead of those of a schedule."""

    repeated: tuple[Task, ...]

    def tasks(self) -> tuple[Task, ...]:
        """The tasks given."""
        return self.repeated


def repeat(kind: TaskKind, count: int, grid: ProfileGrid, shape: ModelShape, *, pad_token_id: int) -> Repeats:
    """So many tasks of a kind. What keeps states is given the past first, by one task more, and goes on from there.

    Tokens that decode steps work on are part of the prompts, and unlike from row to row as in a real batch: rows that
    were all alike would meet in the same experts.
    """
    rows, new, past, _ = kind
    length = past if kind.is_decode else past + new
    recurs = kind.is_decode and shape.recurrent
    if kind.is_decode:
        steps = range(count) if recurs else [0] * count
        tasks = [_task(rows, step + 1, past + step, past + step + 1) for step in steps]
    else:
        tasks = [_task(rows, 0, past, past + new)] * count
    source = random.Random(0)
    ahead = DECODE_STEPS if kind.is_decode else 0
    lengths = [length + ahead] + [max(1, length - grid.padded) + ahead] * (rows - 1)
    return Repeats(
        prompts=tuple(tuple(source.randrange(shape.vocab_size) for _ in range(own)) for own in lengths),
        output_len=0 if grid.scores else DECODE_STEPS if kind.is_decode else 1,
        micro_batch_size=rows,
        prefill_size=rows,
        in_flight=1,
        pad_token_id=pad_token_id,
        sampling=grid.sampling,
        repeated=((_task(rows, 0, 0, past), *tasks) if recurs else tuple(tasks)),
    )


def _task(rows: int, step: int, first: int, end: int) -> Task:
    return Task(
        micro_batch=0, slot=0, step=step, first_row=0, end_row=rows, first_token=first, end_token=end, samples=True
    )
