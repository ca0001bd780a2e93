"""The simulation of many plans at once: as the schedule's own, and as the buffers between stages would have it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipetune.bench.memory import EDGE_DEPTH
from pipetune.bench.profile import TaskKind
from pipetune.bench.runtime.job import Job
from pipetune.bench.schedule import Task, build_schedule
from pipetune.tuner.planning.simulation.schedule import (
    RING_DEPTH,
    TaskSequence,
    grid_points_of,
    simulate_plans,
    task_sequence_of,
)
from tests.ideal_schedule import simulate

Floats = npt.NDArray[np.float64]
SCHEDULES = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 4), min_size=1, max_size=6),
        "output_len": st.integers(1, 5),
        "in_flight": st.integers(1, 7),
        "prefill_size": st.none() | st.integers(1, 5),
        "chunk_size": st.none() | st.integers(1, 9),
    }
)
NUM_PLANS = 3


def tasks_of(schedule: dict[str, object]) -> tuple[Task, ...]:
    sizes = schedule["sizes"]
    assert isinstance(sizes, list)
    return build_schedule(prompt_lens=[9 - 2 * (index % 4) for index in range(len(sizes))], **schedule)  # type: ignore[arg-type]


def sequence(schedule: dict[str, object]) -> TaskSequence:
    sizes = schedule["sizes"]
    assert isinstance(sizes, list)
    tasks = tasks_of(schedule)
    return TaskSequence.of(tasks, sizes, [1 + max(task.step for task in tasks)] * sum(sizes))


def times(own: TaskSequence, num_stages: int, seed: int) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Compute, hops, returns, gaps, and what of the hops links are occupied for."""
    rng = np.random.default_rng(seed)
    kinds = len(own.kinds)
    hops_s = rng.uniform(0.0, 3.0, (kinds, num_stages - 1, NUM_PLANS))
    return (
        rng.uniform(0.1, 2.0, (kinds, num_stages, NUM_PLANS)),
        hops_s,
        np.broadcast_to(rng.uniform(0.0, 0.5, NUM_PLANS), (kinds, NUM_PLANS)),
        rng.uniform(0.0, 0.2, (num_stages, NUM_PLANS)),
        hops_s * rng.uniform(0.0, 1.0, hops_s.shape),
    )


