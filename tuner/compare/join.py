"""Joins studies by what was run: the same model, workload and plan, whatever the devices are called. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench import metrics
from bench.record import Measurement, Record
from bench.spec import ModelSpec, Plan, Workload, device_kind
from tuner.compare.values import Change, Contestant, Figures, RatioText, SharedPlan, StudyComparison
from tuner.differences import differences
from tuner.report.data import Report
from tuner.standings import Row
from tuner.stats.ratios import ratio_of


def compare_studies(
    reports: Sequence[Report], names: Sequence[str], prices: Mapping[str, float] | None = None
) -> StudyComparison:
    """Compares studies with the first one.

    Args:
        names: of the studies, unique.
        prices: of one device and hour, by kind or name; those of each study's own config where it is None.
    """
    assert len(set(names)) == len(names) == len(reports) >= 2
    contestants = tuple(_contestant(report, name, prices) for report, name in zip(reports, names, strict=True))
    figures = {name: _figures(report) for report, name in zip(reports, names, strict=True)}
    # What was asked differently does not compare, however equal the plans are.
    alike = {one.name for one in contestants if not _work(contestants[0], one)}
    plans = _shared({name: rows for name, rows in figures.items() if name in alike})
    changes = tuple(_change(contestants[0], other, plans) for other in contestants[1:])
    return StudyComparison(contestants=contestants, plans=plans, changes=changes)


def plan_key(plan: Plan) -> str:
    """What a plan is on any machine: without the devices' names and without what its caps resolve to."""
    counts = "+".join(map(str, plan.layer_counts))
    parts = [f"{plan.replicas}x{counts}", f"mb={plan.micro_batch_size}", f"prefill={plan.prefill_size}"]
    parts += [f"chunk={plan.prefill_chunk_size}"] if plan.prefill_chunk_size is not None else []
    # Which of the plan's devices is which matters where devices are unlike.
    order = sorted(set(plan.devices))
    places = tuple(order.index(device) for device in plan.devices)
    parts += [f"order={','.join(map(str, places))}"] if places != tuple(range(len(places))) else []
    return " ".join((*parts, *plan.switches))


def _contestant(report: Report, name: str, prices: Mapping[str, float] | None) -> Contestant:
    assert report.machine is not None
    best = report.ranking.best
    baseline = report.ranking.baseline
    devices = report.config.concrete_devices
    return Contestant(
        name=name,
        place=str(report.folder),
        machine=report.machine,
        model=report.config.model,
        workload=report.config.workload,
        devices=devices,
        price_per_hour=_price(devices, report.config.prices if prices is None else prices),
        baseline=baseline.throughput.median if baseline is not None else None,
        best=_figures_of(report, best) if best is not None else None,
        best_key=plan_key(best.plan) if best is not None else None,
    )


def _price(devices: Sequence[str], prices: Mapping[str, float]) -> float | None:
    each = [prices.get(device, prices.get(device_kind(device))) for device in devices]
    known = [price for price in each if price is not None]
    return sum(known) if len(known) == len(each) else None


def _figures(report: Report) -> dict[str, Figures]:
    """Of every plan that was measured and may be ranked; of two that differ in their caps alone, the faster."""
    found: dict[str, Figures] = {}
    for row in report.ranking.rows:
        one = _figures_of(report, row)
        key = plan_key(row.plan)
        if key not in found or one.throughput > found[key].throughput:
            found[key] = one
    return found


def _figures_of(report: Report, row: Row) -> Figures:
    used = [record for record in report.records if record.number in row.used_records]
    typical = report.typical(row)
    return Figures(
        plan=row.plan,
        in_flight=row.effective.in_flight,
        stage_devices=tuple(stage.device for stage in typical.memory),
        cap_bytes=tuple(stage.cap_bytes for stage in typical.memory),
        peak_bytes=tuple(stage.peak_bytes for stage in typical.memory),
        throughputs=tuple(_throughput(record) for record in used),
        metrics=row.metrics,
        disturbed_runs=row.disturbed_runs,
    )


def _throughput(record: Record) -> float:
    assert isinstance(record.result, Measurement)
    return statistics.median(metrics.throughputs(record.result))


