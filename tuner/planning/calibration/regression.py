"""The regression behind `refit`: measured times of tasks on the terms of `RefittedCosts`, under a prior.

All terms have normal priors about zero. The fit is the mode of their posterior given the logs of the times
measured, found by Gauss–Newton steps with Huber's weights (P. J. Huber, Robust Statistics, 1981, ch. 7), so that
single odd times count for little. Each record has a term of its own for the machine's drift while it ran, with a tail
that lets a disturbed run be slow as a whole; each set of execution switches has one against the common one. At zero
the prior costs nothing, and no step is taken that raises the objective: so no mode explains what was seen worse than
the uncorrected costs do. How wide a prior should be depends on where these are from: several are tried (`PRIORS`), and
their modes averaged by the evidence for each, in Laplace's approximation (D. J. C. MacKay, Neural Computation 4, 1992).
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import huber

from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import StagePlan
from pipetune.tuner.planning.arrays import Floats, remembered
from pipetune.tuner.planning.calibration import corrected_costs as corrected
from pipetune.tuner.planning.calibration.observation import Observation, TaskSpan
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.contention import Contention
from pipetune.tuner.planning.simulation.model import FEW, joined_s

HUBER = 1.5
"""Deviations beyond so many standard deviations count linearly."""
_DISTURBED = 3.0
"""So much wider are the times of a disturbed record, and its drift."""
_MOST_STEPS, _MOST_HALVINGS = 12, 8
_SMALL_STEP = 1e-4


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Standard deviations of the terms before anything is seen; logs (0.1 is a tenth), but for `extra`."""

    all: float
    phase: float
    device: float
    device_phase: float
    size: float
    """SD of the step of the curve over sizes, each doubling."""
    cell: float
    """SD of the correction of one size on one device."""
    group: float
    """SD of layers of one shape against the others, in each phase."""
    ends: float
    """SD of a stage's ends against its layers, by phase and place in the pipeline."""
    extra: float
    """SD of extra time a task, in times of the smallest task of one layer, by phase and place in the pipeline."""
    contention: float = 0.1
    """SD of what other devices cost a task while all compute, by phase."""
    switches: float = 0.5
    """SD of one set of execution switches against the common one, in each phase."""
    drift: float = 0.04
    """SD of one record against the others: the drift of the machine."""
    task: float = 0.02
    """SD of the time of one kind of task on one stage, however many of them ran."""
    single_task: float = 0.10
    """SD of the time of a single task."""
    log_odds: float = 0.0
    """Logarithm of the odds of this prior against the others."""


MEASURED = Widths(
    all=0.05, phase=0.04, device=0.04, device_phase=0.02, size=0.02, cell=0.02, group=0.04, ends=0.1, extra=0.3
)
"""For costs that were measured part by part: a whole pipeline differs from its parts by some hundredths."""
SCALED = replace(MEASURED, all=1.0, log_odds=-0.5)
"""The same, but the machine was slower or faster as a whole while they were measured."""
NOMINAL = Widths(
    all=1.0, phase=0.3, device=0.05, device_phase=0.03, size=0.1, cell=0.02, group=0.2, ends=0.3, extra=1.0, log_odds=-1
)
"""For nominal rates, which may be far off, and in other ways for small and for large tasks; devices are alike."""
UNLIKE = replace(NOMINAL, device=0.5, device_phase=0.2, log_odds=-1.5)
"""The same for devices that are not."""
PRIORS = (MEASURED, SCALED, NOMINAL, UNLIKE)


