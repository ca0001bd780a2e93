"""`doctor --model` with real workers: what it says of a model, of one without weights, and of one that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetune.tuner.cli import run
from tests import nvml_stub
from tests.bench.models.model_configs import model_config
from tests.hooks import break_workers

LINKS = "links: [{between: any, gb_per_s: 10, latency_us: 5}]\n"
DEVICES = ("--devices", "cpu:0-1", "--no-progress")


def doctor(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    code = run(["doctor", *map(str, args), *DEVICES])
    return code, capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit code, checks by name, model_fit."""
    code, out = doctor(capsys, *args, "--json")
    values = json.loads(out)
    assert values["exit_code"] == code
    return code, {check["name"]: check for check in values["checks"]}, values["anatomy"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config alone, of layers that share keys and values."""
    model_config("gemma4_text").save_pretrained(tmp_path)
    return tmp_path


def test_a_config_alone_is_described_with_dummy_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--load-format", "dummy", "--dtype", "bfloat16", "--input-len", "32", "--micro-batch-size", "5")
    code, checks, model_fit = document(capsys, "--model", folder, *job)
    assert code == 0
    assert {check["verdict"] for check in checks.values()} <= {"ok", "warning"}
    assert model_fit["shape"]["dtype_bytes"] == 2
    assert model_fit["cuts"] == [1, 2]
    assert [group["kind"] for group in model_fit["groups"]][:2] == ["sliding_attention", "full_attention"]
    fit = model_fit["fit"]
    assert (fit["micro_batch_size"], fit["prompt_len"], fit["output_len"], len(fit["stages"])) == (5, 32, 16, 2)
    assert fit["in_flight"] == 7
    assert any("cuts before layers 3-5" in text for text in model_fit["refused"])


def test_missing_weights_are_a_fault_and_the_model_is_described_all_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = doctor(capsys, "--model", folder, "--input-len", "60")
    assert code == 2
    said = " ".join(out.split())
    assert "holds no model.safetensors; for random weights from its config.json alone say --load-format dummy" in said
    assert "more than the model's 64 positions" in said
    assert "Split " in said
    assert out.rstrip().splitlines()[-1].startswith("Verdict: not ready: weights, workload")


def test_a_family_that_cannot_be_split_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cpmant"}))
    code, checks, model_fit = document(capsys, "--model", tmp_path, "--load-format", "dummy")
    assert code == 2
    assert checks["model"]["verdict"] == "failed"
    assert "'cpmant' cannot be split over devices: " in checks["model"]["text"]
    assert model_fit is None


def test_a_model_that_fits_nowhere_is_nothing_feasible(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--load-format", "dummy", "--input-len", "32", "--memory-fraction", "0.00001")
    code, checks, model_fit = document(capsys, "--model", folder, *job)
    assert code == 3
    assert checks["fit"]["text"].startswith("not even one micro-batch fits: ")
    assert model_fit["fit"]["in_flight"] == 0


@pytest.mark.parametrize("cards", [True, False])
def test_a_model_is_fitted_onto_devices_that_are_only_described(
    cards: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text(
        "devices: [{name: cuda:0-1, card: A10}, {name: cuda:2, card: T4, memory_gib: 3}]\n" + LINKS, encoding="utf-8"
    )
    given = "2xA10,1xT4" if cards else str(file)
    job = ("--model", "examples/dummy-llama-12l", "--load-format", "dummy", "--device-file", given, "--no-progress")
    assert run(["doctor", *job, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [stage["device"] for stage in values["anatomy"]["fit"]["stages"]] == ["cuda:0", "cuda:1", "cuda:2"]
    caps = [stage["cap_bytes"] for stage in values["anatomy"]["fit"]["stages"]]
    assert caps == [int(0.9 * gib * 2**30) for gib in (22.5, 22.5, 15 if cards else 3)]
    assert "workers" not in {check["name"] for check in values["checks"]}
    command = values["next_command"].split()
    assert command[:2] == ["pipetune", "plan"]
    assert run([*command[1:], "--no-progress", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"]


def test_described_devices_want_a_model_and_known_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--device-file", "2xA10"]) == 2
    assert "name what is to fit by --model" in capsys.readouterr().err
    assert run(["doctor", "--model", "m", "--device-file", "2xA11"]) == 2
    assert "'A11' is no card that is known here; there are V100-32GB, T4, " in capsys.readouterr().err


def test_the_last_lines_are_a_verdict_and_what_to_type_next(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--model", folder, "--load-format", "dummy", "--dtype", "bfloat16", "--input-len", "32")
    code, out = doctor(capsys, *job)
    assert code == 0
    command = " ".join(out.split()).rpartition("Verdict: ready")[2]
    assert command.endswith(
        f"pipetune tune --model {folder} --devices cpu:0,cpu:1 --dtype bfloat16 --load-format dummy"
    )


@pytest.mark.parametrize(
    ("visible", "row"),
    [
        ("MIG-GPU-bb22/7/0", "NVIDIA A100-SXM4-40GB MIG 1g.5gb, 5 GiB"),
        ("MIG-5c", "not known, memory not known"),
    ],
)
def test_mig_instances_are_looked_at_as_gpus(
    visible: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = "SPLIT" if "/" in visible else "BLIND"
    # The workers read the machine, the driver what `auto` takes.
    body = f"    from tests import nvml_stub\n    nvml_stub.install([nvml_stub.{gpu}])\n"
    break_workers(tmp_path / "hook", monkeypatch, target="pynvml", body=body)
    nvml_stub.install([getattr(nvml_stub, gpu)], monkeypatch.setattr)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    code, checks, _ = document(capsys)
    assert code == 0
    assert checks["devices"]["text"] == "auto takes cuda:0"
    assert checks["cuda:0"]["text"] == row
