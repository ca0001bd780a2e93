"""An engine beside its own defaults, beside itself unwatched, twice the same, and beside our runtime: interleaved."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipetune.bench import metrics
from pipetune.bench.engines.vllm import VllmEngine
from pipetune.bench.errors import FleetError
from pipetune.bench.fleet.experiment import Experiment
from pipetune.bench.record import Measurement, Record
from pipetune.bench.spec import Plan, Protocol, RunSpec, Workload
from pipetune.tuner.planning.calibration.observation import observe
from pipetune.tuner.report.data import Report
from pipetune.tuner.study.files import load_study
from tests.evaluation.engines.grid import DEVICES, SMOLLM2, engine_plan
from tests.evaluation.harness import ROOT, findable
from tests.evaluation.peers.questions import WORKLOADS

SILENT_HOST = Path(__file__).with_name("silent_host.py")
_MODEL = ("--model", "smollm2-135m", "--dtype", "bfloat16", "--devices", ",".join(DEVICES))
_FOLDER = ROOT / "results" / "engines"
_RUN = Protocol(num_iters=3, num_iters_warmup=1, max_warmup=1)


def numbers(python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """All tables, as Markdown."""
    best = {name: _tuned(name, python, say) for name in WORKLOADS}
    parts = [
        "| workload | vLLM tuned | over its defaults at two stages |\n|---|---|--:|\n"
        + "\n".join(f"| {name} | {_described(one)} | {_gain(one)} |" for name, one in best.items()),
        watched(python, rounds, say),
        beside_ours(python, rounds, say),
    ]
    return "\n\n".join(parts)


def _tuned(name: str, python: Path, say: Callable[[str], None], *, least: int = 2) -> dict[str, Any]:
    """A study of plans of at least so many stages by the command that users have, or what is there of it; its
    document."""
    say(f"tuning vLLM for the workload {name}, {least} stages or more")
    workload = WORKLOADS[name]
    return _study(
        *_arguments(workload),
        *("--engine", "vllm", "--engine-python", str(python), "--enforce-eager", "--kv-cache-memory-bytes", "512MiB"),
        *("--num-iters", "1", "--n-trials", "8", "--finalists", "1", "--finalist-rounds", "5"),
        *("--max-finalist-rounds", "5", "--min-stages", str(least)),
        *("--baseline-batch-sizes", str(workload.num_prompts)),
        folder=_FOLDER / f"vllm-{name}{'-any' * (least == 1)}",
    )


def _arguments(workload: Workload) -> tuple[str, ...]:
    sizes = {name: getattr(workload, name) for name in ("num_prompts", "input_len", "output_len")}
    return *_MODEL, *(text for name, size in sizes.items() for text in (f"--{name.replace('_', '-')}", str(size)))


def _study(*arguments: str, folder: Path) -> dict[str, Any]:
    command = (sys.executable, "-m", "pipetune", "tune", "--json", "--resume", "auto", "-o", str(folder), *arguments)
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=findable(os.environ))
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def _described(document: dict[str, Any]) -> str:
    return Plan.model_validate(document["best"]["plan"]).describe()


def _gain(document: dict[str, Any]) -> str:
    gain = (document["engine_default"] or {}).get("gain_over_it")
    if gain is None:
        return "1.00× (nothing is better)"
    return f"{gain['value']:.2f}× ({gain['low']:.2f}–{gain['high']:.2f}, {gain['rounds']} rounds)"


def watched(python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """One plan in one process, its passes recorded and not, in random order; and its bubble from run to run."""
    say("one plan, watched and not")
    order, took = random.Random(0), {True: list[float](), False: list[float]()}
    spec = RunSpec(model=SMOLLM2.model, workload=SMOLLM2.workload, plan=engine_plan((15, 15), 256, 64), protocol=_RUN)
    engine = VllmEngine(SMOLLM2.model, DEVICES, python=python, script=SILENT_HOST)
    try:
        runs = [_sound(engine.measure(spec))]
        for _ in range(2 * rounds):
            for is_watched in order.sample((True, False), 2):
                took[is_watched].append(_pass_s(engine, spec, is_watched))
        runs += [_sound(engine.measure(spec)) for _ in range(rounds - 1)]
    finally:
        engine.close()
    ratios = [watched / silent for watched, silent in zip(took[True], took[False], strict=True)]
    bubbles = [metrics.derive(run)["bubble_ratio"] for run in runs]
    alone = [run.model_copy(update={"iterations": (one,)}) for run in runs for one in run.iterations]
    passes = [metrics.derive(one) for one in alone]
    spread = max(bubbles) - min(bubbles)
    busy_s = [(1 - one["bubble_ratio"]) * one["duration_s"] for one in passes]
    idle_s = [one["bubble_ratio"] * one["duration_s"] for one in passes]
    return (
        f"Recorded over unrecorded passes: {statistics.median(ratios):.3f}× "
        f"({min(ratios):.3f}–{max(ratios):.3f}, {len(ratios)} pairs). Bubble of one plan, {len(bubbles)} runs in one "
        f"process, {_RUN.num_iters} passes each: {min(bubbles):.3f}–{max(bubbles):.3f}, apart by {spread:.3f} at most. "
        f"Of its passes each by itself {_range([one['bubble_ratio'] for one in passes])}: a stage computes for "
        f"{_range(busy_s)} s and does not for {_range(idle_s)} s."
    )


def _pass_s(engine: VllmEngine, spec: RunSpec, is_watched: bool) -> float:
    """Seconds of a pass over all prompts, as the engine makes them for a measurement."""
    prompts, lens = engine.prompts(spec.workload), spec.workload.generated_lens
    rows = [{"prompts": list(prompts), "output_lens": list(lens), "at_s": [0.0] * len(prompts)}]
    start_at = time.monotonic() + 0.05
    settings: dict[str, Any] = {"start_at": start_at, "sampling": {"temperature": 0.0}, "record": is_watched}
    (answer,) = engine._all("run", "measure", time.monotonic() + 600, rows, **settings)
    return float(answer["duration_s"])


def beside_ours(python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """Both runtimes' best plans for one workload, each in fresh processes, in rounds of random order."""
    theirs = _tuned("balanced", python, say, least=1)
    say("our runtime for the same workload")
    ours = _study(*_arguments(WORKLOADS["balanced"]), "--n-trials", "10", folder=_FOLDER / "pipetune-balanced")
    plans = {"pipetune": Plan.model_validate(ours["best"]["plan"]), "vLLM": Plan.model_validate(theirs["best"]["plan"])}
    starts: dict[str, Any] = {"pipetune": None, "vLLM": partial(VllmEngine, python=python)}
    order, rates = random.Random(1), {name: list[float]() for name in plans}
    for turn in range(rounds):
        for name in order.sample(sorted(plans), 2):
            say(f"round {turn + 1} of {rounds}: {name}")
            record = _fresh_run(plans[name], starts[name])
            rates[name].append(metrics.derive(_sound(record.result))["output_throughput"])
    ratios = [ours_ / theirs_ for ours_, theirs_ in zip(rates["pipetune"], rates["vLLM"], strict=True)]
    lines = [f"| {name} | {plans[name].describe()} | {_middle(values)} |" for name, values in rates.items()]
    return "\n".join(
        (
            "| runtime | best plan | output tok/s: median (range) |\n|---|---|--:|",
            *lines,
            f"\npipetune over vLLM: {statistics.median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f}, "
            f"{rounds} rounds).",
        )
    )


