"""Part 4: the highest rates that plans are predicted to sustain, against those measured on the same traces.

Predicted twice: with a profile of this machine, and with its times scaled, prefill and decode each by a factor, to what
the tasks of all runs of one plan took; that plan is not judged then.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipetune.bench.load.online import OnlineRun
from pipetune.bench.profile import TaskKind
from pipetune.bench.spec import Plan
from pipetune.tuner.planning.arrays import Floats
from pipetune.tuner.planning.costs.base import Costs
from pipetune.tuner.planning.costs.profile_cache import grid_for
from pipetune.tuner.planning.costs.profiled import ProfiledCosts
from pipetune.tuner.planning.simulation.load import LoadedRequest, simulate_load
from pipetune.tuner.planning.simulation.model import CostModel
from tests.evaluation.harness import say
from tests.evaluation.load.estimates import Limits, interval
from tests.evaluation.load.lab import Lab
from tests.evaluation.load.rates_of import find_together, search_from
from tests.evaluation.load.sides import OurSetting, Trace
from tests.evaluation.load.values import Row

AIM = 0.05
_ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class ScaledCosts:
    """Costs times a factor for each phase."""

    base: Costs
    prefill: float
    decode: float

    def layers_s(self, device: str, kind: TaskKind) -> Floats:
        """As `Costs` has it."""
        seconds: Floats = self._factor(kind) * self.base.layers_s(device, kind)
        return seconds

    def ends_s(self, device: str, kind: TaskKind, *, is_first: bool, is_last: bool) -> float:
        """As `Costs` has it."""
        return self._factor(kind) * self.base.ends_s(device, kind, is_first=is_first, is_last=is_last)

    def hop_s(self, source: str, target: str, num_bytes: int) -> float:
        """As `Costs` has it."""
        return self.base.hop_s(source, target, num_bytes)

    def _factor(self, kind: TaskKind) -> float:
        return self.decode if kind.is_decode else self.prefill


def factors(model: CostModel, plan: Plan, runs: Sequence[OnlineRun]) -> dict[str, float]:
    """What the tasks of runs took, over what they are predicted to take, by phase; 1 of a phase that had none."""
    took, thought = dict.fromkeys(("prefill", "decode"), 0.0), dict.fromkeys(("prefill", "decode"), 0.0)
    for run in runs:
        for index, task in enumerate(run.load_tasks):
            kinds = [TaskKind(task.rows, task.tokens, task.past)]
            if task.decode_rows:
                kinds.append(TaskKind(task.decode_rows, 1, task.decode_past))
            busy_s, _, _ = model.joined_s(plan, kinds)
            thought[task.kind] += sum(busy_s)
            took[task.kind] += sum(stage.compute_end_s[index] - stage.compute_start_s[index] for stage in run.stages)
    return {phase: took[phase] / thought[phase] if thought[phase] else 1.0 for phase in took}


def simulated_share(model: CostModel, setting: OurSetting, trace: Trace, limits: Limits, rate: float) -> float:
    """The share of a trace's requests that is predicted to keep the limits."""
    requests = [
        LoadedRequest(at_s=at / rate, prompt_len=len(prompt), output_len=length)
        for prompt, length, at in zip(trace.prompts, trace.output_lens, trace.unit_s, strict=True)
    ]
    times_s = simulate_load(model, setting.plan, setting.slots, requests).times_s
    pairs = zip(times_s["ttft"], times_s["tpot"], strict=True)
    return sum(1e3 * ttft <= limits.ttft and 1e3 * tpot <= limits.tpot for ttft, tpot in pairs) / len(requests)


