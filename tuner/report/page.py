"""The page of a study, `report.html`: the best plan, the ranking, the search, and all that stands behind them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipetune.bench.record import Measurement
from pipetune.tuner.ranking.values import BaselineRow
from pipetune.tuner.report import document as doc
from pipetune.tuner.report.best_plan import best_plan_parts
from pipetune.tuner.report.costs import costs_of
from pipetune.tuner.report.data import Report
from pipetune.tuner.report.ranking import facts_of, failures_table, ranking_table, remarks_of, title_of
from pipetune.tuner.report.search import summarize
from pipetune.tuner.report.study_charts import study_figures
from pipetune.tuner.report.wording import bytes_text, clean, export_note, ms_text, peer_name, spread_text
from pipetune.tuner.study.plan_file import engine_replicas


def page_of(report: Report, sections: Sequence[doc.Section] = ()) -> doc.Document:
    """The page.

    Args:
        sections: further ones, such as a comparison with other studies.
    """
    drawn = study_figures(report)

    def figures(*names: str) -> doc.Figures:
        return doc.Figures(tuple(drawn[name] for name in names if name in drawn))

    ranking, failures = ranking_table(report), failures_table(report)
    parts: list[doc.Part] = [*best_plan_parts(report, figures("timeline"))]
    parts.append(
        doc.Section(
            "Ranking",
            (
                ranking or doc.Text("Nothing was measured."),
                doc.Bullets(remarks_of(report)),
                figures("throughput_vs_bubble", "throughput_vs_memory"),
            ),
        )
    )
    if search := summarize(report):
        told: list[doc.Part] = [doc.Text(f"{search.stop} {search.errors}" if search.stop else ""), search.table]
        told += [search.shares, doc.Text(search.time), doc.Text(search.phases, "faint")] if search.shares else []
        told.append(figures("history", "predicted_vs_measured"))
        parts.append(doc.Section("How the search went", tuple(told)))
    if report.profile:
        parts.append(costs_of(report.profile))
    parts += [*sections, doc.Section("Baseline", _baseline(report))]
    if failures:
        parts.append(doc.Section("Runs without a measurement", (failures,)))
    parts += _uses(report)
    parts.append(doc.Section("Machine and software", (_machine(report),)))
    parts.append(doc.Section("Notes and disturbances", (_notes(report, measured=ranking is not None),)))
    reference = doc.Text("results/README.md of the project defines every file, field and metric.", "faint")
    parts.append(doc.Section("Definitions", (doc.Facts(_definitions(report), stacked=True), reference)))
    return doc.Document(title=title_of(report), facts=facts_of(report), parts=tuple(parts))


def _baseline(report: Report) -> tuple[doc.Part, ...]:
    ranking, best = report.ranking, report.ranking.baseline
    rows = [
        doc.TableRow(
            _baseline_cells(report, str(row.batch_size), row),
            "good" if best is not None and row.batch_size == best.batch_size else "",
        )
        for row in ranking.baseline_sweep
    ]
    if best is not None and best.confirmed:
        rows.append(doc.TableRow(_baseline_cells(report, f"{best.batch_size}, finals", best), "good"))
    if not rows:
        missing = "No baseline was measured: this study cannot say what pipelining gains over the un-pipelined model."
        return (doc.Text(missing),)
    how = (
        f"Hugging Face {peer_name(report.config.workload)}, un-pipelined, with prompts sorted and padded as ours are. "
        "Every × is over the batch size in bold, its best: within rounds of the finals where a plan has them, else by "
        "the values from before."
    )
    names = ("batch", "runs", "tok/s", report.latency[1], "memory")
    return doc.Text(how), doc.Table(columns=tuple(map(doc.Column, names)), rows=tuple(rows))


def _baseline_cells(report: Report, label: str, row: BaselineRow) -> tuple[str, ...]:
    return (
        label,
        str(len(row.used_records)),
        spread_text(row.throughput),
        ms_text(row.metrics.get(report.latency[0])),
        bytes_text(row.metrics.get("peak_memory_bytes")),
    )


def _machine(report: Report) -> doc.Facts | doc.Text:
    machine = report.machine
    if machine is None:
        return doc.Text("The study holds no description of its machine.")
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
    return doc.Facts(tuple((label, clean(value)) for label, value in facts))


def _notes(report: Report, *, measured: bool) -> doc.Bullets | doc.Text:
    """Remarks that runs left, and which runs."""
    by_text: dict[str, list[int]] = {}
    for record in report.records:
        if isinstance(record.result, Measurement):
            for text in (*record.result.notes, *record.result.telemetry.disturbances):
                by_text.setdefault(clean(text), []).append(record.number)
    if by_text:
        return doc.Bullets(tuple(f"{text} (records {_numbers_text(numbers)})" for text, numbers in by_text.items()))
    none = "None: no run was disturbed as far as the sensors tell, and none had to fall back on anything."
    return doc.Text(none if measured else "Nothing was measured.")


def _numbers_text(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"{number:04}" for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _uses(report: Report) -> list[doc.Section]:
    """What can be done with the best plan, with lines to copy; empty without one."""
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
    parts = [part for text, lines in uses for part in (doc.Text(text), doc.Code(lines))]
    trace = "trace.json.gz is the timeline above in full detail; open it in the browser at"
    return [doc.Section("Use the best plan", (*parts, doc.Text(trace, link="https://ui.perfetto.dev")))]


def _definitions(report: Report) -> tuple[tuple[str, str], ...]:
    """What the page's words mean."""
    tokens, given, last = ("Scored", "texts", "score") if report.scores else ("Generated", "prompts", "token")
    words = [
        (
            "tok/s",
            f"{tokens} tokens over the duration of an iteration, from the moment the {given} are given to the last "
            f"{last}; median over all iterations used.",
        ),
        (
            "×",
            f"How many times better than the baseline in {report.objective}: the median over interleaved rounds of the "
            "ratio within a round. With ~ the ratio of two medians from before the finals.",
        ),
        *_DEFINITIONS,
    ]
    return tuple([*words, _KNEE] if len(report.ranking.objectives) > 1 else words)


