"""A fleet of real processes: measuring, re-planning, and every way of falling over."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipetune.bench.errors import ConfigError, ModelError, PlanError, StudyError
from pipetune.bench.fleet.fleet import Fleet, Progress
from pipetune.bench.fleet.supervisor import Supervisor
from pipetune.bench.metrics import derive
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, RunSpec, Workload
from tests.hooks import break_workers
from tests.tiny_models import save_tiny_model
from tests.workers import worker_pids

DEVICES = ("cpu:0", "cpu:1")
WORKLOAD = Workload(num_prompts=6, input_len=12, output_len=5, random_range_ratio=0.5)
PROTOCOL = Protocol(num_iters=2, num_iters_warmup=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def told() -> list[Progress]:
    """What the fleet told until a test listened itself."""
    return []


@pytest.fixture(scope="module")
def fleet(folder: Path, told: list[Progress], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES, on_progress=told.append) as started:
        failure = started.make_reference(tmp_path_factory.mktemp("study") / "reference", WORKLOAD, PROTOCOL)
        assert failure is None
        yield started


def run(fleet: Fleet, counts: tuple[int, ...], size: int, **changes: object) -> Measurement | Failure:
    plan = Plan.from_layer_counts(counts, DEVICES, size)
    spec = RunSpec(model=fleet.model, workload=WORKLOAD, plan=plan, protocol=PROTOCOL.model_copy(update=changes))
    effective = fleet.resolve(plan, WORKLOAD)
    assert isinstance(effective, EffectivePlan)
    return fleet.measure(spec, effective)


def test_a_measurement_holds_what_the_run_was(fleet: Fleet) -> None:
    outcome = run(fleet, (4, 2), 2)
    assert isinstance(outcome, Measurement), outcome
    assert outcome.micro_batch_sizes == (2, 2, 2)
    assert sorted(outcome.order) == list(range(6))
    assert outcome.prompt_lens == fleet.prompt_lens(WORKLOAD)
    assert len(outcome.iterations) == 2
    assert len(outcome.tasks) == 3 * WORKLOAD.output_len
    for iteration in outcome.iterations:
        assert iteration.duration_s == pytest.approx(max(iteration.token_times_s), abs=1e-5)
        assert len(iteration.stages) == 2
        for trace in iteration.stages:
            spans = list(zip(trace.compute_start_s, trace.compute_end_s, strict=True))
            assert len(spans) == len(outcome.tasks)
            assert all(start <= end for start, end in spans)
            assert all(end <= following for (_, end), (following, _) in itertools.pairwise(spans))
        first, last = iteration.stages
        assert all(a <= b for a, b in zip(first.compute_end_s, last.compute_start_s, strict=True))
    assert outcome.check is not None
    assert outcome.check.tokens_equal is True
    assert outcome.check.max_logit_error <= outcome.check.tolerance
    assert [stage.device for stage in outcome.memory] == list(DEVICES)
    assert all(stage.weights_bytes > 0 and stage.kv_bytes > 0 for stage in outcome.memory)
    assert outcome.transport == "gloo"


def test_progress_is_told(fleet: Fleet, told: list[Progress]) -> None:
    assert isinstance(run(fleet, (3, 3), 2), Measurement)
    assert {"start", "warmup", "measure"} <= {progress.phase for progress in told}


def test_memory_by_accounting_is_what_the_stage_holds(fleet: Fleet) -> None:
    outcome = run(fleet, (4, 2), 3)
    assert isinstance(outcome, Measurement)
    layer, shape = fleet.shape.layers[0], fleet.shape
    first, last = outcome.memory
    assert first.weights_bytes == 4 * layer.weight_bytes + shape.embedding_bytes + shape.other_bytes
    assert last.weights_bytes == 2 * layer.weight_bytes + shape.head_bytes + shape.other_bytes
    positions = 3 * (max(outcome.prompt_lens) + outcome.output_len)
    assert first.kv_bytes == 2 * positions * 4 * layer.kv_bytes_per_token


def test_only_layers_that_change_hands_are_loaded_again(fleet: Fleet) -> None:
    run(fleet, (3, 3), 2)
    moved = run(fleet, (4, 2), 2)
    again = run(fleet, (4, 2), 3)
    assert isinstance(moved, Measurement)
    assert isinstance(again, Measurement)
    assert moved.loaded_layers == (3,)
    assert again.loaded_layers == ()


def test_the_baseline_gives_token_times_for_every_batch(fleet: Fleet) -> None:
    outcome = fleet.baseline(WORKLOAD, PROTOCOL, batch_size=4)
    assert isinstance(outcome, Measurement)
    assert outcome.method == "hf_generate"
    assert outcome.micro_batch_sizes == (4, 2)
    assert all(len(run.token_times_s) == 2 * WORKLOAD.output_len for run in outcome.iterations)


def test_a_plan_without_instrumentation_still_has_its_throughput(fleet: Fleet) -> None:
    outcome = run(fleet, (3, 3), 2, instrument=False)
    assert isinstance(outcome, Measurement)
    assert outcome.iterations[0].stages[0].compute_start_s == ()
    assert outcome.iterations[0].duration_s > 0


def during_measurement(fleet: Fleet, act: Callable[[int], None]) -> Measurement | Failure:
    """Runs a long plan and does something to the pid of rank 1 once it is being measured."""
    begun = threading.Event()
    pids = worker_pids(fleet)
    fleet._supervisor.on_progress = lambda progress: begun.set() if progress.phase == "measure" else None

    def strike() -> None:
        assert begun.wait(60)
        time.sleep(0.7)
        act(pids[1])

    thread = threading.Thread(target=strike)
    thread.start()
    outcome = run(fleet, (3, 3), 1, num_iters=2000)
    thread.join()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    return outcome


def test_a_killed_worker_is_named_and_the_fleet_comes_back(fleet: Fleet) -> None:
    outcome = during_measurement(fleet, lambda pid: os.kill(pid, signal.SIGKILL))
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.WORKER_DIED
    assert (outcome.stage, outcome.device, outcome.phase) == (1, "cpu:1", "measure")
    assert "SIGKILL" in outcome.message
    assert isinstance(run(fleet, (3, 3), 2), Measurement)


def test_a_stopped_worker_is_found_by_its_silence(folder: Path, fleet: Fleet) -> None:
    fleet._supervisor.hang_timeout_s = 2.0
    try:
        outcome = during_measurement(fleet, lambda pid: os.kill(pid, signal.SIGSTOP))
    finally:
        fleet._supervisor.hang_timeout_s = 10.0
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.WORKER_HUNG
    assert (outcome.stage, outcome.device) == (1, "cpu:1")


def test_a_driver_that_was_stopped_itself_takes_nobody_for_hung(fleet: Fleet) -> None:
    script = f"kill -STOP {os.getpid()}; sleep 3.5; kill -CONT {os.getpid()}"
    stopper: list[subprocess.Popen[bytes]] = []

    def stop(progress: Progress) -> None:
        if progress.phase == "measure" and not stopper:
            stopper.append(subprocess.Popen(["sh", "-c", f"sleep 0.2; {script}"], start_new_session=True))

    fleet._supervisor.on_progress = stop
    fleet._supervisor.hang_timeout_s = 2.5
    try:
        outcome = run(fleet, (3, 3), 1, num_iters=50)
        stopper[0].wait()
    finally:
        fleet._supervisor.hang_timeout_s = 10.0
    assert isinstance(outcome, Measurement), outcome


def test_a_run_past_its_time_is_a_timeout(fleet: Fleet) -> None:
    outcome = run(fleet, (3, 3), 1, num_iters=2000, timeout_s=1.0)
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.TIMEOUT


def test_a_lost_message_is_a_communication_timeout(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    send = module.Sender.send
    def lossy(self, tensor):
        if tensor.dtype.is_floating_point:
            send(self, tensor)
    module.Sender.send = lossy
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.links", body=body)
    monkeypatch.setattr("pipetune.bench.fleet.supervisor.STUCK_AFTER_S", 2.0)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as broken:
        outcome = run(broken, (3, 3), 2)
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.COMMUNICATION_TIMEOUT
    assert "message was lost" in outcome.message


def test_a_plan_can_be_the_reference_where_the_model_does_not_fit(fleet: Fleet, tmp_path: Path) -> None:
    plan = Plan.from_layer_counts((3, 3), DEVICES, 2)
    spec = RunSpec(model=fleet.model, workload=WORKLOAD, plan=plan, protocol=PROTOCOL)
    unsplit = fleet._reference
    assert unsplit is not None
    try:
        failure = fleet.make_reference_from_plan(tmp_path / "reference", spec, EffectivePlan(plan=plan, in_flight=3))
        assert failure is None
        outcome = run(fleet, (5, 1), 4)
    finally:
        fleet.use_reference(*unsplit)
    assert isinstance(outcome, Measurement)
    assert outcome.check is not None
    assert outcome.check.reference == "plan"
    assert outcome.check.tokens_equal is True


@pytest.mark.parametrize("damage", [b"", b"no reference", None])
def test_a_reference_that_is_damaged_or_lost_is_no_plans_fault(
    fleet: Fleet, tmp_path: Path, damage: bytes | None
) -> None:
    good = fleet._reference
    assert good is not None
    copy = tmp_path / "reference"
    copy.write_bytes(good[0].read_bytes())
    pids = worker_pids(fleet)
    try:
        fleet.use_reference(copy, WORKLOAD)
        if damage is None:
            copy.unlink()
        else:
            copy.write_bytes(damage)
        with pytest.raises(StudyError, match="--resume makes it anew"):
            run(fleet, (3, 3), 2)
        with pytest.raises(StudyError, match="not a reference"):
            fleet.use_reference(copy, WORKLOAD)
        with pytest.raises(StudyError, match="another model or workload"):
            fleet.use_reference(good[0], WORKLOAD.model_copy(update={"num_prompts": 5}))
    finally:
        fleet.use_reference(*good)
    assert worker_pids(fleet) == pids, "nobody had to be started anew"
    assert isinstance(run(fleet, (3, 3), 2), Measurement)


def test_a_reference_that_one_worker_alone_cannot_read_holds_up_nobody(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
    import sys
    from pipetune.bench.errors import StudyError
    load = module.Reference.load
    def one_sided(path, digest):
        if sys.argv[sys.argv.index("--rank") + 1] == "1":
            raise StudyError("only here")
        return load(path, digest)
    module.Reference.load = one_sided
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.worker.reference", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as broken:
        assert broken.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        with pytest.raises(StudyError, match="only here"):
            run(broken, (3, 3), 2)
        assert broken.prompts(WORKLOAD), "the workers still answer"


def test_out_of_memory_names_stage_and_bytes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    forward = module.Stage.forward
    def hungry(self, *args, **kwargs):
        if self.is_last:
            module.torch.empty(1 << 46, dtype=module.torch.uint8)
        return forward(self, *args, **kwargs)
    module.Stage.forward = hungry
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.stage.stage", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as broken:
        outcome = run(broken, (3, 3), 2)
    assert isinstance(outcome, Failure)
    assert outcome.kind is FailureKind.OUT_OF_MEMORY
    assert (outcome.stage, outcome.device) == (1, "cpu:1")
    assert outcome.bytes_wanted == 1 << 46


def test_a_broken_stage_is_wrong_output(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    forward = module.Stage.forward
    def off(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        return output if self.is_last else output * 1.001
    module.Stage.forward = off
"""
    break_workers(tmp_path / "hook", monkeypatch, target="pipetune.bench.runtime.stage.stage", body=body)
    with Fleet.start(ModelSpec(name=str(folder)), DEVICES) as broken:
        assert broken.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        split = run(broken, (3, 3), 2)
        single = run(broken, (6,), 2)
    assert isinstance(split, Failure)
    assert split.kind is FailureKind.WRONG_OUTPUT
    assert isinstance(single, Measurement), "one stage has no output that is passed on"