def where(python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """Where the time of a device goes in the finals of both runtimes' studies of one workload, run by run in seconds;
    nothing is measured."""
    lines = ["| runtime | all | steps with prompts | decode steps | computes nothing |", "|---|--:|--:|--:|--:|"]
    for name, folder in (("pipetune", "pipetune-balanced"), ("vLLM", "vllm-balanced")):
        study = load_study(_FOLDER / folder)
        best = Report.of(study).ranking.rows[0]
        lines += [_where(name, record) for record in study.records if record.number in best.used_records]
    return "\n".join(lines)


def _where(name: str, record: Record) -> str:
    """Where the time of a run goes, in seconds."""
    seen = observe(record)
    assert seen is not None
    plan, took = seen.effective.plan, seen.metrics["duration_s"]
    spent = {True: 0.0, False: 0.0}
    for task in seen.tasks:
        # An engine's steps are counted in tokens of all their sequences.
        per_row = task.new_tokens / (task.rows if plan.engine else 1)
        spent[per_row > 1] += task.seconds * task.count / seen.iterations / (len(plan.devices) * plan.width)
    values = (took, spent[True], spent[False], took - sum(spent.values()))
    return f"| {name}, {plan.describe()} | " + " | ".join(f"{one:.2f}" for one in values) + " |"


def _fresh_run(plan: Plan, start: Any) -> Record:
    protocol = Protocol(num_iters=3, num_iters_warmup=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        Experiment.start(SMOLLM2.model, DEVICES, start_fleet=start) as experiment,
    ):
        workload = WORKLOADS["balanced"]
        failure = experiment.make_reference(Path(folder) / "reference.safetensors", workload, protocol)
        if failure is not None:
            raise FleetError(failure)
        return experiment.measure(plan, workload, protocol)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f}–{max(values):.3f}"


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _sound(result: object) -> Measurement:
    assert isinstance(result, Measurement), result
    return result