_DEFINITIONS = (
    (
        "TTFT, TPOT, E2EL",
        "Of a request: time to its first token; (last − first token) / (tokens − 1); time to its last token. All "
        "prompts are given at once, so TTFT includes the queue.",
    ),
    (
        "Bubble ratio",
        "1 − Σ busy / (stages × duration): the share of stage time without compute. On GPUs spans include launch gaps.",
    ),
    (
        "Busy, waits, utilization",
        "Of one stage and iteration: time in compute; time blocked on input and output; busy over duration.",
    ),
    (
        "Host, a task",
        "What the worker's own loop takes around one task, neither compute nor waiting; median over iterations.",
    ),
    (
        "Replica",
        "One whole pipeline; several stand side by side, share the prompts out and hold the weights once each.",
    ),
    (
        "Peak memory",
        "The allocator's peak on GPUs; on CPU the peak resident set of the worker, Python and libraries included.",
    ),
    (
        "Confirmed",
        "Measured again in interleaved rounds after the search, beside the baseline. The best of many noisy numbers "
        "looks better than it is, so only a confirmed plan is called best where there are any.",
    ),
    (
        "Told apart, tie",
        "Finalists run in rounds until a one-sided t-test of the logarithms, with plans and rounds as blocks, tells "
        "the fastest from all others, with 1 chance in 20 over all looks to prefer one of two equal plans; or until "
        "all that are left are surely within 1 %, or the rounds are used up: a tie. Of tied plans measured within 1 % "
        "the one on fewer devices, then with less memory, is best.",
    ),
)
_KNEE = (
    "Knee",
    "Of a Pareto front: the plan farthest from the line, or plane, through the best of each objective, all scaled to "
    "the front's range.",
)
