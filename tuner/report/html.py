"""`report.html`: one self-contained page, without scripts and without a single request to anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipetune.bench.record import Measurement
from pipetune.tuner.ranking.values import BaselineRow
from pipetune.tuner.report.costs import costs_of
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.finding import find
from pipetune.tuner.report.page import Section, data_uri, environment
from pipetune.tuner.report.tables import BASELINE_NAME, RankingTable, build_table
from pipetune.tuner.report.wording import (
    bytes_text,
    clean,
    export_note,
    metric_text,
    ms_text,
    peer_name,
    ratio_evidence,
    ratio_text,
    sentence,
    spread_text,
)
from pipetune.tuner.study.plan_file import engine_replicas


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A remark that runs left, and which runs."""

    text: str
    records: str


def render_html(
    report: Report,
    plots: Mapping[str, bytes],
    dark_plots: Mapping[str, bytes],
    sections: Sequence[Section] = (),
) -> str:
    """The page.

    Args:
        plots: PNGs by name, for light pages; `dark_plots` the same for dark ones.
        sections: further ones, such as a comparison with other studies.
    """
    table = build_table(report)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            table=table,
            headline=_headline(report, table),
            finding=find(report),
            separation=sentence(report.ranking.separation.text),
            recommended=sentence(because) if (because := report.ranking.recommended_because) else "",
            story=table.search,
            costs=costs_of(report.profile) if report.profile else None,
            peer=peer_name(report.config.workload),
            sweep=_sweep(report),
            plots={name: (data_uri(png), data_uri(dark_plots.get(name, png))) for name, png in plots.items()},
            machine=_machine(report),
            notes=_notes(report),
            uses=_uses(report),
            sections=sections,
        )
    )


def _headline(report: Report, table: RankingTable) -> tuple[str, str]:
    """The one number, and the line below it."""
    best = report.ranking.best
    if best is None:
        return "No best plan", table.closing[0]
    gain = best.speedup_over_baseline
    if gain is None:
        return metric_text(
            report.objective.metric, best.value
        ), "No baseline was measured, so there is no gain to report"
    metric = "" if report.objective.metric == report.throughput_metric else f" in {report.objective.metric}"
    return ratio_text(gain), f"over the un-pipelined {BASELINE_NAME} baseline{metric} · {ratio_evidence(gain)}"


def _sweep(report: Report) -> list[tuple[bool, tuple[str, ...]]]:
    """Whether a line is the chosen baseline, and its cells."""
    best = report.ranking.baseline
    lines = [
        (best is not None and row.batch_size == best.batch_size, _baseline_cells(report, str(row.batch_size), row))
        for row in report.ranking.baseline_sweep
    ]
    if best is not None and best.confirmed:
        lines.append((True, _baseline_cells(report, f"{best.batch_size}, finals", best)))
    return lines


def _baseline_cells(report: Report, label: str, row: BaselineRow) -> tuple[str, ...]:
    return (
        label,
        str(len(row.used_records)),
        spread_text(row.throughput),
        ms_text(row.metrics.get(report.latency[0])),
        bytes_text(row.metrics.get("peak_memory_bytes")),
    )


def _machine(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    if machine is None:
        return []
    hardware, software = machine.hardware, machine.software
    facts = [("host", machine.hostname), ("hardware id", machine.hardware_id)]
    facts += [("CPU", f"{hardware.cpu_model}, {hardware.cpu_cores} cores, {bytes_text(hardware.memory_bytes)}")]
    facts += [
        (f"GPU {index}", f"{gpu.name}, {bytes_text(gpu.memory_bytes)}, {gpu.uuid}")
        for index, gpu in enumerate(hardware.gpus)
    ]
    if hardware.links:
        facts.append(("links", ", ".join(hardware.links)))
    facts += [("system", software.os), ("Python", software.python), ("pipetune", software.pipetune)]
    optional = (("revision", software.git_revision), ("driver", software.driver), ("CUDA", software.cuda))
    facts += [(label, value) for label, value in (*optional, ("NCCL", software.nccl)) if value]
    facts += sorted(software.packages.items())
    return [(label, clean(value)) for label, value in facts]


def _notes(report: Report) -> list[Note]:
    by_text: dict[str, list[int]] = {}
    for record in report.records:
        if isinstance(record.result, Measurement):
            for text in (*record.result.notes, *record.result.telemetry.disturbances):
                by_text.setdefault(clean(text), []).append(record.number)
    return [Note(text=text, records=_numbers_text(numbers)) for text, numbers in by_text.items()]


def _numbers_text(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:04}" for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _uses(report: Report) -> list[tuple[str, str]]:
    """What can be done with the best plan, as text and lines to copy."""
    best = report.ranking.best
    if best is None:
        return []
    folder = clean(str(report.folder))
    model = shlex.quote(clean(report.config.model.name))
    dummy = " --load-format dummy" if report.config.model.load_format == "dummy" else ""
    uses = [
        ("Measure it again", f"pipetune bench --model {model}{dummy} --plan {shlex.quote(f'{folder}/best_plan.json')}"),
        (
            "Load the same split with transformers, model being the checkpoint's id or folder"
            + (f" ({note})" if (note := export_note(best.plan)) else ""),
            f"device_map = json.load(open({f'{folder}/best_device_map.json'!r}))\n"
            "AutoModelForCausalLM.from_pretrained(model, device_map=device_map)",
        ),
    ]
    if len(best.plan.devices) > 1:
        counts = ",".join(str(count) for count in best.plan.layer_counts)
        copies = engine_replicas(best.plan)
        uses.append(
            (
                "Take the split to vLLM or SGLang (it was not measured on those engines)",
                f"export VLLM_PP_LAYER_PARTITION={counts}\nexport SGLANG_PP_LAYER_PARTITION={counts}"
                + "".join(f"\n# {name}: {flag}" for name, flag in copies.items()),
            )
        )
    names = ",".join(f"cuda:{index}" for index in range(len(best.plan.stages)))
    uses.append(("Export it for other devices", f"pipetune export {shlex.quote(folder)} --device-names {names}"))
    return uses
