"""The ranking as a document: the best plan first, then the tables of plans, why rows have no rank, what failed."""

import shlex
from collections.abc import Sequence
from dataclasses import replace

from pipetune.tuner.ranking.values import BaselineRow, Pooled, Row
from pipetune.tuner.report import document as doc
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.data import BASELINE_NAME, Report
from pipetune.tuner.report.search import summarize
from pipetune.tuner.study.plan_file import DEVICE_MAP_FILE, PLAN_FILE

_EXPORTS = ("report.html", "ranking.csv", "trace.json.gz", PLAN_FILE, DEVICE_MAP_FILE)
_MOST_ROWS, _MOST_REMARKS = 12, 5
"""What a screen has room for; all of it is in `ranking.md`."""


def screen_of(report: Report, *, goes_on: bool = False) -> doc.Document:
    """The ranking for a terminal of 80 columns: the verdict, the tables, what to do next, and the legend last. Who
    `goes_on` says what to do next behind it."""
    remarks = shortened(remarks_of(report), _MOST_REMARKS, "more such plans in ranking.md")
    tables, (verdict, *others) = ranking_tables(report), verdict_of(report)
    parts: list[doc.Part] = [verdict]
    for table in tables:
        parts += [doc.GAP, _on_screen(table)]
    parts += [doc.GAP, *others, doc.Bullets(tuple(doc.Bullet(remark, "warning") for remark in remarks))]
    if failures := report.ranking.failures:
        plans = [w.failure_plan(row, report.baseline_name) for row in failures]
        whys = [f"{row.failure.kind.value}: {w.clean(row.failure.message)}" for row in failures]
        told = list(map("{}: {}".format, plans, whys))
        parts += [doc.GAP, doc.Text(f"{w.count_text(len(told), 'run')} gave no measurement", "strong")]
        parts.append(doc.Bullets(shortened(told, _MOST_REMARKS, "more in ranking.md")))
    search = summarize(report)
    if search and search.text:
        parts += [doc.GAP, doc.Text(search.text)]
    if not goes_on and (steps := next_steps(report)):
        parts += [doc.GAP, doc.Text("Next", "strong")]
        parts += [part for text, code in steps.items() for part in (doc.Text(f"{text}:"), doc.Code(f"  {code}"))]
    present = ", ".join(name for name in _EXPORTS if (report.folder / name).exists()) or "records"
    files = ("files", f"{present} in {w.clean(str(report.folder))}")
    parts += [doc.GAP, doc.Facts((*facts_of(report), files))]
    return doc.Document(title=title_of(report), parts=(*parts, *([doc.GAP, legend_of(report)] if tables else [])))


def whole_of(report: Report) -> doc.Document:
    """All of the ranking: what `ranking.md` holds."""
    verdict, *others = verdict_of(report)
    tables = ranking_tables(report)
    parts: list[doc.Part] = [verdict, *tables, *others, doc.Bullets(remarks_of(report))]
    if search := summarize(report):
        told = (search.table, doc.Text(search.text), doc.Text(w.sentence(search.phases)))
        parts.append(doc.Section("How the search went", told))
    parts += [*failures_of(report), *([legend_of(report)] if tables else [])]
    return doc.Document(title=title_of(report), facts=facts_of(report), parts=tuple(parts))


def title_of(report: Report) -> str:
    """`pipetune · nightly`."""
    return f"pipetune · {w.clean(report.name)}"


def ranking_tables(report: Report) -> tuple[doc.Table, ...]:
    """The plans of the last finals, and those that the search alone measured, each table with its own baseline."""
    ranking = report.ranking
    finalists, others = ([row for row in (*ranking.rows, *ranking.unranked) if row.in_finals == own] for own in (1, 0))
    tables = []
    if finalists:
        rounds = w.count_text(max(row.throughput.runs for row in finalists), "interleaved round")
        tables.append(_table(report, f"Finals: side by side, in {rounds}", finalists, ranking.baseline_beside(True)))
    if others or (ranking.baseline_sweep and not finalists):
        tables.append(_table(report, "Search: one run after the other", others, ranking.baseline_beside(False)))
    return tuple(tables)


