"""What `bench` measured in the forms of others: Markdown, rows, vLLM's result, and github-action-benchmark's."""

import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from pipetune.bench import metrics
from pipetune.bench.record import Measurement
from pipetune.tuner.commands.bench import BenchResult
from pipetune.tuner.commands.bench_document import document_of
from pipetune.tuner.report.render.csv import render_csv
from pipetune.tuner.report.render.markdown import render_markdown

_LATENCIES = tuple(f"{of}_{name}_ms" for name in ("ttft", "tpot", "e2el") for of in ("mean", "median", "p99"))


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
    "github": lambda row: _github(row, ("output_throughput", "total_token_throughput"), "tok/s"),
    "github-latency": lambda row: _github(row, _LATENCIES, "ms"),
}


def render(result: BenchResult, form: str) -> str:
    """A measurement in one of these forms, or as Markdown; a failure is Markdown."""
    if form == "md" or not isinstance(result.outcome, Measurement):
        return render_markdown(document_of(result))
    return FORMATS[form](_row(result, result.outcome))