def test_nothing_outlives_a_killed_driver(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys, time\n"
        "from pipetune.bench.fleet.fleet import Fleet\n"
        "from pipetune.bench.spec import ModelSpec\n"
        "from tests.workers import worker_pids\n"
        f"fleet = Fleet.start(ModelSpec(name={str(folder)!r}), {DEVICES!r})\n"
        "print(*worker_pids(fleet), flush=True)\n"
        "time.sleep(600)\n"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        driver.kill()
    _gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=2)
    assert not alive


def test_unknown_models_and_devices_are_the_users_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        Fleet.start(ModelSpec(name=str(tmp_path / "nowhere")), ("cpu:0",))
    with pytest.raises(ConfigError, match="cuda:77"):
        Fleet.start(ModelSpec(name=str(tmp_path)), ("cuda:77",))


def test_text_without_a_tokenizer_is_refused(fleet: Fleet) -> None:
    plan = Plan.from_layer_counts((3, 3), DEVICES, 2)
    with pytest.raises(ConfigError, match="tokenizer"):
        fleet.generate(plan, ["some text"], max_new_tokens=2)


def test_an_interrupted_start_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Supervisor] = []
    pids: list[int] = []

    def interrupt(self: Supervisor, *args: object) -> None:
        started.append(self)
        pids.extend(worker.process.pid for worker in self._workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Supervisor, "_await", interrupt)
    monkeypatch.setenv("TMPDIR", str(folder.parent))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(KeyboardInterrupt):
        Fleet.start(ModelSpec(name=str(folder)), DEVICES)
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not list(folder.parent.glob("pipetune-*"))


