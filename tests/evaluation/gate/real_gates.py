"""Real gates with a known answer: equal sides, and a candidate whose stages really work 5 or 10 % longer.

The slowdown is put in from outside, by a `sitecustomize` on the path of the candidate's processes: after each forward
pass a stage multiplies matrices for that share of the time the pass took. Neither the gate nor the runtime knows of it.
Kinds follow each other in random order; each gate is one file, and `make bench-gate` goes on where it was left.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console

from pipetune.bench.files import write_durably
from pipetune.bench.spec import ModelSpec, Plan, Protocol, Workload
from pipetune.tuner.config.gate import Tolerance
from pipetune.tuner.gate.run import Gate
from pipetune.tuner.gate.runners import FreshProcesses
from pipetune.tuner.gate.values import Case, GateResult, Sample, Side, SideName, Verdict
from pipetune.tuner.progress import PlainReporter
from tests.evaluation.harness import ROOT
from tests.hooks import write_hook

FOLDER = ROOT / "results" / "gates"
KINDS = {"equal": 0.0, "slower-5": 0.05, "slower-10": 0.10}
COUNTS = {"equal": 12, "slower-5": 8, "slower-10": 8}
_DEVICES = ("cpu:0", "cpu:1")
_SEED = 0
_KEPT = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "bubble_ratio", "peak_memory_bytes")

SLOWDOWN = """
    import time

    import torch

    forward = module.Stage.forward
    left = torch.ones(96, 96)

    def longer(*args, **kwargs):
        began = time.perf_counter()
        output = forward(*args, **kwargs)
        end = time.perf_counter() + {share!r} * (time.perf_counter() - began)
        while time.perf_counter() < end:
            torch.mm(left, left)
        return output

    module.Stage.forward = longer
"""
"""What is done to `bench.runtime.stage.stage` in the candidate's processes."""


def case_of(kind: str, folder: Path) -> Case:
    """One gate: SmolLM2 over two CPU workers, a workload of one to two seconds.

    Args:
        folder: where the candidate's `sitecustomize.py` goes.
    """
    share = KINDS[kind]
    env = {}
    if share:
        write_hook(folder, target="pipetune.bench.runtime.stage.stage", body=SLOWDOWN.format(share=share))
        env = {"PYTHONPATH": f"{folder}:{ROOT}"}
    plan = Plan.from_layer_counts((16, 14), _DEVICES, 8, prefill_micro_batch_size=4)

    def side(name: SideName) -> Side:
        return Side(
            name=name,
            model=ModelSpec(name="smollm2-135m"),
            plan=plan,
            devices=_DEVICES,
            env=env if name == "candidate" else {},
        )

    return Case(
        name=kind,
        workload=Workload(num_prompts=16, input_len=48, output_len=6),
        protocol=Protocol(check_outputs=False),
        baseline=side("baseline"),
        candidate=side("candidate"),
        metrics={"output_throughput": Tolerance()},
    )


def order() -> list[str]:
    """Names of all gates, `slower-5-03` for one, in the order in which they run."""
    names = [f"{kind}-{number:02}" for kind, count in COUNTS.items() for number in range(count)]
    return random.Random(_SEED).sample(names, len(names))


def measure(folder: Path, hooks: Path, *, max_minutes: float) -> bool:
    """Runs the gates that are not there yet.

    Args:
        hooks: a folder for the candidates' `sitecustomize.py`.

    Returns:
        Whether all are there.
    """
    deadline = time.monotonic() + 60 * max_minutes
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(order()):
        path = folder / f"{name}.json"
        if path.exists():
            continue
        if time.monotonic() > deadline:
            return False
        kind = name.rpartition("-")[0]
        case = case_of(kind, hooks / kind)
        result = Gate(cases=(case,), runner=FreshProcesses((case,)), seed=place).run(
            PlainReporter(Console(stderr=True, quiet=True))
        )
        write_durably(path, _portable(result).model_dump_json(indent=1) + "\n")
        sys.stderr.write(
            f"{name}: {result.verdict.value}, {result.findings[0].pairs} pairs, {result.took_s / 60:.1f} min\n"
        )
    return True


def read(folder: Path) -> dict[str, list[GateResult]]:
    """Gates that are there, by kind."""
    return {
        kind: [
            GateResult.model_validate_json(path.read_bytes()) for path in sorted(folder.glob(f"{kind}-[0-9][0-9].json"))
        ]
        for kind in KINDS
    }


def table(folder: Path) -> str:
    """What the gates said, as Markdown; empty where there is none."""
    lines = [
        "| candidate | gates | FAIL | OK | INCONCLUSIVE | worse by: median (least … largest) | pairs: median, most "
        "| SD of a difference: median | noise floor: median, most | minutes: median, in all |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    gates = read(folder)
    for kind, results in gates.items():
        if not results:
            continue
        findings = [result.findings[0] for result in results]
        estimates = [finding.estimate for finding in findings if finding.estimate is not None]
        spreads = [statistics.stdev(finding.differences) for finding in findings if len(finding.differences) > 1]
        floors = [finding.floor for finding in findings if finding.floor is not None]
        pairs = [finding.pairs for finding in findings]
        minutes = [result.took_s / 60 for result in results]
        worse = (
            f"{statistics.median(estimates):+.1%} ({min(estimates):+.1%} … {max(estimates):+.1%})" if estimates else "–"
        )
        counts = [sum(finding.verdict is verdict for finding in findings) for verdict in Verdict]
        cells = (
            "equal sides" if not KINDS[kind] else f"stages work {KINDS[kind]:.0%} longer",
            str(len(results)),
            *map(str, counts),
            worse,
            f"{statistics.median(pairs):g}, {max(pairs)}",
            f"{statistics.median(spreads):.1%}" if spreads else "–",
            f"{statistics.median(floors):.1%}, {max(floors):.1%}" if floors else "–",
            f"{statistics.median(minutes):.1f}, {sum(minutes):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _portable(result: GateResult) -> GateResult:
    """Without the folder of the hook, which is another on every machine, and with the metrics that are looked at."""

    def brief(sample: Sample | None) -> Sample | None:
        if sample is None:
            return None
        return sample.model_copy(
            update={"metrics": {name: sample.metrics[name] for name in _KEPT if name in sample.metrics}}
        )

    pairs = tuple(
        pair.model_copy(update={"baseline": brief(pair.baseline), "candidate": brief(pair.candidate)})
        for pair in result.pairs
    )
    cases = tuple(
        case.model_copy(update={"candidate": case.candidate.model_copy(update={"env": {}})}) for case in result.cases
    )
    return result.model_copy(update={"cases": cases, "pairs": pairs})
