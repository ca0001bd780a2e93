"""The GPU check as a command: skipped without a GPU, sections apart from each other, and what they write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipetune.bench.machine.hardware import read_machine
from pipetune.bench.models.resolve import resolve_model
from pipetune.bench.record import GpuInfo
from pipetune.bench.runtime.stage.stage import Stage
from pipetune.bench.spec import ModelSpec
from tests.evaluation.gpu import __main__ as check
from tests.evaluation.gpu import decode, equality
from tests.evaluation.gpu.context import Context, read_section
from tests.evaluation.gpu.models import SMALL, TINY, save_random_checkpoint
from tests.evaluation.gpu.section import SECTIONS
from tests.evaluation.gpu.values import Report
from tests.evaluation.harness import ROOT

LOOPBACK = {"NCCL_MNNVL_ENABLE": "0", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_is_content(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.evaluation.gpu", "-o", str(tmp_path / "gpu")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout == "gpu-check: skipped, since torch finds no NVIDIA GPU on this machine\n"
    assert not (tmp_path / "gpu").exists()


def test_an_unknown_section_is_a_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_of:
        check.main(["--only", "speed"])
    assert exit_of.value.code == 2
    assert "no such section; there are machine, equality-staged-fp32" in capsys.readouterr().err


def test_every_section_is_in_one_group() -> None:
    grouped = [name for group in check.GROUPS for name in group.names]
    assert sorted(grouped) == sorted(SECTIONS)


def test_a_machines_folder_and_its_share_of_work() -> None:
    machine = read_machine()
    gpu = GpuInfo(name="NVIDIA H200 (x/y)", memory_bytes=1, uuid="GPU-1")
    hardware = machine.hardware.model_copy(update={"gpus": (gpu, gpu)})
    assert check.machine_name(machine.model_copy(update={"hardware": hardware})) == "nvidia-h200-x-y-x2"
    assert check.parallel_sections(16, 139.0) == 5
    assert check.parallel_sections(16, 24.0) == 1
    assert check.parallel_sections(2, 139.0) == 1
    # On an H100 all sections that prove correctness have the group's whole time.
    assert check.parallel_sections(16, 79.6) == 5


@pytest.mark.e2e
@pytest.mark.skipif(torch.cuda.is_available(), reason="the section would not fail")
def test_a_section_that_breaks_is_reported_and_spoils_no_other(tmp_path: Path) -> None:
    run = check._Check(tmp_path / "gpu", read_machine(), 90.0, ("memory", "timing"))
    assert run.run() == 1
    report = Report.model_validate_json((tmp_path / "gpu" / "report.json").read_text())
    assert [section.name for section in report.sections] == ["memory", "timing"]
    assert {section.status for section in report.sections} == {"failed"}
    assert all(section.error and "cuda" in section.error.lower() for section in report.sections)
    assert "## timing" in (tmp_path / "gpu" / "report.md").read_text()
    assert (tmp_path / "gpu" / "work" / "timing.log").exists()


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    assert check._Check(tmp_path, read_machine(), 1.0, ("machine", "timing")).run() == 1
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert {section.status for section in report.sections} == {"out of time"}


def test_rows_are_on_disk_as_soon_as_they_are_known(tmp_path: Path) -> None:
    context = Context("machine", tmp_path, 60.0)
    context.row(what="copy bandwidth", value=4300.0)
    context.note("once")
    context.note("once")
    section = read_section(tmp_path, "machine")
    assert section is not None
    assert section.status == "running"
    assert section.rows == ({"what": "copy bandwidth", "value": 4300.0},)
    assert section.notes == ("once",)
    context.end()
    assert Context("timing", tmp_path, 60.0).of("machine") == read_section(tmp_path, "machine")


def test_the_random_checkpoint_loads(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path / "model", {**TINY["llama"], "model_type": "llama"}, "cpu")
    stage = Stage(resolve_model(ModelSpec(name=str(folder), dtype="bfloat16")), torch.device("cpu"))
    stage.assign(2, 5, is_first=False, is_last=False)
    norms = [parameter for name, parameter in stage.model.named_parameters() if "norm" in name]
    weights = [parameter for name, parameter in stage.model.named_parameters() if "proj" in name]
    assert norms
    assert weights
    assert all(bool((parameter == 1).all()) for parameter in norms)
    assert all(0.01 < parameter.float().std().item() < 0.03 for parameter in weights)


def test_an_old_nccl_takes_workers_on_one_gpu_for_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_MULTI_RANK_GPU_ENABLE", "NCCL_HOSTID"):
        monkeypatch.delenv(name, raising=False)
    # Restored behind the test, whatever is written meanwhile.
    for name, value in (("PYTHONPATH", str(ROOT)), *equality.nccl_environment().items(), *LOOPBACK.items()):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    assert equality._devices("nccl", tmp_path / "hooks") == ("cuda:0", "cuda:0")
    say = (
        "import os, pipetune.bench.runtime.wiring as wiring; print(os.environ['NCCL_HOSTID'], wiring.NCCL_SHARES_GPUS)"
    )
    said = {
        subprocess.run([sys.executable, "-c", say], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(said) == 2
    assert all(line.startswith("worker-") and line.endswith(" True\n") for line in said)


@pytest.mark.e2e
def test_families_are_compared_over_all_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "TINY", {"llama": TINY["llama"]})
    monkeypatch.setattr(equality, "_devices", lambda transport, hooks: ("cpu:0", "cpu:1"))
    context = Context("equality-staged-fp32", tmp_path, 200.0)
    equality.run(context, "float32", "host staging")
    context.end()
    section = read_section(tmp_path, "equality-staged-fp32")
    assert section is not None
    assert [(row["stages"], row["verdict"]) for row in section.rows] == [(1, "equal"), (2, "equal")]
    # A CPU captures nothing, and that is seen.
    assert [aim.is_met for aim in section.aims] == [True, False]


@pytest.mark.e2e
def test_ways_to_decode_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "hidden_size": 36, "vocab_size": 300}
    case = decode.Case(name="tiny", config=tiny, output_len=5, has_weights=False)
    monkeypatch.setattr(decode, "CASES", {"small": case})
    monkeypatch.setattr(decode, "DEVICES", ("cpu:0",))
    monkeypatch.setattr(decode, "BATCHES", (1, 3))
    monkeypatch.setitem(decode.LEFT_FOR_ONE_S, decode.COMPILED, 1e9)
    machine = Context("machine", tmp_path, 60.0)
    machine.row(what="copy bandwidth", value=10.0)
    machine.end()
    context = Context("decode-small", tmp_path, 200.0)
    decode.run(context, "small")
    context.end()
    section = read_section(tmp_path, "decode-small")
    assert section is not None
    ways = [
        (decode.GRAPHS, 1),
        (decode.GRAPHS, 3),
        (decode.HF, 1),
        (decode.HF, 3),
        (decode.EAGER, 1),
        (decode.EAGER, 3),
    ]
    assert [(row["how"], row["batch"]) for row in section.rows] == ways
    assert all(isinstance(row["step_ms"], float) and row["roofline"] for row in section.rows)
    assert [row["times_hf"] for row in section.rows[:4]] == [None, None, 1.0, 1.0]
    assert section.notes == tuple(f"out of time before graphs + compile at batch {batch}" for batch in (1, 3))
    assert len(section.aims) == 1
