"""The doctor on stubbed GPUs: those that `CUDA_VISIBLE_DEVICES` leaves, as the workers find them, and what is wrong."""

from __future__ import annotations

import json
import re

import pynvml
import pytest

from pipetune.tuner.cli import run
from tests.rehearsal.conftest import UseMachine
from tests.rehearsal.stub.machine import GIB, StubGpu, StubMachine

A10 = StubGpu(
    name="NVIDIA A10",
    uuid="GPU-slow",
    memory_bytes=24 * GIB,
    throttle_mask=pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    foreign_pids=(1,),
)
H100 = StubGpu(uuid="GPU-fast", speed=9)
SPLIT = StubGpu(uuid="GPU-split", mig_uuids=("MIG-5c01", "MIG-5c02"))


@pytest.mark.parametrize(
    ("machine", "visible", "gpus", "memory"),
    [
        # By index 0 CUDA alone would mean the fastest, and then nothing, since that was named already.
        (StubMachine(gpus=(A10, H100)), "GPU-fast,0", [H100.name, A10.name], [79.0, 23.0]),
        (StubMachine(gpus=(H100, SPLIT)), "MIG-5c02", [f"{SPLIT.name} MIG 3g.40gb"], [39.0]),
    ],
)
def test_gpus_are_those_that_workers_claim(
    machine: StubMachine,
    visible: str,
    gpus: list[str],
    memory: list[float],
    use_machine: UseMachine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_machine(machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert run(["doctor", "--no-progress", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["pipeline"]["verdict"] == "ok"
    assert [checks[f"cuda:{index}"]["text"].partition(",")[0] for index in range(len(gpus))] == gpus
    # As each worker's CUDA tells it, beside names that NVML does.
    assert [float(size) for size in re.findall(r"cuda:\d ([\d.]+) GiB", checks["memory"]["text"])] == pytest.approx(
        memory, abs=0.5
    )
    load = checks["load"]["text"]
    told = ["cuda:1 was slowed down: thermal limit (software)" in load, "cuda:1 was shared with " in load]
    assert told == [A10.name in gpus] * 2