@given(schedule=SCHEDULES, num_stages=st.integers(1, 4), hop_s=st.floats(0, 2), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_it_is_the_schedules_own_simulation(
    schedule: dict[str, object], num_stages: int, hop_s: float, seed: int
) -> None:
    own = sequence(schedule)
    busy_s, *_ = times(own, num_stages, seed)
    hops_s = np.full((len(own.kinds), num_stages - 1, NUM_PLANS), hop_s)
    returns_s = np.full((len(own.kinds), NUM_PLANS), hop_s)
    timeline = simulate_plans(own, busy_s, hops_s, returns_s, depth=None)
    for plan in range(NUM_PLANS):
        durations = [[busy_s[kind, stage, plan] for kind in own.kind_of] for stage in range(num_stages)]
        starts = simulate(tasks_of(schedule), durations, hop_s=hop_s)
        assert timeline.first_starts_s[:, plan] == pytest.approx(starts[0], abs=1e-9)
        ends = [start + took for start, took in zip(starts[-1], durations[-1], strict=True)]
        assert timeline.last_ends_s[:, plan] == pytest.approx(ends, abs=1e-9)
        assert timeline.began_s[:, plan] == pytest.approx([row[0] for row in starts], abs=1e-9)
        last = [row[-1] + took[-1] for row, took in zip(starts, durations, strict=True)]
        assert timeline.ended_s[:, plan] == pytest.approx(last, abs=1e-9)


@given(
    schedule=SCHEDULES,
    num_stages=st.integers(1, 4),
    depth=st.none() | st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_it_is_what_buffers_between_stages_make_of_it(
    schedule: dict[str, object], num_stages: int, depth: int | None, seed: int
) -> None:
    own = sequence(schedule)
    busy_s, hops_s, returns_s, gap_s, wires_s = times(own, num_stages, seed)
    timeline = simulate_plans(own, busy_s, hops_s, returns_s, gap_s=gap_s, wires_s=wires_s, depth=depth)
    for plan in range(NUM_PLANS):
        starts, ends = by_buffers(
            own,
            busy_s[:, :, plan].T[:, own.kind_of],
            hops_s[:, :, plan].T[:, own.kind_of],
            returns_s[own.kind_of, plan] if num_stages > 1 else np.zeros(len(own.kind_of)),
            gap_s[:, plan],
            wires_s[:, :, plan].T[:, own.kind_of],
            depth or len(own.kind_of),
        )
        assert timeline.first_starts_s[:, plan] == pytest.approx(starts[0], abs=1e-9)
        assert timeline.last_ends_s[:, plan] == pytest.approx(ends[-1], abs=1e-9)


def by_buffers(
    own: TaskSequence, busy_s: Floats, hops_s: Floats, returns_s: Floats, gap_s: Floats, wires_s: Floats, depth: int
) -> tuple[Floats, Floats]:
    """Starts and ends, `[stage, task]`: nothing happens before what it waits for, and no later; found by repetition.

    A message may be received once its receive is posted, which is when the receiver is free of the task `depth` before
    it; a message goes once the link has let go of the one before; a send is over when its message may be received; and
    a stage is free of a task when it has handed the output over, for which `depth` sends may be under way.
    """
    num_stages, num_tasks = busy_s.shape
    starts, free, sent = np.zeros_like(busy_s), np.zeros_like(busy_s), np.zeros_like(busy_s)
    before = {
        index: max(other for other in range(index) if own.micro_batches[other] == own.micro_batches[index])
        for index in range(num_tasks)
        if own.decodes[index]
    }
    for _ in range(num_stages * num_tasks * 4):
        known = starts.copy(), free.copy(), sent.copy()
        ends = starts + busy_s
        for stage, index in itertools.product(range(num_stages), range(num_tasks)):
            waits = [0.0]
            if index:
                waits.append(free[stage, index - 1])
            if stage:
                sent[stage - 1, index] = ends[stage - 1, index]
                if index:
                    link_free = sent[stage - 1, index - 1] + wires_s[stage - 1, index - 1]
                    sent[stage - 1, index] = max(sent[stage - 1, index], link_free)
                waits.append(sent[stage - 1, index] + hops_s[stage - 1, index])
            elif index in before:
                waits.append(ends[-1, before[index]] + returns_s[before[index]])
            starts[stage, index] = max(waits)
            over = [starts[stage, index] + busy_s[stage, index] + gap_s[stage]]
            if stage + 1 < num_stages and index >= 2 * depth:
                over.append(free[stage + 1, index - 2 * depth])
            free[stage, index] = max(over)
        if all(np.array_equal(*pair) for pair in zip(known, (starts, free, sent), strict=True)):
            return starts, starts + busy_s
    raise AssertionError("times go on growing: something waits for itself")


def test_rings_are_as_deep_as_the_runtimes() -> None:
    assert RING_DEPTH == EDGE_DEPTH


def test_a_message_sent_too_early_stalls_its_receiver() -> None:
    own = task_sequence_of((4,) * 6, output_len=1, micro_batch_size=1, prefill_size=1, chunk_size=None, in_flight=None)
    busy_s = np.array([0.5, 1.0]).reshape(1, 2, 1)
    nothing = np.zeros((1, 1, 1)), np.zeros((1, 1))
    without, with_stalls = (
        simulate_plans(own, busy_s, *nothing, stall_s=seconds).last_ends_s[-1, 0] for seconds in (0.0, 0.4)
    )
    assert without == pytest.approx(6.5)
    # The last three are sent while the receiver has two more to take; the sender computes for half of the time.
    assert with_stalls == pytest.approx(6.5 + 3 * 0.4 * 0.5**2)


@given(bytes_=st.integers(1, 10**9), rate=st.floats(1e3, 1e9), compute_s=st.floats(1e-4, 1.0), tasks=st.integers(1, 9))
def test_a_slow_link_bounds_the_throughput_by_its_rate(bytes_: int, rate: float, compute_s: float, tasks: int) -> None:
    lens = (4,) * tasks
    own = task_sequence_of(lens, output_len=1, micro_batch_size=1, prefill_size=1, chunk_size=None, in_flight=None)
    wires_s, latency_s = np.full((1, 1, 1), bytes_ / rate), 0.01
    busy_s = np.full((1, 2, 1), compute_s)
    timeline = simulate_plans(own, busy_s, wires_s + latency_s, np.zeros((1, 1)), wires_s=wires_s, depth=None)
    beat = max(bytes_ / rate, compute_s)
    whole = 2 * compute_s + bytes_ / rate + latency_s + (tasks - 1) * beat
    assert timeline.last_ends_s[-1, 0] == pytest.approx(whole)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("output_len", [0, 1, 3])
def test_courses_are_those_of_the_runtime(replicas: int, output_len: int) -> None:
    lens = (5, 9, 7, 7, 2, 8, 8, 3)
    job = Job(
        prompts=tuple((1,) * length for length in lens),
        output_len=output_len,
        micro_batch_size=3,
        prefill_size=2,
        chunk_size=4,
        in_flight=2,
        pad_token_id=0,
    )
    longest_first = tuple(sorted(lens, reverse=True))
    for replica in range(replicas):
        part = job.part(job.share(replica, replicas))
        own = task_sequence_of(
            longest_first[replica::replicas],
            output_len=output_len,
            micro_batch_size=3,
            prefill_size=2,
            chunk_size=4,
            in_flight=2,
        )
        tasks = part.tasks()
        assert own.micro_batches == tuple(task.micro_batch for task in tasks)
        assert own.slots == len({task.slot for task in tasks})
        kinds = [own.kinds[kind] for kind in own.kind_of]
        assert [(kind.rows, kind.new_tokens, kind.past_tokens) for kind in kinds] == [
            (task.num_rows, task.num_tokens, task.first_token) for task in tasks
        ]
        # Where texts are scored, every position needs the head.
        assert [kind.samples for kind in kinds] == [task.samples or output_len == 0 for task in tasks]
        assert own.counts.tolist() == [kinds.count(kind) for kind in own.kinds]
        assert own.last_tokens.tolist() == last_of(tasks, part.sizes)


def last_of(tasks: Sequence[Task], sizes: Sequence[int]) -> list[int]:
    """Of each row, the last task that works on it."""
    firsts = [0, *itertools.accumulate(sizes)]
    return [
        max(
            index
            for index, task in enumerate(tasks)
            if task.first_row <= row - firsts[task.micro_batch] < task.end_row and row >= firsts[task.micro_batch]
        )
        for row in range(sum(sizes))
    ]


def test_pasts_of_decode_are_looked_up_at_few_points_and_linear_in_between() -> None:
    kinds = [TaskKind(4, 1, past) for past in range(1, 300)] + [TaskKind(4, 16, 21, False), TaskKind(4, 300, 0)]
    grid_points, weights = grid_points_of(kinds)
    assert len(grid_points) < 20
    pasts = np.array([point.past_tokens for point in grid_points], dtype=float)
    assert weights @ pasts == pytest.approx([kind.past_tokens for kind in kinds])
    assert weights.sum(axis=1) == pytest.approx(1.0)
    assert {TaskKind(4, 16, 21, False), TaskKind(4, 300, 0)} <= set(grid_points)
    # Pasts that are powers of two, or one and a half of them, are looked up themselves.
    for past in (1, 2, 3, 48, 64, 256):
        assert weights[past - 1, grid_points.index(TaskKind(4, 1, past))] == pytest.approx(1.0)
