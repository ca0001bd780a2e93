"""A pass of nothing but one kind of task, again and again, for the loop that plans run in."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from typing import Self

from pipetune.bench.memory import ModelShape
from pipetune.bench.profile import ProfileGrid, TaskKind
from pipetune.bench.runtime.job import Job
from pipetune.bench.schedule import Task
from pipetune.bench.worker.profiling.scope import DECODE_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Repeats(Job):
    """Tasks given one by one, instead of those of a schedule."""

    repeated: tuple[Task, ...]

    def tasks(self) -> tuple[Task, ...]:
        """The tasks given."""
        return self.repeated

    def with_room(self, most_tokens: int) -> Self:
        """A pass to prepare for: graphs look at the largest task to see how many tokens of a row they may work on."""
        first = self.repeated[0]
        if first.is_prefill:
            return self
        return self._of((_task(len(self.prompts), 0, 0, min(first.first_token, most_tokens)), *self.repeated))

    def _of(self, tasks: Iterable[Task]) -> Self:
        return dataclasses.replace(self, repeated=tuple(tasks))


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


def _task(rows: int, step: int, first_token: int, end_token: int) -> Task:
    return Task(
        micro_batch=0,
        step=step,
        slot=0,
        first_row=0,
        end_row=rows,
        first_token=first_token,
        end_token=end_token,
        samples=True,
    )
