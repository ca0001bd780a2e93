"""A real out-of-memory error under a low cap, told for what it is, and the same fleet at work again behind it.

Then predicted bytes against the allocator's peak, for models and lengths of several kinds.
"""

from __future__ import annotations

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.memory import stage_bytes
from pipetune.bench.record import Failure, FailureKind, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, Workload
from tests.evaluation.gpu.context import Context
from tests.evaluation.gpu.models import GROUPED, SMALL, save_config
from tests.workers import worker_pids

DEVICES = ("cuda:0",)
SPARE_BYTES = 96 * 2**20
"""Above the weights: enough to load them, too little for what the prompts below need."""
BIG = Workload(num_prompts=64, input_len=512, output_len=4)
NORMAL = Workload(num_prompts=8, input_len=64, output_len=8)
PROTOCOL = Protocol(num_iters=1, num_iters_warmup=1, max_warmup=1, check_outputs=False, timeout_s=90.0)
PREDICTED = (
    (8, None, False, Workload(num_prompts=8, input_len=64, output_len=8)),
    (64, None, True, Workload(num_prompts=64, input_len=128, output_len=8)),
    (16, None, False, Workload(num_prompts=16, input_len=1024, output_len=8)),
    (16, 256, True, Workload(num_prompts=16, input_len=1024, output_len=8)),
    (32, 512, True, Workload(num_prompts=32, input_len=4096, output_len=8)),
)
"""Micro-batch, chunk, graphs and workload of plans whose memory is predicted."""
TOO_MUCH = 1.10
PER_PLAN_S = 8.0


def run(context: Context) -> None:
    """A plan that cannot fit and one that does, then the predictions."""
    _exhaust(context)
    _predict(context)


def _exhaust(context: Context) -> None:
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


def _predict(context: Context) -> None:
    wrong, compared = [], 0
    for name, config in {"135M shape": SMALL, "grouped queries": GROUPED}.items():
        folder = save_config(context.work / name.replace(" ", "-"), config)
        model = ModelSpec(name=str(folder), dtype="bfloat16", load_format="dummy")
        with Experiment.start(model, DEVICES, exclusive=False, log_dir=context.work / "logs") as experiment:
            for micro_batch, chunk, graphs, workload in PREDICTED:
                if context.left_s < PER_PLAN_S:
                    context.note(f"out of time before micro-batch {micro_batch} of the {name}")
                    continue
                layers = (config["num_hidden_layers"],)
                plan = Plan.from_layer_counts(layers, DEVICES, micro_batch, prefill_chunk_size=chunk)
                plan = plan.model_copy(update={"cuda_graphs": graphs})
                effective = EffectivePlan(plan=plan, in_flight=1)
                outcome = experiment.measure(plan, workload, PROTOCOL, resolved=effective).result
                label = (
                    f"{name}, {micro_batch} x {workload.input_len}, chunk {chunk}, {'graphs' if graphs else 'eager'}"
                )
                if isinstance(outcome, Failure):
                    _add_row(context, label, outcome)
                    continue
                shape, lens = experiment.fleet.shape, {"prompt_len": workload.input_len, "output_len": 8}
                expected, seen = stage_bytes(shape, plan, 0, **lens), outcome.memory[0]
                over = expected.total(1) / seen.peak_bytes
                compared += 1
                if not 1.0 <= over <= TOO_MUCH:
                    wrong.append(f"{label}: {over:.3f}")
                context.row(
                    plan=label,
                    outcome="measurement",
                    weights_mib=round(seen.weights_bytes / 2**20, 1),
                    predicted_mib=round(expected.total(1) / 2**20, 1),
                    peak_mib=round(seen.peak_bytes / 2**20, 1),
                    predicted_over_peak=round(over, 3),
                    predicted_activations_mib=round(expected.activations / 2**20, 1),
                    activations_mib=round(seen.activation_bytes / 2**20, 1),
                    graphs_mib=round(seen.graphs_bytes / 2**20, 1),
                )
    context.aim(
        f"predicted memory never under the peak, and at most {TOO_MUCH - 1:.0%} above it",
        compared > 0 and not wrong,
        f"{compared - len(wrong)} of {compared} plans" + (f"; not {'; '.join(wrong)}" if wrong else ""),
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
