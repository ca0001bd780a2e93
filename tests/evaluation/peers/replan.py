"""How long a running fleet takes to move two layers from one stage to the other, the check of the output included."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from pipetune.bench.fleet.fleet import Progress
from pipetune.bench.record import Failure, Measurement
from pipetune.bench.spec import Plan, Protocol, Workload
from tests.evaluation.peers.rig import DEVICES, Rig
from tests.evaluation.peers.sides import SideError
from tests.evaluation.peers.values import Replan

WORKLOAD = Workload(num_prompts=4, input_len=64, output_len=8)
"""Small: a re-plan ends where the first pass begins."""
MOVES = 6
LAYERS_MOVED = 2


def measure_replans(rig: Rig, cut: int) -> tuple[Replan, ...]:
    """Moves two layers there and back.

    Args:
        rig: whose pipeline fleet is used.
        cut: first layer of the second stage to begin with.

    Raises:
        SideError: a run failed.
    """
    experiment = rig.experiment("pipeline")
    total = experiment.fleet.shape.num_layers
    other = cut + LAYERS_MOVED if cut + LAYERS_MOVED < total else cut - LAYERS_MOVED
    if not 0 < other < total:
        raise SideError(f"{total} layers are too few to move {LAYERS_MOVED}")
    moments: list[float] = []

    def note(progress: Progress) -> None:
        if progress.phase in ("warmup", "measure"):
            moments.append(time.monotonic())

    def move(to_cut: int) -> tuple[Measurement, float]:
        plan = Plan.from_layer_counts((to_cut, total - to_cut), DEVICES, WORKLOAD.num_prompts // 2)
        effective = experiment.fleet.resolve(plan, WORKLOAD)
        moments.clear()
        began = time.monotonic()
        protocol = Protocol(num_iters=1, num_iters_warmup=1)
        outcome = experiment.measure(plan, WORKLOAD, protocol, resolved=effective).result
        if isinstance(outcome, Failure):
            raise SideError(outcome.message)
        return outcome, moments[0] - began

    with tempfile.TemporaryDirectory() as folder:
        failure = experiment.make_reference(Path(folder) / "reference.safetensors", WORKLOAD, Protocol())
        if failure is not None:
            raise SideError(failure.message)
        rig.on_progress = note
        try:
            # The reference took the place of the stages: the first run loads them all.
            move(cut)
            replans = []
            ends = (cut, other)
            for number in range(MOVES):
                from_cut, to_cut = ends[number % 2], ends[(number + 1) % 2]
                outcome, ready_s = move(to_cut)
                replans.append(
                    Replan(
                        from_cut=from_cut,
                        to_cut=to_cut,
                        ready_s=round(ready_s, 4),
                        load_s=outcome.load_s,
                        check_s=outcome.check_s,
                        layers=len(outcome.loaded_layers),
                    )
                )
        finally:
            rig.on_progress = lambda progress: None
    return tuple(replans)
