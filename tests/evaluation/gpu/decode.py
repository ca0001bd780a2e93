"""Decode at batch 1, 8 and 64: HF `generate`, eager steps, captured ones, captured and compiled ones."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import Any

from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.fleet.fleet import Fleet
from pipetune.bench.record import Failure, Measurement
from pipetune.bench.spec import EffectivePlan, ModelSpec, Plan, Protocol, Workload
from tests.evaluation.gpu.context import Context, SkippedError
from tests.evaluation.gpu.models import LARGE, LARGE_BYTES, SMALL, save_config, save_random_checkpoint
from tests.evaluation.gpu.roofline import bandwidth_share, decode_step_s, step_bytes

DEVICES = ("cuda:0",)
BATCHES = (1, 8, 64)
INPUT_LEN = 64
PROTOCOL = Protocol(num_iters=2, num_iters_warmup=1, max_warmup=1, check_outputs=False, timeout_s=180.0)
EAGER, GRAPHS, COMPILED, HF = "eager", "graphs", "graphs + compile", "HF generate"
HF_AIM, GRAPHS_AIM, COMPILED_AIM = 5.0, 0.60, 0.70
LEFT_FOR_ONE_S = {HF: 15.0, EAGER: 15.0, GRAPHS: 10.0, COMPILED: 45.0}
"""A measurement that takes longer than what is left is not begun."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model."""

    name: str
    config: dict[str, Any]
    output_len: int
    has_weights: bool
    """Weights in files: where there are many, drawing them at each load would take minutes."""


CASES = {
    "small": Case(name="135M shape", config=SMALL, output_len=65, has_weights=False),
    "large": Case(name="7B shape", config=LARGE, output_len=33, has_weights=True),
}


def run(context: Context, which: str) -> None:
    """All batches and ways of one model, what matters most first."""
    case = CASES[which]
    steps = _Steps(context, case)
    model = _model(context, case)
    with Experiment.start(model, DEVICES, exclusive=False, log_dir=context.work / "logs") as experiment:
        # Moving between the whole model and a stage reloads it: the runtime's ways come before the other.
        plans = [*((how, 1) for how in (GRAPHS, COMPILED)), *((GRAPHS, batch) for batch in BATCHES[1:]), (HF, 1)]
        plans += [plan for how in (COMPILED, HF, EAGER) for batch in BATCHES if (plan := (how, batch)) not in plans]
        for how, batch in plans:
            if context.left_s < LEFT_FOR_ONE_S[how]:
                context.note(f"out of time before {how} at batch {batch}")
                continue
            steps.measure(experiment, how, batch)
            # Now: whoever ends this section leaves no time to judge.
            steps.judge(which)


class _Steps:
    """Seconds of a step by way and batch."""

    def __init__(self, context: Context, case: Case) -> None:
        self._context, self._case = context, case
        self._copy_bytes_per_s = _copy_bandwidth(context)
        self._seconds: dict[tuple[str, int], float] = {}
        self._shares: dict[tuple[str, int], float] = {}

    def measure(self, experiment: Experiment, how: str, batch: int) -> None:
        workload = Workload(num_prompts=batch, input_len=INPUT_LEN, output_len=self._case.output_len)
        began = time.monotonic()
        if how == HF:
            outcome = experiment.baseline(batch, workload, PROTOCOL).result
        else:
            layers = (self._case.config["num_hidden_layers"],)
            plan = Plan.from_layer_counts(layers, DEVICES, batch, compile=how == COMPILED)
            plan = plan.model_copy(update={"cuda_graphs": how != EAGER})
            effective = EffectivePlan(plan=plan, in_flight=1)
            outcome = experiment.measure(plan, workload, PROTOCOL, resolved=effective).result
        took_s = round(time.monotonic() - began, 1)
        if isinstance(outcome, Failure):
            self._context.row(how=how, batch=batch, took_s=took_s, notes=f"{outcome.kind.value}: {outcome.message}")
            return
        self._add(experiment.fleet, outcome, how, batch, took_s)

    def _add(self, fleet: Fleet, outcome: Measurement, how: str, batch: int, took_s: float) -> None:
        step_s = decode_step_s(outcome)
        # A fallback is a measurement of another way.
        fell_back = [note for note in outcome.notes if note.startswith(("cuda_graphs", "compile"))]
        share = None
        if self._copy_bytes_per_s:
            needed = step_bytes(fleet.shape, batch=batch, prompt_len=INPUT_LEN, output_len=self._case.output_len)
            share = bandwidth_share(needed, step_s, self._copy_bytes_per_s)
        if not fell_back:
            self._seconds[how, batch] = step_s
            if share is not None:
                self._shares[how, batch] = share
        hf_s = self._seconds.get((HF, batch))
        self._context.row(
            how=how,
            batch=batch,
            step_ms=round(step_s * 1e3, 3),
            tokens_per_s=round(batch / step_s, 1),
            times_hf=None if hf_s is None else round(hf_s / step_s, 2),
            roofline=None if share is None else f"{share:.1%}",
            prepare_s=outcome.prepare_s,
            took_s=took_s,
            notes="; ".join(fell_back),
        )

    def judge(self, which: str) -> None:
        """The aims that this model has."""
        name = self._case.name
        if which == "small":
            hf, own = self._seconds.get((HF, 1)), self._seconds.get((GRAPHS, 1))
            ratio = hf / own if hf and own else None
            self._context.aim(
                f"{name}, batch 1: ≥ {HF_AIM:.0f}× HF generate with graphs",
                ratio is not None and ratio >= HF_AIM,
                "not measured" if ratio is None else f"{ratio:.1f}×",
            )
            return
        for how, wanted in ((GRAPHS, GRAPHS_AIM), (COMPILED, COMPILED_AIM)):
            share = self._shares.get((how, 1))
            self._context.aim(
                f"{name}, batch 1: ≥ {wanted:.0%} of the memory bandwidth with {how}",
                share is not None and share >= wanted,
                "not measured" if share is None else f"{share:.1%}",
            )


def _model(context: Context, case: Case) -> ModelSpec:
    folder = context.work / "model"
    if not case.has_weights:
        save_config(folder, case.config)
        return ModelSpec(name=str(folder), dtype="bfloat16", load_format="dummy")
    import torch

    memory, disk = torch.cuda.mem_get_info(0)[0], shutil.disk_usage(context.work).free
    if memory < 1.6 * LARGE_BYTES:
        raise SkippedError(f"the {case.name} needs {1.6 * LARGE_BYTES / 2**30:.0f} GiB of GPU memory to be compared")
    if disk < 1.1 * LARGE_BYTES:
        raise SkippedError(f"the {case.name} needs {1.1 * LARGE_BYTES / 2**30:.0f} GiB of disk under {context.work}")
    began = time.monotonic()
    save_random_checkpoint(folder, case.config, "cuda:0")
    torch.cuda.empty_cache()
    context.note(f"random weights written in {time.monotonic() - began:.0f} s")
    return ModelSpec(name=str(folder), dtype="bfloat16")


def _copy_bandwidth(context: Context) -> float | None:
    machine = context.of("machine")
    row = next((row for row in machine.rows if row.get("what") == "copy bandwidth"), None) if machine else None
    if row is None:
        context.note("no copy bandwidth was measured, so that no share of it can be given; run the section machine")
        return None
    value = row["value"]
    assert isinstance(value, int | float)
    return float(value) * 1e9
