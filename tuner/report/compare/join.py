"""Joins studies by what was run: the same model, workload and plan, whatever the devices are called. Pure."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipetune.bench import metrics
from pipetune.bench.errors import ConfigError
from pipetune.bench.record import Hardware, Measurement
from pipetune.bench.spec import Plan, device_kind
from pipetune.tuner.config.sources import differences
from pipetune.tuner.ranking.values import Row
from pipetune.tuner.report.compare.values import Change, Contestant, PlanResult, SharedPlan, StudyComparison
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.wording import bytes_text
from pipetune.tuner.stats.ratios import Ratio, ratio_of, welch


def compare_studies(
    reports: Sequence[Report], names: Sequence[str], prices: Mapping[str, float] | None = None
) -> StudyComparison:
    """Compares studies, of unique names, with the first one. Prices are of one device and hour, by kind or name;
    without them each study's own config has them. ConfigError: a price of a device that no study has."""
    assert len(set(names)) == len(names) == len(reports) >= 2
    devices = dict.fromkeys(device for report in reports for device in report.config.concrete_devices)
    for priced in prices or {}:
        if priced not in devices and priced not in map(device_kind, devices):
            raise ConfigError(f"--price {priced}: no study has such a device; there are {', '.join(devices)}")
    contestants = tuple(_contestant(report, name, prices) for report, name in zip(reports, names, strict=True))
    figures = {
        name: {key: _figures_of(report, row) for key, row in rows_by_key(report).items()}
        for report, name in zip(reports, names, strict=True)
    }
    # What was asked differently does not compare, however equal the plans are.
    alike = {one.name for one in contestants if not _work(contestants[0], one)}
    plans = _shared({name: rows for name, rows in figures.items() if name in alike})
    changes = tuple(_change(contestants[0], other, plans) for other in contestants[1:])
    return StudyComparison(contestants=contestants, plans=plans, changes=changes)


def plan_key(plan: Plan, devices: Sequence[str]) -> str:
    """What a plan is on any machine: without the devices' names and without what its caps resolve to. Which of its
    study's devices, in order, hold its stages matters where they are unlike."""
    counts = "+".join(map(str, plan.layer_counts))
    parts = [f"{plan.replicas}x{counts}", f"mb={plan.micro_batch_size}", f"prefill={plan.prefill_size}"]
    parts += [word.replace(" ", "=") for word in plan.engine.words] if plan.engine is not None else []
    parts += [f"chunk={plan.prefill_chunk_size}"] if plan.prefill_chunk_size is not None else []
    order = [*devices, *sorted(set(plan.devices) - set(devices))]
    places = tuple(order.index(device) for device in plan.devices)
    parts += [f"order={','.join(map(str, places))}"] if places != tuple(range(len(places))) else []
    return " ".join((*parts, *plan.switches, *plan.lane_words))


def _contestant(report: Report, name: str, prices: Mapping[str, float] | None) -> Contestant:
    best, baseline = report.ranking.best, report.ranking.baseline
    config, machine = report.config, report.machine
    return Contestant(
        name=name,
        place=str(report.folder),
        hardware_id=machine.hardware_id
        if machine is not None
        else next((one.hardware_id for one in report.records), ""),
        machine=machine,
        model=config.model,
        workload=config.workload,
        protocol=config.protocol,
        goals=(*config.objectives, *map(str, config.constraints)),
        devices=config.concrete_devices,
        price_per_hour=_price(config.concrete_devices, config.prices if prices is None else prices),
        baseline=baseline.throughput.median if baseline is not None else None,
        over_baseline=best.speedup_over_baseline if best is not None else None,
        best=_figures_of(report, best) if best is not None else None,
        best_key=plan_key(best.plan, config.concrete_devices) if best is not None else None,
    )


def _price(devices: Sequence[str], prices: Mapping[str, float]) -> float | None:
    each = [prices.get(device, prices.get(device_kind(device))) for device in devices]
    known = [price for price in each if price is not None]
    return sum(known) if len(known) == len(each) else None


def rows_by_key(report: Report) -> dict[str, Row]:
    """Every plan that may be ranked, by its key; of two that differ in their caps alone, the better."""
    better: dict[str, Row] = {}
    for row in report.ranking.rows:
        better.setdefault(plan_key(row.plan, report.config.concrete_devices), row)
    return better


def _figures_of(report: Report, row: Row) -> PlanResult:
    used = [record.result for record in report.records if record.number in row.used_records]
    runs = [result for result in used if isinstance(result, Measurement)]
    typical = report.typical(row)
    return PlanResult(
        plan=row.plan,
        in_flight=row.effective.in_flight,
        stage_devices=tuple(stage.device for stage in typical.memory),
        cap_bytes=tuple(stage.cap_bytes for stage in typical.memory),
        peak_bytes=tuple(stage.peak_bytes for stage in typical.memory),
        throughputs=tuple(statistics.median(metrics.throughputs(run)) for run in runs),
        metrics=row.metrics,
        tokens_per_joule=_tokens_per_joule(runs),
        disturbed_runs=row.disturbed_runs,
    )


def _tokens_per_joule(runs: Sequence[Measurement]) -> float | None:
    """Median over the runs that have their energy; of tokens generated, or of all where texts are scored."""
    found = []
    for run in runs:
        if energy := run.telemetry.energy_j:
            pairs = zip(metrics.throughputs(run), run.iterations, strict=True)
            found.append(sum(speed * one.duration_s for speed, one in pairs) / energy)
    return statistics.median(found) if found else None