def _table(report: Report, caption: str, plans: Sequence[Row], base: BaselineRow | None) -> doc.Table:
    latency, several = report.latency, len(report.ranking.objectives) > 1
    extras = report.asked_beside([latency[0]])
    plans = sorted(plans, key=lambda row: row.is_reference)
    rows = [doc.TableRow(_cells(row, latency[0], extras, several=several), _style(row)) for row in plans]
    if base:
        measured = _measured(base, "1.00×", latency[0], extras)
        sizes = ("", str(base.batch_size), "") if report.engine else (str(base.batch_size), "", "")
        rows.append(doc.TableRow(("", report.baseline_name, *sizes, *measured), "other"))
    names = ["budget", "seqs", "KV"] if report.engine else ["mb", "pre", "fly"]
    names += ["runs", "tok/s", "×", "bubble", latency[1], "memory"]
    spare = {"pre": 5, "KV": 5, "runs": 4, "fly": 3, "bubble": 2, "memory": 1}
    for place, name in enumerate(names, start=2):
        # What is alike in all rows is missed least.
        if name in spare and len({row.cells[place] for row in rows}) == 1:
            spare[name] += len(spare)
    return doc.Table(
        columns=(
            doc.Column("#"),
            doc.left("plan", "narrow", min_width=len(BASELINE_NAME)),
            *(doc.Column(name, spare=spare.get(name, 0)) for name in names),
            *(doc.Column(w.column_title(metric), wrap="narrow") for metric in extras),
        ),
        rows=tuple(rows),
        caption=caption,
        ruled=True,
        gap=1,
    )


def _on_screen(table: doc.Table) -> doc.Table:
    """The first plans, and what they are compared with."""
    plans = [row for row in table.rows if row.style != "other"]
    if len(plans) > _MOST_ROWS:
        more = ("", f"… {len(plans) - _MOST_ROWS + 1} more in ranking.md", *[""] * (len(table.columns) - 2))
        plans = [*plans[: _MOST_ROWS - 1], doc.TableRow(more, "faint")]
    return replace(table, rows=(*plans, *(row for row in table.rows if row.style == "other")))


def failures_of(report: Report) -> tuple[doc.Section, ...]:
    """A section of every run without a measurement; none where there is none."""
    if not report.ranking.failures:
        return ()
    lines = []
    for row in report.ranking.failures:
        plan, where = w.failure_plan(row, report.baseline_name), w.failure_where(row)
        lines.append((f"{row.record:04}", plan, row.failure.kind.value, where, w.clean(row.failure.message)))
    columns = (doc.Column("record"), *map(doc.left, ("plan", "kind", "where")), doc.left("what happened", "prose"))
    return (doc.Section("Runs without a measurement", (doc.Table(columns=columns, rows=doc.rows_of(lines)),)),)


def remarks_of(report: Report) -> tuple[str, ...]:
    """What devices were lost, what could not be read, why rows have no rank, and whether runs were disturbed."""
    ranking = report.ranking
    remarks = [f"{w.row_text(row)}: {'; '.join(row.broken_constraints)}" for row in ranking.rows if not row.feasible]
    for row in ranking.unranked:
        kind = "a reference" if row.is_reference else "not ranked"
        remarks.append(f"{w.row_text(row)}: {kind}, {w.clean(row.unranked_because or '')}")
    if disturbed := sum(row.disturbed_runs for row in ranking.rows):
        remarks.append(f"{disturbed} of the runs used were disturbed; see the notes in report.html")
    lost = (w.clean(str(loss)) for loss in report.losses.losses)
    return (*lost, *(f"not read: {w.clean(text)}" for text in report.unread), *remarks)


def _style(row: Row) -> doc.Style:
    if row.rank == 1:
        return "good"
    if row.is_reference:
        return "other"
    return "faint" if row.unranked_because else "" if row.feasible else "warning"


def _cells(row: Row, latency: str, extras: Sequence[str], *, several: bool) -> tuple[str, ...]:
    marks = "=" * row.tied + "✓" * row.confirmed + "◆" * (several and row.on_front)
    return (
        f"{row.rank if row.rank else w.MISSING}{marks}",
        w.layers_text(row.plan),
        *w.sizes_text(row.effective),
        *_measured(row, w.ratio_text(row.speedup_over_baseline), latency, extras),
    )


def _measured(row: Pooled, gain: str, latency: str, extras: Sequence[str]) -> tuple[str, ...]:
    own = row.metrics
    return (
        str(len(row.used_records)),
        w.spread_text(row.throughput),
        gain,
        w.percent_text(own.get("bubble_ratio")),
        w.ms_text(own.get(latency)),
        w.bytes_text(own.get("peak_memory_bytes")),
        *(w.metric_text(name, own.get(name)) for name in extras),
    )


def facts_of(report: Report) -> tuple[tuple[str, str], ...]:
    """Model, workload, machine, what was asked for, and what plans are measured against."""
    ranking, metric = report.ranking, report.objective.metric
    model = w.model_text(report.config.model)
    if shape := report.shape:
        millions = w.number_text(shape.num_parameters / 1e6)
        model += f" · {w.clean(shape.architecture)}, {shape.num_layers} layers, {millions} M parameters"
    facts = [("model", model), ("workload", w.workload_text(report.config.workload, report.prompt_lens))]
    if report.machine:
        hardware = report.machine.hardware
        facts.append(("machine", f"{w.hardware_text(hardware)}, {w.bytes_text(hardware.memory_bytes)}"))
    if report.config.devices != "auto":
        facts.append(("devices", ", ".join(report.config.devices)))
    if metric != report.throughput_metric or len(ranking.objectives) > 1:
        facts.append(("objective", ", ".join(f"{goal} ({goal.direction})" for goal in ranking.objectives)))
    if ranking.constraints:
        facts.append(("constraints", ", ".join(str(constraint) for constraint in ranking.constraints)))
    base, single = ranking.baseline, ranking.single_stage
    engine, missing = report.engine, "none was measured, so there is no ×"
    facts.append(("baseline", w.baseline_text(base, report.config.workload, engine) if base else missing))
    if single:
        facts.append(("single stage", f"{single.plan.describe()}: {engine or 'our runtime'} without pipelining"))
    return tuple(facts)


