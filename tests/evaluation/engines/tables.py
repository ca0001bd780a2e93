"""What the landscape, the searches and the model of an engine came to, as Markdown."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from pipetune.bench import metrics
from pipetune.bench.metrics import percentile
from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import Plan
from pipetune.tuner.planning.calibration.engine_model import EngineModel
from pipetune.tuner.planning.calibration.observation import observe
from pipetune.tuner.planning.calibration.predictor import Predictor
from tests.evaluation.engines.world import EngineWorld
from tests.evaluation.search.replay import Curve
from tests.evaluation.search.world import METRIC

GOALS = (0.97, 0.98, 0.99)
LEARNT = (2, 4, 8)
"""After so many plans the model is judged."""


def landscape_table(world: EngineWorld) -> str:
    """Throughput and bubble by partition and limits: means over the repeats, the machine's drift taken out."""
    spec, judged = world.spec, world.judged_by_all
    middle = statistics.fmean(judged.logs.values())
    rates = {plan: math.exp(log - middle) for plan, log in judged.logs.items()}
    scale = statistics.fmean(
        metrics.derive(_result(row))[METRIC] / rates[place]
        for place, rows in enumerate(world.runs.values())
        for row in rows
    )
    lines = [
        "| budget / sequences | " + " | ".join("+".join(map(str, one)) for one in spec.partitions) + " |",
        "|---|" + "--:|" * len(spec.partitions),
    ]
    keys = list(world.runs)
    for index, (budget, seqs) in enumerate(spec.limits):
        cells = []
        for place in range(len(spec.partitions)):
            number = place * len(spec.limits) + index
            bubble = statistics.median(metrics.derive(_result(row))["bubble_ratio"] for row in world.runs[keys[number]])
            cells.append(f"{scale * rates[number]:.1f} tok/s, {bubble:.0%}")
        lines.append(f"| {budget} / {seqs} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def searches_table(curves: Sequence[Curve], methods: Sequence[str]) -> str:
    """Runs until the plan recommended is near the best, by method."""
    head = " | ".join(f"runs to {1 - goal:.0%}: median, p90, reached" for goal in GOALS)
    lines = [f"| method | {head} | worth in the end: median, least |", "|---|" + "--:|" * (len(GOALS) + 1)]
    for method in methods:
        own = [curve for curve in curves if curve.method == method]
        cells = []
        for goal in GOALS:
            counts = sorted(curve.trials_to(goal) or math.inf for curve in own)
            reached = sum(not math.isinf(count) for count in counts) / len(counts)
            ranks = (counts[math.ceil(quantile * len(counts)) - 1] for quantile in (0.5, 0.9))
            told = ", ".join("never" if math.isinf(count) else f"{count:.0f}" for count in ranks)
            cells.append(f"{told}, {reached:.0%}")
        ends = [curve.scores[-1] for curve in own]
        lines.append(f"| {method} | {' | '.join(cells)} | {statistics.median(ends):.1%}, {min(ends):.1%} |")
    return "\n".join(lines)


def model_table(world: EngineWorld) -> str:
    """Predicted against measured throughput of plans that were not learnt from, after some random ones were."""
    lines = ["| plans learnt from | error: median | 90th percentile | bias |", "|--:|--:|--:|--:|"]
    rows = list(world.runs.values())
    for count in LEARNT:
        errors = []
        for seed in range(20):
            order = random.Random(seed)
            seen = order.sample(range(len(rows)), count)
            lessons = [observe(_complete(world, order.choice(rows[place]))) for place in seen]
            model = EngineModel.of_workload(world.shape, world.workload, world.prompt_lens)
            predictor = Predictor(model, [one for one in lessons if one is not None], metrics=(METRIC,))
            left = [place for place in range(len(rows)) if place not in seen]
            plans = [(world.resolve(_plan(rows[place][0])).plan, None) for place in left]
            found = predictor.predict([(plan, len(plan.stages)) for plan, _ in plans]).mean[METRIC]
            for predicted, place in zip(found.tolist(), left, strict=True):
                measured = statistics.median(metrics.derive(_result(row))[METRIC] for row in rows[place])
                errors.append(predicted / measured - 1)
        sizes = [abs(error) for error in errors]
        lines.append(
            f"| {count} | {statistics.median(sizes):.1%} | {percentile(sizes, 0.9):.1%} "
            f"| {statistics.median(errors):+.1%} |"
        )
    return "\n".join(lines)


def _complete(world: EngineWorld, record: Record) -> Record:
    return record.model_copy(update={"effective": world.resolve(_plan(record))})


def _plan(record: Record) -> Plan:
    assert record.spec is not None
    return record.spec.plan


def _result(record: Record) -> Measurement:
    assert isinstance(record.result, Measurement)
    return record.result
