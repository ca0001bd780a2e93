"""The ranking as a document: a table of plans, why rows have no rank, what failed, and the best plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from pipetune.tuner.ranking.values import BaselineRow, Row
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.search import summarize
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
_MOST_ROWS, _MOST_REMARKS = 12, 5
"""What a screen has room for; all of it is in `ranking.md`."""
_LESS_NEEDED = frozenset({"runs", "pre"})
"""Columns whose place further metrics take on a screen."""

_NUM_COLUMNS = 11

BASELINE_NAME = "device_map"


def screen_of(report: Report) -> doc.Document:
    """The ranking for a terminal of 80 columns."""
    remarks = shortened(remarks_of(report), _MOST_REMARKS, "more such plans in ranking.md")
    parts: list[doc.Part] = [doc.GAP, _on_screen(table)] if (table := ranking_table(report)) else []
    parts.append(doc.Bullets(tuple(doc.Bullet(remark, "warning") for remark in remarks)))
    if failures := report.ranking.failures:
        told = [f"{failure_plan(row)}: {row.failure.kind.value}: {clean(row.failure.message)}" for row in failures]
        parts += [doc.GAP, doc.Text(f"{len(told)} runs gave no measurement", "strong")]
        parts.append(doc.Bullets(shortened(told, _MOST_REMARKS, "more in ranking.md")))
    search = summarize(report)
    if search and search.text:
        parts += [doc.GAP, doc.Text(search.text)]
    best, *others = closing_of(report)
    parts += [doc.GAP, doc.Text(best, "good"), *map(doc.Text, others), doc.Text(_files(report))]
    return doc.Document(title=title_of(report), facts=facts_of(report), parts=tuple(parts))


def whole_of(report: Report) -> doc.Document:
    """All of the ranking: what `ranking.md` holds."""
    parts: list[doc.Part] = [table] if (table := ranking_table(report)) else []
    parts.append(doc.Bullets(remarks_of(report)))
    if search := summarize(report):
        phases = sentence(search.phases) if search.phases else ""
        parts.append(doc.Section("How the search went", (search.table, doc.Text(search.text), doc.Text(phases))))
    if failures := failures_table(report):
        parts.append(doc.Section("Runs without a measurement", (failures,)))
    parts.append(doc.Text("\n".join(closing_of(report))))
    return doc.Document(title=title_of(report), facts=facts_of(report), parts=tuple(parts))


def title_of(report: Report) -> str:
    """`pipetune · nightly`."""
    return f"pipetune · {clean(report.name)}"


def ranking_table(report: Report) -> doc.Table | None:
    """Every ranked plan, those without a rank, and the baseline last; None where nothing was measured."""
    ranking, latency = report.ranking, report.latency
    metrics = [goal.metric for goal in ranking.objectives] + [limit.metric for limit in ranking.constraints]
    shown = {*_SHOWN_ANYWAY, report.throughput_metric, latency[0]}
    extras = tuple(metric for metric in dict.fromkeys(metrics) if metric not in shown)
    plans = (*ranking.rows, *ranking.unranked)
    rows = []
    for row, following in itertools.zip_longest(plans, plans[1:]):
        cells = _cells(row, latency[0], extras, several=len(ranking.objectives) > 1)
        rows.append(doc.TableRow(cells, _style(row), following is None or following.confirmed != row.confirmed))
    if ranking.baseline:
        rows.append(doc.TableRow(_baseline_cells(ranking.baseline, latency[0], extras), "other"))
    if not rows:
        return None
    names = ("mb", "pre", "fly", "runs", "tok/s", "×", "bubble", latency[1], "memory")
    return doc.Table(
        columns=(
            doc.Column("#"),
            doc.left("plan", "narrow", min_width=len(BASELINE_NAME)),
            *map(doc.Column, names),
            *(doc.Column(column_title(metric), wrap="narrow") for metric in extras),
        ),
        rows=tuple(rows),
        legend=_legend(report),
        ruled=True,
        gap=1,
    )


def _on_screen(table: doc.Table) -> doc.Table:
    """The first plans and the baseline; in as many columns as there is room for."""
    titles = [column.title for column in table.columns]
    plans = [row for row in table.rows if row.style != "other"]
    rows = [*plans[:_MOST_ROWS], *(row for row in table.rows if row.style == "other")]
    if len(plans) > _MOST_ROWS:
        last = rows[_MOST_ROWS - 1]
        more = ("", f"… {len(plans) - _MOST_ROWS} more in ranking.md", *[""] * (len(titles) - 2))
        rows[_MOST_ROWS - 1 : _MOST_ROWS] = [
            doc.TableRow(last.cells, last.style, True),
            doc.TableRow(more, "faint", True),
        ]
    table = replace(table, rows=tuple(rows))
    has_extras = len(titles) > _NUM_COLUMNS
    return table.only(set(titles) - _LESS_NEEDED) if has_extras else table


def failures_table(report: Report) -> doc.Table | None:
    """Every run without a measurement; None where there is none."""
    if not report.ranking.failures:
        return None
    return doc.Table(
        columns=(
            doc.Column("record"),
            doc.left("plan"),
            doc.left("kind"),
            doc.left("where"),
            doc.left("what happened", "prose"),
        ),
        rows=tuple(
            doc.TableRow(
                (
                    f"{row.record:04}",
                    failure_plan(row),
                    row.failure.kind.value,
                    failure_where(row),
                    clean(row.failure.message),
                )
            )
            for row in report.ranking.failures
        ),
    )


def remarks_of(report: Report) -> tuple[str, ...]:
    """Why rows have no rank, and whether runs were disturbed."""
    ranking = report.ranking
    remarks = [f"{row_text(row)}: {'; '.join(row.broken_constraints)}" for row in ranking.rows if not row.feasible]
    remarks += [f"{row_text(row)}: not ranked, {clean(row.unranked_because or '')}" for row in ranking.unranked]
    disturbed = sum(row.disturbed_runs for row in ranking.rows)
    if disturbed:
        remarks.append(f"{disturbed} of the runs used were disturbed; see the notes in report.html")
    return tuple(remarks)


def _style(row: Row) -> doc.Style:
    if row.rank == 1:
        return "good"
    return "faint" if row.unranked_because else "" if row.feasible else "warning"


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


def facts_of(report: Report) -> tuple[tuple[str, str], ...]:
    """Model, workload, machine, what was asked for, and what plans are measured against."""
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
    return tuple(facts)


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


def closing_of(report: Report) -> list[str]:
    """The best plan and how sure that is; never empty."""
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


def shortened(texts: Sequence[str], limit: int, rest: str) -> tuple[str, ...]:
    """The first texts, and how many there are beside them."""
    return (*texts[:limit], *([f"… {len(texts) - limit} {rest}"] if len(texts) > limit else []))
