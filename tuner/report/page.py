"""The page of a study, `report.html`: the best plan, the ranking, the search, and all that stands behind them."""

import re
from collections.abc import Sequence

from pipetune.bench.record import Measurement
from pipetune.tuner.report import document as doc
from pipetune.tuner.report import ranking as r
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.best_plan import best_plan_parts
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.profile import costs_of
from pipetune.tuner.report.search import summarize
from pipetune.tuner.report.study_charts import study_figures
from pipetune.tuner.study.plan_file import PlanFile, engine_replicas, render

_NUMBERS = re.compile(r"[\d.]+")


def page_of(report: Report, sections: Sequence[doc.Section] = ()) -> doc.Document:
    """The page, with further sections, such as a comparison with other studies."""
    drawn = study_figures(report)

    def figures(*names: str) -> doc.Figures:
        return doc.Figures(tuple(figure for name in names if (figure := drawn[name])))

    tables, plots = r.ranking_tables(report), figures("throughput_vs_bubble", "throughput_vs_memory")
    remarks = doc.Bullets(tuple(doc.Bullet(remark, "warning") for remark in r.remarks_of(report)))
    legend = r.legend_of(report) if tables else doc.Text("Nothing was measured.")
    # What a phone has room for.
    shown = (table.led_by(("#", "plan", "tok/s", "×")) for table in tables)
    ranked = doc.Section("Ranking", (*shown, remarks, legend, plots))
    parts: list[doc.Part] = [*best_plan_parts(report, figures("timeline")), ranked]
    if search := summarize(report):
        told: list[doc.Part] = [doc.Text(f"{search.stop} {search.errors}" if search.stop else ""), search.table]
        told += [search.shares, doc.Text(search.time), doc.Text(search.phases, "faint")] if search.shares else []
        told.append(figures("history", "predicted_vs_measured"))
        parts.append(doc.Section("How the search went", tuple(told)))
    if report.profile:
        parts.append(costs_of(report.profile))
    reference = doc.Text("results/README.md of the project defines every file, field and metric.", "faint")
    parts += [
        *sections,
        doc.Section("Baseline", _baseline(report)),
        *r.failures_of(report),
        *_uses(report),
        doc.Section("Machine and software", (_machine(report),)),
        doc.Section("Notes and disturbances", (_notes(report, measured=bool(tables)),)),
        doc.Section("Definitions", (doc.Facts(_definitions(report), stacked=True), reference)),
    ]
    return doc.Document(title=r.title_of(report), facts=r.facts_of(report), parts=tuple(parts))


def _baseline(report: Report) -> tuple[doc.Part, ...]:
    ranking, best = report.ranking, report.ranking.baseline
    rows = [(str(row.batch_size), row) for row in ranking.baseline_sweep]
    if best is not None and best.in_finals:
        rows.append((f"{best.batch_size}, finals", best))
    if not rows:
        missing = "No baseline was measured: this study cannot say what pipelining gains over the un-pipelined model."
        return (doc.Text(missing),)
    peer = (
        f"Hugging Face {w.peer_name(report.config.workload)}, un-pipelined, with prompts sorted and padded as ours are"
    )
    if report.engine:
        peer = f"{report.engine} un-pipelined on one device, with so many sequences at once"
    how = (
        f"{peer}. Every × is over the batch size in bold, its best: in the finals over its rounds there, else over its "
        "runs before them."
    )
    metric, latency = report.latency
    lines = []
    for label, row in rows:
        speed, wait = w.spread_text(row.throughput), w.ms_text(row.metrics.get(metric))
        cells = (label, str(len(row.used_records)), speed, wait, w.bytes_text(row.metrics.get("peak_memory_bytes")))
        is_best = best is not None and row.batch_size == best.batch_size
        lines.append(doc.TableRow(cells, "good" if is_best else ""))
    columns = tuple(map(doc.Column, ("batch", "runs", "tok/s", latency, "memory")))
    return doc.Text(how), doc.Table(columns=columns, rows=tuple(lines))


