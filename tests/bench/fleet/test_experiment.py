"""The experiment runner: what it holds and lets go, what it records, and that nothing else drives a fleet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipetune.bench.errors import FleetError, ModelError, StudyError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import ModelSpec, Protocol
from tests.record_factory import WORKLOAD, make_effective, make_machine, make_plan
from tests.tuner.fake_fleet import FakeFleet, Lab, failure

ROOT = Path(__file__).parents[3]
DRIVERS = frozenset({"measure", "baseline", "make_reference", "make_reference_from_plan"})
"""Methods of a fleet that only the runner calls."""
PLAN, PROTOCOL = make_plan(), Protocol(num_iters=2)


@pytest.fixture
def lab() -> Lab:
    return Lab()


def start(lab: Lab, *devices: str, exclusive: bool = True) -> Experiment:
    names = devices or PLAN.devices
    return Experiment.start(ModelSpec(name="m"), names, exclusive=exclusive, start_fleet=lab.start)


def test_a_plan_is_resolved_measured_and_recorded_with_its_labels(lab: Lab) -> None:
    with start(lab) as experiment:
        record = experiment.measure(PLAN, WORKLOAD, PROTOCOL, number=3, role="finalist", round=2)
    assert (record.number, record.role, record.round) == (3, "finalist", 2)
    assert record.effective == make_effective(PLAN)
    assert record.spec is not None
    assert (record.spec.plan, record.spec.model.revision) == (PLAN, lab.revision)
    assert record.hardware_id == lab.machine.hardware_id
    assert isinstance(record.result, Measurement)
    assert len(record.result.iterations) == 2


def test_a_plan_that_does_not_fit_is_recorded_and_not_run(lab: Lab) -> None:
    lab.device_bytes = 2**20
    with start(lab) as experiment:
        record = experiment.measure(PLAN, WORKLOAD, PROTOCOL)
    assert isinstance(record.result, Failure)
    assert (record.result.kind, record.effective) == (FailureKind.OVER_MEMORY_CAP, None)
    assert lab.calls == []


def test_a_baseline_records_its_batch_size(lab: Lab) -> None:
    with start(lab) as experiment:
        record = experiment.baseline(16, WORKLOAD, PROTOCOL)
    assert (record.params, record.spec) == ({"batch_size": 16}, None)


def test_an_attempt_may_give_another_outcome(lab: Lab) -> None:
    with start(lab) as experiment:
        record = experiment.measure(
            PLAN, WORKLOAD, PROTOCOL, attempt=lambda run: failure(FailureKind.INTERRUPTED), role="trial"
        )
    assert record.result == failure(FailureKind.INTERRUPTED)
    assert lab.calls == []


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FailureKind.OUT_OF_MEMORY, None),
        (FailureKind.UNSUPPORTED_MODEL, ModelError),
        (FailureKind.WRONG_OUTPUT, ModelError),
        (FailureKind.WORKER_DIED, FleetError),
    ],
)
def test_why_there_is_no_reference(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: FailureKind, error: type[Exception] | None
) -> None:
    monkeypatch.setattr(FakeFleet, "make_reference", lambda *args: failure(kind))
    with start(lab) as experiment:
        if error is None:
            assert experiment.make_reference(tmp_path / "r", WORKLOAD, PROTOCOL) == failure(kind)
            return
        with pytest.raises(error):
            experiment.make_reference(tmp_path / "r", WORKLOAD, PROTOCOL)


def test_gpus_are_held_over_fresh_workers_until_the_end(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lab.machine = make_machine(gpus=2)
    with start(lab, "cuda:0", "cuda:1") as experiment:
        first = experiment.fleet
        experiment.renew()
        assert experiment.fleet is not first
        with pytest.raises(StudyError, match="is in use by"):
            start(lab, "cuda:1")
        start(lab, "cuda:1", exclusive=False).close()
    start(lab, "cuda:1").close()


def test_a_fleet_whose_gpu_others_hold_is_closed(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    lab.machine = make_machine(gpus=1)
    closed: list[int] = []
    with start(lab, "cuda:0"):
        monkeypatch.setattr(FakeFleet, "close", lambda fleet: closed.append(1))
        with pytest.raises(StudyError):
            start(lab, "cuda:0")
        assert closed == [1]


def calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Receiver and method of every attribute: `("fleet", "measure")` of `self.fleet.measure`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value = node.value
            yield value.attr if isinstance(value, ast.Attribute) else getattr(value, "id", ""), node.attr


def drives(receiver: str, method: str) -> bool:
    return (receiver, method) == (Fleet.__name__, "start") or (method in DRIVERS and "fleet" in receiver.lower())


def test_nothing_else_drives_a_fleet() -> None:
    files = [path for folder in ("bench", "tuner", "tests/evaluation") for path in (ROOT / folder).rglob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        if any(drives(*call) for call in calls(ast.parse(path.read_text(encoding="utf-8"))))
    }
    # Another engine has a fleet of its own beside it, for the reference alone.
    assert found == {"bench/engines/vllm.py", "bench/fleet/experiment.py"}