def test_a_folder_too_deep_for_a_socket_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(ConfigError, match="TMPDIR: "):
        Fleet.start(ModelSpec(name=str(folder)), DEVICES)
    assert not list(deep.glob("*"))


def test_a_plan_with_more_stages_on_a_device_than_workers_is_refused(fleet: Fleet) -> None:
    plan = Plan.from_layer_counts((3, 3), ("cuda:0", "cuda:0"), 2)
    with pytest.raises(PlanError, match="cuda:0 holds 2 stages"):
        fleet.generate(plan, [[3, 4]], max_new_tokens=2)


def test_prompts_may_want_unlike_numbers_of_tokens(fleet: Fleet, tmp_path: Path) -> None:
    workload = WORKLOAD.model_copy(update={"output_lens": (7, 1, 3, 5, 2, 4)})
    assert fleet.make_reference(tmp_path / "reference", workload, PROTOCOL) is None
    single = Plan.from_layer_counts((4, 2), DEVICES, 2)
    twice = single.model_copy(
        update={
            "stages": Plan.from_layer_counts((6,), DEVICES[:1], 2).stages,
            "replicas": 2,
            "replica_devices": (("cpu:1",),),
        }
    )
    for plan in (single, twice):
        spec = RunSpec(model=fleet.model, workload=workload, plan=plan, protocol=PROTOCOL)
        effective = fleet.resolve(plan, workload)
        assert isinstance(effective, EffectivePlan)
        outcome = fleet.measure(spec, effective)
        assert isinstance(outcome, Measurement), outcome
        assert outcome.check is not None
        assert outcome.check.tokens_equal is True
        rows = list(outcome.order)
        pairs = [max(workload.generated_lens[index] for index in rows[first : first + 2]) for first in (0, 2, 4)]
        if plan is single:
            assert len(outcome.tasks) == sum(pairs)
        assert derive(outcome)["output_throughput"] == pytest.approx(22 / derive(outcome)["duration_s"])
    baseline = fleet.baseline(workload, PROTOCOL, batch_size=4)
    assert isinstance(baseline, Measurement)
    assert baseline.output_lens == workload.output_lens
    prompts = fleet.prompts(workload)
    given = fleet.generate(single, prompts, max_new_tokens=workload.generated_lens, ignore_eos=True)
    whole = fleet.generate(single, prompts, max_new_tokens=7, ignore_eos=True)
    lens = zip(given, whole, workload.generated_lens, strict=True)
    assert all(few.token_ids == many.token_ids[:length] for few, many, length in lens)
    with pytest.raises(ConfigError, match="max_new_tokens: 2 numbers for 6 prompts"):
        fleet.generate(single, prompts, max_new_tokens=(1, 2))