def _machine(report: Report) -> doc.Facts | doc.Text:
    if (machine := report.machine) is None:
        return doc.Text("The study holds no description of its machine.")
    hardware, software = machine.hardware, machine.software
    gpus = (f"{gpu.name}, {w.bytes_text(gpu.memory_bytes)}, {gpu.uuid}" for gpu in hardware.gpus)
    facts = {
        "host": machine.hostname,
        "hardware id": machine.hardware_id,
        "CPU": f"{hardware.cpu_model}, {hardware.cpu_cores} cores, {w.bytes_text(hardware.memory_bytes)}",
        **{f"GPU {index}": text for index, text in enumerate(gpus)},
        "links": ", ".join(hardware.links),
        "system": software.os,
        "Python": software.python,
        "pipetune": software.pipetune,
        "revision": software.git_revision,
        "driver": software.driver,
        "CUDA": software.cuda,
        "NCCL": software.nccl,
    }
    known = [(label, value) for label, value in facts.items() if value]
    return doc.Facts(tuple((label, w.clean(value)) for label, value in (*known, *sorted(software.packages.items()))))


def _notes(report: Report, *, measured: bool) -> doc.Bullets | doc.Text:
    """Remarks that runs left, those of a kind in one, and which runs."""
    by_kind: dict[str, dict[int, str]] = {}
    for record in report.records:
        if isinstance(record.result, Measurement):
            for text in map(w.clean, (*record.result.notes, *record.result.telemetry.disturbances)):
                # Names of processes and numbers differ from run to run.
                by_kind.setdefault(_NUMBERS.sub("", text.partition(": ")[0]), {}).setdefault(record.number, text)
    if by_kind:
        told = []
        for texts in by_kind.values():
            numbers, first = [*texts], next(iter(texts.values()))
            alike = len(set(texts.values())) - 1
            more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
            others = f", and {w.count_text(alike, 'note')} more of the kind" if alike else ""
            told.append(f"{first}{others} (records {', '.join(f'{number:04}' for number in numbers[:8])}{more})")
        return doc.Bullets(tuple(told))
    none = "None: no run was disturbed as far as the sensors tell, and none had to fall back on anything."
    return doc.Text(none if measured else "Nothing was measured.")


def _uses(report: Report) -> list[doc.Section]:
    """What can be done with the best plan, with lines to copy; empty without one."""
    if (best := report.ranking.best) is None:
        return []
    folder = w.clean(str(report.folder))
    note = f" ({text})" if (text := w.export_note(best.plan)) else ""
    uses = {
        **r.next_steps(report),
        f"Load the same split with transformers, model being the checkpoint's id or folder{note}": (
            f"device_map = json.load(open({f'{folder}/best_device_map.json'!r}))\n"
            "AutoModelForCausalLM.from_pretrained(model, device_map=device_map)"
        ),
    }
    if report.engine and report.machine and report.shape:
        config = report.config
        file = PlanFile(plan=best.plan, model=config.model, workload=config.workload, devices=config.concrete_devices)
        how = render(file, report.shape, "vllm", machine=report.machine, prompt_lens=report.prompt_lens)
        uses[f"Serve it by {report.engine}, as it was measured"] = how.rstrip()
    elif len(best.plan.devices) > 1:
        counts = ",".join(map(str, best.plan.layer_counts))
        lines = [f"export {engine}_PP_LAYER_PARTITION={counts}" for engine in ("VLLM", "SGLANG")]
        lines += [f"# {name}: {flag}" for name, flag in engine_replicas(best.plan).items()]
        uses["Take the split to vLLM or SGLang (it was not measured on those engines)"] = "\n".join(lines)
    parts = [part for text, code in uses.items() for part in (doc.Text(text), doc.Code(code))]
    trace = "trace.json.gz is the timeline above in full detail; open it in the browser at"
    return [doc.Section("Use the best plan", (*parts, doc.Text(trace, link="https://ui.perfetto.dev")))]


def _definitions(report: Report) -> tuple[tuple[str, str], ...]:
    """What the page's words mean."""
    scored, given, last = ("Scored", "texts", "score") if report.scores else ("Generated", "prompts", "token")
    words = w.definitions("all") | (w.definitions("fronts") if len(report.ranking.objectives) > 1 else {})
    told = {"scored": scored, "given": given, "last": last, "objective": report.objective}
    return tuple((word, text.format_map(told)) for word, text in words.items())
