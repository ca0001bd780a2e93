"""A rollout from one stubbed GPU to two: a worker on the CPU reads the model that GPUs were profiled with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipetune.tuner.cli import run
from tests.rehearsal.conftest import IS_WHOLE, UseMachine
from tests.rehearsal.fleets import tiny_model
from tests.rehearsal.stub.machine import StubMachine

WORK = (
    *("--num-prompts", "4", "--input-len", "8", "--output-len", "4", "--num-iters", "1", "--num-iters-warmup", "1"),
    *("--n-trials", "1", "--finalists", "0", "--baseline-batch-sizes", "4", "--micro-batch-sizes", "2"),
    *("--top", "1", "--rounds", "1", "--max-minutes", "0", "--no-progress"),
)


@pytest.mark.skipif(not IS_WHOLE, reason="minutes: `make gpu-rehearsal` runs it")
@pytest.mark.timeout(600)
def test_a_rollout_predicts_and_measures_more_gpus(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(2))
    model, out = tiny_model(tmp_path, "llama").name, tmp_path / "out"
    code = run(["rollout", "--model", model, "--fleet", "cuda:0", "--fleet", "cuda:0-1", *WORK, "-o", str(out)])
    assert code in (0, 3)
    (fleet,) = json.loads((out / "rollout.json").read_text(encoding="utf-8"))["fleets"]
    assert [len(one["measured"]) for one in fleet["tried"]] == [1]
    assert fleet["made_from"].startswith("the profile of cuda:0, ")
