"""Real processes: sides that run, that break, that hang and that are interrupted; none leaves a process behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipetune.bench.errors import ConfigError, PlanError
from pipetune.bench.files import scratch_folder
from pipetune.bench.record import FailureKind
from pipetune.bench.spec import ModelSpec, Plan, Protocol, Workload
from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.python_env import Interpreter
from pipetune.tuner.gate.runners import FreshProcesses, RunningFleet, run_fresh
from pipetune.tuner.gate.values import SIDES, Case, Side, SideName
from tests.bench.engines.conftest import fake_python, make_plan
from tests.hooks import write_hook
from tests.tiny_models import save_tiny_model

DEVICES = ("cpu:0", "cpu:1")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(name=str(save_tiny_model(tmp_path_factory.mktemp("model"), "llama", 4)))


def make_case(model: ModelSpec, counts: tuple[int, ...] = (1, 3), env: dict[str, str] | None = None) -> Case:
    def side(name: SideName, layers: tuple[int, ...], variables: dict[str, str]) -> Side:
        plan = Plan.from_layer_counts(layers, DEVICES, 2)
        return Side(name=name, model=model, plan=plan, devices=DEVICES, env=variables)

    return Case(
        name="tiny",
        workload=Workload(num_prompts=4, input_len=8, output_len=3),
        protocol=Protocol(num_iters=1, num_iters_warmup=0),
        baseline=side("baseline", (2, 2), {}),
        candidate=side("candidate", counts, env or {}),
        metrics={"output_throughput": Tolerance()},
    )


def hook(folder: Path, body: str) -> dict[str, str]:
    """A variable that breaks whatever it is given to; pipetune's own place on the path is the gate's business."""
    write_hook(folder, target="pipetune.bench.runtime.stage.stage", body=body)
    return {"PYTHONPATH": str(folder)}


def processes_with(mark: str) -> list[str]:
    """Command lines of live processes whose environment or arguments hold the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_both_sides_run_in_processes_of_their_own_and_say_what_they_run_on(
    model: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPETUNE_NUM_PROMPTS", "3")
    case = make_case(model)
    with FreshProcesses((case,)) as runner:
        machine = runner.prepare(math.inf)["candidate"]
        sample = runner.run(case, "candidate", check=True)
    assert sample.failure is None
    assert sample.checked
    assert runner.cannot_see == ()
    assert machine is not None
    assert sample.hardware_id == machine.hardware.hardware_id
    assert sample.metrics["output_throughput"] > 0
    # 4 prompts, whatever the environment says.
    assert len(sample.durations_s) == 1
    assert sample.metrics["output_throughput"] * sample.durations_s[0] == pytest.approx(12)


def test_sides_of_an_engine_run_under_its_python_and_show_its_version(
    model: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_HOST", json.dumps({"told": str(tmp_path / "told")}))
    python, budgets = str(fake_python(tmp_path / "python")), {"baseline": 256, "candidate": 128}
    case = make_case(model)
    sides: dict[str, Side] = {
        name: case.side(name).model_copy(
            update={"plan": make_plan((2, 2), max_num_batched_tokens=budgets[name]), "engine_python": python}
        )
        for name in SIDES
    }
    case = case.model_copy(update=sides)
    with FreshProcesses((case,)) as runner:
        machines = runner.prepare(math.inf)
        samples = [runner.run(case, name, check=False) for name in SIDES]
    assert [sample.failure or sample.not_comparable for sample in samples] == [None, None]
    assert all(sample.metrics["median_itl_ms"] > 0 for sample in samples)
    for machine in machines.values():
        assert machine is not None
        assert machine.software.packages["engine's vllm"] == "0.32.0"
    told = map(json.loads, (tmp_path / "told").read_text(encoding="utf-8").splitlines())
    assert [one["args"]["max_num_batched_tokens"] for one in told if one["do"] == "start"] == [256, 128]
    assert f"budget 128 · seqs 64 · KV 64MiB · float32 · in {python}" in case.candidate.describe()


def test_a_broken_candidate_and_one_that_hangs_are_failures_that_leave_no_process(
    model: ModelSpec, tmp_path: Path
) -> None:
    broken = make_case(model, env=hook(tmp_path / "broken", "    raise SystemExit('broken')"))
    with FreshProcesses((broken,)) as runner:
        runner.prepare(math.inf)
        failure = runner.run(broken, "candidate", check=False).failure
    assert failure is not None
    assert "exit code 4" in failure.message
    hanging = make_case(model, env=hook(tmp_path / "hanging", "    import time; time.sleep(600)"))
    with FreshProcesses((hanging,)) as runner:
        runner.prepare(math.inf)
        began = time.monotonic()
        failure = runner.run(hanging, "candidate", check=False, timeout_s=6.0).failure
    assert failure is not None
    assert failure.kind is FailureKind.TIMEOUT
    assert time.monotonic() - began < 60
    assert processes_with(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'pipetune: GPU 0 is in use by pid 7' >&2; exit 2", "it did not get its GPU: GPU 0 is in use by pid 7"),
        (
            'while [ "$1" != --output ]; do shift; done; echo "{}" > "$2"',
            "its record is of another version than this pipetune reads",
        ),
    ],
)
def test_a_run_that_says_nothing_of_its_side_is_no_failure_of_it(
    model: ModelSpec, tmp_path: Path, script: str, why: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    python.chmod(0o755)
    found = run_fresh(make_case(model), "baseline", Interpreter(python=str(python), root=None), check=False)
    assert found.not_comparable is not None
    assert why in found.not_comparable
    assert (found.failure, found.is_measured) == (None, False)


def test_a_plan_that_is_not_for_the_model_is_the_askers_mistake(model: ModelSpec) -> None:
    case = make_case(model, (2, 3))
    with FreshProcesses((case,)) as runner:
        runner.prepare(math.inf)
        with pytest.raises(PlanError, match="candidate: plan"):
            runner.run(case, "candidate", check=False)


def test_a_baseline_whose_files_are_refused_is_the_askers_mistake_and_a_candidate_a_finding(
    model: ModelSpec, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model.name, folder)
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    case = make_case(model.model_copy(update={"name": str(folder)}))
    with FreshProcesses((case,)) as runner:
        runner.prepare(math.inf)
        with pytest.raises(ConfigError, match=r"baseline: .*/generation_config\.json: cannot be read"):
            runner.run(case, "baseline", check=False)
        failure = runner.run(case, "candidate", check=False).failure
    assert failure is not None
    assert "generation_config.json: cannot be read" in failure.message


def test_a_running_fleet_changes_plans_and_checks_them(model: ModelSpec) -> None:
    case = make_case(model)
    with RunningFleet((case,)) as runner:
        runner.prepare(math.inf)
        samples = [runner.run(case, name, check=True) for name in ("baseline", "candidate")]
    assert [sample.failure for sample in samples] == [None, None]
    assert len({sample.hardware_id for sample in samples}) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_gate_exits_130_and_leaves_no_process(
    model: ModelSpec,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    # Short, since sockets lie in there.
    tmp_path = tmp_path_factory.mktemp("g")
    plan = tmp_path / "plan.json"
    plan.write_text(make_case(model).baseline.plan.model_dump_json(), encoding="utf-8")
    mark = f"PIPETUNE_TEST_MARK={tmp_path}"
    command = [sys.executable, "-m", "pipetune", "gate", "--baseline-plan", str(plan), "--model", model.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    environment |= dict([mark.split("=")])
    with subprocess.Popen([*command, "--num-prompts", "4"], env=environment, stderr=subprocess.PIPE) as gate:
        deadline = time.monotonic() + 60
        while not any("pipetune.bench.worker" in one for one in processes_with(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        gate.send_signal(number)
        assert gate.wait(timeout=30) == (-number if number is signal.SIGKILL else 130)
    deadline = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_with(mark) == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as own:
        # Whoever is killed cannot sweep; the next one does.
        assert list(tmp_path.glob("pipetune-*")) == [own]
