"""Reports, exports, comparisons and histories of a study whose plans an engine ran: records of the fake host."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.record import Machine, Measurement, Record
from pipetune.tuner.cli import run
from tests.bench.engines.conftest import PROTOCOL, WORKLOAD, Make, make_plan
from tests.bench.engines.fake_host import STEP_S
from tests.study_factory import write_study

Study = Callable[..., Path]
PLANS = (make_plan(), make_plan(max_num_batched_tokens=128), make_plan((20, 10), enforce_eager=True))


@pytest.fixture
def study(make_engine: Make, tmp_path: Path) -> Study:
    """Writes a study of what a fake engine gives: baselines of two sizes, and plans, the second the fastest."""
    engine = make_engine()
    with Experiment.start(engine.model, engine.devices, start_fleet=lambda *_: engine) as experiment:
        records = [experiment.baseline(size, WORKLOAD, PROTOCOL, role="baseline") for size in (8, 16)]
        records += [experiment.measure(plan, WORKLOAD, PROTOCOL, role="trial") for plan in PLANS]
    # The fake is as fast whatever it runs.
    records = [_slower(record, 1.4 - 0.1 * place) for place, record in enumerate(records)]

    def write(name: str, *, last: int = len(records), machine: Machine | None = None) -> Path:
        numbered = [one.model_copy(update={"number": number}) for number, one in enumerate(records[:last])]
        own = machine or engine.machine
        return write_study(tmp_path / name, numbered, machine=own, workload=WORKLOAD, devices=engine.devices)

    return write


def _slower(record: Record, factor: float) -> Record:
    assert isinstance(record.result, Measurement)
    runs = [run.model_copy(update={"duration_s": factor * run.duration_s}) for run in record.result.iterations]
    result = record.result.model_copy(update={"iterations": tuple(runs)})
    return record.model_copy(update={"result": result, "trial_number": 0 if record.role == "trial" else None})


def said(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def test_a_report_shows_the_engines_settings_in_place_of_micro_batches(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study("night")
    screen = said(capsys, "report", folder)
    assert max(map(len, screen.splitlines())) <= 80
    assert re.search(r"# +plan +budget +seqs", screen), screen
    assert re.search(r"^ *1\S* +20\+10 eager +256 +64 .*~1\.30×", screen, re.MULTILINE), screen
    assert re.search(r"^ *PP=1 +16 ", screen, re.MULTILINE), screen
    assert "vLLM un-pipelined, 16 sequences at once" in screen
    page = (folder / "report.html").read_text(encoding="utf-8")
    for text in (screen, page, (folder / "ranking.md").read_text(encoding="utf-8")):
        assert not re.search("micro-batch 1\\b|device_map below|Hugging Face generate|our runtime on", text)
    assert "VLLM_PP_LAYER_PARTITION=20,10" in page
    assert "Measured on vLLM 0.32.0 on workstation" in page
    header, *lines = (folder / "ranking.csv").read_text(encoding="utf-8").splitlines()
    place = header.split(",").index("engine")
    assert [line.split(",")[place] for line in lines[:2]] == [
        "vllm · budget 256 · seqs 64 · KV 64MiB · eager",
        "vllm · budget 128 · seqs 64 · KV 64MiB",
    ]


def test_an_export_is_how_vllm_was_started(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    folder = study("night")
    text = said(capsys, "export", folder, "--format", "vllm")
    remarks, command = text.splitlines()[:2], text.partition("\nVLLM")[2]
    assert remarks[0].startswith("# Measured on vLLM 0.32.0 on workstation (Example CPU @ 2.50GHz, 2 cores)")
    words = shlex.split(f"VLLM{command}".replace("\\\n", ""))
    assert words[:5] == [
        "VLLM_PP_LAYER_PARTITION=20,10",
        "VLLM_CPU_OMP_THREADS_BIND=0|1",
        *("vllm", "serve"),
        words[4],
    ]
    flags = words[5:]
    assert flags[:8] == [
        *("--pipeline-parallel-size", "2", "--max-num-batched-tokens", "256", "--max-num-seqs", "64"),
        *("--kv-cache-memory-bytes", str(64 * 2**20)),
    ]
    # vLLM's own eager mode fails on CPUs over several stages.
    assert "--enforce-eager" not in flags
    assert flags[flags.index("--max-model-len") + 1] == str(8 + 4 + 1)
    assert flags[-3:] == ["--no-enable-prefix-caching", "--compilation-config", '{"mode": 2, "backend": "eager"}']
    text = said(capsys, "export", folder, "--format", "vllm-yaml")
    settings = yaml.safe_load(text)
    assert "# VLLM_PP_LAYER_PARTITION=20,10 VLLM_CPU_OMP_THREADS_BIND='0|1' vllm serve --config FILE.yaml" in text
    given = [str(settings.pop("model"))]
    for name, value in settings.items():
        told = json.dumps(value) if isinstance(value, dict) else str(value)
        given += [f"--{name}"] if value is True else [f"--{name}", told]
    assert given == words[4:]
    assert "Not measured on SGLang" in said(capsys, "export", folder, "--format", "sglang")


def test_engines_of_unlike_settings_are_compared_as_unlike_plans(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    both = json.loads(said(capsys, "compare", study("a", last=4), study("b"), "--json"))
    assert [one["text"] for one in both["plans"]] == [
        "16+14 · vllm · budget 128 · seqs 64 · KV 64MiB",
        "16+14 · vllm · budget 256 · seqs 64 · KV 64MiB",
    ]
    screen = said(capsys, "compare", study("c", last=4), study("d"))
    assert max(map(len, screen.splitlines())) <= 80
    assert "device_map" not in screen
    assert "budget 128" in screen


def test_a_history_names_the_engine_and_its_version(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    places = [study(f"night{index}") for index in range(3)]
    found = json.loads(said(capsys, "history", *places, "--json"))
    (question,) = found["questions"]
    assert " · by vLLM" in question["title"]
    assert {one["subject"] for one in question["series"]} == {"best plan", "PP=1"}
    assert all("engine's vllm 0.32.0" in night["software"] for night in question["nights"])
    speeds = next(one for one in question["series"] if one["metric"] == "output_throughput")
    assert speeds["values"] == pytest.approx([20 / (4 * STEP_S)] * 3)
