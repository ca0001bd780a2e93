"""A search over stubbed GPUs from start to report, unlike ones that CUDA by itself would put in another order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal.conftest import UseMachine
from tests.rehearsal.fleets import tiny_model
from tests.rehearsal.stub.machine import GIB, StubGpu, StubMachine

WORK = (
    *("--num-prompts", "4", "--input-len", "10", "--output-len", "4", "--num-iters", "1", "--num-iters-warmup", "1"),
    *("--n-trials", "2", "--micro-batch-sizes", "2", "--prefill-micro-batch-sizes", "2", "--replicas", "1"),
    *("--memory-fractions", "0.9", "--baseline-batch-sizes", "4", "--finalists", "1", "--finalist-rounds", "1"),
    *("--max-finalist-rounds", "1", "--min-stages", "2", "--no-profile", "--no-progress"),
)
SLOW = StubGpu(name="NVIDIA A10", uuid="GPU-slow", speed=1, memory_bytes=24 * GIB)
FAST = StubGpu(name="NVIDIA H100 80GB HBM3", uuid="GPU-fast", speed=9)


@pytest.mark.timeout(280)
def test_tune_ends_in_a_report(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine(gpus=(SLOW, FAST)))
    study = tmp_path / "study"
    command = (sys.executable, "-m", "pipetune", "tune", "--model", tiny_model(tmp_path, "llama").name)
    done = subprocess.run(
        [*command, "--devices", "auto", *WORK, "-o", str(study)],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    records = [json.loads(path.read_text()) for path in sorted((study / "records").glob("*.json"))]
    runs = [record["result"] for record in records]
    assert {run["outcome"] for run in runs} == {"measurement"}, runs
    piped = [run for run in runs if run.get("transport") == "nccl"]
    assert piped
    assert not [note for run in piped for note in run["notes"] if note.startswith("cuda_graphs")]
    machine = json.loads((study / "machine.json").read_text())
    # By the bus for NVML and workers alike, whatever is fastest.
    assert [gpu["name"] for gpu in machine["hardware"]["gpus"]] == [SLOW.name, FAST.name]
    caps = {stage["device"]: stage["cap_bytes"] for run in piped for stage in run["memory"]}
    assert caps["cuda:0"] < 24 * GIB < caps["cuda:1"]
    assert "launch" in next(study.glob("*.html")).read_text()
