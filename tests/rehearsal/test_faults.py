"""What goes wrong on GPU machines, on stubbed ones: told for what it is, and outlived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pynvml
import pytest

from pipetune.bench.fleet.fleet import Fleet, Progress
from pipetune.bench.machine.sensors import foreign_gpu_processes
from pipetune.bench.memory import stage_bytes
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, Plan, RunSpec, Workload
from tests.rehearsal.conftest import UseMachine
from tests.rehearsal.fleets import LAYERS, PROTOCOL, WORKLOAD, equal, run, tiny_model
from tests.rehearsal.stub.machine import StubMachine

TWO = ("cuda:0", "cuda:1")


def test_a_slow_context_is_no_hung_worker(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(2, context_s=5))
    # Rank 0 makes a second context when it spreads the unsplit model.
    with Fleet.start(tiny_model(tmp_path, "llama"), TWO, log_dir=tmp_path / "logs", hang_timeout_s=4.0) as fleet:
        assert fleet.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None


ASKS_THE_HOST = """
capture = module.Pool.capture


def asking(pool, work):
    def asks():
        output = work()
        output.sum().item()
        return output

    return capture(pool, asks)


module.Pool.capture = asking
"""


def test_what_cannot_be_captured_or_has_no_room_costs_its_plan_alone(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(1), {"pipetune.bench.runtime.kernels.graphs": ASKS_THE_HOST})
    with Fleet.start(tiny_model(tmp_path, "llama"), TWO[:1], log_dir=tmp_path / "logs") as fleet:
        assert fleet.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        failure = measure_tight(fleet)
        assert isinstance(failure, Failure)
        assert failure.kind is FailureKind.OUT_OF_MEMORY
        assert failure.device == "cuda:0"
        outcome = equal(run(fleet, (LAYERS,)))
        assert [note for note in outcome.notes if "eager on stage 0: called a synchronizing CUDA operation" in note]


def measure_tight(fleet: Fleet) -> Measurement | Failure:
    """A plan whose cap holds the weights and little more, run all the same."""
    big = Workload(num_prompts=32, input_len=40, output_len=4)
    plan = Plan.from_layer_counts((LAYERS,), fleet.devices, big.num_prompts)
    need = stage_bytes(fleet.shape, plan, 0, prompt_len=big.input_len, output_len=big.output_len)
    share = (need.weights + 2**20) / fleet.device_bytes["cuda:0"]
    tight = Plan.from_layer_counts((LAYERS,), fleet.devices, big.num_prompts, memory_fraction=share)
    protocol = PROTOCOL.model_copy(update={"check_outputs": False})
    spec = RunSpec(model=fleet.model, workload=big, plan=tight, protocol=protocol)
    return fleet.measure(spec, EffectivePlan(plan=tight, in_flight=1))


@dataclass
class Bench:
    """A fleet of two GPUs, and the file that says how they are."""

    fleet: Fleet
    path: Path
    turns: StubMachine | None = None
    """How they are from a plan's second timed pass on."""

    def on_progress(self, progress: Progress) -> None:
        if (progress.phase, progress.done) == ("measure", 1) and self.turns is not None:
            self.turns.write(self.path)

    def measure(self, turns: StubMachine) -> Measurement | Failure:
        self.turns = turns
        try:
            return run(self.fleet, (2, 2), protocol=PROTOCOL.model_copy(update={"num_iters": 2}))
        finally:
            self.turns = None


SOUND = StubMachine.alike(2)
TURNS_AT_LOAD = """
import os
from pathlib import Path

load = module.load_unsplit


def load_unsplit(*given):
    path = Path(os.environ["PIPETUNE_STUB_GPUS"])
    if (other := path.with_name("at_load.json")).exists():
        other.replace(path)
    return load(*given)


module.load_unsplit = load_unsplit
"""


@pytest.fixture(scope="module")
def shared(use_machine_of_module: UseMachine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    path = use_machine_of_module(SOUND, {"pipetune.bench.worker.commands": TURNS_AT_LOAD})
    folder = tmp_path_factory.mktemp("shared")
    fleet = Fleet(
        tiny_model(folder, "llama"), TWO, log_dir=folder / "logs", on_progress=lambda told: own.on_progress(told)
    )
    own = Bench(fleet, path)
    with fleet:
        assert fleet.make_reference(folder / "reference", WORKLOAD, PROTOCOL) is None
        yield own


@pytest.fixture
def bench(shared: Bench) -> Bench:
    SOUND.write(shared.path)
    return shared


def test_what_nvml_says_of_a_run_reaches_its_record(bench: Bench) -> None:
    strange = SOUND.altered(0, throttle_mask=pynvml.nvmlClocksThrottleReasonHwThermalSlowdown)
    outcome = equal(bench.measure(strange.altered(1, ecc_errors=2, foreign_pids=(1,))))
    (process,) = foreign_gpu_processes([1], [])
    seen = outcome.telemetry.disturbances
    assert [text for text in seen if text.startswith("cuda:")] == [
        "cuda:0 was slowed down: thermal limit (hardware)",
        f"cuda:1 was shared with {process}",
        "cuda:1 had 2 uncorrected ECC errors",
    ]
    assert outcome.telemetry.after[0].throttle_reasons == ("thermal limit (hardware)",)


def test_a_gpu_that_nvml_has_lost_is_measured_without_its_sensors(bench: Bench) -> None:
    SOUND.altered(1, is_lost=True).write(bench.path)
    outcome = equal(run(bench.fleet, (2, 2)))
    there, gone = outcome.telemetry.after
    assert (there.clock_mhz, gone.clock_mhz) == (1980.0, None)
    # Of one GPU alone it would be too little for what was generated.
    assert outcome.telemetry.energy_j is None


def test_a_gpu_that_cuda_loses_is_named_and_its_worker_is_replaced(bench: Bench) -> None:
    failure = bench.measure(SOUND.altered(1, fault="unspecified launch failure"))
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.stage, failure.lost_device) == (FailureKind.WORKER_DIED, 1, "cuda:1")
    assert failure.message.startswith("stage 1 on cuda:1, measure: CUDA error: unspecified launch failure; ")
    SOUND.write(bench.path)
    equal(run(bench.fleet, (2, 2)))


def test_of_the_gpus_that_the_unsplit_model_lies_on_none_is_blamed(bench: Bench) -> None:
    SOUND.altered(1, fault="uncorrectable ECC error encountered").write(bench.path.with_name("at_load.json"))
    failure = bench.fleet.baseline(WORKLOAD, PROTOCOL, 4)
    assert isinstance(failure, Failure)
    assert (failure.kind, failure.device, failure.lost_device) == (FailureKind.WORKER_DIED, None, None)
    assert failure.message.startswith("the unsplit model on several GPUs, load: CUDA error: uncorrectable ECC error ")
