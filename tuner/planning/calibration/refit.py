"""Corrects a cost model by what plans took: task times by `regression`, then what lies between the tasks.

Costs become `RefittedCosts` over the uncorrected ones; messages, gaps, stalls and contention are fitted from what the
records show of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from pipetune.bench.memory import ModelShape
from pipetune.bench.spec import device_kind
from pipetune.tuner.planning.calibration.corrected_costs import RefittedCosts
from pipetune.tuner.planning.calibration.observation import Observation, observe
from pipetune.tuner.planning.calibration.priors import PRIORS, Widths
from pipetune.tuner.planning.calibration.regression import Rows
from pipetune.tuner.planning.simulation.model import TOKEN_BYTES, CostModel

__all__ = ["Observation", "RefittedCosts", "observe", "refit"]

_NOT_COSTS = ("drift", "switches", "contention")
_HOP_SD = 0.3
"""Standard deviation of the logarithm of a hand-over's median."""
_HOP_WIDTHS = (1.0, 0.1)
"""Standard deviations before anything is seen: of the log factor on messages, and of its slope over doublings."""


def refit(model: CostModel, observations: Sequence[Observation], priors: Sequence[Widths] = PRIORS) -> CostModel:
    """The same model over costs corrected by what was observed; itself when there is nothing to learn from.

    Args:
        model: over uncorrected costs.
        priors: how far off costs may be.
    """
    if not any(observation.tasks for observation in observations):
        return model
    groups = layer_groups(model.shape)
    rows = Rows(model.costs, groups, observations, model.contention)
    terms = rows.fit(priors)
    hop_log, hop_slope, hop_bytes = _fit_hops(model, observations)
    costs = RefittedCosts(
        base=model.costs,
        terms={term: value for term, value in terms.items() if term[0] not in _NOT_COSTS},
        groups=groups,
        middles=rows.middles,
        hop_log=hop_log,
        hop_slope=hop_slope,
        hop_bytes=hop_bytes,
    )
    return dataclasses.replace(
        model,
        costs=costs,
        gaps_s={**model.gaps_s, **_by_device(model.gaps_s, observations, "gap_s")},
        stalls_s={**model.stalls_s, **_by_device(model.stalls_s, observations, "stall_s")},
        contention=rows.contention(terms),
    )


def layer_groups(shape: ModelShape) -> tuple[int, ...]:
    """Number of each layer's group: layers of equal shape share one."""
    numbers: dict[object, int] = {}
    return tuple(numbers.setdefault(layer, len(numbers)) for layer in shape.layers)


def _fit_hops(model: CostModel, observations: Sequence[Observation]) -> tuple[float, float, float]:
    """Log factor on messages, its slope over doublings of the bytes, and the bytes where the factor holds."""
    position_bytes = model.shape.crossing_bytes
    rows = []
    for observation in observations:
        devices = observation.effective.plan.devices
        for hand_over in observation.hand_overs:
            positions = hand_over.rows * hand_over.new_tokens
            num_bytes = positions * position_bytes or hand_over.rows * TOKEN_BYTES
            base = model.costs.hop_s(devices[hand_over.source], devices[hand_over.target], num_bytes)
            if base > 0 and hand_over.seconds > 0:
                rows.append((math.log(hand_over.seconds / base), math.log2(max(num_bytes, 1)), hand_over.count))
    if not rows:
        return 0.0, 0.0, 1.0
    ratio, doublings, count = np.array(rows).T
    centre = float(doublings.mean())
    design = np.stack([np.ones_like(doublings), doublings - centre], axis=1)
    weights = 1.0 / (_HOP_SD**2 * (1.0 + 1.0 / count))
    normal = design.T @ (weights[:, None] * design) + np.diag(1.0 / np.square(_HOP_WIDTHS))
    values = np.linalg.solve(normal, design.T @ (weights * ratio))
    return float(values[0]), float(values[1]), 2.0**centre


def _by_device(known: Mapping[str, float], observations: Sequence[Observation], name: str) -> dict[str, float]:
    """By device: the median over records and one that saw what was known before."""
    seen: dict[str, list[float]] = defaultdict(list)
    for observation in observations:
        for device, seconds in zip(observation.effective.plan.devices, getattr(observation, name), strict=False):
            if seconds is not None and len(observation.effective.plan.stages) > 1:
                seen[device].append(seconds)
    prior = {device: known.get(device, known.get(device_kind(device), 0.0)) for device in seen}
    return {device: float(np.median([prior[device], *found])) for device, found in seen.items()}