class Rows:
    """The regression's rows: the time of a kind of task on a stage of a record each."""

    def __init__(
        self,
        base: Costs,
        groups: Sequence[int],
        observations: Sequence[Observation],
        measured: Contention | None,
        joined_by: Costs,
    ) -> None:
        """`measured` is what devices lose to each other, as far as it is known: what is fitted comes on top. A prefill
        with a step beside it is taken to be longer than by itself as `joined_by` has it."""
        self.base, self._joined_by = base, joined_by
        most = max(len(observation.effective.plan.devices) for observation in observations)
        self.measured = measured or Contention(prefill=0.0, decode=0.0, devices=most)
        self.devices = self.measured.devices
        """In the largest plan seen, or those measured."""
        self.middles = _middles(observations)
        self.groups = np.eye(max(groups) + 1)[list(groups)]
        self.columns: dict[corrected.Term, int] = {}
        self.log_s: list[float] = []
        self.counts: list[int] = []
        self.disturbed: list[bool] = []
        self.layers_s: list[Floats] = []
        self.ends_s: list[float] = []
        self.entries: dict[str, list[tuple[int, int, float]]] = {"layers": [], "ends": [], "extra": [], "whole": []}
        self.group_columns: list[list[int]] = []
        self.wide_drifts: set[int] = set()
        common = Counter(observation.effective.plan.switches for observation in observations).most_common(1)[0][0]
        for number, observation in enumerate(observations):
            self._add(number, observation, common)

    def _add(self, number: int, observation: Observation, common_switches: tuple[str, ...]) -> None:
        """Adds what one record tells."""
        plan = observation.effective.plan
        drift = self._column(("drift", number))
        if observation.disturbed:
            self.wide_drifts.add(drift)
        for span in observation.tasks:
            stage, row = span.stage % len(plan.stages), len(self.log_s)
            self._add_row(plan.devices[span.stage], plan.stages[stage], span, stage == 0, stage == len(plan.stages) - 1)
            self.disturbed.append(observation.disturbed)
            self.entries["whole"].append((row, drift, 1.0))
            if plan.switches != common_switches:
                term = ("switches", " ".join(plan.switches), span.kind.is_decode)
                self.entries["whole"].append((row, self._column(term), 1.0))

    def _add_row(self, device: str, stage: StagePlan, span: TaskSpan, is_first: bool, is_last: bool) -> None:
        kind, log_s = span.kind, math.log(max(span.seconds, 1e-9))
        sums, terms = self._of_kind(device, kind)
        self.layers_s.append(sums[stage.end_layer] - sums[stage.first_layer])
        place = {"is_first": is_first, "is_last": is_last}
        self.ends_s.append(self.base.ends_s(device, kind, **place))
        self.counts.append(span.count)
        if self.devices > 1:
            # Costs are what tasks take while all devices compute.
            share = min(span.others / (self.devices - 1), 1.0) - 1.0
            log_s -= share * self.measured.of(decode=kind.is_decode)
            self._enter("whole", [(("contention", kind.is_decode), share)])
        if span.decode_rows:
            alone, *others = (self._stage_s(device, stage, one, **place) for one in (kind, span.step, *FEW))
            log_s -= math.log(joined_s(alone, *others) / alone)
        self._enter("whole", corrected.speed_terms(device, kind))
        self._enter("layers", terms)
        self._enter("ends", corrected.place_terms("ends", kind, **place))
        unit = float(self.base.layers_s(device, corrected.SMALLEST).mean())
        self._enter("extra", corrected.place_terms("extra", kind, **place), unit)
        self.group_columns.append([self._column(corrected.group_term(n, kind)) for n in range(self.groups.shape[1])])
        self.log_s.append(log_s)

    def _stage_s(self, device: str, stage: StagePlan, kind: TaskKind, **place: bool) -> float:
        layers_s = self._joined_by.layers_s(device, kind)[stage.first_layer : stage.end_layer]
        return float(layers_s.sum()) + self._joined_by.ends_s(device, kind, **place)

    def _enter(self, part: str, terms: Iterable[tuple[corrected.Term, float]], unit: float = 1.0) -> None:
        """Puts terms into the row to come."""
        row = len(self.log_s)
        self.entries[part] += [(row, self._column(term), weight * unit) for term, weight in terms]

    @remembered
    def _of_kind(self, device: str, kind: TaskKind) -> tuple[Floats, corrected.Weighted]:
        """Sums of the layers before each layer, `[layers + 1, groups]`, and the terms."""
        each = self.base.layers_s(device, kind)[:, None] * self.groups
        sums = np.concatenate([np.zeros((1, each.shape[1])), np.cumsum(each, axis=0)])
        return sums, corrected.layer_terms(device, kind, self.middles[kind.is_decode])

    def _column(self, term: corrected.Term) -> int:
        return self.columns.setdefault(term, len(self.columns))

    def contention(self, terms: Mapping[corrected.Term, float]) -> Contention | None:
        """What devices lose to each other; None where they were never seen together."""
        if self.devices < 2:
            return None
        prefill, decode = (
            max(0.0, self.measured.of(decode=is_decode) + terms.get(("contention", is_decode), 0.0))
            for is_decode in (False, True)
        )
        return Contention(prefill=prefill, decode=decode, devices=self.devices)

    def fit(self) -> dict[corrected.Term, float]:
        """The mode of the posterior under each prior, averaged by how likely the times are under each."""
        fits = [self._mode(_Problem(self, widths)) for widths in PRIORS]
        logs = np.array([evidence + widths.log_odds for (evidence, _), widths in zip(fits, PRIORS, strict=True)])
        shares = np.exp(logs - logs.max())
        values = sum(share * values for share, (_, values) in zip(shares / shares.sum(), fits, strict=True))
        return dict(zip(self.columns, np.asarray(values).tolist(), strict=True))

    def _mode(self, problem: "_Problem") -> tuple[float, Floats]:
        """Logarithm of the evidence for the prior, and the mode of the posterior."""
        values = np.zeros(len(self.columns))
        objective = problem.objective(values)
        for _ in range(_MOST_STEPS):
            step = problem.step(values)
            for _ in range(_MOST_HALVINGS):
                after = problem.objective(values + step)
                if after <= objective:
                    break
                step = step / 2
            else:
                break
            values, gained, objective = values + step, objective - after, after
            if gained <= _SMALL_STEP * (1.0 + objective):
                break
        return problem.log_evidence(values), values


