"""A real out-of-memory error under a low cap, told for what it is, and the same fleet at work again behind it."""

from __future__ import annotations

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.memory import stage_bytes
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, Workload
from tests.evaluation.gpu.context import Context
from tests.evaluation.gpu.models import SMALL, save_config
from tests.workers import worker_pids

DEVICES = ("cuda:0",)
SPARE_BYTES = 96 * 2**20
"""Above the weights: enough to load them, too little for what the prompts below need."""
BIG = Workload(num_prompts=64, input_len=512, output_len=4)
NORMAL = Workload(num_prompts=8, input_len=64, output_len=8)
PROTOCOL = Protocol(num_iters=1, num_iters_warmup=1, max_warmup=1, check_outputs=False, timeout_s=90.0)


def run(context: Context) -> None:
    """One plan that cannot fit, run all the same, and one that does."""
    model = ModelSpec(name=str(save_config(context.work / "small", SMALL)), dtype="bfloat16", load_format="dummy")
    layers = (SMALL["num_hidden_layers"],)
    with Experiment.start(model, DEVICES, exclusive=False, log_dir=context.work / "logs") as experiment:
        fleet = experiment.fleet
        first_pids = worker_pids(fleet)
        plan = Plan.from_layer_counts(layers, DEVICES, BIG.num_prompts)
        need = stage_bytes(fleet.shape, plan, 0, prompt_len=BIG.input_len, output_len=BIG.output_len)
        share = (need.weights + SPARE_BYTES) / fleet.device_bytes[DEVICES[0]]
        tight = Plan.from_layer_counts(layers, DEVICES, BIG.num_prompts, memory_fraction=share)
        outcome = experiment.measure(tight, BIG, PROTOCOL, resolved=EffectivePlan(plan=tight, in_flight=1)).result
        failure = _add_row(context, f"cap {(need.weights + SPARE_BYTES) / 2**20:.0f} MiB", outcome)
        context.aim(
            "an allocation above the cap is an out_of_memory failure",
            failure is not None and failure.kind is FailureKind.OUT_OF_MEMORY,
            failure.kind.value if failure else "the plan ran",
            proves_correctness=True,
        )
        plan = Plan.from_layer_counts(layers, DEVICES, NORMAL.num_prompts)
        again = experiment.measure(plan, NORMAL, PROTOCOL, resolved=EffectivePlan(plan=plan, in_flight=1)).result
        failure = _add_row(context, "default cap", again)
        context.note(f"workers before: {first_pids}; behind the failure: {worker_pids(fleet)}")
        context.aim(
            "the same fleet then runs a normal plan",
            failure is None,
            f"it did not: {failure.message}" if failure else "it did",
            proves_correctness=True,
        )


def _add_row(context: Context, plan: str, outcome: Measurement | Failure) -> Failure | None:
    failure = outcome if isinstance(outcome, Failure) else None
    context.row(
        plan=plan,
        outcome=failure.kind.value if failure else "measurement",
        phase=failure.phase if failure else None,
        message=failure.message if failure else None,
    )
    return failure
