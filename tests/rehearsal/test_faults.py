"""What goes wrong on GPU machines, on stubbed ones: told for what it is, and outlived."""

from __future__ import annotations

from pathlib import Path

from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.memory import stage_bytes
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, Plan, RunSpec, Workload
from tests.rehearsal.conftest import UseMachine
from tests.rehearsal.fleets import LAYERS, PROTOCOL, WORKLOAD, equal, run, tiny_model
from tests.rehearsal.stub.machine import StubGpu, StubMachine

TWO = ("cuda:0", "cuda:1")


def test_a_slow_context_is_no_hung_worker(use_machine: UseMachine, tmp_path: Path) -> None:
    use_machine(StubMachine.alike(2, context_s=6))
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


def test_a_gpu_that_nvml_has_lost_is_measured_without_its_sensors(use_machine: UseMachine, tmp_path: Path) -> None:
    machine = StubMachine.alike(2)
    path = use_machine(machine)
    with Fleet.start(tiny_model(tmp_path, "llama"), TWO, log_dir=tmp_path / "logs") as fleet:
        assert fleet.make_reference(tmp_path / "reference", WORKLOAD, PROTOCOL) is None
        lost = StubGpu.model_validate({**machine.gpus[1].model_dump(), "is_lost": True})
        machine.model_copy(update={"gpus": (machine.gpus[0], lost)}).write(path)
        outcome = equal(run(fleet, (2, 2)))
    there, gone = outcome.telemetry.after
    assert (there.clock_mhz, gone.clock_mhz) == (1980.0, None)
    # Of one GPU alone it would be too little for what was generated.
    assert outcome.telemetry.energy_j is None