def compare(lab: Lab, name: str) -> tuple[list[Row], dict[str, Any]]:
    """Each of our settings: predicted and measured, by the median over the rounds' traces."""
    settings = list(lab.subject.ours)
    if lab.extent.is_short:
        settings = [setting for setting in settings if len(setting.counts) > 1][:2]
    traces = [lab.trace(number) for number in range(max(1, lab.extent.rounds // 2))]
    costs = _profiles(lab, settings)
    models = {setting.name: _model(lab, setting, costs[len(setting.devices)], traces[0]) for setting in settings}
    predicted = {setting.name: _predicted(models[setting.name], setting, traces, lab.limits) for setting in settings}
    measured: dict[str, list[float]] = {setting.name: [] for setting in settings}
    teacher, runs = settings[-1], list[OnlineRun]()
    for trace in traces:

        def share(setting: OurSetting, rate: float, trace: Trace = trace) -> float:
            found = lab.share(lab.ours, setting, trace, rate)
            assert lab.ours.last_run is not None
            if setting == teacher:
                runs.append(lab.ours.last_run)
            return found

        searches = find_together(
            {one.name: partial(share, one) for one in settings},
            {one.name: predicted[one.name] or 1.0 for one in settings},
            order=lab.order,
            tolerance=lab.extent.tolerance,
            most=lab.extent.runs,
        )
        for key, search in searches.items():
            measured[key].append(search.highest)
    scale = factors(models[teacher.name], teacher.plan, runs)
    refitted = {
        one.name: _predicted(_model(lab, one, costs[len(one.devices)], traces[0], scale=scale), one, traces, lab.limits)
        for one in settings[:-1]
    }
    real = {key: statistics.median(rates) for key, rates in measured.items()}
    rows = [
        _row("after a profile", name, predicted, real),
        _row(f"after a refit to {teacher.name}", name, refitted, real),
    ]
    raw = {"measured": measured, "predicted": predicted, "refitted": refitted, "factors": scale}
    return [row for row in rows if row is not None], raw


def _profiles(lab: Lab, settings: Sequence[OurSetting]) -> dict[int, ProfiledCosts]:
    """By the number of workers: a single one has all cores."""
    found = {}
    for setting in {len(one.devices): one for one in settings}.values():
        fleet = lab.rig.experiment(f"{len(setting.devices)}-stages", setting.devices).fleet
        workload = lab.subject.workload(lab.requests)
        say(f"profiling {len(setting.devices)} workers")
        lens = [len(prompt) for prompt in lab.trace(0).prompts]
        largest = max(one.rows for one in settings)
        rows = tuple(size for size in _ROWS if size <= largest)
        grid = grid_for(workload, lens, micro_batch_sizes=rows, prefill_sizes=rows, devices=setting.devices)
        found[len(setting.devices)] = ProfiledCosts(fleet.profile(grid))
    return found


def _model(
    lab: Lab, setting: OurSetting, costs: ProfiledCosts, trace: Trace, *, scale: Mapping[str, float] | None = None
) -> CostModel:
    lens = [len(prompt) for prompt in trace.prompts]
    workload = lab.subject.workload(lab.requests)
    shape = lab.rig.experiment(f"{len(setting.devices)}-stages", setting.devices).fleet.shape
    used: Costs = costs if scale is None else ScaledCosts(base=costs, **scale)
    return CostModel(
        shape=shape,
        prompt_lens=tuple(lens),
        output_lens=workload.generated_lens,
        costs=used,
        contention=costs.contention,
    )


def _predicted(model: CostModel, setting: OurSetting, traces: Sequence[Trace], limits: Limits) -> float:
    return statistics.median(
        search_from(10.0).run(partial(simulated_share, model, setting, trace, limits)) for trace in traces
    )


def _row(label: str, name: str, predicted: Mapping[str, float], real: Mapping[str, float]) -> Row | None:
    errors = [abs(predicted[key] / real[key] - 1) for key in predicted if real[key]]
    if not errors:
        return None
    low, high = interval(errors)
    bias = statistics.median(predicted[key] / real[key] - 1 for key in predicted if real[key])
    return Row(
        name=f"predicted against measured highest rate, {label}",
        value=statistics.median(errors),
        low=low,
        high=high,
        n=len(errors),
        of="plans",
        aim=AIM,
        at_least=False,
        note=f"{name}; median bias {bias:+.1%}",
    )
