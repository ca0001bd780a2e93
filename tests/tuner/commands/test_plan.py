"""`plan` from outside: ranked predictions, their source, a file that `bench` runs, refusals; nothing is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetune.bench.files import write_durably
from pipetune.bench.spec import EffectivePlan
from pipetune.tuner.cli import run
from pipetune.tuner.study.plan_file import read_plan
from tests.study_factory import make_profile
from tests.tiny_models import save_tiny_model, tiny_config

pytestmark = pytest.mark.e2e

DEVICES = """
about: made up
devices:
  - {name: cuda:0-1, memory_gib: 8, tflops: 1, memory_gb_per_s: 100, layer_overhead_us: 10}
  - {name: cuda:2, like: cuda:0, speed: 0.5, memory_gib: 4}
links: [{between: any, gb_per_s: 10, latency_us: 5}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "shape-only"
    tiny_config("qwen3", 6).save_pretrained(folder)
    return folder


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    path = tmp_path / "devices.yaml"
    path.write_text(DEVICES)
    return path


def plan(*args: object) -> int:
    return run(["plan", *map(str, args), "--no-progress", "--num-prompts", "8", "--input-len", "32"])


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_devices_that_are_not_here_are_planned_for(
    model: Path, devices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = tmp_path / "plans" / "plan.json"
    args = ("--model", model, "--load-format", "dummy", "--device-file", devices, "--output-len", "8")
    assert plan(*args, "--json", "-o", best) == 0
    document = printed(capsys)
    assert document["predicted_from"]["kind"] == "described"
    assert "made up" in document["predicted_from"]["text"]
    assert document["device_bytes"]["cuda:2"] == 4 * 2**30
    first, *others = document["plans"]
    assert len(others) == 9
    for one in (first, *others):
        assert one["metrics"]["output_throughput"] <= first["metrics"]["output_throughput"]
        assert one["ideal_s"] <= one["bound_s"] * (1 + 1e-9)
        assert one["bound_s"] <= one["duration_s"] * (1 + 1e-9)
        assert one["bound_s"] == pytest.approx(one["stages"][one["limiting_stage"]]["busy_s"])
        EffectivePlan.model_validate({"plan": one["plan"], "in_flight": one["in_flight"]})
        for stage in one["stages"]:
            parts = stage["weights_bytes"] + stage["kv_bytes"] + stage["activation_bytes"]
            assert stage["total_bytes"] == parts
            assert parts <= stage["cap_bytes"]
    written = read_plan(best)
    assert written.plan.model_dump(mode="json") == first["plan"]
    assert written.metrics == {}, "nothing was measured"
    assert written.predicted == first["metrics"]
    assert written.predicted_from == document["predicted_from"]["text"]


def test_the_table_fits_80_columns_and_says_that_nothing_was_run(
    model: Path, devices: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    args = ("--model", model, "--load-format", "dummy", "--device-file", devices, "--top", "3")
    assert plan(*args, "--constraint", "mean_ttft_ms<=1e-6") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith("Predictions: nothing was run.")
    assert "cuda:0-1 of 8 GiB, cuda:2 of 4 GiB" in text
    assert "limits: busy for" in text
    assert "no plan is predicted to keep all constraints" in text


def test_plans_are_ranked_by_the_rate_that_they_sustain(
    model: Path, devices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--model", model, "--load-format", "dummy", "--device-file", devices, "--output-len", "8", "--top", "3")
    limits = ("--request-rate", "200", "--goodput", "ttft:5", "tpot:1", "--micro-batch-sizes", "4", "--max-stages", "2")
    best = tmp_path / "plan.json"
    assert plan(*args, *limits, "--json", "-o", best) == 0
    document = printed(capsys)
    assert document["objective"] == "max_request_rate"
    rates = [one["metrics"]["max_request_rate"] for one in document["plans"]]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 3
    for one in document["plans"]:
        metrics = one["metrics"]
        assert 0 <= metrics["slo_attainment"] <= 1
        assert (metrics["slo_attainment"] >= 0.9) == (metrics["max_request_rate"] >= 200 * 0.98)
        assert metrics["request_goodput"] <= metrics["request_throughput"] + 1e-9
        assert one["plan"]["max_in_flight"] >= one["in_flight"]
    # A batch is what can be measured of it.
    workload = read_plan(best).workload
    assert workload is not None
    assert workload.arrivals is None
    assert plan(*args, *limits) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "200 requests/s" in told
    # Lanes of which one has a slot of its own do not fit where there is one.
    assert plan(*args, *limits, "--input-len", "20", "--num-prompts", "24", "--random-range-ratio", "0.9") == 0


def test_a_trace_says_when_requests_come_and_how_long_they_are(
    model: Path, devices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "burst.csv"
    rows = "".join(f"{number // 4},m,{20 + number},{3 * (number % 5)},0,log\n" for number in range(40))
    trace.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n" + rows)
    args = ("--model", model, "--load-format", "dummy", "--device-file", devices, "--json", "--trace", trace)
    assert plan(*args, "--time-scale", "0.1") == 0
    document = printed(capsys)
    assert document["objective"] == "p90_e2el_ms"
    assert document["notes"] == [
        "simulated with 32 requests",
        "8 requests of the trace had failed when it was recorded, and are left out",
    ]
    trace.write_text('{"timestamp": 0, "prompt": "text"}\n')
    assert plan(*args) == 2
    assert "burst.csv:1: has no input_length" in capsys.readouterr().err


def test_nominal_rates_say_how_to_get_better_ones(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", model, "--load-format", "dummy", "--devices", "cpu:0-1", "--no-profile", "--top", "1")
    assert plan(*args, "--dtype", "bf16", "--attention", "eager", "--json", "--workload-kind", "score") == 0
    document = printed(capsys)
    assert document["predicted_from"]["kind"] == "nominal"
    assert document["predicted_from"]["way_out"].startswith(
        f"`pipetune profile --model {model} --devices cpu:0,cpu:1 --dtype bfloat16 --load-format dummy "
        "--attention eager`"
    )
    assert document["objective"] == "total_token_throughput"


def test_what_lacks_is_said_where_nothing_fits(model: Path, devices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices.write_text(DEVICES.replace("memory_gib: 8", "memory_gib: 0.0001").replace("memory_gib: 4", ""))
    assert plan("--model", model, "--load-format", "dummy", "--device-file", devices) == 3
    assert "no plan fits into memory; the nearest one: stage 0 on cuda:0 needs" in capsys.readouterr().err


def test_another_models_profile_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    write_durably(path, make_profile().model_dump_json())
    args = ("--model", model, "--load-format", "dummy", "--devices", "cpu:0-1")
    assert plan(*args, "--profile", path) == 2
    assert f"--profile {path}: it is of" in capsys.readouterr().err
    assert plan(*args, "--profile", path, "--no-profile") == 2
    assert "predict from what?" in capsys.readouterr().err


def test_bench_runs_what_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = save_tiny_model(tmp_path / "model", "qwen3", 5), tmp_path / "plan.json"
    assert plan("--model", model, "--devices", "cpu:0-1", "--output-len", "3", "--top", "1", "-o", path) == 0
    planned = read_plan(path)
    capsys.readouterr()
    short = ("--num-iters", "1", "--num-iters-warmup", "1")
    assert run(["bench", "--plan", str(path), *short, "--json", "--no-progress"]) == 0
    document = printed(capsys)
    assert document["plan"] == planned.plan.model_dump(mode="json")
    assert document["in_flight"] == planned.in_flight
    assert document["metrics"]["output_throughput"] > 0
