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
from tests.evaluation.engines.grid import DEVICES, SMOLLM2, engine_plan
from tests.evaluation.harness import ROOT, findable
from tests.evaluation.peers.questions import WORKLOADS

SILENT_HOST = Path(__file__).with_name("silent_host.py")
_MODEL = ("--model", "smollm2-135m", "--dtype", "bfloat16", "--devices", ",".join(DEVICES))
_ONE = Protocol(num_iters=1, num_iters_warmup=0, max_warmup=0)


def numbers(python: Path, *, rounds: int, say: Callable[[str], None]) -> str:
    """All tables, as Markdown."""
    folder = ROOT / "results" / "engines"
    best = {name: _tuned(folder, name, python, say) for name in WORKLOADS}
    parts = [
        "| workload | vLLM tuned | over its defaults at two stages |\n|---|---|--:|\n"
        + "\n".join(f"| {name} | {_described(one)} | {_gain(one)} |" for name, one in best.items()),
        _watched(python, rounds, say),
        _beside_ours(folder, best["balanced"], python, rounds, say),
    ]
    return "\n\n".join(parts)


def _tuned(folder: Path, name: str, python: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """A study by the command that users have, or what is there of it; its document."""
    say(f"tuning vLLM for the workload {name}")
    workload = WORKLOADS[name]
    return _study(
        *_arguments(workload),
        *("--engine", "vllm", "--engine-python", str(python), "--enforce-eager", "--kv-cache-memory-bytes", "512MiB"),
        *("--num-iters", "1", "--n-trials", "8", "--finalists", "1", "--finalist-rounds", "5"),
        *("--max-finalist-rounds", "5", "--min-stages", "2"),
        *("--baseline-batch-sizes", str(workload.num_prompts)),
        folder=folder / f"vllm-{name}",
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


def _watched(python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """One plan in one process, its passes recorded and not, in random order; and its bubble from run to run."""
    say("one plan, watched and not")
    order, took = random.Random(0), {True: list[float](), False: list[float]()}
    spec = RunSpec(model=SMOLLM2.model, workload=SMOLLM2.workload, plan=engine_plan((15, 15), 256, 64), protocol=_ONE)
    engine = VllmEngine(SMOLLM2.model, DEVICES, python=python, script=SILENT_HOST)
    try:
        first = engine.measure(spec)
        bubbles = [metrics.derive(_sound(first))["bubble_ratio"]]
        for _ in range(2 * rounds):
            for is_watched in order.sample((True, False), 2):
                took[is_watched].append(_pass_s(engine, spec, is_watched))
        bubbles += [metrics.derive(_sound(engine.measure(spec)))["bubble_ratio"] for _ in range(rounds - 1)]
    finally:
        engine.close()
    ratios = [watched / silent for watched, silent in zip(took[True], took[False], strict=True)]
    spread = max(bubbles) - min(bubbles)
    return (
        f"Recorded over unrecorded passes: {statistics.median(ratios):.3f}× "
        f"({min(ratios):.3f}–{max(ratios):.3f}, {len(ratios)} pairs). Bubble of one plan, {len(bubbles)} runs in one "
        f"process: {min(bubbles):.3f}–{max(bubbles):.3f}, apart by {spread:.3f} at most."
    )


def _pass_s(engine: VllmEngine, spec: RunSpec, is_watched: bool) -> float:
    """Seconds of a pass over all prompts, as the engine makes them for a measurement."""
    prompts, lens = engine.prompts(spec.workload), spec.workload.generated_lens
    rows = [{"prompts": list(prompts), "output_lens": list(lens), "at_s": [0.0] * len(prompts)}]
    start_at = time.monotonic() + 0.05
    settings: dict[str, Any] = {"start_at": start_at, "sampling": {"temperature": 0.0}, "record": is_watched}
    (answer,) = engine._all("run", "measure", time.monotonic() + 600, rows, **settings)
    return float(answer["duration_s"])


def _beside_ours(folder: Path, theirs: dict[str, Any], python: Path, rounds: int, say: Callable[[str], None]) -> str:
    """Both runtimes' best plans for one workload, each in fresh processes, in rounds of random order."""
    say("our runtime for the same workload")
    ours = _study(*_arguments(WORKLOADS["balanced"]), "--n-trials", "10", folder=folder / "pipetune-balanced")
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


def _middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _sound(result: object) -> Measurement:
    assert isinstance(result, Measurement), result
    return result
