"""The ranking as a table: computed once as text cells, which the terminal, Markdown and HTML draw alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipetune.tuner.ranking.values import BaselineRow, Row
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.search import SearchStory, tell
from pipetune.tuner.report.wording import (
    MISSING,
    baseline_text,
    bytes_text,
    clean,
    column_title,
    export_note,
    failure_plan,
    failure_where,
    layers_text,
    metric_text,
    model_text,
    ms_text,
    number_text,
    percent_text,
    prefill_text,
    ratio_evidence,
    ratio_text,
    rival_text,
    row_text,
    sentence,
    spread_text,
    warnings_of,
    workload_text,
)
from pipetune.tuner.study.plan_file import DEVICE_MAP_FILE, PLAN_FILE

_SHOWN_ANYWAY = frozenset({"bubble_ratio", "peak_memory_bytes"})
_EXPORTS = ("report.html", "ranking.csv", "trace.json.gz", PLAN_FILE, DEVICE_MAP_FILE)

NUM_COLUMNS = 11
BASELINE_NAME = "device_map"

LineKind = Literal["best", "plan", "broken", "unranked", "baseline"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TableLine:
    """One line of the table; `kind` decides how it is drawn."""

    kind: LineKind
    cells: tuple[str, ...]
    confirmed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureLine:
    """One failed run in words."""

    record: int
    plan: str
    kind: str
    where: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingTable:
    """All that a ranking says, as text; foreign text is on one line but not yet escaped."""

    title: str
    facts: tuple[tuple[str, str], ...]
    """Label and text: model, workload, machine, baseline …"""
    columns: tuple[str, ...]
    lines: tuple[TableLine, ...]
    legend: str
    remarks: tuple[str, ...]
    """Why rows have no rank."""
    failures: tuple[FailureLine, ...]
    closing: tuple[str, ...]
    """The best plan and how sure that is; never empty."""
    search: SearchStory | None
    """How the search went."""
    files: str
    """Where the files are and which there are."""


def build_table(report: Report) -> RankingTable:
    """Computes the table of a study."""
    ranking = report.ranking
    extras = tuple(
        dict.fromkeys(
            metric
            for metric in (
                *(objective.metric for objective in ranking.objectives),
                *(constraint.metric for constraint in ranking.constraints),
            )
            if metric not in {*_SHOWN_ANYWAY, report.throughput_metric, report.latency[0]}
        )
    )
    lines = []
    several = len(ranking.objectives) > 1
    for row in (*ranking.rows, *ranking.unranked):
        kind: LineKind = "unranked" if row.unranked_because else "plan" if row.feasible else "broken"
        if row.rank == 1:
            kind = "best"
        cells = _cells(row, report.latency[0], extras, several=several)
        lines.append(TableLine(kind=kind, cells=cells, confirmed=row.confirmed))
    if ranking.baseline:
        lines.append(TableLine(kind="baseline", cells=_baseline_cells(ranking.baseline, report.latency[0], extras)))
    remarks = [f"{row_text(row)}: {'; '.join(row.broken_constraints)}" for row in ranking.rows if not row.feasible]
    remarks += [f"{row_text(row)}: not ranked, {clean(row.unranked_because or '')}" for row in ranking.unranked]
    disturbed = sum(row.disturbed_runs for row in ranking.rows)
    if disturbed:
        remarks.append(f"{disturbed} of the runs used were disturbed; see the notes in report.html")
    return RankingTable(
        title=f"pipetune · {clean(report.name)}",
        facts=tuple(_facts(report)),
        columns=(*_columns(report), *map(column_title, extras)),
        lines=tuple(lines),
        legend=_legend(report),
        remarks=tuple(remarks),
        failures=tuple(
            FailureLine(
                record=row.record,
                plan=failure_plan(row),
                kind=row.failure.kind.value,
                where=failure_where(row),
                message=clean(row.failure.message),
            )
            for row in ranking.failures
        ),
        closing=tuple(_closing(report)),
        search=tell(report),
        files=_files(report),
    )


def render_rich(table: RankingTable, *, max_lines: int = 12, max_failures: int = 5) -> RenderableType:
    """Draws the table for a terminal of 80 columns; foreign text is never read as markup."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, text in table.facts:
        facts.add_row(label, Text(text))
    parts: list[RenderableType] = [Text(table.title, style="bold"), facts]
    if table.lines:
        parts += ["", _rich_lines(table, max_lines), Text(table.legend, style="dim")]
    for remark in _shortened(table.remarks, max_failures, "more such plans in ranking.md"):
        parts.append(Text(f"· {remark}", style="yellow"))
    if table.failures:
        parts.append(Text(f"\n{len(table.failures)} runs gave no measurement", style="bold"))
        described = [f"{line.plan}: {line.kind}: {line.message}" for line in table.failures]
        parts += [Text(f"· {text}") for text in _shortened(described, max_failures, "more in ranking.md")]
    if table.search and table.search.summary:
        parts += ["", Text(table.search.summary)]
    parts += ["", Text(table.closing[0], style="bold green"), *(Text(line) for line in table.closing[1:])]
    parts.append(Text(table.files))
    return Padding(Group(*parts), (0, 0))