def _middles(observations: Sequence[Observation]) -> tuple[int, int]:
    """Middle of the sizes seen in prefill and in decode, in doublings."""
    seen: dict[bool, list[float]] = {False: [0.0], True: [0.0]}
    for observation in observations:
        for span in observation.tasks:
            seen[span.kind.is_decode].append(corrected.octaves_of(span.kind))
    prefill, decode = (round(statistics.median(seen[is_decode][1:] or [0.0])) for is_decode in (False, True))
    return prefill, decode


class _Problem:
    """The objective, −log posterior, and a Gauss–Newton step of it."""

    def __init__(self, rows: Rows, widths: Widths) -> None:
        count, width = len(rows.log_s), len(rows.columns)
        self.log_s = np.array(rows.log_s)
        self.sd = np.hypot(widths.task, widths.single_task / np.sqrt(rows.counts))
        self.sd = np.where(rows.disturbed, _DISTURBED * self.sd, self.sd)
        self.layers_s, self.ends_s = np.array(rows.layers_s), np.array(rows.ends_s)
        self.group_columns = np.array(rows.group_columns)
        self.design = {name: np.zeros((count, width)) for name in rows.entries}
        for name, entries in rows.entries.items():
            where = np.array(entries)
            np.add.at(self.design[name], (where[:, 0].astype(int), where[:, 1].astype(int)), where[:, 2])
        self.prior_sd = np.array([getattr(widths, str(term[0])) for term in rows.columns])
        self.prior_sd[sorted(rows.wide_drifts)] *= _DISTURBED
        self.is_drift = np.array([term[0] == "drift" for term in rows.columns])

    def _parts(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        """Times of the layers `[row, group]`, of the ends and of the whole task."""
        by_group = np.exp(values[self.group_columns]) if self.group_columns.shape[1] > 1 else 1.0
        layers = np.exp(self.design["layers"] @ values)[:, None] * self.layers_s * by_group
        ends = np.exp(self.design["ends"] @ values) * self.ends_s
        whole = layers.sum(1) + ends
        # Nothing takes less than a small part of what its layers and ends do, whatever is taken off.
        return layers, ends, np.maximum(whole + self.design["extra"] @ values, 0.05 * whole)

    def residuals(self, values: Floats) -> Floats:
        """Log times measured less those modelled, in standard deviations."""
        whole = self._parts(values)[2]
        return (self.log_s - np.log(whole) - self.design["whole"] @ values) / self.sd

    def objective(self, values: Floats) -> float:
        """Huber's loss of times and of drifts, squares of all other terms."""
        scaled = values / self.prior_sd
        return float(
            huber(HUBER, self.residuals(values)).sum()
            + huber(HUBER, scaled[self.is_drift]).sum()
            + 0.5 * (scaled[~self.is_drift] ** 2).sum()
        )

    def step(self, values: Floats) -> Floats:
        """Towards the minimum of the objective."""
        jacobian, weights, precision = self._linear(values)
        normal = (jacobian.T * weights) @ jacobian + np.diag(precision)
        pull = jacobian.T @ (weights * self.residuals(values) * self.sd) - precision * values
        return np.asarray(np.linalg.solve(normal, pull), dtype=np.float64)

    def log_evidence(self, values: Floats) -> float:
        """For the prior, by Laplace's approximation at the mode; up to what is the same for all priors."""
        jacobian, weights, precision = self._linear(values)
        log_det = np.linalg.slogdet((jacobian.T * weights) @ jacobian + np.diag(precision))[1]
        return -self.objective(values) - 0.5 * float(log_det) - float(np.log(self.prior_sd).sum())

    def _linear(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        """How the log times move with the terms, what each time weighs, and what the prior does."""
        layers, ends, whole = self._parts(values)
        jacobian = (
            self.design["layers"] * (layers.sum(1) / whole)[:, None]
            + self.design["ends"] * (ends / whole)[:, None]
            + self.design["extra"] / whole[:, None]
            + self.design["whole"]
        )
        if self.group_columns.shape[1] > 1:
            places = np.arange(len(whole))[:, None]
            np.add.at(jacobian, (places, self.group_columns), layers / whole[:, None])
        weights: Floats = _huber_weight(self.residuals(values)) / self.sd**2
        precision: Floats = np.where(self.is_drift, _huber_weight(values / self.prior_sd), 1.0) / self.prior_sd**2
        return jacobian, weights, precision


def _huber_weight(scaled: Floats) -> Floats:
    return np.minimum(1.0, HUBER / np.maximum(np.abs(scaled), 1e-12))