def _shared(figures: Mapping[str, Mapping[str, Figures]]) -> tuple[SharedPlan, ...]:
    keys = list(dict.fromkeys(key for rows in figures.values() for key in rows))
    found = []
    for key in keys:
        own = {name: rows[key] for name, rows in figures.items() if key in rows}
        if len(own) < 2:
            continue
        first, *later = own
        found.append(
            SharedPlan(
                key=key,
                text=next(iter(own.values())).plan.describe(),
                figures=own,
                ratios={name: _ratio(own[name], own[first]) for name in later},
                notes=tuple(_unlike(name, own[name], first, own[first]) for name in later if _is_unlike(own[name], own[first])),
            )
        )
    return tuple(sorted(found, key=lambda plan: -next(iter(plan.figures.values())).throughput))


def _ratio(ours: Figures, theirs: Figures) -> RatioText:
    found = ratio_of(ours.throughputs, theirs.throughputs)
    return RatioText(value=found.value, low=found.low, high=found.high)


def _is_unlike(one: Figures, other: Figures) -> bool:
    return (one.in_flight, one.cap_bytes) != (other.in_flight, other.cap_bytes)


def _unlike(name: str, one: Figures, first: str, other: Figures) -> str:
    def caps(figures: Figures) -> str:
        return ", ".join(f"{count / 2**30:.1f}" for count in figures.cap_bytes)

    return (
        f"{one.in_flight} in flight under caps of {caps(one)} GiB in {name}, "
        f"{other.in_flight} under {caps(other)} GiB in {first}"
    )


def _work(one: Contestant, other: Contestant) -> tuple[str, ...]:
    return tuple(
        line
        for before, now in ((one.model, other.model), (one.workload, other.workload))
        for line in _lines(before, now)
    )


def _lines(before: ModelSpec | Workload, now: ModelSpec | Workload) -> list[str]:
    # A copy of the prompts is named by its hash; where it lies says nothing.
    ignored = ("prompts_file:",)
    return [line for line in differences(before, now) if not line.startswith(ignored)]


def _change(first: Contestant, other: Contestant, plans: Sequence[SharedPlan]) -> Change:
    work = _work(first, other)
    shared = next((plan for plan in plans if plan.key == first.best_key), None)
    same_plan = shared.ratios.get(other.name) if shared is not None and first.name in shared.figures else None
    own_best = _ratio(other.best, first.best) if other.best and first.best and not work else None
    moved = None
    if first.best is not None and other.best is not None and first.best_key != other.best_key and not work:
        moved = f"{first.best.plan.describe()} → {other.best.plan.describe()}"
    anonymous = (one.machine.hardware.model_copy(update={"gpus": _without_ids(one)}) for one in (first, other))
    return Change(
        name=other.name,
        hardware=tuple(differences(*anonymous)),
        software=tuple(differences(first.machine.software, other.machine.software)),
        work=work,
        same_plan=same_plan,
        own_best=own_best,
        moved=moved,
        text=_text(first, other, work, same_plan, own_best, moved),
    )


def _without_ids(contestant: Contestant) -> tuple[object, ...]:
    return tuple(gpu.model_copy(update={"uuid": ""}) for gpu in contestant.machine.hardware.gpus)


def _text(
    first: Contestant,
    other: Contestant,
    work: Sequence[str],
    same_plan: RatioText | None,
    own_best: RatioText | None,
    moved: str | None,
) -> str:
    if work:
        return f"{other.name} was asked something else than {first.name}, and does not compare: {'; '.join(work)}"
    if own_best is None:
        lacking = first.name if first.best is None else other.name
        return f"{lacking} has no best plan to compare"
    if same_plan is None:
        same = f"{other.name} did not run the best plan of {first.name}, so that machine and plan cannot be told apart"
    else:
        same = f"the best plan of {first.name} is {_said(same_plan)} in {other.name}"
    best = f"each at its own best, {other.name} is {_said(own_best)}"
    return f"{same}; {best}" + (f", and another plan is best: {moved}" if moved else ", with the same plan")


def _said(ratio: RatioText) -> str:
    """`8.1 % slower (95 %: 5.2 to 10.9 %)`."""
    change = 100 * (ratio.value - 1)
    word = "faster" if change >= 0 else "slower"
    if ratio.low is None or ratio.high is None:
        return f"{abs(change):.1f} % {word} (single runs: nothing is told by that)"
    ends = sorted((100 * (ratio.low - 1), 100 * (ratio.high - 1)))
    told = "" if ratio.is_told else ", not told apart from equal"
    return f"{abs(change):.1f} % {word} (95 %: {ends[0]:+.1f} to {ends[1]:+.1f} %{told})"