def legend_of(report: Report) -> doc.Text:
    """What the tables' signs mean."""
    legend = "mb: micro-batch; pre: rows prefilled together; fly: micro-batches in flight"
    if report.engine:
        legend = f"budget: tokens of a batch; seqs: sequences at once; KV: of each worker; –: left to {report.engine}"
    legend += "; ±: interquartile range"
    metric = report.objective.metric
    rows = [*report.ranking.rows, *report.ranking.unranked]
    if any(row.plan.prefill_chunk_size is not None for row in rows):
        legend = legend.replace("rows prefilled together", "rows prefilled together · tokens at a time")
    if any(row.plan.replicas > 1 for row in rows):
        legend += "; 2×: replicas, each with its own micro-batches in flight"
    if any(row.speedup_over_baseline for row in rows):
        legend += f"; ×: over the {report.baseline_name} below"
        legend += "" if metric == report.throughput_metric else f", in {metric}"
        if any(row.speedup_over_baseline and not row.speedup_over_baseline.paired for row in rows):
            legend += " (~: not side by side)"
    if any(row.tied for row in rows):
        legend += "; =: not told apart from the fastest"
    if any(row.confirmed for row in rows):
        legend += "; ✓: measured in several rounds, whose drift is taken out of tok/s, ± and ×"
    legend += "; memory: peak of the fullest stage's process, on GPUs of its allocator"
    return doc.Text(legend + ("; ◆: Pareto front" if len(report.ranking.objectives) > 1 else ""), "faint")


def verdict_of(report: Report) -> list[doc.Text]:
    """The best plan and what it is tied with in one line, then how sure that is; never empty."""
    ranking, best = report.ranking, report.ranking.best
    if best is None:
        text = "No plan was measured."
        if ranking.rows:
            text = "No plan keeps the constraints; the table shows how near each came."
        elif ranking.unranked:
            text = "No plan can be ranked; the remarks say why."
        return [doc.Text(text, "warning")]
    gain = best.speedup_over_baseline
    value = w.metric_text(report.objective.metric, best.value)
    over = f", {w.ratio_text(gain)} over {report.baseline_name} ({w.ratio_evidence(gain)})" if gain else ""
    tied = [f"#{row.rank} ({w.layers_text(row.plan)})" for row in ranking.rows if row.tied and row is not best]
    ties = f"; tied with {w.list_text(tied)}" if tied else ""
    warnings, note = w.warnings_of(best), w.export_note(best.plan, DEVICE_MAP_FILE)
    separation, because = w.sentence(ranking.separation.text), w.sentence(ranking.recommended_because)
    told = (w.engine_default_text(ranking), separation, because, w.rival_text(ranking), w.sentence(note))
    return [
        doc.Text(f"Best plan: {w.row_text(best)}: {value}{over}{ties}", "warning" if warnings else "good"),
        *(doc.Text(warning, "warning") for warning in warnings),
        *map(doc.Text, filter(None, told)),
    ]


def next_steps(report: Report) -> dict[str, str]:
    """What to do with the best plan, and the command for it; empty without one."""
    if (best := report.ranking.best) is None:
        return {}
    folder = w.clean(str(report.folder))
    model = shlex.quote(w.clean(report.config.model.name))
    dummy = " --load-format dummy" if report.config.model.load_format == "dummy" else ""
    names = ",".join(f"cuda:{index}" for index in range(len(best.plan.stages)))
    again = f"pipetune bench --model {model}{dummy} --plan {shlex.quote(f'{folder}/{PLAN_FILE}')}"
    if report.engine:
        serve = {f"Serve it by {report.engine}": f"pipetune export {shlex.quote(folder)} --format vllm"}
        python = shlex.quote(report.config.engine.python) if report.config.engine else "PYTHON"
        return {"Measure it again": f"{again} --engine-python {python}", **serve}
    return {
        "Measure it again": again,
        "Export it for other devices": f"pipetune export {shlex.quote(folder)} --device-names {names}",
    }


def shortened(texts: Sequence[str], limit: int, rest: str) -> tuple[str, ...]:
    """The first texts, and how many there are beside them."""
    return (*texts[:limit], *([f"… {len(texts) - limit} {rest}"] if len(texts) > limit else []))
