"""A search over stubbed GPUs from start to report: unlike ones that CUDA would put in another order; one is lost."""

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
    *("--memory-fractions", "0.9", "--baseline-batch-sizes", "4", "--finalists", "0"),
    *("--no-profile", "--no-progress"),
)
SLOW = StubGpu(name="NVIDIA A10", uuid="GPU-slow", speed=1, memory_bytes=24 * GIB)
FAST = StubGpu(name="NVIDIA H100 80GB HBM3", uuid="GPU-fast", speed=9)
LOSES_ONE = """
import os
from pathlib import Path

from tests.rehearsal.stub.machine import StubMachine

iterate, runs = module.PlanRun._iterate, []


def breaking(run, *given):
    if run.host.rank == 1 and run.host.index is not None:
        runs.append(run)
    if len(runs) == 2:
        StubMachine.read().altered(1, fault="unspecified launch failure").write(Path(os.environ["PIPETUNE_STUB_GPUS"]))
    return iterate(run, *given)


module.PlanRun._iterate = breaking
"""
"""The second plan on a GPU breaks it, and it stays broken."""


@pytest.mark.timeout(280)
def test_tune_ends_in_a_report_after_a_gpu_was_lost(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine(gpus=(SLOW, FAST)), {"pipetune.bench.worker.plan_run": LOSES_ONE})
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
    piped = [run for run in runs if run.get("transport") == "nccl"]
    assert piped
    assert not [note for run in piped for note in run["notes"] if note.startswith("cuda_graphs")]
    machine = json.loads((study / "machine.json").read_text())
    # By the bus for NVML and workers alike, whatever is fastest.
    assert [gpu["name"] for gpu in machine["hardware"]["gpus"]] == [SLOW.name, FAST.name]
    caps = {stage["device"]: stage["cap_bytes"] for run in piped for stage in run["memory"]}
    assert caps["cuda:0"] < 24 * GIB < caps["cuda:1"]
    lost = [run for run in runs if run["outcome"] == "failure"]
    assert [(run["kind"], run["device"], run["phase"]) for run in lost] == [
        *(("worker_died", "cuda:1", "measure"), ("worker_died", "cuda:1", "start"))
    ]
    (loss,) = json.loads((study / "losses.json").read_text())["losses"]
    after = [record for record in records if record["number"] >= loss["first_record"]]
    assert {record["role"] for record in after} >= {"baseline", "single_stage"}
    assert not any("cuda:1" in json.dumps(record["spec"]["plan"]) for record in after if record["spec"])
    assert "cuda:1 was lost twice" in done.stdout
    assert "launch" in next(study.glob("*.html")).read_text()
