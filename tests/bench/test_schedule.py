"""The schedule, whatever the sizes: nothing lost, nothing twice, no slot shared, and no stage waiting without need."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipetune.bench import schedule
from pipetune.bench.schedule import Task, build_schedule, micro_batch_sizes
from tests.ideal_schedule import draw_grid, simulate

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=7)
OUTPUT_LEN = st.integers(1, 5)
IN_FLIGHT = st.integers(1, 8)
PREFILL = st.none() | st.integers(1, 6)
CHUNK = st.none() | st.integers(1, 9)
STAGES = st.integers(1, 4)


def whole(num: int, *, output_len: int, in_flight: int) -> tuple[Task, ...]:
    """A schedule of `num` micro-batches, each prefilled at once."""
    return build_schedule([1] * num, prompt_lens=[1] * num, output_len=output_len, in_flight=in_flight)


def lens_of(sizes: list[int]) -> list[int]:
    """A prompt length for each micro-batch; none like its neighbour's."""
    return [3 + 2 * (index % 4) for index in range(len(sizes))]


def test_grid_in_docstring_is_the_grid_drawn() -> None:
    drawn = draw_grid(whole(3, output_len=2, in_flight=3), 2)
    text = "\n".join(line.strip() for line in (schedule.__doc__ or "").splitlines() if line.startswith("    stage"))
    assert text == drawn


def test_grid_of_waiting_micro_batches() -> None:
    # Two slots, three micro-batches: m2 takes the slot of m0 in the middle of a round. Only its own last
    # step waits, since nothing else is left to do.
    assert draw_grid(whole(3, output_len=2, in_flight=2), 2).splitlines() == [
        "stage 0  m0.0 m1.0 m0.1 m1.1 m2.0      m2.1",
        "stage 1       m0.0 m1.0 m0.1 m1.1 m2.0      m2.1",
    ]


def test_grid_with_fewer_micro_batches_than_stages_shows_the_bubble() -> None:
    assert draw_grid(whole(1, output_len=2, in_flight=1), 2).splitlines() == [
        "stage 0  m0.0      m0.1",
        "stage 1       m0.0      m0.1",
    ]


def test_pieces_of_prefill() -> None:
    tasks = build_schedule([5], prompt_lens=[4], output_len=2, in_flight=1, prefill_size=2)
    assert [(task.step, task.first_row, task.end_row) for task in tasks] == [(0, 0, 2), (0, 2, 4), (0, 4, 5), (1, 0, 5)]
    assert [task.num_rows for task in tasks] == [2, 2, 1, 5]
    assert [task.is_prefill for task in tasks] == [True, True, True, False]
    assert [(task.first_token, task.end_token) for task in tasks] == [(0, 4), (0, 4), (0, 4), (4, 5)]
    assert all(task.samples for task in tasks)


def test_chunks_of_a_long_prompt_fill_the_stages() -> None:
    tasks = build_schedule([1], prompt_lens=[10], output_len=2, in_flight=1, chunk_size=4)
    spans = [(task.first_token, task.end_token, task.samples) for task in tasks]
    assert spans == [(0, 4, False), (4, 8, False), (8, 10, True), (10, 11, True)]
    assert draw_grid(tasks, 2).splitlines() == [
        "stage 0  m0.0 m0.0 m0.0      m0.1",
        "stage 1       m0.0 m0.0 m0.0      m0.1",
    ]


def test_chunks_of_one_piece_come_before_the_next_piece() -> None:
    tasks = build_schedule([2], prompt_lens=[5], output_len=1, in_flight=1, prefill_size=1, chunk_size=3)
    assert [(task.first_row, task.first_token) for task in tasks] == [(0, 0), (0, 3), (1, 0), (1, 3)]


