"""Predicted metrics: those that the same times would give, were they measured; and where time is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipetune.bench.metrics import derive
from pipetune.bench.record import Iteration, Measurement, StageTrace, TaskShape
from pipetune.bench.schedule import build_schedule, micro_batch_sizes
from pipetune.bench.spec import Goodput
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.simulation.prediction import Prediction, SimulatedRun, predictions_of
from pipetune.tuner.planning.simulation.schedule import TaskSequence, simulate_plans, task_sequence_of

LENS = (40, 12, 33, 25, 25, 18, 7, 30, 21, 16, 11)
GAPS_S = (0.004, 0.007)
GOODPUT = Goodput(ttft=1200, tpot=700, e2el=2100)


def run_of(
    lens: tuple[int, ...], output_len: int | tuple[int, ...], busy_s: Floats | None = None
) -> tuple[SimulatedRun, Floats]:
    """Two stages over some prompts, longest first, with what each kind of task takes on each stage."""
    tasks = task_sequence_of(
        lens, output_len=output_len, micro_batch_size=3, prefill_size=2, chunk_size=16, in_flight=2
    )
    if busy_s is None:
        busy_s = np.random.default_rng(len(lens)).uniform(0.05, 0.2, (len(tasks.kinds), 2, 1))
    hops_s, returns_s = np.full((len(tasks.kinds), 1, 1), 0.01), np.full((len(tasks.kinds), 1), 0.01)
    timeline = simulate_plans(tasks, busy_s, hops_s, returns_s, gap_s=np.array(GAPS_S)[:, None])
    return SimulatedRun(
        sequence=tasks, timeline=timeline, busy_s=np.einsum("k,ksp->sp", tasks.counts.astype(float), busy_s)
    ), busy_s


def traces_of(run: SimulatedRun, busy_s: Floats) -> tuple[StageTrace, StageTrace]:
    assert isinstance(run.sequence, TaskSequence)
    took = busy_s[list(run.sequence.kind_of), :, 0]
    first, last = run.timeline.first_starts_s[:, 0], run.timeline.last_ends_s[:, 0]
    waits: dict[str, Any] = {"recv_wait_s": (0.0,) * len(took), "send_wait_s": (0.0,) * len(took)}
    return (
        StageTrace(compute_start_s=tuple(first), compute_end_s=tuple(first + took[:, 0]), **waits),
        StageTrace(compute_start_s=tuple(last - took[:, 1]), compute_end_s=tuple(last), **waits),
    )


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("output_lens", [(0,) * 11, (1,) * 11, (4,) * 11, (3, 1, 5, 2, 1, 1, 4, 6, 2, 5, 1)])
def test_metrics_are_those_of_a_measurement_of_the_same_times(replicas: int, output_lens: tuple[int, ...]) -> None:
    order = sorted(range(len(LENS)), key=lambda index: -LENS[index])
    shares = [order[replica::replicas] for replica in range(replicas)]
    runs: list[tuple[SimulatedRun, Floats]] = []
    tasks: list[TaskShape] = []
    counts: list[int] = []
    sizes: list[int] = []
    for share in shares:
        lens = tuple(LENS[index] for index in share)
        outputs = tuple(output_lens[index] for index in share)
        runs.append(run_of(lens, outputs))
        own = micro_batch_sizes(len(share), 3)
        schedule = build_schedule(
            own,
            prompt_lens=[lens[3 * index] for index in range(len(own))],
            output_len=[max(1, *outputs[3 * index : 3 * index + 3]) for index in range(len(own))],
            in_flight=2,
            prefill_size=2,
            chunk_size=16,
        )
        tasks += [TaskShape.of(task, first_micro_batch=len(sizes), chunked=True) for task in schedule]
        counts.append(len(schedule))
        sizes += own
    (prediction,) = predictions_of(
        [run for run, _ in runs], prompt_lens=LENS, output_lens=output_lens, num_stages=2 * replicas, goodput=GOODPUT
    )
    measured = derive(
        Measurement(
            prompt_lens=LENS,
            goodput=GOODPUT,
            order=tuple(index for share in shares for index in share),
            output_len=max(output_lens),
            output_lens=output_lens if len(set(output_lens)) > 1 else None,
            micro_batch_sizes=tuple(sizes),
            tasks=tuple(tasks),
            replica_tasks=tuple(counts) if replicas > 1 else None,
            iterations=(
                Iteration(
                    duration_s=max(run.timeline.last_ends_s[-1, 0] for run, _ in runs),
                    token_times_s=tuple(moment for run, _ in runs for moment in run.timeline.last_ends_s[:, 0]),
                    stages=tuple(trace for run, busy_s in runs for trace in traces_of(run, busy_s)),
                ),
            ),
        )
    )
    # Waits that a run would have recorded; here there are none.
    del measured["comm_ms"]
    assert {name: prediction.metrics[name] for name in measured} == pytest.approx(measured)
    assert set(prediction.metrics) == {*measured, "comm_ms"}
    assert prediction.metrics["comm_ms"] > 0


def test_a_replica_without_prompts_has_idle_stages() -> None:
    run, _ = run_of((9, 8), 2)
    one, two = (predictions_of([run], prompt_lens=(9, 8), output_lens=(2, 2), num_stages=count)[0] for count in (2, 4))
    assert two.duration_s == one.duration_s
    assert two.stage_busy_s == (*one.stage_busy_s, 0.0, 0.0)
    assert two.ideal_s == pytest.approx(one.ideal_s / 2)
    assert two.metrics["bubble_ratio"] == pytest.approx((1 + one.metrics["bubble_ratio"]) / 2)


def predicted(lens: tuple[int, ...], output_len: int, stages_s: tuple[float, float]) -> Prediction:
    kinds = len(run_of(lens, output_len)[1])
    run, _ = run_of(lens, output_len, np.tile(np.array(stages_s)[None, :, None], (kinds, 1, 1)))
    return predictions_of([run], prompt_lens=lens, output_lens=(output_len,) * len(lens), num_stages=2)[0]


def test_it_says_where_the_time_goes() -> None:
    uneven = predicted((8,) * 30, 3, (0.1, 0.4))
    assert (uneven.limiting_stage, uneven.limited_by) == (1, "imbalance")
    short = predicted((8,) * 2, 1, (0.4, 0.4))
    assert short.limited_by == "fill and drain"
    # One micro-batch goes to and fro alone.
    alone = predicted((8,) * 2, 9, (0.4, 0.4))
    assert alone.limited_by == "waits"
    for prediction in (uneven, short, alone):
        assert prediction.ideal_s <= prediction.bound_s <= prediction.duration_s
        assert prediction.bound_s == max(prediction.stage_busy_s)
        assert prediction.ideal_s == pytest.approx(sum(prediction.stage_busy_s) / 2)


def test_one_stage_is_limited_by_its_compute() -> None:
    tasks: TaskSequence = task_sequence_of(
        (8,) * 4, output_len=3, micro_batch_size=2, prefill_size=2, chunk_size=None, in_flight=2
    )
    busy_s = np.full((len(tasks.kinds), 1, 1), 0.1)
    timeline = simulate_plans(tasks, busy_s, np.empty((len(tasks.kinds), 0, 1)), np.zeros((len(tasks.kinds), 1)))
    run = SimulatedRun(sequence=tasks, timeline=timeline, busy_s=tasks.counts.sum() * busy_s[0])
    (prediction,) = predictions_of([run], prompt_lens=(8,) * 4, output_lens=(3,) * 4, num_stages=1)
    assert prediction.limited_by == "compute"
    assert (prediction.duration_s, prediction.bound_s, prediction.ideal_s) == pytest.approx((0.6, 0.6, 0.6))
    assert prediction.metrics["bubble_ratio"] == pytest.approx(0.0)
