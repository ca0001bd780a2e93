"""A schedule played with known times, and drawn: what tests and made-up measurements compare the real one with."""

from __future__ import annotations

from collections.abc import Sequence

from pipetune.bench.schedule import Task


def simulate(
    tasks: Sequence[Task], durations_s: Sequence[Sequence[float]], *, hop_s: float = 0.0
) -> tuple[tuple[float, ...], ...]:
    """Start time of every task on every stage when each takes a known time.

    Args:
        tasks: as from `build_schedule`.
        durations_s: `[stage][task]`, seconds of compute.
        hop_s: seconds for a message from one stage to the next, the return of tokens included.

    Returns:
        `[stage][task]` start times in seconds; the first task starts at 0.
    """
    num_stages = len(durations_s)
    starts: list[list[float]] = [[] for _ in range(num_stages)]
    free_at = [0.0] * num_stages
    tokens_at: dict[int, float] = {}
    for index, task in enumerate(tasks):
        ready = 0.0 if task.is_prefill else tokens_at[task.micro_batch]
        for stage in range(num_stages):
            start = max(ready, free_at[stage])
            starts[stage].append(start)
            free_at[stage] = start + durations_s[stage][index]
            ready = free_at[stage] + hop_s
        if num_stages == 1:
            ready = free_at[0]
        tokens_at[task.micro_batch] = max(ready, tokens_at.get(task.micro_batch, 0.0))
    return tuple(tuple(row) for row in starts)


def draw_grid(tasks: Sequence[Task], num_stages: int) -> str:
    """The schedule as text, a row per stage and a column per equal time step: `m1.0` is micro-batch 1, prefill."""
    starts = simulate(tasks, [[1.0] * len(tasks)] * num_stages)
    labels = [f"m{task.micro_batch}.{task.step}" for task in tasks]
    width = max(len(label) for label in labels)
    lines = []
    for stage, row in enumerate(starts):
        at = {round(start): label for start, label in zip(row, labels, strict=True)}
        cells = [at.get(column, "").ljust(width) for column in range(round(row[-1]) + 1)]
        lines.append(f"stage {stage}  " + " ".join(cells).rstrip())
    return "\n".join(lines)