@given(num_prompts=st.integers(1, 200), micro_batch_size=st.integers(1, 64))
def test_micro_batch_sizes_are_full_but_the_last(num_prompts: int, micro_batch_size: int) -> None:
    sizes = micro_batch_sizes(num_prompts, micro_batch_size)
    assert sum(sizes) == num_prompts
    assert all(size == micro_batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= micro_batch_size


@given(sizes=SIZES, output_len=OUTPUT_LEN, in_flight=IN_FLIGHT, prefill_size=PREFILL, chunk_size=CHUNK)
def test_every_token_of_every_row_is_prefilled_once_and_steps_come_in_order(
    sizes: list[int], output_len: int, in_flight: int, prefill_size: int | None, chunk_size: int | None
) -> None:
    lens = lens_of(sizes)
    tasks = build_schedule(
        sizes,
        prompt_lens=lens,
        output_len=output_len,
        in_flight=in_flight,
        prefill_size=prefill_size,
        chunk_size=chunk_size,
    )
    of_micro_batch: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        of_micro_batch[task.micro_batch].append(task)
    assert sorted(of_micro_batch) == list(range(len(sizes)))
    for micro_batch, own in of_micro_batch.items():
        prefill = [task for task in own if task.step == 0]
        length = lens[micro_batch]
        places = [
            (row, token)
            for task in prefill
            for row in range(task.first_row, task.end_row)
            for token in range(task.first_token, task.end_token)
        ]
        assert sorted(places) == [(row, token) for row in range(sizes[micro_batch]) for token in range(length)]
        # A row's tokens come in order, whatever lies in between.
        for row in range(sizes[micro_batch]):
            assert [token for place, token in places if place == row] == list(range(length))
        assert all(1 <= task.num_rows <= (prefill_size or sizes[micro_batch]) for task in prefill)
        assert all(1 <= task.num_tokens <= (chunk_size or length) for task in prefill)
        sampled = [row for task in prefill if task.samples for row in range(task.first_row, task.end_row)]
        assert sampled == list(range(sizes[micro_batch])), "one token of every row comes of its last chunk"
        decode = own[len(prefill) :]
        assert [task.first_token for task in decode] == [length + step for step in range(output_len - 1)]
        assert all(task.samples and task.num_tokens == 1 for task in decode)
        assert [task.step for task in own] == [0] * len(prefill) + list(range(1, output_len))
        assert all((task.first_row, task.end_row) == (0, sizes[micro_batch]) for task in own[len(prefill) :])
        assert len({task.slot for task in own}) == 1


@given(sizes=SIZES, output_len=OUTPUT_LEN, in_flight=IN_FLIGHT, prefill_size=PREFILL)
def test_no_slot_is_shared_by_live_micro_batches(
    sizes: list[int], output_len: int, in_flight: int, prefill_size: int | None
) -> None:
    tasks = build_schedule(
        sizes, prompt_lens=lens_of(sizes), output_len=output_len, in_flight=in_flight, prefill_size=prefill_size
    )
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, task in enumerate(tasks):
        first.setdefault(task.micro_batch, index)
        last[task.micro_batch] = index
    slot_of = {task.micro_batch: task.slot for task in tasks}
    assert list(first) == sorted(first), "micro-batches enter in the order given"
    most_live = 0
    for index in range(len(tasks)):
        live = [slot_of[micro_batch] for micro_batch in first if first[micro_batch] <= index <= last[micro_batch]]
        assert len(live) == len(set(live))
        assert all(0 <= slot < in_flight for slot in live)
        most_live = max(most_live, len(live))
    assert most_live <= in_flight
    if output_len > 1:
        assert most_live == min(in_flight, len(sizes)), "room that the caps leave is used"


@given(
    sizes=SIZES,
    output_len=OUTPUT_LEN,
    in_flight=IN_FLIGHT,
    prefill_size=PREFILL,
    num_stages=STAGES,
    hop_s=st.sampled_from([0.0, 0.25]),
    data=st.data(),
)
def test_simulated_times_respect_every_dependency(
    sizes: list[int],
    output_len: int,
    in_flight: int,
    prefill_size: int | None,
    num_stages: int,
    hop_s: float,
    data: st.DataObject,
) -> None:
    tasks = build_schedule(
        sizes, prompt_lens=lens_of(sizes), output_len=output_len, in_flight=in_flight, prefill_size=prefill_size
    )
    # Multiples of a quarter are exact in binary, so times compare without a tolerance.
    quarters = st.lists(st.integers(1, 8).map(lambda value: value / 4), min_size=len(tasks), max_size=len(tasks))
    durations = [data.draw(quarters) for _ in range(num_stages)]
    starts = simulate(tasks, durations, hop_s=hop_s)
    ends = [[start + span for start, span in zip(*row, strict=True)] for row in zip(starts, durations, strict=True)]
    return_s = hop_s if num_stages > 1 else 0.0
    tokens_at: dict[tuple[int, int], float] = defaultdict(float)
    for index, task in enumerate(tasks):
        bounds = [0.0] * num_stages
        for stage in range(num_stages):
            own_free = ends[stage][index - 1] if index else 0.0
            if stage:
                arrived = ends[stage - 1][index] + hop_s
            else:
                arrived = tokens_at[task.micro_batch, task.step - 1] if task.step else 0.0
            bounds[stage] = max(own_free, arrived)
        assert [row[index] for row in starts] == bounds, "as early as possible and no earlier"
        key = task.micro_batch, task.step
        tokens_at[key] = max(tokens_at[key], ends[-1][index] + return_s)


@given(num=st.integers(1, 8), output_len=OUTPUT_LEN, num_stages=STAGES, extra=st.integers(0, 3), rows=st.integers(1, 4))
def test_pipeline_never_drains_while_micro_batches_wait(
    num: int, output_len: int, num_stages: int, extra: int, rows: int
) -> None:
    num += num_stages
    tasks = build_schedule(
        [rows] * num, prompt_lens=[2] * num, output_len=output_len, in_flight=num_stages + extra, prefill_size=1
    )
    starts = simulate(tasks, [[1.0] * len(tasks)] * num_stages)
    last_prefill = max(index for index, task in enumerate(tasks) if task.is_prefill)
    for stage, row in enumerate(starts):
        assert list(row[: last_prefill + 1]) == [float(stage + index) for index in range(last_prefill + 1)]


@given(num_stages=STAGES, extra=st.integers(0, 3), output_len=OUTPUT_LEN)
def test_no_stage_waits_when_all_are_in_flight(num_stages: int, extra: int, output_len: int) -> None:
    num = num_stages + extra
    tasks = whole(num, output_len=output_len, in_flight=num)
    starts = simulate(tasks, [[1.0] * len(tasks)] * num_stages)
    for stage, row in enumerate(starts):
        assert list(row) == [float(stage + index) for index in range(len(tasks))]


@pytest.mark.parametrize(
    ("sizes", "output_len", "in_flight", "prefill_size", "chunk_size"),
    [
        ([0], 1, 1, None, None),
        ([1], 0, 1, None, None),
        ([1], 1, 0, None, None),
        ([1], 1, 1, 0, None),
        ([1], 1, 1, 1, 0),
    ],
)
def test_sizes_below_one_are_refused(
    sizes: list[int], output_len: int, in_flight: int, prefill_size: int | None, chunk_size: int | None
) -> None:
    with pytest.raises(ValueError, match="must be ≥ 1"):
        build_schedule(
            sizes,
            prompt_lens=[3],
            output_len=output_len,
            in_flight=in_flight,
            prefill_size=prefill_size,
            chunk_size=chunk_size,
        )
