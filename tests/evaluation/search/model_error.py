"""How well the cost model predicts a landscape: after profiling alone, and after a search's first runs.

    python -m tests.evaluation.search model smollm2-prefill-heavy

A search would run the plan predicted best, learn from it, run the plan then predicted best, and so on. After some such
runs all plans not among them are judged: predicted throughput against what all their runs come to, the machine's drift
taken out. That is done once with each repeat as what the search sees; what is told is the median over these.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from pipetune.bench.record import Record
from pipetune.bench.spec import EffectivePlan, Value
from pipetune.tuner.planning.calibration.observation import Observation, observe
from pipetune.tuner.planning.calibration.predictor import Predictor
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.nominal import NominalCosts
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.model import CostModel
from tests.evaluation.search import drift
from tests.evaluation.search.landscape import Landscape, LandscapeFolder, usable_runs
from tests.evaluation.search.memory_error import describe, memory_errors
from tests.evaluation.search.world import METRIC, all_timed, read_profile

Floats = npt.NDArray[np.float64]

LEARNT = (0, 4, 8)
"""After so many runs the model is judged."""


class ModelError(Value):
    """Predicted against measured throughput over the plans of a landscape."""

    landscape: str
    costs: str
    """What was known before any run: `nominal` rates or a `profile`."""
    learnt: int
    """Runs that the model was refitted from."""
    plans: int
    """Judged: those that it did not learn from."""
    median: float
    """Of |predicted / measured - 1|."""
    p90: float
    bias: float
    """Median of predicted / measured - 1."""
    shape: float
    """As `median`, had predictions been right on the whole: the machine's drift while the model learnt is in all of
    them."""
    rank_correlation: float
    """Spearman's."""


def error_table(landscapes: Sequence[tuple[str, Path]]) -> str:
    """As Markdown: errors of throughput, then those of memory, of landscapes given by name and folder.

    Raises:
        StudyError: a landscape is not complete or lacks its profile.
    """
    lines = [
        "| landscape | known before | runs learnt from | plans judged | error: median | 90th percentile | bias "
        "| median without bias | rank correlation |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    memory = []
    for name, folder in landscapes:
        files = LandscapeFolder(folder)
        landscape, records = files.read(), files.records()
        runs = {_effective(rows).key: rows for rows in usable_runs(records).values()}
        lines += [_line(error) for error in model_errors(name, landscape, runs, ProfiledCosts(read_profile(folder)))]
        memory.append(f"Memory, {name}:\n\n{describe(memory_errors(landscape.shape, records))}")
    return "\n\n".join(("\n".join(lines), *memory))


def _line(error: ModelError) -> str:
    cells = (
        error.landscape,
        error.costs,
        f"{error.learnt}",
        f"{error.plans}",
        f"{error.median:.1%}",
        f"{error.p90:.1%}",
        f"{error.bias:+.1%}",
        f"{error.shape:.1%}",
        f"{error.rank_correlation:.3f}",
    )
    return "| " + " | ".join(cells) + " |"


def model_errors(
    name: str, landscape: Landscape, runs: Mapping[str, Sequence[Record]], profiled: Costs
) -> tuple[ModelError, ...]:
    """Of nominal rates and of a profile, each after none and some of a search's runs.

    Args:
        runs: of each plan, repeat by repeat.
    """
    scores = landscape.spec.workload.generated_len == 0
    known: dict[str, Costs] = {"nominal": NominalCosts(landscape.shape, scores=scores), "profile": profiled}
    return tuple(
        error
        for costs_name, costs in known.items()
        for error in _errors(
            name,
            costs_name,
            CostModel.of_workload(landscape.shape, landscape.spec.workload, landscape.prompt_lens, costs),
            runs,
        )
    )


def _errors(
    name: str, costs_name: str, model: CostModel, runs: Mapping[str, Sequence[Record]]
) -> tuple[ModelError, ...]:
    timed = all_timed(runs.values())
    judged_logs = drift.judge(timed, drift.fit(timed)).logs
    truth = np.exp([judged_logs[place] for place in range(len(runs))])
    plans = [_effective(records) for records in runs.values()]
    repeats = min(len(records) for records in runs.values())
    judged: dict[int, list[tuple[float, ...]]] = {}
    for repeat in range(repeats):
        observed = [observe(records[repeat]) for records in runs.values()]
        for learnt, rest, predicted in _search(model, plans, observed):
            errors = predicted[rest] / truth[rest] - 1.0
            judged.setdefault(learnt, []).append(
                (
                    float(np.median(np.abs(errors))),
                    float(np.quantile(np.abs(errors), 0.9)),
                    float(np.median(errors)),
                    float(np.median(np.abs((1.0 + errors) / (1.0 + np.median(errors)) - 1.0))),
                    float(spearmanr(predicted[rest], truth[rest]).statistic),
                )
            )
    found = []
    for learnt, rows in judged.items():
        median, p90, bias, shape, correlation = (statistics.median(column) for column in zip(*rows, strict=True))
        found.append(
            ModelError(
                landscape=name,
                costs=costs_name,
                learnt=learnt,
                plans=len(plans) - learnt,
                median=median,
                p90=p90,
                bias=bias,
                shape=shape,
                rank_correlation=correlation,
            )
        )
    return tuple(found)


def _search(
    model: CostModel, plans: Sequence[EffectivePlan], observed: Sequence[Observation | None]
) -> list[tuple[int, list[int], Floats]]:
    """After each number of `LEARNT` runs: that number, the plans not run, and what is predicted of all."""
    found = []
    ran: list[int] = []
    pairs = [(one.plan, one.in_flight) for one in plans]
    for learnt in range(min(max(LEARNT), len(plans) - 3) + 1):
        observations = [seen for index in ran if (seen := observed[index]) is not None]
        predicted = Predictor(model, observations, metrics=(METRIC,)).predict(pairs).mean[METRIC]
        rest = [index for index in range(len(plans)) if index not in ran]
        if learnt in LEARNT:
            found.append((learnt, rest, predicted))
        ran.append(max(rest, key=lambda index: float(predicted[index])))
    return found


def _effective(records: Sequence[Record]) -> EffectivePlan:
    effective = records[0].effective
    assert effective is not None
    return effective
