"""A measurement in the forms of others: every value is the record's own, and each form is what its readers take."""

from __future__ import annotations

import csv
import io
import json
import statistics
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from pipetune.bench import metrics
from pipetune.bench.record import FailureKind, Measurement
from pipetune.tuner.commands.bench import BenchResult
from pipetune.tuner.commands.bench_document import FORMATS, document_of, render
from pipetune.tuner.report.render.rich import render_rich
from tests.record_factory import MODEL, WORKLOAD, make_failure, make_measurement, make_plan, make_record

PLAN = make_plan((17, 13), 8)
OUTCOME = make_measurement(PLAN)
RESULT = BenchResult(plan=PLAN, outcome=OUTCOME, in_flight=2, records=(make_record(0, "bench", PLAN, OUTCOME),))
DERIVED = metrics.derive(OUTCOME)


def test_rows_hold_every_metric_and_what_ran() -> None:
    (cells,) = csv.DictReader(io.StringIO(render(RESULT, "csv")))
    row = json.loads(render(RESULT, "jsonl"))
    assert cells.keys() == row.keys() >= DERIVED.keys()
    assert (row["model"], row["plan"], row["num_prompts"]) == (MODEL.name, PLAN.describe(), WORKLOAD.num_prompts)
    assert row["iterations"] == len(OUTCOME.iterations)
    assert row["throughput_sd"] == pytest.approx(statistics.stdev(metrics.throughputs(OUTCOME)))
    assert float(cells["output_throughput"]) == row["output_throughput"] == DERIVED["output_throughput"]


def test_vllms_result_has_its_names() -> None:
    values = json.loads(render(RESULT, "vllm"))
    assert values["completed"] == values["num_prompts"] == WORKLOAD.num_prompts
    assert values["total_input_tokens"] == sum(OUTCOME.prompt_lens)
    assert values["total_output_tokens"] == WORKLOAD.num_prompts * OUTCOME.output_len
    assert values["duration"] == DERIVED["duration_s"]
    for name in ("request_throughput", "output_throughput", "total_token_throughput", "mean_ttft_ms", "median_tpot_ms"):
        assert values[name] == DERIVED[name]


@pytest.mark.parametrize(
    ("form", "unit", "first"), [("github", "tok/s", "output_throughput"), ("github-latency", "ms", "mean_ttft_ms")]
)
def test_github_action_benchmark_takes_entries_of_one_direction(form: str, unit: str, first: str) -> None:
    entries: list[dict[str, Any]] = json.loads(render(RESULT, form))
    for entry in entries:
        assert {"name", "unit", "value"} <= entry.keys()
        assert entry["unit"] == unit
        metric = entry["name"].rpartition(" · ")[2]
        assert entry["value"] == DERIVED[metric]
        assert (metric in metrics.HIGHER_IS_BETTER) == (form == "github")
    assert entries[0]["name"] == f"{MODEL.name} · {PLAN.describe()} · {first}"
    # The spread over iterations is that of the rate which they give.
    assert ["range" in entry for entry in entries] == [form == "github"] + [False] * (len(entries) - 1)


def test_people_see_workload_iterations_and_aligned_times() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_rich(document_of(RESULT)))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for told in (
        f"{WORKLOAD.num_prompts} random prompts",
        f"{len(OUTCOME.iterations)} iterations",
        " ± ",
        "mean median p99",
    ):
        assert told in " ".join(shown.split()) or told in shown
    assert max(map(len, shown.splitlines())) <= 80
    page = MarkdownIt("commonmark").enable("table").render(render(RESULT, "md"))
    assert page.count("<table>") == 2


def test_a_failure_is_told_in_any_form() -> None:
    failed = BenchResult(plan=PLAN, outcome=make_failure(FailureKind.OUT_OF_MEMORY))
    assert not isinstance(failed.outcome, Measurement)
    for form in FORMATS:
        assert "out_of_memory" in render(failed, form).replace("\\", "")
