"""`doctor --model` with real workers: what it says of a model, of one without weights, and of one that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipetune.tuner.cli import run
from tests.bench.models.model_configs import model_config

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