def _shared(figures: Mapping[str, Mapping[str, PlanResult]]) -> tuple[SharedPlan, ...]:
    base = next(iter(figures))
    found = []
    for key in dict.fromkeys(key for rows in figures.values() for key in rows):
        own = {name: rows[key] for name, rows in figures.items() if key in rows}
        if len(own) < 2:
            continue
        first, *later = own
        notes = filter(None, (_unlike(name, own[name], first, own[first]) for name in later))
        ratios = {name: _ratio(own[name], own[base]) for name in later if first == base}
        text = own[first].plan.describe()
        found.append(SharedPlan(key=key, text=text, figures=own, ratios=ratios, notes=tuple(notes)))
    return tuple(sorted(found, key=lambda plan: -next(iter(plan.figures.values())).throughput))


def _ratio(ours: PlanResult, theirs: PlanResult) -> Ratio:
    return ratio_of(math.log(ours.throughput / theirs.throughput), *welch(ours.throughputs, theirs.throughputs))


def _unlike(name: str, one: PlanResult, first: str, other: PlanResult) -> str:
    """How caps differ; empty where they do not: machines of one kind report a little more or less memory each boot."""
    pairs = zip(one.cap_bytes, other.cap_bytes, strict=False)
    if one.in_flight == other.in_flight and all(abs(ours - theirs) <= 0.01 * theirs for ours, theirs in pairs):
        return ""

    def caps(figures: PlanResult) -> str:
        return ", ".join(bytes_text(count) for count in figures.cap_bytes)

    return (
        f"{one.in_flight} in flight under caps of {caps(one)} in {name}, "
        f"{other.in_flight} under {caps(other)} in {first}"
    )


def _work(one: Contestant, other: Contestant) -> tuple[str, ...]:
    # A copy of the prompts is named by its hash; where it lies says nothing.
    lines = (*differences(one.model.by_content, other.model.by_content), *differences(one.workload, other.workload))
    return tuple(line for line in lines if not line.startswith("prompts_file:"))


def _change(first: Contestant, other: Contestant, plans: Sequence[SharedPlan]) -> Change:
    work = _work(first, other)
    shared = next((plan for plan in plans if plan.key == first.best_key), None)
    own_best = moved = None
    if first.best is not None and other.best is not None and not work:
        own_best = _ratio(other.best, first.best)
        if first.best_key != other.best_key:
            moved = f"{first.best.plan.describe()} → {other.best.plan.describe()}"
    software = differences(first.machine.software, other.machine.software) if first.machine and other.machine else ()
    protocol = [f"protocol.{line}" for line in differences(first.protocol, other.protocol)]
    if first.goals != other.goals:
        protocol.append(f"best plan chosen by: {', '.join(first.goals)} → {', '.join(other.goals)}")
    change = Change(
        name=other.name,
        hardware=tuple(_hardware(first, other)),
        protocol=tuple(protocol),
        software=tuple(software),
        work=work,
        same_plan=shared.ratios.get(other.name) if shared is not None and first.name in shared.figures else None,
        own_best=own_best,
        moved=moved,
        text="",
    )
    return change.model_copy(update={"text": _text(first, other, change)})


def _hardware(first: Contestant, other: Contestant) -> Iterator[str]:
    if first.devices != other.devices:
        yield f"devices: {', '.join(first.devices)} → {', '.join(other.devices)}"
    if first.machine is None or other.machine is None:
        if first.hardware_id != other.hardware_id:
            yield f"hardware_id: {first.hardware_id} → {other.hardware_id} (a file of records tells no more)"
        return
    before, now = first.machine.hardware, other.machine.hardware
    if _gpus(before) != _gpus(now):
        yield f"gpus: {_gpus(before)} → {_gpus(now)}"
    elif [gpu.uuid for gpu in before.gpus] != [gpu.uuid for gpu in now.gpus]:
        yield "gpus: others of the same kind, by their UUIDs"
    alike = {"gpus": (), "memory_bytes": 0}
    yield from differences(before.model_copy(update=alike), now.model_copy(update=alike))
    if before.memory_bytes != now.memory_bytes:
        yield f"memory: {bytes_text(before.memory_bytes)} → {bytes_text(now.memory_bytes)}"


def _gpus(hardware: Hardware) -> str:
    counts = Counter(
        f"{gpu.name} of {bytes_text(gpu.memory_bytes)}"
        + (f", capability {gpu.compute_capability}" if gpu.compute_capability else "")
        for gpu in hardware.gpus
    )
    return " and ".join(f"{count} × {text}" for text, count in counts.items()) or "none"


def _text(first: Contestant, other: Contestant, change: Change) -> str:
    if change.work:
        work = "; ".join(change.work)
        return f"{other.name} was asked something else than {first.name}, and does not compare: {work}"
    if change.same_plan is not None:
        same = f"the best plan of {first.name} is {_said(change.same_plan)} in {other.name}"
    elif first.best is not None:
        same = f"{other.name} did not measure the best plan of {first.name}, so machine and plan cannot be told apart"
    else:
        same = f"{first.name} has no best plan"
    if change.own_best is None:
        return same if other.best is not None else f"{same}; {other.name} has no best plan"
    which = f"and another plan is best: {change.moved}" if change.moved else "with the same plan"
    return f"{same}; each at its own best, {other.name} is {_said(change.own_best)}, {which}"


def _said(ratio: Ratio) -> str:
    """`8.1 % slower (95 %: 5.2 to 10.9 %)`."""
    change = 100 * (ratio.value - 1)
    said = f"{abs(change):.1f} % {'faster' if change > 0 else 'slower'}" if abs(change) >= 0.05 else "as fast"
    if ratio.low is None or ratio.high is None:
        return f"{said} (by a single run: that tells nothing)"
    ends = sorted((100 * (ratio.low - 1), 100 * (ratio.high - 1)))
    told = "" if ratio.is_told else ", not told apart from equal"
    return f"{said} (95 %: {ends[0]:+.1f} to {ends[1]:+.1f} %{told})"
