"""What `bench` found: for people, for machines, and in the forms of others (vLLM, github-action-benchmark)."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipetune.bench import metrics
from pipetune.bench.record import Failure, FailureKind, Measurement, StageMemory
from pipetune.tuner.commands.bench import BenchResult, Comparison
from pipetune.tuner.commands.conclude import PLANS_FAULT
from pipetune.tuner.commands.sweep import sweep_table
from pipetune.tuner.progress import values_text
from pipetune.tuner.report import wording as w
from pipetune.tuner.report.data import host_us_a_task
from pipetune.tuner.report.document import GAP, Column, Document, Part, Table, Text, left, rows_of
from pipetune.tuner.report.lanes import lane_table
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.markdown import render_markdown

_RATES = ("output_throughput", "total_token_throughput")
_LATENCIES = tuple(f"{of}_{name}_ms" for name in ("ttft", "tpot", "e2el") for of in ("mean", "median", "p99"))
_MOST_SHOWN = 4
"""Stages whose times fit side by side."""


def exit_code(result: BenchResult) -> int:
    """0 with a measurement; 3 where the plan is at fault, 2 the model, 4 the machine or we."""
    if isinstance(result.outcome, Measurement):
        return 0
    if result.outcome.kind == FailureKind.UNSUPPORTED_MODEL:
        return 2
    return 3 if result.outcome.kind in PLANS_FAULT else 4


def json_of(result: BenchResult) -> dict[str, Any]:
    """For `--json`."""
    outcome = result.outcome
    values: dict[str, Any] = {
        "schema_version": 1,
        "exit_code": exit_code(result),
        "plan": result.plan.model_dump(mode="json"),
        "in_flight": result.in_flight,
        "metrics": None,
        "stages": None,
        "check": None,
        "notes": [],
        "failure": None,
        "sweep": [{"request_rate": rate, "metrics": metrics.derive(one)} for rate, one in result.sweep] or None,
        "tried_rates": [] if isinstance(outcome, Failure) else outcome.tried_rates,
        "comparison": result.comparison.model_dump(mode="json") if result.comparison else None,
    }
    if isinstance(outcome, Failure):
        return values | {"failure": outcome.model_dump(mode="json")}
    return values | {
        "metrics": metrics.derive(outcome),
        "stages": {**metrics.stage_metrics(outcome), "host_us_a_task": host_us_a_task(outcome)},
        "load_s": outcome.load_s,
        "check_s": outcome.check_s,
        "prepare_s": outcome.prepare_s,
        "check": outcome.check.model_dump(mode="json") if outcome.check else None,
        "notes": [*outcome.notes, *outcome.telemetry.disturbances],
    }


def document_of(result: BenchResult) -> Document:
    """For people, in 80 columns."""
    outcome = result.outcome
    if isinstance(outcome, Failure):
        return Document(parts=(Text(f"{result.plan.describe()}: {outcome.kind.value}: {outcome.message}"),))
    notes = (Text(f"note: {note}") for note in (*outcome.notes, *outcome.telemetry.disturbances))
    if result.comparison is not None:
        told = _comparison(result, result.comparison)
    else:
        told = _swept(result) if result.sweep else _one(result, outcome)
    return Document(parts=(*told, Text(_check_text(outcome)), *notes))


def _swept(result: BenchResult) -> Iterator[Part]:
    spec = result.spec
    assert spec is not None
    # Rates stand in the table.
    workload = spec.workload.model_copy(update={"arrivals": None})
    yield Text(f"{w.model_text(spec.model)} · {w.workload_text(workload, result.sweep[0][1].prompt_lens)}")
    yield Text(f"{result.plan.describe()} · {result.in_flight} in flight")
    yield GAP
    yield sweep_table(result.sweep)
    yield GAP


def _one(result: BenchResult, outcome: Measurement) -> Iterator[Part]:
    plan, derived = result.plan, metrics.derive(outcome)
    rates, spec, name = metrics.throughputs(outcome), result.spec, next(name for name in _RATES if name in derived)
    named = f"{w.model_text(spec.model)} · {w.workload_text(spec.workload, outcome.prompt_lens)} · " if spec else ""
    yield Text(f"{named}{len(rates)} iteration{'' if len(rates) == 1 else 's'}")
    yield Text(f"{plan.describe()} · {result.in_flight} in flight")
    sd = f" ± {w.number_text(statistics.stdev(rates))}" if len(rates) > 1 else ""
    yield Text(f"{derived[name]:.1f}{sd} tok/s · {values_text(derived, ['bubble_ratio'])}".removesuffix(" · "))
    yield GAP
    if outcome.is_under_arrivals:
        yield Text(_load_text(derived))
    if outcome.tried_rates:
        highest = f"{derived['max_request_rate']:.3g} requests/s" if "max_request_rate" in derived else "none"
        tried = ", ".join(f"{rate:g} ({w.percent_text(share)})" for rate, share in outcome.tried_rates)
        yield Text(f"highest rate sustained: {highest} · good requests at {tried}")
    named_ = {name: name.upper() for name in metrics.LATENCIES} | {"itl": "ITL", "client_queue_time": "CLIENT QUEUE"}
    latencies = {name: title for name, title in named_.items() if f"mean_{name}_ms" in derived}
    shown = ("mean", "median", "p99")
    times = [(title, *(w.ms_text(derived.get(f"{of}_{name}_ms")) for of in shown)) for name, title in latencies.items()]
    yield Table(columns=(left(""), *map(Column, shown)), rows=rows_of(times))
    yield GAP
    if plan.lanes and outcome.is_under_arrivals:
        yield lane_table(plan, outcome)
        yield GAP
    stages, host_us = metrics.stage_metrics(outcome), host_us_a_task(outcome)
    rows = []
    for index, device in enumerate(plan.devices):
        replica, own = divmod(index, len(plan.stages))
        memory = outcome.memory[index] if index < len(outcome.memory) else None
        name = f"{replica}.{own}" if plan.replicas > 1 else str(own)
        spent = (f"{stages[of][index] / 1e3:.2f} s" if stages else w.MISSING for of in ("stage_busy_ms", "comm_ms"))
        host = f"{host_us[index]:.0f} µs" if host_us else w.MISSING
        taken = w.bytes_text(memory.peak_bytes if memory else None), _of_cap_text(memory) if memory else w.MISSING
        rows.append((name, device, plan.stages[own].range_text, *spent, host, *taken))
    numbers = map(Column, ("busy", "waits", "host/task", "peak memory", "of its cap"))
    yield Table(columns=(*map(left, ("stage", "device", "layers")), *numbers), rows=rows_of(rows))
    if plan.replicas > 1:
        yield Text("stages are numbered replica.stage")
    yield Text(f"before the timed iterations: {w.steps_text(outcome)}")


def _load_text(derived: Mapping[str, float]) -> str:
    """`3.9 requests/s done · 0.8 good ones (92 %) · idle 3 % · noticed within 12 ms`."""
    parts = [f"{derived['request_throughput']:.2f} requests/s done"]
    if "request_goodput" in derived:
        parts.append(f"{derived['request_goodput']:.2f} good ones ({w.percent_text(derived['slo_attainment'])})")
    if "idle_ratio" in derived:
        parts.append(f"idle {w.percent_text(derived['idle_ratio'])}")
    return " · ".join((*parts, f"noticed within {w.ms_text(derived['arrival_lag_ms'])}"))


def _of_cap_text(memory: StageMemory) -> str:
    """`9 % of 3.6 GiB`: what the model takes, without what the process took before any was loaded."""
    share = (memory.peak_bytes - memory.baseline_bytes) / memory.cap_bytes
    return f"{w.percent_text(share)} of {w.bytes_text(memory.cap_bytes)}"


def _comparison(result: BenchResult, comparison: Comparison) -> Iterator[Part]:
    yield from (Text(f"{row.name}: {row.title}") for row in comparison.contenders)
    yield GAP
    generates = all(row.mean_ttft_ms is not None for row in comparison.contenders)
    rows = []
    for row in comparison.contenders:
        wait_ms = row.mean_ttft_ms if generates and row.mean_ttft_ms else row.mean_e2el_ms
        speeds = f"{row.throughput:.1f}", f"{row.iqr:.1f}", f"{row.ratio:.2f}"
        interval = w.MISSING if row.ratio_low is None else f"{row.ratio_low:.2f}–{row.ratio_high:.2f}"
        bubble = w.MISSING if row.bubble_ratio is None else f"{100 * row.bubble_ratio:.0f} %"
        rows.append((row.name, *speeds, interval, bubble, f"{wait_ms / 1e3:.2f} s", _busy_text(row.stage_busy_ms)))
    numbers = ("tok/s", "IQR", "×", "95 % interval", "bubble", "TTFT" if generates else "E2EL")
    busy = Column("busy/stage", wrap="narrow")
    yield Table(columns=(left("", "narrow"), *map(Column, numbers), busy), rows=rows_of(rows))
    yield GAP
    yield Text(
        f"Over {comparison.rounds} interleaved rounds in random order, their drift taken out; × is over the baseline."
    )
    if result.single_stage_missing:
        yield Text(f"Without our single stage: {result.single_stage_missing}")


def _busy_text(stage_busy_ms: Sequence[float]) -> str:
    """Seconds of each stage, or of very many the least and the largest."""
    if not stage_busy_ms:
        return w.MISSING
    shown = [f"{busy / 1e3:.2f}" for busy in stage_busy_ms]
    if len(shown) > _MOST_SHOWN:
        shown = [f"{min(stage_busy_ms) / 1e3:.2f}–{max(stage_busy_ms) / 1e3:.2f}"]
    return " ".join(shown) + " s"


def _check_text(outcome: Measurement) -> str:
    if (check := outcome.check) is None:
        return "output: not checked"
    tokens = {True: ", tokens equal", False: ", free-running tokens differ at near ties", None: ""}[check.tokens_equal]
    compared = w.compared_text(check, scored=outcome.output_len == 0)
    return f"output: as the {check.reference} model says, {compared}{tokens}"


def _row(result: BenchResult, outcome: Measurement) -> dict[str, Any]:
    """What ran and every metric, in one flat row; `…_sd` over the iterations."""
    spec, rates = result.spec, metrics.throughputs(outcome)
    arrivals = spec and spec.workload.arrivals
    load = arrivals.model_dump(include={"request_rate", "burstiness", "max_concurrency"}) if arrivals else {}
    return {
        "model": spec and spec.model.name,
        "dtype": spec and spec.model.dtype,
        "plan": result.plan.describe(),
        "devices": ",".join(result.plan.devices),
        "in_flight": result.in_flight,
        "num_prompts": len(outcome.prompt_lens),
        "input_tokens": sum(outcome.prompt_lens),
        "output_len": outcome.output_len,
        "output_tokens": sum(outcome.generated_lens),
        "iterations": len(rates),
        "throughput_sd": statistics.stdev(rates) if len(rates) > 1 else None,
        **load,
        **metrics.derive(outcome),
    }


def _vllm(row: Mapping[str, Any]) -> str:
    """The result that `vllm bench serve --save-result` writes."""
    values = {
        "backend": "pipetune",
        "model_id": row["model"],
        "num_prompts": row["num_prompts"],
        "completed": row["num_prompts"],
        "duration": row["duration_s"],
        "total_input_tokens": row["input_tokens"],
        "total_output_tokens": row["output_tokens"],
        "max_concurrency": None,
    }
    more = ("request_rate", "burstiness", "max_concurrency", "request_goodput")
    known = {name: row[name] for name in row if name in more or name.endswith(("_throughput", "_ms"))}
    return json.dumps(values | known) + "\n"


def _github(row: Mapping[str, Any], names: tuple[str, ...], unit: str) -> str:
    """Entries of `customBiggerIsBetter` for rates, of `customSmallerIsBetter` for latencies."""
    name, extra = f"{row['model']} · {row['plan']}", f"{row['num_prompts']} prompts, {row['iterations']} iterations"
    entries = [
        {"name": f"{name} · {key}", "unit": unit, "value": row[key], "extra": extra} for key in names if key in row
    ]
    if unit != "ms" and row["throughput_sd"] is not None:
        # Of the rate that iterations give, which stands first.
        entries[0]["range"] = f"± {row['throughput_sd']:.3g}"
    return json.dumps(entries, indent=1, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "csv": lambda row: render_csv(tuple(row), [row]),
    "jsonl": lambda row: json.dumps(row, ensure_ascii=False) + "\n",
    "vllm": _vllm,
    "github": lambda row: _github(row, _RATES, "tok/s"),
    "github-latency": lambda row: _github(row, _LATENCIES, "ms"),
}


def render(result: BenchResult, form: str) -> str:
    """A measurement in one of these forms, or as Markdown; a failure is Markdown."""
    if form == "md" or not isinstance(result.outcome, Measurement):
        return render_markdown(document_of(result))
    return FORMATS[form](_row(result, result.outcome))
