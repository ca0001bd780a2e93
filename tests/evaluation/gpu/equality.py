"""Six families, split over 1, 2 and 4 stages, against the unsplit model: over host staging, and over NCCL.

Fleets and plans as users make them. With fewer GPUs than stages a GPU is named several times: that proves correctness
and never speed, which is all that is asked here.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch

from pipetune.bench.errors import FleetError, ModelError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.record import Failure, Measurement
from pipetune.bench.spec import Dtype, EffectivePlan, ModelSpec, Plan, Protocol, Workload
from tests.evaluation.gpu.context import Context
from tests.evaluation.gpu.models import TINY, TINY_LAYERS, save_config
from tests.hooks import write_hooks

SHARED_NCCL = (2, 30)
"""From this version on ranks may share a GPU."""
SPLITS = ((8,), (5, 3), (2, 2, 3, 1))
WORKLOAD = Workload(num_prompts=8, input_len=20, random_range_ratio=0.5, output_len=12)
PROTOCOL = Protocol(num_iters=1, num_iters_warmup=0, max_warmup=0, timeout_s=90.0)
MICRO_BATCH, IN_FLIGHT = 3, 3
PER_FLEET_S = 12.0
FP32_TOLERANCE = 1e-3
"""Largest difference of a logit in fp32; its kernels differ by batch shape, and weights here are large."""


def nccl_environment() -> dict[str, str]:
    """What lets ranks share a GPU over NCCL."""
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "4"}


def run(context: Context, dtype: Dtype, transport: str, only: Collection[str] = ()) -> None:
    """All families, or some of them, in one dtype over one transport."""
    devices = _devices(transport, context.work / "hooks")
    splits = [counts for counts in SPLITS if len(counts) <= len(devices)]
    assert all(sum(counts) == TINY_LAYERS for counts in splits)
    wrong, compared, captured = [], 0, 0
    for family, config in TINY.items():
        if only and family not in only:
            continue
        if context.left_s < PER_FLEET_S:
            context.note(f"out of time before {family}")
            wrong.append(f"{family} and those behind it, for which there was no time")
            break
        folder = save_config(context.work / family, config, family)
        model = ModelSpec(name=str(folder), dtype=dtype, load_format="dummy")
        try:
            logs = context.work / f"{family}-logs"
            with Experiment.start(model, devices, exclusive=False, log_dir=logs) as experiment:
                reference = experiment.make_reference(context.work / f"{family}.reference", WORKLOAD, PROTOCOL)
                if reference is not None:
                    wrong.append(f"{family}: {reference.message}")
                    continue
                for counts in splits:
                    compared += 1
                    plan = Plan.from_layer_counts(counts, devices, MICRO_BATCH)
                    effective = EffectivePlan(plan=plan, in_flight=IN_FLIGHT)
                    outcome = experiment.measure(plan, WORKLOAD, PROTOCOL, resolved=effective).result
                    if not _add_row(context, family, len(counts), outcome, dtype):
                        wrong.append(f"{family} over {len(counts)} stages")
                    captured += isinstance(outcome, Measurement) and is_captured(outcome)
        except (FleetError, ModelError) as error:
            wrong.append(f"{family}: {error}")
    context.aim(
        f"the unsplit model's output in {dtype} over {transport}",
        not wrong and compared > 0,
        f"{compared - len(wrong)} of {compared} plans" + (f"; not {', '.join(wrong)}" if wrong else ""),
        proves_correctness=True,
    )
    # Where all fell back, captured steps were compared with nothing.
    context.aim(
        f"captured decode steps in {dtype} over {transport}",
        captured > 0,
        f"{captured} of {compared} plans",
        proves_correctness=True,
    )


def is_captured(measurement: Measurement) -> bool:
    """Whether every stage's decode steps were captured graphs."""
    fell_back = any(note.startswith("cuda_graphs") for note in measurement.notes)
    return measurement.prepare_s is not None and not fell_back


def _devices(transport: str, hooks: Path) -> tuple[str, ...]:
    """Four workers on the GPUs there are; over NCCL on GPUs of their own, or sharing one as its version lets them."""
    if transport != "nccl":
        # Neighbours on one GPU talk by way of the host.
        os.environ.pop("NCCL_MULTI_RANK_GPU_ENABLE", None)
        return ("cuda:0",) * 4
    count = torch.cuda.device_count()
    version = tuple(torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    if 2 <= count < 4 and version < SHARED_NCCL:
        return tuple(f"cuda:{number}" for number in range(count))
    if count < 4:
        os.environ.update(nccl_environment())
    if count == 1 and version < SHARED_NCCL:
        share_by_host_names(hooks)
        return ("cuda:0",) * 2
    return tuple(f"cuda:{number % count}" for number in range(4))


def share_by_host_names(hooks: Path) -> None:
    """Makes workers that start from now on hosts of their own to NCCL, which else refuses two ranks on a GPU.

    They talk over sockets of the loopback device then, as ranks of unlike hosts do over a network.
    """
    name = "import os\nos.environ['NCCL_HOSTID'] = f'worker-{os.getpid()}'"
    write_hooks(hooks, {"pipetune.bench.runtime.wiring": name})
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{hooks}:{before}" if before else str(hooks)
    os.environ.update({"NCCL_MNNVL_ENABLE": "0", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"})


def _add_row(context: Context, family: str, stages: int, outcome: Measurement | Failure, dtype: Dtype) -> bool:
    if isinstance(outcome, Failure):
        context.row(family=family, stages=stages, verdict=outcome.kind.value, notes=outcome.message)
        return False
    check = outcome.check
    assert check is not None, "there was a reference"
    is_equal = check.argmax_flips == 0
    if dtype == "float32":
        is_equal = is_equal and check.tokens_equal is True and check.max_logit_error <= FP32_TOLERANCE
    graphs = [note for note in outcome.notes if note.startswith("cuda_graphs")]
    context.row(
        family=family,
        stages=stages,
        transport=outcome.transport,
        verdict="equal" if is_equal else "wrong",
        max_logit_error=check.max_logit_error,
        tolerance=check.tolerance,
        tokens_equal=check.tokens_equal,
        near_ties=check.near_ties,
        captured=is_captured(outcome),
        notes="; ".join(graphs),
    )
    return is_equal