def _columns(report: Report) -> tuple[str, ...]:
    columns = ("#", "plan", "mb", "pre", "fly", "runs", "tok/s", "×", "bubble", report.latency[1], "memory")
    assert len(columns) == NUM_COLUMNS
    return columns


def _cells(row: Row, latency: str, extras: Sequence[str], *, several: bool) -> tuple[str, ...]:
    own = row.metrics
    mark = ("✓" if row.confirmed else "") + ("◆" if several and row.on_front else "")
    return (
        f"{row.rank if row.rank else MISSING}{mark}",
        layers_text(row.plan),
        str(row.plan.micro_batch_size),
        prefill_text(row.plan),
        str(row.effective.in_flight),
        str(len(row.used_records)),
        spread_text(row.throughput),
        ratio_text(row.speedup_over_baseline),
        percent_text(own.get("bubble_ratio")),
        ms_text(own.get(latency)),
        bytes_text(own.get("peak_memory_bytes")),
        *(metric_text(name, own.get(name)) for name in extras),
    )


def _baseline_cells(row: BaselineRow, latency: str, extras: Sequence[str]) -> tuple[str, ...]:
    own = row.metrics
    return (
        "",
        BASELINE_NAME,
        str(row.batch_size),
        "",
        "",
        str(len(row.used_records)),
        spread_text(row.throughput),
        "1.00×",
        percent_text(own.get("bubble_ratio")),
        ms_text(own.get(latency)),
        bytes_text(own.get("peak_memory_bytes")),
        *(metric_text(name, own.get(name)) for name in extras),
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    ranking, metric = report.ranking, report.objective.metric
    facts = []
    shape = ""
    if report.shape:
        millions = number_text(report.shape.num_parameters / 1e6)
        shape = f" · {clean(report.shape.architecture)}, {report.shape.num_layers} layers, {millions} M parameters"
    facts.append(("model", model_text(report.config.model) + shape))
    facts.append(("workload", workload_text(report.config.workload, report.prompt_lens)))
    if report.machine:
        hardware = report.machine.hardware
        names = sorted({clean(gpu.name) for gpu in hardware.gpus})
        gpus = f"{len(hardware.gpus)} × {', '.join(names)} · " if hardware.gpus else ""
        cpu = f"{clean(hardware.cpu_model)}, {hardware.cpu_cores} cores, {bytes_text(hardware.memory_bytes)}"
        facts.append(("machine", gpus + cpu))
    if report.config.devices != "auto":
        facts.append(("devices", ", ".join(report.config.devices)))
    if metric != report.throughput_metric or len(ranking.objectives) > 1:
        facts.append(("objective", ", ".join(f"{goal} ({goal.direction})" for goal in ranking.objectives)))
    if ranking.constraints:
        facts.append(("constraints", ", ".join(str(constraint) for constraint in ranking.constraints)))
    base = ranking.baseline
    text = baseline_text(base, metric, report.config.workload) if base else "none was measured, so there is no ×"
    facts.append(("baseline", text))
    single = ranking.single_stage
    if single:
        gain = single.speedup_over_baseline
        over = f", {ratio_text(gain)} over device_map without pipelining" if gain else ""
        facts.append(("single stage", f"{single.plan.describe()}: {metric_text(metric, single.value)}{over}"))
    return facts


def _legend(report: Report) -> str:
    legend = "mb: micro-batch; pre: rows prefilled together; fly: micro-batches in flight; ±: interquartile range"
    metric = report.objective.metric
    rows = [*report.ranking.rows, *report.ranking.unranked]
    if any(row.plan.prefill_chunk_size is not None for row in rows):
        legend = legend.replace("rows prefilled together", "rows prefilled together · tokens at a time")
    if any(row.plan.replicas > 1 for row in rows):
        legend += "; 2×: replicas, each with its own micro-batches in flight"
    if any(row.speedup_over_baseline for row in rows):
        legend += "; ×: over device_map" + ("" if metric == report.throughput_metric else f" in {metric}")
        if any(row.speedup_over_baseline and not row.speedup_over_baseline.paired for row in rows):
            legend += " (~: not in common rounds, both sides as measured during the search)"
    if any(row.confirmed for row in rows):
        legend += "; ✓: confirmed in interleaved rounds after the search"
    return legend + ("; ◆: Pareto front" if len(report.ranking.objectives) > 1 else "")


def _closing(report: Report) -> list[str]:
    ranking, best = report.ranking, report.ranking.best
    if best is None:
        if ranking.rows:
            lines = ["No plan keeps the constraints; the table shows how near each came."]
        elif ranking.unranked:
            lines = ["No plan can be ranked; the remarks above say why."]
        else:
            lines = ["No plan was measured."]
    else:
        gain = best.speedup_over_baseline
        value = metric_text(report.objective.metric, best.value)
        over = f", {ratio_text(gain)} over device_map ({ratio_evidence(gain)})" if gain else ""
        lines = [f"Best plan: {row_text(best)}: {value}{over}"]
        lines += warnings_of(best)
        lines.append(sentence(ranking.separation.text))
        if ranking.recommended_because:
            lines.append(sentence(ranking.recommended_because))
        lines += [text for text in (rival_text(ranking),) if text]
        lines += [sentence(note) for note in (export_note(best.plan, DEVICE_MAP_FILE),) if note]
    return lines


def _files(report: Report) -> str:
    present = [name for name in _EXPORTS if (report.folder / name).exists()]
    return f"Files in {clean(str(report.folder))}: {', '.join(present or ['records'])}"


def _rich_lines(table: RankingTable, max_lines: int) -> Table:
    styles = {"best": "bold green", "plan": "", "broken": "yellow", "unranked": "dim", "baseline": "cyan"}
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    # Columns of further metrics take the place of what the Markdown keeps.
    hidden = {"runs", "pre"} if len(table.columns) > NUM_COLUMNS else set()
    shown = [index for index, column in enumerate(table.columns) if column not in hidden]
    for index in shown:
        title = table.columns[index]
        if title == "plan":
            grid.add_column(title, overflow="fold", min_width=len(BASELINE_NAME))
        else:
            grid.add_column(Text(title), justify="right", no_wrap=index < NUM_COLUMNS, overflow="fold")
    plans = [line for line in table.lines if line.kind != "baseline"]
    for index, line in enumerate(plans[:max_lines]):
        following = plans[index + 1] if index + 1 < min(max_lines, len(plans)) else None
        section = following is None or following.confirmed != line.confirmed
        grid.add_row(*(Text(line.cells[at]) for at in shown), style=styles[line.kind], end_section=section)
    if len(plans) > max_lines:
        grid.add_row("", Text(f"… {len(plans) - max_lines} more in ranking.md"), style="dim", end_section=True)
    for line in table.lines:
        if line.kind == "baseline":
            grid.add_row(*(Text(line.cells[at]) for at in shown), style=styles[line.kind])
    return grid


def _shortened(texts: Sequence[str], limit: int, rest: str) -> list[str]:
    return [*texts[:limit], *([f"… {len(texts) - limit} {rest}"] if len(texts) > limit else [])]
